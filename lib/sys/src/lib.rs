//! The kernel as the runtime needs it, and the socket its programs talk over. The only crate where `unsafe` compiles:
//! one system call a wrapper, owned descriptors in and out, `O_CLOEXEC` always, errno kept.

pub mod creds;
pub mod error;
pub mod fuse;
pub mod keyring;
pub mod mount;
pub mod path;
pub mod probe;
pub mod process;
pub mod ready;
pub mod reflink;
pub mod rlimit;
pub mod schedule;
pub mod seccomp;
pub mod socket;
pub mod terminal;
pub mod userns;
pub mod xattr;

pub use error::{Result, SysError};
