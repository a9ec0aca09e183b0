//! One file a command. Each takes what it needs and returns an error that says what was attempted; `main` tells it.

pub mod create;
pub mod delete;
pub mod exec;
pub mod features;
pub mod kill;
pub mod list;
pub mod pause;
pub mod ps;
pub mod run;
pub mod spec;
pub mod start;
pub mod state;
pub mod update;

use std::path::Path;

use anyhow::{Context, Result};
use sysbox_ipc::ContainerId;

use crate::cli::Global;
use crate::log::Log;
use crate::state::Home;

/// What every command gets.
#[derive(Debug)]
pub struct Call<'a> {
    pub global: &'a Global,
    pub log: &'a Log,
}

impl Call<'_> {
    /// The container that an argument names.
    ///
    /// # Errors
    /// An id that no container can have.
    pub fn home(&self, id: &str) -> Result<Home> {
        let root = std::path::absolute(&self.global.root).context("--root")?;
        if root.starts_with("/dev") {
            // A create lays the container's devices over /dev in its own namespace.
            anyhow::bail!("--root: {} must not be below /dev", root.display());
        }
        Ok(Home::of(&root, ContainerId::parse(id)?))
    }
}

/// Writes a pid file whole or not at all: the reader polls for it.
fn write_pid_file(path: &Path, pid: i32) -> Result<()> {
    let name = path.file_name().context("--pid-file: not a file name")?.to_string_lossy().into_owned();
    let new = path.with_file_name(format!(".{name}.new"));
    let write = std::fs::write(&new, pid.to_string()).and_then(|()| std::fs::rename(&new, path));
    write.with_context(|| format!("write pid file {}", path.display()))
}
