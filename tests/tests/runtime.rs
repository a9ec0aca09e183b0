//! sysbox-runc by itself, against the real kernel: bad input, failure in the middle, what is locked.

#![allow(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use serde_json::json;
use sysbox_tests::runtime::{Bundle, Machine, eventually};

fn sleeper(machine: &Machine, name: &str) -> Bundle {
    machine.bundle(name, &["/bin/sleep", "1000"])
}

#[test]
fn a_container_has_ids_of_its_own_and_nothing_is_chowned() {
    let machine = Machine::start();
    let bundle = machine.bundle(
        "b",
        &[
            "/bin/sh",
            "-c",
            "id -u; cat /proc/self/uid_map; /bin/touch /made; stat -c %u:%g /made /bin/busybox",
        ],
    );
    let before: Vec<String> = bundle.inventory();
    let out = machine.run(&bundle, "c").ok();
    let lines: Vec<&str> = out.lines().collect();
    assert_eq!(lines[0], "0");
    let map: Vec<u64> = lines[1].split_whitespace().map(|field| field.parse().unwrap()).collect();
    assert_eq!((map[0], map[2]), (0, 65536));
    assert_ne!(map[1], 0);
    assert_eq!(&lines[2..], ["0:0", "0:0"]);
    let made = fs::metadata(bundle.rootfs().join("made")).unwrap();
    assert_eq!((made.uid(), made.gid()), (0, 0));
    let after = bundle.inventory();
    assert!(before.iter().all(|line| after.contains(line)), "{before:#?}\n{after:#?}");
    assert!(machine.remains("c").is_empty(), "{:?}", machine.remains("c"));
}

#[test]
fn two_containers_never_share_ids() {
    let machine = Machine::start();
    let (a, b) = (sleeper(&machine, "a"), sleeper(&machine, "b"));
    let (one, two) = (machine.run_detached(&a, "one"), machine.run_detached(&b, "two"));
    let first = |pid: i64| -> u64 {
        let map = fs::read_to_string(format!("/proc/{pid}/uid_map")).unwrap();
        map.split_whitespace().nth(1).unwrap().parse().unwrap()
    };
    assert!(first(one.pid()).abs_diff(first(two.pid())) >= 65536);
}

#[test]
fn bad_bundles_are_refused_with_the_place_and_leave_nothing() {
    let machine = Machine::start();
    let refused = |name: &str, spoil: &dyn Fn(&Bundle)| {
        let bundle = machine.bundle(name, &["/bin/true"]);
        spoil(&bundle);
        let text = machine.run(&bundle, name).fails();
        assert!(machine.remains(name).is_empty(), "{name}: {:?}", machine.remains(name));
        assert_eq!(text.trim_end().lines().count(), 1, "{text}");
        text
    };
    let text = refused("syntax", &|b| fs::write(b.dir.join("config.json"), "{\"ociVersion\":").unwrap());
    assert!(text.contains("config.json") && text.contains("EOF"), "{text}");
    let text = refused("type", &|b| b.edit(|c| c["mounts"][0]["options"] = json!("ro")));
    assert!(text.contains("/mounts/0/options"), "{text}");
    let text = refused("none", &|b| fs::remove_file(b.dir.join("config.json")).unwrap());
    assert!(text.contains("not found"), "{text}");
    let text = refused("link", &|b| {
        fs::rename(b.rootfs(), b.dir.join("real")).unwrap();
        symlink("real", b.rootfs()).unwrap();
    });
    assert!(text.contains("is a symbolic link"), "{text}");
    let text = refused("gone", &|b| fs::remove_dir_all(b.rootfs()).unwrap());
    assert!(text.contains("No such file"), "{text}");
    let text = refused("source", &|b| b.mount("/x", Path::new("/no/such"), &["bind"]));
    assert!(text.contains("bind source /no/such"), "{text}");
    let text = refused("sysctl", &|b| b.edit(|c| c["linux"]["sysctl"] = json!({"kernel.panic": "1"})));
    assert!(text.contains("kernel.panic"), "{text}");
    let text = refused("cgroup", &|b| b.edit(|c| c["linux"]["cgroupsPath"] = json!("/x/../../y")));
    assert!(text.contains("/linux/cgroupsPath"), "{text}");
}

#[test]
fn unknown_containers_are_told_and_a_forced_delete_of_one_is_no_error() {
    let machine = Machine::start();
    for args in
        [["state", "nobody"], ["start", "nobody"], ["delete", "nobody"], ["kill", "nobody"], ["ps", "nobody"]]
    {
        let text = machine.runc(&args).fails();
        assert!(text.contains("container does not exist"), "{args:?}: {text}");
    }
    machine.runc(&["delete", "--force", "nobody"]).ok();
    assert!(machine.runc(&["state", "../etc"]).fails().contains("invalid container ID format"));
}

#[test]
fn an_id_is_taken_once() {
    let machine = Machine::start();
    let bundle = sleeper(&machine, "b");
    let running = machine.run_detached(&bundle, "c");
    let text = machine.run(&bundle, "c").fails();
    assert!(text.contains("container with given ID already exists"), "{text}");
    assert_eq!(running.exec("id -u").ok(), "0\n");
}

#[test]
fn a_missing_daemon_is_named_with_the_remedy_and_nothing_is_left() {
    let mut machine = Machine::start();
    let bundle = machine.bundle("b", &["/bin/true"]);
    machine.kill_fs();
    let text = machine.run(&bundle, "c").fails();
    assert!(text.contains("sysbox-fs is not running") && text.contains("hint:"), "{text}");
    assert!(machine.remains("c").is_empty());
    machine.kill_mgr();
    let text = machine.run(&bundle, "c").fails();
    assert!(text.contains("sysbox-mgr is not running"), "{text}");
    assert!(machine.remains("c").is_empty());
    machine.start_mgr();
    machine.start_fs();
    machine.run(&bundle, "c").ok();
}

#[test]
fn a_failed_start_says_why_and_leaves_the_rootfs_as_it_was() {
    let machine = Machine::start();
    for (name, program, expected) in [
        ("gone", "no-such-program", "exec: \"no-such-program\": executable file not found in $PATH"),
        ("path", "/no/such", "exec: \"/no/such\": stat /no/such: no such file or directory"),
        ("plain", "/plain", "exec: \"/plain\": permission denied"),
    ] {
        let bundle = machine.bundle(name, &[program]);
        fs::write(bundle.rootfs().join("plain"), "").unwrap();
        bundle.edit(|config| config["process"]["cwd"] = json!("/made/by/us"));
        let before = bundle.inventory();
        let text = machine.run(&bundle, name).fails();
        // Without a log the error is a record, in which quotes are escaped.
        assert!(text.replace("\\\"", "\"").contains(expected), "{text}");
        assert!(machine.remains(name).is_empty(), "{:?}", machine.remains(name));
        let made = |line: &&String| !line.starts_with("made");
        let after: Vec<String> = bundle.inventory().iter().filter(made).cloned().collect();
        assert_eq!(before, after, "{name}");
    }
}

#[test]
fn errors_are_recorded_for_the_engine() {
    let machine = Machine::start();
    let bundle = machine.bundle("b", &["nope"]);
    let log = machine.path("log.json");
    let run = machine
        .command()
        .arg("--log")
        .arg(&log)
        .args(["--log-format", "json", "run", "-b"])
        .arg(&bundle.dir)
        .arg("c")
        .output();
    assert_eq!(run.unwrap().status.code(), Some(1));
    let last: serde_json::Value =
        serde_json::from_str(fs::read_to_string(&log).unwrap().lines().last().unwrap()).unwrap();
    assert_eq!(last["level"], "error");
    assert!(last["msg"].as_str().unwrap().contains("executable file not found in $PATH"), "{last}");
    assert!(last["time"].as_str().unwrap().ends_with('Z'));
}

#[test]
fn a_runtime_killed_in_the_middle_of_create_leaves_nothing_after_a_forced_delete() {
    let machine = Machine::start();
    let bundle = sleeper(&machine, "b");
    let rootfs = bundle.inventory();
    for round in 0..40u64 {
        let id = format!("cut{round}");
        let mut command = machine.command();
        command.args(["create", "--bundle"]).arg(&bundle.dir).arg(&id);
        let mut child =
            command.stdout(std::process::Stdio::null()).stderr(std::process::Stdio::null()).spawn().unwrap();
        std::thread::sleep(Duration::from_micros(700 * round));
        child.kill().unwrap();
        child.wait().unwrap();
        machine.runc(&["delete", "--force", &id]).ok();
        eventually(&format!("nothing of {id} is left: {:?}", machine.remains(&id)), || {
            machine.remains(&id).is_empty()
        });
    }
    let unknown: Vec<String> = bundle.inventory().into_iter().filter(|line| !rootfs.contains(line)).collect();
    // Mount points are all that may stay: whoever was killed could not take them away.
    assert!(
        unknown.iter().all(|line| ["proc", "sys", "dev"].iter().any(|d| line.starts_with(d))),
        "{unknown:?}"
    );
    machine.run_detached(&bundle, "cut1").delete();
}

#[test]
fn states_follow_the_life_of_a_container() {
    let machine = Machine::start();
    let bundle = sleeper(&machine, "b");
    let dir = bundle.dir.display().to_string();
    let pid_file = machine.path("pid");
    let mut create = machine.command();
    create.args(["create", "--bundle", &dir, "--pid-file"]).arg(&pid_file).arg("c");
    assert!(
        create
            .stdout(std::process::Stdio::null())
            .stderr(std::process::Stdio::null())
            .status()
            .unwrap()
            .success()
    );
    let state = machine.state("c");
    assert_eq!((state["status"].as_str(), state["id"].as_str()), (Some("created"), Some("c")));
    assert_eq!(fs::read_to_string(&pid_file).unwrap(), state["pid"].to_string());
    machine.runc(&["start", "c"]).ok();
    assert_eq!(machine.state("c")["status"], "running");
    assert!(machine.runc(&["start", "c"]).fails().contains("already running"));
    assert!(machine.runc(&["delete", "c"]).fails().contains("not stopped: running"));
    assert_eq!(machine.runc(&["list", "-q"]).ok(), "c\n");
    let pids: Vec<i64> = serde_json::from_str(&machine.runc(&["ps", "--format", "json", "c"]).ok()).unwrap();
    assert_eq!(pids, [state["pid"].as_i64().unwrap()]);
    machine.runc(&["kill", "c", "KILL"]).ok();
    eventually("it has stopped", || machine.state("c")["status"] == "stopped");
    assert_eq!(machine.state("c")["pid"], 0);
    assert!(machine.runc(&["kill", "c"]).fails().contains("container not running"));
    machine.runc(&["delete", "c"]).ok();
    assert!(machine.remains("c").is_empty());
}

#[test]
fn a_pid_that_another_process_has_now_is_not_the_container() {
    let machine = Machine::start();
    let bundle = sleeper(&machine, "b");
    let running = machine.run_detached(&bundle, "c");
    let path = machine.path("root/c/state.json");
    let text = fs::read_to_string(&path).unwrap();
    let mut state: serde_json::Value = serde_json::from_str(&text).unwrap();
    let ticks = state["init"]["start_ticks"].as_u64().unwrap();
    state["init"]["start_ticks"] = json!(ticks + 1);
    fs::write(&path, state.to_string()).unwrap();
    assert_eq!(machine.state("c")["status"], "stopped");
    assert!(machine.runc(&["kill", "c", "KILL"]).fails().contains("not running"));
    fs::write(&path, text).unwrap();
    assert_eq!(machine.state("c")["status"], "running");
    drop(running);
}

#[test]
fn nothing_is_mounted_on_the_host() {
    let machine = Machine::start();
    let own = machine.path("").display().to_string();
    let mounts =
        || fs::read_to_string("/proc/self/mountinfo").unwrap().lines().filter(|l| l.contains(&own)).count();
    let before = mounts();
    let bundle = sleeper(&machine, "b");
    bundle.mount("/x", Path::new("/usr"), &["rbind", "ro"]);
    let running = machine.run_detached(&bundle, "c");
    assert_eq!(mounts(), before);
    running.delete();
    assert_eq!(mounts(), before);
}

#[test]
fn cgroups_made_inside_go_with_the_container() {
    let machine = Machine::start();
    let bundle = sleeper(&machine, "b");
    let running = machine.run_detached(&bundle, "c");
    running.exec("for d in /sys/fs/cgroup/*/; do mkdir -p $d/a/b || exit 1; done").ok();
    let moved = running.exec(
        "sh -c 'echo $$ > /sys/fs/cgroup/memory/a/b/cgroup.procs && sleep 1000' >/dev/null 2>&1 & sleep 0.2",
    );
    moved.ok();
    running.delete();
    assert!(machine.remains("c").is_empty(), "{:?}", machine.remains("c"));
}

#[test]
fn limits_are_out_of_the_containers_reach() {
    let machine = Machine::start();
    let bundle = sleeper(&machine, "b");
    bundle.edit(|config| config["linux"]["resources"]["memory"] = json!({"limit": 67_108_864}));
    let running = machine.run_detached(&bundle, "c");
    let own = "/sys/fs/cgroup/memory/memory.limit_in_bytes";
    assert_ne!(running.exec(&format!("echo -1 > {own}")).code, 0);
    let limit =
        fs::read_to_string(format!("/sys/fs/cgroup/memory/{}/memory.limit_in_bytes", machine.cgroup("c")))
            .unwrap();
    assert_eq!(limit.trim(), "67108864");
    let total = running.exec("cat /proc/meminfo").ok();
    assert!(total.starts_with("MemTotal:          65536 kB"), "{total}");
}

#[test]
fn a_cgroup_of_somebody_else_is_not_taken() {
    let machine = Machine::start();
    let (a, b) = (sleeper(&machine, "a"), sleeper(&machine, "b"));
    let name = machine.cgroup("shared");
    for bundle in [&a, &b] {
        bundle.edit(|config| config["linux"]["cgroupsPath"] = json!(format!("/{name}")));
    }
    let running = machine.run_detached(&a, "first");
    assert!(machine.run(&b, "second").fails().contains("has processes in it"));
    assert_eq!(running.exec("echo alive").ok(), "alive\n");
}

#[test]
fn read_only_binds_stay_read_only() {
    let machine = Machine::start();
    let (outer, inner) = (machine.path("outer"), machine.path("inner"));
    fs::create_dir_all(outer.join("below")).unwrap();
    fs::create_dir(&inner).unwrap();
    fs::write(outer.join("below/f"), "host").unwrap();
    let bundle = sleeper(&machine, "b");
    bundle.mount("/ro", &inner, &["rbind", "ro"]);
    bundle.mount("/a", &outer, &["rbind"]);
    bundle.mount("/a/below", &outer.join("below"), &["rbind", "ro"]);
    let running = machine.run_detached(&bundle, "c");
    for attack in [
        "mount -o remount,bind,rw /ro && touch /ro/x",
        "mount -o remount,rw /ro && touch /ro/x",
        "mkdir /m; mount -o bind /ro /m && mount -o remount,bind,rw /m && touch /m/x",
        "umount /a/below && touch /a/below/x",
        "umount -l /a/below && touch /a/below/x",
        "mount -o remount,bind,rw /a/below && touch /a/below/x",
        "umount -l /a && touch /a/below/x && test -e /a/below/f",
        "mkdir -p /n; mount -o rbind /a /n && umount /n/below && touch /n/below/x",
    ] {
        let said = running.exec(attack);
        assert_ne!(said.code, 0, "{attack}: {}", said.out);
    }
    assert_eq!(fs::read_dir(&inner).unwrap().count(), 0);
    assert_eq!(fs::read_dir(outer.join("below")).unwrap().count(), 1);
    running.exec("touch /a/mine").ok();
    assert_eq!(fs::metadata(outer.join("mine")).unwrap().uid(), 0);
}

#[test]
fn a_read_only_rootfs_stays_read_only() {
    let machine = Machine::start();
    let bundle = sleeper(&machine, "b");
    bundle.edit(|config| config["root"]["readonly"] = json!(true));
    let running = machine.run_detached(&bundle, "c");
    for attack in ["touch /x", "mount -o remount,rw / && touch /x", "mount -o remount,bind,rw / && touch /x"]
    {
        assert_ne!(running.exec(attack).code, 0, "{attack}");
    }
    assert!(!bundle.rootfs().join("x").exists());
    running.exec("touch /dev/shm/x").ok();
}

#[test]
fn masks_stay_where_they_hide_something_of_the_image() {
    let machine = Machine::start();
    let bundle = sleeper(&machine, "b");
    fs::create_dir(bundle.rootfs().join("secrets")).unwrap();
    fs::write(bundle.rootfs().join("secrets/f"), "x").unwrap();
    fs::write(bundle.rootfs().join("secret"), "x").unwrap();
    bundle.edit(|config| {
        config["linux"]["maskedPaths"] = json!(["/secrets", "/secret", "/not-there", "/proc/kcore"])
    });
    let running = machine.run_detached(&bundle, "c");
    assert_eq!(running.exec("ls /secrets; cat /secret").ok(), "");
    for attack in [
        "umount /secrets",
        "umount -l /secrets",
        "umount /secret",
        "mount -o remount,rw /secrets && touch /secrets/x",
    ] {
        assert_ne!(running.exec(attack).code, 0, "{attack}");
    }
    assert_eq!(running.exec("ls /secrets; cat /secret").ok(), "");
}

#[test]
fn a_writable_source_that_host_users_reach_is_warned_of() {
    let machine = Machine::start();
    let open = machine.path("open");
    fs::create_dir(&open).unwrap();
    let bundle = machine.bundle("b", &["/bin/true"]);
    bundle.mount("/x", &open, &["rbind"]);
    let text = machine.run(&bundle, "c");
    assert!(text.err.contains(&open.display().to_string()) && text.err.contains("chmod 700"), "{}", text.err);
    fs::set_permissions(&open, fs::Permissions::from_mode(0o700)).unwrap();
    let text = machine.run(&bundle, "d");
    assert_eq!((text.code, text.err.as_str()), (0, ""));
}

#[test]
fn mappings_of_the_spec_are_honoured_and_nothing_is_shifted_twice() {
    let machine = Machine::start();
    let bundle = machine
        .bundle("b", &["/bin/sh", "-c", "cat /proc/self/uid_map; touch /made; stat -c %u:%g /bin/busybox"]);
    let lines = json!([{"containerID": 0, "hostID": 400_000_000, "size": 65536}]);
    bundle.edit(|config| {
        config["linux"]["uidMappings"] = lines.clone();
        config["linux"]["gidMappings"] = lines.clone();
        config["linux"]["namespaces"].as_array_mut().unwrap().push(json!({"type": "user"}));
    });
    let chown =
        Command::new("chown").args(["-Rh", "400000000:400000000"]).arg(bundle.rootfs()).status().unwrap();
    assert!(chown.success());
    let out = machine.run(&bundle, "c").ok();
    assert_eq!(out.split_whitespace().collect::<Vec<_>>(), ["0", "400000000", "65536", "0:0"]);
    assert_eq!(fs::metadata(bundle.rootfs().join("made")).unwrap().uid(), 400_000_000);
}

#[test]
fn devices_belong_to_the_containers_root_and_work() {
    let machine = Machine::start();
    let script = "for d in null zero full random urandom tty fuse net/tun; do stat -c '%n %u:%g %a %F' /dev/$d; done; \
                  echo x > /dev/null && cat /dev/null && : < /dev/fuse && : < /dev/net/tun && ls -d /dev/pts/ptmx /dev/shm /dev/mqueue /dev/ptmx";
    let bundle = machine.bundle("b", &["/bin/sh", "-c", script]);
    let out = machine.run(&bundle, "c").ok();
    for device in ["null", "zero", "full", "random", "urandom", "tty", "fuse", "net/tun"] {
        assert!(out.contains(&format!("/dev/{device} 0:0 666 character special file")), "{out}");
    }
    assert!(out.ends_with("/dev/mqueue\n/dev/ptmx\n/dev/pts/ptmx\n/dev/shm\n"), "{out}");
    let null = fs::metadata("/dev/null").unwrap();
    assert_eq!((null.uid(), null.mode() & 0o7777), (0, 0o666));
}

#[test]
fn a_nested_user_namespace_may_mount_its_own_proc() {
    let machine = Machine::start();
    let bundle = machine.bundle(
        "b",
        &[
            "/bin/busybox",
            "unshare",
            "-U",
            "-r",
            "-m",
            "-p",
            "-f",
            "/bin/sh",
            "-c",
            "mount -t proc proc /proc && cat /proc/1/comm",
        ],
    );
    let out = machine.run(&bundle, "c").ok();
    assert!(["sh\n", "cat\n"].contains(&out.as_str()), "{out}");
}

/// runc's answers to the same questions, on this machine.
#[test]
fn output_has_the_form_of_runcs() {
    let machine = Machine::start();
    let bundle = sleeper(&machine, "b");
    let theirs = machine.bundle("theirs", &["/bin/sleep", "1000"]);
    fs::remove_file(theirs.dir.join("config.json")).unwrap();
    let runc = |args: &[&str]| {
        let root = machine.path("runc-root");
        Command::new("runc")
            .arg("--root")
            .arg(root)
            .args(args)
            .stdin(std::process::Stdio::null())
            .output()
            .expect("need: runc")
    };
    assert!(runc(&["spec", "--bundle", &theirs.dir.display().to_string()]).status.success());
    theirs.edit(|config| {
        config["process"]["terminal"] = json!(false);
        config["process"]["args"] = json!(["/bin/sleep", "1000"]);
    });
    let ours = machine.run_detached(&bundle, "c");
    let mut start = Command::new("runc");
    start
        .arg("--root")
        .arg(machine.path("runc-root"))
        .args(["run", "--detach", "--bundle"])
        .arg(&theirs.dir)
        .arg("c");
    let null = std::process::Stdio::null;
    assert!(start.stdin(null()).stdout(null()).stderr(null()).status().unwrap().success());
    let text = |output: &std::process::Output| String::from_utf8_lossy(&output.stdout).into_owned();
    let keys = |json: &str| -> Vec<String> {
        let value: serde_json::Value = serde_json::from_str(json).unwrap();
        let object = value.as_array().map_or(&value, |all| &all[0]);
        let mut keys: Vec<String> = object.as_object().unwrap().keys().cloned().collect();
        keys.sort();
        keys
    };
    assert_eq!(keys(&machine.runc(&["state", "c"]).ok()), keys(&text(&runc(&["state", "c"]))));
    assert_eq!(
        keys(&machine.runc(&["list", "--format", "json"]).ok()),
        keys(&text(&runc(&["list", "--format", "json"])))
    );
    let head =
        |text: String| text.lines().next().unwrap().split_whitespace().map(str::to_owned).collect::<Vec<_>>();
    assert_eq!(head(machine.runc(&["list"]).ok()), head(text(&runc(&["list"]))));
    assert_eq!(head(machine.runc(&["ps", "c"]).ok()), head(text(&runc(&["ps", "c"]))));
    let codes = |args: &[&str]| (machine.runc(args).code, runc(args).status.code().unwrap());
    for args in [
        &["state", "nobody"][..],
        &["kill", "nobody"],
        &["delete", "nobody"],
        &["delete", "--force", "nobody"],
        &["start", "c"],
        &["delete", "c"],
        &["exec", "c", "/bin/sh", "-c", "exit 5"],
        &["exec", "c", "/no/such"],
        &["kill", "c", "NOSUCH"],
    ] {
        let (our, their) = codes(args);
        assert_eq!(our, their, "{args:?}");
    }
    drop(ours);
    assert!(runc(&["delete", "--force", "c"]).status.success());
}

#[test]
fn what_the_runtime_says_of_itself_is_json() {
    let machine = Machine::start();
    let features: serde_json::Value = serde_json::from_str(&machine.runc(&["features"]).ok()).unwrap();
    assert_eq!(features["linux"]["mountExtensions"]["idmap"]["enabled"], true);
    assert!(machine.runc(&["--version"]).ok().starts_with("sysbox-runc "));
}

#[test]
fn a_volume_on_a_data_root_is_for_one_running_container() {
    let machine = Machine::start();
    let volume = machine.path("vol");
    fs::create_dir(&volume).unwrap();
    let (a, b) = (sleeper(&machine, "a"), sleeper(&machine, "b"));
    a.mount("/var/lib/docker", &volume, &["rbind"]);
    b.mount("/var/lib/docker", &volume, &["rbind"]);
    let first = machine.run_detached(&a, "first");
    first.exec("touch /var/lib/docker/x").ok();
    let text = machine.run(&b, "second").fails();
    assert!(text.contains("first") && text.contains("second"), "{text}");
    assert!(machine.remains("second").is_empty());
    first.delete();
    let second = machine.run_detached(&b, "second");
    assert_eq!(second.exec("stat -c %u:%g /var/lib/docker/x").ok(), "0:0\n");
    assert_eq!(fs::metadata(volume.join("x")).unwrap().uid(), 0);
}

#[test]
fn daemons_may_be_killed_and_restarted_under_a_container() {
    let mut machine = Machine::start();
    let bundle = sleeper(&machine, "b");
    // Not by `run_detached`: its guard would hold on to the machine, whose daemons are exchanged below.
    let dir = bundle.dir.display().to_string();
    let mut run = machine.command();
    run.args(["run", "--detach", "--bundle", &dir, "d"])
        .stdout(std::process::Stdio::null())
        .stderr(std::process::Stdio::null());
    assert!(run.status().unwrap().success());
    for _ in 0..3 {
        machine.kill_fs();
        machine.start_fs();
        machine.kill_mgr();
        machine.start_mgr();
        eventually("sysbox-fs gave its descriptor to the new manager", || machine.keeps_fuse());
        let read = machine.runc(&["exec", "d", "/bin/cat", "/proc/meminfo"]).ok();
        assert!(read.starts_with("MemTotal:"), "{read}");
    }
    assert_eq!(machine.runc(&["exec", "d", "/bin/id", "-u"]).ok(), "0\n");
    machine.runc(&["delete", "--force", "d"]).ok();
    assert!(machine.remains("d").is_empty(), "{:?}", machine.remains("d"));
}

#[test]
fn the_root_is_a_shared_mount() {
    let machine = Machine::start();
    let bundle = machine.bundle("b", &["/bin/cat", "/proc/self/mountinfo"]);
    let out = machine.run(&bundle, "c").ok();
    let root = out.lines().find(|line| line.split(' ').nth(4) == Some("/")).unwrap();
    assert!(root.contains(" shared:"), "{root}");
}
