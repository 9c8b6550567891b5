//! The CPython interpreter from the outside: ELF, version, layouts, objects, gate, functions.
//!
//! A process becomes one that can be traced in this order: [`identify::locate`] finds the interpreter's file,
//! [`identify::Interpreter::verify`] checks the live interpreter against a [`layout`] table, [`gate::find_gate`] finds the
//! place for the probe, [`resolve::Resolver`] finds functions by name in its [`objects`], and [`arm::Armer`] points them
//! at the gate. Everything but the last only reads, through the trait [`memory::Memory`], so that it runs on saved memory
//! too. What is read is never trusted: see [`objects`].

pub mod arm;
pub mod elf;
pub mod exception;
pub mod gate;
mod graph;
pub mod identify;
pub mod layout;
pub mod memory;
pub mod objects;
pub mod resolve;
