//! Processes that cannot be mistaken for later ones: pid with start time, and pidfds.

use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
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

/// A process held by its pidfd, of which /proc tells by name: what was read of it is its own as long as it had not been
/// reaped *after* the reading, since until then nobody else can have had its pid.
#[derive(Debug)]
pub struct Held {
    process: Process,
    pidfd: OwnedFd,
}

impl Held {
    /// # Errors
    /// `ESRCH` if the process is gone.
    pub fn open(process: Process) -> Result<Self> {
        Ok(Self { process, pidfd: pidfd_open(process)? })
    }

    pub fn pid(&self) -> i32 {
        self.process.pid
    }

    /// Waits for its end, or for the deadline: whether it has ended (a zombie has).
    ///
    /// # Errors
    /// As poll(2).
    pub fn wait_until(&self, deadline: Instant) -> Result<bool> {
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
            let mut wanted = [PollFd::new(self.pidfd.as_fd(), PollFlags::POLLIN)];
            match poll(&mut wanted, timeout) {
                Err(Errno::EINTR) => {}
                Ok(0) if left > Duration::ZERO => {}
                other => return other.map(|ready| ready > 0).named(|| format!("poll({})", self.process.pid)),
            }
        }
    }

    /// # Errors
    /// As pidfd_send_signal(2).
    pub fn kill(&self) -> Result<()> {
        self.signal(libc::SIGKILL)
    }

    /// # Errors
    /// As pidfd_send_signal(2).
    pub fn signal(&self, number: i32) -> Result<()> {
        pidfd_send_signal(&self.pidfd, number)
    }

    /// To be asked after each look at /proc/PID, and before the answer is used.
    ///
    /// # Errors
    /// `ESRCH` if the process was reaped, so that its pid may be another's.
    pub fn still_there(&self) -> Result<()> {
        pidfd_send_signal(&self.pidfd, 0).map_err(|error| {
            SysError::new(error.errno, format!("look at process {}, which has ended", self.process.pid))
        })
    }

    /// Opens namespaces of it (the names of /proc/PID/ns).
    ///
    /// # Errors
    /// As open(2); `ESRCH` if the process is gone.
    pub fn namespaces(&self, names: &[&str]) -> Result<Vec<OwnedFd>> {
        let open = |name: &&str| {
            let path = format!("/proc/{}/ns/{name}", self.process.pid);
            std::fs::File::open(&path).map(OwnedFd::from).named(|| format!("open({path})"))
        };
        let opened = names.iter().map(open).collect();
        // First: an error of the opening may well be because it is gone.
        self.still_there()?;
        opened
    }
}

/// The children of this process that have not been reaped, found among all processes: whoever has them from a library
/// knows no pids.
///
/// # Errors
/// /proc not being readable.
pub fn children() -> Result<Vec<Process>> {
    let me = nix::unistd::getpid().as_raw();
    let entries = std::fs::read_dir("/proc").named(|| "read(/proc)".to_owned())?;
    let pids = entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    let is_ours = |pid: &i32| {
        let line = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        let parent = line.rsplit_once(") ").and_then(|(_, rest)| rest.split(' ').nth(1)?.parse().ok());
        parent == Some(me)
    };
    Ok(pids.filter(is_ours).filter_map(|pid| identify(pid).ok()).collect())
}

/// Makes this process take signals as one that was never told about any: none blocked, none ignored. What is inherited as
/// ignored of SIGHUP and SIGINT stays so (nohup(1)). For before an exec: both outlive it, and Rust's own start ignores
/// SIGPIPE. Adds to rt_sigaction(2) the two signals that glibc keeps for itself and leaves ignored in what it spawns.
///
/// # Errors
/// None that a kernel has for these calls.
pub fn reset_signals() -> Result<()> {
    const KEPT: [libc::c_int; 4] = [libc::SIGHUP, libc::SIGINT, libc::SIGKILL, libc::SIGSTOP];
    /// The kernel's `struct sigaction`: handler (SIG_DFL is 0), flags, restorer, mask; some machines have no restorer.
    const DEFAULT: [u64; 4] = [0; 4];
    const SIGNALS: libc::c_int = 64;
    for number in (1..=SIGNALS).filter(|number| !KEPT.contains(number)) {
        let nothing = std::ptr::null_mut::<u64>();
        // SAFETY: the kernel reads one of its sigactions from `DEFAULT`, with a mask of 8 bytes, and writes nothing.
        let done = unsafe {
            libc::syscall(libc::SYS_rt_sigaction, number, DEFAULT.as_ptr(), nothing, size_of::<u64>())
        };
        Errno::result(done).map(drop).named(|| format!("rt_sigaction({number})"))?;
    }
    nix::sys::signal::SigSet::empty().thread_set_mask().named(|| "rt_sigprocmask".to_owned())
}

/// Has the program of this command start with no signal blocked, whatever this process blocks for itself.
pub fn unblock_signals(command: &mut std::process::Command) {
    use std::os::unix::process::CommandExt;
    // SAFETY: between fork and exec one call, of sigprocmask(2), which is async-signal-safe; nothing is allocated, as an error
    // is an errno.
    unsafe {
        command.pre_exec(|| nix::sys::signal::SigSet::empty().thread_set_mask().map_err(std::io::Error::from))
    };
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
    fn children_are_found_and_waited_for_with_a_deadline() {
        let mut child = std::process::Command::new("sleep").arg("1000").spawn().unwrap();
        let pid = i32::try_from(child.id()).unwrap();
        let found = children().unwrap().into_iter().find(|process| process.pid == pid).unwrap();
        assert_eq!(found, identify(pid).unwrap());
        let held = Held::open(found).unwrap();
        assert!(!held.wait_until(Instant::now() + Duration::from_millis(5)).unwrap());
        held.kill().unwrap();
        assert!(held.wait_until(Instant::now() + Duration::from_secs(30)).unwrap());
        child.wait().unwrap();
        assert!(!children().unwrap().contains(&found));
    }

    #[test]
    fn what_is_held_is_told_from_what_has_its_pid_now() {
        let mut child = std::process::Command::new("sleep").arg("1000").spawn().unwrap();
        let process = identify(i32::try_from(child.id()).unwrap()).unwrap();
        assert!(Held::open(Process { start_ticks: process.start_ticks + 1, ..process }).is_err());
        let held = Held::open(process).unwrap();
        assert_eq!(held.namespaces(&["net", "pid"]).unwrap().len(), 2);
        child.kill().unwrap();
        // A zombie keeps its pid: nobody else can have it.
        held.still_there().unwrap();
        child.wait().unwrap();
        assert_eq!(held.still_there().unwrap_err().errno, Errno::ESRCH);
        assert_eq!(held.namespaces(&["net"]).unwrap_err().errno, Errno::ESRCH);
    }

    #[test]
    fn a_dead_process_is_not_alive() {
        let mut child = std::process::Command::new("true").spawn().unwrap();
        let process = identify(i32::try_from(child.id()).unwrap()).unwrap();
        child.wait().unwrap();
        assert!(!is_alive(process));
    }
}
