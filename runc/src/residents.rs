//! The processes in a container's cgroups: who they are, a signal for each, and an end that nothing they do can put off: not
//! forking, not a freezer of their own (version 1), not waiting for an answer of their own (FUSE).

use std::path::Path;
use std::time::{Duration, Instant};

use nix::unistd::Pid;
use sysbox_ipc::IdMap;
use sysbox_sys::process::{Held, identify};

use crate::cgroup::{Cgroup, Kind, LIMIT, paths_of_held};
use crate::freezer;
use crate::fuse;
use crate::nested::{self, Step};

/// After this time without an end something holds them that a signal does not reach.
const HANGING: Duration = Duration::from_millis(200);
const ABORT_EVERY: Duration = Duration::from_millis(500);

impl Cgroup {
    /// Every process of the container: all are born in its anchors, which no process can leave. Where there are none (a
    /// host with version 1 controllers alone), those in any hierarchy.
    pub fn processes(&self) -> Vec<Pid> {
        processes(self)
    }
}

fn processes(cgroup: &Cgroup) -> Vec<Pid> {
    let mut all = Vec::new();
    for tree in trees(cgroup) {
        let walked = nested::walk(&tree, &mut |step, dir| {
            if let Step::Enter = step {
                let text = nested::read(dir, "cgroup.procs").ok().flatten().unwrap_or_default();
                all.extend(text.lines().filter_map(|line| line.parse().ok()).map(Pid::from_raw));
            }
            Ok(())
        });
        if let Err(error) = walked {
            tracing::debug!(%error, tree = %tree.display(), "not all of a cgroup's processes are known");
        }
    }
    all.sort_unstable();
    all.dedup();
    all
}

fn trees(cgroup: &Cgroup) -> Vec<std::path::PathBuf> {
    if cgroup.parent.as_os_str().is_empty() {
        return Vec::new();
    }
    let anchored = cgroup.hierarchies.iter().any(|h| h.is_anchor());
    let counted = cgroup.hierarchies.iter().filter(|h| !anchored || h.is_anchor());
    counted.map(|h| h.mount.join(&cgroup.parent)).collect()
}

/// Those that are there now, each held: the pid that a cgroup names may be another's by the time that one looks.
fn held(cgroup: &Cgroup) -> Vec<Held> {
    let belongs = |held: &Held| {
        let below = |path: &Path| path.strip_prefix("/").unwrap_or(path).starts_with(&cgroup.parent);
        paths_of_held(held).is_ok_and(|paths| paths.iter().any(|(_, path)| below(path)))
    };
    let open = |pid: Pid| identify(pid.as_raw()).and_then(Held::open).ok();
    processes(cgroup).into_iter().filter_map(open).filter(belongs).collect()
}

/// Ends every one of them, and those that they bear meanwhile. Returns when there is none, or after a time in which any
/// process that can be ended has ended.
pub fn kill_all(cgroup: &Cgroup, ids: &IdMap) {
    let begun = Instant::now();
    let mut pause = Duration::from_micros(100);
    let mut abort_at = begun + HANGING;
    while !processes(cgroup).is_empty() && begun.elapsed() < LIMIT {
        if !kill_by_cgroup(cgroup) {
            for process in held(cgroup) {
                // Gone already is as good.
                let _gone = process.kill();
            }
        }
        let_die(cgroup);
        // Reads much of /proc.
        if abort_at <= Instant::now() {
            fuse::abort(cgroup, ids);
            abort_at = Instant::now() + ABORT_EVERY;
        }
        std::thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(20));
    }
}

/// cgroup.kill (Linux 5.14) reaches those that are being born as well. False where a hierarchy has none.
fn kill_by_cgroup(cgroup: &Cgroup) -> bool {
    let anchors = || cgroup.hierarchies.iter().filter(|h| h.is_anchor());
    anchors().any(|h| h.kind != Kind::V1)
        && anchors().filter(|h| h.kind != Kind::V1).all(|h| {
            std::fs::OpenOptions::new()
                .write(true)
                .open(h.mount.join(&cgroup.parent).join("cgroup.kill"))
                .and_then(|mut file| std::io::Write::write_all(&mut file, b"1"))
                .is_ok()
        })
}

/// By version 1 what is frozen does not die, be it frozen from outside or by the container itself.
pub fn let_die(cgroup: &Cgroup) {
    if let Err(error) = freezer::release(cgroup) {
        tracing::debug!(%error, "not thawed");
    }
}

/// After an init was sent SIGKILL: lets it die, if something holds it. With init goes all that is in its pid namespace, and
/// init ends last.
pub fn see_off(init: &Held, cgroup: &Cgroup, ids: &IdMap) {
    let_die(cgroup);
    let ended = init.wait_until(Instant::now() + HANGING);
    if !ended.unwrap_or(true) {
        let_die(cgroup);
        fuse::abort(cgroup, ids);
    }
}
