# Runs one pilot and writes down what happens, whether or not anybody is connected.
#
#   /bin/sh JOBDIR/wrapper JOBDIR
#
# JOBDIR: script, environment, secret (in; the latter for those that have one); pid, stdout, stderr, rc (out); cancelled (in, may appear at any time). pid and
# rc appear by rename, so a reader sees all of it. `pid` holds: pid, which is the process
# group's as well, start time (clock ticks since boot), boot id, host name; the latter three tell this process from a
# later or another one with the same number.
cd "./$1" || exit 1
# A cancellation signals the whole group. The wrapper stays to write the exit code; the pilot gets the default
# action, for a trap is not inherited.
trap : HUP INT TERM
read -r stat < /proc/$$/stat
read -r boot < /proc/sys/kernel/random/boot_id
# shellcheck disable=SC2086 # the fields are meant to be split
set -- ${stat##*) }
# What cannot be found again must not run.
printf '%s %s %s %s\n' "$$" "${20}" "$boot" "$(uname -n)" > pid.new && mv pid.new pid || exit 1
chmod 700 script && mkdir -p work
[ ! -f secret ] || export PILOT_SECRET_FILE="$PWD/secret"
# Looked for in there, where a signal that comes after the look has its effect.
([ ! -e cancelled ] || exit 143; . ./environment && cd work && exec ../script) > stdout 2> stderr < /dev/null
code=$?
rm -f secret # of no use any more
printf '%s\n' "$code" > rc.new && mv rc.new rc
