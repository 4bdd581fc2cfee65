#!/bin/sh
# Runs one pilot on a node, and writes down what happens. The words between at signs are put in at the submission.
# In braces: what was cut off on its way to sbatch runs nothing.
{
@exports@
job=@job@  # its directory; empty if it is not to be had here
note() {
    [ -z "$job" ] || { printf '%s\n' "$2" > "$job/$1.new" && mv "$job/$1.new" "$job/$1"; }
}
# An unconfirmed submission may have left two jobs of one stamp. The first to start is the pilot.
if [ -n "$job" ] && ! (set -C; echo "@number@" > "$job/started") 2> /dev/null; then
    [ "$(cat "$job/started")" = "@number@" ] || exit 0
fi
[ -z "$job" ] || [ -s "$job/id" ] || note id "@id@"
# A batch system signals everybody. This shell stays to write the exit code.
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
rm -rf "$work"
note rc "$code"
exit "$code"
}
