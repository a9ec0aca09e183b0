//! Looking at and renaming what a container names, beneath a directory that is held: no link is followed, no mount crossed.

use std::ffi::{OsStr, OsString};
use std::ops::ControlFlow;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use nix::dir::{Dir, Type};
use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, OpenHow, RenameFlags, ResolveFlag, openat, openat2, renameat2};
use nix::sys::stat::{FileStat, Mode, SFlag, fstat, fstatat};
use sysbox_sys::error::Named;
use sysbox_sys::{Result, SysError};

/// How often a name that seems not to be cached is asked for.
const CACHED_TRIES: u32 = 3;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Directory,
    /// "Deleted here", in an upper directory: a character device 0:0.
    Whiteout,
    Other,
}

pub fn kind_of(file: &FileStat) -> Kind {
    match SFlag::from_bits_truncate(file.st_mode & SFlag::S_IFMT.bits()) {
        SFlag::S_IFDIR => Kind::Directory,
        SFlag::S_IFCHR if file.st_rdev == 0 => Kind::Whiteout,
        _ => Kind::Other,
    }
}

/// When the inode changed last, in seconds and nanoseconds.
pub fn changed(file: &FileStat) -> (i64, i64) {
    (file.st_ctime, file.st_ctime_nsec)
}

/// A directory by its path on the host.
///
/// # Errors
/// `ENOENT`, `ENOTDIR`.
pub fn open_dir(path: &Path) -> Result<OwnedFd> {
    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    nix::fcntl::open(path, flags, Mode::empty()).named(|| format!("open({})", path.display()))
}

/// # Errors
/// `EXDEV` for a mount on the way, `ELOOP` for a link; as open(2).
pub fn open_beneath(root: BorrowedFd<'_>, path: &Path, flags: OFlag) -> Result<OwnedFd> {
    let path = if path.as_os_str().is_empty() { Path::new(".") } else { path };
    let resolve = ResolveFlag::RESOLVE_BENEATH
        | ResolveFlag::RESOLVE_NO_SYMLINKS
        | ResolveFlag::RESOLVE_NO_MAGICLINKS
        | ResolveFlag::RESOLVE_NO_XDEV;
    let how = OpenHow::new().flags(flags | OFlag::O_CLOEXEC | OFlag::O_NOFOLLOW).resolve(resolve);
    loop {
        match openat2(root, path, how) {
            // EAGAIN: a rename on the way made the walk uncertain; the kernel asks for another try.
            Err(Errno::EINTR | Errno::EAGAIN) => {}
            other => return other.named(|| format!("openat2({}, BENEATH|NO_XDEV)", shown(path))),
        }
    }
}

/// The directory at `path` if the kernel has every name on the way in its cache; `None` if not, or if a mount or a link is
/// there. Each directory on the way has to be the caller's by file system uid, or to be searchable by what is cached of it.
pub fn open_cached(root: BorrowedFd<'_>, path: &Path) -> Option<OwnedFd> {
    let resolve = ResolveFlag::RESOLVE_BENEATH
        | ResolveFlag::RESOLVE_NO_SYMLINKS
        | ResolveFlag::RESOLVE_NO_MAGICLINKS
        | ResolveFlag::RESOLVE_NO_XDEV
        // Linux 5.12, as idmapped mounts; nix has no name for it.
        | ResolveFlag::from_bits_retain(nix::libc::RESOLVE_CACHED);
    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    // EAGAIN is the answer "not cached", and what the kernel says where anything is mounted or unmounted on this machine in the
    // same moment. Of the other errors none makes it a directory to look at.
    for _ in 0..CACHED_TRIES {
        match openat2(root, path, OpenHow::new().flags(flags).resolve(resolve)) {
            Ok(dir) => return Some(dir),
            Err(Errno::EAGAIN) => {}
            Err(_) => return None,
        }
    }
    None
}

/// The directory that `path` is in, and its name there.
///
/// # Errors
/// As [`open_beneath`].
pub fn parent_of<'a>(root: BorrowedFd<'_>, path: &'a Path) -> Result<(OwnedFd, &'a OsStr)> {
    let name = path
        .file_name()
        .ok_or_else(|| SysError::new(Errno::EINVAL, format!("no name in {}", shown(path))))?;
    let parent = path.parent().unwrap_or(Path::new(""));
    Ok((open_beneath(root, parent, OFlag::O_PATH | OFlag::O_DIRECTORY)?, name))
}

/// The attributes of what is at `path`, a link's own included; `None` if there is nothing.
///
/// # Errors
/// As [`open_beneath`].
pub fn look(root: BorrowedFd<'_>, path: &Path) -> Result<Option<FileStat>> {
    match open_beneath(root, path, OFlag::O_PATH) {
        Ok(fd) => fstat(&fd).map(Some).named(|| format!("fstat({})", shown(path))),
        Err(error)
            if matches!(error.errno, Errno::ENOENT | Errno::ENOTDIR | Errno::ELOOP | Errno::ESTALE) =>
        {
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

/// # Errors
/// As renameat2(2); never across file systems.
pub fn rename(
    from: BorrowedFd<'_>,
    name: &OsStr,
    to: BorrowedFd<'_>,
    into: &OsStr,
    flags: RenameFlags,
) -> Result<()> {
    let shown = |name: &OsStr| shown(Path::new(name));
    renameat2(from, name, to, into, flags)
        .named(|| format!("renameat2({}, {}, {flags:?})", shown(name), shown(into)))
}

/// What is in a directory.
///
/// # Errors
/// `readdir` failing.
pub fn names(dir: BorrowedFd<'_>) -> Result<Vec<(OsString, Kind)>> {
    let mut names = Vec::new();
    each_name(dir, |name, kind| {
        names.push((name.to_owned(), kind));
        ControlFlow::Continue(())
    })?;
    Ok(names)
}

/// Shows what is in a directory, until `visit` has seen enough.
///
/// # Errors
/// `readdir` failing.
pub fn each_name(dir: BorrowedFd<'_>, mut visit: impl FnMut(&OsStr, Kind) -> ControlFlow<()>) -> Result<()> {
    // A descriptor of its own: the position in the directory is the descriptor's.
    let own = openat(dir, ".", OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty());
    let mut listed = Dir::from_fd(own.named(|| "openat(.)".to_owned())?).named(|| "fdopendir".to_owned())?;
    for entry in listed.iter() {
        let entry = entry.named(|| "readdir".to_owned())?;
        let name = OsStr::from_bytes(entry.file_name().to_bytes());
        if name == "." || name == ".." {
            continue;
        }
        let kind = match entry.file_type() {
            Some(Type::Directory) => Kind::Directory,
            // A whiteout, or a file system that does not tell.
            Some(Type::CharacterDevice) | None => {
                match fstatat(dir.as_fd(), name, AtFlags::AT_SYMLINK_NOFOLLOW) {
                    Ok(file) => kind_of(&file),
                    // Gone since: nothing to name.
                    Err(_) => continue,
                }
            }
            Some(_) => Kind::Other,
        };
        if visit(name, kind).is_break() {
            break;
        }
    }
    Ok(())
}

/// A path of a container's, fit for a log: bounded, and without control characters.
pub fn shown(path: &Path) -> String {
    path.to_string_lossy().chars().take(200).flat_map(char::escape_debug).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    #[test]
    fn links_are_seen_and_not_followed() {
        let dir = tempfile::tempdir().unwrap();
        let root = open_dir(dir.path()).unwrap();
        std::fs::create_dir(dir.path().join("d")).unwrap();
        symlink("d", dir.path().join("link")).unwrap();
        symlink("/etc", dir.path().join("out")).unwrap();
        let kind = |path: &str| look(root.as_fd(), Path::new(path)).unwrap().map(|file| kind_of(&file));
        assert_eq!(kind("d"), Some(Kind::Directory));
        assert_eq!(kind(""), Some(Kind::Directory));
        assert_eq!((kind("link"), kind("out")), (Some(Kind::Other), Some(Kind::Other)));
        assert_eq!((kind("out/passwd"), kind("link/x"), kind("d/x"), kind("x/y")), (None, None, None, None));
        assert_eq!(look(root.as_fd(), Path::new("../x")).unwrap_err().errno, Errno::EXDEV);
        assert_eq!(look(root.as_fd(), Path::new("/etc")).unwrap_err().errno, Errno::EXDEV);
    }

    #[test]
    fn a_name_in_a_log_is_harmless() {
        assert_eq!(shown(Path::new("a\nb\u{1b}[0m")), "a\\nb\\u{1b}[0m");
        assert_eq!(shown(Path::new(&"x".repeat(5000))).len(), 200);
    }
}
