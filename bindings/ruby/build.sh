#!/bin/sh
# Builds the gem, with the library in it: bindings/ruby/build.sh
#
# The last line says where the gem is. Install it with: gem install --local FILE
set -eu
cd "$(dirname "$0")/../.."

tools/need.sh gem
cargo build --release --quiet

stage=.build/ruby/stage
rm -rf "$stage"
mkdir -p "$stage"
cp -r bindings/ruby/lib bindings/ruby/sig bindings/ruby/nblock.gemspec LICENSE-APACHE LICENSE-MIT "$stage"
strip --strip-unneeded -o "$stage/lib/nblock/libnblock.so" "${CARGO_TARGET_DIR:-target}/release/libnblock.so"

cd "$stage"
rm -f ../nblock-*.gem
gem build --quiet --output=../nblock.gem nblock.gemspec
mv ../nblock.gem "../$(ruby -e 'puts Gem::Specification.load("nblock.gemspec").file_name')"
ls "$PWD"/../nblock-*.gem | sed 's|/stage/\.\.||'
