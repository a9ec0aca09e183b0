//! Stopping all processes of a container at once, and letting them go on: the cgroup freezer, on the parent that the
//! container does not own. On a unified hierarchy (also one that only lies beside version 1) a frozen process can still be
//! killed; the freezer of version 1 keeps it until it is thawed (cgroups(7), freezer-subsystem.rst).

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::cgroup::{Cgroup, Kind};
use crate::nested::{self, Step};

/// Long enough for a process in an uninterruptible wait to come out of it; runc's own.
const LIMIT: Duration = Duration::from_secs(10);

/// After this time something keeps a process from stopping.
const HANGING: Duration = Duration::from_millis(200);

#[derive(Debug, thiserror::Error)]
pub enum FreezerError {
    #[error("no cgroup freezer on this host")]
    None,
    #[error("{} {}: {source}", attempt, path.display())]
    Io { attempt: &'static str, path: PathBuf, source: std::io::Error },
    #[error("{}: not frozen after {} s: a process does not come out of a system call", path.display(), LIMIT.as_secs())]
    Busy { path: PathBuf },
}

type Result<T> = std::result::Result<T, FreezerError>;

/// The freezer of one container.
#[derive(Debug)]
pub struct Freezer {
    dir: PathBuf,
    version: Version,
    /// The freezer of version 1, where there is one beside a unified hierarchy. What the container has frozen with it does not
    /// stop a second time.
    beside: Option<PathBuf>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Version {
    One,
    Two,
}

impl Freezer {
    /// `None` where there is neither a unified hierarchy nor the freezer of version 1.
    pub fn of(cgroup: &Cgroup) -> Option<Self> {
        if cgroup.parent.as_os_str().is_empty() {
            return None;
        }
        let two = cgroup.hierarchies.iter().find(|h| h.kind != Kind::V1).map(|h| (h, Version::Two));
        let one = || cgroup.hierarchies.iter().find(|h| h.name == "freezer").map(|h| (h, Version::One));
        let (hierarchy, version) = two.or_else(one)?;
        let beside = one().filter(|_| version == Version::Two).map(|(h, _)| h.mount.join(&cgroup.parent));
        Some(Self { dir: hierarchy.mount.join(&cgroup.parent), version, beside })
    }

    /// Whether the container was frozen from outside; what it freezes of itself does not count.
    ///
    /// # Errors
    /// The cgroup being unreadable; one that is gone is not frozen.
    pub fn is_frozen(&self) -> Result<bool> {
        let file = match self.version {
            Version::One => "freezer.self_freezing",
            Version::Two => "cgroup.freeze",
        };
        self.read(file).map(|text| text.trim() == "1")
    }

    /// Freezes, and returns when every process has stopped.
    ///
    /// # Errors
    /// `Busy`, with everything going on again; or what the kernel says.
    pub fn freeze(&self) -> Result<()> {
        self.stop_all().inspect_err(|_| {
            // The failure that matters is the first.
            let _thawed = self.thaw();
        })
    }

    fn stop_all(&self) -> Result<()> {
        let begun = Instant::now();
        loop {
            // Version 1 may stay FREEZING while processes are born: writing it again catches those (runc does so as well).
            self.set(true)?;
            if self.has_settled()? {
                return Ok(());
            }
            if begun.elapsed() > HANGING && self.freeze_beside() {
                return Ok(());
            }
            if begun.elapsed() > LIMIT {
                return Err(FreezerError::Busy { path: self.dir.clone() });
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Lets everything go on.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn thaw(&self) -> Result<()> {
        let beside = self.beside.as_ref().map_or(Ok(()), |dir| {
            let path = dir.join("freezer.state");
            fs::write(&path, "THAWED").map_err(|source| FreezerError::Io { attempt: "write", path, source })
        });
        self.set(false).and(beside)
    }

    /// By version 1 as well, on top of what stands already: whether all has stopped.
    fn freeze_beside(&self) -> bool {
        let Some(file) = self.beside.as_ref().map(|dir| dir.join("freezer.state")) else { return false };
        fs::write(&file, "FROZEN").is_ok()
            && fs::read_to_string(&file).is_ok_and(|text| text.trim() == "FROZEN")
    }

    fn has_settled(&self) -> Result<bool> {
        match self.version {
            Version::One => Ok(self.read("freezer.state")?.trim() == "FROZEN"),
            Version::Two => Ok(self.read("cgroup.events")?.lines().any(|line| line == "frozen 1")),
        }
    }

    fn set(&self, frozen: bool) -> Result<()> {
        let (file, value) = match (self.version, frozen) {
            (Version::One, true) => ("freezer.state", "FROZEN"),
            (Version::One, false) => ("freezer.state", "THAWED"),
            (Version::Two, true) => ("cgroup.freeze", "1"),
            (Version::Two, false) => ("cgroup.freeze", "0"),
        };
        let path = self.dir.join(file);
        fs::write(&path, value).map_err(|source| FreezerError::Io { attempt: "write", path, source })
    }

    fn read(&self, file: &str) -> Result<String> {
        let path = self.dir.join(file);
        match fs::read_to_string(&path) {
            Err(source) if source.kind() == ErrorKind::NotFound => Ok(String::new()),
            other => other.map_err(|source| FreezerError::Io { attempt: "read", path, source }),
        }
    }
}

/// Lets what is frozen die. Needed by version 1 alone: there a container may have frozen a part of itself, too.
///
/// # Errors
/// The first cgroup that could not be thawed; all are tried.
pub fn release(cgroup: &Cgroup) -> Result<()> {
    let hierarchy = cgroup.hierarchies.iter().find(|h| h.name == "freezer");
    match hierarchy.filter(|_| !cgroup.parent.as_os_str().is_empty()) {
        Some(hierarchy) => thaw_tree(&hierarchy.mount.join(&cgroup.parent)),
        None => Ok(()),
    }
}

fn thaw_tree(dir: &Path) -> Result<()> {
    let mut failed = Ok(());
    let walked = nested::walk(dir, &mut |step, here| {
        if let Step::Enter = step {
            failed = failed.and(nested::write(here, "freezer.state", "THAWED").map(drop));
        }
        Ok(())
    });
    walked.and(failed).map_err(|errno| FreezerError::Io {
        attempt: "thaw",
        path: dir.to_owned(),
        source: errno.into(),
    })
}
