//! One process seen through `/proc`: who it is, how it was started, its relatives, its restrictions.
//!
//! Texts come from the process and are bounded. Everything may vanish at any moment: that is an error of kind `NotFound`.

use std::collections::{HashMap, HashSet};
use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, Read as _};
use std::os::unix::{ffi::OsStringExt as _, fs::OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use rustix::{
    fs::{Mode, OFlags, ResolveFlags, openat2},
    path::Arg,
};

use crate::units::{BootNanos, Pid, Tid};

/// Most bytes of a command line that are read: more than one argument can have, which are 128 KiB.
pub const MAX_CMDLINE: u64 = 256 << 10;
/// Most bytes of an environment that are read.
pub const MAX_ENVIRON: u64 = 1 << 20;
/// Most bytes of the small files.
const MAX_SMALL: u64 = 64 << 10;

fn read(pid: Pid, name: &str, limit: u64) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    File::open(format!("/proc/{pid}/{name}"))?.take(limit).read_to_end(&mut bytes).map_err(|error| {
        // The file of a process that has just ended reads as ESRCH.
        if error.raw_os_error() == Some(libc::ESRCH) { io::ErrorKind::NotFound.into() } else { error }
    })?;
    Ok(bytes)
}

fn invalid(what: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

/// The executable's path, as the process's own mount namespace has it.
pub fn exe(pid: Pid) -> io::Result<PathBuf> {
    fs::read_link(format!("/proc/{pid}/exe"))
}

/// The working directory.
pub fn cwd(pid: Pid) -> io::Result<PathBuf> {
    fs::read_link(format!("/proc/{pid}/cwd"))
}

/// The command line, at most [`MAX_CMDLINE`] bytes of it; empty for kernel threads and zombies.
pub fn cmdline(pid: Pid) -> io::Result<Vec<OsString>> {
    let bytes = read(pid, "cmdline", MAX_CMDLINE)?;
    let text = bytes.strip_suffix(&[0]).unwrap_or(&bytes);
    if text.is_empty() {
        return Ok(Vec::new());
    }
    Ok(text.split(|&b| b == 0).map(|arg| OsString::from_vec(arg.to_vec())).collect())
}

/// A file as the process sees it, at most `limit` bytes of it. Only regular files, and no path leads out of the process's
/// root directory: the path comes from the process.
pub fn file(pid: Pid, path: impl Arg, limit: u64) -> io::Result<Vec<u8>> {
    let root = File::open(format!("/proc/{pid}/root"))?;
    // Nothing that opens may wait, which a named pipe would.
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
    let file = File::from(openat2(&root, path, flags, Mode::empty(), resolve)?);
    if !file.metadata()?.is_file() {
        return Err(invalid("not a regular file"));
    }
    let mut bytes = Vec::new();
    file.take(limit).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// Opens a file that a process has named. Never waits, as opening a named pipe would.
pub fn open(path: &Path) -> io::Result<File> {
    File::options().read(true).custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY).open(path)
}

/// The environment that the process was started with, at most [`MAX_ENVIRON`] bytes of it.
#[derive(Clone, Default)]
pub struct Environ {
    bytes: Vec<u8>,
}

impl Environ {
    /// Reads it.
    pub fn read(pid: Pid) -> io::Result<Self> {
        Ok(Self { bytes: read(pid, "environ", MAX_ENVIRON)? })
    }

    /// From the bytes of an `environ` file.
    pub fn from_bytes(bytes: Vec<u8>) -> Self {
        Self { bytes }
    }

    /// The value of a variable. Invalid UTF-8 is replaced.
    pub fn get(&self, name: &str) -> Option<String> {
        self.bytes
            .split(|&b| b == 0)
            .find_map(|entry| entry.strip_prefix(name.as_bytes())?.strip_prefix(b"="))
            .map(|value| String::from_utf8_lossy(value).into_owned())
    }
}

impl std::fmt::Debug for Environ {
    /// Environments hold secrets: only the size.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Environ({} bytes)", self.bytes.len())
    }
}

/// What `/proc/<pid>/stat` says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stat {
    /// Name of the main thread.
    pub name: String,
    /// State letter; `Z` and `X` have ended.
    pub state: char,
    /// Parent process.
    pub parent: Pid,
    /// When it started; with the pid it identifies the process.
    pub started: BootNanos,
}

impl Stat {
    /// Reads it.
    pub fn read(pid: Pid) -> io::Result<Self> {
        Self::parse(&read(pid, "stat", MAX_SMALL)?, ticks_per_second()).ok_or_else(|| invalid("stat"))
    }

    /// Parses the file's text. The name may hold spaces and parentheses.
    pub(crate) fn parse(text: &[u8], ticks: u64) -> Option<Self> {
        let open = text.iter().position(|&b| b == b'(')?;
        let close = text.iter().rposition(|&b| b == b')')?;
        let name = String::from_utf8_lossy(text.get(open + 1..close)?).into_owned();
        let rest = std::str::from_utf8(text.get(close + 1..)?).ok()?;
        let mut words = rest.split_ascii_whitespace();
        let state = words.next()?.chars().next()?;
        let parent = Pid(words.next()?.parse().ok()?);
        // State is field 3, starttime field 22.
        let start: u64 = words.nth(17)?.parse().ok()?;
        let started = BootNanos(start.checked_mul(1_000_000_000)? / ticks.max(1));
        Some(Self { name, state, parent, started })
    }

    /// Whether it has not ended.
    pub fn is_alive(&self) -> bool {
        !matches!(self.state, 'Z' | 'X' | 'x')
    }
}

fn ticks_per_second() -> u64 {
    rustix::param::clock_ticks_per_second()
}

/// Whether the process exists and has not ended.
pub fn is_alive(pid: Pid) -> bool {
    Stat::read(pid).is_ok_and(|stat| stat.is_alive())
}

/// Whether a thread of a process has not ended.
pub fn is_thread_alive(pid: Pid, tid: Tid) -> bool {
    let stat = read(pid, &format!("task/{tid}/stat"), MAX_SMALL).ok();
    stat.and_then(|text| Stat::parse(&text, ticks_per_second())).is_some_and(|stat| stat.is_alive())
}

/// Its threads.
pub fn threads(pid: Pid) -> io::Result<Vec<Tid>> {
    let entries = fs::read_dir(format!("/proc/{pid}/task"))?;
    Ok(entries.filter_map(Result::ok).filter_map(|e| e.file_name().to_str()?.parse().ok().map(Tid)).collect())
}

/// All processes.
pub fn all() -> io::Result<Vec<Pid>> {
    let entries = fs::read_dir("/proc")?;
    Ok(entries.filter_map(Result::ok).filter_map(|e| e.file_name().to_str()?.parse().ok().map(Pid)).collect())
}

/// The children of a process, their children, and so on, parents before children.
pub fn descendants(pid: Pid) -> io::Result<Vec<Pid>> {
    let mut children: HashMap<Pid, Vec<Pid>> = HashMap::new();
    for other in all()? {
        if let Ok(stat) = Stat::read(other) {
            children.entry(stat.parent).or_default().push(other);
        }
    }
    let mut found = Vec::new();
    let mut seen = HashSet::from([pid]);
    let mut next = vec![pid];
    while let Some(parent) = next.pop() {
        for &child in children.get(&parent).map_or(&[][..], Vec::as_slice) {
            if seen.insert(child) {
                found.push(child);
                next.push(child);
            }
        }
    }
    Ok(found)
}

/// How system calls of a process are filtered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Seccomp {
    /// Not at all.
    Disabled,
    /// Only four system calls.
    Strict,
    /// By programs.
    Filter,
}

/// What `/proc/<pid>/status` says that matters here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Status {
    /// System call filter.
    pub seccomp: Seccomp,
    /// `shstk` is among `x86_Thread_features`: calls and returns are checked against a second stack.
    pub shadow_stack: bool,
    /// Its pid in each pid namespace it is in, the agent's first.
    pub ns_pids: Vec<u32>,
    /// Effective user id.
    pub uid: u32,
    /// Pid of the process that traces it with ptrace, if any.
    pub tracer: Option<Pid>,
}

impl Status {
    /// Reads it.
    pub fn read(pid: Pid) -> io::Result<Self> {
        Self::parse(&String::from_utf8_lossy(&read(pid, "status", MAX_SMALL)?)).ok_or_else(|| invalid("status"))
    }

    pub(crate) fn parse(text: &str) -> Option<Self> {
        let field =
            |name: &str| text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':')).map(str::trim);
        Some(Self {
            seccomp: match field("Seccomp") {
                None | Some("0") => Seccomp::Disabled,
                Some("1") => Seccomp::Strict,
                Some(_) => Seccomp::Filter,
            },
            shadow_stack: field("x86_Thread_features")
                .is_some_and(|features| features.split_ascii_whitespace().any(|feature| feature == "shstk")),
            ns_pids: field("NSpid")
                .or_else(|| field("Pid"))?
                .split_ascii_whitespace()
                .map_while(|pid| pid.parse().ok())
                .collect(),
            uid: field("Uid")?.split_ascii_whitespace().nth(1)?.parse().ok()?,
            tracer: field("TracerPid")?.parse().ok().filter(|&pid| pid != 0).map(Pid),
        })
    }
}

/// Soft limit of the main thread's stack, in bytes; `None` if unlimited.
pub fn stack_limit(pid: Pid) -> io::Result<Option<u64>> {
    let text = String::from_utf8_lossy(&read(pid, "limits", MAX_SMALL)?).into_owned();
    let soft = text
        .lines()
        .find_map(|line| line.strip_prefix("Max stack size"))
        .and_then(|rest| rest.split_ascii_whitespace().next())
        .ok_or_else(|| invalid("limits"))?;
    if soft == "unlimited" {
        return Ok(None);
    }
    soft.parse().map(Some).map_err(|_| invalid("limits"))
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use super::*;

    fn own() -> Pid {
        Pid(std::process::id())
    }

    #[test]
    fn the_own_process_is_known() {
        assert_eq!(exe(own()).unwrap(), std::env::current_exe().unwrap());
        assert_eq!(cwd(own()).unwrap(), std::env::current_dir().unwrap());
        assert_eq!(cmdline(own()).unwrap(), std::env::args_os().collect::<Vec<_>>());
        let stat = Stat::read(own()).unwrap();
        assert!(stat.is_alive());
        assert_eq!(stat.parent, Pid(std::os::unix::process::parent_id()));
        let status = Status::read(own()).unwrap();
        assert_eq!(status.ns_pids[0], own().0);
        assert!(!threads(own()).unwrap().is_empty());
        stack_limit(own()).unwrap();
    }

    #[test]
    fn a_child_is_a_descendant_with_its_environment_until_it_ends() {
        let mut child = Command::new("sh")
            .args(["-c", "cat; exit 0"])
            .env("FLOE_TEST", "a=b")
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let pid = Pid(child.id());
        for _ in 0..100 {
            // The grandchild appears a little later.
            if descendants(pid).unwrap().len() == 1 {
                break;
            }
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
        assert_eq!(descendants(pid).unwrap().len(), 1);
        let environ = Environ::read(pid).unwrap();
        assert_eq!(environ.get("FLOE_TEST").as_deref(), Some("a=b"));
        assert_eq!(environ.get("FLOE_TES"), None);
        assert_eq!(environ.get("FLOE_TEST_"), None);
        assert!(!format!("{environ:?}").contains("FLOE_TEST"));
        assert!(descendants(own()).unwrap().contains(&pid));
        assert!(Stat::read(pid).unwrap().started >= Stat::read(own()).unwrap().started);
        drop(child.stdin.take());
        child.wait().unwrap();
        assert!(!is_alive(pid));
        assert_eq!(Stat::read(pid).unwrap_err().kind(), io::ErrorKind::NotFound);
    }

    #[test]
    fn only_regular_files_of_a_process_are_read() {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name).to_str().unwrap().to_owned();
        fs::write(path("file"), "content").unwrap();
        std::os::unix::fs::symlink("file", path("link")).unwrap();
        let fifo = std::ffi::CString::new(path("fifo")).unwrap();
        // SAFETY: a path that ends in zero.
        assert_eq!(unsafe { libc::mkfifo(fifo.as_ptr(), 0o600) }, 0);
        assert_eq!(file(own(), path("file"), 4).unwrap(), b"cont");
        assert_eq!(file(own(), path("link"), 99).unwrap(), b"content");
        for name in ["fifo", "nothing", "."] {
            assert!(file(own(), path(name), 99).is_err(), "{name}");
        }
        assert!(file(own(), "/dev/zero", 99).is_err());
    }

    #[test]
    fn names_with_parentheses_and_spaces_do_not_shift_the_fields() {
        let text = b"42 (a) b (c) S 7 42 42 0 -1 4194304 1 2 3 4 5 6 7 8 20 0 1 0 12345 1000 10";
        let stat = Stat::parse(text, 100).unwrap();
        assert_eq!(stat.name, "a) b (c");
        assert_eq!((stat.state, stat.parent), ('S', Pid(7)));
        assert_eq!(stat.started, BootNanos(123_450_000_000));
        for cut in 0..text.len() - 8 {
            let _ = Stat::parse(&text[..cut], 100);
        }
        assert_eq!(Stat::parse(b"", 100), None);
        assert_eq!(Stat::parse(b"1 )( S", 100), None);
    }

    #[test]
    fn restrictions_are_read_from_status() {
        let status = Status::parse(
            "Name:\tpython\nPid:\t77\nTracerPid:\t9\nUid:\t0\t1000\t0\t0\nNSpid:\t77\t12\t1\nSeccomp:\t2\nx86_Thread_features:\tshstk wrss\n",
        )
        .unwrap();
        assert_eq!(status.seccomp, Seccomp::Filter);
        assert!(status.shadow_stack);
        assert_eq!(status.ns_pids, [77, 12, 1]);
        assert_eq!((status.uid, status.tracer), (1000, Some(Pid(9))));
        assert!(Status::parse("").is_none());
    }
}
