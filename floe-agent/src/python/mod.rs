//! The CPython interpreter from the outside: ELF, version, layouts, objects, gate, functions.
