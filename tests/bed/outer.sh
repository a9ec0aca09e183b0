#!/bin/bash
# outer.sh ENGINE: prints a directory with the programs of another Docker than this machine's (dockerd, containerd, its shim,
# docker-proxy, docker-init), for ENGINE=... of up.sh. trixie and sid are those Debians' packages, taken out of the image of
# image.sh; newest is built from published Go modules by parts.sh. Kept in /var/cache/sysbox/engines.
. "$(dirname "$0")/lib.sh"

RECIPE=1  # raise it with every change to what is in the directory
ENGINES_CACHE=${ENGINES_CACHE:-/var/cache/sysbox/engines}
NEEDED="dockerd containerd containerd-shim-runc-v2 docker-proxy docker-init"

# Their runc wants a newer libc than this machine's; it is not among them, and ours is what is tried.
from_image() { # SUITE DIR
    local image program
    image=$("$BED_DIR/image.sh" --cache-only "$1" | head -n 1)
    mkdir "$2/tree"
    tar -xOzf "$image" --wildcards '*.tar' | tar -C "$2/tree" -x --wildcards \
        './usr/sbin/docker*' './usr/bin/docker-init' './usr/bin/tini-static' './usr/bin/containerd*'
    for program in $NEEDED; do
        # docker-init may be a link to tini-static.
        cp -L "$2/tree/usr/bin/$program" "$2/$program" 2>/dev/null || cp -L "$2/tree/usr/sbin/$program" "$2/$program" ||
            die "Debian $1 has no \`$program\`"
    done
    rm -rf "$2/tree"
}

from_modules() { # DIR
    local program version path
    while read -r program version; do
        path=$("$BED_DIR/parts.sh" "$program" "$version")  # its failure ends us, which within the cp's words it would not
        cp "$path" "$1/$program"
    done <<<'dockerd 2.0.0-beta.24
docker-proxy 2.0.0-beta.24
containerd 2.4.2
containerd-shim-runc-v2 2.4.2'
    # No module has it: any init will do.
    cp -L "$(command -v docker-init || echo /usr/bin/tini-static)" "$1/docker-init"
}

engine=${1:-}
dir=$ENGINES_CACHE/$engine-$RECIPE
case $engine in trixie | sid | newest) ;; *) die "ENGINE=\`$engine\` is not known" "one of trixie, sid, newest" ;; esac
mkdir -p "$ENGINES_CACHE"
exec 6>"$ENGINES_CACHE/.$engine.lock"
flock 6
if [ ! -d "$dir" ]; then
    say "making the programs of Docker from $engine (once; kept in $dir)"
    new=$(mktemp -d "$ENGINES_CACHE/new.XXXXXX")
    trap 'rm -rf --one-file-system -- "$new"' EXIT
    if [ "$engine" = newest ]; then from_modules "$new"; else from_image "$engine" "$new"; fi
    chmod 755 "$new" "$new"/*
    mv "$new" "$dir"
fi
echo "$dir"
