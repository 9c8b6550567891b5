//! Which executables a command will lead to: the program itself, what its `#!` line names, and, where it is a shell, `env`,
//! a script or a version manager's shim, the programs that its words name.
//!
//! This is a guess, and only that: an interpreter that is probed before it starts is met at its first instruction. So it
//! may name files that will not run, and it is bounded in every direction.

use std::{
    collections::HashSet,
    ffi::{OsStr, OsString},
    io::Read as _,
    os::unix::{ffi::OsStrExt as _, fs::PermissionsExt as _},
    path::{Path, PathBuf},
};

use super::identity;

/// `#!` lines that lead to `#!` lines.
const MAX_HOPS: usize = 4;
/// Bytes of a script that are looked at.
const MAX_SCRIPT: u64 = 64 << 10;
/// Words that are looked up.
const MAX_WORDS: usize = 512;
/// Files that are named.
const MAX_FILES: usize = 48;
/// Interpreters of a version manager.
const MAX_VERSIONS: usize = 16;
/// What most scripts mean by Python.
const USUAL: [&str; 2] = ["python3", "python"];

/// A command, and how it looks for programs.
#[derive(Clone, Copy, Debug)]
pub struct Launch<'a> {
    /// Its words, the program first.
    pub words: &'a [OsString],
    /// `PATH`
    pub path: &'a OsStr,
    /// Its working folder.
    pub folder: &'a Path,
    /// Its root folder: `/`, or `/proc/<pid>/root`.
    pub root: &'a Path,
}

/// An executable file, as the command sees it and as it can be opened from here.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Executable {
    /// Below the command's root.
    pub name: PathBuf,
    /// From here.
    pub path: PathBuf,
}

impl Executable {
    /// Whether it is called as interpreters are.
    fn is_python(&self) -> bool {
        self.name.file_name().is_some_and(|name| name.as_bytes().starts_with(b"python"))
    }
}

impl Launch<'_> {
    /// The executables that it may lead to, likeliest first.
    pub fn executables(&self) -> Vec<Executable> {
        let mut found = Found::default();
        let mut scripts = Vec::new();
        for (index, word) in self.words.iter().enumerate() {
            for part in parts(word.as_bytes()) {
                if let Some(file) = found.word(self, part) {
                    scripts.extend(self.chain(&mut found, file));
                    // The command itself is Python, or a script of it: what its arguments name is not run by a shell.
                    if index == 0 && found.files.last().is_some_and(Executable::is_python) {
                        return found.files;
                    }
                } else if index > 0 {
                    // A script that is given to a shell need not be executable.
                    scripts.extend(self.file(part).filter(|file| file.path.is_file()));
                }
            }
        }
        for script in scripts {
            for part in parts(&text(&script.path)) {
                if let Some(file) = found.word(self, part) {
                    self.chain(&mut found, file);
                }
            }
        }
        for name in USUAL {
            if let Some(file) = found.word(self, name.as_bytes()) {
                self.chain(&mut found, file);
            }
        }
        found.files
    }

    /// Notes a file, what its `#!` line leads to, and a version manager's interpreters if it is a shim. Gives it back if
    /// it is a script.
    fn chain(&self, found: &mut Found, file: Executable) -> Option<Executable> {
        let mut next = Some(file.clone());
        let mut hops = 0;
        while let Some(file) = next.take() {
            if hops > MAX_HOPS || !found.add(&file) {
                break;
            }
            hops += 1;
            if file.name.parent().and_then(Path::file_name) == Some(OsStr::new("shims")) {
                for version in self.versions(&file.name) {
                    found.add(&version);
                }
            }
            next = interpreter_line(&file.path).and_then(|name| self.search(&name));
        }
        (hops > 1).then_some(file)
    }

    /// The interpreters of the version manager (pyenv; asdf and mise) to which a shim belongs.
    fn versions(&self, shim: &Path) -> Vec<Executable> {
        let Some(home) = shim.parent().and_then(Path::parent) else { return Vec::new() };
        let mut versions: Vec<_> = ["versions", "installs/python"]
            .into_iter()
            .filter_map(|folder| self.inside(home.join(folder)).path.read_dir().ok().map(|entries| (folder, entries)))
            .flat_map(|(folder, entries)| {
                let names = entries.filter_map(Result::ok).map(|entry| entry.file_name());
                names.map(move |name| self.inside(home.join(folder).join(name).join("bin/python3"))).collect::<Vec<_>>()
            })
            .filter(|file| is_executable(&file.path))
            .collect();
        versions.sort_by(|one, other| one.name.cmp(&other.name));
        versions.truncate(MAX_VERSIONS);
        versions
    }

    fn inside(&self, name: PathBuf) -> Executable {
        let path = self.root.join(name.strip_prefix("/").unwrap_or(&name));
        Executable { name, path }
    }

    /// A word that is a path.
    fn file(&self, word: &[u8]) -> Option<Executable> {
        (!word.is_empty()).then(|| self.inside(self.folder.join(OsStr::from_bytes(word))))
    }

    /// As `execvp` finds a program.
    fn search(&self, program: &OsStr) -> Option<Executable> {
        if program.as_bytes().contains(&b'/') {
            return self.file(program.as_bytes()).filter(|file| is_executable(&file.path));
        }
        std::env::split_paths(self.path)
            .map(|folder| self.inside(self.folder.join(folder).join(program)))
            .find(|file| is_executable(&file.path))
    }
}

#[derive(Default)]
struct Found {
    files: Vec<Executable>,
    words: HashSet<Vec<u8>>,
}

impl Found {
    /// The program that a word names, if it was not looked up before.
    fn word(&mut self, launch: &Launch<'_>, word: &[u8]) -> Option<Executable> {
        if word.is_empty() || self.words.len() >= MAX_WORDS || !self.words.insert(word.to_vec()) {
            return None;
        }
        launch.search(OsStr::from_bytes(word))
    }

    /// Notes a file; whether it is new and there was room.
    fn add(&mut self, file: &Executable) -> bool {
        let new = self.files.len() < MAX_FILES && !self.files.contains(file);
        if new {
            self.files.push(file.clone());
        }
        new
    }
}

/// The words in what may be a shell's command, `VARIABLE=value` and quotes taken apart.
fn parts(text: &[u8]) -> impl Iterator<Item = &[u8]> {
    let separates = |byte: &u8| byte.is_ascii_whitespace() || b"\"'`;|&(){}<>=$".contains(byte);
    text.split(separates).filter(|word| !word.is_empty() && word.len() < 256 && !word.starts_with(b"-"))
}

/// The beginning of a text file without its `#!` line; nothing of another file.
fn text(path: &Path) -> Vec<u8> {
    let mut text = Vec::new();
    if let Ok(file) = identity::open(path)
        && file.take(MAX_SCRIPT).read_to_end(&mut text).is_ok()
        && !text.contains(&0)
    {
        let first = text.starts_with(b"#!").then(|| text.iter().position(|&byte| byte == b'\n')).flatten();
        return text.split_off(first.unwrap_or(0));
    }
    Vec::new()
}

fn is_executable(path: &Path) -> bool {
    path.metadata().is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
}

/// The program that a script's first line names, through `env` if need be.
fn interpreter_line(script: &Path) -> Option<OsString> {
    let mut head = Vec::new();
    identity::open(script).ok()?.take(256).read_to_end(&mut head).ok()?;
    let line = head.strip_prefix(b"#!")?.split(|&b| b == b'\n').next()?;
    let mut words = line.split(u8::is_ascii_whitespace).filter(|word| !word.is_empty());
    let program = words.next()?;
    let name = program.rsplit(|&b| b == b'/').next()?;
    let program =
        if name == b"env" { words.find(|word| !word.starts_with(b"-") && !word.contains(&b'='))? } else { program };
    Some(OsStr::from_bytes(program).to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A folder with programs in it: name and text.
    fn programs(files: &[(&str, &str)]) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        for (name, text) in files {
            let path = folder.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(&path, text.replace("HERE", folder.path().to_str().unwrap())).unwrap();
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        }
        folder
    }

    /// What a command leads to, by the names below the folder.
    fn leads(folder: &tempfile::TempDir, words: &[&str]) -> Vec<String> {
        let words: Vec<_> = words.iter().map(OsString::from).collect();
        let here = folder.path();
        let launch =
            Launch { words: &words, path: here.as_os_str(), folder: Path::new("/nowhere"), root: Path::new("/") };
        let name = |file: Executable| file.name.strip_prefix(here).unwrap().to_str().unwrap().to_owned();
        launch.executables().into_iter().map(name).collect()
    }

    #[test]
    fn a_script_leads_to_its_interpreter_also_through_env() {
        let folder = programs(&[
            ("python9", "\x7fELF\0"),
            ("direct", "#!HERE/python9 -s\nimport x\n"),
            ("by-env", "#! /usr/bin/env -S python9 -B\n"),
        ]);
        assert_eq!(leads(&folder, &["direct"]), ["direct", "python9"]);
        assert_eq!(leads(&folder, &["direct", "by-env"]), ["direct", "python9"]);
        assert_eq!(leads(&folder, &["by-env"]), ["by-env", "python9"]);
    }

    #[test]
    fn a_shell_leads_to_what_its_command_names_and_to_the_usual_python() {
        let folder = programs(&[
            ("sh", "\x7fELF\0"),
            ("python3", "\x7fELF\0"),
            ("tool", "#!HERE/venv/python\n"),
            ("venv/python", "\x7fELF\0"),
        ]);
        assert_eq!(leads(&folder, &["sh", "-c", "A=1 tool --x|more"]), ["sh", "tool", "venv/python", "python3"]);
        assert_eq!(leads(&folder, &["sh", "-c", "exec make"]), ["sh", "python3"]);
        let quoted = format!("cd / && '{}' x", folder.path().join("venv/python").display());
        assert_eq!(leads(&folder, &["sh", "-c", &quoted]), ["sh", "venv/python", "python3"]);
    }

    #[test]
    fn a_script_of_a_shell_leads_to_what_it_names() {
        let folder =
            programs(&[("sh", "\x7fELF\0"), ("run", "#!HERE/sh\nset -e\npython8 x.py\n"), ("python8", "\x7fELF\0")]);
        assert_eq!(leads(&folder, &["run"]), ["run", "sh", "python8"]);
        let path = folder.path().join("run");
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o644)).unwrap();
        assert_eq!(leads(&folder, &["sh", path.to_str().unwrap()]), ["sh", "python8"]);
    }

    #[test]
    fn a_shim_leads_to_all_versions() {
        let folder = programs(&[
            ("bash", "\x7fELF\0"),
            ("pyenv/shims/python", "#!HERE/bash\nexec pyenv exec python\n"),
            ("pyenv/versions/3.8.1/bin/python3", "\x7fELF\0"),
            ("pyenv/versions/3.12.1/bin/python3", "\x7fELF\0"),
        ]);
        let shim = folder.path().join("pyenv/shims/python");
        let found = leads(&folder, &[shim.to_str().unwrap()]);
        assert_eq!(
            found,
            ["pyenv/shims/python", "pyenv/versions/3.12.1/bin/python3", "pyenv/versions/3.8.1/bin/python3", "bash"]
        );
    }

    #[test]
    fn what_cannot_be_followed_ends() {
        let folder = programs(&[("loop", "#!HERE/loop\n"), ("noise", &"#!x\nword ".repeat(9000))]);
        assert_eq!(leads(&folder, &["loop"]), ["loop"]);
        assert_eq!(leads(&folder, &["noise"]), ["noise"]);
        assert!(leads(&folder, &["no-such-program"]).is_empty());
        assert!(leads(&folder, &[]).is_empty());
    }
}
