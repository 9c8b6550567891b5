//! The dbt project that is traced.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::Value;
use tempfile::TempDir;

use crate::fixture::fixture;
use crate::run::Run;
use crate::skip::skip;

/// A copy of `tests/fixtures/dbt`.
pub struct Project(TempDir);

impl Project {
    /// A new one.
    pub fn copy() -> Self {
        Self(fixture("dbt"))
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
