//! What is done for one container's two overlays, at a time that `coherence` chooses, in a thread of its own: a container can
//! hold the lock of one of its directories as long as it likes (a fault on a file that it serves itself), and whoever looks in there
//! waits with it. So each waits for itself alone.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::mpsc::Sender;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use sysbox_ipc::ContainerKey;
use sysbox_ipc::mgr::{DATA_ROOTS, Process};
use sysbox_sys::{Result, SysError};
use tracing::{debug, trace, warn};

use crate::aside::Upper;
use crate::ended::Ended;
use crate::gate::Ticket;
use crate::observe::overlay_root;
use crate::overlay::{MOST_LOOKED_AT, Owned, Pair};
use crate::pinned::Listings;

/// Of how many paths is noted that the engine was there; with more, the whole layer is looked at.
const MOST_PATHS: usize = 4096;

/// For so long after an engine was held, it may be on its way from a look to a write. What it has looked at is not to be forgotten
/// meanwhile; and it is held, and its side flushed, whenever it comes anew.
const AT_WORK: Duration = Duration::from_secs(10);

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

/// What is to be done, in this order.
#[derive(Debug, Default)]
pub struct Work {
    /// Engines that wait until their side is ready.
    pub gates: Vec<Ticket>,
    /// Where the engine was.
    pub paths: BTreeSet<PathBuf>,
    /// It is not known where it was.
    pub everywhere: bool,
    pub flush: bool,
    pub flush_engine: bool,
    pub look: bool,
    /// Who is told, and what, when all that is done.
    pub answers: Vec<(Sender<u64>, u64)>,
}

/// What it came to.
#[derive(Debug, Default)]
pub struct Outcome {
    /// A flush that is to be repeated: a directory is aside that the engine still uses.
    pub again: bool,
    pub owned: Option<Owned>,
    pub has_left: bool,
}

/// One container's overlays.
#[derive(Debug)]
pub struct Side {
    key: ContainerKey,
    upper: PathBuf,
    pair: Pair,
    listings: Listings,
    /// Where the engine has looked since it was held last; a flush makes it forget that.
    looked_at: BTreeSet<PathBuf>,
    /// When it was held last.
    held_at: Option<Instant>,
}

impl Work {
    pub fn is_empty(&self) -> bool {
        let Self { gates, paths, everywhere, flush, flush_engine, look, answers } = self;
        gates.is_empty()
            && paths.is_empty()
            && answers.is_empty()
            && !(*everywhere || *flush || *flush_engine || *look)
    }

    pub fn note(&mut self, paths: BTreeSet<PathBuf>) {
        self.paths.extend(paths);
        if self.paths.len() > MOST_PATHS {
            self.paths.clear();
            self.everywhere = true;
        }
    }
}

impl Side {
    /// # Errors
    /// `ESRCH`: it has ended; as [`Pair::open`].
    pub fn open(target: &Target) -> Result<Self> {
        let Target { key, init, merged, upper, .. } = target;
        let pair = Pair::open(merged, upper, overlay_root(*init)?)?;
        let (listings, looked_at) = (Listings::default(), BTreeSet::new());
        Ok(Self { key: key.clone(), upper: upper.clone(), pair, listings, looked_at, held_at: None })
    }

    pub fn work(&mut self, work: Work) -> Outcome {
        let Work { gates, paths, everywhere, flush, flush_engine, look, answers } = work;
        let mut outcome = Outcome::default();
        self.remember();
        if !gates.is_empty() {
            outcome.owned = Some(self.prepare());
            self.held_at = Some(Instant::now());
            drop(gates);
        }
        if everywhere {
            self.settle_all();
        } else {
            let settled = paths.iter().try_for_each(|path| self.pair.settle(path));
            self.or_complain(settled, "settle");
        }
        let is_at_work = self.held_at.is_some_and(|at| at.elapsed() < AT_WORK);
        if flush {
            let flushed = if is_at_work { self.pair.flush_container() } else { self.pair.flush() };
            outcome.again = self.or_complain(flushed, "flush") == Some(false);
        } else if flush_engine
            && !is_at_work
            && let Err(error) = self.pair.flush_engine()
        {
            debug!(container = %self.key, %error, "flush");
        }
        if look {
            outcome.owned = Some(self.look());
        }
        outcome.has_left = self.pair.has_left();
        for (who, what) in answers {
            if who.send(what).is_err() {
                debug!(container = %self.key, "nobody waits any more");
            }
        }
        outcome
    }

    /// The container has ended.
    pub fn end(self, ended: &Ended) {
        let recovered = Upper::open(&self.upper).and_then(|upper| upper.recover());
        debug!(container = %self.key, ?recovered, "no longer watched");
        ended.keep(self.pair.into_container());
    }

    /// Notes where the engine has looked.
    fn remember(&mut self) {
        match self.pair.looked_at(&mut self.listings) {
            Ok(looked_at) => self.looked_at.extend(looked_at),
            Err(error) => debug!(container = %self.key, %error, "where the engine looked"),
        }
        // It goes for a walk.
        if self.looked_at.len() > MOST_LOOKED_AT {
            self.looked_at.clear();
        }
    }

    /// The engine is held, and has been where it will write.
    fn prepare(&mut self) -> Owned {
        let looked_at = std::mem::take(&mut self.looked_at);
        let owned = self.pair.prepare(&looked_at, &mut self.listings);
        let owned = self.or_complain(owned, "prepare").unwrap_or_default();
        trace!(container = %self.key, ?owned, "ready for its engine");
        owned
    }

    /// Gives the container its own copies of the directories that it has in use.
    fn look(&mut self) -> Owned {
        let owned = self.pair.own_pinned(&mut self.listings);
        let owned = self.or_complain(owned, "look").unwrap_or_default();
        trace!(container = %self.key, ?owned, "directories in use");
        owned
    }

    fn settle_all(&self) {
        let except = DATA_ROOTS.iter().map(|path| PathBuf::from(path.trim_start_matches('/'))).collect();
        self.or_complain(self.pair.settle_all(&except), "settle");
    }

    fn or_complain<T>(&self, result: Result<T>, what: &str) -> Option<T> {
        result.map_err(|error| complain(&self.key, &error, what)).ok()
    }
}

pub fn complain(container: &ContainerKey, error: &SysError, what: &str) {
    match error.errno {
        // The container has ended, or its engine has unmounted its side.
        Errno::ESRCH | Errno::ENOENT => debug!(%container, %error, what, "overlays"),
        _ => warn!(%container, %error, what, "the container may not see what its engine wrote"),
    }
}
