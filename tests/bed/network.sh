# shellcheck shell=bash
# network.sh: the bed's network: a subnet nobody has, a bridge, and the way out of it. Sourced by up and down.
#
# dockerd could write the rules itself, but its chains (DOCKER, DOCKER-USER, ...) have the same names in every
# dockerd of a machine, and one that starts flushes them: it would cut off the published ports of a Docker that
# the user has, and of another bed. So ours runs with iptables off, and two chains of our own let its subnet out.
# Published ports work all the same, through docker-proxy.

# The bed's /16: the lower half for the default bridge, the upper for networks made by `docker network create`.
choose_subnet() {
    local saved candidate
    saved=$(cat "$BED_HOME/subnet" 2>/dev/null || true)
    # Not those that Docker takes by itself (172.17-31, 192.168): an engine of the user may want them tomorrow.
    for candidate in $saved 10.{201..219} 172.{8..15} 10.{90..99}; do
        if is_free_subnet "$candidate"; then
            echo "$candidate" >"$BED_HOME/subnet"
            return
        fi
    done
    die "no free /16 for the bed's network" "ip route show table all"
}
is_free_subnet() { # PREFIX
    [ -z "$(ip -4 route show table all root "$1.0.0/16"; ip -4 route show table all match "$1.0.0/16" | grep -v '^default' || true)" ]
}

start_network() {
    local prefix tool
    choose_subnet
    prefix=$(cat "$BED_HOME/subnet")
    for tool in iptables iptables-legacy none; do  # a kernel may have only one of the two
        [ "$tool" != none ] || die "iptables does not work here: $(iptables -w -t nat -S POSTROUTING 2>&1 | head -1)"
        ! "$tool" -w -t nat -S POSTROUTING >/dev/null 2>&1 || break
    done

    # Nobody forwarded here before: then, like Docker, forward ours and go on refusing all else.
    # The switch is shared by the beds; the first remembers, the last puts it back.
    if [ "$(cat /proc/sys/net/ipv4/ip_forward)" = 0 ]; then
        "$tool" -w -S FORWARD | awk '$1 == "-P" {print $3}' >"$BEDS/forward-policy"
        boot_id >>"$BEDS/forward-policy"
        "$tool" -w -P FORWARD DROP
        echo 1 >/proc/sys/net/ipv4/ip_forward
    fi
    record forwarding "$tool"

    record rules "$tool" "SYSBOX-$BED"
    undo_rules "$tool" "SYSBOX-$BED"
    local filter="$tool -w -t filter" nat="$tool -w -t nat" pool="$prefix.0.0/16"
    $filter -N "SYSBOX-$BED"
    $filter -A "SYSBOX-$BED" -s "$pool" -j ACCEPT
    $filter -A "SYSBOX-$BED" -d "$pool" -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
    $filter -A "SYSBOX-$BED" -d "$pool" -j DROP  # no way in from outside but a published port
    $filter -I FORWARD -j "SYSBOX-$BED"
    $nat -N "SYSBOX-$BED"
    $nat -A "SYSBOX-$BED" -s "$pool" ! -d "$pool" -j MASQUERADE
    $nat -I POSTROUTING -j "SYSBOX-$BED"

    record bridge "$ENGINE_BRIDGE" "$pool"
    # Never `--bridge none` for the engine: that makes dockerd delete `docker0`, whoever made it.
    ip link show "$ENGINE_BRIDGE" >/dev/null 2>&1 || ip link add "$ENGINE_BRIDGE" type bridge
    ip addr replace "$prefix.0.1/17" dev "$ENGINE_BRIDGE"
    ip link set "$ENGINE_BRIDGE" up
}

# The bridges of networks that a user of the bed made have an address of the pool too; dockerd leaves them.
undo_bridge() { # NAME POOL
    local link status=0
    for link in $( { ip -o link show "$1"; ip -4 -o addr show to "$2"; } 2>/dev/null | awk '{sub(/[:@].*/, "", $2); print $2}' | sort -u); do
        [ -d "/sys/class/net/$link/bridge" ] || continue
        ip link del "$link" || status=1
    done
    return $status
}

undo_rules() { # TOOL CHAIN
    local table from status=0
    for table in filter:FORWARD nat:POSTROUTING; do
        from=${table#*:} table=${table%:*}
        "$1" -w -t "$table" -S "$2" >/dev/null 2>&1 || continue
        while "$1" -w -t "$table" -D "$from" -j "$2" 2>/dev/null; do :; done
        "$1" -w -t "$table" -F "$2" && "$1" -w -t "$table" -X "$2" || status=1
    done
    return $status
}

undo_forwarding() { # TOOL
    local policy boot other
    [ -f "$BEDS/forward-policy" ] || return 0
    for other in "$BEDS"/*.record; do  # the switch is still in use
        [ "$other" = "$BED_RECORD" ] || ! grep -q '^forwarding ' "$other" 2>/dev/null || return 0
    done
    { read -r policy; read -r boot; } <"$BEDS/forward-policy"
    if [ "$boot" = "$(boot_id)" ]; then
        echo 0 >/proc/sys/net/ipv4/ip_forward
        "$1" -w -P FORWARD "$policy" || return 1
    fi
    rm -f "$BEDS/forward-policy"
}
