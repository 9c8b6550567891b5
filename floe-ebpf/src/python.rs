//! Python objects, read in the calling thread: attributes, dicts, arguments.
//!
//! Layouts and rules: `floe-agent/src/python/layout.rs`. A look-up that fails gives 0 (no object). What the cache remembers
//! is checked against the target's memory at every use, so a stale entry costs a scan and never gives a wrong value.

use floe_ebpf::{Counter, HOP_WAYS, HopEntry, Layout, MAX_SCAN, instance_style, key, keys_style, member};

use crate::{
    maps::{HOPS, KEYS, NEAR_VALUES, Thread, count, layout, repeat},
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

/// A table of keys that can be scanned: a dict's entries, or a tuple of keyword names. There is one for each thread: the
/// programs' stack is small.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Table {
    pub entries: u64,
    pub stride: u64,
    pub key_offset: u64,
    pub value_offset: u64,
    pub len: u64,
}

/// The entries of a `PyDictKeysObject`.
#[inline(always)]
fn keys_table(thread: *mut Thread, layout: &Layout, keys: u64) -> Option<&'static Table> {
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
    // SAFETY: a map value.
    let table = unsafe { &mut (*thread).table };
    table.entries = entries;
    table.len = len;
    (table.stride, table.key_offset, table.value_offset) = if general { (24, 8, 16) } else { (16, 0, 8) };
    Some(table)
}

/// One step of a scan: is key `index` the wanted one?
unsafe extern "C" fn scan_step(index: u32, thread: *mut *mut Thread) -> i64 {
    // SAFETY: the context that `scan` below passed, a map value.
    unsafe {
        let thread = *thread;
        let index = u64::from(index);
        let table = &(*thread).table;
        let Some(object) = pointer(table.entries + table.key_offset + index * table.stride) else { return 0 };
        let Some(len) = read::<u64>(object + STR_LENGTH) else { return 0 };
        let Some(key) = KEYS.get((*thread).scan_key as u32) else { return 1 };
        if len != key.len {
            return 0;
        }
        let Some(layout) = layout(thread) else { return 1 };
        let Some(state) = read::<u32>(object + u64::from(layout.str_state)) else { return 0 };
        if state & COMPACT_ASCII != COMPACT_ASCII {
            return 0;
        }
        let text = &mut (*thread).key;
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
        let Some(hash) = read::<u64>(object + STR_LENGTH + 8) else { return 0 };
        (*thread).found = index + 1;
        (*thread).found_key = object;
        (*thread).found_hash = hash;
        1
    }
}

/// Scans the thread's table for the key; its index plus one, or 0. The key's str object and hash are in the thread's state.
#[inline(always)]
fn scan(thread: *mut Thread, key: u32) -> u64 {
    // SAFETY: a map value.
    unsafe {
        let len = (*thread).table.len;
        let len = if len > u64::from(MAX_SCAN) { u64::from(MAX_SCAN) } else { len };
        (*thread).scan_key = u64::from(key);
        (*thread).found = 0;
        repeat(len as u32, scan_step, thread);
        (*thread).found
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
fn find(thread: *mut Thread, table: &Table, key: u32, type_: u64, entry: *mut HopEntry) -> Option<u64> {
    // SAFETY: `entry` points to an element of HOPS. Another CPU may write it at the same time: a mixed entry fails the check.
    unsafe {
        let cached = &*entry;
        if cached.type_ == type_ && still_there(table, cached) {
            return Some(u64::from(cached.index));
        }
        count(Counter::HopMisses);
        let found = scan(thread, key);
        if found == 0 {
            return None;
        }
        let entry = &mut *entry;
        entry.type_ = type_;
        entry.keys = 0;
        entry.key = (*thread).found_key;
        entry.hash = (*thread).found_hash;
        entry.index = (found - 1) as u32;
        Some(found - 1)
    }
}

/// The value under a str key in a dict.
#[inline(always)]
fn dict_value(thread: *mut Thread, dict: u64, key: u32, type_: u64, entry: *mut HopEntry) -> Option<u64> {
    let layout = layout(thread)?;
    let keys = pointer(dict + u64::from(layout.dict_keys))?;
    let values = read::<u64>(dict + u64::from(layout.dict_values))?;
    let table = keys_table(thread, layout, keys)?;
    let index = find(thread, table, key, type_, entry)?;
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
pub fn dict_values(thread: *mut Thread, layout: &Layout, dict: u64) -> Option<DictValues> {
    let keys = pointer(dict + u64::from(layout.dict_keys))?;
    let values = read::<u64>(dict + u64::from(layout.dict_values))?;
    let table = keys_table(thread, layout, keys)?;
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
pub extern "C" fn dict_item(thread: *mut Thread, dict: u64, key: u32, hop: u32) -> u64 {
    let Some(layout) = layout(thread) else { return 0 };
    let Some(type_) = type_of(dict) else { return 0 };
    match type_flags(layout, type_) {
        Some(flags) if flags & DICT_SUBCLASS != 0 => {}
        _ => return 0,
    }
    let Some(entry) = hop_entry(hop, type_) else { return 0 };
    dict_value(thread, dict, key, type_, entry).unwrap_or(0)
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

/// An attribute of `object` that is in its own dict, or 0.
#[inline(never)]
pub extern "C" fn attribute(thread: *mut Thread, object: u64, key: u32, hop: u32) -> u64 {
    lookup(thread, object, key, hop).unwrap_or(0)
}

/// An attribute of `object` that is in a slot, or an item of a named tuple, or 0. Not called by `attribute`: the stacks
/// of all that is called are one.
#[inline(never)]
pub extern "C" fn attribute_of_type(thread: *mut Thread, object: u64, key: u32, hop: u32) -> u64 {
    of_type(thread, object, key, hop).unwrap_or(0)
}

/// `Py_TPFLAGS_VALID_VERSION_TAG`.
const VALID_VERSION: u64 = 1 << 19;
/// Most classes in a method resolution order.
const MAX_MRO: u64 = 32;

/// An attribute whose place the type knows.
#[inline(always)]
fn of_type(thread: *mut Thread, object: u64, key: u32, hop: u32) -> Option<u64> {
    let layout = layout(thread)?;
    let type_ = type_of(object)?;
    let entry = hop_entry(hop, type_)?;
    let mut version = u64::from(read::<u32>(type_ + u64::from(layout.type_version))?);
    if layout.type_version_flag != 0 && type_flags(layout, type_)? & VALID_VERSION == 0 {
        version = 0;
    }
    // SAFETY: an element of HOPS. Another CPU may write it at the same time: a version belongs to one type only.
    let (known_type, known, epoch) = unsafe { ((*entry).member_type, (*entry).member, (*thread).process.epoch) };
    // Versions count within a process, and the table is all processes'.
    let here = type_ ^ u64::from(epoch) << 32;
    let place = if version != 0 && known_type == here && known >> 32 == version {
        known as u32
    } else {
        count(Counter::HopMisses);
        let place = find_member(thread, type_, key);
        // SAFETY: as above.
        unsafe {
            (*entry).member_type = here;
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

/// Looks the key up in one class.
unsafe extern "C" fn class_step(index: u32, thread: *mut *mut Thread) -> i64 {
    // SAFETY: the context that `class_attribute` passed, a map value.
    unsafe {
        let thread = *thread;
        let Some(layout) = layout(thread) else { return 1 };
        let Some(class) = pointer((*thread).classes + u64::from(index) * 8) else { return 1 };
        // NULL for the interpreter's own static types from 3.12 on.
        let Some(dict) = pointer(class + u64::from(layout.type_dict)) else { return 0 };
        let Some(keys) = pointer(dict + u64::from(layout.dict_keys)) else { return 0 };
        let Some(table) = keys_table(thread, layout, keys) else { return 0 };
        let found = scan(thread, (*thread).class_key as u32);
        if found == 0 {
            return 0;
        }
        (*thread).class_value = pointer(table.entries + (found - 1) * table.stride + table.value_offset).unwrap_or(0);
        1
    }
}

/// What a class or its bases have under a key, or 0.
#[inline(always)]
fn class_attribute(thread: *mut Thread, type_: u64, key: u32) -> u64 {
    // SAFETY: a map value.
    unsafe { (*thread).class_key = u64::from(key) };
    class_key(thread, type_)
}

#[inline(never)]
extern "C" fn class_key(thread: *mut Thread, type_: u64) -> u64 {
    let Some(layout) = layout(thread) else { return 0 };
    let Some(mro) = pointer(type_ + u64::from(layout.type_mro)) else { return 0 };
    let Some(len) = read::<u64>(mro + OB_SIZE) else { return 0 };
    let len = if len > MAX_MRO { MAX_MRO } else { len };
    // SAFETY: a map value; the callback and its context fit together.
    unsafe {
        (*thread).classes = mro + u64::from(layout.tuple_items);
        (*thread).class_value = 0;
        repeat(len as u32, class_step, thread);
        (*thread).class_value
    }
}

/// Where instances of a type keep an attribute (`member`), or 0.
#[inline(always)]
fn find_member(thread: *mut Thread, type_: u64, key: u32) -> u32 {
    find_item(thread, type_, key).or_else(|| find_slot(thread, type_, key)).unwrap_or(0)
}

/// The index of an attribute of a named tuple.
#[inline(always)]
fn find_item(thread: *mut Thread, type_: u64, key: u32) -> Option<u32> {
    let layout = layout(thread)?;
    if type_flags(layout, type_)? & TUPLE_SUBCLASS == 0 {
        return None;
    }
    let names = class_attribute(thread, type_, key::FIELDS);
    if names == 0 || type_flags(layout, type_of(names)?)? & TUPLE_SUBCLASS == 0 {
        return None;
    }
    match keyword(thread, names, key) {
        0 => None,
        found => Some(member::ITEM | (found - 1) as u32),
    }
}

/// The offset of a slot.
#[inline(always)]
fn find_slot(thread: *mut Thread, type_: u64, key: u32) -> Option<u32> {
    const T_OBJECT: u32 = 6;
    const T_OBJECT_EX: u32 = 16;
    let layout = layout(thread)?;
    // SAFETY: a map value.
    let member_type = unsafe { (*thread).process.member_type };
    let descriptor = class_attribute(thread, type_, key);
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
fn lookup(thread: *mut Thread, object: u64, key: u32, hop: u32) -> Option<u64> {
    let thread = thread;
    // SAFETY: a map value that belongs to this thread.
    if unsafe { (*thread).last_object } != object {
        let head = head(thread, object)?;
        let type_ = head[HEAD_TYPE];
        let entry = hop_entry(hop, type_)?;
        match storage(thread, object, &head)? {
            (values, 0) => {
                let layout = layout(thread)?;
                let version = read::<u32>(type_ + u64::from(layout.type_version))?;
                // SAFETY: as above.
                unsafe {
                    (*thread).last_type = type_;
                    (*thread).last_version = u64::from(version);
                    (*thread).last_values = values + u64::from(layout.values_items);
                    (*thread).near_values = 0;
                    (*thread).last_object = object;
                }
            }
            (_, dict) => return dict_value(thread, dict, key, type_, entry),
        }
    }
    // SAFETY: as above.
    let (type_, version, values) = unsafe { ((*thread).last_type, (*thread).last_version, (*thread).last_values) };
    let entry = hop_entry(hop, type_)?;
    // SAFETY: an element of HOPS; a map value.
    let ([proof, again], epoch) = unsafe { ((*entry).proved, (*thread).process.epoch) };
    let of = type_.rotate_left(16) ^ u64::from(epoch) << 32;
    let index = proof & 0xffff_ffff;
    let index = if version != 0 && proof >> 32 == version && again == of ^ index {
        index
    } else {
        let index = shared_index(thread, key, type_, entry)?;
        // SAFETY: an element of HOPS.
        unsafe { (*entry).proved = [version << 32 | index, of ^ index] };
        index
    };
    value_at(thread, values, index)
}

/// Item `index` of a values array: the first ones are read together, as several are often wanted.
#[inline(always)]
fn value_at(thread: *mut Thread, values: u64, index: u64) -> Option<u64> {
    if index < NEAR_VALUES as u64 {
        // SAFETY: a map value; the index is masked to the length.
        unsafe {
            let near = (&raw mut (*thread).near).cast::<u64>();
            if (*thread).near_values != values {
                (*thread).near_values = 0;
                if !read_bytes(near.cast(), 8 * NEAR_VALUES as u32, values) {
                    return pointer(values + index * 8); // the end of the memory is near
                }
                (*thread).near_values = values;
            }
            let value = *near.add(masked!(index, 15) as usize);
            return if value == 0 { None } else { Some(value) };
        }
    }
    pointer(values + index * 8)
}

/// Index of a key in the keys that the instances of a type share, checked by the keys themselves.
#[inline(always)]
fn shared_index(thread: *mut Thread, key: u32, type_: u64, entry: *mut HopEntry) -> Option<u64> {
    let layout = layout(thread)?;
    let keys = pointer(type_ + u64::from(layout.type_cached_keys))?;
    // SAFETY: an element of HOPS.
    let cached = unsafe { &*entry };
    if cached.type_ == type_
        && cached.keys == keys
        && read::<u64>(cached.slot) == Some(cached.key)
        && read::<u64>(cached.key + STR_LENGTH + 8) == Some(cached.hash)
    {
        return Some(u64::from(cached.index));
    }
    let table = keys_table(thread, layout, keys)?;
    let index = find(thread, table, key, type_, entry)?;
    // SAFETY: an element of HOPS.
    unsafe {
        (*entry).slot = table.entries + index * table.stride + table.key_offset;
        (*entry).keys = keys;
    }
    Some(index)
}

/// What is around the beginning of an object, from `HEAD_BEFORE` bytes before it on: where its values or its dict are,
/// the garbage collector's two words, reference count, type, and the first word of its own.
type Head = [u64; 7];
const HEAD_BEFORE: u64 = 32;
/// 3.11: values, then dict. Later: the second is either.
const HEAD_VALUES: usize = 0;
const HEAD_DICT: usize = 1;
const HEAD_TYPE: usize = 5;
const HEAD_FIRST: usize = 6;

/// Reads the head in one go, as far as it is there.
#[inline(always)]
fn head(thread: *mut Thread, object: u64) -> Option<Head> {
    let style = layout(thread)?.instance_style;
    if style != instance_style::DICT
        && let Some(head) = read::<Head>(object.wrapping_sub(HEAD_BEFORE))
    {
        return if head[HEAD_TYPE] == 0 { None } else { Some(head) };
    }
    // An object at the very beginning or end of its memory has nothing that would be missed.
    let mut head = [0; 7];
    head[HEAD_TYPE] = type_of(object)?;
    if style != instance_style::DICT {
        if let Some([values, dict]) = read::<[u64; 2]>(object.wrapping_sub(HEAD_BEFORE)) {
            head[HEAD_VALUES] = values;
            head[HEAD_DICT] = dict;
        }
        head[HEAD_FIRST] = read::<u64>(object + OB_SIZE).unwrap_or(0);
    }
    Some(head)
}

/// Where an instance keeps its attributes: `(values array, 0)` or `(0, dict)`.
#[inline(always)]
fn storage(thread: *mut Thread, object: u64, head: &Head) -> Option<(u64, u64)> {
    let layout = layout(thread)?;
    let type_ = head[HEAD_TYPE];
    // Not remembered: where a class dies, another one comes to be at its address.
    let flags = type_flags(layout, type_)?;
    let style = layout.instance_style;
    let mut values = 0;
    let mut dict = 0;
    if style == instance_style::DICT || flags & MANAGED_DICT == 0 {
        dict = pointer(dict_slot(layout, object, type_)?)?;
    } else if style == instance_style::VALUES_AND_DICT {
        values = head[HEAD_VALUES];
        if values == 0 {
            dict = head[HEAD_DICT];
        }
    } else if style == instance_style::TAGGED {
        let word = head[HEAD_DICT];
        if word & 1 == 0 {
            dict = word;
        } else {
            values = word + 1;
        }
    } else {
        // PyDictValues: capacity, size, embedded, valid
        let mut valid = 0;
        if flags & INLINE_VALUES != 0 {
            if style == instance_style::INLINE_HEADER {
                values = object + OB_SIZE;
                valid = (head[HEAD_FIRST] >> 24) & 0xff;
            } else {
                values = object.wrapping_add(read::<u64>(type_ + u64::from(layout.type_basicsize))?);
                valid = u64::from(read::<u32>(values)? >> 24);
            }
        }
        if valid == 0 {
            values = 0;
            dict = head[HEAD_DICT];
        }
    }
    if values == 0 && dict == 0 {
        return None;
    }
    Some((values, dict))
}

/// Index of the keyword `key` in a tuple of names, plus one, or 0.
#[inline(never)]
pub extern "C" fn keyword(thread: *mut Thread, names: u64, key: u32) -> u64 {
    let Some(layout) = layout(thread) else { return 0 };
    let Some(len) = read::<u64>(names + OB_SIZE) else { return 0 };
    // SAFETY: a map value.
    unsafe {
        (*thread).table =
            Table { entries: names + u64::from(layout.tuple_items), stride: 8, key_offset: 0, value_offset: 0, len };
    }
    scan(thread, key)
}
