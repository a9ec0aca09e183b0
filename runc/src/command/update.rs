//! `update`: new limits for a container that exists. Only what is given changes; it takes effect at once.

use std::io::Read;
use std::path::Path;

use anyhow::{Context, Result, anyhow, bail};
use oci_spec::runtime::{
    LinuxBlockIo, LinuxBlockIoBuilder, LinuxCpu, LinuxMemory, LinuxPids, LinuxPidsBuilder, LinuxResources,
    LinuxResourcesBuilder,
};

use super::Call;
use crate::cli::UpdateArgs;
use crate::cli::numbers::{self, Fault};
use crate::state::Status;

/// A document of limits is a page, not a film.
const MAX_DOCUMENT: u64 = 1024 * 1024;

/// # Errors
/// A container that is not there or has stopped; a document that is none; a limit that the kernel refuses.
pub fn update(call: &Call<'_>, args: &UpdateArgs) -> Result<()> {
    let home = call.home(&args.id)?;
    let state = home.load()?;
    let resources = match &args.resources {
        Some(path) => document(path)?,
        None => from_flags(args)?,
    };
    if args.kernel_memory.is_some() || args.kernel_memory_tcp.is_some() {
        call.log.warn("Kernel memory settings are ignored and will be removed");
    }
    if args.l3_cache_schema.is_some() {
        bail!("Intel RDT/CAT: l3 cache schema is not enabled");
    }
    if args.mem_bw_schema.is_some() {
        bail!("Intel RDT/MBA: memory bandwidth schema is not enabled");
    }
    if matches!(home.status(&state), Status::Stopped | Status::Creating) {
        bail!("container not running");
    }
    state.cgroup.update(&resources, state.id.as_str())?;
    Ok(())
}

fn document(path: &Path) -> Result<LinuxResources> {
    let mut text = String::new();
    let shown = || format!("--resources {}", path.display());
    if path == Path::new("-") {
        std::io::stdin().take(MAX_DOCUMENT).read_to_string(&mut text).with_context(shown)?;
    } else {
        let opened = std::fs::File::open(path);
        let file =
            opened.map_err(|error| anyhow!("open {}: {}", path.display(), crate::bundle::reason(&error)))?;
        file.take(MAX_DOCUMENT).read_to_string(&mut text).with_context(shown)?;
    }
    let resources = serde_json::from_str(&text).with_context(shown)?;
    let document: serde_json::Value = serde_json::from_str(&text).with_context(shown)?;
    crate::bundle::refuse_arrays(&serde_json::json!({"linux": {"resources": document}}))
        .with_context(shown)?;
    Ok(resources)
}

fn from_flags(args: &UpdateArgs) -> Result<LinuxResources> {
    let mut resources = LinuxResourcesBuilder::default().build()?;
    resources
        .set_cpu(cpu(args)?)
        .set_memory(memory(args)?)
        .set_pids(pids(args)?)
        .set_block_io(block_io(args)?);
    Ok(resources)
}

fn cpu(args: &UpdateArgs) -> Result<Option<LinuxCpu>> {
    let signed = |name: &str, text: &Option<String>| number(name, "ParseInt", text, numbers::int);
    let unsigned = |name: &str, text: &Option<String>| number(name, "ParseUint", text, numbers::uint);
    let mut cpu = LinuxCpu::default();
    cpu.set_idle(signed("cpu-idle", &args.cpu_idle)?)
        .set_burst(unsigned("cpu-burst", &args.cpu_burst)?)
        .set_period(unsigned("cpu-period", &args.cpu_period)?.filter(|period| *period != 0))
        .set_realtime_period(unsigned("cpu-rt-period", &args.cpu_rt_period)?.filter(|period| *period != 0))
        .set_shares(unsigned("cpu-share", &args.cpu_share)?.filter(|shares| *shares != 0))
        .set_quota(signed("cpu-quota", &args.cpu_quota)?.filter(|quota| *quota != 0))
        .set_realtime_runtime(signed("cpu-rt-runtime", &args.cpu_rt_runtime)?.filter(|runtime| *runtime != 0))
        .set_cpus(args.cpuset_cpus.clone())
        .set_mems(args.cpuset_mems.clone());
    Ok((cpu != LinuxCpu::default()).then_some(cpu))
}

fn number<T>(
    name: &str,
    function: &str,
    text: &Option<String>,
    parse: impl FnOnce(&str) -> Result<T, Fault>,
) -> Result<Option<T>> {
    let Some(text) = text else { return Ok(None) };
    let said = |fault: Fault| anyhow!("invalid value for {name}: {}", fault.of_conversion(function, text));
    parse(text).map(Some).map_err(said)
}

fn memory(args: &UpdateArgs) -> Result<Option<LinuxMemory>> {
    let mut memory = LinuxMemory::default();
    memory
        .set_limit(bytes("memory", &args.memory)?)
        .set_swap(bytes("memory-swap", &args.memory_swap)?)
        .set_reservation(bytes("memory-reservation", &args.memory_reservation)?);
    bytes("kernel-memory", &args.kernel_memory)?;
    bytes("kernel-memory-tcp", &args.kernel_memory_tcp)?;
    Ok((memory != LinuxMemory::default()).then_some(memory))
}

/// `-1` for no limit, or an amount.
fn bytes(name: &str, text: &Option<String>) -> Result<Option<i64>> {
    match text.as_deref() {
        None => Ok(None),
        Some("-1") => Ok(Some(-1)),
        Some(text) => {
            numbers::bytes(text).map(Some).map_err(|said| anyhow!("invalid value for {name}: {said}"))
        }
    }
}

/// 0 is not given, to runc.
fn pids(args: &UpdateArgs) -> Result<Option<LinuxPids>> {
    let limit = args.pids_limit.filter(|limit| *limit != 0);
    let made = limit.map(|limit| LinuxPidsBuilder::default().limit(limit).build());
    Ok(made.transpose()?)
}

fn block_io(args: &UpdateArgs) -> Result<Option<LinuxBlockIo>> {
    let Some(weight) = args.blkio_weight else { return Ok(None) };
    let weight = u16::try_from(weight).map_err(|_| anyhow!("invalid value for blkio-weight: {weight}"))?;
    Ok(Some(LinuxBlockIoBuilder::default().weight(weight).build()?))
}
