//! What this host can do, found out by trying, once, when the daemon starts.
//!
//! The trying is done by `sysbox-mgr probe DIR`, a process of its own with its own mount namespace: whatever it mounts,
//! enters or gives up ends with it. `ask` is the daemon's side.

use std::ffi::OsStr;
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, chown};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use sysbox_ipc::mgr::HostFacts;
use sysbox_ipc::{IdMap, IdRange};
use sysbox_sys::creds::with_fs_ids;
use sysbox_sys::error::Named;
use sysbox_sys::mount::{Attributes, Depth, FsContext, attach, clone_tree, is_read_only, set_idmap};
use sysbox_sys::path::proc_path;
use sysbox_sys::userns::MapNamespace;
use sysbox_sys::{Result, SysError, probe, userns};
use tracing::{debug, error, info};

/// The hidden subcommand.
pub const SUBCOMMAND: &str = "probe";

/// Host ids used for trying, far from any pool; nothing is left that carries them.
const IDS: IdRange = IdRange { start: 4_000_000_000, count: 65536 };

/// Runs the probe in `data_root` and logs every fact. Where it fails, the host is taken to be able to do nothing.
pub fn ask(data_root: &Path) -> HostFacts {
    let dir = data_root.join("probe");
    let facts = run(&dir).unwrap_or_else(|why| {
        error!(why, "probing the host failed: running as if it could do nothing");
        HostFacts::default()
    });
    if let Err(error) = remove(&dir) {
        error!(path = %dir.display(), %error, "the probe's directory stays");
    }
    info!(
        kernel = facts.kernel,
        idmapped_mounts = facts.idmapped_mounts,
        idmapped_tmpfs = facts.idmapped_tmpfs,
        idmapped_overlay = facts.idmapped_overlay,
        overlay_by_descriptor = facts.overlay_by_descriptor,
        time_namespace = facts.time_namespace,
        raise_rlimits = facts.raise_rlimits,
        seccomp_wait_killable = facts.seccomp_wait_killable,
        apparmor = facts.apparmor,
        "host facts"
    );
    facts
}

fn run(dir: &Path) -> std::result::Result<HostFacts, String> {
    remove(dir)
        .and_then(|()| std::fs::create_dir(dir))
        .map_err(|error| format!("mkdir {}: {error}", dir.display()))?;
    let output = Command::new("/proc/self/exe")
        .args([OsStr::new(SUBCOMMAND), dir.as_os_str()])
        .stdin(Stdio::null())
        .output()
        .map_err(|error| format!("exec /proc/self/exe: {error}"))?;
    for line in String::from_utf8_lossy(&output.stderr).lines() {
        debug!(why = line, "probe");
    }
    serde_json::from_slice(&output.stdout).map_err(|error| format!("{}, {error}", output.status))
}

fn remove(dir: &Path) -> std::io::Result<()> {
    match std::fs::remove_dir_all(dir) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Tries everything in `dir`, an empty directory. For a process that does nothing else and ends afterwards. Why something
/// is not to be had goes to stderr.
///
/// # Errors
/// No mount namespace of its own to try in.
pub fn probe(dir: &Path) -> Result<HostFacts> {
    unshare(CloneFlags::CLONE_NEWNS).named(|| "unshare(CLONE_NEWNS)".to_owned())?;
    let none = None::<&str>;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)
        .named(|| "mount(/, MS_PRIVATE)".to_owned())?;
    let map = IdMap::of_range(IDS).ok_or_else(|| SysError::new(nix::errno::Errno::EINVAL, "id map"))?;
    let userns = userns::with_maps(&map);
    let with_userns = |attempt: fn(&Path, &MapNamespace) -> Result<()>| {
        let userns = userns.as_ref().map_err(Clone::clone)?;
        attempt(dir, userns)
    };
    let uname = nix::sys::utsname::uname().named(|| "uname".to_owned())?;
    Ok(HostFacts {
        kernel: uname.release().to_string_lossy().into_owned(),
        idmapped_mounts: works("idmapped mounts", with_userns(idmapped_mount)),
        idmapped_tmpfs: works("idmapped tmpfs", with_userns(idmapped_tmpfs)),
        idmapped_overlay: works("idmapped overlay", with_userns(idmapped_overlay)),
        overlay_by_descriptor: works("overlay by descriptor", with_userns(overlay_by_descriptor)),
        time_namespace: works("time namespace", time_namespace()),
        raise_rlimits: works("raising limits", raise_rlimits()),
        seccomp_wait_killable: probe::seccomp_knows_flags(probe::NOTIFY_WAIT_KILLABLE),
        apparmor: apparmor(Path::new("/sys")),
    })
}

fn works(what: &str, tried: Result<()>) -> bool {
    tried.inspect_err(|error| eprintln!("{what}: {error}")).is_ok()
}

fn idmapped_mount(dir: &Path, userns: &MapNamespace) -> Result<()> {
    let clone = clone_tree(dir, Depth::One)?;
    set_idmap(clone.as_fd(), userns.as_fd(), Depth::One)
}

fn idmapped_tmpfs(_dir: &Path, userns: &MapNamespace) -> Result<()> {
    let tmpfs = FsContext::open("tmpfs")?;
    tmpfs.create()?;
    set_idmap(tmpfs.mount(Attributes::default())?.as_fd(), userns.as_fd(), Depth::One)
}

fn idmapped_overlay(dir: &Path, userns: &MapNamespace) -> Result<()> {
    overlay(&dir.join("by-path"), userns, |fs, key, fd| {
        let path = proc_path(fd.as_fd());
        fs.set_text(key, &path.to_string_lossy())
    })
}

fn overlay_by_descriptor(dir: &Path, userns: &MapNamespace) -> Result<()> {
    overlay(&dir.join("by-descriptor"), userns, |fs, key, fd| {
        fs.set_descriptor(if key == "lowerdir" { "lowerdir+" } else { key }, fd.as_fd())
    })
}

/// The container's overlay in small: every layer an idmapped clone, attached (Linux before 6.13 asks for that), made and
/// written to as the container's root, and the disk has the plain ids afterwards.
fn overlay(
    dir: &Path,
    userns: &MapNamespace,
    set: fn(&FsContext, &str, &OwnedFd) -> Result<()>,
) -> Result<()> {
    let folder = |name: &str| -> Result<PathBuf> {
        let path = dir.join(name);
        std::fs::create_dir_all(&path).named(|| format!("mkdir({})", path.display()))?;
        Ok(path)
    };
    let idmapped = |path: &Path| -> Result<OwnedFd> {
        let clone = clone_tree(path, Depth::One)?;
        set_idmap(clone.as_fd(), userns.as_fd(), Depth::One)?;
        attach(clone.as_fd(), open(path)?.as_fd())?;
        Ok(clone)
    };
    let (lower, store) = (folder("lower")?, folder("store")?);
    folder("store/upper")?;
    folder("store/work")?;
    let (lower, store) = (idmapped(&lower)?, idmapped(&store)?);
    let [upper, work] = ["upper", "work"].map(|name| open(&proc_path(store.as_fd()).join(name)));
    let (upper, work) = (upper?, work?);
    let fs = FsContext::open("overlay")?;
    for (key, fd) in [("lowerdir", &lower), ("upperdir", &upper), ("workdir", &work)] {
        set(&fs, key, fd)?;
    }
    let merged =
        with_fs_ids(IDS.start, IDS.start, || fs.create().and_then(|()| fs.mount(Attributes::default())))??;
    if is_read_only(merged.as_fd())? {
        return Err(SysError::new(nix::errno::Errno::EROFS, "overlay of idmapped layers"));
    }
    let file = proc_path(merged.as_fd()).join("file");
    with_fs_ids(IDS.start, IDS.start, || File::create(&file))?
        .named(|| "create in the overlay".to_owned())?;
    chown(&file, Some(IDS.start + 7), None).named(|| "chown in the overlay".to_owned())?;
    // Looked at on the disk, beside the idmapped mount that covers it here.
    let on_disk = proc_path(upper.as_fd()).join("file");
    let owner = std::fs::metadata(&on_disk).named(|| "stat in the upper".to_owned())?.uid();
    if owner == IDS.start + 7 {
        Ok(())
    } else {
        Err(SysError::new(nix::errno::Errno::EPROTO, format!("owner {owner}")))
    }
}

fn open(path: &Path) -> Result<OwnedFd> {
    use nix::fcntl::OFlag;
    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    nix::fcntl::open(path, flags, nix::sys::stat::Mode::empty()).named(|| format!("open({})", path.display()))
}

fn time_namespace() -> Result<()> {
    // CLONE_NEWTIME; nix does not know it.
    unshare(CloneFlags::from_bits_retain(0x80)).named(|| "unshare(CLONE_NEWTIME)".to_owned())
}

/// Lowers a hard limit and raises it again, which only CAP_SYS_RESOURCE allows.
fn raise_rlimits() -> Result<()> {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).named(|| "getrlimit(NOFILE)".to_owned())?;
    let lower = hard - 1;
    setrlimit(Resource::RLIMIT_NOFILE, lower, lower).named(|| format!("setrlimit(NOFILE, {lower})"))?;
    setrlimit(Resource::RLIMIT_NOFILE, lower, hard).named(|| format!("setrlimit(NOFILE, {hard})"))
}

/// As runc asks it: the module is on and securityfs shows it.
fn apparmor(sys: &Path) -> bool {
    let enabled = std::fs::read(sys.join("module/apparmor/parameters/enabled"));
    sys.join("kernel/security/apparmor").is_dir() && enabled.is_ok_and(|text| text.starts_with(b"Y"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn apparmor_confines_if_it_is_on_and_seen() {
        for (enabled, shown, expected) in [
            (Some("Y\n"), true, true),
            (Some("N\n"), true, false),
            (Some("Y\n"), false, false),
            (None, true, false),
        ] {
            let sys = tempfile::tempdir().unwrap();
            let parameters = sys.path().join("module/apparmor/parameters");
            std::fs::create_dir_all(&parameters).unwrap();
            if let Some(text) = enabled {
                std::fs::write(parameters.join("enabled"), text).unwrap();
            }
            if shown {
                std::fs::create_dir_all(sys.path().join("kernel/security/apparmor")).unwrap();
            }
            assert_eq!(apparmor(sys.path()), expected);
        }
    }
}
