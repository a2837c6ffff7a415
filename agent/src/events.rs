//! What happened to containers, kept until the host has taken it.

use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};

use podhull_protocol::Event;
use tokio::sync::{Notify, watch};

/// A queue of events with one reader at a time; a new reader supersedes the one before, whose connection may be long dead.
/// Bounded by nature: a container ends once, and its out-of-memory events are merged while they wait.
#[derive(Default)]
pub struct Events {
    queue: Mutex<VecDeque<Event>>,
    added: Notify,
    readers: watch::Sender<u64>,
}

impl Events {
    /// Adds an event, or updates the count of one of its kind that still waits.
    pub fn push(&self, event: Event) {
        let mut queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
        let waiting = event
            .has_out_of_memory()
            .then(|| queue.iter_mut().find(|e| e.has_out_of_memory() && e.container_id == event.container_id))
            .flatten();
        match waiting {
            Some(waiting) => *waiting = event,
            None => queue.push_back(event),
        }
        self.added.notify_one();
    }

    /// Becomes the reader.
    pub fn reader(&self) -> Reader<'_> {
        self.readers.send_modify(|number| *number += 1);
        Reader { events: self, superseded: self.readers.subscribe() }
    }
}

/// The one who takes the events.
pub struct Reader<'a> {
    events: &'a Events,
    superseded: watch::Receiver<u64>,
}

impl Reader<'_> {
    /// The next event; none when another reader has come.
    pub async fn next(&mut self) -> Option<Event> {
        loop {
            if let Some(event) = self.events.queue.lock().unwrap_or_else(PoisonError::into_inner).pop_front() {
                return Some(event);
            }
            tokio::select! {
                _ = self.superseded.changed() => {
                    // It may have been woken in our place.
                    self.events.added.notify_one();
                    return None;
                }
                () = self.events.added.notified() => {}
            }
        }
    }

    /// Leaves an event that could not be sent to the next reader.
    pub fn put_back(&self, event: Event) {
        self.events.queue.lock().unwrap_or_else(PoisonError::into_inner).push_front(event);
        self.events.added.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use podhull_protocol::{Exit, OutOfMemory, event};

    use super::*;

    fn event(id: &str, kind: event::Kind) -> Event {
        Event { container_id: id.into(), kind: Some(kind), ..Event::default() }
    }

    fn out_of_memory(id: &str, kills: u64) -> Event {
        event(id, event::Kind::OutOfMemory(OutOfMemory { kills, ..OutOfMemory::default() }))
    }

    #[tokio::test(flavor = "current_thread")]
    async fn an_event_that_could_not_be_sent_goes_to_the_next_reader() {
        let events = Events::default();
        events.push(event("a", event::Kind::Exit(Exit::default())));
        events.push(event("b", event::Kind::Exit(Exit::default())));
        let mut reader = events.reader();
        let event = reader.next().await.unwrap();
        reader.put_back(event);
        let mut reader = events.reader();
        assert_eq!(reader.next().await.unwrap().container_id, "a");
        assert_eq!(reader.next().await.unwrap().container_id, "b");
    }

    #[tokio::test(flavor = "current_thread")]
    async fn a_new_reader_ends_the_one_before() {
        let events = Events::default();
        let mut before = events.reader();
        let mut after = events.reader();
        assert!(before.next().await.is_none());
        events.push(event("a", event::Kind::Exit(Exit::default())));
        assert!(after.next().await.is_some());
    }

    #[tokio::test(flavor = "current_thread")]
    async fn out_of_memory_events_of_a_container_are_merged_while_they_wait() {
        let events = Events::default();
        events.push(out_of_memory("a", 1));
        events.push(out_of_memory("a", 2));
        events.push(out_of_memory("b", 1));
        let mut reader = events.reader();
        assert_eq!(reader.next().await, Some(out_of_memory("a", 2)));
        assert_eq!(reader.next().await, Some(out_of_memory("b", 1)));
    }
}
