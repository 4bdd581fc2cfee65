# Submits one pilot, at most once per stamp.
#
#   /bin/sh -c "$(cat submit.sh)" submit DIRECTORY STAMP SECONDS NUMBER FIND SBATCH...  < SECRET and batch script
#
# The first line of the input is the pilot's secret, or empty; it is written to a file that only this account can read.
# NUMBER is a sed script that extracts the job number from the output of SBATCH; FIND is a shell command that prints the
# job numbers of this pilot in the queue. Prints `number`, or `number;cluster`.
# Files in the directory of the stamp: lock (held during a submission), tried (sbatch was called), id (printed number).
# Exit codes: 73 not submitted, 75 not known, 124 time-out of sbatch; all others are those of sbatch.
directory=$1 stamp=$2 seconds=$3 number=$4 find=$5
shift 5
IFS= read -r secret || exit 73
{ mkdir -p "$directory" && cd "$directory"; } || exit 73
error=$(mkdir "$stamp" 2>&1) || [ -d "$stamp" ] || {
    echo "$error" >&2
    error=$(LC_ALL=C ls -d "$stamp" 2>&1) || case $error in
        *': No such file or directory') ;;
        *) echo "$error" >&2; exit 75 ;; # as a stale file handle: it may exist
    esac
    exit 73
}
# Without `command`, a shell exits if a redirection of `exec` or `:` fails.
command exec 9> "$stamp/lock" || exit 73
# Inherited by sbatch, which may outlive this shell and still submit.
LC_ALL=C flock -w "$seconds" 9 || { echo "$stamp is being submitted by another" >&2; exit 75; }

# Extracts the job number: filters and wrappers of the site may print other lines.
number() {
    sed -n "$number" | sort -un
}
# Prints the known job number, if any, and exits.
print_known() {
    [ -f "$stamp/id" ] && [ ! -h "$stamp/id" ] || return 0
    id=$(head -c 128 "$stamp/id" | tr -d '\000' | number)
    [ -z "$id" ] || { printf '%s\n' "$id" | head -n 1; exit 0; }
}
# A job that has just started records its number, too, by way of id.new.
store() {
    printf '%s\n' "$1" > "$stamp/id.found" && mv "$stamp/id.found" "$stamp/id" || exit 75
}

print_known
if [ -e "$stamp/tried" ]; then
    # The outcome of an earlier submission is not known: search the queue.
    found=$(timeout "$seconds" /bin/sh -c "$find" 2>&1 < /dev/null) # with all its processes; the script is in stdin
    case $?:$found in
        124:*) echo "the queue has not responded within $seconds s" >&2; exit 75 ;;
        # Of one of several clusters that does not respond, with exit code 0.
        0:*rror:* | 0:*'No cluster'* | [!0]*) printf '%s\n' "$found" >&2; exit 75 ;;
    esac
    print_known
    found=$(printf '%s\n' "$found" | number | head -n 1)
    [ -z "$found" ] || store "$found"
    print_known
fi
if [ -n "$secret" ]; then
    (umask 077; printf '%s' "$secret" > "$stamp/secret.new") && mv "$stamp/secret.new" "$stamp/secret" || exit 73
fi
[ -e "$stamp/tried" ] || true > "$stamp/tried" || exit 73
output=$(timeout --foreground "$seconds" "$@") || {
    code=$?
    printf '%s\n' "$output"
    case $code in
        73 | 75) code=1 ;;
    esac
    # A plugin or a wrapper may fail after the submission.
    [ "$code" = 124 ] || [ -z "$(printf '%s\n' "$output" | number)" ] || code=75
    exit "$code"
}
id=$(printf '%s\n' "$output" | number)
case $id in
    '' | *[!0-9A-Za-z_.\;-]*)
        printf 'not the number of a job: %s\n' "$output"
        exit 75
        ;;
esac
store "$id"
print_known
