//! A FUSE connection that outlives its server: mounting it, taking it over from a dead predecessor, and putting fuser in
//! front of it. Knows the first bytes of the FUSE protocol (INIT, RESEND) and nothing of files.
//!
//! fuser does its handshake with whatever descriptor it is given, so a connection that is already initialised cannot be
//! given to it. It shakes hands with a socketpair instead, where an INIT of ours lies ready, and afterwards that very
//! descriptor number is made to mean /dev/fuse. Why no fork of fuser, and what this leans on:
//! docs/decisions/0005-fuse-takeover.md.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use fuser::{Config, Filesystem, Session, SessionACL};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::mount::MsFlags;
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType};
use nix::sys::stat::Mode;
use sysbox_sys::SysError;
use sysbox_sys::error::Named;

/// What mountinfo says in its type field; the part after the dot is for people.
pub const FS_TYPE: &str = "fuse.sysbox-fs";
/// Worker threads. Two share one descriptor: cloned descriptors lose requests when their server dies.
const THREADS: usize = 2;

// linux/fuse.h
const INIT: u32 = 26;
const NOTIFY_RESEND: u32 = 7;
const IN_HEADER: usize = 40;
const MAJOR: u32 = 7;
/// The newest protocol whose INIT reply we know to the last field.
const MINOR: u32 = 40;
const MAX_WRITE: u32 = 128 * 1024;
/// FUSE_MIN_READ_BUFFER. [`adopt`] tells by it whether MAX_WRITE is settled.
const LEAST_READ: usize = 8192;
const _: () = assert!(MAX_WRITE as usize > LEAST_READ);
const PAGES_OF_MAX_WRITE: u32 = MAX_WRITE / 4096;

/// What we ask of the kernel, as far as it offers it. FUSE_ALLOW_IDMAP (bit 40) is left out: leaves are owned by host ids,
/// which shows them right inside on every kernel. FUSE_REQUEST_TIMEOUT (bit 42) must never be asked for: it aborts the
/// connection when no server lives for a while.
const FLAGS: u64 = 1 // ASYNC_READ
    | 1 << 3 // ATOMIC_O_TRUNC
    | 1 << 5 // BIG_WRITES
    | 1 << 18 // PARALLEL_DIROPS
    | 1 << 22 // MAX_PAGES
    | 1 << 30 // INIT_EXT
    | 1 << 39; // HAS_RESEND

#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    #[error(transparent)]
    Sys(#[from] SysError),
    #[error("the FUSE connection is dead: it was unmounted or aborted")]
    Dead,
    #[error("the first request of a FUSE connection is opcode {0}, not INIT: this needs Linux 5.3")]
    NotInit(u32),
    #[error("fuser does not start a session: {0}")]
    Fuser(#[source] std::io::Error),
    #[error("fuser answered {0} bytes to our INIT with error {1}")]
    Handshake(usize, i32),
}

type Result<T> = std::result::Result<T, SessionError>;

/// A descriptor of /dev/fuse that has no connection yet.
///
/// # Errors
/// `ENOENT` or `ENODEV` where the kernel has no FUSE.
pub fn open_device() -> Result<OwnedFd> {
    let flags = OFlag::O_RDWR | OFlag::O_CLOEXEC;
    Ok(nix::fcntl::open("/dev/fuse", flags, Mode::empty()).named(|| "open(/dev/fuse)".to_owned())?)
}

/// Mounts the connection of `device`, a new one or (Linux 5.13) once more the one it has.
///
/// # Errors
/// What mount(2) says.
pub fn mount(device: BorrowedFd<'_>, mountpoint: &Path) -> Result<()> {
    use std::os::fd::AsRawFd;
    let options = format!(
        "fd={},rootmode=40000,user_id=0,group_id=0,allow_other,default_permissions",
        device.as_raw_fd()
    );
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    nix::mount::mount(Some("sysbox-fs"), mountpoint, Some(FS_TYPE), flags, Some(options.as_str()))
        .named(|| format!("mount(sysbox-fs, {}, {FS_TYPE})", mountpoint.display()))?;
    Ok(())
}

/// What taking over could and could not do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Requests {
    /// Requests the dead server had read come again (Linux 6.9).
    Resent,
    /// This kernel has no RESEND: what the dead server had read is for [`release_lost`].
    Lost,
}

/// Every start: makes sure that INIT is answered, whatever the previous server did or did not do. The previous server must
/// be dead, or it may still swallow a request.
///
/// # Errors
/// `Dead` for a connection that has ended, or that never began and cannot begin any more.
pub fn adopt(device: BorrowedFd<'_>) -> Result<Requests> {
    // An INIT that was read and not answered comes again.
    let requests = resend(device)?;
    let flags = fcntl(device, FcntlArg::F_GETFL).named(|| "fcntl(/dev/fuse, F_GETFL)".to_owned())?;
    let flags = OFlag::from_bits_retain(flags);
    let set =
        |flags| fcntl(device, FcntlArg::F_SETFL(flags)).named(|| "fcntl(/dev/fuse, F_SETFL)".to_owned());
    set(flags | OFlag::O_NONBLOCK)?;
    // Linux 5.3 refuses a buffer that is too small for max_write before it looks for a request. So this read takes a request
    // from the queue only if max_write is not settled yet, and then that request is INIT.
    let mut buffer = [0; LEAST_READ];
    let read = nix::unistd::read(device, &mut buffer);
    set(flags)?;
    match read {
        Err(Errno::EINVAL) => Ok(requests),
        Ok(length) => match word(&buffer[..length], 4) {
            Some(INIT) => answer(device, &init_reply(&buffer[..length])).map(|()| requests),
            other => Err(SessionError::NotInit(other.unwrap_or_default())),
        },
        // EAGAIN: INIT was read, not answered, and does not come again. ENODEV: ended. EPERM: never mounted.
        Err(Errno::EAGAIN | Errno::ENODEV | Errno::EPERM) => Err(SessionError::Dead),
        Err(errno) => Err(SysError::new(errno, "read(/dev/fuse)").into()),
    }
}

/// Where requests do not come again: tells the callers of those which the dead server had read to try again (EINTR), so
/// that they do not hang for ever. `first` is the number of the first request that this server has read; numbers grow with
/// the queue, and a server has few requests in hand.
///
/// # Errors
/// The device not taking it.
pub fn release_lost(device: BorrowedFd<'_>, first: u64) -> Result<usize> {
    const STEP: u64 = 2; // FUSE_REQ_ID_STEP
    const MOST: u64 = 4096;
    let mut released = 0;
    for back in 1..=MOST {
        // 0 is no request: it would be a notification.
        let Some(unique) = first.checked_sub(back * STEP).filter(|unique| *unique > 0) else { break };
        match nix::unistd::write(device, &error_reply(unique, libc::EINTR)) {
            Ok(_) => released += 1,
            // Answered long ago.
            Err(Errno::ENOENT) => {}
            Err(errno) => return Err(SysError::new(errno, "write(/dev/fuse)").into()),
        }
    }
    Ok(released)
}

/// FUSE_NOTIFY_RESEND: every request that was read and not answered is queued again.
///
/// # Errors
/// The device not taking it for another reason than not knowing it.
pub fn resend(device: BorrowedFd<'_>) -> Result<Requests> {
    match nix::unistd::write(device, &words(&[16, NOTIFY_RESEND, 0, 0])) {
        Ok(_) => Ok(Requests::Resent),
        Err(Errno::EINVAL) => Ok(Requests::Lost),
        // ENODEV: ended. EPERM: never mounted.
        Err(Errno::ENODEV | Errno::EPERM) => Err(SessionError::Dead),
        Err(errno) => Err(SysError::new(errno, "write(/dev/fuse, RESEND)").into()),
    }
}

/// A fuser session over an adopted connection. Nothing is unmounted when it ends. Follow with [`resend`] after a takeover.
///
/// # Errors
/// A fuser that does not shake hands as 0.18.0 does.
pub fn session<F: Filesystem>(files: F, device: BorrowedFd<'_>) -> Result<Session<F>> {
    let (ours, theirs) =
        nix::sys::socket::socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)
            .named(|| "socketpair".to_owned())?;
    nix::unistd::write(&ours, &init_request()).named(|| "write(socketpair, INIT)".to_owned())?;

    let mut config = Config::default();
    config.n_threads = Some(THREADS);
    config.acl = SessionACL::All;
    let session = Session::from_fd(files, theirs, SessionACL::All, config).map_err(SessionError::Fuser)?;

    // A later fuser that answers in another way must not hang us.
    let mut reply = [0; 256];
    let length =
        nix::sys::socket::recv(std::os::fd::AsRawFd::as_raw_fd(&ours), &mut reply, MsgFlags::MSG_DONTWAIT)
            .named(|| "recv(socketpair)".to_owned())?;
    match word(&reply[..length], 4) {
        Some(0) if length >= 16 => {}
        other => return Err(SessionError::Handshake(length, other.unwrap_or_default() as i32)),
    }
    sysbox_sys::fuse::dup3_over(device, session.as_fd())?;
    Ok(session)
}

fn answer(device: BorrowedFd<'_>, reply: &[u8]) -> Result<()> {
    match nix::unistd::write(device, reply) {
        // ENOENT: the caller is gone.
        Ok(_) | Err(Errno::ENOENT) => Ok(()),
        Err(errno) => Err(SysError::new(errno, "write(/dev/fuse)").into()),
    }
}

/// fuse_out_header and fuse_init_out, for a fuse_in_header and fuse_init_in.
fn init_reply(request: &[u8]) -> Vec<u8> {
    let of = |offset| word(request, offset).unwrap_or_default();
    // Before Linux 5.17 fuse_init_in ends with `flags`.
    let offered = u64::from(of(IN_HEADER + 12)) | u64::from(of(IN_HEADER + 16)) << 32;
    let flags = FLAGS & offered;
    let background = 48 << 16 | 64; // congestion_threshold, max_background
    let mut reply = words(&[
        80,
        0,
        of(8),
        of(12),
        MAJOR,
        MINOR.min(of(IN_HEADER + 4)),
        of(IN_HEADER + 8), // max_readahead
        flags as u32,
        background,
        MAX_WRITE,
        1, // time_gran
        PAGES_OF_MAX_WRITE,
        (flags >> 32) as u32,
    ]);
    reply.resize(80, 0);
    reply
}

fn error_reply(unique: u64, errno: i32) -> Vec<u8> {
    let mut reply = words(&[16, (-errno) as u32]);
    reply.extend(unique.to_ne_bytes());
    reply
}

/// The INIT that fuser gets to read: of a kernel that offers nothing, as fuser's answer goes nowhere.
fn init_request() -> Vec<u8> {
    let mut request = words(&[104, INIT, 2, 0, 0, 0, 0, 0, 0, 0, MAJOR, MINOR, MAX_WRITE, 0]);
    request.resize(104, 0);
    request
}

fn word(bytes: &[u8], offset: usize) -> Option<u32> {
    let found = bytes.get(offset..offset + 4)?;
    found.try_into().ok().map(u32::from_ne_bytes)
}

fn words(values: &[u32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_ne_bytes()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Nothing;
    impl Filesystem for Nothing {}

    /// The trick itself, without a kernel: fuser 0.18.0 accepts the INIT that lies ready and then reads from what its
    /// descriptor number means.
    #[test]
    fn fuser_shakes_hands_with_a_socketpair_and_reads_from_the_device_afterwards() {
        let (device, kernel) = nix::sys::socket::socketpair(
            AddressFamily::Unix,
            SockType::SeqPacket,
            None,
            SockFlag::SOCK_CLOEXEC,
        )
        .unwrap();
        let session = session(Nothing, device.as_fd()).unwrap();
        nix::unistd::write(&kernel, b"seen").unwrap();
        let mut seen = [0; 8];
        assert_eq!(nix::unistd::read(session.as_fd(), &mut seen), Ok(4));
        assert_eq!(&seen[..4], b"seen");
    }

    #[test]
    fn init_is_answered_with_what_the_kernel_offers_and_we_want() {
        let mut request = words(&[104, INIT, 77, 1, 0, 0, 0, 0, 0, 0, 7, 45, 131_072, u32::MAX, u32::MAX]);
        request.resize(104, 0);
        let reply = init_reply(&request);
        let field = |at: usize| word(&reply, at * 4).unwrap();
        assert_eq!(reply.len(), 80);
        assert_eq!([field(0), field(1), field(2), field(3)], [80, 0, 77, 1]);
        assert_eq!([field(4), field(5), field(6)], [7, 40, 131_072]);
        assert_eq!(u64::from(field(7)) | u64::from(field(12)) << 32, FLAGS);
        assert_eq!(u64::from(field(12)) << 32 & 1 << 42, 0, "a request timeout kills the connection");

        // Linux 5.10: no flags2.
        let old = words(&[56, INIT, 2, 0, 0, 0, 0, 0, 0, 0, 7, 31, 131_072, 1 << 3]);
        let reply = init_reply(&old);
        assert_eq!([word(&reply, 20), word(&reply, 28), word(&reply, 48)], [Some(31), Some(1 << 3), Some(0)]);
    }

    #[test]
    fn a_device_without_a_connection_is_dead() {
        let device = match open_device() {
            Ok(device) => device,
            Err(error) => panic!("this test needs root and /dev/fuse: {error}"),
        };
        assert!(matches!(adopt(device.as_fd()), Err(SessionError::Dead)));
    }
}
