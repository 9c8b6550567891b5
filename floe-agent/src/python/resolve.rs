//! Finding functions by name from outside: module, class, decorated, nested.
//!
//! `pkg.module` and `Class.method`, `function` or `outer.<locals>.inner` become the addresses of function objects. A name
//! that a decorator has taken over is searched behind: what counts is the function whose *code* has the wanted name.

use std::cell::OnceCell;
use std::collections::{HashMap, HashSet, VecDeque};
use std::ops::ControlFlow;

use super::graph::Graph;
use super::memory::MemoryError;
use super::objects::{Code, Function, Heap, MAX_NAME, ObjectError, code_flags};
use crate::units::UserAddr;

/// Most objects that the search for nested functions looks at.
pub const MAX_OBJECTS: usize = 50_000;
/// How far a search looks at first: objects in a module, and what those hold.
const NEAR_DEPTH: u32 = 2;
/// Longest chain of references from a module to a nested function.
pub const MAX_DEPTH: u32 = 12;
/// Most objects that the search behind a decorated name looks at.
const MAX_BEHIND: usize = 2_000;
/// Longest chain of references behind a decorated name.
const MAX_BEHIND_DEPTH: u32 = 8;
/// Most parts of a qualified name.
const MAX_PARTS: usize = 16;
/// Most functions that one name resolves to.
const MAX_FOUND: usize = 1_000;
/// Most methods of a type written in C that are compared.
const MAX_METHODS: u64 = 1_000;

/// Why a name does not lead to a function.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ResolveError {
    /// The module has not been imported.
    #[error("module {module} is not imported")]
    NoModule {
        /// Which.
        module: String,
    },
    /// There is no such attribute.
    #[error("{owner} has no attribute {attribute}")]
    NoAttribute {
        /// Of what.
        owner: String,
        /// Which.
        attribute: String,
    },
    /// It is something that cannot be armed.
    #[error("{name} is {what}, not a function written in Python")]
    NotAFunction {
        /// The name that was asked for.
        name: String,
        /// What it is.
        what: String,
    },
    /// The code of the outer function has no nested function of this name.
    #[error("{outer} defines no function {inner}")]
    NoNested {
        /// The outer function.
        outer: String,
        /// The nested one.
        inner: String,
    },
    /// Nothing that was searched holds such a function.
    #[error("no function object with the code of {name} was found among {searched} objects of {found_in}{more}")]
    NotReached {
        /// The name that was asked for.
        name: String,
        /// Objects that were looked at.
        searched: usize,
        /// The modules whose contents were searched.
        found_in: String,
        /// " (the search was cut off)" or nothing.
        more: &'static str,
    },
    /// The name makes no sense.
    #[error("{name} is not a qualified name: write `function`, `Class.method` or `outer.<locals>.inner`")]
    BadName {
        /// The name.
        name: String,
    },
    /// Something on the way could not be read.
    #[error(transparent)]
    Object(#[from] ObjectError),
}

impl From<MemoryError> for ResolveError {
    fn from(error: MemoryError) -> Self {
        Self::Object(error.into())
    }
}

type Result<T> = std::result::Result<T, ResolveError>;

/// What a call of a function does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FunctionKind {
    /// Runs its body.
    Plain,
    /// Returns a generator at once.
    Generator,
    /// Returns a coroutine at once.
    Coroutine,
    /// Returns an asynchronous generator at once.
    AsyncGenerator,
}

impl FunctionKind {
    /// From `co_flags`.
    pub const fn of(flags: u32) -> Self {
        if flags & code_flags::ASYNC_GENERATOR != 0 {
            Self::AsyncGenerator
        } else if flags & code_flags::COROUTINE != 0 {
            Self::Coroutine
        } else if flags & code_flags::GENERATOR != 0 {
            Self::Generator
        } else {
            Self::Plain
        }
    }

    /// Whether the time between call and return is the time its body takes.
    pub const fn runs_in_call(self) -> bool {
        matches!(self, Self::Plain)
    }
}

/// A function object that was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FoundFunction {
    /// The function object.
    pub function: UserAddr,
    /// Its code object.
    pub code: UserAddr,
    /// `vectorcall` as it is now.
    pub vectorcall: UserAddr,
    /// Where its `func_version` is (3.11 on).
    pub func_version_addr: Option<UserAddr>,
    /// `co_name`
    pub name: String,
    /// `co_qualname`, before 3.11 `__qualname__`.
    pub qualname: String,
    /// `co_filename`
    pub filename: String,
    /// `co_firstlineno`
    pub line: i32,
    /// `co_flags`
    pub code_flags: u32,
    /// What a call of it does.
    pub kind: FunctionKind,
    /// The class that defines it, when it was looked up in a class.
    pub class: Option<String>,
    /// Names of its arguments, positional ones first; `*args` and `**kwargs` are not among them.
    pub arguments: Vec<String>,
    /// How many of them are positional.
    pub positional: usize,
    /// Whether its code has the wanted name. If not, it is what the name is bound to: an alias or a lambda.
    pub exact: bool,
}

/// A C function behind a Python name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MethodDef {
    /// `ml_name`
    pub name: String,
    /// `ml_meth`: its address in memory.
    pub function: UserAddr,
}

/// Finds functions in one interpreter.
///
/// Remembers the modules that it has found: make a new one when the target has run.
pub struct Resolver<'m> {
    heap: Heap<'m>,
    modules: UserAddr,
    known: OnceCell<HashMap<String, UserAddr>>,
}

impl<'m> Resolver<'m> {
    /// Resolves names with `modules`, the dict `sys.modules` of an interpreter.
    pub fn new(heap: Heap<'m>, modules: UserAddr) -> Self {
        Self { heap, modules, known: OnceCell::new() }
    }

    /// A module that is imported. `None` in `sys.modules`, which forbids an import, does not count.
    pub fn module(&self, name: &str) -> Result<Option<UserAddr>> {
        Ok(self.imported()?.get(name).copied())
    }

    /// The names of all modules that are imported.
    pub fn module_names(&self) -> Result<impl Iterator<Item = &str>> {
        Ok(self.imported()?.keys().map(String::as_str))
    }

    /// What is in `sys.modules`, read as a whole when it is first asked for: most of the modules that are asked for are
    /// not there, and each of these would be looked for through all of it.
    fn imported(&self) -> Result<&HashMap<String, UserAddr>> {
        if let Some(known) = self.known.get() {
            return Ok(known);
        }
        let mut modules = HashMap::new();
        self.heap.dict_walk(self.modules, |name, module| {
            if module != self.heap.types.none
                && let Ok(name) = self.heap.name(name)
            {
                modules.insert(name, module);
            }
            ControlFlow::<()>::Continue(())
        })?;
        Ok(self.known.get_or_init(|| modules))
    }

    fn module_dict(&self, module: &str) -> Result<UserAddr> {
        let object = self.module(module)?.ok_or_else(|| ResolveError::NoModule { module: module.to_owned() })?;
        Ok(self.heap.module_dict(object)?)
    }

    /// The functions that `qualname` of `module` stands for: one, or for a nested function (`<locals>`) those that are
    /// found in the contents of the modules `found_in` (of `module` itself if that is empty): all that are near, such as
    /// decorated functions and commands, else all that can be reached.
    pub fn resolve(&self, module: &str, qualname: &str, found_in: &[&str]) -> Result<Vec<FoundFunction>> {
        let bad = || ResolveError::BadName { name: qualname.to_owned() };
        let parts: Vec<&str> = qualname.split(".<locals>.").collect();
        if parts.len() > MAX_PARTS || parts.iter().any(|part| part.is_empty() || part.split('.').any(str::is_empty)) {
            return Err(bad());
        }
        let (outer, inner) = parts.split_first().ok_or_else(bad)?;
        let found = self.resolve_direct(module, outer)?;
        if inner.is_empty() {
            return Ok(vec![found]);
        }
        let codes = self.nested(found.code, qualname, outer, inner)?;
        let own = [module];
        let roots = if found_in.is_empty() { &own[..] } else { found_in };
        self.reach(&codes, qualname, roots)
    }

    /// A function that a module or a class holds, perhaps behind decorators.
    fn resolve_direct(&self, module: &str, qualname: &str) -> Result<FoundFunction> {
        let heap = &self.heap;
        let dict = self.module_dict(module)?;
        let Place { object, class } = self.attribute(module, dict, qualname)?;
        let name = qualname.rsplit('.').next().unwrap_or(qualname);

        let mut graph = Graph::new(*heap, MAX_BEHIND, MAX_BEHIND_DEPTH);
        graph.push(object, 0);
        let class_name = class.map(|class| heap.type_name(class)).transpose()?;
        let qualified =
            class_name.as_ref().map(|class| format!(".{}.{name}", class.rsplit('.').next().unwrap_or(class)));
        let is_wanted = |code: &Code, function: &Function| {
            let own = code.qualname.clone().or_else(|| heap.name(function.qualname).ok()).unwrap_or_default();
            own == qualname || qualified.as_ref().is_some_and(|end| format!(".{own}").ends_with(end.as_str()))
        };
        let file = heap.dict_get(dict, "__file__")?.and_then(|file| heap.name(file).ok());
        let mut similar = None;
        while let Some(next) = graph.next() {
            let Ok(function) = heap.function(next) else {
                continue;
            };
            if heap.code_name(function.code).ok().as_deref() != Some(name) {
                continue;
            }
            let code = heap.code(function.code)?;
            if is_wanted(&code, &function) {
                return self.describe(&function, class_name, true);
            }
            if similar.is_none() && file.as_ref() == Some(&code.filename) {
                similar = Some(function);
            }
        }
        if let Some(function) = similar {
            return self.describe(&function, class_name, true);
        }
        // No code of that name: what the name is bound to, if that is a function.
        let mut bound = object;
        for _ in 0..MAX_BEHIND_DEPTH {
            if let Ok(function) = heap.function(bound) {
                return self.describe(&function, class_name, false);
            }
            match heap.wrapped(bound)? {
                Some(wrapped) => bound = wrapped,
                None => break,
            }
        }
        Err(ResolveError::NotAFunction { name: format!("{module}:{qualname}"), what: self.what_is(object) })
    }

    fn what_is(&self, object: UserAddr) -> String {
        let heap = &self.heap;
        let Ok(type_) = heap.type_of(object) else {
            return "unreadable".to_owned();
        };
        if type_ == heap.types.builtin || type_ == heap.types.method_descriptor {
            return "a function written in C".to_owned();
        }
        if heap.is_type(object).unwrap_or(false) {
            return "a class (name one of its methods)".to_owned();
        }
        match heap.type_name(type_) {
            Ok(name) => format!("an object of type {name}"),
            Err(_) => "an object of an unreadable type".to_owned(),
        }
    }

    /// Follows `a.b.c` from a module's dict.
    fn attribute(&self, module: &str, dict: UserAddr, path: &str) -> Result<Place> {
        let heap = &self.heap;
        let mut owner = module.to_owned();
        let mut place: Option<Place> = None;
        for part in path.split('.') {
            let missing = || ResolveError::NoAttribute { owner: owner.clone(), attribute: part.to_owned() };
            let next = match place {
                None => heap.dict_get(dict, part)?.map(|object| Place { object, class: None }),
                Some(Place { object, .. }) if heap.is_type(object)? => {
                    heap.type_lookup(object, part)?.map(|(class, object)| Place { object, class: Some(class) })
                }
                Some(Place { object, .. }) => match self.own_attribute(object, part)? {
                    Some(object) => Some(Place { object, class: None }),
                    None => heap
                        .type_lookup(heap.type_of(object)?, part)?
                        .map(|(class, object)| Place { object, class: Some(class) }),
                },
            };
            place = Some(next.ok_or_else(missing)?);
            owner = format!("{owner}.{part}");
        }
        place.ok_or_else(|| ResolveError::BadName { name: path.to_owned() })
    }

    /// An attribute of a module, a function or an instance.
    fn own_attribute(&self, object: UserAddr, name: &str) -> Result<Option<UserAddr>> {
        let heap = &self.heap;
        if let Ok(dict) = heap.module_dict(object) {
            return Ok(heap.dict_get(dict, name)?);
        }
        if let Ok(function) = heap.function(object) {
            if function.dict.is_null() {
                return Ok(None);
            }
            return Ok(heap.dict_get(function.dict, name)?);
        }
        Ok(heap.instance_attribute(object, name)?)
    }

    /// The code objects that `inner` names within a code object. There can be several: one function, defined in branches.
    fn nested(&self, code: UserAddr, name: &str, outer: &str, inner: &[&str]) -> Result<HashSet<UserAddr>> {
        let mut codes = HashSet::from([code]);
        for part in inner.iter().flat_map(|part| part.split('.')) {
            let mut next = HashSet::new();
            for &code in &codes {
                for nested in self.heap.nested_code(code)? {
                    if self.heap.code_name(nested)? == part && next.len() < MAX_FOUND {
                        next.insert(nested);
                    }
                }
            }
            if next.is_empty() {
                let inner = name.strip_prefix(outer).unwrap_or(name).trim_start_matches(".<locals>.").to_owned();
                return Err(ResolveError::NoNested { outer: outer.to_owned(), inner });
            }
            codes = next;
        }
        Ok(codes)
    }

    /// Searches the contents of modules for functions with one of these code objects.
    fn reach(&self, codes: &HashSet<UserAddr>, name: &str, found_in: &[&str]) -> Result<Vec<FoundFunction>> {
        let heap = &self.heap;
        let mut roots = Vec::new();
        let mut missing = None;
        for module in found_in {
            match self.module_dict(module) {
                Ok(dict) => {
                    let contents = heap.dict(dict)?.into_iter();
                    roots.extend(
                        contents.filter(|&(name, _)| !heap.str_is(name, "__builtins__")).map(|(_, object)| object),
                    );
                }
                Err(error) => missing = Some(error),
            }
        }
        // A thread of the target waits for this. Decorated functions hang on what the module holds, so the near
        // neighbourhood comes first, and the rest only if nothing is found there.
        let mut found = Vec::new();
        let mut graph = Graph::new(*heap, 0, 0);
        for depth in [NEAR_DEPTH, MAX_DEPTH] {
            graph = Graph::new(*heap, MAX_OBJECTS, depth);
            for &object in &roots {
                graph.push(object, 0);
            }
            while let Some(object) = graph.next() {
                let Ok(function) = heap.function(object) else {
                    continue;
                };
                if codes.contains(&function.code) && found.len() < MAX_FOUND {
                    found.push(self.describe(&function, None, true)?);
                }
            }
            if !found.is_empty() {
                break;
            }
        }
        match (found.is_empty(), missing) {
            (false, _) => Ok(found),
            (true, Some(error)) => Err(error),
            (true, None) => Err(ResolveError::NotReached {
                name: name.to_owned(),
                searched: graph.reached(),
                found_in: found_in.join(", "),
                more: if graph.is_cut() { " (the search was cut off)" } else { "" },
            }),
        }
    }

    fn describe(&self, function: &Function, class: Option<String>, exact: bool) -> Result<FoundFunction> {
        let heap = &self.heap;
        let code = heap.code(function.code)?;
        let arguments = heap.argument_names(&code)?;
        let qualname = match &code.qualname {
            Some(qualname) => qualname.clone(),
            None => heap.name(function.qualname)?,
        };
        Ok(FoundFunction {
            function: function.addr,
            code: function.code,
            vectorcall: function.vectorcall,
            func_version_addr: heap.layout.function.version.map(|at| function.addr.offset(at)),
            qualname,
            line: code.firstlineno,
            code_flags: code.flags,
            kind: FunctionKind::of(code.flags),
            class,
            positional: (code.argcount as usize).min(arguments.len()),
            arguments,
            name: code.name,
            filename: code.filename,
            exact,
        })
    }

    /// Describes a function object whose address is known.
    pub fn describe_function(&self, function: UserAddr) -> Result<FoundFunction> {
        self.describe(&self.heap.function(function)?, None, true)
    }

    /// The C function behind a name: `greenlet` and `greenlet.switch`, `sys` and `setrecursionlimit`.
    pub fn find_method_def(&self, module: &str, path: &str) -> Result<MethodDef> {
        let heap = &self.heap;
        let l = &heap.layout.small;
        let dict = self.module_dict(module)?;
        let def = match self.attribute(module, dict, path) {
            Ok(Place { object, .. }) => {
                let type_ = heap.type_of(object)?;
                let at = match () {
                    () if type_ == heap.types.builtin => l.cfunction_method,
                    () if type_ == heap.types.method_descriptor => l.method_descriptor_method,
                    () => {
                        let name = format!("{module}:{path}");
                        let what = format!("{}, and no function written in C", self.what_is(object));
                        return Err(ResolveError::NotAFunction { name, what });
                    }
                };
                heap.mem.read_ptr(object.offset(at))?
            }
            // The interpreter's own static types have no dict of their own from 3.12 on, but they have their methods.
            Err(error @ ResolveError::NoAttribute { .. }) => {
                let (owner, name) = path.rsplit_once('.').ok_or_else(|| error.clone())?;
                let Place { object, .. } = self.attribute(module, dict, owner)?;
                self.method_of_static_type(object, name)?.ok_or(error)?
            }
            Err(error) => return Err(error),
        };
        let name = heap.mem.read_ptr(def.offset(l.methoddef_name))?;
        Ok(MethodDef {
            name: heap.mem.read_cstr(name, MAX_NAME)?,
            function: heap.mem.read_ptr(def.offset(l.methoddef_meth))?,
        })
    }

    fn method_of_static_type(&self, type_: UserAddr, wanted: &str) -> Result<Option<UserAddr>> {
        let heap = &self.heap;
        let l = &heap.layout.small;
        if !heap.is_type(type_)? {
            return Ok(None);
        }
        for class in heap.mro(&heap.type_info(type_)?)? {
            let methods = heap.mem.read_ptr(class.offset(heap.layout.type_.methods))?;
            if methods.is_null() {
                continue;
            }
            for i in 0..MAX_METHODS {
                let def = methods.offset(i * l.methoddef_size);
                let name = heap.mem.read_ptr(def.offset(l.methoddef_name))?;
                if name.is_null() {
                    break;
                }
                if heap.mem.read_cstr(name, MAX_NAME)? == wanted {
                    return Ok(Some(def));
                }
            }
        }
        Ok(None)
    }

    /// The pointer that a capsule holds: for `greenlet._C_API` the address of a table of C functions.
    pub fn capsule_pointer(&self, module: &str, path: &str) -> Result<UserAddr> {
        let heap = &self.heap;
        let dict = self.module_dict(module)?;
        let Place { object, .. } = self.attribute(module, dict, path)?;
        if heap.type_of(object)? != heap.types.capsule {
            return Err(ObjectError::NotA { wanted: "capsule", addr: object }.into());
        }
        Ok(heap.mem.read_ptr(object.offset(heap.layout.small.capsule_pointer))?)
    }

    /// A str that a module holds, such as `dbt.version` and `__version__`.
    pub fn module_attribute_str(&self, module: &str, path: &str) -> Result<String> {
        let dict = self.module_dict(module)?;
        let Place { object, .. } = self.attribute(module, dict, path)?;
        Ok(self.heap.name(object)?)
    }

    /// The object that a module holds under a dotted path.
    pub fn module_attribute(&self, module: &str, path: &str) -> Result<UserAddr> {
        let dict = self.module_dict(module)?;
        Ok(self.attribute(module, dict, path)?.object)
    }

    /// The implementations of a method (`Base.method`) in a class and all its subclasses that are alive, each function once.
    /// Inherited ones count where they are defined, abstract ones not at all.
    pub fn implementations(&self, module: &str, qualname: &str) -> Result<Vec<FoundFunction>> {
        let heap = &self.heap;
        let (class, method) =
            qualname.rsplit_once('.').ok_or_else(|| ResolveError::BadName { name: qualname.to_owned() })?;
        let dict = self.module_dict(module)?;
        let Place { object, .. } = self.attribute(module, dict, class)?;
        if !heap.is_type(object)? {
            return Err(ResolveError::NotAFunction { name: format!("{module}:{class}"), what: self.what_is(object) });
        }
        if heap.type_lookup(object, method)?.is_none() {
            return Err(ResolveError::NoAttribute { owner: format!("{module}.{class}"), attribute: method.to_owned() });
        }
        let mut classes = VecDeque::from([object]);
        let mut seen = HashSet::from([object]);
        let mut functions = HashSet::new();
        let mut found = Vec::new();
        // A class that cannot be read, or that is being made or taken apart, does not hide the others.
        while let Some(class) = classes.pop_front() {
            if let Ok(Some(own)) = self.own_method(class, method)
                && functions.insert(own.addr)
                && found.len() < MAX_FOUND
                && let Ok(name) = heap.type_name(class)
                && let Ok(function) = self.describe(&own, Some(name), true)
            {
                found.push(function);
            }
            for subclass in heap.subclasses(class).unwrap_or_default() {
                if seen.len() < MAX_OBJECTS && seen.insert(subclass) {
                    classes.push_back(subclass);
                }
            }
        }
        Ok(found)
    }

    /// The function that a class itself defines under a name, behind decorators, unless it is abstract.
    fn own_method(&self, class: UserAddr, name: &str) -> Result<Option<Function>> {
        let heap = &self.heap;
        let dict = heap.type_info(class)?.dict;
        if dict.is_null() {
            return Ok(None);
        }
        let Some(object) = heap.dict_get(dict, name)? else {
            return Ok(None);
        };
        let mut graph = Graph::new(*heap, MAX_BEHIND, MAX_BEHIND_DEPTH);
        graph.push(object, 0);
        let mut method = None;
        while let Some(next) = graph.next() {
            if let Ok(function) = heap.function(next)
                && heap.code_name(function.code).is_ok_and(|own| own == name)
            {
                method = Some(function);
                break;
            }
        }
        // An alias or a lambda: what the name is bound to.
        let method = method.or_else(|| heap.function(object).ok());
        Ok(method.filter(|function| !self.is_abstract(function)))
    }

    /// Whether a function was marked by `abc.abstractmethod`.
    fn is_abstract(&self, function: &Function) -> bool {
        let heap = &self.heap;
        !function.dict.is_null()
            && matches!(heap.dict_get(function.dict, "__isabstractmethod__"), Ok(Some(mark)) if heap.int(mark) == Ok(1))
    }

    /// The function whose result is the context manager: for one made by `contextlib.contextmanager` that is the helper in
    /// which the decorator wraps it, not the generator function itself.
    pub fn context_manager(&self, module: &str, qualname: &str) -> Result<FoundFunction> {
        let heap = &self.heap;
        let own = self.resolve_direct(module, qualname)?;
        let refuse =
            |what: &str| ResolveError::NotAFunction { name: format!("{module}:{qualname}"), what: what.to_owned() };
        match own.kind {
            // It makes its result elsewhere.
            FunctionKind::Plain => return Ok(own),
            FunctionKind::Generator => {}
            FunctionKind::Coroutine | FunctionKind::AsyncGenerator => {
                return Err(refuse("an asynchronous context manager"));
            }
        }
        let dict = self.module_dict(module)?;
        let Place { object, class } = self.attribute(module, dict, qualname)?;
        let contextlib = self.module_dict("contextlib")?;
        let mut graph = Graph::new(*heap, MAX_BEHIND, MAX_BEHIND_DEPTH);
        graph.push(object, 0);
        while let Some(next) = graph.next() {
            let Ok(function) = heap.function(next) else { continue };
            if function.globals == contextlib && heap.code_name(function.code).is_ok_and(|name| name == "helper") {
                let class = class.map(|class| heap.type_name(class)).transpose()?;
                return self.describe(&function, class, true);
            }
        }
        Err(refuse("a generator function without `contextlib.contextmanager`"))
    }
}

/// Where a name leads.
#[derive(Clone, Copy, Debug)]
struct Place {
    object: UserAddr,
    /// The class whose dict holds it.
    class: Option<UserAddr>,
}
