//! Packs: probes as YAML, with the notation of `docs/configuration.md`.
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

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::path::PathBuf;

use opentelemetry::Key;
use serde_saphyr::{Location, Spanned};
use thiserror::Error;

use super::path::Path;
use super::plan::DEFAULT_MAX;
use super::probe::{
    Attribute, Computed, Condition, DynamicRule, EventRule, ExceptionRule, ExternalRule, Formula, Kind, LinkRule,
    LogRule, Moment, Probe, Read, Role, SpanEventRule, SpanRef, SpanRule, StatusRule, Subject, Target, ValueMap,
    check_module,
};
use super::template::Template;
use super::version::VersionRange;
use super::yaml::{
    DynamicYaml, EndYaml, EventYaml, ExceptionYaml, KindYaml, LinkYaml, LogYaml, Ordered, PackYaml, ProbeYaml,
    RuleYaml, Scalar, SourceYaml, Sources, SpanYaml, StatusYaml, Templates, Text,
};
use super::{is_reserved, key};
use crate::units::ProbeId;

/// In `end`: the return of the call that began the span.
const OWN_RETURN: &str = "return";
/// In a link's key: an item of `each`.
pub(crate) const LINK_VALUE: &str = "value";

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

/// Parses a pack. Ids inside its probes count from 0.
pub(super) fn parse(file: &str, text: &str) -> Result<(Pack, Vec<Probe>), PackError> {
    let options = serde_saphyr::options! { with_snippet: false };
    let yaml: PackYaml = serde_saphyr::from_str_with_options(text, options).map_err(|error| {
        let (line, column) = error.location().map_or((1, 1), |at| (at.line(), at.column()));
        let place = format!(" at line {line}, column {column}");
        let problem = error.without_snippet().to_string();
        let problem = problem.strip_prefix("error: ").unwrap_or(&problem).replace(&place, "");
        let problem = problem.trim_start_matches(&format!("line {line} column {column}: ")).to_owned();
        PackError::Invalid { file: file.to_owned(), line, column, problem }
    })?;
    let mut reader =
        Reader { file, pack: &yaml.pack, spans: HashMap::new(), events: HashMap::new(), names: Vec::new() };
    reader.read(&yaml)
}

struct Reader<'a> {
    file: &'a str,
    pack: &'a str,
    /// The spans of the pack by their ids.
    spans: HashMap<String, SpanRef>,
    /// Its events by the names of their probes.
    events: HashMap<String, ProbeId>,
    /// Where attributes are named, to be checked when all are known.
    names: Vec<Named>,
}

/// A place that names an attribute.
struct Named {
    at: Location,
    what: String,
    attribute: String,
    scope: Scope,
}

/// Which attributes may be named.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Scope {
    /// Those of the probe at its beginning, and what a span inherits.
    Probe(usize),
    /// Those of the probe, what a span inherits, and what else is told of it until it ends.
    Span(SpanRef),
}

/// The attributes of a probe.
#[derive(Clone, Default)]
struct Names {
    known: HashSet<String>,
    /// Every entry of a dict is an attribute.
    any: bool,
}

impl Names {
    fn add(&mut self, name: &str) {
        self.any |= name == "*";
        self.known.insert(name.to_owned());
    }

    fn add_all(&mut self, other: &Self) {
        self.any |= other.any;
        self.known.extend(other.known.iter().cloned());
    }

    fn has(&self, name: &str) -> bool {
        let entry = |known: &String| name.strip_prefix(known.as_str()).is_some_and(|rest| rest.starts_with('.'));
        self.any || self.known.contains(name) || self.known.iter().any(entry)
    }
}

/// What `attributes` says.
#[derive(Default)]
struct Captures {
    attributes: Vec<Attribute>,
    values: Vec<(Key, ValueMap)>,
    computed: Vec<Computed>,
}

type Checked<T> = Result<T, PackError>;

impl Reader<'_> {
    fn invalid(&self, at: Location, problem: impl fmt::Display) -> PackError {
        PackError::Invalid {
            file: self.file.to_owned(),
            line: at.line(),
            column: at.column(),
            problem: problem.to_string(),
        }
    }

    fn read(&mut self, yaml: &PackYaml) -> Checked<(Pack, Vec<Probe>)> {
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
        self.find_spans(yaml)?;
        let mut probes: Vec<Probe> = Vec::new();
        for probe in &yaml.probes {
            self.probe(probe, &mut probes)?;
        }
        self.check_names(&probes)?;
        Ok((pack, probes))
    }

    /// Gives every span its number before anything names it.
    fn find_spans(&mut self, yaml: &PackYaml) -> Checked<()> {
        let mut index = 0;
        for (at, probe) in yaml.probes.iter().enumerate() {
            if yaml.probes[..at].iter().any(|known| known.name.value == probe.name.value) {
                let problem = format!("a second probe with the name `{}`", probe.name.value);
                return Err(self.invalid(probe.name.referenced, problem));
            }
            let own = probe.span.as_ref().map(|span| (None, span));
            let begun = probe.rules.iter().enumerate();
            let begun = begun.filter_map(|(at, rule)| Some((Some(at as u16), rule.begin.as_ref()?)));
            for (rule, span) in own.into_iter().chain(begun) {
                let id = match (&span.id, rule) {
                    (Some(id), _) => id,
                    (None, None) => &probe.name,
                    (None, Some(_)) => {
                        let problem = "a span that a rule begins needs an `id`, by which other rules call it";
                        return Err(self.invalid(span.name.referenced, problem));
                    }
                };
                if matches!(id.value.as_str(), "command" | "innermost") && span.id.is_some() {
                    let problem = format!("a span cannot have the id `{}`: in `on` it means something else", id.value);
                    return Err(self.invalid(id.referenced, problem));
                }
                let reference = SpanRef { probe: ProbeId(index), rule };
                if self.spans.insert(id.value.clone(), reference).is_some() {
                    return Err(self.invalid(id.referenced, format!("a second span with the id `{}`", id.value)));
                }
            }
            if probe.kind == KindYaml::Event {
                self.events.insert(probe.name.value.clone(), ProbeId(index));
            }
            index += 1 + probe.end.iter().filter(|end| end.target.value != OWN_RETURN).count() as u32;
        }
        Ok(())
    }

    fn probe(&mut self, yaml: &ProbeYaml, probes: &mut Vec<Probe>) -> Checked<()> {
        let name = &yaml.name.value;
        let at = yaml.name.referenced;
        let kind = match yaml.kind {
            KindYaml::Call => Kind::Call,
            KindYaml::ContextManager => Kind::ContextManager,
            KindYaml::Event => Kind::Event,
            KindYaml::Pair => Kind::PairBegin,
        };
        let refuse = |what: &str| Err(self.invalid(at, format!("probe `{name}`: {what}")));
        if kind == Kind::Event {
            if yaml.span.is_some() {
                return refuse("an event has no `span`; it tells something of a span (`on`), or begins one in `rules`");
            }
            let single = yaml.on.is_some() || yaml.event.is_some() || yaml.dynamic.is_some() || !yaml.links.is_empty();
            let single = single || yaml.status.is_some() || yaml.exception.is_some();
            if single && !yaml.rules.is_empty() {
                return refuse("with `rules`, what else an event does is written in a rule");
            }
        } else {
            if yaml.span.is_none() {
                return refuse("expected `span: {name: ...}`");
            }
            let foreign = [
                ("on", yaml.on.is_some()),
                ("event", yaml.event.is_some()),
                ("dynamic", yaml.dynamic.is_some()),
                ("rules", !yaml.rules.is_empty()),
                ("at", yaml.at.is_some()),
            ];
            if let Some((key, _)) = foreign.iter().find(|(_, given)| *given) {
                return refuse(&format!("`{key}` is expected only with `kind: event`"));
            }
            if !yaml.links.is_empty() {
                return refuse("the links of a span are expected in `span`");
            }
        }
        if kind != Kind::PairBegin && !yaml.end.is_empty() {
            return refuse("`end` is expected only with `kind: pair`");
        }
        match (kind, yaml.exception.as_ref().and_then(|exception| exception.from)) {
            (_, None) | (Kind::Event, _) | (Kind::PairBegin, Some(Read::Argument)) => {}
            (Kind::PairBegin, Some(Read::Raised)) => {
                return refuse("`exception.from: raised` is read anyway where a call of a pair raises");
            }
            _ => return refuse("`exception.from` is expected only with `kind: event` and `kind: pair`"),
        }
        if kind != Kind::Call && yaml.span.as_ref().is_some_and(|span| span.waits_for.is_some()) {
            return refuse("`waits_for` is expected only with `kind: call`");
        }
        let number = probes.len();
        let begin = ProbeId(number as u32);
        let reference = SpanRef { probe: begin, rule: None };
        let place = format!("{}:{}", self.file, at.line());
        let mut probe = Probe::new(name.clone(), self.pack, place.clone(), kind, self.target(&yaml.target)?);
        probe.implementations = yaml.implementations;
        probe.scan = yaml.scan;
        probe.found_in = self.modules(&yaml.found_in)?;
        probe.versions = self.range(yaml.versions.as_ref())?;
        let captures = self.captures(&yaml.attributes, Scope::Probe(number), yaml.log.is_some())?;
        probe.attributes = captures.attributes;
        probe.values = captures.values;
        probe.computed = captures.computed;
        if let Some(span) = &yaml.span {
            probe.span = Some(self.span(span, name, number, reference)?);
            probe.status = self.status(yaml.status.as_ref(), Scope::Span(reference))?;
            probe.exception = self.exception(yaml.exception.as_ref(), Scope::Span(reference))?;
            if kind == Kind::PairBegin && yaml.end.is_empty() {
                // Rules may end it; whether one does is seen when all are read.
                self.names.push(Named {
                    at,
                    what: format!("probe `{name}`"),
                    attribute: String::new(),
                    scope: Scope::Span(reference),
                });
            }
        }
        if kind == Kind::Event {
            probe.reads = self.reads(yaml)?;
            probe.at = yaml.at.unwrap_or_else(|| {
                let late = probe.attributes.iter().any(|attribute| attribute.at == Moment::Exit);
                if late || probe.reads.is_some() { Moment::Exit } else { Moment::Enter }
            });
            if probe.at == Moment::Enter && probe.reads.is_some() {
                let problem = format!("probe `{name}`: `at: enter`, but its exception is only known at exit");
                return Err(self.invalid(at, problem));
            }
            if yaml.at == Some(Moment::Enter)
                && let Some(late) = probe.attributes.iter().find(|attribute| attribute.at == Moment::Exit)
            {
                let problem = format!("`at: enter`, but the attribute `{}` is only known at exit", late.name);
                return Err(self.invalid(at, format!("probe `{name}`: {problem}")));
            }
            probe.log = self.log(yaml.log.as_ref(), Scope::Probe(number))?;
            // The open spans around it may have its attributes.
            let logs_of = yaml.logs_of.as_ref();
            probe.logs_of = logs_of
                .map(|key| Template::parse(&key.value).map_err(|error| self.invalid(key.referenced, error)))
                .transpose()?;
            probe.rules = if probe.log.is_some() || probe.logs_of.is_some() {
                Vec::new()
            } else if yaml.rules.is_empty() {
                vec![self.single_rule(yaml, number)?]
            } else {
                let rules = yaml.rules.iter().enumerate();
                rules.map(|(at, rule)| self.rule(rule, yaml, number, at)).collect::<Result<_, _>>()?
            };
        }
        probes.push(probe);
        for end in &yaml.end {
            if end.target.value == OWN_RETURN {
                if !end.attributes.0.is_empty() || end.at.is_some() || end.versions.is_some() {
                    let problem =
                        "with `target: return` only `when` and `unless` are expected; the attributes are the probe's";
                    return Err(self.invalid(end.target.referenced, problem));
                }
                let condition = self.condition(&end.when, &end.unless, Scope::Probe(number));
                probes[number].ends = Some(condition);
                continue;
            }
            let mut end = self.end(end, begin, &place, name, probes.len())?;
            end.reads = yaml.exception.as_ref().and_then(|exception| exception.from);
            if end.reads.is_some() && end.at == Moment::Enter {
                let problem = format!("probe `{name}`: `at: enter`, but its exception is only known at exit");
                return Err(self.invalid(at, problem));
            }
            probes.push(end);
        }
        Ok(())
    }

    fn end(&mut self, yaml: &EndYaml, begin: ProbeId, place: &str, name: &str, number: usize) -> Checked<Probe> {
        let target = self.target(&yaml.target)?;
        let name = format!("{name} (end {})", yaml.target.value);
        let mut probe = Probe::new(name, self.pack, place.to_owned(), Kind::PairEnd { begin }, target);
        probe.found_in = self.modules(&yaml.found_in)?;
        probe.versions = self.range(yaml.versions.as_ref())?;
        let captures = self.captures(&yaml.attributes, Scope::Probe(number), false)?;
        probe.attributes = captures.attributes;
        probe.values = captures.values;
        probe.computed = captures.computed;
        probe.at = yaml.at.unwrap_or(Moment::Exit);
        if probe.at == Moment::Enter && probe.attributes.iter().any(|attribute| attribute.at == Moment::Exit) {
            let problem = "`at: enter`, but some of its attributes are only known at exit";
            return Err(self.invalid(yaml.target.referenced, problem));
        }
        probe.ends = Some(self.condition(&yaml.when, &yaml.unless, Scope::Probe(number)));
        Ok(probe)
    }

    fn span(&mut self, yaml: &SpanYaml, id: &str, probe: usize, reference: SpanRef) -> Checked<SpanRule> {
        let inherit: Vec<Key> = yaml.inherit.iter().map(|name| key(&name.value)).collect();
        let mut better_names = self.templates(Some(&yaml.name), "its name", Scope::Span(reference), &[])?;
        let Some(name) = better_names.pop() else {
            return Err(self.invalid(yaml.name.referenced, "a name is expected"));
        };
        Ok(SpanRule {
            id: yaml.id.as_ref().map_or(id, |id| &id.value).to_owned(),
            name,
            better_names,
            role: yaml.role,
            kind: yaml.kind.into(),
            key: self.maybe_template(yaml.key.as_ref(), "its key", Scope::Probe(probe), &inherit)?,
            run: self.maybe_template(yaml.run.as_ref(), "its run", Scope::Probe(probe), &inherit)?,
            parent: self.maybe_template(
                yaml.parent.as_ref(),
                "the key of its parent",
                Scope::Probe(probe),
                &inherit,
            )?,
            condition: self.condition(&yaml.when, &yaml.unless, Scope::Probe(probe)),
            instant: yaml.instant,
            links: self.links(&yaml.links, Scope::Span(reference))?,
            external: match &yaml.external {
                None => None,
                Some(ids) => Some(ExternalRule {
                    trace: self.template(&ids.trace, "its trace id", Scope::Probe(probe))?,
                    span: self.template(&ids.span, "its span id", Scope::Probe(probe))?,
                }),
            },
            exported_as: self.templates(yaml.exported_as.as_ref(), "`exported_as`", Scope::Span(reference), &[])?,
            waits_for: yaml.waits_for.as_ref().map(|event| self.event_called(event, reference)).transpose()?,
            inherit,
        })
    }

    /// The event that a span waits for.
    fn event_called(&self, name: &Text, span: SpanRef) -> Checked<ProbeId> {
        if span.rule.is_some() {
            return Err(self.invalid(name.referenced, "`waits_for` is expected only with `kind: call`"));
        }
        self.events.get(&name.value).copied().ok_or_else(|| {
            let mut names: Vec<_> = self.events.keys().map(String::as_str).collect();
            names.sort_unstable();
            let problem =
                format!("no event of this pack has the name `{}`; there are: {}", name.value, names.join(", "));
            self.invalid(name.referenced, problem)
        })
    }

    /// Which exception the rules of an event read: there is only one of a call.
    fn reads(&self, yaml: &ProbeYaml) -> Checked<Option<Read>> {
        let rules = yaml.rules.iter().filter_map(|rule| rule.exception.as_ref());
        let mut reads = None;
        for exception in yaml.exception.iter().chain(rules) {
            if let Some(from) = exception.from
                && reads.replace(from).is_some_and(|known| known != from)
            {
                let name = &yaml.name;
                let problem = format!("probe `{}`: all rules of an event have the same `exception.from`", name.value);
                return Err(self.invalid(name.referenced, problem));
            }
        }
        Ok(reads)
    }

    fn log(&mut self, yaml: Option<&LogYaml>, scope: Scope) -> Checked<Option<LogRule>> {
        let Some(LogYaml { body, arguments, level, logger, event }) = yaml else { return Ok(None) };
        let fields = [("log.body", Some(body)), ("log.level", Some(level)), ("log.event", event.as_ref())];
        let more = arguments.iter().map(|name| ("log.arguments", Some(name)));
        for (what, name) in fields.into_iter().chain(more) {
            if let Some(name) = name {
                self.name(what, name, scope);
            }
        }
        Ok(Some(LogRule {
            body: body.value.clone(),
            arguments: arguments.iter().map(|name| name.value.clone()).collect(),
            level: level.value.clone(),
            logger: self.template(logger, "the logger", scope)?,
            event: event.as_ref().map(|name| name.value.clone()),
        }))
    }

    /// The rule of an event that has no `rules`.
    fn single_rule(&mut self, yaml: &ProbeYaml, probe: usize) -> Checked<EventRule> {
        let subject = self.subject(yaml.on.as_ref())?;
        let scope = Scope::Probe(probe);
        Ok(EventRule {
            condition: Condition::default(),
            run: self.maybe_template(yaml.run.as_ref(), "its run", scope, &[])?,
            subject,
            attributes: None,
            set: Vec::new(),
            event: self.span_event(yaml.event.as_ref(), scope)?,
            exception: self.exception(yaml.exception.as_ref(), scope)?,
            status: self.status(yaml.status.as_ref(), scope)?,
            dynamic: self.dynamic(yaml.dynamic.as_ref(), scope),
            links: self.links(&yaml.links, scope)?,
        })
    }

    fn rule(&mut self, yaml: &RuleYaml, of: &ProbeYaml, probe: usize, number: usize) -> Checked<EventRule> {
        let subject = match (&yaml.begin, &yaml.end, &yaml.on) {
            (Some(span), None, None) => {
                let reference = SpanRef { probe: ProbeId(probe as u32), rule: Some(number as u16) };
                Subject::Begin(Box::new(self.span(span, "", probe, reference)?))
            }
            (None, Some(id), None) => Subject::End(self.span_called(id)?),
            (None, None, on) => self.subject(on.as_ref())?,
            _ => {
                let problem =
                    format!("probe `{}`, rule {}: expected one of `begin`, `end` and `on`", of.name.value, number + 1);
                return Err(self.invalid(of.name.referenced, problem));
            }
        };
        let scope = Scope::Probe(probe);
        let set = self.captures(&yaml.set, scope, false)?;
        if let (Some(attribute), Some((_, first))) = (set.attributes.first(), yaml.set.0.first()) {
            let problem =
                format!("attribute `{}`: expected `const` or `template`; paths are for `attributes`", attribute.name);
            return Err(self.invalid(first.referenced, problem));
        }
        Ok(EventRule {
            condition: self.condition(&yaml.when, &yaml.unless, scope),
            run: self.maybe_template(yaml.run.as_ref(), "its run", scope, &[])?,
            subject,
            attributes: self.chosen(yaml.attributes.as_deref(), scope),
            set: set.computed,
            event: self.span_event(yaml.event.as_ref(), scope)?,
            exception: self.exception(yaml.exception.as_ref(), scope)?,
            status: self.status(yaml.status.as_ref(), scope)?,
            dynamic: self.dynamic(yaml.dynamic.as_ref(), scope),
            links: self.links(&yaml.links, scope)?,
        })
    }

    fn subject(&self, on: Option<&Text>) -> Checked<Subject> {
        match on {
            None => Ok(Subject::Command),
            Some(on) if on.value == "command" => Ok(Subject::Command),
            Some(on) if on.value == "innermost" => Ok(Subject::Innermost),
            Some(on) => Ok(Subject::Span(self.span_called(on)?)),
        }
    }

    fn span_called(&self, id: &Text) -> Checked<SpanRef> {
        self.spans.get(&id.value).copied().ok_or_else(|| {
            let mut ids: Vec<_> = self.spans.keys().map(String::as_str).collect();
            ids.sort_unstable();
            self.invalid(
                id.referenced,
                format!("no span of this pack has the id `{}`; there are: {}", id.value, ids.join(", ")),
            )
        })
    }

    fn span_event(&mut self, yaml: Option<&EventYaml>, scope: Scope) -> Checked<Option<SpanEventRule>> {
        let Some(yaml) = yaml else { return Ok(None) };
        Ok(Some(SpanEventRule {
            name: self.template(&yaml.name, "the event's name", scope)?,
            attributes: self.chosen(yaml.attributes.as_deref(), scope),
        }))
    }

    fn dynamic(&mut self, yaml: Option<&DynamicYaml>, scope: Scope) -> Option<DynamicRule> {
        let yaml = yaml?;
        for name in [&yaml.name, &yaml.value] {
            self.name("dynamic", name, scope);
        }
        Some(DynamicRule {
            name: yaml.name.value.clone(),
            value: yaml.value.value.clone(),
            prefixes: yaml.prefixes.clone(),
        })
    }

    fn chosen(&mut self, names: Option<&[Text]>, scope: Scope) -> Option<Vec<Key>> {
        let names = names?;
        for name in names {
            self.name("attributes", name, scope);
        }
        Some(names.iter().map(|name| key(&name.value)).collect())
    }

    fn target(&self, target: &Text) -> Checked<Target> {
        Target::parse(&target.value).map_err(|error| self.invalid(target.referenced, error))
    }

    fn parse_range(&self, range: &Text) -> Checked<VersionRange> {
        VersionRange::parse(&range.value).map_err(|error| self.invalid(range.referenced, error))
    }

    fn range(&self, range: Option<&Text>) -> Checked<Option<VersionRange>> {
        range.map(|range| self.parse_range(range)).transpose()
    }

    fn modules(&self, modules: &[Text]) -> Checked<Vec<String>> {
        for module in modules {
            check_module(&module.value).map_err(|error| self.invalid(module.referenced, error))?;
        }
        Ok(modules.iter().map(|module| module.value.clone()).collect())
    }

    fn template(&mut self, text: &Text, what: &str, scope: Scope) -> Checked<Template> {
        self.maybe_template(Some(text), what, scope, &[])
            .map(|template| template.unwrap_or_else(|| Template::literal("")))
    }

    fn maybe_template(
        &mut self,
        text: Option<&Text>,
        what: &str,
        scope: Scope,
        also: &[Key],
    ) -> Checked<Option<Template>> {
        let Some(text) = text else { return Ok(None) };
        let template = Template::parse(&text.value).map_err(|error| self.invalid(text.referenced, error))?;
        for name in template.attributes().filter(|name| !also.iter().any(|known| known.as_str() == *name)) {
            self.names.push(Named { at: text.referenced, what: what.to_owned(), attribute: name.to_owned(), scope });
        }
        Ok(Some(template))
    }

    fn templates(
        &mut self,
        texts: Option<&Spanned<Templates>>,
        what: &str,
        scope: Scope,
        also: &[Key],
    ) -> Checked<Vec<Template>> {
        let Some(texts) = texts else { return Ok(Vec::new()) };
        let mut templates = Vec::new();
        for text in &texts.value.0 {
            let text = Spanned::new(text.clone(), texts.referenced, texts.defined);
            templates.extend(self.maybe_template(Some(&text), what, scope, also)?);
        }
        Ok(templates)
    }

    fn name(&mut self, what: &str, name: &Text, scope: Scope) {
        self.names.push(Named { at: name.referenced, what: format!("`{what}`"), attribute: name.value.clone(), scope });
    }

    fn condition(
        &mut self,
        when: &Ordered<Spanned<Vec<String>>>,
        unless: &Ordered<Spanned<Vec<String>>>,
        scope: Scope,
    ) -> Condition {
        let mut side = |what: &str, yaml: &Ordered<Spanned<Vec<String>>>| {
            for (name, values) in &yaml.0 {
                self.names.push(Named {
                    at: values.referenced,
                    what: format!("`{what}`"),
                    attribute: name.clone(),
                    scope,
                });
            }
            yaml.0.iter().map(|(name, values)| (name.clone(), values.value.clone())).collect()
        };
        Condition { when: side("when", when), unless: side("unless", unless) }
    }

    fn links(&mut self, yaml: &[LinkYaml], scope: Scope) -> Checked<Vec<LinkRule>> {
        let value = Key::from_static_str(LINK_VALUE);
        let mut links = Vec::new();
        for link in yaml {
            if let Some(each) = &link.each {
                self.name("each", each, scope);
            }
            let keys = self.templates(Some(&link.key), "the key of a link", scope, std::slice::from_ref(&value))?;
            if keys.is_empty() {
                return Err(self.invalid(link.key.referenced, "expected a template or a list of templates"));
            }
            if link.each.is_none() && keys.iter().flat_map(Template::attributes).any(|name| name == LINK_VALUE) {
                let problem = "`{value}` is an item of `each: attribute`, which is not given";
                return Err(self.invalid(link.key.referenced, problem));
            }
            let run =
                self.maybe_template(link.run.as_ref(), "the run of a link", scope, std::slice::from_ref(&value))?;
            let each = link.each.as_ref().map(|each| each.value.clone());
            links.push(LinkRule { each, run, keys, unseen: link.unseen });
        }
        Ok(links)
    }

    fn status(&mut self, yaml: Option<&StatusYaml>, scope: Scope) -> Checked<Option<StatusRule>> {
        let Some(yaml) = yaml else { return Ok(None) };
        for (what, name) in [("status.from", &yaml.from), ("status.message", &yaml.message)] {
            if let Some(name) = name {
                self.name(what, name, scope);
            }
        }
        let mut raised = Vec::new();
        for text in &yaml.raised {
            raised.push(self.template(text, "`status.raised`", scope)?);
        }
        Ok(Some(StatusRule {
            from: yaml.from.as_ref().map(|name| name.value.clone()),
            error: yaml.error.clone(),
            message: yaml.message.as_ref().map(|name| name.value.clone()),
            raised,
        }))
    }

    fn exception(&mut self, yaml: Option<&ExceptionYaml>, scope: Scope) -> Checked<Option<ExceptionRule>> {
        let Some(yaml) = yaml else { return Ok(None) };
        if yaml.from.is_none() && yaml.kind.is_none() {
            let at =
                yaml.message.as_ref().or(yaml.stacktrace.as_ref()).map_or(Location::UNKNOWN, |text| text.referenced);
            return Err(self.invalid(at, "`exception`: expected `type` or `from`"));
        }
        Ok(Some(ExceptionRule {
            from: yaml.from,
            kind: self.templates(yaml.kind.as_ref(), "`exception.type`", scope, &[])?,
            message: self.templates(yaml.message.as_ref(), "`exception.message`", scope, &[])?,
            stacktrace: self.templates(yaml.stacktrace.as_ref(), "`exception.stacktrace`", scope, &[])?,
        }))
    }

    /// What is captured. The agent's own attributes are those of spans: a log record has none of them.
    fn captures(&mut self, yaml: &Ordered<Spanned<Sources>>, scope: Scope, of_log: bool) -> Checked<Captures> {
        let mut captures = Captures::default();
        for (name, sources) in &yaml.0 {
            let at = sources.referenced;
            let fail = |problem: String| PackError::Invalid {
                file: self.file.to_owned(),
                line: at.line(),
                column: at.column(),
                problem: format!("attribute `{name}`: {problem}"),
            };
            if is_reserved(name) && !of_log {
                return Err(fail("the agent sets this one itself; choose another name".to_owned()));
            }
            let key = key(name);
            let mut values: Option<ValueMap> = None;
            for source in &sources.value.0 {
                let mut map = ValueMap::default();
                for (from, to) in &source.values.0 {
                    let to = to.clone().map(|Scalar(value)| value);
                    if from == "*" {
                        map.other = Some(to);
                    } else {
                        map.entries.push((from.clone(), to));
                    }
                }
                if !source.values.0.is_empty() && values.replace(map).is_some() {
                    return Err(fail("`values` is given twice; it is for all its paths".to_owned()));
                }
                match source_of(source).map_err(fail)? {
                    Source::Captured { path, at, max } => {
                        captures.attributes.push(Attribute { name: key.clone(), path, at, max });
                    }
                    Source::Computed(from) => {
                        let named: Vec<&str> = match &from {
                            Formula::Const(_) => Vec::new(),
                            Formula::Only(attribute) | Formula::SqlOperation(attribute) => vec![attribute],
                            Formula::Template { template, .. } => template.attributes().collect(),
                        };
                        self.names.extend(named.into_iter().map(|attribute| Named {
                            at,
                            what: format!("attribute `{name}`"),
                            attribute: attribute.to_owned(),
                            scope,
                        }));
                        captures.computed.push(Computed { name: key.clone(), from });
                    }
                }
            }
            captures.values.extend(values.map(|values| (key, values)));
        }
        Ok(captures)
    }

    /// Whether every attribute that is named somewhere exists.
    fn check_names(&self, probes: &[Probe]) -> Checked<()> {
        let own: Vec<Names> = probes.iter().map(names_of).collect();
        let mut spans: HashMap<SpanRef, Names> = HashMap::new();
        let mut ended: HashSet<SpanRef> = HashSet::new();
        let mut commands = Names::default();
        for (index, probe) in probes.iter().enumerate() {
            let id = ProbeId(index as u32);
            if let Kind::PairEnd { begin } = probe.kind {
                ended.insert(SpanRef { probe: begin, rule: None });
                spans.entry(SpanRef { probe: begin, rule: None }).or_default().add_all(&own[index]);
            }
            if probe.ends.is_some() {
                ended.insert(SpanRef { probe: id, rule: None });
            }
            let numbers = (0..probe.rules.len()).map(|rule| Some(rule as u16));
            for rule in numbers.chain([None]) {
                if let Some(span) = probe.span_rule(rule) {
                    let names = spans.entry(SpanRef { probe: id, rule }).or_default();
                    names.add_all(&own[index]);
                    span.inherit.iter().for_each(|name| names.add(name.as_str()));
                }
            }
            for (number, rule) in probe.rules.iter().enumerate() {
                let about = match &rule.subject {
                    Subject::Begin(_) => Some(SpanRef { probe: id, rule: Some(number as u16) }),
                    Subject::End(span) | Subject::Span(span) => Some(*span),
                    Subject::Command | Subject::Innermost => None,
                };
                if matches!(rule.subject, Subject::End(_)) {
                    ended.extend(about);
                }
                let names = about.map_or(&mut commands, |span| spans.entry(span).or_default());
                names.add_all(&own[index]);
                names.any |= about.is_some() && rule.dynamic.is_some();
                rule.set.iter().for_each(|set| names.add(set.name.as_str()));
            }
        }
        for Named { at, what, attribute, scope } in &self.names {
            let known = match scope {
                Scope::Probe(index) => own[*index].has(attribute),
                // A pair that nothing ends.
                Scope::Span(span) if attribute.is_empty() => {
                    if !ended.contains(span) {
                        return Err(self.invalid(
                            *at,
                            format!("{what}: `end` is expected with `kind: pair`, or a rule that ends it"),
                        ));
                    }
                    true
                }
                Scope::Span(span) => {
                    let role = probes[span.probe.0 as usize].span_rule(span.rule).map(|rule| rule.role);
                    let builtin = ["floe.nodes", "floe.nodes.failed", "exception.type", "exception.message"];
                    spans.get(span).is_some_and(|names| names.has(attribute))
                        || (role == Some(Role::Command) && commands.has(attribute))
                        || builtin.contains(&attribute.as_str())
                }
            };
            if !known {
                return Err(
                    self.invalid(*at, format!("{what} names the attribute `{attribute}`, which is not captured"))
                );
            }
        }
        Ok(())
    }
}

fn names_of(probe: &Probe) -> Names {
    let mut names = Names::default();
    probe.attributes.iter().for_each(|attribute| names.add(attribute.name.as_str()));
    probe.computed.iter().for_each(|computed| names.add(computed.name.as_str()));
    probe.rules.iter().flat_map(|rule| &rule.set).for_each(|computed| names.add(computed.name.as_str()));
    // What its spans take over from around them can be named as well.
    let rules = (0..probe.rules.len()).map(|rule| Some(rule as u16));
    for span in rules.chain([None]).filter_map(|rule| probe.span_rule(rule)) {
        span.inherit.iter().for_each(|name| names.add(name.as_str()));
    }
    names
}

enum Source {
    Captured { path: Path, at: Moment, max: u32 },
    Computed(Formula),
}

fn source_of(source: &SourceYaml) -> Result<Source, String> {
    let SourceYaml { path, at, max, values: _, constant, template, only, sql_operation, add } = source;
    if add.is_some() && template.is_none() {
        return Err("`add` is expected only with `template`".to_owned());
    }
    let text = match (path, constant, template, only, sql_operation) {
        (Some(path), None, None, None, None) => path,
        (None, Some(Scalar(value)), None, None, None) => return Ok(Source::Computed(Formula::Const(value.clone()))),
        (None, None, None, Some(name), None) => return Ok(Source::Computed(Formula::Only(name.clone()))),
        (None, None, None, None, Some(name)) => return Ok(Source::Computed(Formula::SqlOperation(name.clone()))),
        (None, None, Some(text), None, None) => {
            let template = Template::parse(text).map_err(|error| error.to_string())?;
            return Ok(Source::Computed(Formula::Template { template, add: add.unwrap_or(0) }));
        }
        _ => return Err("expected one of `path`, `const`, `template`, `only` and `sql_operation`".to_owned()),
    };
    let path = Path::parse(text).map_err(|error| error.to_string())?;
    let at = match at {
        Some(Moment::Enter) if path.needs_exit() => {
            return Err(format!("`{path}` does not exist at enter; expected `at: exit`, or no `at`"));
        }
        Some(at) => *at,
        None if path.needs_exit() => Moment::Exit,
        None => Moment::Enter,
    };
    let max = max.unwrap_or(DEFAULT_MAX);
    if max == 0 || max as usize > floe_ebpf::MAX_STR {
        return Err(format!("`max: {max}`: expected 1 to {} bytes", floe_ebpf::MAX_STR));
    }
    Ok(Source::Captured { path, at, max })
}

/// A pack with every kind of rule.
#[cfg(test)]
pub(super) const WHOLE: &str = r#"
pack: shop
probes:
  - name: log
    kind: event
    target: shop:log
    attributes:
      _event: {path: arg0.kind, values: {OPEN: open, "*": null}}
      shop.order: arg0.order
      shop.channel: [{const: web}, {only: shop.order}, {sql_operation: shop.order}, {template: "{shop.order}/{_event}"}, arg0.channel]
    rules:
      - when: {_event: [open]}
        begin: {id: order, name: ["{shop.channel}: {shop.order}", "order {shop.order}"], key: "{shop.order}", role: command, kind: consumer}
        set: {shop.attempt: {template: "{shop.order}", add: 1}}
      - when: {_event: [closed]}
        end: order
        status: {from: _event, error: [closed], message: shop.order}
      - unless: {_event: [open, closed]}
        on: order
        event: {name: "{_event}", attributes: [shop.order]}
        exception: {type: "{_event}", message: ["{shop.order}", "{_event}"]}
        links: [{each: shop.order, key: "{value}"}]
  - name: attribute
    kind: event
    target: shop:set
    attributes: {_key: arg1, _value: arg2}
    at: enter
    on: innermost
    dynamic: {name: _key, value: _value, prefixes: [shop.]}
  - name: payment
    target: shop:pay
    span: {name: payment, waits_for: receipt}
  - name: receipt
    kind: event
    target: shop:receipt
    on: payment
    attributes: {shop.receipt: return}
    exception: {from: raised}
  - name: step
    kind: pair
    target: shop:step
    span: {name: step, inherit: [shop.order], key: "{shop.order}/{_step}"}
    attributes: {_step: arg0, _returned: type(return)}
    exception: {from: argument}
    end:
      - {target: return, unless: {_returned: [generator]}}
      - {target: "shop:stop", attributes: {_step: arg0}}
"#;

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
      shop.reason: return.reason
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
        parse("shop.yaml", text).expect_err("refused").to_string()
    }

    #[test]
    fn a_pack_is_read_with_all_its_parts() {
        let (pack, probes) = parse("shop.yaml", GOOD).unwrap();
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
                ("shop.reason", "return.reason".to_owned(), Moment::Exit, 256),
            ]
        );
        let span = probes[0].span.as_ref().unwrap();
        assert_eq!(span.role, Role::Node);
        assert_eq!(span.condition.unless, [("shop.customer".to_owned(), vec!["nobody".to_owned()])]);
        assert_eq!(probes[2].kind, Kind::PairEnd { begin: ProbeId(1) });
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
            (
                "kind: event",
                "kind: evnt",
                "shop.yaml:22:11: unknown variant `evnt`, expected one of call, contextmanager, pair, event",
            ),
            ("    kind: event", "    knd: event", "shop.yaml:22:5: unknown field `knd`"),
            ("max: 16", "max: 5000", "shop.yaml:10:19: attribute `shop.total`: `max: 5000`: expected 1 to 4095 bytes"),
            (
                "max: 16",
                "maxi: 16",
                "unknown field `maxi`, expected one of path, at, max, values, const, template, only, sql_operation, add",
            ),
            ("max: 16", "at: enter", "`return.total` does not exist at enter"),
            ("shop.total:", "exception.type:", "attribute `exception.type`: the agent sets this one itself"),
            ("shop.total:", "shop.customer:", "duplicate"),
            ("role: node", "role: nod", "unknown variant `nod`, expected one of command, node, leaf, none"),
            ("name: tax", "name: checkout", "a second probe with the name `checkout`"),
            ("span: {name: tax}", "span: {name: \"{\"}", "shop.yaml:17:18: template `{`"),
            ("    span: {name: tax}\n", "", "probe `tax`: expected `span"),
            ("kind: pair", "kind: call", "probe `tax`: `end` is expected only with `kind: pair`"),
            (
                "target: shop:new_id",
                "target: shop.new_id",
                "shop.yaml:23:13: target `shop.new_id`: expected `package.module",
            ),
            ("    target: shop:new_id\n", "", "missing field `target`"),
            ("\">=2,<3\"", "2", "shop.yaml:3:86: version range `2`: expected bounds"),
            ("shop.customer: self.customer.name", "shop.customer: 5", "a path"),
            ("{shop.id: return}", "[a]", "shop.yaml:24:17: expected mapping start"),
        ] {
            assert!(GOOD.contains(from), "{from}");
            let error = error(&GOOD.replacen(from, to, 1));
            assert!(error.contains(expected), "{from} -> {to}\n  {error}\n  does not contain: {expected}");
            assert!(error.starts_with("shop.yaml:"), "{error}");
        }
    }

    #[test]
    fn the_rules_of_an_event_are_read() {
        let (_, probes) = parse("shop.yaml", WHOLE).unwrap();
        let log = &probes[0];
        assert_eq!(log.at, Moment::Enter, "all is known at the beginning");
        let order = SpanRef { probe: ProbeId(0), rule: Some(0) };
        let Subject::Begin(span) = &log.rules[0].subject else { panic!("{:?}", log.rules[0]) };
        assert_eq!((span.id.as_str(), span.role), ("order", Role::Command));
        assert_eq!(span.kind, opentelemetry::trace::SpanKind::Consumer);
        assert_eq!(log.span_rule(Some(0)), Some(&**span));
        assert_eq!(log.rules[1].subject, Subject::End(order));
        assert_eq!(log.rules[2].subject, Subject::Span(order));
        assert_eq!(log.rules[2].links.len(), 1);
        assert_eq!(log.computed.len(), 4);
        assert_eq!(span.better_names.len(), 1);
        assert_eq!(log.values[0].1.other, Some(None), "other values are absent");
        assert_eq!(probes[1].rules[0].subject, Subject::Innermost);
        assert_eq!(probes[2].span.as_ref().unwrap().waits_for, Some(ProbeId(3)));
        assert_eq!((probes[3].reads, probes[3].at), (Some(Read::Raised), Moment::Exit));
        assert_eq!(probes[4].ends.as_ref().unwrap().unless[0].0, "_returned");
        assert_eq!((probes[5].kind, probes[5].at), (Kind::PairEnd { begin: ProbeId(4) }, Moment::Exit));
        assert_eq!((probes[4].reads, probes[5].reads), (None, Some(Read::Argument)));
    }

    #[test]
    fn a_mistake_in_a_rule_gives_its_place_too() {
        for (from, to, expected) in [
            (
                "end: order",
                "end: ordre",
                "shop.yaml:16:14: no span of this pack has the id `ordre`; there are: order, payment, step",
            ),
            ("on: order", "on: sale", "no span of this pack has the id `sale`"),
            ("id: order,", "", "a span that a rule begins needs an `id`"),
            ("id: order", "id: command", "a span cannot have the id `command`"),
            ("id: order", "id: step", "a second span with the id `step`"),
            (
                "order {shop.order}",
                "order {shop.ordre}",
                "its name names the attribute `shop.ordre`, which is not captured",
            ),
            ("key: \"{shop.order}\"", "key: \"{shop.x}\"", "its key names the attribute `shop.x`"),
            (
                "when: {_event: [closed]}",
                "when: {_evnt: [closed]}",
                "shop.yaml:15:23: `when` names the attribute `_evnt`",
            ),
            ("each: shop.order", "each: shop.x", "`each` names the attribute `shop.x`"),
            ("each: shop.order, ", "", "`{value}` is an item of `each: attribute`"),
            ("attributes: [shop.order]", "attributes: [shop.x]", "`attributes` names the attribute `shop.x`"),
            (
                "{template: \"{shop.order}\", add: 1}",
                "arg0.attempt",
                "attribute `shop.attempt`: expected `const` or `template`",
            ),
            (
                "{const: web}",
                "{const: web, path: arg0}",
                "expected one of `path`, `const`, `template`, `only` and `sql_operation`",
            ),
            ("{only: shop.order}", "{only: shop.x}", "attribute `shop.channel` names the attribute `shop.x`"),
            ("{const: web}", "{const: web, add: 1}", "`add` is expected only with `template`"),
            ("name: _key", "name: _kee", "`dynamic` names the attribute `_kee`"),
            (
                "    on: innermost",
                "    on: innermost\n    rules: [{on: order}]",
                "with `rules`, what else an event does",
            ),
            (
                "        end: order",
                "        end: order\n        on: order",
                "probe `log`, rule 2: expected one of `begin`, `end` and `on`",
            ),
            ("kind: pair", "kind: call", "`end` is expected only with `kind: pair`"),
            ("target: return, ", "target: return, at: exit, ", "with `target: return` only `when` and `unless`"),
            (
                "attributes: {_step: arg0}}",
                "at: enter, attributes: {_step: return}}",
                "`at: enter`, but some of its attributes",
            ),
            ("attributes: {_step: arg0}}", "at: enter}", "`at: enter`, but its exception is only known at exit"),
            ("from: argument", "from: raised", "`exception.from: raised` is read anyway"),
            ("from: argument", "from: within", "unknown variant `within`, expected one of raised, argument"),
            ("{from: raised}", "{message: x}", "`exception`: expected `type` or `from`"),
            (
                "waits_for: receipt",
                "waits_for: log_",
                "no event of this pack has the name `log_`; there are: attribute, log, receipt",
            ),
            ("kind: consumer", "waits_for: receipt", "`waits_for` is expected only with `kind: call`"),
            (
                "span: {name: step,",
                "span: {name: step, waits_for: receipt,",
                "`waits_for` is expected only with `kind: call`",
            ),
        ] {
            assert!(WHOLE.contains(from), "{from}");
            let error = error(&WHOLE.replacen(from, to, 1));
            assert!(error.contains(expected), "{from} -> {to}\n  {error}\n  does not contain: {expected}");
        }
        let ends = WHOLE.find("    end:\n      - {target: return").unwrap();
        let error = error(&WHOLE[..ends]);
        assert!(error.contains("probe `step`: `end` is expected with `kind: pair`, or a rule that ends it"), "{error}");
    }

    #[test]
    fn something_that_is_not_yaml_is_refused_with_its_place() {
        let error = error("pack: x\nprobes: [\n");
        assert!(error.starts_with("shop.yaml:"), "{error}");
    }
}
