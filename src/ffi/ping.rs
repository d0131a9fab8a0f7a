//! The result of a ping.

use std::ffi::c_char;

use super::fitting::array;
use super::options::sized_32;
use crate::client::Ping;

/// What nbl_client_ping found out about the store. The caller sets struct_size; the call fills in the
/// rest. A text that is too long ends after the last character that fits.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct nbl_ping_t {
    /// sizeof(nbl_ping_t).
    pub struct_size: u32,
    /// 1 if skew_ms was measured, otherwise 0: it is the same clock, or the server does not report its time.
    pub skew_measured: u32,
    /// How far the server's clock is ahead of this machine's, in milliseconds.
    pub skew_ms: i64,
    /// How long the reply took, in microseconds.
    pub round_trip_us: u64,
    /// The name, version and address of the server that replied. NUL-terminated UTF-8.
    pub server: [c_char; 256],
    /// Where the store is, as nbl_client_location. NUL-terminated UTF-8.
    pub location: [c_char; 512],
    /// Warnings: what in the server's configuration endangers locks, and what to do about it. One on
    /// each line; empty if there are none. NUL-terminated UTF-8.
    pub caveats: [c_char; 1024],
}
sized_32!(nbl_ping_t: skew_measured skew_ms round_trip_us server location caveats);

impl From<&Ping> for nbl_ping_t {
    fn from(ping: &Ping) -> nbl_ping_t {
        nbl_ping_t {
            struct_size: 0,
            skew_measured: ping.skew_ms.is_some().into(),
            skew_ms: ping.skew_ms.unwrap_or(0),
            round_trip_us: u64::try_from(ping.round_trip.as_micros()).unwrap_or(u64::MAX),
            server: array(&ping.server),
            location: array(&ping.location),
            caveats: array(&ping.caveats.join("\n")),
        }
    }
}
