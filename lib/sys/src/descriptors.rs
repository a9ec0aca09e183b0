//! The descriptors of a process that is about to become another program.

use std::os::fd::{BorrowedFd, RawFd};

use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::sys::socket::{UnixAddr, getpeername, getsockopt, sockopt};

/// Closes what an exec would close, standard streams aside, but for sockets on which somebody may still call or answer:
/// those that listen, and those of a pair. For a process that waits for its exec, and holds what it was forked with until
/// then. Without a /proc it does nothing.
///
/// Whoever owned what is closed here must not use it any more, in a process that only execs or exits.
pub fn close_what_exec_would() {
    let Ok(entries) = std::fs::read_dir("/proc/self/fd") else { return };
    let numbers: Vec<RawFd> =
        entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect();
    for number in numbers.into_iter().filter(|number| *number > 2) {
        // SAFETY: only asked of and, further down, closed by number; whatever else is open under it by now is looked at
        // the same way.
        let fd = unsafe { BorrowedFd::borrow_raw(number) };
        let closes = fcntl(fd, FcntlArg::F_GETFD)
            .is_ok_and(|flags| FdFlag::from_bits_truncate(flags).contains(FdFlag::FD_CLOEXEC));
        let listens = getsockopt(&fd, sockopt::AcceptConn).unwrap_or(false);
        let paired = getpeername::<UnixAddr>(number).is_ok_and(|peer| peer.path().is_none());
        if closes && !listens && !paired {
            // The one through which the directory was read is gone already.
            let _closed = nix::unistd::close(number);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::os::fd::AsRawFd;
    use std::os::unix::net::{UnixListener, UnixStream};

    /// The directory, for the copy of this test that runs in a process of its own.
    const APART: &str = "SYSBOX_TEST_DESCRIPTORS";

    #[test]
    fn files_and_calls_to_others_are_closed_and_the_rest_stays() {
        if let Some(dir) = std::env::var_os(APART) {
            std::process::exit(i32::from(!closes_and_keeps(std::path::Path::new(&dir))));
        }
        // Here, the test harness's own files are at stake.
        let dir = tempfile::tempdir().unwrap();
        let name = "files_and_calls_to_others_are_closed_and_the_rest_stays";
        let mut apart = std::process::Command::new(std::env::current_exe().unwrap());
        apart.env(APART, dir.path()).args([name, "--nocapture", "--test-threads=1"]);
        let said = apart.output().unwrap();
        assert!(said.status.success(), "{said:?}");
        assert!(dir.path().join("file").exists(), "it has not run: {said:?}");
    }

    fn closes_and_keeps(dir: &std::path::Path) -> bool {
        let listener = UnixListener::bind(dir.join("socket")).unwrap();
        let file = std::fs::File::create(dir.join("file")).unwrap();
        let caller = UnixStream::connect(dir.join("socket")).unwrap();
        let (mut one, _other) = UnixStream::pair().unwrap();
        close_what_exec_would();
        let open = |number: RawFd| std::fs::read_link(format!("/proc/self/fd/{number}")).is_ok();
        let gone = !open(file.as_raw_fd()) && !open(caller.as_raw_fd());
        let there = open(listener.as_raw_fd()) && one.write_all(b"x").is_ok() && open(1);
        std::mem::forget((file, caller));
        gone && there
    }
}
