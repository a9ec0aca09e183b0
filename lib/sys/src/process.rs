//! Processes that cannot be mistaken for later ones: pid with start time, and pidfds.

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use nix::errno::Errno;
use sysbox_ipc::mgr::Process;

use crate::error::{Named, Result, SysError};

/// The start time of a process: field 22 of /proc/PID/stat (proc(5)), in clock ticks since boot.
///
/// # Errors
/// `ESRCH` if there is no such process; `EPROTO` for a line we cannot read.
pub fn start_ticks(pid: i32) -> Result<u64> {
    let path = format!("/proc/{pid}/stat");
    let line = match std::fs::read_to_string(&path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            return Err(SysError::new(Errno::ESRCH, format!("read({path})")));
        }
        other => other.named(|| format!("read({path})"))?,
    };
    // The command's name, in parentheses, may hold anything; what follows the last one is fields from the third on.
    line.rsplit_once(") ")
        .and_then(|(_, rest)| rest.split_ascii_whitespace().nth(19))
        .and_then(|field| field.parse().ok())
        .ok_or_else(|| SysError::new(Errno::EPROTO, format!("field 22 of {path}")))
}

/// The identity of a process that runs now.
///
/// # Errors
/// As [`start_ticks`].
pub fn identify(pid: i32) -> Result<Process> {
    Ok(Process { pid, start_ticks: start_ticks(pid)? })
}

/// The identity of this process.
///
/// # Errors
/// /proc not being there.
pub fn myself() -> Result<Process> {
    identify(nix::unistd::getpid().as_raw())
}

/// Whether this very process runs (a zombie does not).
pub fn is_alive(process: Process) -> bool {
    let path = format!("/proc/{}/stat", process.pid);
    let Ok(line) = std::fs::read_to_string(path) else { return false };
    let Some((_, rest)) = line.rsplit_once(") ") else { return false };
    let mut fields = rest.split_ascii_whitespace();
    let state = fields.next();
    let start = fields.nth(18).and_then(|field| field.parse::<u64>().ok());
    !matches!(state, Some("Z" | "X")) && start == Some(process.start_ticks)
}

/// pidfd_open(2), Linux 5.3, and a check that the descriptor is of the process meant, not of a later one.
///
/// # Errors
/// `ESRCH` if the process is gone.
pub fn pidfd_open(process: Process) -> Result<OwnedFd> {
    let what = || format!("pidfd_open({})", process.pid);
    // SAFETY: pidfd_open takes two integers and touches no memory of ours.
    let raw = Errno::result(unsafe { libc::syscall(libc::SYS_pidfd_open, process.pid, 0) }).named(what)?;
    let raw = i32::try_from(raw).map_err(|_| SysError::new(Errno::EBADF, what()))?;
    // SAFETY: the kernel returned this new descriptor to us alone.
    let fd = unsafe { OwnedFd::from_raw_fd(raw) };
    // The pid was ours to begin with only if the start time still agrees after the descriptor pinned it.
    if start_ticks(process.pid)? == process.start_ticks {
        Ok(fd)
    } else {
        Err(SysError::new(Errno::ESRCH, what()))
    }
}

/// pidfd_send_signal(2), Linux 5.1. Signal 0 only asks.
///
/// # Errors
/// `ESRCH` if the process is gone.
pub fn pidfd_send_signal(pidfd: &OwnedFd, signal: i32) -> Result<()> {
    let null = std::ptr::null::<libc::siginfo_t>();
    // SAFETY: a null siginfo is allowed and means the default one; the descriptor is open for the call's time.
    let done = unsafe { libc::syscall(libc::SYS_pidfd_send_signal, pidfd.as_raw_fd(), signal, null, 0) };
    Errno::result(done).map(drop).named(|| format!("pidfd_send_signal({signal})"))
}

/// Runs `work` in a forked child that dies with this process, and ends the child with its result as exit code.
///
/// # Errors
/// `EBUSY` if this process has more than one thread: a fork would copy locks that nobody will ever release.
pub fn fork_for(work: impl FnOnce() -> i32) -> Result<nix::unistd::Pid> {
    let threads = std::fs::read_dir("/proc/self/task").named(|| "read(/proc/self/task)".to_owned())?.count();
    if threads != 1 {
        return Err(SysError::new(Errno::EBUSY, format!("fork with {threads} threads")));
    }
    let parent = nix::unistd::getpid();
    // SAFETY: this process has one thread, so the child may do whatever the parent could.
    match unsafe { nix::unistd::fork() }.named(|| "fork".to_owned())? {
        nix::unistd::ForkResult::Parent { child } => Ok(child),
        nix::unistd::ForkResult::Child => {
            let tied = nix::sys::prctl::set_pdeathsig(nix::sys::signal::Signal::SIGKILL);
            // The parent may have died before the tie was made.
            let code = if tied.is_ok() && nix::unistd::getppid() == parent { work() } else { 1 };
            // SAFETY: _exit(2) runs nothing of the parent's: no destructors, no buffers flushed twice.
            unsafe { libc::_exit(code) }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_told_from_a_later_one_with_its_pid() {
        let me = myself().unwrap();
        assert!(is_alive(me));
        pidfd_open(me).unwrap();
        let impostor = Process { start_ticks: me.start_ticks + 1, ..me };
        assert!(!is_alive(impostor));
        assert_eq!(pidfd_open(impostor).unwrap_err().errno, Errno::ESRCH);
    }

    #[test]
    fn a_dead_process_is_not_alive() {
        let mut child = std::process::Command::new("true").spawn().unwrap();
        let process = identify(i32::try_from(child.id()).unwrap()).unwrap();
        child.wait().unwrap();
        assert!(!is_alive(process));
    }
}
