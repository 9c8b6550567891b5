//! The thread that answers waiting processes.

mod functions;
mod guarding;
mod meeting;
mod node;

use std::{
    collections::{HashMap, HashSet},
    ffi::OsStr,
    path::{Path, PathBuf},
    sync::{Arc, mpsc},
    time::{Duration, Instant},
};

use floe_ebpf::{FunctionKey, Urgent, module_wait, process_flags, urgent};

use self::functions::Scope;
use super::{
    News, Options, Report, Request, Verdict,
    files::{Files, Program},
    traced::{AddressSpaces, Traced},
};
use crate::{
    catalogue::Catalogue,
    kernel::{Kernel, KernelError, LinkId, UrgentReader, trial::Trial},
    process::{
        container, identity,
        launch::{Executable, Launch},
        run_id::{self, Words},
    },
    python::{
        exception,
        identify::{Interpreter, Refusal, locate},
        layout::PyLayout,
        memory::{CachedMemory, ProcessMemory},
        resolve::Resolver,
    },
    trace::ProcessFacts,
    units::{BootNanos, Epoch, Pid, Tid, UserAddr, boot_now},
};

/// Where importlib keeps the function that executes a module's source.
const LOADER: (&str, &str) = ("_frozen_importlib_external", "_LoaderBasics.exec_module");
/// The module whose import means that C stacks may be switched.
const GREENLET: &str = "greenlet";
/// The extension module in it.
const GREENLET_EXTENSION: &str = "greenlet._greenlet";
/// How long a started program is watched for its interpreter's library to be mapped.
const LIBRARY_PATIENCE: Duration = Duration::from_millis(500);
/// How long a program has for coming by `Py_RunMain` when its interpreter file was probed after its start.
const LATE_PATIENCE: Duration = Duration::from_millis(100);
/// An answer that comes this close to the end of the wait is taken for too late.
const MARGIN: u64 = 500_000;

/// The thread's state.
pub(super) struct Attacher {
    kernel: Kernel,
    catalogue: Arc<Catalogue>,
    trial: Trial,
    options: Options,
    news: mpsc::Sender<News>,
    files: Files,
    spaces: AddressSpaces,
    /// Programs whose interpreter's library is yet to be mapped.
    starting: Vec<(Pid, Instant)>,
    /// Programs that were running when their interpreter file was first probed: they may have passed `Py_RunMain`.
    late: Vec<(Pid, Epoch, Instant)>,
    /// Processes that are to be armed as soon as one of their threads holds the GIL.
    meetings: HashMap<Pid, Vec<LinkId>>,
    /// Processes that were met once more because the first time took too long.
    retried: HashSet<Pid>,
    /// Processes that are to be let go of as soon as they are met.
    leaving: HashSet<Pid>,
    /// All probes are taken away for now.
    paused: bool,
    /// They are to be put back as soon as that can be done; who is told then.
    resuming: Option<mpsc::Sender<()>>,
    /// How much load is shed, 0 to 3.
    shedding: u8,
    /// Packs whose version was reported, per process.
    reported: HashSet<(Pid, String)>,
    report: Report,
}

/// The wait of a thread.
#[derive(Clone, Copy)]
struct Wait {
    until: u64,
}

impl Wait {
    fn of(record: &Urgent) -> Self {
        Self { until: (record.token + record.bound).saturating_sub(MARGIN) }
    }

    /// Whether the thread still waits, so that its process may be written to.
    fn lasts(self) -> bool {
        boot_now().0 < self.until
    }
}

impl Attacher {
    pub(super) fn new(
        mut kernel: Kernel,
        catalogue: Arc<Catalogue>,
        trial: Trial,
        options: Options,
        news: mpsc::Sender<News>,
    ) -> Result<Self, KernelError> {
        let plans = catalogue.plans();
        kernel.set_plans(&plans.plans, &plans.keys)?;
        for (index, layout) in PyLayout::all().iter().enumerate() {
            kernel.set_layout(index as u32, layout.for_ebpf())?;
        }
        let versions = catalogue.packs().iter().filter_map(|pack| pack.versions.as_ref()).map(|v| v.module.as_str());
        for module in catalogue.modules().chain(versions) {
            kernel.set_module(module, module_wait::SHORT)?;
        }
        kernel.set_module(GREENLET, module_wait::LONG)?;
        Ok(Self {
            kernel,
            catalogue,
            trial,
            files: Files::new(options.keep_inlining),
            options,
            news,
            spaces: AddressSpaces::default(),
            starting: Vec::new(),
            late: Vec::new(),
            meetings: HashMap::new(),
            retried: HashSet::new(),
            leaving: HashSet::new(),
            paused: false,
            resuming: None,
            shedding: 0,
            reported: HashSet::new(),
            report: Report::default(),
        })
    }

    /// The thread's body.
    pub(super) fn run(&mut self, mut urgent: UrgentReader, inbox: &mpsc::Receiver<Request>) -> Report {
        make_urgent();
        if let Err(error) = self.watch_all() {
            tracing::error!("{error}");
        }
        loop {
            let pause = if self.starting.is_empty() { Duration::from_millis(10) } else { Duration::from_micros(200) };
            urgent.wait(pause);
            while let Some(record) = urgent.take() {
                match record {
                    Ok(record) => self.answer(&record),
                    Err(error) => tracing::error!("{error}"),
                }
            }
            self.look_for_libraries();
            self.look_for_latecomers();
            self.resume_if_due();
            loop {
                match inbox.try_recv() {
                    Ok(Request::Stop) | Err(mpsc::TryRecvError::Disconnected) => {
                        self.stop(&mut urgent);
                        return std::mem::take(&mut self.report);
                    }
                    Ok(Request::Pause(reply)) => {
                        let _ = reply.send(self.pause(&mut urgent));
                    }
                    Ok(request) => self.serve(request),
                    Err(mpsc::TryRecvError::Empty) => break,
                }
            }
        }
    }

    fn serve(&mut self, request: Request) {
        match request {
            Request::SelectChildrenOf(pid, reply) => {
                let _ = reply.send(self.kernel.select_children_of(pid));
            }
            Request::Attach(pid, reply) => {
                let _ = reply.send(self.attach(pid));
            }
            Request::Prepare(programs, reply) => {
                self.prepare(&programs, Path::new("/"));
                let _ = reply.send(());
            }
            Request::Ended(pid, epoch) => self.ended(pid, epoch),
            Request::Discovered(pid) => self.discovered(pid),
            Request::Examine(_) if self.paused => {}
            Request::Examine(pid) => {
                if let Err(error) = self.files.examine(&mut self.kernel, pid) {
                    tracing::debug!("{error}");
                }
            }
            Request::Selected(reply) => {
                let _ = reply.send(self.selected());
            }
            Request::Release(pid) => self.release(pid),
            Request::Resume(told) => self.resuming = self.paused.then_some(told),
            Request::Shed(level) => self.shed(level),
            Request::Snapshot(reply) => {
                let _ = reply.send(self.snapshot());
            }
            Request::Pause(_) | Request::Stop => {} // served by `run`
        }
    }

    /// Probes the interpreters among these programs of processes with this root.
    fn prepare(&mut self, programs: &[Executable], root: &Path) {
        for program in programs {
            if let Err(error) = self.files.examine_program(&mut self.kernel, &program.path, root) {
                tracing::warn!("{error}");
            }
        }
    }

    /// A selected process runs something that is not Python, such as a shell: probes the interpreters that it may start.
    fn foresee(&mut self, pid: Pid) {
        let (Ok(words), Ok(environ), Ok(folder)) =
            (identity::cmdline(pid), identity::Environ::read(pid), identity::cwd(pid))
        else {
            return;
        };
        let path = environ.get("PATH").unwrap_or_default();
        let root = PathBuf::from(format!("/proc/{pid}/root"));
        let launch = Launch { words: &words, path: OsStr::new(&path), folder: &folder, root: &root };
        self.prepare(&launch.executables(), &root);
    }

    /// A selected process has a new program: if that is one whose processes are spans, says so.
    fn executed(&self, pid: Pid, epoch: Epoch, time: BootNanos) {
        if self.options.programs.is_empty() {
            return;
        }
        // The name that it was called by may be that of a link: `sh` is `dash` on Debian.
        let called = || identity::cmdline(pid).ok()?.into_iter().next().map(PathBuf::from);
        let named = |path: PathBuf| path.file_name().is_some_and(|name| self.options.programs.is_match(name));
        if identity::exe(pid).is_ok_and(named) || called().is_some_and(named) {
            let facts = ProcessFacts { span_since: Some(time), ..self.facts(pid, epoch, None) };
            let _ = self.news.send(News::Process(Box::new(facts)));
        }
    }

    /// Does what a waiting thread waits for, and lets it go on.
    fn answer(&mut self, record: &Urgent) {
        let (pid, epoch, wait) = (Pid(record.tgid), Epoch(record.epoch), Wait::of(record));
        // Detaching waits for the threads that wait here, and attaching waits for detaching: so not before this one goes on.
        let mut done_with = Vec::new();
        match record.kind {
            urgent::EXEC => {
                if epoch != Epoch(0) {
                    self.executed(pid, epoch, BootNanos(record.token));
                }
                self.files.forget(|| self.spaces.iter_mut().map(|(_, traced)| traced.file).collect());
                match self.files.examine(&mut self.kernel, pid) {
                    Ok(Program::Launcher) => self.starting.push((pid, Instant::now())),
                    Ok(Program::NewInterpreter) => self.late.push((pid, epoch, Instant::now())),
                    // Of a process that is not selected what it starts is reported as well, and nobody asked for it.
                    Ok(Program::Other) if epoch != Epoch(0) => self.foresee(pid),
                    Ok(Program::Refused(refusal)) if epoch != Epoch(0) => self.refused(pid, &refusal),
                    Ok(Program::Other | Program::Refused(_) | Program::KnownInterpreter) => {}
                    Err(error) => tracing::warn!("{error}"),
                }
                return;
            }
            urgent::DECIDE => self.decide(pid, wait),
            urgent::RUN_MAIN => self.adopt(pid, epoch, wait),
            urgent::RENDEZVOUS => {
                done_with = self.meetings.remove(&pid).unwrap_or_default();
                if !self.leave(pid, epoch, wait) {
                    self.adopt(pid, epoch, wait);
                }
            }
            urgent::MODULE => self.imported(pid, epoch, record, wait),
            urgent::SWITCH => {
                self.switches(pid, epoch, "it switches C stacks (greenlet), which return probes do not survive");
            }
            urgent::RECURSION => self.recursion(pid, epoch, UserAddr(record.arg0), wait),
            urgent::STACK_CONFIG => self.stack_config(pid, epoch, record),
            urgent::EXCEPTION => self.exception(pid, epoch, record, wait),
            urgent::SCAN => self.arm_modules(pid, epoch, Scope::Implementations, wait),
            other => tracing::error!("an urgent record of unknown kind {other}"),
        }
        if record.token + record.bound < boot_now().0 {
            self.report.late_answers += 1;
        }
        let took = boot_now().0.saturating_sub(record.token) / 1000;
        self.report.slowest_answer_us = self.report.slowest_answer_us.max(took);
        self.report.answers.add(took);
        tracing::debug!("process {pid}: answered urgent record of kind {} after {took} µs", record.kind);
        self.kernel.acknowledge(Tid(record.tid), record.token);
        self.kernel.detach(done_with);
    }

    /// An exception leaves a call, or comes into it.
    fn exception(&mut self, pid: Pid, epoch: Epoch, record: &Urgent, wait: Wait) {
        let Some(info) = self.kernel.process(pid).filter(|info| info.epoch == epoch.0) else { return };
        let Some(traced) = self.spaces.of(pid, epoch, &info.ancestors) else { return };
        let cached = CachedMemory::new(&traced.memory);
        let heap = traced.interpreter.heap(&cached);
        let read = match record.arg1 {
            0 => exception::raised(&heap, traced.interpreter.kernel.tstate),
            arguments => exception::passed(&heap, UserAddr(arguments)),
        };
        match read {
            // What was read after the thread had gone on may not fit together.
            Ok(Some(exception)) if wait.lasts() => {
                let (tid, call) = (Tid(record.tid), BootNanos(record.arg0));
                let news = News::Exception { pid, epoch, tid, call, exception: Box::new(exception) };
                let _ = self.news.send(news);
            }
            Ok(_) => {}
            Err(error) => tracing::debug!("process {pid}: an exception was not read: {error}"),
        }
    }

    fn verdict(&mut self, pid: Pid, verdict: &'static str, python: Option<String>, reason: Option<String>) {
        match (verdict, &reason) {
            ("traced", _) => tracing::info!("process {pid}: traced, CPython {}", python.as_deref().unwrap_or("?")),
            (_, Some(reason)) => eprintln!("floe-agent: process {pid} is not traced: {reason}"),
            _ => {}
        }
        self.report.add(Verdict { pid: pid.0, verdict, python, reason });
    }

    /// Says that a process is refused.
    fn refused(&mut self, pid: Pid, refusal: &Refusal) {
        *self.report.refused.entry(refusal.kind()).or_default() += 1;
        self.verdict(pid, "refused", None, Some(refusal.to_string()));
    }

    /// Begins to trace a process of which one thread waits with the GIL held.
    fn adopt(&mut self, pid: Pid, epoch: Epoch, wait: Wait) {
        match self.try_adopt(pid, epoch, wait) {
            Ok(Some(version)) => self.verdict(pid, "traced", Some(version), None),
            Ok(None) => {}
            // Met before it came by `Py_RunMain`: it will.
            Err(refusal) if refusal.is_temporary() => tracing::debug!("process {pid}: {refusal}"),
            // It has gone on meanwhile, so what was read of it may not fit together: once more, where it waits again.
            Err(refusal) if !wait.lasts() && identity::is_alive(pid) && self.retried.insert(pid) => {
                tracing::debug!("process {pid}: {refusal}, too late");
                if let Ok(located) = locate(pid, &self.files.interpreters()) {
                    self.meet(pid, &located.file, located.bias);
                }
            }
            Err(refusal) => self.refused(pid, &refusal),
        }
    }

    /// Why processes in this state are left alone, whatever their interpreter.
    fn state_refusal(&self, pid: Pid) -> Option<Refusal> {
        let status = identity::Status::read(pid).ok()?;
        if status.shadow_stack {
            return Some(Refusal::ReturnProbes { why: "it has a shadow stack".into() });
        }
        match (&self.trial, status.seccomp) {
            (Trial::Fails(why), identity::Seccomp::Filter) => Some(Refusal::ReturnProbes {
                why: format!("it has a seccomp filter, and on this kernel return probes do not survive one: {why}"),
            }),
            _ => None,
        }
    }

    fn try_adopt(&mut self, pid: Pid, epoch: Epoch, wait: Wait) -> Result<Option<String>, Refusal> {
        let Some(mut info) = self.kernel.process(pid).filter(|info| info.epoch == epoch.0) else {
            return Ok(None); // it has called exec or ended
        };
        if info.flags & process_flags::SWITCHES_STACKS != 0 {
            return Ok(None);
        }
        if let Some(refusal) = self.state_refusal(pid) {
            return Err(refusal);
        }
        let memory = ProcessMemory::new(pid);
        let located = locate(pid, &self.files.interpreters())?;
        let kernel_error = |error: KernelError| Refusal::SelfCheckFailed { what: error.to_string() };
        let path = located.file.elf().path().to_path_buf();
        self.files.ensure(&mut self.kernel, &located.file, &path).map_err(kernel_error)?;
        let (interpreter, gate) = {
            let cached = CachedMemory::new(&memory);
            let interpreter = Interpreter::verify(&cached, &located.file, located.bias)?;
            let gate = interpreter.gate(&cached, &located.file)?;
            (interpreter, gate)
        };
        let known = self
            .files
            .get_mut(located.file.identity())
            .ok_or(Refusal::SelfCheckFailed { what: "its interpreter file changed while it was examined".into() })?;
        known.attach_gate(&mut self.kernel, &memory, &gate)?;
        if !wait.lasts() {
            self.meet(pid, &located.file, located.bias);
            return Ok(None);
        }

        let addresses = &interpreter.kernel;
        info.layout =
            PyLayout::all().iter().position(|layout| std::ptr::eq(layout, interpreter.layout)).unwrap_or_default()
                as u32;
        info.none = addresses.none.0;
        info.str_type = interpreter.types.str.0;
        info.float_type = addresses.float_type.0;
        info.bool_type = addresses.bool_type.0;
        info.member_type = interpreter.types.member_descriptor.0;
        info.tstate = addresses.tstate.0;
        info.flags |= process_flags::READY;
        self.kernel.set_process(pid, info).map_err(kernel_error)?;
        let version = interpreter.version();
        // Sent before the first function is armed, so that it arrives before the first event.
        let known = self.facts(pid, epoch, Some(version.clone()));
        let _ = self.news.send(News::Process(Box::new(known)));
        let file = located.file.identity();
        self.spaces.insert(
            epoch,
            Traced {
                pid,
                memory,
                interpreter,
                file,
                gate,
                armed: HashMap::new(),
                eval_frame: false,
                has_context_managers: false,
            },
        );
        self.arm_loader(pid, epoch)?;
        self.arm_modules(pid, epoch, Scope::All, wait);
        if wait.lasts() {
            self.set_eval_frame(pid, epoch);
        }
        Ok(Some(version))
    }

    /// What `/proc` tells of a process.
    fn facts(&self, pid: Pid, epoch: Epoch, python_version: Option<String>) -> ProcessFacts {
        let arguments = identity::cmdline(pid).unwrap_or_default();
        let environ = identity::Environ::read(pid).unwrap_or_default();
        let words = Words {
            arguments: &arguments,
            environ: &environ,
            pod_run: &|| self.options.select.as_ref()?.dagster_run(pid),
            read: &|path| identity::file(pid, path, MAX_CONTEXT_FILE).ok(),
        };
        let mut facts = ProcessFacts {
            parent_pid: identity::Stat::read(pid).ok().map(|stat| stat.parent),
            run: run_id::find(&self.options.run_sources, &words),
            command_line: arguments.iter().map(|word| word.to_string_lossy().into_owned()).collect(),
            executable: identity::exe(pid).ok().map(|path| path.to_string_lossy().into_owned()),
            python_version,
            container: container::id(pid),
            ..ProcessFacts::unknown(pid, epoch)
        };
        facts.read_environment(|name| environ.get(name));
        facts.attributes.extend(match &self.options.select {
            Some(select) => select.attributes(pid),
            None => container::attributes(pid),
        });
        facts
    }

    /// A process has ended: forgets its functions, unless a child that was forked from it lives.
    fn ended(&mut self, pid: Pid, epoch: Epoch) {
        self.retried.remove(&pid);
        self.leaving.remove(&pid);
        self.reported.retain(|(other, _)| *other != pid);
        let links = self.meetings.remove(&pid).unwrap_or_default();
        self.kernel.detach(links);
        self.kernel.cancel_rendezvous(pid);
        let inherited = self
            .kernel
            .process_ids()
            .into_iter()
            .filter_map(|other| self.kernel.process(other))
            .any(|info| info.ancestors.contains(&epoch.0));
        if inherited {
            return;
        }
        if let Some(traced) = self.spaces.remove(epoch) {
            for function in traced.armed.into_keys() {
                self.kernel.remove_function(FunctionKey { epoch: epoch.0, reserved: 0, function: function.0 });
            }
        }
    }
}

/// Whether a module is imported.
fn is_imported(modules: &Resolver<'_>, name: &str) -> bool {
    matches!(modules.module(name), Ok(Some(_)))
}

/// Most bytes of a Dagster Pipes context that are read from its file.
const MAX_CONTEXT_FILE: u64 = 4 << 20;

/// Gives this thread real-time priority where that is allowed: somebody waits for it.
fn make_urgent() {
    let parameters = libc::sched_param { sched_priority: 10 };
    // SAFETY: plain system call on the calling thread.
    if unsafe { libc::sched_setscheduler(0, libc::SCHED_FIFO, &raw const parameters) } != 0 {
        tracing::debug!("no real-time priority: {}", std::io::Error::last_os_error());
    }
}
