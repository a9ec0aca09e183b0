//! The plan: what is to be done to make a system container of an OCI spec. Pure: spec, survey, grant and settings in,
//! a [`Plan`] or a refusal out. Opens nothing, asks the kernel nothing.

mod claims;
mod devices;
mod mounts;
mod options;
mod places;
mod process;
mod profile;
mod resources;
mod settings;

use std::path::{Path, PathBuf};

use oci_spec::runtime::{
    LinuxIdMapping, LinuxIdMappingBuilder, LinuxNamespace, LinuxNamespaceBuilder, LinuxNamespaceType,
    LinuxResources, LinuxSeccomp, LinuxTimeOffsetBuilder, PosixRlimit, Spec,
};
use sysbox_ipc::fs::Prepared;
use sysbox_ipc::mgr::Grant;
use sysbox_ipc::{IdMap, IdMapError, IdMapLine};

use crate::bundle::Bundle;
use crate::survey::{Ground, Survey};

pub use claims::{Wanted, wanted};
pub use devices::Node;
pub use mounts::{Bind, Extent, Place, Receives, Shift, Target, TargetKind};
pub use options::{Atime, Attributes};
pub use process::{Entry, entry, for_libcontainer, name_container};
pub use settings::{SettingError, Settings};

/// Where the plan will be carried out: paths in the runtime's private mount namespace.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stage {
    pub dir: PathBuf,
}

impl Stage {
    /// Below the run directory; the manager makes the directory, every runtime mounts a tmpfs of its own over it.
    pub fn below(run_dir: &Path) -> Self {
        Self { dir: run_dir.join("stage") }
    }

    pub fn rootfs(&self) -> PathBuf {
        self.dir.join("rootfs")
    }

    pub fn bind(&self, number: usize) -> PathBuf {
        self.dir.join("binds").join(number.to_string())
    }
}

/// Why a spec cannot be made a system container. Names the place by JSON pointer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PlanError {
    #[error("/linux/uidMappings, /linux/gidMappings: {0}")]
    IdMap(#[from] IdMapError),
    #[error("/mounts/{at}: bind source {}: no such file or directory", source_path.display())]
    NoSource { at: usize, source_path: PathBuf },
    #[error("/mounts/{at}: mountpoint \"/\" is on the top of rootfs")]
    OnRoot { at: usize },
    #[error("/mounts/{at}: \"/proc\" cannot be mounted because it is not of type proc")]
    NotProc { at: usize },
    #[error("/mounts/{at}: {} cannot be mounted because it is inside /proc", destination.display())]
    InsideProc { at: usize, destination: PathBuf },
    #[error("/mounts/{at}: {why}")]
    Mount { at: usize, why: String },
    #[error("/linux/sysctl: `{key}` is not namespaced: it would change the host")]
    Sysctl { key: String },
    #[error("/process/user: {kind} {id} is not mapped in the container (0 to {last})")]
    UnmappedId { kind: &'static str, id: u32, last: u32 },
    #[error("/process/apparmorProfile: `{profile}` cannot be applied: AppArmor is not enabled on this host")]
    NoAppArmor { profile: String },
    /// libcontainer makes devices and links by path there, before the root is changed: they would be made on the host.
    #[error("rootfs: /dev is a symbolic link; hint: replace it by a directory")]
    DevIsLink,
    /// Everything on it would be nobody's.
    #[error(
        "rootfs {}: it belongs to {owner}, who has no id in the container; hint: an engine with userns-remap has to hand on \
         its mappings: leave `--userns=host` out", path.display()
    )]
    Foreign { path: PathBuf, owner: String },
    #[error(
        "data root {}, which {told_by} of the image names, cannot be one: {why}; hint: mount a volume there, or change the file",
        path.display()
    )]
    DataRoot { path: PathBuf, told_by: &'static str, why: &'static str },
    #[error("/linux/devices: {} is not below /dev", path.display())]
    DevicePath { path: PathBuf },
    #[error("/linux/devices: {}: {number} is no number of a device", path.display())]
    DeviceNumber { path: PathBuf, number: i64 },
    #[error("/linux/rootfsPropagation: `{asked}` is not one of shared, slave, private, unbindable")]
    Propagation { asked: String },
    #[error("/process/ioPriority/priority: {level} is not 0 to 7")]
    IoPriority { level: i64 },
    #[error("/process/oomScoreAdj: {score} is not -1000 to 1000")]
    OomScore { score: i32 },
    #[error("/linux/resources/{member}: {why}")]
    Resource { member: &'static str, why: &'static str },
    #[error("/linux: could not be built: {0}")]
    Build(String),
}

/// How the root file system is brought in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Root {
    pub shift: Shift,
    pub read_only: bool,
}

/// Everything that is to be done, decided.
#[derive(Debug, Clone, PartialEq)]
pub struct Plan {
    /// As libcontainer gets it: no seccomp, no limits, no capabilities; those come last, from `entry`.
    pub spec: Spec,
    pub root: Root,
    /// Mount targets directly on the rootfs, to be there before anything is mounted.
    pub targets: Vec<Target>,
    /// Device nodes of the staged /dev.
    pub nodes: Vec<Node>,
    /// Clones of host mounts; the ones placed in the rootfs first, parents before children.
    pub binds: Vec<Bind>,
    /// Paths outside /proc and /sys to be hidden for good.
    pub masks: Vec<PathBuf>,
    /// Paths outside /proc and /sys to be read-only for good.
    pub frozen: Vec<PathBuf>,
    /// Data roots to be attached from the container's own layer.
    pub layer_roots: Vec<LayerRoot>,
    /// Data roots that are managed volumes; they are among the binds.
    pub volumes: Vec<Volume>,
    /// What the container's first process becomes.
    pub entry: Entry,
    pub resources: LinuxResources,
    pub limits: Vec<PosixRlimit>,
    pub oom_score_adj: Option<i32>,
    pub seccomp: Option<LinuxSeccomp>,
    /// For a person: what is done worse than asked, with the remedy.
    pub warnings: Vec<String>,
}

/// A data root of an inner engine in the container's own writable layer (docs/decisions/0003-data-roots.md).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayerRoot {
    /// Inside the container.
    pub path: PathBuf,
    /// Where it is staged.
    pub bind: usize,
}

/// A data root in a directory of the manager's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Volume {
    /// Inside the container.
    pub path: PathBuf,
    /// On the host: a directory of this name in [`Grant::volumes`].
    pub name: String,
    pub host: PathBuf,
}

/// The mappings that come with a spec, if any.
///
/// # Errors
/// A map that breaks a rule of [`IdMap`].
pub fn own_map(spec: &Spec) -> Result<Option<IdMap>, PlanError> {
    let Some(linux) = spec.linux() else { return Ok(None) };
    let (uids, gids) = (lines(linux.uid_mappings()), lines(linux.gid_mappings()));
    if uids.is_empty() && gids.is_empty() {
        return Ok(None);
    }
    Ok(Some(IdMap::new(uids, gids)?))
}

fn lines(mappings: &Option<Vec<LinuxIdMapping>>) -> Vec<IdMapLine> {
    let line =
        |m: &LinuxIdMapping| IdMapLine { inside: m.container_id(), outside: m.host_id(), count: m.size() };
    merge(mappings.iter().flatten().map(line).collect())
}

/// Joins lines that continue each other: fewer lines, and the kernel takes at most 340.
fn merge(mut lines: Vec<IdMapLine>) -> Vec<IdMapLine> {
    lines.sort_by_key(|line| line.inside);
    let mut merged: Vec<IdMapLine> = Vec::new();
    for line in lines {
        match merged.last_mut() {
            Some(last)
                if last.inside.checked_add(last.count) == Some(line.inside)
                    && last.outside.checked_add(last.count) == Some(line.outside) =>
            {
                last.count = last.count.saturating_add(line.count);
            }
            _ => merged.push(line),
        }
    }
    merged
}

/// Decides everything.
///
/// # Errors
/// See [`PlanError`]; nothing has been done then.
pub fn plan(
    bundle: &Bundle,
    survey: &Survey,
    grant: &Grant,
    stage: &Stage,
    prepared: &Prepared,
    settings: &Settings,
) -> Result<Plan, PlanError> {
    if survey.dev_is_link {
        return Err(PlanError::DevIsLink);
    }
    let mut spec = bundle.spec.clone();
    let read_only = spec.root().as_ref().is_some_and(|root| root.readonly().unwrap_or(false));
    let map = &grant.id_map;
    let root = root(bundle, survey, map, read_only)?;
    let mut warnings: Vec<String> = open_rootfs(bundle, survey, root).into_iter().collect();
    warnings.extend(settings.needless.iter().map(|why| (*why).to_owned()));
    if let Some(other) = grant.same_rootfs.as_ref().filter(|_| !read_only) {
        warnings.push(format!(
            "rootfs {}: container `{other}` runs on it as well, and neither expects the other's writes; hint: give each a \
             copy, or make it read-only",
            bundle.rootfs.display()
        ));
    }

    let mounted = mounts::plan(bundle, survey, grant, stage, prepared, root, settings, &mut warnings)?;
    let nodes = devices::plan(&spec, survey, map, settings.common.syscont_mode)?;
    let process = spec.process().clone().unwrap_or_default();
    let mut entry = process::entry(&process, map, &grant.facts, settings)?;
    if settings.common.syscont_mode && survey.systemd {
        process::name_container(&mut entry.env);
    }

    let mut linux = spec.linux().clone().unwrap_or_default();
    linux.set_namespaces(Some(namespaces(&linux, grant)));
    linux.set_uid_mappings(Some(mappings(map.uids())?));
    linux.set_gid_mappings(Some(mappings(map.gids())?));
    let (sysctl, domainname) = sysctls(linux.sysctl().clone().unwrap_or_default(), map)?;
    linux.set_sysctl(Some(sysctl));
    if grant.facts.time_namespace && linux.time_offsets().is_none() && grant.share_with.is_none() {
        linux.set_time_offsets(Some(since_now(survey.boottime_ns)?));
    }
    linux.set_devices(Some(devices::listed(&nodes)));
    let asked = linux.seccomp().clone();
    let seccomp = if settings.common.syscont_mode { profile::widen(asked) } else { asked };
    linux.set_seccomp(None);
    linux.set_masked_paths(Some(mounted.masked));
    linux.set_readonly_paths(Some(mounted.read_only));
    let limits =
        resources::fit(linux.resources().clone().unwrap_or_default(), survey.cgroup_v2, &mut warnings)?;
    let resources = devices::rules(limits, &nodes);
    linux.set_resources(None);
    // Machines expect their root to be shared: mount propagation inside (kubelet, containerd) depends on it. An engine asks
    // for a slave where one of the volumes is to receive the host's mounts; that one does, beneath a shared root too.
    let propagation = linux.rootfs_propagation().as_deref().map(propagation).transpose()?;
    linux.set_rootfs_propagation(propagation.map(str::to_owned));
    if settings.common.syscont_mode && propagation.is_none_or(|asked| asked == "slave") {
        linux.set_rootfs_propagation(Some("shared".to_owned()));
    }
    linux.set_cgroups_path(None);
    // Only an empty one comes so far, which libcontainer would hand to the kernel as `context=""`.
    linux.set_mount_label(None);

    if let Some(name) = domainname {
        spec.set_domainname(Some(name));
    }
    if let Some(mut root) = spec.root().clone() {
        root.set_path(stage.rootfs());
        // Read-only is set on the staged mount, whose copy in the container the kernel locks.
        root.set_readonly(Some(false));
        spec.set_root(Some(root));
    }
    spec.set_mounts(Some(mounted.mounts));
    spec.set_linux(Some(linux));
    let limits = process.rlimits().clone().unwrap_or_default();
    let oom_score_adj = process.oom_score_adj().map(crate::limits::within_reach);
    spec.set_process(Some(process::for_libcontainer(process, entry.apparmor.clone())));
    Ok(Plan {
        spec,
        root,
        targets: mounted.targets,
        nodes,
        binds: mounted.binds,
        masks: mounted.masks,
        frozen: mounted.frozen,
        layer_roots: mounted.layer_roots,
        volumes: mounted.volumes,
        entry,
        resources,
        limits,
        oom_score_adj,
        seccomp,
        warnings,
    })
}

/// A rootfs that belongs to the container's root already is shifted on disk (userns-remap): shifting again is wrong.
fn root(bundle: &Bundle, survey: &Survey, map: &IdMap, read_only: bool) -> Result<Root, PlanError> {
    let (uid, gid) = survey.root_owner;
    if (uid, gid) == (map.root_uid(), map.root_gid()) {
        return Ok(Root { shift: Shift::Never, read_only });
    }
    if map.host_uid(uid).is_none() || map.host_gid(gid).is_none() {
        return Err(PlanError::Foreign { path: bundle.rootfs.clone(), owner: format!("{uid}:{gid}") });
    }
    Ok(Root { shift: Shift::Must, read_only })
}

/// libcontainer's names for what runc knows; it changes the whole tree in any case.
fn propagation(asked: &str) -> Result<&'static str, PlanError> {
    match asked {
        "shared" | "rshared" => Ok("shared"),
        "slave" | "rslave" => Ok("slave"),
        "private" | "rprivate" => Ok("private"),
        "unbindable" | "runbindable" => Ok("unbindable"),
        _ => Err(PlanError::Propagation { asked: asked.to_owned() }),
    }
}

/// Files on disk have the ids that the container sees, so what its root makes setuid is setuid root to whoever reaches it.
/// An engine closes the way to its layers; a directory of the user's is his to close. One that is not shifted belongs to a
/// user without rights.
fn open_rootfs(bundle: &Bundle, survey: &Survey, root: Root) -> Option<String> {
    let roots = survey.ground == Ground::Directory && root.shift == Shift::Must && !root.read_only;
    (roots && survey.root_exposed).then(|| {
        format!(
            "rootfs {}: users of the host can reach it, so root of the container can leave setuid files there for them; \
             hint: close a directory on the way (chmod 700)",
            bundle.rootfs.display()
        )
    })
}

fn mappings(lines: &[IdMapLine]) -> Result<Vec<LinuxIdMapping>, PlanError> {
    lines
        .iter()
        .map(|l| {
            LinuxIdMappingBuilder::default()
                .container_id(l.inside)
                .host_id(l.outside)
                .size(l.count)
                .build()
                .map_err(|error| PlanError::Build(error.to_string()))
        })
        .collect()
}

/// Adds user, cgroup and time to what the spec asks for.
fn namespaces(linux: &oci_spec::runtime::Linux, grant: &Grant) -> Vec<LinuxNamespace> {
    let mut all = linux.namespaces().clone().unwrap_or_default();
    let has = |all: &[LinuxNamespace], typ| all.iter().any(|namespace| namespace.typ() == typ);
    let new =
        |typ| LinuxNamespaceBuilder::default().typ(typ).build().expect("a namespace needs its type alone");
    if let Some(host) = grant.share_with {
        all.retain(|namespace| namespace.typ() != LinuxNamespaceType::User);
        let mut user = new(LinuxNamespaceType::User);
        // Shows what is meant; it is entered by a descriptor (`create.rs`).
        user.set_path(Some(format!("/proc/{}/ns/user", host.pid).into()));
        all.push(user);
    }
    for typ in [LinuxNamespaceType::User, LinuxNamespaceType::Cgroup] {
        if !has(&all, typ) {
            all.push(new(typ));
        }
    }
    if grant.facts.time_namespace && !has(&all, LinuxNamespaceType::Time) {
        all.push(new(LinuxNamespaceType::Time));
    }
    all
}

/// The offset that makes the container's boot time now: uptime, btime and process ages are then right by nature
/// (time_namespaces(7)).
fn since_now(
    boottime_ns: i64,
) -> Result<std::collections::HashMap<String, oci_spec::runtime::LinuxTimeOffset>, PlanError> {
    const SECOND: i64 = 1_000_000_000;
    // Rounded down to a whole second: nanoseconds must not be negative, and uptime must not be either.
    let offset = LinuxTimeOffsetBuilder::default()
        .secs(-(boottime_ns / SECOND))
        .nanosecs(0u32)
        .build()
        .map_err(|error| PlanError::Build(error.to_string()))?;
    Ok([("boottime".to_owned(), offset)].into())
}

type Sysctls = std::collections::HashMap<String, String>;

/// Takes the domain name out (it has a call of its own), and fits ping_group_range to the ids there are: Docker asks for
/// the whole range, which the kernel refuses for gids that are not mapped.
fn sysctls(mut asked: Sysctls, map: &IdMap) -> Result<(Sysctls, Option<String>), PlanError> {
    const NAMESPACED: &[&str] = &[
        "kernel.sem",
        "kernel.msgmax",
        "kernel.msgmnb",
        "kernel.msgmni",
        "kernel.shmall",
        "kernel.shmmax",
        "kernel.shmmni",
        "kernel.shm_rmid_forced",
        "kernel.ns_last_pid",
        "kernel.pid_max",
    ];
    let domainname = asked.remove("kernel.domainname");
    for key in asked.keys() {
        let dotted = key.replace('/', ".");
        let fine = dotted.starts_with("net.")
            || dotted.starts_with("fs.mqueue.")
            || dotted.starts_with("user.")
            || NAMESPACED.contains(&dotted.as_str());
        if !fine || key.contains("..") {
            return Err(PlanError::Sysctl { key: key.clone() });
        }
    }
    if let Some(range) = asked.get_mut("net.ipv4.ping_group_range") {
        let last = map.gids().iter().map(|line| line.inside + (line.count - 1)).max().unwrap_or_default();
        let bounds: Vec<u32> =
            range.split_ascii_whitespace().filter_map(|bound| bound.parse().ok()).collect();
        if let [low, high] = bounds[..]
            && high > last
        {
            *range = format!("{low} {last}");
        }
    }
    Ok((asked, domainname))
}

#[cfg(test)]
mod hostile;
#[cfg(any(test, feature = "fuzz"))]
pub(crate) mod judged;
#[cfg(test)]
mod tests;
