//! A daemon's log: to stderr, or appended to a file which is opened anew on SIGHUP (logrotate(8)). Both daemons have it; it
//! knows neither of them.

use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use tracing::level_filters::LevelFilter;
use tracing_subscriber::fmt::MakeWriter;

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Format {
    Text,
    Json,
}

/// Where log lines go.
#[derive(Debug, Clone)]
pub struct Target(Option<Arc<LogFile>>);

#[derive(Debug)]
struct LogFile {
    path: PathBuf,
    file: Mutex<File>,
}

fn open(path: &Path) -> io::Result<File> {
    File::options().append(true).create(true).open(path)
}

impl Target {
    /// # Errors
    /// The file cannot be opened for appending.
    pub fn new(path: Option<&Path>) -> io::Result<Self> {
        let file =
            |path: &Path| Ok(Arc::new(LogFile { path: path.to_owned(), file: Mutex::new(open(path)?) }));
        path.map(file).transpose().map(Self)
    }

    /// Opens the file again; the old one stays in use where that fails.
    ///
    /// # Errors
    /// As in `new`.
    pub fn reopen(&self) -> io::Result<()> {
        let Some(log) = &self.0 else { return Ok(()) };
        let new = open(&log.path)?;
        *log.file.lock().unwrap_or_else(PoisonError::into_inner) = new;
        Ok(())
    }

    /// Makes this the log of the process.
    pub fn install(&self, level: LevelFilter, format: Format) {
        let builder =
            tracing_subscriber::fmt().with_max_level(level).with_writer(self.clone()).with_target(false);
        match format {
            Format::Text => builder.with_ansi(false).init(),
            Format::Json => builder.json().flatten_event(true).init(),
        }
    }
}

impl<'a> MakeWriter<'a> for Target {
    type Writer = Self;
    fn make_writer(&'a self) -> Self {
        self.clone()
    }
}

impl Write for Target {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match &self.0 {
            Some(log) => log.file.lock().unwrap_or_else(PoisonError::into_inner).write(bytes),
            None => io::stderr().write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rotated_log_goes_on_in_the_new_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        std::fs::write(&path, "0").unwrap();
        let mut target = Target::new(Some(&path)).unwrap();
        target.write_all(b"1").unwrap();
        std::fs::rename(&path, dir.path().join("log.1")).unwrap();
        target.write_all(b"2").unwrap();
        target.reopen().unwrap();
        target.write_all(b"3").unwrap();
        assert_eq!(std::fs::read_to_string(dir.path().join("log.1")).unwrap(), "012");
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "3");
    }
}
