//! Carries out the part of a plan that comes before any process of the container exists: a private mount namespace with
//! the rootfs, the clones of host mounts and the devices. Everything mounted here dies with this process; what is made in
//! files (mount points in the rootfs) is journalled and undone, newest first, if the create fails.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, OFlag};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::sys::stat::{Mode, SFlag, fstat, makedev, mknod};
use nix::unistd::{Gid, Uid, UnlinkatFlags, chown, unlinkat};
use oci_spec::runtime::LinuxDeviceType;
use sysbox_ipc::IdMap;
use sysbox_ipc::mgr::HostFacts;
use sysbox_sys::error::Named;
use sysbox_sys::mount::{self as m, Depth, FsContext};
use sysbox_sys::path::{Kind, make_in_root, open_in_root, proc_path};
use sysbox_sys::{SysError, creds, userns};

use crate::clones::clone_source;
use crate::plan::{Node, Place, Plan, Shift, Stage, Target, TargetKind};
use crate::survey::{Ground, Overlay, Survey};

mod roots;

#[derive(Debug, thiserror::Error)]
pub enum ApplyError {
    #[error("{attempt}: {source}")]
    Step { attempt: String, source: SysError },
    #[error("rootfs {}: mounting it id-shifted gave a read-only overlay (see the kernel log)", path.display())]
    SilentlyReadOnly { path: PathBuf },
    #[error("bind source {}: its file system cannot shift ids: {source}", path.display())]
    NoShift { path: PathBuf, source: SysError },
    #[error("rootfs {}: its file system cannot shift ids: {source}", path.display())]
    NoRootShift { path: PathBuf, source: SysError },
}

pub type Result<T> = std::result::Result<T, ApplyError>;

pub trait Attempt<T> {
    fn attempt(self, what: impl FnOnce() -> String) -> Result<T>;
}

impl<T> Attempt<T> for sysbox_sys::Result<T> {
    fn attempt(self, what: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|source| ApplyError::Step { attempt: what(), source })
    }
}

impl<T> Attempt<T> for nix::Result<T> {
    fn attempt(self, what: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|errno| ApplyError::Step {
            attempt: what(),
            source: SysError::new(errno, "system call"),
        })
    }
}

/// What was created in the rootfs for this container, so that it can be taken away again.
#[derive(Debug, Default)]
pub struct Journal {
    created: Vec<PathBuf>,
}

/// The staged container.
#[derive(Debug)]
pub struct Staged {
    /// The rootfs as the container will have it.
    pub rootfs: OwnedFd,
    map: IdMap,
    journal: Journal,
    /// What is attached on the rootfs, oldest first: in the way of taking mount points away, its own and those below it.
    attached: Vec<OwnedFd>,
    /// For a person: what could not be done as well as asked.
    pub warnings: Vec<String>,
}

impl Staged {
    /// Attaches a clone, or a file system of ours, on the rootfs.
    fn attach(&mut self, mount: OwnedFd, point: BorrowedFd<'_>) -> sysbox_sys::Result<()> {
        m::attach(mount.as_fd(), point)?;
        self.attached.push(mount);
        Ok(())
    }

    /// Removes the mount points that were made in the rootfs, newest first. Only empty ones go: whatever is in them is
    /// not ours. Returns what failed.
    pub fn undo(self) -> Vec<String> {
        let mut failures = Vec::new();
        for mount in self.attached.iter().rev() {
            let gone = nix::mount::umount2(&proc_path(mount.as_fd()), nix::mount::MntFlags::MNT_DETACH);
            failures.extend(gone.err().map(|errno| format!("detach a mount: {}", errno.desc())));
        }
        if let Err(error) = m::clear_read_only(self.rootfs.as_fd()) {
            failures.push(error.to_string());
        }
        for path in self.journal.created.iter().rev() {
            let Some((parent, name)) = path.parent().zip(path.file_name()) else { continue };
            let removed = open_in_root(self.rootfs.as_fd(), parent, OFlag::O_PATH | OFlag::O_DIRECTORY)
                .and_then(|dir| {
                    let as_root = creds::with_fs_ids(self.map.root_uid(), self.map.root_gid(), || {
                        match unlinkat(&dir, name, UnlinkatFlags::RemoveDir) {
                            Err(Errno::ENOTDIR) => remove_if_empty_file(dir.as_fd(), name),
                            other => other,
                        }
                    });
                    as_root.and_then(|done| done.named(|| format!("remove {}", path.display())))
                });
            match removed {
                Ok(()) => {}
                Err(error) if matches!(error.errno, Errno::ENOENT | Errno::ENOTEMPTY) => {}
                Err(error) => failures.push(error.to_string()),
            }
        }
        failures
    }
}

fn remove_if_empty_file(dir: BorrowedFd<'_>, name: &std::ffi::OsStr) -> nix::Result<()> {
    let facts = nix::sys::stat::fstatat(dir, name, nix::fcntl::AtFlags::AT_SYMLINK_NOFOLLOW)?;
    if facts.st_size == 0 { unlinkat(dir, name, UnlinkatFlags::NoRemoveDir) } else { Ok(()) }
}

/// Makes the private mount namespace of this process; what is mounted from here on, the host never sees.
///
/// # Errors
/// `unshare` or the propagation change failing.
pub fn enter_private_namespace() -> Result<()> {
    unshare(CloneFlags::CLONE_NEWNS).attempt(|| "make a private mount namespace".to_owned())?;
    let none = None::<&str>;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_SLAVE, none)
        .attempt(|| "make the mounts of the private namespace slaves".to_owned())
}

/// Carries out the plan. The process must be in its private mount namespace.
///
/// # Errors
/// The step that failed; mount points made until then are removed again.
pub fn apply(
    plan: &Plan,
    survey: &Survey,
    stage: &Stage,
    rootfs: &Path,
    map: &IdMap,
    facts: &HostFacts,
) -> Result<Staged> {
    let shifter = userns::with_maps(map).attempt(|| "make a user namespace for the id shift".to_owned())?;
    make_stage(stage)?;
    // Sources are cloned before anything of ours covers them.
    let mut warnings = Vec::new();
    let clones: Vec<OwnedFd> = plan
        .binds
        .iter()
        .map(|bind| clone_source(bind, shifter.as_fd(), &mut warnings))
        .collect::<Result<_>>()?;
    let base = Base { plan, rootfs, stage, map, facts, shifter: shifter.as_fd() };
    let root_mount = match &survey.ground {
        Ground::Overlay(overlay) if plan.root.shift != Shift::Never => base.overlay(overlay, rootfs)?,
        _ => base.directory(rootfs)?,
    };
    let point = File::open(stage.rootfs()).named(|| "open(stage rootfs)".to_owned());
    let point = point.attempt(|| "open the stage".to_owned())?;
    m::attach(root_mount.as_fd(), point.as_fd())
        .attempt(|| format!("attach {}", stage.rootfs().display()))?;
    let mut staged = Staged {
        rootfs: root_mount,
        map: map.clone(),
        journal: Journal::default(),
        attached: Vec::new(),
        warnings,
    };
    match fill(&base, survey, &clones, &mut staged) {
        Ok(()) => Ok(staged),
        Err(error) => {
            // The failure that matters is the first; what could not be undone is told with it.
            let failures = staged.undo();
            if !failures.is_empty() {
                tracing::warn!(?failures, "undo");
            }
            Err(error)
        }
    }
}

fn fill(base: &Base<'_>, survey: &Survey, clones: &[OwnedFd], staged: &mut Staged) -> Result<()> {
    let plan = base.plan;
    for target in &plan.targets {
        let made = base.make_target(staged, target)?;
        base.copy_up_parents(staged, &target.path, survey)?;
        drop(made);
    }
    if let Ground::Overlay(overlay) = &survey.ground {
        // Before any bind lies over one of them: a directory of the user's is not ours to touch.
        base.copy_up(staged, overlay, USUAL.iter().map(Path::new).chain(plan.entry.cwd.ancestors()))?;
    }
    for (bind, clone) in plan.binds.iter().zip(clones) {
        match &bind.place {
            Place::Locked(target) => {
                let point = base.make_target(staged, target)?;
                let shown = || format!("attach {}", target.path.display());
                let clone = clone.try_clone().named(|| "dup".to_owned()).attempt(shown)?;
                staged.attach(clone, point.as_fd()).attempt(shown)?;
            }
            Place::Staged(number) => base.attach_staged(*number, bind.is_directory, clone.as_fd())?,
        }
    }
    if let Ground::Overlay(overlay) = &survey.ground {
        for root in &plan.layer_roots {
            let clone = base.layer_root(staged, overlay, survey, &root.path)?;
            base.attach_staged(root.bind, true, clone.as_fd())?;
        }
    }
    base.fill_volumes(staged, survey)?;
    for path in &plan.masks {
        base.mask(staged, path)?;
    }
    for path in &plan.frozen {
        base.freeze(staged, path)?;
    }
    if plan.root.read_only {
        let read_only = m::Attributes { read_only: true, ..m::Attributes::default() };
        m::add_attributes(staged.rootfs.as_fd(), read_only, Depth::One)
            .attempt(|| "make the rootfs read-only".to_owned())?;
    }
    base.devices()
}

/// A tmpfs of our own over the stage directory, searchable by the container's init, which looks sources up there.
fn make_stage(stage: &Stage) -> Result<()> {
    let shown = || format!("mount a tmpfs on {}", stage.dir.display());
    let options = "mode=0711,size=1m,nr_inodes=4096";
    mount(Some("sysbox-stage"), &stage.dir, Some("tmpfs"), MsFlags::MS_NOSUID, Some(options))
        .attempt(shown)?;
    for dir in ["rootfs", "binds", "dev"] {
        let mut builder = std::fs::DirBuilder::new();
        builder.mode(0o711);
        builder.create(stage.dir.join(dir)).named(|| format!("mkdir({dir})")).attempt(shown)?;
    }
    Ok(())
}

/// Directories that programs are in or run from in nearly every image, copied up before anything can pin them. (Others that
/// come into use later sysbox-mgr has copied up.)
const USUAL: &[&str] = &[
    "/",
    "/etc",
    "/home",
    "/opt",
    "/root",
    "/srv",
    "/usr",
    "/usr/bin",
    "/usr/lib",
    "/usr/local",
    "/usr/local/bin",
    "/usr/sbin",
    "/usr/share",
    "/var",
    "/var/lib",
    "/var/log",
];

struct Base<'a> {
    plan: &'a Plan,
    rootfs: &'a Path,
    stage: &'a Stage,
    map: &'a IdMap,
    facts: &'a HostFacts,
    shifter: BorrowedFd<'a>,
}

impl Base<'_> {
    /// The rootfs from a directory: a clone, shifted unless the ids on disk are the container's.
    fn directory(&self, rootfs: &Path) -> Result<OwnedFd> {
        let shown = || format!("clone rootfs {}", rootfs.display());
        let clone = m::clone_tree(rootfs, Depth::Tree).attempt(shown)?;
        // What the host mounts below it later would come in, unshifted.
        m::set_propagation(clone.as_fd(), MsFlags::MS_PRIVATE, Depth::Tree).attempt(shown)?;
        if self.plan.root.shift != Shift::Never {
            m::set_idmap(clone.as_fd(), self.shifter, Depth::One)
                .map_err(|source| ApplyError::NoRootShift { path: rootfs.to_owned(), source })?;
        }
        Ok(clone)
    }

    /// The rootfs from an engine's overlay: a second overlay over shifted clones of the same layers, the upper one
    /// included, with a work directory of its own (docs/decisions/0002-rootfs.md).
    fn overlay(&self, overlay: &Overlay, rootfs: &Path) -> Result<OwnedFd> {
        let layers = self.stage.dir.join("layers");
        let shown = || format!("stage the layers of {}", rootfs.display());
        std::fs::create_dir(&layers).named(|| "mkdir(layers)".to_owned()).attempt(shown)?;
        // Kernels before 6.13 take no descriptors, and only clones that are attached in this namespace; so all are.
        let mut lowers = Vec::new();
        for (number, lower) in overlay.lowers.iter().enumerate() {
            let real =
                lower.canonicalize().named(|| format!("realpath({})", lower.display())).attempt(shown)?;
            lowers.push(self.attach_layer(&layers, number, &real)?);
        }
        // Upper and work must lie on one mount, so it is their parent that is cloned.
        let home = overlay.upper.parent().unwrap_or(Path::new("/"));
        let own_work = home.join("sysbox-work");
        match std::fs::DirBuilder::new().mode(0o700).create(&own_work) {
            Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => {
                return Err(error).named(|| format!("mkdir({})", own_work.display())).attempt(shown);
            }
            _ => {}
        }
        let clone = self.attach_layer(&layers, overlay.lowers.len(), home)?;
        let path_only = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let name = overlay.upper.file_name().unwrap_or_default();
        let upper = nix::fcntl::openat(&clone, name, path_only, Mode::empty()).attempt(shown)?;
        let work = nix::fcntl::openat(&clone, "sysbox-work", path_only, Mode::empty()).attempt(shown)?;
        // The kernel makes the work directory's inside as the caller's file system ids; host root has none in there.
        let mounted = creds::with_fs_ids(self.map.root_uid(), self.map.root_gid(), || {
            if self.facts.overlay_by_descriptor {
                overlay_by_descriptor(&lowers, upper.as_fd(), work.as_fd())
            } else {
                overlay_by_path(&layers, &lowers, upper.as_fd(), work.as_fd())
            }
        });
        let mounted = mounted
            .and_then(|mounted| mounted)
            .attempt(|| format!("mount the shifted overlay of {}", rootfs.display()))?;
        if m::is_read_only(&mounted).attempt(shown)? {
            return Err(ApplyError::SilentlyReadOnly { path: rootfs.to_owned() });
        }
        Ok(mounted)
    }

    /// A shifted clone of `path`, attached below `layers` and opened there.
    fn attach_layer(&self, layers: &Path, number: usize, path: &Path) -> Result<OwnedFd> {
        let shown = || format!("shift layer {}", path.display());
        let clone = m::clone_tree(path, Depth::One).attempt(shown)?;
        m::set_idmap(clone.as_fd(), self.shifter, Depth::One)
            .map_err(|source| ApplyError::NoRootShift { path: path.to_owned(), source })?;
        let point = layers.join(number.to_string());
        std::fs::create_dir(&point).named(|| format!("mkdir({})", point.display())).attempt(shown)?;
        let target = File::open(&point).named(|| format!("open({})", point.display())).attempt(shown)?;
        m::attach(clone.as_fd(), target.as_fd()).attempt(shown)?;
        Ok(clone)
    }

    /// Opens a mount target in the rootfs, made as the container's root would where it is missing.
    fn make_target(&self, staged: &mut Staged, target: &Target) -> Result<OwnedFd> {
        let kind = match target.kind {
            TargetKind::Directory => Kind::Directory,
            TargetKind::File => Kind::File,
        };
        let shown = || format!("mount point {}", target.path.display());
        let (uid, gid) = self.disk_ids();
        let made = creds::with_fs_ids(uid, gid, || make_in_root(staged.rootfs.as_fd(), &target.path, kind))
            .and_then(|made| made)
            .attempt(shown)?;
        staged.journal.created.extend(made.created);
        Ok(made.fd)
    }

    /// The file system ids with which the container's root acts from here, shifted mount or not.
    fn disk_ids(&self) -> (u32, u32) {
        (self.map.root_uid(), self.map.root_gid())
    }

    /// A mount point pins its parents' dentries; were one of them only in a lower layer, the engine's overlay could later
    /// copy it up beneath us, and the container could not create in it any more (docs/decisions/0002-rootfs.md).
    fn copy_up_parents(&self, staged: &Staged, path: &Path, survey: &Survey) -> Result<()> {
        let Ground::Overlay(overlay) = &survey.ground else { return Ok(()) };
        self.copy_up(staged, overlay, path.ancestors().skip(1))
    }

    fn copy_up<'p>(
        &self,
        staged: &Staged,
        overlay: &Overlay,
        directories: impl Iterator<Item = &'p Path>,
    ) -> Result<()> {
        let (uid, gid) = self.disk_ids();
        for parent in directories {
            let inside = parent.strip_prefix("/").unwrap_or(parent);
            // A look at the disk is cheaper than a copy-up that is not needed.
            if overlay.upper.join(inside).is_dir() {
                continue;
            }
            let shown = || format!("copy up {}", parent.display());
            let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY;
            let dir = match open_in_root(staged.rootfs.as_fd(), parent, flags) {
                // One of the usual directories that this image has not, or has as a link; a working directory that is none.
                Err(error) if matches!(error.errno, Errno::ENOENT | Errno::ENOTDIR | Errno::ELOOP) => {
                    continue;
                }
                other => other.attempt(shown)?,
            };
            let mode = Mode::from_bits_truncate(fstat(&dir).attempt(shown)?.st_mode & 0o7777);
            creds::with_fs_ids(uid, gid, || nix::sys::stat::fchmod(&dir, mode))
                .attempt(shown)?
                .attempt(shown)?;
        }
        Ok(())
    }

    fn attach_staged(&self, number: usize, is_directory: bool, clone: BorrowedFd<'_>) -> Result<()> {
        let point = self.stage.bind(number);
        let shown = || format!("stage {}", point.display());
        let made = if is_directory { std::fs::create_dir(&point) } else { File::create(&point).map(drop) };
        made.named(|| format!("create({})", point.display())).attempt(shown)?;
        let target =
            nix::fcntl::open(&point, OFlag::O_PATH | OFlag::O_CLOEXEC, Mode::empty()).attempt(shown)?;
        m::attach(clone, target.as_fd()).attempt(shown)
    }

    /// Hides a path of the rootfs for good: a directory under an empty read-only tmpfs, a file under /dev/null.
    fn mask(&self, staged: &mut Staged, path: &Path) -> Result<()> {
        let shown = || format!("mask {}", path.display());
        let target = match open_in_root(staged.rootfs.as_fd(), path, OFlag::O_PATH) {
            Err(error) if matches!(error.errno, Errno::ENOENT | Errno::ENOTDIR) => return Ok(()),
            other => other.attempt(shown)?,
        };
        let mode = SFlag::from_bits_truncate(fstat(&target).attempt(shown)?.st_mode & SFlag::S_IFMT.bits());
        let cover = if mode == SFlag::S_IFDIR {
            let fs = FsContext::open("tmpfs").attempt(shown)?;
            fs.set_text("mode", "0555").attempt(shown)?;
            fs.set_text("size", "4k").attempt(shown)?;
            fs.create().attempt(shown)?;
            let attributes = m::Attributes {
                read_only: true,
                nosuid: true,
                nodev: true,
                noexec: true,
                ..Default::default()
            };
            fs.mount(attributes).attempt(shown)?
        } else {
            let clone = m::clone_tree(Path::new("/dev/null"), Depth::One).attempt(shown)?;
            let attributes =
                m::Attributes { read_only: true, nosuid: true, noexec: true, ..Default::default() };
            m::add_attributes(clone.as_fd(), attributes, Depth::One).attempt(shown)?;
            clone
        };
        staged.attach(cover, target.as_fd()).attempt(shown)
    }

    /// Makes a path of the rootfs read-only for good, by a clone of itself laid over it.
    fn freeze(&self, staged: &mut Staged, path: &Path) -> Result<()> {
        let shown = || format!("read-only path {}", path.display());
        let target = match open_in_root(staged.rootfs.as_fd(), path, OFlag::O_PATH) {
            Err(error) if matches!(error.errno, Errno::ENOENT | Errno::ENOTDIR) => return Ok(()),
            other => other.attempt(shown)?,
        };
        let clone = m::clone_fd(target.as_fd(), Depth::Tree).attempt(shown)?;
        let attributes = m::Attributes { read_only: true, ..m::Attributes::default() };
        m::add_attributes(clone.as_fd(), attributes, Depth::Tree).attempt(shown)?;
        staged.attach(clone, target.as_fd()).attempt(shown)
    }

    /// A /dev with nodes that belong to the container's root, laid over the host's in this namespace: libcontainer binds
    /// its devices from the host's paths and so takes these.
    fn devices(&self) -> Result<()> {
        let dev = self.stage.dir.join("dev");
        let shown = || "stage the devices".to_owned();
        let options = "mode=0755,size=64k,nr_inodes=4096";
        mount(
            Some("sysbox-dev"),
            &dev,
            Some("tmpfs"),
            MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC,
            Some(options),
        )
        .attempt(shown)?;
        for node in &self.plan.nodes {
            make_node(&dev, node)?;
        }
        let clone = m::clone_tree(&dev, Depth::One).attempt(shown)?;
        let target = nix::fcntl::openat(AT_FDCWD, "/dev", OFlag::O_PATH | OFlag::O_CLOEXEC, Mode::empty());
        m::attach(clone.as_fd(), target.attempt(shown)?.as_fd()).attempt(shown)
    }
}

/// Layers by descriptor, as Linux takes them from 6.13 on: any number of them.
fn overlay_by_descriptor(
    lowers: &[OwnedFd],
    upper: BorrowedFd<'_>,
    work: BorrowedFd<'_>,
) -> sysbox_sys::Result<OwnedFd> {
    let fs = FsContext::open("overlay")?;
    for lower in lowers {
        fs.set_descriptor("lowerdir+", lower.as_fd())?;
    }
    fs.set_descriptor("upperdir", upper)?;
    fs.set_descriptor("workdir", work)?;
    // What `mount` and `df` show for it.
    fs.set_text("source", "overlay")?;
    fs.create()?;
    fs.mount(m::Attributes::default())
}

/// Layers by the paths of descriptors in one option string, which every kernel takes: fsconfig(2) would cut a value off at
/// 255 bytes, mount(2) takes a page, which is some 200 layers.
fn overlay_by_path(
    layers: &Path,
    lowers: &[OwnedFd],
    upper: BorrowedFd<'_>,
    work: BorrowedFd<'_>,
) -> sysbox_sys::Result<OwnedFd> {
    let point = layers.join("merged");
    std::fs::create_dir(&point).named(|| format!("mkdir({})", point.display()))?;
    let path = |fd: BorrowedFd<'_>| proc_path(fd).display().to_string();
    let lower = lowers.iter().map(|fd| path(fd.as_fd())).collect::<Vec<_>>().join(":");
    let options = format!("lowerdir={lower},upperdir={},workdir={}", path(upper), path(work));
    mount(Some("overlay"), &point, Some("overlay"), MsFlags::empty(), Some(options.as_str()))
        .named(|| format!("mount(overlay, {} layers)", lowers.len()))?;
    m::clone_tree(&point, Depth::One)
}

fn make_node(dev: &Path, node: &Node) -> Result<()> {
    let shown = || format!("device {}", node.path.display());
    let path = dev.join(node.path.strip_prefix("/dev").unwrap_or(&node.path));
    if let Some(parent) = path.parent() {
        std::fs::create_dir_all(parent).named(|| format!("mkdir({})", parent.display())).attempt(shown)?;
    }
    let kind = match node.typ {
        LinuxDeviceType::B => SFlag::S_IFBLK,
        LinuxDeviceType::P => SFlag::S_IFIFO,
        _ => SFlag::S_IFCHR,
    };
    let number = makedev(u64::from(node.major), u64::from(node.minor));
    mknod(&path, kind, Mode::from_bits_truncate(node.mode), number).attempt(shown)?;
    // On our own tmpfs: the umask of the engine is not the container's.
    let mode = std::fs::Permissions::from_mode(node.mode);
    std::fs::set_permissions(&path, mode).named(|| "chmod".to_owned()).attempt(shown)?;
    chown(&path, Some(Uid::from_raw(node.uid)), Some(Gid::from_raw(node.gid))).attempt(shown)
}
