#!/bin/sh
# Makes a virtual environment with what a file of requirements lists: venv.sh VENV REQUIREMENTS
#
# An environment of another Python, or of other requirements, is replaced. tools/need.sh reads the stamp.
set -eu
venv=$1
requirements=$2

stamp="$(python3 -VV) $(cat "$requirements")"
if [ "$(cat "$venv/stamp" 2>/dev/null)" != "$stamp" ]; then
    rm -rf "$venv"
    python3 -m venv "$venv"
    "$venv/bin/pip" --quiet --disable-pip-version-check install --requirement "$requirements"
    echo "$stamp" >"$venv/stamp"
fi
