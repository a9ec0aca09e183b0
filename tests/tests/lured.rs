//! What an engine asks a runtime about a running container, while the container does to its own /proc, cgroups and files what
//! it can: the answers come from the host's side and are not its to make up.
#![allow(clippy::unwrap_used)] // all of it is tests; the lint's exception misses their helpers

use std::path::{Path, PathBuf};

use serde_json::Value;
use sysbox_tests::engine::{BUSYBOX, Container, api, cgroups_of, docker, until};

/// Nests some of its processes, freezes one, and puts files of its own in the place of all that tells of them. One waits where
/// it was; `/x` is its old world.
const ATTACK: &str = r#"set -e
d=/sys/fs/cgroup
nest() { # CONTROLLER PID DIR
    t=$d; [ ! -d $d/$1 ] || t=$d/$1
    mkdir -p $t/$3
    echo $2 >$t/$3/cgroup.procs
}
sleep 4711 & deep=$!
sleep 4712 & frozen=$!
for c in memory pids cpuacct freezer; do nest $c $deep a/b/c; nest $c $frozen own; done
if [ -d $d/freezer ]; then echo FROZEN >$d/freezer/own/freezer.state; else echo 1 >$d/own/cgroup.freeze; fi
dd if=/dev/zero of=/dev/shm/20m bs=1M count=20 2>/dev/null
for dir in memory pids cpuacct; do
    if [ -d $d/$dir ]; then mount -t tmpfs lie $d/$dir/a; fi
done
mkdir /lies
for file in memory.usage_in_bytes memory.current memory.limit_in_bytes memory.max pids.current cgroup.procs tasks; do echo 1 >/lies/$file; done
mount --bind /lies $d
echo "0::/" >/lies/cgroup; echo "1 (lie) S 0" >/lies/stat; mkdir /lies/1 /lies/self
mount -t tmpfs lie /proc/sys
mount --bind /lies /proc
mount -t tmpfs lie /dev/shm
echo root:x:4242:4242::/:/bin/false >/etc/passwd
touch /done
while :; do :; done
"#;

/// The container's own, and all below, of the hierarchy that freezes.
fn freezers(id: &str) -> Vec<PathBuf> {
    fn walk(dir: &Path, found: &mut Vec<PathBuf>) {
        found.push(dir.to_owned());
        for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                walk(&entry.path(), found);
            }
        }
    }
    let mut found = Vec::new();
    for top in cgroups_of(id) {
        if top.join("freezer.state").exists() || top.join("memory.max").exists() {
            walk(&top, &mut found);
        }
    }
    found.retain(|dir| dir.join("freezer.state").exists() || dir.join("cgroup.events").exists());
    found
}

fn is_frozen(dir: &Path) -> bool {
    let read = |name: &str| std::fs::read_to_string(dir.join(name));
    read("freezer.state")
        .map(|state| state.trim() == "FROZEN")
        .or_else(|_| read("cgroup.events").map(|events| events.contains("frozen 1")))
        .unwrap()
}

#[test]
fn stats_top_and_pause_are_not_lured_by_a_container_that_attacks() {
    let options = ["--memory", "64m", "--memory-swap", "64m", "--pids-limit", "50"];
    let container = Container::start(&options, BUSYBOX, &["sh", "-c", ATTACK]);
    let (id, layer) = (container.id(), container.upper());
    until("the attack to be done", || {
        let running = container.inspect("{{.State.Running}}");
        assert_eq!(running, "true", "{:#?}", container.docker(&["logs"]));
        layer.join("done").exists().then_some(())
    });
    let stats = || api("GET", &format!("/containers/{}/stats?stream=false", container.name), &Value::Null);
    let busy = |stats: &Value| stats["cpu_stats"]["cpu_usage"]["total_usage"].as_u64();
    let first = stats();
    let used = first["memory_stats"]["usage"].as_u64().unwrap();
    assert!((20 << 20..=64 << 20).contains(&used), "{first:#}");
    assert_eq!(first["memory_stats"]["limit"], 64 << 20, "{first:#}");
    assert_eq!((&first["pids_stats"]["current"], &first["pids_stats"]["limit"]), (&3.into(), &50.into()));
    until("time to be counted", || (busy(&stats())? > busy(&first)?).then_some(()));

    let top = docker(["top", &container.name, "-o", "pid,args"]).ok();
    for (what, times) in [("sleep 4711", 1), ("sleep 4712", 1), ("lie", 0)] {
        let lines = top.lines().filter(|line| line.ends_with(what)).count();
        assert_eq!(lines, times, "{what}: {top}");
    }
    let init = container.host_pid().to_string();
    assert!(top.lines().any(|line| line.split_whitespace().next() == Some(&init)), "{init}: {top}");

    // All of it stops, however it is nested, and what the container had stopped itself stays so.
    let all = freezers(&id);
    assert!(all.len() >= 5, "{all:#?}");
    for _ in 0..2 {
        docker(["pause", &container.name]).ok();
        assert_eq!(container.inspect("{{.State.Status}}"), "paused");
        assert_eq!(all.iter().filter(|dir| !is_frozen(dir)).count(), 0, "{all:#?}");
        let at = busy(&stats()).unwrap();
        assert_eq!(busy(&stats()), Some(at), "it runs while it is paused");
        docker(["unpause", &container.name]).ok();
        until("it to run", || (busy(&stats())? > at).then_some(()));
        let still: Vec<_> = all.iter().filter(|dir| is_frozen(dir)).collect();
        assert!(still.len() == 1 && still[0].ends_with("own"), "{still:#?}");
    }
    assert_eq!(container.exec(&["-u", "7"], &["id", "-u"]).ok(), "7");
    docker(["update", "--memory", "96m", "--memory-swap", "96m", &container.name]).ok();
    assert_eq!(stats()["memory_stats"]["limit"], 96 << 20);
    container.docker(&["kill"]).ok();
    until("it to be gone", || (container.inspect("{{.State.Running}}") == "false").then_some(()));
}
