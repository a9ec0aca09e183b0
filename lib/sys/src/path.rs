//! Paths inside a container, resolved beneath a root descriptor and never by name (openat2(2), Linux 5.6).

use std::ffi::OsString;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Component, Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat2, readlinkat};
use nix::sys::stat::{Mode, SFlag, fstat, mkdirat, mknodat};

use crate::error::{Named, Result, SysError};

/// Opens `path` as if `root` were the root directory: `..` and absolute links stay inside, magic links are refused.
///
/// # Errors
/// As open(2); `ELOOP` for a magic link.
pub fn open_in_root(root: BorrowedFd<'_>, path: &Path, flags: OFlag) -> Result<OwnedFd> {
    let relative = path.strip_prefix("/").unwrap_or(path);
    let relative = if relative.as_os_str().is_empty() { Path::new(".") } else { relative };
    let how = OpenHow::new()
        .flags(flags | OFlag::O_CLOEXEC)
        .resolve(ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_MAGICLINKS);
    loop {
        match openat2(root, relative, how) {
            // EAGAIN: a rename on the way made the walk uncertain; the kernel asks for another try.
            Err(Errno::EINTR | Errno::EAGAIN) => {}
            other => return other.named(|| format!("openat2(<root>, {}, IN_ROOT)", path.display())),
        }
    }
}

/// Opens `path` beneath `root`, by no link and across no mount; an empty path is `root` itself.
///
/// # Errors
/// As open(2); `ELOOP` for a link anywhere in the path (at its end not with O_PATH and O_NOFOLLOW), `EXDEV` for a mount.
pub fn open_beneath(root: BorrowedFd<'_>, path: &Path, flags: OFlag) -> Result<OwnedFd> {
    let relative = path.strip_prefix("/").unwrap_or(path);
    let relative = if relative.as_os_str().is_empty() { Path::new(".") } else { relative };
    let how = OpenHow::new().flags(flags | OFlag::O_CLOEXEC).resolve(
        ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_SYMLINKS | ResolveFlag::RESOLVE_NO_XDEV,
    );
    loop {
        match openat2(root, relative, how) {
            // EAGAIN: a rename on the way made the walk uncertain; the kernel asks for another try.
            Err(Errno::EINTR | Errno::EAGAIN) => {}
            other => return other.named(|| format!("openat2(<root>, {}, BENEATH)", path.display())),
        }
    }
}

/// What a mount target has to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Directory,
    File,
}

/// A target made ready: the descriptor (O_PATH), and which paths had to be created, outermost first.
#[derive(Debug)]
pub struct Made {
    pub fd: OwnedFd,
    pub created: Vec<PathBuf>,
}

/// Opens `path` inside `root`, and creates what is missing of it: directories 0755, an empty file 0644 at the end where a
/// file is wanted. Links inside the root are followed as the container would; nothing outside is ever touched.
///
/// # Errors
/// `ENOTDIR`, `ELOOP`, `EROFS` and the like; `EISDIR`/`ENOTDIR` if what is there is of the wrong kind.
pub fn make_in_root(root: BorrowedFd<'_>, path: &Path, kind: Kind) -> Result<Made> {
    let mut pending: Vec<OsString> = names_of(path).rev().collect();
    let mut created = Vec::new();
    let mut here = open_in_root(root, Path::new("/"), OFlag::O_PATH | OFlag::O_DIRECTORY)?;
    let mut walked = PathBuf::from("/");
    let mut links = 0;
    while let Some(name) = pending.pop() {
        let parent = walked.clone();
        walked.push(&name);
        // From the root each time: a link in the middle may lead anywhere inside.
        match open_in_root(root, &walked, OFlag::O_PATH) {
            Ok(fd) => here = fd,
            Err(error) if error.errno != Errno::ENOENT => return Err(error),
            Err(error) => match readlinkat(here.as_fd(), name.as_os_str()) {
                // A link to what is not there yet: make what it names, as runc does.
                Ok(_) if links == MAX_LINKS => {
                    return Err(SysError::new(Errno::ELOOP, format!("mount target {}", path.display())));
                }
                Ok(target) => {
                    links += 1;
                    let target = PathBuf::from(target);
                    walked = if target.is_absolute() { PathBuf::from("/") } else { parent };
                    here = open_in_root(root, &walked, OFlag::O_PATH | OFlag::O_DIRECTORY)?;
                    pending.extend(names_of(&target).rev());
                }
                Err(_) if name == ".." => return Err(error),
                Err(_) => {
                    make_one(
                        here.as_fd(),
                        &name,
                        if pending.is_empty() { kind } else { Kind::Directory },
                        &walked,
                    )?;
                    created.push(walked.clone());
                    here = open_in_root(root, &walked, OFlag::O_PATH | OFlag::O_NOFOLLOW)?;
                }
            },
        }
    }
    let mode = fstat(&here).named(|| format!("fstat({})", path.display()))?.st_mode;
    let is_directory = SFlag::from_bits_truncate(mode & SFlag::S_IFMT.bits()) == SFlag::S_IFDIR;
    match (kind, is_directory) {
        (Kind::Directory, false) => {
            Err(SysError::new(Errno::ENOTDIR, format!("mount target {}", path.display())))
        }
        (Kind::File, true) => Err(SysError::new(Errno::EISDIR, format!("mount target {}", path.display()))),
        _ => Ok(Made { fd: here, created }),
    }
}

/// As many links as the kernel follows in one path (path_resolution(7)).
const MAX_LINKS: u32 = 40;

fn names_of(path: &Path) -> impl DoubleEndedIterator<Item = OsString> + '_ {
    path.components().filter_map(|part| match part {
        Component::Normal(name) => Some(name.to_owned()),
        Component::ParentDir => Some(OsString::from("..")),
        Component::RootDir | Component::CurDir | Component::Prefix(_) => None,
    })
}

fn make_one(dir: BorrowedFd<'_>, name: &std::ffi::OsStr, kind: Kind, shown: &Path) -> Result<()> {
    let made = match kind {
        Kind::Directory => mkdirat(dir, name, Mode::from_bits_truncate(0o755)),
        Kind::File => mknodat(dir, name, SFlag::S_IFREG, Mode::from_bits_truncate(0o644), 0),
    };
    match made {
        // Somebody else made it first, which is as good; or a dangling link is there, which the caller's open will show.
        Ok(()) | Err(Errno::EEXIST) => Ok(()),
        Err(errno) => Err(SysError::new(errno, format!("create mount target {}", shown.display()))),
    }
}

/// A path that names what `fd` stands for, for calls that take no descriptor. Valid while `fd` is open, in this process.
pub fn proc_path(fd: BorrowedFd<'_>) -> PathBuf {
    use std::os::fd::AsRawFd;
    PathBuf::from(format!("/proc/self/fd/{}", fd.as_raw_fd()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::os::unix::fs::symlink;

    fn root() -> (tempfile::TempDir, OwnedFd) {
        let dir = tempfile::tempdir().unwrap();
        let fd = OwnedFd::from(File::open(dir.path()).unwrap());
        (dir, fd)
    }

    #[test]
    fn targets_are_made_inside_only() {
        let (dir, fd) = root();
        let canary = tempfile::tempdir().unwrap();
        symlink(canary.path(), dir.path().join("out")).unwrap();
        symlink("../../../..", dir.path().join("up")).unwrap();
        for path in ["/out/x", "/up/y", "/a/../../z", "/out/deep/er"] {
            make_in_root(fd.as_fd(), Path::new(path), Kind::Directory).unwrap();
        }
        assert_eq!(std::fs::read_dir(canary.path()).unwrap().count(), 0);
        let inside = dir.path().join(canary.path().strip_prefix("/").unwrap());
        assert!(inside.join("x").is_dir() && inside.join("deep/er").is_dir());
        assert!(dir.path().join("y").is_dir());
    }

    #[test]
    fn what_was_made_is_told() {
        let (dir, fd) = root();
        std::fs::create_dir(dir.path().join("a")).unwrap();
        let made = make_in_root(fd.as_fd(), Path::new("/a/b/c"), Kind::File).unwrap();
        assert_eq!(made.created, [PathBuf::from("/a/b"), PathBuf::from("/a/b/c")]);
        assert!(dir.path().join("a/b/c").is_file());
        assert!(make_in_root(fd.as_fd(), Path::new("/a/b/c"), Kind::File).unwrap().created.is_empty());
    }

    #[test]
    fn a_target_of_the_wrong_kind_is_refused() {
        let (_dir, fd) = root();
        make_in_root(fd.as_fd(), Path::new("/f"), Kind::File).unwrap();
        let refused = make_in_root(fd.as_fd(), Path::new("/f"), Kind::Directory).unwrap_err();
        assert_eq!(refused.errno, Errno::ENOTDIR);
    }

    #[test]
    fn a_loop_of_links_ends() {
        let (dir, fd) = root();
        symlink("b", dir.path().join("a")).unwrap();
        symlink("a", dir.path().join("b")).unwrap();
        let refused = make_in_root(fd.as_fd(), Path::new("/a/x"), Kind::Directory).unwrap_err();
        assert_eq!(refused.errno, Errno::ELOOP);
    }
}
