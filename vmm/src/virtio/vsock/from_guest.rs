//! Packets of the guest: the queue that the driver calls `tx`.

use std::sync::Arc;

use super::connection::Received;
use super::link::Fate;
use super::muxer::{MAX_RESETS, Muxer};
use super::packet::{HOST_CID, Header, Op, TYPE_STREAM};
use crate::virtio::{Broken, Buffers, Chain, Poll};

/// Most packets taken before other events get their turn.
const MAX_PACKETS: usize = 256;

/// Most bytes of one connection gathered for one write.
const MAX_BURST: usize = 256 * 1024;

/// Consecutive packets with bytes for one socket, written at once.
#[derive(Default)]
struct Burst<'a> {
    port: u32,
    length: usize,
    payloads: Vec<Buffers<'a>>,
    chains: Vec<Chain>,
}

impl Muxer {
    /// Takes what the driver has sent.
    pub fn take_packets(&mut self, poll: &Poll) -> Result<(), Broken> {
        self.from_guest.clear_kick();
        self.from_guest.disable_notification()?;
        let memory = Arc::clone(self.from_guest.memory());
        let mut burst = Burst::default();
        let mut exhausted = false;
        for _ in 0..MAX_PACKETS {
            if self.resets.len() >= MAX_RESETS {
                break;
            }
            let Some(chain) = self.from_guest.pop()? else {
                self.pass_on(&mut burst, poll)?;
                exhausted = !self.from_guest.enable_notification()?;
                if exhausted {
                    break;
                }
                self.from_guest.disable_notification()?;
                continue;
            };
            let mut packet = chain.readable(&memory);
            let header = Header::read(&mut packet).ok_or(Broken::Request("packet shorter than its header"))?;
            if packet.len() < header.len as usize {
                return Err(Broken::Request("packet shorter than its header says"));
            }
            packet.split_off(header.len as usize);
            if burst.port != header.dst_port || burst.length >= MAX_BURST || header.op() != Some(Op::ReadWrite) {
                self.pass_on(&mut burst, poll)?;
            }
            if self.take_packet(&header, poll) {
                burst.port = header.dst_port;
                burst.length += packet.len();
                burst.payloads.push(packet);
                burst.chains.push(chain);
            } else {
                self.from_guest.complete(&chain, 0)?;
            }
        }
        self.pass_on(&mut burst, poll)?;
        self.from_guest.notify()?;
        // If replies hold it up, it goes on when they have gone (`serve`).
        if !exhausted && self.resets.len() < MAX_RESETS {
            self.from_guest.kick_self();
        }
        Ok(())
    }

    /// Writes what was gathered, and gives the driver its buffers back.
    fn pass_on(&mut self, burst: &mut Burst, poll: &Poll) -> Result<(), Broken> {
        if burst.chains.is_empty() {
            return Ok(());
        }
        if let Some(link) = self.links.get_mut(&burst.port) {
            link.forward(&mut burst.payloads);
        }
        for chain in &burst.chains {
            self.from_guest.complete(chain, 0)?;
        }
        self.settle(burst.port, poll);
        *burst = Burst::default();
        Ok(())
    }

    /// Takes note of a packet; true if its payload is to be passed on to the link of its destination port.
    fn take_packet(&mut self, header: &Header, poll: &Poll) -> bool {
        let op = header.op();
        let addressed =
            header.src_cid == self.shared.guest_cid && header.dst_cid == HOST_CID && header.kind == TYPE_STREAM;
        let link = match self.links.get_mut(&header.dst_port) {
            Some(link) if addressed && link.connection.guest_port() == header.src_port => link,
            // Of no connection (5.10.6.5: answered with a reset, except a reset).
            _ => {
                if addressed && op == Some(Op::Request) && header.dst_port == self.shared.ready_port {
                    self.agent_ready(poll);
                }
                if op != Some(Op::Reset) {
                    self.reset(header.reset());
                }
                return false;
            }
        };
        let fate = match op.map(|op| link.connection.receive(op, header)) {
            Some(Ok(Received::Data)) => return true,
            Some(Ok(Received::Noted | Received::Discarded)) => Fate::Lives,
            Some(Ok(Received::Accepted)) => link.accepted(),
            Some(Err(_)) | None => Fate::Resets,
        };
        match fate {
            Fate::Lives => self.settle(header.dst_port, poll),
            _ => self.remove(header.dst_port, fate, poll),
        }
        false
    }
}
