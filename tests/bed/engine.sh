# shellcheck shell=bash
# engine.sh: the bed's dockerd: its settings, its start, its containers' end. Sourced by up and down.
# Everything it has is its own: configuration, socket, data, exec-root, containerd, bridge, cgroup parent.

# systemd and pure cgroup v2: then an engine's usual driver is systemd, and so it is here; EXTRA_DOCKERD_ARGS wins.
engine_cgroup() {
    if [ -d /run/systemd/system ] && [ "$(cgroup2_mount)" = /sys/fs/cgroup ]; then echo "systemd $BED_CGROUP.slice"; else echo "cgroupfs /$BED_CGROUP"; fi
}

# live-restore, since a dockerd with address pools of its own and without it deletes `docker0` when it finds data of an
# earlier run (initNetworkController, moby 1.13 and later): the network of a Docker that the user has.
engine_config() { # the daemon.json, on stdout
    local driver parent prefix runtimes= store='"storage-driver": "overlay2"'
    # Docker's own layers, or images kept by its containerd (from 24 on).
    [ "${ENGINE_STORE:-}" != containerd ] || store='"features": {"containerd-snapshotter": true}'
    read -r driver parent < <(engine_cgroup)
    prefix=$(cat "$BED_HOME/subnet")
    [ -z "${ENGINE_REMAP:-}" ] || store="$store, \"userns-remap\": \"nobody:nogroup\""
    [ "${ENGINE_ONLY:-0}" = 1 ] || runtimes="\"sysbox-runc\": {\"path\": \"$SYSBOX_RUNC\", \"runtimeArgs\": $runtime_args}"
    cat <<JSON
{
  "data-root": "$ENGINE_DATA",
  "exec-root": "$BED_RUN/docker",
  "pidfile": "$BED_RUN/docker.pid",
  "hosts": ["unix://$ENGINE_SOCKET"],
  $store,
  "exec-opts": ["native.cgroupdriver=$driver"],
  "cgroup-parent": "$parent",
  "bridge": "$ENGINE_BRIDGE",
  "live-restore": true,
  "default-address-pools": [{"base": "$prefix.128.0/17", "size": 24}],
  "iptables": false,
  "ip6tables": false,
  "ip-masq": false,
  "ip-forward": false,
  "runtimes": {$runtimes}
}
JSON
}

# The programs of another Docker go before this machine's: dockerd finds its containerd, shim and proxy on the PATH.
choose_engine() {
    [ -n "${ENGINE:-}" ] || return 0
    ENGINE_BIN=$("$BED_DIR/outer.sh" "$ENGINE")
    PATH=$ENGINE_BIN:$PATH
}
# What else than daemon.json an engine is started with.
engine_words() { echo "${ENGINE:+$ENGINE: }${ENGINE_REMAP:+$ENGINE_REMAP: }${EXTRA_DOCKERD_ARGS:-}"; }

# ENGINE_REMAP=FIRST:COUNT: an engine with `userns-remap`. It reads its range in /etc/subuid, which is the machine's: so it
# has mounts of its own, with other files there. What it mounts for containers is still seen by sysbox-mgr, as where
# people have it: in peer groups of the bed's own, not in the root's, which may be shared too.
share_for_remap() {
    local dir
    for dir in "$ENGINE_DATA" "$BED_RUN"; do  # both are on record for their mounts
        mount --bind "$dir" "$dir"
        mount --make-private "$dir"
        mount --make-shared "$dir"
    done
    mkdir -p "$BED_HOME/remap"
    for name in nobody nogroup; do echo "$name:$ENGINE_REMAP"; done >"$BED_HOME/remap/sub"
}
# What goes before `dockerd` in its command line: nothing, or what gives it those files.
# shellcheck disable=SC2016
remap_words=()
choose_remap() {
    [ -n "${ENGINE_REMAP:-}" ] || return 0
    local file script='set -e; from=$1; shift
for file in /etc/subuid /etc/subgid; do
    mount --make-private "$(findmnt -nro TARGET -T $file)"
    mount --bind "$from" $file
done
exec "$@"'
    for file in /etc/subuid /etc/subgid; do [ -f $file ] || die "no \`$file\` to mount another over" "touch $file"; done
    share_for_remap
    remap_words=(unshare --mount --propagation unchanged sh -c "$script" sh "$BED_HOME/remap/sub")
}

engine_answers() { WITHIN=10 bed_docker version >/dev/null 2>&1; }

start_engine() {
    local args=() extra=()
    # dockerd up to 24 asks for a lower OOM score of its own and does not start where it may not have one
    # (no CAP_SYS_RESOURCE, bit 24). Newer ones ask for 0 by themselves and mean to drop the option.
    if ! awk '/^CapEff:/ {exit !(index("13579bdf", substr($2, length($2) - 6, 1)))}' /proc/self/status &&
        [ "$(dockerd --version | sed -nE 's/.*version ([0-9]+).*/\1/p' | grep . || echo 99)" -lt 25 ]; then
        args+=(--oom-score-adjust 0)
    fi
    read -ra extra <<<"${EXTRA_DOCKERD_ARGS:-}"
    mkdir -p "$BED_HOME/cli"
    # The caller's DOCKER_* are meant for a client; dockerd reads some of them too.
    choose_remap
    start_process dockerd env -u DOCKER_HOST -u DOCKER_CONFIG -u DOCKER_TMPDIR \
        "${remap_words[@]}" dockerd --config-file "$BED_HOME/daemon.json" "${args[@]}" "${extra[@]}"
    wait_until "${ENGINE_DEADLINE:-60}" engine_is_up_or_dead
    engine_answers || { log_tail dockerd; die "the engine did not start" "$BED_LOGS/dockerd.out"; }
}
engine_is_up_or_dead() { engine_answers || ! is_recorded_alive dockerd; }

log_tail() { # NAME
    local log
    for log in "$BED_LOGS/$1.out" "$BED_LOGS/$1.log"; do
        [ -s "$log" ] || continue
        say "--- the end of $log"
        tail -n 15 "$log" >&2 || true
        say "---"
    done
}

# Before the engine goes: a container whose engine is gone would live on under its shim.
stop_containers() {
    local ids
    engine_answers || return 0
    ids=$(WITHIN=30 bed_docker ps -q) || return 0
    [ -n "$ids" ] || return 0
    say "stopping containers: $(WITHIN=30 bed_docker ps --format '{{.Names}}' | tr '\n' ' ')"
    # shellcheck disable=SC2086
    WITHIN=60 bed_docker stop -t 10 $ids >/dev/null || WITHIN=60 bed_docker kill $ids >/dev/null ||
        say "bed: some containers did not stop; their cgroup is emptied later"
}
