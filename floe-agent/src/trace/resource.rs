//! What is known of a process, as an OpenTelemetry resource.

use std::path::Path;

use opentelemetry::{Array, KeyValue, StringValue, Value};
use opentelemetry_sdk::Resource;
use opentelemetry_semantic_conventions::{SCHEMA_URL, attribute as semconv};

use crate::process::run_id::RunContext;
use crate::units::{Epoch, Pid};

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
    /// Service name; by default the name of the script.
    pub service_name: Option<String>,
    /// More resource attributes; they win over those made from the other fields.
    pub attributes: Vec<KeyValue>,
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
            service_name,
            attributes,
        } = self;
        let service = service_name
            .clone()
            .or_else(|| script_name(command_line))
            .unwrap_or_else(|| "unknown_service:python".to_owned());
        let mut all = vec![
            KeyValue::new(semconv::SERVICE_NAME, service),
            KeyValue::new(semconv::PROCESS_PID, i64::from(pid.0)),
            KeyValue::new(semconv::PROCESS_RUNTIME_NAME, "cpython"),
            KeyValue::new(semconv::TELEMETRY_SDK_LANGUAGE, "python"),
            KeyValue::new(semconv::TELEMETRY_SDK_NAME, "floe-agent"),
            KeyValue::new(semconv::TELEMETRY_SDK_VERSION, env!("CARGO_PKG_VERSION")),
        ];
        let mut add = |name, value: Option<Value>| all.extend(value.map(|value| KeyValue::new(name, value)));
        add(semconv::PROCESS_PARENT_PID, parent_pid.map(|pid| i64::from(pid.0).into()));
        add(semconv::PROCESS_RUNTIME_VERSION, python_version.clone().map(Value::from));
        add(semconv::PROCESS_EXECUTABLE_PATH, executable.clone().map(Value::from));
        let name = executable.as_deref().and_then(file_name);
        add(semconv::PROCESS_EXECUTABLE_NAME, name.map(|name| name.to_owned().into()));
        if !command_line.is_empty() {
            let args = command_line.iter().cloned().map(StringValue::from).collect();
            add(semconv::PROCESS_COMMAND_ARGS, Some(Value::Array(Array::String(args))));
        }
        for attribute in attributes {
            all.retain(|known| known.key != attribute.key);
            all.push(attribute.clone());
        }
        Resource::builder_empty().with_schema_url(all, SCHEMA_URL).build()
    }
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
}
