//! `floe-agent run`: traces the pipelines of a machine until it is told to end.

use std::{
    path::{Path, PathBuf},
    sync::{Arc, mpsc},
    time::{Duration, Instant, SystemTime},
};

use anyhow::{Context as _, Result, ensure};
use clap::Args;
use tokio::signal::unix::{SignalKind, signal};

use super::{TraceOptions, session::Session};
use crate::{
    attach::Request,
    node::{
        budget::{Governor, Usage},
        discovery::{self, DiscoveryThread, Order},
        http,
        kubernetes::{self, Api, KnownPods},
        metrics::Observer,
        privileges,
        rules::{NoPods, Pods},
        selector::Selector,
        settings::{Listen, NodeSettings},
        switch::Switch,
        usage,
    },
};

/// How often the kill switch's file is looked at.
const TICK: Duration = Duration::from_millis(200);
/// How often the configuration file and the budget are looked at, in ticks.
const TICKS: u32 = 5;

/// Options of `run` alone.
#[derive(Args, Debug)]
pub(super) struct RunOptions {
    /// Read the node agent's configuration from this file: which processes are traced, metrics, kill switch, budget. It is
    /// read again when it changes and on SIGHUP.
    #[arg(long, value_name = "FILE.yaml", env = "FLOE_NODE_CONFIG")]
    node_config: Option<PathBuf>,
    /// Serve metrics, /healthz and /readyz at this address and port, or `off`. Default: 127.0.0.1:9478.
    #[arg(long, value_name = "ADDRESS:PORT|off")]
    listen: Option<Listen>,
    /// Keep all capabilities that the agent was started with.
    #[arg(long)]
    keep_capabilities: bool,
}

pub(super) fn run(options: &TraceOptions, node: &RunOptions) -> Result<u8> {
    let mut settings = match &node.node_config {
        Some(path) => NodeSettings::read(path)?,
        None => NodeSettings::default(),
    };
    if let Some(listen) = node.listen {
        settings.internal_metrics.listen = listen;
    }
    let config = super::config::of_trace(options)?;
    ensure!(!config.disabled, "tracing is disabled (`disabled`, OTEL_SDK_DISABLED); set it to false to run");
    // Before any other thread: capabilities belong to threads.
    if !node.keep_capabilities {
        let left = privileges::drop_others()?;
        tracing::info!("capabilities: {}", left.iter().map(ToString::to_string).collect::<Vec<_>>().join(" "));
    }
    super::raise_file_limit();
    let api = Api::find(&settings.kubernetes, |name| std::env::var(name).ok().filter(|value| !value.is_empty()))?;
    let known = api.as_ref().ok().map(|_| Arc::new(KnownPods::default()));
    let pods: Arc<dyn Pods> = match &known {
        Some(known) => known.clone(),
        None => Arc::new(NoPods),
    };
    let selector = Arc::new(Selector::new(settings.discovery.clone(), &settings.kubernetes, pods)?);
    if let Err(why) = &api {
        tracing::info!("the Kubernetes API is not read: {why}");
        if selector.rules().ask_for_pods() {
            eprintln!(
                "floe-agent: a rule asks for labels or annotations of pods, and never holds: the Kubernetes API is not read ({why})"
            );
        }
    }
    let session = Session::start_with(options, &config, Some(selector.clone()))?;
    if let (Ok(api), Some(pods)) = (api, known.clone()) {
        session.runtime().spawn(kubernetes::watch(api, pods));
    }
    match Node::start(&session, node, settings, selector, known) {
        Ok(node) => {
            let watched = session.runtime().block_on(node.watch());
            session.finish()?;
            watched?;
            Ok(0)
        }
        Err(error) => {
            session.abandon();
            Err(error)
        }
    }
}

/// A running node agent.
struct Node {
    config: Option<(PathBuf, Option<SystemTime>)>,
    settings: NodeSettings,
    selector: Arc<Selector>,
    discovery: DiscoveryThread,
    observer: Observer,
    attach: mpsc::Sender<Request>,
    switch: Switch,
    paused: bool,
    /// Told when tracing goes on.
    resumed: Option<mpsc::Receiver<()>>,
    governor: Governor,
    since: Instant,
}

fn modified(path: &Path) -> Option<SystemTime> {
    std::fs::metadata(path).and_then(|meta| meta.modified()).ok()
}

impl Node {
    fn start(
        session: &Session,
        options: &RunOptions,
        settings: NodeSettings,
        selector: Arc<Selector>,
        pods: Option<Arc<KnownPods>>,
    ) -> Result<Self> {
        let observer = Observer { pods, ..session.observer() };
        if let Listen::At(address) = settings.internal_metrics.listen {
            let listener = session.runtime().block_on(http::bind(address))?;
            eprintln!("floe-agent: metrics at http://{}/metrics", listener.local_addr()?);
            session.runtime().spawn(http::serve(listener, observer.clone()));
        }
        let attach = session.attach.requests();
        let switch = Switch::new(settings.kill_switch.file.clone());
        let paused = switch.is_off();
        if paused {
            // Before anybody looks for processes.
            let _ = attach.send(Request::Pause(mpsc::channel().0));
            eprintln!("floe-agent: nothing is traced while the kill switch is set");
        }
        let discovery =
            discovery::start(selector.clone(), attach.clone()).context("cannot start the discovery thread")?;
        let config = options.node_config.clone().map(|path| {
            let modified = modified(&path);
            (path, modified)
        });
        let now = Usage { cpu: usage::cpu_time(), calls: observer.calls() };
        Ok(Self {
            config,
            selector,
            discovery,
            attach,
            switch,
            paused,
            resumed: None,
            governor: Governor::new(settings.budget, now),
            since: Instant::now(),
            observer,
            settings,
        })
    }

    /// Until SIGTERM or SIGINT.
    async fn watch(mut self) -> Result<()> {
        let mut interrupt = signal(SignalKind::interrupt())?;
        let mut terminate = signal(SignalKind::terminate())?;
        let mut hangup = signal(SignalKind::hangup())?;
        let mut toggle = signal(SignalKind::user_defined1())?;
        let mut ticks = tokio::time::interval(TICK);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut tick = 0_u32;
        eprintln!("floe-agent: tracing the pipelines of this machine; Ctrl-C ends it");
        loop {
            tokio::select! {
                _ = interrupt.recv() => break,
                _ = terminate.recv() => break,
                _ = hangup.recv() => self.reload(true),
                _ = toggle.recv() => {
                    self.switch.signal();
                    self.apply_switch();
                }
                _ = ticks.tick() => {
                    self.switch.look();
                    self.apply_switch();
                    tick += 1;
                    if tick.is_multiple_of(TICKS) {
                        self.reload(false);
                        self.shed();
                    }
                }
            }
        }
        self.discovery.stop();
        Ok(())
    }

    /// Stops or starts tracing as the switch says.
    fn apply_switch(&mut self) {
        let off = self.switch.is_off();
        if self.resumed.as_ref().is_some_and(|resumed| resumed.try_recv().is_ok()) {
            self.resumed = None;
            self.discovery.order(Order::Scan);
            eprintln!("floe-agent: tracing goes on");
        }
        if off == std::mem::replace(&mut self.paused, off) {
            return;
        }
        if off {
            self.resumed = None;
            let (reply, answer) = mpsc::channel();
            let _ = self.attach.send(Request::Pause(reply));
            if let Ok(took) = answer.recv_timeout(Duration::from_secs(5)) {
                eprintln!("floe-agent: all tracing is stopped, after {} ms", took.as_millis());
            } else {
                tracing::error!("the thread that answers processes did not say that tracing is stopped");
            }
        } else {
            let (told, resumed) = mpsc::channel();
            let _ = self.attach.send(Request::Resume(told));
            self.resumed = Some(resumed);
        }
    }

    /// Reads the configuration again if it changed, or in any case.
    fn reload(&mut self, anyway: bool) {
        let Some((path, before)) = &mut self.config else { return };
        let now = modified(path);
        if now == *before && !anyway {
            return;
        }
        *before = now;
        let settings = match NodeSettings::read(path) {
            Ok(settings) => settings,
            Err(error) => {
                eprintln!("floe-agent: {error}; what was read before stays in force");
                return;
            }
        };
        match self.selector.set_rules(&settings.discovery) {
            Ok(true) => {
                eprintln!("floe-agent: the rules in {} are in force", path.display());
                self.discovery.order(Order::Reselect);
            }
            Ok(false) => {}
            Err(error) => eprintln!("floe-agent: {error}"),
        }
        self.switch.set_file(settings.kill_switch.file.clone());
        self.governor.set_budget(settings.budget);
        for (name, changed) in [
            ("internal_metrics", settings.internal_metrics != self.settings.internal_metrics),
            ("kubernetes", settings.kubernetes != self.settings.kubernetes),
        ] {
            if changed {
                eprintln!("floe-agent: {name} has changed, which takes effect at the next start");
            }
        }
        self.settings = settings;
    }

    /// Takes load off if the agent costs more than it may.
    fn shed(&mut self) {
        let period = self.since.elapsed();
        self.since = Instant::now();
        let before = self.governor.level();
        let now = Usage { cpu: usage::cpu_time(), calls: self.observer.calls() };
        let level = self.governor.step(now, period);
        if level != before {
            let _ = self.attach.send(Request::Shed(level));
        }
    }
}
