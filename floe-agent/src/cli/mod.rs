//! The command line.
//!
//! `exec`, `attach` and `run` differ only in which processes they select and when they end; all are a `session::Session`.

mod attach;
mod config;
mod doctor;
mod exec;
mod probes;
mod progress;
mod report;
mod run;
mod session;

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Traces Python data pipelines from the outside.
///
/// Watches functions of dbt (and any that you name) in running interpreters with eBPF uprobes and turns their calls into
/// OpenTelemetry spans. Nothing in the traced program changes: no code, no environment variable, no restart.
#[derive(Debug, Parser)]
#[command(name = "floe-agent", version, max_term_width = 100)]
#[command(
    after_help = "Needs root, or CAP_SYS_ADMIN, CAP_SYS_PTRACE and CAP_DAC_READ_SEARCH; Linux 6.0 or later on x86-64."
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
    /// Say more on stderr; twice: everything. `RUST_LOG` sets it in detail.
    #[arg(short, long, action = clap::ArgAction::Count, global = true)]
    verbose: u8,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run a command and trace it and its descendants; the exit code is the command's.
    Exec {
        #[command(flatten)]
        options: TraceOptions,
        /// The command and its arguments.
        #[arg(last = true, required = true, value_name = "COMMAND")]
        command: Vec<std::ffi::OsString>,
    },
    /// List, show and check probes.
    #[command(subcommand)]
    Probes(probes::ProbesCommand),
    /// Trace a running process and its descendants until it ends or Ctrl-C is pressed.
    Attach {
        #[command(flatten)]
        options: TraceOptions,
        /// The process.
        #[arg(value_name = "PID")]
        pid: u32,
    },
    /// Check, show or describe the configuration.
    #[command(subcommand)]
    Config(config::ConfigCommand),
    /// Draw the spans of `--output FILE.jsonl` as one HTML page that needs no network; no privileges are needed.
    Report {
        /// Files of OTLP/JSON lines; `-` is standard input.
        #[arg(required = true, value_name = "FILE.jsonl")]
        files: Vec<PathBuf>,
        /// The page; `-` is standard output.
        #[arg(short, long, value_name = "FILE.html")]
        output: PathBuf,
    },
    /// Trace the pipelines of this machine, those that run and those that start, until SIGTERM or Ctrl-C.
    Run {
        #[command(flatten)]
        options: TraceOptions,
        #[command(flatten)]
        node: run::RunOptions,
    },
    /// Say whether tracing works on this machine, and for each Python whether it can be traced; with the fix for each problem.
    ///
    /// Exit code 0: tracing works; 1: it does not.
    Doctor {
        #[command(flatten)]
        options: doctor::DoctorOptions,
    },
}

/// Where to write, and what to trace.
#[derive(Args, Debug)]
struct TraceOptions {
    /// Where finished spans go: `console` (a tree on stderr; `console=all` with a line for each span) or a file name ending in `.jsonl` (OTLP/JSON, one export
    /// request a line). May be given several times. Default: `console`, if no `--otlp` is given.
    #[arg(short, long, value_name = "console|FILE.jsonl")]
    output: Vec<String>,
    /// Send spans to this OTLP endpoint, for example `http://localhost:4317`. Without it,
    /// `OTEL_EXPORTER_OTLP_TRACES_ENDPOINT`, `OTEL_EXPORTER_OTLP_ENDPOINT` and the configuration file count.
    #[arg(long, value_name = "ENDPOINT")]
    otlp: Option<String>,
    /// Watch this function as well: `package.module:Class.method`, or with attributes
    /// `package.module:function(user=arg0.name, rows=len(return))`. May be given several times.
    #[arg(short, long, value_name = "SPEC")]
    probe: Vec<String>,
    /// Read probes from this pack as well; a pack with the name of a built-in one replaces it.
    #[arg(long, value_name = "FILE.yaml")]
    pack: Vec<PathBuf>,
    /// Leave the built-in packs out: watch only what `--probe` and `--pack` name.
    #[arg(long)]
    no_packs: bool,
    /// CPython 3.11 only: leave the inlining of calls on. Calls from Python to Python are then not seen.
    #[arg(long)]
    keep_inlining: bool,
    /// Write the agent's own counters and its verdict on each process to this file, as JSON, at the end.
    #[arg(long, value_name = "FILE.json")]
    stats: Option<PathBuf>,
    #[command(flatten)]
    config: config::ConfigOptions,
}

/// Exit code for bad input and for what cannot be done.
const BAD_INPUT: u8 = 2;

/// Runs the program; gives its exit code.
pub fn main() -> u8 {
    if std::env::args_os().nth(1).is_some_and(|argument| argument == crate::kernel::trial::ARGUMENT) {
        crate::kernel::trial::child();
    }
    let mut arguments = std::env::args().skip(1);
    if arguments.next().is_some_and(|argument| argument == crate::kernel::nop5::ARGUMENT) {
        let (path, offset) = (arguments.next().unwrap_or_default(), arguments.next().unwrap_or_default());
        crate::kernel::nop5::child(&path, offset.parse().unwrap_or_default());
    }
    let cli = Cli::parse();
    start_log(cli.verbose);
    if !matches!(cli.command, Command::Exec { .. } | Command::Attach { .. } | Command::Run { .. }) {
        end_with_the_reader();
    }
    let result = match cli.command {
        Command::Exec { options, command } => exec::run(&options, &command),
        Command::Attach { options, pid } => attach::run(&options, pid),
        Command::Config(command) => config::run(command),
        Command::Probes(command) => probes::run(&command),
        Command::Report { files, output } => report::run(&files, &output),
        Command::Doctor { options } => doctor::run(&options),
        Command::Run { options, node } => run::run(&options, &node),
    };
    result.unwrap_or_else(|error| {
        eprintln!("floe-agent: {}", described(&error));
        BAD_INPUT
    })
}

/// What only prints ends quietly when nobody reads on, as behind `| head`.
fn end_with_the_reader() {
    // SAFETY: the default action, and no other thread is there yet.
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_DFL) };
}

/// Lets the agent have as many open files as it may: each probe is one. Not where it starts a command, which would inherit that.
fn raise_file_limit() {
    let limit = getrlimit(Resource::Nofile);
    let _ = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum });
}

/// An error and its causes, without those that it names itself.
fn described(error: &anyhow::Error) -> String {
    let mut text = error.to_string();
    for cause in error.chain().skip(1).map(ToString::to_string) {
        if !text.contains(&cause) {
            text += ": ";
            text += &cause;
        }
    }
    text
}

fn start_log(verbose: u8) {
    let level = ["FLOE_LOG_LEVEL", "OTEL_LOG_LEVEL"].iter().find_map(|name| std::env::var(name).ok());
    let level = level.unwrap_or_default().to_lowercase();
    let default = match (verbose, level.as_str()) {
        (0, "error") => "error",
        (1, _) | (0, "info") => "floe_agent=info,warn",
        (2.., _) | (0, "debug" | "trace") => "floe_agent=debug,info",
        (0, _) => "floe_agent=warn,error",
    };
    let filter = tracing_subscriber::EnvFilter::try_from_default_env()
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new(default));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_target(false)
        .without_time()
        .init();
}

#[cfg(test)]
mod tests {
    use anyhow::Context as _;

    use super::*;
    use crate::export::{Output, Pipeline, QueueBounds, RedactionRules};

    #[test]
    fn an_error_says_each_cause_once() {
        let outputs = [Output::File("/proc/no.jsonl".into())];
        let error = Pipeline::start(&outputs, QueueBounds::default(), RedactionRules::default()).unwrap_err();
        let cause = "cannot write traces to /proc/no.jsonl: No such file or directory (os error 2)";
        assert_eq!(described(&anyhow::Error::from(error)), cause);
        let other = Err::<(), _>(std::io::Error::other("the cause")).context("outside").unwrap_err();
        assert_eq!(described(&other), "outside: the cause");
    }
}
