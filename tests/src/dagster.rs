//! A Dagster instance with the code locations of `tests/fixtures/dagster`.

use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use serde_json::Value;
use tempfile::TempDir;

use crate::agent::{Agent, Outcome};
use crate::fixture::fixture;
use crate::run::Run;
use crate::say;

const LIMIT: Duration = Duration::from_mins(5);

/// An instance, in a folder with the code.
pub struct Instance {
    folder: TempDir,
    bin: PathBuf,
    variables: Vec<(&'static str, PathBuf)>,
}

impl Instance {
    /// A new one, for the programs of an environment.
    pub fn new(bin: &Path) -> Self {
        Self { folder: fixture("dagster"), bin: bin.to_owned(), variables: Vec::new() }
    }

    /// With this environment variable.
    #[must_use]
    pub fn variable(mut self, name: &'static str, value: &Path) -> Self {
        self.variables.push((name, value.to_owned()));
        self
    }

    /// Its folder.
    pub fn path(&self) -> &Path {
        self.folder.path()
    }

    /// The environment's folder of programs.
    pub fn bin(&self) -> &Path {
        &self.bin
    }

    /// A program of the environment, in this instance.
    pub fn command(&self, program: &str, words: &[&str]) -> Run {
        let path = self.path();
        let run = Run::new(self.bin.join(program)).args(words).folder(path).limit(LIMIT);
        let run = run.variable("DAGSTER_HOME", path).variable("SHOP_STATE", path);
        self.variables.iter().fold(run, |run, (name, value)| run.variable(name, value))
    }

    /// Runs `dagster` with these words under the agent.
    #[track_caller]
    pub fn traced(&self, words: &[&str], code: i32) -> Outcome {
        let outcome = Agent::with_packs().limit(LIMIT).exec(&self.command("dagster", words));
        outcome.finished.expect(code);
        outcome.nothing_lost();
        let took = outcome.finished.took.as_secs_f64();
        say(&format!("dagster {}: {} spans, {took:.0} s", words.join(" "), outcome.spans.len()));
        outcome
    }

    /// Runs `dagster dev` under the agent until Dagster has recorded what is waited for.
    #[track_caller]
    pub fn dev(&self, file: &str, done: impl Fn(&Value) -> bool) -> Outcome {
        let port = TcpListener::bind("127.0.0.1:0").and_then(|socket| socket.local_addr()).expect("a port").port();
        let dev = self.command("dagster", &["dev", "-f", file, "-h", "127.0.0.1", "-p", &port.to_string()]);
        let tracing = Agent::with_packs().limit(LIMIT).start(&dev);
        let deadline = Instant::now() + Duration::from_mins(4);
        loop {
            thread::sleep(Duration::from_secs(5));
            let recorded = self.recorded();
            if done(&recorded) {
                break;
            }
            assert!(Instant::now() < deadline, "{recorded:#}\n{}", tracing.agent.error());
        }
        tracing.agent.signal_group(Signal::INT);
        let outcome = tracing.wait();
        outcome.nothing_lost();
        say(&format!("dagster dev -f {file}: {} spans", outcome.spans.len()));
        outcome
    }

    /// What Dagster recorded.
    #[track_caller]
    pub fn recorded(&self) -> Value {
        let text = self.command("python", &["event_log.py"]).run().expect(0);
        serde_json::from_str(&text).expect("the script prints JSON")
    }
}
