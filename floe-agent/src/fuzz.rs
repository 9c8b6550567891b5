//! What reads input that others make, as functions of bytes: processes, files, configuration, the kernel.
//!
//! None of it may panic, hang, or take memory without bound, whatever the bytes are. `PROPTEST_CASES=N` tries more of them than the
//! unit tests do.

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
use crate::python::identify::InterpreterFile;
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

/// An executable or library.
fn elf(bytes: &[u8]) {
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

/// The memory of a process: a byte chooses the layout, the rest is what every address leads to.
fn objects(bytes: &[u8]) {
    let Some((&which, memory)) = bytes.split_first() else { return };
    let layouts = PyLayout::all();
    let (memory, types) = (Image(memory), types());
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
fn process(bytes: &[u8]) {
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
fn pack(bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes).into_owned();
    let _ = (notation::parse(&text), CapturePath::parse(&text), Template::parse(&text));
    if let Ok(range) = VersionRange::parse(&text) {
        let _ = range.contains(&text);
    }
    let _ = Catalogue::from_texts(&[("fuzz.yaml".to_owned(), text)], &[]);
}

/// The agent's configuration, a floe manifest, the node agent's.
fn configuration(bytes: &[u8]) {
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
fn events(bytes: &[u8]) {
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

    fn texts(texts: &[&str]) -> Vec<Vec<u8>> {
        texts.iter().map(|text| text.as_bytes().to_vec()).collect()
    }

    /// A word of memory: a small number, a place in the image, a length, anything.
    fn word() -> impl Strategy<Value = u64> {
        prop_oneof![
            4 => 0..24_u64,
            6 => (0..24_u64).prop_map(|n| BASE + n * 64),
            2 => (0..4096_u64).prop_map(|n| BASE + n),
            1 => (0..64_u32).prop_map(|n| 1 << n),
            1 => Just(u64::MAX),
            1 => any::<u64>(),
        ]
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
        fn no_memory_of_a_process_makes_the_agent_panic(which: u8, words in prop::collection::vec(word(), 1..200)) {
            let mut bytes = vec![which];
            bytes.extend(words.iter().flat_map(|word| word.to_le_bytes()));
            objects(&bytes);
        }

        #[test]
        fn no_words_of_a_process_make_the_agent_panic(bytes in damaged(texts(&[
            "python\0-m\0dbt\0run\0TRACEPARENT=00-0123456789abcdef0123456789abcdef-0123456789abcdef-01\0TRACESTATE=a=b\0",
            "dagster\0api\0execute_step\0{\"pipeline_run_id\":\"6ba7b810-9dad-11d1-80b4-00c04fd430c8\"}\0",
            "DAGSTER_PIPES_CONTEXT=eJxLrVCwBAAEAAGd\0DAGSTER_PIPES_MESSAGES=x\0HOSTNAME=dagster-run-1-2\0FLOE_RUN_ID=x\0",
            "42 (a) b (c) S 7 42 42 0 -1 4194304 1 2 3 4 5 6 7 8 20 0 1 0 12345 1000 10",
            "Name:\tx\nPid:\t77\nTracerPid:\t9\nUid:\t0\t1000\t0\t0\nNSpid:\t77\t1\nSeccomp:\t2\nx86_Thread_features:\tshstk\n",
            "1000-2000 r-xp 00000000 08:01 11 /usr/lib/python3.so\n7f00-7fff rw-p 0 00:00 0 [heap]\n",
            "0::/kubepods/burstable/pod12345678-1234-1234-1234-123456789abc/0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef\n",
            "from dbt.cli import main, x\nimport a.b as c, d; from . import e\n",
            "postgres://user:secret@host/db?password=x --token abc Authorization: Bearer abc",
        ]))) {
            process(&bytes);
        }

        #[test]
        fn no_pack_makes_the_agent_panic(bytes in damaged(
            crate::catalogue::EMBEDDED.iter().map(|(_, text)| text.as_bytes().to_vec()).chain(texts(&[
                "shop:Cart.add(item=arg(1, 'name'), count=return['a'][0].b)", "arg0.x[*].y", "{a} of {b|c}", ">=1.8,<1.13",
            ])).collect()
        )) {
            pack(&bytes);
        }

        #[test]
        fn no_configuration_makes_the_agent_panic(bytes in damaged(texts(&[
            "discovery: {instrument: [{modules: [dbt], user: 'a*', container: true}]}\nbudget: {cpu_percent: 5}\n",
            "outputs: [console, spans.jsonl]\notlp:\n  endpoint: http://localhost:4317\n  headers: {a: b}\nsampling: {ratio: 0.5}\n",
            "observability:\n  telemetry:\n    enabled: true\n    otlp_endpoint: http://x:4317\n    sampling: {dev: 1.0}\n",
            "profile=jaeger\nqueue.spans=10\nqueue.delay=5s\nresource.attributes.a=b\n",
        ]))) {
            configuration(&bytes);
        }

        #[test]
        fn no_record_makes_the_agent_panic(bytes in record()) {
            events(&bytes);
        }
    }
}
