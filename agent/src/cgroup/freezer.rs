//! Processes that stand still.

use std::time::Duration;

use super::{Cgroup, CgroupError, read, write};

/// How long processes may take to stop or to go on. One stuck in the kernel cannot be stopped.
pub const DEADLINE: Duration = Duration::from_secs(10);

impl Cgroup {
    /// Whether the group was told to stand still.
    pub fn is_frozen(&self) -> bool {
        read(&self.path.join("cgroup.freeze")).is_ok_and(|text| text.trim() == "1")
    }

    /// Stops every process of the group and the groups below, or lets them go on, and waits until they have. Those that cannot
    /// be stopped in time go on.
    pub async fn freeze(&self, frozen: bool) -> Result<(), CgroupError> {
        let control = self.path.join("cgroup.freeze");
        let mut watch = self.watch_events()?;
        write(&control, if frozen { "1" } else { "0" })?;
        if self.await_event(&mut watch, "frozen", u64::from(frozen), DEADLINE).await? {
            return Ok(());
        }
        if frozen {
            write(&control, "0")?;
        }
        Err(CgroupError::Freeze { path: self.path.clone(), frozen })
    }
}
