# shellcheck shell=bash
# daemons.sh: our own programs in the bed: their copies, sysbox-mgr and sysbox-fs running. Sourced by up.

PROGRAMS="sysbox-runc sysbox-mgr sysbox-fs"

# Is a program of the build another than the one that the bed runs?
is_changed() { ! cmp -s "$BIN_DIR/$1" "$BED_HOME/bin/$1"; }

# What root of the host runs, nobody else may change: not the file, and not by putting another in its place. In a sticky
# directory (/tmp) only an owner can.
require_closed() {
    local path mode
    path=$(realpath "$1")
    while :; do
        mode=$(stat -c %a "$path")
        if (( (8#$mode & 8#22) && ! (8#$mode & 8#1000) )) || [ "$(stat -c %u "$path")" != 0 ]; then
            die "\`$path\` can be changed by others than root, and \`$1\` would run as root" "chown root \`$path\`; chmod go-w \`$path\`"
        fi
        [ "$path" != / ] || return 0
        path=$(dirname "$path")
    done
}

# Copies: a build in the middle of a test must not change what runs. By rename, since a running file is busy.
install_programs() {
    local program
    for program in $PROGRAMS; do
        [ -x "$BIN_DIR/$program" ] || die "\`$BIN_DIR/$program\` is missing" "make build"
        is_changed "$program" || continue
        cp "$BIN_DIR/$program" "$BED_HOME/bin/.$program"
        mv "$BED_HOME/bin/.$program" "$BED_HOME/bin/$program"
    done
    for program in $PROGRAMS; do require_closed "$BED_HOME/bin/$program"; done
}

# On the PATH for a person at the shell; `dev` only. A link, so that it is plain whose it is.
check_link() {
    [ "$BED" = dev ] || return 0
    if [ -e "$SYSBOX_LINK" ] || [ -L "$SYSBOX_LINK" ]; then
        [ "$(readlink "$SYSBOX_LINK")" = "$SYSBOX_RUNC" ] ||
            die "\`$SYSBOX_LINK\` is there and not ours" "move it away, or take another bed: make up BED=mine"
    fi
}
install_link() {
    [ "$BED" = dev ] || return 0
    record link "$SYSBOX_LINK" "$SYSBOX_RUNC"
    ln -sfn "$SYSBOX_RUNC" "$SYSBOX_LINK"
}

start_daemons() {
    make_dir dir "$SYSBOX_RUN_DIR"
    make_dir data "$SYSBOX_DATA_ROOT"
    make_dir dir "$SYSBOX_MOUNTPOINT"
    record mounts "$SYSBOX_MOUNTPOINT"  # undone in this order: sysbox-fs, its mount, the directory
    local level=() mgr=() fs=()
    [ -z "${LOG_LEVEL:-}" ] || level=(--log-level "$LOG_LEVEL")
    read -ra mgr <<<"${EXTRA_MGR_ARGS:-}"
    # The range in /etc/subuid belongs to one manager, the user's; every other bed has files and ids of its own: 128
    # containers in one of 64 places below that range, which it keeps as long as its data.
    if [ "$BED" != dev ]; then
        make_dir data "$BED_HOME/etc"
        local place
        [ -s "$BED_HOME/place" ] || free_place >"$BED_HOME/place"
        place=$(cat "$BED_HOME/place")
        mgr+=(--subid-files "$BED_HOME/etc" --subid-range "$((1342177280 + place * 8388608)):8388608")
    fi
    read -ra fs <<<"${EXTRA_FS_ARGS:-}"
    # The manager first: sysbox-fs finds there what an earlier sysbox-fs left in its keeping.
    start_daemon sysbox-mgr "$SYSBOX_RUN_DIR/mgr.sock" --data-root "$SYSBOX_DATA_ROOT" "${level[@]}" "${mgr[@]}"
    start_daemon sysbox-fs "$SYSBOX_RUN_DIR/fs.sock" --mountpoint "$SYSBOX_MOUNTPOINT" "${level[@]}" "${fs[@]}"
}

# One that no other bed has; by the name where it can be, so that a bed that is made again has the same.
free_place() {
    local place tries
    place=$(($(printf %s "$BED" | cksum | cut -d' ' -f1) % 64))
    for ((tries = 0; tries < 64; tries++)); do
        if ! cat "$BEDS"/*/place 2>/dev/null | grep -qx "$place"; then
            echo "$place"
            return
        fi
        place=$(((place + 1) % 64))
    done
    die "64 beds have data here" "take one down: make down PURGE=1 BED=name"
}

start_daemon() { # NAME SOCKET ARGUMENT...
    local name=$1 socket=$2
    shift 2
    ! is_listening "$socket" || die "somebody else's daemon listens on $socket" "stop it, or take another bed: make up BED=mine"
    start_process "$name" "$BED_HOME/bin/$name" --run-dir "$SYSBOX_RUN_DIR" --log "$BED_LOGS/$name.log" "$@"
    wait_until 30 daemon_is_up_or_dead "$name" "$socket"
    is_listening "$socket" || { log_tail "$name"; die "$name did not start" "$BED_LOGS/$name.log"; }
}
daemon_is_up_or_dead() { is_listening "$2" || ! is_recorded_alive "$1"; }

daemons_are_healthy() {
    is_recorded_alive sysbox-mgr && is_recorded_alive sysbox-fs &&
        is_listening "$SYSBOX_RUN_DIR/mgr.sock" && is_listening "$SYSBOX_RUN_DIR/fs.sock"
}
