//! The tree on the terminal: a trace is printed when its root ends.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::io::{IsTerminal, Write};

use opentelemetry::trace::{SpanId, Status, TraceId};

use super::ExportError;
use super::pipeline::{Finish, LocalSink};
use super::tree::{self, View};
use crate::trace::{FinishedLog, FinishedSpan};

/// Spans that wait for the root of their tree. Beyond this, trees are printed in parts.
const WAITING: usize = 50_000;
/// Traces that are told apart in the summary.
const TRACES: usize = 1_000_000;

/// How the console looks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ConsoleOptions {
    /// Columns; `None`: not a terminal, nothing is cut.
    pub width: Option<usize>,
    /// Colours.
    pub color: bool,
}

impl ConsoleOptions {
    /// As standard error wants it: colours and cut lines only on a terminal, no colours with `NO_COLOR`, the width
    /// of `COLUMNS` if that is set.
    pub fn detect() -> Self {
        let stderr = std::io::stderr();
        if !stderr.is_terminal() {
            return Self { width: None, color: false };
        }
        let columns = std::env::var("COLUMNS").ok().and_then(|columns| columns.parse().ok());
        let size = || rustix::termios::tcgetwinsize(&stderr).ok().map(|size| usize::from(size.ws_col));
        let width = columns.or_else(size).filter(|columns| *columns > 0);
        let no_color = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
        Self { width: Some(width.unwrap_or(80)), color: !no_color }
    }
}

/// Prints trees.
pub(super) struct Console {
    out: Box<dyn Write + Send>,
    view: View,
    waiting: HashMap<TraceId, Vec<FinishedSpan>>,
    count: usize,
    traces: HashSet<TraceId>,
    spans: u64,
    errors: u64,
    incomplete: u64,
    outcomes: BTreeMap<String, u64>,
}

impl Console {
    /// Prints to `out`.
    pub(super) fn new(out: Box<dyn Write + Send>, options: ConsoleOptions) -> Self {
        let ConsoleOptions { width, color } = options;
        Self {
            out,
            view: View { width, color },
            waiting: HashMap::new(),
            count: 0,
            traces: HashSet::new(),
            spans: 0,
            errors: 0,
            incomplete: 0,
            outcomes: BTreeMap::new(),
        }
    }

    fn print(&mut self, text: &str) -> Result<(), ExportError> {
        // The live line may stand there.
        let clear = if self.view.width.is_some() { "\r\x1b[K" } else { "" };
        self.out
            .write_all(format!("{clear}{text}").as_bytes())
            .and_then(|()| self.out.flush())
            .map_err(|source| ExportError::Write { sink: "the console".to_owned(), source })
    }

    fn count(&mut self, finished: &FinishedSpan) {
        let span = &finished.span;
        self.spans += 1;
        self.errors += u64::from(matches!(span.status, Status::Error { .. }));
        self.incomplete += u64::from(span.attributes.iter().any(|kv| kv.key.as_str() == "floe.incomplete"));
        if self.traces.len() < TRACES {
            self.traces.insert(span.span_context.trace_id());
        }
        if let Some(outcome) = tree::outcome(span).filter(|_| self.outcomes.len() < 32) {
            *self.outcomes.entry(outcome).or_default() += 1;
        }
    }

    /// Prints the tree of a root that has ended.
    fn print_root(&mut self, trace: TraceId, root: SpanId) -> Result<(), ExportError> {
        let spans = self.waiting.remove(&trace).unwrap_or_default();
        let mut children: HashMap<SpanId, Vec<usize>> = HashMap::new();
        for (index, finished) in spans.iter().enumerate() {
            children.entry(finished.span.parent_span_id).or_default().push(index);
        }
        let top = spans.iter().position(|finished| finished.span.span_context.span_id() == root);
        let mut mine: HashSet<usize> = top.into_iter().collect();
        let mut next: Vec<usize> = top.into_iter().collect();
        while let Some(index) = next.pop() {
            let inside = children.remove(&spans[index].span.span_context.span_id()).unwrap_or_default();
            mine.extend(&inside);
            next.extend(inside);
        }
        let (mut tree, mut rest) = (Vec::new(), Vec::new());
        for (index, finished) in spans.into_iter().enumerate() {
            if mine.contains(&index) {
                tree.push(finished);
            } else {
                rest.push(finished);
            }
        }
        self.count -= tree.len();
        if !rest.is_empty() {
            self.waiting.insert(trace, rest);
        }
        let top = tree.iter().position(|finished| finished.span.span_context.span_id() == root);
        let text = tree::draw(&tree, top.as_slice(), self.view);
        self.print(&format!("\n{text}"))
    }

    /// Prints everything that waits: what belongs to something that has not ended, or was printed before.
    fn print_rest(&mut self) -> Result<(), ExportError> {
        let mut traces: Vec<Vec<FinishedSpan>> = std::mem::take(&mut self.waiting).into_values().collect();
        self.count = 0;
        traces.sort_by_key(|spans| spans.iter().map(|finished| finished.span.start_time).min());
        for spans in traces {
            let known: HashSet<SpanId> = spans.iter().map(|finished| finished.span.span_context.span_id()).collect();
            let mut tops: Vec<usize> =
                (0..spans.len()).filter(|index| !known.contains(&spans[*index].span.parent_span_id)).collect();
            tops.sort_by_key(|index| spans[*index].span.start_time);
            let text = tree::draw(&spans, &tops, self.view);
            self.print(&format!("\n{text}"))?;
        }
        Ok(())
    }

    fn summary(&self, lost: u64) -> String {
        let count = |number: u64, what: &str| format!("{number} {what}{}", if number == 1 { "" } else { "s" });
        let mut parts = vec![format!("{} in {}", count(self.spans, "span"), count(self.traces.len() as u64, "trace"))];
        parts.push(count(self.errors, "error"));
        if self.incomplete > 0 {
            parts.push(format!("{} incomplete", self.incomplete));
        }
        parts.push(format!("{} lost", count(lost, "event")));
        let mut summary = parts.join(", ");
        if !self.outcomes.is_empty() {
            let outcomes: Vec<_> = self.outcomes.iter().map(|(outcome, count)| format!("{outcome} {count}")).collect();
            summary = format!("{summary} · {}", outcomes.join(", "));
        }
        summary
    }
}

impl LocalSink for Console {
    fn write(&mut self, spans: &[FinishedSpan]) -> Result<(), ExportError> {
        let mut roots = Vec::new();
        for finished in spans {
            self.count(finished);
            let context = &finished.span.span_context;
            if finished.span.parent_span_id == SpanId::INVALID {
                roots.push((context.trace_id(), context.span_id()));
            }
            self.waiting.entry(context.trace_id()).or_default().push(finished.clone());
            self.count += 1;
        }
        for (trace, root) in roots {
            self.print_root(trace, root)?;
        }
        if self.count > WAITING {
            self.print_rest()?;
        }
        Ok(())
    }

    /// The program prints its log itself.
    fn write_logs(&mut self, _: &[FinishedLog]) -> Result<(), ExportError> {
        Ok(())
    }

    fn finish(&mut self, finish: Finish) -> Result<(), ExportError> {
        self.print_rest()?;
        let summary = self.summary(finish.lost_events);
        self.print(&format!("\n{summary}\n"))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::super::tree::tests::{build, span, with};
    use super::*;

    #[derive(Clone, Default)]
    struct Screen(Arc<Mutex<Vec<u8>>>);

    impl Screen {
        fn text(&self) -> String {
            String::from_utf8(std::mem::take(&mut *self.0.lock().unwrap())).unwrap()
        }
    }

    impl Write for Screen {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    fn console() -> (Console, Screen) {
        let screen = Screen::default();
        (Console::new(Box::new(screen.clone()), ConsoleOptions { width: None, color: false }), screen)
    }

    fn finish(lost_events: u64) -> Finish {
        Finish { lost_events, ..Finish::default() }
    }

    #[test]
    fn a_trace_is_printed_when_its_root_has_ended() {
        let (mut console, screen) = console();
        let spans = build();
        console.write(&spans[..5]).unwrap();
        assert_eq!(screen.text(), "");
        console.write(&spans[5..]).unwrap();
        assert_eq!(screen.text().lines().count(), 11);
        console.finish(finish(0)).unwrap();
        assert_eq!(screen.text(), "\n6 spans in 1 trace, 2 errors, 0 events lost · fail 1, skipped 1, success 2\n");
    }

    #[test]
    fn two_roots_of_one_trace_are_two_trees() {
        let (mut console, screen) = console();
        let late = span(1, 4, 2, "inside two", 6, 7);
        console.write(&[late, span(1, 3, 1, "inside one", 1, 2), span(1, 1, 0, "one", 0, 5)]).unwrap();
        let text = screen.text();
        assert!(text.contains("one") && text.contains("inside one") && !text.contains("inside two"), "{text}");
        console.write(&[span(1, 2, 0, "two", 5, 9)]).unwrap();
        assert!(screen.text().contains("└─ inside two"));
    }

    #[test]
    fn what_never_got_its_root_is_printed_at_the_end() {
        let (mut console, screen) = console();
        let open = with(span(2, 5, 9, "outer", 1, 9), &[("floe.incomplete", "tracing ended".into())]);
        console.write(&[span(2, 6, 5, "inner", 2, 3), open]).unwrap();
        assert_eq!(screen.text(), "");
        console.finish(finish(7)).unwrap();
        let text = screen.text();
        assert!(text.contains("outer") && text.contains("└─ inner"), "{text}");
        assert!(text.ends_with("\n2 spans in 1 trace, 0 errors, 1 incomplete, 7 events lost\n"), "{text}");
    }

    #[test]
    fn memory_is_bounded_by_printing_in_parts() {
        let (mut console, screen) = console();
        let spans: Vec<_> = (0..=WAITING as u64).map(|id| span(1, id + 2, 1, "s", 0, 1)).collect();
        console.write(&spans).unwrap();
        assert!(!screen.text().is_empty());
        assert_eq!(console.count, 0);
        assert!(console.waiting.is_empty());
    }
}
