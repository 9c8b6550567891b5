//! The programs.

mod gate;
mod process;
mod wait;
