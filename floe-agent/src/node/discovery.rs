//! Looking for Python processes that run already, and again at those that did not match when they started: what a process
//! imports is not in its command line, and what labels its pod has may be known later than that it runs.
//!
//! Only reading is done here; whoever matches is handed to the attach thread.

use std::{
    collections::{HashMap, HashSet},
    sync::{Arc, mpsc},
    thread::JoinHandle,
    time::{Duration, Instant},
};

use super::selector::Selector;
use crate::{
    attach::{Judgement, Request},
    process::identity::{self, Stat},
    python::{
        identify::{Interpreter, InterpreterFile, locate},
        memory::{CachedMemory, ProcessMemory},
        resolve::Resolver,
    },
    units::{BootNanos, Pid},
};

/// How long after its start a process is looked at again; then after each [`LAST_DELAY`].
const DELAYS: [Duration; 4] =
    [Duration::from_secs(1), Duration::from_secs(3), Duration::from_secs(10), Duration::from_secs(30)];
const LAST_DELAY: Duration = Duration::from_mins(1);
/// Processes that are looked at again.
const MAX_LOOKS: usize = 8192;
/// How often the thread wakes.
const PERIOD: Duration = Duration::from_millis(250);
/// Interpreter files that are remembered, so that they are read once.
const MAX_FILES: usize = 64;

/// What the thread is told.
#[derive(Debug)]
pub enum Order {
    /// Look at all processes.
    Scan,
    /// The rules have changed: let go of those that fall out, look for new ones.
    Reselect,
    /// End.
    Stop,
}

/// The thread.
#[derive(Debug)]
pub struct DiscoveryThread {
    orders: mpsc::Sender<Order>,
    thread: JoinHandle<()>,
}

/// A process that is to be looked at again.
#[derive(Debug)]
struct Look {
    started: BootNanos,
    done: usize,
    due: Instant,
}

struct Looker {
    selector: Arc<Selector>,
    attach: mpsc::Sender<Request>,
    files: Vec<Arc<InterpreterFile>>,
    looks: HashMap<Pid, Look>,
}

/// Starts the thread; it begins with a scan.
pub fn start(selector: Arc<Selector>, attach: mpsc::Sender<Request>) -> std::io::Result<DiscoveryThread> {
    let (orders, inbox) = mpsc::channel();
    let mut looker = Looker { selector, attach, files: Vec::new(), looks: HashMap::new() };
    let thread = std::thread::Builder::new().name("floe-discovery".into()).spawn(move || looker.run(&inbox))?;
    let _ = orders.send(Order::Scan);
    Ok(DiscoveryThread { orders, thread })
}

impl DiscoveryThread {
    /// Tells it something. If it has ended there is nobody to tell.
    pub fn order(&self, order: Order) {
        let _ = self.orders.send(order);
    }

    /// Ends it.
    pub fn stop(self) {
        self.order(Order::Stop);
        let _ = self.thread.join();
    }
}

impl Looker {
    fn run(&mut self, inbox: &mpsc::Receiver<Order>) {
        loop {
            match inbox.recv_timeout(PERIOD) {
                Ok(Order::Scan) => self.scan(),
                Ok(Order::Reselect) => {
                    self.let_go();
                    self.scan();
                }
                Ok(Order::Stop) | Err(mpsc::RecvTimeoutError::Disconnected) => return,
                Err(mpsc::RecvTimeoutError::Timeout) => {}
            }
            for pid in self.selector.take_later() {
                self.look_later(pid);
            }
            self.look_again();
        }
    }

    /// Looks at all processes.
    fn scan(&mut self) {
        let own = Pid(std::process::id());
        for pid in identity::all().unwrap_or_default() {
            if pid != own && self.may_be_python(pid) {
                self.hand_on(pid);
            }
        }
    }

    /// Whether a process runs a CPython that is supported. Everything else is refused without being handed on: on a node
    /// that is most of the processes.
    fn may_be_python(&mut self, pid: Pid) -> bool {
        // Kernel threads and zombies have no command line.
        if !identity::cmdline(pid).is_ok_and(|words| !words.is_empty()) {
            return false;
        }
        let Ok(located) = locate(pid, &self.files) else { return false };
        if !self.files.iter().any(|file| file.identity() == located.file.identity()) {
            if self.files.len() >= MAX_FILES {
                self.files.remove(0);
            }
            self.files.push(located.file);
        }
        true
    }

    /// What the rules say of a running process, by all there is to know of it.
    fn judge(&mut self, pid: Pid) -> Judgement {
        match self.selector.judge_importing(pid, None) {
            // The command line is enough, or there is nothing else to ask.
            Judgement::NotSelected if self.selector.rules().ask_for_modules() => match self.packages(pid) {
                Some(packages) => self.selector.judge_importing(pid, Some(packages)),
                None => Judgement::NotSelected,
            },
            judgement => judgement,
        }
    }

    /// Judges a running process and hands it on; whether it was selected.
    fn hand_on(&mut self, pid: Pid) -> bool {
        let judgement = self.judge(pid);
        let _ = self.attach.send(match judgement {
            Judgement::Selected => Request::Discovered(pid),
            // Its interpreter file is probed, so that its next processes are covered from their start.
            Judgement::NotSelected | Judgement::Excluded => Request::Examine(pid),
        });
        if judgement == Judgement::NotSelected && self.selector.rules().may_change() {
            self.look_later(pid);
        }
        judgement == Judgement::Selected
    }

    /// Top-level packages that a process has imported.
    fn packages(&mut self, pid: Pid) -> Option<Vec<String>> {
        let memory = ProcessMemory::new(pid);
        let located = locate(pid, &self.files).ok()?;
        // It runs while it is read: what is read may not fit together at the first try.
        for _ in 0..3 {
            let cached = CachedMemory::new(&memory);
            let packages = Interpreter::verify(&cached, &located.file, located.bias).ok().and_then(|interpreter| {
                let modules = interpreter.modules(&cached, interpreter.main).ok()?;
                let resolver = Resolver::new(interpreter.heap(&cached), modules);
                let names = resolver.module_names().ok()?;
                Some(names.filter_map(|name| name.split('.').next()).map(str::to_owned).collect::<HashSet<_>>())
            });
            if let Some(packages) = packages {
                return Some(packages.into_iter().collect());
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        None
    }

    fn look_later(&mut self, pid: Pid) {
        if self.looks.len() < MAX_LOOKS
            && !self.looks.contains_key(&pid)
            && let Ok(stat) = Stat::read(pid)
            && stat.is_alive()
        {
            self.looks.insert(pid, Look { started: stat.started, done: 0, due: Instant::now() + DELAYS[0] });
        }
    }

    /// Looks again at what is due.
    fn look_again(&mut self) {
        let now = Instant::now();
        let due: Vec<_> = self.looks.iter().filter(|(_, look)| look.due <= now).map(|(pid, _)| *pid).collect();
        for pid in due {
            let Some(mut look) = self.looks.remove(&pid) else { continue };
            let same = Stat::read(pid).is_ok_and(|stat| stat.is_alive() && stat.started == look.started);
            if same && self.judge(pid) == Judgement::Selected {
                let _ = self.attach.send(Request::Discovered(pid));
            } else if same {
                look.done += 1;
                look.due = now + DELAYS.get(look.done).copied().unwrap_or(LAST_DELAY);
                self.looks.insert(pid, look);
            }
        }
    }

    /// Lets go of traced processes that no rule selects any more, neither themselves nor a parent.
    fn let_go(&mut self) {
        let (reply, answer) = mpsc::channel();
        let _ = self.attach.send(Request::Selected(reply));
        let selected: HashSet<Pid> = answer.recv().unwrap_or_default().into_iter().collect();
        let mut stays: HashMap<Pid, bool> = HashMap::new();
        for &pid in &selected {
            let mut chain = Vec::new();
            let mut next = Some(pid);
            let mut verdict = false;
            while let Some(pid) = next.take() {
                if let Some(&known) = stays.get(&pid) {
                    verdict = known;
                    break;
                }
                chain.push(pid);
                match self.judge(pid) {
                    Judgement::Selected => verdict = true,
                    Judgement::Excluded => {}
                    Judgement::NotSelected => {
                        next = Stat::read(pid).ok().map(|stat| stat.parent).filter(|parent| selected.contains(parent));
                    }
                }
            }
            stays.extend(chain.into_iter().map(|pid| (pid, verdict)));
        }
        for (pid, stays) in stays {
            if !stays {
                let _ = self.attach.send(Request::Release(pid));
            }
        }
    }
}
