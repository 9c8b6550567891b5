//! Which trace a span or a process is in, and below which span.

use std::sync::Arc;

use opentelemetry::trace::{SpanContext, SpanId, TraceId};

use super::assembler::Core;
use super::process::Process;
use super::traces::Trace;
use crate::process::run_id::Source;
use crate::units::Tid;

/// Where a span belongs.
pub(super) struct Belongs {
    pub(super) trace: Arc<Trace>,
    pub(super) parent: Option<SpanId>,
    /// The parent is in another process.
    pub(super) remote: bool,
    /// The span that it happens in, where that is in another trace.
    pub(super) around: Option<SpanContext>,
}

impl Core {
    /// The trace of a span that would begin now in this thread, and that is part of this run.
    pub(super) fn expected(&mut self, process: &Process, tid: Tid, run: Option<&str>) -> Arc<Trace> {
        let trace = process.place(tid).0;
        match run {
            Some(run) if !trace.is_given() && !trace.is_open() => self.traces.run(run),
            _ => trace,
        }
    }

    /// Where a span belongs that begins now in this thread, and that is part of this run.
    pub(super) fn belongs(&mut self, process: &mut Process, tid: Tid, run: Option<&str>) -> Belongs {
        let (trace, parent, remote) = process.place(tid);
        let stays = Belongs { trace: Arc::clone(&trace), parent, remote, around: None };
        let Some(run) = run else {
            return stays;
        };
        let there = self.traces.run(run);
        // What the environment says has the last word.
        if trace.is_given() || trace.id() == there.id() {
            return stays;
        }
        match parent {
            // The first run in a span is what that span is about.
            Some(_) if self.traces.join(&trace, &there) => stays,
            Some(span) => {
                // What another thread works on is not around it.
                let around = (remote || process.is_around(tid, span)).then(|| trace.context(span));
                Belongs { trace: there, parent: None, remote: false, around }
            }
            None => {
                self.traces.join(&process.trace, &there);
                process.trace = Arc::clone(&there);
                Belongs { trace: there, parent: None, remote: false, around: None }
            }
        }
    }

    /// Where a span begins that the program exports itself, if it is one in what is traced here. What it stands for is not
    /// exported again.
    pub(super) fn external(
        &mut self,
        process: &mut Process,
        tid: Tid,
        (trace, span): (TraceId, SpanId),
        name: &str,
    ) -> Option<(Arc<Trace>, SpanId)> {
        let (here, parent, _) = process.place(tid);
        // What the environment says has the last word.
        if here.is_given() && here.id() != trace {
            return None;
        }
        let catalogue = Arc::clone(&self.catalogue);
        if let Some(around) = parent.and_then(|parent| process.span(parent)) {
            let values = &around.values;
            let names = catalogue.span(around.rule).map_or(&[][..], |rule| &rule.exported_as);
            if names.iter().any(|own| own.render_complete(|name| values.text(name)).as_deref() == Some(name)) {
                if self.double {
                    return None;
                }
                around.external = true;
            }
        }
        let there = self.traces.own(trace);
        if parent.is_some() {
            self.traces.join(&here, &there);
        }
        Some((there, span))
    }

    /// From here on the process works for this run.
    pub(super) fn works_for(&mut self, process: &mut Process, tid: Tid, run: &str) {
        let (trace, _, remote) = process.place(tid);
        let there = self.traces.run(run);
        if trace.is_given() || trace.id() == there.id() || self.traces.join(&trace, &there) {
            return;
        }
        process.trace = there;
        if remote {
            process.inherited = None;
        }
    }

    /// Puts a process where its environment and the process that started it say.
    pub(super) fn settle_home(&mut self, process: &mut Process) {
        if process.started {
            return;
        }
        let lineage = process.lineage.clone();
        let Some(run) = &process.facts.run else {
            if let Some((trace, span)) = lineage {
                process.trace = trace;
                process.inherited = span;
            }
            return;
        };
        let given = self.traces.given(run);
        let handed_down = run.source == Source::Traceparent;
        process.inherited = match lineage {
            // The span that was open in the thread that started it says more than the environment, which may be older.
            Some((trace, Some(span))) if trace.id() == given.id() => Some(span),
            Some((trace, Some(span))) if !handed_down && self.traces.join(&trace, &given) => Some(span),
            _ => run.parent.filter(|_| handed_down),
        };
        process.trace = given;
    }
}
