//! Steps with a line each: a spinner on a terminal, plain lines otherwise. What tools print goes to a log file.

use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::{IsTerminal as _, Read as _, Seek as _, SeekFrom, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use indicatif::{ProgressBar, ProgressStyle};

/// When a step first says that it runs, and how often from then on, where there is no terminal.
const HEARTBEATS: (Duration, Duration) = (Duration::from_secs(3), Duration::from_secs(30));
/// Lines of the log that a failure shows.
const TAIL: usize = 30;

/// Prints the steps of one invocation.
pub struct Progress {
    log: PathBuf,
    lock: File,
    terminal: bool,
}

/// What a failing command shows of its output.
#[derive(Clone, Copy)]
enum Show {
    Tail,
    Diagnostics,
}

impl Progress {
    /// Starts a log file, `target/xtask/log-<pid>.txt`; those of earlier invocations are removed.
    pub fn new(workspace: &Path) -> Result<Self> {
        let folder = workspace.join("target/xtask");
        fs::create_dir_all(&folder).with_context(|| format!("cannot create {}", folder.display()))?;
        for old in fs::read_dir(&folder)?.flatten() {
            let name = old.file_name();
            let pid = name.to_str().and_then(|name| name.strip_prefix("log-")?.strip_suffix(".txt"));
            if pid.is_some_and(|pid| !Path::new("/proc").join(pid).exists()) {
                let _ = fs::remove_file(old.path());
            }
        }
        let log = folder.join(format!("log-{}.txt", std::process::id()));
        File::create(&log).with_context(|| format!("cannot create {}", log.display()))?;
        let lock = File::create(folder.join("lock"))?;
        Ok(Self { log, lock, terminal: std::io::stderr().is_terminal() })
    }

    /// Runs `work` while no other invocation installs anything in this checkout.
    pub fn exclusively<T>(&self, work: impl FnOnce() -> Result<T>) -> Result<T> {
        if self.lock.try_lock().is_err() {
            note("waiting for another `cargo xtask` that installs something");
            self.lock.lock().context("cannot lock target/xtask/lock")?;
        }
        let result = work();
        self.lock.unlock()?;
        result
    }

    /// Says that there was nothing to do.
    pub fn ready(&self, label: &str, detail: &str) {
        eprintln!("  {} {label}: {detail}", self.mark());
    }

    /// Runs a command as a step; its output goes to the log, of which a failure shows the end.
    pub fn run(&self, label: &str, command: &mut Command) -> Result<()> {
        self.step(label, command, None, Show::Tail)
    }

    /// Runs cargo as a step; a failure shows all its diagnostics.
    pub fn cargo(&self, label: &str, command: &mut Command) -> Result<()> {
        self.step(label, command, None, Show::Diagnostics)
    }

    /// As [`Progress::cargo`], and returns what the command writes on its standard output.
    pub fn cargo_output(&self, label: &str, command: &mut Command) -> Result<String> {
        let path = self.log.with_extension("out");
        self.step(label, command, Some(File::create(&path)?), Show::Diagnostics)?;
        let output = fs::read_to_string(&path)?;
        fs::remove_file(&path)?;
        Ok(output)
    }

    fn step(&self, label: &str, command: &mut Command, stdout: Option<File>, show: Show) -> Result<()> {
        let mut log = File::options().append(true).open(&self.log)?;
        writeln!(log, "\n$ {}", shell_line(command))?;
        let start = log.seek(SeekFrom::End(0))?;
        let begun = Instant::now();
        let spinner = self.spinner(label);
        let mut child = command
            .stdin(Stdio::null())
            .stdout(stdout.map_or_else(|| log.try_clone().map(Stdio::from), |file| Ok(file.into()))?)
            .stderr(log.try_clone()?)
            .spawn()
            .with_context(|| format!("{label}: cannot run {}", command.get_program().display()))?;
        let mut heartbeat = begun + HEARTBEATS.0;
        let mut pause = Duration::from_millis(5);
        let status = loop {
            if let Some(status) = child.try_wait()? {
                break status;
            }
            thread::sleep(pause);
            pause = (pause * 2).min(Duration::from_millis(100));
            if let Some(spinner) = &spinner {
                spinner.set_message(format!("{label}  {}", last_line(&self.log, start)));
                spinner.tick();
            } else if Instant::now() >= heartbeat {
                heartbeat += HEARTBEATS.1;
                let seconds = begun.elapsed().as_secs();
                eprintln!("    {label}: {seconds} s so far  {}", last_line(&self.log, start));
            }
        };
        if let Some(spinner) = spinner {
            spinner.finish_and_clear();
        }
        let seconds = begun.elapsed().as_secs_f64();
        if status.success() {
            eprintln!("  {} {label} ({seconds:.1} s)", self.mark());
            return Ok(());
        }
        eprintln!("  failed: {label} ({seconds:.1} s)\n");
        let text = self.logged_since(start);
        match show {
            Show::Tail => {
                let lines: Vec<_> = text.lines().collect();
                for line in &lines[lines.len().saturating_sub(TAIL)..] {
                    eprintln!("    {line}");
                }
            }
            Show::Diagnostics => {
                text.lines().filter(|line| !is_cargo_status(line)).for_each(|line| eprintln!("{line}"));
            }
        }
        bail!("{label}: `{}` ended with {status}; its whole output is in {}", shell_line(command), self.log.display())
    }

    /// What was logged from an offset on.
    fn logged_since(&self, start: u64) -> String {
        read_from(&self.log, start).unwrap_or_default()
    }

    /// What the last command wrote into the log.
    pub fn last_output(&self) -> String {
        let log = self.logged_since(0);
        log.rsplit_once("\n$ ").map_or(String::new(), |(_, last)| last.to_owned())
    }

    fn spinner(&self, label: &str) -> Option<ProgressBar> {
        if !self.terminal {
            return None;
        }
        let style = ProgressStyle::with_template("  {spinner} {wide_msg} {elapsed}").expect("the template is valid");
        let spinner = ProgressBar::new_spinner().with_style(style).with_message(label.to_owned());
        spinner.tick();
        Some(spinner)
    }

    fn mark(&self) -> &'static str {
        if self.terminal { "✓" } else { "ok" }
    }
}

/// Prints a line between the steps.
pub fn note(text: &str) {
    eprintln!("  {text}");
}

/// A command as one would type it.
pub fn shell_line(command: &Command) -> String {
    let mut line = String::new();
    let path = std::env::var("PATH").unwrap_or_default();
    for (name, value) in command.get_envs() {
        let Some(value) = value.map(|value| value.to_string_lossy().into_owned()) else { continue };
        let value = match (name == "PATH").then(|| value.strip_suffix(&path)).flatten() {
            Some(first) => format!("{}$PATH", quoted(first)),
            None => quoted(&value),
        };
        let _ = write!(line, "{}={value} ", name.display());
    }
    line += &quoted(&command.get_program().to_string_lossy());
    for argument in command.get_args() {
        let _ = write!(line, " {}", quoted(&argument.to_string_lossy()));
    }
    line
}

fn quoted(text: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./=:,+@%".contains(c);
    if !text.is_empty() && text.chars().all(plain) { text.to_owned() } else { format!("'{text}'") }
}

fn is_cargo_status(line: &str) -> bool {
    const VERBS: &[&str] = &[
        "Adding",
        "Blocking",
        "Checking",
        "Compiling",
        "Documenting",
        "Downloaded",
        "Downloading",
        "Finished",
        "Fresh",
        "Locking",
        "Updating",
    ];
    line.starts_with("  ") && line.split_whitespace().next().is_some_and(|verb| VERBS.contains(&verb))
}

fn read_from(path: &Path, start: u64) -> std::io::Result<String> {
    let mut file = File::open(path)?;
    file.seek(SeekFrom::Start(start))?;
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// The last line that is not empty, to show what a command is at.
fn last_line(path: &Path, start: u64) -> String {
    let length = fs::metadata(path).map_or(0, |metadata| metadata.len());
    let text = read_from(path, start.max(length.saturating_sub(400))).unwrap_or_default();
    let line = text.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or_default();
    line.chars().filter(|c| !c.is_control()).collect::<String>().trim().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_is_shown_as_one_would_type_it() {
        let mut command = Command::new("cargo");
        command.args(["install", "a b"]).env("RUSTFLAGS", "-L native=/usr/lib").env_remove("CARGO");
        assert_eq!(shell_line(&command), "RUSTFLAGS='-L native=/usr/lib' cargo install 'a b'");
    }

    #[test]
    fn status_lines_of_cargo_are_told_from_diagnostics() {
        assert!(is_cargo_status("   Compiling floe-agent v0.1.0"));
        assert!(!is_cargo_status("error[E0425]: cannot find value"));
        assert!(!is_cargo_status("  --> src/main.rs:1:1"));
    }
}
