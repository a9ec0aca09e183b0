//! Sysbox's flags by their names. Some set how containers are made; what the kernel does anyway, or what this manager never
//! does, is accepted with a line in the log; what would be a lie to accept is refused.

use clap::builder::BoolishValueParser;
use clap::parser::ValueSource;
use clap::{Arg, ArgAction, ArgMatches, Args, Command, FromArgMatches};
use sysbox_ipc::mgr::Defaults;

struct Flag {
    name: &'static str,
    help: &'static str,
    default: bool,
    kind: Kind,
}

enum Kind {
    Sets(fn(&mut Defaults, bool)),
    /// Accepted; why it changes nothing.
    Needless(&'static str),
    /// Refused unless it says what is so; why.
    Refused(&'static str),
}

const FLAGS: &[Flag] = &[
    Flag {
        name: "honor-caps",
        help: "Give containers the capabilities of their spec, instead of all for root and none for other users. A container \
               says otherwise with SYSBOX_HONOR_CAPS=TRUE or FALSE in its environment",
        default: false,
        kind: Kind::Sets(|defaults, on| defaults.honor_caps = on),
    },
    Flag {
        name: "syscont-mode",
        help: "Make machines of containers. With `false` they are ordinary ones, each in a user namespace of its own. A \
               container says otherwise with SYSBOX_SYSCONT_MODE=TRUE or FALSE",
        default: true,
        kind: Kind::Sets(|defaults, on| defaults.syscont_mode = on),
    },
    Flag {
        name: "relaxed-read-only",
        help: "Leave /sys and /proc/sys writable in a container whose root file system is read-only",
        default: false,
        kind: Kind::Sets(|defaults, on| defaults.relaxed_read_only = on),
    },
    Flag {
        name: "fsuid-map-fail-on-error",
        help: "Refuse a container with a bind mount whose file system cannot shift ids, instead of a warning",
        default: false,
        kind: Kind::Sets(|defaults, on| defaults.fsuid_map_fail_on_error = on),
    },
    Flag {
        name: "data-root-volumes",
        help: "Not Sysbox's. Keep the data of inner engines in volumes below DATA_ROOT, which `docker commit` does not carry, \
               instead of the container's own layer. A container says otherwise with SYSBOX_DATA_ROOT=volume or layer",
        default: false,
        kind: Kind::Sets(|defaults, on| defaults.data_root_volumes = on),
    },
    Flag {
        name: "allow-trusted-xattr",
        help: "Accepted; changes nothing",
        default: false,
        kind: Kind::Needless(
            "an engine inside needs no trusted.* attributes: an overlay in a user namespace has user.* ones",
        ),
    },
    Flag {
        name: "disable-shiftfs",
        help: "Accepted; changes nothing",
        default: false,
        kind: Kind::Needless("shiftfs is never used"),
    },
    Flag {
        name: "disable-shiftfs-on-fuse",
        help: "Accepted; changes nothing",
        default: false,
        kind: Kind::Needless("shiftfs is never used"),
    },
    Flag {
        name: "disable-shiftfs-precheck",
        help: "Accepted; changes nothing",
        default: false,
        kind: Kind::Needless("shiftfs is never used"),
    },
    Flag {
        name: "disable-rootfs-cloning",
        help: "Accepted; changes nothing",
        default: false,
        kind: Kind::Needless("a root file system is never cloned, nor chowned"),
    },
    Flag {
        name: "disable-inner-image-preload",
        help: "Accepted; changes nothing",
        default: false,
        kind: Kind::Needless(
            "inner images stay in the container's own layer: nothing is copied when it stops",
        ),
    },
    Flag {
        name: "alias-dns",
        help: "`true` is refused",
        default: false,
        kind: Kind::Refused("Docker's resolver address is not rewritten"),
    },
    Flag {
        name: "disable-idmapped-mount",
        help: "`true` is refused",
        default: false,
        kind: Kind::Refused("idmapped mounts are the only way in which ids are shifted"),
    },
    Flag {
        name: "disable-ovfs-on-idmapped-mount",
        help: "`true` is refused",
        default: false,
        kind: Kind::Refused("an overlay on idmapped layers is the only way in which an image is mounted"),
    },
    Flag {
        name: "ignore-sysfs-chown",
        help: "`true` is refused",
        default: false,
        kind: Kind::Refused("a chown on /sys is not intercepted and fails as the kernel says"),
    },
];

/// What the flags come to.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Flags {
    pub defaults: Defaults,
    /// For the log: flags that were given and change nothing, with the reason.
    pub needless: Vec<(&'static str, &'static str)>,
    /// `--flag=false` and the like, for the first line of the log.
    pub given: Vec<String>,
}

impl FromArgMatches for Flags {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let mut all = Self::default();
        all.update_from_arg_matches(matches)?;
        Ok(all)
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        for flag in
            FLAGS.iter().filter(|flag| matches.value_source(flag.name) == Some(ValueSource::CommandLine))
        {
            let on = matches.get_one::<bool>(flag.name).copied().unwrap_or(flag.default);
            match flag.kind {
                Kind::Sets(set) => set(&mut self.defaults, on),
                Kind::Needless(why) => self.needless.push((flag.name, why)),
                Kind::Refused(why) if on != flag.default => {
                    let text = format!("--{}={on} cannot be had: {why}\n", flag.name);
                    return Err(clap::Error::raw(clap::error::ErrorKind::InvalidValue, text));
                }
                Kind::Refused(_) => {}
            }
            self.given.push(format!("--{}={on}", flag.name));
        }
        Ok(())
    }
}

impl Args for Flags {
    fn augment_args(command: Command) -> Command {
        // As Go's programs take them: `--flag`, `--flag=true`, `--flag=false`.
        let argument = |flag: &Flag| {
            Arg::new(flag.name)
                .long(flag.name)
                .help(flag.help)
                .value_name("BOOL")
                .action(ArgAction::Set)
                .value_parser(BoolishValueParser::new())
                .num_args(0..=1)
                .require_equals(true)
                .default_value(if flag.default { "true" } else { "false" })
                .default_missing_value("true")
        };
        command.next_help_heading("As Sysbox's").args(FLAGS.iter().map(argument))
    }

    fn augment_args_for_update(command: Command) -> Command {
        Self::augment_args(command)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(arguments: &[&str]) -> Result<Flags, String> {
        let command = Flags::augment_args(Command::new("x"));
        let matches = command.try_get_matches_from([&["x"], arguments].concat());
        matches.and_then(|matches| Flags::from_arg_matches(&matches)).map_err(|error| error.to_string())
    }

    #[test]
    fn flags_of_sysbox_set_what_they_say() {
        assert_eq!(read(&[]).unwrap().defaults, Defaults::default());
        let flags = read(&["--honor-caps", "--syscont-mode=false", "--relaxed-read-only=true"]).unwrap();
        let expected = Defaults {
            honor_caps: true,
            syscont_mode: false,
            relaxed_read_only: true,
            ..Defaults::default()
        };
        assert_eq!(flags.defaults, expected);
        assert_eq!(flags.given, ["--honor-caps=true", "--syscont-mode=false", "--relaxed-read-only=true"]);
        assert!(read(&["--fsuid-map-fail-on-error"]).unwrap().defaults.fsuid_map_fail_on_error);
        assert!(read(&["--data-root-volumes"]).unwrap().defaults.data_root_volumes);
    }

    #[test]
    fn needless_flags_are_accepted_and_lies_are_refused() {
        let flags = read(&["--disable-shiftfs", "--disable-inner-image-preload"]).unwrap();
        assert_eq!(flags.needless.len(), 2);
        for (flag, why) in [
            (
                "--ignore-sysfs-chown",
                "--ignore-sysfs-chown=true cannot be had: a chown on /sys is not intercepted",
            ),
            ("--disable-idmapped-mount", "the only way in which ids are shifted"),
            ("--alias-dns=true", "resolver address is not rewritten"),
            ("--disable-ovfs-on-idmapped-mount", "the only way in which an image is mounted"),
            ("--no-such-flag", "unexpected argument"),
        ] {
            let text = read(&[flag]).expect_err(flag);
            assert!(text.contains(why), "{text}");
        }
        assert_eq!(
            read(&["--alias-dns=false", "--ignore-sysfs-chown=false"]).unwrap().defaults,
            Defaults::default()
        );
    }
}
