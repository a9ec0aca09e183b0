//! `containerd-shim-sysbox-v1`: the place of the containerd shim. Not built yet, and says so.

use std::process::ExitCode;

fn main() -> ExitCode {
    eprintln!(
        "containerd-shim-sysbox-v1: not built yet; containerd calls sysbox-runc through its own shim for runc"
    );
    ExitCode::FAILURE
}
