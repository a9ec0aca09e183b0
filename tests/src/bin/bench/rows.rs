//! How one sample of each row is taken.

use std::process::{Child, Command, Stdio};
use std::rc::Rc;
use std::time::Instant;

use anyhow::{Context, Result, anyhow};
use sysbox_sys::socket::Connection;
use sysbox_tests::engine::{BUSYBOX, DEBIAN};
use sysbox_tests::measure::{self, Side, until};

use crate::Pair;
use crate::bundles::{Bundle, Kind};
use crate::lab::{Docker, LIMIT, Lab, Machine, Runtime, confined, options};

/// The same for both runtimes.
pub fn both(make: impl Fn(Runtime) -> Result<Side>) -> Result<Pair> {
    Ok(Pair::Both(make(Runtime::Ours)?, make(Runtime::Theirs)?))
}

/// `run` of a bundle, again and again.
fn runs(bundle: Bundle) -> Side {
    let mut count = 0;
    Box::new(move || {
        count += 1;
        bundle.time(&format!("bench-{count}"))
    })
}

pub fn run(lab: &Lab) -> Result<Pair> {
    both(|runtime| Ok(runs(Bundle::new(lab, runtime.into())?)))
}

pub fn run_userns(lab: &Lab) -> Result<Pair> {
    let theirs = Bundle::new(lab, Kind::RuncInUserNamespace)?;
    Ok(Pair::Both(runs(Bundle::new(lab, Kind::Ours)?), runs(theirs)))
}

/// crun refuses a machine with both versions of cgroups, so both sides run where the second version's tree is out of sight.
pub fn run_crun(lab: &Lab) -> Result<Pair> {
    if Command::new("crun").arg("--version").output().is_err() {
        return Ok(Pair::Skip("no `crun` on the PATH (Debian package crun)".to_owned()));
    }
    let side = |kind| -> Result<Side> { apart(Bundle::new(lab, kind)?) };
    Ok(Pair::Both(side(Kind::Ours)?, side(Kind::Crun)?))
}

/// Takes each sample in a thread with a mount namespace of its own, in which only version 1 of cgroups is mounted, if the
/// machine has both.
fn apart(bundle: Bundle) -> Result<Side> {
    let (ask, asked) = std::sync::mpsc::channel::<()>();
    let (answer, answered) = std::sync::mpsc::channel::<Result<f64>>();
    let (ready, is_ready) = std::sync::mpsc::channel::<Result<()>>();
    std::thread::spawn(move || {
        // Whoever asked is gone if an answer finds nobody: then there is nothing to do but to end.
        if ready.send(hide_second_version()).is_err() {
            return;
        }
        let mut run = runs(bundle);
        while asked.recv().is_ok() {
            if answer.send(run()).is_err() {
                return;
            }
        }
    });
    is_ready.recv().context("the thread apart")??;
    Ok(Box::new(move || {
        ask.send(()).context("the thread apart")?;
        answered.recv().context("the thread apart")?
    }))
}

/// Of the calling thread alone: it and its children no longer share the others' mount namespace.
fn hide_second_version() -> Result<()> {
    use nix::mount::{MntFlags, MsFlags, mount, umount2};
    nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS).context("unshare(CLONE_NEWNS)")?;
    mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>)
        .context("make / private")?;
    // Of the thread: /proc/self is the process, whose first thread has stayed where it was.
    let table = std::fs::read_to_string("/proc/thread-self/mountinfo").context("read mountinfo")?;
    if !table.lines().any(|line| line.contains(" - cgroup ")) {
        return Ok(());
    }
    for line in table.lines().filter(|line| line.contains(" - cgroup2 ")) {
        let place = line.split(' ').nth(4).context("mountinfo")?;
        umount2(place, MntFlags::MNT_DETACH).with_context(|| format!("umount {place}"))?;
    }
    Ok(())
}

/// `docker run --rm` of true, as a command line.
fn run_true(runtime: Runtime, image: &str) -> Result<Vec<String>> {
    let words = |list: &[&str]| list.iter().map(|&word| word.to_owned()).collect::<Vec<_>>();
    Ok([words(&["run", "--rm"]), options(runtime)?, words(&[image, "true"])].concat())
}

pub fn docker_run(lab: &Lab) -> Result<Pair> {
    both(|runtime| {
        let (docker, line) = (lab.docker.clone(), run_true(runtime, BUSYBOX)?);
        Ok(Box::new(move || docker.time(&line)))
    })
}

pub fn docker_run_16(lab: &Lab) -> Result<Pair> {
    both(|runtime| {
        let (docker, line) = (lab.docker.clone(), run_true(runtime, BUSYBOX)?);
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

/// An image of that many layers, a file in each but the first; it goes with this.
#[derive(Debug)]
struct Layers {
    docker: Docker,
    tag: String,
}

impl Layers {
    fn make(lab: &Lab, count: usize) -> Result<Self> {
        let tag = format!("sysbox-bench/layers:{count}");
        let dir = lab.dir(&format!("layers-{count}"))?;
        std::fs::write(dir.join("file"), "x").context("a file for each layer")?;
        let copies = (1..count).map(|layer| format!("COPY file /layer/{layer}\n"));
        let text = std::iter::once(format!("FROM {BUSYBOX}\n")).chain(copies).collect::<String>();
        std::fs::write(dir.join("Dockerfile"), text).context("Dockerfile")?;
        let layers = Self { docker: lab.docker.clone(), tag };
        let dir = dir.to_str().context("a path in UTF-8")?;
        // The builder that every engine has; it copies without a container.
        let mut build = layers.docker.command(["build", "-q", "-t", &layers.tag, dir]);
        measure::run(build.env("DOCKER_BUILDKIT", "0"), LIMIT)?;
        let shape = layers.docker.run(["inspect", "-f", "{{len .RootFS.Layers}}", &layers.tag])?;
        anyhow::ensure!(shape.trim() == count.to_string(), "{} has {} layers", layers.tag, shape.trim());
        Ok(layers)
    }
}

impl Drop for Layers {
    fn drop(&mut self) {
        if let Err(error) = self.docker.run(["rmi", "-f", &self.tag]) {
            eprintln!("bench: {error:#}");
        }
    }
}

/// `docker run --rm true` of an image of `LAYERS` layers.
pub fn docker_run_layers<const LAYERS: usize>(lab: &Lab) -> Result<Pair> {
    let image = Rc::new(Layers::make(lab, LAYERS)?);
    both(|runtime| {
        let (docker, image, line) = (lab.docker.clone(), Rc::clone(&image), run_true(runtime, &image.tag)?);
        Ok(Box::new(move || {
            // The closure keeps the image.
            let _kept = &image;
            docker.time(&line)
        }))
    })
}

pub fn docker_exec(lab: &Lab) -> Result<Pair> {
    both(|runtime| {
        let docker = lab.docker.clone();
        let machine = Machine::start(&docker, &options(runtime)?, BUSYBOX)?;
        Ok(Box::new(move || docker.time(["exec", &machine.name, "true"])))
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

/// Of both daemons beside `IDLE` containers.
pub fn memory<const IDLE: usize>(lab: &Lab) -> Result<Pair> {
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
