//! The capture machine: runs a plan and writes fields.

use core::ffi::c_void;

use aya_ebpf::helpers::generated::{bpf_loop, bpf_probe_read_user_str};
use floe_ebpf::{
    Counter, Field, LOAD_EXCEPTION_ARGS, LOAD_FUNC_GLOBALS, Layout, MAX_OPS, MAX_STR, Plan, RECORD_LEN, int_style, op,
    value,
};

use crate::{
    maps::{Thread, count},
    python::{
        BASE_EXCEPTION_SUBCLASS, Context, DICT_SUBCLASS, LIST_SUBCLASS, LONG_SUBCLASS, OB_SIZE, TUPLE_SUBCLASS,
        UNICODE_SUBCLASS, attribute, dict_item, exception, keyword, type_flags, type_of,
    },
    user::{ARGUMENTS, masked, pointer, read, read_bytes},
};

/// `PyFloatObject.ob_fval`; `PyLongObject`'s tag.
const FIRST_FIELD: u64 = 16;
/// Digits of an int.
const DIGITS: u64 = 24;

/// A plan in execution.
#[repr(C)]
pub struct Machine {
    pub context: Context,
    pub plan: *const Plan,
    pub function: u64,
    pub args: u64,
    pub nargsf: u64,
    pub kwnames: u64,
    /// The return value; 0 at entry and when an exception leaves the function.
    pub result: u64,
    /// An exception is leaving the function.
    pub raised: u64,
}

impl Machine {
    /// Runs the plan; fields go behind the first `cursor` bytes of the record. Gives the record's length, and whether a
    /// field did not fit.
    #[inline(always)]
    pub fn run(&mut self, cursor: u64) -> (u64, bool) {
        let thread = self.context.thread;
        // SAFETY: `plan` is an element of PLANS.
        let len = unsafe { (*self.plan).len };
        let len = if len > MAX_OPS as u32 { MAX_OPS as u32 } else { len };
        // SAFETY: the callback and its context fit together; the context outlives the call.
        unsafe {
            (*thread).cursor = cursor;
            (*thread).cut = 0;
            (*thread).last_object = 0;
            bpf_loop(len, step as *mut c_void, core::ptr::from_mut(self).cast(), 0);
            ((*thread).cursor, (*thread).cut != 0)
        }
    }
}

/// One operation.
unsafe extern "C" fn step(index: u32, machine: *mut c_void) -> i64 {
    // SAFETY: the context that `Machine::run` passed; the pointers in it are map values or the stack.
    unsafe {
        let machine = &*machine.cast::<Machine>();
        let at = masked!(u64::from(index), 63);
        let operation = (&raw const (*machine.plan).ops).cast::<floe_ebpf::Op>().add(at as usize);
        let code = (*operation).code;
        let thread = machine.context.thread;
        let layout = &*machine.context.layout;
        let source = *Thread::register(thread, (*operation).src);
        let argument = (*operation).arg;
        let hop = (*operation).hop;
        let mut value = 0;
        match code {
            op::ARG => {
                let nargs = machine.nargsf & ARGUMENTS;
                if u64::from(argument) < nargs {
                    value = pointer(machine.args + u64::from(argument) * 8).unwrap_or(0);
                } else if hop != 0 && machine.kwnames != 0 {
                    let found = keyword(&machine.context, machine.kwnames, hop - 1);
                    if found != 0 {
                        value = pointer(machine.args + (nargs + found - 1) * 8).unwrap_or(0);
                    }
                }
            }
            op::RESULT => value = machine.result,
            op::EXCEPTION | op::EXCEPTION_TYPE => {
                if machine.raised != 0 {
                    value = exception(thread, layout, code == op::EXCEPTION_TYPE).unwrap_or(0);
                }
            }
            op::FUNCTION => value = machine.function,
            _ if source == 0 => {}
            op::ATTR => value = attribute(&machine.context, source, argument, hop),
            op::KEY => value = dict_item(&machine.context, source, argument, hop),
            op::ITEM => value = item(layout, source, argument).unwrap_or(0),
            op::LOAD => {
                let offset = match argument {
                    LOAD_FUNC_GLOBALS => u32::from(layout.function_globals),
                    LOAD_EXCEPTION_ARGS => u32::from(layout.exception_args),
                    other => other,
                };
                // Before 3.12 what is raised may still be the bare message.
                let flags = match type_of(source) {
                    Some(type_) => type_flags(layout, type_).unwrap_or(0),
                    None => 0,
                };
                if argument != LOAD_EXCEPTION_ARGS || flags & BASE_EXCEPTION_SUBCLASS != 0 {
                    value = pointer(source + u64::from(offset)).unwrap_or(0);
                }
            }
            op::TYPE => value = type_of(source).unwrap_or(0),
            op::VALUE => {
                leaf(machine, layout, source, operation);
                return 0;
            }
            op::TYPE_NAME => {
                type_name(machine, layout, source, operation);
                return 0;
            }
            op::LEN => {
                if let Some(len) = length(layout, source) {
                    number(machine, (*operation).field, value::INT, len);
                }
                return 0;
            }
            _ => {}
        }
        if code < op::VALUE || code == op::EXCEPTION_TYPE {
            *Thread::register(thread, (*operation).dst) = value;
        }
        0
    }
}

/// Item `index` of a tuple or list.
#[inline(always)]
fn item(layout: &Layout, object: u64, index: u32) -> Option<u64> {
    let flags = type_flags(layout, type_of(object)?)?;
    let len = read::<u64>(object + OB_SIZE)?;
    let index = u64::from(index);
    if index >= len {
        return None;
    }
    if flags & TUPLE_SUBCLASS != 0 {
        pointer(object + u64::from(layout.tuple_items) + index * 8)
    } else if flags & LIST_SUBCLASS != 0 {
        pointer(pointer(object + u64::from(layout.list_items))? + index * 8)
    } else {
        None
    }
}

/// Number of items of a tuple, list, str or dict.
#[inline(always)]
fn length(layout: &Layout, object: u64) -> Option<u64> {
    let flags = type_flags(layout, type_of(object)?)?;
    if flags & DICT_SUBCLASS != 0 {
        read::<u64>(object + u64::from(layout.dict_used))
    } else if flags & (TUPLE_SUBCLASS | LIST_SUBCLASS | UNICODE_SUBCLASS) != 0 {
        read::<u64>(object + OB_SIZE)
    } else {
        None
    }
}

/// Room for a field of at most `payload` bytes: its place in the record.
#[inline(always)]
fn room(machine: &Machine, payload: u64) -> Option<u64> {
    // SAFETY: a map value.
    let cursor = unsafe { (*machine.context.thread).cursor };
    if cursor + size_of::<Field>() as u64 + payload + 4 > RECORD_LEN as u64 - 1 {
        // SAFETY: as above.
        unsafe { (*machine.context.thread).cut = 1 };
        return None;
    }
    Some(masked!(cursor, 4092))
}

#[inline(always)]
fn put(machine: &Machine, at: u64, field: u8, kind: u8, cut: u8, len: u64) {
    // SAFETY: `at` is masked to the record; a field header fits behind every such place.
    unsafe {
        let record = Thread::record(machine.context.thread);
        let header = record.add(at as usize);
        *header = field;
        *header.add(1) = kind;
        *header.add(2) = cut;
        *header.add(3) = 0;
        header.add(4).cast::<u32>().write(len as u32);
        (*machine.context.thread).cursor = at + size_of::<Field>() as u64 + ((len + 3) & !3);
    }
}

/// A field with eight bytes.
#[inline(always)]
fn number(machine: &Machine, field: u8, kind: u8, bits: u64) {
    let Some(at) = room(machine, 8) else { return };
    // SAFETY: as in `put`.
    unsafe {
        let record = Thread::record(machine.context.thread);
        // Fields begin at multiples of 4.
        let payload = record.add(at as usize + 8).cast::<u32>();
        payload.write(bits as u32);
        payload.add(1).write((bits >> 32) as u32);
    }
    put(machine, at, field, kind, 0, 8);
}

/// The value of an object, if it is of a kind that can be captured.
#[inline(always)]
fn leaf(machine: &Machine, layout: &Layout, object: u64, operation: *const floe_ebpf::Op) {
    if leaf_value(machine, layout, object, operation).is_none() {
        count(Counter::FieldsAbsent);
    }
}

#[inline(always)]
fn leaf_value(machine: &Machine, layout: &Layout, object: u64, operation: *const floe_ebpf::Op) -> Option<()> {
    // SAFETY: an element of PLANS.
    let (field, key, hop, max) = unsafe { ((*operation).field, (*operation).arg, (*operation).hop, (*operation).max) };
    // SAFETY: a map value.
    let process = unsafe { &(*machine.context.thread).process };
    if object == process.none {
        let at = room(machine, 0)?;
        put(machine, at, field, value::NONE, 0, 0);
        return Some(());
    }
    // ob_refcnt, ob_type, length, hash, state: of a str, and of anything else at least the first two
    if let Some(head) = read::<[u64; 5]>(object)
        && head[1] == process.str_type
    {
        return text(machine, layout, object, head[2], head[4] as u32, field, max);
    }
    let mut object = object;
    let mut type_ = type_of(object)?;
    let mut flags = type_flags(layout, type_)?;
    if flags & (UNICODE_SUBCLASS | LONG_SUBCLASS) == 0 && type_ != process.float_type {
        if read::<u64>(type_ + u64::from(layout.type_base)) != Some(process.float_type) {
            // An enum that is neither a str nor an int keeps its value in an attribute.
            let inner = attribute(&machine.context, object, key, hop);
            if inner == 0 {
                return None;
            }
            object = inner;
            type_ = type_of(object)?;
            flags = type_flags(layout, type_)?;
        }
    }
    if flags & UNICODE_SUBCLASS != 0 {
        let len = read::<u64>(object + OB_SIZE)?;
        let state = read::<u32>(object + u64::from(layout.str_state))?;
        return text(machine, layout, object, len, state, field, max);
    }
    if flags & LONG_SUBCLASS != 0 {
        let value = integer(layout, object)?;
        if type_ == process.bool_type {
            number(machine, field, value::BOOL, u64::from(value != 0));
        } else {
            number(machine, field, value::INT, value as u64);
        }
        return Some(());
    }
    if type_ == process.float_type || read::<u64>(type_ + u64::from(layout.type_base)) == Some(process.float_type) {
        number(machine, field, value::FLOAT, read::<u64>(object + FIRST_FIELD)?);
        return Some(());
    }
    None
}

/// An int of at most 63 bits.
#[inline(always)]
fn integer(layout: &Layout, object: u64) -> Option<i64> {
    let head = read::<[u64; 2]>(object + FIRST_FIELD)?;
    let (digits, negative) = if layout.int_style == int_style::LV_TAG {
        // lv_tag: sign in the low two bits (0 positive, 1 zero, 2 negative), number of digits above the third
        (head[0] >> 3, head[0] & 3 == 2)
    } else {
        let size = head[0] as i64;
        (if size < 0 { size.wrapping_neg() as u64 } else { size as u64 }, size < 0)
    };
    let magnitude = match digits {
        0 => 0,
        1 => head[1] & 0x3fff_ffff,
        2 => (head[1] & 0x3fff_ffff) | (((head[1] >> 32) & 0x3fff_ffff) << 30),
        3 => {
            let third = u64::from(read::<u32>(object + DIGITS + 8)?);
            if third > 7 {
                return None;
            }
            (head[1] & 0x3fff_ffff) | (((head[1] >> 32) & 0x3fff_ffff) << 30) | (third << 60)
        }
        _ => return None,
    };
    let magnitude = magnitude as i64;
    if magnitude < 0 {
        return None;
    }
    Some(if negative { -magnitude } else { magnitude })
}

/// A str: its bytes as they are in memory; user space decodes them.
#[inline(always)]
fn text(machine: &Machine, layout: &Layout, object: u64, len: u64, state: u32, field: u8, max: u32) -> Option<()> {
    let kind = (state >> 2) & 7;
    let ascii = state & 0x40 != 0;
    let shift = match kind {
        1 => 0u64,
        2 => 1,
        4 => 2,
        _ => return None, // 3.8 to 3.11: not ready
    };
    let data = if state & 0x20 == 0 {
        pointer(object + u64::from(layout.str_compact_data))?
    } else if ascii {
        object + u64::from(layout.str_ascii_data)
    } else {
        object + u64::from(layout.str_compact_data)
    };
    let limit = if max > MAX_STR as u32 { MAX_STR as u64 } else { u64::from(max) } & !3;
    if len > u64::from(u32::MAX) {
        return None;
    }
    let mut bytes = len << shift;
    let mut cut = 0;
    if bytes > limit {
        bytes = limit;
        cut = 1;
    }
    let at = room(machine, bytes)?;
    let bytes = masked!(bytes, 1023);
    // SAFETY: `at` and `bytes` are masked; the record has room behind its last place.
    let ok = bytes == 0
        || unsafe {
            let record = Thread::record(machine.context.thread);
            read_bytes(record.add(at as usize + 8), bytes as u32, data)
        };
    if !ok {
        return None;
    }
    let kind = match (kind, ascii) {
        (1, true) => value::UTF8,
        (1, false) => value::LATIN1,
        (2, _) => value::UCS2,
        _ => value::UCS4,
    };
    put(machine, at, field, kind, cut, bytes);
    Some(())
}

/// The name of a type: a C string.
#[inline(always)]
fn type_name(machine: &Machine, layout: &Layout, type_: u64, operation: *const floe_ebpf::Op) {
    // SAFETY: an element of PLANS.
    let field = unsafe { (*operation).field };
    let Some(name) = pointer(type_ + u64::from(layout.type_name)) else { return };
    let Some(at) = room(machine, 128) else { return };
    // SAFETY: `at` is masked; the record has room for 128 bytes behind every place.
    let len = unsafe {
        let record = Thread::record(machine.context.thread);
        bpf_probe_read_user_str(record.add(at as usize + 8).cast(), 128, name as *const c_void)
    };
    if len > 1 && len <= 128 {
        let cut = u8::from(len == 128);
        put(machine, at, field, value::UTF8, cut, len as u64 - 1);
    }
}
