//! ttrpc's frames, made by hand so that they can be wrong.

use std::fs::File;
use std::io::{self, Read, Write};
use std::sync::{Arc, Condvar, Mutex, PoisonError};

use protobuf::Message;
use ttrpc::proto::{MESSAGE_HEADER_LENGTH, MESSAGE_TYPE_DATA, MESSAGE_TYPE_RESPONSE};
use ttrpc::{Code, MessageHeader, Request, Response, get_status};

/// A call: the number of its stream, and what is asked for.
pub struct Call {
    /// Number of the stream.
    pub stream: u32,
    /// What is asked for.
    pub request: Request,
}

/// A connection that several threads write to. A write that has to wait for room is made in parts; so each has its turn, in the
/// order they come: who writes without end neither cuts another's frame in two nor keeps it from being written.
pub struct Connection {
    file: File,
    turns: Arc<Turns>,
}

/// The number of the turn that is given next, and of the one that is on.
#[derive(Default)]
struct Turns {
    numbers: Mutex<(u64, u64)>,
    ended: Condvar,
}

impl Connection {
    /// For what nobody else writes to.
    pub fn new(file: File) -> Self {
        Self { file, turns: Arc::default() }
    }

    /// The same for another thread.
    pub fn try_clone(&self) -> io::Result<Self> {
        Ok(Self { file: self.file.try_clone()?, turns: self.turns.clone() })
    }

    /// Writes in its turn.
    pub fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        let Turns { numbers, ended } = &*self.turns;
        let mut turn = numbers.lock().unwrap_or_else(PoisonError::into_inner);
        let mine = turn.0;
        turn.0 += 1;
        drop(ended.wait_while(turn, |turn| turn.1 != mine));
        let sent = self.file.write_all(bytes);
        numbers.lock().unwrap_or_else(PoisonError::into_inner).1 += 1;
        ended.notify_all();
        sent
    }
}

/// Reads the next call.
pub fn read(connection: &mut Connection) -> io::Result<Call> {
    let mut header = [0; MESSAGE_HEADER_LENGTH];
    connection.file.read_exact(&mut header)?;
    let header = MessageHeader::from(header);
    let mut body = vec![0; header.length as usize];
    connection.file.read_exact(&mut body)?;
    let request = Request::parse_from_bytes(&body).map_err(io::Error::other)?;
    Ok(Call { stream: header.stream_id, request })
}

/// Writes a frame whose header may say anything.
pub fn write(connection: &mut Connection, header: MessageHeader, body: &[u8]) -> io::Result<()> {
    connection.send(&[Vec::from(header), body.to_vec()].concat())
}

/// A frame of its own length.
pub fn plain(connection: &mut Connection, type_: u8, stream_id: u32, body: &[u8]) -> io::Result<()> {
    let length = u32::try_from(body.len()).unwrap_or(u32::MAX);
    write(connection, MessageHeader { length, stream_id, type_, flags: 0 }, body)
}

/// Answers a call with a message.
pub fn answer(connection: &mut Connection, stream: u32, message: &dyn protobuf::MessageDyn) -> io::Result<()> {
    let payload = message.write_to_bytes_dyn().map_err(io::Error::other)?;
    answer_bytes(connection, stream, payload)
}

/// Answers a call with bytes that may be no message.
pub fn answer_bytes(connection: &mut Connection, stream: u32, payload: Vec<u8>) -> io::Result<()> {
    let response = Response { payload, ..Default::default() };
    plain(connection, MESSAGE_TYPE_RESPONSE, stream, &response.write_to_bytes().map_err(io::Error::other)?)
}

/// Refuses a call.
pub fn refuse(connection: &mut Connection, stream: u32, code: Code, text: &str) -> io::Result<()> {
    let response = Response { status: Some(get_status(code, text)).into(), ..Default::default() };
    plain(connection, MESSAGE_TYPE_RESPONSE, stream, &response.write_to_bytes().map_err(io::Error::other)?)
}

/// Sends a message on a stream.
pub fn event(connection: &mut Connection, stream: u32, message: &dyn protobuf::MessageDyn) -> io::Result<()> {
    plain(connection, MESSAGE_TYPE_DATA, stream, &message.write_to_bytes_dyn().map_err(io::Error::other)?)
}
