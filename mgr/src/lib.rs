//! The daemon `sysbox-mgr`: it owns what outlives a process. Id ranges, records of containers, copies of the other
//! daemon's descriptors, and the coherence of the engine's overlay with the container's.
//!
//! `ledger` and `subid` decide and touch nothing; `store`, `watch`, `vault`, `observe` and `facts` are the doors;
//! `server` joins them.

pub mod aside;
mod beneath;
pub mod coherence;
pub mod ended;
pub mod facts;
pub mod flags;
pub mod gate;
pub mod instance;
pub mod ledger;
pub mod observe;
pub mod overlay;
mod pinned;
pub mod server;
pub mod side;
mod slot;
pub mod store;
pub mod subid;
pub mod vault;
pub mod volumes;
pub mod watch;

/// An error with all its causes, on one line.
pub fn in_full(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(error.source(), |cause| cause.source());
    causes.fold(error.to_string(), |text, cause| format!("{text}: {cause}"))
}
