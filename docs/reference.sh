#!/bin/sh
# Builds the reference of the C and C++ headers into .build/reference, and fails on any warning: a function, parameter,
# result, field or constant of nblock.h, or a name of nblock.hpp, that is not documented, or named wrongly.
set -eu
cd "$(dirname "$0")/.."

tools/need.sh reference
mkdir -p .build/reference
# Doxygen prints its warnings, and what it does.
reference() {
    name=$1
    shift
    {
        printf '%s\n' "PROJECT_NAME = nblock" "QUIET = YES" "WARN_AS_ERROR = FAIL_ON_WARNINGS" "EXTRACT_STATIC = YES" \
            "GENERATE_LATEX = NO" "SORT_MEMBER_DOCS = NO" "FULL_PATH_NAMES = NO" "HAVE_DOT = NO" \
            "ENABLE_PREPROCESSING = YES" "MACRO_EXPANSION = YES" "EXPAND_ONLY_PREDEF = YES" \
            "PREDEFINED = NBL_MUST_USE=" "OUTPUT_DIRECTORY = .build/reference/$name" "$@"
    } | (mkdir -p ".build/reference/$name" && doxygen -)
}
reference c "INPUT = include/nblock.h" "OPTIMIZE_OUTPUT_FOR_C = YES" "WARN_NO_PARAMDOC = YES"
reference cpp "INPUT = include/nblock.hpp" "EXTENSION_MAPPING = hpp=C++" "JAVADOC_AUTOBRIEF = YES" \
    "EXCLUDE_SYMBOLS = nblock::detail* std"
