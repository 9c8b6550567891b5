//! Classes, and the attributes of their instances in all the forms that CPython keeps them in.

use std::ops::ControlFlow;

use super::{Heap, MAX_ITEMS, MAX_MRO, MAX_NAME, ObjectError, Result, type_flags};
use crate::python::layout::{InstanceStyle, OB_SIZE, OBJECT_HEADER};
use crate::units::UserAddr;

/// What a type object says, as far as it is needed to read its instances.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TypeInfo {
    /// Where it is.
    pub addr: UserAddr,
    /// `tp_flags`
    pub flags: u64,
    /// `tp_basicsize`
    pub basicsize: i64,
    /// `tp_itemsize`
    pub itemsize: i64,
    /// `tp_dictoffset`
    pub dictoffset: i64,
    /// `tp_base`
    pub base: UserAddr,
    /// `tp_dict`; NULL for the interpreter's own static types from 3.12 on.
    pub dict: UserAddr,
    /// `tp_mro`
    pub mro: UserAddr,
    /// `tp_name`, a C string.
    pub name: UserAddr,
    /// `ht_cached_keys`; NULL if it is not a heap type.
    pub cached_keys: UserAddr,
}

impl TypeInfo {
    /// Whether all bits of `flags` are set.
    pub const fn has(&self, flags: u64) -> bool {
        self.flags & flags == flags
    }
}

impl Heap<'_> {
    /// What a type object says.
    pub fn type_info(&self, addr: UserAddr) -> Result<TypeInfo> {
        const LEN: usize = 352;
        let l = &self.layout.type_;
        let mut bytes = [0; LEN];
        self.mem.read(addr, &mut bytes)?;
        let field = |offset: u64| {
            let at = offset as usize;
            u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
        };
        let flags = field(l.flags);
        let cached_keys = if flags & type_flags::HEAPTYPE == 0 { UserAddr(0) } else { self.ptr(addr, l.cached_keys)? };
        Ok(TypeInfo {
            addr,
            flags,
            basicsize: field(l.basicsize).cast_signed(),
            itemsize: field(l.itemsize).cast_signed(),
            dictoffset: field(l.dictoffset).cast_signed(),
            base: UserAddr(field(l.base)),
            dict: UserAddr(field(l.dict)),
            mro: UserAddr(field(l.mro)),
            name: UserAddr(field(l.name)),
            cached_keys,
        })
    }

    /// `tp_name`: `module.Class` of static types, `Class` of others.
    pub fn type_name(&self, type_: UserAddr) -> Result<String> {
        let name = self.ptr(type_, self.layout.type_.name)?;
        Ok(self.mem.read_cstr(name, MAX_NAME)?)
    }

    /// The classes in which an attribute of a class is looked for, itself first.
    pub fn mro(&self, info: &TypeInfo) -> Result<Vec<UserAddr>> {
        if info.mro.is_null() {
            return Ok(vec![info.addr]);
        }
        let mro = self.tuple(info.mro)?;
        if mro.len() > MAX_MRO {
            let len = mro.len() as u64;
            return Err(ObjectError::TooLarge { what: "method resolution order", addr: info.mro, len, limit: MAX_MRO });
        }
        Ok(mro)
    }

    /// Looks an attribute of a class up: the class that defines it, and its value there.
    pub fn type_lookup(&self, type_: UserAddr, wanted: &str) -> Result<Option<(UserAddr, UserAddr)>> {
        let info = self.type_info(type_)?;
        for class in self.mro(&info)? {
            let dict = self.ptr(class, self.layout.type_.dict)?;
            if dict.is_null() {
                continue;
            }
            if let Some(value) = self.dict_get(dict, wanted)? {
                return Ok(Some((class, value)));
            }
        }
        Ok(None)
    }

    /// The direct subclasses of a class that are alive, through the weak references in `tp_subclasses`.
    pub fn subclasses(&self, type_: UserAddr) -> Result<Vec<UserAddr>> {
        let dict = self.ptr(type_, self.layout.type_.subclasses)?;
        if dict.is_null() || self.flags_of(dict)? & type_flags::DICT == 0 {
            return Ok(Vec::new());
        }
        let mut classes = Vec::new();
        for (_, reference) in self.dict(dict)? {
            let class = self.ptr(reference, self.layout.small.weakref_object)?;
            if !class.is_null() && class != self.types.none && self.is_type(class).unwrap_or(false) {
                classes.push(class);
            }
        }
        Ok(classes)
    }

    fn attributes(&self, object: UserAddr, info: &TypeInfo) -> Result<Attributes> {
        const DICT: u64 = 24;
        const VALUES: u64 = 32;
        let dict_at = |dict: UserAddr| {
            if dict.is_null() { Attributes::None } else { Attributes::Dict(dict) }
        };
        let managed = info.has(type_flags::MANAGED_DICT) && !info.cached_keys.is_null();
        let inline = |values: UserAddr| -> Result<Attributes> {
            // `valid`, the fourth byte of the header.
            if info.has(type_flags::INLINE_VALUES) && self.mem.read_u8(values.offset(3))? != 0 {
                return Ok(Attributes::Values(values));
            }
            Ok(dict_at(self.mem.read_ptr(object.back(DICT))?))
        };
        match self.layout.instance {
            InstanceStyle::ValuesAndDict if managed => {
                let values = self.mem.read_ptr(object.back(VALUES))?;
                if !values.is_null() {
                    return Ok(Attributes::Values(values));
                }
                Ok(dict_at(self.mem.read_ptr(object.back(DICT))?))
            }
            InstanceStyle::Tagged if managed => {
                let word = self.mem.read_u64(object.back(DICT))?;
                if word & 1 != 0 {
                    return Ok(Attributes::Values(UserAddr(word.wrapping_add(1))));
                }
                Ok(dict_at(UserAddr(word)))
            }
            InstanceStyle::InlineHeader if managed => inline(object.offset(OBJECT_HEADER)),
            InstanceStyle::InlineBasicsize if managed => inline(object.offset(info.basicsize as u64)),
            _ => {
                let offset = if info.dictoffset >= 0 {
                    info.dictoffset
                } else {
                    let size = self.mem.read_i64(object.offset(OB_SIZE))?;
                    let size = size.checked_abs().filter(|&size| size <= MAX_ITEMS as i64);
                    let end = size
                        .and_then(|size| size.checked_mul(info.itemsize))
                        .and_then(|size| size.checked_add(info.basicsize))
                        .and_then(|size| size.checked_add(7))
                        .ok_or(ObjectError::Odd { what: "instance", addr: object })?
                        & !7;
                    end.wrapping_add(info.dictoffset)
                };
                if offset <= 0 {
                    return Ok(Attributes::None);
                }
                Ok(dict_at(self.mem.read_ptr(object.offset(offset as u64))?))
            }
        }
    }

    fn attributes_walk<T>(
        &self,
        object: UserAddr,
        info: &TypeInfo,
        visit: impl FnMut(UserAddr, UserAddr) -> ControlFlow<T>,
    ) -> Result<Option<T>> {
        match self.attributes(object, info)? {
            Attributes::None => Ok(None),
            Attributes::Dict(dict) => self.dict_walk(dict, visit),
            Attributes::Values(values) => {
                let entries = self.entries(info.cached_keys, Some(values), object)?;
                self.walk(entries, visit)
            }
        }
    }

    /// The attributes in an instance's own dict, whatever form that has; slots are not among them.
    pub fn instance_dict(&self, object: UserAddr, info: &TypeInfo) -> Result<Vec<(UserAddr, UserAddr)>> {
        let mut items = Vec::new();
        self.attributes_walk(object, info, |key, value| {
            items.push((key, value));
            ControlFlow::<()>::Continue(())
        })?;
        Ok(items)
    }

    /// An attribute of an instance: from its own dict, or from a slot. Attributes of the class do not count.
    pub fn instance_attribute(&self, object: UserAddr, wanted: &str) -> Result<Option<UserAddr>> {
        let type_ = self.type_of(object)?;
        let info = self.type_info(type_)?;
        let found = self.attributes_walk(object, &info, |key, value| {
            if self.str_is(key, wanted) { ControlFlow::Break(value) } else { ControlFlow::Continue(()) }
        })?;
        if found.is_some() {
            return Ok(found);
        }
        let Some((_, descriptor)) = self.type_lookup(type_, wanted)? else {
            return Ok(None);
        };
        match self.slot_offset(descriptor, &info)? {
            Some(offset) => Ok(Some(self.ptr(object, offset)?).filter(|value| !value.is_null())),
            None => Ok(None),
        }
    }

    /// Where in the instance a member descriptor keeps an object, if `descriptor` is one that does.
    pub fn slot_offset(&self, descriptor: UserAddr, info: &TypeInfo) -> Result<Option<u64>> {
        const T_OBJECT: i32 = 6;
        const T_OBJECT_EX: i32 = 16;
        let l = &self.layout.small;
        if self.type_of(descriptor)? != self.types.member_descriptor {
            return Ok(None);
        }
        let member = self.ptr(descriptor, l.member_descriptor_member)?;
        let kind = self.mem.read_i32(member.offset(l.member_type))?;
        let offset = self.mem.read_i64(member.offset(l.member_offset))?;
        // Within the object: hostile descriptors must not point elsewhere.
        let fits = offset >= OBJECT_HEADER as i64 && offset <= info.basicsize.saturating_sub(8);
        Ok((matches!(kind, T_OBJECT | T_OBJECT_EX) && fits).then_some(offset as u64))
    }
}

/// Where an instance keeps its attributes.
#[derive(Clone, Copy, Debug)]
enum Attributes {
    None,
    Dict(UserAddr),
    Values(UserAddr),
}
