//! Inner images that come with an image: the first time a container of it is made, what its layers hold of a data root is
//! copied into the container's own layer, as it lies on disk, and what the layers' archives dropped is put back by the lists
//! that `carry` wrote. The merged view would not do: the outer overlay takes the inner layers' whiteouts for its own and hides
//! them (docs/decisions/0003-data-roots.md).

use std::cell::Cell;
use std::collections::HashSet;
use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, OpenHow, ResolveFlag, openat2};
use nix::sys::stat::{Mode, SFlag, fstatat, mknodat};
use nix::sys::time::TimeSpec;
use nix::unistd::{Gid, Uid, fchownat};
use sysbox_sys::SysError;
use sysbox_sys::error::Named;
use sysbox_sys::path::open_beneath;
use sysbox_sys::xattr::{self, Entry as AtName};

use crate::carry::copy::{Copied, broken, lay_over, remove, shown};
use crate::carry::list::{self, Entry, Kind};
use crate::carry::{self, Enter, is_whiteout, names, set_mtime, trees, walk};

/// Opens `path` below a layer's directory, by no link: the layer is the image's, and so hostile. `None` where it is not.
///
/// # Errors
/// Anything but the path not being there.
pub fn open_in_layer(layer: &Path, path: &Path, flags: OFlag) -> sysbox_sys::Result<Option<OwnedFd>> {
    let what = || format!("open({}, {})", layer.display(), path.display());
    let root = File::open(layer).named(what)?;
    let inside = path.strip_prefix("/").unwrap_or(path);
    let how = OpenHow::new()
        .flags(flags | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC)
        .resolve(ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_SYMLINKS);
    match openat2(&root, inside, how) {
        Ok(fd) => Ok(Some(fd)),
        // A whiteout or a link in its place: this layer has no directory there.
        Err(Errno::ENOENT | Errno::ENOTDIR | Errno::ELOOP) => Ok(None),
        Err(errno) => Err(SysError::new(errno, what())),
    }
}

/// Set on the directory in the container's own layer when everything is there: a copy that was cut off is begun again.
const DONE: &std::ffi::CStr = c"trusted.sysbox.preloaded";
/// What is not whole yet, beside the layer or the volume. No volume has such a name.
const FRESH: &str = ".sysbox-preload";
const OPAQUE: &std::ffi::CStr = c"trusted.overlay.opaque";
/// The largest list that is read, in bytes and in lines; a list comes with an image, and is held in memory.
const LONGEST_LIST: u64 = 256 << 20;
const MOST_LINES: u64 = 2_000_000;

/// What all lists of a data root together may cost: an image decides how many there are.
#[derive(Debug)]
struct Budget {
    lines: Cell<u64>,
    until: Instant,
}

impl Budget {
    fn new() -> Self {
        Self { lines: Cell::new(4 * MOST_LINES), until: Instant::now() + Duration::from_secs(1800) }
    }

    fn spend_line(&self) -> sysbox_sys::Result<()> {
        let Some(left) = self.lines.get().checked_sub(1) else {
            return Err(broken(format!("{}: lists of too many lines", list::NAME)));
        };
        self.lines.set(left);
        // A look at the clock for each line would cost more than most lines.
        if left % 1024 == 0 && Instant::now() > self.until {
            return Err(broken(format!("{}: its lists take too long", list::NAME)));
        }
        Ok(())
    }
}

/// Brings what the image holds of a data root into `target`, the directory of the container's own layer, once, from `lowers`,
/// the topmost first. `beside` is a directory of the engine's on the same file system, which only the host's root may enter.
///
/// The copy is made in a new, empty directory; what is in there is moved when it is whole. What the target has already stays.
/// Returns what is not as it was, for a person.
///
/// # Errors
/// The copy or a move failing; nothing of it is in the target then that is not whole.
pub fn bring(
    lowers: &[PathBuf],
    path: &Path,
    target: BorrowedFd<'_>,
    beside: &Path,
) -> sysbox_sys::Result<Vec<String>> {
    if xattr::exists(target, DONE) {
        // What was listed when it stopped is not what it will have when it has run again.
        return carry::forget(target).map(|()| Vec::new());
    }
    let mut warnings = Vec::new();
    let budget = Budget::new();
    let parts = parts(lowers, path, &budget)?;
    if !parts.is_empty() {
        let what = || format!("bring {} of the image", path.display());
        let around = File::open(beside).named(what)?;
        remove(around.as_fd(), FRESH.as_ref())?;
        std::fs::DirBuilder::new().mode(0o700).create(beside.join(FRESH)).named(what)?;
        let into = open_beneath(around.as_fd(), Path::new(FRESH), OFlag::O_RDONLY | OFlag::O_DIRECTORY)?;
        let filled = fill(&parts, into.as_fd(), path, &budget, &mut warnings)
            .and_then(|()| carry::forget(into.as_fd()))
            .and_then(|()| move_all(into.as_fd(), target));
        let removed = remove(around.as_fd(), FRESH.as_ref());
        // The first failure is the one that matters; what is left is taken away by the next create, or with the layer.
        filled.and(removed)?;
    }
    xattr::set(target, DONE, b"1").map(|()| warnings)
}

fn move_all(from: BorrowedFd<'_>, to: BorrowedFd<'_>) -> sysbox_sys::Result<()> {
    for name in names(from)? {
        let flags = nix::fcntl::RenameFlags::RENAME_NOREPLACE;
        match nix::fcntl::renameat2(from, name.as_os_str(), to, name.as_os_str(), flags) {
            Ok(()) | Err(Errno::EEXIST) => {}
            Err(errno) => {
                return Err(SysError::new(errno, format!("rename({})", Path::new(&name).display())));
            }
        }
    }
    Ok(())
}

/// The directories of the layers that have a part in the data root, the lowest first.
fn parts(lowers: &[PathBuf], path: &Path, budget: &Budget) -> sysbox_sys::Result<Vec<OwnedFd>> {
    let mut parts = Vec::new();
    for lower in lowers {
        let ends_here = hides_lower(lower, path)?;
        if let Some(part) = open_in_layer(lower, path, OFlag::O_RDONLY)? {
            let is_whole = is_whole(part.as_fd(), budget)?;
            if !names(part.as_fd())?.is_empty() || is_whole {
                parts.push(part);
            }
            if is_whole {
                break;
            }
        }
        if ends_here {
            break;
        }
    }
    parts.reverse();
    Ok(parts)
}

/// Whether nothing of lower layers shows at `path`: something on the way is no directory, or opaque.
fn hides_lower(layer: &Path, path: &Path) -> sysbox_sys::Result<bool> {
    let inside = path.strip_prefix("/").unwrap_or(path);
    let on_the_way: Vec<&Path> = inside.ancestors().filter(|part| !part.as_os_str().is_empty()).collect();
    let root = File::open(layer).named(|| format!("open({})", layer.display()))?;
    for part in on_the_way.into_iter().rev() {
        match open_beneath(root.as_fd(), part, OFlag::O_RDONLY | OFlag::O_DIRECTORY) {
            Ok(dir) => {
                let opaque = AtName { dir: dir.as_fd(), name: ".".as_ref() }.get(OPAQUE);
                if opaque.is_ok_and(|value| value == b"y") {
                    return Ok(true);
                }
            }
            Err(error) if error.errno == Errno::ENOENT => return Ok(false),
            Err(error) if matches!(error.errno, Errno::ENOTDIR | Errno::ELOOP) => return Ok(true),
            Err(error) => return Err(error),
        }
    }
    Ok(false)
}

/// Whether the layer has everything that was there when its list was written. One that an engine made by comparing has only
/// what changed.
fn is_whole(part: BorrowedFd<'_>, budget: &Budget) -> sysbox_sys::Result<bool> {
    let mut is_whole = true;
    let read = read_list(part, budget, &mut |entry| {
        let archived = entry.kind == Kind::Archived && !entry.path.as_os_str().is_empty();
        is_whole = is_whole
            && (!archived || open_beneath(part, &entry.path, OFlag::O_PATH | OFlag::O_NOFOLLOW).is_ok());
        Ok(())
    });
    // A broken list says nothing; `fill` tells of it.
    Ok(matches!(read, Ok(true)) && is_whole)
}

/// Tells of each line of the list in `dir`. `false`: there is no list.
fn read_list(
    dir: BorrowedFd<'_>,
    budget: &Budget,
    tell: &mut dyn FnMut(Entry) -> sysbox_sys::Result<()>,
) -> sysbox_sys::Result<bool> {
    let flags = OFlag::O_RDONLY | OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK;
    let file = match open_beneath(dir, Path::new(list::NAME), flags) {
        Ok(file) => File::from(file),
        Err(error) if error.errno == Errno::ENOENT => return Ok(false),
        Err(error) => return Err(error),
    };
    let facts = file.metadata().named(|| "fstat".to_owned())?;
    if !facts.is_file() || facts.len() > LONGEST_LIST {
        return Err(broken(format!("{}: no list that we wrote", list::NAME)));
    }
    let mut reader = BufReader::with_capacity(1 << 16, file);
    let mut line = Vec::new();
    let mut is_first = true;
    let mut lines = 0;
    loop {
        line.clear();
        lines += 1;
        budget.spend_line()?;
        if lines > MOST_LINES {
            return Err(broken(format!("{}: more than {MOST_LINES} lines", list::NAME)));
        }
        let most = u64::try_from(list::LONGEST_LINE).unwrap_or(u64::MAX);
        let count = reader.by_ref().take(most).read_until(b'\n', &mut line);
        if count.named(|| format!("read({})", list::NAME))? == 0 {
            return Ok(true);
        }
        let said = if is_first { (line == list::HEAD).then_some(None) } else { None };
        let entry = match said {
            Some(nothing) => nothing,
            None => {
                let text = line.strip_suffix(b"\n").filter(|_| !is_first);
                let entry = text.and_then(Entry::parse);
                Some(entry.ok_or_else(|| broken(format!("{}: `{}`", list::NAME, shown(&line))))?)
            }
        };
        is_first = false;
        entry.map(&mut *tell).transpose()?;
    }
}

/// Lays the parts over one another, each with what its lists say of it.
fn fill(
    parts: &[OwnedFd],
    into: BorrowedFd<'_>,
    path: &Path,
    budget: &Budget,
    warnings: &mut Vec<String>,
) -> sysbox_sys::Result<()> {
    let began = Instant::now();
    tracing::info!(data_root = %path.display(), layers = parts.len(), "inner images of the image: the first start copies them");
    let mut copied = Copied::nothing();
    for (number, part) in parts.iter().enumerate() {
        // The list that is there is of this part, or there is none.
        remove(into, list::NAME.as_ref())?;
        copied.trees.clear();
        lay_over(part.as_fd(), into, &mut copied)?;
        let mut wrong = |of: &Path, error: SysError| {
            warnings.push(format!(
                "data root {}: {}: {error}; attributes that an archive drops are not put back there",
                path.display(),
                of.display()
            ));
        };
        if number > 0
            && let Err(error) = prune(into, budget)
        {
            wrong(Path::new("deleted files"), error);
        }
        if let Err(error) = put_back(into, into, budget) {
            wrong(Path::new("."), error);
        }
        for tree in &copied.trees {
            let home = open_beneath(into, tree.parent().unwrap_or(Path::new("")), OFlag::O_RDONLY)?;
            let files = open_beneath(into, tree, OFlag::O_RDONLY | OFlag::O_DIRECTORY)?;
            if let Err(error) = put_back(home.as_fd(), files.as_fd(), budget) {
                wrong(tree, error);
            }
        }
    }
    let (files, mebibytes) = (copied.files, copied.bytes >> 20);
    tracing::info!(files, mebibytes, reflinks = ?copied.reflinks, took = ?began.elapsed(), "inner images are copied");
    Ok(())
}

/// Takes away what was no more there when the list was written: of a layer that has only what changed, the rest came from
/// lower ones.
fn prune(into: BorrowedFd<'_>, budget: &Budget) -> sysbox_sys::Result<()> {
    let mut listed: HashSet<PathBuf> = HashSet::from([PathBuf::new(), PathBuf::from(list::NAME)]);
    let has_list = read_list(into, budget, &mut |entry| {
        listed.insert(entry.path);
        Ok(())
    })?;
    if !has_list {
        return Ok(());
    }
    let mut gone = Vec::new();
    let far = Instant::now() + Duration::from_secs(3600);
    walk(into, far, &mut |entry, _| {
        // The lists of inner layers are beside their files, and written after this one.
        let is_list = entry.path.file_name() == Some(list::NAME.as_ref());
        if !listed.contains(&entry.path) && !is_list {
            gone.push(entry.path);
            return Ok(Enter::No);
        }
        let is_tree = trees::tree_of(&entry.path).as_ref() == Some(&entry.path);
        Ok(if is_tree { Enter::No } else { Enter::Yes })
    })?;
    for path in gone {
        let parent = open_beneath(into, path.parent().unwrap_or(Path::new("")), OFlag::O_RDONLY)?;
        remove(parent.as_fd(), path.file_name().unwrap_or_default())?;
    }
    Ok(())
}

/// Puts back what the list in `home` says of the files below `base`.
fn put_back(home: BorrowedFd<'_>, base: BorrowedFd<'_>, budget: &Budget) -> sysbox_sys::Result<()> {
    let mut late = Vec::new();
    read_list(home, budget, &mut |entry| {
        if let Some(times) = put_one_back(base, &entry)? {
            late.push((entry.path, times));
        }
        Ok(())
    })?;
    // Last, and the innermost first: what was made in a directory has changed its time.
    for (path, mtime) in late.into_iter().rev() {
        let (dir, name) = place(base, &path)?;
        set_mtime(dir.as_fd(), &name, mtime)?;
    }
    Ok(())
}

/// The directory of a path below `base`, and its name there.
fn place(base: BorrowedFd<'_>, path: &Path) -> sysbox_sys::Result<(OwnedFd, PathBuf)> {
    let parent = path.parent().unwrap_or(Path::new(""));
    let dir = open_beneath(base, parent, OFlag::O_RDONLY | OFlag::O_DIRECTORY)?;
    Ok((dir, path.file_name().map_or_else(|| PathBuf::from("."), PathBuf::from)))
}

/// Returns the time that is still to be set.
fn put_one_back(base: BorrowedFd<'_>, entry: &Entry) -> sysbox_sys::Result<Option<TimeSpec>> {
    if !entry.is_needed() {
        return Ok(None);
    }
    let (dir, name) = match place(base, &entry.path) {
        Ok(place) => place,
        // Its directory went after the list was written, by a layer that is not ours.
        Err(error) if matches!(error.errno, Errno::ENOENT | Errno::ENOTDIR | Errno::ELOOP) => {
            return Ok(None);
        }
        Err(error) => return Err(error),
    };
    let what = |call: &str| format!("{call}({})", entry.path.display());
    let look = || fstatat(&dir, &name, AtFlags::AT_SYMLINK_NOFOLLOW);
    let there = match look() {
        Ok(facts) => Some(facts),
        Err(Errno::ENOENT) => None,
        Err(errno) => return Err(errno).named(|| what("fstatat")),
    };
    let make = |kind, mode| {
        let before = nix::sys::stat::fstat(&dir).named(|| what("fstat"))?;
        let made = mknodat(&dir, &name, kind, Mode::from_bits_truncate(mode), 0);
        made.named(|| what("mknodat"))?;
        set_mtime(dir.as_fd(), Path::new("."), TimeSpec::new(before.st_mtime, before.st_mtime_nsec))
    };
    match (entry.kind, there) {
        (Kind::Whiteout, None) => make(SFlag::S_IFCHR, 0)?,
        (Kind::Socket { mode, uid, gid }, None) => {
            make(SFlag::S_IFSOCK, mode)?;
            let owner = (Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)));
            fchownat(&dir, &name, owner.0, owner.1, AtFlags::AT_SYMLINK_NOFOLLOW)
                .named(|| what("fchownat"))?;
            let follow = nix::sys::stat::FchmodatFlags::FollowSymlink;
            nix::sys::stat::fchmodat(&dir, &name, Mode::from_bits_truncate(mode), follow)
                .named(|| what("fchmodat"))?;
        }
        (_, None) => return Ok(None),
        (_, Some(facts)) if is_whiteout(&facts) => return Ok(None),
        _ => {}
    }
    for (attribute, value) in &entry.attributes {
        AtName { dir: dir.as_fd(), name: name.as_os_str() }.set(attribute, value)?;
    }
    let Some((seconds, nanoseconds)) = entry.mtime else { return Ok(None) };
    // Another second: the file was written to after the list was.
    let is_it = there.is_none_or(|facts| facts.st_mtime == seconds);
    Ok(is_it.then(|| TimeSpec::new(seconds, i64::from(nanoseconds))))
}

#[cfg(test)]
#[path = "preload_tests.rs"]
mod tests;
