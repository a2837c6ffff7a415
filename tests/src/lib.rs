//! Black-box tests of podhull: each starts the built binary on a host with KVM and looks at what comes out and what stays.
//!
//! [`runtime`] knows the program under test, [`bundle`] makes what it is given, [`run`] starts it and waits with a deadline,
//! [`terminal`] gives it a terminal, [`container`] keeps it in the background, [`leaks`] finds what it left behind, [`metrics`] reads what it says of itself, [`seccomp`] reads the host's default profile, [`shape`] the keys of a document,
//! [`podman`], [`docker`], [`containerd`] and, as kubelet, [`cri`] are callers, [`shim`] is what they say to podhull's shim themselves,
//! [`image`] is what they load, [`cni`] their networks,
//! [`suite`] drives [`cases`], one module for each topic. [`bench`] measures with the same tools; [`conformance`] runs the suites of
//! others, [`kubernetes`] a cluster.
//!
//! The tests speak OCI, so that most of them can be tried on runc: `PODHULL_RUNTIME=runc podhull-e2e`. Only what is about
//! virtual machines is left out then.

pub mod bench;
pub mod bundle;
pub mod cases;
pub mod cni;
pub mod conformance;
pub mod container;
pub mod containerd;
pub mod cri;
pub mod cri_streams;
pub mod docker;
pub mod image;
pub mod kubernetes;
pub mod leaks;
pub mod metrics;
pub mod netns;
pub mod podman;
pub mod processes;
pub mod run;
pub mod runtime;
pub mod seccomp;
pub mod shape;
pub mod shim;
pub mod suite;
pub mod terminal;

/// Why a test failed: the text is all that is needed.
pub type Failure = Box<dyn std::error::Error + Send + Sync>;

/// What every step of a test returns.
pub type Outcome<T = ()> = Result<T, Failure>;

/// Fails the test with a formatted reason unless the condition holds.
#[macro_export]
macro_rules! ensure {
    ($condition:expr, $($reason:tt)+) => {
        if !$condition {
            return Err(format!($($reason)+).into());
        }
    };
}

/// Fails the test unless both sides are equal; the reason shows what it is about, and both.
#[macro_export]
macro_rules! ensure_eq {
    ($found:expr, $expected:expr, $($what:tt)+) => {{
        let (found, expected) = (&$found, &$expected);
        if *found != *expected {
            return Err(format!("{}: found {found:?}, expected {expected:?}", format!($($what)+)).into());
        }
    }};
}
