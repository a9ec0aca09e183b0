//! What of the host an engine brings into a system container, and what of it cannot be undone from inside.
#![allow(clippy::unwrap_used)] // all of it is tests; the lint's exception misses their helpers

use std::fs;
use std::os::unix::fs::{PermissionsExt, chown};

use serde_json::json;
use sysbox_tests::engine::{BUSYBOX, Container, DEBIAN, RUNTIME, Volume, api, docker, unique};
use sysbox_tests::host::{NO_NAMES, host_dir, names_in, owner};

// ---- what it cannot undo ----

/// Every way that a root with all capabilities has to make a mount at `path` writable and to write there.
fn ways_to_write(path: &str) -> Vec<String> {
    // mount_setattr(2) and open_tree(2) by number; perl wants variables for what it hands by address.
    let by_attribute = "perl -e 'my ($p, $a) = (\"PATH\", pack(\"Q4\", 0, 1, 0, 0)); \
        syscall(442, -100, $p, 0x8000, $a, 32); open(F, \">PATH/new\")'";
    let detached = "perl -e 'my ($p, $e, $a) = (\"PATH\", \"\", pack(\"Q4\", 0, 1, 0, 0)); \
        $t = syscall(428, -100, $p, 1); syscall(442, $t, $e, 0x9000, $a, 32); open(F, \">/proc/self/fd/$t/new\")'";
    let ways = [
        "mount -o remount,rw PATH; touch PATH/new",
        "mount -o remount,bind,rw PATH; touch PATH/new",
        "mkdir -p /tmp/copy; mount --bind PATH /tmp/copy; mount -o remount,bind,rw /tmp/copy; touch /tmp/copy/new",
        "mkdir -p /tmp/copy2; mount --rbind PATH /tmp/copy2; mount -o remount,bind,rw /tmp/copy2; touch /tmp/copy2/new",
        "unshare -m sh -c 'mount -o remount,bind,rw PATH; touch PATH/new'",
        "mkdir -p /tmp/jail; mount --rbind / /tmp/jail; chroot /tmp/jail sh -c 'mount -o remount,bind,rw PATH; touch PATH/new'",
        by_attribute,
        detached,
        "mkdir -p /tmp/moved; mount --make-rprivate /; mount --move PATH /tmp/moved; mount -o remount,bind,rw /tmp/moved; touch /tmp/moved/new",
    ];
    ways.map(|way| way.replace("PATH", path)).into()
}

/// A user namespace of its own gives no more; it would not where nothing is locked either.
fn nested(way: &str) -> String {
    format!("unshare -Urm sh -c {}", quoted(way))
}

fn quoted(text: &str) -> String {
    format!("'{}'", text.replace('\'', "'\\''"))
}

#[test]
fn the_ways_to_write_are_ways_where_nothing_is_locked() {
    // What the tests below would miss if a way had a mistake: with plain runc, each of them leads to the host's disk.
    let all = ["--runtime", "runc", "--cap-add", "SYS_ADMIN", "--cap-add", "SYS_CHROOT"];
    let unconfined = ["--security-opt", "seccomp=unconfined", "--security-opt", "apparmor=unconfined"];
    for at in 0..ways_to_write("/x").len() {
        let dir = host_dir();
        let bind = format!("{}:/x:ro", dir.path().display());
        let container = Container::waiting(DEBIAN, &[all.as_slice(), &unconfined, &["-v", &bind]].concat());
        let said = container.try_sh(&ways_to_write("/x")[at]);
        assert_eq!(names_in(dir.path()), ["new"], "{said:#?}");
    }
}

#[test]
fn a_read_only_bind_cannot_be_made_writable() {
    let dir = host_dir();
    fs::write(dir.path().join("old"), "of the host").unwrap();
    let container = Container::waiting(DEBIAN, &["-v", &format!("{}:/x:ro", dir.path().display())]);
    assert_eq!(container.sh("cat /x/old"), "of the host");
    for way in ways_to_write("/x").into_iter().flat_map(|way| [nested(&way), way]) {
        let said = container.try_sh(&way);
        assert_eq!(names_in(dir.path()), ["old"], "{said:#?}");
    }
    let refused = container.try_sh("mount -o remount,bind,rw /tmp/moved").refused();
    assert!(refused.contains("permission denied"), "{refused}");
    let refused = container.try_sh("echo x >>/tmp/moved/old").refused();
    assert!(refused.contains("Read-only file system"), "{refused}");
    assert_eq!(fs::read_to_string(dir.path().join("old")).unwrap(), "of the host");
}

#[test]
fn a_read_only_bind_below_a_writable_one_does_not_come_off() {
    let dir = host_dir();
    let (a, b) = (dir.path().to_owned(), dir.path().join("b"));
    fs::create_dir(&b).unwrap();
    let (a_to_a, b_to_b) = (format!("{}:/a", a.display()), format!("{}:/a/b:ro", b.display()));
    let container = Container::waiting(DEBIAN, &["-v", &a_to_a, "-v", &b_to_b]);
    container.sh("echo x >/a/allowed");
    for way in [
        "umount /a/b",
        "umount -l /a/b",
        "umount /a",
        "unshare -m umount /a/b",
        "unshare -Urm umount -l /a/b",
        "mkdir -p /c && mount --bind /a /c && touch /c/b/new",
        "mkdir -p /c && mount --move /a/b /c",
    ] {
        container.try_sh(way).refused();
        assert_eq!(container.try_sh("touch /a/b/new").code, 1, "after {way}");
        assert_eq!(names_in(&b), NO_NAMES, "after {way}");
    }
    for way in ways_to_write("/a/b").into_iter().flat_map(|way| [nested(&way), way]) {
        let said = container.try_sh(&way);
        assert_eq!(names_in(&b), NO_NAMES, "{said:#?}");
    }
    let tree = "mkdir -p /t; mount --rbind /a /t; umount /t/b; umount -l /t/b; mount -o remount,bind,rw /t/b; touch /t/b/new";
    let said = container.try_sh(tree);
    assert_eq!(names_in(&b), NO_NAMES, "{said:#?}");
    assert_eq!(names_in(&a), ["allowed", "b"]);
}

#[test]
fn a_read_only_rootfs_cannot_be_made_writable() {
    let container = Container::waiting(DEBIAN, &["--read-only", "--tmpfs", "/tmp"]);
    let refused = container.try_sh("touch /new").refused();
    assert!(refused.contains("Read-only file system"), "{refused}");
    for way in ways_to_write("/").into_iter().flat_map(|way| [nested(&way), way]) {
        let said = container.try_sh(&way);
        assert_eq!(container.try_sh("ls /new").code, 2, "{said:#?}");
    }
    assert_eq!(names_in(&container.upper()).iter().filter(|name| *name == "new").count(), 0);
    // The user's own tmpfs is what it was made for.
    container.sh("touch /tmp/new && ls /tmp/new");
}

#[test]
fn a_masked_path_stays_masked() {
    let name = unique("masked");
    let request = json!({
        "Image": BUSYBOX, "Cmd": ["sleep", "2147483647"], "StopSignal": "KILL",
        "HostConfig": {"Runtime": RUNTIME, "MaskedPaths": ["/etc/passwd", "/root", "/proc/timer_list", "/nowhere"]},
    });
    api("POST", &format!("/containers/create?name={name}"), &request);
    let container = Container { name };
    container.docker(&["start"]).ok();
    for check in ["cat /etc/passwd", "ls -A /root", "cat /proc/timer_list"] {
        assert_eq!(container.sh(check), "", "{check}");
    }
    container.try_sh("touch /root/x").refused();
    for path in ["/etc/passwd", "/root"] {
        for way in
            ["umount", "umount -l", "unshare -m umount", "unshare -Urm umount -l", "mount -o remount,bind,rw"]
        {
            container.try_sh(&format!("{way} {path}")).refused();
        }
    }
    // A copy of the mount below would show what is hidden.
    for way in ["mkdir /c; mount --bind / /c; cat /c/etc/passwd", "mount --move /root /c; ls -A /root"] {
        let said = container.try_sh(way);
        assert_eq!(said.out, "", "{said:?}");
    }
}

// ---- what of the host is brought in ----

#[test]
fn files_of_a_bind_have_the_ids_that_they_have_on_the_host() {
    let dir = host_dir();
    let path = |name: &str| dir.path().join(name);
    fs::write(path("root"), "").unwrap();
    fs::write(path("user"), "").unwrap();
    chown(path("user"), Some(1000), Some(1001)).unwrap();
    let container = Container::waiting(BUSYBOX, &["-v", &format!("{}:/x", dir.path().display())]);
    assert_eq!(
        container.sh("stat -c '%n %u:%g' /x /x/root /x/user"),
        "/x 0:0\n/x/root 0:0\n/x/user 1000:1001"
    );
    container.sh("touch /x/made; touch /x/given; chown 7:8 /x/given; chown 5 /x/user");
    container.exec(&["-u", "1000"], &["touch", "/x/denied"]).refused();
    assert_eq!(owner(&path("made")), (0, 0, 0o644));
    assert_eq!(owner(&path("given")), (7, 8, 0o644));
    assert_eq!(owner(&path("user")), (5, 1001, 0o644));
    assert_eq!(owner(&path("root")), (0, 0, 0o644));
    assert_eq!(names_in(dir.path()), ["given", "made", "root", "user"]);
}

#[test]
fn a_single_file_can_be_bound() {
    let dir = host_dir();
    let file = dir.path().join("f");
    fs::write(&file, "host\n").unwrap();
    let container = Container::waiting(BUSYBOX, &["-v", &format!("{}:/deep/er/f", file.display())]);
    assert_eq!(
        container.sh("cat /deep/er/f; stat -c %u:%g /deep/er/f; echo inside >/deep/er/f"),
        "host\n0:0"
    );
    assert_eq!(fs::read_to_string(&file).unwrap(), "inside\n");
}

#[test]
fn a_writable_bind_that_others_can_reach_is_warned_of() {
    let warnings = |mode: u32, suffix: &str| -> Vec<String> {
        let dir = host_dir();
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(mode)).unwrap();
        let container = Container::waiting(BUSYBOX, &["-v", &format!("{}:/x{suffix}", dir.path().display())]);
        let log = container.record().unwrap().bundle.join("log.json");
        let text = fs::read_to_string(&log).unwrap_or_else(|error| panic!("{}: {error}", log.display()));
        let records = text.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap());
        let warned = records.filter(|record| record["level"] == "warning");
        let said = warned.map(|record| record["msg"].as_str().unwrap().to_owned());
        said.map(|text| text.replace(dir.path().to_str().unwrap(), "DIR")).collect()
    };
    let found = warnings(0o755, "");
    assert_eq!(found.len(), 1, "{found:?}");
    for part in ["/x", "DIR", "hint: "] {
        assert!(found[0].contains(part), "{found:?}");
    }
    assert_eq!(warnings(0o755, ":ro"), NO_NAMES);
    assert_eq!(warnings(0o700, ""), NO_NAMES);
}

#[test]
fn a_named_volume_is_filled_and_kept() {
    let volume = Volume::new();
    let option = format!("{}:/etc", volume.name);
    let first = Container::waiting(BUSYBOX, &["-v", &option]);
    // The engine fills an empty volume with what the image has there.
    assert_eq!(
        first.sh("stat -c %u:%g /etc/group; echo mine >/etc/new; chown 7:8 /etc/new; cat /etc/group"),
        "0:0\nroot:x:0:"
    );
    let second = Container::waiting(BUSYBOX, &["-v", &option]);
    assert_eq!(second.sh("cat /etc/new; stat -c %u:%g /etc/new"), "mine\n7:8");
    drop((first, second));
    assert_eq!(owner(&volume.path().join("new")), (7, 8, 0o644));
    assert_eq!(owner(&volume.path().join("group")), (0, 0, 0o644));
    let third = Container::waiting(BUSYBOX, &["-v", &option]);
    assert_eq!(third.sh("cat /etc/new"), "mine");
    // A local that outlives the volume would keep it from being removed.
    drop(third);
    drop(volume);
}

#[test]
fn docker_cp_reaches_a_container_that_does_not_run() {
    let dir = host_dir();
    let (to, from) = (dir.path().join("to"), dir.path().join("from"));
    fs::write(&to, "first").unwrap();
    let container = Container::created(BUSYBOX, &[]);
    let copy_in =
        |name: &str| docker(["cp", to.to_str().unwrap(), &format!("{}:{name}", container.name)]).ok();
    let copy_out = |name: &str| {
        docker(["cp", &format!("{}:{name}", container.name), from.to_str().unwrap()]).ok();
        fs::read_to_string(&from).unwrap()
    };
    copy_in("/etc/new");
    container.docker(&["start"]).ok();
    assert_eq!(
        container.sh("cat /etc/new; stat -c %u:%g /etc/new; echo second >/etc/new; echo group >/etc/group"),
        "first0:0"
    );
    container.docker(&["stop"]).ok();
    assert_eq!(copy_out("/etc/new"), "second\n");
    assert_eq!(copy_out("/etc/group"), "group\n");
    fs::write(&to, "third").unwrap();
    copy_in("/etc/new");
    container.docker(&["start"]).ok();
    assert_eq!(container.sh("cat /etc/new; echo more >>/etc/new; cat /etc/new"), "thirdthirdmore");
}
