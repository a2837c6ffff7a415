//! What depends on the processor: how guest memory is laid out, how a kernel is entered, what a vCPU's state is.

#[cfg(target_arch = "x86_64")]
mod x86_64;
#[cfg(target_arch = "x86_64")]
pub use x86_64::*;
