# Makes of nblock.h a C program that prints the layout of every struct and the value of every number in it, in its
# order, to be compared with layout.txt: awk -f tests/abi/layout.awk include/nblock.h

BEGIN {
    print "#include <stdio.h>\n#include <nblock.h>\nint main(void)\n{"
}

/^typedef struct nbl_[a-z_]+ \{$/ {
    struct = $3
    printf "    printf(\"%s: %%zu bytes, aligned to %%zu\\n\", sizeof(%s), _Alignof(%s));\n", struct, struct, struct
    next
}

/^}/ { struct = "" }

struct && /;$/ && !/^ *\/?\*/ {
    field = $0
    gsub(/\[.*|;/, "", field)
    sub(/.*[ *]/, "", field)
    place = "offsetof(" struct ", " field ")"
    printf "    printf(\"  %%-20s at %%3zu, %%3zu bytes\\n\", \"%s\", %s, sizeof(((%s *)0)->%s));\n", field, place, struct, field
}

/^typedef (int|uint)[0-9]+_t nbl_[a-z_]+_t;$/ {
    sub(/;/, "", $3)
    printf "    printf(\"%s: %%zu bytes\\n\", sizeof(%s));\n", $3, $3
}

/^#define NBL_[A-Z_]+ / && $2 !~ /_INIT$|^NBL_MUST_USE$/ { printf "    printf(\"%%-24s %%lld\\n\", \"%s\", (long long)(%s));\n", $2, $2 }

END { print "    return 0;\n}" }
