//! One sysbox-fs a run directory: a lock that the kernel releases when its holder is dead, and not before. That is also how
//! a successor knows that its predecessor reads no more requests.

use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use sysbox_ipc::mgr::Process;
use sysbox_sys::SysError;
use sysbox_sys::error::Named;
use sysbox_sys::process;

/// For a predecessor that was killed a moment ago and still looks alive.
const PATIENCE: Duration = Duration::from_secs(1);
/// For one that is dead and whose last thread the kernel has not let go.
const PATIENCE_WITH_THE_DEAD: Duration = Duration::from_secs(30);

#[derive(Debug)]
pub struct Lock {
    _held: Flock<File>,
}

#[derive(Debug, thiserror::Error)]
pub enum LockError {
    #[error(transparent)]
    Sys(#[from] SysError),
    #[error("another sysbox-fs{} runs in {}\nhint: stop it first, or give this one its own `--run-dir` and `--mountpoint`", holder.map(|p| format!(" (pid {})", p.pid)).unwrap_or_default(), directory.display())]
    Held { holder: Option<Process>, directory: PathBuf },
    #[error("process {} still holds {} though it is dead", holder.pid, path.display())]
    HeldByTheDead { holder: Process, path: PathBuf },
}

/// Takes the lock of a run directory, waiting a little for a holder that is on its way out.
///
/// # Errors
/// `Held` if another daemon lives.
pub fn acquire(directory: &Path) -> Result<Lock, LockError> {
    let path = directory.join("fs.lock");
    let shown = || format!("open({})", path.display());
    let mut file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(&path)
        .named(shown)?;
    let begun = Instant::now();
    let mut held = loop {
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(held) => break held,
            Err((back, Errno::EAGAIN | Errno::EINTR)) => file = back,
            Err((_, errno)) => return Err(SysError::new(errno, format!("flock({})", path.display())).into()),
        }
        let holder = holder(&mut file);
        match holder.filter(|holder| !process::is_alive(*holder)) {
            Some(holder) if begun.elapsed() > PATIENCE_WITH_THE_DEAD => {
                return Err(LockError::HeldByTheDead { holder, path });
            }
            None if begun.elapsed() > PATIENCE => {
                return Err(LockError::Held { holder, directory: directory.to_owned() });
            }
            _ => std::thread::sleep(Duration::from_millis(2)),
        }
    };
    let me = process::myself()?;
    let what = || format!("write({})", path.display());
    held.set_len(0).named(what)?;
    held.rewind().named(what)?;
    held.write_all(format!("{} {}\n", me.pid, me.start_ticks).as_bytes()).named(what)?;
    Ok(Lock { _held: held })
}

fn holder(file: &mut File) -> Option<Process> {
    let mut text = String::new();
    file.rewind().ok()?;
    file.take(64).read_to_string(&mut text).ok()?;
    let (pid, start_ticks) = text.trim_end().split_once(' ')?;
    Some(Process { pid: pid.parse().ok()?, start_ticks: start_ticks.parse().ok()? })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_lock_names_the_holder_and_a_released_one_is_free() {
        let dir = tempfile::tempdir().unwrap();
        let first = acquire(dir.path()).unwrap();
        let refused = acquire(dir.path()).unwrap_err().to_string();
        let expected = format!(
            "another sysbox-fs (pid {}) runs in {}\nhint: ",
            std::process::id(),
            dir.path().display()
        );
        assert!(refused.starts_with(&expected), "{refused}");
        drop(first);
        acquire(dir.path()).unwrap();
    }

    #[test]
    fn garbage_in_the_file_is_no_holder() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("fs.lock"), b"\xff\xfe who knows").unwrap();
        let _first = acquire(dir.path()).unwrap();
        assert!(matches!(acquire(dir.path()), Err(LockError::Held { holder: Some(_), .. })));
    }
}
