//! The `floe-agent` command.

fn main() {}
