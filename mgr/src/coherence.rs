//! When the engine's overlay and the container's are made to agree: a thread that hears of what is done through the engine's
//! (fanotify) and has `overlay` do what is needed. Nothing the container does makes an event.
//!
//! Two speeds. At once, for each path that was opened or written: is it in the upper, and does the container see that? When
//! it has been quiet for a moment: both sides forget what they do not use, so that the next use starts right.
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
use sysbox_ipc::mgr::{DATA_ROOTS, Process};
use sysbox_sys::error::Named;
use sysbox_sys::{Result, SysError};
use tracing::{debug, error, trace, warn};

use crate::aside::Upper;
use crate::observe::overlay_root;
use crate::overlay::{Owned, Pair};
use crate::pinned::Listings;

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
/// How long the overlay of a container that has ended is kept. Its last holder pays for the kernel's sync of the whole file
/// system beneath (ovl_sync_fs), while the engine does its own on the way to the end of `docker run`.
const LINGER: Duration = Duration::from_secs(3);
/// How long a stop waits for the thread.
const PATIENCE: Duration = Duration::from_secs(2);

/// A running container whose rootfs is an engine's overlay.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target {
    pub key: ContainerKey,
    pub init: Process,
    pub merged: PathBuf,
    pub upper: PathBuf,
    /// It ran before there was a look at it: what the engine did meanwhile is not known, so its whole layer is looked at.
    pub is_found_running: bool,
}

/// The thread.
#[derive(Debug)]
pub struct Coherence {
    fanotify: Arc<Fanotify>,
    commands: Sender<Command>,
    wake: Arc<EventFd>,
    thread: Option<JoinHandle<()>>,
    /// Closed by the thread when it ends.
    ended: Receiver<()>,
}

#[derive(Debug)]
enum Command {
    Watch(Target),
    Forget(ContainerKey),
    Settle(ContainerKey, Sender<u64>),
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
        let worker = Worker {
            fanotify: Arc::clone(&fanotify),
            commands: receiver,
            wake: Arc::clone(&wake),
            sides: BTreeMap::new(),
            events: 0,
            turn: Turn { last: None, next_at: Instant::now() + TURN },
            ended: Vec::new(),
        };
        let thread = std::thread::Builder::new()
            .name("coherence".into())
            .stack_size(256 * 1024)
            .spawn(move || {
                let _ending = ending;
                worker.run();
            })
            .named(|| "start the thread `coherence`".to_owned())?;
        Ok(Self { fanotify, commands, wake, thread: Some(thread), ended })
    }

    /// When it returns, nothing that the engine does is missed any more.
    pub fn watch(&self, target: Target) {
        if let Err(error) = mark(&self.fanotify, MarkFlags::FAN_MARK_ADD, &target.merged) {
            return warn!(container = %target.key, %error, "not told of what the engine writes: it may show late");
        }
        self.tell(Command::Watch(target));
    }

    pub fn forget(&self, key: &ContainerKey) {
        self.tell(Command::Forget(key.clone()));
    }

    /// Has both sides agree now; returns when they do. The number of events there have been so far.
    pub fn settle(&self, key: &ContainerKey) -> u64 {
        let (sender, receiver) = channel();
        self.tell(Command::Settle(key.clone(), sender));
        // The thread being gone was told by `tell`.
        receiver.recv().unwrap_or_default()
    }

    fn tell(&self, command: Command) {
        if self.commands.send(command).is_err() {
            return error!("the thread `coherence` is gone: what the engine writes may show late");
        }
        if let Err(errno) = self.wake.write(1) {
            error!(%errno, "eventfd");
        }
    }
}

impl Drop for Coherence {
    fn drop(&mut self) {
        self.tell(Command::Stop);
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
    commands: Receiver<Command>,
    wake: Arc<EventFd>,
    sides: BTreeMap<ContainerKey, Side>,
    events: u64,
    turn: Turn,
    /// Overlays of containers that have ended, and when they may go.
    ended: Vec<(Instant, OwnedFd)>,
}

/// Whose engine side was flushed last, and when the next one's is due.
struct Turn {
    last: Option<ContainerKey>,
    next_at: Instant,
}

/// What is known of a target.
struct Side {
    target: Target,
    pair: Pair,
    /// st_dev of the engine's overlay.
    engine_device: u64,
    /// When to flush, unless there are events before.
    due: Option<Due>,
    listings: Listings,
    next_look: NextLook,
    since: Instant,
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

impl Side {
    /// There was an event just now.
    fn disturb(&mut self) {
        let now = Instant::now();
        let at_the_latest = self.due.as_ref().map_or(now + LATEST, |due| due.at_the_latest);
        self.due = Some(Due { at: (now + QUIET).min(at_the_latest), at_the_latest });
    }

    /// What is due. After a while without events, the engine is not at work.
    fn flush_due(&mut self) {
        let is_quiet = self.due.as_ref().is_some_and(|due| due.at < due.at_the_latest);
        self.flush();
        // Many containers end within their first second: they are spared the look.
        if is_quiet && self.since.elapsed() > SOON {
            self.look();
            self.next_look = NextLook { blind: self.next_look.blind, ..NextLook::soon() };
        }
    }

    /// Gives the container its own copies of the directories that it has in use.
    fn look(&mut self) {
        let owned = match self.pair.own_pinned(&mut self.listings) {
            Ok(owned) => owned,
            Err(error) => {
                self.complain(&error, "look");
                Owned::default()
            }
        };
        trace!(container = %self.target.key, ?owned, "directories in use");
        if owned.blind > self.next_look.blind {
            warn!(
                container = %self.target.key,
                directories = owned.blind,
                "it and its engine made the first copy of a directory at one moment: it can create nothing there until no process has it in use"
            );
        }
        self.next_look.blind = owned.blind;
        self.next_look.again(owned);
        if self.pair.has_left() {
            self.disturb();
        }
    }

    fn flush(&mut self) {
        self.due = None;
        match self.pair.flush() {
            Ok(true) => {}
            Ok(false) => {
                let again = Instant::now() + AGAIN;
                self.due = Some(Due { at: again, at_the_latest: again });
            }
            Err(error) => self.complain(&error, "flush"),
        }
    }

    fn settle(&self, paths: Option<&BTreeSet<PathBuf>>) {
        let settled = match paths {
            Some(paths) => paths.iter().try_for_each(|path| self.pair.settle(path)),
            None => self.pair.settle_all(
                &DATA_ROOTS.iter().map(|path| PathBuf::from(path.trim_start_matches('/'))).collect(),
            ),
        };
        if let Err(error) = settled {
            self.complain(&error, "settle");
        }
    }

    fn complain(&self, error: &SysError, what: &str) {
        let container = &self.target.key;
        match error.errno {
            // The container has ended, or its engine has unmounted its side.
            Errno::ESRCH | Errno::ENOENT => debug!(%container, %error, what, "overlays"),
            _ => warn!(%container, %error, what, "the container may not see what its engine wrote"),
        }
    }
}

impl Worker {
    fn run(mut self) {
        loop {
            self.wait();
            // Cleared before the commands are read: one that comes in between wakes again.
            if let Err(errno) = self.wake.read() {
                debug_assert_eq!(errno, Errno::EAGAIN);
            }
            // Commands first: an event is of a container that is known by then.
            if !self.obey() {
                return;
            }
            self.hear();
            let now = Instant::now();
            for side in self.sides.values_mut() {
                if side.due.as_ref().is_some_and(|due| due.at <= now) {
                    side.flush_due();
                }
            }
            self.ended.retain(|(at, _)| *at > now);
            if self.turn.next_at <= now {
                self.flush_next();
                self.look_next(now);
            }
        }
    }

    fn flush_next(&mut self) {
        use std::ops::Bound::{Excluded, Unbounded};
        let after = self.turn.last.as_ref().map_or(Unbounded, Excluded);
        let next = self
            .sides
            .range::<ContainerKey, _>((after, Unbounded))
            .next()
            .or_else(|| self.sides.iter().next());
        if let Some((key, Err(error))) = next.map(|(key, side)| (key, side.pair.flush_engine())) {
            debug!(container = %key, %error, "flush");
        }
        self.turn = Turn { last: next.map(|(key, _)| key.clone()), next_at: Instant::now() + TURN };
    }

    /// Those whose time has come; first those that come often, as they are new or in use, and nobody last for ever.
    fn look_next(&mut self, now: Instant) {
        let is_due = |side: &&mut Side| side.next_look.at <= now && side.due.is_none();
        let mut sides: Vec<&mut Side> = self.sides.values_mut().filter(is_due).collect();
        sides.sort_by_key(|side| side.next_look.at + side.next_look.after);
        sides.into_iter().take(LOOKS).for_each(Side::look);
    }

    fn wait(&self) {
        let turn = (!self.sides.is_empty()).then_some(self.turn.next_at);
        let gone = self.ended.iter().map(|(at, _)| *at);
        let due = self.sides.values().filter_map(|side| side.due.as_ref().map(|due| due.at));
        let next = due.chain(turn).chain(gone).min();
        let limit = next.map_or(PollTimeout::NONE, |at| {
            let left = at.saturating_duration_since(Instant::now()).as_millis() + 1;
            PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX)
        });
        let mut ready = [
            PollFd::new(self.fanotify.as_fd(), PollFlags::POLLIN),
            PollFd::new(self.wake.as_fd(), PollFlags::POLLIN),
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
                    if let Some(side) = self.sides.get_mut(&key) {
                        side.flush();
                    }
                    if done.send(self.events).is_err() {
                        debug!(container = %key, "nobody waits any more");
                    }
                }
                Command::Stop => return false,
            }
        }
        true
    }

    fn watch(&mut self, target: Target) {
        self.sides.remove(&target.key);
        let Target { key, init, merged, upper, is_found_running } = &target;
        let open = || {
            let pair = Pair::open(merged, upper, overlay_root(*init)?)?;
            let facts = nix::sys::stat::stat(merged).named(|| format!("stat({})", merged.display()))?;
            Ok::<_, SysError>((pair, facts.st_dev))
        };
        let (pair, engine_device) = match open() {
            Ok(opened) => opened,
            // Gone as fast as it came.
            Err(error) if error.errno == Errno::ESRCH => return,
            Err(error) => {
                return warn!(container = %key, %error, "not told of what the engine writes: it may show late");
            }
        };
        let (key, is_found_running) = (key.clone(), *is_found_running);
        let (listings, next_look) = (Listings::default(), NextLook::soon());
        let since = Instant::now();
        let mut side = Side { target, pair, engine_device, due: None, listings, next_look, since };
        if is_found_running {
            side.flush();
            side.settle(None);
        }
        side.disturb();
        self.sides.insert(key, side);
    }

    fn forget(&mut self, key: &ContainerKey) {
        let Some(side) = self.sides.remove(key) else { return };
        let Target { merged, upper, .. } = &side.target;
        // Mostly it is unmounted by now, and the mark gone with it.
        let unmarked = mark(&self.fanotify, MarkFlags::FAN_MARK_REMOVE, merged);
        let recovered = Upper::open(upper).and_then(|upper| upper.recover());
        debug!(container = %key, ?unmarked, ?recovered, "no longer watched");
        let (at, overlay) = (Instant::now() + LINGER, side.pair.into_container());
        self.ended.push((at, overlay));
    }

    /// Reads all events, so that none keeps a mount of the engine's busy, and settles what they name.
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
        for (key, side) in &mut self.sides {
            let paths = heard.get(key);
            if lost {
                warn!(container = %key, "too many events: looking at the whole layer");
                side.settle(None);
            } else if paths.is_some() {
                side.settle(paths);
            }
            if lost || paths.is_some() {
                side.disturb();
            }
        }
    }

    /// Whose overlay an event is from, and the path from its root.
    fn place(&self, event: &FanotifyEvent) -> Option<(ContainerKey, PathBuf)> {
        let fd = event.fd()?;
        let name = std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd())).ok()?;
        let device = fstat(fd).ok()?.st_dev;
        // Where its layers are on several file systems, a file may have another device number than its overlay.
        let side = self
            .sides
            .values()
            .find(|side| side.engine_device == device)
            .or_else(|| self.sides.values().find(|side| name.starts_with(&side.target.merged)))?;
        // In the engine's own mount namespace the overlay may be the root.
        let path = name.strip_prefix(&side.target.merged).or_else(|_| name.strip_prefix("/")).ok()?;
        Some((side.target.key.clone(), path.to_owned()))
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
