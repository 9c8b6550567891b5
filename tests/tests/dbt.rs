//! A real dbt project: the spans are the nodes of dbt's own `run_results.json`.

use std::collections::{BTreeMap, BTreeSet};
use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use floe_tests::dbt::{Project, environment};
use floe_tests::{Agent, Outcome, Span, Status, can_trace, programs, say, skip};
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
    let mut parsed = BTreeSet::new();
    for words in [
        &["seed"][..],
        &["run", "--select", "staging", "--full-refresh"],
        &["test", "--select", "stg_orders", "--target", "ci"],
        &["test", "--select", "stg_payments", "--target", "ci"],
    ] {
        if words.contains(&"stg_payments") {
            let model = project.path().join("models/staging/stg_orders.sql");
            let text = fs::read_to_string(&model).expect("it is in the fixture") + "\n-- changed\n";
            fs::write(model, text).expect("the folder is ours");
        }
        let outcome = Agent::with_packs().limit(Duration::from_mins(3)).exec(&project.dbt(&bin, words));
        outcome.finished.expect(0);
        check(&project, &outcome, words[0]);
        // dbt adds to its log.
        let log = fs::read_to_string(project.path().join("logs/dbt.log")).expect("dbt writes a log");
        let said = log.rsplit("Running with dbt=").next().unwrap_or_default();
        let load = outcome.named("dbt.manifest.load").next().expect("it was loaded");
        // It also says how many files have changed where it then finds that none has.
        let skipped = said.contains("no changes found, skipping parsing");
        let partial = said.contains("Partial parsing enabled: ") && !skipped;
        for (attribute, said) in [("dbt.partial_parse", partial), ("dbt.parse_skipped", skipped)] {
            assert_eq!(load.get(attribute), Some(&Value::from(said)), "{attribute}: {load:?}");
        }
        parsed
            .insert(["dbt.partial_parse", "dbt.parse_skipped"].map(|name| load.get(name) == Some(&Value::Bool(true))));
    }
    assert!(parsed.into_iter().eq([[false, false], [false, true], [true, false]]), "everything, nothing, and a part");
}

#[test]
fn a_failure_that_is_no_nodes_is_the_commands() {
    let Some(_alone) = can_trace() else { return };
    for bin in environment().into_iter().chain(other_environments()) {
        let project = Project::copy();
        let model = project.path().join("models/marts/lost.sql");
        fs::write(model, "select * from {{ ref('nothing') }}\n").expect("the folder is ours");
        let words = ["build", "--log-format-file", "json", "--log-level-file", "debug"];
        let outcome = Agent::with_packs().limit(Duration::from_mins(3)).exec(&project.dbt(&bin, &words));
        outcome.finished.expect(2);
        let [command] = outcome.with("dbt.command").collect::<Vec<_>>()[..] else { panic!("{outcome}") };
        let log = log(&project);
        let said = log.iter().find(|line| line["info"]["name"] == "MainEncounteredError").expect("dbt logs it");
        let (kind, message) = (command.text("dbt.error.type"), command.text("dbt.error.message").expect("a message"));
        assert_eq!((kind, command.int("dbt.exit_code")), (Some("TargetNotFoundError"), Some(2)), "{command:?}");
        // dbt puts a title before it, and indents it.
        let words = |text: &str| text.split_whitespace().collect::<Vec<_>>().join(" ");
        let said = words(said["data"]["exc"].as_str().unwrap_or_default());
        assert!(!message.is_empty() && said.contains(&words(message)), "{message}: {said}");
        assert_eq!(command.status, Status::Error(format!("TargetNotFoundError: {message}")));
        // What is only known when all is loaded is absent.
        assert_eq!((command.get("dbt.adapter_type"), command.get("floe.nodes")), (None, None));
        let manifest = outcome.named("dbt.manifest").next().expect("loading begins");
        assert_eq!(manifest.get("dbt.manifest.nodes"), None);
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
        // It fails while it is compiled, with an exception that is not dbt's.
        let broken = project.path().join("models/marts/broken.sql");
        fs::write(broken, "{% if execute %}\n{{ 1 / 0 }}\n{% endif %}\nselect 1 as id\n").expect("the folder is ours");
        let vars = "{sql_error: true, hook_error: true}";
        let words = ["build", "--log-format-file", "json", "--log-level-file", "debug", "--vars", vars];
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
        stack_traces(&project, &outcome, &mut wrong);
        assert!(wrong.is_empty(), "the spans are not what dbt wrote:\n  {}\n{outcome}", wrong.join("\n  "));
    }
}

#[test]
fn statements_have_the_rows_that_dbt_recorded() {
    let Some(_alone) = can_trace() else { return };
    // dbt-sqlite says how many rows a statement affected, dbt-duckdb does not. dbt 1.8 cannot record.
    for (name, project, says_affected) in [("DBT_1_12", "dbt", false), ("SQLITE", "dbt-sqlite", true)] {
        for bin in programs(name) {
            let (affected, fetched) = rows(&Project::of(project), &bin);
            assert!(fetched > 0 && (affected > 0) == says_affected, "{name}: {affected} affected, {fetched} fetched");
        }
    }
}

/// A statement without dbt's comment, the rows it affected, the rows that were fetched.
type Statement = (String, Option<u64>, Option<u64>);

/// Runs dbt while it records what its adapter executes, and compares. In how many spans there are rows.
fn rows(project: &Project, bin: &Path) -> (usize, usize) {
    let config = project.path().join("agent.yaml");
    fs::write(&config, "redaction: {sql: raw}\n").expect("the folder is ours");
    let recording = [("DBT_RECORDER_MODE", "RECORD"), ("DBT_RECORDER_TYPES", "AdapterExecuteRecord")];
    let run = recording.into_iter().fold(project.dbt(bin, &["build"]), |run, (name, value)| run.variable(name, value));
    let outcome = Agent::with_packs().option("--config").option(&config).limit(Duration::from_mins(3)).exec(&run);
    outcome.finished.expect(0);
    outcome.nothing_lost();
    let text = fs::read_to_string(project.path().join("recording.json")).expect("dbt writes a recording");
    let records: Vec<Value> = serde_json::from_str(&text).expect("it is JSON");
    let begin = |sql: &str| sql.trim().chars().take(400).collect::<String>();
    let said: Vec<Statement> = records
        .iter()
        .map(|record| {
            let (call, result) = (&record["params"], &record["result"]["return_val"]);
            let table = &result["table"];
            let fetched =
                call["fetch"] == true && table["column_names"].as_array().is_some_and(|names| !names.is_empty());
            let rows = table["rows"].as_array().filter(|_| fetched).map(|rows| rows.len() as u64);
            // -1 where the driver does not know.
            let affected = result["adapter_response"]["rows_affected"].as_u64();
            (begin(call["sql"].as_str().unwrap_or_default()), affected, rows)
        })
        .collect();
    let spans = outcome.with("db.query.text").map(|span| {
        let query = span.text("db.query.text").unwrap_or_default();
        let rows = |name: &str| span.get(name).map(|rows| rows.as_u64().expect("a number"));
        let sql = begin(query.split_once("*/").map_or(query, |(_, sql)| sql));
        (sql, rows("dbt.rows_affected"), rows("db.response.returned_rows"))
    });
    // What begins or ends a transaction, or inserts what a seed has, dbt sends without the call that it records.
    let recorded: BTreeSet<&String> = said.iter().map(|(sql, _, _)| sql).collect();
    let mut spans: Vec<Statement> =
        spans.filter(|(sql, _, fetched)| recorded.contains(sql) || fetched.is_some()).collect();
    let recorded = said.len();
    let (affected, fetched) =
        (said.iter().filter(|said| said.1.is_some()).count(), said.iter().filter(|said| said.2.is_some()).count());
    say(&format!("{recorded} statements recorded, {affected} of them with affected rows, {fetched} with fetched ones"));
    let mut wrong = Vec::new();
    for statement in said {
        match spans.iter().position(|span| *span == statement) {
            Some(at) => drop(spans.swap_remove(at)),
            None => wrong.push(format!("no span of {statement:?}")),
        }
    }
    wrong.extend(spans.iter().map(|span| format!("dbt does not record {span:?}")));
    assert!(wrong.is_empty(), "the rows are not what dbt recorded:\n  {}\n{outcome}", wrong.join("\n  "));
    (affected, fetched)
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
        if phases != said {
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

/// dbt's log, as it was told to write it.
fn log(project: &Project) -> Vec<Value> {
    let log = fs::read_to_string(project.path().join("logs/dbt.log")).expect("dbt writes a log");
    log.lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
}

/// The stack traces of nodes that failed, and of the phases in which they did: those that dbt logs, frame by frame.
fn stack_traces(project: &Project, outcome: &Outcome, wrong: &mut Vec<String>) {
    let exception = |span: &Span, name: &str| {
        let event = span.events.iter().find(|event| event.name == "exception");
        event.and_then(|event| event.attributes[name].as_str()).unwrap_or_default().to_owned()
    };
    let stack = |span: &Span| frames(&exception(span, "exception.stacktrace"));
    let log = log(project);
    // An exception that is not dbt's is logged twice: first by its node, then its stack, by the same thread.
    let logged = log.iter().enumerate().filter_map(|(at, line)| {
        let of = |name: &str, line: &Value| line["info"]["name"] == name;
        let line = match () {
            () if of("CatchableExceptionOnRun", line) => line,
            () if of("GenericExceptionOnRun", line) => log[at..]
                .iter()
                .find(|more| of("LogDebugStackTrace", more) && more["info"]["thread"] == line["info"]["thread"])?,
            () => return None,
        };
        Some((log[at]["data"]["node_info"]["unique_id"].as_str()?, line["data"]["exc_info"].as_str()?))
    });
    let mut phases = BTreeSet::new();
    for (node, said) in logged {
        let spans: Vec<_> =
            outcome.with("dbt.model_name").filter(|span| span.text("dbt.unique_id") == Some(node)).collect();
        let [span] = spans[..] else {
            wrong.push(format!("{node}: {} spans", spans.len()));
            continue;
        };
        let said = frames(said);
        if stack(span) != said {
            wrong.push(format!("{node}: its stack is {:#?}, dbt's {said:#?}", stack(span)));
        }
        // The phase is left where its node has caught the exception already.
        let within: Vec<_> = said.iter().filter(|line| !line.ends_with(", in safe_run")).cloned().collect();
        let failed = outcome.with("dbt.phase").filter(|phase| phase.parent.as_deref() == Some(&span.id));
        for phase in failed.filter(|phase| phase.status != Status::Unset) {
            phases.extend(phase.text("dbt.phase"));
            if stack(phase) != within {
                wrong.push(format!("{node}: the stack of its phase is {:#?}, dbt's {within:#?}", stack(phase)));
            }
        }
    }
    if !phases.iter().eq(&["compile", "execute"]) {
        wrong.push(format!("a failure in either phase was expected, not in {phases:?}"));
    }
    // dbt logs no stack of a hook that fails.
    for hook in outcome.with("dbt.status").filter(|span| span.name.starts_with("dbt.operation.")) {
        let execution = outcome.with("dbt.phase").filter(|phase| phase.parent.as_deref() == Some(&hook.id)).last();
        let Some(execution) = execution.filter(|_| hook.text("dbt.status") == Some("error")) else { continue };
        for name in ["exception.type", "exception.message"] {
            if exception(hook, name).is_empty() || exception(hook, name) != exception(execution, name) {
                wrong.push(format!("{}: {name} is {:?}", hook.name, exception(hook, name)));
            }
        }
        let frames = stack(hook);
        if frames.is_empty() || !stack(execution).ends_with(&frames[frames.len() - 3..]) {
            wrong.push(format!("{}: its stack is {frames:#?}, its execution's {:#?}", hook.name, stack(execution)));
        }
    }
}

/// What of a printed stack trace does not need source files or a `__str__`: the frames, and what is between exceptions.
fn frames(stack: &str) -> Vec<String> {
    const BETWEEN: [&str; 3] =
        ["Traceback (most recent call last):", "The above exception was ", "During handling of the above exception, "];
    let is_frame = |line: &&str| line.starts_with("  File \"") || BETWEEN.iter().any(|begin| line.starts_with(begin));
    stack.lines().filter(is_frame).map(str::to_owned).collect()
}

/// Every statement that dbt logs, and no other.
fn statements(project: &Project, outcome: &Outcome, wrong: &mut Vec<String>) {
    let log = log(project).into_iter();
    // Of a statement with data, dbt logs the first 512 characters and dots.
    let mut said: Vec<(String, String)> = log
        .filter(|line| line["info"]["name"] == "SQLQuery")
        .map(|line| {
            let text = |name: &str| line["data"][name].as_str().unwrap_or_default().to_owned();
            let sql = text("sql");
            let sql = sql.trim();
            (sql.strip_suffix("...").unwrap_or(sql).trim().chars().take(400).collect(), text("conn_name"))
        })
        .collect();
    let model = &project.artifact("manifest.json")["nodes"]["model.jaffle.stg_orders"];
    let namespace =
        format!("{}|{}", model["database"].as_str().unwrap_or_default(), model["schema"].as_str().unwrap_or_default());
    for span in outcome.with("db.query.text") {
        let query = span.text("db.query.text").unwrap_or_default();
        let begin: String = query.trim().chars().take(400).collect();
        // Of a statement that fails the connection is not known.
        let connection = span.text("dbt.connection");
        let is_it = |(sql, name): &(String, String)| *sql == begin && connection.is_none_or(|known| known == name);
        match said.iter().position(is_it) {
            Some(at) => drop(said.swap_remove(at)),
            None => wrong.push(format!("dbt does not log `{begin}` of {connection:?}")),
        }
        if connection.is_none() != matches!(span.status, Status::Error(_)) {
            wrong.push(format!("{begin}: the connection is {connection:?}"));
        }
        if span.text("db.namespace") != Some(&namespace) {
            wrong.push(format!("{begin}: the namespace is {:?}", span.get("db.namespace")));
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
    wrong.extend(said.iter().map(|(statement, name)| format!("no span of `{statement}` of {name}")));
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
        ("dbt.command", Value::from(command)),
        ("dbt.target", Value::from(target)),
        ("dbt.profile", Value::from("jaffle")),
        ("dbt.project_name", Value::from("jaffle")),
        ("dbt.invocation_id", metadata["invocation_id"].clone()),
        ("dbt.adapter_type", manifest["metadata"]["adapter_type"].clone()),
        // As in `profiles.yml`.
        ("dbt.threads", Value::from(if target == "ci" { 1 } else { 4 })),
        // dbt writes what differs from the default.
        ("dbt.full_refresh", results["args"].get("full_refresh").cloned().unwrap_or(Value::Bool(false))),
        ("dbt.exit_code", if failed { Value::from(outcome.finished.code()) } else { Value::Null }),
    ] {
        if root.get(attribute).unwrap_or(&Value::Null) != &value {
            wrong.push(format!("{attribute} of the command is {:?}, not {value}", root.get(attribute)));
        }
    }
    let loaded = outcome.with("dbt.manifest.nodes").filter_map(|span| span.int("dbt.manifest.nodes"));
    let nodes = manifest["nodes"].as_object().map_or(0, serde_json::Map::len) as i64;
    if !loaded.eq([nodes]) {
        wrong.push(format!("{nodes} nodes are in the manifest"));
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
