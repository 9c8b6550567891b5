//! `cargo xtask bench`: what tracing costs, as ratios within one run.
//!
//! Every figure is a median over pairs, with the range: the machine may be shared and noisy. docs/performance.md holds the
//! results and says how to read them.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, ensure};
use clap::Args;
use serde_json::Value;

use crate::progress::Progress;
use crate::python::{self, Spec};
use crate::setup::cargo;
use crate::{agent, demo, setup, target, workspace};

/// CPython 3.x that are measured, where they are found.
const MINORS: [u8; 3] = [13, 12, 11];

/// Assets of the Dagster fixture; each is a process of its own.
const SELECT: &str = "orders,archive,largest";

#[derive(Args)]
pub struct Options {
    /// Pairs of runs for each figure
    #[arg(long, default_value_t = 7)]
    pairs: usize,
    /// Only this benchmark
    #[arg(long)]
    only: Option<Which>,
    /// Only this version, for example `3.12`
    #[arg(long)]
    python: Option<String>,
    /// Models of the enlarged dbt project
    #[arg(long, default_value_t = 100)]
    models: usize,
}

#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Which {
    /// One call, watched and not
    Calls,
    /// The agent at the highest rate of calls
    Rate,
    /// A whole `dbt build`
    Dbt,
    /// A whole `dagster asset materialize`
    Dagster,
    /// Recorded events through assembly, sampling and OTLP export on one core
    Export,
}

struct Bench {
    agent: PathBuf,
    folder: PathBuf,
    fixtures: PathBuf,
    options: Options,
}

/// Runs the benchmarks.
pub fn run(progress: &Progress, options: Options) -> Result<()> {
    setup::ensure(progress)?;
    if options.only.is_none_or(|only| only == Which::Export) {
        export(progress, options.pairs)?;
        if options.only.is_some() {
            return Ok(());
        }
    }
    let agent = agent::build(progress)?;
    let folder = target().join("bench");
    fs::create_dir_all(&folder)?;
    let bench = Bench { agent, folder, fixtures: workspace().join("tests/fixtures/bench"), options };
    let wants = |which| bench.options.only.is_none_or(|only| only == which);
    let environments = |load: &dyn Fn() -> Result<Spec>| -> Result<Vec<PathBuf>> {
        let mut found = Vec::new();
        for minor in MINORS {
            if bench.options.python.as_ref().is_none_or(|wanted| *wanted == format!("3.{minor}")) {
                let all = python::environments(progress, &load()?.on(minor))?;
                found.extend(all.into_iter().map(|environment| environment.bin));
            }
        }
        Ok(found)
    };
    let calls = || Spec::of_file(workspace().join("tests/fixtures/bench/calls.txt"), "bench-calls");
    let dbt = || Spec::load(workspace(), demo::REQUIREMENTS);
    if wants(Which::Calls) || wants(Which::Rate) {
        for bin in environments(&calls)? {
            println!("\n{}", version(&bin)?);
            if wants(Which::Calls) {
                bench.calls(&bin)?;
            }
            if wants(Which::Rate) {
                bench.rate(&bin)?;
            }
        }
    }
    if wants(Which::Dbt) {
        for bin in environments(&dbt)? {
            println!("\n{}", version(&bin)?);
            bench.dbt(&bin)?;
        }
    }
    if wants(Which::Dagster) {
        for bin in environments(&|| Spec::load(workspace(), "floe"))? {
            println!("\n{}", version(&bin)?);
            bench.dagster(&bin)?;
        }
    }
    Ok(())
}

/// `floe-agent/benches/export.rs`, which pins itself to one core and its collector to another.
fn export(progress: &Progress, rounds: usize) -> Result<()> {
    let mut build = cargo();
    build.args(["bench", "--package", "floe-agent", "--bench", "export", "--no-run"]);
    progress.cargo("export benchmark, build", &mut build)?;
    for _ in 0..rounds.clamp(1, 3) {
        println!("\nexport");
        let status = cargo().args(["bench", "--quiet", "--package", "floe-agent", "--bench", "export"]).status()?;
        ensure!(status.success(), "the export benchmark ended with {status}");
    }
    Ok(())
}

fn version(bin: &Path) -> Result<String> {
    let output = Command::new(bin.join("python")).arg("-V").output()?;
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

impl Bench {
    /// A command under the agent; its counters go to `stats.json`.
    fn traced(&self, probes: &[&str]) -> Command {
        let mut command = Command::new(&self.agent);
        command.arg("exec").arg("--output").arg(self.folder.join("spans.jsonl"));
        command.arg("--stats").arg(self.folder.join("stats.json"));
        if !probes.is_empty() {
            command.arg("--no-packs");
        }
        for probe in probes {
            command.args(["--probe", probe]);
        }
        command.arg("--");
        command
    }

    fn stats(&self) -> Result<Value> {
        Ok(serde_json::from_str(&fs::read_to_string(self.folder.join("stats.json"))?)?)
    }

    fn calls(&self, bin: &Path) -> Result<()> {
        let program = self.fixtures.join("calls.py");
        let line = |mut command: Command| -> Result<Value> {
            let output = command.stderr(Stdio::inherit()).output()?;
            ensure!(output.status.success(), "calls.py ended with {}", output.status);
            Ok(serde_json::from_slice(&output.stdout)?)
        };
        let once_alone = || {
            let mut command = Command::new(bin.join("python"));
            command.arg(&program);
            line(command)
        };
        let once_traced = || {
            let mut command = self.traced(&[
                "bench_target:watched",
                "bench_target:watched_four(a=arg0.customer, b=arg0.product, c=arg0.state, d=arg0.address)",
            ]);
            command.arg(bin.join("python")).arg(&program).arg("--sdk");
            line(command)
        };
        let (mut alone, mut traced) = (vec![], vec![]);
        for pair in 0..self.options.pairs {
            if pair % 2 == 0 {
                alone.push(once_alone()?);
                traced.push(once_traced()?);
            } else {
                traced.push(once_traced()?);
                alone.push(once_alone()?);
            }
        }
        let get = |value: &Value, name: &str| value[name].as_f64().context("calls.py gave no figure");
        let each = |name: &str| traced.iter().map(|line| get(line, name)).collect::<Result<Vec<_>>>();
        let ratio = |over: &str, under: &str| {
            traced.iter().map(|line| Ok(get(line, over)? / get(line, under)?)).collect::<Result<Vec<_>>>()
        };
        let untraced = alone.iter().zip(&traced).map(|(a, t)| Ok(get(t, "unwatched")? / get(a, "unwatched")?));
        print("unwatched function, traced process / untraced", &untraced.collect::<Result<Vec<_>>>()?, "");
        print("watched call, nothing captured", &each("watched")?, "ns");
        print("watched call, four str attributes", &each("watched_four")?, "ns");
        print("SDK span, four str attributes", &each("sdk_four")?, "ns");
        print("SDK span / watched call, four attributes", &ratio("sdk_four", "watched_four")?, "");
        print("watched call, nothing captured, thread's CPU time", &each("watched_cpu")?, "ns");
        print("watched call, four str attributes, thread's CPU time", &each("watched_four_cpu")?, "ns");
        print("SDK span, four str attributes, thread's CPU time", &each("sdk_four_cpu")?, "ns");
        print("SDK span / watched call, thread's CPU time", &ratio("sdk_four_cpu", "watched_four_cpu")?, "");
        Ok(())
    }

    fn rate(&self, bin: &Path) -> Result<()> {
        let calls = 1_000_000;
        let (mut per_second, mut cpu, mut memory, mut lost, mut dropped) = (vec![], vec![], vec![], vec![], vec![]);
        for _ in 0..self.options.pairs {
            let mut command = self.traced(&["bench_target:watched"]);
            command.arg(bin.join("python")).arg(self.fixtures.join("rate.py")).arg(calls.to_string());
            let status = command.stderr(Stdio::null()).status()?;
            ensure!(status.success(), "rate.py ended with {status}");
            let stats = self.stats()?;
            let number = |value: &Value| value.as_f64().unwrap_or(f64::NAN);
            let agent = &stats["agent"];
            let running = number(&agent["cpu_seconds"]) - number(&agent["startup_cpu_seconds"]);
            per_second.push(number(&stats["spans"]) / number(&agent["elapsed_seconds"]));
            cpu.push(running / number(&stats["spans"]) * 1e9);
            memory.push(number(&agent["peak_memory_bytes"]) / 1e6);
            lost.push(number(&stats["counters"]["events_lost"]));
            dropped.push(number(&stats["exports"][0]["dropped"]) / number(&stats["spans"]) * 100.0);
        }
        print("spans a second, one process, start and end included", &per_second, "");
        print("agent's CPU per span, OTLP/JSON file included", &cpu, "ns");
        print("agent's peak memory", &memory, "MB");
        print("events lost", &lost, "");
        print("spans that the file's queue had no room for", &dropped, "%");
        Ok(())
    }

    fn dbt(&self, bin: &Path) -> Result<()> {
        let project = self.folder.join("dbt");
        if project.exists() {
            fs::remove_dir_all(&project)?;
        }
        let status = Command::new(bin.join("python"))
            .arg(workspace().join("tests/fixtures/dbt/enlarge.py"))
            .arg(&project)
            .args(["--models", &self.options.models.to_string()])
            .stdout(Stdio::null())
            .status()?;
        ensure!(status.success(), "enlarge.py ended with {status}");
        self.pairs("dbt build", bin, |command| {
            command.arg(bin.join("dbt")).args(["build", "--project-dir", ".", "--profiles-dir", "."]);
            command.current_dir(&project);
            Ok(())
        })
    }

    fn dagster(&self, bin: &Path) -> Result<()> {
        let home = self.folder.join("dagster");
        let fixture = workspace().join("tests/fixtures/dagster");
        self.pairs("dagster asset materialize", bin, |command| {
            if home.exists() {
                fs::remove_dir_all(&home)?;
            }
            fs::create_dir_all(&home)?;
            fs::copy(fixture.join("dagster.yaml"), home.join("dagster.yaml"))?;
            command.arg(bin.join("dagster")).args(["asset", "materialize", "--select", SELECT, "-f"]);
            command.arg(fixture.join("shop.py")).current_dir(&home);
            command.env("DAGSTER_HOME", &home).env("SHOP_STATE", &home);
            Ok(())
        })
    }

    /// Pairs of runs of a command, traced and alone. `complete` prepares a run and adds the command's words.
    fn pairs(&self, name: &str, bin: &Path, complete: impl Fn(&mut Command) -> Result<()>) -> Result<()> {
        let cpu_file = self.folder.join("cpu.txt");
        let once = |mut command: Command| -> Result<f64> {
            command.arg(bin.join("python")).args(["-S", "-E"]).arg(self.fixtures.join("cpu.py")).arg(&cpu_file);
            complete(&mut command)?;
            let status = command.stderr(Stdio::null()).stdout(Stdio::null()).status()?;
            ensure!(status.success(), "{name} ended with {status}");
            Ok(fs::read_to_string(&cpu_file)?.trim().parse()?)
        };
        once(Command::new("env"))?; // warm caches, parse state
        let (mut ratios, mut noise, mut seconds) = (vec![], vec![], vec![]);
        let (mut startup, mut running, mut spans) = (vec![], vec![], vec![]);
        for pair in 0..self.options.pairs {
            // Which comes first alternates: the machine may grow slower or faster meanwhile.
            let (traced, alone) = if pair % 2 == 0 {
                let traced = once(self.traced(&[]))?;
                (traced, once(Command::new("env"))?)
            } else {
                let alone = once(Command::new("env"))?;
                (once(self.traced(&[]))?, alone)
            };
            let stats = self.stats()?;
            let agent = |name: &str| stats["agent"][name].as_f64().unwrap_or(f64::NAN);
            ratios.push(traced / alone);
            noise.extend(seconds.last().map(|before| alone / before));
            seconds.push(alone);
            startup.push(agent("startup_cpu_seconds"));
            running.push(agent("cpu_seconds") - agent("startup_cpu_seconds"));
            spans.push(stats["spans"].as_f64().unwrap_or(f64::NAN));
        }
        print(&format!("{name}, CPU time traced / untraced"), &ratios, "");
        print("the same of two untraced runs: the noise", &noise, "");
        print(&format!("{name}, CPU time untraced"), &seconds, "s");
        print("agent's CPU time, start-up", &startup, "s");
        print("agent's CPU time, running", &running, "s");
        print("spans", &spans, "");
        Ok(())
    }
}

/// One line: median and range.
fn print(what: &str, values: &[f64], unit: &str) {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let (Some(first), Some(last)) = (sorted.first(), sorted.last()) else { return };
    let median = sorted[sorted.len() / 2];
    let digits = if median.abs() >= 100.0 { 0 } else { 3 };
    println!("  {what:<58} {median:>10.digits$} {unit:<3} ({first:.digits$} to {last:.digits$}, n={})", sorted.len());
}
