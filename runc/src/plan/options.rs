//! What the options of a mount ask for: flags, and whose ids it shows.

use oci_spec::runtime::Mount;
use sysbox_ipc::IdMapLine;

use super::mounts::Extent;
use super::{PlanError, lines};

/// Flags that a mount gets before anyone sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Attributes {
    pub read_only: bool,
    pub nosuid: bool,
    pub nodev: bool,
    pub noexec: bool,
    pub nosymfollow: bool,
    pub nodiratime: bool,
    pub atime: Atime,
}

/// When a read of a file is noted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Atime {
    /// As the source has it.
    #[default]
    Kept,
    Relative,
    Never,
    Always,
}

/// Ids of a mount's own: from those on disk to those of the host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MountMap {
    pub uids: Vec<IdMapLine>,
    pub gids: Vec<IdMapLine>,
}

/// The flags among a mount's options: for its top, for the whole tree, and those to be taken from the whole tree.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Flags {
    pub top: Attributes,
    pub tree: Attributes,
    pub cleared: Attributes,
}

type Change = fn(&mut Attributes, bool);

/// An option that is a flag, and the one that takes it back. With an `r` before it, it holds for the whole tree.
const FLAGS: &[(&str, &str, Change)] = &[
    ("ro", "rw", |a, on| a.read_only = on),
    ("nosuid", "suid", |a, on| a.nosuid = on),
    ("nodev", "dev", |a, on| a.nodev = on),
    ("noexec", "exec", |a, on| a.noexec = on),
    ("nosymfollow", "symfollow", |a, on| a.nosymfollow = on),
    ("nodiratime", "diratime", |a, on| a.nodiratime = on),
    ("noatime", "atime", |a, on| a.atime = if on { Atime::Never } else { Atime::Relative }),
    ("strictatime", "nostrictatime", |a, on| a.atime = if on { Atime::Always } else { Atime::Relative }),
    ("relatime", "", |a, _| a.atime = Atime::Relative),
];

pub(super) fn flags(mount: &Mount) -> Flags {
    let mut all = Flags::default();
    for option in mount.options().iter().flatten() {
        for (set, unset, change) in FLAGS {
            if !option.is_empty() && (option == set || option == unset) {
                change(&mut all.top, option == set);
            }
            let recursive = |name: &str| !name.is_empty() && option.strip_prefix('r') == Some(name);
            if recursive(set) || recursive(unset) {
                change(&mut all.tree, recursive(set));
                change(&mut all.cleared, recursive(unset));
            }
        }
    }
    // An access time is set or not; nothing of it is taken away.
    all.cleared.atime = Atime::Kept;
    all
}

pub(super) fn has(asked: &Mount, name: &str) -> bool {
    asked.options().iter().flatten().any(|option| option == name)
}

/// How far the ids of a mount are to be mapped, where it says so. One that brings mappings of its own asks for it as the
/// option `idmap` does.
pub(super) fn shift_extent(asked: &Mount) -> Option<Extent> {
    let some = |lines: &Option<Vec<_>>| lines.as_ref().is_some_and(|lines| !lines.is_empty());
    let mapped = some(asked.uid_mappings()) || some(asked.gid_mappings());
    if has(asked, "ridmap") {
        Some(Extent::Tree)
    } else {
        (mapped || has(asked, "idmap")).then_some(Extent::Mount)
    }
}

pub(super) fn own_map(at: usize, asked: &Mount) -> Result<Option<MountMap>, PlanError> {
    let (uids, gids) = (lines(asked.uid_mappings()), lines(asked.gid_mappings()));
    match (uids.is_empty(), gids.is_empty()) {
        (true, true) => Ok(None),
        (false, false) => Ok(Some(MountMap { uids, gids })),
        _ => {
            Err(PlanError::Mount { at, why: "uidMappings and gidMappings must be given together".to_owned() })
        }
    }
}

/// What cannot be had of a mount that is no bind; `bare`: there is nothing below it that could be copied.
pub(super) fn refuse(at: usize, asked: &Mount, bare: bool) -> Result<(), PlanError> {
    let why = if shift_extent(asked).is_some() {
        "ids can only be mapped for a bind mount"
    } else if has(asked, COPY_UP) && asked.typ().as_deref() != Some("tmpfs") {
        "option `tmpcopyup` is for a tmpfs"
    } else if has(asked, COPY_UP) && !bare {
        "option `tmpcopyup` is not supported where the image has files; hint: leave it out (podman: `notmpcopyup`), and have \
         the program fill the tmpfs"
    } else {
        return Ok(());
    };
    Err(PlanError::Mount { at, why: why.to_owned() })
}

/// The kernel does not know it: it is for who copies.
pub(super) const COPY_UP: &str = "tmpcopyup";

pub(super) fn without_copy_up(asked: &Mount) -> Mount {
    let mut mount = asked.clone();
    if has(asked, COPY_UP) {
        let options = asked.options().iter().flatten().filter(|option| *option != COPY_UP);
        mount.set_options(Some(options.cloned().collect()));
    }
    mount
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn of(options: &[&str]) -> Flags {
        let mount = json!({"destination": "/a", "type": "bind", "source": "/b", "options": options});
        flags(&serde_json::from_value(mount).unwrap())
    }

    #[test]
    fn options_are_flags_of_the_top_or_of_the_tree() {
        let plain = Attributes::default();
        assert_eq!(of(&["rbind", "rprivate", "defaults", "size=1"]), Flags::default());
        let top = Attributes { read_only: true, nosuid: true, atime: Atime::Never, ..plain };
        assert_eq!(of(&["ro", "nosuid", "noatime", "noexec", "exec"]), Flags { top, ..Flags::default() });
        let tree = Attributes { read_only: true, nosymfollow: true, atime: Atime::Always, ..plain };
        let cleared = Attributes { noexec: true, ..plain };
        assert_eq!(
            of(&["rro", "rnosymfollow", "rstrictatime", "rexec"]),
            Flags { tree, cleared, ..Flags::default() }
        );
        assert_eq!(of(&["relatime"]).top.atime, Atime::Relative);
        assert_eq!(of(&["ratime"]).tree.atime, Atime::Relative);
        // The last one counts.
        assert_eq!(of(&["rro", "rrw"]).tree, plain);
        assert!(!of(&["rrw", "rro"]).cleared.read_only);
    }
}
