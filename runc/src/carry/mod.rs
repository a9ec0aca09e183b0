//! Inner images that are to go with an image. An engine makes an image of a container by archiving its writable layer, and an
//! archive keeps neither the attributes of files that inner layers depend on (`user.overlay.opaque`), nor sockets, nor parts
//! of a second. So before an engine can look (at a pause and at a delete) all that is written into lists beside the files,
//! which the archive carries; `preload` reads them. (docs/decisions/0003-data-roots.md)
//!
//! The files are a container's: nothing is followed, nothing of it is run, and a list says nothing that its root could not
//! have done.

pub mod copy;
pub mod list;
pub mod trees;

use std::fs::File;
use std::io::{BufWriter, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::dir::Dir;
use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, openat, renameat};
use nix::sys::stat::{FileStat, Mode, SFlag, UtimensatFlags, fstat, fstatat, utimensat};
use nix::sys::time::TimeSpec;
use nix::unistd::{UnlinkatFlags, unlinkat};
use serde::{Deserialize, Serialize};
use sysbox_sys::error::Named;
use sysbox_sys::path::open_beneath;
use sysbox_sys::xattr::Entry as AtName;
use sysbox_sys::{Result, SysError};

use list::{Entry, Kind};

/// What an engine's archive of a container will hold of data roots.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Carried {
    /// The writable layer on the host.
    pub upper: PathBuf,
    /// Inside the container.
    pub roots: Vec<PathBuf>,
}

/// A container can make more files than anybody wants to wait for; the rest is then not listed, which is told.
const LIMIT: Duration = Duration::from_secs(30);
/// Docker's mark of a layer that others are built on: nobody writes to it any more.
const IS_IMMUTABLE: &str = "committed";
const DIRECTORY: OFlag = OFlag::O_RDONLY.union(OFlag::O_DIRECTORY);

/// Writes the lists. Nobody may write to the data roots meanwhile. Returns what failed; the rest is done.
pub fn record(carried: &Carried) -> Vec<String> {
    let began = Instant::now();
    let mut failures = Vec::new();
    if carried.roots.is_empty() {
        return failures;
    }
    let layer = match File::open(&carried.upper).named(|| format!("open({})", carried.upper.display())) {
        Ok(layer) => OwnedFd::from(layer),
        Err(error) => return vec![error.to_string()],
    };
    for path in &carried.roots {
        let root = match open_beneath(layer.as_fd(), path, DIRECTORY) {
            Ok(root) => root,
            Err(error) if matches!(error.errno, Errno::ENOENT | Errno::ENOTDIR | Errno::ELOOP) => continue,
            Err(error) => {
                failures.push(error.to_string());
                continue;
            }
        };
        let failed = |error: SysError| format!("data root {}: {error}", path.display());
        if let Err(error) = record_root(root.as_fd(), began + LIMIT, &mut failures) {
            failures.push(failed(error));
        }
    }
    tracing::debug!(took = ?began.elapsed(), "data roots are listed");
    failures
}

/// Takes the list of a data root away: it is true only as long as nobody writes there. Those of inner layers stay, as they
/// say nothing of what is not there. A directory of that name is not ours.
///
/// # Errors
/// As unlinkat(2), but for a list that is not there.
pub fn forget(root: BorrowedFd<'_>) -> Result<()> {
    match nix::unistd::unlinkat(root, list::NAME, nix::unistd::UnlinkatFlags::NoRemoveDir) {
        Ok(()) | Err(Errno::ENOENT | Errno::EISDIR) => Ok(()),
        Err(errno) => Err(errno).named(|| format!("unlink({})", list::NAME)),
    }
}

/// As [`forget`], of all of a container's. Returns what failed.
pub fn forget_all(carried: &Carried) -> Vec<String> {
    let Ok(layer) = File::open(&carried.upper) else { return Vec::new() };
    let roots = carried.roots.iter().filter_map(|path| open_beneath(layer.as_fd(), path, DIRECTORY).ok());
    roots.filter_map(|root| forget(root.as_fd()).err()).map(|error| error.to_string()).collect()
}

fn record_root(root: BorrowedFd<'_>, deadline: Instant, failures: &mut Vec<String>) -> Result<()> {
    let mut trees = Vec::new();
    let mut draft = None;
    walk(root, deadline, &mut |entry, facts| {
        // Nothing in it: then it needs no list.
        if entry.path.as_os_str().is_empty() || entry.path == Path::new(list::NAME) {
            return Ok(Enter::Yes);
        }
        let draft = match &mut draft {
            Some(draft) => draft,
            none => none.insert(Draft::begin(root)?),
        };
        // Everything is listed: what is not in the list had been deleted when it was written.
        draft.add(&entry)?;
        let is_tree =
            is_kind(facts, SFlag::S_IFDIR) && trees::tree_of(&entry.path).as_ref() == Some(&entry.path);
        if is_tree {
            trees.push(entry.path);
            return Ok(Enter::No);
        }
        Ok(Enter::Yes)
    })?;
    draft.map(Draft::finish).transpose()?;
    for tree in trees {
        if let Err(error) = record_tree(root, &tree, deadline) {
            failures.push(format!("inner layer {}: {error}", tree.display()));
            if error.errno == Errno::ETIMEDOUT {
                break;
            }
        }
    }
    Ok(())
}

/// The list of an inner layer is beside its files, in the directory that goes with it.
fn record_tree(root: BorrowedFd<'_>, tree: &Path, deadline: Instant) -> Result<()> {
    let home = open_beneath(root, tree.parent().unwrap_or(Path::new("")), DIRECTORY)?;
    let is_there = |name: &str| fstatat(&home, name, AtFlags::AT_SYMLINK_NOFOLLOW).is_ok();
    if is_there(IS_IMMUTABLE) && is_there(list::NAME) {
        return Ok(());
    }
    let files = open_beneath(root, tree, DIRECTORY)?;
    let mut draft = Draft::begin(home.as_fd())?;
    walk(files.as_fd(), deadline, &mut |entry, _| {
        if entry.is_needed() {
            draft.add(&entry)?;
        }
        Ok(Enter::Yes)
    })?;
    draft.finish()
}

/// A list that is being written. Dropped half-way it leaves the older one in its place, and nothing of itself.
struct Draft<'a> {
    dir: BorrowedFd<'a>,
    mtime: TimeSpec,
    file: BufWriter<File>,
    is_whole: bool,
}

impl Drop for Draft<'_> {
    fn drop(&mut self) {
        if self.is_whole {
            return;
        }
        let removed =
            unlinkat(self.dir, DRAFT, UnlinkatFlags::NoRemoveDir).named(|| format!("unlink({DRAFT})"));
        if let Err(error) = removed.and_then(|()| set_mtime(self.dir, Path::new("."), self.mtime)) {
            tracing::warn!(%error, "a list of inner images that was not finished");
        }
    }
}

const DRAFT: &str = ".sysbox-carried.new";

impl<'a> Draft<'a> {
    fn begin(dir: BorrowedFd<'a>) -> Result<Self> {
        let what = || format!("create({DRAFT})");
        let facts = fstat(dir).named(what)?;
        match unlinkat(dir, DRAFT, UnlinkatFlags::NoRemoveDir) {
            Ok(()) | Err(Errno::ENOENT) => {}
            Err(errno) => return Err(errno).named(what),
        }
        let flags = OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let file = openat(dir, DRAFT, flags, Mode::from_bits_truncate(0o600)).named(what)?;
        let mut file = BufWriter::with_capacity(1 << 16, File::from(file));
        file.write_all(list::HEAD).named(what)?;
        Ok(Self { dir, mtime: TimeSpec::new(facts.st_mtime, facts.st_mtime_nsec), file, is_whole: false })
    }

    fn add(&mut self, entry: &Entry) -> Result<()> {
        self.file.write_all(entry.line().as_bytes()).named(|| format!("write({DRAFT})"))
    }

    fn finish(mut self) -> Result<()> {
        self.file.flush().named(|| format!("write({DRAFT})"))?;
        renameat(self.dir, DRAFT, self.dir, list::NAME)
            .named(|| format!("rename({DRAFT}, {})", list::NAME))?;
        self.is_whole = true;
        // The directory is an inner engine's; that we wrote in it is not to be seen.
        set_mtime(self.dir, Path::new("."), self.mtime)
    }
}

pub(crate) fn set_mtime(dir: BorrowedFd<'_>, name: &Path, mtime: TimeSpec) -> Result<()> {
    utimensat(dir, name, &TimeSpec::UTIME_OMIT, &mtime, UtimensatFlags::NoFollowSymlink)
        .named(|| format!("utimensat({})", name.display()))
}

pub(crate) fn is_kind(facts: &FileStat, kind: SFlag) -> bool {
    SFlag::from_bits_truncate(facts.st_mode & SFlag::S_IFMT.bits()) == kind
}

pub(crate) fn is_whiteout(facts: &FileStat) -> bool {
    is_kind(facts, SFlag::S_IFCHR) && facts.st_rdev == 0
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Enter {
    Yes,
    No,
}

/// Tells of everything below `base`, itself first, directories before what is in them.
pub(crate) fn walk(
    base: BorrowedFd<'_>,
    deadline: Instant,
    tell: &mut dyn FnMut(Entry, &FileStat) -> Result<Enter>,
) -> Result<()> {
    let facts = fstat(base).named(|| "fstat".to_owned())?;
    let itself = entry(base, Path::new("."), PathBuf::new(), &facts)?;
    if tell(itself, &facts)? == Enter::No {
        return Ok(());
    }
    let mut pending = vec![PathBuf::new()];
    while let Some(path) = pending.pop() {
        let dir = open_beneath(base, &path, DIRECTORY)?;
        for name in names(dir.as_fd())? {
            if Instant::now() > deadline {
                return Err(SysError::new(Errno::ETIMEDOUT, format!("walk to {}", path.display())));
            }
            let what = || format!("fstatat({}/{})", path.display(), Path::new(&name).display());
            let facts = match fstatat(&dir, name.as_os_str(), AtFlags::AT_SYMLINK_NOFOLLOW) {
                Ok(facts) => facts,
                // A draft that an earlier run had left.
                Err(Errno::ENOENT) => continue,
                Err(errno) => return Err(errno).named(what),
            };
            let below = path.join(&name);
            let found = entry(dir.as_fd(), Path::new(&name), below.clone(), &facts)?;
            if tell(found, &facts)? == Enter::Yes && is_kind(&facts, SFlag::S_IFDIR) {
                pending.push(below);
            }
        }
    }
    Ok(())
}

/// The names in an opened directory.
pub(crate) fn names(dir: BorrowedFd<'_>) -> Result<Vec<std::ffi::OsString>> {
    use std::os::unix::ffi::OsStrExt;
    let what = || "list a directory".to_owned();
    let mut dir = Dir::openat(dir, ".", DIRECTORY | OFlag::O_CLOEXEC, Mode::empty()).named(what)?;
    let mut names = Vec::new();
    for found in dir.iter() {
        let found = found.named(what)?;
        let name = std::ffi::OsStr::from_bytes(found.file_name().to_bytes());
        if name != "." && name != ".." {
            names.push(name.to_owned());
        }
    }
    Ok(names)
}

fn entry(dir: BorrowedFd<'_>, name: &Path, path: PathBuf, facts: &FileStat) -> Result<Entry> {
    let nanoseconds = u32::try_from(facts.st_mtime_nsec).unwrap_or_default();
    let mut entry = Entry { path, mtime: Some((facts.st_mtime, nanoseconds)), ..Entry::default() };
    if is_whiteout(facts) {
        // It has no attributes of its own, and its time means nothing.
        return Ok(Entry { kind: Kind::Whiteout, mtime: None, ..entry });
    }
    if is_kind(facts, SFlag::S_IFSOCK) {
        entry.kind = Kind::Socket { mode: facts.st_mode & 0o7777, uid: facts.st_uid, gid: facts.st_gid };
    } else if nanoseconds == 0 {
        entry.mtime = None;
    }
    if is_kind(facts, SFlag::S_IFREG) || is_kind(facts, SFlag::S_IFDIR) {
        let file = AtName { dir, name: name.as_os_str() };
        for attribute in file.list()?.into_iter().filter(|name| list::is_carried(name.to_bytes())) {
            let value = file.get(&attribute)?;
            entry.attributes.push((attribute, value));
        }
    }
    Ok(entry)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt;

    #[test]
    fn a_list_that_is_not_finished_leaves_nothing_of_itself() {
        let dir = tempfile::tempdir().unwrap();
        let tree = Path::new("overlay2/a/diff");
        std::fs::create_dir_all(dir.path().join(tree).join("b")).unwrap();
        let root = OwnedFd::from(File::open(dir.path()).unwrap());
        let homes = [dir.path().to_owned(), dir.path().join("overlay2/a")];
        let state = || {
            homes.clone().map(|home| {
                let names = names(File::open(&home).unwrap().as_fd()).unwrap();
                let facts = std::fs::metadata(home).unwrap();
                (names, facts.mtime(), facts.mtime_nsec())
            })
        };
        let before = state();
        let past = Instant::now() - Duration::from_secs(1);
        assert_eq!(record_root(root.as_fd(), past, &mut Vec::new()).unwrap_err().errno, Errno::ETIMEDOUT);
        assert_eq!(record_tree(root.as_fd(), tree, past).unwrap_err().errno, Errno::ETIMEDOUT);
        assert_eq!(state(), before);
        let later = Instant::now() + LIMIT;
        record_root(root.as_fd(), later, &mut Vec::new()).unwrap();
        assert!(homes.iter().all(|home| home.join(list::NAME).is_file()));
    }
}
