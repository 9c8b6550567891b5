//! Processes: children of every kind are covered, what is open at a death is ended, and the command notices nothing.

use std::collections::{BTreeMap, BTreeSet};
use std::thread;
use std::time::{Duration, Instant};

use floe_tests::{Agent, Interpreter, Outcome, Run, Span, Status, can_trace, for_each, interpreters, one_of};
use rustix::process::Signal;

const PROBES: [&str; 3] = [
    "process_target:around",
    "process_target:work(t.n=arg0, t.pid=return[0])",
    "process_target:stay(t.f=arg0.__name__)",
];

fn agent() -> Agent {
    Agent::new().probes(&PROBES)
}

#[test]
fn calls_in_children_of_every_kind_are_seen_with_their_pids_in_one_trace() {
    let Some(_alone) = can_trace() else { return };
    for_each(interpreters(), |interpreter| {
        let outcome = agent().exec(&interpreter.program("children.py"));
        let printed = outcome.finished.expect(0);
        outcome.nothing_lost();
        let kinds: BTreeMap<String, Vec<(u32, i64)>> = serde_json::from_str(&printed).expect("the program prints JSON");
        let seen: Vec<(u32, i64)> =
            outcome.named("work").map(|span| (span.pid, span.int("t.n").expect("the argument is captured"))).collect();
        let mut wrong = Vec::new();
        for (kind, calls) in &kinds {
            let missing: Vec<_> = calls.iter().filter(|call| !seen.contains(call)).collect();
            if !missing.is_empty() {
                wrong.push(format!("{kind}: {} of {} calls are missing: {missing:?}", missing.len(), calls.len()));
            }
        }
        assert!(wrong.is_empty(), "{wrong:#?}\n{outcome}");
        assert_eq!(seen.len(), kinds.values().map(Vec::len).sum::<usize>(), "{outcome}");
        for span in outcome.named("work") {
            let pid = span.int("t.pid").expect("the result is captured");
            assert_eq!(pid, i64::from(span.pid), "{span:?}");
        }
        // Whoever started them was in a call.
        let root = outcome.named("around").next().expect("the outermost call has a span");
        let strangers: BTreeSet<u32> =
            outcome.named("work").filter(|span| span.trace != root.trace).map(|span| span.pid).collect();
        let kinds_of_strangers: BTreeSet<_> = kinds
            .iter()
            .filter(|(_, calls)| calls.iter().any(|(pid, _)| strangers.contains(pid)))
            .map(|(kind, _)| kind)
            .collect();
        assert!(strangers.is_empty(), "not in the trace of the process that started them: {kinds_of_strangers:?}");
    });
}

/// The three spans that are open when `ending.py` ends.
fn open_spans(outcome: &Outcome) -> Vec<&Span> {
    let spans: Vec<_> = outcome.spans.iter().collect();
    let mut names: Vec<_> = spans.iter().map(|span| span.name.as_str()).collect();
    names.sort_unstable();
    assert_eq!(names, ["around", "stay", "stay"], "{outcome}");
    for span in &spans {
        assert!(span.text("floe.incomplete").is_some(), "{span:?} is not marked");
        assert!(span.end > span.start, "{span:?}");
    }
    spans
}

#[test]
fn spans_that_are_open_when_a_process_dies_are_ended_and_marked_and_its_end_is_the_exit_code() {
    let Some(_alone) = can_trace() else { return };
    for_each(interpreters(), |interpreter| {
        for (end, code) in [("sigkill", 137), ("sigterm", 143), ("exit", 3), ("abort", 134), ("exec", 4)] {
            let outcome = agent().exec(&interpreter.program("ending.py").arg(end));
            outcome.finished.expect(code);
            for span in open_spans(&outcome) {
                let failed = matches!(span.status, Status::Error(_));
                assert!(failed || end == "exec", "{end}: {span:?}");
                if end == "sigkill" {
                    assert_eq!(span.int("floe.process.signal"), Some(9), "{span:?}");
                }
                if end == "exit" {
                    assert_eq!(span.int("process.exit.code"), Some(3), "{span:?}");
                }
            }
        }
    });
}

#[test]
fn attaching_ends_when_the_process_is_killed_from_outside() {
    let Some(_alone) = can_trace() else { return };
    let mut program = one_of(&[12, 11]).program("safe.py").start();
    program.wait_for_output("ready");
    let mut tracing = Agent::new().probe("safe_target:outer").attach(program.pid());
    tracing.wait_for_spans(10);
    program.signal(Signal::KILL);
    let killed = Instant::now();
    assert_eq!(program.wait().code(), 137);
    let outcome = tracing.wait();
    outcome.finished.expect(0);
    assert!(killed.elapsed() < Duration::from_secs(5), "it took {:?}", killed.elapsed());
}

#[test]
fn attaching_to_a_process_that_waits_arms_it_when_it_goes_on() {
    let Some(_alone) = can_trace() else { return };
    for_each(interpreters(), |interpreter| {
        let mut program = interpreter.program("idle.py").start();
        program.wait_for_output("ready");
        let mut tracing = Agent::new().probe("idle_target:work(t.n=arg0)").attach(program.pid());
        tracing.agent.wait_for_error("tracing process");
        thread::sleep(Duration::from_millis(200));
        program.close_input();
        program.wait().expect(0);
        let outcome = tracing.wait();
        outcome.finished.expect(0);
        assert_eq!(outcome.named("work").count(), 10, "{interpreter}: {outcome}");
    });
}

#[test]
fn the_first_process_of_an_interpreter_behind_a_shell_is_met_at_its_start() {
    let Some(_alone) = can_trace() else { return };
    for_each(interpreters(), |interpreter| {
        let programs = floe_tests::program("idle_target.py");
        let folder = programs.parent().expect("it is in a folder").display();
        let command = format!(
            "cd {folder} && {} -B -c 'import idle_target; [idle_target.work(n) for n in range(10)]'; true",
            interpreter.path.display()
        );
        let outcome = Agent::new().probe("idle_target:work(t.n=arg0)").exec(&Run::shell(&command));
        outcome.finished.expect(0);
        assert_eq!(outcome.named("work").count(), 10, "{interpreter}: {outcome}");
    });
}

#[test]
fn attaching_covers_the_children_that_there_are() {
    let Some(_alone) = can_trace() else { return };
    let interpreter = one_of(&[12, 11]);
    let script = "import os, sys; sys.path.insert(0, sys.argv[1])\n\
        import armed, idle_target\n\
        child = os.fork()\n\
        if child: print('ready', flush=True)\n\
        armed.wait_until_armed(idle_target.work)\n\
        for n in range(100): idle_target.work(n)\n\
        if child: sys.exit(os.waitpid(child, 0)[1])";
    let programs = floe_tests::program("idle_target.py");
    let run = interpreter.script(script).arg(programs.parent().expect("it is in a folder"));
    let mut program = run.start();
    program.wait_for_output("ready");
    thread::sleep(Duration::from_millis(200));
    let tracing = Agent::new().probe("idle_target:work(t.n=arg0)").attach(program.pid());
    program.wait().expect(0);
    let outcome = tracing.wait();
    outcome.finished.expect(0);
    let pids: BTreeSet<_> = outcome.spans.iter().map(|span| span.pid).collect();
    assert_eq!((pids.len(), outcome.spans.len()), (2, 200), "{outcome}");
}

#[test]
fn the_exit_code_of_exec_is_that_of_the_command() {
    let Some(_alone) = can_trace() else { return };
    for (script, code) in [
        ("exit 0", 0),
        ("exit 3", 3),
        ("exit 255", 255),
        ("kill -TERM $$", 143),
        ("kill -SEGV $$", 139),
        ("exec sleep 0", 0),
    ] {
        let outcome = Agent::new().exec(&Run::shell(script));
        assert_eq!(outcome.finished.code(), code, "{script}: {}", outcome.finished);
    }
}

#[test]
fn the_command_has_the_surroundings_and_the_streams_that_it_would_have_had() {
    let Some(_alone) = can_trace() else { return };
    let interpreter = one_of(&[12, 11]);
    let input: Vec<u8> = (0..=255_u8).cycle().take(1 << 18).collect();
    let run = interpreter
        .program("surroundings.py")
        .args(["--output", "--", "a b", "", "\u{e9}"])
        .variable("SOME_VARIABLE", "some value")
        .folder(std::path::Path::new("/usr"))
        .input(&input);
    let (untraced, traced) = (run.run(), agent().exec(&run).finished);
    assert_eq!(untraced.code(), 201, "{untraced}");
    let (one, other) = (untraced.out(), traced.out());
    let differing: Vec<_> = one.lines().zip(other.lines()).filter(|(one, other)| one != other).collect();
    assert!(differing.is_empty(), "untraced and traced differ: {differing:#?}");
    assert!(untraced.stdout == traced.stdout, "untraced and traced differ in {traced}");
    assert_eq!(traced.code(), 201, "{traced}");
}

#[test]
fn ctrl_c_reaches_the_command_which_ends_as_it_wants() {
    let Some(_alone) = can_trace() else { return };
    let script = "import os, signal, sys; sys.path.insert(0, sys.argv[1])\n\
        import process_target as t\n\
        def stop(*_): raise SystemExit(t.around(int, '42'))\n\
        signal.signal(signal.SIGINT, stop); signal.signal(signal.SIGTERM, stop)\n\
        print('ready', flush=True)\n\
        t.stay(signal.pause)";
    let programs = floe_tests::program("process_target.py");
    let interpreter: &Interpreter = one_of(&[12, 11]);
    let run = interpreter.script(script).arg(programs.parent().expect("it is in a folder"));
    for to_all in [true, false] {
        let mut tracing = agent().start(&run);
        tracing.agent.wait_for_output("ready");
        thread::sleep(Duration::from_millis(100));
        if to_all {
            // As a terminal does it.
            tracing.agent.signal_group(Signal::INT);
        } else {
            // As a service manager does it; the command is to be told.
            tracing.agent.signal(Signal::TERM);
        }
        let outcome = tracing.wait();
        outcome.finished.expect(42);
        let names: BTreeSet<_> = outcome.spans.iter().map(|span| span.name.as_str()).collect();
        assert_eq!(names, BTreeSet::from(["around", "stay"]), "{outcome}");
    }
}
