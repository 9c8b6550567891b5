//! The projects of `tests/fixtures`, and the environments that can run them.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};

use tempfile::TempDir;

use crate::skip;

/// A copy of `tests/fixtures/<name>`, without what running it leaves behind.
pub fn fixture(name: &str) -> TempDir {
    let folder = tempfile::tempdir().expect("a temporary folder can be made");
    copy(&Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures").join(name), folder.path());
    folder
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).expect("the folder is ours");
    for entry in fs::read_dir(from).expect("the fixture can be read") {
        let entry = entry.expect("the fixture can be read");
        let name = entry.file_name();
        if ["target", "logs", ".user.yml", "__pycache__"].iter().any(|left| name == *left) {
            continue;
        }
        let to = to.join(&name);
        if entry.file_type().expect("the fixture can be read").is_dir() {
            copy(&entry.path(), &to);
        } else {
            fs::copy(entry.path(), &to).expect("the fixture can be copied");
        }
    }
}

/// The folders of programs of an environment: `FLOE_TEST_PYTHON_<NAME>`. Says so if there is none.
pub fn programs(name: &str) -> Vec<PathBuf> {
    let variable = format!("FLOE_TEST_PYTHON_{name}");
    let found: Vec<_> = env::var_os(&variable).iter().flat_map(env::split_paths).collect();
    if found.is_empty() {
        skip(&format!("{variable} is not set: `cargo xtask test` makes the environment"));
    }
    found
}
