//! One file a command. Each takes what it needs and returns an error that says what was attempted; `main` tells it.

pub mod create;
pub mod delete;
pub mod events;
pub mod exec;
pub mod features;
pub mod kill;
pub mod list;
pub mod pause;
pub mod ps;
pub mod run;
pub mod spec;
pub mod start;
pub mod state;
pub mod update;

use std::path::Path;

use anyhow::{Context, Result};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use sysbox_ipc::ContainerId;
use sysbox_ipc::mgr::Process;

use crate::cli::Global;
use crate::log::Log;
use crate::state::Home;

/// What every command gets.
#[derive(Debug)]
pub struct Call<'a> {
    pub global: &'a Global,
    pub log: &'a Log,
}

impl Call<'_> {
    /// The container that an argument names.
    ///
    /// # Errors
    /// An id that no container can have.
    pub fn home(&self, id: &str) -> Result<Home> {
        let root = &self.global.root;
        if id.is_empty() {
            anyhow::bail!("container id cannot be empty");
        }
        if root.starts_with("/dev") {
            // A create lays the container's devices over /dev in its own namespace.
            anyhow::bail!("--root: {} must not be below /dev", root.display());
        }
        let id = ContainerId::parse(id).map_err(|_| anyhow::anyhow!("invalid container ID format"))?;
        Ok(Home::of(root, id))
    }
}

/// Writes a pid file whole or not at all: the reader polls for it.
fn write_pid_file(path: &Path, pid: i32) -> Result<()> {
    let name = path.file_name().context("--pid-file: not a file name")?.to_string_lossy().into_owned();
    let new = path.with_file_name(format!(".{name}.new"));
    let write = std::fs::write(&new, pid.to_string()).and_then(|()| std::fs::rename(&new, path));
    write.with_context(|| format!("write pid file {}", path.display()))
}

/// # Errors
/// A terminal that nobody would take, or a taker without a terminal.
pub fn require_terminal_fits(terminal: bool, detach: bool, console_socket: bool) -> Result<()> {
    if detach && terminal && !console_socket {
        anyhow::bail!("cannot allocate tty if runc will detach without setting console socket");
    }
    if (!detach || !terminal) && console_socket {
        anyhow::bail!("cannot use console socket if runc will not detach or allocate tty");
    }
    Ok(())
}

/// The descriptors that are to be passed on must be the caller's: what this process opened itself is closed by exec.
///
/// # Errors
/// One that is not there.
pub fn require_preserved(listen_fds: i32, count: i32) -> Result<()> {
    const FIRST: i32 = 3;
    for n in 0..count {
        let fd = FIRST.saturating_add(listen_fds).saturating_add(n);
        let facts = std::fs::read_to_string(format!("/proc/self/fdinfo/{fd}")).unwrap_or_default();
        let flags =
            facts.lines().find_map(|line| i32::from_str_radix(line.strip_prefix("flags:")?.trim(), 8).ok());
        if flags.is_none_or(|flags| flags & libc::O_CLOEXEC != 0) {
            anyhow::bail!("unable to stat preserved-fd {n} (of {count}): no such file or directory");
        }
    }
    Ok(())
}

/// Sends a pidfd of a container's process to who listens there, with the word by which runc says what kind of process it is.
///
/// # Errors
/// Nobody listening, or the process having ended.
pub fn send_pidfd(socket: &Path, kind: &str, process: Process) -> Result<()> {
    let shown = || format!("--pidfd-socket {}", socket.display());
    let peer = std::os::unix::net::UnixStream::connect(socket).with_context(shown)?;
    let pidfd = sysbox_sys::process::pidfd_open(process)?;
    let fds = [std::os::fd::AsRawFd::as_raw_fd(&pidfd)];
    let rights = [ControlMessage::ScmRights(&fds)];
    let name = [std::io::IoSlice::new(kind.as_bytes())];
    sendmsg::<()>(std::os::fd::AsRawFd::as_raw_fd(&peer), &name, &rights, MsgFlags::empty(), None)
        .map(|_| ())
        .with_context(shown)
}
