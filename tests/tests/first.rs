//! FIRST: the first call of a function is seen, also when it is made on the line after the import of its module.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use floe_tests::{Agent, Run, can_trace, interpreters, program, say};

/// Processes of the newest interpreter, and of each other one.
const PROCESSES: usize = 300;
const PROCESSES_OF_OTHERS: usize = 30;

/// The interpreter that `exec` is told to run is known to the agent before it starts, and so are all later processes of its
/// file. (The first process of a file that nobody could know of, behind a shell say, may be met a little later: see
/// docs/limitations.md.)
#[test]
fn the_first_call_after_the_import_is_seen_in_300_processes_on_a_busy_machine() {
    let Some(_alone) = can_trace() else { return };
    let interpreters = interpreters();
    let names: Vec<_> = interpreters.iter().map(ToString::to_string).collect();
    say(&format!("INTERPRETERS: first call: {}", names.join(", ")));
    let busy = Busy::all_cpus();
    let mut missed = Vec::new();
    for (index, interpreter) in interpreters.iter().rev().enumerate() {
        let processes = if index == 0 { PROCESSES } else { PROCESSES_OF_OTHERS };
        let agent = Agent::new().probe("first_target:work(t.n=arg0)").limit(Duration::from_mins(4));
        let run = Run::new(&interpreter.path)
            .arg(program("first_driver.py"))
            .arg(processes.to_string())
            .arg(program("first.py"));
        let outcome = agent.exec(&run);
        outcome.finished.expect(0);
        outcome.nothing_lost();
        let mut seen: BTreeMap<i64, usize> = BTreeMap::new();
        for span in outcome.named("work") {
            *seen.entry(span.int("t.n").expect("the argument is captured")).or_default() += 1;
        }
        let (waits, timeouts) = (outcome.counter("waits"), outcome.counter("wait_timeouts"));
        say(&format!(
            "first call, {}: {} of {processes} seen; {waits} waits, {} us each, {timeouts} ran into their bound; {:.0} s",
            interpreter.version,
            seen.len(),
            outcome.counter("wait_ns") / 1000 / waits.max(1),
            outcome.finished.took.as_secs_f64(),
        ));
        assert!(waits >= processes as u64, "a process waits when its module is imported: {outcome}");
        let not_once = (0..processes as i64).filter(|number| seen.get(number) != Some(&1));
        missed.extend(not_once.map(|number| format!("{number} on {}\n{outcome}", interpreter.version)));
    }
    drop(busy);
    assert!(missed.is_empty(), "not seen once: {}", missed.join(", "));
}

/// Threads that keep every CPU busy until this is dropped.
struct Busy(Arc<AtomicBool>);

impl Busy {
    fn all_cpus() -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        for _ in 0..thread::available_parallelism().map_or(2, usize::from) {
            let stop = Arc::clone(&stop);
            thread::spawn(move || while !stop.load(Ordering::Relaxed) {});
        }
        Self(stop)
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}
