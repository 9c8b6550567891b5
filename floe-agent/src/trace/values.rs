//! Attributes while their call or span is open: captured, replaced, computed, and bounded.

use opentelemetry::{Array, Key, KeyValue, Value};

use super::finish::Raised;
use crate::catalogue::plan::{EXCEPTION_MESSAGE, EXCEPTION_TYPE};
use crate::catalogue::probe::{Computed, Formula};
use crate::catalogue::{Probe, is_reserved};
use crate::kernel::event::{self, FieldValue};

/// Attributes of one span; more are dropped and counted. OpenTelemetry's default limit.
pub(super) const MAX_ATTRIBUTES: usize = 128;
/// Longest name of an attribute that the traced program chose.
const MAX_NAME: usize = 128;

/// Attributes by name, in the order in which they came.
#[derive(Clone, Debug, Default)]
pub(super) struct Values {
    pub(super) attributes: Vec<KeyValue>,
    /// Attributes of which something is missing: the end of a text, or items.
    pub(super) cut: Vec<Key>,
    /// Attributes that were computed: a captured value replaces them.
    computed: Vec<Key>,
    /// Attributes for which there was no room.
    pub(super) dropped: u32,
}

/// Whether a name is for the pack's own use and no attribute of the span.
pub(super) fn is_local(name: &str) -> bool {
    name.starts_with('_')
}

impl Values {
    pub(super) fn is_empty(&self) -> bool {
        self.attributes.is_empty()
    }

    pub(super) fn get(&self, name: &str) -> Option<&Value> {
        self.attributes.iter().find(|known| known.key.as_str() == name).map(|known| &known.value)
    }

    /// The text of an attribute's value; of a list, its items with commas between them.
    pub(super) fn text(&self, name: &str) -> Option<String> {
        self.get(name).map(text)
    }

    /// The texts of an attribute's value: one of each item of a list.
    pub(super) fn texts(&self, name: &str) -> Vec<String> {
        self.get(name).map(texts).unwrap_or_default()
    }

    pub(super) fn set(&mut self, name: Key, value: Value) {
        self.computed.retain(|known| *known != name);
        self.put(name, value);
    }

    fn put(&mut self, name: Key, value: Value) {
        if let Some(known) = self.attributes.iter_mut().find(|known| known.key == name) {
            known.value = value;
        } else if self.attributes.len() < MAX_ATTRIBUTES {
            self.attributes.push(KeyValue::new(name, value));
        } else {
            self.dropped += 1;
        }
    }

    /// Sets an attribute whose name the traced program chose.
    pub(super) fn set_named_by_program(&mut self, name: String, value: Value) {
        if name.is_empty() || name.len() > MAX_NAME || is_reserved(&name) {
            self.dropped += 1;
        } else {
            self.set(name.into(), value);
        }
    }

    /// Takes over attributes: those in `only`, or all. Local ones always.
    pub(super) fn take_over(&mut self, other: &Self, only: Option<&[Key]>) {
        let wanted = |name: &Key| is_local(name.as_str()) || only.is_none_or(|names| names.contains(name));
        for KeyValue { key, value, .. } in other.attributes.iter().filter(|attribute| wanted(&attribute.key)) {
            self.set(key.clone(), value.clone());
        }
        for name in other.cut.iter().filter(|name| wanted(name)) {
            self.mark_cut(name);
        }
        self.dropped += other.dropped;
    }

    fn mark_cut(&mut self, name: &Key) {
        if !self.cut.contains(name) {
            self.cut.push(name.clone());
        }
    }

    /// Takes captured fields; gives back those that describe an exception.
    pub(super) fn capture(&mut self, probe: &Probe, names: &[Key], fields: Vec<FieldValue>) -> Raised {
        let mut raised = Raised::default();
        // With room for what comes at the end of the call.
        self.attributes.reserve(fields.len() + 3);
        for FieldValue { field, value, cut } in fields {
            let Some(name) = names.get(usize::from(field)) else {
                continue;
            };
            if let event::Value::Map(entries) = value {
                for (entry, value) in entries {
                    if let Some(value) = attribute_value(value) {
                        let all = name.as_str() == "*";
                        let name = if all { entry } else { format!("{name}.{entry}") };
                        self.set_named_by_program(name, value);
                    }
                }
                if cut {
                    self.mark_cut(name);
                }
                continue;
            }
            let code = if let event::Value::Int(code) = value { Some(code) } else { None };
            let Some(value) = attribute_value(value) else {
                continue;
            };
            match name.as_str() {
                EXCEPTION_TYPE => raised.kind = Some(value.as_str().into_owned()),
                EXCEPTION_MESSAGE => {
                    raised.code = code;
                    raised.message = Some(value.as_str().into_owned());
                }
                _ => {
                    let value = match probe.values.iter().find(|(known, _)| known == name) {
                        Some((_, map)) => map.replace(value),
                        None => Some(value),
                    };
                    if let Some(value) = value {
                        if cut {
                            self.mark_cut(name);
                        }
                        self.set(name.clone(), value);
                    }
                }
            }
        }
        raised
    }

    /// Computes attributes for which nothing was captured.
    pub(super) fn compute(&mut self, rules: &[Computed]) {
        let captured =
            |values: &Self, name: &Key| values.get(name.as_str()).is_some() && !values.computed.contains(name);
        for Computed { name, from } in rules {
            if captured(self, name) {
                continue;
            }
            let value = match from {
                Formula::Const(value) => Some(value.clone()),
                Formula::Only(list) => match &self.texts(list)[..] {
                    [only] => Some(Value::from(only.clone())),
                    _ => None,
                },
                Formula::SqlOperation(name) => self.text(name).and_then(|sql| operation(&sql)).map(Value::from),
                Formula::Template { template, add } => match template.single(|name| self.text(name)) {
                    Some(single) => self.get(&single).cloned(),
                    None => template.render_complete(|name| self.text(name)).map(Value::from),
                }
                .and_then(|value| plus(value, *add)),
            };
            if let Some(value) = value {
                self.put(name.clone(), value);
                if !self.computed.contains(name) {
                    self.computed.push(name.clone());
                }
            }
        }
    }
}

/// What an SQL statement begins with, behind comments and parentheses, in capitals.
fn operation(sql: &str) -> Option<String> {
    let mut rest = sql;
    loop {
        rest = rest.trim_start_matches(|c: char| c.is_whitespace() || matches!(c, '(' | ';'));
        rest = if let Some(comment) = rest.strip_prefix("/*") {
            comment.split_once("*/")?.1
        } else if let Some(comment) = rest.strip_prefix("--") {
            comment.split_once('\n')?.1
        } else {
            break;
        };
    }
    let word: String = rest.chars().take_while(|c| c.is_ascii_alphabetic() || *c == '_').collect();
    (!word.is_empty() && word.len() <= 32).then(|| word.to_ascii_uppercase())
}

/// Adds to an integer; nothing can be added to anything else.
fn plus(value: Value, add: i64) -> Option<Value> {
    match value {
        value if add == 0 => Some(value),
        Value::I64(int) => int.checked_add(add).map(Value::I64),
        _ => None,
    }
}

/// A captured value as an attribute's. `None` and an empty place have none.
pub(super) fn attribute_value(value: event::Value) -> Option<Value> {
    Some(match value {
        event::Value::Str { text, cut: _ } => Value::from(text),
        event::Value::Int(int) => Value::I64(int),
        event::Value::Float(float) if float.is_finite() => Value::F64(float),
        // JSON has no notation for these.
        event::Value::Float(float) => Value::from(float.to_string()),
        event::Value::Bool(bool) => Value::Bool(bool),
        event::Value::List(items) => {
            let mut flat = Vec::new();
            flatten(items, &mut flat);
            Value::Array(array(&flat.into_iter().filter_map(attribute_value).collect::<Vec<_>>()))
        }
        event::Value::None | event::Value::Map(_) => return None,
    })
}

/// The items of a list and those of the lists in it: attributes know no lists of lists.
fn flatten(items: Vec<event::Value>, flat: &mut Vec<event::Value>) {
    for item in items {
        match item {
            event::Value::List(items) => flatten(items, flat),
            item => flat.push(item),
        }
    }
}

/// Values of one type; texts, if they are not.
fn array(items: &[Value]) -> Array {
    fn all<T>(items: &[Value], one: impl Fn(&Value) -> Option<T>) -> Option<Vec<T>> {
        (!items.is_empty()).then(|| items.iter().map(one).collect())?
    }
    let bools = |items: &[Value]| all(items, |item| if let Value::Bool(bool) = item { Some(*bool) } else { None });
    let ints = |items: &[Value]| all(items, |item| if let Value::I64(int) = item { Some(*int) } else { None });
    let floats = |items: &[Value]| all(items, |item| if let Value::F64(float) = item { Some(*float) } else { None });
    bools(items)
        .map(Array::Bool)
        .or_else(|| ints(items).map(Array::I64))
        .or_else(|| floats(items).map(Array::F64))
        .unwrap_or_else(|| Array::String(items.iter().map(|item| item.as_str().into_owned().into()).collect()))
}

/// The text of a value; of a list, its items with commas between them.
pub(super) fn text(value: &Value) -> String {
    match value {
        Value::Array(_) => texts(value).join(", "),
        value => value.as_str().into_owned(),
    }
}

/// The texts of a value: one of each item of a list.
pub(super) fn texts(value: &Value) -> Vec<String> {
    match value {
        Value::Array(Array::String(items)) => items.iter().map(|item| item.as_str().to_owned()).collect(),
        Value::Array(Array::I64(items)) => items.iter().map(ToString::to_string).collect(),
        Value::Array(Array::F64(items)) => items.iter().map(ToString::to_string).collect(),
        Value::Array(Array::Bool(items)) => items.iter().map(ToString::to_string).collect(),
        value => vec![value.as_str().into_owned()],
    }
}

#[cfg(test)]
mod tests {
    use super::operation;

    #[test]
    fn a_statement_begins_behind_comments_and_parentheses() {
        for (sql, expected) in [
            ("BEGIN", Some("BEGIN")),
            ("/* {\"app\": \"dbt\"} */\n\n  create or replace view x as (select 1)", Some("CREATE")),
            ("-- first\n/* second */ ((select 1) union (select 2))", Some("SELECT")),
            ("with a as (select 1) select * from a", Some("WITH")),
            ("/* cut off", None),
            ("-- cut off", None),
            ("", None),
            ("42", None),
        ] {
            assert_eq!(operation(sql).as_deref(), expected, "{sql}");
        }
    }
}
