//! `cargo xtask ci`: everything that must hold for a change to be merged.

use std::process::Command;
use std::time::Instant;

use anyhow::{Result, bail};

use crate::progress::Progress;
use crate::setup::{self, cargo, in_path};
use crate::{deploy, jaeger, python, test};

/// Interpreters that the tests must have run on.
const MIN_INTERPRETERS: usize = 2;

/// Runs all of it and prints how long each part took.
pub fn run(progress: &Progress) -> Result<()> {
    let mut times = Vec::new();
    let begun = Instant::now();
    let result = parts(progress, &mut times);
    eprintln!("\nTimes:");
    for (name, seconds) in times {
        eprintln!("  {seconds:7.1} s  {name}");
    }
    eprintln!("  {:7.1} s  in all", begun.elapsed().as_secs_f64());
    result
}

fn parts(progress: &Progress, times: &mut Vec<(&'static str, f64)>) -> Result<()> {
    let mut timed = |name: &'static str, part: &dyn Fn() -> Result<()>| {
        let begun = Instant::now();
        let result = part();
        times.push((name, begun.elapsed().as_secs_f64()));
        result
    };
    eprintln!("Checking");
    timed("set-up", &|| {
        let found = python::interpreters().len();
        if found < MIN_INTERPRETERS {
            bail!(
                "{found} supported Python interpreters found, and the tests need {MIN_INTERPRETERS}: 3.8 to 3.14, in ~/.pyenv/versions, /usr/bin or PATH"
            );
        }
        components(progress)?;
        setup::ensure(progress)
    })?;
    timed("format", &|| progress.cargo("format", cargo().args(["fmt", "--all", "--check"])))?;
    timed("lints", &|| {
        let lints = ["clippy", "--workspace", "--all-targets", "--", "--deny", "warnings"];
        progress.cargo("lints", cargo().args(lints))
    })?;
    timed("documentation", &|| {
        let mut doc = cargo();
        doc.args(["doc", "--workspace", "--no-deps", "--document-private-items"]).env("RUSTDOCFLAGS", "-Dwarnings");
        progress.cargo("documentation", &mut doc)
    })?;
    timed("deployment", &|| deploy::run(progress, &deploy::Options::default()))?;
    timed("Jaeger and Collector", &|| jaeger::variables(progress, true, true).map(drop))?;
    timed("tests", &|| {
        let all = test::Options { filter: None, require_bpf: true, require_jaeger: true, require_browser: true };
        test::run(progress, &all)
    })
}

/// Makes sure that rustfmt and clippy are there; a minimal rustup profile leaves them out.
fn components(progress: &Progress) -> Result<()> {
    let works = |tool: &str| cargo().args([tool, "--version"]).output().is_ok_and(|output| output.status.success());
    if works("fmt") && works("clippy") {
        return Ok(());
    }
    if in_path("rustup").is_none() {
        bail!("rustfmt and clippy are missing, and there is no rustup to install them with");
    }
    progress.run("rustfmt and clippy", Command::new("rustup").args(["component", "add", "rustfmt", "clippy"]))
}
