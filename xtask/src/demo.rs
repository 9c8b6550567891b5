//! `cargo xtask demo`: a real `dbt build` under the agent, and the check that no executed node lacks its span.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result, bail};
use serde_json::Value;

use crate::progress::Progress;
use crate::python::{self, Spec};
use crate::{agent, setup, target, workspace};

/// The requirements file of the demo, and the default one of the tests.
pub const REQUIREMENTS: &str = "dbt-1.10";

/// Runs the demo.
pub fn run(progress: &Progress) -> Result<()> {
    eprintln!("Setting up");
    setup::ensure(progress)?;
    let environments = python::environments(progress, &Spec::load(workspace(), REQUIREMENTS)?)?;
    let dbt = environments.first().context("no environment")?.bin.join("dbt");
    let agent = agent::build(progress)?;

    let folder = target().join("demo");
    let project = folder.join("project");
    let spans = folder.join("spans.jsonl");
    if folder.exists() {
        fs::remove_dir_all(&folder).with_context(|| format!("cannot remove {}", folder.display()))?;
    }
    copy_project(&workspace().join("tests/fixtures/dbt"), &project)?;

    eprintln!("\nRunning: floe-agent exec --output console --output {} -- dbt build", shown(&spans));
    eprintln!("     in: {}, a copy of tests/fixtures/dbt\n", shown(&project));
    let status = Command::new(&agent)
        .args(["exec", "--output", "console", "--output"])
        .arg(&spans)
        .arg("--")
        .arg(&dbt)
        .args(["build", "--project-dir", ".", "--profiles-dir", "."])
        .current_dir(&project)
        .status()
        .with_context(|| format!("cannot run {}", agent.display()))?;

    eprintln!();
    let results = project.join("target/run_results.json");
    if !results.exists() {
        bail!("dbt did not run to its end: the agent's exit code is {status}, and there is no {}", shown(&results));
    }
    let executed = executed_nodes(&fs::read_to_string(&results)?).with_context(|| shown(&results))?;
    let spans_text = fs::read_to_string(&spans).with_context(|| format!("the agent wrote no {}", shown(&spans)))?;
    let traced = traced_nodes(&spans_text).with_context(|| shown(&spans))?;
    let verdict = compare(&executed, &traced);
    for complaint in &verdict {
        eprintln!("  {complaint}");
    }
    if !verdict.is_empty() {
        bail!("the trace is not that of the run: {} executed nodes, {} differences", executed.len(), verdict.len());
    }
    if executed.is_empty() {
        bail!("dbt executed no node");
    }
    if !status.success() {
        bail!("every executed node has its span, but `dbt build` ended with {status}");
    }
    eprintln!("OK: each of the {} nodes that dbt executed has its span.", executed.len());
    eprintln!("    spans as OTLP/JSON: {}", shown(&spans));
    Ok(())
}

fn shown(path: &Path) -> String {
    path.strip_prefix(workspace()).unwrap_or(path).display().to_string()
}

/// Copies a dbt project without what dbt leaves behind.
fn copy_project(from: &Path, to: &Path) -> Result<()> {
    const LEFT_BEHIND: &[&str] = &["target", "logs", "dbt_packages", "__pycache__", ".user.yml"];
    fs::create_dir_all(to)?;
    for entry in fs::read_dir(from).with_context(|| format!("cannot read {}", from.display()))? {
        let entry = entry?;
        let name = entry.file_name();
        if LEFT_BEHIND.iter().any(|left| name == *left) || name.to_string_lossy().contains(".duckdb") {
            continue;
        }
        let to = to.join(&name);
        if entry.file_type()?.is_dir() {
            copy_project(&entry.path(), &to)?;
        } else {
            fs::copy(entry.path(), &to)?;
        }
    }
    Ok(())
}

/// Unique ids of the nodes that dbt executed, with their statuses, from `run_results.json`.
fn executed_nodes(run_results: &str) -> Result<BTreeMap<String, String>> {
    let document: Value = serde_json::from_str(run_results)?;
    let results = document["results"].as_array().context("there is no list `results`")?;
    results
        .iter()
        .filter(|result| result["status"] != "skipped")
        .map(|result| {
            let id = result["unique_id"].as_str().context("a result without `unique_id`")?;
            Ok((id.to_owned(), result["status"].as_str().unwrap_or_default().to_owned()))
        })
        .collect()
}

/// How many spans there are for each dbt node, in OTLP/JSON lines.
fn traced_nodes(spans: &str) -> Result<BTreeMap<String, usize>> {
    let mut nodes = BTreeMap::new();
    for (number, line) in spans.lines().enumerate() {
        let request: Value = serde_json::from_str(line).with_context(|| format!("line {}", number + 1))?;
        let list = |value: &Value, name: &str| value[name].as_array().cloned().unwrap_or_default();
        let scopes = list(&request, "resourceSpans").into_iter().flat_map(|resource| list(&resource, "scopeSpans"));
        for span in scopes.flat_map(|scope| list(&scope, "spans")) {
            let attributes = list(&span, "attributes");
            let id = attributes.iter().find(|attribute| attribute["key"] == "dbt.unique_id");
            if let Some(id) = id.and_then(|id| id["value"]["stringValue"].as_str()) {
                *nodes.entry(id.to_owned()).or_default() += 1;
            }
        }
    }
    Ok(nodes)
}

/// What is wrong with the trace, a line for each node.
fn compare(executed: &BTreeMap<String, String>, traced: &BTreeMap<String, usize>) -> Vec<String> {
    executed
        .iter()
        .filter_map(|(id, status)| match traced.get(id) {
            Some(1) => None,
            Some(spans) => Some(format!("{id} ({status}): {spans} spans instead of one")),
            None => Some(format!("{id} ({status}): no span")),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const RESULTS: &str = r#"{"results": [
        {"unique_id": "seed.jaffle.raw", "status": "success"},
        {"unique_id": "model.jaffle.a", "status": "error"},
        {"unique_id": "model.jaffle.b", "status": "skipped"}]}"#;

    fn line(ids: &[&str]) -> String {
        let span = |id: &&str| {
            format!(
                r#"{{"name": "x", "attributes": [{{"key": "dbt.unique_id", "value": {{"stringValue": "{id}"}}}}]}}"#
            )
        };
        let spans: Vec<_> = ids.iter().map(span).collect();
        format!(
            r#"{{"resourceSpans": [{{"scopeSpans": [{{"spans": [{}, {{"name": "dbt build"}}]}}]}}]}}"#,
            spans.join(",")
        )
    }

    #[test]
    fn every_executed_node_needs_one_span() {
        let executed = executed_nodes(RESULTS).unwrap();
        let complete = format!("{}\n{}\n", line(&["seed.jaffle.raw"]), line(&["model.jaffle.a"]));
        assert_eq!(compare(&executed, &traced_nodes(&complete).unwrap()), Vec::<String>::new());
    }

    #[test]
    fn missing_and_doubled_spans_are_named() {
        let executed = executed_nodes(RESULTS).unwrap();
        let traced = traced_nodes(&line(&["seed.jaffle.raw", "seed.jaffle.raw"])).unwrap();
        assert_eq!(
            compare(&executed, &traced),
            ["model.jaffle.a (error): no span", "seed.jaffle.raw (success): 2 spans instead of one"]
        );
    }
}
