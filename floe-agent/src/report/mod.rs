//! A picture without a backend: spans from files of OTLP/JSON lines become one HTML page that needs no network.
//!
//! `read` takes the lines, `arrange` puts the spans of a trace in the order of its rows and finds its
//! critical path, `page` embeds the result in `page.html` with its style and its script. What comes from a traced
//! process is untrusted: it reaches the page as JSON only, the script makes text nodes of it, and a content security
//! policy lets nothing else run.

mod arrange;
mod page;
mod read;

use std::fmt;
use std::fs::File;
use std::io::{BufRead, BufReader, Write as _};
use std::path::{Path, PathBuf};

use thiserror::Error;

/// A report that cannot be made.
#[derive(Debug, Error)]
pub enum ReportError {
    /// A file of spans cannot be read.
    #[error("cannot read spans from {file}: {reason}")]
    Input {
        /// The file, or standard input.
        file: String,
        /// Why not.
        reason: std::io::Error,
    },
    /// None of the lines is what it should be.
    #[error("{problem}; expected OTLP/JSON lines, as `floe-agent exec --output FILE.jsonl` writes them")]
    NoSpans {
        /// The first line that is wrong, and how.
        problem: BadLine,
    },
    /// There is nothing to show.
    #[error("there are no spans in {files}; was something traced?")]
    Empty {
        /// The files.
        files: String,
    },
    /// The page would replace what it is made from.
    #[error("--output {}: this is one of the files to read; choose another name", .file.display())]
    Overwrites {
        /// The file.
        file: PathBuf,
    },
    /// The page cannot be written.
    #[error("cannot write the report to {file}: {reason}")]
    Output {
        /// The file, or standard output.
        file: String,
        /// Why not.
        reason: std::io::Error,
    },
}

/// A line that was skipped.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BadLine {
    file: String,
    line: usize,
    problem: String,
}

impl fmt::Display for BadLine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}, line {}: {}", self.file, self.line, self.problem)
    }
}

/// What a report shows.
#[derive(Clone, Debug)]
pub struct Summary {
    /// Traces.
    pub traces: usize,
    /// Spans.
    pub spans: usize,
    /// Spans that failed.
    pub errors: usize,
    /// Log records.
    pub logs: usize,
    /// Bytes of the page.
    pub bytes: usize,
    /// The first bad line of each file, and how many there are in that file.
    pub skipped: Vec<(BadLine, usize)>,
    /// Spans that were there twice.
    pub repeated: usize,
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let count = |number: usize, what: &str| format!("{number} {what}{}", if number == 1 { "" } else { "s" });
        let [traces, spans] = [count(self.traces, "trace"), count(self.spans, "span")];
        write!(f, "{traces}, {spans}, {}", count(self.errors, "error"))?;
        if self.logs > 0 {
            write!(f, ", {}", count(self.logs, "log record"))?;
        }
        write!(f, " ({:.1} MB)", self.bytes as f64 / 1e6)
    }
}

/// Makes the page of the spans in `files` (`-`: standard input) and writes it to `output` (`-`: standard output).
pub fn write(files: &[PathBuf], output: &Path) -> Result<Summary, ReportError> {
    let is_dash = |path: &Path| path.as_os_str() == "-";
    if !is_dash(output) && files.iter().any(|file| !is_dash(file) && is_same(file, output)) {
        return Err(ReportError::Overwrites { file: output.to_owned() });
    }
    let mut spans = read::Spans::default();
    for file in files {
        if is_dash(file) {
            spans.read("standard input", &mut std::io::stdin().lock())?;
        } else {
            spans.read(&file.display().to_string(), &mut open(file)?)?;
        }
    }
    let (html, summary) = make(&spans)?;
    let failed = |reason| ReportError::Output { file: output.display().to_string(), reason };
    if is_dash(output) {
        std::io::stdout().lock().write_all(html.as_bytes()).map_err(failed)?;
    } else {
        std::fs::write(output, &html).map_err(failed)?;
    }
    Ok(summary)
}

fn make(spans: &read::Spans) -> Result<(String, Summary), ReportError> {
    if spans.is_empty() {
        let files = spans.files().join(", ");
        return Err(match spans.skipped().into_iter().next() {
            Some((problem, _)) => ReportError::NoSpans { problem },
            None => ReportError::Empty { files },
        });
    }
    let skipped = spans.skipped();
    let (traces, repeated) = arrange::arrange(spans);
    let all = || traces.iter().flat_map(|trace| &trace.rows);
    let logs = page::by_span(&traces, &spans.logs);
    let mut summary = Summary {
        traces: traces.len(),
        spans: all().count(),
        errors: all().filter(|row| row.span.failed()).count(),
        logs: logs.values().map(Vec::len).sum(),
        bytes: 0,
        skipped,
        repeated,
    };
    let html = page::page(spans, &traces, logs, &summary);
    summary.bytes = html.len();
    Ok((html, summary))
}

fn open(file: &Path) -> Result<impl BufRead, ReportError> {
    let failed = |reason| ReportError::Input { file: file.display().to_string(), reason };
    File::open(file).map(|file| BufReader::with_capacity(1 << 16, file)).map_err(failed)
}

fn is_same(one: &Path, other: &Path) -> bool {
    one.canonicalize().is_ok_and(|one| other.canonicalize().is_ok_and(|other| one == other))
}
