# shellcheck shell=bash
# How a launch script passes signals on; sourced by torchrun.sh and deepspeed.sh.
#
# bash runs a trap only between commands, and as process 1 of a container it ignores what it has no trap for. So every
# command runs in the background (`step`) in a process group of its own, and the script waits for it.
set -m

asked= # TERM, INT or HUP once it came
child= # the command that runs
levels=0 # of launchers above the ranks

signals=0 # how many came
passed=0  # how many of them were passed on

trap 'asked=TERM; signals=$((signals + 1)); pass_term' TERM
trap 'asked=INT; signals=$((signals + 1)); pass_all INT' INT
trap 'asked=HUP; signals=$((signals + 1)); pass_all HUP' HUP

# Runs a command to its end and returns its exit code; none after a signal.
step() {
    if [ -n "$asked" ]; then
        exit "$(code_of_signal)"
    fi
    "$@" &
    child=$!
    await
}

# `launch LEVELS COMMAND`: the same for a launcher, LEVELS processes above the ranks.
launch() {
    levels=$1
    shift
    step "$@"
}

# The exit code of the child, however often a signal ends the wait.
await() {
    local code before=-1
    if [ "$passed" -lt "$signals" ]; then # it came before there was a child
        pass_term
    fi
    while [ "$before" -ne "$signals" ]; do # a signal ends `wait`, too
        before=$signals code=0
        wait "$child" || code=$?
    done
    if [ -n "$asked" ]; then
        pass_all TERM # who has lost the launcher
        if [ "$code" -eq 0 ]; then
            code=$(code_of_signal)
        fi
    fi
    child='' levels=0
    return "$code"
}

# To the ranks themselves: a launcher gives them half a minute and kills them then, and deepspeed's passes nothing on.
# Each rank keeps a checkpoint with the others, however long that takes. To the launcher where there is none yet.
pass_term() {
    local targets level
    if [ -z "$child" ]; then
        return
    fi
    passed=$signals
    targets=$child
    for ((level = 0; level < levels; level++)); do
        # shellcheck disable=SC2086 # several numbers
        targets=$(children_of $targets)
    done
    if [ -z "$targets" ]; then
        pass_all TERM
    else
        # shellcheck disable=SC2086
        kill -TERM $targets 2>/dev/null || true
    fi
}

pass_all() {
    if [ -n "$child" ]; then
        passed=$signals
        kill -"$1" -- "-$child" 2>/dev/null || true
    fi
}

# Children of the processes that are given; /proc, because an image may lack ps.
children_of() {
    local stat line fields pid
    for stat in /proc/[0-9]*/stat; do
        line=
        read -r line 2>/dev/null <"$stat" || true
        read -ra fields <<<"${line##*) }"
        for pid in "$@"; do
            if [ "${fields[1]:-}" = "$pid" ]; then
                echo "${line%% *}"
            fi
        done
    done
}

code_of_signal() {
    case $asked in
        TERM) echo 143 ;;
        INT) echo 130 ;;
        *) echo 129 ;;
    esac
}

# `exit_code CODE`: what a launcher's exit code, or that of a rank, means in the terms of launch/README.md. A process that
# a signal ended (a negative code, which deepspeed's launcher takes from 256, or more than 128) is a matter of machines,
# unless the signal came through this script; then what the launcher says of its own end counts for nothing.
exit_code() {
    case $1 in
        2 | 3 | 4 | 130 | 143) echo "$1" ;;
        *)
            if [ -n "$asked" ]; then
                code_of_signal
            elif [ "$1" -lt 0 ] || [ "$1" -gt 128 ]; then
                echo 4
            else
                echo "$1"
            fi
            ;;
    esac
}
