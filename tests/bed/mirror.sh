# shellcheck shell=bash
# mirror.sh: where this machine's own apt gets Debian from, and how; a new root tree is made from there. Sourced.

# URI, or an end with what is wrong. (A file list or a cdrom is no mirror for another suite.)
debian_mirror() {
    local uri
    uri=$(known_mirror)
    [ -n "$uri" ] || { apt-get -qq update >&2 || true; uri=$(known_mirror); }
    [ -n "$uri" ] || die "apt on this machine knows no Debian mirror" "see apt-get indextargets"
    echo "$uri"
}
known_mirror() {
    apt-get indextargets --format '$(LABEL) $(REPO_URI)' 'Created-By: Packages' |
        awk '$1 == "Debian" && $2 ~ /^(https?|file|mirror)/ {print $2; exit}'
}

# How this machine reaches its mirror (a proxy, a mirror with old dates) must hold in the new root too.
apt_options() {
    apt-config dump | sed -nE 's/^(Acquire::(https?::|ftp::)?(Proxy|Check-Valid-Until|Check-Date)[^ ]*) "(.+)";$/--aptopt=\1 "\4"/p'
}
