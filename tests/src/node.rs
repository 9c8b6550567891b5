//! The node agent under test.

use std::{
    cell::RefCell,
    collections::BTreeMap,
    fs,
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpListener, TcpStream},
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use rustix::process::Signal;
use tempfile::TempDir;

use crate::{Agent, Outcome, Tracing};

/// A running node agent.
pub struct Node {
    /// The agent.
    pub tracing: Tracing,
    address: SocketAddr,
    folder: TempDir,
    counted: RefCell<Counted>,
}

/// Spans that were counted, and how much of the file was read for that.
#[derive(Default)]
struct Counted {
    read: usize,
    by_process: BTreeMap<u32, usize>,
}

impl Node {
    /// Starts it with this configuration, in which `{folder}` stands for a folder of its own, and waits until it is ready. It
    /// dies with the thread that starts it, however that ends.
    #[track_caller]
    pub fn start(agent: &Agent, config: &str) -> Self {
        Self::start_with(agent, &[], config)
    }

    /// As [`Self::start`], with more options of `setpriv`.
    #[track_caller]
    pub fn start_with(agent: &Agent, privileges: &[&str], config: &str) -> Self {
        let words: Vec<_> = ["setpriv", "--pdeathsig", "KILL"].into_iter().chain(privileges.iter().copied()).collect();
        let agent = agent.clone().behind(&words);
        let folder = tempfile::tempdir().expect("a temporary folder can be made");
        // A port that was free a moment ago.
        let free = TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr());
        let address = free.expect("there is a free port");
        let file = config_file(folder.path());
        let config = config.replace("{folder}", &folder.path().to_string_lossy());
        fs::write(&file, config).expect("the configuration can be written");
        let agent = agent
            .limit_unless_set(Duration::from_mins(4))
            // The tests watch spans as they come: none is to wait for its run to be known.
            .option("--set")
            .option("correlation.hold=0")
            .option("--node-config")
            .option(file)
            .option("--listen")
            .option(address.to_string());
        let mut node = Self { tracing: agent.run(), address, folder, counted: RefCell::default() };
        node.wait_until("it is ready", |node| node.get("/readyz").0 == 200);
        node
    }

    /// A file in the folder of its own.
    pub fn file(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Changes its configuration.
    pub fn configure(&self, config: &str) {
        fs::write(config_file(self.folder.path()), config).expect("the configuration can be written");
        self.tracing.agent.signal(Signal::HUP);
    }

    /// Asks its server: status and body; 0 if it does not answer.
    pub fn get(&self, path: &str) -> (u16, String) {
        let ask = || -> std::io::Result<String> {
            let mut stream = TcpStream::connect(self.address)?;
            stream.set_read_timeout(Some(Duration::from_secs(5)))?;
            write!(stream, "GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")?;
            let mut answer = String::new();
            stream.read_to_string(&mut answer)?;
            Ok(answer)
        };
        let Ok(answer) = ask() else { return (0, String::new()) };
        let (head, body) = answer.split_once("\r\n\r\n").unwrap_or((&answer, ""));
        let status = head.split(' ').nth(1).and_then(|status| status.parse().ok()).unwrap_or(0);
        (status, body.to_owned())
    }

    /// The value of a metric. On a busy machine the agent may take longer than it lets somebody wait who asks for metrics: then it is
    /// asked again.
    #[track_caller]
    pub fn metric(&self, name: &str) -> f64 {
        let deadline = Instant::now() + Duration::from_secs(20);
        loop {
            let (status, text) = self.get("/metrics");
            if status == 503 && Instant::now() < deadline {
                continue;
            }
            let value = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.parse().ok());
            return value.unwrap_or_else(|| panic!("there is no metric {name} (status {status}):\n{text}"));
        }
    }

    /// Waits for something; panics if it does not come about.
    #[track_caller]
    pub fn wait_until(&mut self, what: &str, holds: impl Fn(&Self) -> bool) {
        let deadline = Instant::now() + Duration::from_secs(30);
        while !holds(self) {
            let ended = self.tracing.agent.has_ended();
            assert!(!ended && Instant::now() < deadline, "not so: {what}; the agent: {}", self.tracing.agent.error());
            thread::sleep(Duration::from_millis(50));
        }
    }

    /// Spans of a process so far.
    pub fn spans_of(&self, pid: u32) -> usize {
        let mut counted = self.counted.borrow_mut();
        let (spans, read) = self.tracing.spans_from(counted.read);
        counted.read = read;
        for span in spans {
            *counted.by_process.entry(span.pid).or_default() += 1;
        }
        counted.by_process.get(&pid).copied().unwrap_or_default()
    }

    /// Its open files by what they are, when they stay the same: probes are closed by threads of their own, after the kernel has
    /// waited for whoever runs in them. Panics if they do not become as expected.
    #[track_caller]
    pub fn settled_files(&mut self, expected: Option<&BTreeMap<String, usize>>) -> BTreeMap<String, usize> {
        let deadline = Instant::now() + Duration::from_secs(30);
        let mut last = BTreeMap::new();
        let mut same = 0;
        loop {
            let now = open_files(self.tracing.agent.pid());
            same = if now == last { same + 1 } else { 0 };
            if same >= SETTLED && expected.is_none_or(|expected| is_as(expected, &now)) {
                return now;
            }
            assert!(!self.tracing.agent.has_ended() && Instant::now() < deadline, "open are {now:?}, not {expected:?}");
            last = now;
            thread::sleep(Duration::from_millis(100));
        }
    }

    /// Ends it.
    #[track_caller]
    pub fn stop(self) -> Outcome {
        self.tracing.agent.signal(Signal::TERM);
        let outcome = self.tracing.wait();
        outcome.finished.expect(0);
        outcome
    }
}

/// So many looks, a tenth of a second apart, must see the same files.
const SETTLED: u32 = 10;

/// Whether the same files are open. Other Python processes of the machine may have brought interpreter files, with a link for a
/// file that is held open at most.
fn is_as(expected: &BTreeMap<String, usize>, now: &BTreeMap<String, usize>) -> bool {
    let is_new = |name: &str| name.starts_with('/') && !expected.contains_key(name);
    let new: usize = now.iter().filter(|(name, _)| is_new(name)).map(|(_, count)| count).sum();
    let count = |files: &BTreeMap<String, usize>, name: &str| files.get(name).copied().unwrap_or(0);
    expected.keys().chain(now.keys()).filter(|name| !is_new(name)).all(|name| {
        let (before, now) = (count(expected, name), count(now, name));
        if name == "anon_inode:bpf_link" { (before..=before + new).contains(&now) } else { now == before }
    })
}

fn open_files(pid: u32) -> BTreeMap<String, usize> {
    let mut files = BTreeMap::new();
    for file in fs::read_dir(format!("/proc/{pid}/fd")).expect("it runs").flatten() {
        if let Ok(target) = fs::read_link(file.path()) {
            let name = target.to_string_lossy();
            // Each connection has another number.
            let name = if name.starts_with("socket:") { "socket" } else { &name };
            *files.entry(name.to_owned()).or_default() += 1;
        }
    }
    files
}

fn config_file(folder: &Path) -> PathBuf {
    folder.join("node.yaml")
}

/// Lines of a shell that put it into a control group, so and so far below the root of version 2, which is mounted in a folder
/// for this moment. The mount must be its own.
pub fn join_group(folder: &Path, group: &str) -> String {
    let root = folder.join("groups");
    let root = root.display();
    format!(
        "mkdir {root}; mount -t cgroup2 none {root}; mkdir -p {root}/{group}; echo $$ > {root}/{group}/cgroup.procs; umount {root}; "
    )
}
