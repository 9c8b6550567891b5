//! Whether a test can run here, and what it says otherwise.

use std::env;
use std::fs;
use std::io::Write as _;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread;

use crate::{Agent, Run};

/// What real probes need of `CapEff`: names and bits.
const CAPABILITIES: [(&str, u32); 3] = [("CAP_SYS_PTRACE", 19), ("CAP_SYS_ADMIN", 21), ("CAP_DAC_READ_SEARCH", 2)];

/// Writes a line past the test harness, which would swallow it.
pub fn say(line: &str) {
    let _ = writeln!(std::io::stderr().lock(), "{line}");
}

/// Says that the current test, or a part of it, is skipped.
pub fn skip(reason: &str) {
    say(&format!("SKIPPED: {}: {reason}", test()));
}

/// Name of the current test, which the test harness gives to the thread.
pub(crate) fn test() -> String {
    thread::current().name().unwrap_or("a test").to_owned()
}

/// Whether real probes are possible here: gives the permission to trace, which one test has at a time, because agents
/// that start and end at once wait for each other in the kernel, and because some counters cover the whole machine. Says so
/// if it is not possible, or panics if it is required.
#[track_caller]
pub fn can_trace() -> Option<MutexGuard<'static, ()>> {
    static ONE: Mutex<()> = Mutex::new(());
    static MISSING: OnceLock<Option<String>> = OnceLock::new();
    let permission = ONE.lock().unwrap_or_else(PoisonError::into_inner);
    let Some(reason) = MISSING.get_or_init(missing) else { return Some(permission) };
    assert!(env::var_os("FLOE_REQUIRE_BPF").is_none_or(|value| value != "1"), "tracing is not possible: {reason}");
    skip(reason);
    None
}

fn missing() -> Option<String> {
    let status = fs::read_to_string("/proc/self/status").expect("there is a /proc");
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:")).expect("CapEff is there");
    let effective = u64::from_str_radix(effective.trim(), 16).expect("CapEff is hexadecimal");
    if let Some((name, _)) = CAPABILITIES.iter().find(|(_, bit)| effective & (1 << bit) == 0) {
        return Some(format!("no privileges: {name} is missing"));
    }
    if !fs::exists("/sys/kernel/btf/vmlinux").unwrap_or(false) {
        return Some("the kernel has no BTF (/sys/kernel/btf/vmlinux)".to_owned());
    }
    let attempt = Agent::new().exec(&Run::new("/bin/true"));
    (attempt.finished.code() == 2).then(|| attempt.finished.err().trim().to_owned())
}
