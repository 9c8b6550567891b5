//! The node agent: who is found and traced, in containers too; who is left alone; how it is stopped, changed and watched.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    os::unix::fs::FileExt as _,
    path::Path,
    process::{Command, Stdio},
    sync::atomic::{AtomicU32, Ordering},
    thread,
    time::{Duration, Instant},
};

use floe_tests::{
    Agent, Interpreter, Node, Run, can_trace, for_each, interpreters, join_group, one_of, program, say, skip,
};
use rustix::process::Signal;
use serde_json::Value;

const RULES: &str = "discovery: {instrument: [{modules: [node_target]}]}\n";

fn agent() -> Agent {
    Agent::new().probe("node_target:work(t.n=arg0)")
}

/// A job with so many calls and a pause after each.
fn job(interpreter: &Interpreter, calls: u32, pause: &str) -> Run {
    interpreter.program("node_job.py").arg(calls.to_string()).arg(pause)
}

#[test]
fn processes_are_traced_whether_they_start_before_or_after_the_agent_and_others_are_not() {
    let Some(_alone) = can_trace() else { return };
    let running: Vec<_> = interpreters().into_iter().map(|i| (i, job(i, 2000, "0.1").start_ready())).collect();
    let mut node = Node::start(&agent(), RULES);
    for (interpreter, process) in &running {
        node.wait_until(&format!("{interpreter}, which ran before, is traced"), |node| {
            node.spans_of(process.pid()) > 2
        });
    }
    for_each(interpreters(), |interpreter| {
        let pids: Vec<u32> = (0..3)
            .map(|_| {
                let short = job(interpreter, 3, "0").start();
                let pid = short.pid();
                short.wait().expect(0);
                pid
            })
            .collect();
        let other = interpreter.program("node_hidden.py").args(["3", "0"]).start();
        let other_pid = other.pid();
        other.wait().expect(0);
        let deadline = Instant::now() + Duration::from_secs(10);
        while pids.iter().any(|&pid| node.spans_of(pid) < 3) && Instant::now() < deadline {
            thread::sleep(Duration::from_millis(20));
        }
        let spans: Vec<_> = pids.iter().map(|&pid| node.spans_of(pid)).collect();
        assert_eq!(spans, [3, 3, 3], "of short processes");
        assert_eq!(node.spans_of(other_pid), 0, "of one that does not match");
    });
    for (_, process) in running {
        process.signal(Signal::KILL);
        process.wait();
    }
    node.stop().nothing_lost();
}

#[test]
fn what_a_process_imports_is_seen_even_if_its_script_does_not_tell() {
    let Some(_alone) = can_trace() else { return };
    let mut node = Node::start(&agent(), RULES);
    let hidden = one_of(&[12, 11, 10]).program("node_hidden.py").args(["2000", "0.1"]).start_ready();
    node.wait_until("it is traced", |node| node.spans_of(hidden.pid()) > 2);
    hidden.signal(Signal::KILL);
    hidden.wait();
    node.stop().nothing_lost();
}

#[test]
fn of_500_short_processes_the_50_that_match_are_traced_completely() {
    const ALL: u32 = 500;
    const CALLS: u32 = 3;
    let Some(_alone) = can_trace() else { return };
    let interpreter = one_of(&[12, 11, 10]);
    let node = Node::start(&agent(), "discovery: {instrument: [{command_line: 'node_job\\.py 3 0 match$'}]}\n");
    let next = AtomicU32::new(0);
    let began = Instant::now();
    let memory = |when: &str| {
        let bytes = node.metric("floe_agent_resident_memory_bytes");
        say(&format!("node: {when}: {:.1} MiB", bytes / f64::from(1 << 20)));
        bytes
    };
    let run = |upto: u32| {
        thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    loop {
                        let n = next.fetch_add(1, Ordering::Relaxed);
                        if n >= upto {
                            break;
                        }
                        let mut command = Command::new(&interpreter.path);
                        command.args(["-B", "-S"]).arg(program("node_job.py")).args([&CALLS.to_string(), "0"]);
                        command.arg(if n.is_multiple_of(10) { "match" } else { "other" }).stdout(Stdio::null());
                        assert!(command.status().expect("it starts").success());
                    }
                });
            }
        });
        next.store(upto, Ordering::Relaxed);
    };
    run(ALL / 5);
    let early = memory("after 100 processes");
    run(ALL);
    say(&format!("node: {ALL} processes in {:.1} s", began.elapsed().as_secs_f64()));
    let late = memory("after 500 processes");
    assert!(late < early + f64::from(8 << 20), "memory grows: {early} bytes, then {late}");
    let outcome = node.stop();
    outcome.nothing_lost();
    let mut by_process: BTreeMap<u32, Vec<i64>> = BTreeMap::new();
    for span in outcome.named("work") {
        by_process.entry(span.pid).or_default().push(span.int("t.n").expect("captured"));
    }
    assert_eq!(by_process.len() as u32, ALL / 10, "{outcome}");
    assert!(by_process.values().all(|calls| *calls == [0, 1, 2]), "{by_process:?}");
    assert_eq!(outcome.counter("run_main_hits"), u64::from(ALL / 10), "{outcome}");
    assert_eq!(outcome.counter("gate_hits_not_selected"), 0, "{outcome}");
}

/// A container id.
fn id(digit: char) -> String {
    digit.to_string().repeat(64)
}

/// The job in namespaces of its own, with the interpreter's folder behind overlayfs at one path for all, and in a control
/// group named as Docker names them.
fn contained(interpreter: &Interpreter, folder: &Path, id: Option<&str>, user: bool, calls: u32, pause: &str) -> Run {
    let prefix = interpreter.path.parent().and_then(Path::parent).expect("<prefix>/bin/python3").display();
    let place = folder.display();
    let group = id.map_or_else(String::new, |id| join_group(folder, &format!("docker/{id}")));
    let script = format!(
        "set -e; mount -t tmpfs none {place}; {group}cd {place}; mkdir py up work; \
         mount -t overlay overlay -o lowerdir={prefix},upperdir={place}/up,workdir={place}/work py; \
         LD_LIBRARY_PATH={place}/py/lib exec {place}/py/bin/python3 -B {} {calls} {pause}",
        program("node_job.py").display()
    );
    let mut words = vec!["--mount", "--pid", "--fork", "--mount-proc", "--kill-child"];
    if user {
        words.extend(["--user", "--map-root-user"]);
    }
    Run::new("unshare").args(words).args(["sh", "-c", &script])
}

/// The one child of a process.
fn child(pid: u32) -> u32 {
    let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).expect("it runs");
    children.trim().parse().unwrap_or_else(|_| panic!("one child was expected: {children:?}"))
}

#[test]
fn containers_are_traced_with_their_ids_and_shared_layers_once() {
    let Some(_alone) = can_trace() else { return };
    // Interpreters that find their library where they are told to, and not where they were built.
    let usable: Vec<_> = interpreters().into_iter().filter(|i| i.path.to_string_lossy().contains(".pyenv")).collect();
    let [first, .., second] = usable[..] else {
        skip("two interpreters of pyenv are needed");
        return;
    };
    let folder = tempfile::tempdir().expect("a temporary folder can be made");
    let place = folder.path().join("place");
    fs::create_dir(&place).expect("it can be made");
    let attempt = contained(first, &place, Some(&id('f')), true, 1, "0").run();
    if attempt.code() != 0 {
        // Without a control group: users in a namespace of their own may not make any.
        let attempt = contained(first, &place, None, true, 1, "0").run();
        if attempt.code() != 0 {
            skip(&format!("no namespaces, overlayfs: {}", attempt.err().trim()));
            return;
        }
    }
    let groups = contained(first, &place, Some(&id('f')), false, 1, "0").run().code() == 0;
    if !groups {
        say("node: no control groups of version 2 can be made here: container.id is not tested");
    }
    let group = |digit: char| groups.then(|| id(digit));

    let mut before = Vec::new();
    for (interpreter, digit, user) in [(first, '1', false), (second, '2', false), (first, '3', true)] {
        let group = if user { None } else { group(digit) };
        let run = contained(interpreter, &place, group.as_deref(), user, 1500, "0.1");
        before.push((interpreter, group, run.start_ready()));
    }
    let mut node = Node::start(&agent(), RULES);
    for (interpreter, _, process) in &before {
        let pid = child(process.pid());
        node.wait_until(&format!("the container of {interpreter} is traced"), |node| node.spans_of(pid) > 2);
    }
    let mut after = Vec::new();
    for (interpreter, digit, user) in
        [(second, '4', false), (first, '5', false), (second, '6', true), (first, '7', true), (second, '8', false)]
    {
        let group = if user { None } else { group(digit) };
        let mut run = contained(interpreter, &place, group.as_deref(), user, 20, "0.1").start_ready();
        let pid = child(run.pid());
        run.close_input();
        after.push((interpreter, group, pid, run));
    }
    let mut expected: BTreeMap<u32, (&Interpreter, Option<String>, usize)> = BTreeMap::new();
    for (interpreter, group, pid, run) in after {
        run.wait().expect(0);
        expected.insert(pid, (interpreter, group, 20));
    }
    for (interpreter, group, process) in before {
        expected.insert(child(process.pid()), (interpreter, group, 0));
        process.signal(Signal::KILL);
        process.wait();
    }
    let outcome = node.stop();
    outcome.nothing_lost();
    for (pid, (interpreter, group, calls)) in expected {
        let spans: Vec<_> = outcome.named("work").filter(|span| span.pid == pid).collect();
        if calls > 0 {
            assert_eq!(spans.len(), calls, "{interpreter} in process {pid}: {outcome}");
        }
        // A file that is probed twice would report each call twice.
        let numbers: Vec<_> = spans.iter().map(|span| span.int("t.n")).collect();
        let mut distinct = numbers.clone();
        distinct.dedup();
        assert_eq!(numbers, distinct, "{interpreter} in process {pid}");
        let text = |name: &str| spans[0].resource.get(name).cloned().unwrap_or_default();
        assert_eq!(text("process.runtime.version"), Value::from(interpreter.version.clone()));
        assert_eq!(text("process.vpid"), Value::from(1));
        assert_eq!(text("container.id"), group.map_or(Value::Null, Value::from), "{interpreter} in process {pid}");
        assert!(
            text("process.executable.path").as_str().is_some_and(|path| path.starts_with(&*place.to_string_lossy()))
        );
    }
}

/// Address of the gate of a process, as `doctor` tells it.
fn gate(pid: u32) -> u64 {
    let doctor = Run::new(Agent::binary()).args(["doctor", "--json"]).run();
    let diagnosis: Value = serde_json::from_str(&doctor.expect(0)).expect("doctor prints JSON");
    assert_eq!(diagnosis["works"], true, "{diagnosis}");
    let process = diagnosis["processes"].as_array().and_then(|all| all.iter().find(|p| p["pid"] == pid));
    let gate = process.and_then(|p| p["gate"].as_str()).unwrap_or_else(|| panic!("{pid} is not in {diagnosis}"));
    let hex = gate.split(' ').next().and_then(|word| word.strip_prefix("0x")).expect("an address");
    u64::from_str_radix(hex, 16).expect("hexadecimal")
}

fn byte(pid: u32, address: u64) -> u8 {
    let mut byte = [0];
    File::open(format!("/proc/{pid}/mem"))
        .and_then(|memory| memory.read_exact_at(&mut byte, address))
        .expect("readable");
    byte[0]
}

#[test]
fn the_kill_switch_detaches_all_probes_and_lets_tracing_go_on() {
    const BREAKPOINT: u8 = 0xcc;
    let Some(_alone) = can_trace() else { return };
    let interpreter = one_of(&[12, 11, 10]);
    let process = job(interpreter, 3000, "0.05").start_ready();
    let pid = process.pid();
    let gate = gate(pid);
    let mut node = Node::start(&agent(), &format!("{RULES}kill_switch: {{file: '{{folder}}/stop'}}\n"));
    node.wait_until("it is traced", |node| node.spans_of(pid) > 2);
    assert_eq!(byte(pid, gate), BREAKPOINT);
    let files = node.settled_files(None);
    for round in 0..2 {
        let by_file = round % 2 == 0;
        let began = Instant::now();
        if by_file {
            fs::write(node.file("stop"), "").expect("it can be made");
        } else {
            node.tracing.agent.signal(Signal::USR1);
        }
        node.wait_until("its gate is no breakpoint any more", |_| byte(pid, gate) != BREAKPOINT);
        say(&format!("node: probes are gone after {:?}", began.elapsed()));
        node.wait_until("it says so", |node| node.get("/readyz").0 == 503 && node.metric("floe_agent_paused") > 0.0);
        assert_eq!(node.get("/healthz").0, 200);
        node.wait_until("all are gone", |node| node.metric("floe_agent_probes") < 1.0);
        job(interpreter, 3, "0").run().expect(0);
        let calls = node.metric("floe_agent_calls_total");
        thread::sleep(Duration::from_millis(300));
        assert!((node.metric("floe_agent_calls_total") - calls).abs() < 0.5, "calls are still seen");
        if by_file {
            fs::remove_file(node.file("stop")).expect("it is there");
        } else {
            node.tracing.agent.signal(Signal::USR1);
        }
        node.wait_until("it goes on", |node| node.get("/readyz").0 == 200);
        let before = node.spans_of(pid);
        node.wait_until("it is traced again", |node| node.spans_of(pid) > before + 2);
        let short = job(interpreter, 3, "0").start();
        let short_pid = short.pid();
        short.wait().expect(0);
        node.wait_until("so are new ones", |node| node.spans_of(short_pid) == 3);
    }
    node.settled_files(Some(&files));
    let said = node.tracing.agent.error();
    said.lines().filter(|line| line.contains("all tracing is stopped")).for_each(say);
    process.signal(Signal::KILL);
    process.wait();
    node.stop();
}

#[test]
fn a_change_of_rules_needs_no_restart_and_disarms_who_falls_out() {
    let Some(_alone) = can_trace() else { return };
    for_each(interpreters(), |interpreter| {
        let process = job(interpreter, 3000, "0.05").start_ready();
        let pid = process.pid();
        let mut node = Node::start(&agent(), RULES);
        node.wait_until("it is traced", |node| node.spans_of(pid) > 2);
        node.configure("discovery: {instrument: [{user: nobody}]}\n");
        node.wait_until("it is let go of", |node| node.metric("floe_agent_processes_released_total") > 0.0);
        assert!(node.metric("floe_agent_functions") < 1.0);
        let calls = node.metric("floe_agent_calls_total");
        node.configure("discovery: {instrument: [{user: '['}]}\n");
        node.wait_until("what is wrong is refused", |node| node.tracing.agent.error().contains("not a glob"));
        assert!((node.metric("floe_agent_calls_total") - calls).abs() < 0.5, "calls are still seen");
        node.configure(RULES);
        let before = node.spans_of(pid);
        node.wait_until("it is traced again", |node| node.spans_of(pid) > before + 2);
        process.signal(Signal::KILL);
        process.wait();
        node.stop();
    });
}

/// Options of `setpriv` for these capabilities and no others.
fn only(capabilities: &[&str]) -> Vec<String> {
    let set = capabilities.iter().fold("-all".to_owned(), |set, name| format!("{set},+{name}"));
    ["--bounding-set", &set, "--inh-caps", &set].map(str::to_owned).to_vec()
}

#[test]
fn the_documented_capabilities_are_enough_and_a_missing_one_is_named() {
    const NEEDED: [&str; 3] = ["sys_admin", "sys_ptrace", "dac_read_search"];
    let Some(_alone) = can_trace() else { return };
    let words = only(&NEEDED);
    let words: Vec<_> = words.iter().map(String::as_str).collect();
    let mut node = Node::start_with(&agent(), &words, RULES);
    let status = fs::read_to_string(format!("/proc/{}/status", node.tracing.agent.pid())).expect("it runs");
    let bits = |name: &str| status.lines().find_map(|line| line.strip_prefix(name)).map(|set| set.trim().to_owned());
    assert_eq!(bits("CapEff:").as_deref(), Some("0000000000280004"), "{status}");
    let short = job(one_of(&[12, 11, 10]), 3, "0").start();
    let pid = short.pid();
    short.wait().expect(0);
    node.wait_until("it is traced", |node| node.spans_of(pid) == 3);
    node.stop().nothing_lost();

    for missing in NEEDED {
        let rest: Vec<_> = NEEDED.into_iter().filter(|&name| name != missing).collect();
        let name = format!("CAP_{}", missing.to_uppercase());
        let words = only(&rest);
        let agent = Run::new("setpriv").args(&words).arg(Agent::binary());
        let refused = agent.clone().args(["run", "--listen", "off"]).run();
        assert_eq!(refused.code(), 2, "{refused}");
        assert!(refused.err().contains(&name), "{refused}");
        let doctor = agent.args(["doctor"]).run();
        assert_eq!(doctor.code(), 1, "{doctor}");
        let line = doctor.out();
        let line = line.lines().find(|line| line.contains(&name)).unwrap_or_default();
        assert!(line.contains("PROBLEM"), "{doctor}");
    }
}

#[test]
fn a_configuration_that_cannot_be_used_is_refused_in_one_line() {
    let folder = tempfile::tempdir().expect("a temporary folder can be made");
    let file = folder.path().join("node.yaml");
    for (text, word) in [("discovery: {instrument: [{exe: x}]}", "exe"), ("budget: {cpu_percent: -1}", "budget")] {
        fs::write(&file, text).expect("it can be written");
        let refused = Run::new(Agent::binary()).args(["run", "--node-config"]).arg(&file).run();
        assert_eq!(refused.code(), 2, "{refused}");
        assert_eq!(refused.err().lines().count(), 1, "{refused}");
        assert!(refused.err().starts_with("floe-agent: ") && refused.err().contains(word), "{refused}");
    }
}
