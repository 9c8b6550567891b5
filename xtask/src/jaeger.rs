//! `cargo xtask jaeger`: builds Jaeger from its Go module and runs it, so that traces are seen by a reader that is not ours.
//! For the tests an OpenTelemetry Collector is built in the same way.
//!
//! `xtask/backends` is the Go module that pins them; the Go module proxy is all that is needed. Jaeger's web pages are not in the
//! module: what runs is the OTLP receiver, spans in memory, and the HTTP API of the queries.

use std::ffi::OsString;
use std::fs;
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use clap::Args;

use crate::ebpf_toolchain::parse_version;
use crate::progress::Progress;
use crate::setup::{Installer, in_path, is_root};
use crate::{target, workspace};

/// What can be built from Go modules.
#[derive(Clone, Copy)]
pub struct Backend {
    name: &'static str,
    /// The Go module that its version is that of.
    module: &'static str,
    /// The package of its program.
    package: &'static str,
    /// Our module that pins it, a folder of `xtask`.
    pins: &'static str,
}

/// Jaeger.
pub const JAEGER: Backend = Backend {
    name: "jaeger",
    module: "github.com/jaegertracing/jaeger",
    package: "github.com/jaegertracing/jaeger/cmd/all-in-one",
    pins: "backends",
};
/// The OpenTelemetry Collector, with an OTLP receiver and a file exporter.
pub const COLLECTOR: Backend = Backend {
    name: "collector",
    module: "go.opentelemetry.io/collector/otelcol",
    package: "./collector",
    pins: "backends",
};
/// What renders the Helm chart.
pub const CHART: Backend = Backend { name: "chart", module: "helm.sh/helm/v3", package: ".", pins: "chart" };

/// The Go that is used where the one of the machine is too old; the proxy has it as a module.
const GO: (u32, u32, u32) = (1, 26, 5);

#[derive(Args)]
pub struct Options {
    /// Only build it
    #[arg(long)]
    build_only: bool,
    /// Port for OTLP/gRPC; 0: any that is free
    #[arg(long, default_value_t = 4317)]
    otlp_grpc: u16,
    /// Port for OTLP/HTTP; 0: any that is free
    #[arg(long, default_value_t = 4318)]
    otlp_http: u16,
    /// Port for queries; 0: any that is free
    #[arg(long, default_value_t = 16686)]
    query: u16,
}

/// Runs `cargo xtask jaeger`.
pub fn run(progress: &Progress, options: &Options) -> Result<()> {
    let jaeger = ensure(progress, JAEGER)?;
    if options.build_only {
        println!("{}", jaeger.display());
        return Ok(());
    }
    let port = |wanted: u16, option: &str| {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, wanted));
        let listener =
            listener.with_context(|| format!("port {wanted} cannot be had; choose another with {option}"))?;
        Ok::<_, anyhow::Error>(listener.local_addr()?.port())
    };
    let (grpc, http) = (port(options.otlp_grpc, "--otlp-grpc")?, port(options.otlp_http, "--otlp-http")?);
    let query = port(options.query, "--query")?;
    let mut command = Command::new(&jaeger);
    command.arg("--log-level=error").stdin(Stdio::null()).stderr(Stdio::null());
    for (flag, port) in [
        ("collector.otlp.grpc", grpc),
        ("collector.otlp.http", http),
        ("query.http-server", query),
        // Of no use here, but they cannot be turned off.
        ("query.grpc-server", port(0, "")?),
        ("collector.grpc-server", port(0, "")?),
        ("collector.http-server", port(0, "")?),
        ("admin.http", port(0, "")?),
    ] {
        command.arg(format!("--{flag}.host-port=127.0.0.1:{port}"));
    }
    // Ctrl-C in a terminal reaches it as well.
    let mut child = command.spawn().with_context(|| format!("cannot run {}", jaeger.display()))?;
    let deadline = Instant::now() + Duration::from_secs(30);
    while TcpStream::connect((Ipv4Addr::LOCALHOST, query)).is_err() {
        if let Some(status) = child.try_wait()? {
            bail!("Jaeger ended with {status}");
        }
        if Instant::now() > deadline {
            let _ = child.kill();
            bail!("Jaeger does not answer on port {query}");
        }
        thread::sleep(Duration::from_millis(20));
    }
    eprintln!("\nJaeger runs until Ctrl-C; its spans are in memory.");
    println!("OTLP/gRPC  http://127.0.0.1:{grpc}");
    println!("OTLP/HTTP  http://127.0.0.1:{http}");
    println!("queries    http://127.0.0.1:{query}/api/services, /api/traces?service=NAME");
    let status = child.wait()?;
    if !status.success() {
        bail!("Jaeger ended with {status}");
    }
    Ok(())
}

/// Where the program is, or will be.
fn path(Backend { name, module, pins, .. }: Backend) -> Result<PathBuf> {
    let text =
        fs::read_to_string(folder(pins).join("go.mod")).with_context(|| format!("cannot read xtask/{pins}/go.mod"))?;
    let version = version(&text, module).with_context(|| format!("xtask/{pins}/go.mod does not name {module}"))?;
    Ok(target().join(format!("tools/{name}-{version}/{name}")))
}

/// Builds a backend, if that has not been done.
pub fn ensure(progress: &Progress, backend: Backend) -> Result<PathBuf> {
    let program = path(backend)?;
    progress.exclusively(|| {
        if program.is_file() {
            let shown = program.strip_prefix(workspace()).unwrap_or(&program);
            progress.ready(backend.name, &shown.display().to_string());
            return Ok(());
        }
        let folder = folder(backend.pins);
        let go = go(progress, &folder)?;
        let parent = program.parent().expect("it is in a folder");
        fs::create_dir_all(parent).with_context(|| format!("cannot create {}", parent.display()))?;
        let unfinished = parent.join(format!("unfinished-{}", std::process::id()));
        let mut build = go_command(&go, &folder);
        let jobs = thread::available_parallelism().map_or(2, |cpus| cpus.get().min(4)).to_string();
        build.args(["build", "-p", &jobs, "-trimpath", "-ldflags=-s -w", "-o"]).arg(&unfinished).arg(backend.package);
        // The compiler collects garbage more often above this.
        build.env("GOMEMLIMIT", "1GiB").env("CGO_ENABLED", "0");
        progress.run(&format!("{}, from the Go module proxy", backend.name), &mut build)?;
        fs::rename(&unfinished, &program).with_context(|| format!("cannot keep {}", program.display()))
    })?;
    Ok(program)
}

fn folder(pins: &str) -> PathBuf {
    workspace().join("xtask").join(pins)
}

fn version<'a>(pins: &'a str, module: &str) -> Option<&'a str> {
    let mut words = pins.split_whitespace().skip_while(|word| *word != module);
    words.nth(1)?.strip_prefix('v')
}

fn go_command(go: &Path, folder: &Path) -> Command {
    let mut command = Command::new(go);
    // What the user's set-up says about other modules is not about this one.
    command.current_dir(folder).env("GOTOOLCHAIN", "local").env("GOWORK", "off").env("GOFLAGS", "-mod=readonly");
    command.env_remove("GOROOT");
    command
}

/// A Go that is new enough: the machine's, Debian's, or one from the proxy by means of these.
fn go(progress: &Progress, folder: &Path) -> Result<PathBuf> {
    let found = find_go();
    if found.is_none() {
        if in_path("apt-get").is_none() {
            bail!("this is built with Go, which is not there. Install Go 1.21 or later and run this again");
        }
        if !is_root() {
            bail!(
                "this is built with Go, which is not there. Type `sudo apt-get install golang-go` and run this again"
            );
        }
        Installer::new(progress, false).apt(&["golang-go"])?;
    }
    let go = found.or_else(find_go).context("golang-go was installed, but there is no `go`")?;
    let module = fs::read_to_string(folder.join("go.mod"))?;
    let wanted = module.lines().find(|line| line.starts_with("go ")).and_then(parse_version);
    let machine = output(go_command(&go, folder).args(["version"]))
        .and_then(|text| parse_version(&text.replace("version go", "")));
    if machine >= wanted {
        return Ok(go);
    }
    newer_go(progress, &go)
}

fn find_go() -> Option<PathBuf> {
    in_path("go").or_else(|| Some(PathBuf::from("/usr/local/go/bin/go")).filter(|go| go.is_file()))
}

/// Go from the proxy: a module like others, except that an old Go does not make its programs executable.
fn newer_go(progress: &Progress, go: &Path) -> Result<PathBuf> {
    let (major, minor, patch) = GO;
    let module = format!("golang.org/toolchain@v0.0.1-go{major}.{minor}.{patch}.linux-amd64");
    let outside = target().join("tools");
    fs::create_dir_all(&outside)?;
    let in_outside = |arguments: &[&str]| {
        let mut command = go_command(go, &outside);
        command.args(arguments).env("GOFLAGS", "");
        command
    };
    progress.run(&format!("Go {major}.{minor}.{patch}"), &mut in_outside(&["mod", "download", &module]))?;
    let cache = output(&mut in_outside(&["env", "GOMODCACHE"])).context("`go env GOMODCACHE` says nothing")?;
    let root = Path::new(cache.trim()).join(module);
    for folder in ["bin", "pkg/tool/linux_amd64"] {
        for program in fs::read_dir(root.join(folder)).into_iter().flatten().flatten() {
            fs::set_permissions(program.path(), fs::Permissions::from_mode(0o555))
                .with_context(|| format!("cannot make {} executable", program.path().display()))?;
        }
    }
    let go = root.join("bin/go");
    output(go_command(&go, &outside).arg("version")).with_context(|| format!("{} does not run", go.display()))?;
    Ok(go)
}

fn output(command: &mut Command) -> Option<String> {
    let output = command.stdin(Stdio::null()).stderr(Stdio::null()).output().ok()?;
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).into_owned())
}

/// The backends for the tests: environment variables with their paths, or with the reason why there are none.
pub fn variables(progress: &Progress, build: bool, required: bool) -> Result<Vec<(&'static str, OsString)>> {
    const NOT_BUILT: &str = "Jaeger has not been built: `cargo xtask jaeger --build-only` does";
    let found = || {
        if !build && !required && !path(JAEGER)?.is_file() {
            bail!(NOT_BUILT);
        }
        Ok((ensure(progress, JAEGER)?, ensure(progress, COLLECTOR)?))
    };
    match found() {
        Ok((jaeger, collector)) => {
            Ok(vec![("FLOE_TEST_JAEGER", jaeger.into()), ("FLOE_TEST_COLLECTOR", collector.into())])
        }
        Err(error) if required => Err(error),
        Err(error) => {
            let reason = format!("{error:#}");
            Ok(vec![("FLOE_NO_JAEGER", reason.lines().next().unwrap_or_default().into())])
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_version_is_that_of_the_go_module() {
        let pins = "require (\n\tgithub.com/jaegertracing/jaeger v1.2.3 // indirect\n)";
        assert_eq!(version(pins, JAEGER.module), Some("1.2.3"));
        for backend in [JAEGER, COLLECTOR] {
            assert!(path(backend).unwrap().to_string_lossy().contains(&format!("tools/{}-", backend.name)));
        }
    }
}
