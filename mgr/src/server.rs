//! The conversation: requests in, replies out, one thread. Joins the ledger's decisions with the store and the watches;
//! whatever is decided is on disk before anybody is told.
//!
//! A slow or silent peer holds up nobody: a message is read only when all of it is there, and a reply is written only where
//! it fits at once.

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use sysbox_ipc::mgr::{Defaults, Grant, HostFacts, Phase, Process, Record, Register, Reply, Request, Rootfs};
use sysbox_ipc::{ContainerKey, Hello, MAX_MESSAGE, PROTOCOL_VERSION, Refusal, RefusalKind};
use sysbox_sys::process::is_alive;
use sysbox_sys::socket::{Connection, Listener, SocketError};
use tracing::{debug, error, info, trace, warn};

use crate::aside::Upper;
use crate::coherence::{Coherence, Target};
use crate::in_full;
use crate::ledger::{Fate, Layer, Ledger, Release, fate, process_of, ranges};
use crate::observe;
use crate::store::Store;
use crate::vault::Vault;
use crate::volumes::Volumes;
use crate::watch::{Watch, Woken};

/// How long a new peer may take for its Hello.
const HELLO_WITHIN: Duration = Duration::from_secs(5);
/// Most peers at a time. Only root can connect; this bounds mistakes.
const MOST_PEERS: usize = 512;
/// Room for the records in one reply; the rest of a message is for the words around them.
const PAGE: usize = MAX_MESSAGE - 1024;

#[derive(Debug)]
pub struct Server {
    ledger: Ledger,
    kept: Kept,
    watch: Watch,
    facts: HostFacts,
    defaults: Defaults,
    vault: Vault,
    coherence: Option<Coherence>,
    peers: BTreeMap<u64, Peer>,
    /// Deleted by the engine while their init still ran.
    releasing: BTreeSet<ContainerKey>,
}

/// What is on disk.
#[derive(Debug)]
pub struct Kept {
    pub store: Store,
    pub volumes: Volumes,
}

#[derive(Debug)]
struct Peer {
    connection: Connection,
    /// Until it has said Hello: when it must have.
    hello_until: Option<Instant>,
}

/// What a request leads to, apart from a refusal.
enum Answer<'a> {
    Reply(Reply),
    Descriptor(BorrowedFd<'a>),
}

impl Server {
    /// Takes over the records found at start: what has ended meanwhile is dealt with, the rest is watched again.
    pub fn new(
        ledger: Ledger,
        kept: Kept,
        watch: Watch,
        facts: HostFacts,
        defaults: Defaults,
        coherence: Option<Coherence>,
    ) -> Self {
        let (vault, peers, releasing) = (Vault::default(), BTreeMap::new(), BTreeSet::new());
        let mut server = Self { ledger, kept, watch, facts, defaults, vault, coherence, peers, releasing };
        server.sweep();
        let kept: Vec<Record> = server.ledger.records().cloned().collect();
        for record in kept {
            server.watch_all(&record);
        }
        server
    }

    /// Serves until a signal comes; then the caller decides, and may call again.
    ///
    /// # Errors
    /// epoll failing, which nothing can be done about.
    pub fn serve(&mut self, listener: &Listener) -> sysbox_sys::Result<()> {
        loop {
            let next_hello = self.peers.values().filter_map(|peer| peer.hello_until).min();
            let timeout = next_hello.map(|deadline| deadline.saturating_duration_since(Instant::now()));
            let mut signalled = false;
            for woken in self.watch.wait(timeout)? {
                match woken {
                    Woken::Signal => signalled = true,
                    Woken::Peer(number) => self.hear(number),
                    Woken::Listener => self.accept(listener),
                    Woken::Ended(key) => self.ended(&key),
                    Woken::Layers(keys) => keys.iter().for_each(|key| self.look_again(key)),
                }
            }
            let now = Instant::now();
            self.peers.retain(|_, peer| peer.hello_until.is_none_or(|deadline| deadline > now));
            if signalled {
                return Ok(());
            }
        }
    }

    fn accept(&mut self, listener: &Listener) {
        let connection = match listener.accept() {
            Ok(connection) => connection,
            Err(error) => return debug!(%error, "accept"),
        };
        if self.peers.len() >= MOST_PEERS {
            return warn!(most = MOST_PEERS, "too many connections: a new one is closed");
        }
        // Messages are read when they are there; the limit is for what cannot happen.
        let watched = connection.set_timeout(HELLO_WITHIN).and_then(|()| self.watch.peer(&connection));
        match watched {
            Ok(number) => {
                let hello_until = Some(Instant::now() + HELLO_WITHIN);
                self.peers.insert(number, Peer { connection, hello_until });
            }
            Err(error) => warn!(%error, "a connection is closed"),
        }
    }

    fn hear(&mut self, number: u64) {
        // Out of the map while it is served: whatever goes wrong closes it.
        let Some(mut peer) = self.peers.remove(&number) else { return };
        let stays = match peer.connection.recv::<Request>() {
            Ok(None) => false,
            Ok(Some((request, fds))) => self.answer(&mut peer, request, fds),
            Err(SocketError::Malformed(error)) => {
                let text = format!("read a message: {error}");
                reply(&peer.connection, &Reply::Refused(Refusal::new(RefusalKind::Malformed, text)), None);
                false
            }
            Err(error) => {
                debug!(%error, "a connection ends");
                false
            }
        };
        if stays {
            self.peers.insert(number, peer);
        }
    }

    fn answer(&mut self, peer: &mut Peer, request: Request, fds: Vec<OwnedFd>) -> bool {
        trace!(?request, "request");
        if let Request::Hello(hello) = &request {
            let refused = judge_hello(hello);
            peer.hello_until = None;
            let answer = refused
                .clone()
                .map_or_else(|| Reply::Hello(Hello::from_program("sysbox-mgr")), Reply::Refused);
            return reply(&peer.connection, &answer, None) && refused.is_none();
        }
        if peer.hello_until.is_some() {
            let refusal = Refusal::new(RefusalKind::Version, "the first message has to be a hello");
            reply(&peer.connection, &Reply::Refused(refusal), None);
            return false;
        }
        match self.decide(request, fds) {
            Ok(Answer::Reply(answer)) => reply(&peer.connection, &answer, None),
            Ok(Answer::Descriptor(fd)) => reply(&peer.connection, &Reply::Descriptor, Some(fd)),
            Err(refusal) => {
                debug!(kind = ?refusal.kind, why = refusal.message, "refused");
                reply(&peer.connection, &Reply::Refused(refusal), None)
            }
        }
    }

    fn decide(&mut self, request: Request, fds: Vec<OwnedFd>) -> Result<Answer<'_>, Refusal> {
        let done = |()| Answer::Reply(Reply::Done);
        match request {
            Request::Register(request) => {
                self.register(&request).map(|grant| Answer::Reply(Reply::Granted(Box::new(grant))))
            }
            Request::Started { key, init } => self.started(&key, init).map(done),
            Request::MakeVolumes { key, names, uid, gid } => {
                self.make_volumes(&key, &names, (uid, gid)).map(done)
            }
            Request::Release { key } => self.release(&key).map(done),
            Request::Facts => Ok(Answer::Reply(Reply::Facts(self.facts.clone()))),
            Request::Records { after } => Ok(Answer::Reply(self.page_of_records(after.as_ref()))),
            Request::VaultPut { name } => self.vault.put(name, fds).map(done),
            Request::VaultGet { name } => self.vault.get(&name).map(Answer::Descriptor),
            Request::VaultDrop { name } => {
                self.vault.drop(&name);
                Ok(done(()))
            }
            Request::Hello(_) => Err(Refusal::new(RefusalKind::Malformed, "a second hello")),
        }
    }

    fn register(&mut self, request: &Register) -> Result<Grant, Refusal> {
        if let Some(path) = self.kept.store.blocks(&request.key) {
            let text =
                format!("register container `{}`: its record {} is unusable", request.key, path.display());
            let hint = "it may be of a newer sysbox-mgr: install that one, or move the file away";
            return Err(Refusal::new(RefusalKind::Internal, text).with_hint(hint));
        }
        let registered = match self.ledger.register(request, &is_alive) {
            Err(refusal) if refusal.kind == RefusalKind::Exhausted => {
                // Something may have ended without our being told.
                self.sweep();
                self.ledger.register(request, &is_alive)?
            }
            other => other?,
        };
        let mut record = registered.record;
        record.layers = observe::layers_of(&record.rootfs);
        match self.watch.process(&record.key, request.runtime) {
            Ok(true) => {}
            Ok(false) => {
                let text = format!(
                    "register container `{}`: process {} does not run",
                    record.key, request.runtime.pid
                );
                return Err(Refusal::new(RefusalKind::Malformed, text));
            }
            Err(error) => return Err(internal(&error)),
        }
        self.put(record.clone())?;
        self.watch_layer(&record);
        recover(&record);
        for why in registered.warnings {
            warn!(container = %record.key, why, "id map");
        }
        let (slot, root_uid) = (record.slot, record.id_map.root_uid());
        let shared = registered.share_with.is_some();
        info!(container = %record.key, slot, root_uid, allocated = record.allocated, shared, "registered");
        self.releasing.remove(&record.key);
        let volumes = self.kept.volumes.of(&request.key);
        Ok(Grant {
            id_map: record.id_map,
            slot,
            share_with: registered.share_with,
            same_rootfs: registered.same_rootfs,
            facts: self.facts.clone(),
            defaults: self.defaults,
            volumes,
        })
    }

    fn make_volumes(
        &mut self,
        key: &ContainerKey,
        names: &[String],
        owner: (u32, u32),
    ) -> Result<(), Refusal> {
        // Without a record nobody would take them away again.
        if !self.ledger.get(key).is_some_and(|record| matches!(record.phase, Phase::Creating { .. })) {
            let text = format!("make volumes for container `{key}`: it is not being created");
            return Err(Refusal::new(RefusalKind::NotFound, text));
        }
        self.kept.volumes.make(key, names, owner).map_err(|error| internal(&error))
    }

    fn started(&mut self, key: &ContainerKey, init: Process) -> Result<(), Refusal> {
        let record = self.ledger.started(key, init, observe::common_of(init.pid), &is_alive)?;
        let runs = self.watch.process(key, init);
        self.put(record.clone())?;
        info!(container = %key, pid = init.pid, "started");
        match runs {
            Ok(true) => self.cohere(&record, false),
            // An init may be gone before its runtime tells of it.
            Ok(false) => self.ended(key),
            Err(error) => return Err(internal(&error)),
        }
        Ok(())
    }

    fn release(&mut self, key: &ContainerKey) -> Result<(), Refusal> {
        let Some(record) = self.ledger.get(key).cloned() else { return Ok(()) };
        match self.ledger.release(key, observe::seen(&record)) {
            Release::Unknown => Ok(()),
            Release::WhenEnded => {
                debug!(container = %key, "released while its init runs: waiting for its end");
                self.releasing.insert(key.clone());
                Ok(())
            }
            Release::Now(fate) => self.carry_out(record, fate, "released"),
        }
    }

    /// The process of the record's phase is gone.
    fn ended(&mut self, key: &ContainerKey) {
        debug!(container = %key, "its process ended");
        if let Some(coherence) = &self.coherence {
            coherence.forget(key);
        }
        if self.releasing.remove(key) {
            if let Err(refusal) = self.release(key) {
                error!(container = %key, why = %refusal, "cannot release");
            }
        } else {
            self.look_again(key);
        }
    }

    /// Something about the container changed: does its record still stand for anything?
    fn look_again(&mut self, key: &ContainerKey) {
        let Some(record) = self.ledger.get(key).cloned() else { return };
        let mut fate = fate(&record, observe::seen(&record));
        if fate == Fate::Remove && matches!(record.phase, Phase::Creating { .. }) {
            // A runtime that was killed may have left an init behind: its ids are not free while it lives.
            let left = ranges(&record.id_map).flat_map(observe::ids_in_use).next();
            if let Some((pid, _)) = left {
                warn!(container = %key, pid, "its runtime died and left a process: its ids stay taken until it is deleted");
                fate = Fate::Keep;
            }
        }
        let why = if matches!(record.phase, Phase::Creating { .. }) {
            "never started"
        } else {
            "its layer is gone"
        };
        if let Err(refusal) = self.carry_out(record, fate, why) {
            error!(container = %key, why = %refusal, "cannot change its record");
        }
    }

    fn sweep(&mut self) {
        let keys: Vec<ContainerKey> = self.ledger.records().map(|record| record.key.clone()).collect();
        for key in keys {
            self.look_again(&key);
        }
    }

    fn carry_out(&mut self, record: Record, fate: Fate, why: &str) -> Result<(), Refusal> {
        let key = record.key.clone();
        match fate {
            Fate::Keep => {}
            Fate::Stop if record.phase == Phase::Stopped => {}
            Fate::Stop => {
                self.watch.forget_process(&key);
                let stopped = Record { phase: Phase::Stopped, ..record };
                self.put(stopped.clone())?;
                info!(container = %key, why, "stopped: its ids wait for it");
                // The layer may have gone between the look at it and now; its watch tells only what comes later.
                if observe::layer(&stopped.rootfs, stopped.layers) == Layer::Gone {
                    self.look_again(&key);
                }
            }
            Fate::Remove => {
                // Before the record, by which they are known.
                self.kept.volumes.remove(&key).map_err(|error| internal(&error))?;
                self.kept.store.remove(&key).map_err(|error| internal(&error))?;
                self.ledger.remove(&key);
                self.watch.forget_process(&key);
                self.watch.forget_layer(&key);
                info!(container = %key, slot = record.slot, why, "removed: its ids are free");
            }
        }
        Ok(())
    }

    fn put(&mut self, record: Record) -> Result<(), Refusal> {
        self.kept.store.write(&record).map_err(|error| internal(&error))?;
        self.ledger.commit(record);
        Ok(())
    }

    fn watch_all(&mut self, record: &Record) {
        self.watch_layer(record);
        let Some(process) = process_of(record) else { return recover(record) };
        match self.watch.process(&record.key, process) {
            Ok(true) => self.cohere(record, true),
            Ok(false) => {
                recover(record);
                self.look_again(&record.key);
            }
            Err(error) => error!(container = %record.key, %error, "cannot watch its process"),
        }
    }

    /// Keeps the container's overlay and the engine's alike, from now until its init ends.
    fn cohere(&self, record: &Record, is_found_running: bool) {
        let (Rootfs::Overlay { merged, upper }, Phase::Running { init }) = (&record.rootfs, record.phase)
        else {
            return;
        };
        if let Some(coherence) = &self.coherence {
            let (key, merged, upper) = (record.key.clone(), merged.clone(), upper.clone());
            coherence.watch(Target { key, init, merged, upper, is_found_running });
        }
    }

    fn watch_layer(&mut self, record: &Record) {
        let Rootfs::Overlay { upper, .. } = &record.rootfs else { return };
        if let Err(error) = self.watch.layer(&record.key, upper) {
            // Freed at the next start of the manager, or when ids run out, if not by `delete`.
            warn!(container = %record.key, %error, "cannot watch its layer: its ids may stay taken longer than it lives");
        }
    }

    fn page_of_records(&self, after: Option<&ContainerKey>) -> Reply {
        let (mut records, mut bytes, mut more) = (Vec::new(), 0, false);
        for record in self.ledger.records_after(after) {
            bytes += serde_json::to_vec(record).map_or(0, |text| text.len() + 1);
            if bytes > PAGE {
                more = true;
                break;
            }
            records.push(record.clone());
        }
        Reply::Records { records, more }
    }
}

/// Puts back what a manager that was killed had moved in the layer.
fn recover(record: &Record) {
    let Rootfs::Overlay { upper, .. } = &record.rootfs else { return };
    match Upper::open(upper).and_then(|upper| upper.recover()) {
        Err(error) if error.errno != Errno::ENOENT => {
            error!(container = %record.key, %error, "files that the engine wrote are in `sysbox-aside` beside the layer");
        }
        _ => {}
    }
}

fn internal(error: &dyn std::error::Error) -> Refusal {
    Refusal::new(RefusalKind::Internal, in_full(error))
}

fn judge_hello(hello: &Hello) -> Option<Refusal> {
    (hello.version != PROTOCOL_VERSION).then(|| {
        let text = format!(
            "`{:.40}` speaks protocol version {}, this sysbox-mgr speaks {PROTOCOL_VERSION}",
            hello.program, hello.version
        );
        Refusal::new(RefusalKind::Version, text)
            .with_hint("install programs of one release, and restart the daemons")
    })
}

/// Whether the peer took the reply.
fn reply(connection: &Connection, message: &Reply, fd: Option<BorrowedFd<'_>>) -> bool {
    // A peer that does not read its replies has filled its queue: it is not waited for.
    let mut ready = [PollFd::new(connection.as_fd(), PollFlags::POLLOUT)];
    if poll(&mut ready, PollTimeout::ZERO) != Ok(1) {
        warn!("a peer does not read its replies: it is disconnected");
        return false;
    }
    connection.send(message, fd.as_slice()).inspect_err(|error| debug!(%error, "reply")).is_ok()
}
