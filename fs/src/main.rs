//! The door: command line, logs, exit status.

use std::fs::OpenOptions;
use std::process::ExitCode;
use std::sync::Mutex;

use anyhow::Context;
use clap::Parser;
use sysbox_fs::cli::{Cli, LogFormat};
use sysbox_fs::{daemon, place};
use tracing_subscriber::fmt::writer::BoxMakeWriter;

fn main() -> ExitCode {
    let cli = Cli::parse();
    if let Some(path) = &cli.probe {
        return place::probe(path);
    }
    if let Err(error) = log_to(&cli) {
        eprintln!("sysbox-fs: {error:#}");
        return ExitCode::FAILURE;
    }
    std::panic::set_hook(Box::new(|panic| {
        let location = panic.location().map(ToString::to_string);
        tracing::error!(location, "bug: panic");
    }));
    tracing::info!(
        version = env!("CARGO_PKG_VERSION"),
        mountpoint = %cli.mountpoint.display(),
        run_dir = %cli.run_dir.display(),
        log_level = %cli.log_level,
        "starting"
    );
    match daemon::run(&cli.mountpoint, &cli.run_dir) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{error:#}");
            // A log file is not where somebody looks who started it by hand.
            if cli.log.is_some() {
                eprintln!("sysbox-fs: {error:#}");
            }
            ExitCode::FAILURE
        }
    }
    // The threads that serve requests end with the process, in the middle of one or not: the next daemon gets it again.
}

fn log_to(cli: &Cli) -> anyhow::Result<()> {
    let writer = match &cli.log {
        None => BoxMakeWriter::new(std::io::stderr),
        Some(path) => {
            let file = OpenOptions::new().create(true).append(true).open(path);
            BoxMakeWriter::new(Mutex::new(file.with_context(|| format!("open({})", path.display()))?))
        }
    };
    let lines = tracing_subscriber::fmt().with_max_level(cli.log_level).with_ansi(false).with_writer(writer);
    match cli.log_format {
        LogFormat::Text => lines.init(),
        LogFormat::Json => lines.json().flatten_event(true).init(),
    }
    Ok(())
}
