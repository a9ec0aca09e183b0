//! Overlays of containers that have ended, kept for a moment. The last holder of one pays for the kernel's sync of the whole
//! file system beneath (`ovl_sync_fs`), while the engine does its own on the way to the end of `docker run`: so they go later, one
//! by one, in a thread that has nothing else to do.

use std::os::fd::OwnedFd;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::{Duration, Instant};

use sysbox_sys::Result;
use sysbox_sys::error::Named;
use tracing::debug;

const LINGER: Duration = Duration::from_secs(3);
/// As many are kept at most.
const MOST: usize = 128;

#[derive(Debug, Clone)]
pub struct Ended(SyncSender<(Instant, OwnedFd)>);

impl Ended {
    /// # Errors
    /// No thread.
    pub fn start() -> Result<Self> {
        let (sender, receiver) = sync_channel(MOST);
        std::thread::Builder::new()
            .name("ended".into())
            .stack_size(64 * 1024)
            .spawn(move || close_each(&receiver))
            .named(|| "start the thread `ended`".to_owned())?;
        Ok(Self(sender))
    }

    /// Where too many wait, the caller closes it, and waits for that.
    pub fn keep(&self, overlay: OwnedFd) {
        if let Err(refused) = self.0.try_send((Instant::now() + LINGER, overlay)) {
            debug!(%refused, "an overlay is closed at once");
        }
    }
}

fn close_each(overlays: &Receiver<(Instant, OwnedFd)>) {
    while let Ok((at, overlay)) = overlays.recv() {
        std::thread::sleep(at.saturating_duration_since(Instant::now()));
        drop(overlay);
    }
}
