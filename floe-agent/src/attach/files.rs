//! Interpreter files, and the probes on them: one gate per file, for all processes.

use std::{
    collections::{HashMap, HashSet, VecDeque},
    fs::File,
    os::fd::AsRawFd as _,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use super::{guards::Guards, twins};
use crate::{
    kernel::{Kernel, KernelError, LinkId, Site, nop5},
    process::identity,
    python::{
        elf::{ElfFile, FileIdentity},
        gate::Gate,
        identify::{InterpreterFile, Refusal, is_launcher, library_of_launcher},
        memory::Memory,
    },
    units::{FileOffset, Pid},
};

/// Files without an interpreter that are remembered, so that they are looked at once.
const MAX_OTHERS: usize = 16_384;
/// Twins that are remembered; each holds its file open, and with that the file system of a container.
const MAX_TWINS: usize = 128;
/// How often the gate is looked at, 100 µs apart, before the probe there counts as not working.
const READ_TRIES: u32 = 20;

/// A file that is kept open, so that probes can be attached to it by its inode whatever happens to its path.
pub(super) struct OpenFile(File);

impl OpenFile {
    pub(super) fn open(path: &Path) -> std::io::Result<Self> {
        identity::open(path).map(Self)
    }

    pub(super) fn identity(&self) -> std::io::Result<FileIdentity> {
        FileIdentity::of(&self.0)
    }

    /// A path that leads to this inode.
    pub(super) fn path(&self) -> PathBuf {
        PathBuf::from(format!("/proc/self/fd/{}", self.0.as_raw_fd()))
    }
}

/// What an executable or library turned out to be.
pub(super) enum Known {
    /// It holds CPython.
    Interpreter(Box<KnownInterpreter>),
    /// It is the same to the kernel as another one, which is probed.
    Twin(Arc<InterpreterFile>, FileIdentity),
    /// It loads CPython from a library.
    Launcher,
    /// It is a CPython that is not traced.
    Refused(Refusal),
    /// It is something else.
    Other,
}

/// What a program that was started is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Program {
    /// Its executable holds CPython, and was probed before it started.
    KnownInterpreter,
    /// Its executable holds CPython and is probed from now on; it may have passed `Py_RunMain`.
    NewInterpreter,
    /// Its interpreter is in a library, which may be yet to be mapped.
    Launcher,
    /// Its executable is a CPython that is not traced.
    Refused(Refusal),
    /// Not Python.
    Other,
}

/// An interpreter file with its probes.
pub(super) struct KnownInterpreter {
    pub(super) file: Arc<InterpreterFile>,
    open: OpenFile,
    gate: Option<(FileOffset, [LinkId; 2])>,
}

impl KnownInterpreter {
    /// A path that leads to the file's inode.
    pub(super) fn path(&self) -> PathBuf {
        self.open.path()
    }

    /// Attaches the gate's programs, once per file, and checks in `memory` that the breakpoint is there: an attach
    /// before any process maps the file can succeed and never fire.
    pub(super) fn attach_gate(&mut self, kernel: &mut Kernel, memory: &dyn Memory, gate: &Gate) -> Result<(), Refusal> {
        let no_gate = |why: String| Refusal::GateProbe { why };
        // The file had promised another place than the process shows.
        if let Some((_, links)) = self.gate.take_if(|(offset, _)| *offset != gate.offset) {
            kernel.detach(links);
        }
        if self.gate.is_none() {
            let links = attach_gate(kernel, &self.file, &self.path(), gate.offset).map_err(no_gate)?;
            self.gate = Some((gate.offset, links));
        }
        let mut seen = String::new();
        for _ in 0..READ_TRIES {
            let mut byte = [0];
            match memory.read(gate.gate, &mut byte) {
                // int3; or the call by which newer kernels replace a five-byte NOP under a uprobe.
                Ok(()) if matches!(byte[0], 0xcc | 0xe8) => return Ok(()),
                Ok(()) => seen = format!("the process has the byte {:02x} there and no breakpoint", byte[0]),
                Err(error) => seen = format!("the process's memory cannot be read there: {error}"),
            }
            std::thread::sleep(Duration::from_micros(100));
        }
        if let Some((_, links)) = self.gate.take() {
            kernel.detach(links);
        }
        Err(no_gate(format!("the kernel accepted the probe at {}, but {seen}", gate.gate)))
    }
}

/// All files that were looked at.
pub(super) struct Files {
    known: HashMap<FileIdentity, Known>,
    /// The twins among them, those that were found first in front.
    twins: VecDeque<FileIdentity>,
    /// What is watched beside the gates.
    pub(super) guards: Guards,
    /// CPython 3.11: `eval_frame` will not be set, so nothing that it needs is watched.
    keep_inlining: bool,
}

impl Files {
    pub(super) fn new(keep_inlining: bool) -> Self {
        Self { known: HashMap::new(), twins: VecDeque::new(), guards: Guards::default(), keep_inlining }
    }

    /// Interpreter files that are probed.
    pub(super) fn probed(&self) -> usize {
        self.known.values().filter(|known| matches!(known, Known::Interpreter(_))).count()
    }

    /// The interpreter files, for looking them up in a process's mappings.
    pub(super) fn interpreters(&self) -> Vec<Arc<InterpreterFile>> {
        self.known
            .values()
            .filter_map(|known| match known {
                Known::Interpreter(known) => Some(known.file.clone()),
                Known::Twin(file, _) => Some(file.clone()),
                Known::Launcher | Known::Refused(_) | Known::Other => None,
            })
            .collect()
    }

    pub(super) fn get_mut(&mut self, identity: FileIdentity) -> Option<&mut KnownInterpreter> {
        let identity = match self.known.get(&identity)? {
            Known::Twin(_, twin) => *twin,
            _ => identity,
        };
        match self.known.get_mut(&identity)? {
            Known::Interpreter(known) => Some(known),
            Known::Twin(..) | Known::Launcher | Known::Refused(_) | Known::Other => None,
        }
    }

    /// Forgets what is too much: a container has files of its own, which nobody runs when it has ended. Twins that are `used`
    /// stay. What is forgotten and runs again is looked at again.
    pub(super) fn forget(&mut self, used: impl FnOnce() -> HashSet<FileIdentity>) {
        if self.twins.len() > MAX_TWINS {
            let used = used();
            let mut left = self.twins.len() - MAX_TWINS / 2;
            self.twins.retain(|twin| {
                let stays = left == 0 || used.contains(twin);
                if !stays {
                    self.known.remove(twin);
                    left -= 1;
                }
                stays
            });
        }
        if self.known.len() > MAX_OTHERS {
            self.known.retain(|_, known| matches!(known, Known::Interpreter(_) | Known::Twin(..)));
        }
    }

    /// Looks at a program that was just started, by its executable: attaches to a new interpreter file.
    pub(super) fn examine(&mut self, kernel: &mut Kernel, pid: Pid) -> Result<Program, KernelError> {
        let process = PathBuf::from(format!("/proc/{pid}"));
        self.examine_program(kernel, &process.join("exe"), &process.join("root"))
    }

    /// Looks at an executable of a process with this root.
    pub(super) fn examine_program(
        &mut self,
        kernel: &mut Kernel,
        path: &Path,
        root: &Path,
    ) -> Result<Program, KernelError> {
        let Ok(open) = OpenFile::open(path) else { return Ok(Program::Other) };
        let Ok(identity) = open.identity() else { return Ok(Program::Other) };
        match self.known.get(&identity) {
            Some(Known::Launcher) => return Ok(Program::Launcher),
            Some(Known::Interpreter(_) | Known::Twin(..)) => return Ok(Program::KnownInterpreter),
            Some(Known::Refused(refusal)) => return Ok(Program::Refused(refusal.clone())),
            Some(Known::Other) => return Ok(Program::Other),
            None => {}
        }
        let path = open.path();
        match InterpreterFile::read(&path) {
            Ok(file) => {
                self.add(kernel, Arc::new(file), open)?;
                return Ok(Program::NewInterpreter);
            }
            Err(refusal @ (Refusal::DebugBuild | Refusal::FreeThreaded | Refusal::UnsupportedVersion { found: _ })) => {
                self.known.insert(identity, Known::Refused(refusal.clone()));
                return Ok(Program::Refused(refusal));
            }
            Err(_) => {}
        }
        let launcher = ElfFile::read(&path, &[]).ok().filter(is_launcher);
        let Some(elf) = launcher else {
            self.known.insert(identity, Known::Other);
            return Ok(Program::Other);
        };
        self.known.insert(identity, Known::Launcher);
        // Its name without symbolic links, below the process's root.
        let name = path.read_link().unwrap_or_default();
        if let Some(library) = library_of_launcher(&elf, &name, root) {
            self.examine_library(kernel, &library)?;
        }
        Ok(Program::Launcher)
    }

    fn examine_library(&mut self, kernel: &mut Kernel, path: &Path) -> Result<(), KernelError> {
        let Ok(open) = OpenFile::open(path) else { return Ok(()) };
        let Ok(identity) = open.identity() else { return Ok(()) };
        if self.known.contains_key(&identity) {
            return Ok(());
        }
        if let Ok(file) = InterpreterFile::read(&open.path()) {
            self.add(kernel, Arc::new(file), open)?;
        }
        Ok(())
    }

    /// Makes an interpreter file known and attaches to its `Py_RunMain`.
    fn add(&mut self, kernel: &mut Kernel, file: Arc<InterpreterFile>, open: OpenFile) -> Result<(), KernelError> {
        let twin = file.run_main().and_then(|offset| {
            let alike = |(identity, known): &(&FileIdentity, &Known)| {
                matches!(known, Known::Interpreter(_)) && twins::alike(**identity, file.identity())
            };
            let (&twin, _) = self.known.iter().find(alike)?;
            twins::has_breakpoint(&open.path(), offset).then_some(twin)
        });
        if let Some(twin) = twin {
            self.twins.push_back(file.identity());
            self.known.insert(file.identity(), Known::Twin(file, twin));
            return Ok(());
        }
        // The link lives as long as the programs do.
        if let Some(offset) = file.run_main() {
            kernel.attach(Site::RunMain, &open.path(), offset, None)?;
        }
        tracing::debug!(
            "interpreter file {}: Py_RunMain {}",
            open.path().read_link().unwrap_or_default().display(),
            if file.run_main().is_some() { "probed" } else { "is missing" }
        );
        // The gate too, where the file tells its place, and the guards: a probe that is attached while a process waits can
        // make it wait long, for instance while somebody else on the machine detaches one.
        let gate = file.gate_offset().and_then(|offset| match attach_gate(kernel, &file, &open.path(), offset) {
            Ok(links) => Some((offset, links)),
            Err(why) => {
                tracing::debug!("{why}"); // said again when a process of this file is to be traced
                None
            }
        });
        if !self.keep_inlining {
            for offset in file.stack_functions() {
                if let Err(error) = self.guards.attach_at(kernel, Site::StackConfig, &open, file.identity(), offset) {
                    tracing::debug!("{error}");
                }
            }
        }
        self.known.insert(file.identity(), Known::Interpreter(Box::new(KnownInterpreter { file, open, gate })));
        Ok(())
    }

    /// Makes the interpreter file of a process known, found in its mappings; whether it is new.
    pub(super) fn ensure(
        &mut self,
        kernel: &mut Kernel,
        file: &Arc<InterpreterFile>,
        path: &Path,
    ) -> Result<bool, KernelError> {
        if self.known.contains_key(&file.identity()) {
            return Ok(false);
        }
        match OpenFile::open(path) {
            Ok(open) if open.identity().is_ok_and(|identity| identity == file.identity()) => {
                self.add(kernel, file.clone(), open)?;
                Ok(true)
            }
            _ => Ok(false),
        }
    }
}

/// Attaches the gate's two programs at an offset of an interpreter file, or says why not.
fn attach_gate(
    kernel: &mut Kernel,
    file: &InterpreterFile,
    path: &Path,
    offset: FileOffset,
) -> Result<[LinkId; 2], String> {
    let mut instruction = [0; nop5::NOP5.len()];
    let address = file.elf().file_addr(offset).ok_or("the gate is not in the file")?;
    file.elf().read_at(address, &mut instruction).map_err(|error| error.to_string())?;
    if instruction == nop5::NOP5 {
        nop5::give_up_optimising(kernel, path, offset).map_err(|why| {
            format!(
                "its gate is a five-byte NOP, which this kernel may turn into a call that forked children do not \
                 survive, and it could not be kept from that: {why}"
            )
        })?;
    }
    let attached = kernel.attach(Site::GateEnter, path, offset, None).and_then(|enter| {
        match kernel.attach(Site::GateReturn, path, offset, None) {
            Ok(leave) => Ok([enter, leave]),
            Err(error) => {
                kernel.detach([enter]);
                Err(error)
            }
        }
    });
    attached.map_err(|error| error.to_string())
}
