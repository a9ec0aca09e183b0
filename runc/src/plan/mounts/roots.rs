//! Where inner engines keep their data: in the container's own layer, on a managed volume, or where the user says
//! (docs/decisions/0003-data-roots.md).

use std::path::{Path, PathBuf};

use oci_spec::runtime::Mount;
use sysbox_ipc::mgr::DATA_ROOTS;

use super::{Bind, Extent, Place, Planner, Receives, mount};
use crate::elsewhere;
use crate::plan::options::Flags;
use crate::plan::{LayerRoot, PlanError, Volume};
use crate::survey::Ground;

/// A name in a file system has 255 bytes.
const MOST_NAME: usize = 255;

impl Planner<'_> {
    /// Data roots, each on a file system that can hold the upper layer of an overlay, which an overlay cannot.
    pub(super) fn data_roots(&mut self, asked: &[Mount], volumes: &Path) -> Result<(), PlanError> {
        if !self.machine() {
            return Ok(());
        }
        let survey = self.survey;
        let known = DATA_ROOTS.iter().map(|path| (PathBuf::from(path), None));
        let moved = survey.moved_roots.iter().map(|moved| (moved.path.clone(), Some(moved.told_by)));
        let mut done: Vec<PathBuf> = Vec::new();
        for (path, told_by) in known.chain(moved) {
            if let Some((told_by, why)) = told_by.zip(elsewhere::why_never(&path)) {
                return Err(PlanError::DataRoot { path, told_by, why });
            }
            // A mount of the user's at, above or below the place is his way of saying where the data goes.
            let own = asked.iter().any(|mount| {
                mount.destination() != Path::new("/")
                    && (mount.destination().starts_with(&path) || path.starts_with(mount.destination()))
            });
            if own || done.iter().any(|root| path.starts_with(root)) {
                continue;
            }
            let unusable = survey.unusable_roots.contains(&path);
            if let Some(told_by) = told_by {
                let link = || unusable.then_some("the image has a link or a file there, or on the way");
                let long = || (volume_name(&path).len() > MOST_NAME).then_some("it is too long for a name");
                if let Some(why) = elsewhere::why_not(&path, DATA_ROOTS).or_else(link).or_else(long) {
                    return Err(PlanError::DataRoot { path, told_by, why });
                }
            } else if unusable {
                if matches!(survey.ground, Ground::Overlay(_)) {
                    self.warnings.push(format!(
                        "data root {}: the image has a link or a file there; an engine inside will find an overlay",
                        path.display()
                    ));
                }
                continue;
            }
            let overlay = matches!(survey.ground, Ground::Overlay(_));
            if self.settings.common.data_root_volumes
                || ((self.root.read_only || !survey.takes_overlays)
                    && (overlay || survey.present_roots.contains(&path)))
            {
                self.volume(path.clone(), volumes);
            } else if overlay {
                let number = self.number();
                self.done.mounts.push(mount(&path, "bind", self.stage.bind(number), &["bind"]));
                self.done.layer_roots.push(LayerRoot { path: path.clone(), bind: number });
            }
            done.push(path);
        }
        Ok(())
    }

    fn volume(&mut self, path: PathBuf, volumes: &Path) {
        let name = volume_name(&path);
        let host = volumes.join(&name);
        let number = self.number();
        self.done.mounts.push(mount(&path, "bind", self.stage.bind(number), &["bind"]));
        self.done.binds.push(Bind {
            is_directory: true,
            extent: Extent::Mount,
            flags: Flags::default(),
            shift: self.root.shift,
            shift_extent: None,
            map: None,
            receives: Receives::Nothing,
            source: host.clone(),
            place: Place::Staged(number),
        });
        self.done.volumes.push(Volume { path, name, host });
    }
}

/// A name for each path, and no name for two: as systemd-escape(1) makes them.
fn volume_name(path: &Path) -> String {
    let text = path.to_string_lossy();
    let mut name = String::new();
    for (at, character) in text.trim_start_matches('/').chars().enumerate() {
        match character {
            '/' => name.push('-'),
            '-' | '\\' => name.push_str(&format!("\\x{:02x}", u32::from(character))),
            '.' if at == 0 => name.push_str("\\x2e"),
            other => name.push(other),
        }
    }
    name
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_two_data_roots_have_one_volume() {
        let name = |path: &str| volume_name(Path::new(path));
        assert_eq!(name("/var/lib/docker"), "var-lib-docker");
        let paths =
            ["/var/lib/docker", "/var-lib/docker", "/var/lib-docker", "/var\\x2dlib/docker", "/.a", "/x/.a"];
        let names: std::collections::BTreeSet<String> = paths.iter().map(|path| name(path)).collect();
        assert_eq!(names.len(), paths.len(), "{names:?}");
        assert!(names.iter().all(|name| !name.starts_with('.') && !name.contains('/')), "{names:?}");
    }
}
