//! FUSE connections of a container that has been killed. A process that holds the server's end of one and waits for an answer
//! from it does not die by a signal: the request was read, so the kernel waits for its answer, and the descriptor whose
//! closing would end the wait is closed by the exit that waits. From outside such a connection can be aborted (fusectl,
//! Documentation/filesystems/fuse.rst).

use std::collections::HashSet;
use std::fs;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use nix::fcntl::{OFlag, openat};
use nix::sys::stat::Mode;
use nix::unistd::Pid;
use sysbox_ipc::IdMap;
use sysbox_sys::mount::{Attributes, FsContext};
use sysbox_sys::path::proc_path;

use crate::cgroup::Cgroup;

/// Aborts the connections that were made inside the container. Never one of sysbox-fs, or of a file system that the container
/// was given: a connection belongs to an id that the user namespace has where it was mounted, and one that a process outside
/// of the container has mounted is left alone (another container may have the same ids, if the network is shared).
pub fn abort(cgroup: &Cgroup, ids: &IdMap) {
    // A mount of our own, attached nowhere: the host need not have one. Without FUSE in the kernel there is none.
    let control = FsContext::open("fusectl").and_then(|context| {
        context.create()?;
        context.mount(Attributes::default())
    });
    let control = match control {
        Ok(control) => control,
        Err(error) => return tracing::debug!(%error, "no control over FUSE connections"),
    };
    let own: Vec<String> = fs::read_dir(proc_path(control.as_fd()))
        .into_iter()
        .flatten()
        .flatten()
        .filter(|entry| entry.metadata().is_ok_and(|facts| ids.owns_host_uid(facts.uid())))
        .filter_map(|entry| entry.file_name().into_string().ok())
        .collect();
    if own.is_empty() {
        return;
    }
    let elsewhere = mounted_elsewhere(cgroup);
    for number in own.iter().filter(|number| !elsewhere.contains(*number)) {
        let file = format!("{number}/abort");
        let opened = openat(&control, file.as_str(), OFlag::O_WRONLY | OFlag::O_CLOEXEC, Mode::empty());
        let aborted = opened.and_then(|fd| nix::unistd::write(&fd, b"1"));
        tracing::debug!(number, ?aborted, "a FUSE connection of the container's");
    }
}

/// The device minors, which are the names of connections, of all FUSE file systems that processes outside of the container
/// have.
fn mounted_elsewhere(cgroup: &Cgroup) -> HashSet<String> {
    let pids = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids: Vec<Pid> =
        pids.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).map(Pid::from_raw).collect();
    // After the list of all: who is in that and was born inside is in this.
    let inside: HashSet<Pid> = cgroup.processes().into_iter().collect();
    let texts = views(pids.into_iter().filter(|pid| !inside.contains(pid)), Path::new("/proc"));
    texts.iter().flat_map(|text| fuse_minors(text)).collect()
}

/// The mounts that these processes see, by one look at each mount namespace from each root in it: most processes share a
/// few, but who has another root is told only of what is below that (proc(5)). Who is gone has told nothing for others.
fn views(pids: impl Iterator<Item = Pid>, proc: &Path) -> Vec<String> {
    let mut told = HashSet::new();
    let look = |pid: Pid| {
        let dir = proc.join(pid.to_string());
        let view = || Some((fs::read_link(dir.join("ns/mnt")).ok()?, fs::read_link(dir.join("root")).ok()?));
        let before = view().filter(|view| !told.contains(view))?;
        let text = fs::read_to_string(dir.join("mountinfo")).ok()?;
        if view().as_ref() == Some(&before) {
            told.insert(before);
        }
        Some(text)
    };
    pids.filter_map(look).collect()
}

fn fuse_minors(mountinfo: &str) -> Vec<String> {
    let minor = |line: &str| {
        let (head, tail) = line.split_once(" - ")?;
        let kind = tail.split(' ').next()?;
        let minor = head.split(' ').nth(2)?.strip_prefix("0:")?;
        (kind == "fuse" || kind.starts_with("fuse.")).then(|| minor.to_owned())
    };
    mountinfo.lines().filter_map(minor).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_ends_or_has_another_root_does_not_hide_what_others_see() {
        let proc = tempfile::tempdir().unwrap();
        let process = |pid: i32, ns: &str, root: &str, mounts: Option<&str>| {
            let dir = proc.path().join(pid.to_string());
            fs::create_dir_all(dir.join("ns")).unwrap();
            std::os::unix::fs::symlink(ns, dir.join("ns/mnt")).unwrap();
            std::os::unix::fs::symlink(root, dir.join("root")).unwrap();
            if let Some(text) = mounts {
                fs::write(dir.join("mountinfo"), text).unwrap();
            }
            Pid::from_raw(pid)
        };
        let pids = [
            process(1, "mnt:[1]", "/jail", Some("of a jail")),
            // It ended between two looks.
            process(2, "mnt:[1]", "/", None),
            process(3, "mnt:[1]", "/", Some("all")),
            process(4, "mnt:[1]", "/", Some("all, again")),
            process(5, "mnt:[2]", "/", Some("of another")),
        ];
        assert_eq!(views(pids.into_iter(), proc.path()), ["of a jail", "all", "of another"]);
    }

    #[test]
    fn connections_are_found_among_mounts() {
        let text = "22 1 0:40 / /a rw - fuse x rw,user_id=0\n23 1 0:41 / /b rw shared:1 - fuse.sshfs y rw\n\
                    24 1 8:1 / /c rw - fuseblk z rw\n25 1 0:42 / /d rw - tmpfs fuse rw\n26 1 0:43 / /e rw - fusectl f rw\n";
        assert_eq!(fuse_minors(text), ["40", "41"]);
    }
}
