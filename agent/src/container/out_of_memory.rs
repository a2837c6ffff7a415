//! Kills of a container's processes for lack of memory.

use std::convert::Infallible;
use std::sync::Arc;

use podhull_protocol::{Event, OutOfMemory, event};

use crate::cgroup::Cgroup;
use crate::events::Events;

/// Says how many there were so far, whenever there are more.
pub struct Kills {
    id: String,
    cgroup: Arc<Cgroup>,
    events: Arc<Events>,
    said: u64,
}

impl Kills {
    /// Of the container `id`, whose group this is.
    pub fn new(id: String, cgroup: Arc<Cgroup>, events: Arc<Events>) -> Self {
        Self { id, cgroup, events, said: 0 }
    }

    /// Says it as it happens, for as long as it is polled.
    pub async fn watch(&mut self) -> Infallible {
        if let Ok(Some(mut watch)) = self.cgroup.watch_memory() {
            loop {
                self.say();
                if watch.changed().await.is_err() {
                    break;
                }
            }
        }
        std::future::pending().await
    }

    /// Says what was not said yet. The kernel tells of changes once in 10 ms at most (`CGROUP_FILE_NOTIFY_MIN_INTV`): a process
    /// that was killed may have ended before.
    pub fn say(&mut self) {
        let kills = self.cgroup.oom_kills();
        if kills > self.said {
            self.said = kills;
            let kind = event::Kind::OutOfMemory(OutOfMemory { kills, ..OutOfMemory::default() });
            self.events.push(Event { container_id: self.id.clone(), kind: Some(kind), ..Event::default() });
        }
    }
}
