//! Where each CPython minor keeps things: offsets in bytes, and the few choices of style.
//!
//! One table per minor; code asks the table and never compares versions. The numbers come from compiling
//! `offsets.c` (beside this file) against the headers of CPython 3.8.18, 3.9.18, 3.10.13, 3.11.7, 3.12.1 and 3.13.0, and
//! of 3.14.7, for x86-64 Linux; a test repeats that for every interpreter it finds. They do not change within a minor:
//! 3.8.20, 3.9.20, 3.10.15, 3.11.10, 3.12.6 and 3.13.5 have the same. Debug and free-threaded builds differ and are
//! refused. Each group names the header that declares it, as of 3.13 where files moved.

use std::fmt;

use floe_ebpf::{Layout, instance_style, int_style, keys_style};

/// A CPython minor version, such as 3.12.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Minor {
    /// 3.
    pub major: u8,
    /// 12 in 3.12.
    pub minor: u8,
}

impl Minor {
    /// 3.`minor`.
    pub const fn three(minor: u8) -> Self {
        Self { major: 3, minor }
    }

    /// From `PY_VERSION_HEX`, `sys.hexversion`.
    pub const fn from_hex(hex: u32) -> Self {
        Self { major: (hex >> 24) as u8, minor: (hex >> 16) as u8 }
    }
}

impl fmt::Display for Minor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)
    }
}

/// `PyFunctionObject`: Include/cpython/funcobject.h.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FunctionLayout {
    /// `func_code`
    pub code: u64,
    /// `func_globals`
    pub globals: u64,
    /// `func_name`
    pub name: u64,
    /// `func_qualname`
    pub qualname: u64,
    /// `func_module`
    pub module: u64,
    /// `func_dict`
    pub dict: u64,
    /// `func_defaults`
    pub defaults: u64,
    /// `func_kwdefaults`
    pub kwdefaults: u64,
    /// `func_closure`
    pub closure: u64,
    /// `vectorcall`
    pub vectorcall: u64,
    /// `func_version`, a u32 (3.11 on).
    pub version: Option<u64>,
    /// What `func_version` is when the interpreter has cleared it: `FUNC_VERSION_CLEARED` in 3.14, else 0.
    pub version_cleared: u32,
}

/// `PyCodeObject`: Include/cpython/code.h.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CodeLayout {
    /// `co_flags`, an i32.
    pub flags: u64,
    /// `co_argcount`, an i32; positional-only arguments included.
    pub argcount: u64,
    /// `co_kwonlyargcount`, an i32.
    pub kwonlyargcount: u64,
    /// `co_firstlineno`, an i32.
    pub firstlineno: u64,
    /// `co_name`
    pub name: u64,
    /// `co_filename`
    pub filename: u64,
    /// `co_qualname` (3.11 on).
    pub qualname: Option<u64>,
    /// `co_consts`
    pub consts: u64,
    /// Tuple that begins with the argument names: `co_varnames`, from 3.11 `co_localsplusnames`.
    pub varnames: u64,
    /// `co_lnotab` (3.8, 3.9), `co_linetable` (3.10 on): a bytes object.
    pub linetable: u64,
    /// First instruction; `co_code_adaptive` (3.11 on), where it is part of the code object.
    pub code_adaptive: Option<u64>,
}

/// `PyASCIIObject`, `PyCompactUnicodeObject`: Include/cpython/unicodeobject.h.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StrLayout {
    /// `length`
    pub length: u64,
    /// `state`, a u32: interned `0x3`, kind `0x1c`, compact `0x20`, ascii `0x40`.
    pub state: u64,
    /// Data of a compact ASCII str: `sizeof(PyASCIIObject)`.
    pub ascii_data: u64,
    /// Data of a compact non-ASCII str, and the data pointer of a non-compact one: `sizeof(PyCompactUnicodeObject)`.
    pub compact_data: u64,
}

/// How a keys object is laid out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KeysStyle {
    /// 3.8 to 3.10: `dk_size` counts entries; all entries are `{hash, key, value}`.
    Size {
        /// `dk_size`
        size: u64,
    },
    /// 3.11 on: `dk_log2_index_bytes`; `{key, value}` where all keys are str.
    Log2 {
        /// `dk_log2_index_bytes`, a u8.
        log2_index_bytes: u64,
        /// `dk_kind`, a u8: 0 general, 1 unicode, 2 split.
        kind: u64,
    },
}

/// `PyDictObject`: Include/cpython/dictobject.h; `PyDictKeysObject`, `PyDictValues`: Include/internal/pycore_dict.h,
/// before 3.11 Objects/dict-common.h.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DictLayout {
    /// `ma_used`
    pub used: u64,
    /// `ma_keys`
    pub keys: u64,
    /// `ma_values`
    pub values: u64,
    /// Style of the keys object.
    pub style: KeysStyle,
    /// `dk_nentries`
    pub nentries: u64,
    /// `dk_indices`
    pub indices: u64,
    /// `PyDictValues.values`; where it is not 0, `capacity` is the byte at 0 and `valid` the byte at 3.
    pub values_items: u64,
}

/// Where an instance keeps its attributes: Objects/dictobject.c, Include/internal/pycore_object.h.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InstanceStyle {
    /// 3.8 to 3.10: a dict at `tp_dictoffset`.
    Dict,
    /// 3.11: values at `obj - 32`, dict at `obj - 24`.
    ValuesAndDict,
    /// 3.12: one word at `obj - 24`: values with the low bit set, or a dict.
    Tagged,
    /// 3.13: values behind the object header, dict at `obj - 24`.
    InlineHeader,
    /// 3.14: values behind the object (`tp_basicsize`), dict at `obj - 24`.
    InlineBasicsize,
}

/// `PyTypeObject`, `PyHeapTypeObject`: Include/cpython/object.h.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TypeLayout {
    /// `tp_name`, a C string.
    pub name: u64,
    /// `tp_basicsize`
    pub basicsize: u64,
    /// `tp_itemsize`
    pub itemsize: u64,
    /// `tp_vectorcall_offset`
    pub vectorcall_offset: u64,
    /// `tp_flags`
    pub flags: u64,
    /// `tp_methods`: an array of `PyMethodDef`.
    pub methods: u64,
    /// `tp_base`
    pub base: u64,
    /// `tp_dict`; NULL for the interpreter's own static types from 3.12 on.
    pub dict: u64,
    /// `tp_dictoffset`
    pub dictoffset: u64,
    /// `tp_mro`
    pub mro: u64,
    /// `tp_subclasses`: a dict whose values are weak references.
    pub subclasses: u64,
    /// `ht_qualname`
    pub qualname: u64,
    /// `ht_cached_keys`
    pub cached_keys: u64,
    /// `tp_version_tag`, a u32 that no other type has, nor this one after it was changed; 0 if it has none yet.
    pub version: u64,
    /// The version is valid only with `Py_TPFLAGS_VALID_VERSION_TAG` (up to 3.11).
    pub version_needs_flag: bool,
}

/// Small objects whose structs are the same in all versions: Objects/moduleobject.c (3.8, 3.9),
/// Include/internal/pycore_moduleobject.h, Include/cpython/cellobject.h, Include/cpython/classobject.h,
/// Objects/funcobject.c (`classmethod`, `staticmethod`), Objects/descrobject.c (`propertyobject`),
/// Include/cpython/descrobject.h, Include/methodobject.h, Objects/capsule.c, Include/cpython/weakrefobject.h,
/// Modules/_functoolsmodule.c (`partialobject`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SmallLayout {
    /// `PyModuleObject.md_dict`
    pub module_dict: u64,
    /// `PyModuleObject.md_name`
    pub module_name: u64,
    /// `PyCellObject.ob_ref`
    pub cell_ref: u64,
    /// `PyMethodObject.im_func`
    pub method_func: u64,
    /// `PyMethodObject.im_self`
    pub method_self: u64,
    /// `classmethod.cm_callable`
    pub classmethod_callable: u64,
    /// `staticmethod.sm_callable`
    pub staticmethod_callable: u64,
    /// `propertyobject.prop_get`
    pub property_get: u64,
    /// `PyMethodDescrObject.d_method`
    pub method_descriptor_method: u64,
    /// `PyMemberDescrObject.d_member`
    pub member_descriptor_member: u64,
    /// `PyMemberDef.type`, an i32
    pub member_type: u64,
    /// `PyMemberDef.offset`
    pub member_offset: u64,
    /// `PyCFunctionObject.m_ml`
    pub cfunction_method: u64,
    /// `PyMethodDef.ml_name`
    pub methoddef_name: u64,
    /// `PyMethodDef.ml_meth`
    pub methoddef_meth: u64,
    /// `sizeof(PyMethodDef)`
    pub methoddef_size: u64,
    /// `PyCapsule.pointer`
    pub capsule_pointer: u64,
    /// `PyWeakReference.wr_object`
    pub weakref_object: u64,
    /// `partialobject.fn`
    pub partial_func: u64,
    /// `PyFloatObject.ob_fval`
    pub float_value: u64,
    /// `PyBytesObject.ob_sval`
    pub bytes_data: u64,
    /// `PyTupleObject.ob_item`
    pub tuple_items: u64,
    /// `PyListObject.ob_item`
    pub list_items: u64,
}

/// `PyLongObject`: Include/cpython/longintrepr.h.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IntStyle {
    /// 3.8 to 3.11: sign and number of digits in `ob_size`, digits at 24.
    ObSize,
    /// 3.12 on: in `lv_tag`, at the same place; digits at 24.
    LvTag,
}

/// Where the pointer to the thread state that holds the GIL is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CurrentThread {
    /// 3.8 to 3.11: `_PyRuntime.gilstate.tstate_current`, at this offset of the runtime.
    Runtime(u64),
    /// 3.12 on: `last_holder` of the GIL that the interpreter points to.
    Gil {
        /// `PyInterpreterState.ceval.gil`
        gil: u64,
        /// `struct _gil_runtime_state.last_holder`
        last_holder: u64,
    },
}

/// `PyInterpreterState`: Include/internal/pycore_interp.h.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InterpreterLayout {
    /// `next`
    pub next: u64,
    /// `id`
    pub id: u64,
    /// `modules`, `imports.modules`: the dict `sys.modules`.
    pub modules: u64,
    /// `sysdict`: the dict of the module `sys`.
    pub sysdict: u64,
    /// `builtins`
    pub builtins: u64,
    /// `eval_frame`
    pub eval_frame: u64,
    /// `tstate_head`, `threads.head`
    pub threads_head: u64,
    /// `ceval.recursion_limit`, an i32; in 3.8 it is in the runtime and not needed.
    pub recursion_limit: Option<u64>,
    /// `threads.stacksize`, `pythread_stacksize`: what `threading.stack_size` was set to.
    pub stack_size: Option<u64>,
    /// `func_state.func_version_cache` (3.13 on): 4096 times `{function, code}`, indexed by the version.
    pub function_cache: Option<u64>,
}

/// Entries of `func_version_cache` (`FUNC_VERSION_CACHE_SIZE`).
pub const FUNCTION_CACHE_ENTRIES: u64 = 4096;

/// `PyThreadState`: Include/cpython/pystate.h.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ThreadLayout {
    /// `next`
    pub next: u64,
    /// `interp`
    pub interp: u64,
    /// `thread_id`: the `pthread_t`.
    pub thread_id: u64,
    /// `native_thread_id` (3.11 on): the kernel's thread id, in the process's pid namespace.
    pub native_thread_id: Option<u64>,
    /// `curexc_value`, from 3.12 `current_exception`.
    pub exception: u64,
    /// `curexc_type` (up to 3.11).
    pub exception_type: Option<u64>,
}

/// `_PyRuntimeState`: Include/internal/pycore_runtime.h.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RuntimeLayout {
    /// `interpreters.head`
    pub interpreters_head: u64,
    /// `interpreters.main`
    pub interpreters_main: u64,
    /// Whether the runtime begins with `_Py_DebugOffsets` (3.13 on): `cookie` at 0, `version` at 8, `free_threaded` at 16.
    pub debug_offsets: bool,
    /// Where the current thread state is found.
    pub current_thread: CurrentThread,
}

/// Tracebacks and exceptions: Include/cpython/traceback.h, Include/cpython/pyerrors.h.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExceptionLayout {
    /// `PyBaseExceptionObject.args`
    pub args: u64,
    /// `PyBaseExceptionObject.traceback`
    pub traceback: u64,
    /// `PyBaseExceptionObject.context`
    pub context: u64,
    /// `PyBaseExceptionObject.cause`
    pub cause: u64,
    /// `PyBaseExceptionObject.suppress_context`, a char.
    pub suppress_context: u64,
    /// `sizeof(PyBaseExceptionObject)`: where the fields of subclasses begin.
    pub fields: u64,
    /// Exceptions can have `__notes__` (3.11 on).
    pub notes: bool,
    /// `PyTracebackObject.tb_next`
    pub tb_next: u64,
    /// `PyTracebackObject.tb_frame`
    pub tb_frame: u64,
    /// `PyTracebackObject.tb_lasti`, an i32
    pub tb_lasti: u64,
    /// `PyTracebackObject.tb_lineno`, an i32; -1 where it has not been computed (3.12 on).
    pub tb_lineno: u64,
    /// `PyFrameObject.f_frame` (3.11 on).
    pub frame_inner: Option<u64>,
    /// `PyFrameObject.f_code`, `_PyInterpreterFrame.f_code`, or `f_executable` (3.13 on).
    pub frame_code: u64,
}

/// All offsets of one CPython minor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PyLayout {
    /// Which minor.
    pub version: Minor,
    /// Functions.
    pub function: FunctionLayout,
    /// Code objects.
    pub code: CodeLayout,
    /// Strings.
    pub str: StrLayout,
    /// Integers.
    pub int: IntStyle,
    /// Dicts.
    pub dict: DictLayout,
    /// Instances.
    pub instance: InstanceStyle,
    /// Types.
    pub type_: TypeLayout,
    /// Small objects.
    pub small: SmallLayout,
    /// Exceptions.
    pub exception: ExceptionLayout,
    /// Thread states.
    pub thread: ThreadLayout,
    /// Interpreter states.
    pub interpreter: InterpreterLayout,
    /// The runtime.
    pub runtime: RuntimeLayout,
    /// Calls from Python to Python do not look at `vectorcall` unless `eval_frame` is set (3.11).
    pub inlines_past_vectorcall: bool,
    /// `Class()` calls a Python `__init__` past `vectorcall` once it is specialised (3.13 on).
    pub inlines_init: bool,
    /// Property getters are called past `vectorcall` once they are specialised (3.14).
    pub inlines_property: bool,
}

/// `PyObject.ob_type`
pub const OB_TYPE: u64 = 8;
/// `PyVarObject.ob_size`
pub const OB_SIZE: u64 = 16;
/// `sizeof(PyObject)`
pub const OBJECT_HEADER: u64 = 16;
/// `ob_digit`, `long_value.ob_digit`
pub const INT_DIGITS: u64 = 24;

const V3_8: PyLayout = PyLayout {
    version: Minor::three(8),
    function: FunctionLayout {
        code: 16,
        globals: 24,
        defaults: 32,
        kwdefaults: 40,
        closure: 48,
        name: 64,
        dict: 72,
        module: 88,
        qualname: 104,
        vectorcall: 112,
        version: None,
        version_cleared: 0,
    },
    code: CodeLayout {
        argcount: 16,
        kwonlyargcount: 24,
        flags: 36,
        firstlineno: 40,
        consts: 56,
        varnames: 72,
        filename: 104,
        name: 112,
        linetable: 120,
        qualname: None,
        code_adaptive: None,
    },
    str: StrLayout { length: 16, state: 32, ascii_data: 48, compact_data: 72 },
    int: IntStyle::ObSize,
    dict: DictLayout {
        used: 16,
        keys: 32,
        values: 40,
        style: KeysStyle::Size { size: 8 },
        nentries: 32,
        indices: 40,
        values_items: 0,
    },
    instance: InstanceStyle::Dict,
    type_: TypeLayout {
        name: 24,
        basicsize: 32,
        itemsize: 40,
        vectorcall_offset: 56,
        flags: 168,
        methods: 232,
        base: 256,
        dict: 264,
        dictoffset: 288,
        mro: 344,
        subclasses: 360,
        qualname: 864,
        cached_keys: 872,
        version: 384,
        version_needs_flag: true,
    },
    small: SmallLayout {
        module_dict: 16,
        module_name: 48,
        cell_ref: 16,
        method_func: 16,
        method_self: 24,
        classmethod_callable: 16,
        staticmethod_callable: 16,
        property_get: 16,
        method_descriptor_method: 40,
        member_descriptor_member: 40,
        member_type: 8,
        member_offset: 16,
        cfunction_method: 16,
        methoddef_name: 0,
        methoddef_meth: 8,
        methoddef_size: 32,
        capsule_pointer: 16,
        weakref_object: 16,
        partial_func: 16,
        float_value: 16,
        bytes_data: 32,
        tuple_items: 24,
        list_items: 24,
    },
    exception: ExceptionLayout {
        args: 24,
        traceback: 32,
        context: 40,
        cause: 48,
        suppress_context: 56,
        fields: 64,
        notes: false,
        tb_next: 16,
        tb_frame: 24,
        tb_lasti: 32,
        tb_lineno: 36,
        frame_inner: None,
        frame_code: 32,
    },
    thread: ThreadLayout {
        next: 8,
        interp: 16,
        exception_type: Some(88),
        exception: 96,
        thread_id: 176,
        native_thread_id: None,
    },
    interpreter: InterpreterLayout {
        next: 0,
        threads_head: 8,
        id: 16,
        modules: 56,
        sysdict: 72,
        builtins: 80,
        eval_frame: 568,
        recursion_limit: None,
        stack_size: None,
        function_cache: None,
    },
    runtime: RuntimeLayout {
        interpreters_head: 32,
        interpreters_main: 40,
        debug_offsets: false,
        current_thread: CurrentThread::Runtime(1368),
    },
    inlines_past_vectorcall: false,
    inlines_init: false,
    inlines_property: false,
};

const V3_9: PyLayout = PyLayout {
    version: Minor::three(9),
    type_: TypeLayout { qualname: 856, cached_keys: 864, ..V3_8.type_ },
    interpreter: InterpreterLayout {
        id: 24,
        recursion_limit: Some(64),
        modules: 856,
        sysdict: 872,
        builtins: 880,
        stack_size: Some(904),
        eval_frame: 1400,
        ..V3_8.interpreter
    },
    runtime: RuntimeLayout { current_thread: CurrentThread::Runtime(568), ..V3_8.runtime },
    ..V3_8
};

const V3_10: PyLayout = PyLayout {
    version: Minor::three(10),
    function: FunctionLayout {
        globals: 16,
        name: 32,
        qualname: 40,
        code: 48,
        defaults: 56,
        kwdefaults: 64,
        closure: 72,
        dict: 88,
        module: 104,
        vectorcall: 120,
        version: None,
        version_cleared: 0,
    },
    type_: TypeLayout { qualname: 864, cached_keys: 872, ..V3_9.type_ },
    interpreter: InterpreterLayout { eval_frame: 1368, ..V3_9.interpreter },
    ..V3_9
};

const V3_11: PyLayout = PyLayout {
    version: Minor::three(11),
    function: FunctionLayout { version: Some(128), ..V3_10.function },
    code: CodeLayout {
        consts: 24,
        flags: 48,
        argcount: 56,
        kwonlyargcount: 64,
        firstlineno: 72,
        varnames: 96,
        filename: 112,
        name: 120,
        qualname: Some(128),
        linetable: 136,
        code_adaptive: Some(184),
    },
    dict: DictLayout {
        style: KeysStyle::Log2 { log2_index_bytes: 9, kind: 10 },
        nentries: 24,
        indices: 32,
        ..V3_10.dict
    },
    instance: InstanceStyle::ValuesAndDict,
    exception: ExceptionLayout {
        traceback: 40,
        context: 48,
        cause: 56,
        suppress_context: 64,
        fields: 72,
        notes: true,
        frame_inner: Some(24),
        ..V3_10.exception
    },
    thread: ThreadLayout {
        exception_type: Some(96),
        exception: 104,
        thread_id: 152,
        native_thread_id: Some(160),
        ..V3_10.thread
    },
    interpreter: InterpreterLayout {
        next: 0,
        threads_head: 16,
        stack_size: Some(32),
        id: 48,
        recursion_limit: Some(96),
        modules: 888,
        sysdict: 904,
        builtins: 912,
        eval_frame: 1424,
        function_cache: None,
    },
    runtime: RuntimeLayout {
        interpreters_head: 40,
        interpreters_main: 48,
        debug_offsets: false,
        current_thread: CurrentThread::Runtime(576),
    },
    inlines_past_vectorcall: true,
    ..V3_10
};

const V3_12: PyLayout = PyLayout {
    version: Minor::three(12),
    function: FunctionLayout { vectorcall: 128, version: Some(136), ..V3_11.function },
    code: CodeLayout { argcount: 52, kwonlyargcount: 60, firstlineno: 68, code_adaptive: Some(192), ..V3_11.code },
    str: StrLayout { ascii_data: 40, compact_data: 56, ..V3_11.str },
    int: IntStyle::LvTag,
    instance: InstanceStyle::Tagged,
    type_: TypeLayout { qualname: 872, cached_keys: 880, version_needs_flag: false, ..V3_11.type_ },
    exception: ExceptionLayout { frame_code: 0, ..V3_11.exception },
    thread: ThreadLayout {
        exception_type: None,
        exception: 96,
        thread_id: 136,
        native_thread_id: Some(144),
        ..V3_11.thread
    },
    interpreter: InterpreterLayout {
        next: 0,
        id: 8,
        threads_head: 72,
        stack_size: Some(88),
        sysdict: 352,
        builtins: 360,
        recursion_limit: Some(376),
        modules: 944,
        eval_frame: 1744,
        function_cache: None,
    },
    runtime: RuntimeLayout { current_thread: CurrentThread::Gil { gil: 384, last_holder: 8 }, ..V3_11.runtime },
    inlines_past_vectorcall: false,
    ..V3_11
};

const V3_13: PyLayout = PyLayout {
    version: Minor::three(13),
    code: CodeLayout { code_adaptive: Some(200), ..V3_12.code },
    dict: DictLayout { values_items: 8, ..V3_12.dict },
    instance: InstanceStyle::InlineHeader,
    thread: ThreadLayout { exception: 112, thread_id: 152, native_thread_id: Some(160), ..V3_12.thread },
    interpreter: InterpreterLayout {
        recursion_limit: Some(8),
        next: 7264,
        id: 7272,
        threads_head: 7344,
        stack_size: Some(7368),
        sysdict: 7640,
        builtins: 7648,
        modules: 7656,
        eval_frame: 8472,
        function_cache: Some(17008),
    },
    runtime: RuntimeLayout {
        interpreters_head: 632,
        interpreters_main: 640,
        debug_offsets: true,
        current_thread: CurrentThread::Gil { gil: 16, last_holder: 8 },
    },
    inlines_init: true,
    ..V3_12
};

const V3_14: PyLayout = PyLayout {
    version: Minor::three(14),
    function: FunctionLayout { vectorcall: 136, version: Some(144), version_cleared: 1, ..V3_13.function },
    code: CodeLayout { code_adaptive: Some(208), ..V3_13.code },
    instance: InstanceStyle::InlineBasicsize,
    small: SmallLayout { tuple_items: 32, ..V3_13.small },
    interpreter: InterpreterLayout {
        recursion_limit: Some(8),
        next: 7272,
        id: 7280,
        threads_head: 7344,
        stack_size: Some(7376),
        sysdict: 7672,
        builtins: 7680,
        modules: 7688,
        eval_frame: 8520,
        function_cache: Some(14264),
    },
    runtime: RuntimeLayout { interpreters_head: 808, interpreters_main: 816, ..V3_13.runtime },
    inlines_property: true,
    ..V3_13
};

static LAYOUTS: [PyLayout; 7] = [V3_8, V3_9, V3_10, V3_11, V3_12, V3_13, V3_14];

impl PyLayout {
    /// All known layouts, oldest first.
    pub fn all() -> &'static [PyLayout] {
        &LAYOUTS
    }

    /// The layout of a minor.
    pub fn of(version: Minor) -> Option<&'static PyLayout> {
        LAYOUTS.iter().find(|layout| layout.version == version)
    }

    /// The part of it that the eBPF programs need.
    pub fn for_ebpf(&self) -> Layout {
        Layout {
            function_code: narrow(self.function.code),
            module_name: narrow(self.small.module_name),
            str_ascii_data: narrow(self.str.ascii_data),
            str_compact_data: narrow(self.str.compact_data),
            str_state: narrow(self.str.state),
            int_style: match self.int {
                IntStyle::ObSize => int_style::OB_SIZE,
                IntStyle::LvTag => int_style::LV_TAG,
            },
            tuple_items: narrow(self.small.tuple_items),
            list_items: narrow(self.small.list_items),
            dict_keys: narrow(self.dict.keys),
            dict_values: narrow(self.dict.values),
            keys_style: match self.dict.style {
                KeysStyle::Size { .. } => keys_style::SIZE,
                KeysStyle::Log2 { .. } => keys_style::LOG2,
            },
            values_items: narrow(self.dict.values_items),
            instance_style: match self.instance {
                InstanceStyle::Dict => instance_style::DICT,
                InstanceStyle::ValuesAndDict => instance_style::VALUES_AND_DICT,
                InstanceStyle::Tagged => instance_style::TAGGED,
                InstanceStyle::InlineHeader => instance_style::INLINE_HEADER,
                InstanceStyle::InlineBasicsize => instance_style::INLINE_BASICSIZE,
            },
            type_flags: narrow(self.type_.flags),
            type_basicsize: narrow(self.type_.basicsize),
            type_itemsize: narrow(self.type_.itemsize),
            type_dictoffset: narrow(self.type_.dictoffset),
            type_cached_keys: narrow(self.type_.cached_keys),
            type_name: narrow(self.type_.name),
            type_base: narrow(self.type_.base),
            tstate_exception: narrow(self.thread.exception),
            tstate_exception_type: narrow(self.thread.exception_type.unwrap_or(0)),
            dict_used: narrow(self.dict.used),
            exception_args: narrow(self.exception.args),
            function_globals: narrow(self.function.globals),
            type_dict: narrow(self.type_.dict),
            type_mro: narrow(self.type_.mro),
            type_version: narrow(self.type_.version),
            type_version_flag: u16::from(self.type_.version_needs_flag),
            member: narrow(self.small.member_descriptor_member),
            member_type: narrow(self.small.member_type),
            member_offset: narrow(self.small.member_offset),
        }
    }
}

/// The offsets that go to the kernel side are those of objects, which are small.
fn narrow(offset: u64) -> u16 {
    u16::try_from(offset).expect("offsets within objects fit 16 bits")
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::path::Path;
    use std::process::Command;

    use super::*;

    /// The table under the names that `offsets.c` prints.
    fn named(l: &PyLayout) -> BTreeMap<&'static str, u64> {
        let mut map = BTreeMap::new();
        macro_rules! put {
            ($($name:literal: $value:expr,)*) => { $(map.insert($name, $value);)* };
        }
        put! {
            "PyObject.ob_type": OB_TYPE,
            "PyVarObject.ob_size": OB_SIZE,
            "sizeof.PyObject": OBJECT_HEADER,
            "PyFunctionObject.func_code": l.function.code,
            "PyFunctionObject.func_globals": l.function.globals,
            "PyFunctionObject.func_name": l.function.name,
            "PyFunctionObject.func_qualname": l.function.qualname,
            "PyFunctionObject.func_module": l.function.module,
            "PyFunctionObject.func_dict": l.function.dict,
            "PyFunctionObject.func_defaults": l.function.defaults,
            "PyFunctionObject.func_kwdefaults": l.function.kwdefaults,
            "PyFunctionObject.func_closure": l.function.closure,
            "PyFunctionObject.vectorcall": l.function.vectorcall,
            "PyCodeObject.co_flags": l.code.flags,
            "PyCodeObject.co_argcount": l.code.argcount,
            "PyCodeObject.co_kwonlyargcount": l.code.kwonlyargcount,
            "PyCodeObject.co_firstlineno": l.code.firstlineno,
            "PyCodeObject.co_name": l.code.name,
            "PyCodeObject.co_filename": l.code.filename,
            "PyCodeObject.co_consts": l.code.consts,
            "sizeof.PyASCIIObject": l.str.ascii_data,
            "sizeof.PyCompactUnicodeObject": l.str.compact_data,
            "PyUnicodeObject.data": l.str.compact_data,
            "PyASCIIObject.length": l.str.length,
            "PyASCIIObject.state": l.str.state,
            "PyBytesObject.ob_sval": l.small.bytes_data,
            "PyFloatObject.ob_fval": l.small.float_value,
            "PyTupleObject.ob_item": l.small.tuple_items,
            "PyListObject.ob_item": l.small.list_items,
            "PyDictObject.ma_used": l.dict.used,
            "PyDictObject.ma_keys": l.dict.keys,
            "PyDictObject.ma_values": l.dict.values,
            "PyDictKeysObject.dk_nentries": l.dict.nentries,
            "PyDictKeysObject.dk_indices": l.dict.indices,
            "PyTypeObject.tp_name": l.type_.name,
            "PyTypeObject.tp_basicsize": l.type_.basicsize,
            "PyTypeObject.tp_itemsize": l.type_.itemsize,
            "PyTypeObject.tp_vectorcall_offset": l.type_.vectorcall_offset,
            "PyTypeObject.tp_flags": l.type_.flags,
            "PyTypeObject.tp_methods": l.type_.methods,
            "PyTypeObject.tp_base": l.type_.base,
            "PyTypeObject.tp_dict": l.type_.dict,
            "PyTypeObject.tp_dictoffset": l.type_.dictoffset,
            "PyTypeObject.tp_mro": l.type_.mro,
            "PyTypeObject.tp_version_tag": l.type_.version,
            "PyTypeObject.tp_subclasses": l.type_.subclasses,
            "PyHeapTypeObject.ht_qualname": l.type_.qualname,
            "PyHeapTypeObject.ht_cached_keys": l.type_.cached_keys,
            "PyModuleObject.md_dict": l.small.module_dict,
            "PyModuleObject.md_name": l.small.module_name,
            "PyCellObject.ob_ref": l.small.cell_ref,
            "PyMethodObject.im_func": l.small.method_func,
            "PyMethodObject.im_self": l.small.method_self,
            "PyMethodDescrObject.d_method": l.small.method_descriptor_method,
            "PyMemberDescrObject.d_member": l.small.member_descriptor_member,
            "PyMethodDef.ml_name": l.small.methoddef_name,
            "PyMethodDef.ml_meth": l.small.methoddef_meth,
            "sizeof.PyMethodDef": l.small.methoddef_size,
            "PyCFunctionObject.m_ml": l.small.cfunction_method,
            "PyMemberDef.type": l.small.member_type,
            "PyMemberDef.offset": l.small.member_offset,
            "PyWeakReference.wr_object": l.small.weakref_object,
            "PyBaseExceptionObject.args": l.exception.args,
            "PyBaseExceptionObject.traceback": l.exception.traceback,
            "PyBaseExceptionObject.context": l.exception.context,
            "PyBaseExceptionObject.cause": l.exception.cause,
            "PyBaseExceptionObject.suppress_context": l.exception.suppress_context,
            "sizeof.PyBaseExceptionObject": l.exception.fields,
            "PyTracebackObject.tb_next": l.exception.tb_next,
            "PyTracebackObject.tb_frame": l.exception.tb_frame,
            "PyTracebackObject.tb_lasti": l.exception.tb_lasti,
            "PyTracebackObject.tb_lineno": l.exception.tb_lineno,
            "PyThreadState.next": l.thread.next,
            "PyThreadState.interp": l.thread.interp,
            "PyThreadState.thread_id": l.thread.thread_id,
            "PyInterpreterState.next": l.interpreter.next,
            "PyInterpreterState.id": l.interpreter.id,
            "PyInterpreterState.modules": l.interpreter.modules,
            "PyInterpreterState.sysdict": l.interpreter.sysdict,
            "PyInterpreterState.builtins": l.interpreter.builtins,
            "PyInterpreterState.eval_frame": l.interpreter.eval_frame,
            "PyInterpreterState.threads_head": l.interpreter.threads_head,
            "PyRuntimeState.interpreters_head": l.runtime.interpreters_head,
            "PyRuntimeState.interpreters_main": l.runtime.interpreters_main,
            "PyThreadState.exception": l.thread.exception,
            "PyCodeObject.varnames": l.code.varnames,
            "PyCodeObject.linetable": l.code.linetable,
            "sign_and_size": OB_SIZE,
            "digits": INT_DIGITS,
        }
        let optional = [
            ("PyFunctionObject.func_version", l.function.version),
            ("PyCodeObject.co_qualname", l.code.qualname),
            ("PyCodeObject.co_code_adaptive", l.code.code_adaptive),
            ("PyThreadState.exception_type", l.thread.exception_type),
            ("PyThreadState.native_thread_id", l.thread.native_thread_id),
            ("PyInterpreterState.recursion_limit", l.interpreter.recursion_limit),
            ("PyInterpreterState.stack_size", l.interpreter.stack_size),
            ("PyInterpreterState.func_version_cache", l.interpreter.function_cache),
            ("func_version_cache.entries", l.interpreter.function_cache.map(|_| FUNCTION_CACHE_ENTRIES)),
        ];
        map.extend(optional.into_iter().filter_map(|(name, value)| value.map(|value| (name, value))));
        match l.dict.style {
            KeysStyle::Size { size } => {
                map.insert("PyDictKeysObject.dk_size", size);
            }
            KeysStyle::Log2 { log2_index_bytes, kind } => {
                map.insert("PyDictKeysObject.dk_log2_index_bytes", log2_index_bytes);
                map.insert("PyDictKeysObject.dk_kind", kind);
                map.insert("PyDictValues.values", l.dict.values_items);
            }
        }
        match l.runtime.current_thread {
            CurrentThread::Runtime(offset) => {
                map.insert("PyRuntimeState.tstate_current", offset);
            }
            CurrentThread::Gil { gil, last_holder } => {
                map.insert("PyInterpreterState.gil", gil);
                map.insert("gil.last_holder", last_holder);
            }
        }
        map
    }

    /// Include directories that hold CPython headers with the internal ones.
    fn headers() -> Vec<std::path::PathBuf> {
        let mut roots = Vec::new();
        let home = std::env::var("HOME").unwrap_or_default();
        let versions = std::fs::read_dir(Path::new(&home).join(".pyenv/versions")).into_iter().flatten();
        roots.extend(versions.filter_map(Result::ok).map(|entry| entry.path()));
        roots.push("/usr".into());
        roots.extend(std::env::var_os("FLOE_EXTRA_PYTHON_PREFIX").map(Into::into));
        let mut found = Vec::new();
        for root in roots {
            let include = std::fs::read_dir(root.join("include")).into_iter().flatten();
            found.extend(
                include
                    .filter_map(Result::ok)
                    .map(|entry| entry.path())
                    .filter(|path| path.join("Python.h").exists() && path.join("internal/pycore_interp.h").exists()),
            );
        }
        found.sort();
        found
    }

    #[test]
    fn tables_agree_with_the_headers_of_every_installed_cpython() {
        let dir = tempfile::tempdir().unwrap();
        let program = dir.path().join("offsets");
        let mut compared = 0;
        for include in headers().into_iter().chain(headers_of_3_8()) {
            let built = Command::new("cc")
                .arg("-w")
                .arg("-I")
                .arg(&include)
                .arg("-I")
                .arg(include.join("internal"))
                .arg(concat!(env!("CARGO_MANIFEST_DIR"), "/src/python/offsets.c"))
                .arg("-o")
                .arg(&program)
                .output();
            let built = match built {
                Ok(built) => built,
                Err(error) => {
                    eprintln!("SKIPPED: no C compiler ({error}): the layout tables were not compared with headers");
                    return;
                }
            };
            assert!(built.status.success(), "{}: {}", include.display(), String::from_utf8_lossy(&built.stderr));
            let output = Command::new(&program).output().unwrap();
            let text = String::from_utf8(output.stdout).unwrap();
            let mut lines: BTreeMap<&str, u64> =
                text.lines().map(|line| line.split_once(' ').unwrap()).map(|(k, v)| (k, v.parse().unwrap())).collect();
            let hex = lines.remove("PY_VERSION_HEX").unwrap() as u32;
            let Some(layout) = PyLayout::of(Minor::from_hex(hex)) else {
                continue;
            };
            let table = named(layout);
            for (name, value) in &lines {
                assert_eq!(table.get(name), Some(value), "{name} of {}", include.display());
            }
            for name in table.keys() {
                assert!(lines.contains_key(name), "{name} is not printed for {}", include.display());
            }
            compared += 1;
        }
        if compared == 0 {
            eprintln!("SKIPPED: no CPython headers found: the layout tables were not compared with headers");
        } else {
            eprintln!("compared {compared} sets of headers with the layout tables");
        }
    }

    /// 3.8 keeps `PyInterpreterState` in another header.
    fn headers_of_3_8() -> Vec<std::path::PathBuf> {
        let home = std::env::var("HOME").unwrap_or_default();
        let versions = std::fs::read_dir(Path::new(&home).join(".pyenv/versions")).into_iter().flatten();
        versions
            .filter_map(Result::ok)
            .map(|entry| entry.path().join("include/python3.8"))
            .filter(|path| path.join("internal/pycore_pystate.h").exists())
            .collect()
    }

    #[test]
    fn every_supported_minor_has_one_table() {
        let minors: Vec<u8> = PyLayout::all().iter().map(|layout| layout.version.minor).collect();
        assert_eq!(minors, [8, 9, 10, 11, 12, 13, 14]);
        assert_eq!(PyLayout::of(Minor::from_hex(0x030d_00f0)).unwrap().version, Minor::three(13));
        assert!(PyLayout::of(Minor::three(7)).is_none());
        assert!(PyLayout::of(Minor { major: 2, minor: 8 }).is_none());
    }

    #[test]
    fn rows_of_3_14_are_those_measured_on_3_14_7() {
        let l = PyLayout::of(Minor::three(14)).unwrap();
        assert_eq!((l.function.vectorcall, l.function.version, l.function.version_cleared), (136, Some(144), 1));
        assert_eq!(l.small.tuple_items, 32);
        assert_eq!((l.runtime.interpreters_head, l.interpreter.modules), (808, 7688));
        assert_eq!((l.interpreter.next, l.interpreter.function_cache), (7272, Some(14264)));
        assert_eq!(l.instance, InstanceStyle::InlineBasicsize);
        assert!(l.inlines_init && l.inlines_property && !l.inlines_past_vectorcall);
    }

    #[test]
    fn the_version_follows_the_vectorcall_pointer() {
        for layout in PyLayout::all() {
            if let Some(version) = layout.function.version {
                assert_eq!(version, layout.function.vectorcall + 8, "{}", layout.version);
            }
        }
    }

    #[test]
    fn the_kernel_side_gets_every_field() {
        for layout in PyLayout::all() {
            let ebpf = layout.for_ebpf();
            assert_eq!(u64::from(ebpf.function_code), layout.function.code);
            assert_eq!(u64::from(ebpf.tstate_exception), layout.thread.exception);
            assert_eq!(ebpf.tstate_exception_type == 0, layout.version >= Minor::three(12));
            assert_eq!(ebpf.values_items == 8, layout.version >= Minor::three(13));
        }
        assert_eq!(V3_8.for_ebpf().instance_style, instance_style::DICT);
        assert_eq!(V3_11.for_ebpf().keys_style, keys_style::LOG2);
        assert_eq!(V3_14.for_ebpf().instance_style, instance_style::INLINE_BASICSIZE);
    }
}
