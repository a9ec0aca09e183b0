//! Many at once, and containers that take all they can get: calls for one id and for fifty, and what a container does with
//! its processes, its memory and its cgroups. In the end everything can be deleted, and the daemons are as they were.

#![allow(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::time::Duration;

use serde_json::json;
use sysbox_tests::engine::{self, Container};
use sysbox_tests::runtime::{Bundle, Machine, Running, cgroups, eventually};

/// Far above what any machine needs.
const LONG: Duration = Duration::from_secs(100);

#[track_caller]
fn works(machine: &Machine) {
    let bundle = Bundle { dir: machine.path("bundles/works") };
    if !bundle.dir.exists() {
        machine.bundle("works", &["/bin/echo", "well"]);
    }
    assert_eq!(machine.run(&bundle, "works").ok(), "well\n");
}

#[test]
fn calls_for_one_id_at_once_are_each_done_or_refused() {
    let machine = Machine::start();
    let bundle = machine.bundle("b", &["/bin/sleep", "1000"]);
    let dir = bundle.dir.display().to_string();
    let calls: &[&[&str]] = &[
        &["create", "--bundle", &dir, "one"],
        &["start", "one"],
        &["kill", "one", "KILL"],
        &["delete", "one"],
        &["delete", "--force", "one"],
        &["state", "one"],
        &["exec", "one", "/bin/true"],
        &["pause", "one"],
        &["resume", "one"],
    ];
    let created = std::sync::atomic::AtomicU32::new(0);
    std::thread::scope(|scope| {
        for worker in 0..6 {
            let (machine, created) = (&machine, &created);
            scope.spawn(move || {
                for round in 0..20 {
                    let call =
                        if round % 3 == 0 { calls[0] } else { calls[(worker * 5 + round * 7) % calls.len()] };
                    let said = machine.later(call).within(LONG).unwrap_or_else(|| panic!("{call:?} hangs"));
                    // A create under way is ended by a forced delete.
                    let ended = said.code == -1 && call[0] == "create";
                    assert!(ended || matches!(said.code, 0 | 1 | 255), "{call:?}: {said:?}");
                    assert!(!said.err.contains("panicked"), "{call:?}: {said:?}");
                    if said.code == 0 && call[0] == "create" {
                        created.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                    }
                }
            });
        }
    });
    assert!(created.into_inner() > 0);
    machine.runc(&["delete", "--force", "one"]).ok();
    eventually("nothing is left", || machine.remains("one").is_empty());
    works(&machine);
}

#[test]
fn fifty_containers_at_once_have_ids_of_their_own_and_leave_nothing() {
    let machine = Machine::start_large();
    let bundle = machine.bundle("b", &["/bin/sleep", "1000"]);
    let dir = bundle.dir.display().to_string();
    let ids: Vec<String> = (0..50).map(|nr| format!("many{nr}")).collect();
    let maps = std::sync::Mutex::new(BTreeSet::new());
    std::thread::scope(|scope| {
        for some in ids.chunks(7) {
            let (machine, dir, maps) = (&machine, &dir, &maps);
            scope.spawn(move || {
                for id in some {
                    let done = |call: &[&str]| machine.later(call).within(LONG).expect("it hangs").ok();
                    done(&["create", "--bundle", dir, id]);
                    done(&["start", id]);
                    let map = machine.runc(&["exec", id, "/bin/cat", "/proc/self/uid_map"]).ok();
                    assert!(maps.lock().unwrap().insert(map.clone()), "{map} is another's as well");
                }
            });
        }
    });
    assert_eq!(maps.into_inner().unwrap().len(), ids.len());
    std::thread::scope(|scope| {
        for some in ids.chunks(7) {
            let machine = &machine;
            scope.spawn(move || {
                for id in some {
                    machine.later(&["kill", id, "KILL"]).within(LONG).unwrap().ok();
                    eventually("it stops", || machine.state(id)["status"] == "stopped");
                    machine.later(&["delete", id]).within(LONG).unwrap().ok();
                }
            });
        }
    });
    for id in &ids {
        assert_eq!(machine.remains(id), Vec::<String>::new());
    }
    works(&machine);
}

#[test]
fn a_storm_of_docker_run_gives_each_its_output_and_code() {
    std::thread::scope(|scope| {
        for _ in 0..6 {
            scope.spawn(|| {
                for round in 0..4 {
                    let said = Container::run(
                        &["--rm"],
                        engine::BUSYBOX,
                        &["sh", "-c", &format!("echo {round}; exit {round}")],
                    );
                    assert_eq!((said.out.trim(), said.code), (round.to_string().as_str(), round), "{said:?}");
                }
            });
        }
    });
}

/// Deletes it, by force and in time; nothing is left, and the next one runs.
#[track_caller]
fn can_be_deleted(machine: &Machine, running: &Running<'_>) {
    let said = machine.later(&["delete", "--force", &running.id]).within(LONG).expect("the delete hangs");
    said.ok();
    assert_eq!(machine.remains(&running.id), Vec::<String>::new());
    works(machine);
}

#[test]
fn a_container_that_ignores_signals_ends_by_kill() {
    let machine = Machine::start();
    let script = "i=1; while [ $i -lt 65 ]; do trap '' $i 2>/dev/null; i=$((i+1)); done; touch /deaf; while :; do sleep 1000; done";
    let bundle = machine.bundle("b", &["/bin/sh", "-c", script]);
    let running = machine.run_detached(&bundle, "c");
    eventually("it is deaf", || bundle.rootfs().join("deaf").exists());
    for signal in ["TERM", "INT", "HUP", "STOP", "34"] {
        machine.runc(&["kill", "c", signal]).ok();
        machine.runc(&["kill", "--all", "c", signal]).ok();
        assert_ne!(machine.state("c")["status"], "stopped", "{signal}");
    }
    machine.runc(&["kill", "c", "KILL"]).ok();
    eventually("it ends", || machine.state("c")["status"] == "stopped");
    can_be_deleted(&machine, &running);
}

#[test]
fn a_fork_bomb_stays_in_its_limit_and_can_be_deleted() {
    let machine = Machine::start();
    let bundle = machine.bundle("b", &["/bin/sh", "-c", "sh /bomb & exec sleep 1000"]);
    std::fs::write(bundle.rootfs().join("bomb"), "while :; do sleep 1000 & sh /bomb & done 2>/dev/null")
        .unwrap();
    bundle.edit(|config| config["linux"]["resources"]["pids"] = json!({"limit": 150}));
    let running = machine.run_detached(&bundle, "c");
    let count = || {
        serde_json::from_str::<Vec<i64>>(&machine.runc(&["ps", "--format", "json", "c"]).ok()).unwrap().len()
    };
    // How many are left then is chance: a shell that cannot fork ends.
    let refusals = || {
        let tops = cgroups(&machine.cgroup("c")).into_iter().map(PathBuf::from);
        let below = |top: PathBuf| {
            let names = std::fs::read_dir(&top).into_iter().flatten().flatten().map(|entry| entry.path());
            names.chain([top.clone()]).collect::<Vec<_>>()
        };
        let events =
            tops.flat_map(below).filter_map(|dir| std::fs::read_to_string(dir.join("pids.events")).ok());
        events.filter_map(|text| text.trim().strip_prefix("max ")?.parse::<u64>().ok()).sum::<u64>()
    };
    eventually("it has met its limit", || refusals() > 0);
    for _ in 0..20 {
        assert!(count() <= 150);
    }
    can_be_deleted(&machine, &running);
    // And without anybody having looked: killed by its init alone.
    let running = machine.run_detached(&bundle, "d");
    machine.runc(&["kill", "d", "KILL"]).ok();
    eventually("it ends", || machine.state("d")["status"] == "stopped");
    can_be_deleted(&machine, &running);
}

#[test]
fn a_container_that_fills_its_memory_can_be_entered_again_and_deleted() {
    let machine = Machine::start();
    let script = "mount -t tmpfs t /m 2>/dev/null; while :; do /bin/busybox tail /dev/zero >/dev/null 2>&1; echo x >>/died; done";
    let bundle = machine.bundle("b", &["/bin/sh", "-c", script]);
    std::fs::create_dir(bundle.rootfs().join("m")).unwrap();
    bundle
        .edit(|config| config["linux"]["resources"]["memory"] = json!({"limit": 32 << 20, "swap": 32 << 20}));
    let running = machine.run_detached(&bundle, "c");
    eventually("something of it was ended for its memory", || bundle.rootfs().join("died").exists());
    assert_eq!(machine.state("c")["status"], "running");
    can_be_deleted(&machine, &running);
}

#[test]
fn a_container_that_fills_its_cgroup_tree_can_be_used_and_deleted() {
    let machine = Machine::start();
    let bundle = machine.bundle("b", &["/bin/sleep", "1000"]);
    let running = machine.run_detached(&bundle, "c");
    // Wide and deep, in one hierarchy with a controller or in the only one; a process in every hundredth.
    let script = "cd /sys/fs/cgroup; [ -d pids ] && cd pids; i=0; while [ $i -lt 2000 ]; do mkdir w$i || exit 1; \
                  [ $((i % 100)) = 0 ] && { sleep 1000 >/dev/null 2>&1 & echo $! >w$i/cgroup.procs; }; i=$((i+1)); done; \
                  i=0; while [ $i -lt 300 ]; do mkdir d || exit 1; cd d; i=$((i+1)); done; echo done";
    assert_eq!(running.exec(script).ok(), "done\n");
    let pids: Vec<i64> = serde_json::from_str(&machine.runc(&["ps", "--format", "json", "c"]).ok()).unwrap();
    assert_eq!(pids.len(), 21);
    machine.runc(&["update", "--pids-limit", "500", "c"]).ok();
    assert_eq!(running.exec("echo well").ok(), "well\n");
    can_be_deleted(&machine, &running);
}
