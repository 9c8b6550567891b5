//! The node agent: which processes of a machine are traced, and how the agent can be watched and stopped.
//!
//! * `rules`, `program`, `users`: rules, and what they ask about a process.
//! * `kubernetes`: the pods of the node, by its API.
//! * `selector`: the rules in force; `discovery`: running processes.
//! * `settings`: the configuration of all this.
//! * `metrics`, `http`, `usage`: what the agent tells of itself.
//! * `switch`: stopping and starting all tracing; `budget`: tracing less when it costs too much.
//! * `privileges`: the capabilities that are kept.

pub mod budget;
pub mod discovery;
pub mod http;
pub mod kubernetes;
pub mod metrics;
pub mod privileges;
pub mod program;
pub mod rules;
pub mod selector;
pub mod settings;
pub mod switch;
pub mod usage;
pub mod users;
