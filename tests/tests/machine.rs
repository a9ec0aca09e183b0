//! What a container has of a machine by what its image is, by sysbox-runc alone: an init that is systemd, the kernel's trees.

#![allow(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::process::Command;

use serde_json::json;
use sysbox_tests::runtime::{Bundle, Machine, programs};

/// An image whose systemd is a script that shows what it finds.
fn with_systemd(machine: &Machine, name: &str, args: &[&str]) -> Bundle {
    let bundle = machine.bundle(name, args);
    let root = bundle.rootfs();
    for dir in ["usr/lib/systemd", "sbin", "run", "tmp"] {
        fs::create_dir_all(root.join(dir)).unwrap();
    }
    let script =
        "#!/bin/sh\nexport\ncat /proc/mounts\necho end\n[ \"$1\" = stay ] && exec sleep 1000\nexit 0\n";
    let program = root.join("usr/lib/systemd/systemd");
    fs::write(&program, script).unwrap();
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
    symlink("/usr/lib/systemd/systemd", root.join("sbin/init")).unwrap();
    bundle
}

fn is_tmpfs(said: &str, point: &str) -> bool {
    said.lines().any(|line| line.starts_with(&format!("tmpfs {point} tmpfs rw,")))
}

#[test]
fn systemd_is_known_and_finds_its_places() {
    let machine = Machine::start();
    for (id, args, known) in [
        ("link", vec!["/sbin/init"], true),
        ("itself", vec!["/usr/lib/systemd/systemd"], true),
        ("user", vec!["/usr/lib/systemd/systemd", "--user"], false),
        ("other", vec!["/bin/sh", "-c", "export; cat /proc/mounts"], false),
    ] {
        let said = machine.run(&with_systemd(&machine, id, &args), id).ok();
        for point in ["/run", "/run/lock"] {
            assert_eq!(is_tmpfs(&said, point), known, "{id}: {said}");
        }
        assert!(!is_tmpfs(&said, "/tmp"), "{id}: {said}");
        assert_eq!(said.contains("container='private-users'"), known, "{id}: {said}");
    }
    // What the image says of `container` counts, and what the user puts below /run lies above ours.
    let own = machine.path("own");
    fs::create_dir(&own).unwrap();
    fs::write(own.join("file"), "").unwrap();
    let bundle = with_systemd(&machine, "own", &["/sbin/init", "stay"]);
    bundle.edit(|config| config["process"]["env"].as_array_mut().unwrap().push(json!("container=docker")));
    bundle.mount("/run/own", &own, &["rbind"]);
    let running = machine.run_detached(&bundle, "own");
    assert_eq!(running.exec("ls /run/own; echo $container").ok(), "file\ndocker\n");
    let plain = machine.run_detached(&with_systemd(&machine, "plain", &["/sbin/init", "stay"]), "plain");
    assert_eq!(plain.exec("echo $container").ok(), "private-users\n");
    // A mount of the user's on /run is his.
    let bundle = with_systemd(&machine, "taken", &["/sbin/init"]);
    bundle.mount("/run", &own, &["rbind"]);
    let said = machine.run(&bundle, "taken").ok();
    assert!(!is_tmpfs(&said, "/run") && !is_tmpfs(&said, "/run/lock"), "{said}");
}

/// In a mount namespace of the runtime's own, whose host has trees of its kernel.
#[test]
fn the_kernels_modules_and_headers_are_shown_read_only() {
    let machine = Machine::start();
    let run = |id: &str, prepare: &dyn Fn(&Bundle, &str)| {
        let script = "cat /lib/modules/*/modules.dep /usr/src/linux-headers-*/Makefile; \
                      (cd /lib/modules/*; touch x || echo frozen); busybox stat -c %u /lib/modules/*/modules.dep";
        let bundle = machine.bundle(id, &["/bin/sh", "-c", script]);
        let release = nix::sys::utsname::uname().unwrap().release().to_string_lossy().into_owned();
        prepare(&bundle, &release);
        let (upper, line) = (machine.path(&format!("{id}-tmpfs")), runtime_line(&machine, &bundle, id));
        fs::create_dir(&upper).unwrap();
        let (upper, trees) =
            (upper.display(), "/usr/lib/modules/$(uname -r) /usr/src/linux-headers-$(uname -r)");
        let line = format!(
            "set -e; mount -t tmpfs tmpfs {upper}; for d in lib src; do mkdir {upper}/$d {upper}/$d.work; \
             mount -t overlay overlay -o lowerdir=/usr/$d,upperdir={upper}/$d,workdir={upper}/$d.work /usr/$d; done; \
             for d in {trees}; do mkdir -p $d; mount -t tmpfs tmpfs $d; done; \
             echo deps > /usr/lib/modules/$(uname -r)/modules.dep; echo headers > /usr/src/linux-headers-$(uname -r)/Makefile; {line}"
        );
        let said = Command::new("unshare").args(["-m", "sh", "-c", &line]).output().unwrap();
        format!("{}{}", String::from_utf8_lossy(&said.stdout), String::from_utf8_lossy(&said.stderr))
    };
    let said = run("bare", &|_, _| {});
    assert!(said.starts_with("deps\nheaders\nfrozen\n0\n"), "{said}");
    let own = run("own", &|bundle, release| {
        let dir = bundle.rootfs().join("lib/modules").join(release);
        fs::create_dir_all(&dir).unwrap();
        fs::write(dir.join("modules.dep"), "mine\n").unwrap();
    });
    assert!(own.starts_with("mine\nheaders\n0\n"), "{own}");
    let ordinary = run("plain", &|bundle, _| {
        bundle.edit(|config| {
            config["process"]["env"].as_array_mut().unwrap().push(json!("SYSBOX_SYSCONT_MODE=FALSE"))
        });
    });
    assert!(!ordinary.contains("deps\n") && !ordinary.contains("headers\n"), "{ordinary}");
}

fn runtime_line(machine: &Machine, bundle: &Bundle, id: &str) -> String {
    format!(
        "exec '{}' --root '{}' --run-dir '{}' run --bundle '{}' {id}",
        programs().join("sysbox-runc").display(),
        machine.path("root").display(),
        machine.path("run").display(),
        bundle.dir.display()
    )
}
