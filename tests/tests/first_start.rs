//! The first start of a container whose image has inner images: what it copies, what it says, and what is left when it is
//! killed meanwhile.
#![allow(clippy::unwrap_used)] // all of it is tests; the lint's exception misses their helpers

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use sysbox_tests::runtime::{Bundle, Machine};

const FILES: usize = 4000;

#[track_caller]
fn sh(script: &str) {
    let done = Command::new("sh").args(["-ec", script]).output().unwrap();
    assert!(done.status.success(), "{script}: {}", String::from_utf8_lossy(&done.stderr));
}

/// A mount namespace for this test's thread and all that it starts; what is mounted in it ends with it.
fn private_mounts() {
    nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS).expect("need: CAP_SYS_ADMIN");
    let slave = nix::mount::MsFlags::MS_REC | nix::mount::MsFlags::MS_SLAVE;
    nix::mount::mount(None::<&str>, "/", None::<&str>, slave, None::<&str>).unwrap();
}

/// A bundle whose rootfs is an overlay of layers in `place`; the lower one holds inner images.
fn bundle(machine: &Machine, place: &Path) -> Bundle {
    let bundle = machine.bundle("b", &["/bin/true"]);
    let (dir, layers) = (bundle.dir.display(), place.display());
    sh(&format!(
        "mkdir -p {layers}/x/diff {layers}/x/work; cp -a {dir}/rootfs {layers}/low; \
         mkdir -p {layers}/low/var/lib/docker/many; cd {layers}/low/var/lib/docker; head -c 64M /dev/urandom >large; \
         seq {FILES} | while read n; do echo $n >many/$n; done; \
         mount -t overlay overlay -o lowerdir={layers}/low,upperdir={layers}/x/diff,workdir={layers}/x/work {dir}/rootfs"
    ));
    bundle
}

fn run_args(bundle: &Bundle, log: &Path) -> Vec<String> {
    let [bundle, log] = [&bundle.dir, log].map(|path| path.display().to_string());
    ["--log", &log, "--log-format", "json", "run", "--bundle", &bundle, "c"].map(str::to_owned).to_vec()
}

fn used(path: &Path) -> u64 {
    sh("sync");
    let facts = nix::sys::statvfs::statvfs(path).unwrap();
    ((facts.blocks() - facts.blocks_free()) * facts.fragment_size()) >> 20
}

#[track_caller]
fn is_first_start_on(kind: &str, shares: bool) {
    private_mounts();
    let dir = tempfile::tempdir().unwrap();
    let point = dir.path().join("m");
    fs::create_dir(&point).unwrap();
    let (image, shown) = (dir.path().join("image"), point.display());
    sh(&format!(
        "truncate -s 600M {0}; mkfs.{kind} -q {0}; mount -t {kind} -o loop {0} {shown}",
        image.display()
    ));
    {
        let machine = Machine::start();
        let bundle = bundle(&machine, &point);
        let log = machine.path("log");
        let run = || machine.runc(&run_args(&bundle, &log).iter().map(String::as_str).collect::<Vec<_>>());
        let before = used(&point);
        run().ok();
        let grown = used(&point) - before;
        assert_eq!(grown < 48, shares, "{kind}: {grown} MiB for a file of 64");
        let at =
            |layer: &str, name: &str| fs::read(point.join(layer).join("var/lib/docker").join(name)).unwrap();
        assert!(at("x/diff", "large") == at("low", "large"), "{kind}");
        assert_eq!(at("x/diff", &format!("many/{FILES}")), format!("{FILES}\n").as_bytes(), "{kind}");
        let said = fs::read_to_string(&log).unwrap();
        let words = format!("\"reflinks\":\"Some({shares})\"");
        assert!(said.contains("the first start copies them") && said.contains(&words), "{kind}: {said}");
        assert!(said.lines().all(|line| line.contains("\"level\":\"info\"")), "{kind}: {said}");
        // A later start finds it done.
        fs::remove_file(&log).unwrap();
        run().ok();
        assert!(!fs::read_to_string(&log).unwrap().contains("inner images"), "{kind}");
        sh(&format!("umount {}", bundle.rootfs().display()));
    }
    sh(&format!("umount -R {shown}"));
}

#[test]
fn it_shares_blocks_on_btrfs() {
    is_first_start_on("btrfs", true);
}

#[test]
fn it_shares_blocks_on_xfs() {
    is_first_start_on("xfs", true);
}

#[test]
fn it_copies_once_on_ext4() {
    is_first_start_on("ext4", false);
}

#[test]
fn a_kill_in_the_middle_leaves_nothing_that_is_not_whole() {
    private_mounts();
    let machine = Machine::start();
    let place = machine.path("layers");
    fs::create_dir(&place).unwrap();
    let bundle = bundle(&machine, &place);
    let root = place.join("x/diff/var/lib/docker");
    let files = |dir: PathBuf| fs::read_dir(dir).map_or(0, Iterator::count);
    for at_least in [1, FILES / 4, FILES / 2] {
        let mut command = machine.command();
        let mut create = command
            .args(["run", "--bundle", &bundle.dir.display().to_string(), "c"])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let deadline = Instant::now() + Duration::from_secs(60);
        while files(place.join("x/.sysbox-preload/many")) < at_least {
            assert!(Instant::now() < deadline, "no copy of {at_least} files was seen");
            assert!(create.try_wait().unwrap().is_none(), "it was done before {at_least} files were seen");
        }
        create.kill().unwrap();
        create.wait().unwrap();
        assert_eq!(files(root.clone()), 0, "after {at_least}");
        machine.runc(&["delete", "--force", "c"]).ok();
        // The ids wait for it, as its layer is there; nothing else does.
        assert!(
            machine.remains("c").iter().all(|left| left.contains("/records/")),
            "{:?}",
            machine.remains("c")
        );
    }
    machine.run(&bundle, "c").ok();
    assert_eq!(files(root.join("many")), FILES);
    assert!(
        fs::read(root.join("large")).unwrap() == fs::read(place.join("low/var/lib/docker/large")).unwrap()
    );
    assert!(!place.join("x/.sysbox-preload").exists());
    sh(&format!("umount {}", bundle.rootfs().display()));
}
