//! Builds the eBPF programs from source (the binary of the crate `floe-ebpf`) and leaves the object at
//! `$OUT_DIR/floe-ebpf`, where `src/kernel` includes it.

#[path = "../xtask/src/ebpf_toolchain.rs"]
mod ebpf_toolchain;

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{self, Command, Stdio};

use ebpf_toolchain::{
    Compiler, CompilerKind, LINKER_VERSION, NIGHTLY, RUSTC_VERSION, TARGET, find_compiler, find_linker,
};

fn main() {
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    let package = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").expect("cargo sets CARGO_MANIFEST_DIR"));
    let workspace = package.parent().expect("the package is in a workspace");

    for input in ["floe-ebpf/src", "floe-ebpf/Cargo.toml", "Cargo.toml", "Cargo.lock", "xtask/src/ebpf_toolchain.rs"] {
        println!("cargo::rerun-if-changed={}", workspace.join(input).display());
    }
    for variable in ["FLOE_BPF_RUSTC", "FLOE_BPF_LINKER"] {
        println!("cargo::rerun-if-env-changed={variable}");
    }

    let compiler = find_compiler();
    let linker = compiler.as_ref().and_then(|compiler| find_linker(workspace, compiler.llvm));
    let (Some(compiler), Some(linker)) = (compiler, linker) else {
        let ((major, minor, _), (linker_major, linker_minor, _)) = (RUSTC_VERSION, LINKER_VERSION);
        println!(
            "cargo::error=the eBPF programs cannot be built: they need a rustc {major}.{minor} or later with `core` for \
             {TARGET} (Debian's rustc-web, or rustup's {NIGHTLY} with rust-src) and bpf-linker \
             {linker_major}.{linker_minor} or later. Run `cargo xtask setup`."
        );
        return;
    };
    println!("cargo::rerun-if-changed={}", linker.display());

    let object = build(workspace, &out.join("ebpf-target"), &compiler, &linker);
    let copy = out.join("floe-ebpf");
    if let Err(error) = fs::copy(&object, &copy) {
        fail(&format!("cannot copy {} to {}: {error}", object.display(), copy.display()));
    }
}

/// Runs cargo for the eBPF crate, in a target folder of its own so that no lock is shared with the cargo that runs us.
fn build(workspace: &Path, target_dir: &Path, compiler: &Compiler, linker: &Path) -> PathBuf {
    let (cargo, rustc) = match &compiler.kind {
        CompilerKind::Prebuilt(rustc) => {
            (PathBuf::from(env::var_os("CARGO").expect("cargo sets CARGO")), rustc.to_owned())
        }
        CompilerKind::Nightly(programs) => (programs.join("cargo"), programs.join("rustc")),
    };
    let mut cargo = Command::new(cargo);
    forget_outer_cargo(&mut cargo);
    cargo
        .current_dir(workspace)
        .args(["build", "--release", "--locked", "--package", "floe-ebpf", "--bin", "floe-ebpf", "--target", TARGET])
        .arg("--target-dir")
        .arg(target_dir)
        .env("RUSTC", rustc)
        .env("CARGO_TARGET_BPFEL_UNKNOWN_NONE_LINKER", linker);
    match &compiler.kind {
        CompilerKind::Prebuilt(_) => cargo.env("RUSTC_BOOTSTRAP", "1"),
        CompilerKind::Nightly(_) => cargo.args(["-Z", "build-std=core"]),
    };
    // bpf_loop takes its callback's address from BTF's func_info, which the linker makes of full debug information. The
    // profile of the workspace is for user space; what matters for the verifier is fixed here.
    let arch = env::var("CARGO_CFG_TARGET_ARCH").expect("cargo sets CARGO_CFG_TARGET_ARCH");
    let flags = [&format!("--cfg=bpf_target_arch=\"{arch}\""), "-Ctarget-cpu=v3", "-Cdebuginfo=2", "-Clink-arg=--btf"];
    cargo.env("CARGO_ENCODED_RUSTFLAGS", flags.join("\x1f"));
    for (setting, value) in [
        ("DEBUG", "2"),
        ("STRIP", "none"),
        ("LTO", "off"),
        ("OPT_LEVEL", "3"),
        ("CODEGEN_UNITS", "1"),
        ("PANIC", "abort"),
        ("DEBUG_ASSERTIONS", "false"),
        ("OVERFLOW_CHECKS", "false"),
    ] {
        cargo.env(format!("CARGO_PROFILE_RELEASE_{setting}"), value);
    }

    let output = match cargo.stdin(Stdio::null()).output() {
        Ok(output) => output,
        Err(error) => fail(&format!("cannot run {}: {error}", cargo.get_program().display())),
    };
    let messages = String::from_utf8_lossy(&output.stderr);
    if !output.status.success() {
        fail(&format!("the eBPF programs (crate floe-ebpf) do not build\n\n{messages}"));
    }
    forward_warnings(&messages);
    target_dir.join(TARGET).join("release/floe-ebpf")
}

/// Removes what the outer cargo, clippy or rustup set for this crate and the user set for the host: it is not meant for
/// the eBPF build. What says where cargo's home and registries are stays, and the job server.
fn forget_outer_cargo(cargo: &mut Command) {
    const KEEP: &[&str] = &[
        "CARGO_HOME",
        "CARGO_MAKEFLAGS",
        "CARGO_NET_",
        "CARGO_HTTP_",
        "CARGO_REGISTR",
        "CARGO_SOURCE_",
        "RUSTUP_HOME",
    ];
    const FORGET: &[&str] = &["CARGO", "RUST", "CLIPPY", "DEP_", "__CARGO"];
    const FORGET_EXACTLY: &[&str] = &["OUT_DIR", "TARGET", "HOST", "NUM_JOBS", "OPT_LEVEL", "PROFILE", "DEBUG"];
    for (name, _) in env::vars_os() {
        let text = name.to_string_lossy();
        let starts_with = |list: &[&str]| list.iter().any(|prefix| text.starts_with(prefix));
        if FORGET_EXACTLY.contains(&&*text) || (starts_with(FORGET) && !starts_with(KEEP)) {
            cargo.env_remove(&name);
        }
    }
    // Cargo puts the libraries of its own toolchain first; another rustc and bpf-linker have theirs.
    if let Some(libraries) = env::var_os("LD_LIBRARY_PATH") {
        let others = env::split_paths(&libraries).filter(|folder| !folder.to_string_lossy().contains("/toolchains/"));
        if let Ok(libraries) = env::join_paths(others) {
            cargo.env("LD_LIBRARY_PATH", libraries);
        }
    }
}

/// Shows each warning of the eBPF build as one line.
fn forward_warnings(messages: &str) {
    let mut lines = messages.lines().peekable();
    while let Some(line) = lines.next() {
        if line.starts_with("warning: ") && !line.contains(" generated ") {
            let place = lines.peek().and_then(|next| next.trim_start().strip_prefix("--> "));
            println!("cargo::warning={} {}", &line["warning: ".len()..], place.unwrap_or_default());
        }
    }
}

fn fail(message: &str) -> ! {
    eprintln!("{message}");
    process::exit(1);
}
