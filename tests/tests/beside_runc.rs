//! The same command lines, given to runc and to sysbox-runc: exit codes, standard output and error messages are the same,
//! and what is not stands here with its reason. runc is the oracle: no answer of its is written down.

use std::fs;

use serde_json::Value;
use sysbox_tests::beside::{Pair, shape};
use sysbox_tests::runtime::{Said, eventually};

/// How the two answers are to agree.
#[derive(Debug, Clone, Copy)]
enum Like {
    /// Exit code, standard output and standard error.
    Same,
    /// Exit code and the first line of a help that has runc's sections and flags.
    Help,
    /// Exit code, and JSON of one shape.
    Shape,
    /// The exit code; ours says this in words of its own, for this reason.
    Code(&'static str, &'static str),
    /// Not even that: our exit code, words, and the reason.
    Differs(i32, &'static str, &'static str),
}

use Like::{Code, Differs, Help, Same, Shape};

/// Runs a script line by line; all disagreements are told at once.
#[track_caller]
fn check(args: &[&str], script: &[(&str, Like)]) {
    let pair = Pair::new(args);
    check_on(&pair, script);
}

#[track_caller]
fn check_on(pair: &Pair, script: &[(&str, Like)]) {
    let mut wrong = Vec::new();
    for (line, like) in script {
        if let Some(status) = line.strip_prefix('@') {
            for side in [&pair.ours, &pair.runcs] {
                eventually(&format!("{side:?} is {status}"), || {
                    side.say("state {id}", &pair.id).out.contains(&format!("\"status\": \"{status}\""))
                });
            }
            continue;
        }
        let (ours, runcs) = pair.both(line);
        if let Some(why) = disagreement(*like, &ours, &runcs) {
            wrong.push(format!("{line}: {why}\n  ours  {ours:?}\n  runc's {runcs:?}"));
        }
    }
    assert!(wrong.is_empty(), "\n{}", wrong.join("\n"));
}

fn disagreement(like: Like, ours: &Said, runcs: &Said) -> Option<String> {
    let all = |said: &Said| (said.code, said.out.clone(), said.err.trim_end().to_owned());
    let agree = all(ours) == all(runcs);
    let what = match like {
        Same if agree => return None,
        Same => "not the same".to_owned(),
        Help => return help_disagreement(ours, runcs),
        Shape => {
            let documents = |said: &Said| -> Vec<Value> {
                said.out.lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
            };
            let whole = |said: &Said| serde_json::from_str::<Value>(&said.out).map(|found| vec![found]);
            let shapes = |said: &Said| {
                whole(said).unwrap_or_else(|_| documents(said)).iter().map(shape).collect::<Vec<_>>()
            };
            let (a, b) = (shapes(ours), shapes(runcs));
            if ours.code == runcs.code && a == b && !a.is_empty() {
                return None;
            }
            format!("other shapes: {a:?} {b:?}")
        }
        Code(..) | Differs(..) if agree => "an exception that is not needed any more".to_owned(),
        Code(said, _) if ours.code == runcs.code && ours.err.contains(said) => return None,
        Differs(code, said, _) if ours.code == code && format!("{}{}", ours.out, ours.err).contains(said) => {
            return None;
        }
        Code(_, why) | Differs(_, _, why) => format!("the exception ({why}) does not hold"),
    };
    Some(what)
}

/// The words of help are our own; its first line, its sections and its flags are runc's.
fn help_disagreement(ours: &Said, runcs: &Said) -> Option<String> {
    let marks = |said: &Said| -> Vec<String> {
        let line = |line: &str| match line.trim() {
            // `--bundle value, -b value  …`
            flag if flag.starts_with("--") => Some(flag.split("  ").next()?.to_owned()),
            head @ ("NAME:" | "USAGE:" | "OPTIONS:" | "GLOBAL OPTIONS:" | "COMMANDS:") => {
                Some(head.to_owned())
            }
            _ => None,
        };
        said.out.lines().filter_map(line).collect()
    };
    let first = |said: &Said| said.out.lines().next().unwrap_or_default().to_owned();
    if (ours.code, first(ours), ours.err.trim_end()) != (runcs.code, first(runcs), runcs.err.trim_end()) {
        return Some("another code, first line or error".to_owned());
    }
    let own = marks(ours);
    let missing: Vec<String> = marks(runcs).into_iter().filter(|mark| !own.contains(mark)).collect();
    (!missing.is_empty()).then(|| format!("the help lacks {missing:?}"))
}

const SLEEP: &[&str] = &["/bin/sleep", "1000"];

#[test]
fn misuse_is_told_alike() {
    check(
        SLEEP,
        &[
            ("state", Help),
            ("state a b", Help),
            ("state --nope a", Help),
            ("state a --nope", Help),
            ("state ---x a", Help),
            ("delete --force=maybe a", Help),
            ("create --bundle", Help),
            ("create -b x --bundle y a", Help),
            ("create --preserve-fds many a", Help),
            ("run", Help),
            ("run a b", Help),
            ("exec", Help),
            ("exec -g x a ls", Help),
            ("exec --nope a ls", Help),
            ("kill", Help),
            ("kill a b c", Help),
            ("list a", Help),
            ("ps", Help),
            ("pause", Help),
            ("resume a b", Help),
            ("start", Help),
            ("update", Help),
            ("update --pids-limit x a", Help),
            ("update --blkio-weight x a", Help),
            ("events", Help),
            ("events --interval 5 a", Help),
            ("spec a", Help),
            ("features a", Help),
            ("fly", Same),
            ("help fly", Same),
            ("--root / list", Same),
            ("--root /x/.. list", Same),
            ("--log-format xml list", Same),
            ("--log /nowhere/x list", Code("--log: ", "names the flag")),
        ],
    );
}

#[test]
fn help_has_the_sections_and_flags_of_runcs() {
    let script: Vec<(String, Like)> = [
        "create", "delete", "events", "exec", "kill", "list", "pause", "ps", "resume", "run", "spec",
        "start", "state", "update", "features",
    ]
    .iter()
    .flat_map(|verb| {
        // The first line is `NAME:`, the name in it is the program's.
        ["{verb} --help", "{verb} -h", "help {verb}", "h {verb}"]
            .map(|line| (line.replace("{verb}", verb), Help))
    })
    .collect();
    let lines: Vec<(&str, Like)> = script.iter().map(|(line, like)| (line.as_str(), *like)).collect();
    check(SLEEP, &lines);
}

/// A root that is not there is an error to runc's `list`, in spite of what its source means to do.
const NO_ROOT: &str = "a root that is not there has no containers";

#[test]
fn ids_that_are_none_and_containers_that_are_not_there() {
    let nobody = ["delete", "kill", "pause", "resume", "start", "state", "update", "events --stats", "ps"];
    let lines: Vec<String> = nobody
        .iter()
        .flat_map(|verb| ["nobody", "''", "..", "a/b", "a~b"].map(|id| format!("{verb} {id}")))
        .collect();
    let mut script: Vec<(&str, Like)> = lines.iter().map(|line| (line.as_str(), Same)).collect();
    script.extend([
        ("exec nobody ls", Same),
        ("exec '' ls", Same),
        ("exec .. ls", Same),
        ("delete --force nobody", Same),
        ("delete -f nobody", Same),
        ("delete nobody -f", Same),
        ("delete nobody --force=true", Same),
        ("delete -force nobody", Same),
        ("kill --all nobody KILL", Same),
        ("kill nobody NOPE", Same),
        ("list", Differs(0, "", NO_ROOT)),
        ("list -q", Differs(0, "", NO_ROOT)),
        ("list -f json", Differs(0, "", NO_ROOT)),
        ("list --format=json", Differs(0, "", NO_ROOT)),
        ("list -f yaml", Code("invalid format option", NO_ROOT)),
        ("list --quiet --format yaml", Differs(0, "", NO_ROOT)),
        ("create -b /nowhere {id}", Same),
        ("create -b {d} {id}", Same),
        ("create -b {b} ''", Same),
        ("create -b {b} a/b", Same),
        ("run -b /nowhere {id}", Same),
        ("run {id}", Same),
    ]);
    check(SLEEP, &script);
}

#[test]
fn a_life_of_a_container() {
    check(
        SLEEP,
        &[
            ("create -b {b} {id}", Same),
            ("create -b {b} {id}", Same),
            ("run -b {b} {id}", Same),
            ("state {id}", Shape),
            ("list -f json", Shape),
            ("list -q", Same),
            ("pause {id}", Same),
            ("start {id}", Same),
            ("delete {id}", Same),
            ("resume {id}", Same),
            ("resume {id}", Same),
            ("start {id}", Same),
            ("start {id}", Same),
            ("state {id}", Shape),
            ("ps {id} -o pid,comm -q 1", Same),
            ("ps --format yaml {id}", Same),
            ("ps {id} -o comm", Same),
            ("ps {id} --nope", Same),
            ("ps -f json {id}", Shape),
            ("delete {id}", Same),
            ("kill {id} NOPE", Same),
            ("kill {id} 99", Same),
            ("kill {id} 0", Same),
            ("pause {id}", Same),
            ("pause {id}", Same),
            ("exec {id} /bin/true", Same),
            ("resume {id}", Same),
            ("kill {id} KILL", Same),
            ("@stopped", Same),
            ("state {id}", Shape),
            ("list -f json", Shape),
            ("kill {id}", Same),
            ("kill -a {id}", Same),
            ("kill --all=true {id} KILL", Same),
            ("pause {id}", Same),
            ("resume {id}", Same),
            ("start {id}", Same),
            ("exec {id} /bin/true", Same),
            ("update --memory 1g {id}", Same),
            ("events --stats {id}", Same),
            ("ps -f json {id}", Code("", "an empty list is `[]`, runc's `null`")),
            ("create -b {b} {id}", Same),
            ("delete {id}", Same),
            ("delete {id}", Same),
        ],
    );
}

const DIRECTORY: Like =
    Code("is a directory: permission denied", "engines before Docker 23 know exit code 126 by these words");

#[test]
fn programs_that_cannot_be_run() {
    let pair = Pair::new(&["/bin/nope"]);
    check_on(&pair, &[("run -b {b} {id}", Same), ("create -b {b} {id}", Same), ("list -q", Same)]);
    for side in [&pair.ours, &pair.runcs] {
        fs::create_dir_all(side.bundle.rootfs().join("etc")).unwrap();
    }
    for (args, like) in [
        (&["nope"][..], Same),
        (&["/etc"], DIRECTORY),
        (&["/bin/busybox", "false"], Same),
        (&["/bin/sh", "-c", "exit 7"], Same),
        (&["/bin/sh", "-c", "kill -9 $$"], Same),
    ] {
        pair.edit(|config| config["process"]["args"] = args.into());
        check_on(&pair, &[("run -b {b} {id}", like), ("state {id}", Same)]);
    }
    pair.edit(|config| {
        config["process"]["args"] = SLEEP.into();
        config["process"]["cwd"] = "here".into();
    });
    check_on(
        &pair,
        &[("run -b {b} {id}", Code("/process/cwd", "a fault in config.json is named by its JSON pointer"))],
    );
    pair.edit(|config| config["process"]["cwd"] = "/bin/sh".into());
    check_on(
        &pair,
        &[("run -b {b} {id}", Code("/bin/sh", "the directory is made, or is in the way, in our words"))],
    );
    pair.edit(|config| {
        config["process"]["cwd"] = "/".into();
        config["process"]["args"] = Value::Array(Vec::new());
    });
    check_on(
        &pair,
        &[("run -b {b} {id}", Code("/process/args", "a fault in config.json is named by its JSON pointer"))],
    );
    for side in [&pair.ours, &pair.runcs] {
        fs::write(side.bundle.dir.join("config.json"), "{").unwrap();
    }
    check_on(
        &pair,
        &[("run -b {b} {id}", Code("config.json", "a fault in config.json is named by file and place"))],
    );
}

#[test]
fn later_processes() {
    let pair = Pair::new(SLEEP);
    pair.both_ok("run -d --pid-file {d}/pid -b {b} {id}");
    for side in [&pair.ours, &pair.runcs] {
        let of = |text: &str, terminal: bool| {
            format!(
                "{{\"args\":[{text}],\"cwd\":\"/\",\"terminal\":{terminal},\"user\":{{\"uid\":0,\"gid\":0}},\"env\":[\"PATH=/bin\"]}}"
            )
        };
        fs::write(side.dir.join("p.json"), of("\"/bin/sh\",\"-c\",\"echo $0 $PATH; exit 9\"", false))
            .unwrap();
        fs::write(side.dir.join("none.json"), of("", false)).unwrap();
        fs::write(side.dir.join("bad.json"), "{").unwrap();
    }
    check_on(
        &pair,
        &[
            ("exec {id} echo a", Same),
            ("exec {id} /bin/sh -c exit~7", Same),
            ("exec {id} -- echo a", Same),
            ("exec -- {id} echo a", Same),
            ("exec {id}", Same),
            ("exec {id} nope", Same),
            ("exec {id} /nope", Same),
            ("exec {id} /proc", DIRECTORY),
            ("exec {id} /bin/sh -c kill~-9~$$", Same),
            ("exec --cwd /bin {id} /bin/sh -c pwd", Same),
            ("exec --cwd bin {id} /bin/sh -c pwd", Same),
            ("exec --cwd /nowhere {id} /bin/sh -c pwd", Same),
            ("exec -e A=1 --env=B=2 {id} /bin/sh -c echo~$A~$B", Code("", "two forms of a flag")),
            ("exec -e A=1 -e B=2 {id} /bin/sh -c echo~$A~$B", Same),
            ("exec -u 7:8 -g 9 -g 10 {id} id", Same),
            ("exec -u 7 {id} id", Same),
            ("exec --user x {id} id", Same),
            ("exec --user 7:x {id} id", Same),
            ("exec -g -1 {id} id", Same),
            ("exec -c CAP_NET_ADMIN {id} true", Same),
            ("exec -c CAP_NOPE {id} true", Same),
            ("exec -p {d}/p.json {id}", Same),
            ("exec --process={d}/p.json {id} ignored", Same),
            (
                "exec -p {d}/none.json {id}",
                Code("/args", "a fault in a document is named by its JSON pointer"),
            ),
            (
                "exec -p {d}/bad.json {id}",
                Code("bad.json", "a fault in a document is named by file and place"),
            ),
            ("exec -p {d}/absent.json {id}", Same),
            ("exec -d --pid-file {d}/exec.pid {id} sleep 1000", Same),
            ("exec -t -d {id} true", Same),
            ("exec --console-socket {d}/none {id} true", Same),
            (
                "exec -t -d --console-socket {d}/none {id} true",
                Code("exec failed: ", "the failed connect is told in our words"),
            ),
            (
                "exec --preserve-fds 2 {id} true",
                Differs(255, "unable to stat preserved-fd 0 (of 2)", OWN_DESCRIPTORS),
            ),
            (
                "exec --pidfd-socket {d}/none {id} true",
                Code("--pidfd-socket", "the failed connect is told in our words"),
            ),
            ("exec --process-label x {id} true", Same),
            ("exec --no-new-privs {id} true", Same),
            ("exec --ignore-paused {id} true", Same),
            ("exec --cgroup :x {id} true", Same),
            ("exec --cgroup a --cgroup b {id} true", Same),
            ("exec --cgroup cpu:a --cgroup cpu:b {id} true", Same),
            ("exec --cgroup nope:a {id} true", Same),
            ("exec --cgroup pids:../../x {id} true", Same),
            (
                "exec --cgroup pids:x {id} true",
                Code("x/cgroup.procs", "names the file that is not there in our words"),
            ),
        ],
    );
    for side in [&pair.ours, &pair.runcs] {
        for file in ["pid", "exec.pid"] {
            let text = fs::read_to_string(side.dir.join(file)).unwrap();
            assert!(text.parse::<i32>().is_ok_and(|pid| pid > 1), "{file}: {text:?}");
        }
    }
}

/// runc looks when it has opened descriptors itself.
const OWN_DESCRIPTORS: &str = "runc hands on descriptors of its own where the caller passes none";

#[test]
fn terminals_and_descriptors_that_do_not_fit() {
    let pair = Pair::new(SLEEP);
    // A create of runc's that fails here leaves its directory: each line has an id of its own.
    check_on(
        &pair,
        &[
            ("create --console-socket {d}/none -b {b} {id}1", Same),
            ("run -d --console-socket {d}/none -b {b} {id}2", Same),
            (
                "create --preserve-fds 1 -b {b} {id}3",
                Differs(1, "unable to stat preserved-fd 0 (of 1)", OWN_DESCRIPTORS),
            ),
            (
                "run --preserve-fds=99 -b {b} {id}4",
                Code("unable to stat preserved-fd 0 (of 99)", OWN_DESCRIPTORS),
            ),
        ],
    );
    pair.edit(|config| config["process"]["terminal"] = true.into());
    check_on(
        &pair,
        &[
            ("create -b {b} {id}5", Same),
            ("run -d -b {b} {id}6", Same),
            (
                "create -b {b} --console-socket {d}/none {id}7",
                Code("console socket", "the failed connect is told in our words"),
            ),
        ],
    );
    assert_eq!(pair.ours.say("list -q", "").out, "");
}

#[test]
fn limits_given_badly() {
    let pair = Pair::new(SLEEP);
    pair.both_ok("run -d -b {b} {id}");
    for side in [&pair.ours, &pair.runcs] {
        fs::write(side.dir.join("r.json"), "{\"pids\":{\"limit\":99}}").unwrap();
        fs::write(side.dir.join("bad.json"), "{").unwrap();
    }
    check_on(
        &pair,
        &[
            ("update {id}", Same),
            ("update --memory 1.5g --memory-swap 3GiB {id}", Same),
            ("update --memory 64MiB --memory-swap -1 {id}", Same),
            ("update --memory 1p --memory-swap 2p {id}", Same),
            ("update --memory x {id}", Same),
            ("update --memory 1x {id}", Same),
            ("update --memory -2 {id}", Same),
            ("update --memory -1 {id}", Same),
            ("update --memory-reservation 1..5m {id}", Same),
            ("update --cpu-quota x {id}", Same),
            ("update --cpu-quota -1 {id}", Same),
            ("update --cpu-period -1 {id}", Same),
            ("update --cpu-period 99999999999999999999 {id}", Same),
            ("update --cpu-share 512 {id}", Same),
            ("update --cpu-idle x {id}", Same),
            ("update --cpu-burst x {id}", Same),
            ("update --cpu-rt-period x {id}", Same),
            ("update --cpu-rt-runtime 1e3 {id}", Same),
            ("update --kernel-memory 1g {id}", Same),
            ("update --kernel-memory-tcp x {id}", Same),
            ("update --pids-limit 0x20 {id}", Same),
            ("update --pids-limit 0 {id}", Same),
            ("update --l3-cache-schema L3:0=1 {id}", Same),
            ("update --mem-bw-schema MB:0=1 {id}", Same),
            ("update -r {d}/r.json {id}", Same),
            (
                "update -r {d}/bad.json {id}",
                Code("bad.json", "a fault in a document is named by file and place"),
            ),
            ("update -r {d}/absent {id}", Same),
            ("update {id} --pids-limit 20", Same),
        ],
    );
    for side in [&pair.ours, &pair.runcs] {
        let said = side.say_with("update --resources - {id}", &pair.id, &side.dir.join("r.json"));
        assert_eq!((said.code, said.err.as_str()), (0, ""), "{said:?}");
    }
}

#[test]
fn what_is_printed_has_one_form() {
    let pair = Pair::new(SLEEP);
    pair.edit(|config| config["annotations"] = serde_json::json!({"org.test.a": "1", "b": "two"}));
    pair.both_ok("run -d -b {b} {id}");
    let (ours, runcs) = pair.both_ok("state {id}");
    let (ours, runcs): (Value, Value) =
        (serde_json::from_str(&ours).unwrap(), serde_json::from_str(&runcs).unwrap());
    let names = |document: &Value| document.as_object().unwrap().keys().cloned().collect::<Vec<_>>();
    assert_eq!(names(&ours), names(&runcs));
    assert_eq!(ours["annotations"], runcs["annotations"]);
    let (ours, runcs) = pair.both_ok("list");
    let columns = |text: &str| text.lines().map(|line| line.split_whitespace().count()).collect::<Vec<_>>();
    assert_eq!(columns(&ours), columns(&runcs));
    assert_eq!(
        ours.lines().next().map(|head| head.split_whitespace().collect::<Vec<_>>()),
        runcs.lines().next().map(|head| head.split_whitespace().collect())
    );
    let (ours, runcs) = pair.both_ok("ps {id}");
    assert_eq!(ours.lines().next(), runcs.lines().next());
    assert_eq!((ours.lines().count(), runcs.lines().count()), (2, 2), "{ours}{runcs}");
    let (ours, _) = pair.both_ok("ps {id} -eo pid,comm");
    assert!(ours.lines().nth(1).is_some_and(|line| line.ends_with(" sleep")), "{ours}");
    check_on(
        &pair,
        &[
            ("features", Differs(0, "ociVersionMin", "says what this runtime does")),
            ("spec", Same),
            ("spec", Same),
        ],
    );
    for side in [&pair.ours, &pair.runcs] {
        assert!(side.dir.join("config.json").exists());
    }
    let (ours, runcs) = pair.both_ok("--version");
    let lines =
        |text: &str| text.lines().map(|line| line.split(' ').next().unwrap().to_owned()).collect::<Vec<_>>();
    assert_eq!(lines(&ours)[..], ["sysbox-runc", "spec:"]);
    assert_eq!(lines(&runcs)[..2], ["runc", "spec:"]);
}

#[test]
fn the_log_of_an_engine_has_one_form() {
    let pair = Pair::new(&["/bin/nope"]);
    for (n, (line, format)) in [
        ("state nobody", "json"),
        ("create -b {b} {id}", "json"),
        ("state nobody", "text"),
        ("state", "json"),
        ("fly", "text"),
        ("state --nope", "json"),
    ]
    .into_iter()
    .enumerate()
    {
        let line = format!("--log {{d}}/log{n} --log-format {format} {line}");
        let (ours, runcs) = pair.both(&line);
        assert_eq!((ours.code, ours.err.trim_end()), (runcs.code, runcs.err.trim_end()), "{line}");
        let records = |dir: &std::path::Path| -> Vec<String> {
            let text = fs::read_to_string(dir.join(format!("log{n}"))).unwrap();
            let plain = |line: &str| match serde_json::from_str::<Value>(line) {
                Ok(record) => {
                    let names: Vec<&String> = record.as_object().unwrap().keys().collect();
                    assert!(chrono_like(record["time"].as_str().unwrap()), "{line}");
                    format!("{names:?} {} {}", record["level"], record["msg"].as_str().unwrap().trim_end())
                }
                Err(_) => line.split_once(' ').unwrap().1.replace("\\n\"", "\""),
            };
            text.lines()
                .map(|line| {
                    plain(line)
                        .replace(pair.ours.program().to_str().unwrap(), "{p}")
                        .replace(pair.runcs.program().to_str().unwrap(), "{p}")
                })
                .collect()
        };
        assert_eq!(records(&pair.ours.dir), records(&pair.runcs.dir), "{line}");
    }
}

/// `2026-01-02T03:04:05` and a zone.
fn chrono_like(time: &str) -> bool {
    time.len() >= 20 && time.as_bytes()[10] == b'T' && !time.contains('.')
}

#[test]
fn checkpoint_and_restore_are_refused_by_name() {
    let pair = Pair::new(SLEEP);
    pair.both_ok("run -d -b {b} {id}");
    for (line, said) in [
        ("checkpoint --image-path {d}/image --leave-running {id}", "checkpoint: not supported: "),
        ("restore --image-path {d}/image -b {b} -d other", "restore: not supported: "),
    ] {
        let ours = pair.ours.say(line, &pair.id);
        assert_eq!(ours.code, 1);
        assert!(ours.err.contains(said) && ours.err.lines().count() == 1, "{ours:?}");
    }
    assert!(!pair.ours.dir.join("image").exists());
    assert!(pair.ours.say("state {id}", &pair.id).out.contains("\"running\""));
    assert_eq!(pair.ours.say("list -q", "").out.lines().count(), 1);
}
