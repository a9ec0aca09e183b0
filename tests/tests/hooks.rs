//! The six hooks: when they run, in which namespaces, what they are told, and what a failing one fails; beside runc.

#![allow(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use sysbox_tests::beside::{Pair, Side};
use sysbox_tests::runtime::{Said, eventually};

const TIMES: [&str; 6] =
    ["prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop"];

/// What a hook writes down of itself: the state that it is given, where it is, which namespaces it has.
const TELL: &str = r#"{ echo "{\"time\": \"$1\", \"a\": \"$A\", \"home\": \"${HOME-none}\", \"cwd\": \"$(pwd)\","
for ns in mnt net user pid; do echo "\"$ns\": \"$(readlink /proc/self/ns/$ns)\","; done
echo "\"state\": $(cat)}"; } >>"$2""#;

fn hook(time: &str, file: &Path, script: &str) -> Value {
    json!([{"path": "/bin/sh", "args": ["sh", "-c", script, "hook", time, file], "env": ["A=1", "PATH=/bin:/usr/bin"]}])
}

/// Adds to both bundles all hooks that write to a file; the startContainer hook has its own inside.
fn with_hooks(pair: &Pair) -> [PathBuf; 2] {
    [&pair.ours, &pair.runcs].map(|side| {
        let file = side.dir.join("told");
        let inside = side.bundle.rootfs().join("told");
        for path in [&file, &inside] {
            fs::write(path, "").unwrap();
            fs::set_permissions(path, fs::Permissions::from_mode(0o666)).unwrap();
        }
        std::os::unix::fs::symlink("busybox", side.bundle.rootfs().join("bin/readlink")).unwrap();
        std::os::unix::fs::symlink("busybox", side.bundle.rootfs().join("bin/pwd")).unwrap();
        // Both runtimes look for the file of the createContainer hook with the container's eyes.
        fs::set_permissions(&side.dir, fs::Permissions::from_mode(0o755)).unwrap();
        side.bundle.edit(|config| {
            for time in TIMES {
                let file = if time == "startContainer" { Path::new("/told") } else { &file };
                config["hooks"][time] = hook(time, file, TELL);
            }
            config["annotations"] = json!({"org.test": "yes"});
            config["ociVersion"] = json!("1.0.2");
        });
        file
    })
}

/// The records so far; those of the container's own file come where its hook ran.
fn told(side: &Side) -> Vec<Value> {
    let read = |path: PathBuf| {
        let text = fs::read_to_string(&path).unwrap();
        serde_json::Deserializer::from_str(&text)
            .into_iter::<Value>()
            .map_while(Result::ok) // one may be half written
            .collect::<Vec<_>>()
    };
    let mut all = read(side.dir.join("told"));
    all.extend(read(side.bundle.rootfs().join("told")));
    all.sort_by_key(|record| TIMES.iter().position(|time| record["time"] == *time));
    all
}

fn times(side: &Side) -> Vec<String> {
    told(side).iter().map(|record| record["time"].as_str().unwrap().to_owned()).collect()
}

#[test]
fn hooks_run_at_their_times_in_their_namespaces_with_the_state() {
    let pair = Pair::new(&["/bin/sleep", "1000"]);
    with_hooks(&pair);
    let own = |kind: &str| fs::read_link(format!("/proc/self/ns/{kind}")).unwrap().display().to_string();

    pair.both_ok("create -b {b} {id}");
    assert_eq!(times(&pair.ours), TIMES[..3]);
    // runc runs poststart hooks when it has created; the specification says after the program was started.
    assert_eq!(times(&pair.runcs), ["prestart", "createRuntime", "createContainer", "poststart"]);
    let pid = |side: &Side| {
        let state: Value = serde_json::from_str(&side.say("state {id}", &pair.id).out).unwrap();
        state["pid"].clone()
    };
    let (ours, runcs) = (pid(&pair.ours), pid(&pair.runcs));
    pair.both_ok("start {id}");
    // A start does not wait for what init does then.
    for side in [&pair.ours, &pair.runcs] {
        eventually("all hooks but the last have run", || times(side) == TIMES[..5]);
    }
    pair.both_ok("delete -f {id}");
    assert_eq!(times(&pair.ours), TIMES);
    assert_eq!(times(&pair.runcs), TIMES);

    for (record, of_runc) in told(&pair.ours).iter().zip(told(&pair.runcs)) {
        let time = record["time"].as_str().unwrap();
        let inside = ["createContainer", "startContainer"].contains(&time);
        let (state, other) = (&record["state"], &of_runc["state"]);
        // As runc, but for poststart, which comes later here.
        let status = if time == "poststart" { &json!("running") } else { &other["status"] };
        assert_eq!(&state["status"], status, "{record} {of_runc}");
        // The runtime's, whatever the bundle says.
        assert_eq!(
            (&state["ociVersion"], &other["ociVersion"]),
            (&json!("1.2.0"), &json!("1.2.1")),
            "{time}"
        );
        for key in ["id", "annotations"] {
            assert_eq!(state[key], other[key], "{time}: {key}: {record} {of_runc}");
        }
        assert_eq!(state["bundle"], json!(pair.ours.bundle.dir), "{record}");
        let expected = match time {
            "poststop" => json!(null),
            // By its own eyes, as runc tells it.
            _ if inside => json!(1),
            _ => ours.clone(),
        };
        let other_pid = if other["pid"] == runcs { ours.clone() } else { other["pid"].clone() };
        let pid = state.get("pid").cloned().unwrap_or_default();
        assert!(pid == expected || pid == other_pid, "{time}: pid {pid}: {record} {of_runc}");
        for (key, value) in [("a", "1"), ("home", "none")] {
            assert_eq!(record[key], value, "{time}: {key}");
            assert_eq!(record[key], of_runc[key], "{time}: {key}");
        }
        for kind in ["net", "pid"] {
            assert_eq!(record[kind] != own(kind), inside, "{time}: {kind}: {record}");
            assert_eq!(of_runc[kind] != own(kind), inside, "{time}: {kind}: {of_runc}");
        }
        assert_eq!(record["user"] != own("user"), inside, "{time}: {record}");
        let cwd = |record: &Value, side: &Side| {
            let cwd = record["cwd"].as_str().unwrap().replace(&side.bundle.dir.display().to_string(), "{b}");
            cwd.replace(&side.dir.display().to_string(), "{d}")
        };
        let (here, there) = (cwd(record, &pair.ours), cwd(&of_runc, &pair.runcs));
        match time {
            // runc has gone to the root file system by then.
            "createContainer" => assert_eq!((here.as_str(), there.as_str()), ("{b}", "{b}/rootfs")),
            _ => assert_eq!(here, there, "{time}"),
        }
    }
}

#[test]
fn hooks_of_the_runtime_are_in_the_bundle_with_their_own_arguments_as_with_runc() {
    // As with engines: a bundle that root alone can enter, and no hook in the container's own namespaces.
    let pair = Pair::new(&["/bin/true"]);
    let script = r#"{ pwd; echo "$0" "$@"; tr '\0' '+' </proc/$$/cmdline; env | sort; } >>"$1""#;
    for side in [&pair.ours, &pair.runcs] {
        let file = side.dir.join("told");
        fs::set_permissions(&side.bundle.dir, fs::Permissions::from_mode(0o700)).unwrap();
        side.bundle.edit(|config| {
            for time in TIMES[..2].iter().chain(["poststart", "poststop"].iter()) {
                let args = json!(["a name", "-c", script, "", file, "two words", "", "-c"]);
                config["hooks"][time] =
                    json!([{"path": "/bin/sh", "args": args, "env": ["PATH=/bin:/usr/bin", "A=a b"]}]);
            }
        });
    }
    pair.both_ok("run -b {b} {id}");
    let [ours, runcs] = [&pair.ours, &pair.runcs].map(|side| {
        let told = fs::read_to_string(side.dir.join("told")).unwrap();
        told.replace(&side.bundle.dir.display().to_string(), "{b}")
            .replace(&side.dir.display().to_string(), "{d}")
    });
    assert_eq!(ours.matches("\nPWD={b}\n").count(), 4, "{ours}");
    assert_eq!(ours, runcs);
}

/// `run` in the foreground blocks all signals for itself.
#[test]
fn hooks_have_no_signal_blocked_as_with_runc() {
    let pair = Pair::new(&["true"]);
    let files = with_hooks(&pair);
    for (side, file) in [&pair.ours, &pair.runcs].into_iter().zip(&files) {
        let script = "echo $1 $(grep SigBlk /proc/self/status) >>$2";
        side.bundle.edit(|config| {
            config["hooks"] = json!({});
            for time in ["prestart", "createRuntime", "poststart", "poststop"] {
                config["hooks"][time] = hook(time, file, script);
            }
        });
    }
    pair.both_ok("run -b {b} {id}");
    let masks = files.map(|file| fs::read_to_string(file).unwrap());
    assert_eq!(masks[0], masks[1]);
    assert_eq!(masks[0].matches("SigBlk: 0000000000000000").count(), 4, "{}", masks[0]);
}

#[test]
fn a_failing_hook_fails_what_it_fails_with_runc_and_leaves_nothing() {
    let pair = Pair::new(&["/bin/sleep", "1000"]);
    let fail = json!([{"path": "/bin/sh", "args": ["sh", "-c", "echo why >&2; exit 3"]}]);
    for (n, time) in TIMES[..3].iter().enumerate() {
        pair.edit(|config| config["hooks"] = json!({*time: fail}));
        for (verb, at) in [("create", "c"), ("run", "r")] {
            let (ours, runcs) = pair.both(&format!("{verb} -b {{b}} {{id}}{n}{at}"));
            assert_eq!(ours.code, runcs.code, "{verb} {time}: {ours:?} {runcs:?}");
            assert_eq!(ours.code, 1, "{ours:?}");
            let said = format!(
                "runc {verb} failed: unable to start container process: error during container init: "
            );
            assert!(ours.err.contains(&said) && runcs.err.contains(&said), "{ours:?} {runcs:?}");
            assert!(ours.err.contains("hook") && ours.err.contains('3'), "{ours:?}");
            assert_eq!(pair.machine.remains(&format!("{}{n}{at}", pair.id)), Vec::<String>::new());
        }
        assert_eq!(pair.ours.say("list -q", "").out, "");
    }
}

#[test]
fn failing_hooks_of_later_times_fail_what_they_fail_with_runc() {
    let pair = Pair::new(&["/bin/sleep", "1000"]);
    let fail = json!([{"path": "/bin/sh", "args": ["sh", "-c", "echo why; exit 3"]}]);
    let mut next = 0;
    let mut script = |time: &str, lines: &[&str]| {
        pair.edit(|config| config["hooks"] = json!({time: fail}));
        next += 1;
        let id = format!("{}{next}", pair.id);
        for line in lines {
            if *line == "@stopped" {
                for side in [&pair.ours, &pair.runcs] {
                    eventually("it ends", || side.say("state {id}", &id).out.contains("\"stopped\""));
                }
                continue;
            }
            let (ours, runcs) = (pair.ours.say(line, &id), pair.runcs.say(line, &id));
            // A container that ends tells its own standard error, which is that of the create.
            let word = |said: &Said| {
                said.err.contains("startContainer hook").then(String::new).unwrap_or(said.err.clone())
            };
            assert_eq!((ours.code, word(&ours)), (runcs.code, word(&runcs)), "{time}: {line}");
        }
    };
    script("startContainer", &["create -b {b} {id}", "start {id}", "@stopped", "delete {id}"]);
    script("poststart", &["run -d -b {b} {id}", "state {id}"]);
    script("poststop", &["run -d -b {b} {id}", "kill {id} KILL", "@stopped", "delete {id}", "state {id}"]);
    script("poststop", &["create -b {b} {id}", "delete -f {id}", "state {id}"]);
    // In runc a start has no poststart hooks left to run.
    pair.edit(|config| config["hooks"] = json!({"poststart": fail}));
    let id = format!("{}p", pair.id);
    assert_eq!(pair.ours.say("create -b {b} {id}", &id).code, 0);
    let said = pair.ours.say("start {id}", &id);
    assert_eq!(said.code, 1);
    assert!(said.err.contains("error running poststart hook #0: exit status 3, stdout: why"), "{said:?}");
    eventually("it ends", || pair.ours.say("state {id}", &id).out.contains("\"stopped\""));
}

#[test]
fn a_hook_that_takes_too_long_is_ended() {
    let pair = Pair::new(&["/bin/sleep", "1000"]);
    let slow = json!([{"path": "/bin/sleep", "args": ["sleep", "1000"], "timeout": 1}]);
    for (n, time) in TIMES[..2].iter().enumerate() {
        pair.edit(|config| config["hooks"] = json!({*time: slow}));
        let (ours, runcs) = pair.both(&format!("create -b {{b}} {{id}}{n}"));
        assert_eq!((ours.code, runcs.code), (1, 1), "{ours:?} {runcs:?}");
        assert!(ours.err.contains("timeout") && runcs.err.contains("timeout"), "{ours:?} {runcs:?}");
        assert_eq!(pair.machine.remains(&format!("{}{n}", pair.id)), Vec::<String>::new());
    }
}
