# Prints the last part of what a pilot has written.
#
#   /bin/sh -c "$(cat output.sh)" output DIRECTORY STAMP stdout|stderr BYTES
#
# Exit code 66: there is no such directory.
[ -e "$1" ] || exit 66
cd "$1" || exit 73
why=$(LC_ALL=C ls -d "$2/." 2>&1) || case $why in
    *': No such file or directory' | *': Not a directory') exit 66 ;;
    *) echo "$why" >&2; exit 73 ;; # a stale handle: it may be there
esac
[ ! -h "$2" ] && cd "$2" 2>/dev/null || exit 66
# No link, and nothing that is waited for.
if [ -f "$3" ] && [ ! -h "$3" ]; then exec tail -c "$4" "$3"; fi
