//! What is armed: every implementation of a method, and the functions and ends of context managers.

use std::collections::BTreeMap;

use floe_tests::{Agent, Status, can_trace, for_each, interpreters, program};

#[test]
fn every_implementation_of_a_method_is_watched_also_of_classes_that_are_made_later() {
    let Some(_alone) = can_trace() else { return };
    for_each(interpreters(), |interpreter| {
        let agent = Agent::new().option("--pack").option(program("implementations.yaml"));
        let outcome = agent.exec(&interpreter.program("implementations.py"));
        let out = outcome.finished.expect(0);
        outcome.nothing_lost();
        let expected: BTreeMap<String, usize> = serde_json::from_str(&out).expect("the program prints JSON");
        let mut seen: BTreeMap<String, usize> = BTreeMap::new();
        for span in outcome.named("handle") {
            *seen.entry(span.text("t.class").expect("the class is captured").to_owned()).or_default() += 1;
        }
        assert_eq!(seen, expected, "{interpreter}: {outcome}");
        let said = outcome.finished.err().matches("is a generator or coroutine").count();
        assert_eq!(said, 1, "{interpreter}: {outcome}");
    });
}

#[test]
fn the_span_of_a_context_manager_is_its_block() {
    let Some(_alone) = can_trace() else { return };
    for_each(interpreters(), |interpreter| {
        let agent = Agent::new().option("--pack").option(program("contexts.yaml"));
        let outcome = agent.exec(&interpreter.program("contexts.py"));
        outcome.finished.expect(0);
        outcome.nothing_lost();
        let mut seen: BTreeMap<&str, usize> = BTreeMap::new();
        for span in &outcome.spans {
            *seen.entry(&span.name).or_default() += 1;
            let failed = matches!(span.status, Status::Error(_));
            assert_eq!(failed, span.name == "escapes", "{interpreter}: {span:?}");
        }
        seen.remove("never");
        let names = ["class", "crossed", "escapes", "inner", "method", "outer", "stack", "swallowed", "upper"];
        assert_eq!(seen, names.iter().map(|&name| (name, 3)).collect(), "{interpreter}: {outcome}");
        for (inner, outer) in [("inner", "outer"), ("upper", "stack"), ("class", "method")] {
            for span in outcome.named(inner) {
                let parent = outcome.spans.iter().find(|other| Some(&other.id) == span.parent.as_ref());
                let parent = parent.unwrap_or_else(|| panic!("{interpreter}: no parent of {span:?}: {outcome}"));
                assert_eq!(parent.name, outer, "{interpreter}: {outcome}");
                assert!(parent.start <= span.start && span.end <= parent.end, "{interpreter}: {outcome}");
            }
        }
    });
}
