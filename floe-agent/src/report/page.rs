//! The page: what the script draws, as JSON within the HTML.
//!
//! Most texts occur many times (names of attributes, SQL, file names), so they are in one list and everything else has
//! indices into it. Times are nanoseconds from the trace's start, which a double holds exactly for 100 days.

use std::collections::{HashMap, HashSet};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use opentelemetry_proto::tonic::common::v1::{AnyValue, KeyValue, any_value::Value as AnyKind};
use serde::Serialize;
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

use super::Summary;
use super::arrange::{Row, Trace};
use super::read::{Log, SpanId, Spans, TraceId, text};

const PAGE: &str = include_str!("page.html");
const STYLE: &str = include_str!("page.css");
const SCRIPT: &str = include_str!("page.js");

/// The largest integer up to which a double, which JavaScript's numbers are, holds each one.
const EXACT: u64 = 1 << 53;

/// The whole page.
pub(super) fn page(spans: &Spans, traces: &[Trace<'_>], logs: OfSpan<'_>, summary: &Summary) -> String {
    let data = serde_json::to_string(&data(spans, traces, logs, summary)).expect("texts and numbers are JSON");
    // `default-src 'none'`: nothing is loaded from anywhere, and no script runs but ours.
    let policy = format!(
        "default-src 'none'; script-src '{}'; style-src '{}'; base-uri 'none'; form-action 'none'",
        hash(SCRIPT),
        hash(STYLE)
    );
    let parts = [("{policy}", policy.as_str()), ("{style}", STYLE), ("{script}", SCRIPT), ("{data}", &inert(&data))];
    let mut rest = PAGE;
    let mut page = String::with_capacity(PAGE.len() + STYLE.len() + SCRIPT.len() + data.len() + 1024);
    // In one pass: what was put in is not looked at again.
    while let Some((at, (mark, part))) =
        parts.iter().filter_map(|part| Some((rest.find(part.0)?, part))).min_by_key(|(at, _)| *at)
    {
        page += &rest[..at];
        page += part;
        rest = &rest[at + mark.len()..];
    }
    page + rest
}

/// JSON that means the same and cannot end the script element it is in, nor begin another.
fn inert(json: &str) -> String {
    json.replace('<', "\\u003c").replace('>', "\\u003e").replace('&', "\\u0026")
}

/// A text's source expression in a content security policy.
fn hash(text: &str) -> String {
    format!("sha256-{}", BASE64.encode(Sha256::digest(text)))
}

/// The list of texts.
#[derive(Default)]
struct Texts {
    known: HashMap<String, usize>,
    list: Vec<String>,
}

impl Texts {
    fn index(&mut self, text: &str) -> usize {
        if let Some(index) = self.known.get(text) {
            return *index;
        }
        self.list.push(text.to_owned());
        self.known.insert(text.to_owned(), self.list.len() - 1);
        self.list.len() - 1
    }

    /// Key, value, key, value: a value that is a text is its index, another one is in brackets.
    fn attributes(&mut self, attributes: &[KeyValue]) -> Vec<Value> {
        let mut list = Vec::with_capacity(attributes.len() * 2);
        for KeyValue { key, value, .. } in attributes {
            list.push(self.index(key).into());
            list.push(match value.as_ref().and_then(text) {
                Some(text) => self.index(text).into(),
                None => json!([value.as_ref().map_or(Value::Null, plain)]),
            });
        }
        list
    }
}

/// A value as JSON. What a double cannot hold is a text.
fn plain(value: &AnyValue) -> Value {
    match &value.value {
        None => Value::Null,
        Some(AnyKind::StringValue(text)) => text.as_str().into(),
        Some(AnyKind::BoolValue(value)) => (*value).into(),
        Some(AnyKind::IntValue(value)) if value.unsigned_abs() <= EXACT => (*value).into(),
        Some(AnyKind::IntValue(value)) => value.to_string().into(),
        Some(AnyKind::DoubleValue(value)) if value.is_finite() => (*value).into(),
        Some(AnyKind::DoubleValue(value)) => value.to_string().into(),
        Some(AnyKind::ArrayValue(array)) => array.values.iter().map(plain).collect(),
        Some(AnyKind::KvlistValue(list)) => {
            let pair = |pair: &KeyValue| (pair.key.clone(), pair.value.as_ref().map_or(Value::Null, plain));
            Value::Object(list.values.iter().map(pair).collect())
        }
        Some(AnyKind::BytesValue(bytes)) => format!("base64: {}", BASE64.encode(bytes)).into(),
        Some(other) => format!("{other:?}").into(),
    }
}

#[derive(Serialize)]
struct Data {
    agent: &'static str,
    files: Vec<String>,
    notes: Vec<String>,
    traces: Vec<Value>,
    resources: Vec<Vec<Value>>,
    spans: Columns,
    texts: Vec<String>,
}

/// Time, name, attributes.
type Event = (i64, usize, Vec<Value>);
/// Time, severity, logger, text, attributes.
type LogRecord = (i64, usize, usize, Value, Vec<Value>);
/// Trace id, span id, attributes.
type Link = (String, String, Vec<Value>);

/// The spans of all traces, a list per field.
#[derive(Default, Serialize)]
struct Columns {
    id: Vec<String>,
    /// Only of spans whose parent is not here: index and parent.
    orphans: Vec<(usize, String)>,
    depth: Vec<u32>,
    below: Vec<u32>,
    name: Vec<usize>,
    kind: Vec<i32>,
    status: Vec<i32>,
    message: Vec<usize>,
    /// The word that tells the outcome, an attribute `….status`; else -1.
    outcome: Vec<i64>,
    /// Why its end was not seen; else -1.
    incomplete: Vec<i64>,
    start: Vec<u64>,
    length: Vec<u64>,
    own: Vec<u64>,
    resource: Vec<usize>,
    attributes: Vec<Vec<Value>>,
    /// Parts of the critical path: index, and from, to, from, to, ...
    critical: Vec<(usize, Vec<u64>)>,
    /// Index, and the span's events.
    events: Vec<(usize, Vec<Event>)>,
    /// Index, and the span's log records.
    logs: Vec<(usize, Vec<LogRecord>)>,
    /// Index, and the span's links.
    links: Vec<(usize, Vec<Link>)>,
}

fn data(spans: &Spans, traces: &[Trace<'_>], mut logs: OfSpan<'_>, summary: &Summary) -> Data {
    let mut texts = Texts::default();
    let resources = spans.resources.iter().map(|resource| texts.attributes(resource)).collect();
    let mut columns = Columns::default();
    let mut heads = Vec::new();
    for trace in traces {
        let lost = trace.rows.iter().filter_map(|row| number(row, "floe.trace.lost_events")).max();
        heads.push(json!({
            "id": hex(&trace.id),
            // Milliseconds, as JavaScript's dates; the page shows no finer time of day.
            "start": trace.start / 1_000_000,
            "length": trace.end - trace.start,
            "first": columns.id.len(),
            "count": trace.rows.len(),
            "lost": lost,
        }));
        for row in &trace.rows {
            let logs = logs.remove(&(trace.id, row.span.id)).unwrap_or_default();
            columns.add(row, &logs, trace.start, &mut texts);
        }
    }
    let mut notes: Vec<String> = Vec::new();
    for (bad, count) in &summary.skipped {
        let more = if *count > 1 { format!(" (and {} more)", count - 1) } else { String::new() };
        notes.push(format!("skipped: {bad}{more}"));
    }
    if summary.repeated > 0 {
        notes.push(format!("{} spans were in the files twice", summary.repeated));
    }
    Data {
        agent: env!("CARGO_PKG_VERSION"),
        files: spans.files(),
        notes,
        traces: heads,
        resources,
        spans: columns,
        texts: texts.list,
    }
}

/// Log records by their span.
type OfSpan<'a> = HashMap<(TraceId, SpanId), Vec<&'a Log>>;

/// The log records of each span, by time. Those of a span that is not here are the trace's: its first root has them.
pub(super) fn by_span<'a>(traces: &[Trace<'_>], logs: &'a [Log]) -> OfSpan<'a> {
    let roots: HashMap<TraceId, SpanId> =
        traces.iter().filter_map(|trace| Some((trace.id, trace.rows.first()?.span.id))).collect();
    let all = traces.iter().flat_map(|trace| trace.rows.iter().map(|row| (trace.id, row.span.id)));
    let mut of_span: HashMap<_, Vec<&Log>> = all.map(|span| (span, Vec::new())).collect();
    let mut known = HashSet::new();
    for log in logs {
        let Some(root) = roots.get(&log.trace) else { continue };
        // A file that is given twice.
        if !known.insert((log.trace, log.span, log.time, format!("{:?} {:?}", log.body, log.attributes))) {
            continue;
        }
        let span = log.span.filter(|span| of_span.contains_key(&(log.trace, *span))).unwrap_or(*root);
        if let Some(logs) = of_span.get_mut(&(log.trace, span)) {
            logs.push(log);
        }
    }
    for logs in of_span.values_mut() {
        logs.sort_by_key(|log| log.time);
    }
    of_span
}

impl Columns {
    fn add(&mut self, row: &Row<'_>, logs: &[&Log], zero: u64, texts: &mut Texts) {
        let (index, span) = (self.id.len(), row.span);
        let word = |texts: &mut Texts, wanted: &dyn Fn(&str) -> bool| {
            let word = span.attribute(wanted).and_then(text);
            word.map_or(-1, |word| texts.index(word) as i64)
        };
        self.id.push(hex(&span.id));
        if let Some(parent) = span.parent.filter(|_| row.orphan) {
            self.orphans.push((index, hex(&parent)));
        }
        self.depth.push(row.depth);
        self.below.push(row.below);
        self.name.push(texts.index(&span.name));
        self.kind.push(span.kind);
        self.status.push(span.status);
        self.message.push(texts.index(&span.message));
        self.outcome.push(word(texts, &|name| name.ends_with(".status")));
        self.incomplete.push(word(texts, &|name| name == "floe.incomplete"));
        self.start.push(span.start - zero);
        self.length.push(span.end - span.start);
        self.own.push(row.own);
        self.resource.push(span.resource);
        self.attributes.push(texts.attributes(&span.attributes));
        if !row.critical.is_empty() {
            let parts = row.critical.iter().rev().flat_map(|(from, to)| [from - zero, to - zero]);
            self.critical.push((index, parts.collect()));
        }
        if !span.events.is_empty() {
            let event = span.events.iter().map(|event| {
                let at = event.time_unix_nano as i64 - zero as i64;
                (at, texts.index(&event.name), texts.attributes(&event.attributes))
            });
            self.events.push((index, event.collect()));
        }
        if !logs.is_empty() {
            let log = logs.iter().map(|log| {
                let at = log.time as i64 - zero as i64;
                let body = match log.body.as_ref().and_then(text) {
                    Some(text) => texts.index(text).into(),
                    None => json!([log.body.as_ref().map_or(Value::Null, plain)]),
                };
                let (severity, logger) = (texts.index(&log.severity), texts.index(&log.logger));
                (at, severity, logger, body, texts.attributes(&log.attributes))
            });
            self.logs.push((index, log.collect()));
        }
        if !span.links.is_empty() {
            let link = span
                .links
                .iter()
                .map(|link| (hex(&link.trace_id), hex(&link.span_id), texts.attributes(&link.attributes)));
            self.links.push((index, link.collect()));
        }
    }
}

fn number(row: &Row<'_>, attribute: &str) -> Option<i64> {
    match row.span.attribute(|name| name == attribute)?.value {
        Some(AnyKind::IntValue(number)) => Some(number),
        _ => None,
    }
}

fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    bytes.iter().fold(String::with_capacity(bytes.len() * 2), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::make;

    const HOSTILE: &str = "</script><script>alert(1)</script><!-- & {script} \u{2028} ' \\\"";

    fn line(attributes: &str) -> String {
        let span = r#""traceId":"0af7651916cd43dd8448eb211c80319c","spanId":"b7ad6b7169203331","startTimeUnixNano":"1000000005","endTimeUnixNano":"1000000009""#;
        format!(
            r#"{{"resourceSpans":[{{"scopeSpans":[{{"spans":[{{{span},"name":"n","attributes":{attributes}}}]}}]}}]}}"#
        )
    }

    fn html(attributes: &str) -> String {
        let mut spans = Spans::default();
        spans.read("x.jsonl", &mut line(attributes).as_bytes()).unwrap();
        make(&spans).unwrap().0
    }

    /// The JSON in the page, as a browser would find it.
    fn embedded(html: &str) -> Value {
        let start = html.find("<script id=\"data\" type=\"application/json\">").unwrap();
        let start = start + html[start..].find('>').unwrap() + 1;
        serde_json::from_str(&html[start..start + html[start..].find("</script").unwrap()]).unwrap()
    }

    #[test]
    fn a_hostile_value_stays_a_value() {
        let value = serde_json::to_string(HOSTILE).unwrap();
        let html = html(&format!(r#"[{{"key":{value},"value":{{"stringValue":{value}}}}}]"#));
        assert_eq!(html.matches("<script").count(), 2, "the data and the script");
        assert_eq!(html.matches("</script").count(), 2);
        assert!(!html.contains("<!--"));
        let data = embedded(&html);
        let attributes = &data["spans"]["attributes"][0];
        assert_eq!(data["texts"][attributes[0].as_u64().unwrap() as usize], HOSTILE);
        assert_eq!(attributes[0], attributes[1], "a text is there once");
    }

    #[test]
    fn values_keep_their_types_and_all_their_digits() {
        let html = html(
            r#"[{"key":"i","value":{"intValue":"-3"}},{"key":"big","value":{"intValue":"9223372036854775807"}},
            {"key":"d","value":{"doubleValue":0.5}},{"key":"b","value":{"boolValue":true}},{"key":"none","value":{}},
            {"key":"l","value":{"arrayValue":{"values":[{"stringValue":"x"},{"intValue":"1"}]}}},
            {"key":"m","value":{"kvlistValue":{"values":[{"key":"k","value":{"stringValue":"v"}}]}}}]"#
                .replace('\n', "")
                .as_str(),
        );
        let data = embedded(&html);
        let values: Vec<_> =
            data["spans"]["attributes"][0].as_array().unwrap().chunks(2).map(|pair| &pair[1]).collect();
        let expected = json!([[-3], ["9223372036854775807"], [0.5], [true], [null], [["x", 1]], [{"k": "v"}]]);
        assert_eq!(json!(values), expected);
        assert_eq!((&data["traces"][0]["start"], &data["spans"]["length"][0]), (&json!(1000), &json!(4)));
    }

    #[test]
    fn the_policy_allows_our_script_and_style_and_nothing_else() {
        let html = html("[]");
        let script = format!("script-src '{}'", hash(SCRIPT));
        assert!(html.contains(&format!("content=\"default-src 'none'; {script}; style-src '{}'", hash(STYLE))));
        assert!(
            html.contains(&format!("<script>{SCRIPT}</script>")) && html.contains(&format!("<style>{STYLE}</style>"))
        );
        for loads in ["http:", "https:", "src=", "@import", "url("] {
            assert!(!html.contains(loads), "{loads}: the page is to load nothing");
        }
    }

    #[test]
    fn the_script_and_the_style_cannot_end_their_elements() {
        assert!(!SCRIPT.contains("</script") && !SCRIPT.contains("<!--") && !STYLE.contains("</style"));
    }
}
