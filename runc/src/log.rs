//! Errors and warnings for people and for engines: a line on standard error, and a record in the file that `--log` names.
//! Engines read the last record of level `error` to tell their user why a container did not start. With `--debug` the file
//! tells what was done on the way as well, in the same form; without a file that goes to standard error.

use std::fs::{File, OpenOptions};
use std::io::{IsTerminal, Write};

use serde_json::{Map, Value};
use tracing::field::{Field, Visit};
use tracing_subscriber::Layer;
use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::layer::{Context, SubscriberExt};

use crate::cli::numbers::quoted;
use crate::cli::{Global, LogFormat};
use crate::sink::Events;

/// Where records go.
#[derive(Debug)]
pub struct Log {
    file: Option<File>,
    format: LogFormat,
}

impl Log {
    /// Opens the file and sets up tracing: error events to the sink always, all events to the log if asked for.
    ///
    /// # Errors
    /// The file not being writable.
    pub fn open(global: &Global) -> std::io::Result<Self> {
        let file = global
            .log
            .as_ref()
            .map(|path| OpenOptions::new().create(true).append(true).open(path))
            .transpose()?;
        // What takes long is told to the log as it goes on; the rest only if asked for.
        let mut level = Targets::new();
        if global.debug {
            level = level.with_default(LevelFilter::DEBUG);
        } else if file.is_some() {
            level = level.with_target("sysbox_runc::preload", LevelFilter::INFO);
            level = level.with_target("sysbox_runc::carry", LevelFilter::INFO);
        }
        let told = Told { file: file.as_ref().map(File::try_clone).transpose()?, format: global.log_format };
        let subscriber = tracing_subscriber::registry()
            .with(Events.with_filter(LevelFilter::ERROR))
            .with(told.with_filter(level));
        tracing::subscriber::set_global_default(subscriber).map_err(std::io::Error::other)?;
        Ok(Self { file, format: global.log_format })
    }

    /// Standard error, for what is wrong before a log can be opened.
    pub fn unset() -> Self {
        Self { file: None, format: LogFormat::Text }
    }

    pub fn warn(&self, message: &str) {
        self.record("warning", message);
    }

    pub fn error(&self, message: &str) {
        if self.file.is_some() {
            eprintln!("{message}");
        }
        self.record("error", message);
    }

    /// Into the file, or to standard error in the same form, as runc does; a person at a terminal gets the words alone.
    fn record(&self, level: &str, message: &str) {
        let record = line(self.format, level, message, &Map::new());
        // There is nobody left to tell that the log is full.
        let _full = match &self.file {
            Some(file) => {
                let mut file = file;
                file.write_all(record.as_bytes())
            }
            None if std::io::stderr().is_terminal() => writeln!(std::io::stderr(), "{level}: {message}"),
            None => std::io::stderr().write_all(record.as_bytes()),
        };
    }
}

/// A record as logrus, runc's logger, writes it. One write each: children of ours write to the same file.
fn line(format: LogFormat, level: &str, message: &str, fields: &Map<String, Value>) -> String {
    let time = chrono::Utc::now().to_rfc3339_opts(chrono::SecondsFormat::Secs, true);
    match format {
        LogFormat::Json => {
            let mut record = serde_json::json!({"level": level, "msg": message, "time": time});
            for (name, value) in fields {
                record[name] = value.clone();
            }
            format!("{record}\n")
        }
        LogFormat::Text => {
            let fields: String = fields.iter().map(|(name, value)| format!(" {name}={value}")).collect();
            format!("time=\"{time}\" level={level} msg={}{fields}\n", word(message))
        }
    }
}

/// Quoted, unless it is one plain word.
fn word(text: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-._/@^+".contains(c);
    if text.chars().all(plain) { text.to_owned() } else { quoted(text) }
}

/// Events of ours and of libcontainer, in the log.
#[derive(Debug)]
struct Told {
    file: Option<File>,
    format: LogFormat,
}

impl<S: tracing::Subscriber> Layer<S> for Told {
    fn on_event(&self, event: &tracing::Event<'_>, _: Context<'_, S>) {
        let mut words = Words::default();
        event.record(&mut words);
        // Whatever an event thinks of itself: engines take the last `error` for the outcome, and that is `Log::error`'s.
        let (level, target) = (*event.metadata().level(), event.metadata().target());
        // Ours is for the user; that of libraries is as much as their debugging.
        let ours = target.starts_with("sysbox_runc") && level == tracing::Level::INFO;
        let level = if ours { "info" } else { "debug" };
        let line = line(self.format, level, &words.message, &words.fields);
        let _full = match self.file.as_ref() {
            Some(mut file) => file.write_all(line.as_bytes()),
            None => std::io::stderr().write_all(line.as_bytes()),
        };
    }
}

#[derive(Default)]
struct Words {
    message: String,
    fields: Map<String, Value>,
}

impl Visit for Words {
    fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
        match field.name() {
            "message" => self.message = format!("{value:?}"),
            // What came through the `log` crate carries where it came from.
            name if name.starts_with("log.") => {}
            // Logrus renames a field that has the name of one of its own.
            name @ ("level" | "msg" | "time") => {
                self.fields.insert(format!("fields.{name}"), format!("{value:?}").into());
            }
            name => {
                self.fields.insert(name.to_owned(), format!("{value:?}").into());
            }
        }
    }
}

/// RFC 3339, UTC.
pub fn now() -> String {
    chrono::Utc::now().to_rfc3339_opts(chrono::SecondsFormat::Nanos, true)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_has_the_form_that_engines_read() {
        let fields = Map::from_iter([("path".to_owned(), "/a \"b\"".into())]);
        let json: Value =
            serde_json::from_str(&line(LogFormat::Json, "debug", "two\nlines", &fields)).unwrap();
        assert_eq!((&json["level"], &json["msg"]), (&"debug".into(), &"two\nlines".into()));
        assert_eq!(json["path"], "/a \"b\"");
        let text = line(LogFormat::Text, "error", "two\nlines", &fields);
        let (time, rest) = text.split_once(' ').unwrap();
        assert!(time.starts_with("time=\"20") && time.ends_with("Z\""), "{text}");
        assert_eq!(rest, "level=error msg=\"two\\nlines\" path=\"/a \\\"b\\\"\"\n");
    }
}
