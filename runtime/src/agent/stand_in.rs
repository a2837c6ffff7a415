//! For tests: what answers in place of an agent.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

use podhull_protocol::AGENT_PORT;
use protobuf::Message;
use ttrpc::Code;
use ttrpc::proto::{MESSAGE_HEADER_LENGTH, MESSAGE_TYPE_RESPONSE, MessageHeader};

/// Answers every call at the socket of a pod in the same words, for as long as the test runs.
pub fn refuse(pod: &Path, code: Code, words: &str) {
    let socket = pod.join(crate::stdio::SOCKET);
    let _ = std::fs::remove_file(&socket);
    let listener = UnixListener::bind(socket).unwrap();
    let response = ttrpc::Response { status: Some(ttrpc::get_status(code, words)).into(), ..Default::default() };
    let response = response.write_to_bytes().unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            // Its end is that of who called.
            let _ = answer(stream.unwrap(), &response);
        }
    });
}

fn answer(mut stream: UnixStream, response: &[u8]) -> std::io::Result<()> {
    let mut from = BufReader::new(stream.try_clone()?);
    let mut line = String::new();
    from.read_line(&mut line)?;
    assert_eq!(line, format!("CONNECT {AGENT_PORT}\n"));
    stream.write_all(b"OK 1\n")?;
    loop {
        let mut header = [0; MESSAGE_HEADER_LENGTH];
        from.read_exact(&mut header)?;
        let header = MessageHeader::from(header);
        from.read_exact(&mut vec![0; header.length as usize])?;
        let length = u32::try_from(response.len()).unwrap();
        let answered = MessageHeader { length, type_: MESSAGE_TYPE_RESPONSE, flags: 0, ..header };
        stream.write_all(&[&Vec::from(answered), response].concat())?;
    }
}
