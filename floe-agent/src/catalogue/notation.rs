//! Probes on the command line: `pkg.mod:Class.method(user=arg0.name, n=len(arg1))`.

use opentelemetry::trace::SpanKind;
use thiserror::Error;

use super::path::{Path, PathError};
use super::plan::DEFAULT_MAX;
use super::probe::{Attribute, Condition, Kind, Moment, Probe, Role, SpanRule, Target, TargetError};
use super::template::Template;
use super::{COMMAND_LINE, is_reserved, key};

/// A probe on the command line that cannot be read.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum NotationError {
    /// Its function.
    #[error(transparent)]
    Target(#[from] TargetError),
    /// A path.
    #[error(transparent)]
    Path(#[from] PathError),
    /// Anything else.
    #[error("{problem}; write a probe as `pkg.mod:Class.method(user=arg0.name, n=len(arg1))`")]
    Form {
        /// What is wrong.
        problem: String,
    },
}

/// Parses a probe. Its span has the function's qualified name; attributes are named as given.
pub fn parse(text: &str) -> Result<Probe, NotationError> {
    let form = |problem: &str| NotationError::Form { problem: problem.to_owned() };
    let (target, arguments) = match text.split_once('(') {
        None => (text, ""),
        Some((target, rest)) => (target, rest.trim_end().strip_suffix(')').ok_or_else(|| form("the `)` is missing"))?),
    };
    let target = Target::parse(target)?;
    let mut attributes: Vec<Attribute> = Vec::new();
    for argument in split(arguments) {
        let (name, path) = argument
            .split_once('=')
            .ok_or_else(|| form(&format!("`{argument}` is not an attribute: expected `name=path`")))?;
        let name = name.trim();
        if name.is_empty() {
            return Err(form(&format!("`{argument}` has no attribute name")));
        }
        if is_reserved(name) {
            return Err(form(&format!("the attribute name `{name}` is reserved")));
        }
        if attributes.iter().any(|attribute| attribute.name.as_str() == name) {
            return Err(form(&format!("the attribute `{name}` is given twice")));
        }
        let path = Path::parse(path.trim())?;
        let at = if path.needs_exit() { Moment::Exit } else { Moment::Enter };
        attributes.push(Attribute { name: key(name), path, at, max: DEFAULT_MAX });
    }
    let place = format!("--probe '{text}'");
    let mut probe = Probe::new(target.to_string(), COMMAND_LINE, place, Kind::Call, target);
    probe.span = Some(SpanRule {
        id: probe.name.clone(),
        name: Template::literal(&probe.target.qualname),
        better_names: Vec::new(),
        role: Role::None,
        kind: SpanKind::Internal,
        key: None,
        run: None,
        parent: None,
        condition: Condition::default(),
        instant: false,
        inherit: Vec::new(),
        links: Vec::new(),
        external: None,
        exported_as: Vec::new(),
        waits_for: None,
    });
    probe.attributes = attributes;
    Ok(probe)
}

/// Splits at the commas that are not inside quotes, parentheses or brackets.
fn split(text: &str) -> Vec<&str> {
    let (mut parts, mut start, mut depth, mut quote) = (Vec::new(), 0, 0_u32, None);
    for (at, c) in text.char_indices() {
        match (quote, c) {
            (Some(open), _) if open == c => quote = None,
            (None, '\'' | '"') => quote = Some(c),
            (None, '(' | '[') => depth += 1,
            (None, ')' | ']') => depth = depth.saturating_sub(1),
            (None, ',') if depth == 0 => {
                parts.push(&text[start..at]);
                start = at + 1;
            }
            _ => {}
        }
    }
    parts.push(&text[start..]);
    parts.into_iter().map(str::trim).filter(|part| !part.is_empty()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_function_alone_is_a_probe() {
        let probe = parse("pkg.mod:Class.method").unwrap();
        assert_eq!(probe.name, "pkg.mod:Class.method");
        assert_eq!(probe.span.unwrap().name.to_string(), "Class.method");
        assert!(probe.attributes.is_empty());
        assert_eq!(parse("pkg.mod:f()").unwrap().target, parse("pkg.mod:f").unwrap().target);
    }

    #[test]
    fn attributes_are_paths_with_a_name() {
        let probe = parse("m:f(user=arg0.name, n=len(arg1), s=arg(1, 'a,b'), r = return['x'])").unwrap();
        let seen: Vec<_> = probe.attributes.iter().map(|a| (a.name.as_str(), a.path.to_string(), a.at)).collect();
        assert_eq!(
            seen,
            [
                ("user", "arg0.name".to_owned(), Moment::Enter),
                ("n", "len(arg1)".to_owned(), Moment::Enter),
                ("s", "arg(1, 'a,b')".to_owned(), Moment::Enter),
                ("r", "return['x']".to_owned(), Moment::Exit),
            ]
        );
    }

    #[test]
    fn a_bad_probe_says_why_and_shows_the_notation() {
        for (text, problem) in [
            ("m:f(x=arg0", "`)` is missing"),
            ("m:f(x)", "`x` is not an attribute"),
            ("m:f(=arg0)", "has no attribute name"),
            ("m:f(x=arg0, x=arg1)", "given twice"),
            ("m:f(exception.type=arg0)", "reserved"),
            ("m:f(x=foo)", "character 1: expected `arg0`"),
            ("m.f", "with `:` between"),
        ] {
            let error = parse(text).unwrap_err().to_string();
            assert!(error.contains(problem), "{error}");
        }
    }
}
