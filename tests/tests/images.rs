//! `sysbox/debian:SUITE` as tests/bed/image.sh makes it: what is in it, and that it is a machine. Looks at every suite that the
//! bed's engine has: `SUITES="bookworm trixie sid" make test` has all three.

use std::path::Path;

use sysbox_tests::engine::{Container, INNER_IMAGE, docker, until};

fn suites() -> Vec<String> {
    let mut suites: Vec<String> =
        docker(["images", "--format", "{{.Tag}}", "sysbox/debian"]).ok().lines().map(str::to_owned).collect();
    suites.sort();
    suites.dedup();
    // An image that was made again is there under no name until its last container is gone.
    // Variants (`bookworm-tools`) are for tests/tests/matrix.rs.
    suites.retain(|suite| suite != "<none>" && !suite.contains('-'));
    let wanted = std::env::var("SUITES").unwrap_or_else(|_| "bookworm".to_owned());
    for suite in wanted.split_whitespace() {
        assert!(suites.iter().any(|known| known == suite), "need: make images SUITE={suite}: {suites:?}");
    }
    suites
}

#[test]
fn images_have_what_a_machine_needs() {
    for suite in suites() {
        let image = format!("sysbox/debian:{suite}");
        let container = Container::waiting(&image, &[]);
        assert_eq!(container.sh("readlink -f /sbin/init"), "/usr/lib/systemd/systemd", "{suite}");
        for program in [
            "docker",
            "dockerd",
            "containerd",
            "runc",
            "ip",
            "ping",
            "ps",
            "top",
            "iptables",
            "ip6tables",
            "lsmod",
            "modprobe",
            "python3",
            "busybox",
            "systemctl",
            "dbus-daemon",
        ] {
            let said = container.try_sh(&format!("command -v {program}"));
            assert_eq!(said.code, 0, "{suite}: no {program}");
        }
        for (script, expected) in [
            ("docker --version; dockerd --version", "Docker version "),
            ("ip -V", "ip utility, iproute2"),
            ("ps --version", "procps"),
            ("iptables --version", "nf_tables"),
            ("kmod --version", "kmod version "),
            ("python3 -c 'import sys; print(sys.version_info.major)'", "3"),
            (". /etc/os-release; echo $ID", "debian"),
        ] {
            let said = container.sh(script);
            assert!(
                said.lines().next().is_some_and(|line| line.contains(expected)),
                "{suite}: {script}: {said}"
            );
        }
        // Suites do not pass for one another: sid and trixie may have the same version, not the same name.
        let name = container.sh(". /etc/os-release; echo $VERSION_CODENAME");
        assert!(name == suite || suite == "sid", "{suite}: {name}");
        // Of the mirror that it came from, and of the machine that made it, nothing stays but the name of the mirror.
        let lists = container.sh("ls -A /var/lib/apt/lists; ls /etc/apt/apt.conf.d");
        assert!(!lists.contains("dists") && !lists.contains("mmdebstrap"), "{suite}: {lists}");
        let made = docker([
            "image",
            "inspect",
            "-f",
            "{{.Config.StopSignal}} {{.Config.Cmd}} {{.Architecture}}",
            &image,
        ]);
        assert!(made.ok().starts_with("SIGRTMIN+3 [/sbin/init] "), "{suite}");
    }
}

/// systemd 258 and later run on the unified hierarchy alone.
fn boots_here(image: &str) -> bool {
    let said = Container::run(&["--rm"], image, &["systemctl", "--version"]).ok();
    let version: Option<u32> = said.split(' ').nth(1).and_then(|number| number.parse().ok());
    let is_unified = Path::new("/sys/fs/cgroup/cgroup.controllers").exists();
    is_unified || version.unwrap_or_else(|| panic!("{image}: {said}")) < 258
}

#[test]
fn images_are_machines_with_systemd_and_docker() {
    for suite in suites() {
        let image = format!("sysbox/debian:{suite}");
        let boots = boots_here(&image);
        let machine = if boots {
            Container::start(&["--stop-signal", "SIGRTMIN+3"], &image, &[])
        } else {
            // It says so and ends; what can be a machine without it is still looked at.
            assert_eq!(
                Container::run(&["--rm"], &image, &[]).code,
                255,
                "{suite}: systemd refuses cgroup v1"
            );
            Container::start(&["--stop-signal", "TERM"], &image, &["dockerd"])
        };
        if boots {
            let state = until("systemd to be done with its start", || {
                let state = machine.try_sh("systemctl is-system-running").out;
                ["running\n", "degraded\n"].contains(&state.as_str()).then_some(state)
            });
            assert_eq!(state, "running\n", "{suite}: {}", machine.sh("systemctl --failed --no-legend"));
            let active = machine.sh("cat /proc/1/comm; systemctl is-active docker");
            assert_eq!(active, "systemd\nactive", "{suite}");
        }
        until("the inner engine to answer", || (machine.try_sh("docker version").code == 0).then_some(()));
        assert_eq!(machine.sh("docker info -f '{{.Driver}}'"), "overlay2", "{suite}");
        machine.sh(&format!("docker import {INNER_IMAGE} busybox"));
        let said = machine.sh("docker run --rm --hostname inner busybox sh -c 'hostname; id -u; echo $$'");
        assert_eq!(said, "inner\n0\n1", "{suite}");
        machine.docker(&["stop"]).ok();
        // By itself, not killed: systemd's code for a halt.
        let code = machine.inspect("{{.State.ExitCode}}");
        assert_eq!(code, if boots { "130" } else { "0" }, "{suite}");
    }
}
