//! A real dbt project: the spans are the nodes of dbt's own `run_results.json`.

use std::collections::{BTreeMap, BTreeSet};
use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use floe_tests::dbt::{Project, environment};
use floe_tests::{Agent, Outcome, Span, Status, can_trace, say, skip};
use serde_json::Value;

/// The environments with other versions of dbt: `FLOE_TEST_PYTHON_DBT_1_8` and so on.
fn other_environments() -> BTreeSet<PathBuf> {
    let main = env::var_os("FLOE_TEST_PYTHON_DBT").unwrap_or_default();
    let folders = env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("FLOE_TEST_PYTHON_DBT_"));
    let folders = folders.flat_map(|(_, folders)| env::split_paths(&folders).collect::<Vec<_>>());
    folders.filter(|folder| folder.as_os_str() != main).collect()
}

#[test]
fn a_build_is_traced_node_by_node() {
    in_main_environment(&["build"], 0);
}

#[test]
fn a_failing_test_is_an_error() {
    in_main_environment(&["build", "--vars", "fail_test: true"], 1);
}

#[test]
fn a_failing_model_is_an_error_and_what_depends_on_it_is_skipped() {
    in_main_environment(&["build", "--vars", "sql_error: true"], 1);
}

#[test]
fn a_failing_hook_is_an_error() {
    in_main_environment(&["build", "--vars", "hook_error: true"], 1);
}

#[test]
fn other_commands_are_traced_also_when_parsing_is_skipped() {
    let Some(_alone) = can_trace() else { return };
    let Some(bin) = environment() else { return };
    let project = Project::copy();
    for (words, code) in [
        (&["seed"][..], 0),
        (&["run", "--select", "staging"], 0),
        (&["test", "--select", "stg_orders", "--target", "ci"], 0),
    ] {
        let outcome = Agent::with_packs().limit(Duration::from_mins(3)).exec(&project.dbt(&bin, words));
        outcome.finished.expect(code);
        check(&project, &outcome, words[0]);
    }
}

#[test]
fn the_other_supported_versions_of_dbt_are_traced() {
    let Some(_alone) = can_trace() else { return };
    let environments = other_environments();
    if environments.is_empty() {
        skip("no FLOE_TEST_PYTHON_DBT_<VERSION> is set: `cargo xtask test` makes these environments");
        return;
    }
    for bin in environments {
        for (words, code) in [(&["build"][..], 0), (&["build", "--vars", "{sql_error: true, hook_error: true}"], 1)] {
            let project = Project::copy();
            build(&project, &bin, words, code);
        }
    }
}

#[test]
fn nodes_have_their_phases_statements_and_links() {
    let Some(_alone) = can_trace() else { return };
    // The oldest and the newest version.
    let environments = other_environments();
    if environments.is_empty() {
        skip("no FLOE_TEST_PYTHON_DBT_<VERSION> is set: `cargo xtask test` makes these environments");
    }
    for bin in environments {
        let project = Project::copy();
        // Statements as they are, to be found in dbt's log.
        let config = project.path().join("agent.yaml");
        fs::write(&config, "redaction: {sql: raw}\n").expect("the folder is ours");
        let words = ["build", "--log-format-file", "json", "--log-level-file", "debug", "--vars", "sql_error: true"];
        let outcome = Agent::with_packs()
            .option("--config")
            .option(&config)
            .limit(Duration::from_mins(3))
            .exec(&project.dbt(&bin, &words));
        outcome.finished.expect(1);
        check(&project, &outcome, "build");
        let mut wrong = Vec::new();
        parts(&project, &outcome, &mut wrong);
        statements(&project, &outcome, &mut wrong);
        clock(&project, &outcome, &mut wrong);
        assert!(wrong.is_empty(), "the spans are not what dbt wrote:\n  {}\n{outcome}", wrong.join("\n  "));
    }
}

/// The phases of nodes and the links between nodes: dbt's results and its manifest.
fn parts(project: &Project, outcome: &Outcome, wrong: &mut Vec<String>) {
    let (results, manifest) = (project.artifact("run_results.json"), project.artifact("manifest.json"));
    let node = |id: &str| outcome.with("dbt.model_name").find(|span| span.text("dbt.unique_id") == Some(id));
    for result in results["results"].as_array().expect("dbt writes results") {
        let id = result["unique_id"].as_str().expect("dbt writes ids");
        let Some(span) = node(id) else { continue };
        let said: Vec<_> =
            result["timing"].as_array().into_iter().flatten().filter_map(|t| t["name"].as_str()).collect();
        let phases = outcome.with("dbt.phase").filter(|phase| phase.parent.as_deref() == Some(&span.id));
        let phases: Vec<_> = phases.filter_map(|phase| phase.text("dbt.phase")).collect();
        if phases != said && !id.starts_with("operation.") {
            wrong.push(format!("{id}: the phases are {phases:?}, dbt says {said:?}"));
        }
        let depends =
            ["nodes", "unit_tests"].iter().find_map(|group| manifest[group][id]["depends_on"]["nodes"].as_array());
        // Ephemeral models have no span, what is a source of data neither; unit tests run before their model.
        let upstream = depends.into_iter().flatten().filter_map(|other| node(other.as_str()?));
        let upstream = upstream.filter(|other| other.start < span.start).map(|other| other.id.clone());
        let (upstream, linked): (BTreeSet<_>, BTreeSet<_>) =
            (upstream.collect(), span.links.iter().map(|(_, id)| id.clone()).collect());
        if upstream != linked && !id.starts_with("operation.") {
            wrong.push(format!("{id}: it links to {linked:?}, not to {upstream:?}"));
        }
        if result["status"] == "error" {
            let event = span.events.iter().find(|event| event.name == "exception");
            let message = event.and_then(|event| event.attributes["exception.message"].as_str()).unwrap_or_default();
            // dbt indents the lines.
            let words = |text: &str| text.split_whitespace().collect::<Vec<_>>().join(" ");
            let said = words(result["message"].as_str().unwrap_or_default());
            if message.is_empty() || !said.contains(&words(message)) {
                wrong.push(format!("{id}: its exception is {event:?}, dbt's message is {}", result["message"]));
            }
        }
    }
}

/// When phases began and ended, by dbt's clock and by the agent's. Single ones may differ by more, where the machine was busy in
/// between.
fn clock(project: &Project, outcome: &Outcome, wrong: &mut Vec<String>) {
    let results = project.artifact("run_results.json");
    let mut differences = Vec::new();
    for result in results["results"].as_array().expect("dbt writes results") {
        let node = outcome.with("dbt.model_name").find(|span| span.get("dbt.unique_id") == Some(&result["unique_id"]));
        let Some(node) = node else { continue };
        for timing in result["timing"].as_array().into_iter().flatten() {
            let phase = outcome.with("dbt.phase").find(|phase| {
                phase.parent.as_deref() == Some(&node.id) && phase.get("dbt.phase") == Some(&timing["name"])
            });
            let Some(phase) = phase else { continue };
            for (name, time) in [("started_at", phase.start), ("completed_at", phase.end)] {
                let said = timing[name].as_str().and_then(nanoseconds).expect("dbt writes times");
                differences.push(said.abs_diff(time));
            }
        }
    }
    differences.sort_unstable();
    let median = differences[differences.len() / 2];
    if median > 1_000_000 {
        wrong.push(format!("dbt's clock and the agent's differ by {median} ns"));
    }
}

/// `2026-05-01T12:30:00.123456Z` as nanoseconds since 1970.
fn nanoseconds(text: &str) -> Option<u64> {
    let part = |at: std::ops::Range<usize>| text.get(at)?.parse::<u64>().ok();
    let (year, month, day) = (part(0..4)?, part(5..7)?, part(8..10)?);
    // Years that begin in March have the day that some lack at their end.
    let (year, month) = if month > 2 { (year, month - 3) } else { (year - 1, month + 9) };
    let days = 365 * year + year / 4 - year / 100 + year / 400 + (153 * month + 2) / 5 + day - 719_469;
    let seconds = days * 86_400 + part(11..13)? * 3_600 + part(14..16)? * 60 + part(17..19)?;
    Some(seconds * 1_000_000_000 + part(20..26)? * 1_000)
}

#[test]
fn times_of_dbt_are_understood() {
    assert_eq!(nanoseconds("1970-01-01T00:00:00.000001Z"), Some(1_000));
    assert_eq!(nanoseconds("2024-02-29T12:30:01.500000Z"), Some(1_709_209_801_500_000_000));
}

/// Every statement that dbt logs, and no other.
fn statements(project: &Project, outcome: &Outcome, wrong: &mut Vec<String>) {
    let log = fs::read_to_string(project.path().join("logs/dbt.log")).expect("dbt writes a log");
    let log = log.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    // Of a statement with data, dbt logs the first 512 characters and dots.
    let mut said: Vec<String> = log
        .filter(|line| line["info"]["name"] == "SQLQuery")
        .map(|line| {
            let sql = line["data"]["sql"].as_str().unwrap_or_default().trim();
            sql.strip_suffix("...").unwrap_or(sql).trim().chars().take(400).collect()
        })
        .collect();
    for span in outcome.with("db.query.text") {
        let query = span.text("db.query.text").unwrap_or_default();
        let begin: String = query.trim().chars().take(400).collect();
        match said.iter().position(|said| *said == begin) {
            Some(at) => drop(said.swap_remove(at)),
            None => wrong.push(format!("dbt does not log `{begin}`")),
        }
        let cut = span.get("floe.truncated").is_some();
        if query.len() > 4096 || (query.len() > 4000) != cut {
            wrong.push(format!("{} characters, cut: {cut}", query.len()));
        }
        if span.text("db.system.name") != Some("duckdb") || span.kind != 3 {
            wrong.push(format!("{begin}: {:?}, kind {}", span.get("db.system.name"), span.kind));
        }
        let first = query.rsplit("*/").next().unwrap_or_default().split_whitespace().next().unwrap_or_default();
        if span.text("db.operation.name") != Some(first.trim_start_matches('(').to_uppercase().as_str()) {
            wrong.push(format!("{begin}: the operation is {:?}", span.get("db.operation.name")));
        }
    }
    wrong.extend(said.iter().map(|statement| format!("no span of `{statement}`")));
}

fn in_main_environment(words: &[&str], code: i32) {
    let Some(_alone) = can_trace() else { return };
    let Some(bin) = environment() else { return };
    build(&Project::copy(), &bin, words, code);
}

fn build(project: &Project, bin: &Path, words: &[&str], code: i32) {
    let outcome = Agent::with_packs().limit(Duration::from_mins(3)).exec(&project.dbt(bin, words));
    outcome.finished.expect(code);
    check(project, &outcome, words[0]);
}

fn check(project: &Project, outcome: &Outcome, command: &str) {
    outcome.nothing_lost();
    let (results, manifest) = (project.artifact("run_results.json"), project.artifact("manifest.json"));
    let metadata = &results["metadata"];
    say(&format!(
        "dbt {command}: dbt-core {}, {} results, {} spans, {:.0} s",
        metadata["dbt_version"],
        results["results"].as_array().map_or(0, Vec::len),
        outcome.spans.len(),
        outcome.finished.took.as_secs_f64()
    ));
    let mut wrong = Vec::new();

    let commands: Vec<_> = outcome.with("dbt.command").collect();
    let [root] = commands[..] else { panic!("one span of a dbt command was expected: {commands:?}\n{outcome}") };
    let failed = outcome.finished.code() != 0;
    let target = results["args"]["target"].as_str().unwrap_or("dev");
    for (attribute, value) in [
        ("dbt.command", command),
        ("dbt.target", target),
        ("dbt.project_name", "jaffle"),
        ("dbt.invocation_id", metadata["invocation_id"].as_str().expect("dbt writes it")),
    ] {
        if root.text(attribute) != Some(value) {
            wrong.push(format!("{attribute} of the command is {:?}, not {value}", root.get(attribute)));
        }
    }
    if root.name != format!("dbt.{command}") || root.parent.is_some() {
        wrong.push(format!("the command is `{}` with the parent {:?}", root.name, root.parent));
    }
    if matches!(root.status, Status::Error(_)) != failed {
        wrong.push(format!("the status of the command is {:?}", root.status));
    }

    let mut spans: BTreeMap<&str, Vec<&Span>> = BTreeMap::new();
    for span in outcome.with("dbt.model_name") {
        spans.entry(span.text("dbt.unique_id").unwrap_or_default()).or_default().push(span);
    }
    for result in results["results"].as_array().expect("dbt writes results") {
        let id = result["unique_id"].as_str().expect("dbt writes ids");
        match spans.remove(id).unwrap_or_default()[..] {
            [span] => node(span, root, result, &manifest, &mut wrong),
            ref other => wrong.push(format!("{id}: {} spans", other.len())),
        }
    }
    // dbt 1.8 runs hooks, but does not list them in its results.
    let lists_hooks = metadata["dbt_version"].as_str().is_none_or(|version| !version.starts_with("1.8."));
    for (id, extra) in spans {
        if !lists_hooks && id.starts_with("operation.") && extra.len() == 1 {
            continue;
        }
        wrong.push(format!("{id}: {} spans, but dbt has no result: {:?}", extra.len(), extra[0]));
    }
    assert!(wrong.is_empty(), "the spans are not dbt's results:\n  {}\n{outcome}", wrong.join("\n  "));
}

/// Compares one span with dbt's result and with the node in its manifest.
fn node(span: &Span, root: &Span, result: &Value, manifest: &Value, wrong: &mut Vec<String>) {
    let id = result["unique_id"].as_str().unwrap_or_default();
    let node = ["nodes", "unit_tests"].iter().map(|group| &manifest[group][id]).find(|node| node.is_object());
    let none = Value::Null;
    let node = node.unwrap_or(&none);
    let hook = id.starts_with("operation.");
    let unit_test = id.starts_with("unit_test.");
    let mut compare = |attribute: &str, expected: &Value| {
        if !expected.is_null() && span.get(attribute) != Some(expected) {
            wrong.push(format!("{id}: {attribute} is {:?}, not {expected}", span.get(attribute)));
        }
    };
    compare("dbt.status", &result["status"]);
    compare("dbt.model_name", &node["name"]);
    compare("dbt.resource_type", &node["resource_type"]);
    compare("dbt.relative_path", &node["original_file_path"]);
    if !hook {
        compare("dbt.execution_time", &number(&result["execution_time"]));
        compare("dbt.thread", &result["thread_id"]);
        compare("dbt.rows_affected", &result["adapter_response"]["rows_affected"]);
        compare("dbt.failures", &result["failures"]);
    }
    if !hook && !unit_test {
        compare("dbt.materialized", &node["config"]["materialized"]);
        compare("dbt.database", &node["database"]);
        compare("dbt.schema", &node["schema"]);
        compare("dbt.identifier", &node["alias"]);
    }
    // dbt words the message of a hook itself, after the call that is traced.
    if let Some(message) = result["message"].as_str()
        && !hook
        && span.get("floe.truncated").is_none()
    {
        compare("dbt.message", &message.into());
    }

    let status = result["status"].as_str().unwrap_or_default();
    let failed = ["error", "fail", "runtime error"].contains(&status);
    if matches!(span.status, Status::Error(_)) != failed {
        wrong.push(format!("{id}: the status of the span is {:?}, dbt's is {status}", span.status));
    }
    if span.parent.as_deref() != Some(&root.id) || span.trace != root.trace {
        wrong.push(format!("{id}: its parent is {:?}, not the command", span.parent));
    }
    if span.start < root.start || span.end > root.end {
        wrong.push(format!("{id}: it is not within the command"));
    }
    let expected_name = format!(
        "dbt.{}.{}",
        node["resource_type"].as_str().unwrap_or_default(),
        node["name"].as_str().unwrap_or_default()
    );
    if span.name != expected_name {
        wrong.push(format!("{id}: its span is `{}`, not `{expected_name}`", span.name));
    }
    let took = (span.end - span.start) as f64 / 1e9;
    let said = result["execution_time"].as_f64().unwrap_or_default();
    if (took - said).abs() > f64::max(0.002, said * 0.05) {
        wrong.push(format!("{id}: its span took {took:.6} s, dbt says {said:.6} s"));
    }
}

/// dbt writes the execution time of what it skips as 0, an int.
fn number(value: &Value) -> Value {
    if value.as_f64() == Some(0.0) { Value::Null } else { value.clone() }
}
