//! CPUs and memory nodes of cgroups of version 1, where neither parent nor child follows the other (cpuset(7)).

use std::fs;
use std::path::Path;

use nix::errno::Errno;

use crate::cgroup::{CgroupError, io};
use crate::nested::{self, Step};

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

/// Cgroups that are made below get what this one has, as below systemd's root of the hierarchy. crun counts on it: to copy by
/// itself it opens the files of every cgroup above for writing, and those at the top of a container are not the container's.
///
/// # Errors
/// What the kernel says.
pub fn hand_down(cgroup: &Path) -> Result<()> {
    let file = cgroup.join("cgroup.clone_children");
    fs::write(&file, "1").map_err(io(&file, "write"))
}

/// Gives `parent` and its `child` these CPUs or nodes. Version 1 keeps a cgroup's set within that of the one above it, and lets
/// neither follow the other: when it shrinks, those below come first, and each keeps what it may of its own.
///
/// # Errors
/// CPUs or nodes that there are none of, or that are not this cgroup's to give.
pub fn set(parent: &Path, child: &str, file: &str, wanted: &str) -> Result<()> {
    let failed = |errno: Errno| io(&parent.join(file), "write")(errno.into());
    match fs::write(parent.join(file), wanted) {
        Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {
            shrink(parent, file, wanted).map_err(failed)?;
        }
        other => other.map_err(io(&parent.join(file), "write"))?,
    }
    let child = parent.join(child);
    fs::write(child.join(file), wanted).map_err(io(&child.join(file), "write"))
}

/// On the way down each gets the new set besides its own, so that the one below may have it; on the way up what it is to keep.
fn shrink(parent: &Path, file: &str, wanted: &str) -> nix::Result<()> {
    let new = ranges(wanted).ok_or(Errno::EINVAL)?;
    let mut kept: Vec<Option<String>> = Vec::new();
    nested::walk(parent, &mut |step, dir| match step {
        Step::Enter => {
            let own = nested::read(dir, file)?.unwrap_or_default();
            let own = own.trim();
            let above = kept.last().cloned().flatten().unwrap_or_else(|| wanted.to_owned());
            // One that was never told has none, and no process.
            let keeps = (!own.is_empty()).then(|| match shared(&ranges(own).unwrap_or_default(), &new) {
                some if some.is_empty() => above,
                some => list(&some),
            });
            if keeps.is_some() {
                nested::write(dir, file, &format!("{own},{wanted}"))?;
            }
            kept.push(keeps);
            Ok(())
        }
        Step::Leave => match kept.pop().flatten() {
            Some(keeps) => nested::write(dir, file, &keeps).map(drop),
            None => Ok(()),
        },
        Step::Above(_) => Ok(()),
    })
}

/// The kernel's list format: `0-3,5`.
fn ranges(text: &str) -> Option<Vec<(u32, u32)>> {
    let number = |text: &str| text.trim().parse::<u32>().ok();
    let part = |part: &str| match part.split_once('-') {
        Some((first, last)) => Some((number(first)?, number(last)?)),
        None => number(part).map(|one| (one, one)),
    };
    text.split(',').map(str::trim).filter(|text| !text.is_empty()).map(part).collect()
}

fn shared(some: &[(u32, u32)], others: &[(u32, u32)]) -> Vec<(u32, u32)> {
    let both = |(first, last): &(u32, u32)| {
        let own = (*first, *last);
        others.iter().map(move |other| (own.0.max(other.0), own.1.min(other.1)))
    };
    some.iter().flat_map(both).filter(|(first, last)| first <= last).collect()
}

fn list(ranges: &[(u32, u32)]) -> String {
    let shown: Vec<String> = ranges.iter().map(|(first, last)| format!("{first}-{last}")).collect();
    shown.join(",")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_two_sets_share_is_listed() {
        for (own, new, expected) in [
            ("0-3", "1-2", "1-2"),
            ("0,2,4", "0-2", "0-0,2-2"),
            ("3", "0-1", ""),
            ("0-1,6-7", "1-6", "1-1,6-6"),
            (" 0-1\n", "0", "0-0"),
        ] {
            let both = shared(&ranges(own).unwrap(), &ranges(new).unwrap());
            assert_eq!(list(&both), expected, "{own} and {new}");
        }
        for bad in ["x", "1-", "-1", "0-4294967296", "0:1"] {
            assert_eq!(ranges(bad), None, "{bad}");
        }
    }
}
