#!/bin/sh
# Runs one pilot on a node, and records its end. Names between at signs are replaced at the submission.
# In braces, so that a truncated script runs nothing.
{
# The batch system signals all processes of the job, at any time. This shell survives to write the exit code.
signalled=
trap 'signalled=1' HUP INT TERM
@exports@
job=@job@  # directory of the pilot; empty if nodes do not have it
work=
note() {
    [ -z "$job" ] || { printf '%s\n' "$2" > "$job/$1.new" && mv "$job/$1.new" "$job/$1"; }
}
end() {
    trap '' HUP INT TERM # a repeated signal must not end these commands
    [ -z "$work" ] || rm -rf "$work"
    [ -z "$job" ] || rm -f "$job/secret"
    note rc "$1"
    exit "$1"
}
# Unconfirmed submissions may leave two jobs of one stamp: the first one to start is the pilot. Started again, as after
# `scontrol requeue`, it would be a second one.
requeued='requeued by the site; it is not started a second time'
set -C
if [ -z "$job" ]; then
    [ "${SLURM_RESTART_COUNT:-0}" = 0 ] || { echo "$requeued" >&2; exit 1; }
elif ! { echo "@number@" > "$job/started"; } 2> /dev/null; then
    first=
    read -r first < "$job/started"
    case $first in
        "@number@") echo "$requeued" >&2; [ -e "$job/rc" ] || note rc 1; exit 1 ;;
        '') exit 1 ;; # as on a full disk: no job may run
        *) exit 0 ;;
    esac
fi
set +C
[ -z "$job" ] || [ -s "$job/id" ] || note id "@id@"
work=$(trap '' HUP INT TERM; mktemp -d "${TMPDIR:-/tmp}/pilot.XXXXXX") || end 1
# An incomplete script, as on a full disk, is not executable.
base64 -d > "$work/run" << 'SCRIPT' && chmod 700 "$work/run"
@script@
SCRIPT
secret=@secret@
if [ -n "$secret" ]; then
    (umask 077; printf '%s' "$secret" > "$work/.pilot-secret")
elif [ -n "$job" ] && [ -f "$job/secret" ] && [ ! -h "$job/secret" ]; then
    mv "$job/secret" "$work/.pilot-secret"
fi
if [ -f "$work/.pilot-secret" ]; then
    export PILOT_SECRET_FILE="$work/.pilot-secret"
fi
([ -z "$signalled" ] || exit 143; cd "$work" && exec ./run) < /dev/null@output@
end "$?"
}
