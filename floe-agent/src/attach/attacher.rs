//! The thread that answers waiting processes.

use std::{
    collections::{HashMap, HashSet},
    path::Path,
    sync::{Arc, mpsc},
    time::{Duration, Instant},
};

use floe_ebpf::{
    FunctionInfo, FunctionKey, MAX_ANCESTORS, NO_PLAN, ProcessInfo, Urgent, function_flags, process_flags, urgent,
};

use super::{
    AttachError, Attached, News, Options, Report, Request, Verdict,
    files::{Files, Program},
    guards::{GREENLET_API_SWITCHES, Guards},
    traced::{AddressSpaces, Traced},
};
use crate::{
    catalogue::{Catalogue, Kind, Probe},
    kernel::{Kernel, KernelError, LinkId, Site, UrgentReader, trial::Trial},
    process::{
        identity,
        run_id::{self, RunSources},
    },
    python::{
        identify::{Interpreter, InterpreterFile, Refusal, locate},
        layout::PyLayout,
        memory::{CachedMemory, Memory as _, ProcessMemory},
        resolve::{FoundFunction, FunctionKind, ResolveError, Resolver},
    },
    trace::ProcessFacts,
    units::{Epoch, Pid, ProbeId, Tid, UserAddr, boot_now},
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
/// Threads of a process to which the meeting point is attached.
const MEETING_THREADS: usize = 64;
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
    guards: Guards,
    spaces: AddressSpaces,
    /// Programs whose interpreter's library is yet to be mapped.
    starting: Vec<(Pid, Instant)>,
    /// Programs that were running when their interpreter file was first probed: they may have passed `Py_RunMain`.
    late: Vec<(Pid, Epoch, Instant)>,
    /// Processes that are to be armed as soon as one of their threads holds the GIL.
    meetings: HashMap<Pid, Vec<LinkId>>,
    /// Processes that were met once more because the first time took too long.
    retried: HashSet<Pid>,
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
        for module in catalogue.modules().chain(versions).chain([GREENLET]) {
            kernel.set_module(module)?;
        }
        Ok(Self {
            kernel,
            catalogue,
            trial,
            options,
            news,
            files: Files::default(),
            guards: Guards::default(),
            spaces: AddressSpaces::default(),
            starting: Vec::new(),
            late: Vec::new(),
            meetings: HashMap::new(),
            retried: HashSet::new(),
            reported: HashSet::new(),
            report: Report::default(),
        })
    }

    /// The thread's body.
    pub(super) fn run(&mut self, mut urgent: UrgentReader, inbox: &mpsc::Receiver<Request>) -> Report {
        make_urgent();
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
            loop {
                match inbox.try_recv() {
                    Ok(Request::Stop) | Err(mpsc::TryRecvError::Disconnected) => {
                        self.stop(&mut urgent);
                        return std::mem::take(&mut self.report);
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
            Request::Prepare(program, reply) => {
                if let Err(error) = self.files.examine_program(&mut self.kernel, &program, &program, Path::new("/")) {
                    tracing::warn!("{error}");
                }
                let _ = reply.send(());
            }
            Request::Ended(pid, epoch) => self.ended(pid, epoch),
            Request::Stop => {}
        }
    }

    /// Does what a waiting thread waits for, and lets it go on.
    fn answer(&mut self, record: &Urgent) {
        let (pid, epoch, wait) = (Pid(record.tgid), Epoch(record.epoch), Wait::of(record));
        match record.kind {
            urgent::EXEC => {
                match self.files.examine(&mut self.kernel, pid) {
                    Ok(Program::Launcher) => self.starting.push((pid, Instant::now())),
                    Ok(Program::NewInterpreter) => self.late.push((pid, epoch, Instant::now())),
                    Ok(Program::KnownInterpreter | Program::Other) => {}
                    Err(error) => tracing::warn!("{error}"),
                }
                return;
            }
            urgent::RUN_MAIN => self.adopt(pid, epoch, wait),
            urgent::RENDEZVOUS => {
                let links = self.meetings.remove(&pid).unwrap_or_default();
                self.kernel.detach(links);
                self.adopt(pid, epoch, wait);
            }
            urgent::MODULE => self.imported(pid, epoch, record, wait),
            urgent::SWITCH => {
                self.switches(pid, epoch, "it switches C stacks (greenlet), which return probes do not survive");
            }
            urgent::RECURSION => self.recursion(pid, epoch, UserAddr(record.arg0), wait),
            urgent::STACK_CONFIG => self.stack_config(pid, epoch, record),
            urgent::SCAN => self.arm_modules(pid, epoch, None, wait),
            other => tracing::error!("an urgent record of unknown kind {other}"),
        }
        if record.token + record.bound < boot_now().0 {
            self.report.late_answers += 1;
        }
        let took = boot_now().0.saturating_sub(record.token) / 1000;
        self.report.slowest_answer_us = self.report.slowest_answer_us.max(took);
        tracing::debug!("process {pid}: answered urgent record of kind {} after {took} µs", record.kind);
        self.kernel.acknowledge(Tid(record.tid), record.token);
    }

    fn verdict(&mut self, pid: Pid, verdict: &'static str, python: Option<String>, reason: Option<String>) {
        match (verdict, &reason) {
            ("traced", _) => tracing::info!("process {pid}: traced, CPython {}", python.as_deref().unwrap_or("?")),
            (_, Some(reason)) => eprintln!("floe-agent: process {pid} is not traced: {reason}"),
            _ => {}
        }
        self.report.processes.push(Verdict { pid: pid.0, verdict, python, reason });
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
            Err(refusal) => self.verdict(pid, "refused", None, Some(refusal.to_string())),
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
        let _ = self.news.send(News::Process(Box::new(facts(pid, epoch, &version, &self.options.run_sources))));
        let file = located.file.identity();
        self.spaces
            .insert(epoch, Traced { pid, memory, interpreter, file, gate, armed: HashMap::new(), eval_frame: false });
        self.arm_loader(pid, epoch)?;
        self.arm_modules(pid, epoch, None, wait);
        if wait.lasts() {
            self.set_eval_frame(pid, epoch);
        }
        Ok(Some(version))
    }

    /// Arms importlib's loader, through which modules announce themselves.
    fn arm_loader(&mut self, pid: Pid, epoch: Epoch) -> Result<(), Refusal> {
        let failed = |what: String| Refusal::SelfCheckFailed { what };
        let Some(traced) = self.spaces.get_mut(epoch) else { return Ok(()) };
        let memory = ProcessMemory::new(pid);
        let cached = CachedMemory::new(&memory);
        let known = traced.interpreter.clone();
        let heap = known.heap(&cached);
        for interpreter in known.interpreters_now(&cached)? {
            let modules = traced.interpreter.modules(&cached, interpreter).map_err(|e| failed(e.to_string()))?;
            let found = Resolver::new(heap, modules)
                .resolve(LOADER.0, LOADER.1, &[])
                .map_err(|error| failed(format!("importlib's loader was not found: {error}")))?;
            for function in found {
                let key = FunctionKey { epoch: epoch.0, reserved: 0, function: function.function.0 };
                let info = FunctionInfo {
                    code: function.code.0,
                    probe: u32::MAX,
                    flags: function_flags::LOADER,
                    enter_plan: NO_PLAN,
                    exit_plan: NO_PLAN,
                };
                self.kernel.set_function(key, info).map_err(|e| failed(e.to_string()))?;
                traced.arm(&function).map_err(|e| failed(e.to_string()))?;
            }
        }
        Ok(())
    }

    /// Arms the probes of one module, or of all that are imported.
    fn arm_modules(&mut self, pid: Pid, epoch: Epoch, module: Option<&str>, wait: Wait) {
        let catalogue = self.catalogue.clone();
        let Some(info) = self.kernel.process(pid).filter(|info| info.epoch == epoch.0) else { return };
        if info.flags & process_flags::SWITCHES_STACKS != 0 {
            return;
        }
        let memory = ProcessMemory::new(pid);
        let cached = CachedMemory::new(&memory);
        let Some(traced) = self.spaces.of(pid, epoch, &info.ancestors) else { return };
        let interpreter = traced.interpreter.clone();
        let heap = interpreter.heap(&cached);
        let states = match interpreter.interpreters_now(&cached) {
            Ok(states) => states,
            Err(refusal) => {
                tracing::warn!("process {pid}: {refusal}");
                return;
            }
        };
        let mut late = false;
        for state in states {
            let modules = match interpreter.modules(&cached, state) {
                Ok(modules) => Resolver::new(heap, modules),
                Err(error) => {
                    tracing::warn!("process {pid}: sys.modules cannot be read: {error}");
                    continue;
                }
            };
            self.check_versions(pid, &modules, module);
            if module.is_none_or(|name| name == GREENLET)
                && imported(&modules, GREENLET)
                && !self.guard_greenlet(pid, epoch, &modules, wait)
            {
                return;
            }
            for (id, probe) in (0..).map(ProbeId).zip(catalogue.probes()) {
                let concerned = module.is_none_or(|name| probe.modules().any(|m| m == name));
                if !concerned
                    || self.is_for_another_version(probe, &modules)
                    || !probe.modules().all(|name| imported(&modules, name))
                {
                    continue;
                }
                let found_in: Vec<_> = probe.found_in.iter().map(String::as_str).collect();
                match modules.resolve(&probe.target.module, &probe.target.qualname, &found_in) {
                    Ok(found) => {
                        for function in found {
                            if !wait.lasts() {
                                late = true;
                                break;
                            }
                            if function.kind != FunctionKind::Plain && probe.kind == Kind::Call {
                                if !self.reported.insert((pid, format!("{}:{}", probe.pack, probe.name))) {
                                    continue;
                                }
                                eprintln!(
                                    "floe-agent: process {pid}: {} is a generator or coroutine: its calls return at once, \
                                     so it gets no spans",
                                    probe.target
                                );
                                continue;
                            }
                            self.arm(pid, epoch, id, &function);
                        }
                    }
                    Err(error) => self.unresolved(pid, probe, &error),
                }
            }
        }
        if late {
            self.meet_again(pid, epoch);
        }
    }

    /// Registers and arms one function.
    fn arm(&mut self, pid: Pid, epoch: Epoch, id: ProbeId, function: &FoundFunction) {
        let Some(traced) = self.spaces.get_mut(epoch) else { return };
        if traced.armed.get(&function.function).is_some_and(|known| known.code == function.code) {
            return;
        }
        let plans = &self.catalogue.plans().probes[id.0 as usize];
        let number = |plan: &Option<crate::catalogue::plan::PlanRef>| plan.as_ref().map_or(NO_PLAN, |p| p.number);
        let key = FunctionKey { epoch: epoch.0, reserved: 0, function: function.function.0 };
        let info = FunctionInfo {
            code: function.code.0,
            probe: id.0,
            flags: 0,
            enter_plan: number(&plans.enter),
            exit_plan: number(&plans.exit),
        };
        // The table first: a call that comes right after the write is known.
        if let Err(error) = self.kernel.set_function(key, info) {
            tracing::warn!("process {pid}: {error}");
            return;
        }
        match traced.arm(function) {
            Ok(()) => {
                self.report.functions_armed += 1;
                tracing::debug!("process {pid}: armed {}", self.catalogue.probes()[id.0 as usize].target);
            }
            Err(error) => {
                self.kernel.remove_function(key);
                eprintln!(
                    "floe-agent: process {pid}: {} is not watched: {error}",
                    self.catalogue.probes()[id.0 as usize].target
                );
            }
        }
    }

    /// Whether a probe is not for the version that its pack's distribution has here.
    fn is_for_another_version(&self, probe: &Probe, modules: &Resolver<'_>) -> bool {
        let Some(range) = &probe.versions else { return false };
        let versions =
            self.catalogue.packs().iter().find(|pack| pack.name == probe.pack).and_then(|p| p.versions.as_ref());
        versions
            .and_then(|v| modules.module_attribute_str(&v.module, &v.attribute).ok())
            .is_some_and(|version| range.contains(&version) == Some(false))
    }

    /// Says that a probe did not resolve.
    fn unresolved(&mut self, pid: Pid, probe: &Probe, error: &ResolveError) {
        if self.reported.insert((pid, format!("{}:{}", probe.pack, probe.name))) {
            eprintln!("floe-agent: process {pid}: {} is not watched: {error}", probe.target);
        }
    }

    /// Says when a package has a version its pack was not verified with.
    fn check_versions(&mut self, pid: Pid, modules: &Resolver<'_>, module: Option<&str>) {
        let catalogue = self.catalogue.clone();
        for pack in catalogue.packs() {
            let Some(versions) = &pack.versions else { continue };
            if module.is_some_and(|name| name != versions.module) {
                continue;
            }
            let Ok(found) = modules.module_attribute_str(&versions.module, &versions.attribute) else { continue };
            if versions.supported.contains(&found) != Some(true) && self.reported.insert((pid, pack.name.clone())) {
                eprintln!(
                    "floe-agent: process {pid}: {} {found} is not a version that was tested ({}): spans may be missing",
                    versions.distribution, versions.supported
                );
            }
        }
    }

    /// A module of the catalogue was imported.
    fn imported(&mut self, pid: Pid, epoch: Epoch, record: &Urgent, wait: Wait) {
        let end = record.name.iter().position(|&b| b == 0).unwrap_or(record.name.len());
        let name = String::from_utf8_lossy(&record.name[..end]).into_owned();
        tracing::debug!("process {pid}: imported {name:?}");
        // arg1: a module was imported too deep to be announced itself.
        let module = (!name.is_empty() && record.arg1 == 0).then_some(name.as_str());
        if wait.lasts() {
            self.arm_modules(pid, epoch, module, wait);
        } else {
            self.meet_again(pid, epoch);
        }
    }

    /// Watches the functions by which greenlet switches stacks. Where that fails, the process is left alone; whether it
    /// is not.
    fn guard_greenlet(&mut self, pid: Pid, epoch: Epoch, modules: &Resolver<'_>, wait: Wait) -> bool {
        let mut functions = Vec::new();
        for method in ["switch", "throw"] {
            match modules.find_method_def(GREENLET_EXTENSION, &format!("greenlet.{method}")) {
                Ok(found) => functions.push(found.function),
                Err(error) => tracing::debug!("process {pid}: greenlet.{method}: {error}"),
            }
        }
        let complete = functions.len() == 2;
        if let Ok(table) = modules.capsule_pointer(GREENLET_EXTENSION, "_C_API") {
            let memory = ProcessMemory::new(pid);
            let entries = GREENLET_API_SWITCHES.map(|index| memory.read_ptr(table.offset(index * 8)));
            functions.extend(entries.into_iter().flatten().filter(|address| !address.is_null()));
        }
        // Attaching can take longer than the thread waits, and a switch that nobody watches must find nothing armed.
        let armed: Vec<_> =
            self.spaces.get_mut(epoch).map(|traced| traced.armed.values().cloned().collect()).unwrap_or_default();
        if let Some(traced) = self.spaces.get_mut(epoch) {
            traced.disarm_all();
        }
        let attached = functions
            .iter()
            .map(|&function| self.guards.attach(&mut self.kernel, pid, Site::StackSwitch, function))
            .collect::<Result<Vec<_>, _>>();
        if !complete || attached.is_err() {
            let why = attached.err().map_or_else(|| "its functions were not found".into(), |e| e.to_string());
            self.switches(pid, epoch, &format!("it has greenlet, whose stack switches cannot be watched: {why}"));
            return false;
        }
        if !wait.lasts() {
            self.meet_again(pid, epoch);
            return false;
        }
        if let Some(traced) = self.spaces.get_mut(epoch) {
            for function in &armed {
                if let Err(error) = traced.arm(function) {
                    tracing::debug!("process {pid}: {error}");
                }
            }
        }
        true
    }

    /// The process is about to switch C stacks: nothing may be armed then.
    fn switches(&mut self, pid: Pid, epoch: Epoch, why: &str) {
        let Some(mut info) = self.kernel.process(pid).filter(|info| info.epoch == epoch.0) else { return };
        let mut python = None;
        if let Some(traced) = self.spaces.of(pid, epoch, &info.ancestors) {
            python = Some(traced.interpreter.version());
            let functions = traced.disarm_all();
            traced.clear_eval_frame();
            for function in functions {
                self.forget(epoch, function);
            }
        }
        info.flags = (info.flags | process_flags::SWITCHES_STACKS) & !process_flags::GUARD_STACK;
        if let Err(error) = self.kernel.set_process(pid, info) {
            tracing::error!("{error}");
        }
        eprintln!("floe-agent: process {pid}: tracing stops here: {why}");
        self.report.processes.push(Verdict { pid: pid.0, verdict: "stopped", python, reason: Some(why.into()) });
    }

    /// Makes the programs ignore a function in this address space, also if it was armed in an ancestor's.
    fn forget(&mut self, epoch: Epoch, function: UserAddr) {
        let key = FunctionKey { epoch: epoch.0, reserved: 0, function: function.0 };
        let info = FunctionInfo {
            code: 0,
            probe: 0,
            flags: function_flags::DISARMED,
            enter_plan: NO_PLAN,
            exit_plan: NO_PLAN,
        };
        if let Err(error) = self.kernel.set_function(key, info) {
            tracing::warn!("{error}");
        }
    }

    /// A function is nested too deep.
    fn recursion(&mut self, pid: Pid, epoch: Epoch, function: UserAddr, wait: Wait) {
        let Some(info) = self.kernel.process(pid) else { return };
        let Some(traced) = self.spaces.of(pid, epoch, &info.ancestors) else { return };
        // The programs ignore it from now on in any case.
        let disarmed = wait.lasts() && traced.disarm(function);
        self.forget(epoch, function);
        if disarmed {
            self.report.functions_disarmed += 1;
            eprintln!(
                "floe-agent: process {pid}: a watched function calls itself more than {} deep: it is no longer watched there",
                floe_ebpf::MAX_DEPTH
            );
        }
    }

    /// 3.11: turns inlining off where that is safe.
    fn set_eval_frame(&mut self, pid: Pid, epoch: Epoch) {
        if self.options.keep_inlining {
            return;
        }
        let Some(traced) = self.spaces.get_mut(epoch) else { return };
        if !traced.interpreter.layout.inlines_past_vectorcall {
            return;
        }
        if let Some(why) = traced.stack_too_small(None) {
            eprintln!("floe-agent: process {pid}: calls from Python to Python are not seen: {why}");
            return;
        }
        let memory = ProcessMemory::new(pid);
        let cached = CachedMemory::new(&memory);
        let interpreter = traced.interpreter.clone();
        let Ok(modules) = interpreter.modules(&cached, interpreter.main) else { return };
        let modules = Resolver::new(interpreter.heap(&cached), modules);
        let guards = [("sys", "setrecursionlimit"), ("_thread", "stack_size")];
        for (module, name) in guards {
            let guarded = modules.find_method_def(module, name).map_err(|error| error.to_string()).and_then(|found| {
                self.guards
                    .attach(&mut self.kernel, pid, Site::StackConfig, found.function)
                    .map_err(|error| error.to_string())
            });
            if let Err(error) = guarded {
                eprintln!(
                    "floe-agent: process {pid}: calls from Python to Python are not seen: {module}.{name} cannot be \
                     watched: {error}"
                );
                return;
            }
        }
        let Some(mut info) = self.kernel.process(pid) else { return };
        info.flags |= process_flags::GUARD_STACK;
        if let Err(error) = self.kernel.set_process(pid, info) {
            tracing::error!("{error}");
            return;
        }
        if let Err(error) = traced.set_eval_frame() {
            eprintln!("floe-agent: process {pid}: calls from Python to Python are not seen: {error}");
        }
    }

    /// The process is about to change its recursion limit or the size of new stacks.
    fn stack_config(&mut self, pid: Pid, epoch: Epoch, record: &Urgent) {
        let Some(info) = self.kernel.process(pid) else { return };
        let Some(traced) = self.spaces.of(pid, epoch, &info.ancestors) else { return };
        let cached = CachedMemory::new(&traced.memory);
        let heap = traced.interpreter.heap(&cached);
        let argument = UserAddr(record.arg0);
        // setrecursionlimit gets its argument as it is (METH_O), stack_size as a tuple.
        let value = heap
            .int(argument)
            .or_else(|_| heap.tuple(argument).and_then(|items| items.first().map_or(Ok(0), |&item| heap.int(item))));
        let value = value.unwrap_or(i64::MAX);
        if let Some(why) = traced.stack_too_small(Some(value)) {
            if traced.eval_frame {
                eprintln!("floe-agent: process {pid}: calls from Python to Python are not seen from here on: {why}");
            }
            traced.clear_eval_frame();
        }
    }

    /// Programs whose interpreter is in a library: attach as soon as it is mapped.
    fn look_for_libraries(&mut self) {
        let starting = std::mem::take(&mut self.starting);
        for (pid, since) in starting {
            match locate(pid, &self.files.interpreters()) {
                Ok(located) => {
                    let path = located.file.elf().path().to_path_buf();
                    match self.files.ensure(&mut self.kernel, &located.file, &path) {
                        Ok(true) => {
                            if let Some(info) = self.kernel.process(pid) {
                                self.late.push((pid, Epoch(info.epoch), Instant::now()));
                            }
                        }
                        Ok(false) => {}
                        Err(error) => tracing::warn!("{error}"),
                    }
                }
                // Its library is not mapped yet.
                Err(refusal)
                    if (refusal.is_temporary() || refusal == Refusal::NotPython)
                        && since.elapsed() < LIBRARY_PATIENCE =>
                {
                    self.starting.push((pid, since));
                }
                Err(refusal) => {
                    if since.elapsed() < LIBRARY_PATIENCE && identity::is_alive(pid) {
                        self.verdict(pid, "refused", None, Some(refusal.to_string()));
                    }
                }
            }
        }
    }

    /// Programs that started while their interpreter file was not probed yet: those that did not come by `Py_RunMain` are
    /// met where they are.
    fn look_for_latecomers(&mut self) {
        let mut due = Vec::new();
        self.late.retain(|&(pid, epoch, since)| {
            let waiting = since.elapsed() < LATE_PATIENCE;
            if !waiting {
                due.push((pid, epoch));
            }
            waiting
        });
        for (pid, epoch) in due {
            let missed = self
                .kernel
                .process(pid)
                .is_some_and(|info| info.epoch == epoch.0 && info.flags & process_flags::READY == 0);
            if missed && let Ok(located) = locate(pid, &self.files.interpreters()) {
                tracing::info!(
                    "process {pid} was faster than its interpreter could be probed: it is traced from now on"
                );
                self.meet(pid, &located.file, located.bias);
            }
        }
    }

    /// Attaches to a running process and to its descendants.
    fn attach(&mut self, pid: Pid) -> Result<Attached, AttachError> {
        if !identity::is_alive(pid) {
            return Err(AttachError::NoProcess(pid));
        }
        let version = self.attach_one(pid)?;
        for child in identity::descendants(pid).unwrap_or_default() {
            // Not every descendant is a Python process.
            if let Err(error) = self.attach_one(child) {
                tracing::info!("{error}");
                let _ = self.track(child);
            }
        }
        Ok(Attached { python_version: version })
    }

    /// Makes the programs follow a process.
    fn track(&mut self, pid: Pid) -> Result<(), KernelError> {
        if self.kernel.process(pid).is_some() {
            return Ok(());
        }
        let epoch = self.kernel.new_epoch()?;
        self.kernel.set_process(
            pid,
            ProcessInfo {
                epoch,
                flags: process_flags::SELECTED,
                ancestors: [0; MAX_ANCESTORS],
                layout: 0,
                reserved: 0,
                none: 0,
                str_type: 0,
                float_type: 0,
                bool_type: 0,
                member_type: 0,
                tstate: 0,
                since: boot_now().0,
            },
        )
    }

    fn attach_one(&mut self, pid: Pid) -> Result<String, AttachError> {
        let refused = |refusal| AttachError::Refused { pid, refusal };
        let kernel = |source| AttachError::Kernel { pid, source };
        if let Some(refusal) = self.state_refusal(pid) {
            return Err(refused(refusal));
        }
        let memory = ProcessMemory::new(pid);
        let located = locate(pid, &self.files.interpreters()).map_err(refused)?;
        // The process runs while it is read, so what is read may not fit together at the first try. Nothing is written
        // now; when it waits, everything is checked again.
        let mut checked = Interpreter::verify(&memory, &located.file, located.bias);
        for _ in 0..5 {
            if checked.is_ok() {
                break;
            }
            std::thread::sleep(Duration::from_millis(2));
            checked = Interpreter::verify(&memory, &located.file, located.bias);
        }
        let interpreter = checked.map_err(refused)?;
        interpreter.gate(&memory, &located.file).map_err(refused)?;
        let path = located.file.elf().path().to_path_buf();
        self.files.ensure(&mut self.kernel, &located.file, &path).map_err(kernel)?;
        self.track(pid).map_err(kernel)?;
        self.meet(pid, &located.file, located.bias);
        Ok(interpreter.version())
    }

    /// Arranges to arm a process as soon as one of its threads holds the GIL: functions that are only called then are
    /// probed, in each thread there is, until the first of them is called.
    fn meet(&mut self, pid: Pid, file: &InterpreterFile, bias: u64) {
        if self.meetings.contains_key(&pid) {
            return;
        }
        let Some(known) = self.files.get_mut(file.identity()) else { return };
        let path = known.path();
        let points = file.meeting_points(&ProcessMemory::new(pid), bias);
        let mut links = Vec::new();
        for tid in identity::threads(pid).unwrap_or_default().into_iter().take(MEETING_THREADS) {
            let points = points.iter().map(|&offset| (Site::Rendezvous, offset));
            let waiting = file.takes_gil().map(|offset| (Site::RendezvousReturn, offset));
            for (site, offset) in points.chain(waiting) {
                match self.kernel.attach(site, &path, offset, Some(tid)) {
                    Ok(link) => links.push(link),
                    Err(error) => tracing::debug!("{error}"),
                }
            }
        }
        if links.is_empty() {
            self.verdict(pid, "refused", None, Some("no function could be probed to meet its threads at".into()));
            return;
        }
        if let Err(error) = self.kernel.ask_for_rendezvous(pid) {
            tracing::warn!("{error}");
        }
        self.meetings.insert(pid, links);
    }

    /// As `meet`, for a process that is traced already and could not be written to in time.
    fn meet_again(&mut self, pid: Pid, epoch: Epoch) {
        self.report.late_answers += 1;
        let Some(traced) = self.spaces.get_mut(epoch) else { return };
        let (file, bias) = (traced.file, traced.interpreter.bias);
        if let Some(file) = self.files.interpreters().into_iter().find(|known| known.identity() == file) {
            self.meet(pid, &file, bias);
        }
    }

    /// A process has ended: forgets its functions, unless a child that was forked from it lives.
    fn ended(&mut self, pid: Pid, epoch: Epoch) {
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

    /// Disarms what is still armed, as far as processes can be met; what stays armed runs on correctly.
    fn stop(&mut self, urgent: &mut UrgentReader) {
        let living: Vec<_> = self
            .spaces
            .iter_mut()
            .filter(|(_, traced)| !traced.armed.is_empty() && identity::is_alive(traced.pid))
            .map(|(epoch, traced)| (traced.pid, epoch))
            .collect();
        for &(pid, epoch) in &living {
            let Some(traced) = self.spaces.get_mut(epoch) else { continue };
            let (file, bias) = (traced.file, traced.interpreter.bias);
            if let Some(file) = self.files.interpreters().into_iter().find(|known| known.identity() == file) {
                self.meet(pid, &file, bias);
            }
        }
        let until = Instant::now() + Duration::from_millis(if living.is_empty() { 0 } else { 300 });
        let mut left: HashSet<Pid> = living.iter().map(|&(pid, _)| pid).collect();
        while !left.is_empty() && Instant::now() < until {
            urgent.wait(Duration::from_millis(10));
            while let Some(Ok(record)) = urgent.take() {
                let pid = Pid(record.tgid);
                if record.kind == urgent::RENDEZVOUS
                    && Wait::of(&record).lasts()
                    && let Some(traced) = self.spaces.get_mut(Epoch(record.epoch))
                {
                    traced.disarm_all();
                    traced.clear_eval_frame();
                    left.remove(&pid);
                    self.kernel.acknowledge(Tid(record.tid), record.token);
                } else {
                    self.answer(&record);
                }
            }
        }
    }
}

/// Whether a module is imported.
fn imported(modules: &Resolver<'_>, name: &str) -> bool {
    matches!(modules.module(name), Ok(Some(_)))
}

/// Most bytes of a Dagster Pipes context that are read from its file.
const MAX_CONTEXT_FILE: u64 = 4 << 20;

/// What `/proc` tells of a process.
fn facts(pid: Pid, epoch: Epoch, version: &str, sources: &RunSources) -> ProcessFacts {
    let arguments = identity::cmdline(pid).unwrap_or_default();
    let environ = identity::Environ::read(pid).unwrap_or_default();
    ProcessFacts {
        parent_pid: identity::Stat::read(pid).ok().map(|stat| stat.parent),
        run: run_id::find(sources, &arguments, &environ, |path| identity::file(pid, path, MAX_CONTEXT_FILE).ok()),
        command_line: arguments.iter().map(|word| word.to_string_lossy().into_owned()).collect(),
        executable: identity::exe(pid).ok().map(|path| path.to_string_lossy().into_owned()),
        python_version: Some(version.to_owned()),
        ..ProcessFacts::unknown(pid, epoch)
    }
}

/// Gives this thread real-time priority where that is allowed: somebody waits for it.
fn make_urgent() {
    let parameters = libc::sched_param { sched_priority: 10 };
    // SAFETY: plain system call on the calling thread.
    if unsafe { libc::sched_setscheduler(0, libc::SCHED_FIFO, &raw const parameters) } != 0 {
        tracing::debug!("no real-time priority: {}", std::io::Error::last_os_error());
    }
}
