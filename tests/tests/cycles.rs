//! Attaching and detaching again and again, and ends at bad moments: nothing is left behind, and programs are unharmed.
//!
//! `FLOE_CYCLES=N` makes the first two so many cycles long, for a run by hand.

use std::{
    collections::BTreeMap,
    env, fs,
    net::TcpListener,
    time::{Duration, Instant},
};

use floe_tests::{Agent, Node, can_trace, for_each, one_of, say};
use rustix::process::Signal;
use serde_json::Value;

/// Cycles of a test, and the time after which they are enough.
const USUAL: u32 = 300;
const TIME: Duration = Duration::from_secs(20);
const MIB: u64 = 1 << 20;
const RULES: &str = "discovery: {instrument: [{modules: [node_target]}]}\n";

fn agent() -> Agent {
    Agent::new().probe("node_target:work(t.n=arg0)")
}

/// Does something as often as is wanted, or else as there is time for; gives how often it was.
fn repeat(mut cycle: impl FnMut()) -> u32 {
    let wanted: Option<u32> = env::var("FLOE_CYCLES").ok().and_then(|cycles| cycles.parse().ok());
    let began = Instant::now();
    let mut done = 0;
    while done < wanted.unwrap_or(USUAL) && (wanted.is_some() || began.elapsed() < TIME) {
        cycle();
        done += 1;
    }
    done
}

/// Memory of a process, in bytes.
fn memory(pid: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("it runs");
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("it has memory");
    line.trim().trim_end_matches(" kB").parse::<u64>().expect("a number") * 1024
}

/// The programs, maps and links that a process holds.
fn bpf_objects(pid: u32) -> Value {
    let said = one_of(&[12, 11]).program("bpf_objects.py").arg(pid.to_string()).run().expect(0);
    serde_json::from_str(&said).expect("it prints JSON")
}

/// Waits until the kernel has none of these any more, which it frees a little after they are closed.
#[track_caller]
fn wait_until_gone(objects: &Value) {
    let kinds = objects.as_object().expect("by kind");
    assert!(kinds.values().all(|ids| ids[0].is_u64()), "the agent had some of each: {objects}");
    let left = one_of(&[12, 11]).program("bpf_objects.py").arg("left").input(objects.to_string().as_bytes());
    let deadline = Instant::now() + Duration::from_secs(30);
    while left.run().expect(0).trim() != "0" {
        assert!(Instant::now() < deadline, "{} of these are left: {objects}", left.run().out());
    }
}

#[test]
fn tracing_that_is_stopped_and_begun_again_many_times_leaves_nothing_behind() {
    let Some(_alone) = can_trace() else { return };
    let mut process =
        one_of(&[12, 11, 10]).program("node_cycles.py").arg("0.01").limit(Duration::from_hours(12)).start_ready();
    let pid = process.pid();
    let mut node = Node::start(&agent().limit(Duration::from_hours(12)), RULES);
    let agent = node.tracing.agent.pid();
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
    let before = node.settled_files(None);
    let memories = [memory(agent), memory(pid)];
    let cycles = repeat(|| cycle(&mut node));
    let now = [memory(agent), memory(pid)];
    say(&format!(
        "cycles: {cycles} of pausing and going on; memory of the agent and the program: {memories:?}, {now:?}"
    ));
    node.settled_files(Some(&before));
    assert!(now[0] < memories[0] + 8 * MIB && now[1] < memories[1] + MIB, "memory leaks: {memories:?}, {now:?}");
    let spans = node.spans_of(pid);
    node.wait_until("it is still traced", |node| node.spans_of(pid) > spans);
    process.close_input();
    assert!(process.wait().expect(0).ends_with("unharmed\n"));
    let objects = bpf_objects(agent);
    node.stop().nothing_lost();
    wait_until_gone(&objects);
}

#[test]
fn attaching_to_one_process_again_and_again_leaves_nothing_behind() {
    let Some(_alone) = can_trace() else { return };
    for_each([one_of(&[12]), one_of(&[11])], |interpreter| {
        let mut process = interpreter.program("node_cycles.py").limit(Duration::from_hours(12)).start_ready();
        let mut objects = Vec::new();
        let mut cycle = || {
            // Spans are watched as they come: none is to wait for its run to be known.
            let mut tracing = agent().option("--set").option("correlation.hold=0").attach(process.pid());
            tracing.wait_for_spans(2);
            objects.push(bpf_objects(tracing.agent.pid()));
            tracing.agent.signal(Signal::INT);
            tracing.wait().finished.expect(0);
        };
        cycle();
        let before = memory(process.pid());
        let cycles = repeat(&mut cycle);
        let after = memory(process.pid());
        say(&format!("cycles: {cycles} of attaching to {interpreter}; memory of the program: {before}, {after}"));
        assert!(after < before + MIB, "memory of the program grows: {before}, {after}");
        process.close_input();
        assert!(process.wait().expect(0).ends_with("unharmed\n"));
        objects.iter().for_each(wait_until_gone);
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
