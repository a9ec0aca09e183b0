//! `events`: figures in runc's form, which are the container's own, and the event of memory that has run out.

use std::fs::{self, File};
use std::process::{Command, Stdio};

use serde_json::{Value, json};
use sysbox_tests::beside::{Pair, shape};
use sysbox_tests::runtime::{Machine, eventually, programs};

/// Fields that are left out when they are zero or empty: which of them are there is the moment's.
const MAY_LACK: &[&str] = &[
    "total",
    "percpu",
    "percpu_kernel",
    "percpu_user",
    "periods",
    "throttledPeriods",
    "throttledTime",
    "cache",
    "usage",
    "max",
    "raw",
    "limit",
    "current",
    "ioServiceBytesRecursive",
    "ioServicedRecursive",
    "psi",
];

fn without_moments(shape: &Value) -> Value {
    match shape {
        Value::Object(fields) => fields
            .iter()
            .filter(|(name, value)| value.is_object() || !MAY_LACK.contains(&name.as_str()))
            .filter(|(name, _)| *name != "raw")
            .map(|(name, value)| (name.clone(), without_moments(value)))
            .collect(),
        other => other.clone(),
    }
}

#[test]
fn figures_have_runcs_form() {
    let pair = Pair::new(&["/bin/sh", "-c", "echo a >/file; while :; do :; done"]);
    pair.both_ok("run -d -b {b} {id}");
    let (ours, runcs) = pair.both_ok("events --stats {id}");
    let [ours, runcs] = [ours, runcs].map(|text| {
        assert_eq!(text.lines().count(), 1, "{text}");
        serde_json::from_str::<Value>(&text).unwrap()
    });
    assert_eq!(without_moments(&shape(&ours)), without_moments(&shape(&runcs)), "{ours}\n{runcs}");
    let names = |value: &Value| value.as_object().unwrap().keys().cloned().collect::<Vec<_>>();
    assert_eq!(names(&ours), names(&runcs));
    assert_eq!(names(&ours["data"]), names(&runcs["data"]));
    let raw = |document: &Value| names(&document["data"]["memory"]["raw"]);
    let (mut own, mut theirs) = (raw(&ours), raw(&runcs));
    own.sort();
    theirs.sort();
    assert_eq!(own, theirs);
    assert_eq!(ours["data"]["memory"]["usage"]["limit"], runcs["data"]["memory"]["usage"]["limit"]);
    assert_eq!(ours["data"]["cpuset"], runcs["data"]["cpuset"]);
    // It is one process that does nothing but use a CPU; those that made it have ended.
    eventually("there is one process", || {
        let (again, _) = pair.both_ok("events --stats {id}");
        serde_json::from_str::<Value>(&again).unwrap()["data"]["pids"]["current"] == 1
    });
    eventually("CPU time grows", || {
        let (again, _) = pair.both_ok("events --stats {id}");
        let again: Value = serde_json::from_str(&again).unwrap();
        let total = |document: &Value| document["data"]["cpu"]["usage"]["total"].as_u64().unwrap_or(0);
        total(&again) > total(&ours)
    });
    for side in [&pair.ours, &pair.runcs] {
        assert_eq!(side.say("events --interval 0 {id}", &pair.id).code, 1);
        let said = side.say("events --interval=0s {id}", &pair.id);
        assert!(said.err.contains("duration interval must be greater than 0"), "{said:?}");
    }
}

#[test]
fn events_tell_figures_and_memory_that_ran_out_until_the_container_ends() {
    let machine = Machine::start();
    let script = "until [ -e /go ]; do sleep 0.1; done; (x=a; while :; do x=$x$x; done); exec sleep 1000";
    let bundle = machine.bundle("b", &["/bin/sh", "-c", script]);
    bundle.edit(|config| {
        config["linux"]["resources"]["memory"] = json!({"limit": 32 << 20, "swap": 32 << 20});
        config["linux"]["resources"]["pids"] = json!({"limit": 77});
    });
    let running = machine.run_detached(&bundle, "c");
    let out = machine.path("events");
    let mut watching = Command::new(programs().join("sysbox-runc"))
        .arg("--root")
        .arg(machine.path("root"))
        .arg("--run-dir")
        .arg(machine.path("run"))
        .args(["events", "--interval", "50ms", "c"])
        .stdin(Stdio::null())
        .stdout(File::create(&out).unwrap())
        .spawn()
        .unwrap();
    let told = |kind: &str| -> Vec<Value> {
        let text = fs::read_to_string(&out).unwrap();
        let all = text.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
        all.filter(|event| event["type"] == kind).collect()
    };
    eventually("figures come again and again", || told("stats").len() > 2);
    let last = told("stats").pop().unwrap();
    assert_eq!(last["id"], "c");
    assert_eq!(last["data"]["memory"]["usage"]["limit"], 32 << 20);
    assert_eq!(last["data"]["pids"]["limit"], 77);
    assert_eq!(told("oom"), Vec::<Value>::new());

    running.exec("touch /go").ok();
    eventually("memory runs out", || !told("oom").is_empty());
    assert_eq!(told("oom")[0], json!({"type": "oom", "id": "c"}));
    running.delete();
    eventually("it ends with the container", || watching.try_wait().unwrap().is_some());
    assert!(watching.wait().unwrap().success());
}
