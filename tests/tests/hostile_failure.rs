//! What fails around `sysbox-runc`: the runtime itself, killed at any of its system calls, and a disk that is full. Nothing is
//! left behind, nothing is lost, and afterwards all works. `SYSBOX_ROUNDS` says how many places are tried.

#![allow(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use sysbox_tests::runtime::{Bundle, Machine, eventually};

/// Far above what any machine needs.
const LONG: Duration = Duration::from_secs(100);

/// A mount namespace for this test's thread and all that it starts; what is mounted in it ends with it.
fn private_mounts() {
    nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS).expect("need: CAP_SYS_ADMIN");
    let none = None::<&str>;
    let slave = nix::mount::MsFlags::MS_REC | nix::mount::MsFlags::MS_SLAVE;
    nix::mount::mount(none, "/", none, slave, none).expect("change propagation in our own namespace");
}

#[track_caller]
fn sh(script: &str) -> String {
    let done = Command::new("sh").args(["-ec", script]).output().unwrap();
    assert!(done.status.success(), "{script}: {}", String::from_utf8_lossy(&done.stderr));
    String::from_utf8_lossy(&done.stdout).into_owned()
}

fn rounds(otherwise: usize) -> usize {
    std::env::var("SYSBOX_ROUNDS").map_or(otherwise, |text| text.parse().expect("SYSBOX_ROUNDS"))
}

/// Names, owners, modes, times, extended attributes and contents of all below a directory.
fn manifest(dir: &Path) -> String {
    let dir = dir.display();
    sh(&format!(
        "cd {dir}; find . -printf '%P %U:%G %m %y %l %T@\\n' | sort; find . -type f -exec sha256sum {{}} + | sort; getfattr -Rhd -m - . 2>/dev/null || :"
    ))
}

/// A container as an engine asks for one: an overlay of a layer for its rootfs, and a volume.
struct Asked {
    bundle: Bundle,
    kept: [std::path::PathBuf; 2],
    upper: std::path::PathBuf,
}

fn asked(machine: &Machine) -> Asked {
    let bundle = machine.bundle("b", &["/bin/sleep", "1000"]);
    let (dir, volume) = (bundle.dir.display().to_string(), machine.path("volume"));
    sh(&format!(
        "mkdir -p {dir}/layer/x/diff {dir}/layer/x/work; mv {dir}/rootfs {dir}/layer/low; mkdir {dir}/rootfs; \
         mkdir -p {dir}/layer/low/etc {dir}/layer/low/var/lib/docker; echo image >{dir}/layer/low/etc/f; chown 7:8 {dir}/layer/low/etc/f; \
         mount -t overlay overlay -o lowerdir={dir}/layer/low,upperdir={dir}/layer/x/diff,workdir={dir}/layer/x/work {dir}/rootfs; \
         mkdir {0}; echo data >{0}/f; chown 5:6 {0}/f; chmod 640 {0}/f",
        volume.display()
    ));
    bundle.mount("/vol", &volume, &["rbind"]);
    bundle.mount("/vol/locked", &volume, &["rbind", "ro"]);
    fs::create_dir(volume.join("locked")).unwrap();
    let upper = bundle.dir.join("layer/x/diff");
    Asked { kept: [bundle.dir.join("layer/low"), volume], upper, bundle }
}

/// The system calls of a process in its order, each with how often it had been made then: strace counts each for itself.
fn calls(log: &str) -> Vec<(&str, usize)> {
    let mut made = BTreeMap::new();
    let names = log.lines().filter_map(|line| line.split_once('(')).map(|(name, _)| name);
    let names = names.filter(|name| name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_'));
    names
        .map(|name| {
            let count = made.entry(name).or_insert(0);
            *count += 1;
            (name, *count)
        })
        .collect()
}

/// A create under strace, which ends the runtime (not its children) at a system call.
fn create(machine: &Machine, asked: &Asked, id: &str, at: Option<(&str, usize)>, log: &Path) -> bool {
    let inner = machine.command();
    let mut command = Command::new("strace");
    command.arg("-o").arg(log).args(["-e", "trace=all"]);
    if let Some((name, count)) = at {
        command.args(["-e", &format!("inject={name}:signal=SIGKILL:when={count}")]);
    }
    command.arg(inner.get_program()).args(inner.get_args());
    command.args(["create", "--bundle"]).arg(&asked.bundle.dir).arg(id);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let status = command.status().expect("need: strace");
    // strace ends as what it traces does.
    assert!(status.success() || status.signal() == Some(nix::libc::SIGKILL), "{id}: {status}");
    status.success()
}

#[test]
fn killed_at_any_system_call_of_create_it_leaves_nothing() {
    private_mounts();
    let machine = Machine::start();
    let asked = asked(&machine);
    let log = machine.path("strace");
    let kept = || asked.kept.each_ref().map(|dir| manifest(dir));
    let before = kept();
    assert!(create(&machine, &asked, "cut", None, &log));
    machine.runc(&["delete", "--force", "cut"]).ok();
    let text = fs::read_to_string(&log).unwrap();
    // Before the loader is done there is nothing of ours.
    let all = calls(&text);
    let opens_it = text.lines().position(|line| line.contains("config.json")).expect("it reads the bundle");
    let step = ((all.len() - opens_it) / rounds(120)).max(1);
    let mut cut = 0;
    for (nr, call) in all.iter().enumerate().skip(opens_it).step_by(step) {
        let at = format!("{nr}, {call:?}");
        // One id: that of the layer's record, whose ids it gets again.
        let id = "cut".to_owned();
        if !create(&machine, &asked, &id, Some(*call), &log) {
            cut += 1;
        }
        machine.runc(&["delete", "--force", &id]).ok();
        // A record stands for the ids of a writable layer, as long as that is there.
        let left = || {
            machine.remains(&id).into_iter().filter(|path| !path.contains("/records/")).collect::<Vec<_>>()
        };
        eventually(&format!("call {at}: left: {:?}", left()), || left().is_empty());
        assert_eq!(kept(), before, "call {at}");
        // Mount points are all that may stay in the layer: whoever was killed could not take them away.
        let files = sh(&format!("find {} -type f -size +0", asked.upper.display()));
        assert_eq!(files, "", "call {at}");
    }
    assert!(cut > 20, "{cut} of {} calls", all.len());
    assert!(create(&machine, &asked, "cut", None, &log));
    machine.runc(&["start", "cut"]).ok();
    assert_eq!(machine.runc(&["exec", "cut", "/bin/cat", "/vol/f", "/etc/f"]).ok(), "data\nimage\n");
    machine.runc(&["delete", "--force", "cut"]).ok();
    let layer = asked.bundle.dir.join("layer/x");
    sh(&format!("umount -R {}; rm -r {}", asked.bundle.rootfs().display(), layer.display()));
    let records = || fs::read_dir(machine.path("data/records")).unwrap().count();
    eventually("no record outlives its layer", || records() == 0);
}

/// Everything of a machine on a small file system of its own: state, records, sockets, layers.
fn on_a_small_disk(inodes: u32, check: impl FnOnce(&Path)) {
    private_mounts();
    let dir = tempfile::tempdir().unwrap();
    fs::set_permissions(dir.path(), std::os::unix::fs::PermissionsExt::from_mode(0o711)).unwrap();
    let point = dir.path().join("m");
    fs::create_dir(&point).unwrap();
    let (image, shown) = (dir.path().join("image"), point.display());
    sh(&format!(
        "truncate -s 48M {0}; mkfs.ext4 -q -m 0 -N {inodes} {0}; mount -o loop {0} {shown}; chmod 711 {shown}",
        image.display()
    ));
    check(&point);
    sh(&format!("umount -R {shown}"));
}

/// Takes all but some of the free space, or of the free inodes, of a disk.
fn fill(point: &Path, leave: u64) {
    let file = point.join("filler");
    let free = nix::sys::statvfs::statvfs(point).unwrap();
    let length = (free.blocks_available() * free.fragment_size()).saturating_sub(leave << 10);
    sh(&format!(
        "fallocate -l {length} {0} 2>/dev/null || dd if=/dev/zero of={0} bs=4k count={1} 2>/dev/null || :",
        file.display(),
        length >> 12
    ));
}

#[test]
fn a_full_disk_is_told_and_loses_nothing() {
    on_a_small_disk(2000, |point| {
        let machine = Machine::start_below(point);
        let bundle = machine.bundle("b", &["/bin/sleep", "1000"]);
        let before = machine.run_detached(&bundle, "before");
        let record = || fs::read_dir(machine.path("data/records")).unwrap().count();
        assert_eq!(record(), 1);
        let mut refused = 0;
        for (round, leave) in [0, 4, 8, 12, 16, 24, 32, 48, 64, 4096].into_iter().enumerate() {
            let (id, dir) = (format!("c{round}"), bundle.dir.display().to_string());
            fill(point, leave);
            // Its streams are init's as well: a pipe would end with that one.
            let said = machine.later(&["create", "--bundle", &dir, &id]).within(LONG).expect("it hangs");
            if said.code == 0 {
                machine.runc(&["start", &id]).ok();
            } else {
                refused += 1;
                assert!(
                    said.err.contains("No space left on device") || said.err.contains("ENOSPC"),
                    "{leave} kB: {said:?}"
                );
                assert!(!machine.path("root").join(&id).exists(), "{leave} kB: {said:?}");
            }
            // Who runs goes on, and can be asked, entered and ended.
            assert_eq!(machine.state("before")["status"], "running");
            assert_eq!(before.exec("echo well").ok(), "well\n");
            machine.runc(&["delete", "--force", &id]).ok();
            assert_eq!(machine.remains(&id), Vec::<String>::new(), "{leave} kB");
            fs::remove_file(point.join("filler")).unwrap();
            assert_eq!(record(), 1, "{leave} kB");
        }
        assert!(refused > 0, "the disk was never full");
        assert_eq!(machine.run(&machine.bundle("after", &["/bin/echo", "well"]), "after").ok(), "well\n");
        before.delete();
        assert_eq!(record(), 0);
    });
}
