//! Traces as an OpenTelemetry Collector passes them on.

use std::collections::BTreeMap;
use std::time::Duration;

use floe_tests::dbt::{Project, environment};
use floe_tests::{Agent, Collector, Run, Span, can_trace};

fn by_id(spans: &[Span]) -> BTreeMap<&str, &Span> {
    spans.iter().map(|span| (span.id.as_str(), span)).collect()
}

#[test]
fn the_collector_passes_on_a_dbt_build_as_it_was_sent() {
    let Some(collector) = Collector::start() else { return };
    let Some(_alone) = can_trace() else { return };
    let Some(bin) = environment() else { return };
    let project = Project::copy();
    let agent = Agent::with_packs().option("--otlp").option(collector.otlp_grpc()).limit(Duration::from_mins(3));
    let outcome = agent.exec(&project.dbt(&bin, &["build", "--vars", "sql_error: true"]));
    outcome.finished.expect(1);
    let passed_on = collector.spans(outcome.spans.len());
    assert_eq!(passed_on.len(), outcome.spans.len());
    let (passed_on, written) = (by_id(&passed_on), by_id(&outcome.spans));
    for (id, span) in written {
        assert_eq!(passed_on.get(id), Some(&span), "{}", span.name);
    }
    // A file of the Collector's is a file for the report.
    let page = project.path().join("trace.html");
    let report = Run::new(Agent::binary()).arg("report").arg(collector.file()).arg("-o").arg(&page).run();
    report.expect(0);
    let spans = outcome.spans.len();
    assert!(report.err().contains(&format!("1 trace, {spans} spans, ")), "{}", report.err());
}
