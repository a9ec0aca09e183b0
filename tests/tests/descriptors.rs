//! What a container's processes have open: their own standard streams and what the caller passes, nothing of the runtime's.
//! And containers of one name below two roots.

#![allow(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use sysbox_tests::runtime::{Bundle, Machine, eventually};

/// The descriptors of a process, with what they are.
fn descriptors(pid: i64) -> Vec<(i32, String)> {
    let mut all: Vec<(i32, String)> = fs::read_dir(format!("/proc/{pid}/fd"))
        .unwrap()
        .flatten()
        .filter_map(|entry| {
            let target = fs::read_link(entry.path()).ok()?.display().to_string();
            Some((entry.file_name().to_str()?.parse().ok()?, target))
        })
        .collect();
    all.sort();
    all
}

fn beyond_streams(pid: i64) -> Vec<(i32, String)> {
    descriptors(pid).into_iter().filter(|(fd, _)| *fd > 2).collect()
}

fn pid_in(path: &PathBuf) -> i64 {
    fs::read_to_string(path).unwrap().parse().unwrap()
}

/// sysbox-runc with streams that are files, and descriptors of ours from 3 on, up to `files`.
fn passing(machine: &Machine, args: &[&str], files: &[&File]) -> Command {
    // The shell moves them to where they are wanted; what a test has open besides is closed by exec.
    let moves: String = files
        .iter()
        .enumerate()
        .map(|(n, file)| format!(" {}</proc/{}/fd/{}", n + 3, std::process::id(), file.as_raw_fd()))
        .collect();
    let mut command = Command::new("/bin/bash");
    command.arg("-c").arg(format!("exec \"$@\"{moves}")).arg("sh");
    command.arg(sysbox_tests::runtime::programs().join("sysbox-runc"));
    command.arg("--root").arg(machine.path("root")).arg("--run-dir").arg(machine.path("run")).args(args);
    command.stdin(Stdio::null());
    command
        .stdout(File::create(machine.path("out")).unwrap())
        .stderr(File::create(machine.path("err")).unwrap());
    command
}

fn ok(machine: &Machine, args: &[&str], files: &[&File]) {
    let status = passing(machine, args, files).status().unwrap();
    assert!(status.success(), "{args:?}: {}", fs::read_to_string(machine.path("err")).unwrap());
}

fn dir(bundle: &Bundle) -> String {
    bundle.dir.display().to_string()
}

#[test]
fn init_has_nothing_of_the_runtimes_open_neither_created_nor_running() {
    let machine = Machine::start();
    let bundle = machine.bundle("b", &["/bin/sleep", "1000"]);
    let log = machine.path("log").display().to_string();
    ok(&machine, &["--log", &log, "--debug", "create", "-b", &dir(&bundle), "c"], &[]);
    let pid = machine.state("c")["pid"].as_i64().unwrap();
    // It waits at a socket, as runc's init does at a fifo, and has ends of socket pairs; nothing leads to the host's files.
    let waiting = beyond_streams(pid);
    assert!(waiting.iter().all(|(_, what)| what.starts_with("socket:")), "{waiting:?}");
    let known = fs::read_to_string("/proc/net/unix").unwrap();
    let named = |inode: &str| {
        known.lines().any(|line| {
            let fields: Vec<&str> = line.split_whitespace().collect();
            fields.get(6) == Some(&inode) && fields.len() > 7
        })
    };
    let listening =
        waiting.iter().filter(|(_, what)| named(what.trim_start_matches("socket:[").trim_end_matches(']')));
    assert_eq!(listening.count(), 1, "{waiting:?}");
    machine.runc(&["start", "c"]).ok();
    eventually("the program runs", || {
        fs::read_link(format!("/proc/{pid}/exe")).is_ok_and(|path| path.ends_with("busybox"))
    });
    assert_eq!(beyond_streams(pid), []);

    let file = machine.path("exec.pid");
    ok(
        &machine,
        &[
            "--log",
            &log,
            "--debug",
            "exec",
            "-d",
            "--pid-file",
            file.to_str().unwrap(),
            "c",
            "/bin/sleep",
            "999",
        ],
        &[],
    );
    assert_eq!(beyond_streams(pid_in(&file)), []);
    machine.runc(&["delete", "--force", "c"]).ok();
}

#[test]
fn preserved_descriptors_are_passed_on_and_no_others() {
    let machine = Machine::start();
    let bundle = machine.bundle("b", &["/bin/sleep", "1000"]);
    let files: Vec<File> = ["one", "two", "three"]
        .iter()
        .map(|name| {
            fs::write(machine.path(name), name).unwrap();
            File::open(machine.path(name)).unwrap()
        })
        .collect();
    let all: Vec<&File> = files.iter().collect();
    let path = |name: &str| machine.path(name).display().to_string();
    let pid_file = machine.path("pid");
    ok(
        &machine,
        &[
            "run",
            "-d",
            "--preserve-fds",
            "2",
            "--pid-file",
            pid_file.to_str().unwrap(),
            "-b",
            &dir(&bundle),
            "c",
        ],
        &all,
    );
    let expected = [(3, path("one")), (4, path("two"))];
    assert_eq!(beyond_streams(pid_in(&pid_file)), expected);

    let file = machine.path("exec.pid");
    ok(
        &machine,
        &["exec", "-d", "--preserve-fds=1", "--pid-file", file.to_str().unwrap(), "c", "/bin/sleep", "999"],
        &all,
    );
    assert_eq!(beyond_streams(pid_in(&file)), expected[..1]);

    // Socket activation: those come first, and are named in the environment.
    let other = machine.bundle("l", &["/bin/sh", "-c", "echo $LISTEN_FDS $LISTEN_PID; cat <&3; cat <&4"]);
    let mut command = passing(&machine, &["run", "--preserve-fds", "1", "-b", &dir(&other), "l"], &all);
    assert!(command.env("LISTEN_FDS", "1").status().unwrap().success());
    assert_eq!(fs::read_to_string(machine.path("out")).unwrap(), "1 1\nonetwo");
    machine.runc(&["delete", "--force", "c"]).ok();
}

#[test]
fn one_name_below_two_roots_is_two_containers() {
    let machine = Machine::start();
    let first = machine.bundle("a", &["/bin/sleep", "1000"]);
    let second = machine.bundle("b", &["/bin/sleep", "1000"]);
    let running = machine.run_detached(&first, "c");
    let root = machine.path("other-root").display().to_string();
    let run = machine.path("run").display().to_string();
    let other = |args: &[&str]| {
        let mut command = Command::new(sysbox_tests::runtime::programs().join("sysbox-runc"));
        command.args(["--root", &root, "--run-dir", &run]).args(args).stdin(Stdio::null());
        let out = File::create(machine.path("other.out")).unwrap();
        let code = command.stdout(out.try_clone().unwrap()).stderr(out).status().unwrap().code();
        let text = fs::read_to_string(machine.path("other.out")).unwrap();
        assert_eq!(code, Some(0), "{args:?}: {text}");
        text
    };
    other(&["run", "-d", "-b", &dir(&second), "c"]);
    let mapped = |text: &str| text.split_whitespace().nth(1).unwrap().parse::<u32>().unwrap();
    let own = mapped(&running.exec("cat /proc/self/uid_map").ok());
    let its = mapped(&other(&["exec", "c", "cat", "/proc/self/uid_map"]));
    assert_ne!(own, its);
    // Each sees and ends its own.
    other(&["pause", "c"]);
    assert_eq!(machine.state("c")["status"], "running");
    other(&["resume", "c"]);
    other(&["delete", "--force", "c"]);
    assert_eq!(running.exec("echo here").ok(), "here\n");
    assert!(!other(&["list", "-q"]).contains('c'));
    assert_eq!(machine.runc(&["list", "-q"]).ok(), "c\n");
}
