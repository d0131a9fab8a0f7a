#!/bin/bash
# Builds the examples in C and in C++ and has them do what they are for.
set -euo pipefail
cd "$(dirname "$0")/../.."

build=$PWD/.build/c
target=${CARGO_TARGET_DIR:-$PWD/target}/debug
work=$(mktemp -d)
children=()
trap 'kill -9 "${children[@]}" 2>/dev/null || true; rm -rf "$work"' EXIT
export NBLOCK_DIR="$work/store"
unset NBLOCK_URL

fail() {
    echo "$*" >&2
    exit 1
}

# Waits until a file has a line, for as long as it takes a loaded machine.
has_line() {
    for _ in $(seq 1500); do
        grep -qsE "$2" "$1" && return
        sleep 0.02
    done
    fail "no line \"$2\" in: $(cat "$1")"
}

ends_well() {
    kill -TERM "$1"
    wait "$1" || fail "ended with status $?"
}

# Three runners at once: every job is done, and once.
job_runner() {
    local jobs="$work/jobs" runners=() sum
    rm -rf "$jobs"
    mkdir "$jobs"
    for n in 1 2 3 4 5 6 7 8 9 10 11 12; do echo "echo $n >>'$jobs/log'; sleep 0.02" >"$jobs/$n.job"; done
    for n in 1 2 3; do
        "$1" "$jobs" >"$work/runner.$n" &
        runners+=($!)
        children+=($!)
    done
    for runner in "${runners[@]}"; do wait "$runner" || fail "a runner ended with status $?"; done
    [ "$(sort -n "$jobs/log" | tr '\n' ' ')" = "1 2 3 4 5 6 7 8 9 10 11 12 " ] || fail "done: $(cat "$jobs/log")"
    [ "$(find "$jobs" -name '*.done' | wc -l)" = 12 ] || fail "not all are renamed"
    sum=$(cat "$work"/runner.? | awk '{ sum += $1 } END { print sum }')
    [ "$sum" = 12 ] || fail "$sum jobs were counted"
}

# The lead goes to the other when it is broken, and when the leader is asked to end.
leader() {
    "$1" first >"$work/first" &
    local first=$!
    children+=($first)
    has_line "$work/first" '^first leads'
    "$1" second >"$work/second" &
    local second=$!
    children+=($second)
    # Waiting, it has the lead before the first one knows of its loss.
    has_line "$work/second" '^second stands for election'
    "$target/nblock" break leader >/dev/null
    has_line "$work/first" '^first has lost the lead'
    has_line "$work/second" '^second leads'
    ends_well $second
    has_line "$work/second" '^second ends'
    ends_well $first
    has_line "$work/first" '^first ends'
    [ -z "$("$target/nblock" list --json | grep '"leader"')" ] || fail "the lead was not given back"
}

says() { echo "$2" >&"$1"; }

hears() {
    local line
    read -r -t 30 -u "$1" line || fail "no answer"
    [[ $line =~ $2 ]] || fail "heard \"$line\", not \"$2\""
    heard=$line
}

# While one visitor waits, others are served; who hangs up gives way.
epoll_server() {
    "$1" >"$work/port" &
    local server=$! port a b c d fence
    children+=($server)
    has_line "$work/port" '^[0-9]+$'
    port=$(cat "$work/port")
    exec {a}<>"/dev/tcp/127.0.0.1/$port" {b}<>"/dev/tcp/127.0.0.1/$port" {c}<>"/dev/tcp/127.0.0.1/$port" \
        {d}<>"/dev/tcp/127.0.0.1/$port"
    says "$a" table
    hears "$a" '^table [0-9]+$'
    fence=${heard#table }
    says "$b" table
    says "$c" chair
    hears "$c" '^chair [0-9]+$'
    says "$d" ""
    hears "$d" 'got an empty one'
    exec {a}>&-
    hears "$b" '^table [0-9]+$'
    [ "${heard#table }" -gt "$fence" ] || fail "fence $heard after $fence"
    exec {c}>&- {d}>&-
    ends_well $server
    exec {b}>&-
    [ "$("$target/nblock" list --json | grep -cE 'table|chair')" = 0 ] || fail "locks were left behind"
}

link=(-L"$build/lib" -lnblock -Wl,-rpath,"$build/lib")

# The programs of the page "Start".
for name in first_lock.c first_lock.cpp; do
    echo "  $name of docs/start.md"
    awk -v name="$name" '/^```/ { shown = $2 == name; next } shown' docs/start.md >"$work/$name"
    case $name in *.c) compiler="cc -std=c11" ;; *) compiler="c++ -std=c++17" ;; esac
    $compiler -Wall -Wextra -Wpedantic -Werror -Iinclude "$work/$name" -o "$work/first_lock" "${link[@]}"
    [ "$("$work/first_lock")" = working ] || fail "$name did not work"
done

for language in c cpp; do
    for example in job_runner leader epoll_server; do
        echo "  $example in $language"
        # What the other language's program said is not to be taken for this one's.
        rm -f "$work/port" "$work/first" "$work/second" "$work"/runner.*
        case $language in
        c) cc -std=gnu11 -g -Wall -Wextra -Werror -Iinclude "examples/c/$example.c" -o "$work/$example" \
            "${link[@]}" ;;
        cpp) g++ -std=c++17 -g -Wall -Wextra -Werror -Iinclude "examples/cpp/$example.cpp" -o "$work/$example" \
            "${link[@]}" ;;
        esac
        $example "$work/$example"
    done
done
