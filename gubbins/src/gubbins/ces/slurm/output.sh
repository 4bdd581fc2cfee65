# Prints the last part of what a pilot has written.
#
#   /bin/sh -c "$(cat output.sh)" output DIRECTORY STAMP stdout|stderr BYTES
#
# Exit code 66: there is no such directory.
[ -e "$1" ] || exit 66
cd "$1" || exit 73
[ ! -h "$2" ] && cd "$2" 2>/dev/null || exit 66
# No link, and nothing that is waited for.
if [ -f "$3" ] && [ ! -h "$3" ]; then exec tail -c "$4" "$3"; fi
