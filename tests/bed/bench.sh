#!/bin/bash
# bench.sh: the measurements, in a bed of their own (BED=bench), so that nothing else of it runs beside them.
export BED="${BED:-bench}" SUITES="${SUITES:-bookworm sid}"
[ -n "${SKIP_INSTALL:-}" ] || "$(dirname "$0")/packages.sh" build bench
# shellcheck disable=SC2086
exec "$(dirname "$0")/test.sh" cargo run --release -p sysbox-tests --bin bench -- ${BENCH_ARGS:-}
