//! How the kernel schedules another process: sched_setattr(2), ioprio_set(2).

use nix::errno::Errno;

use crate::error::{Named, Result};

/// As `struct sched_attr` has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Policy {
    /// `SCHED_OTHER` …
    pub policy: u32,
    pub flags: u64,
    pub nice: i32,
    pub priority: u32,
    /// Of the deadline policy, in nanoseconds.
    pub runtime: u64,
    pub deadline: u64,
    pub period: u64,
}

/// Sets the policy of a process (sched_setattr(2), Linux 3.14).
///
/// # Errors
/// `EPERM` without CAP_SYS_NICE in the initial user namespace; `EINVAL`: values that do not go with the policy.
pub fn set_policy(pid: i32, policy: Policy) -> Result<()> {
    let attr = libc::sched_attr {
        size: size_of::<libc::sched_attr>() as u32,
        sched_policy: policy.policy,
        sched_flags: policy.flags,
        sched_nice: policy.nice,
        sched_priority: policy.priority,
        sched_runtime: policy.runtime,
        sched_deadline: policy.deadline,
        sched_period: policy.period,
    };
    // SAFETY: `attr` lives through the call and says its own size, as the kernel asks.
    let done = unsafe { libc::syscall(libc::SYS_sched_setattr, pid, &raw const attr, 0) };
    Errno::result(done).map(drop).named(|| format!("sched_setattr({pid}, {policy:?})"))
}

/// Sets the class (1 real time, 2 best effort, 3 idle) and level of a process's block I/O (ioprio_set(2), Linux 2.6.13).
///
/// # Errors
/// `EPERM` for the real time class without CAP_SYS_ADMIN; `EINVAL`: no such class or level.
pub fn set_io_priority(pid: i32, class: u32, level: u32) -> Result<()> {
    const WHO_PROCESS: i32 = 1;
    let priority = (class << 13) | (level & 0x1fff);
    // SAFETY: three integers.
    let done = unsafe { libc::syscall(libc::SYS_ioprio_set, WHO_PROCESS, pid, priority) };
    Errno::result(done).map(drop).named(|| format!("ioprio_set({pid}, {class}, {level})"))
}
