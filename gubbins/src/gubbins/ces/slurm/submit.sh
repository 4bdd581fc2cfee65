# Submits one pilot, and no second one of the same stamp.
#
#   /bin/sh -c "$(cat submit.sh)" submit DIRECTORY STAMP SECONDS NUMBER FIND SBATCH…  < SECRET and batch script
#
# The first line of the input is the pilot's secret, or empty: a file for the job, which no other account can read.
#
# NUMBER is a sed script that prints what is a job's number of a line, and nothing of others; FIND is shell text that prints
# the numbers of jobs of this pilot in the queue. Prints `number`, or `number;cluster`. Of the stamp's directory: lock (held during a submission), tried (sbatch has been
# called, however that went), id (what is printed). Exit code 73: it has not been submitted; 75: not known whether it has
# been; 124: sbatch has not answered in time. All others are those of sbatch.
directory=$1 stamp=$2 seconds=$3 number=$4 find=$5
shift 5
IFS= read -r secret || exit 73
{ mkdir -p "$directory" && cd "$directory"; } || exit 73
mkdir "$stamp" 2>/dev/null || [ -d "$stamp" ] || {
    echo "$directory/$stamp cannot be made" >&2
    why=$(LC_ALL=C ls -d "$stamp" 2>&1) || case $why in
        *': No such file or directory') ;;
        *) echo "$why" >&2; exit 75 ;; # a stale handle: it may be there
    esac
    exit 73
}
exec 9> "$stamp/lock" || exit 73
# Held by what is started from here as well: an sbatch that outlives this shell still submits.
flock -w "$seconds" 9 || { echo "$stamp is being submitted by another" >&2; exit 75; }

# The one number among lines of anything: a filter or a wrapper of the site may print more.
number() {
    sed -n "$number" | sort -un
}
known() {
    [ -f "$stamp/id" ] && [ ! -h "$stamp/id" ] || return 0
    id=$(head -c 128 "$stamp/id" | tr -d '\000' | number)
    [ -z "$id" ] || { printf '%s\n' "$id" | head -n 1; exit 0; }
}
note() {
    printf '%s\n' "$1" > "$stamp/id.new" && mv "$stamp/id.new" "$stamp/id" || exit 75
}

known
if [ -e "$stamp/tried" ]; then
    # Its result is not known. The queue knows.
    found=$(timeout --foreground "$seconds" /bin/sh -c "$find") || {
        [ $? -ne 124 ] || echo "the queue has not answered within $seconds s" >&2
        exit 75
    }
    known
    found=$(printf '%s\n' "$found" | number | head -n 1)
    [ -z "$found" ] || note "$found"
    known
fi
if [ -n "$secret" ]; then
    (umask 077; printf '%s' "$secret" > "$stamp/secret.new") && mv "$stamp/secret.new" "$stamp/secret" || exit 73
fi
[ -e "$stamp/tried" ] || : > "$stamp/tried" || exit 73
said=$(timeout --foreground "$seconds" "$@") || {
    code=$?
    printf '%s\n' "$said"
    case $code in
        73 | 75) exit 1 ;;
    esac
    exit $code
}
id=$(printf '%s\n' "$said" | number)
case $id in
    '' | *[!0-9A-Za-z_.\;-]*)
        printf 'not the number of a job: %s\n' "$said"
        exit 75
        ;;
esac
note "$id"
known
