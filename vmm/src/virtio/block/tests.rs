use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::fd::AsFd;

use proptest::prelude::*;

use super::super::test_driver::{Descriptor, Driven, INDIRECT, NEXT, Part, WRITE, drive, drive_with, indirect_table};
use super::*;

const SECTORS: u64 = 64;

/// A file without a name, full of numbered sectors.
fn image() -> File {
    let flags = rustix::fs::OFlags::TMPFILE | rustix::fs::OFlags::RDWR;
    let fd = rustix::fs::open(std::env::temp_dir(), flags, rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR).unwrap();
    let mut file = File::from(fd);
    for sector in 0..SECTORS {
        file.write_all(&[sector as u8 + 1; SECTOR as usize]).unwrap();
    }
    file
}

fn reopened(file: &File, flags: rustix::fs::OFlags) -> OwnedFd {
    let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(file));
    rustix::fs::open(path, flags, rustix::fs::Mode::empty()).unwrap()
}

fn writable(file: &File) -> Block {
    Block::new(reopened(file, rustix::fs::OFlags::RDWR), false, "disk-1").unwrap()
}

fn sector(file: &mut File, number: u64) -> Vec<u8> {
    let mut bytes = vec![0; SECTOR as usize];
    file.seek(SeekFrom::Start(number * SECTOR)).unwrap();
    file.read_exact(&mut bytes).unwrap();
    bytes
}

fn header(kind: u32, sector: u64) -> Part {
    Part::Out(Header { kind, reserved: 0, sector }.as_slice().into())
}

fn segment(sector: u64, num_sectors: u32, flags: u32) -> Vec<u8> {
    Segment { sector, num_sectors, flags }.as_slice().into()
}

/// Sends a request; returns its status, the length given, and the data before the status.
fn ask(driven: &mut Driven, parts: &[Part]) -> (u8, u32, Vec<u8>) {
    let (length, mut answer) = driven.rings[0].request(parts);
    (answer.pop().unwrap(), length, answer)
}

fn write(driven: &mut Driven, kind: u32, at: u64, data: Vec<u8>) -> u8 {
    ask(driven, &[header(kind, at), Part::Out(data), Part::In(1)]).0
}

#[test]
fn sectors_are_read_and_written_in_any_segments() {
    let mut file = image();
    let mut device = writable(&file);
    let mut driven = drive_with(&mut device, F_FLUSH, true);
    let (status, length, data) =
        ask(&mut driven, &[header(IN, 3), Part::In(100), Part::In(412), Part::In(1024), Part::In(1)]);
    assert_eq!((status, length), (STATUS_OK, 1537));
    let expected: Vec<_> = [4u8, 5, 6].iter().flat_map(|byte| [*byte; SECTOR as usize]).collect();
    assert_eq!(data, expected);

    let parts = [header(OUT, 10), Part::Out(vec![0xaa; 500]), Part::Out(vec![0xbb; 524]), Part::In(1)];
    assert_eq!(ask(&mut driven, &parts), (STATUS_OK, 1, vec![]));
    assert_eq!(ask(&mut driven, &[header(FLUSH, 0), Part::In(1)]), (STATUS_OK, 1, vec![]));
    assert_eq!(sector(&mut file, 10)[499..501], [0xaa, 0xbb]);
    assert_eq!((sector(&mut file, 9)[511], sector(&mut file, 11)[511], sector(&mut file, 12)[0]), (10, 0xbb, 13));
}

#[test]
fn header_data_and_status_may_share_descriptors_or_be_split_anywhere() {
    let file = image();
    let mut device = writable(&file);
    let mut driven = drive(&mut device);
    let ring = &mut driven.rings[0];
    let bytes = Header { kind: IN, reserved: 0, sector: 1 };
    let (head, tail) = bytes.as_slice().split_at(5);
    let (length, answer) = ring.request(&[Part::Out(head.into()), Part::Out(tail.into()), Part::In(513)]);
    assert_eq!((length, answer[0], answer[511], answer[512]), (513, 2, 2, STATUS_OK));

    // The same by an indirect table, with a buffer across two regions of guest memory.
    let header_at = ring.allocate(16);
    ring.write(header_at, bytes.as_slice());
    let across = 16 * (1 << 20) - 100;
    let table = indirect_table(&[
        Descriptor { address: header_at, length: 16, flags: NEXT, next: 1 },
        Descriptor { address: across, length: 513, flags: WRITE, next: 0 },
    ]);
    let table_at = ring.allocate(table.len());
    ring.write(table_at, &table);
    ring.offer_descriptors(&[Descriptor { address: table_at, length: 32, flags: INDIRECT, next: 0 }]);
    ring.kick();
    assert_eq!(ring.wait().1, 513);
    assert_eq!(ring.read(across, 513), answer);
}

#[test]
fn ranges_outside_the_disk_are_errors() {
    let mut file = image();
    let mut device = writable(&file);
    let mut driven = drive(&mut device);
    for at in [SECTORS, SECTORS - 1, u64::MAX, u64::MAX / SECTOR, u64::MAX / SECTOR + 1, 1 << 55] {
        let (status, length, _) = ask(&mut driven, &[header(IN, at), Part::In(1024), Part::In(1)]);
        assert_eq!((status, length), (Failure::Io as u8, 0), "{at}");
        assert_eq!(write(&mut driven, OUT, at, vec![0; 1024]), Failure::Io as u8, "{at}");
        for kind in [DISCARD, WRITE_ZEROES] {
            assert_eq!(write(&mut driven, kind, 0, segment(at, 2, 0)), Failure::Io as u8, "{at}");
        }
    }
    for length in [1, 511, 513] {
        assert_eq!(ask(&mut driven, &[header(IN, 0), Part::In(length), Part::In(1)]).0, Failure::Io as u8);
        assert_eq!(write(&mut driven, OUT, 0, vec![0; length]), Failure::Io as u8);
    }
    assert_eq!(file.seek(SeekFrom::End(0)).unwrap(), SECTORS * SECTOR);
    assert!((0..SECTORS).all(|number| sector(&mut file, number) == [number as u8 + 1; 512]));
    // Nothing to do is no error.
    assert_eq!(ask(&mut driven, &[header(IN, SECTORS), Part::In(1)]).0, STATUS_OK);
}

#[test]
fn zeroed_and_discarded_ranges_read_as_zeros() {
    let mut file = image();
    let mut device = writable(&file);
    let mut driven = drive(&mut device);
    assert_eq!(write(&mut driven, WRITE_ZEROES, 0, segment(3, 2, 0)), STATUS_OK);
    assert_eq!(write(&mut driven, WRITE_ZEROES, 0, segment(8, 1, UNMAP)), STATUS_OK);
    let two = [segment(16, 8, 0), segment(32, 1, 0)].concat();
    assert_eq!(write(&mut driven, DISCARD, 0, two.clone()), STATUS_OK);
    let zero: Vec<_> = (0..SECTORS).filter(|number| sector(&mut file, *number) == [0; 512]).collect();
    assert_eq!(zero, [3, 4, 8, 16, 17, 18, 19, 20, 21, 22, 23, 32]);

    assert_eq!(write(&mut driven, WRITE_ZEROES, 0, two), Failure::Io as u8);
    assert_eq!(write(&mut driven, WRITE_ZEROES, 0, segment(0, 1, 2)), Failure::Unsupported as u8);
    assert_eq!(write(&mut driven, DISCARD, 0, segment(0, 1, UNMAP)), Failure::Unsupported as u8);
    assert_eq!(write(&mut driven, DISCARD, 0, segment(0, 0, 0)), Failure::Io as u8);
    assert_eq!(write(&mut driven, DISCARD, 0, vec![]), Failure::Io as u8);
    assert_eq!(write(&mut driven, DISCARD, 0, vec![0; 17]), Failure::Io as u8);
    assert_eq!(write(&mut driven, DISCARD, 0, segment(0, 1, 0).repeat(17)), Failure::Io as u8);
    assert_eq!(file.seek(SeekFrom::End(0)).unwrap(), SECTORS * SECTOR);
}

#[test]
fn a_read_only_disk_refuses_all_that_writes() {
    let mut file = image();
    let mut device = Block::new(reopened(&file, rustix::fs::OFlags::RDONLY), true, "").unwrap();
    assert_eq!(device.features() & (F_RO | F_DISCARD | F_WRITE_ZEROES), F_RO);
    let mut driven = drive(&mut device);
    assert_eq!(write(&mut driven, OUT, 0, vec![0xff; 512]), Failure::Io as u8);
    assert_eq!(write(&mut driven, DISCARD, 0, segment(0, 1, 0)), Failure::Io as u8);
    assert_eq!(write(&mut driven, WRITE_ZEROES, 0, segment(0, 1, 0)), Failure::Io as u8);
    assert_eq!(ask(&mut driven, &[header(FLUSH, 0), Part::In(1)]).0, STATUS_OK);
    assert_eq!(ask(&mut driven, &[header(IN, 0), Part::In(512), Part::In(1)]), (STATUS_OK, 513, vec![1; 512]));
    assert_eq!(sector(&mut file, 0), [1; 512]);
}

#[test]
fn the_serial_number_and_the_configuration_space_are_given() {
    let file = image();
    let mut device = writable(&file);
    let mut config = [0xff; 64];
    device.read_config(0, &mut config);
    assert_eq!(config[..8], SECTORS.to_le_bytes());
    assert_eq!(config[12..16], 254u32.to_le_bytes());
    assert_eq!(config[20..28], [0, 2, 0, 0, 3, 0, 8, 0]);
    assert_eq!(config[36..60], [0, 0, 64, 0, 16, 0, 0, 0, 8, 0, 0, 0, 0, 0, 1, 0, 1, 0, 0, 0, 1, 0, 0, 0]);
    let mut driven = drive(&mut device);
    let (status, length, data) = ask(&mut driven, &[header(GET_ID, 0), Part::In(20), Part::In(1)]);
    assert_eq!((status, length), (STATUS_OK, 21));
    assert_eq!(data, b"disk-1\0\0\0\0\0\0\0\0\0\0\0\0\0\0");
    assert_eq!(ask(&mut driven, &[header(GET_ID, 0), Part::In(3), Part::In(1)]), (STATUS_OK, 4, b"dis".into()));
}

#[test]
fn malformed_requests_get_a_status_if_there_is_room_for_one() {
    let file = image();
    let mut device = writable(&file);
    let mut driven = drive(&mut device);
    assert_eq!(ask(&mut driven, &[Part::Out(vec![0; 15]), Part::In(1)]).0, Failure::Io as u8);
    assert_eq!(ask(&mut driven, &[Part::In(1)]).0, Failure::Io as u8);
    for kind in [2, 3, 5, 10, 12, 14, 25, u32::MAX] {
        assert_eq!(ask(&mut driven, &[header(kind, 0), Part::In(1)]).0, Failure::Unsupported as u8, "{kind}");
    }
    // Data the wrong way round.
    assert_eq!(ask(&mut driven, &[header(OUT, 0), Part::In(513)]).0, STATUS_OK);
    driven.rings[0].offer(&[header(OUT, 0), Part::Out(vec![0; 512]), Part::In(0)]);
    driven.rings[0].kick();
    assert!(matches!(driven.broken(), Broken::Request(_)));
}

#[test]
fn an_image_that_became_shorter_is_an_error() {
    let file = image();
    let mut device = writable(&file);
    let mut driven = drive(&mut device);
    file.set_len(10 * SECTOR).unwrap();
    let (status, length, _) = ask(&mut driven, &[header(IN, 9), Part::In(1024), Part::In(1)]);
    assert_eq!((status, length), (Failure::Io as u8, 512));
}

#[test]
fn only_a_file_opened_as_the_disk_needs_it_is_one() {
    use rustix::fs::OFlags;
    let file = image();
    assert!(matches!(Block::new(reopened(&file, OFlags::RDWR), true, ""), Err(DiskError::OpenForWriting)));
    assert!(matches!(Block::new(reopened(&file, OFlags::RDONLY), false, ""), Err(DiskError::NotOpen)));
    assert!(matches!(Block::new(reopened(&file, OFlags::PATH), true, ""), Err(DiskError::NotOpen)));
    let long = "x".repeat(21);
    assert!(matches!(Block::new(reopened(&file, OFlags::RDONLY), true, &long), Err(DiskError::Serial(_))));
    file.set_len(1000).unwrap();
    assert!(matches!(Block::new(reopened(&file, OFlags::RDONLY), true, ""), Err(DiskError::Size(1000))));
    file.set_len(0).unwrap();
    assert!(matches!(Block::new(reopened(&file, OFlags::RDONLY), true, ""), Err(DiskError::Size(0))));
    let (reader, _writer) = std::io::pipe().unwrap();
    assert!(matches!(Block::new(reader.as_fd().try_clone_to_owned().unwrap(), true, ""), Err(DiskError::Kind)));
}

#[test]
fn a_stopped_worker_goes_on_where_it_was() {
    let file = image();
    let mut device = writable(&file);
    let mut driven = drive_with(&mut device, F_FLUSH, true);
    assert_eq!(ask(&mut driven, &[header(FLUSH, 0), Part::In(1)]).0, STATUS_OK);
    let worker = driven.stop();
    assert_eq!(worker.queues()[0].unwrap().state().next_avail, 1);
    let head = driven.rings[0].offer(&[header(IN, 0), Part::In(512), Part::In(1)]);
    driven.run_on(worker);
    assert_eq!(driven.rings[0].wait(), (head, 513));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(100))]

    #[test]
    fn whatever_is_asked_the_image_keeps_its_size_and_reads_match_it(
        requests in prop::collection::vec((0u32..16, 0u64..70, 0usize..4, any::<bool>(), any::<u8>()), 1..30)
    ) {
        let mut file = image();
        let mut device = writable(&file);
        let mut driven = drive(&mut device);
        for (kind, at, sectors, odd, byte) in requests {
            let length = sectors * 512 + usize::from(odd);
            let data = if matches!(kind, DISCARD | WRITE_ZEROES) {
                segment(at, sectors as u32, u32::from(odd))
            } else {
                vec![byte; length]
            };
            let (status, _, read) = ask(&mut driven, &[header(kind, at), Part::Out(data), Part::In(length), Part::In(1)]);
            if kind == IN && status == STATUS_OK {
                for (index, bytes) in read.chunks(512).enumerate() {
                    prop_assert_eq!(bytes, &sector(&mut file, at + index as u64)[..]);
                }
            }
        }
        prop_assert_eq!(file.seek(SeekFrom::End(0)).unwrap(), SECTORS * SECTOR);
    }
}
