//! The one error of this crate: which call, with which arguments, and the errno.

use nix::errno::Errno;

pub type Result<T> = std::result::Result<T, SysError>;

/// A system call that failed. `what` is the call with its arguments, as a person would write it down.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{what}: {}", errno.desc())]
pub struct SysError {
    pub what: String,
    pub errno: Errno,
}

impl SysError {
    pub fn new(errno: Errno, what: impl Into<String>) -> Self {
        Self { what: what.into(), errno }
    }

    /// For std's errors, which carry an errno where the kernel was asked; EIO where they do not.
    pub fn from_io(error: &std::io::Error, what: impl Into<String>) -> Self {
        Self { what: what.into(), errno: error.raw_os_error().map_or(Errno::EIO, Errno::from_raw) }
    }
}

/// Names the call that failed.
pub trait Named<T> {
    /// # Errors
    /// The same failure, with the call that `what` describes.
    fn named(self, what: impl FnOnce() -> String) -> Result<T>;
}

impl<T> Named<T> for nix::Result<T> {
    fn named(self, what: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|errno| SysError::new(errno, what()))
    }
}

impl<T> Named<T> for std::io::Result<T> {
    fn named(self, what: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|error| SysError::from_io(&error, what()))
    }
}
