#!/bin/sh
# The default pilot: runs the payload of its VO, and reports to the pilot system if that can be reached.
#
# Needs sh, and curl or python3 to report. It finds in its environment PILOT_STAMP, PILOT_VO and PILOT_CE; PILOT_PAYLOAD,
# a command, if the VO has one; with an identity, PILOT_API_URL and PILOT_SECRET_FILE. For the payload it adds
# PILOT_TOKEN_FILE, where a valid token of DiracX is, and PILOT_JOBS_FILE, where the payload may write how many jobs it
# has run. The payload ends with 0 if it worked, with 75 if there was no work, with 69 if this node is unfit, and else with an
# error. No work is no failure: the pilot ends with 0 then, otherwise as its payload did.
#
# The secret and the tokens are in variables of this shell and in files of a directory that is nobody else's, and never
# on a command line. Whatever fails about reports, the payload runs.

connect_seconds=5 request_seconds=20 beat=60
private=$(umask 077 && mktemp -d "$PWD/.pilot.XXXXXX") || private=
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

# post ROUTE: send the JSON on stdin; prints the answer, and fails if there is none or an error.
post() {
    if command -v curl > /dev/null; then
        curl -sf --connect-timeout "$connect_seconds" --max-time "$request_seconds" -K "$private/auth" \
            ${X509_CERT_DIR:+--capath "$X509_CERT_DIR"} -H 'Content-Type: application/json' \
            --data-binary @- "$PILOT_API_URL/$1"
    else
        python3 -c "$python" "$PILOT_API_URL/$1" "$private/auth" "$connect_seconds"
    fi 2> /dev/null
}

# value NAME: a value of the JSON object on stdin, which holds no nested ones.
value() {
    sed -n 's/.*"'"$1"'" *: *"\{0,1\}\([^",}]*\).*/\1/p'
}

# get_token NAME VALUE: a token for the secret, or for the refresh token.
get_token() {
    answer=$(printf '{"stamp":"%s","%s":"%s"}' "$PILOT_STAMP" "$1" "$2" | post token) || return 1
    token=$(printf '%s\n' "$answer" | value access_token)
    [ -n "$token" ] || return 1
    (
        umask 077
        printf '%s\n' "$answer" | value refresh_token > "$private/refresh"
        printf '%s' "$token" > "$private/token.new" && mv "$private/token.new" "$private/token"
        printf 'header = "Authorization: Bearer %s"\n' "$token" > "$private/auth"
        echo $(($(date +%s) + $(printf '%s\n' "$answer" | value expires_in))) > "$private/expires"
        printf '%s\n' "$answer" | value heartbeat_seconds > "$private/beat"
    )
    beat=$(cat "$private/beat")
}

renew_token() {
    [ "$(date +%s)" -lt $(($(cat "$private/expires") - beat - 60)) ] || get_token refresh_token "$(cat "$private/refresh")"
}

report() {
    printf '%s\n' "$1" | post report > /dev/null
}

# about: where the pilot runs.
about() {
    cores=$(nproc 2> /dev/null || getconf _NPROCESSORS_ONLN)
    memory_kb=$(sed -n 's/^MemTotal: *\([0-9]*\) kB/\1/p' /proc/meminfo 2> /dev/null)
    printf '{"host":"%s","cores":%d,"memory_mb":%d}' \
        "$(uname -n | tr -cd 'A-Za-z0-9._-')" "${cores:-0}" $((${memory_kb:-0} / 1024))
}

# As long as the pilot lives; a request that is under way when it ends is finished.
heartbeats() {
    stop=
    trap 'stop=1; kill "$!"' TERM
    while [ -z "$stop" ] && kill -0 $$; do
        sleep "$beat" &
        # A process that has only just been forked may still have the trap of its parent, and not end.
        while [ -n "$stop" ] && kill "$!"; do sleep 1; done
        wait "$!"
        [ -z "$stop" ] && kill -0 $$ || break
        if [ -s "$private/token" ]; then renew_token; else get_token secret "$secret"; fi
        report "$about"
    done
} 2> /dev/null

# end OUTCOME CODE DETAIL: the last report.
end() {
    if [ -n "$beats" ]; then
        kill -TERM "$beats" 2> /dev/null
        (sleep 2; kill -TERM "$beats") > /dev/null 2>&1 & # should the first have come while it began to sleep
        again=$!
        wait "$beats" 2> /dev/null
        kill "$again" 2> /dev/null
        jobs=$(head -c 9 "$PILOT_JOBS_FILE" 2> /dev/null | tr -cd '0-9')
        [ ! -s "$private/token" ] ||
            report "$(printf '{"outcome":"%s","exit_code":%d%s,"detail":"%s"}' "$1" "$2" "${jobs:+,\"jobs_done\":$jobs}" "$3")"
    fi
    [ -z "$private" ] || rm -rf "$private"
    [ "$1" = 'no work' ] || exit "$2"
    exit 0
}

beats=
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
    end 'no work' 0 "$PILOT_VO has no payload"
fi
child= signal=
trap 'signal="ended by a signal"; kill -TERM "$child" 2> /dev/null' HUP INT TERM
/bin/sh -c "$PILOT_PAYLOAD" &
child=$!
wait "$child"
code=$?
# A signal ends the first wait, not the payload.
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
