#!/bin/sh
# Builds the documentation site into .build/docs: docs/build.sh [--open]
#
# Warnings are errors; links to pages, headings and files that do not exist are among them. With --open, a browser shows
# the site if there is a desktop; otherwise the path is printed.
set -eu
cd "$(dirname "$0")/.."

tools/need.sh docs
tools/venv.sh .build/docs-venv docs/requirements.txt
.build/docs-venv/bin/sphinx-build --quiet --builder html --fresh-env --write-all --nitpicky \
    --fail-on-warning --keep-going --doctree-dir .build/docs-doctrees docs .build/docs

page=$PWD/.build/docs/index.html
if [ "${1:-}" = --open ] && [ -n "${DISPLAY:-}${WAYLAND_DISPLAY:-}" ] && command -v xdg-open >/dev/null; then
    xdg-open "$page"
else
    echo "$page"
fi
