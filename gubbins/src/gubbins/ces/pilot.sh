#!/bin/sh
# The default pilot: runs the payload of its VO, and reports to the pilot system if possible.
#
# Needs sh, and curl or python3 for reports. Environment: PILOT_STAMP, PILOT_VO and PILOT_CE; PILOT_PAYLOAD, a command, if
# the VO has one; with an identity, PILOT_API_URL and PILOT_SECRET_FILE. The payload also gets PILOT_TOKEN_FILE, a file
# with a valid token of DiracX, and PILOT_JOBS_FILE, to which it may write the number of jobs that it has run. Exit codes
# of the payload: 0 success, 75 no work, 69 the node is unfit, others an error. The pilot ends with the exit code of its
# payload, and with 0 for no work.
#
# Secrets and tokens are never on a command line, only in shell variables and in files of a private directory. Failed
# reports do not affect the payload.

connect_seconds=5 request_seconds=20 beat=60
child= signal= beats=
trap 'signal="ended by a signal"; [ -z "$child" ] || kill -TERM "$child" 2> /dev/null' HUP INT TERM
private=$(trap '' HUP INT TERM; umask 077 && mktemp -d "$PWD/.pilot.XXXXXX") || private=
PILOT_TOKEN_FILE=$private/token PILOT_JOBS_FILE=$private/jobs
secret=${PILOT_SECRET_FILE:+$(cat "$PILOT_SECRET_FILE" 2> /dev/null)}
[ -z "$secret" ] || rm -f "$PILOT_SECRET_FILE"
unset PILOT_SECRET_FILE

python='
import os, ssl, sys, urllib.request
url, config, seconds = sys.argv[1:]
headers = {"Content-Type": "application/json"}
line = open(config).read().split("\"")
if len(line) > 1:
    name, value = line[1].split(": ", 1)
    headers[name] = value
context = ssl.create_default_context()
if os.environ.get("X509_CERT_DIR"):
    context.load_verify_locations(capath=os.environ["X509_CERT_DIR"])
request = urllib.request.Request(url, sys.stdin.buffer.read(), headers)
sys.stdout.write(urllib.request.urlopen(request, timeout=float(seconds), context=context).read(65536).decode())
'

# post ROUTE: send the JSON on stdin, and print the response; fails on an error.
post() {
    if command -v curl > /dev/null; then
        curl -sf --connect-timeout "$connect_seconds" --max-time "$request_seconds" -K "$private/auth" \
            ${X509_CERT_DIR:+--capath "$X509_CERT_DIR"} -H 'Content-Type: application/json' \
            --data-binary @- "$PILOT_API_URL/$1"
    else
        python3 -c "$python" "$PILOT_API_URL/$1" "$private/auth" "$connect_seconds"
    fi 2> /dev/null
}

# value NAME: print a value of the flat JSON object on stdin.
value() {
    sed -n 's/.*"'"$1"'" *: *"\{0,1\}\([^",}]*\).*/\1/p'
}

# get_token NAME VALUE: exchange the secret, or the refresh token, for a token.
get_token() {
    response=$(printf '{"stamp":"%s","%s":"%s"}' "$PILOT_STAMP" "$1" "$2" | post token) || return 1
    token=$(printf '%s\n' "$response" | value access_token)
    [ -n "$token" ] || return 1
    (
        umask 077
        printf '%s\n' "$response" | value refresh_token > "$private/refresh"
        printf '%s' "$token" > "$private/token.new" && mv "$private/token.new" "$private/token"
        printf 'header = "Authorization: Bearer %s"\n' "$token" > "$private/auth"
        echo $(($(date +%s) + $(printf '%s\n' "$response" | value expires_in))) > "$private/expires"
        printf '%s\n' "$response" | value heartbeat_seconds > "$private/beat"
    )
    beat=$(cat "$private/beat")
}

renew_token() {
    [ "$(date +%s)" -lt $(($(cat "$private/expires") - beat - 60)) ] || get_token refresh_token "$(cat "$private/refresh")"
}

report() {
    printf '%s\n' "$1" | post report > /dev/null
}

# about: print the report about the host.
about() {
    cores=$(nproc 2> /dev/null || getconf _NPROCESSORS_ONLN)
    memory_kb=$(sed -n 's/^MemTotal: *\([0-9]*\) kB/\1/p' /proc/meminfo 2> /dev/null)
    printf '{"host":"%s","cores":%d,"memory_mb":%d}' \
        "$(uname -n | tr -cd 'A-Za-z0-9._-')" "${cores:-0}" $((${memory_kb:-0} / 1024))
}

# Send heartbeats until the pilot ends; SIGTERM does not interrupt a request.
heartbeats() {
    stop=
    trap 'stop=1; kill "$!"' TERM
    while [ -z "$stop" ] && kill -0 $$; do
        sleep "$beat" &
        # A just forked process may still have the trap of its parent, and ignore the signal.
        while [ -n "$stop" ] && kill "$!"; do sleep 1; done
        wait "$!"
        [ -z "$stop" ] && kill -0 $$ || break
        if [ -s "$private/token" ]; then renew_token; else get_token secret "$secret"; fi
        report "$about"
    done
} 2> /dev/null

# end OUTCOME CODE DETAIL: send the last report, and exit.
end() {
    trap : HUP INT TERM
    if [ -n "$beats" ]; then
        kill -TERM "$beats" 2> /dev/null
        (sleep 2; kill -TERM "$beats") > /dev/null 2>&1 & # if the first one came while it began to sleep
        again=$!
        # A signal interrupts `wait`. Until they have ended, heartbeats may write tokens.
        while kill -0 "$beats"; do wait "$beats"; done 2> /dev/null
        kill "$again" 2> /dev/null
    fi
    trap '' HUP INT TERM # a repeated signal must not end these commands
    if [ -n "$beats" ]; then
        jobs=$(head -c 9 "$PILOT_JOBS_FILE" 2> /dev/null | tr -cd '0-9' | sed 's/^0*\(.\)/\1/')
        [ ! -s "$private/token" ] ||
            report "$(printf '{"outcome":"%s","exit_code":%d%s,"detail":"%s"}' "$1" "$2" "${jobs:+,\"jobs_done\":$jobs}" "$3")"
    fi
    [ -z "$private" ] || rm -rf "$private"
    [ "$1" = 'no work' ] || exit "$2"
    exit 0
}

if [ -n "$secret" ] && [ -n "${PILOT_API_URL:-}" ] && [ -n "$private" ]; then
    : > "$private/auth"
    about=$(about)
    ! get_token secret "$secret" || report "$about"
    heartbeats &
    beats=$!
    export PILOT_TOKEN_FILE PILOT_JOBS_FILE
fi
if [ -z "${PILOT_PAYLOAD:-}" ]; then
    sleep 1
    [ -n "$signal" ] || end 'no work' 0 "$PILOT_VO has no payload"
fi
[ -z "$signal" ] || end error 143 "$signal"
/bin/sh -c "$PILOT_PAYLOAD" &
child=$!
[ -z "$signal" ] || kill -TERM "$child" 2> /dev/null
wait "$child"
code=$?
# A signal interrupts the first wait, not the payload.
while kill -0 "$child" 2> /dev/null; do
    wait "$child"
    code=$?
done
case $code$signal in
    0) end worked 0 '' ;;
    75) end 'no work' 75 '' ;;
    69) end 'node unfit' 69 '' ;;
    *) end error "$code" "$signal" ;;
esac
