//! What the tests of this room share.

use std::time::Duration;

use super::connection::{Connection, ReqlProtocol};
use super::server_info::{Introduction, ServerInfo};
use crate::clock::Boottime;
use crate::stores::network::connection::Task;
use crate::stores::network::pipeline::Pipeline;
use crate::stores::network::skew::Clocks;
use crate::stores::network::testing::Scripted;
use crate::sys::sockets::SocketPoller;

/// A small generator of numbers (xorshift64*) whose seed is printed, so that a failure can be run
/// again with `NBLOCK_TEST_SEED`.
pub struct Random(u64);

impl Random {
    pub fn seeded() -> Random {
        let seed = std::env::var("NBLOCK_TEST_SEED")
            .ok()
            .and_then(|seed| seed.parse().ok())
            .unwrap_or_else(|| u64::from_le_bytes(crate::sys::random::random()));
        println!("NBLOCK_TEST_SEED={seed}");
        Random(seed | 1)
    }

    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D)
    }

    /// A number below `bound`; 0 where it is 0.
    pub fn below(&mut self, bound: usize) -> usize {
        (self.next() >> 16) as usize % bound.max(1)
    }
}

pub fn connection(socket: &Scripted) -> (Connection, Task<Pipeline<ReqlProtocol>>) {
    let at = Boottime::now();
    let introduction = Introduction { id: None, name: None, now_ms: 1000, sent: at, received: at };
    let info = ServerInfo::new("h".into(), "2".into(), introduction, &Clocks::new("", Duration::ZERO), 1);
    let pipeline = Pipeline::new(Box::new(socket.clone()), Duration::from_secs(60), ReqlProtocol::default());
    Connection::new(pipeline, SocketPoller::default(), info)
}
