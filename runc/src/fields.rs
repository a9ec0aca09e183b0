//! The members of the specification's config.json, one by one: what is done with each. docs/OCI-SPEC.md is this table with
//! the tests that hold it. A member that no version of the specification has is ignored, as it says.

use serde_json::Value;

/// What becomes of a member.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fate {
    Done,
    /// Changes nothing here, for this reason.
    Ignored(&'static str),
    /// Refused if it asks for anything.
    Refused(&'static str),
}

use Fate::{Done, Ignored, Refused};

const OTHER_SYSTEM: Fate = Ignored("of another operating system");
const NO_SELINUX: Fate = Refused("SELinux labels are not supported; hint: `--security-opt label=disable`");

/// By JSON pointer; `*` stands for any element or key. Below a member that is refused or ignored nothing is listed.
pub const FIELDS: &[(&str, Fate)] = &[
    ("/ociVersion", Done),
    ("/root/path", Done),
    ("/root/readonly", Done),
    ("/hostname", Done),
    ("/domainname", Done),
    ("/annotations/*", Done),
    ("/mounts/*/destination", Done),
    ("/mounts/*/type", Done),
    ("/mounts/*/source", Done),
    ("/mounts/*/options", Done),
    ("/mounts/*/uidMappings", Done),
    ("/mounts/*/gidMappings", Done),
    ("/process/terminal", Done),
    ("/process/consoleSize", Done),
    ("/process/cwd", Done),
    ("/process/env", Done),
    ("/process/args", Done),
    ("/process/commandLine", OTHER_SYSTEM),
    ("/process/rlimits", Done),
    ("/process/apparmorProfile", Done),
    ("/process/capabilities/bounding", Done),
    ("/process/capabilities/effective", Done),
    ("/process/capabilities/inheritable", Done),
    ("/process/capabilities/permitted", Done),
    ("/process/capabilities/ambient", Done),
    ("/process/noNewPrivileges", Done),
    ("/process/oomScoreAdj", Done),
    ("/process/scheduler", Done),
    ("/process/selinuxLabel", NO_SELINUX),
    ("/process/ioPriority", Done),
    ("/process/execCPUAffinity", Done),
    ("/process/user/uid", Done),
    ("/process/user/gid", Done),
    ("/process/user/umask", Done),
    ("/process/user/additionalGids", Done),
    ("/process/user/username", OTHER_SYSTEM),
    ("/hooks/prestart", Done),
    ("/hooks/createRuntime", Done),
    ("/hooks/createContainer", Done),
    ("/hooks/startContainer", Done),
    ("/hooks/poststart", Done),
    ("/hooks/poststop", Done),
    ("/linux/namespaces", Done),
    ("/linux/uidMappings", Done),
    ("/linux/gidMappings", Done),
    ("/linux/timeOffsets", Done),
    ("/linux/devices", Done),
    ("/linux/netDevices/*/name", Done),
    ("/linux/cgroupsPath", Done),
    ("/linux/rootfsPropagation", Done),
    ("/linux/maskedPaths", Done),
    ("/linux/readonlyPaths", Done),
    ("/linux/mountLabel", NO_SELINUX),
    ("/linux/sysctl/*", Done),
    ("/linux/personality/domain", Done),
    (
        "/linux/personality/flags",
        Refused("the kernel has no flags for a personality that a container could ask for"),
    ),
    ("/linux/intelRdt", Refused("a container is not put into a resctrl group")),
    ("/linux/memoryPolicy/mode", Done),
    ("/linux/memoryPolicy/nodes", Done),
    ("/linux/memoryPolicy/flags", Done),
    ("/linux/seccomp/defaultAction", Done),
    ("/linux/seccomp/defaultErrnoRet", Done),
    ("/linux/seccomp/architectures", Done),
    ("/linux/seccomp/flags", Done),
    ("/linux/seccomp/listenerPath", Done),
    ("/linux/seccomp/listenerMetadata", Done),
    ("/linux/seccomp/syscalls", Done),
    ("/linux/resources/devices", Done),
    ("/linux/resources/memory/limit", Done),
    ("/linux/resources/memory/reservation", Done),
    ("/linux/resources/memory/swap", Done),
    (
        "/linux/resources/memory/kernel",
        Ignored("obsolete: kernel memory has no limit of its own, as with runc"),
    ),
    (
        "/linux/resources/memory/kernelTCP",
        Ignored("obsolete: kernel memory has no limit of its own, as with runc"),
    ),
    ("/linux/resources/memory/swappiness", Done),
    ("/linux/resources/memory/disableOOMKiller", Done),
    ("/linux/resources/memory/useHierarchy", Ignored("the kernel knows nothing else")),
    (
        "/linux/resources/memory/checkBeforeUpdate",
        Ignored("a new cgroup uses no memory that a limit could be below of"),
    ),
    ("/linux/resources/cpu/shares", Done),
    ("/linux/resources/cpu/quota", Done),
    ("/linux/resources/cpu/burst", Done),
    ("/linux/resources/cpu/period", Done),
    ("/linux/resources/cpu/realtimeRuntime", Done),
    ("/linux/resources/cpu/realtimePeriod", Done),
    ("/linux/resources/cpu/cpus", Done),
    ("/linux/resources/cpu/mems", Done),
    ("/linux/resources/cpu/idle", Done),
    ("/linux/resources/pids/limit", Done),
    ("/linux/resources/blockIO/weight", Done),
    ("/linux/resources/blockIO/leafWeight", Refused("no kernel since 5.0 has leaf weights")),
    ("/linux/resources/blockIO/weightDevice", Done),
    ("/linux/resources/blockIO/throttleReadBpsDevice", Done),
    ("/linux/resources/blockIO/throttleWriteBpsDevice", Done),
    ("/linux/resources/blockIO/throttleReadIOPSDevice", Done),
    ("/linux/resources/blockIO/throttleWriteIOPSDevice", Done),
    ("/linux/resources/hugepageLimits", Done),
    ("/linux/resources/network/classID", Done),
    ("/linux/resources/network/priorities", Done),
    ("/linux/resources/rdma", Refused("the rdma controller is not used")),
    ("/linux/resources/unified/*", Done),
    ("/solaris", OTHER_SYSTEM),
    ("/windows", OTHER_SYSTEM),
    ("/vm", Ignored("there is no virtual machine")),
    ("/zos", OTHER_SYSTEM),
    ("/freebsd", OTHER_SYSTEM),
];

/// Where an object must stand. The parser would take an array for one, its elements for the members in the order of our types:
/// a document would then mean one thing here and nothing to runc, which refuses it.
const OBJECTS: &[&str] = &[
    "",
    "/root",
    "/mounts/*",
    "/mounts/*/uidMappings/*",
    "/mounts/*/gidMappings/*",
    "/process",
    "/process/consoleSize",
    "/process/rlimits/*",
    "/process/capabilities",
    "/process/scheduler",
    "/process/ioPriority",
    "/process/execCPUAffinity",
    "/process/user",
    "/hooks",
    "/hooks/*/*",
    "/linux",
    "/linux/namespaces/*",
    "/linux/uidMappings/*",
    "/linux/gidMappings/*",
    "/linux/timeOffsets/*",
    "/linux/devices/*",
    "/linux/netDevices/*",
    "/linux/personality",
    "/linux/intelRdt",
    "/linux/memoryPolicy",
    "/linux/seccomp",
    "/linux/seccomp/syscalls/*",
    "/linux/seccomp/syscalls/*/args/*",
    "/linux/resources",
    "/linux/resources/devices/*",
    "/linux/resources/memory",
    "/linux/resources/cpu",
    "/linux/resources/pids",
    "/linux/resources/blockIO",
    "/linux/resources/blockIO/*/*",
    "/linux/resources/hugepageLimits/*",
    "/linux/resources/network",
    "/linux/resources/network/priorities/*",
    "/linux/resources/rdma/*",
];

/// The first place where an array stands for an object.
pub fn array_for_object(document: &Value) -> Option<String> {
    fn look(value: &Value, at: &mut Vec<String>) -> Option<String> {
        match value {
            Value::Object(all) => all
                .iter()
                .find_map(|(name, value)| below(name.replace('~', "~0").replace('/', "~1"), value, at)),
            Value::Array(_) if OBJECTS.iter().any(|place| matches(place, at)) => {
                Some(at.iter().fold(String::new(), |pointer, part| pointer + "/" + part))
            }
            Value::Array(all) => {
                all.iter().enumerate().find_map(|(number, value)| below(number.to_string(), value, at))
            }
            _ => None,
        }
    }
    fn below(name: String, value: &Value, at: &mut Vec<String>) -> Option<String> {
        at.push(name);
        let found = look(value, at);
        at.pop();
        found
    }
    look(document, &mut Vec::new())
}

fn matches(place: &str, at: &[String]) -> bool {
    let mut parts = place.split('/').skip(1);
    at.iter().all(|part| parts.next().is_some_and(|listed| listed == "*" || listed == part))
        && parts.next().is_none()
}

/// The first member that asks for what is refused, with the reason.
pub fn refused(document: &Value) -> Option<(&'static str, &'static str)> {
    FIELDS.iter().find_map(|(pointer, fate)| match fate {
        Refused(why) => document.pointer(pointer).filter(|value| asks(value)).map(|_| (*pointer, *why)),
        Done | Ignored(_) => None,
    })
}

/// Whether a value asks for anything: engines write empty members.
fn asks(value: &Value) -> bool {
    match value {
        Value::Null => false,
        Value::Bool(on) => *on,
        Value::Number(_) => true,
        Value::String(text) => !text.is_empty(),
        Value::Array(all) => !all.is_empty(),
        Value::Object(all) => all.values().any(asks),
    }
}

/// Members that ask for something and that the specification does not know: ignored, and told.
pub fn unknown(document: &Value) -> Vec<String> {
    let mut found = Vec::new();
    walk(document, &mut String::new(), &mut found);
    found
}

fn walk(value: &Value, at: &mut String, found: &mut Vec<String>) {
    let Value::Object(members) = value else {
        if let Value::Array(all) = value {
            for (number, element) in all.iter().enumerate() {
                step(&number.to_string(), element, at, found);
            }
        }
        return;
    };
    for (name, member) in members {
        step(&name.replace('~', "~0").replace('/', "~1"), member, at, found);
    }
}

fn step(name: &str, member: &Value, at: &mut String, found: &mut Vec<String>) {
    let length = at.len();
    at.push('/');
    at.push_str(name);
    match place(at) {
        Place::Listed => {}
        Place::Above => walk(member, at, found),
        Place::Nowhere => found.extend(asks(member).then(|| at.clone())),
    }
    at.truncate(length);
}

enum Place {
    Listed,
    /// Members of it are listed.
    Above,
    Nowhere,
}

fn place(pointer: &str) -> Place {
    let parts: Vec<&str> = pointer.split('/').collect();
    let mut above = false;
    for (listed, _) in FIELDS {
        let listed: Vec<&str> = listed.split('/').collect();
        let alike = parts.iter().zip(&listed).all(|(part, listed)| part == listed || *listed == "*");
        if alike && listed.len() == parts.len() {
            return Place::Listed;
        }
        above |= alike && listed.len() > parts.len();
    }
    if above { Place::Above } else { Place::Nowhere }
}

#[cfg(test)]
mod tests {
    use super::*;
    use oci_spec::runtime::Spec;
    use serde_json::json;

    const PAGE: &str = include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/OCI-SPEC.md"));

    #[test]
    fn the_page_has_every_field_and_its_fate() {
        let rows: Vec<Vec<&str>> = PAGE
            .lines()
            .filter(|line| line.starts_with("| `/"))
            .map(|line| line.trim_matches('|').split(" | ").map(str::trim).collect())
            .collect();
        let listed: Vec<String> = rows.iter().map(|row| row[0].trim_matches('`').to_owned()).collect();
        let expected: Vec<&str> = FIELDS.iter().map(|(pointer, _)| *pointer).collect();
        assert_eq!(listed, expected);
        for (row, (pointer, fate)) in rows.iter().zip(FIELDS) {
            let said = match fate {
                Done => "done".to_owned(),
                Ignored(why) => format!("ignored: {why}"),
                Refused(why) => format!("refused: {why}"),
            };
            assert_eq!(row[1], said, "{pointer}");
            assert!(
                row.len() == 3 && (!row[2].is_empty() || matches!(fate, Ignored(_))),
                "{pointer}: no test"
            );
        }
    }

    #[test]
    fn what_asks_for_nothing_is_not_refused() {
        for (document, expected) in [
            (json!({"linux": {"intelRdt": {}}}), None),
            (json!({"linux": {"intelRdt": null, "mountLabel": "", "personality": {"flags": []}}}), None),
            (json!({"linux": {"intelRdt": {"closID": "x"}}}), Some("/linux/intelRdt")),
            (
                json!({"linux": {"resources": {"blockIO": {"leafWeight": 10}}}}),
                Some("/linux/resources/blockIO/leafWeight"),
            ),
            (
                json!({"linux": {"resources": {"rdma": {"mlx": {"hcaHandles": 1}}}}}),
                Some("/linux/resources/rdma"),
            ),
            (json!({"process": {"selinuxLabel": "a"}}), Some("/process/selinuxLabel")),
        ] {
            assert_eq!(refused(&document).map(|(pointer, _)| pointer), expected, "{document}");
        }
    }

    #[test]
    fn a_member_of_no_version_is_told() {
        let document = json!({
            "ociVersion": "1.2.0",
            "annotations": {"any/thing": "x"},
            "process": {"args": ["x"], "user": {"uid": 0, "shell": "/bin/sh"}, "newThing": true, "offThing": false},
            "mounts": [{"destination": "/a", "flavour": "odd"}],
            "linux": {"seccomp": {"syscalls": [{"names": []}]}, "resources": {"memory": {"zswap": 1}}, "empty": {}},
            "vm": {"anything": 1},
        });
        let mut found = unknown(&document);
        found.sort();
        let expected = [
            "/linux/resources/memory/zswap",
            "/mounts/0/flavour",
            "/process/newThing",
            "/process/user/shell",
        ];
        assert_eq!(found, expected);
    }

    /// A document with every member that is done.
    fn whole() -> Value {
        let device = json!([{"major": 8, "minor": 0, "rate": 1}]);
        let lines = json!([{"containerID": 0, "hostID": 5, "size": 1}]);
        let hook = json!([{"path": "/x", "args": ["a"], "env": ["b"], "timeout": 1}]);
        let resources = json!({
            "devices": [{"allow": true, "type": "c", "major": 1, "minor": 2, "access": "r"}],
            "memory": {"limit": 1, "reservation": 1, "swap": 1, "swappiness": 1, "disableOOMKiller": true},
            "cpu": {
                "shares": 1, "quota": 1, "burst": 1, "period": 1, "realtimeRuntime": 1, "realtimePeriod": 1,
                "cpus": "0", "mems": "0", "idle": 1,
            },
            "pids": {"limit": 1},
            "blockIO": {
                "weight": 1, "weightDevice": [{"major": 8, "minor": 0, "weight": 1}],
                "throttleReadBpsDevice": device, "throttleWriteBpsDevice": device,
                "throttleReadIOPSDevice": device, "throttleWriteIOPSDevice": device,
            },
            "hugepageLimits": [{"pageSize": "2MB", "limit": 1}],
            "network": {"classID": 1, "priorities": [{"name": "e", "priority": 1}]},
            "unified": {"a": "b"},
        });
        let mut linux = json!({
                        "namespaces": [{"type": "pid", "path": "/p"}], "uidMappings": lines, "gidMappings": lines,
                        "timeOffsets": {"boottime": {"secs": 1, "nanosecs": 2}},
                        "devices": [{"type": "c", "path": "/dev/x", "major": 1, "minor": 2, "fileMode": 3, "uid": 4, "gid": 5}],
                        "netDevices": {"eth9": {"name": "e"}}, "cgroupsPath": "/c", "rootfsPropagation": "slave",
                        "maskedPaths": ["/m"], "readonlyPaths": ["/r"], "sysctl": {"a": "b"},
                        "personality": {"domain": "LINUX32"},
                        "memoryPolicy": {"mode": "MPOL_BIND", "nodes": "0", "flags": ["MPOL_F_STATIC_NODES"]},
                        "seccomp": {
                            "defaultAction": "SCMP_ACT_ERRNO", "defaultErrnoRet": 1, "architectures": ["SCMP_ARCH_X86_64"],
                            "flags": ["SECCOMP_FILTER_FLAG_LOG"], "listenerPath": "/l", "listenerMetadata": "m",
                            "syscalls": [{"names": ["a"], "action": "SCMP_ACT_ALLOW", "errnoRet": 1, "args": [{"index": 0, "value": 1, "valueTwo": 2, "op": "SCMP_CMP_EQ"}]}],
                        }
        });
        linux["resources"] = resources;
        let mut document = json!({
            "ociVersion": "1.2.0", "hostname": "h", "domainname": "d", "annotations": {"a": "b"},
            "root": {"path": "r", "readonly": true},
            "mounts": [{"destination": "/a", "type": "bind", "source": "/b", "options": ["ro"], "uidMappings": lines, "gidMappings": lines}],
            "hooks": {
                "prestart": hook, "createRuntime": hook, "createContainer": hook, "startContainer": hook,
                "poststart": hook, "poststop": hook,
            },
            "process": {
                "terminal": true, "consoleSize": {"height": 1, "width": 2}, "cwd": "/", "env": ["A=b"], "args": ["x"],
                "rlimits": [{"type": "RLIMIT_CORE", "soft": 1, "hard": 2}], "apparmorProfile": "p",
                "capabilities": {
                    "bounding": ["CAP_KILL"], "effective": ["CAP_KILL"], "inheritable": ["CAP_KILL"],
                    "permitted": ["CAP_KILL"], "ambient": ["CAP_KILL"],
                },
                "noNewPrivileges": true, "oomScoreAdj": 1,
                "scheduler": {"policy": "SCHED_BATCH", "nice": 1, "priority": 1, "flags": ["SCHED_FLAG_RECLAIM"], "runtime": 1, "deadline": 1, "period": 1},
                "ioPriority": {"class": "IOPRIO_CLASS_IDLE", "priority": 1},
                "execCPUAffinity": {"initial": "0", "final": "0"},
                "user": {"uid": 1, "gid": 2, "umask": 3, "additionalGids": [4]},
            },
        });
        document["linux"] = linux;
        document
    }

    /// What the types of the parser do not know would be dropped before anybody saw it.
    #[test]
    fn the_parser_keeps_every_member_that_is_done() {
        let document = whole();
        for (pointer, _) in FIELDS.iter().filter(|(_, fate)| *fate == Done) {
            let first = pointer.split("/*").next().unwrap();
            assert!(document.pointer(first).is_some(), "{pointer} is not in the document of this test");
        }
        let spec: Spec = serde_json::from_value(document.clone()).unwrap();
        assert_eq!(serde_json::to_value(spec).unwrap(), document);
        assert_eq!(unknown(&document), Vec::<String>::new());
    }
    fn objects(value: &Value, at: &str, found: &mut Vec<String>) {
        match value {
            Value::Object(all) => {
                found.push(at.to_owned());
                all.iter().for_each(|(name, value)| objects(value, &format!("{at}/{name}"), found));
            }
            Value::Array(all) => {
                let numbered = all.iter().enumerate();
                numbered.for_each(|(number, value)| objects(value, &format!("{at}/{number}"), found));
            }
            _ => {}
        }
    }

    /// Whatever its elements are: those that the parser would take for the members, too.
    #[test]
    fn an_array_is_nowhere_taken_for_an_object() {
        let document = whole();
        let path = std::path::Path::new("config.json");
        let said = |document: &Value| {
            crate::bundle::parse(path, document.to_string().as_bytes()).map_err(|error| error.to_string())
        };
        assert_eq!(array_for_object(&document), None);
        let mut places = Vec::new();
        objects(&document, "", &mut places);
        assert!(places.len() > 50, "{places:?}");
        for place in places {
            let mut wrong = document.clone();
            let object = wrong.pointer_mut(&place).unwrap();
            let values: Vec<Value> = object.as_object().unwrap().values().cloned().collect();
            for array in [json!([]), Value::from(values)] {
                *wrong.pointer_mut(&place).unwrap() = array;
                let error = said(&wrong).unwrap_err();
                let named = if place.is_empty() { "/" } else { &place };
                assert!(error.contains(named), "{place}: {error}");
            }
        }
        let told = json!({"linux": {"seccomp": {"syscalls": [[["read"], "SCMP_ACT_ALLOW", 1, []]]}}});
        assert_eq!(array_for_object(&told).as_deref(), Some("/linux/seccomp/syscalls/0"));
        // What the specification does not know may be anything.
        assert_eq!(array_for_object(&json!({"odd": [[]], "process": {"odd": [1]}})), None);
    }
}
