//! Readers of the two ring buffers.

use std::{
    os::fd::{AsFd, AsRawFd, BorrowedFd},
    time::Duration,
};

use aya::maps::{MapData, RingBuf};
use floe_ebpf::Urgent;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::{
    decode::{DecodeError, decode, decode_urgent},
    event::Event,
};

fn wait(ring: &RingBuf<MapData>, timeout: Duration) {
    // SAFETY: the ring owns the descriptor and outlives the borrow.
    let fd = unsafe { BorrowedFd::borrow_raw(ring.as_raw_fd()) };
    let timeout = Timespec { tv_sec: timeout.as_secs().cast_signed(), tv_nsec: i64::from(timeout.subsec_nanos()) };
    // An error (EINTR) is like a time-out: the caller looks at the ring and comes back.
    let _ = poll(&mut [PollFd::new(&fd.as_fd(), PollFlags::IN)], Some(&timeout));
}

/// Reads the ring buffer `EVENTS`.
pub struct EventReader {
    ring: RingBuf<MapData>,
    /// Records that did not decode.
    pub undecodable: u64,
}

impl EventReader {
    pub(super) fn new(ring: RingBuf<MapData>) -> Self {
        Self { ring, undecodable: 0 }
    }

    /// Waits until the ring is filled to its mark or a process ended, at most `timeout`.
    pub fn wait(&self, timeout: Duration) {
        wait(&self.ring, timeout);
    }

    /// The next event, if there is one.
    pub fn take(&mut self) -> Option<Event> {
        loop {
            let item = self.ring.next()?;
            match decode(&item) {
                Ok(event) => return Some(event),
                Err(error) => {
                    if self.undecodable == 0 {
                        tracing::error!("{error}");
                    }
                    self.undecodable += 1;
                }
            }
        }
    }
}

/// Reads the ring buffer `URGENT`.
pub struct UrgentReader {
    ring: RingBuf<MapData>,
}

impl UrgentReader {
    pub(super) fn new(ring: RingBuf<MapData>) -> Self {
        Self { ring }
    }

    /// Waits for a record, at most `timeout`.
    pub fn wait(&self, timeout: Duration) {
        wait(&self.ring, timeout);
    }

    /// The next record, if there is one.
    pub fn take(&mut self) -> Option<Result<Urgent, DecodeError>> {
        self.ring.next().map(|item| decode_urgent(&item))
    }
}
