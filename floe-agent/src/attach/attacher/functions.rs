//! Which functions are armed in a process, and when.

use floe_ebpf::{FunctionInfo, FunctionKey, NO_PLAN, Urgent, function_flags, process_flags};

use super::{Attacher, GREENLET, LOADER, Wait};
use crate::{
    attach::survey::{self, Finding, Survey},
    catalogue::{Kind, Probe, plan::PlanRef},
    python::{
        identify::Refusal,
        memory::{CachedMemory, ProcessMemory},
        resolve::{FoundFunction, ResolveError, Resolver},
    },
    units::{Epoch, Pid, ProbeId},
};

/// What there may be to arm.
#[derive(Clone, Copy)]
pub(super) enum Scope<'a> {
    /// Everything: a process is met.
    All,
    /// A module was imported: what is in it, and implementations that it brought.
    Module(&'a str),
    /// New implementations only.
    Implementations,
}

impl Scope<'_> {
    /// Whether the contents of a module are new.
    fn is_module(self, name: &str) -> bool {
        match self {
            Self::All => true,
            Self::Module(module) => module == name,
            Self::Implementations => false,
        }
    }

    fn concerns(self, probe: &Probe) -> bool {
        probe.implementations || probe.modules().any(|module| self.is_module(module))
    }
}

impl Attacher {
    /// Arms importlib's loader, through which modules announce themselves.
    pub(super) fn arm_loader(&mut self, pid: Pid, epoch: Epoch) -> Result<(), Refusal> {
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

    /// Arms the probes that `scope` concerns.
    pub(super) fn arm_modules(&mut self, pid: Pid, epoch: Epoch, scope: Scope<'_>, wait: Wait) {
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
            let survey = Survey::new(&catalogue, &modules);
            self.check_versions(pid, &survey, scope);
            if scope.is_module(GREENLET)
                && survey.is_imported(GREENLET)
                && !self.guard_greenlet(pid, epoch, &modules, wait)
            {
                return;
            }
            for (id, probe) in (0..).map(ProbeId).zip(catalogue.probes()) {
                if probe.kind != Kind::ContextExit && scope.concerns(probe) {
                    late |= !self.arm_probe(pid, epoch, id, &survey, scope, wait);
                }
            }
            // Every `with` of such a manager comes by there, so only where one of the catalogue's is.
            if self.spaces.get_mut(epoch).is_some_and(|traced| traced.has_context_managers) {
                for (id, probe) in (0..).map(ProbeId).zip(catalogue.probes()) {
                    if probe.kind == Kind::ContextExit {
                        late |= !self.arm_probe(pid, epoch, id, &survey, Scope::All, wait);
                    }
                }
            }
        }
        if late {
            self.meet_again(pid, epoch);
        }
    }

    /// Arms the functions of one probe; whether there was time for all of them.
    fn arm_probe(
        &mut self,
        pid: Pid,
        epoch: Epoch,
        id: ProbeId,
        survey: &Survey<'_, '_>,
        scope: Scope<'_>,
        wait: Wait,
    ) -> bool {
        let catalogue = self.catalogue.clone();
        let probe = &catalogue.probes()[id.0 as usize];
        let functions = match survey.find(probe) {
            Finding::Functions(functions) => functions,
            Finding::NotImported { .. } | Finding::OtherVersion { .. } => return true,
            Finding::Unresolved(error) => {
                // At any other time the module may be half imported.
                if probe.modules().any(|module| scope.is_module(module)) {
                    self.unresolved(pid, probe, &error);
                }
                return true;
            }
        };
        for function in functions {
            if !wait.lasts() {
                return false;
            }
            if survey::is_usable(probe, &function) {
                self.arm(pid, epoch, id, &function);
            } else if self.reported.insert((pid, format!("{}:{} {}", probe.pack, probe.name, function.function))) {
                let of_class = function.class.map(|class| format!(" (in {class})")).unwrap_or_default();
                eprintln!(
                    "floe-agent: process {pid}: {}{of_class} is a generator or coroutine: its calls return at once, so it \
                     gets no spans",
                    probe.target
                );
            }
        }
        true
    }

    /// Registers and arms one function.
    fn arm(&mut self, pid: Pid, epoch: Epoch, id: ProbeId, function: &FoundFunction) {
        let shed = self.shed_flag(id);
        let Some(traced) = self.spaces.get_mut(epoch) else { return };
        if traced.armed.get(&function.function).is_some_and(|known| known.code == function.code) {
            return;
        }
        let probe = &self.catalogue.probes()[id.0 as usize];
        let plans = &self.catalogue.plans().probes[id.0 as usize];
        let number = |plan: &Option<PlanRef>| plan.as_ref().map_or(NO_PLAN, |p| p.number);
        let key = FunctionKey { epoch: epoch.0, reserved: 0, function: function.function.0 };
        let info = FunctionInfo {
            code: function.code.0,
            probe: id.0,
            flags: probe.function_flags() | shed,
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
                traced.has_context_managers |= probe.kind == Kind::ContextManager;
                self.report.functions_armed += 1;
                tracing::debug!("process {pid}: armed {} for {}", function.qualname, probe.target);
            }
            Err(error) => {
                self.kernel.remove_function(key);
                eprintln!("floe-agent: process {pid}: {} is not watched: {error}", probe.target);
            }
        }
    }

    /// Says that a probe did not resolve.
    pub(super) fn unresolved(&mut self, pid: Pid, probe: &Probe, error: &ResolveError) {
        if self.reported.insert((pid, format!("{}:{}", probe.pack, probe.name))) {
            eprintln!("floe-agent: process {pid}: {} is not watched: {error}", probe.target);
        }
    }

    /// Says when a package has a version its pack was not verified with.
    fn check_versions(&mut self, pid: Pid, survey: &Survey<'_, '_>, scope: Scope<'_>) {
        let catalogue = self.catalogue.clone();
        for pack in catalogue.packs() {
            let Some(versions) = &pack.versions else { continue };
            if !scope.is_module(&versions.module) {
                continue;
            }
            let Some(found) = survey.version(pack) else { continue };
            if versions.supported.contains(&found) != Some(true) && self.reported.insert((pid, pack.name.clone())) {
                eprintln!(
                    "floe-agent: process {pid}: {} {found} is not a version that was tested ({}): spans may be missing",
                    versions.distribution, versions.supported
                );
            }
        }
    }

    /// A module of the catalogue was imported.
    pub(super) fn imported(&mut self, pid: Pid, epoch: Epoch, record: &Urgent, wait: Wait) {
        let end = record.name.iter().position(|&b| b == 0).unwrap_or(record.name.len());
        let name = String::from_utf8_lossy(&record.name[..end]).into_owned();
        tracing::debug!("process {pid}: imported {name:?}");
        // arg1: a module was imported too deep to be announced itself.
        let scope = if !name.is_empty() && record.arg1 == 0 { Scope::Module(&name) } else { Scope::All };
        if wait.lasts() {
            self.arm_modules(pid, epoch, scope, wait);
        } else {
            self.meet_again(pid, epoch);
        }
    }
}
