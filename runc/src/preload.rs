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

/// Copies what `lowers` (top first) hold below `path` into `target`, lowest first, with owners, devices and extended
/// attributes as they are on disk; reflinked where the file system can.
///
/// # Errors
/// The copy failing; the target then holds part of it, and goes with the container.
pub fn copy(lowers: &[PathBuf], path: &Path, target: BorrowedFd<'_>) -> sysbox_sys::Result<()> {
    for lower in lowers.iter().rev() {
        let Some(source) = open_in_layer(lower, path, OFlag::O_RDONLY)? else { continue };
        if !is_empty(source.as_fd())? {
            run_cp(source.as_fd(), target)
                .named(|| format!("copy {} of layer {}", path.display(), lower.display()))?;
        }
    }
    Ok(())
}

fn is_empty(dir: BorrowedFd<'_>) -> sysbox_sys::Result<bool> {
    let listed = std::fs::read_dir(sysbox_sys::path::proc_path(dir));
    Ok(listed.named(|| "list a data root".to_owned())?.next().is_none())
}

/// By cp(1), which knows every kind of file; it finds the directories through this process's descriptors.
fn run_cp(from: BorrowedFd<'_>, to: BorrowedFd<'_>) -> std::io::Result<()> {
    let by_descriptor = |fd: BorrowedFd<'_>| format!("/proc/{}/fd/{}/.", std::process::id(), fd.as_raw_fd());
    let output = Command::new("cp")
        .args(["--archive", "--reflink=auto", "--no-target-directory", "--"])
        .args([by_descriptor(from), by_descriptor(to)])
        .env_clear()
        .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
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

    #[test]
    fn layers_are_copied_as_they_lie_and_the_upper_ones_last() {
        let dir = tempfile::tempdir().unwrap();
        let layer = |name: &str| dir.path().join(name);
        for (name, file, text) in [("low", "a", "old"), ("low", "b", "kept"), ("top", "a", "new")] {
            std::fs::create_dir_all(layer(name).join("var/lib/docker/overlay2/x/diff")).unwrap();
            std::fs::write(layer(name).join("var/lib/docker").join(file), text).unwrap();
        }
        std::os::unix::fs::chown(layer("low").join("var/lib/docker/b"), Some(77), Some(88)).unwrap();
        let whiteout = layer("top").join("var/lib/docker/overlay2/x/diff/gone");
        nix::sys::stat::mknod(&whiteout, nix::sys::stat::SFlag::S_IFCHR, nix::sys::stat::Mode::empty(), 0)
            .unwrap();
        std::fs::create_dir(layer("none")).unwrap();
        std::fs::create_dir(layer("target")).unwrap();
        let target = File::open(layer("target")).unwrap();
        let lowers = [layer("none"), layer("top"), layer("low")];
        copy(&lowers, Path::new("/var/lib/docker"), target.as_fd()).unwrap();
        let read = |name: &str| std::fs::read_to_string(layer("target").join(name)).unwrap();
        assert_eq!((read("a"), read("b")), ("new".to_owned(), "kept".to_owned()));
        assert_eq!(std::fs::metadata(layer("target").join("b")).unwrap().uid(), 77);
        let copied = std::fs::symlink_metadata(layer("target").join("overlay2/x/diff/gone")).unwrap();
        assert!(copied.file_type().is_char_device() && copied.rdev() == 0);
    }

    #[test]
    fn a_link_in_a_layer_leads_nowhere() {
        let dir = tempfile::tempdir().unwrap();
        let canary = tempfile::tempdir().unwrap();
        std::fs::write(canary.path().join("secret"), "x").unwrap();
        std::fs::create_dir_all(dir.path().join("l/var/lib")).unwrap();
        std::os::unix::fs::symlink(canary.path(), dir.path().join("l/var/lib/docker")).unwrap();
        std::fs::create_dir(dir.path().join("t")).unwrap();
        let target = File::open(dir.path().join("t")).unwrap();
        copy(&[dir.path().join("l")], Path::new("/var/lib/docker"), target.as_fd()).unwrap();
        assert_eq!(std::fs::read_dir(dir.path().join("t")).unwrap().count(), 0);
    }
}
