//! The memory of a queue whose endpoint is away, as the allocator sees it.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, SystemTime};

use floe_agent::export::{
    Batching, Endpoint, Finish, OtlpTarget, Output, Pipeline, Protocol, QueueBounds, RedactionRules,
};
use floe_agent::trace::FinishedSpan;
use opentelemetry::trace::{SpanContext, SpanId, SpanKind, Status, TraceFlags, TraceId, TraceState};
use opentelemetry::{InstrumentationScope, KeyValue};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::trace::{SpanData, SpanEvents, SpanLinks};

/// Counts what is allocated.
struct Counting;

static NOW: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

// SAFETY: everything is the system's allocator's; the counters are beside it.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let now = NOW.fetch_add(layout.size(), Ordering::Relaxed) + layout.size();
        PEAK.fetch_max(now, Ordering::Relaxed);
        // SAFETY: as the caller promises.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        NOW.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: as the caller promises.
        unsafe { System.dealloc(memory, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn spans(ids: std::ops::Range<u64>, resource: &Arc<Resource>) -> Vec<FinishedSpan> {
    let span = |id: u64| {
        let context = SpanContext::new(
            TraceId::from(1_u128),
            SpanId::from(id + 1),
            TraceFlags::SAMPLED,
            false,
            TraceState::default(),
        );
        let text = |number: u64| KeyValue::new(format!("shop.attribute.{number}"), format!("{id:0>60}"));
        SpanData {
            span_context: context,
            parent_span_id: SpanId::INVALID,
            parent_span_is_remote: false,
            span_kind: SpanKind::Internal,
            name: format!("work {id}").into(),
            start_time: SystemTime::now(),
            end_time: SystemTime::now(),
            attributes: (0..6).map(text).collect(),
            dropped_attributes_count: 0,
            events: SpanEvents::default(),
            links: SpanLinks::default(),
            status: Status::Unset,
            instrumentation_scope: InstrumentationScope::builder("test").build(),
        }
    };
    ids.map(|id| FinishedSpan { resource: Arc::clone(resource), span: span(id), sampled: None }).collect()
}

#[tokio::test]
async fn the_queue_of_an_endpoint_that_is_away_keeps_within_its_bound() {
    const BOUND: usize = 16 << 20;
    let closed = std::net::TcpListener::bind("127.0.0.1:0").and_then(|socket| socket.local_addr()).expect("a port");
    let target = OtlpTarget {
        traces: Some(Endpoint::new(&format!("http://{closed}"), "test", Protocol::Grpc).expect("an endpoint")),
        logs: None,
        metrics: None,
        batching: Batching::default(),
        log_batching: Batching::default(),
        metrics_interval: Duration::from_mins(1),
    };
    let bounds = QueueBounds { spans: usize::MAX, bytes: BOUND, ..QueueBounds::default() };
    let outputs = [Output::Otlp(Box::new(target))];
    let pipeline = Pipeline::start(&outputs, bounds, RedactionRules::default()).expect("a pipeline");
    let resource = Arc::new(Resource::builder_empty().build());
    let before = NOW.load(Ordering::Relaxed);
    PEAK.store(before, Ordering::Relaxed);
    for batch in 0..500 {
        pipeline.send(spans(batch * 200..(batch + 1) * 200, &resource));
        // The queue encodes.
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    let peak = PEAK.load(Ordering::Relaxed) - before;
    let report =
        pipeline.shutdown(Finish { deadline: Duration::from_millis(100), ..Finish::default() }).await.remove(0);
    let mebibytes = |bytes: usize| bytes as f64 / f64::from(1 << 20);
    println!("{:.1} MiB at most of {:.1}; {report}", mebibytes(peak), mebibytes(BOUND));
    assert!(report.spans.dropped > 50_000, "the bound was reached: {report}");
    assert!(peak > BOUND / 2, "it is used: {:.1} MiB", mebibytes(peak));
    // A request that is being made has its spans beside it.
    assert!(peak < BOUND * 5 / 4, "{:.1} MiB", mebibytes(peak));
}
