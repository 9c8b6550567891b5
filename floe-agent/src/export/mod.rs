//! Where finished spans go: terminal, files, OTLP.
//!
//! [`Pipeline`] takes spans without ever waiting and hands them to its sinks, each with a queue and a task of its own.
//! What a queue has no room for is dropped and counted; [`Pipeline::shutdown`] reports.

use std::fmt;
use std::path::{Path, PathBuf};

use thiserror::Error;

mod batch;
mod console;
mod jsonl;
mod otlp;
mod pipeline;
mod redact;
mod sampling;
mod sql;
mod tree;

pub use batch::{log_request, request};
pub use console::ConsoleOptions;
#[cfg(test)]
pub(crate) use otlp::tests as otlp_tests;
pub use otlp::{Batching, Endpoint, Headers, OtlpTarget, Protocol, TargetError};
pub use pipeline::{Counted, ExportReport, Finish, Pipeline, QueueBounds, Tallies, Tally};
pub use redact::{RedactionRules, Redactor, redact_text};
pub use sampling::{Sampler, SamplingRules, SamplingStats};

/// Where spans are to go.
#[derive(Clone, Debug)]
pub enum Output {
    /// A tree on standard error: standard output is the traced command's.
    Console(ConsoleOptions),
    /// A file of OTLP/JSON lines, as the OpenTelemetry Collector's file exporter writes them.
    File(PathBuf),
    /// OTLP endpoints.
    Otlp(Box<OtlpTarget>),
}

impl Output {
    /// An output as `--output` names it: `console`, `console=all`, or a path that ends in `.jsonl`.
    pub fn parse(text: &str) -> Result<Self, ExportError> {
        if let Some(all) = [("console", false), ("console=all", true)].iter().find(|(name, _)| *name == text) {
            return Ok(Self::Console(ConsoleOptions { all: all.1, ..ConsoleOptions::detect() }));
        }
        let extension = Path::new(text).extension().and_then(|extension| extension.to_str());
        if extension == Some("jsonl") {
            return Ok(Self::File(PathBuf::from(text)));
        }
        Err(ExportError::Output(text.to_owned()))
    }
}

impl fmt::Display for Output {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Console(_) => f.write_str("console"),
            Self::File(path) => write!(f, "{}", path.display()),
            Self::Otlp(target) => f.write_str(&target.name()),
        }
    }
}

/// An output that cannot be used.
#[derive(Debug, Error)]
pub enum ExportError {
    /// Not an output.
    #[error("--output {0}: expected `console` or a path that ends in `.jsonl`")]
    Output(String),
    /// The directory of a file does not exist.
    #[error("cannot write traces to {}: the directory {} does not exist; create it first", .file.display(), .directory.display())]
    NoDirectory {
        /// The file.
        file: PathBuf,
        /// Its directory.
        directory: PathBuf,
    },
    /// A file cannot be created.
    #[error("cannot write traces to {}: {source}", .file.display())]
    File {
        /// The file.
        file: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// An OTLP endpoint cannot be used.
    #[error(transparent)]
    Otlp(#[from] TargetError),
    /// Writing failed.
    #[error("cannot write to {sink}: {source}")]
    Write {
        /// The sink.
        sink: String,
        /// Why not.
        source: std::io::Error,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn outputs_are_the_console_and_jsonl_files() {
        assert_eq!(Output::parse("console").unwrap().to_string(), "console");
        assert_eq!(Output::parse("out/x.jsonl").unwrap().to_string(), "out/x.jsonl");
        let error = Output::parse("x.json").unwrap_err().to_string();
        assert_eq!(error, "--output x.json: expected `console` or a path that ends in `.jsonl`");
    }
}
