#!/bin/bash
# env.sh: the shell lines, and nothing else, that point a plain `docker` at the bed's engine:
#     eval "$(make -s env)"
# `env.sh --all` prints what tests need besides.
. "$(dirname "$0")/lib.sh"

echo "export DOCKER_HOST=unix://$ENGINE_SOCKET"
# Only where the caller would not find it; lib.sh has widened our own PATH.
docker=$(command -v docker) || docker=
if [ -z "$docker" ]; then
    say "bed: no \`docker\` on this machine yet: make up"
elif ! PATH=$CALLER_PATH command -v docker >/dev/null; then
    echo "export PATH=\"\$PATH:$(dirname "$docker")\""
fi
if [ "${1:-}" = --all ]; then
    cat <<LINES
export SYSBOX_BED=$BED
export SYSBOX_RUNC=$SYSBOX_RUNC
export SYSBOX_BIN_DIR=$BED_HOME/bin
export SYSBOX_RUN_DIR=$SYSBOX_RUN_DIR
export SYSBOX_DATA_ROOT=$SYSBOX_DATA_ROOT
export SYSBOX_MOUNTPOINT=$SYSBOX_MOUNTPOINT
export SYSBOX_LOGS=$BED_LOGS
export SYSBOX_BRIDGE=$ENGINE_BRIDGE
export SYSBOX_ENGINE_DATA=$ENGINE_DATA
LINES
fi
