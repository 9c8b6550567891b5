//! Options of the configuration, and `floe-agent config`.

use std::path::PathBuf;

use anyhow::Result;
use clap::{Args, Subcommand};

use super::TraceOptions;
use crate::config::{self, Config, Given, Settings, Sources};

/// The variable with the path of the file.
const PATH: &str = "FLOE_CONFIG_PATH";

/// Where the configuration is.
#[derive(Args, Debug, Default)]
pub(super) struct ConfigOptions {
    /// Read settings from this file; without it, `FLOE_CONFIG_PATH` counts. Environment variables win over the file, and
    /// the command line over both.
    #[arg(long, value_name = "FILE.yaml")]
    config: Option<PathBuf>,
    /// Take endpoint, sampling and authentication from the telemetry section of this floe platform manifest.
    #[arg(long, value_name = "manifest.yaml")]
    from_floe_manifest: Option<PathBuf>,
    /// Defaults for a backend: `jaeger`, `datadog`, `grafana-cloud`, `console` or `otlp`.
    #[arg(long, value_name = "NAME")]
    profile: Option<String>,
    /// Set any setting of the configuration file, for example `otlp.compression=gzip`. May be given several times.
    #[arg(long, value_name = "SETTING=VALUE")]
    set: Vec<String>,
}

/// The configuration.
#[derive(Debug, Subcommand)]
pub(super) enum ConfigCommand {
    /// Check a configuration file (default: FLOE_CONFIG_PATH); nothing is started or sent.
    Check {
        /// The file.
        #[arg(value_name = "FILE.yaml")]
        file: Option<PathBuf>,
    },
    /// Print the effective settings and where each one comes from; secrets are hidden.
    Show {
        #[command(flatten)]
        options: Box<ConfigOptions>,
    },
    /// Print the JSON schema of the configuration file.
    Schema,
}

fn environment(name: &str) -> Option<String> {
    std::env::var(name).ok()
}

fn load(options: &ConfigOptions, mut given: Vec<Given>) -> Result<Settings> {
    let file = options.config.clone().or_else(|| std::env::var_os(PATH).filter(|p| !p.is_empty()).map(PathBuf::from));
    given.extend(options.profile.iter().map(|profile| Given {
        path: "profile",
        option: "--profile",
        values: vec![profile.clone()],
    }));
    let sources =
        Sources { file, manifest: options.from_floe_manifest.clone(), options: given, set: options.set.clone() };
    Ok(Settings::load(&sources, &environment)?)
}

/// What `exec` and `attach` are to do.
pub(super) fn of_trace(options: &TraceOptions) -> Result<Config> {
    let TraceOptions { output, otlp, probe, pack, no_packs, keep_inlining, stats: _, config } = options;
    let mut given = vec![
        Given { path: "output", option: "--output", values: output.clone() },
        Given { path: "otlp.endpoint", option: "--otlp", values: otlp.iter().cloned().collect() },
    ];
    if *no_packs {
        given.push(Given { path: "builtin_packs", option: "--no-packs", values: vec!["false".to_owned()] });
    }
    if *keep_inlining {
        given.push(Given { path: "keep_inlining", option: "--keep-inlining", values: vec!["true".to_owned()] });
    }
    let settings = load(config, given)?;
    for warning in &settings.warnings {
        tracing::warn!("{warning}");
    }
    let mut config = Config::new(&settings)?;
    // These add to what the file names.
    config.probes.extend_from_slice(probe);
    config.packs.extend_from_slice(pack);
    Ok(config)
}

/// Runs `floe-agent config`.
pub(super) fn run(command: ConfigCommand) -> Result<u8> {
    match command {
        ConfigCommand::Check { file } => {
            let settings = load(&ConfigOptions { config: file, ..ConfigOptions::default() }, Vec::new())?;
            let config = Config::new(&settings)?;
            for warning in &settings.warnings {
                eprintln!("floe-agent: {warning}");
            }
            let outputs: Vec<String> = config.outputs.iter().map(ToString::to_string).collect();
            println!("ok: {} settings, output to {}", settings.given(), outputs.join(", "));
        }
        ConfigCommand::Show { options } => {
            let settings = load(&options, Vec::new())?;
            Config::new(&settings)?;
            let all = settings.effective();
            let width =
                |text: fn(&(String, String, config::Origin)) -> usize| all.iter().map(text).max().unwrap_or_default();
            let (names, values) = (width(|row| row.0.len()), width(|row| row.1.chars().count()).min(60));
            for (name, value, origin) in &all {
                println!("{name:names$}  {value:values$}  {origin}");
            }
        }
        ConfigCommand::Schema => println!("{:#}", config::schema()),
    }
    Ok(0)
}
