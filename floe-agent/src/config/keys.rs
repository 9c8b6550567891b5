//! Every setting there is: its name in the file, its variables, its kind, its default. The file's schema, the reading of
//! the environment, `config show` and the tables of docs/configuration.md all come from this table.

/// What the values of a setting look like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Any text.
    Text,
    /// `true` or `false`.
    Bool,
    /// A whole number, from 1 on.
    Count,
    /// A number from 0 to 1.
    Ratio,
    /// `500ms`, `10s`, `5m`, `1h`; a plain number in `OTEL_*` variables is milliseconds.
    Duration,
    /// Bytes: `1048576`, `64MiB`.
    Size,
    /// One of these.
    Choice(&'static [&'static str]),
    /// Several texts.
    List,
    /// Names and texts.
    Map,
    /// Names and ratios.
    Ratios,
}

/// A setting.
#[derive(Clone, Copy, Debug)]
pub struct Key {
    /// Its place in the file, with dots.
    pub path: &'static str,
    /// OpenTelemetry's variables for it, the more specific ones first. `FLOE_` and the path is one more.
    pub otel: &'static [&'static str],
    /// Its kind.
    pub kind: Kind,
    /// Not to be shown.
    pub secret: bool,
    /// What holds when nothing is said; empty: nothing.
    pub default: &'static str,
    /// One line about it.
    pub help: &'static str,
}

impl Key {
    /// The agent's own variable: `FLOE_OTLP_TIMEOUT` for `otlp.timeout`.
    pub fn variable(&self) -> String {
        format!("FLOE_{}", self.path.replace('.', "_").to_uppercase())
    }
}

/// The setting with this path.
pub fn find(path: &str) -> Option<&'static Key> {
    KEYS.iter().find(|key| key.path == path)
}

const PROTOCOLS: Kind = Kind::Choice(&["grpc", "http/protobuf", "http/json"]);
const COMPRESSIONS: Kind = Kind::Choice(&["none", "gzip"]);

macro_rules! key {
    ($path:expr, $otel:expr, $kind:expr, $default:expr, $help:expr) => {
        Key { path: $path, otel: &$otel, kind: $kind, secret: false, default: $default, help: $help }
    };
    (secret $path:expr, $otel:expr, $kind:expr, $default:expr, $help:expr) => {
        Key { path: $path, otel: &$otel, kind: $kind, secret: true, default: $default, help: $help }
    };
}

/// The settings of one signal, or of all.
macro_rules! endpoint {
    ($path:literal, $variable:literal, $of:literal) => {
        [
            key!(
                concat!($path, ".endpoint"),
                [concat!($variable, "_ENDPOINT")],
                Kind::Text,
                "",
                concat!("URL", $of)
            ),
            key!(
                concat!($path, ".protocol"),
                [concat!($variable, "_PROTOCOL")],
                PROTOCOLS,
                "",
                concat!("how", $of)
            ),
            key!(secret
                concat!($path, ".headers"),
                [concat!($variable, "_HEADERS")],
                Kind::Map,
                "",
                concat!("headers", $of)
            ),
            key!(
                concat!($path, ".compression"),
                [concat!($variable, "_COMPRESSION")],
                COMPRESSIONS,
                "",
                concat!("compression", $of)
            ),
            key!(
                concat!($path, ".timeout"),
                [concat!($variable, "_TIMEOUT")],
                Kind::Duration,
                "",
                concat!("time for one request", $of)
            ),
            key!(
                concat!($path, ".certificate"),
                [concat!($variable, "_CERTIFICATE")],
                Kind::Text,
                "",
                concat!("PEM file of the trusted certificates, instead of the system's", $of)
            ),
            key!(
                concat!($path, ".client_certificate"),
                [concat!($variable, "_CLIENT_CERTIFICATE")],
                Kind::Text,
                "",
                concat!("PEM file of the client's certificate", $of)
            ),
            key!(
                concat!($path, ".client_key"),
                [concat!($variable, "_CLIENT_KEY")],
                Kind::Text,
                "",
                concat!("PEM file of its key", $of)
            ),
            key!(
                concat!($path, ".insecure"),
                [concat!($variable, "_INSECURE")],
                Kind::Bool,
                "",
                concat!("an endpoint without a scheme is meant with `http://`, else `https://`", $of)
            ),
        ]
    };
}

const GENERAL: &[Key] = &[
    key!(
        "profile",
        [],
        Kind::Choice(&["otlp", "jaeger", "datadog", "grafana-cloud", "console"]),
        "",
        "defaults for a backend"
    ),
    key!("environment", [], Kind::Text, "", "`deployment.environment.name` of processes that do not say theirs"),
    key!("output", [], Kind::List, "", "`console`, files that end in `.jsonl`"),
    key!("disabled", ["OTEL_SDK_DISABLED"], Kind::Bool, "false", "trace nothing: `exec` only runs the command"),
    key!("shutdown_timeout", [], Kind::Duration, "5s", "time to deliver what is left at the end"),
    key!("progress", [], Kind::Bool, "true", "a live line on the terminal"),
    key!("packs", [], Kind::List, "", "more packs: files"),
    key!("probes", [], Kind::List, "", "more probes"),
    key!("builtin_packs", [], Kind::Bool, "true", "use the packs in the binary"),
    key!("keep_inlining", [], Kind::Bool, "false", "CPython 3.11: leave inlining on"),
];

const AUTHENTICATION: &[Key] = &[
    key!(
        "otlp.traces_exporter",
        ["OTEL_TRACES_EXPORTER"],
        Kind::Text,
        "",
        "`otlp`, `console`, `none`: which spans go where"
    ),
    key!("otlp.logs_exporter", ["OTEL_LOGS_EXPORTER"], Kind::Text, "otlp", "`none`: log records are not sent"),
    key!(
        "otlp.metrics_exporter",
        ["OTEL_METRICS_EXPORTER"],
        Kind::Text,
        "otlp",
        "`none`: the agent's own metrics are not sent"
    ),
    key!("otlp.headers_from", [], Kind::Map, "", "headers whose values are in files, read at each request"),
    key!(secret "otlp.bearer_token", [], Kind::Text, "", "sent as `authorization: Bearer ...`"),
    key!("otlp.bearer_token_file", [], Kind::Text, "", "the same, from a file, read at each request"),
    key!(secret "otlp.api_key", [], Kind::Text, "", "sent in the header `otlp.api_key_header`"),
    key!("otlp.api_key_file", [], Kind::Text, "", "the same, from a file, read at each request"),
    key!("otlp.api_key_header", [], Kind::Text, "x-api-key", "its header"),
    key!("otlp.username", [], Kind::Text, "", "sent with the password as `authorization: Basic ...`"),
    key!(secret "otlp.password", [], Kind::Text, "", "its password"),
    key!("otlp.password_file", [], Kind::Text, "", "the same, from a file, read at the start"),
    key!(
        "otlp.metrics_interval",
        ["OTEL_METRIC_EXPORT_INTERVAL"],
        Kind::Duration,
        "60s",
        "how often the agent's own metrics are sent"
    ),
    key!(
        "otlp.metrics_export_timeout",
        ["OTEL_METRIC_EXPORT_TIMEOUT"],
        Kind::Duration,
        "30s",
        "longest time for one request of metrics, whatever the time-out says"
    ),
];

const BEHAVIOUR: &[Key] = &[
    key!("queue.spans", ["OTEL_BSP_MAX_QUEUE_SIZE"], Kind::Count, "200000", "spans that wait for one output"),
    key!("queue.memory", [], Kind::Size, "64MiB", "memory that they take; log records have a queue of the same size"),
    key!("queue.batch", ["OTEL_BSP_MAX_EXPORT_BATCH_SIZE"], Kind::Count, "512", "spans in one request"),
    key!(
        "queue.delay",
        ["OTEL_BSP_SCHEDULE_DELAY"],
        Kind::Duration,
        "1s",
        "how long a span waits for its request to fill"
    ),
    key!(
        "queue.export_timeout",
        ["OTEL_BSP_EXPORT_TIMEOUT"],
        Kind::Duration,
        "30s",
        "longest time for one request, whatever `otlp.timeout` says"
    ),
    key!("queue.logs", ["OTEL_BLRP_MAX_QUEUE_SIZE"], Kind::Count, "", "log records that wait; as many as spans"),
    key!(
        "queue.log_batch",
        ["OTEL_BLRP_MAX_EXPORT_BATCH_SIZE"],
        Kind::Count,
        "",
        "log records in one request; as spans"
    ),
    key!(
        "queue.log_delay",
        ["OTEL_BLRP_SCHEDULE_DELAY"],
        Kind::Duration,
        "",
        "how long a log record waits for its request to fill; as spans"
    ),
    key!(
        "queue.log_export_timeout",
        ["OTEL_BLRP_EXPORT_TIMEOUT"],
        Kind::Duration,
        "",
        "longest time for one request of log records; as of spans"
    ),
    key!(
        "sampling.sampler",
        ["OTEL_TRACES_SAMPLER"],
        Kind::Choice(&[
            "environment",
            "always_on",
            "always_off",
            "traceidratio",
            "parentbased_always_on",
            "parentbased_always_off",
            "parentbased_traceidratio",
        ]),
        "environment",
        "which traces are kept"
    ),
    key!(
        "sampling.ratio",
        ["OTEL_TRACES_SAMPLER_ARG"],
        Kind::Ratio,
        "",
        "part of the traces that is kept; alone it means `parentbased_traceidratio`"
    ),
    key!(
        "sampling.environments",
        [],
        Kind::Ratios,
        "",
        "the part per environment; dev 1.0, staging 0.5, prod 0.1, others 1.0"
    ),
    key!("sampling.keep_errors", [], Kind::Bool, "true", "a trace with an error is kept as a whole"),
    key!("sampling.hold_memory", [], Kind::Size, "64MiB", "memory for traces that wait to see whether an error comes"),
    key!("sampling.hold_time", [], Kind::Duration, "1h", "how long a trace waits without a new span"),
    key!(
        "resource.service_name",
        ["OTEL_SERVICE_NAME"],
        Kind::Text,
        "",
        "`service.name` of processes that do not say theirs"
    ),
    key!(
        "resource.attributes",
        ["OTEL_RESOURCE_ATTRIBUTES"],
        Kind::Map,
        "",
        "attributes of every process's resource; a process's own win"
    ),
    key!(
        "redaction.attributes",
        [],
        Kind::List,
        "",
        "names of attributes whose values are left out; `*` at the end: all that begin so"
    ),
    key!(
        "redaction.patterns",
        [],
        Kind::List,
        "",
        "regular expressions; what matches becomes `***`; with groups, only they do"
    ),
    key!(
        "correlation.sources",
        [],
        Kind::List,
        "",
        "what names the run of a process, first what wins; all, in the order of docs/correlation.md"
    ),
    key!(
        "correlation.run_id_variables",
        [],
        Kind::List,
        "",
        "more variables that are a run id; they win over the built-in ones"
    ),
    key!(
        "correlation.own_spans",
        [],
        Kind::Choice(&["leave_out", "double"]),
        "leave_out",
        "spans that a program exports itself with OpenTelemetry: `double` makes them all the same"
    ),
    key!(
        "correlation.programs",
        [],
        Kind::List,
        "dbt,dbtf,docker,podman",
        "programs that are not Python: their processes in a traced run are spans; names of files, `*` is any text"
    ),
    key!("correlation.hold", [], Kind::Duration, "30s", "how long finished spans wait for their run to be known"),
    key!(
        "logs.level",
        [],
        Kind::Choice(&["off", "trace", "debug", "info", "warn", "error", "fatal"]),
        "info",
        "the lowest level of log records that are taken"
    ),
    key!("logs.rate", [], Kind::Count, "100", "log records of one process in a second, on average"),
    key!("logs.burst", [], Kind::Count, "1000", "log records of one process at once"),
    key!("redaction.sql", [], Kind::Choice(&["mask", "raw"]), "mask", "literals in `db.query.text`"),
    key!(
        "redaction.max_length",
        ["OTEL_SPAN_ATTRIBUTE_VALUE_LENGTH_LIMIT", "OTEL_ATTRIBUTE_VALUE_LENGTH_LIMIT"],
        Kind::Count,
        "8192",
        "characters of a value, the rest is cut"
    ),
];

const ALL: [&[Key]; 7] = [
    GENERAL,
    &endpoint!("otlp", "OTEL_EXPORTER_OTLP", ""),
    &endpoint!("otlp.traces", "OTEL_EXPORTER_OTLP_TRACES", ", spans only"),
    &endpoint!("otlp.logs", "OTEL_EXPORTER_OTLP_LOGS", ", log records only"),
    &endpoint!("otlp.metrics", "OTEL_EXPORTER_OTLP_METRICS", ", metrics only"),
    AUTHENTICATION,
    BEHAVIOUR,
];

const COUNT: usize = {
    let mut count = 0;
    let mut group = 0;
    while group < ALL.len() {
        count += ALL[group].len();
        group += 1;
    }
    count
};

/// All settings.
pub static KEYS: [Key; COUNT] = {
    let mut keys = [GENERAL[0]; COUNT];
    let (mut group, mut at) = (0, 0);
    while group < ALL.len() {
        let mut index = 0;
        while index < ALL[group].len() {
            keys[at] = ALL[group][index];
            index += 1;
            at += 1;
        }
        group += 1;
    }
    keys
};
