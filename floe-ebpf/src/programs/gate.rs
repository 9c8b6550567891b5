//! The gate: entry and return of armed functions.

use aya_ebpf::{
    bindings::{BPF_ANY, BPF_RB_FORCE_WAKEUP, BPF_RB_NO_WAKEUP, pt_regs},
    helpers::{
        bpf_get_current_pid_tgid,
        generated::{bpf_ktime_get_boot_ns, bpf_ringbuf_output, bpf_ringbuf_query},
    },
    macros::{uprobe, uretprobe},
    programs::{ProbeContext, RetProbeContext},
};
use floe_ebpf::{
    CallEnter, CallReturn, ContextKey, Counter, FunctionInfo, FunctionKey, Header, Layout, MAX_ANCESTORS, MAX_DEPTH,
    MAX_STACK, MODULE_NAME_LEN, NO_PLAN, Settings, enter_flags, event, function_flags, module_wait, outcome,
    process_flags, setting, urgent,
};

use crate::{
    capture::run,
    maps::{
        CONTEXTS, EVENTS, FUNCTIONS, Frame, IMPORT, MODULES, NEAR_ARGUMENTS, NEW_THREAD, PROCESSES, THREADS, Thread,
        WANTED_IMPORT, count, layout, settings,
    },
    programs::wait::{poll, record, submit, waited},
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
fn header(thread: *mut Thread, kind: u8, time: u64) -> Header {
    let id = bpf_get_current_pid_tgid();
    let (tgid, tid) = ((id >> 32) as u32, id as u32);
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

/// What is left to do after the first part of a program: bits of `Event::wants`.
mod wants {
    /// Waits, in this order.
    pub const RECURSION: u64 = 1;
    pub const SCAN: u64 = 2;
    pub const EXCEPTION: u64 = 4;
    pub const MODULE: u64 = 8;
    /// The second part.
    pub const RECORD: u64 = 16;
}

/// The waits of a call. Between the parts of a program, and not within them: see [`poll`].
#[inline(always)]
fn waits(thread: *mut Thread) {
    for (want, kind) in [
        (wants::RECURSION, urgent::RECURSION),
        (wants::SCAN, urgent::SCAN),
        (wants::EXCEPTION, urgent::EXCEPTION),
        (wants::MODULE, urgent::MODULE),
    ] {
        // SAFETY: `thread` is a map value.
        if unsafe { (*thread).event.wants } & want != 0 {
            wait(thread, kind);
        }
    }
}

/// Asks user space and waits.
#[inline(never)]
extern "C" fn wait(thread: *mut Thread, kind: u32) {
    let token = request(thread, kind);
    if token != 0 {
        // SAFETY: `thread` is a map value.
        let (until, sp) = unsafe { ((*thread).until, (*thread).sp) };
        let done = waited(token, poll(token, until, sp));
        answered(thread, kind, token, done);
    }
}

/// Sends what a call waits for the answer to. The request's token, or 0.
#[inline(never)]
extern "C" fn request(thread: *mut Thread, kind: u32) -> u64 {
    send_request(thread, kind).unwrap_or(0)
}

#[inline(always)]
fn send_request(thread: *mut Thread, kind: u32) -> Option<u64> {
    let settings = settings()?;
    // SAFETY: `thread` is a map value.
    let (epoch, timeouts, event) = unsafe { ((*thread).process.epoch, (*thread).timeouts, &(*thread).event) };
    let bound = halved(settings.module_wait, timeouts);
    // SAFETY: as above.
    let function = unsafe { (*thread).call.function };
    let mut record = record(kind, epoch, bound, 0, 0);
    match kind {
        urgent::RECURSION => (record.bound, record.arg0) = (settings.long_wait, function),
        urgent::SCAN => record.arg0 = event.probe,
        urgent::EXCEPTION => {
            record.bound = exception_wait(thread, settings.exception_wait)?;
            (record.arg0, record.arg1) = (event.call, event.exception);
        }
        _ => {
            record.arg0 = event.object;
            // SAFETY: `thread` is a map value.
            unsafe {
                record.arg1 = (*thread).deep_import;
                (*thread).deep_import = 0;
            }
            if event.probe == u64::from(WANTED_IMPORT) && module_name(thread, layout(thread)?, event.object) {
                // SAFETY: as above.
                record.name = unsafe { (*thread).name };
                // SAFETY: the map is not resized.
                if unsafe { MODULES.get(&record.name) } == Some(&module_wait::LONG) {
                    record.bound = settings.long_wait;
                }
            }
        }
    }
    let token = submit(&mut record);
    // SAFETY: `thread` is a map value.
    unsafe { (*thread).until = token + record.bound };
    Some(token)
}

/// How long a thread waits for its exception to be read, if it has not waited too much for such yet.
#[inline(always)]
fn exception_wait(thread: *mut Thread, bound: u64) -> Option<u64> {
    // SAFETY: a helper without arguments.
    let now = unsafe { bpf_ktime_get_boot_ns() };
    // SAFETY: `thread` is a map value.
    unsafe {
        let earned = (now - (*thread).exception_time) / EXCEPTION_SHARE;
        (*thread).exception_time = now;
        // The clock began at 0: a new thread has all it can have.
        let credit = (*thread).exception_credit.wrapping_add(earned as i64);
        (*thread).exception_credit = if credit > EXCEPTION_SAVINGS { EXCEPTION_SAVINGS } else { credit };
        if credit <= 0 {
            count(Counter::ExceptionsUnread);
            return None;
        }
        Some(halved(bound, (*thread).exception_timeouts))
    }
}

/// Notes how a wait ended.
#[inline(never)]
extern "C" fn answered(thread: *mut Thread, kind: u32, token: u64, done: u32) {
    // SAFETY: `thread` is a map value; a helper without arguments.
    unsafe {
        if kind == urgent::EXCEPTION {
            (*thread).exception_credit -= (bpf_ktime_get_boot_ns() - token) as i64;
            (*thread).exception_timeouts += 1 - u64::from(done);
        } else {
            (*thread).timeouts += 1 - u64::from(done);
        }
    }
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
    let thread = begin_call(ctx.regs);
    if !thread.is_null() {
        waits(thread);
        finish_enter(thread);
    }
    0
}

/// The first part: finds out what is called. NULL if that is all.
#[inline(never)]
extern "C" fn begin_call(regs: *const pt_regs) -> *mut Thread {
    enter(regs).unwrap_or(core::ptr::null_mut())
}

#[inline(always)]
fn enter(regs: *const pt_regs) -> Option<*mut Thread> {
    // SAFETY: the registers of the context, as the System V ABI and the vectorcall convention use them.
    let (function, args, nargsf, kwnames, sp) =
        unsafe { ((*regs).rdi, (*regs).rsi, (*regs).rdx, (*regs).rcx, (*regs).rsp) };
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
        return None;
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
    // SAFETY: `thread` is a map value.
    let event = unsafe {
        (*thread).call.function = function;
        (*thread).call.args = args;
        (*thread).call.nargsf = nargsf;
        (*thread).call.kwnames = kwnames;
        // Volatile: a `memset` is a call.
        (&raw mut (*thread).call.result).write_volatile(0);
        (&raw mut (*thread).call.raised).write_volatile(0);
        &mut (*thread).event
    };
    event.time = time;
    event.call = time;
    event.object = object;
    event.exception = args;
    event.probe = u64::from(probe);
    event.plan = u64::from(info.enter_plan);
    event.calls = calls;
    let mut wanted = 0;
    let mut flags = 0;
    if calls >= u64::from(MAX_DEPTH) || depth >= MAX_STACK as u64 {
        count(Counter::TooDeep);
        flags = enter_flags::RECURSION;
        // SAFETY: `thread` is a map value.
        if unsafe { (*thread).timeouts } < PATIENCE {
            wanted |= wants::RECURSION;
        }
    }
    event.flags = u64::from(flags);
    if push(thread, frame) {
        count(Counter::Calls);
        wanted |= wants::RECORD;
        if traits & function_flags::SCAN != 0 {
            wanted |= wants::SCAN;
        }
        if traits & function_flags::EXCEPTION_ARGUMENT != 0 {
            // __exit__(self, type, value, traceback), or f(self, exception)
            let type_ = pointer(args + 8).unwrap_or(0);
            // SAFETY: `thread` is a map value.
            if type_ != 0 && type_ != unsafe { (*thread).process.none } && !is_control_flow(layout, type_) {
                wanted |= wants::EXCEPTION;
            }
        }
    }
    event.wants = wanted;
    if wanted == 0 { None } else { Some(thread) }
}

/// Runs the plan, if there is one; fields go behind the first `head` bytes of the record. The record's length.
#[inline(always)]
fn fields(thread: *mut Thread, settings: &Settings, head: u64) -> u64 {
    // SAFETY: `thread` is a map value.
    let event = unsafe { &mut (*thread).event };
    if event.plan == u64::from(NO_PLAN) {
        return head;
    }
    let (len, cut) = if settings.flags & setting::NO_FIELDS != 0 {
        count(Counter::ShedPlans);
        (head, true)
    } else {
        run(thread, event.plan as u32, head)
    };
    if cut {
        event.flags |= u64::from(enter_flags::FIELDS_CUT);
    }
    len
}

/// The second part: captures, and sends the record.
#[inline(never)]
extern "C" fn finish_enter(thread: *mut Thread) {
    // SAFETY: `thread` is a map value.
    let event = unsafe { &mut (*thread).event };
    let Some(settings) = settings() else { return };
    if event.wants & wants::RECORD == 0 {
        return;
    }
    let len = fields(thread, settings, size_of::<CallEnter>() as u64);
    let enter = CallEnter {
        header: header(thread, event::ENTER, event.time),
        probe: event.probe as u32,
        depth: event.calls as u32,
        fields: (len - size_of::<CallEnter>() as u64) as u32,
        flags: event.flags as u32,
        object: event.object,
    };
    // SAFETY: `thread` is a map value; the record begins with room for any of the heads.
    unsafe { Thread::record(thread).cast::<CallEnter>().write(enter) };
    send(thread, len);
}

/// An armed function returns.
#[uretprobe(sleepable)]
pub fn gate_return(ctx: RetProbeContext) -> u32 {
    let thread = end_call(ctx.regs);
    if !thread.is_null() {
        waits(thread);
        finish_return(thread);
    }
    0
}

/// The first part: finds the call that returns. NULL if that is all.
#[inline(never)]
extern "C" fn end_call(regs: *const pt_regs) -> *mut Thread {
    leave(regs).unwrap_or(core::ptr::null_mut())
}

#[inline(always)]
fn leave(regs: *const pt_regs) -> Option<*mut Thread> {
    let thread = THREADS.get_ptr_mut(bpf_get_current_pid_tgid() as u32)?;
    // SAFETY: the registers of the context. `ret` has popped the return address.
    let (result, sp) = unsafe { ((*regs).rax, (*regs).rsp - 8) };
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
    // SAFETY: `thread` is a map value.
    let event = unsafe { &mut (*thread).event };
    event.probe = u64::from(frame.probe);
    event.call = frame.time;
    event.exception = 0;
    event.flags = 0;
    if frame.probe >= WANTED_IMPORT {
        // A module body has run: if the module is in the catalogue, the thread waits until its functions are armed.
        event.object = frame.function;
        event.wants = wants::MODULE;
        // SAFETY: `thread` is a map value.
        let deep = unsafe { (*thread).deep_import };
        return if (frame.probe != WANTED_IMPORT || result == 0) && deep == 0 { None } else { Some(thread) };
    }
    // SAFETY: `thread` is a map value.
    unsafe {
        (*thread).calls = (*thread).calls.wrapping_sub(1);
        (*thread).call.function = frame.function;
        (*thread).call.args = frame.args;
        (*thread).call.nargsf = frame.nargsf;
        (*thread).call.kwnames = frame.kwnames;
        (*thread).call.result = result;
        (*thread).call.raised = u64::from(result == 0);
    }
    count(Counter::Returns);
    // SAFETY: a helper without arguments.
    event.time = unsafe { bpf_ktime_get_boot_ns() };
    event.plan = u64::from(frame.exit_plan);
    let mut wanted = wants::RECORD;
    if result == 0 {
        if frame.flags & function_flags::STACKTRACE != 0
            && let Some(type_) = exception(thread, layout, true)
            && !is_control_flow(layout, type_)
        {
            wanted |= wants::EXCEPTION;
        }
    } else if frame.flags & function_flags::CONTEXT_MANAGER != 0 {
        // SAFETY: `thread` is a map value.
        let key = ContextKey { epoch: unsafe { (*thread).process.epoch }, reserved: 0, object: result };
        if CONTEXTS.insert(key, frame.probe, u64::from(BPF_ANY)).is_err() {
            count(Counter::TableFull);
        }
    }
    event.wants = wanted;
    Some(thread)
}

/// The second part: captures, and sends the record.
#[inline(never)]
extern "C" fn finish_return(thread: *mut Thread) {
    // SAFETY: `thread` is a map value.
    let event = unsafe { &mut (*thread).event };
    let Some(settings) = settings() else { return };
    if event.wants & wants::RECORD == 0 {
        return;
    }
    let len = fields(thread, settings, size_of::<CallReturn>() as u64);
    // SAFETY: `thread` is a map value.
    let result = unsafe { (*thread).call.result };
    let leave = CallReturn {
        header: header(thread, event::RETURN, event.time),
        call: event.call,
        probe: event.probe as u32,
        outcome: if result == 0 { outcome::RAISED } else { outcome::RETURNED },
        fields: (len - size_of::<CallReturn>() as u64) as u32,
        flags: event.flags as u32,
        object: result,
    };
    // SAFETY: `thread` is a map value; the record begins with room for any of the heads.
    unsafe { Thread::record(thread).cast::<CallReturn>().write(leave) };
    send(thread, len);
}
