//! Traces: which one a span is in, and the spans that wait until that is known.
//!
//! A process may learn the run that it works for only after its first spans. Until then its trace is *open*: finished spans
//! are held, for a bounded time and in a bounded number, and move to the run's trace when that is known. A trace that has
//! not found its run by then stays what it is.

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use opentelemetry::trace::{Link, SpanContext, SpanId, TraceFlags, TraceId, TraceState};
use opentelemetry_sdk::trace::SpanData;

use super::assembler::FinishedSpan;
use super::ids;
use super::log::FinishedLog;
use crate::process::run_id::{RunContext, Source};
use crate::units::BootNanos;

/// Runs that are remembered after their last span.
const REMEMBERED_RUNS: usize = 1024;
/// Keys that are remembered in one trace, so that no id is given twice.
const REMEMBERED_IDS: usize = 65_536;

/// Spans that are held in all traces together.
const MAX_HELD: usize = 32_768;

/// How long, and how many, finished spans and log records wait for their trace to be known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hold {
    /// From the first finished span of a trace. Zero: nothing is held.
    pub time: Duration,
    /// Spans of one trace.
    pub spans: usize,
}

impl Hold {
    /// Nothing waits.
    pub const NONE: Self = Self { time: Duration::ZERO, spans: 0 };
}

impl Default for Hold {
    fn default() -> Self {
        Self { time: Duration::from_secs(30), spans: 4096 }
    }
}

/// A trace, shared by the spans and the processes that are in it.
#[derive(Debug)]
pub(super) struct Trace {
    /// The id that its spans have while it is open.
    own: TraceId,
    /// The trace of the process that started the one that this trace began in, outside of any span.
    above: Option<Arc<Trace>>,
    lost: AtomicU64,
    inner: Mutex<Inner>,
}

#[derive(Debug)]
struct Inner {
    state: State,
    /// What spans without a parent are children of.
    root: Option<SpanId>,
    held: Vec<Finished>,
    /// When the first span was held.
    since: BootNanos,
    /// How often a key came again, by the id that it first gave.
    used: HashMap<SpanId, u32>,
}

#[derive(Clone, Debug)]
enum State {
    /// It may still turn out to be that of a run: its own, or that of the trace above.
    Open,
    /// It is what it is.
    Settled(Settled),
    /// It is part of another one.
    Joined(Arc<Trace>),
}

#[derive(Clone, Debug)]
struct Settled {
    id: TraceId,
    why: Why,
    sampled: bool,
    state: TraceState,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Why {
    /// No run was found in time.
    Unknown,
    /// A captured value named the run.
    Captured,
    /// The environment or the arguments of a process named the run.
    Given,
}

impl Trace {
    fn new(own: TraceId, above: Option<Arc<Self>>, state: State, root: Option<SpanId>) -> Arc<Self> {
        let inner = Inner { state, root, held: Vec::new(), since: BootNanos(0), used: HashMap::new() };
        Arc::new(Self { own, above, lost: AtomicU64::new(0), inner: Mutex::new(inner) })
    }

    /// A trace of which nothing is known yet.
    pub(super) fn open(own: TraceId) -> Arc<Self> {
        Self::new(own, None, State::Open, None)
    }

    /// The trace of a process that another one started outside of any span: that of the same run, should one be known.
    pub(super) fn below(self: &Arc<Self>, own: TraceId) -> Arc<Self> {
        if self.is_given() { Arc::clone(self) } else { Self::new(own, Some(Arc::clone(self)), State::Open, None) }
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The trace that it is, or that it is part of, once that is known.
    fn settled(self: &Arc<Self>) -> Option<Arc<Self>> {
        let joined = match &self.inner().state {
            State::Settled(_) => return Some(Arc::clone(self)),
            State::Joined(trace) => Some(Arc::clone(trace)),
            State::Open => None,
        };
        match joined {
            Some(trace) => trace.settled(),
            None => self.above.as_ref()?.settled().filter(|trace| trace.read(|known| known.why) != Some(Why::Unknown)),
        }
    }

    /// Something of what is known of the trace that it is, or that it is part of.
    fn settled_as<T>(self: &Arc<Self>, read: impl FnOnce(&Settled) -> T) -> Option<T> {
        self.settled()?.read(read)
    }

    fn read<T>(&self, read: impl FnOnce(&Settled) -> T) -> Option<T> {
        if let State::Settled(settled) = &self.inner().state { Some(read(settled)) } else { None }
    }

    fn known(self: &Arc<Self>) -> Arc<Self> {
        self.settled().unwrap_or_else(|| Arc::clone(self))
    }

    /// Whether it may still turn out to be part of another one.
    pub(super) fn is_open(self: &Arc<Self>) -> bool {
        self.settled().is_none()
    }

    /// Whether the environment or the arguments of a process named it.
    pub(super) fn is_given(self: &Arc<Self>) -> bool {
        self.settled_as(|known| known.why) == Some(Why::Given)
    }

    /// Its id, as far as it is known.
    pub(super) fn id(self: &Arc<Self>) -> TraceId {
        self.settled_as(|known| known.id).unwrap_or(self.own)
    }

    /// The context of a span in it.
    pub(super) fn context(self: &Arc<Self>, span: SpanId) -> SpanContext {
        let known = self.settled_as(|known| (known.id, known.state.clone()));
        let (id, state) = known.unwrap_or((self.own, TraceState::NONE));
        SpanContext::new(id, span, TraceFlags::SAMPLED, false, state)
    }

    fn sampled(self: &Arc<Self>) -> bool {
        self.settled_as(|known| known.sampled).unwrap_or(true)
    }

    /// What a span without a parent is a child of: the span of the run.
    fn root(self: &Arc<Self>) -> Option<SpanId> {
        self.known().inner().root
    }

    /// The run's own span has a parent: the outermost span of the trace is another one.
    pub(super) fn has_another_root(self: &Arc<Self>) {
        self.known().inner().root = None;
    }

    /// By what keys are remembered.
    pub(super) fn number(self: &Arc<Self>) -> TraceId {
        self.known().own
    }

    /// The id of a span with a key that begins now; `None` where it must be random. Where the trace is not known yet, others
    /// cannot compute it.
    pub(super) fn span_id(self: &Arc<Self>, key: &str) -> Option<SpanId> {
        let (known, trace) = (self.known(), self.id());
        let mut inner = known.inner();
        if inner.used.len() >= REMEMBERED_IDS {
            return None;
        }
        let first = ids::span_id(trace, key, 0);
        let occurrence = inner.used.entry(first).and_modify(|last| *last += 1).or_default();
        Some(ids::span_id(trace, key, *occurrence))
    }

    /// The id that the next span with this key will have.
    pub(super) fn next_span_id(self: &Arc<Self>, key: &str) -> SpanId {
        let trace = self.id();
        let last = self.known().inner().used.get(&ids::span_id(trace, key, 0)).copied();
        ids::span_id(trace, key, last.map_or(0, |last| last + 1))
    }

    /// Events that were lost in it so far.
    pub(super) fn lost(self: &Arc<Self>) -> u64 {
        let known = self.known();
        let above = known.above.as_ref().filter(|above| above.id() == known.id() || known.is_open());
        known.lost.load(Ordering::Relaxed) + above.map_or(0, Self::lost)
    }

    pub(super) fn lose(self: &Arc<Self>, events: u64) {
        self.known().lost.fetch_add(events, Ordering::Relaxed);
    }
}

/// What became of finished spans.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TraceStats {
    /// Spans that were held until their trace was known.
    pub held: u64,
    /// Of these, spans that went out without it: the bound was reached.
    pub released: u64,
    /// Spans of traces that ask for none (`TRACEPARENT` without the sampled flag).
    pub unsampled: u64,
}

/// A span that has ended, or a log record.
#[derive(Debug)]
enum Finished {
    Span(FinishedSpan),
    Log(FinishedLog),
}

/// All traces that are known.
#[derive(Debug)]
pub(super) struct Traces {
    runs: HashMap<TraceId, Arc<Trace>>,
    order: VecDeque<TraceId>,
    /// Traces with held spans.
    waiting: VecDeque<Arc<Trace>>,
    /// How many spans are held.
    held: usize,
    pub(super) hold: Hold,
    /// Whether `TRACEPARENT` may ask for no spans.
    pub(super) keep_unsampled: bool,
    pub(super) stats: TraceStats,
    ready: Vec<FinishedSpan>,
    ready_logs: Vec<FinishedLog>,
}

impl Default for Traces {
    fn default() -> Self {
        Self {
            runs: HashMap::new(),
            order: VecDeque::new(),
            waiting: VecDeque::new(),
            held: 0,
            hold: Hold::NONE,
            keep_unsampled: false,
            stats: TraceStats::default(),
            ready: Vec::new(),
            ready_logs: Vec::new(),
        }
    }
}

impl Traces {
    /// The trace that a process's environment or arguments name.
    pub(super) fn given(&mut self, context: &RunContext) -> Arc<Trace> {
        let root = context.parent.filter(|_| context.source != Source::Traceparent);
        let RunContext { trace: id, sampled, state, .. } = context;
        self.settled(root, Settled { id: *id, why: Why::Given, sampled: *sampled, state: state.clone() })
    }

    /// The trace of a run that a captured value names.
    pub(super) fn run(&mut self, run: &str) -> Arc<Trace> {
        let id = ids::trace_id(run);
        self.captured(id, Some(ids::span_id(id, ids::RUN, 0)))
    }

    /// The trace of a span that a program exports itself.
    pub(super) fn own(&mut self, id: TraceId) -> Arc<Trace> {
        self.captured(id, None)
    }

    fn captured(&mut self, id: TraceId, root: Option<SpanId>) -> Arc<Trace> {
        self.settled(root, Settled { id, why: Why::Captured, sampled: true, state: TraceState::NONE })
    }

    fn settled(&mut self, root: Option<SpanId>, settled: Settled) -> Arc<Trace> {
        let id = settled.id;
        if let Some(known) = self.runs.get(&id) {
            return Arc::clone(known);
        }
        if self.order.len() >= REMEMBERED_RUNS
            && let Some(oldest) = self.order.pop_front()
        {
            self.runs.remove(&oldest);
        }
        let trace = Trace::new(id, None, State::Settled(settled), root);
        self.runs.insert(id, Arc::clone(&trace));
        self.order.push_back(id);
        trace
    }

    /// An open trace turns out to be part of another one; whether it was open.
    pub(super) fn join(&mut self, open: &Arc<Trace>, trace: &Arc<Trace>) -> bool {
        if !open.is_open() {
            return false;
        }
        trace.lost.fetch_add(open.lost.load(Ordering::Relaxed), Ordering::Relaxed);
        open.inner().state = State::Joined(Arc::clone(trace));
        self.flush();
        true
    }

    /// A span has ended.
    pub(super) fn finished(&mut self, trace: &Arc<Trace>, span: FinishedSpan, now: BootNanos) {
        self.hold_or_send(trace, Finished::Span(span), now);
    }

    /// A log record was written.
    pub(super) fn logged(&mut self, trace: &Arc<Trace>, log: FinishedLog, now: BootNanos) {
        self.hold_or_send(trace, Finished::Log(log), now);
    }

    fn hold_or_send(&mut self, trace: &Arc<Trace>, finished: Finished, now: BootNanos) {
        if self.hold.time.is_zero() {
            Self::settle(trace);
        }
        if !trace.is_open() {
            return self.send(trace, finished);
        }
        let mut inner = trace.inner();
        if inner.held.is_empty() {
            inner.since = now;
            self.waiting.push_back(Arc::clone(trace));
        }
        inner.held.push(finished);
        self.held += 1;
        self.stats.held += 1;
        let full = inner.held.len() > self.hold.spans;
        drop(inner);
        if full {
            self.release(|waiting| Arc::ptr_eq(waiting, trace));
        } else if self.held > MAX_HELD
            && let Some(oldest) = self.waiting.front().cloned()
        {
            self.release(|waiting| Arc::ptr_eq(waiting, &oldest));
        }
    }

    /// Time has passed.
    pub(super) fn tick(&mut self, now: BootNanos) {
        let limit = self.hold.time.as_nanos() as u64;
        self.release(|trace| now.0.saturating_sub(trace.inner().since.0) >= limit);
    }

    /// Everything that is held goes out.
    pub(super) fn end(&mut self) {
        self.release(|_| true);
    }

    /// Traces stop waiting.
    fn release(&mut self, which: impl Fn(&Arc<Trace>) -> bool) {
        let mut any = false;
        for trace in self.waiting.iter().filter(|trace| which(trace)) {
            self.stats.released += trace.inner().held.len() as u64;
            Self::settle(trace);
            any = true;
        }
        if any {
            self.flush();
        }
    }

    /// Takes what can go out.
    pub(super) fn take_ready_logs(&mut self) -> Vec<FinishedLog> {
        std::mem::take(&mut self.ready_logs)
    }

    /// Takes what can go out.
    pub(super) fn take_ready(&mut self) -> Vec<FinishedSpan> {
        std::mem::take(&mut self.ready)
    }

    /// No run was found in time: the trace stays what it is. Those above it may still find one.
    fn settle(trace: &Arc<Trace>) {
        if !trace.is_open() {
            return;
        }
        let mut top = Arc::clone(trace);
        while let Some(above) = top.above.clone().filter(|_| matches!(top.inner().state, State::Open)) {
            top = above;
        }
        let settled = Settled { id: top.id(), why: Why::Unknown, sampled: true, state: TraceState::NONE };
        trace.inner().state = State::Settled(settled);
    }

    /// Sends what was held for traces that are known now.
    fn flush(&mut self) {
        let (known, waiting) = std::mem::take(&mut self.waiting).into_iter().partition(|trace| !trace.is_open());
        self.waiting = waiting;
        let known: VecDeque<Arc<Trace>> = known;
        for trace in known {
            let held = std::mem::take(&mut trace.inner().held);
            self.held -= held.len();
            for finished in held {
                self.send(&trace, finished);
            }
        }
    }

    fn send(&mut self, trace: &Arc<Trace>, finished: Finished) {
        match finished {
            Finished::Span(_) if !trace.sampled() && !self.keep_unsampled => self.stats.unsampled += 1,
            Finished::Span(mut finished) => {
                rehome(trace, &mut finished.span);
                self.ready.push(finished);
            }
            Finished::Log(mut finished) => {
                let record = &mut finished.record;
                record.trace_id = trace.id().to_bytes().to_vec();
                record.flags = u32::from(trace.sampled());
                if record.span_id.is_empty()
                    && let Some(root) = trace.root()
                {
                    record.span_id = root.to_bytes().to_vec();
                }
                self.ready_logs.push(finished);
            }
        }
    }
}

/// Gives a span, and its links to spans of its own trace, the trace's final id, and a span without a parent that of the run.
fn rehome(trace: &Arc<Trace>, span: &mut SpanData) {
    let id = span.span_context.span_id();
    let known = trace.id();
    let before = span.span_context.trace_id();
    span.span_context = trace.context(id);
    let moved = |link: &SpanContext| link.trace_id() == before || link.trace_id() == trace.own;
    for link in span.links.links.iter_mut().filter(|link| moved(&link.span_context)) {
        let at = &link.span_context;
        let context = SpanContext::new(known, at.span_id(), at.trace_flags(), at.is_remote(), at.trace_state().clone());
        *link = Link::new(context, std::mem::take(&mut link.attributes), link.dropped_attributes_count);
    }
    if span.parent_span_id == SpanId::INVALID
        && let Some(root) = trace.root().filter(|root| *root != id)
    {
        span.parent_span_id = root;
        span.parent_span_is_remote = true;
    }
}
