//! The agent as the demo and the tests run it: the release build.

use std::path::PathBuf;

use anyhow::{Context as _, Result};
use serde_json::Value;

use crate::progress::Progress;
use crate::setup::cargo;

/// Builds the agent, the eBPF programs included, and returns its path.
pub fn build(progress: &Progress) -> Result<PathBuf> {
    let mut command = cargo();
    command.args(["build", "--release", "--package", "floe-agent", "--message-format", "json-render-diagnostics"]);
    let messages = progress.cargo_output("floe-agent, release build", &mut command)?;
    executable(&messages).context("cargo built floe-agent, but did not say where it is")
}

/// The path of the program in cargo's messages.
fn executable(messages: &str) -> Option<PathBuf> {
    messages
        .lines()
        .filter_map(|line| serde_json::from_str::<Value>(line).ok())
        .filter(|message| message["reason"] == "compiler-artifact" && message["target"]["name"] == "floe-agent")
        .find_map(|message| Some(PathBuf::from(message["executable"].as_str()?)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_program_is_found_in_the_messages_of_cargo() {
        let messages = "{\"reason\":\"compiler-artifact\",\"target\":{\"name\":\"floe-agent\"},\"executable\":null}\n\
            {\"reason\":\"compiler-artifact\",\"target\":{\"name\":\"floe-agent\"},\"executable\":\"/x/floe-agent\"}\n";
        assert_eq!(executable(messages), Some(PathBuf::from("/x/floe-agent")));
    }
}
