//! Trying return probes before they are used on anybody.
//!
//! A return probe ends in a trap or, since Linux 6.11, in a system call of its own. Under a seccomp filter that does not
//! know that call, kernels between 6.11 and the fix kill the process. So a child of the agent's own goes first: it installs
//! a filter like a container runtime's (everything but a list is refused) and calls a probed function.

use std::{
    os::unix::process::ExitStatusExt as _,
    path::Path,
    process::{Command, Stdio},
};

use seccompiler::{BpfProgram, SeccompAction, SeccompFilter, TargetArch};

use super::{Kernel, KernelError, Site};
use crate::{
    process::maps,
    units::{FileOffset, Pid, UserAddr},
};

/// Hidden argument that makes the agent the child of a trial.
pub const ARGUMENT: &str = "__return-probe-trial";
/// Exit code of a child that lives.
const ALIVE: i32 = 42;

/// What the trial found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Trial {
    /// Return probes work under a seccomp filter.
    Works,
    /// They do not: processes under a filter are left alone. What happened to the child.
    Fails(String),
}

/// The probed function of the trial.
#[inline(never)]
#[unsafe(no_mangle)]
extern "C" fn floe_agent_trial_target(value: u64) -> u64 {
    std::hint::black_box(value).wrapping_mul(3)
}

/// System calls of the child's filter: what a process needs to write a line and end.
const ALLOWED: &[libc::c_long] = &[
    libc::SYS_read,
    libc::SYS_write,
    libc::SYS_close,
    libc::SYS_mmap,
    libc::SYS_munmap,
    libc::SYS_mprotect,
    libc::SYS_brk,
    libc::SYS_madvise,
    libc::SYS_futex,
    libc::SYS_sigaltstack,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_exit,
    libc::SYS_exit_group,
];

/// The child: never returns.
pub fn child() -> ! {
    let filter = SeccompFilter::new(
        ALLOWED.iter().map(|&call| (call, vec![])).collect(),
        SeccompAction::Errno(libc::EPERM.cast_unsigned()),
        SeccompAction::Allow,
        TargetArch::x86_64,
    )
    .and_then(BpfProgram::try_from);
    let code = match filter.map(|program| seccompiler::apply_filter(&program)) {
        Ok(Ok(())) if floe_agent_trial_target(14) == 42 => ALIVE,
        _ => 1,
    };
    std::process::exit(code)
}

/// Makes the trial with the gate's programs on this executable.
pub fn run(kernel: &mut Kernel) -> Result<Trial, KernelError> {
    let address = UserAddr(floe_agent_trial_target as *const () as u64);
    let own = Pid(std::process::id());
    let Some(mapping) = maps::read(own).ok().and_then(|maps| maps.into_iter().find(|m| m.contains(address))) else {
        return Ok(Trial::Fails("the agent's own executable is not mapped from a file".into()));
    };
    let offset = FileOffset(address.0 - mapping.start.0 + mapping.offset.0);
    let file = Path::new("/proc/self/exe");
    // They stay: detaching takes the kernel hundreds of milliseconds, and nobody else calls this function.
    kernel.attach(Site::GateEnter, file, offset, None)?;
    kernel.attach(Site::GateReturn, file, offset, None)?;
    let status = Command::new("/proc/self/exe")
        .arg(ARGUMENT)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status();
    kernel.count_own_hit();
    Ok(match status {
        Ok(status) if status.code() == Some(ALIVE) => Trial::Works,
        Ok(status) => Trial::Fails(match status.signal() {
            Some(signal) => format!("the test process was killed by signal {signal}"),
            None => format!("the test process ended with {status}"),
        }),
        Err(error) => Trial::Fails(format!("the test process did not start: {error}")),
    })
}
