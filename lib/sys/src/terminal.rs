//! Terminal sizes (ioctl_tty(2)).

use std::os::fd::{AsRawFd, BorrowedFd};

/// Gives `to` the window size of `from`. Where one of them is no terminal, nothing happens.
pub fn copy_size(from: BorrowedFd<'_>, to: BorrowedFd<'_>) {
    let mut size = libc::winsize { ws_row: 0, ws_col: 0, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: TIOCGWINSZ writes one winsize, which `size` is.
    let got = unsafe { libc::ioctl(from.as_raw_fd(), libc::TIOCGWINSZ, &raw mut size) };
    if got == 0 {
        // SAFETY: TIOCSWINSZ reads one winsize, which `size` is.
        unsafe { libc::ioctl(to.as_raw_fd(), libc::TIOCSWINSZ, &raw const size) };
    }
}
