#!/bin/sh
# Everything in C and C++: the header, the ABI, misuse under a memory checker, installing, examples.
#
# tests/c/run.sh [PART...] runs only those parts: header abi misuse cpp install examples forks instrumented handles.
# The last three are run only when they are named: `forks` is in misuse, and `make sanitize` runs the others, which build
# everything again.
set -eu
cd "$(dirname "$0")/../.."

tools/need.sh c
cargo build --quiet
target=${CARGO_TARGET_DIR:-target}/debug
case $target in /*) ;; *) target=$PWD/$target ;; esac

# The library under the name that programs load, and nothing else beside it.
build=$PWD/.build/c
mkdir -p "$build/lib"
ln -sf "$target/libnblock.so" "$build/lib/libnblock.so"
ln -sf "$target/libnblock.so" "$build/lib/libnblock.so.0"

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export NBLOCK_DIR="$work/store"
unset NBLOCK_URL NBLOCK_LOG

warnings="-Wall -Wextra -Wpedantic -Wconversion -Werror"
links="-L$build/lib -lnblock -Wl,-rpath,$build/lib -pthread -ldl"

# The C program tests/c/NAME.c, as $build/NAME; further arguments are the compiler's.
c_program() {
    name=$1
    shift
    # shellcheck disable=SC2086
    cc -std=c11 -D_GNU_SOURCE -g -O1 "$@" $warnings -Iinclude "tests/c/$name.c" -o "$build/$name" $links
}

misuses="misuse_handles misuse_arguments misuse_moments"

# A program on a store of its own: what another one abandoned would still be held there.
alone() {
    rm -rf "$NBLOCK_DIR"
    "$@"
}

# A program that must end well, and in which valgrind sees no wrong access and no leak.
checked() {
    echo "  $(basename "$1") under valgrind"
    alone \
        valgrind --quiet --error-exitcode=99 --fair-sched=yes --leak-check=full --show-leak-kinds=definite \
        --errors-for-leak-kinds=definite "$@"
}

# The header compiles alone, twice, from two units, in every language that it is for.
header() {
    for language in "cc c99" "cc c11" "cc c17" "clang c99" "clang c17" "g++ c++17" "g++ c++20" "clang++ c++17"; do
        compiler=${language% *}
        standard=${language#* }
        echo "  nblock.h as $standard with $compiler"
        case $standard in c++*) as=c++ ;; *) as=c ;; esac
        # shellcheck disable=SC2086
        $compiler -x $as -std=$standard $warnings -Wundef -Wshadow -Iinclude \
            tests/c/header.c tests/c/header_second_unit.c -o "$work/header" $links
        "$work/header"
    done
    for language in "g++ c++17" "g++ c++23" "clang++ c++17" "clang++ c++20"; do
        echo "  nblock.hpp as ${language#* } with ${language% *}"
        # shellcheck disable=SC2086
        ${language% *} -std=${language#* } -fsyntax-only $warnings -Wundef -Wshadow -Wsign-conversion -Wold-style-cast \
            -Wnon-virtual-dtor -Iinclude tests/cpp/header.cpp tests/cpp/header_second_unit.cpp
    done
    echo "  an ignored result is warned of"
    for language in "cc c11 c" "clang c17 c" "g++ c++17 c" "g++ c++17 cpp" "clang++ c++17 cpp"; do
        set -- $language
        case $2 in c++*) as=c++ ;; *) as=c ;; esac
        if $1 -x $as -std=$2 -Werror=unused-result -Iinclude -c "tests/$3/ignores_result.$3" -o "$work/ignores.o" \
            2>"$work/warnings"; then
            echo "$1 does not warn of the ignored result in tests/$3/ignores_result.$3" >&2
            exit 1
        fi
        grep -q -e '-W.*unused-result' "$work/warnings" || { cat "$work/warnings" >&2; exit 1; }
    done
    # shellcheck disable=SC2086
    g++ -std=c++17 -Iinclude tests/cpp/header.cpp tests/cpp/header_second_unit.cpp -o "$work/header" $links
    "$work/header"
}

# What programs that were built before rely on: symbols, layouts and numbers, as committed. Lines may
# be added to these lists; none may change.
abi() {
    echo "  exported symbols, layouts, numbers"
    nm -D --defined-only "$build/lib/libnblock.so" | awk '{ print $NF }' | LC_ALL=C sort >"$work/symbols.txt"
    diff tests/abi/symbols.txt "$work/symbols.txt"
    grep -v '^ *[/*]' include/nblock.h | grep -oE '\bnbl_[a-z_]+\(' | tr -d '(' | LC_ALL=C sort -u |
        diff tests/abi/symbols.txt -
    awk -f tests/abi/layout.awk include/nblock.h >"$work/layout.c"
    cc -std=c11 -Iinclude "$work/layout.c" -o "$work/layout"
    "$work/layout" >"$work/layout.txt"
    diff tests/abi/layout.txt "$work/layout.txt"
    readelf -d "$build/lib/libnblock.so" | grep -q 'SONAME.*\[libnblock\.so\.0\]'
    readelf -d "$build/lib/libnblock.so" | grep -q NODELETE
}

# The same programs under AddressSanitizer: at full speed, with more threads at once than valgrind has.
under_address_sanitizer() {
    echo "  the same under AddressSanitizer and UndefinedBehaviorSanitizer"
    for program in $misuses versions races; do
        c_program $program -fsanitize=address,undefined -fno-sanitize-recover=undefined
    done
    for program in $misuses versions; do alone "$build/$program" "$build/libnblock-another-copy.so"; done
    alone "$build/races" 400
}

# Once more, with a library that was built for AddressSanitizer too. Not part of the usual run, since it
# builds everything again.
instrumented() {
    host=$(rustc -vV | sed -n 's/^host: //p')
    # The option is not a stable one.
    RUSTC_BOOTSTRAP=1 RUSTFLAGS=-Zsanitizer=address cargo build --quiet --package nblock --lib --target "$host" \
        --target-dir "$build/instrumented"
    target=$build/instrumented/$host/debug
    ln -sf libnblock.so "$target/libnblock.so.0"
    cp "$target/libnblock.so" "$build/libnblock-another-copy.so"
    links="-L$target -lnblock -Wl,-rpath,$target -pthread -ldl"
    under_address_sanitizer
}

# The handle table's own tests, many threads that use, replace and free the same handles among them, under
# AddressSanitizer and under ThreadSanitizer. The standard library is instrumented for neither.
handles() {
    host=$(rustc -vV | sed -n 's/^host: //p')
    for sanitizer in address thread; do
        echo "  the handle table under -Zsanitizer=$sanitizer"
        # The options are not stable ones. The second one allows std as it comes, which is built without.
        RUSTC_BOOTSTRAP=1 RUSTFLAGS="-Zsanitizer=$sanitizer -Cunsafe-allow-abi-mismatch=sanitizer" \
            TSAN_OPTIONS="suppressions=$PWD/tests/c/thread-sanitizer.txt" \
            cargo test --quiet --package nblock --lib --target "$host" \
            --target-dir "$PWD/.build/$sanitizer-sanitizer" ffi::handle
    done
}

misuse() {
    for program in $misuses races versions starved; do c_program $program; done
    # Nothing is left out: every function is called there with every wrong handle.
    while read -r symbol; do
        grep -qE "\b$symbol\(" tests/c/calls.h tests/c/misuse_*.c || { echo "tests/c/misuse_*.c: no $symbol"; exit 1; }
    done <tests/abi/symbols.txt
    cp "$target/libnblock.so" "$build/libnblock-another-copy.so"
    for program in $misuses versions; do checked "$build/$program" "$build/libnblock-another-copy.so"; done
    checked "$build/races" 20
    under_address_sanitizer
    echo "  without threads"
    "$build/starved"
    forks
}

# Forks in the handler of a signal, as many as NBLOCK_TORTURE_FORKS says.
forks() {
    echo "  forks in the handler of a signal"
    c_program forks
    alone timeout 3600 "$build/forks" "${NBLOCK_TORTURE_FORKS:-1000}"
}

# The C++ header's classes, on both stores, under AddressSanitizer and UndefinedBehaviorSanitizer.
cpp() {
    for program in locks operations at_exit; do
        # shellcheck disable=SC2086
        g++ -std=c++17 -g -O1 -fsanitize=address,undefined -fno-sanitize-recover=undefined $warnings -Iinclude \
            tests/cpp/$program.cpp -o "$build/cpp-$program" $links
        for url in memory:cpp embedded:; do
            echo "  $program in C++ on $url"
            alone "$build/cpp-$program" $url
        done
    done
}

install() { tests/c/install.sh; }
examples() { tests/c/examples.sh; }

for part in ${*:-header abi misuse cpp install examples}; do
    echo "= $part"
    case $part in
    header | abi | misuse | cpp | install | examples | forks | instrumented | handles) $part ;;
    *) echo "no part $part: header, abi, misuse, cpp, install, examples, forks, instrumented, handles" >&2; exit 64 ;;
    esac
done
echo "= C and C++: all well"
