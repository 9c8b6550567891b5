//! Each source by itself, their order, and input that means harm.

use std::io::Write as _;
use std::time::{Duration, Instant};

use proptest::prelude::*;

use super::*;

const RUN: &str = "1c9bfa5c-7b7d-4c5e-9a58-2b3d6f0e8a11";
const TRACE: &str = "1c9bfa5c7b7d4c5e9a582b3d6f0e8a11";
const TRACEPARENT: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";

/// What Dagster 1.13 itself made.
fn vector(name: &str) -> String {
    let vectors: serde_json::Value = serde_json::from_str(include_str!("run_id_vectors.json")).unwrap();
    vectors[name].as_str().unwrap().to_owned()
}

fn environ(variables: &[(&str, &str)]) -> Environ {
    let text: String = variables.iter().flat_map(|(name, value)| [name, "=", value, "\0"]).collect();
    Environ::from_bytes(text.into_bytes())
}

fn no_files(_: &str) -> Option<Vec<u8>> {
    None
}

fn find(
    sources: &RunSources,
    arguments: &[OsString],
    environ: &Environ,
    read: impl Fn(&str) -> Option<Vec<u8>>,
) -> Option<RunContext> {
    super::find(sources, &Words { arguments, environ, pod_run: &|| None, read: &read })
}

fn from_environ(variables: &[(&str, &str)]) -> Option<RunContext> {
    find(&RunSources::default(), &[], &environ(variables), no_files)
}

fn from_arguments(arguments: &[&str]) -> Option<RunContext> {
    let arguments: Vec<OsString> = arguments.iter().map(OsString::from).collect();
    find(&RunSources::default(), &arguments, &environ(&[]), no_files)
}

fn compress(text: &str) -> String {
    let mut encoder = flate2::write::ZlibEncoder::new(Vec::new(), flate2::Compression::default());
    encoder.write_all(text.as_bytes()).unwrap();
    BASE64.encode(encoder.finish().unwrap())
}

/// The context of a Dagster run: the run's trace, and its span as the parent.
fn assert_dagster(context: Option<&RunContext>, source: Source) {
    let context = context.unwrap();
    assert_eq!(context.trace.to_string(), TRACE);
    assert_eq!(context.run_id.as_deref(), Some(RUN));
    assert_eq!(context.parent, Some(ids::span_id(context.trace, "run", 0)));
    assert_eq!(context.source, source);
    assert!(context.sampled);
}

#[test]
fn traceparent_gives_trace_parent_flag_and_state() {
    let context =
        from_environ(&[("TRACEPARENT", TRACEPARENT), ("TRACESTATE", "congo=t61rcWkgMzE,rojo=00f067")]).unwrap();
    assert_eq!(context.trace.to_string(), "0af7651916cd43dd8448eb211c80319c");
    assert_eq!(context.parent.unwrap().to_string(), "b7ad6b7169203331");
    assert_eq!(context.state.header(), "congo=t61rcWkgMzE,rojo=00f067");
    assert!(context.sampled);
    assert_eq!((context.run_id, context.source), (None, Source::Traceparent));
    let unsampled = from_environ(&[("TRACEPARENT", &(TRACEPARENT[..53].to_owned() + "00"))]).unwrap();
    assert!(!unsampled.sampled);
}

#[test]
fn a_traceparent_that_is_not_valid_is_absent() {
    let (trace, span) = ("0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331");
    for text in [
        String::new(),
        "00".to_owned(),
        format!("00-{trace}-{span}"),
        format!("00-{trace}-{span}-1"),
        format!("00-{trace}-{span}-01-more"),
        format!("ff-{trace}-{span}-01"),
        format!("00-{}-{span}-01", trace.to_uppercase()),
        format!("00-{}-{span}-01", "0".repeat(32)),
        format!("00-{trace}-{}-01", "0".repeat(16)),
        format!("00-+{}-{span}-01", &trace[1..]),
        format!("00-{}-{span}-01", &trace[1..]),
    ] {
        assert_eq!(parse_traceparent(&text, None), None, "{text}");
    }
    assert!(parse_traceparent(&format!("01-{trace}-{span}-01-more"), None).is_some(), "a later version may say more");
    assert!(parse_traceparent(&format!(" 00-{trace}-{span}-ff "), Some("no state")).is_some());
}

#[test]
fn variables_that_are_the_run_id() {
    let context = from_environ(&[("FLOE_RUN_ID", "nightly 7")]).unwrap();
    assert_eq!((context.trace, context.parent), (ids::trace_id("nightly 7"), None));
    assert_dagster(from_environ(&[("DAGSTER_RUN_ID", RUN)]).as_ref(), Source::Variable);
    let sources = RunSources { variables: vec!["AIRFLOW_CTX_DAG_RUN_ID".into()], ..RunSources::default() };
    let environ = environ(&[("AIRFLOW_CTX_DAG_RUN_ID", "manual__1"), ("FLOE_RUN_ID", "other")]);
    let context = find(&sources, &[], &environ, no_files).unwrap();
    assert_eq!(context.run_id.as_deref(), Some("manual__1"));
}

#[test]
fn arguments_of_dagsters_run_workers() {
    let (plain, compressed) = (vector("execute_run"), vector("execute_run_compressed"));
    let found = from_arguments(&["/venv/bin/python", "/venv/bin/dagster", "api", "execute_run", &plain]);
    assert_dagster(found.as_ref(), Source::DagsterArguments);
    let found = from_arguments(&["python", "-m", "dagster", "api", "resume_run", &plain]);
    assert_dagster(found.as_ref(), Source::DagsterArguments);
    let found = from_arguments(&["dagster", "api", "execute_run", "--compressed-input-json", &compressed]);
    assert_dagster(found.as_ref(), Source::DagsterArguments);
    let option = format!("--compressed-input-json={compressed}");
    assert_dagster(from_arguments(&["dagster", "api", "execute_run", &option]).as_ref(), Source::DagsterArguments);
    assert_eq!(from_arguments(&["cat", &plain]), None);
    assert_eq!(from_arguments(&["dagster", "api", "grpc", &plain]), None);
}

#[test]
fn arguments_of_dagsters_step_workers() {
    let step = vector("execute_step_compressed");
    let found = from_arguments(&["python", "dagster", "api", "execute_step", "--compressed-input-json", &step]);
    assert_dagster(found.as_ref(), Source::DagsterArguments);
}

#[test]
fn dagsters_arguments_in_the_environment() {
    for (name, value) in [
        ("DAGSTER_EXECUTE_RUN_ARGS", "execute_run"),
        ("DAGSTER_COMPRESSED_EXECUTE_RUN_ARGS", "execute_run_compressed"),
        ("DAGSTER_EXECUTE_STEP_ARGS", "execute_run"),
        ("DAGSTER_COMPRESSED_EXECUTE_STEP_ARGS", "execute_step_compressed"),
    ] {
        assert_dagster(from_environ(&[(name, &vector(value))]).as_ref(), Source::DagsterEnvironment);
    }
}

#[test]
fn the_context_of_dagster_pipes_itself_or_its_file() {
    let (inline, file) = (vector("pipes_inline"), vector("pipes_file"));
    assert_dagster(from_environ(&[("DAGSTER_PIPES_CONTEXT", &inline)]).as_ref(), Source::DagsterPipes);
    assert_dagster(from_arguments(&["job.py", "--dagster-pipes-context", &inline]).as_ref(), Source::DagsterPipes);
    let read = |path: &str| {
        assert_eq!(path, "/tmp/tmpabc/context");
        Some(format!(r#"{{"asset_keys": ["a"], "run_id": "{RUN}"}}"#).into_bytes())
    };
    let environ = environ(&[("DAGSTER_PIPES_CONTEXT", &file)]);
    assert_dagster(find(&RunSources::default(), &[], &environ, read).as_ref(), Source::DagsterPipes);
    assert_eq!(find(&RunSources::default(), &[], &environ, no_files), None);
}

#[test]
fn the_parent_run_of_openlineage() {
    let parent = format!("https://lineage.example/ns/dag.task/{RUN}");
    let context = from_environ(&[("OPENLINEAGE_PARENT_ID", &parent)]).unwrap();
    assert_eq!((context.trace.to_string().as_str(), context.parent), (TRACE, None));
    assert_eq!(context.source, Source::Openlineage);
    assert_eq!(from_environ(&[("OPENLINEAGE_PARENT_ID", RUN)]), None);
}

#[test]
fn the_name_of_a_run_workers_pod() {
    for name in [format!("dagster-run-{RUN}"), format!("dagster-run-{RUN}-2-x7k2p")] {
        assert_dagster(from_environ(&[("HOSTNAME", &name)]).as_ref(), Source::Hostname);
    }
    for name in [
        "dagster-run-",
        "dagster-step-1c9bfa5c7b7d4c5e9a582b3d6f0e8a11-x",
        "dagster-run-ü1c9bfa5c-7b7d-4c5e-9a58-2b3d6f0e8a",
    ] {
        assert_eq!(from_environ(&[("HOSTNAME", name)]), None);
    }
}

#[test]
fn the_run_of_dbt_cloud() {
    let context = from_environ(&[("DBT_CLOUD_RUN_ID", "70471")]).unwrap();
    assert_eq!((context.trace, context.source), (ids::trace_id("70471"), Source::DbtCloud));
}

#[test]
fn the_first_source_wins_and_the_order_is_a_setting() {
    let all = [
        ("DBT_CLOUD_RUN_ID", "1".to_owned()),
        ("HOSTNAME", "dagster-run-22222222-7b7d-4c5e-9a58-2b3d6f0e8a11".to_owned()),
        ("OPENLINEAGE_PARENT_ID", "a/b/33333333-7b7d-4c5e-9a58-2b3d6f0e8a11".to_owned()),
        ("DAGSTER_PIPES_CONTEXT", compress(r#"{"data":{"run_id":"44444444-7b7d-4c5e-9a58-2b3d6f0e8a11"}}"#)),
        ("DAGSTER_EXECUTE_RUN_ARGS", r#"{"pipeline_run_id":"55555555-7b7d-4c5e-9a58-2b3d6f0e8a11"}"#.to_owned()),
        ("DAGSTER_RUN_ID", "66666666-7b7d-4c5e-9a58-2b3d6f0e8a11".to_owned()),
        ("FLOE_RUN_ID", "77777777-7b7d-4c5e-9a58-2b3d6f0e8a11".to_owned()),
        ("TRACEPARENT", TRACEPARENT.to_owned()),
    ];
    let arguments: Vec<OsString> =
        ["dagster", "api", "execute_run", r#"{"pipeline_run_id":"5a5a5a5a-7b7d-4c5e-9a58-2b3d6f0e8a11"}"#]
            .map(OsString::from)
            .to_vec();
    let mut winners = Vec::new();
    for count in 1..=all.len() {
        let variables: Vec<_> = all[..count].iter().map(|(name, value)| (*name, value.as_str())).collect();
        let found = find(&RunSources::default(), &[], &environ(&variables), no_files).unwrap();
        winners.push(found.trace.to_string()[..8].to_owned());
        // Arguments come after the variables and before Dagster's environment.
        let found = find(&RunSources::default(), &arguments, &environ(&variables), no_files).unwrap();
        let source =
            if count < 6 { Source::DagsterArguments } else { [Source::Variable, Source::Traceparent][count / 8] };
        assert_eq!(found.source, source);
    }
    let one = ids::trace_id("1").to_string()[..8].to_owned();
    assert_eq!(winners, [&one, "22222222", "33333333", "44444444", "55555555", "66666666", "77777777", "0af76519"]);

    let variables: Vec<_> = all.iter().map(|(name, value)| (*name, value.as_str())).collect();
    let sources = RunSources { order: vec![Source::DbtCloud, Source::Traceparent], ..RunSources::default() };
    let found = find(&sources, &[], &environ(&variables), no_files).unwrap();
    assert_eq!((found.trace, found.source), (ids::trace_id("1"), Source::DbtCloud));
    assert_eq!(found.parent, None, "the parent of another trace is no parent");
}

#[test]
fn the_run_that_the_labels_of_the_pod_name() {
    let environ = environ(&[("DBT_CLOUD_RUN_ID", "1")]);
    let words = Words { arguments: &[], environ: &environ, pod_run: &|| Some(RUN.to_owned()), read: &no_files };
    assert_dagster(super::find(&RunSources::default(), &words).as_ref(), Source::PodLabel);
    let sources = RunSources { order: vec![Source::DbtCloud], ..RunSources::default() };
    assert_eq!(super::find(&sources, &words).unwrap().source, Source::DbtCloud);
}

#[test]
fn a_later_source_still_tells_what_the_first_one_does_not() {
    let context = from_environ(&[("TRACEPARENT", TRACEPARENT), ("DAGSTER_RUN_ID", RUN)]).unwrap();
    assert_eq!(context.trace.to_string(), "0af7651916cd43dd8448eb211c80319c");
    assert_eq!(context.parent.unwrap().to_string(), "b7ad6b7169203331");
    assert_eq!(context.run_id.as_deref(), Some(RUN));
    let context = from_environ(&[("FLOE_RUN_ID", RUN), ("HOSTNAME", &format!("dagster-run-{RUN}"))]).unwrap();
    assert_dagster(Some(&context), Source::Variable);
}

#[test]
fn a_small_text_that_inflates_to_megabytes_is_cut_off() {
    let mut encoder = flate2::write::ZlibEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(br#"{"pipeline_run_id":""#).unwrap();
    for _ in 0..12 {
        encoder.write_all(&vec![b'a'; 1 << 20]).unwrap();
    }
    let bomb = BASE64.encode(encoder.finish().unwrap());
    assert!(bomb.len() < 1 << 18);
    let began = Instant::now();
    assert_eq!(from_environ(&[("DAGSTER_COMPRESSED_EXECUTE_RUN_ARGS", &bomb)]), None);
    assert!(began.elapsed() < Duration::from_secs(2));
}

#[test]
fn deep_and_long_json_is_no_run() {
    let deep = format!(r#"{{"pipeline_run_id":{}"#, "[".repeat(100_000));
    assert_eq!(from_environ(&[("DAGSTER_EXECUTE_RUN_ARGS", &deep)]), None);
    let deep = format!(r#"{{"x":{}{}, "pipeline_run_id": "1"}}"#, "[".repeat(100_000), "]".repeat(100_000));
    let _ = from_environ(&[("DAGSTER_EXECUTE_RUN_ARGS", &deep)]);
    let long = format!(r#"{{"pipeline_run_id":"{}"}}"#, "r".repeat(MAX_RUN_ID + 1));
    assert_eq!(from_environ(&[("DAGSTER_EXECUTE_RUN_ARGS", &long)]), None);
    assert_eq!(from_environ(&[("FLOE_RUN_ID", "  ")]), None);
}

proptest! {
    #[test]
    fn nothing_panics(bytes in prop::collection::vec(any::<u8>(), 0..300), which in 0usize..12) {
        let names = [
            "TRACEPARENT", "TRACESTATE", "FLOE_RUN_ID", "DAGSTER_EXECUTE_RUN_ARGS", "DAGSTER_COMPRESSED_EXECUTE_RUN_ARGS",
            "DAGSTER_COMPRESSED_EXECUTE_STEP_ARGS", "DAGSTER_PIPES_CONTEXT", "OPENLINEAGE_PARENT_ID", "HOSTNAME",
            "DBT_CLOUD_RUN_ID", "DAGSTER_RUN_ID", "X",
        ];
        let mut environ = format!("{}=", names[which]).into_bytes();
        if which == 8 {
            environ.extend_from_slice(b"dagster-run-");
        }
        environ.extend_from_slice(&bytes);
        let argument = std::os::unix::ffi::OsStringExt::from_vec(bytes);
        let arguments = vec!["api".into(), "execute_step".into(), argument];
        find(&RunSources::default(), &arguments, &Environ::from_bytes(environ), no_files);
    }

    #[test]
    fn every_traceparent_that_is_written_is_read(trace in 1u128.., span in 1u64.., flags: u8) {
        let context = parse_traceparent(&format!("00-{trace:032x}-{span:016x}-{flags:02x}"), None).unwrap();
        prop_assert_eq!(context.trace_id(), TraceId::from(trace));
        prop_assert_eq!(context.span_id(), SpanId::from(span));
        prop_assert_eq!(context.is_sampled(), flags & 1 == 1);
    }

    #[test]
    fn what_is_compressed_is_found(run in "[!-~]{1,60}") {
        let json = serde_json::json!({"pipeline_run_id": run, "more": [1, {"a": null}]}).to_string();
        let found = from_environ(&[("DAGSTER_COMPRESSED_EXECUTE_STEP_ARGS", &compress(&json))]).unwrap();
        prop_assert_eq!(found.run_id.as_deref(), Some(run.as_str()));
    }
}
