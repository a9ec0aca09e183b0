//! Limits, as far as the host's version of cgroups has them: what it has not is refused, or told where runc goes on too.

use oci_spec::runtime::LinuxResources;

use super::PlanError;

pub(super) fn fit(
    mut resources: LinuxResources,
    unified: bool,
    warnings: &mut Vec<String>,
) -> Result<LinuxResources, PlanError> {
    let refuse = |member: &'static str, why: &'static str| Err(PlanError::Resource { member, why });
    let weights = resources.block_io().as_ref().and_then(|block| block.weight_device().as_ref());
    let some_weights = weights.is_some_and(|all| !all.is_empty());
    if !unified && resources.unified().as_ref().is_some_and(|all| !all.is_empty()) {
        return refuse("unified", "this host has cgroups of version 1");
    }
    if !unified && some_weights {
        return refuse(
            "blockIO/weightDevice",
            "this host has cgroups of version 1; hint: limit by throttle*Device",
        );
    }
    let network = resources.network().as_ref();
    let classes = network
        .is_some_and(|n| n.class_id().is_some() || n.priorities().as_ref().is_some_and(|p| !p.is_empty()));
    if unified && classes {
        return refuse("network", "cgroups of version 2 have no network classes");
    }
    if let Some(mut memory) = *resources.memory() {
        // Obsolete: runc takes no notice either.
        memory.set_kernel(None).set_kernel_tcp(None);
        let mut ignore = |asked: bool, name: &str| {
            if unified && asked {
                warnings
                    .push(format!("/linux/resources/memory/{name}: cgroups of version 2 have no such thing"));
            }
        };
        ignore(memory.disable_oom_killer().unwrap_or(false), "disableOOMKiller");
        ignore(memory.swappiness().is_some(), "swappiness");
        resources.set_memory(Some(memory));
    }
    Ok(resources)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn check(resources: serde_json::Value, unified: bool, expected: &str) {
        let mut warnings = Vec::new();
        let said = match fit(serde_json::from_value(resources.clone()).unwrap(), unified, &mut warnings) {
            Ok(fitted) => {
                assert!(fitted.memory().as_ref().is_none_or(|memory| memory.kernel().is_none()));
                warnings.join("")
            }
            Err(error) => error.to_string(),
        };
        assert_eq!(said, expected, "{resources}");
    }

    #[test]
    fn each_version_has_its_own_limits() {
        let limits = json!({"memory": {"limit": 1, "kernel": 1, "kernelTCP": 1}, "pids": {"limit": 3}});
        check(limits.clone(), false, "");
        check(limits, true, "");
        let unified = json!({"unified": {"memory.high": "1"}});
        check(unified.clone(), true, "");
        check(unified, false, "/linux/resources/unified: this host has cgroups of version 1");
        check(json!({"unified": {}, "network": {}, "blockIO": {"weightDevice": []}}), false, "");
        check(
            json!({"network": {"classID": 1}}),
            true,
            "/linux/resources/network: cgroups of version 2 have no network classes",
        );
        check(
            json!({"blockIO": {"weightDevice": [{"major": 8, "minor": 0, "weight": 10}]}}),
            false,
            "/linux/resources/blockIO/weightDevice: this host has cgroups of version 1; hint: limit by throttle*Device",
        );
        check(
            json!({"memory": {"disableOOMKiller": true}}),
            true,
            "/linux/resources/memory/disableOOMKiller: cgroups of version 2 have no such thing",
        );
    }
}
