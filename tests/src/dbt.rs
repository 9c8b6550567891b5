//! The dbt project that is traced.

use std::collections::BTreeMap;
use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::Value;
use tempfile::TempDir;

use crate::agent::Outcome;
use crate::fixture::fixture;
use crate::run::Run;
use crate::skip::skip;
use crate::span::Log;

/// A copy of `tests/fixtures/dbt`.
pub struct Project(TempDir);

impl Project {
    /// A new one.
    pub fn copy() -> Self {
        Self::of("dbt")
    }

    /// A copy of another folder of `tests/fixtures`.
    pub fn of(folder: &str) -> Self {
        Self(fixture(folder))
    }

    /// Its folder.
    pub fn path(&self) -> &Path {
        self.0.path()
    }

    /// A file that dbt wrote into `target`.
    #[track_caller]
    pub fn artifact(&self, name: &str) -> Value {
        let file = self.path().join("target").join(name);
        let text = fs::read_to_string(&file).unwrap_or_else(|error| panic!("dbt wrote no {}: {error}", file.display()));
        serde_json::from_str(&text).expect("dbt writes JSON")
    }

    /// A command of the dbt in an environment, on this project.
    pub fn dbt(&self, bin: &Path, words: &[&str]) -> Run {
        let run = Run::new(bin.join("dbt")).args(words).args(["--project-dir", ".", "--profiles-dir", "."]);
        run.folder(self.path()).limit(Duration::from_mins(3))
    }
}

/// The environment of `FLOE_TEST_PYTHON_DBT`; says so if there is none.
pub fn environment() -> Option<PathBuf> {
    let found = env::var_os("FLOE_TEST_PYTHON_DBT").and_then(|folders| env::split_paths(&folders).next());
    if found.is_none() {
        skip("FLOE_TEST_PYTHON_DBT is not set: `cargo xtask test` makes the environment");
    }
    found
}

/// Events about a node that dbt writes after it: of hooks, and in the summary at the end.
const AFTERWARDS: [&str; 6] = [
    "LogHookEndLine",
    "RunResultError",
    "RunResultErrorNoMessage",
    "RunResultFailure",
    "RunResultWarning",
    "SQLCompiledPath",
];

/// Checks that what dbt wrote about a node is in the node's span; `file` is dbt's own log, in JSON. How many records there are.
#[track_caller]
pub fn node_logs(file: &Path, outcome: &Outcome) -> usize {
    let spans: BTreeMap<&str, &str> =
        outcome.spans.iter().filter_map(|span| Some((span.text("dbt.unique_id")?, span.id.as_str()))).collect();
    let file = fs::read_to_string(file).unwrap_or_else(|error| panic!("dbt wrote no {}: {error}", file.display()));
    let (mut about_nodes, mut wrong) = (0, Vec::new());
    for line in file.lines() {
        let line: Value = serde_json::from_str(line).expect("dbt was told to write JSON");
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        if !["info", "warn", "error"].contains(&text(&line["info"]["level"]).as_str()) {
            continue;
        }
        // Written when the node's work is over, by the thread that sums up: docs/limitations.md.
        if AFTERWARDS.contains(&text(&line["info"]["name"]).as_str()) {
            continue;
        }
        let Some(node) = line["data"]["node_info"]["unique_id"].as_str().filter(|node| spans.contains_key(node)) else {
            continue;
        };
        about_nodes += 1;
        let message = text(&line["info"]["msg"]);
        let plain: String = strip(&message).chars().take(900).collect();
        let records: Vec<_> = outcome.logs.iter().filter(|log| log.body.starts_with(plain.trim_end())).collect();
        let is_it = |log: &&Log| {
            let code = log.attributes.get("dbt.event.code");
            log.span == spans[node] && code.is_none_or(|code| *code == line["info"]["code"])
        };
        if records.is_empty() || !records.iter().all(is_it) {
            let near = |body: &&str| body.starts_with(plain.get(..16).unwrap_or(&plain));
            let bodies: Vec<_> = outcome.logs.iter().map(|log| log.body.as_str()).filter(near).collect();
            wrong.push(format!("{node}: {plain:?}: {records:?}; alike are {bodies:?}"));
        }
    }
    assert!(wrong.is_empty(), "{} of {about_nodes}: {wrong:#?}", wrong.len());
    about_nodes
}

/// Without colours.
fn strip(text: &str) -> String {
    let mut parts = text.split("\u{1b}[");
    let first = parts.next().unwrap_or_default().to_owned();
    parts.fold(first, |all, part| all + part.split_once('m').map_or("", |(_, rest)| rest))
}
