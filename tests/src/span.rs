//! Spans as the agent writes them: OTLP/JSON, one export request a line.

use std::collections::BTreeMap;

use serde_json::Value;

/// Attributes by name; 64-bit integers are numbers here, although OTLP/JSON writes them as strings.
pub type Attributes = BTreeMap<String, Value>;

/// A span.
#[derive(Clone, Debug)]
pub struct Span {
    /// Its name.
    pub name: String,
    /// Its trace, hexadecimal.
    pub trace: String,
    /// Its id, hexadecimal.
    pub id: String,
    /// The id of its parent.
    pub parent: Option<String>,
    /// Its kind, as OTLP numbers it: 1 internal, 3 client.
    pub kind: u64,
    /// When it began, in nanoseconds since 1970.
    pub start: u64,
    /// When it ended.
    pub end: u64,
    /// Its attributes.
    pub attributes: Attributes,
    /// Its status.
    pub status: Status,
    /// Its events.
    pub events: Vec<Event>,
    /// The spans that it is linked to: trace and span.
    pub links: Vec<(String, String)>,
    /// The process that it is of: the resource's `process.pid`.
    pub pid: u32,
    /// The other attributes of its resource.
    pub resource: Attributes,
}

/// The status of a span.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Status {
    /// Not said.
    Unset,
    /// It was a success.
    Ok,
    /// It failed.
    Error(String),
}

/// An event of a span.
#[derive(Clone, Debug)]
pub struct Event {
    /// Its name.
    pub name: String,
    /// When it was, in nanoseconds since 1970.
    pub time: u64,
    /// Its attributes.
    pub attributes: Attributes,
}

impl Span {
    /// All spans of a file; panics where it is not OTLP/JSON.
    pub(crate) fn parse(file: &str) -> Vec<Self> {
        let mut spans = Vec::new();
        for (number, line) in file.lines().enumerate() {
            let request: Value = serde_json::from_str(line)
                .unwrap_or_else(|error| panic!("line {} of the spans is not JSON: {error}: {line}", number + 1));
            for group in list(&request["resourceSpans"]) {
                let resource = attributes(&group["resource"]["attributes"]);
                for scope in list(&group["scopeSpans"]) {
                    spans.extend(list(&scope["spans"]).iter().map(|span| Self::from_json(span, &resource)));
                }
            }
        }
        spans
    }

    fn from_json(span: &Value, resource: &Attributes) -> Self {
        let text = |name: &str| span[name].as_str().unwrap_or_default().to_owned();
        let time_of = |value: &Value, name: &str| match &value[name] {
            Value::String(text) => text.parse().unwrap_or_else(|_| panic!("{name} is not a time: {span}")),
            other => other.as_u64().unwrap_or_else(|| panic!("{name} is not a time: {span}")),
        };
        let time = |name: &str| time_of(span, name);
        let hexadecimal = |name: &str, length: usize| {
            let id = text(name);
            let hexadecimal = id.len() == length && id.chars().all(|c| c.is_ascii_hexdigit());
            assert!(hexadecimal, "{name} is not {length} hexadecimal digits: {span}");
            id
        };
        let parent = text("parentSpanId");
        let pid = resource.get("process.pid").and_then(Value::as_u64);
        Self {
            name: text("name"),
            trace: hexadecimal("traceId", 32),
            id: hexadecimal("spanId", 16),
            parent: (!parent.is_empty() && parent.chars().any(|c| c != '0')).then_some(parent),
            kind: span["kind"].as_u64().unwrap_or_default(),
            start: time("startTimeUnixNano"),
            end: time("endTimeUnixNano"),
            attributes: attributes(&span["attributes"]),
            status: status(&span["status"]),
            events: list(&span["events"])
                .iter()
                .map(|event| Event {
                    name: event["name"].as_str().unwrap_or_default().to_owned(),
                    time: time_of(event, "timeUnixNano"),
                    attributes: attributes(&event["attributes"]),
                })
                .collect(),
            links: list(&span["links"])
                .iter()
                .map(|link| ["traceId", "spanId"].map(|id| link[id].as_str().unwrap_or_default().to_owned()).into())
                .collect(),
            pid: u32::try_from(pid.expect("the resource has process.pid")).expect("a pid has 32 bits"),
            resource: resource.clone(),
        }
    }

    /// An attribute.
    pub fn get(&self, name: &str) -> Option<&Value> {
        self.attributes.get(name)
    }

    /// An attribute that is a str.
    pub fn text(&self, name: &str) -> Option<&str> {
        self.get(name).and_then(Value::as_str)
    }

    /// An attribute that is an int.
    pub fn int(&self, name: &str) -> Option<i64> {
        self.get(name).and_then(Value::as_i64)
    }

    /// The attributes whose names begin with this, without it.
    pub fn with_prefix(&self, prefix: &str) -> Attributes {
        let named = self.attributes.iter();
        named.filter_map(|(name, value)| Some((name.strip_prefix(prefix)?.to_owned(), value.clone()))).collect()
    }
}

fn list(value: &Value) -> &[Value] {
    value.as_array().map_or(&[], Vec::as_slice)
}

fn attributes(list_of_pairs: &Value) -> Attributes {
    let pair = |pair: &Value| (pair["key"].as_str().unwrap_or_default().to_owned(), plain(&pair["value"]));
    list(list_of_pairs).iter().map(pair).collect()
}

/// An OTLP value as a JSON value of the same type.
fn plain(value: &Value) -> Value {
    let Some((kind, inner)) = value.as_object().and_then(|object| object.iter().next()) else { return Value::Null };
    match (kind.as_str(), inner) {
        ("intValue", Value::String(text)) => {
            Value::from(text.parse::<i64>().unwrap_or_else(|_| panic!("not an int: {value}")))
        }
        ("doubleValue", number) => Value::from(number.as_f64().unwrap_or_else(|| panic!("not a double: {value}"))),
        ("arrayValue", array) => list(&array["values"]).iter().map(plain).collect(),
        ("stringValue" | "boolValue" | "intValue", _) => inner.clone(),
        _ => panic!("a value of an unknown kind: {value}"),
    }
}

fn status(status: &Value) -> Status {
    let message = status["message"].as_str().unwrap_or_default().to_owned();
    match (status["code"].as_u64(), status["code"].as_str()) {
        (Some(2), _) | (_, Some("STATUS_CODE_ERROR")) => Status::Error(message),
        (Some(1), _) | (_, Some("STATUS_CODE_OK")) => Status::Ok,
        (None | Some(0), _) => Status::Unset,
        (Some(_), _) => panic!("a status of an unknown kind: {status}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_of_otlp_json_becomes_spans() {
        let line = r#"{"resourceSpans": [{"resource": {"attributes": [{"key": "process.pid", "value": {"intValue": "7"}}]},
            "scopeSpans": [{"spans": [{"name": "f", "traceId": "0102030405060708090a0b0c0d0e0f10",
            "spanId": "0102030405060708", "parentSpanId": "", "startTimeUnixNano": "5", "endTimeUnixNano": "9",
            "attributes": [{"key": "i", "value": {"intValue": "-3"}}, {"key": "d", "value": {"doubleValue": 1}}],
            "status": {"code": 2, "message": "no"}}]}]}]}"#;
        let spans = Span::parse(&line.replace('\n', ""));
        let [span] = &spans[..] else { panic!("one span") };
        assert_eq!((span.name.as_str(), span.pid, span.start, span.end), ("f", 7, 5, 9));
        assert_eq!((span.int("i"), span.get("d"), &span.parent), (Some(-3), Some(&Value::from(1.0)), &None));
        assert_eq!(span.status, Status::Error("no".to_owned()));
    }
}
