//! The maps, and the state of a thread.

use core::ffi::c_void;

use aya_ebpf::{
    bindings::BPF_F_NO_PREALLOC,
    helpers::generated::bpf_loop,
    macros::map,
    maps::{Array, HashMap, LruHashMap, PerCpuArray, RingBuf},
};
use floe_ebpf::{
    ACK_SLOTS, ContextKey, Counter, FunctionInfo, FunctionKey, HOP_WAYS, HopEntry, Key, Layout, MAX_HOPS, MAX_KEYS,
    MAX_LAYOUTS, MAX_LOOPS, MAX_PLANS, MAX_REGS, MAX_STACK, MAX_STR, MODULE_NAME_LEN, Plan, ProcessInfo, RECORD_LEN,
    Settings,
};

use crate::{capture::Call, python::Table};

/// An armed call that is open in a thread.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Frame {
    /// Stack pointer at entry: what enter and return are matched by.
    pub sp: u64,
    /// Time of the enter record.
    pub time: u64,
    /// The function object.
    pub function: u64,
    /// The vectorcall argument array, the count and the keyword names; the caller keeps them alive until the return.
    pub args: u64,
    pub nargsf: u64,
    pub kwnames: u64,
    /// Probe, or `IMPORT` or `WANTED_IMPORT`; then `function` is the module.
    pub probe: u32,
    /// Plan to run at return.
    pub exit_plan: u32,
    /// `function_flags` of the function.
    pub flags: u32,
    pub reserved: u32,
}

/// A loop of a plan.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Loop {
    /// Addresses of the first value and the first key, and how far the next ones are.
    pub values: u64,
    pub stride: u64,
    pub keys: u64,
    pub key_stride: u64,
    /// How many there are, the next one, and how many were taken.
    pub count: u64,
    pub index: u64,
    pub taken: u64,
    /// The operation after EACH.
    pub start: u64,
}

/// Values and arguments that are read together, and words of an object: one read costs what its calls cost, whatever its
/// length. The first is a power of two.
pub const NEAR_VALUES: usize = 16;
pub const NEAR_ARGUMENTS: usize = 8;
pub const BEGINNING: usize = 16;

/// What the parts of `gate_enter` and of `gate_return` tell each other.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Event {
    /// What there is to do, `wants` in `programs/gate.rs`.
    pub wants: u64,
    /// Time of the record.
    pub time: u64,
    /// Time of the call's enter record.
    pub call: u64,
    /// The first argument; at return the module, if it is of an import.
    pub object: u64,
    /// The arguments of `__exit__`, of which one is the exception, or 0.
    pub exception: u64,
    pub probe: u64,
    pub plan: u64,
    /// Armed calls that were open already.
    pub calls: u64,
    /// `enter_flags`
    pub flags: u64,
}

/// `Frame::probe` of the import of any module.
pub const IMPORT: u32 = u32::MAX - 1;
/// `Frame::probe` of the import of a catalogue module.
pub const WANTED_IMPORT: u32 = u32::MAX - 2;

/// State of one thread: its open calls, and the scratch memory of the capture machine.
///
/// It belongs to the thread and not to the CPU: a probe can be preempted by another thread's probe on the same CPU.
#[repr(C)]
pub struct Thread {
    pub process: ProcessInfo,
    /// Frames on `stack`, and how many of them are armed calls (the others are imports).
    pub depth: u64,
    pub calls: u64,
    pub lost: u64,
    /// Waits of this thread that ran into their bound.
    pub timeouts: u64,
    /// The stack pointer of the probe that runs.
    pub sp: u64,
    /// A catalogue module was imported too deep for a return probe.
    pub deep_import: u64,
    /// How long the thread may still wait for exceptions to be read, in nanoseconds, when that was reckoned, and how many
    /// such waits were in vain.
    pub exception_credit: i64,
    pub exception_time: u64,
    pub exception_timeouts: u64,
    /// Where the next field begins in the record, and whether one did not fit. Kept here and not on the stack: what the
    /// verifier cannot know, it does not unroll loops for.
    pub cursor: u64,
    pub cut: u64,
    /// The plan that runs and the next operation; open loops.
    pub plan: u64,
    pub pc: u64,
    pub open_loops: u64,
    /// Where the plan that called the library goes on (0: the library does not run); what it called with, and where the
    /// record ended then.
    pub back: u64,
    pub back_plan: u64,
    pub call_field: u64,
    pub call_max: u64,
    pub call_hop: u64,
    pub call_cursor: u64,
    /// The call whose values are captured, and what else is known of it between the parts of a program.
    pub call: Call,
    pub event: Event,
    /// Until when the thread waits.
    pub until: u64,
    /// What is scanned, and for which key.
    pub table: Table,
    pub scan_key: u64,
    /// A look-up in classes: address of the first one, the wanted key, and what was found under it.
    pub classes: u64,
    pub class_key: u64,
    pub class_value: u64,
    /// Result of a scan: index plus one, the key's str object, its hash.
    pub found: u64,
    pub found_key: u64,
    pub found_hash: u64,
    /// The object whose attributes were read last in this plan, where they are in a values array: several attributes of
    /// one object find it once.
    pub last_object: u64,
    pub last_type: u64,
    pub last_version: u64,
    pub last_values: u64,
    /// The first items of the values array at `near_values` (0: of none).
    pub near_values: u64,
    pub near: [u64; NEAR_VALUES],
    /// The first positional arguments of the call, and how many of them were read.
    pub arguments: [u64; NEAR_ARGUMENTS],
    pub arguments_read: u64,
    /// The beginning of an object.
    pub beginning: [u64; BEGINNING],
    pub loops: [Loop; MAX_LOOPS],
    pub regs: [u64; MAX_REGS],
    pub key: [u64; floe_ebpf::KEY_LEN / 8],
    pub name: [u8; MODULE_NAME_LEN],
    pub stack: [Frame; MAX_STACK],
    /// The record under construction. Reads of up to `MAX_STR` bytes may begin at any offset below `RECORD_LEN`.
    pub record: [u8; RECORD_LEN + MAX_STR + 17],
}

impl Thread {
    /// Pointer to a frame. An index without bounds check, which could panic: the caller masked it.
    ///
    /// # Safety
    /// `thread` is valid; `index` is below `MAX_STACK`.
    #[inline(always)]
    pub unsafe fn frame(thread: *mut Self, index: u64) -> *mut Frame {
        // SAFETY: the caller's.
        unsafe { (&raw mut (*thread).stack).cast::<Frame>().add(index as usize) }
    }

    /// Pointer to a register, as above.
    ///
    /// # Safety
    /// `thread` is valid.
    #[inline(always)]
    pub unsafe fn register(thread: *mut Self, index: u8) -> *mut u64 {
        // SAFETY: the index is masked to the registers there are.
        unsafe { (&raw mut (*thread).regs).cast::<u64>().add(crate::user::masked!(u64::from(index), 127) as usize) }
    }

    /// Pointer to a loop, as above.
    ///
    /// # Safety
    /// `thread` is valid.
    #[inline(always)]
    pub unsafe fn open_loop(thread: *mut Self, level: u64) -> *mut Loop {
        // SAFETY: the level is masked to the loops there can be.
        unsafe { (&raw mut (*thread).loops).cast::<Loop>().add(crate::user::masked!(level, 3) as usize) }
    }

    /// Pointer to the record under construction; it is aligned for any head.
    ///
    /// # Safety
    /// `thread` is valid.
    #[inline(always)]
    pub unsafe fn record(thread: *mut Self) -> *mut u8 {
        // SAFETY: the caller's.
        unsafe { (&raw mut (*thread).record).cast() }
    }
}
const _: () = assert!(core::mem::offset_of!(Thread, record) % 8 == 0);

#[map]
pub static EVENTS: RingBuf = RingBuf::with_byte_size(8 << 20, 0);
#[map]
pub static URGENT: RingBuf = RingBuf::with_byte_size(256 << 10, 0);
#[map]
pub static ACKS: Array<u64> = Array::with_max_entries(ACK_SLOTS, 0);
#[map]
pub static PROCESSES: HashMap<u32, ProcessInfo> = HashMap::with_max_entries(16384, 0);
#[map]
pub static FUNCTIONS: HashMap<FunctionKey, FunctionInfo> = HashMap::with_max_entries(65536, BPF_F_NO_PREALLOC);
/// Not all context managers are used: those that were forgotten give way to newer ones.
#[map]
pub static CONTEXTS: LruHashMap<ContextKey, u32> = LruHashMap::with_max_entries(8192, 0);
#[map]
pub static THREADS: HashMap<u32, Thread> = HashMap::with_max_entries(4096, BPF_F_NO_PREALLOC);
#[map]
pub static NEW_THREAD: Array<Thread> = Array::with_max_entries(1, 0);
#[map]
pub static MODULES: HashMap<[u8; MODULE_NAME_LEN], u32> = HashMap::with_max_entries(4096, BPF_F_NO_PREALLOC);
#[map]
pub static LAYOUTS: Array<Layout> = Array::with_max_entries(MAX_LAYOUTS, 0);
#[map]
pub static PLANS: Array<Plan> = Array::with_max_entries(MAX_PLANS, 0);
#[map]
pub static KEYS: Array<Key> = Array::with_max_entries(MAX_KEYS, 0);
#[map]
pub static HOPS: Array<HopEntry> = Array::with_max_entries(MAX_HOPS * HOP_WAYS, 0);
#[map]
pub static SETTINGS: Array<Settings> = Array::with_max_entries(1, 0);
#[map]
pub static COUNTERS: PerCpuArray<u64> = PerCpuArray::with_max_entries(64, 0);
#[map]
pub static EPOCHS: Array<u64> = Array::with_max_entries(2, 0);
/// Processes (by tgid) of which user space waits for a thread that holds the GIL.
#[map]
pub static RENDEZVOUS: HashMap<u32, u32> = HashMap::with_max_entries(256, 0);

#[inline(always)]
pub fn count(counter: Counter) {
    add(counter, 1);
}

#[inline(always)]
pub fn add(counter: Counter, n: u64) {
    if let Some(value) = COUNTERS.get_ptr_mut(counter as u32) {
        fetch_add(value, n);
    }
}

#[inline(always)]
pub fn settings() -> Option<&'static Settings> {
    SETTINGS.get(0)
}

/// Calls `step` at most `turns` times, until it gives another number than 0. What it is passed has to be on the stack.
#[inline(always)]
pub fn repeat(turns: u32, step: unsafe extern "C" fn(u32, *mut *mut Thread) -> i64, thread: *mut Thread) {
    let mut thread = thread;
    // SAFETY: the callback and its argument fit together; the argument outlives the call.
    unsafe { bpf_loop(turns, step as *mut c_void, (&raw mut thread).cast(), 0) };
}

/// The layout of the thread's interpreter.
#[inline(always)]
pub fn layout(thread: *const Thread) -> Option<&'static Layout> {
    // SAFETY: a map value.
    LAYOUTS.get(unsafe { (*thread).process.layout })
}

/// Adds to an element of a map, atomically (probes can be preempted), and gives the value before.
#[inline(always)]
fn fetch_add(value: *mut u64, n: u64) -> u64 {
    let mut n = n;
    // SAFETY: one instruction on an aligned element of a map. The target has no compare-and-swap in `core::sync::atomic`.
    unsafe {
        core::arch::asm!("{n} = atomic_fetch_add((u64 *)({value} + 0), {n})", n = inout(reg) n, value = in(reg) value);
    }
    n
}

/// A number for a new address space; never 0.
#[inline(always)]
pub fn next_epoch() -> u32 {
    match EPOCHS.get_ptr_mut(0) {
        Some(value) => fetch_add(value, 1) as u32 + 1,
        None => 0,
    }
}
