//! Templates: texts with attributes in braces, as `dbt.{dbt.command}`. A name may itself have an attribute in braces:
//! `{_retries.{dagster.step_key}}` is the attribute that is called `_retries.` and the step's key.

use std::fmt;

use thiserror::Error;

/// What is left out together with a missing attribute.
const SEPARATORS: [char; 4] = ['.', '-', ':', ' '];

/// A parsed template.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Template {
    text: String,
    pieces: Vec<Piece>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Piece {
    Text(String),
    Attribute(String),
    /// An attribute whose name is a template.
    Nested(Box<Template>),
}

/// A template that cannot be read.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("template `{template}`: {problem}")]
pub struct TemplateError {
    /// The text.
    pub template: String,
    /// What is wrong, and what was expected.
    pub problem: &'static str,
}

impl Template {
    /// Parses a template.
    pub fn parse(text: &str) -> Result<Self, TemplateError> {
        let fail = |problem| Err(TemplateError { template: text.to_owned(), problem });
        let mut pieces = Vec::new();
        let mut rest = text;
        while let Some(open) = rest.find(['{', '}']) {
            if rest.as_bytes()[open] == b'}' {
                return fail("a `}` without `{`; expected `{attribute}`");
            }
            let Some(length) = closing(&rest[open + 1..]) else {
                return fail("a `{` without `}`; expected `{attribute}`");
            };
            let name = rest[open + 1..open + 1 + length].trim();
            if name.is_empty() {
                return fail("expected an attribute's name between `{` and `}`");
            }
            if open > 0 {
                pieces.push(Piece::Text(rest[..open].to_owned()));
            }
            pieces.push(if name.contains('{') {
                let name = Self::parse(name)?;
                if name.pieces.iter().any(|piece| matches!(piece, Piece::Nested(_))) {
                    return fail("braces in braces in braces; expected at most `{a.{b}}`");
                }
                Piece::Nested(Box::new(name))
            } else {
                Piece::Attribute(name.to_owned())
            });
            rest = &rest[open + length + 2..];
        }
        if !rest.is_empty() {
            pieces.push(Piece::Text(rest.to_owned()));
        }
        if pieces.is_empty() {
            return fail("it is empty");
        }
        Ok(Self { text: text.to_owned(), pieces })
    }

    /// A template that is only text.
    pub fn literal(text: &str) -> Self {
        Self { text: text.to_owned(), pieces: vec![Piece::Text(text.to_owned())] }
    }

    /// The attributes that it names.
    pub fn attributes(&self) -> impl Iterator<Item = &str> {
        self.pieces.iter().flat_map(|piece| -> Box<dyn Iterator<Item = &str>> {
            match piece {
                Piece::Attribute(name) => Box::new(std::iter::once(name.as_str())),
                Piece::Nested(name) => Box::new(name.pieces.iter().filter_map(|piece| match piece {
                    Piece::Attribute(name) => Some(name.as_str()),
                    _ => None,
                })),
                Piece::Text(_) => Box::new(std::iter::empty()),
            }
        })
    }

    /// The name of the attribute that it is, if it is nothing else.
    pub fn single(&self, value: impl Fn(&str) -> Option<String>) -> Option<String> {
        match &self.pieces[..] {
            [Piece::Attribute(name)] => Some(name.clone()),
            [Piece::Nested(name)] => name.render_complete(value),
            _ => None,
        }
    }

    /// Fills it in. A missing attribute is left out together with the
    /// separators (`.`, `-`, `:`, space) before it.
    pub fn render(&self, value: impl Fn(&str) -> Option<String>) -> String {
        let mut out = String::new();
        for piece in &self.pieces {
            match piece.text(&value) {
                Some(text) => out += &text,
                None => out.truncate(out.trim_end_matches(SEPARATORS).len()),
            }
        }
        if out.starts_with(SEPARATORS) && !matches!(self.pieces.first(), Some(Piece::Text(_))) {
            out = out.trim_start_matches(SEPARATORS).to_owned();
        }
        out
    }

    /// Fills it in if every attribute is there.
    pub fn render_complete(&self, value: impl Fn(&str) -> Option<String>) -> Option<String> {
        self.pieces.iter().map(|piece| piece.text(&value)).collect()
    }
}

impl Piece {
    fn text(&self, value: &dyn Fn(&str) -> Option<String>) -> Option<String> {
        match self {
            Self::Text(text) => Some(text.clone()),
            Self::Attribute(name) => value(name),
            Self::Nested(name) => value(&name.render_complete(value)?),
        }
    }
}

/// Where the brace closes whose contents these are.
fn closing(text: &str) -> Option<usize> {
    let mut depth = 0;
    for (at, c) in text.char_indices() {
        match c {
            '{' => depth += 1,
            '}' if depth == 0 => return Some(at),
            '}' => depth -= 1,
            _ => {}
        }
    }
    None
}

impl fmt::Display for Template {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn value(name: &str) -> Option<String> {
        match name {
            "kind" => Some("model".into()),
            "name" => Some("orders".into()),
            _ => None,
        }
    }

    #[test]
    fn attributes_are_filled_in() {
        let template = Template::parse("dbt.{kind}.{name}").unwrap();
        assert_eq!(template.render(value), "dbt.model.orders");
        assert_eq!(template.attributes().collect::<Vec<_>>(), ["kind", "name"]);
        assert_eq!(template.to_string(), "dbt.{kind}.{name}");
    }

    #[test]
    fn a_missing_attribute_is_left_out_with_its_separator() {
        assert_eq!(Template::parse("dbt.{kind}.{gone}").unwrap().render(value), "dbt.model");
        assert_eq!(Template::parse("dbt.{gone}.{name}").unwrap().render(value), "dbt.orders");
        assert_eq!(Template::parse("{gone}.{name}").unwrap().render(value), "orders");
        assert_eq!(Template::parse("{gone}").unwrap().render(value), "");
        assert_eq!(Template::parse("{kind}: {gone}").unwrap().render_complete(value), None);
    }

    #[test]
    fn the_name_of_an_attribute_may_have_an_attribute_in_it() {
        let value = |name: &str| match name {
            "key" => Some("load".to_owned()),
            "_retries.load" => Some("2".to_owned()),
            _ => None,
        };
        let template = Template::parse("{key} {_retries.{key}}").unwrap();
        assert_eq!(template.render(value), "load 2");
        assert_eq!(template.attributes().collect::<Vec<_>>(), ["key", "key"]);
        assert_eq!(Template::parse("{_retries.{gone}}").unwrap().render_complete(value), None);
        let single = |text: &str| Template::parse(text).unwrap().single(value);
        assert_eq!(single("{_retries.{key}}").as_deref(), Some("_retries.load"));
        assert_eq!(single("{key}").as_deref(), Some("key"));
        assert_eq!(single("x{key}"), None);
    }

    #[test]
    fn a_bad_template_says_what_was_expected() {
        for (text, problem) in [
            ("a{b", "without `}`"),
            ("a{b{c}", "without `}`"),
            ("{a{b{c}}}", "at most"),
            ("a}b", "without `{`"),
            ("{}", "name between"),
            ("", "empty"),
        ] {
            let error = Template::parse(text).unwrap_err().to_string();
            assert!(error.contains(problem), "{error}");
        }
    }
}
