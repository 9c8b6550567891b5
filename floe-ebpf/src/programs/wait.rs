//! Probes in which the thread waits until user space has done something, at most for a bound.
//!
//! The wait is a bounded poll of a map. Each round reads one word of the process's own stack with
//! `bpf_copy_from_user_task`, which may sleep: where the kernel does not preempt (`preempt=none`), this is what lets the
//! agent's thread run on this CPU. The programs are therefore sleepable uprobes (Linux 6.0).

use core::ffi::c_void;

use aya_ebpf::{
    bindings::BPF_RB_FORCE_WAKEUP,
    helpers::{
        bpf_get_current_pid_tgid,
        generated::{
            bpf_copy_from_user_task, bpf_get_current_task_btf, bpf_ktime_get_boot_ns, bpf_loop, bpf_ringbuf_output,
        },
    },
    macros::{uprobe, uretprobe},
    programs::{ProbeContext, RetProbeContext},
};
use floe_ebpf::{ACK_SLOTS, Counter, MODULE_NAME_LEN, Urgent, process_flags, setting, urgent};

use crate::maps::{ACKS, PROCESSES, RENDEZVOUS, URGENT, add, count, settings};

/// Rounds of the poll at most (the kernel's limit for `bpf_loop` is 2^23); the clock ends it long before.
const ROUNDS: u32 = 1 << 22;

/// What a poll looks at.
#[repr(C)]
struct Wait {
    token: u64,
    /// 0 when the answer came.
    until: u64,
    stack: u64,
    scratch: u64,
}

unsafe extern "C" fn wait_step(_index: u32, wait: *mut c_void) -> i64 {
    // SAFETY: the context that `poll` passed.
    unsafe {
        let wait = &mut *wait.cast::<Wait>();
        if let Some(ack) = ACKS.get_ptr(bpf_get_current_pid_tgid() as u32 & (ACK_SLOTS - 1)) {
            if core::ptr::read_volatile(ack) == wait.token {
                wait.until = 0;
                return 1;
            }
        }
        if bpf_ktime_get_boot_ns() > wait.until {
            return 1;
        }
        let task = bpf_get_current_task_btf();
        bpf_copy_from_user_task((&raw mut wait.scratch).cast(), 8, wait.stack as *const c_void, task, 0);
        0
    }
}

/// Sends a record to user space at once; whether there was room.
#[inline(always)]
pub fn send(record: &mut Urgent) -> bool {
    // SAFETY: a plain helper call; the record is initialised.
    let sent = unsafe {
        bpf_ringbuf_output(
            (&raw const URGENT).cast_mut().cast(),
            core::ptr::from_mut(record).cast(),
            size_of::<Urgent>() as u64,
            u64::from(BPF_RB_FORCE_WAKEUP),
        )
    };
    if sent != 0 {
        count(Counter::LostUrgent);
    }
    sent == 0
}

/// Sends a request. Its token, or 0 if there was no room.
#[inline(always)]
pub fn submit(record: &mut Urgent) -> u64 {
    // SAFETY: a helper without arguments.
    record.token = unsafe { bpf_ktime_get_boot_ns() };
    if !send(record) {
        return 0;
    }
    count(Counter::Waits);
    record.token
}

#[inline(never)]
extern "C" fn request(kind: u32, epoch: u32, bound: u64, arg0: u64) -> u64 {
    submit(&mut record(kind, epoch, bound, arg0, 0))
}

/// Waits for the answer to a request, until a time; whether it came.
///
/// While a thread sleeps here, others run the same programs on this CPU. From Linux 6.13 on a function of a uprobe's
/// program that has 64 bytes of stack or more has them in memory of the CPU, not of the thread (`bpf_enable_priv_stack` in
/// kernel/bpf/verifier.c), so what it kept there would be another thread's afterwards. This function, and all that
/// call it, have less; what they need later is in maps or in registers.
#[inline(never)]
pub extern "C" fn poll(token: u64, until: u64, stack: u64) -> u32 {
    let mut wait = Wait { token, until, stack, scratch: 0 };
    // SAFETY: the callback and its context fit together; the context outlives the call.
    unsafe { bpf_loop(ROUNDS, wait_step as *mut c_void, (&raw mut wait).cast(), 0) };
    u32::from(wait.until == 0)
}

/// Counts a wait that is over.
#[inline(never)]
pub extern "C" fn waited(token: u64, done: u32) -> u32 {
    // SAFETY: a helper without arguments.
    add(Counter::WaitNanos, unsafe { bpf_ktime_get_boot_ns() } - token);
    if done == 0 {
        count(Counter::WaitTimeouts);
    }
    done
}

/// Sends a request and waits for the answer. Whether it came.
#[inline(always)]
fn ask(kind: u32, epoch: u32, bound: u64, arg0: u64, stack: u64) -> u32 {
    match request(kind, epoch, bound, arg0) {
        0 => 0,
        token => waited(token, poll(token, token + bound, stack)),
    }
}

/// A record of this kind for the current thread.
#[inline(always)]
pub fn record(kind: u32, epoch: u32, bound: u64, arg0: u64, arg1: u64) -> Urgent {
    let id = bpf_get_current_pid_tgid();
    Urgent {
        kind,
        tgid: (id >> 32) as u32,
        tid: id as u32,
        epoch,
        token: 0,
        bound,
        arg0,
        arg1,
        name: [0; MODULE_NAME_LEN],
    }
}

#[inline(always)]
fn tgid() -> u32 {
    (bpf_get_current_pid_tgid() >> 32) as u32
}

/// The epoch of this process, if it is selected.
#[inline(always)]
fn selected() -> Option<u32> {
    // SAFETY: the map is not resized; a value that changes meanwhile is a flag or an identity that is checked again.
    let process = unsafe { PROCESSES.get(tgid()) }?;
    if process.flags & process_flags::SELECTED == 0 { None } else { Some(process.epoch) }
}

/// `Py_RunMain`: the interpreter is initialised, no user code has run.
#[uprobe(sleepable)]
pub fn run_main(ctx: ProbeContext) -> u32 {
    start(&ctx);
    0
}

#[inline(always)]
fn start(ctx: &ProbeContext) -> Option<()> {
    let settings = settings()?;
    // SAFETY: the context's registers.
    let stack = unsafe { (*ctx.regs).rsp };
    let mut epoch = selected();
    if epoch.is_none() && settings.flags & setting::NODE != 0 {
        count(Counter::Decisions);
        ask(urgent::DECIDE, 0, settings.module_wait, 0, stack);
        epoch = selected();
    }
    let Some(epoch) = epoch else {
        count(Counter::RunMainForeign);
        return None;
    };
    count(Counter::RunMain);
    ask(urgent::RUN_MAIN, epoch, settings.long_wait, 0, stack);
    Some(())
}

/// A function that switches C stacks is called: wait until nothing is armed any more.
#[uprobe(sleepable)]
pub fn stack_switch(ctx: ProbeContext) -> u32 {
    // SAFETY: as in `run_main`.
    let Some(process) = (unsafe { PROCESSES.get(tgid()) }) else { return 0 };
    if process.flags & process_flags::READY == 0 || process.flags & process_flags::SWITCHES_STACKS != 0 {
        return 0;
    }
    count(Counter::Switches);
    let Some(settings) = settings() else { return 0 };
    // SAFETY: the context's registers.
    ask(urgent::SWITCH, process.epoch, settings.long_wait, 0, unsafe { (*ctx.regs).rsp });
    0
}

/// `sys.setrecursionlimit` or `_thread.stack_size` is called in a process with `eval_frame` set.
#[uprobe(sleepable)]
pub fn stack_config(ctx: ProbeContext) -> u32 {
    // SAFETY: as in `run_main`.
    let Some(process) = (unsafe { PROCESSES.get(tgid()) }) else { return 0 };
    if process.flags & process_flags::GUARD_STACK == 0 {
        return 0;
    }
    let Some(settings) = settings() else { return 0 };
    // SAFETY: the context's registers.
    let (argument, rsp) = unsafe { ((*ctx.regs).rsi, (*ctx.regs).rsp) };
    ask(urgent::STACK_CONFIG, process.epoch, settings.long_wait, argument, rsp);
    0
}

/// A function that is only called with the GIL held: the meeting point that user space asked for.
#[uprobe(sleepable)]
pub fn rendezvous(ctx: ProbeContext) -> u32 {
    // SAFETY: the context's registers.
    meet(unsafe { (*ctx.regs).rsp });
    0
}

/// The same at the return of a function that takes the GIL.
#[uretprobe(sleepable)]
pub fn rendezvous_return(ctx: RetProbeContext) -> u32 {
    // SAFETY: the context's registers.
    meet(unsafe { (*ctx.regs).rsp });
    0
}

#[inline(always)]
fn meet(stack: u64) {
    let tgid = tgid();
    if RENDEZVOUS.remove(tgid).is_err() {
        return; // not wanted, or another thread was first
    }
    // SAFETY: as in `run_main`.
    let Some(process) = (unsafe { PROCESSES.get(tgid) }) else { return };
    let Some(settings) = settings() else { return };
    ask(urgent::RENDEZVOUS, process.epoch, settings.long_wait, 0, stack);
}
