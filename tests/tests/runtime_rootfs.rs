//! sysbox-runc on file systems of every kind and on an engine's overlay: ids are shifted, layers stay as they are, data
//! roots lie in the layer.

#![allow(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use std::process::Command;

use serde_json::json;
use sysbox_tests::runtime::{Bundle, Machine, eventually};

/// A mount namespace for this test's thread and all that it starts; what is mounted in it ends with it.
fn private_mounts() {
    nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS).expect("need: CAP_SYS_ADMIN");
    let none = None::<&str>;
    let slave = nix::mount::MsFlags::MS_REC | nix::mount::MsFlags::MS_SLAVE;
    nix::mount::mount(none, "/", none, slave, none).expect("change propagation in our own namespace");
}

#[track_caller]
fn sh(script: &str) {
    let done = Command::new("sh").args(["-ec", script]).output().unwrap();
    assert!(done.status.success(), "{script}: {}", String::from_utf8_lossy(&done.stderr));
}

/// Runs `check` with a directory on a file system of each kind, mounted in this test's namespace alone.
fn on_file_system(kind: &str, check: impl FnOnce(&Path)) {
    private_mounts();
    let dir = tempfile::tempdir().unwrap();
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o711)).unwrap();
    let point = dir.path().join("m");
    fs::create_dir(&point).unwrap();
    let (image, shown) = (dir.path().join("image"), point.display());
    match kind {
        "tmpfs" => sh(&format!("mount -t tmpfs -o size=64m tmpfs {shown}")),
        _ => sh(&format!(
            "truncate -s 400M {0}; mkfs.{kind} -q {0}; mount -t {kind} -o loop {0} {shown}",
            image.display()
        )),
    }
    check(&point);
    sh(&format!("umount -R {shown}"));
}

fn is_shifted_on(kind: &str) {
    on_file_system(kind, |point| {
        let machine = Machine::start();
        let script = "stat -c %u:%g /bin/busybox; touch /made && chown 5:6 /made; mkdir /d && rm -r /d; stat -c %u:%g /vol/f; touch /vol/g";
        let bundle = machine.bundle("b", &["/bin/sh", "-c", script]);
        let moved = Bundle { dir: point.join("b") };
        sh(&format!("cp -a {} {}", bundle.dir.display(), moved.dir.display()));
        let volume = point.join("vol");
        fs::create_dir(&volume).unwrap();
        fs::write(volume.join("f"), "").unwrap();
        moved.mount("/vol", &volume, &["rbind"]);
        assert_eq!(machine.run(&moved, "c").ok(), "0:0\n0:0\n", "{kind}");
        let owner = |path: &Path| fs::metadata(path).map(|facts| (facts.uid(), facts.gid())).unwrap();
        assert_eq!(owner(&moved.rootfs().join("made")), (5, 6), "{kind}");
        assert_eq!(owner(&moved.rootfs().join("bin/busybox")), (0, 0), "{kind}");
        assert_eq!(owner(&volume.join("g")), (0, 0), "{kind}");
    });
}

#[test]
fn rootfs_and_volumes_are_shifted_on_tmpfs() {
    is_shifted_on("tmpfs");
}

#[test]
fn rootfs_and_volumes_are_shifted_on_ext4() {
    is_shifted_on("ext4");
}

#[test]
fn rootfs_and_volumes_are_shifted_on_xfs() {
    is_shifted_on("xfs");
}

#[test]
fn rootfs_and_volumes_are_shifted_on_btrfs() {
    is_shifted_on("btrfs");
}

/// A bundle whose rootfs is an overlay as an engine mounts it, in this test's namespace.
fn overlay_bundle(machine: &Machine, args: &[&str]) -> Bundle {
    private_mounts();
    let bundle = machine.bundle("b", args);
    let dir = bundle.dir.display();
    sh(&format!(
        "mkdir -p {dir}/layer/x/diff {dir}/layer/x/work; mv {dir}/rootfs {dir}/layer/low; mkdir {dir}/rootfs; \
         mkdir -p {dir}/layer/low/etc/app {dir}/layer/low/var/lib/docker; echo image > {dir}/layer/low/etc/app/f; \
         echo inner > {dir}/layer/low/var/lib/docker/kept; \
         mount -t overlay overlay -o lowerdir={dir}/layer/low,upperdir={dir}/layer/x/diff,workdir={dir}/layer/x/work {dir}/rootfs"
    ));
    bundle
}

#[test]
fn an_overlay_is_shifted_layers_upper_and_all() {
    let machine = Machine::start();
    let script = "stat -c %u:%g /etc/app/f; rm /etc/app/f; echo new > /etc/app/g; chown 7:8 /etc/app/g; mkdir /etc/app/d; ls /etc/app";
    let bundle = overlay_bundle(&machine, &["/bin/sh", "-c", script]);
    assert_eq!(machine.run(&bundle, "c").ok(), "0:0\nd\ng\n");
    let upper = bundle.dir.join("layer/x/diff");
    let made = fs::metadata(upper.join("etc/app/g")).unwrap();
    assert_eq!((made.uid(), made.gid()), (7, 8));
    let whiteout = fs::symlink_metadata(upper.join("etc/app/f")).unwrap();
    assert_eq!((whiteout.rdev(), whiteout.uid()), (0, 0));
    assert_eq!(fs::metadata(bundle.dir.join("layer/low/etc/app/f")).unwrap().uid(), 0);
    assert_eq!(
        fs::read_dir(bundle.dir.join("layer/x/work").join("work")).unwrap().count(),
        0,
        "the engine's work directory is in use"
    );
}

#[test]
fn a_data_root_is_the_layers_own_directory_with_what_the_image_brought() {
    let machine = Machine::start();
    let script = "cat /var/lib/docker/kept; echo y > /var/lib/docker/made; for d in docker containerd kubelet rancher/k3s; do stat -f -c %T /var/lib/$d; done";
    let bundle = overlay_bundle(&machine, &["/bin/sh", "-c", script]);
    assert_eq!(machine.run(&bundle, "c").ok(), "inner\next2/ext3\next2/ext3\next2/ext3\next2/ext3\n");
    let upper = bundle.dir.join("layer/x/diff/var/lib/docker");
    assert_eq!(fs::read_to_string(upper.join("made")).unwrap(), "y\n");
    fs::remove_file(upper.join("kept")).unwrap();
    // The second time there is nothing to be brought: what was removed stays removed.
    bundle.edit(|config| config["process"]["args"] = json!(["/bin/ls", "/var/lib/docker"]));
    assert_eq!(machine.run(&bundle, "c").ok(), "made\n");
}

#[test]
fn ids_are_kept_over_a_stop_and_freed_with_the_layer() {
    let machine = Machine::start();
    let bundle = overlay_bundle(&machine, &["/bin/cat", "/proc/self/uid_map"]);
    let first = machine.run(&bundle, "c").ok();
    let record = || fs::read_dir(machine.path("data/records")).unwrap().flatten().count();
    assert_eq!(record(), 1);
    let other = machine.bundle("other", &["/bin/cat", "/proc/self/uid_map"]);
    assert_ne!(machine.run(&other, "o").ok(), first);
    assert_eq!(machine.run(&bundle, "c").ok(), first);
    sh(&format!("umount {0}/rootfs; rm -r {0}/layer/x", bundle.dir.display()));
    eventually("the record is gone with the layer", || record() == 0);
}

/// As Docker's userns-remap leaves it: files on disk belong to the mapped ids already.
#[test]
fn an_overlay_that_the_engine_has_remapped_is_used_as_it_is() {
    let machine = Machine::start();
    let script = "cat /proc/self/uid_map; stat -c %u:%g /etc/app/f; touch /made /var/lib/docker/made; stat -f -c %T /var/lib/docker";
    let bundle = overlay_bundle(&machine, &["/bin/sh", "-c", script]);
    let dir = bundle.dir.display();
    sh(&format!(
        "umount {dir}/rootfs; chown -Rh 400000000:400000000 {dir}/layer/low {dir}/layer/x/diff; \
         mount -t overlay overlay -o lowerdir={dir}/layer/low,upperdir={dir}/layer/x/diff,workdir={dir}/layer/x/work {dir}/rootfs"
    ));
    let lines = json!([{"containerID": 0, "hostID": 400_000_000, "size": 65536}]);
    bundle.edit(|config| {
        config["linux"]["uidMappings"] = lines.clone();
        config["linux"]["gidMappings"] = lines.clone();
        config["linux"]["namespaces"].as_array_mut().unwrap().push(json!({"type": "user"}));
    });
    let out = machine.run(&bundle, "c").ok();
    assert_eq!(out.split_whitespace().collect::<Vec<_>>(), ["0", "400000000", "65536", "0:0", "ext2/ext3"]);
    for made in ["made", "var/lib/docker/made"] {
        let owner = fs::metadata(bundle.dir.join("layer/x/diff").join(made)).unwrap().uid();
        assert_eq!(owner, 400_000_000, "{made}");
    }
}

/// A shared source, as everything is on a host with systemd.
#[test]
fn what_the_host_mounts_later_stays_outside() {
    let machine = Machine::start();
    private_mounts();
    let source = machine.path("source");
    fs::create_dir_all(source.join("sub")).unwrap();
    let shown = source.display();
    sh(&format!("mount -t tmpfs tmpfs {shown} && mount --make-shared {shown} && mkdir {shown}/sub"));
    let bundle = machine.bundle("b", &["/bin/sleep", "1000"]);
    bundle.mount("/x", &source, &["rbind", "rprivate"]);
    let running = machine.run_detached(&bundle, "c");
    sh(&format!("mount -t tmpfs tmpfs {shown}/sub && touch {shown}/sub/later"));
    assert_eq!(running.exec("ls /x/sub").ok(), "");
    sh(&format!("umount {shown}/sub && umount {shown}"));
}

#[test]
fn an_image_with_a_link_for_a_data_root_starts() {
    let machine = Machine::start();
    let bundle =
        overlay_bundle(&machine, &["/bin/sh", "-c", "readlink /var/lib/docker; cat /var/lib/kubelet"]);
    let dir = bundle.dir.display();
    sh(&format!(
        "umount {dir}/rootfs; rm -r {dir}/layer/low/var/lib/docker; ln -s /data {dir}/layer/low/var/lib/docker; \
         echo file > {dir}/layer/low/var/lib/kubelet; \
         mount -t overlay overlay -o lowerdir={dir}/layer/low,upperdir={dir}/layer/x/diff,workdir={dir}/layer/x/work {dir}/rootfs"
    ));
    let said = machine.run(&bundle, "c");
    assert!(said.err.contains("/var/lib/docker") && said.err.contains("/var/lib/kubelet"), "{}", said.err);
    assert_eq!(said.ok(), "/data\nfile\n");
}

/// The usual directories are copied up; one that a bind lies over is the user's.
#[test]
fn a_volume_over_a_usual_directory_is_not_touched() {
    let machine = Machine::start();
    let volume = machine.path("vol");
    fs::create_dir_all(volume.join("below")).unwrap();
    let bundle = overlay_bundle(&machine, &["/bin/ls", "/opt"]);
    let dir = bundle.dir.display();
    sh(&format!(
        "umount {dir}/rootfs; mkdir -p {dir}/layer/low/opt; \
         mount -t overlay overlay -o lowerdir={dir}/layer/low,upperdir={dir}/layer/x/diff,workdir={dir}/layer/x/work {dir}/rootfs"
    ));
    bundle.mount("/opt", &volume, &["rbind", "ro"]);
    bundle.mount("/opt/below", &volume.join("below"), &["rbind", "ro"]);
    let changed = || fs::metadata(&volume).map(|facts| (facts.ctime(), facts.ctime_nsec())).unwrap();
    let before = changed();
    assert_eq!(machine.run(&bundle, "c").ok(), "below\n");
    assert_eq!(changed(), before);
}

/// What masks and read-only paths cover is to be reached again when the mount points below them are taken away.
#[test]
fn a_failed_create_takes_mount_points_back_from_under_masks() {
    let machine = Machine::start();
    let volume = machine.path("vol");
    fs::create_dir(&volume).unwrap();
    for (name, key) in [("hidden", "maskedPaths"), ("frozen", "readonlyPaths")] {
        let bundle = machine.bundle(name, &["/no/such/program"]);
        fs::create_dir(bundle.rootfs().join("covered")).unwrap();
        bundle.mount("/covered/made/by/us", &volume, &["rbind", "ro"]);
        bundle.edit(|config| config["linux"][key] = json!(["/covered"]));
        let before = bundle.inventory();
        let said = machine.run(&bundle, name).fails();
        assert!(!said.contains("cleaning up"), "{said}");
        assert_eq!(bundle.inventory(), before, "{name}");
    }
}

#[test]
fn a_rootfs_directory_that_host_users_reach_is_warned_of() {
    let machine = Machine::start();
    let bundle = machine.bundle("b", &["/bin/true"]);
    let said = machine.run(&bundle, "closed");
    assert_eq!((said.code, said.err.as_str()), (0, ""));
    let open = bundle.dir.parent().unwrap();
    fs::set_permissions(open, fs::Permissions::from_mode(0o711)).unwrap();
    let said = machine.run(&bundle, "open");
    let rootfs = bundle.rootfs().display().to_string();
    assert!(said.code == 0 && said.err.contains(&rootfs) && said.err.contains("chmod 700"), "{}", said.err);
    bundle.edit(|config| config["root"]["readonly"] = json!(true));
    let said = machine.run(&bundle, "readonly");
    assert_eq!((said.code, said.err.as_str()), (0, ""));
}

#[test]
fn volumes_above_and_inside_a_data_root_are_for_one_running_container() {
    let machine = Machine::start();
    let volume = machine.path("vol");
    fs::create_dir_all(volume.join("docker/overlay2")).unwrap();
    fs::create_dir_all(volume.join("images")).unwrap();
    let bundle = |name: &str, mounts: &[(&str, &str, &[&str])]| {
        let bundle = machine.bundle(name, &["/bin/sleep", "1000"]);
        for (inside, below, options) in mounts {
            bundle.mount(inside, &volume.join(below), options);
        }
        bundle
    };
    let (write, read): (&[&str], &[&str]) = (&["rbind"], &["rbind", "ro"]);
    let first = bundle("first", &[("/var/lib", "", write)]);
    let running = machine.run_detached(&first, "first");
    for (name, mounts) in [
        ("above", ("/var/lib", "", write)),
        ("on", ("/var/lib/docker", "docker", write)),
        ("inside", ("/var/lib/docker/overlay2", "docker/overlay2", write)),
        // Not there yet when the first was made.
        ("later", ("/var/lib/containerd", "containerd", write)),
    ] {
        fs::create_dir_all(volume.join("containerd")).unwrap();
        let text = machine.run(&bundle(name, &[mounts]), name).fails();
        assert!(text.contains("`first`") || text.contains("/first`"), "{name}: {text}");
        assert!(text.contains(name) && text.contains("hint:"), "{name}: {text}");
        assert!(machine.remains(name).is_empty(), "{name}");
    }
    for (name, mounts) in [
        ("reader", ("/var/lib", "", read)),
        ("images", ("/var/lib/rancher/k3s/agent/images", "images", write)),
        ("elsewhere", ("/srv", "", write)),
    ] {
        machine.run_detached(&bundle(name, &[mounts]), name).delete();
    }
    drop(running);
}

#[test]
fn two_containers_on_one_rootfs_are_told_and_refused_over_a_data_root() {
    let machine = Machine::start();
    let bundle = machine.bundle("b", &["/bin/sleep", "1000"]);
    let first = machine.run_detached(&bundle, "first");
    bundle.edit(|config| config["process"]["args"] = json!(["/bin/true"]));
    let said = machine.run(&bundle, "second");
    assert!(said.code == 0 && said.err.contains("first") && said.err.contains("hint:"), "{said:?}");
    first.delete();
    fs::create_dir_all(bundle.rootfs().join("var/lib/docker")).unwrap();
    bundle.edit(|config| config["process"]["args"] = json!(["/bin/sleep", "1000"]));
    let first = machine.run_detached(&bundle, "first");
    let text = machine.run(&bundle, "second").fails();
    assert!(text.contains("first") && text.contains("second") && text.contains("/var/lib/docker"), "{text}");
    drop(first);
}
