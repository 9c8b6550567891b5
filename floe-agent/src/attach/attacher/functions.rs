//! Which functions are armed in a process, and when.

use floe_ebpf::{FunctionInfo, FunctionKey, NO_PLAN, Urgent, function_flags, process_flags};

use super::{Attacher, GREENLET, LOADER, Wait, is_imported};
use crate::{
    catalogue::{Kind, Probe, plan::PlanRef},
    python::{
        identify::Refusal,
        memory::{CachedMemory, ProcessMemory},
        resolve::{FoundFunction, FunctionKind, ResolveError, Resolver},
    },
    units::{Epoch, Pid, ProbeId},
};

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

    /// Arms the probes of one module, or of all that are imported.
    pub(super) fn arm_modules(&mut self, pid: Pid, epoch: Epoch, module: Option<&str>, wait: Wait) {
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
                && is_imported(&modules, GREENLET)
                && !self.guard_greenlet(pid, epoch, &modules, wait)
            {
                return;
            }
            for (id, probe) in (0..).map(ProbeId).zip(catalogue.probes()) {
                let concerned = module.is_none_or(|name| probe.modules().any(|m| m == name));
                if !concerned
                    || self.is_for_another_version(probe, &modules)
                    || !probe.modules().all(|name| is_imported(&modules, name))
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
    pub(super) fn arm(&mut self, pid: Pid, epoch: Epoch, id: ProbeId, function: &FoundFunction) {
        let Some(traced) = self.spaces.get_mut(epoch) else { return };
        if traced.armed.get(&function.function).is_some_and(|known| known.code == function.code) {
            return;
        }
        let plans = &self.catalogue.plans().probes[id.0 as usize];
        let number = |plan: &Option<PlanRef>| plan.as_ref().map_or(NO_PLAN, |p| p.number);
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
    pub(super) fn is_for_another_version(&self, probe: &Probe, modules: &Resolver<'_>) -> bool {
        let Some(range) = &probe.versions else { return false };
        let versions =
            self.catalogue.packs().iter().find(|pack| pack.name == probe.pack).and_then(|p| p.versions.as_ref());
        versions
            .and_then(|v| modules.module_attribute_str(&v.module, &v.attribute).ok())
            .is_some_and(|version| range.contains(&version) == Some(false))
    }

    /// Says that a probe did not resolve.
    pub(super) fn unresolved(&mut self, pid: Pid, probe: &Probe, error: &ResolveError) {
        if self.reported.insert((pid, format!("{}:{}", probe.pack, probe.name))) {
            eprintln!("floe-agent: process {pid}: {} is not watched: {error}", probe.target);
        }
    }

    /// Says when a package has a version its pack was not verified with.
    pub(super) fn check_versions(&mut self, pid: Pid, modules: &Resolver<'_>, module: Option<&str>) {
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
    pub(super) fn imported(&mut self, pid: Pid, epoch: Epoch, record: &Urgent, wait: Wait) {
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
}
