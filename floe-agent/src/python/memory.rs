//! Memory of a traced process: reading and writing it, caching it while it cannot change, and saved memory for tests.
//!
//! Everything that comes out of here is untrusted. Lengths that a traced process states are bounded by the callers.

use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap};
use std::io;

use crate::units::{Pid, UserAddr};

/// Why memory of a traced process could not be read or written.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MemoryError {
    /// Nothing readable (or writable) is mapped there: a stale or hostile pointer.
    #[error("{len} bytes at {addr} are not mapped for this access")]
    Unmapped {
        /// Where.
        addr: UserAddr,
        /// How much was asked for.
        len: usize,
    },
    /// The process has ended.
    #[error("process {pid} has ended")]
    Gone {
        /// Which process.
        pid: Pid,
    },
    /// The kernel does not allow it.
    #[error(
        "no permission to access the memory of process {pid}: run as root, or with CAP_SYS_PTRACE (and check Yama's ptrace_scope)"
    )]
    Denied {
        /// Which process.
        pid: Pid,
    },
    /// Another error of the system call.
    #[error("accessing {len} bytes at {addr} of process {pid} failed: errno {errno}")]
    System {
        /// Which process.
        pid: Pid,
        /// Where.
        addr: UserAddr,
        /// How much.
        len: usize,
        /// The error number.
        errno: i32,
    },
    /// A text or an array is longer than its reader accepts.
    #[error("{what} at {addr} is longer than {limit}")]
    TooLong {
        /// What was read.
        what: &'static str,
        /// Where.
        addr: UserAddr,
        /// The bound.
        limit: usize,
    },
}

/// Longest read that one call of [`Memory::read_bytes`] accepts.
pub const MAX_READ: usize = 16 << 20;

/// Memory of a traced process, live or saved.
pub trait Memory {
    /// Fills `buf` from `addr`, all of it or nothing.
    fn read(&self, addr: UserAddr, buf: &mut [u8]) -> Result<(), MemoryError>;

    /// A byte.
    fn read_u8(&self, addr: UserAddr) -> Result<u8, MemoryError> {
        let mut buf = [0; 1];
        self.read(addr, &mut buf)?;
        Ok(buf[0])
    }

    /// A 16-bit number.
    fn read_u16(&self, addr: UserAddr) -> Result<u16, MemoryError> {
        let mut buf = [0; 2];
        self.read(addr, &mut buf)?;
        Ok(u16::from_le_bytes(buf))
    }

    /// A 32-bit number.
    fn read_u32(&self, addr: UserAddr) -> Result<u32, MemoryError> {
        let mut buf = [0; 4];
        self.read(addr, &mut buf)?;
        Ok(u32::from_le_bytes(buf))
    }

    /// A signed 32-bit number.
    fn read_i32(&self, addr: UserAddr) -> Result<i32, MemoryError> {
        Ok(self.read_u32(addr)?.cast_signed())
    }

    /// A 64-bit number.
    fn read_u64(&self, addr: UserAddr) -> Result<u64, MemoryError> {
        let mut buf = [0; 8];
        self.read(addr, &mut buf)?;
        Ok(u64::from_le_bytes(buf))
    }

    /// A signed 64-bit number.
    fn read_i64(&self, addr: UserAddr) -> Result<i64, MemoryError> {
        Ok(self.read_u64(addr)?.cast_signed())
    }

    /// A pointer.
    fn read_ptr(&self, addr: UserAddr) -> Result<UserAddr, MemoryError> {
        self.read_u64(addr).map(UserAddr)
    }

    /// `len` bytes; refuses more than [`MAX_READ`].
    fn read_bytes(&self, addr: UserAddr, len: usize) -> Result<Vec<u8>, MemoryError> {
        if len > MAX_READ {
            return Err(MemoryError::TooLong {
                what: "a block of memory",
                addr,
                limit: MAX_READ,
            });
        }
        let mut buf = vec![0; len];
        self.read(addr, &mut buf)?;
        Ok(buf)
    }

    /// A zero-terminated text of at most `limit` bytes, without the zero; invalid UTF-8 is replaced.
    fn read_cstr(&self, addr: UserAddr, limit: usize) -> Result<String, MemoryError> {
        let mut text = Vec::new();
        let mut at = addr;
        loop {
            // Never beyond the 64-byte line that holds the next byte: the next page may not be mapped.
            let mut chunk = [0; 64];
            let len = 64 - (at.0 % 64) as usize;
            self.read(at, &mut chunk[..len])?;
            if let Some(end) = chunk[..len].iter().position(|&b| b == 0) {
                text.extend_from_slice(&chunk[..end]);
                break;
            }
            text.extend_from_slice(&chunk[..len]);
            if text.len() > limit {
                break;
            }
            at = at.offset(len as u64);
        }
        if text.len() > limit {
            return Err(MemoryError::TooLong {
                what: "a C string",
                addr,
                limit,
            });
        }
        Ok(String::from_utf8_lossy(&text).into_owned())
    }
}

/// Memory of a running process, through `process_vm_readv` and `process_vm_writev`.
///
/// These obey page protections: unlike `/proc/pid/mem` they cannot write to a read-only mapping.
#[derive(Clone, Copy, Debug)]
pub struct ProcessMemory {
    pid: Pid,
}

/// Most ranges in one [`ProcessMemory::write_many`].
pub const MAX_WRITES: usize = 16;

impl ProcessMemory {
    /// Memory of `pid`, a process in the agent's pid namespace. Nothing is checked until the first access.
    pub const fn new(pid: Pid) -> Self {
        Self { pid }
    }

    /// Whose memory this is.
    pub const fn pid(&self) -> Pid {
        self.pid
    }

    /// Writes `data` at `addr`, if the mapping is writable.
    pub fn write(&self, addr: UserAddr, data: &[u8]) -> Result<(), MemoryError> {
        self.write_many(&[(addr, data)])
    }

    /// Writes several ranges in the given order with one system call.
    ///
    /// # Panics
    ///
    /// With more than [`MAX_WRITES`] ranges.
    pub fn write_many(&self, writes: &[(UserAddr, &[u8])]) -> Result<(), MemoryError> {
        assert!(
            writes.len() <= MAX_WRITES,
            "at most {MAX_WRITES} ranges in one write"
        );
        let Some(&(addr, _)) = writes.first() else {
            return Ok(());
        };
        let local: Vec<libc::iovec> = writes
            .iter()
            .map(|(_, data)| libc::iovec {
                iov_base: data.as_ptr().cast_mut().cast(),
                iov_len: data.len(),
            })
            .collect();
        let remote: Vec<libc::iovec> = writes
            .iter()
            .map(|(addr, data)| libc::iovec {
                iov_base: std::ptr::with_exposed_provenance_mut(addr.0 as usize),
                iov_len: data.len(),
            })
            .collect();
        let len: usize = writes.iter().map(|(_, data)| data.len()).sum();
        // SAFETY: `local` holds valid ranges of our memory, which are only read; `remote` is interpreted in the other
        // process by the kernel, which checks it; both arrays have the stated length.
        let written = unsafe {
            libc::process_vm_writev(
                self.pid.0.cast_signed(),
                local.as_ptr(),
                local.len() as libc::c_ulong,
                remote.as_ptr(),
                remote.len() as libc::c_ulong,
                0,
            )
        };
        self.check(written, addr, len)
    }

    fn check(self, done: isize, addr: UserAddr, len: usize) -> Result<(), MemoryError> {
        if done == len.cast_signed() {
            return Ok(());
        }
        if done >= 0 {
            return Err(MemoryError::Unmapped { addr, len });
        }
        let pid = self.pid;
        match io::Error::last_os_error().raw_os_error().unwrap_or(0) {
            libc::EFAULT | libc::EINVAL => Err(MemoryError::Unmapped { addr, len }),
            libc::ESRCH => Err(MemoryError::Gone { pid }),
            libc::EPERM => Err(MemoryError::Denied { pid }),
            errno => Err(MemoryError::System {
                pid,
                addr,
                len,
                errno,
            }),
        }
    }
}

impl Memory for ProcessMemory {
    fn read(&self, addr: UserAddr, buf: &mut [u8]) -> Result<(), MemoryError> {
        let len = buf.len();
        if len == 0 {
            return Ok(());
        }
        let local = libc::iovec {
            iov_base: buf.as_mut_ptr().cast(),
            iov_len: len,
        };
        let remote = libc::iovec {
            iov_base: std::ptr::with_exposed_provenance_mut(addr.0 as usize),
            iov_len: len,
        };
        // SAFETY: `local` is `buf`, which we hold mutably; `remote` is interpreted in the other process by the kernel,
        // which checks it; both counts are 1.
        let read = unsafe {
            libc::process_vm_readv(
                self.pid.0.cast_signed(),
                &raw const local,
                1,
                &raw const remote,
                1,
                0,
            )
        };
        self.check(read, addr, len)
    }
}

const PAGE: usize = 4096;
/// Pages that a [`CachedMemory`] holds by default: 16 MiB.
pub const CACHE_PAGES: usize = 4096;

/// Page cache over another memory, for the time in which that memory does not change: the thread that holds the GIL
/// waits in a probe.
pub struct CachedMemory<M> {
    inner: M,
    limit: usize,
    pages: RefCell<HashMap<u64, Option<Box<[u8; PAGE]>>>>,
}

impl<M: Memory> CachedMemory<M> {
    /// An empty cache of at most [`CACHE_PAGES`] pages.
    pub fn new(inner: M) -> Self {
        Self::with_limit(inner, CACHE_PAGES)
    }

    /// An empty cache of at most `limit` pages; when it is full it starts anew.
    pub fn with_limit(inner: M, limit: usize) -> Self {
        Self {
            inner,
            limit: limit.max(1),
            pages: RefCell::new(HashMap::new()),
        }
    }

    /// Forgets everything: the target runs, or has been written to.
    pub fn clear(&self) {
        self.pages.borrow_mut().clear();
    }

    /// The memory below.
    pub const fn inner(&self) -> &M {
        &self.inner
    }
}

impl<M: Memory> Memory for CachedMemory<M> {
    fn read(&self, addr: UserAddr, buf: &mut [u8]) -> Result<(), MemoryError> {
        if buf.len() > 4 * PAGE {
            return self.inner.read(addr, buf);
        }
        let whole = buf.len();
        let mut done = 0;
        while done < whole {
            let at = addr.offset(done as u64);
            let page = at.0 & !(PAGE as u64 - 1);
            let within = (at.0 - page) as usize;
            let len = (PAGE - within).min(whole - done);
            let mut pages = self.pages.borrow_mut();
            if pages.len() >= self.limit && !pages.contains_key(&page) {
                pages.clear();
            }
            let cached = pages.entry(page).or_insert_with(|| {
                let mut bytes = Box::new([0; PAGE]);
                self.inner
                    .read(UserAddr(page), &mut bytes[..])
                    .ok()
                    .map(|()| bytes)
            });
            let Some(bytes) = cached else {
                drop(pages);
                return self.inner.read(addr, buf);
            };
            buf[done..done + len].copy_from_slice(&bytes[within..within + len]);
            done += len;
        }
        Ok(())
    }
}

impl<M: Memory + ?Sized> Memory for &M {
    fn read(&self, addr: UserAddr, buf: &mut [u8]) -> Result<(), MemoryError> {
        (**self).read(addr, buf)
    }
}

/// Saved or made-up memory: a sparse set of regions that do not overlap.
#[derive(Clone, Debug, Default)]
pub struct SavedMemory {
    regions: BTreeMap<u64, Vec<u8>>,
}

impl SavedMemory {
    /// No memory at all.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a region. A region that begins at the same address is replaced.
    pub fn insert(&mut self, addr: UserAddr, bytes: impl Into<Vec<u8>>) {
        self.regions.insert(addr.0, bytes.into());
    }

    /// Overwrites bytes of an existing region.
    pub fn write(&mut self, addr: UserAddr, bytes: &[u8]) -> Result<(), MemoryError> {
        let unmapped = MemoryError::Unmapped {
            addr,
            len: bytes.len(),
        };
        let (start, region) = self
            .regions
            .range_mut(..=addr.0)
            .next_back()
            .ok_or(unmapped.clone())?;
        let within = (addr.0 - start) as usize;
        let end = within
            .checked_add(bytes.len())
            .filter(|&end| end <= region.len())
            .ok_or(unmapped)?;
        region[within..end].copy_from_slice(bytes);
        Ok(())
    }
}

impl Memory for SavedMemory {
    fn read(&self, addr: UserAddr, buf: &mut [u8]) -> Result<(), MemoryError> {
        let unmapped = || MemoryError::Unmapped {
            addr,
            len: buf.len(),
        };
        let (start, region) = self
            .regions
            .range(..=addr.0)
            .next_back()
            .ok_or_else(unmapped)?;
        let within = (addr.0 - start) as usize;
        let end = within
            .checked_add(buf.len())
            .filter(|&end| end <= region.len())
            .ok_or_else(unmapped)?;
        buf.copy_from_slice(&region[within..end]);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn own() -> ProcessMemory {
        ProcessMemory::new(Pid(std::process::id()))
    }

    #[test]
    fn a_process_reads_and_writes_its_own_memory() {
        let value: Box<[u64; 2]> = Box::new([7, 8]);
        let addr = UserAddr((&raw const *value).expose_provenance() as u64);
        assert_eq!(own().read_u64(addr).unwrap(), 7);
        own()
            .write_many(&[
                (addr.offset(8), &9_u64.to_le_bytes()),
                (addr, &10_u64.to_le_bytes()),
            ])
            .unwrap();
        assert_eq!(own().read_u64(addr).unwrap(), 10);
        assert_eq!(own().read_u64(addr.offset(8)).unwrap(), 9);
    }

    #[test]
    fn wild_pointers_are_errors() {
        for addr in [
            0,
            8,
            0xffff_ffff_ffff_fff8,
            0xdead_beef_dead_beef,
            0x7fff_ffff_f000,
        ] {
            assert!(own().read_u64(UserAddr(addr)).is_err(), "{addr:#x}");
            assert!(
                CachedMemory::new(own()).read_u64(UserAddr(addr)).is_err(),
                "{addr:#x}"
            );
        }
    }

    #[test]
    fn read_only_memory_is_not_written() {
        static CONSTANT: [u8; 8] = *b"constant";
        let addr = UserAddr(CONSTANT.as_ptr().expose_provenance() as u64);
        assert!(matches!(
            own().write(addr, b"CONSTANT"),
            Err(MemoryError::Unmapped { .. })
        ));
        assert_eq!(&CONSTANT, b"constant");
    }

    #[test]
    fn a_process_that_does_not_exist_is_gone() {
        let memory = ProcessMemory::new(Pid(0x3fff_ffff));
        assert_eq!(
            memory.read_u8(UserAddr(4096)),
            Err(MemoryError::Gone { pid: memory.pid() })
        );
    }

    #[test]
    fn the_cache_serves_reads_across_pages_and_falls_back_at_the_edge_of_a_mapping() {
        let mut saved = SavedMemory::new();
        let bytes: Vec<u8> = (0..3 * PAGE).map(|i| (i % 251) as u8).collect();
        saved.insert(UserAddr(0x10000), bytes.clone());
        // Not a whole page.
        saved.insert(UserAddr(0x20000), b"tail".to_vec());
        let cached = CachedMemory::with_limit(saved, 2);
        assert_eq!(
            cached.read_bytes(UserAddr(0x10ffe), 4).unwrap(),
            bytes[0xffe..0x1002]
        );
        assert_eq!(
            cached.read_bytes(UserAddr(0x10001), 0x2fff).unwrap(),
            bytes[1..0x3000]
        );
        assert_eq!(cached.read_bytes(UserAddr(0x20000), 4).unwrap(), b"tail");
        assert!(cached.read_u64(UserAddr(0x20000)).is_err());
        assert!(cached.pages.borrow().len() <= 2);
    }

    #[test]
    fn the_cache_forgets_when_told() {
        let mut value = Box::new(1_u64);
        let addr = UserAddr((&raw mut *value).expose_provenance() as u64);
        let cached = CachedMemory::new(own());
        assert_eq!(cached.read_u64(addr).unwrap(), 1);
        own().write(addr, &2_u64.to_le_bytes()).unwrap();
        assert_eq!(cached.read_u64(addr).unwrap(), 1);
        cached.clear();
        assert_eq!(cached.read_u64(addr).unwrap(), 2);
    }

    #[test]
    fn texts_are_bounded() {
        let mut saved = SavedMemory::new();
        saved.insert(
            UserAddr(0x1000),
            [b"name\0".to_vec(), vec![b'x'; 4096]].concat(),
        );
        assert_eq!(saved.read_cstr(UserAddr(0x1000), 10).unwrap(), "name");
        assert_eq!(saved.read_cstr(UserAddr(0x1004), 10).unwrap(), "");
        assert!(matches!(
            saved.read_cstr(UserAddr(0x1005), 1000),
            Err(MemoryError::TooLong { .. })
        ));
        assert!(saved.read_cstr(UserAddr(0x1005), 10_000).is_err());
        assert!(matches!(
            saved.read_bytes(UserAddr(0x1000), usize::MAX),
            Err(MemoryError::TooLong { .. })
        ));
    }
}
