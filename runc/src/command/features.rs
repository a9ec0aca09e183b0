//! `features`: what this runtime does, in the form of the OCI runtime specification 1.2 (features.md). Only what is done.

use std::io::Write;

use anyhow::Result;
use serde_json::{Value, json};

/// # Errors
/// Standard output being closed.
pub fn features() -> Result<()> {
    writeln!(std::io::stdout(), "{}", serde_json::to_string_pretty(&document())?)?;
    Ok(())
}

/// Those whose calls this machine can make. (libseccomp takes no others of another byte order into one filter.)
#[cfg(target_arch = "x86_64")]
const ARCHS: [&str; 3] = ["SCMP_ARCH_X32", "SCMP_ARCH_X86", "SCMP_ARCH_X86_64"];
#[cfg(target_arch = "aarch64")]
const ARCHS: [&str; 2] = ["SCMP_ARCH_AARCH64", "SCMP_ARCH_ARM"];

fn document() -> Value {
    let mut capabilities: Vec<String> = caps::all().iter().map(ToString::to_string).collect();
    capabilities.sort();
    json!({
        "ociVersionMin": "1.0.0",
        "ociVersionMax": "1.2.0",
        "hooks": ["prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop"],
        "mountOptions": [
            "bind", "dev", "exec", "idmap", "nodev", "noexec", "nosuid", "rbind", "ridmap", "rnodev", "rnoexec", "rnosuid",
            "ro", "rro", "rw", "suid",
        ],
        "linux": {
            "namespaces": ["cgroup", "ipc", "mount", "network", "pid", "time", "user", "uts"],
            "capabilities": capabilities,
            "cgroup": {"v1": true, "v2": true, "systemd": true, "systemdUser": false, "rdma": false},
            "seccomp": {
                "enabled": true,
                "actions": [
                    "SCMP_ACT_ALLOW", "SCMP_ACT_ERRNO", "SCMP_ACT_KILL", "SCMP_ACT_KILL_PROCESS", "SCMP_ACT_KILL_THREAD",
                    "SCMP_ACT_LOG", "SCMP_ACT_NOTIFY", "SCMP_ACT_TRACE", "SCMP_ACT_TRAP",
                ],
                "archs": ARCHS,
                "operators": [
                    "SCMP_CMP_EQ", "SCMP_CMP_GE", "SCMP_CMP_GT", "SCMP_CMP_LE", "SCMP_CMP_LT", "SCMP_CMP_MASKED_EQ",
                    "SCMP_CMP_NE",
                ],
                "knownFlags": ["SECCOMP_FILTER_FLAG_TSYNC", "SECCOMP_FILTER_FLAG_SPEC_ALLOW", "SECCOMP_FILTER_FLAG_LOG"],
                "supportedFlags": ["SECCOMP_FILTER_FLAG_TSYNC", "SECCOMP_FILTER_FLAG_SPEC_ALLOW", "SECCOMP_FILTER_FLAG_LOG"],
            },
            "apparmor": {"enabled": true},
            "selinux": {"enabled": false},
            "mountExtensions": {"idmap": {"enabled": true}},
        },
        "annotations": {},
        "potentiallyUnsafeConfigAnnotations": [],
    })
}
