//! What sysbox-runc asks: a thread a conversation, a bounded number of them.

use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use fuser::Notifier;
use sysbox_ipc::fs::{Prepared, Reply, Request};
use sysbox_ipc::{ContainerKey, Hello, PROTOCOL_VERSION, Refusal, RefusalKind};
use sysbox_sys::process;
use sysbox_sys::socket::{Connection, Listener, SocketError};

use crate::registry::{Container, Registry, Slot};
use crate::tree;
use crate::vproc;
use crate::vproc::view::Source;

/// Conversations at once; further peers wait in the socket's backlog.
const MOST_CONVERSATIONS: usize = 64;
/// For a peer that says nothing.
const PATIENCE: Duration = Duration::from_secs(60);
const STACK: usize = 256 * 1024;

#[derive(Debug)]
pub struct Server {
    pub registry: Arc<Registry>,
    pub source: Arc<Source>,
    pub notifier: Notifier,
    pub mountpoint: PathBuf,
}

impl Server {
    /// Accepts for ever.
    pub fn serve(self: Arc<Self>, listener: &Listener) -> ! {
        let room = Arc::new(Room::default());
        loop {
            room.enter();
            match listener.accept() {
                Ok(peer) => {
                    let (server, room_of_it) = (Arc::clone(&self), Arc::clone(&room));
                    let thread = std::thread::Builder::new().name("rpc".to_owned()).stack_size(STACK);
                    let begun = thread.spawn(move || {
                        let _leaves = Leaves(room_of_it);
                        if let Err(error) = server.converse(&peer) {
                            tracing::debug!(%error, "a conversation broke off");
                        }
                    });
                    // The closure and with it the place in the room are dropped with the error.
                    if let Err(error) = begun {
                        tracing::warn!(%error, "no thread for a conversation");
                        room.leave();
                    }
                }
                Err(error) => {
                    tracing::warn!(%error, "cannot accept");
                    room.leave();
                    std::thread::sleep(Duration::from_millis(100));
                }
            }
        }
    }

    fn converse(&self, peer: &Connection) -> Result<(), SocketError> {
        peer.set_timeout(PATIENCE)?;
        let mut greeted = false;
        loop {
            let request = match peer.recv() {
                Ok(Some((request, _unwanted_fds))) => request,
                Ok(None) => return Ok(()),
                Err(error @ SocketError::Malformed(_)) => {
                    let refusal = Refusal::new(RefusalKind::Malformed, error.to_string());
                    return peer.send(&Reply::Refused(refusal), &[]);
                }
                Err(error) => return Err(error),
            };
            let reply = match (request, greeted) {
                (Request::Hello(hello), _) => match greet(&hello) {
                    Ok(reply) => {
                        greeted = true;
                        reply
                    }
                    Err(refusal) => return peer.send(&Reply::Refused(refusal), &[]),
                },
                (_, false) => {
                    let refusal = Refusal::new(RefusalKind::Malformed, "the first message must be `hello`");
                    return peer.send(&Reply::Refused(refusal), &[]);
                }
                (request, true) => self.answer(request).unwrap_or_else(Reply::Refused),
            };
            peer.send(&reply, &[])?;
        }
    }

    fn answer(&self, request: Request) -> Result<Reply, Refusal> {
        match request {
            Request::Hello(hello) => greet(&hello),
            Request::Prepare { key, slot, root_uid, root_gid } => {
                let directory = self.mountpoint.join(key.slug());
                self.add(Container::new(key.clone(), Slot(slot), root_uid, root_gid))?;
                tracing::info!(container = %key, slot, root_uid, root_gid, "prepared");
                Ok(Reply::Prepared(Prepared {
                    directory,
                    leaves: vproc::leaves().map(str::to_owned).collect(),
                }))
            }
            Request::Register { key, init } => {
                // While it is alive, so that the cgroup is not one of a later process with its pid.
                let cgroup = self.source.container_cgroup(init.pid).filter(|_| process::is_alive(init));
                if !self.registry.set_init(&key, init, cgroup) {
                    let message = format!("container {key} is not prepared");
                    return Err(Refusal::new(RefusalKind::NotFound, message));
                }
                tracing::info!(container = %key, pid = init.pid, "registered");
                Ok(Reply::Done)
            }
            Request::Unregister { key } => {
                if let Some(stale) = self.registry.remove(&key) {
                    tree::forget(&self.notifier, &stale);
                    tracing::info!(container = %key, "unregistered");
                }
                Ok(Reply::Done)
            }
            Request::List { after } => {
                let mut keys: Vec<_> =
                    self.registry.all().into_iter().map(|container| container.key.clone()).collect();
                keys.sort();
                let (keys, more) = page(keys, after.as_ref());
                Ok(Reply::Containers { keys, more })
            }
        }
    }

    fn add(&self, container: Container) -> Result<(), Refusal> {
        let stale = self.registry.add(container, process::is_alive)?;
        stale.iter().for_each(|stale| tree::forget(&self.notifier, stale));
        Ok(())
    }
}

fn greet(hello: &Hello) -> Result<Reply, Refusal> {
    if hello.version == PROTOCOL_VERSION {
        return Ok(Reply::Hello(Hello::from_program("sysbox-fs")));
    }
    let message = format!(
        "{:.40} speaks protocol version {}, sysbox-fs speaks {PROTOCOL_VERSION}",
        hello.program.escape_default().to_string(),
        hello.version
    );
    Err(Refusal::new(RefusalKind::Version, message).with_hint("restart the daemons after an upgrade"))
}

/// The keys after `after` that fit in a message with ease, and whether there are others.
fn page(sorted: Vec<ContainerKey>, after: Option<&ContainerKey>) -> (Vec<ContainerKey>, bool) {
    let mut room = sysbox_ipc::MAX_MESSAGE / 2;
    let mut rest = sorted.into_iter().filter(|key| after.is_none_or(|after| key > after)).peekable();
    let mut page = Vec::new();
    while let Some(key) = rest.next_if(|key| {
        // JSON writes a byte in six at most.
        let size = 6 * key.root.as_os_str().len() + key.id.as_str().len() + 64;
        let fits = size <= room || room == sysbox_ipc::MAX_MESSAGE / 2;
        room = room.saturating_sub(size);
        fits
    }) {
        page.push(key);
    }
    let more = rest.peek().is_some();
    (page, more)
}

/// Counts conversations.
#[derive(Debug, Default)]
struct Room {
    inside: Mutex<usize>,
    left: Condvar,
}

impl Room {
    fn enter(&self) {
        let mut inside = self.inside.lock().unwrap_or_else(PoisonError::into_inner);
        while *inside >= MOST_CONVERSATIONS {
            inside = self.left.wait(inside).unwrap_or_else(PoisonError::into_inner);
        }
        *inside += 1;
    }

    fn leave(&self) {
        *self.inside.lock().unwrap_or_else(PoisonError::into_inner) -= 1;
        self.left.notify_one();
    }
}

struct Leaves(Arc<Room>);

impl Drop for Leaves {
    fn drop(&mut self) {
        self.0.leave();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;
    use sysbox_ipc::ContainerId;

    #[test]
    fn pages_hold_every_key_once_and_fit_in_a_message() {
        let key = |n: u32| {
            let id = ContainerId::parse(&format!("{n:064}")).unwrap();
            ContainerKey::new(Path::new("/run/docker/runtime-runc/moby"), id)
        };
        let all: Vec<_> = (0..2000).map(key).collect();
        let mut seen: Vec<ContainerKey> = Vec::new();
        loop {
            let (keys, more) = page(all.clone(), seen.last());
            assert!(!keys.is_empty());
            seen.extend(keys.iter().cloned());
            let size = serde_json::to_vec(&Reply::Containers { keys, more }).unwrap().len();
            assert!(size <= sysbox_ipc::MAX_MESSAGE, "{size}");
            if !more {
                break;
            }
        }
        assert_eq!(seen, all);
        assert_eq!(page(vec![], None), (vec![], false));
    }

    #[test]
    fn another_protocol_version_is_refused_with_a_remedy() {
        let refused = greet(&Hello { version: 99, program: "sysbox-runc\n".to_owned() }).unwrap_err();
        assert_eq!(refused.kind, RefusalKind::Version);
        assert_eq!(refused.message, "sysbox-runc\\n speaks protocol version 99, sysbox-fs speaks 1");
    }
}
