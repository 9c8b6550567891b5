//! Every real interpreter that is found is read from outside, and what was read is compared with what it says itself.
//!
//! Interpreters: `~/.pyenv/versions/*/bin/python`, `/usr/bin/python3.*`, and those in `FLOE_EXTRA_PYTHON` (paths separated
//! by colons). Without the right to read another process's memory the tests skip, and say so; with `FLOE_REQUIRE_BPF=1`
//! they fail instead.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::Arc;

use floe_agent::python::arm::{Armed, Armer, StackFacts, clear_eval_frame, set_eval_frame};
use floe_agent::python::identify::{Interpreter, InterpreterFile, Located, Refusal, locate};
use floe_agent::python::memory::{CachedMemory, Memory, ProcessMemory};
use floe_agent::python::objects::Heap;
use floe_agent::python::resolve::{FunctionKind, ResolveError, Resolver};
use floe_agent::units::{Pid, UserAddr};
use serde_json::Value;

/// All interpreters that are installed, by path.
fn interpreters() -> Vec<PathBuf> {
    let mut found = Vec::new();
    let home = std::env::var("HOME").unwrap_or_default();
    if let Ok(versions) = std::fs::read_dir(Path::new(&home).join(".pyenv/versions")) {
        found.extend(versions.filter_map(Result::ok).map(|entry| entry.path().join("bin/python")));
    }
    for minor in 6..=20 {
        found.push(format!("/usr/bin/python3.{minor}").into());
    }
    if let Ok(extra) = std::env::var("FLOE_EXTRA_PYTHON") {
        found.extend(extra.split(':').filter(|path| !path.is_empty()).map(PathBuf::from));
    }
    found.retain(|path| path.exists());
    found.sort();
    found
}

fn version_of(python: &Path) -> (u32, u32) {
    let output =
        Command::new(python).args(["-c", "import sys; print('%d %d' % sys.version_info[:2])"]).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let (major, minor) = text.trim().split_once(' ').unwrap();
    (major.parse().unwrap(), minor.parse().unwrap())
}

fn supported() -> Vec<PathBuf> {
    interpreters().into_iter().filter(|python| ((3, 8)..=(3, 14)).contains(&version_of(python))).collect()
}

/// A Python process that answers expressions.
struct Target {
    child: Child,
    stdin: ChildStdin,
    stdout: BufReader<ChildStdout>,
    name: String,
}

impl Target {
    fn start(python: &Path) -> Self {
        let driver = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/python_fixture/driver.py");
        let mut child = Command::new(python)
            .arg(driver)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap_or_else(|error| panic!("{}: {error}", python.display()));
        let stdin = child.stdin.take().unwrap();
        let stdout = BufReader::new(child.stdout.take().unwrap());
        let mut target = Self { child, stdin, stdout, name: python.display().to_string() };
        let ready = target.line();
        assert_eq!(ready["ready"], u64::from(target.pid().0), "{}", target.name);
        target
    }

    fn pid(&self) -> Pid {
        Pid(self.child.id())
    }

    fn line(&mut self) -> Value {
        let mut line = String::new();
        self.stdout.read_line(&mut line).unwrap();
        assert!(!line.is_empty(), "{} ended", self.name);
        serde_json::from_str(&line).unwrap()
    }

    /// The value of an expression in the target.
    fn ask(&mut self, expression: &str) -> Value {
        writeln!(self.stdin, "{expression}").unwrap();
        let mut answer = self.line();
        assert!(answer.get("ok").is_some(), "{}: {expression}: {answer}", self.name);
        answer["ok"].take()
    }

    fn addr(&mut self, expression: &str) -> UserAddr {
        UserAddr(self.ask(&format!("id({expression})")).as_u64().unwrap())
    }

    fn addrs(&mut self, expression: &str) -> Vec<UserAddr> {
        let answer = self.ask(&format!("[id(x) for x in {expression}]"));
        answer.as_array().unwrap().iter().map(|id| UserAddr(id.as_u64().unwrap())).collect()
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A target and what was found out about it.
struct Subject {
    target: Target,
    located: Located,
    interpreter: Interpreter,
    mem: ProcessMemory,
}

impl Subject {
    /// `None` if this machine does not allow it.
    fn start(python: &Path) -> Option<Self> {
        let target = Target::start(python);
        let located = match locate(target.pid(), &[]) {
            Ok(located) => located,
            Err(refusal @ Refusal::Denied { .. }) => {
                assert_ne!(
                    std::env::var("FLOE_REQUIRE_BPF").as_deref(),
                    Ok("1"),
                    "{}: {refusal}, and FLOE_REQUIRE_BPF=1 forbids skipping",
                    target.name
                );
                eprintln!("SKIPPED {}: {refusal}", target.name);
                return None;
            }
            Err(refusal) => panic!("{}: {refusal}", target.name),
        };
        let mem = ProcessMemory::new(target.pid());
        let interpreter = Interpreter::verify(&mem, &located.file, located.bias)
            .unwrap_or_else(|refusal| panic!("{}: {refusal}", target.name));
        Some(Self { target, located, interpreter, mem })
    }

    fn heap(&self) -> Heap<'_> {
        self.interpreter.heap(&self.mem)
    }

    fn resolver(&self) -> Resolver<'_> {
        let modules = self.interpreter.modules(&self.mem, self.interpreter.main).unwrap();
        Resolver::new(self.heap(), modules)
    }
}

fn each(mut test: impl FnMut(Subject)) {
    let all = supported();
    if all.is_empty() {
        assert_ne!(std::env::var("FLOE_REQUIRE_BPF").as_deref(), Ok("1"), "no supported Python is installed");
        eprintln!("SKIPPED: no supported Python is installed");
    }
    for python in all {
        if let Some(subject) = Subject::start(&python) {
            test(subject);
        }
    }
}

#[test]
fn every_supported_interpreter_is_identified_and_has_a_gate() {
    each(|mut subject| {
        let name = subject.target.name.clone();
        let version = subject.target.ask("'%d.%d.%d' % sys.version_info[:3]");
        assert_eq!(version, subject.interpreter.version(), "{name}");
        let gate = subject.interpreter.gate(&subject.mem, &subject.located.file);
        let gate = gate.unwrap_or_else(|refusal| panic!("{name}: {refusal}"));
        assert!(gate.gate < gate.entry && gate.entry.0 - gate.gate.0 <= 16, "{name}: {gate:?}");
        eprintln!(
            "{name}: CPython {version}, {}, gate at entry - {}",
            subject.located.name.display(),
            gate.entry.0 - gate.gate.0
        );
        // The same file is not read twice, and is found by its identity.
        let known = [Arc::clone(&subject.located.file)];
        let again = locate(subject.target.pid(), &known).unwrap();
        assert!(Arc::ptr_eq(&again.file, &known[0]), "{name}");
        assert_eq!(again.bias, subject.located.bias);
        // What the eBPF programs need.
        let kernel = subject.interpreter.kernel;
        assert_eq!(kernel.none, subject.target.addr("None"), "{name}");
        assert_eq!(kernel.float_type, subject.target.addr("float"), "{name}");
        assert_eq!(kernel.bool_type, subject.target.addr("bool"), "{name}");
        assert!(subject.located.file.run_main().is_some(), "{name}");
    });
}

#[test]
fn unsupported_versions_are_refused_with_their_version() {
    for python in interpreters() {
        let version = version_of(&python);
        if ((3, 8)..=(3, 14)).contains(&version) {
            continue;
        }
        let mut child = Command::new(&python)
            .args(["-c", "import sys; sys.stdout.write('x\\n'); sys.stdout.flush(); sys.stdin.readline()"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let refusal = locate(Pid(child.id()), &[]).unwrap_err();
        child.kill().unwrap();
        child.wait().unwrap();
        if matches!(refusal, Refusal::Denied { .. }) {
            assert_ne!(std::env::var("FLOE_REQUIRE_BPF").as_deref(), Ok("1"), "{refusal}");
            eprintln!("SKIPPED {}: {refusal}", python.display());
            continue;
        }
        let found = format!("{}.{}", version.0, version.1);
        assert_eq!(refusal, Refusal::UnsupportedVersion { found }, "{}", python.display());
    }
}

#[test]
fn interpreters_are_recognised_from_their_files_quickly() {
    for python in supported() {
        let executable = Command::new(&python).args(["-c", "import sys; print(sys.executable)"]).output().unwrap();
        let exe = std::fs::canonicalize(String::from_utf8(executable.stdout).unwrap().trim()).unwrap();
        let elf = floe_agent::python::elf::ElfFile::read(&exe, &["_PyRuntime"]).unwrap();
        let file = if floe_agent::python::identify::is_launcher(&elf) {
            let Some(library) = floe_agent::python::identify::library_of_launcher(&elf, &exe, Path::new("/")) else {
                eprintln!("SKIPPED {}: its library is found through the environment only", python.display());
                continue;
            };
            library
        } else {
            exe
        };
        let begin = std::time::Instant::now();
        let read = InterpreterFile::read(&file).unwrap_or_else(|refusal| panic!("{}: {refusal}", file.display()));
        eprintln!("{}: {:?}", file.display(), begin.elapsed());
        let minors: Vec<_> = read.candidates().iter().map(|layout| layout.version.minor).collect();
        let (_, minor) = version_of(&python);
        assert!(minors.contains(&(minor as u8)), "{minors:?}");
        assert_eq!(minors.len() == 1, minor >= 11);
    }
}

#[test]
fn texts_and_numbers_are_what_the_interpreter_says() {
    each(|mut subject| {
        let name = subject.target.name.clone();
        let texts = subject.target.ask("f.TEXTS");
        let addrs = subject.target.addrs("f.TEXTS");
        for (addr, text) in addrs.iter().zip(texts.as_array().unwrap()) {
            let text = text.as_str().unwrap();
            let read = subject.heap().text(*addr, 10_000).unwrap_or_else(|error| panic!("{name}: {text:?}: {error}"));
            assert_eq!((read.text.as_str(), read.cut), (text, false), "{name}");
            assert!(subject.heap().str_is(*addr, text), "{name}: {text:?}");
            assert!(!subject.heap().str_is(*addr, "something else"), "{name}: {text:?}");
            let begin = subject.heap().text(*addr, 2).unwrap();
            assert_eq!(begin.text, text.chars().take(2).collect::<String>(), "{name}");
            assert_eq!(begin.cut, text.chars().count() > 2, "{name}");
        }
        let numbers = subject.target.ask("[int(i) for i in f.INTS]");
        let addrs = subject.target.addrs("f.INTS");
        for (addr, number) in addrs.iter().zip(numbers.as_array().unwrap()) {
            assert_eq!(subject.heap().int(*addr).unwrap(), number.as_i64().unwrap(), "{name}");
        }
        for addr in subject.target.addrs("f.BIG") {
            assert!(subject.heap().int(addr).is_err(), "{name}");
        }
        let floats = subject.target.ask("f.FLOATS");
        let addrs = subject.target.addrs("f.FLOATS");
        for (addr, float) in addrs.iter().zip(floats.as_array().unwrap()) {
            assert_eq!(subject.heap().float(*addr).unwrap().to_bits(), float.as_f64().unwrap().to_bits(), "{name}");
        }
        let none = subject.target.addr("None");
        assert!(subject.heap().int(none).is_err() && subject.heap().text(none, 9).is_err(), "{name}");
        assert!(subject.heap().float(none).is_err() && subject.heap().dict(none).is_err(), "{name}");
    });
}

#[test]
fn containers_are_what_the_interpreter_says() {
    each(|mut subject| {
        let name = subject.target.name.clone();
        for i in 0..7 {
            let addr = subject.target.addr(&format!("f.DICTS[{i}]"));
            let ids = subject.target.ask(&format!("[(id(k), id(v)) for k, v in f.DICTS[{i}].items()]"));
            let expected: Vec<_> = ids
                .as_array()
                .unwrap()
                .iter()
                .map(|pair| (UserAddr(pair[0].as_u64().unwrap()), UserAddr(pair[1].as_u64().unwrap())))
                .collect();
            assert_eq!(subject.heap().dict(addr).unwrap(), expected, "{name}: dict {i}");
        }
        let large = subject.target.addr("f.large");
        let value = subject.target.addr("f.large['key69999']");
        assert_eq!(subject.heap().dict_get(large, "key69999").unwrap(), Some(value), "{name}");
        assert_eq!(subject.heap().dict_get(large, "key70000").unwrap(), None, "{name}");
        for i in 0..9 {
            let addr = subject.target.addr(&format!("f.SEQUENCES[{i}]"));
            let items = subject.target.addrs(&format!("f.SEQUENCES[{i}]"));
            let read = subject.heap().tuple(addr).or_else(|_| subject.heap().list(addr)).unwrap();
            assert_eq!(read, items, "{name}: sequence {i}");
        }
    });
}

#[test]
fn instance_attributes_are_what_the_interpreter_says() {
    each(|mut subject| {
        let name = subject.target.name.clone();
        for (i, addr) in subject.target.addrs("f.INSTANCES").into_iter().enumerate() {
            // Read before the target looks: `__dict__` changes how an instance is kept.
            let before = read_attributes(&subject, addr);
            let class = subject.target.ask(&format!("type(f.INSTANCES[{i}]).__name__"));
            let expected = subject.target.ask(&format!("f.with_dict(f.INSTANCES[{i}])"));
            let after = read_attributes(&subject, addr);
            let expected: BTreeMap<String, UserAddr> = expected
                .as_object()
                .unwrap()
                .iter()
                .map(|(key, id)| (key.clone(), UserAddr(id.as_u64().unwrap())))
                .collect();
            let slots: BTreeSet<_> = ["alpha", "beta", "gamma"].into();
            let in_dict: BTreeMap<_, _> = expected
                .iter()
                .filter(|(key, _)| !slots.contains(key.as_str()))
                .map(|(k, v)| (k.clone(), *v))
                .collect();
            assert_eq!(before, in_dict, "{name}: {class} {i}");
            assert_eq!(after, in_dict, "{name}: {class} {i}, with its dict made");
            for (key, value) in &expected {
                let read = subject.heap().instance_attribute(addr, key).unwrap();
                assert_eq!(read, Some(*value), "{name}: {class} {i}: {key}");
            }
            for missing in ["empty", "no such attribute", "__class__"] {
                assert_eq!(subject.heap().instance_attribute(addr, missing).unwrap(), None, "{name}: {class} {i}");
            }
        }
    });
}

fn read_attributes(subject: &Subject, addr: UserAddr) -> BTreeMap<String, UserAddr> {
    let heap = subject.heap();
    let info = heap.type_info(heap.type_of(addr).unwrap()).unwrap();
    let items = heap.instance_dict(addr, &info).unwrap();
    items.into_iter().map(|(key, value)| (heap.name(key).unwrap(), value)).collect()
}

#[test]
fn functions_are_found_by_name() {
    // Name, expression of the function object in the target, whether its code has that name.
    let cases = [
        ("plain", "f.plain", true),
        ("aliased", "f.plain", false),
        ("lam", "f.lam", false),
        ("decorated", "f.decorated.__wrapped__", true),
        ("hidden", "f.hidden.__closure__[0].cell_contents", true),
        ("deeply", "f.deeply.__wrapped__.__closure__[0].cell_contents.__wrapped__", true),
        ("in_object", "f.in_object.callback", true),
        ("in_slot", "f.in_slot.fn", true),
        ("cached", "f.cached.__wrapped__", true),
        ("part", "f.plain", false),
        ("bound", "f.Klass.method", false),
        ("Base.inherited", "f.Base.inherited", true),
        ("Klass.inherited", "f.Base.inherited", true),
        ("Klass.overridden", "f.Klass.overridden", true),
        ("Klass.method", "f.Klass.method", true),
        ("Klass.static", "f.Klass.static", true),
        ("Klass.klass", "f.Klass.klass.__func__", true),
        ("Klass.prop", "f.Klass.prop.fget", true),
        ("Klass.lazy", "f.Klass.lazy.func", true),
        ("Klass.decorated", "f.Klass.decorated.__wrapped__", true),
        ("Klass.decorated_class", "f.Klass.decorated_class.__func__.__wrapped__", true),
        ("Klass.Nested.deep", "f.Klass.Nested.deep", true),
        ("instance_of_klass.method", "f.Klass.method", true),
        ("Third.method", "f.Klass.method", true),
        ("generator", "f.generator", true),
        ("coroutine", "f.coroutine", true),
        ("async_generator", "f.async_generator", true),
    ];
    each(|mut subject| {
        let name = subject.target.name.clone();
        for (qualname, expression, exact) in cases {
            let expected = subject.target.addr(expression);
            let found = subject.resolver().resolve("floe_fixture", qualname, &[]);
            let found = found.unwrap_or_else(|error| panic!("{name}: {qualname}: {error}"));
            assert_eq!(found.len(), 1, "{name}: {qualname}");
            let found = &found[0];
            assert_eq!((found.function, found.exact), (expected, exact), "{name}: {qualname}: {found:?}");
            let code = subject.target.addr(&format!("{expression}.__code__"));
            let line = subject.target.ask(&format!("{expression}.__code__.co_firstlineno"));
            let arguments = subject.target.ask(&format!(
                "(lambda c: c.co_varnames[:c.co_argcount + c.co_kwonlyargcount])({expression}.__code__)"
            ));
            assert_eq!(found.code, code, "{name}: {qualname}");
            assert_eq!(i64::from(found.line), line.as_i64().unwrap(), "{name}: {qualname}");
            assert_eq!(serde_json::to_value(&found.arguments).unwrap(), arguments, "{name}: {qualname}");
            assert_eq!(found.qualname, subject.target.ask(&format!("{expression}.__qualname__")), "{name}");
            assert_eq!(found.vectorcall, subject.interpreter.entry, "{name}: {qualname}");
        }
        let resolver = subject.resolver();
        let kind = |qualname| resolver.resolve("floe_fixture", qualname, &[]).unwrap()[0].kind;
        assert_eq!(kind("plain"), FunctionKind::Plain);
        assert_eq!(kind("generator"), FunctionKind::Generator);
        assert_eq!(kind("coroutine"), FunctionKind::Coroutine);
        assert_eq!(kind("async_generator"), FunctionKind::AsyncGenerator);
        let class = resolver.resolve("floe_fixture", "Third.inherited", &[]).unwrap()[0].class.clone();
        assert_eq!(class.as_deref(), Some("Base"));
    });
}

#[test]
fn names_that_lead_nowhere_say_why() {
    each(|subject| {
        let resolver = subject.resolver();
        let error = |module: &str, qualname: &str| resolver.resolve(module, qualname, &[]).unwrap_err().to_string();
        assert_eq!(error("no.such", "f"), "module no.such is not imported");
        assert_eq!(error("floe_fixture", "gone"), "floe_fixture has no attribute gone");
        assert_eq!(error("floe_fixture", "Klass.gone"), "floe_fixture.Klass has no attribute gone");
        let text = error("floe_fixture", "Klass");
        assert!(text.contains("is a class"), "{text}");
        let text = error("sys", "setrecursionlimit");
        assert!(text.contains("written in C"), "{text}");
        let text = error("floe_fixture", "cyclic");
        assert!(text.contains("of type list"), "{text}");
        assert!(error("floe_fixture", "cyclic_dict").contains("of type dict"));
        assert_eq!(error("floe_fixture", "outer.<locals>.gone"), "outer defines no function gone");
        assert!(matches!(
            resolver.resolve("floe_fixture", "outer.<locals>.unused", &[]),
            Err(ResolveError::NotReached { more: "", .. })
        ));
        for bad in ["", ".", "a..b", "outer.<locals>.", ".<locals>.x"] {
            assert!(matches!(resolver.resolve("floe_fixture", bad, &[]), Err(ResolveError::BadName { .. })), "{bad:?}");
        }
    });
}

#[test]
fn nested_functions_are_found_wherever_they_are_kept() {
    each(|mut subject| {
        let name = subject.target.name.clone();
        let mut expect = |qualname: &str, expression: &str| {
            let mut expected = subject.target.addrs(expression);
            let cached = CachedMemory::new(subject.mem);
            let modules = subject.interpreter.modules(&cached, subject.interpreter.main).unwrap();
            let resolver = Resolver::new(subject.interpreter.heap(&cached), modules);
            let mut found: Vec<_> = resolver
                .resolve("floe_fixture", qualname, &["floe_fixture"])
                .unwrap_or_else(|error| panic!("{name}: {qualname}: {error}"))
                .into_iter()
                .map(|found| found.function)
                .collect();
            expected.sort();
            found.sort();
            assert_eq!(found, expected, "{name}: {qualname}");
        };
        expect(
            "outer.<locals>.inner",
            "[*f.inners, f.held['key'][0], f.wrapped_inner.__wrapped__, f.in_default.__defaults__[0]]",
        );
        // Held by objects in a dict of an instance: looked for when there is none nearer.
        expect("far.<locals>.inner", "[command.callback for command in f.registry.commands.values()]");
        expect("outer.<locals>.middle.<locals>.innermost", "[f.innermost]");
        expect("Klass.has_locals.<locals>.local", "[f.local_of_method]");
        expect(
            "deco.<locals>.wrapper",
            "[f.decorated, f.deeply, f.deeply.__wrapped__.__closure__[0].cell_contents, f.wrapped_inner, \
             f.Klass.__dict__['decorated'], f.Klass.__dict__['decorated_class'].__func__]",
        );
        // One for each call of `outer` whose result is near: the class in the dict of the one in a tuple is not.
        let resolver = subject.resolver();
        let methods = resolver.resolve("floe_fixture", "outer.<locals>.Local.method", &[]).unwrap();
        assert_eq!(methods.len(), 5, "{name}");
    });
}

#[test]
fn implementations_of_a_method_are_found_in_all_subclasses() {
    each(|mut subject| {
        let mut expected = subject.target.addrs("[c.__dict__['overridden'] for c in (f.Base, f.Klass, f.Third)]");
        let found = subject.resolver().implementations("floe_fixture", "Base.overridden").unwrap();
        let mut addrs: Vec<_> = found.iter().map(|found| found.function).collect();
        expected.sort();
        addrs.sort();
        assert_eq!(addrs, expected, "{}", subject.target.name);
    });
}

#[test]
fn functions_written_in_c_are_found_through_their_definitions() {
    each(|subject| {
        let name = subject.target.name.clone();
        let resolver = subject.resolver();
        let maps = floe_agent::process::maps::read(subject.target.pid()).unwrap();
        for (module, path) in [
            ("sys", "setrecursionlimit"),
            ("_thread", "stack_size"),
            ("builtins", "dict.get"),
            ("builtins", "bool.bit_length"),
            ("_io", "BytesIO.getvalue"),
        ] {
            let def = resolver.find_method_def(module, path).unwrap_or_else(|e| panic!("{name}: {path}: {e}"));
            assert_eq!(def.name, path.rsplit('.').next().unwrap(), "{name}");
            let mapping = maps.iter().find(|mapping| mapping.contains(def.function)).unwrap();
            assert!(mapping.execute, "{name}: {path}");
        }
        assert!(resolver.find_method_def("floe_fixture", "plain").is_err());
        assert!(resolver.find_method_def("builtins", "dict.nothing").is_err());
        assert!(resolver.find_method_def("sys", "gone").is_err());
        assert_eq!(resolver.module_attribute_str("os", "sep").unwrap(), "/");
        assert!(resolver.module_attribute_str("sys", "modules").is_err());
        assert!(resolver.capsule_pointer("os", "sep").is_err());
    });
}

#[test]
fn all_functions_of_the_standard_library_resolve_to_themselves() {
    each(|mut subject| {
        let name = subject.target.name.clone();
        let expected = subject.target.ask(
            "[(m.__name__, n, id(o)) for m in list(sys.modules.values()) if type(m) is type(sys) \
             and m.__name__ == getattr(m.__spec__, 'name', None) \
             for n, o in list(vars(m).items()) \
             if type(o) is type(f.plain) and o.__module__ == m.__name__ and o.__code__.co_name == n == o.__qualname__]",
        );
        let expected = expected.as_array().unwrap();
        assert!(expected.len() > 100, "{name}: {}", expected.len());
        let cached = CachedMemory::new(subject.mem);
        let modules = subject.interpreter.modules(&cached, subject.interpreter.main).unwrap();
        let resolver = Resolver::new(subject.interpreter.heap(&cached), modules);
        let begin = std::time::Instant::now();
        for function in expected {
            let (module, qualname) = (function[0].as_str().unwrap(), function[1].as_str().unwrap());
            let found = resolver.resolve(module, qualname, &[]);
            let found = found.unwrap_or_else(|error| panic!("{name}: {module}:{qualname}: {error}"));
            assert_eq!(found[0].function.0, function[2].as_u64().unwrap(), "{name}: {module}:{qualname}");
        }
        eprintln!("{name}: {} functions, {:?} each", expected.len(), begin.elapsed() / expected.len() as u32);
    });
}

#[test]
fn an_armed_function_works_as_before_and_so_does_a_disarmed_one() {
    const CALLS: &str = "[[f.plain(i) for i in range(300)][-1], f.plain(1, 2, c=4), f.plain(*[1], **{'b': 5}), \
                         f.Klass().method(1), list(map(f.plain, [1, 2])), f.Klass().prop, list(f.generator()), \
                         f.Klass.klass(3), f.decorated(4), f.Klass.static(5)]";
    each(|mut subject| {
        let name = subject.target.name.clone();
        let expected = subject.target.ask(CALLS);
        let gate = subject.interpreter.gate(&subject.mem, &subject.located.file).unwrap();
        let is_311 = subject.interpreter.layout.inlines_past_vectorcall;
        if is_311 {
            let state = subject.interpreter.main;
            let facts = StackFacts::read(&subject.mem, subject.interpreter.layout, state).unwrap();
            assert_eq!((facts.recursion_limit, facts.thread_stack, facts.musl), (1000, 0, false), "{name}");
            assert_eq!(set_eval_frame(&subject.mem, &subject.interpreter, state), Ok(true), "{name}");
            assert_eq!(set_eval_frame(&subject.mem, &subject.interpreter, state), Ok(false), "{name}");
        }
        let names =
            ["plain", "Klass.method", "Klass.prop", "generator", "Klass.klass", "decorated", "Klass.static", "lam"];
        let mut found = Vec::new();
        for qualname in names {
            found.extend(subject.resolver().resolve("floe_fixture", qualname, &[]).unwrap());
        }
        let armer = Armer::new(&subject.mem, &subject.interpreter, gate);
        for found in &found {
            assert_eq!(armer.arm(found), Ok(Armed::Now), "{name}: {}", found.qualname);
            assert_eq!(armer.arm(found), Ok(Armed::Before), "{name}: {}", found.qualname);
            assert_eq!(armer.is_armed(found.function, found.code), Ok(true), "{name}");
        }
        for _ in 0..5 {
            assert_eq!(subject.target.ask(CALLS), expected, "{name}: armed");
        }
        // Another interpreter state of the agent, as after a restart: the entry is found although functions are armed.
        let again = Interpreter::verify(&subject.mem, &subject.located.file, subject.located.bias).unwrap();
        assert_eq!(again.entry, subject.interpreter.entry, "{name}");
        for found in &found {
            let vectorcall = subject.resolver().describe_function(found.function).unwrap().vectorcall;
            assert_eq!(vectorcall, gate.gate, "{name}: {} stays armed", found.qualname);
            assert_eq!(armer.disarm(found.function, found.code), Ok(()), "{name}");
            assert_eq!(armer.disarm(found.function, found.code), Ok(()), "{name}: twice");
            assert_eq!(armer.is_armed(found.function, found.code), Ok(false), "{name}");
        }
        if is_311 {
            assert_eq!(clear_eval_frame(&subject.mem, &subject.interpreter, subject.interpreter.main), Ok(true));
            assert_eq!(clear_eval_frame(&subject.mem, &subject.interpreter, subject.interpreter.main), Ok(false));
        }
        assert_eq!(subject.target.ask(CALLS), expected, "{name}: disarmed");
        // Freed while their versions are cleared.
        assert_eq!(
            subject.target.ask("[f.__dict__.pop('plain', None) is None, f.__dict__.pop('lam') and 1]"),
            serde_json::json!([false, 1])
        );
    });
}

#[test]
fn what_is_no_longer_the_function_is_left_alone() {
    each(|mut subject| {
        let name = subject.target.name.clone();
        let gate = subject.interpreter.gate(&subject.mem, &subject.located.file).unwrap();
        let found = subject.resolver().resolve("floe_fixture", "plain", &[]).unwrap().remove(0);
        subject.target.ask("setattr(f.plain, '__code__', f.lam.__code__)");
        let armer = Armer::new(&subject.mem, &subject.interpreter, gate);
        let error = armer.arm(&found).unwrap_err().to_string();
        assert!(error.contains("its code is another"), "{name}: {error}");
        let mut other = found.clone();
        other.function = subject.target.addr("f.Klass");
        let error = armer.arm(&other).unwrap_err().to_string();
        assert!(error.contains("its type is another"), "{name}: {error}");
        // Something else has taken the function over: torch and debuggers do.
        let mut foreign = found.clone();
        foreign.code = subject.target.addr("f.plain.__code__");
        let at = found.function.offset(subject.interpreter.layout.function.vectorcall);
        let elsewhere = subject.interpreter.eval_frame_default;
        subject.mem.write(at, &elsewhere.0.to_le_bytes()).unwrap();
        let error = armer.arm(&foreign).unwrap_err().to_string();
        assert!(error.contains("left alone"), "{name}: {error}");
        assert!(armer.disarm(foreign.function, foreign.code).is_err(), "{name}");
        assert_eq!(subject.mem.read_ptr(at).unwrap(), elsewhere, "{name}");
    });
}

#[test]
fn subinterpreters_are_seen() {
    each(|mut subject| {
        let name = subject.target.name.clone();
        let made = subject.target.ask(
            "[f.__dict__.setdefault('sub', __import__(m).create()) is None for m in ('_interpreters', '_xxsubinterpreters') \
             if __import__('importlib.util').util.find_spec(m)][:1]",
        );
        if made.as_array().unwrap().is_empty() {
            return;
        }
        let all = subject.interpreter.interpreters_now(&subject.mem).unwrap();
        assert!(all.len() >= 2 && all.contains(&subject.interpreter.main), "{name}");
        let modules: BTreeSet<_> =
            all.iter().map(|&state| subject.interpreter.modules(&subject.mem, state).unwrap()).collect();
        assert_eq!(modules.len(), all.len(), "{name}");
        for modules in modules {
            assert!(Resolver::new(subject.heap(), modules).module("sys").unwrap().is_some(), "{name}");
        }
        Interpreter::verify(&subject.mem, &subject.located.file, subject.located.bias).unwrap();
    });
}

/// Memory that lies now and then: a few of the words that are read are something else.
struct LyingMemory<'m> {
    inner: &'m dyn Memory,
    seed: std::cell::Cell<u64>,
    rarity: u64,
}

impl LyingMemory<'_> {
    fn random(&self) -> u64 {
        let next = self.seed.get().wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        self.seed.set(next);
        next >> 24
    }
}

impl Memory for LyingMemory<'_> {
    fn read(&self, addr: UserAddr, buf: &mut [u8]) -> Result<(), floe_agent::python::memory::MemoryError> {
        self.inner.read(addr, buf)?;
        if self.random().is_multiple_of(self.rarity) && !buf.is_empty() {
            let at = self.random() as usize % buf.len();
            let lie = match self.random() % 6 {
                0 => u64::MAX,
                1 => 0,
                2 => addr.0,
                3 => self.random() % 100_000,
                4 => 1 << 63,
                _ => self.random(),
            };
            for (byte, lie) in buf[at..].iter_mut().zip(lie.to_le_bytes()) {
                *byte = lie;
            }
        }
        Ok(())
    }
}

#[test]
fn a_process_that_lies_gets_no_panic_and_no_endless_loop() {
    each(|subject| {
        let cached = CachedMemory::new(subject.mem);
        let begin = std::time::Instant::now();
        let (mut verified, mut resolved) = (0, 0);
        for round in 0..60_u64 {
            let lying = LyingMemory {
                inner: &cached,
                seed: std::cell::Cell::new(round),
                rarity: [10, 100, 1000, 10_000][round as usize % 4],
            };
            if Interpreter::verify(&lying, &subject.located.file, subject.located.bias).is_ok() {
                verified += 1;
            }
            let heap = subject.interpreter.heap(&lying);
            let Ok(modules) = subject.interpreter.modules(&cached, subject.interpreter.main) else {
                continue;
            };
            let resolver = Resolver::new(heap, modules);
            for name in ["plain", "deeply", "Klass.decorated", "in_object", "outer.<locals>.inner", "cyclic"] {
                if resolver.resolve("floe_fixture", name, &[]).is_ok() {
                    resolved += 1;
                }
            }
            let _ = resolver.implementations("floe_fixture", "Base.overridden");
            let _ = resolver.find_method_def("builtins", "bool.bit_length");
            let _ = resolver.module_names();
            assert!(begin.elapsed().as_secs() < 120, "{}: too slow", subject.target.name);
        }
        eprintln!("{}: {verified} verified, {resolved} resolved, {:?}", subject.target.name, begin.elapsed());
    });
}

#[test]
fn the_functions_of_greenlet_are_found() {
    let Ok(pythons) = std::env::var("FLOE_TEST_GREENLET_PYTHONS") else {
        eprintln!("SKIPPED: FLOE_TEST_GREENLET_PYTHONS names no interpreters that have greenlet");
        return;
    };
    for python in pythons.split(':').filter(|python| !python.is_empty()) {
        let Some(mut subject) = Subject::start(Path::new(python)) else {
            continue;
        };
        subject.target.ask("f.__dict__.update(g=__import__('greenlet'))");
        let maps = floe_agent::process::maps::read(subject.target.pid()).unwrap();
        let in_greenlet = |addr: UserAddr| {
            maps.iter()
                .find(|mapping| mapping.contains(addr))
                .is_some_and(|mapping| mapping.execute && mapping.path.to_string_lossy().contains("greenlet"))
        };
        let resolver = subject.resolver();
        for path in ["greenlet.switch", "greenlet.throw"] {
            let def = resolver.find_method_def("greenlet", path).unwrap();
            assert_eq!(def.name, path.rsplit('.').next().unwrap(), "{python}");
            assert!(in_greenlet(def.function), "{python}: {path}");
        }
        // greenlet.h: PyGreenlet_Throw_NUM is 5, PyGreenlet_Switch_NUM 6.
        let table = resolver.capsule_pointer("greenlet._greenlet", "_C_API").unwrap();
        for slot in [5, 6] {
            let function = subject.mem.read_ptr(table.offset(slot * 8)).unwrap();
            assert!(in_greenlet(function), "{python}: slot {slot}");
        }
        eprintln!("{python}: CPython {}: greenlet's functions found", subject.interpreter.version());
    }
}
