//! Keeping the kernel from optimising a uprobe on a five-byte NOP.
//!
//! Linux 6.18 replaces a breakpoint on `0f 1f 44 00 00` after its first hit by a call to a trampoline page that it maps into
//! the process. A forked child gets the call but not the page (the mapping is `VM_DONTCOPY`) and dies at its next watched
//! function: measured with CPython 3.8 on 6.18.44, whose gate can only be such a NOP. The kernel tries once per probe; if
//! the trampoline finds no room within 2 GiB of the probe, it sets a flag on the probe and never tries again, in any
//! process (`arch_uprobe_optimize`, arch/x86/kernel/uprobes.c).
//!
//! So before the probe is attached for everybody, it is attached for a child of the agent's own that has mapped the file
//! between gigabytes of reserved addresses. The child is made to execute the NOP, one step under ptrace, and is killed.

use std::{
    fs::File,
    io::{Read as _, Write as _},
    os::fd::AsRawFd as _,
    path::Path,
    process::{Child, Command, Stdio},
};

use super::{Kernel, Site};
use crate::units::{FileOffset, Tid};

/// Hidden argument that makes the agent the child; the file and the offset follow.
pub const ARGUMENT: &str = "__nop5-child";
/// The instruction that the kernel optimises.
pub const NOP5: [u8; 5] = [0x0f, 0x1f, 0x44, 0x00, 0x00];
/// Reserved on both sides: more than a call reaches.
const SIDE: usize = 3 << 30;
const PAGE: usize = 4096;

/// The child: maps the file, says where, and waits to be killed.
pub fn child(path: &str, offset: u64) -> ! {
    let code = match map(path, offset) {
        Some(address) => {
            let mut out = std::io::stdout();
            let _ = out.write_all(&address.to_le_bytes()).and_then(|()| out.flush());
            let _ = std::io::stdin().read(&mut [0]);
            0
        }
        None => 1,
    };
    std::process::exit(code)
}

fn map(path: &str, offset: u64) -> Option<u64> {
    let file = File::open(path).ok()?;
    let in_page = offset as usize % PAGE;
    // SAFETY: new mappings; the second replaces a part of the first, which nobody uses.
    unsafe {
        let reserved = libc::mmap(
            std::ptr::null_mut(),
            2 * SIDE,
            libc::PROT_NONE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
            -1,
            0,
        );
        if reserved == libc::MAP_FAILED {
            return None;
        }
        let page = libc::mmap(
            reserved.cast::<u8>().add(SIDE).cast(),
            2 * PAGE,
            libc::PROT_READ | libc::PROT_EXEC,
            libc::MAP_PRIVATE | libc::MAP_FIXED,
            file.as_raw_fd(),
            (offset as usize - in_page).cast_signed() as libc::off_t,
        );
        (page != libc::MAP_FAILED).then(|| page as u64 + in_page as u64)
    }
}

/// Makes the kernel give up optimising the probe at this place. The probe stays attached, to the dead child, so that the
/// kernel's flag lives on: detaching would also hold up whoever attaches next.
pub fn give_up_optimising(kernel: &mut Kernel, file: &Path, offset: FileOffset) -> Result<(), String> {
    // The path may be one of our own descriptors.
    let file_for_child = match file.strip_prefix("/proc/self") {
        Ok(rest) => Path::new("/proc").join(std::process::id().to_string()).join(rest),
        Err(_) => file.to_owned(),
    };
    let mut child = Command::new("/proc/self/exe")
        .arg(ARGUMENT)
        .arg(file_for_child)
        .arg(offset.0.to_string())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .map_err(|error| format!("the test process did not start: {error}"))?;
    let result = hit_in_child(kernel, &mut child, file, offset);
    let _ = child.kill();
    let _ = child.wait();
    result
}

fn hit_in_child(kernel: &mut Kernel, child: &mut Child, file: &Path, offset: FileOffset) -> Result<(), String> {
    let pid = child.id().cast_signed();
    let mut address = [0; 8];
    let read = child.stdout.take().ok_or("no pipe")?.read_exact(&mut address);
    read.map_err(|_| "the test process could not map the interpreter's file".to_owned())?;
    let address = u64::from_le_bytes(address);
    let link =
        kernel.attach(Site::GateEnter, file, offset, Some(Tid(child.id()))).map_err(|error| error.to_string())?;
    match step(pid, address) {
        // A call (e8) there would mean that the kernel did optimise.
        Ok(0xcc) => {
            kernel.count_own_hit();
            Ok(())
        }
        Ok(byte) => {
            kernel.detach([link]);
            Err(format!("after a hit there is the byte {byte:02x} and no breakpoint"))
        }
        Err(error) => {
            kernel.detach([link]);
            Err(format!("the test process could not be stepped: {error}"))
        }
    }
}

/// Lets a process execute the instruction at an address, and gives the byte that is there afterwards.
fn step(pid: libc::pid_t, address: u64) -> std::io::Result<u8> {
    let check = |result: libc::c_long| if result < 0 { Err(std::io::Error::last_os_error()) } else { Ok(result) };
    let wait = || {
        let mut status = 0;
        // SAFETY: waits for our own child; the status is ours.
        check(libc::c_long::from(unsafe { libc::waitpid(pid, &raw mut status, libc::__WALL) }))?;
        if libc::WIFSTOPPED(status) { Ok(()) } else { Err(std::io::Error::other("it ended")) }
    };
    let none = std::ptr::null_mut::<libc::c_void>();
    // SAFETY: ptrace of our own child, which exists for this and is killed after it; the registers are a whole structure.
    unsafe {
        check(libc::ptrace(libc::PTRACE_ATTACH, pid, none, none))?;
        wait()?;
        let mut registers = std::mem::MaybeUninit::<libc::user_regs_struct>::zeroed().assume_init();
        check(libc::ptrace(libc::PTRACE_GETREGS, pid, none, &raw mut registers))?;
        registers.rip = address;
        registers.orig_rax = u64::MAX; // no system call to restart
        check(libc::ptrace(libc::PTRACE_SETREGS, pid, none, &raw const registers))?;
        check(libc::ptrace(libc::PTRACE_SINGLESTEP, pid, none, none))?;
        wait()?;
        *libc::__errno_location() = 0;
        let word = libc::ptrace(libc::PTRACE_PEEKTEXT, pid, address, none);
        if word == -1 && *libc::__errno_location() != 0 {
            return Err(std::io::Error::last_os_error());
        }
        Ok(word.to_le_bytes()[0])
    }
}
