#!/bin/sh
# Makes sure that what a part of this repository needs is there: need.sh PART...
#
# Says what is missing, then gets it: Debian's packages by apt-get, as root (other users see
# what to install), servers for tests into the build folder. Python's packages (into the build folder) and
# Rust's are listed as well; pip and cargo fetch them when they are used.
# NBLOCK_NO_INSTALL=1 fails with the list instead, and nothing is fetched.
#
# Parts: build, demo, bench, fuzz, docs, reference, and the suites of tests/run.sh.
set -eu
cd "$(dirname "$0")/.."

# What a part needs, one per word: command:NAME:PACKAGE, python:MODULE:PACKAGE, ruby:LIBRARY:PACKAGE (Debian's
# packages), server:NAME (of tools/servers.sh), venv:NAME:REQUIREMENTS (in .build), crates:DIRECTORY (of a Cargo.lock).
needs_of() {
    case $1 in
    build | demo) echo command:cc:gcc command:make:make crates:. ;;
    rust)
        needs_of build
        echo server:redis server:postgresql server:pgbouncer server:etcd command:python3:python3 python:pip:python3-pip
        ;;
    c)
        needs_of build
        echo command:g++:g++ command:clang++:clang command:valgrind:valgrind command:nm:binutils command:cmake:cmake
        echo command:pkg-config:pkg-config
        ;;
    wheel) echo command:cc:gcc command:python3:python3 python:ensurepip:python3-venv crates:bindings/python ;;
    python)
        needs_of wheel
        echo command:nm:binutils server:redis venv:python-tests:bindings/python/requirements-tests.txt
        ;;
    gem) needs_of build && echo command:strip:binutils command:ruby:ruby command:gem:ruby ;;
    ruby) needs_of gem && echo ruby:ffi:ruby-ffi ruby:minitest:ruby-minitest server:redis ;;
    history) needs_of c && needs_of python && needs_of ruby ;;
    docs) echo command:python3:python3 python:ensurepip:python3-venv venv:docs-venv:docs/requirements.txt ;;
    reference) echo command:doxygen:doxygen ;;
    model) echo crates:tests/model ;;
    interop) [ -z "${NBLOCK_TEST_RETHINKDB_URL:-}" ] || echo crates:tests/interop ;;
    fuzz) echo command:c++:g++ crates:fuzz ;;
    python-bench) needs_of wheel && echo venv:python-bench:bindings/python/requirements-bench.txt server:redis ;;
    bench) needs_of build && echo crates:benches server:redis && needs_of python-bench ;;
    *) echo "need.sh: no part $1" >&2 && return 64 ;;
    esac
}

if ! command -v cargo >/dev/null 2>&1; then
    echo "missing here: cargo. Install Rust $(sed -n 's/^rust-version = "\(.*\)"/\1/p' Cargo.toml) or later" >&2
    exit 1
fi

needs=$(for part in "$@"; do needs_of "$part" || exit; done)
needs=$(printf '%s\n' $needs | sort -u)
debian=
servers=
python=
rust=
for need in $needs; do
    kind=${need%%:*}
    what=${need#*:}
    from=${what#*:}
    what=${what%%:*}
    case $kind in
    command) command -v "$what" >/dev/null 2>&1 || debian="$debian $from" ;;
    python) python3 -c "import $what" 2>/dev/null || debian="$debian $from" ;;
    ruby) ruby -r"$what" -e '' 2>/dev/null || debian="$debian $from" ;;
    server) [ -e ".build/servers/unpacked/$what" ] || servers="$servers $what" ;;
    venv) tools/venv.sh --is-current ".build/$what" "$from" || python="$python $(cat "$from")" ;;
    crates)
        host=$(rustc -vV | sed -n 's/^host: //p')
        if ! cargo fetch --quiet --offline --locked --target "$host" --manifest-path "$what/Cargo.toml" 2>/dev/null; then
            rust="$rust $what/Cargo.lock"
        fi
        ;;
    esac
done
debian=$(printf '%s\n' $debian | sort -u | tr '\n' ' ')
debian=${debian% }
[ -z "$python" ] || python=$(printf '%s\n' $python | sort -u | tr '\n' ' ')

[ -n "$debian$servers$python$rust" ] || exit 0
list() {
    [ -z "$debian" ] || echo "  Debian's packages, installed by apt-get: $debian"
    [ -z "$servers" ] || echo "  servers for tests, unpacked into .build/servers:$servers (Debian's" \
        "$(tools/servers.sh missing $servers | tr '\n' ' ')and what they need)"
    [ -z "$python" ] || echo "  Python's packages, into .build: ${python% }"
    [ -z "$rust" ] || echo "  Rust's packages, into cargo's own folder, of$rust"
}
if [ "${NBLOCK_NO_INSTALL:-}" = 1 ]; then
    echo "NBLOCK_NO_INSTALL is set, and these are missing:" >&2
    list >&2
    exit 1
fi
echo "missing here, and fetched now or when it is used:"
list
if [ -n "$debian" ]; then
    if [ "$(id -u)" -ne 0 ]; then
        echo "only root can install Debian's packages. Run this, and then again what you ran:" >&2
        echo "    sudo apt-get install --no-install-recommends $debian" >&2
        exit 1
    fi
    log=$(mktemp)
    trap 'rm -f "$log"' EXIT
    export DEBIAN_FRONTEND=noninteractive
    # shellcheck disable=SC2086
    if ! { apt-get update && apt-get install --yes --no-install-recommends $debian; } >"$log" 2>&1; then
        tail -n 20 "$log" >&2
        echo "could not install: $debian" >&2
        exit 1
    fi
fi
# shellcheck disable=SC2086
[ -z "$servers" ] || tools/servers.sh fetch $servers >/dev/null
