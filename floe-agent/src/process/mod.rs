//! What a process is, seen from outside: identity, environment, memory maps.

pub mod container;
pub mod identity;
pub mod launch;
pub mod maps;
pub mod run_id;
