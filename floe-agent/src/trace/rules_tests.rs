//! The rules of events, context managers and keys, each with events made by hand.

use opentelemetry::trace::SpanKind;

use super::tests::*;
use super::*;
use crate::kernel::event::{Outcome, Value};

const PACK: &str = r#"
pack: test
probes:
  - name: command
    target: m:command
    span: {name: cmd, role: command}
    attributes: {cmd.user: arg0}
  - name: plain
    target: m:plain
    span: {name: plain}
  - name: stage
    kind: contextmanager
    target: m:stage
    span: {name: "{_name}", unless: {_name: [quiet]}}
    attributes:
      _name: {path: arg0, values: {load: stage1, check: stage2}}
      stage: {path: arg0, values: {load: load, check: check, "*": null}}
      "*": arg1
  - name: attribute
    kind: event
    target: m:set_attribute
    attributes: {_key: arg1, _value: arg2}
    on: innermost
    dynamic: {name: _key, value: _value, prefixes: [stage., exception.]}
  - name: log
    kind: event
    target: m:log
    attributes:
      _event: arg0
      _error.type: arg1
      _error.message: arg2
      _error.stack: arg3
      _retries: arg4
      step: arg5
      run: arg6
      asset: arg7
    rules:
      - when: {_event: [RUN]}
        begin: {id: run, name: "run {run}", key: "{run}", role: command}
        attributes: [run]
      - when: {_event: [RUN_END]}
        end: run
        attributes: []
      - when: {_event: [START, RESTART]}
        begin: {id: step, name: "step {step}", key: "{run}/{step}", role: command, inherit: [cmd.user]}
        attributes: [run, step]
        set:
          attempt: [{const: 1}, {template: "{_retries.{step}}", add: 1}]
      - when: {_event: [DONE, FAILED]}
        end: step
        attributes: []
        exception:
          type: ["{_error.type}"]
          message: "{_error.message}"
          stacktrace: "Traceback (most recent call last):\n{_error.stack}{_error.message}"
        status: {from: _event, error: [FAILED]}
      - when: {_event: [ASSET]}
        on: step
        event: {name: "materialised {asset}", attributes: [asset]}
      - when: {_event: [SKIP]}
        begin: {id: skipped, name: "skipped {step}", instant: true, parent: "{run}", role: node}
  - name: compute
    kind: pair
    target: m:compute
    span: {name: compute, key: "{run}/{step}/compute", inherit: [run, step], kind: client}
    attributes: {_returned: type(return)}
    end:
      - {target: return, unless: {_returned: [generator, coroutine]}}
      - {target: "m:outputs", at: enter}
  - name: model
    target: m:model
    span:
      name: ["model {one}", "{name}"]
      key: "{name}"
      unless: {upstream: [ghost]}
      links: [{each: upstream, key: "{value}"}, {key: "{name}/twin"}]
    attributes: {name: arg0, one: {only: upstream}, upstream: arg1, outcome: return, _why: return.why}
    status: {from: outcome, error: [error]}
    exception: {type: "{_why}"}
  - name: side
    kind: pair
    target: m:side
    span: {name: side, role: leaf, key: "{k}"}
    attributes: {k: arg0}
    end: [{target: "m:side_end", attributes: {k: arg0}}]
  - name: write
    target: m:Base.write
    implementations: true
    span: {name: write}
    attributes: {what: arg1}
"#;

const COMMAND: u32 = 0;
const PLAIN: u32 = 1;
const STAGE: u32 = 2;
const ATTRIBUTE: u32 = 3;
const LOG: u32 = 4;
const COMPUTE: u32 = 5;
const OUTPUTS: u32 = 6;
const MODEL: u32 = 7;
const SIDE: u32 = 8;
const SIDE_END: u32 = 9;
const WRITE: u32 = 10;
const EXIT: u32 = 11;

fn world() -> World {
    World::with(PACK)
}

impl World {
    fn stage(&mut self, at: At, depth: u32, object: u64, name: &str) {
        let call = self.enter(at, STAGE, depth, &[("_name", s(name)), ("stage", s(name))]);
        self.leave_object(at, STAGE, call, Outcome::Returned, object, &[]);
    }

    /// `__exit__` without an exception.
    fn exit_stage(&mut self, at: At, depth: u32, object: u64) {
        let call = self.enter_object(at, EXIT, depth, object, &[("exception.type", s("NoneType"))]);
        self.leave(at, EXIT, call, &[]);
    }

    fn log(&mut self, at: At, depth: u32, event: &str, values: &[(&str, Value)]) {
        let mut all = vec![("_event", s(event))];
        all.extend_from_slice(values);
        let call = self.enter(at, LOG, depth, &all);
        self.leave(at, LOG, call, &[]);
    }

    fn step(&mut self, at: At, event: &str, step: &str) {
        self.log(at, 0, event, &[("run", s("r1")), ("step", s(step))]);
    }
}

fn names(spans: &[SpanData]) -> Vec<&str> {
    spans.iter().map(|span| &*span.name).collect()
}

#[test]
fn a_context_manager_is_a_span_from_its_making_to_its_exit() {
    let mut w = world();
    let command = w.enter(MAIN, COMMAND, 0, &[]);
    w.stage(MAIN, 1, 0x100, "load");
    let began = w.now;
    w.stage(MAIN, 1, 0x200, "other");
    let inside = w.enter(MAIN, PLAIN, 1, &[]);
    w.leave(MAIN, PLAIN, inside, &[]);
    w.exit_stage(MAIN, 1, 0x200);
    w.exit_stage(MAIN, 1, 0x100);
    let ended = w.now;
    w.leave(MAIN, COMMAND, command, &[]);
    let [inside, other, load, command] = w.spans().try_into().unwrap();
    assert_eq!((&*load.name, get(&load, "stage").as_deref()), ("stage1", Some("load")));
    assert_eq!((&*other.name, get(&other, "stage")), ("other", None), "a name that the pack does not know stays");
    assert_eq!(get(&load, "_name"), None, "for the pack only");
    assert_eq!(load.start_time, SystemTime::UNIX_EPOCH + Duration::from_nanos(began));
    assert_eq!(load.end_time, SystemTime::UNIX_EPOCH + Duration::from_nanos(ended));
    assert_eq!(inside.parent_span_id, id(&other));
    assert_eq!(other.parent_span_id, id(&load));
    assert_eq!(load.parent_span_id, id(&command));
    assert_eq!(error(&load), None);
    assert_eq!(w.assembler.open_spans(), 0);
}

#[test]
fn all_entries_of_a_dict_are_attributes_but_none_that_the_agent_sets() {
    let mut w = world();
    let entries = vec![
        ("stage.rows".to_owned(), Value::Int(3)),
        ("error.type".to_owned(), s("mine")),
        ("n".repeat(200), Value::Int(1)),
        ("gone".to_owned(), Value::None),
    ];
    let call = w.enter(MAIN, STAGE, 0, &[("_name", s("load")), ("*", Value::Map(entries))]);
    w.leave_object(MAIN, STAGE, call, Outcome::Returned, 0x100, &[]);
    w.exit_stage(MAIN, 0, 0x100);
    let span = w.span();
    assert_eq!(get(&span, "stage.rows").as_deref(), Some("3"));
    assert_eq!(get(&span, "error.type"), None);
    assert_eq!(get(&span, "gone"), None);
    assert_eq!(span.dropped_attributes_count, 2);
}

#[test]
fn an_exception_in_a_block_is_its_spans_and_no_others() {
    let mut w = world();
    let command = w.enter(MAIN, COMMAND, 0, &[]);
    w.stage(MAIN, 1, 0x100, "load");
    let values = [("exception.type", s("ValueError")), ("exception.message", s("bad spec"))];
    let exit = w.enter_object(MAIN, EXIT, 1, 0x100, &values);
    w.leave(MAIN, EXIT, exit, &[]);
    w.leave(MAIN, COMMAND, command, &[]);
    let [load, command] = w.spans().try_into().unwrap();
    assert_eq!(error(&load).as_deref(), Some("ValueError: bad spec"));
    assert_eq!(load.events.events.len(), 1);
    assert_eq!(get(&load, "error.type").as_deref(), Some("ValueError"));
    assert_eq!(error(&command), None, "it was handled");
}

#[test]
fn the_exception_of_a_block_has_its_stack_trace_where_that_was_read() {
    let mut w = world();
    w.stage(MAIN, 0, 0x100, "load");
    let exit = w.enter_object(MAIN, EXIT, 0, 0x100, &[("exception.type", s("NoSuchDay"))]);
    let read = crate::python::exception::ExceptionFacts {
        type_name: "shop.NoSuchDay".into(),
        message: Some("Monday".into()),
        stacktrace: "Traceback".into(),
    };
    w.assembler.exception(Pid(MAIN.0), Epoch(MAIN.1), Tid(MAIN.2), BootNanos(exit), read);
    w.leave_with(MAIN, EXIT, exit, Outcome::Raised, &[("exception.type", s("NoSuchDay"))]);
    let span = w.span();
    assert_eq!(error(&span).as_deref(), Some("shop.NoSuchDay: Monday"));
    let event = &span.events.events[0];
    assert!(event.attributes.iter().any(|kv| kv.key.as_str() == "exception.stacktrace"), "{event:?}");
}

#[test]
fn an_exception_that_the_end_of_a_block_brings_about_is_its_spans() {
    let mut w = world();
    w.stage(MAIN, 0, 0x100, "load");
    let exit = w.enter_object(MAIN, EXIT, 0, 0x100, &[("exception.type", s("NoneType"))]);
    w.raise(MAIN, EXIT, exit, "OSError", Some(s("disk full")));
    assert_eq!(error(&w.span()).as_deref(), Some("OSError: disk full"));
}

#[test]
fn a_block_may_end_in_another_thread_and_a_foreign_exit_ends_nothing() {
    let mut w = world();
    w.stage(MAIN, 0, 0x100, "load");
    w.exit_stage(POOL, 0, 0x999);
    assert!(w.spans().is_empty());
    w.exit_stage(POOL, 0, 0x100);
    assert_eq!(get(&w.span(), "thread.id").as_deref(), Some("100"), "the thread that began it");
}

#[test]
fn a_context_manager_that_is_not_made_or_left_out_is_no_span() {
    let mut w = world();
    let call = w.enter(MAIN, STAGE, 0, &[("_name", s("load"))]);
    w.raise(MAIN, STAGE, call, "TypeError", None);
    w.stage(MAIN, 0, 0x100, "quiet");
    w.exit_stage(MAIN, 0, 0x100);
    assert!(w.spans().is_empty());
    assert_eq!(w.assembler.open_spans(), 0);
}

#[test]
fn a_block_whose_exit_was_not_seen_is_over_when_the_call_around_it_is() {
    let mut w = world();
    let command = w.enter(MAIN, COMMAND, 0, &[]);
    w.stage(MAIN, 1, 0x100, "load");
    w.leave(MAIN, COMMAND, command, &[]);
    let [stage, command] = w.spans().try_into().unwrap();
    assert_eq!(get(&stage, "floe.incomplete").as_deref(), Some("end not seen"));
    assert_eq!(get(&command, "floe.incomplete"), None);
    // The address is used again.
    w.stage(MAIN, 0, 0x100, "load");
    w.stage(MAIN, 0, 0x100, "check");
    assert_eq!(names(&w.spans()), ["stage1"]);
    w.exit_stage(MAIN, 0, 0x100);
    let span = w.span();
    assert_eq!((&*span.name, span.parent_span_id), ("stage2", SpanId::INVALID), "not inside the one before");
}

#[test]
fn a_block_in_a_generator_outlives_calls_at_a_smaller_depth() {
    let mut w = world();
    let command = w.enter(MAIN, COMMAND, 0, &[]);
    w.stage(MAIN, 3, 0x100, "load");
    let call = w.enter(MAIN, PLAIN, 1, &[]);
    w.leave(MAIN, PLAIN, call, &[]);
    w.exit_stage(MAIN, 3, 0x100);
    w.leave(MAIN, COMMAND, command, &[]);
    assert!(w.spans().iter().all(|span| get(span, "floe.incomplete").is_none()));
}

#[test]
fn an_attribute_may_be_named_by_the_program() {
    let mut w = world();
    let set = |w: &mut World, key: &str, value: Value| {
        let call = w.enter(MAIN, ATTRIBUTE, 1, &[("_key", s(key)), ("_value", value)]);
        w.leave(MAIN, ATTRIBUTE, call, &[]);
    };
    let command = w.enter(MAIN, COMMAND, 0, &[]);
    w.stage(MAIN, 1, 0x100, "load");
    set(&mut w, "stage.models", Value::Int(3));
    set(&mut w, "foreign", Value::Int(3));
    set(&mut w, "exception.type", s("mine"));
    for n in 0..200 {
        set(&mut w, &format!("stage.{n}"), Value::Int(n));
    }
    w.exit_stage(MAIN, 1, 0x100);
    set(&mut w, "stage.late", Value::Bool(true));
    w.leave(MAIN, COMMAND, command, &[]);
    let [stage, command] = w.spans().try_into().unwrap();
    assert_eq!(get(&stage, "stage.models").as_deref(), Some("3"));
    assert_eq!(get(&stage, "foreign"), None);
    assert_eq!(get(&stage, "exception.type"), None);
    assert!(stage.attributes.len() <= 140, "{}", stage.attributes.len());
    assert!(stage.dropped_attributes_count > 70, "{}", stage.dropped_attributes_count);
    assert_eq!(get(&command, "stage.late").as_deref(), Some("true"));
}

#[test]
fn rules_begin_and_end_spans_by_key_in_any_thread() {
    let mut w = world();
    let command = w.enter(MAIN, COMMAND, 0, &[("cmd.user", s("ada"))]);
    w.log(MAIN, 1, "RUN", &[("run", s("r1")), ("asset", s("x"))]);
    w.step(POOL, "START", "a");
    let other = At(100, 1, 102);
    w.step(other, "START", "b");
    let inside = w.enter(POOL, PLAIN, 0, &[]);
    w.leave(POOL, PLAIN, inside, &[]);
    w.log(POOL, 0, "ASSET", &[("run", s("r1")), ("step", s("b")), ("asset", s("orders"))]);
    w.step(other, "DONE", "a");
    w.step(POOL, "DONE", "c");
    w.step(POOL, "DONE", "b");
    w.log(MAIN, 1, "RUN_END", &[("run", s("r1"))]);
    w.leave(MAIN, COMMAND, command, &[]);
    let spans = w.spans();
    assert_eq!(names(&spans), ["plain", "step a", "step b", "run r1", "cmd"]);
    let [inside, a, b, run, command] = spans.try_into().unwrap();
    assert_eq!(inside.parent_span_id, id(&a));
    assert_eq!(a.parent_span_id, id(&run));
    assert_eq!(b.parent_span_id, id(&a), "the innermost open command");
    assert_eq!(run.parent_span_id, id(&command));
    assert_eq!(get(&run, "asset"), None, "only the chosen attributes");
    assert_eq!(get(&a, "attempt").as_deref(), Some("1"));
    assert_eq!(get(&a, "cmd.user").as_deref(), Some("ada"), "from the spans around it");
    assert!(a.events.is_empty());
    assert_eq!(b.events.events[0].name, "materialised orders");
    assert_eq!(b.events.events[0].attributes.len(), 1);
    assert_eq!(get(&a, "code.function.name").as_deref(), Some("m.log"));
    assert_eq!(w.assembler.stats().orphan_events, 1, "step c was not open");
}

#[test]
fn a_failure_by_value_is_an_error_with_its_exception() {
    let mut w = world();
    w.step(MAIN, "START", "a");
    let told = |kind: &str, message: &str| {
        vec![
            ("run", s("r1")),
            ("step", s("a")),
            ("_error.type", s(kind)),
            ("_error.message", s(message)),
            ("_error.stack", s("  File \"x.py\", line 1, in f\n")),
        ]
    };
    w.log(MAIN, 0, "FAILED", &told("NoSuchDay", "shop.errors.NoSuchDay: Monday: no\n"));
    let span = w.span();
    assert_eq!(error(&span).as_deref(), Some("shop.errors.NoSuchDay: Monday: no"));
    assert_eq!(get(&span, "error.type").as_deref(), Some("shop.errors.NoSuchDay"));
    let event: Vec<_> = span.events.events[0].attributes.iter().map(|kv| format!("{}={}", kv.key, kv.value)).collect();
    assert_eq!(
        event,
        [
            "exception.type=shop.errors.NoSuchDay",
            "exception.message=Monday: no",
            "exception.stacktrace=Traceback (most recent call last):\n  File \"x.py\", line 1, in f\nshop.errors.NoSuchDay: Monday: no\n",
        ]
    );
    // Of little known: still an error.
    w.step(MAIN, "START", "a");
    w.step(MAIN, "FAILED", "a");
    let span = w.span();
    assert_eq!(error(&span).as_deref(), Some("FAILED"));
    assert!(span.events.is_empty());
    // An exception without a failure is told, and is no error.
    w.step(MAIN, "START", "a");
    w.log(MAIN, 0, "DONE", &told("KeyError", "'x'"));
    let span = w.span();
    assert_eq!((error(&span), span.events.len()), (None, 1));
}

#[test]
fn attempts_are_counted_by_what_the_framework_says() {
    let mut w = world();
    let retries = || Value::Map(vec![("a".into(), Value::Int(2)), ("b".into(), s("x"))]);
    for step in ["a", "b", "c"] {
        w.log(MAIN, 0, "RESTART", &[("run", s("r1")), ("step", s(step)), ("_retries", retries())]);
        w.step(MAIN, "DONE", step);
    }
    let attempts: Vec<_> = w.spans().iter().map(|span| get(span, "attempt").unwrap()).collect();
    assert_eq!(attempts, ["3", "1", "1"], "nothing can be added to a text");
}

#[test]
fn a_span_that_begins_again_has_missed_its_end() {
    let mut w = world();
    w.step(MAIN, "START", "a");
    w.step(MAIN, "START", "a");
    assert_eq!(get(&w.span(), "floe.incomplete").as_deref(), Some("end not seen"));
    w.step(MAIN, "DONE", "a");
    assert_eq!(w.span().parent_span_id, SpanId::INVALID);
}

#[test]
fn a_rule_may_make_a_span_without_length_under_a_parent_of_its_choice() {
    let mut w = world();
    w.log(MAIN, 0, "RUN", &[("run", s("r1"))]);
    w.step(POOL, "START", "a");
    w.step(POOL, "SKIP", "b");
    let skipped = w.span();
    assert_eq!(skipped.start_time, skipped.end_time);
    w.step(POOL, "DONE", "a");
    w.log(MAIN, 0, "RUN_END", &[("run", s("r1"))]);
    let [_, run] = w.spans().try_into().unwrap();
    assert_eq!(skipped.parent_span_id, id(&run), "by its key, not the step around it");
    assert!(!skipped.parent_span_is_remote);
    assert_eq!(get(&run, "floe.nodes"), None, "it was counted by the command of its thread");
}

#[test]
fn a_pair_ends_in_its_own_return_or_later_as_its_result_says() {
    for (returned, later) in [("dict", false), ("generator", true)] {
        let mut w = world();
        w.step(MAIN, "START", "a");
        let call = w.enter(MAIN, COMPUTE, 0, &[]);
        w.leave(MAIN, COMPUTE, call, &[("_returned", s(returned))]);
        let returned = w.now;
        let inside = w.enter(MAIN, PLAIN, 0, &[]);
        w.leave(MAIN, PLAIN, inside, &[]);
        let outputs = w.enter(MAIN, OUTPUTS, 0, &[]);
        w.leave(MAIN, OUTPUTS, outputs, &[]);
        w.step(MAIN, "DONE", "a");
        let spans = w.spans();
        let compute = spans.iter().find(|span| span.name == "compute").unwrap();
        let step = spans.iter().find(|span| span.name == "step a").unwrap();
        let inside = spans.iter().find(|span| span.name == "plain").unwrap();
        let end = if later { outputs } else { returned };
        assert_eq!(compute.end_time, SystemTime::UNIX_EPOCH + Duration::from_nanos(end));
        assert_eq!(inside.parent_span_id, if later { id(compute) } else { id(step) });
        assert_eq!(get(compute, "step").as_deref(), Some("a"));
        assert_eq!(compute.span_kind, SpanKind::Client);
        assert_eq!(spans.len(), 3);
    }
}

#[test]
fn a_pair_whose_beginning_raises_ends_there_with_or_without_a_key() {
    let mut w = world();
    w.step(MAIN, "START", "a");
    for _ in 0..2 {
        let call = w.enter(MAIN, COMPUTE, 0, &[]);
        w.raise(MAIN, COMPUTE, call, "ValueError", Some(s("x")));
        assert_eq!(error(&w.span()).as_deref(), Some("ValueError: x"));
        w.step(MAIN, "DONE", "a");
        w.spans();
    }
}

#[test]
fn spans_link_to_the_spans_with_the_keys_that_they_name() {
    let mut w = world();
    let mut model = |name: &str, upstream: Value| {
        let call = w.enter(MAIN, MODEL, 0, &[("name", s(name)), ("upstream", upstream)]);
        w.leave(MAIN, MODEL, call, &[]);
        w.span()
    };
    let a = model("a", Value::None);
    let b = model("b", s("a"));
    let twin = model("c/twin", Value::None);
    let c = model("c", Value::List(vec![s("a"), s("b"), s("source"), s("a"), s("c")]));
    let linked = |span: &SpanData| span.links.iter().map(|link| link.span_context.span_id()).collect::<Vec<_>>();
    assert!(linked(&a).is_empty());
    assert_eq!(linked(&b), [id(&a)]);
    assert_eq!(linked(&c), [id(&a), id(&b), id(&twin)], "once each, and not itself");
    assert_eq!(c.links.links[0].span_context.trace_id(), trace(&c));
}

#[test]
fn a_call_may_have_its_exception_by_value() {
    let mut w = world();
    for (outcome, why, expected) in [
        ("error", Some("DatabaseError"), (Some("DatabaseError"), 1)),
        ("error", None, (Some("error"), 0)),
        ("ok", None, (None, 0)),
    ] {
        let call = w.enter(MAIN, MODEL, 0, &[("name", s("m"))]);
        let mut values = vec![("outcome", s(outcome))];
        values.extend(why.map(|why| ("_why", s(why))));
        w.leave(MAIN, MODEL, call, &values);
        let span = w.span();
        assert_eq!((error(&span).as_deref(), span.events.len()), expected);
        assert_eq!(get(&span, "error.type").as_deref(), why);
    }
}

#[test]
fn leaves_lie_side_by_side() {
    let mut w = world();
    for key in ["a", "b"] {
        let call = w.enter(MAIN, SIDE, 0, &[("k", s(key))]);
        w.leave(MAIN, SIDE, call, &[]);
    }
    for key in ["a", "b"] {
        let call = w.enter(MAIN, SIDE_END, 0, &[("k", s(key))]);
        w.leave(MAIN, SIDE_END, call, &[]);
    }
    let [a, b] = w.spans().try_into().unwrap();
    assert_eq!((get(&a, "k").as_deref(), get(&b, "k").as_deref()), (Some("a"), Some("b")));
    assert_eq!(b.parent_span_id, SpanId::INVALID);
}

#[test]
fn loose_spans_end_with_their_process_and_blocks_with_their_thread() {
    let mut w = world();
    w.step(POOL, "START", "a");
    w.stage(POOL, 0, 0x100, "load");
    w.exit(POOL, false, 0);
    assert_eq!(get(&w.span(), "floe.incomplete").as_deref(), Some("thread ended"));
    w.exit(MAIN, true, 9);
    let step = w.span();
    assert_eq!(get(&step, "floe.incomplete").as_deref(), Some("process exited"));
    assert_eq!(error(&step).as_deref(), Some("the process was killed by signal 9 (SIGKILL)"));
    assert_eq!(w.assembler.open_spans(), 0);
}

#[test]
fn loose_spans_are_bounded() {
    let mut w = world();
    w.assembler = w.assembler.with_limits(Limits { loose_spans: 2, ..Limits::default() });
    for step in ["a", "b", "c"] {
        w.step(MAIN, "START", step);
    }
    let span = w.span();
    assert_eq!((&*span.name, get(&span, "floe.incomplete").as_deref()), ("step a", Some("too many open spans")));
    assert_eq!(w.assembler.open_spans(), 2);
}

#[test]
fn events_of_one_span_are_bounded() {
    let mut w = world();
    w.step(MAIN, "START", "a");
    for _ in 0..200 {
        w.log(MAIN, 0, "ASSET", &[("run", s("r1")), ("step", s("a")), ("asset", s("x"))]);
    }
    w.step(MAIN, "DONE", "a");
    let span = w.span();
    assert_eq!((span.events.len(), span.events.dropped_count), (128, 72));
}

#[test]
fn a_list_is_meant_by_its_items_and_named_by_its_only_one() {
    let mut w = world();
    let mut model = |upstream: &[&str]| {
        let upstream = Value::List(upstream.iter().map(|item| s(item)).collect());
        let call = w.enter(MAIN, MODEL, 0, &[("name", s("m")), ("upstream", upstream)]);
        w.leave(MAIN, MODEL, call, &[]);
        w.spans().pop().map(|span| (span.name.to_string(), get(&span, "one")))
    };
    assert_eq!(model(&["a"]), Some(("model a".into(), Some("a".into()))));
    assert_eq!(model(&["a", "b"]), Some(("m".into(), None)));
    assert_eq!(model(&[]), Some(("m".into(), None)));
    assert_eq!(model(&["a", "ghost"]), None);
}

#[test]
fn an_override_and_the_method_it_overrides_are_one_span() {
    let mut w = world();
    let own = w.enter_object(MAIN, WRITE, 0, 0x10, &[]);
    let base = w.enter_object(MAIN, WRITE, 1, 0x10, &[]);
    let other = w.enter_object(MAIN, WRITE, 2, 0x20, &[]);
    w.leave(MAIN, WRITE, other, &[]);
    w.leave(MAIN, WRITE, base, &[]);
    w.leave(MAIN, WRITE, own, &[]);
    let [other, own] = w.spans().try_into().unwrap();
    assert_eq!(own.start_time, SystemTime::UNIX_EPOCH + Duration::from_micros(1));
    assert_eq!(other.parent_span_id, id(&own), "another object's is its own");
}

#[test]
fn a_method_that_calls_itself_for_something_else_has_two_spans() {
    let mut w = world();
    let own = w.enter_object(MAIN, WRITE, 0, 0x10, &[("what", s("insert"))]);
    let base = w.enter_object(MAIN, WRITE, 1, 0x10, &[("what", s("insert"))]);
    let other = w.enter_object(MAIN, WRITE, 2, 0x10, &[("what", s("begin"))]);
    for call in [other, base, own] {
        w.leave(MAIN, WRITE, call, &[]);
    }
    let what: Vec<_> = w.spans().iter().map(|span| get(span, "what").unwrap()).collect();
    assert_eq!(what, ["begin", "insert"]);
}

/// What is told of a span when it has ended, and exceptions that are read.
const LATE: &str = r#"
pack: late
probes:
  - name: statement
    target: m:Manager.query
    span: {name: "{sql}", waits_for: result}
    attributes: {sql: arg1}
  - name: result
    kind: event
    target: m:Manager.execute
    implementations: true
    on: statement
    attributes: {_sql: arg1, rows: return}
  - name: node
    target: m:node
    span: {name: node}
  - name: handler
    kind: event
    target: m:handle
    on: node
    attributes: {_type: type(arg1)}
    exception: {from: argument, type: "{_type}"}
  - name: attempt
    kind: event
    target: m:attempt
    on: node
    exception: {from: raised}
  - name: phase
    kind: pair
    target: m:Phase.__enter__
    span: {name: phase}
    end: [{target: "m:Phase.__exit__", attributes: {_raised: type(arg2)}}]
    status: {from: _raised, error: ["*"]}
    exception: {from: argument, type: "{_raised}"}
"#;

const STATEMENT: u32 = 0;
const RESULT: u32 = 1;
const NODE: u32 = 2;
const HANDLER: u32 = 3;
const ATTEMPT: u32 = 4;
const PHASE: u32 = 5;
const PHASE_END: u32 = 6;

impl World {
    fn statement(&mut self, depth: u32, sql: &str) {
        let call = self.enter_object(MAIN, STATEMENT, depth, 0x10, &[("sql", s(sql))]);
        self.leave(MAIN, STATEMENT, call, &[]);
    }

    /// User space has read an exception of this call.
    fn read(&mut self, call: u64) {
        let (type_name, message) = ("shop.NoSuchDay".into(), Some("Monday".into()));
        let read = crate::python::exception::ExceptionFacts { type_name, message, stacktrace: "Traceback".into() };
        self.assembler.exception(Pid(MAIN.0), Epoch(MAIN.1), Tid(MAIN.2), BootNanos(call), read);
    }
}

/// The attributes of the only event, and the description of the status.
fn exception_of(span: &SpanData) -> (Vec<String>, Option<String>) {
    let [event] = &span.events.events[..] else { panic!("{:?}", span.events) };
    (event.attributes.iter().map(|kv| kv.value.to_string()).collect(), error(span))
}

#[test]
fn a_span_that_waits_for_the_call_around_it_keeps_its_end_and_is_no_parent() {
    let mut w = World::with(LATE);
    let call = w.enter_object(MAIN, RESULT, 0, 0x10, &[("_sql", s("select"))]);
    w.statement(1, "begin");
    assert!(w.spans().is_empty(), "it waits");
    w.statement(1, "select");
    let begin = w.span();
    assert_eq!((&*begin.name, get(&begin, "rows")), ("begin", None), "another one waits instead");
    let node = w.enter(MAIN, NODE, 1, &[]);
    w.leave(MAIN, NODE, node, &[]);
    assert_eq!(w.span().parent_span_id, SpanId::INVALID);
    w.leave(MAIN, RESULT, call, &[("rows", Value::Int(3))]);
    let select = w.span();
    assert_eq!((&*select.name, get(&select, "rows").as_deref()), ("select", Some("3")));
    assert_eq!(select.end_time.duration_since(select.start_time).unwrap(), Duration::from_micros(1));
    // Without such a call around it nothing waits.
    w.statement(0, "commit");
    assert_eq!(&*w.span().name, "commit");
}

#[test]
fn an_override_of_an_events_method_and_the_method_are_one_call() {
    let mut w = World::with(LATE);
    let own = w.enter_object(MAIN, RESULT, 0, 0x10, &[("_sql", s("select"))]);
    let base = w.enter_object(MAIN, RESULT, 1, 0x10, &[("_sql", s("select"))]);
    w.statement(2, "select");
    w.leave(MAIN, RESULT, base, &[("rows", Value::Int(3))]);
    assert!(w.spans().is_empty(), "the override goes on");
    w.leave(MAIN, RESULT, own, &[("rows", Value::Int(2))]);
    assert_eq!(get(&w.span(), "rows").as_deref(), Some("2"), "what the caller gets");
    assert_eq!(w.assembler.stats().orphan_events, 0);
}

#[test]
fn a_span_does_not_wait_for_ever() {
    let mut w = World::with(LATE);
    // The end of the call around it was not seen.
    w.enter_object(POOL, RESULT, 0, 0x10, &[("_sql", s("select"))]);
    let call = w.enter_object(POOL, STATEMENT, 1, 0x10, &[("sql", s("select"))]);
    w.leave(POOL, STATEMENT, call, &[]);
    let node = w.enter(POOL, NODE, 0, &[]);
    assert_eq!(&*w.span().name, "select");
    w.leave(POOL, NODE, node, &[]);
    assert_eq!(&*w.span().name, "node");
    // The process ends in that call.
    w.enter_object(MAIN, RESULT, 0, 0x10, &[("_sql", s("select"))]);
    w.statement(1, "select");
    w.exit(MAIN, true, 0);
    let select = w.span();
    assert_eq!((get(&select, "floe.incomplete"), get(&select, "rows")), (None, None), "its own end was seen");
}

#[test]
fn an_exception_that_a_handler_is_called_with_is_read() {
    let mut w = World::with(LATE);
    for read in [true, false] {
        let node = w.enter(MAIN, NODE, 0, &[]);
        let call = w.enter(MAIN, HANDLER, 1, &[("_type", s("NoSuchDay"))]);
        if read {
            w.read(call);
        }
        w.leave(MAIN, HANDLER, call, &[]);
        w.leave(MAIN, NODE, node, &[]);
        let told = exception_of(&w.span()).0;
        let expected: &[&str] = if read { &["shop.NoSuchDay", "Monday", "Traceback"] } else { &["NoSuchDay"] };
        assert_eq!(told, expected);
    }
}

#[test]
fn an_exception_that_leaves_an_event_is_told_of_a_span() {
    let mut w = World::with(LATE);
    let node = w.enter(MAIN, NODE, 0, &[]);
    let call = w.enter(MAIN, ATTEMPT, 1, &[]);
    w.leave(MAIN, ATTEMPT, call, &[]);
    let call = w.enter(MAIN, ATTEMPT, 1, &[]);
    w.read(call);
    w.raise(MAIN, ATTEMPT, call, "NoSuchDay", Some(s("Mon")));
    w.leave(MAIN, NODE, node, &[]);
    assert_eq!(exception_of(&w.span()), (vec!["shop.NoSuchDay".into(), "Monday".into(), "Traceback".into()], None));
    // Where there is no such span it passes by; what could not be read is as far as the thread could.
    let call = w.enter(MAIN, ATTEMPT, 0, &[]);
    w.raise(MAIN, ATTEMPT, call, "NoSuchDay", None);
    let node = w.enter(MAIN, NODE, 0, &[]);
    let call = w.enter(MAIN, ATTEMPT, 1, &[]);
    w.raise(MAIN, ATTEMPT, call, "NoSuchDay", Some(s("Mon")));
    w.leave(MAIN, NODE, node, &[]);
    assert_eq!(exception_of(&w.span()).0, ["NoSuchDay", "Mon"]);
    assert_eq!(w.assembler.stats().orphan_events, 0);
}

#[test]
fn an_exception_that_comes_into_the_end_of_a_pair_is_the_pairs() {
    let mut w = World::with(LATE);
    for read in [true, false] {
        let call = w.enter(MAIN, PHASE, 0, &[]);
        w.leave(MAIN, PHASE, call, &[]);
        let call = w.enter(MAIN, PHASE_END, 0, &[("_raised", s("NoSuchDay"))]);
        if read {
            w.read(call);
        }
        w.leave(MAIN, PHASE_END, call, &[]);
        let (told, status) = exception_of(&w.span());
        let expected: (&[&str], &str) = if read {
            (&["shop.NoSuchDay", "Monday", "Traceback"], "shop.NoSuchDay: Monday")
        } else {
            (&["NoSuchDay"], "NoSuchDay")
        };
        assert_eq!(
            (told.iter().map(String::as_str).collect::<Vec<_>>(), status.as_deref()),
            (expected.0.to_vec(), Some(expected.1))
        );
    }
}
