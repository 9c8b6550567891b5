//! The OTLP endpoints that the settings describe.

use base64::Engine as _;

use super::{ConfigError, Origin, Setting, Settings, values};
use crate::export::{Batching, Endpoint, Headers, OtlpTarget, Protocol};

/// The endpoints of the signals; without spans there is nothing to send.
pub(super) fn target(settings: &Settings, traces: bool) -> Result<OtlpTarget, ConfigError> {
    let default = Batching::default();
    let batching = Batching {
        items: settings.count("queue.batch").unwrap_or(default.items),
        delay: settings.duration("queue.delay").unwrap_or(default.delay),
    };
    let wanted =
        |exporter: &str| settings.text(exporter).is_none_or(|name| name.split(',').any(|n| n.trim() == "otlp"));
    Ok(OtlpTarget {
        traces: if traces { endpoint(settings, "traces")? } else { None },
        logs: if wanted("otlp.logs_exporter") { endpoint(settings, "logs")? } else { None },
        metrics: if wanted("otlp.metrics_exporter") { endpoint(settings, "metrics")? } else { None },
        batching,
        log_batching: Batching {
            items: settings.count("queue.log_batch").unwrap_or(batching.items),
            delay: settings.duration("queue.log_delay").unwrap_or(batching.delay),
        },
        metrics_interval: settings.duration("otlp.metrics_interval").unwrap_or(std::time::Duration::from_mins(1)),
    })
}

fn endpoint(settings: &Settings, signal: &'static str) -> Result<Option<Endpoint>, ConfigError> {
    // The signal's own value, else that of all signals.
    let get =
        |name: &str| settings.one(&format!("otlp.{signal}.{name}")).or_else(|| settings.one(&format!("otlp.{name}")));
    let own = settings.one(&format!("otlp.{signal}.endpoint"));
    let is_own = own.is_some();
    let Some(Setting { value: url, origin }) = own.or_else(|| settings.one("otlp.endpoint")) else {
        return Ok(None);
    };
    let insecure = get("insecure").and_then(|setting| values::boolean(&setting.value));
    let mut url = match insecure {
        Some(insecure) if !url.contains("://") => format!("{}://{url}", if insecure { "http" } else { "https" }),
        _ => url,
    };
    let protocol = match get("protocol").as_ref().map(|setting| setting.value.as_str()) {
        Some("grpc") => Protocol::Grpc,
        Some("http/protobuf") => Protocol::HttpProtobuf,
        Some("http/json") => Protocol::HttpJson,
        // 4318 is the port that OTLP/HTTP has to itself.
        _ if url.trim_end_matches('/').ends_with(":4318") || url.contains(":4318/") => Protocol::HttpProtobuf,
        _ => Protocol::Grpc,
    };
    if protocol != Protocol::Grpc && !is_own && url.contains("://") {
        url = format!("{}/v1/{signal}", url.trim_end_matches('/'));
    }
    let mut endpoint = Endpoint::new(&url, &origin.to_string(), protocol)?;
    endpoint.gzip = get("compression").is_some_and(|setting| setting.value == "gzip");
    let timeout = get("timeout").and_then(|setting| values::duration(&setting.value, false));
    let longest = match signal {
        "logs" => settings.duration("queue.log_export_timeout"),
        "metrics" => settings.duration("otlp.metrics_export_timeout"),
        _ => None,
    };
    let longest = longest.or_else(|| settings.duration("queue.export_timeout")).unwrap_or(std::time::Duration::MAX);
    endpoint.timeout = timeout.unwrap_or(endpoint.timeout).min(longest).max(std::time::Duration::from_millis(1));
    endpoint.certificate = get("certificate").map(|setting| setting.value.into());
    endpoint.client = match (get("client_certificate"), get("client_key")) {
        (Some(certificate), Some(key)) => Some((certificate.value.into(), key.value.into())),
        (None, None) => None,
        (Some(one), None) | (None, Some(one)) => {
            return Err(ConfigError::Conflict {
                origin: one.origin,
                message: "a client certificate needs a key and a key needs a certificate; give both or none".to_owned(),
            });
        }
    };
    endpoint.headers = headers(settings, signal)?;
    Ok(Some(endpoint))
}

fn headers(settings: &Settings, signal: &str) -> Result<Headers, ConfigError> {
    let mut headers = Headers::default();
    let conflict = |origin: &Origin| {
        let origin = origin.clone();
        move |message| ConfigError::Conflict { origin, message }
    };
    let set = |headers: &mut Headers, name: &str, prefix: &str, text: &str, file: &str| -> Result<(), ConfigError> {
        if let Some(setting) = settings.one(text) {
            headers.set(name, &format!("{prefix}{}", setting.value)).map_err(conflict(&setting.origin))?;
        }
        if let Some(setting) = settings.one(file) {
            headers.set_from_file(name, prefix, setting.value.into()).map_err(conflict(&setting.origin))?;
        }
        Ok(())
    };
    if let Some(user) = settings.one("otlp.username") {
        let mut password = settings.text("otlp.password").unwrap_or_default();
        if let Some(file) = settings.one("otlp.password_file") {
            let text = std::fs::read_to_string(&file.value)
                .map_err(|error| format!("cannot read the password from {}: {error}", file.value))
                .map_err(conflict(&file.origin))?;
            text.trim().clone_into(&mut password);
        }
        let basic = base64::engine::general_purpose::STANDARD.encode(format!("{}:{password}", user.value));
        headers.set("authorization", &format!("Basic {basic}")).map_err(conflict(&user.origin))?;
    }
    set(&mut headers, "authorization", "Bearer ", "otlp.bearer_token", "otlp.bearer_token_file")?;
    let name = settings.text("otlp.api_key_header").unwrap_or_default();
    set(&mut headers, &name, "", "otlp.api_key", "otlp.api_key_file")?;
    // What is said of a signal replaces what is said of all.
    let mut given = settings.entries(&format!("otlp.{signal}.headers"));
    if given.is_empty() {
        given = settings.entries("otlp.headers");
    }
    for (name, Setting { value, origin }) in given {
        headers.set(&name, &value).map_err(conflict(&origin))?;
    }
    for (name, Setting { value, origin }) in settings.entries("otlp.headers_from") {
        headers.set_from_file(&name, "", value.into()).map_err(conflict(&origin))?;
    }
    Ok(headers)
}
