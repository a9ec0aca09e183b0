//! Extended attributes of what a descriptor stands for (xattr(7)).

use std::ffi::CStr;
use std::os::fd::{AsRawFd, BorrowedFd};

use nix::errno::Errno;

use crate::error::{Named, Result};

/// Whether the attribute is there; one that cannot be read is not. Works for O_PATH descriptors.
pub fn exists(fd: BorrowedFd<'_>, name: &CStr) -> bool {
    let Ok(path) = std::ffi::CString::new(format!("/proc/self/fd/{}", fd.as_raw_fd())) else { return false };
    // SAFETY: both strings end with NUL and outlive the call; a null buffer of length 0 only asks for the size.
    unsafe { libc::getxattr(path.as_ptr(), name.as_ptr(), std::ptr::null_mut(), 0) >= 0 }
}

/// Sets the attribute. Works for O_PATH descriptors.
///
/// # Errors
/// `EPERM` for `trusted.*` without CAP_SYS_ADMIN; `ENOTSUP` where the file system has none.
pub fn set(fd: BorrowedFd<'_>, name: &CStr, value: &[u8]) -> Result<()> {
    let what = || format!("setxattr({}, {})", fd.as_raw_fd(), name.to_string_lossy());
    let path = std::ffi::CString::new(format!("/proc/self/fd/{}", fd.as_raw_fd()))
        .map_err(|_| Errno::EINVAL)
        .named(what)?;
    // SAFETY: the strings end with NUL, `value` is its length long, and all outlive the call.
    let done = unsafe { libc::setxattr(path.as_ptr(), name.as_ptr(), value.as_ptr().cast(), value.len(), 0) };
    Errno::result(done).map(drop).named(what)
}
