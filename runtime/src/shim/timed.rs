//! How long the methods of a shim's services took: noted around what ttrpc calls, whichever service it is of.

use std::os::fd::BorrowedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use rustix::io::Errno;
use ttrpc::r#async::{MethodHandler, Service, TtrpcContext};
use ttrpc::{Request, Response, Result};

use crate::calls::{Calls, SHIM};

/// Where it is noted.
pub struct Durations(Mutex<Calls>);

impl Durations {
    /// None yet, and no pod that they would be of.
    pub fn new() -> Arc<Self> {
        Arc::new(Self(Mutex::new(Calls::without_pod(SHIM))))
    }

    /// They are those of the pod with this directory, where others find them.
    pub fn give_to(&self, pod: BorrowedFd<'_>) -> std::result::Result<(), Errno> {
        self.calls().give_to(pod)
    }

    /// A method took this long.
    pub fn note(&self, method: &str, took: Duration) {
        self.calls().count(method, took);
    }

    fn calls(&self) -> MutexGuard<'_, Calls> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A service whose methods are timed.
pub fn timed(service: Service, durations: &Arc<Durations>) -> Service {
    let methods = service.methods.into_iter().map(|(name, method)| {
        let timed = Timed { name: name.clone(), method, durations: durations.clone() };
        (name, Box::new(timed) as Method)
    });
    Service { methods: methods.collect(), streams: service.streams }
}

type Method = Box<dyn MethodHandler + Send + Sync>;

struct Timed {
    name: String,
    method: Method,
    durations: Arc<Durations>,
}

#[async_trait]
impl MethodHandler for Timed {
    async fn handler(&self, context: TtrpcContext, request: Request) -> Result<Response> {
        // One that takes too long is dropped by the server, and counts all the same.
        let _call = Call { of: self, began: Instant::now() };
        self.method.handler(context, request).await
    }
}

/// A call, noted when it is over.
struct Call<'a> {
    of: &'a Timed,
    began: Instant,
}

impl Drop for Call<'_> {
    fn drop(&mut self) {
        self.of.durations.note(&self.of.name, self.began.elapsed());
    }
}
