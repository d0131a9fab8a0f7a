#!/bin/sh
# static-library.sh IN OUT: a static library that shows its programs only nbl_*.
#
# What cargo makes also shows the Rust runtime and the C functions of the crates below it, which clash with another
# Rust library. Here it becomes one object, of which only the functions of the header are seen.
set -eu
input=$1
output=$2
symbols=$(dirname "$0")/../tests/abi/symbols.txt

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
# shellcheck disable=SC2046
ld -r --gc-sections $(sed 's/^/-u /' "$symbols") "$input" -o "$work/nblock.o"
# Bitcode of another LLVM than the system's makes its tools stumble.
objcopy --keep-global-symbols="$symbols" --strip-debug --remove-section=.llvmbc --remove-section=.llvmcmd \
    "$work/nblock.o"
rm -f "$output"
ar crs "$output" "$work/nblock.o"
