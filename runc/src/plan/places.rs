//! Places of a machine that its programs write to, whatever holds its root.

use std::path::Path;

use oci_spec::runtime::Mount;

use super::mounts::mount;

/// As systemd would mount them, and for a read-only root.
pub(super) fn writable(asked: &[Mount], systemd: bool, read_only: bool) -> Vec<Mount> {
    const ALL: &[(&str, bool, bool, &[&str])] = &[
        // The path, whether systemd wants it, whether a read-only root needs it, its options.
        ("/run", true, true, &["rw", "nosuid", "nodev", "mode=755", "size=64m"]),
        ("/run/lock", true, false, &["rw", "noexec", "nosuid", "nodev", "mode=1777", "size=4m"]),
        ("/tmp", false, true, &["rw", "nosuid", "nodev", "mode=1777", "size=64m"]),
    ];
    // The user's own at the place, or above it, is his way of saying what is there.
    let free = |path: &str| {
        let over = |mount: &Mount| {
            mount.destination() != Path::new("/") && Path::new(path).starts_with(mount.destination())
        };
        !asked.iter().any(over)
    };
    ALL.iter()
        .filter(|(path, of_systemd, of_read_only, _)| {
            ((systemd && *of_systemd) || (read_only && *of_read_only)) && free(path)
        })
        .map(|(path, _, _, options)| mount(*path, "tmpfs", "tmpfs", options))
        .collect()
}
