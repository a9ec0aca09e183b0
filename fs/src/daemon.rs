//! The life of the daemon: the order in which it starts, what it waits for, and how it stops.
//!
//! The connection is in the manager's vault before the first request is answered, so that from then on no death of this
//! process loses it. Requests are served only when the containers are known.

use std::fs::DirBuilder;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{self, Sender};
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::Context;
use nix::sys::signal::{SigSet, Signal};
use sysbox_ipc::fs::SOCKET;
use sysbox_sys::socket::Listener;
use sysbox_sys::{process, ready};

use crate::handles::Handles;
use crate::keeper::{Keeper, KeeperError, Link};
use crate::registry::{Container, Registry};
use crate::rpc::Server;
use crate::session::{self, Requests, SessionError};
use crate::tree::{Probe, Tree};
use crate::vproc::view::Source;
use crate::{lock, place};
use sysbox_log::Target;

const STACK: usize = 256 * 1024;
/// How long a stop waits for a manager that would keep the connection.
const PATIENCE_AT_STOP: Duration = Duration::from_secs(5);

/// What the daemon waits for.
enum Event {
    Signal(Signal),
    SessionEnded(std::io::Result<()>),
}

/// Runs until a signal ends it.
///
/// # Errors
/// Whatever keeps it from starting, or the FUSE session having ended by itself.
pub fn run(mountpoint: &Path, run_dir: &Path, log: &Target) -> anyhow::Result<()> {
    // Before any thread exists, so that all inherit it.
    let signals = block_signals()?;
    let made = DirBuilder::new().recursive(true).mode(0o711).create(run_dir);
    made.with_context(|| format!("mkdir({})", run_dir.display()))?;
    let mountpoint = place::prepare(mountpoint)?;
    let _lock = lock::acquire(run_dir)?;
    warn_of_request_timeouts();

    let source = Arc::new(Source::of_this_host().context("look for cgroups")?);
    match source.memory_controller() {
        Some(memory) => {
            tracing::debug!(version = ?memory.version, mount = %memory.mount.display(), "memory cgroups")
        }
        None => tracing::warn!("no memory cgroups are mounted: containers see the host's memory"),
    }
    let keeper = Keeper::new(run_dir, &mountpoint);
    let link = keeper.connect().map_err(|error| {
        anyhow::anyhow!("{error}\nhint: start sysbox-mgr first, and give both the same `--run-dir`")
    })?;
    let registry = Arc::new(known_containers(&link, &source)?);

    let tree = Tree {
        registry: Arc::clone(&registry),
        source: Arc::clone(&source),
        handles: Arc::new(Handles::new(epoch())),
        probe: Arc::new(Probe::default()),
        started: SystemTime::now(),
    };
    let probe = Arc::clone(&tree.probe);
    let (device, requests) = connect(&link, &mountpoint, registry.all().len())?;
    let session = session::session(tree, device.as_fd())?;
    let listener = Listener::bind(&run_dir.join(SOCKET))?;
    let server =
        Arc::new(Server { registry, source, notifier: session.notifier(), mountpoint: mountpoint.clone() });

    let (events, happened) = mpsc::channel();
    begin("fuse", events.clone(), move |events| {
        if events.send(Event::SessionEnded(session.run())).is_err() {
            tracing::debug!("the FUSE session ended after the daemon");
        }
    })?;
    // Only now: what comes again must find somebody who reads it before we ask the mount anything.
    session::resend(device.as_fd())?;
    place::verify(&mountpoint, &probe)?;
    if requests == Requests::Lost {
        release_lost(&device, &probe)?;
    }
    let serving = Arc::clone(&server);
    begin("accept", events.clone(), move |_| serving.serve(&listener))?;
    let log = log.clone();
    begin("signals", events, move |events| wait_for_signals(&signals, &log, &events))?;
    let (watched, watching) = (device.try_clone().context("dup(/dev/fuse)")?, keeper.clone());
    begin("keeper", (), move |()| watching.watch(link, &watched))?;

    ready::notify("READY=1")?;
    tracing::info!(containers = server.registry.all().len(), "ready");
    match happened.recv().context("every thread of the daemon is gone")? {
        Event::Signal(signal) => {
            tracing::info!(%signal, "stopping");
            if let Err(error) = ready::notify("STOPPING=1") {
                tracing::debug!(%error, "the service manager is not told");
            }
            stop(&server, &keeper, &device);
            Ok(())
        }
        Event::SessionEnded(Ok(())) => {
            anyhow::bail!("the FUSE file system {} was unmounted", mountpoint.display())
        }
        Event::SessionEnded(Err(error)) => Err(error).context("the FUSE session ended"),
    }
}

fn block_signals() -> anyhow::Result<SigSet> {
    let signals = SigSet::from_iter([Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP]);
    signals.thread_block().context("sigprocmask")?;
    Ok(signals)
}

fn wait_for_signals(signals: &SigSet, log: &Target, events: &Sender<Event>) {
    loop {
        match signals.wait() {
            Ok(Signal::SIGHUP) => match log.reopen() {
                Ok(()) => tracing::info!("log opened anew"),
                Err(error) => tracing::error!(%error, "cannot open the log anew"),
            },
            Ok(signal) => {
                if events.send(Event::Signal(signal)).is_err() {
                    return;
                }
            }
            Err(errno) => tracing::debug!(%errno, "sigwait"),
        }
    }
}

fn begin<T: Send + 'static, R>(
    name: &str,
    with: T,
    work: impl FnOnce(T) -> R + Send + 'static,
) -> anyhow::Result<()> {
    let thread = thread::Builder::new().name(name.to_owned()).stack_size(STACK);
    thread
        .spawn(move || {
            work(with);
        })
        .map(drop)
        .with_context(|| format!("thread {name}"))
}

/// The containers that the manager has on record.
fn known_containers(link: &Link, source: &Source) -> Result<Registry, KeeperError> {
    let registry = Registry::default();
    for record in link.records()? {
        let Some(mut container) = Container::of_record(record) else { continue };
        container.init = container.init.filter(|init| process::is_alive(*init));
        container.cgroup = container.init.and_then(|init| source.container_cgroup(init.pid));
        let key = container.key.clone();
        // The kernel knows none of them from us yet, so there is nothing for it to forget.
        if let Err(refusal) = registry.add(container, process::is_alive) {
            tracing::error!(container = %key, %refusal, "two records contradict each other");
        }
    }
    Ok(registry)
}

/// The connection that the manager keeps, or a new one. Answers what becomes of requests that a predecessor left behind.
fn connect(link: &Link, mountpoint: &Path, containers: usize) -> anyhow::Result<(OwnedFd, Requests)> {
    if let Some(device) = link.get()? {
        match session::adopt(device.as_fd()) {
            Ok(requests) => {
                remount_if_missing(&device, mountpoint)?;
                tracing::info!(containers, "took over the FUSE connection of an earlier sysbox-fs");
                return Ok((device, requests));
            }
            // With the last descriptor it ends for good, and its mount says so to all who still use it.
            Err(SessionError::Dead) => link.forget()?,
            Err(error) => return Err(error.into()),
        }
    }
    let cleared = place::clear_dead(mountpoint)?;
    if cleared > 0 || containers > 0 {
        tracing::warn!(
            cleared,
            containers,
            "nobody kept the FUSE connection: files of running containers stay dead until they are restarted"
        );
    }
    let device = session::open_device()?;
    session::mount(device.as_fd(), mountpoint)?;
    link.put(device.as_fd())?;
    session::adopt(device.as_fd())?;
    tracing::info!(mountpoint = %mountpoint.display(), "mounted");
    Ok((device, Requests::Resent))
}

/// On kernels that cannot send them again: ends the requests that a predecessor had read.
fn release_lost(device: &OwnedFd, probe: &Probe) -> Result<(), SessionError> {
    // The probe of the mount point has been answered, so there was a first request.
    let released = session::release_lost(device.as_fd(), probe.first_request().unwrap_or_default())?;
    if released > 0 {
        tracing::warn!(
            released,
            "interrupted reads that were being answered: this kernel has no FUSE_NOTIFY_RESEND"
        );
    }
    Ok(())
}

/// Somebody unmounted it while containers kept the connection in use.
fn remount_if_missing(device: &OwnedFd, mountpoint: &Path) -> anyhow::Result<()> {
    if place::mounted(mountpoint)?.as_deref() != Some(session::FS_TYPE) {
        tracing::warn!(mountpoint = %mountpoint.display(), "mounting the kept FUSE connection again");
        session::mount(device.as_fd(), mountpoint)?;
    }
    Ok(())
}

/// Unmounts if no container needs us. Else makes sure that the manager keeps the connection.
fn stop(server: &Server, keeper: &Keeper, device: &OwnedFd) {
    let link = reach_for_stop(keeper, device);
    if let Some(link) = &link {
        forget_unrecorded(server, link);
    }
    let left_behind: Vec<PathBuf> =
        server.registry.all().into_iter().map(|c| server.mountpoint.join(c.key.slug())).collect();
    if !server.registry.close_if_empty() {
        match link {
            Some(_) => tracing::info!(containers = left_behind.len(), "sysbox-mgr keeps the FUSE connection"),
            None => tracing::error!(
                containers = left_behind.len(),
                "sysbox-mgr is away and nobody keeps the FUSE connection: containers lose their virtual files"
            ),
        }
        return;
    }
    match place::unmount(&server.mountpoint) {
        Ok(()) => {
            tracing::info!(mountpoint = %server.mountpoint.display(), "unmounted");
            if let Some(Err(error)) = link.as_ref().map(Link::forget) {
                tracing::warn!(%error, "sysbox-mgr keeps a dead FUSE connection");
            }
        }
        Err(error) => tracing::warn!(%error, "left mounted"),
    }
}

fn reach_for_stop(keeper: &Keeper, device: &OwnedFd) -> Option<Link> {
    let begun = Instant::now();
    loop {
        match keeper.connect().and_then(|link| link.put(device.as_fd()).map(|()| link)) {
            Ok(link) => return Some(link),
            Err(error) if begun.elapsed() > PATIENCE_AT_STOP => {
                tracing::warn!(%error, "cannot reach sysbox-mgr");
                return None;
            }
            Err(_) => thread::sleep(Duration::from_millis(100)),
        }
    }
}

/// Containers that the manager does not know and whose init is dead: their runtime died before it could unregister them.
fn forget_unrecorded(server: &Server, link: &Link) {
    let records = match link.records() {
        Ok(records) => records,
        Err(error) => {
            tracing::warn!(%error, "no records: every container counts as alive");
            return;
        }
    };
    for container in server.registry.all() {
        let recorded = records.iter().any(|record| record.key == container.key);
        if !recorded && !container.init.is_some_and(process::is_alive) {
            server.registry.remove(&container.key);
        }
    }
}

/// Tells this daemon's file handles from those of its predecessors.
fn epoch() -> u32 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    (now.as_millis() & u128::from(u32::MAX)) as u32
}

/// A request timeout aborts the connection for good when no sysbox-fs lives for a while.
fn warn_of_request_timeouts() {
    for name in ["default_request_timeout", "max_request_timeout"] {
        let path = Path::new("/proc/sys/fs/fuse").join(name);
        // Kernels before 6.15 have neither.
        let Ok(value) = std::fs::read_to_string(&path) else { continue };
        if value.trim() != "0" {
            tracing::warn!(
                path = %path.display(),
                value = value.trim(),
                "a FUSE request timeout breaks containers when sysbox-fs is away that long: set it to 0"
            );
        }
    }
}
