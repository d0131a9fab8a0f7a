#!/bin/sh
# Measures `with lock:` beside filelock, fasteners and redis-py's Lock, all in one run. Called by `make bench`.
set -eu
cd "$(dirname "$0")"
root=$(cd ../.. && pwd)
venv=$root/.build/python-bench

"$root/tools/need.sh" redis-server
./wheel.sh "$venv" release filelock fasteners redis

# Away from the sources: what is measured is what is installed.
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cp bench.py "$work"
cd "$work"
NBLOCK_DIR=$work/store "$venv/bin/python" bench.py
