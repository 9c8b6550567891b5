//! A log record on its way out.

use std::sync::Arc;

use opentelemetry::InstrumentationScope;
use opentelemetry_proto::tonic::logs::v1::LogRecord;
use opentelemetry_sdk::Resource;

/// A log record and the process that it comes from.
#[derive(Clone, Debug)]
pub struct FinishedLog {
    /// The process.
    pub resource: Arc<Resource>,
    /// What wrote it: the name of the logger, for instance.
    pub scope: InstrumentationScope,
    /// The record, with the ids of the span that it belongs to.
    pub record: LogRecord,
}
