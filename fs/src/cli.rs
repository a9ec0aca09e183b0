//! The command line.

use std::path::PathBuf;

use clap::Parser;
use tracing::level_filters::LevelFilter;

use sysbox_log::Format;

const AFTER: &str = "\
When something is wrong:
  it does not start   the line on stderr says why, and `hint:` what to do. It needs
                      root, /dev/fuse, and sysbox-mgr with the same --run-dir
  is it running?      RUN_DIR/fs.lock holds its pid while it runs
  containers hang when they read /proc/meminfo
                      it is down: start it with the same options, and they go on
  containers read `Transport endpoint is not connected`
                      both daemons were down at once: restart those containers
  see more            --log-level debug
Stop it with SIGTERM. Killing or restarting it harms no container while sysbox-mgr
runs. It unmounts only when no container is left.";

/// Shows each system container its own values of files in /proc and /sys.
#[derive(Debug, Clone, Parser)]
#[command(name = "sysbox-fs", version, max_term_width = 100, after_help = AFTER)]
pub struct Cli {
    /// Where the virtual files are mounted, a directory per container.
    #[arg(long, value_name = "DIR", default_value = "/var/lib/sysboxfs")]
    pub mountpoint: PathBuf,

    /// Holds the sockets fs.sock and mgr.sock, and the lock fs.lock.
    #[arg(long, value_name = "DIR", default_value = sysbox_ipc::DEFAULT_RUN_DIR)]
    pub run_dir: PathBuf,

    /// Appends the log to FILE instead of writing it to stderr, and opens it anew on SIGHUP.
    #[arg(long, value_name = "FILE")]
    pub log: Option<PathBuf>,

    /// error, warn, info, debug or trace.
    #[arg(long, value_name = "LEVEL", default_value = "info", value_parser = level)]
    pub log_level: LevelFilter,

    #[arg(long, value_name = "FORMAT", default_value = "text")]
    pub log_format: Format,

    /// Looks PATH up and ends; how the daemon asks its own mount.
    #[arg(long, value_name = "PATH", hide = true)]
    pub probe: Option<PathBuf>,
}

fn level(text: &str) -> Result<LevelFilter, String> {
    match text {
        "error" | "warn" | "info" | "debug" | "trace" => text.parse().map_err(|_| "not a level".to_owned()),
        _ => Err("not one of error, warn, info, debug, trace".to_owned()),
    }
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
        assert_eq!((cli.log, cli.log_level, cli.log_format), (None, LevelFilter::INFO, Format::Text));
        for bad in [["--log-level", "off"], ["--log-level", "loud"], ["--log-format", "xml"]] {
            assert!(Cli::try_parse_from(["sysbox-fs"].into_iter().chain(bad)).is_err(), "{bad:?}");
        }
    }
}
