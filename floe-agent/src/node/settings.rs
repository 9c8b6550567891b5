//! The configuration of the node agent.

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
};

use serde::Deserialize;
use thiserror::Error;

use super::{
    kubernetes::KubernetesSettings,
    rules::{Discovery, RuleError, Rules},
};

/// Where metrics are served unless the configuration says otherwise: to this machine only.
pub const DEFAULT_LISTEN: &str = "127.0.0.1:9478";
/// Largest configuration file that is read.
const MAX_BYTES: u64 = 1 << 20;

/// All of it.
#[derive(Clone, Debug, Default, Deserialize, PartialEq)]
#[serde(default, deny_unknown_fields)]
pub struct NodeSettings {
    /// Which processes are traced.
    pub discovery: Discovery,
    /// What the agent tells of itself.
    pub internal_metrics: Metrics,
    /// How it is stopped.
    pub kill_switch: KillSwitch,
    /// What it may cost.
    pub budget: Budget,
    /// Whether and how the pods of the node are known.
    pub kubernetes: KubernetesSettings,
}

/// `internal_metrics`
#[derive(Clone, Debug, Deserialize, PartialEq)]
#[serde(default, deny_unknown_fields)]
pub struct Metrics {
    /// Address and port of `/metrics`, `/healthz` and `/readyz`; `off`: none.
    pub listen: Listen,
}

/// Where to listen.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq)]
#[serde(try_from = "String")]
pub enum Listen {
    /// Nowhere.
    Off,
    /// Here.
    At(SocketAddr),
}

impl TryFrom<String> for Listen {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl std::str::FromStr for Listen {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "off" {
            return Ok(Self::Off);
        }
        text.parse().map(Self::At).map_err(|_| {
            format!(
                "`{text}` is not an address to listen at: write an IP address and a port, as {DEFAULT_LISTEN}, or `off`"
            )
        })
    }
}

impl Default for Metrics {
    fn default() -> Self {
        Self { listen: DEFAULT_LISTEN.parse().expect("it is an address") }
    }
}

/// `kill_switch`
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Eq)]
#[serde(default, deny_unknown_fields)]
pub struct KillSwitch {
    /// While this file exists nothing is traced.
    pub file: Option<PathBuf>,
}

/// `budget`
#[derive(Clone, Copy, Debug, Deserialize, PartialEq)]
#[serde(default, deny_unknown_fields)]
pub struct Budget {
    /// CPU time of the agent, in percent of one CPU; 0: no limit.
    pub cpu_percent: f64,
    /// Watched calls a second; 0: no limit.
    pub calls_per_second: f64,
}

impl Default for Budget {
    fn default() -> Self {
        Self { cpu_percent: 50.0, calls_per_second: 50_000.0 }
    }
}

/// A configuration that cannot be used.
#[derive(Debug, Error)]
pub enum SettingsError {
    /// The file cannot be read.
    #[error("cannot read the configuration {}: {source}", .path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// It is not what is expected.
    #[error("the configuration {} cannot be used: {why}", .path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// Why not, in one line.
        why: String,
    },
    /// A rule makes no sense.
    #[error("the configuration {} cannot be used: {source}", .path.display())]
    Rule {
        /// The file.
        path: PathBuf,
        /// Which and why.
        source: RuleError,
    },
}

impl NodeSettings {
    /// Reads and checks a file.
    pub fn read(path: &Path) -> Result<Self, SettingsError> {
        use std::io::Read as _;
        let mut text = String::new();
        std::fs::File::open(path)
            .and_then(|file| file.take(MAX_BYTES).read_to_string(&mut text))
            .map_err(|source| SettingsError::Unreadable { path: path.to_owned(), source })?;
        let malformed = |why: String| SettingsError::Malformed { path: path.to_owned(), why };
        let settings = Self::parse(&text).map_err(malformed)?;
        Rules::new(&settings.discovery)
            .and_then(|_| settings.kubernetes.shown())
            .map_err(|source| SettingsError::Rule { path: path.to_owned(), source })?;
        Ok(settings)
    }

    pub(crate) fn parse(text: &str) -> Result<Self, String> {
        // An empty file is a configuration in which everything is as it is without one.
        if text.lines().all(|line| line.trim_start().is_empty() || line.trim_start().starts_with('#')) {
            return Ok(Self::default());
        }
        let settings: Self = serde_saphyr::from_str(text).map_err(|error| {
            error.to_string().lines().map(str::trim).filter(|l| !l.is_empty()).collect::<Vec<_>>().join(" ")
        })?;
        let Budget { cpu_percent, calls_per_second } = settings.budget;
        if !(cpu_percent >= 0.0 && calls_per_second >= 0.0) {
            return Err("budget: limits are numbers that are not negative; 0 means no limit".into());
        }
        Ok(settings)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_configuration_names_what_differs() {
        let text = "discovery:\n  instrument:\n    - modules: [floe*]\n    - command_line: luigi\n  exclude_instrument:\n\
                    \x20   - user: test*\ninternal_metrics: {listen: '0.0.0.0:9000'}\nkill_switch: {file: /run/stop}\n\
                    budget: {cpu_percent: 5}\nkubernetes: {node: n1, label_attributes: []}\n";
        let settings = NodeSettings::parse(text).unwrap();
        assert_eq!(settings.discovery.instrument.len(), 2);
        assert_eq!(settings.discovery.exclude_instrument[0].user.as_deref(), Some("test*"));
        assert_eq!(settings.internal_metrics.listen, Listen::At("0.0.0.0:9000".parse().unwrap()));
        assert_eq!(settings.kill_switch.file.as_deref(), Some(Path::new("/run/stop")));
        let kubernetes = KubernetesSettings::default();
        let expected = KubernetesSettings { node: Some("n1".into()), label_attributes: Vec::new(), ..kubernetes };
        assert_eq!(settings.kubernetes, expected);
        assert_eq!(settings.budget, Budget { cpu_percent: 5.0, ..Budget::default() });
        assert_eq!(
            NodeSettings::parse("internal_metrics: {listen: off}\n").unwrap().internal_metrics.listen,
            Listen::Off
        );
        assert_eq!(NodeSettings::parse("# nothing\n\n").unwrap(), NodeSettings::default());
    }

    #[test]
    fn what_cannot_be_meant_is_refused_in_one_line() {
        for (text, word) in [
            ("discover: {}", "discover"),
            ("internal_metrics: {listen: 9000}", "listen"),
            ("internal_metrics: {listen: nowhere}", "nowhere"),
            ("budget: {cpu_percent: -1}", "budget"),
            ("discovery: 7", "discovery"),
            ("kubernetes: {watch: true}", "watch"),
        ] {
            let why = NodeSettings::parse(text).unwrap_err();
            assert!(!why.contains('\n'), "{why}");
            assert!(why.contains(word), "{text}: {why}");
        }
        let missing = NodeSettings::read(Path::new("/no/such.yaml")).unwrap_err().to_string();
        assert!(missing.contains("/no/such.yaml"), "{missing}");
    }

    #[test]
    fn metrics_are_served_to_this_machine_only_by_default() {
        let Listen::At(address) = NodeSettings::default().internal_metrics.listen else {
            panic!("there is an address")
        };
        assert!(address.ip().is_loopback());
    }
}
