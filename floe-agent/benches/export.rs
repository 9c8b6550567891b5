//! Throughput of everything behind the kernel, on one core: recorded events through decoding, assembly, sampling, redaction and
//! OTLP/gRPC to a collector in another process. `cargo xtask bench --only export` runs it.
//!
//! The events are bytes as the ring buffer has them: trees of ten calls, each with four texts and a number.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime};

use floe_agent::catalogue::Catalogue;
use floe_agent::export::{
    Batching, Endpoint, Finish, OtlpTarget, Output, Pipeline, Protocol, QueueBounds, RedactionRules, Sampler,
    SamplingRules,
};
use floe_agent::kernel::decode::decode;
use floe_agent::trace::{Assembler, Clock};
use floe_agent::units::BootNanos;
use floe_ebpf::{CallEnter, CallReturn, Field, Header, event, outcome, value};
use opentelemetry_proto::tonic::collector::trace::v1::trace_service_server::{TraceService, TraceServiceServer};
use opentelemetry_proto::tonic::collector::trace::v1::{ExportTraceServiceRequest, ExportTraceServiceResponse};
use tonic::transport::server::TcpIncoming;
use tonic::{Request, Response, Status};

/// The agent's.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const COLLECTOR: &str = "--collector";
const PROBE: &str = "shop.orders:load(shop.customer=arg0.customer, shop.product=arg0.product, shop.state=arg0.state, \
                     shop.address=arg0.address, shop.rows=len(return))";
/// Calls of one tree.
const TREE: u64 = 10;
/// Trees of which the records are made once and then replayed with other times.
const TREES: u64 = 500;
/// Records between two looks at the clock, about what the ring buffer holds after 5 ms.
const CHUNK: usize = 1000;
/// The generator pauses while so many spans wait.
const WAITING: u64 = 50_000;
const SPANS: u64 = 2_000_000;

fn main() {
    if std::env::args().any(|argument| argument == COLLECTOR) {
        return collect();
    }
    let spans = std::env::var("FLOE_BENCH_SPANS").ok().and_then(|spans| spans.parse().ok()).unwrap_or(SPANS);
    pin(0);
    let (mut collector, address) = start_collector();
    measure(&address, spans);
    drop(collector.stdin.take());
    let mut received = String::new();
    collector.stdout.take().expect("piped").read_to_string(&mut received).expect("the collector says what it got");
    let received: u64 = received.trim().parse().expect("a number");
    assert_eq!(received, spans, "the collector has every span");
    collector.wait().expect("the collector ends");
}

fn measure(address: &str, spans: u64) {
    let catalogue = Arc::new(Catalogue::of_probes(&[PROBE.to_owned()]).expect("a probe"));
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().expect("a runtime");
    let target = OtlpTarget {
        traces: Some(Endpoint::new(address, "bench", Protocol::Grpc).expect("an endpoint")),
        logs: None,
        metrics: None,
        batching: Batching::default(),
        log_batching: Batching::default(),
        metrics_interval: Duration::from_mins(1),
    };
    let pipeline = {
        let _inside = runtime.enter();
        let outputs = [Output::Otlp(Box::new(target))];
        Pipeline::start(&outputs, QueueBounds::default(), RedactionRules::default()).expect("a pipeline")
    };
    let mut assembler = Assembler::new(catalogue, Clock::new(BootNanos(0), SystemTime::UNIX_EPOCH));
    let mut sampler = Sampler::new(SamplingRules::default());
    let mut records = records();

    let [mut decoding, mut assembling, mut sampling, mut sending] = [Duration::ZERO; 4];
    let (mut generated, mut waited) = (0, Duration::ZERO);
    let begin = Instant::now();
    let before = cpu(libc::RUSAGE_SELF);
    let own = cpu(libc::RUSAGE_THREAD);
    'all: loop {
        for chunk in records.chunks_mut(CHUNK) {
            if generated >= spans {
                break 'all;
            }
            let start = Instant::now();
            let events: Vec<_> = chunk.iter().map(|record| decode(record).expect("a record")).collect();
            let decoded = Instant::now();
            for event in events {
                assembler.handle(event);
            }
            let assembled = Instant::now();
            let kept = sampler.pass(assembler.drain(), assembled);
            let sampled = Instant::now();
            generated += kept.len() as u64;
            pipeline.send(kept);
            let sent = Instant::now();
            decoding += decoded - start;
            assembling += assembled - decoded;
            sampling += sampled - assembled;
            sending += sent - sampled;
            for record in chunk.iter_mut() {
                later(record);
            }
            while pipeline.reports()[0].spans.failed > WAITING {
                std::thread::sleep(Duration::from_millis(1));
            }
            waited += sent.elapsed();
        }
    }
    let own = cpu(libc::RUSAGE_THREAD).saturating_sub(own);
    let finish = Finish { deadline: Duration::from_mins(1), ..Finish::default() };
    let report = runtime.block_on(pipeline.shutdown(finish)).remove(0);
    let elapsed = begin.elapsed();
    let all = cpu(libc::RUSAGE_SELF).saturating_sub(before);
    assert!(report.complete(), "{report}");

    let each = |time: Duration| time.as_secs_f64() * 1e9 / generated as f64;
    let line = |what: &str, value: f64, unit: &str| println!("  {what:<55} {value:>10.0} {unit}");
    line("spans a second, one core", generated as f64 / elapsed.as_secs_f64(), "");
    line("spans a second of CPU time", generated as f64 / all.as_secs_f64(), "");
    line("decoding", each(decoding), "ns per span, wall clock");
    line("assembly", each(assembling), "ns per span, wall clock");
    line("sampling", each(sampling), "ns per span, wall clock");
    line("redaction and queue", each(sending), "ns per span, wall clock");
    line("event thread", each(own), "ns per span, CPU, generator included");
    line("encoding and gRPC", each(all.saturating_sub(own)), "ns per span, CPU");
    line("generator and waiting for the queue", each(waited), "ns per span, wall clock");
    line("peak memory", peak_memory() as f64 / 1e6, "MB");
}

/// Records of [`TREES`] trees.
fn records() -> Vec<Vec<u8>> {
    let mut records = Vec::new();
    let mut time = 1_000;
    for tree in 0..TREES {
        let pid = 1000 + (tree % 8) as u32;
        let mut open = Vec::new();
        for call in 0..TREE {
            time += 1_000;
            let header = header(event::ENTER, pid, time);
            let mut fields = Vec::new();
            let texts = [
                format!("customer-{tree}"),
                "espresso machine".into(),
                "paid".into(),
                "12 Long Street, Springfield".into(),
            ];
            for (number, text) in texts.iter().enumerate() {
                fields.extend(field(number as u8, value::UTF8, text.as_bytes()));
            }
            let depth = u32::from(call > 0);
            let enter = CallEnter { header, probe: 0, depth, fields: fields.len() as u32, flags: 0, object: 0 };
            records.push([bytemuck::bytes_of(&enter), &fields].concat());
            open.push(time);
            if call > 0 {
                time += 1_000;
                records.push(leave(pid, time, open.pop().expect("a call")));
            }
        }
        time += 1_000;
        records.push(leave(pid, time, open.pop().expect("the root")));
    }
    records
}

fn header(kind: u8, pid: u32, time: u64) -> Header {
    Header { kind, flags: 0, lost: 0, tgid: pid, tid: pid, epoch: pid, time }
}

fn leave(pid: u32, time: u64, call: u64) -> Vec<u8> {
    let fields = field(0, value::INT, &42_i64.to_le_bytes());
    let head = CallReturn {
        header: header(event::RETURN, pid, time),
        call,
        probe: 0,
        outcome: outcome::RETURNED,
        fields: fields.len() as u32,
        flags: 0,
        object: 0,
    };
    [bytemuck::bytes_of(&head), &fields].concat()
}

fn field(number: u8, kind: u8, payload: &[u8]) -> Vec<u8> {
    let head = Field { field: number, kind, cut: 0, reserved: 0, len: payload.len() as u32 };
    let mut bytes = [bytemuck::bytes_of(&head), payload].concat();
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}

/// The same record a little later.
fn later(record: &mut [u8]) {
    let mut shift = |at: usize| {
        if let Some(bytes) = record.get_mut(at..at + 8) {
            let time = u64::from_le_bytes(bytes.try_into().expect("eight bytes"));
            bytes.copy_from_slice(&(time + 1_000_000_000).to_le_bytes());
        }
    };
    let time = std::mem::offset_of!(Header, time);
    shift(time);
    if record[0] == event::RETURN {
        let call = std::mem::offset_of!(CallReturn, call);
        let bytes: &mut [u8] = &mut record[call..call + 8];
        let old = u64::from_le_bytes((&*bytes).try_into().expect("eight bytes"));
        bytes.copy_from_slice(&(old + 1_000_000_000).to_le_bytes());
    }
}

fn pin(cpu: usize) {
    // SAFETY: a plain system call with a set on the stack, which it only reads.
    unsafe {
        let mut set = std::mem::zeroed();
        libc::CPU_SET(cpu, &mut set);
        libc::sched_setaffinity(0, size_of_val(&set), &raw const set);
    }
}

fn usage(who: libc::c_int) -> libc::rusage {
    // SAFETY: the call fills the structure or fails; zeroes are a valid one.
    unsafe {
        let mut usage = std::mem::zeroed();
        libc::getrusage(who, &raw mut usage);
        usage
    }
}

fn cpu(who: libc::c_int) -> Duration {
    let usage = usage(who);
    let time = |time: libc::timeval| Duration::new(time.tv_sec as u64, time.tv_usec as u32 * 1000);
    time(usage.ru_utime) + time(usage.ru_stime)
}

fn peak_memory() -> u64 {
    usage(libc::RUSAGE_SELF).ru_maxrss as u64 * 1024
}

fn start_collector() -> (Child, String) {
    let mut child = Command::new(std::env::current_exe().expect("this program"))
        .arg(COLLECTOR)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("the collector starts");
    let mut line = String::new();
    let mut out = BufReader::with_capacity(1, child.stdout.take().expect("piped"));
    out.read_line(&mut line).expect("the collector says where it is");
    child.stdout = Some(out.into_inner());
    (child, format!("http://{}", line.trim()))
}

#[derive(Clone, Default)]
struct Collector(Arc<AtomicU64>);

#[tonic::async_trait]
impl TraceService for Collector {
    async fn export(
        &self,
        request: Request<ExportTraceServiceRequest>,
    ) -> Result<Response<ExportTraceServiceResponse>, Status> {
        let request = request.into_inner();
        let scopes = request.resource_spans.iter().flat_map(|resource| &resource.scope_spans);
        self.0.fetch_add(scopes.map(|scope| scope.spans.len() as u64).sum(), Ordering::Relaxed);
        Ok(Response::new(ExportTraceServiceResponse::default()))
    }
}

/// The collector: another process on another core; ends when its input does and says how many spans it got.
fn collect() {
    pin(1);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    let collector = Collector::default();
    let server = TraceServiceServer::new(collector.clone());
    runtime.block_on(async {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
        println!("{}", listener.local_addr().expect("an address"));
        std::io::stdout().flush().expect("standard output");
        let (done, end) = tokio::sync::oneshot::channel();
        std::thread::spawn(move || {
            let _ = std::io::stdin().read_to_end(&mut Vec::new());
            let _ = done.send(());
        });
        let serving =
            tonic::transport::Server::builder().add_service(server).serve_with_incoming(TcpIncoming::from(listener));
        tokio::select! {
            result = serving => result.expect("the collector serves"),
            _ = end => {}
        }
    });
    println!("{}", collector.0.load(Ordering::Relaxed));
}
