//! Where inner engines keep their data, when that is not the container's own layer: managed volumes, and places that the image
//! has chosen.
#![allow(clippy::unwrap_used)] // all of it is tests; the lint's exception misses their helpers

use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::PathBuf;

use sysbox_tests::engine::{
    BUSYBOX, Container, DEBIAN, INNER_IMAGE, bed, docker, files_named_after, unique, until,
};

fn machine(options: &[&str], image: &str) -> Container {
    let options = [&["--stop-signal", "TERM"], options].concat();
    let machine = Container::start(&options, image, &["dockerd"]);
    wait_for_inner_engine(&machine);
    machine
}

fn wait_for_inner_engine(machine: &Container) {
    until("the inner engine to answer", || {
        assert_eq!(machine.inspect("{{.State.Running}}"), "true", "{:#?}", machine.docker(&["logs"]));
        (machine.try_sh("docker version").code == 0).then_some(())
    });
}

fn volumes_of(container: &Container) -> Vec<PathBuf> {
    files_named_after(&bed().data_root.join("volumes"), &container.id())
}

/// An image of the bed's engine, made of a few lines and removed when this is dropped.
struct Image(String);

impl Image {
    fn of(lines: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("Dockerfile"), lines).unwrap();
        let name = unique("image");
        docker(["build".as_ref(), "-qt".as_ref(), name.as_ref(), dir.path().as_os_str()]).ok();
        Self(name)
    }
}

impl Drop for Image {
    fn drop(&mut self) {
        let said = docker(["image", "rm", "-f", &self.0]);
        assert!(said.code == 0 || std::thread::panicking(), "{said:#?}");
    }
}

#[test]
fn a_volume_stays_over_a_stop_and_goes_with_its_container() {
    // Read-only by itself is reason enough; the engine writes its key to /etc/docker.
    for options in [vec!["--read-only", "--tmpfs", "/etc/docker"], vec!["-e", "SYSBOX_DATA_ROOT=volume"]] {
        let machine = machine(&options, DEBIAN);
        assert_eq!(machine.sh("docker info -f '{{.Driver}}'"), "overlay2", "{options:?}");
        machine.sh(&format!(
            "docker import {INNER_IMAGE} busybox && docker run --name kept busybox sh -c 'echo hi >/said'"
        ));
        let [volume] = &volumes_of(&machine)[..] else { panic!("{:?}", volumes_of(&machine)) };
        for path in [volume.clone(), volume.join("var-lib-containerd")] {
            let facts = std::fs::metadata(&path).unwrap();
            assert_eq!(facts.permissions().mode() & 0o7777, 0o700, "{path:?}");
            // Shifted by the mount, not on disk.
            assert_eq!((facts.uid(), facts.gid()), (0, 0), "{path:?}");
        }
        assert_eq!(std::fs::metadata(volume.join("var-lib-docker/overlay2")).unwrap().uid(), 0);
        assert!(!machine.upper().join("var/lib/docker/overlay2").exists());
        machine.docker(&["restart"]).ok();
        wait_for_inner_engine(&machine);
        assert_eq!(machine.sh("docker cp kept:/said - | tar -xO"), "hi");
        machine.docker(&["stop"]).ok();
        assert!(volume.join("var-lib-docker/overlay2").is_dir());
        // An image has none of it.
        let image = unique("image");
        docker(["commit", &machine.name, &image]).ok();
        let image = Image(image);
        let said = Container::run(&["-e", "SYSBOX_DATA_ROOT=layer"], &image.0, &["ls", "/var/lib/docker"]);
        assert_eq!(said.ok(), "");
        machine.docker(&["rm", "-f"]).ok();
        until("the volume to go", || (!volume.exists()).then_some(()));
    }
    // What could not be started has left nothing, once it is removed.
    let (failed, arguments) =
        Container::prepare(&["run"], &["-e", "SYSBOX_DATA_ROOT=volume"], BUSYBOX, &["/no/such"]);
    docker(arguments).refused();
    let volumes = volumes_of(&failed);
    failed.docker(&["rm", "-f"]).ok();
    until("its volumes to go", || volumes.iter().all(|volume| !volume.exists()).then_some(()));
}

#[test]
fn a_volume_has_what_the_image_and_the_engine_put_there() {
    let image = Image::of(&format!(
        "FROM {BUSYBOX}\nRUN mkdir -p /var/lib/docker/volumes/v && echo image >/var/lib/docker/volumes/v/file && chown 5:6 /var/lib/docker/volumes/v/file\n"
    ));
    let container = Container::created(&image.0, &["-e", "SYSBOX_DATA_ROOT=volume"]);
    let own = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(own.path(), "own").unwrap();
    let target = format!("{}:/var/lib/docker/own", container.name);
    docker(["cp".as_ref(), own.path().as_os_str(), target.as_ref()]).ok();
    container.docker(&["start"]).ok();
    let look = "cd /var/lib/docker; cat volumes/v/file own; stat -c %u:%g volumes/v/file";
    assert_eq!(container.sh(look), "image\nown5:6");
    // Once: what is deleted stays deleted.
    container.sh("rm /var/lib/docker/volumes/v/file");
    container.docker(&["restart"]).ok();
    assert_eq!(container.sh("ls /var/lib/docker/volumes/v"), "");
}

#[test]
fn a_data_root_that_the_image_has_moved_is_one() {
    let moved = |path: &str| {
        let settings =
            format!("mkdir -p /etc/docker && echo '{{\"data-root\": \"{path}\"}}' >/etc/docker/daemon.json");
        Image::of(&format!("FROM {DEBIAN}\nRUN {settings}; ln -s /usr /link\n"))
    };
    let image = moved("/srv/inner/docker");
    let machine = machine(&[], &image.0);
    assert_eq!(machine.sh("docker info -f '{{.Driver}} {{.DockerRootDir}}'"), "overlay2 /srv/inner/docker");
    machine.sh(&format!("docker import {INNER_IMAGE} busybox && docker run --name kept busybox true"));
    // It is carried like any other.
    let name = unique("image");
    docker(["commit", &machine.name, &name]).ok();
    let carried = Image(name);
    assert!(machine.upper().join("srv/inner/docker/.sysbox-carried").symlink_metadata().is_err());
    let said = Container::run(
        &[],
        &carried.0,
        &["sh", "-c", "ls /srv/inner/docker/image; stat -f -c %T /srv/inner/docker"],
    );
    let said = said.ok();
    assert!(said.starts_with("overlay2\n") && !said.ends_with("overlayfs"), "{said}");

    for (path, why) in [
        ("/proc/docker", "the kernel's own file systems are there"),
        ("/var/lib", "it holds other data roots"),
        ("srv", "it is not an absolute path"),
        ("/link/docker", "the image has a link or a file there, or on the way"),
    ] {
        let image = moved(path);
        let said = Container::run(&[], &image.0, &["true"]).refused();
        let expected = format!(
            "data root {path}, which /etc/docker/daemon.json of the image names, cannot be one: {why}"
        );
        assert!(said.contains(&expected), "{said}");
        // With a volume there it is the user's word that counts.
        if path.starts_with("/proc") || path == "srv" {
            continue;
        }
        let mount = format!("type=tmpfs,destination={path}");
        assert_eq!(Container::run(&["--mount", &mount], &image.0, &["echo", "fine"]).ok(), "fine", "{path}");
    }
}
