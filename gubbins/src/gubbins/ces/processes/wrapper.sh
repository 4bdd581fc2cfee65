# Runs one pilot, and records its process and exit code.
#
#   /bin/sh JOBDIR/wrapper JOBDIR [COMMAND...]
#
# COMMAND is a prefix for the pilot's command that changes the user. Files in JOBDIR: script, environment, work (input);
# work/.pilot-secret (input, optional); pid, stdout, stderr, rc (output); cancelled (input, may appear at any time). rc
# is written atomically, by rename. `pid` has the pid, which is also the process group, start time (clock ticks since
# boot), boot id and host name, which identify the process uniquely; without its final newline it is incomplete.
cd "./$1" || exit 1
shift
# A cancellation signals the whole group. The wrapper survives to write the exit code; the pilot does not inherit the
# trap.
trap : HUP INT TERM
read -r stat < /proc/$$/stat
read -r boot < /proc/sys/kernel/random/boot_id
read -r host < /proc/sys/kernel/hostname
identify() {
    printf '%s %s %s %s\n' "$$" "${20}" "$boot" "$host"
}
# Without this record the pilot must not run.
# shellcheck disable=SC2086 # the fields are meant to be split
identify ${stat##*) } > pid || exit 1
[ ! -f work/.pilot-secret ] || export PILOT_SECRET_FILE="$PWD/work"/.pilot-secret
# Checked in the subshell, which a later signal ends.
([ ! -e cancelled ] || exit 143; . ./environment && cd work && exec "$@" ../script) > stdout 2> stderr < /dev/null
code=$?
trap '' HUP INT TERM # a repeated signal must not end these commands
[ ! -e work/.pilot-secret ] || rm -f work/.pilot-secret
printf '%s\n' "$code" > rc.new && mv rc.new rc
