//! What is ready when an engine that was held is let go, and that nobody is held, nor held up, for long. Both overlays are real.
//! Needs root, overlay, idmapped mounts and permission events; one test needs perl and userfaultfd.

#![allow(clippy::unwrap_used, reason = "helpers of tests are tests")]

mod bed;

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::{Barrier, Mutex};
use std::time::{Duration, Instant};

use sysbox_mgr::coherence::Target;
use sysbox_mgr::gate::LONGEST;
use sysbox_sys::process::identify;

use bed::{Bed, eventually, inside};

/// What the driver overlay2 does first, and last, in each access.
fn engine_comes(bed: &Bed) {
    assert_eq!(fs::read_to_string(bed.path("id/lower")).unwrap(), "l/A:l/B");
}

/// Whether it was held until its container was ready: on a busy disk that can take longer than anybody is held.
fn engine_comes_in_time(bed: &Bed) -> bool {
    let begin = Instant::now();
    engine_comes(bed);
    begin.elapsed() < LONGEST
}

/// An engine with the image store of containerd.
fn engine_of_the_store_comes(bed: &Bed) {
    fs::File::open(bed.path("id/merged")).unwrap();
}

/// Known, and no longer new: its thread has been through it once.
fn known() -> Bed {
    let bed = Bed::unwatched();
    fs::write(bed.path("id/lower"), "l/A:l/B").unwrap();
    bed.watch()
}

fn is_own(bed: &Bed, name: &str) -> bool {
    bed.path("id/diff").join(name).is_dir()
}

#[test]
fn what_the_engine_looked_at_is_the_containers_own_when_it_comes_back() {
    for comes in [engine_comes, engine_of_the_store_comes] {
        let bed = known();
        comes(&bed);
        assert!(bed.engine("opt/7").is_dir() && bed.engine("etc/deep/deeper/conf").is_file());
        assert!(!is_own(&bed, "opt/7"));
        comes(&bed);
        for name in ["opt/7", "etc/deep/deeper"] {
            assert!(is_own(&bed, name), "{name}");
        }
        assert!(!is_own(&bed, "opt/8") && !is_own(&bed, "srv"));
    }
}

#[test]
fn what_is_in_use_is_the_containers_own_when_the_engine_is_let_go() {
    let bed = known();
    let begin = Instant::now();
    (0..200).for_each(|_| engine_comes(&bed));
    println!("an access with nothing to do is held for {:?}", begin.elapsed() / 200);
    for at in 0..50 {
        let _pins = [bed.pin(&format!("opt/{at}")), bed.pin("etc/deep/deeper/conf")];
        let is_late = !engine_comes_in_time(&bed);
        assert!(is_late || is_own(&bed, &format!("opt/{at}")) && is_own(&bed, "etc/deep/deeper"), "{at}");
    }
}

#[test]
fn the_engine_sees_what_the_container_did_from_the_first_look() {
    let bed = known();
    for at in 0..50 {
        let (new, old) = (format!("opt/{at}/new"), format!("opt/{at}/base"));
        assert!(!bed.engine(&new).exists());
        assert_eq!(fs::read_to_string(bed.engine(&old)).unwrap(), "of the layer");
        assert_eq!(fs::read_dir(bed.engine(&format!("opt/{at}"))).unwrap().count(), 1);
        bed.container_writes(&new, "of the container").unwrap();
        inside(|| fs::remove_file(bed.container(&old))).unwrap();
        if !engine_comes_in_time(&bed) {
            continue;
        }
        assert_eq!(fs::read_to_string(bed.engine(&new)).unwrap(), "of the container", "{new}");
        assert!(!bed.engine(&old).exists(), "{old}");
        let listed = fs::read_dir(bed.engine(&format!("opt/{at}"))).unwrap();
        assert_eq!(listed.map(|entry| entry.unwrap().file_name()).collect::<Vec<_>>(), ["new"]);
    }
}

/// The container comes into a directory of the image and writes in the moment in which the engine does.
#[test]
fn two_first_writes_at_one_moment_both_hold_where_the_engine_looked_before() {
    let bed = known();
    let dirs: Vec<String> = (0..100).map(|at| format!("opt/{at}")).collect();
    let (rootfs, merged) = (bed.path("rootfs"), bed.path("id/merged"));
    let (together, late) = (Barrier::new(2), Mutex::new(Vec::new()));
    let failed = std::thread::scope(|scope| {
        let container = scope.spawn(|| {
            let write = |dir: &String| {
                let _remembered = fs::metadata(rootfs.join(dir).join("base")).unwrap();
                together.wait();
                inside(|| fs::write(rootfs.join(dir).join("mine"), dir))
                    .err()
                    .map(|error| format!("{dir}: {error}"))
            };
            dirs.iter().filter_map(write).collect::<Vec<_>>()
        });
        let write = |dir: &String| {
            engine_comes(&bed);
            assert!(merged.join(dir).is_dir());
            if !(engine_comes_in_time(&bed) && engine_comes_in_time(&bed)) {
                late.lock().unwrap().push(dir.clone());
            }
            together.wait();
            fs::write(merged.join(dir).join("new"), dir).err().map(|error| format!("{dir}: {error}"))
        };
        let engine: Vec<_> = dirs.iter().filter_map(write).collect();
        engine.into_iter().chain(container.join().unwrap()).collect::<Vec<_>>()
    });
    let late = late.into_inner().unwrap();
    println!("let go too early: {late:?}; failed: {failed:?}");
    assert!(late.len() < dirs.len() / 2, "{late:?}");
    let in_time = |failed: &&String| !late.iter().any(|dir| failed.starts_with(&format!("{dir}:")));
    let failed: Vec<&String> = failed.iter().filter(in_time).collect();
    assert_eq!(failed, [""; 0]);
    engine_comes(&bed);
    for dir in dirs.iter().filter(|dir| !late.contains(dir)) {
        eventually(dir, || bed.seen_inside(&format!("{dir}/new")) == *dir);
        assert_eq!(fs::read_to_string(bed.engine(&format!("{dir}/mine"))).unwrap(), *dir);
    }
}

#[test]
fn an_engine_that_walks_through_the_whole_leaves_the_directories_the_images() {
    let bed = known();
    engine_comes(&bed);
    for at in 0..100 {
        assert!(bed.engine(&format!("opt/{at}/base")).is_file());
    }
    engine_comes(&bed);
    let own = (0..100).filter(|at| is_own(&bed, &format!("opt/{at}"))).count();
    assert_eq!(own, 0);
}

#[test]
fn nobody_is_held_once_the_container_or_the_manager_is_gone() {
    let bed = known();
    bed.coherence.as_ref().unwrap().forget(&bed.key);
    engine_comes(&bed);
    engine_of_the_store_comes(&bed);
    let mut bed = bed.watch();
    engine_comes(&bed);
    drop(bed.coherence.take());
    engine_comes(&bed);
    engine_of_the_store_comes(&bed);
}

/// Killed when dropped, and with it what it holds is free.
struct Holder(Child);

impl Drop for Holder {
    fn drop(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

/// Asks for the names in a directory, into memory that nobody ever provides: the kernel waits for it with the lock held.
const HOLD: &str = r#"
my $faults = syscall(323, 0); die "userfaultfd: $!" if $faults < 0;
my ($api, $page) = (pack("QQQ", 0xaa, 0, 0), syscall(9, 0, 4096, 3, 0x22, -1, 0));
my $register = pack("QQQQ", $page, 4096, 1, 0);
syscall(16, $faults, 0xc018aa3f, $api) == 0 or die "UFFDIO_API: $!";
syscall(16, $faults, 0xc020aa00, $register) == 0 or die "UFFDIO_REGISTER: $!";
open(my $dir, "<", $ARGV[0]) or die "open: $!";
$| = 1; print "ready\n";
syscall(217, fileno($dir), $page, 4096);
"#;

fn hold(directory: &Path) -> Holder {
    let mut child =
        Command::new("perl").args(["-e", HOLD]).arg(directory).stdout(Stdio::piped()).spawn().unwrap();
    let mut said = String::new();
    BufReader::new(child.stdout.take().unwrap()).read_line(&mut said).unwrap();
    assert_eq!(said, "ready\n", "needs x86-64, perl and userfaultfd");
    let syscall = format!("/proc/{}/syscall", child.id());
    // getdents64, and not only on its way in: it does not run.
    eventually("the lock is held", || fs::read_to_string(&syscall).unwrap().starts_with("217 "));
    Holder(child)
}

/// A container keeps the lock of a directory that its engine is about to write to, and of one that it has in use.
#[test]
fn a_container_that_holds_a_directory_holds_up_itself_alone_and_not_its_engine() {
    let hostile = known();
    let other = Bed::unwatched();
    fs::write(other.path("id/lower"), "l/A:l/B").unwrap();
    let coherence = hostile.coherence.as_ref().unwrap();
    let init = identify(i32::try_from(other.init.id()).unwrap()).unwrap();
    coherence.watch(Target {
        key: other.key_of("other"),
        init,
        merged: other.path("id/merged"),
        upper: other.path("id/diff"),
        is_found_running: true,
    });
    coherence.settle(&other.key_of("other"));

    engine_comes(&hostile);
    assert!(hostile.engine("opt/1").is_dir());
    let holder = hold(&hostile.container("opt/1"));
    let begin = Instant::now();
    for _ in 0..3 {
        engine_comes(&hostile);
    }
    println!("three accesses were held for {:?}", begin.elapsed());
    assert!(begin.elapsed() < Duration::from_secs(3), "{:?}", begin.elapsed());

    let _pin = other.pin("etc/deep");
    for name in ["srv/new", "etc/deep/new", "opt/5/new"] {
        engine_comes(&other);
        other.seen_inside(name);
        other.engine_copies_in(name, "of the engine");
        eventually(name, || other.seen_inside(name) == "of the engine");
        other.container_writes(&format!("{name}2"), "").unwrap();
    }
    // A long look of the engine's must not pile up either.
    for at in 10..60 {
        hostile.engine_copies_in(&format!("opt/{at}/new"), "of the engine");
    }
    drop(holder);
    eventually("it goes on", || hostile.seen_inside("opt/59/new") == "of the engine");
    hostile.container_writes("opt/1/mine", "").unwrap();
}
