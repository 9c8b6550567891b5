//! Every attribute of the packs: where its source is there, and where it is missing.
//!
//! That the places are those of the real packages is what the tests of the packages show; here stand-ins have the same
//! functions, with each place missing in turn.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use floe_tests::dbt::environment;
use floe_tests::{Agent, Outcome, Run, can_trace, for_each, interpreters, program, say};
use serde_json::{Map, Value};
use tempfile::TempDir;

/// What a span has besides what is captured.
const ADDED: [&str; 6] = [
    "code.function.name",
    "thread.id",
    "error.type",
    "floe.truncated",
    "floe.trace.incomplete",
    "floe.trace.lost_events",
];

/// What is there in each call: values that stand in for a missing source, the case's name, and a type, which everything has.
const ALWAYS: [&str; 8] =
    ["dagster.attempt", "dagster.io_manager", "dbt.phase", "t._hook", "t._node", "t._retry", "t._returned", "t.case"];

/// Attributes that are in no test of a real package, and why.
const ONLY_STAND_INS: [(&str, &str); 3] = [
    ("dbt.query_id", "adapters that need a service in the cloud"),
    ("floe.project_dir", "floe's loader of definitions, whose assets do not work with dagster 1.13"),
    ("iceberg.tables_written", "floe's export needs a catalogue of Iceberg tables"),
];

/// The folder with stand-ins, their pack and their cases.
fn prepared() -> Option<TempDir> {
    let bin = environment()?;
    let folder = tempfile::tempdir().expect("a temporary folder can be made");
    let run = Run::new(bin.join("python")).arg(program("stand_in.py")).arg("prepare").arg(folder.path());
    packs().into_iter().fold(run, Run::arg).run().expect(0);
    Some(folder)
}

fn packs() -> Vec<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../floe-agent/src/catalogue/packs");
    let mut packs: Vec<_> =
        fs::read_dir(folder).expect("it is there").map(|entry| entry.expect("a file").path()).collect();
    packs.sort();
    packs
}

fn json(file: &Path) -> Value {
    serde_json::from_str(&fs::read_to_string(file).expect("the program wrote it")).expect("it is JSON")
}

#[test]
fn an_attribute_whose_source_is_missing_is_absent_and_no_other_suffers() {
    let Some(_alone) = can_trace() else { return };
    let Some(folder) = prepared() else { return };
    let config = folder.path().join("agent.yaml");
    fs::write(&config, "redaction: {sql: raw}\n").expect("the folder is ours");
    for_each(interpreters(), |interpreter| {
        let run = interpreter.program("stand_in.py").arg("run").arg(folder.path());
        let outcome = Agent::new()
            .option("--config")
            .option(&config)
            .option("--pack")
            .option(folder.path().join("pack.yaml"))
            .exec(&run);
        outcome.finished.expect(0);
        outcome.nothing_lost();
        compare(&outcome, json(&folder.path().join("expected.json")).as_object().expect("it has cases"));
    });
}

fn compare(outcome: &Outcome, cases: &Map<String, Value>) {
    let mut wrong = BTreeSet::new();
    let mut met: BTreeMap<&str, usize> = BTreeMap::new();
    for span in outcome.named("stand-in") {
        let case = span.text("t.case").expect("its case");
        *met.entry(case).or_default() += 1;
        let expected = cases[case]["attributes"].as_object().expect("it has attributes");
        let names: BTreeSet<_> = expected.keys().chain(span.attributes.keys()).collect();
        for name in names.into_iter().filter(|name| !ADDED.contains(&name.as_str())) {
            if span.get(name) != expected.get(name) {
                let (is, must) = (span.get(name), expected.get(name));
                wrong.insert(format!("{case}, {}: {name} is {is:?}, must be {must:?}", cases[case]["what"]));
            }
        }
    }
    for case in cases.keys().filter(|case| met.get(case.as_str()) != Some(&1)) {
        wrong.insert(format!("{case}: {:?} spans", met.get(case.as_str())));
    }
    let lines: Vec<_> = wrong.iter().take(40).map(String::as_str).collect();
    assert!(wrong.is_empty(), "{} values are wrong:\n  {}\n{outcome}", wrong.len(), lines.join("\n  "));
    // Nothing else is always there.
    let mut functions: BTreeMap<&str, Vec<&Map<String, Value>>> = BTreeMap::new();
    for case in cases.values() {
        let function = case["function"].as_str().expect("its name");
        functions.entry(function).or_default().push(case["attributes"].as_object().expect("it has attributes"));
    }
    let mut always = BTreeSet::new();
    for (function, cases) in functions {
        let names: BTreeSet<&String> = cases.iter().flat_map(|case| case.keys()).collect();
        always.extend(
            names
                .into_iter()
                .filter(|name| !ALWAYS.contains(&name.as_str()) && cases.iter().all(|case| case.contains_key(*name)))
                .map(|name| format!("{function}: {name}")),
        );
    }
    assert!(always.is_empty(), "no case in which this is missing: {always:?}");
    say(&format!("{} cases", cases.len()));
}

#[test]
fn every_attribute_is_named_in_a_test_of_its_package() {
    let Some(folder) = prepared() else { return };
    let names = json(&folder.path().join("names.json"));
    let sources: String = ["dbt.rs", "dagster.rs", "floe.rs", "runs.rs", "correlation.rs"]
        .map(|file| {
            fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests").join(file)).expect("it is there")
        })
        .concat();
    let names: Vec<&str> = names.as_array().expect("a list").iter().filter_map(Value::as_str).collect();
    let only: Vec<&str> = ONLY_STAND_INS.iter().map(|(name, _)| *name).collect();
    let unnamed: Vec<_> = names.iter().filter(|name| !sources.contains(&format!("\"{name}\""))).copied().collect();
    assert_eq!(unnamed, only, "attributes that no test of a real package names, and those of which that is known");
}
