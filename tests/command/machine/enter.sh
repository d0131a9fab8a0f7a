#!/bin/sh
# enter.sh ROOT COMMANDS NBLOCK LIBRARY HEADERS: a machine of its own for the commands of a page, in ROOT, which is an
# empty directory: users, /etc, /var/tmp and the nblock that was built. To be run as root in a mount namespace of its
# own (unshare --mount). COMMANDS has a file for each command, run in order; what each printed is left beside it.
set -eu
root=$1 commands=$2 nblock=$3 library=$4 headers=$5
here=$(cd "$(dirname "$0")" && pwd)

mount --bind "$root" "$root"
cd "$root"
mkdir -p etc home/alice home/bob machine/bin machine/lib machine/include nblock proc dev run srv root tmp var/tmp usr commands
chmod 1777 tmp var/tmp
for directory in bin sbin lib lib64; do
    if [ -L "/$directory" ]; then cp -P "/$directory" .; elif [ -d "/$directory" ]; then mkdir "$directory" && mount --rbind "/$directory" "$directory"; fi
done
for directory in usr proc dev; do mount --rbind "/$directory" "$directory"; done
mount --bind "$commands" commands
cp "$here/sudo" "$here/systemd-run" machine/bin
for file in "$nblock:machine/bin/nblock" "$library:machine/lib/libnblock.so" "$headers:machine/include"; do
    [ -d "${file%:*}" ] || : >"${file#*:}"
    mount --bind "${file%:*}" "${file#*:}"
done
ln -s libnblock.so machine/lib/libnblock.so.0 2>/dev/null || true
printf '%s\n' root:x:0:0::/root:/bin/bash alice:x:1000:1000::/home/alice:/bin/bash bob:x:1001:1001::/home/bob:/bin/bash \
    nobody:x:65534:65534::/:/bin/false >etc/passwd
printf '%s\n' root:x:0: alice:x:1000: bob:x:1001: jobs:x:990:alice,bob >etc/group
echo /machine/lib >etc/ld.so.conf
# Where Debian has its links to compilers and such.
[ ! -d /etc/alternatives ] || cp -R /etc/alternatives etc
chown 1000:1000 home/alice
chown 1001:1001 home/bob
cp "$here/as-user" machine/bin
chmod 755 machine/bin/as-user machine/bin/sudo machine/bin/systemd-run
# So that users may become others, by sudo.
cp "$(command -v setpriv)" machine/bin/setpriv
chmod 4755 machine/bin/setpriv

chroot . /bin/sh -c '
    /usr/sbin/ldconfig || exit 1
    for user in /commands/*.user; do
        command=${user%.user}
        /machine/bin/as-user "$(cat "$user")" bash "$command" </dev/null >"$command.out" 2>&1 || true
    done
'
