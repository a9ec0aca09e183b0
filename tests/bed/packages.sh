#!/bin/bash
# packages.sh build|engine|image|test|bench|bare ...: installs what is missing, as Debian packages by name. A package is asked
# for only where its file is missing, so a Docker, a compiler or an iptables from elsewhere is left as it is.
. "$(dirname "$0")/lib.sh"

# need | command, or /file whose directory may have the machine's triplet (*) | package
TABLE='
build  | gcc                                       | gcc
build  | make                                      | make
build  | /usr/lib/*/crt1.o                         | libc6-dev
build  | pkg-config                                | pkg-config
build  | /usr/lib/*/pkgconfig/libseccomp.pc        | libseccomp-dev
engine | dockerd                                   | docker.io
engine | docker                                    | docker-cli docker.io
engine | containerd                                | containerd
engine | runc                                      | runc
engine | iptables                                  | iptables
engine | ip                                        | iproute2
engine | flock                                     | util-linux
test   | mkfs.ext4                                 | e2fsprogs
test   | mkfs.xfs                                  | xfsprogs
test   | mkfs.btrfs                                | btrfs-progs
test   | script                                    | bsdutils
test   | /bin/busybox                              | busybox-static
test   | ps                                        | procps
test   | strace                                    | strace
test   | bindfs                                    | bindfs
image  | mmdebstrap                                | mmdebstrap
image  | /usr/share/keyrings/debian-archive-keyring.gpg | debian-archive-keyring
bench  | lxcfs                                     | lxcfs
bench  | crun                                      | crun
bare   | slirp4netns                               | slirp4netns
'

is_there() {
    # A pattern on purpose: the library directory carries the triplet.
    case $1 in /*) compgen -G "$1" >/dev/null ;; *) command -v "$1" >/dev/null ;; esac
}
is_package() { apt-cache show --no-all-versions "$1" >/dev/null 2>&1; }

apt() { # quiet unless it fails
    local output
    output=$(DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=300 -q "$@" </dev/null 2>&1) ||
        { printf '%s\n' "$output" | tail -n 20 >&2; return 1; }
}

# Installing a daemon's package must not start it: a second engine on this machine is not what was asked for.
POLICY=/usr/sbin/policy-rc.d
forbid_starts() {
    [ ! -e $POLICY ] || return 0
    trap 'rm -f $POLICY' EXIT
    printf '#!/bin/sh\n# temporary, by sysbox tests/bed/packages.sh\nexit 101\n' >$POLICY
    chmod 755 $POLICY
}

wanted=()
while IFS='|' read -r need file packages; do
    read -r need <<<"$need"; read -r file <<<"$file"
    [ -n "$need" ] || continue
    case " $* " in *" $need "*) ;; *) continue ;; esac
    is_there "$file" || wanted+=("$packages")
done <<<"$TABLE"
[ ${#wanted[@]} -gt 0 ] || exit 0

need_root up
command -v apt-get >/dev/null || die "missing:${wanted[*]}; and this is no Debian" "install them by hand"
refreshed=
choose() { # PACKAGE...: the first that this release has
    local package
    for package in "$@"; do if is_package "$package"; then echo "$package"; return; fi; done
    return 1
}
install=()
for packages in "${wanted[@]}"; do
    # shellcheck disable=SC2086
    if ! package=$(choose $packages); then
        [ -n "$refreshed" ] || apt update || true
        refreshed=1
        package=$(choose $packages) || die "apt knows no package \`${packages# }\`" "apt-get update"
    fi
    install+=("$package")
done
mapfile -t install < <(printf '%s\n' "${install[@]}" | sort -u)

say "installing: ${install[*]}"
forbid_starts
enabled() { # the engine's services that start at boot
    local link
    for link in /etc/systemd/system/*.wants/{docker.service,docker.socket,containerd.service}; do
        if [ -L "$link" ]; then basename "$link"; fi
    done
}
enabled_before=$(enabled)
apt install --no-install-recommends -y "${install[@]}" ||
    { apt update && apt install --no-install-recommends -y "${install[@]}"; } ||  # the lists may be old
    die "apt-get could not install: ${install[*]}"

# Nor may it start at the next boot: what this installation enabled is disabled. The helper is told for which package
# it acts, else it refuses to work outside of one's scripts.
disabled=
for unit in $(enabled); do
    case $enabled_before in *"$unit"*) continue ;; esac
    DPKG_MAINTSCRIPT_PACKAGE=docker.io deb-systemd-helper disable "$unit" >/dev/null 2>&1 || true
    [ "$unit" != docker.service ] || update-rc.d docker disable >/dev/null 2>&1 || true
    disabled="$disabled $unit"
done
[ -z "$disabled" ] || say "note: left stopped and disabled:$disabled (a Docker for yourself: systemctl enable --now docker)"
