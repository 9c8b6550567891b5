//! Spans and log records as OTLP requests.

use std::mem::size_of;
use std::sync::Arc;

use opentelemetry::{Array, InstrumentationScope, KeyValue, Value};
use opentelemetry_proto::tonic::collector::logs::v1::ExportLogsServiceRequest;
use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceRequest;
use opentelemetry_proto::tonic::common::v1::{AnyValue, any_value};
use opentelemetry_proto::tonic::logs::v1::{LogRecord, ResourceLogs, ScopeLogs};
use opentelemetry_proto::tonic::resource::v1::Resource as ProtoResource;
use opentelemetry_proto::transform::common::tonic::ResourceAttributesWithSchema;
use opentelemetry_proto::transform::trace::tonic::group_spans_by_resource_and_scope;
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::trace::SpanData;

use crate::trace::{FinishedLog, FinishedSpan};

/// Items by their key, in the order in which the keys appear.
fn group<K, V>(items: impl Iterator<Item = (K, V)>, same: impl Fn(&K, &K) -> bool) -> Vec<(K, Vec<V>)> {
    let mut groups: Vec<(K, Vec<V>)> = Vec::new();
    // Items of one process come in runs.
    let mut last = 0;
    for (key, value) in items {
        let found = match groups.get(last) {
            Some((known, _)) if same(known, &key) => Some(last),
            _ => groups.iter().position(|(known, _)| same(known, &key)),
        };
        if let Some(at) = found {
            groups[at].1.push(value);
            last = at;
        } else {
            last = groups.len();
            groups.push((key, vec![value]));
        }
    }
    groups
}

/// The OTLP export request that carries these spans.
pub fn request(spans: impl IntoIterator<Item = FinishedSpan>) -> ExportTraceServiceRequest {
    let spans = spans.into_iter().map(|FinishedSpan { resource, span, .. }| (resource, span));
    let resource_spans = group::<Arc<Resource>, SpanData>(spans, Arc::ptr_eq)
        .into_iter()
        .flat_map(|(resource, spans)| group_spans_by_resource_and_scope(spans, &(&*resource).into()))
        .collect();
    ExportTraceServiceRequest { resource_spans }
}

/// The OTLP export request that carries these log records.
pub fn log_request(logs: impl IntoIterator<Item = FinishedLog>) -> ExportLogsServiceRequest {
    let logs = logs.into_iter().map(|FinishedLog { resource, scope, record }| (resource, (scope, record)));
    let of_resource = |(resource, logs): (Arc<Resource>, Vec<(InstrumentationScope, LogRecord)>)| {
        let ResourceAttributesWithSchema { attributes, schema_url } = (&*resource).into();
        let of_scope = |(scope, log_records): (InstrumentationScope, Vec<LogRecord>)| ScopeLogs {
            schema_url: scope.schema_url().unwrap_or_default().to_owned(),
            scope: Some((&scope, None).into()),
            log_records,
        };
        ResourceLogs {
            resource: Some(ProtoResource { attributes: attributes.0, ..ProtoResource::default() }),
            scope_logs: group(logs.into_iter(), PartialEq::eq).into_iter().map(of_scope).collect(),
            schema_url: schema_url.unwrap_or_default(),
        }
    };
    let resource_logs = group(logs, Arc::ptr_eq).into_iter().map(of_resource).collect();
    ExportLogsServiceRequest { resource_logs }
}

/// About how many bytes of memory something takes while it waits.
pub(super) trait Weigh {
    fn weight(&self) -> usize;
}

impl Weigh for FinishedSpan {
    fn weight(&self) -> usize {
        let span = &self.span;
        let attributes = |attributes: &[KeyValue]| attributes.iter().map(attribute).sum::<usize>();
        let events: usize =
            span.events.iter().map(|event| size_of_val(event) + event.name.len() + attributes(&event.attributes)).sum();
        let links: usize = span.links.iter().map(|link| size_of_val(link) + attributes(&link.attributes)).sum();
        let status = match &span.status {
            opentelemetry::trace::Status::Error { description } => description.len(),
            _ => 0,
        };
        size_of::<Self>() + span.name.len() + attributes(&span.attributes) + events + links + status
    }
}

fn attribute(attribute: &KeyValue) -> usize {
    let text = match &attribute.value {
        Value::String(text) => text.as_str().len(),
        Value::Array(Array::String(texts)) => texts.iter().map(|text| size_of_val(text) + text.as_str().len()).sum(),
        Value::Array(_) => 64,
        _ => 0,
    };
    // Room that a vector keeps in reserve.
    size_of::<KeyValue>() * 3 / 2 + text
}

impl Weigh for FinishedLog {
    fn weight(&self) -> usize {
        let record = &self.record;
        let attributes: usize =
            record.attributes.iter().map(|kv| size_of_val(kv) + kv.key.len() + value(kv.value.as_ref())).sum();
        size_of::<Self>() + record.severity_text.len() + attributes + value(record.body.as_ref())
    }
}

fn value(value: Option<&AnyValue>) -> usize {
    match value.and_then(|value| value.value.as_ref()) {
        Some(any_value::Value::StringValue(text)) => text.len(),
        Some(any_value::Value::BytesValue(bytes)) => bytes.len(),
        Some(any_value::Value::ArrayValue(array)) => {
            array.values.iter().map(|item| size_of::<AnyValue>() + self::value(Some(item))).sum()
        }
        Some(any_value::Value::KvlistValue(list)) => {
            list.values.iter().map(|kv| size_of_val(kv) + kv.key.len() + self::value(kv.value.as_ref())).sum()
        }
        _ => 0,
    }
}
