//! The CPython interpreter from the outside: ELF, version, layouts, objects, gate, functions.

pub mod elf;
pub mod layout;
pub mod memory;
