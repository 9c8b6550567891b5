//! The YAML file: read into flat settings, each with its line.

use std::path::Path;

use serde::de::{Deserialize, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_saphyr::Spanned;

use super::keys::{self, KEYS, Kind};
use super::{ConfigError, Origin};

/// Any YAML, with places. Nothing is a value that was not given.
#[derive(Debug)]
pub(super) enum Node {
    Nothing,
    Scalar(String),
    List(Vec<Spanned<Node>>),
    Map(Vec<(Spanned<String>, Spanned<Node>)>),
}

impl<'de> Deserialize<'de> for Node {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(NodeVisitor)
    }
}

struct NodeVisitor;

impl<'de> Visitor<'de> for NodeVisitor {
    type Value = Node;

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("a setting")
    }

    fn visit_unit<E>(self) -> Result<Node, E> {
        Ok(Node::Nothing)
    }

    fn visit_none<E>(self) -> Result<Node, E> {
        Ok(Node::Nothing)
    }

    fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> Result<Node, D::Error> {
        deserializer.deserialize_any(self)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Node, E> {
        Ok(Node::Scalar(value.to_string()))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Node, E> {
        Ok(Node::Scalar(value.to_string()))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Node, E> {
        Ok(Node::Scalar(value.to_string()))
    }

    fn visit_f64<E>(self, value: f64) -> Result<Node, E> {
        Ok(Node::Scalar(value.to_string()))
    }

    fn visit_str<E>(self, value: &str) -> Result<Node, E> {
        Ok(Node::Scalar(value.to_owned()))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Node, A::Error> {
        let mut list = Vec::new();
        while let Some(item) = items.next_element()? {
            list.push(item);
        }
        Ok(Node::List(list))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Node, A::Error> {
        let mut map = Vec::new();
        while let Some(entry) = entries.next_entry()? {
            map.push(entry);
        }
        Ok(Node::Map(map))
    }
}

/// A value from the file.
#[derive(Debug)]
pub(super) enum Given {
    One(String),
    List(Vec<String>),
    Entry(String, String),
}

/// Reads any YAML file.
pub(super) fn read(path: &Path) -> Result<(Node, Origin), ConfigError> {
    let text = std::fs::read_to_string(path).map_err(|source| ConfigError::Read { path: path.to_owned(), source })?;
    parse(path, &text)
}

fn parse(path: &Path, text: &str) -> Result<(Node, Origin), ConfigError> {
    let options = serde_saphyr::options! { with_snippet: false };
    let yaml: Option<Spanned<Node>> = serde_saphyr::from_str_with_options(text, options).map_err(|error| {
        let location = error.location();
        let line = location.map_or(0, |location| location.line());
        let message = error.to_string();
        // The place is given in front, as compilers do.
        let message =
            message.split(" at line ").next().unwrap_or(&message).lines().next().unwrap_or_default().to_owned();
        ConfigError::Yaml { origin: Origin::File { path: path.to_owned(), line }, message }
    })?;
    let origin = Origin::File { path: path.to_owned(), line: 1 };
    Ok((yaml.map_or(Node::Nothing, |yaml| yaml.value), origin))
}

/// Reads the agent's own file: settings by their paths, in the order of the file.
pub(super) fn settings(path: &Path) -> Result<Vec<(&'static keys::Key, Given, Origin)>, ConfigError> {
    let (node, _) = read(path)?;
    flat(path, node)
}

fn flat(path: &Path, node: Node) -> Result<Vec<(&'static keys::Key, Given, Origin)>, ConfigError> {
    let mut found = Vec::new();
    match node {
        Node::Nothing => {}
        Node::Map(_) => flatten(path, "", node, 1, &mut found)?,
        _ => {
            return Err(ConfigError::Yaml {
                origin: Origin::File { path: path.to_owned(), line: 1 },
                message: "expected settings such as `profile: jaeger`".to_owned(),
            });
        }
    }
    Ok(found)
}

fn flatten(
    file: &Path,
    at: &str,
    node: Node,
    line: u64,
    found: &mut Vec<(&'static keys::Key, Given, Origin)>,
) -> Result<(), ConfigError> {
    let origin = |line| Origin::File { path: file.to_owned(), line };
    let wrong = |line, key: &str, expected: &str| ConfigError::Shape {
        origin: origin(line),
        key: key.to_owned(),
        expected: expected.to_owned(),
    };
    let scalar = |node: Spanned<Node>, key: &str| match node.value {
        Node::Scalar(text) => Ok(text),
        _ => Err(wrong(node.referenced.line(), key, "a text or a number")),
    };
    let key = keys::find(at);
    match (key, node) {
        (_, Node::Nothing) => {}
        (Some(key), Node::Map(entries)) if matches!(key.kind, Kind::Map | Kind::Ratios) => {
            for (name, value) in entries {
                let line = value.referenced.line();
                let text = scalar(value, &format!("{at}.{}", name.value))?;
                found.push((key, Given::Entry(name.value, text), origin(line)));
            }
        }
        (Some(key), _) if matches!(key.kind, Kind::Map | Kind::Ratios) => {
            return Err(wrong(line, at, "names and values"));
        }
        (Some(key), Node::List(items)) if key.kind == Kind::List => {
            let items = items.into_iter().map(|item| scalar(item, at)).collect::<Result<_, _>>()?;
            found.push((key, Given::List(items), origin(line)));
        }
        (Some(key), Node::Scalar(text)) if key.kind == Kind::List => {
            found.push((key, Given::List(vec![text]), origin(line)));
        }
        (Some(key), Node::Scalar(text)) => found.push((key, Given::One(text), origin(line))),
        (Some(_), Node::List(_)) => return Err(wrong(line, at, "one value")),
        (_, Node::Map(entries)) => {
            for (name, value) in entries {
                let path = if at.is_empty() { name.value.clone() } else { format!("{at}.{}", name.value) };
                if !KEYS.iter().any(|key| key.path == path || key.path.starts_with(&format!("{path}."))) {
                    let origin = origin(name.referenced.line());
                    return Err(ConfigError::Unknown { origin, key: path.clone(), known: known(at) });
                }
                flatten(file, &path, value.value, value.referenced.line(), found)?;
            }
        }
        (None, _) => return Err(wrong(line, at, &format!("settings: {}", known(at)))),
    }
    Ok(())
}

/// The names that may stand at a place.
fn known(at: &str) -> String {
    let mut names: Vec<&str> = Vec::new();
    for key in &KEYS {
        let rest =
            if at.is_empty() { Some(key.path) } else { key.path.strip_prefix(at).and_then(|r| r.strip_prefix('.')) };
        if let Some(name) = rest.and_then(|rest| rest.split('.').next())
            && !names.contains(&name)
        {
            names.push(name);
        }
    }
    names.join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Vec<(&'static keys::Key, Given, Origin)>, ConfigError> {
        let path = Path::new("c.yaml");
        let (node, _) = parse(path, text)?;
        flat(path, node)
    }

    fn error(text: &str) -> String {
        read(text).unwrap_err().to_string()
    }

    #[test]
    fn settings_are_found_with_their_lines() {
        let found =
            read("# x\nprofile: jaeger\notlp:\n  timeout: 3s\n  headers: {a: 1}\noutput:\n  - console\n").unwrap();
        let shown: Vec<_> =
            found.iter().map(|(key, given, origin)| format!("{} {given:?} {origin}", key.path)).collect();
        assert_eq!(
            shown,
            [
                r#"profile One("jaeger") c.yaml:2"#,
                r#"otlp.timeout One("3s") c.yaml:4"#,
                r#"otlp.headers Entry("a", "1") c.yaml:5"#,
                r#"output List(["console"]) c.yaml:7"#,
            ]
        );
        assert!(read("").unwrap().is_empty());
        assert!(read("otlp:\n").unwrap().is_empty());
    }

    #[test]
    fn errors_have_file_and_line() {
        let unknown = error("otlp:\n  timeuot: 3s\n");
        assert!(
            unknown.starts_with("c.yaml:2: there is no setting `otlp.timeuot`; there are endpoint, protocol,"),
            "{unknown}"
        );
        assert!(error("a: 1").starts_with("c.yaml:1: there is no setting `a`; there are profile,"));
        assert_eq!(error("\notlp: 3"), "c.yaml:2: `otlp`: expected settings: ".to_owned() + &known("otlp"));
        assert_eq!(error("profile: [a]"), "c.yaml:1: `profile`: expected one value");
        assert_eq!(error("otlp:\n  headers: a"), "c.yaml:2: `otlp.headers`: expected names and values");
        assert!(error("a: [").starts_with("c.yaml:"));
        assert!(error("profile: a\nprofile: b").starts_with("c.yaml:2: "), "{}", error("profile: a\nprofile: b"));
        assert_eq!(error("- a"), "c.yaml:1: expected settings such as `profile: jaeger`");
    }
}
