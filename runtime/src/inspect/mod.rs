//! What the administrator of a host sees of its pods, those of the command line and those of shims: `pods` finds them, `processes`
//! reads what their processes on the host use, `look` asks their machines and agents, `metrics` says all of it to Prometheus in
//! the format of `exposition`, and `trace` how a start went.

mod exposition;
mod look;
mod metrics;
mod pods;
mod processes;
mod trace;

pub use look::{Look, look_at_all};
pub use metrics::text as metrics;
pub use pods::{InspectError, Pod, chosen, chosen_under, expect_many, one};
pub use trace::json as trace;
