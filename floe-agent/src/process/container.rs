//! Which container a process is in, as the path of its control group tells.
//!
//! Container runtimes name the control group of a container after it, each in its own way; the kubelet puts the pod's uid
//! into the folder above. The path is the kernel's word, not the process's: what a process writes into its environment does
//! not matter here.

use std::{fs::File, io::Read as _};

use opentelemetry::KeyValue;
use opentelemetry_semantic_conventions::attribute as semconv;

use crate::{process::identity, units::Pid};

/// Most bytes of a file of `/proc` that are read.
const MAX_BYTES: u64 = 256 << 10;
/// Where a pod that may talk to the Kubernetes API finds its own namespace, below its root directory.
const NAMESPACE_FILE: &str = "var/run/secrets/kubernetes.io/serviceaccount/namespace";

/// What the control groups of a process say.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Container {
    /// Path of the control group: of version 2, else of the first hierarchy that names a container, else of the first.
    pub cgroup: String,
    /// Id that the container runtime gave the container, 64 hexadecimal digits as a rule.
    pub id: Option<String>,
    /// Uid of the Kubernetes pod.
    pub pod_uid: Option<String>,
}

impl Container {
    /// Of a process; of one that has ended, nothing.
    pub fn of(pid: Pid) -> Self {
        let mut found = Self::parse(&read(pid, "cgroup"));
        // Where the container has hidden its control groups, the mounts that the runtime made name it.
        found.id = found.id.or_else(|| id_in_mounts(&read(pid, "mountinfo")));
        found
    }

    /// From the text of `/proc/<pid>/cgroup`: lines `hierarchy:controllers:path`.
    pub fn parse(text: &str) -> Self {
        let paths: Vec<&str> = text.lines().filter_map(|line| line.splitn(3, ':').nth(2)).collect();
        let of = |path: &&str| {
            let segments: Vec<&str> = path.split('/').collect();
            let id = segments.iter().rev().find_map(|segment| container_id(segment));
            let pod_uid = segments.iter().rev().find_map(|segment| pod_uid(segment));
            Self { cgroup: (*path).to_owned(), id, pod_uid }
        };
        let unified = text.lines().find_map(|line| line.strip_prefix("0::"));
        let unified = unified.as_ref().map(of);
        let named = |found: &Self| found.id.is_some() || found.pod_uid.is_some();
        // Where both versions are mounted, the unified hierarchy may hold no containers.
        unified
            .clone()
            .filter(named)
            .or_else(|| paths.iter().map(of).find(named))
            .or(unified)
            .or_else(|| paths.first().map(of))
            .unwrap_or_default()
    }

    /// Whether it is in a container or a pod.
    pub fn is_some(&self) -> bool {
        self.id.is_some() || self.pod_uid.is_some()
    }
}

/// The id of a process's container.
pub fn id(pid: Pid) -> Option<String> {
    Container::of(pid).id
}

/// A file of a process; empty if it has ended.
fn read(pid: Pid, name: &str) -> String {
    let mut text = Vec::new();
    let file = File::open(format!("/proc/{pid}/{name}"));
    let _ = file.and_then(|file| file.take(MAX_BYTES).read_to_end(&mut text));
    String::from_utf8_lossy(&text).into_owned()
}

/// From a mount of `/etc/hostname` like `/var/lib/docker/containers/<id>/hostname`.
fn id_in_mounts(text: &str) -> Option<String> {
    let line = text.lines().find(|line| line.contains(" /etc/hostname "))?;
    line.split(['/', ' ']).find_map(container_id)
}

/// The id in a segment like `<id>`, `docker-<id>.scope`, `cri-containerd-<id>.scope`, `crio-<id>`, `libpod-<id>.scope` or
/// `<pod>:cri-containerd:<id>`. Processes that watch a container (`crio-conmon-<id>`) are not in it.
fn container_id(segment: &str) -> Option<String> {
    let segment = segment.strip_suffix(".scope").unwrap_or(segment);
    if segment.contains("conmon") {
        return None;
    }
    let hex = |text: &str| text.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b));
    let last = segment.rsplit([':', '-']).next()?;
    if last.len() == 64 && hex(last) {
        return Some(last.to_owned());
    }
    // Amazon ECS on Fargate: a task's 32 digits, a dash, and decimal digits.
    let (task, number) = segment.rsplit(':').next()?.split_once('-')?;
    let ecs = task.len() == 32 && hex(task) && number.len() >= 9 && number.bytes().all(|b| b.is_ascii_digit());
    ecs.then(|| format!("{task}-{number}"))
}

/// The uid in a segment like `pod<uid>` or `kubepods-burstable-pod<uid>.slice`, which systemd writes with underscores.
/// Static pods have 32 digits without dashes.
fn pod_uid(segment: &str) -> Option<String> {
    let segment = segment.strip_suffix(".slice").unwrap_or(segment);
    // With an external cgroup manager the segment can be `kubepods-pod<uid>.slice:cri-containerd:<id>`.
    let segment = segment.split(':').next()?;
    let segment = segment.strip_suffix(".slice").unwrap_or(segment);
    let (_, uid) = segment.rsplit_once("pod")?;
    let uid = uid.replace('_', "-");
    let hex = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_hexdigit());
    let groups: Vec<&str> = uid.split('-').collect();
    let lengths: Vec<usize> = groups.iter().map(|group| group.len()).collect();
    let valid = groups.iter().all(|group| hex(group)) && matches!(lengths[..], [8, 4, 4, 4, 12] | [32]);
    valid.then_some(uid)
}

/// Names of the pod that its own file system and start environment tell. They are the pod's word: good enough for a label,
/// and there without the Kubernetes API.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PodNames {
    /// Namespace.
    pub namespace: Option<String>,
    /// The pod's name, which is its host name unless it uses the host's network.
    pub pod: Option<String>,
}

impl PodNames {
    /// Of a process in a pod.
    pub fn of(pid: Pid) -> Self {
        let namespace = identity::file(pid, NAMESPACE_FILE, 256).ok().and_then(|text| String::from_utf8(text).ok());
        let name = |text: String| Some(text.trim().to_owned()).filter(|text| is_dns_name(text));
        let environ = identity::Environ::read(pid).unwrap_or_default();
        Self { namespace: namespace.and_then(name), pod: environ.get("HOSTNAME").and_then(name) }
    }
}

/// Whether a text can be the name of a Kubernetes object.
pub(crate) fn is_dns_name(text: &str) -> bool {
    !text.is_empty()
        && text.len() <= 253
        && text.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-' || b == b'.')
}

/// Resource attributes of a process that tell where it runs, beside its container's id: its pid in its own pid namespace, its
/// pod.
pub fn attributes(pid: Pid) -> Vec<KeyValue> {
    let mut all = Vec::new();
    let status = identity::Status::read(pid).ok();
    if let Some(inner) = status.and_then(|status| (status.ns_pids.len() > 1).then(|| status.ns_pids.last().copied()))
        && let Some(inner) = inner
    {
        all.push(KeyValue::new(semconv::PROCESS_VPID, i64::from(inner)));
    }
    let container = Container::of(pid);
    if let Some(uid) = &container.pod_uid {
        all.push(KeyValue::new(semconv::K8S_POD_UID, uid.clone()));
        let PodNames { namespace, pod } = PodNames::of(pid);
        all.extend(namespace.map(|name| KeyValue::new(semconv::K8S_NAMESPACE_NAME, name)));
        all.extend(pod.map(|name| KeyValue::new(semconv::K8S_POD_NAME, name)));
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: &str = "e3f8c9a1b2d4567890abcdef1234567890abcdef1234567890abcdef12345678";
    const UID: &str = "0f2e1d3c-4b5a-6978-8796-a5b4c3d2e1f0";

    /// What is found in one path of version 2.
    fn found(path: &str) -> (Option<String>, Option<String>) {
        let found = Container::parse(&format!("0::{path}\n"));
        assert_eq!(found.cgroup, path);
        (found.id, found.pod_uid)
    }

    #[test]
    fn containers_of_every_runtime_are_found_in_their_paths() {
        for path in [
            format!("/docker/{ID}"),
            format!("/system.slice/docker-{ID}.scope"),
            format!("/system.slice/docker-{ID}.scope/init.scope"),
            format!("/docker/{ID}/system.slice/app.service"),
            format!("/default/{ID}"),
            format!("/system.slice/nerdctl-{ID}.scope"),
            format!("/system.slice/containerd.service/default:nerdctl:{ID}"),
            format!("/machine.slice/libpod-{ID}.scope/container"),
            format!("/user.slice/user-1000.slice/user@1000.service/user.slice/libpod-{ID}.scope"),
            format!("/libpod_parent/libpod-{ID}"),
            format!("/../../libpod-{ID}.scope"),
        ] {
            assert_eq!(found(&path), (Some(ID.to_owned()), None), "{path}");
        }
        let fargate = "/ecs/8f1e2d3c4b5a69788796a5b4c3d2e1f0/8f1e2d3c4b5a69788796a5b4c3d2e1f0-2531612879";
        assert_eq!(found(fargate).0.as_deref(), Some("8f1e2d3c4b5a69788796a5b4c3d2e1f0-2531612879"));
    }

    #[test]
    fn pods_are_found_with_both_cgroup_drivers_and_both_versions() {
        let underscores = UID.replace('-', "_");
        for path in [
            format!("/kubepods/burstable/pod{UID}/{ID}"),
            format!("/kubepods/pod{UID}/{ID}"),
            format!("/kubepods.slice/kubepods-pod{underscores}.slice/cri-containerd-{ID}.scope"),
            format!(
                "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{underscores}.slice/crio-{ID}.scope"
            ),
            format!(
                "/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod{underscores}.slice/docker-{ID}.scope"
            ),
            format!("/system.slice/containerd.service/kubepods-burstable-pod{underscores}.slice:cri-containerd:{ID}"),
            format!(
                "/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-pod{underscores}.slice/cri-containerd-{ID}.scope"
            ),
            format!(
                "/../../kubepods-besteffort.slice/kubepods-besteffort-pod{underscores}.slice/cri-containerd-{ID}.scope"
            ),
        ] {
            assert_eq!(found(&path), (Some(ID.to_owned()), Some(UID.to_owned())), "{path}");
        }
        // A static pod, and a process of a pod outside its containers.
        let fixed = "d4c1a2b3d4c1a2b3d4c1a2b3d4c1a2b3";
        assert_eq!(
            found(&format!("/kubepods/burstable/pod{fixed}/{ID}")),
            (Some(ID.to_owned()), Some(fixed.to_owned()))
        );
        assert_eq!(found(&format!("/kubepods/pod{UID}")), (None, Some(UID.to_owned())));
    }

    #[test]
    fn version_1_names_the_container_in_each_hierarchy() {
        let text = format!(
            "12:pids:/kubepods/burstable/pod{UID}/{ID}\n5:cpu,cpuacct:/kubepods/burstable/pod{UID}/{ID}\n\
             1:name=systemd:/kubepods/burstable/pod{UID}/{ID}\n0::/system.slice/containerd.service\n"
        );
        let found = Container::parse(&text);
        assert_eq!((found.id.as_deref(), found.pod_uid.as_deref()), (Some(ID), Some(UID)));
        assert_eq!(found.cgroup, format!("/kubepods/burstable/pod{UID}/{ID}"));
    }

    #[test]
    fn what_is_no_container_is_none() {
        for path in [
            "/",
            "/user.slice/user-1000.slice/session-2.scope",
            "/system.slice/cron.service",
            "/user.slice/user-1000.slice/user@1000.service/app.slice/app-org.gnome.Terminal.slice/vte-spawn-0f2e1d3c-4b5a-6978-8796-a5b4c3d2e1f0.scope",
            "/podium.slice",
            "/pod/pod",
        ] {
            assert_eq!(found(path), (None, None), "{path}");
        }
        let conmon = format!("/machine.slice/libpod-conmon-{ID}.scope");
        assert_eq!(found(&conmon).0, None);
        assert_eq!(found(&format!("/kubepods.slice/crio-conmon-{ID}.scope")).0, None);
        assert_eq!(Container::parse(""), Container::default());
        assert_eq!(Container::parse("garbage\n::\n"), Container::default());
        let mounts =
            format!("1 2 0:1 / / rw - overlay\n3 4 8:1 /docker/containers/{ID}/hostname /etc/hostname rw - ext4\n");
        assert_eq!(id_in_mounts(&mounts).as_deref(), Some(ID));
        assert_eq!(id_in_mounts("3 4 8:1 / /etc/hostname rw - ext4"), None);
    }

    #[test]
    fn the_own_process_has_a_control_group_or_none() {
        let own = Container::of(Pid(std::process::id()));
        assert!(own.cgroup.is_empty() || own.cgroup.starts_with('/'), "{own:?}");
        assert_eq!(Container::of(Pid(u32::MAX)), Container::default());
    }
}
