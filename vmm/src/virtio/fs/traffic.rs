//! What a guest asks of the file server, counted.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use virtiofsd::fuse::Opcode;

use crate::control::Traffic;

/// Counts of [`Traffic`], which go on when the guest mounts the share anew. Cloning shares them.
#[derive(Clone, Default)]
pub struct Counts(Arc<Counters>);

#[derive(Default)]
struct Counters {
    reads: AtomicU64,
    writes: AtomicU64,
    others: AtomicU64,
    read_bytes: AtomicU64,
    written_bytes: AtomicU64,
}

impl Counts {
    /// A request of this kind has come.
    pub fn request(&self, opcode: u32) {
        let counter = match Opcode::try_from(opcode) {
            Ok(Opcode::Read) => &self.0.reads,
            Ok(Opcode::Write) => &self.0.writes,
            _ => &self.0.others,
        };
        counter.fetch_add(1, Ordering::Relaxed);
    }

    /// So many bytes of a file have been read for the guest.
    pub fn read(&self, bytes: usize) {
        self.0.read_bytes.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    /// So many bytes of the guest have been written to a file.
    pub fn written(&self, bytes: usize) {
        self.0.written_bytes.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    /// What was counted so far.
    pub fn so_far(&self) -> Traffic {
        let of = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Traffic {
            reads: of(&self.0.reads),
            writes: of(&self.0.writes),
            others: of(&self.0.others),
            read_bytes: of(&self.0.read_bytes),
            written_bytes: of(&self.0.written_bytes),
        }
    }
}
