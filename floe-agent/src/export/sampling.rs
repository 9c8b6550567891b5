//! Which traces are kept: by a ratio of the trace ids, the same on every node, and all those with an error.
//!
//! A trace that the ratio leaves out waits here, within a bound of memory and time, for an error; when it ends without one it
//! is dropped and counted.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use opentelemetry::Key;
use opentelemetry::trace::{SpanContext, SpanId, Status, TraceId};
use opentelemetry_sdk::Resource;
use opentelemetry_semantic_conventions::attribute::DEPLOYMENT_ENVIRONMENT_NAME;

use super::batch::Weigh as _;
use crate::trace::FinishedSpan;

/// How long stragglers of a trace whose root has ended are waited for.
const GRACE: Duration = Duration::from_secs(5);
/// How often it is looked what has waited long enough.
const SWEEP: Duration = Duration::from_secs(1);
/// Decisions that are remembered.
const DECISIONS: usize = 65_536;

/// How to sample.
#[derive(Clone, Debug, PartialEq)]
pub struct SamplingRules {
    /// One ratio for everything; `None`: by environment.
    pub fixed: Option<f64>,
    /// Ratios by `deployment.environment.name`; 1.0 for others.
    pub environments: BTreeMap<String, f64>,
    /// What the sampled flag of a context from outside says, holds.
    pub parent_based: bool,
    /// Traces with an error are kept.
    pub keep_errors: bool,
    /// Memory for traces that wait for an error.
    pub hold_memory: usize,
    /// How long they wait without a new span.
    pub hold_time: Duration,
}

impl Default for SamplingRules {
    fn default() -> Self {
        let environments =
            [("dev", 1.0), ("development", 1.0), ("staging", 0.5), ("stage", 0.5), ("prod", 0.1), ("production", 0.1)];
        Self {
            fixed: None,
            environments: environments.map(|(name, ratio)| (name.to_owned(), ratio)).into(),
            parent_based: true,
            keep_errors: true,
            hold_memory: 64 << 20,
            hold_time: Duration::from_hours(1),
        }
    }
}

/// What the sampler did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SamplingStats {
    /// Traces that were left out.
    pub traces_dropped: u64,
    /// Their spans.
    pub spans_dropped: u64,
    /// Traces that were kept only for their error.
    pub traces_kept_for_errors: u64,
    /// Traces that lost spans because too many waited.
    pub traces_evicted: u64,
}

/// Keeps or leaves out traces.
#[derive(Debug)]
pub struct Sampler {
    rules: SamplingRules,
    decisions: HashMap<TraceId, Decision>,
    decided: VecDeque<TraceId>,
    held: HashMap<TraceId, Held>,
    /// Held traces, the one without a new span for the longest first.
    order: BTreeMap<u64, TraceId>,
    clock: u64,
    memory: usize,
    swept: Option<Instant>,
    /// The ratio of the last resource: spans of one process come in runs.
    ratio: Option<(Arc<Resource>, f64)>,
    stats: SamplingStats,
}

/// A trace that waits for an error.
#[derive(Debug)]
struct Held {
    spans: Vec<FinishedSpan>,
    bytes: usize,
    order: u64,
    last: Instant,
    /// Its root has ended.
    ended: bool,
}

/// What becomes of a trace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Decision {
    /// The ratio keeps it: of traces, those with a random number below this are left out.
    Ratio(u64),
    /// It has an error.
    Error,
    Drop,
}

/// What to do with a span.
enum Fate {
    /// Of traces, those with a random number below this are left out; 0 where that is not known.
    Keep(u64),
    Hold,
    Drop,
}

impl Sampler {
    /// A sampler with these rules.
    pub fn new(rules: SamplingRules) -> Self {
        Self {
            rules,
            decisions: HashMap::new(),
            decided: VecDeque::new(),
            held: HashMap::new(),
            order: BTreeMap::new(),
            clock: 0,
            memory: 0,
            swept: None,
            ratio: None,
            stats: SamplingStats::default(),
        }
    }

    /// What was done so far.
    pub fn stats(&self) -> SamplingStats {
        self.stats
    }

    /// Gives back the spans that are to be exported now.
    pub fn pass(&mut self, spans: Vec<FinishedSpan>, now: Instant) -> Vec<FinishedSpan> {
        if self.swept.is_none_or(|swept| now.duration_since(swept) >= SWEEP) {
            self.sweep(now);
            self.swept = Some(now);
        }
        if self.rules.fixed == Some(1.0) && !self.rules.parent_based {
            return spans;
        }
        let mut kept = Vec::with_capacity(spans.len());
        for span in spans {
            match self.fate(&span) {
                Fate::Keep(0) => kept.push(span),
                Fate::Keep(threshold) => {
                    let mut span = span;
                    span.span.span_context = with_threshold(&span.span.span_context, threshold);
                    kept.push(span);
                }
                Fate::Drop => self.stats.spans_dropped += 1,
                Fate::Hold => self.hold(span, now, &mut kept),
            }
        }
        kept
    }

    /// Ends: what still waits is left out.
    pub fn finish(&mut self) {
        for trace in self.held.keys().copied().collect::<Vec<_>>() {
            self.drop_trace(trace);
        }
    }

    fn fate(&mut self, span: &FinishedSpan) -> Fate {
        if let (true, Some(sampled)) = (self.rules.parent_based, span.sampled) {
            return if sampled { Fate::Keep(0) } else { self.leave_out(span) };
        }
        let trace = span.span.span_context.trace_id();
        match self.decisions.get(&trace) {
            Some(Decision::Ratio(threshold)) => return Fate::Keep(*threshold),
            Some(Decision::Error) => return Fate::Keep(0),
            Some(Decision::Drop) => return Fate::Drop,
            None if self.held.contains_key(&trace) => return Fate::Hold,
            None => {}
        }
        let ratio = self.ratio(&span.resource);
        if is_sampled(trace, ratio) {
            let threshold = threshold(ratio);
            if threshold > 0 || !self.decisions.is_empty() || !self.held.is_empty() {
                self.decide(trace, Decision::Ratio(threshold));
            }
            Fate::Keep(threshold)
        } else if self.rules.keep_errors {
            Fate::Hold
        } else {
            self.leave_out(span)
        }
    }

    fn leave_out(&mut self, span: &FinishedSpan) -> Fate {
        let trace = span.span.span_context.trace_id();
        if self.decisions.get(&trace) != Some(&Decision::Drop) {
            self.stats.traces_dropped += 1;
            self.decide(trace, Decision::Drop);
        }
        Fate::Drop
    }

    fn ratio(&mut self, resource: &Arc<Resource>) -> f64 {
        if let Some(fixed) = self.rules.fixed {
            return fixed;
        }
        if let Some((known, ratio)) = &self.ratio
            && Arc::ptr_eq(known, resource)
        {
            return *ratio;
        }
        let name = resource.get(&Key::from_static_str(DEPLOYMENT_ENVIRONMENT_NAME));
        let name = name.map(|name| name.as_str().to_lowercase());
        let ratio = name.and_then(|name| self.rules.environments.get(&name)).copied().unwrap_or(1.0);
        self.ratio = Some((Arc::clone(resource), ratio));
        ratio
    }

    fn hold(&mut self, span: FinishedSpan, now: Instant, kept: &mut Vec<FinishedSpan>) {
        let trace = span.span.span_context.trace_id();
        if matches!(span.span.status, Status::Error { .. }) {
            kept.extend(self.take(trace).map(|held| held.spans).unwrap_or_default());
            kept.push(span);
            self.stats.traces_kept_for_errors += 1;
            self.decide(trace, Decision::Error);
            return;
        }
        let bytes = span.weight();
        self.clock += 1;
        let order = self.clock;
        let held = self.held.entry(trace).or_insert_with(|| Held {
            spans: Vec::new(),
            bytes: 0,
            order,
            last: now,
            ended: false,
        });
        self.order.remove(&held.order);
        self.order.insert(order, trace);
        held.order = order;
        held.last = now;
        held.ended |= span.span.parent_span_id == SpanId::INVALID;
        held.bytes += bytes;
        held.spans.push(span);
        self.memory += bytes;
        while self.memory > self.rules.hold_memory {
            let Some(oldest) = self.order.values().next().copied() else {
                return;
            };
            let evicted = self.take(oldest).map_or(0, |held| held.spans.len());
            self.stats.traces_evicted += 1;
            self.stats.spans_dropped += evicted as u64;
        }
    }

    fn take(&mut self, trace: TraceId) -> Option<Held> {
        let held = self.held.remove(&trace)?;
        self.order.remove(&held.order);
        self.memory -= held.bytes;
        Some(held)
    }

    fn drop_trace(&mut self, trace: TraceId) {
        if let Some(held) = self.take(trace) {
            self.stats.traces_dropped += 1;
            self.stats.spans_dropped += held.spans.len() as u64;
            self.decide(trace, Decision::Drop);
        }
    }

    fn sweep(&mut self, now: Instant) {
        let hold = self.rules.hold_time;
        let over = |held: &Held| now.duration_since(held.last) > if held.ended { GRACE.min(hold) } else { hold };
        let over: Vec<_> = self.held.iter().filter(|(_, held)| over(held)).map(|(trace, _)| *trace).collect();
        for trace in over {
            self.drop_trace(trace);
        }
    }

    fn decide(&mut self, trace: TraceId, decision: Decision) {
        if self.decisions.insert(trace, decision).is_none() {
            self.decided.push_back(trace);
            if self.decided.len() > DECISIONS
                && let Some(oldest) = self.decided.pop_front()
            {
                self.decisions.remove(&oldest);
            }
        }
    }
}

/// Whether the ratio keeps a trace. As OpenTelemetry's consistent probability sampling has it: the last 56 bits of the id are
/// the trace's random number, and it is kept if that is not below the threshold. So every node decides alike, and what a small
/// ratio keeps a larger one keeps too. (The first bits of an id's second half are no random number: in run ids, which are
/// UUIDs, they are constant.)
fn is_sampled(trace: TraceId, ratio: f64) -> bool {
    let id = trace.to_bytes();
    let random = u64::from_be_bytes([0, id[9], id[10], id[11], id[12], id[13], id[14], id[15]]);
    random >= threshold(ratio) && ratio > 0.0
}

fn threshold(ratio: f64) -> u64 {
    const RANGE: f64 = (1_u64 << 56) as f64;
    ((1.0 - ratio.clamp(0.0, 1.0)) * RANGE) as u64
}

/// The context with `ot=th:...` in its tracestate: what a backend needs to know of how many traces this one stands for.
fn with_threshold(context: &SpanContext, threshold: u64) -> SpanContext {
    let state = context.trace_state();
    let mut parts = vec![format!("th:{}", format!("{threshold:014x}").trim_end_matches('0'))];
    let known = state.get("ot").into_iter().flat_map(|known| known.split(';'));
    parts.extend(known.filter(|part| !part.starts_with("th:")).map(str::to_owned));
    let state = state.insert("ot", parts.join(";")).unwrap_or_else(|_| state.clone());
    SpanContext::new(context.trace_id(), context.span_id(), context.trace_flags(), context.is_remote(), state)
}

#[cfg(test)]
mod tests {
    use opentelemetry::KeyValue;
    use opentelemetry::trace::TraceId;
    use opentelemetry_sdk::trace::{IdGenerator as _, RandomIdGenerator};

    use super::*;
    use crate::export::tree::tests::span;
    use crate::trace::ProcessFacts;
    use crate::units::{Epoch, Pid};

    fn sampler(ratio: f64, keep_errors: bool) -> Sampler {
        Sampler::new(SamplingRules { fixed: Some(ratio), keep_errors, ..SamplingRules::default() })
    }

    fn failed(mut span: FinishedSpan) -> FinishedSpan {
        span.span.status = Status::error("no");
        span
    }

    fn names(spans: &[FinishedSpan]) -> Vec<&str> {
        spans.iter().map(|span| &*span.span.name).collect()
    }

    #[test]
    fn the_ratio_holds_for_random_ids_and_for_uuids() {
        for uuid in [false, true] {
            let ids: Vec<TraceId> = (0..20_000)
                .map(|_| {
                    let mut id = RandomIdGenerator::default().new_trace_id().to_bytes();
                    if uuid {
                        (id[6], id[8]) = (id[6] & 0x0f | 0x40, id[8] & 0x3f | 0x80);
                    }
                    TraceId::from_bytes(id)
                })
                .collect();
            let kept = |ratio| ids.iter().filter(|id| is_sampled(**id, ratio)).count();
            assert_eq!((kept(0.0), kept(1.0)), (0, 20_000));
            for ratio in [0.1, 0.5] {
                let expected = 20_000.0 * ratio;
                assert!((kept(ratio) as f64 - expected).abs() < 500.0, "{uuid} {ratio} {}", kept(ratio));
            }
            assert!(ids.iter().all(|id| !is_sampled(*id, 0.1) || is_sampled(*id, 0.5)), "what 0.1 keeps 0.5 keeps too");
        }
    }

    #[test]
    fn the_decision_is_that_of_the_collectors_and_of_other_sdks() {
        // Threshold of 0.5 is 0x80000000000000.
        let id = |random: u128| TraceId::from(0xffff_ffff_ffff_ffff_ff00_0000_0000_0000 | random);
        assert!(is_sampled(id(0x80_0000_0000_0000), 0.5));
        assert!(!is_sampled(id(0x7f_ffff_ffff_ffff), 0.5));
    }

    #[test]
    fn spans_that_the_ratio_keeps_say_how_many_they_stand_for() {
        let of = |spans: Vec<FinishedSpan>| -> Vec<String> {
            spans.iter().map(|span| span.span.span_context.trace_state().header()).collect()
        };
        let (kept, left_out) = (u128::MAX, 1);
        let now = Instant::now();
        let mut half = sampler(0.5, true);
        assert_eq!(of(half.pass(vec![span(kept, 1, 0, "a", 0, 1), span(kept, 2, 1, "b", 0, 1)], now)), ["ot=th:8"; 2]);
        // How many traces one stands for that is kept for its error is not known.
        assert_eq!(of(half.pass(vec![failed(span(left_out, 1, 0, "a", 0, 1))], now)), [""]);
        assert_eq!(of(half.pass(vec![span(left_out, 2, 0, "a", 0, 1)], now)), [""]);
        assert_eq!(of(sampler(1.0, true).pass(vec![span(kept, 1, 0, "a", 0, 1)], now)), [""]);
        // What others wrote there stays.
        let mut with_state = span(kept, 1, 0, "a", 0, 1);
        let context = with_state.span.span_context.clone();
        let state = "x=y,ot=th:4;rv:ffffffffffffff".parse().unwrap();
        let flags = context.trace_flags();
        with_state.span.span_context = SpanContext::new(context.trace_id(), context.span_id(), flags, false, state);
        assert_eq!(of(sampler(0.75, true).pass(vec![with_state], now)), ["ot=th:4;rv:ffffffffffffff,x=y"]);
        let threshold = |ratio| with_threshold(&context, threshold(ratio)).trace_state().header();
        assert_eq!(threshold(0.25), "ot=th:c");
        assert!(threshold(0.1).starts_with("ot=th:e66666666666"), "{}", threshold(0.1));
    }

    #[test]
    fn traces_are_left_out_and_counted() {
        let mut sampler = sampler(0.0, false);
        let now = Instant::now();
        assert!(sampler.pass(vec![span(1, 1, 0, "a", 0, 1), span(1, 2, 1, "b", 0, 1)], now).is_empty());
        assert!(sampler.pass(vec![failed(span(2, 1, 0, "a", 0, 1))], now).is_empty());
        assert_eq!(sampler.stats(), SamplingStats { traces_dropped: 2, spans_dropped: 3, ..SamplingStats::default() });
    }

    #[test]
    fn a_trace_with_an_error_is_kept_as_a_whole() {
        let mut sampler = sampler(0.0, true);
        let now = Instant::now();
        assert!(sampler.pass(vec![span(1, 2, 1, "early", 0, 1), span(2, 2, 1, "other", 0, 1)], now).is_empty());
        let kept = sampler.pass(vec![failed(span(1, 3, 1, "failed", 1, 2))], now);
        assert_eq!(names(&kept), ["early", "failed"]);
        assert_eq!(names(&sampler.pass(vec![span(1, 1, 0, "root", 0, 9)], now)), ["root"], "and what comes later");
        sampler.finish();
        let stats = sampler.stats();
        assert_eq!((stats.traces_kept_for_errors, stats.traces_dropped, stats.spans_dropped), (1, 1, 1));
        assert_eq!((sampler.memory, sampler.order.len()), (0, 0));
    }

    #[test]
    fn a_trace_that_ends_without_an_error_is_dropped_after_a_while() {
        let mut sampler = sampler(0.0, true);
        let begin = Instant::now();
        sampler.pass(vec![span(1, 1, 0, "root", 0, 9), span(2, 2, 1, "open", 0, 1)], begin);
        sampler.pass(Vec::new(), begin + GRACE + SWEEP);
        assert_eq!((sampler.stats().traces_dropped, sampler.held.len()), (1, 1));
        assert!(sampler.pass(vec![failed(span(1, 5, 0, "late", 0, 9))], begin + GRACE + SWEEP).is_empty());
        sampler.pass(Vec::new(), begin + Duration::from_hours(2));
        assert_eq!((sampler.stats().traces_dropped, sampler.held.len(), sampler.memory), (2, 0, 0));
    }

    #[test]
    fn memory_is_bounded_and_the_trace_that_was_silent_longest_goes_first() {
        let mut sampler = sampler(0.0, true);
        sampler.rules.hold_memory = 10 * span(1, 1, 1, "s", 0, 1).weight();
        let now = Instant::now();
        for trace in 1..=3 {
            let spans = (0..4).map(|id| span(trace, id + 1, 99, "s", 0, 1)).collect();
            sampler.pass(spans, now);
            assert!(sampler.memory <= sampler.rules.hold_memory);
        }
        assert_eq!(sampler.stats().traces_evicted, 1);
        assert!(!sampler.held.contains_key(&TraceId::from(1)));
        assert_eq!(sampler.pass(vec![failed(span(3, 9, 1, "no", 0, 1))], now).len(), 5);
    }

    #[test]
    fn the_ratio_is_that_of_the_environment_and_one_where_it_is_unknown() {
        let mut sampler = Sampler::new(SamplingRules { keep_errors: false, ..SamplingRules::default() });
        let resource = |name: &'static str| {
            let facts = ProcessFacts {
                attributes: vec![KeyValue::new(DEPLOYMENT_ENVIRONMENT_NAME, name)],
                ..ProcessFacts::unknown(Pid(1), Epoch(1))
            };
            Arc::new(facts.resource())
        };
        let now = Instant::now();
        let mut part = |resource: Option<Arc<Resource>>| {
            let ids = RandomIdGenerator::default();
            let spans = (0..2000).map(|_| {
                let mut span = span(u128::from_be_bytes(ids.new_trace_id().to_bytes()), 1, 0, "s", 0, 1);
                if let Some(resource) = &resource {
                    span.resource = Arc::clone(resource);
                }
                span
            });
            sampler.pass(spans.collect(), now).len()
        };
        assert_eq!(part(None), 2000);
        assert_eq!(part(Some(resource("dev"))), 2000);
        assert!((800..1200).contains(&part(Some(resource("Staging")))));
        assert!((100..320).contains(&part(Some(resource("production")))));
        assert_eq!(part(Some(resource("elsewhere"))), 2000);
    }

    #[test]
    fn the_flag_of_a_parent_outside_holds() {
        let mut sampler = sampler(0.0, true);
        let with = |trace, sampled| FinishedSpan { sampled: Some(sampled), ..span(trace, 1, 9, "s", 0, 1) };
        let now = Instant::now();
        assert_eq!(sampler.pass(vec![with(1, true)], now).len(), 1);
        assert!(sampler.pass(vec![failed(with(2, false))], now).is_empty());
        assert_eq!(sampler.stats().traces_dropped, 1);
        sampler.rules.parent_based = false;
        assert!(sampler.pass(vec![with(3, true)], now).is_empty());
    }
}
