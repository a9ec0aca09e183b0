#!/bin/bash
# test-vm.sh: the end-to-end run in an emulated machine, where systemd, pure cgroup v2 and AppArmor are real and a
# Docker of the machine's own runs beside ours. VM is the program that makes such machines, KERNEL which one.
. "$(dirname "$0")/lib.sh"
: "${KERNEL:=trixie}"
: "${SUITE:=bookworm}"
[ -n "${VM:-}" ] || die "test-vm needs a program that runs emulated machines" "make test-vm VM=path/to/vm [KERNEL=bookworm|trixie|sid]"
[ -x "$VM" ] || die "\`$VM\` (VM) is not a program" "make test-vm VM=path/to/vm"
need_root test-vm
for program in sysbox-runc sysbox-mgr sysbox-fs; do
    [ -x "$BIN_DIR/$program" ] || die "\`$BIN_DIR/$program\` is missing" "make build"
done

stage=$(mktemp -d)
trap 'rm -rf -- "$stage"' EXIT
trap 'exit 130' INT TERM
mkdir -p "$stage/target/release" "$stage/tests" "$stage/images"
cp "$BIN_DIR"/sysbox-{runc,mgr,fs} "$stage/target/release/"
cp -r "$BED_DIR" "$stage/tests/bed"
# Links, not copies: the archive of an image is large. (`vm` follows none, so hard links; another disk: copies.)
for file in $("$BED_DIR/image.sh" --cache-only "$SUITE"); do
    ln "$file" "$stage/images/" 2>/dev/null || cp "$file" "$stage/images/"
done
say "running in an emulated $KERNEL (minutes: it is 20 to 50 times slower than this machine)"
"$VM" run "$KERNEL" --copy "$stage:/root/sysbox" --timeout "${VM_TIMEOUT:-2400}" -- \
    "SUITE=$SUITE GUEST_RUN='${GUEST_RUN:-}' bash /root/sysbox/tests/bed/vm-guest.sh"
