//! The daemon as a process: started, spoken to, killed and started again. Needs root; writes only below a temporary
//! directory.

#![allow(clippy::unwrap_used, reason = "helpers of tests are tests")]

#[path = "daemon/bed.rs"]
mod bed;

use nix::sys::signal::Signal;
use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};
use sysbox_ipc::mgr::{Ancestor, Claim, FileId, Phase, Record, Register, Reply, Request};
use sysbox_ipc::{Hello, PROTOCOL_VERSION, RefusalKind};
use sysbox_sys::process::identify;
use sysbox_sys::socket::Connection;

use bed::*;

#[test]
fn a_container_keeps_its_ids_over_stop_and_start_until_its_layer_is_gone() {
    let bed = Bed::new();
    let client = bed.client();
    let (runtime, init) = (Life::begin(), Life::begin());
    let request = bed.request("a", &runtime, bed.overlay("a"));
    let grant = client.register(&request).unwrap();
    assert_eq!((grant.id_map.root_uid(), grant.slot, grant.share_with), (POOL, 0, None));
    client.started(&request.key, &init);
    runtime.end();
    assert_eq!(bed.records()["a"].phase, Phase::Running { init: init.process });
    let second = Life::begin();
    let other = client.register(&bed.request("b", &second, bed.overlay("b"))).unwrap();
    assert_eq!((other.id_map.root_uid(), other.slot), (POOL + 65536, 1));
    assert_eq!(client.register(&request).unwrap_err().kind, RefusalKind::Exists);

    init.end();
    client.release(&request.key);
    assert_eq!(bed.records()["a"].phase, Phase::Stopped);
    let runtime = Life::begin();
    let again = client.register(&Register { runtime: runtime.process, ..request.clone() }).unwrap();
    assert_eq!((again.id_map, again.slot), (grant.id_map, grant.slot));
    client.release(&request.key);
    client.release(&request.key);

    std::fs::remove_dir_all(bed.path("overlay2/a")).unwrap();
    bed.until("the record goes with the layer", |records| !records.contains_key("a"));
    let third = Life::begin();
    let next = client.register(&bed.request("c", &third, bed.overlay("c"))).unwrap();
    assert_eq!((next.id_map.root_uid(), next.slot), (POOL, 0));
}

#[test]
fn kill_and_restart_lose_nothing_and_notice_what_happened_meanwhile() {
    let mut bed = Bed::new();
    let lives: BTreeMap<&str, (Life, Life)> = ["runs", "dies", "gone", "void", "half", "dir", "dirgone"]
        .map(|id| (id, (Life::begin(), Life::begin())))
        .into();
    let client = bed.client();
    for (id, (runtime, init)) in &lives {
        let rootfs = if id.starts_with("dir") { bed.directory() } else { bed.overlay(id) };
        client.register(&bed.request(id, runtime, rootfs)).unwrap();
        if !["void", "half"].contains(id) {
            client.started(&bed.key(id), init);
        }
    }
    std::fs::create_dir_all(bed.path("state/dir")).unwrap();
    let before = bed.records();
    bed.stop(Signal::SIGKILL);
    let mut lives = lives;
    for id in ["dies", "gone", "dir", "dirgone"] {
        lives.get_mut(id).unwrap().1.finish();
    }
    lives.get_mut("void").unwrap().0.finish();
    std::fs::remove_dir_all(bed.path("overlay2/gone")).unwrap();
    bed.start();

    let after = bed.records();
    assert_eq!(after.keys().map(String::as_str).collect::<Vec<_>>(), ["dies", "dir", "half", "runs", "void"]);
    for id in ["dies", "dir", "half", "runs"] {
        assert_eq!(after[id], before[id]);
    }
    assert_eq!(after["void"], Record { phase: Phase::Stopped, ..before["void"].clone() });
    // All of it is watched again.
    lives.get_mut("half").unwrap().0.finish();
    bed.until("the end of a runtime voids", |records| records["half"].phase == Phase::Stopped);
    std::fs::remove_dir_all(bed.path("overlay2/dies")).unwrap();
    bed.until("the end of a layer frees", |records| !records.contains_key("dies"));
    // A running container's record is not for a vanished directory to take.
    std::fs::remove_dir_all(bed.path("overlay2/runs")).unwrap();
    assert!(bed.records().contains_key("runs"));
    lives.get_mut("runs").unwrap().1.finish();
    bed.until("without layer and process it goes", |records| !records.contains_key("runs"));
}

#[test]
fn a_registration_ends_with_its_runtime() {
    let bed = Bed::new();
    let client = bed.client();
    let runtime = Life::begin();
    client.register(&bed.request("d", &runtime, bed.directory())).unwrap();
    client.register(&bed.request("o", &runtime, bed.overlay("o"))).unwrap();
    runtime.end();
    bed.until("void", |records| {
        records.len() == 1 && records.values().all(|record| record.phase == Phase::Stopped)
    });
}

#[test]
fn a_directory_is_released_at_once_or_when_its_init_has_ended() {
    let bed = Bed::new();
    let client = bed.client();
    let (runtime, init) = (Life::begin(), Life::begin());
    for id in ["a", "b"] {
        client.register(&bed.request(id, &runtime, bed.directory())).unwrap();
    }
    client.release(&bed.key("b"));
    assert_eq!(bed.records().len(), 1);
    client.started(&bed.key("a"), &init);
    client.release(&bed.key("a"));
    assert_eq!(bed.records()["a"].phase, Phase::Running { init: init.process });
    init.end();
    bed.until("released late", BTreeMap::is_empty);
}

#[test]
fn a_second_manager_is_refused() {
    let bed = Bed::new();
    let pid = bed.daemon.as_ref().unwrap().id();
    let output = bed.command().output().unwrap();
    let lock = bed.path("run/mgr.lock");
    let hint = "hint: stop it first, or give this one its own `--run-dir` and `--data-root`";
    let expected =
        format!("sysbox-mgr: lock {}: another sysbox-mgr runs here (pid {pid})\n{hint}\n", lock.display());
    assert_eq!(refused(&output), expected);
    // Another run directory does not help: the data root is the same.
    let output = bed.command().arg("--run-dir").arg(bed.path("run2")).output().unwrap();
    assert_eq!(output.status.code(), Some(2), "a flag given twice: {output:?}");
    let mut command = Command::new(env!("CARGO_BIN_EXE_sysbox-mgr"));
    command.arg("--run-dir").arg(bed.path("run2")).arg("--data-root").arg(bed.path("data"));
    let text = refused(&command.arg("--subid-files").arg(bed.path("etc")).output().unwrap());
    assert!(text.contains(&format!("lock {}", bed.path("data/mgr.lock").display())), "{text}");
    bed.client();
}

#[test]
fn a_clean_stop_takes_the_socket_and_leaves_the_records() {
    let mut bed = Bed::new();
    let runtime = Life::begin();
    bed.client().register(&bed.request("a", &runtime, bed.overlay("a"))).unwrap();
    assert!(bed.stop(Signal::SIGTERM).success());
    assert!(!bed.path("run/mgr.sock").exists());
    assert_eq!(std::fs::read_dir(bed.path("data/records")).unwrap().count(), 1);
    bed.start();
    assert_eq!(bed.records().len(), 1);
    assert!(!bed.path("data/probe").exists());
}

#[test]
fn used_up_is_said_and_what_ended_unseen_is_found() {
    let bed = Bed::with_range(POOL, 131_072);
    let client = bed.client();
    let runtime = Life::begin();
    for id in ["a", "b"] {
        client.register(&bed.request(id, &runtime, bed.overlay(id))).unwrap();
    }
    let refused = client.register(&bed.request("c", &runtime, bed.overlay("c"))).unwrap_err();
    assert_eq!(refused.kind, RefusalKind::Exhausted);
    assert!(refused.message.contains("2415919104..2416050176"), "{refused}");
    assert!(refused.hint.is_some());
}

#[test]
fn containers_of_one_network_namespace_share_their_ids() {
    let bed = Bed::new();
    let client = bed.client();
    let runtime = Life::begin();
    // An init with a network namespace of its own.
    let child = Command::new("unshare").args(["-n", "sleep", "1000"]).spawn().unwrap();
    let pid = i32::try_from(child.id()).unwrap();
    let netns = |path: String| {
        let facts = std::fs::metadata(path).unwrap();
        FileId {
            dev: std::os::unix::fs::MetadataExt::dev(&facts),
            ino: std::os::unix::fs::MetadataExt::ino(&facts),
        }
    };
    let deadline = Instant::now() + LIMIT;
    while netns(format!("/proc/{pid}/ns/net")) == netns("/proc/self/ns/net".into()) {
        assert!(Instant::now() < deadline);
        std::thread::yield_now();
    }
    let init = Life { child, process: identify(pid).unwrap() };
    let first = client.register(&bed.request("first", &runtime, bed.overlay("first"))).unwrap();
    client.started(&bed.key("first"), &init);
    let join = |id: &str, ns: &str| {
        let netns = Some(netns(format!("/proc/{ns}/ns/net")));
        client.register(&Register { netns, ..bed.request(id, &runtime, bed.overlay(id)) }).unwrap()
    };
    let joined = join("joined", &pid.to_string());
    assert_eq!((joined.share_with, joined.id_map), (Some(init.process), first.id_map.clone()));
    let on_host = join("host", "self");
    assert_eq!(on_host.share_with, None);
    assert_ne!(on_host.id_map, first.id_map);
}

#[test]
fn a_volume_is_for_one_running_container() {
    let bed = Bed::new();
    let client = bed.client();
    let (runtime, init) = (Life::begin(), Life::begin());
    let claim = Claim {
        data_root: "/var/lib/docker".into(),
        source: "/srv/c".into(),
        lineage: vec![Ancestor { id: FileId { dev: 1, ino: 2 }, below: "".into() }],
    };
    let claiming =
        |id| Register { claims: vec![claim.clone()], ..bed.request(id, &runtime, bed.overlay(id)) };
    client.register(&claiming("one")).unwrap();
    client.started(&bed.key("one"), &init);
    let refused = client.register(&claiming("two")).unwrap_err();
    assert_eq!(refused.kind, RefusalKind::Busy);
    assert!(refused.message.contains("`one`") && refused.message.contains("`two`"), "{refused}");
    init.end();
    client.register(&claiming("two")).unwrap();
}

#[test]
fn an_unusable_record_is_kept_and_named() {
    let mut bed = Bed::new();
    let runtime = Life::begin();
    bed.client().register(&bed.request("a", &runtime, bed.overlay("a"))).unwrap();
    bed.stop(Signal::SIGKILL);
    let path = bed.path("data/records").join(format!("{}.json", bed.key("a").slug()));
    let newer = std::fs::read_to_string(&path).unwrap().replace("\"version\":1", "\"version\":9");
    std::fs::write(&path, &newer).unwrap();
    bed.start();
    let client = bed.client();
    let refused = client.register(&bed.request("a", &runtime, bed.overlay("a"))).unwrap_err();
    assert!(refused.message.contains(&path.display().to_string()), "{refused}");
    let other = client.register(&bed.request("b", &runtime, bed.overlay("b"))).unwrap();
    assert_eq!((other.id_map.root_uid(), other.slot), (POOL + 65536, 1));
    assert_eq!(std::fs::read_to_string(&path).unwrap(), newer);
    assert!(bed.log().contains("ERROR") && bed.log().contains("unusable record"), "{}", bed.log());
}

#[test]
fn ids_of_a_living_process_without_record_are_not_given_away() {
    let pool = 0xa000_0000;
    let mut bed = Bed::with_range(pool, 1 << 20);
    bed.stop(Signal::SIGTERM);
    let _init = life_with_ids(pool);
    bed.start();
    let runtime = Life::begin();
    let grant = bed.client().register(&bed.request("a", &runtime, bed.directory())).unwrap();
    assert_eq!(grant.id_map.root_uid(), pool + 65536);
    assert!(bed.log().contains("no record explains"), "{}", bed.log());
}

#[test]
fn ids_are_not_free_while_an_orphan_of_a_killed_runtime_has_them() {
    let bed = Bed::with_range(0xa100_0000, 1 << 20);
    let client = bed.client();
    let runtime = Life::begin();
    let grant = client.register(&bed.request("a", &runtime, bed.directory())).unwrap();
    let orphan = life_with_ids(grant.id_map.root_uid());
    runtime.end();
    eventually("the end is noticed", || bed.log().contains("left a process"));
    let next = Life::begin();
    let other = client.register(&bed.request("b", &next, bed.directory())).unwrap();
    assert_ne!(other.id_map, grant.id_map);
    orphan.end();
    client.release(&bed.key("a"));
    assert_eq!(bed.records().len(), 1);
}

/// A process in a user namespace with this id map.
fn life_with_ids(root_uid: u32) -> Life {
    let child = Command::new("unshare").args(["-U", "sleep", "1000"]).spawn().unwrap();
    let life = Life { process: identify(i32::try_from(child.id()).unwrap()).unwrap(), child };
    let proc = PathBuf::from(format!("/proc/{}", life.process.pid));
    let here = std::fs::read_link("/proc/self/ns/user").unwrap();
    eventually("a user namespace", || {
        std::fs::read_link(proc.join("ns/user")).is_ok_and(|there| there != here)
    });
    std::fs::write(proc.join("uid_map"), format!("0 {root_uid} 65536")).unwrap();
    life
}

fn eventually(what: &str, reached: impl Fn() -> bool) {
    let deadline = Instant::now() + LIMIT;
    while !reached() {
        assert!(Instant::now() < deadline, "{what}: not within {LIMIT:?}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

#[test]
fn strangers_and_the_silent_disturb_nobody() {
    let bed = Bed::new();
    let silent: Vec<Connection> = (0..20).map(|_| bed.raw()).collect();
    let version = |reply: Reply| match reply {
        Reply::Refused(refusal) => refusal.kind,
        other => panic!("{other:?}"),
    };
    let old = bed.raw();
    let hello = Request::Hello(Hello { version: PROTOCOL_VERSION + 1, program: "future".into() });
    assert_eq!(version(old.call(&hello, &[]).unwrap().0), RefusalKind::Version);
    assert!(old.recv::<Reply>().unwrap().is_none(), "and the connection is closed");
    let rude = bed.raw();
    assert_eq!(version(rude.call(&Request::Facts, &[]).unwrap().0), RefusalKind::Version);
    for garbage in ["{}", "[", "\"facts\"", "{\"op\":\"register\"}"] {
        let stranger = bed.raw();
        let raw = nix::sys::socket::send(
            std::os::fd::AsRawFd::as_raw_fd(&stranger.as_fd()),
            garbage.as_bytes(),
            nix::sys::socket::MsgFlags::empty(),
        );
        assert_eq!(raw, Ok(garbage.len()));
        assert_eq!(version(stranger.recv().unwrap().unwrap().0), RefusalKind::Malformed, "{garbage}");
    }
    // One that asks and never reads is cut off before it fills the daemon's patience.
    let deaf = bed.client();
    let mut asked = 0;
    while deaf.0.send(&Request::Facts, &[]).is_ok() {
        asked += 1;
        assert!(asked < 100_000, "never cut off");
    }
    bed.client();
    // The silent are gone after a while; a peer that said hello may be silent for ever.
    for connection in silent {
        assert!(connection.recv::<Reply>().unwrap().is_none());
    }
    bed.client();
}

#[test]
fn the_vault_gives_back_what_it_got() {
    let bed = Bed::new();
    let client = bed.client();
    let put = |name: &str, fd: &File| {
        client.0.call::<_, Reply>(&Request::VaultPut { name: name.into() }, &[fd.as_fd()])
    };
    let netns = File::open("/proc/self/ns/net").unwrap();
    assert_eq!(put("net", &netns).unwrap().0, Reply::Done);
    let (reply, fds) = client.0.call::<_, Reply>(&Request::VaultGet { name: "net".into() }, &[]).unwrap();
    let inode = |fd: &dyn AsFdOf| nix::sys::stat::fstat(fd.fd()).unwrap().st_ino;
    assert_eq!((reply, fds.len()), (Reply::Descriptor, 1));
    assert_eq!(inode(&fds[0]), inode(&netns));
    assert!(matches!(put("file", &File::open("/etc").unwrap()).unwrap().0, Reply::Refused(_)));
    assert_eq!(client.ask(&Request::VaultDrop { name: "net".into() }), Reply::Done);
    assert!(matches!(client.ask(&Request::VaultGet { name: "net".into() }), Reply::Refused(_)));
}

trait AsFdOf {
    fn fd(&self) -> std::os::fd::BorrowedFd<'_>;
}

impl<T: AsFd> AsFdOf for T {
    fn fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.as_fd()
    }
}

#[test]
fn facts_are_found_and_leave_no_mount() {
    let bed = Bed::new();
    let Reply::Facts(facts) = bed.client().ask(&Request::Facts) else { panic!("no facts") };
    assert!(!facts.kernel.is_empty());
    // What every kernel of ours can (docs/KERNEL.md): Linux 6.1 and later.
    assert!(
        facts.idmapped_mounts && facts.idmapped_overlay && facts.time_namespace,
        "{facts:?}\n{}",
        bed.log()
    );
    assert!(facts.seccomp_wait_killable, "{facts:?}");
    // By place: others mount and unmount on this machine meanwhile.
    let dir = bed.dir.path().display().to_string();
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    let left: Vec<&str> = mounts.lines().filter(|line| line.contains(&dir)).collect();
    assert!(left.is_empty(), "{left:?}");
}

#[test]
fn many_records_come_in_pages() {
    let bed = Bed::new();
    let client = bed.client();
    let runtime = Life::begin();
    let ids: Vec<String> = (0..400).map(|at| format!("container-{at:03}")).collect();
    for id in &ids {
        client.register(&bed.request(id, &runtime, bed.directory())).unwrap();
    }
    assert_eq!(client.records().into_keys().collect::<Vec<_>>(), ids);
}

#[test]
fn a_restart_under_load_gives_no_id_twice() {
    let mut bed = Bed::new();
    let runtime = Life::begin();
    let mut given = BTreeMap::new();
    for round in 0..5 {
        let client = bed.client();
        for at in 0..20 {
            let id = format!("c{round}-{at}");
            let grant = client.register(&bed.request(&id, &runtime, bed.directory())).unwrap();
            assert_eq!(given.insert(grant.id_map.root_uid(), id.clone()), None);
        }
        bed.restart(Signal::SIGKILL);
    }
    assert_eq!(bed.records().len(), 100);
}

#[test]
fn a_round_trip_is_quick() {
    let bed = Bed::new();
    let client = bed.client();
    let (runtime, init) = (Life::begin(), Life::begin());
    let request = bed.request("a", &runtime, bed.overlay("a"));
    // Released while its init runs, it would wait: the end of this one is not what is measured.
    let mut times: Vec<Duration> = (0..200)
        .map(|_| {
            let begin = Instant::now();
            client.register(&request).unwrap();
            client.release(&request.key);
            begin.elapsed()
        })
        .collect();
    times.sort();
    client.register(&request).unwrap();
    let begin = Instant::now();
    client.started(&request.key, &init);
    let started = begin.elapsed();
    println!("register+release: median {:?}, p99 {:?}; started {started:?}", times[100], times[198]);
    assert!(times[100] < Duration::from_millis(5), "{:?}", times[100]);
}

#[test]
fn help_and_version_are_there() {
    let output = |flag: &str| {
        let output = Command::new(env!("CARGO_BIN_EXE_sysbox-mgr")).arg(flag).output().unwrap();
        assert!(output.status.success());
        String::from_utf8(output.stdout).unwrap()
    };
    assert_eq!(output("--version"), format!("sysbox-mgr {}\n", env!("CARGO_PKG_VERSION")));
    let help = output("--help");
    for flag in ["--data-root", "--run-dir", "--subid-range", "--log", "--log-level", "--log-format"] {
        assert!(help.contains(flag), "{flag}");
    }
    assert!(!help.contains("subid-files") && !help.contains("probe"), "{help}");
    assert!(Path::new("/proc/self").exists());
}
