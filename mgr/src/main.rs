//! `sysbox-mgr`: the command line, the order of the start, and the end.

use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Context;
use clap::{Parser, Subcommand};
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use sysbox_ipc::IdRange;
use sysbox_ipc::mgr::{Phase, SOCKET};
use sysbox_log::{Format, Target};
use sysbox_mgr::coherence::Coherence;
use sysbox_mgr::flags::Flags;
use sysbox_mgr::ledger::{Foreign, Ledger};
use sysbox_mgr::server::{Kept, Server};
use sysbox_mgr::store::Store;
use sysbox_mgr::volumes::Volumes;
use sysbox_mgr::watch::Watch;
use sysbox_mgr::{facts, instance, observe, subid};
use sysbox_sys::ready::notify;
use sysbox_sys::socket::Listener;
use tracing::level_filters::LevelFilter;
use tracing::{error, info, warn};

/// Gives system containers their user ids, and remembers them.
///
/// sysbox-runc asks this daemon for each container it creates; without it, no system container can be created, started or
/// deleted. Running containers do not need it and are not touched when it stops, crashes or is upgraded.
#[derive(Debug, Parser)]
#[command(name = "sysbox-mgr", version, max_term_width = 100, after_help = HELP)]
struct Arguments {
    /// Where records of containers are kept. They outlive the daemon and the machine's power
    #[arg(long, value_name = "DIR", default_value = "/var/lib/sysbox")]
    data_root: PathBuf,
    /// Where the socket (mgr.sock) and the lock are. Must be the same for sysbox-runc and sysbox-fs
    #[arg(long, value_name = "DIR", default_value = sysbox_ipc::DEFAULT_RUN_DIR)]
    run_dir: PathBuf,
    /// Ids to take for containers if /etc/subuid and /etc/subgid have no line for user `sysbox`: COUNT or START:COUNT.
    /// Each container takes 65536
    #[arg(long, value_name = "RANGE", default_value_t = subid::Wanted::Count(subid::DEFAULT_COUNT))]
    subid_range: subid::Wanted,
    /// Append the log to this file, and open it anew on SIGHUP [default: stderr]
    #[arg(long, value_name = "FILE")]
    log: Option<PathBuf>,
    /// error, warn, info, debug or trace
    #[arg(long, value_name = "LEVEL", default_value = "info", value_parser = level)]
    log_level: LevelFilter,
    #[arg(long, value_name = "FORMAT", default_value = "text")]
    log_format: Format,
    /// Where subuid, subgid, passwd and group are (for tests)
    #[arg(long, value_name = "DIR", default_value = "/etc", hide = true)]
    subid_files: PathBuf,
    #[command(flatten)]
    sysbox: Flags,
    #[command(subcommand)]
    command: Option<Internal>,
}

const HELP: &str = "\
When something is wrong:
  it does not start    the one line on stderr says why; a line `hint:` says what to do
  is it running?       RUN_DIR/mgr.lock holds its pid while it runs; `sysbox-runc features` asks it
  no ids left          remove stopped containers (`docker container prune`), or make the `sysbox`
                       lines in /etc/subuid and /etc/subgid longer and restart this daemon
  who has which ids?   DATA_ROOT/records: a file a container, its last line counts; do not edit
  see more             --log-level debug
Stop it with SIGTERM. Stopping, killing or restarting it harms no container.";

#[derive(Debug, Subcommand)]
enum Internal {
    /// Finds out what the host can do, in a process of its own
    #[command(name = facts::SUBCOMMAND, hide = true)]
    Probe { dir: PathBuf },
}

fn level(text: &str) -> Result<LevelFilter, String> {
    match text {
        "error" | "warn" | "info" | "debug" | "trace" => text.parse().map_err(|_| "not a level".to_owned()),
        _ => Err("not one of error, warn, info, debug, trace".to_owned()),
    }
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let result = match &arguments.command {
        Some(Internal::Probe { dir }) => print_facts(dir),
        None => run(&arguments),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("sysbox-mgr: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn print_facts(dir: &Path) -> anyhow::Result<()> {
    println!("{}", serde_json::to_string(&facts::probe(dir)?)?);
    Ok(())
}

fn run(arguments: &Arguments) -> anyhow::Result<()> {
    anyhow::ensure!(nix::unistd::geteuid().is_root(), "it has to run as root\nhint: sudo");
    let log = Target::new(arguments.log.as_deref()).with_context(|| {
        format!("open the log {}", arguments.log.as_deref().unwrap_or(Path::new("-")).display())
    })?;
    log.install(arguments.log_level, arguments.log_format);
    let result = serve(arguments, &log);
    if let (Err(error), Some(_)) = (&result, &arguments.log) {
        error!("{error:#}");
    }
    result
}

fn serve(arguments: &Arguments, log: &Target) -> anyhow::Result<()> {
    let Arguments { data_root, run_dir, .. } = arguments;
    info!(
        version = env!("CARGO_PKG_VERSION"),
        pid = std::process::id(),
        data_root = %data_root.display(),
        run_dir = %run_dir.display(),
        subid_range = %arguments.subid_range,
        log = ?arguments.log,
        log_level = %arguments.log_level,
        log_format = ?arguments.log_format,
        flags = ?arguments.sysbox.given,
        "sysbox-mgr starts"
    );
    for (flag, why) in &arguments.sysbox.needless {
        info!(flag, why, "the flag changes nothing");
    }
    let _instance = instance::Instance::take(run_dir, data_root)?;
    let pool = subid::ensure(&arguments.subid_files, arguments.subid_range)?;
    let _ids = instance::hold_ids(&arguments.subid_files.join("subuid"))?;
    info!(start = pool.start, count = pool.count, containers = pool.count / 65536, "ids of user `sysbox`");
    let facts = facts::ask(data_root);

    // Before the first thread, so that every thread leaves them to the descriptor.
    let signals = blocked_signals()?;
    let (store, loaded) = Store::open(data_root)?;
    let rebooted = observe::booted_anew(data_root)?;
    let mut ledger = Ledger::new(pool, observe::host_netns());
    info!(records = loaded.records.len(), unusable = loaded.foreign.len(), rebooted, "records");
    for mut record in loaded.records {
        if rebooted && record.phase != Phase::Stopped {
            // What ran then runs no more, whoever has its pid now.
            record.phase = Phase::Stopped;
            store.write(&record)?;
        }
        ledger.commit(record);
    }
    observe::note_boot(data_root)?;
    loaded.foreign.into_iter().for_each(|foreign| ledger.set_aside(foreign));
    set_aside_unexplained(&mut ledger, pool);

    raise_descriptor_limit();
    let watch = Watch::new()?;
    watch.signals(&signals)?;
    let path = run_dir.join(SOCKET);
    let listener = Listener::bind(&path)?;
    // A peer that is gone again before it is accepted must not make the accept wait for the next one.
    fcntl(listener.as_fd(), FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).context("fcntl(mgr.sock, O_NONBLOCK)")?;
    watch.listener(&listener)?;
    let coherence = Coherence::start()
        .inspect_err(|error| warn!(%error, "what an engine writes into a running container may show late"))
        .ok();
    let volumes = Volumes::open(data_root, |slug| {
        ledger.records().any(|record| record.key.slug() == slug) || store.is_blocked(slug)
    })?;
    let kept = Kept { store, volumes };
    let mut server = Server::new(ledger, kept, watch, facts, arguments.sysbox.defaults, coherence);
    tell("READY=1");
    info!(socket = %path.display(), "ready");
    loop {
        server.serve(&listener)?;
        while let Some(signal) = signals.read_signal().context("read(signalfd)")? {
            match i32::try_from(signal.ssi_signo).map(Signal::try_from) {
                Ok(Ok(Signal::SIGHUP)) => match log.reopen() {
                    Ok(()) => info!("log opened anew"),
                    Err(error) => error!(%error, "cannot open the log anew"),
                },
                Ok(Ok(signal)) => {
                    info!(%signal, "stopping; containers go on");
                    tell("STOPPING=1");
                    std::fs::remove_file(&path).with_context(|| format!("unlink {}", path.display()))?;
                    return Ok(());
                }
                Ok(Err(_)) | Err(_) => warn!(number = signal.ssi_signo, "unknown signal"),
            }
        }
    }
}

/// Ids that living processes have though no record says so: nobody else gets them while this daemon runs.
fn set_aside_unexplained(ledger: &mut Ledger, pool: IdRange) {
    for (pid, range) in observe::ids_in_use(pool) {
        let explained = ledger
            .records()
            .flat_map(|record| sysbox_mgr::ledger::ranges(&record.id_map))
            .any(|known| known.contains(range.start) && range.end() <= known.end());
        if !explained {
            warn!(
                pid,
                start = range.start,
                count = range.count,
                "ids in use by a process that no record explains"
            );
            ledger.set_aside(Foreign { ids: vec![range], slot: None });
        }
    }
}

fn blocked_signals() -> anyhow::Result<SignalFd> {
    let mut set = SigSet::empty();
    for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP] {
        set.add(signal);
    }
    set.thread_block().context("block signals")?;
    SignalFd::with_flags(&set, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK).context("signalfd")
}

/// Each container takes a pidfd, and two descriptors in the vault.
fn raise_descriptor_limit() {
    let raised = getrlimit(Resource::RLIMIT_NOFILE)
        .and_then(|(_, hard)| setrlimit(Resource::RLIMIT_NOFILE, hard, hard));
    if let Err(errno) = raised {
        warn!(%errno, "cannot raise the limit of open files");
    }
}

fn tell(state: &str) {
    if let Err(error) = notify(state) {
        warn!(%error, "the service manager was not told");
    }
}
