//! Volumes and binds: every kind of `--mount`, every file system below, and what the host mounts later; with plain runc beside
//! it as the judge.
#![allow(clippy::unwrap_used)] // all of it is tests; the lint's exception misses their helpers

use std::fs;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::{Child, Command};

use sysbox_tests::engine::{BUSYBOX, Container, DEBIAN, Volume, bed, docker, run, until};
use sysbox_tests::host::{NO_NAMES, host_dir, names_in, owner};
use tempfile::TempDir;

const BOTH: [&str; 2] = ["sysbox-runc", "runc"];

/// A file system of ours that the host has mounted, where the engine finds it. It goes when this is dropped.
struct Mounted {
    dir: TempDir,
    server: Option<Child>,
}

impl Mounted {
    /// `SELF` in the script is a directory that only root can reach, `SELF/m` the mount point.
    fn by(script: &str) -> Self {
        let mounted = Self { dir: host_dir(), server: None };
        fs::create_dir(mounted.point()).unwrap();
        mounted.sh(script);
        mounted
    }

    fn of(kind: &str) -> Self {
        match kind {
            "tmpfs" => Self::by("mount -t tmpfs -o size=64m,mode=755 tmpfs SELF/m"),
            "overlay" => Self::by(
                "mkdir SELF/low SELF/up SELF/work; echo low >SELF/low/low; \
                 mount -t overlay -o lowerdir=SELF/low,upperdir=SELF/up,workdir=SELF/work overlay SELF/m",
            ),
            "fuse" => {
                let mut mounted = Self::by("mkdir SELF/behind");
                let server = Command::new("bindfs")
                    .arg("-f")
                    .arg(mounted.dir.path().join("behind"))
                    .arg(mounted.point())
                    .spawn();
                mounted.server = Some(server.expect("need: bindfs (tests/bed/packages.sh test)"));
                until("the FUSE server to be there", || mounted.is_there().then_some(()));
                mounted
            }
            _ => Self::by(&format!(
                "truncate -s 400M SELF/image; mkfs.{kind} -q SELF/image; mount -t {kind} -o loop SELF/image SELF/m"
            )),
        }
    }

    fn sh(&self, script: &str) -> String {
        let script = script.replace("SELF", &self.dir.path().display().to_string());
        run(Command::new("sh").args(["-euc", &script])).ok()
    }

    fn point(&self) -> PathBuf {
        self.dir.path().join("m")
    }

    fn is_there(&self) -> bool {
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
        mounts.lines().any(|line| line.split(' ').nth(4) == self.point().to_str())
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        // What was mounted on it, newest first; a tree with a mount in it must not be removed with the directory.
        while self.is_there() {
            let said = Command::new("umount").arg("-R").arg(self.point()).output();
            assert!(
                std::thread::panicking() || said.is_ok_and(|said| said.status.success()),
                "umount {}",
                self.point().display()
            );
            if std::thread::panicking() {
                Command::new("umount").arg("-Rl").arg(self.point()).status().ok();
            }
        }
        if let Some(server) = &mut self.server {
            server.wait().ok();
        }
    }
}

/// A directory `v` below `at` with a file of root's and one of a user's.
fn fill(at: &Path) -> PathBuf {
    let volume = at.join("v");
    fs::create_dir(&volume).unwrap();
    for name in ["root", "user"] {
        fs::write(volume.join(name), name).unwrap();
    }
    chown(volume.join("user"), Some(1000), Some(1001)).unwrap();
    volume
}

#[test]
fn files_on_file_systems_that_can_shift_ids_are_as_on_the_host() {
    for kind in ["ext4", "xfs", "btrfs", "tmpfs"] {
        for runtime in BOTH {
            let mounted = Mounted::of(kind);
            let volume = fill(&mounted.point());
            let option = format!("{}:/x", volume.display());
            let container = Container::waiting(BUSYBOX, &["--runtime", runtime, "-v", &option]);
            let script = "cd /x; stat -c '%n %u:%g' . root user; touch made; mkdir -m 750 dir; chown 7:8 made dir; \
                          mv user moved; rm root; ln made link; ls";
            assert_eq!(
                container.sh(script),
                ". 0:0\nroot 0:0\nuser 1000:1001\ndir\nlink\nmade\nmoved",
                "{kind} {runtime}"
            );
            container.exec(&["-u", "1000:1001"], &["sh", "-c", "echo more >>/x/moved"]).ok();
            container.exec(&["-u", "1000:1001"], &["touch", "/x/dir/no"]).refused();
            drop(container);
            assert_eq!(owner(&volume.join("made")), (7, 8, 0o644), "{kind} {runtime}");
            assert_eq!(owner(&volume.join("dir")), (7, 8, 0o750), "{kind} {runtime}");
            assert_eq!(fs::read_to_string(volume.join("moved")).unwrap(), "usermore\n", "{kind} {runtime}");
            assert_eq!(owner(&volume.join("moved")), (1000, 1001, 0o644), "{kind} {runtime}");
        }
    }
}

#[test]
fn files_on_file_systems_that_cannot_shift_ids_are_nobodys_and_that_is_told() {
    for kind in ["fuse", "overlay"] {
        let mounted = Mounted::of(kind);
        let volume = fill(&mounted.point());
        fs::create_dir(volume.join("open")).unwrap();
        fs::set_permissions(volume.join("open"), fs::Permissions::from_mode(0o777)).unwrap();
        let container = Container::waiting(BUSYBOX, &["-v", &format!("{}:/x", volume.display())]);
        // What others may read, it may read; what others may write, it may write, as a user of the host without a name.
        assert_eq!(
            container.sh("cd /x; stat -c %u:%g root user; cat root; touch open/made; ls open"),
            "65534:65534\n65534:65534\nrootmade",
            "{kind}"
        );
        container.try_sh("echo x >>/x/root").refused();
        let (uid, ..) = owner(&volume.join("open/made"));
        assert_eq!(uid, container.record().unwrap().id_map.root_uid(), "{kind}");
        let log = container.record().unwrap().bundle.join("log.json");
        let said = fs::read_to_string(log).unwrap();
        assert!(
            said.contains("cannot shift ids") && said.contains(volume.to_str().unwrap()),
            "{kind}: {said}"
        );
    }
}

#[test]
fn the_engines_own_volumes_may_have_a_file_system_of_their_own() {
    for runtime in BOTH {
        let volume = sysbox_tests::engine::unique("v");
        let options = ["--opt", "type=tmpfs", "--opt", "device=tmpfs", "--opt", "o=size=1m,uid=5,mode=750"];
        docker([&["volume", "create"], &options[..], &[volume.as_str()]].concat()).ok();
        let volume = Volume { name: volume };
        let container =
            Container::waiting(BUSYBOX, &["--runtime", runtime, "-v", &format!("{}:/x", volume.name)]);
        assert_eq!(
            container.sh("stat -c '%u %a' /x; df -k /x | awk 'END {print $2}'"),
            "5 750\n1024",
            "{runtime}"
        );
        drop(container);
    }
}

/// Options with DIR for a directory of the host, in which are `file`, `a/sub` and `b/x`; what is asked; the answer.
#[rustfmt::skip]
const MOUNTS: &[(&[&str], &str, &str)] = &[
    (&["--mount", "type=bind,source=DIR/file,target=/deep/er/f,readonly"], "cat /deep/er/f; echo x 2>&1 >/deep/er/f", "file\nsh: line 0: can't create /deep/er/f: Read-only file system"),
    (&["--mount", "type=bind,source=DIR/file,target=/f"], "echo more >>/f; cat /f", "file\nmore"),
    (&["-v", "DIR/file:/etc/passwd"], "cat /etc/passwd", "file"),
    (&["-v", "DIR/b:/m/sub", "-v", "DIR/a:/m"], "ls /m /m/sub; touch /m/sub/y /m/z; ls /m", "/m:\nsub\n\n/m/sub:\nx\nsub\nz"),
    (&["-v", "DIR/a:/m:ro", "-v", "DIR/b:/m/sub"], "touch /m/z 2>&1; touch /m/sub/y; ls /m/sub", "touch: /m/z: Read-only file system\nx\ny"),
    (&["-v", "DIR/a:/m", "-v", "DIR/b:/m/sub:ro"], "touch /m/z; touch /m/sub/y 2>&1; ls /m", "touch: /m/sub/y: Read-only file system\nsub\nz"),
    (&["-v", "DIR/a:/m", "-v", "DIR/file:/m/sub/f"], "cat /m/sub/f", "file"),
    (&["--mount", "type=volume,target=/v"], "touch /v/x; stat -c %u:%g /v /v/x", "0:0\n0:0"),
    (&["--mount", "type=volume,target=/etc"], "stat -c %u:%g /etc/passwd; ls /etc/group", "0:0\n/etc/group"),
    (&["--mount", "type=volume,target=/etc,volume-nocopy"], "ls /etc/group 2>&1", "ls: /etc/group: No such file or directory"),
    (&["--mount", "type=tmpfs,target=/t,tmpfs-size=1m,tmpfs-mode=1700"], "stat -c '%u:%g %a' /t; df -k /t | awk 'END {print $2}'", "0:0 1700\n1024"),
    (&["--mount", "type=tmpfs,target=/t,readonly"], "touch /t/x 2>&1", "touch: /t/x: Read-only file system"),
    (&["--mount", "type=bind,source=DIR/nowhere,target=/x"], ":", "bind source path does not exist"),
    (&["-v", "DIR/made:/x"], "ls /x; touch /x/y; stat -c %u:%g /x", "0:0"),
];

#[test]
fn mounts_of_all_types_are_as_with_runc() {
    for (options, script, expected) in MOUNTS {
        for runtime in BOTH {
            let dir = host_dir();
            for (path, text) in [("a/sub/empty", ""), ("b/x", "x\n"), ("file", "file\n")] {
                let path = dir.path().join(path);
                fs::create_dir_all(path.parent().unwrap()).unwrap();
                fs::write(path, text).unwrap();
            }
            fs::remove_file(dir.path().join("a/sub/empty")).unwrap();
            let options = options
                .iter()
                .map(|option| option.replace("DIR", dir.path().to_str().unwrap()))
                .collect::<Vec<_>>();
            let options: Vec<&str> =
                ["--runtime", runtime].into_iter().chain(options.iter().map(String::as_str)).collect();
            let said = Container::run(&options, BUSYBOX, &["sh", "-c", script]);
            let same =
                if said.code == 125 { said.err.contains(expected) } else { said.out.trim_end() == *expected };
            assert!(same, "{runtime} {options:?}: {said:#?}, not {expected:?}");
        }
    }
}

#[test]
fn volumes_of_another_container_can_be_had() {
    let volume = Volume::new();
    let first = Container::waiting(BUSYBOX, &["-v", &format!("{}:/v", volume.name), "-v", "/anonymous"]);
    first.sh("echo v >/v/f; echo a >/anonymous/f; chown 7:8 /v/f");
    let second = Container::waiting(BUSYBOX, &["--volumes-from", &format!("{}:ro", first.name)]);
    assert_eq!(second.sh("cat /v/f /anonymous/f; stat -c %u:%g /v/f"), "v\na\n7:8");
    second.try_sh("touch /v/x").refused();
    drop((first, second));
}

#[test]
fn the_engines_socket_can_be_given_to_a_container() {
    let option = format!("{}:/var/run/docker.sock", bed().socket.display());
    let container = Container::waiting(DEBIAN, &["-v", &option]);
    let version = docker(["version", "-f", "{{.Server.Version}}"]).ok();
    assert_eq!(container.sh("docker version -f '{{.Server.Version}}'"), version);
    assert_eq!(container.sh("docker inspect -f '{{.Id}}' $(hostname)"), container.id());
    // Its owner and mode hold inside: that is root, and who else is root of the host's socket.
    let error = container.exec(&["-u", "1000"], &["docker", "version"]).refused();
    assert!(error.contains("permission denied"), "{error}");
}

// ---- what the host mounts later ----

#[test]
fn what_the_host_mounts_later_is_seen_where_it_is_asked_for() {
    for runtime in BOTH {
        let shared = Mounted::by(
            "mount -t tmpfs -o mode=755 tmpfs SELF/m; mount --make-shared SELF/m; mkdir SELF/m/v SELF/m/v/later",
        );
        let volume = shared.point().join("v");
        let with = |propagation: &str| {
            Container::waiting(
                BUSYBOX,
                &["--runtime", runtime, "-v", &format!("{}:/x{propagation}", volume.display())],
            )
        };
        let [slave, both, private] = [":rslave", ":rshared", ""].map(with);
        shared.sh("mount -t tmpfs -o mode=755 tmpfs SELF/m/v/later; echo seen >SELF/m/v/later/file");
        for container in [&slave, &both] {
            until("what was mounted to be seen", || {
                (container.try_sh("cat /x/later/file").out == "seen\n").then_some(())
            });
        }
        assert_eq!(private.sh("ls /x/later"), "", "{runtime}");
        // It comes with the ids of the host: nobody shifts it.
        let root = if runtime == "runc" { "0" } else { "65534" };
        assert_eq!(slave.sh("stat -c %u /x/later/file"), root, "{runtime}");
        shared.sh("umount SELF/m/v/later");
        for container in [&slave, &both] {
            until("it to be gone again", || (container.sh("ls /x/later").is_empty()).then_some(()));
        }
    }
}

#[test]
fn what_is_mounted_inside_stays_inside_also_where_both_ways_were_asked_for() {
    // The kernel: mounts of a mount namespace that belongs to another user namespace go one way only.
    let shared = Mounted::by(
        "mount -t tmpfs -o mode=755 tmpfs SELF/m; mount --make-shared SELF/m; mkdir SELF/m/v SELF/m/v/inner",
    );
    let volume = shared.point().join("v");
    let container = Container::waiting(BUSYBOX, &["-v", &format!("{}:/x:rshared", volume.display())]);
    container.sh("mount -t tmpfs tmpfs /x/inner; echo inside >/x/inner/file; cat /x/inner/file");
    assert_eq!(names_in(&volume.join("inner")), NO_NAMES);
    let log = fs::read_to_string(container.record().unwrap().bundle.join("log.json")).unwrap_or_default();
    assert!(log.contains("bind mount /x: shared with the host one way"), "nothing said of it: {log}");
}
