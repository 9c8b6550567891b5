//! Configuration: defaults, a profile, a floe manifest, the file, the environment, the command line; later ones win.
//!
//! `keys` is the table of all settings; [`Settings`] holds what was given and where; [`Config`] is what follows from it.

mod file;
pub mod keys;
mod manifest;
mod otlp;
mod profile;
mod schema;
pub mod values;

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use globset::{Glob, GlobSet, GlobSetBuilder};
use thiserror::Error;

use crate::export::{
    ConsoleOptions, ExportError, OtlpTarget, Output, QueueBounds, RedactionRules, SamplingRules, TargetError,
};
use crate::process::run_id::{RunSources, SOURCES};
use crate::trace::{Hold, LogLevel, LogSettings, ResourceDefaults};
use keys::{KEYS, Key, Kind};

pub use schema::schema;

/// Where a value comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origin {
    /// Nothing was given.
    Default,
    /// The profile of this name.
    Profile(String),
    /// A line of a file.
    File {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: u64,
    },
    /// An environment variable.
    Variable(String),
    /// An option of the command line.
    Option(&'static str),
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Default => f.write_str("default"),
            Self::Profile(name) => write!(f, "profile {name}"),
            Self::File { path, line } => write!(f, "{}:{line}", path.display()),
            Self::Variable(name) => f.write_str(name),
            Self::Option(name) => f.write_str(name),
        }
    }
}

/// A configuration that cannot be used.
#[derive(Debug, Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read the configuration {}: {source}", .path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// The file is no YAML.
    #[error("{origin}: {message}")]
    Yaml {
        /// Where.
        origin: Origin,
        /// What is wrong.
        message: String,
    },
    /// There is no such setting.
    #[error("{origin}: there is no setting `{key}`; there are {known}")]
    Unknown {
        /// Where.
        origin: Origin,
        /// What was given.
        key: String,
        /// What may stand there.
        known: String,
    },
    /// A list where a text is expected, and the like.
    #[error("{origin}: `{key}`: expected {expected}")]
    Shape {
        /// Where.
        origin: Origin,
        /// The setting.
        key: String,
        /// What was expected.
        expected: String,
    },
    /// Not a value of this kind.
    #[error("{origin}: `{key}` cannot be `{value}`: expected {expected}")]
    Value {
        /// Where.
        origin: Origin,
        /// The setting.
        key: String,
        /// What was given.
        value: String,
        /// What was expected.
        expected: String,
    },
    /// Settings that do not go together.
    #[error("{origin}: {message}")]
    Conflict {
        /// Where one of them is.
        origin: Origin,
        /// What is wrong, and what to do.
        message: String,
    },
    /// An output.
    #[error(transparent)]
    Output(#[from] ExportError),
    /// An endpoint.
    #[error(transparent)]
    Endpoint(#[from] TargetError),
}

/// A value and where it comes from.
#[derive(Clone, Debug, PartialEq)]
pub struct Setting<T> {
    /// The value.
    pub value: T,
    /// Where it comes from.
    pub origin: Origin,
}

#[derive(Clone, Debug)]
enum Stored {
    One(Setting<String>),
    List(Setting<Vec<String>>),
    Entries(BTreeMap<String, Setting<String>>),
}

/// What an option of the command line gives.
#[derive(Clone, Debug)]
pub struct Given {
    /// The setting.
    pub path: &'static str,
    /// The option.
    pub option: &'static str,
    /// One value, or several for a list.
    pub values: Vec<String>,
}

/// Everything that was given, and where.
#[derive(Clone, Debug, Default)]
pub struct Settings {
    stored: BTreeMap<&'static str, Stored>,
    /// Standard variables with values that cannot be used; they are left out, as OpenTelemetry asks.
    pub warnings: Vec<String>,
}

/// Where to look.
#[derive(Clone, Debug, Default)]
pub struct Sources {
    /// The file, if one is given.
    pub file: Option<PathBuf>,
    /// A floe platform manifest.
    pub manifest: Option<PathBuf>,
    /// The command line.
    pub options: Vec<Given>,
    /// `SETTING=VALUE` of the command line.
    pub set: Vec<String>,
}

impl Settings {
    /// Reads everything.
    pub fn load(sources: &Sources, env: &dyn Fn(&str) -> Option<String>) -> Result<Self, ConfigError> {
        let mut settings = Self::default();
        if let Some(path) = &sources.manifest {
            manifest::apply(path, &mut settings)?;
        }
        if let Some(path) = &sources.file {
            settings.apply_file(path)?;
        }
        settings.apply_environment(env)?;
        for given in &sources.options {
            settings.apply_option(given)?;
        }
        for set in &sources.set {
            settings.apply_set(set)?;
        }
        profile::apply(&mut settings)?;
        Ok(settings)
    }

    fn apply_file(&mut self, path: &Path) -> Result<(), ConfigError> {
        // Names in a map replace those of the layer below one by one; a list replaces the whole list.
        for (key, given, origin) in file::settings(path)? {
            match given {
                file::Given::One(text) => self.set(key, &text, origin, false)?,
                file::Given::List(items) => self.set_list(key, items, origin),
                file::Given::Entry(name, text) => self.set_entry(key, name, text, origin)?,
            }
        }
        Ok(())
    }

    fn apply_environment(&mut self, env: &dyn Fn(&str) -> Option<String>) -> Result<(), ConfigError> {
        let env = |name: &str| env(name).map(|value| value.trim().to_owned()).filter(|value| !value.is_empty());
        for key in &KEYS {
            let own = key.variable();
            if let Some(value) = env(&own) {
                self.set_from_variable(key, &value, &own)?;
            } else if let Some((name, value)) = key.otel.iter().find_map(|name| Some((*name, env(name)?))) {
                // The traced command may be meant as well: a value that cannot be used is no reason to stop.
                if let Err(error) = self.set_from_variable(key, &value, name) {
                    self.warnings.push(format!("{error}; it is ignored"));
                }
            }
        }
        Ok(())
    }

    fn set_from_variable(&mut self, key: &'static Key, value: &str, name: &str) -> Result<(), ConfigError> {
        let origin = Origin::Variable(name.to_owned());
        match key.kind {
            Kind::List => {
                let items = value.split(',').map(|item| item.trim().to_owned()).filter(|item| !item.is_empty());
                self.set_list(key, items.collect(), origin);
            }
            Kind::Map | Kind::Ratios => {
                let entries = values::map(value).ok_or_else(|| ConfigError::Value {
                    origin: origin.clone(),
                    key: key.path.to_owned(),
                    value: if key.secret { "***".to_owned() } else { value.to_owned() },
                    expected: "`name=value,name=value`".to_owned(),
                })?;
                for (name, text) in entries {
                    self.set_entry(key, name, text, origin.clone())?;
                }
            }
            _ => self.set(key, value, origin, name.starts_with("OTEL_"))?,
        }
        Ok(())
    }

    fn apply_option(&mut self, given: &Given) -> Result<(), ConfigError> {
        let Some(key) = keys::find(given.path) else {
            return Ok(());
        };
        let origin = Origin::Option(given.option);
        if given.path == "otlp.endpoint" && !given.values.is_empty() {
            // It is meant for all signals.
            for path in ["otlp.traces.endpoint", "otlp.logs.endpoint", "otlp.metrics.endpoint"] {
                self.stored.remove(path);
            }
        }
        match (key.kind, &given.values[..]) {
            (_, []) => {}
            (Kind::List, values) => self.set_list(key, values.to_vec(), origin),
            (_, [.., value]) => self.set(key, value, origin, false)?,
        }
        Ok(())
    }

    /// `SETTING=VALUE`.
    fn apply_set(&mut self, text: &str) -> Result<(), ConfigError> {
        const OPTION: &str = "--set";
        let Some((name, value)) = text.split_once('=') else {
            return Err(ConfigError::Shape {
                origin: Origin::Option(OPTION),
                key: text.to_owned(),
                expected: "`SETTING=VALUE`".to_owned(),
            });
        };
        if let Some(key) = keys::find(name) {
            let values = match key.kind {
                Kind::List => value.split(',').map(str::to_owned).collect(),
                Kind::Map | Kind::Ratios => return self.set_from_option(key, value),
                _ => vec![value.to_owned()],
            };
            return self.apply_option(&Given { path: key.path, option: OPTION, values });
        }
        // A name in a map.
        let maps = KEYS.iter().filter(|key| matches!(key.kind, Kind::Map | Kind::Ratios));
        for key in maps {
            if let Some(entry) = name.strip_prefix(key.path).and_then(|rest| rest.strip_prefix('.')) {
                return self.set_entry(key, entry.to_owned(), value.to_owned(), Origin::Option(OPTION));
            }
        }
        Err(ConfigError::Unknown {
            origin: Origin::Option(OPTION),
            key: name.to_owned(),
            known: "those that `floe-agent config schema` prints".to_owned(),
        })
    }

    fn set_from_option(&mut self, key: &'static Key, value: &str) -> Result<(), ConfigError> {
        let entries = values::map(value).ok_or_else(|| ConfigError::Shape {
            origin: Origin::Option("--set"),
            key: key.path.to_owned(),
            expected: "`name=value,name=value`".to_owned(),
        })?;
        for (name, text) in entries {
            self.set_entry(key, name, text, Origin::Option("--set"))?;
        }
        Ok(())
    }

    fn set(&mut self, key: &'static Key, text: &str, origin: Origin, standard: bool) -> Result<(), ConfigError> {
        let text = text.trim();
        let milliseconds = standard && key.kind == Kind::Duration;
        values::check(key.kind, text, milliseconds).map_err(|expected| ConfigError::Value {
            origin: origin.clone(),
            key: key.path.to_owned(),
            value: if key.secret { "***".to_owned() } else { text.to_owned() },
            expected,
        })?;
        let value = if milliseconds && text.bytes().all(|b| b.is_ascii_digit()) {
            format!("{text}ms")
        } else {
            text.to_owned()
        };
        self.stored.insert(key.path, Stored::One(Setting { value, origin }));
        Ok(())
    }

    fn set_list(&mut self, key: &'static Key, value: Vec<String>, origin: Origin) {
        self.stored.insert(key.path, Stored::List(Setting { value, origin }));
    }

    fn set_entry(&mut self, key: &'static Key, name: String, text: String, origin: Origin) -> Result<(), ConfigError> {
        values::check(key.kind, &text, false).map_err(|expected| ConfigError::Value {
            origin: origin.clone(),
            key: format!("{}.{name}", key.path),
            value: if key.secret { "***".to_owned() } else { text.clone() },
            expected,
        })?;
        let stored = self.stored.entry(key.path).or_insert_with(|| Stored::Entries(BTreeMap::new()));
        if let Stored::Entries(entries) = stored {
            entries.insert(name, Setting { value: text, origin });
        }
        Ok(())
    }

    /// Sets what has not been set.
    fn fill_in(&mut self, path: &'static str, text: &str, origin: Origin) -> Result<(), ConfigError> {
        match keys::find(path) {
            Some(key) if !self.stored.contains_key(path) => self.set(key, text, origin, false),
            _ => Ok(()),
        }
    }

    /// What was given for a setting, else its default.
    pub fn one(&self, path: &str) -> Option<Setting<String>> {
        if let Some(Stored::One(setting)) = self.stored.get(path) {
            return Some(setting.clone());
        }
        let default = keys::find(path)?.default;
        (!default.is_empty()).then(|| Setting { value: default.to_owned(), origin: Origin::Default })
    }

    /// Where a list comes from.
    fn origin(&self, path: &str) -> Origin {
        match self.stored.get(path) {
            Some(Stored::List(setting)) => setting.origin.clone(),
            _ => Origin::Default,
        }
    }

    fn list(&self, path: &str) -> Vec<String> {
        if let Some(Stored::List(setting)) = self.stored.get(path) {
            return setting.value.clone();
        }
        let default = keys::find(path).map_or("", |key| key.default);
        default.split_terminator(',').map(str::to_owned).collect()
    }

    fn entries(&self, path: &str) -> BTreeMap<String, Setting<String>> {
        match self.stored.get(path) {
            Some(Stored::Entries(entries)) => entries.clone(),
            _ => BTreeMap::new(),
        }
    }

    /// A value that was checked when it was given.
    fn parsed<T>(&self, path: &str, parse: impl Fn(&str) -> Option<T>) -> Option<T> {
        parse(&self.one(path)?.value)
    }

    fn text(&self, path: &str) -> Option<String> {
        self.one(path).map(|setting| setting.value).filter(|value| !value.is_empty())
    }

    fn flag(&self, path: &str) -> bool {
        self.parsed(path, values::boolean).unwrap_or_default()
    }

    fn duration(&self, path: &str) -> Option<Duration> {
        self.parsed(path, |text| values::duration(text, false))
    }

    fn count(&self, path: &str) -> Option<usize> {
        self.parsed(path, |text| text.parse().ok())
    }

    /// How many settings were given.
    pub fn given(&self) -> usize {
        self.stored.len()
    }

    /// Every setting that has a value: its name, its value with secrets hidden, where it comes from.
    pub fn effective(&self) -> Vec<(String, String, Origin)> {
        let mut all = Vec::new();
        for key in &KEYS {
            let shown = |value: &str| if key.secret { "***".to_owned() } else { redact_url(value) };
            match self.stored.get(key.path) {
                Some(Stored::One(Setting { value, origin })) => {
                    all.push((key.path.to_owned(), shown(value), origin.clone()));
                }
                Some(Stored::List(Setting { value, origin })) => {
                    all.push((key.path.to_owned(), shown(&value.join(", ")), origin.clone()));
                }
                Some(Stored::Entries(entries)) => {
                    for (name, Setting { value, origin }) in entries {
                        all.push((format!("{}.{name}", key.path), shown(value), origin.clone()));
                    }
                }
                None if key.default.is_empty() => {}
                None => all.push((key.path.to_owned(), key.default.to_owned(), Origin::Default)),
            }
        }
        all
    }
}

fn redact_url(value: &str) -> String {
    crate::export::redact_text(value)
}

/// What the agent is to do.
#[derive(Clone, Debug)]
#[expect(clippy::struct_excessive_bools, reason = "each one is a setting of its own")]
pub struct Config {
    /// Where spans go.
    pub outputs: Vec<Output>,
    /// Bounds of each output's queue.
    pub queue: QueueBounds,
    /// Time to deliver what is left at the end.
    pub shutdown_timeout: Duration,
    /// Nothing is traced.
    pub disabled: bool,
    /// A live line on the terminal.
    pub progress: bool,
    /// More packs.
    pub packs: Vec<PathBuf>,
    /// More probes.
    pub probes: Vec<String>,
    /// The packs in the binary are used.
    pub builtin_packs: bool,
    /// CPython 3.11: inlining stays on.
    pub keep_inlining: bool,
    /// Which traces are kept.
    pub sampling: SamplingRules,
    /// What names the run of a process.
    pub run_sources: RunSources,
    /// Spans are made of what a program exports itself, too.
    pub double_own_spans: bool,
    /// File names of programs whose processes are spans.
    pub programs: GlobSet,
    /// How long spans wait for their run to be known.
    pub hold: Hold,
    /// Which log records are taken.
    pub logs: LogSettings,
    /// What must not leave.
    pub redaction: RedactionRules,
    /// What resources have if processes do not say.
    pub resource: ResourceDefaults,
}

impl Config {
    /// What follows from the settings.
    pub fn new(settings: &Settings) -> Result<Self, ConfigError> {
        let default = QueueBounds::default();
        let spans = settings.count("queue.spans").unwrap_or(default.spans);
        Ok(Self {
            outputs: outputs(settings)?,
            queue: QueueBounds {
                spans,
                logs: settings.count("queue.logs").unwrap_or(spans),
                bytes: settings.parsed("queue.memory", values::size).unwrap_or(default.bytes),
            },
            shutdown_timeout: settings.duration("shutdown_timeout").unwrap_or(Duration::from_secs(5)),
            disabled: settings.flag("disabled"),
            progress: settings.flag("progress"),
            packs: settings.list("packs").into_iter().map(PathBuf::from).collect(),
            probes: settings.list("probes"),
            builtin_packs: settings.flag("builtin_packs"),
            keep_inlining: settings.flag("keep_inlining"),
            sampling: sampling(settings),
            run_sources: run_sources(settings)?,
            programs: programs(settings)?,
            double_own_spans: settings.text("correlation.own_spans").as_deref() == Some("double"),
            hold: Hold {
                time: settings.duration("correlation.hold").unwrap_or(Hold::default().time),
                ..Hold::default()
            },
            logs: logs(settings),
            redaction: redaction(settings)?,
            resource: resource(settings),
        })
    }
}

fn outputs(settings: &Settings) -> Result<Vec<Output>, ConfigError> {
    let mut outputs = settings.list("output").iter().map(|text| Output::parse(text)).collect::<Result<Vec<_>, _>>()?;
    let exporters = settings.text("otlp.traces_exporter").unwrap_or_default();
    let exporters: Vec<&str> = exporters.split(',').map(str::trim).filter(|name| !name.is_empty()).collect();
    if exporters.contains(&"console") && outputs.is_empty() {
        outputs.push(Output::Console(ConsoleOptions::detect()));
    }
    let target: OtlpTarget = otlp::target(settings, exporters.is_empty() || exporters.contains(&"otlp"))?;
    if target.traces.is_some() || target.logs.is_some() {
        outputs.push(Output::Otlp(Box::new(target)));
    }
    if outputs.is_empty() && !exporters.contains(&"none") {
        outputs.push(Output::Console(ConsoleOptions::detect()));
    }
    Ok(outputs)
}

fn sampling(settings: &Settings) -> SamplingRules {
    let mut rules = SamplingRules::default();
    let ratio = settings.parsed("sampling.ratio", values::ratio);
    let sampler = settings.one("sampling.sampler").filter(|sampler| sampler.origin != Origin::Default);
    let name = sampler.map(|sampler| sampler.value);
    rules.fixed = match (name.as_deref(), ratio) {
        (Some("always_on" | "parentbased_always_on"), _) => Some(1.0),
        (Some("always_off" | "parentbased_always_off"), _) => Some(0.0),
        (Some("traceidratio" | "parentbased_traceidratio"), ratio) => Some(ratio.unwrap_or(1.0)),
        (Some(_), _) => None,
        (None, ratio) => ratio,
    };
    rules.parent_based = !matches!(name.as_deref(), Some("always_on" | "always_off" | "traceidratio"));
    for (name, ratio) in settings.entries("sampling.environments") {
        if let Some(ratio) = values::ratio(&ratio.value) {
            rules.environments.insert(name.to_lowercase(), ratio);
        }
    }
    // Whoever wants nothing wants no errors either.
    rules.keep_errors = settings.flag("sampling.keep_errors")
        && !matches!(name.as_deref(), Some("always_off" | "parentbased_always_off"));
    rules.hold_memory = settings.parsed("sampling.hold_memory", values::size).unwrap_or(rules.hold_memory);
    rules.hold_time = settings.duration("sampling.hold_time").unwrap_or(rules.hold_time);
    rules
}

fn programs(settings: &Settings) -> Result<GlobSet, ConfigError> {
    const PATH: &str = "correlation.programs";
    let mut names = GlobSetBuilder::new();
    let mut last = String::new();
    let invalid = |value: &str| ConfigError::Value {
        origin: settings.origin(PATH),
        key: PATH.to_owned(),
        value: value.to_owned(),
        expected: "the name of a file without its folder, with `*` for any text".to_owned(),
    };
    for name in settings.list(PATH).into_iter().filter(|name| !name.is_empty()) {
        names.add(Glob::new(&name).ok().filter(|_| !name.contains('/')).ok_or_else(|| invalid(&name))?);
        last = name;
    }
    names.build().map_err(|_| invalid(&last))
}

fn run_sources(settings: &Settings) -> Result<RunSources, ConfigError> {
    let mut sources = RunSources::default();
    let names = settings.list("correlation.sources");
    if !names.is_empty() {
        sources.order.clear();
    }
    for name in names {
        let source =
            SOURCES.into_iter().find(|source| source.to_string() == name).ok_or_else(|| ConfigError::Value {
                origin: settings.origin("correlation.sources"),
                key: "correlation.sources".to_owned(),
                value: name.clone(),
                expected: SOURCES.map(|source| format!("`{source}`")).join(", "),
            })?;
        sources.order.push(source);
    }
    let mut variables = settings.list("correlation.run_id_variables");
    variables.append(&mut sources.variables);
    sources.variables = variables;
    Ok(sources)
}

fn logs(settings: &Settings) -> LogSettings {
    let default = LogSettings::default();
    let count =
        |path: &str, default: u32| settings.count(path).and_then(|count| count.try_into().ok()).unwrap_or(default);
    LogSettings {
        level: settings.text("logs.level").and_then(|name| LogLevel::parse(&name)).unwrap_or(default.level),
        rate: count("logs.rate", default.rate),
        burst: count("logs.burst", default.burst),
    }
}

fn redaction(settings: &Settings) -> Result<RedactionRules, ConfigError> {
    let mut rules = RedactionRules::default();
    rules.attributes.extend(settings.list("redaction.attributes"));
    for pattern in settings.list("redaction.patterns") {
        let regex = regex::Regex::new(&pattern).map_err(|error| ConfigError::Value {
            origin: settings.origin("redaction.patterns"),
            key: "redaction.patterns".to_owned(),
            value: pattern,
            expected: format!("a regular expression ({})", error.to_string().lines().last().unwrap_or_default().trim()),
        })?;
        rules.patterns.push(regex);
    }
    rules.mask_sql = settings.text("redaction.sql").as_deref() != Some("raw");
    rules.max_length = settings.count("redaction.max_length").unwrap_or(rules.max_length);
    Ok(rules)
}

fn resource(settings: &Settings) -> ResourceDefaults {
    let attributes = settings.entries("resource.attributes");
    let attribute = |name: &str| attributes.get(name).map(|setting| setting.value.clone());
    ResourceDefaults {
        service_name: settings.text("resource.service_name").or_else(|| attribute("service.name")),
        environment: settings
            .text("environment")
            .or_else(|| attribute("deployment.environment.name"))
            .or_else(|| attribute("deployment.environment")),
        attributes: attributes.into_iter().map(|(name, setting)| (name, setting.value)).collect(),
    }
}

#[cfg(test)]
mod tests;
