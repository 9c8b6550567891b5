//! One run is one trace: which spans are in it, and what their parents are.

use std::time::Duration;

use opentelemetry::trace::{SpanContext, SpanId, TraceFlags, TraceId, TraceState};
use opentelemetry_sdk::trace::SpanData;

use super::tests::*;
use super::*;
use crate::kernel::event::Value;
use crate::process::run_id::{self, RunContext, Source, Words};
use crate::trace::ids;

const PACK: &str = r#"
pack: test
probes:
  - name: main
    target: m:main
    span: {name: main, role: command}
  - name: plain
    target: m:plain
    span: {name: plain}
  - name: worker
    kind: event
    target: m:worker
    at: enter
    attributes: {_run: arg0}
    run: "{_run}"
  - name: run
    target: m:run
    span: {name: "run {run}", role: command, run: "{run}", key: run}
    attributes: {run: arg0}
  - name: step
    target: m:step
    span:
      name: "step {step}"
      run: "{_run}"
      key: "step/{step}"
      role: command
      links:
        - {each: _upstream, run: "{_upstream_run}", key: "step/{value}"}
        - {each: _waits_for, key: ["step/{value}/{_retries.{value}}", "step/{value}"], unseen: true}
        - {each: _maybe, key: "step/{value}"}
    attributes: {_run: arg0, step: arg1, _upstream: arg2, _upstream_run: arg3, _waits_for: arg4, _maybe: arg4, _retries: dict(arg5)}
  - name: block
    target: m:block
    span: {name: floe.block, exported_as: "{_name}"}
    attributes: {_name: arg0}
  - name: current
    kind: event
    target: m:current
    at: enter
    attributes: {_name: arg0, _trace: arg1, _span: arg2}
    rules:
      - begin: {id: own, name: "{_name}", key: "otel/{_span}", external: {trace: "{_trace}", span: "{_span}"}}
        attributes: []
  - name: end
    kind: event
    target: m:end
    at: enter
    attributes: {_span: arg0}
    rules:
      - {end: own, attributes: []}
"#;

const MAIN_CALL: u32 = 0;
const PLAIN: u32 = 1;
const WORKER: u32 = 2;
const RUN: u32 = 3;
const STEP: u32 = 4;
const BLOCK: u32 = 5;
const CURRENT: u32 = 6;
const END: u32 = 7;

const R1: &str = "11111111-7b7d-4c5e-9a58-2b3d6f0e8a11";
const R2: &str = "22222222-7b7d-4c5e-9a58-2b3d6f0e8a11";
const CHILD: At = At(200, 2, 200);
const GRANDCHILD: At = At(300, 3, 300);

fn world() -> World {
    let mut w = World::with(PACK);
    w.assembler.core.traces.hold = Hold::default();
    w
}

fn seen(w: &mut World, At(pid, epoch, _): At, run: Option<RunContext>) {
    w.assembler.process_seen(ProcessFacts { run, ..ProcessFacts::unknown(Pid(pid), Epoch(epoch)) });
}

fn dagster(run: &str) -> Option<RunContext> {
    RunContext::of_dagster_run(run, Source::DagsterArguments)
}

fn traceparent(trace: u128, span: u64, flags: u8) -> Option<RunContext> {
    let text = format!("00-{trace:032x}-{span:016x}-{flags:02x}");
    let environ = format!("TRACEPARENT={text}\0");
    let environ = crate::process::identity::Environ::from_bytes(environ.into_bytes());
    let words = Words { arguments: &[], environ: &environ, pod_run: &|| None, read: &|_| None };
    run_id::find(&run_id::RunSources::default(), &words)
}

fn worker(w: &mut World, at: At, run: &str) {
    let call = w.enter(at, WORKER, 0, &[("_run", s(run))]);
    w.leave(at, WORKER, call, &[]);
}

fn plain(w: &mut World, at: At) {
    let call = w.enter(at, PLAIN, 3, &[]);
    w.leave(at, PLAIN, call, &[]);
}

fn run_span(run: &str) -> SpanId {
    ids::span_id(ids::trace_id(run), "run", 0)
}

/// All spans by name, when everything has ended.
fn all(w: &mut World) -> Vec<SpanData> {
    let now = BootNanos(w.now + 1000);
    w.assembler.end_of_input(now);
    w.spans()
}

fn named<'a>(spans: &'a [SpanData], name: &str) -> &'a SpanData {
    let found: Vec<_> = spans.iter().filter(|span| span.name == name).collect();
    assert_eq!(found.len(), 1, "{name} in {:?}", spans.iter().map(|span| &span.name).collect::<Vec<_>>());
    found[0]
}

fn assert_one_trace(spans: &[SpanData], run: &str) {
    for span in spans {
        assert_eq!(trace(span), ids::trace_id(run), "{}", span.name);
    }
    let ids: HashSet<_> = spans.iter().map(id).collect();
    assert_eq!(ids.len(), spans.len());
    let roots: Vec<_> = spans.iter().filter(|span| span.parent_span_id == SpanId::INVALID).collect();
    assert_eq!(roots.len(), 1, "{roots:?}");
    for span in spans {
        assert!(span.parent_span_id == SpanId::INVALID || ids.contains(&span.parent_span_id), "{}", span.name);
    }
}

#[test]
fn a_run_in_one_process_is_a_trace_with_the_runs_id() {
    let mut w = world();
    let run = w.enter(MAIN, RUN, 0, &[("run", s(R1))]);
    let step = w.enter(MAIN, STEP, 1, &[("_run", s(R1)), ("step", s("a"))]);
    plain(&mut w, MAIN);
    plain(&mut w, POOL);
    w.leave(MAIN, STEP, step, &[]);
    w.leave(MAIN, RUN, run, &[]);
    let spans = w.spans();
    assert_eq!(spans.len(), 4, "nothing waits: the run is known");
    assert_one_trace(&spans, R1);
    assert_eq!(id(named(&spans, &format!("run {R1}"))), run_span(R1));
    assert_eq!(id(named(&spans, "step a")), ids::span_id(ids::trace_id(R1), "step/a", 0));
}

#[test]
fn spans_that_ended_before_the_run_was_known_move_to_its_trace() {
    let mut w = world();
    seen(&mut w, MAIN, None);
    plain(&mut w, MAIN);
    w.fork(MAIN, CHILD);
    let parse = w.enter(CHILD, MAIN_CALL, 0, &[]);
    plain(&mut w, CHILD);
    w.leave(CHILD, MAIN_CALL, parse, &[]);
    w.exit(CHILD, true, 0);
    assert!(w.spans().is_empty());
    assert_eq!(w.assembler.trace_stats().held, 3);
    let run = w.enter(MAIN, RUN, 0, &[("run", s(R1))]);
    let before = w.spans();
    assert_eq!(before.len(), 3);
    w.leave(MAIN, RUN, run, &[]);
    let spans: Vec<_> = before.into_iter().chain(all(&mut w)).collect();
    assert_one_trace(&spans, R1);
    assert_eq!(named(&spans, "main").parent_span_id, run_span(R1));
    assert_eq!(w.assembler.trace_stats().released, 0);
}

#[test]
fn a_command_around_the_run_is_its_root() {
    let mut w = world();
    let cli = w.enter(MAIN, MAIN_CALL, 0, &[]);
    plain(&mut w, MAIN);
    let run = w.enter(MAIN, RUN, 1, &[("run", s(R1))]);
    w.fork(MAIN, CHILD);
    w.exec(CHILD);
    worker(&mut w, CHILD, R1);
    let step = w.enter(CHILD, STEP, 0, &[("_run", s(R1)), ("step", s("a"))]);
    w.leave(CHILD, STEP, step, &[]);
    w.leave(MAIN, RUN, run, &[]);
    w.leave(MAIN, MAIN_CALL, cli, &[]);
    let spans = w.spans();
    assert_one_trace(&spans, R1);
    assert_eq!(named(&spans, &format!("run {R1}")).parent_span_id, id(named(&spans, "main")));
    assert_eq!(named(&spans, "step a").parent_span_id, run_span(R1));
}

#[test]
fn a_child_that_learns_its_run_takes_the_span_around_it_along() {
    let mut w = world();
    let cli = w.enter(MAIN, MAIN_CALL, 0, &[]);
    plain(&mut w, MAIN);
    w.fork(MAIN, CHILD);
    let run = w.enter(CHILD, RUN, 0, &[("run", s(R1))]);
    w.leave(CHILD, RUN, run, &[]);
    w.leave(MAIN, MAIN_CALL, cli, &[]);
    let spans = w.spans();
    assert_one_trace(&spans, R1);
    assert_eq!(spans.len(), 3);
}

#[test]
fn a_server_that_launches_runs_stays_out_of_them() {
    let mut w = world();
    seen(&mut w, MAIN, None);
    plain(&mut w, MAIN);
    for (child, run) in [(CHILD, R1), (GRANDCHILD, R2)] {
        w.fork(MAIN, child);
        w.exec(child);
        plain(&mut w, child);
        worker(&mut w, child, run);
        let call = w.enter(child, RUN, 0, &[("run", s(run))]);
        plain(&mut w, child);
        w.leave(child, RUN, call, &[]);
        w.exit(child, true, 0);
    }
    let spans = w.spans();
    for run in [R1, R2] {
        let of_run: Vec<_> = spans.iter().filter(|span| trace(span) == ids::trace_id(run)).cloned().collect();
        assert_eq!(of_run.len(), 3);
        assert_one_trace(&of_run, run);
    }
    assert_eq!(spans.len(), 6);
    let server = all(&mut w);
    assert_eq!(server.len(), 1);
    assert!(![R1, R2].map(ids::trace_id).contains(&trace(&server[0])));
}

#[test]
fn two_agents_that_never_talk_make_one_tree() {
    // One sees the run worker, the other one a step worker on another node.
    let (mut one, mut two) = (world(), world());
    seen(&mut one, MAIN, dagster(R1));
    plain(&mut one, MAIN);
    let run = one.enter(MAIN, RUN, 0, &[("run", s(R1))]);
    let step = one.enter(MAIN, STEP, 1, &[("_run", s(R1)), ("step", s("a"))]);
    one.leave(MAIN, STEP, step, &[]);
    one.leave(MAIN, RUN, run, &[]);
    seen(&mut two, CHILD, dagster(R1));
    plain(&mut two, CHILD);
    let upstream = Value::List(vec![s("a")]);
    let values = [("_run", s(R1)), ("step", s("b")), ("_upstream", upstream), ("_upstream_run", s(R1))];
    let step = two.enter(CHILD, STEP, 0, &values);
    plain(&mut two, CHILD);
    two.leave(CHILD, STEP, step, &[]);
    let spans: Vec<_> = one.spans().into_iter().chain(two.spans()).collect();
    assert_eq!(spans.len(), 6);
    assert_one_trace(&spans, R1);
    let link = &named(&spans, "step b").links.links[0].span_context;
    assert_eq!((link.trace_id(), link.span_id()), (ids::trace_id(R1), id(named(&spans, "step a"))));
    assert!(named(&spans, "step b").parent_span_is_remote);
}

#[test]
fn a_link_leads_to_the_run_that_made_what_was_loaded() {
    let mut w = world();
    let values =
        [("_run", s(R2)), ("step", s("b")), ("_upstream", Value::List(vec![s("a")])), ("_upstream_run", s(R1))];
    let step = w.enter(MAIN, STEP, 0, &values);
    w.leave(MAIN, STEP, step, &[]);
    let span = w.span();
    let link = &span.links.links[0].span_context;
    assert_eq!(link.trace_id(), ids::trace_id(R1));
    assert_eq!(link.span_id(), ids::span_id(ids::trace_id(R1), "step/a", 0));
    assert_eq!(trace(&span), ids::trace_id(R2));
}

#[test]
fn a_link_leads_to_what_another_agent_sees_if_that_is_sure_to_be_there() {
    let mut w = world();
    let names = |names: &[&str]| Value::List(names.iter().map(|name| s(name)).collect());
    let lists = Value::List(vec![names(&["a", "b"]), names(&["a"])]);
    let retries = Value::Map(vec![("b".into(), Value::Int(2))]);
    let values =
        [("_run", s(R1)), ("step", s("c")), ("_waits_for", lists), ("_maybe", names(&["d"])), ("_retries", retries)];
    let step = w.enter(MAIN, STEP, 0, &values);
    w.leave(MAIN, STEP, step, &[]);
    let spans = all(&mut w);
    let trace = ids::trace_id(R1);
    let links: Vec<_> = spans[0].links.iter().map(|link| link.span_context.span_id()).collect();
    assert_eq!(links, [ids::span_id(trace, "step/a", 0), ids::span_id(trace, "step/b/2", 0)]);
}

#[test]
fn a_second_run_in_one_command_is_a_trace_of_its_own_that_links_back() {
    let mut w = world();
    let main = w.enter(MAIN, MAIN_CALL, 0, &[]);
    for run in [R1, R2] {
        let call = w.enter(MAIN, RUN, 1, &[("run", s(run))]);
        plain(&mut w, MAIN);
        w.leave(MAIN, RUN, call, &[]);
    }
    w.leave(MAIN, MAIN_CALL, main, &[]);
    let spans = w.spans();
    let second = named(&spans, &format!("run {R2}"));
    let first = named(&spans, &format!("run {R1}"));
    let main = named(&spans, "main");
    assert_eq!(trace(main), ids::trace_id(R1));
    assert_eq!(first.parent_span_id, id(main));
    assert_eq!((trace(second), second.parent_span_id), (ids::trace_id(R2), SpanId::INVALID));
    let link = &second.links.links[0].span_context;
    assert_eq!((link.trace_id(), link.span_id()), (trace(main), id(main)));
}

#[test]
fn interleaved_runs_of_many_threads_and_processes_do_not_mix() {
    let mut w = world();
    let run = |n: u32| format!("{n:08}-7b7d-4c5e-9a58-2b3d6f0e8a11");
    let at = |n: u32, tid: u32| At(1000 + n / 2 * 10, 10 + n / 2, 1000 + n * 10 + tid);
    let mut open = Vec::new();
    for n in 0..20 {
        open.push(w.enter(at(n, 0), RUN, 0, &[("run", s(&run(n)))]));
    }
    for _ in 0..3 {
        for n in 0..20 {
            let step = w.enter(at(n, 0), STEP, 1, &[("_run", s(&run(n))), ("step", s(&format!("of {n}")))]);
            let child = At(5000 + w.now as u32, w.now as u32, 5000 + w.now as u32);
            w.fork(at(n, 0), child);
            let call = w.enter(child, PLAIN, 0, &[]);
            w.leave(child, PLAIN, call, &[]);
            w.exit(child, true, 0);
            w.leave(at(n, 0), STEP, step, &[]);
        }
    }
    for n in (0..20).rev() {
        w.leave(at(n, 0), RUN, open[n as usize], &[]);
    }
    let spans = all(&mut w);
    assert_eq!(spans.len(), 20 * 7);
    for n in 0..20 {
        let of_run: Vec<_> = spans.iter().filter(|span| trace(span) == ids::trace_id(&run(n))).cloned().collect();
        assert_eq!(of_run.len(), 7);
        assert_one_trace(&of_run, &run(n));
        assert_eq!(of_run.iter().filter(|span| span.name == format!("step of {n}")).count(), 3);
    }
}

#[test]
fn threads_work_for_the_run_that_they_were_started_for() {
    let mut w = world();
    let (first, second) = (At(100, 1, 101), At(100, 1, 102));
    let (helper, its_helper, old) = (At(100, 1, 111), At(100, 1, 112), At(100, 1, 113));
    w.thread(MAIN, first);
    w.thread(MAIN, second);
    let one = w.enter(first, RUN, 0, &[("run", s(R1))]);
    w.thread(first, helper);
    let two = w.enter(second, RUN, 0, &[("run", s(R2))]);
    w.thread(helper, its_helper);
    let step = w.enter(first, STEP, 1, &[("_run", s(R1)), ("step", s("a"))]);
    plain(&mut w, helper);
    plain(&mut w, its_helper);
    w.leave(first, STEP, step, &[]);
    w.thread(first, old);
    w.leave(first, RUN, one, &[]);
    let spans = w.spans();
    assert_one_trace(&spans, R1);
    let step = id(named(&spans, "step a"));
    assert!(spans.iter().filter(|span| span.name == "plain").all(|span| span.parent_span_id == step), "{spans:?}");
    // What it was started for is over.
    plain(&mut w, old);
    w.leave(second, RUN, two, &[]);
    assert_one_trace(&w.spans(), R2);
}

#[test]
fn a_handed_down_context_is_continued() {
    let mut w = world();
    seen(&mut w, MAIN, traceparent(0xabc, 0xdef, 1));
    let main = w.enter(MAIN, MAIN_CALL, 0, &[]);
    let run = w.enter(MAIN, RUN, 1, &[("run", s(R1))]);
    w.leave(MAIN, RUN, run, &[]);
    w.leave(MAIN, MAIN_CALL, main, &[]);
    plain(&mut w, POOL);
    let spans = w.spans();
    assert!(spans.iter().all(|span| trace(span) == TraceId::from(0xabc)));
    let main = named(&spans, "main");
    assert_eq!(main.parent_span_id, SpanId::from(0xdef));
    assert!(main.parent_span_is_remote);
    assert_eq!(named(&spans, "plain").parent_span_id, SpanId::from(0xdef));
}

#[test]
fn a_context_in_the_environment_is_older_than_the_span_that_was_open_at_the_fork() {
    let mut w = world();
    let context = traceparent(0xabc, 0xdef, 1);
    seen(&mut w, MAIN, context.clone());
    let main = w.enter(MAIN, MAIN_CALL, 0, &[]);
    w.fork(MAIN, CHILD);
    w.exec(CHILD);
    seen(&mut w, At(200, 2, 200), context);
    plain(&mut w, CHILD);
    w.leave(MAIN, MAIN_CALL, main, &[]);
    let spans = w.spans();
    assert_eq!(named(&spans, "plain").parent_span_id, id(named(&spans, "main")));
}

#[test]
fn a_context_that_is_not_sampled_is_not_exported_unless_a_setting_says_so() {
    for keep in [false, true] {
        let mut w = world();
        w.assembler = w.assembler.keep_unsampled(keep);
        seen(&mut w, MAIN, traceparent(0xabc, 0xdef, 0));
        plain(&mut w, MAIN);
        assert_eq!(w.spans().len(), usize::from(keep));
        assert_eq!(w.assembler.trace_stats().unsampled, u64::from(!keep));
    }
}

#[test]
fn tracestate_is_passed_on() {
    let mut w = world();
    let state: TraceState = "a=b".parse().unwrap();
    let context = traceparent(0xabc, 0xdef, 1).map(|context| RunContext { state, ..context });
    seen(&mut w, MAIN, context);
    plain(&mut w, MAIN);
    let expected: TraceState = "a=b".parse().unwrap();
    let span = w.span();
    let context = SpanContext::new(TraceId::from(0xabc), id(&span), TraceFlags::SAMPLED, false, expected);
    assert_eq!(span.span_context, context);
}

#[test]
fn nothing_waits_longer_than_the_bounds() {
    let mut w = world();
    w.assembler.core.traces.hold = Hold { time: Duration::from_micros(50), spans: 3 };
    plain(&mut w, MAIN);
    w.assembler.tick(BootNanos(w.now + 49_000));
    assert!(w.spans().is_empty());
    w.assembler.tick(BootNanos(w.now + 50_000));
    let first = w.span();
    assert_eq!(w.assembler.trace_stats().released, 1);
    plain(&mut w, MAIN);
    assert_eq!(trace(&w.span()), trace(&first), "it stays what it is, and does not wait again");
    for _ in 0..4 {
        plain(&mut w, CHILD);
    }
    assert_eq!(w.spans().len(), 4, "one too many: they go out together");
    let run = w.enter(CHILD, RUN, 0, &[("run", s(R1))]);
    w.leave(CHILD, RUN, run, &[]);
    assert_eq!(trace(&w.span()), ids::trace_id(R1), "a run that is known too late still has its own trace");
}

#[test]
fn the_pid_of_a_run_is_reused_by_a_process_that_has_nothing_to_do_with_it() {
    let again = At(100, 9, 100);
    let mut w = world();
    let run = w.enter(MAIN, RUN, 0, &[("run", s(R1))]);
    w.leave(MAIN, RUN, run, &[]);
    w.exit(MAIN, true, 0);
    plain(&mut w, again);
    plain(&mut w, POOL);
    let spans = all(&mut w);
    assert_eq!(spans.len(), 2, "an event of the ended process is stale");
    assert_ne!(trace(named(&spans, "plain")), ids::trace_id(R1));
}

#[test]
fn a_key_that_comes_again_is_another_span() {
    let mut w = world();
    let run = w.enter(MAIN, RUN, 0, &[("run", s(R1))]);
    for _ in 0..3 {
        let step = w.enter(MAIN, STEP, 1, &[("_run", s(R1)), ("step", s("a"))]);
        w.leave(MAIN, STEP, step, &[]);
    }
    w.leave(MAIN, RUN, run, &[]);
    let spans = w.spans();
    assert_one_trace(&spans, R1);
    for occurrence in 0..3 {
        assert!(spans.iter().any(|span| id(span) == ids::span_id(ids::trace_id(R1), "step/a", occurrence)));
    }
}

#[test]
fn a_program_that_is_not_python_is_a_span_from_its_exec_to_its_end() {
    let shell = At(200, 20, 200);
    let mut w = world();
    let main = w.enter(MAIN, MAIN_CALL, 0, &[]);
    w.fork(MAIN, CHILD);
    w.exec(shell);
    let began = w.now;
    w.assembler.process_seen(ProcessFacts {
        executable: Some("/usr/bin/docker".into()),
        command_line: vec!["docker".into(), "run".into()],
        span_since: Some(BootNanos(began)),
        ..ProcessFacts::unknown(Pid(200), Epoch(20))
    });
    w.fork(shell, GRANDCHILD);
    plain(&mut w, GRANDCHILD);
    w.exit(GRANDCHILD, true, 0);
    w.exit(shell, true, 3 << 8);
    let ended = w.now;
    w.leave(MAIN, MAIN_CALL, main, &[]);
    let spans = all(&mut w);
    assert_eq!(spans.len(), 3);
    let program = named(&spans, "docker");
    assert_eq!(program.parent_span_id, id(named(&spans, "main")));
    assert_eq!(named(&spans, "plain").parent_span_id, id(program));
    assert_eq!(trace(program), trace(named(&spans, "main")));
    let since = |time: std::time::SystemTime| time.duration_since(std::time::UNIX_EPOCH).unwrap().as_nanos();
    assert_eq!((since(program.start_time), since(program.end_time)), (began.into(), ended.into()));
    assert_eq!(error(program).as_deref(), Some("the process exited with code 3"));
    assert_eq!(get(program, "process.exit.code").as_deref(), Some("3"));
    assert_eq!(get(program, "error.type").as_deref(), Some("3"));
    assert_eq!(get(program, "process.command_args").as_deref(), Some(r#"["docker","run"]"#));
    assert_eq!(get(program, "floe.incomplete"), None);
}

#[test]
fn a_program_that_becomes_another_one_ends_there() {
    let (first, second) = (At(200, 20, 200), At(200, 21, 200));
    let mut w = world();
    seen(&mut w, MAIN, dagster(R1));
    w.fork(MAIN, CHILD);
    for at in [first, second] {
        w.exec(at);
        w.assembler.process_seen(ProcessFacts {
            executable: Some(format!("/bin/program-{}", at.1)),
            span_since: Some(BootNanos(w.now)),
            ..ProcessFacts::unknown(Pid(at.0), Epoch(at.1))
        });
    }
    w.exit(second, true, 9);
    let spans = all(&mut w);
    assert_eq!(spans.len(), 2);
    let (before, after) = (named(&spans, "program-20"), named(&spans, "program-21"));
    assert_eq!(get(before, "floe.incomplete").as_deref(), Some("process called exec"));
    assert_eq!((error(before), trace(before)), (None, ids::trace_id(R1)));
    assert_eq!(after.parent_span_id, id(before));
    assert_eq!(get(after, "floe.process.signal").as_deref(), Some("9"));
}

/// OpenTelemetry's SDK makes a span the current one.
fn current(w: &mut World, at: At, name: &str, run: &str, span: &str) {
    let call = w.enter(at, CURRENT, 3, &[("_name", s(name)), ("_trace", s(run)), ("_span", s(span))]);
    w.leave(at, CURRENT, call, &[]);
}

fn end(w: &mut World, at: At, span: &str) {
    let call = w.enter(at, END, 3, &[("_span", s(span))]);
    w.leave(at, END, call, &[]);
}

const SPAN_1: &str = "00000000-0000-0000-8000-000000000001";
const SPAN_2: &str = "00000000-0000-0000-8000-000000000002";

fn own(number: u64) -> SpanId {
    SpanId::from(1 << 63 | number)
}

#[test]
fn what_happens_in_a_span_of_the_programs_own_is_its_child() {
    let mut w = world();
    let main = w.enter(MAIN, MAIN_CALL, 0, &[]);
    current(&mut w, MAIN, "load", R1, SPAN_1);
    current(&mut w, MAIN, "load", R1, SPAN_1);
    plain(&mut w, MAIN);
    current(&mut w, MAIN, "parse", R1, SPAN_2);
    let step = w.enter(MAIN, STEP, 1, &[("step", s("a"))]);
    w.leave(MAIN, STEP, step, &[]);
    end(&mut w, MAIN, SPAN_2);
    end(&mut w, MAIN, SPAN_1);
    w.leave(MAIN, MAIN_CALL, main, &[]);
    plain(&mut w, MAIN);
    let spans = all(&mut w);
    assert_eq!(spans.len(), 4, "its own spans are not exported again");
    let [first, step, main, second] = &spans[..] else { unreachable!() };
    assert_eq!((first.parent_span_id, step.parent_span_id), (own(1), own(2)));
    for span in [first, step, main] {
        assert_eq!(trace(span), ids::trace_id(R1), "{}", span.name);
    }
    assert_eq!((main.parent_span_id, second.parent_span_id), (SpanId::INVALID, SpanId::INVALID));
}

#[test]
fn what_a_program_exports_itself_is_left_out_unless_both_are_wanted() {
    for double in [false, true] {
        let mut w = world();
        w.assembler = w.assembler.double_own_spans(double);
        let block = w.enter(MAIN, BLOCK, 0, &[("_name", s("load"))]);
        current(&mut w, MAIN, "load", R1, SPAN_1);
        plain(&mut w, MAIN);
        end(&mut w, MAIN, SPAN_1);
        w.leave(MAIN, BLOCK, block, &[]);
        let other = w.enter(MAIN, BLOCK, 0, &[("_name", s("load"))]);
        current(&mut w, MAIN, "something else", R1, SPAN_2);
        end(&mut w, MAIN, SPAN_2);
        w.leave(MAIN, BLOCK, other, &[]);
        let spans = all(&mut w);
        let names: Vec<_> = spans.iter().map(|span| &*span.name).collect();
        if double {
            assert_eq!(names, ["plain", "floe.block", "floe.block"]);
            assert_eq!(spans[0].parent_span_id, id(&spans[1]));
        } else {
            assert_eq!(names, ["plain", "floe.block"]);
            assert_eq!(spans[0].parent_span_id, own(1));
        }
    }
}

#[test]
fn a_trace_that_is_given_is_not_left_for_a_programs_own() {
    let mut w = world();
    seen(&mut w, MAIN, dagster(R1));
    let block = w.enter(MAIN, BLOCK, 0, &[("_name", s("load"))]);
    current(&mut w, MAIN, "load", R2, SPAN_1);
    plain(&mut w, MAIN);
    end(&mut w, MAIN, SPAN_1);
    w.leave(MAIN, BLOCK, block, &[]);
    let spans = all(&mut w);
    let [plain, block] = &spans[..] else { panic!("{spans:?}") };
    assert_eq!(plain.parent_span_id, id(block));
    assert_eq!((trace(plain), trace(block)), (ids::trace_id(R1), ids::trace_id(R1)));
}
