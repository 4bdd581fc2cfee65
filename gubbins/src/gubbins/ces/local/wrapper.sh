# Runs one pilot and writes down what happens, whether or not anybody is watching.
#
#   /bin/sh wrapper.sh JOBDIR [COMMAND…]
#
# COMMAND precedes the pilot's own: it changes the user. JOBDIR: script (in); pid, stdout, stderr, rc (out); cancelled
# (in, may appear at any time). Files appear by rename, so a reader sees all of them or nothing. `pid` holds: pid,
# process group, start time (clock ticks since boot), boot id; the last two tell this process from a later one with
# the same number.
cd "$1" || exit 1
shift
[ $# = 0 ] || umask 077 # the other user's files, and what it writes here, are nobody else's
# A cancellation signals the whole group. The wrapper stays to write the exit code; the pilot gets the default
# action, for a trap is not inherited.
trap : HUP INT TERM
identify() {
    printf '%s %s %s %s\n' "$1" "$5" "${22}" "$(cat /proc/sys/kernel/random/boot_id)"
}
# shellcheck disable=SC2046 # the fields are meant to be split
identify $(cat /proc/$$/stat) > pid.new && mv pid.new pid
if [ -e cancelled ]; then
    code=143
else
    # Copied here and not made executable by the worker: a worker thread that forks meanwhile would hold it open
    # for writing, and the kernel refuses to execute such a file.
    cp script run && chmod 755 run && mkdir -p work
    (cd work && exec "$@" ../run) > stdout 2> stderr < /dev/null
    code=$?
    rm -f work/.pilot-secret # of no use any more
fi
printf '%s\n' "$code" > rc.new && mv rc.new rc
