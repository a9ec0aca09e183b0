//! What is done to a container that runs, from outside: pause and resume, new limits.

#![allow(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use nix::fcntl::OFlag;
use nix::sys::stat::Mode;
use sysbox_tests::runtime::{Machine, Running, cgroups, eventually};

/// A container that writes a line to /count again and again.
const COUNTING: &str = "while :; do echo x >>/count; done";

fn counted(machine: &Machine, id: &str) -> u64 {
    fs::metadata(machine.path("bundles").join(id).join("rootfs/count")).map_or(0, |facts| facts.len())
}

/// Where the limits of `controller` are: in its own hierarchy, or in the only one.
fn limits(machine: &Machine, id: &str, controller: &str) -> PathBuf {
    let all = cgroups(&machine.cgroup(id));
    let own = all.iter().find(|path| path.split(['/', ',']).any(|part| part == controller));
    PathBuf::from(own.or(all.first()).expect("a container has cgroups"))
}

fn read(path: PathBuf) -> String {
    fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display())).trim().to_owned()
}

fn status(machine: &Machine, id: &str) -> String {
    machine.state(id)["status"].as_str().unwrap().to_owned()
}

fn counting<'a>(machine: &'a Machine, id: &str) -> Running<'a> {
    let bundle = machine.bundle(id, &["/bin/sh", "-c", COUNTING]);
    let running = machine.run_detached(&bundle, id);
    eventually("it counts", || counted(machine, id) > 0);
    running
}

#[test]
fn a_paused_container_stands_still_until_it_is_resumed() {
    let machine = Machine::start();
    let running = counting(&machine, "c");
    machine.runc(&["pause", "c"]).ok();
    let stopped_at = counted(&machine, "c");
    assert_eq!(status(&machine, "c"), "paused");
    let refused = machine.runc(&["pause", "c"]).fails();
    assert!(refused.contains("container not running"), "{refused}");
    let refused = running.exec("true").fails();
    assert!(refused.contains("cannot exec in a paused container (use --ignore-paused"), "{refused}");
    let refused = machine.runc(&["delete", "c"]).fails();
    assert!(refused.contains("cannot delete container c that is not stopped: paused"), "{refused}");
    assert_eq!(counted(&machine, "c"), stopped_at);

    machine.runc(&["resume", "c"]).ok();
    assert_eq!(status(&machine, "c"), "running");
    eventually("it counts again", || counted(&machine, "c") > stopped_at);
    let refused = machine.runc(&["resume", "c"]).fails();
    assert!(refused.contains("container not paused"), "{refused}");
}

#[test]
fn a_paused_container_can_be_killed_and_deleted() {
    let machine = Machine::start();
    let _running = counting(&machine, "c");
    machine.runc(&["pause", "c"]).ok();
    machine.runc(&["kill", "c", "KILL"]).ok();
    eventually("it ends", || status(&machine, "c") == "stopped");
    machine.runc(&["delete", "c"]).ok();
    let _again = counting(&machine, "d");
    machine.runc(&["pause", "d"]).ok();
    machine.runc(&["delete", "--force", "d"]).ok();
    assert_eq!(machine.remains("c"), Vec::<String>::new());
    assert_eq!(machine.remains("d"), Vec::<String>::new());
}

/// A process that is frozen by version 1 does not die, and a container has a freezer of its own there.
#[test]
fn a_container_that_froze_itself_can_be_deleted() {
    let machine = Machine::start();
    let bundle = machine.bundle("b", &["/bin/sleep", "1000"]);
    let running = machine.run_detached(&bundle, "c");
    let script = "d=/sys/fs/cgroup/freezer; f=freezer.state; v=FROZEN; \
                  [ -d $d ] || { d=/sys/fs/cgroup; f=cgroup.freeze; v=1; }; \
                  mkdir $d/own; sleep 1000 >/dev/null 2>&1 & p=$!; sleep 0.1; echo $p >$d/own/cgroup.procs && echo $v >$d/own/$f; cat $d/own/$f";
    let frozen = running.exec(script).ok();
    assert!(["FROZEN", "FREEZING", "1"].contains(&frozen.trim()), "{frozen}");
    machine.runc(&["delete", "--force", "c"]).ok();
    assert_eq!(machine.remains("c"), Vec::<String>::new());
}

#[test]
fn cgroups_nested_deeper_than_a_path_is_long_go_with_the_container() {
    let machine = Machine::start();
    let bundle = machine.bundle("b", &["/bin/sleep", "1000"]);
    let _running = machine.run_detached(&bundle, "c");
    let (flags, mode) = (OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::from_bits_truncate(0o755));
    let mut here = nix::fcntl::open(&limits(&machine, "c", "pids").join("syscont"), flags, mode).unwrap();
    let name = "7".repeat(200);
    for _ in 0..25 {
        nix::sys::stat::mkdirat(&here, name.as_str(), mode).unwrap();
        here = nix::fcntl::openat(&here, name.as_str(), flags, mode).unwrap();
    }
    drop(here);
    machine.runc(&["delete", "--force", "c"]).ok();
    assert_eq!(machine.remains("c"), Vec::<String>::new());
}

#[test]
fn an_init_that_froze_itself_can_be_killed() {
    let machine = Machine::start();
    // Where version 1 has no freezer there is nothing that keeps the killed alive: then it only waits.
    let script = "d=/sys/fs/cgroup/freezer; [ -d $d ] || exec sleep 1000; mkdir $d/own; echo 1 >$d/own/cgroup.procs; \
                  touch /there; echo FROZEN >$d/own/freezer.state; exec sleep 1000";
    let bundle = machine.bundle("b", &["/bin/sh", "-c", script]);
    let _running = machine.run_detached(&bundle, "c");
    let freezers = limits(&machine, "c", "freezer");
    if freezers.join("freezer.state").exists() {
        let own = freezers.join("syscont/own/freezer.state");
        eventually("it is frozen", || fs::read_to_string(&own).is_ok_and(|state| state.trim() == "FROZEN"));
    }
    machine.runc(&["kill", "c", "KILL"]).ok();
    eventually("it ends", || status(&machine, "c") == "stopped");
}

#[test]
fn limits_are_changed_by_flag_and_by_document() {
    let machine = Machine::start();
    let bundle = machine.bundle("b", &["/bin/sleep", "1000"]);
    let running = machine.run_detached(&bundle, "c");
    let limit = |controller: &str, v1: &str, v2: &str| {
        let dir = limits(&machine, "c", controller);
        let file = dir.join(v1);
        read(if file.exists() { file } else { dir.join(v2) })
    };
    let memory = || limit("memory", "memory.limit_in_bytes", "memory.max");
    machine.runc(&["update", "--memory", "64m", "--memory-swap", "64m", "--pids-limit", "77", "c"]).ok();
    assert_eq!(memory(), (64 << 20).to_string());
    assert_eq!(limit("pids", "pids.max", "pids.max"), "77");
    let seen = running.exec("cat /proc/meminfo").ok();
    assert!(seen.lines().any(|line| line.split_whitespace().eq(["MemTotal:", "65536", "kB"])), "{seen}");

    // Up and down again: version 1 wants memory and swap set in an order that depends on where they were.
    machine.runc(&["update", "--memory", "128m", "--memory-swap", "192m", "c"]).ok();
    assert_eq!(memory(), (128 << 20).to_string());
    machine.runc(&["update", "--memory", "48m", "--memory-swap", "48m", "c"]).ok();
    assert_eq!(memory(), (48 << 20).to_string());
    assert_eq!(limit("pids", "pids.max", "pids.max"), "77", "what is not given stays");
    machine.runc(&["update", "--cpu-period", "100000", "--cpu-quota", "150000", "c"]).ok();
    machine.runc(&["update", "--cpu-quota", "50000", "c"]).ok();

    // Programs inside size themselves by what they find at the top of their own hierarchies.
    let own = running.exec(
        "cd /sys/fs/cgroup; [ -d memory ] && cat memory/memory.limit_in_bytes pids/pids.max cpu/cpu.cfs_quota_us \
         || cat memory.max pids.max cpu.max",
    );
    let own = own.ok();
    let own: Vec<&str> = own.lines().map(|line| line.split(' ').next().unwrap()).collect();
    assert_eq!(own, [(48 << 20).to_string().as_str(), "77", "50000"]);

    let document = r#"{"memory": {"limit": 100663296, "swap": 100663296}, "cpu": {"shares": 512}}"#;
    let mut child = machine.command();
    let mut child = child.args(["update", "--resources", "-", "c"]).stdin(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(document.as_bytes()).unwrap();
    assert!(child.wait().unwrap().success());
    assert_eq!(memory(), "100663296");
    assert_eq!(
        limit("cpu", "cpu.shares", "cpu.weight"),
        if limits(&machine, "c", "cpu").join("cpu.shares").exists() { "512" } else { "20" }
    );
}

#[test]
fn cpus_are_taken_and_given_back_with_cgroups_below() {
    let machine = Machine::start();
    let bundle = machine.bundle("b", &["/bin/sleep", "1000"]);
    let running = machine.run_detached(&bundle, "c");
    running.exec("d=/sys/fs/cgroup/cpuset; [ -d $d ] || exit 0; mkdir $d/own && cat $d/cpuset.cpus >$d/own/cpuset.cpus").ok();
    let all = running.exec("cat /proc/self/status").ok();
    let allowed = |text: &str| {
        let line = text.lines().find(|line| line.starts_with("Cpus_allowed_list:")).unwrap();
        line.split_whitespace().nth(1).unwrap().to_owned()
    };
    machine.runc(&["update", "--cpuset-cpus", "0", "c"]).ok();
    assert_eq!(allowed(&running.exec("cat /proc/self/status").ok()), "0");
    machine.runc(&["update", "--cpuset-cpus", &allowed(&all), "c"]).ok();
    assert_eq!(allowed(&running.exec("cat /proc/self/status").ok()), allowed(&all));
}

/// By version 1 nothing follows: neither a set of CPUs nor a share of the processor, and none may be above one above it.
#[test]
fn limits_shrink_over_limits_that_the_container_made_itself() {
    let machine = Machine::start();
    let bundle = machine.bundle("b", &["/bin/sleep", "1000"]);
    let running = machine.run_detached(&bundle, "c");
    machine
        .runc(&["update", "--cpu-period", "100000", "--cpu-quota", "150000", "--cpuset-cpus", "0-1", "c"])
        .ok();
    let (cpu, cpus) =
        (limits(&machine, "c", "cpu").join("syscont"), limits(&machine, "c", "cpuset").join("syscont"));
    // Version 2 has no such rule: there each limit is its own.
    if Path::new("/sys/fs/cgroup/cgroup.controllers").exists() {
        return;
    }
    let script = "cd /sys/fs/cgroup/cpu; mkdir -p a/b; echo 120000 >a/cpu.cfs_quota_us; echo 20000 >a/b/cpu.cfs_quota_us; \
                  cd /sys/fs/cgroup/cpuset; for d in a a/b z; do mkdir $d; cat cpuset.mems >$d/cpuset.mems; cat cpuset.cpus >$d/cpuset.cpus; done; \
                  echo 1 >a/b/cpuset.cpus; echo 1 >a/cpuset.cpus; mkdir none";
    running.exec(script).ok();
    machine.runc(&["update", "--cpu-quota", "50000", "c"]).ok();
    assert_eq!(read(cpu.join("cpu.cfs_quota_us")), "50000");
    assert_eq!(read(cpu.join("a/cpu.cfs_quota_us")), "-1", "what is above the new limit is bound by it");
    assert_eq!(read(cpu.join("a/b/cpu.cfs_quota_us")), "20000", "what is below it stays");

    let sets = || ["", "a", "a/b", "z", "none"].map(|dir| read(cpus.join(dir).join("cpuset.cpus")));
    machine.runc(&["update", "--cpuset-cpus", "1", "c"]).ok();
    // A set that nobody wrote is a copy of the one above it (`cgroup.clone_children`), and shrinks as well.
    assert_eq!(sets(), ["1"; 5]);
    machine.runc(&["update", "--cpuset-cpus", "0-1", "c"]).ok();
    assert_eq!(sets(), ["0-1", "1", "1", "1", "1"], "what is narrower is not widened");
    // From one that has nothing left they get what there is.
    machine.runc(&["update", "--cpuset-cpus", "0", "c"]).ok();
    assert_eq!(sets(), ["0"; 5]);
}

#[test]
fn limits_that_make_no_sense_are_refused_and_change_nothing() {
    let machine = Machine::start();
    let bundle = machine.bundle("b", &["/bin/sleep", "1000"]);
    let _running = machine.run_detached(&bundle, "c");
    let dir = limits(&machine, "c", "pids");
    let before = read(dir.join("pids.max"));
    for (flags, said) in [
        (&["--memory", "1x", "--pids-limit", "5"][..], "invalid value for memory: invalid suffix: 'x'"),
        (&["--resources", "/nowhere"], "open /nowhere: no such file or directory"),
        (&["--cpuset-cpus", "4096"], "cpuset.cpus"),
        (&["--l3-cache-schema", "L3:0=1"], "l3 cache schema is not enabled"),
    ] {
        let error = machine.runc(&[&["update"], flags, &["c"]].concat()).fails();
        assert!(error.contains(said) && error.trim().lines().count() == 1, "{error}");
    }
    assert_eq!(read(dir.join("pids.max")), before);
    let error = machine.runc(&["update", "--pids-limit", "5", "nobody"]).fails();
    assert!(error.contains("container does not exist"), "{error}");
}
