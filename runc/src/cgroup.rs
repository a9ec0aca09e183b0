//! The container's cgroups: limits on a parent that stays the host's, and below it a child that belongs to the
//! container's root, in which it may make cgroups of its own (cgroups(7), "delegation").

use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::chown;
use std::path::{Component, Path, PathBuf};
use std::time::{Duration, Instant};

use libcgroups::common::{
    AnyCgroupManager, CgroupConfig, CgroupManager, ControllerOpt, create_cgroup_manager,
};
use nix::unistd::Pid;
use oci_spec::runtime::LinuxResources;
use serde::{Deserialize, Serialize};
use sysbox_sys::process::Held;

use crate::cpuset;
use crate::mirror;
use crate::nested;
use crate::oom;

/// The delegated child. On the unified hierarchy init lives one deeper, since a cgroup that hands out controllers holds no
/// processes.
const DELEGATED: &str = "syscont";
const LEAF: &str = "init.scope";

/// How long dying processes are waited for.
pub const LIMIT: Duration = Duration::from_secs(10);

/// What belongs to the container's root in a delegated cgroup; never a limit file (the kernel's list is in
/// /sys/kernel/cgroup/delegate).
const OWNED_V1: &[&str] = &["", "cgroup.procs", "tasks", "cgroup.clone_children"];
const OWNED_V2: &[&str] =
    &["", "cgroup.procs", "cgroup.threads", "cgroup.subtree_control", "memory.oom.group", "memory.reclaim"];

mod hierarchy;
mod swap;

use hierarchy::hierarchies_in;
pub use hierarchy::{Hierarchy, Kind};

#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    #[error("cgroup {}: {attempt}: {source}", path.display())]
    Io { path: PathBuf, attempt: &'static str, source: std::io::Error },
    #[error("/linux/cgroupsPath: `{}` has `..` in it, or is the root", path.display())]
    Path { path: PathBuf },
    #[error("/linux/resources: {0}")]
    Limits(String),
    #[error("/linux/cgroupsPath: cgroup {} has processes in it ({pids:?}): it belongs to somebody else", path.display())]
    Occupied { path: PathBuf, pids: Vec<i32> },
    #[error("container init: {0}")]
    Gone(String),
    #[error("cgroup {}: still busy after {seconds} s", path.display())]
    Busy { path: PathBuf, seconds: u64 },
}

type Result<T> = std::result::Result<T, CgroupError>;

pub fn io(path: &Path, attempt: &'static str) -> impl FnOnce(std::io::Error) -> CgroupError {
    let path = path.to_owned();
    move |source| CgroupError::Io { path, attempt, source }
}

/// Where a container's cgroups are; part of its state on disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cgroup {
    /// The parent that carries the limits, relative to the root of each hierarchy.
    pub parent: PathBuf,
    /// Mount points of the hierarchies: one of the unified kind, or several of version 1 (named ones and a unified one
    /// beside them included).
    pub hierarchies: Vec<Hierarchy>,
    /// The scope's path as systemd wants it, where systemd makes it.
    pub systemd: Option<PathBuf>,
}

/// Decides where the container's cgroups are to be; `name` is one that no other container has. Makes nothing.
///
/// # Errors
/// A path with `..`, or mountinfo not being readable.
pub fn locate(asked: Option<&Path>, name: &str, systemd: bool) -> Result<Cgroup> {
    let proc = Path::new("/proc/self/mountinfo");
    let mountinfo = fs::read_to_string(proc).map_err(io(proc, "read"))?;
    let hierarchies = hierarchies_in(&mountinfo);
    let unified = hierarchies.iter().any(|h| h.kind == Kind::Unified);
    let asked = asked.filter(|path| !path.as_os_str().is_empty());
    if systemd && unified {
        let scope =
            asked.map_or_else(|| PathBuf::from(format!("system.slice:sysbox:{name}")), Path::to_owned);
        return Ok(Cgroup { parent: PathBuf::new(), hierarchies, systemd: Some(scope) });
    }
    let named = asked.map_or_else(|| PathBuf::from(format!("sysbox-{name}")), Path::to_owned);
    // A systemd-style path on a hierarchy that systemd does not manage for us: `slice:prefix:name`.
    let named = match named.to_str().map(|text| text.split(':').collect::<Vec<_>>()) {
        Some(parts) if parts.len() == 3 => {
            PathBuf::from(parts[0]).join(format!("{}-{}.scope", parts[1], parts[2]))
        }
        _ => named,
    };
    if named.components().any(|part| part == Component::ParentDir) {
        return Err(CgroupError::Path { path: named });
    }
    let parent = named.strip_prefix("/").unwrap_or(&named).to_owned();
    if parent.components().next().is_none() {
        return Err(CgroupError::Path { path: named });
    }
    Ok(Cgroup { parent, hierarchies, systemd: None })
}

/// Begins, in a child, the grace period that the kernel lets pass before the first process moves between cgroups (it takes
/// `cgroup_threadgroup_rwsem` for writing): moving to where one is already does it. What we do meanwhile costs nothing, and
/// the moves that follow within it do not wait. Worth 5 to 15 ms a start; failing at it costs nothing but that.
pub fn begin_grace_period() {
    let begun = sysbox_sys::process::fork_for(|| {
        let own = Pid::this();
        let moved = locate(None, "", false).and_then(|cgroup| {
            let paths = paths_of(own)?;
            let Some(hierarchy) = cgroup.hierarchies.first() else { return Ok(()) };
            let path = paths.iter().find(|(name, _)| *name == hierarchy.name).map(|(_, path)| path.clone());
            let path = path.unwrap_or_default();
            join(&hierarchy.mount.join(path.strip_prefix("/").unwrap_or(&path)), own)
        });
        i32::from(moved.is_err())
    });
    if let Err(error) = begun {
        tracing::debug!(%error, "no head start for the cgroup moves");
    }
}

impl Cgroup {
    fn is_unified(&self) -> bool {
        self.hierarchies.iter().any(|h| h.kind == Kind::Unified)
    }

    /// The path, relative to each hierarchy, that a new process is put in before it makes its cgroup namespace: the
    /// namespace's root.
    pub fn delegated(&self) -> PathBuf {
        Path::new("/").join(&self.parent).join(DELEGATED)
    }

    /// A cgroup with processes in it is another's: its limits would be changed, and a failed create would end it.
    ///
    /// # Errors
    /// `Occupied`.
    pub fn require_free(&self) -> Result<()> {
        let pids: Vec<i32> = self.processes().iter().map(|pid| pid.as_raw()).collect();
        if pids.is_empty() { Ok(()) } else { Err(CgroupError::Occupied { path: self.parent.clone(), pids }) }
    }

    /// Makes parent and child and applies the limits to the parent. This process is put into the hierarchies that
    /// libcontainer does not know (named and hybrid ones), so that its children are born there.
    ///
    /// # Errors
    /// What the kernel or systemd refuses. [`Cgroup::remove`] takes away what was made.
    pub fn make(&mut self, resources: &LinuxResources, id: &str) -> Result<()> {
        let own = Pid::this();
        if let Some(scope) = self.systemd.clone() {
            let manager = self.manager(&scope, id, true)?;
            let task = nix029::unistd::Pid::from_raw(own.as_raw());
            manager.add_task(task).map_err(|error| CgroupError::Limits(error.to_string()))?;
            self.parent = own_unified_path()?;
            self.apply(&manager, resources)?;
        }
        // First where every process of this create is born, so that whoever takes it away finds them all there.
        let (anchors, others): (Vec<_>, Vec<_>) = self.hierarchies.iter().partition(|h| h.is_anchor());
        for hierarchy in anchors {
            if self.systemd.is_none() {
                make_path(hierarchy, &self.parent)?;
            }
            let parent = hierarchy.mount.join(&self.parent);
            create_dir(&parent.join(DELEGATED))?;
            join(&parent.join(DELEGATED), own)?;
            if hierarchy.kind == Kind::Unified {
                keep_from_handing_out(&parent)?;
            }
        }
        for hierarchy in &others {
            make_path(hierarchy, &self.parent)?;
        }
        if self.systemd.is_none() {
            // Before there are children: version 1 takes no device rules after.
            self.apply(&self.manager(&Path::new("/").join(&self.parent), id, false)?, resources)?;
        }
        for hierarchy in &others {
            let parent = hierarchy.mount.join(&self.parent);
            make_step(hierarchy, &parent, Path::new(DELEGATED))?;
            if hierarchy.has("cpuset") {
                cpuset::hand_down(&parent.join(DELEGATED))?;
            }
        }
        mirror::copy(self, DELEGATED)
    }

    /// Gives the child to the container's root. On the unified hierarchy that comes with the start ([`Cgroup::settle`]): until
    /// then init waits in the parent, since an engine takes a container's figures from where init is after the create, and
    /// the parent is what counts them all. The root of init's cgroup namespace is the child, wherever init goes.
    ///
    /// # Errors
    /// `chown`, or the kernel refusing the move.
    pub fn delegate(&self, init: Pid, uid: u32, gid: u32) -> Result<()> {
        for hierarchy in &self.hierarchies {
            let parent = hierarchy.mount.join(&self.parent);
            match hierarchy.kind {
                Kind::Unified => join(&parent, init)?,
                Kind::Hybrid => own(&parent.join(DELEGATED), OWNED_V2, uid, gid)?,
                Kind::V1 => own(&parent.join(DELEGATED), OWNED_V1, uid, gid)?,
            }
        }
        Ok(())
    }

    /// The second half of [`Cgroup::delegate`], before init goes on: moves it to a leaf of the child, hands out the
    /// controllers, and gives the child to the container's root.
    ///
    /// # Errors
    /// `chown`, or the kernel refusing the move.
    pub fn settle(&self, uid: u32, gid: u32) -> Result<()> {
        for hierarchy in self.hierarchies.iter().filter(|h| h.kind == Kind::Unified) {
            let parent = hierarchy.mount.join(&self.parent);
            let child = parent.join(DELEGATED);
            let leaf = child.join(LEAF);
            create_dir(&leaf)?;
            move_all(&parent, &leaf)?;
            enable_controllers(&parent)?;
            enable_controllers(&child)?;
            own(&leaf, OWNED_V2, uid, gid)?;
            own(&child, OWNED_V2, uid, gid)?;
        }
        if self.is_unified() { mirror::copy(self, DELEGATED) } else { Ok(()) }
    }

    /// Where libcontainer is to put a later process: with init, wherever it went.
    ///
    /// # Errors
    /// Init being gone.
    pub fn path_for_exec(&self, init: &Held) -> Result<PathBuf> {
        if !self.is_unified() {
            return Ok(self.delegated());
        }
        let paths = paths_of_held(init)?;
        Ok(paths
            .into_iter()
            .find(|(name, _)| name.is_empty())
            .map_or_else(|| self.delegated(), |(_, path)| path))
    }

    /// Puts this process where a later process is to be born, in the hierarchies that libcontainer does not know.
    ///
    /// # Errors
    /// Init being gone, or the kernel refusing a move.
    pub fn enter_for_exec(&self, init: &Held) -> Result<()> {
        let theirs = paths_of_held(init)?;
        for hierarchy in self.hierarchies.iter().filter(|h| h.is_foreign_to_libcontainer()) {
            if let Some((_, path)) = theirs.iter().find(|(name, _)| *name == hierarchy.name) {
                join(&hierarchy.mount.join(path.strip_prefix("/").unwrap_or(path)), Pid::this())?;
            }
        }
        Ok(())
    }

    /// Moves a process to where init is now, hierarchy by hierarchy.
    ///
    /// # Errors
    /// Init being gone, or the kernel refusing a move.
    pub fn follow(&self, init: &Held, pid: Pid) -> Result<()> {
        let (theirs, ours) = (paths_of_held(init)?, paths_of(pid)?);
        for hierarchy in &self.hierarchies {
            let path_in = |paths: &[(String, PathBuf)]| {
                paths.iter().find(|(name, _)| *name == hierarchy.name).map(|(_, path)| path.clone())
            };
            let Some(wanted) = path_in(&theirs) else { continue };
            if path_in(&ours).as_ref() != Some(&wanted) {
                join(&hierarchy.mount.join(wanted.strip_prefix("/").unwrap_or(&wanted)), pid)?;
            }
        }
        Ok(())
    }

    /// Changes the limits that are given. Device rules are none of them: the child's could not follow.
    ///
    /// # Errors
    /// What the kernel refuses; what came before it in the order of controllers is in force.
    pub fn update(&self, resources: &LinuxResources, id: &str) -> Result<()> {
        let mut resources = resources.clone();
        resources.set_devices(None);
        if let Some(mut cpu) = resources.cpu().clone()
            && let Some(hierarchy) = self.hierarchies.iter().find(|h| h.has("cpuset"))
        {
            let parent = hierarchy.mount.join(&self.parent);
            for (file, wanted) in [("cpuset.cpus", cpu.cpus()), ("cpuset.mems", cpu.mems())] {
                let Some(wanted) = wanted else { continue };
                cpuset::set(&parent, DELEGATED, file, wanted)?;
            }
            cpu.set_cpus(None).set_mems(None);
            resources.set_cpu(Some(cpu));
        }
        if let Some(hierarchy) = self.hierarchies.iter().find(|h| h.kind == Kind::V1 && h.has("memory")) {
            oom::keep(&mut resources, &hierarchy.mount.join(&self.parent));
        }
        // systemd would undo what it was not told.
        let manager = match &self.systemd {
            Some(scope) => self.manager(scope, id, true),
            None => self.manager(&Path::new("/").join(&self.parent), id, false),
        };
        let shares = mirror::let_go(self, DELEGATED)?;
        let applied = manager.and_then(|manager| self.apply(&manager, &resources));
        let given_back = mirror::give_back(self, DELEGATED, &shares);
        mirror::copy(self, DELEGATED).and(given_back).and(applied)
    }

    /// Removes parent, child and whatever the container made below, deepest first. Waits for dying processes.
    /// All hierarchies are tried; returns what failed.
    pub fn remove(&self, id: &str) -> Vec<CgroupError> {
        let mut failures = Vec::new();
        if self.parent.as_os_str().is_empty() {
            return failures;
        }
        let deadline = Instant::now() + LIMIT;
        for hierarchy in &self.hierarchies {
            let path = hierarchy.mount.join(&self.parent);
            // The child first: its parent then goes without being listed. The walk below tells what is wrong, if it is.
            let _tried = fs::remove_dir(path.join(DELEGATED));
            let mut pause = Duration::from_micros(200);
            loop {
                match remove_tree(&path) {
                    Ok(()) => break,
                    Err(error) if error.raw_os_error() == Some(libc::EBUSY) && Instant::now() < deadline => {
                        std::thread::sleep(pause);
                        pause = (pause * 2).min(Duration::from_millis(50));
                    }
                    Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {
                        failures.push(CgroupError::Busy { path: path.clone(), seconds: LIMIT.as_secs() });
                        break;
                    }
                    Err(source) => {
                        failures.push(CgroupError::Io { path: path.clone(), attempt: "remove", source });
                        break;
                    }
                }
            }
        }
        if let Some(scope) = &self.systemd {
            let stopped = self.manager(scope, id, true).map(|manager| manager.remove());
            if let Ok(Err(error)) = stopped {
                tracing::debug!(%error, "systemd had removed the scope by itself");
            }
        }
        failures
    }

    fn apply(&self, manager: &AnyCgroupManager, resources: &LinuxResources) -> Result<()> {
        let told = match (manager, self.hierarchies.first()) {
            (AnyCgroupManager::V2(_), Some(unified)) => {
                swap::by_name(resources, &unified.mount.join(&self.parent))
            }
            _ => None,
        };
        let resources = told.as_ref().unwrap_or(resources);
        let disable_oom_killer = oom::is_to_be_off(resources);
        let options =
            ControllerOpt { resources, disable_oom_killer, oom_score_adj: None, freezer_state: None };
        manager.apply(&options).map_err(|error| CgroupError::Limits(error.to_string()))
    }

    fn manager(&self, path: &Path, id: &str, systemd: bool) -> Result<AnyCgroupManager> {
        let config = CgroupConfig {
            cgroup_path: path.to_owned(),
            systemd_cgroup: systemd,
            container_name: id.to_owned(),
        };
        create_cgroup_manager(config).map_err(|error| CgroupError::Limits(error.to_string()))
    }
}

fn own_unified_path() -> Result<PathBuf> {
    let paths = paths_of(Pid::this())?;
    let path = paths.into_iter().find(|(name, _)| name.is_empty()).map(|(_, path)| path).unwrap_or_default();
    Ok(path.strip_prefix("/").unwrap_or(&path).to_owned())
}

/// As [`paths_of`]; never those of a process that has its pid by now, which may be the host's.
pub fn paths_of_held(init: &Held) -> Result<Vec<(String, PathBuf)>> {
    let paths = paths_of(Pid::from_raw(init.pid()));
    init.still_there().map_err(|error| CgroupError::Gone(error.to_string()))?;
    paths
}

/// /proc/PID/cgroup: hierarchy name and path.
fn paths_of(pid: Pid) -> Result<Vec<(String, PathBuf)>> {
    let path = PathBuf::from(format!("/proc/{pid}/cgroup"));
    let text = fs::read_to_string(&path).map_err(io(&path, "read"))?;
    let parse = |line: &str| {
        let mut fields = line.splitn(3, ':').skip(1);
        Some((fields.next()?.to_owned(), PathBuf::from(fields.next()?)))
    };
    Ok(text.lines().filter_map(parse).collect())
}

fn create_dir(path: &Path) -> Result<()> {
    match fs::create_dir(path) {
        Err(error) if error.kind() != ErrorKind::AlreadyExists => Err(io(path, "mkdir")(error)),
        _ => Ok(()),
    }
}

/// Makes `path` step by step.
fn make_path(hierarchy: &Hierarchy, path: &Path) -> Result<()> {
    let mut here = hierarchy.mount.clone();
    for part in path.iter() {
        if hierarchy.kind == Kind::Unified {
            enable_controllers(&here)?;
        }
        make_step(hierarchy, &here, Path::new(part))?;
        here.push(part);
    }
    Ok(())
}

/// Makes one cgroup below another: a new cpuset has no cpus until it is told.
fn make_step(hierarchy: &Hierarchy, parent: &Path, name: &Path) -> Result<()> {
    let path = parent.join(name);
    create_dir(&path)?;
    if hierarchy.has("cpuset") {
        for file in ["cpuset.cpus", "cpuset.mems"] {
            cpuset::inherit(&parent.join(file), &path.join(file))?;
        }
    }
    Ok(())
}

/// Hands out every controller that a cgroup has. One that cannot be handed out (`cpu` with real-time processes about) is
/// left: what needs it will say so.
fn enable_controllers(path: &Path) -> Result<()> {
    let file = path.join("cgroup.controllers");
    let has = fs::read_to_string(&file).map_err(io(&file, "read"))?;
    let control = path.join("cgroup.subtree_control");
    let enabled = fs::read_to_string(&control).map_err(io(&control, "read"))?;
    for controller in has.split_whitespace().filter(|c| !enabled.split_whitespace().any(|e| e == *c)) {
        if let Err(error) = fs::write(&control, format!("+{controller}")) {
            tracing::debug!(cgroup = %path.display(), controller, %error, "controller not handed out");
        }
    }
    Ok(())
}

/// Has nobody hand out the controllers of a cgroup whose child a process of ours is in, and which a process of ours is to
/// enter: with both it would become threaded, and its child invalid (cgroups(7)). libcontainer tries to, and goes on if it
/// cannot. The file is covered in this create's own mount namespace, and ends with that.
fn keep_from_handing_out(path: &Path) -> Result<()> {
    let control = path.join("cgroup.subtree_control");
    let nothing: Option<&str> = None;
    nix::mount::mount(Some("/dev/null"), &control, nothing, nix::mount::MsFlags::MS_BIND, nothing)
        .map_err(|errno| io(&control, "cover")(errno.into()))
}

/// Moves the processes of one cgroup, and those that they bear meanwhile, to another.
fn move_all(from: &Path, to: &Path) -> Result<()> {
    let file = from.join("cgroup.procs");
    let deadline = Instant::now() + LIMIT;
    loop {
        let text = fs::read_to_string(&file).map_err(io(&file, "read"))?;
        if text.is_empty() {
            return Ok(());
        }
        if Instant::now() > deadline {
            return Err(CgroupError::Busy { path: from.to_owned(), seconds: LIMIT.as_secs() });
        }
        for pid in text.lines().filter_map(|line| line.parse().ok()).map(Pid::from_raw) {
            match join(to, pid) {
                // It has ended.
                Err(CgroupError::Io { source, .. }) if source.raw_os_error() == Some(libc::ESRCH) => {}
                other => other?,
            }
        }
    }
}

fn join(path: &Path, pid: Pid) -> Result<()> {
    let file = path.join("cgroup.procs");
    fs::write(&file, pid.to_string()).map_err(io(&file, "join"))
}

fn own(path: &Path, files: &[&str], uid: u32, gid: u32) -> Result<()> {
    for file in files {
        let path = if file.is_empty() { path.to_owned() } else { path.join(file) };
        match chown(&path, Some(uid), Some(gid)) {
            // Which files there are depends on kernel and controller.
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            other => other.map_err(io(&path, "chown"))?,
        }
    }
    Ok(())
}

fn remove_tree(path: &Path) -> std::io::Result<()> {
    // Nearly always there is nothing below: then a listing costs more than the removal.
    match fs::remove_dir(path) {
        Ok(()) => return Ok(()),
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        Err(_) => {}
    }
    nested::remove_below(path)?;
    match fs::remove_dir(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_path_that_an_engine_asks_for_is_the_parent() {
        let parent = |asked: &str| locate(Some(Path::new(asked)), "c", false).map(|cgroup| cgroup.parent);
        assert_eq!(parent("/docker/c").unwrap(), Path::new("docker/c"));
        assert_eq!(parent("").unwrap(), Path::new("sysbox-c"));
        assert_eq!(parent("system.slice:docker:c").unwrap(), Path::new("system.slice/docker-c.scope"));
        for bad in ["/docker/../../x", "/", "//"] {
            assert!(matches!(parent(bad), Err(CgroupError::Path { .. })), "{bad}");
        }
    }
}
