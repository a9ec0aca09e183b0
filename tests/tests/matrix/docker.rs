//! Docker inside: which releases, set up how, and what is tried with each.

use sysbox_tests::engine::INNER_IMAGE;
use sysbox_tests::matrix::{Built, Part, Trial, refused, works};

const SECTION: &str = "Docker inside";

/// How an inner dockerd is set up.
struct Setup {
    name: &'static str,
    /// Its daemon.json.
    config: &'static str,
    /// Done before it starts.
    before: &'static str,
}

const OVERLAY2: Setup = Setup { name: "overlay2", config: r#"{"storage-driver": "overlay2"}"#, before: "" };
const SNAPSHOTTER: Setup = Setup {
    name: "containerd store",
    config: r#"{"features": {"containerd-snapshotter": true}}"#,
    before: "",
};
/// The range lies within the container's own 65536 ids.
const REMAP: Setup = Setup {
    name: "userns-remap",
    config: r#"{"userns-remap": "remap"}"#,
    before: "useradd -r remap; echo remap:10000:50000 | tee /etc/subuid >/etc/subgid;",
};

/// A release: image of tests/bed/image.sh, setup, trials, and whether it is tried every time.
#[rustfmt::skip]
const RELEASES: &[(&str, &Setup, &[&[Trial]], bool)] = &[
    ("bookworm",         &OVERLAY2,    &[BASIC, PRIVILEGED, NETWORKS, LEGACY, BUILDKIT, THIRD],        true),
    ("bookworm-engines", &OVERLAY2,    &[COMPOSE],                                           false),
    ("bookworm",         &REMAP,       &[BASIC, REMAPPED, LEGACY, BUILDKIT],                           false),
    ("trixie",           &OVERLAY2,    &[PRIVILEGED],                                        true),
    ("trixie-engines",   &OVERLAY2,    &[BASIC, PRIVILEGED, NETWORKS, LEGACY, BUILDKIT, THIRD, COMPOSE], false),
    ("trixie-engines",   &SNAPSHOTTER, &[BASIC, PRIVILEGED, NETWORKS, LEGACY, BUILDKIT, THIRD, COMPOSE], false),
    ("trixie",           &REMAP,       &[BASIC, REMAPPED],                                   true),
    ("sid-engines",      &OVERLAY2,    &[BASIC, PRIVILEGED, NETWORKS, LEGACY, BUILDKIT, THIRD, COMPOSE], false),
    ("sid-engines",      &SNAPSHOTTER, &[BASIC, PRIVILEGED, NETWORKS, LEGACY, BUILDKIT, THIRD, COMPOSE], false),
    ("sid-engines",      &REMAP,       &[BASIC, REMAPPED, LEGACY, BUILDKIT],                           false),
];

/// The newest Docker, with the newest of what it stands on, as published; the client is sid's. Docker 29 calls its own module so.
const NEWEST: &[(&str, &str, &str)] = &[
    ("dockerd", "2.0.0-beta.24", "/usr/local/sbin/dockerd"),
    ("docker-proxy", "2.0.0-beta.24", "/usr/local/bin/docker-proxy"),
    ("containerd", "2.4.2", "/usr/local/bin/containerd"),
    ("containerd-shim-runc-v2", "2.4.2", "/usr/local/bin/containerd-shim-runc-v2"),
    ("runc", "1.5.2", "/usr/local/sbin/runc"),
    ("buildx", "0.38.2", "/usr/libexec/docker/cli-plugins/docker-buildx"),
];
const NEWEST_WITH: &[(&Setup, &[&[Trial]])] = &[
    (&OVERLAY2, &[BASIC, PRIVILEGED, NETWORKS, LEGACY, BUILDKIT, THIRD, COMPOSE]),
    (&SNAPSHOTTER, &[BASIC, PRIVILEGED, NETWORKS, LEGACY, BUILDKIT, THIRD, COMPOSE]),
    (&REMAP, &[BASIC, REMAPPED, LEGACY, BUILDKIT]),
];

pub fn parts() -> Vec<Part> {
    let releases =
        RELEASES.iter().map(|(image, setup, trials, is_daily)| part(image, setup, trials, *is_daily));
    let newest = NEWEST_WITH.iter().map(|(setup, trials)| Part {
        name: format!("Docker 29 (moby v2.0.0-beta.24), {}", setup.name),
        built: NEWEST.iter().map(|(name, version, at)| Built { name, version, at }).collect(),
        ..part("sid-engines", setup, trials, false)
    });
    releases.chain(newest).collect()
}

fn part(image: &str, setup: &Setup, trials: &[&'static [Trial]], is_daily: bool) -> Part {
    let Setup { name, config, before } = setup;
    Part {
        section: SECTION,
        name: format!("Docker of {image}, {name}"),
        image: image.to_owned(),
        init: format!("mkdir -p /etc/docker; {before} echo '{config}' >/etc/docker/daemon.json; exec dockerd"),
        ready: format!("docker version && docker import {INNER_IMAGE} busybox"),
        version: "docker version -f '{{.Server.Version}}'; containerd --version | awk '{print \"containerd\", $3}'; runc --version | head -n 1"
            .to_owned(),
        trials: trials.to_vec(),
        is_daily,
        ..Part::default()
    }
}

pub const BASIC: &[Trial] = &[
    works("run", "is \"$(docker run --rm --hostname inner busybox sh -c 'hostname; id -u; echo $$')\" 'inner
0
1'"),
    works(
        "exec, with a terminal too",
        "docker run -d --name exec busybox sleep 1000
is \"$(docker exec exec id -u)\" 0
is \"$(script -qec 'docker exec -t exec tty' /dev/null | tr -d '\\r')\" /dev/pts/0
docker rm -f exec",
    ),
    works(
        "commit, diff",
        "docker run --name commit busybox sh -c 'echo x >/made; rm /etc/group'
has \"$(docker diff commit)\" 'A /made'
has \"$(docker diff commit)\" 'D /etc/group'
docker commit commit committed
is \"$(docker run --rm committed sh -c 'cat /made; ls /etc/group 2>/dev/null || echo gone')\" 'x
gone'",
    ),
    works(
        "save, load",
        "docker run --name save busybox touch /saved
docker commit save saved
docker save saved >/tmp/saved.tar
docker rm save; docker rmi saved
docker load </tmp/saved.tar
docker run --rm saved ls /saved",
    ),
    works(
        "--memory, --cpus, --pids-limit",
        "cat >/tmp/limits <<'END'
cat /sys/fs/cgroup/memory/memory.limit_in_bytes 2>/dev/null || cat /sys/fs/cgroup/memory.max
cat /sys/fs/cgroup/cpu/cpu.cfs_quota_us 2>/dev/null || cut -d\" \" -f1 /sys/fs/cgroup/cpu.max
cat /sys/fs/cgroup/pids/pids.max 2>/dev/null || cat /sys/fs/cgroup/pids.max
END
is \"$(docker run --rm --memory 64m --cpus 0.5 --pids-limit 50 -v /tmp/limits:/limits busybox sh /limits)\" '67108864
50000
50'
code=0; docker run --rm --memory 64m --memory-swap 64m busybox dd if=/dev/zero of=/dev/null bs=96M count=1 || code=$?
is $code 137",
    ),
    works(
        "-v of a directory, of a file, of a volume",
        "mkdir -p /tmp/dir; echo d >/tmp/dir/f; echo f >/tmp/file; docker volume create vol
is \"$(docker run --rm -v /tmp/dir:/d -v /tmp/file:/f -v vol:/v busybox sh -c 'cat /d/f /f; echo kept >/v/x')\" 'd
f'
is \"$(docker run --rm -v vol:/v:ro busybox cat /v/x)\" kept",
    ),
    works(
        "--sysctl, --tmpfs, --shm-size, --read-only, --user, --cap-drop",
        "is \"$(docker run --rm --sysctl net.ipv4.ip_forward=1 --tmpfs /t --shm-size 1m --read-only --user 1000:1000 --cap-drop ALL busybox sh -c \
'cat /proc/sys/net/ipv4/ip_forward; df -k /dev/shm | tail -n 1 | tr -s \" \" | cut -d\" \" -f2; id -u; touch /x 2>/dev/null || echo ro; grep CapEff /proc/self/status')\" \
'1
1024
1000
ro
CapEff:\t0000000000000000'",
    ),
    works(
        "pause, stats, top, cp, logs, update, restart",
        "docker run -d --name verbs busybox sh -c 'echo said; sleep 1000'
docker pause verbs; is \"$(docker inspect -f '{{.State.Status}}' verbs)\" paused; docker unpause verbs
has \"$(docker stats --no-stream --format '{{.MemUsage}}' verbs)\" iB
has \"$(docker top verbs)\" 'sleep 1000'
echo in >/tmp/cp; docker cp /tmp/cp verbs:/cp; is \"$(docker exec verbs cat /cp)\" in
is \"$(docker logs verbs)\" said
docker update --memory 32m --memory-swap 32m verbs
docker restart -t 0 verbs
docker rm -f verbs",
    ),
];

pub const PRIVILEGED: &[Trial] = &[
    works(
        "--privileged",
        "docker run --rm --privileged busybox sh -ec 'mkdir /m; mount -t tmpfs x /m; ip link add b7 type bridge; ls /sys/class/net/b7'",
    ),
    // Engines list /dev for it, and everything of ours that is there.
    works(
        "--privileged while processes come and go",
        "(while [ ! -e /tmp/enough ]; do /bin/true & /bin/true; done) >/dev/null 2>&1 &
n=0; while [ $n -lt 5 ]; do docker run --rm --privileged busybox true; n=$((n + 1)); done; touch /tmp/enough",
    ),
];

/// What Docker itself says to it, on any machine.
const REMAPPED: &[Trial] = &[
    works(
        "users of the range",
        "is \"$(docker run --rm busybox cat /proc/self/uid_map | tr -s ' ')\" ' 0 10000 50000'",
    ),
    refused(
        "--privileged",
        "docker run --rm --privileged busybox true",
        "privileged mode is incompatible with user namespaces",
    ),
    works(
        "--privileged --userns=host",
        "docker run --rm --privileged --userns=host busybox mount -t tmpfs x /tmp",
    ),
];

const NETWORKS: &[Trial] = &[
    works(
        "a published port",
        "docker run -d --name web -p 8080:80 busybox sh -c 'echo page >/index.html; exec httpd -f -p 80 -h /'
within 30 sh -c 'busybox wget -qO /tmp/page http://127.0.0.1:8080/'
is \"$(cat /tmp/page)\" page
within 30 sh -c \"busybox wget -qO /tmp/page http://$(hostname -i | cut -d' ' -f1):8080/\"
docker rm -f web",
    ),
    works(
        "a network of one's own, with names",
        "docker network create own
docker run -d --name named --network own --network-alias other busybox sh -c 'echo page >/index.html; exec httpd -f -p 80 -h /'
within 30 docker run --rm --network own busybox wget -qO- http://named/
is \"$(docker run --rm --network own busybox wget -qO- http://other/)\" page
docker rm -f named; docker network rm own",
    ),
    works(
        "--network host, none, container:",
        "is \"$(docker run --rm --network host busybox hostname)\" \"$(hostname)\"
is \"$(docker run --rm --network host busybox cat /proc/net/dev | wc -l)\" \"$(wc -l </proc/net/dev)\"
is \"$(docker run --rm --network none busybox ls /sys/class/net)\" lo
docker run -d --name first busybox sleep 1000
is \"$(docker run --rm --network container:first busybox hostname)\" \"$(docker exec first hostname)\"
docker rm -f first",
    ),
    works(
        "--pid host, --ipc host, --uts host",
        "has \"$(docker run --rm --pid host busybox ps)\" dockerd
docker run --rm --ipc host busybox true
is \"$(docker run --rm --uts host busybox hostname)\" \"$(hostname)\"",
    ),
];

/// A build with what builders get wrong: a removed file, a replaced directory, an owner.
macro_rules! build {
    ($builder:literal) => {
        concat!(
            "mkdir -p /tmp/b; cat >/tmp/b/Dockerfile <<'END'
FROM busybox
RUN mkdir -p /d/sub && touch /d/old /d/sub/old && echo someone:x:1000:1000::/:/bin/sh >>/etc/passwd
RUN rm /etc/group && rm -rf /d && mkdir /d && echo new >/d/new && chown 1000:1000 /d/new
USER someone
CMD ls /d; ls /etc/group 2>/dev/null || echo gone; stat -c %u /d/new; id -u
END
DOCKER_BUILDKIT=",
            $builder,
            " docker build -t built",
            $builder,
            " /tmp/b
is \"$(docker run --rm built",
            $builder,
            ")\" 'new
gone
1000
1000'"
        )
    };
}

pub const LEGACY: &[Trial] = &[works("build with the legacy builder", build!("0"))];
const BUILDKIT: &[Trial] = &[works("build with BuildKit", build!("1"))];

/// A machine in the machine: an image of links alone, with this one's programs.
const THIRD: &[Trial] = &[works(
    "a third level of Docker",
    "tar -C / -cf - bin sbin lib $(cd /; ls -d lib64 2>/dev/null) etc usr/share/sysbox/busybox.tar | docker import - level
docker run -d --name level --privileged -v /usr:/usr:ro -v /var/lib/docker level sh -c 'mkdir -p /tmp /run /var/log; exec dockerd'
within 60 quiet docker exec level docker version || { docker logs level | tail -n 20 >&2; exit 1; }
docker exec level docker import /usr/share/sysbox/busybox.tar busybox
is \"$(docker exec level docker run --rm busybox id -u)\" 0
is \"$(docker exec level docker info -f '{{.Driver}}')\" \"$(docker info -f '{{.Driver}}')\"
docker rm -fv level; docker rmi level",
)];

const COMPOSE: &[Trial] = &[works(
    "compose: up with a network, a volume and a dependency, exec, down",
    "mkdir -p /tmp/c; cat >/tmp/c/docker-compose.yml <<'END'
version: '3'
services:
  web:
    image: busybox
    command: sh -c 'echo page >/data/index.html; exec httpd -f -p 80 -h /data'
    volumes: [data:/data]
  reader:
    image: busybox
    command: sleep 1000
    depends_on: [web]
volumes: {data: {}}
END
cd /tmp/c; compose() { if docker compose version >/dev/null 2>&1; then docker compose \"$@\"; else docker-compose \"$@\"; fi; }
compose up -d
within 30 compose exec -T reader wget -qO /page http://web/
is \"$(compose exec -T reader cat /page)\" page
compose down -v
is \"$(docker ps -q)\" ''",
)];
