//! `linux.seccomp` on the real kernel: what a profile with a listener does, with an agent that answers.

#![allow(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

use std::io::{IoSliceMut, Read};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::mpsc::{Receiver, Sender, channel};

use libseccomp::{ScmpNotifReq, ScmpNotifResp, ScmpNotifRespFlags, ScmpSyscall};
use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
use serde_json::{Value, json};
use sysbox_sys::socket::adopt;
use sysbox_tests::runtime::{Bundle, Machine};

/// An agent at `path`: tells what it was told, and answers mkdir with EXDEV and everything else with `go on`.
fn agent(path: &Path) -> Receiver<Value> {
    let listener = UnixListener::bind(path).unwrap();
    let (tell, told) = channel();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let tell = tell.clone();
            std::thread::spawn(move || serve(&stream.unwrap(), &tell));
        }
    });
    told
}

fn serve(stream: &UnixStream, tell: &Sender<Value>) {
    let mut buffer = vec![0; 65536];
    let mut space = nix::cmsg_space!([std::os::fd::RawFd; 2]);
    let (length, fd): (usize, OwnedFd) = {
        let mut parts = [IoSliceMut::new(&mut buffer)];
        let received =
            recvmsg::<()>(stream.as_raw_fd(), &mut parts, Some(&mut space), MsgFlags::empty()).unwrap();
        let fd = received.cmsgs().unwrap().find_map(|message| match message {
            ControlMessageOwned::ScmRights(fds) => fds.first().copied(),
            _ => None,
        });
        (received.bytes, adopt(fd.unwrap()))
    };
    // The runtime closes the connection after its one message.
    let mut rest = Vec::new();
    (&mut &*stream).read_to_end(&mut rest).unwrap();
    assert_eq!(rest, b"");
    tell.send(serde_json::from_slice(&buffer[..length]).unwrap()).unwrap();
    let made: Vec<ScmpSyscall> =
        ["mkdir", "mkdirat"].iter().map(|name| ScmpSyscall::from_name(name).unwrap()).collect();
    while let Ok(request) = ScmpNotifReq::receive(fd.as_raw_fd()) {
        let answer = if made.contains(&request.data.syscall) {
            ScmpNotifResp::new_error(
                request.id,
                -(nix::errno::Errno::EXDEV as i32),
                ScmpNotifRespFlags::empty(),
            )
        } else {
            ScmpNotifResp::new_continue(request.id, ScmpNotifRespFlags::CONTINUE)
        };
        // A caller that is gone meanwhile is none of ours.
        drop(answer.respond(fd.as_raw_fd()));
    }
}

fn notify(bundle: &Bundle, path: &Path, names: &[&str], flags: &[&str]) {
    bundle.edit(|config| {
        config["annotations"] = json!({"a": "b"});
        config["linux"]["seccomp"] = json!({
            "defaultAction": "SCMP_ACT_ALLOW",
            "flags": flags,
            "listenerPath": path,
            "listenerMetadata": "x=1",
            "syscalls": [{"names": names, "action": "SCMP_ACT_NOTIFY"}],
        });
    });
}

#[test]
fn a_notifying_filter_has_its_listener_at_the_agent() {
    let machine = Machine::start();
    let socket = machine.path("agent.sock");
    let told = agent(&socket);
    let bundle = machine.bundle("b", &["/bin/sh", "-c", "mkdir /x; echo ran; exec sleep 1000"]);
    notify(&bundle, &socket, &["mkdir", "mkdirat"], &["SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV"]);
    let running = machine.run_detached(&bundle, "c");
    let first = told.recv().unwrap();
    assert_eq!((&first["fds"], &first["metadata"]), (&json!(["seccompFd"]), &json!("x=1")));
    assert_eq!(first["pid"], running.pid());
    let expected = json!({
        "ociVersion": first["ociVersion"], "id": "c", "status": "created", "pid": running.pid(),
        "bundle": bundle.dir, "annotations": {"a": "b"},
    });
    assert_eq!(first["state"], expected);
    // A later process has a listener of its own.
    let said = running.exec("mkdir /y");
    assert!(said.code == 1 && said.err.contains("link"), "{said:?}");
    let later = told.recv().unwrap();
    assert_eq!(later["state"]["status"], "running");
    assert_eq!(later["state"]["pid"], running.pid());
    assert_ne!(later["pid"], later["state"]["pid"]);
    let out = std::fs::read_to_string(machine.path("c.out")).unwrap();
    assert!(out.contains("Invalid cross-device link") && out.contains("ran"), "{out}");
    assert!(!machine.path("root/c/seccomp.sock").exists());
}

#[test]
fn whatever_call_is_notified_the_start_does_not_wait_for_itself() {
    let machine = Machine::start();
    let socket = machine.path("agent.sock");
    let told = agent(&socket);
    let bundle = machine.bundle("b", &["/bin/sh", "-c", "echo one; mkdir /x || echo two"]);
    let calls = [
        "sendmsg",
        "recvmsg",
        "sendto",
        "recvfrom",
        "write",
        "writev",
        "read",
        "close",
        "openat",
        "execve",
        "mmap",
        "munmap",
        "brk",
        "futex",
        "accept4",
        "poll",
        "ppoll",
        "fcntl",
        "mkdir",
        "mkdirat",
        "rt_sigprocmask",
        "sched_yield",
        "exit_group",
        "madvise",
        "prctl",
        "capset",
        "setresuid",
    ];
    notify(&bundle, &socket, &calls, &[]);
    for user in [0, 1000] {
        bundle.edit(|config| config["process"]["user"] = json!({"uid": user, "gid": user}));
        let said = machine.run(&bundle, "c");
        assert_eq!(said.out, "one\ntwo\n", "{said:?}");
        told.recv().unwrap();
    }
}

#[test]
fn a_start_without_its_agent_fails_and_can_be_repeated() {
    let machine = Machine::start();
    let socket = machine.path("agent.sock");
    let bundle = machine.bundle("b", &["/bin/sleep", "1000"]);
    notify(&bundle, &socket, &["mkdir"], &[]);
    let dir = bundle.dir.display().to_string();
    // Its init keeps the streams.
    let quiet = || std::process::Stdio::null();
    let made =
        machine.command().args(["create", "--bundle", &dir, "c"]).stdout(quiet()).stderr(quiet()).status();
    assert!(made.unwrap().success());
    let said = machine.runc(&["start", "c"]).fails();
    assert!(said.contains("/linux/seccomp/listenerPath: connect to"), "{said}");
    assert_eq!(machine.state("c")["status"], "created");
    let told = agent(&socket);
    machine.runc(&["start", "c"]).ok();
    assert_eq!(told.recv().unwrap()["pid"], machine.state("c")["pid"]);
    machine.runc(&["delete", "--force", "c"]).ok();
    assert_eq!(machine.remains("c"), Vec::<String>::new());
}

#[test]
fn a_notifying_profile_that_cannot_be_is_refused() {
    let machine = Machine::start();
    for (id, change, why) in [
        ("none", json!({"listenerPath": null}), "/linux/seccomp/listenerPath: is missing"),
        ("relative", json!({"listenerPath": "x"}), "is not an absolute path"),
        (
            "all",
            json!({"defaultAction": "SCMP_ACT_NOTIFY"}),
            "SCMP_ACT_NOTIFY cannot be used as default action",
        ),
    ] {
        let bundle = machine.bundle(id, &["/bin/true"]);
        notify(&bundle, Path::new("/nowhere/agent.sock"), &["mkdir"], &[]);
        bundle.edit(|config| {
            for (key, value) in change.as_object().unwrap() {
                config["linux"]["seccomp"][key] = value.clone();
            }
        });
        let said = machine.run(&bundle, id).fails();
        assert!(said.contains(why), "{said}");
        assert_eq!(machine.remains(id), Vec::<String>::new());
    }
}
