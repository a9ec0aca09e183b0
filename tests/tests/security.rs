//! Attacks from inside a container, and by its image: one test for each class of vulnerability that runtimes have had, as
//! far as it applies to `sysbox-runc`. The comment above a test says what it would show if we had the bug.

#![allow(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use serde_json::json;
use sysbox_tests::runtime::{Bundle, Machine, eventually, programs};

/// Far above what any machine needs.
const LONG: Duration = Duration::from_secs(100);

fn sleeper(machine: &Machine, name: &str) -> Bundle {
    machine.bundle(name, &["/bin/sleep", "1000"])
}

/// A directory of the host's that no container has been given.
struct Canary(PathBuf);

const SECRET: &str = "a secret of the host";

impl Canary {
    fn of(machine: &Machine) -> Self {
        let dir = machine.path("canary");
        fs::create_dir(&dir).unwrap();
        fs::set_permissions(&dir, fs::Permissions::from_mode(0o777)).unwrap();
        fs::write(dir.join("secret"), SECRET).unwrap();
        fs::set_permissions(dir.join("secret"), fs::Permissions::from_mode(0o666)).unwrap();
        Self(dir)
    }

    #[track_caller]
    fn is_untouched(&self, attack: &str) {
        let names: Vec<_> = fs::read_dir(&self.0).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(names, ["secret"], "{attack}");
        assert_eq!(fs::read_to_string(self.0.join("secret")).unwrap(), SECRET, "{attack}");
        assert_eq!(fs::metadata(&self.0).unwrap().mode() & 0o7777, 0o777, "{attack}");
        assert_eq!(fs::metadata(&self.0).unwrap().uid(), 0, "{attack}");
    }
}

/// An image that has the runtime itself for its program, and what that needs to be loaded.
fn with_libraries(bundle: &Bundle) {
    let listed = Command::new("ldd").arg(programs().join("sysbox-runc")).output().expect("need: ldd");
    let text = String::from_utf8_lossy(&listed.stdout).into_owned();
    for library in text.split_whitespace().filter(|word| word.starts_with('/')) {
        let inside = bundle.rootfs().join(library.trim_start_matches('/'));
        fs::create_dir_all(inside.parent().unwrap()).unwrap();
        fs::copy(library, inside).unwrap();
    }
}

/// With the bug: the host's runtime has other bytes afterwards, and root of the host runs them at the next start.
#[test]
fn cve_2019_5736_the_runtimes_own_file_cannot_be_written() {
    let machine = Machine::start();
    let runtime = programs().join("sysbox-runc");
    let before = fs::read(&runtime).unwrap();
    let bundle = sleeper(&machine, "b");
    with_libraries(&bundle);
    let running = machine.run_detached(&bundle, "c");
    // The log is a pipe that nobody reads: there the runtime hangs, in the container, for as long as we like.
    running.exec("/bin/busybox mkfifo /pipe").ok();
    let mut hanging = machine.later(&["exec", "c", "/proc/self/exe", "--log", "/pipe", "state", "x"]);
    let find = "for p in /proc/[0-9]*; do read c < $p/comm; [ \"$c\" = sysbox-runc ] || [ \"$c\" = exe ] || continue; echo $p; done";
    eventually("the runtime runs inside", || !running.exec(find).out.is_empty());
    let process = running.exec(find).out.trim().to_owned();
    for attack in [
        format!("echo x >> {process}/exe"),
        format!("echo x > {process}/exe"),
        format!("exec 3< {process}/exe; echo x >> /proc/self/fd/3"),
        // After its end the kernel does not say that the file is busy any more.
        format!("exec 3< {process}/exe; kill -9 ${{x#/proc/}}; sleep 1; echo x >> /proc/self/fd/3")
            .replace("${x#/proc/}", process.trim_start_matches("/proc/")),
    ] {
        let said = running.exec(&attack);
        assert!(said.code != 0 && said.err.contains("denied"), "{attack}: {said:?}");
    }
    assert!(!hanging.is_running() || hanging.within(LONG).is_some());
    assert!(fs::read(&runtime).unwrap() == before, "{} was written", runtime.display());
}

/// With the bug: a directory of the host's is the working directory, and its files are above it.
#[test]
fn cve_2024_21626_no_descriptor_of_ours_is_a_working_directory() {
    let machine = Machine::start();
    for fd in 3..20 {
        let name = format!("c{fd}");
        let script = "cat ../../../../etc/hostname ../../../../proc/version; ls -d ../../../../bin/busybox";
        let bundle = machine.bundle(&name, &["/bin/sh", "-c", script]);
        bundle.edit(|config| config["process"]["cwd"] = json!(format!("/proc/self/fd/{fd}")));
        let said = machine.run(&bundle, &name);
        let host = fs::read_to_string("/etc/hostname").unwrap_or_else(|_| SECRET.to_owned());
        assert!(said.code != 0 || !said.out.contains(host.trim()), "{fd}: {said:?}");
        // What starts at all starts inside.
        assert!(said.out.is_empty() || said.out.contains("../../../../bin/busybox"), "{fd}: {said:?}");
    }
}

/// Stops the process that an exec is about to become, from inside; tells its pid in `/caught`.
const CATCHER: &str = "while :; do for p in /proc/[0-9]*; do \
    read c < $p/comm && case \"$c\" in youki*) kill -STOP ${p#/proc/}; read c < $p/comm; \
    case \"$c\" in youki*) echo ${p#/proc/} > /caught; while :; do sleep 100; done;; *) kill -CONT ${p#/proc/};; esac;; esac; \
    done 2>/dev/null; done";

/// With the bug of CVE-2016-9962: its descriptors, its program or its memory can be opened. With the other one (every
/// runtime had it): the engine waits for ever.
#[test]
fn cve_2016_9962_a_half_made_exec_shows_nothing_and_holds_nobody() {
    let machine = Machine::start();
    let bundle = machine.bundle("b", &["/bin/sh", "-c", CATCHER]);
    let running = machine.run_detached(&bundle, "c");
    let mut held = None;
    for _ in 0..200 {
        let mut exec = machine.later(&["exec", "c", "/bin/true"]);
        let (mut tries, caught) = (0, bundle.rootfs().join("caught"));
        while exec.is_running() && tries < 500 {
            std::thread::sleep(Duration::from_millis(2));
            tries += 1;
        }
        if caught.exists() && exec.is_running() {
            held = Some(exec);
            break;
        }
        exec.within(LONG).unwrap();
    }
    let held = held.expect("none of 200 execs was caught");
    let pid = fs::read_to_string(bundle.rootfs().join("caught")).unwrap().trim().to_owned();
    // By a process that was there before: the next exec would be as good a victim, but is not stopped.
    for attack in [
        format!("ls /proc/{pid}/fd/"),
        format!("/bin/busybox readlink /proc/{pid}/exe"),
        format!("/bin/busybox readlink /proc/{pid}/cwd"),
        format!("ls /proc/{pid}/root/"),
        format!("cat /proc/{pid}/environ"),
        format!("cat /proc/{pid}/maps"),
        format!(": < /proc/{pid}/mem"),
        format!("/bin/busybox nsenter -t {pid} -m true"),
    ] {
        let said = running.exec(&attack);
        assert!(said.code != 0 && said.out.is_empty(), "{attack}: {said:?}");
    }
    let said = held.within(LONG).expect("the exec waits for ever");
    assert_eq!(said.code, 255, "{said:?}");
    assert!(said.err.contains("not within 30 s") && said.err.contains("hint:"), "{said:?}");
    assert_eq!(said.err.trim_end().lines().count(), 1, "{said:?}");
    assert_ne!(running.exec(&format!("ls -d /proc/{pid}")).code, 0, "it was left behind");
    let left = fs::read_dir(machine.path("root/c")).unwrap().flatten();
    assert!(left.into_iter().all(|entry| !entry.file_name().to_string_lossy().starts_with("exec-")));
}

/// A process of the host's with exactly this pid, in a user namespace of its own: the least an exec must not enter.
fn impostor(pid: i64) -> Option<Child> {
    let next = Path::new("/proc/sys/kernel/ns_last_pid");
    for _ in 0..2000 {
        fs::write(next, (pid - 1).to_string()).expect("need: CAP_SYS_ADMIN");
        let mut child = Command::new("unshare")
            .args(["-U", "-r", "-m", "-n", "-i", "-u", "-C", "-p", "-T", "sleep", "1000"])
            .stdin(Stdio::null())
            .spawn()
            .expect("need: unshare (util-linux)");
        if i64::from(child.id()) == pid {
            return Some(child);
        }
        child.kill().unwrap();
        child.wait().unwrap();
    }
    None
}

/// With the bug: the program runs in the other process's namespaces, with its root.
#[test]
fn an_exec_does_not_enter_a_process_that_took_inits_pid() {
    let machine = Machine::start();
    let bundle = sleeper(&machine, "b");
    let running = machine.run_detached(&bundle, "c");
    let pid = running.pid();
    // A console socket whose queue is full: the exec waits at it, having looked at init.
    let console = machine.path("console");
    let listener = std::os::unix::net::UnixListener::bind(&console).unwrap();
    nix::sys::socket::listen(&listener, nix::sys::socket::Backlog::new(0).unwrap()).unwrap();
    let _filler = std::os::unix::net::UnixStream::connect(&console).unwrap();
    let proof = machine.path("entered");
    let (console, script) = (console.display().to_string(), format!("echo x > {}", proof.display()));
    let mut exec = machine.later(&[
        "exec",
        "--detach",
        "--tty",
        "--console-socket",
        &console,
        "c",
        "/bin/sh",
        "-c",
        &script,
    ]);
    std::thread::sleep(Duration::from_millis(300));
    assert!(exec.is_running());
    let init = nix::unistd::Pid::from_raw(i32::try_from(pid).unwrap());
    nix::sys::signal::kill(init, nix::sys::signal::Signal::SIGKILL).unwrap();
    eventually("init is reaped", || !Path::new(&format!("/proc/{pid}")).exists());
    let taken = impostor(pid);
    for _ in 0..2 {
        drop(listener.accept());
    }
    let said = exec.within(LONG).unwrap();
    let mut taken = taken.expect("nobody got the pid in 2000 tries");
    taken.kill().unwrap();
    taken.wait().unwrap();
    assert_eq!(said.code, 255, "{said:?}");
    assert!(said.err.contains("has ended"), "{said:?}");
    assert!(!proof.exists());
}

/// With the bug (CVE-2019-19921, 2023-27561, 2023-28642, 2024-45310, 2025-31133, 2025-52565, crun 2026-47766): what is
/// made or mounted at such a place is made or mounted in the canary, or the canary's file is read inside.
#[test]
fn cve_2025_31133_links_in_an_image_lead_nowhere() {
    let machine = Machine::start();
    let canary = Canary::of(&machine);
    let places = [
        "proc",
        "sys",
        "dev",
        "dev/pts",
        "dev/shm",
        "dev/console",
        "dev/null",
        "dev/net",
        "dev/fuse",
        "dev/.lxc",
        "proc/meminfo",
        "sys/fs",
        "var/lib/docker",
        "given",
        "masked",
        "frozen",
        "cwd",
        "etc/passwd",
    ];
    let targets = [
        canary.0.display().to_string(),
        format!("../../../../../../../../..{}", canary.0.display()),
        format!("/proc/self/fd/../../../..{}", canary.0.display()),
        "/proc/1/root".to_owned(),
        "/proc/self/exe".to_owned(),
    ];
    for (at, place) in places.iter().enumerate() {
        for (nr, target) in targets.iter().enumerate() {
            let name = format!("c{at}-{nr}");
            let script = "cat /proc/secret /sys/secret /dev/secret /given/secret /masked/secret /cwd/secret /etc/passwd; \
                          cat ./secret; echo y > /given/y; echo y > /masked/y; echo y > /frozen/y; echo y > /cwd/y; :";
            let bundle = machine.bundle(&name, &["/bin/sh", "-c", script]);
            let link = bundle.rootfs().join(place);
            fs::create_dir_all(link.parent().unwrap()).unwrap();
            symlink(target, &link).unwrap();
            let volume = machine.path(&format!("{name}-volume"));
            fs::create_dir(&volume).unwrap();
            bundle.mount("/given/deep/er", &volume, &["rbind", "ro"]);
            bundle.edit(|config| {
                config["process"]["cwd"] = json!("/cwd");
                config["linux"]["maskedPaths"] = json!(["/masked", "/masked/secret", "/proc/meminfo"]);
                config["linux"]["readonlyPaths"] = json!(["/frozen", "/frozen/secret", "/proc/bus"]);
                if place.starts_with("dev/") {
                    // Over the image's own /dev, not a fresh one.
                    let mounts = config["mounts"].as_array_mut().unwrap();
                    mounts.retain(|mount| !mount["destination"].as_str().unwrap().starts_with("/dev"));
                }
            });
            let said = machine.run(&bundle, &name);
            let attack = format!("{place} -> {target}: {said:?}");
            assert!(!said.out.contains(SECRET), "{attack}");
            canary.is_untouched(&attack);
            fs::remove_dir_all(&bundle.dir).unwrap();
        }
    }
}

/// With the bug: a mount point is made in the canary, or the volume is mounted over it.
#[test]
fn cve_2021_30465_a_directory_exchanged_for_a_link_leads_nowhere() {
    let machine = Machine::start();
    let canary = Canary::of(&machine);
    let volume = machine.path("volume");
    fs::create_dir(&volume).unwrap();
    let bundle = machine.bundle("b", &["/bin/ls", "/x/below", "/x/locked"]);
    let (dir, link) = (bundle.rootfs().join("x"), bundle.rootfs().join("y"));
    fs::create_dir(&dir).unwrap();
    symlink(&canary.0, &link).unwrap();
    bundle.mount("/x/below", &volume, &["rbind"]);
    bundle.mount("/x/below/again", &volume, &["rbind", "ro"]);
    bundle.mount("/x/locked", &volume, &["rbind", "ro"]);
    bundle.edit(|config| {
        config["linux"]["maskedPaths"] = json!(["/x/secret", "/x"]);
        config["linux"]["readonlyPaths"] = json!(["/x/secret"]);
    });
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let exchange = nix::fcntl::RenameFlags::RENAME_EXCHANGE;
            while !over.load(Ordering::Relaxed) {
                // It fails while the directory is a mount point somewhere; that is part of the game.
                let _busy =
                    nix::fcntl::renameat2(nix::fcntl::AT_FDCWD, &dir, nix::fcntl::AT_FDCWD, &link, exchange);
            }
        });
        for round in 0..40 {
            let said = machine.run(&bundle, &format!("c{round}"));
            assert!(!said.out.contains("secret"), "{said:?}");
            canary.is_untouched(&format!("{round}: {said:?}"));
        }
        over.store(true, Ordering::Relaxed);
    });
}

/// With the bug: what we mean to write to the kernel ends in the attacker's file, and the kernel never hears of it.
#[test]
fn cve_2025_52881_what_is_written_to_proc_reaches_the_kernel() {
    let machine = Machine::start();
    let volume = machine.path("volume");
    fs::create_dir_all(volume.join("ipv4")).unwrap();
    fs::write(volume.join("ipv4/ip_forward"), "7").unwrap();
    let script =
        "/bin/busybox umount -l /proc/sys/net 2>/dev/null; cat /dev/.lxc/proc/sys/net/ipv4/ip_forward";
    for (name, destination) in [("plain", "/proc/sys/net"), ("link", "/way/net"), ("self", "/proc/self/attr")]
    {
        let bundle = machine.bundle(name, &["/bin/sh", "-c", script]);
        symlink("/proc/sys", bundle.rootfs().join("way")).unwrap();
        bundle.mount(destination, &volume, &["rbind"]);
        bundle.edit(|config| config["linux"]["sysctl"] = json!({"net.ipv4.ip_forward": "1"}));
        let said = machine.run(&bundle, name);
        assert!(said.code != 0 || said.out == "1\n", "{name}: {said:?}");
        assert_eq!(fs::read_to_string(volume.join("ipv4/ip_forward")).unwrap(), "7", "{name}: {said:?}");
    }
}

/// With the bug (CVE-2022-24769, 2022-29162, 2022-27650): a program that another user runs gets what only root had.
#[test]
fn cve_2022_24769_nothing_is_inherited() {
    let machine = Machine::start();
    let bundle = sleeper(&machine, "b");
    let running = machine.run_detached(&bundle, "c");
    let (own, other) = (["exec", "c"], ["exec", "--user", "5:5", "c"]);
    for call in [&own[..], &other] {
        let status = machine.runc(&[call, &["/bin/cat", "/proc/self/status"]].concat()).ok();
        assert!(status.contains("CapInh:\t0000000000000000") && status.contains("CapAmb:\t0000000000000000"));
    }
    assert!(running.exec("cat /proc/1/status").ok().contains("CapInh:\t0000000000000000"));
}

/// With the bug: the program named there runs as root of the host when the last process of a cgroup ends.
#[test]
fn cve_2022_0492_no_release_agent_and_no_way_out_of_the_cgroup() {
    let machine = Machine::start();
    let bundle = sleeper(&machine, "b");
    bundle.edit(|config| config["linux"]["resources"]["memory"] = json!({"limit": 64 << 20}));
    let running = machine.run_detached(&bundle, "c");
    let before = running.exec("cat /proc/1/cgroup").ok();
    for attack in [
        "for f in /sys/fs/cgroup/*/release_agent /sys/fs/cgroup/release_agent; do [ -e $f ] && echo /evil > $f && exit 0; done; exit 1",
        "for f in /sys/fs/cgroup/*/notify_on_release; do [ -e ${f%/*}/release_agent ] && echo 1 > $f && exit 0; done; exit 1",
        "mkdir /m; for t in memory rdma cpu pids; do mount -t cgroup -o $t x /m && echo /evil > /m/release_agent && exit 0; umount /m; done; exit 1",
        "/bin/busybox unshare -U -r -m /bin/sh -c 'mkdir -p /m; mount -t cgroup -o memory x /m && echo /evil > /m/release_agent'",
        "for f in /sys/fs/cgroup/memory/memory.limit_in_bytes /sys/fs/cgroup/memory.max; do [ -e $f ] && echo -1 > $f && exit 0; done; exit 1",
        "for d in /sys/fs/cgroup/*/.. /sys/fs/cgroup/*/../..; do [ -e $d/cgroup.procs ] && echo $$ > $d/cgroup.procs && exit 0; done; exit 1",
    ] {
        let said = running.exec(attack);
        assert_ne!(said.code, 0, "{attack}: {said:?}");
    }
    assert_eq!(running.exec("cat /proc/1/cgroup").ok(), before);
}

/// With the bug (CRI-O, CVE-2022-0811): a setting that is the host's changes with a container's.
#[test]
fn cve_2022_0811_a_sysctl_is_one_namespaced_setting() {
    let machine = Machine::start();
    let core = Path::new("/proc/sys/kernel/core_pattern");
    let before = fs::read_to_string(core).unwrap();
    for (name, key, value) in [
        ("plain", "kernel.core_pattern", "|/evil"),
        ("slash", "kernel/core_pattern", "|/evil"),
        ("up", "net/../kernel/core_pattern", "|/evil"),
        ("dots", "net.ipv4....kernel.core_pattern", "|/evil"),
        ("two", "kernel.shm_rmid_forced", "1+kernel.core_pattern=|/evil"),
        ("line", "kernel.shm_rmid_forced", "1\nkernel.core_pattern=|/evil"),
    ] {
        let bundle = machine.bundle(name, &["/bin/true"]);
        bundle.edit(|config| config["linux"]["sysctl"] = json!({ key: value }));
        let said = machine.run(&bundle, name);
        // Of a value with more in it the kernel takes what it can read.
        assert!(said.code != 0 || key == "kernel.shm_rmid_forced", "{key}: {said:?}");
        assert_eq!(fs::read_to_string(core).unwrap(), before, "{key}");
    }
}

/// With the bug: a device of the host's is opened through a node that came with the image, or that root made.
#[test]
fn a_device_node_in_an_image_opens_nothing() {
    let machine = Machine::start();
    let bundle = sleeper(&machine, "b");
    // Everyone may open /dev/loop-control, by its mode and as the kernel sees it; only the node stands between.
    for (name, kind, numbers) in
        [("loops", "c", ["10", "237"]), ("disk", "b", ["7", "0"]), ("memory", "c", ["1", "1"])]
    {
        let node = bundle.rootfs().join(name);
        assert!(
            Command::new("mknod")
                .args(["-m", "666"])
                .arg(&node)
                .arg(kind)
                .args(numbers)
                .status()
                .unwrap()
                .success()
        );
    }
    let running = machine.run_detached(&bundle, "c");
    for attack in [
        ": < /loops",
        ": < /disk",
        ": < /memory",
        "/bin/busybox mknod /x c 10 237",
        "mkdir -p /t; mount -t tmpfs t /t; /bin/busybox mknod /t/x c 10 237 && : < /t/x",
    ] {
        let said = running.exec(attack);
        assert!(said.code != 0, "{attack}: {said:?}");
    }
    running.exec(": < /dev/null").ok();
}

/// With the bug (NVIDIA's toolkit, CVE-2025-23266): what the image says is loaded into a program that runs as root of the
/// host.
#[test]
fn cve_2025_23266_hooks_have_nothing_of_the_images_environment() {
    let machine = Machine::start();
    let bundle = machine.bundle("b", &["/bin/true"]);
    let seen = machine.path("seen");
    bundle.edit(|config| {
        config["process"]["env"] = json!(["PATH=/bin", "LD_PRELOAD=/evil.so", "EVIL=1"]);
        let hook = |name: &str| {
            let script = format!("cat > /dev/null; echo {name}; env");
            json!([{"path": "/bin/sh", "args": ["sh", "-c", format!("{{ {script}; }} >> {}", seen.display())]}])
        };
        let times = ["prestart", "createRuntime", "poststart", "poststop"];
        config["hooks"] = times.iter().map(|name| ((*name).to_owned(), hook(name))).collect();
    });
    machine.run(&bundle, "c").ok();
    let text = fs::read_to_string(&seen).unwrap();
    for time in ["prestart", "createRuntime", "poststart", "poststop"] {
        assert!(text.lines().any(|line| line == time), "{time} did not run: {text}");
    }
    assert!(!text.contains("evil.so") && !text.contains("EVIL"), "{text}");
}
