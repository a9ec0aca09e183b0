//! What a number means nothing without: the machine, the versions, the load.

use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};
use sysbox_tests::measure;

use crate::lab::Lab;

const LIMIT: Duration = Duration::from_secs(30);

/// Names and values, in the order in which they are shown.
///
/// # Errors
/// The engine or /proc not answering.
pub fn gather(lab: &Lab) -> Result<Vec<(&'static str, String)>> {
    let kernel = read("/proc/sys/kernel/osrelease")?;
    let memory = read("/proc/meminfo")?;
    let memory = memory.lines().next().and_then(|line| line.split_whitespace().nth(1)).context("MemTotal")?;
    let memory = memory.parse::<u64>().context("MemTotal")? / (1024 * 1024);
    let cpus = std::thread::available_parallelism().context("cpus")?;
    let info = lab.docker(["info", "-f", "{{.ServerVersion}}, {{.Driver}}, cgroup driver {{.CgroupDriver}}"]);
    let engine = measure::run(&mut { info }, LIMIT)?;
    let client = said("docker", &["--version"])?;
    let runc = said("runc", &["--version"])?;
    Ok(vec![
        ("kernel", kernel.trim().to_owned()),
        ("machine", format!("{cpus} cpus, {memory} GiB")),
        ("load", load()?),
        ("cgroups", layout(&read("/proc/self/mountinfo")?).to_owned()),
        ("engine", format!("{}; {}", engine.trim(), first_line(&client))),
        ("runc", first_line(&runc).to_owned()),
        ("commit", commit()),
        ("bed", lab.bed.clone()),
    ])
}

/// Of the last one, five and fifteen minutes.
///
/// # Errors
/// /proc not being there.
pub fn load() -> Result<String> {
    let text = read("/proc/loadavg")?;
    Ok(text.split(' ').take(3).collect::<Vec<_>>().join(" "))
}

fn read(path: &str) -> Result<String> {
    std::fs::read_to_string(path).with_context(|| format!("read {path}"))
}

fn said(program: &str, args: &[&str]) -> Result<String> {
    measure::run(Command::new(program).args(args), LIMIT)
}

fn first_line(text: &str) -> &str {
    text.lines().next().unwrap_or_default()
}

/// Without git, or outside of a repository, the number is of no known commit, which is worth knowing as well.
fn commit() -> String {
    let git = |args: &[&str]| said("git", &[&["-C", env!("CARGO_MANIFEST_DIR")], args].concat());
    let Ok(head) = git(&["rev-parse", "--short", "HEAD"]) else { return "unknown".to_owned() };
    let changed =
        git(&["status", "--porcelain", "--untracked-files=no"]).is_ok_and(|files| !files.is_empty());
    format!("{}{}", head.trim(), if changed { " and changes" } else { "" })
}

fn layout(mountinfo: &str) -> &'static str {
    let has = |fstype: &str| mountinfo.lines().any(|line| line.contains(&format!(" - {fstype} ")));
    match (has("cgroup"), has("cgroup2")) {
        (false, true) => "version 2",
        (true, true) => "version 1, version 2 beside it",
        (true, false) => "version 1",
        (false, false) => "none",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cgroup_layout_is_read_from_mountinfo() {
        let line = |fstype: &str| format!("31 23 0:26 / /sys/fs/cgroup rw - {fstype} none rw\n");
        assert_eq!(layout(&line("cgroup2")), "version 2");
        assert_eq!(layout(&line("cgroup")), "version 1");
        assert_eq!(layout(&(line("cgroup") + &line("cgroup2"))), "version 1, version 2 beside it");
        assert_eq!(layout(&line("tmpfs")), "none");
    }
}
