//! Bundles with a fault in any of their fields, given to `sysbox-runc create`: what is refused leaves nothing behind, what is
//! taken can be deleted. `SYSBOX_SEED` repeats a run, `SYSBOX_ROUNDS` makes it longer. (Many thousands more, without a kernel,
//! are in runc/src/plan/hostile.rs.)

#![allow(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

use std::fs;
use std::path::Path;
use std::time::Duration;

use serde_json::{Map, Value, json};
use sysbox_tests::mutate::{Dice, every_field, merge, mutate};
use sysbox_tests::runtime::{Bundle, Machine, cgroups, eventually};

const SEED: u64 = 4;
const ROUNDS: u64 = 150;
/// Far above what any machine needs.
const LONG: Duration = Duration::from_secs(100);

fn number(name: &str, otherwise: u64) -> u64 {
    std::env::var(name).map_or(otherwise, |text| text.parse().expect(name))
}

fn config(bundle: &Bundle) -> Value {
    serde_json::from_slice(&fs::read(bundle.dir.join("config.json")).unwrap()).unwrap()
}

/// One or two of the fields that a bundle made by hand has not.
fn some_fields(all: &Map<String, Value>, dice: &mut Dice) -> Value {
    let mut some = json!({});
    for _ in 0..2 {
        let names: Vec<&String> = all.keys().collect();
        let name = names[dice.below(names.len())];
        let within: Vec<&String> = all[name].as_object().map(|map| map.keys().collect()).unwrap_or_default();
        some[name] = match within.get(dice.below(within.len())) {
            Some(field) => json!({ field.as_str(): all[name][field.as_str()] }),
            None => all[name].clone(),
        };
    }
    some
}

/// A rootfs elsewhere on this machine is not a test's to make mount points in; nor is a device or an interface.
fn is_ours(config: &Value, machine: &Machine) -> bool {
    let root = config.pointer("/root/path").and_then(Value::as_str).unwrap_or_default();
    !Path::new(root).is_absolute()
        || Path::new(root).starts_with(machine.path(""))
        || fs::canonicalize(root).is_ok_and(|path| path == Path::new("/"))
        || !Path::new(root).exists()
}

#[test]
fn a_fault_in_any_field_leaves_nothing_behind() {
    let machine = Machine::start();
    let (seed, rounds) = (number("SYSBOX_SEED", SEED), number("SYSBOX_ROUNDS", ROUNDS));
    let all = every_field();
    let (mut refused, mut taken) = (0, 0);
    for round in 0..rounds {
        let mut dice = Dice::new(seed.wrapping_mul(1_000_003).wrapping_add(round));
        let id = format!("c{round}");
        let bundle = machine.bundle(&id, &["/bin/true"]);
        let mut document = config(&bundle);
        merge(&mut document, &some_fields(&all, &mut dice));
        let change = mutate(&mut document, &mut dice);
        if !is_ours(&document, &machine) {
            continue;
        }
        let told = format!("SYSBOX_SEED={seed}, round {round}: {change}");
        fs::write(bundle.dir.join("config.json"), document.to_string()).unwrap();
        let (rootfs, mounts) = (bundle.inventory(), own_mounts(&machine));
        let dir = bundle.dir.display().to_string();
        let said = machine.later(&["create", "--bundle", &dir, &id]).within(LONG);
        let said = said.unwrap_or_else(|| panic!("{told}: it hangs"));
        match said.code {
            0 => {
                taken += 1;
                machine.runc(&["delete", "--force", &id]).ok();
            }
            1 => {
                refused += 1;
                let lines: Vec<&str> =
                    said.err.lines().filter(|line| !line.contains("level=warning")).collect();
                assert_eq!(lines.len(), 1, "{told}: {said:?}");
                assert!(!lines[0].contains("panicked"), "{told}: {said:?}");
                // The working directory is made inside before the program is looked for.
                let cwd = document.pointer("/process/cwd").and_then(Value::as_str).unwrap_or("/") == "/";
                let after = bundle.inventory();
                assert!(!cwd || after == rootfs, "{told}: {said:?}: {:?}", changed(&rootfs, &after));
            }
            code => panic!("{told}: exit code {code}: {said:?}"),
        }
        eventually(&format!("{told}: left: {:?}", machine.remains(&id)), || machine.remains(&id).is_empty());
        let path = document.pointer("/linux/cgroupsPath").and_then(Value::as_str).unwrap_or_default();
        if path.contains("mutated") {
            assert_eq!(cgroups(path.trim_start_matches('/')), Vec::<String>::new(), "{told}");
        }
        assert_eq!(own_mounts(&machine), mounts, "{told}");
        fs::remove_dir_all(&bundle.dir).unwrap();
    }
    assert!(refused > rounds / 10 && taken > rounds / 10, "refused {refused}, taken {taken}");
    let bundle = machine.bundle("last", &["/bin/echo", "well"]);
    assert_eq!(machine.run(&bundle, "last").ok(), "well\n", "the daemons are as they were");
}

fn changed(before: &[String], after: &[String]) -> Vec<String> {
    after.iter().filter(|line| !before.contains(line)).cloned().collect()
}

fn own_mounts(machine: &Machine) -> usize {
    let own = machine.path("").display().to_string();
    fs::read_to_string("/proc/self/mountinfo").unwrap().lines().filter(|line| line.contains(&own)).count()
}
