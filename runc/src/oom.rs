//! The switch of the OOM killer that version 1 of cgroups has (memory.oom_control).

use std::path::Path;

use oci_spec::runtime::{LinuxMemory, LinuxResources};

pub fn is_to_be_off(resources: &LinuxResources) -> bool {
    resources.memory().as_ref().and_then(LinuxMemory::disable_oom_killer).unwrap_or(false)
}

/// An update that says nothing of it is to leave it as it is in `cgroup`; libcgroups would turn the killer on.
pub fn keep(resources: &mut LinuxResources, cgroup: &Path) {
    let Some(mut memory) = resources.memory().filter(|m| m.disable_oom_killer().is_none()) else {
        return;
    };
    let control = std::fs::read_to_string(cgroup.join("memory.oom_control")).unwrap_or_default();
    memory.set_disable_oom_killer(Some(control.contains("oom_kill_disable 1")));
    resources.set_memory(Some(memory));
}
