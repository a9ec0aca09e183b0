//! The command line.

use std::path::PathBuf;

use clap::{Parser, ValueEnum};
use tracing::level_filters::LevelFilter;

const AFTER: &str = "\
Needs root, /dev/fuse and a running sysbox-mgr with the same --run-dir, which keeps the FUSE connection
open while no sysbox-fs runs.

Killing or restarting sysbox-fs harms no container: reads of virtual files wait until it is back. SIGTERM
unmounts only when no container is known.

In trouble:
  containers hang in reads of /proc/meminfo   sysbox-fs is down: start it with the same options
  `Transport endpoint is not connected`       both daemons were down at once: restart those containers
  another sysbox-fs runs                      RUN_DIR/fs.lock holds its pid
";

/// Shows each system container its own values of files in /proc and /sys.
#[derive(Debug, Clone, Parser)]
#[command(name = "sysbox-fs", version, after_help = AFTER)]
pub struct Cli {
    /// Where the virtual files are mounted, a directory per container.
    #[arg(long, value_name = "DIR", default_value = "/var/lib/sysboxfs")]
    pub mountpoint: PathBuf,

    /// Holds the sockets fs.sock and mgr.sock, and the lock fs.lock.
    #[arg(long, value_name = "DIR", default_value = sysbox_ipc::DEFAULT_RUN_DIR)]
    pub run_dir: PathBuf,

    /// Appends log lines to FILE instead of writing them to stderr.
    #[arg(long, value_name = "FILE")]
    pub log: Option<PathBuf>,

    /// off, error, warn, info, debug or trace.
    #[arg(long, value_name = "LEVEL", default_value = "info")]
    pub log_level: LevelFilter,

    #[arg(long, value_name = "FORMAT", default_value = "text")]
    pub log_format: LogFormat,

    /// Looks PATH up and ends; how the daemon asks its own mount.
    #[arg(long, value_name = "PATH", hide = true)]
    pub probe: Option<PathBuf>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    Text,
    Json,
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn defaults_are_those_of_the_manual() {
        Cli::command().debug_assert();
        let cli = Cli::try_parse_from(["sysbox-fs"]).unwrap();
        assert_eq!(cli.mountpoint, PathBuf::from("/var/lib/sysboxfs"));
        assert_eq!(cli.run_dir, PathBuf::from("/run/sysbox"));
        assert_eq!((cli.log, cli.log_level, cli.log_format), (None, LevelFilter::INFO, LogFormat::Text));
        assert!(Cli::try_parse_from(["sysbox-fs", "--log-level", "loud"]).is_err());
    }
}
