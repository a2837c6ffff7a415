//! Machines that run a few instructions of guest code, on any `/dev/kvm` that opens: what a vCPU reaches through its exits,
//! and that a paused machine can be taken and put back.
//!
//! Without a `/dev/kvm` they fail: a test that ran nothing must not pass.

#![expect(clippy::unwrap_used, reason = "a test ends where it fails")]

use std::fs::File;
use std::io::Write;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use podhull_vmm::control::{End, MachineConfig};
use podhull_vmm::jail::Kind;
use podhull_vmm::machine::{Listeners, Machine, Parts};
use podhull_vmm::snapshot::MachineState;
use podhull_vmm::vcpu::install_kick_handler;
use podhull_vmm::virtio::Device;
use podhull_vmm::virtio::entropy::Entropy;
use vm_memory::{Bytes, GuestAddress, GuestMemory};

/// Where payloads lie, and where they leave what they found.
const CODE: u64 = 0x10_0000;
const RESULT: u64 = 0x20_0000;
/// A machine of a few instructions answers within this, on the slowest host; nothing depends on the value.
const DEADLINE: Duration = Duration::from_secs(30);

/// A file without a name that holds `bytes`.
fn file(bytes: &[u8]) -> File {
    let fd = rustix::fs::memfd_create("payload", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    let mut file = File::from(fd);
    file.write_all(bytes).unwrap();
    file
}

/// An ELF file with one segment: `code`, loaded and entered at [`CODE`].
fn elf(code: &[u8]) -> File {
    let mut bytes = vec![0u8; 4096];
    bytes[..6].copy_from_slice(b"\x7fELF\x02\x01");
    let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
    put(16, &2u16.to_le_bytes());
    put(18, &62u16.to_le_bytes());
    put(24, &CODE.to_le_bytes());
    put(32, &64u64.to_le_bytes());
    put(54, &56u16.to_le_bytes());
    put(56, &1u16.to_le_bytes());
    put(64, &1u32.to_le_bytes());
    put(72, &4096u64.to_le_bytes());
    put(88, &CODE.to_le_bytes());
    put(96, &(code.len() as u64).to_le_bytes());
    put(104, &4096u64.to_le_bytes());
    bytes.extend(code);
    file(&bytes)
}

fn machine(code: &[u8]) -> (Machine, Receiver<End>) {
    install_kick_handler().unwrap();
    let config = MachineConfig {
        memory_bytes: 32 << 20,
        memory_max_bytes: 32 << 20,
        cpus_max: 4,
        extra_cmdline: String::new(),
        resources: Vec::new(),
        devices: Vec::new(),
    };
    let kvm = File::options().read(true).write(true).open("/dev/kvm").expect("/dev/kvm opens");
    let parts = Parts { kvm: kvm.into(), kernel: elf(code), image: file(&vec![0; 2 << 20]), console: None };
    let (sender, ended) = channel();
    let sender = std::sync::Mutex::new(sender);
    let listeners = Listeners {
        ended: Arc::new(move |end| drop(sender.lock().unwrap().send(end))),
        broken: Arc::new(|device, error| panic!("{device}: {error}")),
        confine: Arc::new(confine),
    };
    (Machine::boot(&config, parts, listeners).unwrap(), ended)
}

/// Of the calling thread alone.
fn confine(kind: Kind) -> std::io::Result<()> {
    rustix::thread::set_no_new_privs(true)?;
    kind.confine()
}

fn result(machine: &Machine) -> u64 {
    machine.memory().read_obj(GuestAddress(RESULT)).unwrap()
}

/// `mov al, 0xfe; out 0x64, al; hlt`
const RESET: &[u8] = &[0xb0, 0xfe, 0xe6, 0x64, 0xf4];

#[test]
fn a_guest_that_pulses_the_reset_line_ends_its_machine() {
    let (mut machine, ended) = machine(RESET);
    machine.run().unwrap();
    assert_eq!(ended.recv_timeout(DEADLINE).unwrap(), End::Reset);
    assert_eq!(machine.exits().sum(), 1);
}

#[test]
fn the_host_bridge_is_where_the_kernel_looks_for_it() {
    // mov dx, 0xcf8; mov eax, 0x80000000; out dx, eax; mov dx, 0xcfc; in eax, dx; mov [RESULT], rax; then reset
    let mut code = vec![0x66, 0xba, 0xf8, 0x0c, 0xb8, 0, 0, 0, 0x80, 0xef, 0x66, 0xba, 0xfc, 0x0c, 0xed];
    code.extend([0x48, 0xa3]);
    code.extend(RESULT.to_le_bytes());
    code.extend(RESET);
    let (mut machine, ended) = machine(&code);
    machine.run().unwrap();
    assert_eq!(ended.recv_timeout(DEADLINE).unwrap(), End::Reset);
    assert_eq!(result(&machine), 0x0008_1b36);
}

#[test]
fn devices_come_together_or_not_at_all() {
    // Reads what is in the last slot: as above, with the address of slot 31.
    let mut code = vec![0x66, 0xba, 0xf8, 0x0c, 0xb8, 0, 0xf8, 0, 0x80, 0xef, 0x66, 0xba, 0xfc, 0x0c, 0xed];
    code.extend([0x48, 0xa3]);
    code.extend(RESULT.to_le_bytes());
    code.extend(RESET);
    let devices = |count| (0..count).map(|_| ("rng", Box::new(Entropy) as Box<dyn Device>)).collect();
    let (mut machine, ended) = machine(&code);
    machine.add_devices(devices(30)).unwrap();
    assert!(machine.add_devices(devices(2)).unwrap_err().to_string().contains("no free slot"));
    machine.run().unwrap();
    assert_eq!(ended.recv_timeout(DEADLINE).unwrap(), End::Reset);
    assert_eq!(result(&machine), 0xffff_ffff);
    machine.add_devices(devices(1)).unwrap();
    assert!(machine.add_devices(devices(1)).is_err());
}

#[test]
fn what_nothing_answers_reads_as_ones() {
    // mov rax, [0xd0000000]; mov [RESULT], rax; then reset. Above the first GiB nothing is mapped, so the address is put
    // below it: 48 MiB, where the machine has no memory.
    let mut code = vec![0x48, 0xa1];
    code.extend(0x300_0000u64.to_le_bytes());
    code.extend([0x48, 0xa3]);
    code.extend(RESULT.to_le_bytes());
    code.extend(RESET);
    let (mut machine, ended) = machine(&code);
    machine.run().unwrap();
    assert_eq!(ended.recv_timeout(DEADLINE).unwrap(), End::Reset);
    assert_eq!(result(&machine), u64::MAX);
}

#[test]
fn a_paused_machine_is_a_value_that_another_machine_goes_on_from() {
    // inc qword [rbx]; out 0x80, al; jmp back -- with rbx = RESULT
    let mut code = vec![0x48, 0xbb];
    code.extend(RESULT.to_le_bytes());
    code.extend([0x48, 0xff, 0x03, 0xe6, 0x80, 0xeb, 0xf9]);
    let (mut first, ended) = machine(&code);
    first.add_device("rng", Box::new(Entropy)).unwrap();
    first.run().unwrap();
    wait_until_it_counts(&first, 0);
    first.pause();
    let paused_at = result(&first);
    let state = first.save().unwrap();
    assert_eq!(result(&first), paused_at, "a paused machine does not run");

    // Through its written form, as a template's file will hold it.
    let state: MachineState = serde_json::from_slice(&serde_json::to_vec(&state).unwrap()).unwrap();
    let (mut second, second_ended) = machine(&code);
    second.add_device("rng", Box::new(Entropy)).unwrap();
    copy_memory(&first, &second);
    second.put_back(&state).unwrap();
    let again = second.save().unwrap();
    assert_eq!(again.vcpus()[0].regs().rip, state.vcpus()[0].regs().rip);
    second.run().unwrap();
    wait_until_it_counts(&second, paused_at);
    second.pause();
    assert!(result(&second) > paused_at);
    assert_eq!(result(&first), paused_at, "the first machine stays as it was");
    assert!(ended.try_recv().is_err() && second_ended.try_recv().is_err());
    first.run().unwrap();
    wait_until_it_counts(&first, paused_at);
}

#[test]
fn a_confined_main_thread_gives_its_machine_more_cpus_and_devices() {
    let (mut machine, ended) = machine(RESET);
    confine(Kind::Main).unwrap();
    machine.set_cpus(3).unwrap();
    machine.add_device("rng", Box::new(Entropy)).unwrap();
    machine.run().unwrap();
    assert_eq!(ended.recv_timeout(DEADLINE).unwrap(), End::Reset);
    machine.pause();
    assert_eq!(machine.save().unwrap().vcpus().len(), 3);
}

fn wait_until_it_counts(machine: &Machine, from: u64) {
    let start = std::time::Instant::now();
    while result(machine) <= from {
        assert!(start.elapsed() < DEADLINE, "the guest does not run");
        std::thread::yield_now();
    }
}

fn copy_memory(from: &Machine, to: &Machine) {
    let mut page = vec![0; 1 << 20];
    for address in (0..32 << 20).step_by(page.len()) {
        from.memory().read_slice(&mut page, GuestAddress(address)).unwrap();
        to.memory().write_slice(&page, GuestAddress(address)).unwrap();
    }
    assert_eq!(to.memory().num_regions(), 1);
}
