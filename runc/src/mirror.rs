//! The parent's limits written on the delegated child as well. They bind nobody twice: the child is all that the parent
//! has. But the child is where the container's view of cgroups begins (a JVM or a Go program sizes itself by what it
//! reads there), and where an engine looks for a container's figures (it goes by init's cgroup).

use std::collections::HashMap;
use std::fs;
use std::io::ErrorKind;
use std::os::fd::OwnedFd;
use std::path::Path;

use nix::errno::Errno;

use crate::cgroup::{Cgroup, CgroupError, Hierarchy, Kind, io};
use crate::nested::{self, Step};
use crate::oom;

type Result<T> = std::result::Result<T, CgroupError>;

/// Limits by controller of version 1, in an order in which they may be raised.
const V1: &[(&str, &[&str])] = &[
    (
        "memory",
        &[
            "memory.memsw.limit_in_bytes",
            "memory.limit_in_bytes",
            "memory.soft_limit_in_bytes",
            // The child reaches its limit first, and then its own switch is what counts.
            oom::CONTROL,
        ],
    ),
    ("cpu", &["cpu.cfs_period_us", "cpu.cfs_quota_us"]),
    ("pids", &["pids.max"]),
];
/// What is promised to the parent alone (memory.min, memory.low) is no promise to its child.
const V2: &[&str] =
    &["memory.max", "memory.swap.max", "memory.high", "memory.min", "memory.low", "cpu.max", "pids.max"];

/// Shares of the processor that cgroups below the parent had, each by its inode: [`let_go`] took them away.
#[derive(Debug, Default)]
pub struct Shares(HashMap<u64, String>);

const QUOTA: &str = "cpu.cfs_quota_us";

/// Lets all that is below go before the parent's limits change: by version 1 no share of the processor may be above one
/// above it, not even for the moment, and the container may have given some to cgroups of its own.
///
/// # Errors
/// What the kernel says.
pub fn let_go(cgroup: &Cgroup, child: &str) -> Result<Shares> {
    let mut shares = Shares::default();
    for hierarchy in cgroup.hierarchies.iter().filter(|h| h.has("cpu")) {
        let path = hierarchy.mount.join(&cgroup.parent).join(child);
        let let_go = &mut |step: Step<'_>, dir: &OwnedFd| {
            let Step::Leave = step else { return Ok(()) };
            match nested::read(dir, QUOTA)? {
                Some(quota) if quota.trim() != "-1" => {
                    nested::write(dir, QUOTA, "-1")?;
                    shares.0.insert(nix::sys::stat::fstat(dir)?.st_ino, quota);
                }
                _ => {}
            }
            Ok(())
        };
        nested::walk(&path, let_go).map_err(|errno| io(&path, "let go of the quotas")(errno.into()))?;
    }
    Ok(shares)
}

/// Gives back what was let go, where it is within what is above it now; else that binds.
///
/// # Errors
/// What the kernel says.
pub fn give_back(cgroup: &Cgroup, child: &str, shares: &Shares) -> Result<()> {
    for hierarchy in cgroup.hierarchies.iter().filter(|h| h.has("cpu") && !shares.0.is_empty()) {
        let path = hierarchy.mount.join(&cgroup.parent).join(child);
        let give_back = &mut |step: Step<'_>, dir: &OwnedFd| {
            let Step::Enter = step else { return Ok(()) };
            match shares.0.get(&nix::sys::stat::fstat(dir)?.st_ino) {
                Some(quota) => match nested::write(dir, QUOTA, quota.trim()) {
                    Err(Errno::EINVAL) => Ok(()),
                    other => other.map(drop),
                },
                None => Ok(()),
            }
        };
        nested::walk(&path, give_back).map_err(|errno| io(&path, "give back the quotas")(errno.into()))?;
    }
    Ok(())
}

/// Copies what limits the parent has.
///
/// # Errors
/// What the kernel says; all are tried.
pub fn copy(cgroup: &Cgroup, child: &str) -> Result<()> {
    let mut copied = Ok(());
    for hierarchy in &cgroup.hierarchies {
        let parent = hierarchy.mount.join(&cgroup.parent);
        for files in limits_of(hierarchy) {
            copied = copied.and(copy_files(files, &parent, &parent.join(child)));
        }
    }
    copied
}

fn limits_of(hierarchy: &Hierarchy) -> Vec<&'static [&'static str]> {
    match hierarchy.kind {
        Kind::Unified => vec![V2],
        Kind::Hybrid => Vec::new(),
        Kind::V1 => V1.iter().filter(|(name, _)| hierarchy.has(name)).map(|(_, files)| *files).collect(),
    }
}

fn copy_files(files: &[&str], parent: &Path, child: &Path) -> Result<()> {
    let read = |dir: &Path, file: &str| {
        let text = fs::read_to_string(dir.join(file)).ok()?;
        Some(if file == oom::CONTROL { oom::switch(&text).to_owned() } else { text })
    };
    let write = |file: &&str| match (read(parent, file), read(child, file)) {
        (Some(wanted), Some(has)) if wanted != has => write_if_there(child, file, wanted.trim()),
        _ => Ok(()),
    };
    // What is lowered goes the other way round than what is raised: the second round does what the first was too early for.
    let _early: Vec<Result<()>> = files.iter().map(write).collect();
    files.iter().map(write).fold(Ok(()), Result::and)
}

/// Which files there are depends on controllers and kernel.
fn write_if_there(dir: &Path, file: &str, value: &str) -> Result<()> {
    let path = dir.join(file);
    match fs::write(&path, value) {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        other => other.map_err(io(&path, "write")),
    }
}
