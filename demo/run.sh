#!/bin/sh
# The main job, on real work: programs in C and loops in the shell, and programs in Ruby and Python
# where these are there, increment one plain file under one lock, all at once, and some are killed on the
# way. Afterwards the sums are checked.
set -eu
cd "$(dirname "$0")/.."
build=$(realpath "${CARGO_TARGET_DIR:-target}")/release

work=$(mktemp -d)
pids=
cleanup() {
    # shellcheck disable=SC2086
    [ -z "$pids" ] || kill -9 $pids 2>/dev/null || true
    rm -rf "$work"
}
trap cleanup EXIT
trap 'exit 130' INT TERM
export NBLOCK_DIR="$work/store"
unset NBLOCK_URL
counter=$work/counter
log=$work/log
printf '%019d\n' 0 >"$counter"
: >"$log"

cc -std=c11 -O2 -Wall -Wextra -Iinclude demo/increment.c -o "$work/increment" \
    -L"$build" -lnblock -Wl,-rpath,"$build"

# The store is made by the library that was built here.
"$build/nblock" ping >"$work/ping"

count=1000
rounds=80
start=$(date +%s)
echo "== on one file: five C programs ($count increments each) and four shell loops ($rounds each);"
echo "   two of the programs and the nblock of one loop are killed on the way"

c_program() {
    "$work/increment" "$1" "$2" "$counter" "$log" &
    pids="$pids $!"
}
ruby_program() {
    NBLOCK_LIBRARY=$build/libnblock.so ruby -Ibindings/ruby/lib demo/increment.rb "$1" "$2" "$counter" "$log" &
    pids="$pids $!"
}
# Where bindings/python/test.sh has installed the package.
python=.build/python-tests/bin/python
python_program() {
    "$python" demo/increment.py "$1" "$2" "$counter" "$log" &
    pids="$pids $!"
}
# Ends when its nblock fails, or is killed: its number is in the file NAME, and then there is NAME.ended.
shell_loop() {
    (
        round=0
        while [ $round -lt "$2" ]; do
            round=$((round + 1))
            "$build/nblock" run --expire 1 --timeout 60 jobs:demo -- demo/once.sh "$1" "$counter" "$log" &
            echo $! >"$work/$1"
            # The shell reports a kill that is meant.
            wait $! 2>/dev/null || { : >"$work/$1.ended"; exit; }
        done
    ) &
    pids="$pids $!"
}
for name in c1 c2 c3; do c_program $name $count; done
for name in sh1 sh2 sh3; do shell_loop $name $rounds; done
programs=9
if ruby -rffi -e '' 2>/dev/null; then
    echo "   and two Ruby programs ($count each)"
    for name in rb1 rb2; do ruby_program $name $count; done
    programs=$((programs + 2))
else
    echo "   (without Ruby: apt-get install ruby ruby-ffi)"
fi
# It has a library of its own in it: does that one open the store that we use?
if "$python" -c 'import nblock; nblock.locks()' 2>/dev/null; then
    echo "   and two Python programs ($count each)"
    for name in py1 py2; do python_program $name $count; done
    programs=$((programs + 2))
else
    echo "   (no Python programs: run bindings/python/test.sh first, which installs the package)"
fi
finishing=$pids
pids=
for name in c4-killed c5-killed; do
    c_program $name 1000000
    echo $! >"$work/$name"
done
shell_loop sh4-killed 1000000
doomed=$pids
pids="$finishing $doomed"

# Kills each victim after it has done some, wherever it is then. With an nblock its command goes.
kills=0
for victim in c4-killed:200 c5-killed:400 sh4-killed:30; do
    name=${victim%%:*}
    looks=0
    until [ "$(grep -c " $name " "$log")" -ge "${victim##*:}" ]; do
        looks=$((looks + 1))
        [ $looks -lt 3000 ] || { echo "$name gets nowhere" >&2; exit 1; }
        sleep 0.02
    done
    case $name in
        # What was killed may have ended just before, and its loop goes on with the next.
        sh*) until [ -e "$work/$name.ended" ]; do kill -9 "$(cat "$work/$name")" 2>/dev/null || :; done ;;
        *) kill -9 "$(cat "$work/$name")" ;;
    esac
    kills=$((kills + 1))
done

failed=0
for pid in $finishing; do wait "$pid" || failed=$((failed + 1)); done
for pid in $doomed; do wait "$pid" 2>/dev/null || true; done
pids=
seconds=$(($(date +%s) - start))

sort -n -k1,1 "$log" >"$work/sorted"
awk -v programs="$programs" -v kills="$kills" -v failed="$failed" -v final="$(sed 's/^0*//' "$counter")" -v seconds="$seconds" '
    { done[$2]++; total++ }
    $1 == number { twice++ }
    $3 + 0 <= fence { backwards++ }
    NR > 1 && $2 != name { handovers++ }
    { number = $1; name = $2; fence = $3 + 0 }
    END {
        share = 100 * handovers / (total - 1)
        for (who in done) printf "   %-12s %6d increments\n", who, done[who] | "sort"
        close("sort")
        printf "== %d increments in %d s by %d programs; %d killed with SIGKILL\n", total, seconds, length(done), kills
        printf "   %d hand-overs: %.0f %% of the grants went to another program than the one before\n", handovers, share
        printf "   the file says %d: %d were cut off by a kill between writing the file and noting it\n", final, final - total
        printf "   numbers given twice: %d; fences that did not grow: %d; programs that failed: %d\n", twice, backwards, failed
        if (twice || backwards || failed || final < total || final - total > kills || share < 30 || length(done) != programs) {
            print "== SOMETHING WAS LOST, OR NOT SHARED"
            exit 1
        }
        print "== nothing was lost"
    }' "$work/sorted"

# The same programs with another URL: many machines, and every program that locks in Redis.
if ! tools/servers.sh fetch redis >/dev/null; then
    echo "== no Redis server could be had: its round is left out"
    exit 0
fi
tools/servers.sh start redis "$work/redis" >"$work/redis.url"
trap 'tools/servers.sh stop "$work/redis"; cleanup' EXIT
NBLOCK_URL=$(sed -n 's/^url=//p' "$work/redis.url")
export NBLOCK_URL
redis_cli() { .build/servers/bin/redis-cli -p "$(sed -n 's/^port=//p' "$work/redis.url")" "$@"; }
counter=$work/counter-redis
log=$work/log-redis
printf '%019d\n' 0 >"$counter"
: >"$log"
echo "== on Redis: two C programs (200 increments each) and two shell loops (20 each)"
for name in c1 c2; do c_program $name 200; done
for name in sh1 sh2; do shell_loop $name 20; done
for pid in $pids; do wait "$pid"; done
pids=
total=$(sed 's/^0*//' "$counter")
echo "   the file says $total"
[ "$total" = 440 ] || { echo "== SOMETHING WAS LOST"; exit 1; }
# As redis-py and redlock-rb take it.
redis_cli set jobs:theirs some-token NX PX 60000 >/dev/null
"$build/nblock" run --no-wait jobs:theirs -- true 2>/dev/null && { echo "== IT WAS GRANTED TO TWO"; exit 1; }
echo "   a lock that another library took is not granted:"
"$build/nblock" list | sed 's/^/   /'
echo "== nothing was lost"
