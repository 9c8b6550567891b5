//! A copy of an interpreter, which may be damaged or replaced.

use std::{
    fs::{self, OpenOptions},
    os::unix::fs::FileExt as _,
    path::{Path, PathBuf},
};

use crate::{Interpreter, Run, program};

/// A copy of the file that holds an interpreter, its executable or its library.
pub struct Copy {
    /// The copy.
    pub file: PathBuf,
    /// Where `Py_Version` is in it (3.11 on).
    pub version: Option<u64>,
    run: Run,
}

impl Copy {
    /// Copies it into a folder; nothing if the copy does not run from there.
    pub fn of(interpreter: &Interpreter, folder: &Path) -> Option<Self> {
        let places = interpreter.program("lookalike.py").arg("places").run().expect(0);
        let (original, version) = places.trim().rsplit_once(' ').expect("two words");
        let file = folder.join(Path::new(original).file_name().expect("a file"));
        fs::copy(original, &file).expect("it can be copied");
        let real = fs::canonicalize(&interpreter.path).expect("it is there");
        let run = if Path::new(original) == real { Run::new(&file) } else { Run::new(&real) };
        let prefix = real.parent().and_then(Path::parent).expect("<prefix>/bin/python3");
        let run = run.variable("LD_LIBRARY_PATH", folder).variable("PYTHONHOME", prefix).arg("-B");
        let copy = Self { file, version: version.parse().ok(), run };
        let used = copy.program("lookalike.py").arg("places").run();
        (used.code() == 0 && used.out().starts_with(&*copy.file.to_string_lossy())).then_some(copy)
    }

    /// Runs one of the programs of `tests/programs` on it.
    pub fn program(&self, name: &str) -> Run {
        self.run.clone().arg(program(name))
    }

    /// Overwrites bytes of it, and gives what was there.
    pub fn overwrite(&self, at: u64, bytes: &[u8]) -> Vec<u8> {
        let file = OpenOptions::new().read(true).write(true).open(&self.file).expect("it is ours");
        let mut before = vec![0; bytes.len()];
        file.read_exact_at(&mut before, at).expect("it is in the file");
        file.write_all_at(bytes, at).expect("it can be written");
        before
    }
}
