//! The system call filter of `linux.seccomp`.
//!
//! libseccomp compiles the rules; in front of its program comes one of our own, for what it cannot say: system calls that are
//! newer than the library, and the answer ENOSYS to calls newer than the profile. A profile that denies by default would deny
//! those too, with an error that tells a C library that the call exists; with ENOSYS it falls back to what it did before.

use std::io::{Read, Seek};

use libseccomp::{ScmpAction, ScmpArch, ScmpArgCompare, ScmpCompareOp, ScmpFilterContext, ScmpSyscall};
use rustix::fs::MemfdFlags;
use rustix::io::Errno;

use super::rootfs::last_errno;
use crate::spec::{Seccomp, SeccompArg, SeccompRule};

/// A filter that cannot be had as given.
#[derive(Debug, thiserror::Error)]
pub enum SeccompError {
    #[error("linux.seccomp: unknown action {0:?}")]
    Action(String),
    #[error("linux.seccomp: SCMP_ACT_NOTIFY is not supported: its listener would be in another kernel")]
    Notify,
    #[error("linux.seccomp.{0}: not supported: its listener would be in another kernel")]
    Listener(&'static str),
    #[error(
        "linux.seccomp.architectures: {0:?} is unknown, or has another order of bytes than this machine: leave it out"
    )]
    Architecture(String),
    #[error("linux.seccomp.flags: unknown flag {0:?}")]
    Flag(String),
    #[error("linux.seccomp.syscalls: unknown system call {0:?}")]
    Syscall(String),
    #[error("linux.seccomp.syscalls: {0}: conditions on the arguments of so new a system call are not supported")]
    NewWithArgs(String),
    #[error("linux.seccomp.syscalls: unknown operator {0:?}")]
    Operator(String),
    #[error("linux.seccomp.syscalls: expected an argument index of 0 to 5, not {0}")]
    Index(u32),
    #[error("linux.seccomp: errnoRet {0}: expected at most 4095")]
    Errno(u32),
    #[error("linux.seccomp: compile the filter: {0}")]
    Compile(#[from] libseccomp::error::SeccompError),
    #[error("linux.seccomp: read the filter: {0}")]
    Export(std::io::Error),
    #[error("linux.seccomp: load the filter: {0}")]
    Load(Errno),
}

impl SeccompError {
    /// Whether the specification is at fault, not the machine.
    pub fn is_invalid(&self) -> bool {
        !matches!(self, Self::Compile(_) | Self::Export(_) | Self::Load(_))
    }
}

/// System calls that libseccomp 2.5.4 does not know. They have these numbers on every architecture.
const NEWER: [(&str, u32); 19] = [
    ("cachestat", 451),
    ("fchmodat2", 452),
    ("map_shadow_stack", 453),
    ("futex_wake", 454),
    ("futex_wait", 455),
    ("futex_requeue", 456),
    ("statmount", 457),
    ("listmount", 458),
    ("lsm_get_self_attr", 459),
    ("lsm_set_self_attr", 460),
    ("lsm_list_modules", 461),
    ("mseal", 462),
    ("setxattrat", 463),
    ("getxattrat", 464),
    ("listxattrat", 465),
    ("removexattrat", 466),
    ("open_tree_attr", 467),
    ("file_getattr", 468),
    ("file_setattr", 469),
];

/// Those of x86-64 alone.
const NEWER_X86_64: [(&str, u32); 2] = [("uretprobe", 335), ("uprobe", 336)];

/// Those that no x86 machine has, and libseccomp 2.5.4 knows nowhere: profiles for every architecture name them.
const NEWER_ELSEWHERE: [&str; 1] = ["riscv_hwprobe"];

/// `struct sock_filter`.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Instruction {
    code: u16,
    jump_true: u8,
    jump_false: u8,
    value: u32,
}

/// A compiled filter.
#[derive(Debug)]
pub struct Filter {
    program: Vec<Instruction>,
    flags: u32,
}

impl Filter {
    pub fn compile(profile: &Seccomp) -> Result<Self, SeccompError> {
        if !profile.listener_path.is_empty() {
            return Err(SeccompError::Listener("listenerPath"));
        }
        if !profile.listener_metadata.is_empty() {
            return Err(SeccompError::Listener("listenerMetadata"));
        }
        let default = action(&profile.default_action, profile.default_errno_ret)?;
        let mut architectures = Vec::new();
        for name in &profile.architectures {
            architectures.extend(architecture(name)?);
        }
        let mut context = ScmpFilterContext::new(default)?;
        for architecture in &architectures {
            context.add_arch(*architecture)?;
        }
        let mut newer = Vec::new();
        for rule in &profile.syscalls {
            add_rule(&mut context, rule, default, &mut newer)?;
        }
        let mut program = prelude(profile, default, &architectures, &newer);
        program.extend(export(&context)?);
        Ok(Self { program, flags: flags(profile.flags.as_deref())? })
    }

    /// Loads it into the calling thread, which is the only one.
    pub fn load(&self) -> Result<(), SeccompError> {
        const SET_MODE_FILTER: libc::c_uint = 1;
        #[repr(C)]
        struct Program {
            length: u16,
            instructions: *const Instruction,
        }
        let length = u16::try_from(self.program.len()).map_err(|_| SeccompError::Load(Errno::TOOBIG))?;
        let program = Program { length, instructions: self.program.as_ptr() };
        // SAFETY: the structure is a sock_fprog of as many instructions as it says, all of which outlive the call.
        if unsafe { libc::syscall(libc::SYS_seccomp, SET_MODE_FILTER, self.flags, &raw const program) } < 0 {
            return Err(SeccompError::Load(last_errno()));
        }
        Ok(())
    }
}

fn add_rule(
    context: &mut ScmpFilterContext,
    rule: &SeccompRule,
    default: ScmpAction,
    newer: &mut Vec<(&'static str, u32, ScmpAction)>,
) -> Result<(), SeccompError> {
    let action = action(&rule.action, rule.errno_ret)?;
    let conditions = rule.args.iter().map(condition).collect::<Result<Vec<_>, _>>()?;
    // Several conditions on one argument are alternatives, by custom; on several arguments they must all hold.
    let alternatives =
        rule.args.iter().enumerate().any(|(at, arg)| rule.args[..at].iter().any(|earlier| earlier.index == arg.index));
    for name in &rule.names {
        if NEWER_ELSEWHERE.contains(&name.as_str()) {
            continue;
        }
        let Ok(syscall) = ScmpSyscall::from_name(name) else {
            let Some(known) = NEWER.iter().chain(&NEWER_X86_64).find(|(newer, _)| newer == name) else {
                return Err(SeccompError::Syscall(name.clone()));
            };
            if !conditions.is_empty() {
                return Err(SeccompError::NewWithArgs(name.clone()));
            }
            newer.push((known.0, known.1, action));
            continue;
        };
        // A rule for what happens anyway is one that libseccomp refuses.
        if action == default {
            continue;
        }
        if conditions.is_empty() {
            context.add_rule(action, syscall)?;
        } else if alternatives {
            for condition in &conditions {
                context.add_rule_conditional(action, syscall, &[*condition])?;
            }
        } else {
            context.add_rule_conditional(action, syscall, &conditions)?;
        }
    }
    Ok(())
}

fn action(name: &str, errno: Option<u32>) -> Result<ScmpAction, SeccompError> {
    let errno = errno.unwrap_or(libc::EPERM.unsigned_abs());
    if errno > 4095 {
        return Err(SeccompError::Errno(errno));
    }
    Ok(match name {
        "SCMP_ACT_KILL" | "SCMP_ACT_KILL_THREAD" => ScmpAction::KillThread,
        "SCMP_ACT_KILL_PROCESS" => ScmpAction::KillProcess,
        "SCMP_ACT_TRAP" => ScmpAction::Trap,
        "SCMP_ACT_ERRNO" => ScmpAction::Errno(errno as i32),
        "SCMP_ACT_TRACE" => ScmpAction::Trace(errno as u16),
        "SCMP_ACT_ALLOW" => ScmpAction::Allow,
        "SCMP_ACT_LOG" => ScmpAction::Log,
        "SCMP_ACT_NOTIFY" => return Err(SeccompError::Notify),
        other => return Err(SeccompError::Action(other.into())),
    })
}

/// `SECCOMP_RET_*` of `linux/seccomp.h`.
fn return_value(action: ScmpAction) -> u32 {
    match action {
        ScmpAction::KillProcess => 0x8000_0000,
        ScmpAction::Trap => 0x0003_0000,
        ScmpAction::Errno(errno) => 0x0005_0000 | errno.unsigned_abs(),
        ScmpAction::Trace(data) => 0x7ff0_0000 | u32::from(data),
        ScmpAction::Log => 0x7ffc_0000,
        ScmpAction::Allow => 0x7fff_0000,
        // KillThread; Notify is refused before.
        _ => 0,
    }
}

/// `None` for one that this machine does not run: nothing ever asks its rules, and profiles for several machines have them.
fn architecture(name: &str) -> Result<Option<ScmpArch>, SeccompError> {
    match name {
        "SCMP_ARCH_X86_64" => Ok(Some(ScmpArch::X8664)),
        "SCMP_ARCH_X86" => Ok(Some(ScmpArch::X86)),
        "SCMP_ARCH_X32" => Ok(Some(ScmpArch::X32)),
        "SCMP_ARCH_ARM"
        | "SCMP_ARCH_AARCH64"
        | "SCMP_ARCH_MIPSEL"
        | "SCMP_ARCH_MIPSEL64"
        | "SCMP_ARCH_MIPSEL64N32"
        | "SCMP_ARCH_PPC64LE"
        | "SCMP_ARCH_RISCV64"
        | "SCMP_ARCH_LOONGARCH64"
        | "SCMP_ARCH_SH" => Ok(None),
        other => Err(SeccompError::Architecture(other.into())),
    }
}

fn condition(arg: &SeccompArg) -> Result<ScmpArgCompare, SeccompError> {
    let (operator, value) = match arg.op.as_str() {
        "SCMP_CMP_NE" => (ScmpCompareOp::NotEqual, arg.value),
        "SCMP_CMP_LT" => (ScmpCompareOp::Less, arg.value),
        "SCMP_CMP_LE" => (ScmpCompareOp::LessOrEqual, arg.value),
        "SCMP_CMP_EQ" => (ScmpCompareOp::Equal, arg.value),
        "SCMP_CMP_GE" => (ScmpCompareOp::GreaterEqual, arg.value),
        "SCMP_CMP_GT" => (ScmpCompareOp::Greater, arg.value),
        "SCMP_CMP_MASKED_EQ" => (ScmpCompareOp::MaskedEqual(arg.value), arg.value_two),
        other => return Err(SeccompError::Operator(other.into())),
    };
    if arg.index > 5 {
        return Err(SeccompError::Index(arg.index));
    }
    Ok(ScmpArgCompare::new(arg.index, operator, value))
}

fn flags(names: Option<&[String]>) -> Result<u32, SeccompError> {
    const LOG: u32 = 1 << 1;
    const SPEC_ALLOW: u32 = 1 << 2;
    // Where nothing is said, filtered programs are not slowed down against speculation attacks on themselves.
    let Some(names) = names else { return Ok(SPEC_ALLOW) };
    names.iter().try_fold(0, |flags, name| match name.as_str() {
        // All threads of one.
        "SECCOMP_FILTER_FLAG_TSYNC" => Ok(flags),
        "SECCOMP_FILTER_FLAG_LOG" => Ok(flags | LOG),
        "SECCOMP_FILTER_FLAG_SPEC_ALLOW" => Ok(flags | SPEC_ALLOW),
        other => Err(SeccompError::Flag(other.into())),
    })
}

fn export(context: &ScmpFilterContext) -> Result<Vec<Instruction>, SeccompError> {
    let export =
        || -> std::io::Result<std::fs::File> { Ok(rustix::fs::memfd_create("seccomp", MemfdFlags::CLOEXEC)?.into()) };
    let mut file = export().map_err(SeccompError::Export)?;
    context.export_bpf(&file)?;
    let mut bytes = Vec::new();
    file.rewind().and_then(|()| file.read_to_end(&mut bytes)).map_err(SeccompError::Export)?;
    Ok(bytes
        .chunks_exact(size_of::<Instruction>())
        .map(|chunk| Instruction {
            code: u16::from_ne_bytes([chunk[0], chunk[1]]),
            jump_true: chunk[2],
            jump_false: chunk[3],
            value: u32::from_ne_bytes([chunk[4], chunk[5], chunk[6], chunk[7]]),
        })
        .collect())
}

/// What runs before libseccomp's program: nothing it decides is decided here.
fn prelude(
    profile: &Seccomp,
    default: ScmpAction,
    architectures: &[ScmpArch],
    newer: &[(&'static str, u32, ScmpAction)],
) -> Vec<Instruction> {
    const AUDIT_ARCH_X86_64: u32 = 0xc000_003e;
    const AUDIT_ARCH_I386: u32 = 0x4000_0003;
    const X32_BIT: u32 = 0x4000_0000;
    const NOSYS: u32 = 0x0005_0000 | libc::ENOSYS.unsigned_abs();
    // A profile that lets pass by default lets new calls pass, too; a tracer decides for itself.
    let denies = !matches!(default, ScmpAction::Allow | ScmpAction::Log | ScmpAction::Trace(_));
    let mut blocks = vec![(AUDIT_ARCH_X86_64, ScmpArch::X8664)];
    if architectures.contains(&ScmpArch::X86) {
        blocks.push((AUDIT_ARCH_I386, ScmpArch::X86));
    }
    let mut program = Vec::new();
    for (audit, architecture) in blocks {
        let mut block = vec![load(0)];
        if architecture == ScmpArch::X8664 {
            // x32 calls have the same architecture and numbers of their own; they are libseccomp's.
            block.push(Instruction { code: JUMP_SET, jump_true: 0, jump_false: 1, value: X32_BIT });
            block.push(jump(0));
        }
        for (name, number, action) in newer {
            let native_only = NEWER_X86_64.iter().any(|(native, _)| native == name);
            if native_only && architecture != ScmpArch::X8664 {
                continue;
            }
            block.push(Instruction { code: JUMP_EQUAL, jump_true: 0, jump_false: 1, value: *number });
            block.push(answer(return_value(*action)));
        }
        if denies {
            let newest = newest(profile, architecture, newer);
            block.push(Instruction { code: JUMP_GREATER, jump_true: 0, jump_false: 1, value: newest });
            block.push(answer(NOSYS));
        }
        // The jump out of the block is known now that its length is.
        let length = block.len() as u32;
        if architecture == ScmpArch::X8664 {
            block[2] = jump(length - 3);
        }
        program.push(load(4));
        program.push(Instruction { code: JUMP_EQUAL, jump_true: 1, jump_false: 0, value: audit });
        program.push(jump(length));
        program.extend(block);
    }
    program
}

/// The highest number the profile speaks of.
fn newest(profile: &Seccomp, architecture: ScmpArch, newer: &[(&'static str, u32, ScmpAction)]) -> u32 {
    let known = profile.syscalls.iter().flat_map(|rule| &rule.names).filter_map(|name| {
        let syscall = ScmpSyscall::from_name_by_arch(name, architecture).ok()?;
        // Calls of other architectures have negative numbers.
        u32::try_from(i32::from(syscall)).ok()
    });
    known.chain(newer.iter().map(|(_, number, _)| *number)).max().unwrap_or_default()
}

/// `BPF_JMP | BPF_JEQ | BPF_K` and so on.
const JUMP_EQUAL: u16 = 0x15;
const JUMP_GREATER: u16 = 0x25;
const JUMP_SET: u16 = 0x45;

/// `BPF_LD | BPF_W | BPF_ABS`: from `struct seccomp_data`, the number at 0, the architecture at 4.
const fn load(offset: u32) -> Instruction {
    Instruction { code: 0x20, jump_true: 0, jump_false: 0, value: offset }
}

/// `BPF_JMP | BPF_JA`.
const fn jump(distance: u32) -> Instruction {
    Instruction { code: 0x05, jump_true: 0, jump_false: 0, value: distance }
}

/// `BPF_RET | BPF_K`.
const fn answer(value: u32) -> Instruction {
    Instruction { code: 0x06, jump_true: 0, jump_false: 0, value }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALLOW: u32 = 0x7fff_0000;
    const X86_64: u32 = 0xc000_003e;
    const I386: u32 = 0x4000_0003;

    fn errno(errno: i32) -> u32 {
        0x0005_0000 | errno as u32
    }

    /// Runs a filter as the kernel would.
    fn run(filter: &Filter, architecture: u32, number: u32, args: [u64; 6]) -> u32 {
        let mut data = [0u8; 64];
        data[..4].copy_from_slice(&number.to_ne_bytes());
        data[4..8].copy_from_slice(&architecture.to_ne_bytes());
        for (at, arg) in args.iter().enumerate() {
            data[16 + at * 8..24 + at * 8].copy_from_slice(&arg.to_ne_bytes());
        }
        let (mut accumulator, mut at) = (0u32, 0usize);
        loop {
            let Instruction { code, jump_true, jump_false, value } = filter.program[at];
            at += 1;
            let mut branch = |taken: bool| at += usize::from(if taken { jump_true } else { jump_false });
            match code {
                0x20 => accumulator = u32::from_ne_bytes(data[value as usize..][..4].try_into().unwrap()),
                0x05 => at += value as usize,
                0x15 => branch(accumulator == value),
                0x25 => branch(accumulator > value),
                0x35 => branch(accumulator >= value),
                0x45 => branch(accumulator & value != 0),
                0x54 => accumulator &= value,
                0x06 => return value,
                other => panic!("instruction {other:#x}"),
            }
        }
    }

    fn compile(json: &str) -> Result<Filter, SeccompError> {
        Filter::compile(&serde_json::from_str(json).unwrap())
    }

    fn profile(default: &str, rules: &str) -> Filter {
        compile(&format!(
            r#"{{"defaultAction":"{default}","architectures":["SCMP_ARCH_X86_64","SCMP_ARCH_X86"],"syscalls":[{rules}]}}"#
        ))
        .unwrap()
    }

    #[test]
    fn calls_are_allowed_and_denied_by_name_on_both_architectures() {
        let filter = profile("SCMP_ACT_ERRNO", r#"{"names":["read","clone3"],"action":"SCMP_ACT_ALLOW"}"#);
        assert_eq!(run(&filter, X86_64, libc::SYS_read as u32, [0; 6]), ALLOW);
        assert_eq!(run(&filter, I386, 3, [0; 6]), ALLOW);
        assert_eq!(run(&filter, X86_64, libc::SYS_write as u32, [0; 6]), errno(libc::EPERM));
        assert_eq!(run(&filter, I386, 4, [0; 6]), errno(libc::EPERM));
    }

    #[test]
    fn calls_newer_than_the_profile_do_not_exist() {
        let filter = profile("SCMP_ACT_ERRNO", r#"{"names":["read","clone3"],"action":"SCMP_ACT_ALLOW"}"#);
        for architecture in [X86_64, I386] {
            assert_eq!(run(&filter, architecture, 436, [0; 6]), errno(libc::ENOSYS));
            assert_eq!(run(&filter, architecture, 434, [0; 6]), errno(libc::EPERM));
        }
        let allowing = profile("SCMP_ACT_ALLOW", r#"{"names":["read"],"action":"SCMP_ACT_ERRNO"}"#);
        assert_eq!(run(&allowing, X86_64, 900, [0; 6]), ALLOW);
    }

    #[test]
    fn calls_newer_than_the_library_are_known() {
        let filter = profile(
            "SCMP_ACT_ERRNO",
            r#"{"names":["mseal"],"action":"SCMP_ACT_ALLOW"},{"names":["cachestat"],"action":"SCMP_ACT_KILL_PROCESS"}"#,
        );
        for architecture in [X86_64, I386] {
            assert_eq!(run(&filter, architecture, 462, [0; 6]), ALLOW);
            assert_eq!(run(&filter, architecture, 451, [0; 6]), 0x8000_0000);
            assert_eq!(run(&filter, architecture, 463, [0; 6]), errno(libc::ENOSYS));
        }
    }

    #[test]
    fn architectures_of_other_machines_do_nothing_here() {
        let rules = r#"[{"names":["read"],"action":"SCMP_ACT_ALLOW"}]"#;
        let with = |architectures: &str| {
            let json =
                format!(r#"{{"defaultAction":"SCMP_ACT_ERRNO","architectures":[{architectures}],"syscalls":{rules}}}"#);
            compile(&json).unwrap()
        };
        let (here, everywhere) =
            (with(r#""SCMP_ARCH_X86_64""#), with(r#""SCMP_ARCH_AARCH64","SCMP_ARCH_X86_64","SCMP_ARCH_ARM""#));
        for (architecture, number) in [(X86_64, libc::SYS_read as u32), (X86_64, libc::SYS_write as u32), (I386, 3)] {
            let found = run(&everywhere, architecture, number, [0; 6]);
            assert_eq!(found, run(&here, architecture, number, [0; 6]), "{architecture:x} {number}");
        }
    }

    #[test]
    fn calls_of_other_architectures_are_known_and_do_nothing_here() {
        let filter = profile(
            "SCMP_ACT_ERRNO",
            r#"{"names":["breakpoint","s390_pci_mmio_read","riscv_hwprobe"],"action":"SCMP_ACT_ALLOW"}"#,
        );
        assert_eq!(run(&filter, X86_64, 0, [0; 6]), errno(libc::EPERM));
    }

    #[test]
    fn conditions_of_one_argument_are_alternatives_and_of_several_must_all_hold() {
        let filter = profile(
            "SCMP_ACT_ERRNO",
            r#"{"names":["personality"],"action":"SCMP_ACT_ALLOW",
                "args":[{"index":0,"value":0,"op":"SCMP_CMP_EQ"},{"index":0,"value":8,"op":"SCMP_CMP_EQ"}]},
               {"names":["socket"],"action":"SCMP_ACT_ALLOW",
                "args":[{"index":0,"value":1,"op":"SCMP_CMP_EQ"},{"index":1,"value":15,"valueTwo":2,"op":"SCMP_CMP_MASKED_EQ"}]},
               {"names":["clone3"],"action":"SCMP_ACT_ALLOW"}"#,
        );
        let personality = |domain| run(&filter, X86_64, libc::SYS_personality as u32, [domain, 0, 0, 0, 0, 0]);
        assert_eq!([0, 8, 1].map(personality), [ALLOW, ALLOW, errno(libc::EPERM)]);
        let socket = |family, kind| run(&filter, X86_64, libc::SYS_socket as u32, [family, kind, 0, 0, 0, 0]);
        assert_eq!(socket(1, 0x82), ALLOW);
        assert_eq!(socket(1, 1), errno(libc::EPERM));
        assert_eq!(socket(2, 2), errno(libc::EPERM));
    }

    #[test]
    fn each_action_has_its_return_value() {
        for (name, value) in [
            ("SCMP_ACT_KILL", 0),
            ("SCMP_ACT_KILL_THREAD", 0),
            ("SCMP_ACT_KILL_PROCESS", 0x8000_0000),
            ("SCMP_ACT_TRAP", 0x0003_0000),
            ("SCMP_ACT_LOG", 0x7ffc_0000),
            ("SCMP_ACT_TRACE", 0x7ff0_0001),
        ] {
            let rule = format!(r#"{{"names":["mkdir","mseal"],"action":"{name}"}}"#);
            let filter = profile("SCMP_ACT_ALLOW", &rule);
            assert_eq!(run(&filter, X86_64, libc::SYS_mkdir as u32, [0; 6]), value, "{name}");
            assert_eq!(run(&filter, X86_64, 462, [0; 6]), value, "{name}");
        }
        let filter = profile("SCMP_ACT_ALLOW", r#"{"names":["mkdir"],"action":"SCMP_ACT_ERRNO","errnoRet":38}"#);
        assert_eq!(run(&filter, X86_64, libc::SYS_mkdir as u32, [0; 6]), errno(38));
    }

    #[test]
    fn what_would_be_dropped_is_refused_by_name() {
        for (json, word) in [
            (r#"{"defaultAction":"SCMP_ACT_NOTIFY"}"#, "SCMP_ACT_NOTIFY"),
            (r#"{"defaultAction":"SCMP_ACT_DREAM"}"#, "SCMP_ACT_DREAM"),
            (r#"{"defaultAction":"SCMP_ACT_ALLOW","architectures":["SCMP_ARCH_S390X"]}"#, "SCMP_ARCH_S390X"),
            (r#"{"defaultAction":"SCMP_ACT_ALLOW","flags":["SECCOMP_FILTER_FLAG_X"]}"#, "SECCOMP_FILTER_FLAG_X"),
            (r#"{"defaultAction":"SCMP_ACT_ALLOW","listenerPath":"/x"}"#, "listenerPath"),
            (
                r#"{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{"names":["fly"],"action":"SCMP_ACT_ERRNO"}]}"#,
                r#""fly""#,
            ),
        ] {
            let error = compile(json).unwrap_err();
            assert!(error.is_invalid() && error.to_string().contains(word), "{error}");
        }
    }
}
