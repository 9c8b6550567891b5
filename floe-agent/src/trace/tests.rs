//! The rules of span assembly, each with events made by hand.

pub(super) use std::time::{Duration, SystemTime};

pub(super) use opentelemetry::trace::{SpanId, Status, TraceId};

use super::*;
use crate::catalogue::Moment;
use crate::kernel::event::{FieldValue, Outcome, Value};
use crate::units::{ProbeId, UserAddr};

const PACK: &str = r#"
pack: test
probes:
  - name: command
    target: m:command
    span: {name: "cmd.{cmd.name}", role: command}
    attributes:
      cmd.name: arg0
      cmd.error: exception.why
    status: {raised: ["because {cmd.error}", "{floe.nodes.failed} of {floe.nodes} failed"]}
  - name: node
    target: m:node
    span: {name: "{node.kind}.{node.name}", role: node, unless: {node.kind: [ghost]}}
    attributes:
      node.kind: arg0
      node.name: arg1
      node.state: [arg2, return]
      node.why: return.why
    status: {from: node.state, error: [error, fail], message: node.why}
  - name: plain
    target: m:plain
    span: {name: plain}
  - name: tell
    kind: event
    target: m:tell
    attributes: {cmd.id: return, cmd.early: arg0}
  - name: hook
    kind: pair
    target: m:hook_begin
    span: {name: "hook.{hook.name}", role: node}
    attributes: {hook.name: arg0}
    end:
      - {target: "m:hook_end", attributes: {hook.state: return}}
      - target: m:hooks
    status: {from: hook.state, error: [error]}
"#;

const COMMAND: u32 = 0;
const NODE: u32 = 1;
const PLAIN: u32 = 2;
const TELL: u32 = 3;
const HOOK: u32 = 4;
const HOOK_END: u32 = 5;
const HOOKS: u32 = 6;

/// An assembler with a clock that every event advances by a microsecond.
pub(super) struct World {
    pub(super) assembler: Assembler,
    pub(super) now: u64,
    lost: u16,
}

/// A thread of a process.
#[derive(Clone, Copy)]
pub(super) struct At(pub(super) u32, pub(super) u32, pub(super) u32);

pub(super) const MAIN: At = At(100, 1, 100);
pub(super) const POOL: At = At(100, 1, 101);

impl World {
    fn new() -> Self {
        Self::with(PACK)
    }

    pub(super) fn with(pack: &str) -> Self {
        let catalogue = Catalogue::from_texts(&[("test.yaml".into(), pack.into())], &[]).unwrap();
        let clock = Clock::new(BootNanos(0), SystemTime::UNIX_EPOCH);
        Self { assembler: Assembler::new(Arc::new(catalogue), clock), now: 0, lost: 0 }
    }

    fn stamp(&mut self, At(pid, epoch, tid): At) -> Stamp {
        self.now += 1000;
        let lost = std::mem::take(&mut self.lost);
        Stamp { pid: Pid(pid), tid: Tid(tid), epoch: Epoch(epoch), time: BootNanos(self.now), lost }
    }

    fn fields(&self, probe: u32, moment: Moment, values: &[(&str, Value)]) -> Vec<FieldValue> {
        let names = self.assembler.core.catalogue.fields(ProbeId(probe), moment);
        let number = |name: &str| names.iter().position(|known| known.as_str() == name).expect(name);
        values
            .iter()
            .map(|(name, value)| FieldValue {
                field: number(name) as u8,
                value: value.clone(),
                cut: matches!(value, Value::Str { cut: true, .. }),
            })
            .collect()
    }

    pub(super) fn enter(&mut self, at: At, probe: u32, depth: u32, values: &[(&str, Value)]) -> u64 {
        self.enter_object(at, probe, depth, 0, values)
    }

    pub(super) fn enter_object(
        &mut self,
        at: At,
        probe: u32,
        depth: u32,
        object: u64,
        values: &[(&str, Value)],
    ) -> u64 {
        let fields = self.fields(probe, Moment::Enter, values);
        let stamp = self.stamp(at);
        let (probe, object) = (ProbeId(probe), UserAddr(object));
        self.assembler.handle(Event::Enter { stamp, probe, depth, recursion: false, object, fields });
        self.now
    }

    pub(super) fn leave_with(&mut self, at: At, probe: u32, call: u64, outcome: Outcome, values: &[(&str, Value)]) {
        self.leave_object(at, probe, call, outcome, 0, values);
    }

    pub(super) fn leave_object(
        &mut self,
        at: At,
        probe: u32,
        call: u64,
        outcome: Outcome,
        object: u64,
        values: &[(&str, Value)],
    ) {
        let fields = self.fields(probe, Moment::Exit, values);
        let stamp = self.stamp(at);
        let (probe, call, object) = (ProbeId(probe), BootNanos(call), UserAddr(object));
        self.assembler.handle(Event::Return { stamp, call, probe, outcome, object, fields });
    }

    pub(super) fn leave(&mut self, at: At, probe: u32, call: u64, values: &[(&str, Value)]) {
        self.leave_with(at, probe, call, Outcome::Returned, values);
    }

    pub(super) fn raise(&mut self, at: At, probe: u32, call: u64, kind: &str, message: Option<Value>) {
        let mut values = vec![("exception.type", s(kind))];
        values.extend(message.map(|message| ("exception.message", message)));
        self.leave_with(at, probe, call, Outcome::Raised, &values);
    }

    pub(super) fn fork(&mut self, at: At, child: At) {
        let stamp = self.stamp(at);
        self.assembler.handle(Event::Fork { stamp, child: Pid(child.0), child_epoch: Epoch(child.1) });
    }

    pub(super) fn thread(&mut self, at: At, child: At) {
        let stamp = self.stamp(at);
        self.assembler.handle(Event::Thread { stamp, child: Tid(child.2) });
    }

    pub(super) fn exec(&mut self, at: At) {
        let stamp = self.stamp(at);
        self.assembler.handle(Event::Exec { stamp });
    }

    pub(super) fn exit(&mut self, at: At, process_ended: bool, code: u32) {
        let stamp = self.stamp(at);
        self.assembler.handle(Event::Exit { stamp, process_ended, code });
    }

    /// The finished spans, in the order in which they ended.
    pub(super) fn spans(&mut self) -> Vec<SpanData> {
        self.assembler.drain().into_iter().map(|finished| finished.span).collect()
    }

    pub(super) fn span(&mut self) -> SpanData {
        let mut spans = self.spans();
        assert_eq!(spans.len(), 1, "{spans:?}");
        spans.remove(0)
    }
}

pub(super) fn s(text: &str) -> Value {
    Value::Str { text: text.into(), cut: false }
}

pub(super) fn get(span: &SpanData, name: &str) -> Option<String> {
    let found: Vec<_> = span.attributes.iter().filter(|attribute| attribute.key.as_str() == name).collect();
    assert!(found.len() < 2, "{name} twice");
    found.first().map(|attribute| attribute.value.to_string())
}

pub(super) fn error(span: &SpanData) -> Option<String> {
    match &span.status {
        Status::Error { description } => Some(description.to_string()),
        _ => None,
    }
}

pub(super) fn id(span: &SpanData) -> SpanId {
    span.span_context.span_id()
}

pub(super) fn trace(span: &SpanData) -> TraceId {
    span.span_context.trace_id()
}

#[test]
fn nested_calls_are_nested_spans_with_their_times() {
    let mut w = World::new();
    let outer = w.enter(MAIN, COMMAND, 0, &[("cmd.name", s("build"))]);
    let inner = w.enter(MAIN, PLAIN, 1, &[]);
    w.leave(MAIN, PLAIN, inner, &[]);
    w.leave(MAIN, COMMAND, outer, &[]);
    let [inner, outer] = w.spans().try_into().unwrap();
    assert_eq!(outer.name, "cmd.build");
    assert_eq!(outer.parent_span_id, SpanId::INVALID);
    assert_eq!(inner.parent_span_id, id(&outer));
    assert_eq!(trace(&inner), trace(&outer));
    assert_ne!(trace(&outer), TraceId::INVALID);
    assert_eq!(outer.start_time, SystemTime::UNIX_EPOCH + Duration::from_micros(1));
    assert_eq!(outer.end_time, SystemTime::UNIX_EPOCH + Duration::from_micros(4));
    assert_eq!(outer.status, Status::Unset);
    assert_eq!(get(&inner, "thread.id").as_deref(), Some("100"));
    assert_eq!(get(&inner, "code.function.name").as_deref(), Some("m.plain"));
    assert_eq!(inner.instrumentation_scope.name(), "floe-agent");
    assert_eq!(inner.instrumentation_scope.version(), Some(env!("CARGO_PKG_VERSION")));
    assert_eq!(w.assembler.stats().spans, 2);
    assert_eq!(w.assembler.open_spans(), 0);
}

#[test]
fn a_span_of_a_pool_thread_is_a_child_of_the_innermost_open_command() {
    let mut w = World::new();
    let outer = w.enter(MAIN, COMMAND, 0, &[("cmd.name", s("outer"))]);
    let inner = w.enter(MAIN, COMMAND, 1, &[("cmd.name", s("inner"))]);
    let first = w.enter(POOL, PLAIN, 0, &[]);
    w.leave(POOL, PLAIN, first, &[]);
    w.leave(MAIN, COMMAND, inner, &[]);
    let second = w.enter(POOL, PLAIN, 0, &[]);
    w.leave(POOL, PLAIN, second, &[]);
    w.leave(MAIN, COMMAND, outer, &[]);
    let third = w.enter(POOL, PLAIN, 0, &[]);
    w.leave(POOL, PLAIN, third, &[]);
    let [first, inner, second, outer, third] = w.spans().try_into().unwrap();
    assert_eq!(first.parent_span_id, id(&inner));
    assert_eq!(second.parent_span_id, id(&outer));
    assert_eq!(third.parent_span_id, SpanId::INVALID, "no command is open");
    assert_eq!(trace(&third), trace(&outer), "one process, one trace");
}

#[test]
fn a_plain_span_of_another_thread_is_not_a_parent() {
    let mut w = World::new();
    w.enter(MAIN, PLAIN, 0, &[]);
    let call = w.enter(POOL, PLAIN, 0, &[]);
    w.leave(POOL, PLAIN, call, &[]);
    assert_eq!(w.span().parent_span_id, SpanId::INVALID);
}

#[test]
fn a_forked_child_belongs_to_the_span_that_was_open_in_the_forking_thread() {
    let child = At(200, 2, 200);
    let mut w = World::new();
    let command = w.enter(MAIN, COMMAND, 0, &[]);
    let node = w.enter(POOL, NODE, 0, &[]);
    w.fork(POOL, child);
    w.leave(POOL, NODE, node, &[]);
    w.leave(MAIN, COMMAND, command, &[]);
    let call = w.enter(child, PLAIN, 0, &[]);
    w.leave(child, PLAIN, call, &[]);
    let [node, _, inside] = w.spans().try_into().unwrap();
    assert_eq!(inside.parent_span_id, id(&node), "also when that span has ended");
    assert!(inside.parent_span_is_remote);
    assert_eq!(trace(&inside), trace(&node));
}

#[test]
fn a_grandchild_of_a_process_without_spans_belongs_to_the_same_span() {
    let (shell, python) = (At(200, 2, 200), At(300, 3, 300));
    let mut w = World::new();
    w.enter(MAIN, PLAIN, 0, &[]);
    w.fork(MAIN, shell);
    w.exec(At(200, 4, 200));
    w.fork(At(200, 4, 200), python);
    w.exec(At(300, 5, 300));
    let call = w.enter(At(300, 5, 300), PLAIN, 0, &[]);
    w.leave(At(300, 5, 300), PLAIN, call, &[]);
    let inside = w.span();
    w.exit(MAIN, true, 0);
    let parent = w.span();
    assert_eq!(inside.parent_span_id, id(&parent));
    assert_eq!(trace(&inside), trace(&parent));
}

#[test]
fn a_child_that_was_forked_outside_of_a_span_has_the_trace_but_no_parent() {
    let child = At(200, 2, 200);
    let mut w = World::new();
    w.fork(MAIN, child);
    for at in [MAIN, child] {
        let call = w.enter(at, PLAIN, 0, &[]);
        w.leave(at, PLAIN, call, &[]);
    }
    let [one, two] = w.spans().try_into().unwrap();
    assert_eq!(two.parent_span_id, SpanId::INVALID);
    assert_eq!(trace(&one), trace(&two));
}

#[test]
fn processes_without_a_common_ancestor_have_their_own_traces() {
    let mut w = World::new();
    for at in [MAIN, At(500, 7, 500)] {
        let call = w.enter(at, PLAIN, 0, &[]);
        w.leave(at, PLAIN, call, &[]);
    }
    let [one, two] = w.spans().try_into().unwrap();
    assert_ne!(trace(&one), trace(&two));
}

#[test]
fn exec_ends_what_is_open_and_the_new_program_belongs_to_it() {
    let mut w = World::new();
    w.enter(MAIN, PLAIN, 0, &[]);
    let new = At(100, 2, 100);
    w.exec(new);
    let call = w.enter(new, PLAIN, 0, &[]);
    w.leave(new, PLAIN, call, &[]);
    let [before, after] = w.spans().try_into().unwrap();
    assert_eq!(get(&before, "floe.incomplete").as_deref(), Some("process called exec"));
    assert_eq!(after.parent_span_id, id(&before));
}

#[test]
fn a_call_at_a_smaller_depth_ends_calls_whose_return_was_missed() {
    let mut w = World::new();
    let outer = w.enter(MAIN, COMMAND, 0, &[]);
    w.enter(MAIN, PLAIN, 1, &[]);
    w.enter(MAIN, PLAIN, 2, &[]);
    let next = w.enter(MAIN, NODE, 1, &[]);
    let [two, one] = w.spans().try_into().unwrap();
    for span in [&one, &two] {
        assert_eq!(get(span, "floe.incomplete").as_deref(), Some("return not seen"));
        assert_eq!(span.status, Status::Unset);
        assert_eq!(span.end_time, SystemTime::UNIX_EPOCH + Duration::from_nanos(next));
    }
    w.leave(MAIN, NODE, next, &[]);
    w.leave(MAIN, COMMAND, outer, &[]);
    let [node, command] = w.spans().try_into().unwrap();
    assert_eq!(node.parent_span_id, id(&command));
    assert_eq!(get(&command, "floe.incomplete"), None);
    assert_eq!(w.assembler.stats().incomplete, 2);
}

#[test]
fn depth_may_have_gaps_where_calls_are_not_spans() {
    let mut w = World::new();
    let outer = w.enter(MAIN, COMMAND, 2, &[]);
    let inner = w.enter(MAIN, PLAIN, 5, &[]);
    w.leave(MAIN, PLAIN, inner, &[]);
    w.leave(MAIN, COMMAND, outer, &[]);
    assert!(w.spans().iter().all(|span| get(span, "floe.incomplete").is_none()));
}

#[test]
fn a_return_ends_its_call_and_everything_above_it() {
    let mut w = World::new();
    let outer = w.enter(MAIN, COMMAND, 0, &[]);
    w.enter(MAIN, PLAIN, 1, &[]);
    w.leave(MAIN, COMMAND, outer, &[]);
    let [inner, outer] = w.spans().try_into().unwrap();
    assert_eq!(get(&inner, "floe.incomplete").as_deref(), Some("return not seen"));
    assert_eq!(get(&outer, "floe.incomplete"), None);
}

#[test]
fn a_return_without_its_call_is_counted_and_nothing_else() {
    let mut w = World::new();
    w.enter(MAIN, PLAIN, 0, &[]);
    w.leave(MAIN, PLAIN, 77, &[]);
    w.leave(POOL, PLAIN, 77, &[]);
    assert!(w.spans().is_empty());
    assert_eq!(w.assembler.stats().unmatched_returns, 2);
}

#[test]
fn a_killed_process_ends_its_spans_with_an_error() {
    let mut w = World::new();
    w.enter(MAIN, COMMAND, 0, &[]);
    w.enter(POOL, NODE, 0, &[]);
    w.exit(POOL, false, 9);
    w.exit(MAIN, true, 9);
    let [node, command] = w.spans().try_into().unwrap();
    for span in [&node, &command] {
        assert_eq!(get(span, "floe.incomplete").as_deref(), Some("process exited"));
        assert_eq!(get(span, "floe.process.signal").as_deref(), Some("9"));
        assert_eq!(error(span).as_deref(), Some("the process was killed by signal 9 (SIGKILL)"));
    }
    assert_eq!(node.parent_span_id, id(&command));
    assert_eq!(get(&command, "floe.nodes.failed").as_deref(), Some("1"));
    assert_eq!(w.assembler.open_spans(), 0);
}

#[test]
fn a_process_that_exits_inside_a_call_ends_its_spans_with_the_exit_code() {
    for (code, description) in [(0, None), (3 << 8, Some("the process exited with code 3 during the call"))] {
        let mut w = World::new();
        w.enter(MAIN, PLAIN, 0, &[]);
        w.exit(MAIN, true, code);
        let span = w.span();
        assert_eq!(get(&span, "floe.incomplete").as_deref(), Some("process exited"));
        assert_eq!(get(&span, "process.exit.code"), Some((code >> 8).to_string()));
        assert_eq!(error(&span).as_deref(), description);
    }
}

#[test]
fn commands_end_after_the_spans_of_other_threads() {
    let mut w = World::new();
    w.enter(MAIN, COMMAND, 0, &[]);
    w.enter(POOL, NODE, 0, &[]);
    w.enter(At(100, 1, 99), NODE, 0, &[]);
    w.exit(MAIN, false, 0);
    let command = w.span();
    assert_eq!(get(&command, "floe.incomplete").as_deref(), Some("thread ended"));
    w.enter(MAIN, COMMAND, 0, &[]);
    w.exit(POOL, true, 0);
    let names: Vec<_> = w.spans().iter().map(|span| get(span, "code.function.name").unwrap()).collect();
    assert_eq!(names, ["m.node", "m.node", "m.command"]);
}

#[test]
fn a_thread_that_ends_takes_only_its_own_spans_along() {
    let mut w = World::new();
    let main = w.enter(MAIN, PLAIN, 0, &[]);
    w.enter(POOL, PLAIN, 0, &[]);
    w.exit(POOL, false, 0);
    assert_eq!(get(&w.span(), "floe.incomplete").as_deref(), Some("thread ended"));
    w.leave(MAIN, PLAIN, main, &[]);
    assert_eq!(get(&w.span(), "floe.incomplete"), None);
}

#[test]
fn lost_events_mark_the_open_and_later_spans_of_their_trace_and_no_others() {
    let (child, stranger) = (At(200, 2, 200), At(500, 7, 500));
    let mut w = World::new();
    let early = w.enter(MAIN, PLAIN, 0, &[]);
    w.leave(MAIN, PLAIN, early, &[]);
    w.fork(MAIN, child);
    let open = w.enter(MAIN, PLAIN, 0, &[]);
    w.lost = 3;
    let call = w.enter(POOL, PLAIN, 0, &[]);
    w.leave(POOL, PLAIN, call, &[]);
    w.leave(MAIN, PLAIN, open, &[]);
    for at in [child, stranger] {
        let call = w.enter(at, PLAIN, 0, &[]);
        w.leave(at, PLAIN, call, &[]);
    }
    let marks: Vec<_> = w
        .spans()
        .iter()
        .map(|span| (get(span, "floe.trace.incomplete").is_some(), get(span, "floe.trace.lost_events")))
        .collect();
    let three = || (true, Some("3".to_owned()));
    assert_eq!(marks, [(false, None), three(), three(), three(), (false, None)]);
    assert_eq!(w.assembler.stats().lost_events, 3);
}

#[test]
fn a_call_that_was_nested_too_deep_is_marked() {
    let mut w = World::new();
    let stamp = w.stamp(MAIN);
    let (probe, fields) = (ProbeId(PLAIN), Vec::new());
    w.assembler.handle(Event::Enter { stamp, probe, depth: 0, recursion: true, object: UserAddr(0), fields });
    let call = w.now;
    w.leave(MAIN, PLAIN, call, &[]);
    assert_eq!(get(&w.span(), "floe.recursion").as_deref(), Some("true"));
}

#[test]
fn an_event_gives_its_values_to_the_command_of_its_thread_or_the_process() {
    let mut w = World::new();
    let command = w.enter(MAIN, COMMAND, 0, &[]);
    let tell = w.enter(MAIN, TELL, 1, &[("cmd.early", Value::Int(1))]);
    w.leave(MAIN, TELL, tell, &[("cmd.id", s("first"))]);
    let tell = w.enter(POOL, TELL, 0, &[]);
    w.leave(POOL, TELL, tell, &[("cmd.id", s("second"))]);
    w.leave(MAIN, COMMAND, command, &[]);
    let span = w.span();
    assert_eq!(get(&span, "cmd.early").as_deref(), Some("1"));
    assert_eq!(get(&span, "cmd.id").as_deref(), Some("second"));
    let tell = w.enter(MAIN, TELL, 0, &[]);
    w.leave(MAIN, TELL, tell, &[("cmd.id", s("third"))]);
    assert!(w.spans().is_empty());
    assert_eq!(w.assembler.stats().orphan_events, 1);
}

#[test]
fn an_exception_is_an_event_and_an_error() {
    let mut w = World::new();
    let call = w.enter(MAIN, PLAIN, 0, &[]);
    w.raise(MAIN, PLAIN, call, "ValueError", Some(s("no such day")));
    let span = w.span();
    assert_eq!(error(&span).as_deref(), Some("ValueError: no such day"));
    assert_eq!(get(&span, "error.type").as_deref(), Some("ValueError"));
    assert_eq!(get(&span, "exception.type"), None, "only on the event");
    let [event] = &span.events.events[..] else { panic!("{:?}", span.events) };
    assert_eq!(event.name, "exception");
    assert_eq!(event.timestamp, span.end_time);
    let attributes: Vec<_> = event.attributes.iter().map(|kv| format!("{}={}", kv.key, kv.value)).collect();
    assert_eq!(attributes, ["exception.type=ValueError", "exception.message=no such day"]);
}

#[test]
fn an_exception_that_was_read_while_its_call_waited_has_a_stack_trace() {
    let mut w = World::new();
    let read = |message: &str| ExceptionFacts {
        type_name: "shop.NoSuchDay".into(),
        message: Some(message.into()),
        stacktrace: format!("shop.NoSuchDay: {message}\n"),
    };
    // Told before anything is known of the call; what is told last counts, and only for this call.
    let call = BootNanos(w.now + 1000);
    for message in ["first", "Monday"] {
        w.assembler.exception(Pid(MAIN.0), Epoch(MAIN.1), Tid(MAIN.2), call, read(message));
    }
    w.assembler.exception(Pid(MAIN.0), Epoch(MAIN.1), Tid(POOL.2), call, read("of another thread"));
    assert_eq!(w.enter(MAIN, PLAIN, 0, &[]), call.0);
    w.raise(MAIN, PLAIN, call.0, "NoSuchDay", Some(s("Mon")));
    let next = w.enter(MAIN, PLAIN, 0, &[]);
    w.raise(MAIN, PLAIN, next, "NoSuchDay", Some(s("Tue")));
    let [first, second] = w.spans().try_into().unwrap();
    let attributes = |span: &SpanData| -> Vec<_> {
        span.events.events[0].attributes.iter().map(|kv| format!("{}={}", kv.key, kv.value)).collect()
    };
    assert_eq!(
        attributes(&first),
        ["exception.type=shop.NoSuchDay", "exception.message=Monday", "exception.stacktrace=shop.NoSuchDay: Monday\n"]
    );
    assert_eq!(get(&first, "error.type").as_deref(), Some("shop.NoSuchDay"));
    assert_eq!(attributes(&second), ["exception.type=NoSuchDay", "exception.message=Tue"]);
    assert_eq!(w.assembler.exceptions.len(), 1, "the other thread's call has not ended");
}

#[test]
fn exceptions_of_calls_whose_end_is_lost_are_forgotten() {
    let mut w = World::new();
    for call in 0..2 * EXCEPTIONS as u64 {
        let read = ExceptionFacts { type_name: "E".into(), message: None, stacktrace: String::new() };
        w.assembler.exception(Pid(1), Epoch(1), Tid(1), BootNanos(call), read);
    }
    assert_eq!(w.assembler.exceptions.len(), EXCEPTIONS);
}

#[test]
fn an_exception_of_which_little_is_known_is_still_an_error() {
    let mut w = World::new();
    let call = w.enter(MAIN, PLAIN, 0, &[]);
    w.raise(MAIN, PLAIN, call, "KeyError", Some(Value::Int(3)));
    let call = w.enter(MAIN, PLAIN, 0, &[]);
    w.raise(MAIN, PLAIN, call, "MemoryError", None);
    let call = w.enter(MAIN, PLAIN, 0, &[]);
    w.leave_with(MAIN, PLAIN, call, Outcome::Raised, &[]);
    let errors: Vec<_> = w.spans().iter().map(|span| error(span).unwrap()).collect();
    assert_eq!(errors, ["KeyError: 3", "MemoryError", "an exception"]);
}

#[test]
fn exceptions_that_end_a_program_or_an_iteration_normally_are_no_errors() {
    let mut w = World::new();
    for (kind, message, is_error) in [
        ("StopIteration", None, false),
        ("GeneratorExit", None, false),
        ("SystemExit", None, false),
        ("SystemExit", Some(Value::Int(0)), false),
        ("SystemExit", Some(Value::Int(1)), true),
        ("SystemExit", Some(s("0")), true),
    ] {
        let call = w.enter(MAIN, PLAIN, 0, &[]);
        w.raise(MAIN, PLAIN, call, kind, message.clone());
        let span = w.span();
        assert_eq!(error(&span).is_some(), is_error, "{kind} {message:?}");
        assert_eq!(span.events.is_empty(), !is_error);
    }
}

#[test]
fn a_pack_says_better_why_a_command_raised() {
    let mut w = World::new();
    let call = w.enter(MAIN, COMMAND, 0, &[]);
    let values = [("exception.type", s("Exit")), ("cmd.error", s("the disk is full"))];
    w.leave_with(MAIN, COMMAND, call, Outcome::Raised, &values);
    let call = w.enter(MAIN, COMMAND, 0, &[]);
    for (at, state) in [(MAIN, "success"), (POOL, "fail"), (POOL, "success")] {
        let depth = u32::from(at.2 == MAIN.2);
        let node = w.enter(at, NODE, depth, &[]);
        w.leave(at, NODE, node, &[("node.state", s(state))]);
    }
    w.raise(MAIN, COMMAND, call, "Exit", None);
    let call = w.enter(MAIN, COMMAND, 0, &[]);
    w.raise(MAIN, COMMAND, call, "Exit", None);
    let commands = w.spans().into_iter().filter(|span| span.name.starts_with("cmd"));
    let errors: Vec<_> = commands.map(|span| error(&span).unwrap()).collect();
    assert_eq!(errors, ["because the disk is full", "1 of 3 failed", "Exit"]);
}

#[test]
fn a_node_inside_a_node_is_not_counted() {
    let mut w = World::new();
    let command = w.enter(MAIN, COMMAND, 0, &[]);
    let outer = w.enter(MAIN, NODE, 1, &[]);
    let inner = w.enter(MAIN, NODE, 2, &[]);
    w.leave(MAIN, NODE, inner, &[("node.state", s("error"))]);
    w.leave(MAIN, NODE, outer, &[]);
    w.leave(MAIN, COMMAND, command, &[]);
    let command = w.spans().pop().unwrap();
    assert_eq!(get(&command, "floe.nodes").as_deref(), Some("1"));
    assert_eq!(get(&command, "floe.nodes.failed").as_deref(), Some("0"));
    assert_eq!(error(&command), None);
}

#[test]
fn a_status_by_value_is_an_error_where_the_pack_says_so() {
    let mut w = World::new();
    for (state, why, expected) in [
        ("success", Some("fine"), None),
        ("skipped", None, None),
        ("fail", Some("got 1 result"), Some("got 1 result")),
        ("error", None, Some("error")),
    ] {
        let call = w.enter(MAIN, NODE, 0, &[]);
        let mut values = vec![("node.state", s(state))];
        values.extend(why.map(|why| ("node.why", s(why))));
        w.leave(MAIN, NODE, call, &values);
        let span = w.span();
        assert_eq!(error(&span).as_deref(), expected);
        assert!(span.events.is_empty(), "a failure by value is no exception");
    }
}

#[test]
fn none_is_absent_and_the_last_source_wins_and_cut_texts_are_named() {
    let mut w = World::new();
    let call = w.enter(
        MAIN,
        NODE,
        0,
        &[
            ("node.kind", Value::None),
            ("node.name", Value::Str { text: "long".into(), cut: true }),
            ("node.state", s("running")),
        ],
    );
    w.leave(MAIN, NODE, call, &[("node.state", s("done")), ("node.why", Value::Float(f64::NAN))]);
    let span = w.span();
    assert_eq!(get(&span, "node.kind"), None);
    assert_eq!(get(&span, "node.name").as_deref(), Some("long"));
    assert_eq!(get(&span, "node.state").as_deref(), Some("done"));
    assert_eq!(get(&span, "node.why").as_deref(), Some("NaN"));
    assert_eq!(get(&span, "floe.truncated").as_deref(), Some(r#"["node.name"]"#));
    assert_eq!(span.name, "long", "a template without what is missing");
}

#[test]
fn a_span_without_any_part_of_its_name_has_the_probes_name() {
    let mut w = World::new();
    let call = w.enter(MAIN, NODE, 0, &[]);
    w.leave(MAIN, NODE, call, &[]);
    assert_eq!(w.span().name, "node");
}

#[test]
fn a_pair_is_one_span_around_both_calls() {
    let mut w = World::new();
    let command = w.enter(MAIN, COMMAND, 0, &[]);
    let begin = w.enter(MAIN, HOOK, 1, &[("hook.name", s("a"))]);
    w.leave(MAIN, HOOK, begin, &[]);
    assert!(w.spans().is_empty());
    let end = w.enter(MAIN, HOOK_END, 1, &[]);
    let inside = w.enter(MAIN, PLAIN, 2, &[]);
    w.leave(MAIN, PLAIN, inside, &[]);
    w.leave(MAIN, HOOK_END, end, &[("hook.state", s("error"))]);
    w.leave(MAIN, COMMAND, command, &[]);
    let [inside, hook, command] = w.spans().try_into().unwrap();
    assert_eq!(hook.name, "hook.a");
    assert_eq!(hook.start_time, SystemTime::UNIX_EPOCH + Duration::from_nanos(begin));
    assert_eq!(hook.end_time, inside.end_time + Duration::from_micros(1));
    assert_eq!(error(&hook).as_deref(), Some("error"));
    assert_eq!(hook.parent_span_id, id(&command));
    assert_eq!(inside.parent_span_id, id(&hook));
    assert_eq!(get(&command, "floe.nodes.failed").as_deref(), Some("1"));
}

#[test]
fn a_pair_may_end_in_the_call_around_it() {
    let mut w = World::new();
    let hooks = w.enter(MAIN, HOOKS, 0, &[]);
    let begin = w.enter(MAIN, HOOK, 1, &[]);
    w.leave(MAIN, HOOK, begin, &[]);
    w.raise(MAIN, HOOKS, hooks, "DatabaseError", Some(s("no table")));
    let hook = w.span();
    assert_eq!(error(&hook).as_deref(), Some("DatabaseError: no table"));
    assert_eq!(get(&hook, "floe.incomplete"), None);
    assert_eq!(w.assembler.open_spans(), 0);
    let next = w.enter(MAIN, PLAIN, 0, &[]);
    w.leave(MAIN, PLAIN, next, &[]);
    assert_eq!(w.span().parent_span_id, SpanId::INVALID);
}

#[test]
fn an_end_without_its_beginning_is_nothing() {
    let mut w = World::new();
    let end = w.enter(MAIN, HOOK_END, 0, &[]);
    w.leave(MAIN, HOOK_END, end, &[("hook.state", s("ok"))]);
    let begin = w.enter(MAIN, HOOK, 0, &[]);
    w.leave(MAIN, HOOK, begin, &[]);
    let end = w.enter(POOL, HOOK_END, 0, &[]);
    w.leave(POOL, HOOK_END, end, &[]);
    assert!(w.spans().is_empty(), "another thread does not end it");
}

#[test]
fn a_pair_whose_beginning_raises_ends_there() {
    let mut w = World::new();
    let begin = w.enter(MAIN, HOOK, 0, &[("hook.name", s("a"))]);
    w.raise(MAIN, HOOK, begin, "CompilationError", None);
    assert_eq!(error(&w.span()).as_deref(), Some("CompilationError"));
}

#[test]
fn a_pair_that_begins_again_has_missed_its_end() {
    let mut w = World::new();
    for _ in 0..2 {
        let begin = w.enter(MAIN, HOOK, 1, &[]);
        w.leave(MAIN, HOOK, begin, &[]);
    }
    assert_eq!(get(&w.span(), "floe.incomplete").as_deref(), Some("end not seen"));
    w.enter(MAIN, PLAIN, 0, &[]);
    assert_eq!(get(&w.span(), "floe.incomplete").as_deref(), Some("return not seen"), "its caller has returned");
}

#[test]
fn what_goes_beyond_the_limits_is_dropped_and_counted() {
    let mut w = World::new();
    w.assembler = w.assembler.with_limits(Limits { open_calls: 2, threads: 1, processes: 1, ..Limits::default() });
    let first = w.enter(MAIN, PLAIN, 0, &[]);
    w.enter(POOL, PLAIN, 0, &[]);
    w.enter(MAIN, PLAIN, 1, &[]);
    w.enter(MAIN, PLAIN, 2, &[]);
    w.enter(At(500, 7, 500), PLAIN, 0, &[]);
    assert_eq!(w.assembler.stats().dropped_calls, 3);
    assert_eq!(w.assembler.open_spans(), 2);
    w.leave(MAIN, PLAIN, first, &[]);
    w.enter(POOL, PLAIN, 0, &[]);
    assert_eq!(w.assembler.stats().dropped_calls, 3, "there is room again");
}

#[test]
fn a_reused_pid_is_another_process() {
    let again = At(100, 9, 100);
    let mut w = World::new();
    let call = w.enter(MAIN, PLAIN, 0, &[]);
    w.leave(MAIN, PLAIN, call, &[]);
    w.exit(MAIN, true, 0);
    let call = w.enter(again, PLAIN, 0, &[]);
    w.leave(again, PLAIN, call, &[]);
    let [one, two] = w.spans().try_into().unwrap();
    assert_ne!(trace(&one), trace(&two));
}

#[test]
fn a_process_whose_end_was_lost_ends_when_its_pid_is_reused() {
    let again = At(100, 9, 100);
    let mut w = World::new();
    w.enter(MAIN, PLAIN, 0, &[]);
    let call = w.enter(again, PLAIN, 0, &[]);
    w.leave(again, PLAIN, call, &[]);
    let [one, two] = w.spans().try_into().unwrap();
    assert_eq!(get(&one, "floe.incomplete").as_deref(), Some("process ended unseen"));
    assert_eq!(two.parent_span_id, SpanId::INVALID);
    assert_ne!(trace(&one), trace(&two));
}

#[test]
fn late_events_of_an_ended_process_do_not_bring_it_back() {
    let mut w = World::new();
    w.enter(MAIN, PLAIN, 0, &[]);
    w.exit(MAIN, true, 0);
    w.enter(POOL, PLAIN, 0, &[]);
    w.assembler.process_seen(ProcessFacts::unknown(Pid(100), Epoch(1)));
    assert_eq!(w.assembler.open_spans(), 0);
    assert_eq!(w.assembler.stats().stale_events, 1);
}

#[test]
fn the_end_of_tracing_ends_open_spans() {
    let mut w = World::new();
    w.enter(MAIN, COMMAND, 0, &[]);
    w.enter(POOL, NODE, 0, &[]);
    w.assembler.end_of_input(BootNanos(10_000));
    let spans = w.spans();
    assert_eq!(spans.len(), 2);
    for span in spans {
        assert_eq!(get(&span, "floe.incomplete").as_deref(), Some("tracing ended"));
        assert_eq!(span.end_time, SystemTime::UNIX_EPOCH + Duration::from_micros(10));
    }
}

#[test]
fn what_is_known_of_a_process_may_come_before_or_after_its_events() {
    let child = At(200, 2, 200);
    let facts = |pid, epoch, name: &str| ProcessFacts {
        service_name: Some(name.to_owned()),
        ..ProcessFacts::unknown(Pid(pid), Epoch(epoch))
    };
    let service = |finished: &FinishedSpan| {
        finished.resource.get(&opentelemetry::Key::from_static_str("service.name")).unwrap().to_string()
    };
    let mut w = World::new();
    w.assembler.process_seen(facts(200, 2, "child"));
    let outer = w.enter(MAIN, PLAIN, 0, &[]);
    w.fork(MAIN, child);
    let call = w.enter(child, PLAIN, 0, &[]);
    w.leave(child, PLAIN, call, &[]);
    w.assembler.process_seen(facts(100, 1, "parent"));
    w.leave(MAIN, PLAIN, outer, &[]);
    let grandchild = At(300, 3, 300);
    w.fork(MAIN, grandchild);
    let call = w.enter(grandchild, PLAIN, 0, &[]);
    w.leave(grandchild, PLAIN, call, &[]);
    let finished = w.assembler.drain();
    assert_eq!(finished.iter().map(service).collect::<Vec<_>>(), ["child", "parent", "parent"]);
    assert_eq!(finished[0].span.parent_span_id, id(&finished[1].span), "facts that came first do not hide the fork");
    let pid = finished[2].resource.get(&opentelemetry::Key::from_static_str("process.pid"));
    assert_eq!(pid, Some(300.into()), "a forked child is described as its parent, with its own pid");
}

#[test]
fn a_new_reading_of_the_clock_does_not_change_durations() {
    let mut w = World::new();
    let call = w.enter(MAIN, PLAIN, 0, &[]);
    let clock = Clock::new(BootNanos(0), SystemTime::UNIX_EPOCH + Duration::from_hours(1));
    w.assembler.set_clock(clock);
    w.leave(MAIN, PLAIN, call, &[]);
    let span = w.span();
    assert_eq!(span.end_time.duration_since(span.start_time).unwrap(), Duration::from_micros(1));
}

#[test]
fn unknown_probes_and_fields_are_ignored() {
    let mut w = World::new();
    let stamp = w.stamp(MAIN);
    let fields = vec![FieldValue { field: 99, value: Value::Int(1), cut: false }];
    w.assembler.handle(Event::Enter {
        stamp,
        probe: ProbeId(99),
        depth: 0,
        recursion: false,
        object: UserAddr(0),
        fields: fields.clone(),
    });
    assert_eq!(w.assembler.stats().unknown_probes, 1);
    let stamp = w.stamp(MAIN);
    w.assembler.handle(Event::Enter {
        stamp,
        probe: ProbeId(PLAIN),
        depth: 0,
        recursion: false,
        object: UserAddr(0),
        fields,
    });
    assert_eq!(w.assembler.open_spans(), 1);
}

#[test]
fn lists_are_arrays_of_one_type_and_dicts_are_one_attribute_per_entry() {
    let mut w = World::new();
    let call = w.enter(MAIN, NODE, 0, &[]);
    let mut fields = w.fields(NODE, Moment::Exit, &[("node.state", Value::List(vec![s("a"), s("b")]))]);
    fields[0].cut = true;
    let mut end = |fields| {
        let stamp = w.stamp(MAIN);
        let (call, object) = (BootNanos(call), UserAddr(0));
        w.assembler.handle(Event::Return {
            stamp,
            call,
            probe: ProbeId(NODE),
            outcome: Outcome::Returned,
            object,
            fields,
        });
        w.span()
    };
    let span = end(fields);
    assert_eq!(get(&span, "node.state").as_deref(), Some("[\"a\",\"b\"]"));
    assert_eq!(get(&span, "floe.truncated").as_deref(), Some("[\"node.state\"]"));

    for (list, array) in [
        (vec![Value::Int(1), Value::Int(2)], "[1,2]"),
        (vec![Value::Bool(true)], "[true]"),
        (vec![Value::Float(0.5)], "[0.5]"),
        (vec![Value::Int(1), s("x"), Value::None], "[\"1\",\"x\"]"),
        (vec![], "[]"),
    ] {
        let call = w.enter(MAIN, NODE, 0, &[]);
        w.leave(MAIN, NODE, call, &[("node.state", Value::List(list))]);
        assert_eq!(get(&w.span(), "node.state").as_deref(), Some(array));
    }

    let call = w.enter(MAIN, NODE, 0, &[]);
    let map = Value::Map(vec![("user".into(), s("ada")), ("none".into(), Value::None), ("n".into(), Value::Int(3))]);
    w.leave(MAIN, NODE, call, &[("node.state", map)]);
    let span = w.span();
    assert_eq!(get(&span, "node.state.user").as_deref(), Some("ada"));
    assert_eq!(get(&span, "node.state.n").as_deref(), Some("3"));
    assert_eq!(get(&span, "node.state.none"), None);
    assert_eq!(get(&span, "node.state"), None);
}

#[test]
fn a_call_that_the_pack_leaves_out_is_no_span_and_no_parent() {
    let mut w = World::new();
    let command = w.enter(MAIN, COMMAND, 0, &[]);
    let ghost = w.enter(MAIN, NODE, 1, &[("node.kind", s("ghost"))]);
    let inside = w.enter(MAIN, PLAIN, 2, &[]);
    w.leave(MAIN, PLAIN, inside, &[]);
    w.leave(MAIN, NODE, ghost, &[("node.state", s("error"))]);
    w.leave(MAIN, COMMAND, command, &[]);
    let [inside, command] = w.spans().try_into().unwrap();
    assert_eq!(inside.parent_span_id, id(&command));
    assert_eq!(get(&command, "floe.nodes"), None);
}
