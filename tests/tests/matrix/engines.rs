//! Other engines inside: containerd by itself, podman, buildah; as root and as a user.

use sysbox_tests::matrix::{Built, Known, Part, Trial, works};

/// Images of tests/bed/image.sh, and whether podman of it is tried every time.
const RELEASES: &[(&str, bool)] =
    &[("bookworm-engines", true), ("trixie-engines", false), ("sid-engines", false)];

/// The releases whose rootless podman takes fuse-overlayfs when its storage is on an overlay. (bookworm's takes vfs everywhere.) There
/// podman loses what a step removed from a directory that the same step made anew: below plain runc too, where the storage is on
/// ext4 and fuse-overlayfs is asked for, and not where it is on ext4 and the kernel's overlay is taken.
const WITH_FUSE: [&str; 2] = ["trixie-engines", "sid-engines"];
const REPLACED: &[Known] = &[Known {
    what: "rootless: podman build",
    symptom: "found [new old sub gone 1000 1000]",
    reason: "podman's fault, below plain runc too: with fuse-overlayfs, files of a directory that one RUN removed and made again come \
             back. Use a volume for the storage, or --layers=false",
}];

/// containerd as published, in `trixie-engines`.
const CONTAINERD: &[&str] = &["2.4.2"];

/// buildkitd as published, in `trixie-engines`.
const BUILDKIT: &[&str] = &["0.34.2"];

pub fn parts() -> Vec<Part> {
    let podman = RELEASES.iter().map(|(image, is_daily)| Part {
        section: "podman, buildah and containerd inside",
        name: format!("podman, buildah of {image}"),
        image: (*image).to_owned(),
        init: format!("{MACHINE} exec sleep 1000000"),
        ready: "test -e /tmp/ready".to_owned(),
        version: "podman --version; buildah --version | cut -d' ' -f1-3; crun --version | head -n 1"
            .to_owned(),
        trials: vec![ROOT, if WITH_FUSE.contains(image) { ON_FUSE } else { ON_VFS }, ROOTLESS],
        known: if WITH_FUSE.contains(image) { REPLACED } else { &[] },
        is_daily: *is_daily,
        ..Part::default()
    });
    let on_volume = WITH_FUSE.iter().map(|image| Part {
        section: "podman, buildah and containerd inside",
        name: format!("podman, buildah of {image}, the home on a volume"),
        image: (*image).to_owned(),
        options: vec!["-v", "/home"],
        init: format!("{MACHINE} exec sleep 1000000"),
        ready: "test -e /tmp/ready".to_owned(),
        version: "podman --version; buildah --version | cut -d' ' -f1-3".to_owned(),
        trials: vec![ON_KERNEL, ROOTLESS],
        ..Part::default()
    });
    let containerd = RELEASES.iter().map(|(image, _)| Part {
        name: format!("containerd of {image}"),
        image: (*image).to_owned(),
        ..ctr()
    });
    const PROGRAMS: [&str; 3] = ["containerd", "ctr", "containerd-shim-runc-v2"];
    const PATHS: [&str; 3] =
        ["/usr/local/bin/containerd", "/usr/local/bin/ctr", "/usr/local/bin/containerd-shim-runc-v2"];
    let published = CONTAINERD.iter().map(|version| Part {
        name: format!("containerd {version}"),
        image: "trixie-engines".to_owned(),
        built: PROGRAMS.iter().zip(PATHS).map(|(name, at)| Built { name, version, at }).collect(),
        ..ctr()
    });
    let buildkit = BUILDKIT.iter().map(|version| Part {
        section: "podman, buildah and containerd inside",
        name: format!("BuildKit {version}, by itself"),
        image: "trixie-engines".to_owned(),
        built: vec![
            Built { name: "buildkitd", version, at: "/usr/local/bin/buildkitd" },
            Built { name: "buildctl", version, at: "/usr/local/bin/buildctl" },
        ],
        init: "exec buildkitd --containerd-worker=false".to_owned(),
        ready: "buildctl debug workers".to_owned(),
        // It does not know its version; runc is the one that it runs.
        version: "runc --version | head -n 1".to_owned(),
        trials: vec![BUILDS],
        ..Part::default()
    });
    podman.chain(on_volume).chain(containerd).chain(published).chain(buildkit).collect()
}

fn ctr() -> Part {
    Part {
        section: "podman, buildah and containerd inside",
        init: format!("{MACHINE} exec containerd"),
        ready: "test -e /tmp/ready && ctr version".to_owned(),
        version: "containerd --version | awk '{print $3}'; runc --version | head -n 1".to_owned(),
        trials: vec![CTR],
        ..Part::default()
    }
}

/// An image file that everything can load, a user, and a network for `ctr --cni`.
const MACHINE: &str = r#"set -e
mkdir -p /tmp/i /opt/cni /etc/cni/net.d; cp /usr/share/sysbox/busybox.tar /tmp/i/layer.tar; cd /tmp/i
id=$(sha256sum layer.tar | cut -d' ' -f1)
echo "{\"architecture\": \"$(dpkg --print-architecture)\", \"os\": \"linux\", \"config\": {\"Env\": [\"PATH=/bin\"]}, \"history\": [{\"created_by\": \"a test\"}], \"rootfs\": {\"type\": \"layers\", \"diff_ids\": [\"sha256:$id\"]}}" >config.json
echo '[{"Config": "config.json", "RepoTags": ["localhost/busybox:latest"], "Layers": ["layer.tar"]}]' >manifest.json
tar -cf /tmp/busybox.tar manifest.json config.json layer.tar; cd /
echo '{"cniVersion": "0.4.0", "name": "net", "plugins": [{"type": "bridge", "bridge": "cni0", "isGateway": true, "ipMasq": true, "ipam": {"type": "host-local", "subnet": "10.99.0.0/24", "routes": [{"dst": "0.0.0.0/0"}]}}]}' >/etc/cni/net.d/10-net.conflist
ln -s /usr/lib/cni /opt/cni/bin
useradd -m user; echo user:10000:50000 | tee /etc/subuid >/etc/subgid; install -d -o user /run/user/$(id -u user)
touch /tmp/ready;"#;

/// A script of a user's, in a place where a login would have put them.
macro_rules! as_user {
    ($script:expr) => {
        concat!(
            "cat >/tmp/script <<'SCRIPT'
set -eu; export XDG_RUNTIME_DIR=/run/user/$(id -u); cd
is() { [ \"$1\" = \"$2\" ] || { echo \"expected [$2], found [$1]\" | tr '\n' ' ' >&2; return 1; }; }
",
            $script,
            "
SCRIPT
chmod 755 /tmp/script; su user -c 'sh /tmp/script'"
        )
    };
}

/// The same for root and for a user.
macro_rules! build {
    ($with:literal) => {
        concat!(
            "mkdir -p b; cat >b/Dockerfile <<'END'
FROM localhost/busybox
RUN mkdir -p /d/sub && touch /d/old /gone && echo someone:x:1000:1000::/:/bin/sh >>/etc/passwd
RUN rm /gone && rm -rf /d && mkdir /d && echo new >/d/new && chown 1000:1000 /d/new
USER someone
CMD ls /d; ls /gone 2>/dev/null || echo gone; stat -c %u /d/new; id -u
END
",
            $with,
            " -t built b
is \"$(podman run --rm built)\" 'new
gone
1000
1000'
podman rmi built"
        )
    };
}

const ROOT: &[Trial] = &[
    works(
        "run",
        "podman load -i /tmp/busybox.tar
is \"$(podman run --rm --hostname inner busybox sh -c 'hostname; id -u; echo $$')\" 'inner
0
1'
is \"$(podman info -f '{{.Store.GraphDriverName}}')\" overlay",
    ),
    works("run with runc", "is \"$(podman --runtime /usr/sbin/runc run --rm busybox id -u)\" 0"),
    works(
        "exec, cp, logs, commit, save, load",
        "podman run -d --name verbs busybox sh -c 'echo said; sleep 1000'
is \"$(podman exec verbs id -u)\" 0
echo in >/tmp/in; podman cp /tmp/in verbs:/in; is \"$(podman exec verbs cat /in)\" in
is \"$(podman logs verbs)\" said
podman commit -q verbs committed; podman save -q committed >/tmp/c.tar; podman rmi committed
podman load -qi /tmp/c.tar; is \"$(podman run --rm committed cat /in)\" in
podman rm -ft 0 verbs",
    ),
    works(
        "--memory, --pids-limit, --cpus",
        "cat >/tmp/limits <<'END'
cat /sys/fs/cgroup/memory/memory.limit_in_bytes 2>/dev/null || cat /sys/fs/cgroup/memory.max
cat /sys/fs/cgroup/cpu/cpu.cfs_quota_us 2>/dev/null || cut -d' ' -f1 /sys/fs/cgroup/cpu.max
cat /sys/fs/cgroup/pids/pids.max 2>/dev/null || cat /sys/fs/cgroup/pids.max
END
is \"$(podman run --rm --memory 64m --cpus 0.5 --pids-limit 50 -v /tmp/limits:/limits busybox sh /limits)\" '67108864
50000
50'",
    ),
    works("--privileged", "podman run --rm --privileged busybox mount -t tmpfs x /tmp"),
    works(
        "a published port; a network of one's own, with names",
        "podman network create own
podman run -d --name web --network own -p 8081:80 busybox sh -c 'echo page >/index.html; exec httpd -f -p 80 -h /'
within 30 busybox wget -qO /tmp/page http://127.0.0.1:8081/
is \"$(cat /tmp/page)\" page
within 30 podman run --rm --network own busybox wget -qO- http://web/
podman rm -ft 0 web; podman network rm own",
    ),
    works(
        "pods",
        "podman pod create --name pod --infra-image localhost/busybox --infra-command 'sleep 1000'
is \"$(podman run --rm --pod pod busybox hostname)\" pod
podman pod rm -ft 0 pod",
    ),
    works("--uidmap", "is \"$(podman run --rm --uidmap 0:20000:1000 busybox cat /proc/self/uid_map | xargs)\" '0 20000 1000'"),
    works(
        "--userns auto, of root's ids in /etc/subuid: two at once with ids of their own",
        "echo root:60000:5000 | tee -a /etc/subuid >>/etc/subgid
podman run -d --name auto --userns auto:size=1000 busybox sleep 1000
one=$(podman exec auto cat /proc/self/uid_map | xargs)
two=$(podman run --rm --userns auto:size=1000 busybox cat /proc/self/uid_map | xargs)
has \"$one\" ' 1000'; is $(($(echo $two | cut -d' ' -f2) - $(echo $one | cut -d' ' -f2))) 1000
is \"$(podman exec auto stat -c %u:%g /bin | xargs)\" 0:0
podman rm -ft 0 auto; sed -i /^root:/d /etc/subuid /etc/subgid",
    ),
    works("podman build", concat!("cd /tmp; ", build!("podman build -q"))),
    works("buildah bud", concat!("cd /tmp; ", build!("buildah bud -q"))),
    works(
        "buildah from, run, commit",
        "c=$(buildah from localhost/busybox); buildah run $c sh -c 'echo x >/x'; buildah commit -q $c from; buildah rm $c
is \"$(podman run --rm from cat /x)\" x",
    ),
];

/// Where a user's storage is, of itself.
macro_rules! storage {
    ($is:literal) => {
        as_user!(concat!("is \"$(podman info -f '{{.Store.GraphDriverName}} {{.Store.GraphStatus}}' | grep -o '^[a-z]*\\|Diff:[a-z]*' | xargs)\" '", $is, "'"))
    };
}

const ON_KERNEL: &[Trial] =
    &[works("rootless: storage is the kernel's overlay", storage!("overlay Diff:true"))];
const ON_FUSE: &[Trial] = &[works(
    "rootless: storage in the home, on an overlay, is fuse-overlayfs",
    storage!("overlay Diff:false"),
)];
const ON_VFS: &[Trial] = &[works("rootless: storage of itself is vfs (copies)", storage!("vfs"))];

const ROOTLESS: &[Trial] = &[
    works(
        "rootless: run",
        as_user!("podman load -qi /tmp/busybox.tar; is \"$(podman run --rm busybox id -u)\" 0; is \"$(podman unshare sed -n '2s/  */ /gp' /proc/self/uid_map)\" ' 1 10000 50000'"),
    ),
    works(
        "rootless: a published port, exec, commit",
        as_user!("podman run -d --name web -p 8082:80 busybox sh -c 'echo page >/index.html; exec httpd -f -p 80 -h /'
n=0; until busybox wget -qO page http://127.0.0.1:8082/; do n=$((n + 1)); [ $n -lt 300 ]; sleep 0.1; done
is \"$(cat page)\" page; is \"$(podman exec web id -u)\" 0
podman commit -q web committed; podman rm -ft 0 web; is \"$(podman run --rm committed cat /index.html)\" page"),
    ),
    works("rootless: a volume, a user, a file of the home", as_user!("echo mine >mine; is \"$(podman run --rm -v v:/v -v ./mine:/mine --user 7:7 busybox sh -c 'id -u; cat /mine')\" '7
mine'")),
    works("rootless: --userns keep-id", as_user!("echo mine >mine; is \"$(podman run --rm --userns keep-id -v ./mine:/mine busybox stat -c %u /mine)\" $(id -u); is \"$(podman run --rm --userns keep-id busybox id -u)\" $(id -u)")),
    works("rootless: podman build", as_user!(build!("podman build -q"))),
    works("rootless: buildah bud", as_user!(build!("buildah bud -q"))),
];

const CTR: &[Trial] = &[
    works(
        "import, run",
        "ctr image import /tmp/busybox.tar
is \"$(ctr run --rm localhost/busybox:latest one id -u)\" 0
is \"$(ctr run --rm --net-host localhost/busybox:latest two hostname)\" \"$(hostname)\"",
    ),
    works(
        "exec, pause, metrics, kill",
        "ctr run -d localhost/busybox:latest three sleep 1000
is \"$(ctr task exec --exec-id e three id -u)\" 0
ctr task pause three; has \"$(ctr task ls)\" PAUSED; ctr task resume three
has \"$(ctr task metrics three)\" memory
ctr task kill -s 9 three; within 30 sh -c 'ctr task ls | grep -q STOPPED'; ctr task rm three || true; ctr container rm three",
    ),
    works(
        "--memory-limit",
        "ctr run -d --memory-limit 67108864 localhost/busybox:latest four sleep 1000
pid=$(ctr task ls | awk '$1 == \"four\" {print $2}')
if [ -e /sys/fs/cgroup/cgroup.controllers ]; then limit=/sys/fs/cgroup$(sed -n 's/^0:://p' /proc/$pid/cgroup)/memory.max
else limit=/sys/fs/cgroup/memory$(sed -n 's/^[0-9]*:memory://p' /proc/$pid/cgroup)/memory.limit_in_bytes; fi
is \"$(cat $limit)\" 67108864
ctr task kill -s 9 four",
    ),
    works("--cni", "has \"$(ctr run --rm --cni localhost/busybox:latest five ip address)\" 10.99.0."),
    works("--privileged", "ctr run --rm --privileged localhost/busybox:latest six mount -t tmpfs x /tmp"),
    works("the native snapshotter", "ctr image unpack --snapshotter native localhost/busybox:latest 2>/dev/null || true
is \"$(ctr run --rm --snapshotter native localhost/busybox:latest seven id -u)\" 0"),
    works(
        "content that came as diffs: snapshot of a change",
        "ctr run localhost/busybox:latest eight sh -c 'rm /etc/group; echo x >/x'
ctr task rm eight 2>/dev/null || true
has \"$(ctr snapshot diff eight | tar -tz 2>/dev/null || ctr snapshot diff eight | tar -t)\" etc/.wh.group
ctr container rm eight",
    ),
];

const BUILDS: &[Trial] = &[
    works(
        "layers on the kernel's overlay",
        "is \"$(buildctl debug workers -v | awk '/worker.snapshotter:/ {print $2}')\" overlayfs",
    ),
    works(
        "a build: a removed file, a replaced directory, an owner, a cache, a secret",
        "mkdir -p /tmp/b; cp /usr/share/sysbox/busybox.tar /tmp/b; echo hidden >/tmp/secret; cat >/tmp/b/Dockerfile <<'END'
FROM scratch AS base
ADD busybox.tar /
RUN mkdir -p /d/sub && touch /d/old /d/sub/old /gone
RUN rm /gone && rm -rf /d && mkdir /d && echo new >/d/new && chown 1000:1000 /d/new
RUN --mount=type=cache,target=/c --mount=type=secret,id=s --mount=type=tmpfs,target=/t touch /c/x /t/x && cp /run/secrets/s /s
FROM base
COPY --from=base /s /copied
END
buildctl build --frontend dockerfile.v0 --local context=/tmp/b --local dockerfile=/tmp/b --secret id=s,src=/tmp/secret --output type=tar,dest=/tmp/out.tar
is \"$(tar -tf /tmp/out.tar | grep -e '^d/' -e gone | xargs)\" 'd/ d/new'
is \"$(tar -xOf /tmp/out.tar copied)\" hidden
has \"$(tar --numeric-owner -tvf /tmp/out.tar d/new)\" 1000/1000",
    ),
    works(
        "again, from its cache; and as an image",
        "has \"$(buildctl build --progress plain --frontend dockerfile.v0 --local context=/tmp/b --local dockerfile=/tmp/b --secret id=s,src=/tmp/secret --output type=oci,dest=/tmp/oci.tar 2>&1)\" CACHED
has \"$(tar -tf /tmp/oci.tar)\" index.json",
    ),
];
