//! Other things that people run in a machine: each with what shows that it works, or the message with which it is refused.

use sysbox_tests::matrix::{Built, Part, Trial, refused, up_to_kernel, works};

const SECTION: &str = "Other things inside";

/// What is tried, by theme: image, the packages that its version is of, and whether it is tried every time.
#[rustfmt::skip]
const THEMES: &[(&str, &str, &str, &[Trial], bool)] = &[
    ("packages and trees",     "bookworm-tools",   "apt debootstrap tar",                              PACKAGES,  false),
    ("networks",               "bookworm-engines", "iputils-ping iptables nftables ipset iproute2",    NETWORKS,  true),
    ("sandboxes",              "bookworm-engines", "bubblewrap util-linux",                            SANDBOXES, true),
    ("FUSE",                   "bookworm-tools",   "fuse3 squashfuse sshfs bindfs",                    FUSE,      false),
    ("debuggers",              "bookworm-tools",   "strace gdb",                                       DEBUGGERS, false),
    ("services",               "bookworm-tools",   "cron openssh-server postgresql",                   SERVICES,  false),
    ("what only the host may", "bookworm-tools",   "util-linux nfs-common linux-perf kmod procps",     REFUSED,   false),
];

pub fn parts() -> Vec<Part> {
    let themes = THEMES.iter().map(|(name, image, packages, trials, is_daily)| Part {
        name: (*name).to_owned(),
        image: (*image).to_owned(),
        version: format!("dpkg-query -W -f '${{Package}} ${{Version}}, ' {packages}"),
        trials: vec![*trials],
        is_daily: *is_daily,
        ..part()
    });
    let sized = Part {
        name: "programs that size themselves, with --memory 512m --cpus 1".to_owned(),
        options: vec!["--memory", "512m", "--cpus", "1"],
        built: vec![Built { name: "sized", version: "1.6.0", at: "/usr/local/bin/sized" }],
        version: "java -version 2>&1 | head -n 1".to_owned(),
        trials: vec![SIZED],
        ..part()
    };
    themes.chain([sized]).collect()
}

fn part() -> Part {
    Part {
        section: SECTION,
        image: "bookworm-tools".to_owned(),
        init: "exec sleep 1000000".to_owned(),
        ready: "true".to_owned(),
        ..Part::default()
    }
}

const PACKAGES: &[Trial] = &[
    works(
        "apt-get install of services",
        "echo 'deb [trusted=yes] file:/usr/share/sysbox/mirror bookworm main' >/etc/apt/sources.list
apt-get -qq update; DEBIAN_FRONTEND=noninteractive apt-get -qq install -y nginx-light redis-server
nginx; busybox wget -qO /tmp/page http://127.0.0.1/; has \"$(cat /tmp/page)\" nginx; nginx -s quit
redis-server --daemonize yes; within 20 quiet redis-cli ping; is \"$(redis-cli set a b; redis-cli get a)\" 'OK
b'; redis-cli shutdown",
    ),
    refused(
        "debootstrap, as it is",
        "debootstrap --no-check-gpg --variant=minbase bookworm /srv/root file:///usr/share/sysbox/mirror",
        "Cannot install into target '/srv/root' mounted with noexec or nodev",
    ),
    works(
        "container=lxc debootstrap",
        "container=lxc debootstrap --no-check-gpg --variant=minbase bookworm /srv/root file:///usr/share/sysbox/mirror >/tmp/log || { tail -n 5 /tmp/log >&2; exit 1; }
is \"$(chroot /srv/root dpkg-query -W -f '${Status}' bash)\" 'install ok installed'",
    ),
    works(
        "tar with capabilities, xattrs and owners",
        "mkdir -p /srv/t; cd /srv/t; cp /bin/true cap; setcap cap_net_raw=ep cap; setfattr -n user.x -v y cap; touch owned; chown 1234:4321 owned; chmod 4755 owned
mkfifo fifo; ln cap hard; ln -s cap soft
tar --xattrs --xattrs-include='*' -cf /srv/t.tar .; mkdir /srv/u; tar -C /srv/u --xattrs --xattrs-include='*' -xpf /srv/t.tar; cd /srv/u
has \"$(getcap cap)\" cap_net_raw; is \"$(getfattr --only-values -n user.x cap)\" y; is \"$(stat -c '%u:%g %a' owned)\" '1234:4321 4755'; test -p fifo; test cap -ef hard",
    ),
    works("file systems in a directory: mkfs.ext4 -d, mksquashfs", "cd /srv; truncate -s 20M img; mkfs.ext4 -qd /etc img; e2fsck -fn img; mksquashfs /etc /srv/etc.sq -quiet"),
    refused("mknod of a device", "mknod /srv/null c 1 3", "Operation not permitted"),
];

const NETWORKS: &[Trial] = &[
    works(
        "ping, as root and as a user",
        "ping -c 1 -W 2 127.0.0.1; su nobody -s /bin/sh -c 'ping -c 1 -W 2 127.0.0.1'",
    ),
    works(
        "iptables, nft",
        "iptables-nft -t nat -A POSTROUTING -s 10.1.0.0/24 -j MASQUERADE; iptables-nft -A INPUT -p tcp --dport 1 -m conntrack --ctstate NEW -j REJECT; has \"$(iptables-nft-save)\" MASQUERADE",
    ),
    works(
        "iptables, legacy",
        "iptables-legacy -t nat -A POSTROUTING -s 10.1.0.0/24 -j MASQUERADE; has \"$(iptables-legacy-save)\" MASQUERADE",
    ),
    works(
        "nft",
        "nft add table inet t; nft add chain inet t c '{ type filter hook input priority 0; }'; nft add rule inet t c tcp dport 2 counter drop; has \"$(nft list ruleset)\" 'tcp dport 2'",
    ),
    works(
        "ipset",
        "ipset create s hash:ip; ipset add s 10.0.0.1; ipset test s 10.0.0.1; iptables-nft -A INPUT -m set --match-set s src -j DROP",
    ),
    works(
        "bridge, veth",
        "ip link add b0 type bridge; ip link add v0 type veth peer name v1; ip link set v0 master b0; ip link set v0 up; has \"$(bridge link)\" v0",
    ),
    up_to_kernel(
        "VXLAN",
        "ip link add vb type bridge; ip link add vx0 type vxlan id 42 dstport 4789 dev vb; has \"$(ip -d link show vx0)\" 'vxlan id 42'",
        "Unknown device type",
    ),
    up_to_kernel(
        "VLAN",
        "ip link add vl type bridge; ip link add link vl name vl7 type vlan id 7",
        "Unknown device type",
    ),
    up_to_kernel(
        "macvlan",
        "ip link add mb type bridge; ip link add m0 link mb type macvlan",
        "Unknown device type",
    ),
    works("tun, tap", "ip tuntap add t0 mode tun; ip tuntap add t1 mode tap; has \"$(ip link)\" t1"),
    works(
        "tc",
        "ip link add q0 type veth peer name q1; tc qdisc add dev q0 root tbf rate 1mbit burst 32kbit latency 400ms; has \"$(tc qdisc show dev q0)\" tbf",
    ),
    works(
        "ip netns",
        "ip netns add n1; ip netns exec n1 ip link set lo up; ip netns exec n1 ping -c 1 -W 2 127.0.0.1; is \"$(ip netns list)\" n1; ip netns del n1",
    ),
    works(
        "a route, an address, a rule",
        "ip link add a0 type veth peer name a1; ip address add 10.9.0.1/24 dev a0; ip link set a0 up; ip route add 10.10.0.0/16 dev a0; ip rule add from 10.9.0.1 table 100",
    ),
    works(
        "a sysctl of the network",
        "sysctl -w net.ipv4.ip_forward=1 net.ipv4.conf.all.forwarding=1; is \"$(cat /proc/sys/net/ipv4/ip_forward)\" 1",
    ),
    up_to_kernel("WireGuard", "ip link add wg0 type wireguard", "Unknown device type"),
];

const SANDBOXES: &[Trial] = &[
    works(
        "unshare -U, as root and as a user",
        "unshare -Urmpf --mount-proc sh -c 'is() { [ $1 = $2 ]; }; is $$ 1; is $(id -u) 0'; su nobody -s /bin/sh -c 'unshare -Urm mount -t tmpfs x /mnt'",
    ),
    works("unshare -Urn, a network of its own", "su nobody -s /bin/sh -c 'unshare -Urn ip link set lo up'"),
    works(
        "bwrap, as root and as a user",
        "for as in root nobody; do is \"$(su $as -s /bin/sh -c 'bwrap --ro-bind / / --dev /dev --proc /proc --unshare-all --die-with-parent cat /proc/1/comm')\" bwrap; done",
    ),
    works(
        "a browser's sandbox: user, pid and network namespace, chroot, no capabilities, seccomp",
        "cat >/tmp/sandbox.py <<'END'
import ctypes, os, struct, sys
libc = ctypes.CDLL(None, use_errno=True)
def check(what, result):
    if result < 0: sys.exit(what + ': ' + os.strerror(ctypes.get_errno()))
uid = os.getuid()
allow = ctypes.create_string_buffer(struct.pack('HBBI', 6, 0, 0, 0x7fff0000))  # one instruction of a filter
program = ctypes.create_string_buffer(struct.pack('HxxxxxxQ', 1, ctypes.addressof(allow)))
check('unshare', libc.unshare(0x10000000 | 0x20000000 | 0x40000000))  # user, pid, network
open('/proc/self/setgroups', 'w').write('deny'); open('/proc/self/uid_map', 'w').write(f'{uid} {uid} 1')
child = os.fork()
if child == 0:
    check('pid 1', 0 if os.getpid() == 1 else -1)
    os.chroot('/proc/self/fdinfo'); os.chdir('/')
    for cap in range(41): libc.prctl(24, cap, 0, 0, 0)
    check('no_new_privs', libc.prctl(38, 1, 0, 0, 0)); check('seccomp', libc.prctl(22, 2, ctypes.byref(program), 0, 0))
    libc.syscall(60, 7)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) - 7)
END
su nobody -s /bin/sh -c 'python3 /tmp/sandbox.py'",
    ),
    works(
        "mounts: overlay, bind, tmpfs, proc, pivot_root",
        "mkdir -p /srv/l /srv/m; mount -t tmpfs x /srv/m; mkdir /srv/m/u /srv/m/w /srv/m/o; mount -t overlay o -o lowerdir=/etc,upperdir=/srv/m/u,workdir=/srv/m/w /srv/m/o; touch /srv/m/o/x; unshare -m sh -c 'mount --bind /srv/m /srv/l && mount -t proc p /srv/l'; umount -R /srv/m",
    ),
    works("setuid programs: su from a user's shell", "useradd -m u1; echo u1:x | chpasswd; test \"$(su - u1 -c 'id -u')\" != 0; su - u1 -c 'echo x | su - u1 -c \"test -w .\"'"),
];

const FUSE: &[Trial] = &[
    works("bindfs, sees what is written behind it", "mkdir -p /srv/a /srv/b; bindfs /srv/a /srv/b; echo x >/srv/a/f; is \"$(cat /srv/b/f)\" x; fusermount3 -u /srv/b || umount /srv/b"),
    works("squashfuse, as a user", "mksquashfs /etc /tmp/etc.sq -quiet >/dev/null; chmod 644 /tmp/etc.sq; useradd -m fu; su - fu -c 'mkdir m; squashfuse /tmp/etc.sq m; cmp m/os-release /etc/os-release; fusermount3 -u m || fusermount -u m'"),
    works("sshfs", "mkdir -p /run/sshd /srv/s ~/.ssh; ssh-keygen -qN '' -f ~/.ssh/id_ed25519 -t ed25519; cp ~/.ssh/id_ed25519.pub ~/.ssh/authorized_keys; /usr/sbin/sshd -p 2222
within 20 quiet ssh -o StrictHostKeyChecking=accept-new -p 2222 127.0.0.1 true
sshfs -p 2222 127.0.0.1:/etc /srv/s; cmp /srv/s/passwd /etc/passwd; umount /srv/s"),
];

const DEBUGGERS: &[Trial] = &[
    works("strace, of a child and of a running process", "has \"$(strace -f -e trace=execve sh -c /bin/true 2>&1)\" 'execve(\"/bin/true\"'
sh -c 'while :; do sleep 0.1; done' & traced=$!; strace -o /tmp/st -p $traced & tracer=$!
within 10 grep -q \"^TracerPid:[[:space:]]*$tracer$\" /proc/$traced/status; within 10 grep -q wait4 /tmp/st; kill $tracer $traced"),
    works("gdb, attached", "sleep 1000 & has \"$(gdb -q -batch -p $! -ex 'info proc' 2>&1)\" 'process '"),
    works("setarch -R, as debuggers do", "setarch -R true"),
    works(
        "gdb, a run to a breakpoint",
        "said=$(gdb -q -batch -ex 'set breakpoint pending on' -ex 'break write' -ex run -ex bt --args echo x 2>&1); has \"$said\" 'Breakpoint 1,'
case $said in *'address space randomization'*) echo \"$said\" >&2; exit 1 ;; esac",
    ),
];

const SERVICES: &[Trial] = &[
    works("cron", "echo '* * * * * root echo ran >/tmp/cron' >/etc/cron.d/t; chmod 644 /etc/cron.d/t; cron; within 90 test -s /tmp/cron"),
    works("sshd", "mkdir -p /run/sshd ~/.ssh; ssh-keygen -qN '' -f ~/.ssh/id_ed25519 -t ed25519; cp ~/.ssh/id_ed25519.pub ~/.ssh/authorized_keys; /usr/sbin/sshd
within 20 quiet ssh -o StrictHostKeyChecking=accept-new 127.0.0.1 true
is \"$(ssh 127.0.0.1 id -u)\" 0; useradd -m -s /bin/bash su1; install -d -o su1 ~su1/.ssh; cp ~/.ssh/authorized_keys ~su1/.ssh/; is \"$(ssh -tt su1@127.0.0.1 id -un 2>/dev/null | tr -d '\\r')\" su1"),
    works("postgres", "pg_ctlcluster 15 main start; within 30 quiet su postgres -c 'psql -c \"select 1\"'
is \"$(su postgres -c \"psql -qtAc 'create table t (x int); insert into t select generate_series(1, 1000); select sum(x) from t'\")\" 500500; pg_ctlcluster 15 main stop"),
];

const SIZED: &[Trial] = &[
    works("Java: one processor, 512 MiB", "said=$(java -XshowSettings:system -version 2>&1); has \"$said\" 'Effective CPU Count: 1'; has \"$said\" 'Memory Limit: 512.00M'"),
    works("Java: a heap of a quarter of it", "heap=$(java -XX:+PrintFlagsFinal -version 2>/dev/null | awk '$2 == \"MaxHeapSize\" {print $4}'); [ $heap -le 134217728 ] && [ $heap -ge 100000000 ]"),
    // Go's own runtime never goes below two (runtime, GOMAXPROCS).
    works("Go, with automaxprocs: one processor", "has \"$(sized)\" 'used: 1'"),
    works("free, /proc/meminfo", "is \"$(awk '/^MemTotal:/ {print $2}' /proc/meminfo)\" 524288; is \"$(free -b | awk '/^Mem:/ {print $2}')\" 536870912"),
    works("cgroup files where programs look", "is \"$(cat /sys/fs/cgroup/memory/memory.limit_in_bytes 2>/dev/null || cat /sys/fs/cgroup/memory.max)\" 536870912
is \"$(cat /sys/fs/cgroup/cpu/cpu.cfs_quota_us 2>/dev/null || cut -d' ' -f1 /sys/fs/cgroup/cpu.max)\" 100000"),
];

const REFUSED: &[Trial] = &[
    refused(
        "loop devices",
        "truncate -s 10M /srv/img; mkfs.ext4 -q /srv/img; mount -o loop /srv/img /mnt",
        "mount:",
    ),
    refused("losetup", "truncate -s 1M /srv/i; losetup -f /srv/i", "losetup:"),
    refused("mount of NFS", "mount -t nfs 127.0.0.1:/x /mnt", "mount.nfs:"),
    refused("perf", "perf stat true", "No permission to enable"),
    refused("modprobe", "modprobe wireguard", "modprobe:"),
    refused("setting the clock", "date -s 2020-01-01", "Operation not permitted"),
    refused("a sysctl of the kernel", "sysctl -w kernel.panic=1", "ermission denied"),
    refused(
        "swapon",
        "dd if=/dev/zero of=/srv/s bs=1M count=2; chmod 600 /srv/s; mkswap /srv/s; swapon /srv/s",
        "swapon: /srv/s: swapon failed: Operation not permitted",
    ),
    refused("dmesg", "dmesg", "dmesg:"),
];
