//! Faults put into a JSON document: in any of its places, by a seed that can be told and given again. Knows JSON, and no
//! meaning of any field.

use serde_json::{Map, Value, json};

/// Numbers by seed (splitmix64): the same ones on every machine.
#[derive(Debug, Clone)]
pub struct Dice(u64);

impl Dice {
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub fn roll(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// Below `count`, which is not 0.
    pub fn below(&mut self, count: usize) -> usize {
        usize::try_from(self.roll() % u64::try_from(count.max(1)).unwrap_or(1)).unwrap_or_default()
    }

    fn of<'a, T>(&mut self, some: &'a [T]) -> &'a T {
        &some[self.below(some.len())]
    }
}

/// Every place of a document, by JSON pointer; the document itself is the first.
pub fn places(document: &Value) -> Vec<String> {
    fn walk(value: &Value, at: &str, found: &mut Vec<String>) {
        found.push(at.to_owned());
        match value {
            Value::Object(map) => {
                for (key, value) in map {
                    walk(value, &format!("{at}/{}", key.replace('~', "~0").replace('/', "~1")), found);
                }
            }
            Value::Array(list) => {
                for (nr, value) in list.iter().enumerate() {
                    walk(value, &format!("{at}/{nr}"), found);
                }
            }
            _ => {}
        }
    }
    let mut found = Vec::new();
    walk(document, "", &mut found);
    found
}

/// Changes one place, and says which and how.
pub fn mutate(document: &mut Value, dice: &mut Dice) -> String {
    let places = places(document);
    let place = dice.of(&places).clone();
    let other = document.pointer(dice.of(&places).as_str()).cloned().unwrap_or_default();
    let Some(value) = document.pointer_mut(&place) else { return String::new() };
    let how = match dice.below(8) {
        0..=3 => replace(value, absurd(dice), "absurd value"),
        4 => replace(value, other, "a value from elsewhere"),
        5 => retype(value),
        6 => crowd(value, dice),
        _ => lose(value, dice),
    };
    format!("{place}: {how}")
}

fn replace(value: &mut Value, new: Value, how: &str) -> String {
    let shown: String = new.to_string().chars().take(60).collect();
    *value = new;
    format!("{how} {shown}")
}

fn absurd(dice: &mut Dice) -> Value {
    const TEXTS: &[&str] = &[
        "",
        " ",
        "/",
        ".",
        "..",
        "../../../..",
        "//",
        "/..",
        "/proc/..",
        "/proc/../x",
        "/proc/self/fd/3",
        "/proc/1/root/x",
        "a\0b",
        "/a\0",
        "a\nb",
        "\n",
        "\t",
        "\\",
        "\"",
        "a:b:c",
        "a=b",
        "=",
        "-",
        "--help",
        "-1",
        "0x0",
        "%s%n",
        "$(id)",
        "\u{202e}x",
        "ü/\u{1f4a3}",
        "4294967295",
        "4294967296",
        "18446744073709551616",
        "0-4294967295",
        "SCMP_ACT_NONE",
        "CAP_NONE",
        "RLIMIT_NONE",
        "remount",
        "bind,ro",
    ];
    let big = [
        json!(u64::MAX),
        json!(i64::MIN),
        json!(i64::MAX),
        json!(4_294_967_295u32),
        json!(4_294_967_296u64),
        json!(-1),
        json!(0),
        json!(1),
        json!(0.5),
        json!(1e308),
        json!(-1e308),
        json!(65536),
        json!(2_147_483_648u32),
        json!(1_000_000_000),
    ];
    match dice.below(10) {
        0..=3 => json!(dice.of(TEXTS)),
        4..=5 => dice.of(&big).clone(),
        6 => dice
            .of(&[
                Value::Null,
                json!(true),
                json!(false),
                json!([]),
                json!({}),
                json!([null]),
                json!({"": null}),
            ])
            .clone(),
        7 => json!("x".repeat(*dice.of(&[255, 256, 4096, 100_000]))),
        8 => json!("/y".repeat(*dice.of(&[127, 2048, 50_000]))),
        _ => {
            let depth = *dice.of(&[4, 100, 127, 128, 1000]);
            (0..depth)
                .fold(json!(0), |inner, nr| if nr % 2 == 0 { json!([inner]) } else { json!({"x": inner}) })
        }
    }
}

fn retype(value: &mut Value) -> String {
    let new = match value.take() {
        Value::String(text) => text.parse::<i64>().map_or_else(|_| json!([text]), |number| json!(number)),
        Value::Number(number) => json!(number.to_string()),
        Value::Bool(truth) => json!(truth.to_string()),
        Value::Array(list) => {
            Value::Object(list.into_iter().enumerate().map(|(nr, item)| (nr.to_string(), item)).collect())
        }
        Value::Object(map) => Value::Array(map.into_iter().map(|(_, item)| item).collect()),
        Value::Null => json!({}),
    };
    replace(value, new, "another type")
}

fn crowd(value: &mut Value, dice: &mut Dice) -> String {
    let times = *dice.of(&[2, 3, 40, 1500]);
    match value {
        Value::Array(list) if !list.is_empty() => {
            let item = dice.of(list).clone();
            list.extend(std::iter::repeat_n(item, times));
            format!("an item {times} times more")
        }
        Value::Object(map) => {
            let item = map.values().next().cloned().unwrap_or_default();
            map.extend((0..times).map(|nr| (format!("more{nr}"), item.clone())));
            format!("{times} members more")
        }
        Value::String(text) => {
            *text = text.repeat(times);
            format!("repeated {times} times")
        }
        other => retype(other),
    }
}

fn lose(value: &mut Value, dice: &mut Dice) -> String {
    match value {
        Value::Array(list) if !list.is_empty() => {
            let at = dice.below(list.len());
            list.remove(at);
            format!("without item {at}")
        }
        Value::Object(map) if !map.is_empty() => {
            let names: Vec<String> = map.keys().cloned().collect();
            let name = dice.of(&names);
            let gone = map.remove(name).unwrap_or_default();
            // Sometimes only misspelled.
            if dice.below(3) == 0 {
                map.insert(format!("{name} "), gone);
                return format!("`{name}` misspelled");
            }
            format!("without `{name}`")
        }
        other => replace(other, Value::Null, "no value:"),
    }
}

/// A document with every field of `linux` and `process` that the runtime specification has, to be put into one that a
/// runtime takes. Values that a host may well refuse are among them; none reaches the host.
pub fn every_field() -> Map<String, Value> {
    let ids = json!([{"containerID": 0, "hostID": 700_000_000, "size": 65536}]);
    let rdt =
        json!({"closID": "c", "l3CacheSchema": "L3:0=7", "memBwSchema": "MB:0=20", "enableMonitoring": true});
    let device =
        json!({"type": "c", "path": "/dev/own", "major": 1, "minor": 3, "fileMode": 438, "uid": 0, "gid": 0});
    let rate = json!([{"major": 8, "minor": 0, "rate": 1_048_576}]);
    let seccomp = json!({
        "defaultAction": "SCMP_ACT_ALLOW", "defaultErrnoRet": 1, "architectures": ["SCMP_ARCH_X86_64"], "flags": ["SECCOMP_FILTER_FLAG_LOG"],
        "listenerPath": "listener", "listenerMetadata": "m",
        "syscalls": [{"names": ["acct"], "action": "SCMP_ACT_ERRNO", "errnoRet": 1, "args": [{"index": 0, "value": 1, "valueTwo": 2, "op": "SCMP_CMP_EQ"}]}],
    });
    let resources = json!({
        "devices": [{"allow": false, "type": "c", "major": 1, "minor": 3, "access": "rwm"}],
        "memory": {"limit": 268_435_456, "reservation": 134_217_728, "swap": 268_435_456, "kernel": -1, "kernelTCP": -1, "swappiness": 60,
                   "disableOOMKiller": false, "useHierarchy": true, "checkBeforeUpdate": false},
        "cpu": {"shares": 512, "quota": 50_000, "burst": 0, "period": 100_000, "realtimeRuntime": 0, "realtimePeriod": 0, "cpus": "0", "mems": "0", "idle": 0},
        "pids": {"limit": 100},
        "blockIO": {"weight": 100, "leafWeight": 100, "weightDevice": [{"major": 8, "minor": 0, "weight": 100, "leafWeight": 100}],
                    "throttleReadBpsDevice": rate, "throttleWriteBpsDevice": rate, "throttleReadIOPSDevice": rate, "throttleWriteIOPSDevice": rate},
        "hugepageLimits": [{"pageSize": "2MB", "limit": 9_223_372_036_854_771_712u64}],
        "network": {"classID": 1, "priorities": [{"name": "lo", "priority": 1}]},
        "rdma": {"none": {"hcaHandles": 1, "hcaObjects": 1}},
        "unified": {"memory.high": "200000000"},
    });
    let linux = json!({
        "uidMappings": ids, "gidMappings": ids, "sysctl": {"net.ipv4.ip_forward": "1"}, "resources": resources, "cgroupsPath": "/sysbox-mutated",
        "devices": [device], "seccomp": seccomp, "rootfsPropagation": "private", "maskedPaths": ["/proc/kcore"], "readonlyPaths": ["/proc/bus"],
        "mountLabel": "", "intelRdt": rdt, "personality": {"domain": "LINUX", "flags": []},
        "timeOffsets": {"monotonic": {"secs": 1, "nanosecs": 1}, "boottime": {"secs": 1, "nanosecs": 1}},
        "netDevices": {"none0": {"name": "none1"}}, "memoryPolicy": {"mode": "MPOL_DEFAULT", "nodes": "0", "flags": []},
    });
    let process = json!({
        "consoleSize": {"height": 24, "width": 80}, "rlimits": [{"type": "RLIMIT_NOFILE", "hard": 1024, "soft": 512}], "apparmorProfile": "",
        "oomScoreAdj": 100, "scheduler": {"policy": "SCHED_OTHER", "nice": 1, "priority": 0, "flags": [], "runtime": 0, "deadline": 0, "period": 0},
        "selinuxLabel": "", "noNewPrivileges": true, "ioPriority": {"class": "IOPRIO_CLASS_BE", "priority": 4},
        "execCPUAffinity": {"initial": "0", "final": "0"}, "user": {"uid": 0, "gid": 0, "umask": 18, "additionalGids": [5]},
        "capabilities": {"bounding": ["CAP_CHOWN"], "effective": ["CAP_CHOWN"], "inheritable": [], "permitted": ["CAP_CHOWN"], "ambient": []},
    });
    let hook = json!([{"path": "/bin/true", "args": ["true"], "env": ["A=b"], "timeout": 5}]);
    let hooks = ["prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop"];
    let hooks: Map<String, Value> = hooks.iter().map(|name| ((*name).to_owned(), hook.clone())).collect();
    let whole = json!({
        "linux": linux, "process": process, "hooks": hooks, "annotations": {"a": "b"}, "domainname": "example", "hostname": "mutated",
    });
    whole.as_object().cloned().unwrap_or_default()
}

/// Puts members of `from` into `into`, objects member by member.
pub fn merge(into: &mut Value, from: &Value) {
    match (into, from) {
        (Value::Object(into), Value::Object(from)) => {
            for (name, value) in from {
                merge(into.entry(name.clone()).or_insert(Value::Null), value);
            }
        }
        (into, from) => *into = from.clone(),
    }
}
