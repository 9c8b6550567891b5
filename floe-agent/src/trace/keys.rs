//! Spans by their keys, for links and parents.

use std::collections::{HashMap, VecDeque};

use opentelemetry::trace::{SpanId, TraceId};

/// Keys that are remembered; the oldest is forgotten for a new one.
const REMEMBERED: usize = 16_384;

/// The spans that began last, by trace and key.
#[derive(Debug, Default)]
pub(super) struct Keys {
    spans: HashMap<(TraceId, String), SpanId>,
    order: VecDeque<(TraceId, String)>,
}

impl Keys {
    /// A span with this key begins. A later one of the same key replaces it.
    pub(super) fn add(&mut self, trace: TraceId, key: &str, span: SpanId) {
        let key = (trace, key.to_owned());
        if self.spans.insert(key.clone(), span).is_some() {
            return;
        }
        if self.order.len() >= REMEMBERED
            && let Some(oldest) = self.order.pop_front()
        {
            self.spans.remove(&oldest);
        }
        self.order.push_back(key);
    }

    pub(super) fn get(&self, trace: TraceId, key: &str) -> Option<SpanId> {
        self.spans.get(&(trace, key.to_owned())).copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_oldest_keys_are_forgotten() {
        let mut keys = Keys::default();
        let trace = TraceId::from(1);
        for number in 0..=REMEMBERED as u64 {
            keys.add(trace, &number.to_string(), SpanId::from(number + 1));
        }
        keys.add(trace, "1", SpanId::from(7));
        assert_eq!(keys.get(trace, "0"), None);
        assert_eq!(keys.get(trace, "1"), Some(SpanId::from(7)), "the last one counts");
        assert_eq!(keys.get(TraceId::from(2), "1"), None, "another trace");
        assert_eq!(keys.order.len(), REMEMBERED);
    }
}
