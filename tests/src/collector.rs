//! An OpenTelemetry Collector that writes what it receives to a file.

use std::fs;
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::json;
use tempfile::TempDir;

use crate::jaeger::backend;
use crate::run::{Run, Running};
use crate::span::Span;

/// How long something is waited for.
const PATIENCE: Duration = Duration::from_secs(30);

/// A running Collector.
pub struct Collector {
    port: u16,
    folder: TempDir,
    process: Running,
}

impl Collector {
    /// Starts one; says so if there is none, or panics if one is required.
    #[track_caller]
    pub fn start() -> Option<Self> {
        let program = backend("FLOE_TEST_COLLECTOR")?;
        let folder = tempfile::tempdir().expect("a temporary folder can be made");
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("there is a free port");
        let port = listener.local_addr().expect("it is bound").port();
        drop(listener);
        let configuration = json!({
            "receivers": { "otlp": { "protocols": { "grpc": { "endpoint": format!("127.0.0.1:{port}") } } } },
            "exporters": { "file": { "path": folder.path().join("spans.jsonl"), "flush_interval": "100ms" } },
            "service": {
                "telemetry": { "metrics": { "level": "none" }, "logs": { "level": "error" } },
                "pipelines": { "traces": { "receivers": ["otlp"], "exporters": ["file"] } },
            },
        });
        let run = Run::new(program).arg(format!("--config=yaml:{configuration}")).limit(Duration::from_mins(10));
        let collector = Self { port, folder, process: run.start() };
        let deadline = Instant::now() + PATIENCE;
        while TcpStream::connect((Ipv4Addr::LOCALHOST, port)).is_err() {
            assert!(Instant::now() < deadline, "the Collector does not start: {}", collector.process.error());
            thread::sleep(Duration::from_millis(20));
        }
        Some(collector)
    }

    /// Its endpoint for OTLP/gRPC.
    pub fn otlp_grpc(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    /// Its file.
    pub fn file(&self) -> PathBuf {
        self.folder.path().join("spans.jsonl")
    }

    /// The spans in its file, as soon as there are so many.
    #[track_caller]
    pub fn spans(&self, at_least: usize) -> Vec<Span> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let text = fs::read_to_string(self.file()).unwrap_or_default();
            let spans = Span::parse(text.rfind('\n').map_or("", |end| &text[..end]));
            if spans.len() >= at_least {
                return spans;
            }
            assert!(Instant::now() < deadline, "{} of {at_least} spans: {}", spans.len(), self.process.error());
            thread::sleep(Duration::from_millis(50));
        }
    }
}
