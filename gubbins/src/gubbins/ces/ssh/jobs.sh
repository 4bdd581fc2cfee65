# What can be done with pilots, for a POSIX shell of a Linux host. A command is these functions and one call for
# each pilot, all on the standard input of one `sh`; it begins with `enter` and ends with `say end`.
#
# Answers are records: a line break, the mark of the command, and a word for what follows. What a log-in script
# prints is none. Stamps hold letters, digits, dots, dashes and underscores, and begin with a letter or a digit.
umask 077
set -f
line_break='
'
[ -z "${HOME:-}" ] || cd "$HOME" 2> /dev/null # relative names begin there, wherever sshd has put us

say() {
    printf '\n%s %s' "$mark" "$*"
}

fail() {
    say failed "$*"
    exit 1
}

# enter WORKDIR: go there. All names are relative from then on.
enter() {
    cd "$1" 2>/dev/null || fail "cannot enter $1"
    here=$(uname -n)
    read -r this_boot < /proc/sys/kernel/random/boot_id || fail "this is no Linux: there is no boot id in /proc"
}

# prepare WORKDIR: make it, when it is not there.
prepare() {
    command -v setsid > /dev/null || fail "there is no setsid"
    why=$(mkdir -p "$1" 2>&1) || fail "$why"
}

# submit STAMP, with $script, $wrapper, $environment, and $secret, which is empty if it has none
# -> submitted STAMP | refused STAMP WHY
# The directory is the submission: the call that makes it starts the pilot, and no other.
submit() {
    if why=$(mkdir "$1" 2>&1); then
        if why=$(write "$1" 2>&1); then
            PILOT_STAMP=$1 setsid /bin/sh "$1/wrapper" "$1" < /dev/null > /dev/null 2>&1 &
        else
            rm -rf "./$1"
            say refused "$1" "$why"
            return
        fi
    elif ! [ -d "$1" ]; then
        if is_unreadable "$1"; then say unreadable "$1" "$failure"; else say refused "$1" "$why"; fi
        return
    fi
    say submitted "$1"
}

write() {
    printf '%s' "$script" > "$1/script" &&
        printf '%s' "$wrapper" > "$1/wrapper" &&
        printf '%sPILOT_STAMP=%s\nexport PILOT_STAMP\n' "$environment" "$1" > "$1/environment" &&
        { [ -z "$secret" ] || printf '%s' "$secret" > "$1/secret"; }
}

# find_files STAMP…: what the pilots have of the files that are read below, in $files: regular ones of 512 bytes at
# most. A pilot can put anything in their place, and a shell would follow, wait, or read without end.
files=
find_files() {
    files="$files $(find "$@" -maxdepth 1 -type f -size -2 \( -name pid -o -name rc -o -name cancelled \) 2> /dev/null |
        tr '\n' ' ')"
}

is_file() {
    case $files in
        *" $1 "*) return 0 ;;
    esac
    return 1
}

# is_unreadable DIRECTORY: whether nothing is known of it or of what is in it, and why, in $failure: a stale handle, a
# lost connection. One that is not there, and what is no directory, is known.
is_unreadable() {
    failure=$(LC_ALL=C ls -la "$1" 2>&1 > /dev/null) && return 1
    failure=${failure%%"$line_break"*}
    case $failure in
        *': No such file or directory') return 1 ;;
    esac
}

# is_text FILE: a regular file, of any size.
is_text() {
    [ -f "$1" ] && ! [ -h "$1" ]
}

# observe STAMP, after find_files
# -> prepared STAMP SECONDS | elsewhere STAMP HOST | running STAMP | restarted STAMP
#    | ended STAMP CODE CANCELLED LAST-WORDS; CODE is - when there is none | unreadable STAMP WHY.
# Nothing for one that is unknown.
observe() {
    if ! is_job "$1"; then
        ! is_unreadable "$1" || say unreadable "$1" "$failure"
        return 0
    fi
    if ! has_ended "$1"; then
        if ! read_process "$1"; then
            if is_unreadable "$1"; then
                say unreadable "$1" "$failure"
                return
            fi
            made=$(stat -c %Y "$1") && say prepared "$1" $(($(date +%s) - made))
            return 0
        fi
        if [ "$host" != "$here" ]; then
            say elsewhere "$1" "$host"
            return
        elif [ "$boot" != "$this_boot" ]; then
            say restarted "$1"
            return
        elif is_alive; then
            say running "$1"
            return
        fi
        # It may have written its exit code and ended since we looked for it.
        find_files "$1"
        has_ended "$1" || code=-
    fi 2> /dev/null
    [ -e "$1/cancelled" ] || [ -h "$1/cancelled" ] && cancelled=1 || cancelled=0
    words=
    [ "$code" = 0 ] || last_line "$1/stderr"
    say ended "$1" "$code" "$cancelled" "$words"
}

is_job() {
    [ -d "$1" ] && ! [ -h "$1" ]
}

has_ended() {
    is_file "$1/rc" || return 1
    read -r code < "$1/rc"
    case $code in
        '' | *[!0-9]*) code=1 ;; # a full disk leaves an empty file: it ended, and not well
    esac
}

read_process() {
    is_file "$1/pid" || return 1
    read -r pid start boot host < "$1/pid" || return 1
    case $pid in
        '' | *[!0-9]* | 0* | 1) return 1 ;; # a signal to the groups 0 and 1 would reach far more than a pilot
    esac
}

# Whether the wrapper with this $pid and $start runs, or has left others of its process group behind.
is_alive() {
    if read -r stat < "/proc/$pid/stat"; then
        # The command, in parentheses, may contain anything; what follows it does not.
        # shellcheck disable=SC2086 # the fields are meant to be split
        set -- ${stat##*) }
        # Another process has the number: it is given away only when no group has it any more.
        [ "${20}" = "$start" ] || return 1
        case $1 in
            [ZX]) ;;
            *) return 0 ;;
        esac
    fi
    # The signal would reach those as well that have ended and were not collected.
    kill -s 0 -- "-$pid" || return 1
    [ -n "$groups" ] || find_groups
    case $groups in
        *" $pid "*) return 0 ;;
    esac
    return 1
} 2> /dev/null

# All process groups in which something runs, in $groups; once in a command, for it takes its time.
groups=
find_groups() {
    groups=' '
    set +f
    set -- /proc/[0-9]*
    set -f
    for process; do
        read -r stat < "$process/stat" || continue
        # shellcheck disable=SC2086
        set -- ${stat##*) }
        case $1 in
            [ZX]) ;;
            *) groups="$groups$3 " ;;
        esac
    done
} 2> /dev/null

# The last line of the file that is not blank, in $words.
last_line() {
    words=
    is_text "$1" || return 0
    rest=$(tail -c 4096 "$1")
    while [ -n "$rest" ]; do
        words=${rest##*"$line_break"}
        case $words in
            *[![:space:]]*) return ;;
        esac
        rest=${rest%"$words"}
        rest=${rest%"$line_break"}
    done
} 2> /dev/null

# Whether something of the process group $pid was started for the pilot STAMP: the stamp is in the environment that
# all its processes were given. The pilot can write the number of any group.
is_group_of() {
    ! has_stamp "/proc/$pid" "$1" || return 0
    set +f
    set -- "$1" /proc/[0-9]*
    set -f
    stamp=$1
    shift
    for process; do
        read -r stat < "$process/stat" || continue
        group=${stat##*) }
        group=${group#* * }
        [ "${group%% *}" = "$pid" ] || continue
        ! has_stamp "$process" "$stamp" || return 0
    done
    return 1
} 2> /dev/null

has_stamp() {
    tr '\0' '\n' < "$1/environ" | grep -qx "PILOT_STAMP=$2"
}

# cancel STAMP, after find_files, with $now (s since 1970) and $kill_after (s): SIGTERM, and when it was asked for so long
# ago, SIGKILL.
cancel() {
    is_job "$1" && ! has_ended "$1" || return 0
    since=0 # what is no file of ours tells no time: that is no reason to wait for ever
    if ! [ -e "$1/cancelled" ] && ! [ -h "$1/cancelled" ]; then
        since=$now
        (set -C && printf '%s\n' "$now" > "$1/cancelled")
    fi
    # Without a process the wrapper has yet to look for the mark.
    read_process "$1" || return 0
    [ "$host" = "$here" ] && [ "$boot" = "$this_boot" ] && is_alive && is_group_of "$1" || return 0
    ! is_file "$1/cancelled" || read -r since < "$1/cancelled"
    case $since in
        '' | *[!0-9]*) since=0 ;; # no room for the time
    esac
    if [ $((now - since)) -ge "$kill_after" ]; then signal=KILL; else signal=TERM; fi
    kill -s "$signal" -- "-$pid"
} 2> /dev/null

# output STAMP BYTES -> stdout, stderr, each followed by a line break and the last so many bytes
output() {
    is_job "$1" || ! is_unreadable "$1" || fail "$failure"
    is_job "$1" || return 0
    for name in stdout stderr; do
        say "$name"
        printf '\n'
        ! is_text "$1/$name" || tail -c "$2" "$1/$name"
    done
}

# keep STAMP: until a sweep takes it.
keep() {
    is_job "$1" && ! [ -e "$1/forgotten" ] && (set -C && : > "$1/forgotten") 2> /dev/null
    return 0
}

# sweep MINUTES: remove what was marked `forgotten` so long ago, and what ended a month before that and was
# never heard of again.
sweep() {
    find . -mindepth 2 -maxdepth 2 \
        \( -name forgotten -mmin "+$1" -o -name rc -mmin "+$(($1 + 43200))" \) \
        -exec sh -c 'for mark; do rm -rf "${mark%/*}"; done' sh {} +
}
