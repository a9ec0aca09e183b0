//! `state`: what the specification asks for, as JSON, with runc's additions.

use std::io::Write;

use anyhow::Result;
use serde_json::json;

use super::Call;
use crate::state::{Home, State, Status};

/// # Errors
/// No such container.
pub fn state(call: &Call<'_>, id: &str) -> Result<()> {
    let home = call.home(id)?;
    let state = home.load()?;
    let text = serde_json::to_string_pretty(&document(&home, &state))?;
    // runc ends it without a newline.
    std::io::stdout().write_all(text.as_bytes())?;
    Ok(())
}

/// The document that `state` prints and `list` collects.
pub fn document(home: &Home, state: &State) -> serde_json::Value {
    let status = home.status(state);
    let pid = state.init.filter(|_| status != Status::Stopped).map_or(0, |init| init.pid);
    let mut document = json!({
        "ociVersion": state.oci_version,
        "id": state.id,
        "pid": pid,
        "status": status.as_str(),
        "bundle": state.bundle,
        "rootfs": state.rootfs,
        "created": state.created,
    });
    if !state.annotations.is_empty() {
        document["annotations"] = json!(state.annotations);
    }
    document["owner"] = json!("");
    document
}
