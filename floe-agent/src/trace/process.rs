//! What the assembler keeps of a process: the open calls of its threads, and its open spans.

use std::sync::Arc;
use std::time::SystemTime;

use foldhash::HashMap;
use opentelemetry::Key;
use opentelemetry::trace::{Event, Link, SpanContext, SpanId, TraceFlags, TraceId, TraceState};
use opentelemetry_sdk::Resource;

use super::finish::{Ending, Raised};
use super::logs::ProcessLogs;
use super::program::ProgramSpan;
use super::resource::ProcessFacts;
use super::traces::Trace;
use super::values::Values;
use crate::catalogue::{Role, SpanRef};
use crate::kernel::event::{FieldValue, Value};
use crate::units::{BootNanos, ProbeId, Tid, UserAddr};

/// Events of one span, and links of one span; more are dropped and counted. OpenTelemetry's default limits.
const MAX_EVENTS: usize = 128;
const MAX_LINKS: usize = 128;
/// Threads of one process of which it is known for which command they were started.
const MAX_STARTED: usize = 4096;

/// A process.
#[derive(Debug)]
pub(super) struct Process {
    pub(super) facts: ProcessFacts,
    pub(super) resource: Arc<Resource>,
    /// The trace of spans that have no other.
    pub(super) trace: Arc<Trace>,
    /// The parent of spans that have no other in the process: the span that was open in the thread that forked the
    /// process, or the one that the environment names.
    pub(super) inherited: Option<SpanId>,
    /// Threads with open calls; the innermost call is last.
    pub(super) threads: HashMap<Tid, Vec<Frame>>,
    /// Open spans that do not end with the call that began them, in the order in which they began.
    pub(super) loose: Vec<Loose>,
    /// Spans of calls that have ended and wait for the call around them.
    pub(super) waiting: Vec<Waiting>,
    /// Open command spans, in the order in which they began.
    pub(super) commands: Vec<(Tid, SpanId)>,
    /// The open command for which a thread was started.
    pub(super) started_for: HashMap<Tid, SpanId>,
    /// Open calls of all threads.
    pub(super) open: usize,
    /// Its log records.
    pub(super) logs: ProcessLogs,
    /// The span that the process itself is.
    pub(super) program: Option<ProgramSpan>,
    /// The same two, as the process that started it has them.
    pub(super) lineage: Option<(Arc<Trace>, Option<SpanId>)>,
    /// Whether it has begun a span: from then on its trace is not what its environment says, but what its spans say.
    pub(super) started: bool,
}

/// An open call of an armed function, or a span that another function of the thread will end.
#[derive(Debug)]
pub(super) struct Frame {
    /// When it began; identifies the call.
    pub(super) call: BootNanos,
    /// Armed calls that were open in the thread.
    pub(super) depth: u32,
    pub(super) probe: ProbeId,
    /// The span, where its call is one.
    pub(super) span: Option<OpenSpan>,
    /// The span outlives the call that began it.
    pub(super) pair: bool,
    /// What was captured of a call that is no span itself.
    pub(super) values: Values,
    /// The exception that came in as an argument.
    pub(super) raised: Raised,
    /// The first argument.
    pub(super) object: UserAddr,
    /// Part of the same call around it: of an override that calls the method it overrides.
    pub(super) inner: bool,
    /// The loose span that the call began.
    pub(super) began: Option<SpanId>,
    /// The span whose log records are written during the call.
    pub(super) logs_of: Option<(Arc<Trace>, SpanId)>,
}

/// An open span that does not end with the call that began it.
#[derive(Debug)]
pub(super) struct Loose {
    pub(super) handle: Handle,
    /// The call in which it began: a `with` block is over when that is.
    pub(super) within: Option<(Tid, BootNanos)>,
    pub(super) span: OpenSpan,
}

/// A span that has ended in a call that may still tell something of it.
#[derive(Debug)]
pub(super) struct Waiting {
    /// That call.
    pub(super) call: (Tid, BootNanos),
    pub(super) span: OpenSpan,
    /// When and how it ended.
    pub(super) time: BootNanos,
    pub(super) ending: Ending,
}

/// By what the end of a span finds it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Handle {
    /// The context manager.
    Object(UserAddr),
    /// Its key.
    Key(SpanRef, String),
    /// The thread.
    Thread(SpanRef, Tid),
}

/// A span that has not ended.
#[derive(Debug)]
#[expect(clippy::struct_excessive_bools, reason = "each one is a fact of its own")]
pub(super) struct OpenSpan {
    pub(super) id: SpanId,
    pub(super) trace: Arc<Trace>,
    pub(super) rule: SpanRef,
    /// The thread that began it.
    pub(super) tid: Tid,
    /// Spans that began later have greater numbers.
    pub(super) number: u64,
    pub(super) parent: Option<SpanId>,
    /// The parent is in another process.
    pub(super) remote: bool,
    pub(super) began: BootNanos,
    pub(super) start: SystemTime,
    pub(super) values: Values,
    pub(super) key: Option<String>,
    pub(super) events: Vec<Event>,
    pub(super) dropped_events: u32,
    pub(super) links: Vec<Link>,
    pub(super) dropped_links: u32,
    /// The type of an exception that a rule told of it.
    pub(super) exception: Option<String>,
    /// The error that a rule told of it.
    pub(super) error: Option<String>,
    pub(super) role: Role,
    /// The program exports it itself.
    pub(super) external: bool,
    /// Inside another node.
    pub(super) nested: bool,
    pub(super) recursion: bool,
    /// Nodes that ended under this command, and those of them that failed.
    pub(super) nodes: [u32; 2],
}

impl OpenSpan {
    pub(super) fn add_event(&mut self, event: Event) {
        if self.events.len() < MAX_EVENTS { self.events.push(event) } else { self.dropped_events += 1 }
    }

    pub(super) fn add_link(&mut self, (trace, span): (TraceId, SpanId)) {
        if span == self.id || self.links.iter().any(|link| link.span_context.span_id() == span) {
            return;
        }
        if self.links.len() < MAX_LINKS {
            let context = SpanContext::new(trace, span, TraceFlags::SAMPLED, false, TraceState::default());
            self.links.push(Link::new(context, Vec::new(), 0));
        } else {
            self.dropped_links += 1;
        }
    }

    /// Whether it is called so, or has this key.
    fn is(&self, rule: SpanRef, key: Option<&str>, tid: Tid) -> bool {
        self.rule == rule
            && match key {
                Some(key) => self.key.as_deref() == Some(key),
                None => self.tid == tid,
            }
    }
}

impl Process {
    pub(super) fn new(facts: ProcessFacts, trace: Arc<Trace>) -> Self {
        Self {
            resource: Arc::new(facts.resource()),
            facts,
            trace,
            inherited: None,
            program: None,
            lineage: None,
            threads: HashMap::default(),
            loose: Vec::new(),
            waiting: Vec::new(),
            commands: Vec::new(),
            started_for: HashMap::default(),
            open: 0,
            logs: ProcessLogs::default(),
            started: false,
        }
    }

    /// Takes in what captured fields say of the whole process. Spans that end later have the new resource.
    pub(super) fn learn(&mut self, names: &[Key], fields: &[FieldValue]) {
        let mut learned = false;
        for FieldValue { field, value, .. } in fields {
            if let (Some(name), Value::Str { text, .. }) = (names.get(usize::from(*field)), value) {
                learned |= self.facts.learn(name.as_str(), text);
            }
        }
        if learned {
            self.resource = Arc::new(self.facts.resource());
        }
    }

    /// The span that something which happens now in this thread belongs to, and whether it is in another process: the
    /// innermost open span of the thread, else the innermost open command that the thread may work for, else that of the program, else
    /// the span that was open in the thread that forked the process.
    pub(super) fn context(&self, tid: Tid) -> Option<(SpanId, bool)> {
        self.innermost(tid, |span| span.role != Role::Leaf)
            .or_else(|| self.command(tid))
            .or_else(|| self.program.as_ref().map(|program| program.id))
            .map(|id| (id, false))
            .or_else(|| self.inherited.map(|id| (id, true)))
    }

    /// The same with its trace.
    pub(super) fn place(&self, tid: Tid) -> (Arc<Trace>, Option<SpanId>, bool) {
        let context = self.context(tid);
        let own = context.filter(|(_, remote)| !remote).and_then(|(id, _)| self.spans().find(|span| span.id == id));
        let trace = own.map_or(&self.trace, |span| &span.trace);
        (Arc::clone(trace), context.map(|(id, _)| id), context.is_some_and(|(_, remote)| remote))
    }

    /// The innermost open span of the thread for which this holds.
    pub(super) fn innermost(&self, tid: Tid, is: impl Fn(&OpenSpan) -> bool) -> Option<SpanId> {
        let called = self.frames(tid).iter().rev().filter_map(|frame| frame.span.as_ref()).find(|span| is(span));
        let loose = self.loose.iter().rev().map(|loose| &loose.span).find(|span| span.tid == tid && is(span));
        called.into_iter().chain(loose).max_by_key(|span| span.number).map(|span| span.id)
    }

    /// The open command span that something in this thread belongs to: the thread's own, else the innermost of those in the
    /// command that the thread was started for, else the process's innermost.
    pub(super) fn command(&self, tid: Tid) -> Option<SpanId> {
        let own = self.commands.iter().rfind(|(owner, _)| *owner == tid);
        let around = self.started_for.get(&tid);
        let within = || self.commands.iter().rfind(|(_, id)| around.is_none_or(|around| self.is_within(*id, *around)));
        own.or_else(within).map(|(_, id)| *id)
    }

    /// Whether this open span is of the thread, or of what the thread was started for.
    pub(super) fn is_around(&self, tid: Tid, span: SpanId) -> bool {
        let own = self.spans().any(|open| open.id == span && open.tid == tid);
        own || self.started_for.get(&tid).is_some_and(|around| self.is_within(span, *around))
    }

    /// Whether an open span is this one, or below it.
    fn is_within(&self, span: SpanId, around: SpanId) -> bool {
        let mut at = Some(span);
        // Parents are older than their children, so this ends.
        while let Some(id) = at.filter(|id| *id != around) {
            at = self.spans().find(|span| span.id == id).and_then(|span| span.parent);
        }
        at.is_some()
    }

    /// A thread starts another one.
    pub(super) fn thread_started(&mut self, tid: Tid, child: Tid) {
        match self.command(tid) {
            Some(command) if self.started_for.len() < MAX_STARTED => self.started_for.insert(child, command),
            _ => self.started_for.remove(&child),
        };
    }

    /// The open span that is called so: with this key, or without one the innermost of the thread, else one that waits there.
    pub(super) fn find(&self, rule: SpanRef, key: Option<&str>, tid: Tid) -> Option<SpanId> {
        if key.is_none() {
            let waiting =
                || self.waiting.iter().rev().map(|waiting| &waiting.span).find(|span| span.is(rule, key, tid));
            return self.innermost(tid, |span| span.is(rule, key, tid)).or_else(|| waiting().map(|span| span.id));
        }
        // Another run in the process may have the same key.
        let here = self.place(tid).0.number();
        let found = self.spans().filter(|span| span.is(rule, key, tid));
        found.max_by_key(|span| (span.trace.number() == here, span.number)).map(|span| span.id)
    }

    /// All open spans.
    pub(super) fn spans(&self) -> impl Iterator<Item = &OpenSpan> {
        let called = self.threads.values().flatten().filter_map(|frame| frame.span.as_ref());
        called.chain(self.loose.iter().map(|loose| &loose.span))
    }

    /// A span that is open or waits.
    pub(super) fn span(&mut self, id: SpanId) -> Option<&mut OpenSpan> {
        let called = self.threads.values_mut().flatten().filter_map(|frame| frame.span.as_mut());
        let loose = self.loose.iter_mut().map(|loose| &mut loose.span);
        let waiting = self.waiting.iter_mut().map(|waiting| &mut waiting.span);
        called.chain(loose).chain(waiting).find(|span| span.id == id)
    }

    /// The values of an attribute that the spans around one have; the nearest that has it counts.
    pub(super) fn inherit(&self, parent: Option<SpanId>, name: &str) -> Option<opentelemetry::Value> {
        let mut parent = parent;
        // Parents are older than their children, so this ends.
        while let Some(id) = parent {
            let span = self.spans().find(|span| span.id == id)?;
            if let Some(value) = span.values.get(name) {
                return Some(value.clone());
            }
            parent = span.parent;
        }
        None
    }

    fn began(&mut self, span: &OpenSpan) {
        self.started = true;
        if span.role == Role::Command {
            self.commands.push((span.tid, span.id));
        }
    }

    fn ended(&mut self, span: &OpenSpan) {
        if span.role == Role::Command {
            self.commands.retain(|(_, id)| *id != span.id);
            self.started_for.retain(|_, id| *id != span.id);
        }
    }

    pub(super) fn push(&mut self, tid: Tid, frame: Frame) {
        if let Some(span) = &frame.span {
            self.began(span);
        }
        self.open += 1;
        self.threads.entry(tid).or_default().push(frame);
    }

    pub(super) fn push_loose(&mut self, loose: Loose) {
        self.began(&loose.span);
        self.loose.push(loose);
    }

    /// Takes a frame out of a thread's stack.
    pub(super) fn remove(&mut self, tid: Tid, index: usize) -> Option<Frame> {
        let frames = self.threads.get_mut(&tid)?;
        if index >= frames.len() {
            return None;
        }
        let frame = frames.remove(index);
        if frames.is_empty() {
            self.threads.remove(&tid);
        }
        self.open -= 1;
        if let Some(span) = &frame.span {
            self.ended(span);
        }
        Some(frame)
    }

    /// Takes an open span out, wherever it is. The call that it is goes on without it.
    pub(super) fn take(&mut self, id: SpanId) -> Option<OpenSpan> {
        let span = if let Some(at) = self.loose.iter().position(|loose| loose.span.id == id) {
            self.loose.remove(at).span
        } else {
            let is = |frame: &Frame| frame.span.as_ref().is_some_and(|span| span.id == id);
            let (tid, at) =
                self.threads.iter().find_map(|(tid, frames)| frames.iter().position(is).map(|at| (*tid, at)))?;
            if self.frames(tid)[at].pair {
                self.remove(tid, at)?.span?
            } else {
                self.threads.get_mut(&tid)?[at].span.take()?
            }
        };
        self.ended(&span);
        Some(span)
    }

    pub(super) fn frames(&self, tid: Tid) -> &[Frame] {
        self.threads.get(&tid).map_or(&[], Vec::as_slice)
    }
}
