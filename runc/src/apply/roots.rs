//! Data roots: the container's own layer's directory, or a managed volume, each with what the image holds of it.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::sys::stat::{Mode, fstat};
use sysbox_sys::error::Named;
use sysbox_sys::mount::{self as m, Depth};
use sysbox_sys::path::open_in_root;
use sysbox_sys::{SysError, creds};

use super::{Attempt, Base, Result, Staged};
use crate::plan::{Shift, Target, TargetKind};
use crate::preload;
use crate::survey::{Ground, Overlay, Survey};

impl Base<'_> {
    /// A data root from the container's own layer: the directory on disk that holds it, shifted, for an inner engine to
    /// use as the real file system that it is (docs/decisions/0003-data-roots.md).
    pub(super) fn layer_root(
        &self,
        staged: &mut Staged,
        overlay: &Overlay,
        survey: &Survey,
        path: &Path,
    ) -> Result<OwnedFd> {
        let shown = || format!("data root {}", path.display());
        let point =
            self.make_target(staged, &Target { path: path.to_owned(), kind: TargetKind::Directory })?;
        let open = || preload::open_in_layer(&overlay.upper, path, OFlag::O_PATH);
        let on_disk = match open().attempt(shown)? {
            Some(on_disk) => on_disk,
            None => {
                // Only in lower layers: setting the mode it has copies the directory up.
                let readable =
                    open_in_root(point.as_fd(), Path::new("/"), OFlag::O_RDONLY | OFlag::O_DIRECTORY);
                let readable = readable.attempt(shown)?;
                let mode = Mode::from_bits_truncate(fstat(&readable).attempt(shown)?.st_mode & 0o7777);
                let (uid, gid) = self.disk_ids();
                creds::with_fs_ids(uid, gid, || nix::sys::stat::fchmod(&readable, mode))
                    .attempt(shown)?
                    .attempt(shown)?;
                let missing = || SysError::new(Errno::ENOENT, "the copied-up directory");
                open().and_then(|found| found.ok_or_else(missing)).attempt(shown)?
            }
        };
        let beside = overlay.upper.parent().unwrap_or(Path::new("/"));
        // What the engine's view has not, no layer has; then none of a hundred is asked.
        let is_there = survey.present_roots.iter().any(|root| root == path);
        let lowers = if is_there { overlay.lowers.as_slice() } else { &[] };
        let brought = preload::bring(lowers, path, on_disk.as_fd(), beside).attempt(shown)?;
        staged.warnings.extend(brought);
        let clone = m::clone_fd(on_disk.as_fd(), Depth::One).attempt(shown)?;
        if self.plan.root.shift != Shift::Never {
            m::set_idmap(clone.as_fd(), self.shifter, Depth::One).attempt(shown)?;
        }
        Ok(clone)
    }

    /// What the image holds of a data root that is a volume comes into it as into a layer, once. Of an overlay the writable
    /// layer counts too: an engine may have put files there before the first start.
    pub(super) fn fill_volumes(&self, staged: &mut Staged, survey: &Survey) -> Result<()> {
        for volume in &self.plan.volumes {
            let is_there = survey.present_roots.contains(&volume.path);
            let layers: Vec<PathBuf> = match &survey.ground {
                _ if !is_there => Vec::new(),
                Ground::Overlay(overlay) => {
                    [&overlay.upper].into_iter().chain(&overlay.lowers).cloned().collect()
                }
                Ground::Directory => vec![self.rootfs.to_owned()],
            };
            let shown =
                || format!("volume {} for data root {}", volume.host.display(), volume.path.display());
            let target = File::open(&volume.host).named(|| format!("open({})", volume.host.display()));
            let target = target.attempt(shown)?;
            let beside = volume.host.parent().unwrap_or(Path::new("/"));
            let brought = preload::bring(&layers, &volume.path, target.as_fd(), beside).attempt(shown)?;
            staged.warnings.extend(brought);
        }
        Ok(())
    }
}
