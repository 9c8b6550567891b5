//! Which interpreter a process runs: finding its file, and checking that everything is where the tables say.
//!
//! [`locate`] finds the mapped file that holds CPython, [`InterpreterFile`] is what the file alone tells, and
//! [`Interpreter::verify`] checks a live process before anything else may be done with it. What does not pass is refused,
//! with the reason.

use std::collections::HashMap;
use std::io;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::elf::{ElfError, ElfFile, FileIdentity};
use super::gate::{self, Gate, GateError};
use super::layout::{CurrentThread, Minor, PyLayout};
use super::memory::{Memory, MemoryError};
use super::objects::{CoreTypes, Heap, ObjectError};
use crate::process::{
    identity,
    maps::{self, Mapping},
};
use crate::units::{FileAddr, FileOffset, Pid, UserAddr};

/// Why a process is not traced. Each displays as one clear line.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// It does not run CPython.
    #[error("not a Python process")]
    NotPython,
    /// It has not come far enough yet.
    #[error("the interpreter is still starting ({what})")]
    NotReady {
        /// What is missing.
        what: &'static str,
    },
    /// There is no table for its version.
    #[error("CPython {found} is not supported; 3.8 to 3.14 are")]
    UnsupportedVersion {
        /// What was found, as far as it is known.
        found: String,
    },
    /// Built with `--disable-gil`.
    #[error("free-threaded builds of CPython are not supported")]
    FreeThreaded,
    /// Built with `--with-pydebug` or `--with-trace-refs`.
    #[error("debug builds of CPython are not supported")]
    DebugBuild,
    /// Something is not where it should be.
    #[error("the interpreter did not pass the self-check: {what}")]
    SelfCheckFailed {
        /// What.
        what: String,
    },
    /// There is no place for the probe.
    #[error(transparent)]
    NoGate(#[from] GateError),
    /// The probe at the gate could not be attached, or does not fire.
    #[error("the probe before _PyFunction_Vectorcall does not work: {why}")]
    GateProbe {
        /// Why.
        why: String,
    },
    /// Return probes would break it.
    #[error("return probes would break this process: {why}")]
    ReturnProbes {
        /// Why.
        why: String,
    },
    /// It has ended.
    #[error("process {pid} has ended")]
    Gone {
        /// Which.
        pid: Pid,
    },
    /// The agent may not look at it.
    #[error(
        "no permission to look at process {pid}: run as root, or with CAP_SYS_PTRACE; a process that the kernel protects \
         (prctl, an LSM, another user namespace) cannot be traced"
    )]
    Denied {
        /// Which.
        pid: Pid,
    },
    /// Its file cannot be used.
    #[error("{0}")]
    File(String),
}

impl Refusal {
    /// Whether it may be different a moment later.
    pub const fn is_temporary(&self) -> bool {
        matches!(self, Self::NotReady { .. })
    }

    /// What it is about, in a word, for counting.
    pub const fn kind(&self) -> &'static str {
        match self {
            Self::NotPython => "not_python",
            Self::NotReady { .. } => "not_ready",
            Self::UnsupportedVersion { .. } => "version",
            Self::FreeThreaded => "free_threaded",
            Self::DebugBuild => "debug_build",
            Self::SelfCheckFailed { .. } => "self_check",
            Self::NoGate(_) => "no_gate",
            Self::GateProbe { .. } => "gate_probe",
            Self::ReturnProbes { .. } => "return_probes",
            Self::Gone { .. } => "gone",
            Self::Denied { .. } => "denied",
            Self::File(_) => "file",
        }
    }

    fn check(what: impl Into<String>) -> Self {
        Self::SelfCheckFailed { what: what.into() }
    }
}

impl From<MemoryError> for Refusal {
    fn from(error: MemoryError) -> Self {
        match error {
            MemoryError::Gone { pid } => Self::Gone { pid },
            MemoryError::Denied { pid } => Self::Denied { pid },
            other => Self::check(other.to_string()),
        }
    }
}

impl From<ObjectError> for Refusal {
    fn from(error: ObjectError) -> Self {
        match error {
            ObjectError::Memory(error) => error.into(),
            other => Self::check(other.to_string()),
        }
    }
}

impl From<ElfError> for Refusal {
    fn from(error: ElfError) -> Self {
        match error {
            ElfError::NotElf { .. } => Self::NotPython,
            other => Self::File(other.to_string()),
        }
    }
}

const RUNTIME: &str = "_PyRuntime";
const RUN_MAIN: &str = "Py_RunMain";
const VECTORCALL: &str = "_PyFunction_Vectorcall";
const NEW_FUNCTION: &str = "PyFunction_NewWithQualName";
const VERSION: &str = "Py_Version";
const EVAL_FRAME_DEFAULT: &str = "_PyEval_EvalFrameDefault";
const MALLOC: &str = "PyObject_Malloc";
const SAVE_THREAD: &str = "PyEval_SaveThread";
const RESTORE_THREAD: &str = "PyEval_RestoreThread";
const SET_RECURSION_LIMIT: &str = "Py_SetRecursionLimit";
/// Types whose instances come and go all the time.
const DESTROYED: [&str; 9] = [
    "PyUnicode_Type",
    "PyFunction_Type",
    "PyBytes_Type",
    "PyTuple_Type",
    "PyDict_Type",
    "PyList_Type",
    "PyFloat_Type",
    "PyCFunction_Type",
    "PyMethod_Type",
];
/// In all versions, 2.7 included.
const INITIALIZE: &str = "Py_Initialize";
/// Only where references are counted or traced for debugging.
const DEBUG_ONLY: &[&str] = &["_Py_RefTotal", "_Py_NegativeRefcount", "_Py_PrintReferences"];

fn wanted() -> Vec<&'static str> {
    let mut wanted = vec![
        RUNTIME,
        RUN_MAIN,
        VERSION,
        EVAL_FRAME_DEFAULT,
        MALLOC,
        SET_RECURSION_LIMIT,
        INITIALIZE,
        VECTORCALL,
        SAVE_THREAD,
        RESTORE_THREAD,
        NEW_FUNCTION,
    ];
    wanted.extend(DEBUG_ONLY);
    wanted.extend(DESTROYED);
    wanted.extend(CoreTypes::SYMBOLS);
    wanted
}

/// What one ELF file that holds CPython tells without a process.
#[derive(Debug)]
pub struct InterpreterFile {
    elf: ElfFile,
    hexversion: Option<u32>,
    candidates: Vec<&'static PyLayout>,
    runtime: FileAddr,
    eval_frame_default: FileAddr,
}

impl InterpreterFile {
    /// Reads a file; refuses what does not hold a supported CPython.
    pub fn read(path: &Path) -> Result<Self, Refusal> {
        Self::from_elf(ElfFile::read(path, &wanted())?)
    }

    fn from_elf(elf: ElfFile) -> Result<Self, Refusal> {
        if elf.symbol(INITIALIZE).is_none() || elf.symbol("PyType_Type").is_none() {
            return Err(Refusal::NotPython);
        }
        let named = named_version(elf.soname(), elf.path());
        // 3.8 brought `Py_RunMain` and, 3.7, `_PyRuntime`; 3.11 `Py_Version`.
        let (Some(runtime), Some(_)) = (elf.symbol(RUNTIME), elf.symbol(RUN_MAIN)) else {
            let found = named.map_or_else(|| "older than 3.8".to_owned(), |(version, _)| version.to_string());
            return Err(Refusal::UnsupportedVersion { found });
        };
        if DEBUG_ONLY.iter().any(|symbol| elf.symbol(symbol).is_some()) {
            return Err(Refusal::DebugBuild);
        }
        if named.is_some_and(|(_, flags)| flags.contains('t')) {
            return Err(Refusal::FreeThreaded);
        }
        let hexversion = match elf.symbol(VERSION) {
            Some(addr) => {
                let mut bytes = [0; 4];
                elf.read_at(addr, &mut bytes)?;
                Some(u32::from_le_bytes(bytes))
            }
            None => None,
        };
        let candidates: Vec<_> = match hexversion {
            Some(hex) => {
                let version = Minor::from_hex(hex);
                let layout =
                    PyLayout::of(version).ok_or_else(|| Refusal::UnsupportedVersion { found: version.to_string() })?;
                vec![layout]
            }
            // Before 3.11 the file does not say; every table is tried on the process, and exactly one must fit.
            None => PyLayout::all().iter().filter(|layout| layout.version < Minor::three(11)).collect(),
        };
        let missing = |symbol: &str| Refusal::check(format!("{} does not export {symbol}", elf.path().display()));
        let eval_frame_default = elf.symbol(EVAL_FRAME_DEFAULT).ok_or_else(|| missing(EVAL_FRAME_DEFAULT))?;
        CoreTypes::look_up(|symbol| elf.symbol(symbol).map(|addr| UserAddr(addr.0))).map_err(missing)?;
        Ok(Self { elf, hexversion, candidates, runtime, eval_frame_default })
    }

    /// The file itself.
    pub const fn elf(&self) -> &ElfFile {
        &self.elf
    }

    /// Which file it is.
    pub const fn identity(&self) -> FileIdentity {
        self.elf.identity()
    }

    /// `PY_VERSION_HEX`, where the file states it (3.11 on).
    pub const fn hexversion(&self) -> Option<u32> {
        self.hexversion
    }

    /// The layouts that it may have: one from 3.11 on.
    pub fn candidates(&self) -> &[&'static PyLayout] {
        &self.candidates
    }

    /// `Py_RunMain` in the file, where its uprobe goes.
    pub fn run_main(&self) -> Option<FileOffset> {
        self.elf.file_offset(self.elf.symbol(RUN_MAIN)?)
    }

    /// Where the gate probably is: before `_PyFunction_Vectorcall`, which is exported until 3.12; where the symbol table
    /// does not have it, before what new functions are given as `vectorcall`.
    pub fn gate_offset(&self) -> Option<FileOffset> {
        let in_code = || match self.candidates[..] {
            [layout] => gate::entry_in_code(&self.elf, self.elf.symbol(NEW_FUNCTION)?, layout.function.vectorcall),
            _ => None,
        };
        gate::offset_in_file(&self.elf, self.elf.symbol(VECTORCALL).or_else(in_code)?)
    }

    /// 3.11: the C functions of `sys.setrecursionlimit` and `_thread.stack_size`, as far as the file shows them.
    pub fn stack_functions(&self) -> Vec<FileOffset> {
        const METH_VARARGS: u32 = 1;
        const METH_O: u32 = 8;
        if !self.candidates.iter().all(|layout| layout.inlines_past_vectorcall) {
            return Vec::new();
        }
        let functions = [("setrecursionlimit", METH_O), ("stack_size", METH_VARARGS)].map(|(name, flags)| {
            let found = self.elf.methods(name, flags).unwrap_or_default();
            found.into_iter().filter_map(|function| self.elf.file_offset(function)).collect::<Vec<_>>()
        });
        functions.concat()
    }

    /// The function that takes the GIL again after a wait: at its return the thread has it.
    pub fn takes_gil(&self) -> Option<FileOffset> {
        self.elf.file_offset(self.elf.symbol(RESTORE_THREAD)?)
    }

    /// Functions that run with the GIL held, one of which every thread that does anything soon comes by: the evaluator, the
    /// allocator, the release of the GIL (their exported forms, which link-time optimisation may leave unused), and the
    /// destructors of common types, which are always called through their pointers.
    pub fn meeting_points(&self, mem: &dyn Memory, bias: u64) -> Vec<FileOffset> {
        /// `PyTypeObject.tp_dealloc`, in all versions.
        const TP_DEALLOC: u64 = 48;
        let destructors = DESTROYED
            .into_iter()
            .filter_map(|name| self.elf.symbol(name))
            .filter_map(|type_| mem.read_ptr(UserAddr(type_.0.wrapping_add(bias)).offset(TP_DEALLOC)).ok())
            .map(|address| FileAddr(address.0.wrapping_sub(bias)))
            .filter(|&address| self.elf.is_code(address));
        let exported = [EVAL_FRAME_DEFAULT, MALLOC, SAVE_THREAD].into_iter().filter_map(|name| self.elf.symbol(name));
        let mut offsets: Vec<_> =
            exported.chain(destructors).filter_map(|address| self.elf.file_offset(address)).collect();
        offsets.sort_unstable();
        offsets.dedup();
        offsets
    }

    /// `Py_SetRecursionLimit` in the file.
    pub fn set_recursion_limit(&self) -> Option<FileOffset> {
        self.elf.file_offset(self.elf.symbol(SET_RECURSION_LIMIT)?)
    }

    /// The common types at a load bias.
    fn types(&self, bias: u64) -> Result<CoreTypes, Refusal> {
        CoreTypes::look_up(|symbol| Some(UserAddr(self.elf.symbol(symbol)?.0.wrapping_add(bias))))
            .map_err(|symbol| Refusal::check(format!("{symbol} is missing")))
    }
}

/// Version and ABI flags from a name like `libpython3.9.so.1.0`, `libpython3.13t.so.1.0` or `python3.10`.
fn named_version<'a>(soname: Option<&'a str>, path: &'a Path) -> Option<(Minor, &'a str)> {
    let file_name = path.file_name().and_then(|name| name.to_str());
    [soname, file_name].into_iter().flatten().find_map(|name| {
        let rest = name.strip_prefix("libpython").or_else(|| name.strip_prefix("python"))?;
        let (major, rest) = rest.split_once('.')?;
        let digits = rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len());
        let flags = &rest[digits..];
        let flags = &flags[..flags.find('.').unwrap_or(flags.len())];
        Some((Minor { major: major.parse().ok()?, minor: rest[..digits].parse().ok()? }, flags))
    })
}

/// Whether an executable only starts an interpreter that is in a library: it needs `libpython3.*.so`.
pub fn is_launcher(elf: &ElfFile) -> bool {
    elf.symbol(RUNTIME).is_none() && needed_libpython(elf).is_some()
}

fn needed_libpython(elf: &ElfFile) -> Option<&str> {
    elf.needed().iter().map(String::as_str).find(|name| is_libpython(name))
}

fn is_libpython(name: &str) -> bool {
    // `libpython3.so` only forwards to the real one.
    name.strip_prefix("libpython")
        .is_some_and(|rest| rest.contains(".so") && rest.split_once('.').is_some_and(|(_, r)| !r.starts_with("so")))
}

/// Where the library of a launcher probably is: its run path, then directories beside it and of the system. To attach
/// before the first process has mapped it; `root` is the root directory of that process (`/`, `/proc/<pid>/root`).
pub fn library_of_launcher(launcher: &ElfFile, program: &Path, root: &Path) -> Option<PathBuf> {
    const SYSTEM: &[&str] =
        &["/usr/local/lib", "/usr/lib/x86_64-linux-gnu", "/lib/x86_64-linux-gnu", "/usr/lib64", "/usr/lib", "/lib"];
    let name = needed_libpython(launcher)?;
    let origin = program.parent()?;
    let origin_text = origin.to_str()?;
    let run_path = launcher
        .runpath()
        .iter()
        .map(|dir| PathBuf::from(dir.replace("${ORIGIN}", origin_text).replace("$ORIGIN", origin_text)));
    run_path
        .chain([origin.join("../lib")])
        .chain(SYSTEM.iter().map(PathBuf::from))
        .map(|dir| root.join(dir.strip_prefix("/").unwrap_or(&dir)).join(name))
        .find(|path| path.is_file())
}

/// The interpreter's file in a process.
#[derive(Clone, Debug)]
pub struct Located {
    /// The file.
    pub file: Arc<InterpreterFile>,
    /// Its path as the process has it; for people to read.
    pub name: PathBuf,
    /// What to add to an address in the file to get one in memory.
    pub bias: u64,
}

/// Most distinct files of a process that are examined.
const MAX_EXAMINED: usize = 16;

/// Finds the file that holds CPython among those that a process has mapped: its executable, else `libpython*`, else
/// anything whose name has "python" in it. `known` are files that need not be read again.
pub fn locate(pid: Pid, known: &[Arc<InterpreterFile>]) -> Result<Located, Refusal> {
    let io = |error: io::Error| match error.kind() {
        io::ErrorKind::PermissionDenied => Refusal::Denied { pid },
        _ => Refusal::Gone { pid },
    };
    let maps = maps::read(pid).map_err(io)?;
    let exe = crate::process::identity::exe(pid).map_err(io)?;
    let mut refused = None;
    for mappings in candidates(&maps, &exe).into_iter().take(MAX_EXAMINED) {
        match examine(pid, &mappings, known) {
            Ok(located) => return Ok(located),
            Err(Refusal::NotPython) => {}
            Err(refusal) => refused = refused.or(Some(refusal)),
        }
    }
    Err(refused.unwrap_or(Refusal::NotPython))
}

/// The mapped files that may hold an interpreter, likeliest first, each with its mappings.
fn candidates<'a>(maps: &'a [Mapping], exe: &Path) -> Vec<Vec<&'a Mapping>> {
    let mut files: Vec<(u8, Vec<&Mapping>)> = Vec::new();
    let exe = exe.to_str().map_or(exe, |text| Path::new(text.strip_suffix(" (deleted)").unwrap_or(text)));
    for mapping in maps.iter().filter(|mapping| mapping.inode != 0 && mapping.path.has_root()) {
        let same = |other: &Mapping| {
            (other.device, other.inode, &other.path) == (mapping.device, mapping.inode, &mapping.path)
        };
        if let Some((_, mappings)) = files.iter_mut().find(|(_, mappings)| same(mappings[0])) {
            mappings.push(mapping);
            continue;
        }
        let name = mapping.path.file_name().map(|name| name.to_string_lossy()).unwrap_or_default();
        let rank = match () {
            () if mapping.path == exe => 0,
            () if is_libpython(&name) => 1,
            // Programs that embed an interpreter in a plugin, such as uwsgi's `python3_plugin.so`. Extension modules
            // have the word in their names too, as `.cpython-312-`.
            () if name.contains("python") && !name.contains(".cpython-") => 2,
            () => continue,
        };
        files.push((rank, vec![mapping]));
    }
    files.sort_by_key(|(rank, _)| *rank);
    files.into_iter().map(|(_, mappings)| mappings).collect()
}

fn examine(pid: Pid, mappings: &[&Mapping], known: &[Arc<InterpreterFile>]) -> Result<Located, Refusal> {
    let first = mappings[0];
    // By mapping, which is the very file whatever happened to its name; without the right for that, by name.
    let paths = [first.map_file(pid), first.path_in_root(pid)];
    let Some((path, identity)) = paths.into_iter().find_map(|path| {
        let file = identity::open(&path).ok()?;
        let identity = FileIdentity::of(&file).ok()?;
        Some((path, identity))
    }) else {
        return Err(if identity::is_alive(pid) { Refusal::Denied { pid } } else { Refusal::Gone { pid } });
    };
    let known = known.iter().find(|file| file.identity() == identity);
    let file = if let Some(file) = known {
        Arc::clone(file)
    } else {
        let elf = ElfFile::read(&path, &wanted())?;
        if is_launcher(&elf) && mappings.len() < 2 {
            return Err(Refusal::NotReady { what: "its libraries are not mapped yet" });
        }
        Arc::new(InterpreterFile::from_elf(elf).map_err(|refusal| named_refusal(refusal, &first.path))?)
    };
    let bias = mappings
        .iter()
        .filter(|mapping| mapping.execute)
        .find_map(|mapping| file.elf().load_bias(mapping.start.0, mapping.offset, true))
        .ok_or(Refusal::NotReady { what: "its code is not mapped yet" })?;
    Ok(Located { file, name: first.path.clone(), bias })
}

/// A file opened through `/proc/<pid>/map_files` has no telling name; the process's own path has.
fn named_refusal(refusal: Refusal, path: &Path) -> Refusal {
    match (refusal, named_version(None, path)) {
        (Refusal::UnsupportedVersion { .. }, Some((version, _))) if version < Minor::three(8) => {
            Refusal::UnsupportedVersion { found: version.to_string() }
        }
        (refusal, _) => refusal,
    }
}

/// Addresses in one process that the eBPF programs need.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KernelAddresses {
    /// `None`
    pub none: UserAddr,
    /// `PyFloat_Type`
    pub float_type: UserAddr,
    /// `PyBool_Type`
    pub bool_type: UserAddr,
    /// A pointer to the thread state of the thread that holds the GIL.
    pub tstate: UserAddr,
}

/// The interpreter of one live process, checked.
#[derive(Clone, Debug)]
pub struct Interpreter {
    /// Its layout.
    pub layout: &'static PyLayout,
    /// `sys.hexversion`
    pub hexversion: u32,
    /// Load bias of its file.
    pub bias: u64,
    /// Its common types.
    pub types: CoreTypes,
    /// `_PyRuntime`
    pub runtime: UserAddr,
    /// The main `PyInterpreterState`.
    pub main: UserAddr,
    /// All interpreter states, the main one among them.
    pub interpreters: Vec<UserAddr>,
    /// `_PyFunction_Vectorcall`: the `vectorcall` of plain functions.
    pub entry: UserAddr,
    /// `_PyEval_EvalFrameDefault`
    pub eval_frame_default: UserAddr,
    /// What the eBPF programs need.
    pub kernel: KernelAddresses,
}

/// Most interpreters of a process.
const MAX_INTERPRETERS: usize = 256;

impl Interpreter {
    /// Checks that the process is what the tables say. Nothing is written; nothing may be written before this has passed.
    ///
    /// If no thread of the target is held, objects may change while they are read: then a failed self-check is worth a
    /// second try.
    pub fn verify(mem: &dyn Memory, file: &InterpreterFile, bias: u64) -> Result<Self, Refusal> {
        if let [layout] = file.candidates() {
            return Self::verify_as(mem, file, bias, layout);
        }
        let mut passed = Vec::new();
        let mut refused = None;
        for layout in file.candidates() {
            match Self::verify_as(mem, file, bias, layout) {
                Ok(interpreter) => passed.push(interpreter),
                Err(refusal @ (Refusal::Gone { .. } | Refusal::Denied { .. } | Refusal::DebugBuild)) => {
                    return Err(refusal);
                }
                Err(refusal) => {
                    // The most telling one: "not ready" if any says so.
                    if refused.is_none() || refusal.is_temporary() {
                        refused = Some(refusal);
                    }
                }
            }
        }
        match (passed.pop(), passed.pop()) {
            (Some(only), None) => Ok(only),
            (Some(a), Some(b)) => {
                Err(Refusal::check(format!("it looks like CPython {} and like {}", a.layout.version, b.layout.version)))
            }
            (None, _) => Err(refused.unwrap_or(Refusal::NotPython)),
        }
    }

    fn verify_as(
        mem: &dyn Memory,
        file: &InterpreterFile,
        bias: u64,
        layout: &'static PyLayout,
    ) -> Result<Self, Refusal> {
        let version = layout.version;
        let at = |addr: FileAddr| UserAddr(addr.0.wrapping_add(bias));
        let runtime = at(file.runtime);
        let types = file.types(bias)?;
        let heap = Heap::new(mem, layout, &types);

        if layout.runtime.debug_offsets {
            let cookie = mem.read_u64(runtime)?.to_le_bytes();
            if &cookie != b"xdebugpy" {
                return Err(Refusal::check("_PyRuntime does not begin with _Py_DebugOffsets"));
            }
            if mem.read_u64(runtime.offset(16))? != 0 {
                return Err(Refusal::FreeThreaded);
            }
            let found = Minor::from_hex(mem.read_u64(runtime.offset(8))? as u32);
            if found != version {
                return Err(Refusal::check(format!("_Py_DebugOffsets are of CPython {found}, not {version}")));
            }
        }

        // The fixed parts first: they are there before the runtime is.
        let vectorcall = mem.read_u64(types.function.offset(layout.type_.vectorcall_offset))?;
        if vectorcall != layout.function.vectorcall {
            return Err(Refusal::check(format!(
                "functions keep vectorcall at {vectorcall}; in CPython {version} it is {}",
                layout.function.vectorcall
            )));
        }
        if heap.type_of(types.function)? != types.type_ || heap.type_of(types.type_)? != types.type_ {
            // Static types get their type when the runtime is initialised.
            if heap.type_of(types.type_)?.is_null() || heap.type_of(types.function)?.is_null() {
                return Err(Refusal::NotReady { what: "its types are not set up yet" });
            }
            return Err(Refusal::check("the type of function is not type"));
        }

        let main = mem.read_ptr(runtime.offset(layout.runtime.interpreters_main))?;
        if main.is_null() {
            return Err(Refusal::NotReady { what: "it has no main interpreter yet" });
        }
        let interpreters = interpreters(mem, layout, runtime)?;
        if !interpreters.contains(&main) {
            return Err(Refusal::check("the main interpreter is not among the interpreters"));
        }

        let modules = mem.read_ptr(main.offset(layout.interpreter.modules))?;
        let sysdict = mem.read_ptr(main.offset(layout.interpreter.sysdict))?;
        if modules.is_null() || sysdict.is_null() {
            return Err(Refusal::NotReady { what: "sys.modules does not exist yet" });
        }
        for (name, dict) in [("sys", sysdict), ("builtins", mem.read_ptr(main.offset(layout.interpreter.builtins))?)] {
            let Some(module) = heap.dict_get(modules, name)? else {
                return Err(Refusal::NotReady { what: "sys.modules is not filled yet" });
            };
            if heap.module_dict(module)? != dict {
                return Err(Refusal::check(format!("sys.modules[{name:?}] is not the interpreter's own")));
            }
        }
        let hexversion = check_sys(&heap, sysdict, version)?;
        let entry = check_functions(&heap, modules)?;

        let tstate = match layout.runtime.current_thread {
            CurrentThread::Runtime(offset) => runtime.offset(offset),
            CurrentThread::Gil { gil, last_holder } => {
                let gil = mem.read_ptr(main.offset(gil))?;
                if gil.is_null() {
                    return Err(Refusal::check("the main interpreter has no GIL"));
                }
                mem.read_ptr(gil.offset(last_holder))?;
                gil.offset(last_holder)
            }
        };
        let holder = mem.read_ptr(tstate)?;
        if !holder.is_null() {
            let interp = mem.read_ptr(holder.offset(layout.thread.interp))?;
            if !interpreters.contains(&interp) {
                return Err(Refusal::check("the thread that holds the GIL belongs to no interpreter"));
            }
        }

        Ok(Self {
            layout,
            hexversion,
            bias,
            runtime,
            main,
            interpreters,
            entry,
            eval_frame_default: at(file.eval_frame_default),
            kernel: KernelAddresses { none: types.none, float_type: types.float, bool_type: types.bool, tstate },
            types,
        })
    }

    /// The version as Python writes it, such as `3.12.1`.
    pub fn version(&self) -> String {
        let [major, minor, micro, _] = self.hexversion.to_be_bytes();
        format!("{major}.{minor}.{micro}")
    }

    /// The objects of this interpreter through `mem`.
    pub fn heap<'m>(&'m self, mem: &'m dyn Memory) -> Heap<'m> {
        Heap::new(mem, self.layout, &self.types)
    }

    /// The gate before this interpreter's functions.
    pub fn gate(&self, mem: &dyn Memory, file: &InterpreterFile) -> Result<Gate, Refusal> {
        Ok(gate::find_gate(mem, file.elf(), self.bias, self.entry)?)
    }

    /// All interpreters as they are now: subinterpreters come and go.
    pub fn interpreters_now(&self, mem: &dyn Memory) -> Result<Vec<UserAddr>, Refusal> {
        interpreters(mem, self.layout, self.runtime)
    }

    /// `sys.modules` of one interpreter.
    pub fn modules(&self, mem: &dyn Memory, interpreter: UserAddr) -> Result<UserAddr, MemoryError> {
        mem.read_ptr(interpreter.offset(self.layout.interpreter.modules))
    }
}

/// Walks the list of interpreters; it may be cyclic in a process that lies.
fn interpreters(mem: &dyn Memory, layout: &PyLayout, runtime: UserAddr) -> Result<Vec<UserAddr>, Refusal> {
    let mut found = Vec::new();
    let mut next = mem.read_ptr(runtime.offset(layout.runtime.interpreters_head))?;
    while !next.is_null() {
        if found.contains(&next) {
            return Err(Refusal::check("the list of interpreters is cyclic"));
        }
        if found.len() == MAX_INTERPRETERS {
            return Err(Refusal::check(format!("it has more than {MAX_INTERPRETERS} interpreters")));
        }
        found.push(next);
        next = mem.read_ptr(next.offset(layout.interpreter.next))?;
    }
    Ok(found)
}

/// `sys` has the right version, and is of no build whose objects are laid out differently.
fn check_sys(heap: &Heap<'_>, sysdict: UserAddr, version: Minor) -> Result<u32, Refusal> {
    let get = |name: &'static str| -> Result<Option<UserAddr>, Refusal> { Ok(heap.dict_get(sysdict, name)?) };
    let hexversion = match get("hexversion")? {
        Some(object) => heap.int(object)?,
        None => {
            return Err(Refusal::NotReady { what: "sys.hexversion does not exist yet" });
        }
    };
    let hexversion = u32::try_from(hexversion).map_err(|_| Refusal::check("sys.hexversion is odd"))?;
    let found = Minor::from_hex(hexversion);
    if found != version {
        return Err(Refusal::check(format!("sys.hexversion is that of CPython {found}, not {version}")));
    }
    let flags = match get("abiflags")? {
        Some(object) => heap.name(object)?,
        None => {
            return Err(Refusal::NotReady { what: "sys.abiflags does not exist yet" });
        }
    };
    if flags.contains('d') || get("gettotalrefcount")?.is_some() {
        return Err(Refusal::DebugBuild);
    }
    if flags.contains('t') {
        return Err(Refusal::FreeThreaded);
    }
    Ok(hexversion)
}

/// Functions of importlib, which every process has, are where and what they should be. Returns their common `vectorcall`.
fn check_functions(heap: &Heap<'_>, modules: UserAddr) -> Result<UserAddr, Refusal> {
    const ENOUGH: usize = 8;
    let Some(module) = heap.dict_get(modules, "_frozen_importlib")? else {
        return Err(Refusal::NotReady { what: "importlib is not loaded yet" });
    };
    let dict = heap.module_dict(module)?;
    let mut functions = 0;
    let mut vectorcalls: HashMap<UserAddr, usize> = HashMap::new();
    let failed = heap.dict_walk(dict, |key, value| {
        if !heap.is_function(value).unwrap_or(false) {
            return ControlFlow::Continue(());
        }
        let checked = (|| {
            let function = heap.function(value)?;
            let name = heap.code_name(function.code)?;
            Ok::<_, ObjectError>((function, name))
        })();
        match checked {
            Err(error) => ControlFlow::Break(error.to_string()),
            Ok((function, name)) => {
                if !heap.str_is(key, &name) || !heap.str_is(function.name, &name) {
                    return ControlFlow::Break(format!(
                        "a function of importlib is called {name:?} in some places only"
                    ));
                }
                if function.globals != dict {
                    return ControlFlow::Break(format!("{name} of importlib has other globals than its module"));
                }
                functions += 1;
                *vectorcalls.entry(function.vectorcall).or_default() += 1;
                ControlFlow::Continue(())
            }
        }
    })?;
    if let Some(what) = failed {
        return Err(Refusal::check(what));
    }
    if functions < ENOUGH {
        return Err(Refusal::check(format!("importlib has only {functions} functions")));
    }
    let (&entry, &count) = vectorcalls.iter().max_by_key(|(_, count)| **count).expect("there are functions");
    if count * 2 <= functions {
        return Err(Refusal::check("the functions of importlib do not share one vectorcall"));
    }
    Ok(entry)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read_from_names() {
        let named = |name: &'static str| named_version(Some(name), Path::new("/x")).map(|(v, f)| (v.to_string(), f));
        assert_eq!(named("libpython3.9.so.1.0"), Some(("3.9".into(), "")));
        assert_eq!(named("libpython3.13t.so.1.0"), Some(("3.13".into(), "t")));
        assert_eq!(named("libpython3.7m.so.1.0"), Some(("3.7".into(), "m")));
        assert_eq!(named("libpython2.7.so.1.0"), Some(("2.7".into(), "")));
        assert_eq!(named("libpython3.so"), None);
        assert_eq!(named("libc.so.6"), None);
        assert_eq!(named_version(None, Path::new("/usr/bin/python3.10")), Some((Minor::three(10), "")));
        assert_eq!(named_version(None, Path::new("/usr/bin/python3")), None);
    }

    #[test]
    fn libraries_are_recognised_by_name() {
        assert!(is_libpython("libpython3.12.so.1.0"));
        assert!(is_libpython("libpython3.13t.so.1.0"));
        assert!(!is_libpython("libpython3.so"));
        assert!(!is_libpython("_json.cpython-312-x86_64-linux-gnu.so"));
    }

    #[test]
    fn candidates_are_the_executable_then_the_library() {
        let maps = maps::parse(
            b"1000-2000 r--p 00000000 08:01 11 /usr/lib/_json.cpython-312.so
2000-3000 r-xp 00000000 08:01 12 /usr/lib/libpython3.12.so.1.0
3000-4000 r--p 00001000 08:01 12 /usr/lib/libpython3.12.so.1.0
4000-5000 r-xp 00000000 08:01 13 /usr/bin/python3
5000-6000 rw-p 00000000 00:00 0 [heap]
6000-7000 r-xp 00000000 08:01 14 /usr/lib/uwsgi/python3_plugin.so
",
        );
        let found = candidates(&maps, Path::new("/usr/bin/python3 (deleted)"));
        let names: Vec<_> = found.iter().map(|m| (m[0].inode, m.len())).collect();
        assert_eq!(names, [(13, 1), (12, 2), (14, 1)]);
    }

    #[test]
    fn other_programs_are_not_python() {
        assert_eq!(InterpreterFile::read(&std::env::current_exe().unwrap()).unwrap_err(), Refusal::NotPython);
        assert_eq!(InterpreterFile::read(Path::new("/etc/passwd")).unwrap_err(), Refusal::NotPython);
        assert_eq!(locate(Pid(std::process::id()), &[]).unwrap_err(), Refusal::NotPython);
        assert!(matches!(locate(Pid(0x3fff_ffff), &[]), Err(Refusal::Gone { .. })));
    }

    #[test]
    fn a_refusal_is_one_line() {
        let refusals = [
            Refusal::NotPython,
            Refusal::UnsupportedVersion { found: "2.7".into() },
            Refusal::ReturnProbes { why: "it has a shadow stack".into() },
            Refusal::NoGate(GateError::NoPadding { bytes: "cc".into() }),
            Refusal::check("x"),
        ];
        for refusal in refusals {
            assert!(!refusal.to_string().contains('\n'));
        }
    }
}
