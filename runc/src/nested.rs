//! The cgroups that a container has made below its own, however deep and however many. Walked by descriptor, down by name and
//! up again by `..`: they may be nested deeper than a path is long, or than there are descriptors. (A cgroup never moves to
//! another parent.)

use std::ffi::{CStr, CString};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use nix::dir::{Dir, Type};
use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::sys::stat::Mode;
use nix::unistd::{UnlinkatFlags, unlinkat};

/// Where a walk is.
#[derive(Debug, Clone, Copy)]
pub enum Step<'a> {
    /// In a cgroup, before those in it.
    Enter,
    /// In it again, after those in it.
    Leave,
    /// In the one above it, which knows it by this name; not for the first.
    Above(&'a CStr),
}

const FLAGS: OFlag =
    OFlag::O_RDONLY.union(OFlag::O_DIRECTORY).union(OFlag::O_NOFOLLOW).union(OFlag::O_CLOEXEC);

/// Visits the cgroup at `path` and all below it. What is removed meanwhile is passed over.
///
/// # Errors
/// The first failure, of the walk or the visitor.
pub fn walk(path: &Path, visit: &mut dyn FnMut(Step<'_>, &OwnedFd) -> nix::Result<()>) -> nix::Result<()> {
    let mut here = match nix::fcntl::open(path, FLAGS, Mode::empty()) {
        Err(Errno::ENOENT) => return Ok(()),
        other => other?,
    };
    let mut names: Vec<CString> = Vec::new();
    visit(Step::Enter, &here)?;
    let mut pending = vec![children(&here)?];
    loop {
        match pending.last_mut().and_then(Vec::pop) {
            Some(name) => match nix::fcntl::openat(&here, name.as_c_str(), FLAGS, Mode::empty()) {
                Ok(child) => {
                    here = child;
                    visit(Step::Enter, &here)?;
                    pending.push(children(&here)?);
                    names.push(name);
                }
                Err(Errno::ENOENT) => {}
                Err(errno) => return Err(errno),
            },
            None => {
                visit(Step::Leave, &here)?;
                pending.pop();
                let Some(name) = names.pop() else { return Ok(()) };
                here = nix::fcntl::openat(&here, "..", FLAGS, Mode::empty())?;
                visit(Step::Above(&name), &here)?;
            }
        }
    }
}

fn children(dir: &OwnedFd) -> nix::Result<Vec<CString>> {
    let mut entries = match Dir::openat(dir, ".", FLAGS, Mode::empty()) {
        Err(Errno::ENOENT) => return Ok(Vec::new()),
        other => other?,
    };
    let is_child = |entry: &nix::dir::Entry| {
        entry.file_type() == Some(Type::Directory) && !matches!(entry.file_name().to_bytes(), b"." | b"..")
    };
    Ok(entries.iter().flatten().filter(is_child).map(|entry| entry.file_name().to_owned()).collect())
}

/// Removes all below `path`.
///
/// # Errors
/// `EBUSY`: one has processes in it, or a new one below it.
pub fn remove_below(path: &Path) -> nix::Result<()> {
    walk(path, &mut |step, dir| match step {
        Step::Above(name) => match unlinkat(dir, name, UnlinkatFlags::RemoveDir) {
            Err(Errno::ENOENT) => Ok(()),
            other => other,
        },
        Step::Enter | Step::Leave => Ok(()),
    })
}

/// What a file of a cgroup says; `None` where there is no such file, or no such cgroup any more.
///
/// # Errors
/// As open(2) and read(2).
pub fn read(dir: &impl AsFd, file: &str) -> nix::Result<Option<String>> {
    let flags = OFlag::O_RDONLY | OFlag::O_CLOEXEC;
    let opened = match nix::fcntl::openat(dir, file, flags, Mode::empty()) {
        Err(Errno::ENOENT) => return Ok(None),
        other => other?,
    };
    match std::io::read_to_string(std::fs::File::from(opened)) {
        Ok(text) => Ok(Some(text)),
        Err(error) => match error.raw_os_error().map(Errno::from_raw) {
            // Removed since.
            Some(Errno::ENODEV) => Ok(None),
            errno => Err(errno.unwrap_or(Errno::EIO)),
        },
    }
}

/// Writes a line to a file of a cgroup, if it is there: whether it was.
///
/// # Errors
/// What the kernel says.
pub fn write(dir: &impl AsFd, file: &str, value: &str) -> nix::Result<bool> {
    let opened = nix::fcntl::openat(dir, file, OFlag::O_WRONLY | OFlag::O_CLOEXEC, Mode::empty());
    let written = opened.and_then(|fd| nix::unistd::write(&fd, value.as_bytes()));
    match written {
        Ok(_) => Ok(true),
        Err(Errno::ENOENT | Errno::ENODEV) => Ok(false),
        Err(errno) => Err(errno),
    }
}
