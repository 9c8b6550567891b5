//! One OTLP request: gRPC, HTTP with protobuf, or HTTP with JSON; and what the answer means.
//!
//! The messages are opentelemetry-proto's, encoded beforehand: what waits for an endpoint waits as bytes.

use std::error::Error;
use std::io::Write as _;
use std::time::{Duration, SystemTime};

use bytes::{BufMut as _, Bytes};
use flate2::Compression;
use flate2::write::GzEncoder;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::client::legacy::connect::proxy::Tunnel;
use hyper_util::client::proxy::matcher::{Intercept, Matcher};
use opentelemetry_proto::tonic::collector::{
    logs::v1::ExportLogsServiceResponse, metrics::v1::ExportMetricsServiceResponse,
    trace::v1::ExportTraceServiceResponse,
};
use prost::Message as _;
use reqwest::StatusCode;
use reqwest::header::{self, HeaderMap, HeaderValue};
use tonic::codec::{Codec, CompressionEncoding, EncodeBuf, Encoder};
use tonic::metadata::MetadataMap;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Identity};
use tonic::{Code, Request, Status};
use tonic_prost::ProstDecoder;
use tonic_types::StatusExt as _;

use super::target::{Endpoint, Protocol, TargetError};

const USER_AGENT: &str = concat!("floe-agent/", env!("CARGO_PKG_VERSION"));
/// Longest wait that a server may ask for.
const MAX_WAIT: Duration = Duration::from_mins(5);
/// Most bytes of an answer that are read.
const MAX_ANSWER: usize = 64 << 10;
/// Time for a connection.
const CONNECT: Duration = Duration::from_secs(5);

/// What is sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Signal {
    /// Spans.
    Traces,
    /// Log records.
    Logs,
    /// The agent's own metrics.
    Metrics,
}

impl Signal {
    /// What its items are called.
    pub(crate) fn items(self) -> &'static str {
        match self {
            Self::Traces => "spans",
            Self::Logs => "log records",
            Self::Metrics => "data points",
        }
    }

    /// The gRPC method.
    fn method(self) -> &'static str {
        match self {
            Self::Traces => "/opentelemetry.proto.collector.trace.v1.TraceService/Export",
            Self::Logs => "/opentelemetry.proto.collector.logs.v1.LogsService/Export",
            Self::Metrics => "/opentelemetry.proto.collector.metrics.v1.MetricsService/Export",
        }
    }
}

/// What became of a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Answer {
    /// The server took it, apart from so many items.
    Accepted {
        /// Items that it refused.
        rejected: u64,
        /// What it said.
        message: String,
    },
    /// It may be sent again.
    Retry {
        /// Why it failed.
        reason: String,
        /// How long the server wants to be left alone.
        after: Option<Duration>,
        /// The server answered: it can be reached.
        answered: bool,
    },
    /// It must not be sent again.
    Refused(String),
}

impl Answer {
    fn unreachable(reason: String) -> Self {
        Self::Retry { reason, after: None, answered: false }
    }

    fn accepted() -> Self {
        Self::Accepted { rejected: 0, message: String::new() }
    }
}

/// A way to an endpoint.
#[derive(Debug)]
pub(super) struct Transport {
    endpoint: Endpoint,
    signal: Signal,
    way: Way,
}

#[derive(Debug)]
enum Way {
    Grpc(Channel),
    Http(reqwest::Client),
}

impl Transport {
    /// Prepares the way; nothing is sent yet. To be called inside a tokio runtime.
    pub(super) fn new(endpoint: &Endpoint, signal: Signal) -> Result<Self, TargetError> {
        Self::through(endpoint, signal, &Matcher::from_env())
    }

    /// As [`Self::new`]; gRPC goes through one of these proxies.
    pub(super) fn through(endpoint: &Endpoint, signal: Signal, proxies: &Matcher) -> Result<Self, TargetError> {
        let way = match endpoint.protocol {
            Protocol::Grpc => Way::Grpc(channel(endpoint, proxies)?),
            Protocol::HttpProtobuf | Protocol::HttpJson => Way::Http(client(endpoint)?),
        };
        // A file with a secret that cannot be read shows here.
        endpoint.headers.resolve().map_err(|problem| endpoint.error(problem))?;
        Ok(Self { endpoint: endpoint.clone(), signal, way })
    }

    pub(super) fn endpoint(&self) -> &Endpoint {
        &self.endpoint
    }

    /// Sends one encoded request. Takes at most the endpoint's time-out.
    pub(super) async fn send(&self, body: Bytes) -> Answer {
        let timeout = self.endpoint.timeout;
        let headers = match self.endpoint.headers.resolve() {
            Ok(headers) => headers,
            Err(problem) => return Answer::unreachable(problem),
        };
        let sending = async {
            match &self.way {
                Way::Grpc(channel) => grpc(channel.clone(), self.signal, self.endpoint.gzip, headers, body).await,
                Way::Http(client) => self.http(client, headers, body).await,
            }
        };
        let silent = || Answer::unreachable(format!("no answer within {timeout:?}"));
        tokio::time::timeout(timeout, sending).await.unwrap_or_else(|_| silent())
    }

    async fn http(&self, client: &reqwest::Client, mut headers: HeaderMap, mut body: Bytes) -> Answer {
        let json = self.endpoint.protocol == Protocol::HttpJson;
        let content = if json { "application/json" } else { "application/x-protobuf" };
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(content));
        if self.endpoint.gzip {
            headers.insert(header::CONTENT_ENCODING, HeaderValue::from_static("gzip"));
            body = gzip(&body);
        }
        let mut response = match client.post(&self.endpoint.url).headers(headers).body(body).send().await {
            Ok(response) => response,
            Err(error) => return Answer::unreachable(causes(&error.without_url())),
        };
        let status = response.status();
        let after = response.headers().get(header::RETRY_AFTER).and_then(retry_after);
        let mut answer = Vec::new();
        while let Ok(Some(chunk)) = response.chunk().await {
            answer.extend_from_slice(&chunk);
            if answer.len() > MAX_ANSWER {
                break;
            }
        }
        match status {
            _ if status.is_success() => decode(self.signal, json, &answer),
            StatusCode::TOO_MANY_REQUESTS
            | StatusCode::BAD_GATEWAY
            | StatusCode::SERVICE_UNAVAILABLE
            | StatusCode::GATEWAY_TIMEOUT => Answer::Retry { reason: format!("HTTP {status}"), after, answered: true },
            _ => Answer::Refused(match describe(json, &answer) {
                Some(message) => format!("HTTP {status}: {message}"),
                None => format!("HTTP {status}"),
            }),
        }
    }
}

/// What a successful answer says. One that cannot be read is taken for a plain success, as the specification asks.
fn decode(signal: Signal, json: bool, body: &[u8]) -> Answer {
    macro_rules! read {
        ($kind:ty, $rejected:ident) => {{
            let answer = <$kind>::decode(body).ok();
            let partial = answer.and_then(|answer| answer.partial_success);
            partial.map(|partial| (partial.$rejected, partial.error_message))
        }};
    }
    let partial = match signal {
        _ if json => decode_json(signal, body),
        Signal::Traces => read!(ExportTraceServiceResponse, rejected_spans),
        Signal::Logs => read!(ExportLogsServiceResponse, rejected_log_records),
        Signal::Metrics => read!(ExportMetricsServiceResponse, rejected_data_points),
    };
    partial.map_or_else(Answer::accepted, |(rejected, message)| accepted(rejected, message))
}

/// opentelemetry-proto does not read 64-bit numbers that are texts, as JSON has them, in these messages.
fn decode_json(signal: Signal, body: &[u8]) -> Option<(i64, String)> {
    let answer: serde_json::Value = serde_json::from_slice(body).ok()?;
    let partial = answer.get("partialSuccess")?;
    let rejected = partial.get(match signal {
        Signal::Traces => "rejectedSpans",
        Signal::Logs => "rejectedLogRecords",
        Signal::Metrics => "rejectedDataPoints",
    });
    let number = |value: &serde_json::Value| value.as_i64().or_else(|| value.as_str()?.parse().ok());
    let message = partial.get("errorMessage").and_then(serde_json::Value::as_str).unwrap_or_default();
    Some((rejected.and_then(number).unwrap_or_default(), message.to_owned()))
}

fn accepted(rejected: i64, message: String) -> Answer {
    Answer::Accepted { rejected: u64::try_from(rejected).unwrap_or_default(), message }
}

/// The message of a refusal: a `google.rpc.Status` in the request's encoding.
fn describe(json: bool, body: &[u8]) -> Option<String> {
    let message = if json {
        serde_json::from_slice::<serde_json::Value>(body).ok()?.get("message")?.as_str()?.to_owned()
    } else {
        tonic_types::pb::Status::decode(body).ok()?.message
    };
    let printable = !message.is_empty() && !message.chars().any(char::is_control);
    printable.then(|| message.chars().take(200).collect())
}

async fn grpc(channel: Channel, signal: Signal, gzip: bool, headers: HeaderMap, body: Bytes) -> Answer {
    let mut client = tonic::client::Grpc::new(channel);
    if gzip {
        client = client.send_compressed(CompressionEncoding::Gzip).accept_compressed(CompressionEncoding::Gzip);
    }
    if let Err(error) = client.ready().await {
        return Answer::unreachable(causes(&error));
    }
    macro_rules! call {
        ($kind:ty, $rejected:ident) => {{
            let request = Request::from_parts(MetadataMap::from_headers(headers), tonic::Extensions::default(), body);
            let path = http::uri::PathAndQuery::from_static(signal.method());
            client.unary(request, path, Encoded::<$kind>::default()).await.map(|response| {
                let partial = response.into_inner().partial_success;
                partial.map(|partial| (partial.$rejected, partial.error_message))
            })
        }};
    }
    let result = match signal {
        Signal::Traces => call!(ExportTraceServiceResponse, rejected_spans),
        Signal::Logs => call!(ExportLogsServiceResponse, rejected_log_records),
        Signal::Metrics => call!(ExportMetricsServiceResponse, rejected_data_points),
    };
    match result {
        Ok(partial) => partial.map_or_else(Answer::accepted, |(rejected, message)| accepted(rejected, message)),
        Err(status) => classify(&status),
    }
}

/// As the OTLP specification has it: which codes may be tried again.
fn classify(status: &Status) -> Answer {
    // A status that tonic makes of an error of the connection has a cause, one that the server sent has none.
    if status.source().is_some() {
        return Answer::unreachable(causes(status));
    }
    let reason = || {
        let (name, message) = (format!("{:?}", status.code()), status.message());
        let readable = !message.is_empty() && !message.chars().any(char::is_control);
        if readable { format!("{name}: {}", message.chars().take(200).collect::<String>()) } else { name }
    };
    let after = status.get_details_retry_info().and_then(|info| info.retry_delay).map(|delay| delay.min(MAX_WAIT));
    let retry = match status.code() {
        Code::Cancelled
        | Code::DeadlineExceeded
        | Code::Aborted
        | Code::OutOfRange
        | Code::Unavailable
        | Code::DataLoss => true,
        Code::ResourceExhausted => after.is_some(),
        _ => false,
    };
    if retry { Answer::Retry { reason: reason(), after, answered: true } } else { Answer::Refused(reason()) }
}

/// The innermost cause says the most: `Connection refused`, `invalid peer certificate: UnknownIssuer`.
fn causes(error: &dyn Error) -> String {
    let mut last = error.to_string();
    let mut next = error.source();
    while let Some(error) = next {
        last = error.to_string();
        next = error.source();
    }
    last
}

fn retry_after(value: &HeaderValue) -> Option<Duration> {
    let text = value.to_str().ok()?.trim();
    let wait = match text.parse() {
        Ok(seconds) => Duration::from_secs(seconds),
        Err(_) => httpdate::parse_http_date(text).ok()?.duration_since(SystemTime::now()).unwrap_or_default(),
    };
    Some(wait.min(MAX_WAIT))
}

fn gzip(body: &[u8]) -> Bytes {
    let mut encoder = GzEncoder::new(Vec::with_capacity(body.len() / 4), Compression::fast());
    // Writing to memory does not fail.
    let _ = encoder.write_all(body);
    encoder.finish().unwrap_or_default().into()
}

/// Requests that are encoded already; answers as prost has them.
struct Encoded<A>(std::marker::PhantomData<A>);

impl<A> Default for Encoded<A> {
    fn default() -> Self {
        Self(std::marker::PhantomData)
    }
}

struct Copy;

impl Encoder for Copy {
    type Item = Bytes;
    type Error = Status;

    fn encode(&mut self, item: Bytes, buffer: &mut EncodeBuf<'_>) -> Result<(), Status> {
        buffer.reserve(item.len());
        buffer.put(item);
        Ok(())
    }
}

impl<A: prost::Message + Default + 'static> Codec for Encoded<A> {
    type Encode = Bytes;
    type Decode = A;
    type Encoder = Copy;
    type Decoder = ProstDecoder<A>;

    fn encoder(&mut self) -> Copy {
        Copy
    }

    fn decoder(&mut self) -> ProstDecoder<A> {
        ProstDecoder::default()
    }
}

fn channel(endpoint: &Endpoint, proxies: &Matcher) -> Result<Channel, TargetError> {
    let fail = |problem: String| endpoint.error(problem);
    let mut to = Channel::from_shared(endpoint.url.clone())
        .map_err(|error| fail(causes(&error)))?
        .user_agent(USER_AGENT)
        .map_err(|error| fail(causes(&error)))?
        .connect_timeout(endpoint.timeout.min(CONNECT))
        .keep_alive_while_idle(true)
        .http2_keep_alive_interval(Duration::from_secs(30));
    if endpoint.is_tls() {
        let mut tls = ClientTlsConfig::new();
        tls = match endpoint.ca()? {
            Some(pem) => tls.ca_certificate(Certificate::from_pem(pem)),
            None => tls.with_native_roots(),
        };
        if let Some((certificate, key)) = endpoint.identity()? {
            tls = tls.identity(Identity::from_pem(certificate, key));
        }
        to = to.tls_config(tls).map_err(|error| fail(causes(&error)))?;
        if let Some(proxy) = proxies.intercept(to.uri()) {
            return Ok(to.connect_with_connector_lazy(tunnel(&proxy).map_err(fail)?));
        }
    }
    Ok(to.connect_lazy())
}

/// The way through a proxy. Without TLS gRPC takes none: a proxy of that kind understands HTTP/1 only.
fn tunnel(proxy: &Intercept) -> Result<Tunnel<HttpConnector>, String> {
    if proxy.uri().scheme_str() != Some("http") {
        let uri = proxy.uri();
        return Err(format!(
            "gRPC cannot go through the proxy `{uri}`; give one of `http://`, or put the host into NO_PROXY"
        ));
    }
    let mut connector = HttpConnector::new();
    connector.set_nodelay(true);
    let tunnel = Tunnel::new(proxy.uri().clone(), connector);
    Ok(match proxy.basic_auth() {
        Some(credentials) => tunnel.with_auth(credentials.clone()),
        None => tunnel,
    })
}

fn client(endpoint: &Endpoint) -> Result<reqwest::Client, TargetError> {
    // Others may have chosen one already; ours is the only one there is.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let fail = |error: reqwest::Error| endpoint.error(causes(&error));
    let mut builder = reqwest::Client::builder()
        .user_agent(USER_AGENT)
        .connect_timeout(endpoint.timeout.min(CONNECT))
        .redirect(reqwest::redirect::Policy::none());
    if endpoint.is_tls() {
        if let Some(pem) = endpoint.ca()? {
            let certificates = reqwest::Certificate::from_pem_bundle(&pem).map_err(fail)?;
            builder = builder.tls_certs_only(certificates);
        }
        if let Some((mut certificate, key)) = endpoint.identity()? {
            certificate.push(b'\n');
            certificate.extend_from_slice(&key);
            builder = builder.identity(reqwest::Identity::from_pem(&certificate).map_err(fail)?);
        }
    }
    builder.build().map_err(fail)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn retry_after_is_seconds_or_a_date() {
        let at = |text: &str| retry_after(&HeaderValue::from_str(text).unwrap());
        assert_eq!(at("7"), Some(Duration::from_secs(7)));
        assert_eq!(at("86400"), Some(MAX_WAIT), "not for ever");
        assert_eq!(at("soon"), None);
        let date = httpdate::fmt_http_date(SystemTime::now() + Duration::from_secs(30));
        let wait = at(&date).unwrap();
        assert!(wait > Duration::from_secs(27) && wait <= Duration::from_secs(30), "{wait:?}");
        assert_eq!(at("Sun, 06 Nov 1994 08:49:37 GMT"), Some(Duration::ZERO));
    }

    #[test]
    fn which_codes_are_tried_again_is_as_the_specification_says() {
        let retried = |status: Status| matches!(classify(&status), Answer::Retry { .. });
        for code in [1, 4, 10, 11, 14, 15] {
            assert!(retried(Status::new(Code::from(code), "")), "{code}");
        }
        for code in [2, 3, 5, 6, 7, 8, 9, 12, 13, 16] {
            assert!(!retried(Status::new(Code::from(code), "")), "{code}");
        }
        let details = tonic_types::ErrorDetails::with_retry_info(Some(Duration::from_secs(3)));
        let throttled = Status::with_error_details(Code::ResourceExhausted, "later", details);
        let Answer::Retry { reason, after, answered } = classify(&throttled) else { panic!() };
        assert_eq!(
            (reason.as_str(), after, answered),
            ("ResourceExhausted: later", Some(Duration::from_secs(3)), true)
        );
    }
}
