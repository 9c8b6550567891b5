//! What the agent tells of itself: metrics in the OpenMetrics text format, and whether it works.

use std::{
    fmt,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
        mpsc,
    },
    time::Duration,
};

use floe_ebpf::Counter;
use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric as _, MetricEncoder, NoLabelSet, text::encode},
    metrics::{MetricType, counter::ConstCounter, gauge::ConstGauge},
    registry::{Registry, Unit},
};

use super::{kubernetes::KnownPods, usage::ProcessUsage};
use crate::{
    attach::{AnswerTimes, Request, Snapshot},
    export::{Counted, Tallies},
    kernel::{Counters, EventReader},
    trace::{Assembler, AssemblerStats},
    units::boot_now,
};

/// How long the attach thread has for an answer. It answers processes first, the longest of which wait half a second.
const PATIENCE: Duration = Duration::from_secs(2);
/// The event thread looks at its ring buffer every few milliseconds. Without a sign of it for so long it hangs.
const EVENTS_PATIENCE: Duration = Duration::from_secs(10);

/// What the thread that makes spans says of itself.
#[derive(Debug, Default)]
pub struct EventState {
    stats: Mutex<AssemblerStats>,
    undecodable: AtomicU64,
    /// When it last came by, in nanoseconds since boot; 0: not yet.
    seen: AtomicU64,
}

impl EventState {
    /// Said after each round.
    pub fn set(&self, assembler: &Assembler, reader: &EventReader) {
        *self.stats.lock().unwrap_or_else(PoisonError::into_inner) = assembler.stats();
        self.undecodable.store(reader.undecodable, Ordering::Relaxed);
        self.seen.store(boot_now().0, Ordering::Relaxed);
    }

    fn is_alive(&self) -> bool {
        let silent = boot_now().0.saturating_sub(self.seen.load(Ordering::Relaxed));
        u128::from(silent) < EVENTS_PATIENCE.as_nanos()
    }
}

/// A view of a tracing session. It does not keep the session's outputs open, nor does anybody who asks it hold up their end.
#[derive(Clone)]
pub struct Observer {
    /// Requests to the attach thread.
    pub attach: mpsc::Sender<Request>,
    /// Counters of the programs.
    pub counters: Arc<Counters>,
    /// The event thread.
    pub events: Arc<EventState>,
    /// The outputs.
    pub exports: Tallies,
    /// The pods of the node, where the Kubernetes API is read.
    pub pods: Option<Arc<KnownPods>>,
}

/// Why the agent is not healthy or not ready.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trouble {
    /// The attach thread does not answer.
    Attach,
    /// The event thread does not move.
    Events,
    /// The session has ended.
    Ended,
    /// All tracing is paused.
    Paused,
}

impl fmt::Display for Trouble {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Attach => "the thread that answers processes does not answer",
            Self::Events => "the thread that makes spans hangs",
            Self::Ended => "tracing has ended",
            Self::Paused => "tracing is paused by the kill switch",
        })
    }
}

impl Observer {
    /// What the attach thread says; it may take a while, or never come.
    fn snapshot(&self) -> Result<Snapshot, Trouble> {
        let (reply, answer) = mpsc::channel();
        self.attach.send(Request::Snapshot(reply)).map_err(|_| Trouble::Ended)?;
        answer.recv_timeout(PATIENCE).map_err(|_| Trouble::Attach)
    }

    /// Whether the agent's threads work.
    pub fn health(&self) -> Result<Snapshot, Trouble> {
        let snapshot = self.snapshot()?;
        if self.events.is_alive() { Ok(snapshot) } else { Err(Trouble::Events) }
    }

    /// Whether pipelines that start now are traced.
    pub fn readiness(&self) -> Result<(), Trouble> {
        if self.health()?.paused { Err(Trouble::Paused) } else { Ok(()) }
    }

    /// Calls that were recorded or left out, for the budget.
    pub fn calls(&self) -> u64 {
        let wanted = [Counter::Calls, Counter::ShedCalls];
        self.counters.read().into_iter().filter(|(counter, _)| wanted.contains(counter)).map(|(_, n)| n).sum()
    }

    /// All metrics as text.
    pub fn metrics(&self) -> Result<String, Trouble> {
        let sample = Sample {
            snapshot: self.snapshot()?,
            counters: self.counters.read(),
            spans: *self.events.stats.lock().unwrap_or_else(PoisonError::into_inner),
            undecodable: self.events.undecodable.load(Ordering::Relaxed),
            exports: self.exports.now(),
            usage: ProcessUsage::now(),
            pods: self.pods.as_ref().map(|pods| (pods.count(), pods.failures())),
        };
        Ok(sample.text())
    }
}

/// All that metrics are made of, at one moment.
#[derive(Debug, Default)]
struct Sample {
    snapshot: Snapshot,
    counters: Vec<(Counter, u64)>,
    spans: AssemblerStats,
    undecodable: u64,
    /// By output and kind of item.
    exports: Vec<(String, &'static str, Counted)>,
    usage: ProcessUsage,
    /// Pods that are known, and failed requests.
    pods: Option<(u64, u64)>,
}

impl Sample {
    fn text(self) -> String {
        let mut registry = Registry::default();
        registry.register_collector(Box::new(self));
        let mut text = String::new();
        // Writing to a string does not fail.
        let _ = encode(&mut text, &registry);
        text
    }

    fn count(&self, counter: Counter) -> u64 {
        self.counters.iter().find(|(known, _)| *known == counter).map_or(0, |(_, n)| *n)
    }
}

/// Writes metrics one after the other.
struct Writer<'a>(DescriptorEncoder<'a>);

/// Labels and a value.
type Labelled<'a, T> = (Vec<(&'a str, &'a str)>, T);

impl Writer<'_> {
    fn encoder(
        &mut self,
        name: &str,
        help: &str,
        unit: Option<&Unit>,
        kind: MetricType,
        with: impl FnOnce(MetricEncoder<'_>) -> fmt::Result,
    ) -> fmt::Result {
        with(self.0.encode_descriptor(&format!("floe_agent_{name}"), help, unit, kind)?)
    }

    fn counter(&mut self, name: &str, help: &str, value: u64) -> fmt::Result {
        self.encoder(name, help, None, MetricType::Counter, |encoder| ConstCounter::new(value).encode(encoder))
    }

    fn counters(&mut self, name: &str, help: &str, values: Vec<Labelled<'_, u64>>) -> fmt::Result {
        self.encoder(name, help, None, MetricType::Counter, |mut encoder| {
            for (labels, value) in values {
                ConstCounter::new(value).encode(encoder.encode_family(&labels)?)?;
            }
            Ok(())
        })
    }

    fn seconds(&mut self, name: &str, help: &str, value: f64) -> fmt::Result {
        self.encoder(name, help, Some(&Unit::Seconds), MetricType::Counter, |e| ConstCounter::new(value).encode(e))
    }

    fn gauge(&mut self, name: &str, help: &str, value: u64) -> fmt::Result {
        self.encoder(name, help, None, MetricType::Gauge, |e| ConstGauge::new(value.cast_signed()).encode(e))
    }

    fn gauges(&mut self, name: &str, help: &str, values: Vec<Labelled<'_, u64>>) -> fmt::Result {
        self.encoder(name, help, None, MetricType::Gauge, |mut encoder| {
            for (labels, value) in values {
                ConstGauge::new(value.cast_signed()).encode(encoder.encode_family(&labels)?)?;
            }
            Ok(())
        })
    }
}

impl Collector for Sample {
    fn encode(&self, encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let mut w = Writer(encoder);
        let Snapshot { report, processes, functions, interpreters, probes, paused, shedding } = &self.snapshot;
        let verdict = |name: &str| report.verdicts.get(name).copied().unwrap_or_default();

        w.gauges("build_info", "The version of the agent.", vec![(vec![("version", env!("CARGO_PKG_VERSION"))], 1)])?;
        w.gauge("paused", "1 while the kill switch has taken all probes away.", u64::from(*paused))?;
        w.gauge(
            "shedding_level",
            "How much load is shed: 0 none, 1 attributes, 2 and 3 probes of low priority too.",
            u64::from(*shedding),
        )?;

        w.counter("processes_seen", "Python processes that were judged by the rules.", report.processes_seen)?;
        w.counter("processes_traced", "Processes that were traced.", verdict("traced"))?;
        w.counter(
            "processes_stopped",
            "Processes in which tracing stopped, because they switch C stacks.",
            verdict("stopped"),
        )?;
        w.counter("processes_released", "Processes that no rule selected any more.", report.processes_released)?;
        let refused = report.refused.iter().map(|(reason, n)| (vec![("reason", *reason)], *n)).collect();
        w.counters("processes_refused", "Selected processes that are not traced, by reason.", refused)?;
        w.gauge("processes", "Processes with armed functions now.", *processes)?;
        w.gauge("interpreter_files", "Python interpreter files that are probed.", *interpreters)?;
        w.gauge("probes", "Uprobes that are attached.", *probes)?;
        w.gauge("functions", "Functions that are armed now.", *functions)?;
        w.counter("functions_armed", "Functions that were armed.", report.functions_armed)?;

        w.counter(
            "execs",
            "Programs that were started by processes that are not selected.",
            self.count(Counter::Execs),
        )?;
        w.counter("calls", "Watched calls.", self.count(Counter::Calls))?;
        w.counter("returns", "Watched calls whose return was seen.", self.count(Counter::Returns))?;
        w.counter("imports", "Modules that were imported in traced processes.", self.count(Counter::LoaderHits))?;
        w.counter("spans", "Spans that ended.", self.spans.spans)?;
        w.counter("spans_incomplete", "Spans whose end was not seen.", self.spans.incomplete)?;
        let causes = [
            ("buffer_full", self.count(Counter::LostEvents)),
            ("urgent_buffer_full", self.count(Counter::LostUrgent)),
            ("table_full", self.count(Counter::TableFull)),
            ("return_missed", self.count(Counter::MissedReturns)),
            ("undecodable", self.undecodable),
            ("unmatched", self.spans.unmatched_returns),
            ("limit", self.spans.dropped_calls),
            ("late", self.spans.stale_events),
        ];
        let lost = causes.into_iter().map(|(cause, n)| (vec![("cause", cause)], n)).collect();
        w.counters("events_lost", "Events that did not become part of a span, by cause.", lost)?;
        let shed = [("attributes", self.count(Counter::ShedPlans)), ("calls", self.count(Counter::ShedCalls))];
        let shed = shed.into_iter().map(|(what, n)| (vec![("what", what)], n)).collect();
        w.counters("shed", "What was left out to stay within the budget.", shed)?;

        w.counter("waits", "Times a process waited for the agent.", self.count(Counter::Waits))?;
        w.counter("wait_timeouts", "Waits that ran into their bound.", self.count(Counter::WaitTimeouts))?;
        let waited = Duration::from_nanos(self.count(Counter::WaitNanos)).as_secs_f64();
        w.seconds("wait", "Time that processes waited for the agent.", waited)?;
        w.encoder(
            "answer",
            "Time from a process's question to the agent's answer.",
            Some(&Unit::Seconds),
            MetricType::Histogram,
            |mut encoder| {
                let AnswerTimes { counts, sum_us } = &report.answers;
                let bounds = AnswerTimes::BOUNDS.iter().map(|&us| us as f64 / 1e6).chain([f64::INFINITY]);
                let buckets: Vec<_> = bounds.zip(counts.iter().copied()).collect();
                let sum = Duration::from_micros(*sum_us).as_secs_f64();
                encoder.encode_histogram::<NoLabelSet>(sum, counts.iter().sum(), &buckets, None)
            },
        )?;

        let mut results = Vec::new();
        let mut queues = Vec::new();
        for (sink, items, counted) in &self.exports {
            let Counted { sent, failed, dropped, waiting } = *counted;
            for (result, n) in [("sent", sent), ("failed", failed), ("dropped", dropped)] {
                results.push((vec![("sink", sink.as_str()), ("items", *items), ("result", result)], n));
            }
            queues.push((vec![("sink", sink.as_str()), ("items", *items)], waiting));
        }
        let help = "Spans and log records that were handed to an output, by what became of them.";
        w.counters("exported", help, results)?;
        w.gauges("queue", "Spans and log records that wait for an output.", queues)?;

        if let Some((pods, failures)) = self.pods {
            w.gauge("pods", "Pods of this node that are known.", pods)?;
            w.counter("kubernetes_failures", "Requests to the Kubernetes API that failed.", failures)?;
        }

        w.seconds("cpu", "CPU time of the agent.", self.usage.cpu.as_secs_f64())?;
        w.gauge("resident_memory_bytes", "Memory of the agent.", self.usage.memory)?;
        w.gauge("open_fds", "Open file descriptors of the agent.", self.usage.descriptors)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn metrics_are_open_metrics_text() {
        let mut snapshot = Snapshot { processes: 2, paused: true, ..Snapshot::default() };
        snapshot.report.refused.insert("version", 3);
        snapshot.report.answers.counts[0] = 5;
        snapshot.report.answers.counts[10] = 1;
        snapshot.report.answers.sum_us = 700_000;
        let sample = Sample {
            snapshot,
            counters: vec![(Counter::Calls, 7), (Counter::WaitNanos, 1_500_000_000)],
            exports: vec![("a.jsonl".into(), "spans", Counted { sent: 9, waiting: 4, ..Counted::default() })],
            ..Sample::default()
        };
        let text = sample.text();
        for line in [
            "floe_agent_paused 1",
            "floe_agent_processes 2",
            "floe_agent_calls_total 7",
            "floe_agent_wait_seconds_total 1.5",
            "floe_agent_processes_refused_total{reason=\"version\"} 3",
            "floe_agent_events_lost_total{cause=\"buffer_full\"} 0",
            "floe_agent_exported_total{sink=\"a.jsonl\",items=\"spans\",result=\"sent\"} 9",
            "floe_agent_queue{sink=\"a.jsonl\",items=\"spans\"} 4",
            "floe_agent_answer_seconds_bucket{le=\"0.0001\"} 5",
            "floe_agent_answer_seconds_bucket{le=\"+Inf\"} 6",
            "floe_agent_answer_seconds_count 6",
            "# TYPE floe_agent_answer_seconds histogram",
        ] {
            assert!(text.lines().any(|found| found == line), "{line} is missing:\n{text}");
        }
        assert!(text.ends_with("# EOF\n"));
    }

    #[test]
    fn a_session_that_has_ended_is_in_trouble() {
        let state = EventState::default();
        assert!(!state.is_alive(), "it has not come by yet");
        state.seen.store(boot_now().0, Ordering::Relaxed);
        assert!(state.is_alive());
    }
}
