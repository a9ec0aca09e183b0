//! The mount point: what is mounted there, and whether it answers. Asking a FUSE file system that nobody serves hangs, and a
//! daemon that hangs in its own file system cannot even die; so it is asked by a child, with a deadline.

use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::mount::MntFlags;
use nix::poll::{PollFd, PollFlags, PollTimeout};
use sysbox_sys::SysError;
use sysbox_sys::error::Named;

use crate::session::FS_TYPE;
use crate::tree::Probe;

const PATIENCE: Duration = Duration::from_secs(10);
/// Dead mounts on top of each other at one mount point, at most.
const MOST_DEAD: usize = 16;

#[derive(Debug, thiserror::Error)]
pub enum PlaceError {
    #[error(transparent)]
    Sys(#[from] SysError),
    #[error("the mount point {} is a symbolic link", .0.display())]
    Symlink(PathBuf),
    #[error("read mountinfo: {0}")]
    MountInfo(#[source] procfs::ProcError),
    #[error("{} is a mount of type {fs_type}, not ours", mountpoint.display())]
    Foreign { mountpoint: PathBuf, fs_type: String },
    #[error("{} is a live sysbox-fs mount of another process", .0.display())]
    Alive(PathBuf),
    #[error("{} does not answer within {PATIENCE:?}", .0.display())]
    Silent(PathBuf),
    #[error("{} does not lead to this sysbox-fs: {outcome}", mountpoint.display())]
    Elsewhere { mountpoint: PathBuf, outcome: String },
}

type Result<T> = std::result::Result<T, PlaceError>;

/// Makes the directory, without looking at what may be mounted there. Answers its path without symbolic links.
///
/// # Errors
/// `mkdir` failing, or a symbolic link.
pub fn prepare(mountpoint: &Path) -> Result<PathBuf> {
    let shown = || format!("mkdir({})", mountpoint.display());
    let (Some(parent), Some(name)) = (mountpoint.parent(), mountpoint.file_name()) else {
        return Err(SysError::new(Errno::EINVAL, shown()).into());
    };
    let parent = if parent.as_os_str().is_empty() { Path::new(".") } else { parent };
    std::fs::create_dir_all(parent).named(shown)?;
    let place = parent.canonicalize().named(|| format!("realpath({})", parent.display()))?.join(name);
    match nix::unistd::mkdir(&place, nix::sys::stat::Mode::from_bits_truncate(0o711)) {
        Ok(()) | Err(Errno::EEXIST) => {}
        Err(errno) => return Err(SysError::new(errno, shown()).into()),
    }
    // Does not look below a mount: directories have no link to read.
    if nix::fcntl::readlink(&place).is_ok() { Err(PlaceError::Symlink(place)) } else { Ok(place) }
}

/// The type of what is mounted there, topmost.
///
/// # Errors
/// /proc/self/mountinfo not being readable.
pub fn mounted(mountpoint: &Path) -> Result<Option<String>> {
    let mounts =
        procfs::process::Process::myself().and_then(|me| me.mountinfo()).map_err(PlaceError::MountInfo)?;
    let wanted = escaped(mountpoint);
    let topmost =
        mounts.into_iter().rfind(|mount| mount.mount_point.as_os_str().as_encoded_bytes() == wanted);
    Ok(topmost.map(|mount| mount.fs_type))
}

/// As mountinfo writes paths.
fn escaped(path: &Path) -> Vec<u8> {
    let escape = |byte: &u8| match byte {
        b' ' | b'\t' | b'\n' | b'\\' => format!("\\{byte:03o}").into_bytes(),
        other => vec![*other],
    };
    path.as_os_str().as_encoded_bytes().iter().flat_map(escape).collect()
}

/// Unmounts what a sysbox-fs left there whose connection nobody kept. Answers how many.
///
/// # Errors
/// `Foreign` or `Alive` for a mount that is not to be touched.
pub fn clear_dead(mountpoint: &Path) -> Result<usize> {
    for cleared in 0..MOST_DEAD {
        match mounted(mountpoint)? {
            None => return Ok(cleared),
            Some(fs_type) if fs_type != FS_TYPE => {
                return Err(PlaceError::Foreign { mountpoint: mountpoint.to_owned(), fs_type });
            }
            Some(_) => {}
        }
        match ask(mountpoint, 0)? {
            Answer::Dead => {}
            Answer::Answered => return Err(PlaceError::Alive(mountpoint.to_owned())),
            Answer::Silent => return Err(PlaceError::Silent(mountpoint.to_owned())),
            Answer::Failed(outcome) => {
                return Err(PlaceError::Elsewhere { mountpoint: mountpoint.to_owned(), outcome });
            }
        }
        // Nothing can be in use in a dead file system, but what holds it open keeps a plain umount from working.
        nix::mount::umount2(mountpoint, MntFlags::MNT_DETACH)
            .named(|| format!("umount2({}, MNT_DETACH)", mountpoint.display()))?;
    }
    Err(PlaceError::Alive(mountpoint.to_owned()))
}

/// Checks that what is mounted there is served by this process.
///
/// # Errors
/// What it leads to instead.
pub fn verify(mountpoint: &Path, probe: &Probe) -> Result<()> {
    let nonce = u64::from(std::process::id()) << 32 | 1;
    let elsewhere = |outcome: &str| PlaceError::Elsewhere {
        mountpoint: mountpoint.to_owned(),
        outcome: outcome.to_owned(),
    };
    match ask(mountpoint, nonce)? {
        Answer::Answered if probe.seen(nonce) => Ok(()),
        Answer::Answered => Err(elsewhere("another file system answers")),
        Answer::Dead => Err(elsewhere("a dead FUSE connection is mounted there")),
        Answer::Silent => Err(PlaceError::Silent(mountpoint.to_owned())),
        Answer::Failed(outcome) => Err(elsewhere(&outcome)),
    }
}

/// Somebody's look (a df, a path that leads through) makes it busy for a moment: that is waited for.
///
/// # Errors
/// `EBUSY` while it is in use.
pub fn unmount(mountpoint: &Path) -> std::result::Result<(), SysError> {
    const LONG: Duration = Duration::from_secs(2);
    let begun = Instant::now();
    loop {
        match nix::mount::umount(mountpoint) {
            Err(Errno::EBUSY) if begun.elapsed() < LONG => std::thread::sleep(Duration::from_millis(10)),
            other => return other.named(|| format!("umount({})", mountpoint.display())),
        }
    }
}

#[derive(Debug)]
enum Answer {
    /// Something looked the name up and has it not.
    Answered,
    Dead,
    Silent,
    Failed(String),
}

const DEAD: u8 = 10;
const ODD: u8 = 11;

/// Has a child look up a name at the mount point.
fn ask(mountpoint: &Path, nonce: u64) -> Result<Answer> {
    let what = || format!("probe({})", mountpoint.display());
    let mut child = Command::new("/proc/self/exe")
        .arg("--probe")
        .arg(mountpoint.join(Probe::name(nonce)))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .spawn()
        .named(what)?;
    let pid = i32::try_from(child.id()).unwrap_or_default();
    let ended =
        sysbox_sys::process::identify(pid).and_then(sysbox_sys::process::pidfd_open).and_then(|pidfd| {
            let mut polled = [PollFd::new(pidfd.as_fd(), PollFlags::POLLIN)];
            let limit = PollTimeout::try_from(PATIENCE).unwrap_or(PollTimeout::MAX);
            nix::poll::poll(&mut polled, limit).named(|| "poll(pidfd)".to_owned())
        })?;
    if ended == 0 {
        // Not waited for: if the request was read already the child does not die before it is answered.
        child.kill().named(what)?;
        return Ok(Answer::Silent);
    }
    let status = child.wait().named(what)?;
    Ok(match status.code() {
        Some(0) => Answer::Answered,
        Some(code) if code == i32::from(DEAD) => Answer::Dead,
        _ => Answer::Failed(format!("the probe ended with {status}")),
    })
}

/// The child's part: looks a name up that does not exist.
pub fn probe(path: &Path) -> ExitCode {
    match nix::sys::stat::lstat(path) {
        Err(Errno::ENOENT) => ExitCode::SUCCESS,
        Err(Errno::ENOTCONN | Errno::ECONNABORTED) => ExitCode::from(DEAD),
        other => {
            eprintln!("sysbox-fs: lstat({}): {:?}", path.display(), other.map(drop));
            ExitCode::from(ODD)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mount_point_is_made_and_a_link_refused() {
        let dir = tempfile::tempdir().unwrap();
        let wanted = dir.path().join("a/b");
        assert_eq!(prepare(&wanted).unwrap(), dir.path().canonicalize().unwrap().join("a/b"));
        assert!(prepare(&wanted).is_ok(), "again");
        std::os::unix::fs::symlink("b", dir.path().join("a/link")).unwrap();
        assert!(matches!(prepare(&dir.path().join("a/link")), Err(PlaceError::Symlink(_))));
        assert!(prepare(Path::new("/")).is_err());
    }

    #[test]
    fn mounts_are_found_by_their_path() {
        assert_eq!(mounted(Path::new("/proc")).unwrap().as_deref(), Some("proc"));
        assert_eq!(mounted(Path::new("/proc/self")).unwrap(), None);
        assert_eq!(escaped(Path::new("/a b\\c")), b"/a\\040b\\134c");
    }
}
