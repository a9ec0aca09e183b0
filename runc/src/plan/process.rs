//! What the first process of a container, or of an exec, becomes: user, capabilities, directory, program.

use std::collections::HashSet;
use std::path::PathBuf;

use caps::Capability;
use oci_spec::runtime::{LinuxCapabilities, LinuxIOPriority, Process, UserBuilder};
use sysbox_ipc::IdMap;
use sysbox_ipc::mgr::HostFacts;

use super::{PlanError, Settings};

/// The last stage of a start, carried out inside the container by `init.rs`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    pub args: Vec<String>,
    pub env: Vec<String>,
    pub cwd: PathBuf,
    pub uid: u32,
    pub gid: u32,
    pub groups: Vec<u32>,
    pub umask: Option<u32>,
    /// Columns and rows of the terminal, if there is one.
    pub console_size: Option<(u16, u16)>,
    pub capabilities: Capabilities,
    pub no_new_privileges: bool,
    /// Where libcontainer is to apply one.
    pub apparmor: Option<String>,
}

/// The five sets of capabilities(7).
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Capabilities {
    pub bounding: HashSet<Capability>,
    pub permitted: HashSet<Capability>,
    pub effective: HashSet<Capability>,
    pub inheritable: HashSet<Capability>,
    pub ambient: HashSet<Capability>,
}

impl Capabilities {
    /// Of a machine: root has every capability, another user none that is effective. Inheritable and ambient ones would
    /// hand capabilities to programs that were never meant to have them (CVE-2022-24769).
    fn of_machine(uid: u32) -> Self {
        let all = caps::all();
        let own = if uid == 0 { all.clone() } else { HashSet::new() };
        Self { bounding: all, permitted: own.clone(), effective: own, ..Self::default() }
    }

    /// Of the spec, no more. Without any in it, there are none, as with runc.
    fn of_spec(asked: Option<&LinuxCapabilities>) -> Self {
        let set = |names: &Option<HashSet<oci_spec::runtime::Capability>>| -> HashSet<Capability> {
            // What this kernel's table has not, nobody can have.
            names.iter().flatten().filter_map(|name| format!("CAP_{name}").parse().ok()).collect()
        };
        let Some(asked) = asked else { return Self::default() };
        let (permitted, inheritable) = (set(asked.permitted()), set(asked.inheritable()));
        let both: HashSet<Capability> = permitted.intersection(&inheritable).copied().collect();
        Self {
            bounding: set(asked.bounding()),
            effective: set(asked.effective()).intersection(&permitted).copied().collect(),
            // The kernel's rule: ambient ones are permitted and inheritable (capabilities(7)).
            ambient: set(asked.ambient()).intersection(&both).copied().collect(),
            permitted,
            inheritable,
        }
    }
}

/// Profiles that engines give to every container. They refuse mount(2), without which no machine boots.
const ENGINE_PROFILES: &[&str] =
    &["docker-default", "containers-default", "crio-default", "cri-containerd.apparmor.d"];

/// Decides what the process becomes.
///
/// # Errors
/// An id that is not mapped; an AppArmor profile that cannot be applied.
pub fn entry(
    process: &Process,
    map: &IdMap,
    facts: &HostFacts,
    settings: &Settings,
) -> Result<Entry, PlanError> {
    let user = process.user();
    let groups = user.additional_gids().clone().unwrap_or_default();
    if map.host_uid(user.uid()).is_none() {
        return Err(PlanError::UnmappedId { kind: "uid", id: user.uid(), last: last(map.uids()) });
    }
    for gid in std::iter::once(user.gid()).chain(groups.iter().copied()) {
        if map.host_gid(gid).is_none() {
            return Err(PlanError::UnmappedId { kind: "gid", id: gid, last: last(map.gids()) });
        }
    }
    // The kernel would take the bits above as something else (ioprio_set(2)).
    if let Some(level) = process.io_priority().as_ref().map(LinuxIOPriority::priority)
        && !(0..=7).contains(&level)
    {
        return Err(PlanError::IoPriority { level });
    }
    // proc_pid_oom_score_adj(5)
    if let Some(score) = process.oom_score_adj().filter(|score| !(-1000..=1000).contains(score)) {
        return Err(PlanError::OomScore { score });
    }
    let machine = settings.common.syscont_mode;
    let capabilities = if machine && !settings.common.honor_caps {
        Capabilities::of_machine(user.uid())
    } else {
        Capabilities::of_spec(process.capabilities().as_ref())
    };
    Ok(Entry {
        args: process.args().clone().unwrap_or_default(),
        env: process.env().clone().unwrap_or_default(),
        cwd: process.cwd().clone(),
        uid: user.uid(),
        gid: user.gid(),
        groups,
        umask: user.umask(),
        console_size: console_size(process),
        capabilities,
        no_new_privileges: process.no_new_privileges().unwrap_or(false),
        apparmor: apparmor(process.apparmor_profile().as_deref(), facts, machine)?,
    })
}

/// By this systemd knows what it runs in (systemd.unit(5), `ConditionVirtualization=`). What the image says counts.
pub fn name_container(env: &mut Vec<String>) {
    if !env.iter().any(|pair| pair.starts_with("container=")) {
        env.push("container=private-users".to_owned());
    }
}

/// What no terminal can have is none.
fn console_size(process: &Process) -> Option<(u16, u16)> {
    let size = process.console_size().filter(|_| process.terminal().unwrap_or(false))?;
    let (columns, rows) = (u16::try_from(size.width()).ok()?, u16::try_from(size.height()).ok()?);
    (columns > 0 && rows > 0).then_some((columns, rows))
}

fn last(lines: &[sysbox_ipc::IdMapLine]) -> u32 {
    lines.iter().map(|line| line.inside + (line.count - 1)).max().unwrap_or_default()
}

fn apparmor(asked: Option<&str>, facts: &HostFacts, machine: bool) -> Result<Option<String>, PlanError> {
    match asked {
        None | Some("" | "unconfined") => Ok(None),
        Some(profile) if machine && ENGINE_PROFILES.iter().any(|engine| profile.starts_with(engine)) => {
            Ok(None)
        }
        Some(profile) if !facts.apparmor => Err(PlanError::NoAppArmor { profile: profile.to_owned() }),
        Some(profile) => Ok(Some(profile.to_owned())),
    }
}

/// What is left of the process for libcontainer: root with everything, in `/`. The rest comes last, from [`Entry`].
pub fn for_libcontainer(mut process: Process, apparmor: Option<String>) -> Process {
    let root = UserBuilder::default().uid(0u32).gid(0u32).build().expect("a user needs its ids alone");
    process.set_user(root);
    process.set_capabilities(None);
    process.set_rlimits(None);
    process.set_no_new_privileges(None);
    process.set_apparmor_profile(apparmor);
    process.set_cwd(PathBuf::from("/"));
    process.set_oom_score_adj(None);
    // From outside (`limits.rs`): a real time policy takes rights over the host.
    process.set_scheduler(None);
    process.set_io_priority(None);
    process.set_selinux_label(None);
    // Without HOME libcontainer would ask the C library for it, which loads what the image's nsswitch.conf names into our
    // process while that can still do everything (CVE-2019-14271). Ours is found by `init.rs`, by hand.
    process.set_env(Some(vec!["HOME=/".to_owned()]));
    process
}
