//! A runtime without an engine: bundles that run true, ours and those of the runtimes that we stand beside.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use serde_json::{Value, json};
use sysbox_tests::engine::BUSYBOX;
use sysbox_tests::measure;

use crate::lab::{LIMIT, Lab, Machine, Runtime, capabilities};

/// The ids of the user namespace that runc and crun get: of nobody else, as nothing of theirs outlives a sample.
const BASE: u32 = 4_000_000_000;
const SIZE: u32 = 65536;

/// Which program runs the bundle, and with what.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Ours,
    /// With all capabilities that this machine has.
    Runc,
    /// In a user namespace, on a root directory of its own that was chowned for it beforehand.
    RuncInUserNamespace,
    Crun,
}

impl From<Runtime> for Kind {
    fn from(runtime: Runtime) -> Self {
        match runtime {
            Runtime::Ours => Self::Ours,
            Runtime::Theirs => Self::Runc,
        }
    }
}

/// A runtime's command line and its bundle.
#[derive(Debug)]
pub struct Bundle {
    /// The runtime's program and its global flags.
    line: Vec<String>,
    path: PathBuf,
}

impl Bundle {
    /// Busybox as the root directory.
    ///
    /// # Errors
    /// The image, or the runtime's `spec`.
    pub fn new(lab: &Lab, kind: Kind) -> Result<Self> {
        let name = format!("{kind:?}").to_lowercase();
        let program = match kind {
            Kind::Ours => lab.program.as_path(),
            Kind::Runc | Kind::RuncInUserNamespace => Path::new("runc"),
            Kind::Crun => Path::new("crun"),
        };
        let rootfs =
            rootfs(lab, if kind == Kind::RuncInUserNamespace { "rootfs-shifted" } else { "rootfs" })?;
        let bundle = lab.dir(&name)?;
        let path = bundle.join("config.json");
        // It may be there from another row, and is written by none a second time.
        if path.exists() {
            std::fs::remove_file(&path).with_context(|| format!("remove {}", path.display()))?;
        }
        measure::run(Command::new(program).arg("spec").current_dir(&bundle), LIMIT)?;
        let mut spec: Value = serde_json::from_slice(&std::fs::read(&path)?).context("config.json")?;
        spec["root"] = json!({ "path": rootfs, "readonly": false });
        spec["process"]["terminal"] = json!(false);
        spec["process"]["args"] = json!(["/bin/true"]);
        if kind != Kind::Ours {
            let all = capabilities()?.0;
            spec["process"]["capabilities"] = json!({ "bounding": all, "effective": all, "permitted": all });
        }
        if kind == Kind::RuncInUserNamespace {
            let owner = format!("{BASE}:{BASE}");
            measure::run(Command::new("chown").args(["-hR", &owner]).arg(&rootfs), LIMIT)?;
            let map = json!([{ "containerID": 0, "hostID": BASE, "size": SIZE }]);
            spec["linux"]["uidMappings"] = map.clone();
            spec["linux"]["gidMappings"] = map;
            spec["linux"]["namespaces"].as_array_mut().context("namespaces")?.push(json!({ "type": "user" }));
        }
        std::fs::write(&path, spec.to_string())?;
        let mut line = vec![program.display().to_string()];
        if kind == Kind::Ours {
            line.extend(["--run-dir".to_owned(), lab.run_dir.display().to_string()]);
        }
        line.extend(["--root".to_owned(), lab.states.path().join(name).display().to_string()]);
        Ok(Self { line, path: bundle })
    }

    /// `run` of a container with this id, to its end.
    ///
    /// # Errors
    /// It failing; then nothing of it stays.
    pub fn time(&self, id: &str) -> Result<f64> {
        let taken = measure::time(self.command("run").arg("--bundle").arg(&self.path).arg(id), LIMIT);
        if taken.is_err() {
            // The failure that matters is the first; this one fails as well if nothing was made.
            let _gone = measure::run(self.command("delete").args(["--force", id]), LIMIT);
        }
        taken
    }

    fn command(&self, verb: &str) -> Command {
        let mut command = Command::new(&self.line[0]);
        command.args(&self.line[1..]).arg(verb);
        command
    }
}

/// The image's tree in a directory, made once.
fn rootfs(lab: &Lab, name: &str) -> Result<PathBuf> {
    let rootfs = lab.scratch.path().join(name);
    if !rootfs.exists() {
        let tar = lab.scratch.path().join("rootfs.tar");
        let source = Machine::created(&lab.docker, &[], BUSYBOX)?;
        lab.docker.run([
            OsStr::new("export"),
            OsStr::new("-o"),
            tar.as_os_str(),
            OsStr::new(&source.name),
        ])?;
        std::fs::create_dir(&rootfs)?;
        measure::run(Command::new("tar").arg("-C").arg(&rootfs).arg("-xf").arg(&tar), LIMIT)?;
    }
    Ok(rootfs)
}
