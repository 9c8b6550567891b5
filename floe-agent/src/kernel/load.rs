//! Loading the programs, attaching them, and their maps.

use std::{
    collections::BTreeMap,
    fs::File,
    os::fd::AsRawFd as _,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    thread::JoinHandle,
    time::Duration,
};

use aya::{
    Btf as AyaBtf, Ebpf, EbpfError, EbpfLoader,
    maps::{Array, HashMap, MapData, MapError, PerCpuArray, RingBuf},
    programs::{
        ProgramError, RawTracePoint, UProbe,
        uprobe::{UProbeAttachLocation, UProbeLink, UProbeLinkId, UProbeScope},
    },
};
use caps::Capability;
use floe_ebpf::{Counter, FunctionInfo, FunctionKey, Key, Layout, MODULE_NAME_LEN, Plan, ProcessInfo, Settings};
use thiserror::Error;

use super::{
    btf::{Btf, BtfError},
    ring::{EventReader, UrgentReader},
};
use crate::units::{FileOffset, Pid, Tid};

/// The eBPF object, built from `floe-ebpf` by `build.rs`.
static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/floe-ebpf"));

/// Why the kernel side is not available.
#[derive(Debug, Error)]
pub enum KernelError {
    /// A capability is missing.
    #[error(
        "cannot load eBPF programs: {capability} is missing; run floe-agent as root (sudo), or give it this capability"
    )]
    NoCapability {
        /// Its name.
        capability: String,
    },
    /// The kernel has no eBPF for us.
    #[error(
        "cannot load eBPF programs: this kernel refuses the bpf system call ({source}); it needs CONFIG_BPF_SYSCALL=y and no seccomp filter on bpf"
    )]
    NoBpf {
        /// What the kernel said.
        source: std::io::Error,
    },
    /// No type information.
    #[error(transparent)]
    Btf(#[from] BtfError),
    /// The object does not load.
    #[error("cannot load the eBPF object: {0}")]
    Object(#[from] EbpfError),
    /// A program does not load.
    #[error("the kernel does not accept the eBPF program {program}: {reason}; floe-agent needs Linux 6.0 or later")]
    Program {
        /// Which.
        program: &'static str,
        /// Why, in one line; what else the verifier said goes to the log, at the level debug.
        reason: String,
    },
    /// A program does not attach.
    #[error("cannot attach {site} to {target}: {source}")]
    Attach {
        /// What was attached.
        site: &'static str,
        /// Where.
        target: String,
        /// Why.
        source: ProgramError,
    },
    /// A file cannot be opened.
    #[error("cannot open {} to attach to it: {source}", .path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A map operation failed.
    #[error("cannot access the eBPF map {map}: {source}")]
    Map {
        /// Which.
        map: &'static str,
        /// Why.
        source: MapError,
    },
}

/// What a uprobe is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Site {
    /// Entry of armed functions.
    GateEnter,
    /// Return of armed functions.
    GateReturn,
    /// `Py_RunMain`.
    RunMain,
    /// A function that switches C stacks.
    StackSwitch,
    /// A function that changes stack limits.
    StackConfig,
    /// A function that is only called with the GIL held.
    Rendezvous,
    /// The return of a function that takes the GIL.
    RendezvousReturn,
}

impl Site {
    const ALL: [Site; 7] = [
        Site::GateEnter,
        Site::GateReturn,
        Site::RunMain,
        Site::StackSwitch,
        Site::StackConfig,
        Site::Rendezvous,
        Site::RendezvousReturn,
    ];

    const fn program(self) -> &'static str {
        match self {
            Site::GateEnter => "gate_enter",
            Site::GateReturn => "gate_return",
            Site::RunMain => "run_main",
            Site::StackSwitch => "stack_switch",
            Site::StackConfig => "stack_config",
            Site::Rendezvous => "rendezvous",
            Site::RendezvousReturn => "rendezvous_return",
        }
    }
}

/// An attached probe; detach it with [`Kernel::detach`].
#[derive(Debug)]
pub struct LinkId(u64);

/// Where a probe is, or is to be again after a pause.
struct Attachment {
    site: Site,
    /// What was asked for; for messages.
    path: PathBuf,
    /// Keeps the file that the probe is in reachable.
    file: File,
    offset: FileOffset,
    thread: Option<Tid>,
    /// `None` while the kernel is paused.
    link: Option<UProbeLinkId>,
}

/// How long a traced thread waits for the agent at most.
#[derive(Clone, Copy, Debug)]
pub struct WaitBounds {
    /// For a module's functions to be armed.
    pub module: Duration,
    /// Where waiting longer is the safe side: first use of an interpreter, stack switch, deep recursion.
    pub long: Duration,
    /// For an exception to be read.
    pub exception: Duration,
}

impl Default for WaitBounds {
    fn default() -> Self {
        Self {
            module: Duration::from_millis(50),
            long: Duration::from_millis(500),
            exception: Duration::from_millis(20),
        }
    }
}

const TRACEPOINTS: [(&str, &str); 3] = [
    ("process_fork", "sched_process_fork"),
    ("process_exec", "sched_process_exec"),
    ("process_exit", "sched_process_exit"),
];

/// The loaded programs and maps: the half that the arming thread owns.
pub struct Kernel {
    ebpf: Ebpf,
    settings: Settings,
    settings_map: Array<MapData, Settings>,
    acks: Array<MapData, u64>,
    processes: HashMap<MapData, u32, ProcessInfo>,
    functions: HashMap<MapData, FunctionKey, FunctionInfo>,
    modules: HashMap<MapData, [u8; MODULE_NAME_LEN], u32>,
    layouts: Array<MapData, Layout>,
    plans: Array<MapData, Plan>,
    keys: Array<MapData, Key>,
    rendezvous: HashMap<MapData, u32, u32>,
    epochs: Array<MapData, u64>,
    own_hits: Arc<AtomicU64>,
    attached: BTreeMap<u64, Attachment>,
    next_attachment: u64,
    /// Threads that detach.
    detaching: Vec<JoinHandle<()>>,
    paused: bool,
}

/// Reads the programs' counters; may be used from any thread.
pub struct Counters {
    map: PerCpuArray<MapData, u64>,
    /// Hits of the gate's programs by the agent's own test processes.
    own_hits: Arc<AtomicU64>,
}

impl Counters {
    /// All counters, summed over the CPUs.
    pub fn read(&self) -> Vec<(Counter, u64)> {
        Counter::ALL
            .iter()
            .map(|&counter| {
                let sum: u64 = self.map.get(&(counter as u32), 0).map_or(0, |values| values.iter().sum());
                let own = if counter == Counter::GateForeign { self.own_hits.load(Ordering::Relaxed) } else { 0 };
                (counter, sum.saturating_sub(own))
            })
            .collect()
    }
}

/// Which capabilities loading and arming need, and the first that is missing.
fn missing_capability() -> Option<Capability> {
    let has = |capability| caps::has_cap(None, caps::CapSet::Effective, capability).unwrap_or(false);
    let admin = has(Capability::CAP_SYS_ADMIN);
    // Uprobes by the perf PMU need CAP_SYS_ADMIN since Linux 6.16 and its stable back-ports (commit ba677dbe77af).
    if !admin {
        return Some(Capability::CAP_SYS_ADMIN);
    }
    [Capability::CAP_SYS_PTRACE, Capability::CAP_DAC_READ_SEARCH].into_iter().find(|&capability| {
        let implied = capability == Capability::CAP_DAC_READ_SEARCH && has(Capability::CAP_DAC_OVERRIDE);
        !has(capability) && !implied
    })
}

/// Whether the kernel has the bpf system call at all.
fn bpf_available() -> Result<(), std::io::Error> {
    // BPF_PROG_LOAD with a NULL attribute: EFAULT or EINVAL where the call exists and is allowed.
    // SAFETY: the size is 0, nothing is read or written.
    let result = unsafe { libc::syscall(libc::SYS_bpf, 5, std::ptr::null::<u8>(), 0) };
    if result < 0 {
        let error = std::io::Error::last_os_error();
        if matches!(error.raw_os_error(), Some(libc::ENOSYS | libc::EPERM)) {
            return Err(error);
        }
    }
    Ok(())
}

/// Loads the programs, sets them up, and attaches the process tracepoints.
pub fn load(bounds: WaitBounds) -> Result<(Kernel, UrgentReader, EventReader, Counters), KernelError> {
    if let Some(capability) = missing_capability() {
        return Err(KernelError::NoCapability { capability: capability.to_string() });
    }
    bpf_available().map_err(|source| KernelError::NoBpf { source })?;
    let types = Btf::of_kernel()?;
    let settings = Settings {
        module_wait: bounds.module.as_nanos() as u64,
        long_wait: bounds.long.as_nanos() as u64,
        exception_wait: bounds.exception.as_nanos() as u64,
        task_pid: types.member("task_struct", "pid")?,
        task_tgid: types.member("task_struct", "tgid")?,
        task_signal: types.member("task_struct", "signal")?,
        signal_live: types.member("signal_struct", "live")?,
        task_exit_code: types.member("task_struct", "exit_code")?,
        wake_at: 512 << 10,
        select_children_of: 0,
        flags: 0,
    };
    let btf = AyaBtf::from_sys_fs().ok();
    let mut ebpf = EbpfLoader::new().btf(btf.as_ref()).load(OBJECT)?;
    macro_rules! map {
        ($kind:ident, $name:literal) => {
            $kind::try_from(ebpf.take_map($name).expect("the object has the map"))
                .map_err(|source| KernelError::Map { map: $name, source })?
        };
    }
    let urgent = RingBuf::try_from(ebpf.take_map("URGENT").expect("the object has the map"))
        .map_err(|source| KernelError::Map { map: "URGENT", source })?;
    let events = RingBuf::try_from(ebpf.take_map("EVENTS").expect("the object has the map"))
        .map_err(|source| KernelError::Map { map: "EVENTS", source })?;
    let own_hits = Arc::new(AtomicU64::new(0));
    let counters = Counters { map: map!(PerCpuArray, "COUNTERS"), own_hits: own_hits.clone() };
    let mut kernel = Kernel {
        settings,
        settings_map: map!(Array, "SETTINGS"),
        acks: map!(Array, "ACKS"),
        processes: map!(HashMap, "PROCESSES"),
        functions: map!(HashMap, "FUNCTIONS"),
        modules: map!(HashMap, "MODULES"),
        layouts: map!(Array, "LAYOUTS"),
        plans: map!(Array, "PLANS"),
        keys: map!(Array, "KEYS"),
        rendezvous: map!(HashMap, "RENDEZVOUS"),
        epochs: map!(Array, "EPOCHS"),
        own_hits,
        ebpf,
        attached: BTreeMap::new(),
        next_attachment: 0,
        detaching: Vec::new(),
        paused: false,
    };
    kernel.write_settings()?;
    for site in Site::ALL {
        let program = site.program();
        kernel.uprobe(program).load().map_err(|error| refused(program, &error))?;
    }
    for (program, tracepoint) in TRACEPOINTS {
        let raw: &mut RawTracePoint =
            kernel.ebpf.program_mut(program).and_then(|p| p.try_into().ok()).expect("the object has the program");
        raw.load().map_err(|error| refused(program, &error))?;
        raw.attach(tracepoint).map_err(|source| KernelError::Attach {
            site: program,
            target: format!("the tracepoint {tracepoint}"),
            source,
        })?;
    }
    Ok((kernel, UrgentReader::new(urgent), EventReader::new(events), counters))
}

/// A program that does not load. The verifier's log has a line for each instruction: thousands.
fn refused(program: &'static str, error: &ProgramError) -> KernelError {
    let reason = match error {
        ProgramError::LoadError { io_error, verifier_log } => {
            let log = verifier_log.to_string();
            tracing::debug!("the verifier on {program}:\n{log}");
            match verdict(&log) {
                Some(verdict) => format!("{verdict} ({io_error})"),
                None => io_error.to_string(),
            }
        }
        other => other.to_string(),
    };
    KernelError::Program { program, reason }
}

/// What the verifier objects to: the last line of its log but for its statistics.
fn verdict(log: &str) -> Option<&str> {
    let statistics = |line: &&str| {
        ["verification time ", "stack depth ", "processed "].iter().any(|beginning| line.starts_with(beginning))
    };
    log.lines().map(str::trim).rfind(|line| !line.is_empty() && !statistics(line))
}

impl Kernel {
    fn uprobe(&mut self, program: &str) -> &mut UProbe {
        self.ebpf.program_mut(program).and_then(|p| p.try_into().ok()).expect("the object has the program")
    }

    fn write_settings(&mut self) -> Result<(), KernelError> {
        self.settings_map.set(0, self.settings, 0).map_err(|source| KernelError::Map { map: "SETTINGS", source })
    }

    /// Attaches `site` at an offset of a file, for all processes or for one thread. What is attached for all while the kernel
    /// is paused is attached when the pause ends.
    pub fn attach(
        &mut self,
        site: Site,
        file: &Path,
        offset: FileOffset,
        thread: Option<Tid>,
    ) -> Result<LinkId, KernelError> {
        let open = File::open(file).map_err(|source| KernelError::File { path: file.to_owned(), source })?;
        let mut attachment = Attachment { site, path: file.to_owned(), file: open, offset, thread, link: None };
        if !self.paused || thread.is_some() {
            attachment.link = Some(self.link(&attachment)?);
        }
        self.next_attachment += 1;
        self.attached.insert(self.next_attachment, attachment);
        Ok(LinkId(self.next_attachment))
    }

    fn link(&mut self, attachment: &Attachment) -> Result<UProbeLinkId, KernelError> {
        let Attachment { site, path, file, offset, thread, link: _ } = attachment;
        let scope = match thread.and_then(|tid| std::num::NonZeroU32::new(tid.0)) {
            Some(tid) => UProbeScope::OneProcess(tid),
            None => UProbeScope::AllProcesses,
        };
        let inode = PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()));
        self.uprobe(site.program()).attach(UProbeAttachLocation::AbsoluteOffset(offset.0), &inode, scope).map_err(
            |source| KernelError::Attach {
                site: site.program(),
                target: format!("{} at offset {offset}", path.display()),
                source,
            },
        )
    }

    fn take(&mut self, site: Site, link: UProbeLinkId) -> Option<UProbeLink> {
        match self.uprobe(site.program()).take_link(link) {
            Ok(link) => Some(link),
            Err(error) => {
                tracing::warn!("cannot detach {}: {error}", site.program());
                None
            }
        }
    }

    /// Detaches probes, in the background.
    ///
    /// The kernel waits for all running probe programs before it lets a detach return (`synchronize_rcu_tasks_trace`), and
    /// among those are the ones in which a traced thread waits for us. So nobody who answers them may wait for a detach.
    pub fn detach(&mut self, links: impl IntoIterator<Item = LinkId>) {
        let mut taken = Vec::new();
        for LinkId(id) in links {
            if let Some(Attachment { site, link: Some(link), file, .. }) = self.attached.remove(&id) {
                taken.extend(self.take(site, link).map(|link| (link, file)));
            }
        }
        if !taken.is_empty() {
            self.drop_apart(taken);
        }
    }

    /// Drops links in a thread of its own; here, if that cannot be started.
    fn drop_apart(&mut self, links: impl Send + 'static) {
        self.detaching.retain(|thread| !thread.is_finished());
        let thread = std::thread::Builder::new().name("floe-detach".into()).spawn(move || drop(links));
        self.detaching.extend(thread.ok());
    }

    /// Whether probes are being detached. Meanwhile the kernel lets nobody attach.
    pub fn is_detaching(&self) -> bool {
        self.detaching.iter().any(|thread| !thread.is_finished())
    }

    /// Takes all probes away that are there for all processes, and remembers them. Each is detached by a thread of its own:
    /// the breakpoint goes at once, but then the kernel waits, and the next one must not wait with it.
    pub fn pause(&mut self) {
        self.paused = true;
        let wanted: Vec<u64> =
            self.attached.iter().filter(|(_, a)| a.thread.is_none() && a.link.is_some()).map(|(&id, _)| id).collect();
        for id in wanted {
            let Some(attachment) = self.attached.get_mut(&id) else { continue };
            let (site, link) = (attachment.site, attachment.link.take());
            if let Some(link) = link.and_then(|link| self.take(site, link)) {
                self.drop_apart(link);
            }
        }
    }

    /// Puts the probes back that [`Self::pause`] took away, the guards first. What cannot be attached again is given up.
    pub fn resume(&mut self) {
        self.paused = false;
        let mut wanted: Vec<(bool, u64)> = self
            .attached
            .iter()
            .filter(|(_, a)| a.link.is_none())
            .map(|(&id, a)| (!matches!(a.site, Site::StackSwitch | Site::StackConfig), id))
            .collect();
        wanted.sort_unstable();
        for (_, id) in wanted {
            let Some(mut attachment) = self.attached.remove(&id) else { continue };
            match self.link(&attachment) {
                Ok(link) => {
                    attachment.link = Some(link);
                    self.attached.insert(id, attachment);
                }
                Err(error) => tracing::warn!("{error}"),
            }
        }
    }

    /// Probes that are attached now.
    pub fn probes(&self) -> usize {
        self.attached.values().filter(|attachment| attachment.link.is_some()).count()
    }

    /// Turns a [`floe_ebpf::setting`] on or off.
    pub fn set(&mut self, flag: u32, on: bool) -> Result<(), KernelError> {
        self.settings.flags = if on { self.settings.flags | flag } else { self.settings.flags & !flag };
        self.write_settings()
    }

    /// Whether a [`floe_ebpf::setting`] is on.
    pub fn is_set(&self, flag: u32) -> bool {
        self.settings.flags & flag != 0
    }

    /// A test process of the agent's own has hit the gate's program once: it is not to be counted.
    pub(super) fn count_own_hit(&self) {
        self.own_hits.fetch_add(1, Ordering::Relaxed);
    }

    /// Lets a waiting thread go on.
    pub fn acknowledge(&mut self, tid: Tid, token: u64) {
        if let Err(error) = self.acks.set(tid.0 & (floe_ebpf::ACK_SLOTS - 1), token, 0) {
            tracing::error!("cannot acknowledge a waiting thread: {error}; it goes on when its bound is reached");
        }
    }

    /// While this is set, children of `pid` are selected.
    pub fn select_children_of(&mut self, pid: Option<Pid>) -> Result<(), KernelError> {
        self.settings.select_children_of = pid.map_or(0, |pid| pid.0);
        self.write_settings()
    }

    /// What the programs know of a process.
    pub fn process(&self, pid: Pid) -> Option<ProcessInfo> {
        self.processes.get(&pid.0, 0).ok()
    }

    /// Sets what the programs know of a process.
    pub fn set_process(&mut self, pid: Pid, info: ProcessInfo) -> Result<(), KernelError> {
        self.processes.insert(pid.0, info, 0).map_err(|source| KernelError::Map { map: "PROCESSES", source })
    }

    /// Pids of all processes the programs know.
    pub fn process_ids(&self) -> Vec<Pid> {
        self.processes.keys().filter_map(Result::ok).map(Pid).collect()
    }

    /// A new epoch, for a process that was running before the agent.
    pub fn new_epoch(&mut self) -> Result<u32, KernelError> {
        // The programs add atomically; this read-and-write could give a number twice if a fork comes between, so user
        // space takes its epochs from the upper half.
        const USER: u64 = 1 << 31;
        let error = |source| KernelError::Map { map: "EPOCHS", source };
        let next = self.epochs.get(&1, 0).map_err(error)? + 1;
        self.epochs.set(1, next, 0).map_err(error)?;
        Ok((USER | next) as u32)
    }

    /// Registers an armed function.
    pub fn set_function(&mut self, key: FunctionKey, info: FunctionInfo) -> Result<(), KernelError> {
        self.functions.insert(key, info, 0).map_err(|source| KernelError::Map { map: "FUNCTIONS", source })
    }

    /// What is registered of a function.
    pub fn function(&self, key: FunctionKey) -> Option<FunctionInfo> {
        self.functions.get(&key, 0).ok()
    }

    /// Forgets an armed function.
    pub fn remove_function(&mut self, key: FunctionKey) {
        // It may be gone already.
        let _ = self.functions.remove(&key);
    }

    /// Registers a module whose import matters, and how long a thread waits then ([`floe_ebpf::module_wait`]).
    pub fn set_module(&mut self, name: &str, wait: u32) -> Result<(), KernelError> {
        let mut key = [0; MODULE_NAME_LEN];
        let bytes = name.as_bytes();
        let len = bytes.len().min(MODULE_NAME_LEN - 1);
        key[..len].copy_from_slice(&bytes[..len]);
        self.modules.insert(key, wait, 0).map_err(|source| KernelError::Map { map: "MODULES", source })
    }

    /// Loads the layout of an interpreter version.
    pub fn set_layout(&mut self, index: u32, layout: Layout) -> Result<(), KernelError> {
        self.layouts.set(index, layout, 0).map_err(|source| KernelError::Map { map: "LAYOUTS", source })
    }

    /// Loads the capture plans and their keys.
    pub fn set_plans(&mut self, plans: &[Plan], keys: &[Key]) -> Result<(), KernelError> {
        for (index, plan) in plans.iter().enumerate() {
            self.plans.set(index as u32, plan, 0).map_err(|source| KernelError::Map { map: "PLANS", source })?;
        }
        for (index, key) in keys.iter().enumerate() {
            self.keys.set(index as u32, key, 0).map_err(|source| KernelError::Map { map: "KEYS", source })?;
        }
        Ok(())
    }

    /// Asks the next thread of `pid` that passes a rendezvous probe to wait.
    pub fn ask_for_rendezvous(&mut self, pid: Pid) -> Result<(), KernelError> {
        self.rendezvous.insert(pid.0, 1, 0).map_err(|source| KernelError::Map { map: "RENDEZVOUS", source })
    }

    /// Takes the question back; whether nobody had answered it yet.
    pub fn cancel_rendezvous(&mut self, pid: Pid) -> bool {
        self.rendezvous.remove(&pid.0).is_ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_is_the_last_thing_the_verifier_said() {
        let log = "815: (b7) r4 = 0\n816: (85) call bpf_loop#181\nR3 type=map_value expected=fp\nverification time 13321 usec\n\
                   stack depth 136+0\nprocessed 2113 insns (limit 1000000) max_states_per_insn 4\n";
        assert_eq!(verdict(log), Some("R3 type=map_value expected=fp"));
        assert_eq!(verdict("processed 0 insns (limit 1000000)\n"), None);
    }

    #[test]
    fn the_programs_pass_the_verifier() {
        match load(WaitBounds::default()) {
            Ok(_) => {}
            Err(KernelError::NoCapability { capability }) if std::env::var_os("FLOE_REQUIRE_BPF").is_none() => {
                println!("SKIPPED: the_programs_pass_the_verifier: {capability} is missing");
            }
            Err(error) => panic!("{error}"),
        }
    }
}
