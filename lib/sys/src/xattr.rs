//! Extended attributes of what a descriptor stands for, and of names in a directory (xattr(7)).

use std::ffi::{CStr, CString, OsStr};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::ffi::OsStrExt;

use nix::errno::Errno;

use crate::error::{Named, Result};

/// Whether the attribute is there; one that cannot be read is not. Works for O_PATH descriptors.
pub fn exists(fd: BorrowedFd<'_>, name: &CStr) -> bool {
    let Ok(path) = CString::new(format!("/proc/self/fd/{}", fd.as_raw_fd())) else { return false };
    // SAFETY: both strings end with NUL and outlive the call; a null buffer of length 0 only asks for the size.
    unsafe { libc::getxattr(path.as_ptr(), name.as_ptr(), std::ptr::null_mut(), 0) >= 0 }
}

/// Sets the attribute. Works for O_PATH descriptors.
///
/// # Errors
/// `EPERM` for `trusted.*` without CAP_SYS_ADMIN; `ENOTSUP` where the file system has none.
pub fn set(fd: BorrowedFd<'_>, name: &CStr, value: &[u8]) -> Result<()> {
    let what = || format!("setxattr({}, {})", fd.as_raw_fd(), name.to_string_lossy());
    let path =
        CString::new(format!("/proc/self/fd/{}", fd.as_raw_fd())).map_err(|_| Errno::EINVAL).named(what)?;
    // SAFETY: the strings end with NUL, `value` is its length long, and all outlive the call.
    let done = unsafe { libc::setxattr(path.as_ptr(), name.as_ptr(), value.as_ptr().cast(), value.len(), 0) };
    Errno::result(done).map(drop).named(what)
}

/// A name in an opened directory, which no call here follows if it is a link. `.` is the directory itself.
#[derive(Debug, Clone, Copy)]
pub struct Entry<'a> {
    pub dir: BorrowedFd<'a>,
    pub name: &'a OsStr,
}

/// The most that the kernel gives of names, or of one value (limits.h: XATTR_LIST_MAX, XATTR_SIZE_MAX).
const MOST: usize = 65536;

impl Entry<'_> {
    /// By way of the descriptor's link in /proc, as there are no xattr calls relative to a directory before Linux 6.13.
    fn path(&self) -> nix::Result<CString> {
        if self.name.as_bytes().contains(&b'/') {
            return Err(Errno::EINVAL);
        }
        let mut path = format!("/proc/self/fd/{}/", self.dir.as_raw_fd()).into_bytes();
        path.extend_from_slice(self.name.as_bytes());
        CString::new(path).map_err(|_| Errno::EINVAL)
    }

    fn shown(&self, call: &str) -> String {
        format!("{call}({})", std::path::Path::new(self.name).display())
    }

    /// The names of its attributes (llistxattr(2)); none where the file system has no attributes.
    ///
    /// # Errors
    /// `ENOENT`.
    pub fn list(&self) -> Result<Vec<CString>> {
        let what = || self.shown("llistxattr");
        let path = self.path().named(what)?;
        let mut buffer = [0_u8; 1024];
        // SAFETY: the path ends with NUL, the buffer is as long as said, and both outlive the call.
        let got = unsafe { libc::llistxattr(path.as_ptr(), buffer.as_mut_ptr().cast(), buffer.len()) };
        let (got, mut large) = match Errno::result(got) {
            Err(Errno::ENOTSUP) => return Ok(Vec::new()),
            Err(Errno::ERANGE) => {
                let mut large = vec![0_u8; MOST];
                // SAFETY: as above.
                let got = unsafe { libc::llistxattr(path.as_ptr(), large.as_mut_ptr().cast(), large.len()) };
                (Errno::result(got).named(what)?, large)
            }
            other => (other.named(what)?, Vec::new()),
        };
        let bytes = if large.is_empty() { &mut buffer[..] } else { &mut large[..] };
        let names = bytes[..usize::try_from(got).unwrap_or(0)].split(|byte| *byte == 0);
        Ok(names.filter(|name| !name.is_empty()).filter_map(|name| CString::new(name).ok()).collect())
    }

    /// The value of an attribute (lgetxattr(2)).
    ///
    /// # Errors
    /// `ENODATA`: it has none of this name.
    pub fn get(&self, name: &CStr) -> Result<Vec<u8>> {
        let what = || self.shown("lgetxattr");
        let path = self.path().named(what)?;
        let mut value = vec![0_u8; MOST];
        let buffer = value.as_mut_ptr().cast();
        // SAFETY: both strings end with NUL, the buffer is MOST long, and all outlive the call.
        let got = unsafe { libc::lgetxattr(path.as_ptr(), name.as_ptr(), buffer, MOST) };
        value.truncate(usize::try_from(Errno::result(got).named(what)?).unwrap_or(0));
        Ok(value)
    }

    /// Sets an attribute (lsetxattr(2)).
    ///
    /// # Errors
    /// `EPERM` for one that this kind of file cannot have; `ENOTSUP` where the file system has none.
    pub fn set(&self, name: &CStr, value: &[u8]) -> Result<()> {
        let what = || format!("{}, {}", self.shown("lsetxattr"), name.to_string_lossy());
        let path = self.path().named(what)?;
        let data = value.as_ptr().cast();
        // SAFETY: the strings end with NUL, `value` is its length long, and all outlive the call.
        let done = unsafe { libc::lsetxattr(path.as_ptr(), name.as_ptr(), data, value.len(), 0) };
        Errno::result(done).map(drop).named(what)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    #[test]
    fn attributes_are_the_links_own_and_not_its_targets() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("file"), "").unwrap();
        std::os::unix::fs::symlink("file", dir.path().join("link")).unwrap();
        let opened = std::fs::File::open(dir.path()).unwrap();
        let at = |name| Entry { dir: opened.as_fd(), name: OsStr::new(name) };
        at("file").set(c"user.a", b"1\0\xff").unwrap();
        at(".").set(c"user.dir", b"").unwrap();
        assert_eq!(at("file").list().unwrap(), [c"user.a".to_owned()]);
        assert_eq!(at("file").get(c"user.a").unwrap(), b"1\0\xff");
        assert_eq!(at(".").list().unwrap(), [c"user.dir".to_owned()]);
        assert_eq!(at("link").list().unwrap(), [] as [CString; 0]);
        assert_eq!(at("link").set(c"user.a", b"1").unwrap_err().errno, Errno::EPERM);
        assert_eq!(at("gone").list().unwrap_err().errno, Errno::ENOENT);
        assert_eq!(at("../x").list().unwrap_err().errno, Errno::EINVAL);
    }

    #[test]
    fn many_names_are_listed_whole() {
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        let opened = std::fs::File::open(dir.path()).unwrap();
        let entry = Entry { dir: opened.as_fd(), name: OsStr::new(".") };
        for number in 0..300 {
            entry.set(&CString::new(format!("trusted.name-{number}")).unwrap(), b"x").unwrap();
        }
        assert_eq!(entry.list().unwrap().len(), 300);
    }
}
