//! Finds what the build needs and installs what is missing: a rustc that can compile for eBPF, LLVM, bpf-linker.
//!
//! The versions of bpf-linker and of the nightly toolchain are pinned in `ebpf_toolchain`. Debian's packages are not,
//! since an archive keeps one version of each: what must fit is checked instead (rustc's age, and that LLVM is the same
//! for rustc and bpf-linker).

use std::cell::Cell;
use std::env;
use std::ffi::OsString;
use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use clap::Args;

use crate::ebpf_toolchain::{
    Compiler, CompilerKind, LINKER_VERSION, NIGHTLY, RUSTC_VERSION, TARGET, find_compiler, find_linker, linker_root,
    parse_version,
};
use crate::progress::{Progress, note, shell_line};
use crate::workspace;

/// Debian's packages: a rustc beside rustup's, and its `core` for eBPF.
const RUSTC_PACKAGES: &[&str] = &["rustc-web", "libstd-rust-web-dev-bpf"];
/// The LLVM of those packages and of the pinned nightly today.
const EXPECTED_LLVM: u32 = 22;
/// What bpf-linker can be built against.
const LINKER_LLVM: std::ops::RangeInclusive<u32> = 21..=23;
/// How long another apt is waited for.
const APT_WAIT: Duration = Duration::from_mins(5);

#[derive(Args, Clone, Copy)]
pub struct Options {
    /// Print the commands, but run none of them
    #[arg(long)]
    dry_run: bool,
}

/// Runs `cargo xtask setup`.
pub fn run(progress: &Progress, options: Options) -> Result<()> {
    progress.exclusively(|| install(progress, options.dry_run))?;
    if !options.dry_run {
        eprintln!("\nReady: `cargo build` and `cargo xtask demo` will work.");
    }
    Ok(())
}

/// Makes sure that the eBPF programs can be built.
pub fn ensure(progress: &Progress) -> Result<()> {
    progress.exclusively(|| install(progress, false))
}

fn install(progress: &Progress, dry_run: bool) -> Result<()> {
    let installer = Installer::new(progress, dry_run);
    let compiler = match find_compiler() {
        Some(compiler) => {
            progress.ready("rustc for eBPF", &describe(&compiler));
            compiler
        }
        None => installer.compiler()?,
    };
    if let Some(linker) = find_linker(workspace(), compiler.llvm) {
        let shown = linker.strip_prefix(workspace()).unwrap_or(&linker);
        progress.ready("bpf-linker", &shown.display().to_string());
        return Ok(());
    }
    installer.linker(compiler.llvm)
}

fn describe(compiler: &Compiler) -> String {
    match &compiler.kind {
        CompilerKind::Prebuilt(rustc) => format!("{}, LLVM {}", rustc.display(), compiler.llvm),
        CompilerKind::Nightly(programs) => {
            format!("{} with rust-src, LLVM {}", programs.join("rustc").display(), compiler.llvm)
        }
    }
}

/// Installs things, or says how.
pub struct Installer<'a> {
    progress: &'a Progress,
    /// Only print the commands.
    dry_run: bool,
    /// Apt's lists have been read.
    updated: Cell<bool>,
}

impl<'a> Installer<'a> {
    pub fn new(progress: &'a Progress, dry_run: bool) -> Self {
        Self { progress, dry_run, updated: Cell::new(false) }
    }
}

impl Installer<'_> {
    fn compiler(&self) -> Result<Compiler> {
        if let Some(rustc) = env::var_os("FLOE_BPF_RUSTC") {
            bail!(
                "FLOE_BPF_RUSTC is {}, which is not a rustc {}.{} or later with `core` for {TARGET}, nor a rustup toolchain \
                 with rust-src. Unset it to have one installed",
                rustc.display(),
                RUSTC_VERSION.0,
                RUSTC_VERSION.1
            );
        }
        if in_path("apt-get").is_some() && self.apt_offers_compiler()? {
            self.apt(RUSTC_PACKAGES)?;
        } else if in_path("rustup").is_some() {
            self.run(
                &format!("Rust {NIGHTLY} with rust-src, for eBPF"),
                Command::new("rustup")
                    .args(["toolchain", "install", NIGHTLY, "--profile", "minimal", "--component", "rust-src"])
                    .arg("--no-self-update"),
            )?;
        } else {
            bail!(
                "no rustc that can compile for {TARGET}, and neither apt nor rustup to install one with. Install rustup \
                 from https://rustup.rs and run `cargo xtask setup` again"
            );
        }
        if self.dry_run {
            return Ok(Compiler { kind: CompilerKind::Nightly(PathBuf::new()), llvm: EXPECTED_LLVM });
        }
        find_compiler().with_context(|| {
            format!(
                "the rustc that was installed has no usable `core` for {TARGET}. Install rustup's toolchain instead: \
                 rustup toolchain install {NIGHTLY} --profile minimal --component rust-src"
            )
        })
    }

    fn linker(&self, llvm: u32) -> Result<()> {
        let (major, minor, patch) = LINKER_VERSION;
        let version = format!("{major}.{minor}.{patch}");
        if let Some(linker) = env::var_os("FLOE_BPF_LINKER") {
            bail!(
                "FLOE_BPF_LINKER is {}, which is not a bpf-linker {version} or later that runs. Unset it to have one \
                 installed",
                linker.display()
            );
        }
        if !LINKER_LLVM.contains(&llvm) {
            bail!(
                "bpf-linker {version} can be built against LLVM {} to {}, but the rustc for eBPF has LLVM {llvm}. Choose \
                 another one: rustup toolchain install {NIGHTLY} --profile minimal --component rust-src, and set \
                 FLOE_BPF_RUSTC={NIGHTLY}",
                LINKER_LLVM.start(),
                LINKER_LLVM.end()
            );
        }
        let mut llvm_folder = find_llvm(llvm);
        if llvm_folder.is_none() {
            let package = format!("llvm-{llvm}-dev");
            self.apt_update()?;
            if apt_candidate(&package).is_none() && !self.assumes_debian_12() {
                bail!(
                    "LLVM {llvm}'s development files are not there (llvm-config-{llvm}). Install them, or install \
                     bpf-linker {version} or later yourself, for instance with `cargo binstall bpf-linker`, and run \
                     `cargo xtask setup` again"
                );
            }
            self.apt(&[&package])?;
            llvm_folder = find_llvm(llvm);
        }
        let llvm_folder = match llvm_folder {
            Some(folder) => folder,
            None if self.dry_run => PathBuf::from(format!("/usr/lib/llvm-{llvm}")),
            None => bail!("llvm-{llvm}-dev is installed, but there is no llvm-config-{llvm}"),
        };

        let root = linker_root(workspace(), llvm);
        let build = root.join("build");
        let path = env::var_os("PATH").unwrap_or_default();
        let path = env::join_paths([llvm_folder.join("bin")].into_iter().chain(env::split_paths(&path)))?;
        let mut flags = OsString::from("-L native=");
        flags.push(llvm_folder.join("lib"));
        let mut install = cargo();
        install
            .args(["install", "bpf-linker", "--version", &format!("={version}"), "--locked", "--no-default-features"])
            .args(["--features", &format!("llvm-{llvm}"), "--force", "--root"])
            .arg(&root)
            .arg("--target-dir")
            .arg(&build)
            .env("PATH", path)
            .env("RUSTFLAGS", flags);
        self.run(&format!("bpf-linker {version}, built against LLVM {llvm}"), &mut install)?;
        if self.dry_run {
            return Ok(());
        }
        let _ = fs::remove_dir_all(build);
        find_linker(workspace(), llvm).context("bpf-linker was installed, but does not run").map(drop)
    }

    /// Whether apt can install the compiler's packages, and they are new enough.
    fn apt_offers_compiler(&self) -> Result<bool> {
        self.apt_update()?;
        let compiler = apt_candidate(RUSTC_PACKAGES[0]);
        let new_enough = compiler.is_some_and(|version| parse_version(&version) >= Some(RUSTC_VERSION));
        Ok(self.assumes_debian_12()
            || (new_enough && RUSTC_PACKAGES.iter().all(|package| apt_candidate(package).is_some())))
    }

    /// Whether there are no fresh lists to tell what apt has, but this is Debian 12, which has it all.
    fn assumes_debian_12(&self) -> bool {
        (self.dry_run || !is_root())
            && fs::read_to_string("/etc/debian_version").is_ok_and(|version| version.starts_with("12."))
    }

    /// Reads apt's lists, once: old ones name versions that the archive no longer has.
    fn apt_update(&self) -> Result<()> {
        if self.dry_run || !is_root() || in_path("apt-get").is_none() || self.updated.replace(true) {
            return Ok(());
        }
        self.apt_get("package lists (apt-get update)", &["update"])
    }

    /// Installs a Debian package that tests can do without, where that is possible.
    pub fn apt_if_offered(&self, package: &str) -> Result<()> {
        if !is_root() || in_path("apt-get").is_none() {
            return Ok(());
        }
        self.apt_update()?;
        if apt_candidate(package).is_some() { self.apt(&[package]) } else { Ok(()) }
    }

    /// Installs Debian packages.
    pub fn apt(&self, packages: &[&str]) -> Result<()> {
        let mut arguments = vec!["install", "--yes", "--no-install-recommends"];
        arguments.extend(packages);
        if !self.dry_run && !is_root() {
            bail!(
                "only root can install the Debian packages that are missing. Type this, then try again:\n\n    sudo \
                 apt-get update && sudo apt-get {}\n",
                arguments.join(" ")
            );
        }
        self.apt_update()?;
        self.apt_get(&format!("Debian packages {}", packages.join(", ")), &arguments)
    }

    /// Runs apt-get, and waits for another one that runs already.
    fn apt_get(&self, label: &str, arguments: &[&str]) -> Result<()> {
        let begun = Instant::now();
        loop {
            let mut apt = Command::new("apt-get");
            apt.args(["-o", &format!("DPkg::Lock::Timeout={}", APT_WAIT.as_secs())])
                .args(arguments)
                .env("DEBIAN_FRONTEND", "noninteractive");
            match self.run(label, &mut apt) {
                // The time-out above is for dpkg's lock only, not for the one of the lists.
                Err(_) if begun.elapsed() < APT_WAIT && self.progress.last_output().contains("Could not get lock") => {
                    note("another apt is running: trying again");
                    thread::sleep(Duration::from_secs(5));
                }
                result => return result,
            }
        }
    }

    /// Runs a command, or prints it.
    fn run(&self, label: &str, command: &mut Command) -> Result<()> {
        if self.dry_run {
            note(&format!("would install {label}:\n      {}", shell_line(command)));
            return Ok(());
        }
        self.progress.run(label, command)
    }
}

/// Cargo, without what the cargo that runs us has set for us.
pub fn cargo() -> Command {
    let mut cargo = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    for (name, _) in env::vars_os() {
        if name.to_string_lossy().starts_with("CARGO_PKG_") || name == "CARGO_MANIFEST_DIR" {
            cargo.env_remove(&name);
        }
    }
    cargo.current_dir(workspace());
    cargo
}

/// Whether this process may install packages.
pub fn is_root() -> bool {
    fs::metadata("/proc/self").is_ok_and(|metadata| metadata.uid() == 0)
}

/// The first program of this name in `PATH`.
pub fn in_path(program: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH")?;
    env::split_paths(&path).map(|folder| folder.join(program)).find(|file| file.is_file())
}

/// The line `Candidate: <version>` of a package that apt can install.
fn apt_candidate(package: &str) -> Option<String> {
    let policy = Command::new("apt-cache").args(["policy", package]).env("LC_ALL", "C").output().ok()?;
    let text = String::from_utf8_lossy(&policy.stdout).into_owned();
    let line = text.lines().map(str::trim).find(|line| line.starts_with("Candidate: "))?;
    (!line.ends_with("(none)")).then(|| line.to_owned())
}

/// The folder of an LLVM with its development files.
fn find_llvm(major: u32) -> Option<PathBuf> {
    let debian = PathBuf::from(format!("/usr/lib/llvm-{major}/bin/llvm-config"));
    let named = in_path(&format!("llvm-config-{major}"));
    [Some(debian), named, in_path("llvm-config")].into_iter().flatten().find_map(|config| {
        let ask = |what: &str| {
            let output = Command::new(&config).arg(what).stderr(Stdio::null()).output().ok()?;
            Some(String::from_utf8_lossy(&output.stdout).trim().to_owned())
        };
        let fits = ask("--version")?.split('.').next() == Some(&major.to_string());
        let folder = PathBuf::from(ask("--prefix")?);
        (fits && folder.join("lib").is_dir() && folder.join("bin/llvm-config").exists()).then_some(folder)
    })
}
