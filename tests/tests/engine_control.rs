//! What a user does to a container that runs, through a real engine: pause, new limits, figures, lists of processes.

#![allow(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

use sysbox_tests::engine::{BUSYBOX, Container, docker, until};

#[test]
fn pause_and_unpause() {
    let container = Container::start(&[], BUSYBOX, &["sh", "-c", "while :; do echo x >>/count; done"]);
    let name = container.name.as_str();
    let counted = || std::fs::metadata(container.upper().join("count")).map_or(0, |facts| facts.len());
    until("it counts", || (counted() > 0).then_some(()));
    docker(["pause", name]).ok();
    let stopped_at = counted();
    assert_eq!(container.inspect("{{.State.Status}}"), "paused");
    assert!(docker(["exec", name, "true"]).refused().contains("paused"));
    assert_eq!(counted(), stopped_at);
    docker(["unpause", name]).ok();
    until("it counts again", || (counted() > stopped_at).then_some(()));
    // Ended while it is paused: the engine thaws it or kills it, and nothing hangs.
    docker(["pause", name]).ok();
    docker(["rm", "--force", name]).ok();
}

#[test]
fn limits_are_updated_while_it_runs() {
    let container = Container::waiting(BUSYBOX, &["--memory", "64m", "--memory-swap", "64m"]);
    let name = container.name.as_str();
    docker(["update", "--memory", "96m", "--memory-swap", "96m", "--cpuset-cpus", "0", name]).ok();
    assert_eq!(container.sh("awk '/^MemTotal:/ {print $2}' /proc/meminfo"), "98304");
    assert_eq!(container.sh("awk '/^Cpus_allowed_list:/ {print $2}' /proc/self/status"), "0");
}

#[test]
fn its_processes_are_listed() {
    let container = Container::start(&[], BUSYBOX, &["sh", "-c", "sleep 4242 & exec sleep 2424"]);
    let listed = until("both run", || {
        let listed = docker(["top", container.name.as_str()]).ok();
        (listed.contains("sleep 4242") && listed.contains("sleep 2424")).then_some(listed)
    });
    assert_eq!(listed.lines().count(), 3, "{listed}");
}
