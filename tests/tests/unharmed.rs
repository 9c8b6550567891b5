//! UNHARMED: under the agent, every program ends as it does without it.

use std::time::Duration;

use floe_tests::{Agent, Finished, Interpreter, Outcome, Run, can_trace, environments, for_each, interpreters};

const PROBES: [&str; 11] = [
    "unharmed_target:around(t.f=arg0.__name__)",
    "unharmed_target:outer",
    "unharmed_target:inner(t.r=return)",
    "unharmed_target:recurse(t.n=arg0, t.r=return)",
    "unharmed_target:deepest(t.n=arg0)",
    "unharmed_target:even(t.n=arg0)",
    "unharmed_target:odd(t.n=arg0)",
    "unharmed_target:raising(t.type=type(exception))",
    "unharmed_target:numbers(t.n=arg0)",
    "unharmed_target:later(t.n=arg0)",
    "unharmed_target:quick(t.n=arg0, t.r=return)",
];
/// What the agent says when it stops tracing a process that switches C stacks.
const SWITCHES: &str = "switches C stacks";
/// Environments with greenlet and what builds on it.
const ENVIRONMENTS: &str = "FLOE_TEST_PYTHON_UNHARMED";

fn agent() -> Agent {
    Agent::new().probes(&PROBES).limit(Duration::from_mins(1))
}

/// Runs a program with and without the agent and compares.
#[track_caller]
fn same(run: &Run) -> Outcome {
    let untraced = run.run();
    assert!(untraced.code() < 128, "it does not run untraced: {untraced}");
    let outcome = agent().exec(run);
    compare(&untraced, &outcome.finished);
    outcome
}

#[track_caller]
fn compare(untraced: &Finished, traced: &Finished) {
    if (untraced.code(), untraced.out()) != (traced.code(), traced.out()) {
        let (before, after) = (untraced.out(), traced.out());
        let (mut before, mut after) = (before.lines(), after.lines());
        let differing = loop {
            match (before.next(), after.next()) {
                (one, other) if one == other && one.is_some() => {}
                lines => break lines,
            }
        };
        panic!(
            "it differs: exit codes {} and {}, first different lines {differing:?}\n{}",
            untraced.code(),
            traced.code(),
            traced.err()
        );
    }
}

/// A program with each of these arguments in turn; prints the exit codes.
fn repeated(interpreter: &Interpreter, name: &str, arguments: &[&str]) -> Run {
    let (python, program) = (interpreter.path.display(), floe_tests::program(name));
    let lines =
        arguments.iter().map(|word| format!("'{python}' -B '{}' {word}; echo \"exit code $?\"\n", program.display()));
    Run::shell(&lines.collect::<String>())
}

#[track_caller]
fn calls_were_seen(outcome: &Outcome, name: &str, at_least: usize) {
    let seen = outcome.named(name).count();
    assert!(seen >= at_least, "{seen} of {at_least} calls of {name} were seen: {outcome}");
}

#[test]
fn exceptions_forks_processes_signals_coroutines_generators_threads_and_patches_are_unharmed() {
    let Some(_alone) = can_trace() else { return };
    for_each(interpreters(), |interpreter| {
        let outcome = same(&interpreter.program("ordinary.py"));
        calls_were_seen(&outcome, "quick", 200);
        calls_were_seen(&outcome, "raising", 5);
    });
}

#[test]
fn recursion_in_an_armed_function_goes_as_deep_as_untraced() {
    let Some(_alone) = can_trace() else { return };
    for_each(interpreters(), |interpreter| {
        let outcome = same(&interpreter.program("recursion.py"));
        calls_were_seen(&outcome, "recurse", 30);
        calls_were_seen(&outcome, "quick", 1);
        assert!(outcome.counter("calls_too_deep") > 0, "{outcome}");
        assert!(
            outcome.named("recurse").any(|span| span.get("floe.recursion").is_some()),
            "no span says that its function is nested too deep"
        );
    });
}

#[test]
fn daemon_threads_in_armed_calls_do_not_disturb_the_end() {
    let Some(_alone) = can_trace() else { return };
    for_each(interpreters(), |interpreter| {
        let outcome = same(&repeated(interpreter, "daemons.py", &["", ""]));
        calls_were_seen(&outcome, "recurse", 200);
    });
}

#[test]
fn a_seccomp_filter_of_a_container_runtime_is_survived() {
    let Some(_alone) = can_trace() else { return };
    for_each(interpreters(), |interpreter| {
        calls_were_seen(&same(&repeated(interpreter, "seccomp.py", &["EPERM", "ENOSYS"])), "quick", 2);
    });
}

#[test]
fn greenlets_that_return_out_of_order_live_and_the_agent_says_that_it_stopped() {
    switches("switch_greenlet.py", |_| true);
}

#[test]
fn gevent_lives_and_the_agent_says_that_it_stopped() {
    switches("switch_gevent.py", newer);
}

#[test]
fn eventlet_lives_and_the_agent_says_that_it_stopped() {
    switches("switch_eventlet.py", newer);
}

#[test]
fn the_asyncio_engine_of_sqlalchemy_lives_and_the_agent_says_that_it_stopped() {
    switches("switch_sqlalchemy.py", newer);
}

/// 3.11 and later: what is built on greenlet is tested on these only.
fn newer(interpreter: &Interpreter) -> bool {
    interpreter.minor >= 11
}

fn switches(program: &str, wanted: impl Fn(&Interpreter) -> bool) {
    let Some(_alone) = can_trace() else { return };
    let environments: Vec<_> = environments(ENVIRONMENTS).into_iter().filter(wanted).collect();
    if environments.is_empty() {
        return;
    }
    for_each(environments, |interpreter| {
        let outcome = same(&interpreter.program(program).arg("exec"));
        let said = outcome.finished.err();
        assert!(said.contains(SWITCHES), "the agent does not say that the process {SWITCHES}: {said}");
        assert!(outcome.counter("stack_switches") > 0, "{outcome}");
        // Before the first switch it was traced.
        calls_were_seen(&outcome, "quick", 20);
    });
}

#[test]
fn attaching_to_a_process_that_switches_stacks_does_not_harm_it() {
    let Some(_alone) = can_trace() else { return };
    let environments = environments(ENVIRONMENTS);
    if environments.is_empty() {
        return;
    }
    for_each(environments, |interpreter| {
        let mut program = interpreter.program("switch_greenlet.py").arg("attach").start();
        program.wait_for_output("ready");
        for _ in 0..3 {
            let mut tracing = agent().attach(program.pid());
            tracing.agent.wait_for_error(SWITCHES);
            assert!(!program.has_ended(), "it died: {}", program.wait());
            drop(tracing);
        }
        program.close_input();
        let traced = program.wait();
        assert_eq!(traced.expect(0), "ready\nswitched all the time\n");
    });
}

#[test]
fn a_process_that_is_only_linked_with_greenlet_is_traced() {
    let Some(_alone) = can_trace() else { return };
    let environments = environments(ENVIRONMENTS);
    if environments.is_empty() {
        return;
    }
    for_each(environments, |interpreter| {
        let script = "import sys; sys.path.insert(0, sys.argv[1])\n\
            import unharmed_target as t\n\
            print(t.outer(t.quick, 1))\n\
            import greenlet, sqlalchemy\n\
            print(sum(t.outer(t.quick, n) for n in range(50)))";
        let programs = floe_tests::program("unharmed_target.py");
        let run = interpreter.script(script).arg(programs.parent().expect("it is in a folder"));
        let outcome = same(&run);
        assert_eq!(outcome.named("quick").count(), 51, "{outcome}");
        assert!(!outcome.finished.err().contains(SWITCHES), "{}", outcome.finished);
    });
}

#[test]
fn a_process_that_overwrites_its_command_line_is_traced() {
    let Some(_alone) = can_trace() else { return };
    let environments = environments(ENVIRONMENTS);
    if environments.is_empty() {
        return;
    }
    for_each(environments, |interpreter| {
        let script = "import sys; sys.path.insert(0, sys.argv[1])\n\
            import setproctitle; setproctitle.setproctitle('not what it was')\n\
            import armed, idle_target\n\
            print('ready', flush=True); armed.wait_until_armed(idle_target.work)\n\
            for n in range(10): idle_target.work(n)";
        let programs = floe_tests::program("idle_target.py");
        let run = interpreter.script(script).arg(programs.parent().expect("it is in a folder"));
        let mut program = run.start();
        program.wait_for_output("ready");
        let tracing = Agent::new().probe("idle_target:work(t.n=arg0)").attach(program.pid());
        program.wait().expect(0);
        let outcome = tracing.wait();
        outcome.finished.expect(0);
        assert_eq!(outcome.named("work").count(), 10, "{outcome}");
    });
}
