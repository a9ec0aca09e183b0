//! Directories that a container has in use and only its image has: they become its own before the engine can write to one.
//! The engine's overlay and the container's are real. Needs root, overlay and idmapped mounts.

#![allow(clippy::unwrap_used, reason = "helpers of tests are tests")]

mod bed;

use std::fs;
use std::io::{ErrorKind, IoSlice};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::UnixDatagram;
use std::process::{Command, Stdio};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};

use bed::{BASE, Bed, eventually, inside};

fn is_own(bed: &Bed, name: &str) -> bool {
    bed.path("id/diff").join(name).is_dir()
}

/// As many looks as it takes to find what is in use now.
fn looked_at(bed: &Bed) {
    let witness = bed.pin("srv");
    eventually("a look", || is_own(bed, "srv"));
    drop(witness);
}

#[test]
fn whatever_has_a_directory_in_use_it_becomes_the_containers_own() {
    let bed = Bed::new();
    let _open = bed.pin("opt/1");
    let _path_only = nix::fcntl::open(
        &bed.container("opt/2"),
        nix::fcntl::OFlag::O_PATH | nix::fcntl::OFlag::O_CLOEXEC,
        nix::sys::stat::Mode::empty(),
    )
    .unwrap();
    let _file_in_it = bed.pin("opt/3/base");
    // In nobody's descriptor table: on its way through a socket.
    let (sender, _receiver) = UnixDatagram::pair().unwrap();
    let sent = bed.pin("opt/4");
    let rights = [sent.as_raw_fd()];
    sendmsg::<()>(
        sender.as_raw_fd(),
        &[IoSlice::new(b"x")],
        &[ControlMessage::ScmRights(&rights)],
        MsgFlags::empty(),
        None,
    )
    .unwrap();
    drop(sent);
    let mut working = Command::new("sleep")
        .arg("1000")
        .current_dir(bed.container("opt/5"))
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let none = None::<&str>;
    fs::create_dir(bed.path("source")).unwrap();
    // A mount point is no file system of the container's; the directory it is in is.
    mount(Some(&bed.path("source")), &bed.container("etc/deep/deeper"), none, MsFlags::MS_BIND, none)
        .unwrap();
    for name in ["opt/1", "opt/2", "opt/3", "opt/4", "opt/5", "etc/deep"] {
        eventually(name, || is_own(&bed, name));
    }
    for name in ["opt/1", "opt/2", "opt/3", "opt/4", "opt/5"] {
        let [own, image] = ["id/diff", "lower"].map(|at| fs::metadata(bed.path(at).join(name)).unwrap());
        let facts = |of: &fs::Metadata| (of.mode(), of.uid(), of.gid(), of.mtime(), of.mtime_nsec());
        assert_eq!(facts(&own), facts(&image), "{name}: `docker diff` shows no change");
    }
    umount2(&bed.container("etc/deep/deeper"), MntFlags::empty()).unwrap();
    working.kill().unwrap();
    working.wait().unwrap();
}

#[test]
fn what_was_only_looked_at_stays_the_images() {
    let bed = Bed::new();
    for at in 0..100 {
        assert_eq!(bed.seen_inside(&format!("opt/{at}/base")), "of the layer");
        assert_eq!(fs::read_dir(bed.container(&format!("opt/{at}"))).unwrap().count(), 1);
    }
    looked_at(&bed);
    for at in 0..100 {
        assert!(!is_own(&bed, &format!("opt/{at}")), "opt/{at}");
    }
}

#[test]
fn a_bind_mount_of_the_users_is_never_touched() {
    let bed = Bed::new();
    let source = bed.path("source");
    fs::create_dir_all(source.join("7/sub")).unwrap();
    let none = None::<&str>;
    mount(Some(&source), &bed.container("opt"), none, MsFlags::MS_BIND, none).unwrap();
    // The same names as in the image, in use, and a link out of it.
    let _pins = [bed.pin("opt/7"), bed.pin("opt/7/sub")];
    inside(|| std::os::unix::fs::symlink("/opt/7", bed.container("etc/link"))).unwrap();
    let changed = |name: &str| {
        let facts = fs::metadata(source.join(name)).unwrap();
        (facts.ctime(), facts.ctime_nsec(), facts.mode())
    };
    let before = ["", "7", "7/sub"].map(changed);
    looked_at(&bed);
    assert_eq!(["", "7", "7/sub"].map(changed), before);
    assert!(!is_own(&bed, "opt/7"));
    umount2(&bed.container("opt"), MntFlags::MNT_DETACH).unwrap();
}

/// Swaps directories for links to a host directory without pause while its directories in use are looked for.
#[test]
fn a_container_that_moves_its_directories_leads_nobody_out() {
    let bed = Bed::new();
    let outside = bed.path("outside");
    for at in 0..20 {
        fs::create_dir_all(outside.join(format!("{at}"))).unwrap();
    }
    let changed = || -> Vec<_> {
        let facts = (0..20).map(|at| fs::metadata(outside.join(format!("{at}"))).unwrap());
        facts.map(|facts| (facts.ctime(), facts.ctime_nsec())).collect()
    };
    let before = changed();
    let (a, b) = (bed.container("srv/a"), bed.container("srv/b"));
    inside(|| {
        fs::create_dir(&a).unwrap();
        (0..20).for_each(|at| fs::create_dir(a.join(format!("{at}"))).unwrap());
        std::os::unix::fs::symlink(&outside, &b).unwrap();
    });
    let done = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let exchange = nix::fcntl::RenameFlags::RENAME_EXCHANGE;
            while !done.load(std::sync::atomic::Ordering::Relaxed) {
                inside(|| {
                    nix::fcntl::renameat2(nix::fcntl::AT_FDCWD, &a, nix::fcntl::AT_FDCWD, &b, exchange)
                })
                .unwrap();
            }
        });
        for round in 0..3 {
            let pin = bed.pin(&format!("opt/{round}"));
            eventually("a look", || is_own(&bed, &format!("opt/{round}")));
            drop(pin);
            bed.settle();
        }
        done.store(true, std::sync::atomic::Ordering::Relaxed);
    });
    assert_eq!(changed(), before);
}

#[test]
fn what_the_engine_wrote_unheard_is_found_and_mended() {
    let bed = Bed::new();
    looked_at(&bed);
    let upper = bed.path("id/diff");
    // In the layer at once, so that no look comes in between; nothing told the manager of it.
    fs::create_dir(bed.path("id/made")).unwrap();
    fs::set_permissions(bed.path("id/made"), fs::Permissions::from_mode(0o755)).unwrap();
    fs::write(bed.path("id/made/new"), "of the engine").unwrap();
    let _pin = bed.pin("opt/1");
    fs::create_dir_all(upper.join("opt")).unwrap();
    fs::rename(bed.path("id/made"), upper.join("opt/1")).unwrap();
    assert_eq!(bed.container_writes("opt/1/x", "").unwrap_err().kind(), ErrorKind::DirectoryNotEmpty);
    eventually("mended", || bed.seen_inside("opt/1/new") == "of the engine");
    bed.container_writes("opt/1/mine", "of the container").unwrap();
    assert_eq!(bed.seen_inside("opt/1/base"), "of the layer");
    eventually("by both", || bed.engine("opt/1/mine").exists());
}

/// What is left of two first copies at one moment, where the container's came first and the engine's took its place.
#[test]
fn a_directory_whose_copy_lost_its_place_is_mended_as_soon_as_it_is_out_of_use() {
    let bed = Bed::new();
    looked_at(&bed);
    let pin = bed.pin("opt/1");
    eventually("its own", || is_own(&bed, "opt/1"));
    fs::create_dir(bed.path("id/made")).unwrap();
    std::os::unix::fs::chown(bed.path("id/made"), Some(0), Some(0)).unwrap();
    fs::rename(bed.path("id/made"), bed.path("id/diff/opt/1")).unwrap();
    bed.engine_copies_in("opt/1/new", "of the engine");
    bed.settle();
    assert_eq!(bed.container_writes("opt/1/x", "").unwrap_err().kind(), ErrorKind::NotFound);
    drop(pin);
    // No event comes of that.
    eventually("mended", || bed.container_writes("opt/1/x", "").is_ok());
    assert_eq!(bed.seen_inside("opt/1/new"), "of the engine");
    assert_eq!(bed.seen_inside("opt/1/base"), "of the layer");
    assert_eq!(fs::metadata(bed.container("opt/1/x")).unwrap().uid(), BASE);
}

/// Both write first into a directory of the image at one moment, to the microsecond: were it not the container's own by then,
/// one of the two would mostly fail.
#[test]
fn two_first_writes_at_one_moment_both_hold_where_the_directory_was_in_use() {
    let bed = Bed::new();
    let dirs: Vec<String> = (0..100).map(|at| format!("opt/{at}")).collect();
    let _pins: Vec<_> = dirs.iter().map(|dir| bed.pin(dir)).collect();
    eventually("its own", || dirs.iter().all(|dir| is_own(&bed, dir)));
    let (rootfs, merged) = (bed.path("rootfs"), bed.path("id/merged"));
    let together = std::sync::Barrier::new(2);
    let failed = std::thread::scope(|scope| {
        let container = scope.spawn(|| {
            let write = |dir: &String| {
                together.wait();
                inside(|| fs::write(rootfs.join(dir).join("mine"), dir)).is_err()
            };
            dirs.iter().map(write).filter(|failed| *failed).count()
        });
        let write = |dir: &String| {
            together.wait();
            fs::write(merged.join(dir).join("new"), dir).is_err()
        };
        let engine = dirs.iter().map(write).filter(|failed| *failed).count();
        (engine, container.join().unwrap())
    });
    assert_eq!(failed, (0, 0), "of the engine's writes, and of the container's");
    bed.settle();
    for dir in &dirs {
        eventually(dir, || bed.seen_inside(&format!("{dir}/new")) == *dir);
        assert_eq!(fs::read_to_string(bed.engine(&format!("{dir}/mine"))).unwrap(), *dir);
    }
}
