//! Tuples, lists and dicts.

use std::ops::ControlFlow;

use super::{Heap, MAX_DICT_ENTRIES, MAX_ITEMS, ObjectError, Result, type_flags};
use crate::python::layout::{KeysStyle, OB_SIZE};
use crate::units::UserAddr;

/// A way to the entries of a dict.
#[derive(Clone, Copy, Debug)]
pub(super) struct Entries {
    start: UserAddr,
    count: usize,
    stride: usize,
    key: usize,
    values: Values,
}

#[derive(Clone, Copy, Debug)]
pub(super) enum Values {
    /// In the entry, at this offset.
    InEntry(usize),
    /// In an array of their own (split dicts).
    Array(UserAddr),
}

impl Heap<'_> {
    fn pointers(&self, start: UserAddr, count: usize) -> Result<Vec<UserAddr>> {
        let bytes = self.mem.read_bytes(start, count * 8)?;
        Ok(bytes.as_chunks::<8>().0.iter().map(|&b| UserAddr(u64::from_le_bytes(b))).collect())
    }

    fn count(&self, object: UserAddr, what: &'static str) -> Result<usize> {
        let len = self.mem.read_u64(object.offset(OB_SIZE))?;
        if len > MAX_ITEMS as u64 {
            return Err(ObjectError::TooLarge { what, addr: object, len, limit: MAX_ITEMS });
        }
        Ok(len as usize)
    }

    /// The items of a tuple.
    pub fn tuple(&self, object: UserAddr) -> Result<Vec<UserAddr>> {
        self.expect_flag(object, type_flags::TUPLE, "tuple")?;
        let count = self.count(object, "tuple")?;
        self.pointers(object.offset(self.layout.small.tuple_items), count)
    }

    /// The items of a list.
    pub fn list(&self, object: UserAddr) -> Result<Vec<UserAddr>> {
        self.expect_flag(object, type_flags::LIST, "list")?;
        let count = self.count(object, "list")?;
        if count == 0 {
            return Ok(Vec::new());
        }
        let start = self.ptr(object, self.layout.small.list_items)?;
        self.pointers(start, count)
    }

    pub(super) fn entries(&self, keys: UserAddr, values: Option<UserAddr>, what: UserAddr) -> Result<Entries> {
        let l = &self.layout.dict;
        let odd = ObjectError::Odd { what: "dict", addr: what };
        let nentries = self.mem.read_u64(keys.offset(l.nentries))?;
        if nentries > MAX_DICT_ENTRIES as u64 {
            return Err(ObjectError::TooLarge { what: "dict", addr: what, len: nentries, limit: MAX_DICT_ENTRIES });
        }
        let (indices, general) = match l.style {
            KeysStyle::Size { size } => {
                let size = self.mem.read_u64(keys.offset(size))?;
                let width = match size {
                    0..=0xff => 1,
                    0x100..=0xffff => 2,
                    0x1_0000..=0xffff_ffff => 4,
                    _ => return Err(odd),
                };
                (size * width, true)
            }
            KeysStyle::Log2 { log2_index_bytes, kind } => {
                let log2 = self.mem.read_u8(keys.offset(log2_index_bytes))?;
                if log2 > 40 {
                    return Err(odd);
                }
                let general = match self.mem.read_u8(keys.offset(kind))? {
                    0 => true,
                    1 | 2 => false,
                    _ => return Err(odd),
                };
                (1 << log2, general)
            }
        };
        let start = keys.offset(l.indices).offset(indices);
        let mut count = nentries as usize;
        if let Some(values) = values
            && l.values_items != 0
        {
            // The number of values that there is room for comes first.
            count = count.min(self.mem.read_u8(values)? as usize);
        }
        let in_entry = if general { 16 } else { 8 };
        Ok(Entries {
            start,
            count,
            stride: if general { 24 } else { 16 },
            key: if general { 8 } else { 0 },
            values: values.map_or(Values::InEntry(in_entry), |values| Values::Array(values.offset(l.values_items))),
        })
    }

    pub(super) fn walk<T>(
        &self,
        entries: Entries,
        mut visit: impl FnMut(UserAddr, UserAddr) -> ControlFlow<T>,
    ) -> Result<Option<T>> {
        const CHUNK: usize = 128;
        let word =
            |bytes: &[u8], at: usize| UserAddr(u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes")));
        let mut buf = [0; CHUNK * 24];
        let mut value_buf = [0; CHUNK * 8];
        let mut done = 0;
        while done < entries.count {
            let count = CHUNK.min(entries.count - done);
            let chunk = &mut buf[..count * entries.stride];
            self.mem.read(entries.start.offset((done * entries.stride) as u64), chunk)?;
            if let Values::Array(values) = entries.values {
                self.mem.read(values.offset(8 * done as u64), &mut value_buf[..count * 8])?;
            }
            for i in 0..count {
                let key = word(chunk, i * entries.stride + entries.key);
                let value = match entries.values {
                    Values::InEntry(offset) => word(chunk, i * entries.stride + offset),
                    Values::Array(_) => word(&value_buf, i * 8),
                };
                if key.is_null() || value.is_null() {
                    continue;
                }
                if let ControlFlow::Break(found) = visit(key, value) {
                    return Ok(Some(found));
                }
            }
            done += count;
        }
        Ok(None)
    }

    fn dict_entries(&self, dict: UserAddr) -> Result<Entries> {
        self.expect_flag(dict, type_flags::DICT, "dict")?;
        let keys = self.ptr(dict, self.layout.dict.keys)?;
        let values = self.ptr(dict, self.layout.dict.values)?;
        self.entries(keys, (!values.is_null()).then_some(values), dict)
    }

    /// Calls `visit` with every key and value of a dict, in insertion order, until it breaks.
    pub fn dict_walk<T>(
        &self,
        dict: UserAddr,
        visit: impl FnMut(UserAddr, UserAddr) -> ControlFlow<T>,
    ) -> Result<Option<T>> {
        self.walk(self.dict_entries(dict)?, visit)
    }

    /// All keys and values of a dict.
    pub fn dict(&self, dict: UserAddr) -> Result<Vec<(UserAddr, UserAddr)>> {
        let mut items = Vec::new();
        self.dict_walk(dict, |key, value| {
            items.push((key, value));
            ControlFlow::<()>::Continue(())
        })?;
        Ok(items)
    }

    /// The value under a str key.
    pub fn dict_get(&self, dict: UserAddr, wanted: &str) -> Result<Option<UserAddr>> {
        self.dict_walk(dict, |key, value| {
            if self.str_is(key, wanted) { ControlFlow::Break(value) } else { ControlFlow::Continue(()) }
        })
    }
}
