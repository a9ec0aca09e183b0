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

/// Directories below a data root that its engine takes for its own, so that a volume on one of them alone is claimed as well.
/// What is not here (volumes' `_data`, k3s' `agent/images`, certificates) may be shared: people do.
pub const STORES: &[&str] = &[
    "/var/lib/docker/buildkit",
    "/var/lib/docker/containerd",
    "/var/lib/docker/containers",
    "/var/lib/docker/image",
    "/var/lib/docker/network",
    "/var/lib/docker/overlay2",
    "/var/lib/docker/btrfs",
    "/var/lib/docker/fuse-overlayfs",
    "/var/lib/docker/vfs",
    "/var/lib/docker/swarm",
    "/var/lib/docker/volumes",
    "/var/lib/containerd/io.containerd.content.v1.content",
    "/var/lib/containerd/io.containerd.metadata.v1.bolt",
    "/var/lib/containerd/io.containerd.snapshotter.v1.native",
    "/var/lib/containerd/io.containerd.snapshotter.v1.overlayfs",
    "/var/lib/kubelet/pods",
    "/var/lib/k0s/containerd",
    "/var/lib/k0s/db",
    "/var/lib/k0s/etcd",
    "/var/lib/rancher/k3s/agent/containerd",
    "/var/lib/rancher/k3s/server/db",
    "/var/lib/rancher/rke2/agent/containerd",
    "/var/lib/rancher/rke2/server/db",
    "/var/lib/containers/storage",
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
    /// `create`: makes the named directories in [`Grant::volumes`], for a user with these ids on disk. They stay as long as
    /// the record does.
    MakeVolumes {
        key: ContainerKey,
        names: Vec<String>,
        uid: u32,
        gid: u32,
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
    /// The user namespace of the namespaces that it joins, where that is not the host's: it becomes the container's own.
    #[serde(default)]
    pub users: Option<FileId>,
    /// The user's own directories on data roots.
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

/// A directory of the user's that an inner engine would keep its data in; for one running container at a time.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Claim {
    /// The path inside the container, one of [`DATA_ROOTS`] or [`STORES`].
    pub data_root: String,
    /// The directory on the host. It need not exist yet: an engine makes it.
    pub source: PathBuf,
    /// What it is, whatever name it goes by: itself, if it exists, and the directories above it.
    #[serde(default)]
    pub lineage: Vec<Ancestor>,
}

/// A directory, and the way down from it to the one that is meant.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ancestor {
    pub id: FileId,
    /// Relative; empty for the directory itself.
    pub below: PathBuf,
}

impl Claim {
    /// Whether both are one directory, or one lies in the other.
    pub fn meets(&self, other: &Self) -> bool {
        let met = |(one, two): (&Ancestor, &Ancestor)| {
            one.id == two.id && (one.below.starts_with(&two.below) || two.below.starts_with(&one.below))
        };
        self.lineage.iter().any(|one| other.lineage.iter().any(|two| met((one, two))))
    }
}

/// What the container gets.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Grant {
    pub id_map: IdMap,
    /// Unique among all records, and kept as long as the record: sysbox-fs computes inode numbers from it.
    pub slot: u32,
    /// The running container whose user namespace is to be joined, as both share a network namespace.
    pub share_with: Option<Process>,
    /// A live container on the same rootfs directory.
    #[serde(default)]
    pub same_rootfs: Option<ContainerKey>,
    pub facts: HostFacts,
    #[serde(default)]
    pub defaults: Defaults,
    /// Where managed volumes of this container are, or will be.
    #[serde(default)]
    pub volumes: PathBuf,
}

/// How containers are made that do not say otherwise: the manager's flags.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Defaults {
    /// The capabilities of the spec, instead of all for root and none for others.
    pub honor_caps: bool,
    /// A machine; else an ordinary container, in a user namespace of its own.
    pub syscont_mode: bool,
    /// /sys and /proc stay writable in a container whose root file system is read-only.
    pub relaxed_read_only: bool,
    /// A bind source that cannot be id-shifted is a refusal and not a warning.
    pub fsuid_map_fail_on_error: bool,
    /// Data roots are managed volumes, instead of directories of the container's own layer.
    pub data_root_volumes: bool,
}

impl Default for Defaults {
    fn default() -> Self {
        Self {
            honor_caps: false,
            syscont_mode: true,
            relaxed_read_only: false,
            fsuid_map_fail_on_error: false,
            data_root_volumes: false,
        }
    }
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
    /// The inode of the directory that has the engine's layers, this container's among them. Another directory in its place (an
    /// empty one on which a disk is not mounted yet) says nothing of whether the layer is gone.
    #[serde(default)]
    pub layers: Option<u64>,
    pub netns: Option<FileId>,
    /// Its user namespace, as far as it is known.
    #[serde(default)]
    pub users: Option<FileId>,
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn claims_meet_by_what_a_directory_is() {
        let claim = |lineage: &[(u64, &str)]| Claim {
            data_root: "/var/lib/docker".to_owned(),
            source: "/s".into(),
            lineage: lineage
                .iter()
                .map(|(ino, below)| Ancestor { id: FileId { dev: 1, ino: *ino }, below: below.into() })
                .collect(),
        };
        let volume = claim(&[(7, ""), (3, "vol"), (2, "srv/vol")]);
        for (other, meets) in [
            (claim(&[(7, ""), (9, "bound")]), true),
            (claim(&[(8, ""), (3, "other"), (2, "srv/other")]), false),
            // Inside, whether it is there yet or not.
            (claim(&[(7, "overlay2"), (3, "vol/overlay2")]), true),
            (claim(&[(5, ""), (7, "overlay2")]), true),
            // Around it.
            (claim(&[(2, "srv")]), true),
            // A name that begins alike.
            (claim(&[(3, "volume")]), false),
            (claim(&[]), false),
        ] {
            assert_eq!(volume.meets(&other), meets, "{other:?}");
            assert_eq!(other.meets(&volume), meets, "{other:?}");
        }
    }
}
