//! Headers of the embedded store's table: what the bounded run in `tests/proof/bytes.rs` asks of them, without an end.
#![no_main]
#![allow(dead_code)]

#[path = "../../tests/proof/stored_bytes.rs"]
mod stored_bytes;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| stored_bytes::header(bytes));
