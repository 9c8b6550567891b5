//! What an event's rules do: spans begin and end, and something is told of them.

use std::sync::Arc;

use opentelemetry::KeyValue;
use opentelemetry::trace::{Event, SpanId, TraceId};

use super::assembler::Core;
use super::calls::Place;
use super::finish::{Ending, Raised};
use super::ids;
use super::process::{Loose, OpenSpan, Process};
use super::traces::Trace;
use super::values::{Values, is_local};
use crate::catalogue::pack::LINK_VALUE;
use crate::catalogue::probe::{EventRule, ExceptionRule, LinkRule, Read, StatusRule, Subject};
use crate::catalogue::template::Template;
use crate::catalogue::{Probe, SpanRef};
use crate::kernel::event::Stamp;
use crate::units::ProbeId;

impl Core {
    /// Carries out the rules of an event.
    pub(super) fn carry_out(
        &mut self,
        process: &mut Process,
        stamp: &Stamp,
        id: ProbeId,
        probe: &Probe,
        values: &Values,
        exception: Option<&Raised>,
    ) {
        if let Some(log) = &probe.log {
            self.log(process, stamp, id, log, values);
        }
        for (number, rule) in probe.rules.iter().enumerate() {
            if !rule.condition.holds(|name| values.texts(name)) {
                continue;
            }
            if let Some(run) = rule.run.as_ref().and_then(|run| run.render_complete(|name| values.text(name))) {
                self.works_for(process, stamp.tid, &run);
            }
            let span = match &rule.subject {
                Subject::Begin(_) => {
                    let reference = SpanRef { probe: id, rule: Some(number as u16) };
                    self.begin(process, stamp, reference, probe, rule, values)
                }
                Subject::Command => process.command(stamp.tid),
                Subject::Innermost => process.innermost(stamp.tid, |_| true).or_else(|| process.command(stamp.tid)),
                Subject::End(span) | Subject::Span(span) => self.called(process, *span, values, stamp.tid),
            };
            let Some(span_id) = span else {
                // An exception also passes by where there is no such span.
                let passing = rule.exception.as_ref().is_some_and(|exception| exception.from == Some(Read::Raised));
                let told = rule.run.is_none() && !values.is_empty() && !passing;
                if told && !matches!(rule.subject, Subject::Begin(_)) {
                    self.stats.orphan_events += 1;
                }
                continue;
            };
            let Some(trace) = process.span(span_id).map(|span| Arc::clone(&span.trace)) else {
                continue;
            };
            let targets = self.linked(&trace, &rule.links, values);
            let time = self.clock.wall(stamp.time);
            if let Some(span) = process.span(span_id) {
                for target in targets {
                    span.add_link(target);
                }
                tell(span, rule, values, exception, time);
            }
            let instant = match &rule.subject {
                Subject::Begin(span) => span.instant,
                Subject::End(_) => true,
                _ => false,
            };
            if instant {
                self.end(process, span_id, stamp.time, &Ending::Returned);
            }
        }
    }

    /// Begins the span of a rule.
    fn begin(
        &mut self,
        process: &mut Process,
        stamp: &Stamp,
        reference: SpanRef,
        probe: &Probe,
        rule: &EventRule,
        values: &Values,
    ) -> Option<SpanId> {
        let Subject::Begin(span_rule) = &rule.subject else {
            return None;
        };
        // Its key and its condition may name what is no attribute of the span.
        let mut all = values.clone();
        all.compute(&rule.set);
        let mut span = self.open(process, stamp, Place::Rule, (reference, probe, span_rule), all)?;
        if let Some(chosen) = &rule.attributes {
            let own = rule.set.iter().map(|set| &set.name).chain(&span_rule.inherit).chain(chosen);
            let own: Vec<_> = own.cloned().collect();
            let all = std::mem::take(&mut span.values);
            span.values.take_over(&all, Some(&own));
        }
        let id = span.id;
        let handle = Place::Rule.handle(reference, span.key.as_deref(), stamp.tid)?;
        self.begin_loose(process, stamp, Loose { handle, within: None, span });
        Some(id)
    }

    /// The spans that links lead to.
    pub(super) fn linked(&mut self, trace: &Arc<Trace>, links: &[LinkRule], values: &Values) -> Vec<(TraceId, SpanId)> {
        let mut targets = Vec::new();
        for LinkRule { each, run, keys, unseen } in links {
            let items = match each {
                Some(name) => values.texts(name),
                None => vec![String::new()],
            };
            for item in items {
                let value = |name: &str| if name == LINK_VALUE { Some(item.clone()) } else { values.text(name) };
                let run = run.as_ref().and_then(|run| run.render_complete(value));
                let Some(key) = keys.iter().find_map(|key| key.render_complete(value)) else {
                    continue;
                };
                // A span of another agent, or one that is long over, is not known here, but its id is.
                let there = run.as_ref().map(|run| self.traces.run(run));
                let computed = there.is_some() || (*unseen && !trace.is_open());
                let there = there.as_ref().unwrap_or(trace);
                let known = self.keys.get(there.number(), &key);
                let span = known.or_else(|| computed.then(|| ids::span_id(there.id(), &key, 0)));
                targets.extend(span.map(|span| (there.id(), span)));
            }
        }
        targets
    }
}

/// Tells a span what a rule says.
fn tell(span: &mut OpenSpan, rule: &EventRule, values: &Values, read: Option<&Raised>, time: std::time::SystemTime) {
    let told = |all: &Values, only: Option<&[opentelemetry::Key]>| -> Vec<KeyValue> {
        let chosen = all.attributes.iter().filter(|attribute| {
            !is_local(attribute.key.as_str()) && only.is_none_or(|names| names.contains(&attribute.key))
        });
        chosen.cloned().collect()
    };
    let mut all = values.clone();
    all.compute(&rule.set);
    if !matches!(rule.subject, Subject::Begin(_)) {
        let set: Vec<_> = rule.set.iter().map(|set| set.name.clone()).collect();
        match (&rule.attributes, &rule.event) {
            (Some(chosen), _) => {
                let names: Vec<_> = chosen.iter().chain(&set).cloned().collect();
                span.values.take_over(&all, Some(&names));
            }
            (None, Some(_)) => span.values.take_over(&all, Some(&set)),
            (None, None) => span.values.take_over(&all, None),
        }
    }
    if let Some(event) = &rule.event {
        let name = event.name.render(|name| all.text(name));
        span.add_event(Event::new(name, time, told(values, event.attributes.as_deref()), 0));
    }
    if let Some(dynamic) = &rule.dynamic
        && let Some(name) = values.text(&dynamic.name)
        && let Some(value) = values.get(&dynamic.value)
        && (dynamic.prefixes.is_empty() || dynamic.prefixes.iter().any(|prefix| name.starts_with(prefix)))
    {
        span.values.set_named_by_program(name, value.clone());
    }
    let read = |rule: &ExceptionRule| read.filter(|_| rule.from.is_some()).cloned();
    let exception = rule.exception.as_ref().and_then(|rule| read(rule).or_else(|| exception(rule, &all)));
    if let Some(exception) = &exception {
        span.add_event(exception.event(time));
        span.exception.clone_from(&exception.kind);
    }
    if let Some(said) = rule.status.as_ref().and_then(|status| failure(status, &all)) {
        let description = |outcome| exception.as_ref().map_or(outcome, Raised::description);
        span.error = Some(said.unwrap_or_else(description));
    }
}

/// Whether an outcome that was told by value is a failure, and what the status says: the message, or else the outcome.
pub(super) fn failure(rule: &StatusRule, values: &Values) -> Option<Result<String, String>> {
    let outcome = rule.from.as_deref().and_then(|name| values.text(name))?;
    if !rule.error.iter().any(|value| value == "*" || *value == outcome) {
        return None;
    }
    Some(rule.message.as_deref().and_then(|name| values.text(name)).ok_or(outcome))
}

/// The exception that values describe.
pub(super) fn exception(rule: &ExceptionRule, values: &Values) -> Option<Raised> {
    let first = |templates: &[Template]| {
        templates.iter().find_map(|template| template.render_complete(|name| values.text(name)))
    };
    let kind = first(&rule.kind)?;
    let (kind, message) = match first(&rule.message) {
        Some(message) => split_message(kind, message.trim_end()),
        None => (kind, None),
    };
    Some(Raised { kind: Some(kind), message, stacktrace: first(&rule.stacktrace), code: None })
}

/// Takes the type off a message as Python prints it: `shop.errors.NoSuchDay: Monday`.
fn split_message(kind: String, message: &str) -> (String, Option<String>) {
    let (head, rest) = message.split_once(": ").map_or((message, None), |(head, rest)| (head, Some(rest)));
    let is_kind = head == kind || head.strip_suffix(kind.as_str()).is_some_and(|module| module.ends_with('.'));
    let is_name = head.chars().all(|c| c.is_alphanumeric() || matches!(c, '_' | '.' | '<' | '>'));
    if is_kind && is_name {
        return (head.to_owned(), rest.map(str::to_owned));
    }
    (kind, Some(message.to_owned()))
}
