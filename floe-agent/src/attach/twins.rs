//! Files that look different and are one to the kernel: through overlayfs, each container has a device number of its own for
//! the very same file of an image layer. A uprobe is on the file below, so one that is attached through one container fires
//! in all of them, and a second one would fire beside it.

use std::{os::fd::AsRawFd as _, path::Path};

use crate::{
    process::identity,
    python::{
        elf::FileIdentity,
        memory::{Memory as _, ProcessMemory},
    },
    units::{FileOffset, Pid, UserAddr},
};

const PAGE: u64 = 4096;

/// Whether two files could be one: overlayfs passes everything but the device on from the file below.
pub(super) fn alike(a: FileIdentity, b: FileIdentity) -> bool {
    let of = |file: FileIdentity| (file.inode, file.size, file.changed);
    a.device != b.device && of(a) == of(b)
}

/// Whether a file has a breakpoint at an offset, seen as the kernel sees it: it puts breakpoints into every mapping of the
/// file below that could be executed, ours too.
pub(super) fn has_breakpoint(path: &Path, offset: FileOffset) -> bool {
    let Ok(file) = identity::open(path) else { return false };
    let page = offset.0 / PAGE * PAGE;
    // SAFETY: a new private mapping, to which there is no reference.
    let mapped = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            PAGE as usize,
            libc::PROT_READ | libc::PROT_EXEC,
            libc::MAP_PRIVATE,
            file.as_raw_fd(),
            page.cast_signed(),
        )
    };
    if mapped == libc::MAP_FAILED {
        return false;
    }
    // By the kernel: of a file that is cut off meanwhile an access of our own would end in a signal.
    let at = UserAddr(mapped.expose_provenance() as u64).offset(offset.0 - page);
    let byte = ProcessMemory::new(Pid(std::process::id())).read_u8(at);
    // SAFETY: what was mapped above.
    unsafe { libc::munmap(mapped, PAGE as usize) };
    byte == Ok(0xcc)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_alike_when_only_the_device_differs() {
        let file = FileIdentity { device: 1, inode: 2, size: 3, changed: 4 };
        assert!(alike(file, FileIdentity { device: 9, ..file }));
        assert!(!alike(file, file));
        assert!(!alike(file, FileIdentity { device: 9, changed: 5, ..file }));
    }

    #[test]
    fn a_breakpoint_is_a_byte_of_the_mapped_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("code");
        let mut bytes = vec![0x90; 8192];
        bytes[5000] = 0xcc;
        std::fs::write(&path, bytes).unwrap();
        assert!(has_breakpoint(&path, FileOffset(5000)));
        assert!(!has_breakpoint(&path, FileOffset(5001)));
        assert!(!has_breakpoint(&folder.path().join("none"), FileOffset(0)));
        assert!(!has_breakpoint(&path, FileOffset(1 << 20)), "behind the file's end");
    }
}
