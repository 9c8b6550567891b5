//! The capabilities of the agent: which it needs, and giving up the others.

use caps::{CapSet, Capability, CapsHashSet};
use thiserror::Error;

/// What the node agent keeps, and what for.
pub const KEPT: [(Capability, &str); 6] = [
    (
        Capability::CAP_SYS_ADMIN,
        "attach uprobes through the perf PMU; it stands for CAP_BPF, CAP_PERFMON and CAP_CHECKPOINT_RESTORE too",
    ),
    (Capability::CAP_BPF, "load eBPF programs"),
    (Capability::CAP_PERFMON, "load eBPF programs that read memory"),
    (
        Capability::CAP_SYS_PTRACE,
        "read and arm processes: /proc/<pid>/root, /proc/<pid>/exe, process_vm_readv and process_vm_writev",
    ),
    (Capability::CAP_DAC_READ_SEARCH, "read interpreter files of every user"),
    (Capability::CAP_SYS_NICE, "real-time priority for the thread that answers waiting processes; works without"),
];

/// Capabilities could not be given up.
#[derive(Debug, Error)]
#[error("cannot give up capabilities that are not needed: {0}")]
pub struct PrivilegeError(String);

/// Gives up all capabilities but those in [`KEPT`], for good and for children too. Must be called while the process has
/// one thread: capabilities belong to threads. Gives those that are left.
pub fn drop_others() -> Result<Vec<Capability>, PrivilegeError> {
    let failed = |error: caps::errors::CapsError| PrivilegeError(error.to_string());
    let had = caps::read(None, CapSet::Permitted).map_err(failed)?;
    let keep: CapsHashSet =
        KEPT.iter().map(|(capability, _)| *capability).filter(|capability| had.contains(capability)).collect();
    // The bounding set first, while CAP_SETPCAP is there: it is what a child of root would get.
    if caps::has_cap(None, CapSet::Effective, Capability::CAP_SETPCAP).map_err(failed)? {
        for capability in caps::read(None, CapSet::Bounding).map_err(failed)? {
            if !keep.contains(&capability) {
                caps::drop(None, CapSet::Bounding, capability).map_err(failed)?;
            }
        }
    }
    caps::clear(None, CapSet::Ambient).map_err(failed)?;
    caps::clear(None, CapSet::Inheritable).map_err(failed)?;
    caps::set(None, CapSet::Effective, &keep).map_err(failed)?;
    caps::set(None, CapSet::Permitted, &keep).map_err(failed)?;
    // SAFETY: a plain system call with numbers.
    if unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) } != 0 {
        return Err(PrivilegeError(format!("PR_SET_NO_NEW_PRIVS: {}", std::io::Error::last_os_error())));
    }
    let mut left: Vec<_> = keep.into_iter().collect();
    left.sort_by_key(ToString::to_string);
    Ok(left)
}
