//! The engine's overlay and the container's, both real, in a mount namespace of each test's own: what one side does shows on
//! the other, and neither breaks the other's writes. Needs root, overlay and idmapped mounts.

#![allow(clippy::unwrap_used, reason = "helpers of tests are tests")]

mod bed;

use std::fs::{self, File};
use std::io::{ErrorKind, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::{Child, Command};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use nix::mount::{MntFlags, umount2};
use sysbox_ipc::Hello;
use sysbox_ipc::mgr::{Register, Reply, Request, Rootfs};
use sysbox_mgr::aside::{ASIDE, Upper};
use sysbox_sys::path::proc_path;
use sysbox_sys::process::identify;
use sysbox_sys::socket::Connection;

use bed::{BASE, Bed, LIMIT, eventually, inside};

#[test]
fn what_the_engine_copies_in_is_seen_and_can_be_written_beside() {
    let bed = Bed::new();
    // Looked for in vain, read, in use: everything the container's overlay remembers.
    let pins = ["etc", "etc/deep/deeper", "usr/bin", "usr/bin/tool"].map(|name| bed.pin(name));
    for name in
        ["etc/new", "etc/conf", "etc/deep/deeper/new", "etc/deep/deeper/conf", "srv/new", "usr/bin/new"]
    {
        bed.seen_inside(name);
    }
    for name in
        ["etc/new", "etc/conf", "etc/deep/deeper/new", "etc/deep/deeper/conf", "srv/new", "usr/bin/new"]
    {
        bed.engine_copies_in(name, "of the engine");
        eventually(name, || bed.seen_inside(name) == "of the engine");
        let beside = Path::new(name).with_file_name("beside");
        bed.container_writes(beside.to_str().unwrap(), "of the container").unwrap();
        assert_eq!(fs::metadata(bed.container(name)).unwrap().uid(), BASE + 7, "owner of {name}");
    }
    bed.settle();
    for name in ["etc/beside", "etc/deep/deeper/beside", "srv/beside", "usr/bin/beside"] {
        assert_eq!(fs::read_to_string(bed.engine(name)).unwrap(), "of the container", "{name}");
        assert_eq!(fs::metadata(bed.engine(name)).unwrap().uid(), 0, "owner of {name}");
    }
    assert_eq!(bed.seen_inside("etc/other"), "of the layer");
    // Through what was open all the time, too.
    let listed = fs::read_dir(proc_path(pins[0].as_fd())).unwrap();
    let mut names: Vec<_> = listed.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.retain(|name| !name.starts_with("ld"));
    names.sort();
    assert_eq!(names, ["beside", "conf", "deep", "new", "other"]);
    assert!(!bed.path("id").join(ASIDE).exists(), "nothing stays aside");
}

#[test]
fn a_file_in_use_gives_way_to_the_engines() {
    let bed = Bed::new();
    let (mut conf, _tool) = (bed.pin("etc/conf"), bed.pin("usr/bin/tool"));
    for name in ["etc/conf", "usr/bin/tool"] {
        bed.engine_copies_in(name, "of the engine");
        eventually(name, || bed.seen_inside(name) == "of the engine");
        inside(|| File::options().append(true).open(bed.container(name)).unwrap().write_all(b", and mine"))
            .unwrap();
        bed.settle();
        assert_eq!(fs::read_to_string(bed.engine(name)).unwrap(), "of the engine, and mine");
    }
    let mut text = String::new();
    std::io::Read::read_to_string(&mut conf, &mut text).unwrap();
    assert_eq!(text, "of the layer", "who had it open has it still");
}

#[test]
fn the_engine_reads_what_the_container_wrote() {
    let bed = Bed::new();
    assert_eq!(fs::read_to_string(bed.engine("etc/conf")).unwrap(), "of the layer");
    assert!(!bed.engine("etc/deep/new").exists());
    bed.settle();
    bed.container_writes("etc/conf", "of the container").unwrap();
    bed.container_writes("etc/deep/new", "of the container").unwrap();
    inside(|| fs::remove_file(bed.container("etc/other"))).unwrap();
    assert_eq!(fs::read_to_string(bed.engine("etc/conf")).unwrap(), "of the container");
    assert_eq!(fs::read_to_string(bed.engine("etc/deep/new")).unwrap(), "of the container");
    assert!(!bed.engine("etc/other").exists());
}

#[test]
fn a_name_the_engine_looked_for_in_vain_is_found_in_the_end() {
    let bed = Bed::new();
    bed.settle();
    assert!(!bed.engine("etc/deep/new").exists());
    bed.container_writes("etc/deep/new", "of the container").unwrap();
    eventually("found", || bed.engine("etc/deep/new").exists());
}

#[test]
fn only_the_engine_makes_events_and_they_end() {
    let bed = Bed::new();
    let quiet = bed.settle();
    bed.container_writes("etc/new", "x").unwrap();
    for at in 0..100 {
        bed.seen_inside(&format!("opt/{at}/base"));
    }
    assert_eq!(bed.settle(), quiet, "the container's doings are none");
    let _pin = bed.pin("etc/deep");
    bed.engine_copies_in("etc/deep/new", "of the engine");
    eventually("seen", || bed.seen_inside("etc/deep/new") == "of the engine");
    let after = bed.settle();
    assert!(after > quiet);
    for _ in 0..20 {
        assert_eq!(bed.settle(), after, "nor are ours");
    }
}

/// Killed, by SIGKILL, when dropped.
struct Daemon(Child);

impl Drop for Daemon {
    fn drop(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

/// The daemon's part: it is told of the container, killed, and started again.
#[test]
fn the_daemon_keeps_both_alike_over_its_own_death() {
    let bed = Bed::unwatched();
    fs::create_dir(bed.path("etc")).unwrap();
    let start = || {
        let mut command = Command::new(env!("CARGO_BIN_EXE_sysbox-mgr"));
        for (flag, name) in
            [("--data-root", "data"), ("--run-dir", "run"), ("--subid-files", "etc"), ("--log", "log")]
        {
            command.arg(flag).arg(bed.path(name));
        }
        Daemon(command.args(["--subid-range", "2684354560:65536"]).spawn().unwrap())
    };
    let ask = |request: Request| {
        let socket = bed.path("run").join(sysbox_ipc::mgr::SOCKET);
        eventually("the daemon listens", || Connection::connect(&socket).is_ok());
        let connection = Connection::connect(&socket).unwrap();
        let hello: Reply = connection.call(&Request::Hello(Hello::from_program("test")), &[]).unwrap().0;
        assert!(matches!(hello, Reply::Hello(_)));
        connection.call::<_, Reply>(&request, &[]).unwrap().0
    };
    let daemon = start();
    let register = Register {
        key: bed.key.clone(),
        bundle: bed.path("bundle"),
        runtime: identify(i32::try_from(std::process::id()).unwrap()).unwrap(),
        rootfs: Rootfs::Overlay { merged: bed.path("id/merged"), upper: bed.path("id/diff") },
        id_map: None,
        netns: None,
        users: None,
        claims: vec![],
    };
    assert!(matches!(ask(Request::Register(Box::new(register))), Reply::Granted(_)));
    let init = identify(i32::try_from(bed.init.id()).unwrap()).unwrap();
    assert_eq!(ask(Request::Started { key: bed.key.clone(), init }), Reply::Done);
    let _pins = ["etc/deep", "opt/1", "opt/2"].map(|name| bed.pin(name));
    bed.engine_copies_in("etc/deep/new", "of the engine");
    eventually("seen", || bed.seen_inside("etc/deep/new") == "of the engine");

    drop(daemon);
    bed.engine_copies_in("opt/1/new", "of the engine");
    assert_ne!(bed.seen_inside("opt/1/new"), "of the engine");
    let daemon = start();
    eventually("seen after the start", || bed.seen_inside("opt/1/new") == "of the engine");
    bed.container_writes("opt/1/mine", "").unwrap();
    bed.engine_copies_in("opt/2/new", "of the engine");
    eventually("and from then on", || bed.seen_inside("opt/2/new") == "of the engine");
    drop(daemon);
}

#[test]
fn what_happened_before_the_manager_came_is_mended() {
    let bed = Bed::unwatched();
    let _pins = ["etc/deep/deeper", "opt/1"].map(|name| bed.pin(name));
    bed.engine_copies_in("etc/deep/deeper/new", "of the engine");
    assert_eq!(
        bed.container_writes("etc/deep/deeper/x", "").unwrap_err().kind(),
        ErrorKind::DirectoryNotEmpty
    );
    let bed = bed.watch();
    assert_eq!(bed.seen_inside("etc/deep/deeper/new"), "of the engine");
    bed.container_writes("etc/deep/deeper/x", "").unwrap();
}

#[test]
fn what_a_killed_manager_left_aside_is_brought_back() {
    let bed = Bed::unwatched();
    bed.engine_copies_in("etc/deep/new", "of the engine");
    bed.engine_copies_in("opt/1/new", "of the engine");
    bed.engine_copies_in("usr/bin/tool", "of the engine");
    bed.container_writes("srv/mine", "of the container").unwrap();
    let aside = bed.path("id").join(ASIDE);
    fs::create_dir(&aside).unwrap();
    let upper = bed.path("id/diff");
    for (number, place) in ["etc/deep", "opt/1", "usr/bin/tool", "gone/x"].into_iter().enumerate() {
        std::os::unix::fs::symlink(place, aside.join(format!("{number}.to"))).unwrap();
        if number < 3 {
            fs::rename(upper.join(place), aside.join(number.to_string())).unwrap();
        }
    }
    // Meanwhile the container made its own copy of one of them.
    fs::create_dir(upper.join("opt/1")).unwrap();
    fs::write(upper.join("opt/1/mine"), "of the container").unwrap();
    Upper::open(&upper).unwrap().recover().unwrap();
    for (place, content) in [
        ("etc/deep/new", "of the engine"),
        ("opt/1/new", "of the engine"),
        ("opt/1/mine", "of the container"),
        ("usr/bin/tool", "of the engine"),
        ("srv/mine", "of the container"),
    ] {
        assert_eq!(fs::read_to_string(upper.join(place)).unwrap(), content, "{place}");
    }
    assert!(!aside.exists(), "{:?}", fs::read_dir(&aside).map(Iterator::count));
}

#[test]
fn the_engine_can_unmount_and_remove_at_any_time() {
    let mut bed = Bed::new();
    let _pin = bed.pin("etc/deep");
    bed.engine_copies_in("etc/deep/new", "x");
    eventually("umount(merged), not lazily", || umount2(&bed.path("id/merged"), MntFlags::empty()).is_ok());
    bed.init.kill().unwrap();
    bed.init.wait().unwrap();
    bed.coherence.as_ref().unwrap().forget(&bed.key);
    bed.settle();
    fs::remove_dir_all(bed.path("id")).unwrap();
}

/// What a container met that writes without pause: into the directory that the engine wrote to last.
struct Met {
    written: u64,
    failed: u64,
    longest: Duration,
}

/// The engine copies a file into each of a hundred directories which the container has open, and from the moment each is there
/// the container creates files beside it. Returns what it met, once both sides show all that either wrote.
fn race(bed: &Bed) -> Met {
    let dirs: Vec<String> = (0..100).map(|at| format!("opt/{at}")).collect();
    let _pins: Vec<File> = dirs.iter().map(|dir| bed.pin(dir)).collect();
    let (at, rootfs) = (AtomicUsize::new(0), bed.path("rootfs"));
    let met = std::thread::scope(|scope| {
        let container = scope.spawn(|| {
            let mut met = Met { written: 0, failed: 0, longest: Duration::ZERO };
            loop {
                let reached = at.load(Ordering::Acquire);
                if reached > dirs.len() {
                    return met;
                }
                let Some(dir) = reached.checked_sub(1).and_then(|at| dirs.get(at)) else { continue };
                // The first stays; the others come and go.
                for name in [format!("{dir}/mine"), format!("{dir}/brief")] {
                    let begin = Instant::now();
                    while let Err(error) = inside(|| fs::write(rootfs.join(&name), &name)) {
                        met.failed += 1;
                        assert!(begin.elapsed() < LIMIT, "{name}: {error}");
                    }
                    met.longest = met.longest.max(begin.elapsed());
                    met.written += 1;
                }
                inside(|| fs::remove_file(rootfs.join(format!("{dir}/brief")))).unwrap();
            }
        });
        for (number, dir) in dirs.iter().enumerate() {
            bed.engine_copies_in(&format!("{dir}/new"), dir);
            at.store(number + 1, Ordering::Release);
            let next = Instant::now() + Duration::from_millis(3);
            while Instant::now() < next {
                std::thread::yield_now();
            }
        }
        at.store(dirs.len() + 1, Ordering::Release);
        container.join().unwrap()
    });
    bed.settle();
    for dir in &dirs {
        let mine = format!("{dir}/mine");
        assert_eq!(bed.seen_inside(&format!("{dir}/new")), *dir);
        assert_eq!(bed.seen_inside(&format!("{dir}/base")), "of the layer");
        assert!(!bed.engine(&format!("{dir}/brief")).exists());
        // The container may not have come round to all of them.
        if bed.container(&mine).exists() {
            assert_eq!(
                (bed.seen_inside(&mine), fs::read_to_string(bed.engine(&mine)).unwrap()),
                (mine.clone(), mine)
            );
        }
    }
    met
}

#[test]
fn a_write_beside_what_the_engine_just_copied_in_fails_for_a_moment_at_most() {
    let Met { written, failed, longest } = race(&Bed::new());
    println!("directories of the layers: {written} writes, {failed} failed attempts, longest {longest:?}");
    assert!(longest < Duration::from_millis(500), "{longest:?}");
}

#[test]
fn where_the_container_has_written_before_nothing_ever_fails() {
    let bed = Bed::new();
    for at in 0..100 {
        bed.container_writes(&format!("opt/{at}/before"), "").unwrap();
    }
    let Met { written, failed, longest } = race(&bed);
    println!("the container's own directories: {written} writes, {failed} failed, longest {longest:?}");
    assert_eq!(failed, 0);
}

#[test]
fn where_a_directory_is_in_use_before_the_engine_comes_nothing_ever_fails() {
    let bed = Bed::new();
    let dirs: Vec<String> = (0..100).map(|at| format!("opt/{at}")).collect();
    let _pins: Vec<File> = dirs.iter().map(|dir| bed.pin(dir)).collect();
    eventually("its own", || dirs.iter().all(|dir| bed.path("id/diff").join(dir).is_dir()));
    let Met { written, failed, longest } = race(&bed);
    println!("directories in use: {written} writes, {failed} failed, longest {longest:?}");
    assert_eq!(failed, 0);
}

/// As with a daemon that is short of descriptors: it is opened later, and what the engine did meanwhile is made good.
#[test]
fn one_whose_overlays_cannot_be_opened_is_tried_again() {
    let bed = Bed::unwatched();
    fs::write(bed.path("no-directory"), "").unwrap();
    std::os::unix::fs::symlink("no-directory", bed.path("upper")).unwrap();
    let bed = bed.watch_at("upper");
    let _pins = ["etc", "etc/deep"].map(|name| bed.pin(name));
    bed.seen_inside("etc/deep/new");
    bed.engine_copies_in("etc/deep/new", "of the engine");
    // Long enough for the first tries.
    let until = Instant::now() + Duration::from_millis(600);
    while Instant::now() < until {
        assert_ne!(bed.seen_inside("etc/deep/new"), "of the engine");
        std::thread::yield_now();
    }
    fs::remove_file(bed.path("upper")).unwrap();
    std::os::unix::fs::symlink("id/diff", bed.path("upper")).unwrap();
    eventually("it is looked at in the end", || bed.seen_inside("etc/deep/new") == "of the engine");
    bed.settle();
    bed.engine_copies_in("etc/deep/later", "of the engine");
    eventually("as ever after", || bed.seen_inside("etc/deep/later") == "of the engine");
}
