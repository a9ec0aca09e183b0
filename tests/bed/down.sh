#!/bin/bash
# down.sh: stops the bed's containers, then takes away what up.sh recorded, newest first, and nothing else.
# Data (the engine's images, the manager's data root) stays unless PURGE=1. Harmless if the bed is down, or
# if the machine was restarted since.
. "$(dirname "$0")/lib.sh"
for part in network engine; do . "$BED_DIR/$part.sh"; done
need_root down
[ "${1:-}" = --locked ] || lock_beds  # up.sh holds the lock already

[ -f "$BED_RECORD" ] || { say "bed \`$BED\` is not up"; exit 0; }
stop_containers
if undo_record; then
    if [ "${PURGE:-0}" = 1 ]; then say "bed \`$BED\` is down, its data is removed"; else say "bed \`$BED\` is down, its data is kept (PURGE=1 removes it)"; fi
else
    die "bed \`$BED\` is not wholly down; what is left is in $BED_RECORD" "end what uses it, then make down again"
fi
