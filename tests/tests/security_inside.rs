//! Attacks by root of a container that runs, on those who come in from outside: one test for each class of vulnerability,
//! beside `security.rs`. The comment above a test says what it would show if we had the bug.

#![allow(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

use std::fs;
use std::process::Command;
use std::time::Duration;

use serde_json::json;
use sysbox_tests::runtime::{Bundle, Machine, Running, eventually};

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

fn sleeper<'a>(machine: &'a Machine, name: &str) -> (Bundle, Running<'a>) {
    let bundle = machine.bundle(name, &["/bin/sleep", "1000"]);
    let running = machine.run_detached(&bundle, name);
    (bundle, running)
}

/// With the bug (CVE-2019-16884, 2023-28642, 2025-52881): what the runtime writes to or reads from /proc inside is the
/// attacker's, and an exec is not where, or not what, it should be.
#[test]
fn cve_2019_16884_a_replaced_proc_misleads_nobody_from_outside() {
    let machine = Machine::start();
    for (name, lure) in [
        ("empty", "mount -t tmpfs t /proc"),
        (
            "fake",
            "mount -t tmpfs t /proc; mkdir -p /proc/self/attr /proc/self/fd /proc/self/ns /proc/1 /proc/sys/kernel; \
             for f in /proc/self/attr/exec /proc/self/uid_map /proc/self/setgroups /proc/self/oom_score_adj /proc/self/status /proc/1/cgroup; \
             do echo lure >$f; done; for n in user mnt pid net ipc uts cgroup; do echo >/proc/self/ns/$n; done; /bin/busybox ln -s / /proc/self/root; \
             for n in 3 4 5 6 7 8 9 10 11 12; do /bin/busybox ln -s /bin/false /proc/self/fd/$n; done; /bin/busybox ln -s /bin/false /proc/self/exe",
        ),
        (
            "gone",
            "/bin/busybox umount -l /proc; for d in /sys/fs/cgroup /sys /dev; do mount -t tmpfs t $d; done",
        ),
    ] {
        let (_bundle, running) = sleeper(&machine, name);
        let inside = running
            .exec("/bin/busybox readlink /proc/self/ns/mnt; /bin/busybox readlink /proc/self/ns/user")
            .ok();
        running.exec(lure).ok();
        // Seen from the host, by the descriptors of a process that stays.
        machine.later(&["exec", "--detach", name, "/bin/sleep", "4321"]).within(LONG).expect("it hangs").ok();
        let pids: Vec<i64> =
            serde_json::from_str(&machine.runc(&["ps", "--format", "json", name]).ok()).unwrap();
        let later = pids.iter().find(|pid| **pid != running.pid()).expect("the exec runs");
        let link =
            |file: &str| fs::read_link(format!("/proc/{later}/ns/{file}")).unwrap().display().to_string();
        assert_eq!(format!("{}\n{}\n", link("mnt"), link("user")), inside, "{name}");
        assert_eq!(running.exec("echo well").ok(), "well\n", "{name}");
        machine.runc(&["pause", name]).ok();
        assert_eq!(machine.state(name)["status"], "paused", "{name}");
        machine.runc(&["resume", name]).ok();
        machine.runc(&["update", "--pids-limit", "50", name]).ok();
        machine.runc(&["kill", name, "KILL"]).ok();
        eventually("it ends", || machine.state(name)["status"] == "stopped");
        machine.runc(&["delete", name]).ok();
        assert_eq!(machine.remains(name), Vec::<String>::new());
    }
}

/// With the bug: an exec hangs at, reads all of, or is told by a file that root of the container put in the place of
/// /etc/passwd.
#[test]
fn a_passwd_that_is_no_passwd_holds_no_exec() {
    let machine = Machine::start();
    let (_bundle, running) = sleeper(&machine, "c");
    for lure in [
        "/bin/busybox mkfifo /etc/passwd",
        "/bin/busybox truncate -s 100G /etc/passwd",
        "/bin/busybox ln -s /dev/zero /etc/passwd",
        "/bin/busybox ln -s /proc/self/environ /etc/passwd",
        "/bin/busybox ln -s passwd /etc/passwd",
        "/bin/busybox ln -s /proc/1/root/../../../../etc/passwd /etc/passwd",
        "mkdir /etc/passwd",
    ] {
        running.exec(&format!("mkdir -p /etc; rm -rf /etc/passwd; {lure}")).ok();
        let began =
            machine.later(&["exec", "--user", "5", "c", "/bin/sh", "-c", "[ \"$HOME\" = / ] || exit 3"]);
        let said = began.within(LONG).unwrap_or_else(|| panic!("{lure}: it hangs"));
        assert_eq!(said.code, 0, "{lure}: {said:?}");
    }
}

/// With the bug: the working directory of an exec is a directory of the host's that the runtime had open.
#[test]
fn cve_2024_21626_an_exec_has_no_descriptor_and_no_directory_of_ours() {
    let machine = Machine::start();
    let (_bundle, running) = sleeper(&machine, "c");
    for fd in 3..20 {
        let cwd = format!("/proc/self/fd/{fd}");
        let said = machine.runc(&[
            "exec",
            "--cwd",
            &cwd,
            "c",
            "/bin/sh",
            "-c",
            "ls -d ../../../../bin/busybox; cat ../../../../etc/hostname",
        ]);
        assert!(
            said.code != 0 && (said.out.is_empty() || said.out.contains("bin/busybox")),
            "{cwd}: {said:?}"
        );
        let host = fs::read_to_string("/etc/hostname").unwrap_or_default();
        assert!(host.trim().is_empty() || !said.out.contains(host.trim()), "{cwd}: {said:?}");
    }
    // The fourth is that of the listing itself.
    assert_eq!(running.exec("ls /proc/self/fd | /bin/busybox wc -l").ok().trim(), "4");
    assert_eq!(running.exec("ls /proc/1/fd").ok(), "0\n1\n2\n");
}

/// With the bug (crun CVE-2026-30892, containerd 2024-40635): what is no number, or too large for one, is root.
#[test]
fn cve_2026_30892_a_user_is_a_number_or_refused() {
    let machine = Machine::start();
    let (_bundle, _running) = sleeper(&machine, "c");
    for user in [
        "root",
        "5x",
        "x5",
        "0x5",
        " 5",
        "5 ",
        "+5",
        "-1",
        "5:",
        ":5",
        "5:x",
        "1:2:3",
        "4294967295",
        "4294967296",
        "4294967301",
        "18446744073709551621",
    ] {
        let said = machine.runc(&["exec", "--user", user, "c", "/bin/id", "-u"]);
        assert!(said.code == 255 && said.out.is_empty(), "{user:?}: {said:?}");
    }
    assert_eq!(machine.runc(&["exec", "--user", "5:6", "c", "/bin/id", "-u"]).ok(), "5\n");
    for (name, uid) in [
        ("max", json!(4_294_967_295u32)),
        ("over", json!(4_294_967_296u64)),
        ("text", json!("0")),
        ("less", json!(-1)),
        ("part", json!(0.5)),
    ] {
        let bundle = machine.bundle(name, &["/bin/id", "-u"]);
        bundle.edit(|config| config["process"]["user"]["uid"] = uid);
        let said = machine.run(&bundle, name);
        assert!(
            said.code == 1 && said.out.is_empty() && said.err.contains("/process/user"),
            "{name}: {said:?}"
        );
    }
}

/// With the bug (Incus 2026-33945 and its kind): a name leads out of the directory that things of this name are kept in.
#[test]
fn cve_2026_33945_a_name_is_no_path() {
    let machine = Machine::start();
    let bundle = machine.bundle("b", &["/bin/true"]);
    let made = || {
        let entries = fs::read_dir(machine.path("")).unwrap().flatten().map(|entry| entry.file_name());
        entries.filter(|name| !name.to_string_lossy().starts_with("later-") && name != "root").count()
    };
    let before = made();
    let dir = bundle.dir.display().to_string();
    let long = "x".repeat(2000);
    for id in ["..", ".", "", "a/b", "../x", "/x", "a\nb", "a b", "ü", long.as_str(), "a\\b", "$(x)"] {
        for call in [
            &["create", "--bundle", &dir, "--", id][..],
            &["delete", "--force", "--", id],
            &["state", "--", id],
            &["kill", "--", id],
        ] {
            let said = machine.later(call).within(LONG).expect("it hangs");
            // An id that may be one and is not there: a forced delete has nothing to do.
            assert!(said.code != 0 || call[0] == "delete", "{call:?}: {said:?}");
            assert!(!said.err.contains("panicked"), "{call:?}: {said:?}");
        }
    }
    assert_eq!(fs::read_dir(machine.path("root")).map_or(0, Iterator::count), 0);
    assert_eq!(made(), before);
}

/// With the bug (containerd's CVE-2021-41103, 2024-25621): users of the host read a container's environment, or enter its
/// files.
#[test]
fn cve_2021_41103_what_is_kept_of_a_container_is_for_root_alone() {
    let machine = Machine::start();
    let bundle = machine.bundle("b", &["/bin/sleep", "1000"]);
    bundle.edit(|config| config["process"]["env"] = json!(["PATH=/bin", "TOKEN=of-the-container"]));
    let _running = machine.run_detached(&bundle, "c");
    for dir in ["root/c", "data/records", "run"] {
        for entry in fs::read_dir(machine.path(dir)).unwrap().flatten() {
            let (path, facts) = (entry.path(), entry.metadata().unwrap());
            let as_a_user = Command::new("setpriv")
                .args(["--reuid=65534", "--regid=65534", "--clear-groups", "cat"])
                .arg(&path)
                .output();
            let out = as_a_user.expect("need: setpriv (util-linux)");
            assert!(
                !facts.is_file() || out.stdout.is_empty(),
                "{}: a user of the host reads it",
                path.display()
            );
        }
    }
}

/// With the bug: what a container froze of itself is taken for a pause from outside, or stands in the way of one.
#[test]
fn a_container_that_freezes_a_part_of_itself_is_not_paused() {
    let machine = Machine::start();
    let (_bundle, running) = sleeper(&machine, "c");
    let script = "d=/sys/fs/cgroup/freezer; f=freezer.state; v=FROZEN; [ -d $d ] || { d=/sys/fs/cgroup; f=cgroup.freeze; v=1; }; \
                  mkdir $d/own; sleep 1000 >/dev/null 2>&1 & p=$!; \
                  while [ $(/bin/busybox readlink /proc/$p/fd/2) != /dev/null ]; do :; done; echo $p >$d/own/cgroup.procs && echo $v >$d/own/$f";
    running.exec(script).ok();
    assert_eq!(machine.state("c")["status"], "running");
    assert!(machine.runc(&["resume", "c"]).fails().contains("not paused"));
    for (call, status) in [("pause", "paused"), ("resume", "running"), ("pause", "paused")] {
        machine.later(&[call, "c"]).within(LONG).expect("it hangs").ok();
        assert_eq!(machine.state("c")["status"], status);
    }
    machine.later(&["delete", "--force", "c"]).within(LONG).expect("it hangs").ok();
    assert_eq!(machine.remains("c"), Vec::<String>::new());
}
