//! Python objects, read in the calling thread: attributes, dicts, arguments.
//!
//! Layouts and rules: `floe-agent/src/python/layout.rs`. A look-up that fails gives 0 (no object). What the cache remembers
//! is checked against the target's memory at every use, so a stale entry costs a scan and never gives a wrong value.

use core::ffi::c_void;

use aya_ebpf::helpers::generated::bpf_loop;
use floe_ebpf::{Counter, HOP_WAYS, HopEntry, Key, Layout, MAX_SCAN, instance_style, key, keys_style, member};

use crate::{
    maps::{HOPS, KEYS, Thread, count},
    user::{masked, pointer, read, read_bytes, word},
};

/// `PyObject.ob_type`.
const OB_TYPE: u64 = 8;
/// `PyVarObject.ob_size`.
pub const OB_SIZE: u64 = 16;
/// `PyASCIIObject.length`; the hash follows.
const STR_LENGTH: u64 = 16;
/// `Py_TPFLAGS_INLINE_VALUES` (3.13 on).
const INLINE_VALUES: u64 = 1 << 2;
/// `Py_TPFLAGS_MANAGED_DICT` (3.11 on).
const MANAGED_DICT: u64 = 1 << 4;
pub const LONG_SUBCLASS: u64 = 1 << 24;
pub const LIST_SUBCLASS: u64 = 1 << 25;
pub const TUPLE_SUBCLASS: u64 = 1 << 26;
pub const UNICODE_SUBCLASS: u64 = 1 << 28;
pub const DICT_SUBCLASS: u64 = 1 << 29;
pub const BASE_EXCEPTION_SUBCLASS: u64 = 1 << 30;
/// `compact` and `ascii` in `PyASCIIObject.state`.
const COMPACT_ASCII: u32 = 0x60;

#[inline(always)]
pub fn type_of(object: u64) -> Option<u64> {
    pointer(object + OB_TYPE)
}

#[inline(always)]
pub fn type_flags(layout: &Layout, type_: u64) -> Option<u64> {
    read::<u64>(type_ + u64::from(layout.type_flags))
}

/// The exception that is leaving a function, or its type.
#[inline(always)]
pub fn exception(thread: *mut Thread, layout: &Layout, want_type: bool) -> Option<u64> {
    // SAFETY: a map value.
    let tstate = pointer(unsafe { (*thread).process.tstate })?;
    if want_type && layout.tstate_exception_type != 0 {
        return pointer(tstate + u64::from(layout.tstate_exception_type));
    }
    let object = pointer(tstate + u64::from(layout.tstate_exception))?;
    if want_type { type_of(object) } else { Some(object) }
}

/// Whether a type of exceptions is one that ends generators and iterations.
#[inline(always)]
pub fn is_control_flow(layout: &Layout, type_: u64) -> bool {
    const fn name(text: &[u8]) -> [u64; 2] {
        [word(text, 0), word(text, 8)]
    }
    const NAMES: [[u64; 2]; 3] = [name(b"StopIteration\0"), name(b"StopAsyncIterati"), name(b"GeneratorExit\0")];
    let Some(address) = pointer(type_ + u64::from(layout.type_name)) else { return false };
    // The names are literals in the interpreter's text, with more behind them.
    let Some([first, second]) = read::<[u64; 2]>(address) else { return false };
    let six = second & 0xffff_ffff_ffff;
    (first == NAMES[0][0] && six == NAMES[0][1])
        || (first == NAMES[1][0] && second == NAMES[1][1])
        || (first == NAMES[2][0] && six == NAMES[2][1])
}

/// A table of keys that can be scanned: a dict's entries, or a tuple of keyword names.
#[derive(Clone, Copy)]
struct Table {
    entries: u64,
    stride: u64,
    key_offset: u64,
    value_offset: u64,
    len: u64,
}

/// The entries of a `PyDictKeysObject`.
#[inline(always)]
fn keys_table(layout: &Layout, keys: u64) -> Option<Table> {
    let len: u64;
    let entries: u64;
    let mut general = true;
    if layout.keys_style == keys_style::LOG2 {
        // dk_refcnt, dk_log2_size | dk_log2_index_bytes | dk_kind | dk_version, dk_usable, dk_nentries
        let head = read::<[u64; 4]>(keys)?;
        let index_bytes_log2 = (head[1] >> 8) & 31;
        general = (head[1] >> 16) & 0xff == 0;
        entries = keys + 32 + (1u64 << index_bytes_log2);
        len = head[3];
    } else {
        // dk_refcnt, dk_size, dk_lookup, dk_usable, dk_nentries
        let head = read::<[u64; 5]>(keys)?;
        let size = head[1];
        let width = if size <= 0xff {
            1
        } else if size <= 0xffff {
            2
        } else if size <= 0xffff_ffff {
            4
        } else {
            8
        };
        entries = keys + 40 + size * width;
        len = head[4];
    }
    Some(if general {
        Table { entries, stride: 24, key_offset: 8, value_offset: 16, len }
    } else {
        Table { entries, stride: 16, key_offset: 0, value_offset: 8, len }
    })
}

#[repr(C)]
struct Scan {
    thread: *mut Thread,
    key: *const Key,
    layout: *const Layout,
    /// Address of the first key.
    first: u64,
    stride: u64,
}

/// One step of a scan: is key `index` the wanted one?
unsafe extern "C" fn scan_step(index: u32, scan: *mut c_void) -> i64 {
    // SAFETY: `scan` is the context that `scan` below passed to bpf_loop; the pointers in it are map values.
    unsafe {
        let scan = &mut *scan.cast::<Scan>();
        let index = u64::from(index);
        let Some(object) = pointer(scan.first + index * scan.stride) else { return 0 };
        let Some([len, hash]) = read::<[u64; 2]>(object + STR_LENGTH) else { return 0 };
        let key = &*scan.key;
        if len != key.len {
            return 0;
        }
        let layout = &*scan.layout;
        let Some(state) = read::<u32>(object + u64::from(layout.str_state)) else { return 0 };
        if state & COMPACT_ASCII != COMPACT_ASCII {
            return 0;
        }
        let text = &mut (*scan.thread).key;
        // Word by word: `memset` is a call and a loop, which the verifier walks each time.
        let mut i = 0;
        while i < 8 {
            core::ptr::write_volatile(&raw mut text[i], 0);
            i += 1;
        }
        let len = masked!(len, 63);
        if !read_bytes(text.as_mut_ptr().cast(), len as u32, object + u64::from(layout.str_ascii_data)) {
            return 0;
        }
        let mut difference = 0;
        let mut i = 0;
        while i < 8 {
            difference |= text[i] ^ key.text[i];
            i += 1;
        }
        if difference != 0 {
            return 0;
        }
        let Some(type_) = type_of(object) else { return 0 };
        match type_flags(layout, type_) {
            Some(flags) if flags & UNICODE_SUBCLASS != 0 => {}
            _ => return 0,
        }
        let thread = scan.thread;
        (*thread).found = index + 1;
        (*thread).found_key = object;
        (*thread).found_hash = hash;
        1
    }
}

/// Where a look-up happens: everything it needs, in one place on the stack.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Context {
    pub thread: *mut Thread,
    pub layout: *const Layout,
}

/// Scans `table` for the key; its index plus one, or 0. The key's str object and hash are in the thread's state.
#[inline(always)]
fn scan(context: &Context, table: &Table, key: *const Key) -> u64 {
    let mut scan = Scan {
        thread: context.thread,
        key,
        layout: context.layout,
        first: table.entries + table.key_offset,
        stride: table.stride,
    };
    let len = if table.len > u64::from(MAX_SCAN) { u64::from(MAX_SCAN) } else { table.len };
    // SAFETY: the callback and its context fit together; the context outlives the call.
    unsafe {
        (*context.thread).found = 0;
        bpf_loop(len as u32, scan_step as *mut c_void, (&raw mut scan).cast(), 0);
        (*context.thread).found
    }
}

/// Whether entry `index` of `table` still holds the key that the cache remembers.
#[inline(always)]
fn still_there(table: &Table, cached: &HopEntry) -> bool {
    let index = u64::from(cached.index);
    if cached.key == 0 || index >= table.len {
        return false;
    }
    let key = cached.key;
    read::<u64>(table.entries + index * table.stride + table.key_offset) == Some(key)
        && read::<u64>(key + STR_LENGTH + 8) == Some(cached.hash)
}

/// The cache entry of a hop for a type.
#[inline(always)]
fn hop_entry(hop: u32, type_: u64) -> Option<*mut HopEntry> {
    let way = ((type_ >> 4) ^ (type_ >> 9) ^ (type_ >> 12)) as u32 & (HOP_WAYS - 1);
    HOPS.get_ptr_mut(hop * HOP_WAYS + way)
}

/// Index of the key in `table`, by the cache or by a scan; stores what a scan found. `None`: not there.
#[inline(always)]
fn find(context: &Context, table: &Table, key: u32, type_: u64, entry: *mut HopEntry) -> Option<u64> {
    // SAFETY: `entry` points to an element of HOPS. Another CPU may write it at the same time: a mixed entry fails the check.
    unsafe {
        let cached = &*entry;
        if cached.type_ == type_ && still_there(table, cached) {
            return Some(u64::from(cached.index));
        }
        count(Counter::HopMisses);
        let key = KEYS.get_ptr(key)?;
        let found = scan(context, table, key);
        if found == 0 {
            return None;
        }
        let entry = &mut *entry;
        entry.type_ = type_;
        entry.keys = 0;
        entry.key = (*context.thread).found_key;
        entry.hash = (*context.thread).found_hash;
        entry.index = (found - 1) as u32;
        Some(found - 1)
    }
}

/// The value under a str key in a dict.
#[inline(always)]
fn dict_value(context: &Context, dict: u64, key: u32, type_: u64, entry: *mut HopEntry) -> Option<u64> {
    // SAFETY: an element of LAYOUTS.
    let layout = unsafe { &*context.layout };
    let keys = pointer(dict + u64::from(layout.dict_keys))?;
    let values = read::<u64>(dict + u64::from(layout.dict_values))?;
    let table = keys_table(layout, keys)?;
    let index = find(context, &table, key, type_, entry)?;
    if values == 0 {
        pointer(table.entries + index * table.stride + table.value_offset)
    } else {
        pointer(values + u64::from(layout.values_items) + index * 8)
    }
}

/// Where the values and the keys of a dict are.
pub struct DictValues {
    pub values: u64,
    pub value_stride: u64,
    pub keys: u64,
    pub key_stride: u64,
    pub len: u64,
}

/// The values of a dict.
#[inline(always)]
pub fn dict_values(layout: &Layout, dict: u64) -> Option<DictValues> {
    let keys = pointer(dict + u64::from(layout.dict_keys))?;
    let values = read::<u64>(dict + u64::from(layout.dict_values))?;
    let table = keys_table(layout, keys)?;
    let (values, value_stride) = if values == 0 {
        (table.entries + table.value_offset, table.stride)
    } else {
        (values + u64::from(layout.values_items), 8)
    };
    Some(DictValues {
        values,
        value_stride,
        keys: table.entries + table.key_offset,
        key_stride: table.stride,
        len: table.len,
    })
}

/// The value under a str key in a dict, or 0.
#[inline(never)]
pub extern "C" fn dict_item(context: &Context, dict: u64, key: u32, hop: u32) -> u64 {
    // SAFETY: an element of LAYOUTS.
    let layout = unsafe { &*context.layout };
    let Some(type_) = type_of(dict) else { return 0 };
    match type_flags(layout, type_) {
        Some(flags) if flags & DICT_SUBCLASS != 0 => {}
        _ => return 0,
    }
    let Some(entry) = hop_entry(hop, type_) else { return 0 };
    dict_value(context, dict, key, type_, entry).unwrap_or(0)
}

/// The address where an instance of a type without managed dict keeps its dict pointer.
#[inline(always)]
fn dict_slot(layout: &Layout, object: u64, type_: u64) -> Option<u64> {
    let offset = read::<i64>(type_ + u64::from(layout.type_dictoffset))?;
    if offset > 0 {
        return Some(object + offset as u64);
    }
    if offset == 0 {
        return None;
    }
    let basicsize = read::<i64>(type_ + u64::from(layout.type_basicsize))?;
    let itemsize = read::<i64>(type_ + u64::from(layout.type_itemsize))?;
    let size = read::<i64>(object + OB_SIZE)?;
    let items = if size < 0 { size.wrapping_neg() } else { size };
    let end = (basicsize.wrapping_add(items.wrapping_mul(itemsize)).wrapping_add(7)) & !7;
    Some(object.wrapping_add(end as u64).wrapping_add(offset as u64))
}

/// An attribute of `object`, or 0: of its own dict, in a slot, or an item of a named tuple.
#[inline(never)]
pub extern "C" fn attribute(context: &Context, object: u64, key: u32, hop: u32) -> u64 {
    match lookup(context, object, key, hop) {
        Some(value) => value,
        None => of_type(context, object, key, hop).unwrap_or(0),
    }
}

/// `Py_TPFLAGS_VALID_VERSION_TAG`.
const VALID_VERSION: u64 = 1 << 19;
/// Most classes in a method resolution order.
const MAX_MRO: u64 = 32;

/// An attribute whose place the type knows.
#[inline(always)]
fn of_type(context: &Context, object: u64, key: u32, hop: u32) -> Option<u64> {
    // SAFETY: an element of LAYOUTS.
    let layout = unsafe { &*context.layout };
    let type_ = type_of(object)?;
    let entry = hop_entry(hop, type_)?;
    let mut version = u64::from(read::<u32>(type_ + u64::from(layout.type_version))?);
    if layout.type_version_flag != 0 && type_flags(layout, type_)? & VALID_VERSION == 0 {
        version = 0;
    }
    // SAFETY: an element of HOPS. Another CPU may write it at the same time: a version belongs to one type only.
    let (known_type, known) = unsafe { ((*entry).member_type, (*entry).member) };
    let place = if version != 0 && known_type == type_ && known >> 32 == version {
        known as u32
    } else {
        count(Counter::HopMisses);
        let place = find_member(context, type_, key);
        // SAFETY: as above.
        unsafe {
            (*entry).member_type = type_;
            (*entry).member = version << 32 | u64::from(place);
        }
        place
    };
    if place & member::SLOT != 0 {
        pointer(object + u64::from(place - member::SLOT))
    } else if place & member::ITEM != 0 {
        let index = u64::from(place - member::ITEM);
        if index >= read::<u64>(object + OB_SIZE)? {
            return None;
        }
        pointer(object + u64::from(layout.tuple_items) + index * 8)
    } else {
        None
    }
}

#[repr(C)]
struct Walk {
    context: *const Context,
    /// The first class.
    classes: u64,
    key: u32,
    reserved: u32,
    /// What the first class that has the key has under it.
    found: u64,
}

/// Looks the key up in one class.
unsafe extern "C" fn class_step(index: u32, walk: *mut c_void) -> i64 {
    // SAFETY: the context that `class_attribute` passed.
    unsafe {
        let walk = &mut *walk.cast::<Walk>();
        let context = &*walk.context;
        let layout = &*context.layout;
        let Some(class) = pointer(walk.classes + u64::from(index) * 8) else { return 1 };
        // NULL for the interpreter's own static types from 3.12 on.
        let Some(dict) = pointer(class + u64::from(layout.type_dict)) else { return 0 };
        let Some(keys) = pointer(dict + u64::from(layout.dict_keys)) else { return 0 };
        let Some(table) = keys_table(layout, keys) else { return 0 };
        let Some(key) = KEYS.get_ptr(walk.key) else { return 1 };
        let found = scan(context, &table, key);
        if found == 0 {
            return 0;
        }
        walk.found = pointer(table.entries + (found - 1) * table.stride + table.value_offset).unwrap_or(0);
        1
    }
}

/// What a class or its bases have under a key, or 0.
#[inline(never)]
extern "C" fn class_attribute(context: &Context, type_: u64, key: u32) -> u64 {
    // SAFETY: an element of LAYOUTS.
    let layout = unsafe { &*context.layout };
    let Some(mro) = pointer(type_ + u64::from(layout.type_mro)) else { return 0 };
    let Some(len) = read::<u64>(mro + OB_SIZE) else { return 0 };
    let len = if len > MAX_MRO { MAX_MRO } else { len };
    let mut walk = Walk { context, classes: mro + u64::from(layout.tuple_items), key, reserved: 0, found: 0 };
    // SAFETY: the callback and its context fit together; the context outlives the call.
    unsafe { bpf_loop(len as u32, class_step as *mut c_void, (&raw mut walk).cast(), 0) };
    walk.found
}

/// Where instances of a type keep an attribute (`member`), or 0.
#[inline(always)]
fn find_member(context: &Context, type_: u64, key: u32) -> u32 {
    find_item(context, type_, key).or_else(|| find_slot(context, type_, key)).unwrap_or(0)
}

/// The index of an attribute of a named tuple.
#[inline(always)]
fn find_item(context: &Context, type_: u64, key: u32) -> Option<u32> {
    // SAFETY: an element of LAYOUTS.
    let layout = unsafe { &*context.layout };
    if type_flags(layout, type_)? & TUPLE_SUBCLASS == 0 {
        return None;
    }
    let names = class_attribute(context, type_, key::FIELDS);
    if names == 0 || type_flags(layout, type_of(names)?)? & TUPLE_SUBCLASS == 0 {
        return None;
    }
    match keyword(context, names, key) {
        0 => None,
        found => Some(member::ITEM | (found - 1) as u32),
    }
}

/// The offset of a slot.
#[inline(always)]
fn find_slot(context: &Context, type_: u64, key: u32) -> Option<u32> {
    const T_OBJECT: u32 = 6;
    const T_OBJECT_EX: u32 = 16;
    // SAFETY: an element of LAYOUTS; a map value.
    let (layout, member_type) = unsafe { (&*context.layout, (*context.thread).process.member_type) };
    let descriptor = class_attribute(context, type_, key);
    if descriptor == 0 || type_of(descriptor)? != member_type {
        return None;
    }
    let definition = pointer(descriptor + u64::from(layout.member))?;
    let kind = read::<u32>(definition + u64::from(layout.member_type))?;
    let offset = read::<u64>(definition + u64::from(layout.member_offset))?;
    // Within the object.
    let end = read::<u64>(type_ + u64::from(layout.type_basicsize))?;
    if kind != T_OBJECT && kind != T_OBJECT_EX || offset < 16 || offset > 0xff_ffff || offset + 8 > end {
        return None;
    }
    Some(member::SLOT | offset as u32)
}

#[inline(always)]
fn lookup(context: &Context, object: u64, key: u32, hop: u32) -> Option<u64> {
    let thread = context.thread;
    // SAFETY: a map value that belongs to this thread.
    if unsafe { (*thread).last_object } != object {
        let type_ = type_of(object)?;
        let entry = hop_entry(hop, type_)?;
        match storage(context, object, type_, entry)? {
            (values, 0) => {
                // SAFETY: an element of LAYOUTS.
                let layout = unsafe { &*context.layout };
                let keys = pointer(type_ + u64::from(layout.type_cached_keys))?;
                // SAFETY: as above.
                unsafe {
                    (*thread).last_type = type_;
                    (*thread).last_values = values;
                    (*thread).last_keys = keys;
                    (*thread).last_object = object;
                }
            }
            (_, dict) => return dict_value(context, dict, key, type_, entry),
        }
    }
    // SAFETY: as above.
    let (type_, values, keys) = unsafe { ((*thread).last_type, (*thread).last_values, (*thread).last_keys) };
    let entry = hop_entry(hop, type_)?;
    // SAFETY: an element of HOPS.
    let cached = unsafe { &*entry };
    let index = if cached.type_ == type_
        && cached.keys == keys
        && read::<u64>(cached.slot) == Some(cached.key)
        && read::<u64>(cached.key + STR_LENGTH + 8) == Some(cached.hash)
    {
        u64::from(cached.index)
    } else {
        // SAFETY: an element of LAYOUTS.
        let layout = unsafe { &*context.layout };
        let table = keys_table(layout, keys)?;
        let index = find(context, &table, key, type_, entry)?;
        // SAFETY: an element of HOPS.
        unsafe {
            (*entry).slot = table.entries + index * table.stride + table.key_offset;
            (*entry).keys = keys;
        }
        index
    };
    // SAFETY: an element of LAYOUTS.
    let items = u64::from(unsafe { (*context.layout).values_items });
    pointer(values + items + index * 8)
}

/// Where an instance keeps its attributes: `(values array, 0)` or `(0, dict)`.
#[inline(always)]
fn storage(context: &Context, object: u64, type_: u64, entry: *mut HopEntry) -> Option<(u64, u64)> {
    // SAFETY: an element of LAYOUTS.
    let layout = unsafe { &*context.layout };
    // SAFETY: an element of HOPS.
    let known = unsafe { (*entry).flags };
    let flags = if known != 0 && known >> 32 == type_ & 0xffff_ffff {
        known & 0xffff_ffff
    } else {
        let flags = type_flags(layout, type_)?;
        // SAFETY: an element of HOPS.
        unsafe { (*entry).flags = (type_ << 32) | (flags & 0xffff_ffff) };
        flags
    };
    let style = layout.instance_style;
    let mut values = 0;
    let mut dict = 0;
    if style == instance_style::DICT || flags & MANAGED_DICT == 0 {
        dict = pointer(dict_slot(layout, object, type_)?)?;
    } else if style == instance_style::VALUES_AND_DICT {
        let [v, d] = read::<[u64; 2]>(object.wrapping_sub(32))?;
        if v == 0 {
            dict = d;
        } else {
            values = v;
        }
    } else if style == instance_style::TAGGED {
        let word = read::<u64>(object.wrapping_sub(24))?;
        if word & 1 == 0 {
            dict = word;
        } else {
            values = word + 1;
        }
    } else {
        let mut valid = 0;
        if flags & INLINE_VALUES != 0 {
            values = if style == instance_style::INLINE_HEADER {
                object + 16
            } else {
                object.wrapping_add(read::<u64>(type_ + u64::from(layout.type_basicsize))?)
            };
            // PyDictValues: capacity, size, embedded, valid
            valid = read::<u32>(values)? >> 24;
        }
        if valid == 0 {
            values = 0;
            dict = read::<u64>(object.wrapping_sub(24))?;
        }
    }
    if values == 0 && dict == 0 {
        return None;
    }
    Some((values, dict))
}

/// Index of the keyword `key` in a tuple of names, plus one, or 0.
#[inline(never)]
pub extern "C" fn keyword(context: &Context, names: u64, key: u32) -> u64 {
    // SAFETY: an element of LAYOUTS.
    let layout = unsafe { &*context.layout };
    let Some(len) = read::<u64>(names + OB_SIZE) else { return 0 };
    let Some(key) = KEYS.get_ptr(key) else { return 0 };
    let table =
        Table { entries: names + u64::from(layout.tuple_items), stride: 8, key_offset: 0, value_offset: 0, len };
    scan(context, &table, key)
}
