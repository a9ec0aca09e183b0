//! Two overlays on one upper directory, and what it takes for both to show the same. Acts on one container at a time; who
//! calls it when is `coherence`'s.
//!
//! The engine's overlay (`merged`) and the container's have the same layers. The kernel lets each believe that it is alone:
//! names, once looked up, are never asked for again. A no-op reconfigure drops what nobody uses of that; what is in use
//! ("pinned": a working directory, an open file, a running program, and every directory above) stays as it was. Where the
//! engine has written to a directory that the container has pinned as its layers had it, the container neither sees what
//! came nor can it create anything there (ENOTEMPTY: the kernel wants to put its own copy in the upper, and there is
//! one). The cure: the engine's copy aside, the container's copy up, the children back.

use std::cell::Cell;
use std::collections::BTreeSet;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::sys::stat::{FileStat, fstat};
use nix::unistd::{UnlinkatFlags, unlinkat};
use sysbox_sys::Result;
use sysbox_sys::error::Named;
use sysbox_sys::mount::FsContext;
use sysbox_sys::path::proc_path;
use tracing::{debug, trace};

use crate::aside::Upper;
use crate::beneath::{Kind, changed, kind_of, look, names, open_beneath, open_dir, parent_of, shown};

/// How often the engine may come in between while one directory is cured.
const TRIES: u32 = 8;

/// One container's two overlays and their upper. Holds the container's; the engine's only for the time of a flush, as the
/// engine must be able to unmount it.
#[derive(Debug)]
pub struct Pair {
    merged: PathBuf,
    container: OwnedFd,
    upper: Upper,
    /// A directory is aside that the engine may still write to.
    has_left: Cell<bool>,
}

/// What the container sees at a path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum View {
    Same,
    /// The layers' directory, though the upper has one.
    StaleDirectory,
    /// Something else, or nothing, though the upper has a file.
    StaleFile,
    /// Nothing in the upper, or hidden from the container by a mount.
    Apart,
}

impl Pair {
    /// `container` is the root of the container's overlay.
    ///
    /// # Errors
    /// No such upper directory.
    pub fn open(merged: &Path, upper: &Path, container: OwnedFd) -> Result<Self> {
        // A manager before us may have left something aside.
        let has_left = Cell::new(true);
        Ok(Self { merged: merged.to_owned(), container, upper: Upper::open(upper)?, has_left })
    }

    /// Makes the container see what the engine did at `path` (relative to the root), or at least write beside it: what is in a
    /// directory that went aside shows after the next flush.
    ///
    /// # Errors
    /// The first thing that could not be done; everything moved is back in its place or is noted beside the upper.
    pub fn settle(&self, path: &Path) -> Result<()> {
        let mut walked = PathBuf::new();
        for name in path.components() {
            walked.push(name);
            let view = self.judge(&walked)?;
            trace!(path = %shown(&walked), ?view, "settle");
            match view {
                View::Same => {}
                View::StaleDirectory => self.cure_directory(&walked)?,
                View::StaleFile => return self.cure_file(&walked),
                // Not in the upper, or not the container's to see: nothing below it is either.
                View::Apart => return Ok(()),
            }
        }
        Ok(())
    }

    /// As [`Pair::settle`], for every directory of the upper, when it is not known what the engine did. Does not look into
    /// the directories named in `except`.
    ///
    /// # Errors
    /// As [`Pair::settle`].
    pub fn settle_all(&self, except: &BTreeSet<PathBuf>) -> Result<()> {
        let mut pending = vec![PathBuf::new()];
        while let Some(path) = pending.pop() {
            let opened = open_beneath(self.upper.dir(), &path, OFlag::O_RDONLY | OFlag::O_DIRECTORY);
            // What was there a moment ago may be gone.
            let Ok(names) = opened.and_then(|dir| names(dir.as_fd())) else { continue };
            for (name, _) in names.iter().filter(|(_, kind)| *kind == Kind::Directory) {
                let child = path.join(name);
                if except.contains(&child) {
                    continue;
                }
                match self.judge(&child)? {
                    View::StaleDirectory => self.cure_directory(&child)?,
                    View::Same => {}
                    View::StaleFile | View::Apart => continue,
                }
                pending.push(child);
            }
        }
        Ok(())
    }

    /// Drops what either side remembers and does not use. `false`: a directory is aside that the engine still uses; it is to
    /// be called again in a while.
    ///
    /// # Errors
    /// A reconfigure that failed; the engine's side not being mounted.
    pub fn flush(&self) -> Result<bool> {
        // Before the engine forgets by which name it got there, all has to be where that name leads.
        let left = if self.has_left.get() { self.gather()? } else { Vec::new() };
        flush(self.container.as_fd())?;
        let engine = open_dir(&self.merged)?;
        flush(engine.as_fd())?;
        if left.is_empty() {
            return Ok(true);
        }
        for (aside, path) in left {
            let in_use = self.upper.is_seen(&aside, engine.as_fd(), &path)?;
            trace!(path = %shown(&path), in_use, "aside");
            if !in_use {
                self.upper.remove(&aside)?;
            }
        }
        Ok(self.gather()?.is_empty())
    }

    /// Drops what the engine's side remembers: names that it looked for in vain make no event.
    ///
    /// # Errors
    /// As [`Pair::flush`].
    pub fn flush_engine(&self) -> Result<()> {
        flush(open_dir(&self.merged)?.as_fd())
    }

    /// Brings back what is aside, and what the engine has put into directories that are.
    fn gather(&self) -> Result<Vec<(crate::aside::Aside, PathBuf)>> {
        for _ in 0..TRIES {
            let gathered = self.upper.gather(&|directory| {
                // Where the container does not see a directory there, or has a mount, there is nothing to be in its way.
                let touched = self.touch(directory);
                trace!(path = %shown(directory), ?touched, "its own copy");
            })?;
            self.has_left.set(!gathered.left.is_empty());
            if gathered.moved.is_empty() {
                return Ok(gathered.left);
            }
            gathered.moved.iter().try_for_each(|path| self.settle(path))?;
        }
        Ok(self.upper.gather(&|_| {})?.left)
    }

    /// What the container sees at `path`, against what is in the upper there.
    fn judge(&self, path: &Path) -> Result<View> {
        match self.compare(path)? {
            View::StaleDirectory | View::StaleFile => {
                // In most cases nobody uses it, and the container looks again.
                flush(self.container.as_fd())?;
                self.compare(path)
            }
            settled => Ok(settled),
        }
    }

    fn compare(&self, path: &Path) -> Result<View> {
        // First the upper: whoever sees it sees this change time or a later one. The layers' is older than any copy of it.
        let Some(upper) = look(self.upper.dir(), path)? else { return Ok(View::Apart) };
        if kind_of(&upper) == Kind::Whiteout {
            return Ok(View::Apart);
        }
        let seen = match look(self.container.as_fd(), path) {
            // Covered by a mount of the container's own.
            Err(error) if error.errno == Errno::EXDEV => return Ok(View::Apart),
            other => other?,
        };
        Ok(match seen {
            Some(seen) if changed(&seen) >= changed(&upper) => View::Same,
            Some(seen) if kind_of(&seen) == Kind::Directory && kind_of(&upper) == Kind::Directory => {
                View::StaleDirectory
            }
            _ => View::StaleFile,
        })
    }

    fn cure_directory(&self, path: &Path) -> Result<()> {
        // The container's own attempt to have a copy in the upper is the proof: it fails only where the engine's copy is in
        // the way. (Where that is empty, the attempt is the cure.)
        let mut touched = self.touch(path);
        let mut tries = 0;
        // The engine may make another copy meanwhile.
        while touched.as_ref().is_err_and(|error| is_in_the_way(error.errno)) && tries < TRIES {
            tries += 1;
            let aside = match self.upper.put_aside(path) {
                Ok(aside) => aside,
                Err(error) if error.errno == Errno::ENOENT => {
                    touched = self.touch(path);
                    continue;
                }
                Err(error) => return Err(error),
            };
            self.has_left.set(true);
            // If by now it was the container's own copy that went, back with it.
            if self.upper.is_seen(&aside, self.container.as_fd(), path)? {
                debug!(path = %shown(path), "it was the container's own");
                self.upper.restore(&aside, path)?;
            }
            touched = self.touch(path);
        }
        debug!(path = %shown(path), tries, "the container got its own copy of a directory that the engine wrote to");
        // The engine is at work in the directory that is aside, by a name that it does not look up again. To move files while
        // it unlinks or renames some would give it EIO: what is there comes back when it has been quiet (`flush`).
        touched.or_else(|error| self.gather().and(Err(error)))
    }

    /// The container has the layers' file in use. It loses the name, as if the engine had replaced the file in a plain
    /// container: who has it open keeps what is open, who opens it anew gets the engine's.
    fn cure_file(&self, path: &Path) -> Result<()> {
        let is_file = |file: Option<FileStat>| file.is_some_and(|file| kind_of(&file) == Kind::Other);
        // (A mount on it, which the unlink would take off, makes the second look an error.)
        if !is_file(look(self.upper.dir(), path)?) || !is_file(look(self.container.as_fd(), path)?) {
            return Ok(());
        }
        let (parent, name) = parent_of(self.container.as_fd(), path)?;
        self.upper.put_aside(path)?;
        self.has_left.set(true);
        let removed = unlinkat(&parent, name, UnlinkatFlags::NoRemoveDir);
        debug!(path = %shown(path), ?removed, "a file in use gave way to the engine's");
        self.upper.gather(&|_| {})?;
        removed.named(|| format!("unlinkat(<container>, {})", shown(path)))?;
        flush(self.container.as_fd())
    }

    /// Has the container's overlay copy a directory up, by giving it the mode that it has.
    fn touch(&self, path: &Path) -> Result<()> {
        let fd = open_beneath(self.container.as_fd(), path, OFlag::O_PATH | OFlag::O_DIRECTORY)?;
        let mode = fstat(&fd).named(|| format!("fstat({})", shown(path)))?.st_mode & 0o7777;
        std::fs::set_permissions(proc_path(fd.as_fd()), std::fs::Permissions::from_mode(mode))
            .named(|| format!("chmod({}, {mode:o})", shown(path)))
    }
}

/// Drops the dentries of an overlay that nobody uses: a reconfigure that changes nothing (70 to 90 µs).
fn flush(mount: BorrowedFd<'_>) -> Result<()> {
    FsContext::pick(mount)?.reconfigure()
}

/// What the kernel says when a copy in the upper keeps another overlay from making its own.
fn is_in_the_way(errno: Errno) -> bool {
    matches!(errno, Errno::ENOTEMPTY | Errno::EEXIST | Errno::ESTALE)
}
