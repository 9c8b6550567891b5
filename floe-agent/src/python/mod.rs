//! The CPython interpreter from the outside: ELF, version, layouts, objects, gate, functions.

pub mod arm;
pub mod elf;
pub mod gate;
pub mod identify;
pub mod layout;
pub mod memory;
pub mod objects;
pub mod resolve;
