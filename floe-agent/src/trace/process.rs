//! What the assembler keeps of a process: the open calls of its threads.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::SystemTime;

use opentelemetry::trace::{SpanId, TraceId};
use opentelemetry::{Key, KeyValue};
use opentelemetry_sdk::Resource;

use super::resource::ProcessFacts;
use crate::catalogue::Role;
use crate::kernel::event::{FieldValue, Value};
use crate::units::{BootNanos, ProbeId, Tid};

/// A trace, shared by the processes that belong to it.
#[derive(Debug)]
pub(super) struct Trace {
    pub(super) id: TraceId,
    lost: AtomicU64,
}

impl Trace {
    pub(super) fn new(id: TraceId) -> Arc<Self> {
        Arc::new(Self { id, lost: AtomicU64::new(0) })
    }

    /// Events that were lost in it so far.
    pub(super) fn lost(&self) -> u64 {
        self.lost.load(Ordering::Relaxed)
    }

    pub(super) fn lose(&self, events: u64) {
        self.lost.fetch_add(events, Ordering::Relaxed);
    }
}

/// A process.
#[derive(Debug)]
pub(super) struct Process {
    pub(super) facts: ProcessFacts,
    pub(super) resource: Arc<Resource>,
    pub(super) trace: Arc<Trace>,
    /// The span that was open in the thread that forked the process.
    pub(super) inherited: Option<SpanId>,
    /// Threads with open calls; the innermost call is last.
    pub(super) threads: HashMap<Tid, Vec<Frame>>,
    /// Open command spans, in the order in which they began.
    pub(super) commands: Vec<(Tid, SpanId)>,
    /// Open calls of all threads.
    pub(super) open: usize,
    /// Whether it has begun a span: from then on its trace is fixed.
    pub(super) started: bool,
}

/// An open call of an armed function, or a span that another function will end.
#[derive(Debug)]
pub(super) struct Frame {
    /// When it began; identifies the call.
    pub(super) call: BootNanos,
    /// Armed calls that were open in the thread.
    pub(super) depth: u32,
    pub(super) probe: ProbeId,
    /// The span; events and ends of pairs have none.
    pub(super) span: Option<OpenSpan>,
    /// The span outlives the call that began it.
    pub(super) pair: bool,
}

/// A span that has not ended.
#[derive(Debug)]
pub(super) struct OpenSpan {
    pub(super) id: SpanId,
    pub(super) parent: Option<SpanId>,
    /// The parent is in another process.
    pub(super) remote: bool,
    pub(super) began: BootNanos,
    pub(super) start: SystemTime,
    pub(super) attributes: Vec<KeyValue>,
    /// Attributes whose text was cut.
    pub(super) cut: Vec<Key>,
    pub(super) role: Role,
    /// Inside another node.
    pub(super) nested: bool,
    pub(super) recursion: bool,
    /// Nodes that ended under this command, and those of them that failed.
    pub(super) nodes: [u32; 2],
}

impl Process {
    pub(super) fn new(facts: ProcessFacts, trace: Arc<Trace>) -> Self {
        Self {
            resource: Arc::new(facts.resource()),
            facts,
            trace,
            inherited: None,
            threads: HashMap::new(),
            commands: Vec::new(),
            open: 0,
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
    /// innermost open span of the thread, else the process's innermost open command, else the span that was open in
    /// the thread that forked the process.
    pub(super) fn context(&self, tid: Tid) -> Option<(SpanId, bool)> {
        let own = self.threads.get(&tid).and_then(|frames| frames.iter().rev().find_map(|frame| frame.span.as_ref()));
        own.map(|span| (span.id, false))
            .or_else(|| self.commands.last().map(|(_, id)| (*id, false)))
            .or_else(|| self.inherited.map(|id| (id, true)))
    }

    /// The open command span that something in this thread belongs to: the thread's own, else the process's innermost.
    pub(super) fn command(&mut self, tid: Tid) -> Option<&mut OpenSpan> {
        let own = self.commands.iter().rposition(|(owner, _)| *owner == tid);
        let (owner, id) = *self.commands.get(own.unwrap_or(self.commands.len().checked_sub(1)?))?;
        let frames = self.threads.get_mut(&owner)?;
        frames.iter_mut().filter_map(|frame| frame.span.as_mut()).find(|span| span.id == id)
    }

    pub(super) fn push(&mut self, tid: Tid, frame: Frame) {
        if let Some(span) = &frame.span {
            self.started = true;
            if span.role == Role::Command {
                self.commands.push((tid, span.id));
            }
        }
        self.open += 1;
        self.threads.entry(tid).or_default().push(frame);
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
        if let Some(span) = &frame.span
            && span.role == Role::Command
        {
            self.commands.retain(|(_, id)| *id != span.id);
        }
        Some(frame)
    }

    pub(super) fn frames(&self, tid: Tid) -> &[Frame] {
        self.threads.get(&tid).map_or(&[], Vec::as_slice)
    }
}
