//! The rules of `linux.resources.devices` as a BPF program on the container's control group.
//!
//! The program (`BPF_PROG_TYPE_CGROUP_DEVICE`) sees one access at a time and answers 1 (allowed) or 0. Rules are read from the
//! last to the first: for each kind of access asked for, the last rule that speaks of it decides, and where none does it is
//! denied.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use crate::spec::DeviceRule;

/// Device rules that cannot be enforced.
#[derive(Debug, thiserror::Error)]
pub enum DevicesError {
    #[error("linux.resources.devices: {0}")]
    Rule(String),
    #[error("load the device program: {0}")]
    Load(io::Error),
    #[error("attach the device program to the control group: {0}")]
    Attach(io::Error),
}

/// `BPF_DEVCG_DEV_*` and `BPF_DEVCG_ACC_*` of `linux/bpf.h`.
const BLOCK: i32 = 1;
const CHAR: i32 = 2;
const MKNOD: i32 = 1;
const READ: i32 = 2;
const WRITE: i32 = 4;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Rule {
    allow: bool,
    /// Any where none.
    kind: Option<i32>,
    major: Option<u32>,
    minor: Option<u32>,
    access: i32,
}

/// What a container may do whatever its rules say, as with every runtime: make any node, and use the devices that are made for
/// it.
const ALWAYS: [Rule; 10] = [
    Rule { allow: true, kind: Some(CHAR), major: None, minor: None, access: MKNOD },
    Rule { allow: true, kind: Some(BLOCK), major: None, minor: None, access: MKNOD },
    device(1, Some(3)),
    device(1, Some(5)),
    device(1, Some(7)),
    device(1, Some(8)),
    device(1, Some(9)),
    device(5, Some(0)),
    device(5, Some(2)),
    device(136, None),
];

const fn device(major: u32, minor: Option<u32>) -> Rule {
    Rule { allow: true, kind: Some(CHAR), major: Some(major), minor, access: READ | WRITE | MKNOD }
}

/// The kernel gives up checking a program, with EAGAIN, when a signal arrives: here that of a child's end. So often in a row
/// none does.
const LOAD_ATTEMPTS: u32 = 100;

/// One instruction, `struct bpf_insn`.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Instruction {
    code: u8,
    /// Destination in the low half, source in the high one.
    registers: u8,
    offset: i16,
    immediate: i32,
}

/// The program for a list of rules.
#[derive(Debug, PartialEq, Eq)]
pub struct Program {
    instructions: Vec<Instruction>,
}

impl Program {
    /// Compiles the rules, and after them [`ALWAYS`].
    pub fn new(rules: &[DeviceRule]) -> Result<Self, DevicesError> {
        let mut all = rules.iter().map(parse).collect::<Result<Vec<_>, _>>()?;
        all.extend(ALWAYS);
        Ok(Self { instructions: compile(&all) })
    }

    /// Puts the program on a control group, beside those of the groups above.
    pub fn attach(&self, cgroup: &OwnedFd) -> Result<(), DevicesError> {
        const PROG_LOAD: libc::c_int = 5;
        const PROG_ATTACH: libc::c_int = 8;
        const PROG_TYPE_CGROUP_DEVICE: u32 = 15;
        const ATTACH_TYPE_CGROUP_DEVICE: u32 = 6;
        const ALLOW_MULTI: u32 = 2;
        /// The first fields of the two faces of `union bpf_attr`.
        #[repr(C)]
        struct Load {
            kind: u32,
            count: u32,
            instructions: u64,
            license: u64,
            log: [u64; 2],
            version: u32,
            flags: u32,
        }
        #[repr(C)]
        struct Attach {
            target: u32,
            program: u32,
            kind: u32,
            flags: u32,
        }
        let load = Load {
            kind: PROG_TYPE_CGROUP_DEVICE,
            count: self.instructions.len() as u32,
            instructions: self.instructions.as_ptr() as u64,
            license: c"Apache-2.0".as_ptr() as u64,
            log: [0; 2],
            version: 0,
            flags: 0,
        };
        let mut attempts = 0..LOAD_ATTEMPTS;
        let program = loop {
            // SAFETY: the attribute is of the given size, and the pointers in it are to a string and to `count` instructions that
            // outlive the call.
            let program = unsafe { libc::syscall(libc::SYS_bpf, PROG_LOAD, &raw const load, size_of_val(&load)) };
            if program >= 0 {
                // SAFETY: the kernel just made this descriptor for us.
                break unsafe { OwnedFd::from_raw_fd(program as i32) };
            }
            let error = io::Error::last_os_error();
            if error.kind() != io::ErrorKind::WouldBlock || attempts.next().is_none() {
                return Err(DevicesError::Load(error));
            }
        };
        let attach = Attach {
            target: cgroup.as_raw_fd() as u32,
            program: program.as_raw_fd() as u32,
            kind: ATTACH_TYPE_CGROUP_DEVICE,
            flags: ALLOW_MULTI,
        };
        // SAFETY: the attribute is of the given size and has no pointers.
        if unsafe { libc::syscall(libc::SYS_bpf, PROG_ATTACH, &raw const attach, size_of_val(&attach)) } < 0 {
            return Err(DevicesError::Attach(io::Error::last_os_error()));
        }
        Ok(())
    }
}

fn parse(rule: &DeviceRule) -> Result<Rule, DevicesError> {
    let kind = match rule.kind.as_str() {
        "" | "a" => None,
        "b" => Some(BLOCK),
        "c" | "u" => Some(CHAR),
        other => return Err(DevicesError::Rule(format!("expected type a, b, c or u, not {other:?}"))),
    };
    let number = |name: &str, number: Option<i64>| match number {
        None | Some(-1) => Ok(None),
        Some(number) => u32::try_from(number)
            .map(Some)
            .map_err(|_| DevicesError::Rule(format!("expected a {name} number or -1, not {number}"))),
    };
    let mut access = 0;
    for letter in rule.access.chars() {
        access |= match letter {
            'r' => READ,
            'w' => WRITE,
            'm' => MKNOD,
            _ => 0,
        };
    }
    // No letter at all is how the rule for everything is commonly written.
    if rule.access.is_empty() {
        access = READ | WRITE | MKNOD;
    } else if access == 0 {
        return Err(DevicesError::Rule(format!("expected access of r, w and m, not {:?}", rule.access)));
    }
    Ok(Rule {
        allow: rule.allow,
        kind,
        major: number("major", rule.major)?,
        minor: number("minor", rule.minor)?,
        access,
    })
}

const R0: u8 = 0;
const R1: u8 = 1;
/// Type, access still undecided, major and minor of the device asked for.
const KIND: u8 = 2;
const ACCESS: u8 = 3;
const MAJOR: u8 = 4;
const MINOR: u8 = 5;

fn compile(rules: &[Rule]) -> Vec<Instruction> {
    // struct bpf_cgroup_dev_ctx: type in the low half and access in the high half of the first word, then major, minor.
    let mut program = vec![
        load_word(KIND, R1, 0),
        move_register(ACCESS, KIND),
        and(KIND, 0xffff),
        shift_right(ACCESS, 16),
        load_word(MAJOR, R1, 4),
        load_word(MINOR, R1, 8),
    ];
    for rule in rules.iter().rev() {
        program.extend(compile_rule(*rule));
    }
    program.extend(answer(false));
    program
}

fn compile_rule(rule: Rule) -> Vec<Instruction> {
    let conditions = [
        (KIND, rule.kind),
        (MAJOR, rule.major.map(|number| number as i32)),
        (MINOR, rule.minor.map(|number| number as i32)),
    ];
    let body = if rule.allow {
        // What this rule allows is decided; nothing left means allowed.
        let mut body = vec![and(ACCESS, !rule.access), jump_if_not_equal(ACCESS, 0, 2)];
        body.extend(answer(true));
        body
    } else {
        let mut body = vec![move_register(R0, ACCESS), and(R0, rule.access), jump_if_equal(R0, 0, 2)];
        body.extend(answer(false));
        body
    };
    let conditions: Vec<_> = conditions.into_iter().filter_map(|(register, value)| Some((register, value?))).collect();
    let count = conditions.len();
    let mut program: Vec<Instruction> = conditions
        .into_iter()
        .enumerate()
        .map(|(at, (register, value))| jump_if_not_equal(register, value, (count - at - 1 + body.len()) as i16))
        .collect();
    program.extend(body);
    program
}

fn answer(allowed: bool) -> [Instruction; 2] {
    [
        // BPF_ALU64 | BPF_MOV | BPF_K
        Instruction { code: 0xb7, registers: R0, offset: 0, immediate: i32::from(allowed) },
        // BPF_JMP | BPF_EXIT
        Instruction { code: 0x95, registers: 0, offset: 0, immediate: 0 },
    ]
}

/// `BPF_LDX | BPF_MEM | BPF_W`.
fn load_word(to: u8, from: u8, offset: i16) -> Instruction {
    Instruction { code: 0x61, registers: from << 4 | to, offset, immediate: 0 }
}

/// `BPF_ALU | BPF_MOV | BPF_X`, 32 bits as the rest of the arithmetic.
fn move_register(to: u8, from: u8) -> Instruction {
    Instruction { code: 0xbc, registers: from << 4 | to, offset: 0, immediate: 0 }
}

/// `BPF_ALU | BPF_AND | BPF_K`.
fn and(register: u8, immediate: i32) -> Instruction {
    Instruction { code: 0x54, registers: register, offset: 0, immediate }
}

/// `BPF_ALU | BPF_RSH | BPF_K`.
fn shift_right(register: u8, immediate: i32) -> Instruction {
    Instruction { code: 0x74, registers: register, offset: 0, immediate }
}

/// `BPF_JMP32 | BPF_JEQ | BPF_K`.
fn jump_if_equal(register: u8, immediate: i32, offset: i16) -> Instruction {
    Instruction { code: 0x16, registers: register, offset, immediate }
}

/// `BPF_JMP32 | BPF_JNE | BPF_K`.
fn jump_if_not_equal(register: u8, immediate: i32, offset: i16) -> Instruction {
    Instruction { code: 0x56, registers: register, offset, immediate }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Executes a program as the kernel would.
    fn allowed(program: &[Instruction], kind: i32, access: i32, major: u32, minor: u32) -> bool {
        let context = [(access << 16 | kind) as u32, major, minor];
        let mut registers = [0u32; 16];
        let mut at = 0;
        loop {
            let Instruction { code, registers: pair, offset, immediate } = program[at];
            let (to, from) = (usize::from(pair & 15), usize::from(pair >> 4));
            at += 1;
            match code {
                0x61 => registers[to] = context[offset as usize / 4],
                0xbc => registers[to] = registers[from],
                0x54 => registers[to] &= immediate as u32,
                0x74 => registers[to] >>= immediate,
                0xb7 => registers[to] = immediate as u32,
                0x16 if registers[to] == immediate as u32 => at += offset as usize,
                0x56 if registers[to] != immediate as u32 => at += offset as usize,
                0x16 | 0x56 => {}
                0x95 => return registers[0] == 1,
                other => panic!("instruction {other:#x}"),
            }
        }
    }

    fn program(json: &str) -> Vec<Instruction> {
        Program::new(&serde_json::from_str::<Vec<DeviceRule>>(json).unwrap()).unwrap().instructions
    }

    #[test]
    fn without_rules_only_the_devices_every_container_has_are_allowed() {
        let program = program("[]");
        for (major, minor) in [(1, 3), (1, 5), (1, 7), (1, 8), (1, 9), (5, 0), (5, 2), (136, 7)] {
            assert!(allowed(&program, CHAR, READ | WRITE | MKNOD, major, minor), "{major}:{minor}");
            assert!(!allowed(&program, BLOCK, READ, major, minor), "{major}:{minor}");
        }
        assert!(!allowed(&program, CHAR, READ, 1, 1));
        assert!(allowed(&program, CHAR, MKNOD, 1, 1));
        assert!(allowed(&program, BLOCK, MKNOD, 8, 0));
        assert!(!allowed(&program, BLOCK, MKNOD | READ, 8, 0));
    }

    #[test]
    fn the_last_rule_that_speaks_of_an_access_decides() {
        let program = program(
            r#"[{"allow":false,"access":"rwm"},{"allow":true,"type":"b","major":8,"access":"rw"},
                {"allow":false,"type":"b","major":8,"minor":1,"access":"w"}]"#,
        );
        assert!(allowed(&program, BLOCK, READ | WRITE, 8, 0));
        assert!(allowed(&program, BLOCK, READ, 8, 1));
        assert!(!allowed(&program, BLOCK, READ | WRITE, 8, 1));
        assert!(!allowed(&program, BLOCK, READ, 9, 0));
    }

    #[test]
    fn two_rules_may_allow_one_access_together() {
        let program = program(
            r#"[{"allow":true,"type":"c","major":10,"minor":200,"access":"r"},
                {"allow":true,"type":"c","major":10,"access":"w"}]"#,
        );
        assert!(allowed(&program, CHAR, READ | WRITE, 10, 200));
        assert!(!allowed(&program, CHAR, READ | WRITE, 10, 201));
        assert!(allowed(&program, CHAR, WRITE, 10, 201));
    }

    #[test]
    fn everything_can_be_allowed() {
        let program = program(r#"[{"allow":true,"type":"a","major":-1,"minor":-1,"access":"rwm"}]"#);
        assert!(allowed(&program, BLOCK, READ | WRITE, 254, 3));
    }

    #[test]
    fn letters_that_mean_nothing_are_passed_over() {
        let program =
            program(r#"[{"allow":true,"type":"a","access":"rwm"},{"allow":false,"type":"c","access":"rwa"}]"#);
        assert!(!allowed(&program, CHAR, READ, 10, 200));
        assert!(!allowed(&program, CHAR, WRITE, 10, 200));
    }

    #[test]
    fn a_rule_that_says_nothing_known_is_refused() {
        for json in [r#"{"allow":true,"type":"p"}"#, r#"{"allow":true,"access":"x"}"#, r#"{"allow":true,"major":-2}"#] {
            assert!(parse(&serde_json::from_str(json).unwrap()).is_err(), "{json}");
        }
    }
}
