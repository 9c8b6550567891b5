//! Typed views of Python objects in the memory of a traced process.
//!
//! Objects are hostile: a pointer may point anywhere, a length may be anything, a structure may contain itself. Every
//! length is bounded, nothing is followed more often than a stated number of times, and what does not look as it should
//! is an error, never a guess.

use std::ops::ControlFlow;

use super::layout::{
    INT_DIGITS, InstanceStyle, IntStyle, KeysStyle, OB_SIZE, OB_TYPE, OBJECT_HEADER, PyLayout,
};
use super::memory::{Memory, MemoryError};
use crate::units::UserAddr;

/// Most entries of a dict that are looked at.
pub const MAX_DICT_ENTRIES: usize = 200_000;
/// Most items of a tuple or list that are looked at.
pub const MAX_ITEMS: usize = 100_000;
/// Longest name (of a module, class, function, attribute), in characters.
pub const MAX_NAME: usize = 4096;
/// Most classes in a method resolution order.
pub const MAX_MRO: usize = 256;

/// Why an object could not be read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ObjectError {
    /// Its memory could not be read.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// It is an object of another type than it should be.
    #[error("the object at {addr} is not a {wanted}")]
    NotA {
        /// What it should be.
        wanted: &'static str,
        /// Where.
        addr: UserAddr,
    },
    /// It is larger than anything that is read.
    #[error("the {what} at {addr} has {len} items; at most {limit} are read")]
    TooLarge {
        /// What it is.
        what: &'static str,
        /// Where.
        addr: UserAddr,
        /// Its size as it states it.
        len: u64,
        /// The bound.
        limit: usize,
    },
    /// Its fields contradict each other.
    #[error("the {what} at {addr} is not understood")]
    Odd {
        /// What it is.
        what: &'static str,
        /// Where.
        addr: UserAddr,
    },
}

type Result<T> = std::result::Result<T, ObjectError>;

/// Bits of `tp_flags`: Include/object.h.
pub mod type_flags {
    /// `Py_TPFLAGS_INLINE_VALUES` (3.13 on)
    pub const INLINE_VALUES: u64 = 1 << 2;
    /// `Py_TPFLAGS_MANAGED_DICT` (3.11 on)
    pub const MANAGED_DICT: u64 = 1 << 4;
    /// `Py_TPFLAGS_HEAPTYPE`
    pub const HEAPTYPE: u64 = 1 << 9;
    /// `Py_TPFLAGS_LONG_SUBCLASS`
    pub const LONG: u64 = 1 << 24;
    /// `Py_TPFLAGS_LIST_SUBCLASS`
    pub const LIST: u64 = 1 << 25;
    /// `Py_TPFLAGS_TUPLE_SUBCLASS`
    pub const TUPLE: u64 = 1 << 26;
    /// `Py_TPFLAGS_BYTES_SUBCLASS`
    pub const BYTES: u64 = 1 << 27;
    /// `Py_TPFLAGS_UNICODE_SUBCLASS`
    pub const STR: u64 = 1 << 28;
    /// `Py_TPFLAGS_DICT_SUBCLASS`
    pub const DICT: u64 = 1 << 29;
    /// `Py_TPFLAGS_BASE_EXC_SUBCLASS`
    pub const EXCEPTION: u64 = 1 << 30;
    /// `Py_TPFLAGS_TYPE_SUBCLASS`
    pub const TYPE: u64 = 1 << 31;
}

/// Bits of `co_flags`: Include/cpython/code.h.
pub mod code_flags {
    /// `CO_VARARGS`: has `*args`.
    pub const VARARGS: u32 = 0x4;
    /// `CO_VARKEYWORDS`: has `**kwargs`.
    pub const VARKEYWORDS: u32 = 0x8;
    /// `CO_GENERATOR`
    pub const GENERATOR: u32 = 0x20;
    /// `CO_COROUTINE`
    pub const COROUTINE: u32 = 0x80;
    /// `CO_ITERABLE_COROUTINE` (`types.coroutine`)
    pub const ITERABLE_COROUTINE: u32 = 0x100;
    /// `CO_ASYNC_GENERATOR`
    pub const ASYNC_GENERATOR: u32 = 0x200;
}

macro_rules! core_types {
    ($($(#[$meta:meta])* $field:ident = $symbol:literal,)*) => {
        /// Addresses of the interpreter's own type objects and of `None` in one process.
        ///
        /// All are exported by every build of every supported version.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
        pub struct CoreTypes { $($(#[$meta])* pub $field: UserAddr,)* }

        impl CoreTypes {
            /// The symbols that hold them.
            pub const SYMBOLS: &'static [&'static str] = &[$($symbol,)*];

            /// Looks all of them up; the error is the first symbol that is missing.
            pub fn look_up(
                mut symbol: impl FnMut(&'static str) -> Option<UserAddr>,
            ) -> std::result::Result<Self, &'static str> {
                Ok(Self { $($field: symbol($symbol).ok_or($symbol)?,)* })
            }
        }
    };
}

core_types! {
    /// Functions.
    function = "PyFunction_Type",
    /// Code objects.
    code = "PyCode_Type",
    /// `type`
    type_ = "PyType_Type",
    /// Modules.
    module = "PyModule_Type",
    /// `str`
    str = "PyUnicode_Type",
    /// `float`
    float = "PyFloat_Type",
    /// `bool`
    bool = "PyBool_Type",
    /// `None` itself.
    none = "_Py_NoneStruct",
    /// Closure cells.
    cell = "PyCell_Type",
    /// Bound methods.
    method = "PyMethod_Type",
    /// `staticmethod`
    staticmethod = "PyStaticMethod_Type",
    /// `classmethod`
    classmethod = "PyClassMethod_Type",
    /// `property`
    property = "PyProperty_Type",
    /// Functions written in C.
    builtin = "PyCFunction_Type",
    /// Methods of types written in C.
    method_descriptor = "PyMethodDescr_Type",
    /// Slots.
    member_descriptor = "PyMemberDescr_Type",
    /// Capsules.
    capsule = "PyCapsule_Type",
}

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

/// A function object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Function {
    /// Where it is.
    pub addr: UserAddr,
    /// `func_code`
    pub code: UserAddr,
    /// `func_globals`
    pub globals: UserAddr,
    /// `func_name`
    pub name: UserAddr,
    /// `func_qualname`
    pub qualname: UserAddr,
    /// `func_module`
    pub module: UserAddr,
    /// `func_dict`, or NULL.
    pub dict: UserAddr,
    /// `func_defaults`, or NULL.
    pub defaults: UserAddr,
    /// `func_kwdefaults`, or NULL.
    pub kwdefaults: UserAddr,
    /// `func_closure`, or NULL.
    pub closure: UserAddr,
    /// `vectorcall`
    pub vectorcall: UserAddr,
    /// `func_version` (3.11 on).
    pub version: Option<u32>,
}

/// A code object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Code {
    /// Where it is.
    pub addr: UserAddr,
    /// `co_name`
    pub name: String,
    /// `co_qualname` (3.11 on).
    pub qualname: Option<String>,
    /// `co_filename`
    pub filename: String,
    /// `co_flags`; see [`code_flags`].
    pub flags: u32,
    /// `co_firstlineno`
    pub firstlineno: i32,
    /// `co_argcount`: positional arguments, positional-only ones included.
    pub argcount: u32,
    /// `co_kwonlyargcount`
    pub kwonlyargcount: u32,
    /// `co_consts`, a tuple.
    pub consts: UserAddr,
    /// A tuple that begins with the names of the arguments.
    pub varnames: UserAddr,
}

/// A str, or its beginning.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Text {
    /// The text; lone surrogates are replaced.
    pub text: String,
    /// Whether there is more of it.
    pub cut: bool,
}

/// A way to the entries of a dict.
#[derive(Clone, Copy, Debug)]
struct Entries {
    start: UserAddr,
    count: usize,
    stride: usize,
    key: usize,
    values: Values,
}

#[derive(Clone, Copy, Debug)]
enum Values {
    /// In the entry, at this offset.
    InEntry(usize),
    /// In an array of their own (split dicts).
    Array(UserAddr),
}

/// Objects of one interpreter.
#[derive(Clone, Copy)]
pub struct Heap<'m> {
    /// The memory they are in.
    pub mem: &'m dyn Memory,
    /// How they are laid out.
    pub layout: &'static PyLayout,
    /// The types they have.
    pub types: &'m CoreTypes,
}

impl<'m> Heap<'m> {
    /// Objects in `mem`, laid out by `layout`.
    pub fn new(mem: &'m dyn Memory, layout: &'static PyLayout, types: &'m CoreTypes) -> Self {
        Self { mem, layout, types }
    }

    fn ptr(&self, addr: UserAddr, offset: u64) -> Result<UserAddr> {
        Ok(self.mem.read_ptr(addr.offset(offset))?)
    }

    /// The type of an object.
    pub fn type_of(&self, object: UserAddr) -> Result<UserAddr> {
        self.ptr(object, OB_TYPE)
    }

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
        let cached_keys = if flags & type_flags::HEAPTYPE == 0 {
            UserAddr(0)
        } else {
            self.ptr(addr, l.cached_keys)?
        };
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

    fn flags_of(&self, object: UserAddr) -> Result<u64> {
        let type_ = self.type_of(object)?;
        Ok(self.mem.read_u64(type_.offset(self.layout.type_.flags))?)
    }

    fn expect_flag(&self, object: UserAddr, flag: u64, wanted: &'static str) -> Result<()> {
        if self.flags_of(object)? & flag == 0 {
            return Err(ObjectError::NotA {
                wanted,
                addr: object,
            });
        }
        Ok(())
    }

    fn expect_type(&self, object: UserAddr, type_: UserAddr, wanted: &'static str) -> Result<()> {
        if self.type_of(object)? != type_ {
            return Err(ObjectError::NotA {
                wanted,
                addr: object,
            });
        }
        Ok(())
    }

    /// Whether the object is a class.
    pub fn is_type(&self, object: UserAddr) -> Result<bool> {
        Ok(self.flags_of(object)? & type_flags::TYPE != 0)
    }

    /// Whether the object is a str, of a subclass or not.
    pub fn is_str(&self, object: UserAddr) -> Result<bool> {
        Ok(self.flags_of(object)? & type_flags::STR != 0)
    }

    /// Whether the object is a function written in Python.
    pub fn is_function(&self, object: UserAddr) -> Result<bool> {
        Ok(self.type_of(object)? == self.types.function)
    }

    // Strings and numbers.

    /// At most `limit` characters of a str.
    pub fn text(&self, object: UserAddr, limit: usize) -> Result<Text> {
        let l = &self.layout.str;
        self.expect_flag(object, type_flags::STR, "str")?;
        let length = self.mem.read_u64(object.offset(l.length))?;
        let state = self.mem.read_u32(object.offset(l.state))?;
        let (compact, ascii) = (state & 0x20 != 0, state & 0x40 != 0);
        let width = match (state >> 2) & 7 {
            width @ (1 | 2 | 4) => width as usize,
            _ => {
                return Err(ObjectError::Odd {
                    what: "str",
                    addr: object,
                });
            }
        };
        let data = match (compact, ascii) {
            (true, true) => object.offset(l.ascii_data),
            (true, false) => object.offset(l.compact_data),
            (false, _) => self.ptr(object, l.compact_data)?,
        };
        let cut = length > limit as u64;
        let count = if cut { limit } else { length as usize };
        let bytes = self.mem.read_bytes(data, count.saturating_mul(width))?;
        let text = match width {
            1 if ascii => String::from_utf8_lossy(&bytes).into_owned(),
            1 => bytes.iter().map(|&b| char::from(b)).collect(),
            2 => bytes
                .as_chunks::<2>()
                .0
                .iter()
                .map(|&b| {
                    char::from_u32(u16::from_le_bytes(b).into())
                        .unwrap_or(char::REPLACEMENT_CHARACTER)
                })
                .collect(),
            _ => bytes
                .as_chunks::<4>()
                .0
                .iter()
                .map(|&b| {
                    char::from_u32(u32::from_le_bytes(b)).unwrap_or(char::REPLACEMENT_CHARACTER)
                })
                .collect(),
        };
        Ok(Text { text, cut })
    }

    /// A whole str of at most [`MAX_NAME`] characters.
    pub fn name(&self, object: UserAddr) -> Result<String> {
        let Text { text, cut } = self.text(object, MAX_NAME)?;
        if cut {
            let len = self.mem.read_u64(object.offset(self.layout.str.length))?;
            return Err(ObjectError::TooLarge {
                what: "str",
                addr: object,
                len,
                limit: MAX_NAME,
            });
        }
        Ok(text)
    }

    /// Whether the object is a str with this text. One read where it is, and mostly one where it is not.
    pub fn str_is(&self, object: UserAddr, wanted: &str) -> bool {
        const ROOM: usize = 48 + 128;
        let l = &self.layout.str;
        let data = l.ascii_data as usize;
        let len = data + wanted.len();
        let whole = || {
            self.text(object, wanted.chars().count()).is_ok_and(|read| !read.cut && read.text == wanted)
        };
        if !wanted.is_ascii() || len > ROOM {
            return whole();
        }
        let mut buf = [0; ROOM];
        if self.mem.read(object, &mut buf[..len]).is_err() {
            return false; // shorter, or a subclass at the end of a mapping
        }
        let u64_at = |at: u64| {
            u64::from_le_bytes(
                buf[at as usize..at as usize + 8]
                    .try_into()
                    .expect("eight bytes"),
            )
        };
        if u64_at(l.length) != wanted.len() as u64 {
            return false;
        }
        if u64_at(OB_TYPE) != self.types.str.0 || buf[l.state as usize] & 0x60 != 0x60 {
            return whole();
        }
        buf[data..len] == *wanted.as_bytes()
    }

    /// An int that fits 64 bits; bools are ints.
    pub fn int(&self, object: UserAddr) -> Result<i64> {
        self.expect_flag(object, type_flags::LONG, "int")?;
        let head = self.mem.read_u64(object.offset(OB_SIZE))?;
        let (negative, digits) = match self.layout.int {
            IntStyle::ObSize => (head.cast_signed() < 0, head.cast_signed().unsigned_abs()),
            IntStyle::LvTag => (head & 3 == 2, head >> 3),
        };
        if digits > 3 {
            return Err(ObjectError::TooLarge {
                what: "int",
                addr: object,
                len: digits,
                limit: 3,
            });
        }
        let mut value: i128 = 0;
        for i in 0..digits {
            let digit = self.mem.read_u32(object.offset(INT_DIGITS + 4 * i))? & 0x3fff_ffff;
            value |= i128::from(digit) << (30 * i);
        }
        let value = if negative { -value } else { value };
        i64::try_from(value).map_err(|_| ObjectError::TooLarge {
            what: "int",
            addr: object,
            len: digits,
            limit: 3,
        })
    }

    /// A float.
    pub fn float(&self, object: UserAddr) -> Result<f64> {
        self.expect_type(object, self.types.float, "float")?;
        Ok(f64::from_bits(
            self.mem
                .read_u64(object.offset(self.layout.small.float_value))?,
        ))
    }

    /// The bytes of a bytes object of at most `limit` bytes.
    pub fn bytes(&self, object: UserAddr, limit: usize) -> Result<Vec<u8>> {
        self.expect_flag(object, type_flags::BYTES, "bytes")?;
        let len = self.mem.read_u64(object.offset(OB_SIZE))?;
        if len > limit as u64 {
            return Err(ObjectError::TooLarge {
                what: "bytes object",
                addr: object,
                len,
                limit,
            });
        }
        Ok(self
            .mem
            .read_bytes(object.offset(self.layout.small.bytes_data), len as usize)?)
    }

    // Containers.

    fn pointers(&self, start: UserAddr, count: usize) -> Result<Vec<UserAddr>> {
        let bytes = self.mem.read_bytes(start, count * 8)?;
        Ok(bytes
            .as_chunks::<8>()
            .0
            .iter()
            .map(|&b| UserAddr(u64::from_le_bytes(b)))
            .collect())
    }

    fn count(&self, object: UserAddr, what: &'static str) -> Result<usize> {
        let len = self.mem.read_u64(object.offset(OB_SIZE))?;
        if len > MAX_ITEMS as u64 {
            return Err(ObjectError::TooLarge {
                what,
                addr: object,
                len,
                limit: MAX_ITEMS,
            });
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

    fn entries(&self, keys: UserAddr, values: Option<UserAddr>, what: UserAddr) -> Result<Entries> {
        let l = &self.layout.dict;
        let odd = ObjectError::Odd {
            what: "dict",
            addr: what,
        };
        let nentries = self.mem.read_u64(keys.offset(l.nentries))?;
        if nentries > MAX_DICT_ENTRIES as u64 {
            return Err(ObjectError::TooLarge {
                what: "dict",
                addr: what,
                len: nentries,
                limit: MAX_DICT_ENTRIES,
            });
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
            KeysStyle::Log2 {
                log2_index_bytes,
                kind,
            } => {
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
            values: values.map_or(Values::InEntry(in_entry), |values| {
                Values::Array(values.offset(l.values_items))
            }),
        })
    }

    fn walk<T>(
        &self,
        entries: Entries,
        mut visit: impl FnMut(UserAddr, UserAddr) -> ControlFlow<T>,
    ) -> Result<Option<T>> {
        const CHUNK: usize = 128;
        let word = |bytes: &[u8], at: usize| {
            UserAddr(u64::from_le_bytes(
                bytes[at..at + 8].try_into().expect("eight bytes"),
            ))
        };
        let mut buf = [0; CHUNK * 24];
        let mut value_buf = [0; CHUNK * 8];
        let mut first = 0;
        while first < entries.count {
            let count = CHUNK.min(entries.count - first);
            let chunk = &mut buf[..count * entries.stride];
            self.mem
                .read(entries.start.offset((first * entries.stride) as u64), chunk)?;
            if let Values::Array(values) = entries.values {
                self.mem
                    .read(values.offset(8 * first as u64), &mut value_buf[..count * 8])?;
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
            first += count;
        }
        Ok(None)
    }

    /// Calls `visit` with every key and value of a dict, in insertion order, until it breaks.
    pub fn dict_walk<T>(
        &self,
        dict: UserAddr,
        visit: impl FnMut(UserAddr, UserAddr) -> ControlFlow<T>,
    ) -> Result<Option<T>> {
        self.expect_flag(dict, type_flags::DICT, "dict")?;
        let keys = self.ptr(dict, self.layout.dict.keys)?;
        let values = self.ptr(dict, self.layout.dict.values)?;
        let entries = self.entries(keys, (!values.is_null()).then_some(values), dict)?;
        self.walk(entries, visit)
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
        self.dict_walk(dict, |key, value| match self.str_is(key, wanted) {
            true => ControlFlow::Break(value),
            false => ControlFlow::Continue(()),
        })
    }

    // Types and instances.

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
            return Err(ObjectError::TooLarge {
                what: "method resolution order",
                addr: info.mro,
                len,
                limit: MAX_MRO,
            });
        }
        Ok(mro)
    }

    /// Looks an attribute of a class up: the class that defines it, and its value there.
    pub fn type_lookup(
        &self,
        type_: UserAddr,
        wanted: &str,
    ) -> Result<Option<(UserAddr, UserAddr)>> {
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
            if !class.is_null() && class != self.types.none && self.is_type(class).unwrap_or(false)
            {
                classes.push(class);
            }
        }
        Ok(classes)
    }

    fn attributes(&self, object: UserAddr, info: &TypeInfo) -> Result<Attributes> {
        const DICT: u64 = 24;
        const VALUES: u64 = 32;
        let dict_at = |dict: UserAddr| {
            if dict.is_null() {
                Attributes::None
            } else {
                Attributes::Dict(dict)
            }
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
            InstanceStyle::InlineBasicsize if managed => {
                inline(object.offset(info.basicsize as u64))
            }
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
                        .ok_or(ObjectError::Odd {
                            what: "instance",
                            addr: object,
                        })?
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
    pub fn instance_dict(
        &self,
        object: UserAddr,
        info: &TypeInfo,
    ) -> Result<Vec<(UserAddr, UserAddr)>> {
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
        let found =
            self.attributes_walk(object, &info, |key, value| match self.str_is(key, wanted) {
                true => ControlFlow::Break(value),
                false => ControlFlow::Continue(()),
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

    // Functions, code, modules, wrappers.

    /// A function written in Python.
    pub fn function(&self, object: UserAddr) -> Result<Function> {
        const ROOM: usize = 160;
        let l = &self.layout.function;
        self.expect_type(object, self.types.function, "function")?;
        let len = l.version.map_or(l.vectorcall + 8, |version| version + 4) as usize;
        let mut buf = [0; ROOM];
        self.mem.read(object, &mut buf[..len])?;
        let field = |at: u64| {
            let at = at as usize;
            UserAddr(u64::from_le_bytes(
                buf[at..at + 8].try_into().expect("eight bytes"),
            ))
        };
        Ok(Function {
            addr: object,
            code: field(l.code),
            globals: field(l.globals),
            name: field(l.name),
            qualname: field(l.qualname),
            module: field(l.module),
            dict: field(l.dict),
            defaults: field(l.defaults),
            kwdefaults: field(l.kwdefaults),
            closure: field(l.closure),
            vectorcall: field(l.vectorcall),
            version: l.version.map(|at| {
                u32::from_le_bytes(
                    buf[at as usize..at as usize + 4]
                        .try_into()
                        .expect("four bytes"),
                )
            }),
        })
    }

    /// A code object.
    pub fn code(&self, object: UserAddr) -> Result<Code> {
        let l = &self.layout.code;
        self.expect_type(object, self.types.code, "code object")?;
        Ok(Code {
            addr: object,
            name: self.name(self.ptr(object, l.name)?)?,
            qualname: l
                .qualname
                .map(|at| self.name(self.ptr(object, at)?))
                .transpose()?,
            filename: self.name(self.ptr(object, l.filename)?)?,
            flags: self.mem.read_u32(object.offset(l.flags))?,
            firstlineno: self.mem.read_i32(object.offset(l.firstlineno))?,
            argcount: self.mem.read_u32(object.offset(l.argcount))?,
            kwonlyargcount: self.mem.read_u32(object.offset(l.kwonlyargcount))?,
            consts: self.ptr(object, l.consts)?,
            varnames: self.ptr(object, l.varnames)?,
        })
    }

    /// Only the name of a code object.
    pub fn code_name(&self, object: UserAddr) -> Result<String> {
        self.expect_type(object, self.types.code, "code object")?;
        self.name(self.ptr(object, self.layout.code.name)?)
    }

    /// The names of a function's arguments, `*args` and `**kwargs` left out: positional ones first.
    pub fn argument_names(&self, code: &Code) -> Result<Vec<String>> {
        let names = self.tuple(code.varnames)?;
        let count = (code.argcount as usize).saturating_add(code.kwonlyargcount as usize);
        names
            .iter()
            .take(count)
            .map(|&name| self.name(name))
            .collect()
    }

    /// The code objects among the constants of a code object: its nested functions and classes.
    pub fn nested_code(&self, code: UserAddr) -> Result<Vec<UserAddr>> {
        self.expect_type(code, self.types.code, "code object")?;
        let consts = self.tuple(self.ptr(code, self.layout.code.consts)?)?;
        Ok(consts
            .into_iter()
            .filter(|&object| self.type_of(object).is_ok_and(|t| t == self.types.code))
            .collect())
    }

    /// The dict of a module. Modules may be of subclasses (lazy modules).
    pub fn module_dict(&self, module: UserAddr) -> Result<UserAddr> {
        if !self.is_instance(module, self.types.module)? {
            return Err(ObjectError::NotA {
                wanted: "module",
                addr: module,
            });
        }
        self.ptr(module, self.layout.small.module_dict)
    }

    /// The name of a module as its C object has it (`md_name`).
    pub fn module_name(&self, module: UserAddr) -> Result<String> {
        self.module_dict(module)?;
        self.name(self.ptr(module, self.layout.small.module_name)?)
    }

    /// What a closure cell holds.
    pub fn cell(&self, cell: UserAddr) -> Result<Option<UserAddr>> {
        self.expect_type(cell, self.types.cell, "cell")?;
        Ok(Some(self.ptr(cell, self.layout.small.cell_ref)?).filter(|object| !object.is_null()))
    }

    /// Whether `object` is of class `type_` or of a subclass, by the chain of first bases.
    pub fn is_instance(&self, object: UserAddr, type_: UserAddr) -> Result<bool> {
        let mut class = self.type_of(object)?;
        for _ in 0..32 {
            if class == type_ {
                return Ok(true);
            }
            if class.is_null() {
                return Ok(false);
            }
            class = self.ptr(class, self.layout.type_.base)?;
        }
        Ok(false)
    }

    /// The callable that a staticmethod, classmethod, property (its getter), bound method or partial wraps.
    pub fn wrapped(&self, object: UserAddr) -> Result<Option<UserAddr>> {
        let l = &self.layout.small;
        let wrappers = [
            (self.types.method, l.method_func),
            (self.types.staticmethod, l.staticmethod_callable),
            (self.types.classmethod, l.classmethod_callable),
            (self.types.property, l.property_get),
        ];
        let type_ = self.type_of(object)?;
        for (wrapper, at) in wrappers {
            // Subclasses, such as abc.abstractproperty, only where the direct comparison failed.
            if type_ == wrapper || self.is_instance(object, wrapper)? {
                return Ok(Some(self.ptr(object, at)?).filter(|callable| !callable.is_null()));
            }
        }
        if self.is_partial(type_)? {
            return Ok(
                Some(self.ptr(object, l.partial_func)?).filter(|callable| !callable.is_null())
            );
        }
        Ok(None)
    }

    /// `functools.partial`, whose type has no symbol: by its name.
    fn is_partial(&self, type_: UserAddr) -> Result<bool> {
        const NAME: &[u8] = b"functools.partial\0";
        let mut text = [0; NAME.len()];
        let name = self.ptr(type_, self.layout.type_.name)?;
        if self.mem.read(name, &mut text).is_err() || text != NAME {
            return Ok(false);
        }
        // A class of a program that has this tp_name would have to be written in C and lie.
        Ok(true)
    }
}

/// Where an instance keeps its attributes.
#[derive(Clone, Copy, Debug)]
enum Attributes {
    None,
    Dict(UserAddr),
    Values(UserAddr),
}
