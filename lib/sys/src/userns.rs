//! User namespaces made only for their id maps, to be given to MOUNT_ATTR_IDMAP.

use std::fs::File;
use std::io::Write;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::wait::waitpid;
use nix::unistd::Pid;
use sysbox_ipc::{IdMap, IdMapLine};

use crate::error::{Named, Result};

/// The text of a uid_map or gid_map file (user_namespaces(7)).
pub fn map_text(lines: &[IdMapLine]) -> String {
    lines.iter().map(|l| format!("{} {} {}\n", l.inside, l.outside, l.count)).collect()
}

/// A user namespace that exists for its maps. The process that made it ends by itself; it is collected when this goes.
#[derive(Debug)]
pub struct MapNamespace {
    fd: OwnedFd,
    maker: Pid,
}

impl AsFd for MapNamespace {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Drop for MapNamespace {
    fn drop(&mut self) {
        collect(self.maker);
    }
}

fn collect(maker: Pid) {
    // ECHILD: the caller collects all its children; there is nothing left to do then.
    while let Err(Errno::EINTR) = waitpid(maker, None) {}
}

/// A user namespace with these maps and no process in it. The caller must be single-threaded or content that the child
/// does nothing but wait.
///
/// # Errors
/// `EPERM`/`ENOSPC` where user namespaces are switched off or used up (`user.max_user_namespaces`), `EINVAL` for a map the
/// kernel refuses.
pub fn with_maps(map: &IdMap) -> Result<MapNamespace> {
    with_lines(map.uids(), map.gids())
}

/// As [`with_maps`], of lines that need not make a container's map.
///
/// # Errors
/// As [`with_maps`].
pub fn with_lines(uids: &[IdMapLine], gids: &[IdMapLine]) -> Result<MapNamespace> {
    let (reader, writer) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC).named(|| "pipe2".to_owned())?;
    // The child has a copy-on-write copy of this process, which in the small runtime is cheap enough; it only waits.
    let maker = spawn_waiting(reader.as_raw_fd(), writer.as_raw_fd())?;
    let made = (|| {
        write_map(maker, "uid_map", uids)?;
        write_map(maker, "gid_map", gids)?;
        let path = format!("/proc/{maker}/ns/user");
        File::open(&path).named(|| format!("open({path})")).map(OwnedFd::from)
    })();
    // It reads the end of the pipe and ends, while the caller is already using the namespace.
    drop(writer);
    match made {
        Ok(fd) => Ok(MapNamespace { fd, maker }),
        Err(error) => {
            collect(maker);
            Err(error)
        }
    }
}

fn write_map(pid: Pid, file: &str, lines: &[IdMapLine]) -> Result<()> {
    let path = format!("/proc/{pid}/{file}");
    let text = map_text(lines);
    let write = || File::options().write(true).open(&path)?.write_all(text.as_bytes());
    write().named(|| format!("write({path}, {:?})", text.trim_end()))
}

/// The user namespace that a namespace belongs to (ioctl_nsfs(2), `NS_GET_USERNS`).
///
/// # Errors
/// `EPERM` for one above the caller's own, `ENOTTY` for what is no namespace.
pub fn owner_of(namespace: BorrowedFd<'_>) -> Result<OwnedFd> {
    const NS_GET_USERNS: libc::Ioctl = 0xb701;
    // SAFETY: it takes no argument and writes to nothing of ours.
    let fd = unsafe { libc::ioctl(namespace.as_raw_fd(), NS_GET_USERNS) };
    let fd = Errno::result(fd).named(|| "ioctl(NS_GET_USERNS)".to_owned())?;
    // SAFETY: the kernel has made this descriptor for us (close-on-exec), and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

const STACK: usize = 16 * 1024;

struct Pipe {
    reader: i32,
    writer: i32,
}

fn spawn_waiting(reader: i32, writer: i32) -> Result<Pid> {
    extern "C" fn wait(argument: *mut libc::c_void) -> libc::c_int {
        // SAFETY: `argument` is the boxed Pipe below, leaked for the life of this child.
        let pipe = unsafe { &*argument.cast::<Pipe>() };
        // SAFETY: close(2) of the copy that the clone gave us: without it, read would never see the end.
        unsafe { libc::close(pipe.writer) };
        let mut byte = 0u8;
        // SAFETY: reads one byte into a local variable; ends with 0 when the parent closes its side.
        unsafe { libc::read(pipe.reader, (&raw mut byte).cast(), 1) };
        0
    }
    // Without CLONE_VM the child has its own copy of this stack and of the Pipe.
    let mut stack = vec![0u8; STACK];
    let pipe = Pipe { reader, writer };
    let top = stack.as_mut_ptr_range().end;
    // SAFETY: aligning down inside the allocation that `stack` owns.
    let top = unsafe { top.sub(top.addr() % 16) };
    let flags = libc::CLONE_NEWUSER | libc::SIGCHLD;
    let argument = (&raw const pipe).cast_mut().cast();
    // SAFETY: `wait` matches the signature, `top` is the aligned end of a stack that is copied with the address space, and
    // the child makes only async-signal-safe calls.
    let pid = unsafe { libc::clone(wait, top.cast(), flags, argument) };
    Errno::result(pid).map(Pid::from_raw).named(|| "clone(CLONE_NEWUSER)".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use sysbox_ipc::IdRange;

    #[test]
    fn the_namespace_outlives_its_process() {
        let map = IdMap::of_range(IdRange { start: 300_000, count: 65536 }).unwrap();
        let one = with_maps(&map).unwrap();
        let two = with_maps(&map).unwrap();
        let inode = |space: &MapNamespace| nix::sys::stat::fstat(space).unwrap().st_ino;
        assert_ne!(inode(&one), inode(&two));
    }

    #[test]
    fn several_lines_are_written_as_one_map() {
        let line = |inside, outside, count| IdMapLine { inside, outside, count };
        let lines = vec![line(0, 300_000, 1000), line(1000, 400_000, 2000)];
        assert_eq!(map_text(&lines), "0 300000 1000\n1000 400000 2000\n");
        with_maps(&IdMap::new(lines.clone(), lines).unwrap()).unwrap();
    }
}
