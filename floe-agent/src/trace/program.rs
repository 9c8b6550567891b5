//! The span of a process of which nothing is seen inside: a program that is not Python.
//!
//! Named and described as OpenTelemetry's conventions for command line programs say (the callee's side).

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use opentelemetry::trace::{SpanId, SpanKind, Status};
use opentelemetry::{Key, KeyValue};
use opentelemetry_sdk::trace::{SpanData, SpanEvents, SpanLinks};
use opentelemetry_semantic_conventions::attribute as semconv;

use super::assembler::Core;
use super::finish::{Ending, process_end};
use super::process::Process;
use crate::units::BootNanos;

/// An open span of this kind.
#[derive(Debug)]
pub(super) struct ProgramSpan {
    pub(super) id: SpanId,
    began: BootNanos,
    start: SystemTime,
}

impl Core {
    /// Begins the span of a process that has one.
    pub(super) fn begin_program(&mut self, process: &mut Process) {
        if let (None, Some(began)) = (&process.program, process.facts.span_since) {
            let start = self.clock.wall(began);
            process.program = Some(ProgramSpan { id: self.ids.new_span_id(), began, start });
        }
    }

    /// The process has ended, or is another program now.
    pub(super) fn end_program(&mut self, process: &mut Process, time: BootNanos, ending: &Ending) {
        let Some(ProgramSpan { id, began, start }) = process.program.take() else {
            return;
        };
        let mut attributes = Vec::new();
        let mut status = Status::Unset;
        if let Ending::Incomplete { reason, process: end } = ending {
            match end {
                // The end of the process is the end of this span.
                Some(_) => status = process_end(&mut attributes, *end, ""),
                None => attributes.push(KeyValue::new("floe.incomplete", *reason)),
            }
        }
        if matches!(status, Status::Error { .. }) {
            let code = attributes.first().map(|how| how.value.to_string());
            attributes.extend(code.map(|code| KeyValue::new(semconv::ERROR_TYPE, code)));
        }
        let of_resource = |name| process.resource.get(&Key::from_static_str(name));
        for name in [semconv::PROCESS_EXECUTABLE_NAME, semconv::PROCESS_EXECUTABLE_PATH, semconv::PROCESS_COMMAND_ARGS]
        {
            attributes.extend(of_resource(name).map(|value| KeyValue::new(name, value)));
        }
        attributes.push(KeyValue::new(semconv::PROCESS_PID, i64::from(process.facts.pid.0)));
        let name = of_resource(semconv::PROCESS_EXECUTABLE_NAME).unwrap_or_else(|| "process".into());
        let parent = process.inherited;
        let span = SpanData {
            span_context: process.trace.context(id),
            parent_span_id: parent.unwrap_or(SpanId::INVALID),
            parent_span_is_remote: parent.is_some(),
            span_kind: SpanKind::Internal,
            name: name.to_string().into(),
            start_time: start,
            end_time: start + Duration::from_nanos(time.0.saturating_sub(began.0)),
            attributes,
            dropped_attributes_count: 0,
            events: SpanEvents::default(),
            links: SpanLinks::default(),
            status,
            instrumentation_scope: self.scope.clone(),
        };
        self.finished(process, &Arc::clone(&process.trace), span, time);
    }
}
