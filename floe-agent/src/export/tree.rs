//! Finished spans as a tree of lines for people. Pure: spans in, text out.
//!
//! Everything that comes from a traced process is untrusted: control characters and escape sequences are taken out.

use std::collections::HashMap;
use std::fmt::Write;
use std::time::{Duration, SystemTime};

use opentelemetry::trace::{SpanId, Status};
use opentelemetry::{Key, KeyValue, Value};
use opentelemetry_sdk::trace::SpanData;

use crate::trace::FinishedSpan;

/// How to draw.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct View {
    /// Columns of the terminal; `None`: no terminal, nothing is cut.
    pub(super) width: Option<usize>,
    /// Colours.
    pub(super) color: bool,
}

/// Columns of the bars that show when a span ran; only where there is room.
const BAR: usize = 24;
const BAR_FROM_WIDTH: usize = 110;
/// Lines of a message on a terminal.
const MESSAGE_LINES: usize = 6;

/// Attributes that a line does not repeat: they are in its name, in its status, in its duration, or only of use to
/// a program.
const LEFT_OUT: [&str; 21] = [
    "code.function.name",
    "dbt.command",
    "dbt.database",
    "dbt.error.message",
    "dbt.error.type",
    "dbt.execution_time",
    "dbt.identifier",
    "dbt.message",
    "dbt.model_name",
    "dbt.query_id",
    "dbt.relative_path",
    "dbt.resource_type",
    "dbt.status",
    "dbt.thread",
    "dbt.unique_id",
    "error.type",
    "floe.incomplete",
    "floe.trace.lost_events",
    "floe.truncated",
    "process.exit.code",
    "thread.id",
];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Style {
    Plain,
    Bold,
    Dim,
    Red,
    Green,
    Yellow,
}

/// A line made of styled pieces.
#[derive(Default)]
struct Line {
    pieces: Vec<(Style, String)>,
    columns: usize,
}

impl Line {
    fn add(&mut self, style: Style, text: impl Into<String>) {
        let text = text.into();
        self.columns += columns(&text);
        self.pieces.push((style, text));
    }

    /// Adds a text in a field of `width` columns.
    fn field(&mut self, style: Style, text: &str, width: usize) {
        let text = cut(text, width);
        let gap = width - columns(&text);
        self.add(style, text);
        self.add(Style::Plain, " ".repeat(gap));
    }

    fn write(mut self, out: &mut String, view: View) {
        while let Some((_, last)) = self.pieces.last_mut() {
            last.truncate(last.trim_end().len());
            if !last.is_empty() {
                break;
            }
            self.pieces.pop();
        }
        let mut room = view.width.unwrap_or(usize::MAX);
        for (style, text) in self.pieces {
            let text = cut(&text, room);
            room -= columns(&text);
            let code = match style {
                Style::Plain => "",
                Style::Bold => "1",
                Style::Dim => "2",
                Style::Red => "31",
                Style::Green => "32",
                Style::Yellow => "33",
            };
            if view.color && !code.is_empty() && !text.is_empty() {
                let _ = write!(out, "\x1b[{code}m{text}\x1b[0m");
            } else {
                *out += &text;
            }
            if room == 0 {
                break;
            }
        }
        out.push('\n');
    }
}

/// A span and its place in the tree.
struct Row<'a> {
    finished: &'a FinishedSpan,
    /// In front of its name.
    branch: String,
    /// In front of the lines below it.
    below: String,
    /// In another process than its parent.
    elsewhere: bool,
}

/// Draws the trees below `tops` (indices into `spans`, which are of one trace) under one heading.
pub(super) fn draw(spans: &[FinishedSpan], tops: &[usize], view: View) -> String {
    let mut children: HashMap<SpanId, Vec<usize>> = HashMap::new();
    for (index, finished) in spans.iter().enumerate() {
        children.entry(finished.span.parent_span_id).or_default().push(index);
    }
    for siblings in children.values_mut() {
        siblings.sort_by_key(|index| (spans[*index].span.start_time, *index));
    }
    let mut out = String::new();
    let mut rows = Vec::new();
    for &top in tops {
        place(spans, &children, top, ["", "", ""], false, &mut rows);
    }
    if let Some(first) = rows.first() {
        heading(first.finished, view, &mut out);
        table(&rows, view, &mut out);
    }
    out
}

/// Puts a span and what is below it in order.
fn place<'a>(
    spans: &'a [FinishedSpan],
    children: &HashMap<SpanId, Vec<usize>>,
    index: usize,
    [before, branch, under]: [&str; 3],
    elsewhere: bool,
    rows: &mut Vec<Row<'a>>,
) {
    let finished = &spans[index];
    let inside = children.get(&finished.span.span_context.span_id()).map_or(&[][..], Vec::as_slice);
    let below = format!("{before}{under}");
    rows.push(Row {
        finished,
        branch: format!("{before}{branch}"),
        below: format!("{below}{}", if inside.is_empty() { "   " } else { "│  " }),
        elsewhere,
    });
    for (position, &child) in inside.iter().enumerate() {
        let last = position + 1 == inside.len();
        let [branch, under] = if last { ["└─ ", "   "] } else { ["├─ ", "│  "] };
        let elsewhere = process(&spans[child]) != process(finished);
        place(spans, children, child, [&below, branch, under], elsewhere, rows);
    }
}

fn process(finished: &FinishedSpan) -> Option<Value> {
    finished.resource.get(&Key::from_static_str("process.pid"))
}

fn heading(top: &FinishedSpan, view: View, out: &mut String) {
    let mut line = Line::default();
    let service = top.resource.get(&Key::from_static_str("service.name"));
    line.add(Style::Dim, format!("trace {}", top.span.span_context.trace_id()));
    for part in [service.map(|service| clean(&service.as_str())), process(top).map(|pid| format!("pid {pid}"))] {
        line.add(Style::Dim, part.map(|part| format!(" · {part}")).unwrap_or_default());
    }
    line.write(out, view);
}

fn table(rows: &[Row<'_>], view: View, out: &mut String) {
    let label_of: Vec<(Style, &str, String)> = rows.iter().map(|row| label(&row.finished.span)).collect();
    let widest = |widths: &mut dyn Iterator<Item = usize>| widths.max().unwrap_or(0);
    let mut name_width =
        widest(&mut rows.iter().map(|row| columns(&row.branch) + columns(&clean(&row.finished.span.name))));
    if let Some(width) = view.width {
        name_width = name_width.min((width * 45 / 100).max(20));
    }
    let label_width = widest(&mut label_of.iter().map(|(_, _, label)| columns(label)));
    let begin = rows.iter().map(|row| row.finished.span.start_time).min();
    let end = rows.iter().map(|row| row.finished.span.end_time).max();
    let (Some(begin), Some(end)) = (begin, end) else {
        return;
    };
    let whole = end.duration_since(begin).unwrap_or_default().max(Duration::from_nanos(1));
    for (row, (style, mark, label)) in rows.iter().zip(label_of) {
        let span = &row.finished.span;
        let mut line = Line::default();
        line.add(Style::Dim, row.branch.clone());
        let name_style = if row.branch.is_empty() { Style::Bold } else { Style::Plain };
        line.field(name_style, &clean(&span.name), name_width.saturating_sub(columns(&row.branch)));
        line.add(Style::Plain, format!("  {:>7}  ", duration(length(span))));
        if view.width.is_some_and(|width| width >= BAR_FROM_WIDTH) {
            bar(&mut line, span, begin, whole);
        }
        line.add(style, mark);
        line.add(Style::Plain, " ");
        line.field(style, &label, label_width);
        for (name, value) in details(row) {
            line.add(Style::Plain, "  ");
            line.add(Style::Dim, format!("{name}="));
            line.add(Style::Plain, value);
        }
        for mark in marks(span) {
            line.add(Style::Yellow, format!("  ({mark})"));
        }
        line.write(out, view);
        message(row, view, out);
    }
}

/// The mark and the word that say how a span ended.
fn label(span: &SpanData) -> (Style, &'static str, String) {
    let status = span.attributes.iter().find(|attribute| attribute.key.as_str().ends_with(".status"));
    let word = status.map(|status| clean(&status.value.as_str()));
    if matches!(span.status, Status::Error { .. }) {
        return (Style::Red, "✗", word.unwrap_or_else(|| "error".to_owned()));
    }
    if text(span, "floe.incomplete").is_some() {
        return (Style::Yellow, "?", word.unwrap_or_else(|| "incomplete".to_owned()));
    }
    match word.as_deref() {
        Some("skipped") => (Style::Yellow, "-", "skipped".to_owned()),
        Some("warn") => (Style::Yellow, "!", "warn".to_owned()),
        _ => (Style::Green, "✓", word.unwrap_or_default()),
    }
}

/// The word that counts a span in the summary, if it has one.
pub(super) fn outcome(span: &SpanData) -> Option<String> {
    let status = span.attributes.iter().find(|attribute| attribute.key.as_str().ends_with(".status"))?;
    Some(clean(&status.value.as_str()))
}

/// The attributes that a line shows, with short names.
fn details(row: &Row<'_>) -> Vec<(String, String)> {
    let span = &row.finished.span;
    let mut details: Vec<(String, String)> = Vec::new();
    if row.elsewhere {
        details.extend(process(row.finished).map(|pid| ("pid".to_owned(), pid.to_string())));
    }
    // The family of the span (`dbt`) is not repeated in the names of its attributes.
    let family = span.name.split('.').next().filter(|family| family.len() < span.name.len()).unwrap_or_default();
    for KeyValue { key, value, .. } in &span.attributes {
        let name = key.as_str();
        let dull = LEFT_OUT.contains(&name)
            || matches!(name, "floe.recursion" | "floe.trace.incomplete" | "floe.process.signal")
            || (name == "dbt.full_refresh" && *value == Value::Bool(false))
            || (name == "floe.nodes.failed" && *value == Value::I64(0));
        if !dull {
            let short = name.strip_prefix(family).and_then(|rest| rest.strip_prefix('.')).unwrap_or(name);
            details.push((clean(short), clean(&value.as_str())));
        }
    }
    details
}

/// What was wrong with the recording of a span.
fn marks(span: &SpanData) -> Vec<String> {
    let mut marks: Vec<String> = text(span, "floe.incomplete").into_iter().collect();
    if text(span, "floe.recursion").is_some() {
        marks.push("nested too deep, no longer traced".to_owned());
    }
    if let Some(lost) = text(span, "floe.trace.lost_events") {
        marks.push(format!("{lost} events of this trace lost"));
    }
    marks
}

/// What an error says, below its line.
fn message(row: &Row<'_>, view: View, out: &mut String) {
    let Status::Error { description } = &row.finished.span.status else {
        return;
    };
    let lines: Vec<String> = description.lines().map(clean).filter(|line| !line.trim().is_empty()).collect();
    let shown = if view.width.is_some() { lines.len().min(MESSAGE_LINES) } else { lines.len() };
    let more = lines.len() - shown;
    let rest = (more > 0).then(|| format!("… {more} more lines"));
    for text in lines.into_iter().take(shown).chain(rest) {
        let mut line = Line::default();
        line.add(Style::Dim, row.below.clone());
        line.add(Style::Red, text);
        line.write(out, view);
    }
}

fn bar(line: &mut Line, span: &SpanData, begin: SystemTime, whole: Duration) {
    let at = |time: SystemTime| {
        let share = time.duration_since(begin).unwrap_or_default().as_secs_f64() / whole.as_secs_f64();
        ((share * BAR as f64).round() as usize).min(BAR)
    };
    let from = at(span.start_time).min(BAR - 1);
    let to = at(span.end_time).max(from + 1);
    let style = if matches!(span.status, Status::Error { .. }) { Style::Red } else { Style::Green };
    line.add(Style::Dim, "·".repeat(from));
    line.add(style, "━".repeat(to - from));
    line.add(Style::Dim, "·".repeat(BAR - to));
    line.add(Style::Plain, "  ");
}

fn length(span: &SpanData) -> Duration {
    span.end_time.duration_since(span.start_time).unwrap_or_default()
}

fn text(span: &SpanData, name: &str) -> Option<String> {
    let attribute = span.attributes.iter().find(|attribute| attribute.key.as_str() == name)?;
    Some(clean(&attribute.value.as_str()))
}

/// A duration in at most seven columns.
pub(super) fn duration(duration: Duration) -> String {
    let (micros, seconds) = (duration.as_micros(), duration.as_secs());
    match duration.as_secs_f64() {
        _ if micros < 1_000 => format!("{micros} µs"),
        s if micros < 9_950 => format!("{:.2} ms", s * 1e3),
        s if micros < 999_500 => format!("{:.0} ms", s * 1e3),
        s if micros < 9_995_000 => format!("{s:.2} s"),
        s if seconds < 60 => format!("{s:.1} s"),
        _ if seconds < 3600 => format!("{}m {:02}s", seconds / 60, seconds % 60),
        _ => format!("{}h {:02}m", seconds / 3600, seconds / 60 % 60),
    }
}

/// A text without escape sequences, control characters and characters that change the direction of writing.
pub(super) fn clean(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        match c {
            '\x1b' if chars.peek() == Some(&'[') => {
                chars.next();
                // Up to the letter that ends the sequence.
                while chars.next().is_some_and(|c| !('@'..='~').contains(&c)) {}
            }
            '\n' | '\t' | '\r' => out.push(' '),
            '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}' => {}
            c if c.is_control() => {}
            c => out.push(c),
        }
    }
    out
}

/// Columns that a text takes on a terminal.
fn columns(text: &str) -> usize {
    text.chars().map(column).sum()
}

fn column(c: char) -> usize {
    match u32::from(c) {
        0x300..=0x36f | 0x200b..=0x200d | 0xfe00..=0xfe0f => 0,
        0x1100..=0x115f
        | 0x2e80..=0xa4cf
        | 0xac00..=0xd7a3
        | 0xf900..=0xfaff
        | 0xfe30..=0xfe6f
        | 0xff00..=0xff60
        | 0xffe0..=0xffe6
        | 0x1f300..=0x1faff
        | 0x20000..=0x3fffd => 2,
        _ => 1,
    }
}

/// Cuts a text to a number of columns.
fn cut(text: &str, width: usize) -> String {
    if columns(text) <= width {
        return text.to_owned();
    }
    let mut out = String::new();
    let mut used = 1;
    for c in text.chars() {
        used += column(c);
        if used > width {
            break;
        }
        out.push(c);
    }
    if width > 0 {
        out.push('…');
    }
    out
}

#[cfg(test)]
pub(super) mod tests {
    use std::sync::{Arc, LazyLock};

    use opentelemetry::InstrumentationScope;
    use opentelemetry::trace::{SpanContext, SpanKind, TraceFlags, TraceId, TraceState};
    use opentelemetry_sdk::Resource;
    use opentelemetry_sdk::trace::{SpanEvents, SpanLinks};

    use super::*;
    use crate::trace::ProcessFacts;
    use crate::units::{Epoch, Pid};

    static RESOURCE: LazyLock<Arc<Resource>> = LazyLock::new(|| {
        let facts = ProcessFacts { service_name: Some("dbt".into()), ..ProcessFacts::unknown(Pid(7), Epoch(1)) };
        Arc::new(facts.resource())
    });

    /// A moment, in milliseconds.
    pub(crate) fn at(milliseconds: u64) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_millis(milliseconds)
    }

    /// A span with times in milliseconds.
    pub(crate) fn span(trace: u128, id: u64, parent: u64, name: &str, from: u64, to: u64) -> FinishedSpan {
        let context =
            SpanContext::new(TraceId::from(trace), SpanId::from(id), TraceFlags::SAMPLED, false, TraceState::default());
        FinishedSpan {
            resource: Arc::clone(&RESOURCE),
            span: SpanData {
                span_context: context,
                parent_span_id: SpanId::from(parent),
                parent_span_is_remote: false,
                span_kind: SpanKind::Internal,
                name: name.to_owned().into(),
                start_time: at(from),
                end_time: at(to),
                attributes: Vec::new(),
                dropped_attributes_count: 0,
                events: SpanEvents::default(),
                links: SpanLinks::default(),
                status: Status::Unset,
                instrumentation_scope: InstrumentationScope::builder("floe-agent").build(),
            },
            sampled: None,
        }
    }

    pub(crate) fn with(mut finished: FinishedSpan, attributes: &[(&str, Value)]) -> FinishedSpan {
        let attributes = attributes.iter().map(|(name, value)| KeyValue::new((*name).to_owned(), value.clone()));
        finished.span.attributes.extend(attributes);
        finished
    }

    /// A dbt build with a failing test and a skipped model.
    pub(crate) fn build() -> Vec<FinishedSpan> {
        let s = |text: &str| Value::from(text.to_owned());
        let mut spans = vec![
            with(
                span(1, 2, 1, "dbt.seed.raw_orders", 900, 1010),
                &[
                    ("dbt.resource_type", s("seed")),
                    ("dbt.materialized", s("seed")),
                    ("dbt.schema", s("main")),
                    ("dbt.status", s("success")),
                    ("dbt.rows_affected", Value::I64(99)),
                    ("thread.id", Value::I64(8)),
                ],
            ),
            with(
                span(1, 4, 1, "dbt.test.not_null_orders_id", 1060, 1075),
                &[("dbt.status", s("fail")), ("dbt.failures", Value::I64(1))],
            ),
            with(
                span(1, 3, 1, "dbt.model.stg_orders", 1011, 1052),
                &[("dbt.status", s("success")), ("dbt.materialized", s("view"))],
            ),
            with(span(1, 6, 3, "sql", 1012, 1013), &[("text", s("select\n1\x1b[31m"))]),
            with(
                span(1, 5, 1, "dbt.model.orders", 1080, 1080),
                &[("dbt.status", s("skipped")), ("dbt.materialized", s("table"))],
            ),
            with(
                span(1, 1, 0, "dbt.build", 0, 2310),
                &[
                    ("dbt.command", s("build")),
                    ("dbt.target", s("dev")),
                    ("dbt.full_refresh", Value::Bool(false)),
                    ("floe.nodes", Value::I64(4)),
                    ("floe.nodes.failed", Value::I64(1)),
                ],
            ),
        ];
        spans[1].span.status =
            Status::error("Got 1 result, configured to fail if != 0\n\n  compiled code at target/x.sql");
        spans[5].span.status = Status::error("1 of 4 nodes failed");
        spans
    }

    const PLAIN: View = View { width: None, color: false };

    #[test]
    fn a_trace_is_a_tree_in_the_order_of_its_begins() {
        assert_eq!(
            draw(&build(), &[5], PLAIN),
            "\
trace 00000000000000000000000000000001 · dbt · pid 7
dbt.build                        2.31 s  ✗ error    target=dev  floe.nodes=4  floe.nodes.failed=1
│  1 of 4 nodes failed
├─ dbt.seed.raw_orders           110 ms  ✓ success  materialized=seed  schema=main  rows_affected=99
├─ dbt.model.stg_orders           41 ms  ✓ success  materialized=view
│  └─ sql                       1.00 ms  ✓          text=select 1
├─ dbt.test.not_null_orders_id    15 ms  ✗ fail     failures=1
│     Got 1 result, configured to fail if != 0
│       compiled code at target/x.sql
└─ dbt.model.orders                0 µs  - skipped  materialized=table
"
        );
    }

    #[test]
    fn a_wide_terminal_shows_when_each_span_ran() {
        let drawn = draw(&build(), &[5], View { width: Some(120), color: false });
        assert_eq!(
            drawn.lines().nth(3).unwrap(),
            "├─ dbt.seed.raw_orders           110 ms  ·········━··············  ✓ success  materialized=seed  schema=main  rows_affe…"
        );
    }

    #[test]
    fn nothing_is_wider_than_the_terminal() {
        for width in [20, 40, 80, 109, 110, 200] {
            for line in draw(&build(), &[5], View { width: Some(width), color: false }).lines() {
                assert!(columns(line) <= width, "{width}: {line}");
            }
        }
    }

    #[test]
    fn colours_are_only_there_when_they_are_wanted() {
        let plain = draw(&build(), &[5], PLAIN);
        let colored = draw(&build(), &[5], View { color: true, ..PLAIN });
        assert!(!plain.contains('\x1b'));
        assert!(colored.contains("\x1b[31m✗\x1b[0m"));
        assert_eq!(
            colored
                .split("\x1b[")
                .map(|piece| piece.split_once('m').map_or(piece, |(_, text)| text))
                .collect::<String>(),
            plain
        );
    }

    #[test]
    fn incomplete_spans_and_other_processes_are_marked() {
        let mut child = with(span(1, 2, 1, "load", 1, 2), &[("floe.incomplete", "process exited".into())]);
        child.resource = Arc::new(ProcessFacts::unknown(Pid(8), Epoch(2)).resource());
        let root = with(span(1, 1, 0, "main", 0, 3), &[("floe.trace.lost_events", Value::I64(4))]);
        assert_eq!(
            draw(&[child, root], &[1], PLAIN),
            "\
trace 00000000000000000000000000000001 · dbt · pid 7
main     3.00 ms  ✓             (4 events of this trace lost)
└─ load  1.00 ms  ? incomplete  pid=8  (process exited)
"
        );
    }

    #[test]
    fn long_messages_are_cut_on_a_terminal_only() {
        let mut root = span(1, 1, 0, "main", 0, 3);
        root.span.status = Status::error((0..9).map(|line| format!("line {line}")).collect::<Vec<_>>().join("\n"));
        let lines = |view| draw(std::slice::from_ref(&root), &[0], view).lines().count();
        assert_eq!(lines(PLAIN), 2 + 9);
        assert_eq!(lines(View { width: Some(80), color: false }), 2 + 6 + 1);
    }

    #[test]
    fn what_could_command_the_terminal_is_taken_out() {
        assert_eq!(clean("a\x1b[31;1mred\x1b[0m\x07\u{9b}b\tc\u{202e}d\x1b]0;t"), "aredb cd]0;t");
    }

    #[test]
    fn durations_are_short() {
        for (nanos, text) in [
            (0, "0 µs"),
            (999_999, "999 µs"),
            (1_230_000, "1.23 ms"),
            (12_300_000, "12 ms"),
            (999_400_000, "999 ms"),
            (2_314_000_000, "2.31 s"),
            (59_900_000_000, "59.9 s"),
            (62_000_000_000, "1m 02s"),
            (3_720_000_000_000, "1h 02m"),
        ] {
            assert_eq!(duration(Duration::from_nanos(nanos)), text);
        }
    }

    #[test]
    fn texts_are_cut_by_columns() {
        assert_eq!(cut("abcdef", 6), "abcdef");
        assert_eq!(cut("abcdef", 4), "abc…");
        assert_eq!(cut("漢字漢字", 5), "漢字…");
        assert_eq!(cut("abc", 0), "");
    }
}
