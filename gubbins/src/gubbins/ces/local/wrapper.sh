# Runs one pilot and writes down what happens, whether or not anybody is watching.
#
#   /bin/sh wrapper.sh JOBDIR
#
# JOBDIR: script (in); pid, stdout, stderr, rc (out); cancelled (in, may appear at any time). Files appear by
# rename, so whoever sees one sees all of it. `pid` holds: pid, process group, start time (clock ticks since
# boot), boot id; the last two tell this process from a later one with the same number.
cd "$1" || exit 1
# A cancellation signals the whole group. The wrapper stays to write the exit code; the pilot gets the default
# action, for a trap is not inherited.
trap : HUP INT TERM
# shellcheck disable=SC2046 # the fields are meant to be split
set -- $(cat /proc/$$/stat)
printf '%s %s %s %s\n' "$1" "$5" "${22}" "$(cat /proc/sys/kernel/random/boot_id)" > pid.new && mv pid.new pid
if [ -e cancelled ]; then
    code=143
else
    # Copied here and not made executable by the worker: a worker thread that forks meanwhile would hold it open
    # for writing, and the kernel refuses to execute such a file.
    cp script run && chmod 700 run && mkdir -p work
    (cd work && exec ../run) > stdout 2> stderr < /dev/null
    code=$?
fi
printf '%s\n' "$code" > rc.new && mv rc.new rc
