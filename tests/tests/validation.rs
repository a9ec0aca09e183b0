//! The programs of the OCI's runtime-tools, which try a runtime against the specification: each is given runc and
//! sysbox-runc in the same run, and ours may fail nothing that runc passes, but what stands here with its reason.
//! runc itself fails some: their expectations are old, or want cgroup controllers that a host may lack.

#![allow(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use sysbox_tests::beside::{RUNC, part};
use sysbox_tests::runtime::{Machine, programs};

const TOOLS: &str = "0.9.1-0.20251205004911-5e639034dcdc";

/// What a system container is meant to do otherwise: program, a word of the check, reason.
const EXCEPTIONS: &[(&str, &str, &str)] = &[
    (
        "process_capabilities_fail",
        "",
        "a capability that is none is refused by name; runc warns, and goes on",
    ),
    ("linux_ns_itype", "cannot run validation tests", "the host's namespaces are refused by name"),
    (
        "linux_ns_path",
        "namespace by path",
        "namespaces of a process of the host: refused, or not the container's to mount",
    ),
    (
        "linux_rootfs_propagation",
        "root propagation: slave",
        "an engine asks it for every container, and the root of a machine is shared inside (DIFFERENCES)",
    ),
];

/// Without `VALIDATION=all` (some three minutes): those that need nothing of the host, and differ from one another.
const FEW: &[&str] = &[
    "config_updates_without_affect",
    "create",
    "default",
    "hooks_stdin",
    "kill",
    "killsig",
    "linux_cgroups_memory",
    "linux_masked_paths",
    "poststart_fail",
    "poststop",
    "prestart_fail",
    "process_capabilities_fail",
    "start",
    "state",
];

/// What a program found: the checks that failed, and how many passed.
#[derive(Debug)]
struct Verdict {
    failed: BTreeSet<String>,
    passed: usize,
    code: i32,
    text: String,
}

/// In a mount namespace of its own: one of them has runc do its mounts without one, and they would stay on this machine.
fn try_one(tools: &Path, program: &Path, runtime: &Path, scratch: &Path) -> Verdict {
    let out = scratch.join("out");
    let file = fs::File::create(&out).unwrap();
    let status = Command::new("/usr/bin/unshare")
        .args(["--mount", "--propagation", "private", "/usr/bin/timeout", "-k", "5", "60"])
        .arg(program)
        .current_dir(tools)
        .env("RUNTIME", runtime)
        .env("TMPDIR", scratch)
        .stdin(Stdio::null())
        .stdout(file.try_clone().unwrap())
        .stderr(file)
        .status()
        .unwrap();
    let text = fs::read_to_string(&out).unwrap_or_default();
    let check = |line: &str| {
        let line = line.trim();
        let rest = line.strip_prefix("not ok ")?;
        (!rest.contains("# SKIP") && !rest.contains("# TODO"))
            .then(|| rest.split_once(" - ").map_or(rest, |(_, name)| name).to_owned())
    };
    Verdict {
        failed: text.lines().filter_map(check).collect(),
        passed: text.lines().filter(|line| line.trim().starts_with("ok ")).count(),
        code: status.code().unwrap_or(-1),
        text,
    }
}

/// A runtime as the programs call one: no flags before the command.
fn wrapper(path: PathBuf, line: &str) -> PathBuf {
    fs::write(&path, format!("#!/bin/sh\nexec {line} \"$@\"\n")).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    path
}

#[test]
fn no_program_finds_more_wrong_than_with_runc() {
    let tools = part("validation", TOOLS);
    let runc = part("runc", RUNC);
    // Capabilities as the spec has them: a machine's root has all, which every program here would tell again.
    let machine = Machine::start_with(&["--honor-caps"]);
    let path = |name: &str| machine.path(name);
    for dir in ["scratch-a", "scratch-b"] {
        fs::create_dir(path(dir)).unwrap();
        fs::set_permissions(path(dir), fs::Permissions::from_mode(0o700)).unwrap();
    }
    let ours = wrapper(
        path("ours"),
        &format!(
            "{} --root {} --run-dir {}",
            programs().join("sysbox-runc").display(),
            path("root").display(),
            path("run").display()
        ),
    );
    let theirs =
        wrapper(path("theirs"), &format!("{} --root {}", runc.display(), path("runc-root").display()));
    let (mut wrong, mut tried, mut compared) = (Vec::new(), BTreeSet::new(), 0);
    let asked = std::env::var("VALIDATION").unwrap_or_default();
    for entry in fs::read_dir(&tools).unwrap() {
        let program = entry.unwrap().path();
        let name = program.file_name().unwrap().to_string_lossy().into_owned();
        let wanted = match asked.as_str() {
            "" => FEW.contains(&name.as_str()),
            "all" => true,
            names => names.split(',').any(|one| one == name),
        };
        if name == "runtimetest" || name.starts_with("rootfs-") || !wanted {
            continue;
        }
        let one = try_one(&tools, &program, &ours, &path("scratch-a"));
        let other = try_one(&tools, &program, &theirs, &path("scratch-b"));
        let excepted = |check: &String| {
            EXCEPTIONS.iter().any(|(of, word, _)| (of.is_empty() || *of == name) && check.contains(word))
        };
        // Of a program whose container runc cannot make (process_rlimits: it runs out of the memory that it limits) it
        // passes nothing.
        let runs_there = other.passed + other.failed.len() > 0;
        let found: Vec<&String> =
            one.failed.difference(&other.failed).filter(|check| runs_there && !excepted(check)).collect();
        let known = one.failed.iter().any(excepted) || excepted(&String::new());
        let fewer = one.passed + one.failed.len() < other.passed + other.failed.len() && !known;
        tried.insert(name.clone());
        compared += usize::from(runs_there);
        eprintln!(
            "{name}: {} of {}, runc {} of {}",
            one.failed.len(),
            one.passed,
            other.failed.len(),
            other.passed
        );
        if !found.is_empty() || fewer || (one.code != 0 && other.code == 0) {
            wrong.push(format!("{name}: {found:?}\n{}\n---- runc\n{}", one.text, other.text));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n========\n"));
    // A name that no program has, and programs that find nothing to look at, would be a run that shows nothing.
    let named: Vec<&str> = match asked.as_str() {
        "" => FEW.to_vec(),
        "all" => Vec::new(),
        names => names.split(',').collect(),
    };
    let missing: Vec<&&str> = named.iter().filter(|name| !tried.contains(**name)).collect();
    assert!(missing.is_empty(), "no such program: {missing:?}");
    assert!(compared > 0 && (asked != "all" || tried.len() >= 58), "{compared} compared of {}", tried.len());
}
