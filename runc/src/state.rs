//! A container's state on disk: `ROOT/ID/state.json` and the spec beside it. Written whole or not at all.

use std::collections::HashMap;
use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use oci_spec::runtime::Spec;
use serde::{Deserialize, Serialize};
use sysbox_ipc::mgr::{HostFacts, Process};
use sysbox_ipc::{ContainerId, ContainerKey, IdMap};

use crate::carry::Carried;
use crate::cgroup::Cgroup;
use crate::filter::Filter;
use crate::freezer::Freezer;
use crate::launch::START_SOCKET;
use crate::listener::Agent;
use crate::plan::Settings;

const STATE: &str = "state.json";
const SPEC: &str = "spec.json";
const FILTER: &str = "seccomp.bpf";

/// Of this file's format. A newer one is refused, never rewritten.
const VERSION: u32 = 1;

#[derive(Debug, thiserror::Error)]
pub enum StateError {
    #[error("container does not exist")]
    NoContainer { id: ContainerId },
    #[error("container with given ID already exists")]
    Exists { id: ContainerId },
    #[error("{attempt} {}: {source}", path.display())]
    Io { attempt: &'static str, path: PathBuf, source: std::io::Error },
    #[error("{}: {source}", path.display())]
    Parse { path: PathBuf, source: serde_json::Error },
    #[error("{}: format {found} is newer than {VERSION}", path.display())]
    Newer { path: PathBuf, found: u32 },
}

type Result<T> = std::result::Result<T, StateError>;

fn io(attempt: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> StateError {
    let path = path.to_owned();
    move |source| StateError::Io { attempt, path, source }
}

/// What the runtime knows of a container.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct State {
    pub version: u32,
    pub id: ContainerId,
    pub oci_version: String,
    pub bundle: PathBuf,
    /// The engine's rootfs, not the staged one.
    pub rootfs: PathBuf,
    /// RFC 3339, UTC.
    pub created: String,
    pub annotations: HashMap<String, String>,
    pub id_map: IdMap,
    pub cgroup: Cgroup,
    /// The runtime process that makes the container; it tells a create under way from one that was cut off.
    pub creator: Process,
    /// `None` until init exists.
    pub init: Option<Process>,
    /// The poststop hooks have run: a delete that had to be repeated does not repeat them.
    #[serde(default)]
    pub poststop_ran: bool,
    /// What is to be listed before an engine makes an image of it.
    #[serde(default)]
    pub carried: Carried,
    pub facts: HostFacts,
    #[serde(default)]
    pub settings: Settings,
    /// Made with `--no-new-keyring`: later processes keep the caller's session keyring as init did.
    #[serde(default)]
    pub no_new_keyring: bool,
    /// Its init is systemd.
    #[serde(default)]
    pub systemd: bool,
    /// Who answers for the calls that the filter notifies of.
    #[serde(default)]
    pub agent: Option<Agent>,
    /// As the engine asked for it; the base of an `exec` by flags.
    pub process: oci_spec::runtime::Process,
}

/// As the OCI specification names them, and runc's `paused`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    Creating,
    Created,
    Running,
    Paused,
    Stopped,
}

impl Status {
    pub fn as_str(self) -> &'static str {
        match self {
            Status::Creating => "creating",
            Status::Created => "created",
            Status::Running => "running",
            Status::Paused => "paused",
            Status::Stopped => "stopped",
        }
    }
}

/// One container's directory below `--root`.
#[derive(Debug, Clone)]
pub struct Home {
    pub key: ContainerKey,
    pub dir: PathBuf,
}

impl Home {
    pub fn of(root: &Path, id: ContainerId) -> Self {
        let dir = root.join(id.as_str());
        Self { key: ContainerKey::new(root, id), dir }
    }

    /// Makes the directory; that it was not there is what makes the id unique.
    ///
    /// # Errors
    /// `Exists`, or what mkdir says.
    pub fn create(&self) -> Result<()> {
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o711)
            .create(&self.key.root)
            .map_err(io("mkdir", &self.key.root))?;
        // It has the environment of the container, which is nobody else's to read.
        match fs::DirBuilder::new().mode(0o700).create(&self.dir) {
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {
                Err(StateError::Exists { id: self.key.id.clone() })
            }
            other => other.map_err(io("mkdir", &self.dir)),
        }
    }

    /// # Errors
    /// What writing, syncing or renaming says.
    pub fn save(&self, state: &State) -> Result<()> {
        let bytes = serde_json::to_vec(state)
            .map_err(|source| StateError::Parse { path: self.dir.join(STATE), source })?;
        self.replace(STATE, &bytes)
    }

    /// # Errors
    /// As [`Home::save`].
    pub fn save_spec(&self, spec: &Spec) -> Result<()> {
        let bytes = serde_json::to_vec(spec)
            .map_err(|source| StateError::Parse { path: self.dir.join(SPEC), source })?;
        self.replace(SPEC, &bytes)
    }

    /// Keeps the compiled filter for every later `exec`.
    ///
    /// # Errors
    /// As [`Home::save`].
    pub fn save_filter(&self, filter: Option<&Filter>) -> Result<()> {
        match filter {
            Some(filter) => self.replace(FILTER, &filter.to_bytes()),
            None => Ok(()),
        }
    }

    /// # Errors
    /// A file that is not ours. None at all means that the container has no filter.
    pub fn load_filter(&self) -> Result<Option<Filter>> {
        let path = self.dir.join(FILTER);
        match fs::read(&path) {
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(error) => Err(io("read", &path)(error)),
            Ok(bytes) => {
                let damaged = || io("parse", &path)(ErrorKind::InvalidData.into());
                Filter::from_bytes(&bytes).map(Some).ok_or_else(damaged)
            }
        }
    }

    /// Not synced: this state describes processes, and ends with them at a crash of the machine.
    fn replace(&self, name: &str, bytes: &[u8]) -> Result<()> {
        let (path, new) = (self.dir.join(name), self.dir.join(format!(".{name}.new")));
        fs::write(&new, bytes).map_err(io("write", &new))?;
        fs::rename(&new, &path).map_err(io("rename to", &path))
    }

    /// # Errors
    /// `NoContainer`; a file that is not ours or newer than we are.
    pub fn load(&self) -> Result<State> {
        let path = self.dir.join(STATE);
        let state: State = match fs::read(&path) {
            Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => {
                return Err(StateError::NoContainer { id: self.key.id.clone() });
            }
            Err(error) => return Err(io("read", &path)(error)),
            Ok(bytes) => serde_json::from_slice(&bytes)
                .map_err(|source| StateError::Parse { path: path.clone(), source })?,
        };
        if state.version > VERSION {
            Err(StateError::Newer { path, found: state.version })
        } else {
            Ok(state)
        }
    }

    /// # Errors
    /// As [`Home::load`].
    pub fn load_spec(&self) -> Result<Spec> {
        let path = self.dir.join(SPEC);
        let bytes = fs::read(&path).map_err(io("read", &path))?;
        serde_json::from_slice(&bytes).map_err(|source| StateError::Parse { path, source })
    }

    /// What the container is doing, by looking at its process: a pid that was given to another does not count.
    pub fn status(&self, state: &State) -> Status {
        match state.init {
            None if sysbox_sys::process::is_alive(state.creator) => Status::Creating,
            None => Status::Stopped,
            Some(init) if !sysbox_sys::process::is_alive(init) => Status::Stopped,
            // A freezer that cannot be read freezes nobody.
            Some(_) if Freezer::of(&state.cgroup).is_some_and(|f| f.is_frozen().unwrap_or(false)) => {
                Status::Paused
            }
            Some(_) if self.dir.join(START_SOCKET).exists() => Status::Created,
            Some(_) => Status::Running,
        }
    }

    /// Removes the directory. It holds plain files only; nothing is ever mounted below it.
    ///
    /// # Errors
    /// What the removal says, unless it is gone already.
    pub fn remove(&self) -> Result<()> {
        match fs::remove_dir_all(&self.dir) {
            Err(error) if error.kind() != ErrorKind::NotFound => Err(io("remove", &self.dir)(error)),
            _ => Ok(()),
        }
    }
}

/// The ids of all containers below a root, sorted.
///
/// # Errors
/// The root not being readable; one that does not exist has no containers.
pub fn all(root: &Path) -> Result<Vec<ContainerId>> {
    let entries = match fs::read_dir(root) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        other => other.map_err(io("read", root))?,
    };
    let mut ids: Vec<ContainerId> =
        entries.flatten().filter_map(|entry| ContainerId::parse(entry.file_name().to_str()?).ok()).collect();
    ids.sort();
    Ok(ids)
}

impl State {
    pub fn new_version() -> u32 {
        VERSION
    }
}
