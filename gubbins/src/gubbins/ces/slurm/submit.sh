# Submits one pilot, and no second one of the same stamp.
#
#   /bin/sh -c "$(cat submit.sh)" submit DIRECTORY STAMP SECONDS SQUEUE CLUSTERS SBATCH…  < batch script
#
# Prints the job's number. Of the stamp's directory: lock (held during a submission), tried (sbatch has been
# called, however that went), id (the job's number). Exit code 75: not known
# whether it has been submitted; 124: sbatch has not answered in time. All others but those of sbatch: it has not.
directory=$1 stamp=$2 seconds=$3 squeue=$4 clusters=$5
shift 5
mkdir -p "$directory" && cd "$directory" || exit 73
mkdir "$stamp" 2>/dev/null || [ -d "$stamp" ] || { echo "$directory/$stamp cannot be made" >&2; exit 73; }
exec 9> "$stamp/lock" || exit 73
# Held by what is started from here as well: an sbatch that outlives this shell still submits.
flock -w "$seconds" 9 || { echo "$stamp is being submitted by another" >&2; exit 75; }

known() {
    [ -f "$stamp/id" ] && [ ! -h "$stamp/id" ] && [ -s "$stamp/id" ] && exec head -c 64 "$stamp/id"
}
note() {
    printf '%s\n' "$1" > "$stamp/id.new" && mv "$stamp/id.new" "$stamp/id" || exit 73
}

known
if [ -e "$stamp/tried" ]; then
    # Its result is not known. The queue knows.
    found=$(timeout --foreground "$seconds" "$squeue" -h --me --all -t all ${clusters:+"--clusters=$clusters"} \
        -n "$stamp" -o %i) || {
        [ $? -ne 124 ] || echo "squeue has not answered within $seconds s" >&2
        exit 75
    }
    known
    if [ -n "$found" ]; then
        note "$(printf '%s\n' "$found" | sort -n | head -n 1)"
        known
    fi
fi
: > "$stamp/tried" || exit 73
id=$(timeout --foreground "$seconds" "$@") || exit $?
note "$id" # with several clusters it is `number;cluster`
known
