//! No swap at all, on version 2: memory and swap together are as much as memory alone.

use std::path::Path;

use oci_spec::runtime::LinuxResources;

/// The same limits with `memory.swap.max` said by name, where it is to be 0: libcgroups takes a 0 that it has computed for
/// nothing said. As runc, not where the cgroup has no such file: without swap in the kernel there is none to forbid.
pub(super) fn by_name(resources: &LinuxResources, cgroup: &Path) -> Option<LinuxResources> {
    const FILE: &str = "memory.swap.max";
    if !cgroup.join(FILE).exists() {
        return None;
    }
    let memory = resources.memory().as_ref()?;
    if memory.limit().is_none_or(|limit| limit <= 0) || memory.limit() != memory.swap() {
        return None;
    }
    let mut unified = resources.unified().clone().unwrap_or_default();
    // What the spec says by name counts.
    unified.entry(FILE.to_owned()).or_insert_with(|| "0".to_owned());
    let mut told = resources.clone();
    told.set_unified(Some(unified));
    Some(told)
}

#[cfg(test)]
mod tests {
    use super::*;
    use oci_spec::runtime::LinuxMemoryBuilder;

    #[test]
    fn as_much_with_swap_as_without_is_no_swap() {
        let cgroup = tempfile::tempdir().unwrap();
        std::fs::write(cgroup.path().join("memory.swap.max"), "max").unwrap();
        let said = |limit: i64, swap: i64| {
            let memory = LinuxMemoryBuilder::default().limit(limit).swap(swap).build().unwrap();
            let mut resources = LinuxResources::default();
            resources.set_memory(Some(memory));
            by_name(&resources, cgroup.path())
                .and_then(|told| told.unified().as_ref()?.get("memory.swap.max").cloned())
        };
        assert_eq!(said(1 << 20, 1 << 20).as_deref(), Some("0"));
        assert_eq!(said(1 << 20, 1 << 21), None);
        assert_eq!(said(1 << 20, -1), None);
        assert_eq!(said(-1, -1), None);
    }
}
