//! The commands and their flags, and the help that follows from them.

use super::flags::{Flag, Kind, flag, hidden};

/// How many arguments a command takes besides its flags.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Count {
    Exactly(usize),
    AtLeast(usize),
    Between(usize, usize),
}

impl Count {
    /// What is wrong with this many, in runc's words.
    pub fn fault(self, found: usize) -> Option<String> {
        match self {
            Count::Exactly(wanted) if found != wanted => {
                Some(format!("requires exactly {wanted} argument(s)"))
            }
            Count::AtLeast(least) | Count::Between(least, _) if found < least => {
                Some(format!("requires a minimum of {least} argument(s)"))
            }
            Count::Between(_, most) if found > most => {
                Some(format!("requires a maximum of {most} argument(s)"))
            }
            _ => None,
        }
    }
}

#[derive(Debug)]
pub struct Verb {
    pub name: &'static str,
    pub usage: &'static str,
    pub args: &'static str,
    pub about: &'static str,
    pub flags: &'static [Flag],
    pub count: Count,
    /// Flags end at the first argument: what follows is another program's.
    pub flags_first: bool,
}

pub const HELP: Flag = flag(&["help", "h"], Kind::Bool, "show help");

pub const GLOBAL: &[Flag] = &[
    flag(&["debug"], Kind::Bool, "tell what is being done, in the log"),
    flag(&["log"], Kind::Text, "file to append errors and warnings to (default is '/dev/stderr')"),
    flag(&["log-format"], Kind::Text, "form of the records in it: 'text' (default), or 'json'"),
    flag(&["root"], Kind::Text, "directory of the containers' state (default: \"/run/sysbox-runc\")"),
    hidden(&["criu"], Kind::Text),
    flag(
        &["systemd-cgroup"],
        Kind::Bool,
        "let systemd make the cgroups; cgroupsPath is then \"slice:prefix:name\"",
    ),
    flag(&["rootless"], Kind::Text, "accepted for engines that pass it; containers are always made by root"),
    flag(&["run-dir"], Kind::Text, "directory of the daemons' sockets (default: \"/run/sysbox\")"),
    HELP,
    flag(&["version", "v"], Kind::Bool, "print the version"),
];

const BUNDLE: Flag =
    flag(&["bundle", "b"], Kind::Text, "directory with config.json, defaults to the current directory");
const CONSOLE: Flag =
    flag(&["console-socket"], Kind::Text, "AF_UNIX socket to send the terminal's master end to");
const PIDFD: Flag = flag(&["pidfd-socket"], Kind::Text, "AF_UNIX socket to send a pidfd of the process to");
const PID_FILE: Flag = flag(&["pid-file"], Kind::Text, "file to write the process id to");
const NO_PIVOT: Flag =
    flag(&["no-pivot"], Kind::Bool, "change the root by chroot; only for hosts whose root is a ramdisk");
const NO_KEYRING: Flag = flag(&["no-new-keyring"], Kind::Bool, "keep the caller's session keyring");
const PRESERVE: Flag = flag(
    &["preserve-fds"],
    Kind::Int,
    "pass on N descriptors after the standard three and those of $LISTEN_FDS",
);
const DETACH: Flag = flag(&["detach", "d"], Kind::Bool, "return when it runs");
const FORMAT: Flag = flag(&["format", "f"], Kind::Text, "table or json (default: \"table\")");
const NO_SUBREAPER: Flag =
    flag(&["no-subreaper"], Kind::Bool, "leave orphans of the container to somebody else");

const ID: &str = "<container-id>";
const IT: &str = "<container-id> is the name that the container was created with.";

const MAKES: &str = "A bundle is a directory with a config.json and, as a rule, the root file system that it names.\n\
   The name must be free below --root.";

const fn verb(name: &'static str, usage: &'static str, flags: &'static [Flag]) -> Verb {
    Verb { name, usage, args: ID, about: IT, flags, count: Count::Exactly(1), flags_first: false }
}

pub const VERBS: &[Verb] = &[
    verb("checkpoint", "refused: a system container cannot be saved to disk", CHECKPOINT),
    Verb {
        about: MAKES,
        ..verb(
            "create",
            "create a container; its program waits for `start`",
            &[BUNDLE, CONSOLE, PIDFD, PID_FILE, NO_PIVOT, NO_KEYRING, PRESERVE],
        )
    },
    verb(
        "delete",
        "delete a container that has ended, and all that was made for it",
        &[flag(&["force", "f"], Kind::Bool, "end it first if it runs; and do not complain if there is none")],
    ),
    verb(
        "events",
        "print figures of a container, and an event when it runs out of memory",
        &[
            flag(&["interval"], Kind::Duration, "time between figures (default: 5s)"),
            flag(&["stats"], Kind::Bool, "print the figures once"),
        ],
    ),
    Verb {
        args: "<container-id> <command> [command options]  || -p process.json <container-id>",
        count: Count::AtLeast(1),
        flags_first: true,
        ..verb("exec", "run a program in a running container", EXEC)
    },
    Verb {
        args: "<container-id> [signal]",
        count: Count::Between(1, 2),
        ..verb(
            "kill",
            "send a signal (default: SIGTERM) to a container's init",
            &[hidden(&["all", "a"], Kind::Bool)],
        )
    },
    Verb {
        args: "",
        about: "",
        count: Count::Exactly(0),
        ..verb(
            "list",
            "list the containers below --root",
            &[FORMAT, flag(&["quiet", "q"], Kind::Bool, "ids alone")],
        )
    },
    verb("pause", "stop every process of a container, so that it can go on later", &[]),
    Verb {
        args: "<container-id> [ps options]",
        count: Count::AtLeast(1),
        flags_first: true,
        ..verb("ps", "show the processes of a container", &[FORMAT])
    },
    verb("restore", "refused: a system container cannot be restored from disk", RESTORE),
    verb("resume", "let a paused container go on", &[]),
    Verb {
        about: MAKES,
        ..verb(
            "run",
            "create and start a container",
            &[
                BUNDLE,
                CONSOLE,
                PIDFD,
                DETACH,
                flag(&["keep"], Kind::Bool, "do not delete the container when it ends"),
                PID_FILE,
                NO_SUBREAPER,
                NO_PIVOT,
                NO_KEYRING,
                PRESERVE,
            ],
        )
    },
    Verb {
        args: "",
        about: "It is a start: edit /process/args, and lay a root file system beside it. One that is there is not overwritten.",
        count: Count::Exactly(0),
        ..verb(
            "spec",
            "write a config.json for a system container",
            &[
                flag(&["bundle", "b"], Kind::Text, "directory to write it to"),
                flag(&["rootless"], Kind::Bool, "refused: containers are always made by root"),
            ],
        )
    },
    verb("start", "start the program of a created container", &[]),
    verb("state", "print the state of a container", &[]),
    verb("update", "change the limits of a container", UPDATE),
    Verb {
        args: "",
        about: "",
        count: Count::Exactly(0),
        ..verb("features", "print what this runtime supports, as JSON", &[])
    },
];

const EXEC: &[Flag] = &[
    CONSOLE,
    PIDFD,
    flag(&["cwd"], Kind::Text, "working directory in the container"),
    flag(&["env", "e"], Kind::Texts, "set an environment variable"),
    flag(&["tty", "t"], Kind::Bool, "give it a terminal"),
    flag(&["user", "u"], Kind::Text, "UID (format: <uid>[:<gid>])"),
    flag(&["additional-gids", "g"], Kind::Ints, "additional gids"),
    flag(&["process", "p"], Kind::Text, "a process document instead of a command"),
    DETACH,
    PID_FILE,
    flag(&["process-label"], Kind::Text, "refused, as SELinux labels are"),
    flag(&["apparmor"], Kind::Text, "set its AppArmor profile"),
    flag(&["no-new-privs"], Kind::Bool, "set no_new_privs"),
    flag(&["cap", "c"], Kind::Texts, "add a capability"),
    PRESERVE,
    flag(&["cgroup"], Kind::Texts, "run it in a cgroup below the container's: [<controller>:]<cgroup>"),
    flag(&["ignore-paused"], Kind::Bool, "also in a paused container, which has to be resumed within 30 s"),
    hidden(&["no-subreaper"], Kind::Bool),
];

const UPDATE: &[Flag] = &[
    flag(
        &["resources", "r"],
        Kind::Text,
        "file with limits as JSON (`linux.resources` of a spec), '-' for standard input; other flags are ignored then",
    ),
    flag(&["blkio-weight"], Kind::Int, "weight of its block I/O, 10 to 1000"),
    flag(&["cpu-period"], Kind::Text, "length of a scheduling period (in usecs)"),
    flag(&["cpu-quota"], Kind::Text, "CPU time in a period (in usecs); -1 for no limit"),
    flag(&["cpu-burst"], Kind::Text, "unused CPU time that may be saved up (in usecs)"),
    flag(&["cpu-share"], Kind::Text, "weight of its CPU time"),
    flag(&["cpu-rt-period"], Kind::Text, "length of a real-time period (in usecs)"),
    flag(&["cpu-rt-runtime"], Kind::Text, "real-time CPU time in a period (in usecs)"),
    flag(&["cpuset-cpus"], Kind::Text, "CPU(s) that it may use"),
    flag(&["cpuset-mems"], Kind::Text, "memory node(s) that it may use"),
    hidden(&["kernel-memory"], Kind::Text),
    hidden(&["kernel-memory-tcp"], Kind::Text),
    flag(&["memory"], Kind::Text, "memory limit (in bytes; suffixes k, m, g); -1 for none"),
    flag(&["cpu-idle"], Kind::Text, "1 for the idle scheduling policy, 0 for the normal one"),
    flag(&["memory-reservation"], Kind::Text, "memory that it is left with when the host is short of it"),
    flag(&["memory-swap"], Kind::Text, "memory and swap together; -1 for no limit"),
    flag(&["pids-limit"], Kind::Int, "how many processes there may be; -1 for no limit"),
    flag(&["l3-cache-schema"], Kind::Text, "refused: no container here has a resctrl group"),
    flag(&["mem-bw-schema"], Kind::Text, "refused: no container here has a resctrl group"),
];

const IMAGE: Flag = hidden(&["image-path"], Kind::Text);
const WORK: Flag = hidden(&["work-path"], Kind::Text);

/// runc's: a caller is to hear of the refusal, not of a flag.
const CHECKPOINT: &[Flag] = &[
    IMAGE,
    WORK,
    hidden(&["parent-path"], Kind::Text),
    hidden(&["leave-running"], Kind::Bool),
    hidden(&["tcp-established"], Kind::Bool),
    hidden(&["tcp-skip-in-flight"], Kind::Bool),
    hidden(&["link-remap"], Kind::Bool),
    hidden(&["ext-unix-sk"], Kind::Bool),
    hidden(&["shell-job"], Kind::Bool),
    hidden(&["lazy-pages"], Kind::Bool),
    hidden(&["status-fd"], Kind::Int),
    hidden(&["page-server"], Kind::Text),
    hidden(&["file-locks"], Kind::Bool),
    hidden(&["pre-dump"], Kind::Bool),
    hidden(&["manage-cgroups-mode"], Kind::Text),
    hidden(&["empty-ns"], Kind::Texts),
    hidden(&["auto-dedup"], Kind::Bool),
];

const RESTORE: &[Flag] = &[
    hidden(&["console-socket"], Kind::Text),
    IMAGE,
    WORK,
    hidden(&["tcp-established"], Kind::Bool),
    hidden(&["ext-unix-sk"], Kind::Bool),
    hidden(&["shell-job"], Kind::Bool),
    hidden(&["file-locks"], Kind::Bool),
    hidden(&["manage-cgroups-mode"], Kind::Text),
    hidden(&["bundle", "b"], Kind::Text),
    hidden(&["detach", "d"], Kind::Bool),
    hidden(&["pid-file"], Kind::Text),
    hidden(&["no-subreaper"], Kind::Bool),
    hidden(&["no-pivot"], Kind::Bool),
    hidden(&["empty-ns"], Kind::Texts),
    hidden(&["auto-dedup"], Kind::Bool),
    hidden(&["lazy-pages"], Kind::Bool),
    hidden(&["lsm-profile"], Kind::Text),
    hidden(&["lsm-mount-context"], Kind::Text),
];

/// The help of one command, in the form of runc's.
pub fn help_of(verb: &Verb) -> String {
    let about =
        if verb.about.is_empty() { String::new() } else { format!("\nDESCRIPTION:\n   {}\n", verb.about) };
    let args = if verb.args.is_empty() { String::new() } else { format!(" {}", verb.args) };
    format!(
        "NAME:\n   sysbox-runc {name} - {usage}\n\nUSAGE:\n   sysbox-runc {name} [command options]{args}\n{about}\n\
         OPTIONS:\n{options}\n",
        name = verb.name,
        usage = verb.usage,
        options = options(verb.flags.iter().chain([&HELP])),
    )
}

/// The help of the program.
pub fn help(version: &str) -> String {
    let verbs: Vec<(String, &str)> = VERBS
        .iter()
        .map(|verb| (verb.name.to_owned(), verb.usage))
        .chain([("help, h".to_owned(), "show this, or the help of one command")])
        .collect();
    format!(
        "NAME:\n   sysbox-runc - runs system containers: small machines with root, an init, Docker inside, and no \
         privileges on the host\n\nUSAGE:\n   sysbox-runc [global options] command [command options] [arguments...]\n\n\
         VERSION:\n   {version}\n\n\
         DESCRIPTION:\n   Engines call this program in place of runc (docker run --runtime=sysbox-runc …). It needs the \
         daemons sysbox-mgr and\n   sysbox-fs; if a command says that one is not running, `make up` in the source tree \
         starts both.\n\n\
         COMMANDS:\n{}\n\nGLOBAL OPTIONS:\n{}\n",
        columns(&verbs),
        options(GLOBAL.iter()),
    )
}

fn options<'a>(flags: impl Iterator<Item = &'a Flag>) -> String {
    let rows = flags.filter(|flag| !flag.hidden).map(|flag| {
        let value = if flag.kind == Kind::Bool { "" } else { " value" };
        let names: Vec<String> = flag
            .names
            .iter()
            .map(|name| format!("{}{name}{value}", if name.len() > 1 { "--" } else { "-" }))
            .collect();
        (names.join(", "), flag.usage)
    });
    columns(&rows.collect::<Vec<_>>())
}

fn columns(rows: &[(String, &str)]) -> String {
    let width = rows.iter().map(|(name, _)| name.len()).max().unwrap_or_default();
    rows.iter().map(|(name, usage)| format!("   {name:<width$}  {usage}")).collect::<Vec<_>>().join("\n")
}
