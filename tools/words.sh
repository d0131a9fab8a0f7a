#!/bin/sh
# Finds phrases of tools/words.txt in pages, comments and messages, and prints the file, the line, and what to write
# instead: tools/words.sh [FILE...]; without files, all that are tracked. Fails if anything is found.
set -eu
cd "$(dirname "$0")/.."

# Not looked at: the phrases themselves, and inputs that are not ours.
everything() {
    git ls-files '*.md' '*.rs' '*.h' '*.hpp' '*.c' '*.cpp' '*.py' '*.pyi' '*.rb' '*.rbs' '*.sh' '*.lua' '*.mk' \
        Makefile Cargo.toml .ci/run | grep -v '^tools/words\.'
}

# The prose of a file, each line with its number: of pages all but code; of sources comments and literals.
text() {
    case $1 in
    *.md) awk '/^ *```/ { code = !code; next } !code && !/^    / { gsub(/`[^`]*`/, "` `"); print NR ":" $0 }' "$1" ;;
    *.rs | *.c | *.cpp | *.h | *.hpp) prose '//' "$1" ;;
    *.py | *.pyi | *.rb | *.rbs) prose '#' "$1" ;;
    *) awk '{ gsub(/`[^`]*`/, "` `"); print NR ":" $0 }' "$1" ;;
    esac
}

# Comments and literals. What goes on over lines: comments between /* and */, docstrings, and literals with a backslash
# at the end of a line.
prose() {
    awk -v mark="$1" '
        {
            line = $0
            gsub(/`[^`]*`/, "` `", line)
            # Characters that are quotes.
            gsub(/\x27\\?"\x27/, "", line)
            out = ""
            while (line != "") {
                if (inside == "") {
                    # The first mark of a comment or a literal.
                    if (!match(line, mark == "#" ? "\"\"\"|\"|#" : "//|/\\*|\"")) break
                    inside = substr(line, RSTART, RLENGTH)
                    line = substr(line, RSTART + RLENGTH)
                }
                if (inside == mark) { out = out " " line; inside = line = ""; break }
                end = inside == "/*" ? "\\*/" : inside == "\"\"\"" ? "\"\"\"" : "([^\"\\\\]|\\\\.)*\""
                if (match(line, end)) {
                    out = out " " substr(line, 1, RSTART + RLENGTH - 1)
                    line = substr(line, RSTART + RLENGTH)
                    inside = ""
                } else {
                    out = out " " line
                    # A literal that does not go on was none.
                    if (inside == "\"" && line !~ /\\$/) inside = ""
                    line = ""
                }
            }
            if (out != "") print NR ":" out
        }' "$2"
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

# shellcheck disable=SC2046 # a list of files
[ $# -gt 0 ] || set -- $(everything)
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
