#!/bin/sh
# Runs fuzz targets under libFuzzer and AddressSanitizer, with the toolchain that builds everything else: neither
# another one nor cargo-fuzz is needed (which runs these targets too).
#
# fuzz/run.sh [SECONDS [TARGET...]]: runs each target for that time, 60 s by default; all targets by default. What is
# found is kept in fuzz/found/, and new inputs in .build/fuzz/corpus: the committed corpus stays small.
set -eu
cd "$(dirname "$0")/.."

tools/need.sh fuzz
seconds=${1:-60}
[ $# -eq 0 ] || shift
targets=${*:-$(cd fuzz/fuzz_targets && ls | sed 's/\.rs$//')}
build=$PWD/.build/fuzz
host=$(rustc -vV | sed -n 's/^host: //p')

# What cargo-fuzz asks for: coverage as libFuzzer reads it. The options of -Z are not stable ones.
export RUSTC_BOOTSTRAP=1
export RUSTFLAGS="--cfg fuzzing -Zsanitizer=address -Ccodegen-units=1 -Cpasses=sancov-module
    -Cllvm-args=-sanitizer-coverage-level=4 -Cllvm-args=-sanitizer-coverage-inline-8bit-counters
    -Cllvm-args=-sanitizer-coverage-pc-table -Cllvm-args=-sanitizer-coverage-trace-compares
    -Cllvm-args=-simplifycfg-branch-fold-threshold=0"
RUSTFLAGS=$(echo $RUSTFLAGS)
cargo build --locked --manifest-path fuzz/Cargo.toml --release --config 'profile.release.debug-assertions=true' \
    --target "$host" --target-dir "$build"

mkdir -p fuzz/found
for target in $targets; do
    echo "= $target, for $seconds s"
    mkdir -p "$build/corpus/$target"
    # No input may take more memory than the largest answer is.
    "$build/$host/release/$target" -max_total_time="$seconds" -max_len=65536 -rss_limit_mb=1024 -malloc_limit_mb=64 \
        -artifact_prefix="fuzz/found/$target-" -verbosity=0 -print_funcs=0 -print_final_stats=1 \
        "$build/corpus/$target" "fuzz/corpus/$target"
done
