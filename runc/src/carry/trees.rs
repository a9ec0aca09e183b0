//! Which directories of a data root are the layers of inner images, by their paths: in there a whiteout and an opaque
//! directory are the inner layer's; everywhere else they are the outer one's.

use std::path::{Component, Path, PathBuf};

/// A directory of layers, and what an engine calls the files of one: `overlay2/ID/diff` (Docker), `snapshots/N/fs`
/// (containerd, BuildKit, k3s), `overlay/ID/diff` (podman, buildah).
const STORES: &[(&str, &str)] = &[("overlay2", "diff"), ("overlay", "diff"), ("snapshots", "fs")];

/// The files of the inner layer in which `path`, relative to a data root, is; itself, if it is their directory.
pub fn tree_of(path: &Path) -> Option<PathBuf> {
    let names: Vec<_> = path.components().map(Component::as_os_str).collect();
    let at = names
        .windows(3)
        .position(|three| STORES.iter().any(|(store, files)| three[0] == *store && three[2] == *files))?;
    Some(names[..at + 3].iter().collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_are_known_by_their_place() {
        for (path, tree) in [
            ("overlay2/x/diff", Some("overlay2/x/diff")),
            ("overlay2/x/diff/a/overlay2/y/diff/b", Some("overlay2/x/diff")),
            ("overlay2/x/work/work", None),
            ("overlay2/l/ABC", None),
            ("overlay2/diff", None),
            (
                "io.containerd.snapshotter.v1.overlayfs/snapshots/7/fs/etc",
                Some("io.containerd.snapshotter.v1.overlayfs/snapshots/7/fs"),
            ),
            ("runc-overlayfs/snapshots/snapshots/1/fs/x", Some("runc-overlayfs/snapshots/snapshots/1/fs")),
            ("storage/overlay/x/diff/y", Some("storage/overlay/x/diff")),
            ("volumes/v/_data/overlay2", None),
            ("", None),
        ] {
            assert_eq!(tree_of(Path::new(path)), tree.map(PathBuf::from), "{path}");
        }
    }
}
