//! `exec --cgroup`: cgroups below the container's own that a later process is put in.

use std::path::{Component, Path, PathBuf};

use nix::unistd::Pid;

use crate::cgroup::{Cgroup, Hierarchy};

#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum Fault {
    #[error("invalid --cgroup argument: {0} (empty <controller> prefix)")]
    NoController(String),
    #[error("invalid --cgroup argument: {0} (missing <controller>: prefix)")]
    NoPrefix(String),
    #[error("invalid --cgroup argument(s): controller {0} specified multiple times")]
    Twice(String),
    #[error("unable to create new parent process: {0} is not a sub cgroup path")]
    Outside(String),
    #[error("unable to create new parent process: unknown controller {0} in SubCgroupPaths")]
    Unknown(String),
    #[error("join {}: {why}", file.display())]
    Join { file: PathBuf, why: String },
}

/// By controller; the empty one is the unified hierarchy.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct SubCgroups(Vec<(String, PathBuf)>);

impl SubCgroups {
    /// Reads `[controller[,controller…]:]path` arguments.
    ///
    /// # Errors
    /// What is none, and a path that leads out of the container's own cgroup.
    pub fn parse(args: &[String]) -> Result<Self, Fault> {
        let mut all: Vec<(String, PathBuf)> = Vec::new();
        for arg in args {
            let (controllers, path) = match arg.split_once(':') {
                Some((controllers, path)) => (controllers.split(',').collect(), path),
                None if args.len() > 1 => return Err(Fault::NoPrefix(arg.clone())),
                None => (vec![""], arg.as_str()),
            };
            // Control groups have no links: what has no `..` in it stays below.
            let below = Path::new(path).components().all(|part| part != Component::ParentDir);
            for controller in controllers {
                if controller.is_empty() && arg.contains(':') {
                    return Err(Fault::NoController(arg.clone()));
                }
                if all.iter().any(|(known, _)| known == controller) {
                    return Err(Fault::Twice(controller.to_owned()));
                }
                if !below {
                    return Err(Fault::Outside(path.to_owned()));
                }
                all.push((controller.to_owned(), path.trim_start_matches('/').into()));
            }
        }
        Ok(Self(all))
    }

    /// Puts a process of the container there.
    ///
    /// # Errors
    /// A controller that has no hierarchy, a cgroup that is not there, or the kernel refusing.
    pub fn join(&self, cgroup: &Cgroup, pid: Pid) -> Result<(), Fault> {
        for (controller, path) in &self.0 {
            let serves = |hierarchy: &&Hierarchy| match controller.as_str() {
                "" => hierarchy.name.is_empty(),
                controller => hierarchy.has(controller),
            };
            let Some(hierarchy) = cgroup.hierarchies.iter().find(serves) else {
                return Err(Fault::Unknown(controller.clone()));
            };
            let own = cgroup.delegated();
            let file =
                hierarchy.mount.join(own.strip_prefix("/").unwrap_or(&own)).join(path).join("cgroup.procs");
            let joined = std::fs::write(&file, pid.to_string());
            joined.map_err(|error| Fault::Join { file, why: crate::bundle::reason(&error) })?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments_name_controllers_and_a_path_below() {
        let parse =
            |args: &[&str]| SubCgroups::parse(&args.iter().map(|a| (*a).to_owned()).collect::<Vec<_>>());
        let one = |name: &str, path: &str| (name.to_owned(), PathBuf::from(path));
        assert_eq!(parse(&["/a/b"]), Ok(SubCgroups(vec![one("", "a/b")])));
        assert_eq!(parse(&["cpu,pids:x"]), Ok(SubCgroups(vec![one("cpu", "x"), one("pids", "x")])));
        assert_eq!(parse(&[":x"]), Err(Fault::NoController(":x".to_owned())));
        assert_eq!(parse(&["x", "cpu:y"]), Err(Fault::NoPrefix("x".to_owned())));
        assert_eq!(parse(&["cpu:x", "cpu:y"]), Err(Fault::Twice("cpu".to_owned())));
        assert_eq!(parse(&["cpu:../x"]), Err(Fault::Outside("../x".to_owned())));
    }
}
