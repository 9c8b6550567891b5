//! The kernel side: loading, attaching, maps, ring buffers, decoding.

pub mod event;
