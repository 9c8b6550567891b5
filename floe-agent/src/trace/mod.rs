//! From events to spans: assembly, parents, ids. No kernel and no I/O in here.
//!
//! [`Assembler`] is fed with events in the order of the ring buffer and gives finished spans.

mod assembler;
mod calls;
mod clock;
mod finish;
mod home;
pub mod ids;
mod keys;
mod log;
mod logs;
mod process;
mod program;
mod resource;
mod rules;
mod traces;
mod values;

pub use assembler::{Assembler, AssemblerStats, FinishedSpan, Limits};
pub use clock::Clock;
pub use log::FinishedLog;
pub use logs::{LogLevel, LogSettings, LogStats};
pub use resource::{ProcessFacts, ResourceDefaults, script_name};
pub use traces::{Hold, TraceStats};
