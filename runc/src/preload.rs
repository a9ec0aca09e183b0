//! Inner images that come with an image: the first time a container of it is made, what its layers hold of a data root is
//! copied into the container's own layer, as it lies on disk. The merged view would not do: the outer overlay takes the
//! inner layers' whiteouts for its own and hides them (docs/decisions/0003-data-roots.md).

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::Command;

use nix::errno::Errno;
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat2};
use sysbox_sys::SysError;
use sysbox_sys::error::Named;

/// Opens `path` below a layer's directory, by no link: the layer is the image's, and so hostile. `None` where it is not.
///
/// # Errors
/// Anything but the path not being there.
pub fn open_in_layer(layer: &Path, path: &Path, flags: OFlag) -> sysbox_sys::Result<Option<OwnedFd>> {
    let what = || format!("open({}, {})", layer.display(), path.display());
    let root = File::open(layer).named(what)?;
    let inside = path.strip_prefix("/").unwrap_or(path);
    let how = OpenHow::new()
        .flags(flags | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC)
        .resolve(ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_SYMLINKS);
    match openat2(&root, inside, how) {
        Ok(fd) => Ok(Some(fd)),
        // A whiteout or a link in its place: this layer has no directory there.
        Err(Errno::ENOENT | Errno::ENOTDIR | Errno::ELOOP) => Ok(None),
        Err(errno) => Err(SysError::new(errno, what())),
    }
}

/// Set on the directory in the container's own layer when everything is there: a copy that was cut off is begun again.
const DONE: &std::ffi::CStr = c"trusted.sysbox.preloaded";

/// Brings what the image holds of a data root into `target`, the directory of the container's own layer, once: from the
/// topmost of `lowers` that has any of it, as it lies on disk. `beside` is a directory of the engine's on the same file
/// system, which only the host's root may enter.
///
/// The copy goes into a new, empty directory in one run of cp(1): within one run it never writes through a link that it has
/// made, and over several layers it would (docs/decisions/0003-data-roots.md). What the target has already stays.
///
/// # Errors
/// The copy or a move failing; nothing of it is in the target then that is not whole.
pub fn bring(
    lowers: &[PathBuf],
    path: &Path,
    target: BorrowedFd<'_>,
    beside: &Path,
) -> sysbox_sys::Result<()> {
    if is_done(target) {
        return Ok(());
    }
    for lower in lowers {
        let Some(source) = open_in_layer(lower, path, OFlag::O_RDONLY)? else { continue };
        if is_empty(source.as_fd())? {
            continue;
        }
        let what = || format!("copy {} of layer {}", path.display(), lower.display());
        let fresh = beside.join("sysbox-preload");
        match std::fs::remove_dir_all(&fresh) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error).named(what),
            _ => {}
        }
        std::os::unix::fs::DirBuilderExt::mode(&mut std::fs::DirBuilder::new(), 0o700)
            .create(&fresh)
            .named(what)?;
        let into = File::open(&fresh).named(what)?;
        run_cp(source.as_fd(), into.as_fd()).named(what)?;
        for entry in std::fs::read_dir(&fresh).named(what)? {
            let name = entry.named(what)?.file_name();
            let flags = nix::fcntl::RenameFlags::RENAME_NOREPLACE;
            match nix::fcntl::renameat2(&into, name.as_os_str(), target, name.as_os_str(), flags) {
                Ok(()) | Err(Errno::EEXIST) => {}
                Err(errno) => return Err(SysError::new(errno, what())),
            }
        }
        std::fs::remove_dir_all(&fresh).named(what)?;
        break;
    }
    mark_done(target)
}

fn is_done(target: BorrowedFd<'_>) -> bool {
    sysbox_sys::xattr::exists(target, DONE)
}

fn mark_done(target: BorrowedFd<'_>) -> sysbox_sys::Result<()> {
    sysbox_sys::xattr::set(target, DONE, b"1")
}

fn is_empty(dir: BorrowedFd<'_>) -> sysbox_sys::Result<bool> {
    let listed = std::fs::read_dir(sysbox_sys::path::proc_path(dir));
    Ok(listed.named(|| "list a data root".to_owned())?.next().is_none())
}

/// By cp(1), which knows every kind of file; it finds the directories through this process's descriptors.
fn run_cp(from: BorrowedFd<'_>, to: BorrowedFd<'_>) -> std::io::Result<()> {
    let by_descriptor = |fd: BorrowedFd<'_>| format!("/proc/{}/fd/{}/.", std::process::id(), fd.as_raw_fd());
    let output = Command::new("cp")
        .args(["--archive", "--reflink=auto", "--remove-destination", "--no-target-directory", "--"])
        .args([by_descriptor(from), by_descriptor(to)])
        .env_clear()
        .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
        .stdin(std::process::Stdio::null())
        .output()?;
    if output.status.success() {
        return Ok(());
    }
    Err(std::io::Error::other(
        String::from_utf8_lossy(&output.stderr).lines().next().unwrap_or("cp failed").to_owned(),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{FileTypeExt, MetadataExt};

    const ROOT: &str = "/var/lib/docker";

    /// Layers by name in a temporary directory, with an empty `target` beside them.
    fn layers(names: &[&str]) -> (tempfile::TempDir, Vec<PathBuf>) {
        let dir = tempfile::tempdir().unwrap();
        for name in names {
            std::fs::create_dir_all(dir.path().join(name).join("var/lib/docker")).unwrap();
        }
        std::fs::create_dir(dir.path().join("target")).unwrap();
        let paths = names.iter().map(|name| dir.path().join(name)).collect();
        (dir, paths)
    }

    fn bring_all(dir: &tempfile::TempDir, lowers: &[PathBuf]) -> PathBuf {
        let target = dir.path().join("target");
        bring(lowers, Path::new(ROOT), File::open(&target).unwrap().as_fd(), dir.path()).unwrap();
        target
    }

    #[test]
    fn what_the_topmost_layer_holds_comes_as_it_lies() {
        let (dir, lowers) = layers(&["none", "top", "low"]);
        let top = lowers[1].join("var/lib/docker");
        std::fs::create_dir_all(top.join("overlay2/x/diff")).unwrap();
        std::fs::write(top.join("a"), "new").unwrap();
        std::os::unix::fs::chown(top.join("a"), Some(77), Some(88)).unwrap();
        std::fs::write(lowers[2].join("var/lib/docker/a"), "old").unwrap();
        let whiteout = top.join("overlay2/x/diff/gone");
        nix::sys::stat::mknod(&whiteout, nix::sys::stat::SFlag::S_IFCHR, nix::sys::stat::Mode::empty(), 0)
            .unwrap();
        let target = bring_all(&dir, &lowers);
        assert_eq!(std::fs::read_to_string(target.join("a")).unwrap(), "new");
        assert_eq!(std::fs::metadata(target.join("a")).unwrap().uid(), 77);
        let copied = std::fs::symlink_metadata(target.join("overlay2/x/diff/gone")).unwrap();
        assert!(copied.file_type().is_char_device() && copied.rdev() == 0);
        assert!(!dir.path().join("sysbox-preload").exists());
    }

    #[test]
    fn it_is_done_once_and_what_is_there_stays() {
        let (dir, lowers) = layers(&["low"]);
        for name in ["a", "b"] {
            std::fs::write(lowers[0].join("var/lib/docker").join(name), "image").unwrap();
        }
        std::fs::write(dir.path().join("target/a"), "mine").unwrap();
        let target = bring_all(&dir, &lowers);
        assert_eq!(std::fs::read_to_string(target.join("a")).unwrap(), "mine");
        std::fs::remove_file(target.join("b")).unwrap();
        bring_all(&dir, &lowers);
        assert!(!target.join("b").exists());
    }

    #[test]
    fn no_link_of_an_image_is_written_through() {
        let canary = tempfile::tempdir().unwrap();
        let secret = canary.path().join("secret");
        std::fs::write(&secret, "host").unwrap();
        // The place itself a link; a link in a lower layer where an upper one has a file; a link to a directory.
        let (dir, lowers) = layers(&["link", "top", "low"]);
        std::fs::remove_dir(lowers[0].join("var/lib/docker")).unwrap();
        std::os::unix::fs::symlink(canary.path(), lowers[0].join("var/lib/docker")).unwrap();
        for (name, to) in [("x", secret.as_path()), ("d", canary.path())] {
            std::os::unix::fs::symlink(to, lowers[2].join("var/lib/docker").join(name)).unwrap();
        }
        std::fs::write(lowers[1].join("var/lib/docker/x"), "image").unwrap();
        std::fs::create_dir(lowers[1].join("var/lib/docker/d")).unwrap();
        std::fs::write(lowers[1].join("var/lib/docker/d/secret"), "image").unwrap();
        let target = bring_all(&dir, &lowers);
        assert_eq!(std::fs::read_to_string(&secret).unwrap(), "host");
        assert_eq!(std::fs::read_to_string(target.join("x")).unwrap(), "image");
    }
}
