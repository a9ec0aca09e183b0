//! The door to libcontainer: its process layer makes the namespaces, the mounts inside and the waiting init
//! (docs/decisions/0004-libcontainer.md). Nothing else in this program knows libcontainer but `init.rs`, which runs in it.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::{Duration, Instant};

use libcgroups::common::CgroupConfig;
use libcontainer::config::YoukiConfig;
use libcontainer::container::{Container, ContainerStatus};
use libcontainer::notify_socket::{NotifyListener, NotifySocket};
use libcontainer::process::args::{ContainerArgs, ContainerType};
use libcontainer::process::container_main_process::container_main_process;
use libcontainer::syscall::syscall::SyscallType;
use libcontainer::user_ns::UserNamespaceConfig;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::wait::WaitPidFlag;
use nix::unistd::Pid;
use oci_spec::runtime::{LinuxNamespaceBuilder, LinuxNamespaceType, Spec};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use sysbox_ipc::mgr::Process;
use sysbox_sys::path::proc_path;
use sysbox_sys::process::Held;

use crate::cli::SPEC_VERSION;
use crate::hooks;
use crate::init::Init;
use crate::sink::Sink;
use crate::state::{Home, State};

/// Name of the socket that init waits on, in the container's state directory. It goes with the start signal.
pub const START_SOCKET: &str = "notify.sock";

/// Crosses from the child that runs libcontainer to the runtime, hence plain text.
#[derive(Debug, Serialize, Deserialize, thiserror::Error)]
pub enum LaunchError {
    /// What the container's own processes said.
    #[error("unable to start container process: {0}")]
    Inside(String),
    #[error("{attempt}: {why}")]
    Step { attempt: String, why: String },
    /// Somebody holds the process that is being made, and only those inside can.
    #[error(
        "{command}: not within {seconds} s: {what}; hint: look for a stopped, frozen or hanging process in {place}"
    )]
    TooLate { command: String, place: String, what: String, seconds: u64 },
    /// The cgroup could not be made or entered.
    #[error("{0}")]
    Cgroup(String),
    /// One that runs after the create.
    #[error("{0}")]
    Hook(String),
}

pub fn step(attempt: &str) -> impl FnOnce(&dyn std::fmt::Display) -> LaunchError {
    let attempt = attempt.to_owned();
    move |why| LaunchError::Step { attempt, why: why.to_string() }
}

/// libcontainer's errors keep what the kernel said for themselves.
fn with_cause(error: &dyn std::error::Error) -> String {
    error.source().map_or_else(|| error.to_string(), |cause| format!("{error}: {cause}"))
}

/// How long a process may take to be made that joins a pid namespace with others in it, as every exec does, and a create
/// that is given one. It is there before it is the program that was asked for, and from then on root of the container can
/// stop it, freeze it, or have it look at a file system that never answers. Another create has no such limit: nobody is
/// inside to do so, and hooks take their time.
const PATIENCE: Duration = Duration::from_secs(30);

/// Until when, and who says so.
#[derive(Debug, Clone, Copy)]
struct Deadline {
    at: Instant,
    command: &'static str,
    /// Where somebody may be who holds it up.
    place: &'static str,
}

impl Deadline {
    fn of(command: &'static str, place: &'static str) -> Self {
        Self { at: Instant::now() + PATIENCE, command, place }
    }

    fn missed(self, what: &str) -> LaunchError {
        LaunchError::TooLate {
            command: self.command.to_owned(),
            place: self.place.to_owned(),
            what: what.to_owned(),
            seconds: PATIENCE.as_secs(),
        }
    }
}

/// What a start needs besides the spec.
#[derive(Debug)]
pub struct Launch<'a> {
    pub id: &'a str,
    pub bundle: &'a Path,
    /// The container's state directory.
    pub dir: &'a Path,
    pub spec: Spec,
    pub rootfs: PathBuf,
    pub console_socket: Option<&'a Path>,
    pub preserve_fds: i32,
    pub no_pivot: bool,
    pub init: Init,
}

impl Launch<'_> {
    /// Makes the container's first process; it waits for [`start`]. `enter` prepares what libcontainer's processes inherit
    /// and says which cgroup they join, relative to the root of each hierarchy.
    ///
    /// # Errors
    /// What `enter`, libcontainer or the container's processes say.
    pub fn create(
        self,
        enter: impl FnOnce() -> Result<PathBuf, LaunchError>,
    ) -> Result<Process, LaunchError> {
        let socket = self.dir.join(START_SOCKET);
        let users = UserNamespaceConfig::new(&self.spec).map_err(|e| step("user namespace")(&e))?;
        // Hooks and libcontainer's own files want its forms of config and state.
        let config = YoukiConfig::from_spec(&self.spec, self.id).map_err(|e| step("configuration")(&e))?;
        config.save(self.dir).map_err(|e| step("save the configuration")(&with_cause(&e)))?;
        let listener = NotifyListener::new(&socket).map_err(|e| step("start socket")(&e))?;
        let console = self.console_socket.map(|path| console(self.dir, path)).transpose()?;
        let namespaces = self.spec.linux().as_ref().and_then(|linux| linux.namespaces().as_deref());
        let joins_pid = namespaces
            .unwrap_or_default()
            .iter()
            .any(|namespace| namespace.typ() == LinuxNamespaceType::Pid && namespace.path().is_some());
        let deadline =
            joins_pid.then(|| Deadline::of("create", "the container whose pid namespace is joined"));
        in_child(deadline, || self.run(ContainerType::InitContainer, enter()?, listener, console, users))
    }

    /// Makes a later process of a running container, releases it, and returns when its program runs.
    ///
    /// # Errors
    /// As [`Launch::create`].
    pub fn exec(
        self,
        enter: impl FnOnce() -> Result<PathBuf, LaunchError>,
        before_start: impl FnOnce(Process) -> Result<(), LaunchError>,
        after_start: impl FnOnce(Process) -> Result<(), LaunchError>,
    ) -> Result<Process, LaunchError> {
        let socket = self.dir.join(format!("exec-{}.sock", std::process::id()));
        let deadline = Deadline::of("exec", "the container");
        let made = self.exec_waiting(&socket, deadline, enter);
        let started = made.and_then(|(process, said, sink)| {
            let released = before_start(process).and_then(|()| {
                NotifySocket::new(&socket).notify_container_start().map_err(|e| step("start")(&e))?;
                after_start(process)?;
                // The pipe ends, empty, when the program's exec closes it.
                read_until(said, deadline)
            });
            match released {
                Ok(words) if words.is_empty() => Ok(process),
                Ok(words) => Err(LaunchError::Inside(sink.first_failure().unwrap_or(words))),
                Err(error) => {
                    end_children();
                    Err(error)
                }
            }
        });
        let _gone = std::fs::remove_file(&socket);
        started
    }

    fn exec_waiting(
        self,
        socket: &Path,
        deadline: Deadline,
        enter: impl FnOnce() -> Result<PathBuf, LaunchError>,
    ) -> Result<(Process, OwnedFd, Rc<Sink>), LaunchError> {
        let listener = NotifyListener::new(socket).map_err(|e| step("start socket")(&e))?;
        let console = self.console_socket.map(|path| console(self.dir, path)).transpose()?;
        let (reader, writer) =
            nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC).map_err(|e| step("pipe2")(&e))?;
        let sink = Rc::clone(&self.init.sink);
        // Its copy in the child is closed by number there; ours goes at the end of this function, so that the reader
        // sees the end.
        let kind = ContainerType::TenantContainer { exec_notify_fd: writer.as_raw_fd() };
        let process = in_child(Some(deadline), || self.run(kind, enter()?, listener, console, None))?;
        drop(writer);
        Ok((process, reader, sink))
    }

    fn run(
        self,
        kind: ContainerType,
        cgroup_path: PathBuf,
        listener: NotifyListener,
        console: Option<OwnedFd>,
        users: Option<UserNamespaceConfig>,
    ) -> Result<Process, LaunchError> {
        let sink = Rc::clone(&self.init.sink);
        let status = ContainerStatus::Creating;
        let mut container = Container::new(self.id, status, None, self.bundle, self.dir)
            .map_err(|e| step("container state")(&e))?;
        container.set_annotations(self.spec.annotations().clone());
        container.state.oci_version = SPEC_VERSION.to_owned();
        let (mut spec, mut init, mut dir) = (self.spec, self.init, Path::new("/"));
        if let Some(mut hooks) = spec.hooks().clone() {
            // As createContainer hooks see it; those of the runtime are told the host's.
            container.state.pid = has_own_pids(&spec).then_some(1);
            let annotations = spec.annotations().clone().unwrap_or_default();
            init.told = hooks::state(SPEC_VERSION, self.id, "created", None, self.bundle, &annotations);
            // Run by `init.rs`, which can tell why one failed.
            init.hooks = hooks.start_container().clone().unwrap_or_default();
            hooks.set_start_container(None);
            hooks::fit(&mut hooks);
            // runc runs them in the bundle. libcontainer's path library tries openat2(2) on the working directory when a
            // lookup fails, and takes EACCES to mean that the kernel has none: from an engine's bundle (0700) a container's
            // mounts then cost 12 ms. Hooks of the container's own namespaces can be in the bundle by inheritance alone.
            let inherited = hooks.create_container().as_ref().is_some_and(|hooks| !hooks.is_empty());
            let bundle = self.bundle.to_str();
            if let Some(bundle) = bundle {
                hooks::run_in(&mut hooks, bundle);
            }
            if inherited || bundle.is_none() {
                dir = self.bundle;
            }
            spec.set_hooks(Some(hooks));
        }
        let args = ContainerArgs {
            container_type: kind,
            syscall: SyscallType::default(),
            spec: Rc::new(spec),
            rootfs: self.rootfs,
            console_socket: console.as_ref().map(AsRawFd::as_raw_fd),
            notify_listener: listener,
            preserve_fds: self.preserve_fds,
            container: Some(container),
            user_ns_config: users,
            cgroup_config: CgroupConfig {
                cgroup_path,
                systemd_cgroup: false,
                container_name: self.id.to_owned(),
            },
            detached: true,
            executor: Box::new(init),
            no_pivot: self.no_pivot,
            stdin: None,
            stdout: None,
            stderr: None,
            // Its processes are to be the runtime's children, not those of the child that this runs in.
            as_sibling: true,
            pid_file: None,
        };
        std::env::set_current_dir(dir).map_err(|e| step(&format!("chdir {}", dir.display()))(&e))?;
        // Processes in namespaces that we join must not be able to look into us (CVE-2016-9962).
        nix::sys::prctl::set_dumpable(false).map_err(|e| step("prctl(PR_SET_DUMPABLE)")(&e))?;
        let during = if matches!(args.container_type, ContainerType::InitContainer) {
            "error during container init: "
        } else {
            ""
        };
        let pid = container_main_process(&args).map_err(|error| {
            let words = sink.first_failure().unwrap_or_else(|| error.to_string());
            LaunchError::Inside(format!("{during}{words}"))
        })?;
        sysbox_sys::process::identify(pid.as_raw()).map_err(|e| step("look at init")(&e))
    }
}

/// Runs libcontainer in a child of this process. It must be where its children are to be born (cgroups are inherited, and
/// libcontainer knows neither named nor hybrid hierarchies), and to go there and back again costs this process a grace
/// period of the kernel's each way, some 10 ms; a child just ends there.
///
/// The answer is read when the child has ended, not at the end of the pipe: the waiting init holds a copy of it.
fn in_child<T: Serialize + DeserializeOwned>(
    deadline: Option<Deadline>,
    work: impl FnOnce() -> Result<T, LaunchError>,
) -> Result<T, LaunchError> {
    let flags = nix::fcntl::OFlag::O_CLOEXEC | nix::fcntl::OFlag::O_NONBLOCK;
    let (reader, writer) = nix::unistd::pipe2(flags).map_err(|e| step("pipe2")(&e))?;
    let child = sysbox_sys::process::fork_for(|| {
        let answer = serde_json::to_vec(&work());
        let mut file = std::fs::File::from(writer);
        // A path or an error text: far below what a pipe holds.
        let told = answer.is_ok_and(|bytes| std::io::Write::write_all(&mut file, &bytes).is_ok());
        if told { 0 } else { 1 }
    });
    let child = child.map_err(|e| step("start a child")(&e))?;
    if let Some(deadline) = deadline {
        let held = sysbox_sys::process::identify(child.as_raw()).and_then(Held::open);
        let ended = held.and_then(|child| child.wait_until(deadline.at));
        if !ended.map_err(|e| step("wait for the child")(&e))? {
            end_children();
            return Err(deadline.missed("make the process"));
        }
    }
    // By pid: the container's processes are children of ours, too.
    nix::sys::wait::waitpid(child, None).map_err(|e| step("wait for the child")(&e))?;
    let mut answer = Vec::new();
    let mut file = std::fs::File::from(reader);
    // Ends with EAGAIN; what was read until then is in the buffer.
    let _ends = std::io::Read::read_to_end(&mut file, &mut answer);
    serde_json::from_slice::<Result<T, LaunchError>>(&answer).map_err(|e| step("hear from the child")(&e))?
}

/// Ends what was begun: whatever is a child of this process was made for the exec that is given up. One that a frozen
/// cgroup of version 1 holds ends when that is thawed; it is not waited for longer than that takes to be clear.
fn end_children() {
    let clear = Instant::now() + Duration::from_secs(2);
    // Twice: the first round may have met one that was about to make another.
    for _ in 0..2 {
        for child in sysbox_sys::process::children().unwrap_or_default() {
            let ended = Held::open(child).and_then(|held| {
                held.kill()?;
                held.wait_until(clear)
            });
            if ended.is_ok_and(|ended| ended) {
                // Else it would be init's to reap, and be seen inside until then.
                let reaped = nix::sys::wait::waitpid(Pid::from_raw(child.pid), Some(WaitPidFlag::WNOHANG));
                tracing::debug!(?reaped, "ended");
            } else {
                tracing::warn!(pid = child.pid, "it has not ended yet");
            }
        }
    }
}

/// Reads to the end of a pipe, or to the deadline.
fn read_until(pipe: OwnedFd, deadline: Deadline) -> Result<String, LaunchError> {
    let mut words = Vec::new();
    let mut file = std::fs::File::from(pipe);
    loop {
        let left = deadline.at.saturating_duration_since(Instant::now());
        let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
        match poll(&mut [PollFd::new(file.as_fd(), PollFlags::POLLIN)], timeout) {
            Ok(0) => return Err(deadline.missed("start the program")),
            Ok(_) => {}
            Err(Errno::EINTR) => continue,
            Err(errno) => return Err(step("wait for exec")(&errno.desc())),
        }
        let mut chunk = [0; 1024];
        match std::io::Read::read(&mut file, &mut chunk).map_err(|e| step("wait for exec")(&e))? {
            0 => return Ok(String::from_utf8_lossy(&words).into_owned()),
            length => words.extend_from_slice(&chunk[..length]),
        }
    }
}

/// Connects to the engine's console socket.
fn console(dir: &Path, socket: &Path) -> Result<OwnedFd, LaunchError> {
    let name = format!("console-{}", std::process::id());
    let connected =
        libcontainer::tty::setup_console_socket(dir, socket, &name).map_err(|e| step("console socket")(&e));
    // The link only shortens the path for the connect.
    let _gone = std::fs::remove_file(dir.join(name));
    connected
}

/// Lets the waiting init of a created container go on.
///
/// # Errors
/// The socket being gone: started already, or never created.
pub fn start(dir: &Path) -> Result<(), LaunchError> {
    let socket = dir.join(START_SOCKET);
    NotifySocket::new(&socket).notify_container_start().map_err(|e| step("start")(&e))?;
    std::fs::remove_file(&socket).map_err(|e| step("remove the start socket")(&e))
}

/// The two times at which hooks run outside of a create (OCI runtime specification, lifecycle).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HookTime {
    PostStart,
    PostStop,
}

/// Runs the container's hooks for this time.
///
/// # Errors
/// The first hook that failed.
pub fn run_hooks(home: &Home, state: &State, time: HookTime) -> Result<(), LaunchError> {
    // A container that was cut off in the making has no spec yet, and no hooks that could be due.
    let Ok(spec) = home.load_spec() else { return Ok(()) };
    let Some(hooks) = spec.hooks() else { return Ok(()) };
    let (due, name, status, pid) = match time {
        HookTime::PostStart => (hooks.poststart(), "poststart", "running", state.init.map(|init| init.pid)),
        HookTime::PostStop => (hooks.poststop(), "poststop", "stopped", None),
    };
    let Some(due) = due else { return Ok(()) };
    let (id, annotations) = (state.id.as_str(), &state.annotations);
    let told = hooks::state(&state.oci_version, id, status, pid, &state.bundle, annotations);
    if time == HookTime::PostStart {
        // runc is in the bundle then; a delete has no bundle to go to.
        std::env::set_current_dir(&state.bundle).map_err(|e| step("chdir to the bundle")(&e))?;
    }
    hooks::run(name, due, &told, None).map_err(|fault| LaunchError::Hook(fault.to_string()))
}

/// Whether the container has a pid namespace of its own, in which init is 1.
pub fn has_own_pids(spec: &Spec) -> bool {
    let namespaces =
        spec.linux().as_ref().and_then(|linux| linux.namespaces().as_deref()).unwrap_or_default();
    namespaces.iter().any(|ns| ns.typ() == LinuxNamespaceType::Pid && ns.path().is_none())
}

/// Init's namespaces, held by descriptor: whatever becomes of its pid meanwhile, no other process's are entered.
#[derive(Debug)]
pub struct Joined(Vec<(LinuxNamespaceType, OwnedFd)>);

impl Joined {
    /// Opens those of `init` that the container has of its own.
    ///
    /// # Errors
    /// Init being gone.
    pub fn open(init: &Held, spec: &Spec) -> sysbox_sys::Result<Self> {
        const FILES: &[(LinuxNamespaceType, &str)] = &[
            (LinuxNamespaceType::User, "user"),
            (LinuxNamespaceType::Ipc, "ipc"),
            (LinuxNamespaceType::Uts, "uts"),
            (LinuxNamespaceType::Network, "net"),
            (LinuxNamespaceType::Pid, "pid"),
            (LinuxNamespaceType::Mount, "mnt"),
            (LinuxNamespaceType::Cgroup, "cgroup"),
            (LinuxNamespaceType::Time, "time"),
        ];
        let had = spec.linux().as_ref().and_then(|linux| linux.namespaces().as_deref()).unwrap_or_default();
        let (types, names): (Vec<_>, Vec<_>) = FILES
            .iter()
            .copied()
            .filter(|(typ, _)| had.iter().any(|namespace| namespace.typ() == *typ))
            .unzip();
        Ok(Self(types.into_iter().zip(init.namespaces(&names)?).collect()))
    }

    /// libcontainer takes paths, and opens them in processes that it has cloned from this one. These name the descriptors
    /// that such a process has a copy of: `/proc/self` is whoever looks, also in another pid namespace, as long as this
    /// /proc is the host's, and the mount namespace is the last that is entered.
    fn paths(&self) -> impl Iterator<Item = (LinuxNamespaceType, PathBuf)> + '_ {
        self.0.iter().map(|(typ, fd)| (*typ, proc_path(fd.as_fd())))
    }
}

/// The spec for a later process: the namespaces of init, nothing to be made or limited, no hooks. `joined` must be open
/// until the process is made.
pub fn tenant_spec(mut spec: Spec, process: oci_spec::runtime::Process, joined: &Joined) -> Spec {
    if let Some(mut linux) = spec.linux().clone() {
        let namespace = |(typ, path)| {
            LinuxNamespaceBuilder::default()
                .typ(typ)
                .path(path)
                .build()
                .expect("type and path are all that a namespace has")
        };
        linux.set_namespaces(Some(joined.paths().map(namespace).collect()));
        linux.set_uid_mappings(None).set_gid_mappings(None).set_time_offsets(None).set_sysctl(None);
        linux.set_masked_paths(None).set_readonly_paths(None).set_devices(None);
        spec.set_linux(Some(linux));
    }
    spec.set_hooks(None).set_mounts(None).set_process(Some(process));
    spec
}
