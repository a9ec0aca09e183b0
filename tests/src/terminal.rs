//! Both ends of what a runtime does with terminals and descriptors: somebody who listens at a socket and gets a descriptor,
//! and a person's terminal that a runtime is called from. Owns no expectation.

use std::fs::File;
use std::io::{IoSliceMut, Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::pty::{Winsize, openpty};
use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};

use crate::beside::Side;

/// Far above what any machine needs.
const LIMIT: Duration = Duration::from_secs(30);

fn readable(fd: &impl AsFd, deadline: Instant) -> bool {
    let left = deadline.saturating_duration_since(Instant::now());
    let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
    poll(&mut [PollFd::new(fd.as_fd(), PollFlags::POLLIN)], timeout).is_ok_and(|ready| ready > 0)
}

/// Who listens at `--console-socket` or `--pidfd-socket`.
#[derive(Debug)]
pub struct Listener(UnixListener);

impl Listener {
    pub fn at(path: &Path) -> Self {
        Self(UnixListener::bind(path).expect("bind in our own directory"))
    }

    /// The next descriptor that comes, and the bytes that it comes with.
    #[track_caller]
    pub fn take(&self) -> (String, OwnedFd) {
        assert!(readable(&self.0, Instant::now() + LIMIT), "nobody connected");
        let (peer, _) = self.0.accept().expect("accept");
        take_from(&peer)
    }

    /// Whether somebody has connected that was not taken.
    pub fn has_more(&self) -> bool {
        readable(&self.0, Instant::now())
    }
}

#[track_caller]
fn take_from(peer: &UnixStream) -> (String, OwnedFd) {
    assert!(readable(peer, Instant::now() + LIMIT), "nothing was sent");
    let mut bytes = [0u8; 4096];
    let mut space = nix::cmsg_space!([RawFd; 8]);
    let mut parts = [IoSliceMut::new(&mut bytes)];
    let got = recvmsg::<()>(peer.as_raw_fd(), &mut parts, Some(&mut space), MsgFlags::MSG_CMSG_CLOEXEC)
        .expect("recvmsg");
    let mut all = Vec::new();
    for message in got.cmsgs().expect("whole control messages") {
        if let ControlMessageOwned::ScmRights(fds) = message {
            all.extend(fds.into_iter().map(sysbox_sys::socket::adopt));
        }
    }
    let length = got.bytes;
    assert_eq!(all.len(), 1, "one descriptor");
    let one = all.pop().expect("one descriptor");
    (String::from_utf8_lossy(&bytes[..length]).into_owned(), one)
}

/// The master of a terminal, and what was read from it.
#[derive(Debug)]
pub struct Screen {
    master: File,
    pub text: String,
}

impl Screen {
    pub fn new(master: OwnedFd) -> Self {
        Self { master: master.into(), text: String::new() }
    }

    pub fn resize(&self, columns: u16, rows: u16) {
        sysbox_sys::terminal::set_size(self.master.as_fd(), columns, rows).expect("TIOCSWINSZ");
    }

    pub fn type_in(&mut self, text: &str) {
        self.master.write_all(text.as_bytes()).expect("a terminal takes what is typed");
    }

    /// Reads until `mark` was written.
    #[track_caller]
    pub fn until(&mut self, mark: &str) {
        let deadline = Instant::now() + LIMIT;
        while !self.text.contains(mark) {
            assert!(readable(&self.master, deadline), "no {mark:?} within 30 s: {:?}", self.text);
            assert!(self.read(), "ended without {mark:?}: {:?}", self.text);
        }
    }

    /// Reads until all have closed the other side, and returns it all.
    #[track_caller]
    pub fn to_end(&mut self) -> String {
        let deadline = Instant::now() + LIMIT;
        loop {
            assert!(readable(&self.master, deadline), "open after 30 s: {:?}", self.text);
            if !self.read() {
                return self.text.clone();
            }
        }
    }

    fn read(&mut self) -> bool {
        let mut bytes = [0; 4096];
        // EIO is the end of a terminal.
        let length = self.master.read(&mut bytes).unwrap_or(0);
        self.text.push_str(&String::from_utf8_lossy(&bytes[..length]));
        length > 0
    }
}

/// A runtime called from a terminal of its own, as a person calls it.
#[derive(Debug)]
pub struct Seat {
    pub screen: Screen,
    child: Child,
}

impl Seat {
    pub fn call(side: &Side, line: &str, id: &str, columns: u16, rows: u16) -> Self {
        let size = Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
        let pair = openpty(Some(&size), None).expect("openpty");
        let again = || pair.slave.try_clone().expect("dup");
        let mut command = Command::new("/usr/bin/setsid");
        command.args(["--ctty", "--wait", "timeout", "--foreground", "-k", "5", "60"]);
        command.args(side.words(line, id)).current_dir(&side.dir);
        command.stdin(again()).stdout(again()).stderr(again());
        let child = command.spawn().expect("run setsid");
        // What is left open of it is the runtime's: its end is the terminal's.
        Self { screen: Screen::new(pair.master), child }
    }

    /// Waits until the runtime has made the terminal raw: from then on it only hands on.
    #[track_caller]
    pub fn until_raw(&self) {
        use nix::sys::termios::{LocalFlags, tcgetattr};
        let deadline = Instant::now() + LIMIT;
        let is_raw = || {
            let facts = tcgetattr(&self.screen.master).expect("the master tells of the terminal");
            !facts.local_flags.contains(LocalFlags::ICANON)
        };
        while !is_raw() {
            assert!(Instant::now() < deadline, "not raw within 30 s: {:?}", self.screen.text);
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// The exit code, and all that was on the screen.
    #[track_caller]
    pub fn end(mut self) -> (i32, String) {
        let text = self.screen.to_end();
        let code = self.child.wait().expect("wait for our own child").code().unwrap_or(-1);
        (code, text)
    }
}
