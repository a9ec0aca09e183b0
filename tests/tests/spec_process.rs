//! `process` of the specification on the real kernel, for the first process and for a later one.

#![allow(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

use std::fs;

use serde_json::{Value, json};
use sysbox_tests::runtime::Machine;

/// Of a `status` file of /proc.
fn field<'a>(status: &'a str, name: &str) -> &'a str {
    status.lines().find_map(|line| line.strip_prefix(name)).unwrap().trim_start_matches(':').trim()
}

/// What the kernel says of a process from outside.
fn policy_of(pid: i64) -> (i32, i32) {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let fields: Vec<&str> = stat.rsplit_once(") ").unwrap().1.split(' ').collect();
    // proc(5): field 41 is the policy, field 19 the nice value.
    (fields[38].parse().unwrap(), fields[16].parse().unwrap())
}

#[test]
fn user_umask_groups_and_limits_are_as_asked() {
    let machine = Machine::start();
    let script =
        "id -u; id -g; umask; cat /proc/self/status; ulimit -n; ulimit -Hn; cat /proc/self/oom_score_adj";
    let bundle = machine.bundle("b", &["/bin/sh", "-c", script]);
    bundle.edit(|config| {
        config["process"]["user"] = json!({"uid": 7, "gid": 8, "umask": 0o27, "additionalGids": [9, 10]});
        config["process"]["rlimits"] = json!([{"type": "RLIMIT_NOFILE", "soft": 100, "hard": 200}]);
        config["process"]["oomScoreAdj"] = json!(123);
        config["process"]["noNewPrivileges"] = json!(false);
    });
    let said = machine.run(&bundle, "c").ok();
    assert!(said.starts_with("7\n8\n0027\n") && said.ends_with("100\n200\n123\n"), "{said}");
    assert_eq!((field(&said, "Groups"), field(&said, "NoNewPrivs")), ("9 10", "0"));
    bundle.edit(|config| config["process"]["noNewPrivileges"] = json!(true));
    assert_eq!(field(&machine.run(&bundle, "c").ok(), "NoNewPrivs"), "1");
}

#[test]
fn scheduler_and_io_priority_are_set_from_outside() {
    let machine = Machine::start();
    let bundle = machine.bundle("b", &["/bin/sleep", "1000"]);
    bundle.edit(|config| {
        config["process"]["scheduler"] = json!({"policy": "SCHED_BATCH", "nice": 5});
        config["process"]["ioPriority"] = json!({"class": "IOPRIO_CLASS_IDLE", "priority": 0});
    });
    let running = machine.run_detached(&bundle, "c");
    const BATCH: i32 = 3;
    assert_eq!(policy_of(running.pid()), (BATCH, 5));
    assert_eq!(running.exec("busybox ionice -p 1").ok(), "idle\n");
    let refused = |id: &str, key: &str, value: Value| {
        let bundle = machine.bundle(id, &["/bin/true"]);
        bundle.edit(|config| config["process"][key] = value);
        let said = machine.run(&bundle, id).fails();
        assert_eq!(machine.remains(id), Vec::<String>::new());
        said
    };
    let said = refused("prio", "ioPriority", json!({"class": "IOPRIO_CLASS_BE", "priority": 99}));
    assert!(said.contains("/process/ioPriority/priority: 99 is not 0 to 7"), "{said}");
    for (id, score) in [("high", 1001), ("low", -1001)] {
        let said = refused(id, "oomScoreAdj", json!(score));
        assert!(said.contains(&format!("/process/oomScoreAdj: {score} is not -1000 to 1000")), "{said}");
    }
    let said = refused("fifo", "scheduler", json!({"policy": "SCHED_FIFO", "priority": 1000}));
    assert!(said.contains("/process/scheduler: sched_setattr("), "{said}");
}

#[test]
fn an_exec_has_the_affinity_that_it_asks_for() {
    let machine = Machine::start();
    let bundle = machine.bundle("b", &["/bin/sleep", "1000"]);
    let _running = machine.run_detached(&bundle, "c");
    let document = machine.path("process.json");
    let affinity = |value: Value| {
        let process = json!({
            "args": ["/bin/cat", "/proc/self/status"], "cwd": "/", "env": [], "user": {"uid": 0, "gid": 0},
            "execCPUAffinity": value,
        });
        fs::write(&document, process.to_string()).unwrap();
        machine.runc(&["exec", "--process", &document.display().to_string(), "c"])
    };
    assert_eq!(field(&affinity(json!({"final": "0"})).ok(), "Cpus_allowed_list"), "0");
    assert_eq!(field(&affinity(json!({"initial": "0"})).ok(), "Cpus_allowed_list"), "0");
    assert_ne!(affinity(json!({"final": "5-1"})).code, 0);
}

#[test]
fn a_terminal_has_the_size_that_it_is_given() {
    let machine = Machine::start();
    let bundle = machine.bundle("b", &["/bin/busybox", "stty", "size"]);
    bundle.edit(|config| {
        config["process"]["terminal"] = json!(true);
        config["process"]["consoleSize"] = json!({"height": 33, "width": 77});
    });
    assert_eq!(machine.run(&bundle, "c").ok().trim(), "33 77");
}

#[test]
fn a_label_that_cannot_be_applied_is_refused() {
    let machine = Machine::start();
    for (id, pointer, value, why) in [
        ("process", "/process/selinuxLabel", json!("system_u:system_r:container_t:s0"), "SELinux"),
        ("mount", "/linux/mountLabel", json!("system_u:object_r:container_file_t:s0"), "SELinux"),
    ] {
        let bundle = machine.bundle(id, &["/bin/true"]);
        bundle.edit(|config| {
            let (parent, name) = pointer.rsplit_once('/').unwrap();
            config.pointer_mut(parent).unwrap()[name] = value.clone();
        });
        let said = machine.run(&bundle, id).fails();
        assert!(said.contains(pointer) && said.contains(why), "{said}");
        assert_eq!(machine.remains(id), Vec::<String>::new());
    }
    // As an engine hands it on that knows of labels, on a host without them.
    let bundle = machine.bundle("empty", &["/bin/echo", "ran"]);
    bundle.edit(|config| {
        config["process"]["selinuxLabel"] = json!("");
        config["linux"]["mountLabel"] = json!("");
    });
    assert_eq!(machine.run(&bundle, "empty").ok().trim_end(), "ran");
}
