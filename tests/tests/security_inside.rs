//! Attacks by root of a container that runs, on those who come in from outside: one test for each class of vulnerability,
//! beside `security.rs`. The comment above a test says what it would show if we had the bug.

#![allow(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

use std::time::Duration;

use serde_json::json;
use sysbox_tests::runtime::{Bundle, Machine, eventually};

/// Far above what any machine needs.
const LONG: Duration = Duration::from_secs(100);

/// Gives a bundle the namespaces of a container that runs.
fn join(bundle: &Bundle, pid: i64, types: &[&str]) {
    bundle.edit(|config| {
        for namespace in config["linux"]["namespaces"].as_array_mut().unwrap() {
            let typ = namespace["type"].as_str().unwrap().to_owned();
            if types.contains(&typ.as_str()) {
                let file = if typ == "network" { "net" } else { &typ };
                namespace["path"] = json!(format!("/proc/{pid}/ns/{file}"));
            }
        }
    });
}

/// Stops every process that libcontainer makes here.
const CATCHER: &str = "touch /ready; while :; do for p in /proc/[0-9]*; do \
    read c < $p/comm && case \"$c\" in youki*) kill -STOP ${p#/proc/}; touch /caught;; esac; done 2>/dev/null; done";

/// With the bug: the engine waits for ever for a create that joins the pid namespace of a container.
#[test]
fn a_create_among_another_containers_processes_is_held_by_nobody() {
    let machine = Machine::start();
    let holder = machine.bundle("h", &["/bin/sh", "-c", CATCHER]);
    let running = machine.run_detached(&holder, "h");
    eventually("it watches", || holder.rootfs().join("ready").exists());
    let bundle = machine.bundle("c", &["/bin/true"]);
    join(&bundle, running.pid(), &["network", "pid"]);
    let dir = bundle.dir.display().to_string();
    for round in 0..200 {
        let id = format!("c{round}");
        let said = machine
            .later(&["create", "--bundle", &dir, &id])
            .within(LONG)
            .expect("the create waits for ever");
        if said.code != 0 {
            assert!(holder.rootfs().join("caught").exists(), "{said:?}");
            assert!(said.err.contains("create: not within 30 s") && said.err.contains("hint:"), "{said:?}");
            assert_eq!(machine.remains(&id), Vec::<String>::new());
            return;
        }
        machine.runc(&["delete", "--force", &id]).ok();
    }
    panic!("none of 200 creates was caught");
}
