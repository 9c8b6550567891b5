//! Typed views of Python objects in the memory of a traced process.
//!
//! Objects are hostile: a pointer may point anywhere, a length may be anything, a structure may contain itself. Every
//! length is bounded, nothing is followed more often than a stated number of times, and what does not look as it should
//! is an error, never a guess.

use super::layout::{OB_TYPE, PyLayout};
use super::memory::{Memory, MemoryError};
use crate::units::UserAddr;

mod code;
mod containers;
mod instances;
mod values;

pub use code::{Code, Function};
pub use instances::TypeInfo;
pub use values::Text;

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

    fn flags_of(&self, object: UserAddr) -> Result<u64> {
        let type_ = self.type_of(object)?;
        Ok(self.mem.read_u64(type_.offset(self.layout.type_.flags))?)
    }

    /// Whether the type of the object has one of these flags.
    pub fn has_flag(&self, object: UserAddr, flags: u64) -> Result<bool> {
        Ok(self.flags_of(object)? & flags != 0)
    }

    fn expect_flag(&self, object: UserAddr, flag: u64, wanted: &'static str) -> Result<()> {
        if self.flags_of(object)? & flag == 0 {
            return Err(ObjectError::NotA { wanted, addr: object });
        }
        Ok(())
    }

    fn expect_type(&self, object: UserAddr, type_: UserAddr, wanted: &'static str) -> Result<()> {
        if self.type_of(object)? != type_ {
            return Err(ObjectError::NotA { wanted, addr: object });
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
}

#[cfg(test)]
mod tests;
