//! Copies of another daemon's descriptors, by name, so that its death closes nothing: `/dev/fuse`, seccomp notify
//! descriptors, memfds. The vault never reads, polls or uses them.

use std::collections::BTreeMap;
use std::fs::read_link;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use sysbox_ipc::{Refusal, RefusalKind};

/// Most descriptors kept: two a container and some.
pub const MOST: usize = 4096;
/// Longest name, in bytes.
pub const LONGEST_NAME: usize = 255;

#[derive(Debug, Default)]
pub struct Vault {
    kept: BTreeMap<String, OwnedFd>,
}

impl Vault {
    /// # Errors
    /// `Malformed` for a name or descriptor the vault does not take, `Exhausted` when it is full.
    pub fn put(&mut self, name: String, fds: Vec<OwnedFd>) -> Result<(), Refusal> {
        let refuse =
            |kind, why: String| Err(Refusal::new(kind, format!("keep a descriptor as `{name:.80}`: {why}")));
        if name.is_empty() || name.len() > LONGEST_NAME || name.chars().any(char::is_control) {
            return refuse(
                RefusalKind::Malformed,
                format!("a name is 1 to {LONGEST_NAME} bytes of plain text"),
            );
        }
        let Ok([fd]) = <[OwnedFd; 1]>::try_from(fds) else {
            return refuse(
                RefusalKind::Malformed,
                "exactly one descriptor has to come with the message".to_owned(),
            );
        };
        let what = what_it_is(fd.as_fd());
        if !is_kept(&what) {
            // A file on the FUSE file system itself would deadlock whoever holds it at exit.
            return refuse(
                RefusalKind::Malformed,
                format!("`{what}` is a file; only kernel objects are kept"),
            );
        }
        if self.kept.len() >= MOST && !self.kept.contains_key(&name) {
            return refuse(RefusalKind::Exhausted, format!("{MOST} descriptors are kept already"));
        }
        self.kept.insert(name, fd);
        Ok(())
    }

    /// # Errors
    /// `NotFound`.
    pub fn get(&self, name: &str) -> Result<BorrowedFd<'_>, Refusal> {
        self.kept.get(name).map(AsFd::as_fd).ok_or_else(|| {
            Refusal::new(
                RefusalKind::NotFound,
                format!("give back the descriptor `{name:.80}`: none is kept by this name"),
            )
        })
    }

    pub fn drop(&mut self, name: &str) {
        self.kept.remove(name);
    }

    pub fn len(&self) -> usize {
        self.kept.len()
    }

    pub fn is_empty(&self) -> bool {
        self.kept.is_empty()
    }
}

/// What /proc calls it. Asks the kernel's tables only, never the file's own file system, which may not answer.
fn what_it_is(fd: BorrowedFd<'_>) -> String {
    let link = read_link(format!("/proc/self/fd/{}", fd.as_raw_fd()));
    link.map_or_else(|error| format!("? ({error})"), |link| link.to_string_lossy().into_owned())
}

/// `anon_inode:seccomp notify`, `socket:[1]`, `mnt:[1]` have no slash; a memfd and /dev/fuse are the only paths.
fn is_kept(link: &str) -> bool {
    !link.starts_with(['/', '?', '(']) || link.starts_with("/memfd:") || link == "/dev/fuse"
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::io::{Read, Seek, Write};

    fn memfd(text: &str) -> OwnedFd {
        let fd = nix::sys::memfd::memfd_create("t", nix::sys::memfd::MFdFlags::MFD_CLOEXEC).unwrap();
        File::from(fd.try_clone().unwrap()).write_all(text.as_bytes()).unwrap();
        fd
    }

    fn content(vault: &Vault, name: &str) -> String {
        let mut file = File::from(vault.get(name).unwrap().try_clone_to_owned().unwrap());
        let mut text = String::new();
        file.rewind().unwrap();
        file.read_to_string(&mut text).unwrap();
        text
    }

    #[test]
    fn the_newest_of_a_name_is_given_back() {
        let mut vault = Vault::default();
        vault.put("n".into(), vec![memfd("one")]).unwrap();
        vault.put("n".into(), vec![memfd("two")]).unwrap();
        assert_eq!((content(&vault, "n").as_str(), vault.len()), ("two", 1));
        vault.drop("n");
        vault.drop("n");
        assert_eq!(vault.get("n").unwrap_err().kind, RefusalKind::NotFound);
        assert!(vault.is_empty());
    }

    #[test]
    fn files_and_odd_names_are_refused() {
        let mut vault = Vault::default();
        let long = "x".repeat(LONGEST_NAME + 1);
        for (name, fds) in [
            ("f", vec![OwnedFd::from(tempfile::tempfile().unwrap())]),
            ("f", vec![OwnedFd::from(File::open("/").unwrap())]),
            ("f", vec![]),
            ("f", vec![memfd(""), memfd("")]),
            ("", vec![memfd("")]),
            ("a\nb", vec![memfd("")]),
            (long.as_str(), vec![memfd("")]),
        ] {
            assert_eq!(vault.put(name.into(), fds).unwrap_err().kind, RefusalKind::Malformed, "{name:?}");
        }
        for kept in [
            "/dev/fuse",
            "/memfd:ids (deleted)",
            "anon_inode:seccomp notify",
            "anon_inode:[pidfd]",
            "socket:[7]",
        ] {
            assert!(is_kept(kept), "{kept}");
        }
        for file in ["/", "/dev/fuse2", "/var/lib/sysbox/fs/x", "(unreachable)/x", "? (No such file)"] {
            assert!(!is_kept(file), "{file}");
        }
    }

    #[test]
    fn a_full_vault_takes_only_replacements() {
        let mut vault = Vault::default();
        let one = File::open("/proc/self/ns/net").unwrap();
        for at in 0..MOST {
            let Ok(fd) = one.try_clone() else { panic!("needs an RLIMIT_NOFILE over {MOST}, has fewer") };
            vault.put(format!("{at}"), vec![fd.into()]).unwrap();
        }
        let refused = vault.put("more".into(), vec![memfd("")]).unwrap_err();
        assert_eq!(refused.kind, RefusalKind::Exhausted);
        vault.put("7".into(), vec![memfd("")]).unwrap();
    }
}
