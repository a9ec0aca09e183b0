//! One image layer's part of a data root, laid over what the layers below it gave: everything as it lies on disk, by reflink
//! where the file system has it. A whiteout of the image's takes away what is below it; one of an inner layer's stays what it
//! is. Nothing is followed: the layer is the image's, and so hostile, and the copy is ours alone until it is whole.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, openat, readlinkat};
use nix::sys::stat::{FchmodatFlags, FileStat, Mode, SFlag, fchmodat, fstat, fstatat, mkdirat, mknodat};
use nix::sys::time::TimeSpec;
use nix::unistd::{Gid, Uid, UnlinkatFlags, Whence, fchownat, linkat, lseek, symlinkat, unlinkat};
use sysbox_sys::error::Named;
use sysbox_sys::path::open_beneath;
use sysbox_sys::reflink::reflink;
use sysbox_sys::xattr::Entry;
use sysbox_sys::{Result, SysError};

use super::{is_kind, is_whiteout, names, set_mtime, trees};

/// Set by the kernel's overlay on a directory that hides the lower ones; the second where it may set no `trusted.` ones.
const OPAQUE: &std::ffi::CStr = c"trusted.overlay.opaque";
const OPAQUE_OF_USER: &std::ffi::CStr = c"user.overlay.opaque";
const DIRECTORY: OFlag = OFlag::O_RDONLY.union(OFlag::O_DIRECTORY);
/// How often a long copy says how far it is.
const TELL_EVERY: Duration = Duration::from_secs(2);

/// What was copied, over all layers.
#[derive(Debug)]
pub struct Copied {
    pub files: u64,
    pub bytes: u64,
    /// Whether the file system shares blocks; found out by the first file.
    pub reflinks: Option<bool>,
    /// Directories of inner layers' files that were met.
    pub trees: Vec<PathBuf>,
    told: Instant,
}

impl Copied {
    pub fn nothing() -> Self {
        Self { files: 0, bytes: 0, reflinks: None, trees: Vec::new(), told: Instant::now() }
    }

    fn add(&mut self, bytes: u64) {
        self.bytes += bytes;
        if self.told.elapsed() >= TELL_EVERY {
            self.told = Instant::now();
            tracing::info!(files = self.files, mebibytes = self.bytes >> 20, "copying inner images");
        }
    }
}

/// Lays `from` over `to`.
///
/// # Errors
/// Whatever could not be copied: then `to` is of no use.
pub fn lay_over(from: BorrowedFd<'_>, to: BorrowedFd<'_>, copied: &mut Copied) -> Result<()> {
    let mut pending = vec![PathBuf::new()];
    // Their attributes come last, from the innermost: what is put into a directory changes its times.
    let mut directories = Vec::new();
    let mut links = HashMap::new();
    while let Some(path) = pending.pop() {
        let (source, target) = (open_beneath(from, &path, DIRECTORY)?, open_beneath(to, &path, DIRECTORY)?);
        for name in names(source.as_fd())? {
            let below = path.join(&name);
            let mut one =
                One { source: source.as_fd(), target: target.as_fd(), name: &name, path: &below, root: to };
            if one.copy(&mut links, copied)? {
                pending.push(below);
            }
        }
        directories.push(path);
    }
    for path in directories.iter().rev().filter(|path| !path.as_os_str().is_empty()) {
        let parent = path.parent().unwrap_or(Path::new(""));
        let name = path.file_name().unwrap_or_default();
        let (source, target) = (open_beneath(from, parent, DIRECTORY)?, open_beneath(to, parent, DIRECTORY)?);
        let one = One { source: source.as_fd(), target: target.as_fd(), name, path, root: to };
        let facts = one.facts()?;
        one.attributes(&facts)?;
    }
    Ok(())
}

/// One name in a directory of the layer, and the directory in the copy.
struct One<'a> {
    source: BorrowedFd<'a>,
    target: BorrowedFd<'a>,
    name: &'a OsStr,
    /// Below the data root.
    path: &'a Path,
    root: BorrowedFd<'a>,
}

impl One<'_> {
    fn shown(&self, call: &str) -> String {
        format!("{call}({})", self.path.display())
    }

    fn facts(&self) -> Result<FileStat> {
        fstatat(self.source, self.name, AtFlags::AT_SYMLINK_NOFOLLOW).named(|| self.shown("fstatat"))
    }

    fn is_inner(&self) -> bool {
        trees::tree_of(self.path).is_some()
    }

    /// Whether it is a directory, to be entered.
    fn copy(&mut self, links: &mut HashMap<u64, PathBuf>, copied: &mut Copied) -> Result<bool> {
        let facts = self.facts()?;
        if is_kind(&facts, SFlag::S_IFDIR) {
            self.directory(copied)?;
            return Ok(true);
        }
        remove(self.target, self.name)?;
        if is_whiteout(&facts) && !self.is_inner() {
            return Ok(false);
        }
        copied.files += 1;
        // Of one layer's files, by inode: all of them are on one file system.
        if facts.st_nlink > 1 {
            if let Some(first) = links.get(&facts.st_ino) {
                return self.link(first).map(|()| false);
            }
            links.insert(facts.st_ino, self.path.to_owned());
        }
        match SFlag::from_bits_truncate(facts.st_mode & SFlag::S_IFMT.bits()) {
            SFlag::S_IFREG => self.file(copied)?,
            SFlag::S_IFLNK => {
                let to = readlinkat(self.source, self.name).named(|| self.shown("readlinkat"))?;
                symlinkat(to.as_os_str(), self.target, self.name).named(|| self.shown("symlinkat"))?;
            }
            kind => mknodat(self.target, self.name, kind, Mode::from_bits_truncate(0o600), facts.st_rdev)
                .named(|| self.shown("mknodat"))?,
        }
        self.attributes(&facts)?;
        Ok(false)
    }

    fn directory(&self, copied: &mut Copied) -> Result<()> {
        let hides = self.at(self.source).get(OPAQUE).is_ok_and(|value| value == b"y") && !self.is_inner();
        let there = fstatat(self.target, self.name, AtFlags::AT_SYMLINK_NOFOLLOW);
        if !there.as_ref().is_ok_and(|facts| is_kind(facts, SFlag::S_IFDIR)) || hides {
            remove(self.target, self.name)?;
            let closed = Mode::from_bits_truncate(0o700);
            mkdirat(self.target, self.name, closed).named(|| self.shown("mkdirat"))?;
        }
        if trees::tree_of(self.path).as_deref() == Some(self.path)
            && !copied.trees.iter().any(|t| t == self.path)
        {
            copied.trees.push(self.path.to_owned());
        }
        Ok(())
    }

    fn link(&self, first: &Path) -> Result<()> {
        let dir = open_beneath(self.root, first.parent().unwrap_or(Path::new("")), DIRECTORY)?;
        let name = first.file_name().unwrap_or_default();
        linkat(&dir, name, self.target, self.name, AtFlags::empty()).named(|| self.shown("linkat"))
    }

    fn file(&self, copied: &mut Copied) -> Result<()> {
        let open = |dir, flags| {
            let always = OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
            openat(dir, self.name, flags | always, Mode::from_bits_truncate(0o600))
                .named(|| self.shown("openat"))
        };
        let from = File::from(open(self.source, OFlag::O_RDONLY)?);
        let to = File::from(open(self.target, OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL)?);
        let length = u64::try_from(fstat(&from).named(|| self.shown("fstat"))?.st_size).unwrap_or(0);
        if length > 0 && copied.reflinks != Some(false) {
            let shared = reflink(from.as_fd(), to.as_fd());
            copied.reflinks = Some(shared.is_ok());
        }
        if copied.reflinks != Some(true) {
            copy_data(&from, &to, length, copied).named(|| self.shown("copy"))?;
        }
        Ok(())
    }

    fn at<'d>(&'d self, dir: BorrowedFd<'d>) -> Entry<'d> {
        Entry { dir, name: self.name }
    }

    /// Owner, mode, extended attributes and time, in the order in which none undoes another.
    fn attributes(&self, facts: &FileStat) -> Result<()> {
        let (uid, gid) = (Uid::from_raw(facts.st_uid), Gid::from_raw(facts.st_gid));
        fchownat(self.target, self.name, Some(uid), Some(gid), AtFlags::AT_SYMLINK_NOFOLLOW)
            .named(|| self.shown("fchownat"))?;
        if !is_kind(facts, SFlag::S_IFLNK) {
            // Not a link, as we made it; the flag that would say so is refused before Linux 6.6.
            let mode = Mode::from_bits_truncate(facts.st_mode & 0o7777);
            fchmodat(self.target, self.name, mode, FchmodatFlags::FollowSymlink)
                .named(|| self.shown("fchmodat"))?;
        }
        for name in self.at(self.source).list()?.iter().filter(|name| is_kept(name.to_bytes())) {
            let value = self.at(self.source).get(name)?;
            self.at(self.target).set(name, &value)?;
        }
        if self.is_inner() && is_kind(facts, SFlag::S_IFDIR) && self.at(self.source).get(OPAQUE).is_ok() {
            // Made by an engine with a host's rights; ours looks for the other name.
            self.at(self.target).set(OPAQUE_OF_USER, b"y")?;
        }
        set_mtime(self.target, Path::new(self.name), TimeSpec::new(facts.st_mtime, facts.st_mtime_nsec))
    }
}

/// What the kernel's overlay or a security module of this machine set is not the image's.
fn is_kept(name: &[u8]) -> bool {
    name == b"security.capability"
        || super::list::is_carried(name)
        || (name.starts_with(b"trusted.")
            && !name.starts_with(b"trusted.overlay.")
            && !name.starts_with(b"trusted.sysbox."))
}

/// With its holes.
fn copy_data(from: &File, to: &File, length: u64, copied: &mut Copied) -> std::io::Result<()> {
    const STEP: u64 = 64 << 20;
    to.set_len(length)?;
    let mut at = 0;
    while at < length {
        let offset = |place: u64| i64::try_from(place).map_err(|_| Errno::EFBIG);
        let start = match lseek(from, offset(at)?, Whence::SeekData) {
            Ok(start) => u64::try_from(start).unwrap_or(at),
            // A hole up to the end.
            Err(Errno::ENXIO) => break,
            Err(Errno::EINVAL) => at,
            Err(errno) => return Err(errno.into()),
        };
        let end = match lseek(from, offset(start)?, Whence::SeekHole) {
            Ok(end) => u64::try_from(end).unwrap_or(length),
            Err(_) => length,
        };
        let step = (end - start).min(STEP);
        lseek(from, offset(start)?, Whence::SeekSet)?;
        lseek(to, offset(start)?, Whence::SeekSet)?;
        let (mut some, mut target) = (from.take(step), to);
        let count = std::io::copy(&mut some, &mut target)?;
        if count == 0 {
            break;
        }
        copied.add(count);
        at = start + count;
    }
    Ok(())
}

/// Takes away what has the name in the copy, whatever it is.
pub fn remove(dir: BorrowedFd<'_>, name: &OsStr) -> Result<()> {
    let what = || format!("remove {}", Path::new(name).display());
    match unlinkat(dir, name, UnlinkatFlags::NoRemoveDir) {
        Ok(()) | Err(Errno::ENOENT) => return Ok(()),
        Err(Errno::EISDIR) => {}
        Err(errno) => return Err(errno).named(what),
    }
    // Innermost last in the list, so that it is empty when its turn comes.
    let top: OwnedFd = open_beneath(dir, Path::new(name), DIRECTORY)?;
    let (mut pending, mut found) = (vec![PathBuf::new()], Vec::new());
    while let Some(path) = pending.pop() {
        let here = open_beneath(top.as_fd(), &path, DIRECTORY)?;
        for name in names(here.as_fd())? {
            match unlinkat(&here, name.as_os_str(), UnlinkatFlags::NoRemoveDir) {
                Ok(()) => {}
                Err(Errno::EISDIR) => pending.push(path.join(name)),
                Err(errno) => return Err(errno).named(what),
            }
        }
        found.push(path);
    }
    for path in found.iter().rev().filter(|path| !path.as_os_str().is_empty()) {
        unlinkat(&top, path.as_path(), UnlinkatFlags::RemoveDir).named(what)?;
    }
    unlinkat(dir, name, UnlinkatFlags::RemoveDir).named(what)
}

/// For messages about bytes that are nobody's to trust.
pub fn shown(bytes: &[u8]) -> String {
    Path::new(OsStr::from_bytes(&bytes[..bytes.len().min(80)])).display().to_string()
}

/// A failure of a layer that could not be read as what it claims to be.
pub fn broken(what: impl Into<String>) -> SysError {
    SysError::new(Errno::EBADMSG, what)
}
