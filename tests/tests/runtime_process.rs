//! The processes of a container by sysbox-runc alone: init and exec, their streams, codes, namespaces and limits.

#![allow(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

use std::fs;
use std::process::Command;

use serde_json::json;
use sysbox_tests::runtime::{Bundle, Machine};

/// Far above what any machine needs.
const LONG: std::time::Duration = std::time::Duration::from_secs(60);

fn sleeper(machine: &Machine, name: &str) -> Bundle {
    machine.bundle(name, &["/bin/sleep", "1000"])
}

#[test]
fn exit_codes_are_handed_on() {
    let machine = Machine::start();
    let bundle = machine.bundle("b", &["/bin/sh", "-c", "exit 7"]);
    assert_eq!(machine.run(&bundle, "c").code, 7);
    let bundle = machine.bundle("k", &["/bin/sh", "-c", "kill -9 $$; sleep 10"]);
    // The kernel drops signals that a pid namespace's init sends itself; from a child's view it is the same.
    bundle.edit(|config| config["process"]["args"] = json!(["/bin/sh", "-c", "sh -c 'kill -9 $$'; exit $?"]));
    assert_eq!(machine.run(&bundle, "k").code, 137);
    let bundle = sleeper(&machine, "s");
    let running = machine.run_detached(&bundle, "s");
    assert_eq!(running.exec("exit 9").code, 9);
}

#[test]
fn an_exec_is_in_the_same_namespaces_cgroups_and_filter() {
    let machine = Machine::start();
    let bundle = sleeper(&machine, "b");
    bundle.edit(|config| {
        let rule = json!({"names": ["mkdirat", "mkdir"], "action": "SCMP_ACT_ERRNO", "errnoRet": 95});
        config["linux"]["seccomp"] = json!({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [rule]});
    });
    let running = machine.run_detached(&bundle, "c");
    for namespace in ["user", "mnt", "pid", "net", "ipc", "uts", "cgroup", "time"] {
        let script = format!(
            "[ $(stat -c %N /proc/self/ns/{namespace} | cut -d' ' -f3) = $(stat -c %N /proc/1/ns/{namespace} | cut -d' ' -f3) ] && echo same"
        );
        let link = |pid: &str| {
            running
                .exec(&format!("ls -l /proc/{pid}/ns/{namespace}"))
                .ok()
                .rsplit("-> ")
                .next()
                .map(str::to_owned)
        };
        assert_eq!(link("self"), link("1"), "{namespace}: {script}");
    }
    assert_eq!(running.exec("cat /proc/self/cgroup").ok(), running.exec("cat /proc/1/cgroup").ok());
    let status = running.exec("cat /proc/self/status").ok();
    assert!(status.contains("Seccomp:\t2") && status.contains("CapInh:\t0000000000000000"), "{status}");
    assert!(running.exec("mkdir /x").err.contains("not supported"), "{:?}", running.exec("mkdir /x"));
    let said = machine.runc(&["exec", "--user", "1000:1000", "c", "/bin/cat", "/proc/self/status"]).ok();
    for line in [
        "CapEff:\t0000000000000000",
        "CapPrm:\t0000000000000000",
        "CapAmb:\t0000000000000000",
        "Uid:\t1000\t1000",
    ] {
        assert!(said.contains(line), "{said}");
    }
}

#[test]
fn an_exec_takes_directory_environment_and_user() {
    let machine = Machine::start();
    let bundle = sleeper(&machine, "b");
    fs::create_dir(bundle.rootfs().join("home")).unwrap();
    let running = machine.run_detached(&bundle, "c");
    let said = machine.runc(&[
        "exec",
        "--cwd",
        "/home",
        "--env",
        "X=y z",
        "c",
        "/bin/sh",
        "-c",
        "pwd; echo $X; echo $HOME",
    ]);
    assert_eq!(said.ok(), "/home\ny z\n/\n");
    assert!(machine.runc(&["exec", "c", "nope"]).fails().contains("executable file not found in $PATH"));
    assert!(machine.runc(&["exec", "--user", "70000", "c", "/bin/true"]).fails().contains("is not mapped"));
    for fd in 0..32 {
        // CVE-2024-21626: a directory of the host's through a descriptor that was left open.
        let cwd = format!("/proc/self/fd/{fd}");
        let said = machine.runc(&["exec", "--cwd", &cwd, "c", "/bin/ls", "/proc/self/cwd/../../.."]);
        assert!(said.code != 0 || !said.out.contains("vmlinuz"), "{fd}: {}", said.out);
    }
    drop(running);
}

#[test]
fn standard_output_can_be_opened_again() {
    let machine = Machine::start();
    for user in [0, 1000] {
        let id = format!("u{user}");
        let bundle = machine.bundle(&id, &["/bin/sh", "-c", "echo again > /dev/stdout"]);
        bundle.edit(|config| config["process"]["user"] = json!({"uid": user, "gid": user}));
        assert_eq!(machine.run(&bundle, &id).ok(), "again\n");
    }
}

#[test]
fn init_holds_no_descriptor_of_ours() {
    let machine = Machine::start();
    let bundle = sleeper(&machine, "b");
    let running = machine.run_detached(&bundle, "c");
    let fds: Vec<String> = fs::read_dir(format!("/proc/{}/fd", running.pid()))
        .unwrap()
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .collect();
    assert_eq!(fds.len(), 3, "{fds:?}");
}

#[test]
fn time_begins_with_the_container() {
    let machine = Machine::start();
    let bundle = machine.bundle("b", &["/bin/cat", "/proc/uptime"]);
    let out = machine.run(&bundle, "c").ok();
    let uptime: f64 = out.split_whitespace().next().unwrap().parse().unwrap();
    assert!((0.0..30.0).contains(&uptime), "{uptime}");
}

#[test]
fn the_spec_that_is_written_runs_with_a_terminal() {
    let machine = Machine::start();
    let bundle = machine.bundle("b", &["/bin/sh", "-c", "test -t 0 && test -t 1 && echo a terminal"]);
    bundle.edit(|config| config["process"]["terminal"] = json!(true));
    let command = format!(
        "{} --root {} --run-dir {} run --bundle {} c",
        sysbox_tests::runtime::programs().join("sysbox-runc").display(),
        machine.path("root").display(),
        machine.path("run").display(),
        bundle.dir.display()
    );
    let script = Command::new("script")
        .args(["-qec", &command, "/dev/null"])
        .output()
        .expect("need: script (util-linux)");
    let text = String::from_utf8_lossy(&script.stdout);
    assert!(text.contains("a terminal"), "{text}");
}

#[test]
fn a_passwd_that_is_a_pipe_holds_no_exec() {
    let machine = Machine::start();
    let bundle = sleeper(&machine, "b");
    let running = machine.run_detached(&bundle, "c");
    running.exec("mkdir -p /etc && /bin/busybox mkfifo /etc/passwd").ok();
    assert_eq!(running.exec("echo $HOME").ok(), "/\n");
}

/// Nothing of ours runs under the container's filter but its exec; what it takes to get there may be denied.
#[test]
fn a_filter_may_deny_what_the_runtime_itself_has_called() {
    let machine = Machine::start();
    let filtered = |name: &str| {
        let bundle = machine.bundle(name, &["/bin/cat", "/proc/self/status"]);
        bundle.edit(|config| {
            let calls =
                ["capset", "capget", "prctl", "seccomp", "setgroups", "keyctl", "chdir", "getcwd", "umask"];
            let rule = json!({"names": calls, "action": "SCMP_ACT_ERRNO", "errnoRet": 95});
            config["linux"]["seccomp"] = json!({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [rule]});
        });
        bundle
    };
    let caps = |status: &str, set: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(set).map(str::trim).map(str::to_owned));
        u64::from_str_radix(&line.unwrap(), 16).unwrap()
    };
    for (name, uid, gain) in [("root", 0, true), ("user", 1000, false), ("stuck", 1000, true)] {
        let bundle = filtered(name);
        bundle.edit(|config| {
            config["process"]["user"] = json!({"uid": uid, "gid": uid});
            config["process"]["noNewPrivileges"] = json!(!gain);
        });
        let status = machine.run(&bundle, name).ok();
        assert_eq!(caps(&status, "CapEff:") != 0, uid == 0, "{status}");
        assert_eq!(caps(&status, "CapPrm:") != 0, uid == 0, "{status}");
        assert_eq!((caps(&status, "CapInh:"), caps(&status, "CapAmb:")), (0, 0), "{status}");
        assert!(status.contains("Seccomp:\t2"), "{status}");
    }
    let bundle = filtered("exec");
    bundle.edit(|config| config["process"]["args"] = json!(["/bin/sleep", "1000"]));
    let running = machine.run_detached(&bundle, "exec");
    let said = machine.runc(&["exec", "--user", "7:7", "exec", "/bin/cat", "/proc/self/status"]).ok();
    assert_eq!((caps(&said, "CapEff:"), caps(&said, "CapPrm:")), (0, 0), "{said}");
    drop(running);
}

#[test]
fn poststop_hooks_run_once_however_often_a_delete_is_repeated() {
    let mut machine = Machine::start();
    let bundle = sleeper(&machine, "b");
    let told = machine.path("told");
    bundle.edit(|config| {
        let args = json!(["sh", "-c", format!("cat > /dev/null; echo x >> {}", told.display())]);
        config["hooks"] = json!({"poststop": [{"path": "/bin/sh", "args": args}]});
    });
    let dir = bundle.dir.display().to_string();
    machine.later(&["run", "--detach", "--bundle", &dir, "c"]).within(LONG).unwrap().ok();
    machine.kill_mgr();
    assert!(machine.runc(&["delete", "--force", "c"]).fails().contains("sysbox-mgr is not running"));
    assert!(machine.runc(&["delete", "--force", "c"]).fails().contains("sysbox-mgr is not running"));
    machine.start_mgr();
    machine.runc(&["delete", "--force", "c"]).ok();
    assert_eq!(fs::read_to_string(&told).unwrap(), "x\n");
    assert!(machine.remains("c").is_empty(), "{:?}", machine.remains("c"));
}

#[test]
fn a_mount_that_fails_is_told_with_place_type_and_reason() {
    let machine = Machine::start();
    for (name, mount, expected) in [
        (
            "type",
            json!({"destination": "/x", "type": "nosuchfs", "source": "none"}),
            &["mount nosuchfs on /x", "ENODEV"][..],
        ),
        (
            "option",
            json!({"destination": "/x", "type": "tmpfs", "source": "tmpfs", "options": ["size=nonsense"]}),
            &["mount tmpfs on /x", "EINVAL"],
        ),
        (
            "refused",
            json!({"destination": "/x", "type": "ext4", "source": "/dev/loop0"}),
            &["mount ext4 on /x", "("],
        ),
        (
            "below",
            json!({"destination": "/bin/busybox/x", "type": "tmpfs", "source": "tmpfs"}),
            &["/bin/busybox/x", "Not a directory"],
        ),
        (
            "late",
            json!({"destination": "/sys/kernel/notes/x", "type": "tmpfs", "source": "tmpfs"}),
            &["mount tmpfs on /sys/kernel/notes/x", "ENOTDIR"],
        ),
    ] {
        let bundle = machine.bundle(name, &["/bin/true"]);
        bundle.edit(|config| config["mounts"].as_array_mut().unwrap().push(mount.clone()));
        let log = machine.path("log.json");
        let call = machine
            .command()
            .arg("--log")
            .arg(&log)
            .args(["--log-format", "json", "run", "-b"])
            .arg(&bundle.dir)
            .arg(name)
            .output();
        let text = String::from_utf8_lossy(&call.unwrap().stderr).into_owned();
        let record = fs::read_to_string(&log).unwrap().lines().last().unwrap().to_owned();
        for word in expected {
            assert!(text.contains(word) && record.contains(word), "{name}: {word}: {text}{record}");
        }
        assert_eq!(text.trim_end().lines().count(), 1, "{text}");
        assert!(machine.remains(name).is_empty(), "{name}");
    }
}
