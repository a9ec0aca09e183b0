//! Resource limits and the OOM score of a process that waits to be started. Set from outside: inside, in a user
//! namespace, nobody may raise a hard limit.

use oci_spec::runtime::{PosixRlimit, PosixRlimitType};
use sysbox_sys::rlimit::{self, Limits};

#[derive(Debug, thiserror::Error)]
pub enum LimitError {
    #[error("/process/rlimits: {0}")]
    Set(#[from] sysbox_sys::SysError),
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

/// Sets the score by which the kernel chooses whom to kill when memory runs out (proc(5)).
///
/// # Errors
/// The kernel refusing, as it does for a lower score without CAP_SYS_RESOURCE.
pub fn oom_score(pid: i32, score: i32) -> Result<(), LimitError> {
    std::fs::write(format!("/proc/{pid}/oom_score_adj"), score.to_string())
        .map_err(|source| LimitError::Oom { score, source })
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
