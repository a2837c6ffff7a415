//! `linux.resources` of a container: read from its specification, and written to the files of a control group (cgroup v2).
//!
//! In the guest the limits bind the container's processes; on the host they are written down once more, where callers read
//! them. Both sides do it with this, so that they cannot come to mean different things.

mod apply;
mod resources;
mod settings;

pub use apply::{LimitError, apply};
pub use resources::{
    BlockIo, Cpu, DeviceRule, HugepageLimit, Memory, Network, Pids, Priority, Rdma, Resources, ThrottleDevice,
    WeightDevice,
};
pub use settings::{Choice, Setting, Unenforceable, Weight, settings, weight_on_a_curve, weight_on_a_line};
