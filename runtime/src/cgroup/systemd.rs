//! Asking systemd for scopes, over the system bus.

use std::path::Path;
use std::pin::Pin;
use std::time::Duration;

use serde::Serialize;
use zbus::export::futures_core::Stream;
use zbus::message::{Message, Type};
use zbus::{Connection, DynamicType, MatchRule, MessageStream, OwnedObjectPath, Variant};

use super::CgroupError;
use super::properties::Property;

/// What systemd is called on the bus, and where its manager is.
const SERVICE: &str = "org.freedesktop.systemd1";
const PATH: &str = "/org/freedesktop/systemd1";
const MANAGER: &str = "org.freedesktop.systemd1.Manager";

/// How long systemd may take for one unit; the same as runc gives it.
pub const DEADLINE: Duration = Duration::from_secs(30);

/// Whether this host was booted with systemd (sd_booted(3)).
pub fn is_running() -> bool {
    Path::new("/run/systemd/system").symlink_metadata().is_ok_and(|metadata| metadata.is_dir())
}

/// What a scope is to be.
pub struct Scope {
    /// Where it is.
    pub slice: String,
    /// What people see of it.
    pub description: String,
    /// What else there is to say.
    pub further: Vec<Property>,
}

/// Starts a scope with one process in it, and waits until its group is there.
pub fn start(unit: &str, pid: i32, scope: Scope) -> Result<(), CgroupError> {
    let mut properties = vec![
        Property::new("Description", scope.description),
        Property::new("Slice", scope.slice),
        Property::new("PIDs", vec![pid.cast_unsigned()]),
        // What is below it, and its files, are ours.
        Property::new("Delegate", true),
        Property::new("MemoryAccounting", true),
        Property::new("CPUAccounting", true),
        Property::new("IOAccounting", true),
        Property::new("TasksAccounting", true),
        Property::new("DefaultDependencies", false),
        // One that failed is forgotten too: its name may be wanted again.
        Property::new("CollectMode", "inactive-or-failed".to_owned()),
    ];
    // Whatever is said twice, the later counts.
    properties.extend(scope.further);
    let properties: Vec<_> = properties.into_iter().map(Property::into_wire).collect();
    on_bus("start", unit, DEADLINE, async |bus| {
        // For units that come with it: there are none.
        let others: &[(&str, Vec<(&str, Variant<'_>)>)] = &[];
        let body = (unit, "replace", properties, others);
        match bus.job(unit, "StartTransientUnit", &body).await {
            Err(error) if error.is("UnitExists") => {
                // It may be one that has failed, and that nobody has forgotten yet.
                bus.call("ResetFailedUnit", &unit).await?;
                bus.job(unit, "StartTransientUnit", &body).await
            }
            other => other,
        }
    })
}

/// Sets properties of a unit that runs, until it ends.
pub fn set_properties(unit: &str, properties: Vec<Property>) -> Result<(), CgroupError> {
    if properties.is_empty() {
        return Ok(());
    }
    let properties: Vec<_> = properties.into_iter().map(Property::into_wire).collect();
    on_bus("set properties of", unit, DEADLINE, async |bus| {
        bus.call("SetUnitProperties", &(unit, true, properties)).await.map(drop)
    })
}

/// Stops a unit, and waits so long until it is gone; it may be gone already.
pub fn stop(unit: &str, deadline: Duration) -> Result<(), CgroupError> {
    on_bus("stop", unit, deadline, async |bus| match bus.job(unit, "StopUnit", &(unit, "replace")).await {
        Err(error) if error.is("NoSuchUnit") => Ok(()),
        other => other,
    })
}

/// Why systemd did not do something.
enum Failure {
    Bus(zbus::Error),
    /// What became of the job.
    Job(String),
}

impl Failure {
    /// Whether systemd answered with one of its own errors.
    fn is(&self, name: &str) -> bool {
        let Self::Bus(zbus::Error::MethodError(found, ..)) = self else { return false };
        found.as_str().strip_prefix(SERVICE).and_then(|found| found.strip_prefix('.')) == Some(name)
    }
}

impl From<zbus::Error> for Failure {
    fn from(error: zbus::Error) -> Self {
        Self::Bus(error)
    }
}

/// Does something with a connection of its own, which is to be done in time.
fn on_bus(
    what: &'static str,
    unit: &str,
    deadline: Duration,
    action: impl AsyncFnOnce(Bus) -> Result<(), Failure>,
) -> Result<(), CgroupError> {
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_io().enable_time().build().map_err(CgroupError::Events)?;
    let says = |why: String| CgroupError::Systemd { what, unit: unit.to_owned(), why };
    let done = runtime.block_on(async {
        tokio::time::timeout(deadline, async { action(Bus(Connection::system().await?)).await }).await
    });
    match done {
        Ok(Ok(())) => Ok(()),
        Ok(Err(Failure::Job(result))) => Err(says(format!("the result is {result:?}"))),
        Ok(Err(Failure::Bus(zbus::Error::MethodError(name, text, _)))) => {
            Err(says(text.unwrap_or_else(|| name.to_string())))
        }
        Ok(Err(Failure::Bus(error))) => Err(CgroupError::Bus(error)),
        Err(_) => Err(says(format!("no answer within {} s", deadline.as_secs()))),
    }
}

/// A connection to the system bus.
struct Bus(Connection);

impl Bus {
    async fn call(&self, method: &str, body: &(impl Serialize + DynamicType)) -> Result<Message, Failure> {
        Ok(self.0.call_method(Some(SERVICE), PATH, Some(MANAGER), method, body).await?)
    }

    /// Calls what starts a job, and waits for the job's end.
    async fn job(&self, unit: &str, method: &str, body: &(impl Serialize + DynamicType)) -> Result<(), Failure> {
        let ends = MatchRule::builder()
            .msg_type(Type::Signal)
            .sender(SERVICE)
            .interface(MANAGER)
            .member("JobRemoved")
            .arg(2, unit)
            .build()?;
        // Before the call: the job may end at once.
        let mut ends = MessageStream::for_match_rule(ends, &self.0, None).await?;
        let answer = self.call(method, body).await?;
        let job: OwnedObjectPath = answer.body().deserialize()?;
        loop {
            let message = std::future::poll_fn(|context| Pin::new(&mut ends).poll_next(context)).await;
            let message = message.unwrap_or(Err(zbus::Error::InputOutput(
                std::io::Error::from(std::io::ErrorKind::UnexpectedEof).into(),
            )))?;
            let body = message.body();
            let (_, ended, _, result): (u32, OwnedObjectPath, &str, &str) = body.deserialize()?;
            if ended == job {
                return if result == "done" { Ok(()) } else { Err(Failure::Job(result.to_owned())) };
            }
        }
    }
}
