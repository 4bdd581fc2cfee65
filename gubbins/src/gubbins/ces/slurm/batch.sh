#!/bin/sh
# Runs one pilot on a node, and records its end. Names between at signs are replaced at the submission.
# In braces, so that a truncated script runs nothing.
{
@exports@
job=@job@  # directory of the pilot; empty if nodes do not have it
note() {
    [ -z "$job" ] || { printf '%s\n' "$2" > "$job/$1.new" && mv "$job/$1.new" "$job/$1"; }
}
# Unconfirmed submissions may leave two jobs of one stamp: the first one to start is the pilot.
if [ -n "$job" ] && ! (set -C; echo "@number@" > "$job/started") 2> /dev/null; then
    [ "$(cat "$job/started")" = "@number@" ] || exit 0
fi
[ -z "$job" ] || [ -s "$job/id" ] || note id "@id@"
# The batch system signals all processes of the job. This shell survives to write the exit code.
trap : HUP INT TERM
work=$(mktemp -d "${TMPDIR:-/tmp}/pilot.XXXXXX") || { note rc 1; exit 1; }
base64 -d > "$work/run" << 'SCRIPT'
@script@
SCRIPT
chmod 700 "$work/run"
secret=@secret@
if [ -n "$secret" ]; then
    (umask 077; printf '%s' "$secret" > "$work/.pilot-secret")
elif [ -n "$job" ] && [ -f "$job/secret" ] && [ ! -h "$job/secret" ]; then
    mv "$job/secret" "$work/.pilot-secret"
fi
if [ -f "$work/.pilot-secret" ]; then
    export PILOT_SECRET_FILE="$work/.pilot-secret"
fi
(cd "$work" && exec ./run) < /dev/null@output@
code=$?
trap '' HUP INT TERM # a repeated signal must not end these commands
rm -rf "$work"
note rc "$code"
exit "$code"
}
