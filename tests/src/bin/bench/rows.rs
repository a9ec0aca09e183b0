//! How one sample of each row is taken.

use std::process::{Child, Command, Stdio};
use std::rc::Rc;
use std::time::Instant;

use anyhow::{Context, Result, anyhow};
use sysbox_sys::socket::Connection;
use sysbox_tests::engine::{BUSYBOX, DEBIAN};
use sysbox_tests::measure::{self, Side, until};

use crate::Pair;
use crate::lab::{Docker, LIMIT, Lab, Machine, Runtime, confined, options};

/// The same for both runtimes.
fn both(make: impl Fn(Runtime) -> Result<Side>) -> Result<Pair> {
    Ok(Pair::Both(make(Runtime::Ours)?, make(Runtime::Theirs)?))
}

pub fn run(lab: &Lab) -> Result<Pair> {
    both(|runtime| {
        let bundle = lab.bundle(runtime)?;
        let mut count = 0;
        Ok(Box::new(move || {
            count += 1;
            bundle.time(&format!("bench-{count}"))
        }))
    })
}

/// `docker run --rm` of true, as a command line.
fn run_true(runtime: Runtime) -> Result<Vec<String>> {
    let words = |list: &[&str]| list.iter().map(|&word| word.to_owned()).collect::<Vec<_>>();
    Ok([words(&["run", "--rm"]), options(runtime)?, words(&[BUSYBOX, "true"])].concat())
}

pub fn docker_run(lab: &Lab) -> Result<Pair> {
    both(|runtime| {
        let (docker, line) = (lab.docker.clone(), run_true(runtime)?);
        Ok(Box::new(move || docker.time(&line)))
    })
}

pub fn docker_run_16(lab: &Lab) -> Result<Pair> {
    both(|runtime| {
        let (docker, line) = (lab.docker.clone(), run_true(runtime)?);
        Ok(Box::new(move || {
            let start = Instant::now();
            four_at_once(|| (0..4).try_for_each(|_| docker.run(&line).map(drop)))?;
            Ok(measure::milliseconds(start))
        }))
    })
}

fn four_at_once(work: impl Fn() -> Result<()> + Sync) -> Result<()> {
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..4).map(|_| scope.spawn(&work)).collect();
        workers.into_iter().try_for_each(|worker| worker.join().map_err(|_| anyhow!("a worker panicked"))?)
    })
}

pub fn docker_exec(lab: &Lab) -> Result<Pair> {
    both(|runtime| {
        let docker = lab.docker.clone();
        let machine = Machine::start(&docker, &options(runtime)?, BUSYBOX)?;
        Ok(Box::new(move || docker.time(["exec", &machine.name, "true"])))
    })
}

/// A fresh container each time: what an engine does at its first start belongs to it.
pub fn inner_ready(lab: &Lab) -> Result<Pair> {
    both(|runtime| {
        let docker = lab.docker.clone();
        Ok(Box::new(move || Machine::host(&docker, runtime)?.start_engine()))
    })
}

pub fn inner_run(lab: &Lab) -> Result<Pair> {
    both(|runtime| {
        let machine = Machine::host(&lab.docker, runtime)?;
        machine.start_engine()?;
        machine.import_busybox()?;
        let inner = machine.inner()?;
        Ok(Box::new(move || {
            // The closure keeps the machine.
            let _alive = &machine;
            inner.time(["run", "--rm", "busybox", "true"])
        }))
    })
}

/// A container with 1 GB of images inside, its engine not running: what is measured is what the runtime does about them.
fn laden(lab: &Lab, runtime: Runtime) -> Result<Rc<Machine>> {
    const GIB: u64 = 1 << 30;
    lab.shared("laden", runtime, || {
        let machine = Machine::host(&lab.docker, runtime)?;
        machine.start_engine()?;
        machine.import_random(if lab.quick { GIB / 16 } else { GIB })?;
        lab.docker.run(["stop", &machine.name])?;
        // What is still to be written would be written in the middle of a sample.
        nix::unistd::sync();
        Ok(machine)
    })
}

pub fn stop(lab: &Lab) -> Result<Pair> {
    both(|runtime| {
        let (docker, machine) = (lab.docker.clone(), laden(lab, runtime)?);
        Ok(Box::new(move || {
            docker.run(["start", &machine.name])?;
            docker.time(["stop", &machine.name])
        }))
    })
}

pub fn start(lab: &Lab) -> Result<Pair> {
    both(|runtime| {
        let (docker, machine) = (lab.docker.clone(), laden(lab, runtime)?);
        Ok(Box::new(move || {
            docker.run(["stop", &machine.name])?;
            docker.time(["start", &machine.name])
        }))
    })
}

/// Reads a file many times over from inside a container: microseconds for one open, read and close.
fn reads(machine: Rc<Machine>, path: &'static str) -> Side {
    const PROGRAM: &str = "
import os, sys, time
def once():
    file = os.open(sys.argv[1], os.O_RDONLY)
    os.read(file, 65536)
    os.close(file)
for _ in range(200): once()
start = time.perf_counter_ns()
for _ in range(2000): once()
print((time.perf_counter_ns() - start) / 2000 / 1000)";
    Box::new(move || {
        let said = machine.exec(&["python3", "-c", PROGRAM, path])?;
        said.trim().parse().with_context(|| format!("`{}` is not a time", said.trim()))
    })
}

/// Theirs under the engine's own filter, as ours: it is files that are compared.
fn reader(lab: &Lab, runtime: Runtime) -> Result<Rc<Machine>> {
    lab.shared("reader", runtime, || Machine::start(&lab.docker, &confined(runtime), DEBIAN))
}

pub fn leaf(lab: &Lab) -> Result<Pair> {
    both(|runtime| Ok(reads(reader(lab, runtime)?, "/proc/meminfo")))
}

pub fn uptime(lab: &Lab) -> Result<Pair> {
    both(|runtime| Ok(reads(reader(lab, runtime)?, "/proc/uptime")))
}

pub fn sysctl(lab: &Lab) -> Result<Pair> {
    both(|runtime| Ok(reads(reader(lab, runtime)?, "/proc/sys/net/core/somaxconn")))
}

/// An LXCFS of our own, ended when this is dropped. Its mount ends with it.
struct Lxcfs(Child);

impl Drop for Lxcfs {
    fn drop(&mut self) {
        let ended = i32::try_from(self.0.id())
            .map_err(anyhow::Error::from)
            // It unmounts itself at SIGTERM.
            .and_then(|pid| {
                Ok(nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::SIGTERM)?)
            })
            .and_then(|()| Ok(self.0.wait()?));
        if let Err(error) = ended {
            eprintln!("bench: lxcfs: {error}");
        }
    }
}

pub fn leaf_lxcfs(lab: &Lab) -> Result<Pair> {
    let dir = lab.dir("lxcfs")?;
    let quiet = |mut command: Command| {
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn()
    };
    let mut command = Command::new("lxcfs");
    command.arg("-f").arg("-p").arg(lab.dir("lxcfs-run")?.join("pid")).arg(&dir);
    let lxcfs = match quiet(command) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            return Ok(Pair::Skip("no `lxcfs` on the PATH (Debian package lxcfs)".to_owned()));
        }
        other => Lxcfs(other.context("lxcfs")?),
    };
    let file = dir.join("proc/meminfo");
    until("lxcfs to mount its files", LIMIT, || file.exists().then_some(()))?;
    let mut with = confined(Runtime::Theirs);
    with.extend(["--volume".to_owned(), format!("{}:/proc/meminfo:ro", file.display())]);
    let machine = Rc::new(Machine::start(&lab.docker, &with, DEBIAN)?);
    let mut read = reads(machine, "/proc/meminfo");
    let theirs = Box::new(move || {
        let sample = read();
        // The closure keeps the daemon, and lets go of it after the container that uses it.
        let _alive = &lxcfs;
        sample
    });
    Ok(Pair::Both(reads(reader(lab, Runtime::Ours)?, "/proc/meminfo"), theirs))
}

pub fn memory(lab: &Lab) -> Result<Pair> {
    const IDLE: usize = 30;
    lab.clear();
    let (docker, run_dir, options) = (lab.docker.clone(), lab.run_dir.clone(), options(Runtime::Ours)?);
    Ok(Pair::Ours(Box::new(move || {
        let _idle = idle(&docker, &options, IDLE)?;
        let mut kibibytes = 0;
        for socket in [sysbox_ipc::mgr::SOCKET, sysbox_ipc::fs::SOCKET] {
            let daemon = Connection::connect(&run_dir.join(socket)).and_then(|c| Ok(c.peer_pid()?));
            kibibytes += pss(daemon.with_context(|| format!("the daemon at {socket}"))?)?;
        }
        Ok(kibibytes as f64 / 1024.0)
    })))
}

fn idle(docker: &Docker, options: &[String], count: usize) -> Result<Vec<Machine>> {
    (0..count).map(|_| Machine::start(docker, options, BUSYBOX)).collect()
}

/// The memory of a process, what it shares with others counted in shares (proc(5)), in KiB.
fn pss(pid: i32) -> Result<u64> {
    let path = format!("/proc/{pid}/smaps_rollup");
    let text = std::fs::read_to_string(&path).with_context(|| format!("read {path}"))?;
    let line =
        text.lines().find_map(|line| line.strip_prefix("Pss:")).with_context(|| format!("{path}: no Pss"))?;
    line.trim().trim_end_matches(" kB").parse().with_context(|| format!("{path}: Pss"))
}
