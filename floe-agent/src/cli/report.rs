//! `floe-agent report`: files of spans become one HTML page. It needs no privileges.

use std::path::{Path, PathBuf};

use anyhow::Result;

use crate::report;

pub(super) fn run(files: &[PathBuf], output: &Path) -> Result<u8> {
    let summary = report::write(files, output)?;
    for (bad, count) in &summary.skipped {
        let more = if *count > 1 { format!(", and {} more lines of that file", count - 1) } else { String::new() };
        eprintln!("floe-agent: skipped {bad}{more}");
    }
    let name = if output.as_os_str() == "-" { "the report".to_owned() } else { output.display().to_string() };
    eprintln!("floe-agent: {name}: {summary}");
    Ok(0)
}
