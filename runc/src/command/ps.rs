//! `ps`: the processes of a container, by their host pids.

use std::io::Write;
use std::process::Command;

use anyhow::{Context, Result, bail};

use super::Call;

/// # Errors
/// No such container; ps(1) missing or failing for the table.
pub fn ps(call: &Call<'_>, id: &str, format: &str, options: &[String]) -> Result<()> {
    let home = call.home(id)?;
    let pids: Vec<i32> = home.load()?.cgroup.processes().iter().map(|pid| pid.as_raw()).collect();
    let mut out = std::io::stdout().lock();
    if format == "json" {
        writeln!(out, "{}", serde_json::to_string(&pids)?)?;
        return Ok(());
    }
    if format != "table" {
        bail!("invalid format option");
    }
    let options = if options.is_empty() { &["-ef".to_owned()] } else { options };
    let listed = Command::new("ps").args(options).output().context("run ps")?;
    if !listed.status.success() {
        let said = [listed.stdout, listed.stderr].concat();
        bail!(
            "{}: {}",
            listed.status.to_string().replace("status: ", "status "),
            String::from_utf8_lossy(&said)
        );
    }
    let text = String::from_utf8_lossy(&listed.stdout);
    let mut lines = text.lines();
    let head = lines.next().unwrap_or_default();
    let column = head
        .split_whitespace()
        .position(|name| name == "PID")
        .context("couldn't find PID field in ps output")?;
    writeln!(out, "{head}")?;
    for line in lines {
        let pid = line.split_whitespace().nth(column).and_then(|field| field.parse::<i32>().ok());
        if pid.is_some_and(|pid| pids.contains(&pid)) {
            writeln!(out, "{line}")?;
        }
    }
    Ok(())
}
