//! Paths: where a captured value is, as a pack or a command line writes it.
//!
//! | Notation | Means |
//! |---|---|
//! | `arg0`, `self` | positional argument 0 (`self` counts) |
//! | `arg(1, 'sql')` | argument 1, or the keyword argument `sql` |
//! | `kwargs['sql']` | keyword argument `sql` |
//! | `return`, `exception` | what the call returned or raised |
//! | `globals['NAME']` | a global variable of the function's module |
//! | `.name`, `['key']`, `[0]` | attribute; item of a dict; item of a tuple or list |
//! | `[*]` | each item of a tuple or list, or each value of a dict: a list |
//! | `join('/', path[*])` | the items of a list as one text; with two `[*]`, those of each inner list |
//! | `dict(path)` | a dict with str keys: an attribute for each of its entries |
//! | `type(path)`, `len(path)` | the name of its type; the number of its items (tuple, list, dict) |
//! | `uuid(path)` | an int of at most 128 bits as a UUID writes it: the ids of OpenTelemetry's SDK |
//! | `str(path)` | the same as `path` |
//!
//! Attributes are those of the instance, in its dict or in slots, and the names of a named tuple's items. Enum members give
//! their `_value_` without being asked, paths and UUIDs their text. `.args` behind an exception gives the exception's
//! arguments.

use std::fmt;

use floe_ebpf::{KEY_LEN, MAX_LOOPS};
use thiserror::Error;

/// A parsed path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Path {
    /// Where it starts.
    pub root: Root,
    /// How it goes on.
    pub steps: Vec<Step>,
    /// What is taken at its end.
    pub leaf: Leaf,
    /// Separator with which the items of the innermost list become one text.
    pub join: Option<String>,
}

/// Where a path starts.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Root {
    /// An argument by position, by keyword, or by both.
    Argument {
        /// Position; the instance of a method is 0.
        position: Option<u32>,
        /// Name, where the caller may pass it by keyword.
        keyword: Option<String>,
    },
    /// The returned object.
    Return,
    /// The raised exception.
    Exception,
    /// The type of the raised exception.
    ExceptionType,
    /// The function's globals.
    Globals,
}

/// One hop of a path.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Step {
    /// An instance attribute.
    Attribute(String),
    /// A dict item.
    Key(String),
    /// A tuple or list item.
    Item(u32),
    /// `BaseException.args`, which is a field of the C struct and not in the instance's dict.
    ExceptionArgs,
    /// The type of the object.
    Type,
    /// Each item of a tuple or list, or value of a dict.
    Each,
}

/// What a path ends in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Leaf {
    /// The value: str, int, float, bool, None, enum member.
    Value,
    /// The name of the type object that the path leads to.
    TypeName,
    /// An int as a UUID.
    Uuid,
    /// The number of items.
    Len,
    /// The entries of a dict.
    Dict,
}

/// Longest separator of `join`, in bytes.
const SEPARATOR_LEN: usize = 4;
/// Most loops of a path within each other. The library needs one.
const LOOPS: usize = MAX_LOOPS - 2;

/// A path that cannot be read.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("path `{path}`, character {column}: expected {expected}, found {found}")]
pub struct PathError {
    /// The text.
    pub path: String,
    /// Where, counted from 1.
    pub column: usize,
    /// What would have been right.
    pub expected: String,
    /// What is there.
    pub found: String,
}

impl Path {
    /// Parses a path; the module's documentation has the notation.
    pub fn parse(text: &str) -> Result<Self, PathError> {
        let mut parser = Parser { text, at: 0 };
        let path = parser.path()?;
        parser.spaces();
        if parser.at < text.len() {
            return Err(parser.expected("`.name`, `['key']`, `[0]` or the end"));
        }
        Ok(path)
    }

    /// Whether the value may have many parts.
    pub fn is_long(&self) -> bool {
        self.leaf == Leaf::Dict || self.steps.contains(&Step::Each)
    }

    /// Whether the value exists only when the call has ended.
    pub fn needs_exit(&self) -> bool {
        matches!(self.root, Root::Return | Root::Exception | Root::ExceptionType)
    }
}

impl fmt::Display for Path {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut text = match &self.root {
            Root::Argument { position: Some(position), keyword: Some(keyword) } => {
                format!("arg({position}, '{keyword}')")
            }
            Root::Argument { position: Some(position), keyword: None } => format!("arg{position}"),
            Root::Argument { position: None, keyword } => {
                format!("kwargs['{}']", keyword.as_deref().unwrap_or_default())
            }
            Root::Return => "return".to_owned(),
            Root::Exception => "exception".to_owned(),
            Root::ExceptionType => "type(exception)".to_owned(),
            Root::Globals => "globals".to_owned(),
        };
        for step in &self.steps {
            match step {
                Step::Attribute(name) => text = format!("{text}.{name}"),
                Step::Key(key) => text = format!("{text}['{key}']"),
                Step::Item(index) => text = format!("{text}[{index}]"),
                Step::ExceptionArgs => text += ".args",
                Step::Type => text = format!("type({text})"),
                Step::Each => text += "[*]",
            }
        }
        match self.leaf {
            Leaf::Len => text = format!("len({text})"),
            Leaf::Uuid => text = format!("uuid({text})"),
            Leaf::Dict => text = format!("dict({text})"),
            Leaf::Value | Leaf::TypeName => {}
        }
        if let Some(separator) = &self.join {
            text = format!("join('{separator}', {text})");
        }
        f.write_str(&text)
    }
}

struct Parser<'a> {
    text: &'a str,
    at: usize,
}

impl Parser<'_> {
    fn rest(&self) -> &str {
        &self.text[self.at..]
    }

    fn peek(&self) -> Option<char> {
        self.rest().chars().next()
    }

    fn spaces(&mut self) {
        while self.peek() == Some(' ') {
            self.at += 1;
        }
    }

    fn eat(&mut self, wanted: char) -> bool {
        self.spaces();
        let there = self.peek() == Some(wanted);
        if there {
            self.at += wanted.len_utf8();
        }
        there
    }

    fn demand(&mut self, wanted: char) -> Result<(), PathError> {
        if self.eat(wanted) { Ok(()) } else { Err(self.expected(&format!("`{wanted}`"))) }
    }

    fn expected(&self, expected: &str) -> PathError {
        self.expected_at(self.at, expected)
    }

    fn expected_at(&self, at: usize, expected: &str) -> PathError {
        let found: String = self.text[at..].chars().take(20).collect();
        PathError {
            path: self.text.to_owned(),
            column: self.text[..at].chars().count() + 1,
            expected: expected.to_owned(),
            found: if found.is_empty() { "the end".to_owned() } else { format!("`{found}`") },
        }
    }

    fn word(&mut self) -> &str {
        let start = self.at;
        let length: usize =
            self.rest().chars().take_while(|c| c.is_alphanumeric() || *c == '_').map(char::len_utf8).sum();
        self.at += length;
        &self.text[start..self.at]
    }

    fn path(&mut self) -> Result<Path, PathError> {
        self.spaces();
        let start = self.at;
        let word = self.word().to_owned();
        let function = matches!(word.as_str(), "type" | "len" | "str" | "dict" | "uuid" | "join") && self.eat('(');
        if !function {
            self.at = start;
            return self.plain();
        }
        if word == "join" {
            return self.join();
        }
        let inner = self.at;
        let mut path = self.plain()?;
        self.demand(')')?;
        match word.as_str() {
            "len" => path.leaf = Leaf::Len,
            "uuid" => path.leaf = Leaf::Uuid,
            "dict" => {
                if path.steps.contains(&Step::Each) {
                    return Err(self.expected_at(inner, "a path without `[*]`"));
                }
                path.leaf = Leaf::Dict;
            }
            "type" => {
                path.leaf = Leaf::TypeName;
                if path.root == Root::Exception && path.steps.is_empty() {
                    path.root = Root::ExceptionType;
                } else {
                    path.steps.push(Step::Type);
                }
            }
            _ => {}
        }
        Ok(path)
    }

    /// `join(` was read.
    fn join(&mut self) -> Result<Path, PathError> {
        self.spaces();
        let start = self.at;
        let separator = self.quoted("a separator in quotes")?;
        if separator.len() > SEPARATOR_LEN || separator.contains('\0') {
            return Err(self.expected_at(start, &format!("a separator of at most {SEPARATOR_LEN} bytes")));
        }
        self.demand(',')?;
        self.spaces();
        let inner = self.at;
        let mut path = self.path()?;
        if !path.steps.contains(&Step::Each) || path.join.is_some() {
            return Err(self.expected_at(inner, "a path with `[*]`"));
        }
        self.demand(')')?;
        path.join = Some(separator);
        Ok(path)
    }

    fn plain(&mut self) -> Result<Path, PathError> {
        self.spaces();
        let root = self.root()?;
        let mut steps = Vec::new();
        loop {
            self.spaces();
            match self.peek() {
                Some('.') => {
                    self.at += 1;
                    let start = self.at;
                    let name = self.word().to_owned();
                    if name.is_empty() || name.starts_with(|c: char| c.is_ascii_digit()) {
                        return Err(self.expected_at(start, "an attribute name"));
                    }
                    self.check_key(start, &name)?;
                    let of_exception = root == Root::Exception && name == "args";
                    steps.push(if of_exception { Step::ExceptionArgs } else { Step::Attribute(name) });
                }
                Some('[') => {
                    self.at += 1;
                    self.spaces();
                    if self.peek() == Some('*') {
                        if steps.iter().filter(|step| **step == Step::Each).count() == LOOPS {
                            return Err(self.expected(&format!("at most {LOOPS} times `[*]` in a path")));
                        }
                        self.at += 1;
                        self.demand(']')?;
                        steps.push(Step::Each);
                        continue;
                    }
                    steps.push(if self.peek().is_some_and(|c| c.is_ascii_digit()) {
                        Step::Item(self.number()?)
                    } else {
                        Step::Key(self.string("an index (0, 1, ...), `*` or a key ('name')")?)
                    });
                    self.demand(']')?;
                }
                _ => break,
            }
        }
        if root == Root::Globals && !matches!(steps.first(), Some(Step::Key(_))) {
            return Err(self.expected("a variable's name: `globals['NAME']`"));
        }
        Ok(Path { root, steps, leaf: Leaf::Value, join: None })
    }

    fn root(&mut self) -> Result<Root, PathError> {
        const ROOTS: &str = "`arg0`, `self`, `arg(1, 'name')`, `kwargs['name']`, `return`, `exception`, \
                             `globals['NAME']`, `type(...)`, `len(...)`, `str(...)`, `dict(...)`, `uuid(...)` or `join(...)`";
        let start = self.at;
        let word = self.word().to_owned();
        match word.as_str() {
            "self" => Ok(Root::Argument { position: Some(0), keyword: None }),
            "return" => Ok(Root::Return),
            "exception" => Ok(Root::Exception),
            "globals" => Ok(Root::Globals),
            "kwargs" => {
                if !self.eat('[') {
                    return Err(self.expected("a name: `kwargs['name']`"));
                }
                let keyword = self.string("a name in quotes")?;
                self.demand(']')?;
                Ok(Root::Argument { position: None, keyword: Some(keyword) })
            }
            "arg" => {
                if !self.eat('(') {
                    return Err(self.expected("a position: `arg0` or `arg(0, 'name')`"));
                }
                self.spaces();
                let position = self.number()?;
                let keyword = if self.eat(',') { Some(self.string("a name in quotes")?) } else { None };
                self.demand(')')?;
                Ok(Root::Argument { position: Some(position), keyword })
            }
            _ => match word.strip_prefix("arg").map(str::parse::<u8>) {
                Some(Ok(position)) => Ok(Root::Argument { position: Some(position.into()), keyword: None }),
                _ => Err(self.expected_at(start, ROOTS)),
            },
        }
    }

    fn number(&mut self) -> Result<u32, PathError> {
        let start = self.at;
        // Bounded so that a mistake does not become an address far away.
        match self.word().parse::<u16>() {
            Ok(number) => Ok(number.into()),
            Err(_) => Err(self.expected_at(start, "a number from 0 to 65535")),
        }
    }

    fn string(&mut self, expected: &str) -> Result<String, PathError> {
        self.spaces();
        let start = self.at;
        let string = self.quoted(expected)?;
        self.check_key(start + 1, &string)?;
        Ok(string)
    }

    fn quoted(&mut self, expected: &str) -> Result<String, PathError> {
        let start = self.at;
        let Some(quote @ ('\'' | '"')) = self.peek() else {
            return Err(self.expected(expected));
        };
        let Some(length) = self.text[start + 1..].find(quote) else {
            return Err(self.expected_at(start, "a closing quote"));
        };
        let string = self.text[start + 1..start + 1 + length].to_owned();
        self.at = start + length + 2;
        Ok(string)
    }

    fn check_key(&self, start: usize, key: &str) -> Result<(), PathError> {
        if key.is_empty() || !key.is_ascii() || key.len() >= KEY_LEN {
            let expected = format!("a name of 1 to {} ASCII characters", KEY_LEN - 1);
            return Err(self.expected_at(start, &expected));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(text: &str) -> String {
        Path::parse(text).expect_err(text).to_string()
    }

    #[test]
    fn every_notation_reads_back_as_it_was_written() {
        for text in [
            "arg0",
            "arg12.a.b",
            "arg(1, 'sql')",
            "kwargs['sql']",
            "return.status",
            "return[0]['rows_affected'].x",
            "globals['_INVOCATION_ID']",
            "exception.args[0]",
            "type(exception)",
            "type(exception.exception)",
            "type(arg0)",
            "uuid(arg(1, 'span')._context[0])",
            "len(arg1.items)",
            "arg1.keys[*]",
            "arg1.keys[*].path[*]",
            "join('/', arg1.path[*])",
            "join('', arg1.keys[*][0][*])",
            "len(arg1.keys[*])",
            "type(return[*])",
            "dict(arg0.tags)",
        ] {
            assert_eq!(Path::parse(text).expect(text).to_string(), text);
        }
        assert_eq!(Path::parse("str(arg0.id)").unwrap(), Path::parse("arg0.id").unwrap());
        assert_eq!(Path::parse("self.node").unwrap(), Path::parse("arg0.node").unwrap());
        assert_eq!(Path::parse(" arg( 1 , \"sql\" ) .x ").unwrap(), Path::parse("arg(1, 'sql').x").unwrap());
    }

    #[test]
    fn args_is_the_field_of_an_exception_but_an_attribute_elsewhere() {
        assert_eq!(Path::parse("exception.args").unwrap().steps, [Step::ExceptionArgs]);
        assert_eq!(Path::parse("arg0.args").unwrap().steps, [Step::Attribute("args".into())]);
    }

    #[test]
    fn a_bad_path_says_where_and_what_was_expected() {
        assert_eq!(error("arg0..x"), "path `arg0..x`, character 6: expected an attribute name, found `.x`");
        assert!(error("frame.x").contains("character 1: expected `arg0`, `self`"));
        assert!(error("").contains("found the end"));
        assert!(error("arg0[-1]").contains("expected an index"));
        assert!(error("arg0['a").contains("expected a closing quote"));
        assert!(error("arg(x)").contains("expected a number"));
        assert!(error("kwargs.x").contains("expected a name: `kwargs['name']`"));
        assert!(error("globals.x").contains("expected a variable's name"));
        assert!(error("len(arg0").contains("expected `)`"));
        assert!(error("arg0 x").contains("or the end, found `x`"));
        assert!(error("type(len(arg0))").contains("character 6"));
        assert!(error("arg0[*").contains("expected `]`"));
        assert!(error("arg0[*][*][*]").contains("at most 2 times `[*]`"));
        assert!(error("join('/', arg0)").contains("character 11: expected a path with `[*]`"));
        assert!(error("join('/', join('/', arg0[*]))").contains("expected a path with `[*]`"));
        assert!(error("join('/' arg0[*])").contains("expected `,`"));
        assert!(error("join('/////', arg0[*])").contains("character 6: expected a separator of at most 4 bytes"));
        assert!(error("join(arg0[*])").contains("expected a separator in quotes"));
        assert!(error("dict(arg0[*])").contains("expected a path without `[*]`"));
    }

    #[test]
    fn a_key_that_the_kernel_side_cannot_hold_is_refused() {
        let longest = "k".repeat(KEY_LEN - 1);
        assert!(Path::parse(&format!("arg0.{longest}")).is_ok());
        assert!(error(&format!("arg0.{longest}k")).contains("1 to 63 ASCII characters"));
        assert!(error("arg0['é']").contains("ASCII"));
    }
}
