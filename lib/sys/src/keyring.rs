//! Session keyrings (keyctl(2)): a container must not find the keys of whoever started it.

use std::ffi::CString;

use nix::errno::Errno;

use crate::error::{Named, Result, SysError};

const KEYCTL_JOIN_SESSION_KEYRING: libc::c_int = 1;
const KEYCTL_SETPERM: libc::c_int = 5;

/// A session keyring, by its serial number.
#[derive(Debug, Clone, Copy)]
pub struct Keyring(libc::c_long);

/// Joins a session keyring of this name, making it if there is none.
///
/// # Errors
/// `ENOSYS`: the kernel has no keys; `EDQUOT`: the user's quota of keys is used up.
pub fn join_session(name: &str) -> Result<Keyring> {
    let what = || format!("keyctl(JOIN_SESSION_KEYRING, {name})");
    let c = CString::new(name).map_err(|_| SysError::new(Errno::EINVAL, what()))?;
    // SAFETY: `c` is a NUL-terminated string that outlives the call.
    let done = unsafe { libc::syscall(libc::SYS_keyctl, KEYCTL_JOIN_SESSION_KEYRING, c.as_ptr()) };
    Errno::result(done).map(Keyring).named(what)
}

/// Lets later processes of the same user join it by its name: only one that can be searched is found. Else as the kernel makes
/// it: all but that for who possesses it, view, read and link for its user.
///
/// # Errors
/// As [`join_session`].
pub fn let_user_search(keyring: Keyring) -> Result<()> {
    const PERMISSIONS: libc::c_uint = 0x3f1b_0000;
    // SAFETY: takes numbers alone.
    let done = unsafe { libc::syscall(libc::SYS_keyctl, KEYCTL_SETPERM, keyring.0, PERMISSIONS) };
    Errno::result(done).map(drop).named(|| format!("keyctl(SETPERM, {})", keyring.0))
}
