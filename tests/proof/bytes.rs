//! Foreign bytes: the committed corpora of `fuzz/`, and many mutations of them, seeded: what `cargo fuzz` does
//! without an end, done for a while, by any toolchain.
//!
//! `NBLOCK_PROOF_SEED` starts from another seed, `NBLOCK_PROOF_BYTES` says how many mutations.

use std::panic::catch_unwind;
use std::path::Path;

use nblock::token::Token;

use crate::support::Random;
use crate::{allocations, server_bytes, stored_bytes, url_bytes};

fn corpus(name: &str) -> Vec<Vec<u8>> {
    let path = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/..")).join("fuzz/corpus").join(name);
    let entries = std::fs::read_dir(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let mut found: Vec<_> = entries.map(|entry| entry.unwrap().path()).collect();
    found.sort();
    found.into_iter().map(|path| std::fs::read(path).unwrap()).collect()
}

/// One of a corpus, changed in a few places: a byte, a piece left out, doubled, or of another one.
fn mutated(corpus: &[Vec<u8>], random: &mut Random) -> Vec<u8> {
    const TELLING: &[u8] = b":/@?&=%[],.-+ {}\"\\$\0\xff\x01\x0201239eaZ";
    let mut bytes = corpus[random.below(corpus.len())].clone();
    for _ in 0..1 + random.below(4) {
        let at = random.below(bytes.len() + 1);
        match random.below(6) {
            0 if at < bytes.len() => bytes[at] = TELLING[random.below(TELLING.len())],
            1 if at < bytes.len() => bytes[at] ^= 1 << random.below(8),
            2 => bytes.insert(at, TELLING[random.below(TELLING.len())]),
            3 => drop(bytes.drain(at..(at + random.below(5)).min(bytes.len()))),
            4 => {
                let piece = bytes[at..(at + random.below(40)).min(bytes.len())].to_vec();
                bytes.splice(at..at, piece);
            }
            _ => {
                let other = &corpus[random.below(corpus.len())];
                let from = random.below(other.len() + 1);
                bytes.truncate(at);
                bytes.extend_from_slice(&other[from..]);
            }
        }
    }
    bytes
}

fn number(name: &str, otherwise: u64) -> u64 {
    let said = std::env::var(name).ok().filter(|text| !text.is_empty());
    said.map_or(otherwise, |text| text.parse().unwrap_or_else(|_| panic!("{name} is a number")))
}

/// Every file of a corpus and so many mutations: no panic, and no more memory than such bytes are worth.
fn holds(name: &str, mutations: u64, property: fn(&[u8])) {
    /// A JSON value takes 32 bytes in memory and two on the wire, and the properties read it several times
    /// over, into vectors that grow.
    const WORTH: usize = 1024;
    let corpus = corpus(name);
    assert!(corpus.len() >= 3, "fuzz/corpus/{name} is there to begin with");
    let seed = number("NBLOCK_PROOF_SEED", 1);
    let mut random = Random::new(seed);
    let mutations = (0..number("NBLOCK_PROOF_BYTES", mutations)).map(|_| mutated(&corpus, &mut random));
    for bytes in corpus.clone().into_iter().chain(mutations) {
        let (found, asked_for) = allocations::during(|| catch_unwind(|| property(&bytes)));
        let shown = String::from_utf8_lossy(&bytes);
        assert!(found.is_ok(), "seed {seed}: {shown:?}, as Rust writes it {bytes:?}");
        let worth = (1 << 16) + WORTH * bytes.len();
        assert!(asked_for <= worth, "seed {seed}: {asked_for} bytes of memory for {shown:?}");
    }
}

#[test]
fn store_urls() {
    holds("url", 100_000, url_bytes::url);
}

#[test]
fn frames_of_a_server() {
    holds("frames", 50_000, server_bytes::frames);
}

#[test]
fn responses_of_a_server() {
    holds("response", 50_000, server_bytes::response);
}

#[test]
fn records_of_a_server() {
    holds("record", 50_000, server_bytes::record);
}

#[test]
fn challenges_of_a_server() {
    holds("challenge", 20_000, server_bytes::challenge);
}

#[test]
fn handshakes_with_a_server() {
    holds("handshake", 5_000, server_bytes::handshake);
}

#[test]
fn replies_of_redis() {
    holds("replies", 50_000, server_bytes::replies);
}

#[test]
fn stored_rows() {
    holds("row", 50_000, stored_bytes::row);
}

#[test]
fn headers_of_a_table() {
    // Maps the table that all of them are put into: that memory is not what bytes are worth.
    stored_bytes::header(&[]);
    holds("header", 10_000, stored_bytes::header);
}

/// Each corpus is of a fuzz target, and each target has one.
#[test]
fn every_fuzz_target_runs_here_too() {
    let here = include_str!("bytes.rs");
    let manifest = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/..")).join("fuzz");
    let names = |folder: &str| {
        let entries = std::fs::read_dir(manifest.join(folder)).unwrap().map(|entry| entry.unwrap().path());
        let mut names: Vec<_> = entries.map(|path| path.file_stem().unwrap().to_string_lossy().into_owned()).collect();
        names.sort();
        names
    };
    let targets = names("fuzz_targets");
    assert_eq!(targets, names("corpus"));
    for target in targets {
        assert!(here.contains(&format!("holds(\"{target}\", ")), "{target}");
    }
}

#[test]
fn tokens() {
    let corpus =
        [b"0123456789abcdef0123456789abcdef.1".to_vec(), b"ffffffffffffffffffffffffffffffff.4294967295".to_vec()];
    let mut random = Random::new(2);
    for _ in 0..100_000 {
        let bytes = mutated(&corpus, &mut random);
        let text = String::from_utf8_lossy(&bytes);
        // One text for each token: two that differ never mean the same hold.
        if let Some(token) = Token::parse(&text) {
            assert_eq!(token.to_string(), text);
        }
    }
}
