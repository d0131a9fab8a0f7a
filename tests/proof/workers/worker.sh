#!/bin/sh
# A worker of the history test, in the shell: what worker.c does, each time as a command under `nblock run`.
#
#     worker.sh NBLOCK MOMENT URL KEY DIRECTORY WHO SEED EXPIRE_MS
#
# NBLOCK is the command, MOMENT one that prints the time. The holds have no deadline that we know of: the
# command is there for as long as the lock is held, or it is killed before.
set -eu

# A line in one write: lines of several processes do not mix.
note() { printf '\n%s .\n' "$*" >>"$directory/log"; }

# The command, under the lock.
if [ "$1" = --held ]; then
    shift
    moment=$1 directory=$2 name=$3 asked=$4 timeout_ns=$5 pause=$6
    from=$($moment)
    note waited "$name" "$asked" "$timeout_ns" "$from"
    note granted "$name" "$NBLOCK_FENCE" "$from" 0
    read -r number <"$directory/counter"
    [ "$pause" = 0 ] || sleep "$pause"
    note writing "$name" "$number" "$($moment)"
    printf '%19d\n' $((number + 1)) 1<>"$directory/counter"
    now=$($moment)
    note wrote "$name" "$now"
    note released "$name" "$now"
    exit 0
fi

nblock=$1 moment=$2 directory=$5 who=$6 seed=$7 expire_ms=$8
export NBLOCK_URL="$3"
turn=0
while :; do
    turn=$((turn + 1))
    case $(((seed + turn) % 3)) in 0) timeout=5 ;; 1) timeout=200 ;; 2) timeout=30000 ;; esac
    pause=0
    [ $((turn % 20)) -ne 0 ] || pause=0.1
    asked=$($moment)
    status=0
    said=$("$nblock" run --fence --expire "${expire_ms}ms" --timeout "${timeout}ms" "$4" -- \
        "$0" --held "$moment" "$directory" "$who $turn" "$asked" "${timeout}000000" "$pause" 2>&1) || status=$?
    case $status in
    0) ;;
    75) note waited "$who" "$turn" "$asked" "${timeout}000000" "$($moment)" ;;
    # Not reached, or cut off while it was greeted, which reads like a wrong URL; lost, and the command killed.
    69 | 65 | 76) ;;
    *)
        echo "worker.sh: nblock ended with $status: $said" >&2
        exit 1
        ;;
    esac
done
