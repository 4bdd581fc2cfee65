# Prints the last part of stdout or stderr of a pilot.
#
#   /bin/sh -c "$(cat output.sh)" output DIRECTORY STAMP stdout|stderr BYTES
#
# Exit codes: 66 the directory of the pilot does not exist, 69 DIRECTORY does not exist.
[ -z "${HOME:-}" ] || cd "$HOME" 2> /dev/null # base of relative names
[ -e "$1" ] || { echo "$1 does not exist, or is not mounted" >&2; exit 69; }
cd "$1" || exit 73
error=$(LC_ALL=C ls -d "$2/." 2>&1) || case $error in
    *': No such file or directory' | *': Not a directory') exit 66 ;;
    *) echo "$error" >&2; exit 73 ;; # as a stale file handle: it may exist
esac
[ ! -h "$2" ] && cd "$2" 2>/dev/null || exit 66
# Neither a link nor a FIFO.
if [ -f "$3" ] && [ ! -h "$3" ]; then exec tail -c "$4" "$3"; fi
