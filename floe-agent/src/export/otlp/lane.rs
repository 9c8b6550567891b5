//! The way of one signal to its endpoint: items become encoded requests, requests wait in order until they are
//! accepted. What waits is counted by the pipeline, which gives nothing more when there is no room.

use std::collections::VecDeque;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::StreamExt as _;
use futures_util::stream::FuturesUnordered;
use opentelemetry_sdk::trace::{IdGenerator as _, RandomIdGenerator};
use prost::Message as _;
use tokio::sync::mpsc::UnboundedReceiver;
use tokio::time::{Instant, sleep_until};
use tracing::{info, warn};

use super::Batching;
use super::target::{Endpoint, Protocol, TargetError};
use super::transport::{Answer, Signal, Transport};
use crate::export::batch::{self, Weigh};
use crate::export::pipeline::{Finish, Message, Shared};
use crate::trace::{FinishedLog, FinishedSpan};

/// Requests that are under way at one time while all goes well.
const CONCURRENT: usize = 4;
/// First wait after a failure; it doubles with each one.
const FIRST_WAIT: Duration = Duration::from_secs(1);
/// Longest wait between attempts.
const LONGEST_WAIT: Duration = Duration::from_secs(30);
/// Most bytes of a request: what OpenTelemetry's and Jaeger's receivers take at once is 4 MiB and more.
const MAX_REQUEST: usize = 3 << 20;

/// A signal's way to its endpoint.
pub(in crate::export) struct Lane {
    transport: Arc<Transport>,
    signal: Signal,
    batching: Batching,
    spans: Vec<FinishedSpan>,
    logs: Vec<FinishedLog>,
    /// Weight of the items above.
    weight: usize,
    /// When the items above are sent though they are few.
    flush: Instant,
    ready: VecDeque<Batch>,
    under_way: FuturesUnordered<Attempt>,
    /// Failures since the last success.
    failures: u32,
    /// No attempt before.
    pause: Instant,
}

type Attempt = Pin<Box<dyn Future<Output = (Batch, Answer)> + Send>>;

/// An encoded request.
#[derive(Debug)]
struct Batch {
    body: Bytes,
    items: usize,
}

impl Lane {
    /// Prepares the way; nothing is sent yet. To be called inside a tokio runtime.
    pub(in crate::export) fn new(endpoint: &Endpoint, signal: Signal, batching: Batching) -> Result<Self, TargetError> {
        let now = Instant::now();
        Ok(Self {
            transport: Arc::new(Transport::new(endpoint, signal)?),
            signal,
            batching,
            spans: Vec::new(),
            logs: Vec::new(),
            weight: 0,
            flush: now,
            ready: VecDeque::new(),
            under_way: FuturesUnordered::new(),
            failures: 0,
            pause: now,
        })
    }

    /// Runs until there is nothing more to send.
    pub(in crate::export) async fn run(mut self, mut receiver: UnboundedReceiver<Message>, shared: Arc<Shared>) {
        let finish = loop {
            self.dispatch();
            tokio::select! {
                message = receiver.recv() => match message {
                    Some(Message::Finish(finish)) => break finish,
                    Some(message) => self.take(message, &shared),
                    None => break Finish::default(),
                },
                Some((batch, answer)) = self.under_way.next() => self.answered(batch, answer, &shared),
                () = sleep_until(self.flush), if self.pending() > 0 => self.encode(&shared),
                () = sleep_until(self.pause), if self.paused() => {}
            }
        };
        self.encode(&shared);
        // An endpoint that cannot be reached is not waited for until the deadline.
        let patience = if self.failures > 0 { 1 } else { 2 };
        let deadline = Instant::now() + finish.deadline;
        self.failures = 0;
        self.pause = Instant::now();
        while !(self.ready.is_empty() && self.under_way.is_empty()) {
            if self.paused() && self.pause > deadline {
                break;
            }
            self.dispatch();
            tokio::select! {
                Some((batch, answer)) = self.under_way.next() => {
                    let unreachable = matches!(answer, Answer::Retry { answered: false, .. });
                    self.answered(batch, answer, &shared);
                    if unreachable && self.failures >= patience {
                        break;
                    }
                }
                () = sleep_until(self.pause), if self.paused() => {}
                () = sleep_until(deadline) => {
                    shared.error(format!("not finished within {:?}", finish.deadline));
                    break;
                }
            }
        }
        // What is left is reported as failed: it is still in the queue's count.
    }

    fn pending(&self) -> usize {
        self.spans.len() + self.logs.len()
    }

    /// Requests wait for the end of a pause.
    fn paused(&self) -> bool {
        self.under_way.is_empty() && !self.ready.is_empty()
    }

    fn take(&mut self, message: Message, shared: &Shared) {
        if self.pending() == 0 {
            self.flush = Instant::now() + self.batching.delay;
        }
        match message {
            Message::Spans(spans, taken) => {
                self.weight += spans[..taken].iter().map(Weigh::weight).sum::<usize>();
                match Arc::try_unwrap(spans) {
                    Ok(mut spans) => {
                        spans.truncate(taken);
                        self.spans.append(&mut spans);
                    }
                    Err(spans) => self.spans.extend_from_slice(&spans[..taken]),
                }
            }
            Message::Logs(logs, taken) => {
                self.weight += logs[..taken].iter().map(Weigh::weight).sum::<usize>();
                self.logs.extend_from_slice(&logs[..taken]);
            }
            Message::Finish(_) => {}
        }
        while self.pending() >= self.batching.items {
            self.encode(shared);
            self.dispatch();
        }
    }

    /// Makes requests of the items that wait, at most one full one.
    fn encode(&mut self, shared: &Shared) {
        let all = self.pending();
        if all == 0 {
            return;
        }
        let items = all.min(self.batching.items);
        let weight = if items == all { self.weight } else { self.weight / all * items };
        self.weight -= weight;
        let json = self.transport.endpoint().protocol == Protocol::HttpJson;
        let mut bodies = Vec::new();
        match self.signal {
            Signal::Logs => encode_logs(self.logs.drain(..items).collect(), json, &mut bodies),
            _ => encode_spans(self.spans.drain(..items).collect(), json, &mut bodies),
        }
        let bytes = bodies.iter().map(|batch| batch.body.len()).sum();
        shared.reweigh(self.signal, weight, bytes);
        self.ready.extend(bodies);
        self.flush = Instant::now() + self.batching.delay;
    }

    /// Sends what may be sent now.
    fn dispatch(&mut self) {
        let most = if self.failures == 0 { CONCURRENT } else { 1 };
        while self.under_way.len() < most && Instant::now() >= self.pause {
            let Some(batch) = self.ready.pop_front() else {
                return;
            };
            let transport = Arc::clone(&self.transport);
            self.under_way.push(Box::pin(async move {
                let answer = transport.send(batch.body.clone()).await;
                (batch, answer)
            }));
        }
    }

    fn answered(&mut self, batch: Batch, answer: Answer, shared: &Shared) {
        let Batch { ref body, items } = batch;
        let bytes = body.len();
        let endpoint = self.transport.endpoint().shown();
        match answer {
            Answer::Accepted { rejected, message } => {
                if self.failures > 0 {
                    info!("OTLP export to {endpoint} works again");
                }
                self.failures = 0;
                self.pause = Instant::now();
                let rejected = usize::try_from(rejected).unwrap_or(usize::MAX).min(items);
                shared.sent(self.signal, items - rejected);
                shared.failed(self.signal, rejected);
                shared.release(self.signal, items, bytes);
                if rejected > 0 {
                    shared.error(format!("{rejected} {} refused: {message}", self.signal.items()));
                    if shared.may_complain() {
                        warn!("{endpoint} refused {rejected} of {items} {}: {message}", self.signal.items());
                    }
                } else if !message.is_empty() && shared.may_complain() {
                    warn!("{endpoint} warns: {message}");
                }
            }
            Answer::Refused(reason) => {
                self.failures = 0;
                shared.failed(self.signal, items);
                shared.release(self.signal, items, bytes);
                if shared.may_complain() {
                    let what = self.signal.items();
                    warn!("OTLP export to {endpoint} fails: {reason}; {what} are lost; tracing goes on");
                }
                shared.error(reason);
            }
            Answer::Retry { reason, after, answered: _ } => {
                let now = Instant::now();
                // Of requests that were under way together, the first to fail begins the pause.
                if now >= self.pause {
                    self.failures += 1;
                    self.pause = now + wait(self.failures);
                }
                if let Some(after) = after {
                    self.pause = self.pause.max(now + after);
                }
                if shared.may_complain() {
                    let what = self.signal.items();
                    warn!(
                        "OTLP export to {endpoint} fails: {reason}; {what} are kept while there is room, then dropped; \
                         tracing goes on"
                    );
                }
                shared.error(reason);
                self.ready.push_front(batch);
            }
        }
    }
}

/// Doubles with each failure; random, so that many agents do not come back at one moment.
fn wait(failures: u32) -> Duration {
    let longest = FIRST_WAIT.saturating_mul(1 << failures.saturating_sub(1).min(16)).min(LONGEST_WAIT);
    let random = u64::from_be_bytes(RandomIdGenerator::default().new_span_id().to_bytes());
    longest.mul_f64(0.5 + (random >> 11) as f64 / (1_u64 << 53) as f64 / 2.0)
}

fn encode_spans(mut spans: Vec<FinishedSpan>, json: bool, bodies: &mut Vec<Batch>) {
    let items = spans.len();
    // Only what may be too large is kept, for a second attempt in halves.
    let half =
        (items > 1 && spans.iter().map(Weigh::weight).sum::<usize>() > MAX_REQUEST).then(|| spans.split_off(items / 2));
    if let Some(half) = half {
        encode_spans(spans, json, bodies);
        encode_spans(half, json, bodies);
        return;
    }
    let request = batch::request(spans);
    let body = if json { serde_json::to_vec(&request).unwrap_or_default() } else { request.encode_to_vec() };
    bodies.push(Batch { body: body.into(), items });
}

fn encode_logs(mut logs: Vec<FinishedLog>, json: bool, bodies: &mut Vec<Batch>) {
    let items = logs.len();
    let half =
        (items > 1 && logs.iter().map(Weigh::weight).sum::<usize>() > MAX_REQUEST).then(|| logs.split_off(items / 2));
    if let Some(half) = half {
        encode_logs(logs, json, bodies);
        encode_logs(half, json, bodies);
        return;
    }
    let request = batch::log_request(logs);
    let body = if json { serde_json::to_vec(&request).unwrap_or_default() } else { request.encode_to_vec() };
    bodies.push(Batch { body: body.into(), items });
}
