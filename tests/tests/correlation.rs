//! One run, one trace: contexts that are given to a process, log records in their spans, the clock.

use std::time::Duration;

use floe_tests::dbt::{Project, environment, node_logs};
use floe_tests::{Agent, can_trace, for_each, interpreters, one_of};
use serde_json::json;

const RUN: &str = "1c9bfa5c-7b7d-4c5e-9a58-2b3d6f0e8a11";
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
    let cases: [Case<'_>; 6] = [
        (&[("FLOE_RUN_ID", RUN)], &[], None),
        (&[("TRACEPARENT", &traceparent), ("FLOE_RUN_ID", "other")], &[], Some(parent)),
        (&[("DAGSTER_COMPRESSED_EXECUTE_STEP_ARGS", COMPRESSED)], &[], Some(RUN_SPAN)),
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
        // An event that is written twice is one record.
        let starting = outcome.logs.iter().filter(|log| log.body.starts_with("Running with dbt")).count();
        assert_eq!(starting, 1, "{format}");
    }
}
