//! Being the only one: the run directory and the data root, each held by a lock for the life of the process.

use std::fs::{DirBuilder, File, Permissions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use nix::fcntl::{Flock, FlockArg};

#[derive(Debug, thiserror::Error)]
pub enum InstanceError {
    #[error("{what} {}", path.display())]
    Directory {
        what: &'static str,
        path: PathBuf,
        #[source]
        cause: io::Error,
    },
    #[error("use {}: it belongs to uid {owner}, not to root", path.display())]
    Foreign { path: PathBuf, owner: u32 },
    #[error("lock {}: another sysbox-mgr runs here (pid {holder})\nhint: stop it first, or give this one its own `--run-dir` and `--data-root`", path.display())]
    Taken { path: PathBuf, holder: String },
    #[error("lock {}: another sysbox-mgr gives out the ids of this file\nhint: stop it first; containers of two managers would share ids", path.display())]
    SameIds { path: PathBuf },
}

/// Held for the life of the daemon; the kernel lets go when it dies.
#[derive(Debug)]
pub struct Instance {
    _run_dir: Flock<File>,
    _data_root: Flock<File>,
}

impl Instance {
    /// Makes both directories and `RUN_DIR/stage` where they are missing, and locks them.
    ///
    /// # Errors
    /// Another manager that has either, or a directory that cannot be made or is not root's.
    pub fn take(run_dir: &Path, data_root: &Path) -> Result<Self, InstanceError> {
        make(run_dir, 0o711)?;
        let run_lock = lock(&run_dir.join("mgr.lock"))?;
        make(data_root, 0o711)?;
        let data_lock = lock(&data_root.join("mgr.lock"))?;
        // An empty directory over which each runtime process mounts a tmpfs of its own.
        make(&run_dir.join("stage"), 0o711)?;
        Ok(Self { _run_dir: run_lock, _data_root: data_lock })
    }
}

/// Holds the file that says which ids are given out: two managers with one range would each give them out. (Whoever edits the
/// file replaces it, and the lock stays with the old one: this is against mistakes, not for certain.)
///
/// # Errors
/// Another manager that has the file.
pub fn hold_ids(subuid: &Path) -> Result<Flock<File>, InstanceError> {
    let failed = |what, cause| InstanceError::Directory { what, path: subuid.to_owned(), cause };
    let file = File::open(subuid).map_err(|cause| failed("open", cause))?;
    Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(_, errno)| match errno {
        nix::errno::Errno::EWOULDBLOCK => InstanceError::SameIds { path: subuid.to_owned() },
        errno => failed("lock", errno.into()),
    })
}

fn make(path: &Path, mode: u32) -> Result<(), InstanceError> {
    let failed = |what, cause| InstanceError::Directory { what, path: path.to_owned(), cause };
    DirBuilder::new().recursive(true).mode(mode).create(path).map_err(|cause| failed("mkdir", cause))?;
    let owner = std::fs::metadata(path).map_err(|cause| failed("stat", cause))?.uid();
    if owner != nix::unistd::geteuid().as_raw() {
        return Err(InstanceError::Foreign { path: path.to_owned(), owner });
    }
    std::fs::set_permissions(path, Permissions::from_mode(mode)).map_err(|cause| failed("chmod", cause))
}

fn lock(path: &Path) -> Result<Flock<File>, InstanceError> {
    let failed = |what, cause| InstanceError::Directory { what, path: path.to_owned(), cause };
    let mut options = File::options();
    options.read(true).write(true).create(true).truncate(false);
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    let file = options.open(path).map_err(|cause| failed("open", cause))?;
    match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
        Ok(mut held) => {
            held.set_len(0)
                .and_then(|()| write!(*held, "{}", std::process::id()))
                .map_err(|cause| failed("write", cause))?;
            Ok(held)
        }
        Err((mut file, nix::errno::Errno::EWOULDBLOCK)) => {
            let mut holder = String::new();
            file.read_to_string(&mut holder).map_err(|cause| failed("read", cause))?;
            Err(InstanceError::Taken { path: path.to_owned(), holder: holder.chars().take(20).collect() })
        }
        Err((_, errno)) => Err(failed("lock", errno.into())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neither_directory_is_shared() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        let held = Instance::take(&path("run"), &path("data")).unwrap();
        assert_eq!(std::fs::metadata(path("run")).unwrap().mode() & 0o7777, 0o711);
        assert!(path("run/stage").is_dir());
        for (run, data) in [("run", "other"), ("other", "data")] {
            let refused = Instance::take(&path(run), &path(data)).unwrap_err();
            assert!(
                matches!(&refused, InstanceError::Taken { holder, .. } if *holder == std::process::id().to_string())
            );
        }
        let subuid = path("subuid");
        std::fs::write(&subuid, "").unwrap();
        let ids = hold_ids(&subuid).unwrap();
        assert!(matches!(hold_ids(&subuid), Err(InstanceError::SameIds { .. })));
        drop((held, ids));
        Instance::take(&path("run"), &path("data")).unwrap();
    }
}
