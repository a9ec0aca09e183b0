//! `sysbox/debian:SUITE` as tests/bed/image.sh makes it: what is in it, and that it is a machine. Looks at every suite that the
//! bed's engine has: `SUITES="bookworm trixie sid" make test` has all three.

use sysbox_tests::engine::{Container, INNER_IMAGE, docker, until};

fn suites() -> Vec<String> {
    let mut suites: Vec<String> =
        docker(["images", "--format", "{{.Tag}}", "sysbox/debian"]).ok().lines().map(str::to_owned).collect();
    suites.sort();
    suites.dedup();
    // An image that was made again is there under no name until its last container is gone.
    suites.retain(|suite| suite != "<none>");
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
            ("python3 -c 'import sys, json; print(sys.version_info.major)'", "3"),
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
        // An image that carries somebody's keys, lists or logs is larger than its purpose.
        assert_eq!(
            container.sh("ls /var/lib/apt/lists /etc/hostname /etc/ssh 2>/dev/null | wc -l"),
            "3",
            "{suite}"
        );
        assert_eq!(container.inspect("{{.Config.StopSignal}}"), "KILL");
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

#[test]
fn images_are_machines_with_systemd_and_docker() {
    for suite in suites() {
        let container =
            Container::start(&["--stop-signal", "SIGRTMIN+3"], &format!("sysbox/debian:{suite}"), &[]);
        let state = until("systemd to be done with its start", || {
            let state = container.try_sh("systemctl is-system-running").out;
            ["running\n", "degraded\n"].contains(&state.as_str()).then_some(state)
        });
        assert_eq!(state, "running\n", "{suite}: {}", container.sh("systemctl --failed --no-legend"));
        assert_eq!(
            container.sh("cat /proc/1/comm; systemctl is-active docker"),
            "systemd\nactive",
            "{suite}"
        );
        assert_eq!(container.sh("docker info -f '{{.Driver}}'"), "overlay2", "{suite}");
        container.sh(&format!("docker import {INNER_IMAGE} busybox"));
        let said = container
            .sh("docker run --rm --hostname inner busybox sh -c 'hostname; id -u; cat /proc/1/comm'");
        assert_eq!(said, "inner\n0\nsh", "{suite}");
        container.docker(&["stop"]).ok();
        // By itself, not killed: systemd's code for a halt.
        assert_eq!(container.inspect("{{.State.ExitCode}}"), "130", "{suite}");
    }
}
