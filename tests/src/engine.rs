//! The door to the engine of a bed (tests/bed): its `docker`, containers of ours that go when the test ends, and waiting
//! for an event with a deadline. Owns no expectation; every call here either gives a value or fails the test with what
//! was run and what it said.

use std::ffi::{OsStr, OsString};
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use serde_json::Value;
use sysbox_ipc::mgr::Record;

/// Longer than anything takes here; a test that waits this long has failed.
const DEADLINE: Duration = Duration::from_secs(90);

pub const RUNTIME: &str = "sysbox-runc";
pub const BUSYBOX: &str = "sysbox/busybox";
pub const DEBIAN: &str = "sysbox/debian:bookworm";
/// In [`DEBIAN`]: a root file system for the inner engine, which has no registry either.
pub const INNER_IMAGE: &str = "/usr/share/sysbox/busybox.tar";

/// Where the bed has what.
#[derive(Debug)]
pub struct Bed {
    pub name: String,
    pub socket: PathBuf,
    /// The manager's.
    pub data_root: PathBuf,
    /// Where sysbox-fs has a directory for each container.
    pub mountpoint: PathBuf,
}

/// The bed that this test was started in. Without one the test fails, and says what it needs.
pub fn bed() -> &'static Bed {
    static BED: OnceLock<Bed> = OnceLock::new();
    BED.get_or_init(|| {
        let need = |name: &str| {
            std::env::var(name).unwrap_or_else(|_| {
                panic!(
                    "{name} is not set: needs the engine of a bed (SYSBOX_BED_ENV); run through `make test`"
                )
            })
        };
        let host = need("DOCKER_HOST");
        let socket = host
            .strip_prefix("unix://")
            .unwrap_or_else(|| panic!("DOCKER_HOST={host} is not a bed's engine"));
        Bed {
            name: need("SYSBOX_BED"),
            socket: socket.into(),
            data_root: need("SYSBOX_DATA_ROOT").into(),
            mountpoint: need("SYSBOX_MOUNTPOINT").into(),
        }
    })
}

/// What a program said and how it ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Said {
    pub command: String,
    /// 128 and the signal for one that was killed.
    pub code: i32,
    pub out: String,
    pub err: String,
}

impl Said {
    /// The output without the newline at its end, of a program that succeeded.
    #[track_caller]
    pub fn ok(self) -> String {
        assert!(self.code == 0, "{self:#?}");
        self.out.trim_end_matches('\n').to_owned()
    }

    /// What it said on stderr, of a program that failed.
    #[track_caller]
    pub fn refused(self) -> String {
        assert!(self.code != 0, "should have failed: {self:#?}");
        self.err
    }
}

/// Runs a program to its end.
#[track_caller]
pub fn run(command: &mut Command) -> Said {
    run_within(command, DEADLINE)
}

/// The same, of one that is known to take long.
#[track_caller]
pub fn run_within(command: &mut Command, deadline: Duration) -> Said {
    try_run(command, deadline).unwrap_or_else(|why| panic!("{why}"))
}

fn try_run(command: &mut Command, deadline: Duration) -> Result<Said, String> {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    let shown = words.map(|word| word.to_string_lossy()).collect::<Vec<_>>().join(" ");
    let child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
    let mut child = child.map_err(|error| format!("{shown}: {error}"))?;
    let (sender, receiver) = mpsc::channel();
    let (mut stdout, mut stderr) = (child.stdout.take().expect("piped"), child.stderr.take().expect("piped"));
    let out = std::thread::spawn(move || {
        let mut bytes = Vec::new();
        stdout.read_to_end(&mut bytes).map(|_| bytes)
    });
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        let err = stderr.read_to_end(&mut bytes).map(|_| bytes);
        let out = out.join().expect("reading does not panic");
        // A closed channel: nobody waits any more.
        let _late = sender.send((out, err));
    });
    let Ok((out, err)) = receiver.recv_timeout(deadline) else {
        // Ended in this moment is as good.
        let _ended = child.kill();
        return Err(format!("{shown}: did not end within {} s", deadline.as_secs()));
    };
    let status = child.wait().map_err(|error| format!("{shown}: {error}"))?;
    let text = |bytes: std::io::Result<Vec<u8>>| {
        String::from_utf8_lossy(&bytes.expect("a pipe can be read")).into_owned()
    };
    let signal = status.signal().unwrap_or_default();
    Ok(Said { command: shown, code: status.code().unwrap_or(128 + signal), out: text(out), err: text(err) })
}

/// The `docker` of the bed, not yet run.
pub fn docker_command<S: AsRef<OsStr>>(args: impl IntoIterator<Item = S>) -> Command {
    let bed = bed();
    let mut command = Command::new("docker");
    // Nobody's contexts, credentials and plug-ins.
    command.env_remove("DOCKER_CONTEXT").env("DOCKER_CONFIG", "/nonexistent");
    command
        .env("DOCKER_HOST", format!("unix://{}", bed.socket.display()))
        .env("DOCKER_BUILDKIT", "0")
        .args(args);
    command
}

/// Runs the bed's `docker`.
#[track_caller]
pub fn docker<S: AsRef<OsStr>>(args: impl IntoIterator<Item = S>) -> Said {
    run(&mut docker_command(args))
}

/// One request to the engine, for what its command line cannot say. Returns the answer's body.
#[track_caller]
pub fn api(method: &str, path: &str, body: &Value) -> Value {
    let (body, what) = (body.to_string(), format!("{method} {path}"));
    let mut socket = UnixStream::connect(&bed().socket).unwrap_or_else(|error| panic!("{what}: {error}"));
    socket.set_read_timeout(Some(DEADLINE)).expect("a deadline above zero");
    let head = format!(
        "{what} HTTP/1.0\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n",
        body.len()
    );
    let mut answer = String::new();
    socket
        .write_all((head + &body).as_bytes())
        .and_then(|()| socket.read_to_string(&mut answer))
        .unwrap_or_else(|error| panic!("{what}: {error}"));
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or((&answer, ""));
    let status = head.split(' ').nth(1).unwrap_or_default();
    assert!(status.starts_with('2'), "{what}: {answer}");
    if body.is_empty() {
        Value::Null
    } else {
        serde_json::from_str(body).unwrap_or_else(|_| panic!("{what}: {answer}"))
    }
}

/// Asks until there is an answer; fails the test if none comes in time.
#[track_caller]
pub fn until<T>(what: &str, mut probe: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + DEADLINE;
    loop {
        if let Some(found) = probe() {
            return found;
        }
        assert!(Instant::now() < deadline, "waited {} s for: {what}", DEADLINE.as_secs());
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// A name that no other test and no other run has.
pub fn unique(what: &str) -> String {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    format!("test-{what}-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed))
}

/// A container of ours. It is removed, with its anonymous volumes, when this is dropped.
#[derive(Debug)]
pub struct Container {
    pub name: String,
}

/// What [`Container`]s run: to be there, and to be gone at once when told.
const WAIT: &[&str] = &["sleep", "2147483647"];

impl Container {
    /// A running container of `image` that only waits.
    #[track_caller]
    pub fn waiting(image: &str, options: &[&str]) -> Self {
        Self::start(options, image, WAIT)
    }

    /// `docker run -d`.
    #[track_caller]
    pub fn start(options: &[&str], image: &str, command: &[&str]) -> Self {
        let (container, args) = Self::prepare(&["run", "-d"], options, image, command);
        docker(args).ok();
        container
    }

    /// `docker create` of a container that will wait.
    #[track_caller]
    pub fn created(image: &str, options: &[&str]) -> Self {
        let (container, args) = Self::prepare(&["create"], options, image, WAIT);
        docker(args).ok();
        container
    }

    /// The arguments for a `docker` that is to make a container, and the container that it will make.
    pub fn prepare(verb: &[&str], options: &[&str], image: &str, command: &[&str]) -> (Self, Vec<OsString>) {
        bed(); // without one there is nothing to remove later
        let name = unique("c");
        // A waiting init ignores SIGTERM; nobody wants to wait ten seconds for it.
        let ours = ["--runtime", RUNTIME, "--stop-signal", "KILL", "--name", &name];
        let args =
            [verb, &ours, options, &[image], command].concat().into_iter().map(OsString::from).collect();
        (Self { name }, args)
    }

    /// `docker run` in the foreground, to its end.
    #[track_caller]
    pub fn run(options: &[&str], image: &str, command: &[&str]) -> Said {
        let (_container, args) = Self::prepare(&["run"], options, image, command);
        docker(args)
    }

    /// What a shell script inside says, which has to succeed.
    #[track_caller]
    pub fn sh(&self, script: &str) -> String {
        self.try_sh(script).ok()
    }

    #[track_caller]
    pub fn try_sh(&self, script: &str) -> Said {
        self.exec(&[], &["sh", "-c", script])
    }

    #[track_caller]
    pub fn exec(&self, options: &[&str], command: &[&str]) -> Said {
        docker([&["exec"], options, &[self.name.as_str()], command].concat())
    }

    #[track_caller]
    pub fn inspect(&self, format: &str) -> String {
        docker(["inspect", "-f", format, &self.name]).ok()
    }

    #[track_caller]
    pub fn id(&self) -> String {
        self.inspect("{{.Id}}")
    }

    /// Of the container's init.
    #[track_caller]
    pub fn host_pid(&self) -> i32 {
        self.inspect("{{.State.Pid}}").parse().expect("a pid is a number")
    }

    /// A file of the init's directory in the host's /proc.
    #[track_caller]
    pub fn proc_file(&self, name: &str) -> String {
        let path = format!("/proc/{}/{name}", self.host_pid());
        std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{path}: {error}"))
    }

    /// The writable layer on the engine's disk.
    #[track_caller]
    pub fn upper(&self) -> PathBuf {
        self.inspect("{{.GraphDriver.Data.UpperDir}}").into()
    }

    #[track_caller]
    pub fn address(&self) -> String {
        self.inspect("{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}")
    }

    #[track_caller]
    pub fn docker(&self, verb: &[&str]) -> Said {
        docker([verb, &[self.name.as_str()]].concat())
    }

    /// What the manager has on disk about it.
    #[track_caller]
    pub fn record(&self) -> Option<Record> {
        record_of(&self.id())
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        remove(&["rm", "-fv", &self.name], "No such container");
    }
}

/// Removes something of ours; `gone` is what docker says if it is gone already. A test that fails for another reason is
/// not to be hidden behind this; one that does not fail must leave nothing behind.
fn remove(args: &[&str], gone: &str) {
    let why = match try_run(&mut docker_command(args), DEADLINE) {
        Ok(said) if said.code == 0 || said.err.contains(gone) => return,
        Ok(said) => format!("{said:#?}"),
        Err(why) => why,
    };
    if std::thread::panicking() { eprintln!("{why}") } else { panic!("{why}") }
}

/// A named volume of ours, removed when this is dropped (containers that use it have to go before).
#[derive(Debug)]
pub struct Volume {
    pub name: String,
}

impl Volume {
    #[track_caller]
    pub fn new() -> Self {
        let name = unique("v");
        docker(["volume", "create", &name]).ok();
        Self { name }
    }

    /// Its directory on the host.
    #[track_caller]
    pub fn path(&self) -> PathBuf {
        docker(["volume", "inspect", "-f", "{{.Mountpoint}}", &self.name]).ok().into()
    }
}

impl Default for Volume {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for Volume {
    fn drop(&mut self) {
        remove(&["volume", "rm", "-f", &self.name], "no such volume");
    }
}

/// The manager's record of the container with this id.
#[track_caller]
pub fn record_of(id: &str) -> Option<Record> {
    let named = files_named_after(&bed().data_root.join("records"), id);
    // Between the listing and the read a record may go: then there is none.
    let text = std::fs::read_to_string(named.first()?).ok()?;
    // A record grows by a line with every change; the last one holds.
    let line = text.lines().rfind(|line| !line.is_empty())?;
    Some(serde_json::from_str(line).unwrap_or_else(|error| panic!("record of {id}: {error}: {text}")))
}

/// What in a directory begins with a container's id.
#[track_caller]
pub fn files_named_after(dir: &Path, id: &str) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(dir).unwrap_or_else(|error| panic!("{}: {error}", dir.display()));
    let paths = entries.flatten().map(|entry| entry.path());
    paths.filter(|path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(id))).collect()
}

/// The cgroups of the host, in any hierarchy, with a container's id in their path.
pub fn cgroups_of(id: &str) -> Vec<PathBuf> {
    fn look(dir: &Path, id: &str, found: &mut Vec<PathBuf>) {
        // Cgroups come and go while we look.
        for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                if entry.file_name().to_string_lossy().contains(id) {
                    found.push(entry.path());
                } else {
                    look(&entry.path(), id, found);
                }
            }
        }
    }
    let mut found = Vec::new();
    look(Path::new("/sys/fs/cgroup"), id, &mut found);
    found
}

/// Everything of the container with this id that is still on the host, in words; empty if nothing is.
pub fn remains_of(id: &str, upper: &Path) -> Vec<String> {
    let bed = bed();
    let mut all = cgroups_of(id);
    all.extend(files_named_after(&bed.data_root.join("records"), id));
    all.extend(files_named_after(&bed.mountpoint, id));
    let layer = upper.parent().expect("an upper directory has a layer's around it");
    all.extend(layer.exists().then(|| layer.to_owned()));
    let mut said: Vec<String> = all.iter().map(|path| path.display().to_string()).collect();
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").expect("/proc is there");
    let layer = layer.to_string_lossy();
    said.extend(
        mounts.lines().filter(|line| line.contains(id) || line.contains(layer.as_ref())).map(str::to_owned),
    );
    said
}
