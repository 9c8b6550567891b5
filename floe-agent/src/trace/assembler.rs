//! The assembler: events in, finished spans out.

use std::collections::VecDeque;
use std::sync::Arc;

use foldhash::{HashMap, HashSet};
use opentelemetry::{InstrumentationScope, StringValue};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::trace::{IdGenerator, RandomIdGenerator, SpanData};
use opentelemetry_semantic_conventions::SCHEMA_URL;

use super::calls::{Enter, Leave};
use super::clock::Clock;
use super::finish::{Ending, ProcessEnd};
use super::keys::Keys;
use super::log::FinishedLog;
use super::logs::{LogSettings, LogStats};
use super::process::{Handle, Process};
use super::resource::{ProcessFacts, ResourceDefaults};
use super::traces::{Hold, Trace, TraceStats, Traces};
use crate::catalogue::{Catalogue, Moment};
use crate::kernel::event::{Event, Stamp};
use crate::python::exception::ExceptionFacts;
use crate::units::{BootNanos, Epoch, Pid, Tid};

const THREAD_ENDED: &str = "thread ended";
const PROCESS_EXITED: &str = "process exited";
const PROCESS_CALLED_EXEC: &str = "process called exec";
const PROCESS_REPLACED: &str = "process ended unseen";
const TRACING_ENDED: &str = "tracing ended";
const TRACING_PAUSED: &str = "tracing paused";

/// Ended processes that are remembered, so that late events of them are not taken for new processes.
const REMEMBERED: usize = 4096;
/// Exceptions that wait for the end of their call.
const EXCEPTIONS: usize = 1024;

/// A finished span and the process it happened in.
#[derive(Clone, Debug)]
pub struct FinishedSpan {
    /// The process.
    pub resource: Arc<Resource>,
    /// The span.
    pub span: SpanData,
    /// What the sampled flag of the context says that was given to the process from outside, if there was one.
    pub sampled: Option<bool>,
}

/// Bounds of what the assembler keeps. What goes beyond is dropped and counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Open calls of one process.
    pub open_calls: usize,
    /// Open spans of one process that do not end with the call that began them. The oldest is ended for a new one.
    pub loose_spans: usize,
    /// Threads of one process that have open calls.
    pub threads: usize,
    /// Processes.
    pub processes: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self { open_calls: 8192, loose_spans: 1024, threads: 2048, processes: 65536 }
    }
}

/// What the assembler counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct AssemblerStats {
    /// Spans that ended.
    pub spans: u64,
    /// Of these, spans whose end was not seen.
    pub incomplete: u64,
    /// Events that were lost before they could be read.
    pub lost_events: u64,
    /// Returns without a call: it was lost, dropped, or began before tracing.
    pub unmatched_returns: u64,
    /// Calls that were dropped because of [`Limits`].
    pub dropped_calls: u64,
    /// Events of a process that had already ended.
    pub stale_events: u64,
    /// Events of a probe that is not in the catalogue.
    pub unknown_probes: u64,
    /// What was told of a span that was not open.
    pub orphan_events: u64,
}

/// Makes spans from events.
///
/// Events of one thread must come in their order; events of a child process after the fork that made it. Ids of address
/// spaces are never used twice.
#[derive(Debug)]
pub struct Assembler {
    core: Core,
    processes: HashMap<(Pid, Epoch), Process>,
    /// The address space that a process has now, as its events say.
    current: HashMap<Pid, Epoch>,
    ended: HashSet<(Pid, Epoch)>,
    ended_order: VecDeque<(Pid, Epoch)>,
    /// Exceptions whose calls have not ended yet, as far as is known here; the newest is last.
    exceptions: VecDeque<((Pid, Epoch, Tid, BootNanos), ExceptionFacts)>,
    limits: Limits,
}

/// What is needed to begin and end spans, apart from the processes.
#[derive(Debug)]
pub(super) struct Core {
    pub(super) catalogue: Arc<Catalogue>,
    /// `code.function.name` of each probe.
    pub(super) functions: Vec<StringValue>,
    pub(super) clock: Clock,
    pub(super) ids: Box<dyn IdGenerator>,
    /// Spans that began, by their keys.
    pub(super) keys: Keys,
    /// The number of the last span that began.
    pub(super) number: u64,
    pub(super) scope: InstrumentationScope,
    pub(super) limits: Limits,
    pub(super) traces: Traces,
    /// Spans are made of what a program exports itself, too.
    pub(super) double: bool,
    pub(super) logs: LogSettings,
    pub(super) log_stats: LogStats,
    pub(super) stats: AssemblerStats,
    defaults: Arc<ResourceDefaults>,
}

impl Assembler {
    /// An assembler for the events of these probes.
    pub fn new(catalogue: Arc<Catalogue>, clock: Clock) -> Self {
        let functions = catalogue
            .probes()
            .iter()
            .map(|probe| Arc::<str>::from(format!("{}.{}", probe.target.module, probe.target.qualname)).into())
            .collect();
        let scope = InstrumentationScope::builder("floe-agent")
            .with_version(env!("CARGO_PKG_VERSION"))
            .with_schema_url(SCHEMA_URL)
            .build();
        Self {
            core: Core {
                catalogue,
                functions,
                clock,
                ids: Box::new(RandomIdGenerator::default()),
                keys: Keys::default(),
                number: 0,
                scope,
                limits: Limits::default(),
                defaults: Arc::default(),
                traces: Traces::default(),
                double: false,
                logs: LogSettings::default(),
                log_stats: LogStats::default(),
                stats: AssemblerStats::default(),
            },
            processes: HashMap::default(),
            current: HashMap::default(),
            ended: HashSet::default(),
            ended_order: VecDeque::new(),
            exceptions: VecDeque::new(),
            limits: Limits::default(),
        }
    }

    /// With other bounds.
    #[must_use]
    pub fn with_limits(mut self, limits: Limits) -> Self {
        self.limits = limits;
        self.core.limits = limits;
        self
    }

    /// With what the configuration says of resources.
    #[must_use]
    pub fn with_defaults(mut self, defaults: ResourceDefaults) -> Self {
        self.core.defaults = Arc::new(defaults);
        self
    }

    /// With other ids than random ones.
    #[must_use]
    pub fn with_ids(mut self, ids: Box<dyn IdGenerator>) -> Self {
        self.core.ids = ids;
        self
    }

    /// Spans wait for their trace to be known. Without this, none does.
    #[must_use]
    pub fn with_hold(mut self, hold: Hold) -> Self {
        self.core.traces.hold = hold;
        self
    }

    /// Spans are made even where `TRACEPARENT` asks for none.
    #[must_use]
    pub fn keep_unsampled(mut self, keep: bool) -> Self {
        self.core.traces.keep_unsampled = keep;
        self
    }

    /// Spans are made of what a program exports itself, too.
    #[must_use]
    pub fn double_own_spans(mut self, double: bool) -> Self {
        self.core.double = double;
        self
    }

    /// Which log records are taken.
    #[must_use]
    pub fn with_logs(mut self, settings: LogSettings) -> Self {
        self.core.logs = settings;
        self
    }

    /// Takes the log records that were written since the last call.
    pub fn drain_logs(&mut self) -> Vec<FinishedLog> {
        self.core.traces.take_ready_logs()
    }

    /// What became of log records.
    pub fn log_stats(&self) -> LogStats {
        self.core.log_stats
    }

    /// Says what time it is: spans that wait do not wait for ever.
    pub fn tick(&mut self, now: BootNanos) {
        self.core.traces.tick(now);
    }

    /// What became of spans that waited for their trace.
    pub fn trace_stats(&self) -> TraceStats {
        self.core.traces.stats
    }

    /// Takes a new reading of the clocks. Spans that are open keep their start and their true duration.
    pub fn set_clock(&mut self, clock: Clock) {
        self.core.clock = clock;
    }

    /// What was counted so far.
    pub fn stats(&self) -> AssemblerStats {
        self.core.stats
    }

    /// Spans that have not ended.
    pub fn open_spans(&self) -> usize {
        self.processes.values().map(|process| process.spans().count()).sum()
    }

    /// Takes the spans that have ended since the last call.
    pub fn drain(&mut self) -> Vec<FinishedSpan> {
        self.core.traces.take_ready()
    }

    /// Says what a process is. May come before or after its first events; spans that end later have the new resource.
    pub fn process_seen(&mut self, mut facts: ProcessFacts) {
        let key = (facts.pid, facts.epoch);
        facts.defaults = Arc::clone(&self.core.defaults);
        if self.ended.contains(&key) {
            return;
        }
        if let Some(process) = self.processes.get_mut(&key) {
            facts.descends_from(&process.facts);
            process.resource = Arc::new(facts.resource());
            process.facts = facts;
            self.core.settle_home(process);
            self.core.begin_program(process);
        } else if self.processes.len() < self.limits.processes {
            let mut process = Process::new(facts, self.core.new_trace());
            self.core.settle_home(&mut process);
            self.core.begin_program(&mut process);
            self.processes.insert(key, process);
        }
    }

    /// Says what an exception is that leaves a call, or that comes into it as an argument. Must come before the event that the
    /// call has ended; may come before the one that it began. The last word counts.
    pub fn exception(&mut self, pid: Pid, epoch: Epoch, tid: Tid, call: BootNanos, exception: ExceptionFacts) {
        if self.exceptions.len() >= EXCEPTIONS {
            self.exceptions.pop_front(); // its call's end was lost
        }
        self.exceptions.push_back(((pid, epoch, tid, call), exception));
    }

    /// Takes the exception of a call.
    fn exception_of(&mut self, stamp: &Stamp, call: BootNanos) -> Option<ExceptionFacts> {
        let key = (stamp.pid, stamp.epoch, stamp.tid, call);
        let mut last = None;
        while let Some(at) = self.exceptions.iter().position(|(known, _)| *known == key) {
            last = self.exceptions.remove(at).map(|(_, exception)| exception);
        }
        last
    }

    /// Takes an event.
    pub fn handle(&mut self, event: Event) {
        match event {
            Event::Enter { stamp, probe, depth, recursion, object, fields } => {
                if let Some((core, process)) = self.process(&stamp) {
                    process.learn(core.catalogue.fields(probe, Moment::Enter), &fields);
                    core.enter(process, &stamp, Enter { probe, depth, recursion, object, fields });
                }
            }
            Event::Return { stamp, call, probe, outcome, object, fields } => {
                let exception = self.exception_of(&stamp, call);
                if let Some((core, process)) = self.process(&stamp) {
                    process.learn(core.catalogue.fields(probe, Moment::Exit), &fields);
                    core.leave(process, &stamp, Leave { call, probe, outcome, object, exception, fields });
                }
            }
            Event::Fork { stamp, child, child_epoch } => self.fork(&stamp, child, child_epoch),
            Event::Thread { stamp, child } => {
                if let Some(process) = self.processes.get_mut(&(stamp.pid, stamp.epoch)) {
                    process.thread_started(stamp.tid, child);
                }
            }
            Event::Exec { stamp } => self.exec(&stamp),
            Event::Exit { stamp, process_ended, code } => self.exit(&stamp, process_ended, code),
        }
    }

    /// Ends everything that is open: tracing ends.
    pub fn end_of_input(&mut self, now: BootNanos) {
        let mut keys: Vec<_> = self.processes.keys().copied().collect();
        keys.sort_unstable();
        for key in keys {
            self.end_process(key, now, &Ending::incomplete(TRACING_ENDED));
        }
        self.core.traces.end();
    }

    /// Ends all spans that are open, while their processes go on: tracing is paused.
    pub fn interrupt(&mut self, now: BootNanos) {
        let ending = Ending::incomplete(TRACING_PAUSED);
        for process in self.processes.values_mut() {
            // Threads with commands last: commands count what ended under them.
            let mut threads: Vec<Tid> = process.threads.keys().copied().collect();
            threads.sort_unstable_by_key(|tid| (process.commands.iter().position(|(owner, _)| owner == tid), *tid));
            for tid in threads {
                self.core.close_above(process, tid, 0, now, &ending);
            }
        }
    }

    /// The process of an event; makes it known if it is not.
    fn process(&mut self, stamp: &Stamp) -> Option<(&mut Core, &mut Process)> {
        let key = (stamp.pid, stamp.epoch);
        if self.ended.contains(&key) {
            self.core.stats.stale_events += 1;
            return None;
        }
        if let Some(old) = self.current.insert(stamp.pid, stamp.epoch)
            && old != stamp.epoch
        {
            // Its end was lost: whatever has this pid now is another process.
            self.end_process((stamp.pid, old), stamp.time, &Ending::incomplete(PROCESS_REPLACED));
            self.current.insert(stamp.pid, stamp.epoch);
        }
        if !self.processes.contains_key(&key) {
            if self.processes.len() >= self.limits.processes {
                self.core.stats.dropped_calls += 1;
                return None;
            }
            let trace = self.core.new_trace();
            let mut facts = ProcessFacts::unknown(key.0, key.1);
            facts.defaults = Arc::clone(&self.core.defaults);
            self.processes.insert(key, Process::new(facts, trace));
        }
        let process = self.processes.get_mut(&key)?;
        if stamp.lost > 0 {
            process.trace.lose(stamp.lost.into());
            self.core.stats.lost_events += u64::from(stamp.lost);
        }
        Some((&mut self.core, process))
    }

    fn fork(&mut self, stamp: &Stamp, child: Pid, child_epoch: Epoch) {
        let Some((core, parent)) = self.process(stamp) else {
            return;
        };
        let lineage = match parent.place(stamp.tid) {
            (trace, Some(span), _) => (trace, Some(span)),
            (trace, None, _) => (trace.below(core.ids.new_trace_id()), None),
        };
        let facts = parent.facts.forked(child, child_epoch);
        self.begin_process(stamp, (child, child_epoch), Some(facts), Some(lineage));
    }

    fn exec(&mut self, stamp: &Stamp) {
        let before = self.current.get(&stamp.pid).map(|epoch| (stamp.pid, *epoch));
        let facts = before.and_then(|key| Some(self.processes.get(&key)?.facts.clone()));
        let lineage = before.filter(|key| key.1 != stamp.epoch).and_then(|key| {
            let process = self.processes.get(&key)?;
            let (trace, span, _) = process.place(stamp.tid);
            let lineage = (trace, span);
            self.end_process(key, stamp.time, &Ending::incomplete(PROCESS_CALLED_EXEC));
            Some(lineage)
        });
        self.begin_process(stamp, (stamp.pid, stamp.epoch), None, lineage);
        if let (Some(before), Some(process)) = (facts, self.processes.get_mut(&(stamp.pid, stamp.epoch))) {
            process.facts.descends_from(&before);
            process.resource = Arc::new(process.facts.resource());
        }
    }

    /// A process begins by fork or exec. It may already be known: facts and events come on different ways.
    fn begin_process(
        &mut self,
        stamp: &Stamp,
        key: (Pid, Epoch),
        facts: Option<ProcessFacts>,
        lineage: Option<(Arc<Trace>, Option<opentelemetry::trace::SpanId>)>,
    ) {
        let known = self.processes.contains_key(&key);
        let stamp = Stamp { pid: key.0, epoch: key.1, lost: 0, ..*stamp };
        let Some((core, process)) = self.process(&stamp) else {
            return;
        };
        if let (false, Some(facts)) = (known, facts) {
            process.resource = Arc::new(facts.resource());
            process.facts = facts;
        }
        if lineage.is_some() {
            process.lineage = lineage;
        }
        core.settle_home(process);
    }

    fn exit(&mut self, stamp: &Stamp, process_ended: bool, code: u32) {
        let key = (stamp.pid, stamp.epoch);
        if !self.processes.contains_key(&key) {
            return;
        }
        let Some((core, process)) = self.process(stamp) else {
            return;
        };
        let end = ProcessEnd::from_wait(code);
        // Neither a signal nor an exit code ends one thread alone: the others are about to end too.
        if process_ended || code != 0 {
            let ending = Ending::Incomplete { reason: PROCESS_EXITED, process: Some(end) };
            core.close_above(process, stamp.tid, 0, stamp.time, &ending);
            if process_ended {
                self.end_process(key, stamp.time, &ending);
            }
        } else {
            let ending = Ending::incomplete(THREAD_ENDED);
            core.close_above(process, stamp.tid, 0, stamp.time, &ending);
            core.close_loose(process, stamp.time, &ending, |loose| {
                loose.span.tid == stamp.tid && !matches!(loose.handle, Handle::Key(..))
            });
        }
    }

    fn end_process(&mut self, key: (Pid, Epoch), time: BootNanos, ending: &Ending) {
        let Some(mut process) = self.processes.remove(&key) else {
            return;
        };
        // Threads with commands last: commands count what ended under them.
        let mut threads: Vec<Tid> = process.threads.keys().copied().collect();
        threads.sort_unstable_by_key(|tid| (process.commands.iter().position(|(owner, _)| owner == tid), *tid));
        let commands = threads.partition_point(|tid| process.commands.iter().all(|(owner, _)| owner != tid));
        for tid in &threads[..commands] {
            self.core.close_above(&mut process, *tid, 0, time, ending);
        }
        self.core.close_loose(&mut process, time, ending, |_| true);
        for tid in &threads[commands..] {
            self.core.close_above(&mut process, *tid, 0, time, ending);
        }
        self.core.end_program(&mut process, time, ending);
        if self.current.get(&key.0) == Some(&key.1) {
            self.current.remove(&key.0);
        }
        if self.ended_order.len() >= REMEMBERED
            && let Some(oldest) = self.ended_order.pop_front()
        {
            self.ended.remove(&oldest);
        }
        self.ended.insert(key);
        self.ended_order.push_back(key);
    }
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;

#[cfg(test)]
#[path = "rules_tests.rs"]
mod rules_tests;

#[cfg(test)]
#[path = "home_tests.rs"]
mod home_tests;
