//! The file system as the kernel asks for it: the root, a directory a container, below it the nodes of the table. Inode
//! numbers are computed from a container's slot and a node's number, so that those which the kernel remembers mean the same
//! to the next daemon.
//!
//! A handler answers at once or not at all long: it reads a few files of procfs and cgroupfs and holds no lock meanwhile.
//! It opens nothing of this file system.

use std::ffi::OsStr;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use fuser::{
    BsdFileFlags, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo,
    LockOwner, Notifier, OpenFlags, ReplyAttr, ReplyData, ReplyDirectory, ReplyEmpty, ReplyEntry, ReplyOpen,
    ReplyWrite, Request, TimeOrNow, WriteFlags,
};

use crate::handles::{self, Handles};
use crate::registry::{Registry, Slot, Stale};
use crate::vproc::view::{Reader, Source};
use crate::vproc::{Kind, Node, Render, TOP};

/// How long the kernel may remember. Nothing here changes by itself; when a container goes or changes, the kernel is told.
const KEEP: Duration = Duration::from_secs(3600);
/// What a leaf claims as its length, in bytes, whatever it will say: sendfile(2) and splice(2) take a file of length 0 for
/// empty and never ask us (busybox `cat` reads so). Above the longest text of any row.
const LEAF_SIZE: u64 = 32768;
/// After a sendfile the kernel takes the end of that text for the length, until it asks again.
const KEEP_LEAF: Duration = Duration::from_secs(1);
/// Without NOFLUSH a process that merely closes a file hangs while no daemon lives.
const OPENED: FopenFlags = FopenFlags::FOPEN_DIRECT_IO.union(FopenFlags::FOPEN_NOFLUSH);

/// What an inode number means.
#[derive(Debug, Clone, Copy)]
enum Inode {
    Root,
    Node(Slot, &'static Node),
}

impl Inode {
    fn decode(number: u64) -> Option<Self> {
        if number == INodeNo::ROOT.0 {
            return Some(Self::Root);
        }
        // Slots are counted from one here: node 1 of slot 0 would be the root.
        let slot = u32::try_from((number >> 16).checked_sub(1)?).ok()?;
        let node = Node::numbered((number & 0xffff) as u16)?;
        Some(Self::Node(Slot(slot), node))
    }

    fn number(self) -> u64 {
        match self {
            Self::Root => INodeNo::ROOT.0,
            Self::Node(slot, node) => (u64::from(slot.0) + 1) << 16 | u64::from(node.number),
        }
    }
}

/// Proof that the mount point leads to this very daemon: a name that only a prober knows, and whether it was looked up.
#[derive(Debug)]
pub struct Probe {
    seen: AtomicU64,
    first_request: AtomicU64,
}

impl Default for Probe {
    fn default() -> Self {
        Self { seen: AtomicU64::new(0), first_request: AtomicU64::new(u64::MAX) }
    }
}

impl Probe {
    const PREFIX: &str = ".sysbox-fs-probe-";

    pub fn name(nonce: u64) -> String {
        format!("{}{nonce:016x}", Self::PREFIX)
    }

    pub fn seen(&self, nonce: u64) -> bool {
        self.seen.load(Ordering::Acquire) == nonce
    }

    /// The lowest number of a request that this daemon has read.
    pub fn first_request(&self) -> Option<u64> {
        Some(self.first_request.load(Ordering::Acquire)).filter(|unique| *unique != u64::MAX)
    }

    fn look(&self, name: &str) {
        if let Some(nonce) = name.strip_prefix(Self::PREFIX).and_then(|hex| u64::from_str_radix(hex, 16).ok())
        {
            self.seen.store(nonce, Ordering::Release);
        }
    }
}

/// What the tree shares with the rest of the daemon.
#[derive(Debug, Clone)]
pub struct Tree {
    pub registry: Arc<Registry>,
    pub source: Arc<Source>,
    pub handles: Arc<Handles>,
    pub probe: Arc<Probe>,
    pub started: SystemTime,
}

impl Tree {
    fn attributes(&self, inode: Inode) -> FileAttr {
        let (kind, perm, owner) = match inode {
            // Names of containers are nobody's business but the host's root.
            Inode::Root => (FileType::Directory, 0o711, (0, 0)),
            Inode::Node(slot, node) => {
                // A container we do not know, whose files are in use: shown, and to nobody in particular.
                let owner = self.registry.get(slot).map_or((0, 0), |c| (c.root_uid, c.root_gid));
                match node.kind {
                    Kind::Directory => (FileType::Directory, 0o555, owner),
                    Kind::File(_) => (FileType::RegularFile, 0o444, owner),
                }
            }
        };
        FileAttr {
            ino: INodeNo(inode.number()),
            size: if kind == FileType::Directory { 0 } else { LEAF_SIZE },
            blocks: 0,
            atime: self.started,
            mtime: self.started,
            ctime: self.started,
            crtime: self.started,
            kind,
            perm,
            nlink: if kind == FileType::Directory { 2 } else { 1 },
            uid: owner.0,
            gid: owner.1,
            rdev: 0,
            blksize: 4096,
            flags: 0,
        }
    }

    fn child(&self, parent: Inode, name: &str) -> Option<Inode> {
        match parent {
            Inode::Root => Some(Inode::Node(self.registry.slot_of(name)?, Node::numbered(TOP)?)),
            Inode::Node(slot, node) => {
                self.registry.get(slot)?;
                node.children().find(|child| child.name() == name).map(|child| Inode::Node(slot, child))
            }
        }
    }

    /// Tells a slot's container from the one that has it next.
    fn generation(&self, inode: Inode) -> Generation {
        let Inode::Node(slot, _) = inode else { return Generation(0) };
        let slug = self.registry.get(slot).map(|container| container.key.slug());
        // The slug ends in a hash of the key, of 16 digits.
        let hash =
            slug.as_deref().and_then(|slug| u64::from_str_radix(slug.get(slug.len() - 16..)?, 16).ok());
        Generation(hash.unwrap_or_default())
    }

    /// Takes note of a request. One that an earlier daemon had read and not answered is answered like any other: none here
    /// does harm when it is done twice.
    fn note(&self, req: &Request) {
        let unique = u64::from(req.unique());
        // FUSE_UNIQUE_RESEND
        if unique >> 63 == 1 {
            tracing::debug!(pid = req.pid(), "a request of the dead daemon came again");
        } else {
            self.probe.first_request.fetch_min(unique, Ordering::AcqRel);
        }
    }

    fn entries(&self, inode: Inode) -> Vec<(Inode, String)> {
        match inode {
            Inode::Root => {
                let Some(top) = Node::numbered(TOP) else { return Vec::new() };
                self.registry.all().into_iter().map(|c| (Inode::Node(c.slot, top), c.key.slug())).collect()
            }
            Inode::Node(slot, node) => {
                node.children().map(|child| (Inode::Node(slot, child), child.name().to_owned())).collect()
            }
        }
    }

    fn text(&self, slot: Slot, render: Render, pid: u32) -> Result<String, Errno> {
        let container = self.registry.get(slot);
        let reader = Reader {
            // 0: outside of our pid namespace.
            pid: i32::try_from(pid).unwrap_or_default(),
            init: container.as_ref().and_then(|container| container.init).map(|init| init.pid),
            container: container.and_then(|container| container.cgroup.clone()),
        };
        // A bug in one file's text must cost that read, not the thread that serves all containers.
        let made = std::panic::catch_unwind(AssertUnwindSafe(|| render.text(&self.source, &reader)));
        match made {
            Ok(Ok(text)) => Ok(text),
            Ok(Err(error)) => {
                tracing::debug!(slot = slot.0, %error, "no view");
                Err(Errno::EIO)
            }
            Err(_) => Err(Errno::EIO),
        }
    }
}

fn keep(attributes: &FileAttr) -> &'static Duration {
    if attributes.kind == FileType::Directory { &KEEP } else { &KEEP_LEAF }
}

/// Makes the kernel forget a container's directory and what is below it.
pub fn forget(notifier: &Notifier, stale: &Stale) {
    for node in crate::vproc::TABLE {
        let number = INodeNo(Inode::Node(stale.slot, node).number());
        if let Err(error) = notifier.inval_inode(number, -1, 0) {
            tracing::debug!(slug = stale.slug, node = node.path, %error, "the kernel did not forget an inode");
        }
    }
    if let Err(error) = notifier.inval_entry(INodeNo::ROOT, OsStr::new(&stale.slug)) {
        tracing::debug!(slug = stale.slug, %error, "the kernel did not forget a directory");
    }
}

impl Filesystem for Tree {
    fn lookup(&self, req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let (Some(parent), Some(name)) = (Inode::decode(parent.0), name.to_str()) else {
            return reply.error(Errno::ENOENT);
        };
        self.note(req);
        if matches!(parent, Inode::Root) {
            self.probe.look(name);
        }
        match self.child(parent, name) {
            Some(inode) => {
                let attributes = self.attributes(inode);
                reply.entry_with_ttls(keep(&attributes), &KEEP, &attributes, self.generation(inode));
            }
            None => reply.error(Errno::ENOENT),
        }
    }

    fn getattr(&self, req: &Request, ino: INodeNo, _fh: Option<FileHandle>, reply: ReplyAttr) {
        self.note(req);
        match Inode::decode(ino.0) {
            Some(inode) => {
                let attributes = self.attributes(inode);
                reply.attr(keep(&attributes), &attributes);
            }
            None => reply.error(Errno::ESTALE),
        }
    }

    /// Truncation and times are taken and mean nothing, as in procfs; mode and owner stay.
    fn setattr(
        &self,
        _req: &Request,
        ino: INodeNo,
        mode: Option<u32>,
        uid: Option<u32>,
        gid: Option<u32>,
        _size: Option<u64>,
        _atime: Option<TimeOrNow>,
        _mtime: Option<TimeOrNow>,
        _ctime: Option<SystemTime>,
        _fh: Option<FileHandle>,
        _crtime: Option<SystemTime>,
        _chgtime: Option<SystemTime>,
        _bkuptime: Option<SystemTime>,
        _flags: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        match Inode::decode(ino.0) {
            Some(_) if mode.is_some() || uid.is_some() || gid.is_some() => reply.error(Errno::EPERM),
            Some(inode) => reply.attr(&KEEP_LEAF, &self.attributes(inode)),
            None => reply.error(Errno::ESTALE),
        }
    }

    fn open(&self, req: &Request, ino: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        self.note(req);
        match Inode::decode(ino.0) {
            Some(Inode::Node(_, Node { kind: Kind::File(_), .. })) => {
                reply.opened(FileHandle(self.handles.open()), OPENED);
            }
            Some(_) => reply.error(Errno::EISDIR),
            None => reply.error(Errno::ESTALE),
        }
    }

    fn read(
        &self,
        req: &Request,
        ino: INodeNo,
        fh: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let Some(Inode::Node(slot, Node { kind: Kind::File(render), .. })) = Inode::decode(ino.0) else {
            return reply.error(Errno::ESTALE);
        };
        self.note(req);
        if let Some(bytes) = self.handles.read(fh.0, ino.0, offset, size) {
            return reply.data(&bytes);
        }
        match self.text(slot, *render, req.pid()) {
            Ok(text) => {
                self.handles.keep(fh.0, ino.0, text.as_bytes());
                reply.data(handles::part(text.as_bytes(), offset, size));
            }
            Err(errno) => reply.error(errno),
        }
    }

    /// As procfs for a file that takes no writes: it opens for root and refuses the write.
    fn write(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        _offset: u64,
        _data: &[u8],
        _write_flags: WriteFlags,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        reply.error(Errno::EIO);
    }

    fn release(
        &self,
        req: &Request,
        _ino: INodeNo,
        fh: FileHandle,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        _flush: bool,
        reply: ReplyEmpty,
    ) {
        self.note(req);
        self.handles.release(fh.0);
        reply.ok();
    }

    fn readdir(&self, req: &Request, ino: INodeNo, _fh: FileHandle, offset: u64, mut reply: ReplyDirectory) {
        self.note(req);
        let Some(inode) = Inode::decode(ino.0) else { return reply.error(Errno::ESTALE) };
        let itself = [(inode, ".".to_owned()), (inode, "..".to_owned())];
        let entries = itself.into_iter().chain(self.entries(inode));
        let from = usize::try_from(offset).unwrap_or(usize::MAX);
        for (index, (entry, name)) in entries.enumerate().skip(from) {
            let kind = self.attributes(entry).kind;
            if reply.add(INodeNo(entry.number()), index as u64 + 1, kind, name) {
                break;
            }
        }
        reply.ok();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vproc::TABLE;

    #[test]
    fn inode_numbers_mean_what_they_were_made_of() {
        for slot in [0, 1, 70_000, u32::MAX] {
            for node in TABLE {
                let number = Inode::Node(Slot(slot), node).number();
                assert_ne!(number, INodeNo::ROOT.0);
                let Some(Inode::Node(back, same)) = Inode::decode(number) else { panic!("{number:#x}") };
                assert_eq!((back, same.path), (Slot(slot), node.path));
            }
        }
        assert!(matches!(Inode::decode(1), Some(Inode::Root)));
        for nonsense in [0, 2, 0xffff, 1 << 16, (1 << 16) | 999, u64::MAX] {
            assert!(Inode::decode(nonsense).is_none(), "{nonsense:#x}");
        }
    }

    #[test]
    fn a_probe_is_seen_by_its_nonce() {
        let probe = Probe::default();
        probe.look("etc");
        assert!(!probe.seen(42));
        probe.look(&Probe::name(42));
        assert!(probe.seen(42) && !probe.seen(43));
    }
}
