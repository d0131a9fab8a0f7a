#!/bin/sh
# Measures everything that can be measured here: `make bench`.
set -eu
cd "$(dirname "$0")/.."

tools/need.sh bench
echo "== locks, in C"
cargo run --quiet --release --manifest-path benches/Cargo.toml
echo "== Python"
bindings/python/bench.sh
