//! What is exported, as another program reads it: OpenTelemetry's protobuf definitions of the Python SDK.

use std::time::Duration;

use floe_tests::{Agent, Run, can_trace, environments, one_of, program};
use serde_json::{Value, json};

fn list<'a>(value: &'a Value, name: &str) -> impl Iterator<Item = &'a Value> {
    value[name].as_array().into_iter().flatten()
}

/// An attribute, as protobuf's JSON mapping has it.
fn attribute<'a>(of: &'a Value, name: &str) -> Option<&'a Value> {
    list(of, "attributes").find(|attribute| attribute["key"] == name).map(|attribute| &attribute["value"])
}

#[test]
fn requests_decode_with_the_python_definitions_and_are_sent_again_after_503() {
    let Some(_alone) = can_trace() else { return };
    let Some(with_definitions) = environments("FLOE_TEST_PYTHON_OTLP").into_iter().next() else { return };
    let mut collector =
        Run::new(&with_definitions.path).arg(program("collector.py")).limit(Duration::from_mins(2)).start();
    collector.wait_for_output(".");
    let port = collector.output().trim().trim_end_matches('.').rsplit(' ').next().expect("a port").to_owned();

    let agent = Agent::new()
        .option("--otlp")
        .option(format!("http://127.0.0.1:{port}"))
        .option("--set")
        .option("otlp.protocol=http/protobuf")
        .option("--set")
        .option("otlp.compression=gzip")
        .option("--set")
        .option("otlp.api_key=k")
        .option("--set")
        .option("shutdown_timeout=20s")
        .probe("idle_target:work(t.n=arg0)");
    let run = one_of(&[12, 11])
        .program("idle.py")
        .arg("--password")
        .arg("hunter2")
        .variable("OTEL_SERVICE_NAME", "shop")
        .variable("OTEL_RESOURCE_ATTRIBUTES", "team=data,deployment.environment.name=dev");
    let outcome = agent.exec(&run);
    outcome.finished.expect(0);
    collector.close_input();
    let collected = collector.wait();
    let lines: Vec<Value> = collected
        .expect(0)
        .lines()
        .filter(|line| line.starts_with('{'))
        .map(|line| serde_json::from_str(line).expect("JSON"))
        .collect();

    let traces: Vec<_> = lines.iter().filter(|line| line["path"] == "/v1/traces").collect();
    assert!(!traces.is_empty(), "{collected}\n{outcome}");
    assert!(traces.iter().any(|line| line["again"] == true), "the refused request came again, the same");
    let mut ids = Vec::new();
    for line in traces {
        assert_eq!((&line["key"], &line["unknown"]), (&json!("k"), &json!([])));
        assert_eq!(line["content_type"], "application/x-protobuf");
        for resource in list(&line["request"], "resourceSpans") {
            let of = |name| attribute(&resource["resource"], name);
            assert_eq!(of("service.name"), Some(&json!({"stringValue": "shop"})));
            assert_eq!(of("team"), Some(&json!({"stringValue": "data"})));
            assert_eq!(of("deployment.environment.name"), Some(&json!({"stringValue": "dev"})));
            assert_eq!(of("process.runtime.name"), Some(&json!({"stringValue": "cpython"})));
            assert!(!resource.to_string().contains("hunter2"), "{resource}");
            for span in list(resource, "scopeSpans").flat_map(|scope| list(scope, "spans")) {
                assert_eq!((&span["name"], &span["kind"]), (&json!("work"), &json!("SPAN_KIND_INTERNAL")));
                assert!(attribute(span, "t.n").is_some_and(|value| value["intValue"].is_string()), "{span}");
                ids.push(span["spanId"].as_str().expect("an id").to_owned());
            }
        }
    }
    ids.sort();
    ids.dedup();
    assert_eq!(ids.len(), 20, "{collected}\n{outcome}");

    let metrics = lines.iter().find(|line| line["path"] == "/v1/metrics").expect("the agent's own metrics");
    assert!(metrics.to_string().contains("otel.sdk.exporter.span.exported"), "{metrics}");
}
