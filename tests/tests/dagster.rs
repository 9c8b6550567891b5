//! A real Dagster code location: the spans are what Dagster's own event log says about its runs.

use std::collections::BTreeMap;
use std::path::PathBuf;

use floe_tests::dagster::Instance;
use floe_tests::{Outcome, Span, Status, can_trace, programs};
use serde_json::Value;

/// The classes of the fixture's I/O managers, by their resource keys.
const MANAGERS: [(&str, &str); 5] = [
    ("io_manager", "PickledObjectFilesystemIOManager"),
    ("plain", "PlainManager"),
    ("json", "JsonManager"),
    ("text", "TextManager"),
    ("lost", "LostManager"),
];
const FAILURES: [&str; 2] = ["STEP_FAILURE", "STEP_UP_FOR_RETRY"];

/// Runs of the fixture's jobs, compared with what Dagster recorded of them.
trait Compared {
    fn job(&self, job: &str, code: i32) -> (Outcome, Value);
    fn compare(&self, outcome: &Outcome) -> Value;
}

impl Compared for Instance {
    /// Runs a job under the agent, and compares.
    fn job(&self, job: &str, code: i32) -> (Outcome, Value) {
        let outcome = self.traced(&["job", "execute", "-f", "shop.py", "-j", job], code);
        let run = self.compare(&outcome);
        assert_eq!(run["job"], job);
        (outcome, run)
    }

    /// Compares the spans of the newest run with what Dagster recorded of it.
    #[track_caller]
    fn compare(&self, outcome: &Outcome) -> Value {
        let run = self.recorded()["runs"][0].clone();
        let mut wrong = Vec::new();
        compare(outcome, &run, &mut wrong);
        assert!(wrong.is_empty(), "the spans are not Dagster's events:\n  {}\n{outcome}", wrong.join("\n  "));
        run
    }
}

fn text<'a>(value: &'a Value, name: &str) -> &'a str {
    value[name].as_str().unwrap_or_default()
}

fn is_error(span: &Span) -> bool {
    matches!(span.status, Status::Error(_))
}

/// Compares the spans of a run with its events.
fn compare(outcome: &Outcome, run: &Value, wrong: &mut Vec<String>) {
    let id = text(run, "run_id");
    let spans: Vec<&Span> = outcome.spans.iter().filter(|span| span.text("dagster.run_id") == Some(id)).collect();
    for span in &spans {
        if span.get("floe.incomplete").is_some() {
            wrong.push(format!("{}: incomplete", span.name));
        }
        if span.trace != id.replace('-', "") {
            wrong.push(format!("{}: it is in the trace {}", span.name, span.trace));
        }
    }
    let events = run["events"].as_array().expect("a list");
    let of_type =
        |kinds: &'static [&'static str]| events.iter().filter(move |event| kinds.contains(&text(event, "type")));

    let named = format!("dagster.run.{}", text(run, "job"));
    let [root] = spans.iter().filter(|span| span.name == named).collect::<Vec<_>>()[..] else {
        wrong.push(format!("no span, or several, `{named}`"));
        return;
    };
    if is_error(root) != (run["status"] == "FAILURE") {
        wrong.push(format!("the run's status is {:?}, Dagster's is {}", root.status, run["status"]));
    }
    let ended =
        of_type(&["PIPELINE_SUCCESS", "PIPELINE_FAILURE", "PIPELINE_CANCELED"]).next().map(|event| text(event, "type"));
    if root.text("dagster.run_status") != ended {
        wrong.push(format!("the run ended with {:?}, not {ended:?}", root.get("dagster.run_status")));
    }
    let reason = of_type(&["PIPELINE_FAILURE"]).next().map(|event| text(event, "failure_reason"));
    if root.text("dagster.failure_reason") != reason {
        wrong.push(format!("the reason is {:?}, not {reason:?}", root.get("dagster.failure_reason")));
    }
    if root.get("dagster.partition_key") != run["tags"].get("dagster/partition") {
        wrong.push(format!("the run's partition is {:?}", root.get("dagster.partition_key")));
    }

    compare_steps(&spans, root, run, wrong);

    // I/O managers: one span for what was written and read, with the class of the manager.
    for (kind, name, what, attribute) in [
        ("HANDLED_OUTPUT", "dagster.io_manager.handle_output", "output_name", "dagster.output_name"),
        ("LOADED_INPUT", "dagster.io_manager.load_input", "input_name", "dagster.input_name"),
    ] {
        for event in events.iter().filter(|event| event["type"] == kind) {
            let found = spans.iter().filter(|span| {
                span.name == name
                    && span.get("dagster.step_key") == Some(&event["step"])
                    && span.get(attribute) == Some(&event[what])
                    && !is_error(span)
            });
            let [span] = found.collect::<Vec<_>>()[..] else {
                wrong.push(format!("{kind} of {}: no span, or several", event["step"]));
                continue;
            };
            let class = MANAGERS.iter().find(|(key, _)| event["manager_key"] == *key).map(|(_, class)| *class);
            if span.text("dagster.io_manager") != class {
                wrong.push(format!("{kind} of {}: the manager is {:?}", event["step"], span.get("dagster.io_manager")));
            }
            let upstream = spans.iter().find(|step| {
                Some(&step.name)
                    == event["upstream_step_key"].as_str().map(|key| format!("dagster.step.{key}")).as_ref()
                    && step.text("dagster.step_status") == Some("STEP_SUCCESS")
            });
            let link = upstream.map(|step| (step.trace.clone(), step.id.clone()));
            if kind == "LOADED_INPUT" && (link.is_none() || span.links != link.into_iter().collect::<Vec<_>>()) {
                wrong.push(format!("{kind} of {}: it is linked to {:?}", event["step"], span.links));
            }
            for (attribute, value) in [
                ("dagster.upstream.step_key", &event["upstream_step_key"]),
                ("dagster.upstream.output_name", &event["upstream_output_name"]),
                ("dagster.upstream.run_id", &run["run_id"]),
            ] {
                let expected = Some(value).filter(|_| kind == "LOADED_INPUT");
                if span.get(attribute) != expected {
                    wrong.push(format!("{kind} of {}: {attribute} is {:?}", event["step"], span.get(attribute)));
                }
            }
        }
    }

    // Resources.
    let made = spans.iter().filter(|span| span.name == "dagster.resources.init");
    let (failed, well): (Vec<&Span>, Vec<&Span>) = made.copied().partition(|span| is_error(span));
    let count = |kinds| of_type(kinds).count();
    if (well.len(), failed.len()) != (count(&["RESOURCE_INIT_SUCCESS"]), count(&["RESOURCE_INIT_FAILURE"])) {
        wrong.push(format!("{} and {} spans of resources", well.len(), failed.len()));
    }
    // `Finished initialization of resources [io_manager, json].`
    let mut said: Vec<_> = of_type(&["RESOURCE_INIT_SUCCESS"])
        .filter_map(|event| text(event, "message").split_once('[')?.1.split_once(']'))
        .map(|(names, _)| names.split(", ").filter(|name| !name.is_empty()).collect::<Vec<_>>())
        .collect();
    let mut told: Vec<Vec<_>> = well
        .iter()
        .map(|span| {
            let events = span.events.iter().filter(|event| event.name == "dagster.resource.init");
            let mut names: Vec<_> =
                events.filter_map(|event| event.attributes["dagster.resource.name"].as_str()).collect();
            names.sort_unstable();
            names
        })
        .collect();
    said.sort_unstable();
    told.sort_unstable();
    if told != said {
        wrong.push(format!("the resources are {told:?}, Dagster says {said:?}"));
    }

    // Asset checks.
    let mut checks: Vec<_> = spans.iter().filter(|span| span.get("dagster.asset_check.name").is_some()).collect();
    for event in of_type(&["ASSET_CHECK_EVALUATION"]) {
        let is_it = |span: &&&Span| {
            span.get("dagster.asset_check.name") == Some(&event["check_name"])
                && span.get("dagster.asset_check.asset_key") == Some(&event["asset_key"])
        };
        let Some(at) = checks.iter().position(is_it) else {
            wrong.push(format!("no span of the check {}", event["check_name"]));
            continue;
        };
        let span = checks.remove(at);
        for (attribute, value) in
            [("dagster.asset_check.passed", "passed"), ("dagster.asset_check.severity", "severity")]
        {
            if span.get(attribute) != Some(&event[value]) {
                wrong.push(format!("{}: {attribute} is not {}", span.name, event[value]));
            }
        }
    }
    wrong.extend(checks.iter().map(|span| format!("{}: Dagster knows no such check", span.name)));
}

/// Compares the spans of steps, of what they compute and of what they materialise.
fn compare_steps(spans: &[&Span], root: &Span, run: &Value, wrong: &mut Vec<String>) {
    let mut steps: Vec<_> = spans.iter().filter(|span| span.name.starts_with("dagster.step.")).collect();
    let mut attempts: BTreeMap<&str, i64> = BTreeMap::new();
    let events = run["events"].as_array().expect("a list");
    for (number, begin) in events.iter().enumerate() {
        let key = text(begin, "step");
        if text(begin, "type") == "STEP_SKIPPED" {
            let found = steps.iter().position(|span| span.text("dagster.step_key") == Some(key));
            let skipped = found.map(|at| steps.remove(at));
            if skipped.and_then(|span| span.text("dagster.step_status")) != Some("STEP_SKIPPED") {
                wrong.push(format!("{key}: was skipped, the span is {skipped:?}"));
            }
            continue;
        }
        if !["STEP_START", "STEP_RESTARTED"].contains(&text(begin, "type")) {
            continue;
        }
        let attempt = attempts.entry(key).and_modify(|attempt| *attempt += 1).or_insert(1);
        let of_step = |event: &&Value| event["step"] == key;
        let end = events[number + 1..]
            .iter()
            .filter(of_step)
            .find(|event| ["STEP_SUCCESS", "STEP_FAILURE", "STEP_UP_FOR_RETRY"].contains(&text(event, "type")));
        let Some(end) = end else {
            wrong.push(format!("{key}: Dagster recorded no end"));
            continue;
        };
        let outcome = text(end, "type");
        let is_it =
            |span: &&&Span| span.text("dagster.step_key") == Some(key) && span.int("dagster.attempt") == Some(*attempt);
        let Some(at) = steps.iter().position(is_it) else {
            wrong.push(format!("{key}: no span of attempt {attempt}"));
            continue;
        };
        let step = steps.remove(at);
        if step.text("dagster.step_status") != Some(outcome) || is_error(step) != FAILURES.contains(&outcome) {
            wrong.push(format!("{key}: it ended with {outcome}, the span is {step:?}"));
        }
        if step.parent.as_deref() != Some(&root.id) {
            wrong.push(format!("{key}: its parent is not the run"));
        }
        if step.int("dagster.duration_ms").is_none() && step.get("dagster.duration_ms") != end.get("duration_ms") {
            wrong.push(format!(
                "{key}: the duration is {:?}, not {:?}",
                step.get("dagster.duration_ms"),
                end.get("duration_ms")
            ));
        }
        for (attribute, value) in
            [("dagster.seconds_to_wait", "seconds_to_wait"), ("dagster.error_source", "error_source")]
        {
            if step.get(attribute) != end.get(value) {
                wrong.push(format!("{key}: {attribute} is {:?}, not {:?}", step.get(attribute), end.get(value)));
            }
        }
        // Dagster takes the time after its own work for the event.
        let (began, said) = (step.start as f64 / 1e9, begin["time"].as_f64().expect("a time"));
        if began > said + 0.005 || began < said - 1.0 {
            wrong.push(format!("{key}: began at {began}, Dagster says {said}"));
        }
        if let Some(error) = end.get("error") {
            // The user's exception is the cause of Dagster's.
            let error = error.get("cause").filter(|cause| cause.is_object()).unwrap_or(error);
            compare_exception(step, error, wrong);
        }
        let computed = spans.iter().filter(|span| {
            (span.name.starts_with("dagster.asset.") || span.name.starts_with("dagster.op."))
                && span.text("dagster.step_key") == Some(key)
                && span.int("dagster.attempt") == Some(*attempt)
        });
        let computed: Vec<_> = computed.collect();
        let began = outcome != "STEP_FAILURE" || !text(&end["error"], "class").ends_with("LoadInputError");
        if computed.len() != usize::from(began) {
            wrong.push(format!("{key}: {} computations", computed.len()));
        }
        for compute in &computed {
            if compute.parent.as_deref() != Some(&step.id) || is_error(compute) != FAILURES.contains(&outcome) {
                wrong.push(format!("{key}: the computation is {compute:?}"));
            }
        }
        // Materialisations, in the order in which they came; they are told to the computation or to its step.
        let mine = events[number..].iter().filter(of_step).take_while(|event| !std::ptr::eq(*event, end));
        let said: Vec<_> = mine
            .filter(|event| event["type"] == "ASSET_MATERIALIZATION")
            .map(|event| (Some(&event["asset_key"]), event.get("partition").filter(|value| !value.is_null())))
            .collect();
        let told = computed.iter().chain([&step]).flat_map(|span| &span.events);
        let told: Vec<_> = told
            .filter(|event| event.name == "dagster.asset.materialization")
            .map(|event| {
                let get = |name: &str| event.attributes.get(name);
                (get("dagster.materialization.asset_key"), get("dagster.materialization.partition"))
            })
            .collect();
        if told != said {
            wrong.push(format!("{key}: materialised {told:?}, Dagster says {said:?}"));
        }
    }
    wrong.extend(steps.iter().map(|span| format!("{}: Dagster recorded no such step", span.name)));
}

/// Compares the exception of a span with Dagster's record of it.
fn compare_exception(span: &Span, error: &Value, wrong: &mut Vec<String>) {
    let found = span.events.iter().filter(|event| event.name == "exception").collect::<Vec<_>>();
    let [event] = found[..] else {
        wrong.push(format!("{}: {} exceptions", span.name, found.len()));
        return;
    };
    let get = |name: &str| event.attributes.get(name).and_then(Value::as_str).unwrap_or_default();
    let printed = format!("{}: {}", get("exception.type"), get("exception.message"));
    if printed.trim_end() != text(error, "message").trim_end() {
        wrong.push(format!("{}: the exception is `{printed}`, Dagster's is `{}`", span.name, text(error, "message")));
    }
    let stack = get("exception.stacktrace");
    if !stack.contains(text(error, "stack")) || !stack.starts_with("Traceback (most recent call last):\n") {
        wrong.push(format!("{}: the stack trace is\n{stack}\nnot\n{}", span.name, text(error, "stack")));
    }
}

/// The environments of the newest and the oldest supported version.
fn environments() -> Vec<PathBuf> {
    let newest = programs("FLOE");
    newest.into_iter().take(1).chain(programs("DAGSTER_1_8")).collect()
}

#[track_caller]
fn one<'a>(outcome: &'a Outcome, name: &str) -> &'a Span {
    let [span] = outcome.spans.iter().filter(|span| span.name == name).collect::<Vec<_>>()[..] else {
        panic!("not one span `{name}`\n{outcome}")
    };
    span
}

#[test]
fn assets_are_traced_in_one_process() {
    let Some(_alone) = can_trace() else { return };
    for bin in environments() {
        let instance = Instance::new(&bin);
        let (outcome, _) = instance.job("in_one_process", 0);
        assert_eq!(one(&outcome, "dagster.run.in_one_process").text("dagster.executor"), Some("InProcessExecutor"));
        for key in ["orders", "shop/reports/totals", "archive", "largest", "web/visits", "newsletter"] {
            let asset = one(&outcome, &format!("dagster.asset.{key}")).clone();
            assert_eq!(asset.text("dagster.asset_key"), Some(key));
            assert_eq!(asset.text("dagster.step_key"), Some(key.replace('/', "__").as_str()));
            assert_eq!(asset.text("dagster.job_name"), Some("in_one_process"));
            assert_eq!((asset.get("dagster.partition_key"), asset.get("dagster.code_location")), (None, None));
        }
        // A coroutine and a generator last as long as they run.
        for (name, least) in [("dagster.asset.web/visits", 50), ("dagster.asset.newsletter", 30)] {
            let span = one(&outcome, name);
            assert!(span.end - span.start >= least * 1_000_000, "{span:?}");
        }
        // What is read is named: the upstream asset, in the span of the asset that reads.
        let read = outcome.named("dagster.io_manager.load_input");
        let read = read.filter(|span| span.text("dagster.step_key") == Some("shop__reports__totals"));
        let [read] = read.collect::<Vec<_>>()[..] else { panic!("{outcome}") };
        assert_eq!(read.text("dagster.upstream.asset_key"), Some("orders"));
        assert_eq!(read.text("dagster.asset_key"), Some("shop/reports/totals"));
        let written = outcome.named("dagster.io_manager.handle_output");
        let archive = written.filter(|span| span.text("dagster.asset_key") == Some("archive"));
        let [archive] = archive.collect::<Vec<_>>()[..] else { panic!("{outcome}") };
        assert!(archive.end - archive.start >= 20_000_000, "the manager sleeps: {archive:?}");
    }
}

#[test]
fn failures_retries_and_skips_are_seen_as_such() {
    let Some(_alone) = can_trace() else { return };
    let Some(bin) = environments().into_iter().next() else { return };
    for (job, code) in [("failing", 1), ("retried", 0), ("several", 0), ("refused", 1), ("disconnected", 1)] {
        let (outcome, run) = Instance::new(&bin).job(job, code);
        if job == "several" {
            let split = one(&outcome, "dagster.asset.split");
            assert_eq!(split.get("dagster.asset_keys"), Some(&Value::from(vec!["split/even", "split/odd"])));
            assert_eq!(split.get("dagster.asset_key"), None, "there are two");
        }
        if job == "failing" {
            let stopped = run["events"].as_array().expect("a list").iter().all(|event| event["step"] != "invoices");
            assert!(
                !stopped || outcome.with("dagster.step_key").all(|s| s.text("dagster.step_key") != Some("invoices"))
            );
            let read = outcome.named("dagster.io_manager.load_input").find(|span| is_error(span)).expect("it failed");
            assert_eq!(read.text("dagster.io_manager"), Some("LostManager"));
        }
    }
}

#[test]
fn ops_and_asset_checks_are_traced_on_the_oldest_and_the_newest_version() {
    let Some(_alone) = can_trace() else { return };
    for bin in environments() {
        let instance = Instance::new(&bin);
        let (outcome, _) = instance.job("arithmetic", 0);
        for op in ["fetch", "halve", "announce"] {
            let span = one(&outcome, &format!("dagster.op.{op}"));
            assert_eq!(span.text("dagster.op_name"), Some(op));
            assert!(span.with_prefix("dagster.asset").is_empty(), "{span:?}");
        }
        instance.job("checked", 0);
    }
}

#[test]
fn steps_in_processes_of_their_own_are_traced() {
    let Some(_alone) = can_trace() else { return };
    let Some(bin) = environments().into_iter().next() else { return };
    let (outcome, _) = Instance::new(&bin).job("in_many_processes", 0);
    let root = one(&outcome, "dagster.run.in_many_processes");
    assert_eq!(root.text("dagster.executor"), Some("MultiprocessExecutor"));
    for step in outcome.spans.iter().filter(|span| span.name.starts_with("dagster.step.")) {
        assert_ne!(step.pid, root.pid);
    }
}

#[test]
fn a_partition_is_named_and_code_of_a_command_line_has_no_location() {
    let Some(_alone) = can_trace() else { return };
    let Some(bin) = environments().into_iter().next() else { return };
    let instance = Instance::new(&bin);
    let words = ["asset", "materialize", "-f", "shop.py", "--select", "regions", "--partition", "north"];
    let outcome = instance.traced(&words, 0);
    instance.compare(&outcome);
    let asset = one(&outcome, "dagster.asset.regions");
    assert_eq!(asset.text("dagster.partition_key"), Some("north"));
    assert_eq!(asset.get("dagster.code_location"), None);
}

#[test]
fn a_sensor_launches_a_run_under_dagster_dev() {
    let Some(_alone) = can_trace() else { return };
    let Some(bin) = programs("FLOE").into_iter().next() else { return };
    let instance = Instance::new(&bin);
    let outcome = instance.dev("shop.py", |recorded| {
        let skipped =
            recorded["ticks"].as_array().is_some_and(|ticks| ticks.iter().any(|tick| tick["status"] == "SKIPPED"));
        skipped && recorded["runs"][0]["status"] == "SUCCESS"
    });
    let recorded = instance.recorded();
    let run = instance.compare(&outcome);
    let root = one(&outcome, "dagster.run.arithmetic");
    assert_eq!(root.text("dagster.sensor_name"), run["tags"]["dagster/sensor_name"].as_str());
    assert_eq!(root.text("dagster.run_key"), run["tags"]["dagster/run_key"].as_str());
    assert_eq!(root.text("dagster.code_location"), Some("shop.py"));
    let ticks = recorded["ticks"].as_array().expect("a list");
    for (status, key, attribute) in
        [("SUCCESS", "run_keys", "dagster.run_keys"), ("SKIPPED", "skip_reason", "dagster.skip_reason")]
    {
        let tick = ticks.iter().find(|tick| tick["status"] == status).expect("a tick");
        let span = outcome.named("dagster.sensor.new_files").find(|span| span.get(attribute).is_some());
        let span = span.unwrap_or_else(|| panic!("no evaluation with {attribute}\n{outcome}"));
        assert_eq!(span.get(attribute), Some(&tick[key]));
        assert_eq!(span.text("dagster.cursor"), tick["cursor"].as_str());
        assert_eq!(span.text("dagster.repository_name"), Some("__repository__"));
        // Only the first evaluation has no cursor from before.
        let before = Some("file-1").filter(|_| status == "SKIPPED");
        assert_eq!(span.text("dagster.cursor.before"), before, "{span:?}");
    }
    // The request of the run leads to the run.
    let request = one(&outcome, "dagster.run_request.new_files");
    assert_eq!(request.links, [(root.trace.clone(), root.id.clone())]);
    assert_eq!(request.text("dagster.requested_run_id"), run["run_id"].as_str());
    assert_eq!(request.text("dagster.run_key"), run["tags"]["dagster/run_key"].as_str());
    assert_ne!(request.trace, root.trace);
}
