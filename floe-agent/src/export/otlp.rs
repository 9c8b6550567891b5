//! OTLP over gRPC. Spans wait here, in a bounded queue, while the endpoint cannot be reached.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use opentelemetry_otlp::{
    OTEL_EXPORTER_OTLP_ENDPOINT, OTEL_EXPORTER_OTLP_INSECURE, OTEL_EXPORTER_OTLP_TIMEOUT,
    OTEL_EXPORTER_OTLP_TRACES_ENDPOINT, OTEL_EXPORTER_OTLP_TRACES_INSECURE, OTEL_EXPORTER_OTLP_TRACES_TIMEOUT,
    SpanExporter, WithTonicConfig,
};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::trace::SpanExporter as _;
use tokio::sync::mpsc::UnboundedReceiver;
use tokio::time::{Instant, sleep_until, timeout_at};
use tonic::transport::{Channel, Endpoint};
use tracing::{info, warn};

use super::ExportError;
use super::jsonl::by_resource;
use super::pipeline::{Finish, Message, Shared};
use crate::trace::FinishedSpan;

/// Spans in one request.
const BATCH: usize = 512;
/// How long a span waits for its batch to fill.
const INTERVAL: Duration = Duration::from_secs(1);
/// Waits between attempts while the endpoint cannot be reached.
const BACKOFF: [Duration; 5] = [
    Duration::from_secs(1),
    Duration::from_secs(2),
    Duration::from_secs(5),
    Duration::from_secs(10),
    Duration::from_secs(30),
];
/// Exporters that are kept, one per process.
const EXPORTERS: usize = 256;

/// An OTLP/gRPC endpoint.
#[derive(Clone, Debug)]
pub struct OtlpTarget {
    endpoint: String,
    origin: String,
    timeout: Duration,
}

impl OtlpTarget {
    /// The endpoint of the option `--otlp`, else of `OTEL_EXPORTER_OTLP_TRACES_ENDPOINT`, else of
    /// `OTEL_EXPORTER_OTLP_ENDPOINT`; `None` if there is none.
    pub fn resolve(option: Option<&str>) -> Result<Option<Self>, ExportError> {
        Self::resolve_from(option, |name| std::env::var(name).ok())
    }

    fn resolve_from(option: Option<&str>, env: impl Fn(&str) -> Option<String>) -> Result<Option<Self>, ExportError> {
        let env = |name: &str| env(name).map(|value| value.trim().to_owned()).filter(|value| !value.is_empty());
        let variables = [OTEL_EXPORTER_OTLP_TRACES_ENDPOINT, OTEL_EXPORTER_OTLP_ENDPOINT];
        let from_env = || variables.iter().find_map(|name| Some((env(name)?, (*name).to_owned())));
        let given = option.map(|option| (option.trim().to_owned(), "--otlp".to_owned())).or_else(from_env);
        let Some((given, origin)) = given else {
            return Ok(None);
        };

        let mut endpoint = given.clone();
        let insecure = env(OTEL_EXPORTER_OTLP_TRACES_INSECURE).or_else(|| env(OTEL_EXPORTER_OTLP_INSECURE));
        if !endpoint.contains("://") && insecure.is_some_and(|value| value.eq_ignore_ascii_case("true")) {
            endpoint = format!("http://{endpoint}");
        }
        let milliseconds = env(OTEL_EXPORTER_OTLP_TRACES_TIMEOUT).or_else(|| env(OTEL_EXPORTER_OTLP_TIMEOUT));
        let timeout = milliseconds.and_then(|value| value.parse().ok()).unwrap_or(10_000);
        let target = Self { endpoint, origin, timeout: Duration::from_millis(timeout) };
        target.connection().map_err(|problem| ExportError::Endpoint {
            endpoint: given,
            origin: target.origin.clone(),
            problem,
        })?;
        Ok(Some(target))
    }

    /// The endpoint.
    pub fn endpoint(&self) -> &str {
        &self.endpoint
    }

    fn connection(&self) -> Result<Endpoint, String> {
        let Some((scheme, rest)) = self.endpoint.split_once("://") else {
            return Err(format!("expected a URL such as `http://{}`", self.endpoint));
        };
        match scheme {
            "http" => {}
            "https" => {
                return Err("TLS is not supported yet; expected a URL that begins with `http://`".to_owned());
            }
            _ => {
                return Err(format!("expected a URL such as `http://{rest}`, not `{scheme}`"));
            }
        }
        let not_a_url = || "it is not a URL; expected one such as `http://localhost:4317`".to_owned();
        let endpoint = Endpoint::from_shared(self.endpoint.clone()).map_err(|_| not_a_url())?;
        if endpoint.uri().host().is_none_or(str::is_empty) {
            return Err(not_a_url());
        }
        let connect = self.timeout.min(Duration::from_secs(5));
        Ok(endpoint.connect_timeout(connect).timeout(self.timeout))
    }
}

/// Sends spans to one endpoint. All exporters, one per resource, share a connection.
pub(super) struct Otlp {
    target: OtlpTarget,
    channel: Channel,
    exporters: VecDeque<(Arc<Resource>, SpanExporter)>,
    pending: VecDeque<FinishedSpan>,
    /// Attempts that failed since the last one that did not.
    failures: usize,
    next: Option<Instant>,
}

impl Otlp {
    /// Prepares the connection; nothing is sent yet. To be called inside a tokio runtime.
    pub(super) fn new(target: &OtlpTarget) -> Result<Self, ExportError> {
        let connection = target.connection().map_err(|problem| ExportError::Endpoint {
            endpoint: target.endpoint.clone(),
            origin: target.origin.clone(),
            problem,
        })?;
        let sink = Self {
            target: target.clone(),
            channel: connection.connect_lazy(),
            exporters: VecDeque::new(),
            pending: VecDeque::new(),
            failures: 0,
            next: None,
        };
        // Mistakes in the variables that the library reads show here.
        sink.build()?;
        Ok(sink)
    }

    fn build(&self) -> Result<SpanExporter, ExportError> {
        SpanExporter::builder()
            .with_tonic()
            .with_channel(self.channel.clone())
            .build()
            .map_err(|source| ExportError::Otlp { endpoint: self.target.endpoint.clone(), source })
    }

    /// Runs until there is nothing more to send.
    pub(super) async fn run(mut self, mut receiver: UnboundedReceiver<Message>, shared: Arc<Shared>) {
        let finish = loop {
            let now = Instant::now();
            let next = *self.next.get_or_insert(now + INTERVAL);
            let due = if self.failures == 0 && self.pending.len() >= BATCH { now } else { next };
            tokio::select! {
                message = receiver.recv() => match message {
                    Some(Message::Spans(spans, taken)) => {
                        if self.pending.is_empty() && self.failures == 0 {
                            self.next = Some(Instant::now() + INTERVAL);
                        }
                        self.pending.extend(spans[..taken].iter().cloned());
                    }
                    Some(Message::Finish(finish)) => break finish,
                    None => break Finish::default(),
                },
                () = sleep_until(due), if !self.pending.is_empty() => self.send(&shared).await,
            }
        };
        let deadline = Instant::now() + finish.deadline;
        // An endpoint that cannot be reached is tried once more, not until the deadline.
        let mut attempts = if self.failures > 0 { 1 } else { 2 };
        while !self.pending.is_empty() && attempts > 0 && Instant::now() < deadline {
            if timeout_at(deadline, self.send(&shared)).await.is_err() {
                shared.error(format!("not finished within {:?}", finish.deadline));
                break;
            }
            attempts -= usize::from(self.failures > 0);
        }
        shared.failed(self.pending.len());
    }

    /// Sends one batch.
    async fn send(&mut self, shared: &Shared) {
        let count = self.pending.len().min(BATCH);
        let mut batch: Vec<FinishedSpan> = self.pending.drain(..count).collect();
        for (resource, spans) in by_resource(&batch) {
            let count = spans.len();
            let others = |span: &FinishedSpan| !Arc::ptr_eq(&span.resource, &resource);
            match self.export(&resource, spans).await {
                Ok(()) => {
                    shared.sent(count);
                    batch.retain(others);
                    if self.failures > 0 {
                        info!("OTLP export to {} works again", self.target.endpoint);
                    }
                    self.failures = 0;
                    self.next = Some(Instant::now() + INTERVAL);
                }
                Err(Failure { reason, retry }) => {
                    if self.failures == 0 {
                        let what =
                            if retry { "spans are kept while there is room, then dropped" } else { "spans are lost" };
                        warn!("OTLP export to {} fails: {reason}; {what}; tracing goes on", self.target.endpoint);
                    }
                    self.next = Some(Instant::now() + BACKOFF[self.failures.min(BACKOFF.len() - 1)]);
                    self.failures += 1;
                    shared.error(reason);
                    if retry {
                        break;
                    }
                    shared.failed(count);
                    batch.retain(others);
                }
            }
        }
        for span in batch.into_iter().rev() {
            self.pending.push_front(span);
        }
    }

    async fn export(
        &mut self,
        resource: &Arc<Resource>,
        spans: Vec<opentelemetry_sdk::trace::SpanData>,
    ) -> Result<(), Failure> {
        let known = self.exporters.iter().position(|(known, _)| Arc::ptr_eq(known, resource));
        let index = if let Some(index) = known {
            index
        } else {
            let mut exporter = self.build().map_err(|error| Failure { reason: error.to_string(), retry: false })?;
            exporter.set_resource(resource);
            if self.exporters.len() >= EXPORTERS {
                self.exporters.pop_front();
            }
            self.exporters.push_back((Arc::clone(resource), exporter));
            self.exporters.len() - 1
        };
        // The library tries again by itself, within its time-out; an attempt that hangs is ended here.
        let patience = self.target.timeout + Duration::from_secs(1);
        match tokio::time::timeout(patience, self.exporters[index].1.export(spans)).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error)) => Err(Failure::from(&error.to_string())),
            Err(_) => Err(Failure { reason: format!("no answer within {patience:?}"), retry: true }),
        }
    }
}

/// Why an export failed, and whether the same spans may be sent again.
#[derive(Debug, PartialEq, Eq)]
struct Failure {
    reason: String,
    retry: bool,
}

impl Failure {
    /// From the library's text; codes that may be tried again are those of the OTLP specification.
    fn from(text: &str) -> Self {
        const RETRY: [&str; 7] =
            ["Cancelled", "DeadlineExceeded", "ResourceExhausted", "Aborted", "OutOfRange", "Unavailable", "DataLoss"];
        let (_, reason) = text.split_once("gRPC code: ").unwrap_or(("", text));
        let code = reason.split(':').next().unwrap_or(reason).trim();
        Self { reason: reason.to_owned(), retry: RETRY.contains(&code) }
    }
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;
    use std::sync::Mutex;

    use opentelemetry_proto::tonic::collector::trace::v1::trace_service_server::{TraceService, TraceServiceServer};
    use opentelemetry_proto::tonic::collector::trace::v1::{ExportTraceServiceRequest, ExportTraceServiceResponse};
    use tokio::net::TcpListener;
    use tonic::transport::server::TcpIncoming;
    use tonic::{Code, Request, Response, Status};

    use super::*;
    use crate::export::tree::tests::span;
    use crate::export::{ExportReport, Output, Pipeline};
    use crate::trace::ProcessFacts;
    use crate::units::{Epoch, Pid};

    /// A collector that keeps what it gets, and answers with this code.
    #[derive(Clone)]
    struct Collector {
        requests: Arc<Mutex<Vec<ExportTraceServiceRequest>>>,
        answer: Arc<Mutex<Code>>,
    }

    #[tonic::async_trait]
    impl TraceService for Collector {
        async fn export(
            &self,
            request: Request<ExportTraceServiceRequest>,
        ) -> Result<Response<ExportTraceServiceResponse>, Status> {
            match *self.answer.lock().unwrap() {
                Code::Ok => {
                    self.requests.lock().unwrap().push(request.into_inner());
                    Ok(Response::new(ExportTraceServiceResponse::default()))
                }
                code => Err(Status::new(code, "no")),
            }
        }
    }

    impl Collector {
        async fn start(answer: Code) -> (Self, SocketAddr) {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let address = listener.local_addr().unwrap();
            let collector = Self { requests: Arc::default(), answer: Arc::new(Mutex::new(answer)) };
            let server = TraceServiceServer::new(collector.clone());
            let incoming = TcpIncoming::from(listener);
            tokio::spawn(tonic::transport::Server::builder().add_service(server).serve_with_incoming(incoming));
            (collector, address)
        }

        fn spans(&self) -> usize {
            let requests = self.requests.lock().unwrap();
            let resources = requests.iter().flat_map(|request| &request.resource_spans);
            resources.flat_map(|resource| &resource.scope_spans).map(|scope| scope.spans.len()).sum()
        }
    }

    fn target(endpoint: &str) -> Result<Option<OtlpTarget>, ExportError> {
        OtlpTarget::resolve_from(Some(endpoint), |_| None)
    }

    async fn run(endpoint: &str, spans: u64, finish: Finish) -> ExportReport {
        let pipeline = Pipeline::start(&[Output::Otlp(target(endpoint).unwrap().unwrap())]).unwrap();
        let other = Arc::new(ProcessFacts::unknown(Pid(9), Epoch(9)).resource());
        let mut batch: Vec<_> = (0..spans).map(|id| span(1, id + 1, 0, "s", 0, 1)).collect();
        let first = Arc::clone(&batch[0].resource);
        for (index, span) in batch.iter_mut().enumerate() {
            span.resource = Arc::clone(if index % 2 == 0 { &first } else { &other });
        }
        pipeline.send(batch);
        pipeline.shutdown(finish).await.remove(0)
    }

    #[tokio::test]
    async fn spans_arrive_under_their_resources() {
        let (collector, address) = Collector::start(Code::Ok).await;
        let report = run(&format!("http://{address}"), 1300, Finish::default()).await;
        assert_eq!((report.sent, report.complete(), report.error.clone()), (1300, true, None), "{report}");
        assert_eq!(collector.spans(), 1300);
        let requests = collector.requests.lock().unwrap();
        let pids: std::collections::BTreeSet<String> = requests
            .iter()
            .flat_map(|request| &request.resource_spans)
            .map(|resource| {
                format!("{:?}", resource.resource.as_ref().unwrap().attributes.iter().find(|a| a.key == "process.pid"))
            })
            .collect();
        assert_eq!(pids.len(), 2);
    }

    #[tokio::test]
    async fn an_endpoint_that_cannot_be_reached_loses_spans_in_bounded_time_and_they_are_counted() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        drop(listener);
        let begin = Instant::now();
        let report = run(&format!("http://{address}"), 10, Finish::default()).await;
        assert_eq!((report.sent, report.failed, report.dropped), (0, 10, 0));
        assert!(report.error.as_deref().unwrap().contains("Connection refused"), "{report}");
        assert!(begin.elapsed() < Duration::from_secs(6), "{:?}", begin.elapsed());
    }

    #[tokio::test]
    async fn spans_wait_for_an_endpoint_that_comes_back() {
        let (collector, address) = Collector::start(Code::Unavailable).await;
        let target = target(&format!("http://{address}")).unwrap().unwrap();
        let pipeline = Pipeline::start(&[Output::Otlp(target)]).unwrap();
        pipeline.send((0..600).map(|id| span(1, id + 1, 0, "s", 0, 1)).collect());
        tokio::time::sleep(Duration::from_millis(1500)).await;
        *collector.answer.lock().unwrap() = Code::Ok;
        let report = pipeline.shutdown(Finish::default()).await.remove(0);
        assert_eq!((report.sent, report.failed), (600, 0), "{report}");
        assert_eq!(collector.spans(), 600);
    }

    #[tokio::test]
    async fn spans_that_are_refused_are_not_sent_again() {
        let (collector, address) = Collector::start(Code::Unauthenticated).await;
        let begin = Instant::now();
        let report = run(&format!("http://{address}"), 10, Finish::default()).await;
        assert_eq!((report.sent, report.failed), (0, 10));
        assert_eq!(report.error.as_deref(), Some("Unauthenticated"));
        assert_eq!(collector.spans(), 0);
        assert!(begin.elapsed() < Duration::from_secs(2));
    }

    #[tokio::test]
    async fn an_endpoint_that_never_answers_does_not_hold_up_the_end() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let begin = Instant::now();
        let finish = Finish { deadline: Duration::from_millis(300), lost_events: 0 };
        let report = run(&format!("http://{address}"), 10, finish).await;
        assert_eq!((report.sent, report.failed), (0, 10));
        assert!(begin.elapsed() < Duration::from_secs(2));
        drop(listener);
    }

    #[test]
    fn the_option_wins_over_the_variables_and_the_specific_variable_over_the_general() {
        let env = |name: &str| match name {
            "OTEL_EXPORTER_OTLP_ENDPOINT" => Some("http://general:4317".to_owned()),
            "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT" => Some("http://traces:4317".to_owned()),
            "OTEL_EXPORTER_OTLP_TIMEOUT" => Some("1500".to_owned()),
            _ => None,
        };
        let resolve = |option| OtlpTarget::resolve_from(option, env).unwrap().unwrap();
        assert_eq!(resolve(Some("http://option:1")).endpoint(), "http://option:1");
        assert_eq!(resolve(None).endpoint(), "http://traces:4317");
        assert_eq!(resolve(None).timeout, Duration::from_millis(1500));
        let general = |name: &str| {
            if name.contains("TRACES") { Some(" ".to_owned()) } else { env(name) }
        };
        assert_eq!(OtlpTarget::resolve_from(None, general).unwrap().unwrap().endpoint(), "http://general:4317");
        assert!(OtlpTarget::resolve_from(None, |_| None).unwrap().is_none());
        let insecure = |name: &str| (name == "OTEL_EXPORTER_OTLP_INSECURE").then(|| "true".to_owned());
        let target = OtlpTarget::resolve_from(Some("collector:4317"), insecure).unwrap().unwrap();
        assert_eq!(target.endpoint(), "http://collector:4317");
    }

    #[test]
    fn an_endpoint_that_is_no_url_is_refused_with_one_that_would_do() {
        for (endpoint, problem) in [
            (
                "localhost:4317",
                "OTLP endpoint `localhost:4317` (--otlp): expected a URL such as `http://localhost:4317`",
            ),
            ("grpc://x:1", "expected a URL such as `http://x:1`, not `grpc`"),
            ("https://x:1", "TLS is not supported yet"),
            ("http://", "it is not a URL"),
            ("http://a b", "it is not a URL"),
            ("", "expected a URL"),
        ] {
            let error = target(endpoint).expect_err(endpoint).to_string();
            assert!(error.contains(problem), "{error}");
        }
    }
}
