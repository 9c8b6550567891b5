//! Rules: which processes are traced.
//!
//! A rule holds for a process if all its conditions hold; a process is selected if a rule of `instrument` holds and none of
//! `exclude_instrument`. What a condition needs is looked up only when it is asked.

use std::{cell::OnceCell, collections::BTreeMap, ffi::OsString, sync::Arc};

use globset::{GlobBuilder, GlobMatcher};
use regex::Regex;
use serde::Deserialize;
use thiserror::Error;

use super::{kubernetes::Pod, program::Program, users::Users};
use crate::{
    attach::Judgement,
    process::{
        container::{Container, PodNames},
        identity,
    },
    units::Pid,
};

/// Packages whose users are traced if no rule says otherwise. floe is a family of packages: `floe_core`, `floe_dbt`, ...
pub const DEFAULT_MODULES: [&str; 5] = ["floe", "floe_*", "dbt", "dagster", "dagster_*"];

/// `discovery` in the configuration.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
#[serde(default, deny_unknown_fields)]
pub struct Discovery {
    /// Processes for which one of these holds are traced.
    pub instrument: Vec<Rule>,
    /// But not those for which one of these holds.
    pub exclude_instrument: Vec<Rule>,
}

impl Default for Discovery {
    fn default() -> Self {
        let modules = DEFAULT_MODULES.iter().map(|&name| name.to_owned()).collect();
        Self { instrument: vec![Rule { modules, ..Rule::default() }], exclude_instrument: Vec::new() }
    }
}

/// One rule. Texts are globs unless said otherwise; `*` also matches `/`.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Eq)]
#[serde(default, deny_unknown_fields)]
pub struct Rule {
    /// For people, in the log.
    pub name: Option<String>,
    /// Path of the executable as the process has it.
    pub exe_path: Option<String>,
    /// A regular expression that is found in the command line, whose words are joined by spaces.
    pub command_line: Option<String>,
    /// Top-level packages, one of which the program imports.
    pub modules: Vec<String>,
    /// Name or number of the effective user.
    pub user: Option<String>,
    /// Path of the control group.
    pub cgroup: Option<String>,
    /// Id of the container.
    pub container_id: Option<String>,
    /// Kubernetes namespace.
    pub k8s_namespace: Option<String>,
    /// Labels of the Kubernetes pod; needs access to the Kubernetes API.
    pub k8s_pod_labels: BTreeMap<String, String>,
    /// Annotations of the Kubernetes pod; as the labels.
    pub k8s_pod_annotations: BTreeMap<String, String>,
}

/// A rule that cannot be used.
#[derive(Debug, Error)]
pub enum RuleError {
    /// It has no condition.
    #[error(
        "discovery: a rule without a condition would select every Python process; say `exe_path: \"*\"` if that is meant"
    )]
    Empty,
    /// Not a glob.
    #[error("{key}: `{text}` is not a glob: {why}")]
    Glob {
        /// Where.
        key: &'static str,
        /// The text.
        text: String,
        /// Why not.
        why: String,
    },
    /// Not a regular expression.
    #[error("discovery: command_line: `{text}` is not a regular expression: {why}")]
    Regex {
        /// The text.
        text: String,
        /// Why not.
        why: String,
    },
}

/// What rules are asked about. Every answer is looked up at most once.
pub struct Candidate<'a> {
    pid: Pid,
    users: &'a Users,
    pods: &'a dyn Pods,
    exe: OnceCell<String>,
    words: OnceCell<Vec<OsString>>,
    imports: OnceCell<Vec<String>>,
    user: OnceCell<Option<u32>>,
    container: OnceCell<Container>,
    pod: OnceCell<Option<Arc<Pod>>>,
    namespace: OnceCell<Option<String>>,
}

/// Where pods are looked up.
pub trait Pods: Send + Sync {
    /// The pod with this uid, if it is known.
    fn pod(&self, uid: &str) -> Option<Arc<Pod>>;
    /// Whether a pod that is not known yet will be.
    fn are_watched(&self) -> bool;
}

/// No Kubernetes API.
pub struct NoPods;

impl Pods for NoPods {
    fn pod(&self, _uid: &str) -> Option<Arc<Pod>> {
        None
    }

    fn are_watched(&self) -> bool {
        false
    }
}

impl<'a> Candidate<'a> {
    /// A process.
    pub fn new(pid: Pid, users: &'a Users, pods: &'a dyn Pods) -> Self {
        Self {
            pid,
            users,
            pods,
            exe: OnceCell::new(),
            words: OnceCell::new(),
            imports: OnceCell::new(),
            user: OnceCell::new(),
            container: OnceCell::new(),
            pod: OnceCell::new(),
            namespace: OnceCell::new(),
        }
    }

    /// With packages that are known to be imported, in place of what its command line tells.
    #[must_use]
    pub fn importing(mut self, packages: Vec<String>) -> Self {
        self.imports = OnceCell::from(packages);
        self
    }

    fn exe(&self) -> &str {
        self.exe.get_or_init(|| {
            let path = identity::exe(self.pid).unwrap_or_default().to_string_lossy().into_owned();
            path.strip_suffix(" (deleted)").map(str::to_owned).unwrap_or(path)
        })
    }

    fn words(&self) -> &[OsString] {
        self.words.get_or_init(|| identity::cmdline(self.pid).unwrap_or_default())
    }

    fn imports(&self) -> &[String] {
        self.imports.get_or_init(|| Program::parse(self.words()).imports(self.pid))
    }

    fn uid(&self) -> Option<u32> {
        *self.user.get_or_init(|| identity::Status::read(self.pid).ok().map(|status| status.uid))
    }

    fn container(&self) -> &Container {
        self.container.get_or_init(|| Container::of(self.pid))
    }

    fn pod(&self) -> Option<&Pod> {
        self.pod.get_or_init(|| self.pods.pod(self.container().pod_uid.as_deref()?)).as_deref()
    }

    /// Whether it is in a pod of which labels and annotations will be known, and are not yet.
    fn awaits_pod(&self) -> bool {
        self.pods.are_watched() && self.container().pod_uid.is_some() && self.pod().is_none()
    }

    fn namespace(&self) -> Option<&str> {
        let look_up = || {
            self.pod().map(|pod| pod.namespace.clone()).or_else(|| {
                // Without the API: what the pod itself has.
                self.container().pod_uid.as_ref()?;
                PodNames::of(self.pid).namespace
            })
        };
        self.namespace.get_or_init(look_up).as_deref()
    }
}

/// A condition that can be asked.
#[derive(Debug)]
enum Condition {
    Exe(GlobMatcher),
    CommandLine(Regex),
    Modules(Vec<GlobMatcher>),
    User(GlobMatcher),
    Cgroup(GlobMatcher),
    ContainerId(GlobMatcher),
    Namespace(GlobMatcher),
    Label(String, GlobMatcher),
    Annotation(String, GlobMatcher),
}

impl Condition {
    /// Whether only the Kubernetes API knows.
    fn is_of_pod(&self) -> bool {
        matches!(self, Self::Label(..) | Self::Annotation(..))
    }

    fn holds(&self, candidate: &Candidate<'_>) -> bool {
        match self {
            Self::Exe(glob) => glob.is_match(candidate.exe()),
            Self::CommandLine(regex) => {
                let words: Vec<_> = candidate.words().iter().map(|word| word.to_string_lossy()).collect();
                regex.is_match(&words.join(" "))
            }
            Self::Modules(globs) => candidate.imports().iter().any(|name| globs.iter().any(|glob| glob.is_match(name))),
            Self::User(glob) => candidate.uid().is_some_and(|uid| {
                glob.is_match(uid.to_string()) || candidate.users.name(uid).is_some_and(|name| glob.is_match(name))
            }),
            Self::Cgroup(glob) => glob.is_match(&candidate.container().cgroup),
            Self::ContainerId(glob) => candidate.container().id.as_ref().is_some_and(|id| glob.is_match(id)),
            Self::Namespace(glob) => candidate.namespace().is_some_and(|namespace| glob.is_match(namespace)),
            Self::Label(key, glob) => {
                candidate.pod().and_then(|pod| pod.labels.get(key)).is_some_and(|value| glob.is_match(value))
            }
            Self::Annotation(key, glob) => {
                candidate.pod().and_then(|pod| pod.annotations.get(key)).is_some_and(|value| glob.is_match(value))
            }
        }
    }
}

/// A glob of the configuration.
pub(super) fn glob(key: &'static str, text: &str) -> Result<GlobMatcher, RuleError> {
    GlobBuilder::new(text).build().map(|glob| glob.compile_matcher()).map_err(|error| RuleError::Glob {
        key,
        text: text.to_owned(),
        why: error.kind().to_string(),
    })
}

impl Rule {
    /// The conditions, the cheap ones first.
    fn compile(&self) -> Result<Vec<Condition>, RuleError> {
        let Self {
            name: _,
            exe_path,
            command_line,
            modules,
            user,
            cgroup,
            container_id,
            k8s_namespace,
            k8s_pod_labels,
            k8s_pod_annotations,
        } = self;
        let mut all = Vec::new();
        let mut add = |key, text: &Option<String>, condition: fn(GlobMatcher) -> Condition| {
            all.extend(text.as_ref().map(|text| glob(key, text)).transpose()?.map(condition));
            Ok(())
        };
        add("discovery: exe_path", exe_path, Condition::Exe)?;
        add("discovery: user", user, Condition::User)?;
        add("discovery: cgroup", cgroup, Condition::Cgroup)?;
        add("discovery: container_id", container_id, Condition::ContainerId)?;
        add("discovery: k8s_namespace", k8s_namespace, Condition::Namespace)?;
        if let Some(text) = command_line {
            let regex = Regex::new(text).map_err(|error| RuleError::Regex {
                text: text.clone(),
                why: error.to_string().lines().last().unwrap_or_default().to_owned(),
            })?;
            all.push(Condition::CommandLine(regex));
        }
        for (key, value) in k8s_pod_labels {
            all.push(Condition::Label(key.clone(), glob("discovery: k8s_pod_labels", value)?));
        }
        for (key, value) in k8s_pod_annotations {
            all.push(Condition::Annotation(key.clone(), glob("discovery: k8s_pod_annotations", value)?));
        }
        if !modules.is_empty() {
            all.push(Condition::Modules(
                modules.iter().map(|name| glob("discovery: modules", name)).collect::<Result<_, _>>()?,
            ));
        }
        if all.is_empty() {
            return Err(RuleError::Empty);
        }
        Ok(all)
    }
}

/// The rules in a form that can be asked.
#[derive(Debug)]
pub struct Rules {
    instrument: Vec<Vec<Condition>>,
    exclude: Vec<Vec<Condition>>,
}

impl Rules {
    /// Checks and compiles.
    pub fn new(discovery: &Discovery) -> Result<Self, RuleError> {
        let compile = |rules: &[Rule]| rules.iter().map(Rule::compile).collect::<Result<Vec<_>, _>>();
        Ok(Self { instrument: compile(&discovery.instrument)?, exclude: compile(&discovery.exclude_instrument)? })
    }

    /// What they say of a process.
    pub fn judge(&self, candidate: &Candidate<'_>) -> Judgement {
        let holds = |rule: &Vec<Condition>| rule.iter().all(|condition| condition.holds(candidate));
        // It may turn out to be excluded, so it is not touched before that is known.
        let may_hold = |rule: &Vec<Condition>| {
            rule.iter().all(|condition| condition.holds(candidate) || (condition.is_of_pod() && candidate.awaits_pod()))
        };
        if self.exclude.iter().any(holds) {
            Judgement::Excluded
        } else if self.instrument.iter().any(holds) && !self.exclude.iter().any(may_hold) {
            Judgement::Selected
        } else {
            Judgement::NotSelected
        }
    }

    /// Whether a rule names packages: what a process imports later can change what they say.
    pub fn ask_for_modules(&self) -> bool {
        self.instrument.iter().flatten().any(|condition| matches!(condition, Condition::Modules(_)))
    }

    /// Whether a rule asks for labels or annotations: the Kubernetes API may tell them later, and others than before.
    pub fn ask_for_pods(&self) -> bool {
        self.instrument.iter().chain(&self.exclude).flatten().any(Condition::is_of_pod)
    }

    /// Whether what they say of a process can change while it runs.
    pub fn may_change(&self) -> bool {
        self.ask_for_modules() || self.ask_for_pods()
    }
}

#[cfg(test)]
mod tests {
    use std::process::{Child, Command, Stdio};

    use super::*;

    fn rules(instrument: &str, exclude: &str) -> Rules {
        let list = |text: &str| if text.is_empty() { Vec::new() } else { serde_saphyr::from_str(text).unwrap() };
        Rules::new(&Discovery { instrument: list(instrument), exclude_instrument: list(exclude) }).unwrap()
    }

    /// A process with a name, standing in for an interpreter.
    struct Process(Child);

    impl Process {
        fn start(words: &[&str]) -> Self {
            use std::os::unix::process::CommandExt as _;
            let mut command = Command::new("/bin/sleep");
            command.arg0(words[0]).args(&words[1..]).stdin(Stdio::null()).stderr(Stdio::null());
            let process = Self(command.spawn().unwrap());
            // Who spawns goes on as soon as the old address space is left, and the kernel writes down where the arguments
            // are after that (`begin_new_exec`, then `create_elf_tables`, fs/binfmt_elf.c): until then there are none.
            while identity::cmdline(Pid(process.0.id())).unwrap().is_empty() {
                std::thread::yield_now();
            }
            process
        }

        fn judge(&self, rules: &Rules) -> Judgement {
            rules.judge(&Candidate::new(Pid(self.0.id()), &Users::default(), &NoPods))
        }
    }

    impl Drop for Process {
        fn drop(&mut self) {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }

    #[test]
    fn all_conditions_of_a_rule_must_hold_and_one_rule_is_enough() {
        let process = Process::start(&["python3", "60", "0"]);
        let own = rustix::process::geteuid().as_raw();
        assert_eq!(process.judge(&rules("- exe_path: '*/sleep'", "")), Judgement::Selected);
        assert_eq!(process.judge(&rules("- exe_path: '*/python*'", "")), Judgement::NotSelected);
        assert_eq!(process.judge(&rules("- command_line: '^python3 \\d+'", "")), Judgement::Selected);
        assert_eq!(process.judge(&rules(&format!("- user: '{own}'\n  exe_path: '*/sleep'"), "")), Judgement::Selected);
        assert_eq!(process.judge(&rules("- user: nobody\n  exe_path: '*/sleep'", "")), Judgement::NotSelected);
        assert_eq!(
            process.judge(&rules("- exe_path: '*/nothing'\n- exe_path: '*/sleep'", "- command_line: ' 60'")),
            Judgement::Excluded
        );
        assert_eq!(process.judge(&rules("- container_id: '*'", "")), Judgement::NotSelected);
        assert_eq!(process.judge(&rules("- k8s_namespace: '*'", "")), Judgement::NotSelected);
    }

    #[test]
    fn by_default_users_of_floe_dbt_and_dagster_are_selected() {
        let rules = Rules::new(&Discovery::default()).unwrap();
        let judge = |words: &[&str]| Process::start(words).judge(&rules);
        assert!(rules.ask_for_modules());
        let users = Users::default();
        let of = |packages: &[&str]| {
            let packages = packages.iter().map(|&name| name.to_owned()).collect();
            rules.judge(&Candidate::new(Pid(std::process::id()), &users, &NoPods).importing(packages))
        };
        for packages in [&["dbt"][..], &["sys", "dagster_webserver"], &["floe_core"], &["floe"]] {
            assert_eq!(of(packages), Judgement::Selected, "{packages:?}");
        }
        for packages in [&["dbt_tools"][..], &["sys"], &[], &["floes"]] {
            assert_eq!(of(packages), Judgement::NotSelected, "{packages:?}");
        }
        assert_eq!(judge(&["python3", "60"]), Judgement::NotSelected);
    }

    #[test]
    fn labels_come_from_the_pod() {
        struct One;
        impl Pods for One {
            fn pod(&self, uid: &str) -> Option<Arc<Pod>> {
                let labels = BTreeMap::from([("app".to_owned(), "etl-nightly".to_owned())]);
                (uid == "u").then(|| Arc::new(Pod { namespace: "data".into(), labels, ..Pod::default() }))
            }

            fn are_watched(&self) -> bool {
                true
            }
        }
        let users = Users::default();
        let judge_in = |uid: &str, instrument: &str, exclude: &str| {
            let mut candidate = Candidate::new(Pid(std::process::id()), &users, &One);
            candidate.container = OnceCell::from(Container { pod_uid: Some(uid.into()), ..Container::default() });
            rules(instrument, exclude).judge(&candidate)
        };
        let judge = |text: &str| judge_in("u", text, "");
        assert_eq!(judge("- k8s_pod_labels: {app: 'etl-*'}\n  k8s_namespace: data"), Judgement::Selected);
        assert_eq!(judge("- k8s_pod_labels: {app: 'web'}"), Judgement::NotSelected);
        assert_eq!(judge("- k8s_pod_annotations: {app: '*'}"), Judgement::NotSelected);

        let (all, web) = ("- exe_path: '*'", "- k8s_pod_labels: {app: 'web'}");
        assert_eq!(judge_in("u", all, web), Judgement::Selected);
        assert_eq!(judge_in("u", all, "- k8s_pod_labels: {app: 'etl-*'}"), Judgement::Excluded);
        assert_eq!(judge_in("new", all, web), Judgement::NotSelected, "it could be one that is excluded");
        assert_eq!(judge_in("new", all, "- k8s_pod_labels: {app: 'web'}\n  user: nobody"), Judgement::Selected);
        assert!(rules(all, web).may_change() && !rules(all, "").may_change());
    }

    #[test]
    fn rules_that_cannot_be_meant_are_refused() {
        let refuse = |rule: Rule| {
            Rules::new(&Discovery { instrument: vec![rule], exclude_instrument: Vec::new() }).unwrap_err().to_string()
        };
        assert!(refuse(Rule::default()).contains("without a condition"));
        let text = refuse(Rule { command_line: Some("(".into()), ..Rule::default() });
        assert!(text.contains("command_line: `(`") && !text.contains('\n'), "{text}");
        let text = refuse(Rule { exe_path: Some("[".into()), ..Rule::default() });
        assert!(text.contains("exe_path: `[`"), "{text}");
        serde_saphyr::from_str::<Discovery>("instrument: [{exepath: x}]").unwrap_err();
    }
}
