//! sysbox-mgr as sysbox-fs needs it: the vault that keeps the FUSE connection alive while no sysbox-fs is, and the records
//! from which the containers are known again.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout};
use sysbox_ipc::mgr::{self, Record, Reply, Request};
use sysbox_ipc::{Hello, PROTOCOL_VERSION, Refusal, RefusalKind};
use sysbox_sys::SysError;
use sysbox_sys::error::Named;
use sysbox_sys::socket::{Connection, SocketError};

/// For one answer.
const PATIENCE: Duration = Duration::from_secs(10);
/// Between attempts to reach a manager that is away.
const PAUSES: [Duration; 4] = [
    Duration::from_millis(50),
    Duration::from_millis(200),
    Duration::from_millis(500),
    Duration::from_secs(2),
];

#[derive(Debug, thiserror::Error)]
pub enum KeeperError {
    #[error("sysbox-mgr does not answer at {}: {source}", socket.display())]
    Away { socket: PathBuf, source: SocketError },
    #[error("sysbox-mgr, {what}: {source}")]
    Broken { what: &'static str, source: SocketError },
    #[error("sysbox-mgr refuses {what}: {refusal}")]
    Refused { what: &'static str, refusal: Refusal },
    #[error("sysbox-mgr speaks protocol version {theirs}, this is version {PROTOCOL_VERSION}")]
    Version { theirs: u32 },
    #[error("sysbox-mgr, {what}: an answer to another question")]
    Confused { what: &'static str },
    #[error(transparent)]
    Sys(#[from] SysError),
}

type Result<T> = std::result::Result<T, KeeperError>;

/// Where the manager is, and under which name it keeps our connection.
#[derive(Debug, Clone)]
pub struct Keeper {
    socket: PathBuf,
    name: String,
}

/// A conversation with the manager.
#[derive(Debug)]
pub struct Link {
    connection: Connection,
    name: String,
}

impl Keeper {
    pub fn new(run_dir: &Path, mountpoint: &Path) -> Self {
        Self { socket: run_dir.join(mgr::SOCKET), name: format!("fuse:{}", mountpoint.display()) }
    }

    /// # Errors
    /// `Away` if nobody listens; `Version` for another release's manager.
    pub fn connect(&self) -> Result<Link> {
        let away = |source| KeeperError::Away { socket: self.socket.clone(), source };
        let connection = Connection::connect(&self.socket).map_err(away)?;
        connection.set_timeout(PATIENCE)?;
        let link = Link { connection, name: self.name.clone() };
        match link.call("hello", &Request::Hello(Hello::from_program("sysbox-fs")), &[])? {
            (Reply::Hello(Hello { version: PROTOCOL_VERSION, .. }), _) => Ok(link),
            (Reply::Hello(Hello { version, .. }), _) => Err(KeeperError::Version { theirs: version }),
            _ => Err(KeeperError::Confused { what: "hello" }),
        }
    }

    /// Stays in touch for ever: whenever the manager is a new one, its empty vault gets our connection again.
    pub fn watch(&self, mut link: Link, device: &OwnedFd) -> ! {
        loop {
            if let Err(error) = link.wait_for_end() {
                tracing::warn!(%error, "cannot watch sysbox-mgr");
                std::thread::sleep(PATIENCE);
            }
            link = self.reach(device.as_fd());
        }
    }

    /// Tries until the manager has our connection.
    fn reach(&self, device: BorrowedFd<'_>) -> Link {
        for attempt in 0usize.. {
            std::thread::sleep(PAUSES[attempt.min(PAUSES.len() - 1)]);
            match self.connect().and_then(|link| link.put(device).map(|()| link)) {
                Ok(link) => {
                    if attempt > 1 {
                        tracing::info!("sysbox-mgr is back and keeps the FUSE connection again");
                    }
                    return link;
                }
                Err(error) if attempt == 1 => {
                    tracing::warn!(%error, "nobody keeps the FUSE connection until sysbox-mgr is back");
                }
                Err(error) => tracing::debug!(%error, attempt, "sysbox-mgr is away"),
            }
        }
        unreachable!("an endless range ended")
    }
}

impl Link {
    /// # Errors
    /// The manager not taking it.
    pub fn put(&self, device: BorrowedFd<'_>) -> Result<()> {
        self.expect_done("vault_put", &Request::VaultPut { name: self.name.clone() }, &[device])
    }

    /// # Errors
    /// The manager not answering. That it keeps nothing is no error.
    pub fn get(&self) -> Result<Option<OwnedFd>> {
        const WHAT: &str = "vault_get";
        match self.call(WHAT, &Request::VaultGet { name: self.name.clone() }, &[]) {
            Ok((Reply::Descriptor, fds)) => {
                fds.into_iter().next().map(Some).ok_or(KeeperError::Confused { what: WHAT })
            }
            Err(KeeperError::Refused { refusal, .. }) if refusal.kind == RefusalKind::NotFound => Ok(None),
            Ok(_) => Err(KeeperError::Confused { what: WHAT }),
            Err(error) => Err(error),
        }
    }

    /// # Errors
    /// The manager not answering.
    pub fn forget(&self) -> Result<()> {
        self.expect_done("vault_drop", &Request::VaultDrop { name: self.name.clone() }, &[])
    }

    /// # Errors
    /// The manager not answering.
    pub fn records(&self) -> Result<Vec<Record>> {
        const WHAT: &str = "records";
        let mut all: Vec<Record> = Vec::new();
        loop {
            let after = all.last().map(|record| record.key.clone());
            match self.call(WHAT, &Request::Records { after }, &[])? {
                // A manager that promises more and sends none would be asked for ever.
                (Reply::Records { records, more: true }, _) if !records.is_empty() => all.extend(records),
                (Reply::Records { records, more: false }, _) => {
                    all.extend(records);
                    return Ok(all);
                }
                _ => return Err(KeeperError::Confused { what: WHAT }),
            }
        }
    }

    fn expect_done(&self, what: &'static str, request: &Request, fds: &[BorrowedFd<'_>]) -> Result<()> {
        match self.call(what, request, fds)? {
            (Reply::Done, _) => Ok(()),
            _ => Err(KeeperError::Confused { what }),
        }
    }

    fn call(
        &self,
        what: &'static str,
        request: &Request,
        fds: &[BorrowedFd<'_>],
    ) -> Result<(Reply, Vec<OwnedFd>)> {
        let answer =
            self.connection.call(request, fds).map_err(|source| KeeperError::Broken { what, source })?;
        match answer {
            (Reply::Refused(refusal), _) => Err(KeeperError::Refused { what, refusal }),
            other => Ok(other),
        }
    }

    /// Returns when the manager has closed the connection or is dead.
    fn wait_for_end(&self) -> Result<()> {
        let mut polled = [PollFd::new(self.connection.as_fd(), PollFlags::POLLIN)];
        loop {
            match nix::poll::poll(&mut polled, PollTimeout::NONE) {
                Err(nix::errno::Errno::EINTR) => {}
                other => return Ok(other.map(drop).named(|| "poll(mgr.sock)".to_owned())?),
            }
        }
    }
}
