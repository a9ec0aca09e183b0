//! The engines that a user has outside: each Docker of the table below, with its own containerd and shim, and the same
//! essentials with each. A row is a line. Two are tried every time; `make test-engines` tries all, and prints
//! docs/COMPATIBILITY.md from what came of it.
#![allow(clippy::unwrap_used)] // all of it is tests; the lint's exception misses their helpers

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use sysbox_ipc::mgr::Rootfs;
use sysbox_tests::compat::{self, Outcome};
use sysbox_tests::engine::{
    BUSYBOX, Container, DEBIAN, INNER_IMAGE, Volume, docker, record_of, remains_of, run_within, unique, until,
};
use sysbox_tests::host::{NO_NAMES, host_dir};

/// `ENGINE` and `ENGINE_STORE` of tests/bed/up.sh, the name on the page, and whether it is tried every time.
#[rustfmt::skip]
const ENGINES: &[(&str, &str, &str, bool)] = &[
    ("trixie", "",           "Docker of trixie",                false),
    ("trixie", "containerd", "Docker of trixie",                false),
    ("sid",    "",           "Docker of sid",                   false),
    ("sid",    "containerd", "Docker of sid",                   true),
    ("newest", "",           "Docker 29 (moby v2.0.0-beta.24)", false),
    ("newest", "containerd", "Docker 29 (moby v2.0.0-beta.24)", false),
];

/// `ENGINE_REMAP` of tests/bed/up.sh: ids that are neither Sysbox's nor the machine's.
const REMAP: (u32, u32) = (400_000_000, 65536);

/// As long as it takes to build the newest one.
const LONG: Duration = Duration::from_secs(1800);

const SECTION: &str = "Docker outside";

/// What is tried, in the words of the page.
type Essential = (&'static str, fn());

const ESSENTIALS: &[Essential] = &[
    ("run, exec, exit codes", runs),
    ("cp both ways, diff, export", copies),
    ("commit", commits),
    ("stop and start keep files and ids", comes_back),
    ("volumes with copy-up, binds", has_volumes),
    ("limits, update, stats, pause", is_limited),
    ("networks with names", has_names),
    ("an inner Docker runs a container", has_docker_inside),
    ("rm leaves nothing", leaves_nothing),
];

fn try_all(part: &str) {
    let version = docker(["version", "-f", "{{.Server.Version}}"]).ok();
    for (what, essential) in ESSENTIALS {
        let said = std::panic::catch_unwind(essential);
        let outcome = if said.is_ok() { Outcome::Ok } else { Outcome::Fails };
        compat::record(SECTION, part, &version, what, outcome, "see the log of the run");
        assert!(said.is_ok(), "Docker {version}, {part}: {what}");
    }
}

/// As with the parts inside, `SYSBOX_ENGINES` has all of them or those with it in their name.
fn is_wanted(part: &str, is_daily: bool) -> bool {
    match std::env::var("SYSBOX_ENGINES").as_deref() {
        Err(_) | Ok("") => is_daily,
        Ok("all") => true,
        Ok(text) => format!("{SECTION}: {part}").contains(text),
    }
}

#[test]
fn the_essentials_work_with_the_engine_of_the_bed() {
    let other = std::env::var("SYSBOX_OUTER");
    let part = other.clone().unwrap_or_else(|_| "Docker of this machine".to_owned());
    if other.is_ok() || is_wanted(&part, true) {
        try_all(&part);
    }
}

#[test]
fn the_essentials_work_with_other_engines() {
    for (engine, store, name, is_daily) in ENGINES {
        let part =
            if store.is_empty() { format!("{name}, overlay2") } else { format!("{name}, {store} store") };
        if is_wanted(&format!("{part} ({engine})"), *is_daily) {
            let bed = format!("{engine}{}", store.get(..1).unwrap_or_default());
            let settings = [("ENGINE", *engine), ("ENGINE_STORE", *store), ("SYSBOX_OUTER", part.as_str())];
            try_on_a_bed_of_its_own(&bed, &settings, [ESSENTIAL_TEST, IDS_TEST]);
        }
    }
}

#[test]
fn all_of_it_works_with_an_engine_that_remaps() {
    let part = "Docker of this machine, userns-remap";
    if !is_wanted(part, true) {
        return;
    }
    let ids = format!("{}:{}", REMAP.0, REMAP.1);
    try_on_a_bed_of_its_own(
        "remap",
        &[("ENGINE_REMAP", &ids), ("SYSBOX_OUTER", part)],
        [ESSENTIAL_TEST, IDS_TEST],
    );
}

#[test]
fn images_are_built_with_it_as_the_default_runtime() {
    try_on_a_bed_of_its_own(
        "build",
        &[("EXTRA_DOCKERD_ARGS", "--default-runtime sysbox-runc")],
        [BUILD_TEST, IDS_TEST],
    );
}

/// As Sysbox's own tests have it: a dockerd from 25 on has this variable.
#[test]
fn buildkit_runs_its_steps_by_it_when_told_to() {
    let dir = host_dir();
    let program = dir.path().join("runc-of-buildkit");
    let line = "#!/bin/sh\nexec /var/lib/sysbox-bed/buildkit/bin/sysbox-runc --run-dir /run/sysbox-buildkit \"$@\"\n";
    std::fs::write(&program, line).unwrap();
    std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).unwrap();
    let program = program.display().to_string();
    try_on_a_bed_of_its_own(
        "buildkit",
        &[("ENGINE", "sid"), ("DOCKER_BUILDKIT_RUNC_COMMAND", &program)],
        [BUILDKIT_TEST, IDS_TEST],
    );
}

const BUILDKIT_TEST: &str = "steps_of_buildkit_are_run_by_what_it_was_told";
const ESSENTIAL_TEST: &str = "the_essentials_work_with_the_engine_of_the_bed";
const IDS_TEST: &str = "the_ids_are_the_engines_or_ones_of_its_own";
const BUILD_TEST: &str = "a_build_has_the_owners_that_it_says";

/// By tests/bed/test.sh, which also takes the bed down and fails if that leaves anything.
fn try_on_a_bed_of_its_own(bed: &str, settings: &[(&str, &str)], tests: [&str; 2]) {
    let top = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let mut command = Command::new(top.join("tests/bed/test.sh"));
    // The environment of the bed that this test runs on is not the other one's.
    for (name, _) in
        std::env::vars().filter(|(name, _)| name.starts_with("SYSBOX_") || name.starts_with("DOCKER_"))
    {
        if name != "SYSBOX_COMPAT" {
            command.env_remove(name);
        }
    }
    let programs = std::env::var_os("SYSBOX_BIN_DIR").map(PathBuf::from).unwrap();
    command
        .env("BED", bed)
        .env("BIN_DIR", programs)
        .envs([("SKIP_BUILD", "1"), ("SKIP_INSTALL", "1"), ("SUITES", "bookworm")])
        .envs(settings.iter().copied())
        .arg(std::env::current_exe().unwrap())
        .args(tests)
        .args(["--exact", "--nocapture"]);
    let said = run_within(&mut command, LONG);
    assert!(said.code == 0 && said.out.contains("2 passed"), "{settings:?}: {said:#?}");
}

// ---- docker build ----

/// Each kind of step, by the builder whose steps are containers of the engine's default runtime.
const DOCKERFILE: &str = r#"FROM sysbox/debian:bookworm AS first
ARG WORD
ENV GREETING="hello $WORD"
WORKDIR /build/deep
RUN cat /proc/self/uid_map >/build/map; echo "$GREETING, $(id -u) in $(pwd)" >said
COPY file /build/file
COPY --chown=7:8 tree /build/tree
ADD owned.tar /build/owned/
RUN rm /build/tree/gone; rm -r /build/tree/again; mkdir -m 711 /build/tree/again; ln -s file /build/link; \
    mkfifo /build/fifo; chown 65534:40000 /build/fifo; cp /bin/true /build/special; chmod 6755 /build/special; \
    python3 -c 'import os; os.setxattr("/build/special", "security.capability", bytes.fromhex(os.environ["CAP"]))'
USER 1000:1001
RUN cd /tmp; id >mine; id
FROM sysbox/debian:bookworm
COPY --from=first /build /build
COPY --from=first --chown=9:9 /tmp/mine /build/mine
USER 12:13
WORKDIR /build/tree
CMD ["sh", "-c", "id -u; id -g; pwd"]
"#;

/// CAP_NET_RAW for all, as `setcap cap_net_raw=ep` of the host's root writes it.
const CAP: &str = "0100000200200000000000000000000000000000";

/// By stat: what each file of the image is to be for who looks at it in a container.
const BUILT: &str = "./deep 0:0 755 directory
./deep/said 0:0 644 regular file
./fifo 65534:40000 644 fifo
./file 0:0 644 regular file
./link 0:0 777 symbolic link
./map 0:0 644 regular file
./mine 9:9 644 regular file
./owned 0:0 755 directory
./owned/kept 5:6 644 regular file
./special 0:0 6755 regular file
./tree 7:8 755 directory
./tree/again 0:0 711 directory
./tree/kept 7:8 644 regular file
hello you, 0 in /build/deep
uid=1000 gid=1001 groups=1001";

#[test]
fn a_build_has_the_owners_that_it_says() {
    let dir = host_dir();
    let path = |name: &str| dir.path().join(name);
    std::fs::create_dir_all(path("tree/again")).unwrap();
    for name in ["file", "tree/kept", "tree/gone", "tree/again/old"] {
        std::fs::write(path(name), name).unwrap();
    }
    std::os::unix::fs::chown(path("tree/kept"), Some(3), Some(3)).unwrap();
    let words = ["--owner=5", "--group=6", "-C", &path("tree").display().to_string(), "-cf"];
    run_within(Command::new("tar").args(words).arg(path("owned.tar")).arg("kept"), LONG).ok();
    std::fs::write(path("Dockerfile"), DOCKERFILE.replace("os.environ[\"CAP\"]", &format!("\"{CAP}\"")))
        .unwrap();

    let image = unique("image");
    let build =
        || docker(["build", "-t", &image, "--build-arg", "WORD=you", &dir.path().display().to_string()]);
    let said = build().ok();
    assert!(said.contains("uid=1000 gid=1001"), "{said}");
    assert!(build().ok().matches("Using cache").count() >= 10);

    let asked = std::env::var("EXTRA_DOCKERD_ARGS").unwrap_or_default();
    let is_default = docker(["info", "-f", "{{.DefaultRuntime}}"]).ok() == sysbox_tests::engine::RUNTIME;
    assert_eq!(is_default, asked.contains("--default-runtime sysbox-runc"), "{asked}");
    let map = docker(["run", "--rm", "--runtime", "runc", &image, "cat", "/build/map"]).ok();
    let host = map.split_whitespace().nth(1).unwrap().parse::<u32>().unwrap();
    assert_eq!(host != 0, is_default, "{map}");
    for runtime in ["runc", sysbox_tests::engine::RUNTIME] {
        let run = |words: &[&str]| docker([&["run", "--rm", "--runtime", runtime], words].concat()).ok();
        assert_eq!(run(&[&image]), "12\n13\n/build/tree", "{runtime}");
        let listed =
            "cd /build; find . ! -name . | sort | xargs stat -c '%n %u:%g %a %F'; cat deep/said mine";
        assert_eq!(run(&["-u", "0", &image, "sh", "-c", listed]), BUILT, "{runtime}");
        let cap = "import os; print(os.getxattr('/build/special', 'security.capability').hex())";
        assert_eq!(run(&[&image, "python3", "-c", cap]), CAP, "{runtime}");
    }
    std::fs::write(path("Dockerfile"), "FROM sysbox/busybox\nRUN exit 3\n").unwrap();
    assert!(build().refused().contains("returned a non-zero code: 3"));
    docker(["rmi", "-f", &image]).ok();
}

#[test]
fn steps_of_buildkit_are_run_by_what_it_was_told() {
    let (dir, image) = (host_dir(), unique("image"));
    let text = "FROM sysbox/debian:bookworm\nRUN cat /proc/self/uid_map >/map; chown 7:8 /map\nUSER 1000:1001\nRUN id >/tmp/mine\n";
    std::fs::write(dir.path().join("Dockerfile"), text).unwrap();
    // This machine's client, which brings BuildKit's along; that of newer releases is a package of its own.
    let mut command = Command::new("/usr/bin/docker");
    command.env("DOCKER_BUILDKIT", "1").args(["build", "--progress", "plain", "-t", &image]).arg(dir.path());
    run_within(&mut command, LONG).ok();
    for runtime in ["runc", sysbox_tests::engine::RUNTIME] {
        let look = "stat -c '%u:%g' /map /tmp/mine; cat /tmp/mine; cat /map";
        let said = docker(["run", "--rm", "--runtime", runtime, "-u", "0", &image, "sh", "-c", look]).ok();
        let (seen, map) = said.split_at(said.rfind("\n").unwrap());
        assert_eq!(seen, "7:8\n1000:1001\nuid=1000 gid=1001 groups=1001", "{runtime}");
        let is_mapped = map.split_whitespace().nth(1) != Some("0");
        assert_eq!(is_mapped, std::env::var("DOCKER_BUILDKIT_RUNC_COMMAND").is_ok(), "{map}");
    }
    docker(["rmi", "-f", &image]).ok();
}

// ---- the mappings of the engine ----

/// Whether the engine of this bed remaps.
fn remaps() -> bool {
    let asked = std::env::var("ENGINE_REMAP").unwrap_or_default();
    assert!(asked.is_empty() || asked == format!("{}:{}", REMAP.0, REMAP.1), "{asked}");
    !asked.is_empty()
}

/// What a volume's file has as its owner on the host.
fn on_disk(id: u32) -> u32 {
    if remaps() { REMAP.0 + id } else { id }
}

#[test]
fn the_ids_are_the_engines_or_ones_of_its_own() {
    let two = [Container::waiting(BUSYBOX, &[]), Container::waiting(BUSYBOX, &[])];
    let maps = two.each_ref().map(|one| {
        let map = |kind: &str| {
            let text = one.proc_file(&format!("{kind}_map"));
            text.split_whitespace().map(|word| word.parse::<u32>().unwrap()).collect::<Vec<_>>()
        };
        assert_eq!(map("uid"), map("gid"));
        map("uid")
    });
    if !remaps() {
        assert_ne!(maps[0], maps[1]);
        return;
    }
    assert_eq!(maps, [vec![0, REMAP.0, REMAP.1], vec![0, REMAP.0, REMAP.1]]);
    let [container, other] = two;
    let unmapped = Container::run(&["-u", "70000"], BUSYBOX, &["true"]).refused();
    assert!(unmapped.contains("uid 70000 is not mapped in the container (0 to 65535)"), "{unmapped}");
    drop(other);
    layers_belong_to_the_mapped_ids(&container);
    drop(container);
    sources_are_used_as_they_are();
    for (option, why) in [
        ("--privileged", "privileged mode is incompatible with user namespaces"),
        ("--userns=host", "it belongs to 400000000:400000000, who has no id in the container"),
    ] {
        let said = Container::run(&[option], BUSYBOX, &["true"]).refused();
        assert!(said.contains(why), "{option}: {said}");
    }
    // Nobody waits for a second side, which there is not.
    let log = PathBuf::from(std::env::var_os("SYSBOX_LOGS").unwrap()).join("sysbox-mgr.log");
    let log = std::fs::read_to_string(log).unwrap();
    assert!(log.contains(" INFO started ") && !log.contains("an engine was let go"), "{log}");
}

fn layers_belong_to_the_mapped_ids(container: &Container) {
    use sysbox_tests::host::owner;
    let (dir, layer) = (host_dir(), upper(container));
    let from = dir.path().join("in");
    std::fs::write(&from, "in").unwrap();
    docker(["cp", &from.display().to_string(), &format!("{}:/root/in", container.name)]).ok();
    let script = "stat -c %u:%g /root/in /; echo >/root/own; chown 7:8 /root/own; chmod 600 /root/own";
    assert_eq!(container.sh(script), "0:0\n0:0");
    assert_eq!(owner(&layer.join("root/in")), (REMAP.0, REMAP.0, 0o644));
    assert_eq!(owner(&layer.join("root/own")), (REMAP.0 + 7, REMAP.0 + 8, 0o600));
    let image = unique("image");
    docker(["commit", &container.name, &image]).ok();
    for runtime in ["runc", sysbox_tests::engine::RUNTIME] {
        let words =
            ["run", "--rm", "--runtime", runtime, &image, "stat", "-c", "%u:%g", "/root/in", "/root/own"];
        assert_eq!(docker(words).ok(), "0:0\n7:8", "{runtime}");
    }
    docker(["rmi", "-f", &image]).ok();
}

/// As with runc: who remaps gives his directories to the mapped ids.
fn sources_are_used_as_they_are() {
    let dir = host_dir();
    for (name, id) in [("given", REMAP.0 + 5), ("hosts", 0)] {
        let path = dir.path().join(name);
        std::fs::create_dir(&path).unwrap();
        std::os::unix::fs::chown(&path, Some(id), Some(id)).unwrap();
    }
    let bind = format!("{}:/x", dir.path().display());
    for runtime in ["runc", sysbox_tests::engine::RUNTIME] {
        let script =
            "stat -c %u:%g /x/given /x/hosts; touch /x/given/new && rm /x/given/new; touch /x/hosts/new 2>&1";
        let said = docker(["run", "--rm", "--runtime", runtime, "-v", &bind, BUSYBOX, "sh", "-c", script]);
        assert_eq!((said.code, said.out.lines().count()), (1, 3), "{runtime}: {said:#?}");
        assert!(said.out.starts_with("5:5\n65534:65534\n"), "{runtime}: {said:#?}");
        assert!(said.out.contains("/x/hosts/new: Permission denied"), "{runtime}: {said:#?}");
    }
}

// ---- the essentials ----

/// The writable layer, which an engine with containerd's store does not tell.
fn upper(container: &Container) -> PathBuf {
    match container.record().unwrap().rootfs {
        Rootfs::Overlay { upper, .. } => upper,
        Rootfs::Directory { path } => panic!("{} is no overlay", path.display()),
    }
}

fn runs() {
    let said = Container::run(
        &["--rm", "-e", "A=b", "-h", "there"],
        BUSYBOX,
        &["sh", "-c", "echo $A; hostname; echo e >&2; exit 5"],
    );
    assert_eq!((said.code, said.out.as_str(), said.err.as_str()), (5, "b\nthere\n", "e\n"));
    assert_eq!(Container::run(&[], BUSYBOX, &["/nonexistent"]).code, 127);
    let container = Container::waiting(BUSYBOX, &[]);
    assert_eq!(
        container.exec(&["-u", "7:8", "-w", "/etc"], &["sh", "-c", "id -u; id -g; pwd"]).ok(),
        "7\n8\n/etc"
    );
    assert_eq!(container.exec(&[], &["sh", "-c", "exit 3"]).code, 3);
    assert_ne!(container.sh("awk '{print $2}' /proc/self/uid_map"), "0");
    assert_eq!(container.exec(&["-t"], &["tty"]).ok().trim_end(), "/dev/pts/0");
}

fn copies() {
    let dir = host_dir();
    let path = |name: &str| dir.path().join(name).display().to_string();
    std::fs::write(path("in"), "in").unwrap();
    let container = Container::waiting(BUSYBOX, &[]);
    let inside = |name: &str| format!("{}:{name}", container.name);
    docker(["cp", &path("in"), &inside("/root/in")]).ok();
    until("the copy to be seen", || (container.try_sh("cat /root/in").out == "in").then_some(()));
    container.sh("echo out >/root/out; rm /etc/group");
    until("it to be seen outside", || {
        let copied = docker(["cp", &inside("/root/out"), &path("out")]);
        (copied.code == 0 && std::fs::read_to_string(path("out")).ok()? == "out\n").then_some(())
    });
    until("the changes to be listed", || {
        let diff = docker(["diff", &container.name]).ok();
        let has = |line: &str| diff.lines().any(|other| other == line);
        (has("A /root/out") && has("A /root/in") && has("C /root") && has("D /etc/group")).then_some(())
    });
    docker(["export", "-o", &path("tar"), &container.name]).ok();
    let listed = run_within(Command::new("tar").args(["-tf", &path("tar")]), LONG).ok();
    assert!(listed.lines().any(|line| line == "root/out"), "{listed}");
}

fn commits() {
    let container = Container::waiting(BUSYBOX, &[]);
    container.sh("echo kept >/root/kept; chown 7:8 /root/kept; rm /etc/group");
    until("the engine to see it", || {
        docker(["diff", &container.name]).ok().contains("A /root/kept").then_some(())
    });
    let image = unique("image");
    docker(["commit", &container.name, &image]).ok();
    let said =
        Container::run(&[], &image, &["sh", "-c", "cat /root/kept; stat -c %u:%g /root/kept; ls /etc/group"]);
    assert_eq!((said.code, said.out.as_str()), (1, "kept\n7:8\n"), "{said:?}");
    docker(["rmi", "-f", &image]).ok();
}

fn comes_back() {
    let container = Container::waiting(BUSYBOX, &[]);
    container.sh("echo mine >/kept; chown 7:8 /kept");
    let before = container.sh("cat /proc/self/uid_map");
    container.docker(&["stop"]).ok();
    assert_eq!(container.inspect("{{.State.ExitCode}}"), "137");
    container.docker(&["start"]).ok();
    assert_eq!(
        container.sh("cat /kept; stat -c %u:%g /kept; cat /proc/self/uid_map"),
        format!("mine\n7:8\n{before}")
    );
    docker(["restart", "-t", "0", &container.name]).ok();
    assert_eq!(container.sh("cat /proc/self/uid_map"), before);
}

fn has_volumes() {
    let (volume, dir) = (Volume::new(), host_dir());
    std::fs::write(dir.path().join("file"), "of the host").unwrap();
    let options = [
        "-v",
        &format!("{}:/etc", volume.name),
        "-v",
        &format!("{}:/x:ro", dir.path().display()),
        "--mount",
        "type=tmpfs,target=/t,tmpfs-mode=700",
    ];
    let container = Container::waiting(BUSYBOX, &options);
    assert_eq!(
        container.sh("stat -c %u:%g /etc/group; cat /x/file; stat -c '%u %a' /t"),
        "0:0\nof the host0 700"
    );
    assert!(container.try_sh("touch /x/new").refused().contains("Read-only file system"));
    container.sh("touch /etc/new; chown 7:8 /etc/new; touch /t/new");
    assert_eq!(sysbox_tests::host::owner(&volume.path().join("new")), (on_disk(7), on_disk(8), 0o644));
    drop(container);
}

fn is_limited() {
    let container =
        Container::waiting(BUSYBOX, &["--memory", "64m", "--memory-swap", "64m", "--pids-limit", "50"]);
    let total = "awk '/^MemTotal:/ {print $2}' /proc/meminfo";
    assert_eq!(container.sh(total), "65536");
    docker(["update", "--memory", "96m", "--memory-swap", "96m", &container.name]).ok();
    assert_eq!(container.sh(total), "98304");
    let shown = docker(["stats", "--no-stream", "--format", "{{.MemUsage}}|{{.PIDs}}", &container.name]).ok();
    assert!(shown.ends_with(" / 96MiB|1"), "{shown}");
    docker(["pause", &container.name]).ok();
    assert_eq!(container.inspect("{{.State.Status}}"), "paused");
    docker(["unpause", &container.name]).ok();
    assert!(docker(["top", &container.name]).ok().contains("sleep 2147483647"));
}

fn has_names() {
    let network = unique("n");
    docker(["network", "create", &network]).ok();
    let server = Container::start(&["--network", &network], BUSYBOX, &["httpd", "-f", "-h", "/etc"]);
    let client = Container::waiting(BUSYBOX, &["--network", &network]);
    let fetch = format!("wget -qO- http://{}/group", server.name);
    until("the server to answer by name", || (client.try_sh(&fetch).out == "root:x:0:\n").then_some(()));
    drop((server, client));
    docker(["network", "rm", &network]).ok();
}

fn has_docker_inside() {
    let container = Container::start(&["--stop-signal", "TERM"], DEBIAN, &["dockerd"]);
    until("the inner engine to answer", || {
        assert_eq!(
            container.inspect("{{.State.Running}}"),
            "true",
            "{:#?}",
            container.docker(&["logs", "--tail", "30"])
        );
        (container.try_sh("docker version").code == 0).then_some(())
    });
    container.sh(&format!("docker import {INNER_IMAGE} busybox"));
    let script = "docker run --rm busybox echo inner; docker info -f '{{.Driver}}'";
    assert_eq!(container.sh(script), "inner\noverlay2");
    container.docker(&["stop"]).ok();
    container.docker(&["start"]).ok();
    until("the inner image to be there still", || {
        (container.try_sh("docker images -q busybox | wc -l").out == "1\n").then_some(())
    });
}

fn leaves_nothing() {
    let container = Container::waiting(BUSYBOX, &[]);
    let (id, upper) = (container.id(), upper(&container));
    container.docker(&["rm", "-f"]).ok();
    until("the record to go", || record_of(&id).is_none().then_some(()));
    // containerd collects what nobody refers to when it finds the time.
    until("the layer to go", || (!upper.exists()).then_some(()));
    until("all of it to go", || (remains_of(&id, &upper) == NO_NAMES).then_some(()));
}
