#!/bin/bash
# vm-checks.sh: what only a host with systemd, pure cgroup v2, AppArmor and all capabilities shows; run by vm-guest in the
# emulated machine, in the bed's environment. Every claim is looked at in a container that runs.
. "$(dirname "$0")/lib.sh"
name=vm-checks-$$
image=sysbox/debian:${SUITE:-bookworm}
trap 'bed_docker rm -fv $name $name-boot >/dev/null 2>&1' EXIT
failed=0
claim() { # TEXT COMMAND...: holds if COMMAND succeeds
    local text=$1
    shift
    if "$@"; then say "  HOLDS   $text"; else say "  FAILED  $text"; failed=1; fi
}
inside() { bed_docker exec $name "$@"; }

bed_docker run -d --runtime=sysbox-runc --name $name --memory 256m --pids-limit 500 "$image" sleep infinity >/dev/null
pid=$(bed_docker inspect -f '{{.State.Pid}}' $name)
scope=/sys/fs/cgroup$(sed -n 's/^0:://p' "/proc/$pid/cgroup")  # .../docker-ID.scope/syscont/init.scope
delegated=${scope%/*} parent=${scope%/*/*}

is_unified() { [ "$(stat -fc %T /sys/fs/cgroup)" = cgroup2fs ] && [ "$(inside stat -fc %T /sys/fs/cgroup)" = cgroup2fs ]; }
claim "the host and the container have the unified hierarchy" is_unified
claim "the cgroup is a scope of systemd's (--systemd-cgroup)" systemctl is-active --quiet "$(basename "$parent")"
claim "the limits are on the scope" [ "$(cat "$parent/memory.max") $(cat "$parent/pids.max")" = "268435456 500" ]
claim "the container's root owns its delegated cgroup, and no limit file of it" \
    [ "$(stat -c %u "$delegated") $(stat -c %u "$delegated/memory.max") $(stat -c %u "$parent/memory.max")" = "$(awk 'NR==1{print $2}' "/proc/$pid/uid_map") 0 0" ]
cannot_raise() { ! inside sh -c 'echo max > /sys/fs/cgroup/memory.max' 2>/dev/null; }
claim "the container cannot raise its limit" cannot_raise
claim "it may make cgroups with controllers" inside sh -c 'mkdir /sys/fs/cgroup/a && echo 1000000 > /sys/fs/cgroup/a/memory.max'
counts_all() { # an engine's figures are those of the parent: processes beside init's cgroup are in them
    inside sh -c 'mkdir /sys/fs/cgroup/beside; for i in 1 2 3 4 5; do sleep 600 >/dev/null 2>&1 </dev/null & echo $! > /sys/fs/cgroup/beside/cgroup.procs; done' >/dev/null 2>&1
    local told; told=$(bed_docker stats --no-stream --format '{{.PIDs}}' $name)
    [ "$(wc -l < "$delegated/beside/cgroup.procs")" = 5 ] && [ "$told" -ge 6 ] && [ "$told" = "$(cat "$parent/pids.current")" ] || { say "stats: $told"; return 1; }
}
claim "docker stats counts every cgroup of the container" counts_all
waits_above() { # created, not started: init is in the parent, and the start moves it
    bed_docker create --runtime=sysbox-runc --name $name-new "$image" sleep infinity >/dev/null && bed_docker start $name-new >/dev/null &&
        [ "$(bed_docker exec $name-new cat /proc/1/cgroup)" = 0::/init.scope ] && bed_docker rm -f $name-new >/dev/null
}
claim "init is below its cgroup namespace's root" waits_above
claim "an exec is in init's cgroup" [ "$(inside cat /proc/self/cgroup)" = "$(inside cat /proc/1/cgroup)" ]
claim "meminfo shows the limit" [ "$(inside awk '/MemTotal/{print $2}' /proc/meminfo)" = 262144 ]
claim "AppArmor is on, and the engine's default profile is not applied" \
    [ "$(cat /sys/module/apparmor/parameters/enabled) $(inside cat /proc/1/attr/current | tr -d '\0')" = "Y unconfined" ]
is_under_named_profile() {
    local rules="file, capability, network, mount, umount, pivot_root, signal, ptrace, unix, deny /etc/group r,"
    echo "profile sysbox-check flags=(attach_disconnected,mediate_deleted) { $rules }" | apparmor_parser -qr || return 1
    [ "$(bed_docker run --rm --runtime=sysbox-runc --security-opt apparmor=sysbox-check sysbox/busybox \
        sh -c 'cat /proc/self/attr/current; cat /etc/group 2>/dev/null || echo denied' | tr -d '\0')" = $'sysbox-check (enforce)\ndenied' ]
}
claim "a profile that is named is applied" is_under_named_profile
refused_profile() { # docker fails, as it must, and says why
    local said
    said=$(bed_docker run --rm --runtime=sysbox-runc --security-opt apparmor=no-such-profile sysbox/busybox true 2>&1) && return 1
    [[ $said == *no-such-profile* ]] || { say "$said"; return 1; }
}
claim "a profile that is named and not there is refused by name" refused_profile
is_raised() { local hard; hard=$(inside sh -c 'ulimit -Hn'); [ "$hard" = unlimited ] || [ "$hard" -ge 1048576 ]; }
claim "hard limits are raised" is_raised
bed_docker rm -fv $name >/dev/null
gone() { [ ! -e "$parent" ]; }
claim "the cgroups are gone with the container" gone

# Without an engine: the limits of a spec, and `events` beside runc's.
bundle=$(mktemp -d /root/vm-bundle.XXXXXX)
mkdir "$bundle/rootfs"
bed_docker create --name $name-tree sysbox/busybox true >/dev/null
bed_docker export $name-tree | tar -C "$bundle/rootfs" -xf -
bed_docker rm $name-tree >/dev/null
"$SYSBOX_RUNC" spec --bundle "$bundle"
limits='"unified": {"memory.high": "134217728", "pids.max": "77"}, "memory": {"limit": 268435456, "swap": 268435456, "reservation": 67108864}, "cpu": {"quota": 50000, "period": 100000, "cpus": "0"},'
sed -i "s/\"terminal\": true/\"terminal\": false/; s/^      \"sh\"$/      \"sleep\", \"6000\"/; s/\"resources\": {/\"resources\": {$limits/" "$bundle/config.json"
bare() { "$SYSBOX_RUNC" "$@" </dev/null; }
bare run -d --bundle "$bundle" $name-bare >/dev/null 2>"$bundle/said" || say "$(cat "$bundle/said")"
pid=$(bare state $name-bare | sed -n 's/.*"pid": \([0-9]*\).*/\1/p')
scope=/sys/fs/cgroup$(sed -n 's/^0:://p' "/proc/$pid/cgroup")
own=${scope%/*/*}
has_limits() {
    local found; found=$(cd "$own" && cat memory.max memory.swap.max memory.low memory.high pids.max cpu.max cpuset.cpus | paste -sd' ')
    [ "$found" = "268435456 0 67108864 134217728 77 50000 100000 0" ] || { say "limits: $found"; return 1; }
}
claim "the limits of a spec, \`unified\` among them, are those of the cgroup" has_limits
updates() {
    bare update --memory 192m --memory-swap 192m --pids-limit 66 --cpu-quota 30000 $name-bare || return 1
    local found; found=$(cd "$own" && cat memory.max memory.swap.max pids.max cpu.max memory.high | paste -sd' ')
    [ "$found" = "201326592 0 66 30000 100000 134217728" ] || { say "limits: $found"; return 1; }
}
claim "update changes what it names, and nothing else" updates
keys() { grep -o '"[A-Za-z_]*":' | sort -u; }
same_events() { # runc's on a container of its own, of the same limits
    local theirs=$bundle/theirs.json
    mkdir "$bundle/runc" && runc spec --bundle "$bundle/runc"
    sed -i "s/\"terminal\": true/\"terminal\": false/; s/^\t*\"sh\"$/\"sleep\", \"6000\"/; s/\"resources\": {/\"resources\": {$limits/; s|\"path\": \"rootfs\"|\"path\": \"$bundle/rootfs\"|" "$bundle/runc/config.json"
    runc run -d --bundle "$bundle/runc" $name-runc </dev/null >/dev/null 2>&1 || { say "runc did not run"; return 1; }
    runc events --stats $name-runc >"$theirs"
    runc delete --force $name-runc
    local ours; ours=$(bare events --stats $name-bare)
    local missing; missing=$(comm -23 <(keys <"$theirs") <(keys <<<"$ours"))
    [ -s "$theirs" ] && [ -z "$missing" ] || { say "events lack: $missing; ours: $ours"; return 1; }
    # A figure that stands still: the limit of processes, as the kernel has it.
    [[ $ours == *"\"limit\":$(cat "$own/pids.max")"* ]] || { say "$ours"; return 1; }
}
claim "events has the members of runc's, and the kernel's figures" same_events
bare delete --force $name-bare
claim "nothing is left of it" [ ! -e "$own" ]
rm -rf "$bundle"

bed_docker run -d --runtime=sysbox-runc --name $name-boot "$image" >/dev/null
has_booted() {
    state=$(bed_docker exec $name-boot systemctl is-system-running 2>&1) || true
    [ "$state" = running ] || [ "$state" = degraded ]
}
boots() { wait_until 60 has_booted && [ "$state" = running ] || { say "$state: $(bed_docker exec $name-boot systemctl --failed --no-legend 2>&1)"; return 1; }; }
claim "the image boots: systemd reaches \`running\`, with Docker" boots
halts() { bed_docker stop -t 600 $name-boot >/dev/null && [ "$(bed_docker inspect -f '{{.State.ExitCode}}' $name-boot)" = 130 ]; }
claim "and stops by itself" halts
bed_docker rm -fv $name-boot >/dev/null
exit $failed
