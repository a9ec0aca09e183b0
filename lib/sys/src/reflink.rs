//! A file that shares another's blocks until one of them is written to.

use std::os::fd::{AsRawFd, BorrowedFd};

use nix::errno::Errno;

use crate::error::{Named, Result};

/// Makes `to` a copy of `from` without copying (ioctl_ficlone(2); Linux 4.5).
///
/// # Errors
/// `EOPNOTSUPP`, `ENOTTY`, `EXDEV` or `EINVAL` where the file system cannot, or the two are on different ones.
pub fn reflink(from: BorrowedFd<'_>, to: BorrowedFd<'_>) -> Result<()> {
    // SAFETY: FICLONE takes a descriptor by value and touches no memory of ours; both are open.
    let done = unsafe { libc::ioctl(to.as_raw_fd(), libc::FICLONE, from.as_raw_fd()) };
    Errno::result(done)
        .map(drop)
        .named(|| format!("ioctl({}, FICLONE, {})", to.as_raw_fd(), from.as_raw_fd()))
}
