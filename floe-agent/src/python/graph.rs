//! A bounded walk over what objects refer to.

use std::collections::{HashMap, HashSet, VecDeque};
use std::ops::ControlFlow;

use super::layout::OB_TYPE;
use super::objects::{Heap, ObjectError, TypeInfo, type_flags};
use crate::units::UserAddr;

type Result<T> = std::result::Result<T, ObjectError>;

/// Most references that a walk follows; numbers and texts, which lead nowhere, count here only.
const MAX_REFERENCES: usize = 500_000;

/// What the instances of a type refer to.
#[derive(Clone, Debug)]
enum Kind {
    Function,
    Wrapper,
    Method,
    Cell,
    Dict,
    List,
    Tuple,
    Type,
    Instance(Box<(TypeInfo, Vec<u64>)>),
    /// Nothing that is followed: modules, numbers, texts, objects of types written in C without a dict.
    Leaf,
}

/// Walk over what objects refer to, breadth first but functions before other objects. Every object is visited once, and
/// there is a bound on their number.
pub(super) struct Graph<'m> {
    heap: Heap<'m>,
    /// Functions and what wraps them, which are looked at first: a decorated name may lead through dozens of them.
    near: VecDeque<(UserAddr, u32)>,
    far: VecDeque<(UserAddr, u32)>,
    seen: HashSet<UserAddr>,
    kinds: HashMap<UserAddr, Kind>,
    limit: usize,
    depth: u32,
    references: usize,
    cut: bool,
}

impl<'m> Graph<'m> {
    pub(super) fn new(heap: Heap<'m>, limit: usize, depth: u32) -> Self {
        Self {
            heap,
            near: VecDeque::new(),
            far: VecDeque::new(),
            seen: HashSet::new(),
            kinds: HashMap::new(),
            limit,
            depth,
            references: 0,
            cut: false,
        }
    }

    /// Queues an object that one at `depth` refers to. Functions and what wraps them do not count for the depth.
    pub(super) fn push(&mut self, object: UserAddr, depth: u32) {
        if object.is_null() || self.cut_off() {
            return;
        }
        self.references += 1;
        if self.seen.contains(&object) {
            return;
        }
        let Ok(kind) = self.heap.type_of(object).and_then(|type_| self.kind(type_)) else {
            return;
        };
        let depth = match kind {
            Kind::Leaf => return,
            Kind::Function | Kind::Wrapper | Kind::Method | Kind::Cell => depth,
            Kind::Dict | Kind::List | Kind::Tuple | Kind::Type | Kind::Instance(_) => depth + 1,
        };
        if depth > self.depth || self.seen.len() >= self.limit {
            self.cut = true;
            return;
        }
        self.seen.insert(object);
        let near = matches!(
            kind,
            Kind::Function | Kind::Wrapper | Kind::Method | Kind::Cell
        );
        let queue = if near { &mut self.near } else { &mut self.far };
        queue.push_back((object, depth));
    }

    /// Whether the bound on references has been reached.
    fn cut_off(&mut self) -> bool {
        if self.references >= MAX_REFERENCES {
            self.cut = true;
            return true;
        }
        false
    }

    /// The next object; what it refers to is queued.
    pub(super) fn next(&mut self) -> Option<UserAddr> {
        let (object, depth) = self.near.pop_front().or_else(|| self.far.pop_front())?;
        // An object that cannot be read refers to nothing.
        if let Ok(children) = self.children(object) {
            for child in children {
                self.push(child, depth);
            }
        }
        Some(object)
    }

    /// How many objects it has come to.
    pub(super) fn reached(&self) -> usize {
        self.seen.len()
    }

    /// Whether a bound kept it from some objects.
    pub(super) const fn is_cut(&self) -> bool {
        self.cut
    }

    fn kind(&mut self, type_: UserAddr) -> Result<Kind> {
        if let Some(kind) = self.kinds.get(&type_) {
            return Ok(kind.clone());
        }
        let kind = self.classify(type_)?;
        self.kinds.insert(type_, kind.clone());
        Ok(kind)
    }

    fn classify(&self, type_: UserAddr) -> Result<Kind> {
        const LEAVES: u64 =
            type_flags::LONG | type_flags::STR | type_flags::BYTES | type_flags::EXCEPTION;
        let heap = &self.heap;
        let types = heap.types;
        let exact = [
            (types.function, Kind::Function),
            (types.method, Kind::Method),
            (types.cell, Kind::Cell),
            (types.staticmethod, Kind::Wrapper),
            (types.classmethod, Kind::Wrapper),
            (types.property, Kind::Wrapper),
        ];
        if let Some((_, kind)) = exact.into_iter().find(|(known, _)| *known == type_) {
            return Ok(kind);
        }
        let info = heap.type_info(type_)?;
        if info.flags & LEAVES != 0 {
            return Ok(Kind::Leaf);
        }
        if info.has(type_flags::TYPE) {
            return Ok(Kind::Type);
        }
        let bases = self.bases(type_)?;
        if bases.contains(&types.module) {
            return Ok(Kind::Leaf);
        }
        let wrappers = [types.staticmethod, types.classmethod, types.property];
        if wrappers.iter().any(|wrapper| bases.contains(wrapper))
            || heap.type_name(type_)? == "functools.partial"
        {
            return Ok(Kind::Wrapper);
        }
        for (flag, kind) in [
            (type_flags::DICT, Kind::Dict),
            (type_flags::LIST, Kind::List),
            (type_flags::TUPLE, Kind::Tuple),
        ] {
            if info.has(flag) {
                return Ok(kind);
            }
        }
        let slots = self.slots(&info)?;
        if info.dictoffset == 0 && !info.has(type_flags::MANAGED_DICT) && slots.is_empty() {
            return Ok(Kind::Leaf);
        }
        Ok(Kind::Instance(Box::new((info, slots))))
    }

    fn bases(&self, type_: UserAddr) -> Result<Vec<UserAddr>> {
        let mut bases = Vec::new();
        let mut class = type_;
        while !class.is_null() && bases.len() < 32 {
            bases.push(class);
            class = self
                .heap
                .mem
                .read_ptr(class.offset(self.heap.layout.type_.base))?;
        }
        Ok(bases)
    }

    /// Where instances of a heap type keep the objects of `__slots__`.
    fn slots(&self, info: &TypeInfo) -> Result<Vec<u64>> {
        let mut slots = Vec::new();
        if !info.has(type_flags::HEAPTYPE) {
            return Ok(slots);
        }
        for class in self.heap.mro(info)? {
            let class = self.heap.type_info(class)?;
            if class.dict.is_null() || !class.has(type_flags::HEAPTYPE) {
                continue;
            }
            self.heap.dict_walk(class.dict, |_, value| {
                if let Ok(Some(offset)) = self.heap.slot_offset(value, info)
                    && !slots.contains(&offset)
                {
                    slots.push(offset);
                }
                ControlFlow::<()>::Continue(())
            })?;
        }
        Ok(slots)
    }

    fn children(&mut self, object: UserAddr) -> Result<Vec<UserAddr>> {
        let heap = self.heap;
        let type_ = heap.mem.read_ptr(object.offset(OB_TYPE))?;
        let values = |dict: UserAddr| -> Result<Vec<UserAddr>> {
            Ok(heap
                .dict(dict)?
                .into_iter()
                .map(|(_, value)| value)
                .collect())
        };
        let kind = self.kind(type_)?;
        Ok(match &kind {
            Kind::Leaf => Vec::new(),
            Kind::Function => {
                let function = heap.function(object)?;
                let mut children = Vec::new();
                if !function.dict.is_null() {
                    children.extend(values(function.dict)?);
                }
                if !function.closure.is_null() {
                    children.extend(heap.tuple(function.closure)?);
                }
                if !function.defaults.is_null() {
                    children.extend(heap.tuple(function.defaults)?);
                }
                if !function.kwdefaults.is_null() {
                    children.extend(values(function.kwdefaults)?);
                }
                children
            }
            Kind::Wrapper => {
                let mut children: Vec<_> = heap.wrapped(object)?.into_iter().collect();
                // Wrappers may have a dict, and from 3.10 on it holds `__wrapped__`: the same function.
                let info = heap.type_info(type_)?;
                children.extend(
                    heap.instance_dict(object, &info)?
                        .into_iter()
                        .map(|(_, value)| value),
                );
                children
            }
            Kind::Method => {
                let l = &heap.layout.small;
                vec![
                    heap.mem.read_ptr(object.offset(l.method_func))?,
                    heap.mem.read_ptr(object.offset(l.method_self))?,
                ]
            }
            Kind::Cell => heap.cell(object)?.into_iter().collect(),
            Kind::Dict => values(object)?,
            Kind::List => heap.list(object)?,
            Kind::Tuple => heap.tuple(object)?,
            // One level: the functions of a class, and not what else it holds.
            Kind::Type => {
                let info = heap.type_info(object)?;
                if info.dict.is_null() {
                    return Ok(Vec::new());
                }
                let mut children = Vec::new();
                for value in values(info.dict)? {
                    let Ok(type_) = heap.type_of(value) else {
                        continue;
                    };
                    if matches!(self.kind(type_), Ok(Kind::Function | Kind::Wrapper)) {
                        children.push(value);
                    }
                }
                children
            }
            Kind::Instance(instance) => {
                let (info, slots) = &**instance;
                let mut children: Vec<_> = heap
                    .instance_dict(object, info)?
                    .into_iter()
                    .map(|(_, value)| value)
                    .collect();
                for &offset in slots {
                    children.push(heap.mem.read_ptr(object.offset(offset))?);
                }
                children
            }
        })
    }
}
