#!/bin/bash
# fuzz.sh: searches SECONDS_OF_FUZZ (60) long for bytes that do more to the runtime than be refused when they come as config.json:
# tests/fuzz, by libFuzzer, which the C++ compiler builds. Needs no privilege, but where it keeps what it has learned is root's:
# others say CORPUS=DIR. That is outside of the tree and is where the next run begins; an input that was found to do harm is named at the end.
. "$(dirname "$0")/lib.sh"

CORPUS=${CORPUS:-/var/cache/sysbox/fuzz/config}
FUZZ_TARGET=$TOP/target/fuzz
command -v c++ >/dev/null || die "no \`c++\` on the PATH" "apt-get install g++"
host=$(rustc -vV | sed -n 's/^host: //p')

# The instrumentation that cargo-fuzz asks for; all of it is there in a stable compiler. With --target, build scripts go without.
RUSTFLAGS="-Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 -Cllvm-args=-sanitizer-coverage-inline-8bit-counters
 -Cllvm-args=-sanitizer-coverage-pc-table -Cllvm-args=-sanitizer-coverage-trace-compares" \
    cargo build --release --locked --manifest-path "$TOP/tests/fuzz/Cargo.toml" --target "$host" --target-dir "$FUZZ_TARGET"
config=$FUZZ_TARGET/$host/release/config

mkdir -p "$CORPUS"
SEEDS=$CORPUS "$config"
# A leak is told at the end of a process; here each input would be run twice to look for one.
"$config" -max_total_time="${SECONDS_OF_FUZZ:-60}" -timeout=20 -rss_limit_mb=2048 -max_len=32768 \
    -detect_leaks=0 -dict="$CORPUS.words" -artifact_prefix="$CORPUS.found-" -print_final_stats=1 "$CORPUS"
