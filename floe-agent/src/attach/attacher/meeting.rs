//! Meeting processes that are in no probe: those that run when they are attached to, that were faster than a probe, or whose
//! wait was over too soon.

use std::{
    collections::HashSet,
    time::{Duration, Instant},
};

use floe_ebpf::{ProcessInfo, process_flags, urgent};

use super::{Attacher, LATE_PATIENCE, LIBRARY_PATIENCE, Wait};
use crate::{
    attach::{AttachError, Attached},
    kernel::{KernelError, Site, UrgentReader},
    process::identity,
    python::{
        identify::{Interpreter, InterpreterFile, Refusal, locate},
        memory::ProcessMemory,
    },
    units::{Epoch, Pid, Tid, boot_now},
};

impl Attacher {
    /// Programs whose interpreter is in a library: attach as soon as it is mapped.
    pub(super) fn look_for_libraries(&mut self) {
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
    pub(super) fn look_for_latecomers(&mut self) {
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
    pub(super) fn attach(&mut self, pid: Pid) -> Result<Attached, AttachError> {
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
    pub(super) fn track(&mut self, pid: Pid) -> Result<(), KernelError> {
        if self.kernel.process(pid).is_some() {
            return Ok(());
        }
        let epoch = self.kernel.new_epoch()?;
        self.kernel.set_process(pid, ProcessInfo::selected(epoch, boot_now().0))
    }

    pub(super) fn attach_one(&mut self, pid: Pid) -> Result<String, AttachError> {
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
        let gate = interpreter.gate(&memory, &located.file).map_err(refused)?;
        let path = located.file.elf().path().to_path_buf();
        self.files.ensure(&mut self.kernel, &located.file, &path).map_err(kernel)?;
        self.track(pid).map_err(kernel)?;
        // Now, and not while it waits.
        if let Some(known) = self.files.get_mut(located.file.identity()) {
            known.attach_gate(&mut self.kernel, &memory, &gate).map_err(refused)?;
        }
        self.attach_guards(pid, &interpreter);
        self.meet(pid, &located.file, located.bias);
        Ok(interpreter.version())
    }

    /// Arranges to arm a process as soon as one of its threads holds the GIL: functions that are only called then are
    /// probed in this process until the first of them is called.
    pub(super) fn meet(&mut self, pid: Pid, file: &InterpreterFile, bias: u64) {
        if self.meetings.contains_key(&pid) {
            return;
        }
        let Some(known) = self.files.get_mut(file.identity()) else { return };
        let path = known.path();
        let points = file.meeting_points(&ProcessMemory::new(pid), bias);
        let points = points.into_iter().map(|offset| (Site::Rendezvous, offset));
        let waiting = file.takes_gil().map(|offset| (Site::RendezvousReturn, offset));
        // The kernel asks whether the memory is that of the thread that was named: one thread stands for all.
        let thread =
            identity::threads(pid).unwrap_or_default().into_iter().find(|&tid| identity::is_thread_alive(pid, tid));
        let mut links = Vec::new();
        for (site, offset) in points.chain(waiting) {
            match self.kernel.attach(site, &path, offset, thread.or(Some(Tid(pid.0)))) {
                Ok(link) => links.push(link),
                Err(error) => tracing::debug!("{error}"),
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
    pub(super) fn meet_again(&mut self, pid: Pid, epoch: Epoch) {
        self.report.late_answers += 1;
        let Some(traced) = self.spaces.get_mut(epoch) else { return };
        let (file, bias) = (traced.file, traced.interpreter.bias);
        if let Some(file) = self.files.interpreters().into_iter().find(|known| known.identity() == file) {
            self.meet(pid, &file, bias);
        }
    }

    /// Disarms what is still armed, as far as processes can be met; what stays armed runs on correctly.
    pub(super) fn stop(&mut self, urgent: &mut UrgentReader) {
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
