//! The switch of the OOM killer that version 1 of cgroups has (memory.oom_control).

use std::path::Path;

use oci_spec::runtime::{LinuxMemory, LinuxResources};

/// The file of version 1 that has the switch, among other lines.
pub const CONTROL: &str = "memory.oom_control";

/// What [`CONTROL`] says of the switch, as it is written: `1` if the killer is off.
pub fn switch(control: &str) -> &'static str {
    if control.contains("oom_kill_disable 1") { "1" } else { "0" }
}

pub fn is_to_be_off(resources: &LinuxResources) -> bool {
    resources.memory().as_ref().and_then(LinuxMemory::disable_oom_killer).unwrap_or(false)
}

/// An update that says nothing of it is to leave it as it is in `cgroup`; libcgroups would turn the killer on.
pub fn keep(resources: &mut LinuxResources, cgroup: &Path) {
    let Some(mut memory) = resources.memory().filter(|m| m.disable_oom_killer().is_none()) else {
        return;
    };
    let control = std::fs::read_to_string(cgroup.join(CONTROL)).unwrap_or_default();
    memory.set_disable_oom_killer(Some(switch(&control) == "1"));
    resources.set_memory(Some(memory));
}
