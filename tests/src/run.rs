//! Commands with a time limit, their input and their output.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{Read, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::{Arc, Condvar, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::OFlags;
use rustix::process::{Pid, Signal, kill_process, kill_process_group};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};

/// Longest time for a command unless a test says otherwise.
const LIMIT: Duration = Duration::from_mins(1);

/// A command line and its surroundings.
#[derive(Clone, Debug)]
pub struct Run {
    words: Vec<OsString>,
    variables: Vec<(String, OsString)>,
    folder: Option<PathBuf>,
    input: Vec<u8>,
    limit: Duration,
    terminal: bool,
}

impl Run {
    /// This program, without arguments.
    pub fn new(program: impl AsRef<OsStr>) -> Self {
        Self {
            words: vec![program.as_ref().to_owned()],
            variables: Vec::new(),
            folder: None,
            input: Vec::new(),
            limit: LIMIT,
            terminal: false,
        }
    }

    /// `sh -c SCRIPT`.
    pub fn shell(script: &str) -> Self {
        Self::new("/bin/sh").arg("-c").arg(script)
    }

    /// One more argument.
    #[must_use]
    pub fn arg(mut self, word: impl AsRef<OsStr>) -> Self {
        self.words.push(word.as_ref().to_owned());
        self
    }

    /// More arguments.
    #[must_use]
    pub fn args<S: AsRef<OsStr>>(mut self, words: impl IntoIterator<Item = S>) -> Self {
        self.words.extend(words.into_iter().map(|word| word.as_ref().to_owned()));
        self
    }

    /// With this environment variable.
    #[must_use]
    pub fn variable(mut self, name: &str, value: impl AsRef<OsStr>) -> Self {
        self.variables.push((name.to_owned(), value.as_ref().to_owned()));
        self
    }

    /// In this folder.
    #[must_use]
    pub fn folder(mut self, folder: &Path) -> Self {
        self.folder = Some(folder.to_owned());
        self
    }

    /// With this on its standard input, which is closed then.
    #[must_use]
    pub fn input(mut self, input: &[u8]) -> Self {
        input.clone_into(&mut self.input);
        self
    }

    /// With another time limit.
    #[must_use]
    pub fn limit(mut self, limit: Duration) -> Self {
        self.limit = limit;
        self
    }

    /// With a terminal as its standard error.
    #[must_use]
    pub fn on_a_terminal(mut self) -> Self {
        self.terminal = true;
        self
    }

    /// The command line with other words before it, in the same surroundings.
    #[must_use]
    pub(crate) fn behind(mut self, words: Vec<OsString>) -> Self {
        self.words.splice(0..0, words);
        self
    }

    /// Runs it to its end.
    pub fn run(&self) -> Finished {
        let mut running = self.start();
        running.close_input();
        running.wait()
    }

    /// Starts it, and waits until it has said that it is ready.
    #[track_caller]
    pub fn start_ready(&self) -> Running {
        let mut running = self.start();
        running.wait_for_output("ready");
        running
    }

    /// Starts it; its standard input stays open behind [`Run::input`].
    pub fn start(&self) -> Running {
        let what = self.words.iter().map(|word| word.to_string_lossy()).collect::<Vec<_>>().join(" ");
        let mut command = Command::new(&self.words[0]);
        command.args(&self.words[1..]).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        // What the shell of whoever runs the tests says about Python or tracing is not part of the test.
        for (name, _) in std::env::vars_os() {
            let text = name.to_string_lossy();
            let foreign = ["PYTHON", "OTEL_", "FLOE_", "DBT_", "VIRTUAL_ENV", "TRACEPARENT"];
            if foreign.iter().any(|prefix| text.starts_with(prefix)) {
                command.env_remove(name);
            }
        }
        command.env("PYTHONDONTWRITEBYTECODE", "1");
        command.envs(self.variables.iter().map(|(name, value)| (name, value)));
        if let Some(folder) = &self.folder {
            command.current_dir(folder);
        }
        command.process_group(0);
        let terminal = self.terminal.then(terminal);
        if let Some((_, theirs)) = &terminal {
            command.stderr(theirs.try_clone().expect("a descriptor can be copied"));
        }
        let mut child = command.spawn().unwrap_or_else(|error| panic!("cannot run {what}: {error}"));
        let mut input = child.stdin.take().expect("piped");
        let written = self.input.clone();
        // From a thread: a command that does not read must not stop the test.
        let input = thread::spawn(move || {
            let _ = input.write_all(&written);
            input
        });
        Running {
            stdout: Pipe::read(child.stdout.take().expect("piped")),
            stderr: match terminal {
                Some((ours, _)) => Pipe::read(ours),
                None => Pipe::read(child.stderr.take().expect("piped")),
            },
            input: Some(input),
            deadline: Instant::now() + self.limit,
            limit: self.limit,
            child,
            what,
            reaped: false,
        }
    }
}

/// A terminal: our side, which sees what is written, and the side of the programs on it.
fn terminal() -> (File, File) {
    let ours = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC).expect("there are terminals");
    grantpt(&ours).and_then(|()| unlockpt(&ours)).expect("it is ours");
    let name = ptsname(&ours, Vec::new()).expect("it has a name").into_string().expect("ASCII");
    let theirs = File::options().read(true).write(true).custom_flags(OFlags::NOCTTY.bits().cast_signed()).open(name);
    (ours.into(), theirs.expect("it can be opened"))
}

/// A command that has ended.
#[derive(Clone, Debug)]
pub struct Finished {
    /// The command line.
    pub what: String,
    /// How it ended.
    pub status: ExitStatus,
    /// What it wrote.
    pub stdout: Vec<u8>,
    /// What it wrote to standard error.
    pub stderr: Vec<u8>,
    /// How long it took.
    pub took: Duration,
}

impl Finished {
    /// Its exit code, as a shell would say it: 128 + n for signal n.
    pub fn code(&self) -> i32 {
        self.status.code().unwrap_or_else(|| 128 + self.status.signal().unwrap_or(0))
    }

    /// Standard output as text.
    pub fn out(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }

    /// Standard error as text.
    pub fn err(&self) -> String {
        String::from_utf8_lossy(&self.stderr).into_owned()
    }

    /// Checks the exit code and gives standard output.
    #[track_caller]
    pub fn expect(&self, code: i32) -> String {
        assert!(self.code() == code, "exit code {} instead of {code}: {self}", self.code());
        self.out()
    }
}

impl std::fmt::Display for Finished {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "{:.300}\n  ended after {:.1} s with {}\n  stdout: {}\n  stderr: {}",
            self.what,
            self.took.as_secs_f64(),
            self.status,
            end_of(&self.out()),
            end_of(&self.err())
        )
    }
}

/// The last part of a long text.
fn end_of(text: &str) -> &str {
    let mut start = text.len().saturating_sub(4000);
    while !text.is_char_boundary(start) {
        start += 1;
    }
    &text[start..]
}

/// A command that runs.
pub struct Running {
    child: Child,
    stdout: Pipe,
    stderr: Pipe,
    input: Option<thread::JoinHandle<ChildStdin>>,
    deadline: Instant,
    limit: Duration,
    what: String,
    reaped: bool,
}

impl Running {
    /// Its process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    fn rustix_pid(&self) -> Pid {
        Pid::from_child(&self.child)
    }

    /// Waits until standard output contains this.
    #[track_caller]
    pub fn wait_for_output(&mut self, text: &str) {
        let found = self.stdout.wait(self.deadline, |bytes| contains(bytes, text));
        self.check(found, &format!("`{text}` on standard output"));
    }

    /// Waits until standard error contains this.
    #[track_caller]
    pub fn wait_for_error(&mut self, text: &str) {
        let found = self.stderr.wait(self.deadline, |bytes| contains(bytes, text));
        self.check(found, &format!("`{text}` on standard error"));
    }

    #[track_caller]
    fn check(&mut self, found: bool, wanted: &str) {
        if !found {
            self.kill_group();
            panic!(
                "no {wanted} of {}\n  stdout: {}\n  stderr: {}",
                self.what,
                end_of(&self.stdout.text()),
                end_of(&self.stderr.text())
            );
        }
    }

    /// What is on standard output so far.
    pub fn output(&self) -> String {
        self.stdout.text()
    }

    /// What is on standard error so far.
    pub fn error(&self) -> String {
        self.stderr.text()
    }

    /// Writes to its standard input.
    pub fn write(&mut self, text: &str) {
        let mut input = self.input.take().expect("standard input is open").join().expect("the writer does not panic");
        input.write_all(text.as_bytes()).unwrap_or_else(|error| panic!("cannot write to {}: {error}", self.what));
        self.input = Some(thread::spawn(move || input));
    }

    /// Closes its standard input, as soon as all is written.
    pub fn close_input(&mut self) {
        self.input = None;
    }

    /// Sends a signal to the process.
    pub fn signal(&self, signal: Signal) {
        kill_process(self.rustix_pid(), signal)
            .unwrap_or_else(|error| panic!("cannot send {signal:?} to {}: {error}", self.what));
    }

    /// Sends a signal to the process and to what it started.
    pub fn signal_group(&self, signal: Signal) {
        kill_process_group(self.rustix_pid(), signal)
            .unwrap_or_else(|error| panic!("cannot send {signal:?} to {}: {error}", self.what));
    }

    /// Whether it has ended.
    pub fn has_ended(&mut self) -> bool {
        self.child.try_wait().expect("a child can be waited for").is_some()
    }

    /// Waits for its end.
    #[track_caller]
    pub fn wait(mut self) -> Finished {
        self.input = None;
        let status = loop {
            if let Some(status) = self.child.try_wait().expect("a child can be waited for") {
                break status;
            }
            if Instant::now() > self.deadline {
                self.kill_group();
                panic!(
                    "{} did not end within {} s\n  stdout: {}\n  stderr: {}",
                    self.what,
                    self.limit.as_secs(),
                    end_of(&self.stdout.text()),
                    end_of(&self.stderr.text())
                );
            }
            thread::sleep(Duration::from_millis(3));
        };
        self.reaped = true;
        // What a command leaves behind in the background may hold its pipes.
        let patience = Instant::now() + Duration::from_secs(5);
        let finished = Finished {
            what: self.what.clone(),
            status,
            stdout: self.stdout.rest(patience),
            stderr: self.stderr.rest(patience),
            took: Instant::now() + self.limit - self.deadline,
        };
        self.kill_group();
        finished
    }

    fn kill_group(&mut self) {
        let _ = kill_process_group(self.rustix_pid(), Signal::KILL);
        if !self.reaped {
            let _ = self.child.kill();
            let _ = self.child.wait();
            self.reaped = true;
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if !self.reaped {
            self.kill_group();
        }
    }
}

fn contains(bytes: &[u8], text: &str) -> bool {
    bytes.windows(text.len()).any(|window| window == text.as_bytes())
}

#[derive(Default)]
struct Content {
    bytes: Vec<u8>,
    ended: bool,
}

/// A pipe that a thread reads.
struct Pipe {
    shared: Arc<(Mutex<Content>, Condvar)>,
}

impl Pipe {
    fn read(mut pipe: impl Read + Send + 'static) -> Self {
        let shared = Arc::new((Mutex::new(Content::default()), Condvar::new()));
        let theirs = Arc::clone(&shared);
        thread::spawn(move || {
            let mut buffer = vec![0; 1 << 16];
            loop {
                let read = pipe.read(&mut buffer).unwrap_or(0);
                let mut state = theirs.0.lock().expect("no reader panics");
                state.bytes.extend_from_slice(&buffer[..read]);
                state.ended = read == 0;
                theirs.1.notify_all();
                if read == 0 {
                    break;
                }
            }
        });
        Self { shared }
    }

    /// Waits until what was read satisfies `wanted`.
    fn wait(&self, deadline: Instant, wanted: impl Fn(&[u8]) -> bool) -> bool {
        let mut state = self.shared.0.lock().expect("no reader panics");
        loop {
            if wanted(&state.bytes) {
                return true;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if state.ended || left.is_zero() {
                return false;
            }
            state = self.shared.1.wait_timeout(state, left).expect("no reader panics").0;
        }
    }

    /// All of it.
    fn rest(&self, deadline: Instant) -> Vec<u8> {
        let mut state = self.shared.0.lock().expect("no reader panics");
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if state.ended || left.is_zero() {
                return state.bytes.clone();
            }
            state = self.shared.1.wait_timeout(state, left).expect("no reader panics").0;
        }
    }

    fn text(&self) -> String {
        String::from_utf8_lossy(&self.shared.0.lock().expect("no reader panics").bytes).into_owned()
    }
}
