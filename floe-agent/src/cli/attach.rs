//! `floe-agent attach`: traces a running process until it ends or a signal comes.

use std::os::fd::OwnedFd;

use anyhow::{Result, ensure};
use rustix::{
    event::{PollFd, PollFlags, poll},
    process::{Pid as OsPid, PidfdFlags, pidfd_open},
};
use tokio::signal::unix::{SignalKind, signal};

use super::{TraceOptions, session::Session};
use crate::{attach::AttachError, units::Pid};

pub(super) fn run(options: &TraceOptions, pid: u32) -> Result<u8> {
    // Before anything else: it pins the process, so that its number cannot come to mean another one.
    let process = i32::try_from(pid)
        .ok()
        .and_then(OsPid::from_raw)
        .and_then(|pid| pidfd_open(pid, PidfdFlags::empty()).ok())
        .ok_or(AttachError::NoProcess(Pid(pid)))?;
    let config = super::config::of_trace(options)?;
    ensure!(!config.disabled, "tracing is disabled (`disabled`, OTEL_SDK_DISABLED); set it to false to attach");
    super::raise_file_limit();
    let session = Session::start(options, &config)?;
    let attached = match session.attach.attach(Pid(pid)) {
        Ok(attached) => attached,
        Err(error) => {
            session.abandon();
            return Err(error.into());
        }
    };
    eprintln!("floe-agent: tracing process {pid} (CPython {}); Ctrl-C ends it", attached.python_version);
    let waited = session.runtime().block_on(until_end(process));
    session.finish()?;
    waited?;
    Ok(0)
}

/// Waits until the process ends or the user wants to end.
async fn until_end(process: OwnedFd) -> Result<()> {
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let (ended_in, ended) = tokio::sync::oneshot::channel();
    // Ends with the process; if the user ends first, with the agent.
    std::thread::spawn(move || {
        while poll(&mut [PollFd::new(&process, PollFlags::IN)], None).is_err() {}
        let _ = ended_in.send(());
    });
    tokio::select! {
        _ = ended => {}
        _ = interrupt.recv() => {}
        _ = terminate.recv() => {}
    }
    Ok(())
}
