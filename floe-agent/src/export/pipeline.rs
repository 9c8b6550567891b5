//! The pipeline: from one reader of events to several sinks that may be slow.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tracing::warn;

use super::console::Console;
use super::jsonl::Jsonl;
use super::otlp::Otlp;
use super::{ExportError, Output};
use crate::trace::FinishedSpan;

/// Spans that one sink may have waiting.
const QUEUE: usize = 20_000;

/// Hands spans to sinks. Never waits for them.
#[derive(Debug)]
pub struct Pipeline {
    sinks: Vec<Handle>,
}

/// What a sink is told.
#[derive(Debug)]
pub(super) enum Message {
    /// The first so many of these spans.
    Spans(Arc<Vec<FinishedSpan>>, usize),
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

/// What became of the spans that a sink was given.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ExportReport {
    /// The sink.
    pub sink: String,
    /// Spans that were written or accepted.
    pub sent: u64,
    /// Spans that could not be written, or that were refused.
    pub failed: u64,
    /// Spans for which its queue had no room.
    pub dropped: u64,
    /// The last error.
    pub error: Option<String>,
}

impl ExportReport {
    /// Whether everything arrived.
    pub fn complete(&self) -> bool {
        self.failed == 0 && self.dropped == 0
    }
}

impl fmt::Display for ExportReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { sink, sent, failed, dropped, error } = self;
        write!(f, "{sink}: {sent} spans sent")?;
        if *failed > 0 {
            write!(f, ", {failed} lost because export failed")?;
        }
        if *dropped > 0 {
            write!(f, ", {dropped} lost because its queue was full")?;
        }
        match error {
            Some(error) => write!(f, " (last error: {error})"),
            None => Ok(()),
        }
    }
}

#[derive(Debug)]
struct Handle {
    sender: UnboundedSender<Message>,
    shared: Arc<Shared>,
    task: JoinHandle<()>,
}

/// The counters of a sink, and how full its queue is.
#[derive(Debug)]
pub(super) struct Shared {
    name: String,
    queue: usize,
    queued: AtomicUsize,
    sent: AtomicU64,
    failed: AtomicU64,
    dropped: AtomicU64,
    error: std::sync::Mutex<Option<String>>,
}

impl Shared {
    fn new(name: String, queue: usize) -> Arc<Self> {
        Arc::new(Self {
            name,
            queue,
            queued: AtomicUsize::new(0),
            sent: AtomicU64::new(0),
            failed: AtomicU64::new(0),
            dropped: AtomicU64::new(0),
            error: std::sync::Mutex::new(None),
        })
    }

    pub(super) fn sent(&self, spans: usize) {
        self.sent.fetch_add(spans as u64, Ordering::Relaxed);
        self.queued.fetch_sub(spans, Ordering::Relaxed);
    }

    pub(super) fn failed(&self, spans: usize) {
        self.failed.fetch_add(spans as u64, Ordering::Relaxed);
        self.queued.fetch_sub(spans, Ordering::Relaxed);
    }

    pub(super) fn error(&self, error: String) {
        *self.error.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = Some(error);
    }

    fn report(&self) -> ExportReport {
        ExportReport {
            sink: self.name.clone(),
            sent: self.sent.load(Ordering::Relaxed),
            // What is still waiting when it is asked for will not be sent.
            failed: self.failed.load(Ordering::Relaxed) + self.queued.load(Ordering::Relaxed) as u64,
            dropped: self.dropped.load(Ordering::Relaxed),
            error: self.error.lock().unwrap_or_else(std::sync::PoisonError::into_inner).clone(),
        }
    }
}

/// A sink that writes on this machine.
pub(super) trait LocalSink: Send + 'static {
    /// Writes spans.
    fn write(&mut self, spans: &[FinishedSpan]) -> Result<(), ExportError>;
    /// Writes what is left.
    fn finish(&mut self, finish: Finish) -> Result<(), ExportError>;
}

impl Pipeline {
    /// Opens all outputs. To be called inside a tokio runtime.
    pub fn start(outputs: &[Output]) -> Result<Self, ExportError> {
        // First open everything, so that a mistake in one leaves nothing half begun.
        enum Open {
            Local(Box<dyn LocalSink>),
            Otlp(Otlp),
        }
        let mut open = Vec::new();
        for output in outputs {
            let sink = match output {
                Output::Console(options) => Open::Local(Box::new(Console::new(Box::new(std::io::stderr()), *options))),
                Output::File(path) => Open::Local(Box::new(Jsonl::create(path)?)),
                Output::Otlp(target) => Open::Otlp(Otlp::new(target)?),
            };
            open.push((output.to_string(), sink));
        }
        let mut pipeline = Self { sinks: Vec::new() };
        for (name, sink) in open {
            match sink {
                Open::Local(sink) => pipeline
                    .add_local(name.clone(), QUEUE, sink)
                    .map_err(|source| ExportError::Write { sink: name, source })?,
                Open::Otlp(sink) => pipeline.add_otlp(name, QUEUE, sink),
            }
        }
        Ok(pipeline)
    }

    fn add_local(&mut self, name: String, queue: usize, sink: Box<dyn LocalSink>) -> std::io::Result<()> {
        let (sender, receiver) = unbounded_channel();
        let shared = Shared::new(name, queue);
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
        self.sinks.push(Handle { sender, shared, task });
        Ok(())
    }

    fn add_otlp(&mut self, name: String, queue: usize, sink: Otlp) {
        let (sender, receiver) = unbounded_channel();
        let shared = Shared::new(name, queue);
        let task = tokio::spawn(sink.run(receiver, Arc::clone(&shared)));
        self.sinks.push(Handle { sender, shared, task });
    }

    /// Gives spans to every sink that has room for them.
    pub fn send(&self, spans: Vec<FinishedSpan>) {
        if spans.is_empty() {
            return;
        }
        let spans = Arc::new(spans);
        for Handle { sender, shared, task: _ } in &self.sinks {
            let room = shared.queue.saturating_sub(shared.queued.load(Ordering::Relaxed));
            let taken = spans.len().min(room);
            shared.dropped.fetch_add((spans.len() - taken) as u64, Ordering::Relaxed);
            shared.queued.fetch_add(taken, Ordering::Relaxed);
            if taken > 0 && sender.send(Message::Spans(Arc::clone(&spans), taken)).is_err() {
                shared.failed(taken);
            }
        }
    }

    /// What became of the spans so far. Spans that wait count as failed.
    pub fn reports(&self) -> Vec<ExportReport> {
        self.sinks.iter().map(|sink| sink.shared.report()).collect()
    }

    /// How things stand, by sink: what became of its spans so far, and how many wait.
    pub fn state(&self) -> Vec<(ExportReport, usize)> {
        let state = |sink: &Handle| {
            let queued = sink.shared.queued.load(Ordering::Relaxed);
            let mut report = sink.shared.report();
            report.failed = sink.shared.failed.load(Ordering::Relaxed);
            (report, queued)
        };
        self.sinks.iter().map(state).collect()
    }

    /// Lets the sinks write what they have, at most until the deadline, and says what became of all spans.
    pub async fn shutdown(self, finish: Finish) -> Vec<ExportReport> {
        for sink in &self.sinks {
            // A sink that has ended already reports what it has.
            let _ = sink.sender.send(Message::Finish(finish));
        }
        // A little longer than the sinks are told, so that they can end by themselves.
        let deadline = Instant::now() + finish.deadline + Duration::from_millis(200);
        let mut reports = Vec::new();
        for Handle { sender: _, shared, task } in self.sinks {
            let abort = task.abort_handle();
            if tokio::time::timeout_at(deadline, task).await.is_err() {
                abort.abort();
                shared.error(format!("not finished within {:?}", finish.deadline));
            }
            reports.push(shared.report());
        }
        reports
    }
}

fn run_local(mut sink: Box<dyn LocalSink>, mut receiver: UnboundedReceiver<Message>, shared: &Shared) {
    let mut failing = false;
    let mut check = |result: Result<(), ExportError>| {
        let failed = result.is_err();
        if let Err(error) = result {
            shared.error(error.to_string());
            if !failing {
                warn!("{error}; tracing goes on");
            }
        }
        failing = failed;
        failed
    };
    while let Some(message) = receiver.blocking_recv() {
        match message {
            Message::Spans(spans, taken) => {
                if check(sink.write(&spans[..taken])) {
                    shared.failed(taken);
                } else {
                    shared.sent(taken);
                }
            }
            Message::Finish(finish) => {
                check(sink.finish(finish));
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

        fn finish(&mut self, _: Finish) -> Result<(), ExportError> {
            Ok(())
        }
    }

    fn pipeline(queue: usize) -> (Pipeline, std::sync::mpsc::Sender<bool>) {
        let (sender, go) = std::sync::mpsc::channel();
        let mut pipeline = Pipeline { sinks: Vec::new() };
        pipeline.add_local("slow".into(), queue, Box::new(Slow { go })).unwrap();
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
        go.send(true).unwrap();
        go.send(true).unwrap();
        let reports = pipeline.shutdown(Finish::default()).await;
        assert_eq!(reports, [ExportReport { sink: "slow".into(), sent: 5, failed: 0, dropped: 3, error: None }]);
        assert_eq!(reports[0].to_string(), "slow: 5 spans sent, 3 lost because its queue was full");
    }

    #[tokio::test]
    async fn what_cannot_be_written_is_counted_with_the_reason() {
        let (pipeline, go) = pipeline(50);
        pipeline.send(spans(3));
        pipeline.send(spans(2));
        go.send(false).unwrap();
        go.send(true).unwrap();
        let reports = pipeline.shutdown(Finish::default()).await;
        assert_eq!((reports[0].sent, reports[0].failed, reports[0].complete()), (2, 3, false));
        assert_eq!(reports[0].error.as_deref(), Some("cannot write to slow: no storage space"));
    }

    #[tokio::test]
    async fn a_sink_that_hangs_does_not_hold_up_the_end() {
        let (pipeline, go) = pipeline(50);
        pipeline.send(spans(3));
        let finish = Finish { deadline: Duration::from_millis(10), lost_events: 0 };
        let reports = pipeline.shutdown(finish).await;
        assert_eq!((reports[0].sent, reports[0].failed), (0, 3));
        drop(go);
    }
}
