#!/bin/sh
# Servers for tests and measurements, without installing anything: Debian's packages are downloaded
# and unpacked into .build/servers, and a server that runs keeps all it has in one directory. No root
# is needed, and no service of the machine is touched.
#
# servers.sh fetch [NAME...]   unpacks what is missing of redis, postgresql, pgbouncer, etcd (all of them
#                              if none is named) and prints the directory with the programs:
#                              redis-server, redis-sentinel, redis-cli, postgres, initdb, pg_ctl, psql,
#                              pgbouncer, etcd, etcdctl
# servers.sh missing [NAME...] prints the Debian packages that fetch would download
#
# servers.sh start NAME DIR [--port PORT] [--to PORT] [-- OPTION...]
#                              starts a server on the loopback, with everything in DIR, and prints
#                              url=, port=, pid= and (not etcd) socket=, a line each. It answers by then.
#                              In a DIR that was used before it goes on with its data, on the same port.
#                              --to is the port of the server behind a pgbouncer or a sentinel.
#                              Options: arguments of redis-server and etcd, NAME=VALUE of postgresql,
#                              lines of pgbouncer's and the sentinel's configuration.
# servers.sh run ...           the same, and stops the server when its own standard input ends: a test
#                              that is killed leaves no server behind
# servers.sh stop DIR [KILL]   ends that server and waits for its end; with KILL by SIGKILL
#
# NAME is redis, sentinel, postgresql, pgbouncer or etcd. The log is DIR/log. PostgreSQL and PgBouncer
# refuse to run as root, so root runs these as nobody; DIR must then be below directories that nobody may enter,
# /tmp for example. Socket paths are short by rule: keep DIR below 80 characters.
#
# A download is tried three times. NBLOCK_NO_INSTALL=1 downloads nothing, and fails with the list.
set -eu

self=$0
repository=$(cd "$(dirname "$0")/.." && pwd)
servers=$repository/.build/servers

fail() {
    echo "servers.sh: $*" >&2
    exit 1
}

# Looking for programs is for Debian and what is derived from it.
need_apt() {
    command -v apt-get >/dev/null && command -v dpkg >/dev/null && return
    fail "needs apt-get and dpkg (Debian and what is derived from it) to download $*"
}

# apt-get or apt-cache with lists and caches of the build folder where the machine's own don't do.
own_lists=
apt() {
    command=$1
    shift
    set -- -o APT::Sandbox::User="$(id -un)" -o Dir::Cache="$servers/apt/cache" "$@"
    [ -z "$own_lists" ] || set -- -o Dir::State::lists="$servers/apt/lists" "$@"
    "apt-$command" "$@"
}

# The Debian packages of a server. What they depend on is found out, and is not listed here.
packages_of() {
    case $1 in
    redis) echo redis-tools ;; # the server's program is in there; redis-server has its service
    postgresql)
        package=$(apt cache depends postgresql 2>/dev/null | sed -n 's/^ *Depends: \(postgresql-[0-9]*\)$/\1/p' | head -n 1)
        [ -n "$package" ] || package=postgresql-15
        echo "$package postgresql-client-${package#postgresql-}"
        ;;
    pgbouncer) echo pgbouncer ;;
    etcd) echo etcd-server etcd-client ;;
    *) fail "no server $1: redis, postgresql, pgbouncer, etcd" ;;
    esac
}

# The servers among those named that are not unpacked yet.
absent() {
    for name in "$@"; do
        [ -e "$servers/unpacked/$name" ] || echo "$name"
    done
}

# With what is not installed here of what they depend on, but what is only for a service, for
# compiling, or for PostgreSQL's compiler of expressions (which is as large as all the rest).
closure() {
    apt get --simulate install --no-install-recommends "$@" | sed -n 's/^Inst \([^ ]*\) .*/\1/p' |
        grep -Ev -e '-(common|dev)$|^(perl|libperl|debconf|libc6$|libc-bin|libc-l10n|libllvm|libz3)' \
            -e '^(ssl-cert|adduser|passwd|openssl|lsb-base|sysvinit-utils|init-system-helpers|ucf|sensible-utils|netbase|tzdata|locales)'
}

download() {
    mkdir -p "$servers/apt/lists/partial" "$servers/apt/cache/archives/partial" "$servers/apt/packages"
    named=
    for name in "$@"; do named="$named $(packages_of "$name")"; done
    # shellcheck disable=SC2086
    {
        wanted=$(printf '%s\n' $named $(closure $named) | sort -u | tr '\n' ' ')
        (cd "$servers/apt/packages" && rm -f ./*.deb && apt get --quiet download $wanted) || return 1
        # A list that cannot resolve what it names would leave a half.
        [ "$(ls "$servers/apt/packages" | wc -l)" -ge "$(echo $wanted | wc -w)" ]
    }
}

fetch() {
    mkdir -p "$servers/unpacked"
    # Tests start side by side: one fetches, the others wait for it.
    exec 9>"$servers/fetching"
    flock 9
    absent=$(absent "$@" | tr '\n' ' ')
    [ -n "$absent" ] || return 0
    need_apt "$absent"
    if [ "${NBLOCK_NO_INSTALL:-}" = 1 ]; then
        fail "NBLOCK_NO_INSTALL is set, and these Debian packages are not in $servers yet:" \
            "$(for name in $absent; do packages_of "$name"; done | tr '\n' ' ')"
    fi
    echo "downloading into .build/servers, installing nothing:" \
        "$(for name in $absent; do packages_of "$name"; done | tr '\n' ' ')and what they need" >&2
    log=$servers/apt.log
    : >"$log"
    for try in 1 2 3; do
        # shellcheck disable=SC2086
        if download $absent >>"$log" 2>&1; then
            unpack
            # shellcheck disable=SC2086
            for name in $absent; do : >"$servers/unpacked/$name"; done
            return
        fi
        echo "== try $try failed; lists of the build folder next" >>"$log"
        own_lists=1
        apt get update >>"$log" 2>&1 || sleep "$try"
    done
    tail -n 20 "$log" >&2
    fail "could not download $absent(see $log)"
}

unpack() {
    for package in "$servers"/apt/packages/*.deb; do
        dpkg -x "$package" "$servers/root"
    done
    rm -rf "$servers/apt/packages"
    for program in redis-server redis-sentinel; do
        [ -e "$servers/root/usr/bin/redis-check-rdb" ] && ln -sf redis-check-rdb "$servers/root/usr/bin/$program"
    done
    mkdir -p "$servers/bin"
    for program in "$servers"/root/usr/bin/redis-server "$servers"/root/usr/bin/redis-sentinel \
        "$servers"/root/usr/bin/redis-cli "$servers"/root/usr/lib/postgresql/*/bin/* \
        "$servers"/root/usr/sbin/pgbouncer "$servers"/root/usr/bin/etcd "$servers"/root/usr/bin/etcdctl; do
        if [ -e "$program" ]; then wrap "$program"; fi
    done
}

# A program of bin/, which finds its libraries wherever the whole is copied to.
wrap() {
    wrapper=$servers/bin/$(basename "$1")
    cat >"$wrapper" <<END
#!/bin/sh
root=\$(dirname "\$0")/../root
root=\$(cd "\$root" && pwd)
export LD_LIBRARY_PATH="\$root/usr/lib/$(gcc_triplet)\${LD_LIBRARY_PATH:+:\$LD_LIBRARY_PATH}"
exec "\$root${1#"$servers/root"}" "\$@"
END
    chmod 755 "$wrapper"
    missing=$(LD_LIBRARY_PATH="$servers/root/usr/lib/$(gcc_triplet)" ldd "$1" 2>/dev/null |
        sed -n 's/^[[:space:]]*\(.*\) => not found/\1/p' | tr '\n' ' ')
    [ -z "$missing" ] || fail "$(basename "$1") lacks libraries after unpacking: $missing"
}

# Where Debian keeps libraries of this machine's kind.
gcc_triplet() {
    case $(dpkg --print-architecture) in
    amd64) echo x86_64-linux-gnu ;;
    arm64) echo aarch64-linux-gnu ;;
    armhf) echo arm-linux-gnueabihf ;;
    i386) echo i386-linux-gnu ;;
    *) echo "$(uname -m)-linux-gnu" ;;
    esac
}

# Runs a command as the user that a server may have: nobody where root would be refused.
unprivileged() {
    if [ "$(id -u)" -eq 0 ]; then
        setpriv --reuid=nobody --regid="$(id -gn nobody)" --clear-groups "$@"
    else
        "$@"
    fi
}

as_user() {
    case $kind in
    postgresql | pgbouncer) unprivileged "$@" ;;
    *) "$@" ;;
    esac
}

# The directory with the programs, which the server's user can read.
programs() {
    bin=$servers/bin
    case $kind in postgresql | pgbouncer) ;; *) return 0 ;; esac
    unprivileged test -r "$bin/psql" && return
    bin=$directory/programs/bin
    [ -e "$bin" ] && return
    mkdir -p "$directory/programs"
    cp -a "$servers/bin" "$servers/root" "$directory/programs/"
    chown -R "$(id -u nobody)" "$directory/programs"
}

# The arguments of start and run.
arguments() {
    [ $# -ge 2 ] || fail "start NAME DIR [--port PORT] [--to PORT] [-- OPTION...]"
    kind=$1
    directory=$2
    shift 2
    port=
    behind=
    while [ $# -gt 0 ]; do
        case $1 in
        --port) port=$2 ; shift 2 ;;
        --to) behind=$2 ; shift 2 ;;
        --) shift ; break ;;
        *) fail "unknown argument $1" ;;
        esac
    done
    case $kind in
    redis | postgresql | etcd) ;;
    sentinel | pgbouncer) [ -n "$behind" ] || fail "$kind needs --to PORT" ;;
    *) fail "no server $kind: redis, sentinel, postgresql, pgbouncer, etcd" ;;
    esac
}

start() {
    arguments "$@"
    while [ "$1" != -- ] && [ $# -gt 1 ]; do shift; done
    shift
    case $kind in
    sentinel) (fetch redis) ;;
    pgbouncer) (fetch postgresql pgbouncer) ;; # psql tells when it answers
    *) (fetch "$kind") ;;
    esac

    mkdir -p "$directory"
    directory=$(cd "$directory" && pwd)
    [ ${#directory} -le 80 ] || fail "the path of $directory is longer than a socket's may be: at most 80 characters"
    if [ "$(as_user id -u)" != "$(id -u)" ]; then
        chown nobody "$directory"
        as_user test -x "$directory" || fail "nobody, who runs $kind for root, cannot enter $directory"
    fi
    programs
    [ -n "$port" ] || port=$(cat "$directory/port" 2>/dev/null || :)
    fixed=$port
    for try in 1 2 3 4 5 6 7 8 9 10; do
        # Below the ports that the system gives to connections.
        [ -n "$fixed" ] || port=$((20000 + $(od -An -N2 -tu2 /dev/urandom) % 12000))
        : >"$directory/log"
        chmod 666 "$directory/log"
        launch "$@"
        if answers; then
            echo "$port" >"$directory/port"
            echo "$pid" >"$directory/pid"
            echo "$kind" >"$directory/kind"
            report
            return
        fi
        kill -9 "$pid" 2>/dev/null || :
        grep -qi 'in use' "$directory/log" || break
        # What a killed server leaves ends soon.
        [ -z "$fixed" ] || sleep 0.3
    done
    tail -n 20 "$directory/log" >&2
    fail "$kind did not start in $directory"
}

# Starts the program, as $pid. It gets a session of its own: Ctrl-C at the terminal is for the tests, which stop it.
launch() {
    case $kind in
    redis)
        set -- "$bin/redis-server" --bind 127.0.0.1 --port "$port" --dir "$directory" --save '' \
            --unixsocket "$directory/redis.sock" "$@"
        ;;
    sentinel)
        {
            echo "bind 127.0.0.1"
            echo "port $port"
            echo "dir $directory"
            echo "unixsocket $directory/redis.sock"
            echo "sentinel monitor nblock 127.0.0.1 $behind 1"
            [ $# -eq 0 ] || printf '%s\n' "$@"
        } >"$directory/sentinel.conf"
        set -- "$bin/redis-sentinel" "$directory/sentinel.conf"
        ;;
    postgresql)
        if [ ! -e "$directory/data/PG_VERSION" ]; then
            as_user "$bin/initdb" --pgdata="$directory/data" --username=postgres --auth=trust --no-sync \
                --encoding=UTF8 --locale=C >>"$directory/log" 2>&1 || { tail -n 20 "$directory/log" >&2; fail "initdb failed"; }
        fi
        for option in "$@"; do
            shift
            set -- "$@" -c "$option"
        done
        set -- "$bin/postgres" -D "$directory/data" -p "$port" -c listen_addresses=127.0.0.1 -c jit=off \
            -c unix_socket_directories="$directory" -c shared_buffers=16MB -c recovery_init_sync_method=syncfs "$@"
        ;;
    pgbouncer)
        {
            echo "[databases]"
            echo "* = host=127.0.0.1 port=$behind user=postgres"
            echo "[pgbouncer]"
            echo "listen_addr = 127.0.0.1"
            echo "listen_port = $port"
            echo "unix_socket_dir = $directory"
            echo "auth_type = any"
            echo "admin_users = postgres"
            echo "pool_mode = transaction"
            [ $# -eq 0 ] || printf '%s\n' "$@"
        } >"$directory/pgbouncer.ini"
        set -- "$bin/pgbouncer" "$directory/pgbouncer.ini"
        ;;
    etcd)
        set -- "$bin/etcd" --data-dir "$directory/data" --listen-client-urls "http://127.0.0.1:$port" \
            --advertise-client-urls "http://127.0.0.1:$port" --listen-peer-urls "http://127.0.0.1:$((port + 1))" \
            --initial-advertise-peer-urls "http://127.0.0.1:$((port + 1))" \
            --initial-cluster "default=http://127.0.0.1:$((port + 1))" "$@"
        ;;
    esac
    # setsid in a new process does not fork: the process id is the server's.
    (
        cd "$directory"
        if [ "$(as_user id -u)" != "$(id -u)" ]; then
            set -- setpriv --reuid=nobody --regid="$(id -gn nobody)" --clear-groups "$@"
        fi
        exec setsid "$@"
    ) </dev/null >>"$directory/log" 2>&1 3<&- 9>&- &
    pid=$!
}

# Waits until it answers, and by our own socket, so that it is this one.
answers() {
    looks=0
    until probe >/dev/null 2>&1; do
        kill -0 "$pid" 2>/dev/null || return 1
        looks=$((looks + 1))
        [ $looks -lt 600 ] || return 1
        sleep 0.05
    done
}

probe() {
    case $kind in
    redis | sentinel) "$bin/redis-cli" -s "$directory/redis.sock" ping | grep -q -e PONG -e LOADING -e NOAUTH ;;
    postgresql) "$bin/psql" -h "$directory" -p "$port" -U postgres -c 'select 1' postgres ;;
    pgbouncer) "$bin/psql" -h "$directory" -p "$port" -U postgres -c 'show version' pgbouncer ;;
    etcd)
        grep -q 'serving .*client requests on\|serving client traffic' "$directory/log" &&
            ETCDCTL_API=3 "$bin/etcdctl" --endpoints "127.0.0.1:$port" endpoint health
        ;;
    esac
}

report() {
    case $kind in
    redis | sentinel)
        echo "url=redis://127.0.0.1:$port"
        echo "socket=$directory/redis.sock"
        ;;
    postgresql | pgbouncer)
        echo "url=postgres://postgres@127.0.0.1:$port/postgres"
        echo "socket=$directory/.s.PGSQL.$port"
        ;;
    etcd) echo "url=etcd://127.0.0.1:$port" ;;
    esac
    echo "port=$port"
    echo "pid=$pid"
}

stop() {
    directory=$(cd "$1" && pwd)
    pid=$(cat "$directory/pid" 2>/dev/null || :)
    kind=$(cat "$directory/kind" 2>/dev/null || :)
    # Its working directory says that it is this server, and not another process with its number.
    if ! at_work "$directory" | grep -qx "${pid:-none}"; then
        rm -f "$directory/pid"
        return
    fi
    case ${2:-},$kind in
    KILL,*) signals=KILL ;;
    # What ends it at once, and does not wait for its clients.
    *,postgresql) signals=INT ;;
    *,pgbouncer) signals="QUIT TERM" ;; # since 1.23, and before
    *) signals=TERM ;;
    esac
    for signal in $signals CONT; do kill -"$signal" "$pid" 2>/dev/null || :; done
    looks=0
    # The helpers of a PostgreSQL that was killed end after it.
    while [ -n "$(at_work "$directory")" ]; do
        looks=$((looks + 1))
        # shellcheck disable=SC2046
        [ $looks -ne 250 ] || kill -9 $(at_work "$directory") 2>/dev/null || :
        sleep 0.02
    done
    # PostgreSQL takes a process that nobody has waited for, as in containers without an init, for running.
    rm -f "$directory/pid" "$directory/data/postmaster.pid" "$directory"/.s.PGSQL.*.lock
}

# The processes that work in a directory or below it.
at_work() {
    find /proc/[0-9]* -maxdepth 1 -name cwd \( -lname "$1" -o -lname "$1/*" \) 2>/dev/null |
        sed 's|^/proc/||; s|/cwd$||'
}

verb=${1:-}
[ $# -eq 0 ] || shift
case $verb in
fetch)
    [ $# -gt 0 ] || set -- redis postgresql pgbouncer etcd
    (fetch "$@")
    echo "$servers/bin"
    ;;
missing)
    [ $# -gt 0 ] || set -- redis postgresql pgbouncer etcd
    for name in $(absent "$@"); do packages_of "$name"; done
    ;;
start) start "$@" ;;
run)
    exec 3<&0
    start "$@"
    trap 'stop "$directory"; exit 130' INT TERM HUP
    server=$pid
    cat <&3 >/dev/null &
    wait $! || :
    stop "$directory"
    wait "$server" || :
    ;;
stop)
    [ $# -ge 1 ] || fail "stop DIR [KILL]"
    stop "$@"
    ;;
*)
    sed -n 's/^# \{0,1\}//p; /^set -eu/q' "$self" >&2
    exit 64
    ;;
esac
