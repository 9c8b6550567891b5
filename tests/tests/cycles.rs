//! Attaching and detaching again and again, and ends at bad moments: nothing is left behind, and programs are unharmed.
//!
//! `FLOE_TEST_CYCLES=N` makes the first two longer, for a run by hand.

use std::{
    collections::BTreeMap,
    env, fs,
    net::TcpListener,
    time::{Duration, Instant},
};

use floe_tests::{Agent, Node, can_trace, for_each, one_of, say};
use rustix::process::Signal;

const RULES: &str = "discovery: {instrument: [{modules: [node_target]}]}\n";

fn agent() -> Agent {
    Agent::new().probe("node_target:work(t.n=arg0)")
}

/// How often, unless the run is longer.
fn cycles(usual: u32) -> u32 {
    env::var("FLOE_TEST_CYCLES").ok().and_then(|cycles| cycles.parse().ok()).unwrap_or(usual)
}

/// Memory of a process, in bytes.
fn memory(pid: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("it runs");
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("it has memory");
    line.trim().trim_end_matches(" kB").parse::<u64>().expect("a number") * 1024
}

/// Programs, maps and links of the kernel.
fn bpf_objects() -> String {
    one_of(&[12, 11]).program("bpf_objects.py").run().expect(0)
}

/// The kernel frees them a little later.
#[track_caller]
fn wait_for_bpf_objects(expected: &str) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while bpf_objects() != expected {
        assert!(Instant::now() < deadline, "programs, maps, links: {} instead of {expected}", bpf_objects());
    }
}

#[test]
#[ignore = "written, and not yet run to green"]
fn tracing_that_is_stopped_and_begun_again_many_times_leaves_nothing_behind() {
    const MIB: u64 = 1 << 20;
    let Some(_alone) = can_trace() else { return };
    let objects = bpf_objects();
    let cycles = cycles(12);
    let mut process = one_of(&[12, 11, 10]).program("node_cycles.py").start_ready();
    let pid = process.pid();
    let mut node = Node::start(&agent().limit(Duration::from_hours(3)), RULES);
    node.wait_until("it is traced", |node| node.spans_of(pid) > 2);
    let cycle = |node: &mut Node| {
        node.tracing.agent.signal(Signal::USR1);
        node.wait_until("it is stopped", |node| node.metric("floe_agent_paused") > 0.0);
        node.wait_until("the probes are gone", |node| node.metric("floe_agent_probes") < 1.0);
        node.tracing.agent.signal(Signal::USR1);
        node.wait_until("it goes on", |node| node.metric("floe_agent_functions") > 0.0);
    };
    // The first ones fill what is kept.
    for _ in 0..3 {
        cycle(&mut node);
    }
    let in_between = bpf_objects();
    let state = |node: &Node| {
        let agent = node.metric("floe_agent_open_fds");
        (agent, memory(node.tracing.agent.pid()), memory(pid))
    };
    let before = state(&node);
    for _ in 0..cycles {
        cycle(&mut node);
    }
    let after = state(&node);
    let spans = node.spans_of(pid);
    node.wait_until("it is still traced", |node| node.spans_of(pid) > spans);
    say(&format!("cycles: {cycles}; file descriptors, memory of the agent and the program: {before:?}, {after:?}"));
    wait_for_bpf_objects(&in_between);
    assert!(after.0 < before.0 + 3.0, "file descriptors leak: {before:?}, {after:?}");
    assert!(after.1 < before.1 + 8 * MIB && after.2 < before.2 + MIB, "memory leaks: {before:?}, {after:?}");
    process.close_input();
    assert!(process.wait().expect(0).ends_with("unharmed\n"));
    node.stop().nothing_lost();
    wait_for_bpf_objects(&objects);
}

#[test]
#[ignore = "written, and not yet run to green"]
fn attaching_to_one_process_again_and_again_leaves_nothing_behind() {
    let Some(_alone) = can_trace() else { return };
    let cycles = cycles(5);
    for_each([one_of(&[12]), one_of(&[11])], |interpreter| {
        let objects = bpf_objects();
        let mut process = interpreter.program("node_cycles.py").start_ready();
        let cycle = || {
            let mut tracing = agent().attach(process.pid());
            tracing.wait_for_spans(2);
            tracing.agent.signal(Signal::INT);
            tracing.wait().finished.expect(0);
        };
        cycle();
        let before = memory(process.pid());
        for _ in 0..cycles {
            cycle();
        }
        let after = memory(process.pid());
        assert!(after < before + (1 << 20), "memory of the program grows: {before}, {after}");
        process.close_input();
        assert!(process.wait().expect(0).ends_with("unharmed\n"));
        wait_for_bpf_objects(&objects);
    });
}

#[test]
fn a_burst_of_forks_is_traced_and_unharmed() {
    const CHILDREN: i64 = 200;
    let Some(_alone) = can_trace() else { return };
    let mut node = Node::start(&agent(), RULES);
    let bomb = one_of(&[12, 11, 10]).program("node_forks.py").arg(CHILDREN.to_string()).run();
    bomb.expect(0);
    // The agent goes on.
    let after = one_of(&[12, 11, 10]).program("node_cycles.py").start_ready();
    node.wait_until("another process is traced", |node| node.spans_of(after.pid()) > 2);
    let pid = after.pid();
    after.wait().expect(0);
    let outcome = node.stop();
    outcome.nothing_lost();
    let mut calls: BTreeMap<i64, u32> = BTreeMap::new();
    for span in outcome.named("work").filter(|span| span.pid != pid) {
        *calls.entry(span.int("t.n").expect("captured")).or_default() += 1;
    }
    // One of each child, and one more of it and of its own child.
    assert_eq!(calls, (0..CHILDREN).map(|n| (n, 3)).collect(), "{outcome}");
}

#[test]
fn an_agent_that_is_told_to_end_while_it_exports_ends_and_says_what_is_lost() {
    let Some(_alone) = can_trace() else { return };
    // Accepts connections and never answers.
    let silent = TcpListener::bind("127.0.0.1:0").expect("there is a free port");
    let endpoint = format!("http://{}", silent.local_addr().expect("it is bound"));
    let process = one_of(&[12, 11, 10]).program("node_cycles.py").start_ready();
    let mut node = Node::start(&agent().option("--otlp").option(&endpoint), RULES);
    node.wait_until("it is traced", |node| node.spans_of(process.pid()) > 20);
    let (connection, _) = silent.accept().expect("the agent connects");
    node.tracing.agent.signal(Signal::TERM);
    let outcome = node.tracing.wait();
    drop(connection);
    outcome.finished.expect(0);
    let said = outcome.finished.err();
    assert!(said.lines().any(|line| line.contains(&endpoint) && line.contains("lost")), "{outcome}");
    let numbers: Vec<_> = outcome.named("work").map(|span| span.int("t.n").expect("captured")).collect();
    let first = numbers[0];
    assert!(numbers.iter().zip(first..).all(|(&n, expected)| n == expected), "the file has a gap: {numbers:?}");
    assert!(process.wait().expect(0).ends_with("unharmed\n"));
}

#[test]
fn a_full_disk_loses_the_spans_of_that_file_and_nothing_else() {
    let Some(_alone) = can_trace() else { return };
    let folder = tempfile::tempdir().expect("a temporary folder can be made");
    let small = folder.path().display();
    let script = format!("mount -t tmpfs -o size=64k none {small} && exec \"$@\"");
    let agent = agent().option("--output").option(folder.path().join("full.jsonl"));
    let process = one_of(&[12, 11, 10]).program("node_cycles.py").start_ready();
    let mut node = Node::start_with(&agent, &["unshare", "--mount", "/bin/sh", "-c", &script, "sh"], RULES);
    // Each is some hundred bytes.
    node.wait_until("there are more spans than fit", |node| node.spans_of(process.pid()) > 1000);
    assert_eq!(node.get("/healthz").0, 200);
    let outcome = node.stop();
    outcome.nothing_lost();
    let said = outcome.finished.err();
    assert!(said.lines().any(|line| line.contains("full.jsonl") && line.contains("lost")), "{outcome}");
    assert!(outcome.named("work").count() > 1000, "{outcome}");
    assert!(process.wait().expect(0).ends_with("unharmed\n"));
}
