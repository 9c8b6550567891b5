//! What a Python process runs, told from its command line before any of its code has run: a script, a module, or a text;
//! and which packages that imports.
//!
//! Only `import` statements of the script itself are read, nothing is followed: that finds console scripts of a virtual
//! environment, `python -m dbt`, and pipelines that import what they are made of. What else a process imports is seen in
//! its `sys.modules` later.

use std::{
    ffi::{OsStr, OsString},
    os::unix::ffi::OsStrExt as _,
    path::{Path, PathBuf},
};

use crate::{process::identity, units::Pid};

/// Bytes of a script that are read.
const MAX_SCRIPT: u64 = 256 << 10;

/// What a command line runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Program {
    /// A file or folder, as it was named.
    Script(PathBuf),
    /// `-m`
    Module(String),
    /// `-c`
    Text(String),
    /// The interactive interpreter, or a program on standard input.
    Nothing,
}

impl Program {
    /// Of the command line of a Python interpreter, the interpreter's own name first.
    pub fn parse(words: &[OsString]) -> Self {
        let mut words = words.iter().skip(1);
        while let Some(word) = words.next() {
            let bytes = word.as_bytes();
            match bytes {
                b"-" => return Self::Nothing,
                b"--" => return words.next().map_or(Self::Nothing, |script| Self::Script(script.into())),
                b"--check-hash-based-pycs" => {
                    words.next();
                }
                [b'-', b'-', ..] => {}
                [b'-', letters @ ..] => {
                    // Letters of options may stand together; one that takes a value ends them.
                    let Some(at) = letters.iter().position(|letter| b"cmWX".contains(letter)) else { continue };
                    let rest = OsStr::from_bytes(&letters[at + 1..]);
                    let value = if rest.is_empty() { words.next().map(OsString::as_os_str) } else { Some(rest) };
                    let text = value.unwrap_or_default().to_string_lossy().into_owned();
                    match letters[at] {
                        b'c' => return Self::Text(text),
                        b'm' => return Self::Module(text),
                        _ => {}
                    }
                }
                _ => return Self::Script(word.into()),
            }
        }
        Self::Nothing
    }

    /// The top-level packages that the program imports, as far as its own text tells.
    pub fn imports(&self, pid: Pid) -> Vec<String> {
        match self {
            Self::Text(text) => imports_of(text),
            Self::Module(module) => {
                let mut found: Vec<_> = top_level(module).into_iter().collect();
                // The working directory is the first place where `-m` looks.
                let path = PathBuf::from(module.replace('.', "/"));
                let files = [path.with_extension("py"), path.join("__main__.py")];
                found.extend(
                    files.iter().find_map(|file| read(pid, file)).map_or_else(Vec::new, |text| imports_of(&text)),
                );
                found
            }
            Self::Script(path) => read(pid, path)
                .or_else(|| read(pid, &path.join("__main__.py")))
                .map_or_else(Vec::new, |text| imports_of(&text)),
            Self::Nothing => Vec::new(),
        }
    }
}

/// The beginning of a file as the process names it. Only regular files are opened: a pipe would make us wait, or take
/// away what the process is to read.
fn read(pid: Pid, path: &Path) -> Option<String> {
    let absolute = if path.has_root() { path.to_owned() } else { identity::cwd(pid).ok()?.join(path) };
    let text = identity::file(pid, &absolute, MAX_SCRIPT).ok()?;
    Some(String::from_utf8_lossy(&text).into_owned())
}

/// Top-level packages in the `import` statements of a text, in order, each once.
pub(crate) fn imports_of(text: &str) -> Vec<String> {
    let mut found: Vec<String> = Vec::new();
    for statement in text.lines().flat_map(|line| line.split(';')) {
        let mut words = statement.split_whitespace();
        match words.next() {
            Some("from") => {
                if let Some(name) = words.next().and_then(top_level)
                    && words.next() == Some("import")
                {
                    found.push(name);
                }
            }
            Some("import") => {
                let names = statement.trim_start().trim_start_matches("import").split('#').next().unwrap_or_default();
                let first = |part: &str| part.split_whitespace().next().and_then(top_level);
                found.extend(names.split(',').filter_map(first));
            }
            _ => {}
        }
    }
    let mut seen = std::collections::HashSet::new();
    found.retain(|name| seen.insert(name.clone()));
    found
}

/// `dbt` of `dbt.cli.main`; nothing of a relative name.
fn top_level(name: &str) -> Option<String> {
    let first = name.split('.').next()?;
    let valid = first.chars().next().is_some_and(|c| c.is_alphabetic() || c == '_')
        && first.chars().all(|c| c.is_alphanumeric() || c == '_');
    valid.then(|| first.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(command_line: &str) -> Program {
        Program::parse(&command_line.split(' ').map(OsString::from).collect::<Vec<_>>())
    }

    #[test]
    fn scripts_modules_and_texts_are_told_apart() {
        assert_eq!(parse("python3 /venv/bin/dbt build"), Program::Script("/venv/bin/dbt".into()));
        assert_eq!(parse("python -B -X dev -W ignore jobs/load.py -m x"), Program::Script("jobs/load.py".into()));
        assert_eq!(parse("python -m dagster dev"), Program::Module("dagster".into()));
        assert_eq!(parse("python -Im dagster.cli"), Program::Module("dagster.cli".into()));
        assert_eq!(parse("python -uBc pass"), Program::Text("pass".into()));
        assert_eq!(parse("python -Xdev -Wignore -mdbt"), Program::Module("dbt".into()));
        assert_eq!(parse("python --check-hash-based-pycs always run.py"), Program::Script("run.py".into()));
        assert_eq!(parse("python -- -odd.py"), Program::Script("-odd.py".into()));
        for nothing in ["python", "python -", "python -i -q", "python -X", "python -m"] {
            assert!(matches!(parse(nothing), Program::Nothing | Program::Module(_)), "{nothing}");
        }
        assert_eq!(Program::parse(&[]), Program::Nothing);
    }

    #[test]
    fn import_statements_name_their_packages() {
        let text = "#!/venv/bin/python\nimport sys, os.path as p  # import floe\n\ndef main():\n    from dbt.cli.main import cli\n\
                    \x20   import json; import dagster\nfrom . import near\nfrom .far import x\nimportant = 1\nimport importlib\n\
                    # import hidden\ntext = 'from here to there'\nfrom __future__ import annotations\n";
        assert_eq!(imports_of(text), ["sys", "os", "dbt", "json", "dagster", "importlib", "__future__"]);
        assert_eq!(imports_of(""), [""; 0]);
        assert_eq!(imports_of("import\nfrom\nfrom x\nimport 1x, -"), [""; 0]);
    }

    #[test]
    fn scripts_are_read_as_the_process_names_them() {
        let own = Pid(std::process::id());
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("job.py");
        std::fs::write(&file, "import floe_core\n").unwrap();
        assert_eq!(Program::Script(file.clone()).imports(own), ["floe_core"]);
        std::fs::rename(&file, folder.path().join("__main__.py")).unwrap();
        assert_eq!(Program::Script(folder.path().to_owned()).imports(own), ["floe_core"]);
        assert_eq!(Program::Script("/dev/stdin".into()).imports(own), [""; 0]);
        assert_eq!(Program::Script("/no/such".into()).imports(own), [""; 0]);
        assert_eq!(Program::Module("dbt.cli".into()).imports(own), ["dbt"]);
    }
}
