//! Which executables a command will lead to: the program itself, and what its `#!` line names.

use std::{
    ffi::OsStr,
    fs::File,
    io::Read as _,
    os::unix::ffi::OsStrExt as _,
    path::{Path, PathBuf},
};

/// `#!` lines that lead to `#!` lines.
const MAX_HOPS: usize = 4;

/// The executable files that running `program` leads to, as far as they can be told beforehand. The last one is no script.
pub(super) fn executables(program: &OsStr) -> Vec<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    executables_in(program, &path)
}

fn executables_in(program: &OsStr, path: &OsStr) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut next = search(program, path);
    while let Some(file) = next.take() {
        if found.len() > MAX_HOPS {
            break;
        }
        next = interpreter_line(&file).and_then(|name| search(&name, path));
        found.push(file);
    }
    found
}

/// As `execvp` finds a program.
fn search(program: &OsStr, path: &OsStr) -> Option<PathBuf> {
    if program.as_bytes().contains(&b'/') {
        return Some(PathBuf::from(program));
    }
    std::env::split_paths(path).map(|folder| folder.join(program)).find(|file| file.is_file())
}

/// The program that a script's first line names, through `env` if need be.
fn interpreter_line(script: &Path) -> Option<std::ffi::OsString> {
    let mut head = Vec::new();
    File::open(script).ok()?.take(256).read_to_end(&mut head).ok()?;
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

    #[test]
    fn a_script_leads_to_its_interpreter_also_through_env() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        std::fs::write(at("python9"), b"\x7fELF").unwrap();
        std::fs::write(at("direct"), format!("#!{} -s\nimport x\n", at("python9").display())).unwrap();
        std::fs::write(at("by-env"), "#! /usr/bin/env -S python9 -B\n").unwrap();
        for script in ["direct", "by-env"] {
            let found = executables_in(OsStr::new(script), folder.path().as_os_str());
            assert_eq!(found, [at(script), at("python9")]);
        }
    }

    #[test]
    fn a_script_that_names_itself_ends() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("loop");
        std::fs::write(&file, format!("#!{}\n", file.display())).unwrap();
        assert!(executables_in(file.as_os_str(), OsStr::new("")).len() <= MAX_HOPS + 1);
    }

    #[test]
    fn what_is_not_there_leads_nowhere() {
        assert!(executables_in(OsStr::new("no-such-program"), OsStr::new("/nowhere")).is_empty());
    }
}
