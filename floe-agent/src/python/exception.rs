//! Exceptions, read while their thread waits.

/// What is known of an exception.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExceptionFacts {
    /// Its type as Python prints it: with its module, unless that is `builtins`.
    pub type_name: String,
    /// What `str` gives for it, where that can be known without running code.
    pub message: Option<String>,
    /// The traceback as Python prints it, causes included, without source lines.
    pub stacktrace: String,
}
