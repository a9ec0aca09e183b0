#!/bin/bash
# vm-guest.sh: what test-vm runs inside the emulated machine: the demo, beside the machine's own Docker, which must
# not notice. Then down, and nothing may be left.
export SKIP_INSTALL=1 SKIP_BUILD=1 SLOW=${SLOW:-10} IMAGE_CACHE=/root/sysbox/images
. "$(dirname "$0")/lib.sh"

system_docker() { # what a neighbour of ours must find unchanged
    systemctl show -p MainPID -p ActiveState -p ActiveEnterTimestampMonotonic docker containerd
    ip -br link show docker0 | awk '{print $1, $3}'
    iptables-save | sed '/^#/d; s/\[[0-9:]*\]//' | grep -v 'SYSBOX-'
    cat /proc/sys/net/ipv4/ip_forward
    docker images -q
}
say "machine: Linux $(uname -r), $(cat /proc/1/comm), cgroups: $(stat -fc %T /sys/fs/cgroup), AppArmor: $(cat /sys/module/apparmor/parameters/enabled 2>/dev/null || echo none), its Docker: $(docker version -f '{{.Server.Version}}')"
before=$(system_docker)
mounts_before=$(awk '{print $5}' /proc/self/mountinfo | sort)

status=0
"$BED_DIR/demo.sh" || status=$?
[ $status != 0 ] || "$BED_DIR/vm-checks.sh" || status=$?
if [ $status = 0 ] && [ -n "${GUEST_RUN:-}" ]; then
    eval "$("$BED_DIR/env.sh" --all)"
    bash -c "$GUEST_RUN" || status=$?
    unset DOCKER_HOST
fi
if [ $status != 0 ]; then
    for log in "$BED_LOGS"/*; do say "--- $log"; tail -n 30 "$log" >&2; done
    dmesg 2>/dev/null | tail -n 15 >&2 || true
fi
PURGE=1 "$BED_DIR/down.sh" || status=1

left=$(diff <(echo "$before") <(system_docker)) || { say "bed: the machine's own Docker was changed:"; say "$left"; status=1; }
left=$(diff <(echo "$mounts_before") <(awk '{print $5}' /proc/self/mountinfo | sort)) || { say "bed: mounts are left:"; say "$left"; status=1; }
left=$(find /sys/fs/cgroup -maxdepth 2 -name "*$BED_CGROUP*"; ls -d "$BED_HOME" "$BED_RUN" "$SYSBOX_RUN_DIR" "$SYSBOX_LINK" 2>/dev/null || true)
[ -z "$left" ] || { say "bed: left behind: $left"; status=1; }
[ $status = 0 ] && say "test-vm: all holds"
exit $status
