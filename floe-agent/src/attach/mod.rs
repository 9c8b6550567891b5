//! Arming: the thread that answers waiting processes.
//!
//! A traced thread stops in a probe with the GIL held and sends an urgent record; this thread does what is needed (find
//! the interpreter, attach the gate, arm a module's functions, disarm before a stack switch) and lets it go on. Nothing
//! else happens on this thread, and nothing is written into a process unless one of its threads waits like this.
//!
//! * `files`: interpreter files, and the probes on them.
//! * `traced`: one traced process: its interpreter and its armed functions.
//! * `guards`: functions in C that are watched while anything is armed.
//! * `survey`: which functions a probe stands for.
//! * `twins`: files that are one to the kernel.
//! * `attacher`: the thread itself.

mod attacher;
mod files;
mod guards;
pub mod survey;
mod traced;
mod twins;

use std::{
    collections::{BTreeMap, VecDeque},
    sync::{Arc, mpsc},
    thread::JoinHandle,
    time::Duration,
};

use globset::GlobSet;
use opentelemetry::KeyValue;
use serde::Serialize;
use thiserror::Error;

use crate::{
    catalogue::Catalogue,
    kernel::{Kernel, KernelError, UrgentReader, WaitBounds, trial::Trial},
    process::{launch::Executable, run_id::RunSources},
    python::{exception::ExceptionFacts, identify::Refusal},
    trace::ProcessFacts,
    units::{BootNanos, Epoch, Pid, Tid},
};

/// What the thread may do.
#[derive(Clone, Debug)]
pub struct Options {
    /// CPython 3.11: do not set `eval_frame`.
    pub keep_inlining: bool,
    /// What tells the run that a process belongs to.
    pub run_sources: RunSources,
    /// File names of programs whose processes are spans.
    pub programs: GlobSet,
    /// How long processes wait.
    pub bounds: WaitBounds,
    /// Who decides which processes of the machine are traced; without, only what is asked for.
    pub select: Option<Arc<dyn Select>>,
}

/// Decides which processes of a machine are traced. Children of a traced process are, unless they are excluded.
pub trait Select: Send + Sync + std::fmt::Debug {
    /// What it says of a process. Asked while the process waits.
    fn judge(&self, pid: Pid) -> Judgement;
    /// Resource attributes that tell where a process runs.
    fn attributes(&self, pid: Pid) -> Vec<KeyValue>;
    /// The Dagster run that the labels of its pod name.
    fn dagster_run(&self, pid: Pid) -> Option<String>;
}

/// What [`Select`] says of a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Judgement {
    /// It is traced.
    Selected,
    /// It is not, as far as it is known.
    NotSelected,
    /// It must not be.
    Excluded,
}

/// A request to the thread.
#[derive(Debug)]
pub enum Request {
    /// Children of this process are selected from now on, or of nobody.
    SelectChildrenOf(Option<Pid>, mpsc::Sender<Result<(), KernelError>>),
    /// These executables may be about to be run: probe the interpreters among them before.
    Prepare(Vec<Executable>, mpsc::Sender<()>),
    /// Trace a running process and its descendants.
    Attach(Pid, mpsc::Sender<Result<Attached, AttachError>>),
    /// A traced process has ended.
    Ended(Pid, Epoch),
    /// A running process was found that is to be traced, with its descendants.
    Discovered(Pid),
    /// Probe the interpreter of a running process, for those that start later.
    Examine(Pid),
    /// Which processes are selected.
    Selected(mpsc::Sender<Vec<Pid>>),
    /// Let go of a traced process.
    Release(Pid),
    /// Take all probes away. Answers how long it took.
    Pause(mpsc::Sender<Duration>),
    /// Put them back, when they are all gone. Tells when that is done.
    Resume(mpsc::Sender<()>),
    /// Take load off: 0 (none) to 3.
    Shed(u8),
    /// Tell how things stand.
    Snapshot(mpsc::Sender<Snapshot>),
    /// Disarm what can be disarmed and end.
    Stop,
}

/// A process that is being attached to.
#[derive(Clone, Debug)]
pub struct Attached {
    /// Version of its interpreter.
    pub python_version: String,
}

/// Why a process cannot be attached to.
#[derive(Debug, Error)]
pub enum AttachError {
    /// There is no such process.
    #[error("cannot attach to process {0}: there is no such process; `ps -e` lists those there are")]
    NoProcess(Pid),
    /// The interpreter is refused.
    #[error("cannot attach to process {pid}: {refusal}")]
    Refused {
        /// The process.
        pid: Pid,
        /// Why.
        refusal: Refusal,
    },
    /// The kernel side failed.
    #[error("cannot attach to process {pid}: {source}")]
    Kernel {
        /// The process.
        pid: Pid,
        /// Why.
        source: KernelError,
    },
}

/// What the thread tells the one that makes spans. Sent before the process can make events of that kind.
#[derive(Debug)]
pub enum News {
    /// A process is traced.
    Process(Box<ProcessFacts>),
    /// All tracing is paused: what is open will not be seen to end.
    Paused,
    /// An exception was read while its thread waited: it leaves this call, or comes into it as an argument.
    Exception {
        /// The process.
        pid: Pid,
        /// Its address space.
        epoch: Epoch,
        /// The thread.
        tid: Tid,
        /// When the call began.
        call: BootNanos,
        /// The exception.
        exception: Box<ExceptionFacts>,
    },
}

/// What became of a process.
#[derive(Clone, Debug, Serialize)]
pub struct Verdict {
    /// The process.
    pub pid: u32,
    /// `traced`, `refused` or `stopped`.
    pub verdict: &'static str,
    /// Version of its interpreter, if it was identified.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub python: Option<String>,
    /// Why it is refused, or why tracing stopped.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

/// Verdicts that are kept in the report; older ones go.
const MAX_VERDICTS: usize = 4096;

/// What the thread did.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Report {
    /// The last verdicts, in order.
    pub processes: VecDeque<Verdict>,
    /// Python processes that were looked at and were not selected before.
    pub processes_seen: u64,
    /// Verdicts by what they are.
    pub verdicts: BTreeMap<&'static str, u64>,
    /// Refusals by their kind.
    pub refused: BTreeMap<&'static str, u64>,
    /// Processes that were let go of.
    pub processes_released: u64,
    /// Functions armed.
    pub functions_armed: u64,
    /// Functions disarmed because their calls were nested too deep.
    pub functions_disarmed: u64,
    /// Answers that came after the waiting thread had gone on.
    pub late_answers: u64,
    /// Longest time to an answer, in microseconds.
    pub slowest_answer_us: u64,
    /// How long answers took.
    pub answers: AnswerTimes,
}

impl Report {
    fn add(&mut self, verdict: Verdict) {
        *self.verdicts.entry(verdict.verdict).or_default() += 1;
        if self.processes.len() >= MAX_VERDICTS {
            self.processes.pop_front();
        }
        self.processes.push_back(verdict);
    }
}

/// How long waiting threads waited for an answer.
#[derive(Clone, Debug, Default, Serialize)]
pub struct AnswerTimes {
    /// Answers that took at most as long as the [`BOUNDS`](Self::BOUNDS) say and longer than the bound before; the last: longer.
    pub counts: [u64; Self::BOUNDS.len() + 1],
    /// All times together, in microseconds.
    pub sum_us: u64,
}

impl AnswerTimes {
    /// In microseconds.
    pub const BOUNDS: [u64; 10] = [100, 250, 500, 1_000, 2_500, 5_000, 10_000, 50_000, 100_000, 500_000];

    fn add(&mut self, us: u64) {
        let place = Self::BOUNDS.iter().position(|&bound| us <= bound).unwrap_or(Self::BOUNDS.len());
        self.counts[place] += 1;
        self.sum_us += us;
    }
}

/// How things stand in the thread.
#[derive(Clone, Debug, Default)]
pub struct Snapshot {
    /// What it did.
    pub report: Report,
    /// Processes with armed functions.
    pub processes: u64,
    /// Armed functions in them.
    pub functions: u64,
    /// Interpreter files that are probed.
    pub interpreters: u64,
    /// Probes that are attached.
    pub probes: u64,
    /// Tracing is paused.
    pub paused: bool,
    /// How much load is shed.
    pub shedding: u8,
}

/// The running thread.
pub struct AttachThread {
    requests: mpsc::Sender<Request>,
    thread: JoinHandle<Report>,
}

/// Starts the thread.
pub fn start(
    kernel: Kernel,
    urgent: UrgentReader,
    catalogue: Arc<Catalogue>,
    trial: Trial,
    options: Options,
    news: mpsc::Sender<News>,
) -> Result<AttachThread, KernelError> {
    let (requests, inbox) = mpsc::channel();
    let mut attacher = attacher::Attacher::new(kernel, catalogue, trial, options, news)?;
    let thread = std::thread::Builder::new()
        .name("floe-attach".into())
        .spawn(move || attacher.run(urgent, &inbox))
        .expect("a thread can be started");
    Ok(AttachThread { requests, thread })
}

impl AttachThread {
    /// Where requests go.
    pub fn requests(&self) -> mpsc::Sender<Request> {
        self.requests.clone()
    }

    /// Selects the children of a process, or of none.
    pub fn select_children_of(&self, pid: Option<Pid>) -> Result<(), KernelError> {
        let (reply, answer) = mpsc::channel();
        // If the thread has ended there is nothing to select.
        let _ = self.requests.send(Request::SelectChildrenOf(pid, reply));
        answer.recv().unwrap_or(Ok(()))
    }

    /// Probes the interpreters among executables before they are run.
    pub fn prepare(&self, programs: Vec<Executable>) {
        let (reply, answer) = mpsc::channel();
        let _ = self.requests.send(Request::Prepare(programs, reply));
        let _ = answer.recv();
    }

    /// Attaches to a running process.
    pub fn attach(&self, pid: Pid) -> Result<Attached, AttachError> {
        let (reply, answer) = mpsc::channel();
        let _ = self.requests.send(Request::Attach(pid, reply));
        answer.recv().unwrap_or(Err(AttachError::NoProcess(pid)))
    }

    /// Ends the thread.
    pub fn stop(self) -> Report {
        let _ = self.requests.send(Request::Stop);
        self.thread.join().unwrap_or_default()
    }
}
