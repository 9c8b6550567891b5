//! What the agent may cost: above it, load is shed in steps, and taken on again when there is room.

use std::time::Duration;

use super::settings::Budget;

/// The highest level: only the calls that other spans hang on are recorded.
pub const MAX_LEVEL: u8 = 3;
/// So many periods above the budget and the level goes up.
const UP_AFTER: u32 = 3;
/// So many below half of it and the level goes down.
const DOWN_AFTER: u32 = 10;

/// What was used since the agent was started.
#[derive(Clone, Copy, Debug, Default)]
pub struct Usage {
    /// CPU time of the agent.
    pub cpu: Duration,
    /// Calls that were recorded or left out.
    pub calls: u64,
}

/// Decides how much load is shed.
#[derive(Debug)]
pub struct Governor {
    budget: Budget,
    before: Usage,
    above: u32,
    below: u32,
    level: u8,
}

impl Governor {
    /// Begins with no load shed.
    pub fn new(budget: Budget, now: Usage) -> Self {
        Self { budget, before: now, above: 0, below: 0, level: 0 }
    }

    /// Another budget, from the next period on.
    pub fn set_budget(&mut self, budget: Budget) {
        self.budget = budget;
    }

    /// The level now.
    pub fn level(&self) -> u8 {
        self.level
    }

    /// A period has passed: the level from now on.
    pub fn step(&mut self, now: Usage, period: Duration) -> u8 {
        let seconds = period.as_secs_f64().max(1e-3);
        let cpu = now.cpu.saturating_sub(self.before.cpu).as_secs_f64() / seconds * 100.0;
        let calls = now.calls.saturating_sub(self.before.calls) as f64 / seconds;
        self.before = now;
        let part = |used: f64, limit: f64| if limit > 0.0 { used / limit } else { 0.0 };
        let load = part(cpu, self.budget.cpu_percent).max(part(calls, self.budget.calls_per_second));
        self.above = if load > 1.0 { self.above + 1 } else { 0 };
        self.below = if load < 0.5 { self.below + 1 } else { 0 };
        if self.above >= UP_AFTER && self.level < MAX_LEVEL {
            self.level += 1;
            self.above = 0;
        } else if self.below >= DOWN_AFTER && self.level > 0 {
            self.level -= 1;
            self.below = 0;
        }
        self.level
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    /// Levels after periods in which this much was used: percent of a CPU, and calls.
    fn levels(governor: &mut Governor, used: Usage, periods: u32) -> Vec<u8> {
        (0..periods)
            .map(|_| {
                let before = governor.before;
                let now = Usage { cpu: before.cpu + used.cpu, calls: before.calls + used.calls };
                governor.step(now, SECOND)
            })
            .collect()
    }

    #[test]
    fn load_above_the_budget_is_shed_in_steps_and_taken_on_again_slowly() {
        let budget = Budget { cpu_percent: 10.0, calls_per_second: 1000.0 };
        let mut governor = Governor::new(budget, Usage::default());
        let cpu = |percent: u64| Usage { cpu: Duration::from_millis(percent * 10), calls: 0 };
        assert_eq!(levels(&mut governor, cpu(9), 5), [0; 5]);
        assert_eq!(levels(&mut governor, cpu(20), 10), [0, 0, 1, 1, 1, 2, 2, 2, 3, 3]);
        assert_eq!(levels(&mut governor, cpu(20), 5), [3; 5]);
        // Between half of the budget and the whole the level stays.
        assert_eq!(levels(&mut governor, cpu(7), 30), [3; 30]);
        let down = levels(&mut governor, cpu(1), 30);
        assert_eq!((down[8], down[9], down[19], down[29]), (3, 2, 1, 0));
    }

    #[test]
    fn calls_count_as_well_and_a_short_burst_does_not() {
        let budget = Budget { cpu_percent: 0.0, calls_per_second: 1000.0 };
        let mut governor = Governor::new(budget, Usage::default());
        let used = |calls| Usage { cpu: SECOND, calls };
        assert_eq!(levels(&mut governor, used(5000), 2), [0, 0]);
        assert_eq!(levels(&mut governor, used(10), 1), [0]);
        assert_eq!(levels(&mut governor, used(5000), 3), [0, 0, 1]);
    }

    #[test]
    fn without_limits_nothing_is_shed() {
        let mut governor = Governor::new(Budget { cpu_percent: 0.0, calls_per_second: 0.0 }, Usage::default());
        assert_eq!(levels(&mut governor, Usage { cpu: SECOND * 8, calls: 1 << 40 }, 9), [0; 9]);
    }
}
