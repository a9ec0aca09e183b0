//! The bed itself (`make up`, `env`, `down`, `images`), each test on a machine apart, where "nothing is left" can be compared to
//! the last line: all processes, mounts, cgroups, links and firewall rules of that machine before and after.

use sysbox_tests::apart::Apart;

/// Everything that `down` must leave as it was. The shell and what it runs at the moment are no part of it.
const CENSUS: &str = r#"
processes() { ps -e -o pid=,ppid=,args= | awk -v self=$$ '$1 != 1 && $1 != self && $2 != self && !/^ *[0-9]+ +1 timeout/ {print $1, $3, $4, $5}'; }
census() {
    echo "== processes"; processes
    echo "== mounts"; awk '{print $5, $6}' /proc/self/mountinfo
    echo "== cgroups"; find /sys/fs/cgroup -type d
    echo "== links"; ip -br link | awk '{print $1}'
    echo "== addresses"; ip -br -4 addr
    echo "== rules"; for table in filter nat; do iptables -w -t $table -S; done
    echo "== forwarding"; cat /proc/sys/net/ipv4/ip_forward
    echo "== places"; ls -d /run/sysbox* /run/sysbox-bed/* /var/lib/sysboxfs* /usr/local/sbin/sysbox* 2>/dev/null | grep -vx /run/sysbox-bed
}
"#;

/// For an engine without a registry.
const BUSYBOX: &str = r#"
box=$(mktemp -d); mkdir -p $box/bin; cp /bin/busybox $box/bin; for name in sh sleep true httpd wget; do ln -s busybox $box/bin/$name; done
load() { tar -C $box -c . | docker import - box >/dev/null; }
"#;

fn machine() -> (Apart, String) {
    let mut machine = Apart::start();
    let before = machine.sh(&format!("{CENSUS} census")).ok();
    assert!(before.contains("-P FORWARD ACCEPT") && before.contains("== forwarding\n0"), "{before}");
    (machine, before)
}

#[track_caller]
fn is_as_before(machine: &mut Apart, before: &str) {
    let after = machine.sh(&format!("{CENSUS} census")).ok();
    let (before, after): (Vec<&str>, Vec<&str>) = (before.lines().collect(), after.lines().collect());
    let missing: Vec<_> = before.iter().filter(|line| !after.contains(line)).collect();
    let left: Vec<_> = after.iter().filter(|line| !before.contains(line)).collect();
    assert!(missing.is_empty() && left.is_empty(), "gone: {missing:#?}\nleft: {left:#?}");
}

#[test]
fn up_may_be_repeated_and_down_leaves_nothing_but_data() {
    let (mut machine, before) = machine();
    assert!(machine.sh("make up").ok().contains("bed `dev` is up"));
    let said = machine.sh("command -v sysbox-runc; sysbox-runc --version").ok();
    assert!(said.starts_with("/usr/local/sbin/sysbox-runc\nsysbox-runc "), "{said}");

    let running = machine.sh(&format!("{CENSUS} processes")).ok();
    for program in ["sysbox-mgr", "sysbox-fs", "dockerd", "containerd"] {
        assert!(running.contains(program), "{program}: {running}");
    }
    assert_eq!(machine.sh("make up").ok(), "bed `dev` is up\n");
    assert_eq!(machine.sh(&format!("{CENSUS} processes")).ok(), running, "a second up restarts nothing");

    // Containers of both runtimes, a network of the user's, a volume: what a bed has when somebody worked in it.
    let script = format!(
        r#"{BUSYBOX} set -e; eval "$(make -s env)"; load
        docker network create side >/dev/null
        for runtime in runc sysbox-runc; do docker run -d --runtime=$runtime --network side -v /data --stop-signal KILL box sleep 9999 >/dev/null; done
        docker ps -q | wc -l; ip -br link | grep -c -e ^sbx-dev -e ^br-"#
    );
    assert_eq!(machine.sh(&script).ok(), "2\n2\n");
    let running = machine.sh(&format!("{CENSUS} processes")).ok();
    assert_eq!(machine.sh("make up").ok(), "bed `dev` is up\n");
    assert_eq!(machine.sh(&format!("{CENSUS} processes")).ok(), running, "nor with containers");

    machine.sh("make down").ok();
    is_as_before(&mut machine, &before);
    assert!(machine.sh("make down").ok().starts_with("bed `dev` is down"), "a second down is harmless");
    is_as_before(&mut machine, &before);
    machine.sh("make up").ok();
    let data = r#"eval "$(make -s env)"; docker images -q box | wc -l; docker ps -aq | wc -l"#;
    assert_eq!(machine.sh(data).ok(), "1\n2\n", "data is kept");
    machine.sh("make down PURGE=1").ok();
    is_as_before(&mut machine, &before);
    let data = machine.sh("ls -A /var/lib/sysbox-bed; ls -d /var/lib/sysbox").text;
    assert_eq!(data, ".lock\nls: cannot access '/var/lib/sysbox': No such file or directory\n");
}

#[test]
fn env_is_shell_lines_that_point_a_plain_docker_at_the_engine() {
    let (mut machine, _) = machine();
    machine.sh("make up BED=own").ok();
    let lines = machine.sh("make -s env BED=own").ok();
    assert!(!lines.is_empty() && lines.lines().all(|line| line.starts_with("export ")), "{lines}");
    let asked = r#"lines=$(make -s env BED=own) && env -i PATH="$PATH" HOME=/root sh -c "$lines; docker info -f '{{.DockerRootDir}}'""#;
    assert_eq!(machine.sh(asked).ok(), "/var/lib/sysbox-bed/own/docker\n");
    // For a bed that is down the lines are the same: `up` may come later.
    assert_eq!(machine.sh("make down BED=own 2>/dev/null; make -s env BED=own").ok(), lines);
}

#[test]
fn a_bed_in_which_something_died_is_made_again() {
    let (mut machine, before) = machine();
    machine.sh("make up").ok();
    for (program, why) in [
        ("sysbox-mgr", "a daemon does not run"),
        ("sysbox-fs", "a daemon does not run"),
        ("dockerd", "its engine does not run"),
    ] {
        machine.sh(&format!("kill -9 $(pidof {program}); while pidof {program}; do sleep 0.05; done")).ok();
        let said = machine.sh("make up").ok();
        assert!(said.contains(&format!("bed `dev` is made again: {why}")), "{program}: {said}");
        assert!(said.ends_with("bed `dev` is up: eval \"$(make -s env)\"\n"), "{program}: {said}");
    }
    // What a killed engine leaves behind, running, `down` finds too.
    let script = format!(
        r#"{BUSYBOX} set -e; eval "$(make -s env)"; load
        docker run -d --runtime=sysbox-runc box sleep 9999 >/dev/null; kill -9 $(pidof dockerd); pidof sleep >/dev/null"#
    );
    machine.sh(&script).ok();
    machine.sh("make down").ok();
    is_as_before(&mut machine, &before);
}

#[test]
fn an_up_that_fails_takes_back_what_it_made() {
    let (mut machine, before) = machine();
    for (what, arguments) in [
        ("the engine did not start", "EXTRA_DOCKERD_ARGS=--no-such-option"),
        ("sysbox-mgr did not start", "EXTRA_MGR_ARGS=--no-such-option"),
        ("sysbox-fs did not start", "EXTRA_FS_ARGS=--no-such-option"),
        ("/sysbox-runc` is missing", "BIN_DIR=/nowhere"),
    ] {
        let said = machine.sh(&format!("make up {arguments}")).fails();
        assert!(said.contains(what), "{arguments}: {said}");
        is_as_before(&mut machine, &before);
    }
    machine.sh("ln -s /bin/true /usr/local/sbin/sysbox-runc").ok();
    let said = machine.sh("make up").fails();
    assert!(said.contains("`/usr/local/sbin/sysbox-runc` is there and not ours\nhint: "), "{said}");
    assert_eq!(machine.sh("readlink /usr/local/sbin/sysbox-runc").ok(), "/bin/true\n");
    machine.sh("rm /usr/local/sbin/sysbox-runc").ok();
    is_as_before(&mut machine, &before);
}

#[test]
fn beds_stand_side_by_side_and_the_last_one_puts_forwarding_back() {
    let (mut machine, before) = machine();
    machine.sh("make up BED=one && make up BED=two").ok();
    let subnets = machine.sh("cat /var/lib/sysbox-bed/{one,two}/subnet | sort -u | wc -l").ok();
    assert_eq!(subnets, "2\n");
    machine.sh("make down BED=one").ok();
    assert_eq!(machine.sh("make up BED=two").ok(), "bed `two` is up\n", "the other has not noticed");
    let forwarding = machine.sh("cat /proc/sys/net/ipv4/ip_forward; iptables -S FORWARD | head -1").ok();
    assert_eq!(forwarding, "1\n-P FORWARD DROP\n");
    machine.sh("make down BED=two").ok();
    is_as_before(&mut machine, &before);
}

/// A Docker as a user has it: default places, default bridge, a firewall of its own, a container that serves the network.
const USERS_DOCKER: &str = r#"
export HOME=/root; mkdir -p /etc/docker /root/.docker
echo '{"debug": true, "labels": ["the=users"]}' >/etc/docker/daemon.json
echo '{"psFormat": "{{.Names}}"}' >/root/.docker/config.json
# dockerd up to 24 wants an OOM score that not every root may have.
oom=$(dockerd --help | grep -o -e '--oom-score-adjust' || true)
dockerd ${oom:+$oom 0} >/var/log/users-docker.log 2>&1 &
for i in $(seq 300); do docker version >/dev/null 2>&1 && break; sleep 0.1; done
load; docker run -d --name shop -p 8080:80 box sh -c 'echo for sale >/index.html; exec httpd -f -h /' >/dev/null
docker run --name done box true; docker volume create things
# What it does by itself a little later (containerd tidies its database) is done before we look.
until [ -z "$(find /var/lib/docker -newermt '2 seconds ago')" ]; do sleep 0.1; done
"#;

/// Its process and its containers by pid and start, its data and settings by time of change, its links and rules, and how
/// often somebody has asked it something.
const USERS_VIEW: &str = r#"
grep -c 'msg="Calling ' /var/log/users-docker.log
for pid in $(pidof dockerd containerd | tr ' ' '\n' | sort -n) $(pgrep -f 'httpd -f -h /$'); do
    case $(cat /proc/$pid/cmdline | tr '\0' ' ') in *sysbox-bed*) ;; *) ps -o pid=,lstart=,args= -p $pid ;; esac
done
find /var/lib/docker /etc/docker /root/.docker -printf '%p %i %s %U:%G %m %T@\n'
ip -br link show docker0; ip -br addr show docker0; cat /proc/sys/net/ipv4/ip_forward
for table in filter nat; do iptables -w -t $table -S | grep -v SYSBOX-; done
"#;

#[test]
fn a_docker_that_the_user_has_is_not_asked_changed_or_restarted() {
    let (mut machine, _) = machine();
    machine.sh(&format!("set -e; {BUSYBOX} {USERS_DOCKER}")).ok();
    let serves = "busybox wget -qO- http://127.0.0.1:8080/; busybox wget -qO- http://$(ip -4 -o addr show docker0 | sed 's/.*inet //; s,/.*,,'):8080/";
    assert_eq!(machine.sh(serves).ok(), "for sale\nfor sale\n");
    let before = machine.sh(USERS_VIEW).ok();
    assert!(
        before.contains("httpd -f -h /") && before.contains("docker0") && before.contains("-N DOCKER"),
        "{before}"
    );

    // With data of an earlier run as well: a dockerd that finds such a network tidies up, `docker0` included.
    let steps = [
        "make up",
        "make up",
        "make -s env",
        "make down",
        "make up",
        "make down PURGE=1",
        "make up",
        "make down",
    ];
    for (at, step) in steps.into_iter().enumerate() {
        machine.sh(step).ok();
        let after = machine.sh(USERS_VIEW).ok();
        let differs: Vec<_> = before.lines().zip(after.lines()).filter(|(was, is)| was != is).collect();
        assert!(before == after, "step {at}, {step}: {differs:#?}\n{after}");
    }
    assert_eq!(machine.sh(serves).ok(), "for sale\nfor sale\n");
    let containers = "docker ps -a --format '{{.Names}} {{.State}}' | sort; docker info -f '{{.Labels}}'";
    assert_eq!(machine.sh(containers).ok(), "done exited\nshop running\n[the=users]\n");
}

#[test]
fn test_vm_says_what_is_missing() {
    let (mut machine, before) = machine();
    for (arguments, said) in [
        (
            "",
            "bed: error: test-vm needs a program that runs emulated machines\nhint: make test-vm VM=path/to/vm [KERNEL=bookworm|trixie|sid]\n",
        ),
        (
            "VM=/nowhere/vm",
            "bed: error: `/nowhere/vm` (VM) is not a program\nhint: make test-vm VM=path/to/vm\n",
        ),
        (
            "VM=/bin/true BIN_DIR=/nowhere",
            "bed: error: `/nowhere/sysbox-runc` is missing\nhint: make build\n",
        ),
    ] {
        let told = machine.sh(&format!("make test-vm {arguments}")).fails();
        assert!(told.starts_with(said), "{told}");
    }
    is_as_before(&mut machine, &before);
}
