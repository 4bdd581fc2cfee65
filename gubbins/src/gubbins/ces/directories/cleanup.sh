# Marks and removes directories of pilots.
#
#   /bin/sh -c "$(cat cleanup.sh)" cleanup DIRECTORY MINUTES FILE  < lines of `cancelled STAMP`, `ended STAMP` or `remove STAMP`
#
# Also removes directories marked as `ended` more than MINUTES ago, and those with an exit code older than MINUTES plus
# 30 days, if they have FILE; not if MINUTES is empty. The secret and tokens of a pilot that has ended are removed in any
# case.
[ -z "${HOME:-}" ] || cd "$HOME" 2> /dev/null # base of relative names
[ -e "$1" ] || exit 0
cd "$1" || exit 73
while read -r what stamp; do
    [ -d "$stamp" ] && ! [ -h "$stamp" ] || continue
    if [ "$what" = ended ]; then
        [ ! -f "$stamp/secret" ] || rm -f -- "./$stamp/secret"
        for file in "./$stamp/work"/.pilot[-.]*; do # few pilots have any
            if [ -e "$file" ] || [ -h "$file" ]; then [ -h "$stamp/work" ] || rm -rf -- "$file"; fi
        done
    fi
    case $what in
        remove) echo "./$stamp" ;;
        *) [ -e "$stamp/$what" ] || (set -C && : > "$stamp/$what") 2> /dev/null ;;
    esac
done | xargs rm -rf --
[ -n "$2" ] || exit 0
find . -mindepth 2 -maxdepth 2 \( -name ended -mmin "+$2" -o -name rc -mmin "+$(($2 + 43200))" \) |
    while read -r mark; do [ ! -e "${mark%/*}/$3" ] || rm -rf -- "${mark%/*}"; done
