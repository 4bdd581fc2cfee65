# Prints the records in the directories of pilots.
#
#   /bin/sh -c "$(cat records.sh)" records DIRECTORY  < stamps, one per line
#
# For each directory that exists: stamp|job number|exit code|cancelled (1 or empty)|last line of stderr, if it failed;
# for each that cannot be read: stamp|unreadable|error. Exit code 66: DIRECTORY does not exist.
[ -e "$1" ] || { echo "$1 does not exist, or is not mounted" >&2; exit 66; }
cd "$1" || exit 73
stamps=$(cat)
# Stale file handles and lost connections, other than directories that do not exist.
printf '%s\n' "$stamps" | sed 's#$#/.#' | LC_ALL=C xargs ls -d 2>&1 > /dev/null | sed -n "
    /: No such file or directory\$/d
    /: Not a directory\$/d
    s#^.*[ ']\([^ ']*\)/\.'\{0,1\}: \(.*\)#\1|unreadable|\2#p"
# Files replaced by pilots with links, FIFOs or large files, which this shell must not read.
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
    id='' rc='' cancelled='' last_line=''
    ! is_file "$stamp/id" || read -r id < "$stamp/id"
    [ ! -e "$stamp/cancelled" ] || cancelled=1
    # An empty file, as on a full disk, is a failure.
    if is_file "$stamp/rc"; then read -r rc < "$stamp/rc" || rc=1; fi
    if [ "${rc:-1}" != 0 ] && [ -f "$stamp/stderr" ] && ! [ -h "$stamp/stderr" ]; then
        # Without messages of Slurm, which follow those of the pilot.
        last_line=$(tail -c 4096 "$stamp/stderr" | tr '\000\r' '\n\n' \
            | grep -av -e '^slurmstepd' -e '^[[:space:]]*$' | tail -n 1)
    fi
    printf '%s|%s|%s|%s|%s\n' "$stamp" "$id" "$rc" "$cancelled" "$last_line"
done
