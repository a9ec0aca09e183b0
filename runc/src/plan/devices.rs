//! The container's /dev: which nodes, who owns them, and which device rules they need.

use std::path::{Path, PathBuf};

use oci_spec::runtime::{
    LinuxDevice, LinuxDeviceBuilder, LinuxDeviceCgroup, LinuxDeviceCgroupBuilder, LinuxDeviceType,
    LinuxResources, Spec,
};
use sysbox_ipc::IdMap;

use super::PlanError;
use crate::survey::Survey;

/// A device node, made by the runtime on a tmpfs of the initial user namespace: one made inside could not be opened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Node {
    /// Absolute, below /dev.
    pub path: PathBuf,
    pub typ: LinuxDeviceType,
    pub major: u32,
    pub minor: u32,
    pub mode: u32,
    /// Host ids.
    pub uid: u32,
    pub gid: u32,
    /// Whether libcontainer makes it by itself and only needs to find it.
    pub standard: bool,
}

/// Every container has these (OCI runtime specification, default devices).
const STANDARD: &[(&str, u32, u32)] = &[
    ("/dev/null", 1, 3),
    ("/dev/zero", 1, 5),
    ("/dev/full", 1, 7),
    ("/dev/random", 1, 8),
    ("/dev/urandom", 1, 9),
    ("/dev/tty", 5, 0),
];

/// Harmless in a user namespace, and machines need them: inner FUSE file systems, VPNs.
const MACHINE: &[(&str, u32, u32)] = &[("/dev/fuse", 10, 229), ("/dev/net/tun", 10, 200)];

/// Made by devpts and the console; a listed node would be in the way (`--privileged` lists them).
const NOT_NODES: &[&str] = &["/dev/ptmx", "/dev/console", "/dev/pts", "/dev/kmsg"];

pub(super) fn plan(spec: &Spec, survey: &Survey, map: &IdMap, machine: bool) -> Result<Vec<Node>, PlanError> {
    let plain = |path: &str, major, minor, standard| Node {
        path: PathBuf::from(path),
        typ: LinuxDeviceType::C,
        major,
        minor,
        mode: 0o666,
        uid: map.root_uid(),
        gid: map.root_gid(),
        standard,
    };
    let mut nodes: Vec<Node> =
        STANDARD.iter().map(|(path, major, minor)| plain(path, *major, *minor, true)).collect();
    let added = MACHINE.iter().filter(|(path, ..)| machine && survey.present.contains(path));
    nodes.extend(added.map(|(path, major, minor)| plain(path, *major, *minor, false)));
    let asked = spec.linux().as_ref().and_then(|linux| linux.devices().as_ref()).into_iter().flatten();
    // `--privileged` lists every device of the host: a machine has none of them (docs/SECURITY.md).
    let everything = spec.linux().as_ref().and_then(|l| l.resources().as_ref()).is_some_and(allows_all);
    for device in asked.filter(|_| !everything) {
        let path = device.path();
        let inside = path.strip_prefix("/dev").ok().filter(|rest| !rest.as_os_str().is_empty());
        let plain_names = path.components().all(|part| !matches!(part, std::path::Component::ParentDir));
        if inside.is_none() || !plain_names {
            return Err(PlanError::DevicePath { path: path.clone() });
        }
        if NOT_NODES.iter().any(|other| Path::new(other) == path) {
            continue;
        }
        let number = |value: i64| {
            u32::try_from(value).map_err(|_| PlanError::DeviceNumber { path: path.clone(), number: value })
        };
        let standard = nodes.iter().any(|node| node.path == *path && node.standard);
        nodes.retain(|node| node.path != *path);
        nodes.push(Node {
            path: path.clone(),
            typ: device.typ(),
            major: number(device.major())?,
            minor: number(device.minor())?,
            mode: device.file_mode().unwrap_or(0o666) & 0o777,
            uid: map.host_uid(device.uid().unwrap_or(0)).unwrap_or_else(|| map.root_uid()),
            gid: map.host_gid(device.gid().unwrap_or(0)).unwrap_or_else(|| map.root_gid()),
            standard,
        });
    }
    Ok(nodes)
}

/// Whether the rules let the container at every device there is.
fn allows_all(resources: &LinuxResources) -> bool {
    resources.devices().iter().flatten().any(|rule| rule.allow() && is_for_all(rule))
}

fn is_for_all(rule: &LinuxDeviceCgroup) -> bool {
    let any = |number: Option<i64>| number.is_none_or(|number| number < 0);
    matches!(rule.typ(), None | Some(LinuxDeviceType::A)) && any(rule.major()) && any(rule.minor())
}

/// The nodes as libcontainer is to bind them; the standard ones it binds unasked.
pub(super) fn listed(nodes: &[Node]) -> Vec<LinuxDevice> {
    let build = |node: &Node| {
        LinuxDeviceBuilder::default()
            .path(node.path.clone())
            .typ(node.typ)
            .major(i64::from(node.major))
            .minor(i64::from(node.minor))
            .build()
            .expect("every field without a default is set")
    };
    nodes.iter().filter(|node| !node.standard).map(build).collect()
}

/// Device cgroup rules: what the engine says, and then the machine nodes, which it does not know of.
pub(super) fn rules(mut resources: LinuxResources, nodes: &[Node]) -> LinuxResources {
    let mut rules = resources.devices().clone().unwrap_or_default();
    if allows_all(&resources) || !rules.iter().any(is_for_all) {
        let none =
            LinuxDeviceCgroupBuilder::default().allow(false).typ(LinuxDeviceType::A).access("rwm").build();
        rules.retain(|rule| !is_for_all(rule));
        rules.insert(0, none.expect("every field without a default is set"));
    }
    // A number below 0 is how engines say "all of them" (`--device-cgroup-rule 'c 42:* rwm'`).
    for rule in &mut rules {
        rule.set_major(rule.major().filter(|number| *number >= 0));
        rule.set_minor(rule.minor().filter(|number| *number >= 0));
    }
    let machine = nodes.iter().filter(|node| MACHINE.iter().any(|(path, ..)| Path::new(path) == node.path));
    rules.extend(machine.map(|node| {
        LinuxDeviceCgroupBuilder::default()
            .allow(true)
            .typ(node.typ)
            .major(i64::from(node.major))
            .minor(i64::from(node.minor))
            .access("rwm")
            .build()
            .expect("every field without a default is set")
    }));
    resources.set_devices(Some(rules));
    resources
}
