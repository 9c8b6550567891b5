//! The end of a span: its last attributes, its name, its status.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use opentelemetry::trace::{Event, SpanId, Status};
use opentelemetry::{Array, InstrumentationScope, Key, KeyValue, StringValue, Value};
use opentelemetry_sdk::trace::{SpanData, SpanEvents, SpanLinks};
use opentelemetry_semantic_conventions::attribute as semconv;

use super::process::OpenSpan;
use super::rules;
use super::traces::Trace;
use super::values::{Values, is_local};
use crate::catalogue::{Probe, Role, SpanRule};
use crate::kernel::event::Outcome;
use crate::python::exception::ExceptionFacts;
use crate::units::BootNanos;

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
    pub(super) kind: Option<String>,
    pub(super) message: Option<String>,
    pub(super) stacktrace: Option<String>,
    /// `SystemExit`'s code and the like: the message is not text.
    pub(super) code: Option<i64>,
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

impl From<ExceptionFacts> for Raised {
    fn from(ExceptionFacts { type_name, message, stacktrace }: ExceptionFacts) -> Self {
        Self { kind: Some(type_name), message, stacktrace: Some(stacktrace), code: None }
    }
}

impl Raised {
    /// The exception as it was read while its thread waited, where it was: more is known of it then.
    pub(super) fn or(self, read: Option<ExceptionFacts>) -> Self {
        match read.map(Self::from) {
            Some(read) => Self { message: read.message.or(self.message), code: self.code, ..read },
            None => self,
        }
    }

    /// Whether an argument that may be an exception is one: otherwise it is None.
    pub(super) fn is_one(&self) -> bool {
        self.kind.as_deref().is_some_and(|kind| kind != "NoneType")
    }

    /// It as an event of a span.
    pub(super) fn event(&self, time: SystemTime) -> Event {
        let described = |name, value: &Option<String>| value.clone().map(|value| KeyValue::new(name, value));
        let attributes = [
            described(semconv::EXCEPTION_TYPE, &self.kind),
            described(semconv::EXCEPTION_MESSAGE, &self.message),
            described(semconv::EXCEPTION_STACKTRACE, &self.stacktrace),
        ];
        Event::new("exception", time, attributes.into_iter().flatten().collect(), 0)
    }

    /// Exceptions that are the normal end of a generator, an iteration or a program.
    fn is_control_flow(&self) -> bool {
        match self.kind.as_deref() {
            Some("StopIteration" | "StopAsyncIteration" | "GeneratorExit") => true,
            Some("SystemExit") => self.message.is_none() || self.code == Some(0),
            _ => false,
        }
    }

    pub(super) fn description(&self) -> String {
        match (&self.kind, &self.message) {
            (Some(kind), Some(message)) if !message.is_empty() => format!("{kind}: {message}"),
            (Some(kind), _) => kind.clone(),
            (None, Some(message)) => message.clone(),
            (None, None) => "an exception".to_owned(),
        }
    }
}

/// What a span needs besides itself when it ends.
pub(super) struct Finish<'a> {
    pub(super) probe: &'a Probe,
    pub(super) rule: &'a SpanRule,
    /// The probed function, qualified.
    pub(super) function: &'a StringValue,
    pub(super) trace: &'a Arc<Trace>,
    pub(super) scope: &'a InstrumentationScope,
}

impl Finish<'_> {
    /// Makes the finished span.
    pub(super) fn span(&self, mut span: OpenSpan, ended: BootNanos, ending: &Ending) -> SpanData {
        let end = span.start + Duration::from_nanos(ended.0.saturating_sub(span.began.0));
        if span.role == Role::Command && span.nodes[0] > 0 {
            span.values.set(Key::from_static_str("floe.nodes"), i64::from(span.nodes[0]).into());
            span.values.set(Key::from_static_str("floe.nodes.failed"), i64::from(span.nodes[1]).into());
        }
        // The rules of the probe are about its own span; a rule that begins a span tells more of it by other rules.
        let (status_rule, exception_rule) = match span.rule.rule {
            None => (self.probe.status.as_ref(), self.probe.exception.as_ref()),
            Some(_) => (None, None),
        };
        let mut added = Vec::new();
        let status = match ending {
            Ending::Raised(raised) if !raised.is_control_flow() => {
                // What a rule has told already is not told again.
                if span.exception.is_none() || span.exception != raised.kind {
                    span.add_event(raised.event(end));
                }
                let said = status_rule.and_then(|rule| {
                    rule.raised.iter().find_map(|template| template.render_complete(|name| span.values.text(name)))
                });
                added.extend(raised.kind.clone().map(|kind| KeyValue::new(semconv::ERROR_TYPE, kind)));
                error(said.unwrap_or_else(|| raised.description()))
            }
            Ending::Returned | Ending::Raised(_) => {
                let told = exception_rule.and_then(|rule| rules::exception(rule, &span.values));
                if let Some(told) = &told {
                    span.add_event(told.event(end));
                    span.exception.clone_from(&told.kind);
                }
                let failed = status_rule.and_then(|rule| rules::failure(rule, &span.values));
                match failed.map(|said| said.unwrap_or_else(|outcome| told.map_or(outcome, |told| told.description())))
                {
                    Some(description) => error(description),
                    None => span.error.take().map_or(Status::Unset, error),
                }
            }
            Ending::Incomplete { reason, process } => {
                added.push(KeyValue::new("floe.incomplete", *reason));
                match process_end(&mut added, *process, " during the call") {
                    Status::Unset => span.error.take().map_or(Status::Unset, error),
                    status => status,
                }
            }
        };
        let OpenSpan { id, parent, remote, start, values, events, dropped_events, links, dropped_links, .. } = span;
        let mut better = self.rule.better_names.iter();
        let name = better
            .find_map(|template| template.render_complete(|name| values.text(name)))
            .unwrap_or_else(|| self.rule.name.render(|name| values.text(name)));
        let name = if name.is_empty() { self.rule.id.clone() } else { name };
        let Values { mut attributes, cut, dropped, .. } = values;
        attributes.retain(|attribute| !is_local(attribute.key.as_str()));
        if matches!(status, Status::Error { .. })
            && let Some(kind) = span.exception
            && added.iter().all(|attribute| attribute.key.as_str() != semconv::ERROR_TYPE)
        {
            added.push(KeyValue::new(semconv::ERROR_TYPE, kind));
        }
        attributes.append(&mut added);
        let cut: Vec<_> = cut.iter().filter(|name| !is_local(name.as_str())).collect();
        if !cut.is_empty() {
            let names = cut.iter().map(|name| StringValue::from(name.to_string())).collect();
            attributes.push(KeyValue::new("floe.truncated", Value::Array(Array::String(names))));
        }
        if span.recursion {
            attributes.push(KeyValue::new("floe.recursion", true));
        }
        let lost = self.trace.lost();
        if lost > 0 {
            attributes.push(KeyValue::new("floe.trace.incomplete", true));
            attributes.push(KeyValue::new("floe.trace.lost_events", i64::try_from(lost).unwrap_or(i64::MAX)));
        }
        attributes.push(KeyValue::new(semconv::CODE_FUNCTION_NAME, self.function.clone()));
        attributes.push(KeyValue::new(semconv::THREAD_ID, i64::from(span.tid.0)));
        let mut all_events = SpanEvents::default();
        (all_events.events, all_events.dropped_count) = (events, dropped_events);
        let mut all_links = SpanLinks::default();
        (all_links.links, all_links.dropped_count) = (links, dropped_links);
        SpanData {
            span_context: self.trace.context(id),
            parent_span_id: parent.unwrap_or(SpanId::INVALID),
            parent_span_is_remote: remote,
            span_kind: self.rule.kind.clone(),
            name: name.into(),
            start_time: start,
            end_time: if self.rule.instant { start } else { end },
            attributes,
            dropped_attributes_count: dropped,
            events: all_events,
            links: all_links,
            status,
            instrumentation_scope: self.scope.clone(),
        }
    }
}

/// A span that is open when its process dies of a signal, or exits with a code other than 0, has failed.
pub(super) fn process_end(attributes: &mut Vec<KeyValue>, process: Option<ProcessEnd>, when: &str) -> Status {
    match process {
        None => Status::Unset,
        Some(ProcessEnd::Exited(code)) => {
            attributes.push(KeyValue::new(semconv::PROCESS_EXIT_CODE, i64::from(code)));
            if code == 0 {
                return Status::Unset;
            }
            error(format!("the process exited with code {code}{when}"))
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
