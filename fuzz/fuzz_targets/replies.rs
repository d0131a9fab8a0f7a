//! Replies of Redis: what the bounded run in `tests/proof/bytes.rs` asks of them, without an end.
#![no_main]
#![allow(dead_code)]

#[path = "../../tests/proof/server_bytes.rs"]
mod server_bytes;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| server_bytes::replies(bytes));
