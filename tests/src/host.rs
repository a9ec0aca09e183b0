//! Files of the host as a test makes and looks at them.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use tempfile::TempDir;

pub const NO_PATHS: [&Path; 0] = [];
pub const NO_NAMES: [&str; 0] = [];

/// A directory of the host that only root can reach.
#[track_caller]
pub fn host_dir() -> TempDir {
    tempfile::tempdir().expect("a temporary directory can be made")
}

/// Uid, gid and the last three digits of the mode, on the host's disk.
#[track_caller]
pub fn owner(path: &Path) -> (u32, u32, u32) {
    let facts = fs::symlink_metadata(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    (facts.uid(), facts.gid(), facts.mode() & 0o777)
}

/// Sorted.
#[track_caller]
pub fn names_in(dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(dir).unwrap_or_else(|error| panic!("{}: {error}", dir.display()));
    let mut names: Vec<String> =
        entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}
