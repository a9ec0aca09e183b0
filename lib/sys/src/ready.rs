//! Telling a service manager how we are (sd_notify(3)): a datagram to the socket that NOTIFY_SOCKET names.

use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};

use crate::error::{Named, Result};

/// Sends `state` (`READY=1`, `STOPPING=1` …). Without NOTIFY_SOCKET there is nobody to tell, which is no error.
///
/// # Errors
/// The socket not taking the datagram.
pub fn notify(state: &str) -> Result<()> {
    let Some(name) = std::env::var_os("NOTIFY_SOCKET") else { return Ok(()) };
    let bytes = name.as_encoded_bytes();
    let what = || format!("sd_notify({state})");
    let address = match bytes.strip_prefix(b"@") {
        Some(abstract_name) => SocketAddr::from_abstract_name(abstract_name).named(what)?,
        None => SocketAddr::from_pathname(&name).named(what)?,
    };
    let socket = UnixDatagram::unbound().named(what)?;
    socket.send_to_addr(state.as_bytes(), &address).map(drop).named(what)
}
