//! Jaeger, the reader of traces that is not ours: started once per test program, asked through its HTTP API.

use std::collections::BTreeMap;
use std::env;
use std::net::{Ipv4Addr, TcpListener};
use std::sync::OnceLock;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;
use ureq::Agent;

use crate::http;
use crate::run::{Run, Running};
use crate::skip::skip;
use crate::span::Attributes;

/// How long spans may take to be found.
const PATIENCE: Duration = Duration::from_secs(30);

/// A running Jaeger.
pub struct Jaeger {
    client: Agent,
    grpc: u16,
    http: u16,
    query: u16,
    process: Running,
}

/// A span as Jaeger shows it.
#[derive(Clone, Debug)]
pub struct JaegerSpan {
    /// Its trace, hexadecimal.
    pub trace: String,
    /// Its id, hexadecimal.
    pub id: String,
    /// Its name.
    pub name: String,
    /// The spans that it refers to: kind, trace, and span.
    pub references: Vec<(String, String, String)>,
    /// When it began, in microseconds since 1970.
    pub start: u64,
    /// Microseconds.
    pub duration: u64,
    /// Its attributes, its kind, and its status.
    pub tags: Attributes,
    /// Its events: microseconds since 1970, and attributes; `event` is the name.
    pub logs: Vec<(u64, Attributes)>,
    /// Its service.
    pub service: String,
    /// Its resource.
    pub process: Attributes,
    /// What Jaeger finds odd.
    pub warnings: Value,
}

impl Jaeger {
    /// The one of this test program; says so if there is none, or panics if one is required.
    #[track_caller]
    pub fn shared() -> Option<&'static Self> {
        static SHARED: OnceLock<Option<Jaeger>> = OnceLock::new();
        if let Some(path) = env::var_os("FLOE_TEST_JAEGER") {
            return SHARED.get_or_init(|| Some(Self::start(&path))).as_ref();
        }
        let reason = env::var("FLOE_NO_JAEGER");
        let reason =
            reason.unwrap_or_else(|_| "FLOE_TEST_JAEGER is not set: `cargo xtask jaeger` builds it".to_owned());
        assert!(env::var_os("FLOE_REQUIRE_JAEGER").is_none_or(|value| value != "1"), "{reason}");
        skip(&reason);
        None
    }

    fn start(path: &std::ffi::OsStr) -> Self {
        // All at once, so that they differ.
        let listeners = [(); 7].map(|()| TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("there is a free port"));
        let ports = listeners.map(|listener| listener.local_addr().expect("it is bound").port());
        let flags = [
            "collector.otlp.grpc",
            "collector.otlp.http",
            "query.http-server",
            "query.grpc-server",
            "collector.grpc-server",
            "collector.http-server",
            "admin.http",
        ];
        // Nothing is dropped at the end of a test program. But its pipes are closed, and then this shell ends Jaeger.
        let until_our_end = r#"exec 3<&0; "$@" & cat <&3 >&2; kill -9 $!"#;
        let run = Run::shell(until_our_end).arg("sh").arg(path).arg("--log-level=error");
        let run = run.args(flags.iter().zip(ports).map(|(flag, port)| format!("--{flag}.host-port=127.0.0.1:{port}")));
        let process = run.limit(Duration::from_hours(1)).start();
        let [grpc, http, query, ..] = ports;
        let jaeger = Self { client: http::client(), grpc, http, query, process };
        let deadline = Instant::now() + PATIENCE;
        while jaeger.get("/api/services").is_err() {
            assert!(Instant::now() < deadline, "Jaeger does not start: {}", jaeger.process.error());
            thread::sleep(Duration::from_millis(20));
        }
        jaeger
    }

    /// Its endpoint for OTLP/gRPC.
    pub fn otlp_grpc(&self) -> String {
        format!("http://127.0.0.1:{}", self.grpc)
    }

    /// Its endpoint for OTLP/HTTP.
    pub fn otlp_http(&self) -> String {
        format!("http://127.0.0.1:{}", self.http)
    }

    fn get(&self, path: &str) -> Result<(u16, Value), String> {
        http::answer(self.client.get(format!("http://127.0.0.1:{}{path}", self.query)).call())
    }

    /// The services that it knows.
    pub fn services(&self) -> Vec<String> {
        let (_, answer) = self.get("/api/services").expect("Jaeger answers");
        let services = answer["data"].as_array().cloned().unwrap_or_default();
        services.iter().filter_map(Value::as_str).map(str::to_owned).collect()
    }

    /// The spans of a trace, as soon as there are so many.
    #[track_caller]
    pub fn trace(&self, id: &str, spans: usize) -> BTreeMap<String, JaegerSpan> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let (status, answer) = self.get(&format!("/api/traces/{id}")).expect("Jaeger answers");
            let found = parse(&answer);
            if found.len() >= spans {
                return found.into_iter().map(|span| (span.id.clone(), span)).collect();
            }
            let found = found.len();
            assert!(Instant::now() < deadline, "{found} of {spans} spans of trace {id}: {status} {}", answer["errors"]);
            thread::sleep(Duration::from_millis(50));
        }
    }

    /// The traces of a service whose spans have these tags, as Jaeger's search finds them.
    pub fn search(&self, service: &str, tags: &Value) -> Vec<Vec<JaegerSpan>> {
        let url = format!("http://127.0.0.1:{}/api/traces", self.query);
        let request = self.client.get(url).query("service", service).query("tags", tags.to_string());
        let (status, answer) =
            http::answer(request.query("limit", "100").query("lookback", "1h").call()).expect("Jaeger answers");
        assert_eq!(status, 200, "{answer}");
        answer["data"].as_array().into_iter().flatten().map(spans_of).collect()
    }
}

fn parse(answer: &Value) -> Vec<JaegerSpan> {
    answer["data"].as_array().into_iter().flatten().flat_map(spans_of).collect()
}

fn spans_of(trace: &Value) -> Vec<JaegerSpan> {
    let list = |value: &Value| value.as_array().cloned().unwrap_or_default();
    let text = |value: &Value| value.as_str().unwrap_or_else(|| panic!("not a text: {value}")).to_owned();
    let number = |value: &Value| value.as_u64().unwrap_or_else(|| panic!("not a number: {value}"));
    let tags = |value: &Value| list(value).iter().map(|tag| (text(&tag["key"]), tag["value"].clone())).collect();
    let span = |span: &Value| {
        let process = &trace["processes"][text(&span["processID"])];
        JaegerSpan {
            trace: text(&span["traceID"]),
            id: text(&span["spanID"]),
            name: text(&span["operationName"]),
            references: list(&span["references"])
                .iter()
                .map(|to| (text(&to["refType"]), text(&to["traceID"]), text(&to["spanID"])))
                .collect(),
            start: number(&span["startTime"]),
            duration: number(&span["duration"]),
            tags: tags(&span["tags"]),
            logs: list(&span["logs"]).iter().map(|log| (number(&log["timestamp"]), tags(&log["fields"]))).collect(),
            service: text(&process["serviceName"]),
            process: tags(&process["tags"]),
            warnings: span["warnings"].clone(),
        }
    };
    list(&trace["spans"]).iter().map(span).collect()
}

impl JaegerSpan {
    /// The span that it is a child of.
    pub fn parent(&self) -> Option<&str> {
        let parent = self.references.iter().find(|(kind, trace, _)| kind == "CHILD_OF" && *trace == self.trace);
        parent.map(|(_, _, span)| span.as_str())
    }

    /// A tag that is a text.
    pub fn text(&self, name: &str) -> Option<&str> {
        self.tags.get(name).and_then(Value::as_str)
    }

    /// Whether its status is an error.
    pub fn failed(&self) -> bool {
        self.text("otel.status_code") == Some("ERROR") && self.tags.get("error") == Some(&Value::Bool(true))
    }
}
