//! A manager of a test's own, a peer that talks to it, and processes to be registered.

use std::collections::BTreeMap;
use std::os::unix::net::UnixDatagram;
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use sysbox_ipc::mgr::{Grant, Process, Record, Register, Reply, Request, Rootfs, SOCKET};
use sysbox_ipc::{ContainerId, ContainerKey, Hello, PROTOCOL_VERSION, Refusal};
use sysbox_sys::process::identify;
use sysbox_sys::socket::Connection;

/// Of the managers of these tests: not the host's own, which may have containers.
pub(crate) const POOL: u32 = 0x9000_0000;
pub(crate) const LIMIT: Duration = Duration::from_secs(20);

/// A place for one manager, and the manager in it.
pub(crate) struct Bed {
    pub(crate) dir: tempfile::TempDir,
    pub(crate) daemon: Option<Child>,
    pub(crate) range: String,
}

impl Bed {
    pub(crate) fn new() -> Self {
        Self::with_range(POOL, 1 << 28)
    }

    pub(crate) fn with_range(start: u32, count: u32) -> Self {
        assert!(nix::unistd::geteuid().is_root(), "needs root");
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("etc")).unwrap();
        let mut bed = Self { dir, daemon: None, range: format!("{start}:{count}") };
        bed.start();
        bed
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub(crate) fn command(&self) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_sysbox-mgr"));
        for (flag, name) in
            [("--data-root", "data"), ("--run-dir", "run"), ("--subid-files", "etc"), ("--log", "log")]
        {
            command.arg(flag).arg(self.path(name));
        }
        command.args(["--subid-range", &self.range]);
        command
    }

    /// Starts the daemon and waits until it says that it is ready.
    pub(crate) fn start(&mut self) {
        let notify = self.path("notify");
        drop(std::fs::remove_file(&notify));
        let socket = UnixDatagram::bind(&notify).unwrap();
        socket.set_read_timeout(Some(LIMIT)).unwrap();
        self.daemon = Some(self.command().env("NOTIFY_SOCKET", &notify).spawn().unwrap());
        let mut text = [0; 64];
        let length =
            socket.recv(&mut text).unwrap_or_else(|error| panic!("no READY: {error}\n{}", self.log()));
        assert_eq!(&text[..length], b"READY=1");
    }

    pub(crate) fn stop(&mut self, signal: Signal) -> std::process::ExitStatus {
        let mut daemon = self.daemon.take().unwrap();
        kill(Pid::from_raw(i32::try_from(daemon.id()).unwrap()), signal).unwrap();
        daemon.wait().unwrap()
    }

    pub(crate) fn restart(&mut self, signal: Signal) {
        self.stop(signal);
        self.start();
    }

    pub(crate) fn log(&self) -> String {
        std::fs::read_to_string(self.path("log")).unwrap_or_default()
    }

    pub(crate) fn raw(&self) -> Connection {
        let connection = Connection::connect(&self.path("run").join(SOCKET)).unwrap();
        connection.set_timeout(LIMIT).unwrap();
        connection
    }

    pub(crate) fn client(&self) -> Client {
        let client = Client(self.raw());
        let hello = client.ask(&Request::Hello(Hello::from_program("test")));
        assert!(matches!(hello, Reply::Hello(Hello { version: PROTOCOL_VERSION, .. })));
        client
    }

    pub(crate) fn records(&self) -> BTreeMap<String, Record> {
        self.client().records()
    }

    /// Waits for what happens by itself.
    pub(crate) fn until(&self, what: &str, reached: impl Fn(&BTreeMap<String, Record>) -> bool) {
        let deadline = Instant::now() + LIMIT;
        while !reached(&self.records()) {
            assert!(
                Instant::now() < deadline,
                "{what}: not within {LIMIT:?}\n{:#?}\n{}",
                self.records(),
                self.log()
            );
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    pub(crate) fn request(&self, id: &str, runtime: &Life, rootfs: Rootfs) -> Register {
        let root = self.path("state");
        Register {
            key: ContainerKey::new(&root, ContainerId::parse(id).unwrap()),
            bundle: self.path("bundle"),
            runtime: runtime.process,
            rootfs,
            id_map: None,
            netns: None,
            users: None,
            claims: vec![],
        }
    }

    /// The rootfs of an engine, and its writable layer on the disk.
    pub(crate) fn overlay(&self, id: &str) -> Rootfs {
        let layer = self.path("overlay2").join(id);
        std::fs::create_dir_all(layer.join("diff")).unwrap();
        Rootfs::Overlay { merged: layer.join("merged"), upper: layer.join("diff") }
    }

    pub(crate) fn directory(&self) -> Rootfs {
        Rootfs::Directory { path: self.path("rootfs") }
    }

    pub(crate) fn key(&self, id: &str) -> ContainerKey {
        ContainerKey::new(&self.path("state"), ContainerId::parse(id).unwrap())
    }
}

impl Drop for Bed {
    fn drop(&mut self) {
        if let Some(mut daemon) = self.daemon.take() {
            daemon.kill().unwrap();
            daemon.wait().unwrap();
        }
    }
}

pub(crate) struct Client(pub(crate) Connection);

impl Client {
    pub(crate) fn ask(&self, request: &Request) -> Reply {
        self.0.call(request, &[]).unwrap().0
    }

    pub(crate) fn register(&self, request: &Register) -> Result<Grant, Refusal> {
        match self.ask(&Request::Register(Box::new(request.clone()))) {
            Reply::Granted(grant) => Ok(*grant),
            Reply::Refused(refusal) => Err(refusal),
            other => panic!("{other:?}"),
        }
    }

    pub(crate) fn started(&self, key: &ContainerKey, init: &Life) {
        assert_eq!(self.ask(&Request::Started { key: key.clone(), init: init.process }), Reply::Done);
    }

    pub(crate) fn release(&self, key: &ContainerKey) {
        assert_eq!(self.ask(&Request::Release { key: key.clone() }), Reply::Done);
    }

    pub(crate) fn records(&self) -> BTreeMap<String, Record> {
        let (mut all, mut after) = (BTreeMap::new(), None);
        loop {
            let Reply::Records { records, more } = self.ask(&Request::Records { after }) else {
                panic!("no records")
            };
            after = records.last().map(|record| record.key.clone());
            all.extend(records.into_iter().map(|record| (record.key.id.to_string(), record)));
            if !more {
                return all;
            }
        }
    }
}

/// A process that stands for a runtime or a container's init.
pub(crate) struct Life {
    pub(crate) child: Child,
    pub(crate) process: Process,
}

impl Life {
    pub(crate) fn begin() -> Self {
        let child = Command::new("sleep").arg("1000").stdin(Stdio::null()).spawn().unwrap();
        let process = identify(i32::try_from(child.id()).unwrap()).unwrap();
        Self { child, process }
    }

    pub(crate) fn end(mut self) {
        self.finish();
    }

    pub(crate) fn finish(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Life {
    fn drop(&mut self) {
        self.finish();
    }
}

pub(crate) fn refused(output: &Output) -> String {
    assert_eq!(output.status.code(), Some(1));
    String::from_utf8(output.stderr.clone()).unwrap()
}
