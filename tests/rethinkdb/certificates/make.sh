#!/bin/sh
# Makes the certificates that the tests of TLS use, in this directory. They are committed, and run out in the
# year 9999: run this to have others, or to see what is in them. The keys are for tests only; anybody has them.
#
# Needs OpenSSL.
set -eu
cd "$(dirname "$0")"

SINCE=20200101000000Z
UNTIL=99991231235959Z
HERE=DNS:localhost,IP:127.0.0.1,IP:::1,IP:::ffff:127.0.0.1
AUTHORITY='basicConstraints=critical,CA:TRUE
keyUsage=critical,keyCertSign'

key() {
    openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out "$1.key"
}

# made NAME KEY EXTENSIONS SINCE UNTIL SIGNER...: only `openssl ca` can write any date
made() {
    name=$1 key=$2 since=$4 until=$5
    printf '%s\n' "$3" >extensions
    shift 5
    openssl req -new -key "$key.key" -subj "/CN=nblock test $name" -out request
    openssl ca -batch -notext -config configuration -in request -extfile extensions \
        -startdate "$since" -enddate "$until" -out "$name.pem" "$@" 2>messages || { cat messages >&2; exit 1; }
}

itself() {
    made "$1" "$2" "$3" $SINCE $UNTIL -selfsign -keyfile "$2.key"
}

# signed NAME KEY SIGNER PURPOSE ALTERNATIVE-NAMES [SINCE UNTIL]
signed() {
    made "$1" "$2" "basicConstraints=critical,CA:FALSE
extendedKeyUsage=$4
subjectAltName=$5" "${6:-$SINCE}" "${7:-$UNTIL}" -cert "$3.pem" -keyfile "$3.key"
}

: >index
printf '%s\n' '[ca]' 'default_ca = here' '[here]' 'database = index' 'new_certs_dir = .' 'default_md = sha256' \
    'rand_serial = yes' 'policy = any' 'unique_subject = no' '[any]' 'commonName = supplied' >configuration

for name in authority stranger server client; do
    key $name
done
itself authority authority "$AUTHORITY"
itself stranger stranger "$AUTHORITY"
signed server server authority serverAuth $HERE
signed elsewhere server authority serverAuth DNS:db.example
signed expired server authority serverAuth $HERE 20010101000000Z 20020101000000Z
signed client client authority clientAuth DNS:client.example
signed strange-client client stranger clientAuth DNS:client.example
# As RethinkDB's manual has it made: an authority's, by itself. And one without any name that is looked at.
itself self-signed server "$AUTHORITY
subjectAltName=$HERE"
itself nameless server "$AUTHORITY"

# Nothing is signed any more.
rm -f authority.key stranger.key
rm -f extensions request messages configuration index* [0-9A-F]*.pem
