//! Every kind of call on every interpreter: the spans and the captured arguments are those that the program made itself.

use std::collections::{BTreeMap, HashMap};
use std::fmt::Write as _;
use std::fs;
use std::time::Duration;

use floe_tests::{Agent, Interpreter, Outcome, Span, can_trace, for_each, interpreters, say};
use serde_json::Value;

const CALLS: usize = 2000;
const PROBES: [&str; 25] = [
    "matrix_target:exact(t.a=arg0, t.b=arg1, t.r=return)",
    "matrix_target:defaults(t.a=arg0, t.b=arg(1, 'b'), t.c=arg(2, 'c'))",
    "matrix_target:keyword(t.a=arg(0, 'a'), t.b=arg(1, 'b'))",
    "matrix_target:keyword_only(t.a=arg0, t.b=kwargs['b'])",
    "matrix_target:star(t.a=arg0, t.b=arg1, t.c=arg2, t.d=arg3)",
    "matrix_target:star_star(t.x=kwargs['x'], t.y=kwargs['y'], t.z=kwargs['z'])",
    "matrix_target:from_map(t.a=arg0)",
    "matrix_target:sort_key(t.a=arg0)",
    "matrix_target:partial(t.a=arg0, t.b=arg1)",
    "matrix_target:recurse(t.n=arg0)",
    "matrix_target:threaded(t.a=arg0)",
    "matrix_target:thread_target(t.a=arg0, t.b=kwargs['b'])",
    "matrix_target:forked(t.a=arg0)",
    "matrix_target:generator(t.a=arg0)",
    "matrix_target:coroutine(t.a=arg0)",
    "matrix_target:raises(t.a=arg0, t.m=exception.args[0])",
    "matrix_target:Thing.method(t.of=self.name, t.a=arg1)",
    "matrix_target:Thing.bound(t.of=self.name, t.a=arg1)",
    "matrix_target:Thing.class_method(t.a=arg1)",
    "matrix_target:Thing.static_method(t.a=arg0)",
    "matrix_target:Thing.getter(t.of=self.name, t.r=return)",
    "matrix_target:Thing.__getitem__(t.of=self.name, t.a=arg1)",
    "matrix_target:Thing.__call__(t.of=self.name, t.a=arg1)",
    "matrix_target:Derived.method(t.of=self.name, t.a=arg1)",
    "matrix_target:Made.__init__(t.a=arg1)",
];

/// Calls that are documented to go past the gate: CPython 3.13 calls `__init__` without it, 3.14 also property getters;
/// 3.11 before 3.11.4 inlines `__getitem__` whatever is done (cpython#104405).
fn past_the_gate(interpreter: &Interpreter, span: &str) -> bool {
    match span {
        "Thing.__getitem__" => ["3.11.0", "3.11.1", "3.11.2", "3.11.3"].contains(&interpreter.version.as_str()),
        "Made.__init__" => interpreter.minor >= 13,
        "Thing.getter" => interpreter.minor >= 14,
        _ => false,
    }
}

#[test]
fn there_are_interpreters_to_test_on() {
    let found: Vec<_> = interpreters().iter().map(ToString::to_string).collect();
    say(&format!("INTERPRETERS: {} found: {}", found.len(), found.join(", ")));
    if std::env::var("FLOE_REQUIRE_BPF").is_ok_and(|value| value == "1") {
        assert!(found.len() >= 2, "the tests need at least two CPythons from 3.8 to 3.14, found {found:?}");
    }
}

#[test]
fn every_call_of_a_function_that_is_armed_at_its_import_is_a_span() {
    let Some(_alone) = can_trace() else { return };
    for_each(interpreters(), |interpreter| {
        let folder = tempfile::tempdir().expect("a temporary folder can be made");
        let file = folder.path().join("calls.json");
        let run = interpreter.program("matrix.py").args(["exec", &CALLS.to_string()]).arg(&file);
        let outcome = agent().exec(&run);
        outcome.finished.expect(0);
        compare(interpreter, &outcome, &fs::read_to_string(&file).expect("the program wrote what it called"));
    });
}

#[test]
fn every_call_of_a_function_that_is_armed_when_its_callers_are_specialised_is_a_span() {
    let Some(_alone) = can_trace() else { return };
    for_each(interpreters(), |interpreter| {
        let folder = tempfile::tempdir().expect("a temporary folder can be made");
        let file = folder.path().join("calls.json");
        let run = interpreter.program("matrix.py").args(["attach", &CALLS.to_string()]).arg(&file);
        let mut program = run.limit(Duration::from_mins(2)).start();
        program.wait_for_output("ready");
        let tracing = agent().attach(program.pid());
        let finished = program.wait();
        let outcome = tracing.wait();
        assert_eq!(finished.code(), 0, "{finished}\nthe agent: {}", outcome.finished);
        outcome.finished.expect(0);
        compare(interpreter, &outcome, &fs::read_to_string(&file).expect("the program wrote what it called"));
    });
}

fn agent() -> Agent {
    Agent::new().probes(&PROBES).limit(Duration::from_mins(2))
}

/// How often each call was made: span name, process, attributes.
type Calls = BTreeMap<(String, u32, String), i64>;

fn compare(interpreter: &Interpreter, outcome: &Outcome, file: &str) {
    outcome.nothing_lost();
    let mut calls = Calls::new();
    let expected: BTreeMap<String, BTreeMap<u32, Vec<Value>>> = serde_json::from_str(file).expect("the file is JSON");
    for (name, processes) in expected {
        for (pid, of_process) in processes {
            for attributes in of_process {
                *calls.entry((name.clone(), pid, attributes.to_string())).or_default() += 1;
            }
        }
    }
    for span in &outcome.spans {
        let attributes: Value = span.with_prefix("t.").into_iter().collect();
        *calls.entry((span.name.clone(), span.pid, attributes.to_string())).or_default() -= 1;
    }
    let mut wrong = String::new();
    let mut by_name: BTreeMap<String, (i64, i64, Vec<String>)> = BTreeMap::new();
    for ((name, pid, attributes), difference) in calls {
        // Generators and coroutines return at once: the agent says so, and makes no span of them.
        let returns_at_once = ["generator", "coroutine"].contains(&name.as_str());
        let allowed = difference >= 0 && (returns_at_once || past_the_gate(interpreter, &name));
        if difference == 0 || allowed {
            continue;
        }
        let (missing, too_many, examples) = by_name.entry(name).or_default();
        *missing += difference.max(0);
        *too_many += (-difference).max(0);
        examples.push(format!("{attributes} in {pid}: {}", if difference > 0 { "no span" } else { "a span too many" }));
    }
    for (name, (missing, too_many, examples)) in by_name {
        let examples = examples[..examples.len().min(2)].join("; ");
        let _ = write!(wrong, "\n  {name}: {missing} missing, {too_many} too many ({examples})");
    }
    let said = outcome.finished.err();
    for name in ["matrix_target:generator", "matrix_target:coroutine"] {
        let lines = said.lines().filter(|line| line.contains(name)).count();
        assert_eq!(lines, 1, "it is said once that {name} is not traced: {outcome}");
    }
    assert!(wrong.is_empty(), "the spans are not the calls: {wrong}\n{outcome}");
    parents(&outcome.spans);
    exceptions(outcome);
}

/// A recursive call is the child of the call that made it, and within it.
fn parents(spans: &[Span]) {
    let by_id: HashMap<&str, &Span> = spans.iter().map(|span| (span.id.as_str(), span)).collect();
    assert_eq!(by_id.len(), spans.len(), "span ids are not unique");
    for span in spans {
        assert!(span.start <= span.end, "it ends before it begins: {span:?}");
        let parent = span.parent.as_deref().map(|id| by_id[id]);
        if let Some(parent) = parent {
            assert_eq!(span.trace, parent.trace, "{span:?} and its parent {parent:?} are in different traces");
        }
        let nested = match span.name.as_str() {
            "recurse" => span.int("t.n") != Some(9),
            "Thing.method" => span.text("t.of") == Some("derived"),
            _ => continue,
        };
        assert_eq!(parent.is_some(), nested, "{span:?} has the parent {parent:?}");
        if let Some(parent) = parent {
            assert!(parent.start <= span.start && span.end <= parent.end, "{span:?} is not within {parent:?}");
            if span.name == "recurse" {
                assert_eq!(parent.int("t.n"), span.int("t.n").map(|n| n + 1), "{span:?} has the parent {parent:?}");
            } else {
                assert_eq!(parent.name, "Derived.method");
            }
        }
    }
}

/// A call that raises is an error, with the exception as an event.
fn exceptions(outcome: &Outcome) {
    for span in outcome.named("raises") {
        let message = format!("no {}", span.int("t.a").expect("the argument is there"));
        assert!(
            matches!(&span.status, floe_tests::Status::Error(text) if text.contains("ValueError") && text.contains(&message)),
            "{span:?}"
        );
        let [event] = &span.events[..] else { panic!("one event in {span:?}") };
        assert_eq!(event.name, "exception");
        assert_eq!(event.attributes["exception.type"], "ValueError", "{span:?}");
        assert_eq!(event.attributes["exception.message"], message.as_str(), "{span:?}");
    }
}
