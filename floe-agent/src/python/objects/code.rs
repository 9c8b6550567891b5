//! Functions, code objects, modules, and what wraps functions.

use super::{Heap, ObjectError, Result};
use crate::units::UserAddr;

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
    /// `co_flags`; see [`super::code_flags`].
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

impl Heap<'_> {
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
            UserAddr(u64::from_le_bytes(buf[at..at + 8].try_into().expect("eight bytes")))
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
            version: l
                .version
                .map(|at| u32::from_le_bytes(buf[at as usize..at as usize + 4].try_into().expect("four bytes"))),
        })
    }

    /// A code object.
    pub fn code(&self, object: UserAddr) -> Result<Code> {
        let l = &self.layout.code;
        self.expect_type(object, self.types.code, "code object")?;
        Ok(Code {
            addr: object,
            name: self.name(self.ptr(object, l.name)?)?,
            qualname: l.qualname.map(|at| self.name(self.ptr(object, at)?)).transpose()?,
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

    /// File and name of a code object.
    pub fn code_place(&self, object: UserAddr) -> Result<(String, String)> {
        self.expect_type(object, self.types.code, "code object")?;
        let l = &self.layout.code;
        Ok((self.name(self.ptr(object, l.filename)?)?, self.name(self.ptr(object, l.name)?)?))
    }

    /// The first line of a code object, and its table of lines, of at most `limit` bytes.
    pub fn code_lines(&self, object: UserAddr, limit: usize) -> Result<(i32, Vec<u8>)> {
        self.expect_type(object, self.types.code, "code object")?;
        let l = &self.layout.code;
        let table = self.bytes(self.ptr(object, l.linetable)?, limit)?;
        Ok((self.mem.read_i32(object.offset(l.firstlineno))?, table))
    }

    /// The names of a function's arguments, `*args` and `**kwargs` left out: positional ones first.
    pub fn argument_names(&self, code: &Code) -> Result<Vec<String>> {
        let names = self.tuple(code.varnames)?;
        let count = (code.argcount as usize).saturating_add(code.kwonlyargcount as usize);
        names.iter().take(count).map(|&name| self.name(name)).collect()
    }

    /// The code objects among the constants of a code object: its nested functions and classes.
    pub fn nested_code(&self, code: UserAddr) -> Result<Vec<UserAddr>> {
        self.expect_type(code, self.types.code, "code object")?;
        let consts = self.tuple(self.ptr(code, self.layout.code.consts)?)?;
        Ok(consts.into_iter().filter(|&object| self.type_of(object).is_ok_and(|t| t == self.types.code)).collect())
    }

    /// The dict of a module. Modules may be of subclasses (lazy modules).
    pub fn module_dict(&self, module: UserAddr) -> Result<UserAddr> {
        if !self.is_instance(module, self.types.module)? {
            return Err(ObjectError::NotA { wanted: "module", addr: module });
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
            return Ok(Some(self.ptr(object, l.partial_func)?).filter(|callable| !callable.is_null()));
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
