//! `linux` of the specification on the real kernel: what is not of mounts, seccomp or the process.

#![allow(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use serde_json::{Value, json};
use sysbox_tests::runtime::{Machine, cgroups, eventually, programs};

/// The file of a container's cgroup on the host, above what the container has of its own.
fn limit(machine: &Machine, id: &str, controller: &str, file: &str) -> String {
    let path = PathBuf::from("/sys/fs/cgroup").join(controller).join(machine.cgroup(id)).join(file);
    fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display())).trim().to_owned()
}

#[test]
fn what_cannot_be_done_is_refused_by_name_and_what_is_unknown_is_told() {
    let machine = Machine::start();
    for (at, (pointer, value)) in [
        ("/linux/intelRdt", json!({"closID": "x"})),
        ("/linux/personality", json!({"domain": "LINUX", "flags": ["X"]})),
        ("/linux/resources", json!({"rdma": {"mlx": {"hcaHandles": 1}}})),
        ("/linux/resources", json!({"blockIO": {"leafWeight": 10}})),
        ("/linux/resources", json!({"unified": {"memory.high": "1"}})),
        ("/linux/sysctl", json!({"kernel.panic": "1"})),
        ("/linux/sysctl", json!({"net/../kernel/panic": "1"})),
        ("/linux/rootfsPropagation", json!("sideways")),
    ]
    .into_iter()
    .enumerate()
    {
        let id = format!("r{at}");
        let bundle = machine.bundle(&id, &["/bin/true"]);
        bundle.edit(|config| {
            let (parent, name) = pointer.rsplit_once('/').unwrap();
            config.pointer_mut(parent).unwrap()[name] = value.clone();
        });
        let before = bundle.inventory();
        let said = machine.run(&bundle, &id).fails();
        assert!(said.contains(pointer), "{pointer}: {said}");
        assert_eq!(machine.remains(&id), Vec::<String>::new());
        assert_eq!(bundle.inventory(), before);
    }
    let bundle = machine.bundle("new", &["/bin/true"]);
    bundle.edit(|config| config["linux"]["laterInvention"] = json!({"a": 1}));
    let said = machine.run(&bundle, "new");
    assert_eq!(said.code, 0);
    assert!(said.err.contains("/linux/laterInvention"), "{said:?}");
}

#[test]
fn names_sysctls_personality_time_and_memory_policy_are_as_asked() {
    let machine = Machine::start();
    let script = "hostname; cat /proc/sys/kernel/domainname; cat /proc/sys/net/ipv4/ip_forward; busybox uname -m; \
                  cat /proc/uptime; busybox grep -c prefer /proc/self/numa_maps";
    let script = script.replace("hostname;", "cat /proc/sys/kernel/hostname;");
    let bundle = machine.bundle("b", &["/bin/sh", "-c", &script]);
    bundle.edit(|config| {
        config["hostname"] = json!("box");
        config["domainname"] = json!("example");
        config["linux"]["sysctl"] = json!({"net.ipv4.ip_forward": "1"});
        config["linux"]["personality"] = json!({"domain": "LINUX32"});
        config["linux"]["timeOffsets"] = json!({"boottime": {"secs": 1_000_000_000, "nanosecs": 0}});
        config["linux"]["memoryPolicy"] = json!({"mode": "MPOL_PREFERRED", "nodes": "0"});
    });
    let said = machine.run(&bundle, "c");
    let lines: Vec<&str> = said.out.lines().collect();
    assert_eq!(lines[..3], ["box", "example", "1"], "{said:?}");
    assert!(["i686", "armv8l"].contains(&lines[3]), "{lines:?}");
    let uptime: f64 = lines[4].split(' ').next().unwrap().parse().unwrap();
    assert!(uptime > 1e9, "{lines:?}");
    assert!(lines[5].parse::<u32>().is_ok_and(|count| count > 0), "{said:?}");
    bundle.edit(|config| config["linux"]["sysctl"] = json!({"net.ipv4.ip_forward": "nonsense"}));
    let refused = machine.run(&bundle, "c").fails();
    assert!(refused.contains("ip_forward"), "{refused}");
    assert_eq!(machine.remains("c"), Vec::<String>::new());
}

#[test]
fn devices_have_number_mode_and_owner() {
    let machine = Machine::start();
    let script = "busybox stat -c '%a %u %g %t %T' /dev/mine /dev/null; echo x > /dev/mine && echo open";
    let bundle = machine.bundle("b", &["/bin/sh", "-c", script]);
    bundle.edit(|config| {
        let mine = json!({"path": "/dev/mine", "type": "c", "major": 1, "minor": 3, "fileMode": 0o640, "uid": 5, "gid": 6});
        config["linux"]["devices"] = json!([mine]);
    });
    assert_eq!(machine.run(&bundle, "c").ok(), "640 5 6 1 3\n666 0 0 1 3\nopen\n");
    for (id, path) in [("out", "/tmp/x"), ("up", "/dev/../etc/x")] {
        let bundle = machine.bundle(id, &["/bin/true"]);
        bundle.edit(|config| {
            config["linux"]["devices"] = json!([{"path": path, "type": "c", "major": 1, "minor": 3}]);
        });
        let said = machine.run(&bundle, id).fails();
        assert!(said.contains("/linux/devices") && said.contains("is not below /dev"), "{said}");
    }
}

#[test]
fn limits_of_version_1_are_what_was_asked() {
    let machine = Machine::start();
    let disk = fs::read_to_string("/sys/block/vda/dev").unwrap();
    let (major, minor) = disk.trim().split_once(':').unwrap();
    let rate = |rate: u64| json!([{"major": major.parse::<i64>().unwrap(), "minor": minor.parse::<i64>().unwrap(), "rate": rate}]);
    let bundle = machine.bundle("b", &["/bin/sleep", "1000"]);
    bundle.edit(|config| {
        config["linux"]["resources"] = json!({
            "memory": {
                "limit": 67_108_864, "reservation": 33_554_432, "swappiness": 7, "disableOOMKiller": true,
                "kernel": 1, "kernelTCP": 1, "useHierarchy": true, "checkBeforeUpdate": true,
            },
            "cpu": {"shares": 512, "quota": 50_000, "period": 100_000, "burst": 10_000, "cpus": "0", "mems": "0"},
            "pids": {"limit": 77},
            "blockIO": {
                "throttleReadBpsDevice": rate(1_048_576), "throttleWriteBpsDevice": rate(2_097_152),
                "throttleReadIOPSDevice": rate(100), "throttleWriteIOPSDevice": rate(200),
            },
        });
    });
    let _running = machine.run_detached(&bundle, "c");
    for (controller, file, expected) in [
        ("memory", "memory.limit_in_bytes", "67108864"),
        ("memory", "memory.soft_limit_in_bytes", "33554432"),
        ("memory", "memory.swappiness", "7"),
        ("cpu", "cpu.shares", "512"),
        ("cpu", "cpu.cfs_quota_us", "50000"),
        ("cpu", "cpu.cfs_period_us", "100000"),
        ("cpu", "cpu.cfs_burst_us", "10000"),
        ("cpuset", "cpuset.cpus", "0"),
        ("cpuset", "cpuset.mems", "0"),
        ("pids", "pids.max", "77"),
    ] {
        assert_eq!(limit(&machine, "c", controller, file), expected, "{file}");
    }
    for (file, expected) in [
        ("blkio.throttle.read_bps_device", "1048576"),
        ("blkio.throttle.write_bps_device", "2097152"),
        ("blkio.throttle.read_iops_device", "100"),
        ("blkio.throttle.write_iops_device", "200"),
    ] {
        assert_eq!(limit(&machine, "c", "blkio", file), format!("{} {expected}", disk.trim()), "{file}");
    }
    let killer = || limit(&machine, "c", "memory", "memory.oom_control");
    assert!(killer().contains("oom_kill_disable 1"), "{}", killer());
    // An update that says nothing of it leaves it.
    machine.runc(&["update", "--memory", "50331648", "c"]).ok();
    assert_eq!(limit(&machine, "c", "memory", "memory.limit_in_bytes"), "50331648");
    assert!(killer().contains("oom_kill_disable 1"), "{}", killer());
}

#[test]
fn swap_idle_and_device_rules_are_what_was_asked() {
    let machine = Machine::start();
    let script = "cat /dev/yes; cat /dev/no; exec sleep 1000";
    let bundle = machine.bundle("b", &["/bin/sh", "-c", script]);
    bundle.edit(|config| {
        config["linux"]["cgroupsPath"] = json!("/sysbox-spec-test/one");
        config["linux"]["resources"] = json!({
            "memory": {"limit": 67_108_864, "swap": 134_217_728},
            "cpu": {"idle": 1},
            "devices": [
                {"allow": false, "access": "rwm"},
                {"allow": true, "type": "c", "major": 240, "minor": 7, "access": "rw"},
            ],
        });
        // Without a driver, so that an open says what the cgroup says, or that there is no such device.
        let node = |path: &str, minor: u32| json!({"path": path, "type": "c", "major": 240, "minor": minor});
        config["linux"]["devices"] = json!([node("/dev/yes", 7), node("/dev/no", 8)]);
    });
    let running = machine.run_detached(&bundle, "c");
    let read = |path: &str| fs::read_to_string(format!("/sys/fs/cgroup/{path}")).unwrap().trim().to_owned();
    assert_eq!(read("memory/sysbox-spec-test/one/memory.memsw.limit_in_bytes"), "134217728");
    assert_eq!(read("cpu/sysbox-spec-test/one/cpu.idle"), "1");
    let said = || fs::read_to_string(machine.path("c.out")).unwrap();
    eventually("both devices were tried", || said().contains("/dev/yes") && said().contains("/dev/no"));
    assert!(said().contains("'/dev/yes': No such device or address"), "{}", said());
    assert!(said().contains("'/dev/no': Operation not permitted"), "{}", said());
    running.delete();
    // As with runc, what is above the container's own cgroup stays, and must be empty.
    for path in cgroups("sysbox-spec-test") {
        fs::remove_dir(path).unwrap();
    }
}

/// In a network of the test's own: a device that moves is gone from where it was.
#[test]
fn a_network_device_moves_into_the_container() {
    let machine = Machine::start();
    let bundle = machine.bundle("b", &["/bin/cat", "/proc/net/dev"]);
    bundle.edit(|config| config["linux"]["netDevices"] = json!({"card9": {"name": "inner0"}, "card8": {}}));
    let line = format!(
        "ip link add card9 type veth peer name peer9 && ip link add card8 type veth peer name peer8 && '{}' --root '{}' --run-dir '{}' run --bundle '{}' c; ip -o link",
        programs().join("sysbox-runc").display(),
        machine.path("root").display(),
        machine.path("run").display(),
        bundle.dir.display()
    );
    let said = Command::new("unshare").args(["-n", "sh", "-c", &line]).output().unwrap();
    let (out, err) = (String::from_utf8_lossy(&said.stdout), String::from_utf8_lossy(&said.stderr));
    let (inside, outside) = out.split_once("1: lo").unwrap_or_else(|| panic!("{out}{err}"));
    assert!(inside.contains("inner0:") && inside.contains("card8:"), "{out}");
    assert!(!outside.contains(" card"), "{out}");
}

#[test]
fn masked_and_read_only_paths_hold_everywhere() {
    let machine = Machine::start();
    let script = "cat /secret/file /proc/timer_list; echo; echo x > /frozen/file; mkdir /frozen/d; \
                  umount /secret; umount /frozen; mount -o remount,rw /frozen; cat /secret/file; echo x > /frozen/file; ls /secret";
    let bundle = machine.bundle("b", &["/bin/sh", "-c", script]);
    for dir in ["secret", "frozen"] {
        fs::create_dir(bundle.rootfs().join(dir)).unwrap();
        fs::write(bundle.rootfs().join(dir).join("file"), "hidden").unwrap();
    }
    bundle.edit(|config| {
        config["linux"]["maskedPaths"] = json!(["/secret", "/proc/timer_list", "/not/there"]);
        config["linux"]["readonlyPaths"] = json!(["/frozen", "/proc/irq", "/not/there"]);
    });
    let said = machine.run(&bundle, "c");
    assert!(!said.out.contains("hidden") && !said.out.contains("Tick"), "{said:?}");
    assert_eq!(fs::read_to_string(bundle.rootfs().join("frozen/file")).unwrap(), "hidden");
    assert_eq!(said.err.matches("Read-only file system").count(), 3, "{said:?}");
}

#[test]
fn a_namespace_comes_by_path_or_is_refused() {
    let machine = Machine::start();
    let bundle = machine.bundle("first", &["/bin/sleep", "1000"]);
    let first = machine.run_detached(&bundle, "first");
    let of = |typ: &str, file: &str| json!({"type": typ, "path": format!("/proc/{}/ns/{file}", first.pid())});
    let with = |id: &str, change: &[Value]| {
        let bundle = machine.bundle(id, &["/bin/sh", "-c", "ls -l /proc/self/ns; ls /proc"]);
        bundle.edit(|config| {
            let all = config["linux"]["namespaces"].as_array_mut().unwrap();
            all.retain(|one| !change.iter().any(|new| new["type"] == one["type"]));
            all.extend(change.iter().cloned());
        });
        machine.run(&bundle, id)
    };
    let theirs =
        |file: &str| fs::read_link(format!("/proc/{}/ns/{file}", first.pid())).unwrap().display().to_string();
    let shared =
        with("shared", &[of("network", "net"), of("ipc", "ipc"), of("uts", "uts"), of("pid", "pid")]).ok();
    for file in ["net", "ipc", "uts", "pid", "user"] {
        assert!(shared.contains(&theirs(file)), "{file}: {shared}");
    }
    for (id, typ, file) in [("time", "time", "time"), ("mnt", "mount", "mnt"), ("user", "user", "user")] {
        let said = with(id, &[of(typ, file)]).fails();
        assert!(said.contains("is always the container's own"), "{id}: {said}");
        assert_eq!(machine.remains(id), Vec::<String>::new());
    }
}
