//! One container in the thread `coherence`: what is wanted for it and when, and where its overlays are: here, at work in a
//! thread of their own, or not opened. Touches no file of a container.

use std::sync::Arc;
use std::sync::mpsc::Sender;
use std::time::{Duration, Instant};

use nix::sys::eventfd::EventFd;
use sysbox_sys::error::Named;
use sysbox_sys::{Result, SysError};
use tracing::{debug, error, warn};

use crate::coherence::Command;
use crate::overlay::Owned;
use crate::side::{Outcome, Side, Target, Work, complain};

/// Without events for so long, an engine's operation is taken to be over.
const QUIET: Duration = Duration::from_millis(10);
/// An operation that takes longer is looked at in between.
const LATEST: Duration = Duration::from_millis(100);
/// How soon the engine is asked again whether it still uses a directory that was moved aside.
const AGAIN: Duration = Duration::from_millis(250);

/// How soon after a start, and after the engine did something, a container is looked at for directories that it has in use;
/// then after twice the time, and so on to `RARELY`.
const SOON: Duration = Duration::from_secs(1);
const RARELY: Duration = Duration::from_secs(8);
/// A look that had to flush, for nothing, cost the container what it had cached: such go on to `SELDOM`.
const SELDOM: Duration = Duration::from_secs(64);
/// A container that makes its side wait so long is told of, once.
const STUCK: Duration = Duration::from_secs(10);

/// How the thread is told of something.
#[derive(Debug, Clone)]
pub struct Line {
    pub commands: Sender<Command>,
    pub wake: Arc<EventFd>,
}

impl Line {
    pub fn tell(&self, command: Command) {
        if self.commands.send(command).is_err() {
            return error!("the thread `coherence` is gone: what the engine writes may show late");
        }
        if let Err(errno) = self.wake.write(1) {
            error!(%errno, "eventfd");
        }
    }
}

/// What is known of a target.
pub struct Slot {
    pub target: Target,
    pub number: u64,
    pub place: Place,
    pub wanted: Work,
    /// st_dev of the engine's overlay.
    pub engine_device: u64,
    /// When to flush, unless there are events before.
    pub due: Option<Due>,
    pub next_look: NextLook,
    since: Instant,
    /// After a failure.
    rest: Option<Rest>,
}

pub enum Place {
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
pub struct NextLook {
    pub at: Instant,
    pub after: Duration,
    /// What was told of already.
    blind: usize,
}

pub struct Due {
    pub at: Instant,
    at_the_latest: Instant,
}

/// Until when nothing is tried again, and how long that is.
#[derive(Debug, Clone, Copy)]
struct Rest {
    until: Instant,
    length: Duration,
}

impl NextLook {
    pub fn soon() -> Self {
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
    /// One that is to be opened at once.
    pub fn new(target: Target, number: u64, engine_device: u64) -> Self {
        let wanted = Work { everywhere: target.is_found_running, flush: true, ..Work::default() };
        let mut slot = Self {
            target,
            number,
            place: Place::Empty,
            wanted,
            engine_device,
            due: None,
            next_look: NextLook::soon(),
            since: Instant::now(),
            rest: None,
        };
        slot.disturb();
        slot
    }

    /// The work is done, and what it came to.
    pub fn has_worked(&mut self, side: Side, outcome: Outcome) {
        (self.place, self.rest) = (Place::Here(side), None);
        self.learn(outcome);
    }

    /// Its overlays could not be opened (the daemon has all the descriptors that it may have, memory is short): some time later
    /// they are, and then all is looked at, as nobody knows what the engine did meanwhile. Nobody is held until then.
    pub fn has_failed(&mut self, error: &SysError) {
        let length = self.rest.map_or(AGAIN, |rest| (rest.length * 2).min(RARELY));
        match self.rest {
            None => complain(&self.target.key, error, "open"),
            Some(_) => debug!(container = %self.target.key, %error, "open"),
        }
        self.rest = Some(Rest { until: Instant::now() + length, length });
        self.place = Place::Empty;
        self.wanted = Work {
            everywhere: true,
            flush: true,
            answers: std::mem::take(&mut self.wanted.answers),
            ..Work::default()
        };
    }

    /// Whether an engine may be made to wait for it.
    pub fn is_able(&self) -> bool {
        !self.is_stuck() && self.rest.is_none()
    }

    /// When something is to be done without an event.
    pub fn next(&self) -> Option<Instant> {
        let resting = self.rest.filter(|_| matches!(self.place, Place::Empty)).map(|rest| rest.until);
        resting.into_iter().chain(self.due.as_ref().map(|due| due.at)).min()
    }

    /// There was an event just now.
    pub fn disturb(&mut self) {
        let now = Instant::now();
        let at_the_latest = self.due.as_ref().map_or(now + LATEST, |due| due.at_the_latest);
        self.due = Some(Due { at: (now + QUIET).min(at_the_latest), at_the_latest });
    }

    /// What is due. After a while without events, the engine is not at work.
    pub fn flush_due(&mut self) {
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

    pub fn tell_if_stuck(&mut self) {
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
    pub fn dispatch(&mut self, line: &Line) {
        if self.wanted.is_empty() || self.rest.is_some_and(|rest| rest.until > Instant::now()) {
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
            // Its overlays went with the closure.
            self.has_failed(&error);
        }
    }
}

/// Ends by itself. A small stack: there may be as many as containers.
pub fn in_a_thread(act: impl FnOnce() + Send + 'static) -> Result<()> {
    std::thread::Builder::new()
        .name("side".into())
        .stack_size(256 * 1024)
        .spawn(act)
        .map(drop)
        .named(|| "start a thread `side`".to_owned())
}
