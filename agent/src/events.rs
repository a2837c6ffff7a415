//! What happened to containers, kept until the host has taken it.

use std::collections::{HashMap, HashSet, VecDeque};
use std::pin::pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use podhull_protocol::{Event, event};
use tokio::sync::{Notify, broadcast, watch};

use crate::log;

/// Events that a watcher may be behind before it misses some.
const WATCHED: usize = 64;

/// A queue of events. Each goes to one reader: that of the process it is about, or that of all. A new reader of the same
/// supersedes the one before, whose connection may be long dead. Bounded by nature: a process ends once, a container's
/// out-of-memory events are merged while they wait, and what nobody will ask for any more is forgotten.
pub struct Events {
    queue: Mutex<VecDeque<Event>>,
    added: Notify,
    /// The latest reader of each subject.
    readers: watch::Sender<HashMap<Subject, Reading>>,
    count: AtomicU64,
    /// Those who only watch get copies.
    watchers: broadcast::Sender<Event>,
}

impl Default for Events {
    fn default() -> Self {
        Self {
            queue: Mutex::default(),
            added: Notify::default(),
            readers: watch::Sender::default(),
            count: AtomicU64::default(),
            watchers: broadcast::Sender::new(WATCHED),
        }
    }
}

/// A container, and the process executed in it; both empty for all.
type Subject = (String, String);

/// Who reads the events of a subject.
struct Reading {
    number: u64,
    /// Nobody will come after it.
    last: bool,
}

/// Notes in the log what happens to containers. What is executed in them, as by probes, would soon be all that is in it.
fn say(event: &Event) {
    match &event.kind {
        Some(event::Kind::Exit(exit)) if event.exec_id.is_empty() => {
            let (code, signal) = (exit.code, exit.signal);
            log::container(&event.container_id, format_args!("ended with status {code}, signal {signal}"));
        }
        Some(event::Kind::OutOfMemory(oom)) => {
            log::container(&event.container_id, format_args!("out of memory: {} processes killed so far", oom.kills));
        }
        _ => {}
    }
}

impl Events {
    /// Adds an event, or updates the count of one of its kind that still waits.
    pub fn push(&self, event: Event) {
        say(&event);
        // There may be nobody.
        let _ = self.watchers.send(event.clone());
        let mut queue = self.queue();
        let waiting = event
            .has_out_of_memory()
            .then(|| queue.iter_mut().find(|e| e.has_out_of_memory() && e.container_id == event.container_id))
            .flatten();
        match waiting {
            Some(waiting) => *waiting = event,
            None => queue.push_back(event),
        }
        self.added.notify_waiters();
    }

    /// Becomes the reader of a process's events, or of all if both are empty.
    pub fn reader(&self, container: &str, exec: &str) -> Reader<'_> {
        let subject: Subject = (container.into(), exec.into());
        let number = self.count.fetch_add(1, Ordering::Relaxed);
        self.readers.send_modify(|readers| {
            readers.insert(subject.clone(), Reading { number, last: false });
        });
        Reader { events: self, subject, number, readers: self.readers.subscribe() }
    }

    /// Nobody stands for an executed process any more, and it is gone: its events are for who reads them now, and for nobody later.
    pub fn forget(&self, container: &str, exec: &str) {
        self.forget_those(|(of, process)| of == container && process == exec);
    }

    /// The same for a container, and all that was executed in it.
    pub fn forget_container(&self, container: &str) {
        self.forget_those(|(of, _)| of == container);
    }

    fn forget_those(&self, gone: impl Fn(&Subject) -> bool) {
        let mut read = HashSet::new();
        self.readers.send_if_modified(|readers| {
            for (subject, reading) in readers.iter_mut().filter(|(subject, _)| is_all(subject) || gone(subject)) {
                // Its connection may be dead without its having been told, and what it has taken comes back then.
                reading.last = !is_all(subject);
                read.insert(subject.clone());
            }
            // Nobody waits to hear that.
            false
        });
        // Who reads of all takes what is there, too.
        if !read.iter().any(is_all) {
            self.queue().retain(|event| {
                let subject = (event.container_id.clone(), event.exec_id.clone());
                !gone(&subject) || read.contains(&subject)
            });
        }
    }

    /// Watches what happens to a process from now on, or to all if both are empty, and takes nothing from anybody.
    pub fn watcher(&self, container: &str, exec: &str) -> Watcher {
        Watcher { subject: (container.into(), exec.into()), copies: self.watchers.subscribe() }
    }

    /// How many there are who take events.
    #[cfg(test)]
    pub fn count_readers(&self) -> usize {
        self.readers.borrow().len()
    }

    /// How many there are that nobody has taken.
    #[cfg(test)]
    pub fn count(&self) -> usize {
        self.queue().len()
    }

    fn queue(&self) -> MutexGuard<'_, VecDeque<Event>> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The one who takes the events of a subject.
pub struct Reader<'a> {
    events: &'a Events,
    subject: Subject,
    number: u64,
    readers: watch::Receiver<HashMap<Subject, Reading>>,
}

impl Reader<'_> {
    /// The next event; none when another reader of the same has come.
    pub async fn next(&mut self) -> Option<Event> {
        loop {
            // Before the look at the queue, so that no event comes between look and wait unseen.
            let mut added = pin!(self.events.added.notified());
            added.as_mut().enable();
            let latest = self.readers.borrow_and_update().get(&self.subject).map(|reading| reading.number);
            if latest != Some(self.number) {
                return None;
            }
            if let Some(event) = self.take() {
                return Some(event);
            }
            tokio::select! {
                _ = self.readers.changed() => {}
                () = added => {}
            }
        }
    }

    fn take(&self) -> Option<Event> {
        let mut queue = self.events.queue();
        let index = queue.iter().position(|event| is_about(event, &self.subject))?;
        queue.remove(index)
    }

    /// Leaves an event that could not be sent to the next reader.
    pub fn put_back(&self, event: Event) {
        self.events.queue().push_front(event);
        self.events.added.notify_waiters();
    }
}

impl Drop for Reader<'_> {
    /// Forgets the subject, unless another reads it now; its events, too, if nobody will.
    fn drop(&mut self) {
        let mut last = false;
        self.events.readers.send_if_modified(|readers| {
            if readers.get(&self.subject).is_some_and(|reading| reading.number == self.number) {
                last = readers.remove(&self.subject).is_some_and(|reading| reading.last);
            }
            // Nobody waits to hear that.
            false
        });
        if last {
            self.events.queue().retain(|event| !is_about(event, &self.subject));
        }
    }
}

fn is_all((container, exec): &Subject) -> bool {
    container.is_empty() && exec.is_empty()
}

fn is_about(event: &Event, subject: &Subject) -> bool {
    is_all(subject) || (event.container_id == subject.0 && event.exec_id == subject.1)
}

/// One who gets copies of the events of a subject.
pub struct Watcher {
    subject: Subject,
    copies: broadcast::Receiver<Event>,
}

impl Watcher {
    /// The next event; what came while nobody asked for it may be lost.
    pub async fn next(&mut self) -> Option<Event> {
        loop {
            match self.copies.recv().await {
                Ok(event) if is_about(&event, &self.subject) => return Some(event),
                Ok(_) | Err(broadcast::error::RecvError::Lagged(_)) => {}
                Err(broadcast::error::RecvError::Closed) => return None,
            }
        }
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
        let mut reader = events.reader("", "");
        let event = reader.next().await.unwrap();
        reader.put_back(event);
        let mut reader = events.reader("", "");
        assert_eq!(reader.next().await.unwrap().container_id, "a");
        assert_eq!(reader.next().await.unwrap().container_id, "b");
    }

    #[tokio::test(flavor = "current_thread")]
    async fn a_new_reader_ends_the_one_before() {
        let events = Events::default();
        let mut before = events.reader("", "");
        let mut after = events.reader("", "");
        assert!(before.next().await.is_none());
        events.push(event("a", event::Kind::Exit(Exit::default())));
        assert!(after.next().await.is_some());
    }

    #[tokio::test(flavor = "current_thread")]
    async fn each_reader_takes_what_is_about_its_process() {
        let events = Events::default();
        let exit = |exec: &str| Event { exec_id: exec.into(), ..event("a", event::Kind::Exit(Exit::default())) };
        let (mut init, mut first, mut second) =
            (events.reader("a", ""), events.reader("a", "1"), events.reader("a", "2"));
        for exec in ["2", "", "1"] {
            events.push(exit(exec));
        }
        assert_eq!(init.next().await, Some(exit("")));
        assert_eq!(first.next().await, Some(exit("1")));
        assert_eq!(second.next().await, Some(exit("2")));
        drop((first, second));
        assert_eq!(events.count_readers(), 1);
    }

    #[tokio::test(flavor = "current_thread")]
    async fn what_nobody_will_ask_for_is_forgotten() {
        let events = Events::default();
        let exit =
            |id: &str, exec: &str| Event { exec_id: exec.into(), ..event(id, event::Kind::Exit(Exit::default())) };
        for (id, exec) in [("a", ""), ("a", "1"), ("a", "2"), ("b", "1")] {
            events.push(exit(id, exec));
        }
        events.forget("a", "1");
        assert_eq!(events.count(), 3);
        events.forget("a", "1");
        events.push(out_of_memory("a", 1));
        events.forget_container("a");
        assert_eq!(events.count(), 1);
        assert_eq!(events.reader("", "").next().await, Some(exit("b", "1")));
        // A container that has the name of one that is gone.
        let mut reader = events.reader("a", "");
        events.push(exit("a", ""));
        assert_eq!((reader.next().await, events.count()), (Some(exit("a", "")), 0));
    }

    #[tokio::test(flavor = "current_thread")]
    async fn who_reads_of_what_is_forgotten_reads_it_to_its_end() {
        let events = Events::default();
        let exit = |exec: &str| Event { exec_id: exec.into(), ..event("a", event::Kind::Exit(Exit::default())) };
        let (mut taker, mut loser, idle) = (events.reader("a", "1"), events.reader("a", "2"), events.reader("a", "3"));
        for exec in ["1", "2", "3", "4"] {
            events.push(exit(exec));
        }
        // It is on its way on a connection that is dead.
        let lost = loser.next().await.unwrap();
        events.forget_container("a");
        assert_eq!((taker.next().await, events.count()), (Some(exit("1")), 1));
        loser.put_back(lost);
        assert_eq!(events.count(), 2);
        drop((taker, loser));
        assert_eq!(events.count(), 1);
        drop(idle);
        assert_eq!((events.count(), events.count_readers()), (0, 0));
        // Who reads of all is told of it all.
        let mut all = events.reader("", "");
        events.push(exit("5"));
        events.forget("a", "5");
        assert_eq!(all.next().await, Some(exit("5")));
    }

    #[tokio::test(flavor = "current_thread")]
    async fn who_watches_takes_nothing() {
        let events = Events::default();
        events.push(out_of_memory("a", 1));
        let mut watcher = events.watcher("a", "");
        events.push(out_of_memory("b", 1));
        events.push(out_of_memory("a", 2));
        assert_eq!(watcher.next().await, Some(out_of_memory("a", 2)));
        assert_eq!(events.reader("a", "").next().await, Some(out_of_memory("a", 2)));
        // However slow it is, it holds nothing up, and sees what comes at last.
        for kills in 0..1000 {
            events.push(out_of_memory("a", kills));
        }
        let mut seen = 0;
        while let Ok(Some(event)) = tokio::time::timeout(std::time::Duration::ZERO, watcher.next()).await {
            seen = event.out_of_memory().kills;
        }
        assert_eq!(seen, 999);
    }

    #[tokio::test(flavor = "current_thread")]
    async fn out_of_memory_events_of_a_container_are_merged_while_they_wait() {
        let events = Events::default();
        events.push(out_of_memory("a", 1));
        events.push(out_of_memory("a", 2));
        events.push(out_of_memory("b", 1));
        let mut reader = events.reader("", "");
        assert_eq!(reader.next().await, Some(out_of_memory("a", 2)));
        assert_eq!(reader.next().await, Some(out_of_memory("b", 1)));
    }
}
