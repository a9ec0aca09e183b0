//! Rows about an engine inside: until it answers, what it does, and what its images cost from outside. Theirs has its data
//! root on a volume, since an overlay cannot lie on another.

use std::rc::Rc;

use anyhow::{Context, Result};
use sysbox_tests::engine::DEBIAN;
use sysbox_tests::measure::Side;

use crate::Pair;
use crate::lab::{Lab, Machine, Runtime, options};
use crate::rows::both;

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

/// A container with a running engine, busybox in it, and in /var/tmp a tar of the container's own /usr and an image of it.
fn busy(lab: &Lab, runtime: Runtime) -> Result<Rc<Machine>> {
    lab.shared("busy", runtime, || {
        let machine = Machine::host(&lab.docker, runtime)?;
        machine.start_engine()?;
        machine.import_busybox()?;
        machine.exec(&[
            "sh",
            "-ec",
            "cd /var/tmp
             tar -C / -cf usr.tar usr/lib usr/share
             docker import usr.tar usr >/dev/null
             docker save -o image.tar usr
             docker rmi usr >/dev/null
             sync",
        ])?;
        Ok(machine)
    })
}

/// How long a shell inside takes for `work`, in milliseconds by its own clock, after `before`.
fn timed_inside(machine: &Machine, before: &str, work: &str) -> Result<f64> {
    let script = format!(
        "{before}
        start=$(date +%s%N)
        {{ {work}; }} >/dev/null || exit 1
        echo $(($(date +%s%N) - start))"
    );
    let said = machine.exec(&["sh", "-c", &script])?;
    let nanoseconds: f64 = said.trim().parse().with_context(|| format!("`{}` is not a time", said.trim()))?;
    Ok(nanoseconds / 1e6)
}

fn inside(lab: &Lab, before: &'static str, work: &'static str) -> Result<Pair> {
    both(|runtime| {
        let machine = busy(lab, runtime)?;
        Ok(Box::new(move || timed_inside(&machine, before, work)) as Side)
    })
}

pub fn load(lab: &Lab) -> Result<Pair> {
    inside(lab, "docker rmi -f usr >/dev/null 2>&1; sync", "docker load -qi /var/tmp/image.tar")
}

pub fn untar(lab: &Lab) -> Result<Pair> {
    inside(
        lab,
        "rm -rf /var/tmp/tree; mkdir /var/tmp/tree; sync",
        "tar -C /var/tmp/tree -xf /var/tmp/usr.tar",
    )
}

const WRITE_DOCKERFILE: &str = "printf 'FROM busybox\\nRUN echo 1 >a\\nRUN echo 2 >b\\nRUN echo 3 >c\\nRUN echo 4 >d\\nRUN echo 5 >e\\n' >/tmp/Dockerfile";
const BUILD: &str = "DOCKER_BUILDKIT=0 docker build -q --no-cache - </tmp/Dockerfile";

/// Five steps, each of which runs a container. In any user namespace this engine compares layers file by file, and at the end
/// of each step sleeps until the clock's next second, so as to tell a file that was changed within one (moby,
/// daemon/graphdriver/fsdiff.go).
pub fn build(lab: &Lab) -> Result<Pair> {
    inside(lab, WRITE_DOCKERFILE, BUILD)
}

/// The same with an engine that keeps its layers in containerd's store, which has no such rule.
pub fn build_store(lab: &Lab) -> Result<Pair> {
    both(|runtime| {
        let machine = lab.shared("store", runtime, || {
            let machine = Machine::host_of(&lab.docker, runtime, "sysbox/debian:sid")?;
            machine.exec(&[
                "sh",
                "-c",
                "mkdir -p /etc/docker
                 echo '{\"features\": {\"containerd-snapshotter\": true}}' >/etc/docker/daemon.json",
            ])?;
            machine.start_engine()?;
            machine.import_busybox()?;
            Ok(machine)
        })?;
        Ok(Box::new(move || timed_inside(&machine, WRITE_DOCKERFILE, BUILD)) as Side)
    })
}

/// `docker commit` of a container with inner images. Theirs has as many bytes in its layer as plain files, since what lies
/// on a volume is not committed at all.
pub fn commit(lab: &Lab) -> Result<Pair> {
    const TAG: &str = "sysbox-bench/committed";
    let bytes: u64 = if lab.quick { 1 << 24 } else { 1 << 28 };
    let ours = Machine::host(&lab.docker, Runtime::Ours)?;
    ours.start_engine()?;
    ours.import_random(bytes)?;
    let theirs = Machine::start(&lab.docker, &options(Runtime::Theirs)?, DEBIAN)?;
    theirs.exec(&["sh", "-c", &format!("head -c {bytes} /dev/urandom >/var/lib/random")])?;
    nix::unistd::sync();
    let side = |machine: Machine| -> Side {
        let docker = lab.docker.clone();
        Box::new(move || {
            let took = docker.time(["commit", &machine.name, TAG])?;
            docker.run(["rmi", "-f", TAG])?;
            Ok(took)
        })
    };
    Ok(Pair::Both(side(ours), side(theirs)))
}
