//! `floe-agent exec`: runs a command and traces it.

use std::{
    ffi::OsString,
    os::unix::process::{CommandExt as _, ExitStatusExt as _},
    path::Path,
    process::{Command, ExitStatus},
};

use anyhow::{Context as _, Result};
use tokio::signal::unix::{SignalKind, signal};

use super::{TraceOptions, session::Session};
use crate::{process::launch::Launch, units::Pid};

pub(super) fn run(options: &TraceOptions, command: &[OsString]) -> Result<u8> {
    let config = super::config::of_trace(options)?;
    if config.disabled {
        tracing::warn!("tracing is disabled (`disabled`, OTEL_SDK_DISABLED): the command runs without it");
        let (program, arguments) = command.split_first().context("no command given")?;
        let error = Command::new(program).args(arguments).exec();
        return Err(error).with_context(|| cannot_run(program));
    }
    let session = Session::start(options, &config)?;
    match supervise(&session, command) {
        Ok(status) => {
            session.finish()?;
            Ok(exit_code(status))
        }
        Err(error) => {
            session.abandon();
            Err(error)
        }
    }
}

/// Starts the command, passes signals on, and waits for it.
fn supervise(session: &Session, command: &[OsString]) -> Result<ExitStatus> {
    let (program, arguments) = command.split_first().context("no command given")?;
    let runtime = session.runtime();
    let (mut interrupt, mut terminate) = {
        let _inside = runtime.enter();
        (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?)
    };
    let path = std::env::var_os("PATH").unwrap_or_default();
    let folder = std::env::current_dir().unwrap_or_default();
    let launch = Launch { words: command, path: &path, folder: &folder, root: Path::new("/") };
    session.attach.prepare(launch.executables());
    // The fork program selects the child in the moment it is made: not one instruction of it is missed.
    session.attach.select_children_of(Some(Pid(std::process::id())))?;
    let child = Command::new(program).args(arguments).spawn();
    session.attach.select_children_of(None)?;
    let mut child = child.with_context(|| cannot_run(program))?;
    let pid = child.id().cast_signed();
    let (done, mut ended) = tokio::sync::oneshot::channel();
    let waiter = std::thread::spawn(move || {
        let _ = done.send(child.wait());
    });
    let status = runtime.block_on(async {
        loop {
            tokio::select! {
                status = &mut ended => return status,
                // The terminal sends Ctrl-C to the command as well; the agent stays to see how it ends.
                _ = interrupt.recv() => {}
                _ = terminate.recv() => {
                    // SAFETY: a plain system call; the child is not reaped before `ended`.
                    unsafe { libc::kill(pid, libc::SIGTERM) };
                }
            }
        }
    });
    let _ = waiter.join();
    Ok(status.context("the command could not be waited for")??)
}

fn cannot_run(program: &OsString) -> String {
    format!("cannot run `{}`; check the command's name and that it is in PATH", program.to_string_lossy())
}

/// As a shell gives it: 128 and the signal's number if a signal ended it.
fn exit_code(status: ExitStatus) -> u8 {
    match (status.code(), status.signal()) {
        (Some(code), _) => code as u8,
        (None, Some(signal)) => 128u8.wrapping_add(signal as u8),
        (None, None) => 1,
    }
}
