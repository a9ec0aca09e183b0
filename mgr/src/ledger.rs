//! Who has which ids: decides over the set of records, and nothing else. Pure: liveness and what the disk shows are
//! passed in; a decision is a value which [`Ledger::commit`] or [`Ledger::remove`] makes true after it is on disk.
//!
//! Invariant, kept by `register` and tested below: of two live containers with allocated ids, the id ranges are disjoint,
//! unless both share a network namespace; then their maps are the same. Slots are never shared.

use std::collections::{BTreeMap, BTreeSet};

use sysbox_ipc::ids::DEFAULT_IDS;
use sysbox_ipc::mgr::{Claim, FileId, Phase, Process, Record, Register, Rootfs};
use sysbox_ipc::{ContainerKey, IdMap, IdMapLine, IdRange, Refusal, RefusalKind};

/// Of the records this manager writes.
pub const RECORD_VERSION: u32 = 1;

/// Ids inside a pool that are never handed out, as others on the host give them a meaning
/// (<https://systemd.io/UIDS-GIDS>): the system's own, and systemd's foreign ids.
pub const RESERVED: &[IdRange] =
    &[IdRange { start: 0, count: 65536 }, IdRange { start: 0x7ffe_0000, count: 65536 }];

/// What a record file that we cannot use still keeps taken.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Foreign {
    pub ids: Vec<IdRange>,
    pub slot: Option<u32>,
}

/// What the host shows of a record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Seen {
    /// The process of the record's phase runs.
    pub alive: bool,
    pub layer: Layer,
    /// The runtime's own state directory of the container is there.
    pub state: bool,
}

/// The writable layer of an overlay rootfs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layer {
    Present,
    Gone,
    /// The file system it is on is not mounted, or the rootfs is no overlay.
    Unknown,
}

/// What becomes of a record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fate {
    Keep,
    /// It waits for `docker start` or for the end of its layer.
    Stop,
    Remove,
}

/// What `register` decided.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Registered {
    pub record: Record,
    pub share_with: Option<Process>,
    /// A live container on the same rootfs directory.
    pub same_rootfs: Option<ContainerKey>,
    /// For the log.
    pub warnings: Vec<String>,
}

/// What `release` decided.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Release {
    /// No such record; a delete may be repeated.
    Unknown,
    /// The process still runs: decide again when it has ended.
    WhenEnded,
    Now(Fate),
}

/// The records, and the ids they share out.
#[derive(Debug)]
pub struct Ledger {
    pool: IdRange,
    host_netns: Option<FileId>,
    records: BTreeMap<ContainerKey, Record>,
    foreign: Vec<Foreign>,
}

/// The namespaces by which two containers may have ids in common.
#[derive(Debug, Clone, Copy, Default)]
pub struct Common {
    pub netns: Option<FileId>,
    pub users: Option<FileId>,
}

impl Common {
    fn is_shared_by(self, other: &Record) -> bool {
        let same = |one: Option<FileId>, two| one.is_some() && one == two;
        same(self.netns, other.netns) || same(self.users, other.users)
    }
}

impl Ledger {
    /// An empty ledger over `pool`. Containers in `host_netns` have their own user namespaces all the same.
    pub fn new(pool: IdRange, host_netns: Option<FileId>) -> Self {
        Self { pool, host_netns, records: BTreeMap::new(), foreign: Vec::new() }
    }

    /// Ids and slots that stay taken though no record explains them.
    pub fn set_aside(&mut self, foreign: Foreign) {
        self.foreign.push(foreign);
    }

    pub fn commit(&mut self, record: Record) {
        self.records.insert(record.key.clone(), record);
    }

    pub fn remove(&mut self, key: &ContainerKey) -> Option<Record> {
        self.records.remove(key)
    }

    pub fn get(&self, key: &ContainerKey) -> Option<&Record> {
        self.records.get(key)
    }

    pub fn records(&self) -> impl Iterator<Item = &Record> {
        self.records.values()
    }

    /// The records whose keys come after `key`, in order.
    pub fn records_after(&self, key: Option<&ContainerKey>) -> impl Iterator<Item = &Record> {
        use std::ops::Bound::{Excluded, Unbounded};
        let from = key.map_or(Unbounded, Excluded);
        self.records.range::<ContainerKey, _>((from, Unbounded)).map(|(_, record)| record)
    }

    /// # Errors
    /// `Malformed` for values that contradict each other, `Exists` for a live container of this name, `Busy` for a claim
    /// that another one holds, `Exhausted`.
    pub fn register(
        &self,
        request: &Register,
        alive: &dyn Fn(Process) -> bool,
    ) -> Result<Registered, Refusal> {
        check(request)?;
        let existing = self.records.get(&request.key);
        if let Some(record) = existing {
            let again = matches!(record.phase, Phase::Creating { runtime } if runtime == request.runtime);
            if !again && is_live(record, alive) {
                let state =
                    if matches!(record.phase, Phase::Running { .. }) { "running" } else { "being created" };
                let text = format!("register container `{}`: it exists and is {state}", request.key);
                return Err(Refusal::new(RefusalKind::Exists, text));
            }
        }
        self.check_claims(request, alive)?;

        let mut warnings = Vec::new();
        let partner = self.partner(request, alive);
        let theirs = partner.and_then(|(record, _)| record.users);
        let (id_map, allocated, share_with) = match (&request.id_map, partner) {
            (Some(own), partner) => {
                warnings.extend(self.judge_own_map(request, own, partner));
                let share = partner.filter(|(record, _)| record.id_map == *own).map(|(_, init)| init);
                (own.clone(), false, share)
            }
            (None, Some((record, init))) => (record.id_map.clone(), record.allocated, Some(init)),
            (None, None) => {
                let kept = existing.and_then(|record| self.kept_map(record, alive));
                (kept.map_or_else(|| self.new_map(request, alive), Ok)?, true, None)
            }
        };
        let users = theirs.filter(|_| share_with.is_some());
        let record = Record {
            version: RECORD_VERSION,
            key: request.key.clone(),
            slot: existing.map_or_else(|| self.free_slot(), |record| record.slot),
            id_map,
            allocated,
            bundle: request.bundle.clone(),
            rootfs: request.rootfs.clone(),
            layers: None,
            netns: request.netns,
            users,
            claims: request.claims.clone(),
            phase: Phase::Creating { runtime: request.runtime },
        };
        let same_rootfs = self.same_rootfs(request, alive);
        Ok(Registered { record, share_with, same_rootfs, warnings })
    }

    /// The record of a container whose init exists, in the namespaces `seen`.
    ///
    /// # Errors
    /// `NotFound` if nobody registered it, `Exists` if another init runs under this name.
    pub fn started(
        &self,
        key: &ContainerKey,
        init: Process,
        seen: Common,
        alive: &dyn Fn(Process) -> bool,
    ) -> Result<Record, Refusal> {
        let refuse = |kind, why: &str| Err(Refusal::new(kind, format!("start container `{key}`: {why}")));
        let Some(record) = self.records.get(key) else {
            return refuse(RefusalKind::NotFound, "it is not registered");
        };
        let common = Common { netns: record.netns.or(seen.netns), users: seen.users.or(record.users) };
        match record.phase {
            // Its runtime ended before this message was read, and the container whose ids it shared has taken them back.
            Phase::Creating { runtime } if !alive(runtime) && self.is_used_apart(record, common, alive) => {
                return refuse(RefusalKind::NotFound, "its registration is over, and others have its ids");
            }
            Phase::Creating { .. } => {}
            Phase::Running { init: known } if known == init => {}
            Phase::Running { init: known } if alive(known) => {
                return refuse(
                    RefusalKind::Exists,
                    &format!("its init is process {}, which runs", known.pid),
                );
            }
            Phase::Running { .. } | Phase::Stopped => {
                return refuse(RefusalKind::NotFound, "its registration is over");
            }
        }
        let Common { netns, users } = common;
        Ok(Record { netns, users, phase: Phase::Running { init }, ..record.clone() })
    }

    pub fn release(&self, key: &ContainerKey, seen: Seen) -> Release {
        match self.records.get(key) {
            None => Release::Unknown,
            Some(record) if seen.alive && matches!(record.phase, Phase::Running { .. }) => Release::WhenEnded,
            Some(record) => Release::Now(match (&record.rootfs, seen.layer) {
                (Rootfs::Overlay { .. }, Layer::Present) => Fate::Stop,
                _ => Fate::Remove,
            }),
        }
    }

    fn check_claims(&self, request: &Register, alive: &dyn Fn(Process) -> bool) -> Result<(), Refusal> {
        let held = |claim: &Claim| {
            self.records
                .values()
                .filter(|record| record.key != request.key && is_live(record, alive))
                .find(|record| record.claims.iter().any(|other| other.meets(claim)))
        };
        for claim in &request.claims {
            if let Some(holder) = held(claim) {
                let text = format!(
                    "directory `{}` on {} of container `{}`: it is in use by running container `{}`",
                    claim.source.display(),
                    claim.data_root,
                    request.key,
                    holder.key
                );
                let hint = format!(
                    "stop `{}` first, give each container a directory of its own there, or mount it read-only",
                    holder.key
                );
                return Err(Refusal::new(RefusalKind::Busy, text).with_hint(hint));
            }
        }
        Ok(())
    }

    fn same_rootfs(&self, request: &Register, alive: &dyn Fn(Process) -> bool) -> Option<ContainerKey> {
        let others = self.records.values().filter(|record| record.key != request.key);
        let on_it = |record: &&Record| {
            matches!(record.rootfs, Rootfs::Directory { .. }) && record.rootfs == request.rootfs
        };
        others.filter(on_it).find(|record| is_live(record, alive)).map(|record| record.key.clone())
    }

    /// The running container whose network namespace is joined, or else one whose user namespace owns what is joined.
    fn partner(&self, request: &Register, alive: &dyn Fn(Process) -> bool) -> Option<(&Record, Process)> {
        let netns = request.netns.filter(|netns| Some(*netns) != self.host_netns);
        let find = |wanted: Common| {
            let others = self.records.values().filter(|record| record.key != request.key);
            others.filter(|record| wanted.is_shared_by(record)).find_map(|record| match record.phase {
                Phase::Running { init } if alive(init) => Some((record, init)),
                _ => None,
            })
        };
        let by_network = find(Common { netns, users: None });
        by_network.or_else(|| find(Common { netns: None, users: request.users }))
    }

    fn judge_own_map(
        &self,
        request: &Register,
        own: &IdMap,
        partner: Option<(&Record, Process)>,
    ) -> Vec<String> {
        let mut warnings = Vec::new();
        if ranges(own).any(|range| range.overlaps(self.pool)) {
            warnings.push(format!(
                "the id map in the spec of `{}` overlaps the ids of user `sysbox`",
                request.key
            ));
        }
        if let Some((record, _)) = partner.filter(|(record, _)| record.id_map != *own) {
            warnings.push(format!(
                "`{}` joins the network namespace of `{}` with another id map: it will lack rights over its network",
                request.key, record.key
            ));
        }
        warnings
    }

    /// The ids a container had before, if nobody alive uses them now (who shared its network namespace may).
    fn kept_map(&self, record: &Record, alive: &dyn Fn(Process) -> bool) -> Option<IdMap> {
        let inside = ranges(&record.id_map)
            .all(|range| self.pool.contains(range.start) && range.end() <= self.pool.end());
        (record.allocated && inside && !self.is_used_apart(record, Common::default(), alive))
            .then(|| record.id_map.clone())
    }

    /// Whether a live container has ids of this record without sharing a namespace with it that is in `common`.
    fn is_used_apart(&self, record: &Record, common: Common, alive: &dyn Fn(Process) -> bool) -> bool {
        self.records
            .values()
            .filter(|other| other.key != record.key && is_live(other, alive) && !common.is_shared_by(other))
            .any(|other| overlap(&other.id_map, &record.id_map))
    }

    fn new_map(&self, request: &Register, alive: &dyn Fn(Process) -> bool) -> Result<IdMap, Refusal> {
        self.free_range().and_then(IdMap::of_range).ok_or_else(|| {
            let live = self.records.values().filter(|record| is_live(record, alive)).count();
            let text = format!(
                "allocate ids for container `{}`: all ranges of {DEFAULT_IDS} ids in {}..{} are taken ({live} containers \
                 run, {} are stopped)",
                request.key,
                self.pool.start,
                self.pool.end(),
                self.records.len() - live
            );
            Refusal::new(RefusalKind::Exhausted, text).with_hint(
                "remove stopped containers, or enlarge the `sysbox` lines of /etc/subuid and /etc/subgid and restart \
                 sysbox-mgr",
            )
        })
    }

    /// The first block of the pool that overlaps nothing known.
    fn free_range(&self) -> Option<IdRange> {
        let mut taken = vec![false; usize::try_from(self.pool.count / DEFAULT_IDS).ok()?];
        let known = self.records.values().flat_map(|record| ranges(&record.id_map));
        let foreign = self.foreign.iter().flat_map(|foreign| foreign.ids.iter().copied());
        for range in known.chain(foreign).chain(RESERVED.iter().copied()).filter(|r| r.overlaps(self.pool)) {
            let first = range.start.saturating_sub(self.pool.start) / DEFAULT_IDS;
            let last = (range.end() - 1 - u64::from(self.pool.start)) / u64::from(DEFAULT_IDS);
            for block in u64::from(first)..=last {
                if let Some(block) = usize::try_from(block).ok().and_then(|block| taken.get_mut(block)) {
                    *block = true;
                }
            }
        }
        let block = u32::try_from(taken.iter().position(|taken| !taken)?).ok()?;
        Some(IdRange { start: self.pool.start + block * DEFAULT_IDS, count: DEFAULT_IDS })
    }

    fn free_slot(&self) -> u32 {
        let known = self.records.values().map(|record| record.slot);
        let taken: BTreeSet<u32> =
            known.chain(self.foreign.iter().filter_map(|foreign| foreign.slot)).collect();
        (0..).zip(&taken).find(|(free, taken)| free != *taken).map_or(taken.len(), |(free, _)| free as usize)
            as u32
    }
}

/// What becomes of a record when its process, its layer or the manager's own start says that something changed.
pub fn fate(record: &Record, seen: Seen) -> Fate {
    if seen.alive {
        return Fate::Keep;
    }
    match (&record.rootfs, seen.layer, record.phase) {
        (Rootfs::Overlay { .. }, Layer::Gone, _) => Fate::Remove,
        // The registration is void, as the runtime died before `Started`; the layer decides about the rest.
        (Rootfs::Overlay { .. }, _, Phase::Creating { .. }) => Fate::Stop,
        (Rootfs::Overlay { .. }, _, _) => Fate::Keep,
        // Whoever deletes the container has its runtime state to go by; without that, nobody will.
        (Rootfs::Directory { .. }, _, Phase::Running { .. } | Phase::Stopped) if seen.state => Fate::Keep,
        (Rootfs::Directory { .. }, _, _) => Fate::Remove,
    }
}

/// The process on whose life the record's present phase depends.
pub fn process_of(record: &Record) -> Option<Process> {
    match record.phase {
        Phase::Creating { runtime } => Some(runtime),
        Phase::Running { init } => Some(init),
        Phase::Stopped => None,
    }
}

/// The host ids of a map, uids and gids.
pub fn ranges(map: &IdMap) -> impl Iterator<Item = IdRange> + '_ {
    let range = |line: &IdMapLine| IdRange { start: line.outside, count: line.count };
    map.uids().iter().chain(map.gids()).map(range)
}

fn overlap(one: &IdMap, two: &IdMap) -> bool {
    ranges(one).any(|a| ranges(two).any(|b| a.overlaps(b)))
}

fn is_live(record: &Record, alive: &dyn Fn(Process) -> bool) -> bool {
    process_of(record).is_some_and(alive)
}

fn check(request: &Register) -> Result<(), Refusal> {
    let rootfs: &[&std::path::Path] = match &request.rootfs {
        Rootfs::Overlay { merged, upper } => &[merged, upper],
        Rootfs::Directory { path } => &[path],
    };
    let sources = request.claims.iter().map(|claim| claim.source.as_path());
    let paths = [request.key.root.as_path(), &request.bundle]
        .into_iter()
        .chain(rootfs.iter().copied())
        .chain(sources);
    for path in paths {
        if !path.is_absolute() {
            let text =
                format!("register container `{}`: `{}` is not an absolute path", request.key, path.display());
            return Err(Refusal::new(RefusalKind::Malformed, text));
        }
    }
    if request.runtime.pid <= 0 {
        let text = format!("register container `{}`: {} is no process id", request.key, request.runtime.pid);
        return Err(Refusal::new(RefusalKind::Malformed, text));
    }
    Ok(())
}

#[cfg(test)]
#[path = "ledger_tests.rs"]
mod tests;
