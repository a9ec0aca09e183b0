//! CPUs and memory nodes of cgroups of version 1, where neither parent nor child follows the other (cpuset(7)).

use std::fs;
use std::path::{Path, PathBuf};

use crate::cgroup::{CgroupError, io};

type Result<T> = std::result::Result<T, CgroupError>;

/// Gives a new cgroup what its parent has: empty, it takes no process.
///
/// # Errors
/// What the kernel says.
pub fn inherit(from: &Path, to: &Path) -> Result<()> {
    let own = fs::read_to_string(to).map_err(io(to, "read"))?;
    if own.trim().is_empty() {
        let value = fs::read_to_string(from).map_err(io(from, "read"))?;
        fs::write(to, value.trim()).map_err(io(to, "write"))?;
    }
    Ok(())
}

/// Version 1 keeps a child's set within its parent's, and lets neither follow the other: when it shrinks, the children come
/// first; ours then gets what its parent has.
///
/// # Errors
/// CPUs or nodes that there are none of, or that are not this cgroup's to give.
pub fn set(parent: &Path, child: &str, file: &str, wanted: &str) -> Result<()> {
    let write = |dir: &Path| fs::write(dir.join(file), wanted).map_err(io(&dir.join(file), "write"));
    match fs::write(parent.join(file), wanted) {
        Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {
            for dir in dirs_below(parent).iter().rev() {
                write(dir)?;
            }
            write(parent)
        }
        Err(error) => Err(io(&parent.join(file), "write")(error)),
        Ok(()) => write(&parent.join(child)),
    }
}

/// Cgroups below `path`, each after the one that it is in.
fn dirs_below(path: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let entries = fs::read_dir(path).into_iter().flatten().flatten();
    for entry in entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir())) {
        found.push(entry.path());
        found.extend(dirs_below(&entry.path()));
    }
    found
}
