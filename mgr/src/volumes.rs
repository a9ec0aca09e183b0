//! Directories for the data of inner engines whose container's own layer cannot hold it: `DATA_ROOT/volumes/SLUG/NAME`. They
//! live as long as the record of their container. One that belongs to no record is told of and left alone.

use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use sysbox_ipc::ContainerKey;
use tracing::{error, info, warn};

/// Of directories on their way out: these alone are removed at a start.
const GONE: &str = ".gone-";
/// One on its way in, beside those of its container: it has its name when it has the right owner. No longer than that, as a
/// volume's may be as long as any.
const NEW: &str = ".new";

#[derive(Debug, thiserror::Error)]
#[error("{what} {}: {cause}", path.display())]
pub struct VolumeError {
    what: &'static str,
    path: PathBuf,
    cause: io::Error,
}

fn failed(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> VolumeError {
    move |cause| VolumeError { what, path: path.to_owned(), cause }
}

#[derive(Debug)]
pub struct Volumes {
    dir: PathBuf,
    removed: u64,
}

impl Volumes {
    /// `is_known`: whether a slug is that of a container.
    ///
    /// # Errors
    /// The directory cannot be made or read.
    pub fn open(data_root: &Path, is_known: impl Fn(&str) -> bool) -> Result<Self, VolumeError> {
        let dir = data_root.join("volumes");
        make_closed(&dir)?;
        for entry in std::fs::read_dir(&dir).map_err(failed("list", &dir))? {
            let path = entry.map_err(failed("list", &dir))?.path();
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            if name.starts_with(GONE) {
                remove_tree(path);
            } else if !is_known(&name) {
                warn!(path = %path.display(), "a volume of no container: left as it is; remove it if you do not need it");
            }
        }
        Ok(Self { dir, removed: 0 })
    }

    /// Where the volumes of a container are, whether it has any or not.
    pub fn of(&self, key: &ContainerKey) -> PathBuf {
        self.dir.join(key.slug())
    }

    /// Makes those that are not there yet, for the user with the ids `owner` on disk.
    ///
    /// # Errors
    /// A name that is none; the disk being full.
    pub fn make(&self, key: &ContainerKey, names: &[String], owner: (u32, u32)) -> Result<(), VolumeError> {
        let home = self.of(key);
        make_closed(&home)?;
        for name in names {
            let path = home.join(name);
            let is_name = !name.is_empty() && !name.starts_with('.') && !name.contains('/');
            if !is_name {
                return Err(failed("make", &path)(io::ErrorKind::InvalidInput.into()));
            }
            if path.is_dir() {
                continue;
            }
            // Empty, if it is there: the maker ended before it had its name. Whatever ends us here, a volume has its owner.
            let new = home.join(NEW);
            make_closed(&new)?;
            std::os::unix::fs::chown(&new, Some(owner.0), Some(owner.1)).map_err(failed("chown", &new))?;
            std::fs::rename(&new, &path).map_err(failed("rename", &path))?;
        }
        Ok(())
    }

    /// Takes away those of a container that is no more. At once they have another name; the rest takes as long as it takes.
    ///
    /// # Errors
    /// The rename failing.
    pub fn remove(&mut self, key: &ContainerKey) -> Result<(), VolumeError> {
        let path = self.of(key);
        self.removed += 1;
        let gone = self.dir.join(format!("{GONE}{}-{}-{}", std::process::id(), self.removed, key.slug()));
        match std::fs::rename(&path, &gone) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(error) => Err(failed("rename", &path)(error)),
            Ok(()) => {
                info!(container = %key, "its volumes are removed");
                remove_tree(gone);
                Ok(())
            }
        }
    }
}

/// Whether it was not there before.
fn make_closed(path: &Path) -> Result<bool, VolumeError> {
    match std::fs::DirBuilder::new().mode(0o700).create(path) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists && path.is_dir() => Ok(false),
        Err(error) => Err(failed("mkdir", path)(error)),
    }
}

/// By rm(1), in its own time: what a container has nested too deeply for a recursion of ours is none for it, and gigabytes hold
/// up nobody. Should the daemon end meanwhile, the next one goes on.
fn remove_tree(path: PathBuf) {
    let work = move || {
        let mut rm = Command::new("rm");
        rm.args(["-rf", "--one-file-system", "--"])
            .arg(&path)
            .env_clear()
            .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin");
        match rm.stdin(Stdio::null()).stdout(Stdio::null()).output() {
            Ok(output) if output.status.success() => {}
            Ok(output) => {
                let why =
                    String::from_utf8_lossy(&output.stderr).lines().next().unwrap_or_default().to_owned();
                error!(path = %path.display(), why, "a volume could not be removed");
            }
            Err(error) => error!(path = %path.display(), %error, "rm"),
        }
    };
    if let Err(error) = std::thread::Builder::new().name("remover".into()).spawn(work) {
        error!(%error, "start a thread to remove a volume: the next start does it");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt;
    use std::time::{Duration, Instant};
    use sysbox_ipc::ContainerId;

    fn key(id: &str) -> ContainerKey {
        ContainerKey::new(Path::new("/run/r"), ContainerId::parse(id).unwrap())
    }

    fn names(dir: &Path) -> Vec<String> {
        let entries = std::fs::read_dir(dir.join("volumes")).unwrap();
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    }

    fn until(what: impl Fn() -> bool) {
        let deadline = Instant::now() + Duration::from_secs(10);
        while !what() {
            assert!(Instant::now() < deadline);
            std::thread::yield_now();
        }
    }

    #[test]
    fn volumes_are_closed_and_stay_until_they_are_removed() {
        let dir = tempfile::tempdir().unwrap();
        let mut volumes = Volumes::open(dir.path(), |_| true).unwrap();
        let (one, other) = (key("one"), key("other"));
        for key in [&one, &other, &one] {
            volumes.make(key, &["var-lib-docker".to_owned()], (7, 8)).unwrap();
            std::fs::write(volumes.of(key).join("var-lib-docker/file"), "").unwrap();
        }
        for path in [dir.path().join("volumes"), volumes.of(&one), volumes.of(&one).join("var-lib-docker")] {
            assert_eq!(std::fs::metadata(path).unwrap().mode() & 0o7777, 0o700);
        }
        let facts = std::fs::metadata(volumes.of(&one).join("var-lib-docker")).unwrap();
        assert_eq!((facts.uid(), facts.gid()), (7, 8));
        // A maker that ended half-way, twice: without and with the owner.
        for owner in [0, 7] {
            let half = volumes.of(&other).join(".new");
            std::fs::create_dir(&half).unwrap();
            std::os::unix::fs::chown(&half, Some(owner), None).unwrap();
            volumes.make(&other, &["second".to_owned()], (7, 8)).unwrap();
            let made = std::fs::metadata(volumes.of(&other).join("second")).unwrap();
            assert_eq!((made.uid(), made.gid(), half.exists()), (7, 8, false));
            std::fs::remove_dir(volumes.of(&other).join("second")).unwrap();
        }
        volumes.make(&other, &["l".repeat(255)], (7, 8)).unwrap();
        for name in ["", "..", "a/b", ".x"] {
            assert!(volumes.make(&one, &[name.to_owned()], (0, 0)).is_err(), "{name}");
        }
        volumes.remove(&one).unwrap();
        volumes.remove(&one).unwrap();
        until(|| names(dir.path()) == [other.slug()]);
    }

    #[test]
    fn what_is_unknown_stays_and_what_was_on_its_way_out_goes() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["unknown", ".gone-1-1-x"] {
            std::fs::create_dir_all(dir.path().join("volumes").join(name).join("deep")).unwrap();
        }
        Volumes::open(dir.path(), |_| false).unwrap();
        until(|| names(dir.path()) == ["unknown"]);
        assert!(dir.path().join("volumes/unknown/deep").is_dir());
    }

    #[test]
    fn what_is_nested_deeper_than_any_path_goes_too() {
        let dir = tempfile::tempdir().unwrap();
        let mut volumes = Volumes::open(dir.path(), |_| true).unwrap();
        volumes.make(&key("deep"), &["d".to_owned()], (0, 0)).unwrap();
        let mut here = nix::fcntl::open(
            &volumes.of(&key("deep")).join("d"),
            nix::fcntl::OFlag::O_DIRECTORY,
            nix::sys::stat::Mode::empty(),
        )
        .unwrap();
        for _ in 0..5000 {
            nix::sys::stat::mkdirat(&here, "d", nix::sys::stat::Mode::S_IRWXU).unwrap();
            let flags = nix::fcntl::OFlag::O_DIRECTORY;
            here = nix::fcntl::openat(&here, "d", flags, nix::sys::stat::Mode::empty()).unwrap();
        }
        volumes.remove(&key("deep")).unwrap();
        until(|| names(dir.path()).is_empty());
    }
}
