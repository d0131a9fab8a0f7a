#!/bin/sh
# Runs every test: `make test`. What is skipped is named, with the reason, and listed at the end.
#
# tests/run.sh [SUITE...] runs only those suites: rust c python ruby history model interop. The suite
# history has workers in every language, installed by those before it.
set -eu

# A script's `make test &` and the like have SIGINT and SIGQUIT ignored, which a shell cannot undo, and all
# that is started would inherit it: tests that send them would wait forever.
if [ -z "${NBLOCK_TEST_SIGNALS:-}" ] && env --default-signal=INT,QUIT true 2>/dev/null; then
    NBLOCK_TEST_SIGNALS=default exec env --default-signal=INT,QUIT "$0" "$@"
fi

cd "$(dirname "$0")/.."

mkdir -p .build
log=.build/test.log
: >"$log"
export CARGO_TERM_COLOR=never

# Runs a suite, its output shown and kept.
run() {
    echo "== $*" | tee -a "$log"
    # A pipe would swallow the status: it is passed beside.
    { { "$@" 2>&1 || echo $? >.build/failed; } | tee -a "$log"; }
    if [ -e .build/failed ]; then
        status=$(cat .build/failed)
        rm -f .build/failed
        echo "failed with status $status: $*" >&2
        exit "$status"
    fi
}
rm -f .build/failed

suites=${*:-rust c python ruby history model interop}
for suite in $suites; do
    case $suite in
    rust | c | python | ruby | history | model | interop) ;;
    *) echo "no suite $suite: rust, c, python, ruby, history, model, interop" >&2; exit 64 ;;
    esac
done
# shellcheck disable=SC2086
tools/need.sh $suites
for suite in $suites; do
    case $suite in
    rust) run cargo test --quiet --no-fail-fast -- --nocapture ;;
    c) run tests/c/run.sh ;;
    python) run bindings/python/test.sh ;;
    ruby) run bindings/ruby/test.sh ;;
    history) run cargo test --quiet --test proof history::of_languages -- --ignored --nocapture ;;
    model)
        # In the library's own directory: what both need is built once.
        run cargo test --quiet --manifest-path tests/model/Cargo.toml --target-dir target -- --nocapture
        ;;
    interop) run tests/interop/run.sh ;;
    esac
done

sed -n 's/^.*\(SKIPPED .*: .*\)$/\1/p' "$log" | sort -u >.build/skipped.txt
if [ -s .build/skipped.txt ]; then
    echo "== skipped, each for the reason given"
    cat .build/skipped.txt
fi
echo "== every suite passed: $suites"
