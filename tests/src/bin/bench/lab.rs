//! What samples are taken of: containers of either runtime, engines inside them. All of it
//! carries a label and goes with the lab; what a killed bench left behind goes when the next one opens.

use std::cell::RefCell;
use std::collections::HashMap;
use std::ffi::OsStr;
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::rc::Rc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use sysbox_tests::engine::{BUSYBOX, DEBIAN, INNER_IMAGE, RUNTIME};
use sysbox_tests::measure::{self, until};
use tempfile::TempDir;

/// Longer than any single command takes, on a machine that others use too.
pub const LIMIT: Duration = Duration::from_secs(60);

const LABEL: &str = "sysbox.bench";

/// What containers do that only have to be there.
const WAIT: &[&str] = &["sleep", "2147483647"];

/// The two that are compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Runtime {
    Ours,
    Theirs,
}

/// The door to the engine; threads may have one each.
#[derive(Debug, Clone)]
pub struct Docker {
    host: String,
    config: PathBuf,
}

impl Docker {
    pub fn command<S: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = S>) -> Command {
        let mut command = Command::new("docker");
        // Nobody's contexts, credentials and plug-ins.
        command
            .env_remove("DOCKER_CONTEXT")
            .env("DOCKER_CONFIG", &self.config)
            .env("DOCKER_HOST", &self.host);
        command.args(args);
        command
    }

    pub fn run<S: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = S>) -> Result<String> {
        measure::run(&mut self.command(args), LIMIT)
    }

    pub fn time<S: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = S>) -> Result<f64> {
        measure::time(&mut self.command(args), LIMIT)
    }
}

/// Everything that a run of the bench has.
#[derive(Debug)]
pub struct Lab {
    pub bed: String,
    pub docker: Docker,
    pub quick: bool,
    /// Where the bed's daemons listen.
    pub run_dir: PathBuf,
    pub program: PathBuf,
    pub scratch: TempDir,
    /// For the runtimes' state: where they have it by default.
    pub states: TempDir,
    shared: RefCell<HashMap<(&'static str, Runtime), Rc<Machine>>>,
}

impl Lab {
    /// # Errors
    /// No bed, or one without our images.
    pub fn open(quick: bool) -> Result<Self> {
        let need = |name: &str| {
            std::env::var(name).with_context(|| {
                format!("{name} is not set: needs a bed\nhint: make bench, or see tests/bed/bench.sh")
            })
        };
        let scratch = directory("/var/tmp")?;
        let docker = Docker { host: need("DOCKER_HOST")?, config: scratch.path().join("cli") };
        let lab = Self {
            bed: need("SYSBOX_BED")?,
            docker,
            quick,
            run_dir: need("SYSBOX_RUN_DIR")?.into(),
            program: need("SYSBOX_RUNC")?.into(),
            scratch,
            states: directory("/run")?,
            shared: RefCell::default(),
        };
        lab.sweep().context("take away what an earlier bench left behind")?;
        lab.docker.run(["image", "inspect", BUSYBOX, DEBIAN]).context("hint: make images")?;
        Ok(lab)
    }

    /// # Errors
    /// What could not be taken away.
    pub fn close(self) -> Result<()> {
        self.shared.borrow_mut().clear();
        self.sweep()
    }

    fn sweep(&self) -> Result<()> {
        let filter = format!("label={LABEL}");
        let found = self.docker.run(["ps", "-aq", "--filter", &filter])?;
        let ids: Vec<&str> = found.split_whitespace().collect();
        if !ids.is_empty() {
            self.docker.run([&["rm", "-fv"], ids.as_slice()].concat())?;
        }
        Ok(())
    }

    pub fn docker<const N: usize>(&self, args: [&str; N]) -> Command {
        self.docker.command(args)
    }

    /// A machine that several rows use; it lives until the lab is closed or [`Lab::clear`]ed.
    ///
    /// # Errors
    /// Making it.
    pub fn shared(
        &self,
        name: &'static str,
        runtime: Runtime,
        make: impl FnOnce() -> Result<Machine>,
    ) -> Result<Rc<Machine>> {
        if let Some(machine) = self.shared.borrow().get(&(name, runtime)) {
            return Ok(Rc::clone(machine));
        }
        let machine = Rc::new(make()?);
        self.shared.borrow_mut().insert((name, runtime), Rc::clone(&machine));
        Ok(machine)
    }

    pub fn clear(&self) {
        self.shared.borrow_mut().clear();
    }

    /// A directory of our own.
    ///
    /// # Errors
    /// `mkdir`.
    pub fn dir(&self, name: &str) -> Result<PathBuf> {
        let path = self.scratch.path().join(name);
        std::fs::create_dir_all(&path).with_context(|| format!("mkdir {}", path.display()))?;
        Ok(path)
    }
}

/// A directory of this process. What earlier ones left there, when they were killed, goes.
fn directory(parent: &str) -> Result<TempDir> {
    const PREFIX: &str = "sysbox-bench-";
    for entry in std::fs::read_dir(parent).with_context(|| format!("read {parent}"))? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let owner = name.strip_prefix(PREFIX).and_then(|rest| rest.split('-').next());
        let owner = owner.and_then(|pid| pid.parse().ok());
        if owner.is_some_and(|pid| sysbox_sys::process::identify(pid).is_err()) {
            std::fs::remove_dir_all(&path).with_context(|| format!("remove {}", path.display()))?;
        }
    }
    let prefix = format!("{PREFIX}{}-", std::process::id());
    let made = tempfile::Builder::new().prefix(&prefix).tempdir_in(parent);
    let dir = made.with_context(|| format!("a directory below {parent}"))?;
    // The container's root has to pass.
    std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o711))?;
    Ok(dir)
}

/// Names of all capabilities, in the kernel's order (linux/capability.h).
const CAPABILITIES: &str = "CHOWN DAC_OVERRIDE DAC_READ_SEARCH FOWNER FSETID KILL SETGID SETUID SETPCAP LINUX_IMMUTABLE \
    NET_BIND_SERVICE NET_BROADCAST NET_ADMIN NET_RAW IPC_LOCK IPC_OWNER SYS_MODULE SYS_RAWIO SYS_CHROOT SYS_PTRACE \
    SYS_PACCT SYS_ADMIN SYS_BOOT SYS_NICE SYS_RESOURCE SYS_TIME SYS_TTY_CONFIG MKNOD LEASE AUDIT_WRITE AUDIT_CONTROL \
    SETFCAP MAC_OVERRIDE MAC_ADMIN SYSLOG WAKE_ALARM BLOCK_SUSPEND AUDIT_READ PERFMON BPF CHECKPOINT_RESTORE";

/// What this machine's root has, and what it lacks.
pub fn capabilities() -> Result<(Vec<String>, Vec<String>)> {
    let status = std::fs::read_to_string("/proc/self/status").context("read /proc/self/status")?;
    let bits = status.lines().find_map(|line| line.strip_prefix("CapBnd:")).context("CapBnd")?;
    let bits = u64::from_str_radix(bits.trim(), 16).context("CapBnd")?;
    let named = CAPABILITIES
        .split_whitespace()
        .enumerate()
        .map(|(bit, name)| (bits >> bit & 1 == 1, format!("CAP_{name}")));
    let (has, lacks): (Vec<_>, Vec<_>) = named.partition(|(has, _)| *has);
    let names = |list: Vec<(bool, String)>| list.into_iter().map(|(_, name)| name).collect();
    Ok((names(has), names(lacks)))
}

/// The options of `docker run` that choose the runtime, and nothing else: the engine's default profile holds for both.
pub fn confined(runtime: Runtime) -> Vec<String> {
    let name = match runtime {
        Runtime::Ours => RUNTIME,
        Runtime::Theirs => "runc",
    };
    ["--runtime", name, "--label", LABEL].map(str::to_owned).to_vec()
}

/// Ours as it is; theirs with all that root has on this machine, and no filter.
///
/// # Errors
/// /proc not being there.
pub fn options(runtime: Runtime) -> Result<Vec<String>> {
    let mut options = confined(runtime);
    if runtime == Runtime::Theirs {
        options.extend(["--security-opt", "seccomp=unconfined", "--cap-add", "ALL"].map(str::to_owned));
        for lacking in capabilities()?.1 {
            options.extend(["--cap-drop".to_owned(), lacking]);
        }
    }
    Ok(options)
}

/// With which a container of theirs can be a host for an engine; `--privileged` would ask for capabilities that this
/// machine may lack.
const HOST_OPTIONS: &[&str] = &[
    "--security-opt",
    "apparmor=unconfined",
    "--security-opt",
    "systempaths=unconfined",
    "--cgroupns",
    "private",
    "--device-cgroup-rule",
    "a *:* rwm",
    "--volume",
    "/var/lib/docker",
];

/// Makes a container of theirs writable where an engine writes. With version 2, a cgroup that hands out controllers holds
/// no processes.
const HOST_SCRIPT: &str = "
    for dir in /sys /sys/fs/cgroup /sys/fs/cgroup/*; do
        grep -q \" $dir \" /proc/self/mountinfo && mount -o remount,bind,rw $dir
    done
    cd /sys/fs/cgroup
    if [ -e cgroup.controllers ]; then
        mkdir -p init
        for pid in $(cat cgroup.procs); do echo $pid >init/cgroup.procs || true; done
        for name in $(cat cgroup.controllers); do echo +$name >cgroup.subtree_control || true; done
    fi
    true";

/// A container, removed with its anonymous volumes when this is dropped.
#[derive(Debug)]
pub struct Machine {
    pub name: String,
    image: String,
    docker: Docker,
}

impl Machine {
    /// A container that waits.
    ///
    /// # Errors
    /// The engine refusing it.
    pub fn start(docker: &Docker, options: &[String], image: &str) -> Result<Self> {
        Self::made(docker, &["run", "-d"], options, image)
    }

    pub fn created(docker: &Docker, options: &[String], image: &str) -> Result<Self> {
        Self::made(docker, &["create"], options, image)
    }

    fn made(docker: &Docker, verb: &[&str], options: &[String], image: &str) -> Result<Self> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let name = format!("bench-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let machine = Self { name, image: image.to_owned(), docker: docker.clone() };
        let options: Vec<&str> = options.iter().map(String::as_str).collect();
        // A waiting init ignores SIGTERM.
        let common = ["--stop-signal", "KILL", "--label", LABEL, "--name", &machine.name];
        docker.run([verb, &common, &options, &[image], WAIT].concat())?;
        Ok(machine)
    }

    /// A container that an engine can run in.
    ///
    /// # Errors
    /// The engine refusing it.
    pub fn host(docker: &Docker, runtime: Runtime) -> Result<Self> {
        Self::host_of(docker, runtime, DEBIAN)
    }

    /// The same of this image.
    ///
    /// # Errors
    /// The engine refusing it.
    pub fn host_of(docker: &Docker, runtime: Runtime, image: &str) -> Result<Self> {
        let mut options = options(runtime)?;
        if runtime == Runtime::Ours {
            return Self::start(docker, &options, image);
        }
        options.extend(HOST_OPTIONS.iter().map(|&word| word.to_owned()));
        let machine = Self::start(docker, &options, image)?;
        machine.exec(&["sh", "-c", HOST_SCRIPT])?;
        Ok(machine)
    }

    pub fn exec(&self, command: &[&str]) -> Result<String> {
        self.docker.run([&["exec", &self.name], command].concat())
    }

    /// The container's root directory, seen from here.
    pub fn root(&self) -> Result<PathBuf> {
        let pid = self.docker.run(["inspect", "-f", "{{.State.Pid}}", &self.name])?;
        Ok(Path::new("/proc").join(pid.trim()).join("root"))
    }

    /// Starts the engine inside. Returns the milliseconds until it answered.
    ///
    /// # Errors
    /// It not answering in time; its last words are told.
    pub fn start_engine(&self) -> Result<f64> {
        let socket = self.root()?.join("run/docker.sock");
        // Bookworm's engine asks for a better OOM score than a container may have; later ones do not know the flag.
        let score = if self.image == DEBIAN { "--oom-score-adjust 0" } else { "" };
        let script = format!("exec dockerd {score} >/var/log/dockerd.log 2>&1");
        let start = Instant::now();
        self.docker.run(["exec", "-d", &self.name, "sh", "-c", &script])?;
        let answered = until("a socket of the engine inside", LIMIT, || UnixStream::connect(&socket).ok())
            // The request waits in the socket until the engine is ready: no second look is needed.
            .and_then(ping);
        let took = measure::milliseconds(start);
        match answered {
            Ok(()) => Ok(took),
            Err(error) => {
                let words = self.exec(&["tail", "-n", "5", "/var/log/dockerd.log"]).unwrap_or_default();
                Err(error.context(format!("the engine inside did not start: {words}")))
            }
        }
    }

    /// The door to the engine inside.
    ///
    /// # Errors
    /// The container not running.
    pub fn inner(&self) -> Result<Docker> {
        let host = format!("unix://{}", self.root()?.join("run/docker.sock").display());
        Ok(Docker { host, config: self.docker.config.clone() })
    }

    /// Puts busybox into the engine inside, which has no registry.
    ///
    /// # Errors
    /// The engine inside refusing it.
    pub fn import_busybox(&self) -> Result<()> {
        let tar = self.root()?.join(INNER_IMAGE.trim_start_matches('/'));
        self.inner()?.run([OsStr::new("import"), tar.as_os_str(), OsStr::new("busybox")]).map(drop)
    }

    /// Puts an image of this size into the engine inside, of what no file system can shrink.
    ///
    /// # Errors
    /// The engine inside refusing it.
    pub fn import_random(&self, bytes: u64) -> Result<()> {
        let mut command = self.inner()?.command(["import", "-", "random"]);
        let mut child =
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
        let stdin = child.stdin.take().context("piped")?;
        // Ends by EPIPE if the client is killed at the deadline.
        let fed = std::thread::spawn(move || feed_tar(stdin, bytes));
        measure::finish(child, LIMIT).context("docker import - random")?;
        match fed.join() {
            Ok(fed) => fed.context("feed docker import"),
            Err(_) => bail!("feeding docker import panicked"),
        }
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        if let Err(error) = self.docker.run(["rm", "-fv", &self.name]) {
            let text = format!("{error:#}");
            if !text.contains("No such container") {
                eprintln!("bench: {text}");
            }
        }
    }
}

fn ping(mut stream: UnixStream) -> Result<()> {
    stream.set_read_timeout(Some(LIMIT))?;
    stream.write_all(b"GET /_ping HTTP/1.0\r\n\r\n").context("ask the engine inside")?;
    let mut answer = [0; 12];
    stream.read_exact(&mut answer).context("the engine inside")?;
    if answer.ends_with(b" 200") { Ok(()) } else { bail!("it answered {}", String::from_utf8_lossy(&answer)) }
}

/// A tar with one file of random bytes in it.
fn feed_tar(mut to: impl Write, bytes: u64) -> std::io::Result<()> {
    to.write_all(&tar_header("random", bytes))?;
    let random = std::fs::File::open("/dev/urandom")?;
    std::io::copy(&mut std::io::BufReader::with_capacity(1 << 20, random).take(bytes), &mut to)?;
    // The file's last block filled up, and the two empty blocks that end a tar.
    let rest = (512 - bytes % 512) % 512 + 1024;
    std::io::copy(&mut std::io::repeat(0).take(rest), &mut to)?;
    to.flush()
}

/// The header of a regular file (pax(1), "ustar interchange format").
fn tar_header(name: &str, bytes: u64) -> [u8; 512] {
    let mut header = [0u8; 512];
    let size = format!("{bytes:011o}");
    let fields: &[(usize, &[u8])] = &[
        (0, name.as_bytes()),
        (100, b"0000644"),
        (108, b"0000000"),
        (116, b"0000000"),
        (124, size.as_bytes()),
        (136, b"00000000000"),
        (148, b"        "), // the sum is taken with blanks in its place
        (156, b"0"),
        (257, b"ustar\x0000"),
    ];
    for (at, bytes) in fields {
        header[*at..*at + bytes.len()].copy_from_slice(bytes);
    }
    let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
    header[148..155].copy_from_slice(format!("{sum:06o}\0").as_bytes());
    header
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tar_reads_what_is_fed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.tar");
        feed_tar(std::fs::File::create(&path).unwrap(), 1000).unwrap();
        let listed = measure::run(Command::new("tar").arg("-tvf").arg(&path), LIMIT).unwrap();
        assert!(listed.contains("1000") && listed.ends_with("random\n"), "{listed}");
        assert_eq!(std::fs::metadata(&path).unwrap().len() % 512, 0);
    }

    #[test]
    fn capabilities_are_those_of_the_kernel() {
        let last: usize =
            std::fs::read_to_string("/proc/sys/kernel/cap_last_cap").unwrap().trim().parse().unwrap();
        assert!(CAPABILITIES.split_whitespace().count() > last, "the kernel has one more");
    }
}
