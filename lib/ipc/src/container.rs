//! A container's name, and the key under which the daemons know it. Refuses to know where anything is stored.

use std::fmt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

/// A container id as runc accepts it: letters, digits, `_`, `+`, `-`, `.`; not `.` or `..`; at most 1024 bytes.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ContainerId(String);

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("invalid id format: {0:?}")]
pub struct InvalidId(pub String);

impl ContainerId {
    /// # Errors
    /// `InvalidId` for a name that runc would refuse as well.
    pub fn parse(name: &str) -> Result<Self, InvalidId> {
        let legal = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '+' | '-' | '.');
        let fits = (1..=1024).contains(&name.len()) && name != "." && name != "..";
        if fits && name.chars().all(legal) {
            Ok(Self(name.to_owned()))
        } else {
            Err(InvalidId(name.chars().take(80).collect()))
        }
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for ContainerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl TryFrom<String> for ContainerId {
    type Error = InvalidId;
    fn try_from(name: String) -> Result<Self, InvalidId> {
        Self::parse(&name)
    }
}

impl From<ContainerId> for String {
    fn from(id: ContainerId) -> Self {
        id.0
    }
}

/// What tells containers apart on one host: the same id may live under two `--root`s.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct ContainerKey {
    /// The runtime's `--root`, absolute.
    pub root: PathBuf,
    pub id: ContainerId,
}

impl ContainerKey {
    pub fn new(root: &Path, id: ContainerId) -> Self {
        Self { root: root.to_owned(), id }
    }

    /// A file name for this key: unique, legal in every file system, and stable over releases (it names files on disk).
    pub fn slug(&self) -> String {
        let hash = fnv1a(
            [self.root.as_os_str().as_encoded_bytes(), b"\0", self.id.as_str().as_bytes()]
                .concat()
                .as_slice(),
        );
        let head: String = self.id.as_str().chars().take(200).collect();
        format!("{head}-{hash:016x}")
    }
}

impl fmt::Display for ContainerKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.id)
    }
}

/// FNV-1a, 64 bit, for names of files: std's hasher promises nothing across releases, and these names are on disk.
pub fn fnv1a(bytes: &[u8]) -> u64 {
    bytes
        .iter()
        .fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_those_of_runc() {
        for good in ["a", "A_b+c-d.e", "0123", "...", &"x".repeat(1024)] {
            assert_eq!(ContainerId::parse(good).map(String::from), Ok(good.to_owned()));
        }
        for bad in ["", ".", "..", "a/b", "../a", "a b", "a\nb", "ä", &"x".repeat(1025)] {
            assert!(ContainerId::parse(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn slugs_differ_by_root_and_stay_as_they_are() {
        let key =
            |root: &str, id: &str| ContainerKey::new(Path::new(root), ContainerId::parse(id).unwrap()).slug();
        assert_ne!(key("/run/a", "c"), key("/run/b", "c"));
        assert_eq!(key("/run/sysbox-runc", "c"), "c-9632c0790dbc4c2a");
        assert!(key("/r", &"x".repeat(1024)).len() < 255);
    }
}
