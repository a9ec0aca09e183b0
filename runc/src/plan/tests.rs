//! Plans as data: what a spec becomes, what is locked, what is refused.

use super::judged::{planned, planned_on};
use super::*;
use crate::survey::{Ground, is_bind};
use proptest::prelude::*;
use serde_json::{Value, json};
use std::path::Component;
use sysbox_ipc::IdRange;
use sysbox_ipc::mgr::DATA_ROOTS;

fn spec(mounts: Value, more: Value) -> Spec {
    let mut spec = json!({
        "ociVersion": "1.0.2",
        "root": {"path": "rootfs"},
        "process": {"args": ["sh"], "cwd": "/", "user": {"uid": 0, "gid": 0}},
        "mounts": mounts,
        "linux": {"namespaces": [{"type": "pid"}, {"type": "ipc"}, {"type": "uts"}, {"type": "mount"}, {"type": "network"}]},
    });
    for (key, value) in more.as_object().unwrap() {
        spec["linux"][key] = value.clone();
    }
    serde_json::from_value(spec).unwrap()
}

fn bind(destination: &str, source: &str, options: &[&str]) -> Value {
    json!({"destination": destination, "type": "bind", "source": source, "options": options})
}

fn locked(plan: &Plan) -> Vec<String> {
    let path = |bind: &Bind| match &bind.place {
        Place::Locked(target) => Some(target.path.display().to_string()),
        Place::Staged(_) => None,
    };
    plan.binds.iter().filter_map(path).collect()
}

#[test]
fn read_only_binds_below_binds_are_locked_with_what_they_stand_on() {
    for (mounts, expected) in [
        (json!([bind("/a", "/h/a", &["rbind", "ro"])]), vec![]),
        (json!([bind("/a", "/h/a", &["rbind"]), bind("/a/b", "/h/b", &["rbind"])]), vec![]),
        (json!([bind("/a", "/h/a", &["rbind"]), bind("/a/b", "/h/b", &["rbind", "ro"])]), vec!["/a", "/a/b"]),
        (json!([bind("/a/b", "/h/b", &["ro", "bind"]), bind("/a", "/h/a", &["bind"])]), vec!["/a", "/a/b"]),
        (json!([bind("/a", "/h/a", &[]), bind("/a/../a/./b", "/h/b", &["ro"])]), vec!["/a", "/a/b"]),
        (
            json!([{"destination": "/a", "type": "tmpfs", "source": "tmpfs"}, bind("/a/b", "/h/b", &["ro"])]),
            vec![],
        ),
        (
            json!([
                bind("/a", "/h/a", &[]),
                bind("/a/b", "/h/b", &[]),
                bind("/a/b/c", "/h/c", &["ro"]),
                bind("/ab", "/h/c", &[])
            ]),
            vec!["/a", "/a/b", "/a/b/c"],
        ),
    ] {
        assert_eq!(locked(&planned(spec(mounts, json!({}))).unwrap()), expected);
    }
}

#[test]
fn namespaces_and_time_are_added() {
    let plan = planned(spec(json!([]), json!({}))).unwrap();
    let linux = plan.spec.linux().as_ref().unwrap();
    let names: Vec<String> = linux.namespaces().iter().flatten().map(|n| n.typ().to_string()).collect();
    assert_eq!(names, ["pid", "ipc", "uts", "mnt", "net", "user", "cgroup", "time"]);
    let offset = &linux.time_offsets().as_ref().unwrap()["boottime"];
    assert_eq!((offset.secs(), offset.nanosecs()), (Some(-12_345), Some(0)));
}

#[test]
fn mounts_of_an_engine_become_those_of_a_machine() {
    let plan = planned(spec(
        json!([
            {"destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid", "ro"]},
            {"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["nosuid", "ro"]},
            {"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup", "options": ["ro"]},
            bind("/etc/hosts", "/h/file", &["rbind", "rprivate"]),
        ]),
        json!({}),
    ))
    .unwrap();
    let shown: Vec<String> = plan
        .spec
        .mounts()
        .iter()
        .flatten()
        .map(|m| {
            let options = m.options().iter().flatten().cloned().collect::<Vec<_>>().join(",");
            format!(
                "{} {} {} {options}",
                m.destination().display(),
                m.typ().as_deref().unwrap(),
                m.source().as_ref().unwrap().display()
            )
        })
        .collect();
    let mut expected = vec![
        // Nobody asked for it, and nothing is made in the image's own.
        "/dev tmpfs tmpfs nosuid,strictatime,mode=755,size=65536k".to_owned(),
        "/proc proc proc nosuid,noexec,nodev".to_owned(),
        "/sys sysfs sysfs nosuid,noexec,nodev".to_owned(),
        "/sys/fs/cgroup cgroup cgroup nosuid,noexec,nodev,relatime,rw".to_owned(),
        "/etc/hosts bind /s/binds/0 rbind".to_owned(),
        "/proc/meminfo bind /fs/c/proc/meminfo bind".to_owned(),
        "/sys/kernel/debug tmpfs tmpfs nosuid,noexec,nodev,mode=755,size=64k".to_owned(),
        "/dev/.lxc/proc proc proc nosuid,noexec,nodev".to_owned(),
        "/dev/.lxc/sys sysfs sysfs nosuid,noexec,nodev".to_owned(),
    ];
    expected.extend(
        DATA_ROOTS.iter().enumerate().map(|(at, root)| format!("{root} bind /s/binds/{} bind", at + 1)),
    );
    assert_eq!(shown, expected);
    let file = plan.targets.iter().find(|target| target.path == Path::new("/etc/hosts")).unwrap();
    assert_eq!(file.kind, TargetKind::File);
}

#[test]
fn the_containers_dev_is_its_own_once() {
    let tmpfs = json!([{"destination": "/dev/", "type": "tmpfs", "source": "tmpfs"}]);
    let plan = planned(spec(tmpfs, json!({}))).unwrap();
    let mounts = plan.spec.mounts().iter().flatten();
    assert_eq!(mounts.filter(|mount| mount.destination() == Path::new("/dev")).count(), 1);
}

#[test]
fn a_users_mount_on_a_data_root_takes_its_place() {
    let roots = |mounts| planned(spec(mounts, json!({}))).unwrap().layer_roots.len();
    assert_eq!(roots(json!([])), DATA_ROOTS.len());
    assert_eq!(roots(json!([bind("/var/lib/docker", "/h/a", &[])])), DATA_ROOTS.len() - 1);
    assert_eq!(roots(json!([bind("/var/lib", "/h/a", &[])])), 0);
}

#[test]
fn data_roots_are_volumes_where_the_layer_cannot_hold_them() {
    let roots = |env: &[&str], read_only: bool, change: &dyn Fn(&mut Survey)| {
        let mut wanted = serde_json::to_value(spec(json!([]), json!({}))).unwrap();
        wanted["process"]["env"] = json!(env);
        wanted["root"]["readonly"] = json!(read_only);
        let plan = planned_on(serde_json::from_value(wanted).unwrap(), change).unwrap();
        let shifted = plan.volumes.iter().all(|volume| {
            plan.binds.iter().any(|bind| bind.source == volume.host && bind.shift == Shift::Must)
        });
        assert!(shifted, "{:?}", plan.volumes);
        let first = plan.volumes.first().map(|volume| volume.host.display().to_string());
        (plan.layer_roots.len(), plan.volumes.len(), first)
    };
    let all = DATA_ROOTS.len();
    let there = Some("/v/c/var-lib-docker".to_owned());
    let directory = |survey: &mut Survey| survey.ground = Ground::Directory;
    let docker_there = |survey: &mut Survey| {
        survey.ground = Ground::Directory;
        survey.present_roots = vec!["/var/lib/docker".into()];
    };
    let no_upper = |survey: &mut Survey| survey.takes_overlays = false;
    let docker_on_no_upper = |survey: &mut Survey| {
        docker_there(survey);
        survey.takes_overlays = false;
    };
    let volume = ["SYSBOX_DATA_ROOT=volume"];
    assert_eq!(roots(&[], false, &|_| {}), (all, 0, None));
    assert_eq!(roots(&volume, false, &|_| {}), (0, all, there.clone()));
    assert_eq!(roots(&[], true, &|_| {}), (0, all, there.clone()));
    assert_eq!(roots(&[], false, &no_upper), (0, all, there.clone()));
    // A plain directory is a real file system by itself; a read-only one without data roots is nobody's machine.
    assert_eq!(roots(&[], false, &directory), (0, 0, None));
    assert_eq!(roots(&[], true, &directory), (0, 0, None));
    assert_eq!(roots(&[], false, &docker_there), (0, 0, None));
    assert_eq!(roots(&[], true, &docker_there), (0, 1, there.clone()));
    assert_eq!(roots(&[], false, &docker_on_no_upper), (0, 1, there.clone()));
    assert_eq!(roots(&volume, false, &directory), (0, all, there));
    assert_eq!(roots(&["SYSBOX_SYSCONT_MODE=FALSE"], true, &|_| {}), (0, 0, None));
}

#[test]
fn sources_are_shifted_unless_they_are_the_containers_already() {
    let shift = |source| planned(spec(json!([bind("/x", source, &[])]), json!({}))).unwrap().binds[0].shift;
    assert_eq!(shift("/h/a"), Shift::Try);
    assert_eq!(shift("/h/ours"), Shift::Never);
}

#[test]
fn a_source_that_host_users_reach_is_warned_of_with_the_remedy() {
    let warnings = |options: &[&str]| {
        planned(spec(json!([bind("/x", "/h/open", options)]), json!({}))).unwrap().warnings
    };
    assert!(warnings(&["ro"]).is_empty());
    let said = warnings(&["rw"]).join("\n");
    assert!(said.contains("/h/open") && said.contains("chmod 700"), "{said}");
}

#[test]
fn faults_name_the_mount() {
    let refusal = |mounts| planned(spec(mounts, json!({}))).unwrap_err().to_string();
    assert_eq!(
        refusal(json!([bind("/x", "/h/a", &[]), bind("/y", "/gone", &[])])),
        "/mounts/1: bind source /gone: no such file or directory"
    );
    assert_eq!(
        refusal(json!([bind("/proc/sys", "/h/a", &[])])),
        "/mounts/0: /proc/sys cannot be mounted because it is inside /proc"
    );
    let tmpfs = |destination: &str| json!([{"destination": destination, "type": "tmpfs", "source": "tmpfs"}]);
    for (mounts, expected) in [
        (json!([bind("/x/..", "/h/a", &[])]), "mountpoint \"/\" is on the top of rootfs"),
        (
            json!([bind("/dev/../dev", "/dev", &["rbind"])]),
            "the host's /dev cannot be the container's; hint: give single devices (`--device`), or bind it elsewhere",
        ),
        (tmpfs("/proc/.."), "mountpoint \"/\" is on the top of rootfs"),
        (tmpfs("/proc"), "\"/proc\" cannot be mounted because it is not of type proc"),
        (tmpfs("/proc/../proc/sys/./net"), "/proc/sys/net cannot be mounted because it is inside /proc"),
    ] {
        assert_eq!(refusal(mounts), format!("/mounts/0: {expected}"));
    }
}

#[test]
fn a_mount_is_shifted_by_the_containers_map_or_by_its_own() {
    let with = |host: u32| {
        let mut mount = bind("/x", "/h/a", &["bind"]);
        let line = json!([{"containerID": 0, "hostID": host, "size": 65536}]);
        (mount["uidMappings"], mount["gidMappings"]) = (line.clone(), line);
        planned(spec(json!([mount]), json!({})))
    };
    let of = |host: u32| with(host).unwrap().binds.remove(0);
    assert_eq!((of(300_000).shift, of(300_000).map), (Shift::Must, None));
    assert_eq!((of(400_000).shift, of(400_000).map.unwrap().uids[0].outside), (Shift::Must, 400_000));
}

#[test]
fn sysctls_that_reach_the_host_are_refused() {
    let with = |key: &str, value: &str| planned(spec(json!([]), json!({"sysctl": {key: value}})));
    assert_eq!(
        with("kernel.panic", "1").unwrap_err().to_string(),
        "/linux/sysctl: `kernel.panic` is not namespaced: it would change the host"
    );
    assert!(with("net/../kernel/panic", "1").is_err());
    let fitted = with("net.ipv4.ping_group_range", "0 2147483647").unwrap();
    assert_eq!(
        fitted.spec.linux().as_ref().unwrap().sysctl().as_ref().unwrap()["net.ipv4.ping_group_range"],
        "0 65535"
    );
    let named = with("kernel.domainname", "example").unwrap();
    assert_eq!(named.spec.domainname().as_deref(), Some("example"));
}

#[test]
fn root_has_every_capability_and_another_user_none() {
    let entry_of = |uid: u32| {
        let mut spec = spec(json!([]), json!({}));
        spec.process_mut().as_mut().unwrap().user_mut().set_uid(uid);
        planned(spec).map(|plan| plan.entry)
    };
    let root = entry_of(0).unwrap();
    assert_eq!(
        (root.capabilities.effective.len(), root.capabilities.bounding.len()),
        (caps::all().len(), caps::all().len())
    );
    assert!(entry_of(1000).unwrap().capabilities.effective.is_empty());
    assert_eq!(
        entry_of(70000).unwrap_err().to_string(),
        "/process/user: uid 70000 is not mapped in the container (0 to 65535)"
    );
}

#[test]
fn devices_outside_dev_are_refused() {
    let with = |path: &str| {
        planned(spec(json!([]), json!({"devices": [{"path": path, "type": "c", "major": 1, "minor": 3}]})))
    };
    for path in ["/etc/x", "/dev", "/dev/../etc/x", "dev/x"] {
        assert_eq!(with(path).unwrap_err(), PlanError::DevicePath { path: path.into() });
    }
    let numbered = json!({"devices": [{"path": "/dev/x", "type": "c", "major": -1, "minor": 3}]});
    let said = planned(spec(json!([]), numbered)).unwrap_err().to_string();
    assert_eq!(said, "/linux/devices: /dev/x: -1 is no number of a device");
    assert!(with("/dev/mine").unwrap().nodes.iter().any(|node| node.path == Path::new("/dev/mine")));
}

#[test]
fn every_device_of_the_host_is_none_of_the_containers() {
    let privileged = planned(spec(
        json!([]),
        json!({
            "devices": [{"path": "/dev/sda", "type": "b", "major": 8, "minor": 0}],
            "resources": {"devices": [{"allow": true, "access": "rwm"}]},
        }),
    ))
    .unwrap();
    assert!(privileged.nodes.iter().all(|node| node.typ == oci_spec::runtime::LinuxDeviceType::C));
    assert!(!privileged.nodes.iter().any(|node| node.path == Path::new("/dev/sda")));
    let rules = privileged.resources.devices().clone().unwrap();
    assert!(!rules[0].allow() && rules[1..].iter().all(|rule| rule.major().is_some()));
    let asked = json!([{"path": "/dev/sda", "type": "b", "major": 8, "minor": 0}]);
    let one = planned(spec(json!([]), json!({"devices": asked}))).unwrap();
    assert!(one.nodes.iter().any(|node| node.path == Path::new("/dev/sda")));
}

#[test]
fn host_mounts_come_later_only_where_they_are_asked_for() {
    let receives = |options: &[&str]| {
        planned(spec(json!([bind("/x", "/h/a", options)]), json!({}))).unwrap().binds[0].receives
    };
    assert_eq!(receives(&["rbind", "rprivate"]), Receives::Nothing);
    assert_eq!(receives(&["rbind"]), Receives::Nothing);
    assert_eq!(receives(&["rbind", "rslave"]), Receives::HostMounts);
}

#[test]
fn contiguous_lines_of_a_map_are_joined() {
    let line = |inside: u32, outside: u32, count: u32| json!({"containerID": inside, "hostID": outside, "size": count});
    let lines = json!([line(100, 200_100, 65436), line(0, 200_000, 100)]);
    let map = own_map(&spec(json!([]), json!({"uidMappings": lines.clone(), "gidMappings": lines})))
        .unwrap()
        .unwrap();
    assert_eq!(map, IdMap::of_range(IdRange { start: 200_000, count: 65536 }).unwrap());
}

proptest! {
    /// Whatever a spec says, every target is absolute and stays below the rootfs, and every source is staged or ours.
    #[test]
    fn no_plan_names_a_target_outside_the_rootfs(
        destinations in proptest::collection::vec("(/(\\.\\.|\\.|a|b|proc|sys|dev|var|lib|docker|etc)){1,6}/?", 0..6),
        read_only in proptest::collection::vec(any::<bool>(), 6),
    ) {
        let mounts: Vec<Value> = destinations
            .iter()
            .zip(&read_only)
            .map(|(destination, ro)| bind(destination, "/h/a", if *ro { &["rbind", "ro"] } else { &["rbind"] }))
            .collect();
        let Ok(plan) = planned(spec(json!(mounts), json!({}))) else { return Ok(()) };
        let stays = |path: &Path| path.is_absolute() && !path.components().any(|part| part == Component::ParentDir);
        for target in &plan.targets {
            prop_assert!(stays(&target.path), "{target:?}");
        }
        for mount in plan.spec.mounts().iter().flatten() {
            prop_assert!(stays(mount.destination()), "{mount:?}");
            if is_bind(mount) {
                let source = mount.source().as_ref().unwrap();
                prop_assert!(source.starts_with("/s/binds") || source.starts_with("/fs/c"), "{mount:?}");
            }
        }
        for bind in &plan.binds {
            if let Place::Locked(target) = &bind.place {
                prop_assert!(stays(&target.path), "{target:?}");
            }
        }
        prop_assert!(plan.nodes.iter().all(|node| node.path.starts_with("/dev") && stays(&node.path)));
    }
}
