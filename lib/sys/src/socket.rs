//! The socket the programs talk over: SOCK_SEQPACKET, one JSON document a datagram, descriptors by SCM_RIGHTS
//! (unix(7)). Knows nothing of what the documents mean.
//!
//! Only root may speak: the peer's credentials are asked of the kernel (SO_PEERCRED), not of the peer.

use std::io::{IoSlice, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::path::Path;
use std::time::Duration;

use nix::cmsg_space;
use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, Backlog, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, UnixAddr,
    accept4, bind, connect, getsockopt, listen, recvmsg, sendmsg, setsockopt, socket, sockopt,
};
use nix::sys::time::TimeVal;
use serde::Serialize;
use serde::de::DeserializeOwned;
use sysbox_ipc::MAX_MESSAGE;

use crate::error::{Named, Result, SysError};

/// Most descriptors in one message, either way.
pub const MAX_FDS: usize = 8;

/// Why talking to a daemon failed.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    #[error(transparent)]
    Sys(#[from] SysError),
    #[error("the peer is uid {uid}, not root")]
    NotRoot { uid: u32 },
    #[error("a message of {bytes} bytes is over the limit of {MAX_MESSAGE}")]
    TooLong { bytes: usize },
    #[error("malformed message: {0}")]
    Malformed(#[source] serde_json::Error),
    #[error("the peer closed the connection in the middle of a conversation")]
    Closed,
    #[error("no answer within {0:?}")]
    TimedOut(Duration),
}

#[derive(Debug)]
pub struct Listener {
    fd: OwnedFd,
}

impl Listener {
    /// Listens at `path`, mode 0600, in place of whatever socket is there: who may do so is settled by the daemon's lock
    /// before.
    ///
    /// # Errors
    /// The system call that failed.
    pub fn bind(path: &Path) -> Result<Self> {
        let shown = || format!("bind({})", path.display());
        match std::fs::remove_file(path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(SysError::from_io(&error, format!("unlink({})", path.display())));
            }
            _ => {}
        }
        let fd =
            socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None).named(shown)?;
        let address = UnixAddr::new(path).named(shown)?;
        // No other thread creates files yet when a daemon binds; the mode must be right from the first moment.
        let old = nix::sys::stat::umask(nix::sys::stat::Mode::from_bits_truncate(0o177));
        let bound = bind(fd.as_raw_fd(), &address).named(shown);
        nix::sys::stat::umask(old);
        bound?;
        listen(&fd, Backlog::MAXCONN).named(|| format!("listen({})", path.display()))?;
        Ok(Self { fd })
    }

    /// Waits for the next peer. A peer that is not root is refused and the next one awaited.
    ///
    /// # Errors
    /// `accept4` failing for another reason than a signal or a peer gone by.
    pub fn accept(&self) -> std::result::Result<Connection, SocketError> {
        loop {
            let raw = match accept4(self.fd.as_raw_fd(), SockFlag::SOCK_CLOEXEC) {
                Ok(raw) => raw,
                Err(Errno::EINTR | Errno::ECONNABORTED) => continue,
                Err(errno) => return Err(SysError::new(errno, "accept4").into()),
            };
            // SAFETY: accept4 returned this descriptor just now and nothing else knows it.
            let connection = Connection { fd: unsafe { OwnedFd::from_raw_fd(raw) } };
            match connection.require_root() {
                Ok(()) => return Ok(connection),
                Err(_) => continue,
            }
        }
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// One side of a conversation.
#[derive(Debug)]
pub struct Connection {
    fd: OwnedFd,
}

impl Connection {
    /// # Errors
    /// `connect` failing (`ENOENT`, `ECONNREFUSED`: no daemon), or a peer that is not root.
    pub fn connect(path: &Path) -> std::result::Result<Self, SocketError> {
        let shown = || format!("connect({})", path.display());
        let fd =
            socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None).named(shown)?;
        let address = UnixAddr::new(path).named(shown)?;
        connect(fd.as_raw_fd(), &address).named(shown)?;
        let connection = Self { fd };
        connection.require_root()?;
        Ok(connection)
    }

    /// Bounds every later `recv` and `send`; without it they wait for ever.
    ///
    /// # Errors
    /// `setsockopt` failing.
    pub fn set_timeout(&self, limit: Duration) -> Result<()> {
        let value =
            TimeVal::new(limit.as_secs().try_into().unwrap_or(i64::MAX), limit.subsec_micros().into());
        setsockopt(&self.fd, sockopt::ReceiveTimeout, &value)
            .named(|| "setsockopt(SO_RCVTIMEO)".to_owned())?;
        setsockopt(&self.fd, sockopt::SendTimeout, &value).named(|| "setsockopt(SO_SNDTIMEO)".to_owned())
    }

    /// The peer's pid, in this process's pid namespace, at the time of its connect.
    ///
    /// # Errors
    /// `getsockopt` failing.
    pub fn peer_pid(&self) -> Result<i32> {
        let credentials =
            getsockopt(&self.fd, sockopt::PeerCredentials).named(|| "getsockopt(SO_PEERCRED)".to_owned())?;
        Ok(credentials.pid())
    }

    fn require_root(&self) -> std::result::Result<(), SocketError> {
        let credentials =
            getsockopt(&self.fd, sockopt::PeerCredentials).named(|| "getsockopt(SO_PEERCRED)".to_owned())?;
        if credentials.uid() == 0 { Ok(()) } else { Err(SocketError::NotRoot { uid: credentials.uid() }) }
    }

    /// Sends one message, with descriptors.
    ///
    /// # Errors
    /// A message over the limit, or `sendmsg` failing (`EPIPE`: the peer is gone).
    pub fn send<T: Serialize>(
        &self,
        message: &T,
        fds: &[BorrowedFd<'_>],
    ) -> std::result::Result<(), SocketError> {
        let bytes = serde_json::to_vec(message).map_err(SocketError::Malformed)?;
        if bytes.len() > MAX_MESSAGE {
            return Err(SocketError::TooLong { bytes: bytes.len() });
        }
        let raw: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
        let rights = [ControlMessage::ScmRights(&raw)];
        let control: &[ControlMessage<'_>] = if raw.is_empty() { &[] } else { &rights };
        loop {
            match sendmsg::<()>(
                self.fd.as_raw_fd(),
                &[IoSlice::new(&bytes)],
                control,
                MsgFlags::MSG_NOSIGNAL,
                None,
            ) {
                Ok(_) => return Ok(()),
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(SysError::new(errno, "sendmsg").into()),
            }
        }
    }

    /// Receives one message; `None` when the peer closed its side.
    ///
    /// # Errors
    /// A datagram that is cut off or not what `T` expects, `recvmsg` failing, or the time limit.
    pub fn recv<T: DeserializeOwned>(&self) -> std::result::Result<Option<(T, Vec<OwnedFd>)>, SocketError> {
        let mut buffer = vec![0u8; MAX_MESSAGE];
        let mut space = cmsg_space!([RawFd; MAX_FDS]);
        let (length, fds, cut) = loop {
            let mut parts = [IoSliceMut::new(&mut buffer)];
            match recvmsg::<()>(self.fd.as_raw_fd(), &mut parts, Some(&mut space), MsgFlags::MSG_CMSG_CLOEXEC)
            {
                Ok(received) => {
                    let mut fds = Vec::new();
                    let control = received.cmsgs().named(|| "recvmsg control data".to_owned())?;
                    for message in control {
                        if let ControlMessageOwned::ScmRights(raw) = message {
                            for fd in raw {
                                // SAFETY: the kernel installed this descriptor for us in this very recvmsg.
                                fds.push(unsafe { OwnedFd::from_raw_fd(fd) });
                            }
                        }
                    }
                    let cut = received.flags.intersects(MsgFlags::MSG_TRUNC | MsgFlags::MSG_CTRUNC);
                    break (received.bytes, fds, cut);
                }
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => {
                    let limit = getsockopt(&self.fd, sockopt::ReceiveTimeout)
                        .named(|| "getsockopt(SO_RCVTIMEO)".to_owned())?;
                    let seconds = u64::try_from(limit.tv_sec()).unwrap_or_default();
                    return Err(SocketError::TimedOut(Duration::from_secs(seconds)));
                }
                Err(errno) => return Err(SysError::new(errno, "recvmsg").into()),
            }
        };
        if length == 0 {
            return Ok(None);
        }
        if cut {
            return Err(SocketError::TooLong { bytes: MAX_MESSAGE + 1 });
        }
        let message = serde_json::from_slice(&buffer[..length]).map_err(SocketError::Malformed)?;
        Ok(Some((message, fds)))
    }

    /// Sends a request and waits for its reply.
    ///
    /// # Errors
    /// As `send` and `recv`; `Closed` if the peer went away instead of answering.
    pub fn call<Q: Serialize, A: DeserializeOwned>(
        &self,
        request: &Q,
        fds: &[BorrowedFd<'_>],
    ) -> std::result::Result<(A, Vec<OwnedFd>), SocketError> {
        self.send(request, fds)?;
        self.recv()?.ok_or(SocketError::Closed)
    }
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Sends bytes and a descriptor over a stream socket.
///
/// # Errors
/// `sendmsg` failing (`EPIPE`: the peer is gone), or not taking all at once.
pub fn send_descriptor(stream: BorrowedFd<'_>, bytes: &[u8], fd: BorrowedFd<'_>) -> Result<()> {
    let raw = [fd.as_raw_fd()];
    let rights = [ControlMessage::ScmRights(&raw)];
    let parts = [IoSlice::new(bytes)];
    let sent = loop {
        match sendmsg::<()>(stream.as_raw_fd(), &parts, &rights, MsgFlags::MSG_NOSIGNAL, None) {
            Err(Errno::EINTR) => {}
            other => break other.named(|| "sendmsg".to_owned())?,
        }
    };
    if sent == bytes.len() { Ok(()) } else { Err(SysError::new(Errno::EMSGSIZE, "sendmsg")) }
}

/// Receives the descriptor that [`send_descriptor`] sent, with one byte.
///
/// # Errors
/// `recvmsg` failing, the peer being gone (`ECONNRESET`), or a message without a descriptor (`EBADMSG`).
pub fn receive_descriptor(stream: BorrowedFd<'_>) -> Result<OwnedFd> {
    let mut byte = [0u8];
    let mut space = cmsg_space!(RawFd);
    let mut parts = [IoSliceMut::new(&mut byte)];
    let flags = MsgFlags::MSG_CMSG_CLOEXEC;
    let received = loop {
        // With a time limit on the socket, a stop and a SIGCONT are enough for this (signal(7)).
        match recvmsg::<()>(stream.as_raw_fd(), &mut parts, Some(&mut space), flags) {
            Err(Errno::EINTR) => {}
            other => break other.named(|| "recvmsg".to_owned())?,
        }
    };
    for message in received.cmsgs().named(|| "recvmsg control data".to_owned())? {
        if let ControlMessageOwned::ScmRights(raw) = message
            && let [fd] = raw[..]
        {
            return Ok(adopt(fd));
        }
    }
    let errno = if received.bytes == 0 { Errno::ECONNRESET } else { Errno::EBADMSG };
    Err(SysError::new(errno, "receive a descriptor"))
}

/// Owns a descriptor that has just been received (SCM_RIGHTS) and is known to nobody else yet.
pub fn adopt(received: RawFd) -> OwnedFd {
    // SAFETY: the kernel installed it for this process in a recvmsg whose result the caller hands over here.
    unsafe { OwnedFd::from_raw_fd(received) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::io::{Read, Seek, Write};
    use std::thread;

    #[test]
    fn a_message_arrives_whole_with_its_descriptor() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let listener = Listener::bind(&path).unwrap();
        let server = thread::spawn(move || {
            let peer = listener.accept().unwrap();
            let (text, fds): (String, _) = peer.recv().unwrap().unwrap();
            let mut file = File::from(fds.into_iter().next().unwrap());
            file.rewind().unwrap();
            let mut read = String::new();
            file.read_to_string(&mut read).unwrap();
            peer.send(&format!("{text}+{read}"), &[]).unwrap();
            assert!(peer.recv::<String>().unwrap().is_none());
        });
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"inside").unwrap();
        let client = Connection::connect(&path).unwrap();
        let (answer, _): (String, _) = client.call(&"hello", &[file.as_fd()]).unwrap();
        assert_eq!(answer, "hello+inside");
        drop(client);
        server.join().unwrap();
    }

    #[test]
    fn a_message_over_the_limit_is_refused_by_the_sender() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let _listener = Listener::bind(&path).unwrap();
        let client = Connection::connect(&path).unwrap();
        let refused = client.send(&"x".repeat(MAX_MESSAGE), &[]).unwrap_err();
        assert!(matches!(refused, SocketError::TooLong { bytes } if bytes == MAX_MESSAGE + 2));
    }

    #[test]
    fn silence_ends_at_the_limit() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let _listener = Listener::bind(&path).unwrap();
        let client = Connection::connect(&path).unwrap();
        client.set_timeout(Duration::from_millis(20)).unwrap();
        assert!(matches!(client.recv::<String>(), Err(SocketError::TimedOut(_))));
    }

    #[test]
    fn a_signal_does_not_end_the_wait_for_a_descriptor() {
        use std::sync::atomic::{AtomicBool, Ordering};
        static HANDLED: AtomicBool = AtomicBool::new(false);
        extern "C" fn note(_: i32) {
            HANDLED.store(true, Ordering::SeqCst);
        }
        use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};
        let action = SigAction::new(SigHandler::Handler(note), SaFlags::empty(), SigSet::empty());
        // SAFETY: the handler stores a number and nothing else; nobody else here uses this signal.
        unsafe { sigaction(Signal::SIGUSR2, &action) }.unwrap();
        let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
        // As the runtime waits; with a limit the kernel starts no such call again.
        ours.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        let (tell, told) = std::sync::mpsc::channel();
        let waiting = thread::spawn(move || {
            tell.send(nix::unistd::gettid().as_raw()).unwrap();
            receive_descriptor(ours.as_fd())
        });
        let thread = told.recv().unwrap();
        let sleeps = || {
            let line = std::fs::read_to_string(format!("/proc/self/task/{thread}/syscall")).unwrap();
            line.split(' ').next() == Some(&libc::SYS_recvmsg.to_string())
        };
        while !sleeps() {
            thread::yield_now();
        }
        // SAFETY: three integers.
        unsafe { libc::syscall(libc::SYS_tgkill, std::process::id(), thread, libc::SIGUSR2) };
        while !HANDLED.load(Ordering::SeqCst) && !waiting.is_finished() {
            thread::yield_now();
        }
        // Where the wait had ended, nobody is there to send to; that is told below.
        let _sent = send_descriptor(theirs.as_fd(), &[1], File::open("/dev/null").unwrap().as_fd());
        waiting.join().unwrap().unwrap();
    }
}
