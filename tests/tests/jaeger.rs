//! Traces as Jaeger shows them, through its HTTP API: a reader that shares no code with the agent. Tests that are named
//! after a requirement of floe's show that it holds.

use std::collections::BTreeMap;
use std::time::Duration;

use floe_tests::dbt::{Project, environment};
use floe_tests::{Agent, Jaeger, JaegerSpan, Outcome, Run, Span, Status, can_trace, fixture, programs, say};
use serde_json::{Value, json};

/// The products of `tests/fixtures/floe`.
const PRODUCTS: [&str; 3] = ["customer-orders", "product-events", "regional-sales"];

/// A real `dbt build` in which a model fails, others are skipped, and a test fails: once into Jaeger and into a file.
fn build(jaeger: &Jaeger, bin: &std::path::Path) -> (Project, Outcome) {
    let project = Project::copy();
    let agent = Agent::with_packs().option("--otlp").option(jaeger.otlp_grpc()).limit(Duration::from_mins(3));
    let outcome = agent.exec(&project.dbt(bin, &["build", "--vars", "{sql_error: true, fail_test: true}"]));
    outcome.finished.expect(1);
    outcome.nothing_lost();
    (project, outcome)
}

#[test]
fn fr_041_the_traces_of_dbt_are_visible_in_jaeger() {
    let Some(jaeger) = Jaeger::shared() else { return };
    let Some(_alone) = can_trace() else { return };
    let Some(bin) = environment() else { return };
    let (project, outcome) = build(jaeger, &bin);
    is_what_dbt_says(jaeger, &project, &outcome);
    is_what_the_file_says(jaeger, &outcome);
}

#[test]
fn fr_046_fr_047_the_compilations_of_all_products_are_visible_under_their_own_names() {
    let Some(jaeger) = Jaeger::shared() else { return };
    let Some(_alone) = can_trace() else { return };
    let Some(bin) = programs("FLOE").into_iter().next() else { return };
    let folder = fixture("floe");
    let agent = Agent::with_packs().option("--otlp").option(jaeger.otlp_grpc()).limit(Duration::from_mins(3));
    for product in PRODUCTS {
        let output = folder.path().join("target").join(product).join("compiled_artifacts.json");
        let run = Run::new(bin.join("floe"))
            .args(["platform", "compile", "--manifest", "manifest.yaml", "--spec"])
            .arg(format!("{product}/floe.yaml"))
            .arg("--output")
            .arg(&output)
            .folder(folder.path())
            .limit(Duration::from_mins(3));
        let outcome = agent.exec(&run);
        outcome.finished.expect(0);
        outcome.nothing_lost();
        let artifacts = std::fs::read_to_string(&output).expect("floe writes its artifacts");
        let artifacts: Value = serde_json::from_str(&artifacts).expect("floe writes JSON");
        let found = jaeger.search(product, &json!({ "floe.artifacts_version": artifacts["version"] }));
        let [trace] = &found[..] else { panic!("{} traces of {product}\n{outcome}", found.len()) };
        let root = trace.iter().find(|span| span.name == "floe.compile").expect("a span of the compilation");
        for stage in 1..=6 {
            let name = format!("floe.compile.stage{stage}");
            let stages: Vec<_> = trace.iter().filter(|span| span.name == name).collect();
            let [span] = stages[..] else { panic!("{} spans {name} of {product}", stages.len()) };
            assert_eq!((span.parent(), span.service.as_str()), (Some(root.id.as_str()), product));
        }
        is_what_the_file_says(jaeger, &outcome);
        say(&format!("Jaeger: {} spans of {product}", trace.len()));
    }
}

/// Jaeger's search finds the run by dbt's own id, and the spans in it are the results in dbt's own file.
fn is_what_dbt_says(jaeger: &Jaeger, project: &Project, outcome: &Outcome) {
    let results = project.artifact("run_results.json");
    let invocation = results["metadata"]["invocation_id"].as_str().expect("dbt writes it");
    let root = outcome.with("dbt.command").next().expect("a span of the command");
    let whole = jaeger.trace(&root.trace, outcome.spans.len());
    let service = root.resource["service.name"].as_str().expect("a text");
    assert!(jaeger.services().iter().any(|known| known == service), "{:?}", jaeger.services());
    let found = jaeger.search(service, &json!({ "dbt.invocation_id": invocation }));
    let [trace] = &found[..] else { panic!("{} traces of the run {invocation}", found.len()) };
    assert_eq!(trace.len(), whole.len());

    let command = &whole[&root.id];
    assert!(command.parent().is_none() && command.failed(), "{command:?}");
    let mut nodes: BTreeMap<&str, Vec<&JaegerSpan>> = BTreeMap::new();
    for span in trace.iter().filter(|span| span.text("dbt.unique_id").is_some()) {
        nodes.entry(span.text("dbt.unique_id").unwrap_or_default()).or_default().push(span);
    }
    let mut outcomes: BTreeMap<&str, usize> = BTreeMap::new();
    let results = results["results"].as_array().expect("dbt writes results");
    for result in results {
        let id = result["unique_id"].as_str().expect("dbt writes ids");
        let status = result["status"].as_str().expect("dbt writes a status");
        let [node] = nodes.get(id).map_or(&[][..], Vec::as_slice) else { panic!("{id} is not one span in Jaeger") };
        assert_eq!(node.text("dbt.status"), Some(status), "{id}");
        assert_eq!(node.failed(), ["error", "fail"].contains(&status), "{id}: {node:?}");
        assert_eq!(node.parent(), Some(command.id.as_str()), "{id}");
        *outcomes.entry(status).or_default() += 1;
    }
    for status in ["success", "error", "skipped"] {
        assert!(outcomes.contains_key(status), "the run has a node with the status {status}: {outcomes:?}");
    }
    say(&format!("Jaeger: {} spans of {service}, {outcomes:?}", trace.len()));
}

/// Jaeger has the spans of the file, whole.
fn is_what_the_file_says(jaeger: &Jaeger, outcome: &Outcome) {
    let mut traces: BTreeMap<&str, Vec<&Span>> = BTreeMap::new();
    for span in &outcome.spans {
        traces.entry(&span.trace).or_default().push(span);
    }
    for (id, spans) in traces {
        let shown = jaeger.trace(id, spans.len());
        assert_eq!(shown.len(), spans.len(), "trace {id}");
        for span in spans {
            same(span, shown.get(&span.id).unwrap_or_else(|| panic!("{} is not in Jaeger", span.name)));
        }
    }
}

fn same(span: &Span, shown: &JaegerSpan) {
    let what = format!("{} {}", span.name, span.id);
    assert_eq!((&shown.name, &shown.trace), (&span.name, &span.trace), "{what}");
    assert_eq!(shown.parent(), span.parent.as_deref(), "{what}");
    // Jaeger counts in microseconds.
    assert_eq!(shown.start, span.start / 1000, "{what}");
    assert_eq!(shown.duration, (span.end - span.start) / 1000, "{what}");
    let kind = ["", "internal", "server", "client", "producer", "consumer"][span.kind as usize];
    assert_eq!(shown.text("span.kind"), Some(kind), "{what}");
    match &span.status {
        Status::Error(message) => {
            assert!(shown.failed(), "{what}");
            assert_eq!(shown.text("otel.status_description").unwrap_or_default(), message, "{what}");
        }
        Status::Ok => assert_eq!(shown.text("otel.status_code"), Some("OK"), "{what}"),
        Status::Unset => assert_eq!(shown.text("otel.status_code"), None, "{what}"),
    }
    for (name, value) in &span.attributes {
        assert_eq!(shown.tags.get(name), Some(&as_shown(value)), "{what}: {name}");
    }
    assert_eq!(shown.logs.len(), span.events.len(), "{what}");
    for (event, (time, fields)) in span.events.iter().zip(&shown.logs) {
        assert_eq!((*time, fields.get("event")), (event.time / 1000, Some(&json!(event.name))), "{what}");
        for (name, value) in &event.attributes {
            assert_eq!(fields.get(name), Some(&as_shown(value)), "{what}: {} {name}", event.name);
        }
    }
    for (trace, id) in &span.links {
        let link = ("FOLLOWS_FROM".to_owned(), trace.clone(), id.clone());
        assert!(shown.references.contains(&link), "{what}: no link to {id} in {:?}", shown.references);
    }
    assert_eq!(json!(shown.service), span.resource["service.name"], "{what}");
    for (name, value) in span.resource.iter().filter(|(name, _)| *name != "service.name") {
        assert_eq!(shown.process.get(name), Some(&as_shown(value)), "{what}: {name} of the resource");
    }
    // Jaeger finds a span without length odd, and makes it a nanosecond long.
    if span.end > span.start {
        assert_eq!(shown.warnings, Value::Null, "{what}");
    }
}

/// Jaeger has no lists: they are JSON in a text.
fn as_shown(value: &Value) -> Value {
    if value.is_array() || value.is_object() { value.to_string().into() } else { value.clone() }
}

/// A real run of Dagster's, over HTTP: Jaeger finds it by Dagster's own id, and its spans are the events in Dagster's own log.
#[test]
fn the_materialisation_of_an_asset_by_dagster_is_visible_in_jaeger() {
    let Some(jaeger) = Jaeger::shared() else { return };
    let Some(_alone) = can_trace() else { return };
    let Some(bin) = programs("FLOE").into_iter().next() else { return };
    let folder = fixture("dagster");
    let dagster = |program: &str, words: &[&str]| {
        let run = Run::new(bin.join(program)).args(words).folder(folder.path()).limit(Duration::from_mins(3));
        run.variable("DAGSTER_HOME", folder.path()).variable("SHOP_STATE", folder.path())
    };
    let agent = Agent::with_packs().option("--otlp").option(jaeger.otlp_http()).limit(Duration::from_mins(3));
    let agent = agent.option("--set").option("otlp.protocol=http/protobuf");
    let outcome = agent.exec(&dagster("dagster", &["asset", "materialize", "-f", "shop.py", "--select", "orders"]));
    outcome.finished.expect(0);
    outcome.nothing_lost();
    is_what_the_file_says(jaeger, &outcome);

    let recorded = dagster("python", &["event_log.py"]).run().expect(0);
    let recorded: Value = serde_json::from_str(&recorded).expect("the script prints JSON");
    let [run] = &recorded["runs"].as_array().expect("a list")[..] else { panic!("one run: {recorded}") };
    let service = outcome.with("dagster.run_id").next().expect("a span of the run").resource["service.name"].clone();
    let found = jaeger.search(service.as_str().expect("a text"), &json!({ "dagster.run_id": run["run_id"] }));
    let [trace] = &found[..] else { panic!("{} traces of the run\n{outcome}", found.len()) };
    let with_prefix = |prefix: &str| trace.iter().filter(|span| span.name.starts_with(prefix)).collect::<Vec<_>>();
    let [root] = with_prefix("dagster.run.")[..] else { panic!("one span of the run: {trace:?}") };
    assert_eq!((run["status"].as_str(), root.failed()), (Some("SUCCESS"), false));
    let events = |kind: &str| {
        run["events"].as_array().into_iter().flatten().filter(|event| event["type"] == kind).collect::<Vec<_>>()
    };
    let texts = |values: Vec<&Value>, name: &str| values.iter().map(|value| value[name].clone()).collect::<Vec<_>>();
    let tags =
        |spans: Vec<&JaegerSpan>, name: &str| spans.iter().map(|span| span.tags[name].clone()).collect::<Vec<_>>();
    assert_eq!(tags(vec![root], "dagster.run_status"), texts(events("PIPELINE_SUCCESS"), "type"));
    let steps = texts(events("STEP_SUCCESS"), "step");
    assert_eq!(steps, [json!("orders")]);
    assert_eq!(tags(with_prefix("dagster.step."), "dagster.step_key"), steps);
    assert_eq!(
        tags(with_prefix("dagster.io_manager.handle_output"), "dagster.step_key"),
        texts(events("HANDLED_OUTPUT"), "step")
    );
    let told = trace
        .iter()
        .flat_map(|span| &span.logs)
        .filter(|(_, fields)| fields.get("event") == Some(&json!("dagster.asset.materialization")));
    let told: Vec<_> = told.map(|(_, fields)| fields["dagster.materialization.asset_key"].clone()).collect();
    assert_eq!(told, texts(events("ASSET_MATERIALIZATION"), "asset_key"));
    say(&format!("Jaeger: {} spans of {service}, over HTTP", trace.len()));
}

#[test]
fn exceptions_and_plain_calls_are_visible_in_jaeger_by_every_protocol() {
    let Some(jaeger) = Jaeger::shared() else { return };
    let Some(_alone) = can_trace() else { return };
    let (grpc, http) = (jaeger.otlp_grpc(), jaeger.otlp_http());
    for (endpoint, protocol) in [(&grpc, "grpc"), (&http, "http/protobuf"), (&http, "http/json")] {
        let agent = Agent::new().option("--otlp").option(endpoint).option("--set");
        shop(jaeger, &agent.option(format!("otlp.protocol={protocol}")));
    }
}

fn shop(jaeger: &Jaeger, agent: &Agent) {
    let script = floe_tests::one_of(&[12]).program("shop.py");
    let probes = ["shop_target:Shop.day", "shop_target:Shop.sell(item=arg(1, 'item'), price=arg(2, 'price'))"];
    let outcome = agent.clone().probes(&probes).exec(&script);
    outcome.finished.expect(0);
    outcome.nothing_lost();
    let day = outcome.named("Shop.day").next().unwrap_or_else(|| panic!("no span of Shop.day\n{outcome}"));
    let shown = jaeger.trace(&day.trace, 4);
    let sold: Vec<_> = shown.values().filter(|span| span.name == "Shop.sell").collect();
    assert_eq!(sold.len(), 3);
    assert!(sold.iter().all(|span| span.parent() == Some(day.id.as_str())));
    let prices: Vec<_> = sold.iter().filter(|span| !span.failed()).map(|span| &span.tags["price"]).collect();
    assert!(
        prices.contains(&&json!(3)) && prices.contains(&&json!(4.5)),
        "ints and floats stay what they are: {prices:?}"
    );
    let failed = sold.iter().find(|span| span.failed()).expect("one failed");
    let [(_, exception)] = &failed.logs[..] else { panic!("one event: {failed:?}") };
    assert_eq!(
        (&exception["event"], &exception["exception.type"], &exception["exception.message"]),
        (&json!("exception"), &json!("ValueError"), &json!("a price below zero"))
    );
    is_what_the_file_says(jaeger, &outcome);
}
