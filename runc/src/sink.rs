//! Where the words of a failing start are collected: libcontainer's processes hand on the outermost text alone, so its
//! error events and our own errors go into a pipe that the runtime reads when a start has failed.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::sync::OnceLock;

use nix::errno::Errno;
use nix::fcntl::OFlag;
use tracing::field::{Field, Visit};
use tracing_subscriber::Layer;
use tracing_subscriber::layer::Context;

/// The pipe of this process. Writing never blocks: what does not fit is lost.
#[derive(Debug)]
pub struct Sink {
    reader: File,
    writer: File,
}

static CURRENT: OnceLock<File> = OnceLock::new();

impl Sink {
    /// Makes the pipe and points [`Events`] at it. Once in a process.
    ///
    /// # Errors
    /// `pipe2` failing.
    pub fn open() -> std::io::Result<Self> {
        let (reader, writer): (OwnedFd, OwnedFd) = nix::unistd::pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK)?;
        let writer = File::from(writer);
        // A second sink in one process would get our own errors but not the events; there is one create or exec a process.
        let _first = CURRENT.set(writer.try_clone()?);
        Ok(Self { reader: reader.into(), writer })
    }

    /// Records the error that a person is to see.
    pub fn fail(&self, message: &str) {
        write_line(&self.writer, 'X', message);
    }

    /// The best account of what went wrong: our own words, or what libcontainer's error events amount to.
    pub fn first_failure(&self) -> Option<String> {
        let mut bytes = Vec::new();
        // Ends with EAGAIN, the writers being open; what was read until then is in the buffer.
        let _ends = (&self.reader).read_to_end(&mut bytes);
        let text = String::from_utf8_lossy(&bytes);
        let ours = text.lines().find_map(|line| line.strip_prefix('X')).map(str::to_owned);
        ours.or_else(|| account(&text.lines().filter_map(|line| line.strip_prefix('E')).collect::<Vec<_>>()))
    }
}

/// One line of libcontainer's events, innermost first. The first says what was attempted, often with a bare `syscall` or `io
/// error` for a reason; the errno is in the debug form of a later one, which had the whole error.
fn account(events: &[&str]) -> Option<String> {
    let first = *events.first()?;
    let attempt = mount_of(first).unwrap_or_else(|| {
        let bare = ["syscall", "failed syscall", "io error", "nix error"];
        first
            .rsplit_once(": ")
            .filter(|(_, why)| bare.contains(why))
            .map_or(first, |(what, _)| what)
            .to_owned()
    });
    Some(match events.iter().find_map(|event| errno_in(event)) {
        Some(errno) if !attempt.contains(errno.desc()) => {
            format!("{attempt}: {} ({errno:?})", errno.desc().to_lowercase())
        }
        _ if attempt == first => attempt,
        // No errno: the words that came after the mount are all there is.
        _ => format!("{attempt}: {}", first.rsplit_once("}: ").map_or(first, |(_, why)| why)),
    })
}

/// `failed to mount Mount { destination: "/x", typ: Some("tmpfs"), … }: …` in the words of a mount.
fn mount_of(event: &str) -> Option<String> {
    let mount = event.strip_prefix("failed to mount Mount { destination: ")?;
    let quoted = |text: &str| text.strip_prefix('"')?.split_once('"').map(|(word, _)| word.to_owned());
    let field = |name: &str| quoted(mount.split_once(name)?.1.strip_prefix("Some(")?);
    let (destination, typ) = (quoted(mount)?, field(" typ: ").unwrap_or_default());
    let bind = (typ == "bind").then(|| field(" source: ")).flatten().map(|source| format!(" of {source}"));
    Some(format!("mount {typ}{} on {destination}", bind.unwrap_or_default()))
}

/// The errno in the debug form of an error: nix's `Nix(ENODEV)`, or std's `Os { code: 20, … }`.
fn errno_in(event: &str) -> Option<Errno> {
    let word_after = |start: &str, end: char| Some(event.split_once(start)?.1.split_once(end)?.0);
    let by_name = |name: &str| (1..200).map(Errno::from_raw).find(|errno| format!("{errno:?}") == name);
    word_after("Nix(", ')')
        .and_then(by_name)
        .or_else(|| word_after("Os { code: ", ',')?.parse().ok().map(Errno::from_raw))
}

fn write_line(mut to: &File, kind: char, message: &str) {
    let flat: String = message.chars().map(|c| if c.is_control() { ' ' } else { c }).take(2000).collect();
    // A full pipe has enough words in it already.
    let _lost = to.write_all(format!("{kind}{flat}\n").as_bytes());
}

/// Copies error events into the sink.
#[derive(Debug)]
pub struct Events;

impl<S: tracing::Subscriber> Layer<S> for Events {
    fn on_event(&self, event: &tracing::Event<'_>, _: Context<'_, S>) {
        if *event.metadata().level() != tracing::Level::ERROR {
            return;
        }
        if let Some(file) = CURRENT.get() {
            let mut words = Words::default();
            event.record(&mut words);
            write_line(file, 'E', &format!("{}{}", words.message, words.fields));
        }
    }
}

#[derive(Default)]
struct Words {
    message: String,
    fields: String,
}

impl Visit for Words {
    fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
        if field.name() == "message" {
            self.message = format!("{value:?}");
        } else if !field.name().starts_with("log.") {
            self.fields.push_str(&format!(" {}={value:?}", field.name()));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mount_that_failed_is_told_with_place_type_and_reason() {
        let mount = |typ: &str, rest: &str, why: &str| {
            format!("failed to mount Mount {{ destination: \"/x y\", typ: Some(\"{typ}\"), {rest} }}: {why}")
        };
        let (nix, os) =
            ("failed err=Mount(Syscall(Nix(ENODEV)))", "failed err=Io(Os { code: 20, kind: NotADirectory })");
        for (events, expected) in [
            (
                vec![mount("zfs", "source: None", "syscall"), nix.to_owned()],
                "mount zfs on /x y: no such device (ENODEV)",
            ),
            (
                vec![mount("bind", "source: Some(\"/s\"), options: None", "io error"), os.to_owned()],
                "mount bind of /s on /x y: not a directory (ENOTDIR)",
            ),
            (vec![mount("zfs", "source: None", "no source")], "mount zfs on /x y: no source"),
            (
                vec!["failed to pivot: syscall".to_owned(), nix.to_owned()],
                "failed to pivot: no such device (ENODEV)",
            ),
            (vec!["something else".to_owned(), "outer".to_owned()], "something else"),
        ] {
            let events: Vec<&str> = events.iter().map(String::as_str).collect();
            assert_eq!(account(&events).as_deref(), Some(expected));
        }
    }

    #[test]
    fn our_own_words_come_before_events() {
        let sink = Sink::open().unwrap();
        assert_eq!(sink.first_failure(), None);
        write_line(&sink.writer, 'E', "inner");
        write_line(&sink.writer, 'E', "outer");
        assert_eq!(sink.first_failure().as_deref(), Some("inner"));
        write_line(&sink.writer, 'E', "inner");
        sink.fail("two\nlines");
        assert_eq!(sink.first_failure().as_deref(), Some("two lines"));
    }
}
