#!/bin/sh
# Runs one pilot on a node. The words between at signs are put in at the submission; the stamp is the argument.
# What the pilot writes is kept beside it; of each, the last part goes back to the schedd.
@exports@
export PILOT_STAMP="$1"
chmod 700 pilot || exit 1
if [ -f "$1.secret" ]; then
    chmod 600 "$1.secret"
    export PILOT_SECRET_FILE="$PWD/$1.secret"
fi
# HTCondor sends the signal to this shell only, at any time.
child= signalled=
trap 'signalled=1; test -z "$child" || kill -TERM "$child" 2> /dev/null' HUP INT TERM
./pilot > pilot.stdout 2> pilot.stderr < /dev/null &
child=$!
test -z "$signalled" || kill -TERM "$child" 2> /dev/null
wait "$child"
code=$?
# A signal ends the first wait, not the pilot.
while kill -0 "$child" 2> /dev/null; do
    wait "$child"
    code=$?
done
trap '' HUP INT TERM
tail -c @limit@ pilot.stdout
tail -c @limit@ pilot.stderr >&2
exit "$code"
