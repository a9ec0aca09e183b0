//! Which directories of the user's an inner engine of this container would keep its data in, and for itself: two running
//! engines on one would spoil it (docs/decisions/0003-data-roots.md).

use std::path::{Path, PathBuf};

use oci_spec::runtime::Mount;
use sysbox_ipc::mgr::{DATA_ROOTS, STORES};

use super::mounts::normal;
use super::options::flags;
use crate::bundle::Bundle;
use crate::elsewhere::Moved;
use crate::survey::{Ground, is_bind, source_path};

/// A directory that is claimed if it turns out to be one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wanted {
    /// Inside the container.
    pub inside: String,
    /// What is mounted, on the host, and the way from there to the directory.
    pub base: PathBuf,
    pub below: PathBuf,
    /// Only if it is there already: it came with a rootfs, which alone does not say that an engine is meant to run.
    pub only_if_there: bool,
}

/// The directories to be claimed. Read-only ones are not: no engine runs on them.
pub fn wanted(bundle: &Bundle, ground: &Ground, moved: &[Moved]) -> Vec<Wanted> {
    let mounts: Vec<Mount> = bundle.spec.mounts().iter().flatten().cloned().map(normal).collect();
    let root = bundle.spec.root().as_ref();
    let own_root = *ground == Ground::Directory && root.is_some_and(|root| !root.readonly().unwrap_or(false));
    let mut all = Vec::new();
    let moved = moved.iter().filter_map(|moved| moved.path.to_str());
    for inside in DATA_ROOTS.iter().copied().chain(moved) {
        match over(&mounts, inside) {
            Some(mount) => all.extend(in_mount(mount, inside, bundle)),
            None if own_root => all.push(Wanted {
                inside: inside.to_owned(),
                base: bundle.rootfs.clone(),
                below: relative(inside).to_owned(),
                only_if_there: true,
            }),
            None => {}
        }
    }
    for inside in STORES {
        // One that a claim above covers needs none.
        let below_a_root = |mount: &&Mount| {
            DATA_ROOTS
                .iter()
                .any(|root| mount.destination().starts_with(root) && mount.destination() != Path::new(root))
        };
        all.extend(
            over(&mounts, inside).filter(below_a_root).and_then(|mount| in_mount(mount, inside, bundle)),
        );
    }
    all
}

fn relative(path: &str) -> &Path {
    Path::new(path.trim_start_matches('/'))
}

/// The mount on which a path lies: the nearest above it, and of several on one place the last.
fn over<'m>(mounts: &'m [Mount], path: &str) -> Option<&'m Mount> {
    let above = mounts.iter().enumerate().filter(|(_, mount)| {
        mount.destination() != Path::new("/") && Path::new(path).starts_with(mount.destination())
    });
    above.max_by_key(|(at, mount)| (mount.destination().components().count(), *at)).map(|(_, mount)| mount)
}

fn in_mount(mount: &Mount, inside: &str, bundle: &Bundle) -> Option<Wanted> {
    let (top, tree) = (flags(mount).top, flags(mount).tree);
    let writable = is_bind(mount) && !top.read_only && !tree.read_only;
    let below = Path::new(inside).strip_prefix(mount.destination()).ok()?;
    writable.then(|| Wanted {
        inside: inside.to_owned(),
        base: source_path(mount, &bundle.dir),
        below: below.to_owned(),
        only_if_there: false,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn claimed(ground: &Ground, read_only: bool, mounts: &Value) -> Vec<String> {
        let spec =
            json!({"ociVersion": "1.0.2", "root": {"path": "r", "readonly": read_only}, "mounts": mounts});
        let bundle = Bundle {
            dir: "/b".into(),
            rootfs: "/b/r".into(),
            spec: serde_json::from_value(spec).unwrap(),
            unknown: vec![],
        };
        let shown = |w: Wanted| {
            format!(
                "{} {}+{}{}",
                w.inside,
                w.base.display(),
                w.below.display(),
                if w.only_if_there { "?" } else { "" }
            )
        };
        wanted(&bundle, ground, &[]).into_iter().map(shown).filter(|line| line.contains("docker")).collect()
    }

    fn bind(destination: &str, options: &[&str]) -> Value {
        json!({"destination": destination, "type": "bind", "source": "/h", "options": options})
    }

    #[test]
    fn what_an_engine_would_write_to_is_claimed() {
        let overlay = crate::survey::Overlay { lowers: vec![], upper: "/u".into(), work: "/w".into() };
        let overlay = Ground::Overlay(overlay);
        let tmpfs = json!({"destination": "/var/lib/docker", "type": "tmpfs", "source": "t"});
        for (mounts, expected) in [
            (json!([bind("/var/lib/docker", &["rbind"])]), vec!["/var/lib/docker /h+"]),
            (json!([bind("/var/lib/docker", &["rbind", "ro"])]), vec![]),
            (json!([bind("/var/lib", &["rbind"])]), vec!["/var/lib/docker /h+docker"]),
            (json!([bind("/var//lib/x/..", &["rbind"])]), vec!["/var/lib/docker /h+docker"]),
            (json!([bind("/var/lib/docker/overlay2", &["rbind"])]), vec!["/var/lib/docker/overlay2 /h+"]),
            // What lies on top counts.
            (json!([bind("/var/lib", &["rbind"]), tmpfs]), vec![]),
            (
                json!([bind("/var/lib/docker", &["ro"]), bind("/var/lib/docker/image", &[])]),
                vec!["/var/lib/docker/image /h+"],
            ),
            // What people share.
            (json!([bind("/var/lib/docker/volumes/v/_data", &["rbind"])]), vec![]),
            (json!([bind("/var/lib/rancher/k3s/agent/images", &["rbind"])]), vec![]),
            (json!([bind("/srv", &["rbind"])]), vec![]),
        ] {
            assert_eq!(claimed(&overlay, false, &mounts), expected, "{mounts}");
        }
        assert_eq!(claimed(&Ground::Directory, false, &json!([])), ["/var/lib/docker /b/r+var/lib/docker?"]);
        assert!(claimed(&Ground::Directory, true, &json!([])).is_empty());
    }
}
