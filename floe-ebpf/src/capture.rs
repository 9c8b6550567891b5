//! The capture machine: runs a plan and writes fields.
//!
//! A plan is a small program without branches but for loops ([`op::EACH`]) and calls of the library. What the machine
//! remembers between two operations is in [`Thread`]: the verifier then takes all turns of the loop for one.

use core::ffi::c_void;

use aya_ebpf::helpers::generated::bpf_probe_read_user_str;
use floe_ebpf::{
    CALLERS_HOP, Counter, Field, LIBRARY, LIBRARY_REGS, LIST_LEN, LOAD_EXCEPTION_ARGS, LOAD_FUNC_GLOBALS, Layout,
    MAX_LOOPS, MAX_OPS, MAX_STEPS, MAX_STR, Op, RECORD_LEN, int_style, op, routine, value,
};

use crate::{
    maps::{BEGINNING, PLANS, Thread, count, repeat},
    python::{
        BASE_EXCEPTION_SUBCLASS, DICT_SUBCLASS, LIST_SUBCLASS, LONG_SUBCLASS, OB_SIZE, TUPLE_SUBCLASS,
        UNICODE_SUBCLASS, attribute, attribute_of_type, dict_item, dict_values, exception, keyword, type_flags,
        type_of,
    },
    user::{ARGUMENTS, masked, pointer, read, read_bytes, word},
};

/// `PyFloatObject.ob_fval`; `PyLongObject`'s tag.
const FIRST_FIELD: u64 = 16;
/// Digits of an int.
const DIGITS: u64 = 24;

/// What a plan reads: the call. It is kept in [`Thread`], too: the programs' stack is small.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Call {
    pub function: u64,
    pub args: u64,
    pub nargsf: u64,
    pub kwnames: u64,
    /// The return value; 0 at entry and when an exception leaves the function.
    pub result: u64,
    /// An exception is leaving the function.
    pub raised: u64,
}

/// Runs a plan on the thread's call; fields go behind the first `cursor` bytes of the record. Gives the record's length,
/// and whether a field did not fit.
#[inline(always)]
pub fn run(thread: *mut Thread, plan: u32, cursor: u64) -> (u64, bool) {
    // Most exit plans are about exceptions only.
    // SAFETY: elements of maps.
    if unsafe { (*thread).call.raised == 0 && PLANS.get_ptr(plan).is_none_or(|plan| (*plan).returned == 0) } {
        return (cursor, false);
    }
    // SAFETY: a map value; the callback and its context fit together. Volatile: a `memset` is a call.
    unsafe {
        (*thread).cursor = cursor;
        (&raw mut (*thread).cut).write_volatile(0);
        (&raw mut (*thread).last_object).write_volatile(0);
        (*thread).plan = u64::from(plan);
        (&raw mut (*thread).pc).write_volatile(0);
        (&raw mut (*thread).open_loops).write_volatile(0);
        (&raw mut (*thread).back).write_volatile(0);
        repeat(MAX_STEPS / AT_ONCE as u32, step, thread);
        ((*thread).cursor, (*thread).cut != 0)
    }
}

/// Operations of one call of [`step`]: a call costs more than an operation of the simple ones.
const AT_ONCE: u64 = 4;

/// Some operations.
unsafe extern "C" fn step(_index: u32, thread: *mut *mut Thread) -> i64 {
    // SAFETY: what `run` passed, a map value.
    let thread = unsafe { *thread };
    let mut done = 0;
    loop {
        if operation(thread) != 0 {
            return 1;
        }
        // Masked, so that the compiler does not write the operation out several times.
        done = masked!(done + 1, 7);
        if done >= AT_ONCE {
            return 0;
        }
    }
}

/// One operation; 1 at the end of the plan.
#[inline(always)]
fn operation(thread: *mut Thread) -> i64 {
    // SAFETY: a map value.
    unsafe {
        let Some(layout) = crate::maps::layout(thread) else { return 1 };
        let call = &raw const (*thread).call;
        let Some(plan) = PLANS.get_ptr((*thread).plan as u32) else { return 1 };
        let pc = (*thread).pc;
        let len = if (*call).raised != 0 || (*thread).back != 0 { (*plan).len } else { (*plan).returned };
        if pc >= u64::from(len) || pc >= MAX_OPS as u64 {
            return 1;
        }
        (*thread).pc = pc + 1;
        let operation = (&raw const (*plan).ops).cast::<Op>().add(masked!(pc, 255) as usize);
        let code = (*operation).code;
        let source = *Thread::register(thread, (*operation).src);
        let argument = (*operation).arg;
        let mut value = 0;
        match code {
            op::ARG => {
                let nargs = (*call).nargsf & ARGUMENTS;
                let name = (*operation).hop;
                if u64::from(argument) < nargs {
                    value = if u64::from(argument) < (*thread).arguments_read {
                        let arguments = (&raw const (*thread).arguments).cast::<u64>();
                        *arguments.add(masked!(u64::from(argument), 7) as usize)
                    } else {
                        pointer((*call).args + u64::from(argument) * 8).unwrap_or(0)
                    };
                } else if name != 0 && (*call).kwnames != 0 {
                    let found = keyword(thread, (*call).kwnames, name - 1);
                    if found != 0 {
                        value = pointer((*call).args + (nargs + found - 1) * 8).unwrap_or(0);
                    }
                }
            }
            op::RESULT => value = (*call).result,
            op::EXCEPTION | op::EXCEPTION_TYPE => {
                if (*call).raised != 0 {
                    value = exception(thread, layout, code == op::EXCEPTION_TYPE).unwrap_or(0);
                }
            }
            op::FUNCTION => value = (*call).function,
            op::NEXT => {
                next(thread, operation, pc);
                return 0;
            }
            op::RETURN => {
                if argument == 0 || (*thread).cursor != (*thread).call_cursor {
                    if (*thread).cursor == (*thread).call_cursor {
                        count(Counter::FieldsAbsent);
                    }
                    (*thread).pc = (*thread).back;
                    (*thread).plan = (*thread).back_plan;
                    (*thread).back = 0;
                }
                return 0;
            }
            op::EACH => {
                each(thread, source, &*operation, pc);
                return 0;
            }
            // A leaf that is not there; a step from nothing leads to nothing.
            _ if source == 0 => {
                if code >= op::VALUE {
                    return 0;
                }
            }
            op::ATTR => {
                let hop = (*operation).hop;
                let hop = if hop == CALLERS_HOP { (*thread).call_hop as u32 } else { hop };
                value = attribute(thread, source, argument, hop);
                if value == 0 {
                    value = attribute_of_type(thread, source, argument, hop);
                }
            }
            op::KEY => value = dict_item(thread, source, argument, (*operation).hop),
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
                leaf(thread, layout, source, operation, pc);
                return 0;
            }
            op::TYPE_NAME => {
                type_name(thread, layout, source, operation);
                return 0;
            }
            op::LEN => {
                if let Some(len) = length(layout, source) {
                    number(thread, (*operation).field, value::INT, len);
                }
                return 0;
            }
            op::UUID => {
                uuid(thread, source, u32::from(field_of(thread, operation)));
                return 0;
            }
            _ => {}
        }
        *Thread::register(thread, (*operation).dst) = value;
        0
    }
}

/// Begins a loop: its list begins, and its NEXT is the next operation. Without anything to go through, the loop is skipped.
/// Not inlined, as [`datetime`] and [`uuid`] are not: the stacks of what is called are one, and that of `step` is in all.
#[inline(never)]
extern "C" fn each(thread: *mut Thread, object: u64, operation: &Op, pc: u64) {
    let operation: *const Op = operation;
    let Some(layout) = crate::maps::layout(thread) else { return };
    // SAFETY: an element of PLANS; a map value.
    unsafe {
        let next = u64::from((*operation).arg);
        (*thread).pc = next + 1;
        let level = (*thread).open_loops;
        if object == 0 || level >= MAX_LOOPS as u64 {
            return;
        }
        let (max, separator) = ((*operation).max, (*operation).hop);
        let this = Thread::open_loop(thread, level);
        if begin(thread, layout, object, max >> 16 == u32::from(value::MAP), this).is_none() {
            return;
        }
        let field = field_of(thread, operation);
        let Some(at) = room(thread, 4) else { return };
        let record = Thread::record(thread);
        record.add(at as usize + 8).cast::<u32>().write(separator);
        put(thread, at, field, (max >> 16) as u8, 0, 4);
        (*this).start = pc + 1;
        (*thread).open_loops = level + 1;
        (*thread).pc = next;
    }
}

/// Where the items of an object are.
#[inline(always)]
fn begin(
    thread: *mut Thread,
    layout: &Layout,
    object: u64,
    only_dict: bool,
    this: *mut crate::maps::Loop,
) -> Option<()> {
    let flags = type_flags(layout, type_of(object)?)?;
    let count;
    let (values, stride, keys, key_stride);
    if flags & DICT_SUBCLASS != 0 {
        let table = dict_values(thread, layout, object)?;
        (values, stride, count) = (table.values, table.value_stride, table.len);
        (keys, key_stride) = if only_dict { (table.keys, table.key_stride) } else { (0, 0) };
    } else if only_dict {
        return None;
    } else {
        if flags & TUPLE_SUBCLASS != 0 {
            values = object + u64::from(layout.tuple_items);
            count = read::<u64>(object + OB_SIZE)?;
        } else if flags & LIST_SUBCLASS != 0 {
            count = read::<u64>(object + OB_SIZE)?;
            values = read::<u64>(object + u64::from(layout.list_items))?;
        } else {
            return None;
        }
        (stride, keys, key_stride) = (8, 0, 0);
    }
    // SAFETY: an element of the thread's loops.
    unsafe {
        (*this).values = values;
        (*this).stride = stride;
        (*this).keys = keys;
        (*this).key_stride = key_stride;
        (*this).count = count;
        (*this).index = 0;
        (*this).taken = 0;
    }
    Some(())
}

/// Goes to the next item of the innermost loop, or ends it.
#[inline(always)]
fn next(thread: *mut Thread, operation: *const Op, pc: u64) {
    // SAFETY: an element of PLANS; a map value.
    unsafe {
        let level = (*thread).open_loops;
        if level == 0 {
            return;
        }
        let this = Thread::open_loop(thread, level - 1);
        let field = field_of(thread, operation);
        let index = (*this).index;
        let more = index < (*this).count;
        let bound = u64::from((*operation).max & 0xffff);
        if !more || (*this).taken >= bound || (*thread).cursor > LIST_LEN as u64 || (*thread).cut != 0 {
            (*thread).open_loops = level - 1;
            if let Some(at) = room(thread, 0) {
                put(thread, at, field, value::END, u8::from(more), 0);
            }
            return;
        }
        (*this).index = index + 1;
        (*thread).pc = pc; // an entry that was deleted is passed over
        let Some(item) = pointer((*this).values + index * (*this).stride) else { return };
        let Some(at) = room(thread, 0) else { return };
        put(thread, at, field, value::ITEM, 0, 0);
        let dst = (*operation).dst;
        *Thread::register(thread, dst) = item;
        if (*this).keys != 0 {
            *Thread::register(thread, dst.wrapping_add(1)) =
                pointer((*this).keys + index * (*this).key_stride).unwrap_or(0);
        }
        (*this).taken += 1;
        (*thread).pc = (*this).start;
    }
}

/// The field that an operation writes: in the library that of its caller.
///
/// # Safety
/// Both are valid.
#[inline(always)]
unsafe fn field_of(thread: *const Thread, operation: *const Op) -> u8 {
    // SAFETY: the caller's.
    unsafe { if (*thread).back == 0 { (*operation).field } else { (*thread).call_field as u8 } }
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
fn room(thread: *mut Thread, payload: u64) -> Option<u64> {
    // SAFETY: a map value.
    let cursor = unsafe { (*thread).cursor };
    if cursor + size_of::<Field>() as u64 + payload + 4 > RECORD_LEN as u64 - 1 {
        // SAFETY: as above.
        unsafe { (*thread).cut = 1 };
        return None;
    }
    Some(masked!(cursor, 16380))
}

#[inline(always)]
fn put(thread: *mut Thread, at: u64, field: u8, kind: u8, cut: u8, len: u64) {
    // SAFETY: `at` is masked to the record; a field header fits behind every such place.
    unsafe {
        let record = Thread::record(thread);
        let header = record.add(at as usize);
        *header = field;
        *header.add(1) = kind;
        *header.add(2) = cut;
        *header.add(3) = 0;
        header.add(4).cast::<u32>().write(len as u32);
        (*thread).cursor = at + size_of::<Field>() as u64 + ((len + 3) & !3);
    }
}

/// A field with eight bytes.
#[inline(always)]
fn number(thread: *mut Thread, field: u8, kind: u8, bits: u64) {
    let Some(at) = room(thread, 8) else { return };
    // SAFETY: as in `put`.
    unsafe {
        let record = Thread::record(thread);
        // Fields begin at multiples of 4.
        let payload = record.add(at as usize + 8).cast::<u32>();
        payload.write(bits as u32);
        payload.add(1).write((bits >> 32) as u32);
    }
    put(thread, at, field, kind, 0, 8);
}

/// The value of an object, if it is of a kind that can be captured.
#[inline(always)]
fn leaf(thread: *mut Thread, layout: &Layout, object: u64, operation: *const Op, pc: u64) {
    // SAFETY: an element of PLANS; a map value.
    let (field, max, in_library) = unsafe {
        let in_library = (*thread).back != 0;
        let max = if in_library { (*thread).call_max as u32 } else { (*operation).max };
        (field_of(thread, operation), max, in_library)
    };
    match leaf_value(thread, layout, object, field, max).unwrap_or(ABSENT) {
        CAPTURED => {}
        start if start != ABSENT && !in_library => {
            // SAFETY: as above.
            unsafe {
                (*thread).back = pc + 1;
                (*thread).back_plan = (*thread).plan;
                (*thread).call_field = u64::from(field);
                (*thread).call_max = u64::from(max);
                (*thread).call_hop = u64::from((*operation).hop);
                (*thread).call_cursor = (*thread).cursor;
                *Thread::register(thread, LIBRARY_REGS as u8) = object;
                (*thread).plan = u64::from(LIBRARY);
                (*thread).pc = u64::from(start);
            }
        }
        // The library's RETURN counts.
        _ if in_library => {}
        _ => count(Counter::FieldsAbsent),
    }
}

/// What [`leaf_value`] gives, if not the beginning of a routine of the library that knows more. Numbers, and not an enum: of
/// what an enum leaves open, kernels before 6.3 do not let a program copy even the bytes.
const CAPTURED: u32 = u32::MAX;
const ABSENT: u32 = u32::MAX - 1;

#[inline(always)]
fn leaf_value(thread: *mut Thread, layout: &Layout, object: u64, field: u8, max: u32) -> Option<u32> {
    // SAFETY: a map value.
    let process = unsafe { &(*thread).process };
    if object == process.none {
        let at = room(thread, 0)?;
        put(thread, at, field, value::NONE, 0, 0);
        return Some(CAPTURED);
    }
    // Most values are short texts, and with their objects in one read.
    // SAFETY: a map value.
    let known = unsafe {
        let beginning = (&raw mut (*thread).beginning).cast::<u64>();
        if read_bytes(beginning.cast(), 8 * BEGINNING as u32, object) {
            BEGINNING as u64 * 8
        } else if read_bytes(beginning.cast(), 40, object) {
            40 // the end of the memory is near
        } else {
            0
        }
    };
    // SAFETY: as above.
    let beginning = unsafe { &(*thread).beginning };
    // ob_refcnt, ob_type, length, hash, state: of a str, and of anything else at least the first two
    if known != 0 && beginning[1] == process.str_type {
        text(thread, layout, object, beginning[2], beginning[4] as u32, known, field, max)?;
        return Some(CAPTURED);
    }
    let type_ = type_of(object)?;
    let flags = type_flags(layout, type_)?;
    if flags & UNICODE_SUBCLASS != 0 {
        let len = read::<u64>(object + OB_SIZE)?;
        let state = read::<u32>(object + u64::from(layout.str_state))?;
        text(thread, layout, object, len, state, 0, field, max)?;
        return Some(CAPTURED);
    }
    if flags & LONG_SUBCLASS != 0 {
        let value = integer(layout, object)?;
        if type_ == process.bool_type {
            number(thread, field, value::BOOL, u64::from(value != 0));
        } else {
            number(thread, field, value::INT, value as u64);
        }
        return Some(CAPTURED);
    }
    let base = read::<u64>(type_ + u64::from(layout.type_base))?;
    if type_ == process.float_type || base == process.float_type {
        number(thread, field, value::FLOAT, read::<u64>(object + FIRST_FIELD)?);
        return Some(CAPTURED);
    }
    if flags & (TUPLE_SUBCLASS | LIST_SUBCLASS | DICT_SUBCLASS) != 0 {
        return None;
    }
    match special(layout, type_, base) {
        Special::Path => Some(routine::PATH),
        Special::Uuid => Some(routine::UUID),
        Special::DateTime => {
            if datetime(thread, object, u32::from(field)) == 0 {
                None
            } else {
                Some(CAPTURED)
            }
        }
        Special::Date => {
            let at = room(thread, 4)?;
            let digits = read::<u32>(object + DATE_DIGITS)?;
            // SAFETY: as in `put`.
            unsafe { Thread::record(thread).add(at as usize + 8).cast::<u32>().write(digits) };
            put(thread, at, field, value::DATE, 0, 4);
            Some(CAPTURED)
        }
        Special::None => Some(routine::ENUM),
    }
}

/// Types of the standard library whose values are known.
#[derive(Clone, Copy, PartialEq)]
enum Special {
    None,
    Path,
    Uuid,
    DateTime,
    Date,
}

/// Which of them a type is, or is derived from: by the names of the type and of its base. What the objects are read for
/// is checked again, so a class of the same name is no more than absent.
#[inline(always)]
fn special(layout: &Layout, type_: u64, base: u64) -> Special {
    match named(layout, type_) {
        Special::None if base != 0 => named(layout, base),
        special => special,
    }
}

#[inline(always)]
fn named(layout: &Layout, type_: u64) -> Special {
    const POSIX_PATH: [u64; 2] = [word(b"PosixPath\0", 0), word(b"PosixPath\0", 8)];
    const PURE_PATH: [u64; 2] = [word(b"PurePosixPath\0", 0), word(b"PurePosixPath\0", 8)];
    const UUID: u64 = word(b"UUID\0", 0);
    const DATETIME: [u64; 2] = [word(b"datetime.datetime\0", 0), word(b"datetime.datetime\0", 8)];
    const DATE: [u64; 2] = [word(b"datetime.date\0", 0), word(b"datetime.date\0", 8)];
    // The names are with their terminating zero within a larger piece of memory: a str object's, or a literal's.
    let Some(address) = pointer(type_ + u64::from(layout.type_name)) else { return Special::None };
    let Some([first, second]) = read::<[u64; 2]>(address) else { return Special::None };
    if first == POSIX_PATH[0] && second & 0xffff == POSIX_PATH[1]
        || first == PURE_PATH[0] && second & 0xffff_ffff_ffff == PURE_PATH[1]
    {
        Special::Path
    } else if first & 0xff_ffff_ffff == UUID {
        Special::Uuid
    } else if first == DATETIME[0] && second == DATETIME[1] {
        Special::DateTime
    } else if first == DATE[0] && second & 0xffff_ffff_ffff == DATE[1] {
        Special::Date
    } else {
        Special::None
    }
}

/// `PyDateTime_DateTime`: `hastzinfo`, its digits, and `tzinfo`.
const DATE_HAS_ZONE: u64 = 24;
const DATE_DIGITS: u64 = 25;
const DATE_ZONE: u64 = 40;
/// `PyDateTime_TimeZone.offset`; `PyDateTime_Delta.days` and `.seconds`.
const ZONE_OFFSET: u64 = 16;
const DELTA_DAYS: u64 = 24;

/// A `datetime` without time zone, or with one of a fixed offset from UTC.
#[inline(never)]
extern "C" fn datetime(thread: *mut Thread, object: u64, field: u32) -> u32 {
    u32::from(digits_and_zone(thread, object, field as u8).is_some())
}

#[inline(always)]
fn digits_and_zone(thread: *mut Thread, object: u64, field: u8) -> Option<()> {
    let layout = crate::maps::layout(thread)?;
    const TIMEZONE: [u64; 2] = [word(b"datetime.timezone\0", 0), word(b"datetime.timezone\0", 8)];
    let mut offset = i32::MIN;
    if read::<u8>(object + DATE_HAS_ZONE)? != 0 {
        let zone = pointer(object + DATE_ZONE)?;
        let name = pointer(type_of(zone)? + u64::from(layout.type_name))?;
        if read::<[u64; 2]>(name)? != TIMEZONE {
            return None; // its offset is the result of code
        }
        let [days, seconds] = read::<[i32; 2]>(pointer(zone + ZONE_OFFSET)? + DELTA_DAYS)?;
        offset = days.wrapping_mul(86400).wrapping_add(seconds);
    }
    let at = room(thread, 16)?;
    let digits = read::<[u32; 3]>(object + DATE_DIGITS)?;
    // SAFETY: as in `put`.
    unsafe {
        let payload = Thread::record(thread).add(at as usize + 8).cast::<u32>();
        payload.write(digits[0]);
        payload.add(1).write(digits[1]);
        payload.add(2).write(digits[2]);
        payload.add(3).write(offset as u32);
    }
    put(thread, at, field, value::DATETIME, 0, 16);
    Some(())
}

/// An int of at most 150 bits, as a UUID is made of one.
#[inline(never)]
extern "C" fn uuid(thread: *mut Thread, object: u64, field: u32) {
    digits_of_uuid(thread, object, field as u8);
}

#[inline(always)]
fn digits_of_uuid(thread: *mut Thread, object: u64, field: u8) -> Option<()> {
    let layout = crate::maps::layout(thread)?;
    let flags = type_flags(layout, type_of(object)?)?;
    if flags & LONG_SUBCLASS == 0 {
        return None;
    }
    let head = read::<u64>(object + FIRST_FIELD)?;
    let digits = if layout.int_style == int_style::LV_TAG { head >> 3 } else { head };
    // Negative ones have an enormous size, or sign 2.
    if digits > 5 || layout.int_style == int_style::LV_TAG && head & 3 == 2 {
        return None;
    }
    let at = room(thread, 20)?;
    // SAFETY: a map value; `at` is masked to the record, with room behind.
    unsafe {
        let payload = Thread::record(thread).add(at as usize + 8).cast::<u32>();
        let mut i = 0;
        while i < 5 {
            let digit = if i < digits { read::<u32>(object + DIGITS + 4 * i)? } else { 0 };
            payload.add(i as usize).write(digit & 0x3fff_ffff);
            i += 1;
        }
        put(thread, at, field, value::UUID, 0, 20);
    }
    Some(())
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

/// A str: its bytes as they are in memory; user space decodes them. Of the object, `known` bytes are in the thread's
/// `beginning`.
#[inline(always)]
#[allow(clippy::too_many_arguments, reason = "inlined, and a struct on the small stack would be none of the cost")]
fn text(
    thread: *mut Thread,
    layout: &Layout,
    object: u64,
    len: u64,
    state: u32,
    known: u64,
    field: u8,
    max: u32,
) -> Option<()> {
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
    let at = room(thread, bytes)?;
    let start = data.wrapping_sub(object);
    // SAFETY: `at` and `bytes` are masked; the record has room behind its last place.
    let ok = unsafe {
        let target = Thread::record(thread).add(at as usize + 8);
        if (start == ASCII_DATA || start == ASCII_DATA + 8) && start + bytes <= known {
            let source = (&raw const (*thread).beginning).cast::<u32>();
            if start == ASCII_DATA {
                copy::<{ WORDS - ASCII_DATA as usize / 4 }>(target.cast(), source.add(ASCII_DATA as usize / 4));
            } else {
                copy::<{ WORDS - ASCII_DATA as usize / 4 - 2 }>(target.cast(), source.add(ASCII_DATA as usize / 4 + 2));
            }
            true
        } else {
            // Masked here: 6.12 forgets bounds where a sum with the number is compared.
            bytes == 0 || read_bytes(target, masked!(bytes, 4095) as u32, data)
        }
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
    put(thread, at, field, kind, cut, bytes);
    Some(())
}

/// `sizeof(PyASCIIObject)` from 3.12 on; before, and of a debug build, 8 more.
const ASCII_DATA: u64 = 40;

/// What `beginning` holds, in the words that fields are aligned to.
const WORDS: usize = BEGINNING * 2;

/// Copies what `beginning` holds of a text, and of what follows it: no branches are quicker than few bytes.
///
/// # Safety
/// So many words can be read and written.
#[inline(always)]
unsafe fn copy<const COUNT: usize>(to: *mut u32, from: *const u32) {
    let mut i = 0;
    while i < COUNT {
        // SAFETY: the caller's.
        unsafe { to.add(i).write(from.add(i).read()) };
        i += 1;
    }
}

/// The name of a type: a C string.
#[inline(always)]
fn type_name(thread: *mut Thread, layout: &Layout, type_: u64, operation: *const Op) {
    // SAFETY: an element of PLANS.
    let field = unsafe { (*operation).field };
    let Some(name) = pointer(type_ + u64::from(layout.type_name)) else { return };
    let Some(at) = room(thread, 128) else { return };
    // SAFETY: `at` is masked; the record has room for 128 bytes behind every place.
    let len = unsafe {
        let record = Thread::record(thread);
        bpf_probe_read_user_str(record.add(at as usize + 8).cast(), 128, name as *const c_void)
    };
    if len > 1 && len <= 128 {
        let cut = u8::from(len == 128);
        put(thread, at, field, value::UTF8, cut, len as u64 - 1);
    }
}
