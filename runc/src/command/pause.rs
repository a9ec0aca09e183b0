//! `pause` and `resume`: every process of a container stopped, and let go on.

use anyhow::{Result, bail};

use super::Call;
use crate::carry;
use crate::freezer::{Freezer, FreezerError};
use crate::state::Status;

/// # Errors
/// A container that does not run; a process that cannot be stopped: then all go on.
pub fn pause(call: &Call<'_>, id: &str) -> Result<()> {
    let home = call.home(id)?;
    let state = home.load()?;
    match home.status(&state) {
        Status::Created | Status::Running => {}
        _ => bail!("container not running"),
    }
    Freezer::of(&state.cgroup).ok_or(FreezerError::None)?.freeze()?;
    for failure in carry::record(&state.carried) {
        call.log.warn(&format!("an image made now may lack attributes of inner images: {failure}"));
    }
    // A commit follows: what it looks at through the engine's overlay is to be what the container has written.
    crate::overlay::flush(&state.rootfs);
    Ok(())
}

/// # Errors
/// A container that is not paused.
pub fn resume(call: &Call<'_>, id: &str) -> Result<()> {
    let home = call.home(id)?;
    let state = home.load()?;
    if home.status(&state) != Status::Paused {
        bail!("container not paused");
    }
    for failure in carry::forget_all(&state.carried) {
        call.log.warn(&format!("an image made from now on may lack what changed: {failure}"));
    }
    Ok(Freezer::of(&state.cgroup).ok_or(FreezerError::None)?.thaw()?)
}
