//! The live line on the terminal: spans, open spans, errors, events lost. Nothing where standard error is no terminal.

use std::io::{IsTerminal as _, Write as _};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

/// How often the line is looked at; it is drawn only when it has changed.
pub(super) const PERIOD: Duration = Duration::from_millis(250);

/// What the event thread tells the line.
#[derive(Debug, Default)]
pub(super) struct Counts {
    pub(super) spans: AtomicU64,
    pub(super) open: AtomicU64,
    pub(super) errors: AtomicU64,
    pub(super) lost: AtomicU64,
    ended: AtomicBool,
}

impl Counts {
    /// The line. The command writes to the same terminal: after it the cursor is where it was, at the beginning of a line.
    fn line(&self) -> String {
        let read = |count: &AtomicU64| count.load(Ordering::Relaxed);
        let (spans, open, errors, lost) = (read(&self.spans), read(&self.open), read(&self.errors), read(&self.lost));
        format!("floe-agent: {spans} spans, {open} open, {errors} errors, {lost} events lost")
    }
}

/// The thread that draws the line.
#[derive(Debug)]
pub(super) struct Line {
    counts: Arc<Counts>,
    thread: Option<JoinHandle<()>>,
}

impl Line {
    /// Begins to draw, if somebody wants it and there is a terminal.
    pub(super) fn start(wanted: bool) -> Self {
        let counts = Arc::new(Counts::default());
        let shared = Arc::clone(&counts);
        let draw = move || {
            let mut last = String::new();
            while !shared.ended.load(Ordering::Relaxed) {
                std::thread::park_timeout(PERIOD);
                let line = shared.line();
                if line != last && shared.spans.load(Ordering::Relaxed) + shared.open.load(Ordering::Relaxed) > 0 {
                    write(&format!("\r\x1b[2m{line}\x1b[0m\x1b[K\r"));
                    last = line;
                }
            }
            if !last.is_empty() {
                write("\r\x1b[K");
            }
        };
        let visible = wanted && std::io::stderr().is_terminal();
        let thread =
            visible.then(|| std::thread::Builder::new().name("floe-progress".into()).spawn(draw).ok()).flatten();
        Self { counts, thread }
    }

    /// Where the counts go.
    pub(super) fn counts(&self) -> Arc<Counts> {
        Arc::clone(&self.counts)
    }

    /// Takes the line away.
    pub(super) fn end(self) {
        self.counts.ended.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread {
            thread.thread().unpark();
            let _ = thread.join();
        }
    }
}

/// A terminal that cannot be written to is no reason for anything.
fn write(text: &str) {
    let mut stderr = std::io::stderr().lock();
    let _ = stderr.write_all(text.as_bytes()).and_then(|()| stderr.flush());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_line_says_what_was_counted_and_nothing_is_drawn_without_a_terminal() {
        let line = Line { counts: Arc::default(), thread: None };
        let counts = line.counts();
        counts.spans.store(12, Ordering::Relaxed);
        counts.errors.store(1, Ordering::Relaxed);
        assert_eq!(counts.line(), "floe-agent: 12 spans, 0 open, 1 errors, 0 events lost");
        line.end();
        assert!(Line::start(false).thread.is_none());
    }
}
