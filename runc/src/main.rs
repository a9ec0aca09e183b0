//! The program `sysbox-runc`; lib.rs is what it does.

use std::process::ExitCode;

fn main() -> ExitCode {
    sysbox_runc::main()
}
