#!/bin/sh
# Measures `with lock:` beside filelock, fasteners and redis-py's Lock, all in one run. Called by `make bench`.
set -eu
cd "$(dirname "$0")"
root=$(cd ../.. && pwd)
venv=$root/.build/python-bench

"$root/tools/need.sh" python3 cc:gcc redis-server
python3 -c 'import ensurepip' 2>/dev/null || "$root/tools/need.sh" ensurepip:python3-venv
stamp=$(python3 -VV)
if [ "$(cat "$venv/stamp" 2>/dev/null)" != "$stamp" ]; then
    rm -rf "$venv"
    python3 -m venv "$venv"
    "$venv/bin/pip" install --quiet --disable-pip-version-check 'maturin>=1.7,<2' filelock fasteners redis
    echo "$stamp" >"$venv/stamp"
fi
wheels=$root/.build/wheels-release
rm -rf "$wheels"
CARGO_TARGET_DIR="${CARGO_TARGET_DIR:-$root/target}" "$venv/bin/maturin" build --quiet --release --out "$wheels"
"$venv/bin/pip" install --quiet --disable-pip-version-check --no-deps --no-index --force-reinstall "$wheels"/*.whl

# Away from the sources: what is measured is what is installed.
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cp bench.py "$work"
cd "$work"
NBLOCK_DIR=$work/store "$venv/bin/python" bench.py
