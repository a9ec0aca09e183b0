//! /proc/meminfo of a cgroup. The host's lines in the host's order; what is the cgroup's is put in, what cannot be known
//! of a cgroup is 0, as LXCFS has it. No amount of memory
//! exceeds MemTotal.

use std::fmt::Write;

use super::view::{CgroupMemory, HostMemory, MemoryView, Swap, value_of};

pub fn render(view: &MemoryView) -> String {
    let Some(cgroup) = &view.cgroup else { return view.host.text().to_owned() };
    let shown = Shown::new(&view.host, cgroup);
    let mut text = String::with_capacity(view.host.text().len() + 64);
    let mut next = 0;
    for line in view.host.text().lines() {
        let Some((name, rest)) = line.split_once(':') else { continue };
        let value = match find(name, &mut next) {
            Some(From::Cgroup(value)) => Some(value(&shown)),
            Some(From::Zero) => Some(0),
            Some(From::Host) => None,
            // A line of a later kernel: the host's value, unless it cannot be this machine's.
            None => value_of(rest).filter(|value| *value > shown.total).map(|_| shown.total),
        };
        match value {
            // As fs/proc/meminfo.c: the name padded to 16, the value to 8.
            Some(kb) => {
                match 15usize.checked_sub(name.len()) {
                    Some(padding) => writeln!(text, "{name}:{:padding$}{kb:>8} kB", ""),
                    // HardwareCorrupted
                    None => writeln!(text, "{name}: {kb:>5} kB"),
                }
                .expect("a String takes every write");
            }
            None => {
                text.push_str(line);
                text.push('\n');
            }
        }
    }
    text
}

/// The rule for a line. Kernels print lines in the order of the table, so the search begins where the last one ended.
fn find(name: &str, next: &mut usize) -> Option<&'static From> {
    let (before, after) = LINES.split_at(*next);
    let (at, (_, from)) = after.iter().chain(before).enumerate().find(|(_, (known, _))| *known == name)?;
    *next = (*next + at + 1) % LINES.len();
    Some(from)
}

/// Size and used part of the swap the reader's machine has, in kB.
pub(super) fn swap(view: &MemoryView) -> (u64, u64) {
    let (host_total, host_free) = (view.host.value("SwapTotal"), view.host.value("SwapFree"));
    let swap = view.cgroup.as_ref().map_or(Swap::Unaccounted, |cgroup| cgroup.swap);
    swap_of(host_total, host_free, swap)
}

fn swap_of(host_total: u64, host_free: u64, swap: Swap) -> (u64, u64) {
    match swap {
        Swap::Unaccounted => (host_total, host_total.saturating_sub(host_free)),
        Swap::Accounted { limit, used } => {
            let total = limit.map_or(host_total, |bytes| (bytes / 1024).min(host_total));
            (total, (used / 1024).min(total))
        }
    }
}

/// Where the value of a line comes from.
enum From {
    Cgroup(fn(&Shown<'_>) -> u64),
    Zero,
    Host,
}

const LINES: &[(&str, From)] = &[
    ("MemTotal", From::Cgroup(|s| s.total)),
    ("MemFree", From::Cgroup(|s| s.free)),
    ("MemAvailable", From::Cgroup(|s| s.available)),
    ("Buffers", From::Zero),
    ("Cached", From::Cgroup(|s| s.cached)),
    ("SwapCached", From::Zero),
    ("Active", From::Cgroup(|s| s.kb(s.stat.active_anon.saturating_add(s.stat.active_file)))),
    ("Inactive", From::Cgroup(|s| s.kb(s.stat.inactive_anon.saturating_add(s.stat.inactive_file)))),
    ("Active(anon)", From::Cgroup(|s| s.kb(s.stat.active_anon))),
    ("Inactive(anon)", From::Cgroup(|s| s.kb(s.stat.inactive_anon))),
    ("Active(file)", From::Cgroup(|s| s.kb(s.stat.active_file))),
    ("Inactive(file)", From::Cgroup(|s| s.kb(s.stat.inactive_file))),
    ("Unevictable", From::Cgroup(|s| s.kb(s.stat.unevictable))),
    ("Mlocked", From::Zero),
    ("SwapTotal", From::Cgroup(|s| s.swap_total)),
    ("SwapFree", From::Cgroup(|s| s.swap_total - s.swap_used)),
    ("Zswap", From::Cgroup(|s| s.kb(s.stat.zswap))),
    ("Zswapped", From::Cgroup(|s| s.kb(s.stat.zswapped))),
    ("Dirty", From::Cgroup(|s| s.kb(s.stat.dirty))),
    ("Writeback", From::Cgroup(|s| s.kb(s.stat.writeback))),
    ("AnonPages", From::Cgroup(|s| s.kb(s.stat.anon))),
    ("Mapped", From::Cgroup(|s| s.kb(s.stat.mapped))),
    ("Shmem", From::Cgroup(|s| s.kb(s.stat.shmem))),
    ("KReclaimable", From::Cgroup(|s| s.kb(s.stat.slab_reclaimable))),
    ("Slab", From::Cgroup(|s| s.kb(s.stat.slab_reclaimable.saturating_add(s.stat.slab_unreclaimable)))),
    ("SReclaimable", From::Cgroup(|s| s.kb(s.stat.slab_reclaimable))),
    ("SUnreclaim", From::Cgroup(|s| s.kb(s.stat.slab_unreclaimable))),
    ("KernelStack", From::Cgroup(|s| s.kb(s.stat.kernel_stack))),
    ("PageTables", From::Cgroup(|s| s.kb(s.stat.page_tables))),
    ("SecPageTables", From::Cgroup(|s| s.kb(s.stat.sec_page_tables))),
    ("NFS_Unstable", From::Zero),
    ("Bounce", From::Zero),
    ("WritebackTmp", From::Zero),
    ("CommitLimit", From::Cgroup(|s| s.commit_limit)),
    ("Committed_AS", From::Cgroup(|s| s.committed)),
    // An address space, not an amount of memory: the same in every container.
    ("VmallocTotal", From::Host),
    ("VmallocUsed", From::Cgroup(|s| s.kb(s.stat.vmalloc))),
    ("VmallocChunk", From::Zero),
    ("Percpu", From::Cgroup(|s| s.kb(s.stat.percpu))),
    ("HardwareCorrupted", From::Zero),
    ("AnonHugePages", From::Cgroup(|s| s.kb(s.stat.anon_huge))),
    ("ShmemHugePages", From::Cgroup(|s| s.kb(s.stat.shmem_huge))),
    ("ShmemPmdMapped", From::Zero),
    ("FileHugePages", From::Cgroup(|s| s.kb(s.stat.file_huge))),
    ("FilePmdMapped", From::Zero),
    ("CmaTotal", From::Zero),
    ("CmaFree", From::Zero),
    ("Unaccepted", From::Zero),
    ("Balloon", From::Zero),
    ("GPUActive", From::Zero),
    ("GPUReclaim", From::Zero),
    // The pool of huge pages is the host's, and charged to no memory cgroup.
    ("HugePages_Total", From::Host),
    ("HugePages_Free", From::Host),
    ("HugePages_Rsvd", From::Host),
    ("HugePages_Surp", From::Host),
    ("Hugepagesize", From::Host),
    ("Hugetlb", From::Host),
    // How the kernel maps the host's memory.
    ("DirectMap4k", From::Zero),
    ("DirectMap2M", From::Zero),
    ("DirectMap4M", From::Zero),
    ("DirectMap1G", From::Zero),
];

/// The amounts that depend on one another, in kB.
struct Shown<'a> {
    stat: &'a super::cgroup::MemoryStat,
    total: u64,
    free: u64,
    available: u64,
    cached: u64,
    swap_total: u64,
    swap_used: u64,
    commit_limit: u64,
    committed: u64,
}

impl<'a> Shown<'a> {
    fn new(host: &HostMemory, cgroup: &'a CgroupMemory) -> Self {
        let stat = &cgroup.stat;
        let host_total = host.value("MemTotal");
        let total = cgroup.limit.map_or(host_total, |bytes| (bytes / 1024).min(host_total));
        let used = (cgroup.usage / 1024).min(total);
        let free = total - used;
        let reclaimable =
            stat.active_file.saturating_add(stat.inactive_file).saturating_add(stat.slab_reclaimable);
        let available = free.saturating_add(reclaimable / 1024).min(total);
        // Usage and statistics are read one after the other: keep `total - free - cached - reclaimable slab` above zero.
        let cached = (stat.cache / 1024).min(used.saturating_sub(stat.slab_reclaimable / 1024));

        let host_swap = host.value("SwapTotal");
        let (swap_total, swap_used) = swap_of(host_swap, host.value("SwapFree"), cgroup.swap);
        // The host's overcommit ratio, of this machine's memory.
        let of_host = host.value("CommitLimit").saturating_sub(host_swap);
        let share = u128::from(of_host) * u128::from(total) / u128::from(host_total.max(1));
        let commit_limit = u64::try_from(share).unwrap_or(total).saturating_add(swap_total);
        let committed = (stat.anon.saturating_add(stat.shmem) / 1024).saturating_add(swap_used);
        Self { stat, total, free, available, cached, swap_total, swap_used, commit_limit, committed }
    }

    fn kb(&self, bytes: u64) -> u64 {
        (bytes / 1024).min(self.total)
    }
}

#[cfg(test)]
mod tests {
    use super::super::cgroup::MemoryStat;
    use super::*;
    use proptest::prelude::*;

    /// Linux 6.18, with swap, cut down to a line of each sort.
    const HOST: &str = "\
MemTotal:       24684096 kB
MemFree:        23330524 kB
MemAvailable:   24246020 kB
Buffers:           12888 kB
Cached:          1074016 kB
SwapCached:           17 kB
Active:           447316 kB
Inactive(anon):     5196 kB
Mlocked:           13152 kB
SwapTotal:       2097148 kB
SwapFree:        2000000 kB
AnonPages:         11996 kB
Shmem:              8788 kB
HardwareCorrupted:     4 kB
Slab:             161852 kB
SReclaimable:     128264 kB
KernelStack:        1360 kB
CommitLimit:    14439196 kB
Committed_AS:      56536 kB
VmallocTotal:   34359738367 kB
FutureSmall:         512 kB
FutureLarge:    24000000 kB
HugePages_Total:       0
Hugepagesize:       2048 kB
DirectMap1G:    25165824 kB
";

    const MB: u64 = 1 << 20;

    fn view(limit: Option<u64>, usage: u64, stat: MemoryStat, swap: Swap) -> MemoryView {
        let host = HostMemory::new(HOST.to_owned());
        MemoryView { host, cgroup: Some(CgroupMemory { limit, usage, stat, swap }) }
    }

    fn stat() -> MemoryStat {
        MemoryStat {
            cache: 60 * MB,
            anon: 30 * MB,
            shmem: MB,
            active_anon: 8 * MB,
            inactive_anon: 22 * MB,
            active_file: 40 * MB,
            inactive_file: 19 * MB,
            slab_reclaimable: 4 * MB,
            slab_unreclaimable: 2 * MB,
            kernel_stack: 64 * 1024,
            ..MemoryStat::default()
        }
    }

    #[test]
    fn a_limited_cgroup_sees_a_machine_of_its_size() {
        let swap = Swap::Accounted { limit: Some(128 * MB), used: 28 * MB };
        let expected = "\
MemTotal:         262144 kB
MemFree:          159744 kB
MemAvailable:     224256 kB
Buffers:               0 kB
Cached:            61440 kB
SwapCached:            0 kB
Active:            49152 kB
Inactive(anon):    22528 kB
Mlocked:               0 kB
SwapTotal:        131072 kB
SwapFree:         102400 kB
AnonPages:         30720 kB
Shmem:              1024 kB
HardwareCorrupted:     0 kB
Slab:               6144 kB
SReclaimable:       4096 kB
KernelStack:          64 kB
CommitLimit:      262144 kB
Committed_AS:      60416 kB
VmallocTotal:   34359738367 kB
FutureSmall:         512 kB
FutureLarge:      262144 kB
HugePages_Total:       0
Hugepagesize:       2048 kB
DirectMap1G:           0 kB
";
        assert_eq!(render(&view(Some(256 * MB), 100 * MB, stat(), swap)), expected);
    }

    #[test]
    fn the_host_is_shown_as_it_is() {
        let host = HostMemory::new(HOST.to_owned());
        assert_eq!(render(&MemoryView { host, cgroup: None }), HOST);
    }

    fn line<'a>(text: &'a str, name: &str) -> &'a str {
        text.lines().find(|line| line.starts_with(&format!("{name}:"))).unwrap()
    }

    #[test]
    fn borders() {
        let swap = Swap::Accounted { limit: None, used: 0 };
        for (limit, usage, name, expected) in [
            (None, 100 * MB, "MemTotal", "MemTotal:       24684096 kB"),
            (None, 100 * MB, "MemFree", "MemFree:        24581696 kB"),
            (Some(u64::MAX), 0, "MemTotal", "MemTotal:       24684096 kB"),
            (Some(256 * MB), 300 * MB, "MemFree", "MemFree:               0 kB"),
            (Some(256 * MB), 256 * MB, "MemAvailable", "MemAvailable:      64512 kB"),
            (Some(0), 0, "MemTotal", "MemTotal:              0 kB"),
            // More is reclaimable than used: the two were read at different times.
            (Some(256 * MB), 10 * MB, "MemAvailable", "MemAvailable:     262144 kB"),
            (Some(256 * MB), 10 * MB, "Cached", "Cached:             6144 kB"),
            (Some(256 * MB), 10 * MB, "SwapTotal", "SwapTotal:       2097148 kB"),
        ] {
            let text = render(&view(limit, usage, stat(), swap));
            assert_eq!(line(&text, name), expected, "{limit:?} {usage}");
        }
    }

    #[test]
    fn more_than_eight_digits_move_the_unit_as_the_kernel_does() {
        let host = HostMemory::new("MemTotal:       131889000 kB\nMemFree:        100 kB\n".to_owned());
        let cgroup =
            CgroupMemory { limit: None, usage: 0, stat: MemoryStat::default(), swap: Swap::Unaccounted };
        let text = render(&MemoryView { host, cgroup: Some(cgroup) });
        assert_eq!(text, "MemTotal:       131889000 kB\nMemFree:        131889000 kB\n");
    }

    #[test]
    fn swap_that_is_not_accounted_is_the_hosts() {
        let text = render(&view(Some(256 * MB), 0, stat(), Swap::Unaccounted));
        assert_eq!(line(&text, "SwapTotal"), "SwapTotal:       2097148 kB");
        assert_eq!(line(&text, "SwapFree"), "SwapFree:        2000000 kB");
    }

    #[test]
    fn unlimited_and_idle_has_the_format_of_the_kernels_own_file() {
        let real = std::fs::read_to_string("/proc/meminfo").unwrap();
        let cgroup =
            CgroupMemory { limit: None, usage: 0, stat: MemoryStat::default(), swap: Swap::Unaccounted };
        let text = render(&MemoryView { host: HostMemory::new(real.clone()), cgroup: Some(cgroup) });
        let shape = |text: &str| {
            text.lines().map(|l| l.replace(|c: char| c.is_ascii_digit(), " ")).collect::<Vec<_>>()
        };
        let labels = |text: &str| {
            shape(text).iter().map(|l| l.split(':').next().unwrap().to_owned()).collect::<Vec<_>>()
        };
        assert_eq!(labels(&text), labels(&real));
        // Column by column, for each line whose value does not overflow the kernel's field.
        for (ours, theirs) in text.lines().zip(real.lines()) {
            if value_of(theirs.split_once(':').unwrap().1).unwrap() < 100_000 {
                assert!(ours.len() == theirs.len() || ours.len() > 27, "{ours:?} {theirs:?}");
            }
        }
    }

    proptest! {
        #[test]
        fn whatever_the_cgroup_says_the_amounts_are_those_of_one_machine(
            limit in proptest::option::of(any::<u64>()),
            usage in any::<u64>(),
            numbers in proptest::collection::vec(any::<u64>(), 8),
            swap in proptest::option::of((proptest::option::of(any::<u64>()), any::<u64>())),
        ) {
            let stat = MemoryStat {
                cache: numbers[0], anon: numbers[1], shmem: numbers[2], active_file: numbers[3],
                inactive_file: numbers[4], slab_reclaimable: numbers[5], slab_unreclaimable: numbers[6],
                active_anon: numbers[7], ..MemoryStat::default()
            };
            let swap = swap.map_or(Swap::Unaccounted, |(limit, used)| Swap::Accounted { limit, used });
            let shown = HostMemory::new(render(&view(limit, usage, stat, swap)));
            let total = shown.value("MemTotal");
            prop_assert!(total <= 24_684_096);
            for name in ["MemFree", "MemAvailable", "Cached", "Active", "AnonPages", "Slab", "FutureLarge"] {
                prop_assert!(shown.value(name) <= total, "{name}");
            }
            prop_assert!(shown.value("MemFree") + shown.value("Cached") <= total);
            prop_assert!(shown.value("SwapFree") <= shown.value("SwapTotal"));
        }

        #[test]
        fn any_host_file_renders(text in "\\PC{0,200}") {
            let cgroup = CgroupMemory { limit: Some(5), usage: 3, stat: stat(), swap: Swap::Unaccounted };
            render(&MemoryView { host: HostMemory::new(text), cgroup: Some(cgroup) });
        }
    }
}
