//! Loading a seccomp filter (seccomp(2)). What it says is decided elsewhere.

use std::os::fd::{FromRawFd, OwnedFd};

use nix::errno::Errno;

use crate::error::{Named, Result, SysError};

/// One instruction of a classic BPF program, as `struct sock_filter` has it (linux/filter.h).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(C)]
pub struct Instruction {
    pub code: u16,
    pub jump_true: u8,
    pub jump_false: u8,
    pub value: u32,
}

/// Flags of SECCOMP_SET_MODE_FILTER that a container's profile may ask for.
pub const FLAG_LOG: u32 = 1 << 1;
pub const FLAG_SPEC_ALLOW: u32 = 1 << 2;

pub const FLAG_WAIT_KILLABLE_RECV: u32 = 1 << 5;
const FLAG_NEW_LISTENER: u32 = 1 << 3;

/// Loads `program` for this thread. Cannot be undone.
///
/// # Errors
/// `EACCES` without CAP_SYS_ADMIN in the user namespace and without no_new_privs; `EINVAL` for a malformed program.
pub fn load(program: &[Instruction], flags: u32) -> Result<()> {
    set(program, flags).map(drop)
}

/// As [`load`], and gives the descriptor by which notified calls are answered (seccomp_unotify(2); Linux 5.0). It is closed
/// by an exec.
///
/// # Errors
/// As [`load`]; `EBUSY` where a filter of this thread has a listener already.
pub fn load_listening(program: &[Instruction], flags: u32) -> Result<OwnedFd> {
    let raw = set(program, flags | FLAG_NEW_LISTENER)?;
    let raw = i32::try_from(raw).map_err(|_| SysError::new(Errno::EBADF, "seccomp listener"))?;
    // SAFETY: with this flag the kernel returns a new descriptor, to us alone.
    Ok(unsafe { OwnedFd::from_raw_fd(raw) })
}

fn set(program: &[Instruction], flags: u32) -> Result<libc::c_long> {
    let what = || format!("seccomp(SET_MODE_FILTER, {flags:#x}, {} instructions)", program.len());
    let length = u16::try_from(program.len()).map_err(|_| SysError::new(Errno::E2BIG, what()))?;
    let fprog = libc::sock_fprog { len: length, filter: program.as_ptr().cast_mut().cast() };
    // SAFETY: `Instruction` has the layout of sock_filter, `fprog` names `length` of them, and both live through the call,
    // which copies the program.
    let done =
        unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, flags, &raw const fprog) };
    Errno::result(done).named(what)
}
