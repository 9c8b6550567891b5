//! The kernel side: loading, attaching, maps, ring buffers, decoding.
//!
//! The programs are the crate `floe-ebpf`; this room is their only user. [`load()`] brings them into the kernel and gives
//! two halves: [`Kernel`], for the thread that arms functions (maps, attaching, urgent records), and [`EventReader`], for
//! the thread that makes spans.

pub mod btf;
pub mod decode;
pub mod event;
mod load;
pub mod nop5;
mod ring;
pub mod trial;

pub use load::{Counters, Kernel, KernelError, LinkId, Site, WaitBounds, load};
pub use ring::{EventReader, UrgentReader};
