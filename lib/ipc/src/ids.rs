//! Ranges of subordinate ids, and maps from ids inside a container to ids of the host.

use serde::{Deserialize, Serialize};

/// How many ids a container gets unless it asks for more.
pub const DEFAULT_IDS: u32 = 65536;

/// A run of host ids, used for uids and gids alike.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct IdRange {
    /// First host id.
    pub start: u32,
    /// How many; never 0.
    pub count: u32,
}

impl IdRange {
    /// One past the last id.
    pub fn end(self) -> u64 {
        u64::from(self.start) + u64::from(self.count)
    }

    pub fn overlaps(self, other: Self) -> bool {
        u64::from(self.start) < other.end() && u64::from(other.start) < self.end()
    }

    pub fn contains(self, id: u32) -> bool {
        u64::from(id) >= u64::from(self.start) && u64::from(id) < self.end()
    }
}

/// One line of a uid_map or gid_map (user_namespaces(7)).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct IdMapLine {
    pub inside: u32,
    pub outside: u32,
    pub count: u32,
}

/// The id map of one container: every line checked, id 0 mapped, host id 0 never.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "IdMapLines", into = "IdMapLines")]
pub struct IdMap {
    uids: Vec<IdMapLine>,
    gids: Vec<IdMapLine>,
}

/// The unchecked form of an [`IdMap`], as it travels.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct IdMapLines {
    pub uids: Vec<IdMapLine>,
    pub gids: Vec<IdMapLine>,
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum IdMapError {
    #[error("the {kind} map has no line")]
    Empty { kind: &'static str },
    #[error("the {kind} map has a line of 0 ids")]
    NoIds { kind: &'static str },
    #[error("line {inside} {outside} {count} of the {kind} map goes beyond the last id")]
    Overflow { kind: &'static str, inside: u32, outside: u32, count: u32 },
    #[error("two lines of the {kind} map overlap")]
    Overlap { kind: &'static str },
    #[error("the {kind} map does not map id 0 of the container")]
    NoRoot { kind: &'static str },
    #[error("the {kind} map gives the container id 0 of the host")]
    HostRoot { kind: &'static str },
}

impl IdMap {
    /// # Errors
    /// `IdMapError` names the first rule broken: see its variants.
    pub fn new(uids: Vec<IdMapLine>, gids: Vec<IdMapLine>) -> Result<Self, IdMapError> {
        check_lines("uid", &uids)?;
        check_lines("gid", &gids)?;
        Ok(Self { uids, gids })
    }

    /// The plain map of an exclusive range: container ids from 0 on. `None` if the range is empty or holds host id 0.
    pub fn of_range(range: IdRange) -> Option<Self> {
        let line = vec![IdMapLine { inside: 0, outside: range.start, count: range.count }];
        Self::new(line.clone(), line).ok()
    }

    pub fn uids(&self) -> &[IdMapLine] {
        &self.uids
    }

    pub fn gids(&self) -> &[IdMapLine] {
        &self.gids
    }

    /// The host uid of the container's root.
    pub fn root_uid(&self) -> u32 {
        host_id(&self.uids, 0).expect("IdMap::new refuses a map without id 0")
    }

    /// The host gid of the container's root group.
    pub fn root_gid(&self) -> u32 {
        host_id(&self.gids, 0).expect("IdMap::new refuses a map without id 0")
    }

    /// The host uid of a uid inside, if it is mapped.
    pub fn host_uid(&self, inside: u32) -> Option<u32> {
        host_id(&self.uids, inside)
    }

    /// The host gid of a gid inside, if it is mapped.
    pub fn host_gid(&self, inside: u32) -> Option<u32> {
        host_id(&self.gids, inside)
    }

    /// Whether a host uid belongs to this container.
    pub fn owns_host_uid(&self, outside: u32) -> bool {
        self.uids.iter().any(|l| IdRange { start: l.outside, count: l.count }.contains(outside))
    }
}

fn host_id(lines: &[IdMapLine], inside: u32) -> Option<u32> {
    lines
        .iter()
        .find(|l| IdRange { start: l.inside, count: l.count }.contains(inside))
        .map(|l| l.outside + (inside - l.inside))
}

fn check_lines(kind: &'static str, lines: &[IdMapLine]) -> Result<(), IdMapError> {
    if lines.is_empty() {
        return Err(IdMapError::Empty { kind });
    }
    for (at, line) in lines.iter().enumerate() {
        let IdMapLine { inside, outside, count } = *line;
        if count == 0 {
            return Err(IdMapError::NoIds { kind });
        }
        let (from, to) = (IdRange { start: inside, count }, IdRange { start: outside, count });
        // 4294967295 is (uid_t)-1, "no id"; the kernel refuses it in a map.
        if from.end() > u64::from(u32::MAX) || to.end() > u64::from(u32::MAX) {
            return Err(IdMapError::Overflow { kind, inside, outside, count });
        }
        if outside == 0 {
            return Err(IdMapError::HostRoot { kind });
        }
        for other in &lines[..at] {
            let (other_from, other_to) = (
                IdRange { start: other.inside, count: other.count },
                IdRange { start: other.outside, count: other.count },
            );
            if from.overlaps(other_from) || to.overlaps(other_to) {
                return Err(IdMapError::Overlap { kind });
            }
        }
    }
    if host_id(lines, 0).is_none() {
        return Err(IdMapError::NoRoot { kind });
    }
    Ok(())
}

impl TryFrom<IdMapLines> for IdMap {
    type Error = IdMapError;
    fn try_from(lines: IdMapLines) -> Result<Self, IdMapError> {
        Self::new(lines.uids, lines.gids)
    }
}

impl From<IdMap> for IdMapLines {
    fn from(map: IdMap) -> Self {
        Self { uids: map.uids, gids: map.gids }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn line(inside: u32, outside: u32, count: u32) -> IdMapLine {
        IdMapLine { inside, outside, count }
    }

    #[test]
    fn a_map_names_the_rule_it_breaks() {
        let good = vec![line(0, 100_000, 65536)];
        for (bad, why) in [
            (vec![], IdMapError::Empty { kind: "uid" }),
            (vec![line(0, 5, 0)], IdMapError::NoIds { kind: "uid" }),
            (
                vec![line(0, u32::MAX, 1)],
                IdMapError::Overflow { kind: "uid", inside: 0, outside: u32::MAX, count: 1 },
            ),
            (vec![line(0, 10, 5), line(4, 100, 2)], IdMapError::Overlap { kind: "uid" }),
            (vec![line(0, 10, 5), line(5, 14, 2)], IdMapError::Overlap { kind: "uid" }),
            (vec![line(1, 10, 5)], IdMapError::NoRoot { kind: "uid" }),
            (vec![line(0, 0, 5)], IdMapError::HostRoot { kind: "uid" }),
        ] {
            assert_eq!(IdMap::new(bad, good.clone()), Err(why));
        }
    }

    proptest! {
        #[test]
        fn ids_of_a_range_stay_in_it(start in 1u32..4_000_000_000, count in 1u32..200_000, inside in 0u32..200_000) {
            let range = IdRange { start, count };
            let map = IdMap::of_range(range).unwrap();
            match map.host_uid(inside) {
                Some(host) => prop_assert!(inside < count && range.contains(host)),
                None => prop_assert!(inside >= count),
            }
        }
    }
}
