//! Harness of the end-to-end tests: interpreters, programs, the agent, and the spans and counters that it writes.
//!
//! A test that cannot run here says so with a line `SKIPPED: <test>: <reason>`; with `FLOE_REQUIRE_BPF=1` it fails if the
//! reason is a missing privilege, with `FLOE_REQUIRE_JAEGER=1` and `FLOE_REQUIRE_BROWSER=1` if it is that Jaeger or a browser is
//! missing.

mod agent;
mod browser;
mod collector;
mod copy;
pub mod dagster;
pub mod dbt;
mod fixture;
mod http;
mod interpreter;
mod jaeger;
mod kubernetes;
mod node;
mod run;
mod skip;
mod span;

pub use agent::{Agent, Outcome, Stats, Tracing};
pub use browser::{Browser, keys};
pub use collector::Collector;
pub use copy::Copy;
pub use fixture::{fixture, programs};
pub use interpreter::{Interpreter, environments, for_each, interpreters, one_of, refused};
pub use jaeger::{Jaeger, JaegerSpan};
pub use kubernetes::{KubernetesApi, pod};
pub use node::{Node, join_group};
pub use run::{Finished, Run, Running};
pub use skip::{can_trace, say, skip};
pub use span::{Event, Log, Span, Status};

use std::path::PathBuf;

/// A file of `tests/programs`.
pub fn program(name: &str) -> PathBuf {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("programs").join(name);
    assert!(path.exists(), "there is no {}", path.display());
    path
}
