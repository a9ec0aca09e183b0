//! Cgroups as their files tell of them: where a process is, which of the cgroups above it limits its memory, and what that
//! one has used. Parsing takes any bytes; names come from containers.

use std::path::{Path, PathBuf};

/// How the memory controller is mounted here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Version {
    V1,
    V2,
}

/// Deeper cgroups than this do not count: their limits can only be lower than what the container was given, and a
/// container that nests them without end must not make a read slow.
const MOST_LEVELS: usize = 32;

/// A cgroup of the memory controller, by the names from the controller's root to it. The root has none.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct CgroupPath(Vec<Vec<u8>>);

impl CgroupPath {
    /// `None` for what is not a path below the root that the daemon sees.
    fn parse(bytes: &[u8]) -> Option<Self> {
        let below = bytes.strip_prefix(b"/")?;
        let names: Vec<_> =
            below.split(|b| *b == b'/').filter(|name| !name.is_empty()).map(<[u8]>::to_vec).collect();
        // `..`: outside of our cgroup namespace.
        if names.iter().any(|name| name == b".." || name == b"." || name.contains(&0)) {
            return None;
        }
        Some(Self(names.into_iter().take(MOST_LEVELS).collect()))
    }

    pub fn depth(&self) -> usize {
        self.0.len()
    }

    /// The directory of the cgroup `depth` levels below the root of `mount`.
    pub fn directory(&self, mount: &Path, depth: usize) -> PathBuf {
        use std::os::unix::ffi::OsStrExt;
        let names = self.0.iter().take(depth).map(|name| std::ffi::OsStr::from_bytes(name));
        let mut directory = mount.to_owned();
        names.for_each(|name| directory.push(name));
        directory
    }

    /// How deep `top` is if this cgroup is `top` or below it.
    fn depth_below(&self, top: &Self) -> Option<usize> {
        self.0.starts_with(&top.0).then_some(top.depth())
    }

    /// The cgroup of a container, given its init's. An init like systemd moves itself into a child.
    pub fn without_init_scope(mut self) -> Self {
        if self.0.last().is_some_and(|name| name == b"init.scope") {
            self.0.pop();
        }
        self
    }

    /// The part of the path below the root of a mount that shows only a subtree (field 4 of mountinfo).
    pub fn below(self, root: &Self) -> Option<Self> {
        let depth = self.depth_below(root)?;
        Some(Self(self.0.into_iter().skip(depth).collect()))
    }
}

/// The memory cgroup in the text of /proc/PID/cgroup (cgroups(7)), as the reader of that file sees it.
pub fn memory_cgroup(text: &[u8], version: Version) -> Option<CgroupPath> {
    text.split(|b| *b == b'\n').find_map(|line| {
        let mut fields = line.splitn(3, |b| *b == b':');
        let (hierarchy, controllers, path) = (fields.next()?, fields.next()?, fields.next()?);
        let ours = match version {
            Version::V1 => controllers.split(|b| *b == b',').any(|name| name == b"memory"),
            Version::V2 => hierarchy == b"0" && controllers.is_empty(),
        };
        ours.then(|| CgroupPath::parse(path)).flatten()
    })
}

/// The path of a cgroup as mountinfo writes it.
pub fn mount_root(text: &str) -> Option<CgroupPath> {
    CgroupPath::parse(text.as_bytes())
}

/// A number of bytes, or `None` for "no limit" in either version's words and for what is no number.
pub fn limit(text: &[u8]) -> Option<u64> {
    // v1 says "no limit" with the largest multiple of a page.
    const V1_NO_LIMIT: u64 = (i64::MAX as u64) & !0xffff;
    number(text).filter(|bytes| *bytes < V1_NO_LIMIT)
}

pub fn number(text: &[u8]) -> Option<u64> {
    let text = text.trim_ascii();
    if text.is_empty() || text.len() > 20 {
        return None;
    }
    text.iter().try_fold(0u64, |sum, byte| {
        let digit = byte.is_ascii_digit().then(|| u64::from(byte - b'0'))?;
        sum.checked_mul(10)?.checked_add(digit)
    })
}

/// What one cgroup on the way from the root to the reader says of its limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Level {
    /// No memory controller at this level (the root of v2, or a level without delegation).
    Unaccounted,
    Unlimited,
    Limited(u64),
}

/// Which level's numbers are the reader's machine: the one with the lowest limit, the nearest of equals. `levels[0]` is the
/// root. Where nothing limits, it is the container's own cgroup, and without that the reader's.
///
/// `None`: the host itself.
pub fn machine(levels: &[Level], container: Option<usize>) -> Option<usize> {
    let limited = levels.iter().enumerate().skip(1).rev().filter_map(|(depth, level)| match level {
        Level::Limited(bytes) => Some((depth, *bytes)),
        _ => None,
    });
    // `min_by_key` takes the first of equals, which is the deepest here.
    if let Some((depth, _)) = limited.min_by_key(|(_, bytes)| *bytes) {
        return Some(depth);
    }
    let wanted = container.unwrap_or(usize::MAX).min(levels.len().saturating_sub(1));
    (1..=wanted).rev().find(|depth| levels[*depth] != Level::Unaccounted)
}

/// The depth of a container's own cgroup above or at a reader's.
pub fn container_depth(reader: &CgroupPath, container: Option<&CgroupPath>) -> Option<usize> {
    container.and_then(|top| reader.depth_below(top))
}

/// What one cgroup and all below it use, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct MemoryStat {
    pub cache: u64,
    pub anon: u64,
    pub anon_huge: u64,
    pub shmem: u64,
    pub shmem_huge: u64,
    pub file_huge: u64,
    pub mapped: u64,
    pub dirty: u64,
    pub writeback: u64,
    pub active_anon: u64,
    pub inactive_anon: u64,
    pub active_file: u64,
    pub inactive_file: u64,
    pub unevictable: u64,
    pub slab_reclaimable: u64,
    pub slab_unreclaimable: u64,
    pub kernel_stack: u64,
    pub page_tables: u64,
    pub sec_page_tables: u64,
    pub percpu: u64,
    pub vmalloc: u64,
    pub zswap: u64,
    pub zswapped: u64,
    /// v1 alone: swapped out, if swap is accounted.
    pub swap: Option<u64>,
    /// v1 alone: the lowest limit of memory and swap together, of this cgroup and those above.
    pub hierarchical_memsw_limit: Option<u64>,
}

impl MemoryStat {
    /// The text of memory.stat.
    pub fn parse(text: &[u8], version: Version) -> Self {
        let mut stat = Self::default();
        for line in text.split(|b| *b == b'\n') {
            let mut fields = line.splitn(2, |b| *b == b' ');
            let (Some(name), Some(value)) = (fields.next(), fields.next().and_then(number)) else { continue };
            match version {
                Version::V1 => stat.set_v1(name, value),
                Version::V2 => stat.set_v2(name, value),
            }
        }
        stat
    }

    fn set_v1(&mut self, name: &[u8], value: u64) {
        match name {
            b"hierarchical_memsw_limit" => self.hierarchical_memsw_limit = Some(value),
            // Without the prefix a v1 value leaves out the cgroups below.
            b"total_cache" => self.cache = value,
            b"total_rss" => self.anon = value,
            b"total_rss_huge" => self.anon_huge = value,
            b"total_shmem" => self.shmem = value,
            b"total_mapped_file" => self.mapped = value,
            b"total_dirty" => self.dirty = value,
            b"total_writeback" => self.writeback = value,
            b"total_swap" => self.swap = Some(value),
            b"total_inactive_anon" => self.inactive_anon = value,
            b"total_active_anon" => self.active_anon = value,
            b"total_inactive_file" => self.inactive_file = value,
            b"total_active_file" => self.active_file = value,
            b"total_unevictable" => self.unevictable = value,
            _ => {}
        }
    }

    fn set_v2(&mut self, name: &[u8], value: u64) {
        match name {
            b"anon" => self.anon = value,
            b"file" => self.cache = value,
            b"kernel_stack" => self.kernel_stack = value,
            b"pagetables" => self.page_tables = value,
            b"sec_pagetables" => self.sec_page_tables = value,
            b"percpu" => self.percpu = value,
            b"vmalloc" => self.vmalloc = value,
            b"shmem" => self.shmem = value,
            b"zswap" => self.zswap = value,
            b"zswapped" => self.zswapped = value,
            b"file_mapped" => self.mapped = value,
            b"file_dirty" => self.dirty = value,
            b"file_writeback" => self.writeback = value,
            b"anon_thp" => self.anon_huge = value,
            b"file_thp" => self.file_huge = value,
            b"shmem_thp" => self.shmem_huge = value,
            b"inactive_anon" => self.inactive_anon = value,
            b"active_anon" => self.active_anon = value,
            b"inactive_file" => self.inactive_file = value,
            b"active_file" => self.active_file = value,
            b"unevictable" => self.unevictable = value,
            b"slab_reclaimable" => self.slab_reclaimable = value,
            b"slab_unreclaimable" => self.slab_unreclaimable = value,
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const V1: &[u8] =
        b"12:pids:/docker/abc\n4:memory:/docker/abc/docker/inner\n3:cpu,cpuacct:/\n0::/system.slice\n";

    fn path(text: &str) -> CgroupPath {
        CgroupPath::parse(text.as_bytes()).unwrap()
    }

    #[test]
    fn the_memory_cgroup_is_that_of_the_version() {
        for (text, version, expected) in [
            (V1, Version::V1, Some("/docker/abc/docker/inner")),
            (V1, Version::V2, Some("/system.slice")),
            (b"0::/\n".as_slice(), Version::V2, Some("/")),
            (b"0::/\n", Version::V1, None),
            (b"7:cpu,memory:/a:b/c\n", Version::V1, Some("/a:b/c")),
            (b"4:memory:/../other\n", Version::V1, None),
            (b"4:memory:relative\n", Version::V1, None),
            (b"4:memory\n", Version::V1, None),
            (b"", Version::V1, None),
        ] {
            assert_eq!(memory_cgroup(text, version), expected.map(path), "{}", text.escape_ascii());
        }
    }

    #[test]
    fn limits_in_both_versions_words() {
        for (text, expected) in [
            (b"268435456\n".as_slice(), Some(268_435_456)),
            (b"0\n", Some(0)),
            (b"max\n", None),
            (b"9223372036854771712\n", None),
            (b"9223372036854710272\n", None), // 64 KiB pages
            (b"18446744073709551615\n", None),
            (b"99999999999999999999999\n", None),
            (b"", None),
            (b"-1\n", None),
            (b"12 34\n", None),
        ] {
            assert_eq!(limit(text), expected, "{}", text.escape_ascii());
        }
    }

    #[test]
    fn the_machine_is_the_level_with_the_lowest_limit() {
        use Level::{Limited, Unaccounted, Unlimited};
        for (levels, container, expected) in [
            (vec![Unlimited], None, None),
            (vec![Unlimited], Some(0), None),
            (vec![Unaccounted, Unlimited, Limited(5)], Some(1), Some(2)),
            (vec![Unlimited, Limited(5), Unlimited, Unlimited], Some(1), Some(1)),
            (vec![Unlimited, Limited(5), Limited(9)], None, Some(1)),
            (vec![Unlimited, Limited(5), Limited(5)], None, Some(2)),
            (vec![Unlimited, Limited(9), Limited(5), Limited(7)], None, Some(2)),
            (vec![Unlimited, Unlimited, Unlimited, Unlimited], Some(2), Some(2)),
            (vec![Unlimited, Unlimited, Unlimited, Unlimited], None, Some(3)),
            (vec![Unaccounted, Unlimited, Unaccounted, Unaccounted], None, Some(1)),
            (vec![Unaccounted, Unaccounted], Some(1), None),
            (vec![], None, None),
        ] {
            assert_eq!(machine(&levels, container), expected, "{levels:?} {container:?}");
        }
    }

    #[test]
    fn a_container_is_above_its_readers_and_not_above_others() {
        let top = path("/docker/abc");
        assert_eq!(container_depth(&path("/docker/abc/system.slice/ssh"), Some(&top)), Some(2));
        assert_eq!(container_depth(&path("/docker/abc"), Some(&top)), Some(2));
        assert_eq!(container_depth(&path("/docker/abcd"), Some(&top)), None);
        assert_eq!(path("/docker/abc/init.scope").without_init_scope(), top);
        assert_eq!(path("/docker/abc").without_init_scope(), top);
        assert_eq!(path("/docker/abc/x").below(&top), Some(path("/x")));
        assert_eq!(path("/docker/other").below(&top), None);
    }

    #[test]
    fn directories_are_below_the_mount() {
        let cgroup = path("//docker/abc/");
        let mount = Path::new("/sys/fs/cgroup/memory");
        for (depth, expected) in [(0, ""), (1, "/docker"), (2, "/docker/abc"), (9, "/docker/abc")] {
            assert_eq!(
                cgroup.directory(mount, depth),
                PathBuf::from(format!("{}{expected}", mount.display()))
            );
        }
        assert_eq!(path(&"/d".repeat(1000)).depth(), MOST_LEVELS);
    }

    #[test]
    fn stat_of_both_versions() {
        let v1 = b"cache 1\nrss 2\nhierarchical_memory_limit 4096\nhierarchical_memsw_limit 8192\ntotal_cache 30\n\
                   total_rss 40\ntotal_swap 7\ntotal_active_file 11\ntotal_inactive_file junk\n";
        let expected = MemoryStat {
            cache: 30,
            anon: 40,
            swap: Some(7),
            active_file: 11,
            hierarchical_memsw_limit: Some(8192),
            ..MemoryStat::default()
        };
        assert_eq!(MemoryStat::parse(v1, Version::V1), expected);

        let v2 = b"anon 1\nfile 2\nkernel_stack 3\nslab_reclaimable 4\nslab_unreclaimable 5\nslab 9\nfile_mapped 6\n";
        let expected = MemoryStat {
            anon: 1,
            cache: 2,
            kernel_stack: 3,
            slab_reclaimable: 4,
            slab_unreclaimable: 5,
            mapped: 6,
            ..MemoryStat::default()
        };
        assert_eq!(MemoryStat::parse(v2, Version::V2), expected);
    }

    proptest! {
        #[test]
        fn any_bytes_parse_without_panic(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
            for version in [Version::V1, Version::V2] {
                MemoryStat::parse(&bytes, version);
                if let Some(cgroup) = memory_cgroup(&bytes, version) {
                    prop_assert!(cgroup.directory(Path::new("/m"), 99).starts_with("/m"));
                }
            }
            limit(&bytes);
            if let Some(cgroup) = CgroupPath::parse(&bytes) {
                let directory = cgroup.directory(Path::new("/m"), 99);
                prop_assert!(directory.components().all(|c| c != std::path::Component::ParentDir));
            }
        }

        #[test]
        fn any_levels_have_a_machine_among_them(
            limits in proptest::collection::vec(proptest::option::of(proptest::option::of(any::<u64>())), 0..40),
            container in proptest::option::of(0usize..50),
        ) {
            let levels: Vec<_> = limits.into_iter().map(|limit| match limit {
                None => Level::Unaccounted,
                Some(None) => Level::Unlimited,
                Some(Some(bytes)) => Level::Limited(bytes),
            }).collect();
            if let Some(depth) = machine(&levels, container) {
                prop_assert!(depth > 0 && depth < levels.len() && levels[depth] != Level::Unaccounted);
            }
        }
    }
}
