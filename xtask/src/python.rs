//! Python interpreters and environments for the demo and the tests.
//!
//! An environment is made of a file of `tests/fixtures/requirements` and an interpreter. Lines `# floe: …` at the top of
//! the file say how:
//!
//! * `# floe: no-deps`: install exactly what is listed;
//! * `# floe: python 3.11 3.10`: the interpreters to choose from, best first;
//! * `# floe: python each 3.11 3.13`: one environment for each of these;
//! * `# floe: python all`: one environment for each interpreter that is found.

use std::collections::HashSet;
use std::env;
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, bail};

use crate::progress::Progress;
use crate::setup::{Installer, in_path, is_root};
use crate::{target, workspace};

/// Minor versions of CPython 3 that environments are made with, best first.
const PREFERENCE: &[u8] = &[12, 11, 13, 10, 9];
/// Minor versions of CPython 3 that the agent supports.
const SUPPORTED: std::ops::RangeInclusive<u8> = 8..=14;

/// A CPython on this machine.
#[derive(Clone, Debug)]
pub struct Interpreter {
    /// The file that runs, links resolved.
    pub path: PathBuf,
    /// Such as 3.12.1.
    pub version: (u8, u8, u8),
    /// Environments can be made with it.
    can_make_environments: bool,
}

impl fmt::Display for Interpreter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (major, minor, patch) = self.version;
        write!(f, "{major}.{minor}.{patch} ({})", self.path.display())
    }
}

/// Every supported interpreter on this machine, each once, by version: version-managed ones, the system's, those in `PATH`.
pub fn interpreters() -> Vec<Interpreter> {
    let mut candidates = Vec::new();
    if let Some(home) = env::var_os("HOME") {
        let versions = Path::new(&home).join(".pyenv/versions");
        candidates.extend(children(&versions).into_iter().map(|folder| folder.join("bin/python3")));
    }
    let path = env::var_os("PATH").unwrap_or_default();
    for folder in
        [PathBuf::from("/usr/bin"), PathBuf::from("/usr/local/bin")].into_iter().chain(env::split_paths(&path))
    {
        candidates.extend(children(&folder).into_iter().filter(|file| {
            let name = file.file_name().unwrap_or_default().to_string_lossy();
            name.strip_prefix("python3").is_some_and(|rest| {
                rest.is_empty() || rest.strip_prefix('.').is_some_and(|minor| minor.parse::<u8>().is_ok())
            })
        }));
    }
    let mut seen = HashSet::new();
    let mut found: Vec<_> = candidates.into_iter().filter_map(|path| identify(&path, &mut seen)).collect();
    found.sort_by_key(|interpreter| interpreter.version);
    found
}

fn children(folder: &Path) -> Vec<PathBuf> {
    let mut paths: Vec<_> = fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path()).collect();
    paths.sort();
    paths
}

/// Asks an interpreter what it is; `seen` holds the ones that are known, by the file they run.
fn identify(path: &Path, seen: &mut HashSet<PathBuf>) -> Option<Interpreter> {
    const QUESTION: &str = "import os, sys, importlib.util as u\n\
        venv = all(u.find_spec(name) for name in ('venv', 'ensurepip'))\n\
        plain = sys.implementation.name == 'cpython' and sys.prefix == sys.base_prefix\n\
        print(*sys.version_info[:3], int(venv), int(plain), os.path.realpath(sys.executable))";
    if !seen.insert(fs::canonicalize(path).ok()?) {
        return None;
    }
    let output = Command::new(path)
        .args(["-I", "-S", "-c", QUESTION])
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .output()
        .ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    let mut words = text.trim().splitn(6, ' ');
    let mut number = || words.next()?.parse::<u8>().ok();
    let (version, venv, plain) = ((number()?, number()?, number()?), number()? == 1, number()? == 1);
    let real = PathBuf::from(words.next()?);
    // A shim runs a file that may be known already.
    if real != fs::canonicalize(path).ok()? && !seen.insert(real.clone()) {
        return None;
    }
    (plain && version.0 == 3 && SUPPORTED.contains(&version.1)).then_some(Interpreter {
        path: real,
        version,
        can_make_environments: venv,
    })
}

/// What an environment is to be.
#[derive(Clone, Debug)]
pub struct Spec {
    /// Name of the requirements file, without `.txt`.
    pub name: String,
    file: PathBuf,
    text: String,
    directives: Directives,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Directives {
    no_deps: bool,
    choice: Choice,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Choice {
    Best(Vec<u8>),
    Each(Vec<u8>),
    All,
}

/// An environment that is there.
pub struct Environment {
    /// Its folder of programs.
    pub bin: PathBuf,
}

impl Spec {
    /// Reads `tests/fixtures/requirements/<name>.txt`.
    pub fn load(workspace: &Path, name: &str) -> Result<Self> {
        Self::of_file(workspace.join(format!("tests/fixtures/requirements/{name}.txt")), name)
    }

    /// The same with Python 3.`minor`, whatever the file wants.
    pub fn on(mut self, minor: u8) -> Self {
        self.name = format!("{}-py3.{minor}", self.name);
        self.directives.choice = Choice::Best(vec![minor]);
        self
    }

    /// A requirements file elsewhere.
    pub fn of_file(file: PathBuf, name: &str) -> Result<Self> {
        let text = fs::read_to_string(&file).with_context(|| format!("cannot read {}", file.display()))?;
        let directives = directives(&text).with_context(|| file.display().to_string())?;
        Ok(Self { name: name.to_owned(), file, text, directives })
    }

    /// All of `tests/fixtures/requirements`.
    pub fn all(workspace: &Path) -> Result<Vec<Self>> {
        children(&workspace.join("tests/fixtures/requirements"))
            .iter()
            .filter(|file| file.extension().is_some_and(|extension| extension == "txt"))
            .filter_map(|file| file.file_stem()?.to_str())
            .map(|name| Self::load(workspace, name))
            .collect()
    }
}

fn directives(text: &str) -> Result<Directives> {
    let mut directives = Directives { no_deps: false, choice: Choice::Best(PREFERENCE.to_vec()) };
    for directive in text.lines().filter_map(|line| line.strip_prefix("# floe:")) {
        match directive.split_whitespace().collect::<Vec<_>>()[..] {
            ["no-deps"] => directives.no_deps = true,
            ["python", "all"] => directives.choice = Choice::All,
            ["python", "each", ref versions @ ..] if !versions.is_empty() => {
                directives.choice = Choice::Each(minors(versions, directive)?);
            }
            ["python", ref versions @ ..] if !versions.is_empty() => {
                directives.choice = Choice::Best(minors(versions, directive)?);
            }
            _ => bail!("`# floe:{directive}` is not known"),
        }
    }
    Ok(directives)
}

/// The minors of `3.11 3.13`.
fn minors(versions: &[&str], directive: &str) -> Result<Vec<u8>> {
    let minors: Option<_> = versions.iter().map(|version| version.strip_prefix("3.")?.parse().ok()).collect();
    minors.with_context(|| format!("`# floe:{directive}`: not versions"))
}

/// Makes the environments of a requirements file that are not there yet.
///
/// They are in `target/python`, named by what they are made of, so another requirement makes another environment.
pub fn environments(progress: &Progress, spec: &Spec) -> Result<Vec<Environment>> {
    progress.exclusively(|| {
        let chosen = choose(progress, spec)?;
        chosen.iter().map(|interpreter| environment(progress, spec, interpreter)).collect()
    })
}

/// The interpreters for a requirements file; installs what Debian leaves out of its own.
fn choose(progress: &Progress, spec: &Spec) -> Result<Vec<Interpreter>> {
    let pick = || {
        let mut able: Vec<_> = interpreters().into_iter().filter(|found| found.can_make_environments).collect();
        match &spec.directives.choice {
            Choice::All => able,
            Choice::Best(minors) => {
                able.reverse();
                let best = minors.iter().find_map(|minor| able.iter().find(|found| found.version.1 == *minor));
                best.cloned().into_iter().collect()
            }
            Choice::Each(minors) => {
                able.reverse();
                minors.iter().filter_map(|minor| able.iter().find(|found| found.version.1 == *minor).cloned()).collect()
            }
        }
    };
    let mut chosen = pick();
    if chosen.is_empty() && in_path("apt-get").is_some() {
        Installer::new(progress, false).apt(&["python3", "python3-venv"])?;
        chosen = pick();
    }
    if chosen.is_empty() {
        let minors = match &spec.directives.choice {
            Choice::All => SUPPORTED.collect(),
            Choice::Best(minors) | Choice::Each(minors) => minors.clone(),
        };
        let versions: Vec<_> = minors.iter().map(|minor| format!("3.{minor}")).collect();
        let who = if is_root() { "" } else { ", with its venv module" };
        bail!(
            "no Python for the environment {}: it needs CPython {}{who}, and looked in ~/.pyenv/versions, /usr/bin and PATH",
            spec.name,
            versions.join(" or ")
        );
    }
    Ok(chosen)
}

fn environment(progress: &Progress, spec: &Spec, interpreter: &Interpreter) -> Result<Environment> {
    let made_of = format!("{interpreter}\n{}", spec.text);
    let (_, minor, _) = interpreter.version;
    let folder = target().join(format!("python/{}-py3{minor}-{:08x}", spec.name, fnv(&made_of)));
    let bin = folder.join("bin");
    let stamp = folder.join("complete");
    let label = format!("Python environment {}", spec.name);
    if stamp.exists() {
        progress.ready(&label, &format!("CPython {interpreter}"));
        return Ok(Environment { bin });
    }
    if folder.exists() {
        fs::remove_dir_all(&folder).with_context(|| format!("cannot remove {}", folder.display()))?;
    }
    progress.run(
        &format!("{label}, CPython {interpreter}"),
        without_python(&interpreter.path).args(["-m", "venv", "--without-pip"]).arg(&folder),
    )?;
    let python = bin.join("python");
    let packages = |mut installer: Command| {
        installer.arg("--requirement").arg(&spec.file);
        if spec.directives.no_deps {
            installer.arg("--no-deps");
        }
        progress.run(&format!("{label}, packages"), &mut installer)
    };
    let with_uv = uv(progress, interpreter).and_then(|uv| {
        let mut installer = without_python(&uv);
        for (of_pip, own) in UV_VARIABLES {
            installer.envs(env::var_os(of_pip).map(|value| (own, value)));
        }
        installer.args(["pip", "install", "--no-progress", "--compile-bytecode", "--python"]).arg(&python);
        packages(installer)
    });
    // pip is slow, and knows all that its user has configured.
    with_uv.or_else(|_| {
        let mut ensurepip = without_python(&python);
        progress.run(&format!("{label}, pip"), ensurepip.args(["-m", "ensurepip"]))?;
        packages(pip_install(&python))
    })?;
    fs::write(&stamp, made_of)?;
    Ok(Environment { bin })
}

/// `pip install`, of an environment's own pip.
fn pip_install(python: &Path) -> Command {
    let mut command = without_python(python);
    command.args(["-m", "pip", "install", "--no-input", "--disable-pip-version-check", "--progress-bar", "off"]);
    command
}

/// uv, which installs packages several times as fast as pip.
const UV: &str = "0.13.9";
/// Variables of pip, and what uv calls them.
const UV_VARIABLES: [(&str, &str); 4] = [
    ("PIP_INDEX_URL", "UV_DEFAULT_INDEX"),
    ("PIP_EXTRA_INDEX_URL", "UV_INDEX"),
    ("PIP_FIND_LINKS", "UV_FIND_LINKS"),
    ("PIP_CERT", "SSL_CERT_FILE"),
];

fn uv(progress: &Progress, interpreter: &Interpreter) -> Result<PathBuf> {
    let folder = target().join(format!("tools/uv-{UV}"));
    let (uv, stamp) = (folder.join("bin/uv"), folder.join("complete"));
    if !stamp.exists() {
        let mut venv = without_python(&interpreter.path);
        progress.run("uv, environment", venv.args(["-m", "venv", "--clear"]).arg(&folder))?;
        progress.run("uv", pip_install(&folder.join("bin/python")).arg(format!("uv=={UV}")))?;
        fs::write(&stamp, "")?;
    }
    Ok(uv)
}

/// Python, without what the user's shell says about another one.
fn without_python(program: &Path) -> Command {
    let mut command = Command::new(program);
    for variable in ["PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "PYENV_VERSION"] {
        command.env_remove(variable);
    }
    command.current_dir(workspace());
    command
}

/// FNV-1a, folded to 32 bits.
fn fnv(text: &str) -> u32 {
    let hash = text
        .bytes()
        .fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3));
    (hash ^ (hash >> 32)) as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_requirements_file_says_how_it_is_installed() {
        let plain = directives("# dbt-core\ndbt-core==1.10.0\n").unwrap();
        assert_eq!(plain, Directives { no_deps: false, choice: Choice::Best(PREFERENCE.to_vec()) });
        let given = directives("# floe: no-deps\n# floe: python 3.11 3.10\nx==1\n").unwrap();
        assert_eq!(given, Directives { no_deps: true, choice: Choice::Best(vec![11, 10]) });
        assert_eq!(directives("# floe: python all\n").unwrap().choice, Choice::All);
        assert_eq!(directives("# floe: python each 3.11 3.13\n").unwrap().choice, Choice::Each(vec![11, 13]));
    }

    #[test]
    fn a_directive_that_is_not_known_is_refused() {
        assert!(directives("# floe: nodeps\n").is_err());
        assert!(directives("# floe: python 2.7\n").is_err());
        assert!(directives("# floe: python each\n").is_err());
    }
}
