//! Units and identities as types, so that two of them cannot be swapped.

use std::fmt;

macro_rules! unit {
    ($(#[$meta:meta])* $name:ident($inner:ty), $format:literal) => {
        $(#[$meta])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
        pub struct $name(pub $inner);
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, $format, self.0)
            }
        }
        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "(", $format, ")"), self.0)
            }
        }
    };
}

unit! {
    /// A process (thread group) id in the pid namespace of the agent.
    Pid(u32), "{}"
}
unit! {
    /// A thread id in the pid namespace of the agent.
    Tid(u32), "{}"
}
unit! {
    /// Identity of one address space, unique for the life of the agent (`floe_ebpf::ProcessInfo::epoch`).
    Epoch(u32), "{}"
}
unit! {
    /// An address in a traced process. Untrusted: it may point anywhere.
    UserAddr(u64), "{:#x}"
}
unit! {
    /// An address as an ELF file states it, before the load bias.
    FileAddr(u64), "{:#x}"
}
unit! {
    /// An offset in a file, in bytes.
    FileOffset(u64), "{:#x}"
}
unit! {
    /// Nanoseconds since boot, suspend included (`CLOCK_BOOTTIME`).
    BootNanos(u64), "{} ns"
}
unit! {
    /// Index of a probe in the loaded catalogue.
    ProbeId(u32), "{}"
}

impl UserAddr {
    /// The address `offset` bytes further on; wraps, as addresses of a hostile process may.
    #[must_use]
    pub const fn offset(self, offset: u64) -> Self {
        Self(self.0.wrapping_add(offset))
    }

    /// The address `offset` bytes before.
    #[must_use]
    pub const fn back(self, offset: u64) -> Self {
        Self(self.0.wrapping_sub(offset))
    }

    /// Whether this is NULL.
    pub const fn is_null(self) -> bool {
        self.0 == 0
    }
}

/// The time now.
pub fn boot_now() -> BootNanos {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    BootNanos(now.tv_sec.cast_unsigned() * 1_000_000_000 + now.tv_nsec.cast_unsigned())
}
