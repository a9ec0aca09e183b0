//! A sysbox-fs of the test's own: the real binary, in a private mount namespace, with a stand-in for sysbox-mgr that speaks
//! the real protocol. Readers are processes of their own: a thread of ours that waits in the FUSE file system could not be
//! ended, and this process holds the vault that keeps it waiting.

use std::collections::HashMap;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use nix::mount::{MntFlags, MsFlags};
use nix::sched::CloneFlags;
use sysbox_ipc::fs::{self, Prepared};
use sysbox_ipc::mgr::{self, Phase, Process, Record, Rootfs};
use sysbox_ipc::{ContainerId, ContainerKey, Hello, IdMap, IdRange, Refusal, RefusalKind};
use sysbox_sys::socket::{Connection, Listener};

pub(crate) const DEADLINE: Duration = Duration::from_secs(20);

/// Panics with the need that is missing.
pub(crate) fn require_root_and_fuse() {
    assert!(nix::unistd::geteuid().is_root(), "this test needs root");
    assert!(Path::new("/dev/fuse").exists(), "this test needs /dev/fuse");
}

pub(crate) fn key(id: &str) -> ContainerKey {
    ContainerKey::new(Path::new("/run/test"), ContainerId::parse(id).unwrap())
}

/// What the stand-in for sysbox-mgr keeps.
#[derive(Debug, Default)]
pub(crate) struct Vault {
    pub(crate) fds: HashMap<String, OwnedFd>,
    pub(crate) records: Vec<Record>,
    pub(crate) puts: usize,
}

/// A manager that can be stopped and started.
pub(crate) struct Manager {
    pub(crate) vault: Arc<Mutex<Vault>>,
    stop: Arc<AtomicBool>,
    socket: PathBuf,
}

impl Manager {
    pub(crate) fn start(run_dir: &Path, vault: Arc<Mutex<Vault>>) -> Self {
        let socket = run_dir.join(mgr::SOCKET);
        let listener = Listener::bind(&socket).unwrap();
        let stop = Arc::new(AtomicBool::new(false));
        let (state, stopped) = (Arc::clone(&vault), Arc::clone(&stop));
        std::thread::spawn(move || {
            loop {
                let peer = listener.accept().unwrap();
                if stopped.load(Ordering::SeqCst) {
                    return;
                }
                let (state, stopped) = (Arc::clone(&state), Arc::clone(&stopped));
                peer.set_timeout(Duration::from_millis(50)).unwrap();
                std::thread::spawn(move || serve(&peer, &state, &stopped));
            }
        });
        Self { vault, stop, socket }
    }

    /// As if it was killed: the connections end, the vault is empty afterwards.
    pub(crate) fn kill(self) {
        self.stop.store(true, Ordering::SeqCst);
        // Wakes the accepting thread.
        drop(Connection::connect(&self.socket));
        std::fs::remove_file(&self.socket).unwrap();
        self.vault.lock().unwrap().fds.clear();
    }
}

fn serve(peer: &Connection, state: &Mutex<Vault>, stopped: &AtomicBool) {
    use mgr::{Reply, Request};
    loop {
        if stopped.load(Ordering::SeqCst) {
            return;
        }
        let (request, fds) = match peer.recv::<Request>() {
            Ok(Some(got)) => got,
            Ok(None) => return,
            Err(sysbox_sys::socket::SocketError::TimedOut(_)) => continue,
            Err(_) => return,
        };
        let mut vault = state.lock().unwrap();
        let none: &[std::os::fd::BorrowedFd<'_>] = &[];
        match request {
            Request::Hello(_) => peer.send(&Reply::Hello(Hello::from_program("sysbox-mgr")), none),
            Request::VaultPut { name } => {
                vault.puts += 1;
                vault.fds.insert(name, fds.into_iter().next().expect("a descriptor comes with vault_put"));
                peer.send(&Reply::Done, none)
            }
            Request::VaultGet { name } => match vault.fds.get(&name) {
                Some(fd) => peer.send(&Reply::Descriptor, &[fd.as_fd()]),
                None => peer
                    .send(&Reply::Refused(Refusal::new(RefusalKind::NotFound, "no such descriptor")), none),
            },
            Request::VaultDrop { name } => {
                vault.fds.remove(&name);
                peer.send(&Reply::Done, none)
            }
            // A page holds two, so that paging is seen to work.
            Request::Records { after } => {
                let rest: Vec<_> = vault
                    .records
                    .iter()
                    .filter(|r| after.as_ref().is_none_or(|after| r.key > *after))
                    .cloned()
                    .collect();
                let more = rest.len() > 2;
                peer.send(&Reply::Records { records: rest.into_iter().take(2).collect(), more }, none)
            }
            other => panic!("sysbox-fs has no business asking {other:?}"),
        }
        .unwrap();
    }
}

pub(crate) fn record(id: &str, slot: u32, init: Process) -> Record {
    Record {
        version: 1,
        key: key(id),
        slot,
        id_map: IdMap::of_range(IdRange { start: 200_000, count: 65536 }).unwrap(),
        allocated: true,
        bundle: PathBuf::from("/bundle"),
        rootfs: Rootfs::Directory { path: PathBuf::from("/rootfs") },
        layers: None,
        netns: None,
        users: None,
        claims: Vec::new(),
        phase: Phase::Running { init },
    }
}

/// A directory, a mount namespace, a manager, and at times a daemon. What it started and mounted ends with it.
pub(crate) struct Bed {
    pub(crate) dir: tempfile::TempDir,
    pub(crate) manager: Option<Manager>,
    pub(crate) daemon: Option<Child>,
    pub(crate) readers: Vec<Child>,
}

impl Bed {
    /// The calling thread gets a mount namespace of its own; so have the processes it starts.
    pub(crate) fn new() -> Self {
        require_root_and_fuse();
        nix::sched::unshare(CloneFlags::CLONE_NEWNS).unwrap();
        let none: Option<&str> = None;
        nix::mount::mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let mut bed = Self { dir, manager: None, daemon: None, readers: Vec::new() };
        bed.manager = Some(Manager::start(bed.path(), Arc::default()));
        bed
    }

    pub(crate) fn path(&self) -> &Path {
        self.dir.path()
    }

    pub(crate) fn mountpoint(&self) -> PathBuf {
        self.path().join("mnt")
    }

    pub(crate) fn vault(&self) -> Arc<Mutex<Vault>> {
        Arc::clone(&self.manager.as_ref().unwrap().vault)
    }

    pub(crate) fn log(&self) -> String {
        std::fs::read_to_string(self.path().join("log")).unwrap_or_default()
    }

    pub(crate) fn command(&self) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_sysbox-fs"));
        command.arg("--mountpoint").arg(self.mountpoint()).arg("--run-dir").arg(self.path());
        command.args(["--log-level", "debug", "--log"]).arg(self.path().join("log")).stdin(Stdio::null());
        command
    }

    /// Starts the daemon and waits until it says that it is ready, as systemd would.
    pub(crate) fn start(&mut self) {
        let socket = self.path().join("notify");
        drop(std::fs::remove_file(&socket));
        let ready = std::os::unix::net::UnixDatagram::bind(&socket).unwrap();
        ready.set_read_timeout(Some(DEADLINE)).unwrap();
        self.daemon = Some(self.command().env("NOTIFY_SOCKET", &socket).spawn().unwrap());
        let mut buffer = [0; 64];
        let length =
            ready.recv(&mut buffer).unwrap_or_else(|error| panic!("not ready: {error}\n{}", self.log()));
        assert_eq!(&buffer[..length], b"READY=1");
    }

    pub(crate) fn kill(&mut self) {
        let mut daemon = self.daemon.take().unwrap();
        daemon.kill().unwrap();
        daemon.wait().unwrap();
    }

    /// SIGTERM; answers whether it ended well.
    pub(crate) fn terminate(&mut self) -> bool {
        let mut daemon = self.daemon.take().unwrap();
        let pid = nix::unistd::Pid::from_raw(daemon.id().try_into().unwrap());
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).unwrap();
        let status = wait(&mut daemon).unwrap_or_else(|| panic!("does not stop\n{}", self.log()));
        status.success()
    }

    pub(crate) fn call(&self, request: &fs::Request) -> fs::Reply {
        let connection = Connection::connect(&self.path().join(fs::SOCKET)).unwrap();
        connection.set_timeout(DEADLINE).unwrap();
        let hello = fs::Request::Hello(Hello::from_program("sysbox-runc"));
        let (reply, _) = connection.call::<_, fs::Reply>(&hello, &[]).unwrap();
        assert!(matches!(reply, fs::Reply::Hello(_)), "{reply:?}");
        connection.call(request, &[]).unwrap().0
    }

    /// The container's directory.
    pub(crate) fn prepare(&self, id: &str, slot: u32) -> PathBuf {
        let request = fs::Request::Prepare { key: key(id), slot, root_uid: 200_000, root_gid: 200_000 };
        match self.call(&request) {
            fs::Reply::Prepared(Prepared { directory, leaves }) => {
                assert_eq!(leaves, ["proc/meminfo", "proc/swaps"]);
                directory
            }
            other => panic!("{other:?}"),
        }
    }

    /// A shell script that reads our files; `$F` is one of them.
    pub(crate) fn shell(&mut self, file: &Path, script: &str) -> usize {
        let child = Command::new("sh")
            .args(["-c", script])
            .env("F", file)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        self.readers.push(child);
        self.readers.len() - 1
    }

    /// What the script printed, once it has ended well.
    pub(crate) fn output(&mut self, reader: usize) -> String {
        use std::io::Read;
        let child = &mut self.readers[reader];
        drop(child.stdin.take());
        let status = wait(child);
        let (mut text, mut errors) = (String::new(), String::new());
        if status.is_some() {
            child.stdout.take().unwrap().read_to_string(&mut text).unwrap();
            child.stderr.take().unwrap().read_to_string(&mut errors).unwrap();
        }
        assert!(status.is_some_and(|status| status.success()), "{status:?} {text} {errors}\n{}", self.log());
        text
    }

    pub(crate) fn run(&mut self, file: &Path, script: &str) -> String {
        let reader = self.shell(file, script);
        self.output(reader)
    }
}

/// Waits with a deadline.
pub(crate) fn wait(child: &mut Child) -> Option<std::process::ExitStatus> {
    let begun = Instant::now();
    while begun.elapsed() < DEADLINE {
        if let Some(status) = child.try_wait().unwrap() {
            return Some(status);
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    None
}

impl Drop for Bed {
    fn drop(&mut self) {
        // The connection ends first, so that nobody can be left waiting in it; then everything else can.
        if let Some(manager) = self.manager.take() {
            manager.kill();
        }
        if let Some(mut daemon) = self.daemon.take() {
            drop(daemon.kill());
            drop(daemon.wait());
        }
        for reader in &mut self.readers {
            drop(reader.kill());
            drop(reader.wait());
        }
        while nix::mount::umount2(&self.mountpoint(), MntFlags::MNT_DETACH).is_ok() {}
    }
}
