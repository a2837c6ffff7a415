use std::sync::Arc;

use proptest::prelude::*;
use vm_memory::{Bytes, GuestMemory as _, GuestMemoryRegion, MemoryRegionAddress};

use super::super::test_driver::{Driven, Part, drive_in, drive_with};
use super::*;
use crate::memory::GuestMemory;

const START: u64 = 1 << 32;
const BLOCKS: u64 = 16;

/// 64 MiB for the rings, and the region of the device.
fn memory() -> SharedMemory {
    let ranges = [(GuestAddress(0), 64 << 20), (GuestAddress(START), (BLOCKS * BLOCK_SIZE) as usize)];
    Arc::new(GuestMemory::from_ranges(&ranges).unwrap())
}

struct Guest {
    device: Memory,
    driven: Driven,
    memory: SharedMemory,
}

impl Guest {
    fn new() -> Self {
        let memory = memory();
        let mut device = Memory::new(memory.clone(), GuestAddress(START), true).unwrap();
        let driven = drive_in(&mut device, F_UNPLUGGED_INACCESSIBLE, true, memory.clone());
        Self { device, driven, memory }
    }

    fn ask(&mut self, kind: u16, addr: u64, nb_blocks: u16) -> (u16, u16) {
        let request = Request { kind, addr, nb_blocks, ..Request::default() };
        let (length, answer) =
            self.driven.rings[0].request(&[Part::Out(request.as_slice().into()), Part::In(size_of::<Response>())]);
        assert_eq!(length, 10);
        (u16::from_le_bytes([answer[0], answer[1]]), u16::from_le_bytes([answer[8], answer[9]]))
    }

    /// Whether the driver was told that the configuration has changed, since it was last asked.
    fn told(&self) -> bool {
        self.driven.config_irq.read().is_ok()
    }

    /// Whether the kernel can read the block for us; a fault here would end the test.
    fn accessible(&self, block: u64) -> bool {
        let region = self.memory.find_region(GuestAddress(START)).unwrap();
        let host = region.get_host_address(MemoryRegionAddress(block * BLOCK_SIZE)).unwrap();
        let (_reader, writer) = std::io::pipe().unwrap();
        // SAFETY: the kernel checks the access.
        let result = unsafe { libc::write(std::os::fd::AsRawFd::as_raw_fd(&writer), host.cast(), 1) };
        result == 1
    }
}

fn at(block: u64) -> u64 {
    START + block * BLOCK_SIZE
}

fn config(device: &Memory) -> Config {
    let mut bytes = [0; size_of::<Config>()];
    device.read_config(0, &mut bytes);
    *Config::from_slice(&bytes).unwrap()
}

#[test]
fn what_was_asked_for_is_plugged_and_never_more() {
    let mut guest = Guest::new();
    assert_eq!(guest.ask(PLUG, at(0), 1).0, NACK);
    guest.device.handle().resize(2 * BLOCK_SIZE - 5).unwrap();
    guest.driven.wait_config();
    let seen = config(&guest.device);
    assert_eq!((seen.requested_size, seen.plugged_size, seen.region_size), (2 * BLOCK_SIZE, 0, BLOCKS * BLOCK_SIZE));
    assert_eq!((seen.addr, seen.block_size, seen.usable_region_size), (START, BLOCK_SIZE, BLOCKS * BLOCK_SIZE));
    assert_eq!(guest.ask(PLUG, at(3), 3).0, NACK);
    assert_eq!(guest.ask(PLUG, at(3), 2).0, ACK);
    assert_eq!(guest.ask(PLUG, at(5), 1).0, NACK);
    assert_eq!(guest.ask(PLUG, at(4), 1).0, ERROR);
    assert_eq!(guest.device.handle().plugged(), 2 * BLOCK_SIZE);
    let accessible: Vec<_> = (0..BLOCKS).filter(|block| guest.accessible(*block)).collect();
    assert_eq!(accessible, [3, 4]);
    assert_eq!(guest.ask(STATE, at(3), 2), (ACK, STATE_PLUGGED));
    assert_eq!(guest.ask(STATE, at(4), 2), (ACK, STATE_MIXED));
    assert_eq!(guest.ask(STATE, at(5), 2), (ACK, STATE_UNPLUGGED));
    assert!(matches!(guest.device.handle().resize(BLOCKS * BLOCK_SIZE + 1), Err(MemoryError::TooMuch { .. })));
    assert!(guest.device.handle().resize(u64::MAX).is_err());
}

#[test]
fn an_unplugged_block_is_inaccessible_and_zero_when_plugged_again() {
    let mut guest = Guest::new();
    guest.device.handle().resize(4 * BLOCK_SIZE).unwrap();
    assert_eq!(guest.ask(PLUG, at(0), 4).0, ACK);
    guest.memory.write_obj(0xaau8, GuestAddress(at(1) + 77)).unwrap();
    guest.memory.write_obj(0xbbu8, GuestAddress(at(2) + 77)).unwrap();
    assert_eq!(guest.ask(UNPLUG, at(1), 1).0, ACK);
    assert!(!guest.accessible(1) && guest.accessible(2));
    assert_eq!(guest.ask(UNPLUG, at(0), 2).0, ERROR);
    assert_eq!(guest.ask(PLUG, at(1), 1).0, ACK);
    assert_eq!(guest.memory.read_obj::<u8>(GuestAddress(at(1) + 77)).unwrap(), 0);
    assert_eq!(guest.memory.read_obj::<u8>(GuestAddress(at(2) + 77)).unwrap(), 0xbb);
    assert_eq!(guest.ask(UNPLUG_ALL, 0, 0).0, ACK);
    assert!((0..BLOCKS).all(|block| !guest.accessible(block)));
    assert_eq!(config(&guest.device).plugged_size, 0);
}

#[test]
fn ranges_that_are_no_blocks_of_the_region_are_refused() {
    let mut guest = Guest::new();
    guest.device.handle().resize(BLOCKS * BLOCK_SIZE).unwrap();
    for (addr, count) in [
        (at(0), 0),
        (at(0) + 4096, 1),
        (at(0) - BLOCK_SIZE, 1),
        (0, 1),
        (at(BLOCKS), 1),
        (at(BLOCKS - 1), 2),
        (at(0), u16::MAX),
        (u64::MAX - BLOCK_SIZE + 1, 1),
    ] {
        for kind in [PLUG, UNPLUG, STATE] {
            assert_eq!(guest.ask(kind, addr, count).0, ERROR, "{kind} {addr:#x} {count}");
        }
    }
    assert_eq!(guest.ask(4, at(0), 1).0, ERROR);
    let (length, answer) = guest.driven.rings[0].request(&[Part::Out(vec![0; 5]), Part::In(10)]);
    assert_eq!((length, answer[0]), (10, ERROR as u8));
    assert_eq!(guest.device.handle().plugged(), 0);
    let ring = &mut guest.driven.rings[0];
    ring.offer(&[Part::Out(vec![0; 24]), Part::In(9)]);
    ring.kick();
    assert!(matches!(guest.driven.broken(), Broken::Request(_)));
}

#[test]
fn what_is_plugged_is_taken_when_the_driver_looks_again() {
    let mut guest = Guest::new();
    let handle = guest.device.handle();
    assert!(handle.is_taken());
    handle.resize(4 * BLOCK_SIZE).unwrap();
    guest.driven.wait_config();
    config(&guest.device);
    assert_eq!(guest.ask(PLUG, at(0), 3).0, ACK);
    config(&guest.device);
    assert!(!handle.is_taken());
    assert!(!guest.told());
    assert_eq!(guest.ask(PLUG, at(3), 1).0, ACK);
    guest.driven.wait_config();
    assert!(!handle.is_taken());
    assert!(handle.taken().read().is_err());
    config(&guest.device);
    assert!(handle.is_taken());
    config(&guest.device);
    assert_eq!(handle.taken().read().unwrap(), 1);
}

#[test]
fn less_is_taken_at_once_and_more_when_the_driver_knows_of_it() {
    let mut guest = Guest::new();
    let handle = guest.device.handle();
    handle.resize(8 * BLOCK_SIZE).unwrap();
    assert_eq!(guest.ask(PLUG, at(0), 8).0, ACK);
    config(&guest.device);
    handle.resize(2 * BLOCK_SIZE).unwrap();
    assert!(handle.is_taken());
    assert_eq!(guest.ask(UNPLUG, at(0), 3).0, ACK);
    assert!(handle.is_taken());
    // It is there, but the driver may be unplugging it: it does, and plugs it again.
    handle.resize(5 * BLOCK_SIZE).unwrap();
    assert!(!handle.is_taken());
    assert_eq!(guest.ask(UNPLUG, at(3), 1).0, ACK);
    config(&guest.device);
    assert!(!handle.is_taken());
    assert!(guest.told());
    assert_eq!(guest.ask(PLUG, at(3), 1).0, ACK);
    assert!(guest.told());
    config(&guest.device);
    assert!(handle.is_taken());
    // It is there, and stays.
    handle.resize(3 * BLOCK_SIZE).unwrap();
    handle.resize(4 * BLOCK_SIZE).unwrap();
    assert!(!handle.is_taken());
    config(&guest.device);
    assert!(handle.is_taken());
}

#[test]
fn less_that_is_just_what_was_plugged_last_is_not_taken_before_a_look() {
    let mut guest = Guest::new();
    let handle = guest.device.handle();
    handle.resize(8 * BLOCK_SIZE).unwrap();
    assert_eq!(guest.ask(PLUG, at(0), 4).0, ACK);
    for blocks in [4, 3] {
        handle.resize(blocks * BLOCK_SIZE).unwrap();
        assert!(guest.told());
        assert!(!handle.is_taken());
    }
    config(&guest.device);
    assert!(handle.is_taken());
}

#[test]
fn a_driver_that_gives_back_what_it_plugged_is_told_once() {
    let mut guest = Guest::new();
    let handle = guest.device.handle();
    handle.resize(BLOCK_SIZE).unwrap();
    assert!(guest.told());
    for told in [true, false, false] {
        assert_eq!(guest.ask(PLUG, at(0), 1).0, ACK);
        assert_eq!(guest.told(), told);
        assert_eq!(guest.ask(UNPLUG, at(0), 1).0, ACK);
        config(&guest.device);
        assert!(!handle.is_taken());
    }
    assert_eq!(guest.ask(PLUG, at(0), 1).0, ACK);
    handle.resize(BLOCK_SIZE).unwrap();
    assert!(guest.told());
    config(&guest.device);
    assert!(handle.is_taken());
}

#[test]
fn without_a_driver_only_nothing_is_taken() {
    let mut device = Memory::new(memory(), GuestAddress(START), false).unwrap();
    let handle = device.handle();
    handle.resize(BLOCK_SIZE).unwrap();
    config(&device);
    assert!(!handle.is_taken());
    handle.resize(0).unwrap();
    assert!(handle.is_taken());
    assert_eq!(handle.taken().read().unwrap(), 1);

    // What the kernel of one driver had the next has to take anew.
    for (saved, taken) in
        [(r#"{"requested":4194304,"plugged":[[0,1]]}"#, false), (r#"{"requested":2097152,"plugged":[[3,1]]}"#, true)]
    {
        device.restore(&DeviceState(saved.into())).unwrap();
        assert_eq!(handle.is_taken(), taken, "{saved}");
        device.reset();
        config(&device);
        assert!(!handle.is_taken());
    }
}

#[test]
fn the_saved_state_puts_the_blocks_back() {
    let mut guest = Guest::new();
    guest.device.handle().resize(5 * BLOCK_SIZE).unwrap();
    assert_eq!(guest.ask(PLUG, at(1), 2).0, ACK);
    assert_eq!(guest.ask(PLUG, at(15), 1).0, ACK);
    let state = guest.device.save();
    assert_eq!(String::from_utf8_lossy(&state.0), r#"{"requested":10485760,"plugged":[[1,2],[15,1]]}"#);

    let mut other = Guest::new();
    other.device.restore(&state).unwrap();
    assert_eq!(other.device.save(), state);
    assert_eq!((0..BLOCKS).filter(|block| other.accessible(*block)).collect::<Vec<_>>(), [1, 2, 15]);
    assert_eq!(other.ask(PLUG, at(4), 2).0, ACK);
    for misfit in [
        "",
        "{}",
        r#"{"requested":1,"plugged":[]}"#,
        r#"{"requested":0,"plugged":[[16,1]]}"#,
        r#"{"requested":0,"plugged":[[18446744073709551615,2]]}"#,
    ] {
        assert!(other.device.restore(&DeviceState(misfit.into())).is_err(), "{misfit}");
    }
}

#[test]
fn a_driver_that_may_touch_unplugged_memory_is_refused() {
    let memory = memory();
    let mut device = Memory::new(memory.clone(), GuestAddress(START), false).unwrap();
    let activation = Activation {
        memory,
        features: 0,
        queues: vec![None],
        config_interrupt: Interrupt::new(EventFd::new(0).unwrap()),
    };
    assert!(matches!(device.activate(activation), Err(ActivateError::FeatureMissing(_))));
}

#[test]
fn a_region_must_be_whole_blocks() {
    assert!(Memory::new(memory(), GuestAddress(START + BLOCK_SIZE), false).is_err());
    assert!(Memory::new(memory(), GuestAddress(1 << 40), false).is_err());
    let odd = Arc::new(GuestMemory::from_ranges(&[(GuestAddress(0), (BLOCK_SIZE + 4096) as usize)]).unwrap());
    assert!(Memory::new(odd, GuestAddress(0), false).is_err());
    // The features of the driver do not matter to a device without memory of its own.
    let memory = memory();
    let mut device = Memory::new(memory, GuestAddress(START), false).unwrap();
    drop(drive_with(&mut device, F_UNPLUGGED_INACCESSIBLE, false));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn whatever_the_guest_asks_for_accessible_is_what_is_plugged(
        requests in prop::collection::vec((0u16..4, 0u64..BLOCKS + 1, 0u16..5), 1..40),
        requested in 0..=BLOCKS,
    ) {
        let mut guest = Guest::new();
        guest.device.handle().resize(requested * BLOCK_SIZE).unwrap();
        for (kind, block, count) in requests {
            guest.ask(kind, at(block), count);
            prop_assert!(guest.device.handle().plugged() <= requested * BLOCK_SIZE);
        }
        let accessible = (0..BLOCKS).filter(|block| guest.accessible(*block)).count() as u64;
        prop_assert_eq!(accessible * BLOCK_SIZE, guest.device.handle().plugged());
    }

    #[test]
    fn whatever_happens_taken_is_what_was_plugged_before_the_driver_looked(
        // Two kinds more than there are requests: another size, and a look at the configuration.
        steps in prop::collection::vec((0u16..5, 0u64..BLOCKS, 1u16..5), 1..60),
    ) {
        let mut guest = Guest::new();
        let handle = guest.device.handle();
        let (mut requested, mut looked, mut before) = (0, true, true);
        for (kind, blocks, count) in steps {
            match kind {
                PLUG => looked &= guest.ask(PLUG, at(blocks), count).0 != ACK,
                UNPLUG | UNPLUG_ALL => drop(guest.ask(kind, at(blocks), count)),
                3 => {
                    handle.resize(blocks * BLOCK_SIZE).unwrap();
                    looked &= blocks <= requested;
                    requested = blocks;
                }
                _ => {
                    config(&guest.device);
                    looked = true;
                    prop_assert_eq!(handle.is_taken(), handle.plugged() >= requested * BLOCK_SIZE);
                }
            }
            let taken = handle.is_taken();
            prop_assert!(!taken || handle.plugged() >= requested * BLOCK_SIZE && (looked || requested == 0));
            prop_assert_eq!(handle.taken().read().is_ok(), taken && !before);
            before = taken;
        }
    }
}
