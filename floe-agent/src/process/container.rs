//! Which container a process is in.

use crate::units::Pid;

/// Length of the ids that container runtimes give.
const ID: usize = 64;

/// The id of the process's container, if it is in one.
pub fn id(pid: Pid) -> Option<String> {
    let read = |name: &str| std::fs::read_to_string(format!("/proc/{pid}/{name}")).unwrap_or_default();
    // With cgroup namespaces the path may be empty; then the runtime's mounts name it.
    from_cgroup(&read("cgroup")).or_else(|| from_mounts(&read("mountinfo")))
}

/// From a path like `0::/kubepods.slice/.../cri-containerd-<id>.scope` or `0::/docker/<id>`.
fn from_cgroup(text: &str) -> Option<String> {
    text.lines().filter_map(|line| line.rsplit('/').next()).find_map(|name| {
        let name = name.strip_suffix(".scope").unwrap_or(name);
        let id = name.get(name.len().checked_sub(ID)?..)?;
        let before = &name[..name.len() - ID];
        (is_id(id) && (before.is_empty() || before.ends_with(['-', ':']))).then(|| id.to_owned())
    })
}

/// From a mount of `/etc/hostname` like `/var/lib/docker/containers/<id>/hostname`.
fn from_mounts(text: &str) -> Option<String> {
    let line = text.lines().find(|line| line.contains(" /etc/hostname "))?;
    line.split(['/', ' ']).find(|part| part.len() == ID && is_id(part)).map(str::to_owned)
}

fn is_id(text: &str) -> bool {
    text.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runtimes_name_the_container_in_the_cgroup_or_in_a_mount() {
        let id = "0123456789abcdef".repeat(4);
        for path in [
            format!("0::/docker/{id}\n"),
            format!("12:pids:/\n0::/kubepods.slice/kubepods-pod12.slice/cri-containerd-{id}.scope\n"),
            format!("1:name=systemd:/kubepods/burstable/pod1/{id}"),
            format!("0::/machine.slice/libpod-{id}.scope"),
            format!("0::/system.slice/containerd.service/kubepods-pod1:cri-containerd:{id}"),
        ] {
            assert_eq!(from_cgroup(&path).as_deref(), Some(&*id), "{path}");
        }
        for path in ["0::/\n", "0::/user.slice/session-2.scope", "", &format!("0::/x{id}"), &format!("0::/{id}0")] {
            assert_eq!(from_cgroup(path), None, "{path}");
        }
        let mounts =
            format!("1 2 0:1 / / rw - overlay\n3 4 8:1 /docker/containers/{id}/hostname /etc/hostname rw - ext4\n");
        assert_eq!(from_mounts(&mounts).as_deref(), Some(&*id));
    }
}
