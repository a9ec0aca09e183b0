//! `tmpcopyup` of a tmpfs, which podman gives to each one: as far as there is nothing to copy it is had, else refused by name.
#![allow(clippy::unwrap_used)] // all of it is tests; the lint's exception misses their helpers

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

use serde_json::{Value, json};
use sysbox_tests::runtime::Machine;

fn tmpfs(destination: &str) -> Value {
    let options = ["rw", "nosuid", "nodev", "tmpcopyup", "size=64k", "mode=751"];
    json!({"type": "tmpfs", "source": "tmpfs", "destination": destination, "options": options})
}

const WHY: &str = "`tmpcopyup` is not supported where the image has files";

/// What the image has, the mounts, and what is said.
fn check(id: &str, image: fn(&Path), mounts: &[Value], expected: Result<&str, &str>) {
    let machine = Machine::start();
    let script = "for d in /x /e /deep/er; do grep \" $d tmpfs \" /proc/mounts | busybox cut -d' ' -f2; done; \
                  busybox stat -c '%a %u:%g' /x; touch /x/new && echo made";
    let bundle = machine.bundle(id, &["/bin/sh", "-c", script]);
    image(&bundle.rootfs());
    bundle.edit(|config| config["mounts"].as_array_mut().unwrap().extend_from_slice(mounts));
    let said = machine.run(&bundle, id);
    match expected {
        Ok(out) => assert_eq!(said.ok().trim_end(), out, "{id}"),
        Err(why) => {
            let said = said.fails();
            assert!(said.contains(why), "{id}: {said}");
        }
    }
    assert_eq!(machine.remains(id), Vec::<String>::new());
}

#[test]
fn a_tmpfs_with_copy_up_is_had_where_there_is_nothing_to_copy() {
    let ran = Ok("/x\n751 0:0\nmade");
    check("absent", |_| {}, &[tmpfs("/x")], ran);
    check("empty", |root| fs::create_dir(root.join("x")).unwrap(), &[tmpfs("/x/")], ran);
    check(
        "several",
        |root| fs::create_dir_all(root.join("deep/er")).unwrap(),
        &[tmpfs("/x"), tmpfs("/e"), tmpfs("/deep/er")],
        Ok("/x\n/e\n/deep/er\n751 0:0\nmade"),
    );
}

#[test]
fn one_that_would_have_to_copy_is_refused_by_name() {
    let full = |root: &Path| {
        fs::create_dir(root.join("x")).unwrap();
        fs::write(root.join("x/file"), "").unwrap();
    };
    check("full", full, &[tmpfs("/x")], Err(WHY));
    // A link is followed within the image, and never out of it.
    let linked = |root: &Path| {
        fs::create_dir(root.join("y")).unwrap();
        fs::write(root.join("y/file"), "").unwrap();
        symlink("/y", root.join("x")).unwrap();
    };
    check("linked", linked, &[tmpfs("/x")], Err(WHY));
    check("file", |root| fs::write(root.join("x"), "").unwrap(), &[tmpfs("/x")], Err(WHY));
    let above = json!({"type": "tmpfs", "source": "t", "destination": "/x", "options": []});
    check("below", |_| {}, &[above, tmpfs("/x/below")], Err(WHY));
    let mut other = tmpfs("/x");
    other["type"] = json!("ramfs");
    check("ramfs", |_| {}, &[other], Err("`tmpcopyup` is for a tmpfs"));
}
