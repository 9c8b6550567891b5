//! Profiles: a few lines of configuration over OTLP, named as floe names its telemetry backends.

use super::{ConfigError, Origin, Settings};

/// Fills in what the profile says and nothing else has said.
pub(super) fn apply(settings: &mut Settings) -> Result<(), ConfigError> {
    let Some(profile) = settings.one("profile") else {
        return Ok(());
    };
    let origin = || Origin::Profile(profile.value.clone());
    let defaults: &[(&'static str, &str)] = match profile.value.as_str() {
        // Jaeger takes spans only.
        "jaeger" => &[
            ("otlp.endpoint", "http://localhost:4317"),
            ("otlp.protocol", "grpc"),
            ("otlp.logs_exporter", "none"),
            ("otlp.metrics_exporter", "none"),
        ],
        // The Datadog Agent's OTLP receiver; with an API key also Datadog's own intake.
        "datadog" => &[
            ("otlp.endpoint", "http://localhost:4317"),
            ("otlp.protocol", "grpc"),
            ("otlp.api_key_header", "dd-api-key"),
        ],
        "grafana-cloud" => &[("otlp.protocol", "http/protobuf"), ("otlp.compression", "gzip")],
        "otlp" => &[("otlp.endpoint", "http://localhost:4317")],
        _ => &[],
    };
    if profile.value == "grafana-cloud" && settings.one("otlp.endpoint").is_none() {
        return Err(ConfigError::Conflict {
            origin: profile.origin,
            message: "the profile grafana-cloud needs `otlp.endpoint`, such as \
                      `https://otlp-gateway-prod-eu-west-0.grafana.net/otlp`, and `otlp.username` (the instance) with \
                      `otlp.password_file` (a token)"
                .to_owned(),
        });
    }
    for (path, value) in defaults {
        settings.fill_in(path, value, origin())?;
    }
    if profile.value == "console"
        && settings.list("output").is_empty()
        && let Some(key) = super::keys::find("output")
    {
        settings.set_list(key, vec!["console".to_owned()], origin());
    }
    Ok(())
}
