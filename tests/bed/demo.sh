#!/bin/bash
# demo.sh: one system container, Docker inside it, and what that proves. Every line that it prints is read
# live from the kernel or the engine; the first one that does not hold ends it with status 1.
# Leaves the engine running, takes its containers with it.
. "$(dirname "$0")/lib.sh"
need_root demo
: "${RUNTIME:=sysbox-runc}"  # another one shows what the proofs are worth: RUNTIME=runc fails
: "${SUITE:=bookworm}"

"$BED_DIR/up.sh"
"$BED_DIR/image.sh" "$SUITE"

box=sysbox-demo
outside=sysbox-demo-outside
clean_up() { WITHIN=60 bed_docker rm -fv $box $outside >/dev/null 2>&1 || true; }
fail() {
    printf '  FAILED  %s\n' "$*" >&2
    [ -z "${dockerd_started:-}" ] || { say "--- the end of the inner dockerd's log"; inside tail -n 15 /var/log/dockerd.log >&2 || true; }
    die "the demo does not hold" "logs: $BED_LOGS"
}
trap clean_up EXIT
trap 'exit 130' INT TERM
clean_up

step() { printf '\n%s\n' "$*"; }
proven() { printf '  PROVEN  %-58s %s\n' "$1" "${2:+($2)}"; }
inside() { WITHIN=${WITHIN:-60} bed_docker exec $box "$@"; }

step "A system container:"
command=(run -d --runtime="$RUNTIME" --name "$box" --hostname demo "sysbox/debian:$SUITE" sleep infinity)
printf '  $ %s\n' "docker ${command[*]}"
bed_docker "${command[@]}" >/dev/null || fail "docker could not start it"
pid=$(bed_docker inspect -f '{{.State.Pid}}' $box)
[ "$pid" -gt 0 ] 2>/dev/null || fail "it ended at once: $(bed_docker logs $box 2>&1 | tail -n 3)"

uid_inside=$(inside id -u)
uid_outside=$(awk '/^Uid:/ {print $3}' "/proc/$pid/status")
[ "$uid_inside" = 0 ] || fail "root inside is uid $uid_inside there"
[ "$uid_outside" != 0 ] || fail "root inside is root on the host (/proc/$pid/status)"
proven "root inside is uid $uid_outside on the host" "docker exec id -u: 0; /proc/$pid/status"

read -r first_inside first_outside count <"/proc/$pid/uid_map"
[ "$first_inside" = 0 ] && [ "$first_outside" = "$uid_outside" ] && [ "$count" -ge 65536 ] ||
    fail "uid_map is \`$first_inside $first_outside $count\`"
read -r _ first_gid _ <"/proc/$pid/gid_map"
[ "$first_gid" != 0 ] || fail "group root inside is group root on the host (/proc/$pid/gid_map)"
proven "its ids 0..$((count - 1)) are $first_outside..$((first_outside + count - 1)) here, nobody else's" "/proc/$pid/uid_map"

[ "$(readlink "/proc/$pid/ns/user")" != "$(readlink /proc/self/ns/user)" ] || fail "it is in the host's user namespace"
caps=$(awk '/^CapEff:/ {print $2}' "/proc/$pid/status")
all=$(printf '%016x' $(((1 << ($(cat /proc/sys/kernel/cap_last_cap) + 1)) - 1)))
[ "$caps" = "$all" ] || fail "root inside has capabilities $caps, not all ($all)"
proven "it has all capabilities, over its own user namespace only" "CapEff $caps, $(readlink "/proc/$pid/ns/user")"

owner=$(inside stat -c %u:%g /etc/passwd)
[ "$owner" = 0:0 ] || fail "/etc/passwd inside belongs to $owner"
proven "its files belong to its root, nothing was chowned" "stat /etc/passwd: $owner"

step "Docker inside it:"
bed_docker exec -d $box sh -c 'exec dockerd >/var/log/dockerd.log 2>&1'
dockerd_started=1
inner_engine_answers() { WITHIN=20 inside docker version >/dev/null 2>&1; }
inner_engine_answers_or_died() { inner_engine_answers || ! inside pidof dockerd >/dev/null; }
wait_until 10 inside pidof dockerd >/dev/null || fail "the inner dockerd did not start"
wait_until 60 inner_engine_answers_or_died || fail "the inner dockerd did not become ready in 60 s"
inner_engine_answers || fail "the inner dockerd ended"
version=$(inside docker version -f '{{.Server.Version}}')
driver=$(inside docker info -f '{{.Driver}}')
[ "$driver" = overlay2 ] || fail "the inner storage driver is $driver, not overlay2"
proven "the inner dockerd $version runs on $driver" "docker exec docker info"

inside docker import /usr/share/sysbox/busybox.tar busybox >/dev/null || fail "docker import inside"
# A web server beside the container, on the outer bridge: the inner one reaches it only through two NATs.
token=outside-$(od -An -N6 -tx1 /dev/urandom | tr -d ' ')
bed_docker run -d --runtime=runc --name $outside sysbox/busybox \
    sh -c "echo $token >/tmp/index.html; exec httpd -f -p 80 -h /tmp" >/dev/null || fail "the web server outside did not start"
address=$(bed_docker inspect -f '{{.NetworkSettings.IPAddress}}' $outside)
[ -n "$address" ] || address=$(bed_docker inspect -f '{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}' $outside)
script="echo I am \$(hostname), process \$\$, uid \$(id -u), on \$(hostname -i); timeout 20 wget -qO- http://$address/"
# (`timeout`, since `wget -T` crashes in bookworm's static busybox.) Once more on failure: the server outside may not listen yet.
inner_run() { answer=$(WITHIN=120 inside docker run --rm --hostname inner busybox sh -c "$script" 2>&1) && [[ $answer == *"$token"* ]]; }
wait_until 20 inner_run || fail "the inner container: $answer"
printf '%s\n' "$answer" | sed 's/^/  inner container says: /'
proven "the inner container ran and reached the network outside" "http://$address/ gave it $token"

if [ "$BED" = dev ]; then make_env='make -s env'; else make_env="make -s env BED=$BED"; fi
cat <<TEXT

All of it holds. The engine is left running (make down ends it). A shell of your own:

    eval "\$($make_env)"
    docker run -it --rm --runtime=sysbox-runc sysbox/debian:$SUITE bash

and in it:  dockerd >/var/log/dockerd.log 2>&1 &
            docker import /usr/share/sysbox/busybox.tar busybox && docker run -it --rm busybox
TEXT
