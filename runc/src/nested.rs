//! The cgroups that a container has made below its own, however deep.

use std::path::Path;

use nix::dir::{Dir, Type};
use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::sys::stat::Mode;
use nix::unistd::{UnlinkatFlags, unlinkat};

/// Removes all below `path`. By descriptor, and up again by `..`: a container may have nested its cgroups deeper than a path is long, or than there
/// are descriptors.
///
/// # Errors
/// `EBUSY`: one has processes in it.
pub fn remove_below(path: &Path) -> nix::Result<()> {
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let mut here = match nix::fcntl::open(path, flags, Mode::empty()) {
        Err(Errno::ENOENT) => return Ok(()),
        other => other?,
    };
    let mut names = Vec::new();
    loop {
        let mut entries = Dir::openat(&here, ".", flags, Mode::empty())?;
        let is_child = |entry: &nix::dir::Entry| {
            entry.file_type() == Some(Type::Directory)
                && !matches!(entry.file_name().to_bytes(), b"." | b"..")
        };
        let child = entries.iter().flatten().find(is_child).map(|entry| entry.file_name().to_owned());
        if let Some(name) = child {
            here = nix::fcntl::openat(&here, name.as_c_str(), flags, Mode::empty())?;
            names.push(name);
        } else if let Some(name) = names.pop() {
            here = nix::fcntl::openat(&here, "..", flags, Mode::empty())?;
            match unlinkat(&here, name.as_c_str(), UnlinkatFlags::RemoveDir) {
                Ok(()) | Err(Errno::ENOENT) => {}
                Err(errno) => return Err(errno),
            }
        } else {
            return Ok(());
        }
    }
}
