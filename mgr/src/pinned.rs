//! Which directories an overlay has in use, found in the kernel's cache of names. Looks only; what is done about one that
//! only the image's layers have is `overlay`'s.
//!
//! A name that is cached can be opened with RESOLVE_CACHED, another cannot. What is still cached after a flush is in use, by
//! whatever it is: a working directory, a descriptor, one on its way through a socket, a program, a library, a mount in any
//! mount namespace. So no process is looked at, and how many a container has does not matter.
//!
//! The kernel does not list its cache: the names to try are listed once for each directory that was in use. To list may put
//! names into the cache, so a listing is followed by a flush before its names are tried. The layers never change, so
//! that a listing stays good; a directory that the container or the engine makes later has nothing of the layers in it.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::ops::ControlFlow;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use nix::fcntl::OFlag;
use nix::sys::stat::{FileStat, fstat};
use sysbox_sys::creds::with_fs_ids;
use sysbox_sys::error::Named;

use crate::beneath::{Kind, changed, each_name, kind_of, look, open_beneath, open_cached};

/// How many names are tried in one look, and how many directories are looked into. A usual container has some 500 and 30.
const MOST_TRIED: usize = 10_000;
const MOST_FOUND: usize = 400;
/// How far one directory is read, and how many bytes of names are kept for one container: it may have made millions.
const MOST_READ: usize = 20_000;
const MOST_KEPT: usize = 256 * 1024;

/// The listings of one container: for each directory the names of those in it, each with a NUL.
#[derive(Debug, Default)]
pub struct Listings {
    names: BTreeMap<PathBuf, Box<[u8]>>,
    kept: usize,
}

/// What a look found among the directories that are cached.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Cached {
    /// Only the layers have it.
    pub image_only: Vec<PathBuf>,
    /// The upper has one too, and that is not what shows, or was just being changed.
    pub differing: Vec<PathBuf>,
    /// Names in it are not known yet.
    pub unlisted: Vec<PathBuf>,
}

impl Cached {
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// How far a look goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Until {
    /// To the first directory that something is to be done about: is there any?
    First,
    All,
}

impl Listings {
    /// The directories of the overlay at `root` that are cached, beneath whatever is mounted on none of them; `upper` is
    /// its upper directory.
    pub fn look(&self, root: BorrowedFd<'_>, upper: BorrowedFd<'_>, until: Until) -> Cached {
        let mut cached = Cached::default();
        let (mut tried, mut found) = (0, 0);
        let mut pending = vec![PathBuf::new()];
        while let Some(path) = pending.pop() {
            if until == Until::First && !cached.is_empty() {
                break;
            }
            let Some(names) = self.names.get(&path) else {
                if self.kept < MOST_KEPT {
                    cached.unlisted.push(path);
                }
                continue;
            };
            for child in cached_in(root, &path, names, MOST_TRIED.saturating_sub(tried)) {
                found += 1;
                if found > MOST_FOUND {
                    return cached;
                }
                match compare(root, upper, &child) {
                    Some(Standing::Own) => {}
                    Some(Standing::ImageOnly) => cached.image_only.push(child.clone()),
                    Some(Standing::Differing) => cached.differing.push(child.clone()),
                    None => continue,
                }
                pending.push(child);
            }
            tried += names.split(|byte| *byte == 0).count();
        }
        cached
    }

    /// Reads which directories are in the one at `path`.
    pub fn list(&mut self, root: BorrowedFd<'_>, path: &Path) {
        let (mut names, mut read) = (Vec::new(), 0);
        let room = MOST_KEPT.saturating_sub(self.kept);
        let opened = open_beneath(root, path, OFlag::O_RDONLY | OFlag::O_DIRECTORY);
        let listed = opened.and_then(|dir| {
            each_name(dir.as_fd(), |name, kind| {
                read += 1;
                if kind == Kind::Directory {
                    names.extend_from_slice(name.as_bytes());
                    names.push(0);
                }
                if read < MOST_READ && names.len() < room {
                    ControlFlow::Continue(())
                } else {
                    ControlFlow::Break(())
                }
            })
        });
        // Gone since, or covered: there is nothing to try in it.
        if let Err(error) = listed {
            tracing::debug!(%error, "list");
        }
        self.kept += names.len() + path.as_os_str().len();
        self.names.insert(path.to_owned(), names.into_boxed_slice());
    }
}

/// How the upper directory stands to a directory that the overlay shows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Standing {
    /// What shows is the upper's.
    Own,
    ImageOnly,
    /// The upper has one, and it is not what shows.
    Differing,
}

/// How the upper stands to the directory that `root` shows at `path`; `None` if it is of no concern.
pub fn compare(root: BorrowedFd<'_>, upper: BorrowedFd<'_>, path: &Path) -> Option<Standing> {
    let times = |file: &FileStat| (changed(file), file.st_mtime, file.st_mtime_nsec);
    // Where somebody writes, it may change between the two looks.
    for _ in 0..5 {
        let seen = look(root, path).ok()??;
        let Some(below) = look(upper, path).ok()? else { return Some(Standing::ImageOnly) };
        if kind_of(&below) != Kind::Directory {
            // The engine has removed it, or made a file of it.
            return None;
        }
        // One and the same directory has the same times, whichever way it is looked at.
        if times(&seen) == times(&below) {
            return Some(Standing::Own);
        }
    }
    Some(Standing::Differing)
}

/// Which of `names`, at most `most` of which are tried, are cached directories in the one at `path`.
fn cached_in(root: BorrowedFd<'_>, path: &Path, names: &[u8], most: usize) -> Vec<PathBuf> {
    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY;
    let Ok(dir) = open_beneath(root, path, flags) else { return Vec::new() };
    // A first look of the usual kind has the kernel remember who may search the layer's directory.
    let Ok(facts) =
        open_beneath(dir.as_fd(), Path::new("."), flags).and_then(|dir| fstat(&dir).named(String::new))
    else {
        return Vec::new();
    };
    let tried =
        names.split(|byte| *byte == 0).filter(|name| !name.is_empty()).take(most).map(OsStr::from_bytes);
    // As the owner: of anybody else the kernel would have to see the access list, which on a shifted layer it never does
    // without leaving its cache (do_ovl_get_acl).
    let cached = with_fs_ids(facts.st_uid, facts.st_gid, || {
        tried
            .filter(|name| open_cached(dir.as_fd(), Path::new(name)).is_some())
            .map(|name| path.join(name))
            .collect()
    });
    cached.unwrap_or_default()
}
