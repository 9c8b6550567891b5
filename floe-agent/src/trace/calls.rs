//! What the beginning and the end of a call do to the spans of its process.

use std::sync::Arc;

use opentelemetry::trace::{Link, SpanId, Status};
use opentelemetry_sdk::trace::SpanData;

use super::assembler::{Core, FinishedSpan};
use super::finish::{Ending, Finish, Raised};
use super::home::Belongs;
use super::ids;
use super::process::{Frame, Handle, Loose, OpenSpan, Process, Waiting};
use super::traces::Trace;
use super::values::{self, Values};
use crate::catalogue::probe::Read;
use crate::catalogue::template::Template;
use crate::catalogue::{Kind, Moment, Probe, Role, SpanRef, SpanRule};
use crate::kernel::event::{FieldValue, Outcome, Stamp};
use crate::process::run_id::Source;
use crate::python::exception::ExceptionFacts;
use crate::units::{BootNanos, ProbeId, Tid, UserAddr};

pub(super) const RETURN_NOT_SEEN: &str = "return not seen";
pub(super) const END_NOT_SEEN: &str = "end not seen";
const TOO_MANY_OPEN: &str = "too many open spans";

/// A call begins.
pub(super) struct Enter {
    pub(super) probe: ProbeId,
    pub(super) depth: u32,
    pub(super) recursion: bool,
    pub(super) object: UserAddr,
    pub(super) fields: Vec<FieldValue>,
}

/// A call ends.
pub(super) struct Leave {
    pub(super) call: BootNanos,
    pub(super) probe: ProbeId,
    pub(super) outcome: Outcome,
    pub(super) object: UserAddr,
    pub(super) exception: Option<ExceptionFacts>,
    pub(super) fields: Vec<FieldValue>,
}

/// Where a span is kept while it is open.
#[derive(Clone, Copy, Debug)]
pub(super) enum Place {
    /// It is a call of its thread.
    Call,
    /// Another call of the thread ends it, or one with the same key.
    Pair {
        /// Armed calls around it.
        depth: u32,
    },
    /// The `__exit__` of this context manager ends it.
    Context(UserAddr),
    /// A rule begins it, and a rule ends it.
    Rule,
}

impl Core {
    pub(super) fn new_trace(&self) -> Arc<Trace> {
        Trace::open(self.ids.new_trace_id())
    }

    /// The id of a new span: computed from its key where its trace is known.
    fn span_id(&self, trace: &Arc<Trace>, key: Option<&str>) -> SpanId {
        key.and_then(|key| trace.span_id(key)).unwrap_or_else(|| self.ids.new_span_id())
    }

    pub(super) fn enter(&mut self, process: &mut Process, stamp: &Stamp, enter: Enter) {
        let Enter { probe: id, depth, recursion, object, fields } = enter;
        let catalogue = Arc::clone(&self.catalogue);
        let Some(probe) = catalogue.probe(id) else {
            self.stats.unknown_probes += 1;
            return;
        };
        // Calls that were at this depth or deeper have returned without being seen.
        let gone = |frame: &Frame| {
            if frame.pair { frame.depth > depth } else { frame.depth >= depth }
        };
        let keep = process.frames(stamp.tid).iter().rposition(|frame| !gone(frame)).map_or(0, |last| last + 1);
        self.close_above(process, stamp.tid, keep, stamp.time, &Ending::incomplete(RETURN_NOT_SEEN));

        let full = process.open >= self.limits.open_calls
            || (process.threads.len() >= self.limits.threads && process.frames(stamp.tid).is_empty());
        if full {
            self.stats.dropped_calls += 1;
            return;
        }
        let mut values = Values::default();
        let raised = values.capture(probe, catalogue.fields(id, Moment::Enter), fields);
        let mut frame = Frame {
            call: stamp.time,
            depth,
            probe: id,
            span: None,
            pair: false,
            values: Values::default(),
            raised,
            object,
            inner: false,
            began: None,
            logs_of: None,
        };
        let reference = SpanRef { probe: id, rule: None };
        match (probe.kind, &probe.span) {
            (Kind::Event, _) => {
                values.compute(&probe.computed);
                frame.inner = probe.implementations && is_override(process, stamp.tid, id, object, &values);
                if let Some(key) = probe.logs_of.as_ref().and_then(|key| render(process, stamp.tid, key, &values)) {
                    let trace = process.place(stamp.tid).0;
                    let span = trace.next_span_id(&key);
                    frame.logs_of = Some((trace, span));
                }
                if probe.at == Moment::Enter && !frame.inner {
                    self.carry_out(process, stamp, id, probe, &values, None);
                } else {
                    frame.values = values;
                }
            }
            (Kind::PairEnd { begin }, _) => {
                values.compute(&probe.computed);
                if probe.at == Moment::Enter {
                    self.end_pair(process, stamp, begin, probe, &values, &Ending::Returned);
                } else {
                    frame.values = values;
                }
            }
            (Kind::ContextManager | Kind::ContextExit, _) => frame.values = values,
            // An override that calls the method it overrides: one piece of work.
            (Kind::Call, Some(_)) if probe.implementations && is_inside(process, stamp.tid, id, object, &values) => {}
            (Kind::Call, Some(rule)) => {
                frame.span = self.open(process, stamp, Place::Call, (reference, probe, rule), values);
                if let Some(span) = &mut frame.span {
                    span.recursion = recursion;
                }
            }
            (Kind::PairBegin, Some(rule)) => {
                if let Some(span) = self.open(process, stamp, Place::Pair { depth }, (reference, probe, rule), values) {
                    frame.began = Some(span.id);
                    if let Some(key) = span.key.clone() {
                        let handle = Handle::Key(reference, key);
                        self.begin_loose(process, stamp, Loose { handle, within: None, span });
                    } else {
                        let own = Frame {
                            span: Some(span),
                            pair: true,
                            values: Values::default(),
                            raised: Raised::default(),
                            logs_of: None,
                            ..frame
                        };
                        process.push(stamp.tid, own);
                    }
                }
            }
            (Kind::Call | Kind::PairBegin, None) => {}
        }
        process.push(stamp.tid, frame);
    }

    /// Makes a span that begins now, if the rule makes one of this call.
    pub(super) fn open(
        &mut self,
        process: &mut Process,
        stamp: &Stamp,
        place: Place,
        (reference, probe, rule): (SpanRef, &Probe, &SpanRule),
        mut values: Values,
    ) -> Option<OpenSpan> {
        let around = process.context(stamp.tid).map(|(span, _)| span);
        inherit(process, around, rule, &mut values);
        values.compute(&probe.computed);
        if !rule.condition.holds(|name| values.texts(name)) {
            return None;
        }
        let render =
            |template: &crate::catalogue::template::Template| template.render_complete(|name| values.text(name));
        let key = rule.key.as_ref().and_then(render);
        let run = rule.run.as_ref().and_then(render);
        let external = match &rule.external {
            None => None,
            Some(ids) => {
                let name = rule.name.render(|name| values.text(name));
                let ids =
                    render(&ids.trace).zip(render(&ids.span)).and_then(|(trace, span)| ids::external(&trace, &span));
                Some(self.external(process, stamp.tid, ids?, &name)?)
            }
        };
        let number = match (&external, &key) {
            (Some((trace, _)), _) => Some(trace.number()),
            (None, Some(_)) => Some(self.expected(process, stamp.tid, run.as_deref()).number()),
            (None, None) => None,
        };
        // What has the same handle in the same trace, or is the same pair, has missed its end.
        let again = Ending::incomplete(END_NOT_SEEN);
        match place.handle(reference, key.as_deref(), stamp.tid) {
            Some(handle) => self.close_loose(process, stamp.time, &again, |loose| {
                loose.handle == handle && number.is_none_or(|number| loose.span.trace.number() == number)
            }),
            None => {
                if let Place::Pair { depth } = place
                    && let Some(at) = pair(process, stamp.tid, reference.probe)
                    && process.frames(stamp.tid)[at].depth == depth
                {
                    self.close(process, stamp.tid, at, stamp.time, &again);
                }
            }
        }
        let (Belongs { trace, mut parent, mut remote, around }, own_id) = match external {
            Some((trace, id)) => (Belongs { trace, parent: around, remote: false, around: None }, Some(id)),
            None => (self.belongs(process, stamp.tid, run.as_deref()), None),
        };
        if let Some(span) = rule.parent.as_ref().and_then(render).and_then(|key| self.keys.get(trace.number(), &key)) {
            remote = process.spans().all(|open| open.id != span);
            parent = Some(span);
        }
        let id = own_id.unwrap_or_else(|| self.span_id(&trace, key.as_deref()));
        if let (Some(key), None) = (&key, own_id) {
            self.keys.add(trace.number(), key, id);
            if key == ids::RUN && parent.is_some() {
                trace.has_another_root();
            }
        }
        let links = around.map(|around| Link::new(around, Vec::new(), 0)).into_iter().collect();
        self.number += 1;
        Some(OpenSpan {
            id,
            trace,
            rule: reference,
            tid: stamp.tid,
            number: self.number,
            parent,
            remote,
            began: stamp.time,
            start: self.clock.wall(stamp.time),
            values,
            key,
            events: Vec::new(),
            dropped_events: 0,
            links,
            dropped_links: 0,
            exception: None,
            error: None,
            role: rule.role,
            external: own_id.is_some(),
            nested: process.innermost(stamp.tid, |span| span.role == Role::Node).is_some(),
            recursion: false,
            nodes: [0; 2],
        })
    }

    /// Keeps a span that does not end with this call.
    pub(super) fn begin_loose(&mut self, process: &mut Process, stamp: &Stamp, loose: Loose) {
        if process.loose.len() >= self.limits.loose_spans {
            let oldest = process.loose[0].span.id;
            self.end(process, oldest, stamp.time, &Ending::incomplete(TOO_MANY_OPEN));
        }
        process.push_loose(loose);
    }

    pub(super) fn leave(&mut self, process: &mut Process, stamp: &Stamp, leave: Leave) {
        let Leave { call, probe: id, outcome, object, exception, fields } = leave;
        let open = |process: &Process| {
            let mut frames = process.frames(stamp.tid).iter();
            frames.rposition(|frame| frame.call == call && frame.probe == id && !frame.pair)
        };
        let Some(index) = open(process) else {
            self.stats.unmatched_returns += 1;
            return;
        };
        let catalogue = Arc::clone(&self.catalogue);
        let Some(probe) = catalogue.probe(id) else {
            return;
        };
        let names = catalogue.fields(id, Moment::Exit);
        let unseen = Ending::incomplete(RETURN_NOT_SEEN);
        if let Kind::PairEnd { begin } = probe.kind {
            // What the span's end is called in, and what it calls, are both possible places of its beginning.
            let at = pair(process, stamp.tid, begin).map_or(index, |at| at.max(index));
            self.close_above(process, stamp.tid, at + 1, stamp.time, &unseen);
        } else {
            self.close_above(process, stamp.tid, index + 1, stamp.time, &unseen);
        }
        if probe.kind == Kind::Call {
            let mut raised = Raised::default();
            if let Some(span) = process.threads.get_mut(&stamp.tid).and_then(|frames| frames[index].span.as_mut()) {
                raised = span.values.capture(probe, names, fields);
                span.values.compute(&probe.computed);
            }
            self.close(process, stamp.tid, index, stamp.time, &Ending::of(outcome, raised.or(exception)));
            return;
        }
        let around = process.frames(stamp.tid)[..index].iter().rfind(|frame| !frame.pair);
        let within = around.map(|frame| (stamp.tid, frame.call));
        let Some(frame) = process.remove(stamp.tid, index) else {
            return;
        };
        let Frame { mut values, raised: argument, object: own, inner, began, .. } = frame;
        match probe.kind {
            Kind::Event => {
                let raised = values.capture(probe, names, fields);
                values.compute(&probe.computed);
                if probe.at == Moment::Exit && !inner {
                    let exception = match (probe.reads, outcome) {
                        (Some(Read::Raised), Outcome::Raised) => Some(raised.or(exception)),
                        (Some(Read::Argument), _) => exception.map(Raised::from),
                        _ => None,
                    };
                    self.carry_out(process, stamp, id, probe, &values, exception.as_ref());
                }
                self.done_waiting(process, (stamp.tid, call));
            }
            Kind::PairEnd { begin } => {
                let raised = values.capture(probe, names, fields);
                values.compute(&probe.computed);
                if probe.at == Moment::Exit {
                    let ending = match (outcome, exception) {
                        // The one that came in.
                        (Outcome::Returned, Some(exception)) => Ending::Raised(exception.into()),
                        (_, exception) => Ending::of(outcome, raised.or(exception)),
                    };
                    self.end_pair(process, stamp, begin, probe, &values, &ending);
                }
                // What began inside of the call that ended it.
                let keep = process.frames(stamp.tid).iter().take_while(|frame| frame.call < call).count();
                self.close_above(process, stamp.tid, keep, stamp.time, &unseen);
            }
            Kind::ContextManager => {
                values.capture(probe, names, fields);
                if outcome == Outcome::Returned
                    && let Some(rule) = &probe.span
                    && let Some(span) = self.open(
                        process,
                        stamp,
                        Place::Context(object),
                        (SpanRef { probe: id, rule: None }, probe, rule),
                        values,
                    )
                {
                    self.begin_loose(process, stamp, Loose { handle: Handle::Object(object), within, span });
                }
            }
            Kind::ContextExit => {
                // The exception that came in, else the one that the end of the block brought about.
                let left = values.capture(probe, names, fields);
                let ending = match (argument.is_one(), outcome) {
                    (true, _) => Ending::Raised(argument.or(exception)),
                    (false, Outcome::Returned) => exception
                        .map_or(Ending::Returned, |exception| Ending::Raised(Raised::default().or(Some(exception)))),
                    (false, Outcome::Raised) => Ending::Raised(left.or(exception)),
                };
                self.close_loose(process, stamp.time, &ending, |loose| loose.handle == Handle::Object(own));
            }
            Kind::PairBegin => {
                let Some(span) = began.and_then(|id| process.span(id)) else {
                    return;
                };
                let raised = span.values.capture(probe, names, fields).or(exception);
                span.values.compute(&probe.computed);
                let span_id = span.id;
                let ends = probe.ends.as_ref().is_some_and(|condition| condition.holds(|name| span.values.texts(name)));
                if outcome == Outcome::Raised || ends {
                    self.end(process, span_id, stamp.time, &Ending::of(outcome, raised));
                }
            }
            Kind::Call => {}
        }
    }

    /// Ends the span of a pair.
    fn end_pair(
        &mut self,
        process: &mut Process,
        stamp: &Stamp,
        begin: ProbeId,
        probe: &Probe,
        values: &Values,
        ending: &Ending,
    ) {
        let met = |condition: &crate::catalogue::probe::Condition| condition.holds(|name| values.texts(name));
        if !probe.ends.as_ref().is_none_or(met) {
            return;
        }
        let Some(span) = self.called(process, SpanRef { probe: begin, rule: None }, values, stamp.tid) else {
            return;
        };
        if let Some(span) = process.span(span) {
            span.values.take_over(values, None);
        }
        self.end(process, span, stamp.time, ending);
    }

    /// The open span that is meant where these values are known.
    pub(super) fn called(&self, process: &Process, span: SpanRef, values: &Values, tid: Tid) -> Option<SpanId> {
        let template = self.catalogue.span(span)?.key.as_ref();
        let key = template.and_then(|key| render(process, tid, key, values));
        process.find(span, key.as_deref(), tid)
    }

    /// Ends the frames of a thread from `keep` on, innermost first.
    pub(super) fn close_above(
        &mut self,
        process: &mut Process,
        tid: Tid,
        keep: usize,
        time: BootNanos,
        ending: &Ending,
    ) {
        for index in (keep..process.frames(tid).len()).rev() {
            self.close(process, tid, index, time, ending);
        }
    }

    /// Ends spans that do not end with a call, the youngest first.
    pub(super) fn close_loose(
        &mut self,
        process: &mut Process,
        time: BootNanos,
        ending: &Ending,
        which: impl Fn(&Loose) -> bool,
    ) {
        let ids: Vec<SpanId> = process.loose.iter().filter(|loose| which(loose)).map(|loose| loose.span.id).collect();
        for id in ids.into_iter().rev() {
            self.end(process, id, time, ending);
        }
    }

    /// Ends one frame, and its span if it has one.
    fn close(&mut self, process: &mut Process, tid: Tid, index: usize, time: BootNanos, ending: &Ending) {
        if let Some(frame) = process.frames(tid).get(index)
            && !frame.pair
            && !process.loose.is_empty()
        {
            // A `with` block is over when the call around it is; an `__exit__` whose return was not seen has ended one.
            let (call, object) = (frame.call, frame.object);
            let exit = self.catalogue.probe(frame.probe).is_some_and(|probe| probe.kind == Kind::ContextExit);
            self.close_loose(process, time, &Ending::incomplete(END_NOT_SEEN), |loose| {
                loose.within == Some((tid, call)) || (exit && loose.handle == Handle::Object(object))
            });
        }
        let Some(Frame { span, call, .. }) = process.remove(tid, index) else {
            return;
        };
        self.done_waiting(process, (tid, call));
        let Some(span) = span else {
            return;
        };
        let waits_for = self.catalogue.span(span.rule).and_then(|rule| rule.waits_for);
        // An override of the method calls the one that it overrides.
        let around = process.frames(tid)[..index].iter().find(|frame| waits_for == Some(frame.probe));
        match around.map(|frame| (tid, frame.call)) {
            Some(call) if !matches!(ending, Ending::Incomplete { .. }) => {
                // What waited there before is told no more.
                self.done_waiting(process, call);
                process.waiting.push(Waiting { call, span, time, ending: ending.clone() });
            }
            _ => self.finish(process, span, time, ending),
        }
    }

    /// Finishes the spans that waited for a call.
    fn done_waiting(&mut self, process: &mut Process, call: (Tid, BootNanos)) {
        while let Some(at) = process.waiting.iter().position(|waiting| waiting.call == call) {
            let Waiting { span, time, ending, .. } = process.waiting.remove(at);
            self.finish(process, span, time, &ending);
        }
    }

    /// Ends an open span, wherever it is.
    pub(super) fn end(&mut self, process: &mut Process, id: SpanId, time: BootNanos, ending: &Ending) {
        if let Some(span) = process.take(id) {
            self.finish(process, span, time, ending);
        }
    }

    fn finish(&mut self, process: &mut Process, mut span: OpenSpan, time: BootNanos, ending: &Ending) {
        let catalogue = Arc::clone(&self.catalogue);
        let Some((probe, rule)) = catalogue.probe(span.rule.probe).zip(catalogue.span(span.rule)) else {
            return;
        };
        if span.external {
            return;
        }
        inherit(process, span.parent, rule, &mut span.values);
        for target in self.linked(&span.trace.clone(), &rule.links, &span.values) {
            span.add_link(target);
        }
        let counted = span.role == Role::Node && !span.nested;
        let (tid, trace) = (span.tid, Arc::clone(&span.trace));
        let finish = Finish {
            probe,
            rule,
            function: &self.functions[span.rule.probe.0 as usize],
            trace: &trace,
            scope: &self.scope,
        };
        let span = finish.span(span, time, ending);
        if counted && let Some(command) = process.command(tid).and_then(|id| process.span(id)) {
            command.nodes[0] += 1;
            command.nodes[1] += u32::from(matches!(span.status, Status::Error { .. }));
        }
        self.stats.incomplete += u64::from(matches!(ending, Ending::Incomplete { .. }));
        self.finished(process, &trace, span, time);
    }

    /// Passes on a span that has ended.
    pub(super) fn finished(&mut self, process: &Process, trace: &Arc<Trace>, span: SpanData, time: BootNanos) {
        self.stats.spans += 1;
        let given = process.facts.run.as_ref().filter(|run| run.source == Source::Traceparent);
        let sampled = given.map(|run| run.sampled);
        self.traces.finished(trace, FinishedSpan { resource: Arc::clone(&process.resource), span, sampled }, time);
    }
}

/// A template of these values, and of those that the open spans of the thread have.
fn render(process: &Process, tid: Tid, template: &Template, values: &Values) -> Option<String> {
    template.render_complete(|name| {
        let parent = process.context(tid).map(|(id, _)| id);
        values.text(name).or_else(|| process.inherit(parent, name).map(|value| values::text(&value)))
    })
}

/// Takes over what a span has from the spans around it.
fn inherit(process: &Process, parent: Option<SpanId>, rule: &SpanRule, values: &mut Values) {
    for name in &rule.inherit {
        if values.get(name.as_str()).is_none()
            && let Some(value) = process.inherit(parent, name.as_str())
        {
            values.set(name.clone(), value);
        }
    }
}

/// Whether a call of this probe with this first argument is open in the thread.
fn is_inside(process: &Process, tid: Tid, probe: ProbeId, object: UserAddr, values: &Values) -> bool {
    // A method may also call itself for something else, as an adapter that begins a transaction before a statement.
    let same =
        |open: &OpenSpan| values.attributes.iter().all(|own| open.values.get(own.key.as_str()) == Some(&own.value));
    let mut frames = process.frames(tid).iter();
    frames.any(|frame| frame.probe == probe && frame.object == object && frame.span.as_ref().is_some_and(same))
}

/// Whether the method of an event was called by an override of it, with the same first argument and the same captured values.
fn is_override(process: &Process, tid: Tid, probe: ProbeId, object: UserAddr, values: &Values) -> bool {
    let mut frames = process.frames(tid).iter();
    frames.any(|frame| frame.probe == probe && frame.object == object && frame.values.attributes == values.attributes)
}

/// The innermost open span of a thread that this probe began and another function ends.
fn pair(process: &Process, tid: Tid, begin: ProbeId) -> Option<usize> {
    process.frames(tid).iter().rposition(|frame| frame.pair && frame.probe == begin)
}

impl Place {
    /// By what the end of the span will find it, if it does not end with its call.
    pub(super) fn handle(self, span: SpanRef, key: Option<&str>, tid: Tid) -> Option<Handle> {
        match (self, key) {
            (Self::Call, _) | (Self::Pair { .. }, None) => None,
            (Self::Context(object), _) => Some(Handle::Object(object)),
            (Self::Pair { .. } | Self::Rule, Some(key)) => Some(Handle::Key(span, key.to_owned())),
            (Self::Rule, None) => Some(Handle::Thread(span, tid)),
        }
    }
}
