//! Seccomp profiles into programs: libseccomp makes the program, we add the tail that it cannot express.
//!
//! A call newer than everything the profile knows must fail with ENOSYS, not with the profile's error: C libraries fall
//! back to older calls only then (runc does the same since 1.0-rc94). The tail is a prologue here: per architecture, a
//! number above the largest that the profile names returns ENOSYS before the profile is asked.

use std::io::{Read, Seek};
use std::os::fd::AsFd;
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;

use libseccomp::{ScmpAction, ScmpArch, ScmpArgCompare, ScmpCompareOp, ScmpFilterContext, ScmpSyscall};
use oci_spec::runtime::{
    Arch, LinuxSeccomp, LinuxSeccompAction, LinuxSeccompArg, LinuxSeccompFilterFlag, LinuxSeccompOperator,
};
use sysbox_sys::seccomp::{FLAG_LOG, FLAG_SPEC_ALLOW, FLAG_WAIT_KILLABLE_RECV, Instruction};

/// A profile ready to be loaded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Filter {
    pub program: Vec<Instruction>,
    pub flags: u32,
}

impl Filter {
    /// Flags, then the program, each in the byte order of this machine: a file of this boot, read by this runtime.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = self.flags.to_ne_bytes().to_vec();
        for i in &self.program {
            bytes.extend(i.code.to_ne_bytes());
            bytes.extend([i.jump_true, i.jump_false]);
            bytes.extend(i.value.to_ne_bytes());
        }
        bytes
    }

    /// `None` for bytes that [`Filter::to_bytes`] did not make.
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let (flags, program) = bytes.split_first_chunk::<4>()?;
        if program.is_empty() || program.len() % 8 != 0 {
            return None;
        }
        Some(Self { flags: u32::from_ne_bytes(*flags), program: instructions(program) })
    }
}

fn instructions(bytes: &[u8]) -> Vec<Instruction> {
    let instruction = |chunk: &[u8]| Instruction {
        code: u16::from_ne_bytes([chunk[0], chunk[1]]),
        jump_true: chunk[2],
        jump_false: chunk[3],
        value: u32::from_ne_bytes([chunk[4], chunk[5], chunk[6], chunk[7]]),
    };
    bytes.chunks_exact(8).map(instruction).collect()
}

#[derive(Debug, thiserror::Error)]
pub enum FilterError {
    #[error("/linux/seccomp: {what}: {source}")]
    Library { what: String, source: libseccomp::error::SeccompError },
    #[error("/linux/seccomp: read the program: {0}")]
    Read(std::io::Error),
    #[error("/linux/seccomp/flags: `{0}` is not supported")]
    Flag(String),
}

type Result<T> = std::result::Result<T, FilterError>;

fn library(what: impl Into<String>) -> impl FnOnce(libseccomp::error::SeccompError) -> FilterError {
    let what = what.into();
    |source| FilterError::Library { what, source }
}

/// Compiles a profile.
///
/// # Errors
/// An action, flag or rule that libseccomp or we do not know.
pub fn compile(profile: &LinuxSeccomp) -> Result<Filter> {
    let default = action(profile.default_action(), profile.default_errno_ret())?;
    let mut context = ScmpFilterContext::new(default).map_err(library("new filter"))?;
    context.set_ctl_nnp(false).map_err(library("no_new_privs off"))?;
    // A binary tree instead of a list: the kernel then walks a handful of instructions a call (libseccomp 2.5).
    context.set_ctl_optimize(2).map_err(library("optimize"))?;
    for arch in profile.architectures().iter().flatten() {
        let arch = arch_of(*arch);
        context.add_arch(arch).map_err(library(format!("add {arch:?}")))?;
    }
    let mut largest = Largest::default();
    for rule in profile.syscalls().iter().flatten() {
        let wanted = action(rule.action(), rule.errno_ret())?;
        for name in rule.names() {
            largest.note(name);
            // A rule that says what the default says is no rule, and libseccomp refuses it.
            if wanted == default {
                continue;
            }
            // Names that this libseccomp does not know are calls it cannot filter: the tail answers them.
            let Ok(call) = ScmpSyscall::from_name(name) else { continue };
            add_rule(&mut context, wanted, call, name, rule.args().as_deref().unwrap_or_default())?;
        }
    }
    let mut program = export(&context)?;
    if matches!(default, ScmpAction::Errno(errno) if errno != libc::ENOSYS) {
        program = with_tail(&largest, program);
    }
    Ok(Filter { program, flags: flags(profile)? })
}

/// As [`compile`], from `dir` where this very profile has been compiled before: engines send the same one every time, and
/// libseccomp takes 13 ms for it. What cannot be kept is compiled again.
///
/// # Errors
/// As [`compile`].
pub fn compile_cached(profile: &LinuxSeccomp, dir: &Path) -> Result<Filter> {
    let library = libseccomp::ScmpVersion::current().map(|v| format!("{}.{}.{}", v.major, v.minor, v.micro));
    let Ok(key) = serde_json::to_string(&(env!("CARGO_PKG_VERSION"), library.ok(), profile)) else {
        return compile(profile);
    };
    let path = dir.join(format!("{:016x}", sysbox_ipc::container::fnv1a(key.as_bytes())));
    // The whole key is in the file: two profiles with one hash only take turns.
    if let Some(filter) = std::fs::read(&path).ok().and_then(|kept| read_kept(&kept, key.as_bytes())) {
        return Ok(filter);
    }
    let filter = compile(profile)?;
    if let Err(error) = keep(&path, key.as_bytes(), &filter) {
        tracing::debug!(path = %path.display(), %error, "filter not kept");
    }
    Ok(filter)
}

fn read_kept(kept: &[u8], key: &[u8]) -> Option<Filter> {
    let (length, rest) = kept.split_first_chunk::<8>()?;
    let length = usize::try_from(u64::from_le_bytes(*length)).ok()?;
    let (found, program) = rest.split_at_checked(length)?;
    (found == key).then(|| Filter::from_bytes(program)).flatten()
}

fn keep(path: &Path, key: &[u8], filter: &Filter) -> std::io::Result<()> {
    let dir = path.parent().unwrap_or(Path::new("/"));
    match std::fs::DirBuilder::new().mode(0o700).create(dir) {
        Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => return Err(error),
        _ => {}
    }
    let mut bytes = (key.len() as u64).to_le_bytes().to_vec();
    bytes.extend(key);
    bytes.extend(filter.to_bytes());
    let new = path.with_extension(format!("new-{}", std::process::id()));
    std::fs::write(&new, bytes)?;
    std::fs::rename(&new, path)
}

/// As the specification writes it.
fn name_of<T: serde::Serialize + std::fmt::Debug>(value: &T) -> String {
    serde_json::to_value(value)
        .ok()
        .and_then(|name| name.as_str().map(str::to_owned))
        .unwrap_or_else(|| format!("{value:?}"))
}

fn flags(profile: &LinuxSeccomp) -> Result<u32> {
    profile.flags().iter().flatten().try_fold(0, |bits, flag| match flag {
        LinuxSeccompFilterFlag::SeccompFilterFlagLog => Ok(bits | FLAG_LOG),
        LinuxSeccompFilterFlag::SeccompFilterFlagSpecAllow => Ok(bits | FLAG_SPEC_ALLOW),
        // For threads that do not exist yet when the filter is loaded: nothing to synchronise.
        LinuxSeccompFilterFlag::SeccompFilterFlagTsync => Ok(bits),
        // Only a filter with a listener may have it (seccomp(2)).
        LinuxSeccompFilterFlag::SeccompFilterFlagWaitKillableRecv if notifies(profile) => {
            Ok(bits | FLAG_WAIT_KILLABLE_RECV)
        }
        other => Err(FilterError::Flag(name_of(other))),
    })
}

fn notifies(profile: &LinuxSeccomp) -> bool {
    profile.syscalls().iter().flatten().any(|rule| rule.action() == LinuxSeccompAction::ScmpActNotify)
}

fn action(action: LinuxSeccompAction, errno: Option<u32>) -> Result<ScmpAction> {
    let errno = i32::try_from(errno.unwrap_or(libc::EPERM as u32)).unwrap_or(libc::EPERM);
    Ok(match action {
        LinuxSeccompAction::ScmpActAllow => ScmpAction::Allow,
        LinuxSeccompAction::ScmpActErrno => ScmpAction::Errno(errno),
        LinuxSeccompAction::ScmpActKill | LinuxSeccompAction::ScmpActKillThread => ScmpAction::KillThread,
        LinuxSeccompAction::ScmpActKillProcess => ScmpAction::KillProcess,
        LinuxSeccompAction::ScmpActLog => ScmpAction::Log,
        LinuxSeccompAction::ScmpActTrap => ScmpAction::Trap,
        LinuxSeccompAction::ScmpActTrace => ScmpAction::Trace(u16::try_from(errno).unwrap_or_default()),
        LinuxSeccompAction::ScmpActNotify => ScmpAction::Notify,
    })
}

fn arch_of(arch: Arch) -> ScmpArch {
    match arch {
        Arch::ScmpArchX86 => ScmpArch::X86,
        Arch::ScmpArchX86_64 => ScmpArch::X8664,
        Arch::ScmpArchX32 => ScmpArch::X32,
        Arch::ScmpArchArm => ScmpArch::Arm,
        Arch::ScmpArchAarch64 => ScmpArch::Aarch64,
        Arch::ScmpArchMips => ScmpArch::Mips,
        Arch::ScmpArchMips64 => ScmpArch::Mips64,
        Arch::ScmpArchMips64n32 => ScmpArch::Mips64N32,
        Arch::ScmpArchMipsel => ScmpArch::Mipsel,
        Arch::ScmpArchMipsel64 => ScmpArch::Mipsel64,
        Arch::ScmpArchMipsel64n32 => ScmpArch::Mipsel64N32,
        Arch::ScmpArchPpc => ScmpArch::Ppc,
        Arch::ScmpArchPpc64 => ScmpArch::Ppc64,
        Arch::ScmpArchPpc64le => ScmpArch::Ppc64Le,
        Arch::ScmpArchS390 => ScmpArch::S390,
        Arch::ScmpArchS390x => ScmpArch::S390X,
        Arch::ScmpArchRiscv64 => ScmpArch::Riscv64,
        _ => ScmpArch::native(),
    }
}

/// Conditions on different arguments are all to hold; several on one argument are alternatives, as in runc.
fn add_rule(
    context: &mut ScmpFilterContext,
    action: ScmpAction,
    call: ScmpSyscall,
    name: &str,
    conditions: &[LinuxSeccompArg],
) -> Result<()> {
    let compare = |condition: &LinuxSeccompArg| {
        let operator = match condition.op() {
            LinuxSeccompOperator::ScmpCmpNe => ScmpCompareOp::NotEqual,
            LinuxSeccompOperator::ScmpCmpLt => ScmpCompareOp::Less,
            LinuxSeccompOperator::ScmpCmpLe => ScmpCompareOp::LessOrEqual,
            LinuxSeccompOperator::ScmpCmpEq => ScmpCompareOp::Equal,
            LinuxSeccompOperator::ScmpCmpGe => ScmpCompareOp::GreaterEqual,
            LinuxSeccompOperator::ScmpCmpGt => ScmpCompareOp::Greater,
            LinuxSeccompOperator::ScmpCmpMaskedEq => ScmpCompareOp::MaskedEqual(condition.value()),
        };
        let masked = condition.op() == LinuxSeccompOperator::ScmpCmpMaskedEq;
        let datum = if masked { condition.value_two().unwrap_or(0) } else { condition.value() };
        ScmpArgCompare::new(u32::try_from(condition.index()).unwrap_or(u32::MAX), operator, datum)
    };
    let what = || library(format!("rule for `{name}`"));
    if conditions.is_empty() {
        context.add_rule(action, call).map_err(what())?;
        return Ok(());
    }
    let repeated = conditions
        .iter()
        .enumerate()
        .any(|(at, one)| conditions[..at].iter().any(|c| c.index() == one.index()));
    if repeated {
        for condition in conditions {
            context.add_rule_conditional(action, call, &[compare(condition)]).map_err(what())?;
        }
    } else {
        let all: Vec<ScmpArgCompare> = conditions.iter().map(compare).collect();
        context.add_rule_conditional(action, call, &all).map_err(what())?;
    }
    Ok(())
}

fn export(context: &ScmpFilterContext) -> Result<Vec<Instruction>> {
    let memory = nix::sys::memfd::memfd_create("seccomp", nix::sys::memfd::MFdFlags::MFD_CLOEXEC)
        .map_err(|errno| FilterError::Read(errno.into()))?;
    context.export_bpf(memory.as_fd()).map_err(library("export"))?;
    let mut file = std::fs::File::from(memory);
    let mut bytes = Vec::new();
    file.rewind().and_then(|()| file.read_to_end(&mut bytes)).map_err(FilterError::Read)?;
    Ok(instructions(&bytes))
}

/// The largest call number that the profile names, for each table of numbers that can be called on this machine.
#[derive(Debug, Default)]
struct Largest {
    native: u32,
    x86: u32,
}

#[cfg(target_arch = "x86_64")]
const AUDIT_ARCH_NATIVE: u32 = 0xc000_003e;
#[cfg(target_arch = "x86_64")]
const AUDIT_ARCH_X86: u32 = 0x4000_0003;
#[cfg(target_arch = "aarch64")]
const AUDIT_ARCH_NATIVE: u32 = 0xc000_00b7;
#[cfg(target_arch = "aarch64")]
const AUDIT_ARCH_X86: u32 = 0x4000_0028;

/// x32 calls have this bit; to the kernel they are the native architecture.
const X32_BIT: u32 = 0x4000_0000;

impl Largest {
    fn note(&mut self, name: &str) {
        let second = if cfg!(target_arch = "x86_64") { ScmpArch::X86 } else { ScmpArch::Arm };
        for (arch, largest) in [(ScmpArch::native(), &mut self.native), (second, &mut self.x86)] {
            let number = ScmpSyscall::from_name_by_arch(name, arch).map(ScmpSyscall::as_raw_syscall);
            // Negative ones are libseccomp's stand-ins for calls that this architecture does not have.
            if let Some(number) = number.ok().and_then(|number| u32::try_from(number).ok()) {
                *largest = (*largest).max(number);
            }
        }
    }
}

const LOAD: u16 = 0x20; // BPF_LD | BPF_W | BPF_ABS
const JUMP_EQUAL: u16 = 0x15; // BPF_JMP | BPF_JEQ | BPF_K
const JUMP_ABOVE: u16 = 0x25; // BPF_JMP | BPF_JGT | BPF_K
const JUMP_AT_LEAST: u16 = 0x35; // BPF_JMP | BPF_JGE | BPF_K
const RETURN: u16 = 0x06; // BPF_RET | BPF_K
const OFFSET_NUMBER: u32 = 0;
const OFFSET_ARCH: u32 = 4;
const RET_ERRNO: u32 = 0x0005_0000;

fn with_tail(largest: &Largest, program: Vec<Instruction>) -> Vec<Instruction> {
    let step = |code, value, jump_true, jump_false| Instruction { code, jump_true, jump_false, value };
    let mut whole = vec![
        step(LOAD, OFFSET_ARCH, 0, 0),
        step(JUMP_EQUAL, AUDIT_ARCH_NATIVE, 0, 3),
        step(LOAD, OFFSET_NUMBER, 0, 0),
        // x32 numbers are above every native one and belong to the profile.
        step(JUMP_AT_LEAST, X32_BIT, 5, 0),
        step(JUMP_ABOVE, largest.native, 3, 4),
        step(JUMP_EQUAL, AUDIT_ARCH_X86, 0, 3),
        step(LOAD, OFFSET_NUMBER, 0, 0),
        step(JUMP_ABOVE, largest.x86, 0, 1),
        step(RETURN, RET_ERRNO | libc::ENOSYS as u32, 0, 0),
    ];
    whole.extend(program);
    whole
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    /// What a program answers to a call: an interpreter of the few instructions that libseccomp emits.
    fn answer(program: &[Instruction], arch: u32, number: u32) -> u32 {
        let (mut at, mut accumulator) = (0, 0u32);
        loop {
            let i = program[at];
            at += 1;
            let jump = |holds: bool| usize::from(if holds { i.jump_true } else { i.jump_false });
            match i.code {
                LOAD => accumulator = [number, arch].get(i.value as usize / 4).copied().unwrap_or(0),
                JUMP_EQUAL => at += jump(accumulator == i.value),
                JUMP_ABOVE => at += jump(accumulator > i.value),
                JUMP_AT_LEAST => at += jump(accumulator >= i.value),
                0x45 => at += jump(accumulator & i.value != 0),
                0x05 => at += i.value as usize,
                0x54 => accumulator &= i.value,
                RETURN => return i.value,
                code => panic!("instruction {code:#x}"),
            }
        }
    }

    const ALLOW: u32 = 0x7fff_0000;
    const EPERM: u32 = RET_ERRNO | libc::EPERM as u32;
    const ENOSYS: u32 = RET_ERRNO | libc::ENOSYS as u32;

    fn program(profile: serde_json::Value) -> Vec<Instruction> {
        compile(&serde_json::from_value(profile).unwrap()).unwrap().program
    }

    #[test]
    #[cfg(target_arch = "x86_64")]
    fn calls_newer_than_the_profile_do_not_exist() {
        let program = program(json!({
            "defaultAction": "SCMP_ACT_ERRNO",
            "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"],
            "syscalls": [{"names": ["read", "openat2", "no_such_call"], "action": "SCMP_ACT_ALLOW"}],
        }));
        for (number, expected) in
            [(0, ALLOW), (437, ALLOW), (436, EPERM), (1, EPERM), (438, ENOSYS), (467, ENOSYS)]
        {
            assert_eq!(answer(&program, AUDIT_ARCH_NATIVE, number), expected, "call {number}");
        }
        assert_eq!(answer(&program, AUDIT_ARCH_X86, 3), ALLOW);
        assert_eq!(answer(&program, AUDIT_ARCH_X86, 4), EPERM);
        assert_eq!(answer(&program, AUDIT_ARCH_X86, 500), ENOSYS);
        assert_eq!(answer(&program, AUDIT_ARCH_NATIVE, X32_BIT), ALLOW);
        assert_eq!(answer(&program, AUDIT_ARCH_NATIVE, X32_BIT | 1), EPERM);
    }

    #[test]
    fn a_profile_that_allows_by_default_has_no_tail() {
        let program = program(json!({
            "defaultAction": "SCMP_ACT_ALLOW",
            "syscalls": [{"names": ["mount"], "action": "SCMP_ACT_ERRNO", "errnoRet": 38}],
        }));
        assert_eq!(answer(&program, AUDIT_ARCH_NATIVE, 467), ALLOW);
        assert_eq!(answer(&program, AUDIT_ARCH_NATIVE, u32::try_from(libc::SYS_mount).unwrap()), ENOSYS);
    }

    #[test]
    fn a_kept_filter_is_taken_for_its_own_profile_alone() {
        let dir = tempfile::tempdir().unwrap();
        let kept = dir.path().join("filters");
        let profile = |errno: u32| -> LinuxSeccomp {
            let rule = json!({"names": ["mount"], "action": "SCMP_ACT_ERRNO", "errnoRet": errno});
            serde_json::from_value(json!({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [rule]})).unwrap()
        };
        let first = compile_cached(&profile(1), &kept).unwrap();
        assert_eq!(first, compile(&profile(1)).unwrap());
        let file = std::fs::read_dir(&kept).unwrap().next().unwrap().unwrap().path();
        // Another profile's file under this name, as after a collision of hashes; then a damaged one.
        for bytes in [b"\x03\0\0\0\0\0\0\0abcxxxxxxxxxxxx".to_vec(), vec![0xff; 9], Vec::new()] {
            std::fs::write(&file, bytes).unwrap();
            assert_eq!(compile_cached(&profile(1), &kept).unwrap(), first);
        }
        assert_eq!(compile_cached(&profile(1), &kept).unwrap(), first);
        assert_ne!(compile_cached(&profile(2), &kept).unwrap(), first);
    }

    #[test]
    fn a_filter_survives_the_disk() {
        let filter = Filter { program: program(json!({"defaultAction": "SCMP_ACT_ALLOW"})), flags: FLAG_LOG };
        assert_eq!(Filter::from_bytes(&filter.to_bytes()), Some(filter));
        assert_eq!(Filter::from_bytes(&[0; 11]), None);
    }
}
