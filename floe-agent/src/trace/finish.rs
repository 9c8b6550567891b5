//! The end of a span: its last attributes, its name, its status.

use std::borrow::Cow;
use std::time::Duration;

use opentelemetry::trace::{Event, SpanContext, SpanId, SpanKind, Status, TraceFlags, TraceState};
use opentelemetry::{Array, InstrumentationScope, Key, KeyValue, StringValue, Value};
use opentelemetry_sdk::trace::{SpanData, SpanEvents, SpanLinks};
use opentelemetry_semantic_conventions::attribute as semconv;

use super::process::{OpenSpan, Trace};
use crate::catalogue::plan::{EXCEPTION_MESSAGE, EXCEPTION_TYPE};
use crate::catalogue::{Probe, Role};
use crate::kernel::event::{self, FieldValue, Outcome};
use crate::python::exception::ExceptionFacts;
use crate::units::{BootNanos, Tid};

/// How a span ended.
#[derive(Clone, Debug)]
pub(super) enum Ending {
    /// The call returned.
    Returned,
    /// An exception left it.
    Raised(Raised),
    /// Its end was not seen.
    Incomplete {
        /// Why: the value of `floe.incomplete`.
        reason: &'static str,
        /// How the process ended, if that is why.
        process: Option<ProcessEnd>,
    },
}

/// An exception.
#[derive(Clone, Debug, Default)]
pub(super) struct Raised {
    kind: Option<String>,
    message: Option<String>,
    stacktrace: Option<String>,
    /// `SystemExit`'s code and the like: the message is not text.
    code: Option<i64>,
}

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ProcessEnd {
    Exited(u32),
    Signalled(u32),
}

impl ProcessEnd {
    /// From an exit code as `wait` gives it.
    pub(super) fn from_wait(code: u32) -> Self {
        match code & 0x7f {
            0 => Self::Exited(code >> 8 & 0xff),
            signal => Self::Signalled(signal),
        }
    }
}

impl Ending {
    pub(super) fn incomplete(reason: &'static str) -> Self {
        Self::Incomplete { reason, process: None }
    }

    pub(super) fn of(outcome: Outcome, raised: Raised) -> Self {
        match outcome {
            Outcome::Returned => Self::Returned,
            Outcome::Raised => Self::Raised(raised),
        }
    }
}

impl Raised {
    /// The exception as it was read while its thread waited, where it was: more is known of it then.
    pub(super) fn or(self, read: Option<ExceptionFacts>) -> Self {
        let Some(ExceptionFacts { type_name, message, stacktrace }) = read else {
            return self;
        };
        Self { kind: Some(type_name), message: message.or(self.message), stacktrace: Some(stacktrace), code: self.code }
    }

    /// Exceptions that are the normal end of a generator, an iteration or a program.
    fn is_control_flow(&self) -> bool {
        match self.kind.as_deref() {
            Some("StopIteration" | "StopAsyncIteration" | "GeneratorExit") => true,
            Some("SystemExit") => self.message.is_none() || self.code == Some(0),
            _ => false,
        }
    }

    fn description(&self) -> String {
        match (&self.kind, &self.message) {
            (Some(kind), Some(message)) if !message.is_empty() => format!("{kind}: {message}"),
            (Some(kind), _) => kind.clone(),
            (None, Some(message)) => message.clone(),
            (None, None) => "an exception".to_owned(),
        }
    }
}

/// Puts captured fields into a span's attributes; gives back those that describe an exception.
pub(super) fn apply(span: Option<&mut OpenSpan>, names: &[Key], fields: Vec<FieldValue>) -> Raised {
    let mut raised = Raised::default();
    let mut span = span;
    for FieldValue { field, value, cut } in fields {
        let Some(name) = names.get(usize::from(field)) else {
            continue;
        };
        let value = match value {
            event::Value::Map(entries) => {
                let Some(span) = span.as_deref_mut() else {
                    continue;
                };
                for (key, value) in entries {
                    if let Some(value) = attribute_value(value) {
                        let name = if name.as_str() == "*" { key } else { format!("{name}.{key}") };
                        set(&mut span.attributes, name.into(), value);
                    }
                }
                if cut && !span.cut.contains(name) {
                    span.cut.push(name.clone());
                }
                continue;
            }
            value => match attribute_value(value) {
                Some(value) => value,
                None => continue,
            },
        };
        match name.as_str() {
            EXCEPTION_TYPE => raised.kind = Some(value.as_str().into_owned()),
            EXCEPTION_MESSAGE => {
                raised.code = if let Value::I64(code) = value { Some(code) } else { None };
                raised.message = Some(value.as_str().into_owned());
            }
            _ => {
                let Some(span) = span.as_deref_mut() else {
                    continue;
                };
                if cut && !span.cut.contains(name) {
                    span.cut.push(name.clone());
                }
                set(&mut span.attributes, name.clone(), value);
            }
        }
    }
    raised
}

/// A captured value as an attribute has it. Nothing for None, and for what is nested deeper than attributes can be.
fn attribute_value(value: event::Value) -> Option<Value> {
    Some(match value {
        event::Value::Str { text, cut: _ } => Value::from(text),
        event::Value::Int(int) => Value::I64(int),
        event::Value::Float(float) if float.is_finite() => Value::F64(float),
        // JSON has no notation for these.
        event::Value::Float(float) => Value::from(float.to_string()),
        event::Value::Bool(bool) => Value::Bool(bool),
        event::Value::List(items) => {
            Value::Array(array(&items.into_iter().filter_map(attribute_value).collect::<Vec<_>>()))
        }
        event::Value::None | event::Value::Map(_) => return None,
    })
}

/// Values of one type; texts, if they are not.
fn array(items: &[Value]) -> Array {
    fn all<T>(items: &[Value], one: impl Fn(&Value) -> Option<T>) -> Option<Vec<T>> {
        (!items.is_empty()).then(|| items.iter().map(one).collect())?
    }
    let bools = |items: &[Value]| all(items, |item| if let Value::Bool(bool) = item { Some(*bool) } else { None });
    let ints = |items: &[Value]| all(items, |item| if let Value::I64(int) = item { Some(*int) } else { None });
    let floats = |items: &[Value]| all(items, |item| if let Value::F64(float) = item { Some(*float) } else { None });
    bools(items)
        .map(Array::Bool)
        .or_else(|| ints(items).map(Array::I64))
        .or_else(|| floats(items).map(Array::F64))
        .unwrap_or_else(|| Array::String(items.iter().map(|item| item.as_str().into_owned().into()).collect()))
}

fn set(attributes: &mut Vec<KeyValue>, name: Key, value: Value) {
    match attributes.iter_mut().find(|known| known.key == name) {
        Some(known) => known.value = value,
        None => attributes.push(KeyValue::new(name, value)),
    }
}

/// What a span needs besides itself when it ends.
pub(super) struct Finish<'a> {
    pub(super) probe: &'a Probe,
    /// The probed function, qualified.
    pub(super) function: &'a StringValue,
    pub(super) trace: &'a Trace,
    pub(super) tid: Tid,
    pub(super) scope: &'a InstrumentationScope,
}

impl Finish<'_> {
    /// Makes the finished span.
    pub(super) fn span(&self, span: OpenSpan, ended: BootNanos, ending: &Ending) -> SpanData {
        let OpenSpan { id, parent, remote, began, start, mut attributes, cut, role, nested: _, recursion, nodes } =
            span;
        let end = start + Duration::from_nanos(ended.0.saturating_sub(began.0));
        if role == Role::Command && nodes[0] > 0 {
            attributes.push(KeyValue::new("floe.nodes", i64::from(nodes[0])));
            attributes.push(KeyValue::new("floe.nodes.failed", i64::from(nodes[1])));
        }
        let mut events = SpanEvents::default();
        let status = match ending {
            Ending::Raised(raised) if !raised.is_control_flow() => {
                let described = |name, value: &Option<String>| value.clone().map(|value| KeyValue::new(name, value));
                let exception = [
                    described(semconv::EXCEPTION_TYPE, &raised.kind),
                    described(semconv::EXCEPTION_MESSAGE, &raised.message),
                    described(semconv::EXCEPTION_STACKTRACE, &raised.stacktrace),
                ];
                events.events.push(Event::new("exception", end, exception.into_iter().flatten().collect(), 0));
                let description = self.raised(&attributes).unwrap_or_else(|| raised.description());
                attributes.extend(described(semconv::ERROR_TYPE, &raised.kind));
                error(description)
            }
            Ending::Returned | Ending::Raised(_) => self.status(&attributes),
            Ending::Incomplete { reason, process } => {
                attributes.push(KeyValue::new("floe.incomplete", *reason));
                process_end(&mut attributes, *process)
            }
        };
        if !cut.is_empty() {
            let names = cut.iter().map(|name| StringValue::from(name.to_string())).collect();
            attributes.push(KeyValue::new("floe.truncated", Value::Array(Array::String(names))));
        }
        if recursion {
            attributes.push(KeyValue::new("floe.recursion", true));
        }
        let lost = self.trace.lost();
        if lost > 0 {
            attributes.push(KeyValue::new("floe.trace.incomplete", true));
            attributes.push(KeyValue::new("floe.trace.lost_events", i64::try_from(lost).unwrap_or(i64::MAX)));
        }
        attributes.push(KeyValue::new(semconv::CODE_FUNCTION_NAME, self.function.clone()));
        attributes.push(KeyValue::new(semconv::THREAD_ID, i64::from(self.tid.0)));
        let instant = self.probe.span.as_ref().is_some_and(|rule| rule.instant);
        SpanData {
            span_context: SpanContext::new(self.trace.id, id, TraceFlags::SAMPLED, false, TraceState::default()),
            parent_span_id: parent.unwrap_or(SpanId::INVALID),
            parent_span_is_remote: remote,
            span_kind: SpanKind::Internal,
            name: self.name(&attributes),
            start_time: start,
            end_time: if instant { start } else { end },
            attributes,
            dropped_attributes_count: 0,
            events,
            links: SpanLinks::default(),
            status,
            instrumentation_scope: self.scope.clone(),
        }
    }

    fn name(&self, attributes: &[KeyValue]) -> Cow<'static, str> {
        let name = self.probe.span.as_ref().map(|span| span.name.render(|name| text(attributes, name)));
        name.filter(|name| !name.is_empty()).unwrap_or_else(|| self.probe.name.clone()).into()
    }

    /// What the pack says about a call that raised.
    fn raised(&self, attributes: &[KeyValue]) -> Option<String> {
        let rule = self.probe.status.as_ref()?;
        rule.raised.iter().find_map(|template| template.render_complete(|name| text(attributes, name)))
    }

    /// What the pack says about a call that returned.
    fn status(&self, attributes: &[KeyValue]) -> Status {
        let Some(rule) = &self.probe.status else {
            return Status::Unset;
        };
        let outcome = rule.from.as_deref().and_then(|name| text(attributes, name));
        let Some(outcome) = outcome.filter(|outcome| rule.error.contains(outcome)) else {
            return Status::Unset;
        };
        let message = rule.message.as_deref().and_then(|name| text(attributes, name));
        error(message.unwrap_or(outcome))
    }
}

/// A span that is open when its process dies of a signal, or exits with a code other than 0, has failed.
fn process_end(attributes: &mut Vec<KeyValue>, process: Option<ProcessEnd>) -> Status {
    match process {
        None => Status::Unset,
        Some(ProcessEnd::Exited(code)) => {
            attributes.push(KeyValue::new(semconv::PROCESS_EXIT_CODE, i64::from(code)));
            if code == 0 {
                return Status::Unset;
            }
            error(format!("the process exited with code {code} during the call"))
        }
        Some(ProcessEnd::Signalled(signal)) => {
            attributes.push(KeyValue::new("floe.process.signal", i64::from(signal)));
            let name = signal_name(signal).map(|name| format!(" ({name})")).unwrap_or_default();
            error(format!("the process was killed by signal {signal}{name}"))
        }
    }
}

fn error(description: String) -> Status {
    Status::Error { description: description.into() }
}

/// Whether the pack makes no span of a call with these attributes.
pub(super) fn is_left_out(probe: &Probe, attributes: &[KeyValue]) -> bool {
    let unless = probe.span.as_ref().map_or(&[][..], |span| span.unless.as_slice());
    unless.iter().any(|(name, values)| text(attributes, name).is_some_and(|value| values.contains(&value)))
}

fn text(attributes: &[KeyValue], name: &str) -> Option<String> {
    let attribute = attributes.iter().find(|attribute| attribute.key.as_str() == name)?;
    Some(attribute.value.as_str().into_owned())
}

fn signal_name(signal: u32) -> Option<&'static str> {
    Some(match signal {
        1 => "SIGHUP",
        2 => "SIGINT",
        3 => "SIGQUIT",
        4 => "SIGILL",
        6 => "SIGABRT",
        7 => "SIGBUS",
        8 => "SIGFPE",
        9 => "SIGKILL",
        11 => "SIGSEGV",
        13 => "SIGPIPE",
        14 => "SIGALRM",
        15 => "SIGTERM",
        24 => "SIGXCPU",
        _ => return None,
    })
}
