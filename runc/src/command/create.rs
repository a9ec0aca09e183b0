//! `create`: from a bundle to a container whose init waits for `start`. The main path of ARCHITECTURE.md, step by step;
//! what is done is noted in an [`Undo`] and taken back if a later step fails.

use std::path::Path;
use std::rc::Rc;

use anyhow::{Context, Result, anyhow};
use nix::unistd::Pid;
use oci_spec::runtime::Spec;
use sysbox_ipc::mgr::{Claim, Defaults, Grant, Process, Register, Rootfs};

use super::{Call, require_preserved, require_terminal_fits, send_pidfd, write_pid_file};
use crate::apply::{self, Staged};
use crate::bundle::{self, Bundle};
use crate::carry::Carried;
use crate::cgroup::{Cgroup, begin_grace_period, locate};
use crate::cli::{CreateArgs, SPEC_VERSION};
use crate::daemons::{Fs, Mgr};
use crate::filter::{self, Filter};
use crate::given::Given;
use crate::init::{Init, Role, own_stdio};
use crate::launch::{Launch, LaunchError, step};
use crate::limits::{self, Raise};
use crate::listener::{Agent, Giver};
use crate::plan::{self, Plan, Settings, Stage};
use crate::residents;
use crate::sink::Sink;
use crate::state::{Home, State, StateError};
use crate::survey::{self, Ground, Survey};
use crate::undo::{Undo, told};

/// Whether the caller stays with the container, and so can take its terminal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Detach {
    Yes,
    No,
}

/// Creates the container.
///
/// # Errors
/// The first thing that failed; everything done until then has been taken back, or is named with it.
pub fn create(call: &Call<'_>, args: &CreateArgs, detach: Detach) -> Result<(Home, State)> {
    let home = call.home(&args.id)?;
    let mut undo = Undo::default();
    match attempt(call, args, detach, &home, &mut undo) {
        Ok(state) => {
            undo.forget();
            Ok((home, state))
        }
        Err(error) => {
            for failure in undo.run() {
                call.log.warn(&format!("cleaning up after a failed create: {failure}"));
            }
            Err(error)
        }
    }
}

fn attempt<'a>(
    call: &Call<'_>,
    args: &CreateArgs,
    detach: Detach,
    home: &'a Home,
    undo: &mut Undo<'a>,
) -> Result<State> {
    // Everything that can be wrong with the request is found before the first side effect.
    let bundle = bundle::read(args.bundle.as_deref().unwrap_or(Path::new(".")))?;
    let terminal = bundle.spec.process().as_ref().is_some_and(|process| process.terminal().unwrap_or(false));
    require_terminal_fits(terminal, detach == Detach::Yes, args.console_socket.is_some())?;
    let listen = std::env::var("LISTEN_FDS").ok().and_then(|text| text.parse().ok()).unwrap_or(0);
    require_preserved(listen, args.preserve_fds)?;
    tell_unknown(call, &bundle);
    if home.dir.exists() {
        return Err(StateError::Exists { id: home.key.id.clone() }.into());
    }
    let survey = survey::look(&bundle)?;
    let own_map = plan::own_map(&bundle.spec)?;
    settings_of(&bundle, Defaults::default())?;
    tracing::debug!(bundle = %bundle.dir.display(), rootfs = %bundle.rootfs.display(), "the bundle is read");
    let given = Given::open(&bundle.spec)?;
    let register = register(home, &bundle, &survey, own_map, &given)?;
    begin_grace_period();
    let mgr = Rc::new(Mgr::connect(&call.global.run_dir)?);
    let fs = Rc::new(Fs::connect(&call.global.run_dir)?);

    home.create()?;
    undo.push(|| told(home.remove()));
    let grant = mgr.register(register)?;
    let released = Rc::clone(&mgr);
    undo.push(move || told(released.release(&home.key)));
    tracing::debug!(root_uid = grant.id_map.root_uid(), slot = grant.slot, "ids are granted");
    let prepared = fs.prepare(&home.key, &grant)?;
    let unregistered = Rc::clone(&fs);
    undo.push(move || told(unregistered.unregister(&home.key)));

    let stage = Stage::below(&call.global.run_dir);
    let settings = settings_of(&bundle, grant.defaults)?;
    let plan = plan::plan(&bundle, &survey, &grant, &stage, &prepared, &settings)?;
    plan.entry.apparmor.as_deref().map(survey::require_profile).transpose()?;
    for warning in &plan.warnings {
        call.log.warn(warning);
    }
    let kept = call.global.run_dir.join("filters");
    let filter = plan.seccomp.as_ref().map(|profile| filter::compile_cached(profile, &kept)).transpose()?;
    let agent = plan.seccomp.as_ref().map(Agent::of).transpose()?.flatten();
    let asked = bundle.spec.linux().as_ref().and_then(|linux| linux.cgroups_path().clone());
    let cgroup = locate(asked.as_deref(), &home.key.slug(), call.global.systemd_cgroup)?;
    cgroup.require_free()?;
    let carried = carried(&survey, &plan);
    let mut state = State {
        carried,
        systemd: settings.common.syscont_mode && survey.systemd,
        no_new_keyring: args.no_new_keyring,
        ..state_of(home, &bundle, &grant, cgroup, settings, agent)?
    };
    // From here on a `delete --force` after our death finds what to take away.
    home.save(&state)?;
    tracing::debug!(cgroup = ?state.cgroup, filtered = filter.is_some(), "planned");

    if !plan.volumes.is_empty() {
        // A rootfs that is not shifted has the host's ids on disk, and so has what comes into a volume from it.
        let map = &grant.id_map;
        let is_shifted = plan.root.shift != plan::Shift::Never;
        let owner = if is_shifted { (0, 0) } else { (map.root_uid(), map.root_gid()) };
        mgr.make_volumes(&home.key, plan.volumes.iter().map(|volume| volume.name.clone()).collect(), owner)?;
    }
    apply::enter_private_namespace()?;
    let (mut spec, joined) = given.join(plan.spec.clone(), &grant)?;
    let staged = apply::apply(&plan, &survey, &stage, &bundle.rootfs, &grant.id_map, &grant.facts)?;
    for warning in &staged.warnings {
        call.log.warn(warning);
    }
    match joined.show_network(&mut spec, &stage) {
        Ok(warning) => warning.iter().for_each(|warning| call.log.warn(warning)),
        Err(error) => return Err(give_up(call, staged, error)),
    }
    tracing::debug!("root file system and mounts are staged");
    let launched = launch(call, args, home, &bundle, &plan, filter, &grant, &mut state, spec);
    let init = match launched {
        Ok(init) => init,
        Err(error) => return Err(give_up(call, staged, error)),
    };
    let finished = finish(args, home, &bundle, &survey, &mgr, &fs, &mut state, init);
    match finished {
        Ok(()) => Ok(state),
        Err(error) => {
            residents::kill_all(&state.cgroup, &state.id_map);
            for failure in state.cgroup.remove(home.key.id.as_str()) {
                call.log.warn(&format!("cleaning up after a failed create: {failure}"));
            }
            Err(give_up(call, staged, error))
        }
    }
}

fn tell_unknown(call: &Call<'_>, bundle: &Bundle) {
    if !bundle.unknown.is_empty() {
        call.log.warn(&format!(
            "config.json: ignored, as the specification does not know it: {}",
            bundle.unknown.join(", ")
        ));
    }
}

/// The daemons and the disk hear of init.
#[allow(clippy::too_many_arguments)] // the last step of one path
fn finish(
    args: &CreateArgs,
    home: &Home,
    bundle: &Bundle,
    survey: &Survey,
    mgr: &Mgr,
    fs: &Fs,
    state: &mut State,
    init: Process,
) -> Result<()> {
    if matches!(survey.ground, Ground::Overlay(_)) {
        crate::overlay::flush(&bundle.rootfs);
    }
    mgr.started(&home.key, init)?;
    fs.register(&home.key, init)?;
    state.init = Some(init);
    home.save(state)?;
    tracing::debug!(pid = init.pid, "init waits for the start");
    if let Some(path) = &args.pidfd_socket {
        send_pidfd(path, "standard", init)?;
    }
    if let Some(path) = &args.pid_file {
        write_pid_file(path, init.pid)?;
    }
    Ok(())
}

/// The mount points made in the rootfs go as well: a failed create leaves a layer as it found it.
fn give_up(call: &Call<'_>, staged: Staged, error: anyhow::Error) -> anyhow::Error {
    for failure in staged.undo() {
        call.log.warn(&format!("cleaning up after a failed create: {failure}"));
    }
    error
}

#[allow(clippy::too_many_arguments)] // the last stretch of one path, split off to be undone as a whole
fn launch(
    call: &Call<'_>,
    args: &CreateArgs,
    home: &Home,
    bundle: &Bundle,
    plan: &Plan,
    filter: Option<Filter>,
    grant: &Grant,
    state: &mut State,
    spec: Spec,
) -> Result<Process> {
    home.save_spec(&spec)?;
    home.save_filter(filter.as_ref())?;
    let map = &grant.id_map;
    let (uid, gid) = (map.host_uid(plan.entry.uid), map.host_gid(plan.entry.gid));
    own_stdio(uid.unwrap_or(map.root_uid()), gid.unwrap_or(map.root_gid()))
        .context("give stdio to the container")?;
    let sink = Rc::new(Sink::open().context("pipe for errors")?);
    let giver = state.agent.as_ref().map(|_| Giver::listen(&home.dir)).transpose()?;
    let keyring = (!args.no_new_keyring).then(|| format!("_ses.{}", args.id));
    let launch = Launch {
        id: &args.id,
        bundle: &bundle.dir,
        dir: &home.dir,
        spec,
        rootfs: Stage::below(&call.global.run_dir).rootfs(),
        console_socket: args.console_socket.as_deref(),
        preserve_fds: args.preserve_fds,
        no_pivot: args.no_pivot,
        init: Init::new(plan.entry.clone(), filter, giver, Role::First, keyring, sink),
    };
    let mut cgroup = state.cgroup.clone();
    let enter = || {
        cgroup.make(&plan.resources, &args.id).map_err(|error| LaunchError::Cgroup(error.to_string()))?;
        if cgroup != state.cgroup {
            // systemd chose the parent only now, and a `delete --force` must find it.
            let known = State { cgroup: cgroup.clone(), ..state.clone() };
            home.save(&known).map_err(|error| step("save the state")(&error))?;
        }
        Ok(cgroup.delegated())
    };
    let made = launch.create(enter).map_err(anyhow::Error::from);
    // What the child saved is what there is to be taken away, also when it failed later.
    let known = home.load().map(|saved| state.cgroup = saved.cgroup);
    let finished = made.and_then(|init| {
        known?;
        let pid = Pid::from_raw(init.pid);
        state.cgroup.delegate(pid, grant.id_map.root_uid(), grant.id_map.root_gid())?;
        let raise = if grant.facts.raise_rlimits && state.settings.common.syscont_mode {
            Raise::Yes
        } else {
            Raise::No
        };
        limits::apply(init.pid, &plan.limits, raise)?;
        limits::schedule(init.pid, &state.process)?;
        if let Some(score) = plan.oom_score_adj {
            limits::oom_score(init.pid, score)?;
        }
        Ok(init)
    });
    if finished.is_err() {
        residents::kill_all(&state.cgroup, &state.id_map);
        for failure in state.cgroup.remove(&args.id) {
            call.log.warn(&format!("cleaning up after a failed create: {failure}"));
        }
    }
    finished
}

fn register(
    home: &Home,
    bundle: &Bundle,
    survey: &Survey,
    id_map: Option<sysbox_ipc::IdMap>,
    given: &Given,
) -> Result<Register> {
    Ok(Register {
        key: home.key.clone(),
        bundle: bundle.dir.clone(),
        runtime: sysbox_sys::process::myself()?,
        rootfs: match &survey.ground {
            Ground::Overlay(overlay) => {
                Rootfs::Overlay { merged: bundle.rootfs.clone(), upper: overlay.upper.clone() }
            }
            Ground::Directory => Rootfs::Directory { path: bundle.rootfs.clone() },
        },
        id_map,
        netns: given.network()?,
        users: given.users()?,
        claims: claims(bundle, survey),
    })
}

fn claims(bundle: &Bundle, survey: &Survey) -> Vec<Claim> {
    let claim = |wanted: plan::Wanted| {
        let lineage = survey::lineage(&wanted.base, &wanted.below)?;
        let there = lineage.first().is_some_and(|itself| itself.below.as_os_str().is_empty());
        let data_root = wanted.inside.clone();
        let source = wanted.base.components().chain(wanted.below.components()).collect();
        (there || !wanted.only_if_there).then_some(Claim { data_root, source, lineage })
    };
    plan::wanted(bundle, &survey.ground, &survey.moved_roots).into_iter().filter_map(claim).collect()
}

fn carried(survey: &Survey, plan: &Plan) -> Carried {
    match &survey.ground {
        Ground::Overlay(overlay) => Carried {
            upper: overlay.upper.clone(),
            roots: plan.layer_roots.iter().map(|root| root.path.clone()).collect(),
        },
        Ground::Directory => Carried::default(),
    }
}

fn settings_of(bundle: &Bundle, defaults: Defaults) -> Result<Settings, plan::SettingError> {
    let env = bundle.spec.process().as_ref().and_then(|process| process.env().as_deref());
    Settings::read(env.unwrap_or_default(), defaults)
}

fn state_of(
    home: &Home,
    bundle: &Bundle,
    grant: &Grant,
    cgroup: Cgroup,
    settings: Settings,
    agent: Option<Agent>,
) -> Result<State> {
    let process = bundle.spec.process().clone().ok_or_else(|| anyhow!("/process: is missing"))?;
    Ok(State {
        version: State::new_version(),
        id: home.key.id.clone(),
        oci_version: SPEC_VERSION.to_owned(),
        bundle: bundle.dir.clone(),
        rootfs: bundle.rootfs.clone(),
        created: crate::log::now(),
        annotations: bundle.spec.annotations().clone().unwrap_or_default(),
        id_map: grant.id_map.clone(),
        facts: grant.facts.clone(),
        settings,
        systemd: false,
        no_new_keyring: false,
        agent,
        cgroup,
        creator: sysbox_sys::process::myself()?,
        init: None,
        poststop_ran: false,
        carried: Carried::default(),
        process,
    })
}
