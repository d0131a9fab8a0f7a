//! Foreign bytes: the committed corpora of `fuzz/`, and many mutations of them, seeded.

use std::panic::catch_unwind;
use std::path::Path;

use nblock::token::Token;

use crate::scene::Random;
use crate::url_bytes;

fn corpus(name: &str) -> Vec<Vec<u8>> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(name);
    let entries = std::fs::read_dir(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let mut found: Vec<_> = entries.map(|entry| entry.unwrap().path()).collect();
    found.sort();
    found.into_iter().map(|path| std::fs::read(path).unwrap()).collect()
}

/// One of a corpus, changed in a few places: a byte, a piece left out, doubled, or of another one.
fn mutated(corpus: &[Vec<u8>], random: &mut Random) -> Vec<u8> {
    const TELLING: &[u8] = b":/@?&=%[],.-+ \0\xff0aZ";
    let mut bytes = corpus[random.below(corpus.len())].clone();
    for _ in 0..1 + random.below(4) {
        let at = random.below(bytes.len() + 1);
        match random.below(5) {
            0 if at < bytes.len() => bytes[at] = TELLING[random.below(TELLING.len())],
            1 if at < bytes.len() => bytes[at] ^= 1 << random.below(8),
            2 => bytes.insert(at, TELLING[random.below(TELLING.len())]),
            3 => drop(bytes.drain(at..(at + random.below(5)).min(bytes.len()))),
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

#[test]
fn store_urls() {
    let corpus = corpus("url");
    assert!(!corpus.is_empty());
    let mut random = Random::new(1);
    for bytes in corpus.clone().into_iter().chain((0..100_000).map(|_| mutated(&corpus, &mut random))) {
        let found = catch_unwind(|| url_bytes::url(&bytes));
        assert!(found.is_ok(), "{:?}", String::from_utf8_lossy(&bytes));
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
