#!/bin/sh
# Builds the wheel and installs it into a virtual environment: wheel.sh VENV PROFILE REQUIREMENTS
#
# The environment is made where it is not there yet, with what the file REQUIREMENTS lists, maturin among it.
# PROFILE is cargo's: release is what is given away, dev is built sooner.
set -eu
cd "$(dirname "$0")"
root=$(cd ../.. && pwd)
venv=$1
profile=$2
requirements=$3

"$root/tools/need.sh" wheel
"$root/tools/venv.sh" "$venv" "$requirements"

# Apart from the library's own builds: libnblock.rlib has that one name in every build, and this one, with
# dependencies of another lock file, would take the place of the one that cargo believes to be there.
export CARGO_TARGET_DIR="$root/.build/wheel-target"
wheels=$root/.build/wheels-$profile
rm -rf "$wheels"
log=$(mktemp)
trap 'rm -f "$log"' EXIT
if ! "$venv/bin/maturin" build --profile "$profile" --out "$wheels" >"$log" 2>&1; then
    cat "$log" >&2
    exit 1
fi
"$venv/bin/pip" --quiet --disable-pip-version-check install --no-deps --no-index --force-reinstall "$wheels"/*.whl
