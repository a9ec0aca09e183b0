//! Images that carry inner images: what an engine inside had is there in a container of the committed image, to the byte and
//! to the attribute, whichever engine's store it is in.
#![allow(clippy::unwrap_used)] // all of it is tests; the lint's exception misses their helpers

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use sysbox_tests::engine::{Container, DEBIAN, INNER_IMAGE, RUNTIME, docker, unique, until};

/// An image of ours in the bed's engine, removed when this is dropped: after the containers of it.
struct Image(String);

impl Drop for Image {
    fn drop(&mut self) {
        let said = docker(["image", "rm", "-f", &self.0]);
        assert!(said.code == 0 || std::thread::panicking(), "{said:#?}");
    }
}

fn commit(container: &Container) -> Image {
    let name = unique("image");
    docker(["commit", &container.name, &name]).ok();
    Image(name)
}

/// dockerd and a containerd of its own, started as services that need no init. An image of a running machine has its pid files.
const ENGINES: &str =
    "rm -rf /run/docker* /run/containerd; containerd >/var/log/containerd.log 2>&1 & exec dockerd";

fn machine(image: &str) -> Container {
    let machine = Container::start(&["--stop-signal", "TERM"], image, &["sh", "-c", ENGINES]);
    wait_for_engines(&machine);
    machine
}

fn wait_for_engines(machine: &Container) {
    until("the inner engines to answer", || {
        assert_eq!(machine.inspect("{{.State.Running}}"), "true", "{:#?}", machine.docker(&["logs"]));
        (machine.try_sh("docker version && ctr version").code == 0).then_some(())
    });
}

/// What the test runs inside, which is in no image.
fn bring_tools(machine: &Container) {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/images_carry/inside.py");
    // Not by `docker cp`, which is another test's.
    let mut copy =
        sysbox_tests::engine::docker_command(["exec", "-i", &machine.name, "sh", "-c", "cat >/inside.py"]);
    let said = copy.stdin(std::fs::File::open(script).unwrap()).output().unwrap();
    assert!(said.status.success(), "{said:?}");
}

/// Inner images of each store, and a container that has changed much.
/// (mount(8) of util-linux 2.39 and later hands options over in pieces of 255 bytes, which the layers of an image are longer than.)
const FILL: &str = r#"set -e; export LIBMOUNT_FORCE_MOUNT2=always
mkdir /root/base
tar -C /root/base -xf INNER
python3 /inside.py base /root/base
tar -C /root/base --xattrs --xattrs-include='*' --format=pax -cf /root/base.tar .
rm -r /root/base
docker import /root/base.tar base >/dev/null
mkdir -p /root/build
cat >/root/build/Dockerfile <<'END'
FROM base
RUN rm /kept/gone2 && rm -r /replaced && mkdir -m 711 /replaced && echo new >/replaced/both
RUN rm -r /emptied /deep/replaced && mkdir /emptied && chmod 705 /deep && touch -d '2001-02-03 04:05:06' /kept/old
END
DOCKER_BUILDKIT=0 docker build -t legacy /root/build >/root/legacy.log 2>&1 || { cat /root/legacy.log; exit 1; }
DOCKER_BUILDKIT=1 docker build -t kit /root/build >/root/kit.log 2>&1 || { cat /root/kit.log; exit 1; }
docker run -d --name changed legacy sleep 1000000 >/dev/null
python3 /inside.py change "$(docker inspect -f '{{.GraphDriver.Data.MergedDir}}' changed)"
docker save -o /root/saved.tar base legacy kit
ctr images import /root/saved.tar >/dev/null
ctr images ls -q | sort
top=$(ctr snapshots ls | awk '$NF == "Committed" {all[$1] = 1} NF == 3 {parents[$2] = 1} END {for (one in all) if (!(one in parents)) print one}' | sort | head -n 1)
ctr snapshots prepare changed "$top"
mkdir -p /mnt/changed
eval "$(ctr snapshots mounts /mnt/changed changed)"
python3 /inside.py change /mnt/changed
umount /mnt/changed
"#;

/// The manifest of what is mounted by a script on /mnt/look, which is an overlay that is not written to.
fn manifest(machine: &Container, mount: &str) -> Vec<String> {
    let script = format!(
        "set -e; export LIBMOUNT_FORCE_MOUNT2=always; mkdir -p /mnt/look; {mount}; python3 /inside.py manifest /mnt/look; umount /mnt/look"
    );
    machine.sh(&script).lines().map(str::to_owned).collect()
}

/// Mounts a layer of Docker's and all below it. Of an image all of it is in `LowerDir` or is the upper one.
fn of_docker(kind: &str, name: &str) -> String {
    let data = |what: &str| format!("docker {kind} inspect -f '{{{{.GraphDriver.Data.{what}}}}}' {name}");
    let (upper, lower) = (data("UpperDir"), data("LowerDir"));
    // `<no value>`: an image of one layer.
    format!(
        "u=$({upper}); l=$({lower} | grep -v '<no' || echo /none); mkdir -p /none; mount -t overlay look -o ro,userxattr,lowerdir=$u:$l /mnt/look"
    )
}

type Manifests = BTreeMap<String, Vec<String>>;

fn manifests(machine: &Container) -> Manifests {
    bring_tools(machine);
    let mut all = Manifests::new();
    for image in machine.sh("docker images --format '{{.Repository}}'").lines() {
        all.insert(format!("docker image {image}"), manifest(machine, &of_docker("image", image)));
    }
    for container in machine.sh("docker ps -a --format '{{.Names}}'").lines() {
        all.insert(
            format!("docker container {container}"),
            manifest(machine, &of_docker("container", container)),
        );
    }
    for snapshot in machine.sh("ctr snapshots ls | awk 'NR > 1 {print $1, $NF}'").lines() {
        let (key, kind) = snapshot.split_once(' ').unwrap();
        // A committed one cannot be mounted; what is prepared of it names its layers (and is not taken for garbage as a view is).
        let mount = if kind == "Committed" {
            format!(
                "mkdir -p /none; ctr snapshots prepare look {key} >/dev/null; \
                 l=$(ctr snapshots mounts /mnt/look look | sed 's/.*lowerdir=\\([^, ]*\\).*/\\1/'); ctr snapshots rm look; \
                 mount -t overlay look -o ro,userxattr,lowerdir=$l:/none /mnt/look"
            )
        } else {
            format!("eval \"$(ctr snapshots mounts /mnt/look {key})\"")
        };
        all.insert(format!("containerd snapshot {key}"), manifest(machine, &mount));
    }
    all
}

#[track_caller]
fn assert_same(before: &Manifests, after: &Manifests) {
    let names = |all: &Manifests| all.keys().cloned().collect::<Vec<_>>();
    assert_eq!(names(before), names(after));
    for (name, lines) in before {
        let is_in = |lines: &[String], line: &String| lines.contains(line);
        let other = &after[name];
        let missing: Vec<_> = lines.iter().filter(|line| !is_in(other, line)).take(5).collect();
        let new: Vec<_> = other.iter().filter(|line| !is_in(lines, line)).take(5).collect();
        assert!(missing.is_empty() && new.is_empty(), "{name}:\nwas {missing:#?}\nis {new:#?}");
        assert_eq!(lines, other, "{name}");
    }
}

#[test]
fn inner_images_are_carried_to_the_attribute() {
    let first = machine(DEBIAN);
    bring_tools(&first);
    println!("{}", first.sh(&FILL.replace("INNER", INNER_IMAGE)));
    let before = manifests(&first);
    // The manifests see what this is about.
    let changed = before["docker container changed"].join("\n");
    for word in [
        "user.with space=and",
        "system.posix_acl_default",
        "security.capability",
        "1234567890123456789",
        "mine/socket",
    ] {
        assert!(changed.contains(word), "{word}: {changed}");
    }
    assert!(!changed.contains("gone1") && !changed.contains("gone2") && changed.contains("gone3"));
    assert!(before.keys().filter(|name| name.starts_with("containerd")).count() >= 5, "{:?}", before.keys());

    let carried = commit(&first);
    let second = machine(&carried.0);
    assert_same(&before, &manifests(&second));
    assert_eq!(
        second.sh("docker run --rm kit sh -c 'ls /replaced /emptied; ls /kept'"),
        "/emptied:\n\n/replaced:\nboth\nboth\ngone1\ngone3\nhidden\nold"
    );
    // A stop, a start, and an image of the stopped one, in which something was deleted.
    second.sh("docker rm -f changed; docker rmi legacy; ctr snapshots rm changed");
    let fewer: Manifests = before
        .into_iter()
        .filter(|(name, _)| {
            !["docker container changed", "docker image legacy", "containerd snapshot changed"]
                .contains(&name.as_str())
        })
        .collect();
    let layers = |machine: &Container| machine.sh("ls /var/lib/docker/overlay2 | wc -l");
    let left = layers(&second);
    second.docker(&["stop"]).ok();
    second.docker(&["start"]).ok();
    wait_for_engines(&second);
    assert_same(&fewer, &manifests(&second));
    second.docker(&["stop"]).ok();
    let again = commit(&second);
    let third = machine(&again.0);
    assert_same(&fewer, &manifests(&third));
    assert_eq!(layers(&third), left);
    drop((first, second, third));
}

/// The legacy builder has no option for it: what the engine runs by default is what a RUN runs with. Told to the running
/// engine, and taken back when this is dropped.
struct DefaultRuntime {
    config: PathBuf,
    before: String,
}

impl DefaultRuntime {
    fn ours() -> Self {
        let programs = PathBuf::from(std::env::var("SYSBOX_BIN_DIR").unwrap());
        let config = programs.parent().unwrap().join("daemon.json");
        let before = std::fs::read_to_string(&config).unwrap();
        let guard = Self { config, before };
        guard.tell(RUNTIME);
        guard
    }

    /// A setting that is left out stays as it was: it has to be named.
    fn tell(&self, runtime: &str) {
        let mut config: serde_json::Value = serde_json::from_str(&self.before).unwrap();
        config["default-runtime"] = runtime.into();
        std::fs::write(&self.config, config.to_string()).unwrap();
        let pid = std::fs::read_to_string(config["pidfile"].as_str().unwrap()).unwrap();
        let pid = nix::unistd::Pid::from_raw(pid.trim().parse().unwrap());
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGHUP).unwrap();
        until("the engine to read its settings", || {
            (docker(["info", "-f", "{{.DefaultRuntime}}"]).ok() == runtime).then_some(())
        });
    }
}

impl Drop for DefaultRuntime {
    fn drop(&mut self) {
        self.tell("runc");
        std::fs::write(&self.config, &self.before).unwrap();
    }
}

#[test]
fn a_legacy_build_that_runs_an_engine_makes_an_image_with_inner_images() {
    let dir = tempfile::tempdir().unwrap();
    let script = format!(
        "(dockerd >/var/log/dockerd.log 2>&1 &) && until docker version >/dev/null 2>&1; do sleep 0.1; done \
         && docker import {INNER_IMAGE} busybox && docker run --name made busybox sh -c 'rm -r /tmp && mkdir -m 700 /tmp && echo hi >/tmp/said' \
         && docker commit made built && kill $(cat /run/docker.pid) && while [ -e /run/docker.pid ]; do sleep 0.1; done"
    );
    let dockerfile = format!(
        "FROM {DEBIAN}\nRUN {script}\nRUN rm /usr/share/sysbox/busybox.tar && ls /var/lib/docker/image\n"
    );
    std::fs::write(dir.path().join("Dockerfile"), dockerfile).unwrap();
    let image = Image(unique("image"));
    {
        let _default = DefaultRuntime::ours();
        docker(["build".as_ref(), "-t".as_ref(), image.0.as_ref(), dir.path().as_os_str()]).ok();
    }
    let machine = machine(&image.0);
    assert_eq!(machine.sh("docker images --format '{{.Repository}}' | sort"), "built\nbusybox");
    assert_eq!(machine.sh("docker run --rm built sh -c 'stat -c %a /tmp; cat /tmp/said'"), "700\nhi");
}
