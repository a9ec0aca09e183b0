//! `SCMP_ACT_NOTIFY`: the listener of a container's filter goes to the agent that the spec names (`listenerPath`).
//!
//! A filter is loaded at the very end, in the container, where the agent's socket cannot be reached; and once it is loaded,
//! each system call of that thread may wait for the agent, who has no listener yet. So a second thread of the same process,
//! which is not filtered, passes the listener out to the runtime that starts the process, and that one to the agent. The
//! filtered thread makes no system call until the exec, where the kernel ends the other thread.

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use nix::fcntl::{OFlag, open};
use nix::sys::stat::Mode;
use oci_spec::runtime::{LinuxSeccomp, LinuxSeccompAction};
use serde::{Deserialize, Serialize};
use serde_json::json;
use sysbox_sys::path::proc_path;
use sysbox_sys::socket::{receive_descriptor, send_descriptor};

use crate::filter::Filter;
use crate::state::State;

/// In the container's state directory, until the start.
const SOCKET: &str = "seccomp.sock";
/// The process is ours until it execs; it has nothing else to do.
const PATIENCE: Duration = Duration::from_secs(30);

#[derive(Debug, thiserror::Error)]
pub enum ListenerError {
    #[error("/linux/seccomp/listenerPath: is missing, and an action is `SCMP_ACT_NOTIFY`")]
    NoPath,
    #[error("/linux/seccomp/listenerPath: {} is not an absolute path", path.display())]
    Relative { path: PathBuf },
    /// As runc: the runtime's own calls would wait for an agent that is not there yet.
    #[error("/linux/seccomp/defaultAction: SCMP_ACT_NOTIFY cannot be used as default action")]
    Default,
    #[error("/linux/seccomp/listenerPath: connect to {}: {why}", path.display())]
    Connect { path: PathBuf, why: String },
    #[error("hand the seccomp listener to {}: {why}", path.display())]
    HandOn { path: PathBuf, why: String },
    #[error("socket for the seccomp listener: {0}")]
    Socket(String),
}

/// Who answers for the system calls.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Agent {
    pub path: PathBuf,
    pub metadata: String,
}

impl Agent {
    /// The agent of a profile that notifies.
    ///
    /// # Errors
    /// One that notifies and does not say whom, or of everything.
    pub fn of(profile: &LinuxSeccomp) -> Result<Option<Self>, ListenerError> {
        if profile.default_action() == LinuxSeccompAction::ScmpActNotify {
            return Err(ListenerError::Default);
        }
        let notifies = |action| action == LinuxSeccompAction::ScmpActNotify;
        if !profile.syscalls().iter().flatten().any(|rule| notifies(rule.action())) {
            return Ok(None);
        }
        let path = profile.listener_path().clone().ok_or(ListenerError::NoPath)?;
        if !path.is_absolute() {
            return Err(ListenerError::Relative { path });
        }
        Ok(Some(Self { path, metadata: profile.listener_metadata().clone().unwrap_or_default() }))
    }

    /// Connects, before the process is let go: an agent that is not there fails a start that can be repeated.
    fn connect(&self) -> Result<UnixStream, ListenerError> {
        // By descriptor: a socket's address holds 108 bytes, a path may be longer.
        let opened = open(&self.path, OFlag::O_PATH | OFlag::O_CLOEXEC, Mode::empty());
        opened
            .map_err(std::io::Error::from)
            .and_then(|socket| UnixStream::connect(proc_path(socket.as_fd())))
            .map_err(|error| ListenerError::Connect { path: self.path.clone(), why: error.to_string() })
    }
}

/// The end that the process to be filtered has.
#[derive(Debug, Clone)]
pub enum Giver {
    /// Of a container's first process: whoever starts it comes here.
    Listening(Arc<UnixListener>),
    /// Of a later one: its runtime waits at the other end.
    Connected(Arc<UnixStream>),
}

fn socket(error: &dyn std::fmt::Display) -> ListenerError {
    ListenerError::Socket(error.to_string())
}

/// By a descriptor of the directory, for the length of the path.
fn place(dir: &Path) -> Result<(OwnedFd, PathBuf), ListenerError> {
    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let dir = open(dir, flags, Mode::empty()).map_err(|error| socket(&error))?;
    let path = proc_path(dir.as_fd()).join(SOCKET);
    Ok((dir, path))
}

impl Giver {
    /// # Errors
    /// The socket cannot be made.
    pub fn listen(dir: &Path) -> Result<Self, ListenerError> {
        let (_dir, path) = place(dir)?;
        let bound = UnixListener::bind(path).map_err(|error| socket(&error))?;
        Ok(Self::Listening(Arc::new(bound)))
    }

    /// # Errors
    /// A pair of sockets cannot be made.
    pub fn pair() -> Result<(Self, UnixStream), ListenerError> {
        let (one, other) = UnixStream::pair().map_err(|error| socket(&error))?;
        Ok((Self::Connected(Arc::new(one)), other))
    }

    /// Starts the thread that passes the listener on as soon as there is one. To be called while nothing is filtered yet.
    ///
    /// # Errors
    /// Nobody there, or no thread.
    pub fn prepare(&self) -> Result<Handover, String> {
        let stream = match self {
            Self::Listening(listener) => listener.accept().map(|(stream, _)| stream),
            Self::Connected(stream) => stream.try_clone(),
        };
        let stream = stream.map_err(|error| format!("seccomp listener: {error}"))?;
        let handover = Handover::default();
        let theirs = handover.clone();
        let thread =
            std::thread::Builder::new().stack_size(128 * 1024).spawn(move || theirs.pass_on(&stream));
        thread.map_err(|error| format!("seccomp listener: {error}"))?;
        Ok(handover)
    }
}

/// Shared by the two threads, who say nothing to each other but this: a lock would be a system call.
#[derive(Debug, Clone, Default)]
pub struct Handover(Arc<(OnceLock<OwnedFd>, AtomicBool)>);

impl Handover {
    /// Loads the filter for this thread, and returns when the agent has the listener.
    ///
    /// # Errors
    /// The kernel refusing the filter.
    pub fn load(&self, filter: &Filter) -> Result<(), String> {
        let listener = sysbox_sys::seccomp::load_listening(&filter.program, filter.flags);
        let listener = listener.map_err(|error| error.to_string())?;
        // Not set before, as this is called once.
        drop(self.0.0.set(listener));
        while !self.0.1.load(Ordering::Acquire) {
            std::hint::spin_loop();
        }
        Ok(())
    }

    fn pass_on(&self, stream: &UnixStream) {
        let listener = loop {
            match self.0.0.get() {
                Some(listener) => break listener,
                None => std::thread::yield_now(),
            }
        };
        let passed = send_descriptor(stream.as_fd(), &[1], listener.as_fd())
            .map_err(|error| error.to_string())
            .and_then(|()| {
                let mut answer = [0];
                let read = std::io::Read::read_exact(&mut &*stream, &mut answer);
                read.map_err(|error| format!("the agent was not told: {error}"))
            });
        if let Err(why) = passed {
            // Here, as the other thread may not even be able to end.
            eprintln!("sysbox-runc: seccomp listener: {why}");
            std::process::exit(1);
        }
        self.0.1.store(true, Ordering::Release);
    }
}

/// The end that the starting runtime has, connected on both sides.
#[derive(Debug)]
pub struct Relay {
    agent: Agent,
    to_agent: UnixStream,
    from_process: UnixStream,
}

impl Relay {
    /// To the waiting init of a container, before it is let go.
    ///
    /// # Errors
    /// The agent not being there.
    pub fn to_init(agent: &Agent, dir: &Path) -> Result<Self, ListenerError> {
        let to_agent = agent.connect()?;
        let (_dir, path) = place(dir)?;
        let from_process = UnixStream::connect(path).map_err(|error| socket(&error))?;
        Ok(Self { agent: agent.clone(), to_agent, from_process })
    }

    /// To a later process, by the other end of its pair.
    ///
    /// # Errors
    /// As [`Relay::to_init`].
    pub fn to_later(agent: &Agent, from_process: UnixStream) -> Result<Self, ListenerError> {
        Ok(Self { to_agent: agent.connect()?, agent: agent.clone(), from_process })
    }

    /// Takes the listener from the process, which has been let go, and hands it on with the specification's
    /// ContainerProcessState.
    ///
    /// # Errors
    /// The process or the agent being gone.
    pub fn hand_on(mut self, state: &State, status: &str, pid: i32) -> Result<(), ListenerError> {
        let message = json!({
            "ociVersion": state.oci_version,
            "fds": ["seccompFd"],
            "pid": pid,
            "metadata": self.agent.metadata,
            "state": {
                "ociVersion": state.oci_version,
                "id": state.id.as_str(),
                "status": status,
                "pid": state.init.map_or(pid, |init| init.pid),
                "bundle": state.bundle,
                "annotations": state.annotations,
            },
        });
        let path = self.agent.path.clone();
        let failed =
            |why: &dyn std::fmt::Display| ListenerError::HandOn { path: path.clone(), why: why.to_string() };
        self.from_process.set_read_timeout(Some(PATIENCE)).map_err(|error| failed(&error))?;
        let listener = receive_descriptor(self.from_process.as_fd()).map_err(|error| failed(&error))?;
        let text = message.to_string();
        send_descriptor(self.to_agent.as_fd(), text.as_bytes(), listener.as_fd())
            .map_err(|error| failed(&error))?;
        std::io::Write::write_all(&mut self.from_process, &[1]).map_err(|error| failed(&error))
    }
}

/// The socket goes with the start signal.
pub fn forget(dir: &Path) {
    if let Err(error) = std::fs::remove_file(dir.join(SOCKET)) {
        tracing::debug!(%error, "remove the seccomp listener's socket");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn agent(profile: serde_json::Value) -> Result<Option<Agent>, String> {
        Agent::of(&serde_json::from_value(profile).unwrap()).map_err(|error| error.to_string())
    }

    #[test]
    fn an_agent_is_known_by_its_path() {
        let rules = json!([{"names": ["mkdir"], "action": "SCMP_ACT_NOTIFY"}]);
        let profile = json!({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": rules});
        assert!(agent(profile.clone()).unwrap_err().starts_with("/linux/seccomp/listenerPath: is missing"));
        let mut relative = profile.clone();
        relative["listenerPath"] = json!("a.sock");
        assert!(agent(relative).unwrap_err().contains("is not an absolute path"));
        let mut fine = profile;
        fine["listenerPath"] = json!("/a.sock");
        fine["listenerMetadata"] = json!("m");
        assert_eq!(agent(fine).unwrap(), Some(Agent { path: "/a.sock".into(), metadata: "m".to_owned() }));
        assert_eq!(
            agent(json!({"defaultAction": "SCMP_ACT_ALLOW", "listenerPath": "/a.sock"})).unwrap(),
            None
        );
        let all = json!({"defaultAction": "SCMP_ACT_NOTIFY", "listenerPath": "/a.sock"});
        assert!(agent(all).unwrap_err().contains("cannot be used as default action"));
    }
}
