//! What a FUSE server that outlives itself needs and nix has not. Knows nothing of the FUSE protocol.

use std::os::fd::{AsRawFd, BorrowedFd};

use nix::errno::Errno;

use crate::error::{Named, Result};

/// dup3(2): from now on the descriptor number of `number` means the open file of `file`; what it meant before is closed.
///
/// nix's `dup3` wants to own the number. Here its owner (a fuser session) keeps it and must not notice.
///
/// # Errors
/// `EINVAL` if both are the same number.
pub fn dup3_over(file: BorrowedFd<'_>, number: BorrowedFd<'_>) -> Result<()> {
    // SAFETY: dup3 takes three integers and touches no memory of ours. Both numbers are open for the call's time, as they
    // are borrowed, and `number` stays open afterwards: its owner still owns exactly one open descriptor.
    let done = unsafe { libc::dup3(file.as_raw_fd(), number.as_raw_fd(), libc::O_CLOEXEC) };
    Errno::result(done).map(drop).named(|| format!("dup3({}, {})", file.as_raw_fd(), number.as_raw_fd()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Seek, Write};
    use std::os::fd::AsFd;

    #[test]
    fn the_number_means_the_other_file_afterwards() {
        let mut one = tempfile::tempfile().unwrap();
        let mut two = tempfile::tempfile().unwrap();
        dup3_over(one.as_fd(), two.as_fd()).unwrap();
        two.write_all(b"written to two").unwrap();
        one.rewind().unwrap();
        let mut text = String::new();
        one.read_to_string(&mut text).unwrap();
        assert_eq!(text, "written to two");
        assert_eq!(dup3_over(one.as_fd(), one.as_fd()).unwrap_err().errno, Errno::EINVAL);
    }
}
