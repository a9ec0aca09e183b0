//! One config.json judged without a kernel: read, checked, planned for a host that stands here, its filter compiled. For
//! tests of the plan, and for tests/fuzz.

#![allow(clippy::unwrap_used, reason = "a host that is written down here")]

#[path = "../../../tests/src/mutate.rs"]
#[cfg_attr(not(test), allow(dead_code, reason = "the fuzzer changes bytes by itself"))]
pub(super) mod mutate;

use super::*;
use crate::survey::{Ground, Overlay, Source};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::Component;
use sysbox_ipc::IdRange;
use sysbox_ipc::mgr::{Defaults, HostFacts};

pub(super) fn source(is_directory: bool) -> Source {
    Source { is_directory, uid: 0, gid: 0, magic: 0xef53, exposed: false }
}

pub(super) fn planned(spec: Spec) -> Result<Plan, PlanError> {
    planned_on(spec, |_| {})
}

pub(super) fn planned_on(spec: Spec, change: impl FnOnce(&mut Survey)) -> Result<Plan, PlanError> {
    let bundle = Bundle { dir: "/b".into(), rootfs: "/b/rootfs".into(), spec, unknown: vec![] };
    let mut sources = BTreeMap::new();
    for name in ["/h/a", "/h/b", "/h/c"] {
        sources.insert(PathBuf::from(name), source(true));
    }
    sources.insert(PathBuf::from("/h/file"), source(false));
    sources.insert(PathBuf::from("/h/open"), Source { exposed: true, ..source(true) });
    sources.insert(PathBuf::from("/h/ours"), Source { uid: 300_005, ..source(true) });
    let overlay = Overlay { lowers: vec!["/l".into()], upper: "/u/diff".into(), work: "/u/work".into() };
    let mut survey = Survey {
        ground: Ground::Overlay(overlay),
        root_owner: (0, 0),
        root_exposed: false,
        dev_is_link: false,
        sources,
        moved_roots: vec![],
        unusable_roots: vec![],
        present_roots: vec![],
        bare: vec![],
        takes_overlays: true,
        present: vec!["/dev/fuse", "/sys/kernel/debug"],
        systemd: false,
        kernel_trees: vec![],
        boottime_ns: 12_345_000_000_000,
        cgroup_v2: false,
    };
    change(&mut survey);
    let facts = HostFacts { time_namespace: true, ..HostFacts::default() };
    let id_map = IdMap::of_range(IdRange { start: 300_000, count: 65536 }).unwrap();
    let grant = Grant {
        id_map,
        slot: 1,
        share_with: None,
        same_rootfs: None,
        facts,
        defaults: Defaults::default(),
        volumes: "/v/c".into(),
    };
    let prepared = Prepared { directory: "/fs/c".into(), leaves: vec!["proc/meminfo".into()] };
    let env = bundle.spec.process().as_ref().and_then(|process| process.env().clone()).unwrap_or_default();
    let settings = Settings::read(&env, grant.defaults).unwrap();
    plan(&bundle, &survey, &grant, &Stage { dir: "/s".into() }, &prepared, &settings)
}

/// A document that has every field there is, most of them in order.
pub fn base() -> Value {
    let bind = |to: &str, from: &str| json!({"destination": to, "type": "bind", "source": from, "options": ["rbind", "ro"]});
    let mut base = json!({
        "ociVersion": "1.0.2",
        "root": {"path": "rootfs", "readonly": false},
        "process": {"args": ["sh"], "cwd": "/", "env": ["A=b"], "user": {"uid": 0, "gid": 0}},
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup", "options": ["ro"]},
            {"destination": "/t", "type": "tmpfs", "source": "tmpfs", "options": ["size=64k", "mode=755"]},
            bind("/a", "/h/a"), bind("/a/b", "/h/b"), bind("/etc/hosts", "/h/file"),
        ],
        "linux": {"namespaces": [{"type": "pid"}, {"type": "ipc"}, {"type": "uts"}, {"type": "mount"}, {"type": "network"}]},
    });
    mutate::merge(&mut base, &Value::Object(mutate::every_field()));
    base
}

/// Whether an error says where in the document: by a pointer that begins with one of its fields, or the one that the parser
/// was at.
pub fn names_a_place(error: &str) -> bool {
    const FIELDS: &[&str] = &[
        "/ociVersion",
        "/process",
        "/root",
        "/linux",
        "/mounts",
        "/hooks",
        "/hostname",
        "/domainname",
        "/annotations",
        "/uidMappings",
        "/vm",
        "/solaris",
        "/windows",
        "/zos",
    ];
    FIELDS.iter().any(|field| error.contains(field)) || error.starts_with("config.json: /")
}

fn stays_inside(plan: &Plan) -> bool {
    let stays =
        |path: &Path| path.is_absolute() && !path.components().any(|part| part == Component::ParentDir);
    plan.targets.iter().all(|target| stays(&target.path))
        && plan.spec.mounts().iter().flatten().all(|mount| stays(mount.destination()))
        && plan.nodes.iter().all(|node| node.path.starts_with("/dev") && stays(&node.path))
}

/// What becomes of a document: whether all that was planned stays inside the rootfs, or the line in which it is refused.
///
/// # Errors
/// The refusal.
pub fn judged(text: &[u8]) -> Result<bool, String> {
    let (spec, _) =
        crate::bundle::parse(Path::new("config.json"), text).map_err(|error| error.to_string())?;
    let env = spec.process().as_ref().and_then(|process| process.env().clone()).unwrap_or_default();
    Settings::read(&env, Defaults::default()).map_err(|error| format!("/process/env: {error}"))?;
    own_map(&spec).map_err(|error| error.to_string())?;
    let plan = planned(spec).map_err(|error| error.to_string())?;
    if let Some(profile) = &plan.seccomp {
        crate::filter::compile(profile).map_err(|error| error.to_string())?;
    }
    Ok(stays_inside(&plan))
}
