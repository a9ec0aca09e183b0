//! The command line: runc's commands and flags, as engines and scripts call them. `flags` has the grammar, `table` the
//! commands; here is what they come to, as types.

pub mod flags;
pub mod numbers;
mod table;

use std::path::{Component, Path, PathBuf};
use std::time::Duration;

use flags::{Parsed, parse, reorder};
use table::{GLOBAL, HELP, VERBS, Verb, help, help_of};

/// Of the runtime specification, with which every document of ours complies, whatever a bundle's says.
pub const SPEC_VERSION: &str = "1.2.0";

pub const VERSION: &str = concat!(env!("CARGO_PKG_VERSION"), "\nspec: 1.2.0");

/// An end before anything is done.
#[derive(Debug, PartialEq, Eq)]
pub enum Halt {
    /// What was asked for is this text.
    Told(String),
    /// A call that cannot be understood: help for standard output, and the error.
    Misused { help: String, error: String, code: u8 },
}

impl Halt {
    pub fn misused(help: String, error: String) -> Self {
        Self::Misused { help, error, code: 1 }
    }
}

#[derive(Debug, Clone)]
pub struct Global {
    pub root: PathBuf,
    pub log: Option<PathBuf>,
    pub log_format: LogFormat,
    pub debug: bool,
    pub systemd_cgroup: bool,
    pub run_dir: PathBuf,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogFormat {
    Text,
    Json,
}

#[derive(Debug)]
pub enum Command {
    /// `checkpoint` or `restore`.
    Refused {
        verb: &'static str,
    },
    Create(CreateArgs),
    Delete {
        force: bool,
        id: String,
    },
    Events(EventsArgs),
    Exec(ExecArgs),
    Features,
    Kill(KillArgs),
    List {
        format: String,
        quiet: bool,
    },
    Pause {
        id: String,
    },
    Ps {
        format: String,
        id: String,
        options: Vec<String>,
    },
    Resume {
        id: String,
    },
    Run(RunArgs),
    Spec {
        bundle: PathBuf,
        rootless: bool,
    },
    Start {
        id: String,
    },
    State {
        id: String,
    },
    Update(UpdateArgs),
}

#[derive(Debug, Clone, Default)]
pub struct CreateArgs {
    /// `None` is where the caller is.
    pub bundle: Option<PathBuf>,
    pub console_socket: Option<PathBuf>,
    pub pidfd_socket: Option<PathBuf>,
    pub pid_file: Option<PathBuf>,
    pub no_pivot: bool,
    pub no_new_keyring: bool,
    pub preserve_fds: i32,
    pub id: String,
}

#[derive(Debug, Clone)]
pub struct RunArgs {
    pub create: CreateArgs,
    pub detach: bool,
    pub keep: bool,
    pub no_subreaper: bool,
}

#[derive(Debug, Clone)]
pub struct EventsArgs {
    pub id: String,
    pub interval: Duration,
    pub once: bool,
}

#[derive(Debug, Clone)]
pub struct KillArgs {
    /// As in runc 1.3: one that does not run is no error.
    pub all: bool,
    pub id: String,
    pub signal: String,
}

/// Texts, as runc reads them when the container is known.
#[derive(Debug, Clone, Default)]
pub struct UpdateArgs {
    pub resources: Option<PathBuf>,
    pub blkio_weight: Option<i64>,
    pub cpu_period: Option<String>,
    pub cpu_quota: Option<String>,
    pub cpu_burst: Option<String>,
    pub cpu_share: Option<String>,
    pub cpu_rt_period: Option<String>,
    pub cpu_rt_runtime: Option<String>,
    pub cpu_idle: Option<String>,
    pub cpuset_cpus: Option<String>,
    pub cpuset_mems: Option<String>,
    pub kernel_memory: Option<String>,
    pub kernel_memory_tcp: Option<String>,
    pub memory: Option<String>,
    pub memory_reservation: Option<String>,
    pub memory_swap: Option<String>,
    pub pids_limit: Option<i64>,
    pub l3_cache_schema: Option<String>,
    pub mem_bw_schema: Option<String>,
    pub id: String,
}

#[derive(Debug, Clone, Default)]
pub struct ExecArgs {
    pub console_socket: Option<PathBuf>,
    pub pidfd_socket: Option<PathBuf>,
    pub cwd: Option<PathBuf>,
    pub env: Vec<String>,
    pub tty: bool,
    pub user: Option<String>,
    pub additional_gids: Vec<i64>,
    pub process: Option<PathBuf>,
    pub detach: bool,
    pub pid_file: Option<PathBuf>,
    pub process_label: Option<String>,
    pub apparmor: Option<String>,
    /// `None` leaves it as the container's process has it.
    pub no_new_privs: Option<bool>,
    pub caps: Vec<String>,
    pub preserve_fds: i32,
    pub cgroups: Vec<String>,
    pub ignore_paused: bool,
    pub id: String,
    pub command: Vec<String>,
}

/// Reads the flags before the command; the second value is the command and what follows it.
///
/// # Errors
/// Help, the version, or a usage error.
pub fn global(args: &[String]) -> Result<(Global, Vec<String>), Halt> {
    let usage =
        |said: &str| Halt::misused(format!("Incorrect Usage. {said}\n\n{}", help(VERSION)), said.to_owned());
    let parsed = parse(GLOBAL, args).map_err(|said| usage(&said))?;
    if parsed.is("help") {
        return Err(Halt::Told(help(VERSION)));
    }
    if parsed.is("version") {
        return Err(Halt::Told(format!("sysbox-runc version {VERSION}\n")));
    }
    let refuse = |error: String| Halt::misused(String::new(), error);
    let root = match parsed.text("root") {
        Some(text) => absolute(text).map_err(|error| refuse(format!("--root: {error}")))?,
        None => PathBuf::from("/run/sysbox-runc"),
    };
    if root == Path::new("/") {
        // Every directory of the host would be taken for a container.
        return Err(refuse("Option --root argument should not be set to /".to_owned()));
    }
    let log_format = match parsed.text("log-format").unwrap_or_default() {
        "" | "text" => LogFormat::Text,
        "json" => LogFormat::Json,
        other => return Err(refuse(format!("invalid log-format: {other}"))),
    };
    let global = Global {
        root,
        log: parsed.filled("log").map(PathBuf::from),
        log_format,
        debug: parsed.is("debug"),
        systemd_cgroup: parsed.is("systemd-cgroup"),
        run_dir: parsed.filled("run-dir").map_or_else(|| sysbox_ipc::DEFAULT_RUN_DIR.into(), PathBuf::from),
    };
    Ok((global, parsed.args))
}

/// The path from the root, without `.` and `..`, by its letters alone; an empty one is the working directory.
fn absolute(text: &str) -> std::io::Result<PathBuf> {
    let mut clean = PathBuf::new();
    for part in std::path::absolute(if text.is_empty() { "." } else { text })?.components() {
        if part == Component::ParentDir {
            clean.pop();
        } else {
            clean.push(part);
        }
    }
    Ok(clean)
}

/// Reads a command; `program` is how the caller named this one.
///
/// # Errors
/// Help or a usage error.
pub fn command(program: &str, args: &[String]) -> Result<Command, Halt> {
    let Some((name, rest)) = args.split_first() else { return Err(Halt::Told(help(VERSION))) };
    let find = |name: &str| VERBS.iter().find(|verb| verb.name == name);
    let unknown = |name: &str| Halt::Misused {
        help: String::new(),
        error: format!("No help topic for '{name}'"),
        code: 3,
    };
    if name == "help" || name == "h" {
        let Some(topic) = rest.first() else { return Err(Halt::Told(help(VERSION))) };
        return Err(find(topic).map_or_else(|| unknown(topic), |verb| Halt::Told(help_of(verb))));
    }
    let verb = find(name).ok_or_else(|| unknown(name))?;
    let known: Vec<flags::Flag> = verb.flags.iter().copied().chain([HELP]).collect();
    let ordered = if verb.flags_first { rest.to_vec() } else { reorder(&known, rest) };
    let parsed = parse(&known, &ordered)
        .map_err(|said| Halt::misused(format!("Incorrect Usage: {said}\n\n{}", help_of(verb)), said))?;
    if parsed.is("help") {
        return Err(Halt::Told(help_of(verb)));
    }
    if let Some(fault) = verb.count.fault(parsed.args.len()) {
        let help = format!("Incorrect Usage.\n\n{}", help_of(verb));
        return Err(Halt::misused(help, format!("{program}: {:?} {fault}", verb.name)));
    }
    Ok(typed(verb, &parsed))
}

fn typed(verb: &Verb, parsed: &Parsed) -> Command {
    let id = parsed.args.first().cloned().unwrap_or_default();
    let after_id = || parsed.args.get(1..).unwrap_or_default().to_vec();
    let format = || parsed.text("format").unwrap_or("table").to_owned();
    match verb.name {
        "create" => Command::Create(create_args(parsed, id)),
        "delete" => Command::Delete { force: parsed.is("force"), id },
        "events" => {
            let interval = parsed.text("interval").and_then(numbers::duration);
            let interval = interval.unwrap_or(Duration::from_secs(5));
            Command::Events(EventsArgs { id, interval, once: parsed.is("stats") })
        }
        "exec" => Command::Exec(exec_args(parsed, id, after_id())),
        "features" => Command::Features,
        "kill" => {
            let signal = parsed.args.get(1).filter(|text| !text.is_empty());
            let signal = signal.map_or("SIGTERM", String::as_str).to_owned();
            Command::Kill(KillArgs { all: parsed.is("all"), id, signal })
        }
        "list" => Command::List { format: format(), quiet: parsed.is("quiet") },
        "pause" => Command::Pause { id },
        "ps" => Command::Ps { format: format(), id, options: after_id() },
        "resume" => Command::Resume { id },
        "run" => Command::Run(RunArgs {
            create: create_args(parsed, id),
            detach: parsed.is("detach"),
            keep: parsed.is("keep"),
            no_subreaper: parsed.is("no-subreaper"),
        }),
        "spec" => Command::Spec {
            bundle: parsed.filled("bundle").unwrap_or(".").into(),
            rootless: parsed.is("rootless"),
        },
        "start" => Command::Start { id },
        "state" => Command::State { id },
        "update" => Command::Update(update_args(parsed, id)),
        refused => Command::Refused { verb: refused },
    }
}

fn create_args(parsed: &Parsed, id: String) -> CreateArgs {
    CreateArgs {
        bundle: parsed.filled("bundle").map(PathBuf::from),
        console_socket: parsed.filled("console-socket").map(PathBuf::from),
        pidfd_socket: parsed.filled("pidfd-socket").map(PathBuf::from),
        pid_file: parsed.filled("pid-file").map(PathBuf::from),
        no_pivot: parsed.is("no-pivot"),
        no_new_keyring: parsed.is("no-new-keyring"),
        preserve_fds: preserved(parsed),
        id,
    }
}

/// More than any process has descriptors is as good as all.
fn preserved(parsed: &Parsed) -> i32 {
    i32::try_from(parsed.int("preserve-fds").unwrap_or(0).max(0)).unwrap_or(i32::MAX)
}

fn exec_args(parsed: &Parsed, id: String, command: Vec<String>) -> ExecArgs {
    let path = |name: &str| parsed.filled(name).map(PathBuf::from);
    let text = |name: &str| parsed.filled(name).map(str::to_owned);
    ExecArgs {
        console_socket: path("console-socket"),
        pidfd_socket: path("pidfd-socket"),
        cwd: path("cwd"),
        env: parsed.texts("env"),
        tty: parsed.is("tty"),
        user: text("user"),
        additional_gids: parsed.texts("additional-gids").iter().flat_map(|gid| numbers::int(gid)).collect(),
        process: path("process"),
        detach: parsed.is("detach"),
        pid_file: path("pid-file"),
        process_label: text("process-label"),
        apparmor: text("apparmor"),
        no_new_privs: parsed.text("no-new-privs").and_then(numbers::boolean),
        caps: parsed.texts("cap"),
        preserve_fds: preserved(parsed),
        cgroups: parsed.texts("cgroup"),
        ignore_paused: parsed.is("ignore-paused"),
        id,
        command,
    }
}

fn update_args(parsed: &Parsed, id: String) -> UpdateArgs {
    let text = |name: &str| parsed.filled(name).map(str::to_owned);
    UpdateArgs {
        resources: parsed.filled("resources").map(PathBuf::from),
        blkio_weight: parsed.int("blkio-weight").filter(|weight| *weight != 0),
        cpu_period: text("cpu-period"),
        cpu_quota: text("cpu-quota"),
        cpu_burst: text("cpu-burst"),
        cpu_share: text("cpu-share"),
        cpu_rt_period: text("cpu-rt-period"),
        cpu_rt_runtime: text("cpu-rt-runtime"),
        cpu_idle: text("cpu-idle"),
        cpuset_cpus: text("cpuset-cpus"),
        cpuset_mems: text("cpuset-mems"),
        kernel_memory: text("kernel-memory"),
        kernel_memory_tcp: text("kernel-memory-tcp"),
        memory: text("memory"),
        memory_reservation: text("memory-reservation"),
        memory_swap: text("memory-swap"),
        pids_limit: parsed.int("pids-limit"),
        l3_cache_schema: text("l3-cache-schema"),
        mem_bw_schema: text("mem-bw-schema"),
        id,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(text: &str) -> Vec<String> {
        text.split_whitespace().map(str::to_owned).collect()
    }

    #[test]
    fn a_command_line_is_read_as_runc_reads_it() {
        let (global, rest) = global(&words("-root=/x --log-format json kill c KILL")).unwrap();
        assert_eq!((global.root, global.log_format), (PathBuf::from("/x"), LogFormat::Json));
        let Ok(Command::Kill(kill)) = command("p", &rest) else { panic!("no kill") };
        assert_eq!((kill.id.as_str(), kill.signal.as_str(), kill.all), ("c", "KILL", false));
        let Ok(Command::Exec(exec)) = command("p", &words("exec -t -e A=1 -g 5 c ls -d --help")) else {
            panic!("no exec")
        };
        assert_eq!(exec.command, ["ls", "-d", "--help"]);
        assert!(exec.tty && !exec.detach && exec.additional_gids == [5] && exec.no_new_privs.is_none());
    }

    #[test]
    fn what_cannot_be_read_is_said_with_help_and_a_code() {
        let code = |line: &str| match command("p", &words(line)) {
            Err(Halt::Misused { help, error, code }) => {
                (help.lines().next().unwrap_or("").to_owned(), error, code)
            }
            other => panic!("{line}: {other:?}"),
        };
        let usage = |said: &str| format!("Incorrect Usage: {said}");
        let nope = "flag provided but not defined: -nope";
        assert_eq!(code("state --nope c"), (usage(nope), nope.to_owned(), 1));
        let count = "p: \"state\" requires exactly 1 argument(s)".to_owned();
        assert_eq!(code("state c --nope"), ("Incorrect Usage.".to_owned(), count, 1));
        assert_eq!(code("fly c"), (String::new(), "No help topic for 'fly'".to_owned(), 3));
        for root in ["/", "/x/..", "/x/../../y/..", "/.."] {
            let said = global(&[format!("--root={root}")]).unwrap_err();
            assert!(matches!(said, Halt::Misused { error, .. } if error.contains("--root")), "{root}");
        }
        assert_eq!(global(&words("--root /x/./../y")).unwrap().0.root, Path::new("/y"));
    }

    #[test]
    fn every_command_has_a_type_and_a_help() {
        for verb in VERBS {
            let args = vec!["c".to_owned(); if verb.count.fault(0).is_some() { 1 } else { 0 }];
            let line: Vec<String> = [verb.name.to_owned()].into_iter().chain(args).collect();
            let read = command("p", &line).unwrap();
            let refused = matches!(read, Command::Refused { .. });
            assert_eq!(refused, ["checkpoint", "restore"].contains(&verb.name), "{}", verb.name);
            let told = command("p", &words(&format!("{} --help", verb.name))).unwrap_err();
            assert!(matches!(told, Halt::Told(text) if text.contains("OPTIONS:")), "{}", verb.name);
        }
    }
}
