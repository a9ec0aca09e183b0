#!/bin/bash
# up.sh: installs what is missing, builds, and starts the bed: sysbox-mgr, sysbox-fs and an engine that knows
# sysbox-runc. Run again it does nothing if all is well, and restarts the bed if a daemon changed or died.
# SKIP_INSTALL=1, SKIP_BUILD=1 (take BIN_DIR as it is) and ENGINE_ONLY=1 (no sysbox, plain runc) leave parts out;
# ENGINE=trixie|sid|newest takes that Docker instead of this machine's, ENGINE_STORE=containerd its containerd's image store;
# ENGINE_REMAP=FIRST:COUNT gives that engine `userns-remap` with these ids;
# LOG_LEVEL, EXTRA_MGR_ARGS, EXTRA_FS_ARGS and EXTRA_DOCKERD_ARGS reach the daemons.
. "$(dirname "$0")/lib.sh"
for part in network daemons engine; do . "$BED_DIR/$part.sh"; done
need_root up

[ "${SKIP_INSTALL:-0}" = 1 ] || "$BED_DIR/packages.sh" build engine
if [ "${ENGINE_ONLY:-0}" != 1 ] && [ "${SKIP_BUILD:-0}" != 1 ]; then
    command -v cargo >/dev/null || die "no \`cargo\` on the PATH" "install a Rust toolchain (rustup), or keep your PATH: sudo -E env PATH=\$PATH make up"
    (cd "$TOP" && cargo build --release --workspace) >&2
fi

# Check everything before the first side effect.
grep -qw overlay /proc/filesystems || modprobe overlay 2>/dev/null || die "this kernel has no overlay file system"
if [ "${ENGINE_ONLY:-0}" != 1 ]; then
    grep -qw fuse /proc/filesystems || modprobe fuse 2>/dev/null || die "this kernel has no FUSE"
    for program in $PROGRAMS; do [ -x "$BIN_DIR/$program" ] || die "\`$BIN_DIR/$program\` is missing" "make build"; done
    check_link
fi
choose_engine
lock_beds

why_restart() { # nothing, or a reason
    [ -f "$BED_HOME/daemon.json" ] || { echo "it never ran"; return; }
    is_recorded_alive dockerd && engine_answers || { echo "its engine does not run"; return; }
    ip link show "$ENGINE_BRIDGE" >/dev/null 2>&1 || { echo "its bridge is gone"; return; }
    engine_config | cmp -s - "$BED_HOME/daemon.json" || { echo "its settings changed"; return; }
    [ "$(engine_words)" = "$(cat "$BED_HOME/dockerd.args")" ] || { echo "ENGINE or EXTRA_DOCKERD_ARGS changed"; return; }
    [ "${ENGINE_ONLY:-0}" != 1 ] || return 0
    daemons_are_healthy || { echo "a daemon does not run"; return; }
    ! is_changed sysbox-mgr || { echo "sysbox-mgr changed"; return; }
    ! is_changed sysbox-fs || { echo "sysbox-fs changed"; return; }
}
reason=$(why_restart)
if [ -z "$reason" ]; then
    # sysbox-runc alone may change under a running bed: each call is a process of its own.
    [ "${ENGINE_ONLY:-0}" = 1 ] || { install_programs; install_link; }
    say "bed \`$BED\` is up"
    exit 0
fi
if grep -qv '^data ' "$BED_RECORD" 2>/dev/null; then
    say "bed \`$BED\` is made again: $reason"
    "$BED_DIR/down.sh" --locked || die "what was left of bed \`$BED\` could not be taken down"
fi

# From here on a failure takes back what was made; the logs stay.
trap 'status=$?; [ $status = 0 ] || { say "bed: taking back what was started"; "$BED_DIR/down.sh" --locked || true; }' EXIT
trap 'exit 130' INT TERM
record data "$BED_HOME"
mkdir -p "$BED_HOME/bin" "$BED_LOGS" "$ENGINE_DATA"
rm -f "$BED_LOGS"/*.out "$BED_LOGS"/*.log
make_dir dir "$BED_RUN"
record mounts "$ENGINE_DATA"
record mounts "$BED_RUN"
# The containers' cgroup under both drivers, and ours.
for name in "$BED_CGROUP.bed" "$BED_CGROUP" "$BED_CGROUP.slice"; do record cgroup "$name"; done
start_network
if [ "${ENGINE_ONLY:-0}" != 1 ]; then
    install_programs
    install_link
    start_daemons
fi
engine_config >"$BED_HOME/daemon.json"
engine_words >"$BED_HOME/dockerd.args"
start_engine
say "bed \`$BED\` is up: eval \"\$(make -s env$([ "$BED" = dev ] || echo " BED=$BED"))\""
