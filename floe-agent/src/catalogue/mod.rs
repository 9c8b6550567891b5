//! What to probe: packs, their schema, and their compilation to capture plans.
//!
//! A pack is YAML ([`pack`]); a probe may also come from the command line ([`notation`]). Both become [`Probe`]s, whose
//! paths ([`path`]) are compiled to plans for the kernel side ([`plan`]). Nothing else in the agent knows a framework.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::PathBuf;
use std::sync::Arc;

use opentelemetry::Key;
use thiserror::Error;

pub mod notation;
pub mod pack;
pub mod path;
pub mod plan;
pub mod probe;
pub mod template;
pub mod version;
mod yaml;

pub use pack::{Pack, PackError, Versions};
pub use plan::{PlanError, PlanRef, Plans, ProbePlans};
pub use probe::{Attribute, Kind, Moment, Probe, Role, SpanRef, SpanRule, StatusRule, Target};

use crate::units::ProbeId;

/// The packs in the binary: file name and text.
pub(crate) const EMBEDDED: &[(&str, &str)] = &[
    ("packs/dbt.yaml", include_str!("packs/dbt.yaml")),
    ("packs/dagster.yaml", include_str!("packs/dagster.yaml")),
    ("packs/floe.yaml", include_str!("packs/floe.yaml")),
    ("packs/logging.yaml", include_str!("packs/logging.yaml")),
    ("packs/opentelemetry.yaml", include_str!("packs/opentelemetry.yaml")),
];

/// The pack name of probes that come from the command line.
pub const COMMAND_LINE: &str = "command line";
/// The pack name of probes that the agent needs itself.
const AGENT: &str = "agent";
/// The end of the `with` block of every `@contextlib.contextmanager`.
const CONTEXT_EXIT: (&str, &str) = ("contextlib", "_GeneratorContextManager.__exit__");

/// The loaded probes and their plans.
#[derive(Clone, Debug)]
pub struct Catalogue {
    packs: Vec<Pack>,
    probes: Vec<Probe>,
    plans: Plans,
    by_module: BTreeMap<String, Vec<ProbeId>>,
}

/// A catalogue, and the packs that are not in it because something is wrong with them.
#[derive(Debug)]
pub struct Loaded {
    /// What can be used.
    pub catalogue: Catalogue,
    /// What is wrong with the packs that were left out.
    pub left_out: Vec<CatalogueError>,
}

/// Probes that cannot be loaded.
#[derive(Debug, Error)]
pub enum CatalogueError {
    /// A pack.
    #[error(transparent)]
    Pack(#[from] PackError),
    /// A probe on the command line.
    #[error("--probe '{text}': {source}")]
    Notation {
        /// As it was written.
        text: String,
        /// What is wrong.
        source: notation::NotationError,
    },
    /// Two probes on one function.
    #[error("{place}: two probes on `{target}`: {first} and {second}; remove one")]
    Twice {
        /// Where the second is written.
        place: String,
        /// The function.
        target: String,
        /// One probe.
        first: String,
        /// The other probe.
        second: String,
    },
    /// They do not fit the kernel side.
    #[error("{place}: {source}")]
    Plan {
        /// Where the first of them is written.
        place: String,
        /// Why not.
        source: PlanError,
    },
}

/// The JSON schema of packs.
pub fn schema() -> serde_json::Value {
    schemars::schema_for!(yaml::PackYaml).to_value()
}

impl Catalogue {
    /// The packs of the binary.
    pub fn embedded() -> Result<Self, CatalogueError> {
        Self::load(&[], &[]).map(|loaded| loaded.catalogue)
    }

    /// The packs of the binary, those in `files` (a pack with a known name replaces it), and the probes that were
    /// given on the command line. A pack with a mistake in it is left out. A file that cannot be read and a mistake on
    /// the command line are errors.
    pub fn load(files: &[PathBuf], probes: &[String]) -> Result<Loaded, CatalogueError> {
        let embedded = EMBEDDED.iter().map(|(file, text)| ((*file).to_owned(), (*text).to_owned()));
        Self::read(embedded.collect(), files, probes)
    }

    /// Only the packs in `files` and the probes that were given on the command line.
    pub fn load_only(files: &[PathBuf], probes: &[String]) -> Result<Loaded, CatalogueError> {
        Self::read(Vec::new(), files, probes)
    }

    fn read(mut texts: Vec<(String, String)>, files: &[PathBuf], probes: &[String]) -> Result<Loaded, CatalogueError> {
        for file in files {
            let text =
                std::fs::read_to_string(file).map_err(|source| PackError::Read { file: file.clone(), source })?;
            texts.push((file.display().to_string(), text));
        }
        Self::of_texts(&texts, probes)
    }

    /// A catalogue of only these probes, in the notation of the command line.
    pub fn of_probes(probes: &[String]) -> Result<Self, CatalogueError> {
        Self::of_texts(&[], probes).map(|loaded| loaded.catalogue)
    }

    /// The packs in these texts (file name, text); all of them must be right.
    #[cfg(any(test, fuzzing))]
    pub(crate) fn from_texts(texts: &[(String, String)], probes: &[String]) -> Result<Self, CatalogueError> {
        let Loaded { catalogue, left_out } = Self::of_texts(texts, probes)?;
        left_out.into_iter().next().map_or(Ok(catalogue), Err)
    }

    fn of_texts(texts: &[(String, String)], probes: &[String]) -> Result<Loaded, CatalogueError> {
        let mut packs: Vec<(Pack, Vec<Probe>)> = Vec::new();
        let mut left_out = Vec::new();
        for (file, text) in texts {
            let fitting = pack::parse(file, text).map_err(CatalogueError::from).and_then(|pack| {
                let mut packs = packs.clone();
                packs.retain(|(known, _)| known.name != pack.0.name);
                packs.push(pack);
                Self::new(packs.clone(), Vec::new())?;
                Ok(packs)
            });
            match fitting {
                Ok(fitting) => packs = fitting,
                Err(error) => left_out.push(error),
            }
        }
        let mut own = Vec::new();
        for text in probes {
            let probe =
                notation::parse(text).map_err(|source| CatalogueError::Notation { text: text.clone(), source })?;
            own.push(probe);
        }
        Ok(Loaded { catalogue: Self::new(packs, own)?, left_out })
    }

    fn new(packs: Vec<(Pack, Vec<Probe>)>, own: Vec<Probe>) -> Result<Self, CatalogueError> {
        let mut probes: Vec<Probe> = Vec::new();
        let mut names = Vec::new();
        for (pack, own) in packs {
            let first = probes.len() as u32;
            probes.extend(own.into_iter().map(|mut probe| {
                probe.shift(first);
                probe
            }));
            names.push(pack);
        }
        probes.extend(own);
        if probes.iter().any(|probe| probe.kind == Kind::ContextManager) {
            probes.push(context_exit());
        }
        let mut targets: HashMap<&Target, &Probe> = HashMap::new();
        let mut by_module: BTreeMap<String, Vec<ProbeId>> = BTreeMap::new();
        for (index, probe) in probes.iter().enumerate() {
            if let Some(first) = targets.insert(&probe.target, probe) {
                let describe = |probe: &Probe| format!("`{}` ({})", probe.name, probe.pack);
                return Err(CatalogueError::Twice {
                    place: probe.place.clone(),
                    target: probe.target.to_string(),
                    first: describe(first),
                    second: describe(probe),
                });
            }
            for module in probe.modules().collect::<BTreeSet<_>>() {
                by_module.entry(module.to_owned()).or_default().push(ProbeId(index as u32));
            }
        }
        let plans = plan::compile(&probes).map_err(|source| CatalogueError::Plan {
            place: probes
                .iter()
                .find(|probe| probe.name == source.probe())
                .map_or_else(String::new, |probe| probe.place.clone()),
            source,
        })?;
        Ok(Self { packs: names, probes, plans, by_module })
    }

    /// All probes; the index is the [`ProbeId`].
    pub fn probes(&self) -> &[Probe] {
        &self.probes
    }

    /// A probe.
    pub fn probe(&self, id: ProbeId) -> Option<&Probe> {
        self.probes.get(id.0 as usize)
    }

    /// The rule of a span.
    pub fn span(&self, span: SpanRef) -> Option<&SpanRule> {
        self.probe(span.probe)?.span_rule(span.rule)
    }

    /// The packs.
    pub fn packs(&self) -> &[Pack] {
        &self.packs
    }

    /// The compiled plans.
    pub fn plans(&self) -> &Plans {
        &self.plans
    }

    /// The names of the fields that a probe's plan for this moment sends, by field number.
    pub fn fields(&self, id: ProbeId, moment: Moment) -> &[opentelemetry::Key] {
        let plans = self.plans.probes.get(id.0 as usize);
        let plan = plans.and_then(|plans| match moment {
            Moment::Enter => plans.enter.as_ref(),
            Moment::Exit => plans.exit.as_ref(),
        });
        plan.map_or(&[], |plan| plan.fields.as_slice())
    }

    /// The modules whose import can bring a probed function, sorted.
    pub fn modules(&self) -> impl Iterator<Item = &str> {
        self.by_module.keys().map(String::as_str)
    }

    /// The probes whose function may be found in a module.
    pub fn probes_of_module(&self, module: &str) -> impl Iterator<Item = (ProbeId, &Probe)> {
        let ids = self.by_module.get(module).map_or(&[][..], Vec::as_slice);
        ids.iter().map(|id| (*id, &self.probes[id.0 as usize]))
    }
}

/// The probe that ends the spans of context managers. The exception that leaves a block comes in as an argument.
fn context_exit() -> Probe {
    let (module, qualname) = CONTEXT_EXIT;
    let target = Target { module: module.to_owned(), qualname: qualname.to_owned() };
    let mut probe = Probe::new("context manager's exit".to_owned(), AGENT, AGENT.to_owned(), Kind::ContextExit, target);
    let value = path::Root::Argument { position: Some(2), keyword: None };
    let attribute = |name, steps, leaf, max| Attribute {
        name: opentelemetry::Key::from_static_str(name),
        path: path::Path { root: value.clone(), steps, leaf, join: None },
        at: Moment::Enter,
        max,
    };
    let arguments = vec![path::Step::ExceptionArgs, path::Step::Item(0)];
    probe.attributes = vec![
        attribute(plan::EXCEPTION_TYPE, vec![path::Step::Type], path::Leaf::TypeName, plan::DEFAULT_MAX),
        attribute(plan::EXCEPTION_MESSAGE, arguments, path::Leaf::Value, plan::DEFAULT_MAX),
    ];
    probe
}

/// The key of an attribute; copies of it share their text, because every span has some.
pub(crate) fn key(name: &str) -> Key {
    Key::from(Arc::<str>::from(name))
}

/// Attributes that the agent sets itself.
pub(crate) fn is_reserved(name: &str) -> bool {
    const NAMES: [&str; 6] =
        ["error.type", "thread.id", "code.function.name", "floe.incomplete", "floe.truncated", "floe.recursion"];
    const PREFIXES: [&str; 4] = ["exception.", "floe.trace.", "floe.nodes", "floe.process."];
    NAMES.contains(&name) || PREFIXES.iter().any(|prefix| name.starts_with(prefix))
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn load(text: &str, probes: &[&str]) -> Result<Catalogue, CatalogueError> {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(text.as_bytes()).unwrap();
        let probes: Vec<String> = probes.iter().map(|&probe| probe.to_owned()).collect();
        let Loaded { catalogue, left_out } = Catalogue::load(&[file.path().to_owned()], &probes)?;
        left_out.into_iter().next().map_or(Ok(catalogue), Err)
    }

    #[test]
    fn the_embedded_packs_are_valid_and_fit() {
        let catalogue = Catalogue::embedded().unwrap();
        assert_eq!(catalogue.packs()[0].name, "dbt");
        let modules: Vec<_> = catalogue.modules().collect();
        assert!(modules.contains(&"dbt.cli.main"), "{modules:?}");
        assert!(!modules.contains(&"dbt.cli.requires"), "found elsewhere: {modules:?}");
        let (id, command) = catalogue.probes_of_module("dbt.cli.main").next().unwrap();
        assert_eq!(command.span.as_ref().unwrap().role, Role::Command);
        assert_eq!(catalogue.probe(id), Some(command));
        assert!(catalogue.fields(id, Moment::Enter).iter().any(|name| name.as_str() == "dbt.command"));
        assert_eq!(catalogue.probes_of_module("nothing").count(), 0);
        let versions = catalogue.packs()[0].versions.as_ref().unwrap();
        assert_eq!(versions.supported.contains("1.8.9"), Some(true));
        assert_eq!(versions.supported.contains("1.12.6"), Some(true));
        assert_eq!(versions.supported.contains("1.7.17"), Some(false));
    }

    #[test]
    fn a_file_adds_a_pack_or_replaces_one() {
        let yaml = "pack: NAME\nprobes:\n  - {name: f, target: \"m:f\", span: {name: f}}\n";
        let added = load(&yaml.replace("NAME", "mine"), &["m:g(x=arg0)"]).unwrap();
        assert!(added.packs().iter().map(|pack| pack.name.as_str()).eq([
            "dbt",
            "dagster",
            "floe",
            "logging",
            "opentelemetry",
            "mine"
        ]));
        assert!(added.probes().iter().any(|probe| probe.pack == COMMAND_LINE));
        let replaced = load(&yaml.replace("NAME", "dbt"), &[]).unwrap();
        assert_eq!(replaced.probes().iter().filter(|probe| probe.pack == "dbt").count(), 1);
    }

    #[test]
    fn a_pack_with_a_mistake_is_left_out_and_the_others_stay() {
        let probe = |name: &str, target: &str| {
            format!("pack: {name}\nprobes:\n  - {{name: f, target: \"{target}\", span: {{name: f}}}}\n")
        };
        let text = |name: &str, text: String| (format!("{name}.yaml"), text);
        let texts = [
            text("a", probe("a", "m:f")),
            text("b", probe("b", "m.g")),
            text("c", probe("c", "m:f")),
            text("d", "pack: d\nprobes: 3\n".into()),
            text("e", probe("e", "m:g")),
            text("a2", "pack: a\nprobs: []\n".into()),
        ];
        let Loaded { catalogue, left_out } = Catalogue::of_texts(&texts, &["m:h".into()]).unwrap();
        assert!(catalogue.packs().iter().map(|pack| pack.name.as_str()).eq(["a", "e"]));
        assert_eq!(catalogue.probes().len(), 3);
        let left_out: Vec<_> = left_out.iter().map(ToString::to_string).collect();
        for (error, expected) in left_out.iter().zip([
            "b.yaml:3:23: target `m.g`: expected `package.module",
            "c.yaml:3: two probes on `m:f`: `f` (a) and `f` (c); remove one",
            "d.yaml:2:",
            "a2.yaml:2:1: unknown field `probs`",
        ]) {
            assert!(error.starts_with(expected), "{error}");
        }
        assert_eq!(left_out.len(), 4);
    }

    #[test]
    fn a_pack_that_does_not_fit_the_kernel_side_is_left_out() {
        let attributes: Vec<_> = (0..70).map(|n| format!("a{n}: arg0.x{n}")).collect();
        let yaml = format!(
            "pack: big\nprobes:\n  - {{name: f, target: \"m:f\", span: {{name: f}}, attributes: {{{}}}}}\n",
            attributes.join(", ")
        );
        let error = load(&yaml, &[]).unwrap_err().to_string();
        assert!(error.contains(":3: probe `f`: its attributes at enter need "), "{error}");
    }

    #[test]
    fn the_end_of_context_managers_is_probed_where_one_is() {
        let yaml = "pack: p\nprobes:\n  - {name: x, kind: contextmanager, target: \"m:a\", span: {name: x}}\n";
        let catalogue = load(yaml, &[]).unwrap();
        let exit = catalogue.probes().last().unwrap();
        assert_eq!((exit.kind, exit.target.module.as_str()), (Kind::ContextExit, "contextlib"));
        let id = ProbeId(catalogue.probes().len() as u32 - 1);
        assert!(catalogue.fields(id, Moment::Enter).iter().any(|name| name.as_str() == plan::EXCEPTION_TYPE));
        let plain = ("p.yaml".to_owned(), yaml.replace("contextmanager", "call"));
        let Loaded { catalogue, .. } = Catalogue::of_texts(&[plain], &[]).unwrap();
        assert!(catalogue.probes().iter().all(|probe| probe.kind != Kind::ContextExit));
    }

    /// The mistakes that a validator with only the schema finds: unknown keys, missing keys, wrong types.
    fn fits(schema: &serde_json::Value, root: &serde_json::Value, value: &serde_json::Value) -> Result<(), String> {
        use serde_json::Value;
        if let Some(Value::String(reference)) = schema.get("$ref") {
            let pointer = reference.strip_prefix('#').expect("local");
            return fits(root.pointer(pointer).expect("defined"), root, value);
        }
        if let Some(choices) = schema.get("anyOf").or(schema.get("oneOf")).and_then(Value::as_array) {
            let all: Vec<_> = choices.iter().map(|choice| fits(choice, root, value)).collect();
            return if all.iter().any(Result::is_ok) { Ok(()) } else { Err(format!("{value}: {all:?}")) };
        }
        if let Some(constant) = schema.get("const") {
            return if constant == value { Ok(()) } else { Err(format!("{value} is not {constant}")) };
        }
        if let Some(allowed) = schema.get("enum").and_then(Value::as_array) {
            return if allowed.contains(value) { Ok(()) } else { Err(format!("{value} is none of {allowed:?}")) };
        }
        let kinds: Vec<&str> = match schema.get("type") {
            Some(Value::String(kind)) => vec![kind],
            Some(Value::Array(kinds)) => kinds.iter().filter_map(Value::as_str).collect(),
            _ => return Ok(()),
        };
        let kind = match value {
            Value::Null => "null",
            Value::Bool(_) => "boolean",
            Value::Number(number) if number.is_f64() => "number",
            Value::Number(_) => "integer",
            Value::String(_) => "string",
            Value::Array(_) => "array",
            Value::Object(_) => "object",
        };
        let is = |wanted: &&str| *wanted == kind || (kind == "integer" && *wanted == "number");
        if !kinds.iter().any(is) {
            return Err(format!("{value} is no {kinds:?}"));
        }
        if let Value::Array(items) = value
            && let Some(item) = schema.get("items")
        {
            return items.iter().try_for_each(|value| fits(item, root, value));
        }
        let Value::Object(object) = value else { return Ok(()) };
        for key in schema.get("required").and_then(Value::as_array).into_iter().flatten() {
            if !object.contains_key(key.as_str().unwrap()) {
                return Err(format!("{key} is missing"));
            }
        }
        for (key, value) in object {
            let known = schema.get("properties").and_then(|all| all.get(key));
            match known.or(schema.get("additionalProperties")) {
                Some(Value::Bool(false)) => return Err(format!("{key} is not known")),
                Some(schema) => fits(schema, root, value)?,
                None => {}
            }
        }
        Ok(())
    }

    #[test]
    fn the_schema_takes_the_packs_and_refuses_what_the_reader_refuses() {
        let schema = schema();
        let check = |text: &str| {
            let value: serde_json::Value = serde_saphyr::from_str(text).unwrap();
            fits(&schema, &schema, &value)
        };
        for (file, text) in EMBEDDED {
            check(text).unwrap_or_else(|error| panic!("{file}: {error}"));
        }
        let whole = pack::WHOLE;
        check(whole).unwrap();
        for (from, to) in [
            ("pack: shop", "pak: shop"),
            ("kind: event", "kind: evnt"),
            ("role: command", "role: commander"),
            ("kind: consumer", "kind: client2"),
            ("key: \"{shop.order}\"", "ky: x"),
            ("add: 1", "add: one"),
            ("add: 1", "ad: 1"),
            ("at: enter", "at: begin"),
            ("from: raised", "from: within"),
            ("waits_for: receipt", "waits_for: []"),
            ("prefixes: [shop.]", "prefixes: shop."),
            ("target: shop:set", "targt: shop:set"),
            ("- name: log", "- nam: log"),
        ] {
            assert!(whole.contains(from), "{from}");
            let wrong = whole.replacen(from, to, 1);
            assert!(check(&wrong).is_err(), "{from} -> {to}");
            assert!(pack::parse("x.yaml", &wrong).is_err(), "{from} -> {to}");
        }
    }

    #[test]
    fn ends_of_pairs_know_their_beginning_behind_other_packs() {
        let yaml =
            "pack: p\nprobes:\n  - {name: x, kind: pair, target: \"m:a\", span: {name: x}, end: [{target: \"m:b\"}]}\n";
        let catalogue = load(yaml, &[]).unwrap();
        let end = catalogue.probes().iter().rfind(|probe| matches!(probe.kind, Kind::PairEnd { .. })).unwrap();
        let Kind::PairEnd { begin } = end.kind else { panic!() };
        assert_eq!(catalogue.probe(begin).unwrap().target.to_string(), "m:a");
    }

    #[test]
    fn two_probes_on_one_function_are_refused() {
        let error = Catalogue::load(&[], &["m:f".into(), "m:f(x=arg0)".into()]).unwrap_err().to_string();
        assert_eq!(
            error,
            "--probe 'm:f(x=arg0)': two probes on `m:f`: `m:f` (command line) and `m:f` (command line); remove one"
        );
    }

    #[test]
    fn errors_name_the_file_or_the_option() {
        let error = Catalogue::load(&["/nonexistent/x.yaml".into()], &[]).unwrap_err().to_string();
        assert!(error.starts_with("cannot read the probe pack /nonexistent/x.yaml: No such file"), "{error}");
        let error = Catalogue::load(&[], &["m.f".into()]).unwrap_err().to_string();
        assert!(error.starts_with("--probe 'm.f': target `m.f`"), "{error}");
    }
}
