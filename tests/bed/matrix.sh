#!/bin/bash
# matrix.sh [PARTS]: tries every part of the field that tests/tests/matrix.rs and outer_engine.rs have a row for (or those with
# PARTS in their name; TESTS is one of the two files) on a bed of its own, and prints docs/COMPATIBILITY.md from what came of it, also
# of a run that was ended half-way: parts that it did not come to keep what was known of them, and go only if a whole run without a
# fault has them no more. Its status is that of the trials.
. "$(dirname "$0")/lib.sh"
need_root test-matrix

profile=--release
[ "${SKIP_BUILD:-0}" != 1 ] || profile=  # as the programs in BIN_DIR were built
results=$(mktemp)
finish() {
    local status=$? whole=
    [ "$status $parts ${TESTS:-}" != "0 all " ] || whole=--whole
    trap - EXIT
    cd "$TOP"
    if [ -s "$results" ]; then
        # shellcheck disable=SC2086
        cargo run $profile -q -p sysbox-tests --bin compatibility -- $whole "$results" || status=$?
    elif [ $status = 0 ]; then  # nothing was tried, and that is no success
        say "bed: error: no part has \`${parts}\` in its name"
        status=1
    fi
    rm -f "$results"
    exit $status
}
parts=${1:-all}
trap finish EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
export SYSBOX_MATRIX=$parts SYSBOX_ENGINES=$parts SYSBOX_COMPAT=$results
tests=()
for test in ${TESTS:-matrix outer_engine}; do tests+=(--test "$test"); done
# One at a time: some of them measure what they get of the machine. A file with a fault does not keep the other from being tried.
# shellcheck disable=SC2086
"$BED_DIR/test.sh" cargo test $profile --no-fail-fast -p sysbox-tests "${tests[@]}" -- --test-threads 1 --nocapture
