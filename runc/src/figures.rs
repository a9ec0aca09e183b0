//! What a container uses, from the files of the cgroup that carries its limits, in the form in which runc's `events` prints
//! it (names, nesting, what is left out when it is zero).

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

use crate::cgroup::{Cgroup, Kind};

/// Files of cgroups; one that is not there has nothing to say: which there are depends on kernel and controllers.
struct Dir(Option<PathBuf>);

impl Dir {
    fn text(&self, file: &str) -> Option<String> {
        fs::read_to_string(self.0.as_ref()?.join(file)).ok()
    }

    /// A number; `max` is the greatest.
    fn number(&self, file: &str) -> Option<u64> {
        let text = self.text(file)?;
        if text.trim() == "max" { Some(u64::MAX) } else { text.trim().parse().ok() }
    }

    fn signed(&self, file: &str) -> Option<i64> {
        self.text(file)?.trim().parse().ok()
    }

    /// Lines of a name and a number.
    fn pairs(&self, file: &str) -> Vec<(String, u64)> {
        let pair = |line: &str| {
            let (name, value) = line.split_once(' ')?;
            Some((name.to_owned(), value.trim().parse().ok()?))
        };
        self.text(file).unwrap_or_default().lines().filter_map(pair).collect()
    }

    fn key(&self, file: &str, key: &str) -> u64 {
        self.pairs(file).iter().find(|(name, _)| name == key).map_or(0, |(_, value)| *value)
    }

    /// Pressure, where the kernel tells it of cgroups.
    fn pressure(&self, file: &str) -> Option<Value> {
        let text = self.text(file)?;
        let mut stats = Map::new();
        for name in ["some", "full"] {
            let line = text.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_default();
            let field =
                |key: &str| line.split_whitespace().find_map(|word| word.strip_prefix(key)).unwrap_or("0");
            let average = |key: &str| field(key).parse::<f64>().unwrap_or_default();
            let averages = (average("avg10="), average("avg60="), average("avg300="));
            let total = field("total=").parse::<u64>().unwrap_or_default();
            let data =
                json!({"avg10": averages.0, "avg60": averages.1, "avg300": averages.2, "total": total});
            stats.insert(name.to_owned(), data);
        }
        Some(Value::Object(stats))
    }
}

/// Leaves out what is zero or empty.
fn put(map: &mut Map<String, Value>, name: &str, value: impl Into<Value>) {
    let value = value.into();
    let empty = match &value {
        Value::Null => true,
        Value::Number(number) => number.as_u64() == Some(0),
        Value::Array(all) => all.is_empty(),
        Value::Object(all) => all.is_empty(),
        _ => false,
    };
    if !empty {
        map.insert(name.to_owned(), value);
    }
}

/// All figures of a container.
pub fn figures(cgroup: &Cgroup) -> Value {
    let unified = cgroup.hierarchies.iter().find(|h| h.kind == Kind::Unified);
    let dir = |controller: &str| {
        let hierarchy = unified.or_else(|| cgroup.hierarchies.iter().find(|h| h.has(controller)));
        Dir(hierarchy.map(|hierarchy| hierarchy.mount.join(&cgroup.parent)))
    };
    let two = unified.is_some();
    json!({
        "cpu": if two { cpu_v2(&dir("cpu")) } else { cpu_v1(&dir("cpuacct"), &dir("cpu")) },
        "cpuset": cpuset(&dir("cpuset"), two),
        "memory": if two { memory_v2(&dir("memory")) } else { memory_v1(&dir("memory")) },
        "pids": pids(&dir("pids")),
        "blkio": if two { io_v2(&dir("io")) } else { io_v1(&dir("blkio")) },
        "hugetlb": hugetlb(&dir("hugetlb"), two),
        "intel_rdt": {},
        "network_interfaces": null,
    })
}

fn cpu_v1(accounting: &Dir, cpu: &Dir) -> Value {
    // The kernel's USER_HZ, which has been 100 on every architecture for user space.
    const TICK: u64 = 10_000_000;
    let list = |text: Option<String>| -> Vec<u64> {
        text.unwrap_or_default().split_whitespace().filter_map(|field| field.parse().ok()).collect()
    };
    let all = accounting.text("cpuacct.usage_all").unwrap_or_default();
    let column = |at: usize| -> Vec<u64> {
        all.lines().skip(1).filter_map(|line| line.split(' ').nth(at)?.parse().ok()).collect()
    };
    let mut usage = Map::new();
    put(&mut usage, "total", accounting.number("cpuacct.usage"));
    put(&mut usage, "percpu", list(accounting.text("cpuacct.usage_percpu")));
    put(&mut usage, "percpu_kernel", column(2));
    put(&mut usage, "percpu_user", column(1));
    usage.insert("kernel".to_owned(), (accounting.key("cpuacct.stat", "system") * TICK).into());
    usage.insert("user".to_owned(), (accounting.key("cpuacct.stat", "user") * TICK).into());
    let throttling =
        throttling(cpu.key("cpu.stat", "nr_periods"), cpu, cpu.key("cpu.stat", "throttled_time"));
    json!({"usage": usage, "throttling": throttling})
}

fn cpu_v2(dir: &Dir) -> Value {
    let microseconds = |key: &str| dir.key("cpu.stat", key) * 1000;
    let mut usage = Map::new();
    put(&mut usage, "total", microseconds("usage_usec"));
    usage.insert("kernel".to_owned(), microseconds("system_usec").into());
    usage.insert("user".to_owned(), microseconds("user_usec").into());
    let throttling = throttling(dir.key("cpu.stat", "nr_periods"), dir, microseconds("throttled_usec"));
    let mut cpu = Map::from_iter([("usage".to_owned(), usage.into()), ("throttling".to_owned(), throttling)]);
    put(&mut cpu, "psi", dir.pressure("cpu.pressure"));
    cpu.into()
}

fn throttling(periods: u64, dir: &Dir, time: u64) -> Value {
    let mut all = Map::new();
    put(&mut all, "periods", periods);
    put(&mut all, "throttledPeriods", dir.key("cpu.stat", "nr_throttled"));
    put(&mut all, "throttledTime", time);
    all.into()
}

fn cpuset(dir: &Dir, two: bool) -> Value {
    let mut all = Map::new();
    let effective = if two { ".effective" } else { "" };
    let list = |name: &str| numbers_in(&dir.text(&format!("cpuset.{name}{effective}")).unwrap_or_default());
    let flag = |name: &str| if two { 0 } else { dir.number(&format!("cpuset.{name}")).unwrap_or(0) };
    put(&mut all, "cpus", if two { Vec::new() } else { list("cpus") });
    all.insert("cpu_exclusive".to_owned(), flag("cpu_exclusive").into());
    put(&mut all, "mems", if two { Vec::new() } else { list("mems") });
    for name in [
        "mem_hardwall",
        "mem_exclusive",
        "memory_migrate",
        "memory_spread_page",
        "memory_spread_slab",
        "memory_pressure",
        "sched_load_balance",
    ] {
        all.insert(name.to_owned(), flag(name).into());
    }
    let level = if two { 0 } else { dir.signed("cpuset.sched_relax_domain_level").unwrap_or(0) };
    all.insert("sched_relax_domain_level".to_owned(), level.into());
    all.into()
}

/// `0-2,7`.
fn numbers_in(list: &str) -> Vec<u64> {
    let range = |part: &str| {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        Some(first.parse::<u64>().ok()?..=last.parse::<u64>().ok()?)
    };
    list.trim().split(',').filter_map(range).flatten().take(4096).collect()
}

fn entry(usage: u64, max: u64, failures: u64, limit: u64) -> Value {
    let mut all = Map::from_iter([("limit".to_owned(), Value::from(limit))]);
    put(&mut all, "usage", usage);
    put(&mut all, "max", max);
    all.insert("failcnt".to_owned(), failures.into());
    all.into()
}

fn memory_v1(dir: &Dir) -> Value {
    let of = |name: &str| {
        let read = |what: &str| dir.number(&format!("memory.{name}{what}")).unwrap_or(0);
        entry(read("usage_in_bytes"), read("max_usage_in_bytes"), read("failcnt"), read("limit_in_bytes"))
    };
    let mut raw: Map<String, Value> =
        dir.pairs("memory.stat").into_iter().map(|(name, value)| (name, value.into())).collect();
    // The container's processes are in the cgroup below; version 1 counts those in the `total_` lines alone.
    let totals: Vec<(String, Value)> = raw
        .iter()
        .filter_map(|(name, value)| Some((name.strip_prefix("total_")?.to_owned(), value.clone())))
        .collect();
    raw.extend(totals);
    let mut memory = Map::new();
    put(&mut memory, "cache", raw.get("cache").cloned().unwrap_or(Value::Null));
    memory.insert("usage".to_owned(), of(""));
    memory.insert("swap".to_owned(), of("memsw."));
    memory.insert("kernel".to_owned(), of("kmem."));
    memory.insert("kernelTCP".to_owned(), of("kmem.tcp."));
    put(&mut memory, "raw", raw);
    memory.into()
}

fn memory_v2(dir: &Dir) -> Value {
    let read = |file: &str| dir.number(file).unwrap_or(0);
    let (usage, limit) = (read("memory.current"), read("memory.max"));
    let swap_limit = match read("memory.swap.max") {
        u64::MAX => u64::MAX,
        swap => swap.saturating_add(limit),
    };
    let raw: Map<String, Value> =
        dir.pairs("memory.stat").into_iter().map(|(name, value)| (name, value.into())).collect();
    let mut memory = Map::new();
    put(&mut memory, "cache", raw.get("file").cloned().unwrap_or(Value::Null));
    memory.insert("usage".to_owned(), entry(usage, read("memory.peak"), 0, limit));
    memory.insert("swap".to_owned(), entry(usage + read("memory.swap.current"), 0, 0, swap_limit));
    memory.insert("kernel".to_owned(), entry(0, 0, 0, 0));
    memory.insert("kernelTCP".to_owned(), entry(0, 0, 0, 0));
    put(&mut memory, "raw", raw);
    put(&mut memory, "psi", dir.pressure("memory.pressure"));
    memory.into()
}

fn pids(dir: &Dir) -> Value {
    let mut all = Map::new();
    put(&mut all, "current", dir.number("pids.current"));
    put(&mut all, "limit", dir.number("pids.max").filter(|limit| *limit != u64::MAX));
    all.into()
}

fn io_entry(device: &str, operation: &str, value: u64) -> Value {
    let (major, minor) = device.split_once(':').unwrap_or_default();
    let mut all = Map::new();
    put(&mut all, "major", major.parse::<u64>().unwrap_or(0));
    put(&mut all, "minor", minor.parse::<u64>().unwrap_or(0));
    if !operation.is_empty() {
        all.insert("op".to_owned(), operation.into());
    }
    put(&mut all, "value", value);
    all.into()
}

/// `MAJOR:MINOR [OPERATION] VALUE` lines, of the first of the files that has any.
fn io_v1(dir: &Dir) -> Value {
    let entries = |files: [&str; 4]| -> Vec<Value> {
        let found = files.iter().map(|file| {
            let line = |line: &str| match line.split_whitespace().collect::<Vec<_>>()[..] {
                [device, operation, value] if device.contains(':') => {
                    Some(io_entry(device, operation, value.parse().ok()?))
                }
                [device, value] if device.contains(':') => Some(io_entry(device, "", value.parse().ok()?)),
                _ => None,
            };
            dir.text(file).unwrap_or_default().lines().filter_map(line).collect::<Vec<_>>()
        });
        found.into_iter().find(|entries| !entries.is_empty()).unwrap_or_default()
    };
    let of = |name: &str| {
        let names = ["bfq.", "", "throttle."].map(|kind| format!("blkio.{kind}{name}_recursive"));
        entries([&names[0], &names[1], &names[2], &format!("blkio.throttle.{name}")])
    };
    let mut all = Map::new();
    for (key, name) in [
        ("ioServiceBytesRecursive", "io_service_bytes"),
        ("ioServicedRecursive", "io_serviced"),
        ("ioQueueRecursive", "io_queued"),
        ("ioServiceTimeRecursive", "io_service_time"),
        ("ioWaitTimeRecursive", "io_wait_time"),
        ("ioMergedRecursive", "io_merged"),
        ("ioTimeRecursive", "time"),
        ("sectorsRecursive", "sectors"),
    ] {
        put(&mut all, key, of(name));
    }
    all.into()
}

fn io_v2(dir: &Dir) -> Value {
    let text = dir.text("io.stat").unwrap_or_default();
    let (mut bytes, mut operations) = (Vec::new(), Vec::new());
    for line in text.lines() {
        let Some((device, fields)) = line.split_once(' ') else { continue };
        for (name, value) in fields.split_whitespace().filter_map(|field| field.split_once('=')) {
            let Ok(value) = value.parse() else { continue };
            match name {
                "rbytes" => bytes.push(io_entry(device, "Read", value)),
                "wbytes" => bytes.push(io_entry(device, "Write", value)),
                "rios" => operations.push(io_entry(device, "Read", value)),
                "wios" => operations.push(io_entry(device, "Write", value)),
                _ => {}
            }
        }
    }
    let mut all = Map::new();
    put(&mut all, "ioServiceBytesRecursive", bytes);
    put(&mut all, "ioServicedRecursive", operations);
    put(&mut all, "psi", dir.pressure("io.pressure"));
    all.into()
}

fn hugetlb(dir: &Dir, two: bool) -> Value {
    let sizes = fs::read_dir("/sys/kernel/mm/hugepages").into_iter().flatten().flatten();
    let mut all = Map::new();
    for size in sizes.filter_map(|entry| page_size(entry.file_name().to_str()?)) {
        let any = |rest: &str| {
            let read = |kind: &str| dir.number(&format!("hugetlb.{size}{kind}{rest}"));
            read(".rsvd").or_else(|| read(""))
        };
        let mut figures = Map::new();
        let (usage, max) = if two { (".current", "") } else { (".usage_in_bytes", ".max_usage_in_bytes") };
        let Some(usage) = any(usage) else { continue };
        put(&mut figures, "usage", usage);
        put(&mut figures, "max", if max.is_empty() { None } else { any(max) });
        let failures = if two {
            dir.key(&format!("hugetlb.{size}.events"), "max")
        } else {
            any(".failcnt").unwrap_or(0)
        };
        figures.insert("failcnt".to_owned(), failures.into());
        all.insert(size, figures.into());
    }
    all.into()
}

/// `hugepages-2048kB` → `2MB`.
fn page_size(name: &str) -> Option<String> {
    let mut size: u64 = name.strip_prefix("hugepages-")?.strip_suffix("kB")?.parse().ok()?;
    let mut units = ["KB", "MB", "GB"].iter();
    let mut unit = units.next()?;
    while size >= 1024 {
        let Some(next) = units.next() else { break };
        (size, unit) = (size / 1024, next);
    }
    Some(format!("{size}{unit}"))
}

/// The directory of the cgroup whose memory is watched.
pub fn memory_dir(cgroup: &Cgroup) -> Option<(PathBuf, Kind)> {
    let hierarchies = &cgroup.hierarchies;
    let unified = hierarchies.iter().find(|h| h.kind == Kind::Unified);
    let hierarchy = unified.or_else(|| hierarchies.iter().find(|h| h.has("memory")))?;
    // Version 1 tells a cgroup and those below it; the one below has the same limit, and is reached first.
    let own = cgroup.delegated();
    let relative = if hierarchy.kind == Kind::V1 {
        own.strip_prefix("/").unwrap_or(&own)
    } else {
        Path::new(&cgroup.parent)
    };
    Some((hierarchy.mount.join(relative), hierarchy.kind))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_of_version_2_have_runcs_form() {
        let dir = tempfile::tempdir().unwrap();
        for (file, text) in [
            (
                "cpu.stat",
                "usage_usec 30\nuser_usec 20\nsystem_usec 10\nnr_periods 2\nnr_throttled 1\nthrottled_usec 5\n",
            ),
            (
                "cpu.pressure",
                "some avg10=0.50 avg60=0.00 avg300=0.00 total=7\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=0\n",
            ),
            ("memory.current", "100\n"),
            ("memory.max", "max\n"),
            ("memory.swap.current", "11\n"),
            ("memory.swap.max", "max\n"),
            ("memory.stat", "anon 60\nfile 40\n"),
            ("io.stat", "8:16 rbytes=1 wbytes=2 rios=3 wios=0 dbytes=0 dios=0\n"),
        ] {
            fs::write(dir.path().join(file), text).unwrap();
        }
        let dir = Dir(Some(dir.path().to_owned()));
        let cpu = cpu_v2(&dir);
        assert_eq!(cpu["usage"], json!({"total": 30000, "kernel": 10000, "user": 20000}));
        assert_eq!(cpu["throttling"], json!({"periods": 2, "throttledPeriods": 1, "throttledTime": 5000}));
        assert_eq!(cpu["psi"]["some"], json!({"avg10": 0.5, "avg60": 0.0, "avg300": 0.0, "total": 7}));
        let memory = memory_v2(&dir);
        assert_eq!(memory["cache"], 40);
        assert_eq!(memory["usage"], json!({"limit": u64::MAX, "usage": 100, "failcnt": 0}));
        assert_eq!(memory["swap"], json!({"limit": u64::MAX, "usage": 111, "failcnt": 0}));
        let io = io_v2(&dir);
        assert_eq!(
            io["ioServiceBytesRecursive"][1],
            json!({"major": 8, "minor": 16, "op": "Write", "value": 2})
        );
        assert_eq!(io["ioServicedRecursive"][1], json!({"major": 8, "minor": 16, "op": "Write"}));
    }

    #[test]
    fn lists_and_sizes_are_read() {
        assert_eq!(numbers_in("0-2,7\n"), [0, 1, 2, 7]);
        assert_eq!(numbers_in("\n"), Vec::<u64>::new());
        assert_eq!(page_size("hugepages-2048kB").as_deref(), Some("2MB"));
        assert_eq!(page_size("hugepages-1048576kB").as_deref(), Some("1GB"));
        assert_eq!(page_size("hugepages-64kB").as_deref(), Some("64KB"));
    }
}
