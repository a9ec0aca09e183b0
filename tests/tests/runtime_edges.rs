//! Documents at the edge of what an engine writes, and callers that cannot be told: what runc does, beside runc.

#![allow(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

use std::fs;

use serde_json::{Value, json};
use sysbox_tests::beside::Pair;

#[test]
fn an_exec_by_flags_keeps_the_umask_of_the_container() {
    let pair = Pair::new(&["/bin/sleep", "1000"]);
    pair.edit(|config| config["process"]["user"]["umask"] = json!(0o077));
    pair.both_ok("run -d -b {b} {id}");
    for line in ["exec {id} sh -c umask", "exec --user 1000:1000 {id} sh -c umask"] {
        let (ours, runcs) = pair.both_ok(line);
        assert_eq!(runcs, "0077\n");
        assert_eq!(ours, runcs, "{line}");
    }
}

#[test]
fn a_home_is_found_among_names_in_any_encoding() {
    let pair = Pair::new(&["/bin/sh", "-c", "echo $HOME"]);
    for side in [&pair.ours, &pair.runcs] {
        let etc = side.bundle.rootfs().join("etc");
        fs::create_dir_all(&etc).unwrap();
        fs::write(etc.join("passwd"), b"x:x:7:7:Ren\xe9:/x:/bin/sh\nroot:x:0:0:\xff:/rooot:/bin/sh\n")
            .unwrap();
    }
    assert_eq!(pair.both_ok("run -b {b} {id}"), ("/rooot\n".to_owned(), "/rooot\n".to_owned()));
}

#[test]
fn a_program_that_nobody_could_be_told_of_is_ended() {
    let pair = Pair::new(&["/bin/sleep", "1000"]);
    pair.both_ok("run -d -b {b} {id}");
    for option in ["--pid-file", "--pidfd-socket"] {
        let (ours, runcs) = pair.both(&format!("exec -d {option} /nonexistent/x {{id}} sleep 987"));
        assert_eq!((ours.code, runcs.code), (255, 255), "{ours:?} {runcs:?}");
        for side in [&pair.ours, &pair.runcs] {
            sysbox_tests::runtime::eventually(&format!("{option}: {side:?} has one process"), || {
                let listed = side.say("ps -f json {id}", &pair.id);
                serde_json::from_str::<Vec<i32>>(&listed.out).is_ok_and(|pids| pids.len() == 1)
            });
        }
    }
}

#[test]
fn an_environment_without_names_or_values_is_refused() {
    for (env, why) in [("A", "missing '='"), ("=x", "name cannot be empty"), ("", "missing '='")] {
        let pair = Pair::new(&["/bin/true"]);
        let words = format!("invalid environment variable: {why}");
        pair.edit(|config| config["process"]["env"] = json!([env]));
        let (ours, runcs) = pair.both("run -b {b} {id}");
        assert_eq!((ours.code, runcs.code), (1, 1), "{ours:?} {runcs:?}");
        assert!(ours.err.contains(&words) && runcs.err.contains(&words), "{ours:?} {runcs:?}");
    }
    let pair = Pair::new(&["/bin/sleep", "1000"]);
    pair.both_ok("run -d -b {b} {id}");
    let (ours, runcs) = pair.both("exec --env A {id} true");
    assert_eq!((ours.code, runcs.code), (255, 255), "{ours:?} {runcs:?}");
}

#[test]
fn an_empty_path_is_not_the_root() {
    let pair = Pair::new(&["/bin/sh", "-c", "> /written && ls /bin/sh"]);
    pair.edit(|config| {
        config["linux"]["maskedPaths"] = json!([""]);
        config["linux"]["readonlyPaths"] = json!([""]);
    });
    let (ours, runcs) = pair.both_ok("run -b {b} {id}");
    assert_eq!(ours, runcs);
}

/// Every hook's time-out by runc's rules: none is negative, none is over before it began.
#[test]
fn a_hook_has_the_time_that_it_is_given() {
    for time in ["prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop"] {
        for timeout in [0, -1] {
            let pair = with_timeout(time, timeout);
            let lines = ["create -b {b} {id}", "start {id}", "delete -f {id}"];
            let codes: Vec<(i32, i32)> = lines
                .iter()
                .map(|line| pair.both(line))
                .map(|(ours, runcs)| (ours.code, runcs.code))
                .collect();
            // runc runs poststart hooks when it has created.
            if time == "poststart" {
                assert_eq!(codes, [(0, 1), (1, 1), (0, 0)], "{time} {timeout}");
            } else {
                assert!(codes.iter().all(|(ours, runcs)| ours == runcs), "{time} {timeout}: {codes:?}");
            }
            assert_eq!(pair.ours.say("list -q", &pair.id).out, "", "{time} {timeout}");
        }
        // More than any clock reaches; runc takes this one for less than nothing.
        let pair = with_timeout(time, i64::MAX);
        for line in ["create -b {b} {id}", "start {id}", "delete -f {id}"] {
            let ours = pair.ours.say(line, &pair.id);
            assert_eq!(ours.code, 0, "{time}: {line}: {ours:?}");
        }
    }
}

fn with_timeout(time: &str, timeout: i64) -> Pair {
    let pair = Pair::new(&["/bin/sleep", "1000"]);
    pair.edit(|config: &mut Value| {
        config["hooks"] = json!({time: [{"path": "/bin/true", "timeout": timeout}]});
    });
    pair
}
