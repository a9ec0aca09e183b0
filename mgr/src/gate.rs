//! Stops the engine for a moment each time it is about to look at or write to a running container's files, so that both
//! overlays can be made ready first: permission events of fanotify on what an engine opens before anything else. That is the
//! file `lower` beside its overlay (the driver overlay2 reads it at the begin and at the end of each access), or the root
//! directory of the overlay itself (engines with the image store of containerd).
//!
//! The engine is let go when its ticket is dropped, and by this thread when it has been held for `LONGEST`, whatever the others
//! do. The thread touches no file of a container. When the process ends, the kernel lets everybody go.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, OFlag};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::fanotify::{
    EventFFlags, Fanotify, FanotifyEvent, FanotifyResponse, InitFlags, MarkFlags, MaskFlags, Response,
};
use nix::sys::stat::{FileStat, Mode, SFlag, fstat};
use sysbox_ipc::ContainerKey;
use sysbox_sys::Result;
use sysbox_sys::error::Named;
use sysbox_sys::path::proc_path;
use tracing::{debug, error, warn};

/// Nobody is held longer; mostly it is some milliseconds, but this machine may be busy.
pub const LONGEST: Duration = Duration::from_millis(500);
const PERMISSION: MaskFlags = MaskFlags::FAN_OPEN_PERM.union(MaskFlags::FAN_ONDIR);

type Tell = Box<dyn Fn(ContainerKey, Ticket) + Send>;

/// The thread.
pub struct Gate {
    group: Arc<Fanotify>,
    places: Arc<Mutex<BTreeMap<Inode, ContainerKey>>>,
    stop: Arc<EventFd>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Inode {
    device: u64,
    number: u64,
}

/// Somebody who is held, until it is dropped.
#[derive(Debug)]
pub struct Ticket(Arc<Held>);

#[derive(Debug)]
struct Held {
    group: Arc<Fanotify>,
    /// `None`: it has ended.
    key: Option<ContainerKey>,
    /// Gone with the answer.
    event: Mutex<Option<FanotifyEvent>>,
    until: Instant,
}

impl std::fmt::Debug for Gate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Gate").field("places", &self.places).finish_non_exhaustive()
    }
}

impl Gate {
    /// `tell` is called, in the gate's thread, with each one who is held.
    ///
    /// # Errors
    /// `EINVAL`: a kernel without permission events (CONFIG_FANOTIFY_ACCESS_PERMISSIONS); as `fanotify_init(2)`.
    pub fn start(tell: Tell) -> Result<Self> {
        let flags = InitFlags::FAN_CLASS_CONTENT | InitFlags::FAN_CLOEXEC | InitFlags::FAN_NONBLOCK;
        let opened = EventFFlags::O_RDONLY | EventFFlags::O_LARGEFILE | EventFFlags::O_CLOEXEC;
        let group = Fanotify::init(flags, opened).named(|| "fanotify_init(CLASS_CONTENT)".to_owned())?;
        let stop = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)
            .named(|| "eventfd".to_owned())?;
        let (group, places, stop) = (Arc::new(group), Arc::default(), Arc::new(stop));
        let keeper = Keeper {
            group: Arc::clone(&group),
            places: Arc::clone(&places),
            stop: Arc::clone(&stop),
            tell,
            held: Vec::new(),
        };
        let thread = std::thread::Builder::new()
            .name("gate".into())
            .stack_size(64 * 1024)
            .spawn(move || {
                let guard = AbortOnPanic;
                keeper.run();
                std::mem::forget(guard);
            })
            .named(|| "start the thread `gate`".to_owned())?;
        Ok(Self { group, places, stop, thread: Some(thread) })
    }

    /// From now on, whoever opens the container's files from outside is held. What its engine does not have is left out.
    ///
    /// # Errors
    /// None of both can be marked.
    pub fn watch(&self, key: &ContainerKey, merged: &Path) -> Result<()> {
        let marked =
            [self.mark(key, merged, SFlag::S_IFDIR), self.mark(key, &beside(merged), SFlag::S_IFREG)];
        let [root, lower] = marked;
        match (root, lower) {
            (Err(error), Err(_)) => Err(error),
            _ => Ok(()),
        }
    }

    pub fn forget(&self, key: &ContainerKey, merged: &Path) {
        lock(&self.places).retain(|_, known| known != key);
        for place in [merged, &beside(merged)] {
            // Mostly it is gone by now, and the mark with it.
            let removed = open(place).and_then(|file| {
                let path = proc_path(file.as_fd());
                self.group
                    .mark(MarkFlags::FAN_MARK_REMOVE, PERMISSION, AT_FDCWD, Some(&path))
                    .named(|| format!("fanotify_mark(REMOVE, {})", place.display()))
            });
            debug!(container = %key, ?removed, "gate");
        }
    }

    fn mark(&self, key: &ContainerKey, place: &Path, kind: SFlag) -> Result<()> {
        let what = || format!("fanotify_mark(OPEN_PERM, {})", place.display());
        let file = open(place)?;
        let facts = fstat(&file).named(what)?;
        if SFlag::from_bits_truncate(facts.st_mode & SFlag::S_IFMT.bits()) != kind {
            return Err(sysbox_sys::SysError::new(Errno::EINVAL, what()));
        }
        // Known before the first event.
        lock(&self.places).insert(Inode::of(&facts), key.clone());
        let path = proc_path(file.as_fd());
        let marked = self.group.mark(MarkFlags::FAN_MARK_ADD, PERMISSION, AT_FDCWD, Some(&path)).named(what);
        if marked.is_err() {
            lock(&self.places).remove(&Inode::of(&facts));
        }
        marked
    }
}

impl Drop for Gate {
    fn drop(&mut self) {
        if let Err(errno) = self.stop.write(1) {
            return error!(%errno, "eventfd");
        }
        if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            error!("the thread `gate` panicked");
        }
    }
}

/// An engine that nobody lets go would wait for ever: better no manager.
struct AbortOnPanic;

impl Drop for AbortOnPanic {
    fn drop(&mut self) {
        std::process::abort();
    }
}

impl Inode {
    fn of(facts: &FileStat) -> Self {
        Self { device: facts.st_dev, number: facts.st_ino }
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        self.0.let_go();
    }
}

impl Held {
    fn let_go(&self) {
        let Some(event) = lock(&self.event).take() else { return };
        let Some(file) = event.fd() else { return };
        // ENOENT: who waited was killed.
        if let Err(errno) = self.group.write_response(FanotifyResponse::new(file, Response::FAN_ALLOW)) {
            debug!(%errno, "answer to a permission event");
        }
    }

    fn is_held(&self) -> bool {
        lock(&self.event).is_some()
    }
}

struct Keeper {
    group: Arc<Fanotify>,
    places: Arc<Mutex<BTreeMap<Inode, ContainerKey>>>,
    stop: Arc<EventFd>,
    tell: Tell,
    held: Vec<Arc<Held>>,
}

impl Keeper {
    fn run(mut self) {
        while self.wait() {
            self.admit();
            let now = Instant::now();
            self.held.retain(|held| {
                if held.is_held() && held.until <= now {
                    let container = held.key.as_ref().map(ToString::to_string);
                    warn!(container, "an engine was let go before its container was ready");
                    held.let_go();
                }
                held.is_held()
            });
        }
        self.held.iter().for_each(|held| held.let_go());
        self.admit();
        self.held.iter().for_each(|held| held.let_go());
    }

    /// Whether to go on.
    fn wait(&self) -> bool {
        let limit = self.held.iter().map(|held| held.until).min().map_or(PollTimeout::NONE, |at| {
            let left = at.saturating_duration_since(Instant::now()).as_millis() + 1;
            PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX)
        });
        let mut ready = [
            PollFd::new(self.group.as_fd(), PollFlags::POLLIN),
            PollFd::new(self.stop.as_fd(), PollFlags::POLLIN),
        ];
        if let Err(errno) = poll(&mut ready, limit) {
            debug_assert_eq!(errno, Errno::EINTR);
        }
        self.stop.read().is_err()
    }

    fn admit(&mut self) {
        loop {
            let events = match self.group.read_events() {
                Ok(events) => events,
                Err(Errno::EAGAIN | Errno::EINTR) => return,
                // Of one event, to which the kernel has said no by itself.
                Err(errno) => {
                    warn!(%errno, "read(permission events)");
                    continue;
                }
            };
            for event in events {
                let key = event
                    .fd()
                    .and_then(|file| fstat(file).ok())
                    .and_then(|facts| lock(&self.places).get(&Inode::of(&facts)).cloned());
                let held = Arc::new(Held {
                    group: Arc::clone(&self.group),
                    key: key.clone(),
                    event: Mutex::new(Some(event)),
                    until: Instant::now() + LONGEST,
                });
                let ticket = Ticket(Arc::clone(&held));
                // Of a container that has ended: its ticket ends here.
                if let Some(key) = key {
                    (self.tell)(key, ticket);
                    self.held.push(held);
                }
            }
        }
    }
}

/// What the driver overlay2 keeps beside the mount point.
fn beside(merged: &Path) -> std::path::PathBuf {
    merged.with_file_name("lower")
}

fn open(place: &Path) -> Result<OwnedFd> {
    let flags = OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    nix::fcntl::open(place, flags, Mode::empty()).named(|| format!("open({}, PATH)", place.display()))
}

/// What the lock guards is whole at any time.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
