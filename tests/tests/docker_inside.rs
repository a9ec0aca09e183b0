//! Docker inside a system container: the Debian packages, unchanged, as they would be on a machine.
#![allow(clippy::unwrap_used)] // all of it is tests; the lint's exception misses their helpers

use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::Duration;

use sysbox_tests::engine::{
    BUSYBOX, Container, DEBIAN, INNER_IMAGE, Said, Volume, docker, record_of, remains_of, unique, until,
};

/// A container whose first process is dockerd, once that answers.
#[track_caller]
fn machine(options: &[&str]) -> Container {
    let options = [&["--stop-signal", "TERM"], options].concat();
    let container = Container::start(&options, DEBIAN, &["dockerd"]);
    wait_for_inner_engine(&container);
    container
}

#[track_caller]
fn wait_for_inner_engine(container: &Container) {
    until("the inner engine to answer", || {
        assert_eq!(
            container.inspect("{{.State.Running}}"),
            "true",
            "{:#?}",
            container.docker(&["logs", "--tail", "30"])
        );
        (container.try_sh("docker version").code == 0).then_some(())
    });
}

/// The inner `docker`.
#[track_caller]
fn inner(container: &Container, args: &[&str]) -> Said {
    container.exec(&[], &[&["docker"], args].concat())
}

#[track_caller]
fn import_busybox(container: &Container) {
    inner(container, &["import", INNER_IMAGE, "busybox"]).ok();
}

/// What a web server says to `GET /`.
fn get(address: &str) -> Option<String> {
    // What the first packet of a connection met is true for all of it: one that came before the rules is given up.
    let (address, patience) = (address.parse().expect("an address"), Duration::from_secs(3));
    let mut stream = TcpStream::connect_timeout(&address, patience).ok()?;
    stream.set_read_timeout(Some(patience)).ok()?;
    stream.write_all(b"GET / HTTP/1.0\r\n\r\n").ok()?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).ok()?;
    Some(answer.split_once("\r\n\r\n")?.1.to_owned())
}

#[test]
fn an_inner_engine_runs_builds_and_serves() {
    let outer = machine(&[]);
    assert_eq!(inner(&outer, &["info", "-f", "{{.Driver}}"]).ok(), "overlay2");
    import_busybox(&outer);

    // To the outside, through the inner NAT and the outer one: a server on the bed's bridge.
    let word = unique("outside");
    let serve = |word: &str| format!("echo {word} >/tmp/index.html; exec httpd -f -p 80 -h /tmp");
    let server = Container::start(&["--runtime", "runc"], BUSYBOX, &["sh", "-c", &serve(&word)]);
    let url = format!("http://{}/", server.address());
    let fetch = format!("timeout 10 wget -qO- {url}");
    // The server may not listen yet.
    let fetched = || inner(&outer, &["run", "--rm", "busybox", "sh", "-c", &fetch]);
    let said =
        until("the inner container to reach the outside", || Some(fetched()).filter(|said| said.code == 0));
    assert_eq!(said.out.trim_end(), word);

    // From the outside, by a published port.
    let word = unique("inside");
    inner(&outer, &["run", "-d", "--name", "web", "-p", "8080:80", "busybox", "sh", "-c", &serve(&word)])
        .ok();
    let address = format!("{}:8080", outer.address());
    assert_eq!(until("the published port to answer", || get(&address)).trim_end(), word);
    assert_eq!(outer.sh("busybox wget -qO- http://127.0.0.1:8080/"), word);

    // A later process, with and without a terminal.
    assert_eq!(inner(&outer, &["exec", "web", "cat", "/tmp/index.html"]).ok(), word);
    let tty = outer.exec(&["-t"], &["docker", "exec", "-t", "web", "tty"]);
    assert_eq!(tty.ok().trim_end(), "/dev/pts/0");
    // Inner containers have the machine's ids, and less of its rights.
    assert_eq!(
        inner(&outer, &["exec", "web", "cat", "/proc/self/uid_map"]).ok().split_whitespace().nth(2),
        Some("65536")
    );
    inner(&outer, &["exec", "web", "mount", "-t", "tmpfs", "x", "/tmp"]).refused();

    let script = "mount -t tmpfs x /mnt && echo x >/mnt/x && cat /mnt/x; ip link add b7 type bridge && ls -d /sys/class/net/b7";
    let script = format!("mkdir /mnt; {script}");
    let said = inner(&outer, &["run", "--rm", "--privileged", "busybox", "sh", "-c", &script]);
    assert_eq!(said.ok(), "x\n/sys/class/net/b7");

    // With an inner container still running, there is nothing left of it either.
    assert_eq!(inner(&outer, &["ps", "--format", "{{.Names}}"]).ok(), "web");
    let (id, upper) = (outer.id(), outer.upper());
    outer.docker(&["rm", "-fv"]).ok();
    until("the record to go", || record_of(&id).is_none().then_some(()));
    assert_eq!(remains_of(&id, &upper), Vec::<String>::new());
}

#[test]
fn a_machine_boots_with_systemd_and_docker() {
    let container = Container::start(&["--stop-signal", "SIGRTMIN+3"], DEBIAN, &[]);
    let state = || container.try_sh("systemctl is-system-running").out;
    let ended = |state: &String| ["running\n", "degraded\n"].contains(&state.as_str());
    let state = until("systemd to be done with its start", || Some(state()).filter(ended));
    assert_eq!(state, "running\n", "{}", container.sh("systemctl --failed --no-legend"));
    assert_eq!(
        container.sh("cat /proc/1/comm; systemctl is-active docker containerd dbus"),
        "systemd\nactive\nactive\nactive"
    );
    // A later process is where systemd went, which is a cgroup that it made.
    assert_eq!(container.sh("cat /proc/self/cgroup"), container.sh("cat /proc/1/cgroup"));
    assert_eq!(inner(&container, &["info", "-f", "{{.Driver}}"]).ok(), "overlay2");
    container.docker(&["stop"]).ok();
    // By itself (systemd's code for a halt), not killed after ten seconds.
    assert_eq!(container.inspect("{{.State.ExitCode}}"), "130");
    container.docker(&["start"]).ok();
    until("systemd to be up again", || {
        (container.try_sh("systemctl is-system-running").out == "running\n").then_some(())
    });
}

#[test]
fn an_inner_engine_limits_and_builds() {
    let outer = machine(&["--memory", "512m"]);
    import_busybox(&outer);

    let limit =
        "cat /sys/fs/cgroup/memory/memory.limit_in_bytes 2>/dev/null || cat /sys/fs/cgroup/memory.max";
    let limited = |script: &str| {
        inner(
            &outer,
            &["run", "--memory", "64m", "--memory-swap", "64m", "--rm", "busybox", "sh", "-c", script],
        )
    };
    assert_eq!(limited(limit).ok(), "67108864");
    assert_eq!(limited("dd if=/dev/zero of=/dev/null bs=96M count=1; exit $?").code, 137);
    assert_eq!(limited("dd if=/dev/zero of=/dev/null bs=16M count=1; exit $?").code, 0);

    let dockerfile = "FROM busybox
RUN mkdir -p /d/sub && touch /d/old /d/sub/old && echo someone:x:1234:1234::/:/bin/sh >>/etc/passwd
RUN rm /etc/group && rm -rf /d && mkdir /d && echo new >/d/new
USER someone
RUN echo mine >/tmp/mine
CMD ls /d; echo --; ls /etc; echo --; cat /tmp/mine; stat -c %u:%g /tmp/mine; id -u";
    outer.sh(&format!("mkdir /ctx && cat >/ctx/Dockerfile <<'END'\n{dockerfile}\nEND"));
    outer.sh("DOCKER_BUILDKIT=0 docker build -q -t built /ctx");
    let said = inner(&outer, &["run", "--rm", "built"]).ok();
    // The removed file does not come back, nor what the replaced directory had.
    let expected = "new\n--\nhostname\nhosts\nmtab\npasswd\nresolv.conf\n--\nmine\n1234:1234\n1234";
    assert_eq!(said, expected);
    // A container's changes over it, and as an image again.
    inner(
        &outer,
        &[
            "run",
            "--name",
            "changed",
            "-u",
            "0",
            "built",
            "sh",
            "-c",
            "rm /d/new; rm -rf /tmp; mkdir /tmp; touch /etc/made",
        ],
    )
    .ok();
    inner(&outer, &["commit", "changed", "again"]).ok();
    let said = inner(&outer, &["run", "--rm", "again", "sh", "-c", "ls /d /tmp; ls /etc/made"]);
    assert_eq!(said.ok(), "/d:\n\n/tmp:\n/etc/made");
}

#[test]
fn inner_images_stay_where_they_are_over_stop_and_start() {
    let outer = machine(&[]);
    import_busybox(&outer);
    inner(&outer, &["run", "--name", "kept", "busybox", "sh", "-c", "echo kept >/file"]).ok();
    let image = inner(&outer, &["inspect", "-f", "{{.Id}}", "busybox"]).ok();
    let file = inner(&outer, &["inspect", "-f", "{{.GraphDriver.Data.UpperDir}}/file", "kept"]).ok();
    let upper = outer.upper();
    // On the engine's disk, in the container's own layer; a copy would be another inode.
    let on_disk = upper.join(file.strip_prefix('/').unwrap());
    let inode =
        |path: &Path| fs::metadata(path).unwrap_or_else(|error| panic!("{}: {error}", path.display())).ino();
    let before = inode(&on_disk);
    outer.docker(&["stop"]).ok();
    assert_eq!(inode(&on_disk), before);
    assert_eq!(fs::read_to_string(&on_disk).unwrap(), "kept\n");
    outer.docker(&["start"]).ok();
    wait_for_inner_engine(&outer);
    assert_eq!(inode(&on_disk), before);
    assert_eq!(inner(&outer, &["inspect", "-f", "{{.Id}}", "busybox"]).ok(), image);
    inner(&outer, &["start", "-a", "kept"]).ok();
    assert_eq!(outer.sh("docker cp kept:/file - | tar -xO"), "kept");
    assert_eq!(inner(&outer, &["run", "--rm", "busybox", "echo", "again"]).ok(), "again");
    // The engine counts it as the container's.
    let size: u64 = outer.docker(&["inspect", "--size", "-f", "{{.SizeRw}}"]).ok().parse().unwrap();
    assert!(size > 1_000_000, "{size}");

    let id = outer.id();
    outer.docker(&["rm", "-fv"]).ok();
    until("the record to go", || record_of(&id).is_none().then_some(()));
    assert_eq!(remains_of(&id, &upper), Vec::<String>::new());
}

#[test]
fn a_users_volume_outlives_its_containers_and_serves_one_at_a_time() {
    let volume = Volume::new();
    let option = format!("{}:/var/lib/docker", volume.name);
    let first = machine(&["-v", &option]);
    assert_eq!(inner(&first, &["info", "-f", "{{.Driver}}"]).ok(), "overlay2");
    import_busybox(&first);
    assert_eq!(
        inner(
            &first,
            &["run", "--name", "kept", "busybox", "sh", "-c", "echo kept >/file; stat -c %u:%g /file"]
        )
        .ok(),
        "0:0"
    );
    // Shifted by the mount: on disk it is root's.
    assert_eq!(fs::metadata(volume.path().join("overlay2")).unwrap().uid(), 0);

    let second = Container::created(DEBIAN, &["-v", &option]);
    let refused = second.docker(&["start"]).refused();
    for part in [first.id(), second.id(), "/var/lib/docker".to_owned()] {
        assert!(refused.contains(&part), "no {part} in: {refused}");
    }
    // The one that has it never notices.
    assert_eq!(inner(&first, &["run", "--rm", "busybox", "echo", "fine"]).ok(), "fine");
    first.docker(&["stop"]).ok();
    second.docker(&["start"]).ok();
    second.docker(&["rm", "-fv"]).ok();
    first.docker(&["rm", "-fv"]).ok();

    let third = machine(&["-v", &option]);
    inner(&third, &["start", "-a", "kept"]).ok();
    assert_eq!(third.sh("docker cp kept:/file - | tar -xO"), "kept");
    // Containers go before the volume that they use.
    drop((first, second, third));
    drop(volume);
}

#[test]
fn docker_cp_reaches_a_running_container() {
    let dir = tempfile::tempdir().unwrap();
    let (to, from) = (dir.path().join("to"), dir.path().join("from"));
    let container = Container::waiting(DEBIAN, &[]);
    let copy_in = |text: &str, path: &str| {
        fs::write(&to, text).unwrap();
        docker(["cp", to.to_str().unwrap(), &format!("{}:{path}", container.name)]).ok();
    };
    let copy_out = |path: &str| {
        let said = docker(["cp", &format!("{}:{path}", container.name), from.to_str().unwrap()]);
        if said.code == 0 { Ok(fs::read_to_string(&from).unwrap()) } else { Err(said.err) }
    };
    // Directories of the image: pinned by mounts, by running programs, by a process that stands in them, and by nothing.
    container.exec(&["-d", "-w", "/usr/share/perl5"], &["sleep", "2147483647"]).ok();
    for place in [
        "/etc",
        "/usr/bin",
        "/usr/lib",
        "/usr/share/perl5",
        "/usr/share/doc",
        "/etc/apt",
        "/var/lib/dpkg",
        "/root",
    ] {
        let path = |name: &str| format!("{place}/{name}");
        let (sent, made) = (path("sent"), path("made"));
        // Looked up on both sides before it is there: both remember that it is not.
        container.try_sh(&format!("ls {place}; cat {sent}")).refused();
        copy_out(&made).unwrap_err();
        copy_in("sent", &sent);
        let seen = until(&format!("the container to see {sent}"), || {
            Some(container.try_sh(&format!("cat {sent}"))).filter(|said| said.code == 0)
        });
        assert_eq!(seen.out, "sent", "{sent}");
        assert_eq!(
            container.sh(&format!("ls {place} | grep -x sent; stat -c %u:%g {sent}")),
            "sent\n0:0",
            "{place}"
        );
        // The container's own writes never fail for it.
        container.sh(&format!("echo made >{made} && echo more >>{sent} && mkdir {0}/own-dir && mv {made} {0}/own-dir/ && mv {0}/own-dir/made {0}/ && rmdir {0}/own-dir", place));
        assert_eq!(copy_out(&made), Ok("made\n".to_owned()), "{made}");
        assert_eq!(copy_out(&sent), Ok("sentmore\n".to_owned()), "{sent}");
        copy_in("second", &sent);
        until("the container to see the second copy", || {
            (container.sh(&format!("cat {sent}")) == "second").then_some(())
        });
        container.sh(&format!("rm {sent} {made} && touch {made}2 && rm {made}2"));
        copy_out(&sent).unwrap_err();
        copy_out(&made).unwrap_err();
    }
    // A file of the image, changed on either side.
    container.sh("echo inside >/etc/issue");
    assert_eq!(copy_out("/etc/issue"), Ok("inside\n".to_owned()));
    copy_in("outside", "/etc/issue");
    until("the container to see the file changed", || {
        (container.sh("cat /etc/issue") == "outside").then_some(())
    });
    // A whole directory, with what the engine's archive makes of owners.
    let tree = dir.path().join("tree");
    fs::create_dir_all(tree.join("a/b")).unwrap();
    fs::write(tree.join("a/b/c"), "deep").unwrap();
    docker(["cp", tree.to_str().unwrap(), &format!("{}:/usr/share/perl5/tree", container.name)]).ok();
    let seen = until("the tree", || {
        Some(container.try_sh("cat /usr/share/perl5/tree/a/b/c")).filter(|said| said.code == 0)
    });
    assert_eq!(seen.out, "deep");
    container.sh("rm -r /usr/share/perl5/tree");
}
