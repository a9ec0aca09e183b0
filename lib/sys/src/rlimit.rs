//! Resource limits of another process (prlimit(2), Linux 2.6.36).

use nix::errno::Errno;

use crate::error::{Named, Result};

/// Soft and hard limit; `u64::MAX` is RLIM_INFINITY.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    pub soft: u64,
    pub hard: u64,
}

/// Sets a limit (`RLIMIT_NOFILE` …) of a process.
///
/// # Errors
/// `EPERM`: the hard limit would rise, and this process has no CAP_SYS_RESOURCE; `EINVAL`: soft above hard.
pub fn set(pid: i32, resource: i32, limits: Limits) -> Result<()> {
    let new = libc::rlimit64 { rlim_cur: limits.soft, rlim_max: limits.hard };
    // SAFETY: `new` lives through the call, and a null old limit is allowed.
    let done = unsafe { libc::prlimit64(pid, resource as u32, &raw const new, std::ptr::null_mut()) };
    Errno::result(done).map(drop).named(|| format!("prlimit({pid}, {resource}, {limits:?})"))
}

/// The limits of a process.
///
/// # Errors
/// `ESRCH` if it is gone.
pub fn get(pid: i32, resource: i32) -> Result<Limits> {
    let mut old = libc::rlimit64 { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: `old` is writable through the call, and a null new limit is allowed.
    let done = unsafe { libc::prlimit64(pid, resource as u32, std::ptr::null(), &raw mut old) };
    Errno::result(done).map(drop).named(|| format!("prlimit({pid}, {resource})"))?;
    Ok(Limits { soft: old.rlim_cur, hard: old.rlim_max })
}
