//! One FUSE request: from a descriptor chain to the file system and back.

use virtio_queue::DescriptorChain;
use virtiofsd::descriptor_utils::{Reader, Writer};
use virtiofsd::filesystem::{Context, Extensions, FileSystem};
use virtiofsd::fuse::{
    BatchForgetIn, CreateIn, EntryOut, ExtHeader, ExtType, ForgetIn, ForgetOne, InHeader, Opcode, OpenOut, OutHeader,
};
use virtiofsd::server::Server;
use vm_memory::ByteValued;

use super::super::{Buffers, Chain};
use super::files::Files;
use super::traffic::Counts;
use crate::memory::{GuestMemory, SharedMemory};

/// Longest body of a request that makes a file: a name and more groups than any process has in practice.
const MAX_CREATE: usize = 8192;

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

    /// What is counted of them.
    pub fn traffic(&self) -> &Counts {
        self.files.traffic()
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
        self.traffic().request(header.opcode);
        if chain.writable(memory).is_empty() {
            self.serve_unanswered(header, request);
            return 0;
        }
        if header.opcode == Opcode::TmpFile as u32 {
            return self.create_unnamed(memory, chain, header, request);
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

    /// FUSE_TMPFILE, which the library does not carry out.
    fn create_unnamed(&self, memory: &GuestMemory, chain: &Chain, header: InHeader, mut request: Buffers<'_>) -> u32 {
        let mut writable = chain.writable(memory);
        let length = size_of::<OutHeader>() + size_of::<EntryOut>() + size_of::<OpenOut>();
        let create = request.read_object::<CreateIn>().filter(|_| writable.len() >= length);
        let Some((create, extensions)) = create.zip(supplementary_groups(request)) else {
            return answer(memory, chain, header.unique, libc::EINVAL);
        };
        let context = Context::from(header);
        let made =
            self.files.create_unnamed(context, header.nodeid, create.mode, create.flags, create.umask, extensions);
        match made {
            Ok((entry, fh)) => {
                let out = OutHeader { len: length as u32, error: 0, unique: header.unique };
                writable.write(out.as_slice());
                writable.write(EntryOut::from(entry).as_slice());
                writable.write(OpenOut { fh, ..Default::default() }.as_slice());
                out.len
            }
            Err(error) => answer(memory, chain, header.unique, error.raw_os_error().unwrap_or(libc::EIO)),
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

/// The extension of a request that makes a file: the groups beside its own that the caller makes it with. It follows a
/// zero-terminated name, which a file without a name has too.
fn supplementary_groups(mut request: Buffers<'_>) -> Option<Extensions> {
    if request.len() > MAX_CREATE {
        return None;
    }
    let mut bytes = vec![0; request.len()];
    request.read(&mut bytes);
    let mut rest = bytes.splitn(2, |byte| *byte == 0).nth(1)?;
    let mut extensions = Extensions::default();
    while !rest.is_empty() {
        let (header, _) = rest.split_at_checked(size_of::<ExtHeader>())?;
        let number = |at: usize, bytes: &[u8]| Some(u32::from_ne_bytes(*bytes.get(at..)?.first_chunk()?));
        let (size, kind) = (number(0, header)? as usize, number(4, header)?);
        let (extension, next) = rest.split_at_checked(size)?;
        let body = extension.get(size_of::<ExtHeader>()..)?;
        if matches!(ExtType::try_from(kind), Ok(ExtType::SupGroups)) {
            let count = number(0, body)? as usize;
            let groups = body.get(4..count.checked_mul(4)?.checked_add(4)?)?;
            extensions.sup_gids = groups.chunks_exact(4).filter_map(|gid| number(0, gid)).map(Into::into).collect();
        }
        rest = next;
    }
    Some(extensions)
}

/// Answers with an error number, or 0 for success, and nothing else; returns the bytes written.
fn answer(memory: &GuestMemory, chain: &Chain, unique: u64, errno: i32) -> u32 {
    let header = OutHeader { len: size_of::<OutHeader>() as u32, error: -errno, unique };
    match chain.writable(memory).write_object(&header) {
        Some(()) => header.len,
        None => 0,
    }
}
