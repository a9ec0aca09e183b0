//! `kill`: a signal for init, or for every process.

use std::str::FromStr;

use anyhow::{Result, bail};
use nix::errno::Errno;
use nix::sys::signal::Signal;
use sysbox_sys::process::Held;

use super::Call;
use crate::cli::KillArgs;
use crate::cli::numbers::quoted;
use crate::launch::has_own_pids;
use crate::residents;
use crate::state::Status;

/// # Errors
/// No such container, no such signal, or a container that has stopped.
pub fn kill(call: &Call<'_>, args: &KillArgs) -> Result<()> {
    let home = call.home(&args.id)?;
    let state = home.load()?;
    let signal = number(&args.signal)?;
    let status = home.status(&state);
    let (Some(init), Status::Created | Status::Running | Status::Paused) = (state.init, status) else {
        // A caller that says `--all` wants to be sure that nothing runs.
        return if args.all { Ok(()) } else { bail!("container not running") };
    };
    // By descriptor: the pid cannot become another process between the look and the signal.
    let process = Held::open(init)?;
    match process.signal(signal) {
        Err(error) if error.errno == Errno::ESRCH && args.all => return Ok(()),
        Err(error) if error.errno == Errno::ESRCH => bail!("container not running"),
        Err(error) if error.errno == Errno::EINVAL => bail!("unable to signal init: invalid argument"),
        other => other?,
    }
    if signal == libc::SIGKILL {
        if home.load_spec().is_ok_and(|spec| !has_own_pids(&spec)) {
            // Elsewhere the kernel ends a pid namespace with its init.
            residents::kill_all(&state.cgroup, &state.id_map);
        } else {
            residents::see_off(&process, &state.cgroup, &state.id_map);
        }
    }
    Ok(())
}

/// A signal's number, from its number or its name with or without `SIG`, real-time ones included (`SIGRTMIN+3`).
fn number(text: &str) -> Result<i32> {
    if let Ok(number) = text.parse::<i32>() {
        // The kernel says which there are.
        return Ok(number);
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
    bail!("unknown signal {}", quoted(text))
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
        for text in ["", "SIGNOPE", "RTMIN+99", "RTMIN3"] {
            assert!(number(text).is_err(), "{text}");
        }
    }
}
