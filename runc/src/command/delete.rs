//! `delete`: everything that was made for a container, taken away again. Never stops at the first failure.

use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use nix::errno::Errno;
use sysbox_sys::process::Held;

use super::Call;
use crate::carry;
use crate::daemons::{Fs, Mgr};
use crate::launch::{self, HookTime};
use crate::residents;
use crate::state::{Home, State, StateError, Status};
use crate::undo::told;

/// # Errors
/// A container that runs (without `--force`), or what could not be taken away; then the state stays, and the delete can be
/// repeated.
pub fn delete(call: &Call<'_>, id: &str, force: bool) -> Result<()> {
    let home = call.home(id)?;
    let state = match home.load() {
        Ok(state) => state,
        Err(StateError::NoContainer { .. }) if force => return delete_remains(call, &home),
        Err(error) => return Err(error.into()),
    };
    let status = home.status(&state);
    if status != Status::Stopped {
        // As runc: one that was never started is ended without being asked twice.
        if !force && status != Status::Created {
            bail!("cannot delete container {id} that is not stopped: {}", status.as_str());
        }
        end(&state)?;
    }
    delete_stopped(call, &home, &state)
}

/// A create that was cut off before it wrote a state: a directory, perhaps a record, nothing else.
fn delete_remains(call: &Call<'_>, home: &Home) -> Result<()> {
    if !home.dir.exists() {
        return Ok(());
    }
    let mut failures = told(Fs::connect(&call.global.run_dir).and_then(|fs| fs.unregister(&home.key)));
    failures.extend(told(Mgr::connect(&call.global.run_dir).and_then(|mgr| mgr.release(&home.key))));
    failures.extend(told(home.remove()));
    finish(failures)
}

/// Ends init and with it its pid namespace, and a create under way with it.
fn end(state: &State) -> Result<()> {
    const LIMIT: Duration = Duration::from_secs(10);
    let ended = state.init.unwrap_or(state.creator);
    let deadline = Instant::now() + LIMIT;
    if let Ok(process) = Held::open(ended) {
        match process.kill() {
            Err(error) if error.errno == Errno::ESRCH => {}
            other => other?,
        }
    }
    residents::kill_all(&state.cgroup, &state.id_map);
    while sysbox_sys::process::is_alive(ended) {
        if Instant::now() > deadline {
            bail!("process {} is still there {} s after SIGKILL", ended.pid, LIMIT.as_secs());
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}

/// As [`delete`], of a container that is known to have stopped.
///
/// # Errors
/// What could not be taken away.
pub fn delete_stopped(call: &Call<'_>, home: &Home, state: &State) -> Result<()> {
    // Processes may outlive init only where the pid namespace was shared; they go with the container.
    residents::kill_all(&state.cgroup, &state.id_map);
    let mut failures: Vec<String> =
        state.cgroup.remove(state.id.as_str()).iter().map(ToString::to_string).collect();
    // The legacy builder makes an image of what has ended. An engine that removes it has taken its layer away by now or will.
    if failures.is_empty() && state.carried.upper.exists() {
        for failure in carry::record(&state.carried) {
            call.log.warn(&format!("an image made now may lack attributes of inner images: {failure}"));
        }
    }
    failures.extend(told(Fs::connect(&call.global.run_dir).and_then(|fs| fs.unregister(&home.key))));
    failures.extend(told(Mgr::connect(&call.global.run_dir).and_then(|mgr| mgr.release(&home.key))));
    let hooks = if state.poststop_ran { Ok(()) } else { launch::run_hooks(home, state, HookTime::PostStop) };
    if failures.is_empty() {
        failures.extend(told(home.remove()));
    }
    if !failures.is_empty() && !state.poststop_ran {
        // Once in a container's life, also when the delete has to be repeated for what failed here.
        failures.extend(told(home.save(&State { poststop_ran: true, ..state.clone() })));
    }
    // The delete went on; its caller hears of the hook all the same, as with runc.
    failures.extend(hooks.err().map(|error| format!("unable to destroy container: {error}")));
    finish(failures)
}

fn finish(failures: Vec<String>) -> Result<()> {
    if failures.is_empty() { Ok(()) } else { bail!("{}", failures.join("; ")) }
}
