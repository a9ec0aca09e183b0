//! `sysbox-runc`, the OCI runtime: reads the command line, runs one command, tells what went wrong in one line. A library
//! only so that tests/fuzz reaches what judges a document.

mod apply;
mod attend;
mod bundle;
mod carry;
mod cgroup;
mod cli;
mod clones;
mod command;
mod cpuset;
mod daemons;
mod elsewhere;
mod fields;
mod figures;
mod filter;
mod freezer;
mod fuse;
mod given;
mod hooks;
mod init;
mod launch;
mod limits;
mod listener;
mod log;
mod machine;
mod mirror;
mod nested;
mod oom;
mod overlay;
mod plan;
mod preload;
mod residents;
mod sink;
mod state;
mod subcgroup;
mod survey;
mod undo;

#[cfg(feature = "fuzz")]
pub use plan::judged::{base, judged, names_a_place};

use std::io::Write;
use std::process::ExitCode;

use cli::{Command, Halt};
use command::Call;
use command::create::Detach;
use log::Log;

/// The program.
pub fn main() -> ExitCode {
    let mut given = std::env::args_os().peekable();
    if given.next_if(|name| name == hooks::IN_DIRECTORY).is_some() {
        // The caller is libcontainer, which hears of the code, and who asked for the container of the words.
        let _unheard = writeln!(std::io::stderr(), "{}", hooks::in_directory(given));
        return ExitCode::from(127);
    }
    let mut args = Vec::new();
    for arg in given {
        match arg.into_string() {
            Ok(arg) => args.push(arg),
            Err(arg) => {
                return halt(
                    &Log::unset(),
                    Halt::misused(String::new(), format!("argument {arg:?}: not UTF-8")),
                );
            }
        }
    }
    let (program, args) =
        args.split_first().map_or(("", &args[..]), |(program, args)| (program.as_str(), args));
    let (global, rest) = match cli::global(args) {
        Ok(read) => read,
        Err(end) => return halt(&Log::unset(), end),
    };
    let log = match Log::open(&global) {
        Ok(log) => log,
        Err(error) => return halt(&Log::unset(), Halt::misused(String::new(), format!("--log: {error}"))),
    };
    let command = match cli::command(program, &rest) {
        Ok(command) => command,
        Err(end) => return halt(&log, end),
    };
    match run(&Call { global: &global, log: &log }, &command) {
        Ok(code) => ExitCode::from(u8::try_from(code).unwrap_or(255)),
        // A reader that went away is no failure of ours.
        Err(error) if is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            let (attempt, code) = match command {
                Command::Create(_) => ("runc create failed: ", 1),
                Command::Run(_) => ("runc run failed: ", 1),
                // 1 could be the program's own.
                Command::Exec(_) => ("exec failed: ", 255),
                _ => ("", 1),
            };
            log.error(&format!("{attempt}{}", in_one_line(&error)));
            ExitCode::from(code)
        }
    }
}

/// Ends before anything was done.
fn halt(log: &Log, end: Halt) -> ExitCode {
    let (text, code) = match end {
        Halt::Told(text) => (text, ExitCode::SUCCESS),
        Halt::Misused { help, error, code } => {
            log.error(&error);
            (help, ExitCode::from(code))
        }
    };
    // Who closed the pipe does not want to read it.
    let _closed = std::io::stdout().write_all(text.as_bytes());
    code
}

fn run(call: &Call<'_>, command: &Command) -> anyhow::Result<i32> {
    match command {
        Command::Create(args) => command::create::create(call, args, Detach::Yes).map(|_| 0),
        Command::Start { id } => command::start::start(call, id).map(|()| 0),
        Command::Run(args) => command::run::run(call, args),
        Command::State { id } => command::state::state(call, id).map(|()| 0),
        Command::Kill(args) => command::kill::kill(call, args).map(|()| 0),
        Command::Delete { force, id } => command::delete::delete(call, id, *force).map(|()| 0),
        Command::Events(args) => command::events::events(call, args).map(|()| 0),
        Command::Pause { id } => command::pause::pause(call, id).map(|()| 0),
        Command::Resume { id } => command::pause::resume(call, id).map(|()| 0),
        Command::Update(args) => command::update::update(call, args).map(|()| 0),
        Command::List { format, quiet } => command::list::list(call, format, *quiet).map(|()| 0),
        Command::Ps { format, id, options } => command::ps::ps(call, id, format, options).map(|()| 0),
        Command::Exec(args) => command::exec::exec(call, args),
        Command::Spec { bundle, rootless } => command::spec::spec(bundle, *rootless).map(|()| 0),
        Command::Features => command::features::features().map(|()| 0),
        Command::Refused { verb } => anyhow::bail!(
            "{verb}: not supported: CRIU cannot save what makes a system container (its user namespace's mounts, the files \
             of sysbox-fs, an engine inside)"
        ),
    }
}

/// The error and its causes, each said once: our own errors name their cause themselves.
fn in_one_line(error: &anyhow::Error) -> String {
    let mut line = String::new();
    for cause in error.chain().map(ToString::to_string) {
        if line.is_empty() {
            line = cause;
        } else {
            // The kernel's reason stands in our own words as a rule, without its number.
            let bare = cause.split(" (os error").next().unwrap_or_default().to_lowercase();
            if !line.to_lowercase().contains(&bare) {
                line = format!("{line}: {cause}");
            }
        }
    }
    line
}

fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error
        .chain()
        .filter_map(|cause| cause.downcast_ref::<std::io::Error>())
        .any(|io| io.kind() == std::io::ErrorKind::BrokenPipe)
}
