//! Session keyrings (keyctl(2)): a container must not find the keys of whoever started it.

use std::ffi::CString;

use nix::errno::Errno;

use crate::error::{Named, Result, SysError};

const KEYCTL_JOIN_SESSION_KEYRING: libc::c_int = 1;

/// Joins a session keyring of this name, making it if there is none.
///
/// # Errors
/// `ENOSYS`: the kernel has no keys; `EDQUOT`: the user's quota of keys is used up.
pub fn join_session(name: &str) -> Result<()> {
    let what = || format!("keyctl(JOIN_SESSION_KEYRING, {name})");
    let c = CString::new(name).map_err(|_| SysError::new(Errno::EINVAL, what()))?;
    // SAFETY: `c` is a NUL-terminated string that outlives the call.
    let done = unsafe { libc::syscall(libc::SYS_keyctl, KEYCTL_JOIN_SESSION_KEYRING, c.as_ptr()) };
    Errno::result(done).map(drop).named(what)
}
