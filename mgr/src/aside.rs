//! An upper directory as the disk has it, and the place beside it for what is on its way from the engine's copy of a
//! directory to the container's.
//!
//! What is aside survives this process: each `N` in `sysbox-aside` has an `N.to`, a link that says where it belongs, made
//! before `N` is moved there and removed after it is back. A directory that was moved aside is emptied into its place, but
//! itself stays until nobody uses it: the engine, which may have it as a working place, goes on writing to it.

use std::ffi::{OsStr, OsString};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{OFlag, RenameFlags, readlinkat};
use nix::sys::stat::{Mode, UtimensatFlags, mkdirat, utimensat};
use nix::sys::time::TimeSpec;
use nix::unistd::{UnlinkatFlags, symlinkat, unlinkat};
use sysbox_sys::error::Named;
use sysbox_sys::{Result, SysError};
use tracing::{debug, warn};

use crate::beneath::{Kind, changed, kind_of, look, names, open_beneath, open_dir, parent_of, rename, shown};

/// Beside the upper directory; the engine removes it with the layer.
pub const ASIDE: &str = "sysbox-aside";

const READ_DIR: OFlag = OFlag::O_RDONLY.union(OFlag::O_DIRECTORY);

#[derive(Debug)]
pub struct Upper {
    dir: OwnedFd,
    beside: OwnedFd,
}

/// Something that was moved aside: its number.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Aside(OsString);

/// What bringing back came to.
#[derive(Debug, Default)]
pub struct Gathered {
    /// What is in its place now that was not before.
    pub moved: Vec<PathBuf>,
    /// Emptied directories that are still aside, and where they belonged.
    pub left: Vec<(Aside, PathBuf)>,
}

impl Upper {
    /// # Errors
    /// No such directory.
    pub fn open(upper: &Path) -> Result<Self> {
        Ok(Self { dir: open_dir(upper)?, beside: open_dir(upper.parent().unwrap_or(upper))? })
    }

    /// Puts back what a manager that was killed left aside, of a container that does not run.
    ///
    /// # Errors
    /// What cannot be moved.
    pub fn recover(&self) -> Result<()> {
        for (aside, _) in self.gather(&|_| {})?.left {
            self.remove(&aside)?;
        }
        Ok(())
    }

    pub fn dir(&self) -> BorrowedFd<'_> {
        self.dir.as_fd()
    }

    /// Moves what is at `path` aside.
    ///
    /// # Errors
    /// `ENOENT`: nothing is there.
    pub fn put_aside(&self, path: &Path) -> Result<Aside> {
        let place = self.place_or_make()?;
        let (parent, name) = parent_of(self.dir(), path)?;
        for number in 0u32..1 << 20 {
            let aside = Aside(OsString::from(number.to_string()));
            match symlinkat(path, &place, aside.note().as_os_str()) {
                Err(Errno::EEXIST) => continue,
                other => other.named(|| format!("symlinkat({}, aside)", shown(path)))?,
            }
            return match rename(parent.as_fd(), name, place.as_fd(), &aside.0, RenameFlags::RENAME_NOREPLACE)
            {
                Ok(()) => Ok(aside),
                Err(error) => aside.forget(place.as_fd()).and(Err(error)),
            };
        }
        Err(SysError::new(Errno::ENOSPC, "a free number in the aside directory"))
    }

    /// Puts back the very thing that was moved aside; what has taken its place goes aside instead.
    ///
    /// # Errors
    /// What renameat2(2) says.
    pub fn restore(&self, aside: &Aside, path: &Path) -> Result<()> {
        let Some(place) = self.place()? else { return Ok(()) };
        let (parent, name) = parent_of(self.dir(), path)?;
        match rename(place.as_fd(), &aside.0, parent.as_fd(), name, RenameFlags::RENAME_NOREPLACE) {
            Err(error) if error.errno == Errno::EEXIST => {
                rename(place.as_fd(), &aside.0, parent.as_fd(), name, RenameFlags::RENAME_EXCHANGE)
            }
            other => other.and_then(|()| aside.forget(place.as_fd())),
        }
    }

    /// Whether the overlay at `root` has the very directory that is aside as what it shows at `path`.
    ///
    /// # Errors
    /// As [`look`], and utimensat(2).
    pub fn is_seen(&self, aside: &Aside, root: BorrowedFd<'_>, path: &Path) -> Result<bool> {
        let Some(place) = self.place()? else { return Ok(false) };
        is_shown(place.as_fd(), &aside.0, root, path)
    }

    /// Whether the overlay at `root` has the very directory that is at `path` in the upper as what it shows there.
    ///
    /// # Errors
    /// As [`Upper::is_seen`].
    pub fn is_seen_in_place(&self, root: BorrowedFd<'_>, path: &Path) -> Result<bool> {
        let (parent, name) = parent_of(self.dir(), path)?;
        is_shown(parent.as_fd(), name, root, path)
    }

    /// Brings everything back, or what is in it. Before the children of a directory are brought into a directory of the
    /// layers, `make_own` is asked to have the container make its own copy of that: then no child is in its way.
    ///
    /// # Errors
    /// The first failure; what was not brought back is still noted.
    pub fn gather(&self, make_own: &dyn Fn(&Path)) -> Result<Gathered> {
        let mut gathered = Gathered::default();
        let Some(place) = self.place()? else { return Ok(gathered) };
        for (note, _) in names(place.as_fd())? {
            let Some(number) = note.as_bytes().strip_suffix(b".to") else { continue };
            let aside = Aside(OsStr::from_bytes(number).to_owned());
            let to = readlinkat(&place, note.as_os_str())
                .named(|| format!("readlinkat({})", shown(Path::new(&note))))?;
            self.bring_back(place.as_fd(), &aside, Path::new(&to), make_own, &mut gathered)?;
        }
        // Not empty is no error: what cannot be brought back goes with the layer.
        let gone = unlinkat(&self.beside, ASIDE, UnlinkatFlags::RemoveDir);
        debug!(?gone, "aside directory");
        Ok(gathered)
    }

    fn bring_back(
        &self,
        place: BorrowedFd<'_>,
        aside: &Aside,
        to: &Path,
        make_own: &dyn Fn(&Path),
        gathered: &mut Gathered,
    ) -> Result<()> {
        let Some(file) = look(place, Path::new(&aside.0))? else { return aside.forget(place) };
        let (parent, name) = match parent_of(self.dir(), to) {
            // The container has removed the directory that it belongs in.
            Err(error) if matches!(error.errno, Errno::ENOENT | Errno::ENOTDIR) => return Ok(()),
            other => other?,
        };
        if kind_of(&file) == Kind::Directory {
            match rename(place, &aside.0, parent.as_fd(), name, RenameFlags::RENAME_NOREPLACE) {
                Ok(()) => gathered.moved.push(to.to_owned()),
                Err(error) if error.errno == Errno::EEXIST => {
                    merge(place, &aside.0, parent.as_fd(), to, make_own, &mut gathered.moved)?;
                    gathered.left.push((aside.clone(), to.to_owned()));
                    return Ok(());
                }
                Err(error) => return Err(error),
            }
        } else {
            move_newer(place, &aside.0, parent.as_fd(), name)?;
            gathered.moved.push(to.to_owned());
        }
        aside.forget(place)
    }

    /// Removes an emptied directory that nobody uses any more. `false`: something has come into it.
    ///
    /// # Errors
    /// What rmdir(2) says otherwise.
    pub fn remove(&self, aside: &Aside) -> Result<bool> {
        let Some(place) = self.place()? else { return Ok(true) };
        if !remove_empty(place.as_fd(), &aside.0)? {
            return Ok(false);
        }
        aside.forget(place.as_fd())?;
        // Others may still be there.
        let gone = unlinkat(&self.beside, ASIDE, UnlinkatFlags::RemoveDir);
        debug!(?gone, "aside directory");
        Ok(true)
    }

    fn place(&self) -> Result<Option<OwnedFd>> {
        match open_beneath(self.beside.as_fd(), Path::new(ASIDE), READ_DIR) {
            Err(error) if error.errno == Errno::ENOENT => Ok(None),
            other => other.map(Some),
        }
    }

    fn place_or_make(&self) -> Result<OwnedFd> {
        match mkdirat(&self.beside, ASIDE, Mode::S_IRWXU) {
            Ok(()) | Err(Errno::EEXIST) => open_beneath(self.beside.as_fd(), Path::new(ASIDE), READ_DIR),
            Err(errno) => Err(SysError::new(errno, format!("mkdirat(<beside the upper>, {ASIDE})"))),
        }
    }
}

impl Aside {
    fn note(&self) -> OsString {
        let mut note = self.0.clone();
        note.push(".to");
        note
    }

    fn forget(&self, place: BorrowedFd<'_>) -> Result<()> {
        match unlinkat(place, self.note().as_os_str(), UnlinkatFlags::NoRemoveDir) {
            Ok(()) | Err(Errno::ENOENT) => Ok(()),
            Err(errno) => Err(SysError::new(errno, format!("unlinkat({})", shown(Path::new(&self.note()))))),
        }
    }
}

/// Whether what `root` shows at `path` is `name` in `dir`: whether a modification time shows there that nothing else has.
fn is_shown(dir: BorrowedFd<'_>, name: &OsStr, root: BorrowedFd<'_>, path: &Path) -> Result<bool> {
    let Some(file) = look(dir, Path::new(name))? else { return Ok(false) };
    let set = |mtime: (i64, i64)| {
        let (omit, mtime) = (TimeSpec::UTIME_OMIT, TimeSpec::new(mtime.0, mtime.1));
        utimensat(dir, name, &omit, &mtime, UtimensatFlags::NoFollowSymlink)
            .named(|| format!("utimensat({})", shown(Path::new(name))))
    };
    let before = (file.st_mtime, file.st_mtime_nsec);
    let mark = (before.0, (before.1 + 500_000_003) % 1_000_000_000);
    set(mark)?;
    let seen =
        look(root, path).map(|seen| seen.is_some_and(|seen| (seen.st_mtime, seen.st_mtime_nsec) == mark));
    set(before)?;
    seen
}

/// Moves the children of directory `from/name` to the directory at `to`, which is in `parent`. Directories that are in both
/// are merged the same way, however deep they are nested; those emptied stay.
fn merge(
    from: BorrowedFd<'_>,
    name: &OsStr,
    parent: BorrowedFd<'_>,
    to: &Path,
    make_own: &dyn Fn(&Path),
    moved: &mut Vec<PathBuf>,
) -> Result<()> {
    let top = open_beneath(from, Path::new(name), READ_DIR)?;
    let mut pending = vec![PathBuf::new()];
    while let Some(path) = pending.pop() {
        let from = open_beneath(top.as_fd(), &path, READ_DIR)?;
        let into = Path::new(to.file_name().unwrap_or_default()).join(&path);
        let target = match open_beneath(parent, &into, READ_DIR) {
            Err(error) if matches!(error.errno, Errno::ENOTDIR | Errno::ELOOP | Errno::ENOENT) => {
                let path = to.join(&path);
                warn!(path = %shown(&path), "the container removed a directory that the engine wrote to");
                continue;
            }
            other => other?,
        };
        for (child, kind) in names(from.as_fd())? {
            let place = to.join(&path).join(&child);
            if kind == Kind::Directory {
                make_own(&place);
            }
            match rename(from.as_fd(), &child, target.as_fd(), &child, RenameFlags::RENAME_NOREPLACE) {
                Ok(()) => moved.push(place),
                Err(error) if error.errno == Errno::ENOENT => {}
                Err(error) if error.errno == Errno::EEXIST && kind == Kind::Directory => {
                    pending.push(path.join(&child));
                }
                Err(error) if error.errno == Errno::EEXIST => {
                    move_newer(from.as_fd(), &child, target.as_fd(), &child)?;
                    moved.push(place);
                }
                Err(error) => return Err(error),
            }
        }
    }
    Ok(())
}

/// Moves a file to a name that may be taken by now: by a whiteout, which gives way, or by a file of the container's, of which
/// and ours the one that changed last stays. At no moment is the name free.
fn move_newer(from: BorrowedFd<'_>, name: &OsStr, to: BorrowedFd<'_>, into: &OsStr) -> Result<()> {
    match rename(from, name, to, into, RenameFlags::RENAME_NOREPLACE) {
        Err(error) if error.errno == Errno::EEXIST => {}
        other => return other,
    }
    let (Some(ours), Some(theirs)) = (look(from, Path::new(name))?, look(to, Path::new(into))?) else {
        return Ok(());
    };
    let gives_way = kind_of(&theirs) == Kind::Whiteout || changed(&theirs) < changed(&ours);
    if gives_way && kind_of(&theirs) != Kind::Directory {
        rename(from, name, to, into, RenameFlags::RENAME_EXCHANGE)?;
        // Was it still what we looked at? If the container has written in between, it was last.
        if look(from, Path::new(name))?.is_some_and(|got| got.st_ino != theirs.st_ino) {
            rename(from, name, to, into, RenameFlags::RENAME_EXCHANGE)?;
        }
    }
    unlinkat(from, name, UnlinkatFlags::NoRemoveDir).named(|| format!("unlinkat({})", shown(Path::new(name))))
}

/// Removes a tree of directories without files; `false` if there is anything else in it, or it is nested deeper than a path is
/// long.
fn remove_empty(parent: BorrowedFd<'_>, name: &OsStr) -> Result<bool> {
    match unlinkat(parent, name, UnlinkatFlags::RemoveDir) {
        Ok(()) | Err(Errno::ENOENT) => return Ok(true),
        Err(Errno::ENOTEMPTY | Errno::EEXIST) => {}
        Err(errno) => return Err(SysError::new(errno, format!("rmdir({})", shown(Path::new(name))))),
    }
    // Each before what is in it; the top is the first.
    let mut found = vec![PathBuf::from(name)];
    let mut at = 0;
    while let Some(path) = found.get(at).cloned() {
        at += 1;
        let dir = match open_beneath(parent, &path, READ_DIR) {
            Err(error) if error.errno == Errno::ENAMETOOLONG => return Ok(false),
            other => other?,
        };
        let children = names(dir.as_fd())?;
        if children.iter().any(|(_, kind)| *kind != Kind::Directory) {
            return Ok(false);
        }
        found.extend(children.into_iter().map(|(child, _)| path.join(child)));
    }
    for path in found.iter().rev() {
        let (dir, name) = parent_of(parent, path)?;
        // Something may have come in since it was listed.
        if unlinkat(&dir, name, UnlinkatFlags::RemoveDir).is_err() {
            return Ok(false);
        }
    }
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    /// Two trees: what is in the upper, and what is aside at number 0, to be brought back to `d`. A name that ends in `/` is
    /// an empty directory.
    #[test]
    fn what_comes_back_is_merged_and_nothing_of_either_is_lost() {
        for (upper, aside, expected) in [
            (&[][..], &["new"][..], &["d/new=aside"][..]),
            (&["d/mine"], &["new"], &["d/mine=upper", "d/new=aside"]),
            (
                &["d/sub/mine"],
                &["sub/new", "sub/deep/er"],
                &["d/sub/deep/er=aside", "d/sub/mine=upper", "d/sub/new=aside"],
            ),
            // The upper's is made later.
            (&["d/both"], &["both", "new"], &["d/both=upper", "d/new=aside"]),
            // Of a file and a directory of one name, the container's stays.
            (&["d/x/y"], &["x"], &["d/x/y=upper"]),
            (&["d/x"], &["x/y"], &["d/x=upper"]),
        ] {
            let dir = tempfile::tempdir().unwrap();
            let write = |base: &Path, name: &str, content: &str| {
                fs::create_dir_all(base.join(name).parent().unwrap()).unwrap();
                fs::write(base.join(name), content).unwrap();
            };
            let place = dir.path().join(ASIDE);
            fs::create_dir_all(dir.path().join("diff")).unwrap();
            aside.iter().for_each(|name| write(&place.join("0"), name, "aside"));
            std::os::unix::fs::symlink("d", place.join("0.to")).unwrap();
            std::thread::sleep(std::time::Duration::from_millis(10));
            upper.iter().for_each(|name| write(&dir.path().join("diff"), name, "upper"));
            Upper::open(&dir.path().join("diff")).unwrap().recover().unwrap();
            assert_eq!(tree(&dir.path().join("diff")), expected, "{upper:?} and {aside:?}");
        }
    }

    #[test]
    fn what_is_nested_deep_comes_back_on_a_small_stack() {
        let dir = tempfile::tempdir().unwrap();
        let deep: PathBuf = std::iter::repeat_n("d", 1500).collect();
        let (upper, place) = (dir.path().join("diff"), dir.path().join(ASIDE));
        for base in [upper.join("d"), place.join("0")] {
            fs::create_dir_all(base.join(&deep)).unwrap();
        }
        fs::write(place.join("0").join(&deep).join("new"), "aside").unwrap();
        std::os::unix::fs::symlink("d", place.join("0.to")).unwrap();
        let path = upper.clone();
        let recovered = std::thread::Builder::new()
            .stack_size(256 * 1024)
            .spawn(move || Upper::open(&path).unwrap().recover())
            .unwrap();
        recovered.join().unwrap().unwrap();
        assert_eq!(fs::read(upper.join("d").join(&deep).join("new")).unwrap(), b"aside");
        assert!(!place.exists());
    }

    fn tree(root: &Path) -> Vec<String> {
        let mut found = Vec::new();
        let mut pending = vec![root.to_owned()];
        while let Some(path) = pending.pop() {
            if path.is_dir() {
                pending.extend(fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()));
            } else {
                let name = path.strip_prefix(root).unwrap().display().to_string();
                found.push(format!("{name}={}", fs::read_to_string(&path).unwrap()));
            }
        }
        found.sort();
        found
    }
}
