//! Where the words of a failing start are collected: libcontainer's processes hand on the outermost text alone, so its
//! error events and our own errors go into a pipe that the runtime reads when a start has failed.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::sync::OnceLock;

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

    /// The best account of what went wrong: our own words, or the first error event, which is the innermost.
    pub fn first_failure(&self) -> Option<String> {
        let mut bytes = Vec::new();
        // Ends with EAGAIN, the writers being open; what was read until then is in the buffer.
        let _ends = (&self.reader).read_to_end(&mut bytes);
        let text = String::from_utf8_lossy(&bytes);
        let of_kind = |kind: char| text.lines().find_map(|line| line.strip_prefix(kind)).map(str::to_owned);
        of_kind('X').or_else(|| of_kind('E'))
    }
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
