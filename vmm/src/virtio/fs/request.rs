//! One FUSE request: from a descriptor chain to the file system and back.

use virtio_queue::DescriptorChain;
use virtiofsd::descriptor_utils::{Reader, Writer};
use virtiofsd::filesystem::{Context, FileSystem};
use virtiofsd::fuse::{BatchForgetIn, ForgetIn, ForgetOne, InHeader, Opcode, OutHeader};
use virtiofsd::server::Server;

use super::super::{Buffers, Chain};
use super::files::Files;
use crate::memory::{GuestMemory, SharedMemory};

/// Serves requests; any number of threads at a time.
pub struct Requests {
    server: Server<Files>,
    files: Files,
}

impl Requests {
    /// Over these files.
    pub fn new(files: Files) -> Self {
        Self { server: Server::new(files.clone()), files }
    }

    /// Ends the FUSE session: closes every file that the guest had open or knew of.
    pub fn forget_all(&self) {
        self.server.destroy();
    }

    /// Serves one request and returns how many bytes of its writable part were written.
    ///
    /// The library is only given a request that has room for an answer's header: it relies on that. The kinds that have no
    /// answer are carried out here.
    pub fn serve(&self, memory: &GuestMemory, chain: &Chain, descriptors: DescriptorChain<SharedMemory>) -> u32 {
        let mut request = chain.readable(memory);
        let Some(header) = request.read_object::<InHeader>() else {
            return answer(memory, chain, 0, libc::EINVAL);
        };
        if chain.writable(memory).is_empty() {
            self.serve_unanswered(header, request);
            return 0;
        }
        // The descriptors may have changed since the chain was checked; the length that counts is the writer's.
        let (Ok(reader), Ok(writer)) = (Reader::new(memory, descriptors.clone()), Writer::new(memory, descriptors))
        else {
            return answer(memory, chain, header.unique, libc::EINVAL);
        };
        if writer.available_bytes() < size_of::<OutHeader>() {
            return 0;
        }
        match self.server.handle_message(reader, writer, None::<&mut ()>) {
            // A kind that usually has no answer, by a driver that waits for one.
            Ok(0) => answer(memory, chain, header.unique, 0),
            Ok(written) => written as u32,
            Err(_) => answer(memory, chain, header.unique, libc::EINVAL),
        }
    }

    fn serve_unanswered(&self, header: InHeader, mut request: Buffers<'_>) {
        let context = Context::from(header);
        if header.opcode == Opcode::Forget as u32 {
            if let Some(forget) = request.read_object::<ForgetIn>() {
                self.files.forget(context, header.nodeid, forget.nlookup);
            }
        } else if header.opcode == Opcode::BatchForget as u32 {
            let Some(batch) = request.read_object::<BatchForgetIn>() else { return };
            for _ in 0..batch.count {
                let Some(forget) = request.read_object::<ForgetOne>() else { return };
                self.files.forget(context, forget.nodeid, forget.nlookup);
            }
        } else if header.opcode == Opcode::Destroy as u32 {
            self.forget_all();
        }
    }
}

/// Answers with an error number, or 0 for success, and nothing else; returns the bytes written.
fn answer(memory: &GuestMemory, chain: &Chain, unique: u64, errno: i32) -> u32 {
    let header = OutHeader { len: size_of::<OutHeader>() as u32, error: -errno, unique };
    match chain.writable(memory).write_object(&header) {
        Some(()) => header.len,
        None => 0,
    }
}
