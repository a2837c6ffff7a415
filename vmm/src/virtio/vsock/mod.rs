//! The socket device (5.10), in user space: connections of the guest end in Unix stream sockets of the host.
//!
//! Connections begin on the host. A client of the pod's socket names a port ([`host`]); the machine hands over connected
//! sockets through a [`VsockHandle`]. The one thing the guest may ask for is the *ready port*: its request there says that
//! the agent listens, and is refused.
//!
//! One thread serves the device ([`muxer`]). A connection is a [`link`]: its rules ([`connection`]), its socket, and what the
//! socket did not take yet. Bytes go straight between guest memory and sockets ([`socket`]); only what a slow peer does not
//! take is copied, and never more than the guest was promised room for.

mod connection;
mod device;
mod from_guest;
mod host;
mod link;
mod muxer;
mod packet;
mod socket;
mod to_guest;

#[cfg(test)]
mod driver;
#[cfg(test)]
mod tests;

pub use device::{Options, Vsock, VsockHandle};
