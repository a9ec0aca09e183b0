//! `mounts` of the specification on the real kernel: options, id mappings, propagation.

#![allow(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

use std::fs;
use std::os::unix::fs::{MetadataExt, chown};
use std::path::{Path, PathBuf};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use serde_json::json;
use sysbox_tests::runtime::{Bundle, Machine};

/// A tmpfs of the test's own, below its directory.
struct Tmpfs(PathBuf);

impl Tmpfs {
    fn on(path: &Path) -> Self {
        fs::create_dir_all(path).unwrap();
        mount(Some("tmpfs"), path, Some("tmpfs"), MsFlags::empty(), None::<&str>).unwrap();
        Self(path.to_owned())
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        umount2(&self.0, MntFlags::MNT_DETACH).unwrap();
    }
}

fn owned(path: &Path, uid: u32) {
    fs::write(path, "").unwrap();
    chown(path, Some(uid), Some(uid)).unwrap();
}

fn mapped(bundle: &Bundle, destination: &str, source: &Path, options: &[&str], ids: &[(u32, u32, u32)]) {
    let lines: Vec<_> = ids
        .iter()
        .map(|(inside, host, size)| json!({"containerID": inside, "hostID": host, "size": size}))
        .collect();
    bundle.edit(|config| {
        config["mounts"].as_array_mut().unwrap().push(json!({
            "destination": destination, "type": "bind", "source": source, "options": options,
            "uidMappings": lines, "gidMappings": lines,
        }));
    });
}

/// The options of a mount point in /proc/mounts.
fn options<'a>(mounts: &'a str, point: &str) -> Vec<&'a str> {
    let line = mounts.lines().rev().find(|line| line.split(' ').nth(1) == Some(point));
    line.unwrap_or_else(|| panic!("{point}: {mounts}")).split(' ').nth(3).unwrap().split(',').collect()
}

#[test]
fn flags_hold_for_the_top_or_for_the_whole_tree() {
    let machine = Machine::start();
    let source = machine.path("source");
    fs::create_dir(&source).unwrap();
    let _below = Tmpfs::on(&source.join("sub"));
    for (id, asked, top, below) in [
        (
            "top",
            ["rbind", "ro", "nosuid", "noatime"],
            vec!["ro", "nosuid", "noatime"],
            vec!["rw", "relatime"],
        ),
        (
            "tree",
            ["rbind", "rro", "rnosuid", "rnoexec"],
            vec!["ro", "nosuid", "noexec"],
            vec!["ro", "nosuid", "noexec"],
        ),
        (
            "rest",
            ["rbind", "rnodev", "rnoatime", "nodiratime"],
            vec!["nodev", "noatime", "nodiratime"],
            vec!["nodev", "noatime"],
        ),
        (
            "link",
            ["rbind", "rnosymfollow", "rrelatime", "rw"],
            vec!["nosymfollow", "relatime", "rw"],
            vec!["nosymfollow"],
        ),
    ] {
        let bundle = machine.bundle(id, &["/bin/cat", "/proc/mounts"]);
        bundle.mount("/x", &source, &asked);
        let mounts = machine.run(&bundle, id).ok();
        for (point, flags) in [("/x", top), ("/x/sub", below)] {
            let found = options(&mounts, point);
            assert!(flags.iter().all(|flag| found.contains(flag)), "{id} {point}: {found:?}");
        }
    }
    // What the host's mount has can be taken back, for the whole tree.
    let none = None::<&str>;
    let flags = MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_RDONLY | MsFlags::MS_NOEXEC;
    mount(none, &source.join("sub"), none, flags, none).unwrap();
    for (id, asked, expected) in [("kept", "rprivate", ["ro", "noexec"]), ("back", "rrw", ["rw", "noexec"])] {
        let bundle = machine.bundle(id, &["/bin/cat", "/proc/mounts"]);
        bundle.mount("/x", &source, &["rbind", asked]);
        let mounts = machine.run(&bundle, id).ok();
        let found = options(&mounts, "/x/sub");
        assert!(expected.iter().all(|flag| found.contains(flag)), "{id}: {found:?}");
    }
}

#[test]
fn a_mount_may_have_mappings_of_its_own() {
    let machine = Machine::start();
    let source = machine.path("source");
    fs::create_dir(&source).unwrap();
    for uid in [0, 1000, 2000] {
        owned(&source.join(uid.to_string()), uid);
    }
    chown(&source, Some(1000), Some(1000)).unwrap();
    let base: u32 = {
        let bundle = machine.bundle("first", &["/bin/cat", "/proc/self/uid_map"]);
        machine.run(&bundle, "first").ok().split_whitespace().nth(1).unwrap().parse().unwrap()
    };
    let script = "stat -c %u /x/0 /x/1000 /x/2000; touch /x/new; stat -c %u /x/new";
    let bundle = machine.bundle("first2", &["/bin/sh", "-c", script]);
    // The ids that the next container will have are those of the one that has ended.
    bundle.edit(|config| {
        let lines = json!([{"containerID": 0, "hostID": base, "size": 65536}]);
        config["linux"]["uidMappings"] = lines.clone();
        config["linux"]["gidMappings"] = lines;
    });
    mapped(&bundle, "/x", &source, &["rbind"], &[(1000, base, 1), (2000, base + 7, 1)]);
    // 1000 on disk is root inside, 2000 is 7, and 0 nobody.
    assert_eq!(machine.run(&bundle, "first2").ok(), "65534\n0\n7\n0\n");
    assert_eq!(fs::metadata(source.join("new")).unwrap().uid(), 1000);
}

#[test]
fn idmap_is_of_the_top_and_ridmap_of_the_tree() {
    let machine = Machine::start();
    let source = machine.path("source");
    fs::create_dir(&source).unwrap();
    owned(&source.join("f"), 5);
    let _below = Tmpfs::on(&source.join("sub"));
    owned(&source.join("sub/f"), 5);
    for (id, option, expected) in [("top", "idmap", "5\n65534\n"), ("tree", "ridmap", "5\n5\n")] {
        let bundle = machine.bundle(id, &["/bin/stat", "-c", "%u", "/x/f", "/x/sub/f"]);
        bundle.mount("/x", &source, &["rbind", option]);
        assert_eq!(machine.run(&bundle, id).ok(), expected, "{option}");
    }
}

#[test]
fn what_a_mount_cannot_have_is_refused_by_name() {
    let machine = Machine::start();
    let source = machine.path("source");
    fs::create_dir(&source).unwrap();
    let line = json!([{"containerID": 0, "hostID": 100_000, "size": 1}]);
    for (id, entry, why) in [
        ("half", json!({"type": "bind", "source": source, "uidMappings": line}), "must be given together"),
        (
            "tmpfs",
            json!({"type": "tmpfs", "source": "t", "options": ["idmap"]}),
            "only be mapped for a bind mount",
        ),
        (
            "overlap",
            json!({"type": "bind", "source": source, "gidMappings": line, "uidMappings": [
                {"containerID": 0, "hostID": 100_000, "size": 9}, {"containerID": 3, "hostID": 200_000, "size": 9},
            ]}),
            "mappings for bind source",
        ),
    ] {
        let bundle = machine.bundle(id, &["/bin/true"]);
        bundle.edit(|config| {
            let mut entry = entry.clone();
            entry["destination"] = json!("/x");
            config["mounts"].as_array_mut().unwrap().push(entry);
        });
        let said = machine.run(&bundle, id).fails();
        assert!(said.contains(why), "{id}: {said}");
        assert_eq!(machine.remains(id), Vec::<String>::new());
    }
}

#[test]
fn the_root_propagates_as_asked() {
    let machine = Machine::start();
    for (id, asked, expected) in [
        ("none", None, "shared:"),
        ("shared", Some("shared"), "shared:"),
        ("private", Some("private"), ""),
        ("rprivate", Some("rprivate"), ""),
        // An engine asks for it with the first volume that is to receive mounts; a machine's root stays shared.
        ("slave", Some("slave"), "shared:"),
        ("unbindable", Some("unbindable"), "unbindable"),
    ] {
        let bundle = machine.bundle(id, &["/bin/cat", "/proc/self/mountinfo"]);
        bundle.edit(|config| config["linux"]["rootfsPropagation"] = json!(asked));
        let said = machine.run(&bundle, id).ok();
        let root = said.lines().find(|line| line.split(' ').nth(4) == Some("/")).unwrap();
        let optional =
            root.split(' ').skip(6).take_while(|field| *field != "-").collect::<Vec<_>>().join(" ");
        let fits = if expected.is_empty() { optional.is_empty() } else { optional.starts_with(expected) };
        assert!(fits, "{id}: {optional:?}");
    }
    let bundle = machine.bundle("odd", &["/bin/true"]);
    bundle.edit(|config| config["linux"]["rootfsPropagation"] = json!("sideways"));
    let said = machine.run(&bundle, "odd").fails();
    assert!(said.contains("/linux/rootfsPropagation"), "{said}");
}
