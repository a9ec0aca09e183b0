//! What is said to sysbox-fs and what it answers. One request, one reply, on a connection that began with [`Hello`].
//!
//! [`Hello`]: crate::Hello

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::mgr::Process;
use crate::{ContainerKey, Refusal};

/// The socket of sysbox-fs in its run directory.
pub const SOCKET: &str = "fs.sock";

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "snake_case")]
pub enum Request {
    Hello(crate::Hello),
    /// Makes the container's directory of leaf files. When the reply comes, the files answer. Repeating it is no error.
    Prepare {
        key: ContainerKey,
        /// From the manager's grant.
        slot: u32,
        /// Host ids of the container's root, who is to own the files.
        root_uid: u32,
        root_gid: u32,
    },
    /// The container's init exists.
    Register {
        key: ContainerKey,
        init: Process,
    },
    /// The container is gone. Unknown keys are no error.
    Unregister {
        key: ContainerKey,
    },
    /// Which containers are known, for `check` and tests, in the order of their keys: as many as fit in a message, from the
    /// first one after `after`.
    List {
        #[serde(default, skip_serializing_if = "Option::is_none")]
        after: Option<ContainerKey>,
    },
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "reply", rename_all = "snake_case")]
pub enum Reply {
    Hello(crate::Hello),
    Prepared(Prepared),
    Containers {
        keys: Vec<ContainerKey>,
        /// There are others after the last of these: ask again.
        #[serde(default)]
        more: bool,
    },
    Done,
    Refused(Refusal),
}

/// Where the leaf files of a container are.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Prepared {
    /// The container's directory below the mount point of sysbox-fs.
    pub directory: PathBuf,
    /// Files to be bound over the container's own: `proc/meminfo` of the directory over `/proc/meminfo`.
    pub leaves: Vec<String>,
}
