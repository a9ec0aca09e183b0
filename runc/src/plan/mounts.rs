//! Which mounts the container gets, where each is made, and what of it is locked.
//!
//! Two places exist. What is attached to the rootfs in the runtime's namespace is locked in the container's copy: it can
//! be neither taken off nor made writable (mount_namespaces(7)). All else is staged beside the rootfs and bound by the
//! container's own init: read-only stays, by the flags' lock, but it may be unmounted like any mount of a machine. Only
//! what must not come off goes to the first place, as the kernel refuses plain binds of a tree with locked children.

use std::path::{Component, Path, PathBuf};

use oci_spec::runtime::{Mount, MountBuilder};
use sysbox_ipc::IdMap;
use sysbox_ipc::fs::Prepared;
use sysbox_ipc::mgr::Grant;

use super::options::{Attributes, Flags, MountMap, flags, own_map, refuse, shift_extent, without_copy_up};
use super::places::writable;
use super::{LayerRoot, PlanError, Root, Settings, Stage, Volume};
use crate::bundle::Bundle;
use crate::survey::{OVERLAY_MAGIC, Source, Survey, is_bind, source_path};

mod roots;

/// Whether ids are shifted by the mount.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shift {
    /// The ids on disk are right already.
    Never,
    /// Shifted where the file system can; else a warning and files of nobody.
    Try,
    /// Shifted, or the container is not made.
    Must,
}

/// Whether what is mounted below the source comes along.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Extent {
    Mount,
    Tree,
}

/// Where a clone goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    /// Beside the rootfs, under this number; init binds it from there.
    Staged(usize),
    /// On the rootfs, for good.
    Locked(Target),
}

/// What the host mounts or unmounts below the source later.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Receives {
    Nothing,
    /// `rslave` and, as the container cannot give back, `rshared`. It comes with the host's ids and flags.
    HostMounts,
}

/// A clone of a host mount.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bind {
    pub source: PathBuf,
    pub is_directory: bool,
    pub extent: Extent,
    pub flags: Flags,
    pub shift: Shift,
    /// How far it has to be shifted; without it, as far as its file systems can.
    pub shift_extent: Option<Extent>,
    /// Shifted by these ids instead of the container's.
    pub map: Option<MountMap>,
    pub receives: Receives,
    pub place: Place,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TargetKind {
    Directory,
    File,
}

/// A path inside the container that something is mounted on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target {
    /// Absolute, without `..`.
    pub path: PathBuf,
    pub kind: TargetKind,
}

#[derive(Debug, Default)]
pub(super) struct Mounted {
    /// For init, in order.
    pub(super) mounts: Vec<Mount>,
    pub(super) targets: Vec<Target>,
    pub(super) binds: Vec<Bind>,
    pub(super) layer_roots: Vec<LayerRoot>,
    pub(super) volumes: Vec<Volume>,
    /// For init: paths in /proc and /sys.
    pub(super) masked: Vec<String>,
    pub(super) read_only: Vec<String>,
    /// For the runtime: paths elsewhere.
    pub(super) masks: Vec<PathBuf>,
    pub(super) frozen: Vec<PathBuf>,
}

/// Files below /proc over which a user may bind a file of his own, as in runc.
const PROC_FILES: &[&str] = &[
    "/proc/cpuinfo",
    "/proc/diskstats",
    "/proc/meminfo",
    "/proc/stat",
    "/proc/swaps",
    "/proc/uptime",
    "/proc/loadavg",
    "/proc/slabinfo",
    "/proc/sys/kernel/ns_last_pid",
    "/proc/sys/crypto/fips_enabled",
];

/// Paths that engines mask or make read-only for application containers, and which a machine needs. The kernel guards
/// each of them by the user namespace.
const UNMASKED: &[&str] =
    &["/proc", "/proc/sys", "/proc/kcore", "/proc/kallsyms", "/proc/kmsg", "/sys", "/sys/fs/cgroup"];

/// … and that systemd needs besides.
const UNMASKED_SYSTEMD: &[&str] = &["/run", "/run/lock", "/tmp", "/sys/kernel"];

/// Where nested user namespaces find a procfs and a sysfs that nothing is mounted over: the kernel allows them to mount
/// their own only then (mount_too_revealing in fs/namespace.c). Engines inside list /dev for `--privileged`, and would stumble over
/// processes that end meanwhile; directories of this name they leave out, as LXC has its own there (libcontainer/devices of runc,
/// the same list in containerd).
const PRISTINE_PROC: &str = "/dev/.lxc/proc";
const PRISTINE_SYS: &str = "/dev/.lxc/sys";

/// File systems that are the kernel's own, on which ids mean nothing to shift.
const KERNEL_MAGICS: &[i64] = &[
    libc::PROC_SUPER_MAGIC,
    0x6265_6572, /* sysfs */
    libc::CGROUP_SUPER_MAGIC,
    libc::CGROUP2_SUPER_MAGIC,
    0x1cd1, /* devpts */
    libc::DEBUGFS_MAGIC,
    libc::TRACEFS_MAGIC,
    libc::SECURITYFS_MAGIC,
    0x1980_0202, /* mqueue */
];

#[allow(clippy::too_many_arguments)] // one part of one decision, which has all of it
pub(super) fn plan(
    bundle: &Bundle,
    survey: &Survey,
    grant: &Grant,
    stage: &Stage,
    prepared: &Prepared,
    root: Root,
    settings: &Settings,
    warnings: &mut Vec<String>,
) -> Result<Mounted, PlanError> {
    let mut asked: Vec<Mount> = bundle.spec.mounts().iter().flatten().cloned().map(normal).collect();
    let theirs = asked.len();
    if settings.common.syscont_mode {
        asked.extend(writable(&asked, survey.systemd, root.read_only));
    }
    let map = &grant.id_map;
    let mut planner =
        Planner { bundle, survey, map, stage, root, settings, warnings, done: Mounted::default(), staged: 0 };
    if !asked.iter().any(|mount| mount.destination() == Path::new("/dev")) {
        // libcontainer makes devices by path there: never in the image's own directory, whose links it would follow.
        let options = ["nosuid", "strictatime", "mode=755", "size=65536k"];
        planner.done.mounts.push(mount("/dev", "tmpfs", "tmpfs", &options));
    }
    let locked = locked_binds(&asked);
    // Ours lie below what the user has put there.
    for at in (theirs..asked.len()).chain(0..theirs) {
        // What another mount brings there is not known.
        let bare = parent_of(&asked, at).is_none() && survey.bare.contains(asked[at].destination());
        let listed = Listed { at, locked: locked.contains(&at), bare };
        planner.spec_mount(listed, &asked[at])?;
    }
    planner.machine_mounts(&asked, prepared);
    planner.data_roots(&asked, &grant.volumes)?;
    planner.hidden_paths();
    planner.targets();
    Ok(planner.done)
}

/// `destination` without `.`, `..` and double slashes, as a path inside a root.
pub(super) fn normal(mut mount: Mount) -> Mount {
    mount.set_destination(clean(mount.destination()));
    mount
}

pub(super) fn clean(path: &Path) -> PathBuf {
    let mut clean = PathBuf::from("/");
    for part in path.components() {
        match part {
            Component::Normal(name) => clean.push(name),
            Component::ParentDir => drop(clean.pop()),
            Component::RootDir | Component::CurDir | Component::Prefix(_) => {}
        }
    }
    clean
}

/// As runc: over the whole root nothing is mounted (what was made in it before would be covered, and stay), and in /proc
/// nothing but a few files.
fn check_place(at: usize, asked: &Mount) -> Result<(), PlanError> {
    let destination = asked.destination();
    let is_proc = asked.typ().as_deref() == Some("proc");
    if destination == Path::new("/") {
        Err(PlanError::OnRoot { at })
    } else if destination == Path::new("/proc") && !is_bind(asked) {
        if is_proc { Ok(()) } else { Err(PlanError::NotProc { at }) }
    } else if destination.starts_with("/proc")
        && !PROC_FILES.iter().any(|file| Path::new(file) == destination)
    {
        Err(PlanError::InsideProc { at, destination: destination.clone() })
    } else if destination == Path::new("/dev") && asked.source().as_deref() == Some(Path::new("/dev")) {
        // Its files would be nobody's, and the mounts of a machine's own /dev could not be made in it.
        let why = "the host's /dev cannot be the container's; hint: give single devices (`--device`), or bind it elsewhere";
        Err(PlanError::Mount { at, why: why.to_owned() })
    } else {
        Ok(())
    }
}

/// The mount of the list whose destination is the nearest above `at`'s.
fn parent_of(mounts: &[Mount], at: usize) -> Option<usize> {
    let destination = mounts[at].destination();
    (0..mounts.len())
        .filter(|other| *other != at && destination.starts_with(mounts[*other].destination()))
        // Of two on the same place, the later lies on top; one on our own place counts only if it came before.
        .filter(|other| mounts[*other].destination() != destination || *other < at)
        .max_by_key(|other| (mounts[*other].destination().components().count(), *other))
}

/// Read-only binds below other binds, with all that they stand on: taken off, the writable one would show the same files.
fn locked_binds(mounts: &[Mount]) -> Vec<usize> {
    let mut locked = Vec::new();
    for at in 0..mounts.len() {
        if !is_bind(&mounts[at]) || !flags(&mounts[at]).top.read_only {
            continue;
        }
        let mut chain = vec![at];
        while let Some(parent) = parent_of(mounts, chain[chain.len() - 1]) {
            chain.push(parent);
        }
        // On the rootfs alone, or on something that init makes (a tmpfs), there is nothing of the host's below it.
        if chain.len() > 1 && chain.iter().all(|link| is_bind(&mounts[*link])) {
            locked.extend(chain);
        }
    }
    locked.sort_unstable();
    locked.dedup();
    locked
}

pub(super) fn mount(
    destination: impl Into<PathBuf>,
    typ: &str,
    source: impl Into<PathBuf>,
    options: &[&str],
) -> Mount {
    let options: Vec<String> = options.iter().map(|option| (*option).to_owned()).collect();
    MountBuilder::default()
        .destination(destination)
        .typ(typ)
        .source(source)
        .options(options)
        .build()
        .expect("a mount with destination, type, source and options is complete")
}

fn receives(asked: &Mount) -> Receives {
    let slave = |option: &String| matches!(option.as_str(), "slave" | "rslave" | "shared" | "rshared");
    if asked.options().iter().flatten().any(slave) { Receives::HostMounts } else { Receives::Nothing }
}

struct Planner<'a> {
    bundle: &'a Bundle,
    survey: &'a Survey,
    map: &'a IdMap,
    stage: &'a Stage,
    root: Root,
    settings: &'a Settings,
    warnings: &'a mut Vec<String>,
    done: Mounted,
    staged: usize,
}

/// A mount of the spec among the others.
#[derive(Debug, Clone, Copy)]
struct Listed {
    at: usize,
    locked: bool,
    bare: bool,
}

const NO: [&str; 3] = ["nosuid", "noexec", "nodev"];

impl Planner<'_> {
    fn spec_mount(&mut self, listed: Listed, asked: &Mount) -> Result<(), PlanError> {
        let Listed { at, locked, bare } = listed;
        check_place(at, asked)?;
        let destination = asked.destination().clone();
        let typ = asked.typ().as_deref().unwrap_or_default();
        let below_cgroup = destination.starts_with("/sys/fs/cgroup");
        if is_bind(asked) && !below_cgroup {
            return self.bind(at, asked, locked);
        }
        refuse(at, asked, bare)?;
        if !self.machine() && !below_cgroup {
            self.done.mounts.push(without_copy_up(asked));
            return Ok(());
        }
        match destination.to_str() {
            Some("/proc") => self.done.mounts.push(mount(destination, "proc", "proc", &NO)),
            Some("/sys") => {
                let mut options = NO.to_vec();
                if self.is_frozen() {
                    options.push("ro");
                }
                self.done.mounts.push(mount(destination, "sysfs", "sysfs", &options));
            }
            Some("/sys/fs/cgroup") => {
                let asked_read_only = flags(asked).top.read_only;
                let access = if self.machine() || !asked_read_only { "rw" } else { "ro" };
                let options = [NO.as_slice(), &["relatime", access]].concat();
                self.done.mounts.push(mount(destination, "cgroup", "cgroup", &options));
            }
            // The container's own hierarchies show what the engine's single mounts would have.
            _ if below_cgroup => {}
            _ if matches!(typ, "proc" | "sysfs") => self.done.mounts.push(mount(destination, typ, typ, &NO)),
            _ => self.done.mounts.push(without_copy_up(asked)),
        }
        Ok(())
    }

    fn bind(&mut self, at: usize, asked: &Mount, locked: bool) -> Result<(), PlanError> {
        let destination = asked.destination().clone();
        let map = own_map(at, asked)?;
        let map = map.filter(|own| own.uids != self.map.uids() || own.gids != self.map.gids());
        let path = source_path(asked, &self.bundle.dir);
        let Some(source) = self.survey.sources.get(&path).cloned() else {
            return Err(PlanError::NoSource { at, source_path: path });
        };
        let flags = flags(asked);
        let tree_wanted = asked.options().iter().flatten().any(|option| option == "rbind");
        let writable = !flags.top.read_only && !flags.tree.read_only;
        if writable && source.exposed && !self.is_engines(&path) {
            self.warnings.push(format!(
                "bind mount {}: users of the host can reach {}, so root of the container can leave setuid files there for \
                 them; hint: close a directory on the way (chmod 700), or mount it read-only",
                destination.display(),
                path.display()
            ));
        }
        if asked.options().iter().flatten().any(|option| option.ends_with("shared")) {
            self.warnings.push(format!(
                "bind mount {}: shared with the host one way: what the host mounts below it is seen inside, what is mounted \
                 inside is not seen on the host (the kernel lets no mount out of a user namespace); hint: `rslave` says so",
                destination.display()
            ));
        }
        let kind = if source.is_directory { TargetKind::Directory } else { TargetKind::File };
        if source.magic == OVERLAY_MAGIC && !self.map.owns_host_uid(source.uid) {
            self.warnings.push(format!(
                "bind source {}: an overlay cannot shift ids; its files will belong to nobody inside",
                path.display()
            ));
        }
        let place = if locked {
            Place::Locked(Target { path: destination.clone(), kind })
        } else {
            let number = self.number();
            let extent = if tree_wanted { "rbind" } else { "bind" };
            self.done.mounts.push(mount(destination, "bind", self.stage.bind(number), &[extent]));
            Place::Staged(number)
        };
        self.done.binds.push(Bind {
            is_directory: source.is_directory,
            extent: if tree_wanted { Extent::Tree } else { Extent::Mount },
            flags,
            shift: self.shift_of(asked, &source),
            shift_extent: shift_extent(asked),
            map,
            receives: receives(asked),
            source: path,
            place,
        });
        Ok(())
    }

    /// The engine's own per-container directories (shm, secrets) are no concern of the user's.
    fn is_engines(&self, path: &Path) -> bool {
        path.starts_with(&self.bundle.dir) || path.ends_with("mounts/shm")
    }

    fn shift_of(&self, asked: &Mount, source: &Source) -> Shift {
        if self.settings.unshifted.contains(asked.destination()) {
            return Shift::Never;
        }
        let wants = shift_extent(asked).is_some();
        let owned = self.map.owns_host_uid(source.uid);
        if wants {
            Shift::Must
        } else if owned || KERNEL_MAGICS.contains(&source.magic) || source.magic == OVERLAY_MAGIC {
            Shift::Never
        } else if self.root.shift == Shift::Never {
            // userns-remap: the user was told to give his sources to the mapped root.
            Shift::Never
        } else if self.settings.common.fsuid_map_fail_on_error {
            Shift::Must
        } else {
            Shift::Try
        }
    }

    fn machine(&self) -> bool {
        self.settings.common.syscont_mode
    }

    /// Whether the kernel's own file systems are read-only with the root, too.
    fn is_frozen(&self) -> bool {
        self.root.read_only && !self.settings.common.relaxed_read_only
    }

    fn number(&mut self) -> usize {
        self.staged += 1;
        self.staged - 1
    }

    /// What a machine has and no engine asks for.
    fn machine_mounts(&mut self, asked: &[Mount], prepared: &Prepared) {
        let taken = |path: &str| asked.iter().any(|mount| mount.destination() == Path::new(path));
        if self.machine() && !taken("/sys/fs/cgroup") {
            self.done.mounts.push(mount(
                "/sys/fs/cgroup",
                "cgroup",
                "cgroup",
                &[NO.as_slice(), &["relatime"]].concat(),
            ));
        }
        for leaf in &prepared.leaves {
            let inside = format!("/{leaf}");
            if !taken(&inside) {
                self.done.mounts.push(mount(inside, "bind", prepared.directory.join(leaf), &["bind"]));
            }
        }
        if !self.machine() {
            return;
        }
        self.kernel_trees(asked);
        // systemd mounts these, and fails where it may not; a tmpfs of ours satisfies it.
        for path in ["/sys/kernel/debug", "/sys/kernel/tracing", "/sys/kernel/config"] {
            if self.survey.present.contains(&path) && !taken(path) {
                self.done.mounts.push(mount(
                    path,
                    "tmpfs",
                    "tmpfs",
                    &[NO.as_slice(), &["mode=755", "size=64k"]].concat(),
                ));
            }
        }
        self.done.mounts.push(mount(PRISTINE_PROC, "proc", "proc", &NO));
        self.done.mounts.push(mount(PRISTINE_SYS, "sysfs", "sysfs", &NO));
    }

    /// Read-only, where the user has nothing of his own at the place or above it.
    fn kernel_trees(&mut self, asked: &[Mount]) {
        let top = Attributes { read_only: true, nosuid: true, nodev: true, ..Attributes::default() };
        let free = |path: &&PathBuf| {
            let over = |mount: &Mount| {
                mount.destination() != Path::new("/") && path.starts_with(mount.destination())
            };
            !asked.iter().any(over)
        };
        for path in self.survey.kernel_trees.iter().filter(free) {
            let number = self.number();
            self.done.mounts.push(mount(path, "bind", self.stage.bind(number), &["bind"]));
            self.done.binds.push(Bind {
                source: path.clone(),
                is_directory: true,
                extent: Extent::Mount,
                flags: Flags { top, ..Flags::default() },
                shift: Shift::Try,
                shift_extent: None,
                map: None,
                receives: Receives::Nothing,
                place: Place::Staged(number),
            });
        }
    }

    fn hidden_paths(&mut self) {
        let Some(linux) = self.bundle.spec.linux() else { return };
        let of_kernel = |path: &str| ["/proc", "/sys"].iter().any(|top| Path::new(path).starts_with(top));
        let machine = self.machine();
        let wanted = |path: &str| {
            UNMASKED.contains(&path) || (self.survey.systemd && UNMASKED_SYSTEMD.contains(&path))
        };
        // An empty path is no place, and not the root, which it would be below a descriptor.
        let kept = |path: &&String| !path.is_empty() && (!machine || !wanted(path));
        for path in linux.masked_paths().iter().flatten().filter(kept) {
            if of_kernel(path) {
                self.done.masked.push(path.clone());
            } else {
                self.done.masks.push(PathBuf::from(path));
            }
        }
        for path in linux.readonly_paths().iter().flatten().filter(kept) {
            if of_kernel(path) {
                self.done.read_only.push(path.clone());
            } else {
                self.done.frozen.push(PathBuf::from(path));
            }
        }
        if machine && self.is_frozen() {
            self.done.read_only.push("/proc/sys".to_owned());
        }
    }

    /// The destinations directly on the rootfs; those on other mounts are made when these are there.
    fn targets(&mut self) {
        let locked = self.done.binds.iter().filter_map(|bind| match &bind.place {
            Place::Locked(target) => Some(target.clone()),
            Place::Staged(_) => None,
        });
        let mut all: Vec<Target> = locked.collect();
        for mount in &self.done.mounts {
            let staged = self.done.binds.iter().find(|bind| match bind.place {
                Place::Staged(number) => Some(self.stage.bind(number)) == *mount.source(),
                Place::Locked(_) => false,
            });
            let leaf =
                mount.destination().strip_prefix("/proc").is_ok_and(|rest| !rest.as_os_str().is_empty());
            let file = leaf || staged.is_some_and(|bind| !bind.is_directory);
            let kind = if file { TargetKind::File } else { TargetKind::Directory };
            all.push(Target { path: mount.destination().clone(), kind });
        }
        let on_root = |target: &&Target| {
            !all.iter().any(|other| target.path != other.path && target.path.starts_with(&other.path))
                && target.path != Path::new("/")
        };
        let mut targets: Vec<Target> = all.iter().filter(on_root).cloned().collect();
        targets.dedup_by(|a, b| a.path == b.path);
        self.done.targets = targets;
        // Parents before children, so that each lands on the one below it.
        self.done.binds.sort_by_key(|bind| match &bind.place {
            Place::Locked(target) => (0, target.path.components().count()),
            Place::Staged(_) => (1, 0),
        });
    }
}
