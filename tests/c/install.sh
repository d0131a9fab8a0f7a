#!/bin/sh
# Installs, and builds and runs programs of projects that see nothing but what was installed.
set -eu
cd "$(dirname "$0")/../.."
top=$PWD
version=$(sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml | head -n 1)

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export NBLOCK_DIR="$work/store"
unset NBLOCK_URL PKG_CONFIG_PATH LD_LIBRARY_PATH

fail() {
    echo "$*" >&2
    exit 1
}

# A program prints the version of the library that it found.
prints_version() {
    [ "$("$@")" = "$version" ] || fail "not $version: $*"
}

make --no-print-directory install PREFIX="$work/prefix" >"$work/install.log" 2>&1 ||
    { cat "$work/install.log"; exit 1; }
cp -r tests/c/outside "$work/outside"
cd "$work/outside"
export PKG_CONFIG_PATH="$work/prefix/lib/pkgconfig"

echo "  pkg-config"
[ "$(pkg-config --modversion nblock)" = "$version" ] || fail "another version in nblock.pc"
# shellcheck disable=SC2046
cc -std=c99 uses_c.c -o c_shared $(pkg-config --cflags --libs nblock) -Wl,-rpath,"$work/prefix/lib"
prints_version ./c_shared
readelf -d c_shared | grep -q 'NEEDED.*\[libnblock\.so\.0\]' || fail "not linked by its soname"
# shellcheck disable=SC2046
g++ -std=c++17 uses_cpp.cpp -o cpp_shared $(pkg-config --cflags --libs nblock) -Wl,-rpath,"$work/prefix/lib"
prints_version ./cpp_shared

echo "  static linking"
mkdir static
cp "$work/prefix/lib/libnblock.a" static
libs=$(pkg-config --static --libs nblock | sed "s|-L[^ ]*|-Lstatic|")
# shellcheck disable=SC2046,SC2086
cc uses_c.c -o c_static $(pkg-config --cflags nblock) $libs
prints_version ./c_static
! readelf -d c_static | grep -q libnblock || fail "not static"
# With the C library too: it warns of what it looks up when the program runs.
# shellcheck disable=SC2046,SC2086
cc -static uses_c.c -o c_all_static $(pkg-config --cflags nblock) $libs 2>static.log || { cat static.log; exit 1; }
prints_version ./c_all_static
# The static library, too, shows only what the header declares.
nm --defined-only --extern-only static/libnblock.a | awk 'NF == 3 { print $3 }' | LC_ALL=C sort |
    diff "$top/tests/abi/symbols.txt" -

echo "  CMake"
for wanted in "" 0.1 "$version"; do
    cmake -S . -B "cmake-$wanted" -DWANTED="$wanted" -DCMAKE_PREFIX_PATH="$work/prefix" >cmake.log 2>&1 ||
        { cat cmake.log; exit 1; }
done
cmake --build "cmake-0.1" >cmake.log 2>&1 || { cat cmake.log; exit 1; }
for program in c_shared c_static cpp_shared cpp_static; do prints_version "cmake-0.1/$program"; done
for wanted in 0.2 1.0 99; do
    ! cmake -S . -B "cmake-$wanted" -DWANTED=$wanted -DCMAKE_PREFIX_PATH="$work/prefix" >/dev/null 2>&1 ||
        fail "CMake takes $version for $wanted"
done

echo "  dlopen"
cc loads.c -o loads -I"$work/prefix/include" -ldl
./loads "$work/prefix/lib/libnblock.so.0"

echo "  the command, its manual and completions"
"$work/prefix/bin/nblock" run installed -- true
grep -q '^\.TH NBLOCK 1' "$work/prefix/share/man/man1/nblock.1"
bash -n "$work/prefix/share/bash-completion/completions/nblock"

echo "  a stage for packages, and uninstalling"
cd "$top"
make --no-print-directory install PREFIX=/usr LIBDIR=/usr/lib/here DESTDIR="$work/stage" >"$work/install.log" 2>&1 ||
    { cat "$work/install.log"; exit 1; }
(cd "$work/stage" && find . ! -type d | LC_ALL=C sort) | sed "s/$version/VERSION/" | diff tests/c/installed.txt -
! grep -rqF "$work" "$work/stage/usr/lib/here/pkgconfig" "$work/stage/usr/lib/here/cmake" ||
    fail "the stage's name is in a file"
if command -v systemd-tmpfiles >/dev/null; then
    systemd-tmpfiles --root="$work/tmpfiles" --create "$work/stage/usr/lib/tmpfiles.d/nblock.conf" ||
        fail "systemd-tmpfiles does not take our file"
    [ "$(id -u)" -ne 0 ] || [ "$(stat -c %a "$work/tmpfiles/var/tmp/nblock-0")" = 700 ] || fail "not for root alone"
else
    echo "SKIPPED tmpfiles: systemd-tmpfiles is not installed (apt-get install systemd)"
fi
# Moved to another place, the CMake package finds what it came with.
mv "$work/stage/usr" "$work/moved"
cmake -S "$work/outside" -B "$work/outside/moved" -DCMAKE_PREFIX_PATH="$work/moved" \
    -Dnblock_DIR="$work/moved/lib/here/cmake/nblock" >"$work/cmake.log" 2>&1 || { cat "$work/cmake.log"; exit 1; }
cmake --build "$work/outside/moved" --target c_shared >"$work/cmake.log" 2>&1 || { cat "$work/cmake.log"; exit 1; }
prints_version "$work/outside/moved/c_shared"
make --no-print-directory uninstall PREFIX="$work/prefix" >/dev/null
[ -z "$(find "$work/prefix" ! -type d)" ] || fail "left behind: $(find "$work/prefix" ! -type d)"

if command -v cargo-cinstall >/dev/null 2>&1; then
    echo "  cargo cinstall"
    cargo cinstall --package nblock --quiet --prefix=/usr --libdir=/usr/lib --destdir="$work/cargo-c"
    for file in include/nblock.h include/nblock.hpp lib/libnblock.so.0 lib/libnblock.a lib/pkgconfig/nblock.pc; do
        [ -e "$work/cargo-c/usr/$file" ] || fail "cargo cinstall does not install $file"
    done
else
    echo "SKIPPED cargo-cinstall: cargo-c is not installed (cargo install cargo-c)"
fi
