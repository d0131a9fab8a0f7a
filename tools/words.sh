#!/bin/sh
# Finds phrases of tools/words.txt in what users read, and prints the file, the line, and what to write instead.
#
# tools/words.sh           the pages that have been rewritten; fails if anything is found
# tools/words.sh --all     everything that users read: pages, headers, docstrings, stubs, the command's help and man
#                          page, and messages in src; prints a count for each file, and does not fail
# tools/words.sh FILE...   those files; fails if anything is found
set -eu
cd "$(dirname "$0")/.."

# Pages that pass. A page is added here once it does.
clean=$(git ls-files README.md CONTRIBUTING.md CHANGELOG.md 'docs/*.md' 'docs/decisions/*.md' 'bindings/*.md')

everything() {
    git ls-files README.md CONTRIBUTING.md CHANGELOG.md 'docs/*.md' 'docs/decisions/*.md' 'include/*.h' 'include/*.hpp' \
        'bindings/*.md' 'bindings/python/python/nblock/*' 'bindings/python/src/*.rs' 'bindings/ruby/lib/*.rb' \
        'bindings/ruby/lib/nblock/*.rb' 'bindings/ruby/sig/*.rbs' 'src/*.rs'
}

# The text of a file that users read, each line with its number: prose of pages; comments of headers, docstrings and
# stubs; string literals of Rust (of the command's arguments also the comments, which are its help).
text() {
    case $1 in
    *.md) awk '/^ *```/ { code = !code; next } !code && !/^    / { gsub(/`[^`]*`/, "` `"); print NR ":" $0 }' "$1" ;;
    src/bin/nblock/arguments.rs | bindings/python/src/*.rs)
        awk '/^#\[cfg\(test\)\]/ { exit } /^ *\/\/\/|"/ { gsub(/`[^`]*`/, "` `"); print NR ":" $0 }' "$1" ;;
    *.rs)
        # A literal may go on over lines that end with a backslash.
        awk '/^#\[cfg\(test\)\]/ { exit }
            /^ *\/\// && !more { next }
            { line = $0; out = more ? line : ""
              if (!more) while (match(line, /"([^"\\]|\\.)*("|\\?$)/)) {
                  out = out " " substr(line, RSTART, RLENGTH); line = substr(line, RSTART + RLENGTH) }
              more = out ~ /\\$/
              if (out != "") print NR ":" out }' "$1" ;;
    *) awk '{ gsub(/`[^`]*`/, "` `"); print NR ":" $0 }' "$1" ;;
    esac
}

patterns=$(mktemp)
trap 'rm -f "$patterns"' EXIT
grep -v '^#' tools/words.txt | cut -f 1 >"$patterns"

# What is written instead, for the first phrase that a line contains.
advice() {
    grep -v '^#' tools/words.txt | while IFS='	' read -r phrase instead; do
        if printf '%s\n' "$1" | grep -qiE -- "$phrase"; then
            printf '%s' "$instead"
            return
        fi
    done
}

if [ "${1:-}" = --all ]; then
    total=0
    for file in $(everything); do
        count=$(text "$file" | grep -ciEf "$patterns" || true)
        total=$((total + count))
        [ "$count" = 0 ] || printf '%5d %s\n' "$count" "$file"
    done
    printf '%5d lines in all\n' "$total"
    exit
fi

# shellcheck disable=SC2086 # a list of pages
[ $# -gt 0 ] || set -- $clean
found=0
for file in "$@"; do
    hits=$(text "$file" | grep -iEf "$patterns" || true)
    [ -n "$hits" ] || continue
    found=1
    printf '%s\n' "$hits" | while IFS= read -r hit; do
        printf '%s:%s\n    write: %s\n' "$file" "$hit" "$(advice "$hit")"
    done
done
exit $found
