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
use crate::overlay::Owned;
pub use crate::side::Target;
use crate::side::{Outcome, Side, Work, complain};

/// Without events for so long, an engine's operation is taken to be over.
const QUIET: Duration = Duration::from_millis(10);
/// An operation that takes longer is looked at in between.
const LATEST: Duration = Duration::from_millis(100);
/// How soon the engine is asked again whether it still uses a directory that was moved aside.
const AGAIN: Duration = Duration::from_millis(250);

/// Once in so long one container's engine side is flushed without an event, in turn: a name that was looked for in vain, and a
/// directory that the container replaced while the engine was about to write to it, make none.
const TURN: Duration = Duration::from_millis(500);
/// How soon after a start, and after the engine did something, a container is looked at for directories that it has in use;
/// then after twice the time, and so on to `RARELY`.
const SOON: Duration = Duration::from_secs(1);
const RARELY: Duration = Duration::from_secs(8);
/// A look that had to flush, for nothing, cost the container what it had cached: such go on to `SELDOM`.
const SELDOM: Duration = Duration::from_secs(64);
/// How many containers are looked at in one turn.
const LOOKS: usize = 4;
/// A container that makes its side wait so long is told of, once.
const STUCK: Duration = Duration::from_secs(10);
/// How long a stop waits for the thread.
const PATIENCE: Duration = Duration::from_secs(2);

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
enum Command {
    Watch(Target),
    Forget(ContainerKey),
    Settle(ContainerKey, Sender<u64>),
    Gate(ContainerKey, Ticket),
    Back(ContainerKey, u64, Result<(Side, Outcome)>),
    Stop,
}

/// How the thread is told of something.
#[derive(Debug, Clone)]
struct Line {
    commands: Sender<Command>,
    wake: Arc<EventFd>,
}

impl Line {
    fn tell(&self, command: Command) {
        if self.commands.send(command).is_err() {
            return error!("the thread `coherence` is gone: what the engine writes may show late");
        }
        if let Err(errno) = self.wake.write(1) {
            error!(%errno, "eventfd");
        }
    }
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
        // The thread being gone was told by `tell`; the container may have ended.
        receiver.recv().unwrap_or_default()
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

/// What is known of a target.
struct Slot {
    target: Target,
    number: u64,
    place: Place,
    wanted: Work,
    /// st_dev of the engine's overlay.
    engine_device: u64,
    /// When to flush, unless there are events before.
    due: Option<Due>,
    next_look: NextLook,
    since: Instant,
}

enum Place {
    /// Not opened yet.
    Empty,
    Here(Side),
    /// In a thread of its own.
    AtWork {
        since: Instant,
        is_told: bool,
    },
}

/// When the directories in use are looked at again.
struct NextLook {
    at: Instant,
    after: Duration,
    /// What was told of already.
    blind: usize,
}

struct Due {
    at: Instant,
    at_the_latest: Instant,
}

impl NextLook {
    fn soon() -> Self {
        Self { at: Instant::now() + SOON, after: SOON, blind: 0 }
    }

    /// After a look that came to `owned`.
    fn again(&mut self, owned: Owned) {
        self.after = match owned {
            // What cannot be helped now, a flush helps when the directory is no longer in use.
            Owned { blind: 1.., .. } => SOON,
            Owned { copied: 0, has_flushed: true, .. } => (self.after * 2).min(SELDOM),
            _ => (self.after * 2).min(RARELY),
        };
        self.at = Instant::now() + self.after;
    }
}

impl Slot {
    /// There was an event just now.
    fn disturb(&mut self) {
        let now = Instant::now();
        let at_the_latest = self.due.as_ref().map_or(now + LATEST, |due| due.at_the_latest);
        self.due = Some(Due { at: (now + QUIET).min(at_the_latest), at_the_latest });
    }

    /// What is due. After a while without events, the engine is not at work.
    fn flush_due(&mut self) {
        let is_quiet = self.due.take().is_some_and(|due| due.at < due.at_the_latest);
        self.wanted.flush = true;
        // Many containers end within their first second: they are spared the look.
        if is_quiet && self.since.elapsed() > SOON {
            self.wanted.look = true;
            self.next_look = NextLook { blind: self.next_look.blind, ..NextLook::soon() };
            self.next_look.after /= 2;
        }
    }

    fn learn(&mut self, outcome: Outcome) {
        if outcome.again {
            let again = Instant::now() + AGAIN;
            self.due.get_or_insert(Due { at: again, at_the_latest: again });
        }
        let Some(owned) = outcome.owned else { return };
        if owned.blind > self.next_look.blind {
            warn!(
                container = %self.target.key,
                directories = owned.blind,
                "it and its engine made the first copy of a directory at one moment: it can create nothing there until no process has it in use"
            );
        }
        self.next_look.blind = owned.blind;
        self.next_look.again(owned);
        if outcome.has_left && self.due.is_none() {
            self.disturb();
        }
    }

    fn is_stuck(&self) -> bool {
        matches!(self.place, Place::AtWork { since, .. } if since.elapsed() > STUCK)
    }

    fn tell_if_stuck(&mut self) {
        let key = &self.target.key;
        if let Place::AtWork { since, is_told } = &mut self.place
            && !*is_told
            && since.elapsed() > STUCK
        {
            *is_told = true;
            let seconds = STUCK.as_secs();
            warn!(
                container = %key, seconds,
                "a look at its files does not end: it holds a directory, or the disk is busy; it and its engine may not see what the other writes"
            );
        }
    }

    /// Has what is wanted done, if it is not just at work.
    fn dispatch(&mut self, line: &Line) {
        if self.wanted.is_empty() {
            return;
        }
        let place = match &self.place {
            Place::AtWork { .. } => return,
            _ => std::mem::replace(&mut self.place, Place::AtWork { since: Instant::now(), is_told: false }),
        };
        let (work, target, number) = (std::mem::take(&mut self.wanted), self.target.clone(), self.number);
        let back = line.clone();
        let done = move || {
            let side = match place {
                Place::Here(side) => Ok(side),
                _ => Side::open(&target),
            };
            let done = side.map(|mut side| {
                let outcome = side.work(work);
                (side, outcome)
            });
            back.tell(Command::Back(target.key, number, done));
        };
        if let Err(error) = in_a_thread(done) {
            // Its overlays went with the closure: it is opened anew.
            warn!(container = %self.target.key, %error, "the container may not see what its engine wrote");
            self.place = Place::Empty;
            let again = Instant::now() + AGAIN;
            self.due = Some(Due { at: again, at_the_latest: again });
        }
    }
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
        let due = self.slots.values().filter_map(|slot| slot.due.as_ref().map(|due| due.at));
        let next = due.chain(turn).min();
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
                    if let Some(slot) = self.slots.get_mut(&key).filter(|slot| !slot.is_stuck()) {
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
        let Target { key, merged, is_found_running, .. } = &target;
        self.retire(key);
        let engine_device = match nix::sys::stat::stat(merged) {
            Ok(facts) => facts.st_dev,
            Err(errno) => {
                return warn!(container = %key, %errno, "not told of what the engine writes: it may show late");
            }
        };
        self.places += 1;
        let (key, is_found_running) = (key.clone(), *is_found_running);
        let mut slot = Slot {
            target,
            number: self.places,
            place: Place::Empty,
            // Opened at once.
            wanted: Work { everywhere: is_found_running, flush: true, ..Work::default() },
            engine_device,
            due: None,
            next_look: NextLook::soon(),
            since: Instant::now(),
        };
        slot.disturb();
        self.slots.insert(key, slot);
    }

    fn forget(&mut self, key: &ContainerKey) {
        let Some(merged) = self.retire(key) else { return };
        // Mostly it is unmounted by now, and the mark gone with it.
        let unmarked = mark(&self.fanotify, MarkFlags::FAN_MARK_REMOVE, &merged);
        debug!(container = %key, ?unmarked, "no longer heard of");
        if let Some(gate) = &self.gate {
            gate.forget(key, &merged);
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
            (Some(slot), Ok((side, outcome))) => {
                slot.place = Place::Here(side);
                slot.learn(outcome);
            }
            (None, Ok((side, _))) => self.end(side),
            (Some(_), Err(error)) => {
                complain(key, &error, "open");
                self.slots.remove(key);
            }
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

/// Ends by itself. A small stack: there may be as many as containers.
fn in_a_thread(act: impl FnOnce() + Send + 'static) -> Result<()> {
    std::thread::Builder::new()
        .name("side".into())
        .stack_size(256 * 1024)
        .spawn(act)
        .map(drop)
        .named(|| "start a thread `side`".to_owned())
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
