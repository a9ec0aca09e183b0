#!/bin/bash
# image.sh [SUITE[-VARIANT]]: makes `sysbox/debian:SUITE` (Debian with systemd and Docker) and `sysbox/busybox` in the
# bed's engine, from the mirror that this machine's apt names; no image registry. Builds are kept in
# /var/cache/sysbox/images and made again only if missing or if RECIPE was raised. Variants, for tests/tests/matrix.rs:
# `engines` has other container engines besides, `tools` what people run in a machine.
# `image.sh --cache-only SUITE` needs no engine; it prints the two files (`docker load` reads them).
. "$(dirname "$0")/lib.sh"
. "$BED_DIR/mirror.sh"

RECIPE=2  # raise it with every change that concerns what is in the images
PACKAGES="systemd,systemd-sysv,dbus,docker.io,containerd,runc,iptables,iproute2,iputils-ping,procps,kmod,python3-minimal,busybox-static"

cache_only=
if [ "${1:-}" = --cache-only ]; then cache_only=1; shift; fi
NAME=${1:-bookworm}
SUITE=${NAME%%-*} VARIANT=${NAME#"${NAME%%-*}"}
case $SUITE in
bookworm) ;;
trixie | sid) PACKAGES=$PACKAGES,docker-cli ;;  # there docker.io is the daemon alone
*) die "SUITE=\`$SUITE\` is not known" "one of bookworm, trixie, sid" ;;
esac
case $VARIANT in
'') ;;
-engines)
    PACKAGES=$PACKAGES,docker-compose,crun,podman,buildah,skopeo,fuse-overlayfs,slirp4netns,uidmap,netavark,aardvark-dns,containernetworking-plugins,catatonit,nftables
    PACKAGES=$PACKAGES,bubblewrap,ipset,wireguard-tools
    [ "$SUITE" = bookworm ] || PACKAGES=$PACKAGES,docker-buildx,passt
    ;;
-tools)
    PACKAGES=$PACKAGES,apt-utils,attr,bindfs,bubblewrap,cron,debootstrap,e2fsprogs,fuse3,gdb,ipset,libcap2-bin,linux-perf,nfs-common,nftables
    PACKAGES=$PACKAGES,openjdk-17-jre-headless,openssh-client,openssh-server,postgresql,squashfs-tools,squashfuse,sshfs,strace,wireguard-tools
    ;;
*) die "VARIANT \`${VARIANT#-}\` is not known" "one of engines, tools" ;;
esac
need_root images SUITE="$NAME"

debian_tar=$IMAGE_CACHE/debian-$NAME-$RECIPE.tar.gz
busybox_tar=$IMAGE_CACHE/busybox-$RECIPE.tar.gz

# What is done in the new root tree, $1, from outside. The busybox tree is for the engine *inside*, which has no
# registry either: `docker import /usr/share/sysbox/busybox.tar`.
# shellcheck disable=SC2016
HOOK='set -eu
cd "$1"
rm -f etc/apt/apt.conf.d/99mmdebstrap etc/dpkg/dpkg.cfg.d/99mmdebstrap etc/resolv.conf etc/hostname
ln -sf /lib/systemd/system/multi-user.target etc/systemd/system/default.target
rm -f etc/systemd/system/timers.target.wants/*  # nothing of it may reach for the network by itself
box=$(mktemp -d)
mkdir -p "$box/bin" "$box/dev" "$box/proc" "$box/sys" "$box/etc" "$box/root" "$box/tmp" "$box/var" "$box/usr/bin"
chmod 755 "$box"; chmod 1777 "$box/tmp"; chmod 700 "$box/root"
echo root:x:0:0:root:/root:/bin/sh >"$box/etc/passwd"
echo root:x:0: >"$box/etc/group"
cp bin/busybox "$box/bin/busybox"
for name in $("$box/bin/busybox" --list); do
    [ "$name" = busybox ] || ln -s busybox "$box/bin/$name"
done
ln -s ../../bin/busybox "$box/usr/bin/env"
mkdir -p usr/share/sysbox
tar -C "$box" --numeric-owner --owner=0 --group=0 -cf usr/share/sysbox/busybox.tar .
rm -rf "$box"'

# Of `tools`: a mirror of its own with what `apt-get install` and debootstrap take there; a container reaches no other.
# shellcheck disable=SC2016
POOL_HOOK='set -eu
cd "$1"
pool=usr/share/sysbox/mirror
lists=$pool/dists/$SUITE/main/binary-$(dpkg --print-architecture)
mkdir -p $pool/pool $lists
chroot . apt-get -qq -o Dir::Cache::Archives=/$pool/pool -d install -y nginx-light redis-server
eval "$(chroot . apt-config shell http_proxy Acquire::http::Proxy)"
export http_proxy
chroot . debootstrap --download-only --variant=minbase "$SUITE" /tmp/minbase "$MIRROR" >&2
mv tmp/minbase/var/cache/apt/archives/*.deb $pool/pool/
rm -rf tmp/minbase $pool/pool/partial $pool/pool/lock
chroot . sh -c "cd /$pool && apt-ftparchive packages pool >/$lists/Packages && apt-ftparchive -o APT::FTPArchive::Release::Codename=$SUITE -o APT::FTPArchive::Release::Suite=$SUITE -o APT::FTPArchive::Release::Components=main -o APT::FTPArchive::Release::Architectures=$(dpkg --print-architecture) release dists/$SUITE >/tmp/Release && mv /tmp/Release dists/$SUITE/Release"'

build_debian() { # TAR: the plain root file system
    local mirror
    mirror=$(debian_mirror)
    case $mirror in https*) PACKAGES=$PACKAGES,ca-certificates ;; esac
    say "building Debian $NAME with Docker from this machine's mirror (a minute or two)"
    local options=()
    mapfile -t options < <(apt_options)
    if [ "$VARIANT" = -tools ]; then
        export SUITE MIRROR=$mirror
        options+=(--customize-hook="$POOL_HOOK")
    fi
    # In namespaces of its own: should it be ended half-way, no process and no mount stays behind.
    unshare --pid --fork --kill-child --mount-proc \
        mmdebstrap --quiet --mode=root --variant=minbase --include="$PACKAGES" "${options[@]}" \
        --aptopt='Acquire::Languages "none"' --dpkgopt=force-unsafe-io \
        --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/man/*' \
        --dpkgopt='path-exclude=/usr/share/locale/*' --dpkgopt='path-exclude=/usr/share/info/*' \
        --customize-hook="$HOOK" "$SUITE" "$1" "deb $mirror $SUITE main"
}

# LAYER NAME CONFIG OUT: a file that `docker load` reads. Not `docker import`: that cannot set a stop signal.
pack() {
    local layer=$1 name=$2 config=$3 out=$4 id arch dir
    dir=$(dirname "$layer")
    id=$(sha256sum "$layer" | cut -d' ' -f1)
    arch=$(dpkg --print-architecture)
    cat >"$dir/config.json" <<JSON
{"architecture": "$arch", "os": "linux", "created": "$(date -u +%Y-%m-%dT%H:%M:%SZ)", "config": $config,
 "rootfs": {"type": "layers", "diff_ids": ["sha256:$id"]}, "history": [{"created_by": "sysbox tests/bed/image.sh"}]}
JSON
    printf '[{"Config": "config.json", "RepoTags": ["%s"], "Layers": ["%s"]}]\n' "$name" "$(basename "$layer")" >"$dir/manifest.json"
    tar -C "$dir" -cf - manifest.json config.json "$(basename "$layer")" | gzip -1 >"$out.part"
    mv "$out.part" "$out"  # a broken build never has the final name
}

if [ ! -e "$debian_tar" ] || [ ! -e "$busybox_tar" ]; then
    mkdir -p "$IMAGE_CACHE"
    exec 8>"$IMAGE_CACHE/.lock"
    flock 8
fi
if [ ! -e "$debian_tar" ] || [ ! -e "$busybox_tar" ]; then  # another build may have just ended
    command -v mmdebstrap >/dev/null || "$BED_DIR/packages.sh" image
    work=$(mktemp -d "$IMAGE_CACHE/build.XXXXXX")
    trap 'rm -rf --one-file-system -- "$work"' EXIT
    trap 'exit 130' INT TERM
    path='"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"'
    label="{\"sysbox.bed.recipe\": \"$RECIPE\"}"
    TMPDIR=$work build_debian "$work/debian.tar"
    mkdir "$work/box"
    tar -xOf "$work/debian.tar" ./usr/share/sysbox/busybox.tar >"$work/box/busybox.tar"
    # Of older recipes.
    find "$IMAGE_CACHE" -maxdepth 1 \( -name "debian-$NAME-[0-9]*.tar.gz" -o -name 'busybox-*.tar.gz' \) ! -name "*-$RECIPE.tar.gz" -delete
    pack "$work/debian.tar" "sysbox/debian:$NAME" \
        "{\"Env\": [$path, \"container=docker\"], \"Cmd\": [\"/sbin/init\"], \"StopSignal\": \"SIGRTMIN+3\", \"Labels\": $label}" "$debian_tar"
    [ -e "$busybox_tar" ] || pack "$work/box/busybox.tar" sysbox/busybox:latest "{\"Env\": [$path], \"Cmd\": [\"sh\"], \"Labels\": $label}" "$busybox_tar"
fi
if [ -n "$cache_only" ]; then printf "%s\n" "$debian_tar" "$busybox_tar"; exit; fi

load() { # NAME FILE
    [ "$(bed_docker image inspect -f '{{index .Config.Labels "sysbox.bed.recipe"}}' "$1" 2>/dev/null)" != "$RECIPE" ] || return 0
    say "loading $1"
    local old
    old=$(bed_docker image inspect -f '{{.Id}}' "$1" 2>/dev/null || true)
    bed_docker load -qi "$2" >/dev/null
    [ -z "$old" ] || bed_docker image rm "$old" >/dev/null 2>&1 || true  # a container may still need it
}
bed_docker version >/dev/null 2>&1 || die "the engine of bed \`$BED\` does not answer" "make up"
load "sysbox/debian:$NAME" "$debian_tar"
load sysbox/busybox:latest "$busybox_tar"
say "images in the engine: sysbox/debian:$NAME sysbox/busybox"
