//! What must be looked up before a plan can be made: what the rootfs stands on, what each bind source is. Reads only.

use std::collections::BTreeMap;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use oci_spec::runtime::Spec;
use sysbox_ipc::mgr::{Ancestor, FileId};

use crate::bundle::Bundle;
use crate::elsewhere::{self, Moved};
use crate::machine;

/// The engine's overlay, as mountinfo tells it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Overlay {
    /// Top first.
    pub lowers: Vec<PathBuf>,
    pub upper: PathBuf,
    pub work: PathBuf,
}

/// What holds the root file system.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ground {
    Overlay(Overlay),
    Directory,
}

/// One bind source on the host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Source {
    pub is_directory: bool,
    pub uid: u32,
    pub gid: u32,
    /// f_type of statfs(2).
    pub magic: i64,
    /// Whether users of the host other than root can reach it: every directory on the way is open to them.
    pub exposed: bool,
}

/// All of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Survey {
    pub ground: Ground,
    /// Owner of the rootfs's top directory.
    pub root_owner: (u32, u32),
    /// As [`Source::exposed`], of the rootfs.
    pub root_exposed: bool,
    /// The image has a link for its /dev.
    pub dev_is_link: bool,
    /// Bind sources by path; one that is missing is not here.
    pub sources: BTreeMap<PathBuf, Source>,
    /// Data roots that the image has moved.
    pub moved_roots: Vec<Moved>,
    /// Data roots, moved ones among them, at which the image has a link or a file.
    pub unusable_roots: Vec<PathBuf>,
    /// Those at which it has a directory.
    pub present_roots: Vec<PathBuf>,
    /// Destinations of `tmpcopyup` at which the image has nothing to copy: nothing at all, or an empty directory.
    pub bare: Vec<PathBuf>,
    /// Whether what holds the writable layer, or the rootfs that is none, can hold the upper layer of an overlay of a user
    /// namespace.
    pub takes_overlays: bool,
    /// Host paths that exist, among those the plan may want: /dev/fuse, /sys/kernel/debug …
    pub present: Vec<&'static str>,
    /// The first program is systemd, as the machine's init.
    pub systemd: bool,
    /// Modules and headers of the host's kernel for which the image has nothing.
    pub kernel_trees: Vec<PathBuf>,
    /// CLOCK_BOOTTIME, in nanoseconds.
    pub boottime_ns: i64,
    /// Whether /sys/fs/cgroup is the unified hierarchy.
    pub cgroup_v2: bool,
}

/// Host paths that the plan asks about.
pub const ASKED: &[&str] =
    &["/dev/fuse", "/dev/net/tun", "/sys/kernel/debug", "/sys/kernel/tracing", "/sys/kernel/config"];

pub const OVERLAY_MAGIC: i64 = libc::OVERLAYFS_SUPER_MAGIC;
const CGROUP2_MAGIC: i64 = libc::CGROUP2_SUPER_MAGIC;

#[derive(Debug, thiserror::Error)]
pub enum SurveyError {
    #[error("read /proc/self/mountinfo: {0}")]
    Mountinfo(std::io::Error),
    #[error("rootfs {}: {source}", path.display())]
    Rootfs { path: PathBuf, source: std::io::Error },
    #[error("/process/apparmorProfile: `{profile}` is not loaded; hint: load it with apparmor_parser")]
    NoProfile { profile: String },
    #[error("rootfs {}: the overlay has no upper directory", path.display())]
    NoUpper { path: PathBuf },
}

/// Looks everything up.
///
/// # Errors
/// See [`SurveyError`]. A missing bind source is not an error here: the plan says which mount it was for.
pub fn look(bundle: &Bundle) -> Result<Survey, SurveyError> {
    let mountinfo = std::fs::read_to_string("/proc/self/mountinfo").map_err(SurveyError::Mountinfo)?;
    let rootfs = std::fs::metadata(&bundle.rootfs)
        .map_err(|source| SurveyError::Rootfs { path: bundle.rootfs.clone(), source })?;
    let ground = ground_of(&bundle.rootfs, &mountinfo)?;
    let moved_roots = std::fs::File::open(&bundle.rootfs)
        .map(|root| elsewhere::look(root.as_fd()))
        .map_err(|source| SurveyError::Rootfs { path: bundle.rootfs.clone(), source })?;
    let bare = bare_of(&bundle.rootfs, &bundle.spec);
    let (present_roots, unusable_roots) = roots_of(&bundle.rootfs, &moved_roots);
    Ok(Survey {
        ground: ground.clone(),
        root_owner: (rootfs.uid(), rootfs.gid()),
        root_exposed: is_exposed(&bundle.rootfs),
        dev_is_link: bundle.rootfs.join("dev").is_symlink(),
        sources: sources_of(&bundle.spec, &bundle.dir),
        unusable_roots,
        present_roots,
        bare,
        takes_overlays: takes_overlays(match &ground {
            Ground::Overlay(overlay) => &overlay.upper,
            Ground::Directory => &bundle.rootfs,
        }),
        moved_roots,
        present: ASKED.iter().copied().filter(|path| Path::new(path).exists()).collect(),
        systemd: bundle
            .spec
            .process()
            .as_ref()
            .is_some_and(|process| machine::is_systemd(&bundle.rootfs, process)),
        kernel_trees: machine::kernel_trees(&bundle.rootfs),
        boottime_ns: boottime_ns(),
        cgroup_v2: magic_of(Path::new("/sys/fs/cgroup")) == CGROUP2_MAGIC,
    })
}

/// The data roots that are there as directories, and those at which something else is. By a walk that follows no link: what is
/// no directory at its end, or on the way, is none.
fn roots_of(rootfs: &Path, moved: &[Moved]) -> (Vec<PathBuf>, Vec<PathBuf>) {
    use nix::errno::Errno;
    use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat2};
    let Ok(root) = std::fs::File::open(rootfs) else { return (Vec::new(), Vec::new()) };
    let how = OpenHow::new()
        .flags(OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC)
        .resolve(ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_SYMLINKS);
    let known = sysbox_ipc::mgr::DATA_ROOTS.iter().map(PathBuf::from);
    let (mut present, mut unusable) = (Vec::new(), Vec::new());
    for path in known.chain(moved.iter().map(|moved| moved.path.clone())) {
        let inside = path.strip_prefix("/").unwrap_or(&path);
        match openat2(&root, inside, how) {
            Ok(_) => present.push(path),
            Err(Errno::ENOENT) => {}
            Err(_) => unusable.push(path),
        }
    }
    (present, unusable)
}

/// As the container will resolve them, but for its own mounts.
fn bare_of(rootfs: &Path, spec: &Spec) -> Vec<PathBuf> {
    use nix::errno::Errno;
    use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat2};
    let Ok(root) = std::fs::File::open(rootfs) else { return Vec::new() };
    let how = OpenHow::new()
        .flags(OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC)
        .resolve(ResolveFlag::RESOLVE_IN_ROOT);
    let is_bare = |path: &Path| match openat2(&root, path, how) {
        // `.` and `..`
        Ok(dir) => nix::dir::Dir::from_fd(dir).is_ok_and(|mut dir| dir.iter().take(3).count() == 2),
        Err(errno) => errno == Errno::ENOENT,
    };
    let asked = spec.mounts().iter().flatten();
    let asked = asked.filter(|mount| mount.options().iter().flatten().any(|option| option == "tmpcopyup"));
    asked.map(|mount| mount.destination().clone()).filter(|path| is_bare(path)).collect()
}

/// What the kernel wants of an upper layer (ovl_get_upper), as far as it can be seen without making anything: a file system that
/// is none of those refused, and that keeps `user.` attributes.
fn takes_overlays(dir: &Path) -> bool {
    const REFUSED: &[i64] = &[OVERLAY_MAGIC, libc::NFS_SUPER_MAGIC];
    let keeps_attributes = std::fs::File::open(dir).is_ok_and(|dir| {
        let itself = sysbox_sys::xattr::Entry { dir: dir.as_fd(), name: ".".as_ref() };
        !itself.get(c"user.overlay.opaque").is_err_and(|error| error.errno == nix::errno::Errno::ENOTSUP)
    });
    keeps_attributes && !REFUSED.contains(&magic_of(dir))
}

/// A profile that is named must be there: the kernel would say only that some file does not exist.
///
/// # Errors
/// `NoProfile`. Where the list cannot be read (no securityfs), the kernel's word has to do.
pub fn require_profile(profile: &str) -> Result<(), SurveyError> {
    let Ok(loaded) = std::fs::read_to_string("/sys/kernel/security/apparmor/profiles") else { return Ok(()) };
    if is_loaded(&loaded, profile) {
        Ok(())
    } else {
        Err(SurveyError::NoProfile { profile: profile.to_owned() })
    }
}

/// The kernel's list has a line a profile: the name, and its mode in parentheses.
fn is_loaded(list: &str, profile: &str) -> bool {
    list.lines().any(|line| line.rsplit_once(" (").is_some_and(|(name, _)| name == profile))
}

fn boottime_ns() -> i64 {
    let now = nix::time::clock_gettime(nix::time::ClockId::CLOCK_BOOTTIME)
        .expect("CLOCK_BOOTTIME exists since Linux 2.6.39 and takes no argument that could be wrong");
    now.tv_sec() * 1_000_000_000 + now.tv_nsec()
}

fn magic_of(path: &Path) -> i64 {
    nix::sys::statfs::statfs(path).map_or(0, |facts| facts.filesystem_type().0)
}

/// Whether a mount of the spec is a bind, by runc's rule: the type or the option says so.
pub fn is_bind(mount: &oci_spec::runtime::Mount) -> bool {
    mount.typ().as_deref() == Some("bind")
        || mount.options().iter().flatten().any(|option| option == "bind" || option == "rbind")
}

/// The host path that a bind names; relative ones count from the bundle, as in runc.
pub fn source_path(mount: &oci_spec::runtime::Mount, bundle: &Path) -> PathBuf {
    bundle.join(mount.source().clone().unwrap_or_default())
}

fn sources_of(spec: &Spec, bundle: &Path) -> BTreeMap<PathBuf, Source> {
    let binds = spec.mounts().iter().flatten().filter(|mount| is_bind(mount));
    binds
        .filter_map(|mount| {
            let path = source_path(mount, bundle);
            let facts = std::fs::metadata(&path).ok()?;
            let source = Source {
                is_directory: facts.is_dir(),
                uid: facts.uid(),
                gid: facts.gid(),
                magic: magic_of(&path),
                exposed: is_exposed(&path),
            };
            Some((path, source))
        })
        .collect()
}

/// What the directory `below` of `base` is: itself, as far as it exists, and all above it. `None` where a link or a file is in
/// the way: an engine inside ends elsewhere then.
pub fn lineage(base: &Path, below: &Path) -> Option<Vec<Ancestor>> {
    let mut there = base.canonicalize().ok().filter(|base| base.is_dir())?;
    let mut names = below.components();
    let mut missing = PathBuf::new();
    for name in names.by_ref() {
        match std::fs::symlink_metadata(there.join(name)) {
            Ok(facts) if facts.is_dir() => there.push(name),
            Ok(_) => return None,
            Err(_) => {
                missing.push(name);
                break;
            }
        }
    }
    missing.push(names.as_path());
    let ancestor = |dir: &Path| {
        let facts = std::fs::metadata(dir).ok()?;
        let rest = there.strip_prefix(dir).unwrap_or(Path::new(""));
        // As components: a push of nothing has left a slash at the end.
        let below = rest.components().chain(missing.components()).collect();
        Some(Ancestor { id: FileId { dev: facts.dev(), ino: facts.ino() }, below })
    };
    Some(there.ancestors().filter_map(ancestor).collect())
}

/// A directory on the way without the search bit for others closes it (the seed guide's rule 2).
fn is_exposed(path: &Path) -> bool {
    let Ok(real) = path.canonicalize() else { return false };
    real.ancestors()
        .filter(|p| p.is_dir())
        .all(|dir| std::fs::metadata(dir).is_ok_and(|facts| facts.mode() & 0o001 != 0))
}

/// Finds the mount at `rootfs` and takes its overlay options apart.
fn ground_of(rootfs: &Path, mountinfo: &str) -> Result<Ground, SurveyError> {
    // The last one wins: it lies on top.
    let line = mountinfo.lines().rev().find(|line| {
        line.split(' ')
            .nth(4)
            .is_some_and(|point| unescape_octal(point) == rootfs.as_os_str().as_encoded_bytes())
    });
    let Some((_, tail)) = line.and_then(|line| line.split_once(" - ")) else { return Ok(Ground::Directory) };
    let mut fields = tail.split(' ');
    if fields.next() != Some("overlay") {
        return Ok(Ground::Directory);
    }
    let options = unescape_octal(fields.nth(1).unwrap_or_default());
    let mut overlay = Overlay { lowers: Vec::new(), upper: PathBuf::new(), work: PathBuf::new() };
    for option in split_unescaped(&options, b',') {
        let Some(at) = option.iter().position(|byte| *byte == b'=') else { continue };
        let (key, value) = (&option[..at], &option[at + 1..]);
        match key {
            b"upperdir" => overlay.upper = path_of(&unescape_backslash(value)),
            b"workdir" => overlay.work = path_of(&unescape_backslash(value)),
            b"lowerdir" => {
                let lowers = split_unescaped(value, b':');
                overlay.lowers.extend(lowers.iter().map(|lower| path_of(&unescape_backslash(lower))));
            }
            b"lowerdir+" => overlay.lowers.push(path_of(&unescape_backslash(value))),
            _ => {}
        }
    }
    if overlay.upper.as_os_str().is_empty() {
        return Err(SurveyError::NoUpper { path: rootfs.to_owned() });
    }
    // An engine names layers relative to the directory that has them all when the option string would be longer than a
    // page: containerd the lower ones, Docker the upper one as well, below which its mount point lies.
    let beside = if overlay.upper.is_absolute() { overlay.upper.as_path() } else { rootfs };
    let home = beside.parent().and_then(Path::parent).unwrap_or(Path::new("/")).to_owned();
    for layer in overlay.lowers.iter_mut().chain([&mut overlay.upper, &mut overlay.work]) {
        *layer = home.join(&*layer);
    }
    Ok(Ground::Overlay(overlay))
}

fn path_of(bytes: &[u8]) -> PathBuf {
    use std::os::unix::ffi::OsStrExt;
    PathBuf::from(std::ffi::OsStr::from_bytes(bytes))
}

/// mountinfo writes space, tab, newline and backslash as `\ooo` (proc(5)).
fn unescape_octal(text: &str) -> Vec<u8> {
    let bytes = text.as_bytes();
    let mut plain = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while at < bytes.len() {
        let digits = bytes
            .get(at + 1..at + 4)
            .filter(|d| bytes[at] == b'\\' && d.iter().all(|c| (b'0'..b'8').contains(c)));
        if let Some(d) = digits {
            plain.push(((d[0] - b'0') << 6) | ((d[1] - b'0') << 3) | (d[2] - b'0'));
            at += 4;
        } else {
            plain.push(bytes[at]);
            at += 1;
        }
    }
    plain
}

fn split_unescaped(text: &[u8], separator: u8) -> Vec<Vec<u8>> {
    let mut parts = vec![Vec::new()];
    let mut escaped = false;
    for byte in text {
        if *byte == separator && !escaped {
            parts.push(Vec::new());
        } else if let Some(part) = parts.last_mut() {
            part.push(*byte);
        }
        escaped = *byte == b'\\' && !escaped;
    }
    parts.retain(|part| !part.is_empty());
    parts
}

fn unescape_backslash(text: &[u8]) -> Vec<u8> {
    let mut plain = Vec::with_capacity(text.len());
    let mut escaped = false;
    for byte in text {
        if *byte == b'\\' && !escaped {
            escaped = true;
        } else {
            plain.push(*byte);
            escaped = false;
        }
    }
    plain
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ground(options: &str) -> Ground {
        let line = format!("36 35 0:50 / /d/o/x/merged rw - overlay overlay {options}\n");
        ground_of(Path::new("/d/o/x/merged"), &line).unwrap()
    }

    fn layers(lowers: &[&str]) -> Ground {
        let lowers = lowers.iter().map(PathBuf::from).collect();
        Ground::Overlay(Overlay { lowers, upper: "/d/o/x/diff".into(), work: "/d/o/x/work".into() })
    }

    #[test]
    fn layers_are_read_in_every_form_the_kernel_writes() {
        let rest = "upperdir=/d/o/x/diff,workdir=/d/o/x/work";
        assert_eq!(ground(&format!("rw,lowerdir=/a:/b,{rest}")), layers(&["/a", "/b"]));
        assert_eq!(ground(&format!("rw,lowerdir+=/a,lowerdir+=/b,{rest}")), layers(&["/a", "/b"]));
        assert_eq!(ground(&format!("rw,lowerdir=l/A:l/B,{rest}")), layers(&["/d/o/l/A", "/d/o/l/B"]));
        let all = "rw,lowerdir=l/A:l/B,upperdir=x/diff,workdir=x/work";
        assert_eq!(ground(all), layers(&["/d/o/l/A", "/d/o/l/B"]));
        assert_eq!(
            ground(&format!("rw,lowerdir=/a\\134:b\\040c:/d\\134\\054e,{rest}")),
            layers(&["/a:b c", "/d,e"])
        );
    }

    #[test]
    fn a_directory_is_known_by_itself_and_all_above_it() {
        let dir = tempfile::tempdir().unwrap();
        let at = |path: &str| dir.path().join(path);
        std::fs::create_dir_all(at("vol/docker")).unwrap();
        std::os::unix::fs::symlink("vol", at("link")).unwrap();
        std::os::unix::fs::symlink("/", at("vol/out")).unwrap();
        let id =
            |path: &Path| std::fs::metadata(path).map(|f| FileId { dev: f.dev(), ino: f.ino() }).unwrap();
        let known = |base: &str, below: &str| lineage(&at(base), Path::new(below)).unwrap();
        let has = |found: &[Ancestor], path: &str, below: &str| {
            let wanted = Ancestor { id: id(&at(path)), below: below.into() };
            assert!(found.contains(&wanted), "{path}+{below}: {found:?}");
        };
        for base in ["vol", "link"] {
            let found = known(base, "docker");
            has(&found, "vol/docker", "");
            has(&found, "vol", "docker");
            has(&found, "", "vol/docker");
            let found = known(base, "later/deep");
            has(&found, "vol", "later/deep");
            assert!(found.iter().all(|a| !a.below.as_os_str().is_empty()), "{found:?}");
        }
        assert_eq!(lineage(&at("vol"), Path::new("out/x")), None);
        assert_eq!(lineage(&at("gone"), Path::new("")), None);
    }

    #[test]
    fn a_profile_is_found_by_its_whole_name() {
        let list = "docker-default (enforce)\n/usr/bin/man (enforce)\nname with (parens) (complain)\n";
        for (profile, loaded) in [
            ("docker-default", true),
            ("docker", false),
            ("/usr/bin/man", true),
            ("name with (parens)", true),
            ("", false),
        ] {
            assert_eq!(is_loaded(list, profile), loaded, "{profile}");
        }
    }

    #[test]
    fn a_plain_directory_is_no_overlay() {
        assert_eq!(
            ground_of(Path::new("/x"), "36 35 0:50 / / rw - ext4 /dev/vda rw\n").unwrap(),
            Ground::Directory
        );
        assert_eq!(
            ground_of(Path::new("/"), "36 35 0:50 / / rw - ext4 /dev/vda rw\n").unwrap(),
            Ground::Directory
        );
    }
}
