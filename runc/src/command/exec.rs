//! `exec`: another program in a running container, in its namespaces, under its filter, in its cgroup.

use std::collections::HashSet;
use std::rc::Rc;

use anyhow::{Context, Result, bail};
use nix::unistd::Pid;
use oci_spec::runtime::{Capability, Process};
use sysbox_ipc::mgr::Process as Made;
use sysbox_sys::process::Held;

use super::{Call, require_preserved, require_terminal_fits, send_pidfd, write_pid_file};
use crate::attend::{Attendance, Terminal};
use crate::bundle;
use crate::cli::ExecArgs;
use crate::cli::numbers::{self, Fault};
use crate::init::{Init, Role, own_stdio};
use crate::launch::{Joined, Launch, LaunchError, step, tenant_spec};
use crate::limits::{self, Raise};
use crate::listener::{Giver, Relay};
use crate::plan;
use crate::sink::Sink;
use crate::state::{State, Status};
use crate::subcgroup::SubCgroups;

/// Returns the exit code for this process.
///
/// # Errors
/// A container that does not run; what the program's start says.
pub fn exec(call: &Call<'_>, args: &ExecArgs) -> Result<i32> {
    let home = call.home(&args.id)?;
    let state = home.load()?;
    let status = home.status(&state);
    let (Some(init), Status::Running | Status::Created | Status::Paused) = (state.init, status) else {
        bail!("cannot exec in a stopped container");
    };
    if status == Status::Paused && !args.ignore_paused {
        bail!("cannot exec in a paused container (use --ignore-paused to override)");
    }
    crate::cgroup::begin_grace_period();
    let mut process = process_of(args, &state.process)?;
    let below = SubCgroups::parse(&args.cgroups)?;
    require_terminal_fits(process.terminal().unwrap_or(false), args.detach, args.console_socket.is_some())?;
    require_preserved(0, args.preserve_fds)?;
    for name in add_capabilities(&mut process, &args.caps) {
        call.log.warn(&format!("ignoring unknown or unavailable capabilities: [{name}]"));
    }
    let mut env = process.env().clone().unwrap_or_default();
    let settings = state.settings.take_from(&mut env)?;
    if state.systemd {
        plan::name_container(&mut env);
    }
    process.set_env(Some(env));
    let entry = plan::entry(&process, &state.id_map, &state.facts, &settings)?;
    entry.apparmor.as_deref().map(crate::survey::require_profile).transpose()?;
    let reduced = plan::for_libcontainer(process.clone(), entry.apparmor.clone());
    let created = home.load_spec()?;
    let init = Held::open(init).context("cannot exec in a stopped container")?;
    let joined = Joined::open(&init, &created).context("join the container")?;
    let spec = tenant_spec(created, reduced, &joined);
    let filter = home.load_filter()?;
    let attendance = if args.detach { None } else { Some(Attendance::prepare()?) };
    let own_terminal = process.terminal().unwrap_or(false) && args.console_socket.is_none() && !args.detach;
    let terminal = own_terminal.then(Terminal::listen).transpose()?;
    let console_socket = terminal.as_ref().map(Terminal::path).or(args.console_socket.as_deref());
    let console_socket = console_socket.filter(|_| process.terminal().unwrap_or(false));

    // What the engine changed in the layers since the last look is to be seen by the program.
    crate::overlay::flush(&state.rootfs);
    let map = &state.id_map;
    let (uid, gid) = (map.host_uid(entry.uid), map.host_gid(entry.gid));
    own_stdio(uid.unwrap_or(map.root_uid()), gid.unwrap_or(map.root_gid()))
        .context("give stdio to the container")?;
    let sink = Rc::new(Sink::open().context("pipe for errors")?);
    let (giver, mut relay) = match &state.agent {
        Some(agent) => {
            let (giver, stream) = Giver::pair()?;
            (Some(giver), Some(Relay::to_later(agent, stream)?))
        }
        None => (None, None),
    };
    let keyring = (!state.no_new_keyring).then(|| format!("_ses.{}", args.id));
    let launch = Launch {
        id: &args.id,
        bundle: &state.bundle,
        dir: &home.dir,
        spec,
        rootfs: state.rootfs.clone(),
        console_socket,
        preserve_fds: args.preserve_fds,
        no_pivot: false,
        init: Init::new(entry, filter, giver, Role::Later, keyring, sink),
    };
    let raise =
        if state.facts.raise_rlimits && state.settings.common.syscont_mode { Raise::Yes } else { Raise::No };
    let enter = || {
        let entered = state.cgroup.enter_for_exec(&init).and_then(|()| state.cgroup.path_for_exec(&init));
        entered.map_err(|e| LaunchError::Cgroup(e.to_string()))
    };
    let before_start = |made: Made| {
        let follow = state.cgroup.follow(&init, Pid::from_raw(made.pid));
        follow.map_err(|e| LaunchError::Cgroup(e.to_string()))?;
        below.join(&state.cgroup, Pid::from_raw(made.pid)).map_err(|e| LaunchError::Cgroup(e.to_string()))?;
        limit(made, &process, &state, raise)
    };
    let after_start = |made: Made| match relay.take() {
        Some(relay) => {
            let handed = relay.hand_on(&state, Status::Running.as_str(), made.pid);
            handed.map_err(|e| step("seccomp listener")(&e))
        }
        None => Ok(()),
    };
    let started = launch.exec(enter, before_start, after_start)?;
    tracing::debug!(pid = started.pid, "the program runs");
    tell(args, started).inspect_err(|_| {
        // Nobody would know of it.
        let ended = Held::open(started).and_then(|held| held.kill());
        tracing::debug!(?ended, pid = started.pid, "the program is ended");
    })?;
    match attendance {
        Some(attendance) => attendance.until_end(started, terminal),
        None => Ok(0),
    }
}

/// Those who asked to hear of the process.
fn tell(args: &ExecArgs, started: Made) -> Result<()> {
    if let Some(path) = &args.pidfd_socket {
        send_pidfd(path, "setns", started)?;
    }
    if let Some(path) = &args.pid_file {
        write_pid_file(path, started.pid)?;
    }
    Ok(())
}

/// What is set from outside on a process that waits for its start.
fn limit(made: Made, process: &Process, state: &State, raise: Raise) -> Result<(), LaunchError> {
    let asked = process.rlimits().as_deref().unwrap_or_default();
    let limited = limits::apply(made.pid, asked, raise);
    limited.and_then(|()| limits::schedule(made.pid, process)).map_err(|e| step("set limits")(&e))?;
    // The container's, whatever the process document says, as runc has it; not that of an engine's shim.
    match state.process.oom_score_adj().map(limits::within_reach) {
        Some(score) => limits::oom_score(made.pid, score).map_err(|e| step("set the OOM score")(&e)),
        None => Ok(()),
    }
}

/// The process document, or the container's own process changed by the flags.
fn process_of(args: &ExecArgs, base: &Process) -> Result<Process> {
    if let Some(path) = &args.process {
        return Ok(bundle::read_process(path)?);
    }
    if args.command.is_empty() {
        bail!("exec args cannot be empty");
    }
    let mut process = base.clone();
    process.set_args(Some(args.command.clone()));
    process.set_terminal(Some(args.tty));
    if let Some(cwd) = &args.cwd {
        process.set_cwd(cwd.clone());
    }
    if let Some(profile) = &args.apparmor {
        process.set_apparmor_profile(Some(profile.clone()));
    }
    let mut env = process.env().clone().unwrap_or_default();
    env.extend(args.env.iter().filter(|pair| !pair.is_empty()).cloned());
    process.set_env(Some(env));
    if let Some(asked) = args.no_new_privs {
        process.set_no_new_privileges(Some(asked));
    }
    let (mut uid, mut gid) = (process.user().uid(), process.user().gid());
    if let Some(user) = &args.user {
        (uid, gid) = parse_user(user, gid)?;
    }
    let mut groups = process.user().additional_gids().clone().unwrap_or_default();
    for asked in &args.additional_gids {
        let group = u32::try_from(*asked).ok().filter(|gid| *gid != u32::MAX);
        groups.push(group.with_context(|| format!("additional-gids must be a positive number {asked}"))?);
    }
    let mut user = process.user().clone();
    user.set_uid(uid).set_gid(gid).set_additional_gids(Some(groups));
    process.set_user(user);
    if !process.cwd().is_absolute() {
        bail!("Cwd must be an absolute path");
    }
    if args.process_label.is_some() {
        bail!("selinux label is specified in config, but selinux is disabled or not supported");
    }
    Ok(process)
}

/// Adds to those that the process may have (where capabilities are honored; root of a machine has all); returns the names
/// of those that there are none of.
fn add_capabilities(process: &mut Process, names: &[String]) -> Vec<String> {
    let (mut added, mut unknown) = (HashSet::new(), Vec::new());
    for name in names {
        match serde_json::from_value::<Capability>(name.as_str().into()) {
            Ok(capability) if name.starts_with("CAP_") => drop(added.insert(capability)),
            _ => unknown.push(name.clone()),
        }
    }
    if added.is_empty() {
        return unknown;
    }
    let mut all = process.capabilities().clone().unwrap_or_default();
    let with = |set: &Option<HashSet<Capability>>| {
        Some(set.iter().flatten().chain(&added).copied().collect::<HashSet<Capability>>())
    };
    let (bounding, effective, permitted) =
        (with(all.bounding()), with(all.effective()), with(all.permitted()));
    let ambient = if all.inheritable().is_some() { with(all.ambient()) } else { all.ambient().clone() };
    all.set_bounding(bounding).set_effective(effective).set_permitted(permitted).set_ambient(ambient);
    process.set_capabilities(Some(all));
    unknown
}

/// `UID[:GID]`, in decimal and nothing else (CVE-2026-30892: a parser that gave up half-way made root of it).
fn parse_user(text: &str, gid: u32) -> Result<(u32, u32)> {
    let number = |kind: &str, part: &str| -> Result<u32> {
        let fault = match numbers::uint(part) {
            Ok(number) => match u32::try_from(number).ok().filter(|number| *number != u32::MAX) {
                Some(number) => return Ok(number),
                None => Fault::Range,
            },
            Err(fault) => fault,
        };
        bail!("bad {kind}: {}", fault.of_conversion("Atoi", part))
    };
    match text.split_once(':') {
        Some((uid, gid)) => {
            let gid = number("gid", gid)?;
            Ok((number("uid", uid)?, gid))
        }
        None => Ok((number("uid", text)?, gid)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn users_are_numbers_or_nothing() {
        assert_eq!(parse_user("7", 3).unwrap(), (7, 3));
        assert_eq!(parse_user("7:8", 3).unwrap(), (7, 8));
        for bad in ["", ":", "1:", ":1", "root", "-1", "+1", "0x0", "1 ", "4294967295", "4294967296", "1:2:3"]
        {
            assert!(parse_user(bad, 0).is_err(), "{bad:?}");
        }
    }
}
