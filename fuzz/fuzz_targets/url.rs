//! Store URLs: what the bounded run in `tests/proof/bytes.rs` asks of them, without an end.
#![no_main]

#[path = "../../tests/proof/url_bytes.rs"]
mod url_bytes;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| url_bytes::url(bytes));
