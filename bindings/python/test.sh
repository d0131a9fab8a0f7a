#!/bin/sh
# Tests the Python package: its wheel is built, installed into a virtual environment, and what was
# installed is tested, not what lies here. NBLOCK_PYTHON_PROFILE=release tests it as it is given away.
set -eu
cd "$(dirname "$0")"
root=$(cd ../.. && pwd)
venv=$root/.build/python-tests

"$root/tools/need.sh" python
./wheel.sh "$venv" "${NBLOCK_PYTHON_PROFILE:-dev}" requirements-tests.txt
"$venv/bin/python" -m pytest tests
