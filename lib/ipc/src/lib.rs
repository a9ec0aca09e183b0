//! The words that sysbox-runc, sysbox-fs and sysbox-mgr share: who a container is, which ids it has, what is asked and
//! what is granted. No policy, no I/O, no `unsafe`; `lib/sys` carries these words over a socket.
//!
//! Every value is checked where it is parsed: a `ContainerId` that exists is a legal one.

pub mod container;
pub mod fs;
pub mod ids;
pub mod mgr;

pub use container::{ContainerId, ContainerKey, InvalidId};
pub use ids::{IdMap, IdMapError, IdMapLine, IdRange};

use serde::{Deserialize, Serialize};

/// Raised with every change that an older peer would misread. The first message on a connection carries it.
pub const PROTOCOL_VERSION: u32 = 1;

/// Largest datagram either side sends or accepts, in bytes.
pub const MAX_MESSAGE: usize = 128 * 1024;

/// Where the daemons put their sockets when nothing else is said.
pub const DEFAULT_RUN_DIR: &str = "/run/sysbox";

/// What a daemon answers when it cannot do what was asked. `message` says what was attempted, on what, and why it failed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct Refusal {
    pub kind: RefusalKind,
    pub message: String,
    /// The remedy, where there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
}

impl Refusal {
    pub fn new(kind: RefusalKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into(), hint: None }
    }

    pub fn with_hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }
}

/// What callers may match on; never the message.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RefusalKind {
    /// The peer speaks another protocol version.
    Version,
    /// The message is not one of ours, or its values contradict each other.
    Malformed,
    /// No such container or descriptor.
    NotFound,
    /// The container is registered and alive.
    Exists,
    /// Another running container holds what was asked for.
    Busy,
    /// The id ranges are used up.
    Exhausted,
    /// The daemon failed at its own work (disk, kernel).
    Internal,
}

/// The first message on every connection, in both directions.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    pub version: u32,
    /// The program that speaks: `sysbox-runc`, `sysbox-fs` or `sysbox-mgr`.
    pub program: String,
}

impl Hello {
    pub fn from_program(program: &str) -> Self {
        Self { version: PROTOCOL_VERSION, program: program.to_owned() }
    }
}
