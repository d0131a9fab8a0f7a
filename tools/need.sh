#!/bin/sh
# Makes sure that commands are there: need.sh COMMAND[:PACKAGE]...
#
# A command that is missing comes from Debian's package of the same name, or of the one behind the
# colon. Root gets it installed, and is told so; everybody else is told exactly what to install.
set -eu

missing=
for want in "$@"; do
    command=${want%%:*}
    package=${want#*:}
    command -v "$command" >/dev/null 2>&1 || missing="$missing $package"
done
[ -z "$missing" ] && exit 0

if [ "$(id -u)" -ne 0 ]; then
    echo "missing here:$missing" >&2
    echo "install with: apt-get install --no-install-recommends$missing" >&2
    exit 1
fi
echo "installing Debian's packages:$missing"
log=$(mktemp)
trap 'rm -f "$log"' EXIT
export DEBIAN_FRONTEND=noninteractive
# shellcheck disable=SC2086
if ! { apt-get update && apt-get install --yes --no-install-recommends $missing; } >"$log" 2>&1; then
    tail -n 20 "$log" >&2
    echo "could not install:$missing" >&2
    exit 1
fi
