//! Every flag of `docker run` by its effect inside and on the host, with plain runc beside it as the judge.
#![allow(clippy::unwrap_used)] // all of it is tests; the lint's exception misses their helpers

use std::fs;
use std::sync::Mutex;
use std::thread;

use sysbox_tests::engine::{BUSYBOX, Container, cgroups_of, docker, unique, until};

/// What plain runc gives for the same options and the same script.
enum Runc {
    /// The same, to the byte.
    Same,
    /// A system container is meant to differ (docs/DIFFERENCES.md).
    Differs(&'static str),
}
use Runc::{Differs, Same};

/// Options, what is asked inside, and the answer.
type Row = (&'static [&'static str], &'static str, &'static str, Runc);

#[rustfmt::skip]
const FLAGS: &[Row] = &[
    // who and where
    (&["--init"], "cat /proc/1/comm /proc/$$/comm; :", "docker-init\nsh", Same),
    (&["-u", "1000:7"], "id -u; id -g; id -G", "1000\n7\n7", Same),
    (&["-u", "1000", "--group-add", "55"], "id -G", "0 55", Same),
    (&["-w", "/new/dir"], "pwd; stat -c '%u:%g %a' .; touch x && ls", "/new/dir\n0:0 755\nx", Same),
    (&["-e", "A=b c", "-e", "B="], "echo \"$A|$B|$HOME|$USER\"; env | grep -c ^B=", "b c||/root|\n1", Same),
    (&["--hostname", "h1", "--domainname", "d1"], "hostname; cat /etc/hostname /proc/sys/kernel/domainname; echo $HOSTNAME", "h1\nh1\nd1\nh1", Same),
    (&["--entrypoint", "/bin/echo"], "x", "-c x", Same),
    // files
    (&["--read-only", "--tmpfs", "/t"], "touch /x 2>&1; touch /t/x && ls /t",
        "touch: /x: Read-only file system\nx", Same),
    (&["--tmpfs", "/t:size=3m,mode=1770,uid=5,noexec"],
        "awk '$5 == \"/t\" {print $6}' /proc/self/mountinfo; stat -c '%a %u:%g' /t; df -k /t | awk 'END {print $2}'",
        "rw,nosuid,nodev,noexec,relatime\n1770 5:0\n3072", Same),
    (&["--shm-size", "3m"], "df -k /dev/shm | awk 'END {print $2}'; touch /dev/shm/x; stat -c '%u %a' /dev/shm /dev/shm/x", "3072\n0 1777\n0 644", Same),
    // devices
    (&["--device", "/dev/zero:/dev/mine"], "stat -c '%a %u:%g %t:%T' /dev/mine; head -c 3 /dev/mine | wc -c", "666 0:0 1:5\n3", Same),
    (&["--device", "/dev/fuse"], "stat -c '%F' /dev/fuse; exec 3<>/dev/fuse && echo opened", "character special file\nopened", Same),
    // limits of a process
    (&["--ulimit", "nofile=100:200", "--ulimit", "core=0", "--ulimit", "stack=65536:131072"], "ulimit -n; ulimit -Hn; ulimit -Hc; ulimit -Ss", "100\n200\n0\n64", Same),
    (&["--oom-score-adj", "300"], "cat /proc/1/oom_score_adj", "300", Same),
    // the kernel's switches
    (&["--sysctl", "net.ipv4.ip_unprivileged_port_start=77", "--sysctl", "net.ipv4.conf.all.forwarding=1", "--sysctl", "kernel.msgmax=4096"],
        "cd /proc/sys; cat net/ipv4/ip_unprivileged_port_start net/ipv4/conf/all/forwarding kernel/msgmax", "77\n1\n4096", Same),
    // rights
    (&["--cap-drop", "ALL", "--cap-add", "CHOWN"], "grep -E 'CapEff|CapBnd' /proc/self/status | cut -f2 | sed 's/^0*//' | uniq", "1ffffffffff", Differs("1")),
    (&["--security-opt", "no-new-privileges"], "awk '/^NoNewPrivs/ {print $2}' /proc/self/status", "1", Same),
    (&["--security-opt", "seccomp=unconfined"], "awk '/^Seccomp/ {print $2}' /proc/self/status", "0\n0", Same),
    (&["--security-opt", "apparmor=unconfined"], "cat /proc/self/attr/current 2>/dev/null | grep -v unconfined; echo .", ".", Same),
    // the network
    (&["--network", "none"], "ls /sys/class/net; ip -o addr show | awk '{print $4}' | head -1", "lo\n127.0.0.1/8", Same),
    (&["--dns", "9.9.9.9", "--dns-search", "s.x", "--dns-option", "ndots:3", "--add-host", "a:1.2.3.4"],
        "cat /etc/resolv.conf | sort; grep 1.2.3.4 /etc/hosts; echo more >>/etc/hosts && tail -1 /etc/hosts",
        "nameserver 9.9.9.9\noptions ndots:3\nsearch s.x\n1.2.3.4\ta\nmore", Same),
    // namespaces
    (&["--ipc", "none"], "ls -d /dev/shm 2>/dev/null; echo .", ".", Same),
    (&["--ipc", "private"], "stat -f -c %T /dev/shm; touch /dev/shm/x && ls /dev/shm", "tmpfs\nx", Same),
    (&["--ipc", "shareable"], "stat -f -c %T /dev/shm; touch /dev/shm/x && ls /dev/shm", "tmpfs\nx", Same),
    (&["--cgroupns=host"], "cut -d: -f3 /proc/self/cgroup | sed 's,/init.scope,/,' | sort -u | grep -vc '^/$'", "0", Differs("1")),
    (&["--userns=host"], "awk '{print $3}' /proc/self/uid_map", "65536", Differs("4294967295")),
];

fn ask(runtime: &str, options: &[&str], script: &str) -> String {
    let said = Container::run(&[&["--rm", "--runtime", runtime], options].concat(), BUSYBOX, &["-c", script]);
    format!("{}{}", said.out, if said.code > 1 { said.err } else { String::new() }).trim_end().to_owned()
}

#[test]
fn flags_do_what_they_do_with_runc() {
    let (rows, wrong) = (Mutex::new(FLAGS.iter()), Mutex::new(Vec::new()));
    thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| {
                loop {
                    let Some(row) = rows.lock().unwrap().next() else { return };
                    let (options, script, expected, beside) = row;
                    let shell: &[&str] =
                        if options.contains(&"--entrypoint") { &[] } else { &["--entrypoint", "sh"] };
                    let judged = match beside {
                        Same => expected,
                        Differs(other) => other,
                    };
                    for (runtime, expected) in [("sysbox-runc", *expected), ("runc", judged)] {
                        let found = ask(runtime, &[*options, shell].concat(), script);
                        if found != expected {
                            wrong
                                .lock()
                                .unwrap()
                                .push(format!("{runtime} {options:?}: {found:?}, not {expected:?}"));
                        }
                    }
                }
            });
        }
    });
    let wrong = wrong.into_inner().unwrap();
    assert!(wrong.is_empty(), "{wrong:#?}");
}

/// Options; the file of a limit on version 1 and on version 2, each with what is to be in it. An empty name: no such there.
type Limit = (&'static [&'static str], &'static [(&'static str, &'static str, &'static str, &'static str)]);

#[rustfmt::skip]
const LIMITS: &[Limit] = &[
    (&["--memory", "64m", "--memory-swap", "96m", "--memory-reservation", "32m"], &[
        ("memory.limit_in_bytes", "67108864", "memory.max", "67108864"),
        ("memory.memsw.limit_in_bytes", "100663296", "memory.swap.max", "33554432"),
        ("memory.soft_limit_in_bytes", "33554432", "memory.low", "33554432"),
    ]),
    (&["--memory", "64m", "--oom-kill-disable"], &[("memory.oom_control", "oom_kill_disable 1", "", "")]),
    (&["--memory-swappiness", "11"], &[("memory.swappiness", "11", "", "")]),
    (&["--cpus", "0.5", "--cpu-shares", "512"], &[
        ("cpu.cfs_quota_us", "50000", "cpu.max", "50000 100000"),
        ("cpu.shares", "512", "cpu.weight", "20"),
    ]),
    (&["--cpu-period", "50000", "--cpu-quota", "20000"], &[
        ("cpu.cfs_quota_us", "20000", "cpu.max", "20000 50000"),
        ("cpu.cfs_period_us", "50000", "cpu.max", "20000 50000"),
    ]),
    (&["--cpuset-cpus", "0", "--cpuset-mems", "0"], &[
        ("cpuset.cpus", "0", "cpuset.cpus", "0"),
        ("cpuset.mems", "0", "cpuset.mems", "0"),
    ]),
    (&["--pids-limit", "33"], &[("pids.max", "33", "pids.max", "33")]),
    (&["--device-cgroup-rule", "c 42:* rwm"], &[("devices.list", "c 42:* rwm", "", "")]),
];

/// Those of `names` that are in the cgroups made by the engine for the container, with their text.
fn limit_of(container: &Container, names: [&str; 2]) -> Vec<(usize, String)> {
    let groups = cgroups_of(&container.id());
    let files = names.iter().enumerate().filter(|(_, name)| !name.is_empty());
    let read = |(at, name): (usize, &&str)| {
        // The mounts of one hierarchy under two names show each cgroup twice.
        let text = groups.iter().find_map(|group| fs::read_to_string(group.join(name)).ok());
        text.map(|text| (at, text))
    };
    files.filter_map(read).collect()
}

#[test]
fn limits_are_set_where_runc_sets_them() {
    for (options, files) in LIMITS {
        for runtime in ["sysbox-runc", "runc"] {
            let container = Container::waiting(BUSYBOX, &[&["--runtime", runtime], *options].concat());
            for (v1, in_v1, v2, in_v2) in *files {
                let found = limit_of(&container, [*v1, *v2]);
                let unified = std::path::Path::new("/sys/fs/cgroup/cgroup.controllers").exists();
                assert!(
                    unified && v2.is_empty() || !found.is_empty(),
                    "{runtime} {options:?}: no {v1}, no {v2}"
                );
                for (version, text) in found {
                    let expected = [*in_v1, *in_v2][version];
                    assert!(
                        text.lines().any(|line| line == expected),
                        "{runtime} {options:?}: {text:?}, not {expected:?}"
                    );
                }
            }
        }
    }
}

#[test]
fn block_weight_is_what_the_engine_and_the_kernel_make_of_it_with_runc() {
    // Where the kernel has no such file the engine drops it, with a warning; with either runtime.
    let weights = |runtime: &str| {
        let container = Container::waiting(BUSYBOX, &["--runtime", runtime, "--blkio-weight", "300"]);
        let asked = container.inspect("{{.HostConfig.BlkioWeight}}");
        let names = ["blkio.weight", "blkio.bfq.weight", "io.weight", "io.bfq.weight"];
        let groups = cgroups_of(&container.id());
        let read =
            names.map(|name| groups.iter().find_map(|group| fs::read_to_string(group.join(name)).ok()));
        (asked, read)
    };
    assert_eq!(weights("sysbox-runc"), weights("runc"));
}

#[test]
fn an_oom_killer_that_is_off_stays_off_over_an_update() {
    let flags = ["--memory", "64m", "--memory-reservation", "48m", "--oom-kill-disable"];
    let container = Container::waiting(BUSYBOX, &flags);
    // Of its own cgroup, which is below the one that the engine names and reaches its limit first.
    let inside = || {
        let said = container.sh(
            "cd /sys/fs/cgroup; head -n 1 memory/memory.oom_control memory/memory.soft_limit_in_bytes 2>&1 || cat memory.low",
        );
        said.split_whitespace().map(str::to_owned).collect::<Vec<_>>().join(" ")
    };
    let switched_off = inside();
    assert!(
        switched_off.contains("oom_kill_disable 1") && switched_off.contains("50331648")
            || switched_off.ends_with("50331648"),
        "{switched_off}"
    );
    docker(["update", "--cpu-shares", "300", &container.name]).ok();
    docker(["update", "--memory", "96m", "--memory-swap", "96m", &container.name]).ok();
    for (_, text) in limit_of(&container, ["memory.oom_control", ""]) {
        assert!(text.starts_with("oom_kill_disable 1\n"), "{text}");
    }
    assert_eq!(inside(), switched_off);
    for (_, text) in limit_of(&container, ["memory.limit_in_bytes", "memory.max"]) {
        assert_eq!(text, "100663296\n");
    }
}

#[test]
fn a_limit_of_processes_holds_and_an_exec_counts() {
    let container = Container::waiting(BUSYBOX, &["--pids-limit", "20"]);
    let said = container.try_sh("for i in $(seq 40); do sleep 100 & done; wait");
    assert!(said.err.contains("Resource temporarily unavailable"), "{said:?}");
    for (_, text) in limit_of(&container, ["pids.current", "pids.current"]) {
        assert!(text.trim().parse::<u32>().unwrap() <= 20, "{text}");
    }
}

#[test]
fn a_later_process_has_the_containers_oom_score() {
    for (options, score) in [(&["--oom-score-adj", "300"][..], "300"), (&[], "0")] {
        for runtime in ["sysbox-runc", "runc"] {
            let container = Container::waiting(BUSYBOX, &[&["--runtime", runtime], options].concat());
            assert_eq!(container.sh("cat /proc/self/oom_score_adj"), score, "{runtime} {options:?}");
        }
    }
}

// ---- namespaces of another container ----

#[test]
fn the_pid_namespace_of_another_container_can_be_shared() {
    let first = Container::start(&[], BUSYBOX, &["sleep", "4711"]);
    let second = Container::waiting(BUSYBOX, &["--pid", &format!("container:{}", first.name)]);
    let seen = "cat /proc/1/cmdline | tr '\\0' ' '; cat /proc/self/uid_map";
    assert_eq!(second.sh(seen), first.sh(seen));
    let namespaces = "for n in user pid; do readlink /proc/self/ns/$n; done";
    assert_eq!(second.sh(namespaces), first.sh(namespaces));
    assert_ne!(second.sh("readlink /proc/self/ns/net"), first.sh("readlink /proc/self/ns/net"));
    // Each sees the other's processes, and root of one may look at and end those of the other.
    assert_eq!(first.sh("ps -o args | grep -c '[2]147483647'"), "1");
    second.sh("ls -l /proc/1/root/etc/passwd && kill -0 1");
    // An end of the first is an end of all: the kernel ends what is in the namespace of an init.
    first.docker(&["kill"]).ok();
    until("the second to end", || (second.inspect("{{.State.Running}}") == "false").then_some(()));
    second.docker(&["rm"]).ok();
}

#[test]
fn the_ipc_namespace_of_another_container_can_be_shared() {
    let first = Container::waiting(BUSYBOX, &["--ipc", "shareable", "--shm-size", "2m"]);
    first.sh("echo first >/dev/shm/first; chown 7 /dev/shm/first; touch /dev/mqueue/queue");
    let second = Container::waiting(BUSYBOX, &["--ipc", &format!("container:{}", first.name)]);
    assert_eq!(
        second.sh("cat /dev/shm/first; stat -c %u /dev/shm/first; ls /dev/mqueue; df -k /dev/shm | awk 'END {print $2}'"),
        "first\n7\nqueue\n2048"
    );
    second.sh("echo second >/dev/shm/second");
    assert_eq!(first.sh("cat /dev/shm/second; stat -c %u /dev/shm/second"), "second\n0");
    // Not shareable: the engine says so, whatever the runtime.
    let private = Container::waiting(BUSYBOX, &["--ipc", "private"]);
    let said = Container::run(&["--ipc", &format!("container:{}", private.name)], BUSYBOX, &["true"]);
    assert!(said.err.contains("shareable"), "{said:?}");
}

#[test]
fn all_namespaces_of_another_container_can_be_shared_at_once() {
    let first = Container::waiting(BUSYBOX, &["--ipc", "shareable"]);
    let same = format!("container:{}", first.name);
    let second = Container::waiting(BUSYBOX, &["--ipc", &same, "--pid", &same, "--network", &same]);
    let namespaces = "for n in user pid ipc net; do readlink /proc/self/ns/$n; done";
    assert_eq!(second.sh(namespaces), first.sh(namespaces));
    second.sh("ip addr add 10.99.98.1/32 dev lo");
}

#[test]
fn a_pid_namespace_of_no_sysbox_container_is_refused_by_name() {
    let plain = Container::waiting(BUSYBOX, &["--runtime", "runc"]);
    let said = Container::run(&["--pid", &format!("container:{}", plain.name)], BUSYBOX, &["true"]);
    assert_eq!(said.code, 125, "{said:?}");
    assert!(
        said.err.contains("can't join the pid namespace of a process that is in no sysbox container"),
        "{said:?}"
    );
}

#[test]
fn names_are_resolved_on_a_network_of_the_users() {
    let network = Network::new();
    let server = Container::start(
        &["--network", &network.0, "--network-alias", "web"],
        BUSYBOX,
        &["httpd", "-f", "-h", "/etc"],
    );
    let client = Container::waiting(BUSYBOX, &["--network", &network.0]);
    assert_eq!(client.sh("awk '/^nameserver/ {print $2}' /etc/resolv.conf"), "127.0.0.11");
    for name in ["web", &server.name] {
        until("the server to answer by name", || {
            (client.try_sh(&format!("wget -qO- http://{name}/group")).out == "root:x:0:\n").then_some(())
        });
    }
    // A second network while it runs, and off again.
    let other = Network::new();
    docker(["network", "connect", &other.0, &client.name]).ok();
    assert_eq!(client.sh("ls /sys/class/net"), "eth0\neth1\nlo");
    docker(["network", "disconnect", &other.0, &client.name]).ok();
    assert_eq!(client.sh("ls /sys/class/net"), "eth0\nlo");
    drop((server, client));
}

struct Network(String);

impl Network {
    fn new() -> Self {
        let name = unique("n");
        docker(["network", "create", &name]).ok();
        Self(name)
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        let removed = docker(["network", "rm", &self.0]);
        assert!(thread::panicking() || removed.code == 0, "{removed:?}");
    }
}
