//! When the engine's overlay and the container's are made to agree: a thread that hears of what is done through the engine's
//! (fanotify) and has what is needed done, for each container in a thread of its own (`side`), as a container can make that wait.
//! This thread touches no file of a container. Nothing the container does makes an event.
//!
//! Three times. Before the engine comes to a container's files (`gate`), which it is held for: both sides are made ready. At
//! once, for each path that was opened or written: is it in the upper, and does the container see that? When it has been
//! quiet for a moment: both sides forget what they do not use, so that the next use starts right.
//!
//! Neither the thread nor its events are needed for a container to run: where they fail, what the engine did shows up late.

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::fanotify::{EventFFlags, Fanotify, FanotifyEvent, InitFlags, MarkFlags, MaskFlags};
use nix::sys::stat::fstat;
use nix::sys::statfs::{OVERLAYFS_SUPER_MAGIC, statfs};
use sysbox_ipc::ContainerKey;
use sysbox_sys::error::Named;
use sysbox_sys::{Result, SysError};
use tracing::{debug, error, warn};

use crate::ended::Ended;
use crate::gate::{Gate, Ticket};
use crate::observe::shares_overlay;
pub use crate::side::Target;
use crate::side::{Outcome, Side};
use crate::slot::{Line, Place, Slot, in_a_thread};

/// Once in so long one container's engine side is flushed without an event, in turn: a name that was looked for in vain, and a
/// directory that the container replaced while the engine was about to write to it, make none.
const TURN: Duration = Duration::from_millis(500);
/// How many containers are looked at in one turn.
const LOOKS: usize = 4;
/// How long a stop waits for the thread.
const PATIENCE: Duration = Duration::from_secs(2);

/// Who wants both sides to agree waits no longer.
const SETTLED: Duration = Duration::from_secs(30);

/// The thread.
#[derive(Debug)]
pub struct Coherence {
    fanotify: Arc<Fanotify>,
    gate: Option<Arc<Gate>>,
    line: Line,
    thread: Option<JoinHandle<()>>,
    /// Closed by the thread when it ends.
    ended: Receiver<()>,
}

#[derive(Debug)]
pub(crate) enum Command {
    Watch(Target),
    Forget(ContainerKey),
    Settle(ContainerKey, Sender<u64>),
    Gate(ContainerKey, Ticket),
    Back(ContainerKey, u64, Result<(Side, Outcome)>),
    Stop,
}

impl Coherence {
    /// # Errors
    /// No fanotify (CAP_SYS_ADMIN, CONFIG_FANOTIFY), no eventfd, no thread.
    pub fn start() -> Result<Self> {
        let flags = InitFlags::FAN_CLASS_NOTIF | InitFlags::FAN_CLOEXEC | InitFlags::FAN_NONBLOCK;
        // O_NONBLOCK: the kernel opens what an event is about, and that may be a FIFO.
        let opened = EventFFlags::O_RDONLY
            | EventFFlags::O_LARGEFILE
            | EventFFlags::O_CLOEXEC
            | EventFFlags::O_NONBLOCK;
        let fanotify = Fanotify::init(flags, opened).named(|| "fanotify_init(CLASS_NOTIF)".to_owned())?;
        let wake = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)
            .named(|| "eventfd".to_owned())?;
        let (fanotify, wake) = (Arc::new(fanotify), Arc::new(wake));
        let (commands, receiver) = channel();
        let (ending, ended) = channel();
        let line = Line { commands, wake };
        let told = line.clone();
        let gate = Gate::start(Box::new(move |key, ticket| told.tell(Command::Gate(key, ticket))));
        let gate = gate.map_err(|error| warn!(%error, "engines are not held: see docs/KERNEL.md"));
        let gate = gate.ok().map(Arc::new);
        let worker = Worker {
            fanotify: Arc::clone(&fanotify),
            gate: gate.clone(),
            commands: receiver,
            line: line.clone(),
            slots: BTreeMap::new(),
            places: 0,
            events: 0,
            turn: Turn { last: None, next_at: Instant::now() + TURN },
            ended: Ended::start()?,
        };
        let thread = std::thread::Builder::new()
            .name("coherence".into())
            .stack_size(256 * 1024)
            .spawn(move || {
                let _ending = ending;
                worker.run();
            })
            .named(|| "start the thread `coherence`".to_owned())?;
        Ok(Self { fanotify, gate, line, thread: Some(thread), ended })
    }

    /// When it returns, nothing that the engine does is missed any more.
    pub fn watch(&self, target: Target) {
        if shares_overlay(target.init, &target.merged) {
            // Whoever is held at the engine's overlay would be this process itself, too.
            return debug!(container = %target.key, "on its engine's own overlay: nothing to keep alike");
        }
        if let Err(error) = mark(&self.fanotify, MarkFlags::FAN_MARK_ADD, &target.merged) {
            return warn!(container = %target.key, %error, "not told of what the engine writes: it may show late");
        }
        if let Some(Err(error)) = self.gate.as_ref().map(|gate| gate.watch(&target.key, &target.merged)) {
            warn!(container = %target.key, %error, "its engine is not held before it writes");
        }
        self.line.tell(Command::Watch(target));
    }

    pub fn forget(&self, key: &ContainerKey) {
        self.line.tell(Command::Forget(key.clone()));
    }

    /// Has both sides agree now; returns when they do. The number of events there have been so far.
    pub fn settle(&self, key: &ContainerKey) -> u64 {
        let (sender, receiver) = channel();
        self.line.tell(Command::Settle(key.clone(), sender));
        // The thread being gone was told by `tell`; the container may have ended, or hold its own directories.
        receiver.recv_timeout(SETTLED).unwrap_or_default()
    }
}

impl Drop for Coherence {
    fn drop(&mut self) {
        self.line.tell(Command::Stop);
        // A file system that does not answer must not keep the daemon from stopping; the thread ends with the process.
        if self.ended.recv_timeout(PATIENCE) == Err(RecvTimeoutError::Timeout) {
            return warn!("the thread `coherence` does not come to an end");
        }
        if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            error!("the thread `coherence` panicked");
        }
    }
}

struct Worker {
    fanotify: Arc<Fanotify>,
    gate: Option<Arc<Gate>>,
    commands: Receiver<Command>,
    line: Line,
    slots: BTreeMap<ContainerKey, Slot>,
    /// Each slot has a number of its own, so that what comes back late goes to none but its own.
    places: u64,
    events: u64,
    turn: Turn,
    ended: Ended,
}

/// Whose engine side was flushed last, and when the next one's is due.
struct Turn {
    last: Option<ContainerKey>,
    next_at: Instant,
}

impl Worker {
    fn run(mut self) {
        loop {
            self.wait();
            // Cleared before the commands are read: one that comes in between wakes again.
            if let Err(errno) = self.line.wake.read() {
                debug_assert_eq!(errno, Errno::EAGAIN);
            }
            // Commands first: an event is of a container that is known by then.
            if !self.obey() {
                return;
            }
            self.hear();
            let now = Instant::now();
            for slot in self.slots.values_mut() {
                if slot.due.as_ref().is_some_and(|due| due.at <= now) {
                    slot.flush_due();
                }
            }
            if self.turn.next_at <= now {
                self.flush_next();
                self.look_next(now);
                self.slots.values_mut().for_each(Slot::tell_if_stuck);
            }
            self.slots.values_mut().for_each(|slot| slot.dispatch(&self.line));
        }
    }

    fn flush_next(&mut self) {
        use std::ops::Bound::{Excluded, Unbounded};
        let after = self.turn.last.as_ref().map_or(Unbounded, Excluded);
        let next = self.slots.range::<ContainerKey, _>((after, Unbounded)).next();
        let next = next.or_else(|| self.slots.iter().next()).map(|(key, _)| key.clone());
        if let Some(slot) = next.as_ref().and_then(|key| self.slots.get_mut(key)) {
            slot.wanted.flush_engine = true;
        }
        self.turn = Turn { last: next, next_at: Instant::now() + TURN };
    }

    /// Those whose time has come; first those that come often, as they are new or in use, and nobody last for ever.
    fn look_next(&mut self, now: Instant) {
        let is_due = |slot: &&mut Slot| {
            slot.next_look.at <= now && slot.due.is_none() && matches!(slot.place, Place::Here(_))
        };
        let mut slots: Vec<&mut Slot> = self.slots.values_mut().filter(is_due).collect();
        slots.sort_by_key(|slot| slot.next_look.at + slot.next_look.after);
        slots.into_iter().take(LOOKS).for_each(|slot| slot.wanted.look = true);
    }

    fn wait(&self) {
        let turn = (!self.slots.is_empty()).then_some(self.turn.next_at);
        let next = self.slots.values().filter_map(Slot::next).chain(turn).min();
        let limit = next.map_or(PollTimeout::NONE, |at| {
            let left = at.saturating_duration_since(Instant::now()).as_millis() + 1;
            PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX)
        });
        let mut ready = [
            PollFd::new(self.fanotify.as_fd(), PollFlags::POLLIN),
            PollFd::new(self.line.wake.as_fd(), PollFlags::POLLIN),
        ];
        if let Err(errno) = poll(&mut ready, limit) {
            debug_assert_eq!(errno, Errno::EINTR);
        }
    }

    /// Whether to go on.
    fn obey(&mut self) -> bool {
        while let Ok(command) = self.commands.try_recv() {
            match command {
                Command::Watch(target) => self.watch(target),
                Command::Forget(key) => self.forget(&key),
                Command::Settle(key, done) => {
                    self.hear();
                    if let Some(slot) = self.slots.get_mut(&key) {
                        slot.due = None;
                        slot.wanted.flush = true;
                        slot.wanted.answers.push((done, self.events));
                    }
                }
                Command::Gate(key, ticket) => {
                    // Where many have waited in vain, the next is not held.
                    if let Some(slot) = self.slots.get_mut(&key).filter(|slot| slot.is_able()) {
                        slot.wanted.gates.push(ticket);
                    }
                }
                Command::Back(key, number, done) => self.take_back(&key, number, done),
                Command::Stop => return false,
            }
        }
        true
    }

    fn watch(&mut self, target: Target) {
        let Target { key, merged, .. } = &target;
        self.retire(key);
        let engine_device = match nix::sys::stat::stat(merged) {
            Ok(facts) => facts.st_dev,
            Err(errno) => {
                warn!(container = %key, %errno, "not told of what the engine writes: it may show late");
                return self.unmark(key, merged);
            }
        };
        self.places += 1;
        let key = key.clone();
        let slot = Slot::new(target, self.places, engine_device);
        self.slots.insert(key, slot);
    }

    fn forget(&mut self, key: &ContainerKey) {
        if let Some(merged) = self.retire(key) {
            self.unmark(key, &merged);
        }
    }

    fn unmark(&self, key: &ContainerKey, merged: &Path) {
        // Mostly it is unmounted by now, and the mark gone with it.
        let unmarked = mark(&self.fanotify, MarkFlags::FAN_MARK_REMOVE, merged);
        debug!(container = %key, ?unmarked, "no longer heard of");
        if let Some(gate) = &self.gate {
            gate.forget(key, merged);
        }
    }

    fn retire(&mut self, key: &ContainerKey) -> Option<PathBuf> {
        let slot = self.slots.remove(key)?;
        // One that is at work ends when it comes back.
        if let Place::Here(side) = slot.place {
            self.end(side);
        }
        Some(slot.target.merged)
    }

    fn end(&self, side: Side) {
        let ended = self.ended.clone();
        if let Err(error) = in_a_thread(move || side.end(&ended)) {
            warn!(%error, "end");
        }
    }

    fn take_back(&mut self, key: &ContainerKey, number: u64, done: Result<(Side, Outcome)>) {
        let slot = self.slots.get_mut(key).filter(|slot| slot.number == number);
        match (slot, done) {
            (Some(slot), Ok((side, outcome))) => slot.has_worked(side, outcome),
            (None, Ok((side, _))) => self.end(side),
            // It has ended, or its engine has unmounted its side.
            (Some(_), Err(error)) if matches!(error.errno, Errno::ESRCH | Errno::ENOENT) => {
                debug!(container = %key, %error, "open");
                self.forget(key);
            }
            (Some(slot), Err(error)) => slot.has_failed(&error),
            (None, Err(error)) => debug!(container = %key, %error, "open"),
        }
    }

    /// Reads all events, so that none keeps a mount of the engine's busy, and notes what they name.
    fn hear(&mut self) {
        let mut heard: BTreeMap<ContainerKey, BTreeSet<PathBuf>> = BTreeMap::new();
        let mut lost = false;
        loop {
            let events = match self.fanotify.read_events() {
                Ok(events) => events,
                Err(Errno::EAGAIN | Errno::EINTR) => break,
                // Of one event: what it is about cannot be opened (a device without driver, a file that is gone).
                Err(errno) => {
                    debug!(%errno, "read(fanotify)");
                    continue;
                }
            };
            self.events += events.len() as u64;
            for event in &events {
                lost |= event.mask().contains(MaskFlags::FAN_Q_OVERFLOW);
                if let Some((key, path)) = self.place(event) {
                    heard.entry(key).or_default().insert(path);
                }
            }
        }
        for (key, slot) in &mut self.slots {
            let paths = heard.remove(key);
            if lost {
                warn!(container = %key, "too many events: looking at the whole layer");
                slot.wanted.everywhere = true;
            }
            if lost || paths.is_some() {
                slot.disturb();
            }
            slot.wanted.note(paths.unwrap_or_default());
        }
    }

    /// Whose overlay an event is from, and the path from its root.
    fn place(&self, event: &FanotifyEvent) -> Option<(ContainerKey, PathBuf)> {
        let fd = event.fd()?;
        let name = std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd())).ok()?;
        let device = fstat(fd).ok()?.st_dev;
        // Where its layers are on several file systems, a file may have another device number than its overlay.
        let slot = self
            .slots
            .values()
            .find(|slot| slot.engine_device == device)
            .or_else(|| self.slots.values().find(|slot| name.starts_with(&slot.target.merged)))?;
        // In the engine's own mount namespace the overlay may be the root.
        let path = name.strip_prefix(&slot.target.merged).or_else(|_| name.strip_prefix("/")).ok()?;
        Some((slot.target.key.clone(), path.to_owned()))
    }
}

/// Adds or removes the mark on the engine's overlay at `merged`; never on whatever else is mounted there.
fn mark(fanotify: &Fanotify, how: MarkFlags, merged: &Path) -> Result<()> {
    let what = || format!("fanotify_mark({how:?}, {})", merged.display());
    let flags = nix::fcntl::OFlag::O_PATH | nix::fcntl::OFlag::O_CLOEXEC;
    let dir: OwnedFd = nix::fcntl::open(merged, flags, nix::sys::stat::Mode::empty()).named(what)?;
    let path = sysbox_sys::path::proc_path(dir.as_fd());
    if statfs(&path).named(what)?.filesystem_type() != OVERLAYFS_SUPER_MAGIC {
        return Err(SysError::new(Errno::ENODEV, format!("{}: not an overlay", what())));
    }
    let mask =
        MaskFlags::FAN_OPEN | MaskFlags::FAN_MODIFY | MaskFlags::FAN_CLOSE_WRITE | MaskFlags::FAN_ONDIR;
    fanotify.mark(how | MarkFlags::FAN_MARK_FILESYSTEM, mask, nix::fcntl::AT_FDCWD, Some(&path)).named(what)
}
