//! The pods of this node, as the Kubernetes API tells them: a list, and from then on a watch of what changes in it.
//!
//! Everything else works without: an API that is absent, refuses, or is slow leaves pods unknown, and what was known stays known. Plain
//! requests, with the client that OTLP goes through: a library for Kubernetes is forty crates more, for two requests.

mod api;
#[cfg(test)]
mod tests;

use std::{
    collections::{BTreeMap, HashMap},
    path::PathBuf,
    sync::{
        Arc, PoisonError, RwLock,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use globset::GlobMatcher;
use opentelemetry::KeyValue;
use opentelemetry_semantic_conventions::attribute as semconv;
use serde::Deserialize;

pub use self::api::{Api, ApiError};
use self::api::{Change, Failure, PodObject};
use super::rules::{Pods, RuleError, glob};

/// Pods that are remembered. A node has 110 unless it is told otherwise.
const MAX_PODS: usize = 4096;
/// Labels and annotations of more bytes are left out.
const MAX_TEXT: usize = 4096;
/// First and longest pause after a failure.
const PAUSES: (Duration, Duration) = (Duration::from_secs(1), Duration::from_mins(1));
/// By which Dagster says to what run a pod belongs.
const DAGSTER_RUN: &str = "dagster/run-id";

/// `kubernetes` in the configuration.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
#[serde(default, deny_unknown_fields)]
pub struct KubernetesSettings {
    /// Watch the pods of this node, if the agent runs in a pod that may.
    pub watch_pods: bool,
    /// Name of the node; without, the variable `K8S_NODE_NAME`.
    pub node: Option<String>,
    /// The API server; without, the one that Kubernetes tells every pod.
    pub server: Option<String>,
    /// The service account's token. It is read again for each request, since it is replaced while the agent runs.
    pub token_file: PathBuf,
    /// Certificates that the API server's is checked with.
    pub ca_file: PathBuf,
    /// Labels of pods that become resource attributes; globs.
    pub label_attributes: Vec<String>,
    /// Annotations, likewise.
    pub annotation_attributes: Vec<String>,
}

impl Default for KubernetesSettings {
    fn default() -> Self {
        let secrets = PathBuf::from("/var/run/secrets/kubernetes.io/serviceaccount");
        Self {
            watch_pods: true,
            node: None,
            server: None,
            token_file: secrets.join("token"),
            ca_file: secrets.join("ca.crt"),
            label_attributes: ["app.kubernetes.io/*", "dagster/*"].map(str::to_owned).to_vec(),
            annotation_attributes: Vec::new(),
        }
    }
}

impl KubernetesSettings {
    /// The globs of labels and of annotations that become attributes.
    pub(super) fn shown(&self) -> Result<[Vec<GlobMatcher>; 2], RuleError> {
        let compile = |key, texts: &[String]| texts.iter().map(|text| glob(key, text)).collect::<Result<_, _>>();
        Ok([
            compile("kubernetes.label_attributes", &self.label_attributes)?,
            compile("kubernetes.annotation_attributes", &self.annotation_attributes)?,
        ])
    }
}

/// What the Kubernetes API says of a pod.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Pod {
    /// Namespace.
    pub namespace: String,
    /// Name.
    pub name: String,
    /// Labels.
    pub labels: BTreeMap<String, String>,
    /// Annotations.
    pub annotations: BTreeMap<String, String>,
    /// Name of its node.
    pub node: Option<String>,
    /// When the kubelet accepted it, as RFC 3339 has it.
    pub started: Option<String>,
    /// Kind and name of what made it and takes care of it.
    pub controller: Option<(String, String)>,
}

impl Pod {
    /// Its uid, and what is kept of it.
    fn of(object: PodObject) -> (String, Self) {
        let PodObject { metadata, spec, status } = object;
        let short = |mut texts: BTreeMap<String, String>| {
            texts.retain(|key, text| key.len() + text.len() <= MAX_TEXT);
            texts
        };
        let controller = metadata.owner_references.into_iter().find(|owner| owner.controller);
        let pod = Self {
            namespace: metadata.namespace,
            name: metadata.name,
            labels: short(metadata.labels),
            annotations: short(metadata.annotations),
            node: spec.node_name,
            started: status.start_time,
            controller: controller.map(|owner| (owner.kind, owner.name)),
        };
        (metadata.uid, pod)
    }

    /// Resource attributes, but for those that are chosen of its labels and annotations.
    pub fn attributes(&self) -> Vec<KeyValue> {
        let mut all = vec![
            KeyValue::new(semconv::K8S_NAMESPACE_NAME, self.namespace.clone()),
            KeyValue::new(semconv::K8S_POD_NAME, self.name.clone()),
        ];
        all.extend(self.node.clone().map(|node| KeyValue::new(semconv::K8S_NODE_NAME, node)));
        all.extend(self.started.clone().map(|time| KeyValue::new(semconv::K8S_POD_START_TIME, time)));
        if let Some((kind, name)) = &self.controller {
            let key = match kind.as_str() {
                "Job" => Some(semconv::K8S_JOB_NAME),
                "ReplicaSet" => Some(semconv::K8S_REPLICASET_NAME),
                "StatefulSet" => Some(semconv::K8S_STATEFULSET_NAME),
                "DaemonSet" => Some(semconv::K8S_DAEMONSET_NAME),
                _ => None,
            };
            all.extend(key.map(|key| KeyValue::new(key, name.clone())));
        }
        all
    }

    /// The Dagster run that it is of.
    pub fn dagster_run(&self) -> Option<&str> {
        self.labels.get(DAGSTER_RUN).map(String::as_str)
    }
}

/// The pods that are known, by their uid.
#[derive(Debug, Default)]
pub struct KnownPods {
    pods: RwLock<HashMap<String, Arc<Pod>>>,
    failures: AtomicU64,
}

impl Pods for KnownPods {
    fn pod(&self, uid: &str) -> Option<Arc<Pod>> {
        self.pods.read().unwrap_or_else(PoisonError::into_inner).get(uid).cloned()
    }

    fn are_watched(&self) -> bool {
        true
    }
}

impl KnownPods {
    /// How many they are.
    pub fn count(&self) -> u64 {
        self.pods.read().unwrap_or_else(PoisonError::into_inner).len() as u64
    }

    /// Requests to the API that failed.
    pub fn failures(&self) -> u64 {
        self.failures.load(Ordering::Relaxed)
    }

    fn replace(&self, objects: Vec<PodObject>) {
        let all = objects.into_iter().take(MAX_PODS).map(Pod::of).map(|(uid, pod)| (uid, Arc::new(pod))).collect();
        *self.pods.write().unwrap_or_else(PoisonError::into_inner) = all;
    }

    fn put(&self, object: PodObject) {
        let (uid, pod) = Pod::of(object);
        let mut pods = self.pods.write().unwrap_or_else(PoisonError::into_inner);
        if pods.len() < MAX_PODS || pods.contains_key(&uid) {
            pods.insert(uid, Arc::new(pod));
        }
    }

    fn remove(&self, uid: &str) {
        self.pods.write().unwrap_or_else(PoisonError::into_inner).remove(uid);
    }
}

/// How far the list is known.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Known {
    /// Not at all. Any state that the server has at hand will do for a beginning.
    Nothing,
    /// What was known has become too old for a watch: only the newest state will do.
    TooOld,
    /// Up to this version.
    Upto(String),
}

/// Follows the pods of the node until the future is dropped.
pub async fn watch(api: Api, pods: Arc<KnownPods>) {
    watch_with(&api, &pods, PAUSES).await;
}

async fn watch_with(api: &Api, pods: &KnownPods, (first, longest): (Duration, Duration)) {
    let mut known = Known::Nothing;
    let mut pause = first;
    let mut failing = false;
    loop {
        let began = Instant::now();
        let listing = !matches!(known, Known::Upto(_));
        let outcome = match &mut known {
            Known::Upto(version) => api.watch(version, |change| apply(pods, change)).await,
            unknown => api.list(*unknown == Known::TooOld).await.map(|(objects, version)| {
                pods.replace(objects);
                known = Known::Upto(version);
            }),
        };
        let wait = match outcome {
            Ok(()) => {
                if std::mem::take(&mut failing) {
                    eprintln!("floe-agent: the pods of this node are known again");
                }
                pause = first;
                // A watch follows its list at once. A server that ends watches at once is not asked without end.
                if listing || began.elapsed() > first { Duration::ZERO } else { first }
            }
            Err(Failure::TooOld) => {
                known = Known::TooOld;
                first
            }
            Err(failure) => {
                pods.failures.fetch_add(1, Ordering::Relaxed);
                // What was not understood may have been a change: all of it again.
                if matches!(failure, Failure::Odd(_)) {
                    known = Known::TooOld;
                }
                if !std::mem::replace(&mut failing, true) {
                    eprintln!(
                        "floe-agent: the pods of this node cannot be read from the Kubernetes API ({failure}); trying again. \
                         What labels and annotations new pods have is not known meanwhile"
                    );
                }
                let longer = (pause * 2).min(longest);
                std::mem::replace(&mut pause, longer)
            }
        };
        tokio::time::sleep(api::jitter(wait)).await;
    }
}

fn apply(pods: &KnownPods, change: Change) {
    match change {
        Change::Added(pod) | Change::Modified(pod) => pods.put(pod),
        Change::Deleted(pod) => pods.remove(&pod.metadata.uid),
        Change::Bookmark(_) | Change::Error(_) => {}
    }
}
