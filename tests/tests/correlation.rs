//! One run, one trace: contexts that are given to a process, log records in their spans, the clock.

use std::fs;
use std::time::Duration;

use floe_tests::dbt::{Project, environment, node_logs};
use floe_tests::{Agent, Span, Status, can_trace, environments, for_each, interpreters, one_of};
use serde_json::json;

const RUN: &str = "1c9bfa5c-7b7d-4c5e-9a58-2b3d6f0e8a11";
/// Another one.
const AGAIN: &str = "2c9bfa5c-7b7d-4c5e-9a58-2b3d6f0e8a11";
const TRACE: &str = "1c9bfa5c7b7d4c5e9a582b3d6f0e8a11";
/// `docs/correlation.md`: the span with the key `run` in that trace.
const RUN_SPAN: &str = "1c340a4984e6d6c0";
/// base64 of zlib of `{"pipeline_run_id": RUN}`.
const COMPRESSED: &str = "eJyrVirILEjNycxLjS8qzYvPTFGyUlAyTLZMSks0TdY1TzJP0TVJNk3VtUw0tdA1SjJOMUszSLVINDRUqgUARx4SFg==";
const MILLISECOND: u64 = 1_000_000;
/// Variables, arguments, and the parent that the span then has.
type Case<'a> = (&'a [(&'a str, &'a str)], &'a [&'a str], Option<&'a str>);
const LOADS: &str = "import json; json.loads('1')";

#[test]
fn the_run_that_the_environment_or_the_arguments_name_is_the_trace() {
    let Some(_alone) = can_trace() else { return };
    let interpreter = one_of(&[12, 11, 13, 10]);
    let arguments = json!({ "pipeline_run_id": RUN, "instance_ref": null }).to_string();
    let parent = "b7ad6b7169203331";
    let hostname = format!("dagster-run-{RUN}");
    let traceparent = format!("00-{TRACE}-{parent}-01");
    let openlineage = format!("https://lineage.example/ns/dag.task/{RUN}");
    // base64 of zlib of a context of Dagster Pipes in a file, which is what Dagster's clients for subprocesses do.
    let folder = tempfile::tempdir().expect("a folder");
    let context = folder.path().join("context");
    fs::write(&context, json!({ "asset_keys": ["orders"], "run_id": RUN, "extras": {} }).to_string()).expect("a file");
    let pack = "import base64, json, sys, zlib; \
        print(base64.b64encode(zlib.compress(json.dumps({'path': sys.argv[1]}).encode())).decode())";
    let pipes = interpreter.script(pack).arg(&context).run().expect(0).trim().to_owned();
    let cases: [Case<'_>; 10] = [
        (&[("FLOE_RUN_ID", RUN)], &[], None),
        (&[("TRACEPARENT", &traceparent), ("FLOE_RUN_ID", "other")], &[], Some(parent)),
        (&[("DAGSTER_COMPRESSED_EXECUTE_STEP_ARGS", COMPRESSED)], &[], Some(RUN_SPAN)),
        (&[("DAGSTER_COMPRESSED_EXECUTE_RUN_ARGS", COMPRESSED)], &[], Some(RUN_SPAN)),
        (&[("DAGSTER_PIPES_CONTEXT", &pipes)], &[], Some(RUN_SPAN)),
        (&[("OPENLINEAGE_PARENT_ID", &openlineage)], &[], None),
        (&[("DBT_CLOUD_RUN_ID", RUN)], &[], None),
        (&[("HOSTNAME", &hostname)], &[], Some(RUN_SPAN)),
        (&[], &["api", "execute_run", &arguments], Some(RUN_SPAN)),
        (&[], &["api", "execute_step", "--compressed-input-json", COMPRESSED], Some(RUN_SPAN)),
    ];
    for (variables, words, parent) in cases {
        let run = variables.iter().fold(interpreter.script(LOADS), |run, (name, value)| run.variable(name, value));
        let outcome = Agent::new().probe("json:loads").exec(&run.args(words));
        outcome.finished.expect(0);
        let [span] = &outcome.spans[..] else { panic!("{variables:?} {words:?}: one span was expected\n{outcome}") };
        assert_eq!((span.trace.as_str(), span.parent.as_deref()), (TRACE, parent), "{variables:?} {words:?}");
    }
    let unsampled = interpreter.script(LOADS).variable("TRACEPARENT", format!("00-{TRACE}-{parent}-00"));
    let outcome = Agent::new().probe("json:loads").exec(&unsampled);
    outcome.finished.expect(0);
    assert!(outcome.spans.is_empty(), "nobody asked for spans\n{outcome}");
}

#[test]
fn spans_have_the_time_of_the_wall_clock() {
    let Some(_alone) = can_trace() else { return };
    for_each(interpreters(), |interpreter| {
        let script =
            "import json, time\nfor _ in range(20):\n    a = time.time_ns(); json.loads('1'); print(a, time.time_ns())";
        let outcome = Agent::new().probe("json:loads").exec(&interpreter.script(script));
        let printed = outcome.finished.expect(0);
        let times = printed.lines().map(|line| line.split_once(' ').expect("two numbers"));
        let times: Vec<(u64, u64)> = times.map(|(a, b)| (a.parse().unwrap(), b.parse().unwrap())).collect();
        assert_eq!(times.len(), outcome.spans.len(), "{outcome}");
        for ((before, after), span) in times.into_iter().zip(&outcome.spans) {
            assert!(span.start + MILLISECOND >= before && span.end <= after + MILLISECOND, "{before} {span:?} {after}");
        }
    });
}

#[test]
fn a_program_that_is_not_python_is_a_span_in_the_run() {
    let Some(_alone) = can_trace() else { return };
    let interpreter = one_of(&[12, 11, 13, 10]);
    let script = r#"
import json, subprocess, sys
def hook(d):
    inner = f"{sys.executable} -c 'import json; json.loads(\"2\")'; exit 3"
    print(subprocess.run(["bash", "-c", inner, "bash", "--password=hunter2"]).returncode)
json.loads("{}", object_hook=hook)
"#;
    let agent = Agent::new().probe("json:loads").option("--set").option("correlation.programs=bash");
    let outcome = agent.exec(&interpreter.script(script));
    assert_eq!(outcome.finished.expect(0), "3\n");
    let [inner, bash, outer] = &outcome.spans[..] else { panic!("three spans were expected\n{outcome}") };
    assert_eq!((inner.name.as_str(), bash.name.as_str(), outer.name.as_str()), ("loads", "bash", "loads"));
    assert_eq!((&inner.parent, &bash.parent, &outer.parent), (&Some(bash.id.clone()), &Some(outer.id.clone()), &None));
    assert_eq!((&bash.trace, &inner.trace), (&outer.trace, &outer.trace));
    assert!(bash.start >= outer.start && bash.end <= outer.end && bash.start <= inner.start && bash.end >= inner.end);
    assert_eq!(bash.attributes["process.exit.code"], 3);
    assert_eq!(bash.status, Status::Error("the process exited with code 3".into()));
    let words = bash.attributes["process.command_args"].as_array().expect("a list");
    assert_eq!(words.last().and_then(|word| word.as_str()), Some("--password=***"));
    assert!(!bash.resource.contains_key("process.runtime.name"), "{:?}", bash.resource);
}

#[test]
fn spans_that_a_program_exports_itself_are_part_of_the_tree() {
    let Some(_alone) = can_trace() else { return };
    let script = r#"
import json
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from floe_core.telemetry.tracing import create_span
trace.set_tracer_provider(TracerProvider())
def say(span):
    context = span.get_span_context()
    print(f"{context.trace_id:032x} {context.span_id:016x}")
def hook(d):
    with trace.get_tracer("shop").start_as_current_span("parse") as span:
        say(span)
        json.loads("1")
json.loads("{}", object_hook=hook)
with create_span("compile.load") as span:
    say(span)
    json.loads("2")
"#;
    for_each(environments("FLOE_TEST_PYTHON_FLOE"), |interpreter| {
        for setting in ["leave_out", "double"] {
            let agent = Agent::with_packs().probe("json:loads");
            let agent = agent.option("--set").option(format!("correlation.own_spans={setting}"));
            let outcome = agent.exec(&interpreter.script(script));
            let printed = outcome.finished.expect(0);
            let own: Vec<_> = printed.lines().filter_map(|line| line.split_once(' ')).collect();
            let [parse, load] = own[..] else { panic!("two spans of its own\n{printed}") };
            let place = |span: &Span| (span.trace.clone(), span.parent.clone());
            let below = |(trace, id): (&str, &str)| (trace.to_owned(), Some(id.to_owned()));
            let [inner, outer, rest @ ..] = &outcome.spans[..] else { panic!("too few spans\n{outcome}") };
            assert_eq!(place(inner), below(parse));
            assert_eq!(place(outer), (parse.0.to_owned(), None), "what is around joins the trace");
            match (setting, rest) {
                ("leave_out", [last]) => assert_eq!(place(last), below(load)),
                ("double", [last, stage]) => {
                    assert_eq!(stage.name, "floe.compile.stage1");
                    assert_eq!(last.parent, Some(stage.id.clone()));
                }
                _ => panic!("{setting}: other spans were expected\n{outcome}"),
            }
            outcome.nothing_lost();
        }
    });
}

#[test]
fn records_of_pythons_logging_are_in_the_span_that_wrote_them() {
    let Some(_alone) = can_trace() else { return };
    for_each(interpreters(), |interpreter| {
        let script = r#"
import json, logging
logging.basicConfig(level=logging.DEBUG, handlers=[logging.NullHandler()])
log = logging.getLogger("shop.orders")
def hook(d):
    log.debug("too low")
    log.warning("%s has %d rows, %.1f%%", "orders", 3, 99.5)
    try:
        1 / 0
    except ZeroDivisionError:
        log.exception("it failed")
json.loads("{}", object_hook=hook)
log.info("outside")
log.info("complex: %s", {"a": object()})
"#;
        let outcome = Agent::with_packs().probe("json:loads").exec(&interpreter.script(script));
        outcome.finished.expect(0);
        let [span] = &outcome.spans[..] else { panic!("one span was expected\n{outcome}") };
        let seen: Vec<_> =
            outcome.logs.iter().map(|log| (log.severity.as_str(), log.body.as_str(), log.span == span.id)).collect();
        let expected = [
            ("WARN", "orders has 3 rows, 99.5%", true),
            ("ERROR", "it failed", true),
            ("INFO", "outside", false),
            ("INFO", "complex: %s", false),
        ];
        assert_eq!(seen, expected);
        let places =
            outcome.logs.iter().map(|log| (&log.attributes["code.file.path"], &log.attributes["code.line.number"]));
        let lines: Vec<_> = places.map(|(file, line)| (file.as_str(), line.as_u64())).collect();
        assert_eq!(lines, [7, 11, 13, 14].map(|line| (Some("<string>"), Some(line))));
        assert!(outcome.logs.iter().all(|log| log.logger == "shop.orders" && log.pid == span.pid));
        assert!(outcome.logs[..2].iter().all(|log| log.trace == span.trace));
        assert_eq!(outcome.logs[1].attributes["exception.type"], "ZeroDivisionError");
    });
}

#[test]
fn what_dbt_logs_about_a_node_is_in_the_span_of_the_node() {
    let Some(_alone) = can_trace() else { return };
    let Some(bin) = environment() else { return };
    for format in ["text", "json"] {
        let project = Project::copy();
        let words = ["--log-format-file", "json", "--log-format", format, "build", "--vars", "sql_error: true"];
        let outcome = Agent::with_packs().limit(Duration::from_mins(3)).exec(&project.dbt(&bin, &words));
        outcome.finished.expect(1);
        outcome.nothing_lost();
        let about_nodes = node_logs(&project.path().join("logs/dbt.log"), &outcome);
        assert!(about_nodes > 20, "{format}: {about_nodes} records about nodes");
        assert!(outcome.logs.iter().any(|log| log.logger == "dbt" && log.severity == "ERROR"));
        // Only JSON has dbt's code of the event.
        let coded = outcome.logs.iter().any(|log| log.attributes.contains_key("dbt.event.code"));
        assert_eq!(coded, format == "json");
        // An event that is written twice is one record.
        let starting = outcome.logs.iter().filter(|log| log.body.starts_with("Running with dbt")).count();
        assert_eq!(starting, 1, "{format}");
    }
}

#[test]
fn a_pid_that_is_used_again_is_another_process() {
    let Some(_alone) = can_trace() else { return };
    let interpreter = one_of(&[12, 11, 13, 10]);
    // The kernel gives the next process the number after this one, if nobody else comes first.
    let script = r#"
import os, subprocess, sys
def child(run):
    child = subprocess.Popen([sys.executable, "-c", "import json; json.loads('1')"], env={**os.environ, "FLOE_RUN_ID": run})
    child.wait()
    return child.pid
first = child(sys.argv[1])
for _ in range(100):
    with open("/proc/sys/kernel/ns_last_pid", "w") as last:
        last.write(str(first - 1))
    if child(sys.argv[2]) == first:
        print(first)
        break
"#;
    let outcome = Agent::new().probe("json:loads").exec(&interpreter.script(script).args([RUN, AGAIN]));
    let pid: u32 = outcome.finished.expect(0).trim().parse().expect("the pid came again");
    let (first, again): (Vec<_>, Vec<_>) = outcome.spans.iter().partition(|span| span.trace == TRACE);
    assert_eq!(first.len(), 1, "{outcome}");
    assert!(again.iter().all(|span| span.trace == AGAIN.replace('-', "")), "{outcome}");
    assert_eq!((first[0].pid, again.last().map(|span| span.pid)), (pid, Some(pid)), "{outcome}");
}
