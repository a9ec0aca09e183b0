//! The daemon `sysbox-fs`: one FUSE file system that shows each system container its own values of files in /proc and
//! /sys. A library only so that benches and fuzz targets reach its pure parts.

pub mod cli;
pub mod daemon;
pub mod handles;
pub mod keeper;
pub mod lock;
pub mod place;
pub mod registry;
pub mod rpc;
pub mod session;
pub mod tree;
pub mod vproc;
