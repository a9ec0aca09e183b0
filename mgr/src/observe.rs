//! What the host shows of a container: its process, its writable layer, the runtime's state of it, and which ids living
//! processes have. Looks only; `ledger` draws the conclusions.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::sys::stat::Mode;
use sysbox_ipc::IdRange;
use sysbox_ipc::mgr::{FileId, Process, Record, Rootfs};
use sysbox_sys::SysError;
use sysbox_sys::error::Named;
use sysbox_sys::process::is_alive;

use crate::ledger::{Common, Layer, Seen, process_of};

pub fn seen(record: &Record) -> Seen {
    Seen {
        alive: process_of(record).is_some_and(is_alive),
        layer: layer(&record.rootfs, record.layers),
        state: record.key.root.join(record.key.id.as_str()).is_dir(),
    }
}

/// Whether a writable layer is there. `layers` is what [`layers_of`] said when it was.
pub fn layer(rootfs: &Rootfs, layers: Option<u64>) -> Layer {
    let Rootfs::Overlay { upper, .. } = rootfs else { return Layer::Unknown };
    match std::fs::symlink_metadata(upper) {
        Ok(_) => Layer::Present,
        // Where even the directory of all layers is missing, or is another one, its file system is not mounted (yet).
        Err(error) if error.kind() == io::ErrorKind::NotFound => match layers_of(rootfs) {
            Some(now) if layers.is_none_or(|then| then == now) => Layer::Gone,
            _ => Layer::Unknown,
        },
        Err(_) => Layer::Unknown,
    }
}

/// The inode of the directory that has all layers, of `overlay2/ID/diff` that of `overlay2`. It outlives a reboot, which the
/// number of its device may not.
pub fn layers_of(rootfs: &Rootfs) -> Option<u64> {
    let Rootfs::Overlay { upper, .. } = rootfs else { return None };
    let facts = std::fs::metadata(upper.parent()?.parent()?).ok()?;
    facts.is_dir().then(|| std::os::unix::fs::MetadataExt::ino(&facts))
}

/// The namespaces of a process by which containers may have ids in common; `None` where it is gone.
pub fn common_of(pid: i32) -> Common {
    let of = |name| file_id(&format!("/proc/{pid}/ns/{name}"));
    Common { netns: of("net"), users: of("user") }
}

/// The root directory of a process, if the file system there is an overlay. Asks the kernel's tables only: a container may
/// have made its root a FUSE file system that never answers.
///
/// # Errors
/// `ESRCH`: the process is gone; `ENODEV`: its root is no overlay.
pub fn overlay_root(process: Process) -> sysbox_sys::Result<OwnedFd> {
    let (root, line) = root_mount(process)?;
    if is_overlay(&line) {
        return Ok(root);
    }
    Err(SysError::new(Errno::ENODEV, format!("/proc/{}/root: not an overlay", process.pid)))
}

/// Whether a process has its root on the very file system that is at `merged`, an engine's: so it is where the ids on disk
/// are the container's already (userns-remap), and then there is no second side. The same tables.
pub fn shares_overlay(process: Process, merged: &Path) -> bool {
    let (Ok((_, line)), Ok(facts)) = (root_mount(process), nix::sys::stat::stat(merged)) else {
        return false;
    };
    let number = |text: &str| text.parse().ok();
    let device = line.split(' ').nth(2).and_then(|text| text.split_once(':'));
    let device = device.and_then(|(major, minor)| Some((number(major)?, number(minor)?)));
    device.is_some_and(|(major, minor)| nix::sys::stat::makedev(major, minor) == facts.st_dev)
}

/// The root directory of a process, and the line of its mountinfo file (proc(5)) about it, empty if there is none.
fn root_mount(process: Process) -> sysbox_sys::Result<(OwnedFd, String)> {
    let path = format!("/proc/{}/root", process.pid);
    let gone = || SysError::new(Errno::ESRCH, format!("open({path})"));
    let read = |path: String| std::fs::read_to_string(&path).named(|| format!("read({path})"));
    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let root = nix::fcntl::open(path.as_str(), flags, Mode::empty());
    let mounts = read(format!("/proc/{}/mountinfo", process.pid));
    if !is_alive(process) {
        return Err(gone());
    }
    let root = root.named(|| format!("open({path})"))?;
    let info = read(format!("/proc/self/fdinfo/{}", root.as_raw_fd()))?;
    let mounts = mounts.unwrap_or_default();
    let line = mount_id(&info).and_then(|id| mount_line(&mounts, id)).unwrap_or_default().to_owned();
    Ok((root, line))
}

/// The line `mnt_id:` of /proc/PID/fdinfo/N (proc(5)).
fn mount_id(info: &str) -> Option<&str> {
    info.lines().find_map(|line| line.strip_prefix("mnt_id:")).map(str::trim)
}

/// The line of the mount `id` in the text of a mountinfo file (proc(5)).
fn mount_line<'a>(mounts: &'a str, id: &str) -> Option<&'a str> {
    mounts.lines().find(|line| line.split(' ').next() == Some(id))
}

fn is_overlay(line: &str) -> bool {
    let after = line.split_once(" - ");
    after.is_some_and(|(_, after)| after.split(' ').next() == Some("overlay"))
}

/// The network namespace of this daemon: the host's.
pub fn host_netns() -> Option<FileId> {
    file_id("/proc/self/ns/net")
}

fn file_id(path: &str) -> Option<FileId> {
    std::fs::metadata(path).ok().map(|facts| FileId { dev: facts.dev(), ino: facts.ino() })
}

/// The ranges of host ids within `pool` that the user namespaces of living processes map, with one process of each. What a
/// lost or broken record cannot tell, the processes can.
pub fn ids_in_use(pool: IdRange) -> Vec<(i32, IdRange)> {
    let mut found: Vec<(i32, IdRange)> = Vec::new();
    let entries = match std::fs::read_dir("/proc") {
        Ok(entries) => entries,
        Err(error) => {
            tracing::error!(%error, "list /proc: ids of containers without a record are not known");
            return found;
        }
    };
    let pids = entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    for pid in pids {
        for file in ["uid_map", "gid_map"] {
            // A process that ended meanwhile has no ids.
            let Ok(text) = std::fs::read_to_string(format!("/proc/{pid}/{file}")) else { continue };
            for range in outside_ranges(&text).filter(|range| range.overlaps(pool)) {
                if found.iter().all(|(_, known)| *known != range) {
                    found.push((pid, range));
                }
            }
        }
    }
    found
}

const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

/// Whether the machine was started anew since `note_boot`: process ids and start times of before mean nothing then.
///
/// # Errors
/// The boot id cannot be read.
pub fn booted_anew(data_root: &Path) -> sysbox_sys::Result<bool> {
    let now = std::fs::read(BOOT_ID).named(|| format!("read({BOOT_ID})"))?;
    Ok(std::fs::read(data_root.join("boot_id")).is_ok_and(|before| before != now))
}

/// # Errors
/// The boot id cannot be read or noted.
pub fn note_boot(data_root: &Path) -> sysbox_sys::Result<()> {
    let noted = data_root.join("boot_id");
    std::fs::copy(BOOT_ID, &noted).map(drop).named(|| format!("copy({BOOT_ID}, {})", noted.display()))
}

/// A uid_map seen from outside of a uid_map: the ranges of host ids. The initial namespace maps all to all and says nothing.
fn outside_ranges(text: &str) -> impl Iterator<Item = IdRange> + '_ {
    text.lines().filter_map(|line| {
        let mut numbers = line.split_ascii_whitespace().map(str::parse::<u32>);
        let (_inside, start, count) = (numbers.next()?.ok()?, numbers.next()?.ok()?, numbers.next()?.ok()?);
        (count > 0 && count < u32::MAX).then_some(IdRange { start, count })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_layer_is_gone_only_if_its_place_is_there() {
        let dir = tempfile::tempdir().unwrap();
        let upper = dir.path().join("overlay2/id/diff");
        let rootfs = Rootfs::Overlay { merged: "/m".into(), upper: upper.clone() };
        assert_eq!(layer(&rootfs, None), Layer::Unknown);
        std::fs::create_dir_all(&upper).unwrap();
        let layers = layers_of(&rootfs);
        assert_eq!(layer(&rootfs, layers), Layer::Present);
        std::fs::remove_dir_all(dir.path().join("overlay2/id")).unwrap();
        assert_eq!(layer(&rootfs, layers), Layer::Gone);
        // An engine that starts before its disk is mounted makes an empty one.
        std::fs::rename(dir.path().join("overlay2"), dir.path().join("on-the-disk")).unwrap();
        std::fs::create_dir(dir.path().join("overlay2")).unwrap();
        assert_eq!(layer(&rootfs, layers), Layer::Unknown);
        assert_eq!(layer(&Rootfs::Directory { path: "/".into() }, None), Layer::Unknown);
    }

    #[test]
    fn an_overlay_is_known_by_its_mount() {
        let mounts = "25 1 254:0 / / rw - ext4 /dev/vda rw\n\
                      120 99 0:57 / / rw,relatime master:1 - overlay overlay rw,lowerdir=/l - x\n";
        for (id, expected) in [("120", true), ("25", false), ("12", false), ("99", false)] {
            assert_eq!(mount_line(mounts, id).is_some_and(is_overlay), expected, "{id}");
        }
        assert_eq!(mount_id("pos:\t0\nflags:\t012\nmnt_id:\t120\nino:\t2\n"), Some("120"));
    }

    #[test]
    fn maps_are_read_and_the_initial_one_is_not() {
        let text = "         0     100000      65536\n     65536 1879048192          1\n";
        let got: Vec<_> = outside_ranges(text).collect();
        assert_eq!(got, [IdRange { start: 100_000, count: 65536 }, IdRange { start: 0x7000_0000, count: 1 }]);
        assert_eq!(outside_ranges("         0          0 4294967295\n").count(), 0);
    }
}
