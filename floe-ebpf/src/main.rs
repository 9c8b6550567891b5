//! The eBPF programs: what runs in the traced thread.
//!
//! * `programs::gate`: the two ends of an armed call; `capture` reads values there.
//! * `programs::wait`: probes where the thread waits, bounded, until user space has armed something.
//! * `programs::process`: fork, exec and exit.
//!
//! On the host this binary is a stub, so that `cargo check` and rust-analyzer work on the whole workspace; the programs are
//! built for `bpfel-unknown-none` by `floe-agent/build.rs`.
#![cfg_attr(target_arch = "bpf", no_std, no_main, feature(asm_experimental_arch))]
#![allow(missing_docs, reason = "the eBPF object has no documentation of its own")]

#[cfg(target_arch = "bpf")]
mod capture;
#[cfg(target_arch = "bpf")]
mod maps;
#[cfg(target_arch = "bpf")]
mod programs;
#[cfg(target_arch = "bpf")]
mod python;
#[cfg(target_arch = "bpf")]
mod user;

#[cfg(not(target_arch = "bpf"))]
fn main() {
    eprintln!("floe-ebpf holds eBPF programs; floe-agent loads them");
}

#[cfg(target_arch = "bpf")]
#[panic_handler]
fn panic(_info: &core::panic::PanicInfo) -> ! {
    loop {}
}

#[cfg(target_arch = "bpf")]
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
