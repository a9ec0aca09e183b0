//! `sysbox-runc`, the OCI runtime: reads the command line, runs one command, tells what went wrong in one line.

mod apply;
mod attend;
mod bundle;
mod cgroup;
mod cli;
mod clones;
mod command;
mod cpuset;
mod daemons;
mod fields;
mod filter;
mod freezer;
mod init;
mod launch;
mod limits;
mod listener;
mod log;
mod mirror;
mod nested;
mod overlay;
mod plan;
mod preload;
mod sink;
mod state;
mod survey;
mod undo;

use std::process::ExitCode;

use clap::Parser;

use cli::{Cli, Command};
use command::Call;
use log::Log;

fn main() -> ExitCode {
    let cli = Cli::parse();
    let log = match Log::open(&cli.global) {
        Ok(log) => log,
        Err(error) => {
            eprintln!("--log: {error}");
            return ExitCode::FAILURE;
        }
    };
    let call = Call { global: &cli.global, log: &log };
    match run(&call, &cli.command) {
        Ok(code) => ExitCode::from(u8::try_from(code).unwrap_or(255)),
        // A reader that went away is no failure of ours.
        Err(error) if is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            log.error(&in_one_line(&error));
            // As runc: 1 could be the program's own.
            if matches!(cli.command, Command::Exec(_)) { ExitCode::from(255) } else { ExitCode::FAILURE }
        }
    }
}

fn run(call: &Call<'_>, command: &Command) -> anyhow::Result<i32> {
    match command {
        Command::Create(args) => command::create::create(call, args).map(|_| 0),
        Command::Start { id } => command::start::start(call, id).map(|()| 0),
        Command::Run(args) => command::run::run(call, args),
        Command::State { id } => command::state::state(call, id).map(|()| 0),
        Command::Kill(args) => command::kill::kill(call, args).map(|()| 0),
        Command::Delete { force, id } => command::delete::delete(call, id, *force).map(|()| 0),
        Command::Pause { id } => command::pause::pause(call, id).map(|()| 0),
        Command::Resume { id } => command::pause::resume(call, id).map(|()| 0),
        Command::Update(args) => command::update::update(call, args).map(|()| 0),
        Command::List { format, quiet } => command::list::list(call, *format, *quiet).map(|()| 0),
        Command::Ps { format, id, options } => command::ps::ps(call, id, *format, options).map(|()| 0),
        Command::Exec(args) => command::exec::exec(call, args),
        Command::Spec { bundle } => command::spec::spec(bundle).map(|()| 0),
        Command::Features => command::features::features().map(|()| 0),
    }
}

/// The error and its causes, each said once: our own errors name their cause themselves.
fn in_one_line(error: &anyhow::Error) -> String {
    let mut line = String::new();
    for cause in error.chain().map(ToString::to_string) {
        if line.is_empty() {
            line = cause;
        } else if !line.contains(&cause) {
            line = format!("{line}: {cause}");
        }
    }
    line.replace('\n', "; ")
}

fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error
        .chain()
        .filter_map(|cause| cause.downcast_ref::<std::io::Error>())
        .any(|io| io.kind() == std::io::ErrorKind::BrokenPipe)
}
