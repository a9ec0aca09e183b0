//! Attacks on the terminal of a container: what its image and a volume that somebody else writes to can do while /dev/console
//! and the pseudo-terminals are made. The comment above a test says what it would show if we had the bug.

#![allow(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use sysbox_tests::runtime::{Bundle, Machine};
use sysbox_tests::terminal::Listener;

/// Major of the slaves of the first pseudo-terminals.
const PTY_SLAVE: u64 = 136;

/// A file of the host's that no container has been given, and that all may write to.
struct Canary(PathBuf);

impl Canary {
    fn of(machine: &Machine) -> Self {
        let path = machine.path("canary");
        fs::write(&path, "a secret of the host").unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o666)).unwrap();
        Self(path)
    }

    #[track_caller]
    fn is_untouched(&self, attack: &str) {
        assert_eq!(fs::read_to_string(&self.0).unwrap(), "a secret of the host", "{attack}");
        let facts = fs::metadata(&self.0).unwrap();
        assert_eq!((facts.mode() & 0o7777, facts.uid()), (0o666, 0), "{attack}");
    }
}

fn mounts(bundle: &Bundle, change: impl FnOnce(&mut Vec<Value>)) {
    bundle.edit(|config| change(config["mounts"].as_array_mut().unwrap()));
}

/// Creates it with a terminal; if that succeeds, what its init has on /dev/console must be a terminal, and the master that
/// came must be one. Whether it succeeded.
#[track_caller]
fn attempt(machine: &Machine, bundle: &Bundle, canary: &Canary, attack: &str) -> bool {
    let socket = machine.path("console");
    let listener = Listener::at(&socket);
    let (dir, socket_name) = (bundle.dir.display().to_string(), socket.display().to_string());
    let said = machine.runc(&["create", "-b", &dir, "--console-socket", &socket_name, "c"]);
    if said.code == 0 {
        let console = format!("/proc/{}/root/dev/console", machine.state("c")["pid"]);
        let facts = fs::metadata(&console).unwrap();
        assert!(
            facts.file_type().is_char_device()
                && nix::libc::major(facts.rdev()) == u32::try_from(PTY_SLAVE).unwrap(),
            "{attack}: {facts:?}"
        );
        // Bound nowhere but there.
        let table = fs::read_to_string(format!("/proc/{}/mountinfo", machine.state("c")["pid"])).unwrap();
        let bound = table.lines().filter(|line| line.contains(" - devpts ")).map(|line| {
            let fields: Vec<&str> = line.split(' ').collect();
            (fields[3].to_owned(), fields[4].to_owned())
        });
        for (root, place) in bound.filter(|(root, _)| root != "/") {
            assert_eq!(place, "/dev/console", "{attack}: {root}");
        }
        let (_, master) = listener.take();
        assert!(nix::unistd::isatty(&master).unwrap(), "{attack}");
        machine.runc(&["delete", "--force", "c"]).ok();
    }
    drop(listener);
    fs::remove_file(&socket).unwrap();
    canary.is_untouched(attack);
    assert_eq!(machine.remains("c"), Vec::<String>::new(), "{attack}");
    said.code == 0
}

/// With the bug: the bind that makes /dev/console of /dev/pts/N follows a link that stands in the place of either, and the
/// container has a file of the host's, writable, for its console. Here they are put there by a volume on /dev/pts and on
/// /dev, and by the image below a /dev that the spec does not mount.
#[test]
fn cve_2025_52565_a_console_is_the_terminal_that_was_made_and_nothing_else() {
    let machine = Machine::start();
    let canary = Canary::of(&machine);
    // What the container has of the kernel's own, too: its root may not write there, and a mount would make it so.
    let targets = [canary.0.clone(), "/proc/sysrq-trigger".into(), "/bin/busybox".into()];
    for target in &targets {
        lured(&machine, &canary, target);
    }
}

fn lured(machine: &Machine, canary: &Canary, target: &Path) {
    let name = |kind: &str| format!("{kind}-{}", target.file_name().unwrap().to_string_lossy());
    let lure = |dir: &Path| {
        fs::create_dir_all(dir).unwrap();
        for name in ["0", "1", "2", "ptmx", "console"] {
            symlink(target, dir.join(name)).unwrap();
        }
    };
    let bundle = |kind: &str| {
        let bundle = machine.bundle(&name(kind), &["/bin/sleep", "1000"]);
        bundle.edit(|config| config["process"]["terminal"] = json!(true));
        bundle
    };
    let plain = bundle("plain");
    assert!(attempt(machine, &plain, canary, "none"));

    let pts = bundle("pts");
    lure(&machine.path(&name("pts")));
    mounts(&pts, |all| all.retain(|mount| mount["destination"] != "/dev/pts"));
    pts.mount("/dev/pts", &machine.path(&name("pts")), &["rbind", "rw"]);
    let a = attempt(machine, &pts, canary, "a volume on /dev/pts");

    let image = bundle("image");
    lure(&image.rootfs().join("dev"));
    lure(&image.rootfs().join("dev/pts"));
    mounts(&image, |all| all.retain(|mount| !mount["destination"].as_str().unwrap().starts_with("/dev")));
    let b = attempt(machine, &image, canary, "links in the image's /dev");

    let dev = bundle("dev");
    let volume = machine.path(&name("dev"));
    lure(&volume);
    fs::create_dir(volume.join("pts")).unwrap();
    mounts(&dev, |all| all.retain(|mount| mount["destination"] != "/dev"));
    mounts(&dev, |all| {
        all.insert(
            0,
            json!({"destination": "/dev", "type": "bind", "source": volume, "options": ["rbind", "rw"]}),
        );
    });
    let c = attempt(machine, &dev, canary, "links in a volume on /dev");
    assert_eq!((a, b, c), (false, false, false), "{}", target.display());
}
