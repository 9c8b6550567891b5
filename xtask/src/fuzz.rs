//! `cargo xtask fuzz`: what reads foreign input, with input that libFuzzer makes up.
//!
//! `fuzz/` has a target for each kind of input; all they do is in `floe-agent/src/fuzz.rs`, which the unit tests use as well.
//! libFuzzer needs no nightly compiler: the flags below are cargo-fuzz's, without a sanitizer, since what is tested is nearly all
//! safe Rust. Memory that is asked for without bound shows by a limit of the address space.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail, ensure};
use clap::Args;

use crate::progress::Progress;
use crate::setup::{self, cargo, in_path};
use crate::{target, workspace};

/// For all that is linked, but for what runs at build time: hence a `--target`.
const TRIPLE: &str = "x86_64-unknown-linux-gnu";
const FLAGS: [&str; 7] = [
    "--cfg=fuzzing",
    "-Cpasses=sancov-module",
    "-Cllvm-args=-sanitizer-coverage-level=4",
    "-Cllvm-args=-sanitizer-coverage-inline-8bit-counters",
    "-Cllvm-args=-sanitizer-coverage-pc-table",
    "-Cllvm-args=-sanitizer-coverage-trace-compares",
    "-Cllvm-args=-sanitizer-coverage-stack-depth",
];
/// Address space of a target, in bytes.
const MEMORY: u64 = 2 << 30;
/// Longest time for one input, in seconds. Walks over objects are bounded by their steps, and rings of them take seconds.
const LONGEST: u64 = 60;

#[derive(Args)]
pub struct Options {
    /// Run only this target; without, all one after the other
    target: Option<String>,
    /// Time for each target, in seconds
    #[arg(long, default_value_t = 60)]
    seconds: u64,
}

/// Runs the targets.
pub fn run(progress: &Progress, options: &Options) -> Result<()> {
    let crate_folder = workspace().join("fuzz");
    let all = targets(&crate_folder)?;
    if let Some(unknown) = options.target.as_ref().filter(|name| !all.contains(name)) {
        bail!("there is no target {unknown}; there are {}", all.join(", "));
    }
    setup::ensure(progress)?;
    // The same versions as everywhere; cargo adds libFuzzer's.
    fs::copy(workspace().join("Cargo.lock"), crate_folder.join("Cargo.lock")).context("cannot copy Cargo.lock")?;
    let build = target().join("fuzz");
    let mut command = cargo();
    command
        .args(["build", "--release", "--manifest-path", "fuzz/Cargo.toml", "--target", TRIPLE, "--target-dir"])
        .arg(&build)
        .env("CARGO_ENCODED_RUSTFLAGS", FLAGS.join("\x1f"));
    progress.cargo("fuzz targets, build", &mut command)?;
    for name in all.iter().filter(|name| options.target.as_ref().is_none_or(|wanted| wanted == *name)) {
        let corpus = crate_folder.join("corpus").join(name);
        let artifacts = crate_folder.join("artifacts").join(name);
        for folder in [&corpus, &artifacts] {
            fs::create_dir_all(folder).with_context(|| format!("cannot create {}", folder.display()))?;
        }
        let mut seeds = vec![crate_folder.join("seeds").join(name)];
        match name.as_str() {
            "pack" => seeds.push(workspace().join("floe-agent/src/catalogue/packs")),
            "elf" => elf_seeds(progress, &corpus)?,
            _ => {}
        }
        let mut fuzz = Command::new("prlimit");
        fuzz.arg(format!("--as={MEMORY}"))
            .arg(build.join(TRIPLE).join("release").join(name))
            .arg(format!("-max_total_time={}", options.seconds))
            .arg(format!("-timeout={LONGEST}"))
            .arg(format!("-artifact_prefix={}/", artifacts.display()))
            .args(["-print_final_stats=1", "-verbosity=1"])
            .arg(&corpus)
            .args(seeds.iter().filter(|folder| folder.is_dir()));
        progress.run(&format!("fuzz {name}"), &mut fuzz)?;
        let (tried, features) = summary(&progress.last_output())
            .with_context(|| format!("{name}: libFuzzer does not say how many inputs it tried"))?;
        ensure!(tried > 0, "{name}: no input was tried");
        progress.ready(name, &format!("{tried} inputs, {features} features of the code covered, no failure"));
    }
    Ok(())
}

/// Names of the targets.
fn targets(crate_folder: &Path) -> Result<Vec<String>> {
    let folder = crate_folder.join("targets");
    let entries = fs::read_dir(&folder).with_context(|| format!("cannot read {}", folder.display()))?;
    let mut all: Vec<String> = entries
        .flatten()
        .filter_map(|entry| Some(entry.file_name().to_str()?.strip_suffix(".rs")?.to_owned()))
        .collect();
    all.sort();
    Ok(all)
}

/// Files to begin with: a program, and one with all names of an interpreter.
fn elf_seeds(progress: &Progress, corpus: &Path) -> Result<()> {
    fs::copy("/bin/true", corpus.join("true")).context("cannot copy /bin/true")?;
    let compiler = in_path("cc").context("there is no C compiler")?;
    for version in ["0x030a00f0", "0x030c01f0", "0x030d00f0", "0x030e00f0"] {
        let file: PathBuf = corpus.join(format!("lookalike-{version}"));
        let mut compile = Command::new(&compiler);
        compile
            .args(["-O1", "-s", "-rdynamic", "-Wno-builtin-declaration-mismatch", "-DOFFSET=144"])
            .arg(format!("-DVERSION={version}"))
            .arg("-o")
            .arg(&file)
            .arg(workspace().join("tests/programs/lookalike.c"));
        if !file.is_file() {
            progress.run(&format!("a program that looks like CPython, {version}"), &mut compile)?;
        }
    }
    Ok(())
}

/// Inputs tried, and features covered, of libFuzzer's output.
fn summary(output: &str) -> Option<(u64, u64)> {
    let number = |text: &str| text.split_whitespace().next()?.parse().ok();
    let tried = output.lines().find_map(|line| number(line.strip_prefix("stat::number_of_executed_units:")?))?;
    let features = output.lines().rev().find_map(|line| number(line.split_once(" ft: ")?.1))?;
    Some((tried, features))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_summary_is_what_libfuzzer_says_last() {
        let output = "#2\tINITED cov: 10 ft: 11 corp: 1/1b exec/s: 0 rss: 40Mb\n#900\tDONE   cov: 20 ft: 31 corp: 7/1b\n\
                      Done 900 runs in 6 second(s)\nstat::number_of_executed_units: 900\nstat::new_units_added: 7\n";
        assert_eq!(summary(output), Some((900, 31)));
        assert_eq!(summary("INFO: Running with entropic power schedule"), None);
    }

    #[test]
    fn every_target_has_its_file_and_its_entry() {
        let folder = workspace().join("fuzz");
        let manifest = fs::read_to_string(folder.join("Cargo.toml")).unwrap();
        let all = targets(&folder).unwrap();
        assert_eq!(all.len(), manifest.matches("[[bin]]").count());
        for name in all {
            assert!(manifest.contains(&format!("path = \"targets/{name}.rs\"")), "{name}");
            let text = fs::read_to_string(folder.join("targets").join(format!("{name}.rs"))).unwrap();
            assert!(text.contains(&format!("floe_agent::fuzz::{name}(bytes)")), "{text}");
        }
    }
}
