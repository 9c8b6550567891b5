//! The CPython interpreters of this machine.

use std::any::Any;
use std::collections::HashSet;
use std::env;
use std::fmt;
use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;

use crate::program;
use crate::run::Run;
use crate::skip::{say, skip, test};

/// A CPython.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Interpreter {
    /// As it is called.
    pub path: PathBuf,
    /// Minor version: 12 for 3.12.1.
    pub minor: u8,
    /// Version in full.
    pub version: String,
    /// Why the agent refuses it, if so: a word that its refusal must contain.
    pub refused: Option<&'static str>,
}

impl fmt::Display for Interpreter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.version, self.path.display())
    }
}

impl Interpreter {
    /// Runs one of the programs of `tests/programs`, isolated from the user's environment.
    pub fn program(&self, name: &str) -> Run {
        Run::new(&self.path).arg("-B").arg(program(name))
    }

    /// Runs a program given as text.
    pub fn script(&self, text: &str) -> Run {
        Run::new(&self.path).arg("-c").arg(text)
    }

    /// Asks a program what it is.
    pub fn identify(path: &Path) -> Option<Self> {
        const QUESTION: &str = "import sys, sysconfig\n\
            v = sys.version_info\n\
            refused = 'debug' if hasattr(sys, 'gettotalrefcount') else \
                      'free-threaded' if sysconfig.get_config_var('Py_GIL_DISABLED') else 'no'\n\
            print(sys.implementation.name, v[0], v[1], '%d.%d.%d' % v[:3], refused)";
        let output =
            Command::new(path).args(["-I", "-S", "-c", QUESTION]).stdin(Stdio::null()).stderr(Stdio::null()).output();
        let text = String::from_utf8(output.ok()?.stdout).ok()?;
        let ["cpython", "3", minor, version, refused] = text.split_whitespace().collect::<Vec<_>>()[..] else {
            return None;
        };
        let minor = minor.parse().ok()?;
        let refused = match refused {
            "debug" => Some("debug"),
            "free-threaded" => Some("free-threaded"),
            _ if !(8..=14).contains(&minor) => Some("version"),
            _ => None,
        };
        Some(Self { path: path.to_owned(), minor, version: version.to_owned(), refused })
    }
}

/// Every CPython 3 of this machine, also those that the agent refuses; each once, by version.
pub(crate) fn all() -> &'static [Interpreter] {
    static ALL: OnceLock<Vec<Interpreter>> = OnceLock::new();
    ALL.get_or_init(|| {
        let mut seen = HashSet::new();
        let mut found: Vec<_> = candidates()
            .into_iter()
            .filter(|path| fs::canonicalize(path).is_ok_and(|real| seen.insert(real)))
            .filter_map(|path| Interpreter::identify(&path))
            .collect();
        found.sort_by_key(|interpreter| (interpreter.minor, interpreter.path.clone()));
        found
    })
}

fn candidates() -> Vec<PathBuf> {
    let mut candidates: Vec<PathBuf> =
        env::var_os("FLOE_TEST_INTERPRETERS").iter().flat_map(env::split_paths).collect();
    if let Some(home) = env::var_os("HOME") {
        let versions = children(&Path::new(&home).join(".pyenv/versions"));
        candidates.extend(versions.into_iter().map(|folder| folder.join("bin/python3")));
    }
    for folder in ["/usr/bin", "/usr/local/bin"] {
        candidates.extend(children(Path::new(folder)).into_iter().filter(|file| {
            let name = file.file_name().unwrap_or_default().to_string_lossy();
            let version = name.strip_prefix("python3").map(|rest| rest.strip_suffix("-dbg").unwrap_or(rest));
            version.is_some_and(|rest| rest.chars().all(|c| ".0123456789dt".contains(c)))
        }));
    }
    candidates
}

fn children(folder: &Path) -> Vec<PathBuf> {
    let mut paths: Vec<_> = fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path()).collect();
    paths.sort();
    paths
}

/// The interpreters that the agent traces; `FLOE_TEST_ONLY=3.11` leaves only those of that version.
pub fn interpreters() -> Vec<&'static Interpreter> {
    let only = env::var("FLOE_TEST_ONLY").unwrap_or_default();
    let traced = all().iter().filter(|found| found.refused.is_none());
    traced.filter(|found| only.is_empty() || format!("{}.", found.version).starts_with(&format!("{only}."))).collect()
}

/// The interpreters that the agent refuses.
pub fn refused() -> Vec<&'static Interpreter> {
    all().iter().filter(|found| found.refused.is_some()).collect()
}

/// The first of these minor versions that is here, else the newest interpreter.
#[track_caller]
pub fn one_of(minors: &[u8]) -> &'static Interpreter {
    let found = interpreters();
    let wanted = minors.iter().find_map(|minor| found.iter().find(|one| one.minor == *minor).copied());
    wanted.or_else(|| found.last().copied()).expect("there is a CPython on this machine")
}

/// The environments that an environment variable names (folders of programs, separated by colons), each as the interpreter
/// in it; says what is missing.
pub fn environments(variable: &str) -> Vec<Interpreter> {
    let only = env::var("FLOE_TEST_ONLY").unwrap_or_default();
    let folders = env::var_os(variable);
    let found: Vec<_> = folders
        .iter()
        .flat_map(env::split_paths)
        .map(|folder| {
            let python = folder.join("python");
            Interpreter::identify(&python)
                .unwrap_or_else(|| panic!("{variable} has {}, which is no environment", folder.display()))
        })
        .filter(|found| only.is_empty() || format!("{}.", found.version).starts_with(&format!("{only}.")))
        .collect();
    if found.is_empty() {
        skip(&format!("{variable} is not set: `cargo xtask test` makes the environments"));
    }
    found
}

/// Runs a test for each interpreter, says which, and panics at the end if it failed for one.
#[track_caller]
pub fn for_each<I: AsRef<Interpreter>>(interpreters: impl IntoIterator<Item = I>, test_one: impl Fn(&Interpreter)) {
    let mut failed = Vec::new();
    let mut names = Vec::new();
    for interpreter in interpreters {
        let interpreter = interpreter.as_ref();
        names.push(interpreter.to_string());
        if let Err(panic) = catch_unwind(AssertUnwindSafe(|| test_one(interpreter))) {
            // The whole message is printed where it panicked.
            let message = message(&*panic);
            failed.push(format!(
                "CPython {interpreter}: {}",
                message.lines().next().unwrap_or_default().chars().take(100).collect::<String>()
            ));
        }
    }
    say(&format!("INTERPRETERS: {}: {}", test(), names.join(", ")));
    assert!(!names.is_empty(), "there is no CPython on this machine");
    assert!(failed.is_empty(), "{} of {} interpreters failed\n{}", failed.len(), names.len(), failed.join("\n"));
}

impl AsRef<Interpreter> for Interpreter {
    fn as_ref(&self) -> &Interpreter {
        self
    }
}

fn message(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().cloned();
    text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned())).unwrap_or_default()
}
