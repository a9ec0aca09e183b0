//! Keeping the engine's overlay of a container's layers and the container's own one of the same mind: each caches what
//! the other changes (docs/decisions/0002-rootfs.md). sysbox-mgr does it by event; each call of the runtime does it too.

use std::os::fd::AsFd;
use std::path::Path;

use nix::fcntl::OFlag;
use nix::sys::stat::Mode;
use sysbox_sys::mount::FsContext;

use crate::survey::OVERLAY_MAGIC;

/// Drops what the overlay at `path` has cached and nobody uses. No overlay there: nothing to do.
pub fn flush(path: &Path) {
    let Ok(dir) =
        nix::fcntl::open(path, OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty())
    else {
        return;
    };
    if !nix::sys::statfs::fstatfs(&dir).is_ok_and(|facts| facts.filesystem_type().0 == OVERLAY_MAGIC) {
        return;
    }
    // Best effort on purpose: a stale listing is worth no failed exec.
    if let Err(error) = FsContext::pick(dir.as_fd()).and_then(|fs| fs.reconfigure()) {
        tracing::debug!(path = %path.display(), %error, "overlay not flushed");
    }
}
