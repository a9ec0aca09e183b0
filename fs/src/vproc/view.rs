//! The views, and where they are read from: the host's /proc and the cgroup of the process that reads. Whatever a cgroup
//! does not tell is left out, never an error: a container must not lose /proc/meminfo because it removed a cgroup.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use super::cgroup::{self, CgroupPath, Level, MemoryStat, Version};

/// Far more than any file that is read here has.
const LONGEST_FILE: usize = 256 * 1024;

#[derive(Debug, thiserror::Error)]
#[error("read({}): {source}", path.display())]
pub struct ViewError {
    path: PathBuf,
    source: std::io::Error,
}

/// Who reads.
#[derive(Debug, Clone, Default)]
pub struct Reader {
    /// In the daemon's pid namespace; 0 for a process outside of it.
    pub pid: i32,
    /// The init of the container whose file it is.
    pub init: Option<i32>,
    /// That container's own cgroup.
    pub container: Option<CgroupPath>,
}

/// What the memory files show.
#[derive(Debug, Clone)]
pub struct MemoryView {
    pub host: HostMemory,
    /// `None`: the reader's machine is the host.
    pub cgroup: Option<CgroupMemory>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CgroupMemory {
    pub limit: Option<u64>,
    pub usage: u64,
    pub stat: MemoryStat,
    pub swap: Swap,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Swap {
    /// The kernel does not count swap by cgroup: all of the host's may be used.
    Unaccounted,
    Accounted {
        limit: Option<u64>,
        used: u64,
    },
}

/// The host's /proc/meminfo, kept as text: a view has the host's lines in the host's order, those of later kernels too.
#[derive(Debug, Clone)]
pub struct HostMemory(String);

impl HostMemory {
    pub fn new(text: String) -> Self {
        Self(text)
    }

    pub fn text(&self) -> &str {
        &self.0
    }

    /// The value of a line, in its own unit, which is kB for all but the counts of huge pages; 0 if there is no such line.
    pub fn value(&self, name: &str) -> u64 {
        self.0
            .lines()
            .find_map(|line| value_of(line.strip_prefix(name)?.strip_prefix(':')?))
            .unwrap_or_default()
    }
}

/// The number in what follows the colon of a line of /proc/meminfo.
pub fn value_of(rest: &str) -> Option<u64> {
    rest.split_ascii_whitespace().next()?.parse().ok()
}

/// Where views are read from.
#[derive(Debug)]
pub struct Source {
    proc: PathBuf,
    memory: Option<Controller>,
    /// /proc/meminfo, kept open: opening it costs as much as reading it.
    meminfo: OnceLock<File>,
}

/// Where a controller's cgroups are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Controller {
    pub version: Version,
    pub mount: PathBuf,
    /// The cgroup that is the mount's root; not the hierarchy's where the daemon itself runs in a container.
    pub root: CgroupPath,
}

impl Source {
    /// The host's, as this process sees it.
    ///
    /// # Errors
    /// /proc/self/mountinfo not being readable.
    pub fn of_this_host() -> procfs::ProcResult<Self> {
        let mounts = procfs::process::Process::myself()?.mountinfo()?;
        let v1 = mounts.iter().find(|m| m.fs_type == "cgroup" && m.super_options.contains_key("memory"));
        let v2 = || mounts.iter().find(|m| m.fs_type == "cgroup2" && has_memory(&m.mount_point));
        let found = v1.map(|m| (Version::V1, m)).or_else(|| v2().map(|m| (Version::V2, m)));
        let memory = found.and_then(|(version, mount)| {
            Some(Controller {
                version,
                mount: mount.mount_point.clone(),
                root: cgroup::mount_root(&mount.root)?,
            })
        });
        Ok(Self::new(PathBuf::from("/proc"), memory))
    }

    pub fn new(proc: PathBuf, memory: Option<Controller>) -> Self {
        Self { proc, memory, meminfo: OnceLock::new() }
    }

    pub fn memory_controller(&self) -> Option<&Controller> {
        self.memory.as_ref()
    }

    /// # Errors
    /// The host's own /proc/meminfo not being readable.
    pub fn memory(&self, reader: &Reader) -> Result<MemoryView, ViewError> {
        let text =
            self.host_meminfo().map_err(|source| ViewError { path: self.proc.join("meminfo"), source })?;
        let host = HostMemory::new(String::from_utf8_lossy(&text).into_owned());
        let cgroup = self.memory.as_ref().and_then(|controller| {
            let place = self.place(controller, reader)?;
            controller.memory(&place, reader.container.as_ref(), host.value("MemTotal") * 1024)
        });
        Ok(MemoryView { host, cgroup })
    }

    /// A container's own cgroup, by its init.
    pub fn container_cgroup(&self, init: i32) -> Option<CgroupPath> {
        let controller = self.memory.as_ref()?;
        self.cgroup_of(controller, init).map(CgroupPath::without_init_scope)
    }

    fn host_meminfo(&self) -> std::io::Result<Vec<u8>> {
        let file = match self.meminfo.get() {
            Some(file) => file,
            None => {
                let opened = File::open(self.proc.join("meminfo"))?;
                self.meminfo.get_or_init(|| opened)
            }
        };
        read_all(|buffer, offset| file.read_at(buffer, offset))
    }

    /// The cgroup whose numbers the reader is to see: its own, else that of the container's init.
    fn place(&self, controller: &Controller, reader: &Reader) -> Option<CgroupPath> {
        self.cgroup_of(controller, reader.pid)
            .or_else(|| self.cgroup_of(controller, reader.init?))
            .or_else(|| reader.container.clone())
    }

    fn cgroup_of(&self, controller: &Controller, pid: i32) -> Option<CgroupPath> {
        if pid <= 0 {
            return None;
        }
        let text = read(&self.proc.join(pid.to_string()).join("cgroup")).ok()?;
        cgroup::memory_cgroup(&text, controller.version)?.below(&controller.root)
    }
}

fn has_memory(mount: &Path) -> bool {
    let controllers = read(&mount.join("cgroup.controllers")).unwrap_or_default();
    controllers.split(u8::is_ascii_whitespace).any(|name| name == b"memory")
}

impl Controller {
    fn memory(
        &self,
        place: &CgroupPath,
        container: Option<&CgroupPath>,
        host_total: u64,
    ) -> Option<CgroupMemory> {
        let (limit_file, usage_file) = match self.version {
            Version::V1 => ("memory.limit_in_bytes", "memory.usage_in_bytes"),
            Version::V2 => ("memory.max", "memory.current"),
        };
        let levels = self.levels(place, limit_file, host_total);
        let depth = cgroup::machine(&levels, cgroup::container_depth(place, container))?;
        let limit = match levels[depth] {
            Level::Limited(bytes) => Some(bytes),
            Level::Unaccounted | Level::Unlimited => None,
        };
        let directory = place.directory(&self.mount, depth);
        let usage = read(&directory.join(usage_file)).ok().and_then(|text| cgroup::number(&text))?;
        let stat = MemoryStat::parse(&read(&directory.join("memory.stat")).ok()?, self.version);
        let swap = match self.version {
            Version::V1 => v1_swap(&stat, limit),
            Version::V2 => self.v2_swap(place, &directory),
        };
        Some(CgroupMemory { limit, usage, stat, swap })
    }

    /// What every cgroup from the root to `place` says of its limit. A limit that the host does not reach is none.
    fn levels(&self, place: &CgroupPath, file: &str, host_total: u64) -> Vec<Level> {
        let mut directory = place.directory(&self.mount, 0);
        let mut levels = vec![Level::Unlimited];
        for depth in 1..=place.depth() {
            directory.clone_from(&place.directory(&self.mount, depth));
            levels.push(match read(&directory.join(file)) {
                Err(_) => Level::Unaccounted,
                Ok(text) => match cgroup::limit(&text) {
                    Some(bytes) if bytes < host_total => Level::Limited(bytes),
                    _ => Level::Unlimited,
                },
            });
        }
        levels
    }

    fn v2_swap(&self, place: &CgroupPath, directory: &Path) -> Swap {
        let Some(used) =
            read(&directory.join("memory.swap.current")).ok().and_then(|text| cgroup::number(&text))
        else {
            return Swap::Unaccounted;
        };
        let limit =
            self.levels(place, "memory.swap.max", u64::MAX).into_iter().filter_map(|level| match level {
                Level::Limited(bytes) => Some(bytes),
                Level::Unaccounted | Level::Unlimited => None,
            });
        Swap::Accounted { limit: limit.min(), used }
    }
}

fn v1_swap(stat: &MemoryStat, limit: Option<u64>) -> Swap {
    let (Some(together), Some(used)) = (stat.hierarchical_memsw_limit, stat.swap) else {
        return Swap::Unaccounted;
    };
    let limit = limit.map(|memory| together.saturating_sub(memory));
    Swap::Accounted { limit, used }
}

/// A small file of procfs or cgroupfs: without the stat, the seek and the read at the end that `std::fs::read` makes.
fn read(path: &Path) -> std::io::Result<Vec<u8>> {
    let file = File::open(path)?;
    read_all(|buffer, offset| file.read_at(buffer, offset))
}

/// These files give all that fits (single_open of the kernel's seq_file): a read that leaves room was the last one.
fn read_all(read_at: impl Fn(&mut [u8], u64) -> std::io::Result<usize>) -> std::io::Result<Vec<u8>> {
    let mut text = vec![0; 4096];
    let mut length = 0;
    loop {
        match read_at(&mut text[length..], length as u64) {
            Ok(read) => length += read,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error),
        }
        if length < text.len() || length >= LONGEST_FILE {
            text.truncate(length);
            return Ok(text);
        }
        text.resize(text.len() * 4, 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOST: &str = "MemTotal:       24684096 kB\nMemFree:        23330524 kB\nSwapTotal:       1000 kB\n";

    /// A host made of files.
    struct Host {
        dir: tempfile::TempDir,
        source: Source,
    }

    impl Host {
        fn new(version: Version, files: &[(&str, &str)]) -> Self {
            let dir = tempfile::tempdir().unwrap();
            let root = CgroupPath::default();
            let controller = Controller { version, mount: dir.path().join("cgroup"), root };
            let host = Self { source: Source::new(dir.path().join("proc"), Some(controller)), dir };
            host.write("proc/meminfo", HOST);
            files.iter().for_each(|(path, text)| host.write(path, text));
            host
        }

        fn write(&self, path: &str, text: &str) {
            let path = self.dir.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        }

        fn memory(&self, pid: i32, init: Option<i32>) -> Option<CgroupMemory> {
            let container = init.and_then(|init| self.source.container_cgroup(init));
            self.source.memory(&Reader { pid, init, container }).unwrap().cgroup
        }
    }

    fn v1_files<'a>() -> Vec<(&'a str, &'a str)> {
        vec![
            ("proc/7/cgroup", "4:memory:/d/c/svc\n"),
            ("proc/8/cgroup", "4:memory:/d/c/inner\n"),
            ("proc/9/cgroup", "4:memory:/\n"),
            ("proc/1/cgroup", "4:memory:/d/c/init.scope\n"),
            ("cgroup/d/memory.limit_in_bytes", "9223372036854771712\n"),
            ("cgroup/d/c/memory.limit_in_bytes", "2000000\n"),
            ("cgroup/d/c/memory.usage_in_bytes", "500000\n"),
            ("cgroup/d/c/memory.stat", "total_cache 77\ntotal_swap 5\nhierarchical_memsw_limit 3000000\n"),
            ("cgroup/d/c/svc/memory.limit_in_bytes", "9223372036854771712\n"),
            ("cgroup/d/c/svc/memory.usage_in_bytes", "3\n"),
            ("cgroup/d/c/inner/memory.limit_in_bytes", "1000000\n"),
            ("cgroup/d/c/inner/memory.usage_in_bytes", "4\n"),
            ("cgroup/d/c/inner/memory.stat", "total_cache 1\n"),
        ]
    }

    #[test]
    fn v1_numbers_are_of_the_cgroup_that_limits_the_reader() {
        let host = Host::new(Version::V1, &v1_files());
        let of_container = CgroupMemory {
            limit: Some(2_000_000),
            usage: 500_000,
            stat: MemoryStat {
                cache: 77,
                swap: Some(5),
                hierarchical_memsw_limit: Some(3_000_000),
                ..MemoryStat::default()
            },
            swap: Swap::Accounted { limit: Some(1_000_000), used: 5 },
        };
        assert_eq!(host.memory(7, None), Some(of_container.clone()), "a service without a limit of its own");
        let inner = host.memory(8, None).unwrap();
        assert_eq!((inner.limit, inner.usage, inner.swap), (Some(1_000_000), 4, Swap::Unaccounted));
        assert_eq!(host.memory(9, None), None, "the host's own processes");
        // No such process, or one outside of our pid namespace.
        assert_eq!(host.memory(99, Some(1)), Some(of_container.clone()));
        assert_eq!(host.memory(0, Some(1)), Some(of_container));
        assert_eq!(host.memory(99, None), None);
    }

    #[test]
    fn without_a_limit_the_containers_own_cgroup_is_the_machine() {
        let host = Host::new(Version::V1, &v1_files());
        host.write("cgroup/d/c/memory.limit_in_bytes", "99999999999999\n");
        let seen = host.memory(7, Some(1)).unwrap();
        assert_eq!((seen.limit, seen.usage), (None, 500_000));
    }

    #[test]
    fn v2_limits_of_memory_and_swap_are_the_lowest_on_the_way() {
        let host = Host::new(
            Version::V2,
            &[
                ("proc/7/cgroup", "0::/d/c/svc\n"),
                ("cgroup/d/memory.max", "max\n"),
                ("cgroup/d/memory.swap.max", "400000\n"),
                ("cgroup/d/c/memory.max", "2000000\n"),
                ("cgroup/d/c/memory.swap.max", "max\n"),
                ("cgroup/d/c/memory.current", "500000\n"),
                ("cgroup/d/c/memory.swap.current", "6\n"),
                ("cgroup/d/c/memory.stat", "file 77\n"),
            ],
        );
        let expected = CgroupMemory {
            limit: Some(2_000_000),
            usage: 500_000,
            stat: MemoryStat { cache: 77, ..MemoryStat::default() },
            swap: Swap::Accounted { limit: Some(400_000), used: 6 },
        };
        assert_eq!(host.memory(7, None), Some(expected));
    }

    #[test]
    fn a_cgroup_that_vanishes_leaves_the_hosts_values() {
        let host = Host::new(Version::V1, &[("proc/7/cgroup", "4:memory:/gone\n")]);
        assert_eq!(host.memory(7, None), None);
        let reader = Reader { pid: 7, ..Reader::default() };
        let without = Source::new(host.dir.path().join("proc"), None);
        assert_eq!(without.memory(&reader).unwrap().cgroup, None);
        let nowhere = Source::new(PathBuf::from("/nowhere"), None);
        let error = nowhere.memory(&Reader::default()).unwrap_err();
        assert_eq!(error.to_string(), "read(/nowhere/meminfo): No such file or directory (os error 2)");
    }

    #[test]
    fn long_files_are_read_to_their_end_and_endless_ones_are_cut() {
        for length in [0, 1, 4095, 4096, 4097, 16384, 100_000] {
            let file = vec![b'x'; length];
            let text = read_all(|buffer, offset| {
                let rest = &file[usize::try_from(offset).unwrap()..];
                let part = rest.len().min(buffer.len());
                buffer[..part].copy_from_slice(&rest[..part]);
                Ok(part)
            });
            assert_eq!(text.unwrap().len(), length);
        }
        let endless = read_all(|buffer, _| Ok(buffer.len()));
        assert_eq!(endless.unwrap().len(), LONGEST_FILE);
    }

    #[test]
    fn this_host_has_a_memory_controller_or_the_test_says_so() {
        let source = Source::of_this_host().unwrap();
        let Some(memory) = &source.memory else { panic!("no memory controller is mounted here") };
        assert!(memory.mount.starts_with("/sys/fs/cgroup"), "{memory:?}");
        assert!(
            source
                .memory(&Reader { pid: std::process::id().try_into().unwrap(), ..Reader::default() })
                .is_ok()
        );
    }
}
