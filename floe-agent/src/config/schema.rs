//! The JSON schema of the file, made from the table of settings.

use serde_json::{Map, Value, json};

use super::keys::{KEYS, Key, Kind};

/// The schema, as editors use it.
pub fn schema() -> Value {
    let mut properties = Map::new();
    for key in &KEYS {
        let mut at = &mut properties;
        let mut names = key.path.split('.').peekable();
        while let Some(name) = names.next() {
            if names.peek().is_none() {
                at.insert(name.to_owned(), property(key));
                break;
            }
            let entry = at.entry(name).or_insert_with(|| object(&Map::new()));
            let Some(inner) = entry.get_mut("properties").and_then(Value::as_object_mut) else {
                break;
            };
            at = inner;
        }
    }
    let mut schema = object(&properties);
    if let Some(schema) = schema.as_object_mut() {
        schema.insert("$schema".to_owned(), json!("https://json-schema.org/draft/2020-12/schema"));
        schema.insert("title".to_owned(), json!("floe-agent configuration"));
    }
    schema
}

fn object(properties: &Map<String, Value>) -> Value {
    json!({"type": ["object", "null"], "additionalProperties": false, "properties": properties})
}

fn property(key: &Key) -> Value {
    let text = json!({"type": ["string", "number", "boolean"]});
    let mut property = match key.kind {
        Kind::Text => text,
        Kind::Bool => json!({"type": "boolean"}),
        Kind::Count => json!({"type": "integer", "minimum": 1}),
        Kind::Ratio => json!({"type": "number", "minimum": 0, "maximum": 1}),
        Kind::Duration => json!({"type": "string", "pattern": r"^[0-9.]+\s*(ms|s|m|min|h)$"}),
        Kind::Size => json!({"type": ["string", "integer"], "pattern": r"^[0-9]+\s*(B|k|K|KiB|M|MiB|G|GiB)?$"}),
        Kind::Choice(choices) => json!({"enum": choices}),
        Kind::List => json!({"anyOf": [text, {"type": "array", "items": text}]}),
        Kind::Map => json!({"type": "object", "additionalProperties": text}),
        Kind::Ratios => {
            json!({"type": "object", "additionalProperties": {"type": "number", "minimum": 0, "maximum": 1}})
        }
    };
    if let Some(property) = property.as_object_mut() {
        let mut help = key.help.to_owned();
        if !key.default.is_empty() {
            help = format!("{help} (default: {})", key.default);
        }
        property.insert("description".to_owned(), json!(help));
    }
    property
}
