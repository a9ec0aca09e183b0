//! Clones of the host's mounts, as a container is to have them: shifted, with their flags, before anybody sees them.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use nix::mount::MsFlags;
use sysbox_sys::mount::{self as m, Depth};
use sysbox_sys::userns;

use crate::apply::{ApplyError, Attempt, Result};
use crate::plan::{Atime, Attributes, Bind, Extent, Receives, Shift};

/// A detached clone of a source, with its final attributes: nobody ever sees it without them.
///
/// # Errors
/// A source that is gone; one that has to be shifted and cannot.
pub fn clone_source(bind: &Bind, shifter: BorrowedFd<'_>, warnings: &mut Vec<String>) -> Result<OwnedFd> {
    let depth = depth_of(bind.extent);
    let shown = || format!("bind source {}", bind.source.display());
    let clone = m::clone_tree(&bind.source, depth).attempt(shown)?;
    if bind.receives == Receives::Nothing {
        m::set_propagation(clone.as_fd(), MsFlags::MS_PRIVATE, Depth::Tree).attempt(shown)?;
    }
    if bind.shift != Shift::Never {
        match shift(bind, clone.as_fd(), shifter)? {
            Ok(()) => {}
            Err(source) if bind.shift == Shift::Must => {
                return Err(ApplyError::NoShift { path: bind.source.clone(), source });
            }
            Err(error) => warnings.push(format!(
                "bind source {}: its file system cannot shift ids ({error}); its files will belong to nobody inside",
                bind.source.display()
            )),
        }
    }
    let flags = bind.flags;
    m::change_attributes(clone.as_fd(), attributes(flags.tree), attributes(flags.cleared), Depth::Tree)
        .attempt(shown)?;
    m::add_attributes(clone.as_fd(), attributes(flags.top), Depth::One).attempt(shown)?;
    Ok(clone)
}

fn depth_of(extent: Extent) -> Depth {
    match extent {
        Extent::Mount => Depth::One,
        Extent::Tree => Depth::Tree,
    }
}

/// The inner result is of the shift itself.
fn shift(bind: &Bind, clone: BorrowedFd<'_>, shifter: BorrowedFd<'_>) -> Result<sysbox_sys::Result<()>> {
    let own = bind.map.as_ref().map(|map| userns::with_lines(&map.uids, &map.gids)).transpose();
    let own = own.attempt(|| format!("mappings for bind source {}", bind.source.display()))?;
    let shifter = own.as_ref().map_or(shifter, AsFd::as_fd);
    Ok(match (bind.shift_extent, bind.extent) {
        (Some(extent), _) => m::set_idmap(clone, shifter, depth_of(extent)),
        // Submounts are shifted with the top where all of them can be; where one cannot, the top alone.
        (None, Extent::Tree) => {
            m::set_idmap(clone, shifter, Depth::Tree).or_else(|_| m::set_idmap(clone, shifter, Depth::One))
        }
        (None, Extent::Mount) => m::set_idmap(clone, shifter, Depth::One),
    })
}

fn attributes(a: Attributes) -> m::Attributes {
    m::Attributes {
        read_only: a.read_only,
        nosuid: a.nosuid,
        nodev: a.nodev,
        noexec: a.noexec,
        nosymfollow: a.nosymfollow,
        nodiratime: a.nodiratime,
        atime: match a.atime {
            Atime::Kept => m::Atime::Kept,
            Atime::Relative => m::Atime::Relative,
            Atime::Never => m::Atime::Never,
            Atime::Always => m::Atime::Always,
        },
    }
}
