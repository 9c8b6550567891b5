use std::time::Duration;

use super::*;
use crate::export::Protocol;

/// Loads a file (if there is text for one), with these variables and options.
fn load(file: &str, env: &[(&str, &str)], options: Vec<Given>) -> Result<Settings, String> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("c.yaml");
    std::fs::write(&path, file).unwrap();
    let sources = Sources { file: (!file.is_empty()).then_some(path), options, ..Sources::default() };
    let env = |name: &str| env.iter().find(|(known, _)| *known == name).map(|(_, value)| (*value).to_owned());
    let error = |error: ConfigError| error.to_string().replace(&format!("{}/", folder.path().display()), "");
    let settings = Settings::load(&sources, &env).map_err(error)?;
    Config::new(&settings).map_err(error)?;
    Ok(settings)
}

fn config(file: &str, env: &[(&str, &str)]) -> Config {
    Config::new(&load(file, env, Vec::new()).unwrap()).unwrap()
}

fn target(config: &Config) -> &OtlpTarget {
    config
        .outputs
        .iter()
        .find_map(|output| if let Output::Otlp(target) = output { Some(&**target) } else { None })
        .unwrap()
}

fn traces(config: &Config) -> &crate::export::Endpoint {
    target(config).traces.as_ref().unwrap()
}

fn option(path: &'static str, value: &str) -> Vec<Given> {
    vec![Given { path, option: "--x", values: vec![value.to_owned()] }]
}

#[test]
fn the_environment_wins_over_the_file_and_the_command_line_over_both() {
    let file = "otlp:\n  endpoint: http://file:1\n  timeout: 3s\nshutdown_timeout: 7s\n";
    let env = [("OTEL_EXPORTER_OTLP_ENDPOINT", "http://env:1"), ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "http://own:1")];
    let settings = load(file, &env, option("otlp.endpoint", "http://option:1")).unwrap();
    let config = Config::new(&settings).unwrap();
    assert_eq!(traces(&config).url, "http://option:1");
    let origin = |name: &str| settings.effective().into_iter().find(|row| row.0 == name).unwrap().2.to_string();
    assert_eq!(origin("otlp.endpoint"), "--x");
    assert!(origin("otlp.timeout").ends_with("c.yaml:3"), "{}", origin("otlp.timeout"));
    assert_eq!(origin("queue.batch"), "default");
    let config = self::config(file, &env);
    assert_eq!((&*traces(&config).url, &*target(&config).logs.as_ref().unwrap().url), ("http://own:1", "http://env:1"));
    assert_eq!(traces(&config).timeout, Duration::from_secs(3));
    assert_eq!(config.shutdown_timeout, Duration::from_secs(7));
    let both = [("OTEL_BSP_SCHEDULE_DELAY", "200"), ("FLOE_QUEUE_DELAY", "3s")];
    let config = self::config(file, &both);
    assert_eq!(target(&config).batching.delay, Duration::from_secs(3), "the agent's own variable is the more specific");
}

#[test]
fn every_standard_variable_has_its_effect() {
    let env = [
        ("OTEL_EXPORTER_OTLP_ENDPOINT", "https://collector:4318"),
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "http/json"),
        ("OTEL_EXPORTER_OTLP_HEADERS", "api-key=a%20b,x=1"),
        ("OTEL_EXPORTER_OTLP_COMPRESSION", "gzip"),
        ("OTEL_EXPORTER_OTLP_TIMEOUT", "2500"),
        ("OTEL_EXPORTER_OTLP_CERTIFICATE", "/ca.pem"),
        ("OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE", "/c.pem"),
        ("OTEL_EXPORTER_OTLP_CLIENT_KEY", "/k.pem"),
        ("OTEL_EXPORTER_OTLP_LOGS_ENDPOINT", "http://logs:9/custom"),
        ("OTEL_EXPORTER_OTLP_LOGS_HEADERS", "y=2"),
        ("OTEL_EXPORTER_OTLP_LOGS_COMPRESSION", "none"),
        ("OTEL_METRICS_EXPORTER", "none"),
        ("OTEL_SERVICE_NAME", "shop"),
        ("OTEL_RESOURCE_ATTRIBUTES", "team=data,deployment.environment.name=staging"),
        ("OTEL_TRACES_SAMPLER", "parentbased_traceidratio"),
        ("OTEL_TRACES_SAMPLER_ARG", "0.25"),
        ("OTEL_BSP_MAX_QUEUE_SIZE", "4096"),
        ("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "128"),
        ("OTEL_BSP_SCHEDULE_DELAY", "250"),
        ("OTEL_BSP_EXPORT_TIMEOUT", "2000"),
        ("OTEL_BLRP_MAX_QUEUE_SIZE", "2048"),
        ("OTEL_BLRP_MAX_EXPORT_BATCH_SIZE", "64"),
        ("OTEL_BLRP_SCHEDULE_DELAY", "750"),
        ("OTEL_BLRP_EXPORT_TIMEOUT", "1000"),
        ("OTEL_SDK_DISABLED", "TRUE"),
        ("OTEL_ATTRIBUTE_VALUE_LENGTH_LIMIT", "99"),
    ];
    let config = config("", &env);
    let endpoint = traces(&config);
    assert_eq!((&*endpoint.url, endpoint.protocol), ("https://collector:4318/v1/traces", Protocol::HttpJson));
    assert_eq!(format!("{:?}", endpoint.headers), r#"{"api-key", "x"}"#);
    assert!(endpoint.gzip);
    assert_eq!(endpoint.timeout, Duration::from_secs(2), "the shorter of the two");
    assert_eq!(endpoint.certificate.as_deref(), Some(Path::new("/ca.pem")));
    assert_eq!(endpoint.client, Some(("/c.pem".into(), "/k.pem".into())));
    let target = target(&config);
    let logs = target.logs.as_ref().unwrap();
    assert_eq!((&*logs.url, logs.gzip), ("http://logs:9/custom", false), "an own endpoint is used as it is");
    assert_eq!(format!("{:?}", logs.headers), r#"{"y"}"#);
    assert!(target.metrics.is_none());
    assert_eq!((target.batching.items, target.batching.delay), (128, Duration::from_millis(250)));
    assert_eq!((target.log_batching.items, target.log_batching.delay), (64, Duration::from_millis(750)));
    assert_eq!(logs.timeout, Duration::from_secs(1), "the shortest that holds for log records");
    assert_eq!((config.queue.spans, config.queue.logs), (4096, 2048));
    assert_eq!((config.sampling.fixed, config.sampling.parent_based), (Some(0.25), true));
    assert_eq!(config.resource.service_name.as_deref(), Some("shop"));
    assert_eq!(config.resource.environment.as_deref(), Some("staging"));
    assert!(config.resource.attributes.contains(&("team".into(), "data".into())));
    assert_eq!((config.disabled, config.redaction.max_length), (true, 99));
}

#[test]
fn a_standard_variable_that_cannot_be_used_is_ignored_with_a_warning_and_an_own_one_is_an_error() {
    let settings =
        load("", &[("OTEL_EXPORTER_OTLP_TIMEOUT", "soon"), ("OTEL_TRACES_SAMPLER", "jaeger_remote")], Vec::new());
    let warnings = settings.unwrap().warnings;
    assert_eq!(warnings.len(), 2);
    assert!(
        warnings[0].starts_with("OTEL_EXPORTER_OTLP_TIMEOUT: `otlp.timeout` cannot be `soon`: expected milliseconds")
    );
    let error = load("", &[("FLOE_OTLP_TIMEOUT", "soon")], Vec::new()).unwrap_err();
    assert_eq!(
        error,
        "FLOE_OTLP_TIMEOUT: `otlp.timeout` cannot be `soon`: expected a duration such as `500ms`, `10s`, `5m` or `1h`"
    );
}

#[test]
fn mistakes_in_the_file_are_shown_with_their_line() {
    for (file, error) in [
        ("sampling:\n  ratio: 2\n", "c.yaml:2: `sampling.ratio` cannot be `2`: expected a number from 0 to 1"),
        (
            "sampling:\n  environments:\n    prod: x\n",
            "c.yaml:3: `sampling.environments.prod` cannot be `x`: expected a number from 0 to 1",
        ),
        (
            "\nprofile: splunk\n",
            "c.yaml:2: `profile` cannot be `splunk`: expected one of otlp, jaeger, datadog, grafana-cloud, console",
        ),
        (
            "otlp: {endpoint: 'ftp://x'}\n",
            "OTLP endpoint `ftp://x` (c.yaml:1): expected a URL such as `http://x`, not `ftp`",
        ),
        (
            "otlp:\n  endpoint: http://x\n  client_key: k\n",
            "c.yaml:3: a client certificate needs a key and a key needs a certificate; give both or none",
        ),
        ("output: x.txt\n", "--output x.txt: expected `console` or a path that ends in `.jsonl`"),
        ("queue: {spans: 0}", "c.yaml:1: `queue.spans` cannot be `0`: expected a whole number from 1 on"),
    ] {
        assert_eq!(load(file, &[], Vec::new()).unwrap_err(), error);
    }
    let error = load("redaction:\n  patterns: ['(']\n", &[], Vec::new()).unwrap_err();
    assert!(
        error.starts_with("c.yaml:2: `redaction.patterns` cannot be `(`: expected a regular expression"),
        "{error}"
    );
    let error = load("otlp:\n  endpoint: http://x\n  headers: {a b: c}\n", &[], Vec::new()).unwrap_err();
    assert_eq!(error, "c.yaml:3: `a b` cannot be the name of a header");
}

#[test]
fn profiles_are_defaults_over_otlp() {
    let jaeger = config("profile: jaeger\n", &[]);
    assert_eq!((&*traces(&jaeger).url, traces(&jaeger).protocol), ("http://localhost:4317", Protocol::Grpc));
    assert!(target(&jaeger).logs.is_none(), "Jaeger takes spans only");
    let elsewhere = config("profile: jaeger\notlp: {endpoint: 'http://jaeger-collector:4317'}\n", &[]);
    assert_eq!(traces(&elsewhere).url, "http://jaeger-collector:4317");
    let grafana = "profile: grafana-cloud\notlp:\n  endpoint: https://g.net/otlp\n  username: 12\n  password: p\n";
    let grafana = config(grafana, &[]);
    assert_eq!(traces(&grafana).url, "https://g.net/otlp/v1/traces");
    assert_eq!(format!("{:?}", traces(&grafana).headers), r#"{"authorization"}"#);
    assert!(load("profile: grafana-cloud", &[], Vec::new()).unwrap_err().contains("needs `otlp.endpoint`"));
    let datadog = config("profile: datadog\notlp: {api_key: k}\n", &[]);
    assert_eq!(format!("{:?}", traces(&datadog).headers), r#"{"dd-api-key"}"#);
    for console in
        [config("profile: console\n", &[]), config("", &[]), config("", &[("OTEL_TRACES_EXPORTER", "console")])]
    {
        assert!(matches!(console.outputs[..], [Output::Console(_)]), "{:?}", console.outputs);
    }
    assert!(config("", &[("OTEL_TRACES_EXPORTER", "none")]).outputs.is_empty());
}

#[test]
fn the_protocol_of_port_4318_is_http_unless_another_is_named() {
    let of = |url| config("", &[("OTEL_EXPORTER_OTLP_ENDPOINT", url)]);
    assert_eq!(traces(&of("http://localhost:4318")).protocol, Protocol::HttpProtobuf);
    assert_eq!(traces(&of("http://localhost:4317")).protocol, Protocol::Grpc);
    let named = [("OTEL_EXPORTER_OTLP_ENDPOINT", "http://x:4318"), ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")];
    assert_eq!(traces(&config("", &named)).protocol, Protocol::Grpc);
    let insecure = [("OTEL_EXPORTER_OTLP_ENDPOINT", "x:4317"), ("OTEL_EXPORTER_OTLP_INSECURE", "true")];
    assert_eq!(traces(&config("", &insecure)).url, "http://x:4317");
}

#[test]
fn samplers_are_what_their_names_say() {
    let of = |name, argument: &str| {
        config("", &[("OTEL_TRACES_SAMPLER", name), ("OTEL_TRACES_SAMPLER_ARG", argument)]).sampling
    };
    for (name, argument, fixed, parent_based) in [
        ("always_on", "", Some(1.0), false),
        ("always_off", "", Some(0.0), false),
        ("traceidratio", "0.5", Some(0.5), false),
        ("parentbased_always_on", "", Some(1.0), true),
        ("parentbased_always_off", "", Some(0.0), true),
        ("", "", None, true),
        ("", "0.3", Some(0.3), true),
    ] {
        let rules = of(name, argument);
        assert_eq!((rules.fixed, rules.parent_based), (fixed, parent_based), "{name}");
        assert_eq!(rules.keep_errors, !name.ends_with("always_off"), "{name}");
    }
    let rules = config("sampling:\n  environments: {QA: 0.2}\n  keep_errors: false\n", &[]).sampling;
    assert_eq!((rules.environments["qa"], rules.environments["prod"], rules.keep_errors), (0.2, 0.1, false));
}

#[test]
fn secrets_are_not_shown() {
    let file = "otlp:\n  endpoint: http://u:pw1@x\n  bearer_token: pw2\n  headers: {a: pw3}\n  api_key: pw4\n";
    let settings = load(file, &[("OTEL_EXPORTER_OTLP_TRACES_HEADERS", "b=pw5")], Vec::new()).unwrap();
    let shown = format!("{:?}", settings.effective());
    assert!(shown.contains("otlp.headers.a") && !shown.contains("pw"), "{shown}");
    let error = load("", &[("FLOE_OTLP_HEADERS", "pw6")], Vec::new()).unwrap_err();
    assert!(!error.contains("pw6"), "{error}");
}

#[test]
fn single_settings_can_be_set_on_the_command_line() {
    let set = |set: &[&str]| {
        let sources = Sources { set: set.iter().map(|text| (*text).to_owned()).collect(), ..Sources::default() };
        Settings::load(&sources, &|_| None).map_err(|error| error.to_string())
    };
    let settings = set(&["otlp.endpoint=http://x:1", "resource.attributes.team=a", "output=console,a.jsonl"]).unwrap();
    let config = Config::new(&settings).unwrap();
    assert_eq!(config.outputs.len(), 3);
    assert_eq!(config.resource.attributes, [("team".to_owned(), "a".to_owned())]);
    assert!(set(&["x=1"]).unwrap_err().starts_with("--set: there is no setting `x`"));
    assert_eq!(set(&["x"]).unwrap_err(), "--set: `x`: expected `SETTING=VALUE`");
}

fn manifest(text: &str) -> Result<Config, String> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("manifest.yaml");
    std::fs::write(&path, text).unwrap();
    let sources = Sources { manifest: Some(path), ..Sources::default() };
    let settings = Settings::load(&sources, &|_| None).map_err(|error| error.to_string())?;
    Config::new(&settings).map_err(|error| error.to_string())
}

#[test]
fn a_floe_manifest_is_read_as_it_is() {
    let text = "
apiVersion: floe.dev/v1
kind: Manifest
metadata: {name: acme, version: 1.0.0}
plugins:
  compute: {type: duckdb}
  telemetry_backend: {type: jaeger}
observability:
  tracing: {enabled: true, exporter: otlp, endpoint: 'https://otlp.acme.com:4317'}
  logging: {level: INFO}
";
    let config = manifest(text).unwrap();
    assert_eq!((&*traces(&config).url, traces(&config).protocol), ("https://otlp.acme.com:4317", Protocol::Grpc));
    assert!(target(&config).logs.is_none());
    assert!(manifest(&text.replace("enabled: true", "enabled: false")).unwrap().outputs.is_empty());
    assert!(manifest("a: 1").unwrap_err().contains("expected a floe manifest"));
    let error = manifest(&text.replace("jaeger", "splunk")).unwrap_err();
    assert!(error.contains("manifest.yaml:7: `profile` cannot be `splunk`"), "{error}");
}

#[test]
fn floes_whole_telemetry_configuration_is_understood() {
    let config = manifest(
        "
observability:
  telemetry:
    enabled: true
    otlp_endpoint: http://collector:4318
    otlp_protocol: http
    sampling: {dev: 1.0, staging: 0.4, prod: 0.05}
    resource_attributes:
      service_name: customer-360
      service_version: 2.1.0
      deployment_environment: prod
      floe_namespace: analytics
      floe_product_name: customer-360
      floe_product_version: 2.1.0
      floe_mode: prod
    authentication: {auth_type: api_key, api_key: k, header_name: DD-API-KEY}
    batch_processor: {max_queue_size: 2048, max_export_batch_size: 256, schedule_delay_millis: 5000, export_timeout_millis: 9000}
",
    )
    .unwrap();
    assert_eq!(
        (&*traces(&config).url, traces(&config).protocol),
        ("http://collector:4318/v1/traces", Protocol::HttpProtobuf)
    );
    assert_eq!(format!("{:?}", traces(&config).headers), r#"{"dd-api-key"}"#);
    assert_eq!(traces(&config).timeout, Duration::from_secs(9));
    assert_eq!((config.queue.spans, target(&config).batching.items), (2048, 256));
    assert_eq!(target(&config).batching.delay, Duration::from_secs(5));
    assert_eq!((config.sampling.environments["prod"], config.sampling.environments["staging"]), (0.05, 0.4));
    assert_eq!(config.resource.service_name.as_deref(), Some("customer-360"));
    assert_eq!(config.resource.environment.as_deref(), Some("prod"));
    assert!(config.resource.attributes.contains(&("floe.namespace".into(), "analytics".into())));
}

#[test]
fn names_and_variables_of_settings_are_unique() {
    let mut names: Vec<String> = KEYS.iter().map(|key| key.path.to_owned()).collect();
    names.extend(KEYS.iter().flat_map(|key| key.otel.iter().map(|name| (*name).to_owned())));
    names.extend(KEYS.iter().map(Key::variable));
    let all = names.len();
    names.sort();
    names.dedup();
    assert_eq!(names.len(), all);
    for key in &KEYS {
        if !key.default.is_empty() && key.kind != Kind::Text {
            assert_eq!(values::check(key.kind, key.default, false), Ok(()), "{}", key.path);
        }
    }
}

#[test]
fn the_documentation_lists_every_setting_and_variable() {
    let docs = include_str!("../../../docs/configuration.md");
    for key in &KEYS {
        let per_signal =
            ["traces", "logs", "metrics"].iter().any(|signal| key.path.starts_with(&format!("otlp.{signal}.")));
        if !per_signal {
            assert!(docs.contains(&format!("`{}`", key.path)), "{}", key.path);
            for name in key.otel {
                assert!(docs.contains(&format!("`{name}`")), "{name}");
            }
        }
    }
}
