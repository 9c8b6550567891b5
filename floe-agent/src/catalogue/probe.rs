//! What a probe is, whichever way it was written down.

use std::fmt;

use floe_ebpf::{MODULE_NAME_LEN, function_flags};
use opentelemetry::trace::SpanKind;
use opentelemetry::{Key, Value};
use thiserror::Error;

use super::path::Path;
use super::template::Template;
use super::version::VersionRange;
use crate::units::ProbeId;

/// A function to probe, and what to make of its calls.
#[derive(Clone, Debug, PartialEq)]
pub struct Probe {
    /// Name, unique in its pack.
    pub name: String,
    /// The pack it comes from.
    pub pack: String,
    /// Where it is written: file and line, or the option.
    pub place: String,
    /// What its calls become.
    pub kind: Kind,
    /// The function.
    pub target: Target,
    /// The target is a method of a base class: every override of it in a subclass counts too.
    pub implementations: bool,
    /// A call of the function is the moment to look for new implementations, before it goes on.
    pub scan: bool,
    /// Modules in which the function object is found, where that is not the target's own: a local function hangs on
    /// the objects that were made with it. Empty: the target's module.
    pub found_in: Vec<String>,
    /// The versions of the pack's distribution that have the function; elsewhere it is not looked for. `None`: all.
    pub versions: Option<VersionRange>,
    /// The span ([`Kind::Call`], [`Kind::ContextManager`] and [`Kind::PairBegin`]).
    pub span: Option<SpanRule>,
    /// What is captured. Several may have one name: the last that has a value wins.
    pub attributes: Vec<Attribute>,
    /// How captured values are replaced, by attribute.
    pub values: Vec<(Key, ValueMap)>,
    /// Attributes that are made from others, where nothing was captured for them; the last that has a value wins.
    pub computed: Vec<Computed>,
    /// When the span is an error, beyond a raised exception.
    pub status: Option<StatusRule>,
    /// The exception that captured values describe.
    pub exception: Option<ExceptionRule>,
    /// [`Kind::Event`]: what a call does.
    pub rules: Vec<EventRule>,
    /// [`Kind::Event`]: a call is a log record.
    pub log: Option<LogRule>,
    /// [`Kind::Event`]: log records that are written during the call are those of the span with this key.
    pub logs_of: Option<Template>,
    /// [`Kind::Event`] and [`Kind::PairEnd`]: when it does so.
    pub at: Moment,
    /// [`Kind::PairBegin`]: the calls whose own return ends the span. [`Kind::PairEnd`]: the calls that do.
    pub ends: Option<Condition>,
    /// [`Kind::Event`] and [`Kind::PairEnd`]: the exception of the call that is told of the span.
    pub reads: Option<Read>,
}

/// Which exception of a call is read with its stack trace.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Read {
    /// The one that leaves the call.
    Raised,
    /// The one that comes in: the argument behind the first, or those of an `__exit__`.
    Argument,
}

/// What the calls of a function become.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A span each.
    Call,
    /// What its rules say: spans that begin or end, and what is told of them.
    Event,
    /// A span for the `with` block of the context manager that the call returns: a `contextlib._GeneratorContextManager`.
    ContextManager,
    /// The end of such a block. The catalogue itself adds this probe.
    ContextExit,
    /// The beginning of a span that another call ends, in the same thread or with the same key.
    PairBegin,
    /// The end of such a span.
    PairEnd {
        /// The probe that begins it.
        begin: ProbeId,
    },
}

/// A function: `module:qualified.name`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Target {
    /// Module.
    pub module: String,
    /// Qualified name; may contain `<locals>`.
    pub qualname: String,
}

/// Which span: that of a probe, or the one that a rule of an event begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SpanRef {
    /// The probe.
    pub probe: ProbeId,
    /// The number of the rule, if a rule begins it.
    pub rule: Option<u16>,
}

/// How a span is made.
#[derive(Clone, Debug, PartialEq)]
pub struct SpanRule {
    /// What rules call it: the probe's name unless it has another.
    pub id: String,
    /// Its name.
    pub name: Template,
    /// Names that it has instead: the first whose attributes are all there.
    pub better_names: Vec<Template>,
    /// Its part in the trace.
    pub role: Role,
    /// OpenTelemetry's kind of span.
    pub kind: SpanKind,
    /// What identifies it in its trace, so that calls in other threads end it and other spans link to it.
    pub key: Option<Template>,
    /// The run that it is part of: it is in that run's trace.
    pub run: Option<Template>,
    /// The key of its parent; without, or where no span has this key, the parent is what is open where it begins.
    pub parent: Option<Template>,
    /// The calls that are a span: their attributes at its beginning.
    pub condition: Condition,
    /// The call tells of something that took no time: the span has no length, whatever the call took.
    pub instant: bool,
    /// Attributes that it has from the open spans around it.
    pub inherit: Vec<Key>,
    /// Its links to other spans.
    pub links: Vec<LinkRule>,
    /// The program exports it itself.
    pub external: Option<ExternalRule>,
    /// The names that the program gives it if it exports it itself.
    pub exported_as: Vec<Template>,
    /// The event that may still tell something of it when it has ended: in a call of that, it waits for the call's end.
    pub waits_for: Option<ProbeId>,
}

/// The ids of a span that the program exports itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExternalRule {
    /// Its trace id, in hexadecimal.
    pub trace: Template,
    /// Its span id, in the last 16 hexadecimal digits.
    pub span: Template,
}

/// Which calls are meant, by the texts of their attributes: a list has several. `*` is any value.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Condition {
    /// Each of these attributes has one of these values.
    pub when: Vec<(String, Vec<String>)>,
    /// None of these attributes has one of these values.
    pub unless: Vec<(String, Vec<String>)>,
}

/// A link to every span whose key this is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LinkRule {
    /// The attribute with the values: for each of its items `{value}` in the key is that item.
    pub each: Option<String>,
    /// The run that the other span is part of; without, it is in the same trace.
    pub run: Option<Template>,
    /// The key: the first of these whose attributes are all there.
    pub keys: Vec<Template>,
    /// Without `run`: the span is there also if it was not seen here.
    pub unseen: bool,
}

/// The part of a span in a trace.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// What a process works on, as a command, a run or a step: parent of what happens in its threads without an open
    /// span.
    Command,
    /// A unit of work; commands count theirs.
    Node,
    /// Parent of nothing: several such spans of one thread may be open side by side.
    Leaf,
    /// No special part.
    #[default]
    None,
}

/// A captured attribute.
#[derive(Clone, Debug, PartialEq)]
pub struct Attribute {
    /// Name. One that begins with `_` is for rules and templates, and no attribute of the span.
    pub name: Key,
    /// Where its value is.
    pub path: Path,
    /// When it is read.
    pub at: Moment,
    /// Longest string, in bytes of its representation in memory.
    pub max: u32,
}

/// How the values of an attribute are replaced, by their text.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ValueMap {
    /// The values to replace; `None`: the attribute is then absent.
    pub entries: Vec<(String, Option<Value>)>,
    /// What becomes of all other values; without this they stay.
    pub other: Option<Option<Value>>,
}

/// An attribute that is made from others.
#[derive(Clone, Debug, PartialEq)]
pub struct Computed {
    /// Name.
    pub name: Key,
    /// How.
    pub from: Formula,
}

/// How an attribute is made from others.
#[derive(Clone, Debug, PartialEq)]
pub enum Formula {
    /// Always this.
    Const(Value),
    /// The item of this attribute, if it is a list of one.
    Only(String),
    /// The first word of the SQL statement in this attribute.
    SqlOperation(String),
    /// A text, if every attribute in it is there. A template that is one attribute keeps the type of its value.
    Template {
        /// The text.
        template: Template,
        /// An integer to add to the value, which must be one.
        add: i64,
    },
}

/// The two moments of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Moment {
    /// The call begins.
    Enter,
    /// It ends.
    Exit,
}

/// When a span is an error, and what its status says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StatusRule {
    /// The attribute that tells the outcome.
    pub from: Option<String>,
    /// Its values that mean an error.
    pub error: Vec<String>,
    /// The attribute that has the message.
    pub message: Option<String>,
    /// What to say when the call raised: the first of these whose attributes are all there. Otherwise `Type: message`.
    pub raised: Vec<Template>,
}

/// An exception that a framework tells by value. Of each list the first whose attributes are all there counts; without
/// a type there is no exception. What was read of the exception itself comes before all of it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ExceptionRule {
    /// The exception itself, where the call has it.
    pub from: Option<Read>,
    /// Its type.
    pub kind: Vec<Template>,
    /// Its message. Where it begins with the type, as Python prints it, that is taken off, and the type is made
    /// complete by it.
    pub message: Vec<Template>,
    /// Its stack trace.
    pub stacktrace: Vec<Template>,
}

/// How a call becomes a log record. Its fields are attributes; all others that are not local are the record's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LogRule {
    /// The message.
    pub body: String,
    /// What is put into the message at its `%s`, `%d` and so on.
    pub arguments: Vec<String>,
    /// The level: a number of Python's `logging`, or a name.
    pub level: String,
    /// The logger.
    pub logger: Template,
    /// The name of the event.
    pub event: Option<String>,
}

/// What a call of an event's function does.
#[derive(Clone, Debug, PartialEq)]
pub struct EventRule {
    /// Which calls.
    pub condition: Condition,
    /// The run that the process works for from here on.
    pub run: Option<Template>,
    /// What it is about.
    pub subject: Subject,
    /// Captured attributes that the span gets. `None`: all, or none if there is an `event`.
    pub attributes: Option<Vec<Key>>,
    /// More attributes that it gets.
    pub set: Vec<Computed>,
    /// An event of the span.
    pub event: Option<SpanEventRule>,
    /// An exception of the span.
    pub exception: Option<ExceptionRule>,
    /// The span's status.
    pub status: Option<StatusRule>,
    /// An attribute whose name is captured.
    pub dynamic: Option<DynamicRule>,
    /// More links of the span.
    pub links: Vec<LinkRule>,
}

/// The span that a rule is about.
#[derive(Clone, Debug, PartialEq)]
pub enum Subject {
    /// It begins here.
    Begin(Box<SpanRule>),
    /// It ends here.
    End(SpanRef),
    /// It is open: the innermost command of the thread, else of the process.
    Command,
    /// It is open: the innermost of the thread, else as `Command`.
    Innermost,
    /// It is open: the one with the same key; without a key the innermost of these in the thread.
    Span(SpanRef),
}

/// An event of a span.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SpanEventRule {
    /// Its name.
    pub name: Template,
    /// The captured attributes that it has. `None`: all.
    pub attributes: Option<Vec<Key>>,
}

/// An attribute whose name is captured.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DynamicRule {
    /// The attribute with the name.
    pub name: String,
    /// The attribute with the value.
    pub value: String,
    /// What the name must begin with: one of these. Empty: anything.
    pub prefixes: Vec<String>,
}

/// A target that cannot be read.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum TargetError {
    /// Not of the form `module:name`.
    #[error("target `{0}`: expected `package.module:Class.method`, with `:` between module and function")]
    Form(String),
    /// A part is no Python name.
    #[error("target `{target}`: `{part}` is not a Python name")]
    Name {
        /// The text.
        target: String,
        /// The part.
        part: String,
    },
    /// The module's name is too long for the kernel side.
    #[error("module `{module}`: its name has {} bytes, the longest that can be probed has {}", .module.len(), MODULE_NAME_LEN - 1)]
    ModuleTooLong {
        /// The module.
        module: String,
    },
}

impl Probe {
    /// A probe that does nothing yet.
    pub(super) fn new(name: String, pack: &str, place: String, kind: Kind, target: Target) -> Self {
        Self {
            name,
            pack: pack.to_owned(),
            place,
            kind,
            target,
            implementations: false,
            scan: false,
            found_in: Vec::new(),
            versions: None,
            span: None,
            attributes: Vec::new(),
            values: Vec::new(),
            computed: Vec::new(),
            status: None,
            exception: None,
            rules: Vec::new(),
            log: None,
            logs_of: None,
            at: Moment::Exit,
            ends: None,
            reads: None,
        }
    }

    /// The rule of one of its spans.
    pub fn span_rule(&self, rule: Option<u16>) -> Option<&SpanRule> {
        match rule {
            None => self.span.as_ref(),
            Some(number) => match &self.rules.get(usize::from(number))?.subject {
                Subject::Begin(span) => Some(span),
                _ => None,
            },
        }
    }

    /// What the kernel side does at its calls: bits of [`floe_ebpf::function_flags`].
    pub fn function_flags(&self) -> u32 {
        let own = match self.kind {
            Kind::ContextManager => function_flags::CONTEXT_MANAGER | function_flags::STACKTRACE,
            Kind::ContextExit => {
                function_flags::CONTEXT_EXIT | function_flags::STACKTRACE | function_flags::EXCEPTION_ARGUMENT
            }
            Kind::Call | Kind::PairBegin | Kind::PairEnd { .. } => function_flags::STACKTRACE,
            Kind::Event => 0,
        };
        let reads = match self.reads {
            None => 0,
            Some(Read::Raised) => function_flags::STACKTRACE,
            Some(Read::Argument) => function_flags::EXCEPTION_ARGUMENT,
        };
        own | reads | if self.scan { function_flags::SCAN } else { 0 }
    }

    /// Adds to the ids of probes in it.
    pub(super) fn shift(&mut self, by: u32) {
        if let Kind::PairEnd { begin } = &mut self.kind {
            begin.0 += by;
        }
        if let Some(event) = self.span.as_mut().and_then(|span| span.waits_for.as_mut()) {
            event.0 += by;
        }
        for rule in &mut self.rules {
            if let Subject::End(span) | Subject::Span(span) = &mut rule.subject {
                span.probe.0 += by;
            }
        }
    }

    /// The modules whose import can bring the function.
    pub fn modules(&self) -> impl Iterator<Item = &str> {
        let own = self.found_in.is_empty().then_some(self.target.module.as_str());
        self.found_in.iter().map(String::as_str).chain(own)
    }
}

impl Condition {
    /// Whether a call with these attributes is meant.
    pub fn holds(&self, texts: impl Fn(&str) -> Vec<String>) -> bool {
        let one_of = |(name, values): &(String, Vec<String>)| {
            texts(name).iter().any(|text| values.iter().any(|value| value == "*" || value == text))
        };
        self.when.iter().all(one_of) && !self.unless.iter().any(one_of)
    }

    /// The attributes that it names.
    pub fn attributes(&self) -> impl Iterator<Item = &str> {
        self.when.iter().chain(&self.unless).map(|(name, _)| name.as_str())
    }
}

impl ValueMap {
    /// What becomes of a value; `None`: it is absent.
    pub fn replace(&self, value: Value) -> Option<Value> {
        let text = value.as_str();
        match self.entries.iter().find(|(from, _)| *from == *text) {
            Some((_, to)) => to.clone(),
            None => self.other.clone().unwrap_or(Some(value)),
        }
    }
}

impl Target {
    /// Parses `module:qualified.name`.
    pub fn parse(text: &str) -> Result<Self, TargetError> {
        let (module, qualname) = text.trim().split_once(':').ok_or_else(|| TargetError::Form(text.to_owned()))?;
        let (module, qualname) = (module.trim(), qualname.trim());
        if module.is_empty() || qualname.is_empty() || qualname.contains(':') {
            return Err(TargetError::Form(text.to_owned()));
        }
        check_module(module)?;
        for part in
            module.split('.').chain(qualname.split('.').filter(|part| !matches!(*part, "<locals>" | "<lambda>")))
        {
            if !is_name(part) {
                return Err(TargetError::Name { target: text.to_owned(), part: part.to_owned() });
            }
        }
        Ok(Self { module: module.to_owned(), qualname: qualname.to_owned() })
    }
}

/// Checks that a module's name fits the kernel side.
pub(super) fn check_module(module: &str) -> Result<(), TargetError> {
    if module.len() >= MODULE_NAME_LEN {
        return Err(TargetError::ModuleTooLong { module: module.to_owned() });
    }
    match module.split('.').find(|part| !is_name(part)) {
        Some(part) => Err(TargetError::Name { target: module.to_owned(), part: part.to_owned() }),
        None => Ok(()),
    }
}

fn is_name(text: &str) -> bool {
    let mut chars = text.chars();
    chars.next().is_some_and(|c| c.is_alphabetic() || c == '_') && chars.all(|c| c.is_alphanumeric() || c == '_')
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.module, self.qualname)
    }
}

impl fmt::Display for Moment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Enter => "enter",
            Self::Exit => "exit",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets_are_module_and_qualified_name() {
        let target = Target::parse("dbt.cli.requires:postflight.<locals>.wrapper").unwrap();
        assert_eq!(target.module, "dbt.cli.requires");
        assert_eq!(target.qualname, "postflight.<locals>.wrapper");
        assert_eq!(target.to_string(), "dbt.cli.requires:postflight.<locals>.wrapper");
    }

    #[test]
    fn a_bad_target_says_why() {
        for (text, problem) in [
            ("pkg.mod", "with `:` between"),
            (":f", "with `:` between"),
            ("pkg.mod:", "with `:` between"),
            ("pkg..mod:f", "`` is not a Python name"),
            ("pkg.mod:f g", "`f g` is not a Python name"),
            ("1pkg:f", "`1pkg` is not a Python name"),
        ] {
            let error = Target::parse(text).unwrap_err().to_string();
            assert!(error.contains(problem), "{error}");
        }
    }

    #[test]
    fn a_module_name_that_the_kernel_side_cannot_hold_is_refused() {
        let longest = "m".repeat(MODULE_NAME_LEN - 1);
        assert!(Target::parse(&format!("{longest}:f")).is_ok());
        let error = Target::parse(&format!("{longest}m:f")).unwrap_err().to_string();
        assert!(error.ends_with("its name has 96 bytes, the longest that can be probed has 95"), "{error}");
    }
}
