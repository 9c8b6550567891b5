//! Records of the ring buffer `EVENTS` as typed events.

use crate::units::{BootNanos, Epoch, Pid, ProbeId, Tid, UserAddr};

/// Where and when an event happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stamp {
    /// Process.
    pub pid: Pid,
    /// Thread.
    pub tid: Tid,
    /// Address space.
    pub epoch: Epoch,
    /// Time.
    pub time: BootNanos,
    /// Events of this thread that were lost just before this one.
    pub lost: u16,
}

/// A captured value.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    /// A str; `cut` if only its beginning was captured.
    Str {
        /// Text.
        text: String,
        /// Whether the text was cut.
        cut: bool,
    },
    /// An int that fits 64 bits.
    Int(i64),
    /// A float.
    Float(f64),
    /// A bool.
    Bool(bool),
    /// None.
    None,
    /// Several values: the items of a tuple or list, or the values of a dict.
    List(Vec<Value>),
    /// A dict with str keys.
    Map(Vec<(String, Value)>),
}

/// A captured field: its number in the plan that ran, and its value.
#[derive(Clone, Debug, PartialEq)]
pub struct FieldValue {
    /// Field number.
    pub field: u8,
    /// Value.
    pub value: Value,
    /// Whether something of it is missing: the end of a text, or items.
    pub cut: bool,
}

/// How a call ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It returned an object.
    Returned,
    /// An exception left it.
    Raised,
}

/// What happened.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// An armed call begins. `(stamp.tid, stamp.time)` identifies it.
    Enter {
        /// Where and when.
        stamp: Stamp,
        /// Which probe.
        probe: ProbeId,
        /// Armed calls that were open in the thread.
        depth: u32,
        /// The function is nested too deep and is being disarmed.
        recursion: bool,
        /// The first positional argument; NULL if there is none.
        object: UserAddr,
        /// Captured from the arguments.
        fields: Vec<FieldValue>,
    },
    /// An armed call ends.
    Return {
        /// Where and when.
        stamp: Stamp,
        /// Time of the enter event.
        call: BootNanos,
        /// Which probe.
        probe: ProbeId,
        /// How.
        outcome: Outcome,
        /// The result; NULL if an exception left the call.
        object: UserAddr,
        /// Captured from the arguments, the result or the exception.
        fields: Vec<FieldValue>,
    },
    /// A traced process forked; the stamp is the parent's.
    Fork {
        /// Where and when.
        stamp: Stamp,
        /// The child.
        child: Pid,
        /// The child's address space.
        child_epoch: Epoch,
    },
    /// A traced process started a thread; the stamp is that of the thread that did.
    Thread {
        /// Where and when.
        stamp: Stamp,
        /// The new thread.
        child: Tid,
    },
    /// A selected process called exec; the stamp's epoch is the new address space.
    Exec {
        /// Where and when.
        stamp: Stamp,
    },
    /// A thread of a traced process ended.
    Exit {
        /// Where and when.
        stamp: Stamp,
        /// It was the last thread: the process has ended.
        process_ended: bool,
        /// Exit code as `wait` gives it.
        code: u32,
    },
}
