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
//! * `attacher`: the thread itself.

mod attacher;
mod files;
mod guards;
pub mod survey;
mod traced;

use std::{
    sync::{Arc, mpsc},
    thread::JoinHandle,
};

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
    /// How long processes wait.
    pub bounds: WaitBounds,
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
    /// An exception was read while its thread waited: it leaves this call, or comes into it if it is an `__exit__`.
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

/// What the thread did.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Report {
    /// Verdicts, in order.
    pub processes: Vec<Verdict>,
    /// Functions armed.
    pub functions_armed: u64,
    /// Functions disarmed because their calls were nested too deep.
    pub functions_disarmed: u64,
    /// Answers that came after the waiting thread had gone on.
    pub late_answers: u64,
    /// Longest time to an answer, in microseconds.
    pub slowest_answer_us: u64,
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
