//! `update`: new limits for a container that exists. Only what is given changes; it takes effect at once.

use std::io::Read;
use std::path::Path;

use anyhow::{Context, Result, bail};
use oci_spec::runtime::{
    LinuxBlockIo, LinuxBlockIoBuilder, LinuxCpu, LinuxMemory, LinuxPids, LinuxPidsBuilder, LinuxResources,
    LinuxResourcesBuilder,
};

use super::Call;
use crate::cli::UpdateArgs;
use crate::state::Status;

/// A document of limits is a page, not a film.
const MAX_DOCUMENT: u64 = 1024 * 1024;

/// # Errors
/// A container that is not there or has stopped; a document that is none; a limit that the kernel refuses.
pub fn update(call: &Call<'_>, args: &UpdateArgs) -> Result<()> {
    let home = call.home(&args.id)?;
    let state = home.load()?;
    if matches!(home.status(&state), Status::Stopped | Status::Creating) {
        bail!("cannot update a container that is {}", home.status(&state).as_str());
    }
    if args.l3_cache_schema.is_some() || args.mem_bw_schema.is_some() {
        bail!("--l3-cache-schema, --mem-bw-schema: the container was created without a resctrl group");
    }
    let resources = match &args.resources {
        Some(path) => document(path)?,
        None => from_flags(args)?,
    };
    state.cgroup.update(&resources, state.id.as_str())?;
    Ok(())
}

fn document(path: &Path) -> Result<LinuxResources> {
    let mut text = String::new();
    let shown = || format!("--resources {}", path.display());
    if path == Path::new("-") {
        std::io::stdin().take(MAX_DOCUMENT).read_to_string(&mut text).with_context(shown)?;
    } else {
        std::fs::File::open(path)
            .and_then(|file| file.take(MAX_DOCUMENT).read_to_string(&mut text))
            .with_context(shown)?;
    }
    serde_json::from_str(&text).with_context(shown)
}

fn from_flags(args: &UpdateArgs) -> Result<LinuxResources> {
    let mut resources = LinuxResourcesBuilder::default().build()?;
    resources
        .set_cpu(cpu(args))
        .set_memory(memory(args)?)
        .set_pids(pids(args)?)
        .set_block_io(block_io(args)?);
    Ok(resources)
}

fn cpu(args: &UpdateArgs) -> Option<LinuxCpu> {
    let mut cpu = LinuxCpu::default();
    cpu.set_shares(args.cpu_share)
        .set_period(args.cpu_period)
        .set_quota(args.cpu_quota)
        .set_burst(args.cpu_burst)
        .set_idle(args.cpu_idle)
        .set_realtime_period(args.cpu_rt_period)
        .set_realtime_runtime(args.cpu_rt_runtime)
        .set_cpus(args.cpuset_cpus.clone())
        .set_mems(args.cpuset_mems.clone());
    (cpu != LinuxCpu::default()).then_some(cpu)
}

fn memory(args: &UpdateArgs) -> Result<Option<LinuxMemory>> {
    let bytes = |flag: &str, text: &Option<String>| text.as_deref().map(|text| bytes(flag, text)).transpose();
    let mut memory = LinuxMemory::default();
    memory
        .set_limit(bytes("--memory", &args.memory)?)
        .set_reservation(bytes("--memory-reservation", &args.memory_reservation)?)
        .set_swap(bytes("--memory-swap", &args.memory_swap)?);
    Ok((memory != LinuxMemory::default()).then_some(memory))
}

fn pids(args: &UpdateArgs) -> Result<Option<LinuxPids>> {
    let made = args.pids_limit.map(|limit| LinuxPidsBuilder::default().limit(limit).build());
    Ok(made.transpose()?)
}

fn block_io(args: &UpdateArgs) -> Result<Option<LinuxBlockIo>> {
    let made = args.blkio_weight.map(|weight| LinuxBlockIoBuilder::default().weight(weight).build());
    Ok(made.transpose()?)
}

/// `-1`, or a number with one of the suffixes b, k, m, g, t: powers of 1024, as in runc.
fn bytes(flag: &str, text: &str) -> Result<i64> {
    let lower = text.to_ascii_lowercase();
    let digits = lower.strip_suffix('b').unwrap_or(&lower);
    let (digits, shift) = match digits.char_indices().last() {
        Some((at, suffix @ ('k' | 'm' | 'g' | 't'))) => {
            (&digits[..at], 10 * (1 + "kmgt".find(suffix).unwrap_or_default()))
        }
        _ => (digits, 0),
    };
    let number: i64 = digits.parse().with_context(|| format!("{flag}: `{text}` is no amount of bytes"))?;
    match number {
        -1 if shift == 0 => Ok(-1),
        0.. => number.checked_mul(1 << shift).with_context(|| format!("{flag}: `{text}` is too much")),
        _ => bail!("{flag}: `{text}` is no amount of bytes"),
    }
}

#[cfg(test)]
mod tests {
    use super::bytes;

    #[test]
    fn amounts_have_the_suffixes_of_runc() {
        for (text, expected) in [
            ("-1", -1),
            ("0", 0),
            ("4096", 4096),
            ("64m", 64 << 20),
            ("1G", 1 << 30),
            ("2kb", 2048),
            ("9b", 9),
        ] {
            assert_eq!(bytes("--memory", text).unwrap(), expected, "{text}");
        }
        for text in ["", "m", "-2", "-1k", "1x", "9223372036854775807k", "1.5g"] {
            let error = bytes("--memory", text).unwrap_err().to_string();
            assert!(error.starts_with("--memory: "), "{error}");
        }
    }
}
