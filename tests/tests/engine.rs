//! A system container as an engine makes it: who it is on the host, what it may, what it sees, and what it cannot undo.
#![allow(clippy::unwrap_used)] // all of it is tests; the lint's exception misses their helpers

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde_json::json;
use sysbox_ipc::IdMapLine;
use sysbox_tests::engine::{
    BUSYBOX, Container, DEBIAN, RUNTIME, bed, cgroups_of, docker, docker_command, record_of, remains_of,
    unique, until,
};
use sysbox_tests::host::{NO_NAMES, NO_PATHS, host_dir, names_in, owner};

/// A field of a /proc/PID/status.
fn field<'a>(status: &'a str, name: &str) -> &'a str {
    let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    line.unwrap_or_else(|| panic!("no {name} in {status}")).trim()
}

fn map_lines(text: &str) -> Vec<IdMapLine> {
    let numbers = |line: &str| -> Vec<u32> { line.split_whitespace().map(|n| n.parse().unwrap()).collect() };
    let line = |n: Vec<u32>| IdMapLine { inside: n[0], outside: n[1], count: n[2] };
    text.lines().map(|text| line(numbers(text))).collect()
}

/// The one line of a container's uid_map, which its gid_map has to be as well.
#[track_caller]
fn range_of(container: &Container) -> IdMapLine {
    let (uids, gids) =
        (map_lines(&container.proc_file("uid_map")), map_lines(&container.proc_file("gid_map")));
    assert_eq!(uids, gids);
    assert_eq!(uids.len(), 1, "{uids:?}");
    uids[0]
}

// ---- identity ----

#[test]
fn root_inside_is_a_user_without_rights_on_the_host() {
    let container = Container::waiting(BUSYBOX, &[]);
    let range = range_of(&container);
    assert_eq!((range.inside, range.count), (0, 65536));
    assert!(range.outside >= 65536, "{range:?}");
    let status = container.proc_file("status");
    assert_eq!(field(&status, "Uid"), [range.outside.to_string().as_str(); 4].join("\t"));
    assert_eq!(field(&status, "Gid"), [range.outside.to_string().as_str(); 4].join("\t"));
    assert_eq!(container.sh("id -u; id -g; id -G"), "0\n0\n0");
    let record = container.record().unwrap();
    assert_eq!((record.id_map.uids(), record.id_map.gids()), ([range].as_slice(), [range].as_slice()));
}

#[test]
fn two_containers_share_no_id() {
    let (one, other) = (Container::waiting(BUSYBOX, &[]), Container::waiting(BUSYBOX, &[]));
    let (a, b) = (range_of(&one), range_of(&other));
    assert!(a.outside + a.count <= b.outside || b.outside + b.count <= a.outside, "{a:?} {b:?}");
}

#[test]
fn a_container_keeps_its_ids_over_stop_and_start() {
    let container = Container::waiting(BUSYBOX, &[]);
    let before = range_of(&container);
    container.sh("echo mine >/kept; chown 7:8 /kept");
    container.docker(&["stop"]).ok();
    // Whoever starts in the meantime must not be given them.
    let others = [Container::waiting(BUSYBOX, &[]), Container::waiting(BUSYBOX, &[])];
    assert!(others.iter().all(|other| range_of(other).outside != before.outside));
    container.docker(&["start"]).ok();
    assert_eq!(range_of(&container), before);
    assert_eq!(container.sh("cat /kept; stat -c %u:%g /kept"), "mine\n7:8");
}

#[test]
fn ids_are_free_when_the_container_is_removed() {
    let container = Container::waiting(BUSYBOX, &[]);
    let (id, upper, range) = (container.id(), container.upper(), range_of(&container));
    container.docker(&["stop"]).ok();
    assert!(record_of(&id).is_some(), "a stopped container keeps its record");
    container.docker(&["rm"]).ok();
    until("the record to go with the writable layer", || record_of(&id).is_none().then_some(()));
    assert_eq!(remains_of(&id, &upper), NO_NAMES);
    // Somebody is given them again: one of these, or a container of a test beside this one.
    let mut later = Vec::new();
    let given = |range: IdMapLine| {
        let records = names_in(&bed().data_root.join("records")).into_iter();
        records
            .filter_map(|name| record_of(name.rsplit_once('-')?.0))
            .any(|record| record.id_map.uids() == [range])
    };
    while !given(range) {
        assert!(later.len() < 8, "{range:?} is not given again");
        later.push(Container::waiting(BUSYBOX, &[]));
    }
}

#[test]
fn nothing_of_a_container_is_chowned() {
    let container = Container::waiting(BUSYBOX, &[]);
    container
        .sh("echo x >/made; mkdir -m 750 /dir; echo y >/dir/in; chown -R 7:8 /dir; echo z >>/etc/passwd");
    assert_eq!(
        container.sh("stat -c '%n %u:%g' /made /dir/in /etc/passwd /bin/busybox"),
        "/made 0:0\n/dir/in 7:8\n/etc/passwd 0:0\n/bin/busybox 0:0"
    );
    let upper = container.upper();
    assert_eq!(owner(&upper), (0, 0, 0o755));
    assert_eq!(owner(&upper.join("made")), (0, 0, 0o644));
    assert_eq!(owner(&upper.join("dir")), (7, 8, 0o750));
    assert_eq!(owner(&upper.join("dir/in")), (7, 8, 0o644));
    assert_eq!(owner(&upper.join("etc/passwd")), (0, 0, 0o644));
    let lower = container.inspect("{{.GraphDriver.Data.LowerDir}}");
    let image = Path::new(lower.rsplit(':').next().unwrap());
    assert_eq!(owner(&image.join("bin/busybox")), (0, 0, 0o755));
    assert_eq!(owner(&image.join("etc/passwd")), (0, 0, 0o644));
}

// ---- rights ----

fn all_capabilities() -> String {
    let last: u32 = fs::read_to_string("/proc/sys/kernel/cap_last_cap").unwrap().trim().parse().unwrap();
    format!("{:016x}", (1u64 << (last + 1)) - 1)
}

const NONE: &str = "0000000000000000";

#[track_caller]
fn check_capabilities(status: &str, effective: &str) {
    let found = ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"].map(|name| field(status, name));
    assert_eq!(found, [NONE, effective, effective, &all_capabilities(), NONE], "{status}");
}

#[test]
fn root_has_all_capabilities_and_another_user_none() {
    let status = ["cat", "/proc/self/status"];
    check_capabilities(&Container::run(&[], BUSYBOX, &status).ok(), &all_capabilities());
    check_capabilities(&Container::run(&["-u", "1000"], BUSYBOX, &status).ok(), NONE);
    let container = Container::waiting(BUSYBOX, &[]);
    check_capabilities(&container.exec(&[], &status).ok(), &all_capabilities());
    check_capabilities(&container.exec(&["-u", "1000"], &status).ok(), NONE);
    // An engine that asks for fewer asks for an application; a machine's root has them all.
    check_capabilities(&Container::run(&["--cap-drop", "ALL"], BUSYBOX, &status).ok(), &all_capabilities());
}

#[test]
fn a_privileged_container_is_confined_like_any_other() {
    let container = Container::waiting(BUSYBOX, &["--privileged"]);
    let range = range_of(&container);
    assert!(range.outside >= 65536, "{range:?}");
    check_capabilities(&container.proc_file("status"), &all_capabilities());
    assert_eq!(container.sh("echo >/dev/null; readlink /dev/ptmx"), "pts/ptmx");
    let ours = fs::read_link("/proc/self/ns/user").unwrap();
    assert_ne!(fs::read_link(format!("/proc/{}/ns/user", container.host_pid())).unwrap(), ours);
    // What the host alone may change stays the host's.
    let before = fs::read_to_string("/proc/sys/kernel/core_pattern").unwrap();
    container.try_sh("echo core.mine >/proc/sys/kernel/core_pattern").refused();
    assert_eq!(fs::read_to_string("/proc/sys/kernel/core_pattern").unwrap(), before);
}

#[test]
fn mount_works_inside() {
    let container = Container::waiting(BUSYBOX, &[]);
    let script = "mkdir /m && mount -t tmpfs -o size=1m mine /m && echo x >/m/x && grep -c ' /m rw' /proc/self/mountinfo && \
                  mount -t proc proc /m && ls -d /m/1 && umount /m && umount /m && ls /m";
    assert_eq!(container.sh(script), "1\n/m/1");
}

/// The error number with which a call by number comes back.
fn errno_of(container: &Container, number: u32) -> String {
    container.exec(&[], &["perl", "-e", &format!("syscall({number}, 0, 0, 0, 0); print $! + 0")]).ok()
}

#[test]
fn calls_newer_than_the_engines_profile_do_not_exist() {
    let container = Container::waiting(DEBIAN, &[]);
    for number in [470, 500, 1000] {
        assert_eq!(errno_of(&container, number), nix::libc::ENOSYS.to_string(), "call {number}");
    }
    // Known to the profile and not allowed by it: kexec_load.
    assert_eq!(errno_of(&container, 246), nix::libc::EPERM.to_string());
}

#[test]
fn a_call_that_the_users_profile_denies_stays_denied() {
    let dir = host_dir();
    let profile = dir.path().join("profile.json");
    let rule = json!({"names": ["sethostname", "umount2"], "action": "SCMP_ACT_ERRNO", "errnoRet": 28});
    fs::write(&profile, json!({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [rule]}).to_string()).unwrap();
    let container =
        Container::waiting(BUSYBOX, &["--security-opt", &format!("seccomp={}", profile.display())]);
    let error = container.try_sh("hostname other").refused();
    assert!(error.contains("No space left on device"), "{error}");
    container.sh("mount -t tmpfs x /tmp");
    container.try_sh("umount /tmp").refused();
    // Without it, both are allowed.
    assert_eq!(Container::run(&[], BUSYBOX, &["sh", "-c", "hostname other && hostname"]).ok(), "other");
}

// ---- later processes ----

#[test]
fn exec_is_where_init_is() {
    let container = Container::waiting(BUSYBOX, &[]);
    let namespaces = |pid: &str| {
        container.sh(&format!("for n in user mnt pid net ipc uts cgroup time; do readlink /proc/{pid}/ns/$n; done; cat /proc/{pid}/cgroup; readlink /proc/{pid}/root"))
    };
    assert_eq!(namespaces("self"), namespaces("1"));
    let host = fs::read_link("/proc/self/ns/user").unwrap();
    assert_ne!(namespaces("self").lines().next().unwrap(), host.to_str().unwrap());
    let filter =
        |status: &str| [field(status, "Seccomp").to_owned(), field(status, "Seccomp_filters").to_owned()];
    assert_eq!(filter(&container.proc_file("status")), ["2", "1"]);
    assert_eq!(filter(&container.sh("cat /proc/self/status")), ["2", "1"]);
    assert_eq!(filter(&container.exec(&["-u", "1000"], &["cat", "/proc/self/status"]).ok()), ["2", "1"]);
}

/// Moves the container's init into cgroups of its own making, in every hierarchy that has a use for it.
const MOVE_INIT: &str = "cd /sys/fs/cgroup
    if [ -e cgroup.procs ]; then all=.; else all='memory pids devices freezer systemd unified'; fi
    for h in $all; do [ ! -d $h ] || { mkdir $h/inner && echo 1 >$h/inner/cgroup.procs; } || exit 1; done";

#[test]
fn exec_follows_an_init_that_changed_its_cgroup() {
    let container = Container::waiting(BUSYBOX, &[]);
    let cgroups = |pid: &str| container.sh(&format!("cat /proc/{pid}/cgroup"));
    let before = cgroups("self");
    container.sh(MOVE_INIT);
    let moved = cgroups("1");
    assert_ne!(moved, before);
    assert!(moved.contains(":/inner\n") || moved.ends_with(":/inner"), "{moved}");
    assert_eq!(cgroups("self"), moved);
    assert!(container.proc_file("cgroup").contains("/syscont/inner"));
}

#[test]
fn standard_streams_can_be_opened_again() {
    let script = "echo out >/dev/stdout && echo err >/dev/stderr";
    let check = |said: sysbox_tests::engine::Said| {
        assert_eq!((said.code, said.out.as_str(), said.err.as_str()), (0, "out\n", "err\n"), "{said:?}");
    };
    let container = Container::waiting(BUSYBOX, &[]);
    for user in ["0", "1000", "1000:1000", "65534"] {
        check(Container::run(&["-u", user], BUSYBOX, &["sh", "-c", script]));
        check(container.exec(&["-u", user], &["sh", "-c", script]));
    }
    // The host's own device is not given away.
    assert_eq!(owner(Path::new("/dev/null")), (0, 0, 0o666));
}

#[test]
fn standard_input_reaches_an_exec() {
    let container = Container::waiting(BUSYBOX, &[]);
    let mut command = docker_command(["exec", "-i", &container.name, "md5sum"]);
    let mut child =
        command.stdin(std::process::Stdio::piped()).stdout(std::process::Stdio::piped()).spawn().unwrap();
    std::io::Write::write_all(&mut child.stdin.take().unwrap(), &vec![b'x'; 1 << 20]).unwrap();
    let output = child.wait_with_output().unwrap();
    // md5 of 1048576 times `x`
    assert_eq!(
        String::from_utf8_lossy(&output.stdout),
        format!("{}  -\n", "b561f87202d04959e37588ee05cf5b10")
    );
}

#[test]
fn exit_codes_and_signals_come_through() {
    let code = |script: &str| Container::run(&[], BUSYBOX, &["sh", "-c", script]).code;
    assert_eq!((code("exit 0"), code("exit 42"), code("sh -c 'kill -9 $$'; exit $?")), (0, 42, 137));
    let container = Container::start(
        &[],
        BUSYBOX,
        &["sh", "-c", "trap 'exit 7' TERM; echo ready; while :; do sleep 0.1; done"],
    );
    until("the script to be ready", || container.docker(&["logs"]).ok().contains("ready").then_some(()));
    assert_eq!(container.exec(&[], &["sh", "-c", "exit 3"]).code, 3);
    container.docker(&["kill", "-s", "TERM"]).ok();
    assert_eq!(docker(["wait", &container.name]).ok(), "7");
}

#[test]
fn a_terminal_works_and_follows_its_window() {
    let container = Container::waiting(BUSYBOX, &[]);
    // An engine sets the first size when the program runs already; busybox complains of a size of 0.
    let script = "tty; until [ \"$(stty size 2>/dev/null)\" = '31 101' ]; do sleep 0.05; done; trap 'seen=yes' WINCH; echo ready; \
                  until [ \"$(stty size)$seen\" = '40 120yes' ]; do sleep 0.05; done; echo done; exit 5";
    for args in [
        vec!["exec", "-it", container.name.as_str(), "sh", "-c", script],
        vec![
            "run",
            "-it",
            "--rm",
            "--runtime",
            RUNTIME,
            "--name",
            &unique("tty"),
            BUSYBOX,
            "sh",
            "-c",
            script,
        ],
    ] {
        let size = nix::pty::Winsize { ws_row: 31, ws_col: 101, ws_xpixel: 0, ws_ypixel: 0 };
        let pty = nix::pty::openpty(&size, None).unwrap();
        let slave = || pty.slave.try_clone().unwrap();
        let mut command = docker_command(&args);
        let mut child = command.stdin(slave()).stdout(slave()).stderr(slave()).spawn().unwrap();
        let client = nix::unistd::Pid::from_raw(i32::try_from(child.id()).unwrap());
        let mut screen = fs::File::from(pty.master.try_clone().unwrap());
        let mut seen = String::new();
        read_until(&mut screen, &mut seen, "ready\r\n", || {});
        let resized =
            std::process::Command::new("stty").args(["rows", "40", "cols", "120"]).stdin(slave()).status();
        assert!(resized.unwrap().success());
        // The client may not be listening for the first of them.
        let tell = || nix::sys::signal::kill(client, nix::sys::signal::Signal::SIGWINCH).unwrap();
        tell();
        read_until(&mut screen, &mut seen, "done\r\n", tell);
        assert_eq!(seen, "/dev/pts/0\r\nready\r\ndone\r\n", "{args:?}");
        assert_eq!(child.wait().unwrap().code(), Some(5), "{args:?}");
    }
}

/// Adds what comes from a terminal to `seen`, until `mark` is in it. Where nothing comes for a while, `nudge` is called.
#[track_caller]
fn read_until(screen: &mut fs::File, seen: &mut String, mark: &str, nudge: impl Fn()) {
    use nix::poll::{PollFd, PollFlags, poll};
    use std::os::fd::AsFd;
    let deadline = Instant::now() + Duration::from_secs(60);
    while !seen.contains(mark) {
        assert!(Instant::now() < deadline, "waited for {mark:?}; on the terminal: {seen:?}");
        if poll(&mut [PollFd::new(screen.as_fd(), PollFlags::POLLIN)], 300u16).unwrap() == 0 {
            nudge();
            continue;
        }
        let mut bytes = [0; 4096];
        let count = std::io::Read::read(screen, &mut bytes).unwrap();
        seen.push_str(&String::from_utf8_lossy(&bytes[..count]));
    }
}

// ---- what it sees ----

#[test]
fn dev_is_complete_and_belongs_to_root() {
    let container = Container::waiting(DEBIAN, &[]);
    let names = "null zero full random urandom tty fuse net/tun pts/ptmx net shm mqueue pts";
    let expected = "\
        null c 1:3 0:0 666\nzero c 1:5 0:0 666\nfull c 1:7 0:0 666\nrandom c 1:8 0:0 666\nurandom c 1:9 0:0 666\n\
        tty c 5:0 0:0 666\nfuse c a:e5 0:0 666\nnet/tun c a:c8 0:0 666\npts/ptmx c 5:2 0:0 666\n\
        net d 0:0 0:0 755\nshm d 0:0 0:0 1777\nmqueue d 0:0 0:0 1777\npts d 0:0 0:0 755";
    let found = container.sh(&format!("cd /dev && stat -c '%n %F %t:%T %u:%g %a' {names}"));
    assert_eq!(found.replace("character special file", "c").replace("directory", "d"), expected);
    let links = container.sh("cd /dev && for l in ptmx fd stdin stdout stderr; do readlink $l; done");
    assert_eq!(links, "pts/ptmx\n/proc/self/fd\n/proc/self/fd/0\n/proc/self/fd/1\n/proc/self/fd/2");
    assert_eq!(container.sh("stat -f -c %T /dev/shm /dev/mqueue /dev/pts"), "tmpfs\nmqueue\ndevpts");
}

#[test]
fn devices_can_be_used() {
    let container = Container::waiting(DEBIAN, &[]);
    assert_eq!(
        container.sh("head -c 3 /dev/zero | od -An -tx1; head -c 8 /dev/urandom | wc -c"),
        " 00 00 00\n8"
    );
    let full = container.try_sh("cat /etc/passwd >/dev/full").refused();
    assert!(full.contains("No space left on device"), "{full}");
    container.sh("exec 3<>/dev/fuse");
    assert_eq!(
        container.sh("ip tuntap add dev tun7 mode tun && ip -br link show tun7 | cut -d' ' -f1"),
        "tun7"
    );
    container.sh("touch /dev/shm/x /dev/mqueue/x");
    assert_eq!(container.sh("stat -c %u:%g /dev/shm/x /dev/mqueue/x"), "0:0\n0:0");
    // A device of the host: no node can be made, and one that the engine passes in without a rule cannot be opened.
    container.try_sh("mknod /tmp/mem c 1 1").refused();
}

#[test]
fn the_root_is_a_shared_mount() {
    let container = Container::waiting(BUSYBOX, &[]);
    let optional =
        container.sh("awk '$5 == \"/\" {for (i = 7; $i != \"-\"; i++) print $i}' /proc/self/mountinfo");
    assert!(optional.starts_with("shared:") && !optional.contains("master:"), "{optional}");
    // So a mount made here is seen by a mount namespace that listens, as a kubelet's pods do.
    let script = "mkdir /m && unshare -m --propagation slave sh -c 'until grep -q \" /m \" /proc/self/mountinfo; do sleep 0.05; done; cat /m/x' & \
                  sleep 0.2; mount -t tmpfs x /m && echo seen >/m/x.new && mv /m/x.new /m/x; wait";
    assert_eq!(
        container.sh(&script.replace("cat /m/x", "until cat /m/x 2>/dev/null; do sleep 0.05; done")),
        "seen"
    );
}

#[test]
fn time_begins_with_the_container() {
    let now = || SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
    // Before it, so that the machine itself is older than the container by more than the test is unsharp.
    let host_uptime =
        || fs::read_to_string("/proc/uptime").unwrap().split('.').next().unwrap().parse::<u64>().unwrap();
    until("the host to be a minute old", || (host_uptime() > 60).then_some(()));
    let (begin, wall) = (Instant::now(), now());
    let container = Container::waiting(DEBIAN, &[]);
    let said =
        container.sh("cut -d. -f1 /proc/uptime; awk '/^btime/ {print $2}' /proc/stat; ps -o etimes= -p 1,$$");
    let numbers: Vec<u64> = said.split_whitespace().map(|number| number.parse().unwrap()).collect();
    // The offset is a whole second, so the container may look up to one second older than it is.
    let age = begin.elapsed().as_secs() + 2;
    let [uptime, btime, init, own] = numbers[..] else { panic!("{said}") };
    assert!(uptime <= age, "uptime {uptime}, age {age}");
    assert!((wall - 2..=now() + 1).contains(&btime), "btime {btime}, started at {wall}");
    assert!(init <= age && own <= init, "ps: init is {init} s old, itself {own}; age {age}");
}

#[test]
fn the_memory_limit_holds_and_is_what_is_seen() {
    let container = Container::waiting(BUSYBOX, &["--memory", "64m", "--memory-swap", "64m"]);
    let total = "awk '/^MemTotal:/ {print $2}' /proc/meminfo";
    assert_eq!(container.sh(total), "65536");
    let eat = "dd if=/dev/zero of=/dev/null bs=96M count=1";
    let ended = container.try_sh(&format!("{eat}; echo $?"));
    assert!(ended.out.contains("137") || ended.code == 137, "{ended:?}");

    // The limit's own file is out of reach, and what is within reach cannot raise it.
    let paths = "/sys/fs/cgroup/memory/memory.limit_in_bytes /sys/fs/cgroup/memory.max";
    let raised =
        container.try_sh(&format!("for f in {paths}; do [ ! -e $f ] || echo 1000000000 >$f || exit 1; done"));
    assert!(raised.refused().contains("Permission denied"));
    container.sh("cd /sys/fs/cgroup; [ ! -d memory ] || cd memory; mkdir big small
        for f in memory.limit_in_bytes memory.max; do
            [ ! -e big/$f ] || { echo 1073741824 >big/$f && echo 33554432 >small/$f; } || exit 1
        done");
    let within = |group: &str, what: &str| {
        let enter =
            format!("cd /sys/fs/cgroup; [ ! -d memory ] || cd memory; echo $$ >{group}/cgroup.procs; {what}");
        container.try_sh(&enter)
    };
    assert_eq!(within("big", total).ok(), "65536");
    let ended = within("big", &format!("{eat}; echo $?"));
    assert!(ended.out.contains("137") || ended.code == 137, "{ended:?}");
    // What is seen is the reader's own limit.
    assert_eq!(within("small", total).ok(), "32768");
    // On the host it is as the engine set it.
    let limits: Vec<String> = cgroups_of(&container.id())
        .iter()
        .flat_map(|path| ["memory.limit_in_bytes", "memory.max"].map(|name| path.join(name)))
        .filter_map(|path| fs::read_to_string(path).ok())
        .collect();
    assert_eq!(limits, ["67108864\n"]);
}

#[test]
fn cgroups_made_inside_go_with_the_container() {
    let container = Container::waiting(BUSYBOX, &[]);
    let (id, upper) = (container.id(), container.upper());
    container.sh(MOVE_INIT);
    container.sh("for h in /sys/fs/cgroup/*/inner /sys/fs/cgroup/inner; do [ ! -d $h ] || mkdir -p $h/deep/er || exit 1; done");
    assert!(!cgroups_of(&id).is_empty());
    container.docker(&["stop"]).ok();
    assert_eq!(cgroups_of(&id), NO_PATHS);
    container.docker(&["start"]).ok();
    assert!(!cgroups_of(&id).is_empty());
    container.docker(&["rm", "-f"]).ok();
    until("the record to go", || record_of(&id).is_none().then_some(()));
    assert_eq!(remains_of(&id, &upper), NO_NAMES);
}

// ---- networks ----

#[test]
fn containers_that_share_a_network_share_the_user_namespace() {
    let first = Container::waiting(BUSYBOX, &[]);
    let second = Container::waiting(BUSYBOX, &["--network", &format!("container:{}", first.name)]);
    let namespace = |container: &Container, name: &str| {
        fs::read_link(format!("/proc/{}/ns/{name}", container.host_pid())).unwrap()
    };
    for name in ["net", "user"] {
        assert_eq!(namespace(&first, name), namespace(&second, name), "{name}");
    }
    for name in ["mnt", "pid", "ipc", "uts", "cgroup"] {
        assert_ne!(namespace(&first, name), namespace(&second, name), "{name}");
    }
    // Root of either may configure it, and /sys shows it.
    let show = "ls /sys/class/net; ip -4 -o addr show dev eth0 | awk '{print $4}'";
    assert_eq!(second.sh(show), first.sh(show));
    second.sh("ip addr add 10.99.99.1/32 dev lo");
    assert!(first.sh("ip -4 -o addr show dev lo").contains("10.99.99.1/32"));
    check_capabilities(&second.sh("cat /proc/self/status"), &all_capabilities());
}

#[test]
fn namespaces_of_the_host_are_refused() {
    for (option, text) in [
        ("--network=host", "can't share a network namespace with the host"),
        ("--pid=host", "can't share namespaces {pid} with the host"),
        ("--ipc=host", "can't share namespaces {ipc} with the host"),
        ("--uts=host", "can't share namespaces {uts} with the host"),
    ] {
        let said = Container::run(&[option], BUSYBOX, &["true"]);
        assert_eq!(said.code, 125, "{said:?}");
        assert!(said.err.contains(text), "{said:?}");
    }
}

#[test]
fn sysctls_of_the_engine_are_fitted_and_set() {
    let container =
        Container::waiting(BUSYBOX, &["--sysctl", "net.ipv4.ip_forward=1", "--sysctl", "kernel.msgmax=4096"]);
    let read = "cd /proc/sys; cat net/ipv4/ip_forward kernel/msgmax net/ipv4/ping_group_range";
    assert_eq!(container.sh(read), "1\n4096\n0\t65535");
    let (refused, args) = Container::prepare(&["run"], &["--sysctl", "kernel.sysrq=1"], BUSYBOX, &["true"]);
    let error = docker(args).refused();
    assert!(error.contains("kernel.sysrq"), "{error}");
    drop(refused);
}

// ---- failures ----

#[test]
fn a_program_that_is_missing_or_no_program_is_told_as_engines_expect() {
    let cases = [
        (vec!["/nonexistent"], 127, "\"/nonexistent\": stat /nonexistent: no such file or directory"),
        (vec!["nonexistent"], 127, "\"nonexistent\": executable file not found in $PATH"),
        (vec!["/etc/passwd"], 126, "\"/etc/passwd\": permission denied"),
        (vec!["/etc"], 126, "permission denied"),
    ];
    let container = Container::waiting(BUSYBOX, &[]);
    // What `docker exec` makes of it depends on the engine's age: it is to be what it makes of runc's words.
    let plain = Container::start(&["--runtime", "runc"], BUSYBOX, &["sleep", "2147483647"]);
    for (command, code, text) in cases {
        let said = Container::run(&[], BUSYBOX, &command);
        assert_eq!(said.code, code, "{said:?}");
        assert!(said.err.contains(text), "{said:?}");
        let said = container.exec(&[], &command);
        assert_eq!(said.code, plain.exec(&[], &command).code, "{said:?}");
        assert!((said.out + &said.err).contains(text), "{command:?}");
    }
}

#[test]
fn a_container_that_could_not_start_leaves_nothing() {
    /// Every file below, with what a write to it would change.
    fn tree(dir: &Path) -> BTreeMap<String, (u32, u32, u32, u64)> {
        let mut all = BTreeMap::new();
        for name in names_in(dir) {
            let path = dir.join(name);
            let facts = fs::symlink_metadata(&path).unwrap();
            all.insert(path.display().to_string(), (facts.mode(), facts.uid(), facts.gid(), facts.ino()));
            if facts.is_dir() {
                all.extend(tree(&path));
            }
        }
        all
    }
    let (data, image) = (host_dir(), BUSYBOX);
    fs::write(data.path().join("kept"), "of the user").unwrap();
    let (container, args) = Container::prepare(
        &["create"],
        &["-v", &format!("{}:/new/place", data.path().display())],
        image,
        &["/nonexistent"],
    );
    docker(args).ok();
    let (id, upper) = (container.id(), container.upper());
    let (layer, user) = (tree(&upper), tree(data.path()));
    container.docker(&["start"]).refused();
    // Directories on the way to a mount point are copied up as they are; nothing else is.
    let left = tree(&upper).into_iter().filter(|entry| layer.get(&entry.0) != Some(&entry.1));
    assert_eq!(
        left.filter(|(_, facts)| facts.0 & nix::libc::S_IFMT != nix::libc::S_IFDIR).collect::<Vec<_>>(),
        []
    );
    assert_eq!(docker(["diff", &container.name]).ok(), "");
    assert_eq!(tree(data.path()), user);
    assert_eq!(cgroups_of(&id), NO_PATHS);
    container.docker(&["rm"]).ok();
    until("the record to go", || record_of(&id).is_none().then_some(()));
    assert_eq!(remains_of(&id, &upper), NO_NAMES);
    assert_eq!(fs::read_to_string(data.path().join("kept")).unwrap(), "of the user");
}

#[test]
fn many_containers_start_at_once() {
    let begin = Instant::now();
    let made: Vec<Container> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..6).map(|_| scope.spawn(|| Container::waiting(BUSYBOX, &[]))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    let mut starts: Vec<u32> = made.iter().map(|container| range_of(container).outside).collect();
    starts.sort_unstable();
    assert!(starts.windows(2).all(|pair| pair[1] - pair[0] >= 65536), "{starts:?}");
    assert!(begin.elapsed() < Duration::from_secs(60));
}
