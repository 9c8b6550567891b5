//! Lines of OTLP/JSON to spans and log records.
//!
//! A file may hold what the Collector's file exporter writes: lines of metrics are passed over. A line that is
//! none of these is skipped and reported; the last line of a file that is still being written often is one.

use std::io::BufRead;

use opentelemetry_proto::tonic::common::v1::{AnyValue, KeyValue, any_value::Value};
use opentelemetry_proto::tonic::logs::v1::{LogRecord, ResourceLogs};
use opentelemetry_proto::tonic::trace::v1::span::{Event, Link};
use opentelemetry_proto::tonic::trace::v1::{ResourceSpans, Span as ProtoSpan, status::StatusCode};
use serde::Deserialize;
use serde::de::IgnoredAny;

use super::{BadLine, ReportError};

/// A trace id.
pub(super) type TraceId = [u8; 16];
/// A span id.
pub(super) type SpanId = [u8; 8];

/// A span, with its times as nanoseconds since 1970.
pub(super) struct Span {
    pub(super) trace: TraceId,
    pub(super) id: SpanId,
    pub(super) parent: Option<SpanId>,
    pub(super) name: String,
    pub(super) kind: i32,
    pub(super) start: u64,
    pub(super) end: u64,
    /// OTLP's status code: 0 unset, 1 ok, 2 error.
    pub(super) status: i32,
    pub(super) message: String,
    pub(super) attributes: Vec<KeyValue>,
    pub(super) events: Vec<Event>,
    pub(super) links: Vec<Link>,
    /// Index into [`Spans::resources`].
    pub(super) resource: usize,
}

/// An id that is one: zeros are none.
fn id<const N: usize>(bytes: Vec<u8>) -> Option<[u8; N]> {
    bytes.try_into().ok().filter(|id: &[u8; N]| id.iter().any(|byte| *byte != 0))
}

impl Span {
    fn new(span: ProtoSpan, resource: usize) -> Option<Self> {
        let trace = id(span.trace_id)?;
        let parent = id(span.parent_span_id);
        let id = id(span.span_id)?;
        let status = span.status.unwrap_or_default();
        Some(Self {
            trace,
            id,
            parent,
            name: span.name,
            kind: span.kind,
            start: span.start_time_unix_nano,
            end: span.end_time_unix_nano.max(span.start_time_unix_nano),
            status: status.code,
            message: status.message,
            attributes: span.attributes,
            events: span.events,
            links: span.links,
            resource,
        })
    }

    /// Whether its status is an error.
    pub(super) fn failed(&self) -> bool {
        self.status == StatusCode::Error as i32
    }

    /// The text of an attribute, or the number as text.
    pub(super) fn attribute(&self, wanted: impl Fn(&str) -> bool) -> Option<&AnyValue> {
        self.attributes.iter().find(|attribute| wanted(&attribute.key))?.value.as_ref()
    }
}

/// A log record of a trace.
pub(super) struct Log {
    pub(super) trace: TraceId,
    pub(super) span: Option<SpanId>,
    pub(super) time: u64,
    pub(super) severity: String,
    pub(super) logger: String,
    pub(super) body: Option<AnyValue>,
    pub(super) attributes: Vec<KeyValue>,
}

impl Log {
    fn new(record: LogRecord, logger: &str) -> Option<Self> {
        let LogRecord { time_unix_nano, observed_time_unix_nano, severity_text, body, mut attributes, .. } = record;
        if !record.event_name.is_empty() {
            let name = any_text(record.event_name);
            attributes.insert(0, KeyValue { key: "event".to_owned(), value: Some(name), ..KeyValue::default() });
        }
        Some(Self {
            trace: id(record.trace_id)?,
            span: id(record.span_id),
            time: if time_unix_nano == 0 { observed_time_unix_nano } else { time_unix_nano },
            severity: severity_text,
            logger: logger.to_owned(),
            body,
            attributes,
        })
    }
}

/// What was read.
#[derive(Default)]
pub(super) struct Spans {
    pub(super) all: Vec<Span>,
    pub(super) logs: Vec<Log>,
    /// Attributes of the resources, each different one once.
    pub(super) resources: Vec<Vec<KeyValue>>,
    files: Vec<(String, Option<(BadLine, usize)>)>,
}

/// A line. Which of the fields is there tells what it is.
#[derive(Deserialize)]
struct Line {
    #[serde(rename = "resourceSpans")]
    spans: Option<Vec<ResourceSpans>>,
    #[serde(rename = "resourceLogs")]
    logs: Option<Vec<ResourceLogs>>,
    #[serde(rename = "resourceMetrics")]
    metrics: Option<IgnoredAny>,
    #[serde(rename = "resourceProfiles")]
    profiles: Option<IgnoredAny>,
}

impl Spans {
    /// Adds the spans of a file.
    pub(super) fn read(&mut self, file: &str, reader: &mut impl BufRead) -> Result<(), ReportError> {
        let mut bad: Option<(BadLine, usize)> = None;
        let mut bytes = Vec::new();
        for number in 1.. {
            bytes.clear();
            let failed = |reason| ReportError::Input { file: file.to_owned(), reason };
            if reader.read_until(b'\n', &mut bytes).map_err(failed)? == 0 {
                break;
            }
            let complete = bytes.ends_with(b"\n");
            let line = bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(&bytes).trim_ascii();
            if line.is_empty() {
                continue;
            }
            if let Err(problem) = self.line(line, complete) {
                let line = BadLine { file: file.to_owned(), line: number, problem };
                bad.get_or_insert((line, 0)).1 += 1;
            }
        }
        self.files.push((file.to_owned(), bad));
        Ok(())
    }

    fn line(&mut self, line: &[u8], complete: bool) -> Result<(), String> {
        let line: Line = serde_json::from_slice(line).map_err(|error| {
            if error.is_eof() && !complete {
                return "the line is cut off; is the file still being written?".to_owned();
            }
            // The line that serde_json counts is always the first.
            let text = error.to_string();
            let what = text.split(" at line ").next().unwrap_or_default();
            format!("not OTLP/JSON: {what}, column {}", error.column())
        })?;
        let scopes = line.logs.iter().flatten().flat_map(|group| &group.scope_logs);
        for scope in scopes {
            let logger = scope.scope.as_ref().map_or("", |scope| &scope.name);
            self.logs.extend(scope.log_records.iter().filter_map(|record| Log::new(record.clone(), logger)));
        }
        let Some(groups) = line.spans else {
            let is_other = line.logs.is_some() || line.metrics.is_some() || line.profiles.is_some();
            return if is_other { Ok(()) } else { Err("JSON, but without `resourceSpans`".to_owned()) };
        };
        let mut without_ids = 0;
        for group in groups {
            let resource = self.resource(group.resource.unwrap_or_default().attributes);
            for span in group.scope_spans.into_iter().flat_map(|scope| scope.spans) {
                match Span::new(span, resource) {
                    Some(span) => self.all.push(span),
                    None => without_ids += 1,
                }
            }
        }
        match without_ids {
            0 => Ok(()),
            count => Err(format!("{count} spans without a valid trace id and span id")),
        }
    }

    fn resource(&mut self, attributes: Vec<KeyValue>) -> usize {
        // Requests come in bursts of few processes: the latest ones are looked at first.
        self.resources.iter().rposition(|known| *known == attributes).unwrap_or_else(|| {
            self.resources.push(attributes);
            self.resources.len() - 1
        })
    }

    /// Whether there are no spans.
    pub(super) fn is_empty(&self) -> bool {
        self.all.is_empty()
    }

    /// The files.
    pub(super) fn files(&self) -> Vec<String> {
        self.files.iter().map(|(file, _)| file.clone()).collect()
    }

    /// The first bad line of each file, and how many there are.
    pub(super) fn skipped(&self) -> Vec<(BadLine, usize)> {
        self.files.iter().filter_map(|(_, bad)| bad.clone()).collect()
    }
}

fn any_text(text: String) -> AnyValue {
    AnyValue { value: Some(Value::StringValue(text)) }
}

/// A value's text, if it is one.
pub(super) fn text(value: &AnyValue) -> Option<&str> {
    match &value.value {
        Some(Value::StringValue(text)) => Some(text),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = r#"{"resourceSpans":[{"resource":{"attributes":[{"key":"service.name","value":{"stringValue":"shop"}}]},"scopeSpans":[{"spans":[{"traceId":"0af7651916cd43dd8448eb211c80319c","spanId":"b7ad6b7169203331","name":"a","kind":1,"startTimeUnixNano":"5","endTimeUnixNano":"9","status":{"code":2,"message":"no"}}]}]}]}"#;

    fn read(text: &str) -> Spans {
        let mut spans = Spans::default();
        spans.read("x.jsonl", &mut text.as_bytes()).unwrap();
        spans
    }

    fn problem(text: &str) -> String {
        let [(bad, _)] = &read(text).skipped()[..] else { panic!("nothing was skipped of {text}") };
        bad.to_string()
    }

    #[test]
    fn a_line_is_read_as_the_agent_writes_it() {
        let spans = read(&format!("{GOOD}\n\n{}\n", GOOD.replace("b7ad", "b7ae")));
        let [one, two] = &spans.all[..] else { panic!("two spans") };
        assert_eq!((one.name.as_str(), one.start, one.end, one.parent, one.failed()), ("a", 5, 9, None, true));
        assert_eq!((one.resource, two.resource, spans.resources.len()), (0, 0, 1), "a resource is kept once");
        assert!(spans.skipped().is_empty());
    }

    #[test]
    fn a_bad_line_is_named_and_the_others_are_read() {
        let spans = read(&format!("{GOOD}\nnonsense\n{{}}\n{GOOD}\n"));
        assert_eq!(spans.all.len(), 2);
        let [(bad, 2)] = &spans.skipped()[..] else { panic!("{:?}", spans.skipped()) };
        assert_eq!(bad.to_string(), "x.jsonl, line 2: not OTLP/JSON: expected ident, column 2");
    }

    #[test]
    fn what_is_wrong_with_a_line_is_said() {
        assert_eq!(problem("{}\n"), "x.jsonl, line 1: JSON, but without `resourceSpans`");
        assert_eq!(problem(&GOOD[..80]), "x.jsonl, line 1: the line is cut off; is the file still being written?");
        assert_eq!(
            problem(&GOOD.replace("b7ad6b7169203331", "")),
            "x.jsonl, line 1: 1 spans without a valid trace id and span id"
        );
        assert!(problem(&GOOD.replace("\"5\"", "\"x\"")).starts_with("x.jsonl, line 1: not OTLP/JSON: invalid digit"));
    }

    #[test]
    fn metrics_of_a_collector_are_passed_over() {
        let spans = read(&format!("{{\"resourceLogs\":[]}}\n{{\"resourceMetrics\":[{{}}]}}\n{GOOD}\n"));
        assert_eq!((spans.all.len(), spans.skipped()), (1, vec![]));
    }

    #[test]
    fn log_records_that_are_of_a_trace_are_read() {
        let record = r#"{"timeUnixNano":"7","severityText":"WARN","body":{"stringValue":"slow"},"eventName":"e","traceId":"0af7651916cd43dd8448eb211c80319c","spanId":"b7ad6b7169203331"}"#;
        let other = r#"{"observedTimeUnixNano":"8","body":{"stringValue":"of no trace"}}"#;
        let line = format!(
            r#"{{"resourceLogs":[{{"scopeLogs":[{{"scope":{{"name":"dbt"}},"logRecords":[{record},{other}]}}]}}]}}"#
        );
        let spans = read(&format!("{line}\n"));
        let [log] = &spans.logs[..] else { panic!("one log record") };
        assert_eq!((log.time, &*log.severity, &*log.logger, log.span.is_some()), (7, "WARN", "dbt", true));
        assert_eq!(log.body.as_ref().and_then(text), Some("slow"));
        assert_eq!(log.attributes[0].key, "event");
        assert!(spans.skipped().is_empty());
    }
}
