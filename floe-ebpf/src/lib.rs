//! Types that the eBPF programs and user space share.
//!
//! Everything here is `#[repr(C)]`, of fixed size, without padding bytes that anybody reads, and checked at compile time:
//! the kernel side writes these bytes, the user side reads them.
//!
//! The eBPF programs themselves are the binary of this crate (`src/main.rs`); it is built for `bpfel-unknown-none` only.
#![no_std]

/// Longest module name that can be in the catalogue, in bytes, the terminating zero included.
pub const MODULE_NAME_LEN: usize = 96;
/// Longest attribute or dictionary key in a capture path, in bytes.
pub const KEY_LEN: usize = 64;
/// Operations in one capture plan.
pub const MAX_OPS: usize = 256;
/// Operations of one run of a plan, loops included.
pub const MAX_STEPS: u32 = 8192;
/// Registers of the capture machine; each holds the address of a Python object.
pub const MAX_REGS: usize = 128;
/// The first of the registers that are the library's ([`LIBRARY`]).
pub const LIBRARY_REGS: usize = 120;
/// Loops of a plan within each other; a power of two.
pub const MAX_LOOPS: usize = 4;
/// Frames of armed calls that are tracked per thread. The kernel tracks 64 pending return probes per task.
pub const MAX_STACK: usize = 64;
/// Armed calls nested deeper than this in one thread are disarmed.
pub const MAX_DEPTH: u32 = 32;
/// Fork ancestors through which an armed function is looked up.
pub const MAX_ANCESTORS: usize = 6;
/// Interpreter layouts that can be loaded at once.
pub const MAX_LAYOUTS: u32 = 16;
/// Keys (attribute names) of all plans together.
pub const MAX_KEYS: u32 = 1024;
/// Plans of all probes together (one for enter, one for exit).
pub const MAX_PLANS: u32 = 1024;
/// Cached hops: one per attribute or key operation.
pub const MAX_HOPS: u32 = 4096;
/// Cached types per hop; a power of two.
pub const HOP_WAYS: u32 = 8;
/// Bytes of one record.
pub const RECORD_LEN: usize = 16384;
/// Bytes of a record beyond which lists get no more items: the rest is for what comes after them.
pub const LIST_LEN: usize = 10240;
/// Longest captured string, in bytes of its representation in memory.
pub const MAX_STR: usize = 4095;
/// Entries of a dictionary or keys object that a look-up scans.
pub const MAX_SCAN: u32 = 1024;
/// Slots of the acknowledgement map; a power of two.
pub const ACK_SLOTS: u32 = 4096;

/// Declares a `#[repr(C)]` struct of plain data with its expected size.
macro_rules! shared {
    ($(#[$meta:meta])* pub struct $name:ident [$size:expr] { $($body:tt)* }) => {
        $(#[$meta])*
        #[repr(C)]
        #[derive(Clone, Copy, Debug)]
        #[cfg_attr(feature = "user", derive(bytemuck::Pod, bytemuck::Zeroable))]
        pub struct $name { $($body)* }
        // SAFETY: `#[repr(C)]`, plain integers, no padding (bytemuck's derive checks it).
        #[cfg(feature = "user")]
        unsafe impl aya::Pod for $name {}
        const _: () = assert!(core::mem::size_of::<$name>() == $size);
    };
}

shared! {
    /// What the programs know of a process that is traced or may be (map `PROCESSES`, by tgid).
    ///
    /// Written by the fork program (inheritance) and by user space (identification).
    pub struct ProcessInfo [96] {
        /// Identity of this address space; unique for the life of the agent. Armed functions belong to an epoch.
        pub epoch: u32,
        /// [`process_flags`].
        pub flags: u32,
        /// Epochs of the processes this one was forked from without exec, nearest first; 0 ends the list.
        pub ancestors: [u32; MAX_ANCESTORS],
        /// Index into `LAYOUTS`; meaningful with [`process_flags::READY`].
        pub layout: u32,
        /// Not used.
        pub reserved: u32,
        /// Address of `None`.
        pub none: u64,
        /// Address of `PyUnicode_Type`.
        pub str_type: u64,
        /// Address of `PyFloat_Type`.
        pub float_type: u64,
        /// Address of `PyBool_Type`.
        pub bool_type: u64,
        /// Address of `PyMemberDescr_Type`.
        pub member_type: u64,
        /// Address of a pointer to the thread state of the thread that holds the GIL.
        pub tstate: u64,
        /// Time of the exec or of the fork that made this address space, in nanoseconds since boot.
        pub since: u64,
    }
}

impl ProcessInfo {
    /// A selected process of which nothing else is known yet.
    #[inline]
    pub const fn selected(epoch: u32, since: u64) -> Self {
        Self {
            epoch,
            flags: process_flags::SELECTED,
            ancestors: [0; MAX_ANCESTORS],
            layout: 0,
            reserved: 0,
            none: 0,
            str_type: 0,
            float_type: 0,
            bool_type: 0,
            member_type: 0,
            tstate: 0,
            since,
        }
    }
}

/// Bits of [`ProcessInfo::flags`].
pub mod process_flags {
    /// The process is to be traced if it is a Python interpreter; inherited by children.
    pub const SELECTED: u32 = 1;
    /// Layout and addresses are filled in.
    pub const READY: u32 = 2;
    /// The process switches C stacks: nothing is armed in it any more, and nothing will be.
    pub const SWITCHES_STACKS: u32 = 4;
    /// `eval_frame` is set (3.11): changes of the recursion limit and of stack sizes are reported.
    pub const GUARD_STACK: u32 = 8;
}

/// How long a thread waits at the end of the import of a module (map `MODULES`, by name).
pub mod module_wait {
    /// [`super::Settings::module_wait`].
    pub const SHORT: u32 = 1;
    /// [`super::Settings::long_wait`]: probes are attached meanwhile, which takes longer than arming.
    pub const LONG: u32 = 2;
}

shared! {
    /// Key of the map `FUNCTIONS`.
    pub struct FunctionKey [16] {
        /// Epoch of the process that armed the function.
        pub epoch: u32,
        /// Not used, zero.
        pub reserved: u32,
        /// Address of the `PyFunctionObject`.
        pub function: u64,
    }
}

shared! {
    /// An armed function (map `FUNCTIONS`).
    pub struct FunctionInfo [24] {
        /// Its code object when it was armed; a call with another one is counted and ignored.
        pub code: u64,
        /// Which probe.
        pub probe: u32,
        /// [`function_flags`].
        pub flags: u32,
        /// Plan to run at entry, or [`NO_PLAN`].
        pub enter_plan: u32,
        /// Plan to run at return, or [`NO_PLAN`].
        pub exit_plan: u32,
    }
}

/// "No plan" in [`FunctionInfo`].
pub const NO_PLAN: u32 = u32::MAX;

/// Bits of [`FunctionInfo::flags`].
pub mod function_flags {
    /// importlib's `exec_module`: not a span, but the way modules arrive.
    pub const LOADER: u32 = 1;
    /// Disarmed in this process, though armed in one it was forked from; or still called through the gate.
    pub const DISARMED: u32 = 2;
    /// Calls are left out for now, to save load.
    pub const SHED: u32 = 64;
    /// Its result is a context manager, which is remembered in `CONTEXTS`.
    pub const CONTEXT_MANAGER: u32 = 4;
    /// `__exit__` of context managers: only calls whose first argument is in `CONTEXTS` are looked at; they take it out.
    pub const CONTEXT_EXIT: u32 = 8;
    /// A call waits at its beginning until user space has looked for functions that are to be armed.
    pub const SCAN: u32 = 16;
    /// An exception that leaves a call is read by user space while the call waits.
    pub const STACKTRACE: u32 = 32;
    /// So is one that comes in: as the argument behind the first, or as the arguments of an `__exit__`.
    pub const EXCEPTION_ARGUMENT: u32 = 128;
}

shared! {
    /// Key of the map `CONTEXTS`: a context manager that a probed function returned, until its `__exit__` is called. The
    /// value is the probe.
    pub struct ContextKey [16] {
        /// Epoch of the process.
        pub epoch: u32,
        /// Not used, zero.
        pub reserved: u32,
        /// Address of the context manager.
        pub object: u64,
    }
}

shared! {
    /// One operation of a capture plan.
    pub struct Op [16] {
        /// One of [`op`].
        pub code: u8,
        /// Register to write.
        pub dst: u8,
        /// Register to read.
        pub src: u8,
        /// Field number of a leaf operation.
        pub field: u8,
        /// Key number ([`op::ATTR`], [`op::KEY`]), position ([`op::ARG`]), item index ([`op::ITEM`]), byte offset
        /// ([`op::LOAD`]), the number of the loop's [`op::NEXT`] ([`op::EACH`]), or whether the routine only ends if it has
        /// captured something ([`op::RETURN`]).
        pub arg: u32,
        /// Hop number for the cache ([`op::ATTR`], [`op::KEY`], [`op::VALUE`]), the keyword's key number plus one
        /// ([`op::ARG`]), or the separator, four bytes with zeroes behind ([`op::EACH`]).
        pub hop: u32,
        /// Longest string to capture, in bytes of its representation; of loops: the low half is the most items, the high
        /// half the kind of field, one of [`value`].
        pub max: u32,
    }
}

/// `hop` of [`op::ATTR`] in the library: the one of the operation that called it.
pub const CALLERS_HOP: u32 = u32::MAX;
/// The plan with the routines that [`op::VALUE`] calls for objects that are not simple. The object is in the register
/// [`LIBRARY_REGS`], and field, longest string and hop are those of the operation that called.
pub const LIBRARY: u32 = 0;

/// Where in the library a routine begins.
pub mod routine {
    /// Objects that are none of the others: enum members.
    pub const ENUM: u32 = 0;
    /// `pathlib` paths.
    pub const PATH: u32 = 8;
    /// `uuid.UUID`.
    pub const UUID: u32 = 24;
}

/// Keys that are there in any case, by their number.
pub const FIXED_KEYS: [&str; 6] = ["_value_", "_fields", "_str", "_raw_paths", "_parts", "int"];

/// Numbers of [`FIXED_KEYS`].
pub mod key {
    /// Of an enum member.
    pub const VALUE: u32 = 0;
    /// Of a named tuple's class: the names of its items.
    pub const FIELDS: u32 = 1;
    /// Of a path: its text, if it was made already.
    pub const STR: u32 = 2;
    /// Of a path (3.12 on): what it was made of.
    pub const RAW_PATHS: u32 = 3;
    /// Of a path (3.8 to 3.11): its parts.
    pub const PARTS: u32 = 4;
    /// Of a UUID.
    pub const INT: u32 = 5;
}

/// `arg` of [`op::LOAD`]: the interpreter's offset of `PyFunctionObject.func_globals`.
pub const LOAD_FUNC_GLOBALS: u32 = u32::MAX - 1;
/// `arg` of [`op::LOAD`]: the interpreter's offset of `PyBaseExceptionObject.args`.
pub const LOAD_EXCEPTION_ARGS: u32 = u32::MAX - 2;

/// Operation codes of the capture machine.
pub mod op {
    /// `dst` = positional argument `arg` (`u32::MAX`: none), else the keyword argument named by key `hop - 1` (0: none).
    pub const ARG: u8 = 1;
    /// `dst` = the return value.
    pub const RESULT: u8 = 2;
    /// `dst` = the exception that is leaving the function.
    pub const EXCEPTION: u8 = 3;
    /// `dst` = the function object.
    pub const FUNCTION: u8 = 4;
    /// `dst` = attribute of `src` named by key `arg`: of the instance, in a slot, or an item of a named tuple.
    pub const ATTR: u8 = 5;
    /// `dst` = item of the dict `src` under the str key `arg`.
    pub const KEY: u8 = 6;
    /// `dst` = item `arg` of the tuple or list `src`.
    pub const ITEM: u8 = 7;
    /// `dst` = the pointer at `src + arg`; `arg` may be [`super::LOAD_FUNC_GLOBALS`] or [`super::LOAD_EXCEPTION_ARGS`].
    pub const LOAD: u8 = 8;
    /// `dst` = the type of `src`.
    pub const TYPE: u8 = 9;
    /// Leaf: the value of `src`: str, int, float, bool, None, datetime or date; of others the library knows more.
    pub const VALUE: u8 = 10;
    /// Leaf: the name of the type object `src`.
    pub const TYPE_NAME: u8 = 11;
    /// Leaf: the number of items of the tuple, list or dict `src`.
    pub const LEN: u8 = 12;
    /// `dst` = the type of the exception that is leaving the function.
    pub const EXCEPTION_TYPE: u8 = 13;
    /// Begins a loop over the items of the tuple or list `src`, or the values of the dict `src`. It goes on at its
    /// [`NEXT`], which is `arg`.
    pub const EACH: u8 = 14;
    /// Takes the next item into `dst` (of dicts also its key into the register behind) and goes to the operation after
    /// [`EACH`], or ends the loop.
    pub const NEXT: u8 = 15;
    /// Ends a routine of the library.
    pub const RETURN: u8 = 16;
    /// Leaf: the int `src` as a UUID.
    pub const UUID: u8 = 17;
}

shared! {
    /// A capture plan (map `PLANS`).
    pub struct Plan [4104] {
        /// Operations used.
        pub len: u32,
        /// Operations to run where no exception leaves the function: those behind are about it.
        pub returned: u32,
        /// The operations.
        pub ops: [Op; MAX_OPS],
    }
}

shared! {
    /// A key: an attribute name, a dict key or a keyword (map `KEYS`). ASCII.
    pub struct Key [72] {
        /// Length in bytes.
        pub len: u64,
        /// Text, zero-padded.
        pub text: [u64; KEY_LEN / 8],
    }
}

shared! {
    /// Where one CPython minor keeps things (map `LAYOUTS`). Offsets in bytes. Source: `floe-agent/src/python/layout.rs`.
    pub struct Layout [64] {
        /// `PyFunctionObject.func_code`.
        pub function_code: u16,
        /// `PyModuleObject.md_name`.
        pub module_name: u16,
        /// Data of a compact ASCII str: `sizeof(PyASCIIObject)`.
        pub str_ascii_data: u16,
        /// Data of a compact non-ASCII str, and the data pointer of a non-compact one: `sizeof(PyCompactUnicodeObject)`.
        pub str_compact_data: u16,
        /// `PyASCIIObject.state`.
        pub str_state: u16,
        /// One of [`int_style`].
        pub int_style: u16,
        /// `PyTupleObject.ob_item`.
        pub tuple_items: u16,
        /// `PyListObject.ob_item`.
        pub list_items: u16,
        /// `PyDictObject.ma_keys`.
        pub dict_keys: u16,
        /// `PyDictObject.ma_values`.
        pub dict_values: u16,
        /// One of [`keys_style`].
        pub keys_style: u16,
        /// `PyDictValues.values`.
        pub values_items: u16,
        /// One of [`instance_style`].
        pub instance_style: u16,
        /// `PyTypeObject.tp_flags`.
        pub type_flags: u16,
        /// `PyTypeObject.tp_basicsize`.
        pub type_basicsize: u16,
        /// `PyTypeObject.tp_itemsize`.
        pub type_itemsize: u16,
        /// `PyTypeObject.tp_dictoffset`.
        pub type_dictoffset: u16,
        /// `PyHeapTypeObject.ht_cached_keys`.
        pub type_cached_keys: u16,
        /// `PyTypeObject.tp_name`.
        pub type_name: u16,
        /// `PyTypeObject.tp_base`.
        pub type_base: u16,
        /// `PyThreadState.current_exception` or `curexc_value`.
        pub tstate_exception: u16,
        /// `PyThreadState.curexc_type`; 0 where the type is the value's.
        pub tstate_exception_type: u16,
        /// `PyDictObject.ma_used`.
        pub dict_used: u16,
        /// `PyFunctionObject.func_globals`.
        pub function_globals: u16,
        /// `PyBaseExceptionObject.args`.
        pub exception_args: u16,
        /// `PyTypeObject.tp_dict`.
        pub type_dict: u16,
        /// `PyTypeObject.tp_mro`.
        pub type_mro: u16,
        /// `PyTypeObject.tp_version_tag`.
        pub type_version: u16,
        /// 1 where the version counts only with `Py_TPFLAGS_VALID_VERSION_TAG` (3.8 to 3.11).
        pub type_version_flag: u16,
        /// `PyMemberDescrObject.d_member`.
        pub member: u16,
        /// `PyMemberDef.type`.
        pub member_type: u16,
        /// `PyMemberDef.offset`.
        pub member_offset: u16,
    }
}

/// How an int keeps its sign and size.
pub mod int_style {
    /// 3.8 to 3.11: in `ob_size`.
    pub const OB_SIZE: u16 = 0;
    /// 3.12 on: in `lv_tag`.
    pub const LV_TAG: u16 = 1;
}

/// How a dict's keys object is laid out.
pub mod keys_style {
    /// 3.8 to 3.10: `dk_size` in entries, 24-byte entries with the hash.
    pub const SIZE: u16 = 0;
    /// 3.11 on: `dk_log2_size`, and 16-byte entries where all keys are str.
    pub const LOG2: u16 = 1;
}

/// Where an instance keeps its attributes.
pub mod instance_style {
    /// 3.8 to 3.10: a dict at `tp_dictoffset`.
    pub const DICT: u16 = 0;
    /// 3.11: values at `obj - 32`, dict at `obj - 24`.
    pub const VALUES_AND_DICT: u16 = 1;
    /// 3.12: one word at `obj - 24`, tagged.
    pub const TAGGED: u16 = 2;
    /// 3.13: values behind the object header (`sizeof(PyObject)`), dict at `obj - 24`.
    pub const INLINE_HEADER: u16 = 3;
    /// 3.14: values behind the object (`tp_basicsize`), dict at `obj - 24`.
    pub const INLINE_BASICSIZE: u16 = 4;
}

shared! {
    /// Remembers, for one hop and one type, where the attribute was (map `HOPS`). Every use checks it, against the target's
    /// memory or by the type's version.
    pub struct HopEntry [80] {
        /// The type (attributes) or 0.
        pub type_: u64,
        /// The keys object; 0 where only the index is a hint (per-instance dicts).
        pub keys: u64,
        /// The key's str object.
        pub key: u64,
        /// The key's hash as CPython keeps it.
        pub hash: u64,
        /// Index of the entry.
        pub index: u32,
        /// Not used.
        pub reserved: u32,
        /// Address of the key in the keys object, where `keys` is not 0.
        pub slot: u64,
        /// Index in the keys that all instances of a type share, which no key leaves before the type dies (3.11 on), while
        /// the type has the version that is in the high half: an interpreter gives none to a second type. Then the index
        /// again, exclusive-or type and process, so that two CPUs that write the entry at once cannot mix two of them.
        pub proved: [u64; 2],
        /// Slots and named tuples: the type, exclusive-or the process's epoch in the high half.
        pub member_type: u64,
        /// Where it keeps the attribute ([`member`], low half), or 0 if it does not, in this version of the type (high half).
        pub member: u64,
    }
}

/// The low half of [`HopEntry::member`].
pub mod member {
    /// In a slot, at this offset of the instance (`place - SLOT`).
    pub const SLOT: u32 = 1 << 24;
    /// It is the item of a tuple with this index (`place - ITEM`).
    pub const ITEM: u32 = 2 << 24;
}

/// Kinds of records in the ring buffers.
pub mod event {
    /// An armed function was called: [`super::CallEnter`], then fields.
    pub const ENTER: u8 = 1;
    /// It returned: [`super::CallReturn`], then fields.
    pub const RETURN: u8 = 2;
    /// A traced process forked: [`super::ProcessEvent`].
    pub const FORK: u8 = 3;
    /// A thread of a traced process ended: [`super::ProcessEvent`].
    pub const EXIT: u8 = 4;
    /// A selected process called exec: [`super::ProcessEvent`].
    pub const EXEC: u8 = 5;
    /// An armed process started a thread: [`super::ProcessEvent`].
    pub const THREAD: u8 = 6;
}

shared! {
    /// Begins every record of the ring buffer `EVENTS`.
    pub struct Header [24] {
        /// One of [`event`].
        pub kind: u8,
        /// Kind-specific.
        pub flags: u8,
        /// Records of this thread that were lost before this one.
        pub lost: u16,
        /// Process (thread group) in the initial pid namespace.
        pub tgid: u32,
        /// Thread in the initial pid namespace.
        pub tid: u32,
        /// Epoch of the process's address space.
        pub epoch: u32,
        /// Nanoseconds since boot (`CLOCK_BOOTTIME`).
        pub time: u64,
    }
}

shared! {
    /// An armed call begins.
    pub struct CallEnter [48] {
        /// Common part; `time` together with `tid` identifies the call.
        pub header: Header,
        /// Which probe.
        pub probe: u32,
        /// Armed calls already open in this thread.
        pub depth: u32,
        /// Bytes of fields that follow.
        pub fields: u32,
        /// [`enter_flags`].
        pub flags: u32,
        /// Address of the first positional argument, or 0.
        pub object: u64,
    }
}

/// Bits of [`CallEnter::flags`] and [`CallReturn::flags`].
pub mod enter_flags {
    /// The function is nested too deep; it is being disarmed.
    pub const RECURSION: u32 = 1;
    /// There was no room for all fields.
    pub const FIELDS_CUT: u32 = 2;
}

/// How a call ended.
pub mod outcome {
    /// It returned an object.
    pub const RETURNED: u32 = 0;
    /// It returned NULL: an exception is leaving it.
    pub const RAISED: u32 = 1;
}

shared! {
    /// An armed call ends.
    pub struct CallReturn [56] {
        /// Common part.
        pub header: Header,
        /// `header.time` of the enter record.
        pub call: u64,
        /// Which probe.
        pub probe: u32,
        /// One of [`outcome`].
        pub outcome: u32,
        /// Bytes of fields that follow.
        pub fields: u32,
        /// [`enter_flags`].
        pub flags: u32,
        /// Address of the result; 0 if an exception left the call.
        pub object: u64,
    }
}

shared! {
    /// Fork, exec or exit of a process; the start of a thread.
    pub struct ProcessEvent [40] {
        /// Common part: fork and thread: the parent; exec and exit: the process.
        pub header: Header,
        /// Fork: the child's tgid. Exit: 1 if it was the last thread. Thread: the new thread.
        pub other: u32,
        /// Fork: the child's epoch.
        pub other_epoch: u32,
        /// Exit: the task's exit code as the kernel keeps it.
        pub code: u64,
    }
}

shared! {
    /// Begins each captured field; `len` payload bytes follow, then the next field at a multiple of 4.
    pub struct Field [8] {
        /// Field number of the plan.
        pub field: u8,
        /// One of [`value`].
        pub kind: u8,
        /// 1 if the value was cut.
        pub cut: u8,
        /// Not used.
        pub reserved: u8,
        /// Payload bytes.
        pub len: u32,
    }
}

/// Kinds of captured values.
pub mod value {
    /// UTF-8 or ASCII bytes.
    pub const UTF8: u8 = 1;
    /// Latin-1: a str of kind 1 that is not ASCII.
    pub const LATIN1: u8 = 2;
    /// UCS-2: a str of kind 2.
    pub const UCS2: u8 = 3;
    /// UCS-4: a str of kind 4.
    pub const UCS4: u8 = 4;
    /// `i64`.
    pub const INT: u8 = 5;
    /// `f64`.
    pub const FLOAT: u8 = 6;
    /// One byte.
    pub const BOOL: u8 = 7;
    /// None: no payload.
    pub const NONE: u8 = 8;
    /// A list: for each item an [`ITEM`] and its value, if it could be read, and at last an [`END`].
    pub const LIST: u8 = 9;
    /// A list whose items make one text; the payload is the separator, with zeroes behind.
    pub const JOIN: u8 = 10;
    /// A dict: as [`LIST`], with key and value behind each [`ITEM`].
    pub const MAP: u8 = 11;
    /// A path: as [`LIST`], of texts that the path was made of (3.12 on).
    pub const RAW_PATH: u8 = 12;
    /// A path: as [`LIST`], of its parts (3.8 to 3.11).
    pub const PATH_PARTS: u8 = 13;
    /// An item begins. No payload.
    pub const ITEM: u8 = 14;
    /// The list ends; `cut` if there are more items. No payload.
    pub const END: u8 = 15;
    /// Five digits of 30 bits, the lowest first.
    pub const UUID: u8 = 16;
    /// The ten bytes of a `datetime`, two unused ones, and as `i32` its offset from UTC in seconds, or `i32::MIN` if it
    /// has no time zone.
    pub const DATETIME: u8 = 17;
    /// The first four bytes of the same.
    pub const DATE: u8 = 18;
}

/// Kinds of [`Urgent`] records: a thread waits in its probe until user space has answered.
pub mod urgent {
    /// `Py_RunMain` of a selected process.
    pub const RUN_MAIN: u32 = 1;
    /// A module of the catalogue was imported; `name`.
    pub const MODULE: u32 = 2;
    /// The process is about to switch C stacks.
    pub const SWITCH: u32 = 3;
    /// A function is nested too deep; `arg0` is its address.
    pub const RECURSION: u32 = 4;
    /// `sys.setrecursionlimit` (`arg0`: the int) or `_thread.stack_size` (`arg0`: the argument tuple) is called.
    pub const STACK_CONFIG: u32 = 5;
    /// The thread holds the GIL, as user space asked for.
    pub const RENDEZVOUS: u32 = 6;
    /// A selected process called exec; with [`super::setting::NODE`] any process. Nobody waits.
    pub const EXEC: u32 = 7;
    /// `Py_RunMain` of a process that is not selected, with [`super::setting::NODE`]: is it to be?
    pub const DECIDE: u32 = 16;
    /// A function was called after which there may be more functions to arm; `arg0` is its probe.
    pub const SCAN: u32 = 8;
    /// An exception leaves a call that began at `arg0`; it is in the thread state. Or, where `arg1` is not 0, it comes into
    /// an `__exit__` whose arguments are there: an array of `self`, type, value and traceback.
    pub const EXCEPTION: u32 = 9;
}

shared! {
    /// A record of the ring buffer `URGENT`.
    pub struct Urgent [144] {
        /// One of [`urgent`].
        pub kind: u32,
        /// Process.
        pub tgid: u32,
        /// Thread.
        pub tid: u32,
        /// Epoch.
        pub epoch: u32,
        /// To be written to `ACKS[token % ACK_SLOTS]`; also the time, in nanoseconds since boot.
        pub token: u64,
        /// How long the thread waits at most, in nanoseconds.
        pub bound: u64,
        /// Kind-specific.
        pub arg0: u64,
        /// Kind-specific.
        pub arg1: u64,
        /// Kind-specific, zero-terminated.
        pub name: [u8; MODULE_NAME_LEN],
    }
}

shared! {
    /// Settings of the programs (map `SETTINGS`, one element), written before anything is attached.
    pub struct Settings [56] {
        /// Longest wait for a module to be armed, in nanoseconds.
        pub module_wait: u64,
        /// Longest wait where waiting longer is the safe side (first use of an interpreter, stack switch), in nanoseconds.
        pub long_wait: u64,
        /// Longest wait for an exception to be read, in nanoseconds.
        pub exception_wait: u64,
        /// Offset of `task_struct.pid`.
        pub task_pid: u32,
        /// Offset of `task_struct.tgid`.
        pub task_tgid: u32,
        /// Offset of `task_struct.signal`.
        pub task_signal: u32,
        /// Offset of `signal_struct.live`.
        pub signal_live: u32,
        /// Offset of `task_struct.exit_code`.
        pub task_exit_code: u32,
        /// Bytes in the ring buffer at which its reader is woken.
        pub wake_at: u32,
        /// Processes of this tgid's children are selected (the agent while it starts a command); 0: none.
        pub select_children_of: u32,
        /// [`setting`].
        pub flags: u32,
    }
}

/// Bits of [`Settings::flags`].
pub mod setting {
    /// Every process may come to be traced: execs of all are reported, and `Py_RunMain` of all asks.
    pub const NODE: u32 = 1;
    /// Armed functions are called as if they were not.
    pub const PAUSED: u32 = 2;
    /// Calls are recorded without attributes.
    pub const NO_FIELDS: u32 = 4;
}

macro_rules! counters {
    ($($(#[$meta:meta])* $name:ident = $text:literal,)*) => {
        /// What the programs count (map `COUNTERS`, per CPU).
        #[repr(u32)]
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum Counter { $($(#[$meta])* $name,)* }
        impl Counter {
            /// All counters, in order.
            pub const ALL: &'static [Counter] = &[$(Counter::$name,)*];
            /// Its name in reports.
            pub const fn name(self) -> &'static str {
                match self { $(Counter::$name => $text,)* }
            }
        }
    };
}

counters! {
    /// Hits of the gate in processes that are traced.
    GateHits = "gate_hits",
    /// Hits of the gate in processes that are not.
    GateForeign = "gate_hits_not_selected",
    /// Hits of the gate by importlib's loader.
    LoaderHits = "loader_hits",
    /// Armed calls that began.
    Calls = "calls",
    /// Armed calls whose return was seen.
    Returns = "returns",
    /// Hits of `Py_RunMain` in selected processes.
    RunMain = "run_main_hits",
    /// Hits of `Py_RunMain` in others.
    RunMainForeign = "run_main_hits_not_selected",
    /// Processes that were not selected and asked at `Py_RunMain`.
    Decisions = "decisions",
    /// Executed programs that were reported although their process is not selected.
    Execs = "execs_not_selected",
    /// Attribute plans that were left out to save load.
    ShedPlans = "attributes_shed",
    /// Calls that were left out to save load.
    ShedCalls = "calls_shed",
    /// Gate hits of a function that is in no table.
    UnknownFunction = "unknown_functions",
    /// Gate hits of a function whose code object is not the one that was armed.
    OtherCode = "functions_with_other_code",
    /// Calls whose frame left the stack without a return probe.
    MissedReturns = "missed_returns",
    /// Calls nested too deep.
    TooDeep = "calls_too_deep",
    /// Records that did not fit the ring buffer.
    LostEvents = "events_lost",
    /// Urgent records that did not fit.
    LostUrgent = "urgent_events_lost",
    /// Waits for user space.
    Waits = "waits",
    /// Waits that ran into their bound.
    WaitTimeouts = "wait_timeouts",
    /// Nanoseconds spent in waits.
    WaitNanos = "wait_ns",
    /// Attribute look-ups that scanned, because the cache did not know.
    HopMisses = "attribute_cache_misses",
    /// Fields that could not be read.
    FieldsAbsent = "fields_absent",
    /// Threads or processes that did not fit their table.
    TableFull = "table_full",
    /// First switches of C stacks in a traced process.
    Switches = "stack_switches",
    /// Catalogue modules whose import was nested too deep for a return probe.
    DeepImports = "deep_imports",
    /// Exceptions whose stack trace was not read, because the thread has waited long enough for others.
    ExceptionsUnread = "exceptions_without_stacktrace",
}
