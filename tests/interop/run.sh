#!/bin/sh
# Has another driver read what nblock writes, where NBLOCK_TEST_RETHINKDB_URL names a server.
set -eu
cd "$(dirname "$0")"

if [ -z "${NBLOCK_TEST_RETHINKDB_URL:-}" ]; then
    echo "SKIPPED interop: NBLOCK_TEST_RETHINKDB_URL is not set"
    exit 0
fi
cargo run --quiet
