//! The committed header is the one that the source says.

#[test]
fn the_committed_header_is_current() {
    let generated = std::fs::read_to_string(env!("NBLOCK_GENERATED_HEADER")).unwrap();
    let committed = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/include/nblock.h")).unwrap();
    assert!(generated == committed, "include/nblock.h is not current: run `make header` and commit it");
}
