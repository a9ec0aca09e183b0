//! Resource limits and the OOM score of a process that waits to be started. Set from outside: inside, in a user
//! namespace, nobody may raise a hard limit.

use oci_spec::runtime::{
    IOPriorityClass, LinuxSchedulerFlag, LinuxSchedulerPolicy, PosixRlimit, PosixRlimitType, Process,
    Scheduler,
};
use sysbox_sys::rlimit::{self, Limits};
use sysbox_sys::schedule::{self, Policy};

#[derive(Debug, thiserror::Error)]
pub enum LimitError {
    #[error("/process/rlimits: {0}")]
    Set(#[from] sysbox_sys::SysError),
    #[error("/process/scheduler: {0}")]
    Scheduler(sysbox_sys::SysError),
    #[error("/process/ioPriority: {0}")]
    IoPriority(sysbox_sys::SysError),
    #[error("/process/oomScoreAdj: write {score}: {source}")]
    Oom { score: i32, source: std::io::Error },
}

/// Hard limits that machines expect to be able to use, where the spec says nothing: an inner engine sets higher limits
/// for its containers than it has itself. Soft limits stay, as programs loop over all descriptors up to theirs.
const RAISED: &[(i32, u64)] = &[
    (libc::RLIMIT_NOFILE as i32, 1_048_576),
    (libc::RLIMIT_NPROC as i32, u64::MAX),
    (libc::RLIMIT_CORE as i32, u64::MAX),
    (libc::RLIMIT_MEMLOCK as i32, u64::MAX),
    (libc::RLIMIT_SIGPENDING as i32, u64::MAX),
    (libc::RLIMIT_MSGQUEUE as i32, u64::MAX),
];

/// Applies the spec's limits to `pid`, and raises the other hard limits where the host lets us.
///
/// # Errors
/// A limit of the spec that the kernel refuses.
pub fn apply(pid: i32, asked: &[PosixRlimit], raise: Raise) -> Result<(), LimitError> {
    for limit in asked {
        rlimit::set(pid, number(limit.typ()), Limits { soft: limit.soft(), hard: limit.hard() })?;
    }
    if raise == Raise::No {
        return Ok(());
    }
    let free =
        RAISED.iter().filter(|(resource, _)| !asked.iter().any(|limit| number(limit.typ()) == *resource));
    for (resource, hard) in free {
        let now = rlimit::get(pid, *resource)?;
        if now.hard < *hard {
            rlimit::set(pid, *resource, Limits { soft: now.soft, hard: *hard })?;
        }
    }
    Ok(())
}

/// Whether this host lets us raise hard limits (`HostFacts::raise_rlimits`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Raise {
    Yes,
    No,
}

/// −1000 would keep the kernel from ever ending a container that eats the host's memory.
pub fn within_reach(score: i32) -> i32 {
    score.max(-999)
}

/// Sets the score by which the kernel chooses whom to kill when memory runs out (proc(5)).
///
/// # Errors
/// The kernel refusing, as it does for a lower score without CAP_SYS_RESOURCE.
pub fn oom_score(pid: i32, score: i32) -> Result<(), LimitError> {
    std::fs::write(format!("/proc/{pid}/oom_score_adj"), score.to_string())
        .map_err(|source| LimitError::Oom { score, source })
}

/// How the process is scheduled. From outside, as a real time policy takes rights over the host.
///
/// # Errors
/// What the kernel refuses.
pub fn schedule(pid: i32, process: &Process) -> Result<(), LimitError> {
    if let Some(asked) = process.scheduler() {
        schedule::set_policy(pid, policy(asked)).map_err(LimitError::Scheduler)?;
    }
    if let Some(asked) = process.io_priority() {
        let class = match asked.class() {
            IOPriorityClass::IoprioClassRt => 1,
            IOPriorityClass::IoprioClassBe => 2,
            IOPriorityClass::IoprioClassIdle => 3,
        };
        // Out of range either way is for the kernel to say.
        let level = u32::try_from(asked.priority()).unwrap_or(u32::MAX);
        schedule::set_io_priority(pid, class, level).map_err(LimitError::IoPriority)?;
    }
    Ok(())
}

fn policy(asked: &Scheduler) -> Policy {
    let flag = |flag: &LinuxSchedulerFlag| match flag {
        LinuxSchedulerFlag::SchedResetOnFork => 0x01,
        LinuxSchedulerFlag::SchedFlagReclaim => 0x02,
        LinuxSchedulerFlag::SchedFlagDLOverrun => 0x04,
        LinuxSchedulerFlag::SchedFlagKeepPolicy => 0x08,
        LinuxSchedulerFlag::SchedFlagKeepParams => 0x10,
        LinuxSchedulerFlag::SchedFlagUtilClampMin => 0x20,
        LinuxSchedulerFlag::SchedFlagUtilClampMax => 0x40,
    };
    Policy {
        // As the kernel's <linux/sched.h> numbers them.
        policy: match asked.policy() {
            LinuxSchedulerPolicy::SchedOther => 0,
            LinuxSchedulerPolicy::SchedFifo => 1,
            LinuxSchedulerPolicy::SchedRr => 2,
            LinuxSchedulerPolicy::SchedBatch => 3,
            LinuxSchedulerPolicy::SchedIso => 4,
            LinuxSchedulerPolicy::SchedIdle => 5,
            LinuxSchedulerPolicy::SchedDeadline => 6,
        },
        flags: asked.flags().iter().flatten().map(flag).fold(0, |all, one| all | one),
        nice: asked.nice().unwrap_or(0),
        priority: asked.priority().and_then(|priority| u32::try_from(priority).ok()).unwrap_or(0),
        runtime: asked.runtime().unwrap_or(0),
        deadline: asked.deadline().unwrap_or(0),
        period: asked.period().unwrap_or(0),
    }
}

fn number(typ: PosixRlimitType) -> i32 {
    let resource = match typ {
        PosixRlimitType::RlimitCpu => libc::RLIMIT_CPU,
        PosixRlimitType::RlimitFsize => libc::RLIMIT_FSIZE,
        PosixRlimitType::RlimitData => libc::RLIMIT_DATA,
        PosixRlimitType::RlimitStack => libc::RLIMIT_STACK,
        PosixRlimitType::RlimitCore => libc::RLIMIT_CORE,
        PosixRlimitType::RlimitRss => libc::RLIMIT_RSS,
        PosixRlimitType::RlimitNproc => libc::RLIMIT_NPROC,
        PosixRlimitType::RlimitNofile => libc::RLIMIT_NOFILE,
        PosixRlimitType::RlimitMemlock => libc::RLIMIT_MEMLOCK,
        PosixRlimitType::RlimitAs => libc::RLIMIT_AS,
        PosixRlimitType::RlimitLocks => libc::RLIMIT_LOCKS,
        PosixRlimitType::RlimitSigpending => libc::RLIMIT_SIGPENDING,
        PosixRlimitType::RlimitMsgqueue => libc::RLIMIT_MSGQUEUE,
        PosixRlimitType::RlimitNice => libc::RLIMIT_NICE,
        PosixRlimitType::RlimitRtprio => libc::RLIMIT_RTPRIO,
        PosixRlimitType::RlimitRttime => libc::RLIMIT_RTTIME,
    };
    resource as i32
}
