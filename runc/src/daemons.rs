//! The runtime's side of the conversations with sysbox-mgr and sysbox-fs.

use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::errno::Errno;
use serde::Serialize;
use serde::de::DeserializeOwned;
use sysbox_ipc::mgr::{Grant, Process, Register};
use sysbox_ipc::{ContainerKey, Hello, PROTOCOL_VERSION, Refusal, fs, mgr};
use sysbox_sys::socket::{Connection, SocketError};

/// How long a daemon may take. It answers in a millisecond; while it is being restarted its socket is away for less than
/// this.
const PATIENCE: Duration = Duration::from_secs(10);

#[derive(Debug, thiserror::Error)]
pub enum DaemonError {
    #[error("{daemon} is not running (no answer at {}); hint: `make up` in the source tree starts the daemons", socket.display())]
    Missing { daemon: &'static str, socket: PathBuf },
    #[error("{daemon}: {source}")]
    Talk { daemon: &'static str, source: SocketError },
    #[error("{daemon}: {refusal}{}", refusal.hint.as_deref().map(|hint| format!("; hint: {hint}")).unwrap_or_default())]
    Refused { daemon: &'static str, refusal: Refusal },
    #[error("{daemon} speaks protocol {theirs}, this runtime {PROTOCOL_VERSION}")]
    Version { daemon: &'static str, theirs: u32 },
    #[error("{daemon} gave an answer that does not fit the question")]
    Answer { daemon: &'static str },
}

type Result<T> = std::result::Result<T, DaemonError>;

fn connect<A: DeserializeOwned>(
    daemon: &'static str,
    socket: &Path,
    hello: &impl Serialize,
    read: impl FnOnce(A) -> Option<Hello>,
) -> Result<Connection> {
    let talk = |source| DaemonError::Talk { daemon, source };
    let connection = Connection::connect(socket).map_err(|error| match &error {
        SocketError::Sys(sys) if matches!(sys.errno, Errno::ENOENT | Errno::ECONNREFUSED) => {
            DaemonError::Missing { daemon, socket: socket.to_owned() }
        }
        _ => talk(error),
    })?;
    connection.set_timeout(PATIENCE).map_err(|error| talk(error.into()))?;
    let (answer, _) = connection.call(hello, &[]).map_err(talk)?;
    let theirs = read(answer).ok_or(DaemonError::Answer { daemon })?;
    if theirs.version == PROTOCOL_VERSION {
        Ok(connection)
    } else {
        Err(DaemonError::Version { daemon, theirs: theirs.version })
    }
}

/// A conversation with sysbox-mgr.
#[derive(Debug)]
pub struct Mgr(Connection);

const MGR: &str = "sysbox-mgr";

impl Mgr {
    /// # Errors
    /// The daemon not being there, or of another protocol.
    pub fn connect(run_dir: &Path) -> Result<Self> {
        let hello = mgr::Request::Hello(Hello::from_program("sysbox-runc"));
        connect(MGR, &run_dir.join(mgr::SOCKET), &hello, |answer| match answer {
            mgr::Reply::Hello(hello) => Some(hello),
            _ => None,
        })
        .map(Self)
    }

    fn ask(&self, request: &mgr::Request) -> Result<mgr::Reply> {
        let (reply, _) =
            self.0.call(request, &[]).map_err(|source| DaemonError::Talk { daemon: MGR, source })?;
        match reply {
            mgr::Reply::Refused(refusal) => Err(DaemonError::Refused { daemon: MGR, refusal }),
            reply => Ok(reply),
        }
    }

    fn done(&self, request: &mgr::Request) -> Result<()> {
        match self.ask(request)? {
            mgr::Reply::Done => Ok(()),
            _ => Err(DaemonError::Answer { daemon: MGR }),
        }
    }

    /// # Errors
    /// A refusal: ids used up, a volume busy, the container alive.
    pub fn register(&self, register: Register) -> Result<Grant> {
        match self.ask(&mgr::Request::Register(Box::new(register)))? {
            mgr::Reply::Granted(grant) => Ok(*grant),
            _ => Err(DaemonError::Answer { daemon: MGR }),
        }
    }

    /// # Errors
    /// The daemon not knowing the container.
    pub fn started(&self, key: &ContainerKey, init: Process) -> Result<()> {
        self.done(&mgr::Request::Started { key: key.clone(), init })
    }

    /// # Errors
    /// The daemon failing at it: a full disk.
    pub fn make_volumes(&self, key: &ContainerKey, names: Vec<String>, (uid, gid): (u32, u32)) -> Result<()> {
        self.done(&mgr::Request::MakeVolumes { key: key.clone(), names, uid, gid })
    }

    /// # Errors
    /// The daemon failing at it.
    pub fn release(&self, key: &ContainerKey) -> Result<()> {
        self.done(&mgr::Request::Release { key: key.clone() })
    }
}

/// A conversation with sysbox-fs.
#[derive(Debug)]
pub struct Fs(Connection);

const FS: &str = "sysbox-fs";

impl Fs {
    /// # Errors
    /// The daemon not being there, or of another protocol.
    pub fn connect(run_dir: &Path) -> Result<Self> {
        let hello = fs::Request::Hello(Hello::from_program("sysbox-runc"));
        connect(FS, &run_dir.join(fs::SOCKET), &hello, |answer| match answer {
            fs::Reply::Hello(hello) => Some(hello),
            _ => None,
        })
        .map(Self)
    }

    fn ask(&self, request: &fs::Request) -> Result<fs::Reply> {
        let (reply, _) =
            self.0.call(request, &[]).map_err(|source| DaemonError::Talk { daemon: FS, source })?;
        match reply {
            fs::Reply::Refused(refusal) => Err(DaemonError::Refused { daemon: FS, refusal }),
            reply => Ok(reply),
        }
    }

    fn done(&self, request: &fs::Request) -> Result<()> {
        match self.ask(request)? {
            fs::Reply::Done => Ok(()),
            _ => Err(DaemonError::Answer { daemon: FS }),
        }
    }

    /// # Errors
    /// The daemon failing at it.
    pub fn prepare(&self, key: &ContainerKey, grant: &Grant) -> Result<fs::Prepared> {
        let (root_uid, root_gid) = (grant.id_map.root_uid(), grant.id_map.root_gid());
        let request = fs::Request::Prepare { key: key.clone(), slot: grant.slot, root_uid, root_gid };
        match self.ask(&request)? {
            fs::Reply::Prepared(prepared) => Ok(prepared),
            _ => Err(DaemonError::Answer { daemon: FS }),
        }
    }

    /// # Errors
    /// The daemon not knowing the container.
    pub fn register(&self, key: &ContainerKey, init: Process) -> Result<()> {
        self.done(&fs::Request::Register { key: key.clone(), init })
    }

    /// # Errors
    /// The daemon failing at it.
    pub fn unregister(&self, key: &ContainerKey) -> Result<()> {
        self.done(&fs::Request::Unregister { key: key.clone() })
    }
}
