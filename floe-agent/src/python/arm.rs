//! Arming: pointing a function's `vectorcall` at the gate, and back. The only place that writes to a traced process.
//!
//! # Precondition of everything here that writes
//!
//! A thread of the target that holds the GIL is held in a probe while this runs, so no Python code runs and no object is
//! freed. Where that cannot be had (the bound of a wait was hit), what is checked right before the write may have changed
//! since: the window is the time between two system calls.
//!
//! Every write changes eight or four bytes in the target's heap to a value that CPython itself would accept there at any
//! time. If the agent is killed between any two of them, the target runs on.

use std::io;

use super::gate::{self, Gate};
use super::identify::Interpreter;
use super::layout::{FUNCTION_CACHE_ENTRIES, OB_TYPE, PyLayout};
use super::memory::{Memory, MemoryError, ProcessMemory};
use super::objects::{CoreTypes, Heap, ObjectError};
use super::resolve::FoundFunction;
use crate::process::{identity, maps};
use crate::units::{Pid, UserAddr};

/// Why a function was left alone.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ArmError {
    /// The memory there is no longer the function that was found.
    #[error("{function} is not the function it was ({what}): left alone")]
    Changed {
        /// Where.
        function: UserAddr,
        /// What differs.
        what: &'static str,
    },
    /// Something else has set `vectorcall`.
    #[error(
        "{function} is called through {vectorcall}, which is neither the interpreter's function nor the gate: left alone"
    )]
    Foreign {
        /// Which function.
        function: UserAddr,
        /// Its `vectorcall`.
        vectorcall: UserAddr,
    },
    /// Something else has set `eval_frame`.
    #[error(
        "the interpreter has another frame evaluation function ({eval_frame}, PEP 523): left alone"
    )]
    ForeignEvaluator {
        /// What it is set to.
        eval_frame: UserAddr,
    },
    /// The write had no effect.
    #[error("{function} does not hold what was written")]
    NotWritten {
        /// Which function or interpreter state.
        function: UserAddr,
    },
    /// Its memory could not be read or written.
    #[error(transparent)]
    Memory(#[from] MemoryError),
}

/// What [`Armer::arm`] did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Armed {
    /// The function goes through the gate now.
    Now,
    /// It did already: armed by an earlier agent, or before a fork.
    Before,
}

/// How arming writes, for one interpreter and its gate.
#[derive(Clone, Copy, Debug)]
pub struct Armer<'a> {
    mem: &'a ProcessMemory,
    layout: &'static PyLayout,
    types: &'a CoreTypes,
    gate: Gate,
    interpreters: &'a [UserAddr],
}

/// Reads what has to be re-checked of one function: type, code, the code's type, `vectorcall`, `func_version`.
#[derive(Clone, Copy)]
struct Now {
    vectorcall: UserAddr,
    version: Option<u32>,
}

impl<'a> Armer<'a> {
    /// Arms and disarms functions of `interpreter`, in whose memory `mem` writes.
    pub fn new(mem: &'a ProcessMemory, interpreter: &'a Interpreter, gate: Gate) -> Self {
        Self {
            mem,
            layout: interpreter.layout,
            types: &interpreter.types,
            gate,
            interpreters: &interpreter.interpreters,
        }
    }

    /// The function, checked right now in uncached memory.
    fn check(&self, function: UserAddr, code: UserAddr) -> Result<Now, ArmError> {
        let changed = |what| ArmError::Changed { function, what };
        let heap = Heap::new(self.mem, self.layout, self.types);
        let current = heap.function(function).map_err(|error| match error {
            ObjectError::Memory(error) => ArmError::Memory(error),
            _ => changed("its type is another"),
        })?;
        if current.code != code {
            return Err(changed("its code is another"));
        }
        if self.mem.read_ptr(code.offset(OB_TYPE))? != self.types.code {
            return Err(changed("its code is no code object"));
        }
        Ok(Now {
            vectorcall: current.vectorcall,
            version: current.version,
        })
    }

    /// Whether this value of `vectorcall` is in the padding before the entry: the gate of this or of an earlier agent.
    const fn is_gate(&self, vectorcall: UserAddr) -> bool {
        vectorcall.0 < self.gate.entry.0
            && vectorcall.0 >= self.gate.entry.0.wrapping_sub(gate::REACH)
    }

    /// Whether a version is one that specialised calls do not trust. 3.11 hands out versions whatever `vectorcall` is;
    /// there it is `eval_frame` that keeps calls from being inlined.
    fn is_cleared(&self, version: Option<u32>) -> bool {
        self.layout.inlines_past_vectorcall
            || version.is_none_or(|version| version <= self.layout.function.version_cleared)
    }

    /// Whether the function goes through the gate.
    pub fn is_armed(&self, function: UserAddr, code: UserAddr) -> Result<bool, ArmError> {
        Ok(self.check(function, code)?.vectorcall == self.gate.gate)
    }

    /// Lets calls of a function go through the gate. See the module for the precondition.
    pub fn arm(&self, found: &FoundFunction) -> Result<Armed, ArmError> {
        let now = self.check(found.function, found.code)?;
        let cleared = self.layout.function.version_cleared;
        if now.vectorcall == self.gate.gate && now.version.is_none_or(|version| version <= cleared)
        {
            return Ok(Armed::Before);
        }
        if now.vectorcall != self.gate.entry && !self.is_gate(now.vectorcall) {
            return Err(ArmError::Foreign {
                function: found.function,
                vectorcall: now.vectorcall,
            });
        }
        self.point(found.function, self.gate.gate, now)?;
        Ok(Armed::Now)
    }

    /// Lets calls of a function go to the interpreter directly again. See the module for the precondition.
    pub fn disarm(&self, function: UserAddr, code: UserAddr) -> Result<(), ArmError> {
        let now = self.check(function, code)?;
        if now.vectorcall == self.gate.entry {
            return Ok(());
        }
        if !self.is_gate(now.vectorcall) {
            return Err(ArmError::Foreign {
                function,
                vectorcall: now.vectorcall,
            });
        }
        self.point(function, self.gate.entry, now)
    }

    /// Writes `vectorcall`, then the version: with the other order the interpreter could hand out a new version between
    /// the two, and specialised calls would go past the gate.
    fn point(&self, function: UserAddr, vectorcall: UserAddr, now: Now) -> Result<(), ArmError> {
        let l = &self.layout.function;
        let target = vectorcall.0.to_le_bytes();
        let cleared = l.version_cleared.to_le_bytes();
        let mut writes: Vec<(UserAddr, &[u8])> = vec![(function.offset(l.vectorcall), &target)];
        if let Some(version) = l.version {
            writes.push((function.offset(version), &cleared));
        }
        self.mem.write_many(&writes)?;
        if let Some(version) = now.version {
            self.forget_version(function, version);
        }
        let after = self.mem.read_ptr(function.offset(l.vectorcall))?;
        let version = l
            .version
            .map(|at| self.mem.read_u32(function.offset(at)))
            .transpose()?;
        if after != vectorcall || !self.is_cleared(version) {
            return Err(ArmError::NotWritten { function });
        }
        Ok(())
    }

    /// 3.13 on: the interpreter remembers functions by version, and clears its note when a function with that version
    /// goes away. A function whose version was cleared would leave a dangling note.
    fn forget_version(&self, function: UserAddr, version: u32) {
        let Some(cache) = self.layout.interpreter.function_cache else {
            return;
        };
        if version <= self.layout.function.version_cleared {
            return;
        }
        let slot = cache + (u64::from(version) % FUNCTION_CACHE_ENTRIES) * 16;
        for interpreter in self.interpreters {
            let at = interpreter.offset(slot);
            if self.mem.read_ptr(at) == Ok(function) {
                // Nothing to be done if it fails: only builds with the experimental JIT read it.
                let _ = self.mem.write(at, &0_u64.to_le_bytes());
            }
        }
    }
}

/// Makes CPython 3.11 call functions through `vectorcall` from Python code too, by setting the frame evaluation function
/// of PEP 523 to CPython's own. Only where none is set. Returns whether it was set now.
pub fn set_eval_frame(
    mem: &ProcessMemory,
    interpreter: &Interpreter,
    state: UserAddr,
) -> Result<bool, ArmError> {
    let at = state.offset(interpreter.layout.interpreter.eval_frame);
    match mem.read_ptr(at)? {
        UserAddr(0) => {
            mem.write(at, &interpreter.eval_frame_default.0.to_le_bytes())?;
            if mem.read_ptr(at)? != interpreter.eval_frame_default {
                return Err(ArmError::NotWritten { function: state });
            }
            Ok(true)
        }
        set if set == interpreter.eval_frame_default => Ok(false),
        eval_frame => Err(ArmError::ForeignEvaluator { eval_frame }),
    }
}

/// Takes back what [`set_eval_frame`] did; leaves anything else alone. Returns whether it was taken back now.
pub fn clear_eval_frame(
    mem: &ProcessMemory,
    interpreter: &Interpreter,
    state: UserAddr,
) -> Result<bool, ArmError> {
    let at = state.offset(interpreter.layout.interpreter.eval_frame);
    if mem.read_ptr(at)? != interpreter.eval_frame_default {
        return Ok(false);
    }
    mem.write(at, &0_u64.to_le_bytes())?;
    Ok(true)
}

/// What decides whether calls that use the C stack can overflow it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StackFacts {
    /// `sys.getrecursionlimit()`
    pub recursion_limit: i32,
    /// What `threading.stack_size` was set to; 0 if it was not.
    pub thread_stack: u64,
    /// Soft limit of the main thread's stack, which new threads get too; `None` if unlimited.
    pub stack_limit: Option<u64>,
    /// The C library is musl, whose threads have small stacks whatever the limits are.
    pub musl: bool,
}

/// Calls that 8 MiB of stack hold safely: measured, 20,000 nested calls are fine and 50,000 are not.
const SAFE_CALLS: u64 = 5_000;
const SAFE_STACK: u64 = 8 << 20;

impl StackFacts {
    /// Reads them for one interpreter of a process.
    pub fn read(mem: &ProcessMemory, layout: &PyLayout, state: UserAddr) -> io::Result<Self> {
        let other = |error: MemoryError| io::Error::other(error.to_string());
        let l = &layout.interpreter;
        let recursion_limit = match l.recursion_limit {
            Some(at) => mem.read_i32(state.offset(at)).map_err(other)?,
            None => 0,
        };
        let thread_stack = match l.stack_size {
            Some(at) => mem.read_u64(state.offset(at)).map_err(other)?,
            None => 0,
        };
        let pid = mem.pid();
        Ok(Self {
            recursion_limit,
            thread_stack,
            stack_limit: identity::stack_limit(pid)?,
            musl: uses_musl(pid)?,
        })
    }

    /// Whether all nested calls that the recursion limit allows fit the smallest stack. With `recursion_limit` or
    /// `thread_stack` replaced it answers the same for a change that is about to happen.
    pub fn eval_frame_is_safe(&self) -> bool {
        if self.musl {
            return false;
        }
        let Ok(limit) = u64::try_from(self.recursion_limit) else {
            return false;
        };
        // glibc gives threads 2 MiB where the limit is unlimited.
        let main = self.stack_limit.unwrap_or(2 << 20);
        let smallest = if self.thread_stack == 0 {
            main
        } else {
            main.min(self.thread_stack)
        };
        limit.saturating_mul(SAFE_STACK) <= smallest.saturating_mul(SAFE_CALLS)
    }
}

fn uses_musl(pid: Pid) -> io::Result<bool> {
    Ok(maps::read(pid)?.iter().any(|mapping| {
        let name = mapping
            .path
            .file_name()
            .map(|name| name.to_string_lossy())
            .unwrap_or_default();
        name.starts_with("ld-musl-") || name.starts_with("libc.musl-")
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_default_limits_are_safe_and_raised_ones_are_not() {
        let default = StackFacts {
            recursion_limit: 1000,
            thread_stack: 0,
            stack_limit: Some(8 << 20),
            musl: false,
        };
        assert!(default.eval_frame_is_safe());
        assert!(
            StackFacts {
                recursion_limit: 5000,
                ..default
            }
            .eval_frame_is_safe()
        );
        assert!(
            !StackFacts {
                recursion_limit: 5001,
                ..default
            }
            .eval_frame_is_safe()
        );
        assert!(
            !StackFacts {
                recursion_limit: i32::MAX,
                ..default
            }
            .eval_frame_is_safe()
        );
        assert!(
            !StackFacts {
                recursion_limit: -1,
                ..default
            }
            .eval_frame_is_safe()
        );
        assert!(
            StackFacts {
                recursion_limit: 100_000,
                stack_limit: Some(1 << 30),
                ..default
            }
            .eval_frame_is_safe()
        );
        assert!(
            !StackFacts {
                thread_stack: 256 << 10,
                ..default
            }
            .eval_frame_is_safe()
        );
        assert!(
            StackFacts {
                stack_limit: None,
                ..default
            }
            .eval_frame_is_safe()
        );
        assert!(
            !StackFacts {
                recursion_limit: 2000,
                stack_limit: None,
                ..default
            }
            .eval_frame_is_safe()
        );
        assert!(
            !StackFacts {
                musl: true,
                ..default
            }
            .eval_frame_is_safe()
        );
        let huge = StackFacts {
            recursion_limit: i32::MAX,
            stack_limit: Some(u64::MAX),
            thread_stack: u64::MAX,
            musl: false,
        };
        assert!(huge.eval_frame_is_safe());
    }
}
