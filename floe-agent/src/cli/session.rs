//! One tracing session: outputs, kernel, the arming thread, and the thread that makes spans.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    thread::JoinHandle,
    time::{Duration, Instant, SystemTime},
};

use anyhow::{Context as _, Result};
use opentelemetry::trace::Status;
use serde_json::json;

use super::TraceOptions;
use super::progress::{self, Counts, Line};
use crate::{
    attach::{self, AttachThread, News, Request, Select},
    catalogue::{Catalogue, Loaded},
    config::Config,
    export::{ExportReport, Finish, Pipeline, Sampler, SamplingStats},
    kernel::{self, Counters, EventReader, WaitBounds, event::Event, trial},
    node::metrics::{EventState, Observer},
    trace::{Assembler, AssemblerStats, Clock, LogStats, TraceStats},
    units::{Pid, boot_now},
};

/// How often the event thread looks at the ring buffer when nothing wakes it.
const PERIOD: Duration = Duration::from_millis(5);
/// How often the two clocks are compared.
const CLOCK_PERIOD: Duration = Duration::from_secs(1);

/// A running session.
pub(super) struct Session {
    pub(super) attach: AttachThread,
    events: JoinHandle<Spans>,
    stop: Arc<AtomicBool>,
    pipeline: Arc<Pipeline>,
    counters: Arc<Counters>,
    state: Arc<EventState>,
    runtime: tokio::runtime::Runtime,
    stats: Option<std::path::PathBuf>,
    shutdown_timeout: Duration,
    line: Line,
    started: Instant,
    /// CPU seconds used until everything was set up.
    startup_cpu: f64,
}

/// What the event thread counted.
struct Spans {
    assembler: AssemblerStats,
    traces: TraceStats,
    logs: LogStats,
    sampler: SamplingStats,
    undecodable: u64,
}

fn clock() -> Clock {
    // The wall clock is read between two readings of the other one, which then differ by less than the error matters.
    let before = boot_now();
    let wall = SystemTime::now();
    let after = boot_now();
    Clock::new(crate::units::BootNanos(before.0.midpoint(after.0)), wall)
}

impl Session {
    /// Sets everything up. Nothing has been traced if this fails.
    pub(super) fn start(options: &TraceOptions, config: &Config) -> Result<Self> {
        Self::start_with(options, config, None)
    }

    /// As [`Self::start`]; whom `select` selects is traced.
    pub(super) fn start_with(options: &TraceOptions, config: &Config, select: Option<Arc<dyn Select>>) -> Result<Self> {
        let loaded = if config.builtin_packs {
            Catalogue::load(&config.packs, &config.probes)
        } else {
            Catalogue::load_only(&config.packs, &config.probes)
        }?;
        let Loaded { catalogue, left_out } = loaded;
        for error in &left_out {
            eprintln!("floe-agent: {error}; this pack is left out");
        }
        anyhow::ensure!(
            left_out.is_empty() || !catalogue.probes().is_empty(),
            "there is no other probe; correct the pack, or name a function with --probe"
        );
        let catalogue = Arc::new(catalogue);
        if let Some(path) = &options.stats {
            std::fs::File::create(path).with_context(|| format!("cannot write {}", path.display()))?;
        }
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .context("cannot start the export thread")?;
        let bounds = WaitBounds::default();
        let (mut kernel, urgent, events, counters) = kernel::load(bounds)?;
        let trial = trial::run(&mut kernel)?;
        let pipeline = {
            let _inside = runtime.enter();
            Arc::new(Pipeline::start(&config.outputs, config.queue, config.redaction.clone())?)
        };
        let (news_in, news) = mpsc::channel();
        let options_ = attach::Options {
            keep_inlining: config.keep_inlining,
            run_sources: config.run_sources.clone(),
            programs: config.programs.clone(),
            bounds,
            select,
        };
        let attach = attach::start(kernel, urgent, catalogue.clone(), trial, options_, news_in)?;
        let stop = Arc::new(AtomicBool::new(false));
        let state = Arc::new(EventState::default());
        let assembler = Assembler::new(catalogue, clock())
            .with_hold(config.hold)
            .with_logs(config.logs)
            .with_defaults(config.resource.clone())
            .double_own_spans(config.double_own_spans)
            .keep_unsampled(!config.sampling.parent_based);
        let sampler = Sampler::new(config.sampling.clone());
        let line = Line::start(config.progress);
        let events = {
            let (stop, pipeline, requests) = (stop.clone(), pipeline.clone(), attach.requests());
            let (counts, state) = (line.counts(), state.clone());
            std::thread::Builder::new()
                .name("floe-events".into())
                .spawn(move || {
                    let way = Way { sampler, pipeline: &pipeline, counts: &counts };
                    make_spans(events, assembler, way, &news, &requests, &state, &stop)
                })
                .context("cannot start the event thread")?
        };
        Ok(Self {
            attach,
            events,
            stop,
            pipeline,
            counters: Arc::new(counters),
            state,
            runtime,
            stats: options.stats.clone(),
            shutdown_timeout: config.shutdown_timeout,
            line,
            started: Instant::now(),
            startup_cpu: agent_usage().0,
        })
    }

    /// The runtime that exports; also for waiting.
    pub(super) fn runtime(&self) -> &tokio::runtime::Runtime {
        &self.runtime
    }

    /// A view of the session for those who watch it.
    pub(super) fn observer(&self) -> Observer {
        Observer {
            attach: self.attach.requests(),
            counters: self.counters.clone(),
            events: self.state.clone(),
            exports: self.pipeline.tallies(),
            pods: None,
        }
    }

    /// Ends a session in which nothing was traced: nothing is printed.
    pub(super) fn abandon(self) {
        self.attach.stop();
        self.stop.store(true, Ordering::Release);
        let _ = self.events.join();
        self.line.end();
    }

    /// Ends tracing: what is open ends now, everything is written, the summary is printed.
    pub(super) fn finish(self) -> Result<()> {
        let Self {
            attach,
            events,
            stop,
            pipeline,
            counters,
            state: _,
            runtime,
            stats,
            shutdown_timeout,
            line,
            started,
            startup_cpu,
        } = self;
        let report = attach.stop();
        stop.store(true, Ordering::Release);
        let spans = events.join().map_err(|_| anyhow::anyhow!("the event thread panicked"))?;
        line.end();
        let counters: BTreeMap<_, _> = counters.read().into_iter().map(|(c, n)| (c.name(), n)).collect();
        let lost = counters["events_lost"] + counters["urgent_events_lost"] + spans.undecodable;
        let finish = Finish { lost_events: lost, deadline: shutdown_timeout };
        let pipeline = Arc::into_inner(pipeline).context("the event thread still exports")?;
        let reports = runtime.block_on(pipeline.shutdown(finish));
        for report in reports.iter().filter(|report| !report.complete()) {
            eprintln!("floe-agent: {report}");
        }
        if lost > 0 {
            eprintln!(
                "floe-agent: {lost} events were lost; the traces they belong to are marked floe.trace.incomplete"
            );
        }
        let left_out = spans.sampler.traces_dropped;
        if left_out > 0 {
            let errors = spans.sampler.traces_kept_for_errors;
            eprintln!("floe-agent: {left_out} traces were left out by sampling, {errors} kept for their errors");
        }
        let late = counters["wait_timeouts"];
        if late > 0 {
            tracing::info!("{late} times a process did not wait for the agent as long as the agent took");
        }
        if let Some(path) = stats {
            let text = stats_json(&counters, &spans, &report, &reports, started.elapsed(), startup_cpu);
            std::fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
        }
        Ok(())
    }
}

/// Where finished spans go.
struct Way<'a> {
    sampler: Sampler,
    pipeline: &'a Pipeline,
    counts: &'a Counts,
}

/// The body of the event thread: kernel → spans → outputs.
fn make_spans(
    mut reader: EventReader,
    mut assembler: Assembler,
    way: Way<'_>,
    news: &mpsc::Receiver<News>,
    requests: &mpsc::Sender<Request>,
    state: &EventState,
    stop: &AtomicBool,
) -> Spans {
    let Way { mut sampler, pipeline, counts } = way;
    let mut compared = Instant::now();
    let mut shown = Instant::now();
    loop {
        // Read before the ring: what is in the ring when this is set is still read.
        let last = stop.load(Ordering::Acquire);
        if !last {
            reader.wait(PERIOD);
        }
        if compared.elapsed() > CLOCK_PERIOD {
            assembler.set_clock(clock());
            assembler.tick(boot_now());
            compared = Instant::now();
        }
        let mut paused = false;
        let mut tell = |assembler: &mut Assembler| {
            for news in news.try_iter() {
                match news {
                    News::Process(facts) => assembler.process_seen(*facts),
                    News::Exception { pid, epoch, tid, call, exception } => {
                        assembler.exception(pid, epoch, tid, call, *exception);
                    }
                    News::Paused => paused = true,
                }
            }
        };
        tell(&mut assembler);
        while let Some(event) = reader.take() {
            // News is sent before the first event that it concerns can be made.
            tell(&mut assembler);
            if let Event::Exit { stamp, process_ended: true, .. } = &event {
                // If the thread has ended, there is nobody to tell.
                let _ = requests.send(Request::Ended(Pid(stamp.pid.0), stamp.epoch));
            }
            assembler.handle(event);
        }
        if paused {
            // Calls that began before the pause were in the ring.
            assembler.interrupt(boot_now());
        }
        state.set(&assembler, &reader);
        if last {
            assembler.end_of_input(boot_now());
            pipeline.send_logs(assembler.drain_logs());
            let finished = assembler.drain();
            pipeline.send(sampler.pass(finished, Instant::now()));
            sampler.finish();
            return Spans {
                assembler: assembler.stats(),
                traces: assembler.trace_stats(),
                logs: assembler.log_stats(),
                sampler: sampler.stats(),
                undecodable: reader.undecodable,
            };
        }
        pipeline.send_logs(assembler.drain_logs());
        let finished = assembler.drain();
        let failed = finished.iter().filter(|finished| matches!(finished.span.status, Status::Error { .. })).count();
        counts.errors.fetch_add(failed as u64, Ordering::Relaxed);
        if shown.elapsed() > progress::PERIOD {
            let stats = assembler.stats();
            counts.spans.store(stats.spans, Ordering::Relaxed);
            counts.open.store(assembler.open_spans() as u64, Ordering::Relaxed);
            counts.lost.store(stats.lost_events, Ordering::Relaxed);
            shown = Instant::now();
        }
        pipeline.send(sampler.pass(finished, Instant::now()));
    }
}

fn stats_json(
    counters: &BTreeMap<&str, u64>,
    Spans { assembler, traces, logs, sampler, undecodable: _ }: &Spans,
    report: &attach::Report,
    exports: &[ExportReport],
    elapsed: Duration,
    startup_cpu: f64,
) -> String {
    let usage = agent_usage();
    let text = json!({
        "counters": counters,
        "spans": assembler.spans,
        "spans_incomplete": assembler.incomplete,
        "assembler": {
            "lost_events": assembler.lost_events,
            "unmatched_returns": assembler.unmatched_returns,
            "dropped_calls": assembler.dropped_calls,
            "stale_events": assembler.stale_events,
            "unknown_probes": assembler.unknown_probes,
            "orphan_events": assembler.orphan_events,
        },
        "sampling": {
            "traces_dropped": sampler.traces_dropped,
            "spans_dropped": sampler.spans_dropped,
            "traces_kept_for_errors": sampler.traces_kept_for_errors,
            "traces_evicted": sampler.traces_evicted,
        },
        "traces": { "spans_held": traces.held, "spans_released": traces.released, "spans_unsampled": traces.unsampled },
        "logs": { "records": logs.records, "dropped": logs.dropped },
        "functions_armed": report.functions_armed,
        "functions_disarmed": report.functions_disarmed,
        "late_answers": report.late_answers,
        "slowest_answer_us": report.slowest_answer_us,
        "processes": report.processes,
        "exports": exports.iter().map(|export| json!({
            "sink": export.sink,
            "sent": export.spans.sent, "failed": export.spans.failed, "dropped": export.spans.dropped,
            "logs": {"sent": export.logs.sent, "failed": export.logs.failed, "dropped": export.logs.dropped},
        })).collect::<Vec<_>>(),
        "agent": { "cpu_seconds": usage.0, "startup_cpu_seconds": startup_cpu, "peak_memory_bytes": usage.1, "elapsed_seconds": elapsed.as_secs_f64() },
    });
    format!("{text:#}\n")
}

/// CPU seconds of the agent (children not included), and its peak memory in bytes.
fn agent_usage() -> (f64, u64) {
    let mut usage = std::mem::MaybeUninit::<libc::rusage>::zeroed();
    // SAFETY: the call fills the structure or fails; zeroes are a valid one.
    let usage = unsafe {
        libc::getrusage(libc::RUSAGE_SELF, usage.as_mut_ptr());
        usage.assume_init()
    };
    let seconds = |t: libc::timeval| t.tv_sec as f64 + t.tv_usec as f64 / 1e6;
    (seconds(usage.ru_utime) + seconds(usage.ru_stime), usage.ru_maxrss.cast_unsigned() * 1024)
}
