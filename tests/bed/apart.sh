#!/bin/bash
# apart.sh [--root DIR] [--bind SOURCE:TARGET]... [--network] COMMAND...: runs COMMAND as on a machine apart: processes, mounts,
# network, cgroups and /dev are its own, and everything ends with COMMAND. So a test may compare "before" and "after" to the
# last line, and nothing that it does reaches this machine.
# Its root is DIR, or else an overlay over ours that forgets what is written. Binds are read-only. The network is loopback alone,
# unless --network gives it the one way out that needs nothing of ours changed (slirp4netns).
. "$(dirname "$0")/lib.sh"

# ---- within ---------------------------------------------------------------------------------------------------------
# Process 1 of the new pid namespace, still in the old root. Arguments: DIR ROOT, then the binds, `--`, COMMAND.
within() {
    local dir=$1 root=$1/root base=$2 binds=() bind place host_pid
    shift 2
    while [ "$1" != -- ]; do binds+=("$1"); shift; done
    shift
    # The old /proc still tells the pid that others know us by.
    read -r host_pid _ </proc/self/stat
    enter_inner_cgroup "$dir"

    if [ "$base" = / ]; then
        # On a tmpfs, since an upper directory may not lie in its own lower one.
        mount -t tmpfs -o mode=755 tmpfs "$dir/layer"
        mkdir "$dir/layer/upper" "$dir/layer/work"
        mount -t overlay -o "lowerdir=/,upperdir=$dir/layer/upper,workdir=$dir/layer/work" overlay "$root"
        # What this machine's bed `dev` has at the programs' default places is not there.
        rm -rf --one-file-system -- "$root$SYSBOX_LINK" "$root"/var/lib/sysbox{,fs}
        sed -i '/^sysbox:/d' "$root/etc/subuid" "$root/etc/subgid"
    else
        mount --bind "$base" "$root"
    fi
    # An engine's layers need a real disk: ours, and those of a Docker that a test puts beside it.
    for place in $BEDS /var/lib/docker; do
        mkdir -p "$dir/disk$place" "$root$place"
        mount --bind "$dir/disk$place" "$root$place"
    done
    mount -t tmpfs -o mode=755 tmpfs "$root/run"
    make_dev "$root/dev"
    make_cgroups "$dir" "$root/sys"
    for bind in "${binds[@]}"; do
        mkdir -p "$root${bind#*:}"
        mount --bind "${bind%%:*}" "$root${bind#*:}"
        mount -o remount,bind,ro "$root${bind#*:}"
    done
    mount -t proc proc "$root/proc"
    ip link set lo up
    echo 0 >"$root/proc/sys/net/ipv4/ip_forward"
    # Who waits for the network is outside, and our output is COMMAND's.
    echo "$host_pid" >"$dir/ready"
    if [ -p "$dir/network" ]; then
        read -r _ <"$dir/network"
        rm -f "$root/etc/resolv.conf"
        echo nameserver 10.0.2.3 >"$root/etc/resolv.conf"  # slirp4netns'
    fi
    cd "$root"
    pivot_root . .
    umount -l .
    exec chroot . "$@"
}

# Nodes of its own: what somebody does to the mode of /dev/null in there must not be done to ours.
make_dev() { # DIR
    local name major minor
    mount -t tmpfs -o mode=755 tmpfs "$1"
    mkdir "$1/pts" "$1/shm" "$1/net"
    while read -r name major minor; do mknod -m 666 "$1/$name" c "$major" "$minor"; done <<'NODES'
null 1 3
zero 1 5
full 1 7
random 1 8
urandom 1 9
tty 5 0
fuse 10 229
net/tun 10 200
NODES
    mount -t devpts -o newinstance,ptmxmode=666,mode=620 devpts "$1/pts"
    mount -t tmpfs -o mode=1777 tmpfs "$1/shm"
    ln -s pts/ptmx "$1/ptmx"
    ln -s /proc/self/fd "$1/fd"
    for name in stdin:0 stdout:1 stderr:2; do ln -s "/proc/self/fd/${name#*:}" "$1/${name%:*}"; done
}

# The subtree that is ours, where the whole was; process 1 moves one down (v2 has processes in leaves only).
enter_inner_cgroup() { # DIR
    local tree
    tree=$(cgroup2_mount)
    [ -n "$tree" ] || return 0
    mkdir "$tree/$(basename "$1")/init"
    echo 0 >"$tree/$(basename "$1")/init/cgroup.procs"
}
make_cgroups() { # DIR SYS
    local tree
    # First all names, then mounts: within the new sysfs they are where they were.
    mount -t sysfs sysfs "$2"
    if [ "$(cgroup2_mount)" != /sys/fs/cgroup ]; then mount -t tmpfs -o mode=755 tmpfs "$2/fs/cgroup"; fi
    for tree in $(cgroup_mounts | grep '^/sys/fs/cgroup'); do
        mkdir -p "$2${tree#/sys}"
        mount --bind "$tree/$(basename "$1")" "$2${tree#/sys}"
    done
}

# ---- outside --------------------------------------------------------------------------------------------------------
if [ "${1:-}" = --within ]; then
    shift
    within "$@"
fi
need_root test
base=/ binds=() network=
while :; do
    case ${1:-} in
    --root) base=$2; shift 2 ;;
    --bind) binds+=("$2"); shift 2 ;;
    --network) network=1; shift ;;
    *) break ;;
    esac
done
[ $# -gt 0 ] || die "apart.sh needs a command"

mkdir -p "$BEDS"
dir=$(mktemp -d "$BEDS/apart.XXXXXX")
name=$(basename "$dir")
tidy() {
    [ -z "${slirp:-}" ] || kill "$slirp" 2>/dev/null || true
    # Processes and mounts went with their namespaces.
    local tree status=0
    for tree in $(cgroup_mounts); do
        [ ! -d "$tree/$name" ] || wait_until 15 empty_and_remove_cgroup "$tree/$name" || status=1
    done
    remove_tree "$dir" || status=1
    return $status
}
trap tidy EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
mkdir "$dir/root" "$dir/layer"
for tree in $(cgroup_mounts); do
    mkdir "$tree/$name"
    # v1: a new cpuset has no processors until it is told.
    for file in cpuset.cpus cpuset.mems; do
        if [ -e "$tree/$name/$file" ] && [ -z "$(cat "$tree/$name/$file")" ] && [ -e "$tree/tasks" ]; then cat "$tree/$file" >"$tree/$name/$file"; fi
    done
done
[ -z "$network" ] || mkfifo "$dir/network"
(
    for tree in $(cgroup_mounts); do echo 0 >"$tree/$name/cgroup.procs"; done
    exec unshare --mount --propagation private --pid --fork --kill-child --net --ipc --uts --cgroup \
        "$BASH" "$0" --within "$dir" "$base" "${binds[@]}" -- "$@"
) <&0 &
machine=$!
if [ -n "$network" ]; then
    command -v slirp4netns >/dev/null || die "no \`slirp4netns\`" "apt-get install slirp4netns"
    wait_until 20 test -s "$dir/ready" || die "the machine apart did not start"
    slirp4netns --configure --mtu=65520 --disable-host-loopback --ready-fd=3 "$(cat "$dir/ready")" tap0 \
        3>"$dir/slirp.ready" >"$dir/slirp.log" 2>&1 &
    slirp=$!
    wait_until 20 test -s "$dir/slirp.ready" || { cat "$dir/slirp.log" >&2; die "slirp4netns did not start"; }
    echo go >"$dir/network"
fi
status=0
wait $machine || status=$?
exit $status
