//! One container as an engine and the runtime make it: the engine's overlay and the container's, both real, in a mount
//! namespace of each test's own, and an init in it. Needs root, overlay and idmapped mounts.

#![allow(dead_code, reason = "each test program uses a part")]

use std::fs::{self, File};
use std::io::Write;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use sysbox_ipc::{ContainerId, ContainerKey, IdMap, IdRange};
use sysbox_mgr::coherence::{Coherence, Target};
use sysbox_sys::creds::with_fs_ids;
use sysbox_sys::mount::{Attributes, Depth, FsContext, attach, clone_tree, set_idmap};
use sysbox_sys::path::proc_path;
use sysbox_sys::process::identify;
use sysbox_sys::userns;

pub const LIMIT: Duration = Duration::from_secs(10);
/// The container's root on the host.
pub const BASE: u32 = 3_000_000_000;

/// One container as an engine and the runtime make it, and an init in it.
pub struct Bed {
    pub dir: tempfile::TempDir,
    pub init: Child,
    pub coherence: Option<Coherence>,
    pub key: ContainerKey,
    _attached: Vec<OwnedFd>,
}

impl Bed {
    pub fn new() -> Self {
        let bed = Self::unwatched();
        bed.watch()
    }

    pub fn unwatched() -> Self {
        assert!(nix::unistd::geteuid().is_root(), "needs root");
        unshare(CloneFlags::CLONE_NEWNS).unwrap();
        let none = None::<&str>;
        mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        for name in [
            "lower",
            "id/diff",
            "id/work",
            "id/merged",
            "id/sysbox-work",
            "stage/lower",
            "stage/store",
            "rootfs",
        ] {
            fs::create_dir_all(path(name)).unwrap();
        }
        fill(&path("lower"));
        let options = format!(
            "lowerdir={},upperdir={},workdir={}",
            path("lower").display(),
            path("id/diff").display(),
            path("id/work").display()
        );
        mount(Some("overlay"), &path("id/merged"), Some("overlay"), MsFlags::empty(), Some(options.as_str()))
            .unwrap();

        let map = IdMap::of_range(IdRange { start: BASE, count: 65536 }).unwrap();
        let userns = {
            // Two at once, in one process, would wait for each other: each child has the other's pipe.
            static ONE: std::sync::Mutex<()> = std::sync::Mutex::new(());
            let _one = ONE.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            userns::with_maps(&map).unwrap()
        };
        let idmapped = |from: &str, to: &str| {
            let clone = clone_tree(&path(from), Depth::One).unwrap();
            set_idmap(clone.as_fd(), userns.as_fd(), Depth::One).unwrap();
            attach(clone.as_fd(), File::open(path(to)).unwrap().as_fd()).unwrap();
            clone
        };
        let (lower, store) = (idmapped("lower", "stage/lower"), idmapped("id", "stage/store"));
        let overlay = FsContext::open("overlay").unwrap();
        let [lower_path, store_path] = [&lower, &store].map(|fd| proc_path(fd.as_fd()));
        overlay.set_text("lowerdir", lower_path.to_str().unwrap()).unwrap();
        overlay.set_text("upperdir", store_path.join("diff").to_str().unwrap()).unwrap();
        overlay.set_text("workdir", store_path.join("sysbox-work").to_str().unwrap()).unwrap();
        let rootfs =
            with_fs_ids(BASE, BASE, || overlay.create().and_then(|()| overlay.mount(Attributes::default())));
        let rootfs = rootfs.unwrap().unwrap();
        attach(rootfs.as_fd(), File::open(path("rootfs")).unwrap().as_fd()).unwrap();

        let init = Command::new("chroot").arg(path("rootfs")).args(["/bin/sleep", "1000"]).spawn().unwrap();
        let link = format!("/proc/{}/root", init.id());
        eventually("init is in its root", || fs::read_link(&link).is_ok_and(|root| root == path("rootfs")));
        let key = ContainerKey::new(Path::new("/run/r"), ContainerId::parse("c").unwrap());
        Self { dir, init, coherence: None, key, _attached: vec![lower, store, rootfs] }
    }

    pub fn watch(self) -> Self {
        let bed = self.watch_at("id/diff");
        bed.settle();
        bed
    }

    /// With the engine's upper directory at another place.
    pub fn watch_at(mut self, upper: &str) -> Self {
        let init = identify(i32::try_from(self.init.id()).unwrap()).unwrap();
        let coherence = Coherence::start().unwrap();
        let (merged, upper) = (self.path("id/merged"), self.path(upper));
        coherence.watch(Target { key: self.key.clone(), init, merged, upper, is_found_running: true });
        self.coherence = Some(coherence);
        self
    }

    /// As another container of the same engine.
    pub fn key_of(&self, name: &str) -> ContainerKey {
        ContainerKey::new(Path::new("/run/r"), ContainerId::parse(name).unwrap())
    }

    pub fn settle(&self) -> u64 {
        self.coherence.as_ref().unwrap().settle(&self.key)
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// A path through the engine's overlay.
    pub fn engine(&self, name: &str) -> PathBuf {
        self.path("id/merged").join(name)
    }

    /// A path through the container's overlay.
    pub fn container(&self, name: &str) -> PathBuf {
        self.path("rootfs").join(name)
    }

    /// As `docker cp` does: what is there goes, then the file is made, written, and given its owner and times.
    pub fn engine_copies_in(&self, name: &str, content: &str) {
        copy_in(&self.engine(name), content).unwrap();
    }

    pub fn container_writes(&self, name: &str, content: &str) -> std::io::Result<()> {
        inside(|| fs::write(self.container(name), content))
    }

    pub fn seen_inside(&self, name: &str) -> String {
        fs::read_to_string(self.container(name)).unwrap_or_else(|error| format!("<{}>", error.kind()))
    }

    pub fn pin(&self, name: &str) -> File {
        File::open(self.container(name)).unwrap()
    }
}

impl Drop for Bed {
    fn drop(&mut self) {
        drop(self.coherence.take());
        self.init.kill().unwrap();
        self.init.wait().unwrap();
        // The directory can only be removed without mounts in it. (A test may have unmounted some.)
        for place in ["rootfs", "id/merged", "stage/lower", "stage/store"] {
            if let Err(errno) = umount2(&self.path(place), MntFlags::MNT_DETACH) {
                assert!(matches!(errno, Errno::EINVAL | Errno::ENOENT), "umount {place}: {errno}");
            }
        }
    }
}

/// A small Debian: a program that sleeps, and some directories to write in.
fn fill(root: &Path) {
    let copy = |file: &Path| {
        let to = root.join(file.strip_prefix("/").unwrap());
        fs::create_dir_all(to.parent().unwrap()).unwrap();
        fs::copy(file, to).unwrap();
    };
    copy(Path::new("/bin/sleep"));
    let listed = Command::new("ldd").arg("/bin/sleep").output().unwrap();
    for word in String::from_utf8(listed.stdout)
        .unwrap()
        .split_ascii_whitespace()
        .filter(|word| word.starts_with('/'))
    {
        copy(Path::new(word));
    }
    for dir in ["etc/deep/deeper", "usr/bin", "opt", "srv"] {
        fs::create_dir_all(root.join(dir)).unwrap();
    }
    for at in 0..100 {
        fs::create_dir_all(root.join(format!("opt/{at}"))).unwrap();
        fs::write(root.join(format!("opt/{at}/base")), "of the layer").unwrap();
    }
    for file in ["etc/conf", "etc/other", "etc/deep/deeper/conf", "usr/bin/tool"] {
        fs::write(root.join(file), "of the layer").unwrap();
    }
}

pub fn copy_in(path: &Path, content: &str) -> std::io::Result<()> {
    if path.symlink_metadata().is_ok() {
        fs::remove_file(path)?;
    }
    let mut file = File::options().write(true).create(true).truncate(true).open(path)?;
    file.write_all(content.as_bytes())?;
    drop(file);
    std::os::unix::fs::lchown(path, Some(7), Some(7))?;
    fs::set_permissions(path, std::os::unix::fs::PermissionsExt::from_mode(0o644))?;
    File::open(path)?.set_modified(std::time::SystemTime::UNIX_EPOCH)
}

pub fn inside<T>(act: impl FnOnce() -> T) -> T {
    with_fs_ids(BASE, BASE, act).unwrap()
}

pub fn eventually(what: &str, reached: impl Fn() -> bool) {
    let deadline = Instant::now() + LIMIT;
    while !reached() {
        assert!(Instant::now() < deadline, "{what}: not within {LIMIT:?}");
        std::thread::sleep(Duration::from_millis(1));
    }
}
