//! The telemetry section of a floe platform manifest, or of the artifacts that floe compiles from it, as it is.
//!
//! A manifest has `observability.tracing` and `plugins.telemetry_backend`; compiled artifacts have
//! `observability.telemetry`, floe's whole `TelemetryConfig`.

use std::path::Path;

use serde_saphyr::Spanned;

use super::file::{self, Node};
use super::keys;
use super::{ConfigError, Origin, Settings};

/// From a place in the manifest to a setting.
const TABLE: &[(&str, &str)] = &[
    ("observability.tracing.endpoint", "otlp.endpoint"),
    ("observability.tracing.exporter", "otlp.traces_exporter"),
    ("plugins.telemetry_backend.type", "profile"),
    ("plugins.telemetry_backend.config.endpoint", "otlp.endpoint"),
    ("plugins.telemetry_backend.config.otlp_endpoint", "otlp.endpoint"),
    ("plugins.telemetry_backend.config.protocol", "otlp.protocol"),
    ("plugins.telemetry_backend.config.insecure", "otlp.insecure"),
    ("plugins.telemetry_backend.config.headers", "otlp.headers"),
    ("otlp_endpoint", "otlp.endpoint"),
    ("otlp_protocol", "otlp.protocol"),
    ("sampling", "sampling.environments"),
    ("resource_attributes.service_name", "resource.service_name"),
    ("resource_attributes.deployment_environment", "environment"),
    ("resource_attributes.service_version", "resource.attributes.service.version"),
    ("resource_attributes.floe_namespace", "resource.attributes.floe.namespace"),
    ("resource_attributes.floe_product_name", "resource.attributes.floe.product.name"),
    ("resource_attributes.floe_product_version", "resource.attributes.floe.product.version"),
    ("resource_attributes.floe_mode", "resource.attributes.floe.mode"),
    ("authentication.api_key", "otlp.api_key"),
    ("authentication.bearer_token", "otlp.bearer_token"),
    ("batch_processor.max_queue_size", "queue.spans"),
    ("batch_processor.max_export_batch_size", "queue.batch"),
    ("batch_processor.schedule_delay_millis", "queue.delay"),
    ("batch_processor.export_timeout_millis", "queue.export_timeout"),
];

pub(super) fn apply(path: &Path, settings: &mut Settings) -> Result<(), ConfigError> {
    let (root, _) = file::read(path)?;
    let found = ["observability", "telemetry", "plugins", "otlp_endpoint"].iter().any(|name| at(&root, name).is_some());
    if !found {
        return Err(ConfigError::Yaml {
            origin: Origin::File { path: path.to_owned(), line: 1 },
            message: "expected a floe manifest: it has neither `observability` nor `plugins`".to_owned(),
        });
    }
    // `TelemetryConfig` by itself, or where floe puts it.
    let places = ["", "telemetry.", "observability.telemetry."];
    for (from, to) in TABLE {
        let absolute = from.starts_with("observability.") || from.starts_with("plugins.");
        for place in if absolute { &places[..1] } else { &places[..] } {
            if let Some(node) = at(&root, &format!("{place}{from}")) {
                set(path, settings, from, to, node)?;
            }
        }
    }
    for place in places {
        let origin = |node: &Spanned<Node>| Origin::File { path: path.to_owned(), line: node.referenced.line() };
        let enabled = at(&root, &format!("{place}enabled"));
        let tracing = at(&root, "observability.tracing.enabled");
        for node in [enabled, tracing].into_iter().flatten() {
            if text(node) == Some("false") {
                give(settings, "otlp.traces_exporter", "none", origin(node))?;
            }
        }
        let kind = at(&root, &format!("{place}authentication.auth_type")).and_then(text);
        let header = at(&root, &format!("{place}authentication.header_name"));
        if kind == Some("api_key") {
            let name = header.and_then(text).unwrap_or("Authorization");
            let origin = header.map_or_else(|| Origin::File { path: path.to_owned(), line: 1 }, origin);
            give(settings, "otlp.api_key_header", name, origin)?;
        }
    }
    Ok(())
}

fn set(path: &Path, settings: &mut Settings, from: &str, to: &str, node: &Spanned<Node>) -> Result<(), ConfigError> {
    let origin = Origin::File { path: path.to_owned(), line: node.referenced.line() };
    if let Node::Map(entries) = &node.value {
        if let Some(key) = keys::find(to) {
            for (name, value) in entries {
                if let Some(value) = text(value) {
                    settings.set_entry(key, name.value.clone(), value.to_owned(), origin.clone())?;
                }
            }
        }
        return Ok(());
    }
    let Some(value) = text(node) else {
        return Ok(());
    };
    if let Some(name) = to.strip_prefix("resource.attributes.") {
        if let Some(key) = keys::find("resource.attributes") {
            settings.set_entry(key, name.to_owned(), value.to_owned(), origin)?;
        }
        return Ok(());
    }
    let value = match (to, value) {
        // floe says `http` and means protobuf.
        ("otlp.protocol", "http") => "http/protobuf".to_owned(),
        ("otlp.traces_exporter", "otlp") => return Ok(()),
        _ if from.ends_with("_millis") => format!("{value}ms"),
        _ => value.to_owned(),
    };
    give(settings, to, &value, origin)
}

fn give(settings: &mut Settings, path: &str, value: &str, origin: Origin) -> Result<(), ConfigError> {
    match keys::find(path) {
        Some(key) => settings.set(key, value, origin, false),
        None => Ok(()),
    }
}

fn text(node: &Spanned<Node>) -> Option<&str> {
    match &node.value {
        Node::Scalar(text) => Some(text),
        _ => None,
    }
}

fn at<'a>(root: &'a Node, path: &str) -> Option<&'a Spanned<Node>> {
    let mut here = root;
    let mut found = None;
    for name in path.split('.') {
        let Node::Map(entries) = here else {
            return None;
        };
        let (_, node) = entries.iter().find(|(known, _)| known.value == name)?;
        found = Some(node);
        here = &node.value;
    }
    found.filter(|node| !matches!(node.value, Node::Nothing))
}
