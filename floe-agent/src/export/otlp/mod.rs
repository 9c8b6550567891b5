//! OTLP: batches, queues, retries. One lane per signal; `transport` makes one request, `target` says where to.

mod lane;
mod metrics;
mod target;
mod transport;

pub use target::{Endpoint, Headers, Protocol, TargetError};
pub use transport::Signal;

use std::time::Duration;

pub(super) use lane::Lane;
pub(super) use metrics::Metrics;

/// Where each signal goes.
#[derive(Clone, Debug)]
pub struct OtlpTarget {
    /// Spans.
    pub traces: Option<Endpoint>,
    /// Log records.
    pub logs: Option<Endpoint>,
    /// The agent's own metrics.
    pub metrics: Option<Endpoint>,
    /// How requests of spans are filled.
    pub batching: Batching,
    /// How requests of log records are filled.
    pub log_batching: Batching,
    /// How often the agent's own metrics are sent.
    pub metrics_interval: Duration,
}

impl OtlpTarget {
    /// Its name in messages and reports.
    pub fn name(&self) -> String {
        let first = self.traces.as_ref().or(self.logs.as_ref()).or(self.metrics.as_ref());
        first.map_or_else(|| "otlp".to_owned(), Endpoint::shown)
    }
}

/// How requests are filled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Batching {
    /// Most items of a request.
    pub items: usize,
    /// How long an item waits for its request to fill.
    pub delay: Duration,
}

impl Default for Batching {
    fn default() -> Self {
        Self { items: 512, delay: Duration::from_secs(1) }
    }
}

#[cfg(test)]
mod outages;
#[cfg(test)]
pub(crate) mod tests;
