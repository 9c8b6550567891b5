//! Tracing a whole node: processes are judged as they start or are found, let go of when no rule selects them any more, and
//! all of it can be stopped and begun again.

use std::time::{Duration, Instant};

use floe_ebpf::{FunctionKey, function_flags, process_flags, setting};

use super::{Attacher, Wait};
use crate::{
    attach::{AttachError, Judgement, News, Snapshot},
    catalogue::{Kind, Probe, Role},
    kernel::{KernelError, UrgentReader},
    process::identity,
    python::identify::locate,
    units::{Epoch, Pid, ProbeId},
};

/// How long the probes have for being detached before the pause counts as made.
const DETACH_PATIENCE: Duration = Duration::from_millis(600);

impl Attacher {
    /// Begins: from now on every exec is reported, and every Python process asks at its `Py_RunMain`.
    pub(super) fn watch_all(&mut self) -> Result<(), KernelError> {
        self.kernel.set(setting::NODE, self.options.select.is_some())
    }

    /// `Py_RunMain` of a process that nobody selected: is it to be traced? If so it asks again at once, to be armed.
    pub(super) fn decide(&mut self, pid: Pid, wait: Wait) {
        let Some(select) = self.options.select.clone() else { return };
        self.report.processes_seen += 1;
        if select.judge(pid) != Judgement::Selected {
            return;
        }
        tracing::debug!("process {pid}: selected");
        if let Err(error) = self.select(pid) {
            tracing::warn!("{error}");
        } else if !wait.lasts() {
            self.meet_selected(pid);
        }
    }

    /// A running process that is to be traced was found.
    pub(super) fn discovered(&mut self, pid: Pid) {
        if self.paused || self.kernel.process(pid).is_some_and(|info| info.flags & process_flags::SELECTED != 0) {
            return;
        }
        self.report.processes_seen += 1;
        match self.attach(pid) {
            Ok(attached) => tracing::info!("process {pid}: found, CPython {}", attached.python_version),
            Err(AttachError::Refused { refusal, .. }) if refusal.is_temporary() => {
                tracing::debug!("process {pid}: {refusal}");
            }
            Err(AttachError::Refused { refusal, .. }) => self.refused(pid, &refusal),
            Err(error) => tracing::info!("{error}"),
        }
    }

    /// A program that was faster than its interpreter file could be probed, and that nobody has judged.
    pub(super) fn late_in_node(&mut self, pid: Pid) {
        let Some(select) = self.options.select.clone() else { return };
        if select.judge(pid) == Judgement::Selected {
            self.discovered(pid);
        }
    }

    /// Makes a process one that is traced if it is Python.
    pub(super) fn select(&mut self, pid: Pid) -> Result<(), KernelError> {
        match self.kernel.process(pid) {
            Some(mut info) => {
                info.flags |= process_flags::SELECTED;
                self.kernel.set_process(pid, info)
            }
            None => self.track(pid),
        }
    }

    fn meet_selected(&mut self, pid: Pid) {
        if let Ok(located) = locate(pid, &self.files.interpreters()) {
            self.meet(pid, &located.file, located.bias);
        }
    }

    /// Processes that are selected, themselves or because their parent is.
    pub(super) fn selected(&self) -> Vec<Pid> {
        let selected =
            |pid: &Pid| self.kernel.process(*pid).is_some_and(|info| info.flags & process_flags::SELECTED != 0);
        self.kernel.process_ids().into_iter().filter(selected).collect()
    }

    /// Lets go of a process: its functions are disarmed as soon as it can be met, and it is left alone from then on.
    pub(super) fn release(&mut self, pid: Pid) {
        let Some(mut info) = self.kernel.process(pid) else { return };
        info.flags &= !process_flags::SELECTED;
        if let Err(error) = self.kernel.set_process(pid, info) {
            tracing::warn!("{error}");
        }
        // One that is about to be met would be armed then.
        if info.flags & process_flags::READY != 0 || self.meetings.contains_key(&pid) {
            self.leaving.insert(pid);
            self.meet_selected(pid);
        }
    }

    /// A process that is to be let go of waits with the GIL held: whether it was one.
    pub(super) fn leave(&mut self, pid: Pid, epoch: Epoch, wait: Wait) -> bool {
        if !self.leaving.contains(&pid) {
            return false;
        }
        let Some(mut info) = self.kernel.process(pid).filter(|info| info.epoch == epoch.0) else {
            self.leaving.remove(&pid);
            return true;
        };
        if info.flags & process_flags::SELECTED != 0 {
            self.leaving.remove(&pid); // a rule selects it again
            return false;
        }
        if !wait.lasts() {
            self.meet_selected(pid);
            return true;
        }
        if let Some(traced) = self.spaces.of(pid, epoch, &info.ancestors) {
            let functions = traced.disarm_all();
            traced.clear_eval_frame();
            for function in functions {
                self.forget(epoch, function);
            }
        }
        self.leaving.remove(&pid);
        info.flags &= !(process_flags::READY | process_flags::GUARD_STACK);
        if let Err(error) = self.kernel.set_process(pid, info) {
            tracing::warn!("{error}");
        }
        self.spaces.remove(epoch);
        tracing::info!("process {pid}: no longer selected, its functions are disarmed");
        self.report.processes_released += 1;
        true
    }

    /// Stops all tracing: functions are disarmed as far as their processes can be met, then all probes are taken away. How
    /// long it took.
    pub(super) fn pause(&mut self, urgent: &mut UrgentReader) -> Duration {
        let began = Instant::now();
        self.resuming = None;
        if std::mem::replace(&mut self.paused, true) {
            return Duration::ZERO;
        }
        for (flag, on) in [(setting::PAUSED, true), (setting::NODE, false)] {
            if let Err(error) = self.kernel.set(flag, on) {
                tracing::error!("{error}");
            }
        }
        // Meeting processes means attaching, which has to wait for probes that are being detached.
        if !self.kernel.is_detaching() {
            self.stop(urgent);
        }
        for (pid, links) in std::mem::take(&mut self.meetings) {
            self.kernel.cancel_rendezvous(pid);
            self.kernel.detach(links);
        }
        self.kernel.pause();
        // What could not be met keeps functions that run through a place without a probe, which is harmless. Inlining is given
        // back all the same: the guards of the stack are gone. One word that lives as long as the process.
        for (_, traced) in self.spaces.iter_mut() {
            traced.clear_eval_frame();
        }
        for pid in self.kernel.process_ids() {
            if let Some(mut info) = self.kernel.process(pid) {
                info.flags &= !(process_flags::READY | process_flags::GUARD_STACK);
                let _ = self.kernel.set_process(pid, info);
                self.remove_functions(Epoch(info.epoch));
            }
        }
        self.spaces = super::AddressSpaces::default();
        self.starting.clear();
        self.late.clear();
        self.leaving.clear();
        let _ = self.news.send(News::Paused);
        while began.elapsed() < DETACH_PATIENCE && self.kernel.is_detaching() {
            std::thread::sleep(Duration::from_millis(2));
        }
        began.elapsed()
    }

    fn remove_functions(&mut self, epoch: Epoch) {
        let functions = self.spaces.get_mut(epoch).map(|traced| traced.functions()).unwrap_or_default();
        for function in functions {
            self.kernel.remove_function(FunctionKey { epoch: epoch.0, reserved: 0, function: function.0 });
        }
    }

    /// Begins again after a pause, when all probes are detached: before that, attaching would wait for each of them, and whoever
    /// waits for an answer with it. Processes that were traced are met once more; others are found by a scan.
    pub(super) fn resume_if_due(&mut self) {
        if self.resuming.is_none() || self.kernel.is_detaching() {
            return;
        }
        let told = self.resuming.take();
        self.paused = false;
        self.kernel.resume();
        if let Err(error) = self.kernel.set(setting::PAUSED, false).and_then(|()| self.watch_all()) {
            tracing::error!("{error}");
        }
        for pid in self.selected() {
            self.meet_selected(pid);
        }
        // Whoever asked may have thought better of it.
        let _ = told.map(|told| told.send(()));
    }

    /// Takes load off: from level 1 on calls are recorded without attributes, from level 2 on only the calls of the probes
    /// that the level leaves are recorded at all.
    pub(super) fn shed(&mut self, level: u8) {
        if level == self.shedding {
            return;
        }
        tracing::warn!("shedding level {} → {level}", self.shedding);
        self.shedding = level;
        if let Err(error) = self.kernel.set(setting::NO_FIELDS, level > 0) {
            tracing::error!("{error}");
        }
        let mut known = Vec::new();
        for (epoch, traced) in self.spaces.iter_mut() {
            known.extend(traced.functions().into_iter().map(|function| (epoch, function)));
        }
        for (epoch, function) in known {
            let key = FunctionKey { epoch: epoch.0, reserved: 0, function: function.0 };
            if let Some(mut info) = self.kernel.function(key)
                && info.flags & function_flags::LOADER == 0
            {
                info.flags = info.flags & !function_flags::SHED | self.shed_flag(ProbeId(info.probe));
                let _ = self.kernel.set_function(key, info);
            }
        }
    }

    /// Whether the calls of a probe are left out at the present level.
    pub(super) fn shed_flag(&self, probe: ProbeId) -> u32 {
        let stays = self.catalogue.probe(probe).is_none_or(|probe| priority(probe) >= self.shedding);
        if stays { 0 } else { function_flags::SHED }
    }

    /// What there is to tell.
    pub(super) fn snapshot(&mut self) -> Snapshot {
        let (mut processes, mut functions) = (0, 0);
        for (_, traced) in self.spaces.iter_mut() {
            // One of them is importlib's loader.
            let armed = traced.armed.len() as u64;
            if armed > 0 && identity::is_alive(traced.pid) {
                processes += 1;
                functions += armed;
            }
        }
        Snapshot {
            report: self.report.clone(),
            processes,
            functions,
            interpreters: self.files.probed() as u64,
            probes: self.kernel.probes() as u64,
            paused: self.paused,
            shedding: self.shedding,
        }
    }
}

/// How long a probe is kept when load is shed: spans that others hang on last, together with what completes them.
fn priority(probe: &Probe) -> u8 {
    match (probe.kind, probe.span.as_ref().map(|span| span.role)) {
        (Kind::Call, Some(Role::None)) => 1,
        (Kind::Call, Some(Role::Node)) => 2,
        _ => 3,
    }
}
