//! sysbox-runc without an engine: daemons of its own in a directory of its own, bundles made by hand, and a look at
//! whatever could be left behind.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

/// Daemons, state and bundles of one test. Everything ends with it.
#[derive(Debug)]
pub struct Machine {
    dir: tempfile::TempDir,
    mgr: Option<Child>,
    fs: Option<Child>,
    range: String,
    flags: Vec<String>,
}

/// Which of the 64 id places of the test beds a machine takes: tests run side by side, in this process and in others.
static NEXT: AtomicU32 = AtomicU32::new(0);

fn place() -> u32 {
    std::process::id().wrapping_mul(7).wrapping_add(NEXT.fetch_add(1, Ordering::Relaxed))
}

/// What `sysbox-runc` said.
#[derive(Debug)]
pub struct Said {
    pub code: i32,
    pub out: String,
    pub err: String,
}

impl From<Output> for Said {
    fn from(output: Output) -> Self {
        Self {
            code: output.status.code().unwrap_or(-1),
            out: String::from_utf8_lossy(&output.stdout).into_owned(),
            err: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }
}

impl Said {
    /// The output of a command that must succeed.
    #[track_caller]
    pub fn ok(self) -> String {
        assert_eq!(self.code, 0, "{}{}", self.out, self.err);
        self.out
    }

    /// The message of a command that must fail.
    #[track_caller]
    pub fn fails(self) -> String {
        assert_ne!(self.code, 0, "succeeded: {}", self.out);
        self.err
    }
}

/// Where the built programs are: as `make test` says, or beside this test.
pub fn programs() -> PathBuf {
    if let Some(dir) = std::env::var_os("SYSBOX_BIN_DIR") {
        return dir.into();
    }
    let exe = std::env::current_exe().expect("a running test has a path");
    let dir = exe.ancestors().nth(2).map(Path::to_owned).expect("tests are built two levels down");
    assert!(dir.join("sysbox-runc").exists(), "need: the programs built in {} (cargo build)", dir.display());
    dir
}

impl Machine {
    pub fn start() -> Self {
        Self::start_with(&[])
    }

    /// As [`Machine::start`], with more flags for sysbox-mgr.
    pub fn start_with(flags: &[&str]) -> Self {
        // Below the ids of test beds and of the user's containers; another process's tests take other places.
        let range = format!("{}:1048576", 536_870_912 + place() % 1024 * 1_048_576);
        Self::start_in(&std::env::temp_dir(), range, flags)
    }

    /// With ids for 64 containers instead of 16.
    pub fn start_large() -> Self {
        let range = format!("{}:4194304", 268_435_456 + place() % 64 * 4_194_304);
        Self::start_in(&std::env::temp_dir(), range, &[])
    }

    /// With all that it writes below a directory of the caller's.
    pub fn start_below(dir: &Path) -> Self {
        Self::start_in(dir, format!("{}:1048576", 536_870_912 + place() % 1024 * 1_048_576), &[])
    }

    fn start_in(parent: &Path, range: String, flags: &[&str]) -> Self {
        assert!(nix::unistd::geteuid().is_root(), "need: root");
        let dir = tempfile::Builder::new().prefix("sysbox-test-").tempdir_in(parent);
        let dir = dir.expect("a temporary directory");
        // Inits in their user namespaces look mount sources up below this.
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o711))
            .expect("chmod of our own directory");
        fs::create_dir(dir.path().join("etc")).expect("mkdir in our own directory");
        let mut machine = Self {
            dir,
            mgr: None,
            fs: None,
            range,
            flags: flags.iter().map(|flag| (*flag).to_owned()).collect(),
        };
        machine.start_mgr();
        machine.start_fs();
        machine
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn start_mgr(&mut self) {
        let child = Command::new(programs().join("sysbox-mgr"))
            .args(["--subid-range", &self.range, "--log-level", "debug"])
            .arg("--subid-files")
            .arg(self.path("etc"))
            .arg("--data-root")
            .arg(self.path("data"))
            .arg("--run-dir")
            .arg(self.path("run"))
            .arg("--log")
            .arg(self.path("mgr.log"))
            .args(&self.flags)
            .stdin(Stdio::null())
            .spawn()
            .expect("start sysbox-mgr");
        self.mgr = Some(child);
        self.wait_socket("mgr.sock");
    }

    pub fn start_fs(&mut self) {
        let child = Command::new(programs().join("sysbox-fs"))
            .arg("--mountpoint")
            .arg(self.path("fs"))
            .arg("--run-dir")
            .arg(self.path("run"))
            .arg("--log")
            .arg(self.path("fs.log"))
            .stdin(Stdio::null())
            .spawn()
            .expect("start sysbox-fs");
        self.fs = Some(child);
        self.wait_socket("fs.sock");
    }

    fn wait_socket(&self, name: &str) {
        let socket = self.path("run").join(name);
        eventually(&format!("{name} answers"), || sysbox_sys::socket::Connection::connect(&socket).is_ok());
    }

    /// Whether the manager keeps the descriptor of the FUSE connection: until it does, the death of sysbox-fs is final.
    pub fn keeps_fuse(&self) -> bool {
        use sysbox_ipc::mgr::{Reply, Request};
        let Ok(mgr) = sysbox_sys::socket::Connection::connect(&self.path("run/mgr.sock")) else {
            return false;
        };
        let hello = Request::Hello(sysbox_ipc::Hello::from_program("sysbox-fs"));
        let name = format!("fuse:{}", self.path("fs").display());
        mgr.call::<_, Reply>(&hello, &[]).is_ok()
            && matches!(mgr.call(&Request::VaultGet { name }, &[]), Ok((Reply::Descriptor, _)))
    }

    /// Ends a daemon at once.
    pub fn kill_mgr(&mut self) {
        kill(self.mgr.take());
    }

    pub fn kill_fs(&mut self) {
        kill(self.fs.take());
    }

    /// A bundle with a busybox rootfs and the spec that `sysbox-runc spec` writes, without a terminal.
    pub fn bundle(&self, name: &str, args: &[&str]) -> Bundle {
        // As an engine keeps its own: nobody but root reaches the rootfs.
        let closed = self.path("bundles");
        fs::create_dir_all(&closed).expect("mkdir in our own directory");
        fs::set_permissions(&closed, fs::Permissions::from_mode(0o700)).expect("chmod of our own directory");
        let dir = closed.join(name);
        fs::create_dir_all(dir.join("rootfs/bin")).expect("mkdir in our own directory");
        fs::copy(busybox(), dir.join("rootfs/bin/busybox")).expect("copy busybox");
        for applet in [
            "sh", "cat", "id", "mount", "umount", "sleep", "true", "ls", "echo", "mkdir", "touch", "stat",
            "chown", "rm",
        ] {
            std::os::unix::fs::symlink("busybox", dir.join("rootfs/bin").join(applet))
                .expect("link an applet");
        }
        let bundle = Bundle { dir };
        Command::new(programs().join("sysbox-runc"))
            .args(["spec", "--bundle"])
            .arg(&bundle.dir)
            .status()
            .expect("run spec");
        bundle.edit(|config| {
            config["process"]["terminal"] = json!(false);
            config["process"]["args"] = json!(args);
        });
        bundle
    }

    /// sysbox-runc with this machine's directories.
    pub fn command(&self) -> Command {
        let mut command = Command::new(programs().join("sysbox-runc"));
        command.arg("--root").arg(self.path("root")).arg("--run-dir").arg(self.path("run"));
        command.stdin(Stdio::null());
        command
    }

    pub fn runc(&self, args: &[&str]) -> Said {
        self.command().args(args).output().expect("run sysbox-runc").into()
    }

    pub fn run(&self, bundle: &Bundle, id: &str) -> Said {
        self.runc(&["run", "--bundle", &bundle.dir.display().to_string(), id])
    }

    /// sysbox-runc in the background, its errors in a file; it must have ended when [`Later::within`] returns.
    pub fn later(&self, args: &[&str]) -> Later {
        // Not below the machine's own directory, whose disk may be full.
        let err = tempfile::NamedTempFile::new().expect("create a log");
        let stderr = err.reopen().expect("open the log");
        let child = self.command().args(args).stdout(Stdio::null()).stderr(stderr).spawn();
        Later { child: child.expect("run sysbox-runc"), err }
    }

    /// A container that runs in the background, with streams of its own.
    pub fn run_detached(&self, bundle: &Bundle, id: &str) -> Running<'_> {
        let log = fs::File::create(self.path(&format!("{id}.out"))).expect("create a log");
        let again = log.try_clone().expect("dup");
        let bundle_dir = bundle.dir.display().to_string();
        let mut command = self.command();
        command.args(["run", "--detach", "--bundle", &bundle_dir, id]).stdout(log).stderr(again);
        let status = command.status().expect("run sysbox-runc");
        let said = fs::read_to_string(self.path(&format!("{id}.out"))).unwrap_or_default();
        assert!(status.success(), "{said}");
        Running { machine: self, id: id.to_owned() }
    }

    pub fn state(&self, id: &str) -> Value {
        serde_json::from_str(&self.runc(&["state", id]).ok()).expect("state prints JSON")
    }

    /// Files in the manager's records, the runtime's root, and cgroups that carry this id: what a container leaves if
    /// something goes wrong.
    pub fn remains(&self, id: &str) -> Vec<String> {
        let mut found = Vec::new();
        let mut dirs = vec![self.path("data/records"), self.path("root")];
        // Without its daemon the file system keeps a reader waiting for the next one.
        dirs.extend(self.fs.as_ref().map(|_| self.path("fs")));
        for dir in dirs {
            let names = fs::read_dir(&dir).into_iter().flatten().flatten().map(|entry| entry.path());
            found.extend(names.filter(|path| name_has(path, id)).map(|path| path.display().to_string()));
        }
        found.extend(cgroups(&self.cgroup(id)));
        found
    }

    /// The cgroup that a container gets when its spec names none.
    pub fn cgroup(&self, id: &str) -> String {
        let id = sysbox_ipc::ContainerId::parse(id).expect("tests use legal ids");
        format!("sysbox-{}", sysbox_ipc::ContainerKey::new(&self.path("root"), id).slug())
    }
}

fn name_has(path: &Path, id: &str) -> bool {
    path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(id))
}

/// Directories of this name at the top of any hierarchy.
pub fn cgroups(name: &str) -> Vec<String> {
    let top = Path::new("/sys/fs/cgroup");
    let mut roots = vec![top.to_owned()];
    roots.extend(fs::read_dir(top).into_iter().flatten().flatten().map(|entry| entry.path()));
    roots
        .iter()
        .map(|root| root.join(name))
        .filter(|path| path.is_dir())
        .map(|path| path.display().to_string())
        .collect()
}

fn kill(child: Option<Child>) {
    if let Some(mut child) = child {
        child.kill().expect("SIGKILL to our own child");
        child.wait().expect("wait for our own child");
    }
}

/// Waits for a claim to become true; the deadline is far above what any machine needs.
#[track_caller]
pub fn eventually(claim: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(30);
    while !holds() {
        assert!(Instant::now() < deadline, "not within 30 s: {claim}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn busybox() -> PathBuf {
    let path = PathBuf::from("/bin/busybox");
    assert!(path.exists(), "need: busybox-static (apt-get install busybox-static)");
    path
}

impl Drop for Machine {
    fn drop(&mut self) {
        for id in fs::read_dir(self.path("root")).into_iter().flatten().flatten() {
            self.runc(&["delete", "--force", &id.file_name().to_string_lossy()]);
        }
        for child in [self.fs.take(), self.mgr.take()] {
            let Some(mut child) = child else { continue };
            let pid = nix::unistd::Pid::from_raw(i32::try_from(child.id()).unwrap_or_default());
            // Gently first: sysbox-fs unmounts.
            if nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).is_ok() {
                let deadline = Instant::now() + Duration::from_secs(10);
                while matches!(child.try_wait(), Ok(None)) && Instant::now() < deadline {
                    std::thread::sleep(Duration::from_millis(2));
                }
            }
            if matches!(child.try_wait(), Ok(None)) && child.kill().is_ok() {
                eprintln!("a daemon had to be killed; its log is in {}", self.dir.path().display());
            }
        }
        let mounted = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        let point = self.path("fs").display().to_string();
        if mounted.lines().any(|line| line.contains(&point)) {
            // The directory must not be deleted through a mount.
            if let Err(errno) =
                nix::mount::umount2(self.path("fs").as_path(), nix::mount::MntFlags::MNT_DETACH)
            {
                eprintln!("umount {point}: {errno}");
                self.dir.disable_cleanup(true);
            }
            assert!(std::thread::panicking(), "sysbox-fs left its mount at {point}");
        }
    }
}

/// A call of sysbox-runc that is not waited for yet.
#[derive(Debug)]
pub struct Later {
    child: Child,
    err: tempfile::NamedTempFile,
}

impl Later {
    pub fn is_running(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// What it said, if it ends in time; else it is killed, and `None`.
    pub fn within(mut self, limit: Duration) -> Option<Said> {
        let deadline = Instant::now() + limit;
        while self.is_running() {
            if Instant::now() > deadline {
                kill(Some(self.child));
                return None;
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        let code = self.child.wait().expect("wait for our own child").code().unwrap_or(-1);
        let err = fs::read_to_string(self.err.path()).unwrap_or_default();
        Some(Said { code, out: String::new(), err })
    }
}

/// A bundle on disk.
#[derive(Debug)]
pub struct Bundle {
    pub dir: PathBuf,
}

impl Bundle {
    pub fn rootfs(&self) -> PathBuf {
        self.dir.join("rootfs")
    }

    pub fn edit(&self, change: impl FnOnce(&mut Value)) {
        let path = self.dir.join("config.json");
        let mut config =
            serde_json::from_slice(&fs::read(&path).expect("a bundle has a config")).expect("which is JSON");
        change(&mut config);
        fs::write(&path, config.to_string()).expect("write config.json");
    }

    pub fn mount(&self, destination: &str, source: &Path, options: &[&str]) {
        self.edit(|config| {
            let mount =
                json!({"destination": destination, "type": "bind", "source": source, "options": options});
            config["mounts"].as_array_mut().expect("a config has mounts").push(mount);
        });
    }

    /// Every path below the rootfs with owner and mode, to be compared before and after.
    pub fn inventory(&self) -> Vec<String> {
        let listed = Command::new("find")
            .arg(self.rootfs())
            .args(["-printf", "%P %U:%G %m %y\n"])
            .output()
            .expect("run find");
        let mut lines: Vec<String> =
            String::from_utf8_lossy(&listed.stdout).lines().map(str::to_owned).collect();
        lines.sort();
        lines
    }
}

/// A container in the background; deleted with force at the end.
#[derive(Debug)]
pub struct Running<'a> {
    machine: &'a Machine,
    pub id: String,
}

impl Running<'_> {
    pub fn exec(&self, script: &str) -> Said {
        self.machine.runc(&["exec", &self.id, "/bin/sh", "-c", script])
    }

    /// Host pid of init.
    pub fn pid(&self) -> i64 {
        self.machine.state(&self.id)["pid"].as_i64().expect("state has a pid")
    }

    pub fn delete(&self) {
        self.machine.runc(&["delete", "--force", &self.id]).ok();
    }
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        self.machine.runc(&["delete", "--force", &self.id]);
    }
}
