//! What the agent itself uses.

use std::time::Duration;

/// What the agent itself uses.
#[derive(Clone, Copy, Debug, Default)]
pub struct ProcessUsage {
    /// CPU time, children not included.
    pub cpu: Duration,
    /// Resident memory in bytes.
    pub memory: u64,
    /// Open file descriptors.
    pub descriptors: u64,
}

impl ProcessUsage {
    /// Now.
    pub fn now() -> Self {
        Self {
            cpu: cpu_time(),
            memory: resident().unwrap_or_default(),
            descriptors: std::fs::read_dir("/proc/self/fd").map_or(0, |entries| entries.count() as u64),
        }
    }
}

/// CPU time of the agent, children not included.
pub fn cpu_time() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    Duration::new(time.tv_sec.cast_unsigned(), time.tv_nsec as u32)
}

fn resident() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/self/statm").ok()?;
    let pages: u64 = text.split_ascii_whitespace().nth(1)?.parse().ok()?;
    Some(pages * rustix::param::page_size() as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_own_process_uses_something() {
        let now = ProcessUsage::now();
        assert!(now.memory > 1 << 20 && now.descriptors > 2, "{now:?}");
        assert!(cpu_time() >= now.cpu);
    }
}
