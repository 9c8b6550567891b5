//! The `floe-agent` command.

/// Spans are made by one thread and freed by another, where this allocator is twice as fast as that of glibc.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> std::process::ExitCode {
    floe_agent::cli::main().into()
}
