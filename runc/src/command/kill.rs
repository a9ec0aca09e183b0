//! `kill`: a signal for init, or for every process.

use std::str::FromStr;

use anyhow::{Result, bail};
use nix::errno::Errno;
use nix::sys::signal::Signal;

use super::Call;
use crate::cli::KillArgs;
use crate::freezer;
use crate::state::{State, Status};

/// # Errors
/// No such container, no such signal, or a container that has stopped.
pub fn kill(call: &Call<'_>, args: &KillArgs) -> Result<()> {
    let home = call.home(&args.id)?;
    let state = home.load()?;
    let signal = number(&args.signal)?;
    if args.all {
        for pid in state.cgroup.processes() {
            send_to_pid(pid.as_raw(), signal)?;
        }
        return let_die(&state, signal);
    }
    let status = home.status(&state);
    let (Some(init), Status::Created | Status::Running | Status::Paused) = (state.init, status) else {
        bail!("container not running");
    };
    // By descriptor: the pid cannot become another process between the look and the signal.
    let process = sysbox_sys::process::pidfd_open(init)?;
    match sysbox_sys::process::pidfd_send_signal(&process, signal) {
        Err(error) if error.errno == Errno::ESRCH => bail!("container not running"),
        other => other?,
    }
    let_die(&state, signal)
}

/// The killed must be able to die: by version 1 what is frozen does not, and a container can freeze itself.
fn let_die(state: &State, signal: i32) -> Result<()> {
    if signal == libc::SIGKILL {
        freezer::release(&state.cgroup)?;
    }
    Ok(())
}

fn send_to_pid(pid: i32, signal: i32) -> Result<()> {
    let Ok(process) = sysbox_sys::process::identify(pid) else { return Ok(()) };
    match sysbox_sys::process::pidfd_open(process)
        .and_then(|fd| sysbox_sys::process::pidfd_send_signal(&fd, signal))
    {
        Err(error) if error.errno == Errno::ESRCH => Ok(()),
        other => Ok(other?),
    }
}

/// A signal's number, from its number or its name with or without `SIG`, real-time ones included (`SIGRTMIN+3`).
fn number(text: &str) -> Result<i32> {
    if let Ok(number) = text.parse::<i32>() {
        return if (0..=libc::SIGRTMAX()).contains(&number) { Ok(number) } else { unknown(text) };
    }
    let upper = text.to_ascii_uppercase();
    let name = upper.strip_prefix("SIG").unwrap_or(&upper);
    let real_time = |rest: &str, base: i32, sign: i32| -> Option<i32> {
        if rest.is_empty() {
            return Some(base);
        }
        let offset: i32 = rest.strip_prefix(if sign > 0 { '+' } else { '-' })?.parse().ok()?;
        let number = base + sign * offset;
        (libc::SIGRTMIN()..=libc::SIGRTMAX()).contains(&number).then_some(number)
    };
    let found = match (name.strip_prefix("RTMIN"), name.strip_prefix("RTMAX")) {
        (Some(rest), _) => real_time(rest, libc::SIGRTMIN(), 1),
        (_, Some(rest)) => real_time(rest, libc::SIGRTMAX(), -1),
        _ => Signal::from_str(&format!("SIG{name}")).ok().map(|signal| signal as i32),
    };
    found.map_or_else(|| unknown(text), Ok)
}

fn unknown(text: &str) -> Result<i32> {
    bail!("unknown signal {text:?}")
}

#[cfg(test)]
mod tests {
    use super::number;

    #[test]
    fn signals_have_names_and_numbers() {
        for (text, expected) in
            [("9", 9), ("KILL", 9), ("sigterm", 15), ("0", 0), ("SIGRTMIN+3", 37), ("RTMAX", 64)]
        {
            assert_eq!(number(text).unwrap(), expected, "{text}");
        }
        for text in ["", "65", "-1", "SIGNOPE", "RTMIN+99", "RTMIN3"] {
            assert!(number(text).is_err(), "{text}");
        }
    }
}
