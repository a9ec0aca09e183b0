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
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag};
use nix::sys::stat::FileStat;
use nix::sys::statfs::{OVERLAYFS_SUPER_MAGIC, fstatfs};
use nix::unistd::{UnlinkatFlags, fchownat, unlinkat};
use sysbox_sys::error::Named;
use sysbox_sys::mount::FsContext;
use sysbox_sys::{Result, SysError};
use tracing::{debug, trace};

use crate::aside::Upper;
use crate::beneath::{
    Kind, changed, kind_of, look, names, open_beneath, open_cached, open_dir, parent_of, shown,
};
use crate::pinned::{self, Listings, Standing, Until};

/// How often the engine may come in between while one directory is cured.
const TRIES: u32 = 8;
/// How deep below the last known directory in use one is found in one look, and how many are copied up in one.
const DEEPEST: u32 = 16;
const MOST_OWNED: usize = 64;
/// An engine that has looked at more directories than this was not on its way to one of them.
pub const MOST_LOOKED_AT: usize = 32;

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

/// What a look at the directories in use came to.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Owned {
    /// Something was cached that only a flush could tell from what is in use.
    pub has_flushed: bool,
    /// Directories that are the container's own from now on.
    pub copied: usize,
    /// Directories in which neither side sees what the other does until nobody has them in use.
    pub blind: usize,
}

impl Pair {
    /// `container` is the root of the container's overlay.
    ///
    /// # Errors
    /// No such upper directory; `ENODEV`: `container` is an overlay, and not on that upper.
    pub fn open(merged: &Path, upper: &Path, container: OwnedFd) -> Result<Self> {
        // A manager before us may have left something aside.
        let has_left = Cell::new(true);
        let pair = Self { merged: merged.to_owned(), container, upper: Upper::open(upper)?, has_left };
        // A container that was there before us may have gone to a root of its own making, one that it can write to.
        match pinned::compare(pair.container.as_fd(), pair.upper.dir(), Path::new("")) {
            Some(Standing::Own) => Ok(pair),
            _ => Err(SysError::new(
                Errno::ENODEV,
                format!("the container's root is not on {}", upper.display()),
            )),
        }
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
    /// As [`Pair::settle`]; the first, and the rest is done.
    pub fn settle_all(&self, except: &BTreeSet<PathBuf>) -> Result<()> {
        let mut pending = vec![PathBuf::new()];
        let mut settled = Ok(());
        while let Some(path) = pending.pop() {
            let opened = open_beneath(self.upper.dir(), &path, OFlag::O_RDONLY | OFlag::O_DIRECTORY);
            let names = match opened.and_then(|dir| names(dir.as_fd())) {
                Ok(names) => names,
                // What was there a moment ago may be gone.
                Err(error) if matches!(error.errno, Errno::ENOENT | Errno::ENOTDIR | Errno::ELOOP) => {
                    continue;
                }
                Err(error) => {
                    settled = settled.and(Err(error));
                    continue;
                }
            };
            let directories = names.iter().filter(|(_, kind)| *kind == Kind::Directory);
            for child in directories.map(|(name, _)| path.join(name)).filter(|child| !except.contains(child))
            {
                let cured = self.judge(&child).and_then(|view| match view {
                    View::StaleDirectory => self.cure_directory(&child).map(|()| true),
                    View::Same => Ok(true),
                    View::StaleFile | View::Apart => Ok(false),
                });
                match cured {
                    Ok(true) => pending.push(child),
                    Ok(false) => {}
                    // One that is nested deeper than a path is long, say, is not to keep the others from it.
                    Err(error) => settled = settled.and(Err(error)),
                }
            }
        }
        settled
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
        let engine = self.engine()?;
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

    /// As [`Pair::flush`]; the engine's side only where a directory is aside that the engine may still use.
    ///
    /// # Errors
    /// As [`Pair::flush`].
    pub fn flush_container(&self) -> Result<bool> {
        if self.has_left.get() {
            return self.flush();
        }
        flush(self.container.as_fd()).map(|()| true)
    }

    /// Drops what the engine's side remembers: names that it looked for in vain make no event.
    ///
    /// # Errors
    /// As [`Pair::flush`].
    pub fn flush_engine(&self) -> Result<()> {
        flush(self.engine()?.as_fd())
    }

    /// The root of the container's overlay, which remembers no file any more: one that is deleted meanwhile is gone, with
    /// what it takes on the disk.
    pub fn into_container(self) -> OwnedFd {
        if let Err(error) = flush(self.container.as_fd()) {
            debug!(%error, "flush of a container that has ended");
        }
        self.container
    }

    /// Whether something is aside, and [`Pair::flush`] to be called.
    pub fn has_left(&self) -> bool {
        self.has_left.get()
    }

    /// Gives the container its own copy of each directory that it has in use and only the layers have, before the engine
    /// writes to one; and finds those that somebody wrote to unheard. Flushes only if there may be any.
    ///
    /// Not to be called while the engine is at work: of two first copies at one moment, the later takes the place of the
    /// earlier if that is still empty, and whoever has that one in use can create nothing in it as long as it is.
    ///
    /// # Errors
    /// The engine's side not being mounted; a reconfigure that failed.
    pub fn own_pinned(&self, listings: &mut Listings) -> Result<Owned> {
        let (root, upper) = (self.container.as_fd(), self.upper.dir());
        let mut owned = Owned::default();
        if listings.look(root, upper, Until::First).is_empty() {
            return Ok(owned);
        }
        owned.has_flushed = true;
        let engine = self.engine()?;
        for _ in 0..DEEPEST {
            flush(root)?;
            let cached = listings.look(root, upper, Until::All);
            for path in &cached.differing {
                owned.blind += usize::from(!self.unblind(path)?);
            }
            if !cached.image_only.is_empty() {
                // What the engine remembers as the layers' it would copy up once more, over the container's.
                flush(engine.as_fd())?;
                owned.copied += self.own(&cached.image_only, engine.as_fd());
                flush(engine.as_fd())?;
            }
            if cached.unlisted.is_empty() {
                break;
            }
            cached.unlisted.iter().for_each(|path| listings.list(root, path));
        }
        Ok(owned)
    }

    /// Makes both sides ready for an access of the engine, which waits meanwhile: it remembers nothing, and the directories that
    /// it has `looked_at` are the container's own, as are those that the container has in use.
    ///
    /// # Errors
    /// As [`Pair::flush`] and [`Pair::own_pinned`].
    pub fn prepare(&self, looked_at: &BTreeSet<PathBuf>, listings: &mut Listings) -> Result<Owned> {
        if self.has_left.get() {
            self.gather()?;
        }
        let engine = self.engine()?;
        flush(engine.as_fd())?;
        let copied = self.own(looked_at, engine.as_fd());
        let owned = self.own_pinned(listings)?;
        flush(engine.as_fd())?;
        Ok(Owned { copied: owned.copied + copied, ..owned })
    }

    /// The directories that the engine remembers and only the layers have: an engine looks up a path in one access, and
    /// writes to it in the next. None if they are so many that it must have walked through the whole.
    ///
    /// # Errors
    /// The engine's side not being mounted.
    pub fn looked_at(&self, listings: &mut Listings) -> Result<Vec<PathBuf>> {
        let engine = self.engine()?;
        let mut looked_at = Vec::new();
        for _ in 0..DEEPEST {
            let cached = listings.look(engine.as_fd(), self.upper.dir(), Until::All);
            if cached.image_only.len() > MOST_LOOKED_AT {
                return Ok(Vec::new());
            }
            looked_at = cached.image_only;
            if cached.unlisted.is_empty() {
                break;
            }
            // Through the container's side: what is listed may come to be remembered.
            cached.unlisted.iter().for_each(|path| listings.list(self.container.as_fd(), path));
        }
        Ok(looked_at)
    }

    /// Has the container copy up what only the layers have. How many directories it did.
    fn own<'a>(&self, paths: impl IntoIterator<Item = &'a PathBuf>, engine: BorrowedFd<'_>) -> usize {
        let mut copied = 0;
        for path in paths.into_iter().take(MOST_OWNED) {
            if open_cached(engine, path).is_some() {
                debug!(path = %shown(path), "in use by both sides: not copied up now");
                continue;
            }
            match self.touch(path) {
                Ok(()) => copied += 1,
                Err(error) if is_in_the_way(error.errno) => {
                    if let Err(error) = self.cure_directory(path) {
                        debug!(path = %shown(path), %error, "the engine came first");
                    }
                }
                // A root that is read-only, a directory whose owner has no id in there: the container cannot write either.
                Err(error) => debug!(path = %shown(path), %error, "not copied up"),
            }
        }
        copied
    }

    /// Makes the container see a directory of the upper that it does not see. `false`: it cannot be helped as long as the
    /// directory is in use.
    fn unblind(&self, path: &Path) -> Result<bool> {
        let is_seen = || self.upper.is_seen_in_place(self.container.as_fd(), path);
        if is_seen()? {
            return Ok(true);
        }
        // As the layers had it, in most cases. Otherwise it is a copy of its own, the place of which was taken.
        self.cure_directory(path)?;
        is_seen()
    }

    /// The root of the engine's overlay, which the engine may have unmounted: then the directory is no business of ours.
    fn engine(&self) -> Result<OwnedFd> {
        let what = || format!("{}: the engine's overlay", self.merged.display());
        let engine = open_dir(&self.merged)?;
        if fstatfs(&engine).named(what)?.filesystem_type() != OVERLAYFS_SUPER_MAGIC {
            return Err(SysError::new(Errno::ENOENT, what()));
        }
        Ok(engine)
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

    /// Has the container's overlay copy a directory up, by a chown(2) that names no owner: the kernel makes the copy before it sees that
    /// nothing is to be changed. (To set the mode it has could undo what the container sets at that moment.)
    fn touch(&self, path: &Path) -> Result<()> {
        let fd = open_beneath(self.container.as_fd(), path, OFlag::O_PATH | OFlag::O_DIRECTORY)?;
        fchownat(&fd, "", None, None, AtFlags::AT_EMPTY_PATH)
            .named(|| format!("fchownat({}, -1, -1)", shown(path)))
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
