//! `cargo xtask test`: unit tests, and the end-to-end tests on real interpreters and real pipelines.
//!
//! What the end-to-end tests get to know, as environment variables:
//!
//! * `FLOE_AGENT_BIN`: the agent;
//! * `FLOE_TEST_INTERPRETERS`: the interpreters, separated by colons;
//! * `FLOE_TEST_PYTHON_<NAME>` for each file of `tests/fixtures/requirements` (`dbt-1.10.txt`: `DBT_1_10`): the folder of
//!   programs of its environment, or several, separated by colons, if the file asks for every interpreter;
//! * `FLOE_TEST_PYTHON_DBT`: the environment that the demo uses too;
//! * `FLOE_TEST_JAEGER`, `FLOE_TEST_COLLECTOR`: these programs, or `FLOE_NO_JAEGER`: why they are not there;
//! * `FLOE_REQUIRE_BPF=1`, `FLOE_REQUIRE_JAEGER=1`, `FLOE_REQUIRE_BROWSER=1`: where BPF is not possible, or Jaeger or
//!   Chromium is not there, fail; otherwise skip.
//!
//! A test that cannot run says `SKIPPED: <name>: <reason>`, past the test harness, which would swallow it.

use std::collections::BTreeSet;
use std::env;
use std::io::{BufRead as _, BufReader, Read};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::thread;

use anyhow::{Result, bail};
use clap::Args;

use crate::progress::Progress;
use crate::python::{self, Interpreter, Spec};
use crate::setup::{self, Installer, cargo, in_path};
use crate::{agent, demo, jaeger, workspace};

/// Debian's debug build of CPython.
const DEBUG_PYTHON: &str = "/usr/bin/python3.11-dbg";

#[derive(Args, Default)]
pub struct Options {
    /// Run only the tests with this in their name
    pub filter: Option<String>,
    /// Let tests fail that would be skipped because BPF is not possible
    #[arg(long, env = "FLOE_REQUIRE_BPF", value_parser = clap::builder::FalseyValueParser::new())]
    pub require_bpf: bool,
    /// Fail if Jaeger cannot be built
    #[arg(long, env = "FLOE_REQUIRE_JAEGER", value_parser = clap::builder::FalseyValueParser::new())]
    pub require_jaeger: bool,
    /// Install Chromium if it is not there, and fail if it cannot be had
    #[arg(long, env = "FLOE_REQUIRE_BROWSER", value_parser = clap::builder::FalseyValueParser::new())]
    pub require_browser: bool,
}

/// Runs the tests.
pub fn run(progress: &Progress, options: &Options) -> Result<()> {
    eprintln!("Setting up");
    setup::ensure(progress)?;
    if !Path::new(DEBUG_PYTHON).exists() {
        // The only debug build that can be had: the agent must refuse it.
        Installer::new(progress, false).apt_if_offered("python3.11-dbg")?;
    }
    let interpreters = python::interpreters();
    let mut variables =
        vec![("FLOE_TEST_INTERPRETERS".to_owned(), list(interpreters.iter().map(|found| &*found.path))?)];
    for spec in Spec::all(workspace())? {
        let environments = python::environments(progress, &spec)?;
        let folders = list(environments.iter().map(|environment| &*environment.bin))?;
        if spec.name == demo::REQUIREMENTS {
            variables.push(("FLOE_TEST_PYTHON_DBT".to_owned(), folders.clone()));
        }
        variables.push((variable(&spec.name), folders));
    }
    if options.require_browser {
        progress.exclusively(|| browser(progress))?;
    }
    let backends = jaeger::variables(progress, options.filter.is_none(), options.require_jaeger)?;
    let agent = agent::build(progress)?;

    let mut test = cargo();
    test.args(["test", "--workspace", "--no-fail-fast"]);
    let mut build = cargo();
    build.args(["test", "--workspace", "--no-run"]);
    progress.cargo("tests, build", &mut build)?;

    test.env("FLOE_AGENT_BIN", agent).envs(variables).envs(backends);
    for (required, variable) in [
        (options.require_bpf, "FLOE_REQUIRE_BPF"),
        (options.require_jaeger, "FLOE_REQUIRE_JAEGER"),
        (options.require_browser, "FLOE_REQUIRE_BROWSER"),
    ] {
        if required {
            test.env(variable, "1");
        }
    }
    test.args(options.filter.as_ref());
    eprintln!("\nTesting");
    let tally = stream(&mut test)?;
    report(&interpreters, &tally);
    if tally.failed > 0 {
        bail!("{} tests failed", tally.failed);
    }
    if !tally.complete {
        bail!("cargo test failed");
    }
    Ok(())
}

/// Makes sure that there is a browser that tests can drive.
fn browser(progress: &Progress) -> Result<()> {
    if in_path("chromium").is_some() && in_path("chromedriver").is_some() {
        progress.ready("browser", "chromium and chromedriver");
        return Ok(());
    }
    Installer::new(progress, false).apt(&["chromium", "chromium-driver"])
}

fn list<'a>(paths: impl Iterator<Item = &'a std::path::Path>) -> Result<String> {
    Ok(env::join_paths(paths)?.to_string_lossy().into_owned())
}

/// The environment variable for a requirements file.
fn variable(name: &str) -> String {
    let name: String =
        name.chars().map(|c| if c.is_ascii_alphanumeric() { c.to_ascii_uppercase() } else { '_' }).collect();
    format!("FLOE_TEST_PYTHON_{name}")
}

/// What the lines of `cargo test` add up to.
#[derive(Default)]
struct Tally {
    passed: u64,
    failed: u64,
    ignored: u64,
    /// Tests that said that they were skipped, which the harness counts as passed.
    skipped: BTreeSet<String>,
    /// The lines that they said it with.
    reasons: Vec<String>,
    /// The test program that runs.
    program: String,
    /// How long each test program took, in seconds.
    times: Vec<(String, f64)>,
    /// `cargo test` succeeded.
    complete: bool,
}

impl Tally {
    /// Takes in a line and says whether to show it.
    fn line(&mut self, line: &str) -> bool {
        if let Some(result) = line.strip_prefix("test result: ") {
            let counts: Vec<u64> = ["passed", "failed", "ignored"].iter().map(|what| count(result, what)).collect();
            self.passed += counts[0];
            self.failed += counts[1];
            self.ignored += counts[2];
            let seconds = result.rsplit("finished in ").next().and_then(|time| time.strip_suffix('s')?.parse().ok());
            self.times.extend(seconds.map(|seconds| (self.program.clone(), seconds)));
            return counts.iter().any(|count| *count > 0);
        }
        if let Some(at) = line.find("SKIPPED: ") {
            let line = &line[at..];
            self.skipped.insert(line.split(": ").nth(1).unwrap_or_default().to_owned());
            self.reasons.push(line.to_owned());
            return true;
        }
        let line = line.trim();
        if let Some(program) = line.strip_prefix("Running ").and_then(|rest| rest.rsplit_once("deps/")) {
            let name = program.1.trim_end_matches(')');
            name.rsplit_once('-').map_or(name, |(name, _hash)| name).clone_into(&mut self.program);
        }
        let noise = ["running 0 tests", "Finished ", "Running ", "Doc-tests "];
        !line.is_empty() && !noise.iter().any(|noise| line.starts_with(noise))
    }
}

/// `3` of `ok. 3 passed; 0 failed; …`.
fn count(result: &str, what: &str) -> u64 {
    let part = result.split([';', '.']).map(str::trim).find_map(|part| part.strip_suffix(what));
    part.and_then(|number| number.trim().parse().ok()).unwrap_or(0)
}

/// Runs the tests, shows what they print, and counts.
fn stream(test: &mut Command) -> Result<Tally> {
    let mut child = test.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    let (stdout, stderr) = (child.stdout.take().expect("piped"), child.stderr.take().expect("piped"));
    let tally = Mutex::new(Tally::default());
    thread::scope(|scope| {
        scope.spawn(|| relay(stdout, &tally));
        scope.spawn(|| relay(stderr, &tally));
    });
    let mut tally = tally.into_inner().expect("no thread panicked");
    tally.complete = child.wait()?.success();
    Ok(tally)
}

fn relay(output: impl Read, tally: &Mutex<Tally>) {
    let mut lines = BufReader::new(output).split(b'\n');
    while let Some(Ok(line)) = lines.next() {
        let line = String::from_utf8_lossy(&line);
        if tally.lock().expect("no thread panicked").line(&line) {
            println!("{line}");
        }
    }
}

fn report(interpreters: &[Interpreter], tally: &Tally) {
    println!("\nInterpreters:");
    for interpreter in interpreters {
        println!("  {interpreter}");
    }
    if !tally.reasons.is_empty() {
        println!("\nSkipped:");
        for reason in &tally.reasons {
            println!("  {}", &reason["SKIPPED: ".len()..]);
        }
    }
    let mut times: Vec<_> = tally.times.iter().filter(|(_, seconds)| *seconds >= 1.0).collect();
    times.sort_by(|a, b| b.1.total_cmp(&a.1));
    println!("\nTest programs that took a second or more:");
    for (program, seconds) in times {
        println!("  {seconds:7.1} s  {program}");
    }
    let skipped = tally.skipped.len() as u64;
    let passed = tally.passed.saturating_sub(skipped);
    println!("\n{passed} passed, {} failed, {} skipped", tally.failed, skipped + tally.ignored);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_of_all_test_programs_are_added_up() {
        let mut tally = Tally::default();
        assert!(
            tally.line("test result: ok. 12 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.1s")
        );
        assert!(
            tally.line(
                "test result: FAILED. 3 passed; 2 failed; 0 ignored; 0 measured; 4 filtered out; finished in 0.1s"
            )
        );
        assert!(
            !tally.line("test result: ok. 0 passed; 0 failed; 0 ignored; 0 measured; 9 filtered out; finished in 0.0s")
        );
        assert_eq!((tally.passed, tally.failed, tally.ignored), (15, 2, 1));
        assert!(!tally.line("     Running tests/dbt.rs (target/debug/deps/dbt-0a1b)"));
        assert!(
            tally
                .line("test result: ok. 1 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; finished in 12.50s")
        );
        assert_eq!(tally.times.last(), Some(&("dbt".to_owned(), 12.5)));
    }

    #[test]
    fn skips_are_seen_wherever_they_stand_in_the_line() {
        let mut tally = Tally::default();
        assert!(tally.line("test matrix ... SKIPPED: matrix: no privileges: CAP_BPF is missing"));
        assert!(tally.line("SKIPPED: matrix: there is no CPython 3.14"));
        assert_eq!(tally.skipped.into_iter().collect::<Vec<_>>(), ["matrix"]);
        assert_eq!(tally.reasons[0], "SKIPPED: matrix: no privileges: CAP_BPF is missing");
    }

    #[test]
    fn a_requirements_file_names_its_variable() {
        assert_eq!(variable("dbt-1.10"), "FLOE_TEST_PYTHON_DBT_1_10");
    }
}
