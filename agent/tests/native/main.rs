//! Containers made by the agent on this machine, without a virtual one around them. Needs root, cgroup v2 and busybox-static.
#![allow(clippy::unwrap_used)]

mod harness;

use harness::{Agent, shell};

#[tokio::test(flavor = "current_thread")]
async fn a_program_gets_its_streams_and_its_exit_code_comes_back() {
    let agent = Agent::start().await;
    let outcome = agent.run_in(&agent.rootfs(), &shell("cat; echo oops >&2; exit 42"), b"hello").await;
    assert_eq!((outcome.stdout.as_str(), outcome.stderr.as_str()), ("hello", "oops\n"));
    assert_eq!((outcome.exit.code, outcome.exit.signal), (42, 0));
}
