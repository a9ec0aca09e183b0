//! Trying a part of the field inside a system container: a table of parts, a table of trials, and each result recorded
//! ([`crate::compat`]) and compared with what is expected of it. Refuses to know which parts and which trials there are.

use std::path::PathBuf;
use std::process::Command;

use crate::compat::{self, Outcome};
use crate::engine::{Container, Said, docker, docker_command, run_within, until};
use std::time::Duration;

/// Longer than any trial takes on a machine that does six other things.
const DEADLINE: Duration = Duration::from_secs(300);

/// What a shell script inside shows. It runs with `-eu`, after [`PRELUDE`].
#[derive(Debug, Clone, Copy)]
pub struct Trial {
    /// In the words of the page.
    pub what: &'static str,
    pub script: &'static str,
    /// Part of the message with which it is refused; empty for what works.
    pub refused: &'static str,
    /// It is the host's kernel that has it or not.
    pub is_up_to_kernel: bool,
}

/// A trial that has to work.
pub const fn works(what: &'static str, script: &'static str) -> Trial {
    Trial { what, script, refused: "", is_up_to_kernel: false }
}

/// A trial that has to be refused with this in the message.
pub const fn refused(what: &'static str, script: &'static str, message: &'static str) -> Trial {
    Trial { what, script, refused: message, is_up_to_kernel: false }
}

/// A trial that has to work if the host's kernel has what it takes, and else has to be refused with this in the message.
pub const fn up_to_kernel(what: &'static str, script: &'static str, message: &'static str) -> Trial {
    Trial { what, script, refused: message, is_up_to_kernel: true }
}

/// What every script can call.
pub const PRELUDE: &str = r#"set -eu
is() { [ "$1" = "$2" ] || { echo "expected [$2], found [$1]" | tr '\n' ' ' >&2; return 1; }; }
has() { case $1 in *"$2"*) ;; *) echo "expected [$2] in [$1]" | tr '\n' ' ' >&2; return 1 ;; esac; }
within() { n=$(($1 * 10)); shift; until "$@"; do n=$((n - 1)); [ $n -gt 0 ] || { echo "waited in vain for: $*" >&2; return 1; }; sleep 0.1; done; }
quiet() { "$@" >/dev/null 2>&1; }
"#;

/// A fault of somebody else's, which a user meets inside all the same.
#[derive(Debug, Clone, Copy)]
pub struct Known {
    /// [`Trial::what`].
    pub what: &'static str,
    /// Part of what is then said; another failure is not this one.
    pub symptom: &'static str,
    /// Whose it is and how one knows: the message on the page.
    pub reason: &'static str,
}

/// A program as published, made by tests/bed/parts.sh, and where the container has it. Copied there: runc looks for itself in the
/// directory that it is in, and does not see through a bind mount.
#[derive(Debug, Clone)]
pub struct Built {
    pub name: &'static str,
    pub version: &'static str,
    pub at: &'static str,
}

/// A part of the field, set up in one way.
#[derive(Debug, Clone, Default)]
pub struct Part {
    /// A heading of the page.
    pub section: &'static str,
    pub name: String,
    /// `bookworm` or `sid-engines`: a variant of `sysbox/debian` that tests/bed/image.sh makes.
    pub image: String,
    /// Options of the outer `docker run`.
    pub options: Vec<&'static str>,
    pub built: Vec<Built>,
    /// The container's first process, a script.
    pub init: String,
    /// Done once it succeeds; then the trials begin.
    pub ready: String,
    /// Prints the version.
    pub version: String,
    pub trials: Vec<&'static [Trial]>,
    /// What is known to fail here through no fault of ours. It must go on failing in this way, or its line has to go.
    pub known: &'static [Known],
    /// One of the few that are tried every time, not in `make test-matrix` alone.
    pub is_daily: bool,
}

impl Part {
    /// By default all that are daily; `SYSBOX_MATRIX=all` has all, and any other text the parts with it in their name.
    fn is_wanted(&self) -> bool {
        match std::env::var("SYSBOX_MATRIX").as_deref() {
            Err(_) | Ok("") => self.is_daily,
            Ok("all") => true,
            Ok(text) => format!("{}: {}", self.section, self.name).contains(text),
        }
    }

    /// Runs every trial, and says which came out otherwise than expected.
    fn faults(&self) -> Vec<String> {
        for known in self.known {
            let is_tried = self.trials.iter().copied().flatten().any(|trial| trial.what == known.what);
            assert!(is_tried, "{}: nothing tries `{}`, which is known to fail", self.name, known.what);
        }
        need_image(&self.image);
        let bind =
            |part: &Built| format!("{}:/parts/{}:ro", built(part.name, part.version).display(), part.name);
        let binds: Vec<String> = self.built.iter().map(bind).collect();
        let mut options = [&["--stop-signal", "KILL"], &self.options[..]].concat();
        options.extend(binds.iter().flat_map(|bind| ["-v", bind]));
        let image = format!("sysbox/debian:{}", self.image);
        let copy = |part: &Built| format!("cp /parts/{} {}; ", part.name, part.at);
        let init = self.built.iter().map(copy).chain([self.init.clone()]).collect::<String>();
        let container = Container::start(&options, &image, &["sh", "-c", &init]);
        until(&format!("{} to be ready", self.name), || {
            assert_eq!(
                container.inspect("{{.State.Running}}"),
                "true",
                "{:#?}",
                container.docker(&["logs", "--tail", "30"])
            );
            (container.try_sh(&self.ready).code == 0).then_some(())
        });
        let version = container.sh(&self.version).split_whitespace().collect::<Vec<_>>().join(" ");
        let mut faults = Vec::new();
        for trial in self.trials.iter().copied().flatten() {
            let script = format!("{PRELUDE}{}", trial.script);
            let mut command = docker_command(["exec", &container.name, "sh", "-c", &script]);
            let said = run_within(&mut command, DEADLINE);
            let (outcome, mut message) = judge(trial, &said);
            let known = self.known.iter().find(|known| known.what == trial.what);
            let is_fault = is_fault(trial, known, outcome, &said);
            if let Some(known) = known.filter(|_| !is_fault) {
                message = known.reason.to_owned();
            }
            compat::record(self.section, &self.name, &version, trial.what, outcome, &message);
            eprintln!("{}: {}: {outcome} {message}", self.name, trial.what);
            if is_fault {
                let by_now = if outcome == Outcome::Ok { " by now, and is known not to work" } else { "" };
                faults.push(format!(
                    "{}: {}: {outcome}{by_now}: {}{}",
                    self.name, trial.what, said.out, said.err
                ));
            }
        }
        faults
    }
}

/// Whether a trial came out otherwise than expected: what is known to fail has to, and as it is known to.
fn is_fault(trial: &Trial, known: Option<&Known>, outcome: Outcome, said: &Said) -> bool {
    if let Some(known) = known {
        return outcome != Outcome::Fails || !format!("{}{}", said.out, said.err).contains(known.symptom);
    }
    let expected = if trial.refused.is_empty() { Outcome::Ok } else { Outcome::Refused };
    outcome != expected && !(trial.is_up_to_kernel && outcome == Outcome::Ok)
}

/// What came of a trial, and the message that a user saw.
fn judge(trial: &Trial, said: &Said) -> (Outcome, String) {
    let lines = || said.err.lines().chain(said.out.lines()).filter(|line| !line.trim().is_empty());
    if said.code == 0 {
        return if trial.refused.is_empty() || trial.is_up_to_kernel {
            (Outcome::Ok, String::new())
        } else {
            (Outcome::Fails, "was not refused".to_owned())
        };
    }
    match lines().find(|line| !trial.refused.is_empty() && line.contains(trial.refused)) {
        Some(line) => (Outcome::Refused, line.trim().to_owned()),
        None => {
            // The end of it has the cause, and what is said of a failure is on stderr.
            let says = |line: &&str| {
                let beside = ["docker run --help", "level=warning", "expected ["];
                !line.trim().is_empty() && !beside.iter().any(|beside| line.contains(beside))
            };
            let end = |text: &str| text.lines().rfind(says).map(str::to_owned);
            let last = end(&said.err)
                .or_else(|| said.err.lines().last().map(str::to_owned))
                .or_else(|| end(&said.out));
            (Outcome::Fails, last.unwrap_or_else(|| format!("exit code {}", said.code)))
        }
    }
}

/// Runs the parts that this run is for, one after another, and fails with all that came out otherwise than expected.
#[track_caller]
pub fn try_all(parts: &[Part]) {
    assert!(
        parts.iter().any(|part| part.is_daily),
        "a run without SYSBOX_MATRIX would try nothing and look fine"
    );
    let mut faults = Vec::new();
    for part in parts.iter().filter(|part| part.is_wanted()) {
        // A part that cannot even start must not hide the others.
        match std::panic::catch_unwind(|| part.faults()) {
            Ok(found) => faults.extend(found),
            Err(why) => {
                let why = why.downcast_ref::<String>().cloned().unwrap_or_else(|| "it panicked".to_owned());
                compat::record(
                    part.section,
                    &part.name,
                    "",
                    "starts",
                    Outcome::Fails,
                    why.lines().find(|line| line.contains("err: ")).unwrap_or(&why).trim(),
                );
                faults.push(format!("{}: does not start: {why}", part.name));
            }
        }
    }
    assert!(
        faults.is_empty(),
        "{} trials came out otherwise than expected:\n{}",
        faults.len(),
        faults.join("\n")
    );
}

fn script(name: &str) -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/bed")).join(name)
}

/// Made, or loaded, if the bed's engine does not have it.
fn need_image(variant: &str) {
    if docker(["image", "inspect", &format!("sysbox/debian:{variant}")]).code != 0 {
        let mut command = Command::new(script("image.sh"));
        command.arg(variant).env("BED", &crate::engine::bed().name);
        run_within(&mut command, Duration::from_secs(1200)).ok();
    }
}

/// Where tests/bed/parts.sh keeps a program of the field on this host, built if it was not.
#[track_caller]
pub fn built(name: &str, version: &str) -> PathBuf {
    let said = run_within(Command::new(script("parts.sh")).args([name, version]), Duration::from_secs(1200));
    said.ok().into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_known_to_fail_has_to_fail_and_as_it_is_known_to() {
        let trial = works("build", "");
        let known = Known { what: "build", symptom: "found [old]", reason: "theirs" };
        let said =
            |code, err: &str| Said { code, err: err.to_owned(), command: String::new(), out: String::new() };
        let is_fault = |known, said: &Said| is_fault(&trial, known, judge(&trial, said).0, said);
        assert!(!is_fault(Some(&known), &said(1, "expected [new], found [old]")));
        assert!(is_fault(Some(&known), &said(1, "no space left")));
        assert!(is_fault(Some(&known), &said(0, "")));
        assert!(is_fault(None, &said(1, "expected [new], found [old]")));
        assert!(!is_fault(None, &said(0, "")));
    }
}
