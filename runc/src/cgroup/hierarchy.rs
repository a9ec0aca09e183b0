//! The hierarchies of a host: one of version 2, or several of version 1, named ones and one of version 2 beside them included.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

const ROOT: &str = "/sys/fs/cgroup";

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hierarchy {
    pub mount: PathBuf,
    pub kind: Kind,
    /// As /proc/PID/cgroup names it: `memory`, `name=systemd`, empty for the unified one.
    pub name: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    V1,
    /// Where all controllers are.
    Unified,
    /// Beside version 1: it has no controllers that matter.
    Hybrid,
}

pub(super) fn hierarchies_in(mountinfo: &str) -> Vec<Hierarchy> {
    let mut found: Vec<Hierarchy> = Vec::new();
    for line in mountinfo.lines() {
        let Some((head, tail)) = line.split_once(" - ") else { continue };
        let Some(point) = head.split(' ').nth(4) else { continue };
        let fields: Vec<&str> = tail.split(' ').collect();
        let (fstype, options) = (fields[0], fields.get(2).copied().unwrap_or_default());
        let (kind, name) = match fstype {
            "cgroup2" if point == ROOT => (Kind::Unified, String::new()),
            "cgroup2" => (Kind::Hybrid, String::new()),
            "cgroup" => (Kind::V1, v1_name(options)),
            _ => continue,
        };
        if Path::new(point).starts_with(ROOT) && !found.iter().any(|h| h.name == name) {
            found.push(Hierarchy { mount: PathBuf::from(point), kind, name });
        }
    }
    found
}

/// The controllers (or the name) among a hierarchy's mount options.
fn v1_name(options: &str) -> String {
    const NOT_CONTROLLERS: &[&str] = &["rw", "ro", "xattr", "noprefix", "clone_children", "cpuset_v2_mode"];
    let names =
        options.split(',').filter(|o| !NOT_CONTROLLERS.contains(o) && !o.starts_with("release_agent="));
    names.collect::<Vec<_>>().join(",")
}

impl Hierarchy {
    /// Whether it is one of version 1 with this controller.
    pub fn has(&self, controller: &str) -> bool {
        self.name.split(',').any(|name| name == controller)
    }

    pub(super) fn is_foreign_to_libcontainer(&self) -> bool {
        self.kind == Kind::Hybrid || self.name.starts_with("name=")
    }

    /// Whether a create puts itself here before it does anything else.
    pub fn is_anchor(&self) -> bool {
        self.kind == Kind::Unified || self.is_foreign_to_libcontainer()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(mountinfo: &str) -> Vec<(String, Kind, String)> {
        hierarchies_in(mountinfo)
            .into_iter()
            .map(|h| (h.mount.display().to_string(), h.kind, h.name))
            .collect()
    }

    #[test]
    fn hierarchies_are_told_apart() {
        let hybrid = "1 0 0:1 / /sys/fs/cgroup rw - tmpfs tmpfs rw\n\
                      2 1 0:2 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n\
                      3 1 0:3 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,xattr,name=systemd\n\
                      4 1 0:4 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n\
                      5 1 0:2 / /elsewhere rw - cgroup cgroup rw,memory\n";
        assert_eq!(
            shown(hybrid),
            [
                ("/sys/fs/cgroup/cpu,cpuacct".to_owned(), Kind::V1, "cpu,cpuacct".to_owned()),
                ("/sys/fs/cgroup/systemd".to_owned(), Kind::V1, "name=systemd".to_owned()),
                ("/sys/fs/cgroup/unified".to_owned(), Kind::Hybrid, String::new()),
            ]
        );
        let unified = "2 1 0:2 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw,nsdelegate\n";
        assert_eq!(shown(unified), [("/sys/fs/cgroup".to_owned(), Kind::Unified, String::new())]);
    }
}
