//! What is told of an exception that leaves a watched function or block, or comes into a watched function, compared with what
//! Python says of it.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;

use floe_tests::{Agent, Outcome, Span, Status, can_trace, for_each, interpreters};
use serde_json::Value;

const PROBES: [&str; 3] =
    ["exceptions_target:run(t.case=arg0)", "exceptions_target:raise_often", "exceptions_target:ends_normally"];

/// Calls of `raise_often` in the program.
const OFTEN: usize = 3000;

/// What Python says, by case: `type`, `message`, `trace`.
type Cases = BTreeMap<String, BTreeMap<String, Option<String>>>;

#[test]
fn an_exception_has_the_type_the_message_and_the_stack_trace_that_python_prints() {
    let Some(_alone) = can_trace() else { return };
    for_each(interpreters(), |interpreter| {
        let folder = tempfile::tempdir().expect("a temporary folder can be made");
        let file = folder.path().join("exceptions.json");
        let run = interpreter.program("exceptions.py").arg(&file).arg(folder.path());
        let pack = floe_tests::program("exceptions.yaml");
        let outcome = Agent::new().probes(&PROBES).option("--pack").option(pack).exec(&run);
        outcome.finished.expect(0);
        outcome.nothing_lost();
        let expected = fs::read_to_string(&file).expect("the program wrote what Python says");
        compare(&outcome, &serde_json::from_str(&expected).expect("the file is JSON"));
        often(&outcome);
        for span in outcome.named("ends_normally") {
            assert_eq!((&span.status, span.events.len()), (&Status::Unset, 0), "{span:?}");
        }
    });
}

fn attribute<'a>(span: &'a Span, name: &str) -> Option<&'a str> {
    let event = span.events.iter().find(|event| event.name == "exception")?;
    event.attributes.get(name).and_then(Value::as_str)
}

fn compare(outcome: &Outcome, expected: &Cases) {
    let mut wrong = BTreeSet::new();
    let mut right = BTreeSet::new();
    // A thread that waited in vain has no stack trace; each case is there three times.
    let may_lack = outcome.counter("wait_timeouts") > 0;
    for span in outcome.with("t.case") {
        // What a handler is told is no failure of its own.
        if matches!(span.status, Status::Error(_)) == (span.name == "node") {
            wrong.insert(format!("{}: {:?}", span.name, span.status));
        }
        let case = span.text("t.case").expect("its case");
        let says = |name: &str| expected[case][name].as_deref();
        let Some(trace) = attribute(span, "exception.stacktrace") else {
            if !may_lack {
                wrong.insert(format!("{case}: no stack trace"));
            }
            continue;
        };
        if attribute(span, "exception.type") != says("type") {
            wrong.insert(format!("{case}: type {:?}, must be {:?}", attribute(span, "exception.type"), says("type")));
        }
        if let Some(message) = says("message")
            && attribute(span, "exception.message").unwrap_or_default() != message
        {
            wrong.insert(format!("{case}: message {:?}, must be {message:?}", attribute(span, "exception.message")));
        }
        let printed = says("trace").expect("every case has one");
        // Where the message needs the program's code, so does the last line.
        let same = if says("message").is_some() { trace == printed } else { frames(trace) == frames(printed) };
        if same {
            right.insert(case);
        } else {
            wrong.insert(format!("{case}: stack trace\n{trace}must be\n{printed}"));
        }
    }
    for case in expected.keys().filter(|case| !right.contains(case.as_str())) {
        wrong.insert(format!("{case}: never right"));
    }
    let lines: Vec<_> = wrong.iter().take(30).map(String::as_str).collect();
    assert!(wrong.is_empty(), "{} are wrong:\n{}\n{outcome}", wrong.len(), lines.join("\n"));
}

fn frames(trace: &str) -> Vec<&str> {
    trace.lines().filter(|line| line.starts_with("  ")).collect()
}

/// A function that raises all the time does not wait all the time, and what is not read is counted.
fn often(outcome: &Outcome) {
    let spans: Vec<_> = outcome.named("raise_often").collect();
    assert_eq!(spans.len(), OFTEN, "{outcome}");
    for (number, span) in spans.iter().enumerate() {
        assert_eq!(attribute(span, "exception.type"), Some("ValueError"), "{span:?}");
        assert_eq!(attribute(span, "exception.message"), Some(&*format!("number {number}")), "{span:?}");
    }
    let read = spans.iter().filter(|span| attribute(span, "exception.stacktrace").is_some()).count();
    let unread = outcome.counter("exceptions_without_stacktrace") as usize;
    assert!(unread > 0, "{outcome}");
    assert!(read > 0 && read + unread <= OFTEN, "{read} read, {unread} not: {outcome}");
}
