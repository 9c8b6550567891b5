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
pub enum Compiler {
    /// A rustc with a prebuilt `core` for the target, as Debian packages it.
    Prebuilt(PathBuf),
    /// A nightly toolchain of rustup, by name, that builds `core` from its `rust-src`.
    Nightly(String),
}

/// Finds a compiler: `FLOE_BPF_RUSTC` if it is set, else Debian's, else rustup's nightly.
pub fn find_compiler() -> Option<Compiler> {
    if let Some(rustc) = env::var_os("FLOE_BPF_RUSTC") {
        return prebuilt(PathBuf::from(rustc));
    }
    prebuilt(PathBuf::from("/usr/bin/rustc")).or_else(|| [NIGHTLY, "nightly"].into_iter().find_map(nightly))
}

fn prebuilt(rustc: PathBuf) -> Option<Compiler> {
    let version = output(Command::new(&rustc).arg("--version"))?;
    let sysroot = output(Command::new(&rustc).args(["--print", "sysroot"]))?;
    let core = Path::new(sysroot.trim()).join("lib/rustlib").join(TARGET).join("lib");
    let has_core = fs::read_dir(core).ok()?.flatten().any(|file| {
        let name = file.file_name();
        let name = name.to_string_lossy();
        name.starts_with("libcore-") && name.ends_with(".rlib")
    });
    (has_core && parse_version(&version)? >= RUSTC_VERSION).then_some(Compiler::Prebuilt(rustc))
}

fn nightly(toolchain: &str) -> Option<Compiler> {
    let run = |arguments: &[&str]| output(Command::new("rustup").args(["run", toolchain, "rustc"]).args(arguments));
    let sysroot = run(&["--print", "sysroot"])?;
    let has_source = Path::new(sysroot.trim()).join("lib/rustlib/src/rust/library/core/Cargo.toml").is_file();
    (has_source && parse_version(&run(&["--version"])?)? >= RUSTC_VERSION)
        .then(|| Compiler::Nightly(toolchain.to_owned()))
}

/// Finds bpf-linker: `FLOE_BPF_LINKER` if it is set, else the one of `cargo xtask setup`, cargo's, or one in `PATH`.
pub fn find_linker(workspace: &Path) -> Option<PathBuf> {
    if let Some(linker) = env::var_os("FLOE_BPF_LINKER") {
        return usable_linker(PathBuf::from(linker));
    }
    let cargo_home = env::var_os("CARGO_HOME").map(PathBuf::from);
    let cargo_home = cargo_home.or_else(|| Some(PathBuf::from(env::var_os("HOME")?).join(".cargo")));
    let path = env::var_os("PATH").unwrap_or_default();
    [linker_root(workspace).join("bin")]
        .into_iter()
        .chain(cargo_home.map(|home| home.join("bin")))
        .chain(env::split_paths(&path).filter(|folder| folder.is_absolute()))
        .find_map(|folder| usable_linker(folder.join("bpf-linker")))
}

/// Where set-up installs bpf-linker (the `--root` of `cargo install`). It does not depend on `CARGO_TARGET_DIR`.
pub fn linker_root(workspace: &Path) -> PathBuf {
    let (major, minor, patch) = LINKER_VERSION;
    workspace.join(format!("target/tools/bpf-linker-{major}.{minor}.{patch}"))
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

/// The version in `rustc 1.97.0-nightly (…)`, `bpf-linker 0.13.0`.
fn parse_version(text: &str) -> Option<(u32, u32, u32)> {
    let mut numbers = text.split_whitespace().nth(1)?.split(['.', '-']).map(str::parse);
    let mut next = || numbers.next()?.ok();
    Some((next()?, next()?, next()?))
}
