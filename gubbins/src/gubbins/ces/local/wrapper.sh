# Runs one pilot, and records its process and exit code.
#
#   /bin/sh wrapper.sh JOBDIR [COMMAND…]
#
# COMMAND is a prefix for the pilot's command that changes the user. Files in JOBDIR: script (input); pid, stdout,
# stderr, rc (output); cancelled (input, may appear at any time). Files are written atomically, by rename. `pid` has the
# pid, process group, start time (clock ticks since boot) and boot id, which identify the process uniquely.
cd "$1" || exit 1
shift
[ $# = 0 ] || umask 077 # no access for other users
# A cancellation signals the whole group. The wrapper survives to write the exit code; the pilot does not inherit the
# trap.
trap : HUP INT TERM
identify() {
    printf '%s %s %s %s\n' "$1" "$5" "${22}" "$(cat /proc/sys/kernel/random/boot_id)"
}
# shellcheck disable=SC2046 # the fields are meant to be split
identify $(cat /proc/$$/stat) > pid.new && mv pid.new pid
# Copied, since a file that a forking thread of the worker holds open for writing cannot be executed.
cp script run && chmod 755 run && mkdir -p work
# Checked in the subshell, which a later signal ends.
([ ! -e cancelled ] || exit 143; cd work && exec "$@" ../run) > stdout 2> stderr < /dev/null
code=$?
trap '' HUP INT TERM # a repeated signal must not end these commands
rm -f work/.pilot-secret
printf '%s\n' "$code" > rc.new && mv rc.new rc
