//! SAFE: the agent may be killed at any moment; the traced program does not notice, and a new agent traces it again.

use std::thread;
use std::time::{Duration, Instant};

use floe_tests::{Agent, Interpreter, can_trace, for_each, one_of};
use rustix::process::Signal;

const KILLS: u64 = 50;
const PROBES: [&str; 4] = [
    "safe_target:outer(t.a=arg0, t.r=return)",
    "safe_target:inner(t.n=arg0, t.r=return)",
    "safe_target:leaf(t.n=arg0, t.twice=kwargs['twice'])",
    "safe_target:failing(t.n=arg0)",
];

fn agent() -> Agent {
    Agent::new().probes(&PROBES)
}

#[test]
fn killing_the_agent_in_the_middle_of_calls_changes_nothing_and_a_new_one_takes_over() {
    let Some(_alone) = can_trace() else { return };
    let mut chosen: Vec<&Interpreter> = [12, 11, 13].map(|minor| one_of(&[minor])).to_vec();
    chosen.dedup();
    // The fifty kills are shared among the interpreters.
    let kills = KILLS.div_ceil(chosen.len() as u64);
    for_each(chosen, |interpreter| {
        let run = interpreter.program("safe.py").limit(Duration::from_mins(3));
        let untraced = run.run();
        assert_eq!(untraced.code(), 7, "{untraced}");

        let mut program = run.start();
        program.wait_for_output("ready");
        for kill in 0..kills {
            let mut tracing = agent().attach(program.pid());
            tracing.wait_for_spans(1);
            // Not always at the same moment after a write.
            thread::sleep(Duration::from_micros(kill * 700));
            let killed = tracing.kill();
            assert_eq!(killed.code(), 137, "{killed}");
            assert!(!program.has_ended(), "the program ended after kill {kill}: {}", program.wait());
        }
        let mut last = agent().attach(program.pid());
        last.wait_for_spans(1000);
        program.close_input();
        let traced = program.wait();
        let outcome = last.wait();
        outcome.finished.expect(0);
        assert_eq!((traced.code(), traced.out()), (untraced.code(), untraced.out()), "{traced}");
        check(&outcome);
    });
}

#[test]
fn an_agent_that_is_told_to_stop_ends_well_and_the_program_goes_on() {
    let Some(_alone) = can_trace() else { return };
    let interpreter = one_of(&[12, 11]);
    let run = interpreter.program("safe.py");
    let untraced = run.run();
    let mut program = run.start();
    program.wait_for_output("ready");
    for signal in [Signal::INT, Signal::TERM, Signal::INT] {
        let mut tracing = agent().attach(program.pid());
        tracing.wait_for_spans(100);
        tracing.agent.signal(signal);
        let stopped = Instant::now();
        let outcome = tracing.wait();
        assert!(stopped.elapsed() < Duration::from_secs(10), "it took {:?} to stop", stopped.elapsed());
        outcome.finished.expect(0);
        check(&outcome);
    }
    // Nothing is armed any more: it is as fast as it was, which shows in the gate's hits of another agent's eyes.
    let mut tracing = Agent::new().probe("safe_target:absent").attach(program.pid());
    tracing.agent.wait_for_error("tracing process");
    thread::sleep(Duration::from_millis(500));
    tracing.agent.signal(Signal::INT);
    tracing.agent.close_input();
    let outcome = tracing.wait();
    assert_eq!(outcome.counter("gate_hits"), outcome.counter("loader_hits"), "{outcome}");
    program.close_input();
    let traced = program.wait();
    assert_eq!((traced.code(), traced.out()), (untraced.code(), untraced.out()), "{traced}");
}

#[test]
fn two_agents_trace_the_same_process() {
    let Some(_alone) = can_trace() else { return };
    let interpreter = one_of(&[12, 11]);
    let run = interpreter.program("safe.py");
    let untraced = run.run();
    let mut program = run.start();
    program.wait_for_output("ready");
    let mut one = agent().attach(program.pid());
    one.wait_for_spans(100);
    let mut other = agent().attach(program.pid());
    other.wait_for_spans(100);
    one.agent.signal(Signal::INT);
    check(&one.wait());
    thread::sleep(Duration::from_millis(300));
    program.close_input();
    let traced = program.wait();
    check(&other.wait());
    assert_eq!((traced.code(), traced.out()), (untraced.code(), untraced.out()), "{traced}");
}

/// What was captured is right, also in the calls that were open when the agent came.
fn check(outcome: &floe_tests::Outcome) {
    for span in &outcome.spans {
        let is = |name: &str, value: i64| span.int(name).is_none_or(|captured| captured == value);
        let right = match span.name.as_str() {
            "inner" => span.int("t.n").is_some_and(|n| is("t.r", n * 3)),
            "leaf" => span.int("t.n").is_some_and(|n| span.int("t.twice") == Some(n * 2)),
            "outer" | "failing" => true,
            _ => false,
        };
        assert!(right, "{span:?}");
    }
}
