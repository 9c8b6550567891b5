//! Fork, exec and exit of processes that are traced or may be.

use aya_ebpf::{
    bindings::{BPF_ANY, BPF_RB_FORCE_WAKEUP, BPF_RB_NO_WAKEUP},
    helpers::{
        bpf_get_current_pid_tgid,
        generated::{bpf_get_current_task, bpf_ktime_get_boot_ns, bpf_probe_read_kernel, bpf_ringbuf_output},
    },
    macros::raw_tracepoint,
    programs::RawTracePointContext,
};
use floe_ebpf::{Counter, Header, MAX_ANCESTORS, ProcessEvent, ProcessInfo, event, process_flags, setting, urgent};

use crate::{
    maps::{EVENTS, PROCESSES, THREADS, count, next_epoch, settings},
    programs::wait::{self, record},
};

/// Reads a field of a kernel structure; 0 if that fails.
#[inline(always)]
fn kernel<T: Copy + Default>(base: u64, offset: u32) -> T {
    let mut value = T::default();
    // SAFETY: the helper checks the address; `T` is an integer.
    unsafe {
        bpf_probe_read_kernel(
            (&raw mut value).cast(),
            size_of::<T>() as u32,
            (base + u64::from(offset)) as *const core::ffi::c_void,
        );
    }
    value
}

#[inline(always)]
fn ids() -> (u32, u32) {
    let id = bpf_get_current_pid_tgid();
    ((id >> 32) as u32, id as u32)
}

#[inline(always)]
fn now() -> u64 {
    // SAFETY: a helper without arguments.
    unsafe { bpf_ktime_get_boot_ns() }
}

#[inline(always)]
fn send(mut event: ProcessEvent, wake: u32) {
    // SAFETY: the record is initialised.
    let result = unsafe {
        bpf_ringbuf_output(
            (&raw const EVENTS).cast_mut().cast(),
            (&raw mut event).cast(),
            size_of::<ProcessEvent>() as u64,
            u64::from(wake),
        )
    };
    if result != 0 {
        count(Counter::LostEvents);
    }
}

/// A task is created; `args` are the parent and the child.
#[raw_tracepoint(tracepoint = "sched_process_fork")]
pub fn process_fork(ctx: RawTracePointContext) -> i32 {
    forked(&ctx);
    0
}

#[inline(always)]
fn forked(ctx: &RawTracePointContext) -> Option<()> {
    let (tgid, tid) = ids();
    let settings = settings()?;
    let parent = PROCESSES.get_ptr(tgid);
    if parent.is_none() && settings.select_children_of != tgid {
        return None;
    }
    let child: u64 = ctx.arg(1);
    let pid = kernel::<u32>(child, settings.task_pid);
    let child_tgid = kernel::<u32>(child, settings.task_tgid);
    if pid != child_tgid {
        return thread_started(tgid, tid, pid);
    }
    let time = now();
    let mut info = ProcessInfo::selected(next_epoch(), time);
    let mut epoch = 0;
    if let Some(parent) = parent {
        // SAFETY: a map value.
        let parent = unsafe { &*parent };
        epoch = parent.epoch;
        info.flags = parent.flags;
        info.layout = parent.layout;
        info.none = parent.none;
        info.str_type = parent.str_type;
        info.float_type = parent.float_type;
        info.bool_type = parent.bool_type;
        info.member_type = parent.member_type;
        info.tstate = parent.tstate;
        if parent.flags & process_flags::READY != 0 {
            info.ancestors[0] = parent.epoch;
            for i in 1..MAX_ANCESTORS {
                info.ancestors[i] = parent.ancestors[i - 1];
            }
        }
    }
    if PROCESSES.insert(child_tgid, &info, u64::from(BPF_ANY)).is_err() {
        count(Counter::TableFull);
        return None;
    }
    let header = Header { kind: event::FORK, flags: 0, lost: 0, tgid, tid, epoch, time };
    send(ProcessEvent { header, other: child_tgid, other_epoch: info.epoch, code: 0 }, BPF_RB_NO_WAKEUP);
    Some(())
}

/// An armed process starts a thread: what that does belongs to what the starting one does.
#[inline(always)]
fn thread_started(tgid: u32, tid: u32, child: u32) -> Option<()> {
    // SAFETY: a map value.
    let process = unsafe { &*PROCESSES.get_ptr(tgid)? };
    if process.flags & process_flags::READY == 0 {
        return None;
    }
    let header = Header { kind: event::THREAD, flags: 0, lost: 0, tgid, tid, epoch: process.epoch, time: now() };
    send(ProcessEvent { header, other: child, other_epoch: 0, code: 0 }, BPF_RB_NO_WAKEUP);
    Some(())
}

/// A process has a new program; `args` are the task, its former thread id, and the program.
#[raw_tracepoint(tracepoint = "sched_process_exec")]
pub fn process_exec(ctx: RawTracePointContext) -> i32 {
    executed(&ctx);
    0
}

#[inline(always)]
fn executed(ctx: &RawTracePointContext) -> Option<()> {
    let (tgid, tid) = ids();
    let process = PROCESSES.get_ptr(tgid);
    // SAFETY: a map value.
    let selected = process.is_some_and(|process| unsafe { (*process).flags } & process_flags::SELECTED != 0);
    if !selected {
        if process.is_some() {
            // It was let go of, and has another memory now.
            let _ = THREADS.remove(tid);
            let _ = PROCESSES.remove(tgid);
        }
        if settings()?.flags & setting::NODE != 0 {
            count(Counter::Execs);
            report_exec(0, now());
        }
        return None;
    }
    let old: u32 = ctx.arg(1);
    let _ = THREADS.remove(tid);
    let _ = THREADS.remove(old);
    let time = now();
    let info = ProcessInfo::selected(next_epoch(), time);
    let _ = PROCESSES.insert(tgid, &info, u64::from(BPF_ANY));
    let header = Header { kind: event::EXEC, flags: 0, lost: 0, tgid, tid, epoch: info.epoch, time };
    send(ProcessEvent { header, other: 0, other_epoch: 0, code: 0 }, BPF_RB_NO_WAKEUP);
    report_exec(info.epoch, time);
    Some(())
}

/// Tells user space of a new program. Nobody waits.
#[inline(always)]
fn report_exec(epoch: u32, time: u64) {
    let mut record = record(urgent::EXEC, epoch, 0, 0, 0);
    record.token = time;
    wait::send(&mut record);
}

/// A task ends.
#[raw_tracepoint(tracepoint = "sched_process_exit")]
pub fn process_exit(_ctx: RawTracePointContext) -> i32 {
    exited();
    0
}

#[inline(always)]
fn exited() -> Option<()> {
    let (tgid, tid) = ids();
    // SAFETY: a map value that only this process and user space change.
    let epoch = unsafe { (*PROCESSES.get_ptr(tgid)?).epoch };
    let settings = settings()?;
    // SAFETY: a helper without arguments.
    let task = unsafe { bpf_get_current_task() };
    let signal = kernel::<u64>(task, settings.task_signal);
    let live = kernel::<u32>(signal, settings.signal_live);
    let known = THREADS.remove(tid).is_ok();
    if !known && live != 0 {
        return None;
    }
    let code = kernel::<u32>(task, settings.task_exit_code);
    let header = Header { kind: event::EXIT, flags: 0, lost: 0, tgid, tid, epoch, time: now() };
    send(
        ProcessEvent { header, other: u32::from(live == 0), other_epoch: 0, code: u64::from(code) },
        if live == 0 { BPF_RB_FORCE_WAKEUP } else { BPF_RB_NO_WAKEUP },
    );
    if live == 0 {
        let _ = PROCESSES.remove(tgid);
    }
    Some(())
}
