#!/bin/sh
# Makes a virtual environment with what a file of requirements lists: venv.sh [--is-current] VENV REQUIREMENTS
#
# An environment of another Python, or of other requirements, is replaced. With --is-current, nothing is made: the exit
# status says whether the environment is there and is not to be replaced.
set -eu
only_look=
if [ "$1" = --is-current ]; then
    only_look=1
    shift
fi
venv=$1
requirements=$2

stamp="$(python3 -VV 2>/dev/null) $(cat "$requirements")"
if [ "$(cat "$venv/stamp" 2>/dev/null)" = "$stamp" ]; then
    exit 0
elif [ -n "$only_look" ]; then
    exit 1
fi
rm -rf "$venv"
python3 -m venv "$venv"
"$venv/bin/pip" --quiet --disable-pip-version-check install --requirement "$requirements"
echo "$stamp" >"$venv/stamp"
