//! Many thousands of config.json with a fault in any of their fields: none may do more than be refused, in one line that
//! names the place. `SYSBOX_SEED` repeats a run, `SYSBOX_ROUNDS` makes it longer.

use super::judged::mutate::{self, Dice};
use super::judged::{base, judged, names_a_place};
use std::time::{Duration, Instant};

/// Fixed, so that a run that failed fails again.
const SEED: u64 = 4;
const ROUNDS: u64 = 3_000;
/// For one document, far above what any takes.
const LIMIT: Duration = Duration::from_secs(20);

fn number(name: &str, otherwise: u64) -> u64 {
    std::env::var(name).map_or(otherwise, |text| text.parse().expect(name))
}

#[test]
fn a_fault_in_any_field_is_refused_in_one_line_that_names_it() {
    let (seed, rounds) = (number("SYSBOX_SEED", SEED), number("SYSBOX_ROUNDS", ROUNDS));
    let (mut refused, mut planned) = (0, 0);
    for round in 0..rounds {
        let mut dice = Dice::new(seed.wrapping_mul(1_000_003).wrapping_add(round));
        let mut document = base();
        // One field that is refused hides what is wrong with the rest: a few at a time.
        for field in ["linux", "process"] {
            let names: Vec<String> = document[field].as_object().unwrap().keys().cloned().collect();
            for name in
                names.iter().filter(|name| !["namespaces", "args", "cwd", "user"].contains(&name.as_str()))
            {
                if dice.below(8) > 0 {
                    document[field].as_object_mut().unwrap().remove(name);
                }
            }
        }
        let changes: Vec<String> =
            (0..=dice.below(3)).map(|_| mutate::mutate(&mut document, &mut dice)).collect();
        let (text, begun) = (document.to_string(), Instant::now());
        let outcome = std::panic::catch_unwind(|| judged(text.as_bytes()));
        let told = format!("SYSBOX_SEED={seed}, round {round}, {changes:?}");
        assert!(begun.elapsed() < LIMIT, "{told}: took {:?}", begun.elapsed());
        match outcome.unwrap_or_else(|_| panic!("{told}: panicked")) {
            Err(error) => {
                let line: String = error.replace('\n', "; ");
                assert!(names_a_place(&line), "{told}: names no place: {line:.400}");
                refused += 1;
            }
            Ok(inside) => {
                assert!(inside, "{told}: leads out of the rootfs");
                planned += 1;
            }
        }
    }
    // Both sides of the border are visited.
    assert!(refused > rounds / 10 && planned > rounds / 20, "refused {refused}, planned {planned}");
}
