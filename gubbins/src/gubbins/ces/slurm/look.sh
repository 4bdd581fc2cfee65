# Tells what the directories of pilots say.
#
#   /bin/sh -c "$(cat look.sh)" look DIRECTORY  < stamps, one in a line
#
# For each directory that exists: stamp|job number|exit code|cancelled or not (1 or nothing)|last words, if it failed;
# for each that cannot be read now: stamp|unreadable|why. Exit code 66: there is no DIRECTORY.
[ -e "$1" ] || { echo "$1 is gone, or not mounted" >&2; exit 66; }
cd "$1" || exit 73
stamps=$(cat)
# A stale handle, a lost connection: not the same as a directory that is not there.
printf '%s\n' "$stamps" | sed 's#$#/.#' | LC_ALL=C xargs ls -d 2>&1 > /dev/null | sed -n "
    /: No such file or directory\$/d
    /: Not a directory\$/d
    s#^.*[ ']\([^ ']*\)/\.'\{0,1\}: \(.*\)#\1|unreadable|\2#p"
# What a pilot has put in place of small files: this shell would follow it, wait for it, or read it without end.
bad=" $(printf '%s\n' "$stamps" | xargs sh -c '[ $# = 0 ] ||
    find "$@" -maxdepth 1 \( -name id -o -name rc \) \( ! -type f -o -size +1 \)' sh 2> /dev/null | tr '\n' ' ')"
is_file() {
    case $bad in
        *" $1 "*) return 1 ;;
    esac
    [ -e "$1" ]
}
for stamp in $stamps; do
    [ -d "$stamp" ] && ! [ -h "$stamp" ] || continue
    id='' rc='' cancelled='' words=''
    ! is_file "$stamp/id" || read -r id < "$stamp/id"
    [ ! -e "$stamp/cancelled" ] || cancelled=1
    # A full disk leaves an empty file: it ended, and not well.
    if is_file "$stamp/rc"; then read -r rc < "$stamp/rc" || rc=1; fi
    if [ "${rc:-1}" != 0 ] && [ -f "$stamp/stderr" ] && ! [ -h "$stamp/stderr" ]; then
        # The pilot's own, not what Slurm says below them.
        words=$(tail -c 4096 "$stamp/stderr" | tr '\000\r' '\n\n' \
            | grep -av -e '^slurmstepd' -e '^[[:space:]]*$' | tail -n 1)
    fi
    printf '%s|%s|%s|%s|%s\n' "$stamp" "$id" "$rc" "$cancelled" "$words"
done
