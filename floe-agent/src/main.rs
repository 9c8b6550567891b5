//! The `floe-agent` command.

fn main() -> std::process::ExitCode {
    floe_agent::cli::main().into()
}
