//! Against collectors that behave in every way there is: nothing is lost while there is room, what is lost is counted.
//!
//! What arrives is read with the generated server of OpenTelemetry's protobuf definitions, or from JSON; the way there is
//! `transport`'s own.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use flate2::read::GzDecoder;
use opentelemetry_proto::tonic::collector::logs::v1::ExportLogsServiceRequest;
use opentelemetry_proto::tonic::collector::metrics::v1::ExportMetricsServiceRequest;
use opentelemetry_proto::tonic::collector::trace::v1::trace_service_server::{TraceService, TraceServiceServer};
use opentelemetry_proto::tonic::collector::trace::v1::{
    ExportTracePartialSuccess, ExportTraceServiceRequest, ExportTraceServiceResponse,
};
use opentelemetry_proto::tonic::common::v1::{AnyValue, any_value};
use opentelemetry_proto::tonic::logs::v1::LogRecord;
use opentelemetry_proto::tonic::metrics::v1::{metric, number_data_point};
use prost::Message as _;
use rustls::pki_types::pem::PemObject as _;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::Instant;
use tonic::codec::CompressionEncoding;
use tonic::transport::server::TcpIncoming;
use tonic::transport::{Certificate, Identity, Server, ServerTlsConfig};
use tonic::{Code, Request, Response, Status};
use tonic_types::StatusExt as _;

use crate::export::otlp::{Batching, Endpoint, OtlpTarget, Protocol};
use crate::export::pipeline::{ExportReport, Finish, Pipeline, QueueBounds};
use crate::export::redact::RedactionRules;
use crate::export::tree::tests::span;
use crate::export::{Output, log_request, request};
use crate::trace::{FinishedLog, FinishedSpan, ProcessFacts};
use crate::units::{Epoch, Pid};

/// What a collector answers: the next of the list, then success.
type Script = Arc<Mutex<Vec<Status>>>;

/// A gRPC collector.
#[derive(Clone, Default)]
pub(super) struct Grpc {
    pub(super) requests: Arc<Mutex<Vec<ExportTraceServiceRequest>>>,
    headers: Arc<Mutex<Vec<String>>>,
    script: Script,
    /// It answers nothing but this, if there is something.
    pub(super) always: Arc<Mutex<Option<Status>>>,
    rejects: Arc<Mutex<Option<ExportTracePartialSuccess>>>,
    attempts: Arc<AtomicUsize>,
    delay: Duration,
}

#[tonic::async_trait]
impl TraceService for Grpc {
    async fn export(
        &self,
        request: Request<ExportTraceServiceRequest>,
    ) -> Result<Response<ExportTraceServiceResponse>, Status> {
        self.attempts.fetch_add(1, Ordering::Relaxed);
        tokio::time::sleep(self.delay).await;
        if let Some(status) = self.always.lock().unwrap().clone() {
            return Err(status);
        }
        let next = self.script.lock().unwrap().pop();
        if let Some(status) = next {
            return Err(status);
        }
        for name in ["authorization", "x-api-key", "grpc-encoding", "user-agent"] {
            let value = request.metadata().get(name).map(|value| value.to_str().unwrap().to_owned());
            self.headers.lock().unwrap().push(format!("{name}: {}", value.unwrap_or_default()));
        }
        self.requests.lock().unwrap().push(request.into_inner());
        Ok(Response::new(ExportTraceServiceResponse { partial_success: self.rejects.lock().unwrap().clone() }))
    }
}

impl Grpc {
    pub(super) async fn start(self) -> (Self, SocketAddr) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        self.serve(listener, None);
        tokio::task::yield_now().await;
        (self, address)
    }

    pub(super) fn serve(&self, listener: TcpListener, tls: Option<ServerTlsConfig>) {
        let service = TraceServiceServer::new(self.clone()).accept_compressed(CompressionEncoding::Gzip);
        let mut server = Server::builder();
        if let Some(tls) = tls {
            server = server.tls_config(tls).unwrap();
        }
        tokio::spawn(server.add_service(service).serve_with_incoming(TcpIncoming::from(listener)));
    }

    fn spans(&self) -> usize {
        self.requests.lock().unwrap().iter().map(count).sum()
    }
}

pub(super) fn count(request: &ExportTraceServiceRequest) -> usize {
    let scopes = request.resource_spans.iter().flat_map(|resource| &resource.scope_spans);
    scopes.map(|scope| scope.spans.len()).sum()
}

/// A request as an HTTP collector reads it.
#[derive(Clone, Debug, Default)]
pub(super) struct Received {
    pub(super) path: String,
    headers: String,
    pub(super) body: Vec<u8>,
}

/// An HTTP collector: gives the answers of the list, the last one again and again; an empty answer resets the connection.
#[derive(Clone, Default)]
pub(super) struct Http {
    pub(super) received: Arc<Mutex<Vec<Received>>>,
    answers: Arc<Mutex<Vec<String>>>,
}

pub(super) fn answer(status: &str, headers: &str, body: &str) -> String {
    format!("HTTP/1.1 {status}\r\n{headers}Content-Length: {}\r\n\r\n{body}", body.len())
}

impl Http {
    pub(super) async fn start(answers: &[String]) -> (Self, SocketAddr) {
        let http = Self { received: Arc::default(), answers: Arc::new(Mutex::new(answers.to_vec())) };
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let this = http.clone();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(this.clone().connection(stream));
            }
        });
        (http, address)
    }

    async fn connection(self, mut stream: impl AsyncRead + AsyncWrite + Unpin) {
        loop {
            let Some(received) = read(&mut stream).await else {
                return;
            };
            let answer = {
                let mut answers = self.answers.lock().unwrap();
                if answers.len() > 1 { answers.remove(0) } else { answers[0].clone() }
            };
            if answer.starts_with("HTTP/1.1 200") {
                self.received.lock().unwrap().push(received);
            }
            if answer.is_empty() || stream.write_all(answer.as_bytes()).await.is_err() {
                return;
            }
        }
    }
}

async fn read(stream: &mut (impl AsyncRead + Unpin)) -> Option<Received> {
    let mut bytes = Vec::new();
    let end = loop {
        if let Some(end) = bytes.windows(4).position(|window| window == b"\r\n\r\n") {
            break end + 4;
        }
        if stream.read_buf(&mut bytes).await.ok()? == 0 {
            return None;
        }
    };
    let head = String::from_utf8_lossy(&bytes[..end]).to_lowercase();
    let header =
        |name: &str| head.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": ").map(str::to_owned));
    let length: usize = header("content-length")?.parse().ok()?;
    while bytes.len() < end + length {
        if stream.read_buf(&mut bytes).await.ok()? == 0 {
            return None;
        }
    }
    let mut body = bytes[end..].to_vec();
    if header("content-encoding").as_deref() == Some("gzip") {
        let mut plain = Vec::new();
        std::io::Read::read_to_end(&mut GzDecoder::new(&*body), &mut plain).ok()?;
        body = plain;
    }
    let path = head.split(' ').nth(1).unwrap_or_default().to_owned();
    Some(Received { path, headers: head, body })
}

pub(super) fn endpoint(url: &str, protocol: Protocol) -> Endpoint {
    Endpoint::new(url, "--otlp", protocol).unwrap()
}

pub(super) fn pipeline(endpoint: Endpoint, bounds: QueueBounds) -> Pipeline {
    let target = OtlpTarget {
        logs: Some(Endpoint { url: endpoint.url.replace("traces", "logs"), ..endpoint.clone() }),
        traces: Some(endpoint),
        metrics: None,
        batching: Batching { items: 512, delay: Duration::from_millis(50) },
        log_batching: Batching { items: 512, delay: Duration::from_millis(50) },
        metrics_interval: Duration::from_mins(1),
    };
    Pipeline::start(&[Output::Otlp(Box::new(target))], bounds, RedactionRules::default()).unwrap()
}

pub(super) fn spans(count: u64) -> Vec<FinishedSpan> {
    (0..count).map(|id| span(1, id + 1, 0, "s", 0, 1)).collect()
}

pub(super) async fn run(endpoint: Endpoint, count: u64, finish: Finish) -> ExportReport {
    let pipeline = pipeline(endpoint, QueueBounds::default());
    pipeline.send(spans(count));
    pipeline.shutdown(finish).await.remove(0)
}

async fn grpc(address: SocketAddr, count: u64) -> ExportReport {
    run(endpoint(&format!("http://{address}"), Protocol::Grpc), count, Finish::default()).await
}

pub(super) fn within(milliseconds: u64) -> Finish {
    Finish { deadline: Duration::from_millis(milliseconds), ..Finish::default() }
}

pub(crate) async fn free_port() -> SocketAddr {
    TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap()
}

pub(crate) async fn eventually(what: impl Fn() -> bool) {
    for _ in 0..400 {
        if what() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(25)).await;
    }
    panic!("not within 10 seconds");
}

#[tokio::test]
async fn spans_arrive_under_their_resources() {
    let (collector, address) = Grpc::default().start().await;
    let pipeline = pipeline(endpoint(&format!("http://{address}"), Protocol::Grpc), QueueBounds::default());
    let other = Arc::new(ProcessFacts::unknown(Pid(9), Epoch(9)).resource());
    let mut batch = spans(1300);
    for span in batch.iter_mut().step_by(2) {
        span.resource = Arc::clone(&other);
    }
    pipeline.send(batch);
    let report = pipeline.shutdown(Finish::default()).await.remove(0);
    assert_eq!((report.spans.sent, report.complete(), report.error.clone()), (1300, true, None), "{report}");
    assert_eq!(collector.spans(), 1300);
    let requests = collector.requests.lock().unwrap();
    assert!(requests.iter().all(|request| request.resource_spans.len() == 2 && count(request) <= 512));
    assert!(collector.headers.lock().unwrap().iter().any(|header| header.starts_with("user-agent: floe-agent/")));
}

#[tokio::test]
async fn headers_and_compression_are_used_over_grpc() {
    let (collector, address) = Grpc::default().start().await;
    let mut endpoint = endpoint(&format!("http://{address}"), Protocol::Grpc);
    endpoint.gzip = true;
    endpoint.headers.set("Authorization", "Bearer x").unwrap();
    endpoint.headers.set("X-Api-Key", "k").unwrap();
    let report = run(endpoint, 600, Finish::default()).await;
    assert_eq!((report.spans.sent, collector.spans()), (600, 600), "{report}");
    let headers = collector.headers.lock().unwrap();
    for header in ["authorization: Bearer x", "x-api-key: k", "grpc-encoding: gzip"] {
        assert!(headers.contains(&header.to_owned()), "{headers:?}");
    }
}

#[tokio::test]
async fn http_carries_the_same_messages_as_protobuf_and_as_json_plain_and_compressed() {
    for (protocol, content, gzip) in [
        (Protocol::HttpProtobuf, "application/x-protobuf", false),
        (Protocol::HttpProtobuf, "application/x-protobuf", true),
        (Protocol::HttpJson, "application/json", true),
    ] {
        let (collector, address) = Http::start(&[answer("200 OK", "", "")]).await;
        let mut endpoint = endpoint(&format!("http://{address}/v1/traces"), protocol);
        endpoint.gzip = gzip;
        endpoint.headers.set("x-api-key", "k").unwrap();
        let pipeline = pipeline(endpoint, QueueBounds::default());
        pipeline.send(spans(3));
        let log = FinishedLog {
            resource: spans(1).remove(0).resource,
            scope: opentelemetry::InstrumentationScope::builder("dbt").build(),
            record: LogRecord {
                body: Some(AnyValue { value: Some(any_value::Value::StringValue("hello".into())) }),
                ..LogRecord::default()
            },
        };
        pipeline.send_logs(vec![log.clone()]);
        let report = pipeline.shutdown(Finish::default()).await.remove(0);
        assert_eq!((report.spans.sent, report.logs.sent, report.complete()), (3, 1, true), "{report}");
        let received = collector.received.lock().unwrap();
        for Received { path, headers, body } in &*received {
            assert!(headers.contains(&format!("content-type: {content}\r\n")), "{headers}");
            assert!(headers.contains("x-api-key: k"));
            assert_eq!(headers.contains("content-encoding: gzip"), gzip);
            if path == "/v1/traces" {
                let decoded = match protocol {
                    Protocol::HttpJson => serde_json::from_slice(body).unwrap(),
                    _ => ExportTraceServiceRequest::decode(&**body).unwrap(),
                };
                assert_eq!(decoded, request(spans(3)));
            } else {
                assert_eq!(path, "/v1/logs");
                let decoded = match protocol {
                    Protocol::HttpJson => serde_json::from_slice(body).unwrap(),
                    _ => ExportLogsServiceRequest::decode(&**body).unwrap(),
                };
                assert_eq!(decoded, log_request([log.clone()]));
            }
        }
        assert_eq!(received.len(), 2);
    }
}

#[tokio::test(start_paused = true)]
async fn an_endpoint_that_cannot_be_reached_loses_spans_in_bounded_time_and_they_are_counted() {
    for protocol in [Protocol::Grpc, Protocol::HttpProtobuf] {
        let begin = Instant::now();
        let report = run(endpoint(&format!("http://{}", free_port().await), protocol), 10, Finish::default()).await;
        assert_eq!((report.spans.sent, report.spans.failed, report.spans.dropped), (0, 10, 0));
        assert!(report.error.as_deref().unwrap().contains("Connection refused"), "{report}");
        assert!(begin.elapsed() < Duration::from_secs(4), "{:?}", begin.elapsed());
    }
}

#[tokio::test]
async fn a_collector_that_is_down_at_the_start_and_in_the_middle_gets_everything_when_it_is_there() {
    let address = free_port().await;
    let pipeline = pipeline(endpoint(&format!("http://{address}"), Protocol::Grpc), QueueBounds::default());
    pipeline.send(spans(700));
    tokio::time::sleep(Duration::from_millis(300)).await;
    let collector = Grpc::default();
    collector.serve(TcpListener::bind(address).await.unwrap(), None);
    eventually(|| collector.spans() == 700).await;
    *collector.always.lock().unwrap() = Some(Status::unavailable("restarting"));
    pipeline.send(spans(800));
    eventually(|| collector.attempts.load(Ordering::Relaxed) > 4).await;
    *collector.always.lock().unwrap() = None;
    eventually(|| collector.spans() == 1500).await;
    let report = pipeline.shutdown(Finish::default()).await.remove(0);
    assert_eq!((report.spans.sent, report.complete()), (1500, true), "{report}");
}

#[tokio::test]
async fn what_the_queue_has_no_room_for_is_counted_and_the_rest_arrives() {
    let address = free_port().await;
    let bounds = QueueBounds { spans: 1000, ..QueueBounds::default() };
    let pipeline = pipeline(endpoint(&format!("http://{address}"), Protocol::Grpc), bounds);
    for _ in 0..5 {
        pipeline.send(spans(400));
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert_eq!(pipeline.reports()[0].spans.dropped, 1000);
    let collector = Grpc::default();
    collector.serve(TcpListener::bind(address).await.unwrap(), None);
    eventually(|| collector.spans() == 1000).await;
    let report = pipeline.shutdown(Finish::default()).await.remove(0);
    assert_eq!((report.spans.sent, report.spans.failed, report.spans.dropped), (1000, 0, 1000), "{report}");
}

#[tokio::test]
async fn the_queue_is_bounded_in_bytes_and_all_of_them_are_given_back() {
    let (collector, address) = Grpc::default().start().await;
    let one = crate::export::batch::Weigh::weight(&spans(1)[0]);
    let bounds = QueueBounds { spans: 1_000_000, bytes: 100 * one, ..QueueBounds::default() };
    let pipeline = pipeline(endpoint(&format!("http://{address}"), Protocol::Grpc), bounds);
    pipeline.send(spans(150));
    eventually(|| collector.spans() == 100).await;
    // If bytes were lost on the way there would be no room any more.
    for round in 2..20 {
        eventually(|| pipeline.reports()[0].spans.failed == 0).await;
        pipeline.send(spans(100));
        eventually(|| collector.spans() == round * 100).await;
    }
    let report = pipeline.shutdown(Finish::default()).await.remove(0);
    assert_eq!((report.spans.sent, report.spans.dropped), (1900, 50), "{report}");
}

#[tokio::test]
async fn a_slow_collector_gets_everything() {
    let (collector, address) = Grpc { delay: Duration::from_millis(300), ..Grpc::default() }.start().await;
    let report = grpc(address, 3000).await;
    assert_eq!((report.spans.sent, collector.spans()), (3000, 3000), "{report}");
}

#[tokio::test(start_paused = true)]
async fn an_endpoint_that_never_answers_does_not_hold_up_the_end() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    for protocol in [Protocol::Grpc, Protocol::HttpJson] {
        let begin = Instant::now();
        let report = run(endpoint(&format!("http://{address}"), protocol), 10, within(300)).await;
        assert_eq!((report.spans.sent, report.spans.failed), (0, 10));
        assert!(begin.elapsed() < Duration::from_secs(2));
    }
}

#[tokio::test]
async fn a_request_without_an_answer_is_sent_again_after_its_time_out() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let mut endpoint = endpoint(&format!("http://{address}"), Protocol::HttpProtobuf);
    endpoint.timeout = Duration::from_millis(200);
    let pipeline = pipeline(endpoint, QueueBounds::default());
    pipeline.send(spans(3));
    let (mut silent, _) = listener.accept().await.unwrap();
    assert!(read(&mut silent).await.is_some());
    let (mut second, _) = listener.accept().await.unwrap();
    assert!(read(&mut second).await.is_some());
    second.write_all(answer("200 OK", "", "").as_bytes()).await.unwrap();
    let report = pipeline.shutdown(Finish::default()).await.remove(0);
    assert_eq!((report.spans.sent, report.error.as_deref()), (3, Some("no answer within 200ms")), "{report}");
}

#[tokio::test]
async fn codes_that_may_be_tried_again_are_and_others_are_not() {
    let retry_info = tonic_types::ErrorDetails::with_retry_info(Some(Duration::from_millis(10)));
    let throttled = Status::with_error_details(Code::ResourceExhausted, "slowly", retry_info);
    for status in [Status::aborted("a"), Status::data_loss("d"), throttled] {
        let (collector, address) = Grpc::default().start().await;
        collector.script.lock().unwrap().push(status);
        let report = grpc(address, 10).await;
        assert_eq!((report.spans.sent, report.spans.failed, collector.spans()), (10, 0, 10), "{report}");
    }
    for status in [Status::unauthenticated("who"), Status::resource_exhausted("full"), Status::invalid_argument("no")] {
        let (collector, address) = Grpc::default().start().await;
        collector.script.lock().unwrap().push(status.clone());
        let report = grpc(address, 10).await;
        assert_eq!((report.spans.sent, report.spans.failed, collector.spans()), (0, 10, 0), "{report}");
        let error = format!("{:?}: {}", status.code(), status.message());
        assert_eq!(report.error.as_deref(), Some(&*error));
        assert_eq!(collector.attempts.load(Ordering::Relaxed), 1);
    }
}

#[tokio::test(start_paused = true)]
async fn a_server_that_wants_to_be_left_alone_is_left_alone_for_so_long() {
    for status in ["429 Too Many Requests", "503 Service Unavailable"] {
        let answers = [answer(status, "Retry-After: 2\r\n", ""), answer("200 OK", "", "")];
        let (collector, address) = Http::start(&answers).await;
        let begin = Instant::now();
        let url = format!("http://{address}/v1/traces");
        let report = run(endpoint(&url, Protocol::HttpProtobuf), 10, Finish::default()).await;
        let waited = begin.elapsed();
        assert_eq!((report.spans.sent, collector.received.lock().unwrap().len()), (10, 1), "{report}");
        assert!((Duration::from_secs(2)..Duration::from_millis(4500)).contains(&waited), "{waited:?}");
        assert_eq!(report.error.as_deref(), Some(&*format!("HTTP {status}")));
    }
    // Longer than there is time: the end is not held up.
    let (_, address) = Http::start(&[answer("503 Service Unavailable", "Retry-After: 100\r\n", "")]).await;
    let begin = Instant::now();
    let report = run(endpoint(&format!("http://{address}"), Protocol::HttpProtobuf), 10, Finish::default()).await;
    assert_eq!(report.spans.failed, 10);
    assert!(begin.elapsed() < Duration::from_secs(3));
}

#[tokio::test]
async fn http_refusals_are_final_and_say_why() {
    let message = |text: &str| tonic_types::pb::Status { message: text.into(), ..Default::default() }.encode_to_vec();
    let body = String::from_utf8(message("bad key")).unwrap();
    for (status, protocol, body, error) in [
        ("401 Unauthorized", Protocol::HttpProtobuf, body.as_str(), "HTTP 401 Unauthorized: bad key"),
        ("400 Bad Request", Protocol::HttpJson, r#"{"message": "no trace id"}"#, "HTTP 400 Bad Request: no trace id"),
        ("404 Not Found", Protocol::HttpJson, "<html>", "HTTP 404 Not Found"),
        ("301 Moved Permanently", Protocol::HttpJson, "", "HTTP 301 Moved Permanently"),
    ] {
        let (_, address) = Http::start(&[answer(status, "", body)]).await;
        let report = run(endpoint(&format!("http://{address}"), protocol), 10, Finish::default()).await;
        assert_eq!((report.spans.failed, report.error.as_deref()), (10, Some(error)), "{report}");
    }
}

#[tokio::test]
async fn partial_success_is_counted_and_not_sent_again() {
    let (collector, address) = Grpc::default().start().await;
    *collector.rejects.lock().unwrap() =
        Some(ExportTracePartialSuccess { rejected_spans: 4, error_message: "too old".into() });
    let report = grpc(address, 10).await;
    assert_eq!((report.spans.sent, report.spans.failed), (6, 4));
    assert_eq!(report.error.as_deref(), Some("4 spans refused: too old"));
    assert_eq!(collector.attempts.load(Ordering::Relaxed), 1);

    let json = r#"{"partialSuccess": {"rejectedSpans": "3", "errorMessage": "x"}}"#;
    let (_, address) = Http::start(&[answer("200 OK", "", json)]).await;
    let report = run(endpoint(&format!("http://{address}"), Protocol::HttpJson), 10, Finish::default()).await;
    assert_eq!((report.spans.sent, report.spans.failed), (7, 3), "{report}");

    // A warning rejects nothing.
    let warning = ExportTraceServiceResponse {
        partial_success: Some(ExportTracePartialSuccess { rejected_spans: 0, error_message: "soon full".into() }),
    };
    let body = String::from_utf8(warning.encode_to_vec()).unwrap();
    let (_, address) = Http::start(&[answer("200 OK", "", &body)]).await;
    let report = run(endpoint(&format!("http://{address}"), Protocol::HttpProtobuf), 10, Finish::default()).await;
    assert_eq!((report.spans.sent, report.spans.failed), (10, 0), "{report}");
}

#[tokio::test]
async fn a_connection_that_is_reset_is_made_anew() {
    let answers = [String::new(), String::new(), answer("200 OK", "", "")];
    let (collector, address) = Http::start(&answers).await;
    let pipeline = pipeline(endpoint(&format!("http://{address}"), Protocol::HttpProtobuf), QueueBounds::default());
    pipeline.send(spans(10));
    eventually(|| collector.received.lock().unwrap().len() == 1).await;
    let report = pipeline.shutdown(Finish::default()).await.remove(0);
    assert_eq!((report.spans.sent, report.spans.failed), (10, 0), "{report}");
}

#[tokio::test]
async fn the_wrong_protocol_on_the_port_is_a_failure_that_may_pass() {
    // gRPC to an HTTP/1 server, and HTTP/1 to a gRPC server.
    let (http, http_address) = Http::start(&[answer("200 OK", "", "")]).await;
    let report = run(endpoint(&format!("http://{http_address}"), Protocol::Grpc), 10, within(3000)).await;
    assert_eq!((report.spans.sent, report.spans.failed), (0, 10), "{report}");
    assert!(http.received.lock().unwrap().is_empty());
    let (collector, address) = Grpc::default().start().await;
    let pipeline = pipeline(endpoint(&format!("http://{address}"), Protocol::HttpProtobuf), QueueBounds::default());
    pipeline.send(spans(10));
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert_eq!((pipeline.reports()[0].spans.failed, collector.spans()), (10, 0), "they wait");
    assert!(pipeline.reports()[0].error.is_some());
    pipeline.shutdown(within(100)).await;
}

#[tokio::test]
async fn the_counters_are_exported_as_metrics() {
    let (collector, address) = Http::start(&[answer("200 OK", "", "")]).await;
    let endpoint = |signal: &str| endpoint(&format!("http://{address}/v1/{signal}"), Protocol::HttpProtobuf);
    let target = OtlpTarget {
        traces: Some(endpoint("traces")),
        logs: None,
        metrics: Some(endpoint("metrics")),
        batching: Batching::default(),
        log_batching: Batching::default(),
        metrics_interval: Duration::from_hours(1),
    };
    let bounds = QueueBounds { spans: 7, ..QueueBounds::default() };
    let pipeline = Pipeline::start(&[Output::Otlp(Box::new(target))], bounds, RedactionRules::default()).unwrap();
    pipeline.send(spans(10));
    pipeline.shutdown(Finish::default()).await;
    let received = collector.received.lock().unwrap();
    let metrics = received.iter().find(|received| received.path == "/v1/metrics").unwrap();
    let metrics = ExportMetricsServiceRequest::decode(&*metrics.body).unwrap();
    let metrics = &metrics.resource_metrics[0].scope_metrics[0].metrics;
    let exported = metrics.iter().find(|metric| metric.name == "otel.sdk.exporter.span.exported").unwrap();
    let Some(metric::Data::Sum(sum)) = &exported.data else { panic!() };
    let values: Vec<_> = sum.data_points.iter().map(|point| point.value).collect();
    assert_eq!(values, [7, 0, 3].map(|value| Some(number_data_point::Value::AsInt(value))));
}

/// An authority, and a certificate and key of its for `localhost`.
pub(crate) fn authority() -> (String, String, String) {
    let mut parameters = rcgen::CertificateParams::new(Vec::new()).unwrap();
    parameters.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    let key = rcgen::KeyPair::generate().unwrap();
    let authority = parameters.self_signed(&key).unwrap();
    let issuer = rcgen::Issuer::new(parameters, key);
    let key = rcgen::KeyPair::generate().unwrap();
    let leaf = rcgen::CertificateParams::new(vec!["localhost".to_owned()]).unwrap().signed_by(&key, &issuer).unwrap();
    (authority.pem(), leaf.pem(), key.serialize_pem())
}

#[tokio::test]
async fn tls_with_an_own_authority_and_client_certificates() {
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| {
        let path = folder.path().join(name);
        std::fs::write(&path, text).unwrap();
        path
    };
    let (ca, certificate, key) = authority();
    let (other, ..) = authority();
    let (ca_file, other_file) = (write("ca", &ca), write("other", &other));
    let client = (write("certificate", &certificate), write("key", &key));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let collector = Grpc::default();
    let tls = ServerTlsConfig::new()
        .identity(Identity::from_pem(&certificate, &key))
        .client_ca_root(Certificate::from_pem(&ca));
    collector.serve(listener, Some(tls));
    let endpoint =
        |ca: Option<&std::path::PathBuf>, client: Option<&(std::path::PathBuf, std::path::PathBuf)>| Endpoint {
            certificate: ca.cloned(),
            client: client.cloned(),
            ..endpoint(&format!("https://localhost:{port}"), Protocol::Grpc)
        };
    let report = run(endpoint(Some(&ca_file), Some(&client)), 10, Finish::default()).await;
    assert_eq!((report.spans.sent, collector.spans()), (10, 10), "{report}");

    // The wrong authority, no client certificate: spans wait, then are counted.
    let report = run(endpoint(Some(&other_file), Some(&client)), 10, within(1500)).await;
    assert_eq!((report.spans.sent, report.spans.failed), (0, 10), "{report}");
    assert!(report.error.as_deref().unwrap().contains("certificate"), "{report}");
    let report = run(endpoint(Some(&ca_file), None), 10, within(1500)).await;
    assert_eq!((report.spans.sent, report.spans.failed), (0, 10), "{report}");

    let missing = folder.path().join("missing");
    let target = OtlpTarget {
        traces: Some(endpoint(Some(&missing), None)),
        logs: None,
        metrics: None,
        batching: Batching::default(),
        log_batching: Batching::default(),
        metrics_interval: Duration::from_mins(1),
    };
    let outputs = [Output::Otlp(Box::new(target))];
    let error = Pipeline::start(&outputs, QueueBounds::default(), RedactionRules::default()).unwrap_err().to_string();
    assert!(error.contains("--otlp") && error.contains("cannot read the certificate"), "{error}");
}

#[tokio::test]
async fn tls_over_http() {
    let folder = tempfile::tempdir().unwrap();
    let (ca, certificate, key) = authority();
    let (other, ..) = authority();
    for (name, text) in [("ca", &ca), ("other", &other)] {
        std::fs::write(folder.path().join(name), text).unwrap();
    }
    let _ = rustls::crypto::ring::default_provider().install_default();
    let chain = rustls::pki_types::CertificateDer::from_pem_slice(certificate.as_bytes()).unwrap();
    let key = rustls::pki_types::PrivateKeyDer::from_pem_slice(key.as_bytes()).unwrap();
    let tls = rustls::ServerConfig::builder().with_no_client_auth().with_single_cert(vec![chain], key).unwrap();
    let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(tls));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let http = Http { answers: Arc::new(Mutex::new(vec![answer("200 OK", "", "")])), ..Http::default() };
    let this = http.clone();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let stream: TcpStream = stream;
            if let Ok(stream) = acceptor.accept(stream).await {
                tokio::spawn(this.clone().connection(stream));
            }
        }
    });
    let endpoint = |ca: &str| Endpoint {
        certificate: Some(folder.path().join(ca)),
        ..endpoint(&format!("https://localhost:{port}/v1/traces"), Protocol::HttpProtobuf)
    };
    let report = run(endpoint("ca"), 10, Finish::default()).await;
    assert_eq!((report.spans.sent, http.received.lock().unwrap().len()), (10, 1), "{report}");
    let report = run(endpoint("other"), 10, within(1500)).await;
    assert_eq!((report.spans.sent, report.spans.failed), (0, 10), "{report}");
    assert!(report.error.as_deref().unwrap().contains("invalid peer certificate"), "{report}");
}
