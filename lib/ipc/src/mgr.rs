//! What is said to sysbox-mgr and what it answers. One request, one reply, on a connection that began with [`Hello`].
//!
//! [`Hello`]: crate::Hello

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::{ContainerKey, IdMap, Refusal};

/// The socket of sysbox-mgr in its run directory.
pub const SOCKET: &str = "mgr.sock";

/// Directories that an inner engine needs on a real file system (an overlay cannot be the upper layer of another).
pub const DATA_ROOTS: &[&str] = &[
    "/var/lib/docker",
    "/var/lib/containerd",
    "/var/lib/buildkit",
    "/var/lib/kubelet",
    "/var/lib/k0s",
    "/var/lib/rancher/k3s",
    "/var/lib/rancher/rke2",
    "/var/lib/containers",
];

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "snake_case")]
pub enum Request {
    Hello(crate::Hello),
    /// `create`: asks for what the container needs. Repeated after a stop, it gives the same ids again.
    Register(Box<Register>),
    /// The container's init exists. Until then the record belongs to the runtime process that registered it.
    Started {
        key: ContainerKey,
        init: Process,
    },
    /// `delete`. The record goes unless the writable layer is still there; then it waits for `docker start` or for the
    /// layer's end. Unknown keys are no error: a delete may be repeated.
    Release {
        key: ContainerKey,
    },
    /// Host facts alone, for `features` and `check`.
    Facts,
    /// The records in the order of their keys, for sysbox-fs after a restart and for `check`: as many as fit in a message,
    /// from the first one after `after`.
    Records {
        #[serde(default, skip_serializing_if = "Option::is_none")]
        after: Option<ContainerKey>,
    },
    /// Keeps a copy of the descriptor that comes with this message, under `name`, replacing an older one.
    VaultPut {
        name: String,
    },
    /// Gives back a copy of a kept descriptor (with [`Reply::Descriptor`]), or `NotFound`.
    VaultGet {
        name: String,
    },
    /// Forgets a kept descriptor. Unknown names are no error.
    VaultDrop {
        name: String,
    },
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "reply", rename_all = "snake_case")]
pub enum Reply {
    Hello(crate::Hello),
    Granted(Box<Grant>),
    Facts(HostFacts),
    Records {
        records: Vec<Record>,
        /// There are others after the last of these: ask again.
        #[serde(default)]
        more: bool,
    },
    /// A descriptor comes with this message.
    Descriptor,
    Done,
    Refused(Refusal),
}

/// A process that cannot be mistaken for a later one with the same pid.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Process {
    /// In the initial pid namespace.
    pub pid: i32,
    /// Field 22 of /proc/PID/stat, in clock ticks since boot (proc(5)).
    pub start_ticks: u64,
}

/// A file or namespace, by what the kernel calls it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct FileId {
    pub dev: u64,
    pub ino: u64,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Register {
    pub key: ContainerKey,
    pub bundle: PathBuf,
    /// The runtime process that asks. If it dies before `Started`, the registration is void.
    pub runtime: Process,
    pub rootfs: Rootfs,
    /// Mappings that came with the spec. They are honoured and nothing is allocated.
    pub id_map: Option<IdMap>,
    /// The network namespace the container joins. Containers that share one share their user namespace.
    pub netns: Option<FileId>,
    /// The user's own mounts on data roots.
    pub claims: Vec<Claim>,
}

/// What holds the container's root file system, and so how long its record lives.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Rootfs {
    /// An engine's overlay: the record lives as long as the upper directory does.
    Overlay {
        /// The engine's mount point.
        merged: PathBuf,
        upper: PathBuf,
    },
    /// A directory of the user's: the record ends with `delete`.
    Directory { path: PathBuf },
}

/// The user's own mount on a data root of an inner engine; one running container at a time.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Claim {
    /// The path inside the container, one of [`DATA_ROOTS`].
    pub data_root: String,
    /// The user's directory on the host.
    pub source: PathBuf,
    pub source_id: FileId,
}

/// What the container gets.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Grant {
    pub id_map: IdMap,
    /// Unique among all records, and kept as long as the record: sysbox-fs computes inode numbers from it.
    pub slot: u32,
    /// The running container whose user namespace is to be joined, as both share a network namespace.
    pub share_with: Option<Process>,
    pub facts: HostFacts,
}

/// One container on disk and in memory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// Of this record's format; a newer one is never rewritten by an older manager.
    pub version: u32,
    pub key: ContainerKey,
    pub slot: u32,
    pub id_map: IdMap,
    /// Whether the ids come from our range (and not with the spec).
    pub allocated: bool,
    pub bundle: PathBuf,
    pub rootfs: Rootfs,
    pub netns: Option<FileId>,
    pub claims: Vec<Claim>,
    pub phase: Phase,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "phase", rename_all = "snake_case")]
pub enum Phase {
    /// A runtime process is making it.
    Creating { runtime: Process },
    /// Its init exists.
    Running { init: Process },
    /// Deleted by the engine, but its writable layer is still there: `docker start` will bring it back.
    Stopped,
}

/// What this host can do, found out by trying, once, when the manager starts.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct HostFacts {
    /// `uname -r`, for messages only; nothing is decided by it.
    pub kernel: String,
    /// MOUNT_ATTR_IDMAP on the manager's data root (Linux 5.12; per file system).
    pub idmapped_mounts: bool,
    /// MOUNT_ATTR_IDMAP on tmpfs (Linux 6.3).
    pub idmapped_tmpfs: bool,
    /// A read-write overlay whose layers, upper included, are idmapped clones (Linux 5.19).
    pub idmapped_overlay: bool,
    /// Overlay layers given as descriptors (FSCONFIG_SET_FD; Linux 6.13). Else `/proc/self/fd/N` paths serve.
    pub overlay_by_descriptor: bool,
    /// CLONE_NEWTIME (Linux 5.6).
    pub time_namespace: bool,
    /// Raising hard resource limits (CAP_SYS_RESOURCE in the initial user namespace).
    pub raise_rlimits: bool,
    /// SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV (Linux 5.19).
    pub seccomp_wait_killable: bool,
    /// An AppArmor that confines (securityfs shows it enabled).
    pub apparmor: bool,
}
