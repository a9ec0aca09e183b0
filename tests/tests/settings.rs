//! Sysbox's own settings, by sysbox-runc alone: variables of the environment and flags of sysbox-mgr.

#![allow(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

use std::fs;
use std::process::Command;

use serde_json::json;
use sysbox_tests::runtime::{Bundle, Machine, programs};

/// Of a `status` file of /proc.
fn field<'a>(status: &'a str, name: &str) -> &'a str {
    status.lines().find_map(|line| line.strip_prefix(name)).unwrap().trim_start_matches(':').trim()
}

fn set_env(bundle: &Bundle, pairs: &[&str]) {
    bundle.edit(|config| {
        let env = config["process"]["env"].as_array_mut().unwrap();
        env.extend(pairs.iter().map(|pair| json!(pair)));
    });
}

fn set_capabilities(bundle: &Bundle) {
    let some = json!(["CAP_CHOWN", "CAP_KILL", "CAP_NET_BIND_SERVICE"]);
    bundle.edit(|config| {
        config["process"]["capabilities"] = json!({
            "bounding": some, "permitted": some, "effective": some,
            "inheritable": ["CAP_KILL"], "ambient": ["CAP_KILL"],
        });
    });
}

/// CAP_CHOWN, CAP_KILL, CAP_NET_BIND_SERVICE of linux/capability.h.
const SOME: &str = "0000000000000421";
const KILL: &str = "0000000000000020";

#[test]
fn an_unknown_variable_or_value_is_refused_before_anything_is_made() {
    let machine = Machine::start();
    for (at, (pair, why)) in [
        ("SYSBOX_ENV=1", "invalid env var SYSBOX_ENV; must be one of "),
        ("SYSBOX_HONOR_CAPS=yes", "env var SYSBOX_HONOR_CAPS has invalid value yes; expect [TRUE|FALSE]"),
        ("SYSBOX_HONOR_CAPS=TRUE=", "env var SYSBOX_HONOR_CAPS=TRUE= has incorrect format"),
        ("SYSBOX_SKIP_UID_SHIFT=x", "env var SYSBOX_SKIP_UID_SHIFT has invalid value x"),
        ("SYSBOX_IGNORE_SYSFS_CHOWN=TRUE", "a chown on /sys is not intercepted"),
    ]
    .iter()
    .enumerate()
    {
        let id = format!("bad{at}");
        let bundle = machine.bundle(&id, &["/bin/true"]);
        set_env(&bundle, &[pair]);
        let before = bundle.inventory();
        let said = machine.run(&bundle, &id).fails();
        assert!(said.contains(why), "{pair}: {said}");
        assert_eq!(machine.remains(&id), Vec::<String>::new());
        assert_eq!(bundle.inventory(), before);
    }
    let bundle = machine.bundle("fine", &["/bin/true"]);
    set_env(&bundle, &["SYSBOX_IGNORE_SYSFS_CHOWN=FALSE", "SYSBOX_ALLOW_TRUSTED_XATTR=TRUE"]);
    let said = machine.run(&bundle, "fine");
    assert!(
        said.err.contains("SYSBOX_ALLOW_TRUSTED_XATTR: trusted.* attributes stay the host's"),
        "{said:?}"
    );
    assert_eq!(said.code, 0);
}

#[test]
fn honor_caps_gives_the_capabilities_of_the_spec_and_no_more() {
    let machine = Machine::start();
    for (uid, permitted, after_exec) in [(0, SOME, SOME), (1000, SOME, KILL)] {
        let id = format!("u{uid}");
        let bundle = machine.bundle(&id, &["/bin/cat", "/proc/self/status"]);
        set_capabilities(&bundle);
        bundle.edit(|config| config["process"]["user"] = json!({"uid": uid, "gid": uid}));
        set_env(&bundle, &["SYSBOX_HONOR_CAPS=TRUE"]);
        let status = machine.run(&bundle, &id).ok();
        assert_eq!(field(&status, "CapBnd"), permitted, "{uid}");
        assert_eq!(field(&status, "CapEff"), after_exec, "{uid}");
        assert_eq!(field(&status, "CapPrm"), after_exec, "{uid}");
        assert_eq!((field(&status, "CapInh"), field(&status, "CapAmb")), (KILL, KILL), "{uid}");
    }
}

#[test]
fn honor_caps_needs_no_capability_for_the_filter_to_be_loaded() {
    let machine = Machine::start();
    for uid in [0, 1000] {
        let id = format!("u{uid}");
        let bundle = machine.bundle(&id, &["/bin/cat", "/proc/self/status"]);
        set_capabilities(&bundle);
        set_env(&bundle, &["SYSBOX_HONOR_CAPS=TRUE"]);
        bundle.edit(|config| {
            config["process"]["user"] = json!({"uid": uid, "gid": uid});
            config["process"]["noNewPrivileges"] = json!(false);
            let rule = json!({"names": ["swapon"], "action": "SCMP_ACT_ERRNO"});
            config["linux"]["seccomp"] = json!({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [rule]});
        });
        let status = machine.run(&bundle, &id).ok();
        assert_eq!((field(&status, "Seccomp"), field(&status, "CapBnd")), ("2", SOME), "{status}");
        assert_eq!(field(&status, "CapEff"), if uid == 0 { SOME } else { KILL });
    }
}

#[test]
fn an_exec_follows_its_own_environment_and_does_not_keep_the_variables() {
    let machine = Machine::start();
    let bundle = machine.bundle("b", &["/bin/sleep", "1000"]);
    set_capabilities(&bundle);
    set_env(&bundle, &["SYSBOX_SYSCONT_MODE=TRUE"]);
    let running = machine.run_detached(&bundle, "c");
    let all = field(&running.exec("cat /proc/self/status").ok(), "CapEff").to_owned();
    assert_ne!(all, SOME);
    let honored =
        machine.runc(&["exec", "--env", "SYSBOX_HONOR_CAPS=TRUE", "c", "/bin/cat", "/proc/self/status"]).ok();
    assert_eq!(field(&honored, "CapEff"), SOME);
    let environment = machine.runc(&[
        "exec",
        "--env",
        "SYSBOX_HONOR_CAPS=TRUE",
        "--env",
        "A=b",
        "c",
        "/bin/cat",
        "/proc/self/environ",
    ]);
    let environment = environment.ok();
    assert!(environment.contains("A=b") && !environment.contains("SYSBOX_"), "{environment:?}");
    let said = machine.runc(&["exec", "--env", "SYSBOX_X=1", "c", "/bin/true"]).fails();
    assert!(said.contains("invalid env var SYSBOX_X"), "{said}");
}

#[test]
fn an_ordinary_container_has_a_user_namespace_and_nothing_of_a_machine() {
    let machine = Machine::start();
    let bundle = machine.bundle("b", &["/bin/sleep", "1000"]);
    set_capabilities(&bundle);
    set_env(&bundle, &["SYSBOX_SYSCONT_MODE=FALSE"]);
    bundle.edit(|config| {
        config["linux"]["maskedPaths"] = json!(["/proc/kallsyms"]);
        config["linux"]["readonlyPaths"] = json!(["/proc/sys"]);
        for mount in config["mounts"].as_array_mut().unwrap() {
            if mount["destination"] == "/sys" {
                mount["options"] = json!(["nosuid", "noexec", "nodev", "ro"]);
            }
        }
    });
    let running = machine.run_detached(&bundle, "c");
    assert_eq!(field(&running.exec("cat /proc/1/status").ok(), "CapEff"), SOME);
    assert_ne!(running.exec("cat /proc/self/uid_map").ok().split_whitespace().nth(1), Some("0"));
    let mounts = running.exec("cat /proc/mounts").ok();
    let options = |point: &str| {
        let line = mounts.lines().rev().find(|line| line.split(' ').nth(1) == Some(point));
        line.and_then(|line| line.split(' ').nth(3)).map(str::to_owned)
    };
    assert!(options("/sys").unwrap().starts_with("ro"), "{mounts}");
    assert!(options("/proc/sys").unwrap().starts_with("ro"), "{mounts}");
    assert!(options("/proc/kallsyms").is_some(), "{mounts}");
    assert_eq!(options("/dev/.lxc/proc"), None);
    let there = running.exec("ls /dev").ok();
    assert!(!there.contains("fuse") && !there.contains(".lxc"), "{there}");
    // The same bundle as a machine has all of it otherwise.
    let bundle = machine.bundle("m", &["/bin/sleep", "1000"]);
    let running = machine.run_detached(&bundle, "m");
    let mounts = running.exec("cat /proc/mounts").ok();
    assert!(mounts.contains(" /dev/.lxc/proc ") && !mounts.contains(" /proc/kallsyms "), "{mounts}");
}

#[test]
fn the_managers_flags_hold_for_all_that_do_not_say_otherwise() {
    let machine = Machine::start_with(&["--honor-caps", "--disable-shiftfs"]);
    for (id, pair, expected) in [("all", "A=b", true), ("own", "SYSBOX_HONOR_CAPS=FALSE", false)] {
        let bundle = machine.bundle(id, &["/bin/cat", "/proc/self/status"]);
        set_capabilities(&bundle);
        set_env(&bundle, &[pair]);
        let status = machine.run(&bundle, id).ok();
        assert_eq!(field(&status, "CapEff") == SOME, expected, "{status}");
    }
    let log = fs::read_to_string(machine.path("mgr.log")).unwrap();
    assert!(log.contains("shiftfs is never used") && log.contains("--honor-caps=true"), "{log}");
    let refused = Command::new(programs().join("sysbox-mgr")).arg("--ignore-sysfs-chown").output().unwrap();
    let text = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(!refused.status.success() && text.contains("a chown on /sys is not intercepted"), "{text}");
}

#[test]
fn a_read_only_container_has_writable_places_and_a_read_only_kernel() {
    let probe = "touch /run/x && touch /tmp/x && echo rw; touch /x 2>/dev/null || echo frozen; \
                 echo 1 > /proc/sys/net/ipv4/ip_forward && echo sysctl; \
                 mount -o remount,ro,bind /run && echo mine; cat /proc/mounts";
    let run = |flags: &[&str]| {
        let machine = Machine::start_with(flags);
        let bundle = machine.bundle("b", &["/bin/sh", "-c", probe]);
        bundle.edit(|config| config["root"]["readonly"] = json!(true));
        machine.run(&bundle, "c").ok()
    };
    let sys = |said: &str| {
        let line = said.lines().find(|line| line.split(' ').nth(1) == Some("/sys")).unwrap().to_owned();
        line.split(' ').nth(3).unwrap().split(',').next().unwrap().to_owned()
    };
    let strict = run(&[]);
    assert!(strict.starts_with("rw\nfrozen\nmine\n"), "{strict}");
    assert_eq!(sys(&strict), "ro");
    let relaxed = run(&["--relaxed-read-only"]);
    assert!(relaxed.starts_with("rw\nfrozen\nsysctl\nmine\n"), "{relaxed}");
    assert_eq!(sys(&relaxed), "rw");
}

#[test]
fn a_bind_that_is_not_to_be_shifted_is_not() {
    let machine = Machine::start();
    let (one, two) = (machine.path("one"), machine.path("two"));
    for dir in [&one, &two] {
        fs::create_dir(dir).unwrap();
    }
    let bundle = machine.bundle("b", &["/bin/stat", "-c", "%u", "/one", "/two"]);
    bundle.mount("/one", &one, &["rbind"]);
    bundle.mount("/two", &two, &["rbind"]);
    set_env(&bundle, &["SYSBOX_SKIP_UID_SHIFT=/two,/three"]);
    assert_eq!(machine.run(&bundle, "c").ok(), "0\n65534\n");
}

#[test]
fn fail_on_error_refuses_what_cannot_be_shifted() {
    // /proc/PID/… of the host cannot; a directory can.
    let machine = Machine::start_with(&["--fsuid-map-fail-on-error"]);
    let fuse = machine.path("fs");
    let fine = machine.path("fine");
    fs::create_dir(&fine).unwrap();
    let bundle = machine.bundle("good", &["/bin/true"]);
    bundle.mount("/x", &fine, &["rbind"]);
    machine.run(&bundle, "good").ok();
    let bundle = machine.bundle("bad", &["/bin/true"]);
    bundle.mount("/x", &fuse, &["bind"]);
    let said = machine.run(&bundle, "bad").fails();
    assert!(said.contains("its file system cannot shift ids"), "{said}");
    assert_eq!(machine.remains("bad"), Vec::<String>::new());
    let lenient = Machine::start();
    let bundle = lenient.bundle("b", &["/bin/true"]);
    bundle.mount("/x", &lenient.path("fs"), &["bind"]);
    let said = lenient.run(&bundle, "c");
    assert!(said.code == 0 && said.err.contains("its files will belong to nobody inside"), "{said:?}");
}
