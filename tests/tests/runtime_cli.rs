//! What sysbox-runc says: of what it does (`--debug`), and of what it can (`features`), each claim tried.

#![allow(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use nix::mount::{MntFlags, MsFlags};
use serde_json::{Value, json};
use sysbox_tests::runtime::{Bundle, Machine};

// ---- --debug ----

fn records(log: &Path) -> Vec<Value> {
    let text = fs::read_to_string(log).unwrap_or_default();
    text.lines().map(|line| serde_json::from_str(line).unwrap_or_else(|_| panic!("{line}"))).collect()
}

const STEPS: [&str; 6] = [
    "the bundle is read",
    "ids are granted",
    "planned",
    "root file system and mounts are staged",
    "init waits for the start",
    "started",
];

#[test]
fn debug_tells_in_the_log_what_is_done() {
    let machine = Machine::start();
    let bundle = machine.bundle("b", &["/bin/sh", "-c", "echo out"]);
    bundle.edit(|config| config["process"]["env"] = json!(["PATH=/bin", "SECRET=of-the-user"]));
    let dir = bundle.dir.display().to_string();
    let log = machine.path("log.json");
    let with = |options: &[&str], verb: &[&str]| {
        machine.runc(&[&["--log", log.to_str().unwrap(), "--log-format", "json"], options, verb].concat())
    };
    let run = ["run", "--bundle", &dir, "c"];
    assert_eq!(with(&[], &run).ok(), "out\n");
    assert!(records(&log).is_empty(), "{:?}", records(&log));

    let said = with(&["--debug"], &run);
    assert_eq!((said.code, said.out.as_str(), said.err.as_str()), (0, "out\n", ""));
    let told = records(&log);
    assert!(told.iter().all(|record| record["level"] == "debug"), "{told:#?}");
    assert!(told.iter().all(|record| record["time"].as_str().is_some_and(|time| time.ends_with('Z'))));
    let steps: Vec<&str> =
        told.iter().filter_map(|record| record["msg"].as_str()).filter(|msg| STEPS.contains(msg)).collect();
    assert_eq!(steps, STEPS, "{told:#?}");
    let granted = told.iter().find(|record| record["msg"] == "ids are granted").unwrap();
    assert!(granted["root_uid"].as_str().unwrap().parse::<u32>().unwrap() > 0, "{granted}");
    // No value of an environment, whoever writes the records.
    assert!(!fs::read_to_string(&log).unwrap().contains("of-the-user"));

    // Of a failure the engine finds what went wrong where it looks: in the last record of level `error`.
    bundle.edit(|config| config["process"]["args"] = json!(["/no/such"]));
    let said = with(&["--debug"], &run).fails();
    let told = records(&log);
    let errors: Vec<&Value> = told.iter().filter(|record| record["level"] == "error").collect();
    assert_eq!(errors.len(), 1, "{told:#?}");
    assert_eq!(errors[0]["msg"].as_str(), Some(said.trim_end()));
}

#[test]
fn debug_without_a_log_goes_to_standard_error_as_runcs() {
    let machine = Machine::start();
    let bundle = machine.bundle("b", &["/bin/sh", "-c", "echo out"]);
    let said = machine.runc(&["--debug", "run", "--bundle", &bundle.dir.display().to_string(), "c"]);
    assert_eq!((said.code, said.out.as_str()), (0, "out\n"));
    for line in said.err.lines() {
        assert!(line.starts_with("time=\"20") && line.contains("Z\" level=debug msg="), "{line}");
    }
    for step in STEPS {
        let word = if step.contains(' ') { format!("\"{step}\"") } else { (*step).to_owned() };
        assert!(
            said.err.contains(&format!("msg={word} ")) || said.err.contains(&format!("msg={word}\n")),
            "{step}: {}",
            said.err
        );
    }
    assert_eq!(machine.run(&bundle, "d").err, "");
}

// ---- features ----

fn features(machine: &Machine) -> Value {
    serde_json::from_str(&machine.runc(&["features"]).ok()).unwrap()
}

fn names(claim: &Value) -> Vec<&str> {
    claim.as_array().unwrap_or_else(|| panic!("{claim}")).iter().map(|name| name.as_str().unwrap()).collect()
}

/// Runs a shell script in a container whose config was changed.
fn script(
    machine: &Machine,
    id: &str,
    script: &str,
    change: impl FnOnce(&mut Value),
) -> sysbox_tests::runtime::Said {
    let bundle = machine.bundle(id, &["/bin/sh", "-c", script]);
    bundle.edit(change);
    machine.run(&bundle, id)
}

#[test]
fn features_versions_are_accepted_and_others_are_not() {
    let machine = Machine::start();
    let claims = features(&machine);
    for (version, accepted) in
        [(&claims["ociVersionMin"], true), (&claims["ociVersionMax"], true), (&json!("2.0.0"), false)]
    {
        let id = format!("v{}", version.as_str().unwrap().replace('.', "-"));
        let said = script(&machine, &id, "true", |config| config["ociVersion"] = version.clone());
        assert_eq!(said.code == 0, accepted, "{version}: {}", said.err);
    }
}

#[test]
fn features_namespaces_are_the_containers_own() {
    let machine = Machine::start();
    let claims = features(&machine);
    let claimed = names(&claims["linux"]["namespaces"]);
    let bundle = machine.bundle("b", &["/bin/sleep", "1000"]);
    let running = machine.run_detached(&bundle, "c");
    let link = |pid: &str, name: &str| fs::read_link(format!("/proc/{pid}/ns/{name}")).unwrap();
    let mut of_kernel: Vec<String> = sysbox_tests::host::names_in(Path::new("/proc/self/ns"));
    of_kernel.retain(|name| !name.ends_with("_for_children"));
    let file = |name: &str| match name {
        "network" => "net".to_owned(),
        "mount" => "mnt".to_owned(),
        other => other.to_owned(),
    };
    for name in &claimed {
        assert_ne!(link(&running.pid().to_string(), &file(name)), link("self", &file(name)), "{name}");
    }
    let mut claimed: Vec<String> = claimed.into_iter().map(file).collect();
    claimed.sort();
    assert_eq!(claimed, of_kernel);
}

#[test]
fn features_hooks_are_run_in_the_order_of_the_specification() {
    let machine = Machine::start();
    let claims = features(&machine);
    let bundle = machine.bundle("b", &["/bin/true"]);
    let order = machine.path("order");
    fs::write(&order, "").unwrap();
    // createContainer runs as the container's root, which has no rights on the host.
    fs::set_permissions(&order, fs::Permissions::from_mode(0o666)).unwrap();
    let claimed = names(&claims["hooks"]);
    bundle.edit(|config| {
        for hook in &claimed {
            // This one runs when the container's root is its root already.
            let file = if *hook == "startContainer" { Path::new("/order") } else { &order };
            let line = format!("echo {hook} >> {}", file.display());
            config["hooks"][hook] = json!([{"path": "/bin/sh", "args": ["sh", "-c", line]}]);
        }
    });
    machine.run(&bundle, "c").ok();
    let mut ran: Vec<String> = fs::read_to_string(&order).unwrap().lines().map(str::to_owned).collect();
    let inside = fs::read_to_string(bundle.rootfs().join("order")).unwrap();
    assert_eq!(inside, "startContainer\n");
    ran.insert(3, inside.trim_end().to_owned());
    assert_eq!(
        ran,
        ["prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop"]
    );
    assert_eq!(ran, claimed);
}

#[test]
fn features_capabilities_are_the_kernels_and_all_are_given() {
    let machine = Machine::start();
    let claims = features(&machine);
    let last: u32 = fs::read_to_string("/proc/sys/kernel/cap_last_cap").unwrap().trim().parse().unwrap();
    let claimed = names(&claims["linux"]["capabilities"]);
    assert_eq!(claimed.len(), usize::try_from(last).unwrap() + 1, "{claimed:?}");
    let status = script(&machine, "c", "cat /proc/self/status", |_| ()).ok();
    assert!(status.contains(&format!("CapEff:\t{:016x}", (1_u64 << (last + 1)) - 1)), "{status}");
}

#[test]
fn features_cgroups_and_security_modules_are_said_as_they_are() {
    let machine = Machine::start();
    let claims = &features(&machine)["linux"];
    // v2 and systemd, and AppArmor, are looked at by `make test-vm`.
    for (claim, expected) in [
        ("/cgroup/v1", true),
        ("/cgroup/v2", true),
        ("/cgroup/systemd", true),
        ("/cgroup/systemdUser", false),
        ("/cgroup/rdma", false),
        ("/apparmor/enabled", true),
        ("/selinux/enabled", false),
        ("/seccomp/enabled", true),
        ("/mountExtensions/idmap/enabled", true),
    ] {
        assert_eq!(claims.pointer(claim), Some(&json!(expected)), "{claim}");
    }
    let unified = Path::new("/sys/fs/cgroup/cgroup.controllers").exists();
    let of = script(&machine, "c", "cat /proc/self/cgroup", |_| ()).ok();
    assert_eq!(of.lines().count() == 1, unified, "{of}");
}

/// A rule for mkdir under each action, and what comes of it.
#[test]
fn features_seccomp_actions_do_what_they_say() {
    let machine = Machine::start();
    let claims = features(&machine);
    let killed = "159 Bad system call\n"; // 128 and SIGSYS
    let expected = [
        ("SCMP_ACT_ALLOW", "0\n"),
        ("SCMP_ACT_ERRNO", "1 Resource temporarily unavailable\n"),
        ("SCMP_ACT_KILL", killed),
        ("SCMP_ACT_KILL_PROCESS", killed),
        ("SCMP_ACT_KILL_THREAD", killed),
        ("SCMP_ACT_LOG", "0\n"),
        // Nobody traces: the kernel answers ENOSYS.
        ("SCMP_ACT_TRACE", "1 Function not implemented\n"),
        ("SCMP_ACT_TRAP", killed),
    ];
    let (notify, others): (Vec<&str>, Vec<&str>) = names(&claims["linux"]["seccomp"]["actions"])
        .into_iter()
        .partition(|name| *name == "SCMP_ACT_NOTIFY");
    assert_eq!(others, expected.map(|(action, _)| action));
    // What it does takes an agent: spec_seccomp.rs.
    assert_eq!(notify.len(), 1);
    for (action, outcome) in expected {
        let id = action.to_lowercase();
        let ask = "why=$(mkdir /x 2>&1 || echo $?); code=${why##*[!0-9]}; why=${why%$code}; why=${why##*: }; echo ${code:-0} $why";
        let said = script(&machine, &id, ask, |config| {
            let mut rule = json!({"names": ["mkdir", "mkdirat"], "action": action});
            if action == "SCMP_ACT_ERRNO" {
                rule["errnoRet"] = json!(libc_eagain());
            }
            config["linux"]["seccomp"] = json!({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [rule]});
        });
        assert_eq!(said.ok(), outcome, "{action}");
    }
    let said = script(&machine, "notify", "true", |config| {
        let rule = json!({"names": ["mkdir"], "action": "SCMP_ACT_NOTIFY"});
        config["linux"]["seccomp"] = json!({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [rule]});
    });
    assert!(said.fails().contains("SCMP_ACT_NOTIFY"), "without an agent it is refused by name");
}

fn libc_eagain() -> i32 {
    nix::errno::Errno::EAGAIN as i32
}

/// A rule for the mode that chmod sets, under each operator, and which of three modes it refuses.
#[test]
fn features_seccomp_operators_compare_as_they_say() {
    let machine = Machine::start();
    let claims = features(&machine);
    let expected = [
        ("SCMP_CMP_EQ", "600 700"),
        ("SCMP_CMP_GE", "600"),
        ("SCMP_CMP_GT", "600 640"),
        ("SCMP_CMP_LE", "700"),
        ("SCMP_CMP_LT", "640 700"),
        // 0700 are the bits that are looked at; refused is what has 0600 there.
        ("SCMP_CMP_MASKED_EQ", "700"),
        ("SCMP_CMP_NE", "640"),
    ];
    assert_eq!(names(&claims["linux"]["seccomp"]["operators"]), expected.map(|(operator, _)| operator));
    for (operator, passed) in expected {
        let id = operator.to_lowercase();
        let modes = "touch /f; for mode in 600 640 700; do busybox chmod $mode /f 2>/dev/null && echo $mode; done; true";
        let said = script(&machine, &id, modes, |config| {
            let rule = |call: &str, index: u32| {
                let (value, second) =
                    if operator == "SCMP_CMP_MASKED_EQ" { (0o700, 0o600) } else { (0o640, 0) };
                let condition = json!({"index": index, "op": operator, "value": value, "valueTwo": second});
                json!({"names": [call], "action": "SCMP_ACT_ERRNO", "args": [condition]})
            };
            let rules = json!([rule("chmod", 1), rule("fchmodat", 2), rule("fchmodat2", 2)]);
            config["linux"]["seccomp"] = json!({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": rules});
        });
        let out = said.ok();
        assert_eq!(out.split_whitespace().collect::<Vec<_>>().join(" "), passed, "{operator}");
    }
}

#[test]
fn features_seccomp_flags_and_architectures_are_accepted_and_others_are_not() {
    let machine = Machine::start();
    let claims = features(&machine);
    let seccomp = &claims["linux"]["seccomp"];
    let profile = |key: &str, names: Vec<&str>| {
        let mut profile = json!({"defaultAction": "SCMP_ACT_ALLOW",
            "syscalls": [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO"}]});
        profile[key] = json!(names);
        profile
    };
    let filtered = "cat /proc/self/status; mkdir /x && echo made";
    let flags = names(&seccomp["supportedFlags"]);
    assert_eq!(seccomp["knownFlags"], seccomp["supportedFlags"]);
    let each = flags.iter().map(|flag| ("flags", vec![*flag]));
    let all = [("flags", flags.clone()), ("architectures", names(&seccomp["archs"]))];
    for (at, (key, values)) in each.chain(all).enumerate() {
        let said = script(&machine, &format!("c{at}"), filtered, |config| {
            config["linux"]["seccomp"] = profile(key, values.clone());
        });
        assert!(said.out.contains("Seccomp:\t2") && !said.out.contains("made"), "{values:?}: {said:?}");
    }
    let said = script(&machine, "other", "true", |config| {
        config["linux"]["seccomp"] = profile("flags", vec!["SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV"]);
    });
    let text = said.fails();
    assert!(text.contains("/linux/seccomp") && text.contains("WAIT_KILLABLE_RECV"), "{text}");
}

/// A source with a mount below it, which goes with this.
struct Tree {
    path: PathBuf,
}

impl Tree {
    fn new(machine: &Machine) -> Self {
        let path = machine.path("source");
        fs::create_dir_all(path.join("sub")).unwrap();
        fs::write(path.join("file"), "").unwrap();
        nix::mount::mount(Some("tmpfs"), &path.join("sub"), Some("tmpfs"), MsFlags::empty(), None::<&str>)
            .unwrap();
        Self { path }
    }
}

impl Drop for Tree {
    fn drop(&mut self) {
        // A directory with a mount in it must not be deleted: the machine's would be, after this.
        nix::mount::umount2(&self.path.join("sub"), MntFlags::MNT_DETACH).unwrap();
    }
}

/// Each option with what undoes it, and the flags of the mount and of the one below it that come of that.
#[test]
fn features_mount_options_do_what_they_say() {
    let machine = Machine::start();
    let tree = Tree::new(&machine);
    let claims = features(&machine);
    let expected: [(&str, &[&str], &str, &str); 16] = [
        ("bind", &["bind"], "rw", "none"),
        ("dev", &["bind", "nodev", "dev"], "!nodev", "none"),
        ("exec", &["bind", "noexec", "exec"], "!noexec", "none"),
        ("idmap", &["bind", "idmap"], "rw", "none"),
        ("nodev", &["rbind", "nodev"], "nodev", "!nodev"),
        ("noexec", &["rbind", "noexec"], "noexec", "!noexec"),
        ("nosuid", &["rbind", "nosuid"], "nosuid", "!nosuid"),
        ("rbind", &["rbind"], "rw", "rw"),
        ("ridmap", &["rbind", "ridmap"], "rw", "rw"),
        ("rnodev", &["rbind", "rnodev"], "nodev", "nodev"),
        ("rnoexec", &["rbind", "rnoexec"], "noexec", "noexec"),
        ("rnosuid", &["rbind", "rnosuid"], "nosuid", "nosuid"),
        ("ro", &["rbind", "ro"], "ro", "rw"),
        ("rro", &["rbind", "rro"], "ro", "ro"),
        ("rw", &["bind", "ro", "rw"], "rw", "none"),
        ("suid", &["bind", "nosuid", "suid"], "!nosuid", "none"),
    ];
    assert_eq!(names(&claims["mountOptions"]), expected.map(|(option, ..)| option));
    let look = "cat /proc/self/mountinfo; stat -c 'owner %u:%g' /m/file; stat -c 'owner %u:%g' /m/sub";
    let bundle: Bundle = machine.bundle("b", &["/bin/sh", "-c", look]);
    let mounts = |bundle: &Bundle, options: &[&str]| {
        bundle.edit(|config| {
            config["mounts"].as_array_mut().unwrap().retain(|mount| mount["destination"] != "/m")
        });
        bundle.mount("/m", &tree.path, options);
    };
    for (option, options, top, below) in expected {
        mounts(&bundle, options);
        let out = machine.run(&bundle, option).ok();
        let flags = |at: &str| {
            let fields = out.lines().map(|line| line.split(' ').collect::<Vec<_>>());
            fields.filter(|line| line.get(4) == Some(&at)).map(|line| line[5].to_owned()).next_back()
        };
        let holds = |at: &str, claim: &str| match (flags(at), claim.strip_prefix('!')) {
            (None, _) => claim == "none",
            (Some(flags), None) => flags.split(',').any(|flag| flag == claim),
            (Some(flags), Some(not)) => flags.split(',').all(|flag| flag != not),
        };
        assert!(holds("/m", top) && holds("/m/sub", below), "{option}: {top} {below}: {out}");
        let owners: Vec<&str> = out.lines().filter(|line| line.starts_with("owner")).collect();
        assert_eq!(owners, ["owner 0:0", "owner 0:0"], "{option}");
    }
}
