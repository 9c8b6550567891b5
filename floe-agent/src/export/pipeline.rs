//! The pipeline: from one reader of events to several sinks that may be slow.

use std::fmt;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tracing::warn;

use super::batch::Weigh;
use super::console::Console;
use super::jsonl::Jsonl;
use super::otlp::{Lane, Metrics, Signal};
use super::redact::{RedactionRules, Redactor};
use super::{ExportError, Output};
use crate::trace::{FinishedLog, FinishedSpan};

/// How often a sink complains in the agent's log.
const PERIOD: Duration = Duration::from_mins(1);

/// What one sink may have waiting of each signal. What does not fit is dropped and counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QueueBounds {
    /// Spans.
    pub spans: usize,
    /// Log records.
    pub logs: usize,
    /// Bytes of memory that either of them take.
    pub bytes: usize,
}

impl Default for QueueBounds {
    fn default() -> Self {
        Self { spans: 200_000, logs: 200_000, bytes: 64 << 20 }
    }
}

/// Hands spans and log records to sinks. Never waits for them.
#[derive(Debug)]
pub struct Pipeline {
    sinks: Vec<Sink>,
    redactor: Redactor,
}

/// What a sink is told.
#[derive(Debug)]
pub(super) enum Message {
    /// The first so many of these spans.
    Spans(Arc<Vec<FinishedSpan>>, usize),
    /// The first so many of these log records.
    Logs(Arc<Vec<FinishedLog>>, usize),
    /// There are no more.
    Finish(Finish),
}

/// How to end.
#[derive(Clone, Copy, Debug)]
pub struct Finish {
    /// How long sinks may take to get rid of what they have.
    pub deadline: Duration,
    /// Events that were lost on the way here, for the summary.
    pub lost_events: u64,
}

impl Default for Finish {
    fn default() -> Self {
        Self { deadline: Duration::from_secs(5), lost_events: 0 }
    }
}

/// What became of the items of one signal.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Written or accepted.
    pub sent: u64,
    /// Could not be written, or were refused.
    pub failed: u64,
    /// The queue had no room.
    pub dropped: u64,
}

impl Tally {
    fn complete(self) -> bool {
        self.failed == 0 && self.dropped == 0
    }
}

/// What became of what a sink was given.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ExportReport {
    /// The sink.
    pub sink: String,
    /// Spans.
    pub spans: Tally,
    /// Log records.
    pub logs: Tally,
    /// The last error.
    pub error: Option<String>,
}

impl ExportReport {
    /// Whether everything arrived.
    pub fn complete(&self) -> bool {
        self.spans.complete() && self.logs.complete()
    }
}

impl fmt::Display for ExportReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { sink, spans, logs, error } = self;
        write!(f, "{sink}: ")?;
        for (items, separator, Tally { sent, failed, dropped }) in [("spans", "", spans), ("log records", "; ", logs)] {
            if items != "spans" && *logs == Tally::default() {
                continue;
            }
            write!(f, "{separator}{sent} {items} sent")?;
            if *failed > 0 {
                write!(f, ", {failed} lost because export failed")?;
            }
            if *dropped > 0 {
                write!(f, ", {dropped} lost because its queue was full")?;
            }
        }
        match error {
            Some(error) => write!(f, " (last error: {error})"),
            None => Ok(()),
        }
    }
}

/// A sink: where its messages go, and the tasks that take them.
#[derive(Debug)]
struct Sink {
    shared: Arc<Shared>,
    spans: Option<UnboundedSender<Message>>,
    logs: Option<UnboundedSender<Message>>,
    tasks: Vec<JoinHandle<()>>,
    /// Sends the counters; told when the others have ended.
    metrics: Option<(oneshot::Sender<()>, JoinHandle<()>)>,
}

/// What the agent's own metrics say of one signal.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counted {
    /// Written or accepted.
    pub sent: u64,
    /// Could not be written, or were refused.
    pub failed: u64,
    /// The queue had no room.
    pub dropped: u64,
    /// Wait in the queue.
    pub waiting: u64,
}

/// The counters of all sinks.
#[derive(Clone, Debug)]
pub struct Tallies(Vec<Arc<Shared>>);

impl Tallies {
    /// How things stand, by sink and kind of item.
    pub fn now(&self) -> Vec<(String, &'static str, Counted)> {
        let all = self.0.iter().flat_map(|shared| [Signal::Traces, Signal::Logs].map(|signal| (shared, signal)));
        all.map(|(shared, signal)| (shared.name.clone(), signal.items(), shared.counted(signal))).collect()
    }
}

/// The counters of a sink, and how full its queues are.
#[derive(Debug)]
pub(super) struct Shared {
    name: String,
    bounds: QueueBounds,
    spans: Queue,
    logs: Queue,
    error: Mutex<Option<String>>,
    complained: Mutex<Option<Instant>>,
    complained_of_room: Mutex<Option<Instant>>,
}

#[derive(Debug, Default)]
struct Queue {
    items: AtomicUsize,
    bytes: AtomicUsize,
    sent: AtomicU64,
    failed: AtomicU64,
    dropped: AtomicU64,
}

impl Queue {
    fn tally(&self) -> Tally {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let waiting = self.items.load(Ordering::Relaxed) as u64;
        // What is still waiting when it is asked for will not be sent.
        Tally { sent: read(&self.sent), failed: read(&self.failed) + waiting, dropped: read(&self.dropped) }
    }
}

impl Shared {
    fn new(name: String, bounds: QueueBounds) -> Arc<Self> {
        Arc::new(Self {
            name,
            bounds,
            spans: Queue::default(),
            logs: Queue::default(),
            error: Mutex::default(),
            complained: Mutex::default(),
            complained_of_room: Mutex::default(),
        })
    }

    fn queue(&self, signal: Signal) -> &Queue {
        match signal {
            Signal::Logs => &self.logs,
            _ => &self.spans,
        }
    }

    /// Takes as many as there is room for; the others are dropped.
    fn admit(&self, signal: Signal, weights: &[usize]) -> usize {
        let queue = self.queue(signal);
        let items = if signal == Signal::Logs { self.bounds.logs } else { self.bounds.spans };
        let room = items.saturating_sub(queue.items.load(Ordering::Relaxed));
        let mut bytes = self.bounds.bytes.saturating_sub(queue.bytes.load(Ordering::Relaxed));
        let mut taken = 0;
        while taken < weights.len().min(room) && weights[taken] <= bytes {
            bytes -= weights[taken];
            taken += 1;
        }
        queue.items.fetch_add(taken, Ordering::Relaxed);
        queue.bytes.fetch_add(weights[..taken].iter().sum(), Ordering::Relaxed);
        let dropped = weights.len() - taken;
        if dropped > 0 {
            let before = queue.dropped.fetch_add(dropped as u64, Ordering::Relaxed);
            if due(&self.complained_of_room) {
                let Self { name, .. } = self;
                warn!(
                    "{name}: its queue is full, {} {} are lost so far; tracing goes on",
                    before + dropped as u64,
                    signal.items()
                );
            }
        }
        taken
    }

    pub(super) fn sent(&self, signal: Signal, items: usize) {
        self.queue(signal).sent.fetch_add(items as u64, Ordering::Relaxed);
    }

    pub(super) fn failed(&self, signal: Signal, items: usize) {
        self.queue(signal).failed.fetch_add(items as u64, Ordering::Relaxed);
    }

    /// Makes room: the items wait no longer.
    pub(super) fn release(&self, signal: Signal, items: usize, bytes: usize) {
        let queue = self.queue(signal);
        queue.items.fetch_sub(items, Ordering::Relaxed);
        queue.bytes.fetch_sub(bytes, Ordering::Relaxed);
    }

    /// Items take another amount of memory than before.
    pub(super) fn reweigh(&self, signal: Signal, before: usize, after: usize) {
        let bytes = &self.queue(signal).bytes;
        bytes.fetch_add(after, Ordering::Relaxed);
        bytes.fetch_sub(before, Ordering::Relaxed);
    }

    pub(super) fn error(&self, error: String) {
        *self.error.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
    }

    /// Whether a failure should be logged now: once a period.
    pub(super) fn may_complain(&self) -> bool {
        due(&self.complained)
    }

    pub(super) fn name(&self) -> &str {
        &self.name
    }

    pub(super) fn counted(&self, signal: Signal) -> Counted {
        let queue = self.queue(signal);
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let (sent, failed, dropped) = (read(&queue.sent), read(&queue.failed), read(&queue.dropped));
        Counted { sent, failed, dropped, waiting: queue.items.load(Ordering::Relaxed) as u64 }
    }

    fn report(&self) -> ExportReport {
        ExportReport {
            sink: self.name.clone(),
            spans: self.spans.tally(),
            logs: self.logs.tally(),
            error: self.error.lock().unwrap_or_else(PoisonError::into_inner).clone(),
        }
    }
}

fn due(last: &Mutex<Option<Instant>>) -> bool {
    let mut last = last.lock().unwrap_or_else(PoisonError::into_inner);
    let due = last.is_none_or(|last| last.elapsed() >= PERIOD);
    if due {
        *last = Some(Instant::now());
    }
    due
}

/// A sink that writes on this machine.
pub(super) trait LocalSink: Send + 'static {
    /// Writes spans.
    fn write(&mut self, spans: &[FinishedSpan]) -> Result<(), ExportError>;
    /// Writes log records.
    fn write_logs(&mut self, logs: &[FinishedLog]) -> Result<(), ExportError>;
    /// Writes what is left.
    fn finish(&mut self, finish: Finish) -> Result<(), ExportError>;
}

impl Pipeline {
    /// Opens all outputs. To be called inside a tokio runtime.
    pub fn start(outputs: &[Output], bounds: QueueBounds, redaction: RedactionRules) -> Result<Self, ExportError> {
        // First open everything, so that a mistake in one leaves nothing half begun.
        enum Open {
            Local(Box<dyn LocalSink>),
            Otlp(Vec<(Signal, Lane)>, Option<Box<Metrics>>),
        }
        let mut open = Vec::new();
        for output in outputs {
            let sink = match output {
                Output::Console(options) => Open::Local(Box::new(Console::new(Box::new(std::io::stderr()), *options))),
                Output::File(path) => Open::Local(Box::new(Jsonl::create(path)?)),
                Output::Otlp(target) => {
                    let mut lanes = Vec::new();
                    for (signal, endpoint) in [(Signal::Traces, &target.traces), (Signal::Logs, &target.logs)] {
                        if let Some(endpoint) = endpoint {
                            let batching = if signal == Signal::Logs { target.log_batching } else { target.batching };
                            lanes.push((signal, Lane::new(endpoint, signal, batching)?));
                        }
                    }
                    let metrics = target.metrics.as_ref();
                    let metrics =
                        metrics.map(|endpoint| Metrics::new(endpoint, target.metrics_interval)).transpose()?;
                    Open::Otlp(lanes, metrics.map(Box::new))
                }
            };
            open.push((output.to_string(), sink));
        }
        let mut pipeline = Self { sinks: Vec::new(), redactor: Redactor::new(redaction) };
        for (name, sink) in open {
            match sink {
                Open::Local(sink) => pipeline
                    .add_local(name.clone(), bounds, sink)
                    .map_err(|source| ExportError::Write { sink: name, source })?,
                Open::Otlp(lanes, metrics) => pipeline.add_otlp(name, bounds, lanes, metrics),
            }
        }
        Ok(pipeline)
    }

    fn add_local(&mut self, name: String, bounds: QueueBounds, sink: Box<dyn LocalSink>) -> std::io::Result<()> {
        let (sender, receiver) = unbounded_channel();
        let shared = Shared::new(name, bounds);
        let counters = Arc::clone(&shared);
        let (done, end) = oneshot::channel::<()>();
        // A thread of its own and not one of the runtime's: a terminal that is stopped must not hold up the agent's end.
        std::thread::Builder::new().name("floe-export".to_owned()).spawn(move || {
            run_local(sink, receiver, &counters);
            drop(done);
        })?;
        let task = tokio::spawn(async move {
            let _ = end.await;
        });
        let spans = Some(sender.clone());
        self.sinks.push(Sink { shared, spans, logs: Some(sender), tasks: vec![task], metrics: None });
        Ok(())
    }

    fn add_otlp(
        &mut self,
        name: String,
        bounds: QueueBounds,
        lanes: Vec<(Signal, Lane)>,
        metrics: Option<Box<Metrics>>,
    ) {
        let shared = Shared::new(name, bounds);
        let mut sink = Sink { shared: Arc::clone(&shared), spans: None, logs: None, tasks: Vec::new(), metrics: None };
        for (signal, lane) in lanes {
            let (sender, receiver) = unbounded_channel();
            match signal {
                Signal::Logs => sink.logs = Some(sender),
                _ => sink.spans = Some(sender),
            }
            sink.tasks.push(tokio::spawn(lane.run(receiver, Arc::clone(&shared))));
        }
        sink.metrics = metrics.map(|metrics| {
            let (end, ended) = oneshot::channel();
            (end, tokio::spawn(metrics.run(ended, shared)))
        });
        self.sinks.push(sink);
    }

    /// Gives spans to every sink that has room for them.
    pub fn send(&self, mut spans: Vec<FinishedSpan>) {
        for span in &mut spans {
            self.redactor.span(span);
        }
        let to = self.sinks.iter().filter_map(|sink| Some((&sink.shared, sink.spans.as_ref()?)));
        hand_out(spans, Signal::Traces, to, Message::Spans);
    }

    /// Gives log records to every sink that has room for them.
    pub fn send_logs(&self, mut logs: Vec<FinishedLog>) {
        for log in &mut logs {
            self.redactor.log(log);
        }
        let to = self.sinks.iter().filter_map(|sink| Some((&sink.shared, sink.logs.as_ref()?)));
        hand_out(logs, Signal::Logs, to, Message::Logs);
    }

    /// What became of the spans and log records so far. What waits counts as failed.
    pub fn reports(&self) -> Vec<ExportReport> {
        self.sinks.iter().map(|sink| sink.shared.report()).collect()
    }

    /// A view of the counters that stays when the pipeline ends.
    pub fn tallies(&self) -> Tallies {
        Tallies(self.sinks.iter().map(|sink| Arc::clone(&sink.shared)).collect())
    }

    /// Lets the sinks write what they have, at most until the deadline, and says what became of everything.
    pub async fn shutdown(self, finish: Finish) -> Vec<ExportReport> {
        for sink in &self.sinks {
            // A sink that has ended already reports what it has. A local sink ends at the first of the two messages.
            for sender in [&sink.spans, &sink.logs].into_iter().flatten() {
                let _ = sender.send(Message::Finish(finish));
            }
        }
        // A little longer than the sinks are told, so that they can end by themselves.
        let deadline = Instant::now() + finish.deadline + Duration::from_millis(200);
        let mut reports = Vec::new();
        for Sink { shared, spans: _, logs: _, tasks, metrics } in self.sinks {
            for task in tasks {
                let abort = task.abort_handle();
                if tokio::time::timeout_at(deadline, task).await.is_err() {
                    abort.abort();
                    shared.error(format!("not finished within {:?}", finish.deadline));
                }
            }
            reports.push(shared.report());
            if let Some((end, task)) = metrics {
                let abort = task.abort_handle();
                // An endpoint that takes nothing is not asked to take this.
                let reachable = reports.last().is_some_and(|report| report.spans.sent > 0);
                if reachable && end.send(()).is_ok() {
                    let _ = tokio::time::timeout_at(deadline, task).await;
                }
                abort.abort();
            }
        }
        reports
    }
}

fn hand_out<'a, T: Weigh>(
    items: Vec<T>,
    signal: Signal,
    to: impl Iterator<Item = (&'a Arc<Shared>, &'a UnboundedSender<Message>)>,
    message: impl Fn(Arc<Vec<T>>, usize) -> Message,
) {
    if items.is_empty() {
        return;
    }
    let weights: Vec<usize> = items.iter().map(Weigh::weight).collect();
    let mut to = to.peekable();
    let mut items = Some(Arc::new(items));
    while let Some((shared, sender)) = to.next() {
        let taken = shared.admit(signal, &weights);
        // The last sink gets the items themselves: it need not copy them.
        let Some(items) = (if to.peek().is_none() { items.take() } else { items.clone() }) else {
            return;
        };
        if taken > 0 && sender.send(message(items, taken)).is_err() {
            shared.failed(signal, taken);
            shared.release(signal, taken, weights[..taken].iter().sum());
        }
    }
}

fn run_local(mut sink: Box<dyn LocalSink>, mut receiver: UnboundedReceiver<Message>, shared: &Shared) {
    let written = |result: Result<(), ExportError>, signal: Signal, items: usize, bytes: usize| {
        match result {
            Ok(()) => shared.sent(signal, items),
            Err(error) => {
                if shared.may_complain() {
                    warn!("{error}; tracing goes on");
                }
                shared.error(error.to_string());
                shared.failed(signal, items);
            }
        }
        shared.release(signal, items, bytes);
    };
    while let Some(message) = receiver.blocking_recv() {
        match message {
            Message::Spans(spans, taken) => {
                let spans = &spans[..taken];
                let bytes = spans.iter().map(Weigh::weight).sum();
                written(sink.write(spans), Signal::Traces, taken, bytes);
            }
            Message::Logs(logs, taken) => {
                let logs = &logs[..taken];
                let bytes = logs.iter().map(Weigh::weight).sum();
                written(sink.write_logs(logs), Signal::Logs, taken, bytes);
            }
            Message::Finish(finish) => {
                written(sink.finish(finish), Signal::Traces, 0, 0);
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::export::tree::tests::span;

    /// A sink that holds every batch until it is let go, and can fail.
    struct Slow {
        go: std::sync::mpsc::Receiver<bool>,
    }

    impl LocalSink for Slow {
        fn write(&mut self, _: &[FinishedSpan]) -> Result<(), ExportError> {
            match self.go.recv() {
                Ok(true) => Ok(()),
                _ => Err(ExportError::Write { sink: "slow".into(), source: std::io::ErrorKind::StorageFull.into() }),
            }
        }

        fn write_logs(&mut self, _: &[FinishedLog]) -> Result<(), ExportError> {
            Ok(())
        }

        fn finish(&mut self, _: Finish) -> Result<(), ExportError> {
            Ok(())
        }
    }

    fn pipeline(queue: usize) -> (Pipeline, std::sync::mpsc::Sender<bool>) {
        let (sender, go) = std::sync::mpsc::channel();
        let redactor = Redactor::new(RedactionRules::default());
        let mut pipeline = Pipeline { sinks: Vec::new(), redactor };
        let bounds = QueueBounds { spans: queue, ..QueueBounds::default() };
        pipeline.add_local("slow".into(), bounds, Box::new(Slow { go })).unwrap();
        (pipeline, sender)
    }

    fn spans(count: u64) -> Vec<FinishedSpan> {
        (0..count).map(|id| span(1, id + 1, 0, "s", 0, 1)).collect()
    }

    #[tokio::test]
    async fn what_a_queue_has_no_room_for_is_dropped_and_counted() {
        let (pipeline, go) = pipeline(5);
        pipeline.send(spans(3));
        pipeline.send(spans(4));
        pipeline.send(spans(1));
        let tallies = pipeline.tallies();
        go.send(true).unwrap();
        go.send(true).unwrap();
        let reports = pipeline.shutdown(Finish::default()).await;
        assert_eq!(reports[0].spans, Tally { sent: 5, failed: 0, dropped: 3 });
        assert_eq!(reports[0].to_string(), "slow: 5 spans sent, 3 lost because its queue was full");
        let counted = Counted { sent: 5, dropped: 3, ..Counted::default() };
        assert_eq!(tallies.now()[0], ("slow".to_owned(), "spans", counted), "whoever watches can still ask");
    }

    #[tokio::test]
    async fn what_cannot_be_written_is_counted_with_the_reason() {
        let (pipeline, go) = pipeline(50);
        pipeline.send(spans(3));
        pipeline.send(spans(2));
        go.send(false).unwrap();
        go.send(true).unwrap();
        let reports = pipeline.shutdown(Finish::default()).await;
        assert_eq!((reports[0].spans.sent, reports[0].spans.failed, reports[0].complete()), (2, 3, false));
        assert_eq!(reports[0].error.as_deref(), Some("cannot write to slow: no storage space"));
    }

    #[tokio::test]
    async fn a_sink_that_hangs_does_not_hold_up_the_end() {
        let (pipeline, go) = pipeline(50);
        pipeline.send(spans(3));
        let finish = Finish { deadline: Duration::from_millis(10), lost_events: 0 };
        let reports = pipeline.shutdown(finish).await;
        assert_eq!((reports[0].spans.sent, reports[0].spans.failed), (0, 3));
        drop(go);
    }
}
