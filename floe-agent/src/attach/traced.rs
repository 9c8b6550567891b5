//! One traced address space: its interpreter and its armed functions.

use std::collections::HashMap;

use crate::{
    python::{
        arm::{self, ArmError, Armer, StackFacts},
        elf::FileIdentity,
        gate::Gate,
        identify::Interpreter,
        memory::ProcessMemory,
        resolve::FoundFunction,
    },
    units::{Epoch, Pid, UserAddr},
};

/// A traced address space.
pub(super) struct Traced {
    pub(super) pid: Pid,
    pub(super) memory: ProcessMemory,
    pub(super) interpreter: Interpreter,
    pub(super) file: FileIdentity,
    pub(super) gate: Gate,
    /// Armed functions by their address. After a fork, the child's copy begins with the parent's.
    pub(super) armed: HashMap<UserAddr, FoundFunction>,
    /// `eval_frame` is set (3.11).
    pub(super) eval_frame: bool,
    /// A function is armed whose results are context managers.
    pub(super) has_context_managers: bool,
}

impl Traced {
    /// The same after a fork: same addresses, another memory.
    pub(super) fn forked(&self, pid: Pid) -> Self {
        let Self { pid: _, memory: _, interpreter, file, gate, armed, eval_frame, has_context_managers } = self;
        Self {
            pid,
            memory: ProcessMemory::new(pid),
            interpreter: interpreter.clone(),
            file: *file,
            gate: *gate,
            armed: armed.clone(),
            eval_frame: *eval_frame,
            has_context_managers: *has_context_managers,
        }
    }

    /// Arms a function in the process's memory.
    pub(super) fn arm(&mut self, function: &FoundFunction) -> Result<(), ArmError> {
        Armer::new(&self.memory, &self.interpreter, self.gate).arm(function)?;
        self.armed.insert(function.function, function.clone());
        Ok(())
    }

    /// Disarms one function; whether it was armed here.
    pub(super) fn disarm(&mut self, function: UserAddr) -> bool {
        let Some(found) = self.armed.remove(&function) else { return false };
        match Armer::new(&self.memory, &self.interpreter, self.gate).disarm(function, found.code) {
            Ok(()) => true,
            Err(error) => {
                tracing::debug!("process {}: {error}", self.pid);
                false
            }
        }
    }

    /// Disarms everything; gives the functions.
    pub(super) fn disarm_all(&mut self) -> Vec<UserAddr> {
        let all: Vec<_> = self.armed.keys().copied().collect();
        for &function in &all {
            self.disarm(function);
        }
        all
    }

    /// Gives inlining back (3.11).
    pub(super) fn clear_eval_frame(&mut self) {
        if !std::mem::take(&mut self.eval_frame) {
            return;
        }
        for &state in &self.interpreter.interpreters {
            if let Err(error) = arm::clear_eval_frame(&self.memory, &self.interpreter, state) {
                tracing::warn!("process {}: {error}", self.pid);
            }
        }
    }

    /// Takes inlining away (3.11), in all interpreters.
    pub(super) fn set_eval_frame(&mut self) -> Result<(), ArmError> {
        for &state in &self.interpreter.interpreters {
            arm::set_eval_frame(&self.memory, &self.interpreter, state)?;
            self.eval_frame = true;
        }
        Ok(())
    }

    /// Why calls may not be made on the C stack (3.11), if so. A recursion limit or stack size that is about to be set
    /// can be given.
    pub(super) fn stack_too_small(&self, about_to_be_set: Option<i64>) -> Option<String> {
        self.interpreter.interpreters.iter().find_map(|&state| {
            let mut facts = match StackFacts::read(&self.memory, self.interpreter.layout, state) {
                Ok(facts) => facts,
                Err(error) => return Some(format!("its stack limits cannot be read: {error}")),
            };
            let mut safe = facts.eval_frame_is_safe();
            if let Some(value) = about_to_be_set {
                // Which of the two it is does not matter: as the other one it is harmless or refused by Python.
                let before = facts;
                facts.recursion_limit = i32::try_from(value).unwrap_or(i32::MAX);
                safe &= facts.eval_frame_is_safe();
                facts = before;
                facts.thread_stack = u64::try_from(value).unwrap_or(0);
                safe &= value < 32 << 10 || facts.eval_frame_is_safe();
            }
            (!safe).then(|| {
                "its recursion limit allows deeper calls than its stacks hold when calls use the C stack".to_owned()
            })
        })
    }
}

/// Traced address spaces by their epoch.
#[derive(Default)]
pub(super) struct AddressSpaces(HashMap<Epoch, Traced>);

impl AddressSpaces {
    pub(super) fn insert(&mut self, epoch: Epoch, traced: Traced) {
        self.0.insert(epoch, traced);
    }

    /// The address space of a process; for a forked child that was not met yet it is made from its nearest ancestor's.
    pub(super) fn of(&mut self, pid: Pid, epoch: Epoch, ancestors: &[u32]) -> Option<&mut Traced> {
        if !self.0.contains_key(&epoch) {
            let parent =
                ancestors.iter().take_while(|&&e| e != 0).find_map(|&ancestor| self.0.get(&Epoch(ancestor)))?;
            let child = parent.forked(pid);
            self.0.insert(epoch, child);
        }
        self.0.get_mut(&epoch)
    }

    pub(super) fn get_mut(&mut self, epoch: Epoch) -> Option<&mut Traced> {
        self.0.get_mut(&epoch)
    }

    pub(super) fn remove(&mut self, epoch: Epoch) -> Option<Traced> {
        self.0.remove(&epoch)
    }

    pub(super) fn iter_mut(&mut self) -> impl Iterator<Item = (Epoch, &mut Traced)> {
        self.0.iter_mut().map(|(&epoch, traced)| (epoch, traced))
    }
}
