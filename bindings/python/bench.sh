#!/bin/sh
# Measures `with lock:` beside filelock, fasteners and redis-py's Lock, all in one run. Called by `make bench`.
set -eu
cd "$(dirname "$0")"
root=$(cd ../.. && pwd)
venv=$root/.build/python-bench

"$root/tools/need.sh" python-bench
./wheel.sh "$venv" release requirements-bench.txt

# Away from the sources: what is measured is what is installed.
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cp bench.py "$work"
cd "$work"
# A server of this run's own, which ends with it.
"$root/tools/servers.sh" start redis "$work/redis" >redis.url
trap '"$root/tools/servers.sh" stop "$work/redis"; rm -rf "$work"' EXIT
NBLOCK_REDIS_PORT=$(sed -n 's/^port=//p' redis.url) NBLOCK_DIR=$work/store "$venv/bin/python" bench.py
