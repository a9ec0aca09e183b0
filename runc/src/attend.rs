//! Staying with a container's process in the foreground: hands on signals and terminal, and its exit code at the end.

use std::io::{IoSliceMut, Read, Write};
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
use nix::sys::termios::{SetArg, Termios, cfmakeraw, tcgetattr, tcsetattr};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use sysbox_ipc::mgr::Process;

/// Signals caught before there is anyone to hand them to.
#[derive(Debug)]
pub struct Attendance {
    signals: SignalFd,
}

impl Attendance {
    /// Blocks all signals for this process and reads them from a descriptor. A container's process starts with none blocked
    /// (`init.rs`).
    ///
    /// # Errors
    /// `signalfd` failing.
    pub fn prepare() -> Result<Self> {
        let mut all = SigSet::all();
        // What the kernel raises against ourselves must not be put off.
        for own in [
            Signal::SIGSEGV,
            Signal::SIGBUS,
            Signal::SIGFPE,
            Signal::SIGILL,
            Signal::SIGABRT,
            Signal::SIGTRAP,
        ] {
            all.remove(own);
        }
        all.thread_block().context("block signals")?;
        let signals =
            SignalFd::with_flags(&all, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK).context("signalfd")?;
        Ok(Self { signals })
    }

    /// Waits for the end of `process`, a child of this one, and returns its exit code: 128 + N for signal N.
    ///
    /// # Errors
    /// The terminal not arriving, or waiting failing.
    pub fn until_end(self, process: Process, terminal: Option<Terminal>) -> Result<i32> {
        let mut session = terminal.map(Terminal::accept).transpose()?;
        loop {
            let mut wanted = vec![PollFd::new(self.signals.as_fd(), PollFlags::POLLIN)];
            if let Some(session) = &session {
                wanted.extend(session.polled());
            }
            match poll(&mut wanted, PollTimeout::NONE) {
                Ok(_) | Err(Errno::EINTR) => {}
                Err(errno) => bail!("poll: {}", errno.desc()),
            }
            let ready = |fd: &PollFd<'_>| fd.any().unwrap_or(false);
            let (signalled, master, stdin) =
                (ready(&wanted[0]), wanted.get(1).is_some_and(ready), wanted.get(2).is_some_and(ready));
            drop(wanted);
            if let Some(session) = &mut session {
                session.copy(master, stdin);
            }
            if !signalled {
                continue;
            }
            while let Some(info) = self.signals.read_signal().context("read signals")? {
                let number = i32::try_from(info.ssi_signo).unwrap_or_default();
                if number == libc::SIGCHLD {
                    if let Some(code) = reap(Pid::from_raw(process.pid))? {
                        if let Some(session) = &mut session {
                            session.drain();
                        }
                        return Ok(code);
                    }
                } else if number == libc::SIGWINCH {
                    if let Some(session) = &session {
                        session.resize();
                    }
                } else if number != libc::SIGURG {
                    hand_on(process, number);
                }
            }
        }
    }
}

fn hand_on(process: Process, number: i32) {
    let sent = sysbox_sys::process::pidfd_open(process)
        .and_then(|pidfd| sysbox_sys::process::pidfd_send_signal(&pidfd, number));
    if let Err(error) = sent {
        // It has ended; SIGCHLD will say so.
        tracing::debug!(%error, number, "signal not handed on");
    }
}

/// Collects children; the exit code once it is `awaited` that ended.
fn reap(awaited: Pid) -> Result<Option<i32>> {
    loop {
        match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
            Ok(WaitStatus::Exited(pid, code)) if pid == awaited => return Ok(Some(code)),
            Ok(WaitStatus::Signaled(pid, signal, _)) if pid == awaited => {
                return Ok(Some(128 + signal as i32));
            }
            Ok(WaitStatus::StillAlive) | Err(Errno::ECHILD) => return Ok(None),
            Ok(_) | Err(Errno::EINTR) => {}
            Err(errno) => bail!("waitpid: {}", errno.desc()),
        }
    }
}

/// A console socket of our own, for a container that wants a terminal and a caller that has one.
#[derive(Debug)]
pub struct Terminal {
    listener: UnixListener,
    dir: PathBuf,
    path: PathBuf,
}

impl Terminal {
    /// # Errors
    /// No place for the socket.
    pub fn listen() -> Result<Self> {
        let dir = std::env::temp_dir().join(format!("sysbox-console-{}", std::process::id()));
        let made =
            std::os::unix::fs::DirBuilderExt::mode(&mut std::fs::DirBuilder::new(), 0o700).create(&dir);
        made.with_context(|| format!("mkdir {}", dir.display()))?;
        let path = dir.join("socket");
        let listener = UnixListener::bind(&path).with_context(|| format!("bind {}", path.display()))?;
        Ok(Self { listener, dir, path })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Takes the terminal's master from the container's init and puts our own terminal into raw mode.
    fn accept(self) -> Result<Session> {
        let (peer, _) = self.listener.accept().context("accept the console")?;
        let mut name = [0u8; 4096];
        let mut space = nix::cmsg_space!([RawFd; 1]);
        let mut parts = [IoSliceMut::new(&mut name)];
        let received =
            recvmsg::<()>(peer.as_raw_fd(), &mut parts, Some(&mut space), MsgFlags::MSG_CMSG_CLOEXEC);
        let received = received.context("receive the console")?;
        let master = received.cmsgs().context("receive the console")?.find_map(|message| match message {
            ControlMessageOwned::ScmRights(fds) => fds.first().copied(),
            _ => None,
        });
        let master = sysbox_sys::socket::adopt(master.context("the console came without a descriptor")?);
        let saved = tcgetattr(std::io::stdin()).ok();
        if let Some(saved) = &saved {
            let mut raw = saved.clone();
            cfmakeraw(&mut raw);
            tcsetattr(std::io::stdin(), SetArg::TCSANOW, &raw).context("raw mode")?;
        }
        let session = Session { master: master.into(), saved, stdin: std::io::stdin(), stdin_open: true };
        session.resize();
        Ok(session)
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        // Ours alone, in a directory of our own; a leftover in /tmp is not worth an error after a container's end.
        let _gone = std::fs::remove_dir_all(&self.dir);
    }
}

/// Our terminal and the container's, joined.
#[derive(Debug)]
struct Session {
    master: std::fs::File,
    saved: Option<Termios>,
    stdin: std::io::Stdin,
    stdin_open: bool,
}

impl Session {
    fn polled(&self) -> Vec<PollFd<'_>> {
        let mut wanted = vec![PollFd::new(self.master.as_fd(), PollFlags::POLLIN)];
        if self.stdin_open {
            wanted.push(PollFd::new(self.stdin.as_fd(), PollFlags::POLLIN));
        }
        wanted
    }

    fn copy(&mut self, master: bool, stdin: bool) {
        let mut buffer = [0u8; 16 * 1024];
        if master && let Ok(length @ 1..) = self.master.read(&mut buffer) {
            let mut out = std::io::stdout().lock();
            // Nobody reads what we write: the container goes on all the same.
            let _closed = out.write_all(&buffer[..length]).and_then(|()| out.flush());
        }
        if stdin {
            match std::io::stdin().lock().read(&mut buffer) {
                Ok(length @ 1..) => {
                    let _closed = self.master.write_all(&buffer[..length]);
                }
                Ok(0) => {
                    // End of input on a terminal is a character.
                    let _closed = self.master.write_all(&[4]);
                    self.stdin_open = false;
                }
                Err(_) => {}
            }
        }
    }

    /// What the program wrote last, before its end.
    fn drain(&mut self) {
        loop {
            let mut wanted = [PollFd::new(self.master.as_fd(), PollFlags::POLLIN)];
            let ready = poll(&mut wanted, PollTimeout::ZERO).is_ok_and(|count| count > 0);
            let readable = wanted[0].revents().is_some_and(|events| events.contains(PollFlags::POLLIN));
            if !ready || !readable {
                return;
            }
            self.copy(true, false);
        }
    }

    fn resize(&self) {
        sysbox_sys::terminal::copy_size(self.stdin.as_fd(), self.master.as_fd());
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        if let Some(saved) = &self.saved {
            let _gone = tcsetattr(std::io::stdin(), SetArg::TCSANOW, saved);
        }
    }
}
