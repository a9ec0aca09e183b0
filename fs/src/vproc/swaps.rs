//! /proc/swaps of a cgroup: as LXCFS, one line that stands for all swap the reader's machine has, or none.

use super::meminfo;
use super::view::MemoryView;

pub fn render(view: &MemoryView) -> String {
    // mm/swapfile.c, Linux 5.13.
    let mut text = "Filename\t\t\t\tType\t\tSize\t\tUsed\t\tPriority\n".to_owned();
    let (total, used) = meminfo::swap(view);
    if total > 0 {
        text.push_str(&format!("{:<40}virtual\t\t{}{}0\n", "none", column(total), column(used)));
    }
    text
}

/// An amount and what the kernel puts behind it, so that amounts below 10 GB line up.
fn column(kb: u64) -> String {
    format!("{kb}\t{}", if kb < 10_000_000 { "\t" } else { "" })
}

#[cfg(test)]
mod tests {
    use super::super::cgroup::MemoryStat;
    use super::super::view::{CgroupMemory, HostMemory, Swap};
    use super::*;

    fn check(host_kb: u64, swap: Option<Swap>, expected: &str) {
        let host = HostMemory::new(format!("MemTotal: 9 kB\nSwapTotal: {host_kb} kB\nSwapFree: 40 kB\n"));
        let cgroup =
            swap.map(|swap| CgroupMemory { limit: None, usage: 0, stat: MemoryStat::default(), swap });
        let text = render(&MemoryView { host, cgroup });
        let (header, lines) = text.split_once('\n').unwrap();
        assert_eq!(header, "Filename\t\t\t\tType\t\tSize\t\tUsed\t\tPriority");
        assert_eq!(lines, expected);
    }

    #[test]
    fn one_line_if_there_is_swap() {
        let none = "none                                    virtual\t\t";
        let of = |limit, used| Some(Swap::Accounted { limit, used });
        check(0, None, "");
        check(0, of(Some(1 << 20), 0), "");
        check(100, of(Some(0), 0), "");
        check(100, None, &format!("{none}100\t\t60\t\t0\n"));
        check(100, Some(Swap::Unaccounted), &format!("{none}100\t\t60\t\t0\n"));
        check(100, of(Some(50 << 10), 7 << 10), &format!("{none}50\t\t7\t\t0\n"));
        check(100, of(Some(u64::MAX), u64::MAX), &format!("{none}100\t\t100\t\t0\n"));
        check(10_000_000, of(None, 0), &format!("{none}10000000\t0\t\t0\n"));
    }

    #[test]
    fn the_header_is_the_kernels() {
        let real = std::fs::read_to_string("/proc/swaps").unwrap();
        let ours = render(&MemoryView { host: HostMemory::new(String::new()), cgroup: None });
        assert_eq!(real.lines().next(), ours.lines().next());
    }
}
