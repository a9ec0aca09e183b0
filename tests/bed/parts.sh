#!/bin/bash
# parts.sh NAME VERSION...: prints the path of each program of the field that our tests stand beside or run inside, built
# once from its published Go module (checked against the public checksums) and kept in /var/cache/sysbox/parts.
. "$(dirname "$0")/lib.sh"

PARTS_CACHE=${PARTS_CACHE:-/var/cache/sysbox/parts}
RECIPE=1  # raise it with every change to how parts are built

# name | module | packages | cgo | tags. A part with a pattern of packages is a directory: all its programs, and the root file
# systems that the module brings along for them.
TABLE='
validation | github.com/opencontainers/runtime-tools | github.com/opencontainers/runtime-tools/validation/... github.com/opencontainers/runtime-tools/cmd/runtimetest | 0 |
runc | github.com/opencontainers/runc | github.com/opencontainers/runc | 1 | seccomp
containerd | github.com/containerd/containerd/v2 | github.com/containerd/containerd/v2/cmd/containerd | 0 | no_btrfs,no_devmapper,no_zfs
ctr | github.com/containerd/containerd/v2 | github.com/containerd/containerd/v2/cmd/ctr | 0 | no_btrfs,no_devmapper,no_zfs
containerd-shim-runc-v2 | github.com/containerd/containerd/v2 | github.com/containerd/containerd/v2/cmd/containerd-shim-runc-v2 | 0 | no_btrfs,no_devmapper,no_zfs
dockerd | github.com/moby/moby/v2 | github.com/moby/moby/v2/cmd/dockerd | 0 |
sized | go.uber.org/automaxprocs | . | 0 |
docker-proxy | github.com/moby/moby/v2 | github.com/moby/moby/v2/cmd/docker-proxy | 0 |
buildkitd | github.com/moby/buildkit | github.com/moby/buildkit/cmd/buildkitd | 0 |
buildctl | github.com/moby/buildkit | github.com/moby/buildkit/cmd/buildctl | 0 |
buildx | github.com/docker/buildx | github.com/docker/buildx/cmd/buildx | 0 |
'

# A part whose package is `.`: a library, and the least program that uses it.
main_of() { # NAME
    case $1 in
    sized)
        cat <<'GO'
package main

import (
	"fmt"
	"runtime"

	"go.uber.org/automaxprocs/maxprocs"
)

func main() {
	if _, err := maxprocs.Set(); err != nil {
		panic(err)
	}
	fmt.Println("of", runtime.NumCPU(), "processors used:", runtime.GOMAXPROCS(0))
}
GO
        ;;
    *) die "no program is known for \`$1\`" ;;
    esac
}

build() { # NAME VERSION OUT
    local name module package cgo tags scratch
    while IFS='|' read -r name module package cgo tags; do
        read -r name <<<"$name"; read -r module <<<"$module"; read -r package <<<"$package"
        read -r cgo <<<"$cgo"; read -r tags <<<"$tags"
        [ "$name" != "$1" ] || break
    done <<<"$TABLE"
    [ "$name" = "$1" ] || die "no part is called \`$1\`"
    PATH=$PATH:/usr/local/go/bin  # where Go's own archive goes, which shells often lack
    command -v go >/dev/null || die "no \`go\` on the PATH" "install a Go toolchain (1.24 or later)"
    scratch=$(mktemp -d)
    local out=$3.new
    rm -rf "$out"
    case $package in *...*) mkdir "$out" && out=$out/ ;; esac
    say "building $1 $2 (once; kept in $PARTS_CACHE)"
    # shellcheck disable=SC2086  # packages are words
    # A module of our own that requires the other: `go install` refuses modules with a `replace`.
    [ "$package" != . ] || main_of "$name" >"$scratch/main.go"
    if ! (cd "$scratch" && printf 'module part\n\ngo 1.24\n\nrequire %s v%s\n' "$module" "$2" >go.mod &&
        CGO_ENABLED=$cgo go build -mod=mod -trimpath -tags "$tags" -ldflags "-s -w" -o "$out" $package >log 2>&1 &&
        { [ -f "$out" ] || cp "$(go list -mod=mod -m -f '{{.Dir}}' "$module")"/rootfs-*.tar.gz "$out"; }); then
        tail -n 20 "$scratch/log" >&2
        rm -rf "$scratch" "$3.new"
        die "$1 $2 could not be built"
    fi
    rm -rf "$scratch"
    mv "$3.new" "$3"
}

[ $# -ge 2 ] || die "usage: parts.sh NAME VERSION..."
mkdir -p "$PARTS_CACHE"
name=$1
shift
for version in "$@"; do
    path=$PARTS_CACHE/$name-$version-$RECIPE
    (
        exec 8>"$path.lock"
        flock 8
        [ -x "$path" ] || build "$name" "$version" "$path"
    )
    [ -x "$path" ] || exit 1
    echo "$path"
done
