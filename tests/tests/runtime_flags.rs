//! What the flags of create, run and exec do, looked at from inside and outside, side by side with runc. runc is the oracle:
//! the same look is taken at both.
#![allow(clippy::unwrap_used)] // all of it is tests; the lint's exception misses their helpers

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::process::{Child, Command, Stdio};

use serde_json::{Value, json};
use sysbox_tests::beside::{Pair, Side};
use sysbox_tests::runtime::eventually;

const SLEEP: &[&str] = &["/bin/sleep", "1000"];

/// What is seen of both must be the same.
#[track_caller]
fn same(pair: &Pair, of: impl Fn(&Side) -> String) -> String {
    let (ours, runcs) = (of(&pair.ours), of(&pair.runcs));
    assert_eq!(ours, runcs, "ours, runc's");
    ours
}

/// The output of a line that succeeds.
#[track_caller]
fn ok(side: &Side, line: &str, id: &str) -> String {
    let said = side.say(line, id);
    assert_eq!(said.code, 0, "{line}: {said:?} of {side:?}");
    said.out
}

fn state(side: &Side, id: &str) -> Value {
    serde_json::from_str(&ok(side, "state {id}", id)).unwrap()
}

/// A line in the background, in files of its own.
fn begin(side: &Side, line: &str, id: &str, out: &str) -> Child {
    let file = fs::File::create(side.dir.join(out)).unwrap();
    Command::new("/usr/bin/timeout")
        .args(["-k", "5", "60"])
        .args(side.words(line, id))
        .current_dir(&side.dir)
        .stdin(Stdio::null())
        .stdout(file.try_clone().unwrap())
        .stderr(file)
        .spawn()
        .unwrap()
}

#[test]
fn a_bundle_is_where_it_is_whatever_it_is_called() {
    let pair = Pair::new(SLEEP);
    for (n, line) in ["run -d -b bundle {id}", "create --bundle {d}/bundle {id}"].iter().enumerate() {
        let id = format!("{}{n}", pair.id);
        let seen = same(&pair, |side| {
            let link = side.dir.join("bundle");
            if n == 0 {
                std::os::unix::fs::symlink(&side.bundle.dir, link).unwrap();
            }
            ok(side, line, &id);
            let bundle = state(side, &id)["bundle"].as_str().unwrap().to_owned();
            ok(side, "delete --force {id}", &id);
            bundle
        });
        assert_eq!(seen, "{b}");
    }
}

#[test]
fn a_pid_file_has_the_pid_and_nothing_more() {
    let pair = Pair::new(SLEEP);
    let look = |side: &Side, id: &str, name: &str| {
        let path = side.dir.join(name);
        let text = fs::read_to_string(&path).unwrap();
        assert_eq!(text, state(side, id)["pid"].to_string());
        format!("{:o}", fs::metadata(&path).unwrap().permissions().mode())
    };
    same(&pair, |side| {
        ok(side, "create --pid-file {d}/a -b {b} {id}", &pair.id);
        let mode = look(side, &pair.id, "a");
        ok(side, "delete --force {id}", &pair.id);
        // One that is there already is replaced; the caller's umask holds.
        ok(side, "run -d --pid-file a -b {b} {id}", &pair.id);
        let again = look(side, &pair.id, "a");
        ok(side, "exec -d --pid-file {d}/b {id} /bin/sleep 1000", &pair.id);
        let pid = fs::read_to_string(side.dir.join("b")).unwrap();
        assert!(fs::read_to_string(format!("/proc/{pid}/comm")).unwrap().starts_with("sleep"), "{pid:?}");
        let leftovers = fs::read_dir(&side.dir).unwrap().flatten().map(|entry| entry.file_name());
        let leftovers =
            leftovers.filter(|name| !["root", "a", "b", ".out", ".err"].contains(&name.to_str().unwrap()));
        assert_eq!(leftovers.count(), 0);
        let mut foreground = begin(side, "run --pid-file {d}/c -b {b} {id}f", &pair.id, "foreground");
        eventually("the file is there", || side.dir.join("c").exists());
        let third = look(side, &format!("{}f", pair.id), "c");
        eventually("it runs", || state(side, &format!("{}f", pair.id))["status"] == "running");
        ok(side, "kill {id}f KILL", &pair.id);
        assert_eq!(foreground.wait().unwrap().code(), Some(137));
        format!("{mode} {again} {third}")
    });
}

#[test]
fn without_pivot_the_container_has_the_same_root_and_mounts() {
    let pair = Pair::new(&[
        "/bin/sh",
        "-c",
        "ls /; ls -id / /bin; cut=/bin/busybox; $cut cut -d' ' -f4,5 /proc/self/mountinfo; $cut readlink /proc/self/root; pwd",
    ]);
    for side in [&pair.ours, &pair.runcs] {
        let plain = ok(side, "run -b {b} {id}", &pair.id);
        let moved = ok(side, "run --no-pivot -b {b} {id}", &pair.id);
        assert!(plain.contains("bin\n"), "{plain}");
        let lines = |text: &str| {
            // The host's pty of the console, and the container's own names, differ between runs.
            let mut lines: Vec<String> = text.lines().map(|line| line.replace(&pair.id, "ID")).collect();
            lines.sort();
            lines
        };
        assert_eq!(lines(&plain), lines(&moved), "{side:?}");
    }
}

#[test]
fn a_keyring_is_new_unless_the_callers_is_to_be_kept() {
    let pair = Pair::new(SLEEP);
    for (n, (flag, seen)) in [("", "1\n1\n"), ("--no-new-keyring", "0\n0\n")].into_iter().enumerate() {
        let id = format!("{}k{n}", pair.id);
        // How many session keyrings of this container are in sight.
        let look = format!("/bin/busybox grep -c _ses.{id} /proc/keys");
        pair.edit(|config| {
            // runc's default hides the file.
            config["linux"]["maskedPaths"] = json!([]);
            config["process"]["args"] = json!(["/bin/sh", "-c", format!("{look} >/keys; exec sleep 1000")]);
        });
        let both = same(&pair, |side| {
            ok(side, &format!("run -d {flag} -b {{b}} {{id}}"), &id);
            let keys = side.bundle.rootfs().join("keys");
            eventually("it was counted", || fs::read_to_string(&keys).is_ok_and(|text| text.ends_with('\n')));
            let later = side.say(&format!("exec {{id}} {look}"), &id).out;
            ok(side, "delete --force {id}", &id);
            let first = fs::read_to_string(&keys).unwrap();
            fs::remove_file(&keys).unwrap();
            format!("{first}{later}")
        });
        assert_eq!(both, seen, "{flag}");
    }
}

/// A line with these files as descriptors from 3 on; its output.
fn passing(side: &Side, line: &str, id: &str, files: &[&str]) -> String {
    let mut opened = String::new();
    for (n, name) in files.iter().enumerate() {
        fs::write(side.dir.join(name), format!("[{name}]")).unwrap();
        opened.push_str(&format!(" {}<{}", n + 3, side.dir.join(name).display()));
    }
    let out = Command::new("/bin/bash")
        .args(["-c", &format!("exec timeout 60 \"$@\" {opened}"), "sh"])
        .args(side.words(line, id))
        .current_dir(&side.dir)
        .stdin(Stdio::null())
        .output()
        .unwrap();
    assert!(out.status.success(), "{line}: {}", String::from_utf8_lossy(&out.stderr));
    String::from_utf8_lossy(&out.stdout).into_owned()
}

#[test]
fn descriptors_are_preserved_as_many_as_said() {
    let script = "for n in 3 4 5; do cat <&$n 2>/dev/null || echo -n none; done; ls /proc/self/fd | /bin/busybox wc -l";
    let pair = Pair::new(&["/bin/sh", "-c", script]);
    for (count, seen) in [(1, "[one]nonenone5\n"), (2, "[one][two]none6\n")] {
        let text = same(&pair, |side| {
            passing(side, &format!("run --preserve-fds {count} -b {{b}} {{id}}"), &pair.id, &["one", "two"])
        });
        // The three streams, those, and the directory that `ls` reads.
        assert_eq!(text, seen);
    }
    pair.edit(|config| config["process"]["args"] = json!(SLEEP));
    pair.both_ok("run -d -b {b} {id}");
    let line = format!("exec --preserve-fds 2 {{id}} /bin/sh -c {}", script.replace(' ', "~"));
    let text = same(&pair, |side| passing(side, &line, &pair.id, &["one", "two"]));
    assert!(text.starts_with("[one][two]none"), "{text}");
}

#[test]
fn what_ran_is_kept_or_gone() {
    let pair = Pair::new(&["/bin/sh", "-c", "exit 3"]);
    let seen = same(&pair, |side| {
        let gone = side.say("run -b {b} {id}", &pair.id).code;
        let list = ok(side, "list -q", &pair.id);
        let kept = side.say("run --keep -b {b} {id}", &pair.id).code;
        let status = state(side, &pair.id)["status"].clone();
        let again = side.say("run -b {b} {id}", &pair.id).code;
        ok(side, "delete {id}", &pair.id);
        format!("{gone} {list:?} {kept} {status} {again}")
    });
    assert_eq!(seen, "3 \"\" 3 \"stopped\" 1");
}

#[test]
fn a_program_goes_on_when_its_caller_was_told_to_detach() {
    let pair = Pair::new(SLEEP);
    let seen = same(&pair, |side| {
        ok(side, "run --detach -b {b} {id}", &pair.id);
        ok(side, "exec --detach --pid-file {d}/pid {id} /bin/sleep 1000", &pair.id);
        let status = state(side, &pair.id)["status"].clone();
        let parents: Vec<bool> =
            [state(side, &pair.id)["pid"].to_string(), fs::read_to_string(side.dir.join("pid")).unwrap()]
                .iter()
                .map(|pid| parent(pid).contains("runc"))
                .collect();
        format!("{status} {parents:?}")
    });
    assert_eq!(seen, "\"running\" [false, false]");
}

/// The name of a process's parent.
fn parent(pid: &str) -> String {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let parent = status.lines().find_map(|line| line.strip_prefix("PPid:")).unwrap().trim();
    fs::read_to_string(format!("/proc/{parent}/comm")).unwrap()
}

#[test]
fn orphans_come_to_the_runtime_unless_it_is_no_subreaper() {
    let pair = Pair::new(SLEEP);
    for side in [&pair.ours, &pair.runcs] {
        let hook = side.dir.join("hook");
        // Its shell ends, and leaves an orphan.
        fs::write(
            &hook,
            "#!/bin/sh\nsleep 1000 </dev/null >/dev/null 2>&1 & echo $! >orphan.new; mv orphan.new ORPHAN\n"
                .replace("ORPHAN", &side.dir.join("orphan").display().to_string()),
        )
        .unwrap();
        fs::set_permissions(&hook, fs::Permissions::from_mode(0o755)).unwrap();
        side.bundle.edit(|config| config["hooks"] = json!({"createRuntime": [{"path": hook}]}));
    }
    for (flag, comes) in [("", true), ("--no-subreaper", false), ("-d", false)] {
        let seen = same(&pair, |side| {
            let mut run = begin(side, &format!("run {flag} -b {{b}} {{id}}"), &pair.id, "run");
            eventually("it runs", || side.say("state {id}", &pair.id).out.contains("\"running\""));
            let orphan = fs::read_to_string(side.dir.join("orphan")).unwrap();
            let parent = parent(orphan.trim());
            let orphan = nix::unistd::Pid::from_raw(orphan.trim().parse().unwrap());
            nix::sys::signal::kill(orphan, nix::sys::signal::Signal::SIGKILL).unwrap();
            ok(side, "kill {id} KILL", &pair.id);
            run.wait().unwrap();
            side.say("delete --force {id}", &pair.id);
            parent.contains("runc").to_string()
        });
        assert_eq!(seen, comes.to_string(), "{flag}");
    }
}

/// How a program takes signals. Without 32 and 33, which are glibc's, and ignored in what it spawns.
const SIGNALS: [&str; 4] = ["/bin/busybox", "grep", "^Sig[BI][lg][kn]", "/proc/self/status"];

#[test]
fn no_signal_is_blocked_or_ignored_in_what_is_started() {
    let pair = Pair::new(&SIGNALS);
    let masks = |text: &str| {
        let of = |line: &str| u64::from_str_radix(line.split_whitespace().nth(1).unwrap(), 16).unwrap();
        let masks: Vec<u64> = text.lines().map(|line| of(line) & !(3 << 31)).collect();
        format!("{masks:?}")
    };
    let first = same(&pair, |side| masks(&ok(side, "run -b {b} {id}", &pair.id)));
    assert_eq!(first, "[0, 0]");
    pair.edit(|config| config["process"]["args"] = json!(SLEEP));
    pair.both_ok("run -d -b {b} {id}");
    let line = format!("exec {{id}} {}", SIGNALS.join(" "));
    assert_eq!(same(&pair, |side| masks(&ok(side, &line, &pair.id))), "[0, 0]");
}

/// What is known of a process by its status.
fn status(side: &Side, line: &str, id: &str, names: &[&str]) -> String {
    let text = ok(side, line, id);
    let wanted = |line: &&str| names.iter().any(|name| line.starts_with(&format!("{name}:")));
    text.lines().filter(wanted).collect::<Vec<_>>().join("\n")
}

#[test]
fn an_exec_gains_nothing_when_told_so() {
    let pair = Pair::new(SLEEP);
    for asked in [false, true] {
        pair.edit(|config| config["process"]["noNewPrivileges"] = json!(asked));
        pair.both_ok("run -d -b {b} {id}");
        for (flag, has) in [("", asked), ("--no-new-privs", true), ("--no-new-privs=false", false)] {
            let line = format!("exec {flag} {{id}} cat /proc/self/status");
            let seen = same(&pair, |side| status(side, &line, &pair.id, &["NoNewPrivs"]));
            assert_eq!(seen, format!("NoNewPrivs:\t{}", i32::from(has)), "{flag}");
        }
        pair.both_ok("delete --force {id}");
    }
}

/// Where capabilities are honored; else root of a machine has all.
#[test]
fn an_exec_has_the_capabilities_that_are_added() {
    let pair = Pair::new(SLEEP);
    let few = json!(["CAP_KILL", "CAP_NET_BIND_SERVICE", "CAP_CHOWN"]);
    pair.edit(|config| {
        config["process"]["capabilities"] = json!({"bounding": few, "effective": few, "permitted": few});
    });
    pair.ours.bundle.edit(|config| {
        config["process"]["env"].as_array_mut().unwrap().push(json!("SYSBOX_HONOR_CAPS=TRUE"));
    });
    pair.both_ok("run -d -b {b} {id}");
    let sets = ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"];
    for flags in [
        "",
        "-c CAP_NET_ADMIN",
        "--cap CAP_NET_ADMIN --cap CAP_SYS_TIME",
        "-u 7",
        "-u 7 -c CAP_NET_ADMIN",
        "-c CAP_NET_ADMIN --no-new-privs=false",
    ] {
        let line = format!("exec {flags} {{id}} cat /proc/self/status");
        same(&pair, |side| format!("{flags}\n{}", status(side, &line, &pair.id, &sets)));
    }
}

#[test]
fn an_exec_has_directory_user_groups_and_environment_as_said() {
    let pair = Pair::new(SLEEP);
    pair.edit(|config| {
        config["process"]["user"] = json!({"uid": 3, "gid": 4, "additionalGids": [5, 6]});
        config["process"]["cwd"] = json!("/bin");
        config["process"]["env"] = json!(["PATH=/bin", "A=container"]);
    });
    pair.both_ok("run -d -b {b} {id}");
    let document = json!({
        "args": ["/bin/sh", "-c", "pwd; id; /bin/busybox env"],
        "cwd": "/proc",
        "user": {"uid": 11, "gid": 12, "additionalGids": [13], "umask": 63},
        "env": ["PATH=/bin", "A=document"],
    });
    for side in [&pair.ours, &pair.runcs] {
        fs::write(side.dir.join("p.json"), document.to_string()).unwrap();
    }
    for flags in [
        "",
        "--cwd /proc",
        "-e A=1 -e A=2 -e B=",
        "-e HOME=/bin",
        "--user 0",
        "--user 7:8 --additional-gids 9 --additional-gids 10",
        "-g 20 -g 21",
        "-e HOME= --cwd /",
    ] {
        let line = format!("exec {flags} {{id}} /bin/sh -c pwd;id;/bin/busybox~env;umask");
        let seen = same(&pair, |side| ok(side, &line, &pair.id));
        assert!(seen.contains("uid="), "{seen}");
    }
    let seen = same(&pair, |side| ok(side, "exec --process {d}/p.json {id}", &pair.id));
    assert!(seen.starts_with("/proc\nuid=11 gid=12 groups=13\n") && seen.contains("A=document"), "{seen}");
    // Not by way of a shell, which takes a variable that is there twice for one.
    for flags in ["-e A=1 -e B=2 -e A=3", "-e HOME=/x -e HOME=", "-e =x", "-e A", "-e A=1 -e ''"] {
        let line = format!("exec {flags} {{id}} /bin/busybox env");
        same(&pair, |side| format!("{:?}", side.say(&line, &pair.id)));
    }
    // The document says all: other flags are not looked at.
    let seen = same(&pair, |side| ok(side, "exec --cwd / -u 5 -e A=1 -p {d}/p.json {id} other", &pair.id));
    assert!(seen.starts_with("/proc\nuid=11"), "{seen}");
}

#[test]
fn an_exec_in_a_paused_container_waits_if_told_to_ignore_that() {
    let pair = Pair::new(SLEEP);
    pair.both_ok("run -d -b {b} {id}");
    let seen = same(&pair, |side| {
        ok(side, "pause {id}", &pair.id);
        let refused = side.say("exec {id} echo ran", &pair.id);
        let mut waiting = begin(side, "exec --ignore-paused {id} echo ran", &pair.id, "waiting");
        // It is in the cgroup, and frozen there.
        let pids = || ok(side, "ps -f json {id}", &pair.id).matches(',').count();
        eventually("it is inside", || pids() > 0);
        assert!(waiting.try_wait().unwrap().is_none());
        ok(side, "resume {id}", &pair.id);
        let code = waiting.wait().unwrap().code();
        format!(
            "{} {} {code:?} {}",
            refused.code,
            refused.err,
            fs::read_to_string(side.dir.join("waiting")).unwrap()
        )
    });
    assert!(seen.ends_with("Some(0) ran\n"), "{seen}");
}

/// The directories of a process's cgroups below those of its container's, and what of the container's they are.
#[test]
fn an_exec_runs_in_a_cgroup_below_the_containers() {
    let pair = Pair::new(SLEEP);
    // An engine inside makes such; here its place is made from outside, on one hierarchy and on all that there are.
    pair.edit(|config| {
        config["mounts"].as_array_mut().unwrap().retain(|mount| mount["destination"] != "/sys/fs/cgroup");
        let cgroup =
            json!({"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup", "options": ["rw"]});
        config["mounts"].as_array_mut().unwrap().push(cgroup);
    });
    pair.both_ok("run -d -b {b} {id}");
    let made =
        "exec {id} /bin/sh -c mkdir~/sys/fs/cgroup/pids/x~/sys/fs/cgroup/memory/x~/sys/fs/cgroup/memory/y";
    pair.both_ok(made);
    for (flags, places) in [
        ("--cgroup pids:x", "pids:/x memory:"),
        ("--cgroup pids:x --cgroup memory:y", "pids:/x memory:/y"),
        ("--cgroup pids,memory:x", "pids:/x memory:/x"),
    ] {
        let line = format!("exec {flags} {{id}} cat /proc/self/cgroup");
        let seen = same(&pair, |side| {
            let text = ok(side, &line, &pair.id);
            let of = |name: &str| {
                let line = text.lines().find(|line| {
                    line.split(':').nth(1).is_some_and(|all| all.split(',').any(|one| one == name))
                });
                let path = line.unwrap().rsplit(':').next().unwrap();
                if path.ends_with("/x") || path.ends_with("/y") {
                    path[path.len() - 2..].to_owned()
                } else {
                    String::new()
                }
            };
            format!("pids:{} memory:{}", of("pids"), of("memory"))
        });
        assert_eq!(seen, places);
    }
}

#[test]
fn labels_and_profiles_that_a_machine_has_not_are_refused_as_by_runc() {
    let pair = Pair::new(SLEEP);
    pair.both_ok("run -d -b {b} {id}");
    for (flags, why) in [("--process-label x", "selinux"), ("--apparmor nope", "AppArmor is not enabled")] {
        let (ours, runcs) = pair.both(&format!("exec {flags} {{id}} true"));
        assert_eq!((ours.code, runcs.code), (255, 255), "{ours:?} {runcs:?}");
        assert!(ours.err.contains(why), "{ours:?}");
    }
}

#[test]
fn a_container_has_each_variable_once_and_none_without_a_name() {
    let pair = Pair::new(&["/bin/busybox", "env"]);
    for (env, said) in [
        (["PATH=/bin", "A=1", "B=2", "A=3"], "B=2\\nA=3\\n"),
        (["PATH=/bin", "A", "B=", "C="], "missing '='"),
        (["PATH=/bin", "=x", "B=", "C="], "name cannot be empty"),
        (["PATH=/bin", "HOME=/x", "B=", "HOME="], "HOME=/\\n"),
    ] {
        pair.edit(|config| config["process"]["env"] = json!(env));
        let seen = same(&pair, |side| format!("{:?}", side.say("run -b {b} {id}", &pair.id)));
        assert!(seen.contains(said), "{seen}");
    }
}

/// Rust's parser would take its elements for the members, in an order that nobody has written down.
#[test]
fn an_array_where_an_object_belongs_is_refused_by_both() {
    let pair = Pair::new(SLEEP);
    pair.both_ok("run -d -b {b} {id}");
    for side in [&pair.ours, &pair.runcs] {
        fs::write(side.dir.join("process.json"), r#"{"args":["true"],"cwd":"/","user":[0,0]}"#).unwrap();
        fs::write(side.dir.join("limits.json"), r#"{"pids":[99]}"#).unwrap();
    }
    pair.edit(|config| config["mounts"][0] = json!(["/proc", "proc", "proc", []]));
    for (line, place) in [
        ("create -b {b} {id}x", "/mounts/0"),
        ("exec -p {d}/process.json {id}", "/process/user"),
        ("update -r {d}/limits.json {id}", "/linux/resources/pids"),
    ] {
        let (ours, runcs) = pair.both(line);
        assert_eq!(ours.code, runcs.code, "{line}: {ours:?} {runcs:?}");
        assert!(ours.code != 0 && ours.err.contains(place), "{line}: {ours:?}");
    }
}
