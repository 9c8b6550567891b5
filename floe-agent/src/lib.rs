//! floe-agent: traces Python data pipelines from the outside.
//!
//! An event's way through the rooms: [`kernel`] (eBPF programs, ring buffers, decoding) → [`trace`] (spans, parents,
//! ids) → [`export`] (terminal, files, OTLP). What is probed comes from the [`catalogue`]; [`python`] reads an
//! interpreter from the outside; [`attach`] uses both to arm functions while the traced thread waits; [`process`] knows
//! what a process is; [`config`] what the agent was told; [`node`] decides which processes of a machine are traced;
//! [`report`] draws the spans of a file. [`cli`] ties them together. `ARCHITECTURE.md` walks one span from start to end.

pub mod attach;
pub mod catalogue;
pub mod cli;
pub mod config;
pub mod export;
#[cfg(any(test, fuzzing))]
pub mod fuzz;
pub mod kernel;
pub mod node;
pub mod process;
pub mod python;
pub mod report;
pub mod trace;
pub mod units;
