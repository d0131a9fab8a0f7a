#!/bin/sh
# Tests the gem as it is installed: builds it, installs it into a directory of its own, and loads it
# from there.
#
# With NBLOCK_TEST_RETHINKDB_URL the suite also runs on that server. With NBLOCK_TEST_NOBRAINER, the
# directory of NoBrainer's sources, it also runs beside NoBrainer, whose gems Ruby has to find
# (installed, or through RUBYLIB and RUBYOPT). What is not there is named as skipped.
set -eu
cd "$(dirname "$0")/../.."

tools/need.sh ruby

gem=$(bindings/ruby/build.sh | tail -n 1)
export GEM_HOME="$PWD/.build/ruby/home"
rm -rf "$GEM_HOME"
gem install --quiet --local --no-document "$gem"
unset NBLOCK_LIBRARY NBLOCK_URL NBLOCK_DIR

ruby -w bindings/ruby/test/run.rb
if [ -n "${NBLOCK_TEST_NOBRAINER:-}" ]; then
    ruby -I"$NBLOCK_TEST_NOBRAINER/lib" bindings/ruby/test/beside_nobrainer.rb
else
    echo "SKIPPED ruby-nobrainer: NBLOCK_TEST_NOBRAINER does not name a directory with NoBrainer's sources"
fi
