//! `run`: create, start, and stay until the container ends, handing on its exit code.

use anyhow::Result;

use super::Call;
use super::create::create;
use super::delete::delete_stopped;
use super::start::start_created;
use crate::attend::{Attendance, Terminal};
use crate::cli::RunArgs;
use crate::residents;

/// Returns the exit code for this process.
///
/// # Errors
/// As `create` and `start`; the container is deleted then.
pub fn run(call: &Call<'_>, args: &RunArgs) -> Result<i32> {
    let mut create_args = args.create.clone();
    // Signals must be waiting for us before there is a container that could end.
    let attendance = if args.detach { None } else { Some(Attendance::prepare()?) };
    let terminal = wants_terminal(args).then(Terminal::listen).transpose()?;
    if let Some(terminal) = &terminal {
        create_args.console_socket = Some(terminal.path().to_owned());
    }
    let (home, state) = create(call, &create_args)?;
    if let Err(error) = start_created(call, &home, &state) {
        residents::kill_all(&state.cgroup, &state.id_map);
        delete_stopped(call, &home, &state)?;
        return Err(error);
    }
    let Some(attendance) = attendance else { return Ok(0) };
    let init = state.init.unwrap_or(state.creator);
    let code = attendance.until_end(init, terminal)?;
    if !args.keep {
        delete_stopped(call, &home, &state)?;
    }
    Ok(code)
}

/// A terminal of our own: asked for by the spec, and nobody else takes it.
fn wants_terminal(args: &RunArgs) -> bool {
    if args.detach || args.create.console_socket.is_some() {
        return false;
    }
    let read = crate::bundle::read(&args.create.bundle);
    read.is_ok_and(|b| b.spec.process().as_ref().is_some_and(|process| process.terminal().unwrap_or(false)))
}
