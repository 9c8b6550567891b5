//! Tasks of the repository: `cargo xtask --help`.

mod agent;
mod bench;
mod ci;
mod demo;
mod deploy;
mod ebpf_toolchain;
mod fuzz;
mod jaeger;
mod progress;
mod python;
mod setup;
mod test;

use std::env;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::LazyLock;

use clap::{Parser, Subcommand};

use progress::Progress;

/// Set-up, build, demo and tests of floe-agent
#[derive(Parser)]
#[command(bin_name = "cargo xtask")]
struct Arguments {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Trace a real `dbt build` and check that every executed node has its span
    Demo,
    /// Run the whole test suite
    Test(test::Options),
    /// Install what the build needs: a rustc for eBPF, LLVM and bpf-linker
    Setup(setup::Options),
    /// What continuous integration runs: format, lints, documentation, and the tests with none skipped for want of BPF
    Ci,
    /// Render and check the chart, compare the plain manifests with it, check the scripts
    Deploy(deploy::Options),
    /// Let libFuzzer make up input for what reads foreign input
    Fuzz(fuzz::Options),
    /// Measure what tracing costs, as ratios within one run
    Bench(bench::Options),
    /// Build Jaeger and run it until Ctrl-C: a backend for traces, without its web pages
    Jaeger(jaeger::Options),
    /// Make a Python environment of `tests/fixtures/requirements`, and print its folder of programs
    Python {
        /// Name of the requirements file, without `.txt`
        name: String,
    },
}

fn main() -> ExitCode {
    match run(Arguments::parse().task) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("\nerror: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(task: Task) -> anyhow::Result<()> {
    let progress = Progress::new(workspace())?;
    match task {
        Task::Demo => demo::run(&progress),
        Task::Deploy(options) => deploy::run(&progress, &options),
        Task::Fuzz(options) => fuzz::run(&progress, &options),
        Task::Test(options) => test::run(&progress, &options),
        Task::Setup(options) => setup::run(&progress, options),
        Task::Bench(options) => bench::run(&progress, options),
        Task::Jaeger(options) => jaeger::run(&progress, &options),
        Task::Ci => ci::run(&progress),
        Task::Python { name } => {
            for environment in python::environments(&progress, &python::Spec::load(workspace(), &name)?)? {
                println!("{}", environment.bin.display());
            }
            Ok(())
        }
    }
}

/// The root of the repository: what `cargo run` says, since checkouts that share a `CARGO_TARGET_DIR` share this program.
fn workspace() -> &'static Path {
    static WORKSPACE: LazyLock<PathBuf> = LazyLock::new(|| {
        let package = env::var_os("CARGO_MANIFEST_DIR").unwrap_or_else(|| env!("CARGO_MANIFEST_DIR").into());
        Path::new(&package).parent().expect("the package is in a workspace").to_owned()
    });
    &WORKSPACE
}

/// Where tools, Python environments and results are kept; it does not depend on `CARGO_TARGET_DIR`.
fn target() -> PathBuf {
    workspace().join("target")
}
