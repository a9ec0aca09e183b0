//! What an image is, looked up in it beneath a descriptor: whether its program is systemd, and which of the host's kernel
//! trees it has no place of its own for.

use std::fs::File;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use nix::fcntl::OFlag;
use oci_spec::runtime::Process;
use sysbox_sys::path::{open_in_root, proc_path};

/// Whether the first program is systemd that is to be the machine's init, by whatever name or link.
pub fn is_systemd(rootfs: &Path, process: &Process) -> bool {
    // As a user's manager, or to say something and end, it needs nothing of a machine.
    const NO_INIT: &[&str] = &["--user", "--version", "--help", "-h", "--test"];
    let args = process.args().as_deref().unwrap_or_default();
    let Some((name, rest)) = args.split_first() else { return false };
    if rest.iter().any(|arg| NO_INIT.contains(&arg.as_str())) {
        return false;
    }
    let Ok(root) = File::open(rootfs) else { return false };
    let env = process.env().as_deref().unwrap_or_default();
    let found = candidates(name, process.cwd(), env).into_iter().find_map(|path| {
        let program = open_in_root(root.as_fd(), &path, OFlag::O_PATH).ok()?;
        std::fs::read_link(proc_path(program.as_fd())).ok()
    });
    found.is_some_and(|real| real.file_name().is_some_and(|name| name == "systemd"))
}

/// Where a program of this name is looked for.
fn candidates(name: &str, cwd: &Path, env: &[String]) -> Vec<PathBuf> {
    if name.contains('/') {
        return vec![cwd.join(name)];
    }
    let path = env.iter().rev().find_map(|pair| pair.strip_prefix("PATH=")).unwrap_or_default();
    path.split(':').map(|dir| cwd.join(dir).join(name)).collect()
}

/// The directories of the running kernel's modules and headers that the host has, and in whose place the image has nothing.
pub fn kernel_trees(rootfs: &Path) -> Vec<PathBuf> {
    let Ok(kernel) = nix::sys::utsname::uname() else { return Vec::new() };
    let Ok(root) = File::open(rootfs) else { return Vec::new() };
    let nothing_there =
        |path: &PathBuf| match open_in_root(root.as_fd(), path, OFlag::O_RDONLY | OFlag::O_DIRECTORY) {
            Ok(dir) => std::fs::read_dir(proc_path(dir.as_fd())).is_ok_and(|mut all| all.next().is_none()),
            Err(error) => error.errno == nix::errno::Errno::ENOENT,
        };
    let all = trees_of(&kernel.release().to_string_lossy());
    all.into_iter().filter(|path| path.is_dir()).filter(nothing_there).collect()
}

/// Where distributions keep them.
fn trees_of(release: &str) -> Vec<PathBuf> {
    if release.is_empty() || release.contains('/') {
        return Vec::new();
    }
    let mut all = vec![
        format!("/lib/modules/{release}"),
        format!("/usr/src/kernels/{release}"),
        format!("/usr/src/linux-headers-{release}"),
    ];
    // What the headers of a flavour link to: Ubuntu's, and Debian's.
    if let Some((base, _)) = release.rsplit_once('-') {
        all.extend([
            format!("/usr/src/linux-headers-{base}"),
            format!("/usr/src/linux-headers-{base}-common"),
        ]);
    }
    all.into_iter().map(PathBuf::from).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;
    use std::os::unix::fs::symlink;

    #[test]
    fn systemd_is_known_by_what_the_program_is() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path();
        for path in ["usr/lib/systemd", "usr/sbin", "usr/bin", "opt"] {
            std::fs::create_dir_all(root.join(path)).unwrap();
        }
        for file in ["usr/lib/systemd/systemd", "usr/bin/sh", "usr/sbin/docker-init", "opt/init"] {
            std::fs::write(root.join(file), "").unwrap();
        }
        symlink("usr/sbin", root.join("sbin")).unwrap();
        symlink("usr/lib", root.join("lib")).unwrap();
        symlink("/lib/systemd/systemd", root.join("usr/sbin/init")).unwrap();
        symlink("../lib/systemd/systemd", root.join("usr/bin/boot")).unwrap();
        // Out of the image: the host's own is none of it.
        symlink("../../../../../../../../../usr/bin/env", root.join("opt/out")).unwrap();
        for (args, expected) in [
            (json!(["/sbin/init"]), true),
            (json!(["init"]), true),
            (json!(["/usr/sbin/init", "--log-level=debug"]), true),
            (json!(["/lib/systemd/systemd"]), true),
            (json!(["boot"]), true),
            (json!(["./sbin/init"]), true),
            (json!(["/lib/systemd/systemd", "--user"]), false),
            (json!(["/sbin/docker-init", "--", "/sbin/init"]), false),
            (json!(["/opt/init"]), false),
            (json!(["/opt/out"]), false),
            (json!(["sh", "-c", "systemd"]), false),
            (json!(["systemd"]), false),
        ] {
            let process = json!({
                "args": args, "cwd": "/", "user": {"uid": 0, "gid": 0}, "env": ["PATH=/usr/bin:/sbin"],
            });
            assert_eq!(is_systemd(root, &serde_json::from_value(process).unwrap()), expected, "{args}");
        }
    }

    #[test]
    fn trees_are_named_by_the_release() {
        let named = |release: &str| -> Vec<String> {
            trees_of(release).iter().map(|path| path.display().to_string()).collect()
        };
        let all = named("6.1.0-13-amd64");
        for path in ["/lib/modules/6.1.0-13-amd64", "/usr/src/linux-headers-6.1.0-13-common"] {
            assert!(all.iter().any(|one| one == path), "{all:?}");
        }
        assert_eq!(named("../x"), Vec::<String>::new());
    }
}
