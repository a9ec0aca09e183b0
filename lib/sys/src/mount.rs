//! The mount API by descriptor (open_tree(2), move_mount(2), mount_setattr(2), fsopen(2) and family; Linux 5.2 to 5.12).
//! Wrappers only: who mounts what where is decided elsewhere.

use std::ffi::CString;
use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::path::Path;

use nix::errno::Errno;

use crate::error::{Named, Result, SysError};

/// Attributes of one mount, as mount_setattr(2) sets them (MOUNT_ATTR_*).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Attributes {
    pub read_only: bool,
    pub nosuid: bool,
    pub nodev: bool,
    pub noexec: bool,
    pub nosymfollow: bool,
    pub nodiratime: bool,
    pub atime: Atime,
}

/// When a read of a file is noted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Atime {
    /// As the mount has it.
    #[default]
    Kept,
    Relative,
    Never,
    Always,
}

impl Attributes {
    fn bits(self) -> u64 {
        [
            (self.read_only, libc::MOUNT_ATTR_RDONLY),
            (self.nosuid, libc::MOUNT_ATTR_NOSUID),
            (self.nodev, libc::MOUNT_ATTR_NODEV),
            (self.noexec, libc::MOUNT_ATTR_NOEXEC),
            (self.nosymfollow, libc::MOUNT_ATTR_NOSYMFOLLOW),
            (self.nodiratime, libc::MOUNT_ATTR_NODIRATIME),
            (self.atime == Atime::Never, libc::MOUNT_ATTR_NOATIME),
            (self.atime == Atime::Always, libc::MOUNT_ATTR_STRICTATIME),
        ]
        .into_iter()
        .filter(|(wanted, _)| *wanted)
        .fold(0, |bits, (_, bit)| bits | bit)
    }
}

/// Whether a call concerns one mount or the tree below it as well (AT_RECURSIVE).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Depth {
    One,
    Tree,
}

fn c_path(path: &Path) -> Result<CString> {
    CString::new(path.as_os_str().as_encoded_bytes())
        .map_err(|_| SysError::new(Errno::EINVAL, format!("path with a NUL byte: {}", path.display())))
}

fn c_text(text: &str) -> Result<CString> {
    CString::new(text).map_err(|_| SysError::new(Errno::EINVAL, format!("text with a NUL byte: {text:?}")))
}

fn owned(raw: libc::c_long, what: impl Fn() -> String) -> Result<OwnedFd> {
    let raw = Errno::result(raw).named(&what)?;
    let raw = i32::try_from(raw).map_err(|_| SysError::new(Errno::EBADF, what()))?;
    // SAFETY: the kernel returned this new descriptor to us alone.
    Ok(unsafe { OwnedFd::from_raw_fd(raw) })
}

/// A detached copy of the mount at `path` below `dir` (an absolute path ignores `dir`); open_tree(OPEN_TREE_CLONE).
/// It goes away with its descriptor unless attached.
///
/// # Errors
/// `EINVAL` where the mount is unbindable, or has locked children and `depth` is `One`.
pub fn clone_at(dir: BorrowedFd<'_>, path: &Path, depth: Depth) -> Result<OwnedFd> {
    let c = c_path(path)?;
    let what = || format!("open_tree({}, CLONE)", path.display());
    let recursive = if depth == Depth::Tree { libc::AT_RECURSIVE as u32 } else { 0 };
    let empty = if path.as_os_str().is_empty() { libc::AT_EMPTY_PATH as u32 } else { 0 };
    let flags = libc::OPEN_TREE_CLONE | libc::OPEN_TREE_CLOEXEC | recursive | empty;
    // SAFETY: `c` is a NUL-terminated string that outlives the call.
    let raw = unsafe { libc::syscall(libc::SYS_open_tree, dir.as_raw_fd(), c.as_ptr(), flags) };
    owned(raw, what)
}

/// As [`clone_at`], of an absolute path.
///
/// # Errors
/// As [`clone_at`].
pub fn clone_tree(path: &Path, depth: Depth) -> Result<OwnedFd> {
    clone_at(nix::fcntl::AT_FDCWD, path, depth)
}

/// As [`clone_at`], of what a descriptor stands for.
///
/// # Errors
/// As [`clone_at`].
pub fn clone_fd(fd: BorrowedFd<'_>, depth: Depth) -> Result<OwnedFd> {
    clone_at(fd, Path::new(""), depth)
}

fn setattr(
    mount: BorrowedFd<'_>,
    depth: Depth,
    attr: libc::mount_attr,
    what: impl FnOnce() -> String,
) -> Result<()> {
    let recursive = if depth == Depth::Tree { libc::AT_RECURSIVE } else { 0 };
    let flags = libc::AT_EMPTY_PATH | recursive;
    let size = size_of::<libc::mount_attr>();
    // SAFETY: the path is a static empty string, `attr` lives through the call and `size` is its size.
    let done = unsafe {
        libc::syscall(libc::SYS_mount_setattr, mount.as_raw_fd(), c"".as_ptr(), flags, &raw const attr, size)
    };
    Errno::result(done).map(drop).named(what)
}

/// Shifts the ids of a detached mount by the maps of `userns` (MOUNT_ATTR_IDMAP; Linux 5.12, per file system).
///
/// # Errors
/// `EINVAL`: the file system cannot, or the mount is attached; `EPERM`: it is shifted already.
pub fn set_idmap(mount: BorrowedFd<'_>, userns: BorrowedFd<'_>, depth: Depth) -> Result<()> {
    let fd =
        u64::try_from(userns.as_raw_fd()).map_err(|_| SysError::new(Errno::EBADF, "userns descriptor"))?;
    let attr =
        libc::mount_attr { attr_set: libc::MOUNT_ATTR_IDMAP, attr_clr: 0, propagation: 0, userns_fd: fd };
    setattr(mount, depth, attr, || format!("mount_setattr({}, IDMAP)", mount.as_raw_fd()))
}

/// Adds attributes to a mount, and takes none away.
///
/// # Errors
/// `EPERM` where the mount is locked otherwise.
pub fn add_attributes(mount: BorrowedFd<'_>, attributes: Attributes, depth: Depth) -> Result<()> {
    change_attributes(mount, attributes, Attributes::default(), depth)
}

/// Takes the attributes of `clear` from a mount, and adds those of `set`.
///
/// # Errors
/// As [`add_attributes`].
pub fn change_attributes(
    mount: BorrowedFd<'_>,
    set: Attributes,
    clear: Attributes,
    depth: Depth,
) -> Result<()> {
    if set == Attributes::default() && clear == Attributes::default() {
        return Ok(());
    }
    // The access time is a number in these bits, which are cleared to be set (mount_setattr(2)).
    let times = if set.atime == Atime::Kept { 0 } else { libc::MOUNT_ATTR__ATIME };
    let attr = libc::mount_attr {
        attr_set: set.bits(),
        attr_clr: clear.bits() | times,
        propagation: 0,
        userns_fd: 0,
    };
    setattr(mount, depth, attr, || format!("mount_setattr({}, +{set:?}, -{clear:?})", mount.as_raw_fd()))
}

/// Makes a mount writable again that [`add_attributes`] made read-only.
///
/// # Errors
/// `EPERM` where the mount is locked so.
pub fn clear_read_only(mount: BorrowedFd<'_>) -> Result<()> {
    let attr =
        libc::mount_attr { attr_set: 0, attr_clr: libc::MOUNT_ATTR_RDONLY, propagation: 0, userns_fd: 0 };
    setattr(mount, Depth::One, attr, || format!("mount_setattr({}, rw)", mount.as_raw_fd()))
}

/// Sets the propagation of a mount (`MS_PRIVATE`, `MS_SLAVE`, `MS_SHARED`).
///
/// # Errors
/// `EINVAL` for another flag.
pub fn set_propagation(mount: BorrowedFd<'_>, flag: nix::mount::MsFlags, depth: Depth) -> Result<()> {
    let attr = libc::mount_attr { attr_set: 0, attr_clr: 0, propagation: flag.bits(), userns_fd: 0 };
    setattr(mount, depth, attr, || format!("mount_setattr({}, {flag:?})", mount.as_raw_fd()))
}

/// Attaches a detached mount on what `target` stands for; move_mount(2).
///
/// # Errors
/// `EINVAL` if `target` is not in this mount namespace.
pub fn attach(mount: BorrowedFd<'_>, target: BorrowedFd<'_>) -> Result<()> {
    let flags = libc::MOVE_MOUNT_F_EMPTY_PATH | libc::MOVE_MOUNT_T_EMPTY_PATH;
    let (from, to) = (mount.as_raw_fd(), target.as_raw_fd());
    // SAFETY: both paths are static empty strings; the descriptors are open for the call's time.
    let done = unsafe { libc::syscall(libc::SYS_move_mount, from, c"".as_ptr(), to, c"".as_ptr(), flags) };
    Errno::result(done).map(drop).named(|| format!("move_mount({from}, {to})"))
}

/// A file system in the making: fsopen(2), fsconfig(2), fsmount(2).
#[derive(Debug)]
pub struct FsContext {
    fd: OwnedFd,
    name: String,
}

impl FsContext {
    /// fsopen(2).
    ///
    /// # Errors
    /// `ENODEV`: the kernel has no such file system.
    pub fn open(fstype: &str) -> Result<Self> {
        let c = c_text(fstype)?;
        // SAFETY: `c` is a NUL-terminated string that outlives the call.
        let raw = unsafe { libc::syscall(libc::SYS_fsopen, c.as_ptr(), libc::FSOPEN_CLOEXEC) };
        Ok(Self { fd: owned(raw, || format!("fsopen({fstype})"))?, name: fstype.to_owned() })
    }

    /// The superblock behind a mount, to be reconfigured; fspick(2). The mount is named by descriptor.
    ///
    /// # Errors
    /// `EPERM` without CAP_SYS_ADMIN over the file system's user namespace.
    pub fn pick(mount: BorrowedFd<'_>) -> Result<Self> {
        let flags = libc::FSPICK_CLOEXEC | libc::FSPICK_EMPTY_PATH;
        // SAFETY: the path is a static empty string; the descriptor is open for the call's time.
        let raw = unsafe { libc::syscall(libc::SYS_fspick, mount.as_raw_fd(), c"".as_ptr(), flags) };
        Ok(Self { fd: owned(raw, || format!("fspick({})", mount.as_raw_fd()))?, name: "picked".to_owned() })
    }

    fn config(&self, command: libc::c_uint, key: Option<&str>, value: Value<'_>) -> Result<()> {
        let key_c = key.map(c_text).transpose()?;
        let key_ptr = key_c.as_ref().map_or(std::ptr::null(), |k| k.as_ptr());
        let text = match value {
            Value::Text(text) => Some(c_text(text)?),
            Value::None | Value::Descriptor(_) => None,
        };
        let value_ptr = text.as_ref().map_or(std::ptr::null(), |t| t.as_ptr());
        let aux = if let Value::Descriptor(fd) = value { fd.as_raw_fd() } else { 0 };
        // SAFETY: key and value are null or NUL-terminated strings that outlive the call, as `command` requires.
        let done = unsafe {
            libc::syscall(libc::SYS_fsconfig, self.fd.as_raw_fd(), command, key_ptr, value_ptr, aux)
        };
        Errno::result(done).map(drop).map_err(|errno| {
            let said = self.complaint();
            let key = key.unwrap_or("CREATE");
            SysError::new(errno, format!("fsconfig({}, {key}{value}){said}", self.name))
        })
    }

    /// What the kernel says about the last failure: one message a read(2), `e text`.
    fn complaint(&self) -> String {
        let Ok(copy) = self.fd.try_clone() else { return String::new() };
        let mut buffer = [0u8; 512];
        let mut said = String::new();
        let mut file = File::from(copy);
        while let Ok(length @ 1..) = file.read(&mut buffer) {
            let line = String::from_utf8_lossy(&buffer[..length]);
            if let Some(error) = line.trim_end().strip_prefix("e ") {
                said.push_str(": ");
                said.push_str(error);
            }
        }
        said
    }

    /// # Errors
    /// `EINVAL`: the file system knows no such flag.
    pub fn set_flag(&self, key: &str) -> Result<()> {
        self.config(libc::FSCONFIG_SET_FLAG, Some(key), Value::None)
    }

    /// # Errors
    /// `EINVAL`: the file system knows no such option, or not this value.
    pub fn set_text(&self, key: &str, value: &str) -> Result<()> {
        self.config(libc::FSCONFIG_SET_STRING, Some(key), Value::Text(value))
    }

    /// # Errors
    /// `EINVAL` or `EOPNOTSUPP` where the option takes no descriptor (overlay: Linux before 6.13).
    pub fn set_descriptor(&self, key: &str, value: BorrowedFd<'_>) -> Result<()> {
        self.config(libc::FSCONFIG_SET_FD, Some(key), Value::Descriptor(value))
    }

    /// Makes the superblock.
    ///
    /// # Errors
    /// What mount(2) would say, with the kernel's own words where it has any.
    pub fn create(&self) -> Result<()> {
        self.config(libc::FSCONFIG_CMD_CREATE, None, Value::None)
    }

    /// Reconfigures a picked superblock; with nothing set, it only drops what the superblock caches and nobody uses.
    ///
    /// # Errors
    /// What a remount would say.
    pub fn reconfigure(&self) -> Result<()> {
        self.config(libc::FSCONFIG_CMD_RECONFIGURE, None, Value::None)
    }

    /// A detached mount of the superblock; fsmount(2).
    ///
    /// # Errors
    /// `EPERM`: mounting it would reveal more than this mount namespace shows.
    pub fn mount(&self, attributes: Attributes) -> Result<OwnedFd> {
        let bits = attributes.bits();
        // SAFETY: three integers; the descriptor is open for the call's time.
        let raw =
            unsafe { libc::syscall(libc::SYS_fsmount, self.fd.as_raw_fd(), libc::FSMOUNT_CLOEXEC, bits) };
        owned(raw, || format!("fsmount({})", self.name))
    }
}

enum Value<'a> {
    None,
    Text(&'a str),
    Descriptor(BorrowedFd<'a>),
}

impl std::fmt::Display for Value<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Value::None => Ok(()),
            Value::Text(text) => write!(f, "={text}"),
            Value::Descriptor(fd) => write!(f, "=<{}>", fd.as_raw_fd()),
        }
    }
}

/// Whether the file system behind a descriptor is mounted read-only there (ST_RDONLY of fstatfs(2): of the mount or of
/// the superblock).
///
/// # Errors
/// `fstatvfs` failing.
pub fn is_read_only(mount: impl AsFd) -> Result<bool> {
    let facts = nix::sys::statvfs::fstatvfs(&mount).named(|| "fstatvfs".to_owned())?;
    Ok(facts.flags().contains(nix::sys::statvfs::FsFlags::ST_RDONLY))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_become_the_bits_of_the_kernel() {
        let all =
            Attributes { read_only: true, nosuid: true, nodev: true, noexec: true, ..Attributes::default() };
        assert_eq!(all.bits(), 0xf);
        let rest =
            Attributes { nosymfollow: true, nodiratime: true, atime: Atime::Never, ..Attributes::default() };
        assert_eq!(rest.bits(), 0x0020_0090);
        assert_eq!(Attributes::default().bits(), 0);
        assert_eq!(Attributes { read_only: true, ..Attributes::default() }.bits(), 1);
    }

    #[test]
    fn the_kernels_own_words_are_in_the_error() {
        let Ok(fs) = FsContext::open("overlay") else { panic!("needs CAP_SYS_ADMIN and overlay") };
        let error = fs.set_text("no_such_option", "1").unwrap_err();
        assert_eq!(error.errno, Errno::EINVAL);
        assert!(error.to_string().contains("no_such_option"), "{error}");
    }
}
