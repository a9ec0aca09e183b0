#!/bin/bash
# matrix.sh [PARTS]: tries every part of the field that tests/tests/matrix.rs and outer_engine.rs have a row for (or those with
# PARTS in their name; TESTS is one of the two files) on a bed of its own, and prints docs/COMPATIBILITY.md from what came of it. Its status is that of the trials.
. "$(dirname "$0")/lib.sh"
need_root test-matrix

profile=--release
[ "${SKIP_BUILD:-0}" != 1 ] || profile=  # as the programs in BIN_DIR were built
results=$(mktemp)
trap 'rm -f "$results"' EXIT
export SYSBOX_MATRIX=${1:-all} SYSBOX_ENGINES=${1:-all} SYSBOX_COMPAT=$results
tests=()
for test in ${TESTS:-matrix outer_engine}; do tests+=(--test "$test"); done
status=0
# One at a time: some of them measure what they get of the machine.
# shellcheck disable=SC2086
"$BED_DIR/test.sh" cargo test $profile -p sysbox-tests "${tests[@]}" -- --test-threads 1 --nocapture || status=$?
cd "$TOP"
# shellcheck disable=SC2086
[ ! -s "$results" ] || cargo run $profile -q -p sysbox-tests --bin compatibility "$results" || status=$?
exit $status
