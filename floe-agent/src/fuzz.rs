//! What reads input that others make, as functions of bytes: processes, files, configuration, the kernel.
//!
//! None of it may panic, hang, or take memory without bound, whatever the bytes are. The unit tests below try some of them
//! (`PROPTEST_CASES=N`: more), libFuzzer as many as it has time for (`cargo xtask fuzz`, and the crate in `fuzz/`).

use std::ffi::OsString;
use std::io::Write as _;
use std::os::fd::AsRawFd as _;
use std::os::unix::ffi::OsStringExt as _;
use std::path::PathBuf;

use rustix::fs::{MemfdFlags, memfd_create};

use crate::catalogue::{Catalogue, notation, path::Path as CapturePath, template::Template, version::VersionRange};
use crate::config::{Config, Settings, Sources};
use crate::export::redact_text;
use crate::kernel::decode;
use crate::node::{program, settings::NodeSettings};
use crate::process::{container::Container, identity, maps, run_id};
use crate::python::elf::ElfFile;
use crate::python::exception;
use crate::python::gate;
use crate::python::identify::{Interpreter, InterpreterFile};
use crate::python::layout::PyLayout;
use crate::python::memory::{Memory, MemoryError};
use crate::python::objects::{CoreTypes, Heap};
use crate::python::resolve::Resolver;
use crate::units::UserAddr;

/// A file with these bytes and a path that leads to it.
fn with_file(bytes: &[u8], read: impl FnOnce(PathBuf)) {
    let Ok(file) = memfd_create("fuzz", MemfdFlags::CLOEXEC) else { return };
    let mut file = std::fs::File::from(file);
    if file.write_all(bytes).is_ok() {
        read(PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd())));
    }
}

/// An executable or library. If it could hold an interpreter, also the memory of a process of it, for which the same bytes stand.
pub fn elf(bytes: &[u8]) {
    with_file(bytes, |path| {
        if let Ok(elf) = ElfFile::read(&path, &["main", "_PyRuntime"]) {
            let _ = elf.methods("setrecursionlimit", 8);
            for segment in elf.segments() {
                let mut text = [0; 64];
                let _ = (elf.read_at(segment.addr, &mut text), elf.file_offset(segment.addr));
                let _ = elf.load_bias(segment.addr.0, segment.offset, segment.executable);
                let _ = gate::offset_in_file(&elf, segment.addr);
                let _ = gate::entry_in_code(&elf, segment.addr, 144);
            }
        }
        if let Ok(file) = InterpreterFile::read(&path) {
            let _ = (file.gate_offset(), file.stack_functions(), file.run_main(), file.takes_gil());
            let memory = Image(bytes);
            let _ = file.meeting_points(&memory, 0);
            if let Ok(interpreter) = Interpreter::verify(&memory, &file, 0) {
                let _ = interpreter.gate(&memory, &file);
            }
        }
    });
    let _ = gate::choose(bytes);
}

/// Bytes that are the whole memory: every address leads into them, but for those that no process has.
struct Image<'a>(&'a [u8]);

/// Where an image's objects are, 64 bytes apart.
const BASE: u64 = 0x10_0000;

impl Memory for Image<'_> {
    fn read(&self, addr: UserAddr, buf: &mut [u8]) -> Result<(), MemoryError> {
        if addr.0 < 4096 || addr.0 >> 47 != 0 || self.0.is_empty() {
            return Err(MemoryError::Unmapped { addr, len: buf.len() });
        }
        let mut at = (addr.0 - 4096) as usize % self.0.len();
        for byte in buf {
            *byte = self.0[at];
            at = if at + 1 == self.0.len() { 0 } else { at + 1 };
        }
        Ok(())
    }
}

/// The types of an image.
fn types() -> CoreTypes {
    let mut next = BASE;
    let types = CoreTypes::look_up(|_| {
        next += 64;
        Some(UserAddr(next))
    });
    types.unwrap_or_default()
}

/// Words of memory, written so that what is likely to matter is near: small numbers, places in the image, lengths, anything.
fn words(mut bytes: &[u8]) -> Vec<u8> {
    let mut memory = Vec::new();
    while let Some((&[kind, low, high], rest)) = bytes.split_first_chunk() {
        bytes = rest;
        let n = u64::from(u16::from_le_bytes([low, high]));
        let word = match kind % 8 {
            0 | 1 => n % 24,
            2..=4 => BASE + n % 24 * 64,
            5 => BASE + n % 4096,
            6 => (1_u64 << (n % 64)).wrapping_sub(n >> 15),
            _ => match bytes.split_first_chunk() {
                Some((word, rest)) => {
                    bytes = rest;
                    u64::from_le_bytes(*word)
                }
                None => u64::MAX,
            },
        };
        memory.extend(word.to_le_bytes());
    }
    memory
}

/// The memory of a process: a byte chooses the layout, the rest are the [`words`] that every address leads to.
pub fn objects(bytes: &[u8]) {
    let Some((&which, memory)) = bytes.split_first() else { return };
    let layouts = PyLayout::all();
    let memory = words(memory);
    let (memory, types) = (Image(&memory), types());
    let heap = Heap::new(&memory, &layouts[usize::from(which) % layouts.len()], &types);
    for object in (0..4).map(|n| UserAddr(BASE + n * 64)) {
        let _ = (heap.name(object), heap.int(object), heap.float(object), heap.bytes(object, 100));
        let _ = (heap.text(object, 100), heap.tuple(object), heap.list(object), heap.dict(object));
        let _ = (heap.dict_get(object, "a"), heap.module_dict(object), heap.module_name(object), heap.cell(object));
        let _ = (heap.function(object), heap.code(object), heap.nested_code(object), heap.code_place(object));
        let _ = (heap.code_lines(object, 100), heap.wrapped(object), heap.subclasses(object));
        if let Ok(info) = heap.type_info(object) {
            let _ = (heap.mro(&info), heap.instance_dict(object, &info), heap.slot_offset(object, &info));
        }
        let _ = (heap.instance_attribute(object, "a"), heap.type_lookup(object, "a"));
    }
    let _ = exception::raised(&heap, UserAddr(BASE));
    let _ = exception::passed(&heap, UserAddr(BASE));
    let resolver = Resolver::new(heap, UserAddr(BASE));
    let _ = resolver.module_names();
    for name in ["a", "a.b", "a.<locals>.b"] {
        let _ = resolver.resolve("a", name, &[]);
    }
    let _ = (resolver.implementations("a", "b.c"), resolver.context_manager("a", "b"));
    let _ = (
        resolver.find_method_def("a", "b"),
        resolver.capsule_pointer("a", "b"),
        resolver.module_attribute_str("a", "b"),
    );
}

/// What `/proc` says of a process that chose its own words.
pub fn process(bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    let words: Vec<OsString> = bytes.split(|&byte| byte == 0).map(|word| OsString::from_vec(word.to_vec())).collect();
    let environ = identity::Environ::from_bytes(bytes.to_vec());
    let known = run_id::Words {
        arguments: &words,
        environ: &environ,
        pod_run: &|| Some(text.clone().into_owned()),
        read: &|_| Some(bytes.to_vec()),
    };
    let _ = run_id::find(&run_id::RunSources::default(), &known);
    let _ = (run_id::parse_traceparent(&text, Some(&text)), run_id::run_id_in(bytes));
    let _ = (identity::Stat::parse(bytes, 100), identity::Status::parse(&text));
    let _ = (maps::parse(bytes), Container::parse(&text), program::Program::parse(&words));
    let _ = (program::imports_of(&text), redact_text(&text));
}

/// A pack, and the notations in it.
pub fn pack(bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes).into_owned();
    let _ = (notation::parse(&text), CapturePath::parse(&text), Template::parse(&text));
    if let Ok(range) = VersionRange::parse(&text) {
        let _ = range.contains(&text);
    }
    let _ = Catalogue::from_texts(&[("fuzz.yaml".to_owned(), text)], &[]);
}

/// The agent's configuration, a floe manifest, the node agent's.
pub fn configuration(bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    let _ = NodeSettings::parse(&text);
    with_file(bytes, |path| {
        for sources in [
            Sources { file: Some(path.clone()), ..Sources::default() },
            Sources { manifest: Some(path), ..Sources::default() },
            Sources { set: text.lines().map(str::to_owned).collect(), ..Sources::default() },
        ] {
            if let Ok(settings) = Settings::load(&sources, &|_| None) {
                let _ = Config::new(&settings);
            }
        }
    });
}

/// Records of the kernel.
pub fn events(bytes: &[u8]) {
    let _ = (decode::decode(bytes), decode::decode_urgent(bytes));
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// These texts, with bytes replaced, left out and doubled.
    fn damaged(texts: Vec<Vec<u8>>) -> impl Strategy<Value = Vec<u8>> {
        let damage = (any::<prop::sample::Index>(), any::<u8>(), 0..4_u8);
        (prop::sample::select(texts), prop::collection::vec(damage, 0..12)).prop_map(|(mut bytes, damages)| {
            for (at, byte, kind) in damages {
                if bytes.is_empty() {
                    break;
                }
                let at = at.index(bytes.len());
                match kind {
                    0 => bytes[at] = byte,
                    1 => drop(bytes.remove(at)),
                    2 => {
                        let end = bytes.len().min(at + usize::from(byte));
                        bytes.extend_from_within(at..end);
                    }
                    _ => bytes.truncate(bytes.len() - at / 8),
                }
            }
            bytes
        })
    }

    /// What libFuzzer begins with, too.
    fn seeds(target: &str) -> Vec<Vec<u8>> {
        let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/seeds").join(target);
        let read = |entry: std::io::Result<std::fs::DirEntry>| std::fs::read(entry.expect("readable").path());
        std::fs::read_dir(folder).expect("there are seeds").map(|entry| read(entry).expect("readable")).collect()
    }

    fn record() -> impl Strategy<Value = Vec<u8>> {
        (0..8_u32, prop::collection::vec(prop_oneof![0..32_u32, any::<u32>()], 0..200)).prop_map(|(kind, words)| {
            let mut bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
            let at = std::mem::offset_of!(floe_ebpf::Header, kind);
            if let Some(place) = bytes.get_mut(at..at + 4) {
                place.copy_from_slice(&kind.to_le_bytes());
            }
            bytes
        })
    }

    fn program() -> Vec<u8> {
        let path = ["/usr/bin/true", "/bin/sh"].into_iter().find(|path| std::fs::exists(path).unwrap_or(false));
        std::fs::read(path.expect("there is a shell")).expect("it can be read")
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn no_executable_makes_the_agent_panic(
            damages in prop::collection::vec((0..4096_usize, any::<u8>()), 0..16), at in any::<prop::sample::Index>(), byte: u8,
        ) {
            let mut bytes = program();
            for (at, byte) in damages {
                bytes[at] = byte;
            }
            let at = at.index(bytes.len());
            bytes[at] = byte;
            elf(&bytes);
        }

        #[test]
        fn no_memory_of_a_process_makes_the_agent_panic(bytes in prop::collection::vec(any::<u8>(), 1..800)) {
            objects(&bytes);
        }

        #[test]
        fn no_words_of_a_process_make_the_agent_panic(bytes in damaged(seeds("process"))) {
            process(&bytes);
        }

        #[test]
        fn no_pack_makes_the_agent_panic(bytes in damaged(
            crate::catalogue::EMBEDDED.iter().map(|(_, text)| text.as_bytes().to_vec()).chain(seeds("pack")).collect()
        )) {
            pack(&bytes);
        }

        #[test]
        fn no_configuration_makes_the_agent_panic(bytes in damaged(seeds("configuration"))) {
            configuration(&bytes);
        }

        #[test]
        fn no_record_makes_the_agent_panic(bytes in record()) {
            events(&bytes);
        }
    }
}
