#!/bin/bash
# test.sh [COMMAND...]: brings up a bed of its own (BED=test), runs COMMAND in its environment (all tests of the
# workspace by default; TEST_ARGS are handed to them), and takes the bed down again, come what may. Its status is COMMAND's.
BED=${BED:-test}
export BED
. "$(dirname "$0")/lib.sh"
need_root test
# shellcheck disable=SC2086
[ $# -gt 0 ] || set -- cargo test --release --workspace -- ${TEST_ARGS:-}

mkdir -p "$BEDS"
exec 7>"$BEDS/$BED.busy"  # two runs on one bed would take it from under each other
flock -n 7 || { say "waiting for another run on bed \`$BED\`"; flock 7; }

finish() {
    local status=$?
    trap - EXIT
    # Data goes only after a success: after a failure somebody wants to see it.
    if [ $status = 0 ]; then export PURGE=1; else say "bed: logs and data are kept in $BED_HOME"; fi
    "$BED_DIR/down.sh" 7>&- || { [ $status != 0 ] || status=1; }  # what is left behind is a failure as well
    exit $status
}
trap finish EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

[ -n "${SKIP_INSTALL:-}" ] || "$BED_DIR/packages.sh" build test
"$BED_DIR/up.sh" 7>&-
# Of a run that failed; this one starts with none.
leftover=$(bed_docker ps -aq)
# shellcheck disable=SC2086
[ -z "$leftover" ] || bed_docker rm -fv $leftover >/dev/null
for suite in ${SUITES:-bookworm}; do "$BED_DIR/image.sh" "$suite" 7>&-; done

# The lines are in a file too, for a test that starts others with an environment of their own.
SYSBOX_BED_ENV=$BED_RUN/env
"$BED_DIR/env.sh" --all >"$SYSBOX_BED_ENV"
export SYSBOX_BED_ENV
. "$SYSBOX_BED_ENV"
cd "$TOP"
"$@" 7>&-
