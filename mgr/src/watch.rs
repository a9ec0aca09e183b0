//! What wakes the daemon: peers, signals, the ends of processes (pidfds), and writable layers going away (inotify). One
//! epoll for all; nothing here knows what a wake-up leads to.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify, WatchDescriptor};
use sysbox_ipc::ContainerKey;
use sysbox_ipc::mgr::Process;
use sysbox_sys::error::Named;
use sysbox_sys::process::pidfd_open;
use sysbox_sys::{Result, SysError};

/// Why `wait` returned. In the order in which they are to be dealt with: what a runtime said before it ended comes first.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Woken {
    Signal,
    Peer(u64),
    Listener,
    Ended(ContainerKey),
    /// Something went away beside the layers of these containers.
    Layers(BTreeSet<ContainerKey>),
}

const LISTENER: u64 = 0;
const SIGNAL: u64 = 1;
const LAYERS: u64 = 2;
const FIRST_FREE: u64 = 3;

#[derive(Debug)]
pub struct Watch {
    epoll: Epoll,
    inotify: Inotify,
    next_token: u64,
    processes: HashMap<u64, ContainerKey>,
    pidfds: BTreeMap<ContainerKey, (u64, OwnedFd)>,
    layers: HashMap<WatchDescriptor, BTreeSet<ContainerKey>>,
}

impl Watch {
    /// # Errors
    /// No epoll or no inotify to be had.
    pub fn new() -> Result<Self> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).named(|| "epoll_create1".to_owned())?;
        let inotify = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK)
            .named(|| "inotify_init1".to_owned())?;
        epoll
            .add(&inotify, EpollEvent::new(EpollFlags::EPOLLIN, LAYERS))
            .named(|| "epoll_ctl(inotify)".to_owned())?;
        Ok(Self {
            epoll,
            inotify,
            next_token: FIRST_FREE,
            processes: HashMap::new(),
            pidfds: BTreeMap::new(),
            layers: HashMap::new(),
        })
    }

    /// # Errors
    /// `epoll_ctl` failing.
    pub fn listener(&self, fd: impl AsFd) -> Result<()> {
        self.add(fd, LISTENER)
    }

    /// # Errors
    /// `epoll_ctl` failing.
    pub fn signals(&self, fd: impl AsFd) -> Result<()> {
        self.add(fd, SIGNAL)
    }

    /// The number by which `wait` will name this peer. It is forgotten when its descriptor is closed.
    ///
    /// # Errors
    /// `epoll_ctl` failing.
    pub fn peer(&mut self, fd: impl AsFd) -> Result<u64> {
        let token = self.token();
        self.add(fd, token).map(|()| token)
    }

    /// Tells the end of `process`, once; an older process of the container is forgotten. `false`: it has ended already.
    ///
    /// # Errors
    /// No descriptor to be had.
    pub fn process(&mut self, key: &ContainerKey, process: Process) -> Result<bool> {
        self.forget_process(key);
        let pidfd = match pidfd_open(process) {
            Ok(pidfd) => pidfd,
            Err(error) if error.errno == Errno::ESRCH => return Ok(false),
            Err(error) => return Err(error),
        };
        let token = self.token();
        self.add(&pidfd, token)?;
        self.processes.insert(token, key.clone());
        self.pidfds.insert(key.clone(), (token, pidfd));
        Ok(true)
    }

    pub fn forget_process(&mut self, key: &ContainerKey) {
        if let Some((token, _pidfd)) = self.pidfds.remove(key) {
            self.processes.remove(&token);
        }
    }

    /// Tells when the directory `upper`, or the directory it is in, goes away.
    ///
    /// # Errors
    /// `ENOENT`: they are gone already; `ENOSPC`: fs.inotify.max_user_watches is used up.
    pub fn layer(&mut self, key: &ContainerKey, upper: &Path) -> Result<()> {
        let Some(dir) = upper.parent() else {
            return Err(SysError::new(Errno::EINVAL, "inotify_add_watch: no parent"));
        };
        // The deletion of the upper itself; of its directory, if that is moved away first (containerd does).
        let mask = AddWatchFlags::IN_DELETE
            | AddWatchFlags::IN_MOVED_FROM
            | AddWatchFlags::IN_DELETE_SELF
            | AddWatchFlags::IN_MOVE_SELF
            | AddWatchFlags::IN_ONLYDIR;
        let wd =
            self.inotify.add_watch(dir, mask).named(|| format!("inotify_add_watch({})", dir.display()))?;
        self.layers.entry(wd).or_default().insert(key.clone());
        Ok(())
    }

    pub fn forget_layer(&mut self, key: &ContainerKey) {
        let inotify = &self.inotify;
        self.layers.retain(|wd, keys| {
            let unwatched = keys.remove(key) && keys.is_empty();
            // EINVAL: the directory is gone and its watch with it.
            if let Some(Err(errno)) = unwatched.then(|| inotify.rm_watch(*wd)) {
                tracing::trace!(%errno, "inotify_rm_watch");
            }
            !keys.is_empty()
        });
    }

    /// Waits for the next events, at most `timeout`.
    ///
    /// # Errors
    /// `epoll_wait` failing for another reason than a signal.
    pub fn wait(&mut self, timeout: Option<Duration>) -> Result<Vec<Woken>> {
        // Rounded up: a deadline must have passed when its timeout has.
        let millis = timeout.map(|limit| u32::try_from(limit.as_millis() + 1).unwrap_or(u32::MAX));
        let limit =
            millis.map_or(EpollTimeout::NONE, |ms| EpollTimeout::try_from(ms).unwrap_or(EpollTimeout::MAX));
        let mut events = [EpollEvent::empty(); 64];
        let count = match self.epoll.wait(&mut events, limit) {
            Err(Errno::EINTR) => 0,
            other => other.named(|| "epoll_wait".to_owned())?,
        };
        let mut woken: Vec<Woken> =
            events[..count].iter().filter_map(|event| self.name(event.data())).collect();
        woken.sort();
        Ok(woken)
    }

    fn name(&mut self, token: u64) -> Option<Woken> {
        match token {
            LISTENER => Some(Woken::Listener),
            SIGNAL => Some(Woken::Signal),
            LAYERS => self.changed_layers().map(Woken::Layers),
            token => match self.processes.remove(&token) {
                // Its pidfd would report the end for ever.
                Some(key) => {
                    self.pidfds.remove(&key);
                    Some(Woken::Ended(key))
                }
                None => Some(Woken::Peer(token)),
            },
        }
    }

    fn changed_layers(&mut self) -> Option<BTreeSet<ContainerKey>> {
        let mut changed = BTreeSet::new();
        while let Ok(events) = self.inotify.read_events() {
            for event in events {
                if event.mask.contains(AddWatchFlags::IN_Q_OVERFLOW) {
                    changed.extend(self.layers.values().flatten().cloned());
                } else if event.mask.contains(AddWatchFlags::IN_IGNORED) {
                    changed.extend(self.layers.remove(&event.wd).into_iter().flatten());
                } else {
                    changed.extend(self.layers.get(&event.wd).into_iter().flatten().cloned());
                }
            }
        }
        (!changed.is_empty()).then_some(changed)
    }

    fn token(&mut self) -> u64 {
        self.next_token += 1;
        self.next_token - 1
    }

    fn add(&self, fd: impl AsFd, token: u64) -> Result<()> {
        self.epoll
            .add(fd, EpollEvent::new(EpollFlags::EPOLLIN, token))
            .named(|| format!("epoll_ctl(ADD, {token})"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use sysbox_ipc::ContainerId;

    const LIMIT: Option<Duration> = Some(Duration::from_secs(10));

    fn key(id: &str) -> ContainerKey {
        ContainerKey::new(Path::new("/run/r"), ContainerId::parse(id).unwrap())
    }

    #[test]
    fn the_end_of_a_process_is_told_once() {
        let mut watch = Watch::new().unwrap();
        let mut child = std::process::Command::new("sleep").arg("1000").spawn().unwrap();
        let process = sysbox_sys::process::identify(i32::try_from(child.id()).unwrap()).unwrap();
        assert!(watch.process(&key("a"), process).unwrap());
        assert!(watch.wait(Some(Duration::ZERO)).unwrap().is_empty());
        child.kill().unwrap();
        assert_eq!(watch.wait(LIMIT).unwrap(), [Woken::Ended(key("a"))]);
        assert!(watch.wait(Some(Duration::ZERO)).unwrap().is_empty());
        child.wait().unwrap();
        assert!(!watch.process(&key("a"), process).unwrap());
    }

    #[test]
    fn a_layer_is_missed_however_it_goes() {
        let away: [fn(&Path); 3] = [
            |id| std::fs::remove_dir_all(id).unwrap(),
            |id| std::fs::rename(id, id.with_file_name("rm-1")).unwrap(),
            |id| std::fs::rename(id.join("diff"), id.join("old")).unwrap(),
        ];
        for go in away {
            let dir = tempfile::tempdir().unwrap();
            let (id, upper) = (dir.path().join("id"), dir.path().join("id/diff"));
            std::fs::create_dir_all(&upper).unwrap();
            let mut watch = Watch::new().unwrap();
            watch.layer(&key("a"), &upper).unwrap();
            watch.layer(&key("b"), &upper).unwrap();
            std::fs::write(upper.join("file"), "").unwrap();
            std::fs::remove_file(upper.join("file")).unwrap();
            assert!(
                watch.wait(Some(Duration::ZERO)).unwrap().is_empty(),
                "what happens inside is nobody's business"
            );
            go(&id);
            assert_eq!(watch.wait(LIMIT).unwrap(), [Woken::Layers([key("a"), key("b")].into())]);
        }
    }

    #[test]
    fn a_forgotten_layer_is_not_told() {
        let dir = tempfile::tempdir().unwrap();
        let upper = dir.path().join("diff");
        std::fs::create_dir(&upper).unwrap();
        let mut watch = Watch::new().unwrap();
        watch.layer(&key("a"), &upper).unwrap();
        watch.forget_layer(&key("a"));
        std::fs::remove_dir(&upper).unwrap();
        assert!(watch.wait(Some(Duration::ZERO)).unwrap().is_empty());
        assert_eq!(watch.layer(&key("a"), &dir.path().join("x/diff")).unwrap_err().errno, Errno::ENOENT);
    }
}
