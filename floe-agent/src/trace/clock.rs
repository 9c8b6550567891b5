//! From nanoseconds since boot to wall-clock time.

use std::time::{Duration, SystemTime};

use crate::units::BootNanos;

/// Two readings taken at one moment: `CLOCK_BOOTTIME` and the wall clock.
#[derive(Clone, Copy, Debug)]
pub struct Clock {
    boot: BootNanos,
    wall: SystemTime,
}

impl Clock {
    /// A clock from readings of both clocks at the same moment.
    pub const fn new(boot: BootNanos, wall: SystemTime) -> Self {
        Self { boot, wall }
    }

    /// The wall-clock time of a moment.
    pub fn wall(&self, time: BootNanos) -> SystemTime {
        if time >= self.boot {
            self.wall + Duration::from_nanos(time.0 - self.boot.0)
        } else {
            let before = Duration::from_nanos(self.boot.0 - time.0);
            self.wall.checked_sub(before).unwrap_or(SystemTime::UNIX_EPOCH)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moments_before_and_after_the_reading_are_converted() {
        let wall = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000);
        let clock = Clock::new(BootNanos(5_000), wall);
        assert_eq!(clock.wall(BootNanos(5_000)), wall);
        assert_eq!(clock.wall(BootNanos(5_007)), wall + Duration::from_nanos(7));
        assert_eq!(clock.wall(BootNanos(4_990)), wall - Duration::from_nanos(10));
    }
}
