#!/bin/bash
# bare.sh [TARGET...]: makes a Debian 12 that has git and a Rust toolchain and nothing else that Debian's smallest installation has
# not, clones what is committed here into it, and does what README.md says: `make demo` (or TARGETs, in order), then `make down`.
# It is a machine apart (apart.sh) on a root tree of its own; this machine gives the kernel, a mirror and the toolchain.
# (BARE_KEEP=1 keeps the tree: somebody wants to see it.)
. "$(dirname "$0")/lib.sh"
. "$BED_DIR/mirror.sh"
need_root test-bare
[ $# -gt 0 ] || set -- demo
command -v cargo >/dev/null || die "no \`cargo\` on the PATH" "sudo -E env PATH=\$PATH make test-bare"
"$BED_DIR/packages.sh" image bare

mkdir -p "$BEDS"
root=$(mktemp -d "$BEDS/bare.XXXXXX")
tidy() { if [ "${BARE_KEEP:-0}" = 1 ]; then say "bare: kept in $root"; else remove_tree "$root"; fi; }
trap tidy EXIT
trap 'exit 130' INT TERM

mirror=$(debian_mirror)
mapfile -t options < <(apt_options)
say "bare: Debian bookworm, --variant=minbase, and git, from this machine's mirror"
TMPDIR=$BEDS unshare --pid --fork --kill-child --mount-proc \
    mmdebstrap --quiet --mode=root --variant=minbase --include=git,ca-certificates "${options[@]}" \
    --dpkgopt=force-unsafe-io bookworm "$root" "deb $mirror bookworm main"
say "bare: $(chroot "$root" dpkg-query -f '.\n' -W | wc -l) packages; Debian $(cat "$root/etc/debian_version")"

# What cargo has fetched already is lent as well: another 160 MB from the network would show nothing of this project.
cargo_home=${CARGO_HOME:-$HOME/.cargo}
mkdir -p "$root/root/.cargo"
for part in registry config.toml config; do
    [ ! -e "$cargo_home/$part" ] || cp -a "$cargo_home/$part" "$root/root/.cargo/"
done
# Whom this machine trusts, a mirror or a proxy of its own among them.
cp -L /etc/ssl/certs/ca-certificates.crt "$root/etc/ssl/certs/ca-certificates.crt" 2>/dev/null || true
git -c safe.directory='*' clone -q --bare --no-local "$TOP" "$root/srv/sysbox.git"
[ -z "$(git -C "$TOP" status --porcelain)" ] || say "bare: note: what is not committed is not in the clone"

# As a person would, word for word; the first line that fails ends it.
script='set -eu
cd /root
step() { printf "\n# %s\n" "$*"; "$@" || { echo "bare: \`$*\` failed" >&2; exit 1; }; }
step apt-get -qq update
step apt-get -qq install -y make >/dev/null
step git clone -q /srv/sysbox.git sysbox
cd sysbox
began=$SECONDS
for target in $TARGETS; do
    start=$SECONDS
    step make "$target"
    echo "bare: make $target: $((SECONDS - start)) s"
done
case " $TARGETS " in *" demo "*)
    eval "$(make -s env)"
    step docker run --rm --runtime=sysbox-runc sysbox/debian:bookworm cat /proc/self/uid_map
    step make down PURGE=1
esac
left=$(awk "{print \$5}" /proc/self/mountinfo | grep -e sysbox-bed/. -e sysboxfs || true
    cat /proc/[0-9]*/comm 2>/dev/null | grep -E "^(dockerd|containerd|docker-proxy|sysbox-)" || true)
[ -z "$left" ] || { echo "bare: left behind: $left" >&2; exit 1; }
echo "bare: all holds, in $((SECONDS - began)) s"'
"$BED_DIR/apart.sh" --root "$root" --bind "$(rustc --print sysroot):/opt/rust" --network \
    /usr/bin/env -i HOME=/root TERM="${TERM:-dumb}" PATH=/opt/rust/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
    TARGETS="$*" bash -c "$script"
