//! Acting on files as somebody else, in one thread, without giving up capabilities.

use nix::errno::Errno;

use crate::error::{Named, Result};

/// Runs `act` with the file system uid and gid given (setfsuid(2)), and puts them back.
///
/// Leaving fsuid 0 would drop the file capabilities of the effective set (capabilities(7)); SECBIT_NO_SETUID_FIXUP keeps
/// them, which is what lets the kernel write `trusted.overlay.*` while it makes files that belong to the container.
///
/// # Errors
/// `prctl` failing; otherwise what `act` returns is in the `Ok`.
pub fn with_fs_ids<T>(uid: u32, gid: u32, act: impl FnOnce() -> T) -> Result<T> {
    let _back = FsIds::become_(uid, gid)?;
    Ok(act())
}

struct FsIds {
    securebits: libc::c_int,
}

impl FsIds {
    fn become_(uid: u32, gid: u32) -> Result<Self> {
        // SAFETY: PR_GET_SECUREBITS takes no further argument.
        let old = Errno::result(unsafe { libc::prctl(libc::PR_GET_SECUREBITS) })
            .named(|| "prctl(PR_GET_SECUREBITS)".to_owned())?;
        set_securebits(old | libc::SECBIT_NO_SETUID_FIXUP)?;
        let ids = Self { securebits: old };
        set_fs_ids(uid, gid);
        Ok(ids)
    }
}

impl Drop for FsIds {
    fn drop(&mut self) {
        set_fs_ids(0, 0);
        // Restoring the value that was read a moment ago needs no more than setting it did.
        if let Err(error) = set_securebits(self.securebits) {
            unreachable!("securebits were ours to set: {error}");
        }
    }
}

fn set_securebits(bits: libc::c_int) -> Result<()> {
    let bits = libc::c_ulong::try_from(bits).unwrap_or_default();
    // SAFETY: PR_SET_SECUREBITS takes one integer.
    let done = unsafe { libc::prctl(libc::PR_SET_SECUREBITS, bits) };
    Errno::result(done).map(drop).named(|| format!("prctl(PR_SET_SECUREBITS, {bits:#x})"))
}

fn set_fs_ids(uid: u32, gid: u32) {
    nix::unistd::setfsgid(nix::unistd::Gid::from_raw(gid));
    nix::unistd::setfsuid(nix::unistd::Uid::from_raw(uid));
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt;

    #[test]
    fn files_belong_to_whom_they_are_made_for() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        with_fs_ids(4321, 1234, || std::fs::write(&path, "")).unwrap().unwrap();
        let facts = std::fs::metadata(&path).unwrap();
        assert_eq!((facts.uid(), facts.gid()), (4321, 1234));
        std::fs::write(dir.path().join("g"), "").unwrap();
        assert_eq!(std::fs::metadata(dir.path().join("g")).unwrap().uid(), 0);
    }
}
