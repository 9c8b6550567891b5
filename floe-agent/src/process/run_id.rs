//! The run that a process belongs to, as its environment and its arguments say.
//!
//! The sources and their order are [`SOURCES`]; `docs/correlation.md` lists them for users. All of it is written by others:
//! sizes are bounded, also after decompression, and what is not as expected is not there.

use std::ffi::OsString;
use std::fmt;
use std::io::Read as _;
use std::os::unix::ffi::OsStrExt as _;
use std::str::FromStr as _;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use opentelemetry::trace::{SpanContext, SpanId, TraceFlags, TraceId, TraceState};
use serde::Deserialize;

use super::identity::Environ;
use crate::trace::ids;

/// Most bytes of a decompressed value. Dagster's are a few kilobytes; those with many steps' states are larger.
const MAX_INFLATED: u64 = 4 << 20;
/// Longest run id, in bytes.
const MAX_RUN_ID: usize = 512;
/// Longest TRACESTATE, as the W3C asks to be passed on at least.
const MAX_TRACESTATE: usize = 512;

/// Where a run id can be found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Source {
    /// `TRACEPARENT` and `TRACESTATE`: W3C Trace Context in the environment.
    Traceparent,
    /// A variable that is the run id: `FLOE_RUN_ID`, `DAGSTER_RUN_ID`, and those that the configuration names.
    Variable,
    /// `dagster api execute_run '{…}'`, `execute_step`, `resume_run`: JSON, or compressed JSON, among the arguments.
    DagsterArguments,
    /// `DAGSTER_EXECUTE_RUN_ARGS`, `DAGSTER_COMPRESSED_EXECUTE_STEP_ARGS` and the like: the same in the environment.
    DagsterEnvironment,
    /// `DAGSTER_PIPES_CONTEXT`, or `--dagster-pipes-context`.
    DagsterPipes,
    /// `OPENLINEAGE_PARENT_ID`: `namespace/job/run id`.
    Openlineage,
    /// `HOSTNAME` of a Kubernetes pod that Dagster made: `dagster-run-<run id>-…`.
    Hostname,
    /// The label `dagster/run-id` of the Kubernetes pod, where the API is read.
    PodLabel,
    /// `DBT_CLOUD_RUN_ID`.
    DbtCloud,
}

/// All sources, in the order in which they are asked.
pub const SOURCES: [Source; 9] = [
    Source::Traceparent,
    Source::Variable,
    Source::DagsterArguments,
    Source::DagsterEnvironment,
    Source::DagsterPipes,
    Source::Openlineage,
    Source::Hostname,
    Source::PodLabel,
    Source::DbtCloud,
];

/// Variables that are the run id by default.
pub const VARIABLES: [&str; 2] = ["FLOE_RUN_ID", "DAGSTER_RUN_ID"];

const DAGSTER_VARIABLES: [(&str, Packing); 4] = [
    ("DAGSTER_EXECUTE_RUN_ARGS", Packing::Plain),
    ("DAGSTER_COMPRESSED_EXECUTE_RUN_ARGS", Packing::Compressed),
    ("DAGSTER_EXECUTE_STEP_ARGS", Packing::Plain),
    ("DAGSTER_COMPRESSED_EXECUTE_STEP_ARGS", Packing::Compressed),
];

/// Which sources count.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RunSources {
    /// The sources, first the one that wins.
    pub order: Vec<Source>,
    /// Names of variables that are the run id, first the one that wins.
    pub variables: Vec<String>,
}

impl Default for RunSources {
    fn default() -> Self {
        Self { order: SOURCES.to_vec(), variables: VARIABLES.map(str::to_owned).to_vec() }
    }
}

/// What a process says about the run it belongs to.
#[derive(Clone, Debug, PartialEq)]
pub struct RunContext {
    /// The trace of the run.
    pub trace: TraceId,
    /// The run id; a `TRACEPARENT` alone has none.
    pub run_id: Option<String>,
    /// The span that the process's outermost spans are children of.
    pub parent: Option<SpanId>,
    /// The sampled flag of `TRACEPARENT`: `false` asks for no spans.
    pub sampled: bool,
    /// `TRACESTATE`, to be passed on.
    pub state: TraceState,
    /// Where the trace comes from.
    pub source: Source,
}

impl RunContext {
    /// The context of a process of a Dagster run: its outermost spans are children of the run's span.
    pub fn of_dagster_run(run_id: &str, source: Source) -> Option<Self> {
        let context = Self::of_run(run_id, source)?;
        Some(Self { parent: Some(ids::span_id(context.trace, ids::RUN, 0)), ..context })
    }

    fn of_run(run_id: &str, source: Source) -> Option<Self> {
        let run_id = run_id.trim();
        (!run_id.is_empty() && run_id.len() <= MAX_RUN_ID).then(|| Self {
            trace: ids::trace_id(run_id),
            run_id: Some(run_id.to_owned()),
            parent: None,
            sampled: true,
            state: TraceState::NONE,
            source,
        })
    }

    fn of_span(span: &SpanContext) -> Self {
        Self {
            trace: span.trace_id(),
            run_id: None,
            parent: Some(span.span_id()),
            sampled: span.is_sampled(),
            state: span.trace_state().clone(),
            source: Source::Traceparent,
        }
    }
}

/// What may name the run of a process.
#[derive(Clone, Copy)]
pub struct Words<'a> {
    /// Its arguments.
    pub arguments: &'a [OsString],
    /// Its environment.
    pub environ: &'a Environ,
    /// The Dagster run that the labels of its pod name.
    pub pod_run: &'a dyn Fn() -> Option<String>,
    /// The content of a file of it.
    pub read: &'a dyn Fn(&str) -> Option<Vec<u8>>,
}

/// Finds the run of a process.
pub fn find(sources: &RunSources, words: &Words<'_>) -> Option<RunContext> {
    let &Words { arguments, environ, pod_run, read } = words;
    let mut found: Option<RunContext> = None;
    for source in &sources.order {
        let context = match source {
            Source::Traceparent => traceparent(environ),
            Source::Variable => variable(&sources.variables, environ),
            Source::DagsterArguments => dagster_arguments(arguments),
            Source::DagsterEnvironment => dagster_environment(environ),
            Source::DagsterPipes => dagster_pipes(arguments, environ, read),
            Source::Openlineage => openlineage(environ),
            Source::Hostname => hostname(environ),
            Source::PodLabel => pod_run().and_then(|id| RunContext::of_dagster_run(&id, *source)),
            Source::DbtCloud => environ.get("DBT_CLOUD_RUN_ID").and_then(|id| RunContext::of_run(&id, *source)),
        };
        match (&mut found, context) {
            (None, context) => found = context,
            // The first source has the last word about the trace; another one may still know more about it.
            (Some(found), Some(more)) => {
                if found.trace == more.trace {
                    found.parent = found.parent.or(more.parent);
                }
                if found.run_id.is_none() {
                    found.run_id = more.run_id;
                }
            }
            (Some(_), None) => {}
        }
        // A trace, its run and its parent: there is nothing more to learn.
        if found.as_ref().is_some_and(|found| found.run_id.is_some() && found.parent.is_some()) {
            break;
        }
    }
    found
}

fn traceparent(environ: &Environ) -> Option<RunContext> {
    let state = environ.get("TRACESTATE").filter(|state| state.len() <= MAX_TRACESTATE);
    parse_traceparent(&environ.get("TRACEPARENT")?, state.as_deref()).map(|span| RunContext::of_span(&span))
}

/// Parses a W3C `traceparent`. Later versions may append fields; what is not valid counts as absent.
pub fn parse_traceparent(text: &str, state: Option<&str>) -> Option<SpanContext> {
    let mut fields = text.trim().split('-');
    let mut field = |length: usize| {
        let field = fields.next().filter(|field| field.len() == length)?;
        let lower_hex = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
        field.bytes().all(lower_hex).then(|| u128::from_str_radix(field, 16).ok())?
    };
    let version = field(2)?;
    let (trace, span, flags) = (field(32)?, field(16)?, field(2)?);
    if version == 0xff || (version == 0 && fields.next().is_some()) {
        return None;
    }
    let state = state.and_then(|state| TraceState::from_str(state).ok()).unwrap_or_default();
    let flags = TraceFlags::new(flags as u8) & TraceFlags::SAMPLED;
    let context = SpanContext::new(TraceId::from(trace), SpanId::from(span as u64), flags, true, state);
    context.is_valid().then_some(context)
}

fn variable(names: &[String], environ: &Environ) -> Option<RunContext> {
    names.iter().find_map(|name| {
        let id = environ.get(name)?;
        if name.starts_with("DAGSTER_") {
            RunContext::of_dagster_run(&id, Source::Variable)
        } else {
            RunContext::of_run(&id, Source::Variable)
        }
    })
}

fn dagster_arguments(arguments: &[OsString]) -> Option<RunContext> {
    let command = arguments.windows(2).position(|words| {
        words[0] == "api" && (words[1] == "execute_run" || words[1] == "execute_step" || words[1] == "resume_run")
    })?;
    let mut rest = arguments[command + 2..].iter();
    while let Some(argument) = rest.next() {
        let argument = argument.as_bytes();
        let value = if argument == b"--compressed-input-json" {
            unpack(rest.next()?.as_bytes(), Packing::Compressed)
        } else if let Some(value) = argument.strip_prefix(b"--compressed-input-json=") {
            unpack(value, Packing::Compressed)
        } else {
            unpack(argument, Packing::Plain)
        };
        if let Some(id) = value.as_deref().and_then(run_id_in) {
            return RunContext::of_dagster_run(&id, Source::DagsterArguments);
        }
    }
    None
}

fn dagster_environment(environ: &Environ) -> Option<RunContext> {
    DAGSTER_VARIABLES.iter().find_map(|&(name, packing)| {
        let value = unpack(environ.get(name)?.as_bytes(), packing)?;
        RunContext::of_dagster_run(&run_id_in(&value)?, Source::DagsterEnvironment)
    })
}

/// The run id in Dagster's arguments, whoever serialised them: also the argument of a run that the code server launches.
pub fn run_id_in(json: &[u8]) -> Option<String> {
    #[derive(Deserialize)]
    struct Arguments {
        pipeline_run_id: String,
    }
    serde_json::from_slice::<Arguments>(json).ok().map(|arguments| arguments.pipeline_run_id)
}

fn dagster_pipes(
    arguments: &[OsString],
    environ: &Environ,
    read: impl Fn(&str) -> Option<Vec<u8>>,
) -> Option<RunContext> {
    #[derive(Deserialize)]
    struct Parameters {
        data: Option<Context>,
        path: Option<String>,
    }
    #[derive(Deserialize)]
    struct Context {
        run_id: String,
    }
    let argument = || {
        let at = arguments.iter().position(|argument| argument == "--dagster-pipes-context")?;
        Some(arguments.get(at + 1)?.to_string_lossy().into_owned())
    };
    let packed = environ.get("DAGSTER_PIPES_CONTEXT").or_else(argument)?;
    let parameters: Parameters = serde_json::from_slice(&unpack(packed.as_bytes(), Packing::Compressed)?).ok()?;
    let context = match parameters {
        Parameters { data: Some(context), .. } => context,
        Parameters { path: Some(path), .. } => serde_json::from_slice(&read(&path)?).ok()?,
        Parameters { data: None, path: None } => return None,
    };
    RunContext::of_dagster_run(&context.run_id, Source::DagsterPipes)
}

/// `namespace/job/run id`. Namespaces may contain slashes.
fn openlineage(environ: &Environ) -> Option<RunContext> {
    let parent = environ.get("OPENLINEAGE_PARENT_ID")?;
    let mut parts = parent.rsplit('/');
    let (run, job) = (parts.next()?, parts.next()?);
    (!job.is_empty()).then(|| RunContext::of_run(run, Source::Openlineage))?
}

fn hostname(environ: &Environ) -> Option<RunContext> {
    let name = environ.get("HOSTNAME")?;
    let id = name.strip_prefix("dagster-run-")?.get(..36).filter(|id| ids::is_uuid(id))?;
    RunContext::of_dagster_run(id, Source::Hostname)
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Packing {
    Plain,
    /// base64 of zlib.
    Compressed,
}

fn unpack(packed: &[u8], packing: Packing) -> Option<Vec<u8>> {
    if packing == Packing::Plain {
        return Some(packed.to_vec());
    }
    let compressed = BASE64.decode(packed).ok()?;
    let mut bytes = Vec::new();
    flate2::read::ZlibDecoder::new(&compressed[..]).take(MAX_INFLATED).read_to_end(&mut bytes).ok()?;
    Some(bytes)
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Traceparent => "traceparent",
            Self::Variable => "variable",
            Self::DagsterArguments => "dagster_arguments",
            Self::DagsterEnvironment => "dagster_environment",
            Self::DagsterPipes => "dagster_pipes",
            Self::Openlineage => "openlineage",
            Self::Hostname => "hostname",
            Self::PodLabel => "pod_label",
            Self::DbtCloud => "dbt_cloud",
        })
    }
}

#[cfg(test)]
#[path = "run_id_tests.rs"]
mod tests;
