//! The containers that sysbox-fs knows: who owns their files and where they are in the cgroup tree. Memory alone; after a
//! restart it is rebuilt from the records of sysbox-mgr.

use std::collections::HashMap;
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use sysbox_ipc::mgr::{Phase, Process, Record};
use sysbox_ipc::{ContainerKey, Refusal, RefusalKind};

use crate::vproc::cgroup::CgroupPath;

/// A container's number among all containers of the host, given by sysbox-mgr.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Slot(pub u32);

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Container {
    pub key: ContainerKey,
    pub slot: Slot,
    /// Host ids of the container's root.
    pub root_uid: u32,
    pub root_gid: u32,
    pub init: Option<Process>,
    /// Its own cgroup, as found when its init was registered: later the init may have moved.
    pub cgroup: Option<CgroupPath>,
}

impl Container {
    pub fn new(key: ContainerKey, slot: Slot, root_uid: u32, root_gid: u32) -> Self {
        Self { key, slot, root_uid, root_gid, init: None, cgroup: None }
    }

    /// From the manager's record, unless the container has no files now.
    pub fn of_record(record: Record) -> Option<Self> {
        let init = match record.phase {
            Phase::Stopped => return None,
            Phase::Creating { .. } => None,
            Phase::Running { init } => Some(init),
        };
        let (uid, gid) = (record.id_map.root_uid(), record.id_map.root_gid());
        Some(Self { init, ..Self::new(record.key, Slot(record.slot), uid, gid) })
    }
}

#[derive(Debug, Default)]
pub struct Registry(RwLock<Inner>);

#[derive(Debug, Default)]
struct Inner {
    by_slot: HashMap<Slot, Arc<Container>>,
    by_slug: HashMap<String, Slot>,
    closed: bool,
}

/// What the kernel may remember and must be told to forget.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stale {
    pub slug: String,
    pub slot: Slot,
}

impl Registry {
    /// Adds a container, or a repetition of it. Answers what the kernel may remember of those it replaces.
    ///
    /// # Errors
    /// `Busy` if the slot is that of another container that `is_alive`; `Internal` once the registry is closed.
    pub fn add(
        &self,
        container: Container,
        is_alive: impl Fn(Process) -> bool,
    ) -> Result<Vec<Stale>, Refusal> {
        let mut inner = self.write();
        if inner.closed {
            return Err(Refusal::new(RefusalKind::Internal, "sysbox-fs is stopping")
                .with_hint("repeat when sysbox-fs runs again"));
        }
        let slug = container.key.slug();
        let mut stale = Vec::new();
        if let Some(other) = inner.by_slot.get(&container.slot).filter(|other| other.key != container.key) {
            if other.init.is_some_and(is_alive) {
                let message =
                    format!("slot {} belongs to container {}, which runs", container.slot.0, other.key);
                return Err(Refusal::new(RefusalKind::Busy, message));
            }
            // The manager gives slots. That it gave this one again means that the other was released while we were away.
            let key = other.key.clone();
            stale.extend(inner.remove(&key));
        }
        let before = inner.by_slug.get(&slug).and_then(|slot| inner.by_slot.get(slot));
        let same_files = before.is_some_and(|before| {
            (before.slot, before.root_uid, before.root_gid)
                == (container.slot, container.root_uid, container.root_gid)
        });
        if !same_files {
            stale.extend(inner.remove(&container.key));
        }
        inner.by_slug.insert(slug, container.slot);
        inner.by_slot.insert(container.slot, Arc::new(container));
        Ok(stale)
    }

    /// Notes a container's init. `false`: there is no such container.
    pub fn set_init(&self, key: &ContainerKey, init: Process, cgroup: Option<CgroupPath>) -> bool {
        let mut inner = self.write();
        let slot = inner.by_slug.get(&key.slug()).copied();
        let Some(container) = slot.and_then(|slot| inner.by_slot.get_mut(&slot)) else { return false };
        *container = Arc::new(Container { init: Some(init), cgroup, ..Container::clone(container) });
        true
    }

    pub fn remove(&self, key: &ContainerKey) -> Option<Stale> {
        self.write().remove(key)
    }

    pub fn slot_of(&self, slug: &str) -> Option<Slot> {
        self.read().by_slug.get(slug).copied()
    }

    pub fn get(&self, slot: Slot) -> Option<Arc<Container>> {
        self.read().by_slot.get(&slot).cloned()
    }

    /// In the order of their slots.
    pub fn all(&self) -> Vec<Arc<Container>> {
        let mut all: Vec<_> = self.read().by_slot.values().cloned().collect();
        all.sort_by_key(|container| container.slot);
        all
    }

    /// If it is empty, it stays so: nothing can be added any more.
    pub fn close_if_empty(&self) -> bool {
        let mut inner = self.write();
        inner.closed = inner.by_slot.is_empty();
        inner.closed
    }

    // No panic can happen while the lock is held, so what it guards is whole even if it says otherwise.
    fn read(&self) -> RwLockReadGuard<'_, Inner> {
        self.0.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Inner> {
        self.0.write().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    fn remove(&mut self, key: &ContainerKey) -> Option<Stale> {
        let slug = key.slug();
        let slot = self.by_slug.remove(&slug)?;
        self.by_slot.remove(&slot);
        Some(Stale { slug, slot })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::{Path, PathBuf};
    use sysbox_ipc::mgr::Rootfs;
    use sysbox_ipc::{ContainerId, IdMap, IdRange};

    fn key(id: &str) -> ContainerKey {
        ContainerKey::new(Path::new("/run/r"), ContainerId::parse(id).unwrap())
    }

    fn container(id: &str, slot: u32) -> Container {
        Container::new(key(id), Slot(slot), 1000, 2000)
    }

    fn stale(id: &str, slot: u32) -> Stale {
        Stale { slug: key(id).slug(), slot: Slot(slot) }
    }

    const INIT: Process = Process { pid: 7, start_ticks: 8 };

    #[test]
    fn what_is_added_is_found_until_it_is_removed() {
        let registry = Registry::default();
        assert_eq!(registry.add(container("a", 5), |_| true), Ok(vec![]));
        assert_eq!(registry.slot_of(&key("a").slug()), Some(Slot(5)));
        assert_eq!(registry.get(Slot(5)).as_deref(), Some(&container("a", 5)));
        assert!(registry.set_init(&key("a"), INIT, None));
        assert_eq!(registry.get(Slot(5)).unwrap().init, Some(INIT));
        assert!(!registry.set_init(&key("b"), INIT, None));
        assert_eq!(registry.remove(&key("a")), Some(stale("a", 5)));
        assert_eq!((registry.remove(&key("a")), registry.get(Slot(5))), (None, None));
    }

    #[test]
    fn a_repetition_is_no_news_and_a_change_is() {
        let registry = Registry::default();
        registry.add(container("a", 5), |_| true).unwrap();
        assert_eq!(registry.add(container("a", 5), |_| true), Ok(vec![]));
        assert_eq!(registry.add(container("a", 6), |_| true), Ok(vec![stale("a", 5)]));
        assert_eq!(registry.get(Slot(5)), None);
        let other_ids = Container { root_uid: 9, ..container("a", 6) };
        assert_eq!(registry.add(other_ids, |_| true), Ok(vec![stale("a", 6)]));
        assert_eq!(registry.all().len(), 1);
    }

    #[test]
    fn a_slot_changes_hands_only_when_its_container_is_dead() {
        let registry = Registry::default();
        registry.add(container("a", 5), |_| true).unwrap();
        registry.set_init(&key("a"), INIT, None);
        let refused = registry.add(container("b", 5), |_| true).unwrap_err();
        assert_eq!(refused.message, "slot 5 belongs to container a, which runs");
        assert_eq!(refused.kind, RefusalKind::Busy);
        assert_eq!(registry.add(container("b", 5), |_| false), Ok(vec![stale("a", 5)]));
        assert_eq!(registry.slot_of(&key("a").slug()), None);
    }

    #[test]
    fn it_closes_when_it_is_empty() {
        let registry = Registry::default();
        registry.add(container("a", 5), |_| true).unwrap();
        assert!(!registry.close_if_empty());
        registry.add(container("b", 6), |_| true).unwrap();
        registry.remove(&key("a"));
        registry.remove(&key("b"));
        assert!(registry.close_if_empty());
        assert_eq!(registry.add(container("a", 5), |_| true).unwrap_err().kind, RefusalKind::Internal);
    }

    #[test]
    fn records_of_stopped_containers_have_no_files() {
        let runtime = Process { pid: 3, start_ticks: 4 };
        for (phase, expected) in [
            (Phase::Stopped, None),
            (Phase::Creating { runtime }, Some(None)),
            (Phase::Running { init: INIT }, Some(Some(INIT))),
        ] {
            let record = Record {
                version: 1,
                key: key("a"),
                slot: 5,
                id_map: IdMap::of_range(IdRange { start: 100_000, count: 65536 }).unwrap(),
                allocated: true,
                bundle: PathBuf::from("/b"),
                rootfs: Rootfs::Directory { path: PathBuf::from("/r") },
                layers: None,
                netns: None,
                users: None,
                claims: vec![],
                phase,
            };
            let made = Container::of_record(record);
            assert_eq!(made.as_ref().map(|container| container.init), expected);
            assert!(
                made.is_none_or(|container| (container.root_uid, container.root_gid) == (100_000, 100_000))
            );
        }
    }
}
