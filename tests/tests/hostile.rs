//! Processes that look like CPython and are not, or are and lie: nothing is written to them, and the agent goes on.

use std::{
    fs::{self, OpenOptions},
    os::unix::fs::FileExt as _,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
};

use floe_tests::{Agent, Copy, Run, can_trace, for_each, interpreters, one_of, program, say, skip};
use rustix::process::Signal;
use serde_json::Value;

fn agent() -> Agent {
    Agent::new().probe("idle_target:work(t.n=arg0)")
}

/// Address of the gate of a running process and of the function behind it, as `doctor` tells them.
fn gate_and_entry(pid: u32) -> (u64, u64) {
    let doctor = Run::new(Agent::binary()).args(["doctor", "--json"]).run();
    let diagnosis: Value = serde_json::from_str(&doctor.expect(0)).expect("doctor prints JSON");
    let process = diagnosis["processes"].as_array().and_then(|all| all.iter().find(|p| p["pid"] == pid));
    let gate = process.and_then(|p| p["gate"].as_str()).unwrap_or_else(|| panic!("{pid} is not in {diagnosis}"));
    let mut addresses = gate.split(' ').filter_map(|word| u64::from_str_radix(word.strip_prefix("0x")?, 16).ok());
    (addresses.next().expect("the gate"), addresses.next().expect("the entry"))
}

/// Where in the file that a process maps there this address is.
fn offset_in_file(pid: u32, address: u64) -> u64 {
    let maps = fs::read_to_string(format!("/proc/{pid}/maps")).expect("it runs");
    let hex = |text: &str| u64::from_str_radix(text, 16).expect("hexadecimal");
    let found = maps.lines().find_map(|line| {
        let mut words = line.split_ascii_whitespace();
        let (start, end) = words.next()?.split_once('-')?;
        let offset = words.nth(1)?;
        (hex(start)..hex(end)).contains(&address).then(|| address - hex(start) + hex(offset))
    });
    found.expect("it is in a mapping")
}

#[test]
fn a_copy_of_an_interpreter_with_another_version_or_another_gate_is_refused_and_not_written_to() {
    let Some(_alone) = can_trace() else { return };
    for_each(interpreters(), |interpreter| {
        let folder = tempfile::tempdir().expect("a temporary folder can be made");
        let Some(copy) = Copy::of(interpreter, folder.path()) else {
            say(&format!("hostile: no copy of {interpreter} can be run"));
            return;
        };
        // The copy is traced as long as it is one.
        let calls = copy.program("lookalike.py");
        let outcome = agent().exec(&calls);
        assert_eq!(outcome.finished.expect(0), "armed\n");
        assert_eq!(outcome.named("work").count(), 20, "{outcome}");

        let running = calls.clone().arg("patch").start_ready();
        let (gate, entry) = gate_and_entry(running.pid());
        let offset = offset_in_file(running.pid(), gate);
        running.signal(Signal::KILL);
        running.wait();
        let padding = (entry - gate) as usize;
        let another = if interpreter.minor == 12 { 13_u64 } else { 12 };
        let damages = [
            copy.version.map(|at| (at, (0x0300_00f0 | another << 16).to_le_bytes().to_vec())),
            Some((offset, vec![0xcc; padding])),
            // A return.
            Some((offset, vec![0xc3; padding])),
        ];
        for (at, bytes) in damages.into_iter().flatten() {
            let before = copy.overwrite(at, &bytes);
            let outcome = agent().exec(&calls);
            assert_eq!(outcome.finished.expect(0), "untouched\n");
            assert!(outcome.finished.err().contains("is not traced"), "{outcome}");
            assert_eq!(outcome.spans.len(), 0, "{outcome}");
            assert_eq!(outcome.counter("gate_hits"), 0, "{outcome}");
            copy.overwrite(at, &before);
        }
    });
}

#[test]
fn a_process_whose_code_is_not_that_of_its_file_is_refused_and_not_written_to() {
    let Some(_alone) = can_trace() else { return };
    for_each(interpreters(), |interpreter| {
        let mut running = interpreter.program("lookalike.py").arg("patch").start_ready();
        let (gate, entry) = gate_and_entry(running.pid());
        running.write(&format!("{gate} {entry}\n"));
        running.wait_for_output("patched");
        let refused = Run::new(Agent::binary()).args(["attach", &running.pid().to_string()]).run();
        refused.expect(2);
        running.close_input();
        assert!(running.wait().expect(0).ends_with("untouched\n"), "{refused}");
    });
}

#[test]
fn a_program_with_all_names_of_an_interpreter_and_nothing_behind_them_is_refused_and_not_written_to() {
    let Some(_alone) = can_trace() else { return };
    let folder = tempfile::tempdir().expect("a temporary folder can be made");
    let mut commands = Vec::new();
    // Version, and where functions of it keep `vectorcall`.
    for (version, offset) in [(0, 112), (0x030b_04f0, 128), (0x030c_01f0, 144), (0x030d_00f0, 144), (0x030f_00f0, 144)]
    {
        let file = folder.path().join(format!("lookalike-{version:x}"));
        let compiled = Run::new("cc")
            .args(["-O1", "-rdynamic", "-Wno-builtin-declaration-mismatch", &format!("-DVERSION={version}")])
            .arg(format!("-DOFFSET={offset}"))
            .arg("-o")
            .args([&file, &program("lookalike.c")])
            .run();
        if compiled.code() == 127 {
            skip("there is no C compiler");
            return;
        }
        compiled.expect(0);
        commands.extend(["zero", "self", "wild"].map(|kind| format!("{} {kind}", file.display())));
    }
    let honest = format!("{} -B {}", one_of(&[12]).path.display(), program("idle.py").display());
    let outcome = agent().exec(&Run::shell(&format!("set -e; {}; {honest} </dev/null", commands.join("; "))));
    let out = outcome.finished.expect(0);
    assert_eq!(out.lines().filter(|line| *line == "unchanged").count(), commands.len(), "{outcome}");
    // None of them kept the agent from what is Python.
    assert_eq!(outcome.named("work").count(), 20, "{outcome}");
    assert_eq!(outcome.spans.len(), 20, "{outcome}");
}

/// Writes to words of a file, each in turn one of its values, until it is dropped.
struct Changer {
    done: Arc<AtomicBool>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Changer {
    fn start(path: &Path, changes: Vec<(u64, Vec<u64>)>) -> Self {
        let file = OpenOptions::new().write(true).open(path).expect("it is ours");
        let done = Arc::new(AtomicBool::new(false));
        let stop = done.clone();
        let thread = thread::spawn(move || {
            let mut turn = 0;
            while !stop.load(Ordering::Relaxed) {
                for (at, values) in changes.iter().filter(|(_, values)| !values.is_empty()) {
                    let value = values[(turn + *at as usize / 8) % values.len()];
                    file.write_all_at(&value.to_le_bytes(), *at).expect("it can be written");
                }
                turn += 1;
            }
        });
        Self { done, thread: Some(thread) }
    }
}

impl Drop for Changer {
    fn drop(&mut self) {
        self.done.store(true, Ordering::Relaxed);
        let ended = self.thread.take().map(thread::JoinHandle::join);
        assert!(thread::panicking() || ended.is_some_and(|ended| ended.is_ok()), "the file could not be changed");
    }
}

/// What the program says may be changed: offset and values.
fn changes(said: &str) -> Vec<(u64, Vec<u64>)> {
    let line = said.lines().next().unwrap_or_default();
    serde_json::from_str(line).unwrap_or_else(|error| panic!("no changes: {error}: {line}"))
}

#[test]
fn forged_objects_are_not_written_to_also_if_they_change_while_they_are_read() {
    const FORGED: [&str; 18] = [
        "foreign",
        "codeless",
        "wild",
        "untyped",
        "null",
        "itself",
        "long",
        "copied",
        "Endless.method",
        "Flagged.method",
        "Circular.method",
        "Changing.method",
        "changing0",
        "changing1",
        "changing2",
        "changing3",
        "changing4",
        "changing5",
    ];
    let Some(_alone) = can_trace() else { return };
    for_each(interpreters(), |interpreter| {
        let file = tempfile::NamedTempFile::new().expect("a temporary file can be made");
        let mut running = interpreter.program("hostile.py").arg(file.path()).start_ready();
        let changer = Changer::start(file.path(), changes(&running.output()));
        // Spans are watched as they come: none is to wait for its run to be known.
        let mut agent = agent().option("--set").option("correlation.hold=0");
        agent = agent.probe("hostile_itself:work").probe("hostile_huge:work");
        for name in FORGED {
            agent = agent.probe(&format!("hostile_target:{name}"));
        }
        let mut tracing = agent.attach(running.pid());
        // None of them keeps the agent from the honest one.
        while tracing.spans().iter().filter(|span| span.name == "work").count() < 3 {
            tracing.wait_for_spans(tracing.spans().len() + 1);
        }
        tracing.agent.signal(Signal::INT);
        let outcome = tracing.wait();
        outcome.finished.expect(0);
        let slowest = outcome.stats().slowest_answer_us;
        say(&format!("hostile: {interpreter}: no answer took longer than {slowest} µs"));
        drop(changer);
        running.close_input();
        let out = running.wait().expect(0);
        assert_eq!(out.lines().last(), Some("[]"), "these words of the forged objects were written to");
    });
}

#[test]
fn a_process_whose_list_of_interpreters_has_no_end_is_refused_and_not_written_to() {
    let Some(_alone) = can_trace() else { return };
    for_each(interpreters(), |interpreter| {
        let mut running = interpreter.program("ring.py").start_ready();
        let refused = Run::new(Agent::binary()).args(["attach", &running.pid().to_string()]).run();
        refused.expect(2);
        // Before 3.11 no file says which of the tables is the right one: the refusal may be another one's.
        assert!(refused.err().contains("cyclic") || interpreter.minor < 11, "{refused}");
        running.close_input();
        assert_eq!(running.wait().expect(0).lines().last(), Some("untouched"), "{refused}");
    });
}
