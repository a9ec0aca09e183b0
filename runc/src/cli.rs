//! The command line: runc's commands and flags, as engines call them.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};

/// Runs system containers: small machines with root, an init, Docker or Kubernetes inside, and no privileges on the host.
///
/// Engines call this program in place of runc (`docker run --runtime=sysbox-runc …`). It needs the daemons sysbox-mgr and
/// sysbox-fs; if a command says that one is not running, `make up` in the source tree starts both.
#[derive(Debug, Parser)]
#[command(name = "sysbox-runc", version = VERSION, disable_version_flag = true, subcommand_required = true)]
pub struct Cli {
    #[command(flatten)]
    pub global: Global,
    #[command(subcommand)]
    pub command: Command,
    /// Print the version
    #[arg(short = 'v', long, action = clap::ArgAction::Version)]
    version: (),
}

pub const VERSION: &str = concat!(env!("CARGO_PKG_VERSION"), "\nspec: 1.2.0");

#[derive(Debug, Clone, Args)]
pub struct Global {
    /// Directory of the containers' state
    #[arg(long, value_name = "DIR", default_value = "/run/sysbox-runc")]
    pub root: PathBuf,
    /// File to append errors and warnings to [default: standard error]
    #[arg(long, value_name = "FILE")]
    pub log: Option<PathBuf>,
    /// Form of the records in that file
    #[arg(long, value_name = "FORM", default_value = "text")]
    pub log_format: LogFormat,
    /// Tell what is being done
    #[arg(long)]
    pub debug: bool,
    /// Let systemd make the cgroups; cgroupsPath is then `slice:prefix:name`
    #[arg(long)]
    pub systemd_cgroup: bool,
    /// Directory of the daemons' sockets
    #[arg(long, value_name = "DIR", default_value = sysbox_ipc::DEFAULT_RUN_DIR)]
    pub run_dir: PathBuf,
    /// Accepted for engines that pass it; containers are always made by root
    #[arg(long, value_name = "MODE", hide = true, num_args = 0..=1, require_equals = true)]
    pub rootless: Option<Option<String>>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    Text,
    Json,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum OutputFormat {
    Table,
    Json,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Create a container; its program waits for `start`
    Create(CreateArgs),
    /// Start the program of a created container
    Start { id: String },
    /// Create and start a container
    Run(RunArgs),
    /// Print the state of a container
    State { id: String },
    /// Send a signal to a container's init
    Kill(KillArgs),
    /// Delete a stopped container and all that was made for it
    Delete {
        /// End it first if it runs; and do not complain if there is no such container
        #[arg(short, long)]
        force: bool,
        id: String,
    },
    /// Stop every process of a container, so that it can go on later
    Pause { id: String },
    /// Let a paused container go on
    Resume { id: String },
    /// Change the limits of a container
    Update(UpdateArgs),
    /// List the containers of this root
    List {
        #[arg(short, long, default_value = "table")]
        format: OutputFormat,
        /// Ids alone
        #[arg(short, long)]
        quiet: bool,
    },
    /// Show the processes of a container
    Ps {
        #[arg(short, long, default_value = "table")]
        format: OutputFormat,
        id: String,
        /// Options for ps(1)
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        options: Vec<String>,
    },
    /// Run a program in a running container
    Exec(ExecArgs),
    /// Write a config.json for a system container
    Spec {
        /// Directory to write it to
        #[arg(short, long, default_value = ".")]
        bundle: PathBuf,
    },
    /// Print what this runtime supports, as JSON
    Features,
}

#[derive(Debug, Clone, Args)]
pub struct CreateArgs {
    /// Directory with config.json
    #[arg(short, long, default_value = ".")]
    pub bundle: PathBuf,
    /// Socket to send the terminal to
    #[arg(long, value_name = "PATH")]
    pub console_socket: Option<PathBuf>,
    /// File to write the pid of init to
    #[arg(long, value_name = "FILE")]
    pub pid_file: Option<PathBuf>,
    /// Change the root by chroot; only for hosts whose root is a ramdisk
    #[arg(long)]
    pub no_pivot: bool,
    /// Keep the caller's session keyring
    #[arg(long)]
    pub no_new_keyring: bool,
    /// Pass on this many descriptors after the standard three
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub preserve_fds: i32,
    pub id: String,
}

#[derive(Debug, Clone, Args)]
pub struct RunArgs {
    #[command(flatten)]
    pub create: CreateArgs,
    /// Return when the container runs
    #[arg(short, long)]
    pub detach: bool,
    /// Do not delete the container when it ends
    #[arg(long)]
    pub keep: bool,
    /// Accepted as in runc; orphans are the caller's
    #[arg(long)]
    pub no_subreaper: bool,
}

#[derive(Debug, Clone, Args)]
pub struct KillArgs {
    /// Send it to every process of the container
    #[arg(short, long)]
    pub all: bool,
    pub id: String,
    /// Name or number
    #[arg(default_value = "SIGTERM")]
    pub signal: String,
}

#[derive(Debug, Clone, Args)]
pub struct UpdateArgs {
    /// Limits as a JSON document (`linux.resources` of a spec), `-` for standard input; the other flags are ignored then
    #[arg(short, long, value_name = "FILE")]
    pub resources: Option<PathBuf>,
    /// Weight of its block I/O, 10 to 1000
    #[arg(long, value_name = "N")]
    pub blkio_weight: Option<u16>,
    /// Length of a scheduling period, in microseconds
    #[arg(long, value_name = "US")]
    pub cpu_period: Option<u64>,
    /// CPU time in a period, in microseconds; -1 for no limit
    #[arg(long, value_name = "US", allow_negative_numbers = true)]
    pub cpu_quota: Option<i64>,
    /// Unused CPU time that may be saved up, in microseconds
    #[arg(long, value_name = "US")]
    pub cpu_burst: Option<u64>,
    /// Weight of its CPU time
    #[arg(long, value_name = "N")]
    pub cpu_share: Option<u64>,
    /// Length of a real-time period, in microseconds
    #[arg(long, value_name = "US")]
    pub cpu_rt_period: Option<u64>,
    /// Real-time CPU time in a period, in microseconds
    #[arg(long, value_name = "US", allow_negative_numbers = true)]
    pub cpu_rt_runtime: Option<i64>,
    /// 1 for the idle scheduling policy
    #[arg(long, value_name = "0|1", allow_negative_numbers = true)]
    pub cpu_idle: Option<i64>,
    /// CPUs that it may use, `0-2,7`
    #[arg(long, value_name = "LIST")]
    pub cpuset_cpus: Option<String>,
    /// Memory nodes that it may use
    #[arg(long, value_name = "LIST")]
    pub cpuset_mems: Option<String>,
    /// Memory in bytes (suffixes k, m, g); -1 for no limit
    #[arg(long, value_name = "BYTES", allow_hyphen_values = true)]
    pub memory: Option<String>,
    /// Memory that it should be left with when the host is short of it
    #[arg(long, value_name = "BYTES", allow_hyphen_values = true)]
    pub memory_reservation: Option<String>,
    /// Memory and swap together; -1 for no limit
    #[arg(long, value_name = "BYTES", allow_hyphen_values = true)]
    pub memory_swap: Option<String>,
    /// How many processes there may be; -1 for no limit
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    pub pids_limit: Option<i64>,
    /// Refused: no container here has a resctrl group
    #[arg(long, value_name = "SCHEMA")]
    pub l3_cache_schema: Option<String>,
    /// Refused: no container here has a resctrl group
    #[arg(long, value_name = "SCHEMA")]
    pub mem_bw_schema: Option<String>,
    pub id: String,
}

#[derive(Debug, Clone, Args)]
pub struct ExecArgs {
    /// Socket to send the terminal to
    #[arg(long, value_name = "PATH")]
    pub console_socket: Option<PathBuf>,
    /// Working directory in the container
    #[arg(long, value_name = "DIR")]
    pub cwd: Option<PathBuf>,
    /// NAME=VALUE; may be repeated
    #[arg(short, long, value_name = "PAIR")]
    pub env: Vec<String>,
    /// Give it a terminal
    #[arg(short, long)]
    pub tty: bool,
    /// UID[:GID]
    #[arg(short, long, value_name = "USER")]
    pub user: Option<String>,
    /// May be repeated
    #[arg(short = 'g', long, value_name = "GID")]
    pub additional_gids: Vec<u32>,
    /// A process document instead of a command
    #[arg(short, long, value_name = "FILE")]
    pub process: Option<PathBuf>,
    /// Return when the program runs
    #[arg(short, long)]
    pub detach: bool,
    /// File to write its pid to
    #[arg(long, value_name = "FILE")]
    pub pid_file: Option<PathBuf>,
    /// Set no_new_privs
    #[arg(long)]
    pub no_new_privs: bool,
    /// Accepted as in runc; orphans are the caller's
    #[arg(long, hide = true)]
    pub no_subreaper: bool,
    /// Do it in a paused container as well, which has to be resumed within 30 s
    #[arg(long)]
    pub ignore_paused: bool,
    /// Pass on this many descriptors after the standard three
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub preserve_fds: i32,
    pub id: String,
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    pub command: Vec<String>,
}
