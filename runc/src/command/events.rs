//! `events`: a container's figures, again and again, and a line when it runs out of memory.

use std::fs::{self, File};
use std::io::Write;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use serde_json::{Value, json};

use super::Call;
use crate::cgroup::{Cgroup, Kind};
use crate::cli::EventsArgs;
use crate::figures::{figures, memory_dir};
use crate::state::Status;

/// # Errors
/// A container that is not there or does not run; the memory controller missing.
pub fn events(call: &Call<'_>, args: &EventsArgs) -> Result<()> {
    let home = call.home(&args.id)?;
    let state = home.load()?;
    if args.interval.is_zero() {
        bail!("duration interval must be greater than 0");
    }
    if matches!(home.status(&state), Status::Stopped | Status::Creating) {
        bail!("container with id {} is not running", args.id);
    }
    let stats = || json!({"type": "stats", "id": args.id, "data": figures(&state.cgroup)});
    if args.once {
        return tell(&stats());
    }
    let mut watch = Watch::of(&state.cgroup)?;
    let mut due = Instant::now() + args.interval;
    loop {
        match watch.wait(due.saturating_duration_since(Instant::now()))? {
            News::Nothing if Instant::now() < due => {}
            News::Nothing => {
                due = Instant::now() + args.interval;
                tell(&stats())?;
            }
            News::OutOfMemory => tell(&json!({"type": "oom", "id": args.id}))?,
            News::Gone => return Ok(()),
        }
    }
}

fn tell(event: &Value) -> Result<()> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{event}")?;
    Ok(out.flush()?)
}

#[derive(Debug, PartialEq, Eq)]
enum News {
    Nothing,
    OutOfMemory,
    Gone,
}

/// Waits for the kernel to say that memory has run out, or that the container has ended.
#[derive(Debug)]
enum Watch {
    /// `cgroup.event_control` of version 1 (memcg_test.rst): an eventfd that also wakes when the cgroup goes. The open file
    /// is what the kernel was told of.
    One { event: EventFd, control: PathBuf, _oom: File },
    Two {
        inotify: Inotify,
        dir: PathBuf,
        /// So many have been killed by now.
        killed: u64,
    },
}

impl Watch {
    fn of(cgroup: &Cgroup) -> Result<Self> {
        let (dir, kind) = memory_dir(cgroup).context("memory controller missing")?;
        if kind == Kind::Unified {
            let inotify =
                Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK).context("inotify_init")?;
            for file in ["memory.events", "cgroup.events"] {
                let path = dir.join(file);
                let added = inotify.add_watch(&path, AddWatchFlags::IN_MODIFY);
                added.with_context(|| format!("watch {}", path.display()))?;
            }
            // What was killed before is no news.
            let killed = killed_in(&dir);
            return Ok(Self::Two { inotify, dir, killed });
        }
        let path = dir.join("memory.oom_control");
        let oom = File::open(&path).with_context(|| format!("open {}", path.display()))?;
        let event = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK).context("eventfd")?;
        let control = dir.join("cgroup.event_control");
        let number = |fd: BorrowedFd<'_>| std::os::fd::AsRawFd::as_raw_fd(&fd);
        fs::write(&control, format!("{} {}", number(event.as_fd()), number(oom.as_fd())))
            .with_context(|| format!("write {}", control.display()))?;
        Ok(Self::One { event, control, _oom: oom })
    }

    fn wait(&mut self, limit: Duration) -> Result<News> {
        let fd = match &*self {
            Watch::One { event, .. } => event.as_fd(),
            Watch::Two { inotify, .. } => inotify.as_fd(),
        };
        // Rounded up: an early look would be a busy one.
        let timeout = PollTimeout::try_from(limit + Duration::from_millis(1)).unwrap_or(PollTimeout::MAX);
        match poll(&mut [PollFd::new(fd, PollFlags::POLLIN)], timeout) {
            Ok(0) | Err(Errno::EINTR) => return Ok(News::Nothing),
            Ok(_) => {}
            Err(errno) => bail!("poll: {}", errno.desc()),
        }
        match self {
            Watch::One { event, control, .. } => {
                event.read().context("read the eventfd")?;
                Ok(if control.exists() { News::OutOfMemory } else { News::Gone })
            }
            Watch::Two { inotify, dir, killed } => {
                inotify.read_events().context("read inotify")?;
                Ok(news_of(dir, killed))
            }
        }
    }
}

/// Both files wake the reader for other things too: a limit that was reached, a pause.
fn news_of(dir: &Path, killed: &mut u64) -> News {
    let life = fs::read_to_string(dir.join("cgroup.events")).unwrap_or_default();
    if life.is_empty() || life.lines().any(|line| line == "populated 0") {
        return News::Gone;
    }
    let before = std::mem::replace(killed, killed_in(dir));
    if *killed > before { News::OutOfMemory } else { News::Nothing }
}

fn killed_in(dir: &Path) -> u64 {
    let memory = fs::read_to_string(dir.join("memory.events")).unwrap_or_default();
    let count = memory.lines().find_map(|line| line.strip_prefix("oom_kill "));
    count.and_then(|count| count.parse().ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_kill_is_news_once() {
        let dir = tempfile::tempdir().unwrap();
        let write = |file: &str, text: &str| fs::write(dir.path().join(file), text).unwrap();
        let mut killed = 0;
        write("cgroup.events", "populated 1\nfrozen 0\n");
        for (oom, expected) in
            [(0, News::Nothing), (1, News::OutOfMemory), (1, News::Nothing), (3, News::OutOfMemory)]
        {
            write("memory.events", &format!("max 7\noom {oom}\noom_kill {oom}\noom_group_kill 0\n"));
            assert_eq!(news_of(dir.path(), &mut killed), expected);
        }
        write("cgroup.events", "populated 1\nfrozen 1\n");
        assert_eq!(news_of(dir.path(), &mut killed), News::Nothing);
        write("cgroup.events", "populated 0\nfrozen 0\n");
        assert_eq!(news_of(dir.path(), &mut killed), News::Gone);
    }
}
