//! The gate: entry and return of armed functions.

use aya_ebpf::{
    bindings::{BPF_ANY, BPF_RB_FORCE_WAKEUP, BPF_RB_NO_WAKEUP},
    helpers::{
        bpf_get_current_pid_tgid,
        generated::{bpf_ktime_get_boot_ns, bpf_ringbuf_output, bpf_ringbuf_query},
    },
    macros::{uprobe, uretprobe},
    programs::{ProbeContext, RetProbeContext},
};
use floe_ebpf::{
    CallEnter, CallReturn, ContextKey, Counter, FunctionInfo, FunctionKey, Header, Layout, MAX_ANCESTORS, MAX_DEPTH,
    MAX_STACK, MODULE_NAME_LEN, NO_PLAN, enter_flags, event, function_flags, module_wait, outcome, process_flags,
    setting, urgent,
};

use crate::{
    capture::run,
    maps::{
        CONTEXTS, EVENTS, FUNCTIONS, Frame, IMPORT, MODULES, NEAR_ARGUMENTS, NEW_THREAD, PROCESSES, THREADS, Thread,
        WANTED_IMPORT, count, layout, settings,
    },
    programs::wait::{ask, record},
    python::{OB_SIZE, exception, is_control_flow},
    user::{ARGUMENTS, masked, pointer, read, read_bytes},
};

/// Waits of a thread that may run into their bound before it stops waiting for deep recursion.
const PATIENCE: u64 = 4;
/// Of how many nanoseconds a thread may wait one for its exceptions to be read, and how many it may save up.
const EXCEPTION_SHARE: u64 = 100;
const EXCEPTION_SAVINGS: i64 = 100_000_000;
/// Waits are halved at most so often.
const MAX_HALVINGS: u64 = 6;

/// The state of the current thread, if its process is traced.
#[inline(always)]
fn thread(tgid: u32, tid: u32) -> Option<*mut Thread> {
    if let Some(thread) = THREADS.get_ptr_mut(tid) {
        // SAFETY: the value belongs to this thread.
        if unsafe { (*thread).process.epoch } != 0 {
            return Some(thread);
        }
    }
    new_thread(tgid, tid)
}

#[inline(always)]
fn new_thread(tgid: u32, tid: u32) -> Option<*mut Thread> {
    let process = PROCESSES.get_ptr(tgid)?;
    // SAFETY: a map value.
    if unsafe { (*process).flags } & process_flags::READY == 0 {
        return None;
    }
    let empty = NEW_THREAD.get(0)?;
    if THREADS.insert(tid, empty, u64::from(BPF_ANY)).is_err() {
        count(Counter::TableFull);
        return None;
    }
    let thread = THREADS.get_ptr_mut(tid)?;
    // SAFETY: the value belongs to this thread.
    unsafe { (*thread).process = *process };
    Some(thread)
}

/// The armed function at this address, in this process or in one it was forked from.
#[inline(always)]
fn function_info(thread: *mut Thread, function: u64) -> Option<FunctionInfo> {
    // SAFETY: `thread` is a map value; entries of FUNCTIONS are freed after a grace period only.
    unsafe {
        let mut key = FunctionKey { epoch: (*thread).process.epoch, reserved: 0, function };
        if let Some(info) = FUNCTIONS.get(key) {
            return Some(*info);
        }
        for i in 0..MAX_ANCESTORS {
            let epoch = (*thread).process.ancestors[i];
            if epoch == 0 {
                return None;
            }
            key.epoch = epoch;
            if let Some(info) = FUNCTIONS.get(key) {
                return Some(*info);
            }
        }
    }
    None
}

/// Drops frames whose C frame is gone: the stack grows down, so they are the ones at or below `sp`.
#[inline(always)]
fn drop_stale(thread: *mut Thread, sp: u64) {
    // SAFETY: `thread` is a map value; the index is masked.
    unsafe {
        let mut depth = (*thread).depth;
        let mut i = 0;
        while i < MAX_STACK {
            if depth == 0 {
                break;
            }
            let top = Thread::frame(thread, masked!(depth - 1, 63));
            if (*top).sp > sp {
                break;
            }
            if (*top).probe < WANTED_IMPORT {
                (*thread).calls = (*thread).calls.wrapping_sub(1);
            }
            count(Counter::MissedReturns);
            depth -= 1;
            i += 1;
        }
        (*thread).depth = depth;
    }
}

#[inline(always)]
fn push(thread: *mut Thread, frame: Frame) -> bool {
    // SAFETY: `thread` is a map value; the index is masked.
    unsafe {
        let depth = (*thread).depth;
        if depth >= MAX_STACK as u64 {
            return false;
        }
        *Thread::frame(thread, masked!(depth, 63)) = frame;
        (*thread).depth = depth + 1;
        if frame.probe < WANTED_IMPORT {
            (*thread).calls += 1;
        }
    }
    true
}

/// Sends the first `len` bytes of the thread's record.
#[inline(always)]
fn send(thread: *mut Thread, len: u64) {
    let Some(settings) = settings() else { return };
    let map = (&raw const EVENTS).cast_mut().cast();
    let len = masked!(len, 16383);
    // SAFETY: the record is larger than the masked length.
    unsafe {
        let waiting = bpf_ringbuf_query(map, 0);
        let flags = if waiting >= u64::from(settings.wake_at) { BPF_RB_FORCE_WAKEUP } else { BPF_RB_NO_WAKEUP };
        if bpf_ringbuf_output(map, Thread::record(thread).cast(), len, u64::from(flags)) == 0 {
            (*thread).lost = 0;
        } else {
            (*thread).lost += 1;
            count(Counter::LostEvents);
        }
    }
}

#[inline(always)]
fn header(thread: *mut Thread, kind: u8, tgid: u32, tid: u32, time: u64) -> Header {
    // SAFETY: `thread` is a map value.
    let (lost, epoch) = unsafe { ((*thread).lost, (*thread).process.epoch) };
    let lost = if lost > 0xffff { 0xffff } else { lost as u16 };
    Header { kind, flags: 0, lost, tgid, tid, epoch, time }
}

/// The name of a module object into `thread.name`; whether it could be read and fits.
#[inline(always)]
fn module_name(thread: *mut Thread, layout: &Layout, module: u64) -> bool {
    // SAFETY: `thread` is a map value; the length is bounded and masked below the name's size.
    unsafe {
        // Word by word: `memset` is a call and a loop, which the verifier walks each time.
        let words = (&raw mut (*thread).name).cast::<u64>();
        let mut i = 0;
        while i < MODULE_NAME_LEN / 8 {
            words.add(i).write_volatile(0);
            i += 1;
        }
        let Some(name) = pointer(module + u64::from(layout.module_name)) else { return false };
        let Some(len) = read::<u64>(name + OB_SIZE) else { return false };
        let Some(state) = read::<u32>(name + u64::from(layout.str_state)) else { return false };
        if len == 0 || len >= MODULE_NAME_LEN as u64 || state & 0x60 != 0x60 {
            return false;
        }
        // Two reads, so that the verifier sees a bound that is not a power of two.
        let data = name + u64::from(layout.str_ascii_data);
        let text = (&raw mut (*thread).name).cast::<u8>();
        let first = if len > 63 { 63 } else { len };
        if !read_bytes(text, masked!(first, 63) as u32, data) {
            return false;
        }
        if len > 63 {
            return read_bytes(text.add(63), masked!(len - 63, 31) as u32 + 1, data + 63) && {
                // One byte more was read than the name has; it is cut again.
                let end = if len > 95 { 95 } else { len };
                *text.add(masked!(end, 127) as usize) = 0;
                true
            };
        }
        true
    }
}

/// A call of importlib's `exec_module(self, module)`.
#[inline(always)]
fn enter_import(thread: *mut Thread, layout: &Layout, frame: Frame) {
    count(Counter::LoaderHits);
    let mut frame = frame;
    frame.probe = IMPORT;
    frame.exit_plan = NO_PLAN;
    frame.function = 0;
    if let Some(module) = pointer(frame.args + 8) {
        // SAFETY: `thread` is a map value.
        let wanted = module_name(thread, layout, module) && unsafe { MODULES.get(&(*thread).name).is_some() };
        if wanted {
            frame.probe = WANTED_IMPORT;
            frame.function = module;
        }
    }
    if !push(thread, frame) && frame.probe == WANTED_IMPORT {
        count(Counter::DeepImports);
        // SAFETY: `thread` is a map value.
        unsafe { (*thread).deep_import = 1 };
    }
}

/// A wait that is halved with each that was in vain.
#[inline(always)]
fn halved(bound: u64, timeouts: u64) -> u64 {
    bound >> if timeouts > MAX_HALVINGS { MAX_HALVINGS } else { timeouts }
}

/// Asks user space, and waits at most `bound`; whether the answer came. The stack is too small for a record in each of
/// the places where a call may wait.
#[inline(never)]
extern "C" fn wait(thread: *const Thread, kind: u32, bound: u64, arg0: u64, arg1: u64) -> u32 {
    // SAFETY: a map value that belongs to this thread.
    let (epoch, sp) = unsafe { ((*thread).process.epoch, (*thread).sp) };
    let mut record = record(kind, epoch, bound, arg0, arg1);
    ask(&mut record, sp)
}

/// Lets user space read an exception, while this thread waits, if it has not waited too much for such yet.
#[inline(always)]
fn read_exception(thread: *mut Thread, layout: &Layout, type_: u64, call: u64, arguments: u64) -> Option<()> {
    if is_control_flow(layout, type_) {
        return None;
    }
    // SAFETY: a helper without arguments.
    let now = unsafe { bpf_ktime_get_boot_ns() };
    // SAFETY: `thread` is a map value.
    let (credit, timeouts) = unsafe {
        let earned = (now - (*thread).exception_time) / EXCEPTION_SHARE;
        (*thread).exception_time = now;
        // The clock began at 0: a new thread has all it can have.
        let credit = (*thread).exception_credit.wrapping_add(earned as i64);
        (if credit > EXCEPTION_SAVINGS { EXCEPTION_SAVINGS } else { credit }, (*thread).exception_timeouts)
    };
    if credit <= 0 {
        // SAFETY: `thread` is a map value.
        unsafe { (*thread).exception_credit = credit };
        count(Counter::ExceptionsUnread);
        return None;
    }
    let answered =
        wait(thread, urgent::EXCEPTION, halved(settings()?.exception_wait, timeouts), call, arguments) as u64;
    // SAFETY: `thread` is a map value; a helper without arguments.
    unsafe {
        (*thread).exception_credit = credit - (bpf_ktime_get_boot_ns() - now) as i64;
        (*thread).exception_timeouts = timeouts + 1 - answered;
    }
    Some(())
}

/// Reads the first positional arguments, and gives the first, or 0.
#[inline(always)]
fn first_arguments(thread: *mut Thread, args: u64, count: u64) -> u64 {
    // SAFETY: `thread` is a map value, and the length that of the field.
    unsafe {
        (*thread).arguments_read = 0;
        if count == 0 {
            return 0;
        }
        let arguments = (&raw mut (*thread).arguments).cast::<u64>();
        if !read_bytes(arguments.cast(), 8 * NEAR_ARGUMENTS as u32, args) {
            return pointer(args).unwrap_or(0); // the end of the memory is near
        }
        (*thread).arguments_read = NEAR_ARGUMENTS as u64;
        *arguments
    }
}

/// An armed function is called.
#[uprobe(sleepable)]
pub fn gate_enter(ctx: ProbeContext) -> u32 {
    enter(&ctx);
    0
}

#[inline(always)]
fn enter(ctx: &ProbeContext) -> Option<()> {
    // SAFETY: the registers of the context, as the System V ABI and the vectorcall convention use them.
    let (function, args, nargsf, kwnames, sp) =
        unsafe { ((*ctx.regs).rdi, (*ctx.regs).rsi, (*ctx.regs).rdx, (*ctx.regs).rcx, (*ctx.regs).rsp) };
    let id = bpf_get_current_pid_tgid();
    let (tgid, tid) = ((id >> 32) as u32, id as u32);
    let Some(thread) = thread(tgid, tid) else {
        count(Counter::GateForeign);
        return None;
    };
    count(Counter::GateHits);
    let Some(info) = function_info(thread, function) else {
        count(Counter::UnknownFunction);
        return None;
    };
    let how = settings()?.flags;
    if info.flags & function_flags::DISARMED != 0 || how & setting::PAUSED != 0 {
        return None;
    }
    if info.flags & function_flags::SHED != 0 {
        count(Counter::ShedCalls);
        return None;
    }
    let layout = layout(thread)?;
    if read::<u64>(function + u64::from(layout.function_code)) != Some(info.code) {
        count(Counter::OtherCode);
        return None;
    }
    drop_stale(thread, sp);
    // SAFETY: a helper without arguments.
    let time = unsafe { bpf_ktime_get_boot_ns() };
    let (probe, exit_plan, traits) = (info.probe, info.exit_plan, info.flags);
    let frame = Frame { sp, time, function, args, nargsf, kwnames, probe, exit_plan, flags: traits, reserved: 0 };
    if traits & function_flags::LOADER != 0 {
        enter_import(thread, layout, frame);
        return Some(());
    }
    let object = first_arguments(thread, args, nargsf & ARGUMENTS);
    // SAFETY: `thread` is a map value.
    let epoch = unsafe { (*thread).process.epoch };
    if traits & function_flags::CONTEXT_EXIT != 0 && CONTEXTS.remove(ContextKey { epoch, reserved: 0, object }).is_err()
    {
        return None;
    }
    // SAFETY: `thread` is a map value.
    let (depth, calls) = unsafe {
        (*thread).sp = sp;
        ((*thread).depth, (*thread).calls)
    };
    let mut flags = 0;
    if calls >= u64::from(MAX_DEPTH) || depth >= MAX_STACK as u64 {
        count(Counter::TooDeep);
        flags = enter_flags::RECURSION;
        // SAFETY: `thread` is a map value.
        if unsafe { (*thread).timeouts } < PATIENCE {
            let bound = settings()?.long_wait;
            if wait(thread, urgent::RECURSION, bound, function, 0) == 0 {
                // SAFETY: `thread` is a map value.
                unsafe { (*thread).timeouts += 1 };
            }
        }
    }
    if !push(thread, frame) {
        return None;
    }
    count(Counter::Calls);
    if traits & function_flags::SCAN != 0 {
        // SAFETY: `thread` is a map value.
        let timeouts = unsafe { (*thread).timeouts };
        if wait(thread, urgent::SCAN, halved(settings()?.module_wait, timeouts), u64::from(probe), 0) == 0 {
            // SAFETY: `thread` is a map value.
            unsafe { (*thread).timeouts += 1 };
        }
    }
    if traits & (function_flags::CONTEXT_EXIT | function_flags::STACKTRACE)
        == (function_flags::CONTEXT_EXIT | function_flags::STACKTRACE)
    {
        // __exit__(self, type, value, traceback)
        let type_ = pointer(args + 8).unwrap_or(0);
        // SAFETY: `thread` is a map value.
        if type_ != 0 && type_ != unsafe { (*thread).process.none } {
            read_exception(thread, layout, type_, time, args);
        }
    }

    let mut len = size_of::<CallEnter>() as u64;
    if info.enter_plan != NO_PLAN && how & setting::NO_FIELDS != 0 {
        count(Counter::ShedPlans);
        flags |= enter_flags::FIELDS_CUT;
    } else if info.enter_plan != NO_PLAN {
        // SAFETY: `thread` is a map value.
        unsafe {
            (*thread).call.function = function;
            (*thread).call.args = args;
            (*thread).call.nargsf = nargsf;
            (*thread).call.kwnames = kwnames;
            (&raw mut (*thread).call.result).write_volatile(0);
            (&raw mut (*thread).call.raised).write_volatile(0);
        }
        let (end, cut) = run(thread, info.enter_plan, len);
        len = end;
        if cut {
            flags |= enter_flags::FIELDS_CUT;
        }
    }
    let enter = CallEnter {
        header: header(thread, event::ENTER, tgid, tid, time),
        probe: info.probe,
        depth: calls as u32,
        fields: (len - size_of::<CallEnter>() as u64) as u32,
        flags,
        object,
    };
    // SAFETY: `thread` is a map value; the record begins with room for any of the heads.
    unsafe { Thread::record(thread).cast::<CallEnter>().write(enter) };
    send(thread, len);
    Some(())
}

/// An armed function returns.
#[uretprobe(sleepable)]
pub fn gate_return(ctx: RetProbeContext) -> u32 {
    leave(&ctx);
    0
}

#[inline(always)]
fn leave(ctx: &RetProbeContext) -> Option<()> {
    let id = bpf_get_current_pid_tgid();
    let (tgid, tid) = ((id >> 32) as u32, id as u32);
    let thread = THREADS.get_ptr_mut(tid)?;
    // SAFETY: the registers of the context. `ret` has popped the return address.
    let (result, sp) = unsafe { ((*ctx.regs).rax, (*ctx.regs).rsp - 8) };
    // SAFETY: `thread` is a map value.
    unsafe {
        (*thread).sp = sp;
        (*thread).arguments_read = 0;
    }
    // Frames strictly below `sp` are gone without a return probe.
    drop_stale(thread, sp - 1);
    // SAFETY: `thread` is a map value; the index is masked.
    let frame = unsafe {
        let depth = (*thread).depth;
        if depth == 0 {
            return None;
        }
        let frame = Thread::frame(thread, masked!(depth - 1, 63));
        if (*frame).sp != sp {
            return None;
        }
        (*thread).depth = depth - 1;
        &*frame
    };
    let layout = layout(thread)?;
    if frame.probe >= WANTED_IMPORT {
        leave_import(thread, frame.probe, frame.function, result);
        return None;
    }
    // SAFETY: `thread` is a map value.
    unsafe { (*thread).calls = (*thread).calls.wrapping_sub(1) };
    count(Counter::Returns);
    // SAFETY: a helper without arguments.
    let time = unsafe { bpf_ktime_get_boot_ns() };
    if result == 0 {
        if frame.flags & function_flags::STACKTRACE != 0
            && let Some(type_) = exception(thread, layout, true)
        {
            read_exception(thread, layout, type_, frame.time, 0);
        }
    } else if frame.flags & function_flags::CONTEXT_MANAGER != 0 {
        // SAFETY: `thread` is a map value.
        let key = ContextKey { epoch: unsafe { (*thread).process.epoch }, reserved: 0, object: result };
        if CONTEXTS.insert(key, frame.probe, u64::from(BPF_ANY)).is_err() {
            count(Counter::TableFull);
        }
    }
    let mut len = size_of::<CallReturn>() as u64;
    let mut flags = 0;
    if frame.exit_plan != NO_PLAN && settings()?.flags & setting::NO_FIELDS != 0 {
        count(Counter::ShedPlans);
        flags |= enter_flags::FIELDS_CUT;
    } else if frame.exit_plan != NO_PLAN {
        // SAFETY: `thread` is a map value.
        unsafe {
            (*thread).call.function = frame.function;
            (*thread).call.args = frame.args;
            (*thread).call.nargsf = frame.nargsf;
            (*thread).call.kwnames = frame.kwnames;
            (*thread).call.result = result;
            (*thread).call.raised = u64::from(result == 0);
        }
        let (end, cut) = run(thread, frame.exit_plan, len);
        len = end;
        if cut {
            flags |= enter_flags::FIELDS_CUT;
        }
    }
    let leave = CallReturn {
        header: header(thread, event::RETURN, tgid, tid, time),
        call: frame.time,
        probe: frame.probe,
        outcome: if result == 0 { outcome::RAISED } else { outcome::RETURNED },
        fields: (len - size_of::<CallReturn>() as u64) as u32,
        flags,
        object: result,
    };
    // SAFETY: `thread` is a map value; the record begins with room for any of the heads.
    unsafe { Thread::record(thread).cast::<CallReturn>().write(leave) };
    send(thread, len);
    Some(())
}

/// A module body has run: if the module is in the catalogue, wait until its functions are armed.
#[inline(never)]
extern "C" fn leave_import(thread: *mut Thread, probe: u32, module: u64, result: u64) {
    let (Some(layout), Some(settings)) = (layout(thread), settings()) else { return };
    // SAFETY: `thread` is a map value.
    let (epoch, deep, timeouts, sp) =
        unsafe { ((*thread).process.epoch, (*thread).deep_import, (*thread).timeouts, (*thread).sp) };
    if (probe != WANTED_IMPORT || result == 0) && deep == 0 {
        return;
    }
    let mut ask_for = record(urgent::MODULE, epoch, halved(settings.module_wait, timeouts), module, deep);
    if probe == WANTED_IMPORT && module_name(thread, layout, module) {
        // SAFETY: `thread` is a map value.
        ask_for.name = unsafe { (*thread).name };
        // SAFETY: the map is not resized.
        if unsafe { MODULES.get(&ask_for.name) } == Some(&module_wait::LONG) {
            ask_for.bound = settings.long_wait;
        }
    }
    // SAFETY: `thread` is a map value.
    unsafe { (*thread).deep_import = 0 };
    if ask(&mut ask_for, sp) == 0 {
        // SAFETY: `thread` is a map value.
        unsafe { (*thread).timeouts += 1 };
    }
}
