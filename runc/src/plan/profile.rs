//! The engine's seccomp profile, made fit for a machine: calls that it denies only because it does not list them are
//! allowed if they are in the set below; a rule that denies a call by name is kept (docs/SECURITY.md has the table).

use oci_spec::runtime::{LinuxSeccomp, LinuxSeccompAction, LinuxSyscallBuilder};

/// What root of a machine calls, all of it checked by the kernel against the container's user namespace.
pub const MACHINE_CALLS: &[&str] = &[
    // mounts and namespaces
    "mount",
    "umount",
    "umount2",
    "pivot_root",
    "chroot",
    "fsopen",
    "fsconfig",
    "fsmount",
    "fspick",
    "move_mount",
    "open_tree",
    "open_tree_attr",
    "mount_setattr",
    "statmount",
    "listmount",
    "listns",
    "setns",
    "unshare",
    "clone",
    "clone3",
    "sethostname",
    "setdomainname",
    "quotactl",
    "quotactl_fd",
    // keys, tracing and other processes: within the container's own namespaces
    "add_key",
    "request_key",
    "keyctl",
    "ptrace",
    "personality",
    "process_vm_readv",
    "process_vm_writev",
    "process_madvise",
    "process_mrelease",
    "kcmp",
    "pidfd_open",
    "pidfd_getfd",
    "pidfd_send_signal",
    "name_to_handle_at",
    "fanotify_init",
    "fanotify_mark",
    "bpf",
    "syslog",
    "reboot",
    "vhangup",
    "landlock_create_ruleset",
    "landlock_add_rule",
    "landlock_restrict_self",
    "seccomp",
    // memory placement, as the engine allows with CAP_SYS_NICE
    "get_mempolicy",
    "mbind",
    "set_mempolicy",
    "set_mempolicy_home_node",
    "migrate_pages",
    "move_pages",
    // newer forms of calls that every profile allows
    "close_range",
    "openat2",
    "faccessat2",
    "fchmodat2",
    "epoll_pwait2",
    "rseq",
    "futex_waitv",
    "futex_wait",
    "futex_wake",
    "futex_requeue",
    "cachestat",
    "mseal",
    "memfd_secret",
    "setxattrat",
    "getxattrat",
    "listxattrat",
    "removexattrat",
    "file_getattr",
    "file_setattr",
    "lsm_get_self_attr",
    "lsm_set_self_attr",
    "lsm_list_modules",
    "map_shadow_stack",
];

/// Widens a profile; one without a denying default has nothing to widen.
pub(super) fn widen(profile: Option<LinuxSeccomp>) -> Option<LinuxSeccomp> {
    let mut profile = profile?;
    if profile.default_action() == LinuxSeccompAction::ScmpActAllow {
        return Some(profile);
    }
    let mut rules = profile.syscalls().clone().unwrap_or_default();
    let denied_by_name = |name: &&&str| {
        rules.iter().any(|rule| {
            rule.action() != LinuxSeccompAction::ScmpActAllow
                && rule.names().iter().any(|listed| listed == **name)
        })
    };
    let added: Vec<String> =
        MACHINE_CALLS.iter().filter(|name| !denied_by_name(name)).map(|name| (*name).to_owned()).collect();
    // A conditional permission says no more once the call is allowed without condition.
    for rule in &mut rules {
        if rule.action() == LinuxSeccompAction::ScmpActAllow {
            let kept = rule.names().iter().filter(|name| !added.contains(name)).cloned().collect();
            rule.set_names(kept);
        }
    }
    rules.retain(|rule| !rule.names().is_empty());
    let allow = LinuxSyscallBuilder::default().names(added).action(LinuxSeccompAction::ScmpActAllow).build();
    rules.push(allow.expect("names and action are all that a rule needs"));
    profile.set_syscalls(Some(rules));
    Some(profile)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn widened(rules: serde_json::Value) -> Vec<(Vec<String>, LinuxSeccompAction)> {
        let profile = json!({"defaultAction": "SCMP_ACT_ERRNO", "syscalls": rules});
        let profile = widen(Some(serde_json::from_value(profile).unwrap())).unwrap();
        profile.syscalls().iter().flatten().map(|rule| (rule.names().clone(), rule.action())).collect()
    }

    #[test]
    fn what_is_only_not_listed_is_allowed() {
        let rules = widened(json!([{"names": ["read"], "action": "SCMP_ACT_ALLOW"}]));
        assert_eq!(rules[0], (vec!["read".to_owned()], LinuxSeccompAction::ScmpActAllow));
        assert_eq!(rules[1].0.len(), MACHINE_CALLS.len());
    }

    #[test]
    fn a_condition_on_a_machine_call_falls_away() {
        let args = json!([{"index": 0, "value": 1, "op": "SCMP_CMP_EQ"}]);
        let rules = widened(json!([{"names": ["clone"], "action": "SCMP_ACT_ALLOW", "args": args}]));
        assert_eq!(rules.len(), 1);
        assert!(rules[0].0.contains(&"clone".to_owned()));
    }

    #[test]
    fn a_call_denied_by_name_stays_denied() {
        let rules = widened(json!([{"names": ["clone3"], "action": "SCMP_ACT_ERRNO", "errnoRet": 38}]));
        assert_eq!(rules[0].1, LinuxSeccompAction::ScmpActErrno);
        assert!(!rules[1].0.contains(&"clone3".to_owned()));
    }

    #[test]
    fn an_allowing_profile_is_left_alone() {
        let profile = json!({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": ["mount"], "action": "SCMP_ACT_ERRNO"}]});
        let profile: LinuxSeccomp = serde_json::from_value(profile).unwrap();
        assert_eq!(widen(Some(profile.clone())), Some(profile));
    }
}
