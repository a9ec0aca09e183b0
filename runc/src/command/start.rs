//! `start`: lets a created container's init go on.

use anyhow::{Result, bail};

use super::Call;
use crate::launch;
use crate::listener::{self, Relay};
use crate::residents;
use crate::state::{Home, State, Status};

/// # Errors
/// A container that is not in state `created`.
pub fn start(call: &Call<'_>, id: &str) -> Result<()> {
    let home = call.home(id)?;
    let state = home.load()?;
    start_created(&home, &state)
}

/// As [`start`], of a state that was read already.
///
/// # Errors
/// As [`start`].
pub fn start_created(home: &Home, state: &State) -> Result<()> {
    match home.status(state) {
        Status::Created => {}
        Status::Stopped => bail!("cannot start a container that has stopped"),
        Status::Running => bail!("cannot start an already running container"),
        other => bail!("cannot start a container in the {} state", other.as_str()),
    }
    state.cgroup.settle(state.id_map.root_uid(), state.id_map.root_gid())?;
    let relay = state.agent.as_ref().map(|agent| Relay::to_init(agent, &home.dir)).transpose()?;
    launch::start(&home.dir)?;
    if let Some(relay) = relay {
        relay.hand_on(state, Status::Created.as_str(), state.init.map_or(0, |init| init.pid))?;
        listener::forget(&home.dir);
    }
    tracing::debug!(id = home.key.id.as_str(), "started");
    if let Err(error) = launch::run_hooks(home, state, launch::HookTime::PostStart) {
        // As with runc, which makes the container wait for its hooks.
        residents::kill_all(&state.cgroup, &state.id_map);
        return Err(error.into());
    }
    Ok(())
}
