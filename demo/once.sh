#!/bin/sh
# What increment.c does, once, in the shell: nblock run jobs:demo -- demo/once.sh NAME COUNTER LOG
set -eu
number=$(($(sed 's/^0*//; s/^$/0/' "$2") + 1))
printf '%019d\n' "$number" | dd of="$2" conv=notrunc status=none
echo "$number $1 $NBLOCK_FENCE" >>"$3"
