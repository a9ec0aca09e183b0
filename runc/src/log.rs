//! Errors and warnings for people and for engines: a line on standard error, and a record in the file that `--log` names.
//! Engines read the last record of level `error` to tell their user why a container did not start.

use std::fs::{File, OpenOptions};
use std::io::Write;

use tracing::Level;
use tracing_subscriber::Layer;
use tracing_subscriber::filter::LevelFilter;
use tracing_subscriber::layer::SubscriberExt;

use crate::cli::{Global, LogFormat};
use crate::sink::Events;

/// Where records go.
#[derive(Debug)]
pub struct Log {
    file: Option<File>,
    format: LogFormat,
}

impl Log {
    /// Opens the file and sets up tracing: debug events to standard error if asked for, error events to the sink always.
    ///
    /// # Errors
    /// The file not being writable.
    pub fn open(global: &Global) -> std::io::Result<Self> {
        let file = global
            .log
            .as_ref()
            .map(|path| OpenOptions::new().create(true).append(true).open(path))
            .transpose()?;
        let level = if global.debug { LevelFilter::DEBUG } else { LevelFilter::OFF };
        let shown = tracing_subscriber::fmt::layer()
            .with_writer(std::io::stderr)
            .with_target(false)
            .with_filter(level);
        let subscriber =
            tracing_subscriber::registry().with(Events.with_filter(LevelFilter::ERROR)).with(shown);
        tracing::subscriber::set_global_default(subscriber).map_err(std::io::Error::other)?;
        Ok(Self { file, format: global.log_format })
    }

    pub fn warn(&self, message: &str) {
        if self.file.is_none() {
            eprintln!("sysbox-runc: warning: {message}");
        }
        self.record(Level::WARN, message);
    }

    pub fn error(&self, message: &str) {
        eprintln!("{message}");
        self.record(Level::ERROR, message);
    }

    fn record(&self, level: Level, message: &str) {
        let Some(mut file) = self.file.as_ref() else { return };
        let time = now();
        let level = match level {
            Level::ERROR => "error",
            Level::WARN => "warning",
            _ => "info",
        };
        let line = match self.format {
            LogFormat::Json => serde_json::json!({"level": level, "msg": message, "time": time}).to_string(),
            LogFormat::Text => format!("time=\"{time}\" level={level} msg={message:?}"),
        };
        // The same words went to standard error; there is nobody left to tell that the log is full.
        let _full = writeln!(file, "{line}");
    }
}

/// RFC 3339, UTC.
pub fn now() -> String {
    chrono::Utc::now().to_rfc3339_opts(chrono::SecondsFormat::Nanos, true)
}
