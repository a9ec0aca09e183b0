# shellcheck shell=bash
# lib.sh: what the scripts of the bed share: the names and places of one bed, the record of what it
# made on this machine, its processes, and waiting with a deadline. Sourced, never run.
#
# A bed is an engine (dockerd) of our own with sysbox-mgr, sysbox-fs and sysbox-runc beside it. Everything
# about it follows from one word, BED, so that two of them stand side by side and neither meets a Docker
# that the user already has.

set -euo pipefail
umask 022
CALLER_PATH=$PATH
# A user's PATH often lacks some of these; ip and dockerd live there.
export PATH="$PATH:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

BED_DIR=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
TOP=$(cd "$BED_DIR/../.." && pwd)

say() { printf '%s\n' "$*" >&2; }
die() { # MESSAGE [HINT]
    say "bed: error: $1"
    [ -z "${2:-}" ] || say "hint: $2"
    exit 1
}

# ---- names and places -------------------------------------------------------------------------------------

: "${BED:=dev}"
case $BED in
*[!a-z0-9]* | '' | [0-9]*) die "BED=\`$BED\` is not a name" "small letters and digits, a letter first" ;;
esac
# An interface name has 15 characters at most, and `sbx-` is four of them.
[ ${#BED} -le 11 ] || die "BED=\`$BED\` is longer than 11 characters"

BEDS=/var/lib/sysbox-bed      # all beds of this machine
BED_HOME=$BEDS/$BED           # survives a reboot: binaries, logs, the engine's images
BED_RUN=/run/sysbox-bed/$BED  # does not: sockets, pid files, the engine's exec-root
BED_RECORD=$BEDS/$BED.record  # what `up` made; beside BED_HOME, since that may be removed by it
BED_LOGS=$BED_HOME/log

# The bed `dev` has the programs' default places, so that a plain `sysbox-runc` on the PATH needs no flags.
if [ "$BED" = dev ]; then suffix="" runtime_args='[]'; else suffix=-$BED runtime_args="[\"--run-dir\", \"/run/sysbox-$BED\"]"; fi
SYSBOX_RUN_DIR=/run/sysbox$suffix
SYSBOX_DATA_ROOT=/var/lib/sysbox$suffix
SYSBOX_MOUNTPOINT=/var/lib/sysboxfs$suffix
SYSBOX_RUNC=$BED_HOME/bin/sysbox-runc
SYSBOX_LINK=/usr/local/sbin/sysbox-runc  # made for `dev` only: there is one PATH

ENGINE_SOCKET=$BED_RUN/docker.sock
ENGINE_DATA=$BED_HOME/docker
ENGINE_BRIDGE=sbx-$BED
BIN_DIR=${BIN_DIR:-${CARGO_TARGET_DIR:-$TOP/target}/release}
IMAGE_CACHE=${IMAGE_CACHE:-/var/cache/sysbox/images}

# No dash in the name: in the name of a systemd slice it would mean a child slice.
BED_CGROUP=sysbox_$BED

# Our own calls of the CLI go to our engine and read nobody's contexts and credentials. WITHIN: seconds.
bed_docker() {
    timeout --foreground "$((${WITHIN:-0} * ${SLOW:-1}))" \
        env -u DOCKER_CONTEXT DOCKER_HOST="unix://$ENGINE_SOCKET" DOCKER_CONFIG="$BED_HOME/cli" docker "$@"
}

need_root() { [ "$(id -u)" = 0 ] || die "the bed needs root: it makes mounts, cgroups and a bridge" "sudo -E make $*"; }

# One change of beds at a time: they share the forwarding switch and the choice of a free subnet.
lock_beds() {
    mkdir -p "$BEDS"
    exec 9>"$BEDS/.lock"
    flock -n 9 || { say "waiting for another bed to be made or taken down"; flock 9; }
}

# ---- the record -------------------------------------------------------------------------------------------
# A line `KIND ARGUMENT...` is written BEFORE the thing is made; `undo_KIND ARGUMENT...` takes it away, and
# doing so twice, or after a reboot, is harmless. So whatever happens, the record names at least all there is.

record() {
    grep -qxF -- "$*" "$BED_RECORD" 2>/dev/null || printf '%s\n' "$*" >>"$BED_RECORD"
}

# Newest first. A failure stops nothing; what could not be undone, and data that is kept, stays on record.
undo_record() {
    local lines=() kept=() words=() i status failed=0
    [ ! -f "$BED_RECORD" ] || mapfile -t lines <"$BED_RECORD"
    for ((i = ${#lines[@]} - 1; i >= 0; i--)); do
        read -ra words <<<"${lines[i]}"
        status=0
        "undo_${words[0]}" "${words[@]:1}" || status=$?
        [ $status = 0 ] || kept=("${lines[i]}" "${kept[@]}")
        if [ $status != 0 ] && [ $status != "$KEEP" ]; then
            say "bed: could not undo \`${lines[i]}\`"
            failed=1
        fi
    done
    if [ ${#kept[@]} -gt 0 ]; then
        printf '%s\n' "${kept[@]}" >"$BED_RECORD.new" && mv "$BED_RECORD.new" "$BED_RECORD"
    else
        rm -f "$BED_RECORD"
    fi
    return $failed
}
KEEP=77  # the status of an undo that leaves its thing in place on purpose

# ---- processes --------------------------------------------------------------------------------------------

boot_id() { cat /proc/sys/kernel/random/boot_id; }

# Field 22 of stat, counted behind the last `)` since a command name may hold anything.
start_time() {
    local stat
    stat=$(cat "/proc/$1/stat" 2>/dev/null) || return 1
    # shellcheck disable=SC2086
    set -- ${stat##*) }
    [ "$1" != Z ] && echo "${20}"
}

# PID START BOOT: pids are used again, start times within one boot are not.
is_alive() { [ "$3" = "$(boot_id)" ] && [ "$(start_time "$1")" = "$2" ]; }

# NAME: is the process that the record calls so alive?
is_recorded_alive() {
    local kind name pid start boot
    while read -r kind name pid start boot; do
        if [ "$kind $name" = "process $1" ] && is_alive "$pid" "$start" "$boot"; then return 0; fi
    done < <(cat "$BED_RECORD" 2>/dev/null)
    return 1
}

# NAME COMMAND...: in the background, in a session of its own, its output in the log, on record.
start_process() {
    local name=$1
    shift
    (
        # Descriptors of make and our lock must not live on in a daemon.
        for fd in /proc/self/fd/*; do fd=${fd##*/}; [ "$fd" -le 2 ] || eval "exec $fd>&-"; done
        enter_bed_cgroup
        # By itself, before exec: the record must not miss a process that started.
        self=$BASHPID  # within $( ) it would be another
        record process "$name" "$self" "$(start_time "$self")" "$(boot_id)"
        exec setsid "$@"
    ) </dev/null >>"$BED_LOGS/$name.out" 2>&1 &
    disown
    # Who asks next whether it is alive must find it on record.
    wait_until 10 grep -q "^process $name $! " "$BED_RECORD"
}

undo_process() { # NAME PID START BOOT
    is_alive "$2" "$3" "$4" || return 0
    kill -TERM "$2" 2>/dev/null
    wait_until 30 process_is_gone "$2" "$3" "$4" && return 0
    say "bed: $1 (pid $2) did not end in 30 s, killing it"
    kill -KILL "$2" 2>/dev/null
    wait_until 10 process_is_gone "$2" "$3" "$4"
}
process_is_gone() { ! is_alive "$@"; }

# SECONDS COMMAND...: polls, since a shell cannot wait for a socket or a foreign process.
# SLOW is a factor for deadlines (an emulated machine is 20 to 50 times slower).
wait_until() {
    local end=$((SECONDS + $1 * ${SLOW:-1}))
    shift
    until "$@"; do
        [ $SECONDS -lt $end ] || return 1
        sleep 0.1
    done
}

# PATH: does a process listen on this unix socket? (Flag 0x10000 is "accepts connections".)
is_listening() { awk -v path="$1" '$4 == "00010000" && $8 == path {found = 1} END {exit !found}' /proc/net/unix; }

# ---- cgroups ----------------------------------------------------------------------------------------------

cgroup_mounts() { awk '{ for (i = 7; $i != "-"; i++); if ($(i+1) ~ /^cgroup2?$/) print $5 }' /proc/self/mountinfo; }
cgroup2_mount() { awk '{ for (i = 7; $i != "-"; i++); if ($(i+1) == "cgroup2") {print $5; exit} }' /proc/self/mountinfo; }

# Daemons, engine, shims: all children of the bed stay in this cgroup (v2, also where v2 is only the second
# tree), so `down` finds even what a killed dockerd left, without a guess by name.
enter_bed_cgroup() {
    local tree
    tree=$(cgroup2_mount)
    [ -n "$tree" ] || return 0
    mkdir -p "$tree/$BED_CGROUP.bed" 2>/dev/null && echo "$BASHPID" >"$tree/$BED_CGROUP.bed/cgroup.procs" || true
}

undo_cgroup() { # NAME: in every hierarchy, with all that is in it
    local tree status=0
    for tree in $(cgroup_mounts); do
        [ ! -d "$tree/$1" ] || wait_until 15 empty_and_remove_cgroup "$tree/$1" || status=1
    done
    return $status
}
empty_and_remove_cgroup() {
    local dir pids
    while read -r dir; do
        pids=$(cat "$dir/cgroup.procs" 2>/dev/null || true)
        # shellcheck disable=SC2086
        [ -z "$pids" ] || kill -KILL $pids 2>/dev/null || true
        # A frozen (v1) task cannot die.
        [ ! -e "$dir/freezer.state" ] || echo THAWED 2>/dev/null >"$dir/freezer.state" || true
        rmdir "$dir" 2>/dev/null || true
    done < <(find "$1" -depth -type d 2>/dev/null)
    [ ! -d "$1" ]
}

# ---- mounts, directories, links ---------------------------------------------------------------------------

# DIR: the mount points at and below it, newest first.
mounts_below() {
    awk -v dir="$1" '$5 == dir || index($5, dir "/") == 1 {print $5}' /proc/self/mountinfo | tac
}

undo_mounts() { # DIR
    local target
    while read -r target; do
        target=$(printf '%b' "$target")  # \040 is a blank
        umount "$target" 2>/dev/null || umount -l "$target" || return 1
    done < <(mounts_below "$1")
    [ -z "$(mounts_below "$1")" ]
}

# A tree with a mount in it is never deleted: behind the mount is what belongs to somebody else.
remove_tree() {
    if [ -n "$(mounts_below "$1")" ]; then
        say "bed: $1 stays: mounted in it: $(mounts_below "$1" | tr '\n' ' ')"
        return 1
    fi
    rm -rf --one-file-system -- "$1"
}

# DIR: makes it and records it as KIND (`dir` goes with down, `data` only with PURGE=1), but only if it is ours:
# a directory that was there before belongs to somebody else and stays.
make_dir() { # KIND DIR
    if [ ! -e "$2" ]; then record "$1" "$2"; fi
    mkdir -p "$2"
}
undo_dir() { remove_tree "$1"; }
undo_data() { [ "${PURGE:-0}" = 1 ] || return $KEEP; remove_tree "$1"; }

undo_link() { # PATH TARGET
    [ "$(readlink "$1" 2>/dev/null)" != "$2" ] || rm -f "$1"
}
