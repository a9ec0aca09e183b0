//! How a container is made beyond its spec: what sysbox-mgr says for all of them, and what the container's own environment
//! says in `SYSBOX_*` variables. Read strictly, as Sysbox does: a setting that is not understood is a refusal.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use sysbox_ipc::mgr::Defaults;

/// What holds for one container.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Settings {
    #[serde(flatten)]
    pub common: Defaults,
    /// Destinations of bind mounts whose ids are left as they are.
    #[serde(default)]
    pub unshifted: Vec<PathBuf>,
    /// Asked for though the kernel needs no such thing; for a person.
    #[serde(skip)]
    pub needless: Vec<&'static str>,
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SettingError {
    #[error("/process/env: env var {0} has incorrect format; expected VAR=VALUE")]
    Format(String),
    #[error("/process/env: invalid env var {name}; must be one of {}", known())]
    Unknown { name: String },
    #[error("/process/env: env var {name} has invalid value {value}; expect {expected}")]
    Value { name: &'static str, value: String, expected: &'static str },
    #[error("/process/env: env var {name}: {why}")]
    Refused { name: &'static str, why: &'static str },
}

/// A variable, and what its value does. A new one is a new row (and one in docs/user-guide.md).
struct Variable {
    name: &'static str,
    expected: &'static str,
    set: fn(&mut Settings, &str) -> Result<(), Fault>,
}

enum Fault {
    Value,
    Refused(&'static str),
}

const SWITCH: &str = "[TRUE|FALSE]";

const VARIABLES: &[Variable] = &[
    Variable {
        name: "SYSBOX_ALLOW_TRUSTED_XATTR",
        expected: SWITCH,
        set: |settings, value| {
            if switch(value)? {
                settings.needless.push(
                    "SYSBOX_ALLOW_TRUSTED_XATTR: trusted.* attributes stay the host's; an engine inside needs none, as an \
                     overlay in a user namespace has user.* ones",
                );
            }
            Ok(())
        },
    },
    Variable {
        name: "SYSBOX_DATA_ROOT",
        expected: "[layer|volume]",
        set: |settings, value| {
            settings.common.data_root_volumes = match value {
                "layer" => false,
                "volume" => true,
                _ => return Err(Fault::Value),
            };
            Ok(())
        },
    },
    Variable {
        name: "SYSBOX_HONOR_CAPS",
        expected: SWITCH,
        set: |settings, value| switch(value).map(|on| settings.common.honor_caps = on),
    },
    Variable {
        name: "SYSBOX_IGNORE_SYSFS_CHOWN",
        expected: SWITCH,
        set: |_, value| match switch(value)? {
            true => Err(Fault::Refused(
                "a chown on /sys is not intercepted and fails as the kernel says; hint: leave it out",
            )),
            false => Ok(()),
        },
    },
    Variable {
        name: "SYSBOX_SKIP_UID_SHIFT",
        expected: "a comma separated list of absolute paths, without spaces",
        set: |settings, value| {
            let path = |path: &str| {
                let fine = path.starts_with('/') && !path.contains(char::is_whitespace);
                fine.then(|| super::mounts::clean(Path::new(path))).ok_or(Fault::Value)
            };
            settings.unshifted = value.split(',').map(path).collect::<Result<_, _>>()?;
            Ok(())
        },
    },
    Variable {
        name: "SYSBOX_SYSCONT_MODE",
        expected: SWITCH,
        set: |settings, value| switch(value).map(|on| settings.common.syscont_mode = on),
    },
];

const PREFIX: &str = "SYSBOX_";

fn switch(value: &str) -> Result<bool, Fault> {
    match value {
        "TRUE" => Ok(true),
        "FALSE" => Ok(false),
        _ => Err(Fault::Value),
    }
}

fn known() -> String {
    VARIABLES.iter().map(|variable| variable.name).collect::<Vec<_>>().join(", ")
}

impl Settings {
    /// What the environment says over the defaults. Of two settings of one variable the last one counts, as in the
    /// environment itself.
    ///
    /// # Errors
    /// See [`SettingError`].
    pub fn read(env: &[String], common: Defaults) -> Result<Self, SettingError> {
        let base = Self { common, ..Self::default() };
        base.overridden(env)
    }

    /// For a later process of the container: its own environment may say otherwise, for itself. The variables are the
    /// runtime's, and not left in the program's environment.
    ///
    /// # Errors
    /// As [`Settings::read`].
    pub fn take_from(&self, env: &mut Vec<String>) -> Result<Self, SettingError> {
        let settings = self.clone().overridden(env)?;
        env.retain(|pair| !pair.starts_with(PREFIX));
        Ok(settings)
    }

    fn overridden(mut self, env: &[String]) -> Result<Self, SettingError> {
        for pair in env.iter().filter(|pair| pair.starts_with(PREFIX)) {
            let (name, value) = match pair.split_once('=') {
                Some((name, value)) if !value.contains('=') => (name, value),
                _ => return Err(SettingError::Format(pair.clone())),
            };
            let Some(variable) = VARIABLES.iter().find(|variable| variable.name == name) else {
                return Err(SettingError::Unknown { name: name.to_owned() });
            };
            let Variable { name, expected, set } = *variable;
            set(&mut self, value).map_err(|fault| match fault {
                Fault::Value => SettingError::Value { name, value: value.to_owned(), expected },
                Fault::Refused(why) => SettingError::Refused { name, why },
            })?;
        }
        Ok(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(env: &[&str]) -> Result<Settings, String> {
        let env: Vec<String> = env.iter().map(|pair| (*pair).to_owned()).collect();
        Settings::read(&env, Defaults::default()).map_err(|error| error.to_string())
    }

    #[test]
    fn variables_are_read_strictly() {
        for (pair, expected) in [
            ("SYSBOX_ENV=1", "invalid env var SYSBOX_ENV; must be one of SYSBOX_ALLOW_TRUSTED_XATTR, "),
            ("SYSBOX_=TRUE", "invalid env var SYSBOX_; must be one of "),
            ("SYSBOX_HONOR_CAPS", "env var SYSBOX_HONOR_CAPS has incorrect format; expected VAR=VALUE"),
            ("SYSBOX_HONOR_CAPS=TRUE=TRUE", "has incorrect format; expected VAR=VALUE"),
            ("SYSBOX_HONOR_CAPS=1", "env var SYSBOX_HONOR_CAPS has invalid value 1; expect [TRUE|FALSE]"),
            ("SYSBOX_HONOR_CAPS=true", "has invalid value true; expect [TRUE|FALSE]"),
            ("SYSBOX_DATA_ROOT=/srv", "has invalid value /srv; expect [layer|volume]"),
            ("SYSBOX_SYSCONT_MODE=", "has invalid value ; expect [TRUE|FALSE]"),
            ("SYSBOX_SKIP_UID_SHIFT=", "has invalid value ; expect a comma separated list"),
            ("SYSBOX_SKIP_UID_SHIFT=/a,b", "has invalid value /a,b; expect"),
            ("SYSBOX_SKIP_UID_SHIFT=/a, /b", "has invalid value /a, /b; expect"),
            ("SYSBOX_SKIP_UID_SHIFT=/a,", "has invalid value /a,; expect"),
            (
                "SYSBOX_IGNORE_SYSFS_CHOWN=TRUE",
                "SYSBOX_IGNORE_SYSFS_CHOWN: a chown on /sys is not intercepted",
            ),
        ] {
            let text = read(&[pair]).expect_err(pair);
            assert!(text.starts_with("/process/env: ") && text.contains(expected), "{pair}: {text}");
        }
    }

    #[test]
    fn variables_say_otherwise_than_the_manager() {
        let fine = read(&["PATH=/bin", "XSYSBOX_Y=1", "SYSBOX_IGNORE_SYSFS_CHOWN=FALSE"]).unwrap();
        assert_eq!(fine, Settings::default());
        let set = read(&[
            "SYSBOX_HONOR_CAPS=TRUE",
            "SYSBOX_SYSCONT_MODE=FALSE",
            "SYSBOX_SKIP_UID_SHIFT=/a/,/b/../c",
            "SYSBOX_HONOR_CAPS=FALSE",
            "SYSBOX_DATA_ROOT=volume",
        ]);
        let set = set.unwrap();
        assert_eq!((set.common.honor_caps, set.common.syscont_mode), (false, false));
        assert_eq!(set.unshifted, [PathBuf::from("/a"), PathBuf::from("/c")]);
        let all = Defaults { honor_caps: true, ..Defaults::default() };
        let own = Settings::read(&["SYSBOX_HONOR_CAPS=FALSE".to_owned()], all).unwrap();
        assert!(!own.common.honor_caps);
        assert_eq!(read(&["SYSBOX_ALLOW_TRUSTED_XATTR=TRUE"]).unwrap().needless.len(), 1);
    }

    #[test]
    fn a_later_process_does_not_see_them() {
        let mut env: Vec<String> =
            ["A=b", "SYSBOX_HONOR_CAPS=TRUE", "SYSBOX_SYSCONT_MODE=TRUE"].map(str::to_owned).to_vec();
        let settings = Settings::default().take_from(&mut env).unwrap();
        assert!(settings.common.honor_caps);
        assert_eq!(env, ["A=b"]);
        assert!(Settings::default().take_from(&mut vec!["SYSBOX_X=1".to_owned()]).is_err());
    }
}
