//! The last stage of a start, inside the container: from libcontainer's all-powerful root to the process that was asked
//! for. Runs in the container's namespaces, after the root was changed.
//!
//! What can be wrong is found out before `create` returns (`validate`); identity, capabilities and the filter come after
//! the start signal, so that nothing of ours runs under the container's filter but the exec itself.

use std::cell::OnceCell;
use std::collections::{HashMap, HashSet};
use std::ffi::{CStr, CString};
use std::fs::File;
use std::io::Read;
use std::os::fd::AsFd;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::rc::Rc;

use caps::{CapSet, Capability};
use libcontainer::workload::{Executor, ExecutorError, ExecutorSetEnvsError, ExecutorValidationError};
use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, AtFlags};
use nix::sys::stat::Mode;
use nix::unistd::{AccessFlags, Gid, Uid, faccessat, setfsgid, setfsuid, setgroups, setresgid, setresuid};
use oci_spec::runtime::{Hook, Spec};
use serde_json::Value;

use crate::filter::Filter;
use crate::hooks;
use crate::listener::Giver;
use crate::plan::Entry;
use crate::sink::Sink;

/// Majors of the slaves of pseudo-terminals (devices.txt of the kernel).
const PTY_SLAVES: std::ops::RangeInclusive<u32> = 136..=143;

/// Which of the two kinds of process this becomes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// The container's first: it finds the container as it was made, and finishes it.
    First,
    /// A later one, into a container that runs.
    Later,
}

/// Becomes the container's process.
#[derive(Debug, Clone)]
pub struct Init {
    pub entry: Entry,
    pub filter: Option<Filter>,
    /// Where the filter's listener goes, if it notifies.
    pub giver: Option<Giver>,
    pub role: Role,
    /// Name of the session keyring; `None` keeps the caller's.
    pub keyring: Option<String>,
    /// Where errors go: libcontainer passes on the outermost words alone.
    pub sink: Rc<Sink>,
    /// The startContainer hooks, and the state that they are told but for the pid.
    pub hooks: Vec<Hook>,
    pub told: Value,
    program: OnceCell<CString>,
    listen: OnceCell<Vec<String>>,
}

impl Init {
    pub fn new(
        entry: Entry,
        filter: Option<Filter>,
        giver: Option<Giver>,
        role: Role,
        keyring: Option<String>,
        sink: Rc<Sink>,
    ) -> Self {
        let (program, listen) = (OnceCell::new(), OnceCell::new());
        Self {
            entry,
            filter,
            giver,
            role,
            keyring,
            sink,
            hooks: Vec::new(),
            told: Value::Null,
            program,
            listen,
        }
    }

    fn prepare(&self) -> Result<(), String> {
        let entry = &self.entry;
        if self.role == Role::First {
            // libcontainer makes directories below /dev without a umask.
            for (path, mode) in [("/dev/.lxc", 0o700), ("/dev/net", 0o755)] {
                match std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)) {
                    Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                        return Err(format!("chmod({path}): {error}"));
                    }
                    _ => {}
                }
            }
            let made = std::fs::DirBuilder::new().recursive(true).mode(0o755).create(&entry.cwd);
            made.map_err(|error| format!("mkdir {}: {error}", entry.cwd.display()))?;
        }
        if let Some((columns, rows)) = entry.console_size {
            let sized = sysbox_sys::terminal::set_size(std::io::stdin().as_fd(), columns, rows);
            sized.map_err(|error| error.to_string())?;
        }
        own_terminal(entry.uid)?;
        if let Some(name) = &self.keyring {
            let joined = sysbox_sys::keyring::join_session(name).and_then(|keyring| match self.role {
                // So that later processes share it.
                Role::First => sysbox_sys::keyring::let_user_search(keyring),
                Role::Later => Ok(()),
            });
            match joined {
                // A kernel or a profile without keys: there is nothing to be found then.
                Ok(()) => {}
                Err(error) if matches!(error.errno, Errno::ENOSYS | Errno::EPERM) => {}
                Err(error) => return Err(error.to_string()),
            }
        }
        check_names(&entry.env)?;
        let groups: Vec<Gid> = entry.groups.iter().copied().map(Gid::from_raw).collect();
        setgroups(&groups).map_err(|errno| format!("setgroups: {}", errno.desc()))?;
        let path = self.as_user(|| {
            std::env::set_current_dir(&entry.cwd).map_err(|error| {
                let why = crate::bundle::reason(&error);
                format!("chdir to cwd (\"{}\") set in config.json failed: {why}", entry.cwd.display())
            })?;
            check_cwd()?;
            find_program(&entry.args[0], &entry.env)
        })?;
        let program = CString::new(path.into_os_string().into_encoded_bytes());
        let program = program.map_err(|_| "a NUL byte in the program's path".to_owned())?;
        self.program.set(program).map_err(|_| "validated twice".to_owned())
    }

    /// Looks at files with the eyes of the user to be: the file capabilities leave the effective set with fsuid 0 and come
    /// back with it (capabilities(7)).
    fn as_user<T>(&self, look: impl FnOnce() -> T) -> T {
        setfsgid(Gid::from_raw(self.entry.gid));
        setfsuid(Uid::from_raw(self.entry.uid));
        let seen = look();
        setfsuid(Uid::from_raw(0));
        setfsgid(Gid::from_raw(0));
        seen
    }

    fn become_entry(&self) -> Result<(), String> {
        let entry = &self.entry;
        // Before anything is given up: its thread ends with the exec.
        let handover = self.giver.as_ref().map(Giver::prepare).transpose()?;
        let said = |what: &'static str| move |errno: Errno| format!("{what}: {}", errno.desc());
        // Else as runc has it, for a later process too: an engine's shim may have none at all (containerd 2.4).
        nix::sys::stat::umask(Mode::from_bits_truncate(entry.umask.unwrap_or(0o022)));
        let capability = |error: caps::errors::CapsError| format!("set capabilities: {error}");
        for dropped in
            caps::read(None, CapSet::Bounding).map_err(capability)?.difference(&entry.capabilities.bounding)
        {
            caps::drop(None, CapSet::Bounding, *dropped).map_err(capability)?;
        }
        nix::sys::prctl::set_keepcaps(true).map_err(said("prctl(PR_SET_KEEPCAPS)"))?;
        let (uid, gid) = (Uid::from_raw(entry.uid), Gid::from_raw(entry.gid));
        setresgid(gid, gid, gid).map_err(said("setresgid"))?;
        setresuid(uid, uid, uid).map_err(said("setresuid"))?;
        if entry.no_new_privileges {
            nix::sys::prctl::set_no_new_privs().map_err(said("prctl(PR_SET_NO_NEW_PRIVS)"))?;
        }
        // All that is given up is given up before the filter is loaded, which then need not allow it. Root keeps what it
        // has. For another user loading takes CAP_SYS_ADMIN, unless nothing can be gained any more; that one goes with the
        // exec, as an exec by a user other than root grants what the program's file does (capabilities(7)) and no more.
        let needed = if self.filter.is_some() && !entry.no_new_privileges {
            HashSet::from([Capability::CAP_SYS_ADMIN])
        } else {
            HashSet::new()
        };
        let permitted = caps::read(None, CapSet::Permitted).map_err(capability)?;
        let within = |wanted: &HashSet<Capability>| -> HashSet<Capability> {
            permitted.iter().filter(|one| wanted.contains(one) || needed.contains(one)).copied().collect()
        };
        let (sets, held) = (&entry.capabilities, within(&entry.capabilities.permitted));
        caps::clear(None, CapSet::Ambient).map_err(capability)?;
        caps::set(None, CapSet::Effective, &within(&sets.effective)).map_err(capability)?;
        caps::set(None, CapSet::Permitted, &held).map_err(capability)?;
        let inherited = sets.inheritable.intersection(&held).copied().collect();
        caps::set(None, CapSet::Inheritable, &inherited).map_err(capability)?;
        let ambient = sets.ambient.intersection(&inherited).copied().collect();
        caps::set(None, CapSet::Ambient, &ambient).map_err(capability)?;
        match (&self.filter, handover) {
            (Some(filter), Some(handover)) => handover.load(filter),
            (Some(filter), None) => {
                sysbox_sys::seccomp::load(&filter.program, filter.flags).map_err(|error| error.to_string())
            }
            (None, _) => Ok(()),
        }
    }

    fn environment(&self) -> Vec<CString> {
        let mut all = self.entry.env.clone();
        all.extend(self.listen.get().into_iter().flatten().cloned());
        keep_last(&mut all);
        if !all.iter().any(|pair| pair.starts_with("HOME=") && pair.len() > "HOME=".len()) {
            all.retain(|pair| pair != "HOME=");
            all.push(format!("HOME={}", home_of(self.entry.uid)));
        }
        // The bundle was refused if one held a NUL byte.
        all.into_iter().filter_map(|pair| CString::new(pair).ok()).collect()
    }
}

impl Executor for Init {
    fn validate(&self, _spec: &Spec) -> Result<(), ExecutorValidationError> {
        self.prepare().map_err(|message| {
            self.sink.fail(&message);
            ExecutorValidationError::ArgValidationError(message)
        })?;
        if self.role == Role::First {
            // Init may wait for its start for days, with what it was forked with: logs, connections to the daemons,
            // directories of the host. The sockets that libcontainer still needs are those that stay.
            sysbox_sys::descriptors::close_what_exec_would();
        }
        Ok(())
    }

    fn setup_envs(&self, envs: HashMap<String, String>) -> Result<(), ExecutorSetEnvsError> {
        // Socket activation is the one thing in there that the spec does not say (sd_listen_fds(3)).
        let listen = envs
            .iter()
            .filter(|(key, _)| key.starts_with("LISTEN_"))
            .map(|(key, value)| format!("{key}={value}"));
        self.listen.set(listen.collect()).map_err(|_| ExecutorSetEnvsError::Other("set twice".to_owned()))
    }

    fn exec(&self, _spec: &Spec) -> Result<(), ExecutorError> {
        let failed = |message: String| {
            // The engine has had its answer; what is left is the container's own log.
            eprintln!("sysbox-runc: {message}");
            ExecutorError::Other(message)
        };
        if !self.hooks.is_empty() {
            let mut told = self.told.clone();
            told["pid"] = std::process::id().into();
            hooks::run("startContainer", &self.hooks, &told, Some(&self.entry.env))
                .map_err(|fault| failed(fault.to_string()))?;
        }
        // All is ready before the filter is loaded: it may not allow what that takes.
        let environment = self.environment();
        let program = self.program.get().ok_or_else(|| failed("not validated".to_owned()))?;
        let args: Vec<CString> =
            self.entry.args.iter().filter_map(|arg| CString::new(arg.as_str()).ok()).collect();
        let args: Vec<&CStr> = args.iter().map(CString::as_c_str).collect();
        let environment: Vec<&CStr> = environment.iter().map(CString::as_c_str).collect();
        // A filter may not allow it later, and the runtime has blocked those that it waits for.
        sysbox_sys::process::reset_signals().map_err(|error| failed(error.to_string()))?;
        self.become_entry().map_err(failed)?;
        let Err(errno) = nix::unistd::execve(program, &args, &environment);
        Err(failed(format!("exec {}: {}", program.to_string_lossy(), errno.desc().to_lowercase())))
    }
}

/// In runc's words.
fn check_names(env: &[String]) -> Result<(), String> {
    let why = env.iter().rev().find_map(|pair| match pair.find('=') {
        None => Some("missing '='"),
        Some(0) => Some("name cannot be empty"),
        Some(_) => None,
    });
    why.map_or(Ok(()), |why| Err(format!("invalid environment variable: {why}")))
}

/// Of variables with one name the last: an exec adds to what the container has, and getenv(3) takes the first.
fn keep_last(env: &mut Vec<String>) {
    let mut seen = HashSet::new();
    env.reverse();
    env.retain(|pair| seen.insert(pair.split('=').next().unwrap_or_default().to_owned()));
    env.reverse();
}

/// A working directory outside the root would be a way out (CVE-2024-21626): the kernel then has no path for it.
fn check_cwd() -> Result<(), String> {
    let cwd =
        nix::unistd::getcwd().map_err(|errno| format!("current working directory: {}", errno.desc()))?;
    if cwd.is_absolute() {
        Ok(())
    } else {
        Err("current working directory is outside of the container root".to_owned())
    }
}

/// Finds the program as runc does: by path if its name has a slash, else in PATH. The words are those that engines look
/// for (`executable file not found`: exit code 127; `permission denied`: 126).
fn find_program(name: &str, env: &[String]) -> Result<PathBuf, String> {
    let said = |why: String| format!("exec: {name:?}: {why}");
    if name.contains('/') {
        return check_program(Path::new(name)).map(|()| PathBuf::from(name)).map_err(|errno| match errno {
            Errno::EACCES => said("permission denied".to_owned()),
            Errno::EISDIR => said("is a directory: permission denied".to_owned()),
            other => said(format!("stat {name}: {}", other.desc().to_lowercase())),
        });
    }
    let path = env.iter().rev().find_map(|pair| pair.strip_prefix("PATH=")).unwrap_or_default();
    let mut denied = false;
    for dir in path.split(':') {
        let dir = if dir.is_empty() { "." } else { dir };
        let candidate = Path::new(dir).join(name);
        match check_program(&candidate) {
            Ok(()) => return Ok(candidate),
            Err(Errno::EACCES) => denied = true,
            Err(_) => {}
        }
    }
    if denied {
        Err(said("permission denied".to_owned()))
    } else {
        Err(said("executable file not found in $PATH".to_owned()))
    }
}

fn check_program(path: &Path) -> Result<(), Errno> {
    let facts =
        std::fs::metadata(path).map_err(|error| error.raw_os_error().map_or(Errno::EIO, Errno::from_raw))?;
    if facts.is_dir() {
        return Err(Errno::EISDIR);
    }
    // Root may "execute" by DAC override what has no execute bit at all; execve(2) then refuses.
    if facts.mode() & 0o111 == 0 {
        return Err(Errno::EACCES);
    }
    faccessat(AT_FDCWD, path, AccessFlags::X_OK, AtFlags::AT_EACCESS)
}

/// The home directory that the container's own /etc/passwd gives a user; `/` without an entry.
fn home_of(uid: u32) -> String {
    const MAX_PASSWD: u64 = 1024 * 1024;
    let mut text = Vec::new();
    // The container's: a FIFO in its place must not hold us.
    let opened =
        File::options().read(true).custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC).open("/etc/passwd");
    let regular = opened.and_then(|file| file.metadata().map(|facts| (file, facts.is_file())));
    let read = match regular {
        Ok((file, true)) => file.take(MAX_PASSWD).read_to_end(&mut text),
        _ => return "/".to_owned(),
    };
    if read.is_err() {
        return "/".to_owned();
    }
    // Names of people in it may be in any encoding.
    home_in(&String::from_utf8_lossy(&text), uid).unwrap_or_else(|| "/".to_owned())
}

fn home_in(passwd: &str, uid: u32) -> Option<String> {
    passwd.lines().find_map(|line| {
        let fields: Vec<&str> = line.split(':').collect();
        let matches = fields.get(2).is_some_and(|field| field.parse() == Ok(uid));
        fields.get(5).filter(|home| matches && !home.is_empty()).map(|home| (*home).to_owned())
    })
}

/// Gives the process its terminal, which root of the container made: only an owner may open /dev/pts/N again. The group is
/// what the devpts says. One from outside stays its owner's, over whom nobody inside has rights.
fn own_terminal(uid: u32) -> Result<(), String> {
    let give = |stream: std::os::fd::BorrowedFd<'_>| -> nix::Result<()> {
        let facts = nix::sys::stat::fstat(stream)?;
        let terminal = PTY_SLAVES.contains(&libc::major(facts.st_rdev));
        if facts.st_mode & libc::S_IFMT != libc::S_IFCHR || !terminal || facts.st_uid == uid {
            return Ok(());
        }
        match nix::unistd::fchown(stream, Some(Uid::from_raw(uid)), None) {
            Err(Errno::EINVAL | Errno::EPERM | Errno::EROFS) => Ok(()),
            done => done,
        }
    };
    let all = give(std::io::stdin().as_fd())
        .and_then(|()| give(std::io::stdout().as_fd()))
        .and_then(|()| give(std::io::stderr().as_fd()));
    all.map_err(|errno| format!("give the terminal to user {uid}: {}", errno.desc()))
}

/// Gives the container's process its standard streams when they are pipes: only an owner may open /dev/stdout again.
/// Devices and files of the host keep their owner.
///
/// # Errors
/// `fchown` failing for another reason than a stream that has no owner to change.
pub fn own_stdio(host_uid: u32, host_gid: u32) -> nix::Result<()> {
    own_stream(std::io::stdin(), host_uid, host_gid)?;
    own_stream(std::io::stdout(), host_uid, host_gid)?;
    own_stream(std::io::stderr(), host_uid, host_gid)
}

fn own_stream(stream: impl std::os::fd::AsFd, uid: u32, gid: u32) -> nix::Result<()> {
    let facts = nix::sys::stat::fstat(&stream)?;
    if facts.st_mode & libc::S_IFMT != libc::S_IFIFO {
        return Ok(());
    }
    match nix::unistd::fchown(&stream, Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid))) {
        Ok(()) | Err(Errno::EINVAL | Errno::EROFS) => Ok(()),
        Err(errno) => Err(errno),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_are_found_and_refused_in_words_that_engines_know() {
        let dir = tempfile::tempdir().unwrap();
        let file = |name: &str, mode: u32| {
            let path = dir.path().join(name);
            std::fs::write(&path, "").unwrap();
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
            path
        };
        let (good, plain) = (file("good", 0o755), file("plain", 0o644));
        let env = [format!("PATH=/nowhere:{}", dir.path().display())];
        assert_eq!(find_program("good", &env), Ok(good.clone()));
        assert_eq!(find_program(good.to_str().unwrap(), &[]), Ok(good));
        assert_eq!(
            find_program("gone", &env).unwrap_err(),
            "exec: \"gone\": executable file not found in $PATH"
        );
        assert_eq!(find_program("plain", &env).unwrap_err(), "exec: \"plain\": permission denied");
        let text = find_program(plain.to_str().unwrap(), &[]).unwrap_err();
        assert!(text.ends_with("permission denied"), "{text}");
        assert_eq!(
            find_program("/gone", &[]).unwrap_err(),
            "exec: \"/gone\": stat /gone: no such file or directory"
        );
        assert!(find_program("/usr", &[]).unwrap_err().ends_with("permission denied"));
    }

    #[test]
    fn of_variables_with_one_name_the_last_is_kept() {
        let texts = |all: &[&str]| all.iter().map(|text| (*text).to_owned()).collect::<Vec<_>>();
        let mut env = texts(&["A=1", "B=", "A=2=3", "AA=4", "B=5"]);
        assert_eq!(check_names(&env), Ok(()));
        keep_last(&mut env);
        assert_eq!(env, texts(&["A=2=3", "AA=4", "B=5"]));
        for (pair, why) in [("A", "missing '='"), ("", "missing '='"), ("=x", "name cannot be empty")] {
            let said = check_names(&texts(&["A=1", pair])).unwrap_err();
            assert_eq!(said, format!("invalid environment variable: {why}"));
        }
    }

    #[test]
    fn home_is_what_the_containers_passwd_says() {
        let passwd = "root:x:0:0:root:/root:/bin/sh\nbad line\nu:x:7:7::/home/u:/bin/sh\nn:x:8:8:::/bin/sh\n";
        assert_eq!(home_in(passwd, 0).as_deref(), Some("/root"));
        assert_eq!(home_in(passwd, 7).as_deref(), Some("/home/u"));
        assert_eq!(home_in(passwd, 8), None);
        assert_eq!(home_in(passwd, 9), None);
    }
}
