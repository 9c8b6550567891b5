//! FIRST: the first call of a function is seen, also when it is made on the line after the import of its module.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use floe_tests::{Agent, Run, can_trace, interpreters, program, say};

const PROCESSES: usize = 300;
const AT_ONCE: usize = 3;

#[test]
fn the_first_call_after_the_import_is_seen_in_300_processes_on_a_busy_machine() {
    let Some(_alone) = can_trace() else { return };
    let interpreters = interpreters();
    let names: Vec<_> = interpreters.iter().map(ToString::to_string).collect();
    say(&format!("INTERPRETERS: first call: {}", names.join(", ")));
    let program = program("first.py");
    let mut script = String::new();
    for number in 0..PROCESSES {
        let interpreter = interpreters[number % interpreters.len()].path.display();
        let _ = write!(script, "'{interpreter}' -S -E -B '{}' {number} & ", program.display());
        if number % AT_ONCE == AT_ONCE - 1 {
            script.push_str("wait\n");
        }
    }
    script.push_str("wait\n");

    let busy = Busy::all_cpus();
    let agent = Agent::new().probe("first_target:work(t.n=arg0)").limit(Duration::from_mins(4));
    let outcome = agent.exec(&Run::shell(&script));
    drop(busy);

    outcome.finished.expect(0);
    outcome.nothing_lost();
    let mut seen: BTreeMap<i64, usize> = BTreeMap::new();
    for span in outcome.named("work") {
        *seen.entry(span.int("t.n").expect("the argument is captured")).or_default() += 1;
    }
    let (waits, timeouts) = (outcome.counter("waits"), outcome.counter("wait_timeouts"));
    let nanoseconds = outcome.counter("wait_ns");
    say(&format!(
        "first call: {} of {PROCESSES} seen; {waits} waits, {} us each, {timeouts} ran into their bound; {:.0} s",
        seen.len(),
        nanoseconds / 1000 / waits.max(1),
        outcome.finished.took.as_secs_f64(),
    ));
    assert!(waits >= PROCESSES as u64, "a process waits when its module is imported: {outcome}");
    let missed: Vec<_> = (0..PROCESSES as i64)
        .filter(|number| seen.get(number) != Some(&1))
        .map(|number| format!("{number} on {}", interpreters[number as usize % interpreters.len()].version))
        .collect();
    assert!(missed.is_empty(), "not seen once: {}\n{outcome}", missed.join(", "));
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
