//! `cargo xtask jaeger`: builds Jaeger from its Go module and runs it, so that traces are seen by a reader that is not ours.
//!
//! `xtask/jaeger` is the Go module that pins it; the Go module proxy is all that is needed. Its web pages are not in the
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

/// The package of the Go module.
const PACKAGE: &str = "github.com/jaegertracing/jaeger/cmd/all-in-one";
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
    let jaeger = ensure(progress)?;
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

/// Where Jaeger is, or will be.
pub fn path() -> Result<PathBuf> {
    let module = fs::read_to_string(folder().join("go.mod")).context("cannot read xtask/jaeger/go.mod")?;
    let version = version(&module).context("xtask/jaeger/go.mod does not name Jaeger")?;
    Ok(target().join(format!("tools/jaeger-{version}/jaeger")))
}

/// Builds Jaeger, if that has not been done.
pub fn ensure(progress: &Progress) -> Result<PathBuf> {
    let jaeger = path()?;
    progress.exclusively(|| {
        if jaeger.is_file() {
            progress.ready("Jaeger", &jaeger.strip_prefix(workspace()).unwrap_or(&jaeger).display().to_string());
            return Ok(());
        }
        let go = go(progress)?;
        let parent = jaeger.parent().expect("it is in a folder");
        fs::create_dir_all(parent).with_context(|| format!("cannot create {}", parent.display()))?;
        let unfinished = parent.join(format!("unfinished-{}", std::process::id()));
        let mut build = go_command(&go);
        let jobs = thread::available_parallelism().map_or(2, |cpus| cpus.get().min(4)).to_string();
        build.args(["build", "-p", &jobs, "-trimpath", "-ldflags=-s -w", "-o"]).arg(&unfinished).arg(PACKAGE);
        // The compiler collects garbage more often above this.
        build.env("GOMEMLIMIT", "1GiB").env("CGO_ENABLED", "0");
        progress.run("Jaeger, from the Go module proxy", &mut build)?;
        fs::rename(&unfinished, &jaeger).context("cannot keep Jaeger")
    })?;
    Ok(jaeger)
}

fn folder() -> PathBuf {
    workspace().join("xtask/jaeger")
}

fn version(module: &str) -> Option<&str> {
    let mut words = module.split_whitespace().skip_while(|word| *word != "github.com/jaegertracing/jaeger");
    words.nth(1)?.strip_prefix('v')
}

fn go_command(go: &Path) -> Command {
    let mut command = Command::new(go);
    // What the user's set-up says about other modules is not about this one.
    command.current_dir(folder()).env("GOTOOLCHAIN", "local").env("GOWORK", "off").env("GOFLAGS", "-mod=readonly");
    command.env_remove("GOROOT");
    command
}

/// A Go that is new enough: the machine's, Debian's, or one from the proxy by means of these.
fn go(progress: &Progress) -> Result<PathBuf> {
    let found = find_go();
    if found.is_none() {
        if in_path("apt-get").is_none() {
            bail!("Jaeger is built with Go, which is not there. Install Go 1.21 or later and run this again");
        }
        if !is_root() {
            bail!(
                "Jaeger is built with Go, which is not there. Type `sudo apt-get install golang-go` and run this again"
            );
        }
        Installer::new(progress, false).apt(&["golang-go"])?;
    }
    let go = found.or_else(find_go).context("golang-go was installed, but there is no `go`")?;
    let module = fs::read_to_string(folder().join("go.mod"))?;
    let wanted = module.lines().find(|line| line.starts_with("go ")).and_then(parse_version);
    let machine =
        output(go_command(&go).args(["version"])).and_then(|text| parse_version(&text.replace("version go", "")));
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
        let mut command = go_command(go);
        command.args(arguments).current_dir(&outside).env("GOFLAGS", "");
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
    output(go_command(&go).arg("version")).with_context(|| format!("{} does not run", go.display()))?;
    Ok(go)
}

fn output(command: &mut Command) -> Option<String> {
    let output = command.stdin(Stdio::null()).stderr(Stdio::null()).output().ok()?;
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Jaeger for the tests: an environment variable with its path, or with the reason why there is none.
pub fn variable(progress: &Progress, build: bool, required: bool) -> Result<(String, OsString)> {
    const NOT_BUILT: &str = "Jaeger has not been built: `cargo xtask jaeger --build-only` does";
    let found = if build || required || path()?.is_file() { ensure(progress) } else { Err(anyhow::anyhow!(NOT_BUILT)) };
    match found {
        Ok(jaeger) => Ok(("FLOE_TEST_JAEGER".to_owned(), jaeger.into())),
        Err(error) if required => Err(error),
        Err(error) => {
            let reason = format!("{error:#}");
            let first = reason.lines().next().unwrap_or_default();
            Ok(("FLOE_NO_JAEGER".to_owned(), first.into()))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_version_is_that_of_the_go_module() {
        assert_eq!(version("require (\n\tgithub.com/jaegertracing/jaeger v1.2.3 // indirect\n)"), Some("1.2.3"));
        assert!(path().unwrap().to_string_lossy().contains("tools/jaeger-1."));
    }
}
