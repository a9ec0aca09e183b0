//! `run`: create, start, and stay until the container ends, handing on its exit code.

use anyhow::{Context, Result};

use super::Call;
use super::create::{Detach, create};
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
    let detach = if args.detach { Detach::Yes } else { Detach::No };
    let terminal = wants_terminal(args).then(Terminal::listen).transpose()?;
    let detach = match &terminal {
        Some(terminal) => {
            create_args.console_socket = Some(terminal.path().to_owned());
            // To what makes the container, the socket is as good as another's.
            Detach::Yes
        }
        None => detach,
    };
    if !args.detach && !args.no_subreaper {
        // Orphans of a container that shares another's pid namespace come to us, and are reaped.
        nix::sys::prctl::set_child_subreaper(true).context("prctl(PR_SET_CHILD_SUBREAPER)")?;
    }
    let (home, state) = create(call, &create_args, detach)?;
    if let Err(error) = start_created(&home, &state) {
        residents::kill_all(&state.cgroup, &state.id_map);
        delete_stopped(call, &home, &state)?;
        return Err(error);
    }
    let Some(attendance) = attendance else { return Ok(0) };
    let init = state.init.unwrap_or(state.creator);
    let code = attendance.until_end(init, terminal)?;
    if !args.keep
        && let Err(error) = delete_stopped(call, &home, &state)
    {
        // The program's exit code is what the caller waits for.
        call.log.warn(&error.to_string());
    }
    Ok(code)
}

/// A terminal of our own: asked for by the spec, and nobody else takes it.
fn wants_terminal(args: &RunArgs) -> bool {
    if args.detach || args.create.console_socket.is_some() {
        return false;
    }
    let read = crate::bundle::read(args.create.bundle.as_deref().unwrap_or(std::path::Path::new(".")));
    read.is_ok_and(|b| b.spec.process().as_ref().is_some_and(|process| process.terminal().unwrap_or(false)))
}
