//! What an agent may send. ttrpc's client keeps all that comes until who asked for it has time, and messages take many times the
//! room of their bytes: so what is too much is noticed before it is kept, and ends the connection.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use ttrpc::proto::{MESSAGE_HEADER_LENGTH, MESSAGE_TYPE_DATA, MessageHeader};

/// Longest answer: numbers of a container with a thousand block devices are half of that.
const MOST_ANSWER: u32 = 128 << 10;

const _: () = assert!(podhull_protocol::MAX_POD_STATS < MOST_ANSWER as usize - 1024);

/// Longest answer to who has asked for one that is long: a log, whose lines the agent counts with what surrounds them.
const MOST_LONG_ANSWER: u32 = podhull_protocol::MAX_LOG as u32 + (4 << 10);

/// Longest event: two ids, of 1 024 bytes each, and some numbers.
const MOST_EVENT: u32 = 8 << 10;

/// Most events that wait for who asked for them.
const MOST_WAITING: usize = 1024;

/// What is said of an answer that is too long.
pub const LONG_ANSWER: &str = "an answer that is too long";

/// What is said of an event that is too long.
pub const LONG_EVENT: &str = "an event that is too long";

/// What is said of too many events.
pub const FLOOD: &str = "more events than anybody can take";

/// What holds for a connection: how many events came and were not taken yet, and how long answers may be at the moment.
#[derive(Debug, Clone)]
pub struct Bounds(Arc<State>);

#[derive(Debug)]
struct State {
    waiting: AtomicUsize,
    longest: AtomicU32,
}

impl Default for Bounds {
    fn default() -> Self {
        Self(Arc::new(State { waiting: AtomicUsize::new(0), longest: AtomicU32::new(MOST_ANSWER) }))
    }
}

impl Bounds {
    /// An event was taken.
    pub fn take(&self) {
        // There are none but those that came.
        let _ = self.0.waiting.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |count| count.checked_sub(1));
    }

    /// A long answer has been asked for.
    pub fn for_long(&self) -> Long {
        self.0.longest.store(MOST_LONG_ANSWER, Ordering::Relaxed);
        Long(self.clone())
    }
}

/// As long as this lives, answers may be long.
pub struct Long(Bounds);

impl Drop for Long {
    fn drop(&mut self) {
        self.0.0.longest.store(MOST_ANSWER, Ordering::Relaxed);
    }
}

/// A stream of ttrpc's frames to and from an agent.
pub struct Frames<S> {
    stream: S,
    bounds: Bounds,
    /// The header of the frame that comes next, and how much of it is there.
    header: [u8; MESSAGE_HEADER_LENGTH],
    have: usize,
    /// What is still to come of the frame's contents.
    left: u32,
}

impl<S> Frames<S> {
    /// Looks at what comes from a stream; `bounds` counts events.
    pub fn new(stream: S, bounds: Bounds) -> Self {
        Self { stream, bounds, header: [0; MESSAGE_HEADER_LENGTH], have: 0, left: 0 }
    }

    /// These bytes come next.
    fn see(&mut self, mut bytes: &[u8]) -> Result<(), &'static str> {
        while !bytes.is_empty() {
            if self.left > 0 {
                let length = bytes.len().min(usize::try_from(self.left).unwrap_or(usize::MAX));
                self.left -= u32::try_from(length).unwrap_or(self.left);
                bytes = &bytes[length..];
                continue;
            }
            let length = bytes.len().min(self.header.len() - self.have);
            self.header[self.have..][..length].copy_from_slice(&bytes[..length]);
            self.have += length;
            bytes = &bytes[length..];
            if self.have == self.header.len() {
                self.have = 0;
                self.begin(MessageHeader::from(self.header))?;
            }
        }
        Ok(())
    }

    /// A frame begins.
    fn begin(&mut self, header: MessageHeader) -> Result<(), &'static str> {
        self.left = header.length;
        if header.type_ != MESSAGE_TYPE_DATA {
            return if header.length > self.bounds.0.longest.load(Ordering::Relaxed) {
                Err(LONG_ANSWER)
            } else {
                Ok(())
            };
        }
        if header.length > MOST_EVENT {
            return Err(LONG_EVENT);
        }
        if self.bounds.0.waiting.fetch_add(1, Ordering::Relaxed) >= MOST_WAITING { Err(FLOOD) } else { Ok(()) }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Frames<S> {
    fn poll_read(self: Pin<&mut Self>, context: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let before = buffer.filled().len();
        match Pin::new(&mut this.stream).poll_read(context, buffer) {
            Poll::Ready(Ok(())) => Poll::Ready(this.see(&buffer.filled()[before..]).map_err(io::Error::other)),
            other => other,
        }
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Frames<S> {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().stream).poll_write(context, bytes)
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_flush(context)
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use ttrpc::proto::MESSAGE_TYPE_RESPONSE;

    use super::*;

    fn frame(type_: u8, length: u32) -> Vec<u8> {
        let header = Vec::from(MessageHeader { length, stream_id: 1, type_, flags: 0 });
        [header, vec![7; length as usize]].concat()
    }

    fn frames() -> (Frames<()>, Bounds) {
        let bounds = Bounds::default();
        (Frames::new((), bounds.clone()), bounds)
    }

    #[test]
    fn frames_are_found_however_they_are_cut() {
        let bytes =
            [frame(MESSAGE_TYPE_RESPONSE, 5), frame(MESSAGE_TYPE_DATA, 0), frame(MESSAGE_TYPE_DATA, 300)].concat();
        for size in [1, 3, 10, 11, bytes.len()] {
            let (mut frames, bounds) = frames();
            for part in bytes.chunks(size) {
                frames.see(part).unwrap();
            }
            assert_eq!(
                (bounds.0.waiting.load(Ordering::Relaxed), frames.left, frames.have),
                (2, 0, 0),
                "in parts of {size}"
            );
        }
    }

    #[test]
    fn what_is_too_long_is_refused_by_its_header() {
        let header = |type_, length| Vec::from(MessageHeader { length, stream_id: 1, type_, flags: 0 });
        for (type_, length, said) in [
            (MESSAGE_TYPE_RESPONSE, MOST_ANSWER + 1, LONG_ANSWER),
            (MESSAGE_TYPE_DATA, MOST_EVENT + 1, LONG_EVENT),
            (0x77, u32::MAX, LONG_ANSWER),
        ] {
            assert_eq!(frames().0.see(&header(type_, length)), Err(said));
        }
        assert_eq!(frames().0.see(&frame(MESSAGE_TYPE_RESPONSE, MOST_ANSWER)), Ok(()));
        let (mut frames, bounds) = frames();
        let long = bounds.for_long();
        assert_eq!(frames.see(&frame(MESSAGE_TYPE_RESPONSE, MOST_LONG_ANSWER)), Ok(()));
        drop(long);
        assert_eq!(frames.see(&frame(MESSAGE_TYPE_RESPONSE, MOST_LONG_ANSWER)), Err(LONG_ANSWER));
    }

    #[test]
    fn events_that_nobody_takes_are_too_many_in_the_end() {
        let (mut frames, bounds) = frames();
        for _ in 0..3 * MOST_WAITING {
            frames.see(&frame(MESSAGE_TYPE_DATA, 1)).unwrap();
            bounds.take();
        }
        for _ in 0..MOST_WAITING {
            frames.see(&frame(MESSAGE_TYPE_DATA, 1)).unwrap();
        }
        assert_eq!(frames.see(&frame(MESSAGE_TYPE_DATA, 1)), Err(FLOOD));
        bounds.take();
    }
}
