//! Views of made-up objects, honest and lying ones, in every layout.

use super::*;
use crate::python::layout::{InstanceStyle, KeysStyle, OB_SIZE, OBJECT_HEADER};
use crate::python::memory::SavedMemory;

/// Builds objects of one layout.
struct Builder {
    mem: SavedMemory,
    layout: &'static PyLayout,
    types: CoreTypes,
    next: u64,
}

const DICT: UserAddr = UserAddr(0x2000);
const TUPLE: UserAddr = UserAddr(0x3000);
const INT: UserAddr = UserAddr(0x4000);
const CLASS: UserAddr = UserAddr(0x5000);

impl Builder {
    fn new(layout: &'static PyLayout) -> Self {
        let mut types = CoreTypes { str: UserAddr(0x1000), ..CoreTypes::default() };
        types.code = UserAddr(0x6000);
        types.module = UserAddr(0x7000);
        let mut this = Self { mem: SavedMemory::new(), layout, types, next: 0x10_0000 };
        for (addr, flags) in [
            (types.str, type_flags::STR),
            (DICT, type_flags::DICT),
            (TUPLE, type_flags::TUPLE),
            (INT, type_flags::LONG),
            (CLASS, type_flags::HEAPTYPE | type_flags::MANAGED_DICT | type_flags::INLINE_VALUES),
            (types.code, 0),
            (types.module, 0),
        ] {
            this.mem.insert(addr, vec![0; 0x400]);
            this.set(addr, layout.type_.flags, flags);
        }
        this.set(CLASS, layout.type_.basicsize, 16);
        this
    }

    fn heap(&self) -> Heap<'_> {
        Heap::new(&self.mem, self.layout, &self.types)
    }

    fn set(&mut self, addr: UserAddr, offset: u64, value: u64) {
        self.mem.write(addr.offset(offset), &value.to_le_bytes()).unwrap();
    }

    fn block(&mut self, size: usize) -> UserAddr {
        let addr = UserAddr(self.next);
        self.next += 0x1_0000;
        self.mem.insert(addr, vec![0; size]);
        addr
    }

    fn object(&mut self, type_: UserAddr, size: usize) -> UserAddr {
        let addr = self.block(size);
        self.set(addr, OB_TYPE, type_.0);
        addr
    }

    fn text(&mut self, text: &str) -> UserAddr {
        let l = self.layout.str;
        let addr = self.object(self.types.str, l.ascii_data as usize + text.len() + 1);
        self.set(addr, l.length, text.len() as u64);
        self.mem.write(addr.offset(l.state), &[0x64, 0, 0, 0]).unwrap();
        self.mem.write(addr.offset(l.ascii_data), text.as_bytes()).unwrap();
        addr
    }

    /// A keys object; `None` for entries without the hash, of str keys.
    fn keys(&mut self, entries: &[(UserAddr, UserAddr)], general: bool) -> UserAddr {
        let l = self.layout.dict;
        let addr = self.block(0x1000);
        self.set(addr, l.nentries, entries.len() as u64);
        let indices = match l.style {
            KeysStyle::Size { size } => {
                self.set(addr, size, 0x100);
                0x200
            }
            KeysStyle::Log2 { log2_index_bytes, kind } => {
                self.mem.write(addr.offset(log2_index_bytes), &[4]).unwrap();
                self.mem.write(addr.offset(kind), &[u8::from(!general)]).unwrap();
                16
            }
        };
        let general = general || matches!(l.style, KeysStyle::Size { .. });
        for (i, (key, value)) in entries.iter().enumerate() {
            let (stride, first) = if general { (24, 8) } else { (16, 0) };
            let at = l.indices + indices + stride * i as u64 + first;
            self.set(addr, at, key.0);
            self.set(addr, at + 8, value.0);
        }
        addr
    }

    fn dict(&mut self, keys: UserAddr) -> UserAddr {
        let addr = self.object(DICT, 48);
        self.set(addr, self.layout.dict.keys, keys.0);
        addr
    }
}

#[test]
fn texts_dicts_and_tuples_are_read_in_every_layout() {
    for layout in PyLayout::all() {
        let mut b = Builder::new(layout);
        let (one, two) = (b.text("one"), b.text("two"));
        assert_eq!(b.heap().name(one).unwrap(), "one", "{}", layout.version);
        assert!(b.heap().str_is(two, "two") && !b.heap().str_is(two, "tw") && !b.heap().str_is(two, "twos"));
        for general in [false, true] {
            let keys = b.keys(&[(one, two), (UserAddr(0), one), (two, one)], general);
            let dict = b.dict(keys);
            assert_eq!(b.heap().dict(dict).unwrap(), [(one, two), (two, one)], "{}", layout.version);
            assert_eq!(b.heap().dict_get(dict, "two").unwrap(), Some(one));
            assert_eq!(b.heap().dict_get(dict, "one").unwrap(), Some(two));
            assert_eq!(b.heap().dict_get(dict, "three").unwrap(), None);
        }
        let tuple = b.object(TUPLE, 64);
        b.set(tuple, OB_SIZE, 2);
        b.set(tuple, layout.small.tuple_items, one.0);
        b.set(tuple, layout.small.tuple_items + 8, two.0);
        assert_eq!(b.heap().tuple(tuple).unwrap(), [one, two], "{}", layout.version);
    }
}

#[test]
fn what_a_process_lies_about_is_an_error() {
    for layout in PyLayout::all() {
        let mut b = Builder::new(layout);
        let text = b.text("text");
        for lie in [0xffff, u64::MAX, 1 << 63, 1 << 40] {
            b.set(text, layout.str.length, lie);
            assert!(b.heap().name(text).is_err());
            assert!(!b.heap().str_is(text, "text"));
            let tuple = b.object(TUPLE, 64);
            b.set(tuple, OB_SIZE, lie);
            assert!(b.heap().tuple(tuple).is_err());
            let int = b.object(INT, 64);
            b.set(int, OB_SIZE, lie >> 1);
            assert!(b.heap().int(int).is_err());
            let keys = b.keys(&[], false);
            b.set(keys, layout.dict.nentries, lie);
            let dict = b.dict(keys);
            assert!(b.heap().dict(dict).is_err());
        }
        let keys = b.keys(&[(text, text)], false);
        let dict = b.dict(keys);
        match layout.dict.style {
            KeysStyle::Size { size } => b.set(keys, size, u64::MAX),
            KeysStyle::Log2 { log2_index_bytes, .. } => {
                b.mem.write(keys.offset(log2_index_bytes), &[255]).unwrap();
            }
        }
        assert_eq!(b.heap().dict(dict), Err(ObjectError::Odd { what: "dict", addr: dict }));
    }
}

#[test]
fn a_class_that_is_its_own_base_ends() {
    let mut b = Builder::new(&PyLayout::all()[4]);
    b.set(CLASS, b.layout.type_.base, CLASS.0);
    let object = b.object(CLASS, 64);
    assert_eq!(b.heap().is_instance(object, b.types.module), Ok(false));
    assert!(b.heap().module_dict(object).is_err());
    // Nor does one whose resolution order is itself, or an object that is its own type.
    b.set(CLASS, b.layout.type_.mro, CLASS.0);
    assert!(b.heap().type_lookup(CLASS, "x").is_err());
    b.set(object, OB_TYPE, object.0);
    assert!(b.heap().name(object).is_err());
}

#[test]
fn values_never_go_beyond_the_room_for_them() {
    // 3.13: the header of the values says how many there is room for; the keys may have more entries by now.
    let layout = PyLayout::all().iter().find(|l| l.instance == InstanceStyle::InlineHeader).unwrap();
    let mut b = Builder::new(layout);
    let names: Vec<_> = (0..3).map(|i| b.text(&format!("name{i}"))).collect();
    let keys = b.keys(&names.iter().map(|&name| (name, UserAddr(0))).collect::<Vec<_>>(), false);
    b.set(CLASS, layout.type_.cached_keys, keys.0);
    let block = b.block(32 + 16 + 8 + 16);
    let object = block.offset(32);
    b.set(object, OB_TYPE, CLASS.0);
    // capacity 2, size 2, embedded, valid
    b.mem.write(object.offset(OBJECT_HEADER), &[2, 2, 1, 1]).unwrap();
    b.set(object, OBJECT_HEADER + 8, names[0].0);
    b.set(object, OBJECT_HEADER + 16, names[1].0);
    assert_eq!(b.heap().instance_attribute(object, "name1").unwrap(), Some(names[1]));
    let info = b.heap().type_info(CLASS).unwrap();
    assert_eq!(b.heap().instance_dict(object, &info).unwrap().len(), 2);
    // Not valid: the dict counts, and there is none.
    b.mem.write(object.offset(OBJECT_HEADER + 3), &[0]).unwrap();
    assert_eq!(b.heap().instance_dict(object, &info).unwrap(), []);
}
