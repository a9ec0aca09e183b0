//! A container that puts off its own end: whatever holds its processes, a kill ends them and a delete takes all away.

#![allow(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::fcntl::OFlag;
use nix::sys::stat::Mode;
use sysbox_tests::runtime::{Machine, Running, cgroups, eventually};

/// Far above what any machine needs.
const LONG: Duration = Duration::from_secs(100);

/// Mounts a FUSE file system and answers its first request, as a server; then waits, holding the server's end, for the
/// answer to a second one, which was read and is never answered. Such a wait ends by no signal.
const WAITS_FOR_ITSELF: &str = "\
    exec 3<>/dev/fuse; mkdir -p /m; /bin/busybox mount -t fuse -o fd=3,rootmode=40000,user_id=0,group_id=0 x /m || exit 1; \
    /bin/busybox dd bs=1M count=1 <&3 >/request 2>/dev/null; \
    { /bin/busybox printf '\\120\\0\\0\\0\\0\\0\\0\\0'; /bin/busybox dd if=/request bs=1 skip=8 count=8 2>/dev/null; \
      /bin/busybox printf '\\7\\0\\0\\0\\37\\0\\0\\0'; /bin/busybox dd if=/dev/zero bs=56 count=1 2>/dev/null; } >/answer; \
    /bin/busybox dd if=/answer bs=80 count=1 >&3 2>/dev/null; \
    /bin/busybox dd bs=1M count=1 <&3 >/second 2>/dev/null & \
    ls /m/x & \
    while [ ! -s /second ]; do :; done; touch /hangs; sleep 1000";

fn hanging<'a>(machine: &'a Machine, id: &str) -> Running<'a> {
    let bundle = machine.bundle(id, &["/bin/sh", "-c", WAITS_FOR_ITSELF]);
    let running = machine.run_detached(&bundle, id);
    eventually("it hangs", || bundle.rootfs().join("hangs").exists() && waits_for_ever(machine, id));
    running
}

/// Whether a process of it is in a wait that no signal ends: one was sent.
fn waits_for_ever(machine: &Machine, id: &str) -> bool {
    let pids: Vec<i32> = serde_json::from_str(&machine.runc(&["ps", "--format", "json", id]).ok()).unwrap();
    let stat = |pid: &i32| fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    pids.iter().any(|pid| stat(pid).contains(") S "))
        && pids.iter().any(|pid| {
            fs::read_to_string(format!("/proc/{pid}/wchan"))
                .is_ok_and(|at| at.contains("fuse") || at.contains("request_wait_answer"))
        })
}

fn has_stopped(machine: &Machine, id: &str) -> bool {
    machine.state(id)["status"] == "stopped"
}

#[test]
fn a_process_that_waits_for_its_own_answer_dies_with_its_container() {
    let machine = Machine::start();
    let neighbour = hanging(&machine, "n");
    let killed = hanging(&machine, "k");
    machine.runc(&["kill", "k", "KILL"]).ok();
    eventually("it ends", || has_stopped(&machine, "k"));
    drop(killed);
    let forced = hanging(&machine, "f");
    forced.delete();
    for id in ["k", "f"] {
        assert_eq!(machine.remains(id), Vec::<String>::new());
    }
    // Whose connection is another container's keeps it.
    assert!(waits_for_ever(&machine, &neighbour.id));
    machine.runc(&["kill", "--all", "n", "KILL"]).ok();
    eventually("it ends", || has_stopped(&machine, "n"));
}

/// A directory below the container's part of each hierarchy, deeper than a path is long; init goes there. By descriptor.
fn bury(machine: &Machine, id: &str, pid: i64) -> Vec<PathBuf> {
    let (flags, mode) = (OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::from_bits_truncate(0o755));
    let name = "7".repeat(200);
    let all = cgroups(&machine.cgroup(id));
    for top in &all {
        let mut here = nix::fcntl::open(&Path::new(top).join("syscont"), flags, mode).unwrap();
        for _ in 0..25 {
            nix::sys::stat::mkdirat(&here, name.as_str(), mode).unwrap();
            let above = here;
            here = nix::fcntl::openat(&above, name.as_str(), flags, mode).unwrap();
            for file in ["cpuset.cpus", "cpuset.mems"] {
                let read = |dir| nix::fcntl::openat(dir, file, OFlag::O_RDONLY, Mode::empty());
                if let Ok(from) = read(&above) {
                    let value = std::io::read_to_string(fs::File::from(from)).unwrap();
                    write(&here, file, value.trim());
                }
            }
        }
        write(&here, "cgroup.procs", &pid.to_string());
        if top.contains("freezer") {
            write(&here, "freezer.state", "FROZEN");
        }
    }
    all.into_iter().map(PathBuf::from).collect()
}

fn write(dir: &impl std::os::fd::AsFd, file: &str, value: &str) {
    let Ok(fd) = nix::fcntl::openat(dir, file, OFlag::O_WRONLY, Mode::empty()) else {
        assert!(file.starts_with("cpuset"), "{file}");
        return;
    };
    nix::unistd::write(fd, value.as_bytes()).unwrap();
}

#[test]
fn an_init_that_buried_and_froze_itself_is_found_killed_and_deleted() {
    let machine = Machine::start();
    for (id, ends) in [("k", &["kill", "k", "KILL"][..]), ("d", &["delete", "--force", "d"])] {
        let bundle = machine.bundle(id, &["/bin/sleep", "1000"]);
        let running = machine.run_detached(&bundle, id);
        let pid = running.pid();
        bury(&machine, id, pid);
        let found: Vec<i64> =
            serde_json::from_str(&machine.runc(&["ps", "--format", "json", id]).ok()).unwrap();
        assert_eq!(found, [pid], "{id}");
        machine.later(ends).within(LONG).unwrap().ok();
        eventually("it ends", || id == "d" || has_stopped(&machine, id));
        running.delete();
        assert_eq!(machine.remains(id), Vec::<String>::new());
    }
}
