//! Log records: of Python's `logging`, and of dbt.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use opentelemetry::trace::SpanId;
use opentelemetry::{InstrumentationScope, KeyValue};
use opentelemetry_proto::tonic::common::v1::{AnyValue, any_value};
use opentelemetry_proto::tonic::logs::v1::LogRecord;
use opentelemetry_proto::transform::common::tonic::Attributes;
use opentelemetry_semantic_conventions::attribute as semconv;

use super::assembler::Core;
use super::log::FinishedLog;
use super::process::Process;
use super::traces::Trace;
use super::values::{Values, is_local};
use crate::catalogue::Role;
use crate::catalogue::probe::LogRule;
use crate::kernel::event::Stamp;
use crate::units::{BootNanos, ProbeId, Tid};

/// The loggers that dbt writes its lines to: one for the terminal, one for its file.
const DBT_LOGGERS: [&str; 2] = ["stdout_log", "file_log"];
/// The name that dbt's records have as their logger.
const DBT: &str = "dbt";
/// The attribute with the type of the exception that a record tells of.
const EXCEPTION: &str = "_exception_type";
/// Records of other threads between which a repeated one is recognised.
const REPEATED: usize = 64;

/// Severity of a log record; the numbers are OpenTelemetry's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogLevel {
    /// Below debug.
    Trace = 1,
    /// Debug.
    Debug = 5,
    /// Info.
    Info = 9,
    /// Warning.
    Warn = 13,
    /// Error.
    Error = 17,
    /// Critical.
    Fatal = 21,
    /// Above all: nothing is taken.
    Off = 25,
}

impl LogLevel {
    /// From a level of Python's `logging`, or from a name.
    pub fn parse(text: &str) -> Option<Self> {
        if let Ok(number) = text.parse::<i64>() {
            return Some(match number {
                50.. => Self::Fatal,
                40.. => Self::Error,
                30.. => Self::Warn,
                20.. => Self::Info,
                10.. => Self::Debug,
                _ => Self::Trace,
            });
        }
        Some(match text.to_ascii_lowercase().as_str() {
            "critical" | "fatal" => Self::Fatal,
            "error" => Self::Error,
            "warn" | "warning" => Self::Warn,
            "info" => Self::Info,
            "debug" | "test" => Self::Debug,
            "trace" => Self::Trace,
            "off" => Self::Off,
            _ => return None,
        })
    }

    fn name(self) -> &'static str {
        match self {
            Self::Trace => "TRACE",
            Self::Debug => "DEBUG",
            Self::Info => "INFO",
            Self::Warn => "WARN",
            Self::Error => "ERROR",
            Self::Fatal => "FATAL",
            Self::Off => "OFF",
        }
    }
}

/// Which log records are taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LogSettings {
    /// Records below are left out.
    pub level: LogLevel,
    /// Records of one process in a second, on average.
    pub rate: u32,
    /// Records of one process at once.
    pub burst: u32,
}

impl Default for LogSettings {
    fn default() -> Self {
        Self { level: LogLevel::Info, rate: 100, burst: 1000 }
    }
}

/// What became of log records.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LogStats {
    /// Records that were taken.
    pub records: u64,
    /// Records that were dropped because their process wrote too many.
    pub dropped: u64,
}

/// What is kept of the log records of a process.
#[derive(Debug, Default)]
pub(super) struct ProcessLogs {
    /// Records that may be taken, in thousandths; `None`: none was taken yet.
    allowance: Option<u64>,
    at: BootNanos,
    dropped: u64,
    /// The last records of dbt: each event goes to several loggers.
    last: VecDeque<(Tid, String)>,
}

impl ProcessLogs {
    /// Whether another record may be taken; with the number that was dropped before it.
    fn admit(&mut self, now: BootNanos, settings: &LogSettings) -> Option<u64> {
        let most = u64::from(settings.burst) * 1000;
        let passed = now.0.saturating_sub(self.at.0) / 1000; // microseconds: a thousandth record at one a second is 1 ms
        let earned = passed.saturating_mul(u64::from(settings.rate)) / 1000;
        let allowance = self.allowance.map_or(most, |left| left.saturating_add(earned).min(most));
        if earned > 0 || self.allowance.is_none() {
            self.at = now;
        }
        if allowance < 1000 {
            self.allowance = Some(allowance);
            self.dropped += 1;
            return None;
        }
        self.allowance = Some(allowance - 1000);
        Some(std::mem::take(&mut self.dropped))
    }

    /// Whether the thread's last record was the same.
    fn repeated(&mut self, tid: Tid, body: &str) -> bool {
        if let Some((_, last)) = self.last.iter_mut().find(|(owner, _)| *owner == tid) {
            if last == body {
                return true;
            }
            body.clone_into(last);
            return false;
        }
        if self.last.len() >= REPEATED {
            self.last.pop_front();
        }
        self.last.push_back((tid, body.to_owned()));
        false
    }
}

impl Core {
    /// A log record was written.
    pub(super) fn log(
        &mut self,
        process: &mut Process,
        stamp: &Stamp,
        probe: ProbeId,
        rule: &LogRule,
        values: &Values,
    ) {
        // A handler that hands the record on to another logger: it is the same record.
        if process.frames(stamp.tid).iter().any(|frame| frame.probe == probe && frame.call != stamp.time) {
            return;
        }
        let Some(mut level) = values.text(&rule.level).and_then(|level| LogLevel::parse(&level)) else {
            return;
        };
        let mut logger = rule.logger.render_complete(|name| values.text(name)).unwrap_or_default();
        let Some(mut body) = values.text(&rule.body) else {
            return;
        };
        let arguments: Vec<String> = rule.arguments.iter().flat_map(|name| values.texts(name)).collect();
        if DBT_LOGGERS.contains(&logger.as_str()) {
            let Some(line) = DbtLine::parse(&body) else {
                return;
            };
            // Printed text goes out as an error, so that `--quiet` does not hide it.
            if line.printed && level == LogLevel::Error {
                level = LogLevel::Info;
            }
            DBT.clone_into(&mut logger);
            body = line.message;
        } else if !arguments.is_empty()
            && let Some(formatted) = format(&body, &arguments)
        {
            body = formatted;
        }
        if level < self.logs.level {
            return;
        }
        if logger == DBT {
            body = without_colours(&body);
            if process.logs.repeated(stamp.tid, body.trim()) {
                return;
            }
        }
        let Some(dropped) = process.logs.admit(stamp.time, &self.logs) else {
            self.log_stats.dropped += 1;
            return;
        };
        self.log_stats.records += 1;
        let (trace, span) = log_place(process, stamp.tid);
        let fields = [&rule.body, &rule.level].into_iter().chain(&rule.arguments).chain(&rule.event);
        let fields: Vec<&String> = fields.collect();
        let is_field = |name: &str| fields.iter().any(|field| *field == name);
        let own =
            values.attributes.iter().filter(|known| !is_local(known.key.as_str()) && !is_field(known.key.as_str()));
        let mut attributes: Vec<KeyValue> = own.cloned().collect();
        attributes.push(KeyValue::new(semconv::THREAD_ID, i64::from(stamp.tid.0)));
        if let Some(kind) = values.text(EXCEPTION) {
            attributes.push(KeyValue::new(semconv::EXCEPTION_TYPE, kind));
        }
        if values.cut.iter().any(|name| name.as_str() == rule.body) {
            attributes.push(KeyValue::new("floe.truncated", true));
        }
        if dropped > 0 {
            attributes.push(KeyValue::new("floe.logs.dropped", i64::try_from(dropped).unwrap_or(i64::MAX)));
        }
        let time = nanos(self.clock.wall(stamp.time));
        let record = LogRecord {
            time_unix_nano: time,
            observed_time_unix_nano: time,
            severity_number: level as i32,
            severity_text: level.name().to_owned(),
            body: Some(AnyValue { value: Some(any_value::Value::StringValue(body)) }),
            attributes: Attributes::from(attributes).0,
            span_id: span.map(|span| span.to_bytes().to_vec()).unwrap_or_default(),
            event_name: rule.event.as_ref().and_then(|name| values.text(name)).unwrap_or_default(),
            ..LogRecord::default()
        };
        let scope = InstrumentationScope::builder(logger).build();
        let log = FinishedLog { resource: Arc::clone(&process.resource), scope, record };
        self.traces.logged(&trace, log, stamp.time);
    }
}

/// The trace and the span that a log record belongs to which this thread writes now.
fn log_place(process: &Process, tid: Tid) -> (Arc<Trace>, Option<SpanId>) {
    let span = process.innermost(tid, |span| span.role != Role::Leaf);
    let span = span.and_then(|id| process.spans().find(|span| span.id == id));
    let named = process.frames(tid).iter().rev().find_map(|frame| Some((frame.call, frame.logs_of.as_ref()?)));
    match (named, span) {
        (Some((_, (trace, id))), None) => (Arc::clone(trace), Some(*id)),
        (Some((call, (trace, id))), Some(span)) if call >= span.began => (Arc::clone(trace), Some(*id)),
        (_, Some(span)) => (Arc::clone(&span.trace), Some(span.id)),
        (None, None) => {
            let (trace, span, _) = process.place(tid);
            (trace, span)
        }
    }
}

fn nanos(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_nanos() as u64)
}

/// A line of dbt's text logs.
struct DbtLine {
    message: String,
    /// It has no time before it.
    printed: bool,
}

impl DbtLine {
    /// `12:34:56  message`, or `12:34:56.123456 [info ] [MainThread]: message`. `None` for JSON, which comes on another way.
    fn parse(line: &str) -> Option<Self> {
        if line.starts_with(r#"{"data": "#) || line.starts_with(r#"{"info": "#) {
            return None;
        }
        let plain = without_colours(line);
        // Before the first message of an invocation stands a separator.
        let text = plain.trim_start_matches('\n');
        let text = if text.starts_with("====") { text.split_once('\n').map_or("", |(_, rest)| rest) } else { text };
        let (time, rest) = text.split_once(' ').unwrap_or((text, ""));
        let is_time = time.len() >= 8
            && time.bytes().enumerate().all(|(at, byte)| match at {
                2 | 5 => byte == b':',
                8 => byte == b'.',
                _ => byte.is_ascii_digit(),
            });
        if !is_time {
            return Some(Self { message: line.to_owned(), printed: true });
        }
        let rest = rest.trim_start();
        let message = match rest.strip_prefix('[').and_then(|rest| rest.split_once("]: ")) {
            Some((head, message)) if head.contains("] [") && time.len() > 8 => message,
            _ => rest,
        };
        Some(Self { message: message.to_owned(), printed: false })
    }
}

/// Without the escape sequences that colour a terminal.
fn without_colours(text: &str) -> String {
    let mut plain = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find("\u{1b}[") {
        plain.push_str(&rest[..at]);
        let after = &rest[at + 2..];
        let end = after.find(|c: char| ('\u{40}'..='\u{7e}').contains(&c));
        rest = end.map_or("", |end| &after[end + 1..]);
    }
    plain.push_str(rest);
    plain
}

/// Python's `message % arguments` for simple arguments; `None` if they do not fit.
fn format(message: &str, arguments: &[String]) -> Option<String> {
    let mut out = String::with_capacity(message.len());
    let mut arguments = arguments.iter();
    let mut rest = message;
    while let Some(at) = rest.find('%') {
        out.push_str(&rest[..at]);
        let spec = &rest[at + 1..];
        let end = spec.find(|c: char| c.is_ascii_alphabetic() || c == '%')?;
        let (options, conversion) = (&spec[..end], spec[end..].chars().next()?);
        rest = &spec[end + 1..];
        if conversion == '%' {
            out.push('%');
            continue;
        }
        let (width, precision) = options.split_once('.').map_or((options, None), |(w, p)| (w, Some(p)));
        let flags: String = width.chars().take_while(|c| "-0+ #".contains(*c)).collect();
        let width: usize = match &width[flags.len()..] {
            "" => 0,
            digits => digits.parse().ok().filter(|width| *width < 256)?,
        };
        let precision: Option<usize> = match precision {
            Some(digits) => Some(digits.parse().ok().filter(|precision| *precision < 64)?),
            None => None,
        };
        let argument = arguments.next()?;
        let number = || argument.parse::<f64>().ok();
        let mut text = match conversion {
            's' | 'a' => argument.chars().take(precision.unwrap_or(usize::MAX)).collect(),
            'r' if number().is_some() => argument.clone(),
            'r' => format!("'{argument}'"),
            'd' | 'i' | 'u' => argument
                .parse::<i64>()
                .map(|int| int.to_string())
                .ok()
                .or_else(|| number().map(|f| format!("{f:.0}")))?,
            'f' | 'F' => format!("{:.*}", precision.unwrap_or(6), number()?),
            'x' => format!("{:x}", argument.parse::<i64>().ok()?),
            _ => return None,
        };
        if flags.contains('+') && "dif".contains(conversion) && !text.starts_with('-') {
            text.insert(0, '+');
        }
        let missing = width.saturating_sub(text.chars().count());
        if flags.contains('-') {
            text.extend(std::iter::repeat_n(' ', missing));
        } else if flags.contains('0') && conversion != 's' {
            let sign = usize::from(text.starts_with(['-', '+']));
            text.insert_str(sign, &"0".repeat(missing));
        } else {
            text.insert_str(0, &" ".repeat(missing));
        }
        out.push_str(&text);
    }
    out.push_str(rest);
    arguments.next().is_none().then_some(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_formatted_as_python_does() {
        for (message, arguments, expected) in [
            ("%s took %.2f s", &["a", "1.239"][..], Some("a took 1.24 s")),
            ("%d of %i (100%%)", &["3", "7.9"], Some("3 of 8 (100%)")),
            ("[%-5s|%5s|%05d|%+d]", &["ab", "cd", "-42", "7"], Some("[ab   |   cd|-0042|+7]")),
            ("%r %r", &["x", "3"], Some("'x' 3")),
            ("%x", &["255"], Some("ff")),
            ("%s %s", &["one"], None),
            ("%s", &["one", "two"], None),
            ("%(name)s", &["x"], None),
            ("%*d", &["3", "4"], None),
            ("100%", &["x"], None),
            ("%d", &["x"], None),
        ] {
            let arguments: Vec<String> = arguments.iter().map(|&text| text.to_owned()).collect();
            assert_eq!(format(message, &arguments).as_deref(), expected, "{message}");
        }
    }

    #[test]
    fn dbts_lines_are_taken_apart() {
        for (line, message, printed) in [
            (
                "\u{1b}[0m12:34:56  1 of 2 OK created [\u{1b}[32mSELECT\u{1b}[0m in 0.05s]",
                "1 of 2 OK created [SELECT in 0.05s]",
                false,
            ),
            ("\u{1b}[0m12:34:56.123456 [info ] [Thread-1 (]: Running [x]: y", "Running [x]: y", false),
            (
                "\n\n============================== 12:34:56.123456 | 0b-1 ==============================\n\u{1b}[0m12:34:56.123456 [info ] [MainThread]: Running with dbt=1.10",
                "Running with dbt=1.10",
                false,
            ),
            ("12:34:56", "", false),
            ("| id | name |", "| id | name |", true),
            ("", "", true),
        ] {
            let parsed = DbtLine::parse(line).unwrap();
            assert_eq!((parsed.message.as_str(), parsed.printed), (message, printed), "{line:?}");
        }
        assert!(DbtLine::parse(r#"{"data": {}, "info": {}}"#).is_none());
        assert_eq!(without_colours("a\u{1b}[1;31mb\u{1b}["), "ab");
    }

    #[test]
    fn levels_are_numbers_of_logging_or_names() {
        for (text, level) in
            [("10", LogLevel::Debug), ("25", LogLevel::Info), ("50", LogLevel::Fatal), ("5", LogLevel::Trace)]
        {
            assert_eq!(LogLevel::parse(text), Some(level));
        }
        assert_eq!(LogLevel::parse("WARNING"), Some(LogLevel::Warn));
        assert_eq!(LogLevel::parse("what"), None);
    }

    #[test]
    fn a_process_that_writes_too_much_is_cut_short_and_counted() {
        let settings = LogSettings { rate: 10, burst: 5, ..LogSettings::default() };
        let mut logs = ProcessLogs::default();
        let second = 1_000_000_000;
        let taken = |logs: &mut ProcessLogs, from: u64| {
            (0..20).filter_map(|n| logs.admit(BootNanos(from + n), &settings)).collect::<Vec<_>>()
        };
        assert_eq!(taken(&mut logs, 0), [0; 5]);
        assert_eq!(taken(&mut logs, second / 10), [15], "one more a tenth of a second later");
        assert_eq!(taken(&mut logs, 60 * second), [19, 0, 0, 0, 0], "never more than the burst");
        // Small steps add up.
        let mut logs = ProcessLogs::default();
        let all = (0..10_000).filter_map(|n| logs.admit(BootNanos(n * second / 1000), &settings)).count();
        assert!((100..=106).contains(&all), "{all}");
    }

    #[test]
    fn the_same_event_in_two_logs_of_dbt_is_one_record() {
        let mut logs = ProcessLogs::default();
        assert!(!logs.repeated(Tid(1), "a"));
        assert!(!logs.repeated(Tid(2), "a"));
        assert!(logs.repeated(Tid(1), "a"));
        assert!(!logs.repeated(Tid(1), "b"));
        assert!(!logs.repeated(Tid(1), "a"));
    }
}
