//! OTLP/JSON lines: one export request a line, as the OpenTelemetry Collector's file exporter writes them.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

use serde::Serialize;

use super::ExportError;
use super::batch::{log_request, request};
use super::pipeline::{Finish, LocalSink};
use crate::trace::{FinishedLog, FinishedSpan};

/// A file of OTLP/JSON lines.
pub(super) struct Jsonl {
    path: PathBuf,
    file: File,
    /// The last line may be incomplete.
    broken: bool,
}

impl Jsonl {
    /// Creates the file, or empties it.
    pub(super) fn create(path: &Path) -> Result<Self, ExportError> {
        let directory = path.parent().filter(|directory| !directory.as_os_str().is_empty());
        if let Some(directory) = directory.filter(|directory| !directory.is_dir()) {
            return Err(ExportError::NoDirectory { file: path.to_owned(), directory: directory.to_owned() });
        }
        match File::create(path) {
            Ok(file) => Ok(Self { path: path.to_owned(), file, broken: false }),
            Err(source) => Err(ExportError::File { file: path.to_owned(), source }),
        }
    }

    fn write_line(&mut self, request: &impl Serialize) -> std::io::Result<()> {
        let mut line = if self.broken { vec![b'\n'] } else { Vec::new() };
        serde_json::to_writer(&mut line, request)?;
        line.push(b'\n');
        self.broken = true;
        self.file.write_all(&line)?;
        self.broken = false;
        Ok(())
    }
}

impl Jsonl {
    fn write_request(&mut self, request: &impl Serialize) -> Result<(), ExportError> {
        self.write_line(request).map_err(|source| ExportError::Write { sink: self.path.display().to_string(), source })
    }
}

impl LocalSink for Jsonl {
    fn write(&mut self, spans: &[FinishedSpan]) -> Result<(), ExportError> {
        self.write_request(&request(spans.iter().cloned()))
    }

    fn write_logs(&mut self, logs: &[FinishedLog]) -> Result<(), ExportError> {
        self.write_request(&log_request(logs.iter().cloned()))
    }

    fn finish(&mut self, _: Finish) -> Result<(), ExportError> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use opentelemetry::KeyValue;
    use opentelemetry::trace::{Event, Status};
    use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceRequest;
    use serde_json::{Value, json};

    use std::sync::Arc;

    use super::*;
    use crate::export::tree::tests::{at, span};
    use crate::trace::ProcessFacts;
    use crate::units::{Epoch, Pid};

    fn spans() -> Vec<FinishedSpan> {
        let mut one = span(0x0af7_6519_16cd_43dd_8448_eb21_1c80_319c, 0xb7ad_6b71_6920_3331, 0, "dbt.build", 1, 5);
        one.span.attributes = vec![
            KeyValue::new("rows", i64::MAX),
            KeyValue::new("time", 0.5),
            KeyValue::new("ok", true),
            KeyValue::new("text", "ä\n\"x\""),
        ];
        one.span.status = Status::error("no");
        one.span.events.events.push(Event::new("exception", at(5), vec![KeyValue::new("exception.type", "E")], 0));
        let two = span(1, 2, 0xb7ad_6b71_6920_3331, "child", 2, 3);
        let mut three = span(1, 3, 0, "other", 2, 3);
        three.resource = Arc::new(ProcessFacts::unknown(Pid(9), Epoch(9)).resource());
        let mut two = two;
        two.resource = Arc::clone(&one.resource);
        vec![one, three, two]
    }

    fn lines(path: &Path) -> Vec<String> {
        std::fs::read_to_string(path).unwrap().lines().map(str::to_owned).collect()
    }

    #[test]
    fn every_batch_is_a_line_that_decodes_to_the_same_request() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("x.jsonl");
        let mut sink = Jsonl::create(&path).unwrap();
        let spans = spans();
        sink.write(&spans).unwrap();
        sink.write(&spans[..1]).unwrap();
        let lines = lines(&path);
        assert_eq!(lines.len(), 2);
        let decoded: ExportTraceServiceRequest = serde_json::from_str(&lines[0]).unwrap();
        assert_eq!(decoded, request(spans.clone()));
        let counts: Vec<_> = decoded.resource_spans.iter().map(|r| r.scope_spans[0].spans.len()).collect();
        assert_eq!(counts, [2, 1], "grouped by resource");
    }

    #[test]
    fn the_encoding_is_that_of_the_otlp_json_specification() {
        let line = serde_json::to_value(request(spans().into_iter().take(1))).unwrap();
        let span = &line["resourceSpans"][0]["scopeSpans"][0]["spans"][0];
        assert_eq!(span["traceId"], "0af7651916cd43dd8448eb211c80319c");
        assert_eq!(span["spanId"], "b7ad6b7169203331");
        assert_eq!(span["parentSpanId"], "");
        assert_eq!(span["kind"], 1, "enums are numbers");
        assert_eq!(span["startTimeUnixNano"], "1000000", "64-bit integers are strings");
        assert_eq!(span["endTimeUnixNano"], "5000000");
        assert_eq!(span["status"], json!({"code": 2, "message": "no"}));
        assert_eq!(
            span["attributes"],
            json!([
                {"key": "rows", "value": {"intValue": "9223372036854775807"}},
                {"key": "time", "value": {"doubleValue": 0.5}},
                {"key": "ok", "value": {"boolValue": true}},
                {"key": "text", "value": {"stringValue": "ä\n\"x\""}},
            ])
        );
        assert_eq!(span["events"][0]["timeUnixNano"], "5000000");
        assert_eq!(span["events"][0]["name"], "exception");
        assert!(!has_null(&line), "{line}");
        let resource = &line["resourceSpans"][0]["resource"]["attributes"];
        assert!(resource.as_array().unwrap().contains(&json!({"key": "process.pid", "value": {"intValue": "7"}})));
    }

    fn has_null(value: &Value) -> bool {
        match value {
            Value::Null => true,
            Value::Array(items) => items.iter().any(has_null),
            Value::Object(items) => items.values().any(has_null),
            _ => false,
        }
    }

    #[test]
    fn a_missing_directory_is_named() {
        let Err(error) = Jsonl::create(Path::new("/nonexistent/dir/x.jsonl")) else { panic!() };
        assert_eq!(
            error.to_string(),
            "cannot write traces to /nonexistent/dir/x.jsonl: the directory /nonexistent/dir does not exist; create it first"
        );
        let directory = tempfile::tempdir().unwrap();
        assert!(Jsonl::create(directory.path()).is_err(), "a directory is no file");
    }

    #[test]
    fn a_line_after_a_failed_one_stands_alone() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("x.jsonl");
        let mut sink = Jsonl::create(&path).unwrap();
        sink.file.write_all(b"{\"resourceSp").unwrap();
        sink.broken = true;
        sink.write(&spans()[..1]).unwrap();
        assert!(serde_json::from_str::<ExportTraceServiceRequest>(&lines(&path)[1]).is_ok());
    }
}
