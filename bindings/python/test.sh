#!/bin/sh
# Tests the Python package: builds its wheel, installs that into a virtual environment of its own, and
# tests what was installed, not what lies here.
#
# NBLOCK_PYTHON_PROFILE=release tests the wheel as it is given away; the default, dev, is built sooner.
set -eu
cd "$(dirname "$0")"
root=$(cd ../.. && pwd)
venv=$root/.build/python-tests
profile=${NBLOCK_PYTHON_PROFILE:-dev}

"$root/tools/need.sh" python3 cc:gcc nm:binutils
# Debian's python3 makes no virtual environment without its package python3-venv.
python3 -c 'import ensurepip' 2>/dev/null || "$root/tools/need.sh" ensurepip:python3-venv

# A virtual environment of another Python, or of other requirements, is made anew.
stamp="$(python3 -VV) $(cksum <tests/requirements.txt)"
if [ "$(cat "$venv/stamp" 2>/dev/null)" != "$stamp" ]; then
    rm -rf "$venv"
    python3 -m venv "$venv"
    "$venv/bin/pip" install --quiet --disable-pip-version-check --requirement tests/requirements.txt
    echo "$stamp" >"$venv/stamp"
fi

# The library's dependencies are the same as for the library's own tests, and are built once for both.
export CARGO_TARGET_DIR="${CARGO_TARGET_DIR:-$root/target}"
wheels=$root/.build/wheels-$profile
rm -rf "$wheels"
"$venv/bin/maturin" build --quiet --profile "$profile" --out "$wheels"
"$venv/bin/pip" install --quiet --disable-pip-version-check --no-deps --no-index --force-reinstall "$wheels"/*.whl

"$venv/bin/python" -m pytest tests
