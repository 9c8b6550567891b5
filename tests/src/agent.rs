//! The agent under test, and what it writes.

use std::collections::BTreeMap;
use std::env;
use std::ffi::OsString;
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use serde_json::Value;
use tempfile::TempDir;

use crate::run::{Finished, Run, Running};
use crate::span::{Log, Span};

/// Options of the agent.
#[derive(Clone, Debug, Default)]
pub struct Agent {
    options: Vec<OsString>,
    packs: bool,
    limit: Option<Duration>,
    behind: Vec<OsString>,
    terminal: bool,
}

impl Agent {
    /// The agent with no probes at all.
    pub fn new() -> Self {
        Self::default()
    }

    /// With the built-in probe packs.
    pub fn with_packs() -> Self {
        Self { packs: true, ..Self::default() }
    }

    /// The program: `FLOE_AGENT_BIN`, else the workspace's release build.
    pub fn binary() -> PathBuf {
        let built = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/release/floe-agent");
        let binary = env::var_os("FLOE_AGENT_BIN").map_or(built, PathBuf::from);
        assert!(binary.exists(), "there is no {}: run `cargo xtask test`, or set FLOE_AGENT_BIN", binary.display());
        binary
    }

    /// With a probe.
    #[must_use]
    pub fn probe(self, probe: &str) -> Self {
        self.option("--probe").option(probe)
    }

    /// With probes.
    #[must_use]
    pub fn probes(self, probes: &[&str]) -> Self {
        probes.iter().fold(self, |agent, probe| agent.probe(probe))
    }

    /// With one more word before the command.
    #[must_use]
    pub fn option(mut self, word: impl Into<OsString>) -> Self {
        self.options.push(word.into());
        self
    }

    /// With a time limit for the agent (and so for the command of `exec`).
    #[must_use]
    pub fn limit(mut self, limit: Duration) -> Self {
        self.limit = Some(limit);
        self
    }

    /// With a time limit, unless it has one.
    #[must_use]
    pub(crate) fn limit_unless_set(mut self, limit: Duration) -> Self {
        self.limit.get_or_insert(limit);
        self
    }

    /// Traces a command from its start to its end.
    #[track_caller]
    pub fn exec(&self, run: &Run) -> Outcome {
        let mut tracing = self.start(run);
        tracing.agent.close_input();
        tracing.wait()
    }

    /// Starts a command under the agent.
    pub fn start(&self, run: &Run) -> Tracing {
        let files = Files::new();
        let mut words = self.words("exec", &files);
        words.push("--".into());
        let run = run.clone().behind(words);
        Tracing { agent: self.limited(run).start(), files }
    }

    /// Attaches to a process.
    pub fn attach(&self, pid: u32) -> Tracing {
        let files = Files::new();
        let mut words = self.words("attach", &files);
        words.insert(2, pid.to_string().into());
        let program = words.remove(0);
        let run = Run::new(program).args(words);
        Tracing { agent: self.limited(run).start(), files }
    }

    /// Starts the node agent.
    pub(crate) fn run(&self) -> Tracing {
        let files = Files::new();
        let mut words = self.words("run", &files);
        let run = Run::new(words.remove(0)).args(words).behind(self.behind.clone());
        Tracing { agent: self.limited(run).start(), files }
    }

    /// With a command before the agent, such as `setpriv` with its options.
    #[must_use]
    pub fn behind(mut self, words: &[&str]) -> Self {
        self.behind = words.iter().map(OsString::from).collect();
        self
    }

    /// With a terminal as its standard error.
    #[must_use]
    pub fn on_a_terminal(mut self) -> Self {
        self.terminal = true;
        self
    }

    fn limited(&self, run: Run) -> Run {
        let run = if self.terminal { run.on_a_terminal() } else { run };
        match self.limit {
            Some(limit) => run.limit(limit),
            None => run,
        }
    }

    fn words(&self, command: &str, files: &Files) -> Vec<OsString> {
        let mut words: Vec<OsString> = vec![Self::binary().into(), command.into()];
        words.extend(["--output".into(), files.spans().into(), "--stats".into(), files.stats().into()]);
        if !self.packs {
            words.push("--no-packs".into());
        }
        words.extend(self.options.iter().cloned());
        words
    }
}

struct Files(TempDir);

impl Files {
    fn new() -> Self {
        Self(tempfile::tempdir().expect("a temporary folder can be made"))
    }

    fn spans(&self) -> PathBuf {
        self.0.path().join("spans.jsonl")
    }

    fn stats(&self) -> PathBuf {
        self.0.path().join("stats.json")
    }
}

/// A running agent.
pub struct Tracing {
    /// Its process; with `exec`, its standard streams are also those of the command.
    pub agent: Running,
    files: Files,
}

impl Tracing {
    /// The spans that are in the file so far.
    pub fn spans(&self) -> Vec<Span> {
        let text = fs::read_to_string(self.files.spans()).unwrap_or_default();
        let complete = text.rfind('\n').map_or("", |end| &text[..end]);
        Span::parse(complete)
    }

    /// The spans behind the first so many bytes of the file, and how many bytes those and these are.
    pub(crate) fn spans_from(&self, read: usize) -> (Vec<Span>, usize) {
        let text = fs::read_to_string(self.files.spans()).unwrap_or_default();
        let new = text.get(read..).unwrap_or_default();
        let complete = new.rfind('\n').map_or("", |end| &new[..=end]);
        (Span::parse(complete), read + complete.len())
    }

    /// Waits until some spans are in the file.
    #[track_caller]
    pub fn wait_for_spans(&mut self, at_least: usize) {
        let deadline = Instant::now() + Duration::from_secs(30);
        while self.spans().len() < at_least {
            let ended = self.agent.has_ended();
            assert!(
                !ended && Instant::now() < deadline,
                "{} of {at_least} spans; the agent {}: {}",
                self.spans().len(),
                if ended { "has ended" } else { "runs" },
                self.agent.error()
            );
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// Kills the agent.
    pub fn kill(self) -> Finished {
        self.agent.signal(Signal::KILL);
        self.agent.wait()
    }

    /// Waits for the end of the agent and reads what it wrote.
    #[track_caller]
    pub fn wait(self) -> Outcome {
        let Self { agent, files } = self;
        let finished = agent.wait();
        let spans = fs::read_to_string(files.spans()).unwrap_or_default();
        let stats = fs::read_to_string(files.stats()).ok();
        Outcome {
            finished,
            logs: Log::parse(&spans),
            spans: Span::parse(&spans),
            stats: stats.map(|text| Stats::parse(&text)),
        }
    }
}

/// What came of tracing something.
#[derive(Debug)]
pub struct Outcome {
    /// The agent; with `exec`, with the output of the command.
    pub finished: Finished,
    /// All spans.
    pub spans: Vec<Span>,
    /// All log records.
    pub logs: Vec<Log>,
    stats: Option<Stats>,
}

impl Outcome {
    /// The spans of this name.
    pub fn named<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a Span> {
        self.spans.iter().filter(move |span| span.name == name)
    }

    /// The spans that have this attribute.
    pub fn with<'a>(&'a self, attribute: &'a str) -> impl Iterator<Item = &'a Span> {
        self.spans.iter().filter(move |span| span.get(attribute).is_some())
    }

    /// The statistics.
    #[track_caller]
    pub fn stats(&self) -> &Stats {
        let Some(stats) = &self.stats else { panic!("the agent wrote no statistics: {}", self.finished) };
        stats
    }

    /// A counter.
    #[track_caller]
    pub fn counter(&self, name: &str) -> u64 {
        self.stats().counter(name)
    }

    /// Panics if an event was lost.
    #[track_caller]
    pub fn nothing_lost(&self) {
        for name in ["events_lost", "urgent_events_lost", "table_full"] {
            assert_eq!(self.counter(name), 0, "{name}\n{self}");
        }
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "  {} spans of {}", self.spans.len(), self.finished)?;
        if let Some(Stats { counters, processes, .. }) = &self.stats {
            let counters: BTreeMap<_, _> = counters.iter().filter(|(_, value)| **value > 0).collect();
            write!(f, "\n  counters: {counters:?}\n  processes: {}", Value::from(processes.clone()))?;
        }
        Ok(())
    }
}

/// What `--stats` wrote.
#[derive(Clone, Debug)]
pub struct Stats {
    /// Counters by name.
    pub counters: BTreeMap<String, u64>,
    /// The processes that the agent looked at.
    pub processes: Vec<Value>,
    /// Longest time to an answer to a waiting process, in microseconds.
    pub slowest_answer_us: u64,
}

impl Stats {
    fn parse(text: &str) -> Self {
        let value: Value =
            serde_json::from_str(text).unwrap_or_else(|error| panic!("the statistics are not JSON: {error}: {text}"));
        let counters = value["counters"].as_object().unwrap_or_else(|| panic!("no counters in {text}"));
        let number = |value: &Value| value.as_u64().unwrap_or_else(|| panic!("not a number: {value}"));
        Self {
            counters: counters.iter().map(|(name, value)| (name.clone(), number(value))).collect(),
            processes: value["processes"].as_array().cloned().unwrap_or_default(),
            slowest_answer_us: number(&value["slowest_answer_us"]),
        }
    }

    /// A counter.
    #[track_caller]
    pub fn counter(&self, name: &str) -> u64 {
        *self.counters.get(name).unwrap_or_else(|| panic!("there is no counter {name}: {:?}", self.counters))
    }
}
