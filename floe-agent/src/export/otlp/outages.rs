//! Outages of minutes, on a clock that goes on whenever there is nothing to do; and connections that cannot work.

use std::collections::BTreeSet;
use std::io::Write;
use std::net::SocketAddr;
use std::ops::Range;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use hyper_util::client::proxy::matcher::Matcher;
use opentelemetry_proto::tonic::collector::metrics::v1::ExportMetricsServiceRequest;
use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceRequest;
use opentelemetry_proto::tonic::metrics::v1::{metric, number_data_point};
use prost::Message as _;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, copy_bidirectional};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::sleep;
use tonic::transport::{Identity, ServerTlsConfig};

use super::tests::{Grpc, Http, answer, authority, count, endpoint, free_port, pipeline, run, within};
use super::transport::{Answer, Signal, Transport};
use super::{Batching, Endpoint, OtlpTarget, Protocol};
use crate::export::pipeline::{Finish, Pipeline, QueueBounds};
use crate::export::redact::RedactionRules;
use crate::export::tree::tests::span;
use crate::export::{Output, request};
use crate::trace::FinishedSpan;

/// Spans of a second.
const RATE: u64 = 50;

/// The way to a collector, which can be cut.
struct Network {
    address: SocketAddr,
    to: SocketAddr,
    open: Option<JoinHandle<()>>,
}

impl Network {
    async fn new(to: SocketAddr) -> Self {
        let mut network = Self { address: free_port().await, to, open: None };
        network.mend().await;
        network
    }

    /// Connections are reset, and new ones refused.
    fn cut(&mut self) {
        self.open.take().unwrap().abort();
    }

    async fn mend(&mut self) {
        let listener = TcpListener::bind(self.address).await.unwrap();
        let to = self.to;
        self.open = Some(tokio::spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((mut near, _)) = listener.accept().await {
                near.set_zero_linger().unwrap();
                connections.spawn(async move {
                    let mut far = TcpStream::connect(to).await.unwrap();
                    let _ = copy_bidirectional(&mut near, &mut far).await;
                });
            }
        }));
    }
}

/// Spans with these ids.
fn spans(ids: Range<u64>) -> Vec<FinishedSpan> {
    ids.map(|id| span(1, id + 1, 0, "s", 0, 1)).collect()
}

/// What arrived: a request of which the answer was lost comes twice.
fn ids<'a>(requests: impl IntoIterator<Item = &'a ExportTraceServiceRequest>) -> BTreeSet<Vec<u8>> {
    let resources = requests.into_iter().flat_map(|request| &request.resource_spans);
    let spans = resources.flat_map(|resource| &resource.scope_spans).flat_map(|scope| &scope.spans);
    spans.map(|span| span.span_id.clone()).collect()
}

async fn in_minutes(what: impl Fn() -> bool) {
    for _ in 0..6000 {
        if what() {
            return;
        }
        sleep(Duration::from_millis(100)).await;
    }
    panic!("not within 10 minutes");
}

#[tokio::test(start_paused = true)]
async fn a_collector_that_is_away_for_two_minutes_gets_everything() {
    for protocol in [Protocol::Grpc, Protocol::HttpProtobuf] {
        let (grpc, grpc_address) = Grpc::default().start().await;
        let (http, http_address) = Http::start(&[answer("200 OK", "", "")]).await;
        let mut network = Network::new(if protocol == Protocol::Grpc { grpc_address } else { http_address }).await;
        let arrived = || {
            let received = http.received.lock().unwrap();
            let over_http = received.iter().map(|received| ExportTraceServiceRequest::decode(&*received.body).unwrap());
            ids(grpc.requests.lock().unwrap().iter().chain(&over_http.collect::<Vec<_>>())).len() as u64
        };
        let url = format!("http://{}/v1/traces", network.address);
        let pipeline = pipeline(endpoint(&url, protocol), QueueBounds::default());
        let (away, back, end) = (20, 140, 180);
        let mut before = 0;
        for second in 0..end {
            if second == away {
                before = arrived();
                network.cut();
            } else if second == back {
                assert!(arrived() < before + 3 * RATE, "nothing gets through");
                network.mend().await;
            }
            pipeline.send(spans(second * RATE..(second + 1) * RATE));
            sleep(Duration::from_secs(1)).await;
        }
        in_minutes(|| arrived() == end * RATE).await;
        let report = pipeline.shutdown(Finish::default()).await.remove(0);
        assert!(before > 0 && report.error.is_some(), "{report}");
        assert_eq!((report.spans.sent, report.complete()), (end * RATE, true), "{report}");
    }
}

/// The agent's log.
#[derive(Clone, Default)]
struct Said(Arc<Mutex<Vec<u8>>>);

impl Write for Said {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// How many spans there was no room for, as a request of metrics says.
fn lost(body: &[u8]) -> i64 {
    let request = ExportMetricsServiceRequest::decode(body).unwrap();
    let metrics = &request.resource_metrics[0].scope_metrics[0].metrics;
    let exported = metrics.iter().find(|metric| metric.name == "otel.sdk.exporter.span.exported").unwrap();
    let Some(metric::Data::Sum(sum)) = &exported.data else { panic!("{exported:?}") };
    let full = sum.data_points.iter().find(|point| format!("{:?}", point.attributes).contains("queue_full")).unwrap();
    let Some(number_data_point::Value::AsInt(lost)) = full.value else { panic!("{full:?}") };
    lost
}

#[tokio::test(start_paused = true)]
async fn what_a_long_outage_has_no_room_for_is_counted_logged_once_a_minute_and_exported_as_a_metric() {
    let said = Said::default();
    let writer = said.clone();
    let log = tracing_subscriber::fmt().with_ansi(false).with_writer(move || writer.clone()).finish();
    let _log = tracing::subscriber::set_default(log);
    let (collector, address) = Grpc::default().start().await;
    let (metrics, metrics_address) = Http::start(&[answer("200 OK", "", "")]).await;
    let mut network = Network::new(address).await;
    network.cut();
    let target = OtlpTarget {
        traces: Some(endpoint(&format!("http://{}", network.address), Protocol::Grpc)),
        logs: None,
        metrics: Some(endpoint(&format!("http://{metrics_address}/v1/metrics"), Protocol::HttpProtobuf)),
        batching: Batching::default(),
        log_batching: Batching::default(),
        metrics_interval: Duration::from_secs(10),
    };
    let bounds = QueueBounds { spans: 1000, ..QueueBounds::default() };
    let pipeline = Pipeline::start(&[Output::Otlp(Box::new(target))], bounds, RedactionRules::default()).unwrap();
    let seconds = 600;
    for second in 0..seconds {
        pipeline.send(spans(second * RATE..(second + 1) * RATE));
        sleep(Duration::from_secs(1)).await;
    }
    let dropped = seconds * RATE - 1000;
    assert_eq!((pipeline.reports()[0].spans.dropped, pipeline.reports()[0].spans.sent), (dropped, 0));
    // While it lasts, whoever watches can see it.
    in_minutes(|| metrics.received.lock().unwrap().last().is_some_and(|last| lost(&last.body) == dropped as i64)).await;
    assert!(metrics.received.lock().unwrap().iter().any(|received| (1..1000).contains(&lost(&received.body))));
    let text = String::from_utf8(said.0.lock().unwrap().clone()).unwrap();
    let failures = text.matches(" fails: Connection refused").count();
    let full = text.matches(": its queue is full, ").count();
    // The first of a minute is logged, and no attempt is later than 30 s after the one before.
    assert!(
        (6..=11).contains(&failures) && (9..=11).contains(&full),
        "{failures} and {full} times in 10 minutes:\n{text}"
    );
    network.mend().await;
    in_minutes(|| ids(&*collector.requests.lock().unwrap()).len() == 1000).await;
    let report = pipeline.shutdown(Finish::default()).await.remove(0);
    assert_eq!((report.spans.sent, report.spans.failed, report.spans.dropped), (1000, 0, dropped), "{report}");
}

#[tokio::test(start_paused = true)]
async fn nothing_is_sent_before_a_server_wants_it() {
    let later = answer("503 Service Unavailable", "Retry-After: 240\r\n", "");
    let (http, address) = Http::start(&[later, answer("200 OK", "", "")]).await;
    let pipeline =
        pipeline(endpoint(&format!("http://{address}/v1/traces"), Protocol::HttpJson), QueueBounds::default());
    pipeline.send(spans(0..10));
    sleep(Duration::from_secs(239)).await;
    assert!(http.received.lock().unwrap().is_empty());
    in_minutes(|| http.received.lock().unwrap().len() == 1).await;
    let report = pipeline.shutdown(Finish::default()).await.remove(0);
    assert_eq!((report.spans.sent, report.complete()), (10, true), "{report}");
}

#[tokio::test]
async fn connections_that_are_reset_lose_nothing() {
    let (collector, address) = Grpc::default().start().await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let at = listener.local_addr().unwrap();
    tokio::spawn(async move {
        for connection in 0.. {
            let (mut near, _) = listener.accept().await.unwrap();
            near.set_zero_linger().unwrap();
            // The first one is reset after the client has said something, within a request.
            if connection == 0 {
                let _ = near.read(&mut [0; 100]).await;
                continue;
            }
            let mut far = TcpStream::connect(address).await.unwrap();
            tokio::spawn(async move { copy_bidirectional(&mut near, &mut far).await });
        }
    });
    let report = run(endpoint(&format!("http://{at}"), Protocol::Grpc), 1300, Finish::default()).await;
    assert_eq!((report.spans.sent, report.complete()), (1300, true), "{report}");
    assert!(report.error.is_some(), "the first connection was reset");
    assert_eq!(collector.requests.lock().unwrap().iter().map(count).sum::<usize>(), 1300);
}

/// A gRPC collector behind TLS, and an endpoint that trusts it.
async fn encrypted(folder: &tempfile::TempDir, protocol: Protocol) -> (Grpc, Endpoint) {
    let (ca, certificate, key) = authority();
    let file = folder.path().join("ca");
    std::fs::write(&file, ca).unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let collector = Grpc::default();
    collector.serve(listener, Some(ServerTlsConfig::new().identity(Identity::from_pem(certificate, key))));
    (collector, Endpoint { certificate: Some(file), ..endpoint(&format!("https://localhost:{port}"), protocol) })
}

#[tokio::test]
async fn tls_on_one_side_only_is_a_failure_that_may_pass() {
    let folder = tempfile::tempdir().unwrap();
    for protocol in [Protocol::Grpc, Protocol::HttpProtobuf] {
        let (collector, secure) = encrypted(&folder, protocol).await;
        let plain = Endpoint { url: secure.url.replace("https", "http"), ..secure.clone() };
        let (other, address) = Grpc::default().start().await;
        let secure = Endpoint { url: format!("https://localhost:{}", address.port()), ..secure };
        for endpoint in [plain, secure] {
            let report = run(endpoint.clone(), 10, within(1500)).await;
            assert_eq!((report.spans.sent, report.spans.failed), (0, 10), "{}: {report}", endpoint.url);
            assert!(report.error.is_some());
        }
        assert!(collector.requests.lock().unwrap().is_empty() && other.requests.lock().unwrap().is_empty());
    }
}

#[tokio::test]
async fn grpc_goes_through_the_proxy_of_https_proxy() {
    let folder = tempfile::tempdir().unwrap();
    let (collector, endpoint) = encrypted(&folder, Protocol::Grpc).await;
    let proxy = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = proxy.local_addr().unwrap();
    let asked = Arc::new(Mutex::new(Vec::new()));
    let heads = Arc::clone(&asked);
    tokio::spawn(async move {
        while let Ok((mut near, _)) = proxy.accept().await {
            let mut head = Vec::new();
            while !head.ends_with(b"\r\n\r\n") {
                head.push(near.read_u8().await.unwrap());
            }
            let head = String::from_utf8(head).unwrap();
            let to = head.split(' ').nth(1).unwrap().to_owned();
            heads.lock().unwrap().push(head);
            let mut far = TcpStream::connect(to).await.unwrap();
            near.write_all(b"HTTP/1.1 200 OK\r\n\r\n").await.unwrap();
            tokio::spawn(async move { copy_bidirectional(&mut near, &mut far).await });
        }
    });
    let send = async |proxies: Matcher| {
        let transport = Transport::through(&endpoint, Signal::Traces, &proxies).unwrap();
        transport.send(request(spans(0..3)).encode_to_vec().into()).await
    };
    let accepted = Answer::Accepted { rejected: 0, message: String::new() };
    let https = format!("http://me:secret@{address}");
    assert_eq!(send(Matcher::builder().https(&*https).build()).await, accepted);
    let target = endpoint.url.strip_prefix("https://").unwrap();
    {
        let heads = asked.lock().unwrap();
        let [head] = &heads[..] else { panic!("{heads:?}") };
        assert!(head.starts_with(&format!("CONNECT {target} HTTP/1.1\r\n")), "{head}");
        assert!(head.to_lowercase().contains("proxy-authorization: basic "), "{head}");
    }
    assert_eq!(send(Matcher::builder().https(&*https).no("localhost").build()).await, accepted);
    assert_eq!((asked.lock().unwrap().len(), collector.requests.lock().unwrap().len()), (1, 2), "NO_PROXY holds");
    let socks = Matcher::builder().https("socks5://127.0.0.1:1").build();
    let error = Transport::through(&endpoint, Signal::Traces, &socks).unwrap_err().to_string();
    assert!(error.contains("gRPC cannot go through the proxy"), "{error}");
}
