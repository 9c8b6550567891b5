//! The agent's own metrics: what became of spans and log records, by the semantic conventions for SDKs.

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use opentelemetry::KeyValue;
use opentelemetry_proto::tonic::collector::metrics::v1::ExportMetricsServiceRequest;
use opentelemetry_proto::tonic::common::v1::{AnyValue, InstrumentationScope, KeyValue as ProtoKeyValue, any_value};
use opentelemetry_proto::tonic::metrics::v1::{
    AggregationTemporality, Gauge, Metric, NumberDataPoint, ResourceMetrics, ScopeMetrics, Sum, metric,
    number_data_point,
};
use opentelemetry_proto::tonic::resource::v1::Resource as ProtoResource;
use opentelemetry_proto::transform::common::tonic::ResourceAttributesWithSchema;
use opentelemetry_sdk::Resource;
use opentelemetry_semantic_conventions::SCHEMA_URL;
use opentelemetry_semantic_conventions::attribute::{
    ERROR_TYPE, HOST_NAME, OTEL_COMPONENT_NAME, PROCESS_PID, SERVICE_NAME, SERVICE_VERSION,
};
use prost::Message as _;
use tokio::sync::oneshot;
use tokio::time::interval;
use tracing::debug;

use super::target::{Endpoint, Protocol, TargetError};
use super::transport::{Answer, Signal, Transport};
use crate::export::pipeline::{Counted, Shared};

/// Sends the counters of one output, now and then and at the end. What cannot be sent is not kept: the next one says it too.
pub(in crate::export) struct Metrics {
    transport: Transport,
    every: Duration,
    started: SystemTime,
}

impl Metrics {
    /// Prepares the way; nothing is sent yet.
    pub(in crate::export) fn new(endpoint: &Endpoint, every: Duration) -> Result<Self, TargetError> {
        Ok(Self { transport: Transport::new(endpoint, Signal::Metrics)?, every, started: SystemTime::now() })
    }

    /// Runs until the end, or until nobody can announce it any more.
    pub(in crate::export) async fn run(self, mut end: oneshot::Receiver<()>, shared: Arc<Shared>) {
        let mut ticks = interval(self.every.max(Duration::from_millis(100)));
        ticks.tick().await;
        loop {
            tokio::select! {
                _ = ticks.tick() => self.send(&shared).await,
                _ = &mut end => {
                    self.send(&shared).await;
                    return;
                }
            }
        }
    }

    async fn send(&self, shared: &Shared) {
        let request = self.request(shared);
        let json = self.transport.endpoint().protocol == Protocol::HttpJson;
        let body = if json { serde_json::to_vec(&request).unwrap_or_default() } else { request.encode_to_vec() };
        match self.transport.send(body.into()).await {
            Answer::Accepted { .. } => {}
            // The same endpoint's spans fail too, and say so louder; or it takes no metrics.
            Answer::Retry { reason, .. } | Answer::Refused(reason) => {
                debug!("metrics to {}: {reason}", self.transport.endpoint().shown());
            }
        }
    }

    fn request(&self, shared: &Shared) -> ExportMetricsServiceRequest {
        let resource = Resource::builder_empty()
            .with_schema_url(
                [
                    KeyValue::new(SERVICE_NAME, "floe-agent"),
                    KeyValue::new(SERVICE_VERSION, env!("CARGO_PKG_VERSION")),
                    KeyValue::new(PROCESS_PID, i64::from(std::process::id())),
                    KeyValue::new(HOST_NAME, rustix::system::uname().nodename().to_string_lossy().into_owned()),
                ],
                SCHEMA_URL,
            )
            .build();
        let ResourceAttributesWithSchema { attributes, schema_url } = (&resource).into();
        let mut metrics = Vec::new();
        for (signal, counted) in [("span", shared.counted(Signal::Traces)), ("log", shared.counted(Signal::Logs))] {
            metrics.extend(self.of(shared.name(), signal, counted));
        }
        ExportMetricsServiceRequest {
            resource_metrics: vec![ResourceMetrics {
                resource: Some(ProtoResource { attributes: attributes.0, ..ProtoResource::default() }),
                scope_metrics: vec![ScopeMetrics {
                    scope: Some(InstrumentationScope {
                        name: "floe-agent".to_owned(),
                        version: env!("CARGO_PKG_VERSION").to_owned(),
                        ..InstrumentationScope::default()
                    }),
                    metrics,
                    schema_url: SCHEMA_URL.to_owned(),
                }],
                schema_url: schema_url.unwrap_or_default(),
            }],
        }
    }

    fn of(&self, sink: &str, signal: &str, counted: Counted) -> [Metric; 2] {
        let Counted { sent, failed, dropped, waiting } = counted;
        let nanos = |time: SystemTime| time.duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos() as u64;
        let point = |value: u64, error: Option<&str>| NumberDataPoint {
            attributes: [Some((OTEL_COMPONENT_NAME, sink)), error.map(|error| (ERROR_TYPE, error))]
                .into_iter()
                .flatten()
                .map(|(key, value)| ProtoKeyValue {
                    key: key.to_owned(),
                    value: Some(AnyValue { value: Some(any_value::Value::StringValue(value.to_owned())) }),
                    ..ProtoKeyValue::default()
                })
                .collect(),
            start_time_unix_nano: nanos(self.started),
            time_unix_nano: nanos(SystemTime::now()),
            value: Some(number_data_point::Value::AsInt(i64::try_from(value).unwrap_or(i64::MAX))),
            ..NumberDataPoint::default()
        };
        let exported = Sum {
            data_points: vec![
                point(sent, None),
                point(failed, Some("export_failed")),
                // The conventions' word for it.
                point(dropped, Some("queue_full")),
            ],
            aggregation_temporality: AggregationTemporality::Cumulative.into(),
            is_monotonic: true,
        };
        let metric = |name: String, unit: &str, data| Metric {
            name,
            unit: unit.to_owned(),
            data: Some(data),
            ..Metric::default()
        };
        let unit = if signal == "span" { "{span}" } else { "{log_record}" };
        [
            metric(format!("otel.sdk.exporter.{signal}.exported"), unit, metric::Data::Sum(exported)),
            metric(
                format!("otel.sdk.processor.{signal}.queue.size"),
                unit,
                metric::Data::Gauge(Gauge { data_points: vec![point(waiting, None)] }),
            ),
        ]
    }
}
