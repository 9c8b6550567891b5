//! Packs: probes as YAML.
//!
//! ```yaml
//! pack: shop
//! probes:
//!   - name: checkout
//!     target: shop.cart:Cart.checkout
//!     span: {name: "checkout {shop.customer}"}
//!     attributes:
//!       shop.customer: self.customer.name
//!       shop.total: {path: return.total, at: exit}
//!     status: {from: shop.state, error: [refused], message: shop.reason}
//! ```

use std::fmt;
use std::marker::PhantomData;
use std::path::PathBuf;

use opentelemetry::Key;
use serde::de::value::MapAccessDeserializer;
use serde::de::{MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};
use serde_saphyr::{Location, Spanned};
use thiserror::Error;

use super::is_reserved;
use super::path::Path;
use super::plan::DEFAULT_MAX;
use super::probe::{Attribute, Kind, Moment, Probe, Role, SpanRule, StatusRule, Target, check_module};
use super::template::Template;
use super::version::VersionRange;
use crate::units::ProbeId;

/// A pack: its name, the versions it was verified with. Its probes are in the catalogue.
#[derive(Clone, Debug, PartialEq)]
pub struct Pack {
    /// Name.
    pub name: String,
    /// The file it comes from.
    pub file: String,
    /// The versions it is for, where it says so.
    pub versions: Option<Versions>,
}

/// The versions of a distribution that a pack was verified with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Versions {
    /// The distribution (as pip names it).
    pub distribution: String,
    /// The module that knows the version.
    pub module: String,
    /// Its attribute, a str.
    pub attribute: String,
    /// The range.
    pub supported: VersionRange,
}

/// A pack that cannot be used.
#[derive(Debug, Error)]
pub enum PackError {
    /// The file cannot be read.
    #[error("cannot read the probe pack {}: {source}", .file.display())]
    Read {
        /// The file.
        file: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// It is not what a pack must be.
    #[error("{file}:{line}:{column}: {problem}")]
    Invalid {
        /// The file.
        file: String,
        /// Line, from 1.
        line: u64,
        /// Column, from 1.
        column: u64,
        /// What is wrong and what was expected.
        problem: String,
    },
}

/// Parses a pack. Ids inside its probes ([`Kind::PairEnd`]) count from `first`.
pub(super) fn parse(file: &str, text: &str, first: u32) -> Result<(Pack, Vec<Probe>), PackError> {
    let options = serde_saphyr::options! { with_snippet: false };
    let yaml: PackYaml = serde_saphyr::from_str_with_options(text, options).map_err(|error| {
        let (line, column) = error.location().map_or((1, 1), |at| (at.line(), at.column()));
        let place = format!(" at line {line}, column {column}");
        let problem = error.without_snippet().to_string();
        let problem = problem.strip_prefix("error: ").unwrap_or(&problem).replace(&place, "");
        let problem = problem.trim_start_matches(&format!("line {line} column {column}: ")).to_owned();
        PackError::Invalid { file: file.to_owned(), line, column, problem }
    })?;
    Reader { file, first, pack: &yaml.pack }.read(&yaml)
}

struct Reader<'a> {
    file: &'a str,
    pack: &'a str,
    first: u32,
}

impl Reader<'_> {
    fn invalid(&self, at: Location, problem: impl fmt::Display) -> PackError {
        PackError::Invalid {
            file: self.file.to_owned(),
            line: at.line(),
            column: at.column(),
            problem: problem.to_string(),
        }
    }

    fn read(&self, yaml: &PackYaml) -> Result<(Pack, Vec<Probe>), PackError> {
        let versions = match &yaml.versions {
            None => None,
            Some(versions) => Some(Versions {
                distribution: versions.distribution.clone(),
                module: versions.module.clone(),
                attribute: versions.attribute.clone(),
                supported: self.parse_range(&versions.supported)?,
            }),
        };
        let pack = Pack { name: yaml.pack.clone(), file: self.file.to_owned(), versions };
        let mut probes: Vec<Probe> = Vec::new();
        for probe in &yaml.probes {
            if probes.iter().any(|known| known.name == probe.name.value) {
                let problem = format!("a second probe with the name `{}`", probe.name.value);
                return Err(self.invalid(probe.name.referenced, problem));
            }
            self.probe(probe, &mut probes)?;
        }
        Ok((pack, probes))
    }

    fn probe(&self, yaml: &ProbeYaml, probes: &mut Vec<Probe>) -> Result<(), PackError> {
        let name = &yaml.name.value;
        let at = yaml.name.referenced;
        let refuse = |what: &str| Err(self.invalid(at, format!("probe `{name}`: {what}")));
        let kind = match yaml.kind {
            KindYaml::Call => Kind::Call,
            KindYaml::Event => Kind::Event,
            KindYaml::Pair => Kind::PairBegin,
        };
        if kind == Kind::Event && yaml.span.is_some() {
            return refuse("an event has no `span`; it gives attributes to the open command span");
        }
        if kind == Kind::Event && yaml.status.is_some() {
            return refuse("an event has no `status`; expected only with `kind: call` or `kind: pair`");
        }
        if (kind == Kind::PairBegin) == yaml.end.is_empty() {
            return refuse("`end` is expected with `kind: pair`, and only there");
        }
        let span = match &yaml.span {
            None if kind == Kind::Event => None,
            None => return refuse("expected `span: {name: ...}`"),
            Some(span) => Some(SpanRule {
                name: Template::parse(&span.name.value).map_err(|e| self.invalid(span.name.referenced, e))?,
                role: span.role,
                unless: span.unless.0.clone(),
                instant: span.instant,
            }),
        };
        if kind == Kind::PairBegin && span.as_ref().is_some_and(|span| !span.unless.is_empty()) {
            return refuse("`unless` is expected only with `kind: call`");
        }
        let begin = ProbeId(self.first + probes.len() as u32);
        probes.push(Probe {
            name: name.clone(),
            pack: self.pack.to_owned(),
            kind,
            target: self.target(&yaml.target)?,
            found_in: self.modules(&yaml.found_in)?,
            with_variable: yaml.with_variable.clone(),
            versions: self.range(yaml.versions.as_ref())?,
            span,
            attributes: self.attributes(&yaml.attributes)?,
            status: yaml.status.as_ref().map(|status| self.status(status)).transpose()?,
        });
        for end in &yaml.end {
            probes.push(Probe {
                name: format!("{name} (end {})", end.target.value),
                pack: self.pack.to_owned(),
                kind: Kind::PairEnd { begin },
                target: self.target(&end.target)?,
                found_in: self.modules(&end.found_in)?,
                with_variable: None,
                versions: self.range(end.versions.as_ref())?,
                span: None,
                attributes: self.attributes(&end.attributes)?,
                status: None,
            });
        }
        Ok(())
    }

    fn target(&self, target: &Spanned<String>) -> Result<Target, PackError> {
        Target::parse(&target.value).map_err(|error| self.invalid(target.referenced, error))
    }

    fn parse_range(&self, range: &Spanned<String>) -> Result<VersionRange, PackError> {
        VersionRange::parse(&range.value).map_err(|error| self.invalid(range.referenced, error))
    }

    fn range(&self, range: Option<&Spanned<String>>) -> Result<Option<VersionRange>, PackError> {
        range.map(|range| self.parse_range(range)).transpose()
    }

    fn modules(&self, modules: &[Spanned<String>]) -> Result<Vec<String>, PackError> {
        for module in modules {
            check_module(&module.value).map_err(|error| self.invalid(module.referenced, error))?;
        }
        Ok(modules.iter().map(|module| module.value.clone()).collect())
    }

    fn status(&self, yaml: &StatusYaml) -> Result<StatusRule, PackError> {
        let raised: Result<Vec<_>, _> = yaml
            .raised
            .iter()
            .map(|text| Template::parse(&text.value).map_err(|error| self.invalid(text.referenced, error)))
            .collect();
        Ok(StatusRule {
            from: yaml.from.clone(),
            error: yaml.error.clone(),
            message: yaml.message.clone(),
            raised: raised?,
        })
    }

    fn attributes(&self, yaml: &Ordered<Spanned<Sources>>) -> Result<Vec<Attribute>, PackError> {
        let mut attributes = Vec::new();
        for (name, sources) in &yaml.0 {
            let at = sources.referenced;
            if is_reserved(name) {
                return Err(self
                    .invalid(at, format!("attribute `{name}`: the agent sets this one itself; choose another name")));
            }
            let key = Key::from(name.clone());
            for source in &sources.value.0 {
                attributes.push(
                    attribute(&key, source)
                        .map_err(|problem| self.invalid(at, format!("attribute `{name}`: {problem}")))?,
                );
            }
        }
        Ok(attributes)
    }
}

fn attribute(name: &Key, source: &SourceYaml) -> Result<Attribute, String> {
    let path = Path::parse(&source.path).map_err(|error| error.to_string())?;
    let at = match source.at {
        Some(Moment::Enter) if path.needs_exit() => {
            return Err(format!("`{path}` does not exist at enter; expected `at: exit`, or no `at`"));
        }
        Some(at) => at,
        None if path.needs_exit() => Moment::Exit,
        None => Moment::Enter,
    };
    let max = source.max.unwrap_or(DEFAULT_MAX);
    if max == 0 || max as usize > floe_ebpf::MAX_STR {
        return Err(format!("`max: {max}`: expected 1 to {} bytes", floe_ebpf::MAX_STR));
    }
    Ok(Attribute { name: name.clone(), path, at, max })
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct PackYaml {
    pack: String,
    versions: Option<VersionsYaml>,
    #[serde(default)]
    probes: Vec<ProbeYaml>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct VersionsYaml {
    distribution: String,
    module: String,
    attribute: String,
    supported: Spanned<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ProbeYaml {
    name: Spanned<String>,
    #[serde(default)]
    kind: KindYaml,
    target: Spanned<String>,
    #[serde(default)]
    found_in: Vec<Spanned<String>>,
    with_variable: Option<String>,
    versions: Option<Spanned<String>>,
    span: Option<SpanYaml>,
    #[serde(default)]
    attributes: Ordered<Spanned<Sources>>,
    status: Option<StatusYaml>,
    #[serde(default)]
    end: Vec<EndYaml>,
}

#[derive(Clone, Copy, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
enum KindYaml {
    #[default]
    Call,
    Event,
    Pair,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct SpanYaml {
    name: Spanned<String>,
    #[serde(default)]
    role: Role,
    #[serde(default)]
    unless: Ordered<Vec<String>>,
    #[serde(default)]
    instant: bool,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct StatusYaml {
    from: Option<String>,
    #[serde(default)]
    error: Vec<String>,
    message: Option<String>,
    #[serde(default)]
    raised: Vec<Spanned<String>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct EndYaml {
    target: Spanned<String>,
    versions: Option<Spanned<String>>,
    #[serde(default)]
    found_in: Vec<Spanned<String>>,
    #[serde(default)]
    attributes: Ordered<Spanned<Sources>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct SourceYaml {
    path: String,
    at: Option<Moment>,
    max: Option<u32>,
}

/// Where an attribute's value comes from: `path`, `{path: ..., at: ..., max: ...}`, or a list of these.
struct Sources(Vec<SourceYaml>);

impl<'de> Deserialize<'de> for Sources {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(SourcesVisitor)
    }
}

struct SourcesVisitor;

impl<'de> Visitor<'de> for SourcesVisitor {
    type Value = Sources;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a path, `{path: ..., at: enter | exit, max: bytes}`, or a list of these")
    }

    fn visit_str<E: serde::de::Error>(self, path: &str) -> Result<Sources, E> {
        Ok(Sources(vec![SourceYaml { path: path.to_owned(), at: None, max: None }]))
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Sources, A::Error> {
        SourceYaml::deserialize(MapAccessDeserializer::new(map)).map(|source| Sources(vec![source]))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Sources, A::Error> {
        let mut sources = Vec::new();
        while let Some(Sources(more)) = seq.next_element()? {
            sources.extend(more);
        }
        Ok(Sources(sources))
    }
}

/// A mapping in the order of the file.
struct Ordered<V>(Vec<(String, V)>);

impl<V> Default for Ordered<V> {
    fn default() -> Self {
        Self(Vec::new())
    }
}

impl<'de, V: Deserialize<'de>> Deserialize<'de> for Ordered<V> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct OrderedVisitor<V>(PhantomData<V>);
        impl<'de, V: Deserialize<'de>> Visitor<'de> for OrderedVisitor<V> {
            type Value = Ordered<V>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a mapping by attribute names")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Ordered<V>, A::Error> {
                let mut entries = Vec::new();
                while let Some(entry) = map.next_entry()? {
                    entries.push(entry);
                }
                Ok(Ordered(entries))
            }
        }
        deserializer.deserialize_map(OrderedVisitor(PhantomData))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = r#"
pack: shop
versions: {distribution: shop-core, module: shop, attribute: __version__, supported: ">=2,<3"}
probes:
  - name: checkout
    target: shop.cart:Cart.checkout
    span: {name: "checkout {shop.customer}", role: node, unless: {shop.customer: [nobody]}}
    attributes:
      shop.customer: self.customer.name
      shop.total: {path: return.total, max: 16}
      shop.state: [self.state, {path: self.state, at: exit}]
    status: {from: shop.state, error: [refused], message: shop.reason, raised: ["{shop.reason}"]}
  - name: tax
    kind: pair
    target: shop.tax:begin
    span: {name: tax}
    end:
      - target: shop.tax:end
        attributes: {shop.tax: "return[0]"}
  - name: id
    kind: event
    target: shop:new_id
    attributes: {shop.id: return}
"#;

    fn error(text: &str) -> String {
        parse("shop.yaml", text, 0).expect_err("refused").to_string()
    }

    #[test]
    fn a_pack_is_read_with_all_its_parts() {
        let (pack, probes) = parse("shop.yaml", GOOD, 10).unwrap();
        assert_eq!(pack.name, "shop");
        assert_eq!(pack.versions.unwrap().supported.contains("2.1"), Some(true));
        let names: Vec<_> = probes.iter().map(|probe| probe.name.as_str()).collect();
        assert_eq!(names, ["checkout", "tax", "tax (end shop.tax:end)", "id"]);
        let attributes: Vec<_> =
            probes[0].attributes.iter().map(|a| (a.name.as_str(), a.path.to_string(), a.at, a.max)).collect();
        assert_eq!(
            attributes,
            [
                ("shop.customer", "arg0.customer.name".to_owned(), Moment::Enter, 256),
                ("shop.total", "return.total".to_owned(), Moment::Exit, 16),
                ("shop.state", "arg0.state".to_owned(), Moment::Enter, 256),
                ("shop.state", "arg0.state".to_owned(), Moment::Exit, 256),
            ]
        );
        let span = probes[0].span.as_ref().unwrap();
        assert_eq!(span.role, Role::Node);
        assert_eq!(span.unless, [("shop.customer".to_owned(), vec!["nobody".to_owned()])]);
        assert_eq!(probes[2].kind, Kind::PairEnd { begin: ProbeId(11) });
        assert_eq!(probes[3].kind, Kind::Event);
    }

    #[test]
    fn a_mistake_gives_file_line_and_what_was_expected() {
        for (from, to, expected) in [
            (
                "self.customer.name",
                "self..name",
                "shop.yaml:9:22: attribute `shop.customer`: path `self..name`, character 6: expected an attribute name, found `.name`",
            ),
            ("kind: event", "kind: evnt", "shop.yaml:21:11: unknown variant `evnt`, expected one of call, event, pair"),
            ("    kind: event", "    knd: event", "shop.yaml:21:5: unknown field `knd`"),
            ("max: 16", "max: 5000", "shop.yaml:10:19: attribute `shop.total`: `max: 5000`: expected 1 to 4095 bytes"),
            ("max: 16", "maxi: 16", "unknown field `maxi`, expected one of path, at, max"),
            ("max: 16", "at: enter", "`return.total` does not exist at enter"),
            ("shop.total:", "exception.type:", "attribute `exception.type`: the agent sets this one itself"),
            ("shop.total:", "shop.customer:", "duplicate"),
            ("role: node", "role: nod", "unknown variant `nod`, expected one of command, node, none"),
            ("name: tax", "name: checkout", "a second probe with the name `checkout`"),
            ("span: {name: tax}", "span: {name: \"{\"}", "shop.yaml:16:18: template `{`"),
            ("    span: {name: tax}\n", "", "probe `tax`: expected `span"),
            ("kind: pair", "kind: call", "probe `tax`: `end` is expected with `kind: pair`"),
            (
                "target: shop:new_id",
                "target: shop.new_id",
                "shop.yaml:22:13: target `shop.new_id`: expected `package.module",
            ),
            ("    target: shop:new_id\n", "", "missing field `target`"),
            ("\">=2,<3\"", "2", "shop.yaml:3:86: version range `2`: expected bounds"),
            ("shop.customer: self.customer.name", "shop.customer: 5", "a path"),
            ("{shop.id: return}", "[a]", "shop.yaml:23:17: expected mapping start"),
        ] {
            assert!(GOOD.contains(from), "{from}");
            let error = error(&GOOD.replacen(from, to, 1));
            assert!(error.contains(expected), "{from} -> {to}\n  {error}\n  does not contain: {expected}");
            assert!(error.starts_with("shop.yaml:"), "{error}");
        }
    }

    #[test]
    fn something_that_is_not_yaml_is_refused_with_its_place() {
        let error = error("pack: x\nprobes: [\n");
        assert!(error.starts_with("shop.yaml:"), "{error}");
    }
}
