//! Data roots that an image has moved: what the settings of its engines say (Docker's daemon.json, the config.yaml of k3s and
//! rke2). The files are the image's: looked up beneath its root, read once, and no more of them than settings have.

use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Component, Path, PathBuf};

use nix::fcntl::OFlag;
use nix::sys::stat::{SFlag, fstat};
use serde_json::Value;
use sysbox_sys::path::{open_in_root, proc_path};

/// A directory that an engine inside will keep its data in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Moved {
    /// As the file says it, without double slashes.
    pub path: PathBuf,
    /// The file, inside the container.
    pub told_by: &'static str,
}

/// A file of settings, and the word for the directory in it.
struct Source {
    file: &'static str,
    read: fn(&str) -> Option<String>,
}

const SOURCES: &[Source] = &[
    Source { file: "/etc/docker/daemon.json", read: of_docker },
    Source { file: "/etc/rancher/k3s/config.yaml", read: of_rancher },
    Source { file: "/etc/rancher/rke2/config.yaml", read: of_rancher },
];

/// More than any engine's settings.
const LONGEST: u64 = 1 << 20;

/// What the files in `rootfs` say. One that cannot be read or understood says nothing here; its engine will complain.
pub fn look(rootfs: BorrowedFd<'_>) -> Vec<Moved> {
    let moved = |source: &Source| {
        let text = read(rootfs, Path::new(source.file))?;
        let path = (source.read)(&text).filter(|path| !path.is_empty())?;
        Some(Moved { path: Path::new(&path).components().collect(), told_by: source.file })
    };
    SOURCES.iter().filter_map(moved).collect()
}

fn read(rootfs: BorrowedFd<'_>, path: &Path) -> Option<String> {
    // Not opened before it is known to be a file: opening a device can do things.
    let found = open_in_root(rootfs, path, OFlag::O_PATH).ok()?;
    let facts = fstat(&found).ok()?;
    if SFlag::from_bits_truncate(facts.st_mode & SFlag::S_IFMT.bits()) != SFlag::S_IFREG {
        return None;
    }
    let mut text = String::new();
    File::open(proc_path(found.as_fd())).ok()?.take(LONGEST).read_to_string(&mut text).ok()?;
    Some(text)
}

/// `data-root`, and its name before Docker 17.05, `graph`.
fn of_docker(text: &str) -> Option<String> {
    let settings: Value = serde_json::from_str(text).ok()?;
    let root = settings.get("data-root").or_else(|| settings.get("graph"))?;
    root.as_str().map(str::to_owned)
}

/// `data-dir: PATH`, at the top level, quoted or not.
fn of_rancher(text: &str) -> Option<String> {
    let mut value =
        text.lines().filter_map(|line| line.strip_prefix("data-dir")?.trim_start().strip_prefix(':'));
    let value = value.next_back()?.trim();
    let quoted = ['"', '\''].iter().find_map(|quote| value.strip_prefix(*quote)?.split(*quote).next());
    let plain = || value.split(" #").next().unwrap_or_default().trim_end();
    Some(quoted.unwrap_or_else(plain).to_owned())
}

/// Why nobody can keep data at a place, whatever is mounted there.
pub fn why_never(path: &Path) -> Option<&'static str> {
    if !path.is_absolute() || path.components().any(|part| part == Component::ParentDir) {
        return Some("it is not an absolute path");
    }
    if ["/proc", "/sys", "/dev"].iter().any(|kernel| path.starts_with(kernel)) {
        return Some("the kernel's own file systems are there");
    }
    None
}

/// Why a place in the root file system cannot be a data root. `known`: those that are some anyway.
pub fn why_not(path: &Path, known: &[&str]) -> Option<&'static str> {
    if known.iter().any(|root| Path::new(root) != path && Path::new(root).starts_with(path)) {
        return Some("it holds other data roots");
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_are_read_as_their_engines_write_them() {
        for (text, expected) in [
            (r#"{"data-root": "/srv/docker", "debug": true}"#, Some("/srv/docker")),
            (r#"{"graph": "/old"}"#, Some("/old")),
            (r#"{"data-root": 7}"#, None),
            ("{\"data-root\": \"/x\"", None),
            ("{}", None),
        ] {
            assert_eq!(of_docker(text).as_deref(), expected, "{text}");
        }
        for (text, expected) in [
            ("token: x\ndata-dir: /srv/k3s\n", Some("/srv/k3s")),
            ("data-dir : \"/srv/k 3s\" # why\n", Some("/srv/k 3s")),
            ("data-dir: '/srv'\n", Some("/srv")),
            ("data-dir: /srv # why\n", Some("/srv")),
            ("x:\n  data-dir: /nested\n", None),
            ("#data-dir: /x\ndata-directory: /y\n", None),
        ] {
            assert_eq!(of_rancher(text).as_deref(), expected, "{text}");
        }
    }

    #[test]
    fn the_files_of_an_image_are_read_inside_it() {
        let dir = tempfile::tempdir().unwrap();
        let outside = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(outside.path(), r#"{"data-root": "/host"}"#).unwrap();
        std::fs::create_dir_all(dir.path().join("etc/docker")).unwrap();
        let settings = dir.path().join("etc/docker/daemon.json");
        let seen = || look(File::open(dir.path()).unwrap().as_fd());
        assert_eq!(seen(), []);
        std::os::unix::fs::symlink(outside.path(), &settings).unwrap();
        assert_eq!(seen(), []);
        std::fs::remove_file(&settings).unwrap();
        // Nobody will ever write to it.
        nix::unistd::mkfifo(&settings, nix::sys::stat::Mode::from_bits_truncate(0o600)).unwrap();
        assert_eq!(seen(), []);
        std::fs::remove_file(&settings).unwrap();
        std::fs::write(&settings, [b"{\"data-root\": \"".as_slice(), &vec![b'x'; 2 << 20], b"\"}"].concat())
            .unwrap();
        assert_eq!(seen(), []);
        std::fs::write(&settings, r#"{"data-root": "/srv"}"#).unwrap();
        assert_eq!(seen(), [Moved { path: "/srv".into(), told_by: "/etc/docker/daemon.json" }]);
    }

    #[test]
    fn places_that_cannot_be_are_known() {
        let known = ["/var/lib/docker", "/var/lib/containerd"];
        for path in ["srv", "/srv/../x", "/proc/x", "/dev/shm/x", "/sys"] {
            assert!(why_never(Path::new(path)).is_some(), "{path}");
        }
        for path in ["/", "/var/lib"] {
            assert!(why_not(Path::new(path), &known).is_some(), "{path}");
        }
        for path in ["/srv", "/var/lib/docker", "/var/lib/docker2", "/developer"] {
            assert_eq!(why_never(Path::new(path)), None, "{path}");
            assert_eq!(why_not(Path::new(path), &known), None, "{path}");
        }
    }
}
