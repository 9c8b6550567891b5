//! What a probe is, whichever way it was written down.

use std::fmt;

use floe_ebpf::MODULE_NAME_LEN;
use opentelemetry::Key;
use thiserror::Error;

use super::path::Path;
use super::template::Template;
use super::version::VersionRange;
use crate::units::ProbeId;

/// A function to probe, and what to make of its calls.
#[derive(Clone, Debug, PartialEq)]
pub struct Probe {
    /// Name, unique in its pack.
    pub name: String,
    /// The pack it comes from.
    pub pack: String,
    /// What its calls become.
    pub kind: Kind,
    /// The function.
    pub target: Target,
    /// Modules in which the function object is found, where that is not the target's own: a local function hangs on
    /// the objects that were made with it. Empty: the target's module.
    pub found_in: Vec<String>,
    /// A local variable that the function's code has. Tells local functions of one name apart on Python 3.10 and
    /// older, whose code objects have no qualified name.
    pub with_variable: Option<String>,
    /// The versions of the pack's distribution that have the function; elsewhere it is not looked for. `None`: all.
    pub versions: Option<VersionRange>,
    /// The span ([`Kind::Call`] and [`Kind::PairBegin`]).
    pub span: Option<SpanRule>,
    /// What is captured.
    pub attributes: Vec<Attribute>,
    /// When the span is an error, beyond a raised exception.
    pub status: Option<StatusRule>,
}

/// What the calls of a function become.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A span each.
    Call,
    /// Attributes of the process's innermost open command span.
    Event,
    /// The beginning of a span that another function ends, in the same thread.
    PairBegin,
    /// The end of such a span, when it returns.
    PairEnd {
        /// The probe that begins it.
        begin: ProbeId,
    },
}

/// A function: `module:qualified.name`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Target {
    /// Module.
    pub module: String,
    /// Qualified name; may contain `<locals>`.
    pub qualname: String,
}

/// How a span is made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SpanRule {
    /// Its name.
    pub name: Template,
    /// Its part in the trace.
    pub role: Role,
    /// Calls that are no span: attributes of the entry, and their values for which this holds.
    pub unless: Vec<(String, Vec<String>)>,
    /// The call tells of something that took no time: the span has no length, whatever the call took.
    pub instant: bool,
}

/// The part of a span in a trace.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// The command that a process runs: parent of what happens in threads without an open span.
    Command,
    /// A unit of work; commands count theirs.
    Node,
    /// No special part.
    #[default]
    None,
}

/// A captured attribute.
#[derive(Clone, Debug, PartialEq)]
pub struct Attribute {
    /// Name.
    pub name: Key,
    /// Where its value is.
    pub path: Path,
    /// When it is read.
    pub at: Moment,
    /// Longest string, in bytes of its representation in memory.
    pub max: u32,
}

/// The two moments of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Moment {
    /// The call begins.
    Enter,
    /// It ends.
    Exit,
}

/// When a span is an error, and what its status says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StatusRule {
    /// The attribute that tells the outcome.
    pub from: Option<String>,
    /// Its values that mean an error.
    pub error: Vec<String>,
    /// The attribute that has the message.
    pub message: Option<String>,
    /// What to say when the call raised: the first of these whose attributes are all there. Otherwise `Type: message`.
    pub raised: Vec<Template>,
}

/// A target that cannot be read.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum TargetError {
    /// Not of the form `module:name`.
    #[error("target `{0}`: expected `package.module:Class.method`, with `:` between module and function")]
    Form(String),
    /// A part is no Python name.
    #[error("target `{target}`: `{part}` is not a Python name")]
    Name {
        /// The text.
        target: String,
        /// The part.
        part: String,
    },
    /// The module's name is too long for the kernel side.
    #[error("module `{module}`: its name has {} bytes, the longest that can be probed has {}", .module.len(), MODULE_NAME_LEN - 1)]
    ModuleTooLong {
        /// The module.
        module: String,
    },
}

impl Probe {
    /// The modules whose import can bring the function.
    pub fn modules(&self) -> impl Iterator<Item = &str> {
        let own = self.found_in.is_empty().then_some(self.target.module.as_str());
        self.found_in.iter().map(String::as_str).chain(own)
    }
}

impl Target {
    /// Parses `module:qualified.name`.
    pub fn parse(text: &str) -> Result<Self, TargetError> {
        let (module, qualname) = text.trim().split_once(':').ok_or_else(|| TargetError::Form(text.to_owned()))?;
        let (module, qualname) = (module.trim(), qualname.trim());
        if module.is_empty() || qualname.is_empty() || qualname.contains(':') {
            return Err(TargetError::Form(text.to_owned()));
        }
        check_module(module)?;
        for part in
            module.split('.').chain(qualname.split('.').filter(|part| !matches!(*part, "<locals>" | "<lambda>")))
        {
            if !is_name(part) {
                return Err(TargetError::Name { target: text.to_owned(), part: part.to_owned() });
            }
        }
        Ok(Self { module: module.to_owned(), qualname: qualname.to_owned() })
    }
}

/// Checks that a module's name fits the kernel side.
pub(super) fn check_module(module: &str) -> Result<(), TargetError> {
    if module.len() >= MODULE_NAME_LEN {
        return Err(TargetError::ModuleTooLong { module: module.to_owned() });
    }
    match module.split('.').find(|part| !is_name(part)) {
        Some(part) => Err(TargetError::Name { target: module.to_owned(), part: part.to_owned() }),
        None => Ok(()),
    }
}

fn is_name(text: &str) -> bool {
    let mut chars = text.chars();
    chars.next().is_some_and(|c| c.is_alphabetic() || c == '_') && chars.all(|c| c.is_alphanumeric() || c == '_')
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.module, self.qualname)
    }
}

impl fmt::Display for Moment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Enter => "enter",
            Self::Exit => "exit",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets_are_module_and_qualified_name() {
        let target = Target::parse("dbt.cli.requires:postflight.<locals>.wrapper").unwrap();
        assert_eq!(target.module, "dbt.cli.requires");
        assert_eq!(target.qualname, "postflight.<locals>.wrapper");
        assert_eq!(target.to_string(), "dbt.cli.requires:postflight.<locals>.wrapper");
    }

    #[test]
    fn a_bad_target_says_why() {
        for (text, problem) in [
            ("pkg.mod", "with `:` between"),
            (":f", "with `:` between"),
            ("pkg.mod:", "with `:` between"),
            ("pkg..mod:f", "`` is not a Python name"),
            ("pkg.mod:f g", "`f g` is not a Python name"),
            ("1pkg:f", "`1pkg` is not a Python name"),
        ] {
            let error = Target::parse(text).unwrap_err().to_string();
            assert!(error.contains(problem), "{error}");
        }
    }

    #[test]
    fn a_module_name_that_the_kernel_side_cannot_hold_is_refused() {
        let longest = "m".repeat(MODULE_NAME_LEN - 1);
        assert!(Target::parse(&format!("{longest}:f")).is_ok());
        let error = Target::parse(&format!("{longest}m:f")).unwrap_err().to_string();
        assert!(error.ends_with("its name has 96 bytes, the longest that can be probed has 95"), "{error}");
    }
}
