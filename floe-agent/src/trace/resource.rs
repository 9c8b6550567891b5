//! What is known of a process, as an OpenTelemetry resource.

use std::path::Path;
use std::sync::{Arc, OnceLock};

use opentelemetry::{Array, KeyValue, StringValue, Value};
use opentelemetry_sdk::Resource;
use opentelemetry_semantic_conventions::{SCHEMA_URL, attribute as semconv};

use crate::config::values;
use crate::process::run_id::RunContext;
use crate::units::{BootNanos, Epoch, Pid};

/// What the configuration says of resources; what a process says itself wins.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ResourceDefaults {
    /// `service.name`.
    pub service_name: Option<String>,
    /// `deployment.environment.name`.
    pub environment: Option<String>,
    /// More attributes.
    pub attributes: Vec<(String, String)>,
}

/// What is known of a process.
#[derive(Clone, Debug, Default)]
pub struct ProcessFacts {
    /// Process.
    pub pid: Pid,
    /// Address space.
    pub epoch: Epoch,
    /// Parent process.
    pub parent_pid: Option<Pid>,
    /// Command line.
    pub command_line: Vec<String>,
    /// The run that its environment and its arguments name.
    pub run: Option<RunContext>,
    /// Path of the executable.
    pub executable: Option<String>,
    /// Version of the Python interpreter.
    pub python_version: Option<String>,
    /// Its life is a span, from this moment on: it is a program that the configuration names.
    pub span_since: Option<BootNanos>,
    /// The container that it is in.
    pub container: Option<String>,
    /// `OTEL_SERVICE_NAME` of its environment.
    pub service_name: Option<String>,
    /// `OTEL_RESOURCE_ATTRIBUTES` of its environment; these win over those made from the other fields.
    pub attributes: Vec<KeyValue>,
    /// What its spans have told of it.
    pub learned: Learned,
    /// What holds for every process.
    pub defaults: Arc<ResourceDefaults>,
}

/// What the spans of a process tell of it: attributes of [`TOLD`] that have been captured.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Learned([Option<String>; TOLD.len()]);

/// Span attributes that say something of the whole process, and the resource attribute they become, if any.
///
/// What floe's product is holds for the processes that the process starts, too.
const TOLD: [(&str, Option<&str>); 9] = [
    ("floe.product.name", Some("floe.product.name")),
    ("floe.product.version", Some("floe.product.version")),
    ("floe.namespace", Some("floe.namespace")),
    ("floe.mode", Some("floe.mode")),
    ("compile.product_name", Some("floe.product.name")),
    ("dagster.code_location", None),
    ("dagster.job_name", None),
    ("dagster.job", None),
    ("dbt.project_name", None),
];
const PRODUCT: usize = 0;
const PRODUCT_VERSION: usize = 1;
const MODE: usize = 3;
/// Of these places, the first that is known names the service.
const NAMES: [usize; 6] = [PRODUCT, 4, 5, 6, 7, 8];

impl Learned {
    /// What a child process of floe's is told by its parent.
    fn inherited(&self) -> Self {
        let mut inherited = Self::default();
        inherited.0[..=4].clone_from_slice(&self.0[..=4]);
        inherited
    }
}

impl ProcessFacts {
    /// A process of which nothing else is known.
    #[must_use]
    pub fn unknown(pid: Pid, epoch: Epoch) -> Self {
        Self { pid, epoch, ..Self::default() }
    }

    /// What is known of a child after fork: what its parent was, with another pid.
    #[must_use]
    pub fn forked(&self, pid: Pid, epoch: Epoch) -> Self {
        Self { pid, epoch, parent_pid: Some(self.pid), ..self.clone() }
    }

    /// Takes over what holds for the processes that another one starts.
    pub fn descends_from(&mut self, other: &Self) {
        let inherited = other.learned.inherited();
        for (own, inherited) in self.learned.0.iter_mut().zip(inherited.0) {
            if own.is_none() {
                *own = inherited;
            }
        }
    }

    /// Takes in what the environment of the process says.
    pub fn read_environment(&mut self, get: impl Fn(&str) -> Option<String>) {
        self.service_name = get("OTEL_SERVICE_NAME").filter(|name| !name.trim().is_empty());
        let attributes = get("OTEL_RESOURCE_ATTRIBUTES").and_then(|text| values::map(&text)).unwrap_or_default();
        self.attributes = attributes.into_iter().map(|(name, value)| KeyValue::new(name, value)).collect();
    }

    /// Takes in an attribute of one of its spans; says whether the resource is another one now.
    pub fn learn(&mut self, name: &str, value: &str) -> bool {
        let Some(at) = TOLD.iter().position(|(told, _)| *told == name) else {
            return false;
        };
        // The first one holds: a service does not change its name because it runs another job.
        if self.learned.0[at].is_some() || value.is_empty() {
            return false;
        }
        self.learned.0[at] = Some(value.to_owned());
        true
    }

    /// The resource of the spans of this process.
    pub fn resource(&self) -> Resource {
        let Self {
            pid,
            epoch: _,
            parent_pid,
            command_line,
            run: _,
            executable,
            python_version,
            span_since,
            container,
            service_name,
            attributes,
            learned: Learned(learned),
            defaults,
        } = self;
        // Later ones win.
        let mut all: Vec<KeyValue> = Vec::with_capacity(32);
        let mut add = |name: &str, value: Value| {
            // Its name has changed.
            let name = if name == "deployment.environment" { semconv::DEPLOYMENT_ENVIRONMENT_NAME } else { name };
            match all.iter_mut().find(|known| known.key.as_str() == name) {
                Some(known) => known.value = value,
                None => all.push(KeyValue::new(name.to_owned(), value)),
            }
        };
        let of_configuration = |name: &str| defaults.attributes.iter().any(|(known, _)| known == name);
        let is_python = python_version.is_some() || span_since.is_none();
        if is_python {
            add(semconv::TELEMETRY_SDK_LANGUAGE, "python".into());
        }
        add(semconv::TELEMETRY_SDK_NAME, "floe-agent".into());
        add(semconv::TELEMETRY_SDK_VERSION, env!("CARGO_PKG_VERSION").into());
        for (name, value) in host() {
            add(name, value.clone().into());
        }
        for (name, value) in &defaults.attributes {
            add(name, value.clone().into());
        }
        let names = NAMES.iter().find_map(|at| learned[*at].clone());
        let service = service_name
            .clone()
            .or_else(|| defaults.service_name.clone())
            .or(names)
            .or_else(|| script_name(command_line))
            .unwrap_or_else(|| "unknown_service:python".to_owned());
        add(semconv::SERVICE_NAME, service.into());
        for ((_, attribute), value) in TOLD.iter().zip(learned) {
            if let (Some(attribute), Some(value)) = (attribute, value) {
                add(attribute, value.clone().into());
            }
        }
        if let Some(version) = &learned[PRODUCT_VERSION] {
            add(semconv::SERVICE_VERSION, version.clone().into());
        }
        let environment = learned[MODE].clone().filter(|_| !of_configuration(semconv::DEPLOYMENT_ENVIRONMENT_NAME));
        if let Some(environment) = defaults.environment.clone().or(environment) {
            add(semconv::DEPLOYMENT_ENVIRONMENT_NAME, environment.into());
        }
        add(semconv::PROCESS_PID, i64::from(pid.0).into());
        if is_python {
            add(semconv::PROCESS_RUNTIME_NAME, "cpython".into());
        }
        let mut maybe = |name, value: Option<Value>| value.into_iter().for_each(|value| add(name, value));
        maybe(semconv::PROCESS_PARENT_PID, parent_pid.map(|pid| i64::from(pid.0).into()));
        maybe(semconv::PROCESS_RUNTIME_VERSION, python_version.clone().map(Value::from));
        maybe(semconv::PROCESS_EXECUTABLE_PATH, executable.clone().map(Value::from));
        let name = executable.as_deref().and_then(file_name);
        maybe(semconv::PROCESS_EXECUTABLE_NAME, name.map(|name| name.to_owned().into()));
        maybe(semconv::CONTAINER_ID, container.clone().map(Value::from));
        if !command_line.is_empty() {
            let args = command_line.iter().cloned().map(StringValue::from).collect();
            maybe(semconv::PROCESS_COMMAND_ARGS, Some(Value::Array(Array::String(args))));
        }
        for attribute in attributes {
            // `OTEL_SERVICE_NAME` wins over the name among the attributes.
            if attribute.key.as_str() != semconv::SERVICE_NAME || service_name.is_none() {
                add(attribute.key.as_str(), attribute.value.clone());
            }
        }
        Resource::builder_empty().with_schema_url(all, SCHEMA_URL).build()
    }
}

/// What is the same for all processes of the machine.
fn host() -> &'static [(&'static str, String)] {
    static HOST: OnceLock<Vec<(&'static str, String)>> = OnceLock::new();
    HOST.get_or_init(|| {
        let name = rustix::system::uname().nodename().to_string_lossy().into_owned();
        let id = std::fs::read_to_string("/etc/machine-id").ok().map(|id| id.trim().to_owned());
        let mut host = vec![(semconv::HOST_NAME, name), (semconv::HOST_ARCH, "amd64".to_owned())];
        host.push((semconv::OS_TYPE, "linux".to_owned()));
        host.extend(id.filter(|id| !id.is_empty()).map(|id| (semconv::HOST_ID, id)));
        host
    })
}

/// The name of the script or module that a Python command line runs: `dbt` for `python /usr/bin/dbt build`.
pub fn script_name(command_line: &[String]) -> Option<String> {
    let mut words = command_line.iter();
    let first = file_name(words.next()?)?;
    if !first.starts_with("python") {
        return Some(first.to_owned());
    }
    while let Some(word) = words.next() {
        match word.as_str() {
            "-m" => return words.next().cloned(),
            "-c" | "-" => return None,
            "-X" | "-W" | "--check-hash-based-pycs" => _ = words.next(),
            option if option.starts_with('-') => {}
            script => {
                return file_name(script).map(|name| name.strip_suffix(".py").unwrap_or(name).to_owned());
            }
        }
    }
    None
}

fn file_name(path: &str) -> Option<&str> {
    Path::new(path).file_name().and_then(|name| name.to_str())
}

#[cfg(test)]
mod tests {
    use opentelemetry::Key;

    use super::*;

    fn service(command_line: &str) -> Option<String> {
        script_name(&command_line.split(' ').map(str::to_owned).collect::<Vec<_>>())
    }

    #[test]
    fn the_service_is_named_after_the_script() {
        assert_eq!(service("/venv/bin/python3.11 /venv/bin/dbt build").as_deref(), Some("dbt"));
        assert_eq!(service("python -B -X dev -W ignore jobs/load.py --day 1").as_deref(), Some("load"));
        assert_eq!(service("python3 -m dagster dev").as_deref(), Some("dagster"));
        assert_eq!(service("/venv/bin/uwsgi --ini x").as_deref(), Some("uwsgi"));
        assert_eq!(service("python3 -c pass"), None);
        assert_eq!(service("python3"), None);
    }

    #[test]
    fn a_resource_follows_the_semantic_conventions_and_can_be_overridden() {
        let facts = ProcessFacts {
            parent_pid: Some(Pid(6)),
            command_line: vec!["/venv/bin/python".into(), "/venv/bin/dbt".into()],
            executable: Some("/usr/bin/python3.11".into()),
            python_version: Some("3.11.7".into()),
            attributes: vec![KeyValue::new("service.name", "shop")],
            ..ProcessFacts::unknown(Pid(7), Epoch(1))
        };
        let resource = facts.resource();
        let get = |name: &'static str| resource.get(&Key::from_static_str(name)).map(|value| value.to_string());
        assert_eq!(get("service.name").as_deref(), Some("shop"));
        assert_eq!(get("process.pid").as_deref(), Some("7"));
        assert_eq!(get("process.parent_pid").as_deref(), Some("6"));
        assert_eq!(get("process.executable.name").as_deref(), Some("python3.11"));
        assert_eq!(get("process.runtime.version").as_deref(), Some("3.11.7"));
        assert_eq!(get("process.command_args").as_deref(), Some(r#"["/venv/bin/python","/venv/bin/dbt"]"#));
    }

    #[test]
    fn what_is_not_known_is_absent() {
        let resource = ProcessFacts::unknown(Pid(7), Epoch(1)).resource();
        assert_eq!(resource.get(&Key::from_static_str("process.command_args")), None);
        assert_eq!(resource.get(&Key::from_static_str("service.name")), Some("unknown_service:python".into()));
    }

    fn get(facts: &ProcessFacts, name: &'static str) -> Option<String> {
        facts.resource().get(&Key::from_static_str(name)).map(|value| value.to_string())
    }

    #[test]
    fn the_service_is_what_the_process_says_then_the_configuration_then_floe_dagster_dbt_and_the_script() {
        let mut facts = ProcessFacts::unknown(Pid(7), Epoch(1));
        facts.command_line = vec!["python".into(), "load.py".into()];
        let service = |facts: &ProcessFacts| get(facts, "service.name").unwrap();
        assert_eq!(service(&facts), "load");
        assert!(facts.learn("dbt.project_name", "jaffle"));
        assert_eq!(service(&facts), "jaffle");
        assert!(facts.learn("dagster.job_name", "nightly"));
        assert_eq!(service(&facts), "nightly");
        assert!(facts.learn("dagster.code_location", "shop_code"));
        assert_eq!(service(&facts), "shop_code");
        assert!(facts.learn("floe.product.name", "customer-360"));
        assert!(!facts.learn("floe.product.name", "other"), "the first one holds");
        assert!(!facts.learn("dbt.status", "x"));
        assert_eq!(service(&facts), "customer-360");
        facts.defaults = Arc::new(ResourceDefaults { service_name: Some("configured".into()), ..Default::default() });
        assert_eq!(service(&facts), "configured");
        let environment = |name: &str| match name {
            "OTEL_RESOURCE_ATTRIBUTES" => {
                Some("service.name=attributed,team=a%20b,deployment.environment=prod".to_owned())
            }
            _ => None,
        };
        facts.read_environment(environment);
        assert_eq!(service(&facts), "attributed");
        assert_eq!(get(&facts, "team").as_deref(), Some("a b"));
        assert_eq!(get(&facts, "deployment.environment.name").as_deref(), Some("prod"));
        assert_eq!(get(&facts, "deployment.environment"), None, "a name that is not used any more");
        facts
            .read_environment(|name| environment(name).or_else(|| (name == "OTEL_SERVICE_NAME").then(|| "own".into())));
        assert_eq!(service(&facts), "own");
    }

    #[test]
    fn the_product_holds_for_the_processes_that_it_starts_and_the_job_does_not() {
        let mut parent = ProcessFacts::unknown(Pid(7), Epoch(1));
        parent.learn("floe.product.name", "shop");
        parent.learn("floe.product.version", "1.2.0");
        parent.learn("floe.mode", "prod");
        parent.learn("dagster.job_name", "nightly");
        let mut child = ProcessFacts { command_line: vec!["dbt".into()], ..ProcessFacts::unknown(Pid(8), Epoch(2)) };
        child.descends_from(&parent);
        assert_eq!(get(&child, "service.name").as_deref(), Some("shop"));
        assert_eq!(get(&child, "service.version").as_deref(), Some("1.2.0"));
        assert_eq!(get(&child, "floe.product.name").as_deref(), Some("shop"));
        assert_eq!(get(&child, "deployment.environment.name").as_deref(), Some("prod"));
        let mut child = ProcessFacts { command_line: vec!["dbt".into()], ..ProcessFacts::unknown(Pid(8), Epoch(2)) };
        let mut dagster = ProcessFacts::unknown(Pid(7), Epoch(1));
        dagster.learn("dagster.job_name", "nightly");
        child.descends_from(&dagster);
        assert_eq!(get(&child, "service.name").as_deref(), Some("dbt"));
    }

    #[test]
    fn no_attribute_has_a_name_that_is_not_used_any_more() {
        let mut facts = ProcessFacts::unknown(Pid(7), Epoch(1));
        for (name, _) in TOLD {
            facts.learn(name, "x");
        }
        for (key, _) in &facts.resource() {
            assert_ne!(key.as_str(), "deployment.environment");
        }
    }
}
