//! Asking the kernel what it knows, without doing it.

use nix::errno::Errno;

/// SECCOMP_FILTER_FLAG_NEW_LISTENER | SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV (Linux 5.19): the second needs the first.
pub const NOTIFY_WAIT_KILLABLE: u32 = 1 << 3 | 1 << 5;

/// Whether seccomp(2) knows these flags of SECCOMP_SET_MODE_FILTER. Loads nothing.
pub fn seccomp_knows_flags(flags: u32) -> bool {
    let none = std::ptr::null::<libc::sock_fprog>();
    // SAFETY: a null program is never dereferenced by us; the kernel answers EFAULT, after it has judged the flags.
    let done = unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, flags, none) };
    Errno::result(done) == Err(Errno::EFAULT)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_flags_are_told_from_unknown_ones() {
        assert!(seccomp_knows_flags(1 << 3));
        assert!(!seccomp_knows_flags(1 << 30));
    }
}
