//! `floe-agent doctor`: whether tracing works on this machine, found by trying, and what to do where it does not.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::{self, Write as _},
    path::{Path, PathBuf},
    sync::Arc,
};

use anyhow::Result;
use clap::Args;
use serde::Serialize;

use crate::{
    kernel::{self, WaitBounds, btf::Btf, trial},
    node::privileges,
    process::{
        container::Container,
        identity::{self, Seccomp},
    },
    python::{
        identify::{Interpreter, InterpreterFile, Refusal, locate},
        memory::{CachedMemory, ProcessMemory},
    },
    trace::script_name,
    units::Pid,
};

/// Options of `doctor`.
#[derive(Args, Debug)]
pub(super) struct DoctorOptions {
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// How bad it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Level {
    Ok,
    /// Something works less well.
    Warning,
    /// Tracing does not work.
    Problem,
}

/// One thing that was looked at.
#[derive(Clone, Debug, Serialize)]
struct Check {
    name: &'static str,
    level: Level,
    found: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    fix: Option<String>,
}

/// An interpreter file.
#[derive(Clone, Debug, Serialize)]
struct File {
    path: PathBuf,
    #[serde(skip_serializing_if = "Option::is_none")]
    version: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    build_id: Option<String>,
    /// File offset of the gate, where the file tells it.
    #[serde(skip_serializing_if = "Option::is_none")]
    gate: Option<String>,
    /// Running processes of it.
    processes: usize,
    /// `can be traced`, `depends on the process` or `refused`.
    verdict: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<String>,
}

/// A Python process.
#[derive(Clone, Debug, Serialize)]
struct Process {
    pid: u32,
    program: String,
    interpreter: PathBuf,
    #[serde(skip_serializing_if = "Option::is_none")]
    version: Option<String>,
    /// Address of the gate, and of the entry of functions behind it.
    #[serde(skip_serializing_if = "Option::is_none")]
    gate: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    container: Option<String>,
    /// `can be traced` or `refused`.
    verdict: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<String>,
}

/// All that was found.
#[derive(Debug, Serialize)]
struct Diagnosis {
    works: bool,
    checks: Vec<Check>,
    interpreters: Vec<File>,
    processes: Vec<Process>,
}

const CAN: &str = "can be traced";
const REFUSED: &str = "refused";

pub(super) fn run(options: &DoctorOptions) -> Result<u8> {
    let (checks, return_probes_fail) = checks();
    let works = checks.iter().all(|check| check.level != Level::Problem);
    let (interpreters, processes) = pythons(return_probes_fail.as_deref());
    let diagnosis = Diagnosis { works, checks, interpreters, processes };
    if options.json {
        println!("{}", serde_json::to_string_pretty(&diagnosis)?);
    } else {
        print!("{diagnosis}");
    }
    Ok(u8::from(!works))
}

fn text(path: &str) -> Option<String> {
    std::fs::read_to_string(path).ok().map(|text| text.trim().to_owned())
}

impl Check {
    fn ok(name: &'static str, found: impl Into<String>) -> Self {
        Self { name, level: Level::Ok, found: found.into(), fix: None }
    }

    fn warning(name: &'static str, found: impl Into<String>, fix: impl Into<String>) -> Self {
        Self { name, level: Level::Warning, found: found.into(), fix: Some(fix.into()) }
    }

    fn problem(name: &'static str, found: impl Into<String>, fix: impl Into<String>) -> Self {
        Self { name, level: Level::Problem, found: found.into(), fix: Some(fix.into()) }
    }
}

/// What the machine allows; and why return probes do not work under seccomp filters, if so.
fn checks() -> (Vec<Check>, Option<String>) {
    let mut all = vec![kernel_version(), architecture()];
    all.extend(capabilities());
    all.extend([lockdown(), ptrace_scope(), perf_event_paranoid(), pid_namespace(), own_seccomp(), cgroups(), types()]);
    let mut failing = None;
    let tried = match kernel::load(WaitBounds::default()) {
        Err(error) => {
            // The first problem above is mostly its cause.
            Check::problem("eBPF programs", error.to_string(), "solve the problems above, then run this again")
        }
        Ok((mut kernel, ..)) => {
            all.push(Check::ok(
                "eBPF programs",
                "loaded: ring buffers, sleepable uprobes, bpf_loop, raw tracepoints for fork, exec and exit",
            ));
            match trial::run(&mut kernel) {
                Ok(trial::Trial::Works) => {
                    Check::ok("uprobes", "a process under a seccomp filter lives through an entry and a return probe")
                }
                Ok(trial::Trial::Fails(why)) => {
                    let check = Check::warning(
                        "uprobes",
                        format!(
                            "attached, but a process under a seccomp filter does not live through a return probe: {why}"
                        ),
                        "use a kernel with the fix for uretprobe and seccomp (6.14, 6.13.x, 6.12.x); until then processes \
                         under a seccomp filter, as in containers, are not traced",
                    );
                    failing = Some(why);
                    check
                }
                Err(error) => Check::problem(
                    "uprobes",
                    error.to_string(),
                    "give the agent CAP_SYS_ADMIN, and check that CONFIG_UPROBE_EVENTS=y and no LSM forbids perf_event_open",
                ),
            }
        }
    };
    all.push(tried);
    (all, failing)
}

fn kernel_version() -> Check {
    let release = text("/proc/sys/kernel/osrelease").unwrap_or_default();
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(|n| n.parse::<u32>().unwrap_or(0));
    let version = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    if version >= (6, 0) {
        Check::ok("kernel", format!("Linux {release}"))
    } else {
        // Distributions port features back: what the kernel can do is tried below.
        Check::warning(
            "kernel",
            format!("Linux {release}"),
            "floe-agent needs sleepable uprobes, which came with Linux 6.0",
        )
    }
}

fn architecture() -> Check {
    if cfg!(target_arch = "x86_64") {
        Check::ok("architecture", "x86-64")
    } else {
        Check::problem("architecture", std::env::consts::ARCH, "floe-agent traces x86-64 processes only")
    }
}

fn capabilities() -> Vec<Check> {
    let has = |capability| caps::has_cap(None, caps::CapSet::Effective, capability).unwrap_or(false);
    let admin = has(caps::Capability::CAP_SYS_ADMIN);
    let check = |(capability, what): &(caps::Capability, &'static str)| {
        let name = match capability {
            caps::Capability::CAP_SYS_ADMIN => "CAP_SYS_ADMIN",
            caps::Capability::CAP_BPF => "CAP_BPF",
            caps::Capability::CAP_PERFMON => "CAP_PERFMON",
            caps::Capability::CAP_SYS_PTRACE => "CAP_SYS_PTRACE",
            caps::Capability::CAP_DAC_READ_SEARCH => "CAP_DAC_READ_SEARCH",
            _ => "CAP_SYS_NICE",
        };
        let implied = match capability {
            caps::Capability::CAP_BPF | caps::Capability::CAP_PERFMON => admin,
            caps::Capability::CAP_DAC_READ_SEARCH => has(caps::Capability::CAP_DAC_OVERRIDE),
            _ => false,
        };
        if has(*capability) {
            Check::ok(name, "there")
        } else if implied {
            Check::ok(name, "missing, but another capability stands for it")
        } else if *capability == caps::Capability::CAP_SYS_NICE {
            Check::warning(
                name,
                format!("missing: {what}"),
                "give it to the agent if processes start slowly under load",
            )
        } else {
            Check::problem(
                name,
                format!("missing: {what}"),
                "run floe-agent as root (sudo), or give it this capability (systemd: AmbientCapabilities; Kubernetes: \
                 securityContext.capabilities.add)",
            )
        }
    };
    privileges::KEPT.iter().map(check).collect()
}

fn lockdown() -> Check {
    let Some(text) = text("/sys/kernel/security/lockdown") else {
        return Check::ok("lockdown", "none, or securityfs is not mounted");
    };
    let mode = text.split(['[', ']']).nth(1).unwrap_or("none").to_owned();
    if mode == "confidentiality" {
        Check::problem(
            "lockdown",
            mode,
            "boot without `lockdown=confidentiality`: it forbids eBPF programs to read memory",
        )
    } else {
        Check::ok("lockdown", mode)
    }
}

fn ptrace_scope() -> Check {
    match text("/proc/sys/kernel/yama/ptrace_scope").as_deref() {
        Some("3") => Check::problem(
            "kernel.yama.ptrace_scope",
            "3: nobody may write to other processes, root neither",
            "set it to 2 or less; the running kernel does not take 3 back, so set it in /etc/sysctl.d and restart the machine",
        ),
        Some(scope) => Check::ok("kernel.yama.ptrace_scope", scope),
        None => Check::ok("kernel.yama.ptrace_scope", "no Yama"),
    }
}

fn perf_event_paranoid() -> Check {
    let name = "kernel.perf_event_paranoid";
    let Some(value) = text("/proc/sys/kernel/perf_event_paranoid") else {
        return Check::problem(name, "the kernel has no perf events", "use a kernel with CONFIG_PERF_EVENTS=y");
    };
    let admin = caps::has_cap(None, caps::CapSet::Effective, caps::Capability::CAP_SYS_ADMIN).unwrap_or(false);
    if admin || value.parse::<i32>().is_ok_and(|value| value < 3) {
        Check::ok(name, value)
    } else {
        Check::problem(
            name,
            value,
            "give the agent CAP_SYS_ADMIN, which does not heed it, or `sysctl kernel.perf_event_paranoid=2`",
        )
    }
}

fn pid_namespace() -> Check {
    /// Inode of the initial pid namespace in all kernels (`PROC_PID_INIT_INO`).
    const INITIAL: &str = "pid:[4026531836]";
    match std::fs::read_link("/proc/self/ns/pid") {
        Ok(namespace) if namespace == Path::new(INITIAL) => Check::ok("pid namespace", "the machine's"),
        _ => Check::problem(
            "pid namespace",
            "another than the machine's: processes are not found by the pids that the kernel reports",
            "run the agent in the machine's pid namespace (Kubernetes: hostPID: true; Docker: --pid=host)",
        ),
    }
}

fn own_seccomp() -> Check {
    match identity::Status::read(Pid(std::process::id())).map(|status| status.seccomp) {
        Ok(Seccomp::Disabled) | Err(_) => Check::ok("seccomp", "none on the agent"),
        Ok(_) => {
            Check::ok("seccomp", "the agent has a filter; whether it allows bpf and perf_event_open is tried below")
        }
    }
}

fn cgroups() -> Check {
    let mounts = text("/proc/self/mounts").unwrap_or_default();
    let kinds: BTreeSet<_> = mounts.lines().filter_map(|line| line.split(' ').nth(2)).collect();
    Check::ok(
        "control groups",
        match (kinds.contains("cgroup2"), kinds.contains("cgroup")) {
            (true, false) => "version 2",
            (true, true) => "versions 1 and 2",
            (false, true) => "version 1",
            (false, false) => "not mounted: containers are still told by /proc/<pid>/cgroup",
        },
    )
}

fn types() -> Check {
    match Btf::of_kernel() {
        Ok(_) => Check::ok("BTF", kernel::btf::VMLINUX),
        Err(error) => Check::problem("BTF", error.to_string(), "use a kernel with CONFIG_DEBUG_INFO_BTF=y"),
    }
}

/// All interpreter files and Python processes there are.
fn pythons(return_probes_fail: Option<&str>) -> (Vec<File>, Vec<Process>) {
    let mut known: Vec<Arc<InterpreterFile>> = Vec::new();
    let mut files: BTreeMap<(u64, u64), File> = BTreeMap::new();
    let mut processes = Vec::new();
    for pid in identity::all().unwrap_or_default() {
        let words = identity::cmdline(pid).unwrap_or_default();
        if words.is_empty() || pid.0 == std::process::id() {
            continue;
        }
        let located = match locate(pid, &known) {
            Ok(located) => located,
            Err(Refusal::NotPython | Refusal::Gone { .. }) => continue,
            // What cannot be looked at is mostly not Python: only what calls itself so is told of.
            Err(Refusal::Denied { .. }) if !words[0].to_string_lossy().contains("python") => continue,
            Err(refusal) => {
                processes.push(process(pid, identity::exe(pid).unwrap_or_default(), Err(refusal)));
                continue;
            }
        };
        let identity = located.file.identity();
        if !known.iter().any(|file| file.identity() == identity) {
            known.push(located.file.clone());
        }
        let file = files
            .entry((identity.device, identity.inode))
            .or_insert_with(|| describe(located.name.clone(), Ok(&*located.file)));
        file.processes += 1;
        let looked = look(pid, &located.file, located.bias, return_probes_fail);
        if let Ok((version, _)) = &looked {
            file.version = Some(version.clone());
            file.verdict = CAN;
        }
        processes.push(process(pid, located.name, looked));
    }
    for path in installed() {
        let Ok(open) = std::fs::File::open(&path) else { continue };
        let Ok(identity) = crate::python::elf::FileIdentity::of(&open) else { continue };
        files.entry((identity.device, identity.inode)).or_insert_with(|| {
            let read = InterpreterFile::read(&path);
            describe(path, read.as_ref().map_err(Clone::clone))
        });
    }
    let mut files: Vec<_> =
        files.into_values().filter(|file| file.reason.as_deref() != Some(&Refusal::NotPython.to_string())).collect();
    files.sort_by(|a, b| a.path.cmp(&b.path));
    processes.sort_by_key(|process| process.pid);
    (files, processes)
}

/// A running process: version and gate, or why it is refused. Nothing is written.
fn look(
    pid: Pid,
    file: &InterpreterFile,
    bias: u64,
    return_probes_fail: Option<&str>,
) -> Result<(String, String), Refusal> {
    let status = identity::Status::read(pid).map_err(|_| Refusal::Gone { pid })?;
    if status.shadow_stack {
        return Err(Refusal::ReturnProbes { why: "it has a shadow stack".into() });
    }
    if let (Some(why), Seccomp::Filter) = (return_probes_fail, status.seccomp) {
        return Err(Refusal::ReturnProbes { why: format!("it has a seccomp filter, and {why}") });
    }
    let memory = ProcessMemory::new(pid);
    let mut result = Err(Refusal::NotPython);
    // It runs while it is read.
    for _ in 0..5 {
        let cached = CachedMemory::new(&memory);
        result = Interpreter::verify(&cached, file, bias).and_then(|interpreter| {
            let gate = interpreter.gate(&cached, file)?;
            Ok((interpreter.version(), format!("{} before {}", gate.gate, gate.entry)))
        });
        if result.is_ok() {
            break;
        }
        std::thread::sleep(std::time::Duration::from_millis(2));
    }
    result
}

fn process(pid: Pid, interpreter: PathBuf, looked: Result<(String, String), Refusal>) -> Process {
    let words: Vec<_> =
        identity::cmdline(pid).unwrap_or_default().iter().map(|w| w.to_string_lossy().into_owned()).collect();
    let program = script_name(&words).unwrap_or_else(|| words.first().cloned().unwrap_or_default());
    let container = Container::of(pid).id;
    let (version, gate, refusal) = match looked {
        Ok((version, gate)) => (Some(version), Some(gate), None),
        Err(refusal) => (None, None, Some(refusal.to_string())),
    };
    let verdict = if refusal.is_none() { CAN } else { REFUSED };
    Process { pid: pid.0, program, interpreter, version, gate, container, verdict, reason: refusal }
}

fn describe(path: PathBuf, read: Result<&InterpreterFile, Refusal>) -> File {
    let mut file =
        File { path, version: None, build_id: None, gate: None, processes: 0, verdict: REFUSED, reason: None };
    match read {
        Err(refusal) => file.reason = Some(refusal.to_string()),
        Ok(read) => {
            file.version = match (read.hexversion(), read.candidates()) {
                (Some(hex), _) => Some(format!("{}.{}.{}", hex >> 24, hex >> 16 & 0xff, hex >> 8 & 0xff)),
                (None, [first, .., last]) => Some(format!("{} to {}", first.version, last.version)),
                _ => None,
            };
            let id = read.elf().build_id().iter().fold(String::new(), |mut id, byte| {
                let _ = write!(id, "{byte:02x}");
                id
            });
            file.build_id = Some(id).filter(|id| !id.is_empty());
            file.gate = read.gate_offset().map(|offset| offset.to_string());
            if file.gate.is_some() {
                file.verdict = CAN;
            } else {
                file.verdict = "depends on the process";
                file.reason =
                    Some("its file does not tell where _PyFunction_Vectorcall is; a running process does".into());
            }
        }
    }
    file
}

/// Interpreters in the places where programs are, and the libraries that they load.
fn installed() -> Vec<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut folders: Vec<PathBuf> = std::env::split_paths(&path).collect();
    folders.extend(
        ["/usr/bin", "/usr/local/bin", "/usr/lib/x86_64-linux-gnu", "/usr/lib64", "/usr/local/lib"].map(PathBuf::from),
    );
    let versions = std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".pyenv/versions"));
    for version in versions.and_then(|folder| std::fs::read_dir(folder).ok()).into_iter().flatten().flatten() {
        folders.extend([version.path().join("bin"), version.path().join("lib")]);
    }
    let mut found = BTreeSet::new();
    for entry in folders.iter().filter_map(|folder| std::fs::read_dir(folder).ok()).flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let numbers = |rest: &str| rest.chars().all(|c| c.is_ascii_digit() || c == '.' || c == 't' || c == 'd');
        let program = name.strip_prefix("python").is_some_and(numbers);
        let library = name.starts_with("libpython3.") && name.contains(".so");
        if (program || library)
            && let Ok(path) = entry.path().canonicalize()
        {
            found.insert(path);
        }
    }
    found.into_iter().collect()
}

impl fmt::Display for Diagnosis {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { works, checks, interpreters, processes } = self;
        writeln!(f, "Machine")?;
        for Check { name, level, found, fix } in checks {
            let mark = match level {
                Level::Ok => "ok     ",
                Level::Warning => "warning",
                Level::Problem => "PROBLEM",
            };
            writeln!(f, "  {mark}  {name}: {found}")?;
            if let Some(fix) = fix {
                writeln!(f, "           → {fix}")?;
            }
        }
        writeln!(f, "\nInterpreters")?;
        for file in interpreters {
            let version = file.version.as_deref().map_or_else(String::new, |version| format!("CPython {version}, "));
            writeln!(f, "  {}: {version}{}{}", file.path.display(), file.verdict, because(file.reason.as_deref()))?;
        }
        if interpreters.is_empty() {
            writeln!(f, "  none found")?;
        }
        writeln!(f, "\nPython processes")?;
        for process in processes {
            let version = process.version.as_deref().map_or_else(String::new, |version| format!("CPython {version}, "));
            writeln!(
                f,
                "  {} {}: {version}{}{}",
                process.pid,
                process.program,
                process.verdict,
                because(process.reason.as_deref())
            )?;
        }
        if processes.is_empty() {
            writeln!(f, "  none")?;
        }
        let verdict = if *works { "Tracing works on this machine." } else { "Tracing does not work on this machine." };
        writeln!(f, "\n{verdict}")
    }
}

fn because(reason: Option<&str>) -> String {
    reason.map_or_else(String::new, |reason| format!(": {reason}"))
}
