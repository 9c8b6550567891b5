//! `cargo xtask deploy`: what is in `deploy/` as far as it can be checked without a cluster.
//!
//! The chart is rendered by Helm's own engine (`xtask/chart`, a Go program) with several sets of values; every object must be
//! one of the Kubernetes API; the plain manifests must be what comes of the chart's own values. Scripts go through shellcheck, the
//! unit through `systemd-analyze verify` where that is.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, bail};
use clap::Args;

use crate::jaeger::{self, CHART};
use crate::progress::{Progress, note};
use crate::setup::{Installer, in_path};
use crate::{target, workspace};

const PLAIN: &str = "deploy/kubernetes/floe-agent.yaml";
const UNIT: &str = "deploy/floe-agent.service";
/// What stands before the rendered objects in the plain manifests.
const HEAD: &str = "\
# floe-agent without Helm: what the chart makes of its own values. `cargo xtask deploy --write` makes this file.
# Change the endpoint and apply it:  kubectl apply -f deploy/kubernetes/floe-agent.yaml
apiVersion: v1
kind: Namespace
metadata:
  name: observability
";
/// Values with which the chart must be right as well.
const VARIANTS: [&str; 5] = [
    "{config: {kubernetes: {watch_pods: false}}, seccompProfile: {type: Localhost, localhostProfile: floe-agent.json}}",
    "metrics: {serviceMonitor: {enabled: true, labels: {release: prometheus}}}",
    "{killSwitchHostPath: '', serviceAccount: {create: false}, metrics: {service: {enabled: false}}, fullnameOverride: other}",
    "{podAnnotations: {a: b}, podLabels: {c: d}, priorityClassName: system-node-critical, imagePullSecrets: [{name: registry}],
      affinity: {nodeAffinity: {requiredDuringSchedulingIgnoredDuringExecution: {nodeSelectorTerms: [{matchExpressions:
      [{key: pipelines, operator: Exists}]}]}}}, serviceAccount: {annotations: {a: b}}}",
    "{extraArgs: ['-v'], extraEnv: [{name: HOST_IP, valueFrom: {fieldRef: {fieldPath: status.hostIP}}}],
      config: {discovery: {instrument: [{user: nobody}]}}, resources: {limits: {cpu: '1'}}}",
];
const SCRIPTS: [&str; 3] = [".ci/run", "deploy/harness/kind.sh", "deploy/harness/k3s.sh"];

#[derive(Args, Default)]
pub struct Options {
    /// Write the plain manifests instead of comparing them
    #[arg(long)]
    write: bool,
}

/// Runs all of it.
pub fn run(progress: &Progress, options: &Options) -> Result<()> {
    let chart = jaeger::ensure(progress, CHART)?;
    let plain = format!("{HEAD}{}", render(&chart, "{}")?);
    let file = workspace().join(PLAIN);
    if options.write {
        fs::write(&file, &plain).with_context(|| format!("cannot write {PLAIN}"))?;
    } else if fs::read_to_string(&file).with_context(|| format!("cannot read {PLAIN}"))? != plain {
        bail!("{PLAIN} is not what the chart makes of its values; `cargo xtask deploy --write` makes it");
    }
    for values in VARIANTS {
        render(&chart, values).with_context(|| format!("with the values {values}"))?;
    }
    progress.ready("chart", &format!("rendered {} times, its objects are Kubernetes'", VARIANTS.len() + 1));
    if in_path("shellcheck").is_none() {
        progress.exclusively(|| Installer::new(progress, false).apt(&["shellcheck"]))?;
    }
    progress.run("shellcheck", Command::new("shellcheck").args(SCRIPTS).current_dir(workspace()))?;
    unit(progress)
}

/// What systemd says of the unit, in which a program that is here stands for the agent. Keys that it does not know are a warning to
/// it, and a mistake here.
fn unit(progress: &Progress) -> Result<()> {
    if in_path("systemd-analyze").is_none() {
        note("systemd unit: not checked, there is no systemd-analyze");
        return Ok(());
    }
    let text = fs::read_to_string(workspace().join(UNIT)).with_context(|| format!("cannot read {UNIT}"))?;
    let name = Path::new(UNIT).file_name().context("it has a name")?;
    let copy = target().join("xtask").join(name);
    fs::write(&copy, text.replace("/usr/local/bin/floe-agent", "/bin/true")).context("cannot copy the unit")?;
    let output = Command::new("systemd-analyze").args(["verify", "--man=no"]).arg(&copy).output()?;
    let said = String::from_utf8_lossy(&output.stderr);
    if !output.status.success() || !said.trim().is_empty() {
        bail!("systemd does not like {UNIT}: {}", said.trim());
    }
    progress.ready("systemd unit", "verified");
    Ok(())
}

/// The chart's objects with these values.
fn render(chart: &Path, values: &str) -> Result<String> {
    let mut command = Command::new(chart);
    command.args(["deploy/helm/floe-agent", "floe-agent", "observability", values]).current_dir(workspace());
    let output = command.stdin(Stdio::null()).output().with_context(|| format!("cannot run {}", chart.display()))?;
    if !output.status.success() {
        bail!("{}", String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(String::from_utf8(output.stdout)?)
}
