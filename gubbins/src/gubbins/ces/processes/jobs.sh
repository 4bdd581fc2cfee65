# Functions for pilots on a Linux host, in POSIX shell. A command is the text of these functions and a call for each
# pilot, on the stdin of one `sh`; it begins with `enter`. It prints a line for each pilot: a word, the stamp, and data.
#
# Stamps begin with a letter or a digit, and may contain dots, dashes and underscores. Exit code 73: nothing was done.
#
# If pilots run as another user, $owner is its uid:gid, and $run_as the prefix of a command that changes to it. Such a
# pilot can neither write nor replace the files of its directory, other than those in `work`.
owner='' run_as=''
worker_umask=$(umask)
umask 077
set -f
line_break='
'
[ -z "${HOME:-}" ] || cd "$HOME" 2> /dev/null # base of relative names

say() {
    printf '%s\n' "$*"
}

fail() {
    say "$*" >&2
    exit 73
}

# enter WORKDIR: change to the working directory, to which all names are relative.
enter() {
    cd "$1" 2>/dev/null || fail "cannot enter $1"
    read -r here < /proc/sys/kernel/hostname && read -r this_boot < /proc/sys/kernel/random/boot_id ||
        fail "this is no Linux: there is no boot id in /proc"
}

# prepare WORKDIR: make the working directory.
prepare() {
    command -v setsid > /dev/null || fail "there is no setsid"
    error=$( (
        [ -z "$owner" ] || umask 066 # the other user must reach its directory
        mkdir -p "$1" && { [ -z "$owner" ] || chmod 711 "$1"; }
    ) 2>&1) || fail "$error"
}

# submit STAMP, with $script, $wrapper, $environment and $secret (may be empty)
# -> submitted STAMP | refused STAMP ERROR | unreadable STAMP ERROR
# Only the call that makes the directory starts the pilot.
submit() {
    # shellcheck disable=SC2086 # two words, or none
    if error=$(mkdir ${owner:+-m 710} "$1" 2>&1); then
        if error=$(write "$1" 2>&1); then
            # shellcheck disable=SC2086 # the words are meant to be split
            PILOT_STAMP=$1 setsid /bin/sh "$1/wrapper" "$1" $run_as < /dev/null > /dev/null 2>&1 &
        else
            rm -rf "./$1"
            say refused "$1" "${error%%"$line_break"*}"
            return
        fi
    elif ! [ -d "$1" ]; then
        if is_unreadable "$1"; then say unreadable "$1" "$failure"; else say refused "$1" "${error%%"$line_break"*}"; fi
        return
    fi
    say submitted "$1"
}

write() {
    printf '%s' "$script" > "$1/script" &&
        printf '%s' "$wrapper" > "$1/wrapper" &&
        printf '%sPILOT_STAMP=%s\nexport PILOT_STAMP\n' "$environment" "$1" > "$1/environment" &&
        chmod 755 "$1/script" && mkdir "$1/work" &&
        { [ -z "$secret" ] || printf '%s' "$secret" > "$1/work"/.pilot-secret; } &&
        { [ -z "$owner" ] || { chown -R "$owner" "$1/work" && chgrp "${owner#*:}" "$1"; }; }
}

# find_bad_files STAMP...: set $bad to the files of the pilots that are not to be read: pilots could replace them by links,
# FIFOs or large files.
find_bad_files() {
    bad=" $(find "$@" -maxdepth 1 \( -name pid -o -name rc -o -name cancelled \) \( ! -type f -o -size +1 \) \
        2> /dev/null | tr '\n' ' ')"
}

is_file() {
    case $bad in
        *" $1 "*) return 1 ;;
    esac
    is_text "$1"
}

# is_unreadable DIRECTORY: true if the directory cannot be read (stale file handle, lost connection), with the error in
# $failure; false if it is readable or does not exist.
is_unreadable() {
    failure=$(LC_ALL=C ls -la "$1" 2>&1 > /dev/null) && return 1
    failure=${failure%%"$line_break"*}
    case $failure in
        *': No such file or directory') return 1 ;;
    esac
}

# is_text FILE: true for a regular file of any size.
is_text() {
    [ -f "$1" ] && ! [ -h "$1" ]
}

# observe STAMP, after find_bad_files
# -> prepared STAMP SECONDS | elsewhere STAMP HOST | running STAMP | restarted STAMP
#    | ended STAMP CODE CANCELLED LAST-LINE; CODE is - if there is none | unreadable STAMP ERROR
# No record for an unknown stamp.
observe() {
    if ! is_job "$1"; then
        ! is_unreadable "$1" || say unreadable "$1" "$failure"
        return 0
    fi
    # The process first, since a running pilot could write an exit code.
    if is_running "$1"; then
        say running "$1"
        return
    fi
    if ! has_ended "$1"; then
        if ! read_process "$1"; then
            if is_unreadable "$1"; then
                say unreadable "$1" "$failure"
                return
            fi
            created=$(stat -c %Y "$1") && say prepared "$1" $(($(date +%s) - created))
            return 0
        fi
        if [ "$host" != "$here" ]; then
            say elsewhere "$1" "$host"
            return
        elif [ "$boot" != "$this_boot" ]; then
            say restarted "$1"
            return
        fi
        # It may have ended meanwhile.
        has_ended "$1" || code=-
    fi 2> /dev/null
    [ -e "$1/cancelled" ] || [ -h "$1/cancelled" ] && cancelled=1 || cancelled=0
    line=
    [ "$code" = 0 ] || last_line "$1/stderr"
    say ended "$1" "$code" "$cancelled" "$line"
}

is_job() {
    [ -d "$1" ] && ! [ -h "$1" ]
}

has_ended() {
    is_file "$1/rc" || return 1
    read -r code < "$1/rc"
    case $code in
        '' | *[!0-9]*) code=1 ;; # an empty file, as on a full disk
    esac
}

read_process() {
    is_file "$1/pid" || return 1
    read -r pid start boot host < "$1/pid" || return 1 # its line is incomplete
    case $pid in
        '' | *[!0-9]* | 0* | 1) return 1 ;; # never signal the groups 0 and 1
    esac
}

# is_running STAMP: true if the wrapper is running on this host or, without an exit code, another process of its group.
# Processes that an ended pilot has left do not count.
is_running() {
    read_process "$1" && [ "$host" = "$here" ] && [ "$boot" = "$this_boot" ] || return 1
    if read -r stat < "/proc/$pid/stat"; then
        # The command, in parentheses, may contain anything.
        # shellcheck disable=SC2086 # the fields are meant to be split
        set -- "$1" ${stat##*) }
        # The pid was reused, which is possible only after the end of the group.
        [ "${21}" = "$start" ] || return 1
        case $2 in
            [ZX]) ;;
            *) return 0 ;;
        esac
    fi
    # Zombies count as well.
    ! has_ended "$1" && kill -0 "-$pid" || return 1
    [ -n "$groups" ] || find_groups
    case $groups in
        *" $pid "*) return 0 ;;
    esac
    return 1
} 2> /dev/null

# Set $groups to all process groups with running processes; slow, once per command.
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

# Set $line to the last line of the file that is not blank.
last_line() {
    line=
    is_text "$1" || return 0
    rest=$(tail -c 4096 "$1")
    while [ -n "$rest" ]; do
        line=${rest##*"$line_break"}
        case $line in
            *[![:space:]]*) return ;;
        esac
        rest=${rest%"$line"}
        rest=${rest%"$line_break"}
    done
} 2> /dev/null

# is_group_of STAMP: true if a process of the group $pid has the stamp in its environment. A pilot could write the number
# of any other group.
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

# cancel STAMP, after find_bad_files, with $now (s since 1970) and $kill_after (s): send SIGTERM, or SIGKILL if it was
# cancelled more than $kill_after ago.
# -> unmarked STAMP ERROR: it cannot be marked as cancelled
cancel() {
    is_job "$1" || return 0
    if is_running "$1"; then running=1; else running=; fi
    [ -n "$running" ] || ! has_ended "$1" || return 0
    since=0 # if the mark is not our file
    if [ -e "$1/cancelled" ] || [ -h "$1/cancelled" ]; then
        # Not its content, by which a pilot could end this shell.
        ! is_file "$1/cancelled" || since=$(stat -c %Y "$1/cancelled")
    else
        since=$now
        error=$( (set -C && : > "$1/cancelled") 2>&1) ||
            [ -e "$1/cancelled" ] || say unmarked "$1" "${error%%"$line_break"*}"
    fi
    # If there is no process file yet, the wrapper will find the mark.
    [ -n "$running" ] && is_group_of "$1" || return 0
    if [ $((now - since)) -ge "$kill_after" ]; then signal=KILL; else signal=TERM; fi
    kill "-$signal" "-$pid"
} 2> /dev/null
