//! The rules in force, shared by the thread that answers waiting processes and the one that looks for running ones.

use std::sync::{
    Arc, Mutex, PoisonError, RwLock,
    atomic::{AtomicU64, Ordering},
};

use globset::GlobMatcher;
use opentelemetry::KeyValue;
use opentelemetry_semantic_conventions::attribute as semconv;

use super::{
    kubernetes::{KubernetesSettings, Pod},
    rules::{Candidate, Discovery, Pods, RuleError, Rules},
    users::Users,
};
use crate::{
    attach::{Judgement, Select},
    process::container::{self, Container},
    units::Pid,
};

/// Processes that wait for another look at most; what goes beyond is found by the next scan.
const MAX_LATER: usize = 4096;

/// Judges processes by the rules in force.
pub struct Selector {
    rules: RwLock<Arc<Rules>>,
    discovery: Mutex<Discovery>,
    users: Users,
    pods: Arc<dyn Pods>,
    /// Labels and annotations that become resource attributes.
    shown: [Vec<GlobMatcher>; 2],
    /// Python processes that did not match when they started. What they import, or their pod, may still select them.
    later: Mutex<Vec<Pid>>,
    judged: AtomicU64,
}

impl std::fmt::Debug for Selector {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Selector").field("rules", &self.rules).finish_non_exhaustive()
    }
}

impl Selector {
    /// With these rules, and the pods as they are known by and by.
    pub fn new(discovery: Discovery, kubernetes: &KubernetesSettings, pods: Arc<dyn Pods>) -> Result<Self, RuleError> {
        let rules = RwLock::new(Arc::new(Rules::new(&discovery)?));
        let shown = kubernetes.shown()?;
        let (discovery, later) = (Mutex::new(discovery), Mutex::default());
        Ok(Self { rules, discovery, users: Users::read(), pods, shown, later, judged: AtomicU64::new(0) })
    }

    /// Puts other rules into force; whether they are others. If they cannot be used the old ones stay.
    pub fn set_rules(&self, discovery: &Discovery) -> Result<bool, RuleError> {
        let mut current = self.discovery.lock().unwrap_or_else(PoisonError::into_inner);
        if *current == *discovery {
            return Ok(false);
        }
        let rules = Arc::new(Rules::new(discovery)?);
        *self.rules.write().unwrap_or_else(PoisonError::into_inner) = rules;
        current.clone_from(discovery);
        Ok(true)
    }

    /// The rules in force.
    pub fn rules(&self) -> Arc<Rules> {
        self.rules.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// What the rules say of a process that imports these packages; if they are not known, of its command line.
    pub fn judge_importing(&self, pid: Pid, packages: Option<Vec<String>>) -> Judgement {
        let candidate = Candidate::new(pid, &self.users, &*self.pods);
        self.rules().judge(&match packages {
            Some(packages) => candidate.importing(packages),
            None => candidate,
        })
    }

    /// Takes the processes that did not match at their start since the last call.
    pub fn take_later(&self) -> Vec<Pid> {
        std::mem::take(&mut self.later.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn pod(&self, pid: Pid) -> Option<Arc<Pod>> {
        self.pods.pod(Container::of(pid).pod_uid.as_deref()?)
    }

    /// Processes that were judged.
    pub fn judged(&self) -> u64 {
        self.judged.load(Ordering::Relaxed)
    }
}

impl Select for Selector {
    fn judge(&self, pid: Pid) -> Judgement {
        self.judged.fetch_add(1, Ordering::Relaxed);
        let rules = self.rules();
        let judgement = rules.judge(&Candidate::new(pid, &self.users, &*self.pods));
        if judgement == Judgement::NotSelected && rules.may_change() {
            let mut later = self.later.lock().unwrap_or_else(PoisonError::into_inner);
            if later.len() < MAX_LATER {
                later.push(pid);
            }
        }
        judgement
    }

    fn attributes(&self, pid: Pid) -> Vec<KeyValue> {
        let mut all = container::attributes(pid);
        let Some(pod) = self.pod(pid) else { return all };
        // The API's word counts more than the pod's.
        let of_pod = pod.attributes();
        all.retain(|known| of_pod.iter().all(|attribute| attribute.key != known.key));
        all.extend(of_pod);
        let texts = [(semconv::K8S_POD_LABEL, &pod.labels), (semconv::K8S_POD_ANNOTATION, &pod.annotations)];
        for ((prefix, texts), globs) in texts.into_iter().zip(&self.shown) {
            let shown = texts.iter().filter(|(key, _)| globs.iter().any(|glob| glob.is_match(key)));
            all.extend(shown.map(|(key, text)| KeyValue::new(format!("{prefix}.{key}"), text.clone())));
        }
        all
    }

    fn dagster_run(&self, pid: Pid) -> Option<String> {
        self.pod(pid)?.dagster_run().map(str::to_owned)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::node::rules::{NoPods, Rule};

    #[test]
    fn rules_can_be_replaced_and_bad_ones_leave_the_old_in_force() {
        let own = Pid(std::process::id());
        let selector = Selector::new(Discovery::default(), &KubernetesSettings::default(), Arc::new(NoPods)).unwrap();
        assert_eq!(selector.judge(own), Judgement::NotSelected);
        assert_eq!(selector.take_later(), [own]);
        assert_eq!(selector.judge_importing(own, Some(vec!["dbt".into()])), Judgement::Selected);
        let all = |exe_path: &str| Discovery {
            instrument: vec![Rule { exe_path: Some(exe_path.into()), ..Rule::default() }],
            exclude_instrument: Vec::new(),
        };
        assert!(selector.set_rules(&all("*")).unwrap());
        assert!(!selector.set_rules(&all("*")).unwrap());
        assert_eq!(selector.judge(own), Judgement::Selected);
        selector.set_rules(&all("[")).unwrap_err();
        assert_eq!(selector.judge(own), Judgement::Selected);
        assert_eq!(selector.take_later(), []);
        assert_eq!(selector.judged(), 3);
    }
}
