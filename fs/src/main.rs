//! The door: command line, logs, exit status.

use std::path::Path;
use std::process::ExitCode;

use anyhow::Context;
use clap::Parser;
use sysbox_fs::cli::Cli;
use sysbox_fs::{daemon, place};
use sysbox_log::Target;

fn main() -> ExitCode {
    let cli = Cli::parse();
    if let Some(path) = &cli.probe {
        return place::probe(path);
    }
    // What serves requests ends with the process, in the middle of one or not: the next daemon gets it again.
    match run(&cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("sysbox-fs: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(cli: &Cli) -> anyhow::Result<()> {
    anyhow::ensure!(nix::unistd::geteuid().is_root(), "it has to run as root\nhint: sudo");
    let log = Target::new(cli.log.as_deref()).with_context(|| {
        format!("open the log {}", cli.log.as_deref().unwrap_or(Path::new("-")).display())
    })?;
    log.install(cli.log_level, cli.log_format);
    std::panic::set_hook(Box::new(|panic| {
        let location = panic.location().map(ToString::to_string);
        tracing::error!(location, "bug: panic");
    }));
    tracing::info!(
        version = env!("CARGO_PKG_VERSION"),
        pid = std::process::id(),
        mountpoint = %cli.mountpoint.display(),
        run_dir = %cli.run_dir.display(),
        log = ?cli.log,
        log_level = %cli.log_level,
        log_format = ?cli.log_format,
        "sysbox-fs starts"
    );
    let result = daemon::run(&cli.mountpoint, &cli.run_dir, &log);
    if let (Err(error), Some(_)) = (&result, &cli.log) {
        tracing::error!("{error:#}");
    }
    result
}
