//! The compiler and the linker of the eBPF object: where they are looked for, and which ones will do.
//!
//! `floe-agent/build.rs` includes this file too, so what `cargo xtask setup` installs is what the build finds.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// The target of the eBPF programs.
pub const TARGET: &str = "bpfel-unknown-none";
/// The bpf-linker that set-up installs, and the oldest one that is accepted.
pub const LINKER_VERSION: (u32, u32, u32) = (0, 13, 0);
/// The oldest rustc that is accepted: `rust-version` of the workspace.
pub const RUSTC_VERSION: (u32, u32, u32) = (1, 95, 0);
/// The rustup toolchain that is used where no packaged rustc has the target; plain `nightly` is accepted as well.
pub const NIGHTLY: &str = "nightly-2026-05-20";

/// A rustc that can compile for [`TARGET`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Compiler {
    /// How it is run.
    pub kind: CompilerKind,
    /// Major version of its LLVM: bpf-linker must be built against the same.
    pub llvm: u32,
}

/// The two ways to have a compiler.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CompilerKind {
    /// A rustc with a prebuilt `core` for the target, as Debian packages it.
    Prebuilt(PathBuf),
    /// A nightly toolchain of rustup, by its folder of programs, that builds `core` from its `rust-src`.
    Nightly(PathBuf),
}

/// Finds a compiler: `FLOE_BPF_RUSTC` (a path, or the name of a rustup toolchain) if it is set, else Debian's, else
/// rustup's nightly.
pub fn find_compiler() -> Option<Compiler> {
    if let Ok(choice) = env::var("FLOE_BPF_RUSTC") {
        return if choice.contains('/') { prebuilt(PathBuf::from(choice)) } else { nightly(&choice) };
    }
    prebuilt(PathBuf::from("/usr/bin/rustc")).or_else(|| [NIGHTLY, "nightly"].into_iter().find_map(nightly))
}

fn prebuilt(rustc: PathBuf) -> Option<Compiler> {
    let llvm = llvm_of_usable(&output(Command::new(&rustc).arg("-vV"))?)?;
    let sysroot = output(Command::new(&rustc).args(["--print", "sysroot"]))?;
    let core = Path::new(sysroot.trim()).join("lib/rustlib").join(TARGET).join("lib");
    let has_core = fs::read_dir(core).ok()?.flatten().any(|file| {
        let name = file.file_name();
        let name = name.to_string_lossy();
        name.starts_with("libcore-") && name.ends_with(".rlib")
    });
    has_core.then_some(Compiler { kind: CompilerKind::Prebuilt(rustc), llvm })
}

fn nightly(toolchain: &str) -> Option<Compiler> {
    let run = |argument: &[&str]| output(Command::new("rustup").args(["run", toolchain, "rustc"]).args(argument));
    let llvm = llvm_of_usable(&run(&["-vV"])?)?;
    let sysroot = run(&["--print", "sysroot"])?;
    let sysroot = Path::new(sysroot.trim());
    let has_source = sysroot.join("lib/rustlib/src/rust/library/core/Cargo.toml").is_file();
    has_source.then(|| Compiler { kind: CompilerKind::Nightly(sysroot.join("bin")), llvm })
}

/// The LLVM of a rustc that is not too old, from `rustc -vV`.
fn llvm_of_usable(verbose_version: &str) -> Option<u32> {
    if parse_version(verbose_version)? < RUSTC_VERSION {
        return None;
    }
    let line = verbose_version.lines().find_map(|line| line.strip_prefix("LLVM version: "))?;
    line.split('.').next()?.parse().ok()
}

/// Finds a bpf-linker for the given LLVM: `FLOE_BPF_LINKER` if it is set, else the one of `cargo xtask setup`, cargo's,
/// or one in `PATH`. What LLVM the last two were built against cannot be told.
pub fn find_linker(workspace: &Path, llvm: u32) -> Option<PathBuf> {
    if let Some(linker) = env::var_os("FLOE_BPF_LINKER") {
        return usable_linker(PathBuf::from(linker));
    }
    let cargo_home = env::var_os("CARGO_HOME").map(PathBuf::from);
    let cargo_home = cargo_home.or_else(|| Some(PathBuf::from(env::var_os("HOME")?).join(".cargo")));
    let path = env::var_os("PATH").unwrap_or_default();
    [linker_root(workspace, llvm).join("bin")]
        .into_iter()
        .chain(cargo_home.map(|home| home.join("bin")))
        .chain(env::split_paths(&path).filter(|folder| folder.is_absolute()))
        .find_map(|folder| usable_linker(folder.join("bpf-linker")))
}

/// Where set-up installs bpf-linker (the `--root` of `cargo install`). It does not depend on `CARGO_TARGET_DIR`.
pub fn linker_root(workspace: &Path, llvm: u32) -> PathBuf {
    let (major, minor, patch) = LINKER_VERSION;
    workspace.join(format!("target/tools/bpf-linker-{major}.{minor}.{patch}-llvm-{llvm}"))
}

fn usable_linker(linker: PathBuf) -> Option<PathBuf> {
    let version = output(Command::new(&linker).arg("--version"))?;
    (parse_version(&version)? >= LINKER_VERSION).then_some(linker)
}

/// What a command that succeeds writes on its standard output.
fn output(command: &mut Command) -> Option<String> {
    let output = command.stdin(Stdio::null()).stderr(Stdio::null()).output().ok()?;
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).into_owned())
}

/// The version in `rustc 1.97.0-nightly (…)`, `bpf-linker 0.13.0`, `Candidate: 1.96.0+dfsg1-1~deb12u2`.
pub fn parse_version(text: &str) -> Option<(u32, u32, u32)> {
    let mut numbers = text.split_whitespace().nth(1)?.split(|c: char| !c.is_ascii_digit()).map(str::parse);
    let mut next = || numbers.next()?.ok();
    Some((next()?, next()?, next()?))
}
